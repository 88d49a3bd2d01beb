"""Examine surgery on every architecture that transformers ships; the docs site shows the results.

    python benchmarks/architectures.py [TYPE ...]

Each type is built tiny, with random weights, from its config class, and examined by `tests/modeling_mxd/census.py`.
Finding the MLPs of a 32-layer model is timed, and so is verifying a splice. Results go to
benchmarks/results/architectures.json; with types named, they are only printed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "modeling_mxd"))

from census import WORKS, examine  # noqa: E402
from pages import architectures_table  # noqa: E402
from tiny_models import CAUSAL_TYPES, OTHER_TYPES, UNBUILDABLE, VARIANTS  # noqa: E402

from mxd.modeling_mxd import find_mlps  # noqa: E402
from mxd.modeling_mxd.loading import first_line  # noqa: E402
from mxd.modeling_mxd.surgery import _VERIFIED, verify_sites  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
TOKENS = 8  # of a verification


def examine_all(types: list[str]) -> dict[str, dict[str, Any]]:
    """Examine types: {type: {"works": …, "error": …, "mlps": […]}}."""
    results: dict[str, dict[str, Any]] = {}
    for model_type in tqdm(types, unit="type"):
        try:
            WORKS.clear()  # every type is spliced here, those with another's code too
            rows = examine(model_type)
        except Exception as error:  # reported in the table
            results[model_type] = {"works": False, "error": f"{type(error).__name__}: {first_line(error)}", "mlps": []}
        else:
            works = any(row.slots for row in rows)
            results[model_type] = {"works": works, "error": None, "mlps": [asdict(row) for row in rows]}
    return results


def median_seconds(call: Callable[[], object], repeats: int = 15) -> float:
    """Return the median time of a call, in seconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure_times(hidden_size: int = 512) -> dict[str, float]:
    """Time finding the MLPs of a 32-layer Llama in milliseconds, and verifying its last layer and all layers in forward
    passes of as many tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=32,
        num_attention_heads=8,
    )
    model = LlamaForCausalLM(config).eval()
    sites = list(find_mlps(model).values())

    def verify(chosen: list[Any]) -> None:
        _VERIFIED.clear()
        verify_sites(model, chosen)

    with torch.no_grad():
        forward = median_seconds(lambda: model(torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=False))
    return {
        "find_mlps_milliseconds": 1e3 * median_seconds(lambda: find_mlps(model)),
        "verification_of_last_layer_in_forward_passes": median_seconds(lambda: verify(sites[-1:])) / forward,
        "verification_of_all_layers_in_forward_passes": median_seconds(lambda: verify(sites)) / forward,
    }


def count(results: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    """Return {kind: [types that work, types that were examined]}."""
    others = [name for name in OTHER_TYPES if name not in CAUSAL_TYPES]  # those of both are built as causal ones
    kinds = {"causal language models": CAUSAL_TYPES, "other types": others, "variants": list(VARIANTS)}
    return {kind: [sum(results[name]["works"] for name in types), len(types)] for kind, types in kinds.items()}


def main() -> None:
    """Examine, and write the results unless types are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    chosen = parser.parse_args().types
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results = examine_all(chosen or [*CAUSAL_TYPES, *OTHER_TYPES, *VARIANTS])
    if chosen:
        sys.stdout.write(architectures_table(results) + "\n")
        return
    found = {
        "transformers": transformers.__version__,
        **measure_times(),
        "counts": count(results),
        "not_built": UNBUILDABLE,
        "types": results,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Examine surgery on every architecture that transformers ships, and write the table of docs/architectures.md.

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

from census import Examined, examine  # noqa: E402
from pages import write_between  # noqa: E402
from tiny_models import CAUSAL_TYPES, OTHER_TYPES, UNBUILDABLE, VARIANTS  # noqa: E402

from mxd.modeling_mxd import find_mlps  # noqa: E402
from mxd.modeling_mxd.loading import first_line  # noqa: E402
from mxd.modeling_mxd.surgery import _VERIFIED, verify_sites  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
TABLE = ROOT / "docs" / "architectures.md"
MARK = "benchmarks/architectures.py"
TOKENS = 8  # of a verification


def examine_all(types: list[str]) -> dict[str, dict[str, Any]]:
    """Examine types: {type: {"works": …, "error": …, "mlps": […]}}."""
    results: dict[str, dict[str, Any]] = {}
    for model_type in tqdm(types, unit="type"):
        try:
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


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown table: a line for every kind of MLP in every stack of every type."""
    lines = [
        "| type | stack | site | layers | kind | modules | weights | activation | works |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model_type, result in results.items():
        if not result["mlps"]:
            lines.append(f"| {_cell(model_type)} | | | | | | | | no: {_cell(result['error'] or 'no MLP runs')} |")
        for row in result["mlps"]:
            mlp = Examined(**row)
            works = "yes" if mlp.slots else f"no: {mlp.reason}"
            works += f" ({mlp.reason})" if mlp.slots and mlp.reason else ""
            cells = (
                mlp.stack,
                mlp.site,
                _ranges(mlp.layers),
                mlp.kind,
                mlp.slots,
                mlp.layout,
                mlp.hidden_act or "",
                works,
            )
            lines.append(f"| {_cell(model_type)} | {' | '.join(_cell(cell) for cell in cells)} |")
    lines += [
        f"| {_cell(model_type)} | | | | | | | | not built: {_cell(why)} |" for model_type, why in UNBUILDABLE.items()
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


def _ranges(layers: list[int]) -> str:
    consecutive = len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if consecutive else ", ".join(map(str, layers))


def summary(results: dict[str, dict[str, Any]], times: dict[str, float]) -> str:
    """Return counts and times, for above the table."""

    def working(types: Any) -> str:
        return f"{sum(results[name]['works'] for name in types)} of {len(list(types))}"

    others = [name for name in OTHER_TYPES if name not in CAUSAL_TYPES]  # those of both are built as causal ones
    return (
        f"transformers {transformers.__version__}: {working(CAUSAL_TYPES)} causal language models, "
        f"{working(others)} other types and {working(VARIANTS)} variants work; {len(UNBUILDABLE)} causal types "
        f"are not built.\n\nFinding the MLPs of a 32-layer model takes {times['find_mlps_milliseconds']:.1f} ms. "
        f"Verifying a splice takes "
        f"{times['verification_of_last_layer_in_forward_passes']:.2f} forward passes of {TOKENS} tokens for the last "
        f"layer, {times['verification_of_all_layers_in_forward_passes']:.2f} for all 32."
    )


def main() -> None:
    """Examine, and write the results unless types are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    chosen = parser.parse_args().types
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    results = examine_all(chosen or [*CAUSAL_TYPES, *OTHER_TYPES, *VARIANTS])
    if chosen:
        sys.stdout.write(table(results) + "\n")
        return
    times = measure_times()
    RESULTS.write_text(
        json.dumps({"transformers": transformers.__version__, **times, "types": results}, indent=1) + "\n"
    )
    write_between(TABLE, MARK, f"{summary(results, times)}\n\n{table(results)}\n")


if __name__ == "__main__":
    main()

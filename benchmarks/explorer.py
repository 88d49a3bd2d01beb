"""Measure how long the explorer takes on a collection of 16,384 experts.

    python benchmarks/explorer.py MODEL

MODEL is a folder with a language model. The decomposition of its middle layer is untrained, and its collection is
filled at random: as many rows, contexts and tokens as one of a million tokens has, with promoted tokens, neighbours and
two domains. Pages are opened in headless Chromium, without a cache, and timed from the navigation until they are shown.
Figures are medians of `--repeats`. Writes benchmarks/results/explorer.json.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mxd.base.base_model import load_base_model
from mxd.base.pretrained_weights import record_base
from mxd.experts.collection import HISTOGRAM_EDGES, Collection, ExpertCollection
from mxd.experts.collection_file import EXPERTS_NAME, save_collection
from mxd.experts.contexts import AROUND
from mxd.jobs.decompose import layer_config
from mxd.jobs.explore import explore
from mxd.jobs.options import DecompositionOptions
from mxd.jobs.use_options import ExploreOptions
from mxd.modeling_mxd import MxDConfig, MxDModel, find_mlps

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "explorer.json"
EXPERTS, ROWS, LENGTH = 16_384, 7_800, 128
TEXTS = ["The Treaty of Versailles was signed on 28 June 1919.", "def main():\n    return 0\n", "She sold sea shells."]


def synthetic_collection(layer: int, vocabulary: int) -> Collection:
    """Return a collection filled at random, of the size of one of a million tokens."""
    torch.manual_seed(0)
    n, shape = EXPERTS, (EXPERTS, 16)
    values = torch.rand(n, 32).sort(1, descending=True).values + 0.01

    def places(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(ROWS, size, dtype=torch.int32), torch.randint(1, LENGTH, size, dtype=torch.int32)

    def ids(count: int, below: int) -> torch.Tensor:
        return torch.randint(below, (n, count), dtype=torch.int32)

    def windows(count: int) -> torch.Tensor:
        """An expert is active on a fifth of the tokens around its contexts."""
        size = (n, count, 2 * AROUND + 1)
        return torch.randint(24, 27, size, dtype=torch.uint8) * (torch.rand(size) < 0.2)

    near = {f"{name}_ids": ids(5, n) for name in ("similar_direction", "similar_modulation", "co_firing")}
    near |= {f"{name.removesuffix('_ids')}_values": torch.rand(n, 5) for name in near}
    effects = {f"{name}_ids": ids(10, vocabulary) for name in ("promoted", "suppressed")}
    effects |= {f"{name.removesuffix('_ids')}_values": torch.randn(n, 10) for name in effects}
    (top_rows, top_positions), (sample_rows, sample_positions) = places(*shape), places(n, 32)
    experts = ExpertCollection(
        tokens=1_000_000,
        frequency=10 ** (torch.randn(n).double() * 0.6 - 3).clamp(max=-0.5),
        maximum=values[:, 0].clone(),
        histogram=torch.randint(1000, (n, len(HISTOGRAM_EDGES) + 1), dtype=torch.int32),
        top_values=values[:, :16].clone(),
        top_rows=top_rows,
        top_positions=top_positions,
        sample_values=values,
        sample_rows=sample_rows,
        sample_positions=sample_positions,
        domain_counts=torch.randint(1000, (n, 2), dtype=torch.int32),
        domain_tokens=torch.tensor([500_000, 500_000]),
        alignment=torch.randn(n),
        top_windows=windows(16),
        sample_windows=windows(32),
        **near,
        **effects,
    )
    tokens = torch.randint(vocabulary, (ROWS * LENGTH,), dtype=torch.int32)
    offsets = torch.arange(ROWS + 1) * LENGTH
    return Collection({layer: experts}, tokens, offsets, torch.arange(ROWS, dtype=torch.int32), ["plays", "speeches"])


def make_folder(model: str, folder: Path) -> int:
    """Save an untrained decomposition with its collection, and return its layer."""
    base, tokenizer, _ = load_base_model(model)
    sites = find_mlps(base)
    layer = sorted(sites)[len(sites) // 2]
    config = layer_config(sites[layer], DecompositionOptions(num_experts=EXPERTS))
    where = str(Path(model).resolve())
    decomposition = MxDModel(MxDConfig.from_layer_configs({layer: config}, base_model_name_or_path=where))
    record_base(decomposition, base)
    decomposition.save_pretrained(folder)
    save_collection(synthetic_collection(layer, len(tokenizer)), folder / EXPERTS_NAME)
    return layer


def seconds(act: Callable[[], Any]) -> float:
    """Time a call."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def measure(folder: Path, layer: int, profile: Path, repeats: int) -> dict[str, Any]:
    """Serve the folder, open pages and ask the model; return seconds."""
    from browser import Browser

    started = time.perf_counter()
    server = explore(ExploreOptions(decomposition=str(folder), port=0))
    assert not isinstance(server, str)
    results: dict[str, Any] = {"start": time.perf_counter() - started}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = Browser(profile)
    browser.size(1200)
    browser.send("Network.setCacheDisabled", cacheDisabled=True)
    results["first page, the first time"] = seconds(lambda: browser.open(server.url))
    pages = [seconds(lambda: browser.open(server.url)) for _ in range(repeats)]
    results["first page"] = statistics.median(pages)
    experts = [
        seconds(lambda expert=expert: browser.go(f"{layer}/{expert}")) for expert in range(0, 100 * repeats, 100)
    ]
    results["expert"] = statistics.median(experts)
    results["search, with loading and the first pass"] = seconds(lambda: browser.go(f"{layer}/search/first"))
    times = [
        seconds(lambda n=n: browser.go(f"{layer}/search/{n} {TEXTS[n % 3]}".replace("\n", " "))) for n in range(repeats)
    ]
    results["search"] = statistics.median(times)
    assert not browser.errors, browser.errors
    browser.close()
    server.shutdown()
    server.server_close()
    return results


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    sys.path.append(str(HERE.parent / "tests" / "explorer"))
    with tempfile.TemporaryDirectory() as temporary:
        folder, site = Path(temporary) / "decomposition", Path(temporary) / "site"
        layer = make_folder(options.model, folder)
        results: dict[str, Any] = {"experts": EXPERTS, "rows": ROWS, "threads": torch.get_num_threads()}
        results["collection_bytes"] = (folder / EXPERTS_NAME).stat().st_size
        results["seconds"] = measure(folder, layer, Path(temporary) / "profile", options.repeats)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        export = ExploreOptions(decomposition=str(folder), export=str(site))
        results["seconds"]["export"] = seconds(lambda: explore(export, progress=False))
        files = [path for path in site.rglob("*") if path.is_file()]
        results["export"] = {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()

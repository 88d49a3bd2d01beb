"""Measure an activation cache: what writing costs, bytes a token, and how fast a training reads it.

    python benchmarks/cache.py [MODEL] --dataset texts/*.parquet [--tokens 100000] [--folder FOLDER]

The reading is that of a training: batches in the order of recording, which is the shuffled order of the rows. It is
compared with reading the same files from beginning to end, in parts of 8 MB. Both are measured with an empty page cache
(/proc/sys/vm/drop_caches, which root may write), in turn, and the medians are reported. Writes
benchmarks/results/cache.json.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import machine

from mxd import ActivationCache, demo, load_base_model, materialize, pack
from mxd.base.capture import capture_mlps
from mxd.base.forward import evaluating
from mxd.data.documents import load_text

logger = logging.getLogger("cache")

RESULTS = Path(__file__).parent / "results" / "cache.json"
CONTEXT, ROWS = 128, 16
REPEATS = 3


def timed(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def drop_page_cache(folder: Path) -> None:
    """Write the files of a folder to the disk, and forget what is in memory of them."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file)
    Path("/proc/sys/vm/drop_caches").write_text("3")


def read_files(folder: Path) -> None:
    """Read all files from beginning to end."""
    for path in sorted(folder.glob("*.bin")):
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(8 << 20)
            while file.readinto(buffer):
                pass


def read_batches(cache: ActivationCache) -> None:
    """Read batches as a training does, into memory of its own."""
    for begin in range(0, len(cache), ROWS):
        for pair in cache({"input_ids": cache.rows[begin : begin + ROWS]}).values():
            for side in pair:
                side.clone()


def table(results: dict[str, Any]) -> str:
    """Return the results as a table in Markdown."""
    seconds, size = results["seconds"], results["gigabytes"]
    rows = {
        "bytes a token": f"{results['bytes_a_token']:,.0f}",
        "size": f"{size:.2f} GB of {results['tokens']:,} tokens and {len(results['layers'])} layers",
        "the base model alone": f"{seconds['model_alone']:.0f} s",
        "recording": f"{seconds['recorded']:.0f} s",
        "comparing the checksums": f"{seconds['checked']:.1f} s, {size / seconds['checked']:.2f} GB/s",
        "reading the files in order": f"{seconds['files_in_order']:.1f} s, {size / seconds['files_in_order']:.2f} GB/s",
        "reading batches": f"{seconds['batches']:.1f} s, {size / seconds['batches']:.2f} GB/s",
        "reading ratio": f"{100 * results['reading_ratio']:.0f} %",
    }
    lines = [f"{results['model']}; {results['machine']}", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])


def main() -> None:
    """Record a cache, read it, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=demo.MODEL_NAME)
    parser.add_argument("--dataset", nargs="+", required=True)
    parser.add_argument("--layers", nargs="+", type=int, help="by default all")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure, where the cache is written")
    asked = parser.parse_args()
    model, tokenizer, _ = load_base_model(asked.model)
    layers = asked.layers or [*range(model.config.num_hidden_layers)]
    rows = materialize(pack(load_text(asked.dataset), tokenizer, CONTEXT), asked.tokens)[:]["input_ids"]
    folder = Path(tempfile.mkdtemp(dir=asked.folder))
    try:
        with evaluating(model), torch.no_grad():
            some = rows[: len(rows) // 4].split(ROWS)
            run = timed(lambda: [capture_mlps(model, layers, part) for part in some]) * len(rows) / sum(map(len, some))
        record = timed(lambda: ActivationCache.record(folder, model, layers, rows, rows_per_step=ROWS))
        size = sum(path.stat().st_size for path in folder.iterdir())
        check = timed(lambda: ActivationCache(folder))
        cache, files, batches = ActivationCache(folder, verify=False), [], []
        for _ in range(REPEATS):
            drop_page_cache(folder)
            files.append(timed(lambda: read_files(folder)))
            drop_page_cache(folder)
            batches.append(timed(lambda: read_batches(cache)))
    finally:
        shutil.rmtree(folder)
    results = {
        "machine": machine(torch.get_num_threads(), "cpu"),
        "model": Path(asked.model).name,
        "layers": layers,
        "tokens": rows.numel(),
        "gigabytes": size / 1e9,
        "bytes_a_token": size / rows.numel(),
        "seconds": {
            "model_alone": run,
            "recorded": record,
            "checked": check,
            "files_in_order": statistics.median(files),
            "batches": statistics.median(batches),
        },
        "reading_ratio": statistics.median(files) / statistics.median(batches),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    logger.warning("%s", results)


if __name__ == "__main__":
    main()

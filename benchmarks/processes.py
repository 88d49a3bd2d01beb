"""Train the same decomposition in one process and in several, and compare weights and files.

    python benchmarks/processes.py [--only 4]

Two layers of the embedded model take 20 steps on the same tokens (gloo, one thread a process). Adds to
benchmarks/results/processes.json: for every way, the largest norm of the difference of a tensor from that of one
process, relative to the tensor's norm, and whether the folders hold the same files.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import machine
from safetensors.torch import load_file

logger = logging.getLogger("processes")

RESULTS = Path(__file__).parent / "results" / "processes.json"
OPTIONS: dict[str, Any] = {
    "layers": [1, 4], "num_experts": 500, "num_experts_per_tok": 8, "tokens": 20 * 512, "batch_tokens": 512,
    "evaluation_tokens": 1024, "training": {"calibration_tokens": 1024, "statistics_tokens": 1024, "save_steps": 10},
}  # fmt: skip
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node {} -m mxd"
ACCELERATE = "-m accelerate.commands.accelerate_cli launch --multi_gpu --num_processes {} --num_machines 1 " \
    "--mixed_precision no --dynamo_backend no --main_process_port 0 -m mxd"  # fmt: skip
# name: arguments of python, and those of decompose
WAYS = {
    "1 process": ("-m mxd", ""),
    "2 processes share rows": (TORCHRUN.format(2), ""),
    "4 processes share rows": (TORCHRUN.format(4), ""),
    "2 processes of accelerate launch share rows": (ACCELERATE.format(2), ""),
    "2 processes share layers": (TORCHRUN.format(2), "--shard layers"),
    "2 processes share experts": (TORCHRUN.format(2), "--shard experts"),
    "4 processes share experts": (TORCHRUN.format(4), "--shard experts"),
}


def train(way: str, folder: Path) -> None:
    """Decompose into a folder."""
    python, options = WAYS[way]
    config = folder.with_suffix(".yaml")
    config.write_text(json.dumps(OPTIONS))
    command = [*python.split(), "decompose", "--config", str(config), "--output", str(folder), *options.split()]
    how = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *command], check=False, **how)
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-3000:]}")


def files(folder: Path) -> list[str]:
    """Return the names of the files of a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def difference(one: Path, other: Path) -> float:
    """Return the largest norm of the difference of a tensor, relative to the tensor's."""
    first, second = (
        {(path.name, name): tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (one, other)
    )
    norms = [((second[name] - tensor).double().norm(), tensor.double().norm()) for name, tensor in first.items()]
    return max(float(apart / norm) for apart, norm in norms if norm)


def main() -> None:
    """Train in every way, and write the results after each."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="ways whose names contain this")
    asked = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"ways": {}}
    results |= {"machine": machine(1, "cpu"), "options": OPTIONS}
    with tempfile.TemporaryDirectory() as root:
        one = Path(root, "one")
        train("1 process", one)
        for way in [way for way in list(WAYS)[1:] if asked.only in way]:
            other = Path(root, way.replace(" ", "-"))
            train(way, other)
            found = {"difference": difference(one, other), "same_files": files(one) == files(other)}
            logger.info("%s: %s", way, found)
            results["ways"][way] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def table(results: dict[str, Any]) -> str:
    """Return a row for every way, in Markdown."""
    lines = ["| against one process | largest difference of a tensor | same files |", "|---|---|---|"]
    for way, found in results["ways"].items():
        lines.append(f"| {way} | {found['difference']:.1e} | {'yes' if found['same_files'] else 'no'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Kill runs at random moments, resume them, and compare their weights with those of a run that was never stopped.

    python benchmarks/kills.py [--kills 50] [--cases one two streaming frontier cache shards] [--seed 0]

Runs are small decompositions of the embedded model. Each is stopped by SIGKILL, SIGTERM or SIGINT, at a moment drawn
between its start and the time that an unbroken run takes, and started again with --resume, up to `STOPS` times; then it
may finish. The signal goes to one of the processes of a run, chosen at random, or to all of them. Adds to
benchmarks/results/kills.json.
"""

import argparse
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import machine
from safetensors.torch import load_file

from mxd import demo

logger = logging.getLogger("kills")

RESULTS = Path(__file__).parent / "results" / "kills.json"
TRAINING = {"calibration_tokens": 256, "statistics_tokens": 256, "save_steps": 2, "disable_tqdm": True}
OPTIONS: dict[str, Any] = {"num_experts_per_tok": 2, "match_transcoder": 8, "tokens": 6144, "batch_tokens": 256,
                           "context_length": 64, "evaluation_tokens": 256, "training": TRAINING}  # fmt: skip
FRONTIER = {**OPTIONS, "num_experts_per_tok": [2], "methods": ["mxd"],
            "training": {name: value for name, value in TRAINING.items() if name != "save_steps"}}  # fmt: skip
STREAM = {"dataset": [str(demo.text_path("train"))], "streaming": True}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "one": ("decompose", OPTIONS, 1),
    "two": ("decompose", OPTIONS, 2),
    "streaming": ("decompose", {**OPTIONS, **STREAM}, 1),
    "frontier": ("frontier", FRONTIER, 1),
    "cache": ("decompose", {**OPTIONS, "cache": "cache"}, 1),
    "shards": ("decompose", {**OPTIONS, "layers": [1, 2], "shard": "layers"}, 2),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STOPS = 4


class Run:
    """A run of a case in a folder: it can be started, stopped and resumed."""

    def __init__(self, case: str, folder: Path):
        self.command, options, self.processes = CASES[case]
        self.folder, self.config = folder, folder.with_suffix(".yaml")
        if "cache" in options:
            options = {**options, "cache": f"{folder}-cache"}
        self.config.write_text(json.dumps(options))

    def start(self) -> list[subprocess.Popen[bytes]]:
        """Start it, or go on."""
        arguments = [sys.executable, "-m", "mxd", self.command, "--config", self.config, "--output", self.folder]
        arguments += ["--resume"] if self.command == "decompose" else []
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        size = str(self.processes)
        started = []
        for rank in map(str, range(self.processes)):
            of_rank = {**address, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size} if self.processes > 1 else {}
            with self.folder.with_suffix(f".{rank}.log").open("ab") as log:
                environment = {**os.environ, "OMP_NUM_THREADS": "1", **of_rank}
                started.append(subprocess.Popen(list(map(str, arguments)), stdout=log, stderr=log, env=environment))
        return started

    def finish(self) -> bool:
        """Run it to its end; return whether it succeeded."""
        return {process.wait() for process in self.start()} == {0}

    def stop(self, moment: float, draw: random.Random) -> dict[str, Any] | None:
        """Start it, and stop it after `moment` seconds; return how, or None if it had ended before."""
        started = self.start()
        try:
            time.sleep(moment)
            if any(process.poll() is not None for process in started):
                return None
            number, chosen = draw.choice(SIGNALS), draw.choice([*range(len(started)), None])
            for index in range(len(started)) if chosen is None else [chosen]:
                started[index].send_signal(number)
            # As a launcher does once a process has ended.
            codes = [process.wait() if chosen in (None, index) else None for index, process in enumerate(started)]
            return {"signal": number.name, "process": chosen, "seconds": round(moment, 1), "codes": codes}
        finally:
            for process in started:
                process.kill()
                process.wait()

    def weights(self) -> dict[str, torch.Tensor]:
        """Return all weights of the result."""
        found = sorted(self.folder.rglob("*.safetensors")) if self.folder.is_dir() else []
        parts = {path.relative_to(self.folder): load_file(path) for path in found if "recording" not in path.parts}
        return {f"{path}:{name}": value for path, part in parts.items() for name, value in part.items()}


def kill(case: str, wanted: int, work: Path, draw: random.Random) -> dict[str, Any]:
    """Stop runs of a case until there were as many kills as are wanted; return the kills and the wrong results."""
    whole = Run(case, work / f"{case}-whole")
    began = time.monotonic()
    assert whole.finish(), whole.folder
    seconds, expected = time.monotonic() - began, whole.weights()
    kills: list[dict[str, Any]] = []
    wrong = runs = 0
    while len(kills) < wanted:
        run = Run(case, work / f"{case}-{runs}")
        for _ in range(min(STOPS, wanted - len(kills))):
            if (killed := run.stop(draw.uniform(0.1, 1) * seconds, draw)) is None:
                break
            kills.append({"run": runs, **killed})
        finished = run.finish() or "is finished" in run.folder.with_suffix(".0.log").read_text()
        found = run.weights()
        same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        wrong += not (finished and same)
        runs += 1
        logger.warning("%s: %d kills, %d wrong", case, len(kills), wrong)
    return {"unbroken_seconds": round(seconds, 1), "runs": runs, "kills": kills, "wrong": wrong}


def main() -> None:
    """Kill runs of all cases, and write the results of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills, shared by the cases")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder that keeps the runs and their logs")
    asked = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results |= {"machine": machine(1, "cpu"), "seed": asked.seed}
    with tempfile.TemporaryDirectory() as temporary:
        for case in asked.cases:
            work = asked.work or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            draw = random.Random(f"{asked.seed} {case}")
            results.setdefault("cases", {})[case] = kill(case, -(-asked.kills // len(asked.cases)), work, draw)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

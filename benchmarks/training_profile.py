"""Where the time of `mxd decompose` goes, now and at an earlier commit of this repository.

    python benchmarks/training_profile.py MODEL --corpus FOLDER [--before COMMIT] [--tokens 131072] [--layer 15]

Both check-outs run the same decomposition twice, in the order before, now, now, before; means of the two. Parts are
timed around the trainer's own methods: the teacher (up to the last MLP needed), forward and backward of the layer, the
optimiser; the rest of the loop is data and logging. Writes benchmarks/results/training_profile.json and the table in
docs/speed.md. About 30 minutes on 2 cores, with `--tokens 65536` half of that.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "training_profile.json"
PAGE = ROOT / "docs" / "speed.md"
MARK = "benchmarks/training_profile.py"
# The last commit before the layers' products were made fast.
BEFORE = "6d89236"
PARTS = ("teacher", "forward of the layer", "backward", "optimiser", "rest of the loop", "start", "experts' use")
CONTEXT = 256


def timed_run(job: dict[str, Any]) -> dict[str, float]:
    """In a process of its own whose path holds the check-out: seconds of every part of `decompose`."""
    import torch

    import trainers.distillation_trainer
    from mxd.pipeline import DecompositionOptions, TextOptions, decompose

    torch.set_num_threads(job["threads"])
    trainer_class = trainers.distillation_trainer.DistillationTrainer
    seconds = dict.fromkeys((*PARTS, "training", "all"), 0.0)
    inside: list[str] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # The inner of two timed calls has its seconds alone.
            inside.append(name)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - started
                inside.pop()
                seconds[name] += spent
                if inside:
                    seconds[inside[-1]] -= spent

        return call

    for method, name in (
        ("capture", "teacher"),
        ("training_step", "forward of the layer"),
        ("_start", "start"),
        ("measure_experts", "experts' use"),
        ("_measure_experts", "experts' use"),
        ("train", "training"),
    ):
        if hasattr(trainer_class, method):  # commits differ in what they call public
            setattr(trainer_class, method, timed(name, getattr(trainer_class, method)))
    torch.Tensor.backward = timed("backward", torch.Tensor.backward)  # type: ignore[method-assign]
    create = trainer_class.create_optimizer

    def create_timed(self: Any, *args: Any) -> Any:
        optimizer = create(self, *args)
        if not hasattr(optimizer, "timed"):
            optimizer.timed, optimizer.step = True, timed("optimiser", optimizer.step)
        return optimizer

    trainer_class.create_optimizer = create_timed
    started = time.perf_counter()
    text = TextOptions(dataset=job["files"], context_length=CONTEXT)
    decompose(
        DecompositionOptions(
            model=job["model"],
            layers=[job["layer"]],
            text=text,
            dtype=job["dtype"],
            tokens=job["tokens"],
            evaluation_tokens=8192,
            output=job["output"],
            overwrite=True,
        )
    )
    seconds["all"] = time.perf_counter() - started
    seconds["rest of the loop"] = seconds.pop("training")
    seconds["peak resident MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return seconds


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Both check-outs, each twice."""
    from methods import BFLOAT16  # which the earlier check-out cannot import
    from pages import machine

    measured: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", str(earlier), options.before], cwd=ROOT, check=True)
        try:
            for which in ("before", "now", "now", "before"):
                job = {
                    "model": str(options.model),
                    "files": sorted(str(path) for path in options.corpus.glob("*.parquet")),
                    "layer": options.layer,
                    "tokens": options.tokens,
                    "threads": options.threads,
                    "dtype": "bfloat16" if BFLOAT16 else "float32",
                    "output": str(Path(folder) / "output"),
                }
                path = str(earlier if which == "before" else ROOT)
                environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(options.threads)}
                command = [sys.executable, __file__, "--job", json.dumps(job)]
                done = subprocess.run(command, env=environment, cwd=path, check=True, stdout=subprocess.PIPE, text=True)
                measured[which].append(json.loads(done.stdout.splitlines()[-1]))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(earlier)], cwd=ROOT, check=True)
    means = {
        which: {part: statistics.mean(run[part] for run in runs) for part in runs[0]}
        for which, runs in measured.items()
    }
    command = ["git", "rev-parse", "--short", options.before]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "machine": machine(options.threads, "cpu"),
        "before": commit.stdout.strip(),
        "tokens": options.tokens,
        "layer": options.layer,
        "runs": measured,
        **{f"seconds {which}": means[which] for which in means},
    }


def table(results: dict[str, Any]) -> str:
    """The page's table in Markdown."""
    before, now = results["seconds before"], results["seconds now"]
    lines = [
        f"{results['machine']}. SmolLM2-135M layer {results['layer']}, {results['tokens']:,} tokens; before: commit "
        f"{results['before']}.",
        "",
        "|  | seconds before | now | share now |",
        "|---|---|---|---|",
    ]
    known = sum(now[part] for part in PARTS)
    rows = {part: (before[part], now[part]) for part in PARTS}
    other = "loading, evaluation, saving"
    rows[other] = (before["all"] - sum(before[part] for part in PARTS), now["all"] - known)
    rows["all"] = (before["all"], now["all"])
    for part, (then, seconds) in rows.items():
        lines.append(f"| {part} | {then:.1f} | {seconds:.1f} | {100 * seconds / now['all']:.0f} % |")
    peaks = [run["peak resident MB"] for run in (before, now)]
    lines.append(f"| peak resident memory, MB | {peaks[0]:,.0f} | {peaks[1]:,.0f} | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--before", default=BEFORE, help="a commit of this repository")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(timed_run(json.loads(options.job))))  # noqa: T201
        return
    if options.model is None or options.corpus is None:
        parser.error("MODEL and --corpus are needed")
    options.model, options.corpus = options.model.resolve(), options.corpus.resolve()
    from pages import write_between

    results = run(options)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_between(PAGE, MARK, table(results))


if __name__ == "__main__":
    main()

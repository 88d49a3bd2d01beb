"""Measure what a layer costs: ours, plain dense PyTorch, the untouched MLP, transcoders and the bare products.

    python benchmarks/speed.py [--quick] [--shapes NAME ...] [--device cpu] [--beside PYTHON]

Every contestant (`benchmarks/contestants.py`) runs in a process of its own; all of one shape are alive at once, as far
as memory allows, and take a step each in turn, so that other load on the machine affects all of them. Results are
medians over the turns. Weights and inputs are random; `benchmarks/routing.py` measures what routing costs in accuracy.
`--beside` names the Python of an environment with other libraries (pip install eai-sparsify sae-lens).

Cases of the same commit in the work folder are not run again. Writes benchmarks/results/speed.json, which
keeps the results of other machines, and docs/results/speed.png. Takes about 45 minutes on 2 cores.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from contestants import BESIDE, CONTESTANTS, OF_ONE_MODE
from report import machine, markdown_table
from tqdm.auto import tqdm

from mxd.base.base_model import bfloat16_is_emulated
from mxd.modeling_mxd.configuration_mxd import machine_memory
from mxd.trainers.parameter_budget import num_experts_matching_transcoder

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "speed.json"
FIGURE = HERE.parent / "docs" / "results" / "speed.png"

# name: I = O, H, GLU, tokens of a step
SHAPES = {
    "GPT-2": (768, 3072, False, 1024),
    "Pythia-410M": (1024, 4096, False, 1024),
    "SmolLM2-135M": (576, 1536, True, 1024),
    "Llama-3.2-3B": (3072, 8192, True, 256),
}
MULTIPLIER, K = 32, 32
# Training at this shape takes 9 GB for every contestant but the MLP.
FEW = (
    "dense PyTorch",
    "exact",
    "exact, bf16 products",
    "hierarchical",
    "hierarchical, bf16 products",
    "transcoder",
    "MLP",
    "bare products",
)
TRAINED = ("exact", "hierarchical")
SWEEP = ("dense PyTorch", "exact", "hierarchical", "exact, gate alone", "hierarchical, gate alone")
SWEPT = [2**power for power in range(10, 18)]
# The others are compared with these.
REFERENCES = ("dense PyTorch", "bare products", "bare products, bf16")
FITTED_FROM = 4096


class Worker:
    """Run a contestant in a process of its own."""

    def __init__(self, name: str, job: dict[str, Any], python: str):
        self.name, self.turns, self.failure = name, [], ""
        # Not a pipe, which fills up while nobody reads.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [python, str(HERE / "contestants.py"), name, json.dumps(job)]
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "PYTHONPATH": os.pathsep.join(paths)},
        )

    def answer(self) -> dict[str, Any] | None:
        """Return the next line of JSON that it writes, or None if it ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        self.errors.seek(0)
        self.failure = (self.errors.read().strip().splitlines() or ["killed"])[-1]
        return None

    def turn(self) -> None:
        """Let it take a step."""
        if self.failure:
            return
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says why
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        answer = self.answer()
        if answer is not None:
            self.turns.append(answer)

    def end(self) -> dict[str, Any]:
        """Return medians over all turns, with the last answer."""
        assert self.process.stdin is not None
        failure = self.failure
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        last = {} if failure else self.answer() or {}
        self.process.wait()
        if failure or not self.turns:
            return {"failed": failure}
        medians = {name: statistics.median(turn[name] for turn in self.turns) for name in self.turns[0]}
        return {**medians, **last, "all_seconds": [round(turn["seconds"], 5) for turn in self.turns]}


def measure(job: dict[str, Any], names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Time contestants in turns. If memory does not hold all of them they run in waves, each with the references if
    there is room."""
    parameters = job["N"] * (job["I"] + job["O"]) + 3 * job["H"] * job["I"]
    each = parameters * 4 * (4 if job["mode"] == "train" else 1) + 5 * job["tokens"] * job["N"] * 4 + 5 * 10**8
    memory = torch.cuda.mem_get_info()[1] if job["device"] == "cuda" else machine_memory()
    at_once = max(1, int(0.75 * memory / each))
    references = [name for name in names if name in REFERENCES]
    if at_once <= len(references):
        references = []
    others = [name for name in names if name not in references]
    room = at_once - len(references)
    results: dict[str, Any] = {}
    for start in range(0, len(others), room):
        wave = _wave(job, references + others[start : start + room], options)
        beside = {name: wave.pop(name) for name in references}
        results = beside | results | {name: {**row, "beside": beside} for name, row in wave.items()}
    installed = [name for name in names if "No module named" not in results[name].get("failed", "")]
    contestants = {name: results[name] for name in installed}
    return {"job": job, "at_once": at_once, "commit": commit(), "contestants": contestants}


def commit() -> str:
    """Return the measured commit, with "+" if files differ from it."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def _wave(job: dict[str, Any], names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    workers = [Worker(name, job, options.beside if name in BESIDE else sys.executable) for name in names]
    for worker in workers:
        worker.answer()  # built and warmed up
    started, turns = time.monotonic(), 0
    while turns < options.turns and (turns < 3 or time.monotonic() - started < options.seconds):
        for worker in workers:
            worker.turn()
        turns += 1
    return {worker.name: worker.end() for worker in workers}


def cases(options: argparse.Namespace) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Return the job and the contestants of every case, by its name."""
    everybody = [name for name in CONTESTANTS if "gate alone" not in name and (options.beside or name not in BESIDE)]
    if options.device == "cpu" and bfloat16_is_emulated():
        everybody = [name for name in everybody if "bf16" not in name]
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    fixed = {"K": K, "device": options.device, "threads": options.threads}
    for shape in options.shapes:
        width, units, glu, tokens = SHAPES[shape]
        experts = num_experts_matching_transcoder(width, width, units, MULTIPLIER, "glu" if glu else "mlp")
        job = {"I": width, "O": width, "H": units, "glu": glu, "tokens": tokens, **fixed}
        job |= {"N": experts, "latents": MULTIPLIER * width}
        for mode in ("train", "forward"):
            names = [name for name in everybody if width < 2048 or mode == "forward" or name in FEW]
            names = [name for name in names if OF_ONE_MODE.get(name, mode) == mode]
            found[f"{shape}, {mode}"] = ({**job, "mode": mode}, names)
    width, units, glu, tokens = SHAPES["GPT-2"]
    for experts in options.experts:
        job = {"I": width, "O": width, "H": units, "glu": glu, "tokens": tokens, **fixed}
        job |= {"N": experts, "latents": experts, "mode": "forward"}
        found[f"{experts} experts"] = (job, list(SWEEP))
        if experts >= FITTED_FROM:
            found[f"{experts} experts, train"] = ({**job, "mode": "train"}, list(TRAINED))
    return found


def exponent(curve: dict[int, float]) -> float | None:
    """Fit the slope of log milliseconds over log N from FITTED_FROM experts on; None with fewer than three points."""
    points = [(experts, ms) for experts, ms in curve.items() if experts >= FITTED_FROM]
    if len(points) < 3:
        return None
    logs = torch.tensor(points, dtype=torch.float64).log()
    x, y = (logs - logs.mean(0)).T
    return float((x * y).sum() / (x * x).sum())


def swept(results: dict[str, Any], mode: str = "forward") -> dict[str, dict[int, float]]:
    """Return milliseconds of a step by number of experts, for every swept contestant."""
    curves: dict[str, dict[int, float]] = {}
    for case, measured in results["cases"].items():
        if " experts" in case and measured["job"]["mode"] == mode:
            for name, result in measured["contestants"].items():
                if "seconds" in result:
                    curves.setdefault(name, {})[measured["job"]["N"]] = 1000 * result["seconds"]
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def table(results: dict[str, Any]) -> str:
    """Return the tables of one machine in Markdown."""
    lines: list[str] = []
    for case, measured in results["cases"].items():
        if " experts" in case:
            continue
        job, rows = measured["job"], measured["contestants"]
        what = "Training step" if job["mode"] == "train" else "Forward"
        sizes = f"I = O = {job['I']:,}, H = {job['H']:,}, N = {job['N']:,}, K = {job['K']}, {job['tokens']:,} tokens"
        sizes += f"; commit {measured.get('commit', 'before they were noted')}"
        lines += [f"**{what}, {case.rpartition(',')[0]} shapes** ({sizes})", ""]
        head = ["", "ms", "tokens/s", "against dense", "share of limit", "peak MB"]
        made = []
        for name, row in rows.items():
            beside = row.get("beside") or rows
            dense = beside.get("dense PyTorch", {}).get("seconds")
            if "failed" in row:
                made.append([name, f"failed: {row['failed'][:60]}", *[""] * (len(head) - 2)])
                continue
            bare = beside.get("bare products, bf16" if "bf16" in name else "bare products", {})
            limit, exact = bare.get("seconds"), name.startswith(("exact", "dense"))
            cells = [
                name,
                f"{1000 * row['seconds']:,.0f}",
                f"{job['tokens'] / row['seconds']:,.0f}",
                f"{dense / row['seconds']:.2f} ×" if dense else "",
                f"{100 * limit / row['seconds']:.0f} %" if limit and exact else "",
                f"{row['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in row else "",
            ]
            made.append(cells)
        lines.append(markdown_table(head, made))
    for mode, title in (("forward", "Forward"), ("train", "Training step")):
        curves = swept(results, mode)
        experts = sorted({n for curve in curves.values() for n in curve})
        if not experts:
            continue
        lines += [f"**{title} in ms by number of experts, GPT-2 shapes**", ""]
        made = [[f"{n:,}", *(f"{curve[n]:,.1f}" if n in curve else "" for curve in curves.values())] for n in experts]
        slopes = [exponent(curve) for curve in curves.values()]
        made.append([f"exponent from {FITTED_FROM:,}", *("" if each is None else f"{each:.2f}" for each in slopes)])
        lines.append(markdown_table(["N", *curves], made))
    return "\n".join(lines).rstrip() + "\n"


def page(machines: dict[str, Any]) -> str:
    """Return the tables of all machines, the last measured first."""
    (first, results), *others = reversed(machines.items())
    text = f"{first}.\n\n{table(results)}"
    for name, older in others:
        text += f'\n<details markdown="1"><summary>{name}</summary>\n\n{table(older)}\n</details>\n'
    return text


def draw(results: dict[str, Any]) -> None:
    """Draw cost against number of experts, with the exponents in the legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, curve in swept(results).items():
        fitted = exponent(curve)
        label = name if fitted is None else f"{name}: N^{fitted:.2f}"
        axes.plot(list(curve), list(curve.values()), "o-" if "alone" not in name else "o--", label=label)
    axes.set(xscale="log", yscale="log", xlabel="experts N", ylabel="ms per forward", title="GPT-2 shapes")
    axes.legend(title=f"exponents from N = {FITTED_FROM:,}")
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=120)
    pyplot.close(figure)


def summarise(options: argparse.Namespace, names: list[str], earlier: dict[str, Any]) -> dict[str, Any]:
    """Merge the measured cases into those of an earlier run."""
    measured = {name: json.loads(path.read_text()) for name in names if (path := _path(options, name)).exists()}
    return {"cases": earlier.get("cases", {}) | measured}


def _path(options: argparse.Namespace, case: str) -> Path:
    return Path(options.work) / (case.replace(", ", "-").replace(" ", "-") + ".json")


def main() -> None:
    """Measure what is missing and write results, tables and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--experts", nargs="*", type=int, default=SWEPT, help="numbers of experts to sweep")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--beside", help="Python of an environment with eai-sparsify and sae-lens")
    parser.add_argument("--work", type=Path, default=Path("runs/speed"))
    parser.add_argument("--turns", type=int, default=15, help="at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="of one case, after three turns")
    parser.add_argument("--quick", action="store_true", help="small shapes, few turns, nothing written but the work")
    options = parser.parse_args()
    if options.quick:
        SHAPES.update({name: (64, 128, glu, 128) for name, (_, _, glu, _) in SHAPES.items()})
        options.work, options.turns, options.experts = options.work / "quick", 3, [1024, 4096, 8192, 16384]
    here = machine(options.threads, options.device)
    options.work = options.work / re.sub(r"\W+", "-", here) / commit()
    options.work.mkdir(parents=True, exist_ok=True)
    todo = cases(options)
    bar = tqdm([name for name in todo if not _path(options, name).exists()], unit="case")
    for name in bar:
        bar.set_postfix_str(name)
        job, names = todo[name]
        _path(options, name).write_text(json.dumps(measure(job, names, options), indent=1) + "\n")
    machines = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = summarise(options, list(todo), {} if options.quick else machines.get(here, {}))
    if options.quick:
        print(table(results))  # noqa: T201
        return
    machines = {name: older for name, older in machines.items() if name != here} | {here: results}
    RESULTS.write_text(json.dumps(machines, indent=1) + "\n")
    draw(results)


if __name__ == "__main__":
    main()

"""What a training recipe gives: cross-entropy lost against the share that specialised experts carry.

    python benchmarks/recipe.py MODEL --corpus FOLDER [--tables NAME ...] [--jobs 2] [--evaluate TOKENS]

MODEL is SmolLM2-135M (its decoder layers are a list, which is used). One teacher pass records inputs and outputs of
layer 15's MLP on `--tokens` of text, another those of layers 5 and 25 on half as many; every point trains on its
layer's recording, in the same order, as many passes over it as it says, one thread each, `--jobs` at a time. Then
what is not yet measured on so many tokens is measured on the same rows: of held-out documents of the corpus, or of the
running interpreter's standard library, which is a kind of text that none was trained on. Differences of cross-entropy
are paired per token, with 95 % intervals clustered by row of 256 tokens. What comes before the layer is computed once,
and products are in bfloat16 for all, the untouched model included, where the processor has it. Points already in the
work folder are not trained again, nor measured again on as many tokens or more. Writes benchmarks/results/recipe.json,
the tables in docs/recipe.md (the first three in the README), docs/recipe.png, docs/recipe-every-k.png. Rows of points
that the work folder does not have stay as they were.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from held_out import HeldOut
from matplotlib.figure import Figure
from methods import BFLOAT16, CONTEXT, distil, record
from pages import machine, write_between
from python_library import python_library_documents
from recipe_points import (
    CORPUS,
    EVERY_K,
    EVERY_K_NOT_TRAINED_ON,
    KS,
    PYTHON,
    RECORDINGS,
    TABLES,
    distinct,
    folder_name,
    text_of,
)
from tqdm.auto import tqdm
from transformers import set_seed

from mxd.base.base_model import load_base_model
from mxd.cli.options import parse_count
from mxd.data.documents import load_text, split_documents
from mxd.evaluation.paired import half_width
from mxd.evaluation.rank import decomposition_ranks
from mxd.jobs.pipeline import DecompositionOptions, evaluation_batches
from mxd.modeling_mxd import MxDModel
from mxd.base.activation_cache import ActivationCache

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "recipe.json"
PAGE, FIGURE = HERE.parent / "docs" / "recipe.md", HERE.parent / "docs" / "recipe.png"
FIGURE_OF_EVERY_K = HERE.parent / "docs" / "recipe-every-k.png"
MARK = "benchmarks/recipe.py"
README, OF_README = HERE.parent / "README.md", 3


def text(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Documents to train on, and those held out."""
    return split_documents(load_text(sorted(str(path) for path in options.corpus.glob("*.parquet"))), seed=0)


def train(options: argparse.Namespace, name: str) -> None:
    """Train one point and save it."""
    point = distinct()[name]
    set_seed(point.seed)
    model, _, _ = load_base_model(str(options.model))
    chosen = DecompositionOptions(
        num_experts_per_tok=point.num_experts_per_tok, match_transcoder=32, method=point.method
    )
    recording = options.work / RECORDINGS[point.layer][0]
    how = {"num_train_epochs": point.passes, "seed": point.seed, "logging_steps": 50, **point.training}
    decomposition, seconds = distil(model, point.layer, chosen, recording, options.work / "trainer" / name, **how)
    folder = options.work / "points" / name
    decomposition.save_pretrained(folder)
    tokens = int(point.passes * ActivationCache(recording).rows.numel())
    where = {"machine": machine(1, "cpu"), "bf16": BFLOAT16}
    made = {"seconds": seconds, "tokens": tokens, **where, **asdict(point)}
    (folder / "point.json").write_text(json.dumps(made, indent=1) + "\n")


@torch.no_grad()
def evaluate(options: argparse.Namespace, kind: str, asked: Collection[str]) -> None:
    """Measure on a kind of text of these points what was trained and is not yet measured on so many tokens of it."""
    for layer in RECORDINGS:
        points = {
            name: options.work / "points" / name
            for name, point in distinct().items()
            if name in asked and point.layer == layer and (options.work / "points" / name / "point.json").exists()
        }
        missing = {
            name: measured
            for name, folder in points.items()
            if not _measured_on(measured := measured_file(folder, kind), options.evaluate)
        }
        if not missing:
            continue
        model, tokenizer, _ = load_base_model(str(options.model))
        documents = text(options)[1] if kind == CORPUS else python_library_documents()
        batches = evaluation_batches(documents, tokenizer, CONTEXT, options.evaluate)
        heldout = HeldOut(model.eval(), layer, torch.cat([batch["input_ids"] for batch in batches]))
        found = {name: MxDModel.from_pretrained(points[name]).eval() for name in missing}
        layers = {name: decomposition.layer(layer) for name, decomposition in found.items()}
        for name, result in heldout.measure(layers).items():
            missing[name].write_text(json.dumps(result | {"asked": options.evaluate}, indent=1))


def measure_ranks(options: argparse.Namespace, asked: Collection[str]) -> None:
    """Of these points, the ranks of MxDs' experts where they are not yet measured."""
    for name in asked:
        folder = options.work / "points" / name
        if (folder / "ranks.json").exists() or not (folder / "point.json").exists():
            continue
        for ranks in decomposition_ranks(MxDModel.from_pretrained(folder)).values():
            (folder / "ranks.json").write_text(json.dumps(ranks.summary(), indent=1))


def measured_file(folder: Path, kind: str) -> Path:
    """Of a point, what was measured on a kind of text."""
    return folder / ("measured.json" if kind == CORPUS else f"measured-{kind}.json")


def _measured_on(path: Path, tokens: int) -> bool:
    return path.exists() and json.loads(path.read_text())["asked"] >= tokens


def collect(options: argparse.Namespace, earlier: dict[str, Any]) -> dict[str, Any]:
    """All points that are there, by table and name; those that the work folder does not have, of earlier results."""
    kept = {(row["text"], row["folder"]): row for rows in earlier["tables"].values() for row in rows.values()}
    tables: dict[str, dict[str, Any]] = {}
    shown: set[tuple[str, str]] = set()
    for title, points in TABLES.items():
        kind = text_of(title)
        found = {
            name: _row(options.work / "points" / folder_name(point), kind) or kept.get((kind, folder_name(point)))
            for name, point in points.items()
        }
        rows = {name: row for name, row in found.items() if row}
        names = {(kind, row["folder"]) for row in rows.values()}
        if not names <= shown:  # something of its own was made
            tables[title] = rows
        shown |= names
    return {"tables": tables}


def _row(folder: Path, kind: str) -> dict[str, Any] | None:
    """What there is of a point, if it was measured on this kind of text."""
    files = {part: folder / f"{part}.json" for part in ("point", "ranks")} | {"measured": measured_file(folder, kind)}
    parts = {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}
    if "measured" not in parts:
        return None
    row = {**parts["point"], "folder": folder.name, "text": kind, "metrics": parts["measured"].pop("layer")}
    return row | parts["measured"] | ({"ranks": parts["ranks"]} if "ranks" in parts else {})


def table(results: dict[str, Any], first: int | None = None) -> str:
    """The page's tables in Markdown, or the first of them."""
    head = [
        "",
        "tokens",
        "products",
        "held out",
        "CE rise",
        "KL",
        "NMSE",
        "specialised share",
        "clipped",
        "dead",
        "max. frequency",
        "entropy",
        "rank",
    ]
    machines = {row["machine"] for rows in results["tables"].values() for row in rows.values()}
    lines: list[str] = [f"{'; '.join(sorted(machines))}.", ""]
    for title, rows in list(results["tables"].items())[:first]:
        lines += [f"**{title}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name, row in rows.items():
            layer = row["metrics"]
            cells = [
                name,
                f"{row['tokens'] / 1e6:.1f} M",
                "bfloat16" if row["bf16"] else "float32",
                f"{row['held_out_tokens'] / 1e3:.0f} k",
                f"{row['rise']:+.4f} ± {half_width(row['rise_interval']):.4f}",
                f"{row['kl']:.4f}",
                f"{layer['nmse']:.3f}",
                f"{100 * layer['specialised_share']:.0f} %",
                f"{100 * layer['clipped_specialised_share']:.0f} %",
                f"{100 * layer['dead_experts']:.1f} %",
                f"{100 * layer['max_expert_frequency']:.0f} %",
                f"{layer['expert_entropy']:.2f}",
                f"{row['ranks']['normalised_rank']:.4f}" if "ranks" in row else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def draw(results: dict[str, Any]) -> None:
    """Cross-entropy lost, and KL, against the specialised share: the points of layer 15 with K = 32, each once."""
    figure = Figure(figsize=(13, 5))
    axes = figure.subplots(1, 2, sharex=True)
    drawn: dict[str, tuple[str, dict[str, Any]]] = {}
    for title, rows in results["tables"].items():
        for name, row in rows.items():
            if (
                title != EVERY_K
                and text_of(title) == CORPUS
                and row["layer"] == 15
                and row["num_experts_per_tok"] == 32
            ):
                drawn.setdefault(row["folder"], (name, row))
    colors = dict(zip(sorted({row["tokens"] for _, row in drawn.values()}), ("C7", "C0", "C3", "C4"), strict=False))
    for axis, quantity in zip(axes, ("rise", "kl"), strict=True):
        places = []
        for name, row in drawn.values():
            share, value = row["metrics"]["clipped_specialised_share"], row[quantity]
            half = half_width(row["rise_interval"]) if quantity == "rise" else 0
            marker = {"mxd": "o", "skip_transcoder": "s", "transcoder": "^"}[row["method"]]
            axis.errorbar(share, value, half or None, fmt=marker, color=colors[row["tokens"]])
            places.append((name.removeprefix("MxD, "), (share, value)))
        label = "rise of cross-entropy" if quantity == "rise" else "KL"
        axis.set(xlabel="share of specialised experts (clipped)", ylabel=f"{label}, nats per token")
        axis.grid(alpha=0.3)
        _annotate(axis, places)
    for tokens, color in colors.items():
        axes[1].plot([], [], "o", color=color, label=f"{tokens / 1e6:.1f} M training tokens")
    axes[1].legend(loc="center left")
    figure.suptitle("SmolLM2-135M layer 15, K = 32; round: MxD, square: skip transcoder, triangle: transcoder")
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=120)


def _annotate(axis: Any, places: list[tuple[str, tuple[float, float]]]) -> None:
    """Names beside points, but where another name stands already; the table has all."""
    named: list[tuple[float, float]] = []
    axis.get_xlim()  # scales the axes, which is put off until someone asks
    for name, place in places:
        x, y = axis.transData.transform(place)
        if all(abs(x - other_x) > 60 or abs(y - other_y) > 9 for other_x, other_y in named):
            axis.annotate(name, place, fontsize=7, xytext=(4, 3), textcoords="offset points")
            named.append((x, y))


def draw_every_k(results: dict[str, Any]) -> None:
    """Over K, what each method costs; like the paper's Fig. 3, with the untouched model as the line at 0."""
    panels = (
        (EVERY_K_NOT_TRAINED_ON, "rise", "rise of cross-entropy on Python sources"),
        (EVERY_K, "kl", "KL on held-out documents"),
        (EVERY_K, "nmse", "NMSE on held-out documents"),
    )
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (title, quantity, label) in zip(axes, panels, strict=True):
        rows = results["tables"].get(title, {})
        for series, marker in (
            ("transcoder", "^"),
            ("skip transcoder", "s"),
            ("MxD", "o"),
            ("MxD, no sparse code", "."),
        ):
            of_series = [rows[name] for k in KS if (name := f"{series}, K = {k}") in rows]
            values = [row["metrics"]["nmse"] if quantity == "nmse" else row[quantity] for row in of_series]
            halves = [half_width(row["rise_interval"]) for row in of_series] if quantity == "rise" else None
            ks = [row["num_experts_per_tok"] for row in of_series]
            axis.errorbar(ks, values, halves, marker=marker, capsize=2, label=series)
        axis.axhline(0, color="black", linestyle="--", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(KS, [str(k) for k in KS])
        axis.set(xlabel="K, experts active per token", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(FIGURE_OF_EVERY_K, dpi=120)


def main() -> None:
    """Record, train and measure what is missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--tokens", type=parse_count, default=10**6, help="recorded tokens")
    parser.add_argument("--evaluate", type=parse_count, default=200_000, help="held-out tokens")
    parser.add_argument("--tables", nargs="*", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.one:
        train(options, options.one)
        return
    kinds: dict[str, dict[str, None]] = {CORPUS: {}, PYTHON: {}}
    for title in options.tables:
        kinds[text_of(title)].update(dict.fromkeys(folder_name(point) for point in TABLES[title].values()))
    asked = dict.fromkeys(name for names in kinds.values() for name in names)
    missing = [name for name in asked if not (options.work / "points" / name / "point.json").exists()]
    for folder, share in dict.fromkeys(RECORDINGS[distinct()[name].layer] for name in missing):
        layers = [layer for layer, recording in RECORDINGS.items() if recording == (folder, share)]
        record(options.model, options.work / folder, layers, text(options)[0], int(share * options.tokens))
    with ThreadPoolExecutor(options.jobs) as pool:
        list(tqdm(pool.map(_train_in_process, missing), total=len(missing), desc="points", unit="point"))
    for kind, names in kinds.items():
        evaluate(options, kind, names)
    measure_ranks(options, asked)
    results = collect(options, json.loads(RESULTS.read_text()))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results)
    draw_every_k(results)
    write_between(PAGE, MARK, table(results))
    write_between(README, MARK, table(results, OF_README))


def _train_in_process(name: str) -> None:
    command = [sys.executable, *sys.argv, "--one", name, "--threads", "1"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()

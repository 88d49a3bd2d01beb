"""Make tables of results/recipe.json, and draw docs/results/faithfulness.png: python benchmarks/recipe.py"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from report import markdown_table

from mxd.evaluation.paired import half_width
from mxd.evaluation.plots import COLOURS

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "recipe.json"
# Results were measured under earlier names of two terms of the loss.
EARLIER_NAMES = {"sparse code": "auxiliary transcoder", "expert_share": "min_mean_ablation_error"}
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "held out": lambda row: f"{row['held_out_tokens'] / 1e3:.0f} k",
    "CE rise": lambda row: f"{row['rise']:+.4f} ± {(row['rise_interval'][1] - row['rise_interval'][0]) / 2:.4f}",
    "KL": lambda row: f"{row['kl']:.4f}",
    "NMSE": lambda row: f"{row['metrics']['nmse']:.3f}",
    "specialised share": lambda row: f"{100 * row['metrics']['specialised_share']:.0f} %",
    "dead": lambda row: f"{100 * row['metrics']['dead_experts']:.1f} %",
}
KS = (16, 32, 64, 128, 256)
HELD_OUT, PYTHON = "Every K, one pass", "Every K, one pass, Python sources"  # tables
# name in the results: (label, marker). The auxiliary transcoder was named "sparse code" when they were measured.
SERIES = {
    "transcoder": ("transcoder", "^"),
    "skip transcoder": ("skip transcoder", "s"),
    "MxD": ("MxD", "o"),
    "MxD, no sparse code": ("MxD, no auxiliary transcoder", "."),
}


def table(title: str) -> str:
    """Return one table of the results in Markdown. A dagger marks matrix products in bfloat16."""
    rows = []
    for name, row in json.loads(RESULTS.read_text())["tables"][title].items():
        for earlier, now in EARLIER_NAMES.items():
            name = name.replace(earlier, now)  # noqa: PLW2901
        rows.append([name + (" †" if row["bf16"] else ""), *(column(row) for column in COLUMNS.values())])
    return markdown_table(["", *COLUMNS], rows)


def massive_tokens(results: dict[str, Any]) -> str:
    """Return the table of results/massive-tokens.json in Markdown."""
    rows = []
    for name, measured in results.items():
        (metrics,) = measured["layers"].values()
        massive, rise = measured["massive_outputs"], measured["cross_entropy"]
        cells = (
            name.removeprefix("layer "),
            f"{100 * massive['share']:.2g} %, {massive['factor']:.0f} ×" if massive else "none",
            f"{rise['rise']:+.3f} ± {half_width(rise['rise_interval']):.3f}",
            f"{measured['kl']:.3f}",
            f"{metrics['nmse']:.3f}",
            f"{100 * metrics['expert_share']:.0f} %",
        )
        rows.append(cells)
    return markdown_table(["layer", "massive outputs", "CE rise", "KL", "NMSE", "expert share"], rows)


def main() -> None:
    """Draw what each method costs over K, like the paper's Fig. 3, and what its specialised experts carry."""
    tables = json.loads(RESULTS.read_text())["tables"]
    figure = Figure(figsize=(15.6, 4.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    rise, kl, nmse, share = panels = figure.subplots(1, 4)
    for colour, (name, (label, marker)) in zip(COLOURS, SERIES.items(), strict=False):
        held_out, python = ([tables[title][f"{name}, K = {k}"] for k in KS] for title in (HELD_OUT, PYTHON))
        halves = [(row["rise_interval"][1] - row["rise_interval"][0]) / 2 for row in python]
        style = {"color": colour, "marker": marker}
        rise.errorbar(KS, [row["rise"] for row in python], halves, capsize=2, label=label, **style)
        kl.plot(KS, [row["kl"] for row in held_out], **style)
        nmse.plot(KS, [row["metrics"]["nmse"] for row in held_out], **style)
        for rows, line in ((held_out, "-"), (python, "--")):
            share.plot(KS, [100 * row["metrics"]["specialised_share"] for row in rows], linestyle=line, **style)
    rise.set_ylabel("rise of cross-entropy on Python sources")
    kl.set_ylabel("KL on held-out documents")
    nmse.set_ylabel("NMSE on held-out documents")
    share.set_ylabel("specialised share (%); dashed: Python")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(KS, [str(k) for k in KS])
        axes.set_xlabel("K, experts active per token")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside upper left", ncols=len(SERIES), frameon=False)
    figure.savefig(HERE.parent / "docs" / "results" / "faithfulness.png", dpi=120)


if __name__ == "__main__":
    main()

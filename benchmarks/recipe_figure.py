"""Draw docs/recipe-every-k.png from results/recipe.json: python benchmarks/recipe_figure.py"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from mxd.evaluation.plots import COLOURS

HERE = Path(__file__).parent
KS = (16, 32, 64, 128, 256)
HELD_OUT, PYTHON = "Every K, one pass", "Every K, one pass, Python sources"  # tables
# name in the results: (label, marker). The auxiliary transcoder was named "sparse code" when they were measured.
SERIES = {
    "transcoder": ("transcoder", "^"),
    "skip transcoder": ("skip transcoder", "s"),
    "MxD": ("MxD", "o"),
    "MxD, no sparse code": ("MxD, no auxiliary transcoder", "."),
}


def main() -> None:
    """Draw what each method costs over K, like the paper's Fig. 3, and what its specialised experts carry."""
    tables = json.loads((HERE / "results" / "recipe.json").read_text())["tables"]
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
    figure.savefig(HERE.parent / "docs" / "recipe-every-k.png", dpi=120)


if __name__ == "__main__":
    main()

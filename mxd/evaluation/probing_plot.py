"""The figure of sparse probing."""

import os
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

COLOUR = "#0072B2"
_COLUMNS = 4


def plot_probing(
    problems: Mapping[str, Mapping[str, Any]],
    path: str | os.PathLike[str],
    chance: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Mean F1 of the best single feature, a panel for each problem and a row for each representation: the mean over
    classes with its standard error over folds, and behind it a small dot for every class.

    Args:
        problems: name → {representation: what `probe_features` gave}; the same representations in all.
        path: the image's path; its ending says the format.
        chance: name → what `always_yes_f1` gives; its mean is dashed.
    """
    names = list(next(iter(problems.values())))
    columns = min(_COLUMNS, len(problems))
    lines = -(-len(problems) // columns)
    size = (0.5 + 0.08 * max(map(len, names)) + 2.4 * columns, 0.5 + lines * (0.6 + 0.28 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (problem, found) in zip(panels, problems.items(), strict=False):
        axes.spines[["top", "right"]].set_visible(False)
        if chance is not None:
            known = chance[problem].values()
            axes.axvline(sum(known) / len(known), color="grey", linestyle="--", linewidth=1)
        for row, name in enumerate(names):
            result = found[name]
            of_classes = [each["f1"] for each in result["classes"].values()]
            axes.plot(of_classes, [row] * len(of_classes), ".", color=COLOUR, alpha=0.35, markersize=5)
            axes.errorbar(result["f1"], row, xerr=result["f1_error"], fmt="o", color=COLOUR, capsize=3)
        axes.set(title=problem, xlim=(0, 1.02))
        axes.grid(axis="x", alpha=0.3, linewidth=0.5)
    for axes in panels[len(problems) :]:
        axes.set_visible(False)
    note = "" if chance is None else "; dashed: always yes"
    figure.supxlabel(f"F1 of the best single feature{note}", fontsize=10)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.savefig(path, dpi=150)

"""The figure of sparse probing."""

import os
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

COLOUR = "#0072B2"


def plot_probing(problems: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Mean F1 of the best single feature, a panel for each problem and a row for each representation: the mean over
    classes with its standard error over folds, and behind it a small dot for every class.

    Args:
        problems: name → {representation: what `probe_features` gave}; the same representations in all.
        path: the image's path; its ending says the format.
    """
    names = list(next(iter(problems.values())))
    width = 0.5 + 0.08 * max(map(len, names)) + 2.0 * len(problems)
    figure = Figure(figsize=(width, 1.3 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(problems), sharey=True, squeeze=False)[0]
    for axes, (problem, found) in zip(panels, problems.items(), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        for row, name in enumerate(names):
            result = found[name]
            of_classes = [each["f1"] for each in result["classes"].values()]
            axes.plot(of_classes, [row] * len(of_classes), ".", color=COLOUR, alpha=0.35, markersize=5)
            axes.errorbar(result["f1"], row, xerr=result["f1_error"], fmt="o", color=COLOUR, capsize=3)
        axes.set(title=problem, xlabel="F1", xlim=(0, 1.02))
        axes.grid(axis="x", alpha=0.3, linewidth=0.5)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=150)

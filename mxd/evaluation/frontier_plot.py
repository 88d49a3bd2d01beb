"""The figure of a sparsity–accuracy frontier, drawn like the paper's."""

import math
import os
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from .paired import half_width
from .plots import _COLOURS

_METHODS = {
    # name: (label, marker)
    "transcoder": ("Transcoder", "s"),
    "skip_transcoder": ("Skip transcoder", "^"),
    "mxd": ("MxD", "o"),
}
_BESIDE = 0.05


def plot_frontier(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Cross-entropy and NMSE over K, one line per method; dashed, the untouched model. Bars are the 95 % intervals of
    the rise of the cross-entropy, paired token by token.

    Args:
        results: "untouched" and "points", as `mxd.frontier` gives them.
        path: the image's path; its ending says the format.
    """
    figure = Figure(figsize=(9.6, 4), layout="constrained")
    loss_axes, error_axes = figure.subplots(1, 2)
    there = dict.fromkeys(point["method"] for point in results["points"])
    methods = sorted(there, key=lambda method: list(_METHODS).index(method) if method in _METHODS else len(_METHODS))
    for index, method in enumerate(methods):
        points = [point for point in results["points"] if point["method"] == method]
        points.sort(key=lambda point: point["num_experts_per_tok"])
        label, marker = _METHODS.get(method, (method, "x"))
        style: dict[str, Any] = {"color": _COLOURS[index % len(_COLOURS)], "marker": marker, "markersize": 5}
        ks = [point["num_experts_per_tok"] for point in points]
        losses = [_number(point["cross_entropy"]["spliced"]) for point in points]
        # Where there is no interval, 0 draws no bar.
        halves = [half_width(point["cross_entropy"].get("rise_interval")) or 0.0 for point in points]
        # A little beside one another, or their bars would hide each other.
        beside = 2 ** (_BESIDE * (index - (len(methods) - 1) / 2))
        loss_axes.errorbar([k * beside for k in ks], losses, yerr=halves, capsize=2, elinewidth=1, **style)
        error_axes.plot(ks, [_mean_error(point) for point in points], label=label, **style)
    if results["untouched"] is not None:
        loss_axes.axhline(results["untouched"], color="black", linestyle="--", linewidth=1, label="Untouched model")
    ticks = sorted({point["num_experts_per_tok"] for point in results["points"]})
    for axes in (loss_axes, error_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.set_xlabel("K, experts active per token")
    loss_axes.set_ylabel("cross-entropy (nats per token)")
    error_axes.set(ylabel="NMSE", yscale="log")
    error_axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    error_axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    error_axes.yaxis.set_minor_locator(NullLocator())
    figure.legend(*_joined(error_axes, loss_axes), loc="outside upper left", ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def _joined(*axes: Axes) -> tuple[list[Any], list[str]]:
    """Handles and labels of the legends of several axes."""
    both = [one.get_legend_handles_labels() for one in axes]
    return [handle for handles, _ in both for handle in handles], [label for _, labels in both for label in labels]


def _mean_error(point: Mapping[str, Any]) -> float:
    """NMSE, mean over layers."""
    errors = [_number(layer["nmse"]) for layer in point["layers"].values()]
    return sum(errors) / len(errors)


def _number(value: float | None) -> float:
    return math.nan if value is None else value

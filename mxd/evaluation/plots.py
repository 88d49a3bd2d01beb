"""Plot results, with one palette. The ending of `path` sets the format of the image.

matplotlib takes a second to import, and commands that plot nothing import this module, too: functions import it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor

from mxd.base.layer_names import layer_names
from mxd.modeling_mxd import MxDConfig

from .expert_use import SPECIALISED_FREQUENCY
from .metrics import LEAST_EXPERT_SHARE
from .paired import half_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

PathLike: TypeAlias = str | os.PathLike[str]

# The palette of Okabe and Ito, distinguishable with any colour vision; its yellow is too pale for lines on white.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_LINE_STYLES = ("-", "--", ":", "-.")
_DASHED: dict[str, Any] = {"linestyle": "--", "linewidth": 1}
_LEGEND_ROWS = 16
_PANELS_PER_ROW = 4
# method: (label, marker)
_METHODS = {"transcoder": ("Transcoder", "s"), "skip_transcoder": ("Skip transcoder", "^"), "mxd": ("MxD", "o")}


def _figure(
    width: float = 6.4, height: float = 4.0, rows: int = 1, columns: int = 1, **shared: Any
) -> "tuple[Figure, list[Axes]]":
    """Make a figure and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).ravel())
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.3, linewidth=0.5)
    return figure, axes


def model_title(model: str | None, layers: Sequence[int]) -> str:
    """Return the part of a figure's title that names a base model and its layers."""
    return f"{Path(model or 'model').name}, {layer_names(layers)}"


def decomposition_title(config: MxDConfig) -> str:
    """Return the title of a decomposition's figures: base model, layers, methods and sizes, from least to most."""
    layers = [config.layer(layer) for layer in config.layers]
    methods = " and ".join(dict.fromkeys(_METHODS[layer.method][0] for layer in layers))
    units = "experts" if any(layer.method == "mxd" for layer in layers) else "latents"
    experts = _span([layer.num_experts for layer in layers])
    active = _span([layer.num_experts_per_tok for layer in layers])
    return f"{model_title(config.base_model_name_or_path, config.layers)}: {methods}, {experts} {units}, K = {active}"


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _save(figure: "Figure", path: PathLike, labels: int = 0, title: str = "") -> None:
    """Save a figure with a legend of `labels` entries: below the axes if it is short, else beside them."""
    if title:
        figure.suptitle(title, fontsize="medium")
    if 0 < labels <= len(COLOURS):
        figure.legend(
            loc="outside lower center", ncols=2 * round(figure.get_figwidth() / 6.4), frameon=False, fontsize="small"
        )
    elif labels:
        columns = -(-labels // _LEGEND_ROWS)
        figure.set_figwidth(6.4 + 2.2 * columns)
        figure.legend(loc="outside right center", ncols=columns, frameon=False, fontsize="x-small")
    figure.savefig(path, dpi=150)


def _style(index: int, count: int) -> dict[str, Any]:
    """Return colour and dashes of one line of `count`: the palette, or ordered shades for more lines than colours."""
    if count <= len(COLOURS):
        return {"color": COLOURS[index], "linestyle": _LINE_STYLES[index % len(_LINE_STYLES)]}
    from matplotlib import colormaps

    return {"color": colormaps["cividis"](0.9 * index / (count - 1)), "linewidth": 1}


def _log_ticks(axis: "Axis", digits: Sequence[float]) -> None:
    """Label a logarithmic axis at these multiples of the powers of ten, in plain numbers."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axis.set(major_locator=LogLocator(subs=digits), major_formatter=StrMethodFormatter("{x:g}"))
    axis.minorticks_off()


def _count_ticks(axes: "Axes", ticks: Sequence[int]) -> None:
    """Label the x axis at these numbers alone."""
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.minorticks_off()


def _floats(values: Sequence[float | None]) -> np.ndarray:
    """Return an array with NaN for None."""
    return np.array(values, dtype=float)


def _histograms(axes: "Axes", values: Mapping[str, np.ndarray], bins_per_decade: int) -> None:
    """Draw histograms of positive values over whole decades of a logarithmic axis, one line per label."""
    logs = {label: np.log10(value[value > 0]) for label, value in values.items()}
    joined = np.concatenate([*logs.values(), [-0.5]])  # at least the decade below 1
    low, high = math.floor(joined.min()), math.ceil(joined.max())
    for index, (label, log) in enumerate(logs.items()):
        counts, edges = np.histogram(log, bins_per_decade * (high - low), (low, high))
        style = "steps-mid" if len(logs) <= len(COLOURS) else "default"  # many steps would hide one another
        axes.plot(
            10 ** ((edges[:-1] + edges[1:]) / 2), counts, label=label, drawstyle=style, **_style(index, len(logs))
        )
    axes.set(xscale="log", xlim=(10.0**low, 10.0**high), ylabel="experts per bin")
    axes.set_ylim(bottom=0)


def plot_expert_frequency(frequencies: Mapping[str, Tensor], path: PathLike, title: str = "") -> None:
    """Plot a histogram of the experts' frequencies, one line per layer; the legend counts those that are never active.

    Args:
        frequencies: label → share of tokens on which each expert is active, (N).
    """
    figure, (axes,) = _figure()
    named = {}
    for label, frequency in frequencies.items():
        shares = frequency.detach().double().cpu().numpy()
        named[f"{label}: {100 * (shares == 0).mean():.1f} % of {len(shares):,} dead"] = shares
    _histograms(axes, named, bins_per_decade=8)
    quarter = f"{100 * SPECIALISED_FREQUENCY:.0f} % of tokens"
    axes.axvline(SPECIALISED_FREQUENCY, color="grey", linestyle=(0, (1, 1)), label=quarter)
    axes.set(xlabel="share of tokens on which an expert is active")
    _save(figure, path, max(1, len(named)), title)


def plot_singular_values(values: Mapping[str, Tensor], path: PathLike, title: str = "") -> None:
    """Plot a histogram of the experts' smallest singular values, one line per layer; the legend counts zeros.

    Args:
        values: label → smallest singular value of each sampled expert, (S), as `ExpertRanks.smallest`.
    """
    figure, (axes,) = _figure()
    named = {}
    for label, value in values.items():
        zeros = int((value <= 0).sum())
        name = f"{label}: {len(value):,} experts" + (f", {zeros} at 0" if zeros else "")
        named[name] = value.detach().double().cpu().numpy()
    _histograms(axes, named, bins_per_decade=24)
    axes.set(xlabel="smallest singular value of an expert's matrix")
    _save(figure, path, len(named), title)


def plot_ablation(curves: Mapping[str, Mapping[str, Any]], path: PathLike, title: str = "") -> None:
    """Plot the rise of cross-entropy as the strongest experts are removed; a dashed line is the zero-ablated model.

    Args:
        curves: label → result of `ablation_curve`, or its entry in evaluation.json.
    """
    figure, (axes,) = _figure()
    most = max((count for curve in curves.values() for count in curve["removed"]), default=1)
    for index, (label, curve) in enumerate(curves.items()):
        style = _style(index, len(curves)) | {"linestyle": "-"}
        axes.plot(curve["removed"], _floats(curve["rise"]), label=label, marker=".", **style)
        if curve["zero_ablated"] is not None and curve["untouched"] is not None:
            ablated = curve["zero_ablated"] - curve["untouched"]
            axes.axhline(ablated, color=style["color"], label=f"{label}: zero-ablated", **_DASHED)
    axes.set_xscale("symlog", base=2, linthresh=1)  # 0 has no logarithm: the axis is linear up to 1
    _count_ticks(axes, [0, *(2**power for power in range(max(1, most).bit_length()))])
    axes.set_xlim(-0.1, 1.1 * most)
    axes.set(xlabel="strongest active experts removed", ylabel="rise of cross-entropy (nats per token)")
    _save(figure, path, 2 * len(curves), title)


def plot_domain_use(uses: Mapping[str, Mapping[str, Any]], path: PathLike, title: str = "") -> None:
    """Plot a bar of the active experts of every domain, and within it, solid, the experts of that domain alone.

    Args:
        uses: label of a layer → result of `domain_use`, with the same domains in all.
    """
    domains = list(next(iter(uses.values()))["domains"])
    figure, (axes,) = _figure(height=max(4.0, 1 + 0.25 * len(domains) * len(uses)))
    height = 0.8 / len(uses)
    for index, (label, use) in enumerate(uses.items()):
        places = [row + height * (index - (len(uses) - 1) / 2) for row in range(len(domains))]
        rows = [use["domains"][domain] for domain in domains]
        active, own = [row["active_experts"] for row in rows], [len(row["own_experts"]) for row in rows]
        colour, share = _style(index, len(uses))["color"], f"{100 * use['share']:.0f} %"
        axes.barh(places, active, height, color=colour, alpha=0.3, label=f"{label}: active there")
        axes.barh(places, own, height, color=colour, label=f"{label}: {share} of firings there")
    axes.set_yticks(range(len(domains)), domains)
    axes.invert_yaxis()
    axes.set(xlabel="experts")
    _save(figure, path, 2 * len(uses), title)


def plot_training_loss(
    log_history: Sequence[Mapping[str, Any]], path: PathLike, loss: str = "normalised squared error", title: str = ""
) -> None:
    """Plot the training loss, one line per layer if the log has them (`layer_8/loss`).

    The axis is tokens if the log counts them (`include_num_input_tokens_seen`), else optimiser steps.

    Args:
        log_history: `trainer.state.log_history`; entries without "loss" are skipped.
        loss: name of the loss, for the axis.
    """
    figure, (axes,) = _figure()
    logs = [entry for entry in log_history if "loss" in entry]
    by_tokens = bool(logs) and all("num_input_tokens_seen" in entry for entry in logs)
    position = "num_input_tokens_seen" if by_tokens else "step"
    names = [name for name in (logs[0] if logs else {}) if name.endswith("/loss")] or ["loss"]
    for index, name in enumerate(names):
        entries = [entry for entry in logs if name in entry]
        xs, losses = [entry[position] for entry in entries], [entry[name] for entry in entries]
        label = name.removesuffix("/loss").replace("_", " ")
        axes.plot(xs, losses, label=label, marker="." if len(xs) < 30 else None, **_style(index, len(names)))
    axes.set(xlabel="optimiser steps", ylabel=f"training loss ({loss})", yscale="log")
    _log_ticks(axes.yaxis, (1, 2, 3, 5))
    if by_tokens:
        from matplotlib.ticker import EngFormatter

        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    _save(figure, path, len(names) if len(names) > 1 else 0, title)


def plot_frontier(results: Mapping[str, Any], path: PathLike, title: str = "") -> None:
    """Plot cross-entropy, NMSE and expert share over K, one line per method; the first as in the paper's Fig. 3.

    The untouched model is a dashed line, and so is the share below which `weak_experts` warns. Bars are the 95 %
    intervals of the rise of the cross-entropy, paired token by token.

    Args:
        results: "untouched" and "points", as `measure_frontier` returns them.
    """
    figure, (loss_axes, error_axes, share_axes) = _figure(14.4, columns=3)
    every = sorted(results["points"], key=lambda point: point["num_experts_per_tok"])
    methods = [name for name in _METHODS if any(point["method"] == name for point in every)]
    for index, method in enumerate(methods):
        points = [point for point in every if point["method"] == method]
        label, marker = _METHODS[method]
        style: dict[str, Any] = {"color": COLOURS[index], "marker": marker, "markersize": 5}
        ks = np.array([point["num_experts_per_tok"] for point in points])
        losses = _floats([point["cross_entropy"]["spliced"] for point in points])
        halves = [half_width(point["cross_entropy"].get("rise_interval")) or 0.0 for point in points]  # 0 draws no bar
        errors, shares = (
            [_floats([layer.get(name) for layer in point["layers"].values()]).mean() for point in points]
            for name in ("nmse", "expert_share")
        )
        shift = 2 ** (0.05 * (index - (len(methods) - 1) / 2))  # so that the bars do not hide each other
        loss_axes.errorbar(ks * shift, losses, yerr=halves, capsize=2, elinewidth=1, **style)
        error_axes.plot(ks, errors, label=label, **style)
        share_axes.plot(ks, 100 * np.array(shares), **style)
    least = f"{100 * LEAST_EXPERT_SHARE:.0f} % expert share: below, the dense part does the work"
    share_axes.axhline(100 * LEAST_EXPERT_SHARE, color="grey", label=least, **_DASHED)
    if results["untouched"] is not None:
        loss_axes.axhline(results["untouched"], color="black", **_DASHED)
        error_axes.plot([], [], color="black", label="Untouched model", **_DASHED)  # last in the legend
    for axes in (loss_axes, error_axes, share_axes):
        axes.set_xscale("log", base=2)
        _count_ticks(axes, sorted({point["num_experts_per_tok"] for point in every}))
        axes.set_xlabel("K, experts active per token")
    loss_axes.set_ylabel("cross-entropy (nats per token)")
    share_axes.set_ylabel("expert share (%)")
    error_axes.set(ylabel="NMSE", yscale="log")
    _log_ticks(error_axes.yaxis, (1, 1.5, 2, 3, 4, 5, 7))
    _save(figure, path, len(methods) + 2, title)


def plot_probing(
    problems: Mapping[str, Mapping[str, Any]],
    path: PathLike,
    chance: Mapping[str, Mapping[str, float]],
    title: str = "",
) -> None:
    """Plot the F1 of the best single feature, a panel per problem and a row per representation.

    A row shows the mean over classes with its standard error over folds, and a small dot for every class.

    Args:
        problems: name → {representation: result of `probe_features`}, with the same representations in all.
        chance: name → result of `always_yes_f1`; its mean is a dashed line.
    """
    names = list(next(iter(problems.values())))
    columns = min(_PANELS_PER_ROW, len(problems))
    rows = -(-len(problems) // columns)
    width, height = 0.5 + 0.08 * max(map(len, names)) + 2.4 * columns, 0.5 + rows * (0.6 + 0.28 * len(names))
    figure, panels = _figure(width, height, rows, columns, sharex=True, sharey=True)
    for axes, (problem, found) in zip(panels, problems.items(), strict=False):
        axes.axvline(float(np.mean(list(chance[problem].values()))), color="grey", **_DASHED)
        for row, name in enumerate(names):
            result = found[name]
            scores = [each["f1"] for each in result["classes"].values()]
            axes.plot(scores, [row] * len(scores), ".", color=COLOURS[0], alpha=0.35, markersize=5)
            axes.errorbar(result["f1"], row, xerr=result["f1_error"], fmt="o", color=COLOURS[0], capsize=3)
        axes.set(title=problem, xlim=(0, 1.02))
    for axes in panels[len(problems) :]:
        axes.set_visible(False)
    figure.supxlabel("F1 of the best single feature; dashed: always yes", fontsize=10)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    _save(figure, path, title=title)

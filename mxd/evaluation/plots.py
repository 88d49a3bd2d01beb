"""Figures beside the numbers. They use matplotlib's object interface: no global state, no display."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from .expert_use import SPECIALISED_FREQUENCY

# Okabe and Ito's palette, told apart with any colour vision; its yellow is too pale for lines on white.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_LINE_STYLES = ("-", "--", ":", "-.")
_BINS_PER_DECADE = 8
_LEGEND_ROWS = 16


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(index: int, count: int) -> dict[str, Any]:
    """Colour and dashes of one line of `count`: the palette, or shades in order where it is too short."""
    if count <= len(_COLOURS):
        return {"color": _COLOURS[index], "linestyle": _LINE_STYLES[index % len(_LINE_STYLES)]}
    return {"color": matplotlib.colormaps["cividis"](0.9 * index / (count - 1)), "linewidth": 1}


def _legend(figure: Figure, count: int) -> None:
    """Above the axes where it is short, else beside them: never over the data."""
    if count <= len(_COLOURS):
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize="small")
        return
    columns = -(-count // _LEGEND_ROWS)
    figure.set_figwidth(6.4 + 2.2 * columns)
    figure.legend(loc="outside right center", ncols=columns, frameon=False, fontsize="x-small")


def plot_expert_frequency(frequencies: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Histogram of log₁₀ of how often each expert is active, one line per layer; experts that never are, of which
    the logarithm does not exist, are named in the legend.

    Args:
        frequencies: label → share of tokens on which each expert is active, (N).
        path: the image's path; its ending says the format.
    """
    figure, axes = _figure()
    shares = {label: frequency.detach().double().cpu() for label, frequency in frequencies.items()}
    smallest = min((float(share[share > 0].min()) for share in shares.values() if share.any()), default=1.0)
    decades = max(1, math.ceil(-math.log10(smallest)))
    for index, (label, share) in enumerate(shares.items()):
        alive = share[share > 0]
        dead = 100 * (1 - len(alive) / len(share))
        counts, edges = torch.histogram(
            alive.log10().clamp(-decades, 0), bins=_BINS_PER_DECADE * decades, range=(-float(decades), 0.0)
        )
        name = f"{label}: {dead:.1f} % of {len(share):,} dead"
        centres = (edges[:-1] + edges[1:]) / 2
        style = "steps-mid" if len(shares) <= len(_COLOURS) else "default"  # many steps hide one another
        axes.plot(centres.numpy(), counts.numpy(), label=name, drawstyle=style, **_line(index, len(shares)))
    axes.axvline(
        math.log10(SPECIALISED_FREQUENCY),
        color="grey", linestyle=(0, (1, 1)), label=f"{100 * SPECIALISED_FREQUENCY:.0f} % of tokens",
    )  # fmt: skip
    axes.set(xlabel="share of tokens on which an expert is active", ylabel="experts per bin", xlim=(-decades, 0))
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(-decades, 1), [f"$10^{{{power}}}$" for power in range(-decades, 1)])
    _legend(figure, len(shares))
    figure.savefig(path, dpi=150)


def plot_ablation(curves: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Rise of cross-entropy as the strongest experts are removed, one line per curve; dashed of the same colour, what
    zero-ablated MLPs have.

    Args:
        curves: label → what `ablation_curve` gave, or evaluation.json has of it.
        path: the image's path; its ending says the format.
    """
    figure, axes = _figure()
    most = max((count for curve in curves.values() for count in curve["removed"]), default=1)
    for index, (label, curve) in enumerate(curves.items()):
        rises = [math.nan if rise is None else rise for rise in curve["rise"]]
        style = _line(index, len(curves)) | {"linestyle": "-"}
        axes.plot(curve["removed"], rises, label=label, marker=".", **style)
        if curve["zero_ablated"] is not None and curve["untouched"] is not None:
            axes.axhline(
                curve["zero_ablated"] - curve["untouched"],
                color=style["color"], linestyle="--", linewidth=1, label=f"{label}: zero-ablated",
            )  # fmt: skip
    # 0 has no logarithm: the axis is linear up to 1.
    axes.set_xscale("symlog", base=2, linthresh=1)
    ticks = [0, *(2**power for power in range(max(1, most).bit_length()))]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(-0.1, 1.1 * most)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="strongest active experts removed", ylabel="rise of cross-entropy (nats per token)")
    axes.grid(alpha=0.3, linewidth=0.5)
    _legend(figure, 2 * len(curves))
    figure.savefig(path, dpi=150)


def plot_domain_use(uses: Mapping[str, Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Bars of how many experts are active in every domain, and within them, solid, how many are of that domain alone.

    Args:
        uses: label of a layer → what `domain_use` gave.
        path: the image's path; its ending says the format.
    """
    figure, axes = _figure()
    domains = list(dict.fromkeys(domain for use in uses.values() for domain in use["domains"]))
    figure.set_figheight(max(4.0, 1 + 0.25 * len(domains) * len(uses)))
    height = 0.8 / max(1, len(uses))
    for index, (label, use) in enumerate(uses.items()):
        places = [row + height * (index - (len(uses) - 1) / 2) for row in range(len(domains))]
        rows = [use["domains"].get(domain, {"active_experts": 0, "own_experts": {}}) for domain in domains]
        colour = _line(index, len(uses))["color"]
        axes.barh(places, [row["active_experts"] for row in rows], height, color=colour, alpha=0.3,
                  label=f"{label}: active there")  # fmt: skip
        axes.barh(places, [len(row["own_experts"]) for row in rows], height, color=colour,
                  label=f"{label}: {100 * use['share']:.0f} % of firings there")  # fmt: skip
    axes.set_yticks(range(len(domains)), domains)
    axes.invert_yaxis()
    axes.set(xlabel="experts")
    _legend(figure, 2 * len(uses))
    figure.savefig(path, dpi=150)


def plot_singular_values(values: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Histogram of log₁₀ of the experts' smallest singular values, one line per layer; zeros, of which the logarithm
    does not exist, are counted in the legend.

    Args:
        values: label → smallest singular value of each sampled expert, (S), as `ExpertRanks.smallest`.
        path: the image's path; its ending says the format.
    """
    figure, axes = _figure()
    logs = {label: value[value > 0].detach().double().cpu().log10() for label, value in values.items()}
    positive = torch.cat([*logs.values(), torch.zeros(0, dtype=torch.float64)])
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (-1.0, 0.0)
    low, high = (low - 0.1, high + 0.1) if high - low < 0.1 else (low, high)
    for index, (label, value) in enumerate(values.items()):
        counts, edges = torch.histogram(logs[label], bins=24, range=(low, high))
        name = f"{label}: {len(value):,} experts" + (f", {int((value <= 0).sum())} at 0" if (value <= 0).any() else "")
        style = "steps-mid" if len(values) <= len(_COLOURS) else "default"
        centres = 10 ** ((edges[:-1] + edges[1:]) / 2)
        axes.plot(centres.numpy(), counts.numpy(), label=name, drawstyle=style, **_line(index, len(values)))
    axes.set(xlabel="smallest singular value of an expert's matrix", ylabel="experts per bin", xscale="log")
    axes.set_ylim(bottom=0)
    _legend(figure, len(values))
    figure.savefig(path, dpi=150)


def plot_training_loss(
    log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], loss: str = "normalised squared error"
) -> None:
    """Training loss, from `trainer.state.log_history`: over tokens where the log counts them
    (`include_num_input_tokens_seen`), else over optimiser steps; one line per layer if it has them (`layer_8/loss`).

    Args:
        log_history: entries with "step", "loss" and perhaps more; those without "loss" are passed over.
        path: the image's path; its ending says the format.
        loss: what the loss is, for the axis.
    """
    figure, axes = _figure()
    logs = [entry for entry in log_history if "loss" in entry]
    by_tokens = bool(logs) and all("num_input_tokens_seen" in entry for entry in logs)
    position = "num_input_tokens_seen" if by_tokens else "step"
    names = [name for name in (logs[0] if logs else {}) if name.endswith("/loss")] or ["loss"]
    for index, name in enumerate(names):
        points = [(entry[position], entry[name]) for entry in logs if name in entry]
        label = name.removesuffix("/loss").replace("_", " ")
        marker = "." if len(points) < 30 else None
        axes.plot(*zip(*points, strict=True) if points else ([], []), label=label, marker=marker,
                  **_line(index, len(names)))  # fmt: skip
    axes.set(
        xlabel="training tokens" if by_tokens else "optimiser steps",
        ylabel=f"training loss ({loss})", yscale="log",
    )  # fmt: skip
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    if by_tokens:
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.grid(alpha=0.3, linewidth=0.5)
    if len(names) > 1:
        _legend(figure, len(names))
    figure.savefig(path, dpi=150)

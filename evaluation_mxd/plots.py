"""Figures beside the numbers. They use matplotlib's object interface: no global state, no display."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .expert_use import SPECIALISED_FREQUENCY


def plot_expert_frequency(frequencies: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Histogram of how often each expert is active, one line per layer.

    Args:
        frequencies: label → share of tokens on which each expert is active, (N).
        path: the image's path.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for label, frequency in frequencies.items():
        alive = frequency[frequency > 0].double().log10()
        dead = 1 - len(alive) / len(frequency)
        counts, edges = torch.histogram(alive.cpu(), bins=50, range=(-6.0, 0.0))
        axes.stairs(
            counts.numpy(), edges.numpy(), label=f"{label}: {len(frequency):,} experts, {100 * dead:.1f} % dead"
        )
    axes.axvline(torch.tensor(SPECIALISED_FREQUENCY).log10().item(), color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="share of training tokens on which an expert is active", ylabel="experts")
    axes.set_xticks(range(-6, 1), [f"$10^{{{power}}}$" for power in range(-6, 1)])
    axes.legend(title="dotted: 25 %", frameon=False)
    figure.savefig(path, dpi=150)


def plot_training_loss(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Training loss against optimiser steps, from `trainer.state.log_history`; one line per layer if it has them."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    logs = [entry for entry in log_history if "loss" in entry]
    names = [name for name in (logs[0] if logs else {}) if name.endswith("/loss")] or ["loss"]
    for name in names:
        points = [(entry["step"], entry[name]) for entry in logs if name in entry]
        axes.plot(
            *zip(*points, strict=True) if points else ([], []), label=name.removesuffix("/loss").replace("_", " ")
        )
    axes.set(xlabel="optimiser step", ylabel="loss: normalised squared error", yscale="log")
    axes.grid(alpha=0.3, which="both")
    if len(names) > 1:
        axes.legend(frameon=False, ncols=2)
    figure.savefig(path, dpi=150)

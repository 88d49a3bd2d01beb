"""What experts carry, found by removing them: ablation curves, and expert shares of the cross-entropy."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mxd.base.forward import (
    Batch,
    ZeroMLP,
    capture_with_logits,
    check_causal,
    evaluating,
    next_token_logits,
    right_padded,
)
from mxd.base.masks import token_mask
from mxd.modeling_mxd import ExpertCoefficients, MxDLayer, MxDModel, SparseLayer, spliced_mlps
from mxd.modeling_mxd.surgery import running_device

from .expert_use import SPECIALISED_FREQUENCY
from .faithfulness import Statistics, expert_statistics
from .metrics import ErrorSums, LogitSums

ORDERS = ("coefficient", "contribution")

SumExperts = Callable[[SparseLayer, Tensor, ExpertCoefficients], Tensor]
"""Gives what stands for Cᵀa, (..., O), of a layer, its input x (..., I) and its coefficients."""


class ChangedExperts(nn.Module):
    """A layer whose Cᵀa is replaced: (..., I) → (..., O), in the dtype of x. Interventions are not applied."""

    def __init__(self, layer: SparseLayer, sum_experts: SumExperts):
        super().__init__()
        self.layer = layer
        self.sum_experts = sum_experts

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with what `sum_experts` gives."""
        summed = self.sum_experts(self.layer, x, self.layer.encode(x))
        return self.layer.combine(summed, x.to(summed.dtype)).to(x.dtype)


def contribution_norms(layer: SparseLayer, x: Tensor, coefficients: ExpertCoefficients) -> Tensor:
    """‖a_n c_n * Dᵀz‖ of the active experts of an MxD, ‖a_n c_n‖ of the active latents of a transcoder.

    Args:
        layer: the layer.
        x: its input, (..., I).
        coefficients: values and indices (..., K).

    Returns:
        (..., K) in the order of the coefficients.
    """
    values, indices = coefficients
    table = layer.expert_table
    factor = layer.decoder(layer.hidden(x)) if isinstance(layer, MxDLayer) else None
    norms = []
    for expert in indices.unbind(-1):  # one at a time: (tokens, K, O) would be the largest tensor by far
        rows = table[expert]
        norms.append((rows if factor is None else rows * factor).norm(dim=-1))
    return values.abs() * torch.stack(norms, dim=-1)


def remove_strongest(
    layer: SparseLayer, x: Tensor, coefficients: ExpertCoefficients, count: int, order: str = "coefficient"
) -> ExpertCoefficients:
    """The coefficients with those of each token's `count` strongest active experts at 0.

    Args:
        layer, x, coefficients: as for `contribution_norms`.
        count: how many to remove, from 0; experts that are not active (coefficient 0) are the weakest.
        order: the strongest have the largest `"coefficient"` a_n, or the largest `"contribution"`, see
            `contribution_norms`.
    """
    values, indices = coefficients
    strength = values if order == "coefficient" else contribution_norms(layer, x, coefficients)
    ranks = strength.argsort(dim=-1, descending=True, stable=True)
    kept = torch.ones_like(values, dtype=torch.bool).scatter(-1, ranks[..., :count], False)
    return ExpertCoefficients(values * kept, indices)


def removal_counts(num_active: int) -> list[int]:
    """0, 1, 2, 4, … and K itself."""
    return [0, *(2**power for power in range(num_active.bit_length()) if 2**power < num_active), num_active]


def _without_strongest(count: int, order: str) -> SumExperts:
    return lambda layer, x, coefficients: layer.sum_experts(remove_strongest(layer, x, coefficients, count, order))


def _with_mean(statistics: Statistics, threshold: float, layer: SparseLayer) -> SumExperts:
    """Cᵀa with the experts active on at most `threshold` of the training tokens at their mean coefficient."""
    table = layer.expert_table
    frequency, mean = statistics[0].to(table.device), statistics[1].to(table)
    kept = frequency > threshold
    mean_sum = (mean * ~kept) @ table

    def sum_experts(layer: SparseLayer, x: Tensor, coefficients: ExpertCoefficients) -> Tensor:
        values, indices = coefficients
        return layer.sum_experts(ExpertCoefficients(values * kept[indices], indices)) + mean_sum

    return sum_experts


class _Curve:
    """The sums of an ablation curve, streamed over batches."""

    def __init__(
        self, model: nn.Module, decomposition: MxDModel, counts: Sequence[int], order: str,
        statistics: Mapping[int, Statistics], specialised_frequency: float,
    ):  # fmt: skip
        self.model, self.decomposition = model, decomposition
        layers = {index: decomposition.layer(index) for index in decomposition.config.layers}
        self.variants: dict[int | str, dict[int, nn.Module]] = {
            count: {index: ChangedExperts(layer, _without_strongest(count, order)) for index, layer in layers.items()}
            for count in counts
        }
        # No frequency is over 1: with that threshold every expert is at its mean.
        for name, threshold in (("mean", 1.0), ("mean_specialised", specialised_frequency)):
            self.variants[name] = {
                index: ChangedExperts(layer, _with_mean(statistics[index], threshold, layer))
                for index, layer in layers.items()
            }
        self.variants["zero_ablated"] = {
            index: ZeroMLP(decomposition.config.layer(index).output_size) for index in layers
        }
        self.errors = {index: {count: ErrorSums() for count in counts} for index in layers}
        self.losses = {name: LogitSums() for name in ["untouched", *self.variants]}
        self.tokens = self.rows = 0

    def update(self, batch: Batch) -> None:
        """Add a batch: one forward pass of the untouched model, and one for every variant."""
        ids, attention_mask = batch
        mask = token_mask(ids, attention_mask)
        self.rows += len(ids)
        self.tokens += int(mask.sum())
        config = self.decomposition.config
        captured, logits = capture_with_logits(self.model, config, batch)
        self.losses["untouched"].update(logits, ids, mask)
        del logits
        for layer, (x, y) in captured.items():
            inputs, outputs = x[mask.to(x.device)], y[mask.to(y.device)]
            for count, errors in self.errors[layer].items():
                errors.update(self.variants[count][layer](inputs), outputs)
        del captured
        for name, modules in self.variants.items():
            with spliced_mlps(self.model, modules, cast=False, **config.where):
                self.losses[name].update(next_token_logits(self.model, batch), ids, mask)


@torch.no_grad()
def ablation_curve(
    model: nn.Module,
    decomposition: MxDModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    order: str = "coefficient",
    counts: Sequence[int] | None = None,
    specialised_frequency: float = SPECIALISED_FREQUENCY,
    progress: bool = False,
) -> dict[str, Any]:
    """Cross-entropy and NMSE as the strongest active experts of each token are removed, in all layers at once, and
    expert shares of the cross-entropy.

        expert_share = (CE_mean − CE) / (CE_zero − CE)

    with CE of the spliced model, CE_mean with every layer's Cᵀa replaced by its mean over training tokens, CE_zero with
    the MLPs zero-ablated: of NMSE, where an output of zero has the error 1, the same as `faithfulness` has it.
    `specialised_share` likewise, only the specialised experts being replaced. Where the experts' mean is worse than no
    MLP at all, a share is over 1. A value that is not defined is NaN.

    A batch takes a forward pass for every count and four more: nearly four times what `faithfulness` takes at K = 32.

    Args:
        model, decomposition, batches, progress, specialised_frequency: as for `faithfulness`; registered interventions
            are not applied.
        order: which experts are the strongest, see `remove_strongest`.
        counts: how many to remove; by default 0, 1, 2, 4, … and the largest K of the layers.

    Returns:
        {"order", "removed": counts, "cross_entropy": a value per count, "rise": over the untouched model's, per
        count, "layers": {"15": {"nmse": per count}}, "untouched", "zero_ablated", "mean", "mean_specialised":
        cross-entropies, "expert_share", "specialised_share", "settings"}; cross-entropies in nats per token.

    Raises:
        ValueError: an unknown order, a count below 0, no tokens, or batches that can be passed over only once and
            have to be twice.
        SurgeryError: when the model does not fit the decomposition, before anything is measured.
    """
    check_causal(model)
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    config = decomposition.config
    if counts is None:
        counts = removal_counts(max(config.layer(layer).num_experts_per_tok for layer in config.layers))
    if not counts or min(counts) < 0:
        raise ValueError(f"counts must be numbers of experts to remove, from 0, at least one; got {list(counts)}")
    with decomposition.spliced(model, cast=False):
        pass  # refuses what does not fit, and moves every layer to where its MLP is
    with evaluating(model, decomposition):
        statistics, source = expert_statistics(model, decomposition, batches)
        # Nothing removed is what the shares are of, asked for or not.
        curve = _Curve(model, decomposition, sorted({0, *counts}), order, statistics, specialised_frequency)
        for batch in tqdm(batches, desc="ablate", unit="batch", disable=not progress, dynamic_ncols=True):
            curve.update(right_padded(batch, running_device(model)))
    if not curve.tokens:
        raise ValueError("no tokens to measure an ablation curve on: batches is empty, or all of it is padding")
    return {
        **_result(curve, sorted(set(counts)), order),
        "settings": {
            "tokens": curve.tokens,
            "rows": curve.rows,
            "expert_statistics": source,
            "specialised_frequency": specialised_frequency,
        },
    }


def _result(curve: _Curve, counts: Sequence[int], order: str) -> dict[str, Any]:
    losses = {name: sums.cross_entropy for name, sums in curve.losses.items()}
    gap = losses["zero_ablated"] - losses[0]
    return {
        "order": order,
        "removed": list(counts),
        "cross_entropy": [losses[count] for count in counts],
        "rise": [losses[count] - losses["untouched"] for count in counts],
        "layers": {
            str(layer): {"nmse": [errors[count].nmse for count in counts]} for layer, errors in curve.errors.items()
        },
        **{name: losses[name] for name in ("untouched", "zero_ablated", "mean", "mean_specialised")},
        "expert_share": (losses["mean"] - losses[0]) / gap if gap > 0 else math.nan,
        "specialised_share": (losses["mean_specialised"] - losses[0]) / gap if gap > 0 else math.nan,
    }

"""Remove experts, and measure what is lost: ablation curves, and expert shares of the cross-entropy."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mxd.base.forward import (
    Batch,
    ZeroMLP,
    batch_for,
    capture_with_logits,
    check_causal,
    evaluating,
    next_token_logits,
)
from mxd.base.masks import token_mask
from mxd.modeling_mxd import ExpertCoefficients, MxDLayer, MxDModel, SparseLayer, spliced_mlps

from .expert_use import SPECIALISED_FREQUENCY, Statistics, expert_statistics
from .metrics import ErrorSums, LogitSums

ORDERS = ("coefficient", "contribution")

SumExperts = Callable[[SparseLayer, Tensor, ExpertCoefficients], Tensor]
"""A function from a layer, its input x (..., I) and its coefficients to a replacement of Cᵀa, (..., O)."""


class ChangedExperts(nn.Module):
    """A layer with Cᵀa replaced: (..., I) → (..., O), in the dtype of x. Interventions are not applied."""

    def __init__(self, layer: SparseLayer, sum_experts: SumExperts):
        super().__init__()
        self.layer = layer
        self.sum_experts = sum_experts

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with Cᵀa from `sum_experts`."""
        summed = self.sum_experts(self.layer, x, self.layer.encode(x))
        return self.layer.combine(summed, x.to(summed.dtype)).to(x.dtype)


class MeanExperts:
    """Compute Cᵀa with the experts active on at most `threshold` of the training tokens at their mean coefficient.

    With a threshold of 1 these are all experts.
    """

    def __init__(self, layer: SparseLayer, statistics: Statistics, threshold: float = 1.0):
        table = layer.expert_table
        frequency, mean = statistics[0].to(table.device), statistics[1].to(table)
        self.kept = frequency > threshold
        self.mean_sum = (mean * ~self.kept) @ table
        self.any_kept = bool(self.kept.any())

    def __call__(self, layer: SparseLayer, x: Tensor, coefficients: ExpertCoefficients) -> Tensor:
        """Return (..., O) for coefficients (..., K)."""
        values, indices = coefficients
        if not self.any_kept:
            return self.mean_sum.expand(*values.shape[:-1], -1)
        return layer.sum_experts(ExpertCoefficients(values * self.kept[indices], indices)) + self.mean_sum


def contribution_norms(layer: SparseLayer, x: Tensor, coefficients: ExpertCoefficients) -> Tensor:
    """Return ‖a_n c_n * Dᵀz‖ of an MxD's active experts, or ‖a_n c_n‖ of a transcoder's active latents.

    Args:
        layer: the layer.
        x: its input, (..., I).
        coefficients: values and indices, (..., K).

    Returns:
        (..., K), in the order of the coefficients.
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
    """Return the coefficients with those of each token's `count` strongest active experts set to 0.

    Args:
        layer, x, coefficients: see `contribution_norms`.
        count: how many to remove, from 0; experts that are not active (coefficient 0) are the weakest.
        order: rank experts by their `"coefficient"` a_n, or by their `"contribution"`, see `contribution_norms`.
    """
    values, indices = coefficients
    strength = values if order == "coefficient" else contribution_norms(layer, x, coefficients)
    ranks = strength.argsort(dim=-1, descending=True, stable=True)
    kept = torch.ones_like(values, dtype=torch.bool).scatter(-1, ranks[..., :count], False)
    return ExpertCoefficients(values * kept, indices)


def removal_counts(num_active: int) -> list[int]:
    """Return 0, 1, 2, 4, … and K itself."""
    return [0, *(2**power for power in range(num_active.bit_length()) if 2**power < num_active), num_active]


def _sum_without_strongest(
    layer: SparseLayer, x: Tensor, coefficients: ExpertCoefficients, count: int, order: str
) -> Tensor:
    return layer.sum_experts(remove_strongest(layer, x, coefficients, count, order))


class _Curve:
    """Sum the losses and errors of an ablation curve, streamed over batches."""

    def __init__(
        self, model: nn.Module, decomposition: MxDModel, counts: Sequence[int], order: str,
        statistics: Mapping[int, Statistics], specialised_frequency: float,
    ):  # fmt: skip
        self.model, self.decomposition = model, decomposition
        layers = {index: decomposition.layer(index) for index in decomposition.config.layers}
        self.variants: dict[int | str, dict[int, nn.Module]] = {}
        for count in counts:
            remove = partial(_sum_without_strongest, count=count, order=order)
            self.variants[count] = {index: ChangedExperts(layer, remove) for index, layer in layers.items()}
        for name, threshold in (("mean", 1.0), ("mean_specialised", specialised_frequency)):
            self.variants[name] = {
                index: ChangedExperts(layer, MeanExperts(layer, statistics[index], threshold))
                for index, layer in layers.items()
            }
        self.variants["zero_ablated"] = {index: ZeroMLP(layer.config.output_size) for index, layer in layers.items()}
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

    def result(self, counts: Sequence[int]) -> dict[str, Any]:
        """Return the values of these counts, and the expert shares; see `ablation_curve`."""
        losses = {name: sums.cross_entropy for name, sums in self.losses.items()}
        gap = losses["zero_ablated"] - losses[0]
        shares = {"expert_share": losses["mean"], "specialised_share": losses["mean_specialised"]}
        return {
            "removed": list(counts),
            "cross_entropy": [losses[count] for count in counts],
            "rise": [losses[count] - losses["untouched"] for count in counts],
            "layers": {
                str(layer): {"nmse": [errors[count].nmse for count in counts]} for layer, errors in self.errors.items()
            },
            **{name: losses[name] for name in ("untouched", "zero_ablated", "mean", "mean_specialised")},
            **{name: (loss - losses[0]) / gap if gap > 0 else math.nan for name, loss in shares.items()},
        }


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
    """Measure cross-entropy and NMSE as each token's strongest active experts are removed, in all layers at once.

        expert_share = (CE_mean − CE) / (CE_zero − CE)

    with CE of the spliced model, CE_mean with every layer's Cᵀa replaced by its mean over training tokens, and CE_zero
    with the MLPs zero-ablated. `specialised_share` replaces only the specialised experts. A share is over 1 if the mean
    is worse than no MLP, and NaN if it is not defined. A batch takes a forward pass for every count and four more.

    Args:
        model, decomposition, batches, progress, specialised_frequency: see `faithfulness`; interventions do not apply.
        order: how to rank experts, see `remove_strongest`.
        counts: how many to remove; by default 0, 1, 2, 4, … and the largest K of the layers.

    Returns:
        {"order", "removed": counts, "cross_entropy": per count, "rise": over the untouched model, per count, "layers":
        {"15": {"nmse": per count}}, "untouched", "zero_ablated", "mean", "mean_specialised": cross-entropies,
        "expert_share", "specialised_share", "settings"}; cross-entropies in nats per token.

    Raises:
        ValueError: an unknown order, a count below 0, no tokens, or an iterator of batches that is needed twice.
        SurgeryError: the model does not fit the decomposition; nothing is measured.
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
        pass  # checks that it fits, and moves every layer to the device of its MLP
    with evaluating(model, decomposition):
        statistics, source = expert_statistics(model, decomposition, batches)
        # The shares need the count 0, even if it is not requested.
        curve = _Curve(model, decomposition, sorted({0, *counts}), order, statistics, specialised_frequency)
        for batch in tqdm(batches, desc="ablate", unit="batch", disable=not progress, dynamic_ncols=True):
            curve.update(batch_for(model, batch))
    if not curve.tokens:
        raise ValueError("no tokens to measure an ablation curve on: batches is empty, or contains only padding")
    settings = {
        "tokens": curve.tokens, "rows": curve.rows, "expert_statistics": source,
        "specialised_frequency": specialised_frequency,
    }  # fmt: skip
    return {"order": order, **curve.result(sorted(set(counts))), "settings": settings}

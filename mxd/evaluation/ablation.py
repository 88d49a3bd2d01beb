"""Remove experts, and measure what is lost: ablation curves, and expert shares of the cross-entropy."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mxd.base.forward import Batch, ZeroMLP, batch_for, capture_with_logits, next_token_logits
from mxd.base.masks import token_mask
from mxd.base.progress import progress_bar
from mxd.modeling_mxd import ExpertCoefficients, MxDModel, SparseLayer, spliced_mlps

from .expert_use import SPECIALISED_FREQUENCY, Statistics, evaluating_experts
from .metrics import ErrorSums, LogitSums, recovered_share

SumExperts = Callable[[SparseLayer, ExpertCoefficients], Tensor]
"""A function from a layer and its coefficients to a replacement of Cᵀa, (..., O)."""


class ChangedExperts(nn.Module):
    """A layer with Cᵀa replaced: (..., I) → (..., O), in the dtype of x. Interventions are not applied."""

    def __init__(self, layer: SparseLayer, sum_experts: SumExperts):
        super().__init__()
        self.layer, self.sum_experts, self.num_output_layers = layer, sum_experts, layer.num_output_layers

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with Cᵀa from `sum_experts`."""
        summed = self.sum_experts(self.layer, self.layer.encode(x))
        return self.layer.combine(summed, x.to(summed.dtype)).to(x.dtype)


class MeanExperts:
    """Compute Cᵀa with the experts active on at most `threshold` of the training tokens at their mean coefficient.

    With a threshold of 1 these are all experts.
    """

    def __init__(self, layer: SparseLayer, statistics: Statistics, threshold: float):
        table = layer.expert_table
        frequency, mean = statistics[0].to(table.device), statistics[1].to(table)
        self.kept = frequency > threshold
        self.mean_sum = (mean * ~self.kept) @ table

    def __call__(self, layer: SparseLayer, coefficients: ExpertCoefficients) -> Tensor:
        """Return (..., O) for coefficients (..., K)."""
        values, indices = coefficients
        return layer.sum_experts(ExpertCoefficients(values * self.kept[indices], indices)) + self.mean_sum


def remove_strongest(coefficients: ExpertCoefficients, count: int) -> ExpertCoefficients:
    """Return coefficients (..., K) with the `count` largest of each token set to 0."""
    values, indices = coefficients
    ranks = values.argsort(dim=-1, descending=True, stable=True)
    return ExpertCoefficients(values.scatter(-1, ranks[..., :count], 0.0), indices)


def removal_counts(num_active: int) -> list[int]:
    """Return 0, 1, 2, 4, … and K itself."""
    return [0, *(2**power for power in range(num_active.bit_length()) if 2**power < num_active), num_active]


def _sum_without_strongest(layer: SparseLayer, coefficients: ExpertCoefficients, count: int) -> Tensor:
    return layer.sum_experts(remove_strongest(coefficients, count))


class _Curve:
    """Sum the losses and errors of an ablation curve, streamed over batches."""

    def __init__(self, model: nn.Module, decomposition: MxDModel, statistics: Mapping[int, Statistics]):
        self.model, self.config = model, decomposition.config
        layers = {index: decomposition.layer(index) for index in self.config.layers}
        self.counts = removal_counts(max(layer.config.num_experts_per_tok for layer in layers.values()))
        self.variants: dict[int | str, dict[int, nn.Module]] = {}
        for count in self.counts:
            remove = partial(_sum_without_strongest, count=count)
            self.variants[count] = {index: ChangedExperts(layer, remove) for index, layer in layers.items()}
        for name, threshold in (("mean", 1.0), ("mean_specialised", SPECIALISED_FREQUENCY)):
            self.variants[name] = {
                index: ChangedExperts(layer, MeanExperts(layer, statistics[index], threshold))
                for index, layer in layers.items()
            }
        self.variants["zero_ablated"] = {
            index: ZeroMLP(layer.config.output_size, layer.num_output_layers) for index, layer in layers.items()
        }
        self.errors = {index: {count: ErrorSums() for count in self.counts} for index in layers}
        self.losses = {name: LogitSums() for name in ["untouched", *self.variants]}
        self.tokens = self.rows = 0

    def update(self, batch: Batch) -> None:
        """Add a batch: one forward pass of the untouched model, and one for every variant."""
        ids, attention_mask = batch
        mask = token_mask(ids, attention_mask)
        self.rows += len(ids)
        self.tokens += int(mask.sum())
        captured, logits = capture_with_logits(self.model, self.config, batch)
        self.losses["untouched"].update(logits, ids, mask)
        del logits
        for layer, (x, y) in captured.items():
            inputs, outputs = x[mask.to(x.device)], y[mask.to(y.device)]
            for count, errors in self.errors[layer].items():
                errors.update(self.variants[count][layer](inputs), outputs)
        del captured
        for name, modules in self.variants.items():
            with spliced_mlps(self.model, modules, cast=False, **self.config.where):
                self.losses[name].update(next_token_logits(self.model, batch), ids, mask)

    def result(self) -> dict[str, Any]:
        """Return the losses, errors and expert shares; see `ablation_curve`."""
        losses = {name: sums.cross_entropy for name, sums in self.losses.items()}
        # The share of the MLPs' worth that is lost with the choice of experts.
        shares = {
            share: 1 - recovered_share(losses[0], losses[mean], losses["zero_ablated"])
            for share, mean in (("expert_share", "mean"), ("specialised_share", "mean_specialised"))
        }
        return {
            "removed": self.counts,
            "cross_entropy": [losses[count] for count in self.counts],
            "rise": [losses[count] - losses["untouched"] for count in self.counts],
            "layers": {
                str(layer): {"nmse": [sums.nmse for sums in errors.values()]} for layer, errors in self.errors.items()
            },
            **{name: loss for name, loss in losses.items() if isinstance(name, str)},
            **shares,
        }


@torch.no_grad()
def ablation_curve(
    model: nn.Module, decomposition: MxDModel, batches: Iterable[Mapping[str, Tensor]], *, progress: bool = False
) -> dict[str, Any]:
    """Measure cross-entropy and NMSE as each token's strongest active experts are removed, in all layers at once.

        expert_share = (CE_mean − CE) / (CE_zero − CE)

    with CE of the spliced model, CE_mean with every layer's Cᵀa replaced by its mean over training tokens, and CE_zero
    with the MLPs zero-ablated. `specialised_share` replaces only the specialised experts. A share is over 1 if the mean
    is worse than no MLP, and NaN if it is not defined. A batch takes a forward pass for every count and four more.

    Args:
        model, decomposition, batches, progress: see `faithfulness`; interventions do not apply.

    Returns:
        {"order": "coefficient", "removed": counts, "cross_entropy": per count, "rise": over the untouched model, per
        count, "layers": {"15": {"nmse": per count}}, "untouched", "zero_ablated", "mean", "mean_specialised":
        cross-entropies, "expert_share", "specialised_share", "settings"}, with counts 0, 1, 2, 4, … and the largest K
        of the layers, and cross-entropies in nats per token.

    Raises:
        ValueError: no tokens, or an iterator of batches that is needed twice.
        SurgeryError: the model does not fit the decomposition; nothing is measured.
    """
    with evaluating_experts(model, decomposition, batches, progress) as (statistics, source):
        curve = _Curve(model, decomposition, statistics)
        for batch in progress_bar(batches, desc="ablate", show=progress):
            curve.update(batch_for(model, batch))
    if not curve.tokens:
        raise ValueError("no tokens to measure an ablation curve on: batches is empty, or contains only padding")
    settings = {
        "tokens": curve.tokens, "rows": curve.rows, "expert_statistics": source,
        "specialised_frequency": SPECIALISED_FREQUENCY,
    }  # fmt: skip
    return {"order": "coefficient", **curve.result(), "settings": settings}

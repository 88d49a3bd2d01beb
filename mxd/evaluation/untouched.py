"""Measure the losses of an untouched model on held-out text once, for all decompositions of it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mxd.base.forward import Batch, batch_for, check_causal, evaluating, next_token_logits, zero_ablated
from mxd.base.masks import token_mask
from mxd.base.progress import progress_bar
from mxd.modeling_mxd import MxDConfig

from .metrics import LogitSums


class UntouchedLosses:
    """Losses of an untouched model on some batches, measured once and shared by many decompositions of it.

    Args:
        model: the base model.
        batches: `input_ids` (batch, tokens) and, if there is padding, `attention_mask`.
        ablated: configuration of a decomposition: measure also the cross-entropy with its MLPs zero-ablated.
        progress: show a progress bar.

    Attributes:
        cross_entropy: nats per token.
        tokens: number of predicted tokens. Ids and losses take 16 bytes of memory per token.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Tensor]],
        ablated: MxDConfig | None = None,
        progress: bool = False,
    ):
        check_causal(model)
        self._ids: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._ablated = None if ablated is None else _ablation_of(ablated)
        sums, ablated_sums = LogitSums(), LogitSums()
        with evaluating(model):
            for batch in progress_bar(batches, desc="untouched", show=progress):
                rows = batch_for(model, batch)
                self._ids.append(rows[0].cpu())
                self._losses.append(_losses(model, rows, sums).cpu())
                if ablated is not None:
                    with zero_ablated(model, ablated):
                        _losses(model, rows, ablated_sums)
        self.cross_entropy, self.tokens = sums.cross_entropy, sums.targets
        self._zero_ablated = ablated_sums.cross_entropy

    def zero_ablated(self, config: MxDConfig) -> float | None:
        """Return the cross-entropy with the MLPs of a decomposition zero-ablated; None if it was not measured."""
        return self._zero_ablated if self._ablated == _ablation_of(config) else None

    def of_batch(self, index: int, ids: Tensor) -> Tensor:
        """Return the losses of batch `index`, (batch, tokens − 1) float64, 0 where a position does not count.

        Raises:
            ValueError: it has other token ids, padded on the right, than `ids` (batch, tokens).
        """
        if index >= len(self._ids) or not torch.equal(ids.cpu(), self._ids[index]):
            raise ValueError(f"batch {index} is not the one that the untouched model's losses were measured on")
        return self._losses[index]

    def check_complete(self, batches: int) -> None:
        """Raise `ValueError` if fewer batches were seen than the losses were measured on."""
        if batches != len(self._losses):
            raise ValueError(f"the untouched model's losses are of {len(self._losses)} batches, got {batches}")


def _losses(model: nn.Module, rows: Batch, sums: LogitSums) -> Tensor:
    """Add a batch to `sums`, and return its losses, (batch, tokens − 1)."""
    return sums.update(next_token_logits(model, rows), rows[0], token_mask(*rows))


def _ablation_of(config: MxDConfig) -> dict[str, Any]:
    return {"layers": sorted(config.written_layers()), **config.where}

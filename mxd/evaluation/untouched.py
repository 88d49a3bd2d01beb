"""Measure the losses of an untouched model on held-out text once, for all decompositions of it."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mxd.base.forward import batch_for, check_causal, evaluating, next_token_logits, zero_ablated
from mxd.base.masks import token_mask
from mxd.modeling_mxd import MxDConfig

from .metrics import LogitSums

# The per-token losses of one model in two dtypes or on two machines differ by less on average, of two models by more.
_SAME_MODEL = 0.05


class UntouchedLosses:
    """Losses of an untouched model on some batches, measured once and shared by many decompositions of it.

    Args:
        model: the base model.
        batches: `input_ids` (batch, tokens) and, if there is padding, `attention_mask`.
        ablated: configuration of a decomposition: measure, in a second pass, also the cross-entropy with the MLPs of
            its layers zero-ablated.
        progress: show a progress bar.

    Attributes:
        cross_entropy: nats per token.
        tokens: number of predicted tokens. The losses take 8 bytes of memory per token.
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
        self._losses: list[Tensor] = []
        self._digests: list[str] = []
        self._ablated = None if ablated is None else _ablation_of(ablated)
        sums, ablated_sums = LogitSums(), LogitSums()
        with evaluating(model):
            for batch in tqdm(batches, desc="untouched", unit="batch", disable=not progress, dynamic_ncols=True):
                self._losses.append(_losses(model, batch, sums).cpu())
                self._digests.append(_digest(batch))
                if ablated is not None:
                    with zero_ablated(model, ablated):
                        _losses(model, batch, ablated_sums)
        self.cross_entropy, self.tokens = sums.cross_entropy, sums.targets
        self._zero_ablated = ablated_sums.cross_entropy

    def zero_ablated(self, config: MxDConfig) -> float | None:
        """Return the cross-entropy with the MLPs of a decomposition zero-ablated; None if it was not measured."""
        return self._zero_ablated if self._ablated == _ablation_of(config) else None

    def of_batch(self, index: int, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the losses of batch `index`, (batch, tokens − 1) float64, 0 where a position does not count.

        Raises:
            ValueError: `batch` is a different batch.
        """
        if index >= len(self._losses) or _digest(batch) != self._digests[index]:
            raise ValueError(
                f"batch {index} is not the one that the untouched model's losses were measured on: "
                "give the same batches in the same order, or measure UntouchedLosses on these"
            )
        return self._losses[index]

    def check_complete(self, batches: int) -> None:
        """Raise `ValueError` if fewer batches were seen than the losses were measured on."""
        if batches != len(self._losses):
            raise ValueError(f"the untouched model's losses are of {len(self._losses)} batches, got {batches}")

    def check_model(self, index: int, losses: Tensor, counted: Tensor) -> None:
        """Raise `ValueError` if a model's losses of a batch differ by more than hardware and dtype explain.

        Args:
            index: index of the batch.
            losses, counted: losses of the model, and the mask of those that count, both (batch, tokens − 1).
        """
        counted = counted.cpu()
        if not counted.any():
            return
        difference = float((self._losses[index] - losses.cpu())[counted].abs().mean())
        if not difference <= _SAME_MODEL:
            raise ValueError(
                f"the untouched model's losses are of another model: those of batch {index} differ by "
                f"{difference:.3f} nats per token; measure UntouchedLosses with this one"
            )


def _losses(model: nn.Module, batch: Mapping[str, Tensor], sums: LogitSums) -> Tensor:
    """Add a batch to `sums`, and return its losses, (batch, tokens − 1)."""
    ids, attention_mask = rows = batch_for(model, batch)
    return sums.update(next_token_logits(model, rows), ids, token_mask(ids, attention_mask))


def _digest(batch: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in ("input_ids", "attention_mask"):
        if (tensor := batch.get(name)) is not None:
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.long().cpu().numpy().tobytes())
    return digest.hexdigest()


def _ablation_of(config: MxDConfig) -> dict[str, Any]:
    return {"layers": sorted(config.layers), **config.where}

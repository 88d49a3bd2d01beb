"""An untouched model's losses on held-out text, measured once for all decompositions of it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from mxd.base.forward import check_causal, evaluating, next_token_logits, right_padded, zero_ablated
from mxd.base.masks import next_token_mask, token_mask
from mxd.modeling_mxd import MxDConfig, MxDModel
from mxd.modeling_mxd.surgery import running_device

from .metrics import LogitSums
from .paired import PairedDifference

# Mean difference of one model's per-token losses in two dtypes or on two machines is less, that of two models more.
_SAME_MODEL = 0.05


class UntouchedLosses:
    """What is known of an untouched model on some batches, measured once and shared by many decompositions of it.

    Args:
        model: the base model, untouched.
        batches: `input_ids` (batch, tokens) and, where there is padding, `attention_mask`.
        ablated: a decomposition's configuration: the cross-entropy with its layers' MLPs zero-ablated is measured too,
            by a second pass.
        progress: show a progress bar.

    Attributes:
        cross_entropy: nats per token.
        tokens: predicted tokens. Memory is 8 bytes a token.
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
        sums, of_ablated = LogitSums(), LogitSums()
        with evaluating(model):
            for batch in tqdm(batches, desc="untouched", unit="batch", disable=not progress, dynamic_ncols=True):
                self._losses.append(_losses(model, batch, sums)[0].cpu())
                self._digests.append(_digest(batch))
                if ablated is not None:
                    with zero_ablated(model, ablated):
                        _losses(model, batch, of_ablated)
        self.cross_entropy, self.tokens, self._zero_ablated = sums.cross_entropy, sums.targets, of_ablated.cross_entropy

    def zero_ablated(self, config: MxDConfig) -> float | None:
        """Cross-entropy with the MLPs of a decomposition zero-ablated; None where that was not measured for them."""
        return self._zero_ablated if self._ablated == _ablation_of(config) else None

    def of_batch(self, index: int, batch: Mapping[str, Tensor]) -> Tensor:
        """Losses of batch `index`, (batch, tokens − 1) float64, 0 where a position does not count.

        Raises:
            ValueError: when `batch` is not that batch.
        """
        if index >= len(self._losses) or _digest(batch) != self._digests[index]:
            raise ValueError(
                f"batch {index} is not the one that the untouched model's losses are of: "
                "give the same batches in the same order, or measure UntouchedLosses on these"
            )
        return self._losses[index]

    def check_complete(self, batches: int) -> None:
        """Refuse fewer batches than the losses are of.

        Raises:
            ValueError: naming both numbers.
        """
        if batches != len(self._losses):
            raise ValueError(f"the untouched model's losses are of {len(self._losses)} batches, got {batches}")

    def check_model(self, index: int, losses: Tensor, counted: Tensor) -> None:
        """Refuse a model whose losses of a batch are others than those that are known.

        Args:
            index: of the batch.
            losses, counted: of the model, and which of them count, both (batch, tokens − 1).

        Raises:
            ValueError: when they differ by more than hardware and dtype explain.
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

    @torch.no_grad()
    def rise(
        self, model: nn.Module, decomposition: MxDModel, batches: Iterable[Mapping[str, Tensor]]
    ) -> dict[str, object]:
        """Rise of cross-entropy when `model` is spliced, by one forward pass a batch.

        Args:
            model: the same base model.
            decomposition: its layers.
            batches: the batches of the untouched model's losses, in their order.

        Returns:
            {"untouched", "spliced", "rise", "rise_interval", "tokens"}, in nats per token; see `PairedDifference`.

        Raises:
            ValueError: when the batches are others than those, or in another order.
        """
        sums, difference, seen = LogitSums(), PairedDifference(), 0
        with evaluating(model, decomposition), decomposition.spliced(model, cast=False):
            for seen, batch in enumerate(batches, start=1):
                untouched = self.of_batch(seen - 1, batch)
                losses, counted = _losses(model, batch, sums)
                difference.update(losses - untouched.to(losses.device), counted)
        self.check_complete(seen)
        return {
            "untouched": self.cross_entropy,
            "spliced": sums.cross_entropy,
            "rise": difference.mean,
            "rise_interval": difference.interval,
            "tokens": self.tokens,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a safetensors file, from which `load` reads it in another process."""
        known = {
            "digests": self._digests,
            "cross_entropy": self.cross_entropy,
            "tokens": self.tokens,
            "ablated": self._ablated,
            "zero_ablated": self._zero_ablated,
        }
        tensors = {str(index): losses for index, losses in enumerate(self._losses)}
        save_file(tensors, path, metadata={"untouched": json.dumps(known)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "UntouchedLosses":
        """What `save` wrote.

        Raises:
            ValueError: when the file is another's.
        """
        self = cls.__new__(cls)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "untouched" not in metadata:
                raise ValueError(f"{path} was not written by UntouchedLosses.save")
            known = json.loads(metadata["untouched"])
            self._digests = known["digests"]
            self._losses = [file.get_tensor(str(index)) for index in range(len(self._digests))]
        self.cross_entropy, self.tokens = known["cross_entropy"], known["tokens"]
        self._ablated, self._zero_ablated = known["ablated"], known["zero_ablated"]
        return self


def _losses(model: nn.Module, batch: Mapping[str, Tensor], sums: LogitSums) -> tuple[Tensor, Tensor]:
    """Losses of a batch, added to `sums`, and which of them count, both (batch, tokens − 1)."""
    ids, attention_mask = rows = right_padded(batch, running_device(model))
    mask = token_mask(ids, attention_mask)
    losses = sums.update(next_token_logits(model, rows), ids, mask)
    return losses, next_token_mask(mask).to(losses.device)


def _digest(batch: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in ("input_ids", "attention_mask"):
        if (tensor := batch.get(name)) is not None:
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.long().cpu().numpy().tobytes())
    return digest.hexdigest()


def _ablation_of(config: MxDConfig) -> dict[str, Any]:
    return {"layers": sorted(config.layers), **config.where}

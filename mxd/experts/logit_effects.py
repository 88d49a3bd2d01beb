"""Which tokens an expert promotes and suppresses: its direction through the final norm and the unembedding.

    effect = W_U (γ * v)       less its mean over the vocabulary, which changes no probability

v is the direction, γ the scale of the final norm; a norm that subtracts the mean subtracts v's. The division by the
residual stream's size is left out: it scales all effects of a token alike. Later layers are not applied, so this is the
direct path from the MLP to the logits. An expert that writes to several MLPs has a direction for each; all add to the
residual stream, so v is their sum.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxd.modeling_mxd.sites import SurgeryError, choose_stack, find_stacks
from mxd.modeling_mxd.surgery import running_device, tensors_in

from .streamed_tables import empty_neighbours, keep_nearest

PROMOTED = 10
"""Number of tokens that are named as promoted, and as suppressed."""
_CHUNK_ELEMENTS = 2**24


class Unembedding(NamedTuple):
    """The way from the residual stream to the logits."""

    scale: Tensor
    """γ, (O)"""
    subtracts_mean: bool
    """whether the norm subtracts the mean"""
    weight: Tensor
    """W_U, (vocabulary, O)"""

    def normed(self, directions: Tensor) -> Tensor:
        """Return γ * v for directions (n, O), or (n, J·O) of experts that write to J MLPs; (n, O) float32."""
        v = directions.to(self.weight.device, torch.float32).unflatten(-1, (-1, len(self.scale))).sum(-2)
        return (v - v.mean(-1, keepdim=True) if self.subtracts_mean else v) * self.scale

    def effects(self, directions: Tensor) -> Tensor:
        """Return the effects on the logits, (n, O) → (n, vocabulary) float32."""
        logits = self.normed(directions).to(self.weight.dtype) @ self.weight.T
        return (logits - logits.float().mean(-1, keepdim=True)).float()

    def largest(self, directions: Tensor, count: int = PROMOTED) -> dict[str, Tensor]:
        """Return the tokens with the largest and the smallest effects, (n, O) → ids and values, (n, count) each."""
        vocabulary = len(self.weight)
        parts: list[list[Tensor]] = []
        for part in directions.split(max(1, _CHUNK_ELEMENTS // vocabulary)):
            effects = self.effects(part)
            promoted, suppressed = (effects.topk(min(count, vocabulary), largest=way) for way in (True, False))
            parts.append([promoted.indices.int(), promoted.values, suppressed.indices.int(), suppressed.values])
        names = ("promoted_ids", "promoted_values", "suppressed_ids", "suppressed_values")
        return {name: torch.cat(found).cpu() for name, found in zip(names, zip(*parts, strict=True), strict=True)}

    def alignment(self, directions: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
        """Return how far directions promote some tokens, in standard deviations over the tokens of a text.

            (mean over targets of effect_t − E effect) / √Var effect

        To first order this is the rise of the targets' log-probability at equal KL divergence, for a model that
        predicts the tokens as often as the text has them.

        Args:
            directions: (n, O).
            targets: token ids of each, (n, M), -1 for none.
            counts: how often the text has each token, (vocabulary): expectation and variance are over it.

        Returns:
            (n) float32 on the CPU, 0 without targets.
        """
        counts = counts.to(self.weight.device)
        parts = [(self.weight[ids].float(), counts[ids, None].float()) for ids in counts.nonzero()[:, 0].split(4096)]
        total = counts.sum().clamp_min(1).float()
        mean = torch.stack([(rows * count).sum(0) for rows, count in parts]).sum(0) / total
        covariance = torch.stack([(rows - mean).T @ ((rows - mean) * count) for rows, count in parts]).sum(0) / total
        found = []
        for part, ids in zip(directions.split(512), targets.to(self.weight.device).split(512), strict=True):
            u, there = self.normed(part), ids >= 0
            rows = self.weight[ids.clamp_min(0)].float() * there[..., None]
            rise = ((rows.sum(1) / there.sum(1, keepdim=True).clamp_min(1) - mean) * u).sum(1) * there.any(1)
            found.append((rise / ((u @ covariance) * u).sum(1).clamp_min(1e-30).sqrt()).cpu())
        return torch.cat(found)


@torch.no_grad()
def find_unembedding(model: Any, example: Tensor, stack: str | None = None) -> Unembedding:
    """Find the final norm and the unembedding of a language model, whatever the model calls them.

    The final norm is the module whose input is the output of the last layer and whose output is the input of the
    unembedding, in a forward pass on the token ids `example` (1, tokens).

    Raises:
        ValueError: there is no unembedding, or no such norm.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    name = type(model).__name__
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"{name} has no unembedding whose weight can be read: effects on the logits are left out")
    try:
        stacks = find_stacks(model)
        layers = stacks[choose_stack(model, stack, stacks)]
    except (SurgeryError, KeyError) as error:
        raise ValueError(f"the layers of {name} are not found: effects on the logits are left out ({error})") from None
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    last: list[Tensor] = []
    final: list[Tensor] = []

    def keep_last(_: nn.Module, args: Any, output: Any) -> None:
        last[:] = [next(tensors_in(output))[:, -1].clone()]

    def keep_call(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if last and args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and args[0].ndim == 3:
            calls.append((module, args[0][:, -1].clone(), output[:, -1].clone()))

    inside = {module for _, layer in layers for module in layer.modules()}
    outside = [module for module in model.modules() if module not in inside and module is not head]
    handles = [module.register_forward_hook(keep_call) for module in outside]
    handles.append(layers[-1][1].register_forward_hook(keep_last))
    handles.append(head.register_forward_pre_hook(lambda _, args: final.append(args[0][:, -1].clone())))
    try:
        model(input_ids=example.to(running_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for module, x, y in calls:
        if _parallel(x, last) and _parallel(y, final) and (found := _scale(module, x)) is not None:
            return Unembedding(*found, weight.detach())
    raise ValueError(
        f"no norm of {name} lies between its last layer and its unembedding: effects on the logits are left out"
    )


def _parallel(one: Tensor, others: list[Tensor]) -> bool:
    """Return whether two tensors are equal up to a factor."""
    same = [other for other in others if other.shape == one.shape]
    return any(bool((F.cosine_similarity(one.float(), other.float(), dim=-1) > 0.9999).all()) for other in same)


def _scale(norm: nn.Module, x: Tensor) -> tuple[Tensor, bool] | None:
    """Return the scale γ of a norm, and whether it subtracts the mean; None if it is no norm.

    A vector of 1 and -1 has mean 0 and mean square 1: norm(±x) = ±γ * x + β, whatever the norm's parameters are called.
    """
    x = torch.ones_like(x)[:, None]
    x[..., 1::2] = -1
    plus, minus = norm(x), norm(-x)
    if plus.shape != x.shape or not torch.allclose(norm(4 * x), plus, rtol=1e-2, atol=1e-3):
        return None
    shifted = torch.allclose(norm(x + 4), plus, rtol=1e-1, atol=1e-2)
    return ((plus - minus) / 2 * x).float().flatten(), shifted


@torch.no_grad()
def nearest_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows with the largest cosine with each row, (N, O) → ids (N, 5) int32, -1 for none, and cosines."""
    unit = F.normalize(rows.float(), dim=-1)
    found = empty_neighbours(len(unit))
    size = max(1, _CHUNK_ELEMENTS // len(unit))
    for begin in range(0, len(unit), size):
        keep_nearest(found, unit[begin : begin + size] @ unit.T, begin)
    return found

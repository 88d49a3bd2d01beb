"""Hierarchical routing: a gate that scores only a few groups of experts.

The N experts lie in G groups of ⌈N/G⌉ neighbours (the last group may be smaller). A token opens the M groups that a
linear router scores highest, and only their experts compete for its K places:

    r = Rx + ρ                                     router, (G)
    a = TopK(ReLU(Gx + g) · [group of n is open])   open: the M largest of r

With G ≈ √N the gate costs I·(G + M·N/G) multiply-adds a token instead of I·N. Tokens are sorted by group, so that the
work is one dense product for every group that a token opened. With all groups open it is the exact gate.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import chunks, empty_coefficients, gate_gradients, largest, operator, save_gate


def default_num_expert_groups(num_experts: int) -> int:
    """Return a number of groups, about √N, of which none is empty."""
    return -(-num_experts // max(1, round(math.sqrt(num_experts))))


@operator("routed_gate", lambda x, weight, bias, opened, group_size, k: empty_coefficients(x, k), synchronises=True)
def _routed_gate(
    x: Tensor, weight: Tensor, bias: Tensor | None, opened: Tensor, group_size: int, k: int
) -> tuple[Tensor, Tensor]:
    tokens, experts = x.shape[0], weight.shape[0]
    values, indices = empty_coefficients(x, k)
    for part in chunks(tokens, opened.shape[1] * group_size):
        with torch.autocast(x.device.type, enabled=False):
            scores = _group_scores(x[part], weight, bias, opened[part], group_size)
        values[part], at = largest(scores, k)  # not as `largest_positive`, for which −∞ is above other negative numbers
        # Beyond the last group's end there are no experts: what is chosen there has the value 0.
        group = opened[part].gather(1, at // group_size)
        indices[part] = (group * group_size + at % group_size).clamp_max_(experts - 1)
    return values.relu_(), indices


def _group_scores(x: Tensor, weight: Tensor, bias: Tensor | None, opened: Tensor, size: int) -> Tensor:
    """Return the pre-activations of the experts in every token's open groups, (T, M·size)."""
    tokens, per_token = opened.shape
    groups = opened.reshape(-1)
    if tokens == 1:  # a step of generation: nothing is to be sorted or gathered
        return torch.cat([_scores_of_group(x, weight, bias, group, size) for group in groups.tolist()], 1)
    scores = x.new_empty(tokens * per_token, size)
    order = torch.argsort(groups, stable=True)
    found, counts = (part.tolist() for part in torch.unique_consecutive(groups[order], return_counts=True))
    for group, places, rows in zip(found, order.split(counts), (order // per_token).split(counts), strict=True):
        scores.index_copy_(0, places, _scores_of_group(x.index_select(0, rows), weight, bias, group, size))
    return scores.view(tokens, per_token * size)


def _scores_of_group(x: Tensor, weight: Tensor, bias: Tensor | None, group: int, size: int) -> Tensor:
    """Return the pre-activations of a group's experts (T, size), −∞ where the last group has no expert."""
    experts = slice(group * size, (group + 1) * size)
    scores = F.linear(x, weight[experts], None if bias is None else bias[experts])
    return F.pad(scores, (0, size - scores.shape[1]), value=-math.inf) if scores.shape[1] < size else scores


_routed_gate.register_autograd(gate_gradients, setup_context=save_gate)


def routed_gate(
    x: Tensor, weight: Tensor, bias: Tensor | None, opened: Tensor, group_size: int, k: int
) -> tuple[Tensor, Tensor]:
    """Return the coefficients of the K experts with the largest pre-activations in a token's open groups.

    The products are in the dtype of `x` under autocast too, since rounding them and computing the selected ones again
    would cost as much.

    Args:
        x, weight, bias, k: as for `functional.topk_gate`.
        opened: groups that each token opens, each at most once, (..., M) int64.
        group_size: experts in every group but the last.

    Returns:
        values (..., K) and indices (..., K) as `functional.topk_gate`, with its gradients; groups have none.
    """
    flat, groups = x.reshape(-1, x.shape[-1]), opened.reshape(-1, opened.shape[-1])
    values, indices = _routed_gate(flat, weight, bias, groups, group_size, k)
    return values.reshape(*x.shape[:-1], k), indices.reshape(*x.shape[:-1], k)

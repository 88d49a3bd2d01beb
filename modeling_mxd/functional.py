"""Compute the sparse products of a layer, with backward passes that touch only the selected experts.

    topk_gate    a = TopK(ReLU(Gx + g))                            one dense product, in chunks of tokens
    routed_gate  a = TopK(ReLU(Gx + g) · [group of n is open])     the products of the groups that a token opens
    expert_sum   Cᵀa                                               K rows of C a token

Hierarchical routing: the N experts lie in G groups of ⌈N/G⌉ neighbours (the last may be smaller). A token opens the M
groups for which a linear router r = Rx + ρ is largest. With G ≈ √N the gate costs I·(G + M·N/G) multiply-adds a token
instead of I·N; with all groups open it is the exact gate.

The input's gradient sums rows over a token's experts, the weights' gradients sum rows over an expert's tokens (pairs
sorted by expert, which makes them deterministic). Nothing of size (all tokens x experts) is ever alive. The products
are operators of torch's library, so that a compiled graph keeps them whole; each copy of this file registers its own.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores of the largest temporary, and its fewest tokens: with fewer rows the weights are read more often.
CHUNK_ELEMENTS = 2**23
CHUNK_TOKENS = 256
# Tokens from which a product in lower precision saves more than rounding the weights for it costs.
ROUNDED_TOKENS = 32
# Candidates beyond K that a product of lower precision selects: rounded to bfloat16, the K-th and the K+1-th largest of
# 21,490 scores change places on one token in five, but none so far with one that was 8 places behind.
EXTRA_CANDIDATES = 8
_BLOCK = 32
# Integers of a float's size, by its bytes.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_NAMESPACE = re.sub(r"\W", "_", __name__)


def operator(name: str, fake: Any, synchronises: bool = False) -> Any:
    """Make a function an operator of torch's library. `fake` returns empty tensors like the operator's."""
    known = hasattr(torch.Tag, "cudagraph_unsafe")  # not in older torch
    # A CUDA graph cannot wait for the device: compiled code is split there.
    tags: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if synchronises and known else {}

    def register(function: Any) -> Any:
        made = torch.library.custom_op(f"{_NAMESPACE}::{name}", function, mutates_args=(), **tags)
        made.register_fake(fake)
        return made

    return register


def chunks(tokens: int, row_elements: int) -> Iterator[slice]:
    """Yield parts of nearly equal size, of at most CHUNK_ELEMENTS elements, or CHUNK_TOKENS tokens if that is more."""
    count = -(-tokens // max(CHUNK_TOKENS, CHUNK_ELEMENTS // row_elements))
    size = max(1, -(-tokens // max(1, count)))
    for start in range(0, tokens, size):
        yield slice(start, start + size)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + b, without autograd."""
    # For large float32 products on CPUs that are not Intel's, oneDNN is 1.4 times as fast as `F.linear`, and as exact.
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if onednn and x.device.type == "cpu" and x.dtype == torch.float32 and weight.numel() >= 2**20 and len(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of every row, in no particular order: (T, N) → values and columns (T, k)."""
    # On a CPU in two steps, since `topk` looks at every element one by one: the k largest are in the k blocks with the
    # largest maxima (with ties, some k largest are).
    tokens, columns = scores.shape
    blocks = columns // _BLOCK
    if scores.device.type != "cpu" or blocks < 8 * k or tokens < 8:
        return scores.topk(k, dim=-1, sorted=False)
    maxima = scores[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK)).amax(2)
    chosen = maxima.topk(k, dim=-1, sorted=False).indices * _BLOCK  # (T, k), first columns of blocks
    firsts = chosen + torch.arange(0, tokens * columns, columns, device=scores.device)[:, None]
    candidates = scores.view(-1).unfold(0, _BLOCK, 1)[firsts].flatten(1)
    rest = scores[:, blocks * _BLOCK :]  # fewer columns than a block
    values, at = torch.cat([candidates, rest], 1).topk(k, dim=-1, sorted=False)
    in_blocks = chosen.gather(1, (at // _BLOCK).clamp_max(k - 1)) + at % _BLOCK
    return values, torch.where(at < k * _BLOCK, in_blocks, at + (blocks - k) * _BLOCK)


def largest_positive(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of every row of ReLU(scores), as `largest`."""
    # On a CPU their bits are compared as integers, which is faster there and orders positive numbers alike, above all
    # others but NaN, which the sum reveals.
    if scores.device.type != "cpu" or scores.sum().isnan():
        values, columns = largest(scores, k)
    else:
        values, columns = largest(scores.view(_BITS[scores.itemsize]), k)
    return values.view(scores.dtype).relu_(), columns


def candidates(scores: Tensor, k: int) -> Tensor:
    """Return the columns of the k largest of every row, (T, k), in no particular order."""
    values, columns = largest_positive(scores, k)
    if scores.device.type == "cpu" and (short := values.amin(-1) == 0).any():
        columns[short] = largest(scores[short], k)[1]  # bits order negative numbers the other way
    return columns


@operator("expert_sum", lambda values, indices, table: values.new_empty(values.shape[0], table.shape[1]))
def _expert_sum(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """Return out[t] = Σ_k values[t, k] · table[indices[t, k]]; (T, K), (T, K), (N, D) → (T, D)."""
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=values)


@operator("row_products", lambda indices, rows, table: rows.new_empty(indices.shape))
def row_products(indices: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """Return out[t, k] = rows[t] · table[indices[t, k]]; (T, K), (T, D), (N, D) → (T, K)."""
    tokens, k = indices.shape
    bags = torch.arange(tokens, device=indices.device)
    # The gradient that embedding_bag has for its weights: no copy of the K rows.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.contiguous(), table, indices.reshape(-1), bags * k, bags.repeat_interleave(k), 0, -1
    )
    return products.view(tokens, k)


@operator("scatter_rows", lambda indices, weights, rows, n: rows.new_empty(n, rows.shape[1]))
def scatter_rows(indices: Tensor, weights: Tensor, rows: Tensor, num_experts: int) -> Tensor:
    """Return out[n] = Σ_{t,k: indices[t,k] = n} weights[t, k] · rows[t]; (T, K), (T, K), (T, D) → (N, D)."""
    order, counts = _by_expert(indices, num_experts)
    weights = weights.reshape(-1)[order].to(rows.dtype)
    offsets = counts.cumsum(0) - counts
    return F.embedding_bag(order // indices.shape[1], rows, offsets, mode="sum", per_sample_weights=weights)


@operator("scatter_numbers", lambda indices, numbers, num_experts: numbers.new_empty(num_experts))
def scatter_numbers(indices: Tensor, numbers: Tensor, num_experts: int) -> Tensor:
    """Return out[n] = Σ_{t,k: indices[t,k] = n} numbers[t, k], added in float64; (T, K), (T, K) → (N)."""
    order, counts = _by_expert(indices, num_experts)
    sums = torch.segment_reduce(numbers.reshape(-1)[order].double(), "sum", lengths=counts, unsafe=True)
    return sums.to(numbers.dtype)


def _by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the (token, k) pairs in the order of their experts, earlier tokens first, and each expert's count."""
    flat = indices.reshape(-1)  # `bincount` would wait for a GPU
    return torch.argsort(flat, stable=True), flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))


def empty_coefficients(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return uninitialised values and indices (T, K) for x (T, I)."""
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


@operator("topk_gate", lambda x, weight, bias, k, product_dtype: empty_coefficients(x, k))
def _topk_gate(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, product_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    tokens, experts = x.shape[0], weight.shape[0]
    values, indices = empty_coefficients(x, k)
    exact = product_dtype.itemsize >= x.dtype.itemsize or tokens < ROUNDED_TOKENS
    dtype = x.dtype if exact else product_dtype
    inputs, matrix = x.to(dtype), weight.to(dtype)
    offset = None if bias is None else bias.to(dtype)
    for part in chunks(tokens, experts):
        scores = product(inputs[part], matrix, offset)
        if exact:
            values[part], indices[part] = largest_positive(scores, k)
        else:
            chosen = candidates(scores, min(k + EXTRA_CANDIDATES, experts))
            again = row_products(chosen, x[part], weight)  # in the precision of both
            again = again if bias is None else again + bias[chosen]
            values[part], at = again.relu_().topk(k, dim=-1, sorted=False)
            indices[part] = chosen.gather(1, at)
    return values, indices


def save_gate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save what `gate_gradients` needs, for an operator whose first arguments are x, weight and bias."""
    x, weight, bias = inputs[:3]
    ctx.save_for_backward(x, weight, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.has_bias, ctx.num_inputs = bias is not None, len(inputs)


def gate_gradients(ctx: Any, grad_values: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight and bias through the selected positive scores, None for other arguments."""
    x, weight, values, indices = ctx.saved_tensors
    grad = grad_values.where(values > 0, 0.0)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _expert_sum(grad, indices, weight)
    if ctx.needs_input_grad[1]:
        grad_weight = scatter_rows(indices, grad, x, weight.shape[0])
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = scatter_numbers(indices, grad, weight.shape[0])
    return grad_x, grad_weight, grad_bias, *[None] * (ctx.num_inputs - 3)


_topk_gate.register_autograd(gate_gradients, setup_context=save_gate)


def _sum_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, table = ctx.saved_tensors
    grad_output = grad_output.contiguous()
    grad_values = row_products(indices, grad_output, table) if ctx.needs_input_grad[0] else None
    grad_table = None
    if ctx.needs_input_grad[2]:
        grad_table = scatter_rows(indices, values, grad_output, table.shape[0])
    return grad_values, None, grad_table


_expert_sum.register_autograd(_sum_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a large product of x: x's own, or autocast's."""
    kind = x.device.type
    if kind == "meta":  # unknown to autocast
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def topk_gate(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Return the coefficients of the K experts with the largest pre-activations (paper eq. 2: TopK(ReLU(Gx + g))).

    Under autocast only the large product runs in the lower precision, for 32 tokens and more: it selects K + 8
    candidates, whose pre-activations are computed again in the dtype of the weights.

    Args:
        x, weight, bias: inputs (..., I), and the gate's G (N, I) and g (N) or None, of one dtype.
        k: experts kept per token.

    Returns:
        values (..., K) >= 0 and indices (..., K) int64, in no particular order; values are 0 where fewer than K
        pre-activations are positive. Only `values` has a gradient, through the positive entries, and no second one.
    """
    values, indices = _topk_gate(x.reshape(-1, x.shape[-1]), weight, bias, k, product_dtype(x))
    return values.reshape(*x.shape[:-1], k), indices.reshape(*x.shape[:-1], k)


def expert_sum(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """Return Cᵀa from sparse coefficients: Σ_k values[..., k] · table[indices[..., k]].

    Args:
        values: coefficients, (..., K), of the dtype of `table`.
        indices: experts, (..., K) int64; an expert that occurs twice counts twice.
        table: one row per expert, (N, O). Returns (..., O).
    """
    k = values.shape[-1]
    out = _expert_sum(values.reshape(-1, k), indices.reshape(-1, k), table)
    return out.reshape(*values.shape[:-1], table.shape[1])


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
    """Return as `topk_gate` the coefficients of the K experts with the largest pre-activations in open groups.

    The products are in the dtype of `x` under autocast too: rounding them would cost as much as it saves.

    Args:
        x, weight, bias, k: as for `topk_gate`.
        opened: groups that each token opens, each at most once, (..., M) int64; they have no gradient.
        group_size: experts in every group but the last.
    """
    flat, groups = x.reshape(-1, x.shape[-1]), opened.reshape(-1, opened.shape[-1])
    values, indices = _routed_gate(flat, weight, bias, groups, group_size, k)
    return values.reshape(*x.shape[:-1], k), indices.reshape(*x.shape[:-1], k)

"""The two sparse products of a layer, with backward passes that touch only the selected experts.

    topk_gate   a = TopK(ReLU(G x + g))   forward: one dense product, in chunks of tokens
    expert_sum  Cᵀ a                      forward and backward: K rows of C a token

Both backward passes are sums of rows, written as `embedding_bag`: over a token's experts for the input's
gradient, over an expert's tokens (pairs sorted by expert) for the weights'. Sorting makes them deterministic,
which resuming bit for bit needs. Nothing of size (all tokens x experts) is ever alive.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of the largest temporary: 64 MiB in float32. Larger is no faster on CPU, and costs memory.
CHUNK_ELEMENTS = 2**24


def weighted_rows(indices: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """out[t] = Σ_k weights[t, k] · table[indices[t, k]]; (T, K), (T, K), (N, D) → (T, D)."""
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights)


def scatter_rows(indices: Tensor, weights: Tensor, rows: Tensor, num_experts: int) -> Tensor:
    """out[n] = Σ_{t,k: indices[t,k] = n} weights[t, k] · rows[t]; (T, K), (T, K), (T, D) → (N, D)."""
    flat = indices.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    offsets = counts.cumsum(0) - counts
    tokens = order // indices.shape[1]
    return F.embedding_bag(
        tokens, rows, offsets, mode="sum", per_sample_weights=weights.reshape(-1)[order].to(rows.dtype)
    )


class _TopKGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        tokens = x.shape[0]
        values = x.new_empty(tokens, k)
        indices = torch.empty(tokens, k, dtype=torch.int64, device=x.device)
        # Under autocast the product alone runs in the lower precision; weights are cast once, not once a chunk.
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        inputs, matrix = x.to(dtype), weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            values[part], indices[part] = F.linear(inputs[part], matrix, offset).topk(k, dim=-1, sorted=False)
        values.relu_()
        ctx.save_for_backward(x, weight, values, indices)
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values, indices = ctx.saved_tensors
        grad = grad_values * (values > 0)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = weighted_rows(indices, grad, weight)
        if ctx.needs_input_grad[1]:
            grad_weight = scatter_rows(indices, grad, x, weight.shape[0])
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = torch.bincount(
                indices.reshape(-1), weights=grad.reshape(-1).double(), minlength=weight.shape[0]
            ).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None


class _ExpertSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, table)
        return weighted_rows(indices, values, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, table = ctx.saved_tensors
        grad_values = grad_table = None
        grad_output = grad_output.contiguous()
        if ctx.needs_input_grad[0]:
            grad_values = torch.empty_like(values)
            chunk = max(1, CHUNK_ELEMENTS // (indices.shape[1] * table.shape[1]))
            for start in range(0, values.shape[0], chunk):
                part = slice(start, start + chunk)
                grad_values[part] = torch.bmm(table[indices[part]], grad_output[part].unsqueeze(-1)).squeeze(-1)
        if ctx.needs_input_grad[2]:
            grad_table = scatter_rows(indices, values, grad_output, table.shape[0])
        return grad_values, None, grad_table


def topk_gate(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Coefficients of the K experts with the largest pre-activations (paper eq. 2: TopK(ReLU(Gx + g))).

    Args:
        x: inputs, (..., I), of the dtype of `weight`.
        weight: gate weight G, (N, I).
        bias: gate bias g, (N), or None.
        k: experts kept per token.

    Returns:
        values (..., K) >= 0 and indices (..., K) int64, in no particular order; where fewer than K
        pre-activations are positive the rest of the values are 0. Only `values` carries a gradient, through
        the selected positive entries, and only once (no second derivatives).
    """
    values, indices = _TopKGate.apply(x.reshape(-1, x.shape[-1]), weight, bias, k)
    return values.reshape(*x.shape[:-1], k), indices.reshape(*x.shape[:-1], k)


def expert_sum(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """Cᵀa from sparse coefficients: Σ_k values[..., k] · table[indices[..., k]].

    Args:
        values: coefficients, (..., K), of the dtype of `table`.
        indices: experts, (..., K) int64; an expert named twice counts twice.
        table: one row per expert, (N, O).

    Returns:
        (..., O).
    """
    k = values.shape[-1]
    out = _ExpertSum.apply(values.reshape(-1, k), indices.reshape(-1, k), table)
    return out.reshape(*values.shape[:-1], table.shape[1])

"""Sums over the processes of a training, through which gradients pass."""

from typing import Any

import torch
from torch import Tensor

from mxd.base.processes import are_apart, joined


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of the tensors of all processes that share the rows, each of which has to call this."""
    return values if joined() == 1 or are_apart() else _Sum.apply(values)


class _Sum(torch.autograd.Function):
    """Every process's loss depends on every summand: its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_processes(gradient)

"""Sparse expert coefficients, and changes to them: the supported way to steer, ablate and read experts."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ExpertCoefficients(NamedTuple):
    """Coefficients a of the active experts, sparse: a[indices[..., k]] = values[..., k], the rest 0.

    An expert that is named twice at one position counts with the sum of its values.
    """

    values: Tensor
    """(..., K) floating point; >= 0 unless somebody intervened"""
    indices: Tensor
    """(..., K) int64, in 0 .. num_experts - 1"""

    def to_dense(self, num_experts: int) -> Tensor:
        """Return them as (..., num_experts), which is large: the layer never builds it."""
        dense = self.values.new_zeros(*self.values.shape[:-1], num_experts)
        return dense.scatter_add_(-1, self.indices, self.values)


class ExpertIntervention:
    """Change expert coefficients at every position, in the order ablate, scale, set, add.

    Args:
        add: expert → constant added, whether or not the expert is active (paper's steering: add 100).
        set: expert → value that replaces its own, whether or not the expert is active.
        scale: expert → factor on its coefficient where it is active.
        ablate: the expert or experts whose coefficient becomes 0.
    """

    def __init__(
        self,
        add: Mapping[int, float] | None = None,
        set: Mapping[int, float] | None = None,  # noqa: A002 - the word users look for
        scale: Mapping[int, float] | None = None,
        ablate: int | Iterable[int] = (),
    ):
        self.add = {_whole(expert): constant for expert, constant in (add or {}).items()}
        self.set = {_whole(expert): value for expert, value in (set or {}).items()}
        self.scale = {_whole(expert): factor for expert, factor in (scale or {}).items()}
        self.ablate = tuple(map(_whole, [ablate] if isinstance(_whole(ablate), int) else ablate))  # type: ignore[arg-type]
        if not (self.add or self.set or self.scale or self.ablate):
            raise ValueError("an intervention needs at least one of add, set, scale, ablate")

    def check(self, num_experts: int) -> None:
        """Raise a ValueError that names the first expert which a layer of `num_experts` does not have."""
        for name in ("add", "set", "scale", "ablate"):
            for expert in getattr(self, name):
                if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < num_experts:
                    raise ValueError(f"{name} names expert {expert!r}; this layer has experts 0 to {num_experts - 1}")

    def __call__(self, layer: object, x: Tensor, coefficients: ExpertCoefficients) -> ExpertCoefficients:
        """Return changed copies of coefficients of any leading shape; `layer` and `x` are unused."""
        values, indices = coefficients
        for expert, factor in [(e, 0.0) for e in self.ablate] + list(self.scale.items()):
            values = torch.where(indices == expert, values * factor, values)
        for expert in self.set:
            values = values.masked_fill(indices == expert, 0)
        for expert, constant in list(self.set.items()) + list(self.add.items()):
            values = torch.cat([values, torch.full_like(values[..., :1], constant)], dim=-1)
            indices = torch.cat([indices, torch.full_like(indices[..., :1], expert)], dim=-1)
        return ExpertCoefficients(values, indices)


def _whole(expert: Any) -> Any:
    """Convert an index of NumPy's or a tensor's to an int; return anything else as it is, for `check` to name."""
    try:
        return expert if isinstance(expert, bool) else operator.index(expert)
    except (TypeError, ValueError):
        return expert

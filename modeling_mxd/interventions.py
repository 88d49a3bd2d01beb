"""Sparse expert coefficients, changes to them, and the description of a steering."""

import json
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configuration_mxd import read_json, shorten
from .loading import ResolvedRepo, file_if_any

_LARGEST = 1e30
WAYS = ("direction", "add", "set", "scale", "ablate")


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


@dataclass
class SteeringChange:
    """A change by one expert of one layer.

    Attributes:
        layer, expert: the expert.
        strength: s, in units of the expert's own maximum; for scale a factor. Ignored by ablate.
        by: "direction", or by coefficient: "add", "set", "scale", "ablate".
        positions: "all"; "prompt", or "generated" (tokens that `generate` added; outside of it, tokens that are read
            after a cache); [from, to) among a row's tokens without padding, `to` may be None; or a mask (rows, tokens)
            of the prompt, as a tensor or nested lists.
        rows: rows of the batch; None for all. Beams and returned sequences belong to the row that they come from.
        when: {"layer", "expert", "above"}: only at positions where another expert, of this layer or an earlier one, has
            a coefficient greater than `above` (0 if it is left out) times its maximum.
    """

    layer: int
    expert: int
    strength: float = 1.0
    by: str = "direction"
    positions: Any = "all"
    rows: list[int] | None = None
    when: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.positions, Tensor):
            self.positions = self.positions.bool().tolist()
        for name, valid, expected in (
            ("layer", _is_index(self.layer), "a whole number from 0"),
            ("expert", _is_index(self.expert), "a whole number from 0"),
            ("strength", _is_number(self.strength), "a finite number"),
            ("by", self.by in WAYS, f"one of {', '.join(WAYS)}"),
            (
                "positions",
                _are_positions(self.positions),
                "all, prompt, generated, [from, to] with from < to, or a mask (rows, tokens)",
            ),
            ("rows", self.rows is None or _is_list(self.rows, _is_index), "a list of row numbers"),
            ("when", self.when is None or _is_condition(self.when), "{layer, expert, above}"),
        ):
            if not valid:
                raise ValueError(
                    f"{name} of a steering's change must be {expected}, got {shorten(getattr(self, name))}"
                )


def _is_index(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST  # also of an integer that is no float


def _is_list(value: Any, valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(valid, value))


def _is_mask(value: Any) -> bool:
    rows = _is_list(value, lambda row: _is_list(row, lambda chosen: chosen in (0, 1)))
    return rows and len({len(row) for row in value}) == 1


def _are_positions(value: Any) -> bool:
    if isinstance(value, list | tuple) and len(value) == 2 and _is_index(value[0]):
        return value[1] is None or (_is_index(value[1]) and value[1] > value[0])
    return value in ("all", "prompt", "generated") if isinstance(value, str) else _is_mask(value)


def _is_condition(value: Any) -> bool:
    known = isinstance(value, Mapping) and {"layer", "expert"} <= value.keys() <= {"layer", "expert", "above"}
    return known and _is_index(value["layer"]) and _is_index(value["expert"]) and _is_number(value.get("above", 0))


class Steering(list[SteeringChange]):
    """Changes, made in this order: each a `SteeringChange`, or a mapping with its fields."""

    def __init__(self, changes: Iterable[SteeringChange | Mapping[str, Any]] = ()):
        names = [one.name for one in fields(SteeringChange)]
        for change in changes:
            if not isinstance(change, SteeringChange):
                if not isinstance(change, Mapping) or not {"layer", "expert"} <= change.keys() <= set(names):
                    raise ValueError(f"a steering's change has layer and expert, and may have {', '.join(names[2:])}; "
                                     f"got {shorten(change)}")  # fmt: skip
                change = SteeringChange(**change)  # noqa: PLW2901
            self.append(change)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file."""
        content = {"format_version": 1, "changes": [asdict(change) for change in self]}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "Steering":
        """Read what `to_json` wrote, or raise a ValueError."""
        values = read_json(path)
        version: Any = values.get("format_version")
        changes: Any = values.get("changes")
        known = values.keys() == {"format_version", "changes"} and isinstance(changes, list)
        if not known or (type(version), version) != (int, 1):
            raise ValueError(f"{path} is no steering that this version reads: it has format_version 1, and changes")
        try:
            return cls(changes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def of(cls, given: Any, repo: ResolvedRepo | None = None) -> "Steering":
        """Return a steering, given as one, as one or several changes, or as a JSON file here or in a repo."""
        if isinstance(given, str | os.PathLike):
            path = os.fspath(given)
            if repo is not None and not Path(path).is_file():
                path = file_if_any(repo.name, path, repo.access) or path
            if not Path(path).is_file():
                raise ValueError(
                    f"there is no steering {path} here" + ("" if repo is None else f", nor in {repo.name}")
                )
            return cls.from_json(path)
        given = [given] if isinstance(given, SteeringChange | Mapping) else given
        if not isinstance(given, Iterable):
            raise ValueError(f"a steering is changes, or a path of a JSON file; got {shorten(given)}")
        return cls(given)

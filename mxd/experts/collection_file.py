"""Write and read experts.safetensors, the file of a collection, which may be a stranger's.

Tensors are `layers.{L}.{field}` for the fields of `ExpertCollection`, and `rows.ids`, `rows.offsets`, `rows.documents`;
the header holds `format_version`, and `settings` and `domains` as JSON.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mxd.modeling_mxd.configuration_mxd import shorten

from .collection import HISTOGRAM_EDGES, Collection, ExpertCollection
from .contexts import AROUND
from .logit_effects import PROMOTED
from .streamed_tables import NEIGHBOURS

EXPERTS_NAME = "experts.safetensors"
FORMAT_VERSION = "1"
MAX_BYTES = 2**30
"""Size of the largest file that is read."""
_MAX_HEADER = 2**20

_LETTERS = {
    "N": None, "M": None, "R": None, "D": None, "B": len(HISTOGRAM_EDGES) + 1, "P": PROMOTED, "5": NEIGHBOURS,
    "W": 2 * AROUND + 1,
}  # fmt: skip
_SHAPES = {
    "tokens": "", "frequency": "N", "maximum": "N", "histogram": "NB", "top_values": "NM", "top_rows": "NM",
    "top_positions": "NM", "sample_values": "NR", "sample_rows": "NR", "sample_positions": "NR",
    "domain_counts": "ND", "domain_tokens": "D", "co_firing_ids": "N5", "co_firing_values": "N5",
    "promoted_ids": "NP", "top_windows": "NMW", "sample_windows": "NRW", "alignment": "N", "promoted_values": "NP",
    "suppressed_ids": "NP", "suppressed_values": "NP", "similar_direction_ids": "N5",
    "similar_direction_values": "N5", "similar_modulation_ids": "N5", "similar_modulation_values": "N5",
}  # fmt: skip
"""Axes of each field: N experts, M contexts, R sampled tokens, D domains, B bins, P promoted tokens, 5 neighbours, W
tokens of a window."""


def save_collection(collection: Collection, path: str | Path) -> None:
    """Write a collection to a file, atomically."""
    tensors = {"rows.ids": collection.ids, "rows.offsets": collection.offsets, "rows.documents": collection.documents}
    for layer, one in collection.layers.items():
        for each in fields(one):
            value = getattr(one, each.name)
            if value is not None:
                tensors[f"layers.{layer}.{each.name}"] = torch.as_tensor(value).contiguous()
    texts = {"settings": json.dumps(collection.settings), "domains": json.dumps(collection.domains)}
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, unfinished, metadata={"format_version": FORMAT_VERSION, **texts})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_collection(path: str | Path) -> Collection:
    """Read a collection from a file, and check that every number in it names something that is there.

    Raises:
        ValueError: it is no such file, or of another format; the message names what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: `mxd experts` writes {EXPERTS_NAME} into a decomposition's folder")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has over {MAX_BYTES:,} bytes")
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format_version") != FORMAT_VERSION:
                version = shorten(header.get("format_version"))
                raise ValueError(f"its format_version is {version}, this version reads {FORMAT_VERSION!r}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
        return _checked(tensors, _json(header, "settings", dict), _json(header, "domains", list))
    except (ValueError, SafetensorError, RecursionError) as error:
        raise ValueError(f"{path.name} is refused: {error}: `mxd experts --overwrite` makes it anew") from None


def _json(header: Mapping[str, str], name: str, kind: type) -> Any:
    text = header.get(name, "")
    value = json.loads(text) if len(text) <= _MAX_HEADER else None
    if not isinstance(value, kind):
        raise ValueError(f"{name} in its header is not as `mxd experts` writes it")
    return value


def _checked(tensors: dict[str, Tensor], settings: dict[str, Any], domains: list[Any]) -> Collection:
    if not all(isinstance(name, str) for name in domains) or len(set(domains)) < len(domains):
        raise ValueError("domains must be different names")
    rows = [_typed(tensors, f"rows.{name}", 1, False) for name in ("ids", "offsets", "documents")]
    ids, offsets, documents = rows
    inside = ((offsets >= 0) & (offsets <= len(ids))).all()
    lengths = offsets.diff()
    if (
        len(offsets) != len(documents) + 1
        or not inside
        or offsets[0] != 0
        or offsets[-1] != len(ids)
        or (lengths < 0).any()
    ):
        raise ValueError("rows.offsets do not divide rows.ids")
    _in_range("rows.ids", ids, 0, 2**31)
    layers: dict[int, ExpertCollection] = {}
    for key in tensors:
        _, _, layer = key.removesuffix(".tokens").rpartition("layers.")
        if key == f"layers.{layer}.tokens" and layer.isdecimal() and len(layer) <= 6:
            layers[int(layer)] = _layer(tensors, f"layers.{layer}.", len(domains), lengths)
    if not layers:
        raise ValueError("it has no layers")
    return Collection(dict(sorted(layers.items())), ids, offsets, documents, domains, settings)


def _layer(tensors: dict[str, Tensor], prefix: str, domains: int, lengths: Tensor) -> ExpertCollection:
    sizes, found = {**_LETTERS, "D": domains}, {}
    for each in fields(ExpertCollection):
        name, axes = f"{prefix}{each.name}", _SHAPES[each.name]
        if name not in tensors and each.default is None:
            continue
        floating = each.name.endswith("values") or each.name in ("frequency", "maximum", "alignment")
        tensor = _typed(tensors, name, len(axes), floating)
        for axis, size in zip(axes, tensor.shape, strict=True):
            expected = sizes[axis] = size if sizes[axis] is None else sizes[axis]
            if axis == "P" and 0 < size < PROMOTED:  # a small vocabulary
                expected = size
            if size != expected:
                raise ValueError(f"{name} has {size} entries where {expected} were expected")
            if size == 0 and axis != "D":
                raise ValueError(f"{name} is empty")
        found[each.name] = tensor
    _check_pairs(found, prefix)
    _check_places(found, prefix, lengths)
    for name, tensor in found.items():
        if name.endswith("_ids"):
            promoted = name in ("promoted_ids", "suppressed_ids")
            _in_range(f"{prefix}{name}", tensor, 0 if promoted else -1, 2**31 if promoted else sizes["N"])
    every: dict[str, Any] = {**found, "tokens": int(found["tokens"])}
    return ExpertCollection(**every)


def _check_pairs(found: Mapping[str, Tensor], prefix: str) -> None:
    """Raise a ValueError if ids have no values, or a count is below 0."""
    for name, tensor in found.items():
        kind, _, part = name.rpartition("_")
        other = found.get(f"{kind}_{'values' if part == 'ids' else 'ids'}") if part in ("ids", "values") else tensor
        if kind not in ("top", "sample") and (other is None or other.shape != tensor.shape):
            raise ValueError(f"{prefix}{name} needs ids and values of one shape")
        if part in ("tokens", "counts", "frequency", "maximum", "histogram") and (tensor < 0).any():
            raise ValueError(f"{prefix}{name} has numbers below 0")


def _check_places(found: Mapping[str, Tensor], prefix: str, lengths: Tensor) -> None:
    """Raise a ValueError if a context is not in the rows."""
    for kind in ("top", "sample"):
        row, position = found[f"{kind}_rows"].long(), found[f"{kind}_positions"].long()
        _in_range(f"{prefix}{kind}_rows", row, -1, len(lengths))
        if len(lengths):
            _in_range(f"{prefix}{kind}_positions", position, -1, lengths[row.clamp_min(0)])
        if ((found[f"{kind}_values"] > 0) & ((row < 0) | (position < 0))).any():
            raise ValueError(f"{prefix}{kind}_values has a value without a row")


def _typed(tensors: dict[str, Tensor], name: str, axes: int, floating: bool) -> Tensor:
    """Return a tensor with so many axes and values that are finite, or raise a ValueError."""
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"it has no {name}")
    integers = (torch.uint8,) if name.endswith("windows") else (torch.int32, torch.int64)
    if tensor.ndim != axes or not (
        tensor.dtype in (torch.float32, torch.float64) if floating else tensor.dtype in integers
    ):
        raise ValueError(f"{name} is {tensor.dtype} with {tensor.ndim} axes, not as `mxd experts` writes it")
    if floating and not tensor.isfinite().all():
        raise ValueError(f"{name} has values that are not finite")
    return tensor


def _in_range(name: str, numbers: Tensor, least: int, below: Any) -> None:
    numbers = numbers.long()
    if ((numbers < least) | (numbers >= below)).any():
        raise ValueError(f"{name} names something that is not there")

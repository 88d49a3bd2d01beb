"""Weights on disk, which a stranger may have written: which files hold the layers that are wanted, and whether they
are what the config says. Their headers tell, before anything is allocated."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_files

from .configuration_mxd import MAX_FILE_BYTES, MxDConfig, shorten
from .downloads import file_if_any, with_retries
from .layers import make_layer

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_LAYER = re.compile(r"layers\.(\d+)\.")


class WeightFiles(NamedTuple):
    """Safetensors files of a folder or repo."""

    paths: list[Path]
    """of the files that hold the wanted weights; none if there are no safetensors"""

    whole: bool
    """whether these are all the files that there are"""


def weight_files(name: Any, layers: list[int] | None, access: dict[str, Any]) -> WeightFiles:
    """The files that hold the weights of some layers (None: all files), downloaded if need be.

    Raises:
        ValueError: the index is no index of this repo's files.
        OSError: files are not there.
    """
    if cached := _in_cache(name, SAFE_WEIGHTS_NAME, access):  # without the Hub, which may be out of reach
        return WeightFiles([Path(cached)], True)
    index = file_if_any(name, SAFE_WEIGHTS_INDEX_NAME, access)
    if index is None:
        file = file_if_any(name, SAFE_WEIGHTS_NAME, access)
        return WeightFiles([] if file is None else [Path(file)], True)
    weight_map = read_index(Path(index), name)
    wanted = {file for key, file in weight_map.items() if layers is None or layer_of(key) in (None, *layers)}
    paths = with_retries(partial(cached_files, name, sorted(wanted), **access), name)
    return WeightFiles(list(map(Path, paths or [])), wanted == set(weight_map.values()))


def _in_cache(name: Any, file: str, access: dict[str, Any]) -> str | None:
    """Path of a file that needs no download, if there is one."""
    if access.get("force_download"):
        return None
    return file_if_any(name, file, {**access, "local_files_only": True})


def check_one_set(name: Any) -> None:
    """Refuse a folder with weights in one file and in shards, of which one set is of an earlier saving.

    Raises:
        ValueError: naming both.
    """
    both = [path for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME) if (path := Path(name) / file).is_file()]
    if len(both) > 1:
        raise ValueError(
            f"{name} holds {both[0].name} and {both[1].name}; one of them is left from an earlier saving: delete it"
        )


def read_index(path: Path, name: Any) -> dict[str, str]:
    """Weight → file, from the index of a sharded repo.

    Raises:
        ValueError: it is none, or names a file elsewhere.
    """
    what = f"{SAFE_WEIGHTS_INDEX_NAME} of {name}"
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{what} is larger than {MAX_FILE_BYTES:,} bytes: it is not read")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{what} is no JSON that can be read") from None
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or any(not isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{what} has no weight_map of names to files")
    if not isinstance(values.get("metadata"), dict):  # which transformers takes for granted
        raise ValueError(f"{what} has no metadata")
    for file in weight_map.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{what} names a file outside of the repo: {file[:200]!r}")
    return weight_map


def check_headers(paths: Iterable[Path], config: MxDConfig) -> dict[str, str]:
    """Refuse files whose weights are not those of the config's layers; the weights of other layers are no mistake.

    Returns:
        Weight → name of its file, of all that there are.

    Raises:
        ValueError: naming the first weight that is missing, surplus, twice there, of another shape or no
            floating-point number, or the file that is cut short or broken.
    """
    wanted = expected_shapes(config)
    found: dict[str, str] = {}
    for path in paths:
        for key, entry in read_header(path).items():
            if key in found:
                raise ValueError(f"the weights do not fit the config: {key} is in {found[key]} and in {path.name}")
            found[key] = path.name
            if key not in wanted:
                if layer_of(key) in (None, *config.layers):
                    raise ValueError(f"the weights do not fit the config: {shorten(key)} is not the decomposition's")
            elif entry.get("shape") != wanted[key]:
                raise ValueError(
                    f"the weights do not fit the config: {key} has the shape {shorten(entry.get('shape'))}, by the "
                    f"config it must be {wanted[key]}"
                )
            elif entry.get("dtype") not in DTYPES:
                raise ValueError(
                    f"{key} in {path.name} has the dtype {shorten(entry.get('dtype'))}, a floating-point one is expected"
                )
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise ValueError(f"the weights do not fit the config: {missing[0]} is missing")
    return found


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Weight → dtype, shape and place, from the header of a safetensors file.

    Raises:
        ValueError: it is cut short or broken, or has a weight twice.
    """
    try:
        with safe_open(path, framework="pt"):  # checks places and sizes
            pass
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=_once)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no complete safetensors file: {error}") from None
    header.pop("__metadata__", None)
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise ValueError(f"a safetensors file has {shorten(name)} twice in its header")
    return dict(pairs)


def expected_shapes(config: MxDConfig) -> dict[str, list[int]]:
    """Weight → shape, of all layers of a config; nothing is allocated."""
    shapes: dict[Any, dict[str, list[int]]] = {}
    expected: dict[str, list[int]] = {}
    for layer in config.layers:
        sizes = config.layer(layer)
        if sizes not in shapes:
            with torch.device("meta"):
                shapes[sizes] = {key: list(value.shape) for key, value in make_layer(sizes).state_dict().items()}
        expected |= {f"layers.{layer}.{key}": shape for key, shape in shapes[sizes].items()}
    return expected


def load_layers(paths: Iterable[Path], layers: list[int]) -> dict[str, Tensor]:
    """The weights of some layers."""
    tensors = {}
    for path in paths:
        with safe_open(path, framework="pt") as shard:
            tensors.update({key: shard.get_tensor(key) for key in shard.keys() if layer_of(key) in layers})  # noqa: SIM118
    return tensors


def layer_of(key: str) -> int | None:
    """The layer that a weight belongs to; None for what is no layer's."""
    match = _LAYER.match(key)
    return int(match[1]) if match else None

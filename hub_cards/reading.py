"""Reading what strangers wrote: files of a decomposition, checked before anything large is allocated. Whatever is wrong
is a ValueError that names the file."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mxd.modeling_mxd import MxDConfig
from mxd.modeling_mxd.downloads import first_line
from mxd.modeling_mxd.weight_files import check_headers, read_index

MAX_JSON_BYTES = 10_000_000


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: over 10 MB, too deep, or no JSON object.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_JSON_BYTES:,} bytes: it is not read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON that can be read: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(value).__name__}")
    return value


def read_config(path: Path, where: str | Path) -> MxDConfig:
    """The config of a decomposition.

    Args:
        path: of config.json.
        where: folder or repo that it came from, for messages.

    Raises:
        ValueError: it is not a decomposition's, it is nonsense, or it has no layers.
    """
    if not path.is_file():
        raise ValueError(f"{where} holds no decomposition: there is no config.json in it")
    values = read_json(path)
    if values.get("model_type") != MxDConfig.model_type:
        raise ValueError(f"{where} holds a model, but no decomposition (its config.json says so)")
    try:
        config = MxDConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"config.json of {where} is refused: {error}") from None
    if not config.layers:
        raise ValueError(f"config.json of {where} names no layers: there is nothing to describe")
    return config


def check_weights(folder: Path, config: MxDConfig) -> None:
    """Refuse weights that are not those of the config, by the headers of the safetensors files, then by their values.

    Raises:
        ValueError: naming the weight or file.
    """
    config.check_memory(torch.float8_e4m3fn)
    paths = sorted(folder.glob("model*.safetensors"))
    found = check_headers(paths, config)
    index = folder / "model.safetensors.index.json"
    if index.is_file() and read_index(index, folder) != found:
        raise ValueError(f"{index.name} in {folder} is not of the files that are there")
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, no mapping
                if not file.get_tensor(key).float().isfinite().all():
                    raise ValueError(f"{key} in {path.name} has values that are not finite: did the training diverge?")


def texts(value: Any) -> list[str]:
    """The texts in a list, or a text alone."""
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []

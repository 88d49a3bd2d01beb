"""Read the files of a decomposition without trusting them: no code is run, and nothing large is allocated.

Everything that is wrong with a file is a ValueError that names the file. `search`, `show`, `push` and the commands that
load a decomposition read through these functions; `from_pretrained` with `trust_remote_code=True` does not.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mxd.modeling_mxd import MxDConfig
from mxd.modeling_mxd.configuration_mxd import FORMAT_VERSION, MAX_FILE_BYTES, read_json, shorten
from mxd.modeling_mxd.loading import check_headers, first_line, read_index

__all__ = ["MAX_FILE_BYTES", "check_weights", "read_config", "read_json"]

MAX_TEXT = 4096
# Fields of config.json: ours, and those that transformers writes. transformers would set an attribute for any other
# field, which may replace a method, rename a field, or ask for a label for each of 10^12 classes.
_FIELDS = frozenset(inspect.signature(MxDConfig.__init__).parameters) - {"self", "kwargs"} | {
    "architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version",
    "use_cache",  # the Trainer sets it
}  # fmt: skip


def read_config(path: Path, where: str | Path) -> MxDConfig:
    """Read config.json of a decomposition, from the folder or repo that `where` names in messages.

    Raises:
        ValueError: the file is missing, belongs to another kind of model or to another format, has values that no
            decomposition has, or names no layers.
    """
    if not path.is_file():
        raise ValueError(f"{where} holds no decomposition: there is no config.json in it")
    values = read_json(path)
    if values.get("model_type") != MxDConfig.model_type:
        raise ValueError(f"{where} holds a model, but no decomposition (its config.json says so)")
    try:
        # A newer format may have further fields: then say that it is newer, not that its fields are unknown.
        if values.get("format_version") == FORMAT_VERSION:
            _check_values(values)
        config = MxDConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"config.json of {where} is refused: {first_line(error)}") from None
    if not config.layers:
        raise ValueError(f"config.json of {where} names no layers: there is nothing to describe")
    return config


def _check_values(values: Mapping[str, Any]) -> None:
    """Refuse fields that no decomposition has, text that could steer a terminal, and dtypes that are none."""
    for name, value in values.items():
        if name not in _FIELDS:
            raise ValueError(f"{shorten(name)} is not a field of a decomposition's config")
        if isinstance(value, str) and not (len(value) <= MAX_TEXT and value.isprintable()):
            raise ValueError(f"{name} must be a text of at most {MAX_TEXT} printable characters, got {shorten(value)}")
        if name in ("dtype", "torch_dtype") and value is not None:
            dtype = getattr(torch, value, None) if isinstance(value, str) else None
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name} must name a dtype of torch, got {shorten(value)}")


def check_weights(folder: Path, config: MxDConfig) -> None:
    """Refuse weights that do not fit the config, by the headers of the safetensors files and then by their values.

    Raises:
        ValueError: naming the weight or the file.
    """
    config.check_memory(torch.float8_e4m3fn)  # the narrowest dtype that weights are stored in
    paths = sorted(folder.glob("model*.safetensors"))
    found = check_headers(paths, config.layers, config.weight_shapes)
    index = folder / "model.safetensors.index.json"
    if index.is_file() and read_index(index, folder) != found:
        raise ValueError(f"{index.name} in {folder} does not belong to the files that are there")
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no mapping
                if not file.get_tensor(key).float().isfinite().all():
                    raise ValueError(f"{key} in {path.name} has values that are not finite: did the training diverge?")

"""Directions of experts, and steering along them.

An expert's direction v_n (O) is the vector that it adds to the MLP's output per unit of its coefficient. A transcoder's
is its decoder row. An MxD's expert multiplies the dense part instead, so its direction is the row of a linear decoder
that predicts the MLP's output from the coefficients: y ≈ Vᵀa + Sᵀx + v.
"""

from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

from .configuration_mxd import MxDConfig
from .loading import ResolvedRepo, check_headers, file_if_any, layer_of

DIRECTIONS_NAME = "directions.safetensors"
MISSING = f"has no {DIRECTIONS_NAME}, with its experts' directions: `mxd experts FOLDER` makes it"


class ExpertDirections(NamedTuple):
    """Directions of the experts of one layer, and the unit of their strength."""

    direction: Tensor
    """(N, O); row v_n is added to the MLP's output per unit of coefficient"""
    maximum: Tensor
    """(N) float32, the largest coefficient on the tokens it was measured on"""


class DirectionFile(NamedTuple):
    """Content of `directions.safetensors`: `layers.8.maximum`, of an MxD also `layers.8.direction`."""

    tensors: dict[str, Tensor]
    source: str
    """the directions' origin, such as "auxiliary transcoder\""""


def read_directions(repo: ResolvedRepo, config: MxDConfig) -> DirectionFile:
    """Read the directions beside a decomposition's weights; raise a ValueError if they are missing or do not fit."""
    path = file_if_any(repo.name, DIRECTIONS_NAME, repo.access)
    if path is None:
        raise ValueError(f"{repo.name} {MISSING}")
    try:
        check_headers([Path(path)], config.layers, direction_shapes(config))
    except ValueError as error:
        raise ValueError(f"{DIRECTIONS_NAME} of {repo.name} is refused: {error}") from None
    with safe_open(path, framework="pt") as file:
        ours = [key for key in file.keys() if layer_of(key) in config.layers]  # noqa: SIM118
        tensors, metadata = {key: file.get_tensor(key).float() for key in ours}, file.metadata() or {}
    if wrong := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{DIRECTIONS_NAME} of {repo.name} is refused: {wrong[0]} has values that are not finite")
    return DirectionFile(tensors, metadata.get("source", ""))


def direction_shapes(config: MxDConfig) -> dict[str, list[int]]:
    """Return name → shape of the tensors in `directions.safetensors`."""
    layers = {index: config.layer(index) for index in config.layers}
    shapes = {f"layers.{index}.maximum": [layer.num_experts] for index, layer in layers.items()}
    of_mxd = {index: layer for index, layer in layers.items() if layer.method == "mxd"}
    return shapes | {f"layers.{i}.direction": [layer.num_experts, layer.output_size] for i, layer in of_mxd.items()}

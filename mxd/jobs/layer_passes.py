"""Train the layers of a decomposition in groups, each with its own pass of the base model over the same rows.

Each finished group is kept as a decomposition in a folder of the output folder, `layers-4-7`, until all are joined.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mxd.evaluation import save_evaluation
from mxd.evaluation.faithfulness import EVALUATION_NAME
from mxd.modeling_mxd import MxDConfig, MxDModel
from mxd.trainers import last_complete_checkpoint

from .decompositions import load_decomposition, made_how
from .options import CHECKPOINTS
from .run_folder import finish
from .training import LOG_NAME


class LayerPass(NamedTuple):
    """Layers that learn from one pass of the base model, and the folder of their training."""

    config: MxDConfig
    folder: Path
    is_part: bool = True
    """Whether there are several passes, which are joined in the end."""

    @property
    def finished(self) -> bool:
        """Whether the layers are trained; the record of their training is written last."""
        return self.is_part and (self.folder / EVALUATION_NAME).is_file()

    @property
    def checkpoint(self) -> str | None:
        """The newest complete checkpoint of their training."""
        return last_complete_checkpoint(self.folder) if any(self.folder.glob(CHECKPOINTS)) else None

    def keep(self, made: dict[str, Any]) -> None:
        """Mark trained layers as finished, and remove their checkpoints."""
        save_evaluation({"settings": {"training": made}}, self.folder)
        finish(self.folder)

    def load(self) -> tuple[MxDModel, dict[str, Any]]:
        """Return trained layers, and how they were trained."""
        name = str(self.folder)
        return load_decomposition(name), made_how(name)["training"]


def groups_of(layers: list[int], size: int) -> list[list[int]]:
    """Return layers in groups of a size, in order; the last may have fewer."""
    order = sorted(layers)
    return [order[start : start + size] for start in range(0, len(order), size)]


def split_layers(config: MxDConfig, folder: Path, layers_per_pass: int | None) -> list[LayerPass]:
    """Return the passes that train a decomposition: one in the output folder itself, or several in order of layers."""
    if layers_per_pass is None or layers_per_pass >= len(config.layers):
        return [LayerPass(config, folder, is_part=False)]
    passes = []
    for layers in groups_of(config.layers, layers_per_pass):
        part = MxDConfig.from_layer_configs(
            {layer: config.layer(layer) for layer in layers},
            base_model_name_or_path=config.base_model_name_or_path,
            base_model_revision=config.base_model_revision,
            **config.where,
        )
        name = "-".join(map(str, ["layers", layers[0], *layers[1:][-1:]]))  # a list of all might be too long
        passes.append(LayerPass(part, folder / name))
    return passes


def join_layers(passes: list[LayerPass], config: MxDConfig) -> MxDModel:
    """Return one decomposition of the trained layers of all passes."""
    with torch.device("meta"):
        whole = MxDModel(config)
    maxima: dict[int, Tensor] = {}
    directions: dict[int, Tensor] = {}
    for one in passes:
        part, _ = one.load()
        for layer in part.config.layers:
            whole.layers[str(layer)] = part.layer(layer)
            direction, maxima[layer] = part.directions(layer)
            if config.layer(layer).method == "mxd":  # those of a transcoder are its decoder
                directions[layer] = direction
    whole.set_directions(maxima, directions, part.direction_file.source)
    return whole


def join_logs(passes: list[LayerPass]) -> list[dict[str, Any]]:
    """Return one log of all passes, with a loss of each layer and their mean at every logged step."""
    steps: dict[int, dict[str, Any]] = {}
    for one in passes:
        layers = one.config.layers
        for entry in json.loads((one.folder / LOG_NAME).read_text()):
            if "loss" in entry:
                own = {f"layer_{layers[0]}/loss": entry["loss"]} if len(layers) == 1 else {}
                steps.setdefault(entry["step"], {}).update(entry | own)
    for entry in steps.values():
        losses = [value for name, value in entry.items() if name.endswith("/loss")]
        entry["loss"] = sum(losses) / len(losses)
    return [steps[step] for step in sorted(steps)]


def join_runs(runs: list[dict[str, Any]], layers: list[int]) -> dict[str, Any]:
    """Return how all layers were trained, given the records of the passes; `seconds` is the sum if all have it."""
    seconds = [run["seconds"] for run in runs if "seconds" in run]
    known = {"seconds": round(sum(seconds), 1)} if len(seconds) == len(runs) else {}
    return {**{name: value for name, value in runs[-1].items() if name != "seconds"}, **known, "layers": layers}

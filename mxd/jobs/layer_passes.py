"""Train the layers of a decomposition in groups, each with its own pass of the base model over the same rows.

Each finished group is kept as a decomposition in a folder of the output folder, `layers-4-7`, until all are joined.
"""

import json
from collections.abc import Callable
from functools import cache
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

    def load(self) -> MxDModel:
        """Return trained layers."""
        return load_decomposition(str(self.folder))


def groups_of(layers: list[int], size: int) -> list[list[int]]:
    """Return layers in groups of a size, in order; the last may have fewer."""
    order = sorted(layers)
    return [order[start : start + size] for start in range(0, len(order), size)]


def level_groups(layers: list[int], count: int, work: Callable[[list[int]], float]) -> list[list[int]]:
    """Return layers in so many groups of neighbours, or one a group if there are fewer, of which the one with the most
    work has as little as possible."""
    order = sorted(layers)

    @cache
    def best(start: int, groups: int) -> tuple[float, list[list[int]]]:
        if groups == 1:
            return work(order[start:]), [order[start:]]
        found = []
        for end in range(start + 1, len(order) - groups + 2):
            most, rest = best(end, groups - 1)
            found.append((max(work(order[start:end]), most), [order[start:end], *rest]))
        return min(found)

    return best(0, min(count, len(order)))[1]


def split_layers(config: MxDConfig, folder: Path, groups: list[list[int]]) -> list[LayerPass]:
    """Return the passes that train groups of layers: one in the output folder itself, or several in their order."""
    if len(groups) == 1:
        return [LayerPass(config, folder, is_part=False)]
    passes = []
    for layers in groups:
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
        part = one.load()
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


def join_runs(passes: list[LayerPass], layers: list[int], processes: int = 1) -> dict[str, Any]:
    """Return how all layers were trained, from the records of the passes, which so many processes took in turn.

    `seconds` is that of the process that took longest, if all passes have it.
    """
    runs = [made_how(str(one.folder))["training"] for one in passes]
    seconds = [run.pop("seconds", None) for run in runs]
    known = {} if None in seconds else {"seconds": max(sum(seconds[rank::processes]) for rank in range(processes))}
    return {**runs[-1], **{name: round(value, 1) for name, value in known.items()}, "layers": layers}

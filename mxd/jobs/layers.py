"""What `mxd layers` shows: where a model keeps its MLPs, and why a layer has none. No weights are read."""

from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from mxd.base.base_model import BaseModelError, model_source
from mxd.base.pretrained_weights import mlp_hidden_act, mlp_layout, mlp_widths
from mxd.cli.tables import cell
from mxd.hub_cards.card import layer_ranges
from mxd.modeling_mxd import MLPSite, MxDConfig, find_all_mlps
from mxd.modeling_mxd.loading import first_line


@dataclass
class LayerGroup:
    """Layers of a stack whose MLPs are alike.

    Attributes:
        site: of the first of them.
        layers: their indices.
    """

    site: MLPSite
    layers: list[int] = field(default_factory=list)

    @property
    def key(self) -> tuple[object, ...]:
        """What alike means."""
        site = self.site
        if not site.slots:
            return site.stack, site.name, site.reason
        slots = tuple(slot.removeprefix(site.path) for slot in site.slots)
        return site.stack, site.name, site.kind, slots, str(mlp_layout(site)), mlp_widths(site), mlp_hidden_act(site)


def load_skeleton(name: str, revision: str | None = None) -> PreTrainedModel:
    """The model without its weights, on the meta device: only its config is downloaded.

    Args:
        name: Hub id, folder, or the name of the embedded default.
        revision: branch, tag or commit on the Hub.

    Raises:
        BaseModelError: there is no such config, or transformers has no code for it.
    """
    source = model_source(name)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        if isinstance(config, MxDConfig):
            raise ValueError(f"it is a decomposition, of {config.base_model_name_or_path!r}: name that")
        auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
        if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            auto = AutoModelForSeq2SeqLM
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"cannot build the model {name!r}: {first_line(error)}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def layer_groups(model: PreTrainedModel) -> list[LayerGroup]:
    """The MLPs of all stacks of a model, those that are alike together, in the order in which they first occur."""
    groups: dict[tuple[object, ...], LayerGroup] = {}
    for site in find_all_mlps(model):
        group = LayerGroup(site)
        groups.setdefault(group.key, group).layers.append(site.layer)
    return list(groups.values())


def print_layers(model: PreTrainedModel) -> None:
    """A table for every stack, and below it the reasons."""
    groups, console = layer_groups(model), Console()
    for stack in dict.fromkeys(group.site.stack for group in groups):
        table = Table(title=cell(f"{stack} of {type(model).__name__}"))
        for column in ("layers", "site", "kind", "widths", "activation", "weights"):
            table.add_column(column, overflow="fold")
        notes = []
        rows = [(group.site, describe_layers(group.layers)) for group in groups if group.site.stack == stack]
        for site, indices in rows:
            found = mlp_widths(site) if site.slots else None
            widths = " → ".join(f"{width:,}" for width in found) if found else "–"
            own = (mlp_hidden_act(site) or "–", mlp_layout(site) or "–") if site.slots else ("–", "–")
            table.add_row(*map(cell, (indices, site.name, site.kind, widths, *own)))
            notes += [f"{indices}, {site.name}: {site.reason}"] if site.reason else []
        console.print(table)
        for note in notes:
            console.print(cell(note))


def describe_layers(layers: list[int]) -> str:
    """`[0, 1, 2, 5]` → `"0-2, 5"`."""
    return layer_ranges(layers, ", ")

"""`mxd layers`: where a model keeps its MLPs, and why a layer has none. No weights are read."""

from contextlib import suppress
from typing import NamedTuple

import torch
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
from mxd.base.layer_names import layer_ranges
from mxd.base.pretrained_weights import mlp_hidden_act, mlp_layout, mlp_widths
from mxd.base.weight_layout import SHARED_EXPERT_NAMES
from mxd.modeling_mxd import MLPSite, MxDConfig, SurgeryError, find_mlps, find_stacks
from mxd.modeling_mxd.architectures import layer_chains
from mxd.modeling_mxd.loading import first_line

_MIXTURE_PARTS = ("experts", *SHARED_EXPERT_NAMES)


class LayerGroup(NamedTuple):
    """Layers of a stack whose MLPs are alike; None where an MLP has no weights, or no rule finds them."""

    site: MLPSite
    """Site of the first of them."""
    layers: list[int]
    widths: tuple[int, int, int] | None = None
    hidden_act: str | None = None
    layout: str | None = None

    @property
    def ranges(self) -> str:
        """The indices as text: `[0, 1, 2, 5]` → `"0-2, 5"`."""
        return layer_ranges(self.layers, ", ")


def load_skeleton(name: str, revision: str | None = None) -> PreTrainedModel:
    """Build the model of a Hub id or folder without weights, on the meta device. Only its config is downloaded.

    Raises:
        BaseModelError: there is no such config, or transformers has no code for it.
    """
    source = model_source(name)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        if isinstance(config, MxDConfig):
            raise ValueError(f"it is a decomposition of {config.base_model_name_or_path!r}: name that")
        auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
        if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            auto = AutoModelForSeq2SeqLM
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"cannot build the model {name!r}: {first_line(error)}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def find_all_mlps(model: PreTrainedModel) -> list[MLPSite]:
    """Return every site that `--site` can name, of all stacks, and one without slots for a layer that has no MLP.

    The parts of a mixture of experts are sites of their own: `mlp.experts` and its shared experts.
    """
    found: list[MLPSite] = []
    for stack, layers in find_stacks(model).items():
        found += find_mlps(model, stack).values()
        others = dict.fromkeys(",".join(chain) for _, layer in layers for chain in layer_chains(layer)[1:])
        for name in (*others, *(f"mlp.{part}" for part in _MIXTURE_PARTS)):
            with suppress(SurgeryError):  # no layer of this stack has it
                found += [site for site in find_mlps(model, stack, name).values() if site.slots]
    return found


def layer_groups(model: PreTrainedModel) -> list[LayerGroup]:
    """Return every site that `find_all_mlps` finds; those that are alike together, in order of occurrence."""
    groups: dict[tuple[object, ...], LayerGroup] = {}
    for site in find_all_mlps(model):
        weights = (mlp_widths(site), mlp_hidden_act(site), str(mlp_layout(site) or "–")) if site.slots else ()
        slots = tuple(slot.removeprefix(site.path) for slot in site.slots)
        alike = (site.stack, site.name, site.kind, site.reason, slots, weights)
        groups.setdefault(alike, LayerGroup(site, [], *weights)).layers.append(site.layer)
    return list(groups.values())

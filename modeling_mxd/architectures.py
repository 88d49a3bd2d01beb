"""What differs between models: where they keep their MLPs, what they name activations, where they run.

A few rules fit nearly all of transformers; the exceptions are listed with their reasons. An MLP is a chain of one or
more modules of a transformer layer, its *slots*: `("mlp",)` if it is a module of its own, `("fc1", "activation_fn",
"fc2")` if the layer (or a block with a residual or a norm inside) calls the linears itself. The MLP's input is that of
the first slot and its output that of the last. Paths are dotted, from the transformer layer.
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

# Tried in this order. A path that leads to a single linear does not match: ALBERT calls its encoder `ffn`.
RULES: tuple[tuple[str, ...], ...] = (
    *((name,) for name in ("mlp", "feed_forward", "ffn", "block_sparse_moe", "mlp_block", "ff", "shared_mlp")),
    *((f"layer.{last}.{name}",) for last in (2, 1) for name in ("DenseReluDense", "mlp")),
    ("fc1", "activation_fn", "fc2"),
    ("ffn", "activation", "ffn_output"),
    ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),
    ("intermediate.dense", "intermediate.activation", "output.dense"),
    ("intermediate", "output.dense"),
    ("lin1", "act", "lin2"),
    ("pwconv1", "act", "pwconv2"),
)


@dataclass(frozen=True)
class LayerException:
    """Describe a class of transformer layers that the rules do not fit.

    Attributes:
        reason: why the rules do not fit.
        slots: the chains of its MLPs, the main one first.
        repeated: the model runs the same layer several times in one forward pass.
    """

    reason: str
    slots: tuple[tuple[str, ...], ...]
    repeated: bool = False


def _layer(reason: str, *chains: str, repeated: bool = False) -> LayerException:
    return LayerException(reason, tuple(tuple(chain.split(",")) for chain in chains), repeated)


_ADDS_RESIDUAL = "the block takes the residual and adds it itself"
_NORM_INSIDE = "the block holds residual or layer norm"
_HALF_STEPS = "an MLP of half a step before the attention and one at the end, which is the main one"
_TIED = "the block's weights are tied over layers; each layer's is replaced on its own"
_SIDE_BY_SIDE = "experts and a shared MLP side by side, their outputs added"
_GEMMA4 = "a dense MLP and, in some models, experts beside it that read another input"
_ROUTER_STATE = "the block hands its router's state to the next layer's router: the router stays"
_SEVERAL = "several MLPs one after another, each with a norm; the last is the main one"
_BERT = "{0}intermediate.dense,{0}intermediate.intermediate_act_fn,{0}output.dense"

LAYER_EXCEPTIONS: dict[str, LayerException] = {
    "BloomBlock": _layer(_ADDS_RESIDUAL, "mlp.dense_h_to_4h,mlp.gelu_impl,mlp.dense_4h_to_h"),
    "MptBlock": _layer(_ADDS_RESIDUAL, "ffn.up_proj,ffn.act,ffn.down_proj"),
    "XLNetLayer": _layer(_NORM_INSIDE, "ff.layer_1,ff.activation_function,ff.layer_2"),
    "ReformerLayer": _layer(
        _NORM_INSIDE, "feed_forward.dense.dense,feed_forward.dense.act_fn,feed_forward.output.dense"
    ),
    "CpmAntTransformerBlock": _layer(_NORM_INSIDE, "ffn.ffn"),
    "FunnelLayer": _layer(_NORM_INSIDE, "ffn.linear_1,ffn.activation_function,ffn.linear_2"),
    "GptOssDecoderLayer": _layer("the block also returns its router's scores: the router stays", "mlp.experts"),
    "ZayaDecoderLayer": _layer(_ROUTER_STATE, "mlp.experts"),
    "ZambaHybridLayer": _layer(_TIED, "shared_transf.feed_forward"),
    "Zamba2HybridLayer": _layer(_TIED, "shared_transformer.feed_forward"),
    "LongcatFlashDecoderLayer": _layer("a mixture of experts and two dense MLPs a layer", "mlp", "mlps.0", "mlps.1"),
    "GraniteMoeHybridDecoderLayer": _layer(_SIDE_BY_SIDE, "block_sparse_moe", "shared_mlp"),
    "GraniteMoeSharedDecoderLayer": _layer(_SIDE_BY_SIDE, "block_sparse_moe", "shared_mlp"),
    "Gemma4TextDecoderLayer": _layer(_GEMMA4, "mlp", "experts"),
    "MobileBertLayer": _layer(_SEVERAL, *(_BERT.format(inner) for inner in ("", *(f"ffn.{i}." for i in range(8))))),
    "Wav2Vec2ConformerEncoderLayer": _layer(_HALF_STEPS, "ffn2", "ffn1"),
    "Wav2Vec2BertEncoderLayer": _layer(_HALF_STEPS, "ffn2", "ffn1"),
    "ParakeetEncoderBlock": _layer(_HALF_STEPS, "feed_forward2", "feed_forward1"),
    "ConvNextV2Layer": _layer("a norm over all positions: not a function of one position", "pwconv1,act,grn,pwconv2"),
    "SqueezeBertModule": _layer("its MLP is made of convolutions over channels in another dimension"),
    "IBertLayer": _layer("its integer linears pass a scaling factor along with every tensor"),
    "AlbertLayer": _layer(
        "one block is run for all layers: one decomposition for all", "ffn,activation,ffn_output", repeated=True
    ),
}

# Second value that a block returns besides its output, by the class of the block.
NOTHING, SECOND_INPUT = "None", "its second input"
SECOND_OUTPUT: dict[str, str] = {
    "Llama4TextMoe": NOTHING,  # router logits, which the layer throws away
    "RwkvFeedForward": SECOND_INPUT,  # the state, which only the block itself reads and writes
}

# Classes of modules that are not an MLP, whatever their name.
_NO_MLP = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Identity, nn.LayerNorm, nn.ModuleList)
# Stacks of a multimodal model that are not its language model.
_OTHER_TOWERS = re.compile(r"vision|visual|image|audio|speech|sound|video|patch", re.IGNORECASE)


def resolve(layer: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a dotted path, None if there is none."""
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def layer_chains(layer: nn.Module) -> list[tuple[str, ...]]:
    """Return the chains of a layer's MLPs, the main one first; empty if it has none."""
    exception = LAYER_EXCEPTIONS.get(type(layer).__name__)
    if exception is not None:
        return [chain for chain in exception.slots if _is_there(layer, chain)]
    for chain in RULES:
        if _is_there(layer, chain):
            return [chain]
    mixer = getattr(layer, "mixer", None)  # NemotronH: a layer is either attention, Mamba or an MLP
    if isinstance(mixer, nn.Module) and re.search("MLP|MoE", type(mixer).__name__):
        return [("mixer",)]
    # XLM keeps its MLPs in a list of their own.
    return [("",)] if _is_there(layer, ("lin1", "lin2")) and not hasattr(layer, "attention") else []


def _is_there(layer: nn.Module, chain: tuple[str, ...]) -> bool:
    modules = [resolve(layer, path) for path in chain]
    return None not in modules and not (len(chain) == 1 and isinstance(modules[0], _NO_MLP))


def is_other_tower(path: str) -> bool:
    """Return whether a stack is a multimodal model's vision or audio tower rather than its language model."""
    return bool(_OTHER_TOWERS.search(path))


def configured_activations(model: nn.Module) -> list[str]:
    """Return the names of activations in a model's config, the language model's first."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return []
    values: dict[str, Any] = {**vars(config.get_text_config(decoder=True)), **vars(config)}
    fields = sorted(name for name in values if re.search(r"act(ivation)?($|_)|^afn$", name))
    fields.sort(key=lambda name: name not in ("hidden_act", "hidden_activation", "activation_function"))
    return [values[name] for name in fields if isinstance(values[name], str)]


def execution_device(module: nn.Module) -> Any:
    """Return where accelerate runs a module whose weights are elsewhere; None if it does not."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), None)


def running_device(model: nn.Module) -> Any:
    """Return the device that a model's inputs belong on, also when its weights are offloaded."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    device = execution_device(model)
    return "cpu" if device is None else device

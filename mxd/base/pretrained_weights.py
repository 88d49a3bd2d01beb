"""Read the weights, widths and activation of the MLP at a site, whichever way the model stores them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import logging

from mxd.modeling_mxd import MLPSite, MxDLayerConfig, MxDModel, SurgeryError, find_mlps, surgery
from mxd.modeling_mxd.architectures import configured_activations
from mxd.modeling_mxd.loading import commit_of
from mxd.modeling_mxd.surgery import is_quantised

from .base_model import resolve_name
from .weight_layout import (
    EXPERT_LISTS,
    SHARED_EXPERT_NAMES,
    WeightLayout,
    as_module,
    expert_modules,
    find_layout,
    get_part,
    is_rows,
    layout_widths,
    stored_shape,
    weight_of,
)

logger = logging.get_logger(__name__)

_AT_RANDOM = "start the encoder at random (encoder_init='random', or in the file of --config encoder_init: random)"
_ACTIVATION_NAMES = ("act_fn", "act", "activation_fn", "activation", "intermediate_act_fn", "activation_function")
# Tried first, in this order: several names have equal values.
_COMMON = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
_WITH_WEIGHTS = ("prelu", "xielu")
_ACTIVE_EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token", "moe_top_k")


@dataclass(frozen=True)
class PretrainedWeights:
    """An MLP's weights in the layout of the field: y = decoder · (act(encoder · x) [* up · x]).

    Of a mixture of experts, H counts the hidden units of all experts, those of the shared expert first; which of
    them work on a token is the router's choice, and no part of this.
    """

    encoder: Tensor  # (H, I)
    encoder_bias: Tensor | None  # (H)
    up: Tensor | None  # (H, I), the other half of a GLU
    up_bias: Tensor | None  # (H)
    decoder: Tensor  # (O, H)
    decoder_bias: Tensor | None  # (O); None for a mixture of experts, where each expert may have its own

    def strongest(self, units: int) -> "PretrainedWeights":
        """Return the `units` hidden units with the largest ‖encoder row‖ · ‖decoder column‖, in their order."""
        strength = self.encoder.float().norm(dim=1) * self.decoder.float().norm(dim=0)
        kept = strength.topk(units).indices.sort().values
        rows = (self.encoder, self.encoder_bias, self.up, self.up_bias)
        chosen: list[Any] = [None if tensor is None else tensor[kept] for tensor in rows]
        return PretrainedWeights(*chosen, self.decoder[:, kept], self.decoder_bias)  # type: ignore[call-arg]

    def hidden(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the hidden units z (..., H) of a dense MLP for x (..., I)."""
        z = activation(F.linear(x, self.encoder, self.encoder_bias))
        return z if self.up is None else z * F.linear(x, self.up, self.up_bias)

    def apply(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Return y (..., O) of a dense MLP for x (..., I)."""
        return F.linear(self.hidden(x, activation), self.decoder, self.decoder_bias)


def mlp_layout(site: MLPSite) -> WeightLayout | None:
    """Return where the pretrained weights are; None if no rule finds them."""
    return find_layout(site.modules)


def mlp_widths(site: MLPSite) -> tuple[int, int, int] | None:
    """Return (I, H, O): input, hidden units (of all experts) and output; None without a layout."""
    layout = mlp_layout(site)
    return None if layout is None else layout_widths(site.modules, layout)


def mlp_encoder_type(site: MLPSite) -> str:
    """Return `"glu"` or `"mlp"`, as in `MxDLayerConfig`."""
    layout = mlp_layout(site)
    return "mlp" if layout is None else layout.encoder_type


def mlp_active_units(site: MLPSite) -> int | None:
    """Return the hidden units that work on one token: H, or those of the active (by default two) and shared experts."""
    layout, widths = mlp_layout(site), mlp_widths(site)
    if layout is None or widths is None or layout.experts is None:
        return None if widths is None else widths[1]
    shared = 0 if layout.shared is None else layout_widths(site.modules, layout.shared)[1]
    config = getattr(site.model, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    configs = (text, getattr(text, "ffn_config", None))  # DBRX has it in the second
    named = [getattr(config, name, None) for config in configs for name in _ACTIVE_EXPERTS]
    active = next(filter(None, named), 2)
    if isinstance(active, list | tuple):  # of each layer
        active = active[site.layer]
    return shared + (widths[1] - shared) // layout.experts * min(active, layout.experts)


def check_widths(sites: Sequence[MLPSite], config: MxDLayerConfig) -> None:
    """Raise `SurgeryError` if a layer has other widths than the weights of the MLPs that it writes to."""
    widths = {site.slots: mlp_widths(site) for site in sites}
    surgery.check_widths(config, sites, {slots: (have[0], have[2]) for slots, have in widths.items() if have})


def record_base(decomposition: MxDModel, model: PreTrainedModel) -> None:
    """Record in the decomposition's config which base model it is of, in the fields that are None."""
    config, text_config = decomposition.config, model.config.get_text_config(decoder=True)
    sites = [site for site in find_mlps(model, **config.where).values() if site.slots]
    # The decomposed layers first: others may have another activation.
    sites.sort(key=lambda site: site.layer not in config.layers)
    activation = next(filter(None, map(mlp_hidden_act, sites)), None)
    named = configured_activations(model)
    found = {
        "base_model_name_or_path": resolve_name(model.config._name_or_path) or None,
        "base_model_type": model.config.model_type,
        # Splicing compares it with the names in the model's config.
        "base_hidden_act": activation if not named or activation in named else None,
        **{name: getattr(text_config, name, None) for name in ("vocab_size", "num_attention_heads")},
    }
    # Swin has a number of heads for every stage.
    found = {name: value for name, value in found.items() if isinstance(value, int | str)}
    if config.base_model_name_or_path in (None, found.get("base_model_name_or_path")):
        commit, certain = commit_of(model.config)
        found["base_model_revision"] = commit
        if not certain and config.base_model_revision is None:
            logger.warning(
                f"{'no commit' if commit is None else f'commit {commit}'} of {model.config._name_or_path} is "
                "recorded: if the model was loaded with revision=, set config.base_model_revision"
            )
    if model.config.is_encoder_decoder:
        found["stack"] = "decoder"  # which None means there; recorded, so that nobody has to know
    for name, value in found.items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def mlp_weights(site: MLPSite) -> PretrainedWeights:
    """Return copies of the pretrained weights, detached, on their own device; quantised ones dequantised.

    Raises:
        SurgeryError: another module is in the MLP's place, or the weights cannot be found or read.
    """
    layout = mlp_layout(site)
    if layout is None:
        kinds = ", ".join(type(module).__name__ for module in site.modules)
        raise SurgeryError(
            f"no rule finds the pretrained weights of layer {site.layer} ({kinds}): undo a replacement first, or "
            f"{_AT_RANDOM}"
        )
    module = as_module(site.modules)
    try:
        routed = _read(module, layout)
        return routed if layout.shared is None else _joined(_read(module, layout.shared), routed)
    except ValueError as error:
        raise SurgeryError(f"layer {site.layer}: {error}; {_AT_RANDOM}") from error


def _joined(first: PretrainedWeights, second: PretrainedWeights) -> PretrainedWeights:
    """Concatenate the hidden units of two MLPs."""

    def join(name: str) -> Tensor | None:
        one, other = getattr(first, name), getattr(second, name)
        if one is None or other is None or name == "decoder_bias":
            return None
        return torch.cat([one, other], dim=1 if name == "decoder" else 0)

    return PretrainedWeights(*map(join, PretrainedWeights.__annotations__))  # type: ignore[arg-type]


def _read(module: nn.Module, layout: WeightLayout) -> PretrainedWeights:
    inside = get_part(module, layout.holder)
    if isinstance(inside, EXPERT_LISTS):
        single = replace(layout, holder="", experts=None, shared=None)
        return reduce(_joined, (_read(expert, single) for expert in expert_modules(inside)))
    encoder, encoder_bias = _matrix(inside, layout.encoder, layout)
    up, up_bias = (None, None) if layout.up is None else _matrix(inside, layout.up, layout)
    decoder, decoder_bias = _matrix(inside, layout.decoder, layout)
    if layout.fused:
        encoder, up = _split(encoder, -2, layout.fused)
        if encoder_bias is not None:
            encoder_bias, up_bias = _split(encoder_bias, -1, layout.fused)
    if encoder.ndim == 3:  # a stack of experts
        encoder = encoder[: len(decoder)].flatten(0, 1)
        up = None if up is None else up[: len(decoder)].flatten(0, 1)
        decoder, decoder_bias = decoder.transpose(0, 1).flatten(1, 2), None
        encoder_bias, up_bias = (None if bias is None else bias.flatten() for bias in (encoder_bias, up_bias))
    elif is_rows(tuple(encoder.shape), tuple(decoder.shape)):
        decoder = decoder.T
    values = (encoder, encoder_bias, up, up_bias, decoder, decoder_bias)
    return PretrainedWeights(*(None if value is None else value.clone() for value in values))  # type: ignore[arg-type]


def _split(tensor: Tensor, dim: int, fused: str) -> tuple[Tensor, Tensor]:
    """Return a GLU's halves; the units are dimension `dim`."""
    if fused == "interleaved":
        one, other = tensor.unflatten(dim, (-1, 2)).unbind(dim)  # dim is negative
    else:
        one, other = tensor.chunk(2, dim)
    return (other, one) if fused == "swapped halves" else (one, other)


def _matrix(inside: object, name: str, layout: WeightLayout) -> tuple[Tensor, Tensor | None]:
    """Return the weight as ([experts,] out, in) and the bias ([experts,] out) of the part called `name`."""
    part = get_part(inside, name)
    bias = getattr(inside, f"{name}_bias", None) if isinstance(part, Tensor) else getattr(part, "bias", None)
    weight = weight_of(part)
    assert weight is not None
    if weight.is_meta:
        raise ValueError(f"the weight of {name} is offloaded or was never loaded: it cannot be read")
    if is_quantised(weight) or (tuple(weight.shape) != stored_shape(part) and isinstance(part, nn.Linear)):
        return _dequantised(part, name)
    weight = weight.detach()
    if isinstance(part, nn.Conv1d | nn.Conv2d):
        weight = weight.flatten(1)
    weight = weight.transpose(-1, -2) if layout.transposed else weight
    return weight, bias.detach() if isinstance(bias, Tensor) else None


@torch.no_grad()
def _dequantised(linear: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a linear, however it is quantised, from its outputs for the unit vectors."""
    bias = getattr(linear, "bias", None)
    dtype = getattr(linear, "compute_dtype", None) or (bias.dtype if isinstance(bias, Tensor) else torch.float32)
    try:
        device = next(iter([*linear.parameters(), *linear.buffers()])).device
        columns = linear(torch.eye(linear.in_features, dtype=dtype, device=device))
    except Exception as error:
        raise ValueError(f"the quantised weight of {name} ({type(linear).__name__}) cannot be read: {error}") from error
    if isinstance(bias, Tensor):
        return (columns - bias).T, bias.detach()
    return columns.T, None


def mlp_hidden_act(site: MLPSite) -> str | None:
    """Return the name of the MLP's activation in transformers' `ACT2FN`, told by its values; None if none fits.

    The names in the model's config come first, since several names have equal values. They do not decide: GPT's
    config says gelu and means gelu_new.
    """
    layout = mlp_layout(site)
    if layout is None:  # another module may be in the MLP's place
        return None
    named = [name for name in configured_activations(site.model) if name in ACT2FN]
    candidates = [name for name in dict.fromkeys([*named, *_COMMON, *ACT2FN]) if name not in _WITH_WEIGHTS]
    own = _activation_module(site.modules)
    if own is not None:
        return _with_equal_values(own, candidates)
    if layout.experts is None and layout.shared is None:
        return _with_equal_outputs(site, candidates)
    return next(iter(named), None)


def _activation_module(modules: tuple[nn.Module, ...]) -> Callable[[Tensor], Tensor] | None:
    if len(modules) > 2:
        return modules[1]
    for name in ("", "experts", "experts.mlp", "experts.0", "w_in", *SHARED_EXPERT_NAMES):
        inside = get_part(modules[0], name)
        for attribute in _ACTIVATION_NAMES:
            own = getattr(inside, attribute, None)
            if callable(own) and not isinstance(own, nn.Linear):
                return own
    kinds = "torch.nn.modules.activation"
    return next((part for part in modules[0].children() if type(part).__module__ == kinds), None)


@cache
def _values(name: str) -> Tensor:
    """Values of an activation on a grid, (65,)."""
    return ACT2FN[name](torch.linspace(-4, 4, 65))


@torch.no_grad()
def _with_equal_values(own: Callable[[Tensor], Tensor], candidates: list[str]) -> str | None:
    if isinstance(own, nn.Module) and any(True for _ in own.parameters()):
        return None
    try:
        expected = own(torch.linspace(-4, 4, 65))
    except TypeError:  # it takes more than one input
        return None
    return next((name for name in candidates if torch.allclose(_values(name), expected, rtol=1e-4, atol=1e-5)), None)


@torch.no_grad()
def _with_equal_outputs(site: MLPSite, candidates: list[str]) -> str | None:
    """Return the activation with which the weights give the MLP's output: it is called in the MLP's code."""
    try:
        weights = mlp_weights(site)
        width = weights.encoder.shape[1]
        x = torch.linspace(-2, 2, 4 * width).sin().reshape(1, 4, width).to(weights.encoder)
        expected = x
        for module in site.modules:
            expected = module(expected)
    except (SurgeryError, TypeError):  # weights that cannot be read, a block that takes more than its input
        return None
    if not isinstance(expected, Tensor):  # the block returns more than its output
        return None
    tolerance = 1e-4 * float(expected.abs().max())
    for name in candidates:
        if torch.allclose(weights.apply(x, ACT2FN[name]), expected, rtol=1e-3, atol=tolerance):
            return name
    return None

"""The weights of a pretrained MLP, read into one layout whichever way the model stores them: as linears or transposed
(GPT-2's Conv1D), with a GLU's halves fused or interleaved, as three-dimensional stacks of experts, or quantised.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from .architectures import ACTIVATED_SECOND

# Names of (encoder, up, decoder) where a GLU's halves are apart, and of (encoder, decoder); tried in this order.
GLU_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("w1", "v1", "w2"),
    ("wi_0", "wi_1", "wo"),
    ("w_in.w_0", "w_in.w_1", "w_out"),
    ("proj_up_gate", "proj_up", "proj_down"),
)
PAIR_NAMES = (
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("fc1", "fc2"),
    ("fc_in", "fc_out"),
    ("lin1", "lin2"),
    ("linear1", "linear2"),
    ("linear_1", "linear_2"),
    ("linear_fc1", "linear_fc2"),
    ("dense1", "dense2"),
    ("linear_in", "linear_out"),
    ("Wi", "Wo"),
    ("wi", "wo"),
    ("w1", "w2"),
    ("intermediate", "output"),
    ("intermediate_dense", "output_dense"),
    ("intermediate.dense", "output.dense"),
    ("dense.dense", "output.dense"),
    ("input_linear", "output_linear"),
    ("weights_in", "weights_out"),
    ("key", "value"),
    ("0", "2"),
    ("0", "3"),
)
SHARED_EXPERT_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
EXPERT_LISTS = (nn.ModuleList, nn.ModuleDict)
EXPERT_HOLDERS = ("experts", "experts.mlp", "mlp")
ACTIVATION_NAMES = ("act_fn", "act", "activation_fn", "activation", "intermediate_act_fn", "activation_function")
# For a call written into the code: those that transformers' models call so.
_CANDIDATES = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")


@dataclass(frozen=True)
class PretrainedWeights:
    """An MLP's weights in the layout of the field: y = decoder · (act(encoder · x) [* up · x]).

    Of a mixture of experts, H counts the hidden units of all experts, those of the shared expert first; which of
    them work on a token is the router's choice, and no part of this.
    """

    encoder: Tensor
    """(H, I)"""
    encoder_bias: Tensor | None
    """(H)"""
    up: Tensor | None
    """(H, I), the other half of a GLU"""
    up_bias: Tensor | None
    """(H)"""
    decoder: Tensor
    """(O, H)"""
    decoder_bias: Tensor | None
    """(O); None of a mixture of experts, where each expert may have its own"""

    def strongest(self, units: int) -> "PretrainedWeights":
        """The `units` hidden units with the largest ‖encoder row‖ · ‖decoder column‖, in their order: for an encoder
        that is narrower than all experts of a mixture together."""
        strength = self.encoder.float().norm(dim=1) * self.decoder.float().norm(dim=0)
        kept = strength.topk(units).indices.sort().values
        chosen: dict[str, Any] = {
            name: None if (tensor := getattr(self, name)) is None else tensor[kept]
            for name in ("encoder", "encoder_bias", "up", "up_bias")
        }
        return replace(self, **chosen, decoder=self.decoder[:, kept])

    def hidden(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Hidden units z (..., H) of a dense MLP for x (..., I)."""
        z = activation(F.linear(x, self.encoder, self.encoder_bias))
        return z if self.up is None else z * F.linear(x, self.up, self.up_bias)

    def apply(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """y (..., O) of a dense MLP for x (..., I): what the weights alone say."""
        return F.linear(self.hidden(x, activation), self.decoder, self.decoder_bias)


@dataclass(frozen=True)
class WeightLayout:
    """Where an MLP keeps its weights, read from names and shapes.

    Attributes:
        holder: dotted path in the MLP of what holds them; empty for the MLP itself (of an inline one: its slots).
        encoder, up, decoder: names in the holder; `up` is None without a GLU, and where the encoder holds it too.
        fused: None, `"halves"` (the encoder's units, then up's), `"swapped halves"` or `"interleaved"` (in turn).
        transposed: weights are (in, out) rather than (out, in).
        experts: how many, where the weights are stacks of experts; else None.
        shared: layout of the expert that every token meets, where there is one beside the routed.
    """

    holder: str
    encoder: str
    decoder: str
    up: str | None = None
    fused: str | None = None
    transposed: bool = False
    experts: int | None = None
    shared: "WeightLayout | None" = None

    @property
    def encoder_type(self) -> str:
        """`"glu"` or `"mlp"`, as in `MxDLayerConfig`."""
        return "mlp" if self.up is None and self.fused is None else "glu"

    def __str__(self) -> str:
        """As `mxd layers` shows it, such as `experts.gate_up_proj (halves), down_proj [4 experts]`."""
        prefix = f"{self.holder}." if self.holder else ""
        encoder = f"{prefix}{self.encoder}" + (f" ({self.fused})" if self.fused else "")
        names = [name for name in (encoder, self.up, self.decoder) if name]
        notes = ["transposed"] * self.transposed + ([f"{self.experts} experts"] if self.experts else [])
        shown = ", ".join(names) + (f" [{', '.join(notes)}]" if notes else "")
        return f"{self.shared}; {shown}" if self.shared else shown


def find_layout(modules: tuple[nn.Module, ...]) -> WeightLayout | None:
    """Where the MLP that consists of `modules` (one, or the slots of an inline one) keeps its weights; None where no
    rule finds them."""
    module = _whole(modules)
    if isinstance(module, _Inline):
        return _from_shapes(module, "", "encoder", None, "decoder")
    found = next(filter(None, (_named(module, holder) for holder in ("", *EXPERT_HOLDERS))), None)
    shared = next(filter(None, (_named(module, holder) for holder in SHARED_EXPERT_NAMES)), None)
    if found is None or shared is None:
        return found or shared
    return replace(found, shared=shared)


def read_weights(modules: tuple[nn.Module, ...], layout: WeightLayout) -> PretrainedWeights:
    """Copies of the weights, detached, in their own dtype and device; quantised ones in the dtype that they compute
    in.

    Raises:
        ValueError: a weight cannot be read: it is offloaded, or quantised in a way that its module cannot undo.
    """
    module = _whole(modules)
    routed = _read(module, layout)
    if layout.shared is None:
        return routed
    shared = _read(module, layout.shared)
    return PretrainedWeights(*(_joined(name, shared, routed) for name in PretrainedWeights.__annotations__))  # type: ignore[arg-type]


def _joined(name: str, first: PretrainedWeights, second: PretrainedWeights) -> Tensor | None:
    one, other = getattr(first, name), getattr(second, name)
    if one is None or other is None or name == "decoder_bias":
        return None
    return torch.cat([one, other], dim=1 if name == "decoder" else 0)


# Finding


class _Inline(nn.Module):
    """The slots of an inline MLP, as if they were a module's."""

    def __init__(self, modules: tuple[nn.Module, ...]):
        super().__init__()
        first = modules[0]
        # ESM's first slot is a linear with its activation.
        self.encoder = first if _weight(first) is not None else getattr(first, "dense", first)
        self.decoder = modules[-1]


def _whole(modules: tuple[nn.Module, ...]) -> nn.Module:
    return modules[0] if len(modules) == 1 else _Inline(modules)


def _experts(container: nn.Module) -> list[nn.Module]:
    """Those of a list's modules that are experts: NLLB keeps a dropout among them."""
    return [child for child in container.children() if any(True for _ in child.parameters())]


def _get(module: object, path: str) -> object:
    found: object = module
    for name in path.split(".") if path else ():
        if isinstance(found, nn.ModuleList | nn.Sequential):
            found = found[int(name)] if name.isdigit() and int(name) < len(found) else None
        else:
            found = getattr(found, name, None)
    return found


def _weight(part: object) -> Tensor | None:
    """The matrix (or stack of them) of a linear, or a raw parameter that is one."""
    tensor = part if isinstance(part, Tensor) else getattr(part, "weight", None)
    return tensor if isinstance(tensor, Tensor) and tensor.ndim >= 2 else None


def _named(module: nn.Module, holder: str) -> WeightLayout | None:
    inside = _get(module, holder)
    if isinstance(inside, EXPERT_LISTS):
        experts = _experts(inside)
        layout = _named(experts[0], "") if experts else None
        return layout and replace(layout, holder=holder, experts=len(experts))
    for encoder, up, decoder in GLU_NAMES:
        if all(_weight(_get(inside, name)) is not None for name in (encoder, up, decoder)):
            return _from_shapes(module, holder, encoder, up, decoder)
    for encoder, decoder in PAIR_NAMES:
        if all(_weight(_get(inside, name)) is not None for name in (encoder, decoder)):
            return _from_shapes(module, holder, encoder, None, decoder)
    return None


def _stored_shape(part: object) -> tuple[int, ...]:
    """Shape as stored; of a quantised linear the one that it stands for, which its weight's would not tell."""
    if isinstance(part, nn.Linear):
        return (part.out_features, part.in_features)
    weight = _weight(part)
    assert weight is not None
    return tuple(size for size in weight.shape[:2]) if isinstance(part, nn.Conv1d | nn.Conv2d) else tuple(weight.shape)


def _from_shapes(module: nn.Module, holder: str, encoder: str, up: str | None, decoder: str) -> WeightLayout | None:
    inside = _get(module, holder)
    first, last = _get(inside, encoder), _get(inside, decoder)
    if _weight(first) is None or _weight(last) is None:
        return None
    into, out_of = _stored_shape(first), _stored_shape(last)
    transposed = isinstance(first, Conv1D) or bool(getattr(inside, "is_transposed", False))
    if len(into) == len(out_of) == 3 and up is None and into[2] == 2 * out_of[1] and into[1] == out_of[2]:
        transposed = True  # (experts, in, 2 · units) and (experts, units, out)
    fused = None
    if up is None and _units(into, 0, transposed) == 2 * _units(out_of, 1, transposed):
        fused = "halves" if getattr(inside, "is_concatenated", True) else "interleaved"
        fused = "swapped halves" if type(inside).__name__ in ACTIVATED_SECOND else fused
    # LongCat's decoders are fewer than its encoders: its zero experts have none. DBRX keeps its experts in rows.
    experts = out_of[0] if len(into) == 3 else getattr(inside, "moe_num_experts", None)
    return WeightLayout(holder, encoder, decoder, up, fused, transposed, experts)


def _units(shape: tuple[int, ...], side: int, transposed: bool) -> int:
    return shape[-2:][1 - side if transposed else side]


def layout_widths(modules: tuple[nn.Module, ...], layout: WeightLayout) -> tuple[int, int, int]:
    """Widths (I, H, O) of an MLP: input, hidden units (of all experts, the shared one included), output."""
    module = _whole(modules)
    inside = _get(module, layout.holder)
    if isinstance(inside, EXPERT_LISTS):
        inside = _experts(inside)[0]
    into, out_of = _stored_shape(_get(inside, layout.encoder)), _stored_shape(_get(inside, layout.decoder))
    units = _units(into, 0, layout.transposed) // (2 if layout.fused else 1)
    if layout.experts and not _is_rows(into, out_of):
        units *= layout.experts
    if layout.shared is not None:
        units += layout_widths((module,), layout.shared)[1]
    outputs = _units(out_of, 1 if _is_rows(into, out_of) else 0, layout.transposed)
    return _units(into, 1, layout.transposed), units, outputs


def _is_rows(into: tuple[int, ...], out_of: tuple[int, ...]) -> bool:
    """DBRX stores its decoder as its encoder: a row for every unit."""
    return len(into) == 2 and into == out_of and into[0] != into[1]


# Reading


def _read(module: nn.Module, layout: WeightLayout) -> PretrainedWeights:
    inside = _get(module, layout.holder)
    if isinstance(inside, EXPERT_LISTS):
        single = replace(layout, holder="", experts=None, shared=None)
        parts = [_read(expert, single) for expert in _experts(inside)]
        joined = parts[0]
        for part in parts[1:]:
            joined = PretrainedWeights(*(_joined(name, joined, part) for name in PretrainedWeights.__annotations__))  # type: ignore[arg-type]
        return joined
    encoder, encoder_bias = _matrix(inside, layout.encoder, layout)
    up, up_bias = (None, None) if layout.up is None else _matrix(inside, layout.up, layout)
    decoder, decoder_bias = _matrix(inside, layout.decoder, layout)
    if layout.fused:
        encoder, up = _split(encoder, -2, layout.fused)
        if encoder_bias is not None:
            encoder_bias, up_bias = _split(encoder_bias, -1, layout.fused)
    if encoder.ndim == 3:  # a stack of experts
        encoder, up = encoder[: len(decoder)], None if up is None else up[: len(decoder)]
        encoder, up = encoder.flatten(0, 1), None if up is None else up.flatten(0, 1)
        decoder, decoder_bias = decoder.transpose(0, 1).flatten(1, 2), None
        encoder_bias = None if encoder_bias is None else encoder_bias.flatten()
        up_bias = None if up_bias is None else up_bias.flatten()
    elif _is_rows(tuple(encoder.shape), tuple(decoder.shape)):
        decoder = decoder.T
    values = (encoder, encoder_bias, up, up_bias, decoder, decoder_bias)
    return PretrainedWeights(*(None if value is None else value.clone() for value in values))  # type: ignore[arg-type]


def _split(tensor: Tensor, dim: int, fused: str) -> tuple[Tensor, Tensor]:
    """A GLU's halves; the units are dimension `dim`."""
    if fused == "interleaved":
        index = torch.arange(tensor.shape[dim], device=tensor.device)
        return tensor.index_select(dim, index[::2]), tensor.index_select(dim, index[1::2])
    one, other = tensor.chunk(2, dim)
    return (other, one) if fused == "swapped halves" else (one, other)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight's numbers are codes, integers or float8, that only its module can read."""
    return not weight.is_floating_point() or weight.dtype.itemsize < 2


def _matrix(inside: object, name: str, layout: WeightLayout) -> tuple[Tensor, Tensor | None]:
    """Weight as ([experts,] out, in) and bias ([experts,] out) of what is called `name`."""
    part = _get(inside, name)
    bias = getattr(inside, f"{name}_bias", None) if isinstance(part, Tensor) else getattr(part, "bias", None)
    weight = _weight(part)
    assert weight is not None
    if weight.is_meta:
        raise ValueError(f"the weight of {name} is offloaded or was never loaded: it cannot be read")
    if is_quantised(weight) or (tuple(weight.shape) != _stored_shape(part) and isinstance(part, nn.Linear)):
        if not isinstance(part, nn.Module):
            raise ValueError(f"the quantised weight of {name} is in no module that could undo it: it cannot be read")
        return _dequantised(part, name)
    weight = weight.detach()
    if isinstance(part, nn.Conv1d | nn.Conv2d):
        weight = weight.flatten(1)
    weight = weight.transpose(-1, -2) if layout.transposed else weight
    return weight, bias.detach() if isinstance(bias, Tensor) else None


@torch.no_grad()
def _dequantised(linear: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """What a quantised linear computes, whichever way it is quantised: its outputs for the unit vectors."""
    bias = getattr(linear, "bias", None)
    dtype = getattr(linear, "compute_dtype", None) or (bias.dtype if isinstance(bias, Tensor) else torch.float32)
    device = next(iter([*linear.parameters(), *linear.buffers()])).device
    try:
        width = int(linear.in_features)  # type: ignore[arg-type]
        columns = linear(torch.eye(width, dtype=dtype, device=device))
    except Exception as error:
        raise ValueError(f"the quantised weight of {name} ({type(linear).__name__}) cannot be read: {error}") from error
    if isinstance(bias, Tensor):
        return (columns - bias).T, bias.detach()
    return columns.T, None


# Activation


def find_activation(modules: tuple[nn.Module, ...], layout: WeightLayout | None, named: list[str]) -> str | None:
    """Name in transformers' `ACT2FN` of the MLP's activation, told by its values; None where none fits.

    Args:
        modules: the MLP, or its slots.
        layout: where its weights are, if that is known.
        named: names to try first: those that the model's config gives.
    """
    candidates = [name for name in dict.fromkeys([*named, *_CANDIDATES, *ACT2FN]) if name in ACT2FN]
    own = _own_activation(modules)
    if own is not None:
        x = torch.linspace(-4, 4, 65)
        try:
            expected = own(x)
        except Exception:
            return None  # it has weights of its own on another device, or takes more than one input
        return next((name for name in candidates if _agrees(name, x, expected)), None)
    if layout is not None and layout.experts is None and layout.shared is None:
        return _reproducing(modules, layout, candidates)
    return next((name for name in named if name in ACT2FN), None)


def _own_activation(modules: tuple[nn.Module, ...]) -> Callable[[Tensor], Tensor] | None:
    if len(modules) > 2:
        return modules[1]
    for name in ("", "experts", "experts.mlp", "experts.0", "w_in", *SHARED_EXPERT_NAMES):
        inside = _get(modules[0], name)
        for attribute in ACTIVATION_NAMES:
            own = getattr(inside, attribute, None)
            if callable(own) and not isinstance(own, nn.Linear):
                return own
    kinds = "torch.nn.modules.activation"
    return next((part for part in modules[0].children() if type(part).__module__ == kinds), None)


def _agrees(name: str, x: Tensor, expected: Tensor) -> bool:
    try:
        return torch.allclose(ACT2FN[name](x), expected, rtol=1e-4, atol=1e-5)
    except Exception:  # some have weights of their own, in a dtype of their own
        return False


@torch.no_grad()
def _reproducing(modules: tuple[nn.Module, ...], layout: WeightLayout, candidates: list[str]) -> str | None:
    """The activation with which the weights give the MLP's output."""
    try:
        weights = read_weights(modules, layout)
        width = weights.encoder.shape[1]
        x = torch.linspace(-2, 2, 4 * width).sin().reshape(1, 4, width).to(weights.encoder)
        expected = x
        for module in modules:
            expected = module(expected)
        assert isinstance(expected, Tensor)
    except Exception:
        return None
    for name in candidates:
        try:
            value = weights.apply(x, ACT2FN[name])
        except Exception:
            continue
        tolerance = 1e-4 * float(expected.abs().max())
        if torch.allclose(value, expected, rtol=1e-3, atol=tolerance):
            return name
    return None

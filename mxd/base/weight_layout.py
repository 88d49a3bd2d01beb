"""Find where an MLP keeps its weights, from names and shapes.

Models store them as linears or transposed (GPT-2's Conv1D), with a GLU's halves apart, fused or interleaved, as
three-dimensional stacks of experts or as lists of expert modules.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Names of (encoder, up, decoder) where a GLU's halves are apart, and of (encoder, decoder); tried in this order.
GLU_NAMES = (
    ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("w1", "v1", "w2"), ("wi_0", "wi_1", "wo"),
    ("w_in.w_0", "w_in.w_1", "w_out"), ("proj_up_gate", "proj_up", "proj_down"),
)  # fmt: skip
PAIR_NAMES = (
    ("gate_up_proj", "down_proj"), ("up_proj", "down_proj"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"),
    ("fc1", "fc2"), ("fc_in", "fc_out"), ("lin1", "lin2"), ("linear1", "linear2"), ("linear_1", "linear_2"),
    ("linear_fc1", "linear_fc2"), ("dense1", "dense2"), ("linear_in", "linear_out"), ("Wi", "Wo"), ("wi", "wo"),
    ("w1", "w2"), ("intermediate", "output"), ("intermediate_dense", "output_dense"),
    ("intermediate.dense", "output.dense"), ("dense.dense", "output.dense"), ("input_linear", "output_linear"),
    ("weights_in", "weights_out"), ("key", "value"), ("0", "2"), ("0", "3"),
)  # fmt: skip
SHARED_EXPERT_NAMES = ("shared_experts", "shared_expert", "shared_mlp")
EXPERT_LISTS = (nn.ModuleList, nn.ModuleDict)
EXPERT_HOLDERS = ("experts", "experts.mlp", "mlp")
# GLUs whose fused halves have the activated one second; everywhere else it is the first.
ACTIVATED_SECOND = ("MoonshineDecoderMLP", "MoonshineStreamingDecoderMLP", "Phi4MultimodalAudioMLP")


@dataclass(frozen=True)
class WeightLayout:
    """Say where an MLP keeps its weights.

    Attributes:
        holder: dotted path, in the MLP, of the module that holds them; empty for the MLP itself.
        encoder, up, decoder: names in the holder; `up` is None without a GLU, and where the encoder holds it too.
        fused: None, `"halves"` (the encoder's units, then up's), `"swapped halves"` or `"interleaved"` (in turn).
        transposed: weights are (in, out) rather than (out, in).
        experts: how many, where the weights are stacks of experts; else None.
        shared: layout of the expert that every token uses, if there is one beside the routed experts.
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
        """Name the weights as `mxd layers` shows them: `experts.gate_up_proj (halves), down_proj [4 experts]`."""
        prefix = f"{self.holder}." if self.holder else ""
        encoder = f"{prefix}{self.encoder}" + (f" ({self.fused})" if self.fused else "")
        names = [name for name in (encoder, self.up, self.decoder) if name]
        notes = ["transposed"] * self.transposed + ([f"{self.experts} experts"] if self.experts else [])
        shown = ", ".join(names) + (f" [{', '.join(notes)}]" if notes else "")
        return f"{self.shared}; {shown}" if self.shared else shown


def find_layout(modules: tuple[nn.Module, ...]) -> WeightLayout | None:
    """Return where an MLP's module, or the slots of an inline one, keep the weights; None if no rule finds them."""
    module = as_module(modules)
    if isinstance(module, _Inline):
        return _from_shapes(module, "", "encoder", None, "decoder")
    found = next(filter(None, (_named(module, holder) for holder in ("", *EXPERT_HOLDERS))), None)
    shared = next(filter(None, (_named(module, holder) for holder in SHARED_EXPERT_NAMES)), None)
    return replace(found, shared=shared) if found and shared else found or shared


class _Inline(nn.Module):
    """The slots of an inline MLP as one module."""

    def __init__(self, modules: tuple[nn.Module, ...]):
        super().__init__()
        first = modules[0]
        # ESM's first slot is a linear with its activation.
        self.encoder = first if weight_of(first) is not None else getattr(first, "dense", first)
        self.decoder = modules[-1]


def as_module(modules: tuple[nn.Module, ...]) -> nn.Module:
    """Return one module that holds the weights of an MLP's slots."""
    return modules[0] if len(modules) == 1 else _Inline(modules)


def expert_modules(container: nn.Module) -> list[nn.Module]:
    """Return the experts of a list of modules: NLLB keeps a dropout among them."""
    return [child for child in container.children() if any(True for _ in child.parameters())]


def get_part(module: object, path: str) -> object:
    """Return the attribute at a dotted path, None if there is none."""
    found: object = module
    for name in path.split(".") if path else ():
        if isinstance(found, nn.ModuleList | nn.Sequential):
            found = found[int(name)] if name.isdigit() and int(name) < len(found) else None
        else:
            found = getattr(found, name, None)
    return found


def weight_of(part: object) -> Tensor | None:
    """Return the matrix (or stack of matrices) of a linear, or a raw parameter that is one."""
    tensor = part if isinstance(part, Tensor) else getattr(part, "weight", None)
    return tensor if isinstance(tensor, Tensor) and tensor.ndim >= 2 else None


def _named(module: nn.Module, holder: str) -> WeightLayout | None:
    inside = get_part(module, holder)
    if isinstance(inside, EXPERT_LISTS):
        experts = expert_modules(inside)
        layout = _named(experts[0], "") if experts else None
        return layout and replace(layout, holder=holder, experts=len(experts))
    for encoder, up, decoder in [*GLU_NAMES, *((encoder, None, decoder) for encoder, decoder in PAIR_NAMES)]:
        if all(weight_of(get_part(inside, name)) is not None for name in (encoder, up, decoder) if name):
            return _from_shapes(module, holder, encoder, up, decoder)
    return None


def stored_shape(part: object) -> tuple[int, ...]:
    """Return the shape as stored, that of the unquantised matrix for a quantised linear."""
    if isinstance(part, nn.Linear):
        return (part.out_features, part.in_features)
    weight = weight_of(part)
    assert weight is not None
    return tuple(size for size in weight.shape[:2]) if isinstance(part, nn.Conv1d | nn.Conv2d) else tuple(weight.shape)


def _from_shapes(module: nn.Module, holder: str, encoder: str, up: str | None, decoder: str) -> WeightLayout | None:
    inside = get_part(module, holder)
    first, last = get_part(inside, encoder), get_part(inside, decoder)
    if weight_of(first) is None or weight_of(last) is None:
        return None
    into, out_of = stored_shape(first), stored_shape(last)
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
    """Return the widths (I, H, O): input, hidden units (of all experts, the shared one included), output."""
    module = as_module(modules)
    inside = get_part(module, layout.holder)
    if isinstance(inside, EXPERT_LISTS):
        inside = expert_modules(inside)[0]
    into, out_of = stored_shape(get_part(inside, layout.encoder)), stored_shape(get_part(inside, layout.decoder))
    units = _units(into, 0, layout.transposed) // (2 if layout.fused else 1)
    if layout.experts and not is_rows(into, out_of):
        units *= layout.experts
    if layout.shared is not None:
        units += layout_widths((module,), layout.shared)[1]
    outputs = _units(out_of, 1 if is_rows(into, out_of) else 0, layout.transposed)
    return _units(into, 1, layout.transposed), units, outputs


def is_rows(into: tuple[int, ...], out_of: tuple[int, ...]) -> bool:
    """Return whether the decoder is stored as the encoder is, a row for every unit (DBRX)."""
    return len(into) == 2 and into == out_of and into[0] != into[1]

"""Finding, reading, replacing and restoring the MLPs of a language model.

Which architecture keeps its MLP where stands in one table, `ARCHITECTURES`. An MLP is a chain of one or more
child modules of a transformer layer, its *slots*: `("mlp",)` where the MLP is a module of its own, and
`("fc1", "activation_fn", "fc2")` where the layer calls its linears itself (OPT). Input and output of the chain
are the input of the first slot and the output of the last; replacing it puts the new module into the first slot
and the identity into the others.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .configuration_mxd import MxDLayerConfig
from .layers import SparseLayer


@dataclass(frozen=True)
class MLPArchitecture:
    """Where one model type keeps its MLPs. Names of encoder, up and decoder are attributes of the MLP module,
    or of the transformer layer where the MLP is inline.

    Attributes:
        layers: dotted path of the list of transformer layers.
        slots: child modules of a transformer layer that make up the MLP, in the order in which they run.
        encoder: the linear whose output enters the activation.
        decoder: the linear that gives the output.
        up: the linear of a GLU's other half, or None.
        hidden_act: the model config's field that names the activation.
        fused: `encoder` holds the encoder's rows and then up's.
    """

    layers: str
    slots: tuple[str, ...]
    encoder: str
    decoder: str
    up: str | None = None
    hidden_act: str = "hidden_act"
    fused: bool = False

    @property
    def encoder_type(self) -> str:
        return "glu" if self.up is not None or self.fused else "mlp"


_LLAMA = MLPArchitecture("model.layers", ("mlp",), "gate_proj", "down_proj", up="up_proj")
_GEMMA = MLPArchitecture(
    "model.layers", ("mlp",), "gate_proj", "down_proj", up="up_proj", hidden_act="hidden_activation"
)

ARCHITECTURES: dict[str, MLPArchitecture] = {
    "gpt2": MLPArchitecture("transformer.h", ("mlp",), "c_fc", "c_proj", hidden_act="activation_function"),
    "gpt_neox": MLPArchitecture("gpt_neox.layers", ("mlp",), "dense_h_to_4h", "dense_4h_to_h"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": MLPArchitecture(
        "model.language_model.layers", ("mlp",), "gate_proj", "down_proj", up="up_proj", hidden_act="hidden_activation"
    ),
    "phi3": MLPArchitecture("model.layers", ("mlp",), "gate_up_proj", "down_proj", fused=True),
    "opt": MLPArchitecture(
        "model.decoder.layers", ("fc1", "activation_fn", "fc2"), "fc1", "fc2", hidden_act="activation_function"
    ),
}


Capture = Callable[[Mapping[str, Tensor]], dict[int, tuple[Tensor, Tensor]]]
"""Gives, for a batch of `input_ids` and perhaps `attention_mask`, {layer: (x, y)} as `capture_mlps` does."""


class SurgeryError(ValueError):
    """An MLP cannot be found, replaced or restored; the message says which and what to do."""


@dataclass(frozen=True)
class PretrainedWeights:
    """An MLP's weights in the layout of the field: y = decoder · (act(encoder · x) [* up · x])."""

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
    """(O)"""


@dataclass(frozen=True)
class MLPSite:
    """One MLP of a model, as it stands. Sizes are read from the weights, never from the model's config.

    Attributes:
        layer: index of the transformer layer.
        path: dotted path of the transformer layer.
        parent: the transformer layer itself.
        architecture: the model type's row of the table.
        hidden_act: name of the activation in transformers' `ACT2FN`.
    """

    layer: int
    path: str
    parent: nn.Module
    architecture: MLPArchitecture
    hidden_act: str

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What the slots hold at this moment."""
        return tuple(self.parent.get_submodule(slot) for slot in self.architecture.slots)

    @property
    def input_module(self) -> nn.Module:
        return self.modules[0]

    @property
    def output_module(self) -> nn.Module:
        return self.modules[-1]

    def check_fits(self, config: MxDLayerConfig) -> None:
        """Raise a SurgeryError when a layer of this configuration maps between other widths than the MLP."""
        encoder, decoder, _ = self._linears()
        have = (_widths(encoder)[0], _widths(decoder)[1])
        want = (config.hidden_size, config.output_size)
        if have != want:
            raise SurgeryError(
                f"the MLP of layer {self.layer} maps {have[0]} to {have[1]} dimensions, the decomposition's layer "
                f"{want[0]} to {want[1]}: is it of another base model?"
            )

    def weights(self) -> PretrainedWeights:
        """Copies of the pretrained weights, detached, in their own dtype and device.

        Raises:
            SurgeryError: when something else stands in the MLP's place.
        """
        encoder_linear, decoder_linear, up_linear = self._linears()
        encoder, encoder_bias = _linear_weight(encoder_linear)
        decoder, decoder_bias = _linear_weight(decoder_linear)
        up, up_bias = _linear_weight(up_linear) if up_linear is not None else (None, None)
        if self.architecture.fused:
            encoder, up = encoder.chunk(2)
            encoder_bias, up_bias = encoder_bias.chunk(2) if encoder_bias is not None else (None, None)
        return PretrainedWeights(encoder, encoder_bias, up, up_bias, decoder, decoder_bias)

    def _linears(self) -> tuple[nn.Module, nn.Module, nn.Module | None]:
        row = self.architecture
        holder = self.parent if len(row.slots) > 1 else self.input_module

        def linear(name: str) -> nn.Module:
            module = getattr(holder, name, None)
            if not isinstance(module, nn.Module) or not hasattr(module, "weight"):
                raise SurgeryError(
                    f"the MLP of layer {self.layer} is not the pretrained one (no linear {name!r}): undo its "
                    "replacement first"
                )
            return module

        return linear(row.encoder), linear(row.decoder), linear(row.up) if row.up else None


def _widths(linear: nn.Module) -> tuple[int, int]:
    """Input and output width; of a quantised linear the weight's shape would not tell."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    assert isinstance(linear.weight, Tensor)
    return linear.weight.shape[0], linear.weight.shape[1]  # Conv1D, transposed


def _linear_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight as (out, in) and bias (out) of a Linear or of GPT-2's transposed Conv1D."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    weight = weight.T if isinstance(module, Conv1D) else weight
    return weight.clone(), bias.detach().clone() if isinstance(bias, Tensor) else None


def find_mlps(model: nn.Module) -> dict[int, MLPSite]:
    """Every layer's MLP, by layer index.

    Raises:
        SurgeryError: when the model type is not in the table, or its layers are not where the table says.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    row = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if row is None:
        raise SurgeryError(
            f"no MLP surgery for model type {model_type!r} ({type(model).__name__}); supported model types: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    try:
        layers = model.get_submodule(row.layers)
    except AttributeError:
        raise SurgeryError(
            f"{type(model).__name__} has no {row.layers}: pass the causal language model of type {model_type}, "
            "as AutoModelForCausalLM loads it"
        ) from None
    if not isinstance(layers, nn.ModuleList) or not isinstance(model, PreTrainedModel):
        raise SurgeryError(
            f"{type(model).__name__} is not a transformers model itself: pass the model inside the wrapper"
        )
    hidden_act = getattr(model.config.get_text_config(decoder=True), row.hidden_act)
    sites = {}
    for index, parent in enumerate(layers):
        missing = [slot for slot in row.slots if not hasattr(parent, slot)]
        if missing:
            raise SurgeryError(f"layer {index} of {type(model).__name__} has no module {missing[0]!r}")
        sites[index] = MLPSite(index, f"{row.layers}.{index}", parent, row, hidden_act)
    return sites


def find_mlp(model: nn.Module, layer: int) -> MLPSite:
    """The MLP of one layer.

    Raises:
        SurgeryError: also when the model has no such layer.
    """
    sites = find_mlps(model)
    if layer not in sites:
        raise SurgeryError(f"layer {layer} is out of range: {type(model).__name__} has layers 0 to {len(sites) - 1}")
    return sites[layer]


class ReplacedMLP:
    """A replacement that can be undone; made by `replace_mlp`.

    Attributes:
        site: the MLP's place.
        original: the modules that were there, one per slot (a single one unless the MLP is inline).
        replacement: the module that is there now.
    """

    def __init__(self, site: MLPSite, replacement: nn.Module):
        self.site = site
        self.original = site.modules
        self.replacement = replacement
        self._installed = (replacement, *(nn.Identity() for _ in self.original[1:]))
        self._put(self._installed)

    def restore(self) -> None:
        """Put back the very same module objects.

        Raises:
            SurgeryError: when the slots no longer hold what was put there; the model is left as it is.
        """
        if any(now is not ours for now, ours in zip(self.site.modules, self._installed, strict=True)):
            raise SurgeryError(
                f"the MLP of layer {self.site.layer} was changed after it was replaced: undo later replacements "
                "first, in reverse order"
            )
        self._put(self.original)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Inside the block the original modules are back; afterwards, also after an exception, the replacement is.

        Raises:
            SurgeryError: as `restore`.
        """
        self.restore()
        try:
            yield
        finally:
            self._put(self._installed)

    def _put(self, modules: tuple[nn.Module, ...]) -> None:
        for slot, module in zip(self.site.architecture.slots, modules, strict=True):
            setattr(self.site.parent, slot, module)


def replace_mlp(model: nn.Module, layer: int, module: nn.Module, cast: bool = True) -> ReplacedMLP:
    """Put `module` in place of the MLP of one layer.

    Args:
        model: a causal language model of a supported type.
        layer: index of the transformer layer.
        module: maps (..., I) to (..., O).
        cast: move `module`, in place, to the replaced MLP's device and dtype. Off: only the device.

    Returns:
        The replacement, which holds the original and can `restore()` it.

    Raises:
        SurgeryError: unknown model type or layer, an MLP that is already replaced, or another width.
    """
    return replace_mlps(model, {layer: module}, cast=cast)[0]


def _device(module: nn.Module, parameter: Tensor) -> torch.device | str | int:
    """Where a module runs: an offloaded one's parameters are elsewhere, its hook (of accelerate) knows."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return device
    return parameter.device


def _check_replaceable(model: nn.Module, layer: int, module: nn.Module) -> MLPSite:
    site = find_mlp(model, layer)
    if isinstance(site.input_module, SparseLayer):
        raise SurgeryError(f"the MLP of layer {layer} is already replaced by a decomposition: restore it first")
    if isinstance(module, SparseLayer):
        site.check_fits(module.config)
    return site


def replace_mlps(model: nn.Module, modules: Mapping[int, nn.Module], cast: bool = True) -> list[ReplacedMLP]:
    """Put {layer: module} in place of the MLPs of several layers: all, or none and neither model nor modules touched.

    Raises:
        SurgeryError: as `replace_mlp`; also when `modules` is empty.
    """
    if not modules:
        raise SurgeryError("nothing to splice: name at least one layer")
    sites = {layer: _check_replaceable(model, layer, module) for layer, module in modules.items()}
    for layer, module in modules.items():
        _move_to(sites[layer], model, module, cast)
    return [ReplacedMLP(sites[layer], module) for layer, module in modules.items()]


def _move_to(site: MLPSite, model: nn.Module, module: nn.Module, cast: bool) -> None:
    like = next(site.output_module.parameters(), None)
    if like is None:
        return
    dtype = like.dtype
    if isinstance(model, PreTrainedModel) and not dtype.is_floating_point:
        dtype = model.dtype  # a quantised MLP's weights are integers
    module.to(device=_device(site.output_module, like), dtype=dtype if cast else None)


@contextmanager
def spliced_mlps(model: nn.Module, modules: Mapping[int, nn.Module], cast: bool = True) -> Iterator[list[ReplacedMLP]]:
    """Replace the MLPs of several layers inside the block; afterwards, also after an exception, the very same
    modules are back, save where one was changed meanwhile: the others are still restored and the error is raised.

    Raises:
        SurgeryError: as `replace_mlps`.
    """
    with ExitStack() as stack:  # calls every restore, also after one that failed
        replaced = replace_mlps(model, modules, cast=cast)
        for replacement in replaced:
            stack.callback(replacement.restore)
        yield replaced


class _CaptureComplete(Exception):
    """Stops the model's forward once the last wanted MLP has run."""


@torch.no_grad()
def capture_mlps(
    model: nn.Module,
    layers: list[int],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    stop_after_last: bool = True,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Inputs and outputs of the MLPs of `layers` in one forward pass, by default only as far as the last of them.

    Args:
        model: a causal language model of a supported type.
        layers: indices of the transformer layers.
        input_ids: token ids (batch, tokens).
        attention_mask: 1 where a token is not padding (batch, tokens), or None.
        stop_after_last: end the pass once the last of them has run.

    Returns:
        {layer: (x, y)} with x (batch, tokens, I) and y (batch, tokens, O), in the model's dtype.

    Raises:
        SurgeryError: unknown model type or layer.
    """
    inputs: dict[int, Tensor] = {}
    captured: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []
    # All are found before the first hook is set: a layer that does not exist leaves none behind.
    for layer, site in [(layer, find_mlp(model, layer)) for layer in layers]:

        def keep_input(_: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> None:
            inputs[layer] = args[0]

        def keep_output(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, layer: int = layer) -> None:
            # OPT runs its MLP on (batch · tokens, I).
            x, y = (t.reshape(*input_ids.shape, t.shape[-1]) for t in (inputs[layer], output))
            captured[layer] = (x, y)
            if stop_after_last and len(captured) == len(set(layers)):
                raise _CaptureComplete

        handles.append(site.input_module.register_forward_pre_hook(keep_input))
        handles.append(site.output_module.register_forward_hook(keep_output))
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    except _CaptureComplete:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return captured

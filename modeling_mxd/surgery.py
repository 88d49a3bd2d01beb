"""Replace the MLPs of any transformers model, and restore them.

The new module goes into the first slot of the MLP and the identity into the others. It is called with the block's
first input, and its output becomes the block's first output. A layer that writes to several MLPs is called in place of
the first; its `OutputSlice` in place of each other returns what it computed in the same pass.

Surgery is verified before the first replacement: a few tokens run through the model as it is, and with its own MLPs
called the way a replacement is. Unless both give equal outputs, to the last bit, the model is refused.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures import SECOND_INPUT, SECOND_OUTPUT, execution_device, running_device
from .configuration_mxd import MxDLayerConfig
from .layers import SparseLayer
from .sites import MAIN, MLPSite, SurgeryError, find_mlps, site_of

TOKENS = 8
# Input and output width of each MLP, by its slots; of those that were verified, by model.
Widths = dict[tuple[str, ...], tuple[int, int]]
_VERIFIED: "WeakKeyDictionary[nn.Module, Widths]" = WeakKeyDictionary()


class MLPReplacement(nn.Module):
    """Call a layer where callers pass more than the input, or expect a `second` output, of `SECOND_OUTPUT`."""

    def __init__(self, layer: nn.Module, second: str | None):
        super().__init__()
        self.layer = layer
        self.second = second

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, inputs = self.call(*args, **kwargs), [*args, *kwargs.values()]
        if self.second is None:
            return output
        return output, inputs[1] if self.second == SECOND_INPUT and len(inputs) > 1 else None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(next(iter([*args, *kwargs.values()])))


class _Computed:
    """Hold the outputs that a layer has computed for several MLPs, until its next pass. A copy holds none."""

    outputs: tuple[Tensor, ...] = ()
    with_gradient = False

    def __reduce__(self) -> Any:
        return type(self), ()


class OutputSlice(nn.Module):
    """One of the outputs of a layer that writes to several MLPs. The first runs the layer, the others read from it."""

    def __init__(self, layer: nn.Module | None, index: int, count: int, computed: _Computed):
        super().__init__()
        self.layer = layer
        self.index, self.count, self.computed = index, count, computed

    def forward(self, x: Tensor) -> Tensor:
        computed = self.computed
        if self.layer is not None:
            # Kept until the next pass: a backward pass with gradient checkpointing reads them again.
            computed.outputs, computed.with_gradient = self.layer(x).chunk(self.count, -1), torch.is_grad_enabled()
        if not computed.outputs:
            raise SurgeryError("the layer that computes this MLP's output has not run: call the whole model")
        if torch.is_grad_enabled() and not computed.with_gradient:
            lost = "a layer that writes to several MLPs would get no gradient"
            raise SurgeryError(f"{lost}: set gradient_checkpointing_kwargs={{'use_reentrant': False}}")
        return computed.outputs[self.index].reshape(*x.shape[:-1], -1).to(x)


def _slices(module: nn.Module) -> list[nn.Module]:
    """Return the modules in place of the MLPs that a module writes to."""
    count, computed = _num_outputs(module), _Computed()
    return [OutputSlice(None if i else module, i, count, computed) for i in range(count)] if count > 1 else [module]


def _num_outputs(module: Any) -> int:
    return int(getattr(module, "num_output_layers", 1))


class _Original(MLPReplacement):
    """Call an MLP's own modules, one after another, the way a replacement is called."""

    def __init__(self, site: MLPSite):
        super().__init__(nn.ModuleList(site.modules), SECOND_OUTPUT.get(type(site.output_module).__name__))
        self.widths: tuple[int, int] | None = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = None
        for index, module in enumerate(self.layer.children()):
            output = module(output) if index else module(*args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
        self.widths = (next(tensors_in([args, kwargs])).shape[-1], output.shape[-1])
        return output


class ReplacedMLP:
    """A replacement that can be undone: at `site`, of the modules `original` (one per slot) by `replacement`."""

    def __init__(self, site: MLPSite, replacement: nn.Module):
        self.site = site
        self.original = site.modules
        self.replacement = replacement
        self._installed = (as_replacement(site, replacement), *(nn.Identity() for _ in self.original[1:]))
        self._savable = False
        self._install()

    def _install(self) -> None:
        self.site.put(self._installed)
        self._refuse_saving(True)

    def _refuse_saving(self, refuse: bool) -> None:
        attributes = vars(self.site.model)
        for method in () if self._savable else ("save_pretrained", "push_to_hub"):
            refusal = attributes.setdefault(method, _SavingRefused(self.site.model, method))
            (refusal.layers.append if refuse else refusal.layers.remove)(self.site.layer)
            if not refusal.layers:
                del attributes[method]

    def permit_saving(self) -> None:
        """Let the model be saved while this replacement is in it: its class then saves what it should."""
        self._refuse_saving(False)
        self._savable = True

    def restore(self) -> None:
        """Restore the original modules, or raise a SurgeryError if the slots no longer hold the replacement."""
        if any(now is not ours for now, ours in zip(self.site.modules, self._installed, strict=True)):
            changed = f"the MLP of layer {self.site.layer} was changed after it was replaced"
            raise SurgeryError(f"{changed}: undo later replacements first, in reverse order")
        self.site.put(self.original)
        self._refuse_saving(False)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Restore the original modules inside the block."""
        self.restore()
        try:
            yield
        finally:
            self._install()


class _SavingRefused:
    """Refuse to save a model while MLPs of `layers` are replaced: its class would not load the result."""

    def __init__(self, model: nn.Module, method: str):
        self.model, self.method = model, method
        self.layers: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.model, "_hf_peft_config_loaded", False):  # transformers then saves the adapter alone
            return getattr(type(self.model), self.method)(self.model, *args, **kwargs)
        refusal = f"this {type(self.model).__name__} cannot be saved while MLPs are replaced"
        raise SurgeryError(f"{refusal} (layers {sorted(self.layers)}): save the decomposition, or restore them first")


def replace_mlp(model: nn.Module, layer: int, module: nn.Module, **options: Any) -> ReplacedMLP:
    """Replace the MLP of one layer; returns the replacement, and takes the options of `replace_mlps`."""
    if _num_outputs(module) > 1:
        raise SurgeryError(f"the module for layer {layer} writes to several MLPs: use replace_mlps")
    return replace_mlps(model, {layer: module}, **options)[0]


def written_sites(found: Mapping[int, MLPSite], layer: int, count: int) -> list[MLPSite]:
    """Return the `count` MLPs that a layer writes to, or raise a SurgeryError that names the one it cannot."""
    sites = [site_of(found, written) for written in range(layer, layer + count)]
    for site in sites if count > 1 else ():
        chunked: Any = getattr(getattr(site.model, "config", None), "chunk_size_feed_forward", 0)
        if site.repeated or chunked:
            several = f"the MLP of layer {site.layer} runs several times in a pass"
            raise SurgeryError(f"{several}: a layer that writes to {count} MLPs cannot replace it")
    return sites


def replace_mlps(
    model: nn.Module,
    modules: Mapping[int, nn.Module],
    cast: bool = True,
    *,
    stack: str | None = None,
    site: str = MAIN,
    verify: bool = True,
    example_inputs: Mapping[str, Tensor] | None = None,
) -> list[ReplacedMLP]:
    """Replace the MLPs of several layers. On an error, neither the model nor the modules have changed.

    Args:
        model: a transformers model, itself rather than inside a wrapper.
        modules: new module by index of the transformer layer; maps (..., I) to (..., O). One with `num_output_layers`
            J > 1 replaces also the J − 1 MLPs after it, and returns all outputs joined.
        cast: move each module, in place, to the replaced MLP's device and dtype. If False, only to its device.
        stack, site: which list of layers, and which MLP of a layer; see `find_mlps`.
        verify: run 8 tokens through the model first, to check that surgery is exact and the widths fit.
        example_inputs: inputs to verify with, for a model that cannot run on 8 tokens.

    Returns:
        The replacements of all MLPs in the order of `modules`, each of which can `restore()`.

    Raises:
        SurgeryError: there is nothing to replace, no such stack, layer or MLP, the MLP is already replaced (also by
            another of `modules`) or has other widths, or surgery is not exact.
    """
    if not modules:
        raise SurgeryError("nothing to splice: name at least one layer")
    found = find_mlps(model, stack, site)
    written = {layer: written_sites(found, layer, _num_outputs(module)) for layer, module in modules.items()}
    sites = [place for places in written.values() for place in places]
    for number, place in enumerate(sites):
        taken = any(isinstance(part, SparseLayer | MLPReplacement | OutputSlice) for part in place.modules)
        if taken or place in sites[:number]:
            raise SurgeryError(f"the MLP of layer {place.layer} is already replaced: restore it or unsplice() first")
    widths = verify_sites(model, sites, example_inputs) if verify else {}
    for layer, module in modules.items():
        if isinstance(module, SparseLayer):
            check_widths(module.config, written[layer], widths)
    for layer, module in modules.items():
        _move_to(written[layer][0], model, module, cast)
    parts = [part for module in modules.values() for part in _slices(module)]
    return [ReplacedMLP(place, part) for place, part in zip(sites, parts, strict=True)]


def check_widths(config: MxDLayerConfig, sites: Sequence[MLPSite], widths: Widths) -> None:
    """Raise a SurgeryError if a layer has other widths than the MLPs that it writes to, of which it reads the first."""
    for place in sites:
        if have := widths.get(place.slots):
            inputs = config.hidden_size if place is sites[0] else have[0]
            want = (inputs, config.output_size // config.num_output_layers)
            if have != want:
                theirs, ours = (f"{inputs} to {outputs}" for inputs, outputs in (have, want))
                wrong = f"the MLP of layer {place.layer} maps {theirs} dimensions, the decomposition's layer {ours}"
                raise SurgeryError(f"{wrong}: is it of another base model?")


@contextmanager
def spliced_mlps(
    model: nn.Module, modules: Mapping[int, nn.Module], cast: bool = True, **options: Any
) -> Iterator[list[ReplacedMLP]]:
    """Replace the MLPs of several layers inside the block, as `replace_mlps`."""
    with restored_afterwards(replace_mlps(model, modules, cast, **options)) as replaced:
        yield replaced


@contextmanager
def restored_afterwards(replaced: list[ReplacedMLP]) -> Iterator[list[ReplacedMLP]]:
    """Restore all replacements at the block's end, the others also if one was changed."""
    with ExitStack() as stack:  # calls every restore, also after one that failed
        for replacement in replaced:
            stack.callback(replacement.restore)
        yield replaced


def is_quantised(weight: Tensor) -> bool:
    """Return whether a weight holds codes (integers or float8) that only its module can read."""
    return not weight.is_floating_point() or weight.dtype.itemsize < 2


def _move_to(site: MLPSite, model: nn.Module, module: nn.Module, cast: bool) -> None:
    # GPTQ's and AWQ's linears have buffers alone. A mixture's router may be in float32 beside experts in 16 bits.
    parameters: list[Tensor] = list(site.output_module.parameters()) or list(site.output_module.buffers())
    if parameters:
        like = max(parameters, key=Tensor.numel)
        device = execution_device(site.output_module)
        dtype: Any = model.dtype if is_quantised(like) else like.dtype
        module.to(device=like.device if device is None else device, dtype=dtype if cast else None)


def as_replacement(site: MLPSite, layer: nn.Module) -> nn.Module:
    """Wrap a layer where the site's callers pass more than the input, or expect more than the output."""
    second = SECOND_OUTPUT.get(type(site.output_module).__name__)
    parameters = inspect.signature(site.input_module.forward).parameters.values()
    plain = len(parameters) == 1 and not any(p.kind == p.VAR_KEYWORD for p in parameters)
    return layer if plain and second is None else MLPReplacement(layer, second)


@torch.no_grad()
def verify_sites(model: nn.Module, sites: list[MLPSite], example_inputs: Mapping[str, Any] | None = None) -> Widths:
    """Raise a SurgeryError unless the model's outputs on `example_inputs` (8 tokens) are equal by `originals_routed`.

    Sites that were verified before, and a model on the meta device, are not run. Returns the verified MLPs' widths.
    """
    known = _VERIFIED.setdefault(model, {})
    new = [site for site in sites if site.slots not in known]
    loaded = any(hasattr(module, "_hf_hook") for module in model.modules())  # when it runs, by accelerate
    if not new or (not loaded and any(parameter.is_meta for parameter in model.parameters())):
        return known
    before = run_once(model, example_inputs)
    with originals_routed(new) as routed:
        after = run_once(model, example_inputs)
    name = f"{type(model).__name__} (model type {getattr(model.config, 'model_type', None)!r})"
    for site, original in zip(new, routed, strict=True):
        if original.widths is None:
            silent = f"the MLP of layer {site.layer} of {site.stack} does not run on the example inputs"
            raise SurgeryError(f"{name}: {silent}: pass example_inputs= with which it does")
    if len(before) != len(after) or not all(map(_equal, before, after)):
        which = f"layers {[site.layer for site in new]} ({', '.join(slot for site in new for slot in site.slots)})"
        wrong = f"calling the MLPs of {which} as a replacement would be called changes the outputs"
        raise SurgeryError(f"{name}: {wrong}, so they cannot be replaced: name other modules with site=")
    known.update({site.slots: original.widths for site, original in zip(new, routed, strict=True) if original.widths})
    return known


@contextmanager
def originals_routed(sites: list[MLPSite]) -> Iterator[list[_Original]]:
    """Call each site's own modules as a replacement would be called, inside the block."""
    slots, routed = [site.modules for site in sites], [_Original(site) for site in sites]
    try:
        for site, original, modules in zip(sites, routed, slots, strict=True):
            site.put((original, *(nn.Identity() for _ in modules[1:])))
        yield routed
    finally:
        for site, modules in zip(sites, slots, strict=True):
            site.put(modules)


def run_once(model: PreTrainedModel, example_inputs: Mapping[str, Tensor] | None) -> list[Tensor]:
    """Return copies of the tensors that a model returns, in eval mode and from a fixed seed (Reformer hashes)."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        try:
            return [tensor.clone() for tensor in tensors_in(model(**(example_inputs or example_tokens(model))))]
        except Exception as error:
            reason, remedy = f"{type(error).__name__}: {str(error)[:300]}", "with which it runs, or verify=False"
            wrong = f"{type(model).__name__} cannot be run to verify surgery ({reason})"
            raise SurgeryError(f"{wrong}: pass example_inputs= {remedy}") from error
        finally:
            for module in training:
                module.training = True


def example_tokens(model: PreTrainedModel) -> dict[str, Any]:
    """Return `TOKENS` token ids as inputs of a model."""
    accepted = inspect.signature(model.forward).parameters
    vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", None) or 32
    # In the middle of the vocabulary: special tokens, which may be placeholders of images, are at its ends.
    ids = (torch.arange(TOKENS, device=running_device(model)) + vocabulary // 2)[None] % vocabulary
    inputs = {name: ids for name in ("input_ids", "decoder_input_ids") if name in accepted}
    return inputs | ({"use_cache": False} if "use_cache" in accepted else {})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)

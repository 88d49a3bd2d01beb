"""Seeing for oneself that surgery is exact: a model's own MLPs, routed as a replacement would be, must leave its
outputs equal to the last bit.

What stands in an MLP's place gets the block's first input and gives its first output. `StandIn` does so where the
model's callers pass more (a router's choice, the token ids) or expect more (a router's state).
"""

import inspect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures import SECOND_INPUT, SECOND_OUTPUT
from .sites import MLPSite, SurgeryError

TOKENS = 8
Widths = dict[tuple[str, ...], tuple[int, int]]
"""Input and output width of an MLP, by its slots."""
# The sites of a model that were seen to be exact.
_VERIFIED: "WeakKeyDictionary[nn.Module, Widths]" = WeakKeyDictionary()


class StandIn(nn.Module):
    """Calls a layer with the first of its inputs, and gives the model's callers what they expect.

    Args:
        layer: maps (..., I) to (..., O).
        second: None where the output alone is expected, else what comes behind it: `architectures.NOTHING` or
            `SECOND_INPUT`.
    """

    def __init__(self, layer: nn.Module, second: str | None):
        super().__init__()
        self.layer = layer
        self.second = second

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, with a second value where one is expected."""
        output, inputs = self.call(*args, **kwargs), [*args, *kwargs.values()]
        if self.second is None:
            return output
        return output, inputs[1] if self.second == SECOND_INPUT and len(inputs) > 1 else None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """y for the first input."""
        return self.layer(next(iter([*args, *kwargs.values()])))


class _Original(StandIn):
    """The replaced modules themselves, one after another, behind the same convention."""

    def __init__(self, modules: tuple[nn.Module, ...], second: str | None):
        super().__init__(nn.ModuleList(modules), second)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = None
        for index, module in enumerate(self.layer.children()):
            output = module(output) if index else module(*args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
        return output


def needs_stand_in(site: MLPSite) -> bool:
    """Whether the site's callers pass more than the input, or expect more than the output."""
    if second_output(site) is not None:
        return True
    parameters = inspect.signature(site.input_module.forward).parameters.values()
    return len(parameters) != 1 or any(p.kind == p.VAR_KEYWORD for p in parameters)


def second_output(site: MLPSite) -> str | None:
    """What the site's block gives behind its output, None where that is all."""
    return SECOND_OUTPUT.get(type(site.output_module).__name__)


@torch.no_grad()
def verify_sites(model: nn.Module, sites: list[MLPSite], example_inputs: Mapping[str, Any] | None = None) -> Widths:
    """Run a few tokens twice, only as far as the last of the sites: with the model as it is, and with its own MLPs
    routed as replacements are. Sites that were verified before are not run again.

    Args:
        model: is as it was afterwards, its random state too. On the meta device it cannot be run, and is not.
        sites: where MLPs will be replaced.
        example_inputs: what to run; by default 8 tokens, or whatever the model takes.

    Returns:
        The widths that were seen.

    Raises:
        SurgeryError: the outputs of a site's transformer layer are not equal, or the model cannot be run.
    """
    assert isinstance(model, PreTrainedModel)
    known = _VERIFIED.setdefault(model, {})
    new = [site for site in sites if site.slots not in known]
    if not new or _is_unloaded(model):
        return known
    widths: Widths = {}
    with _at_rest(model), _listening(new, widths):
        before = _layer_outputs(model, new, example_inputs)
        with originals_routed(new):
            after = _layer_outputs(model, new, example_inputs)
    for site in new:
        if site.path not in before:
            raise SurgeryError(
                f"{_named(model)}: layer {site.layer} of {site.stack} does not run on the example inputs: pass "
                "example_inputs= with which it does"
            )
        if site.path not in after or not _equal(before[site.path], after[site.path]):
            raise SurgeryError(
                f"{_named(model)}: routing the MLP of layer {site.layer} ({', '.join(site.slots)}) through our wrapper "
                "changes what the layer gives, so that a decomposition there would not stand for the MLP alone: name "
                "another module with site="
            )
    known.update({site.slots: widths[site.slots] for site in new if site.slots in widths})
    return known


def _is_unloaded(model: nn.Module) -> bool:
    """Whether weights are on the meta device, and no hook of accelerate brings them."""
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    return on_meta and not any(hasattr(module, "_hf_hook") for module in model.modules())


@contextmanager
def originals_routed(sites: list[MLPSite]) -> Iterator[None]:
    """Inside the block each site's own modules are called as a replacement would be; afterwards all is as it was."""
    originals = [site.modules for site in sites]
    try:
        for site, modules in zip(sites, originals, strict=True):
            routed = _Original(modules, second_output(site))
            site.put((routed, *(nn.Identity() for _ in modules[1:])))
        yield
    finally:
        for site, modules in zip(sites, originals, strict=True):
            site.put(modules)


@contextmanager
def _listening(sites: list[MLPSite], widths: Widths) -> Iterator[None]:
    """Note the last dimension of each site's input and output."""

    def note(slots: tuple[str, ...], side: int, value: Any) -> None:
        tensor = next(iter(_tensors(value)), None)
        if tensor is not None:
            have = widths.get(slots, (0, 0))
            widths[slots] = (tensor.shape[-1], have[1]) if side == 0 else (have[0], tensor.shape[-1])

    handles = []
    for site in sites:
        handles.append(
            site.input_module.register_forward_pre_hook(
                lambda _, args, kwargs, slots=site.slots: note(slots, 0, [*args, *kwargs.values()]), with_kwargs=True
            )
        )
        handles.append(
            site.output_module.register_forward_hook(lambda _, __, output, slots=site.slots: note(slots, 1, output))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} (model type {getattr(model.config, 'model_type', None)!r})"


class _Complete(Exception):
    """Stops the model's forward once every site's layer has run."""


def _layer_outputs(
    model: PreTrainedModel, sites: list[MLPSite], example_inputs: Mapping[str, Tensor] | None
) -> dict[str, list[Tensor]]:
    """The tensors that each site's transformer layer gives when it runs first."""
    outputs: dict[str, list[Tensor]] = {}
    paths = {site.path for site in sites}

    def keep(path: str, output: Any) -> None:
        outputs.setdefault(path, [tensor.clone() for tensor in _tensors(output)])
        if len(outputs) == len(paths):
            raise _Complete

    # The paths are looked up anew: where a layer is nothing but its MLP, the stand-in has its place.
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, __, output, path=path: keep(path, output))
        for path in paths
    ]
    try:
        with _seeded(running_device(model)):  # Reformer hashes at random
            model(**(example_inputs or make_example_inputs(model)))
    except _Complete:
        pass
    except Exception as error:
        raise SurgeryError(
            f"{_named(model)} cannot be run to verify surgery ({type(error).__name__}: {str(error)[:300]}): pass "
            "example_inputs= with which it runs, or verify=False"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return outputs


@contextmanager
def _seeded(device: Any) -> Iterator[None]:
    """Random numbers from seed 0, on the CPU and on the accelerator that a model runs on, if it does; afterwards their
    states are as they were. No other accelerator is touched, nor initialised."""
    kind = torch.device(device).type
    count = 0 if kind in ("cpu", "meta") else int(getattr(torch, kind).device_count())
    with torch.random.fork_rng(devices=range(count), **({"device_type": kind} if count else {})):
        torch.default_generator.manual_seed(0)
        if count:
            torch.manual_seed(0)
        yield


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(_tensors, value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(_tensors, value))


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def make_example_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Inputs on which a model runs: 8 tokens, an image, or a sound, as its `main_input_name` says."""
    config, device = model.config, running_device(model)
    accepted = inspect.signature(model.forward).parameters
    name = model.main_input_name
    inputs: dict[str, Any] = {}
    if name in ("pixel_values", "pixel_values_videos"):
        inputs[name] = torch.zeros(_image_shape(model), device=device, dtype=model.dtype)
    elif name in ("input_values", "input_features"):
        inputs[name] = torch.zeros(_sound_shape(model), device=device, dtype=model.dtype)
    else:
        inputs[name] = _token_ids(model)
    if "input_ids" in accepted and "input_ids" not in inputs and not config.is_encoder_decoder:
        inputs["input_ids"] = _token_ids(model)
    placed_in_text = any(name.startswith("image_token") for name in vars(config))
    if "pixel_values" in accepted and hasattr(config, "vision_config") and not placed_in_text:  # CLIP wants both
        inputs["pixel_values"] = torch.zeros(_image_shape(model), device=device, dtype=model.dtype)
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _token_ids(model)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def execution_device(module: nn.Module) -> Any:
    """Where accelerate has a module run whose weights are elsewhere; None where it does not."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), None)


def running_device(model: nn.Module) -> Any:
    """Where a model's inputs belong, also when its weights are offloaded."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    device = execution_device(model)  # the model is offloaded whole
    return "cpu" if device is None else device


def _token_ids(model: PreTrainedModel) -> Tensor:
    text = model.config.get_text_config(decoder=True)
    vocabulary = getattr(text, "vocab_size", None) or 32
    # In the middle of the vocabulary: special tokens, which may stand for images, are at its ends.
    return (torch.arange(TOKENS, device=running_device(model)) + vocabulary // 2)[None] % vocabulary


def _image_shape(model: PreTrainedModel) -> tuple[int, ...]:
    vision = getattr(model.config, "vision_config", model.config)
    size = getattr(vision, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return (1, getattr(vision, "num_channels", 3), height, width)


def _sound_shape(model: PreTrainedModel) -> tuple[int, ...]:
    config: Any = model.config
    if model.main_input_name == "input_values" and not hasattr(config, "max_length"):
        return (1, 16_000)
    bins: Any = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", 80)
    frames = 2 * getattr(config, "max_source_positions", 64)
    if model.main_input_name == "input_values":
        return (1, config.max_length, bins)
    return (1, bins, frames) if hasattr(config, "num_mel_bins") else (1, frames, bins)

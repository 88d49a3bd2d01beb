"""Record the inputs and outputs of a model's MLPs during a forward pass."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mxd.modeling_mxd import MxDConfig
from mxd.modeling_mxd.sites import MAIN, MLPSite, SurgeryError, find_mlps, site_of

Activations = dict[int, tuple[Tensor, Tensor]]
"""{layer: (x, y)}, as `capture_mlps` and `capture_layers` return."""
Capture = Callable[[Mapping[str, Tensor]], Activations]
"""A function from a batch (`input_ids`, optionally `attention_mask`) to the activations of MLPs."""


class _CaptureComplete(Exception):
    """Stop the model's forward pass after the last requested MLP."""


@torch.no_grad()
def capture_mlps(
    model: nn.Module,
    layers: list[int],
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    stop_after_last: bool = True,
    *,
    stack: str | None = None,
    site: str = MAIN,
    **inputs: Any,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return inputs and outputs of the MLPs of `layers`, from one forward pass, by default only up to the last layer.

    Args:
        model, layers: any model with MLPs, and indices of its layers.
        input_ids: token ids (batch, tokens), if the model reads text.
        attention_mask: 1 where a token is not padding (batch, tokens), or None.
        stop_after_last: end the pass after the last of the MLPs.
        stack, site: which stack of layers, and which of a layer's MLPs; see `find_mlps`.
        **inputs: further inputs of the model (`decoder_input_ids`, `pixel_values` …).

    Returns:
        {layer: (x, y)} with x (batch, tokens, I) and y (batch, tokens, O), in the model's dtype. A layer that the model
        runs n times (ALBERT) has all n runs, (n · batch, tokens, …).

    Raises:
        SurgeryError: no such stack, layer or MLP.
    """
    # Find all MLPs before setting a hook, so that a missing layer leaves no hook behind.
    sites = find_mlps(model, stack, site)
    recorders = [_Recorder(site_of(sites, layer)) for layer in layers]
    whole = not stop_after_last or any(recorder.runs_again for recorder in recorders)

    def stop_when_done() -> None:
        if not whole and all(recorder.outputs for recorder in recorders):
            raise _CaptureComplete

    given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
    given = {name: value for name, value in given.items() if value is not None}
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    handles = [handle for recorder in recorders for handle in recorder.listen(stop_when_done)]
    try:
        model(**given)
    except _CaptureComplete:
        pass
    finally:
        for handle in handles:
            handle.remove()
    shapes = [value.shape[:2] for name, value in given.items() if name.endswith("input_ids")]
    return {recorder.site.layer: recorder.captured(shapes) for recorder in recorders}


def capture_layers(
    model: nn.Module,
    config: MxDConfig,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Activations:
    """Return {layer: (x, y)} of a decomposition's layers: `joined_outputs` of `capture_mlps`, with its other inputs."""
    options |= config.where
    captured = capture_mlps(model, config.written_layers(), input_ids, attention_mask, **options)
    return joined_outputs(captured, config)


def joined_outputs(captured: Activations, config: MxDConfig) -> Activations:
    """Return the activations that each layer of a decomposition reads and writes; those of `captured` are removed.

    y is the outputs of all MLPs that a layer writes to, one after another, on the device of the first.
    """
    joined = {}
    for layer in config.layers:
        pairs = [captured.pop(written) for written in config.written_layers(layer)]
        x, y = pairs[0]
        joined[layer] = x, y if len(pairs) == 1 else torch.cat([y, *(other.to(y) for _, other in pairs[1:])], -1)
    return joined


class _Recorder:
    """Record the inputs and outputs of one MLP in a forward pass."""

    def __init__(self, site: MLPSite):
        self.site = site
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.chunked = bool(getattr(getattr(site.model, "config", None), "chunk_size_feed_forward", 0))

    @property
    def runs_again(self) -> bool:
        """Return whether one pass runs the MLP more than once."""
        return self.site.repeated or self.chunked

    def listen(self, done: Callable[[], None]) -> list[RemovableHandle]:
        """Record every input and output from now on, and call `done` after each output."""

        def keep_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inputs.append(args[0] if args else next(iter(kwargs.values())))

        def keep_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self.outputs.append(output[0] if isinstance(output, tuple) else output)
            done()
            self.outputs[-1] = self.outputs[-1].clone()  # if the pass goes on, some models add to it (Falcon)

        return [
            self.site.input_module.register_forward_pre_hook(keep_input, with_kwargs=True),
            self.site.output_module.register_forward_hook(keep_output),
        ]

    def captured(self, shapes: list[torch.Size]) -> tuple[Tensor, Tensor]:
        """Return all inputs and outputs, each (batch, tokens, …); `shapes` are the shapes of token ids."""
        if not self.outputs:
            raise SurgeryError(f"the MLP of layer {self.site.layer} ({self.site.path}) did not run on these inputs")
        xs = [_by_token(x, shapes) for x in self.inputs]
        ys = [y.reshape(*x.shape[:-1], y.shape[-1]) for x, y in zip(xs, self.outputs, strict=True)]
        dim = 1 if self.chunked and not self.site.repeated else 0
        return (xs[0], ys[0]) if len(xs) == 1 else (torch.cat(xs, dim), torch.cat(ys, dim))


def _by_token(x: Tensor, shapes: list[torch.Size]) -> Tensor:
    """Restore (batch, tokens, I) of a layer that runs its MLP on (batch · tokens, I)."""
    if x.ndim > 2:
        return x
    shape = next((shape for shape in shapes if shape.numel() == len(x)), (1, len(x)))
    return x.reshape(*shape, x.shape[-1])

"""Run forward passes for evaluation: without dropout, and with padding on the right."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxd.modeling_mxd import MxDConfig, SurgeryError, spliced_mlps
from mxd.modeling_mxd.surgery import example_tokens, run_once, running_device

from .allocation import freed_memory_kept
from .capture import capture_layers

Batch = tuple[Tensor, Tensor | None]
"""`input_ids` and `attention_mask`, both (batch, tokens)."""


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode inside the block, then restore every module's mode; keep freed memory on a CPU."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    on_cpu = any(parameter.device.type == "cpu" for model in models for parameter in model.parameters())
    try:
        with freed_memory_kept() if on_cpu else nullcontext():
            yield
    finally:
        for module, training in before:
            module.training = training


def right_padded(batch: Mapping[str, Tensor], device: torch.device) -> Batch:
    """Move token ids and mask to `device`, and every row's padding to its right.

    With padding on the left, a forward pass (unlike generation) gives every token a wrong absolute position.

    Raises:
        ValueError: the batch has no tokens, or ids and mask differ in shape.
    """
    ids, mask = batch["input_ids"].to(device), batch.get("attention_mask")
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(f"input_ids must be (batch, tokens) with at least one token, got {tuple(ids.shape)}")
    if mask is None:
        return ids, None
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask {tuple(mask.shape)} must have the shape of input_ids {tuple(ids.shape)}")
    order = padding_last(mask.to(device))
    return ids.gather(-1, order), mask.to(device).gather(-1, order)


def batch_for(model: nn.Module, batch: Mapping[str, Tensor]) -> Batch:
    """Return `right_padded` of a batch on the device of a model's inputs."""
    return right_padded(batch, running_device(model))


def padding_last(mask: Tensor) -> Tensor:
    """Return the order of each row's positions that moves its padding to the right, (batch, tokens) int64."""
    return (mask == 0).to(torch.int8).argsort(dim=-1, stable=True)


def check_causal(model: nn.Module) -> None:
    """Raise `ValueError` for an encoder–decoder model, whose logits do not predict the next token of its inputs."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder–decoder model: cross-entropies need a causal language model"
        )


def no_predictions(model: nn.Module) -> str:
    """Return why a model's predictions mean nothing, as `load_base_model` found; empty if they do."""
    return getattr(model, "_no_predictions", "")


def check_predictions(model: nn.Module, what: str) -> None:
    """Raise `ValueError` if a model's predictions, which `what` would rest on, mean nothing."""
    if reason := no_predictions(model):
        raise ValueError(f"{what} needs the model's predictions, but {reason}")


@torch.no_grad()
def sees_later_tokens(model: PreTrainedModel) -> bool:
    """Return whether predictions change with a later token, as an encoder's do; False if 8 tokens do not run."""
    two = {
        name: value.repeat(2, 1) if isinstance(value, Tensor) else value
        for name, value in example_tokens(model).items()
    }
    two["input_ids"][1, -1] -= 1
    try:
        one, other = run_once(model, two)[0]  # both rows in one pass, which reads the weights once
    except SurgeryError:
        return False
    # Beside rounding: experts compute a token together with others.
    tolerance = min(0.02, 100 * torch.finfo(one.dtype).eps)
    return bool((one - other)[:-1].abs().max() > tolerance * one.abs().max())


def next_token_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits (batch, tokens, vocabulary) of a causal language model."""
    ids, attention_mask = batch
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits


def capture_with_output(
    model: nn.Module, config: MxDConfig, **inputs: Any
) -> tuple[dict[int, tuple[Tensor, Tensor]], Any]:
    """Return `capture_layers` of a decomposition and the model's output, from one forward pass."""
    kept: list[Any] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept.append(output)

    with model.register_forward_hook(keep):
        captured = capture_layers(model, config, stop_after_last=False, **inputs)
    return captured, kept[0]


def capture_with_logits(
    model: nn.Module, config: MxDConfig, batch: Batch
) -> tuple[dict[int, tuple[Tensor, Tensor]], Tensor]:
    """Return `capture_layers` of a decomposition and `next_token_logits`, from one forward pass."""
    captured, output = capture_with_output(model, config, input_ids=batch[0], attention_mask=batch[1])
    return captured, output.logits


class ZeroMLP(nn.Module):
    """An ablated layer: map (..., I) to zeros (..., O), in the dtype of x."""

    def __init__(self, output_size: int, num_output_layers: int = 1):
        super().__init__()
        self.output_size, self.num_output_layers = output_size, num_output_layers

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.output_size)


@contextmanager
def zero_ablated(model: nn.Module, config: MxDConfig) -> Iterator[None]:
    """Replace the MLPs that a decomposition writes to by `ZeroMLP` inside the block."""
    layers = {layer: config.layer(layer) for layer in config.layers}
    zeros = {layer: ZeroMLP(one.output_size, one.num_output_layers) for layer, one in layers.items()}
    with spliced_mlps(model, zeros, **config.where):
        yield

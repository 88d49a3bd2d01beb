"""Define which positions count, in training and in evaluation."""

from collections.abc import Mapping

import torch
from torch import Tensor

_IGNORED = -100  # label of padding


def token_mask(input_ids: Tensor, attention_mask: Tensor | None = None, include_first: bool = True) -> Tensor:
    """Return a mask that is True where a position counts: where it is not padding, on either side.

        mask_bt = attention_mask_bt ≠ 0                                          include_first
        mask_bt = attention_mask_bt ≠ 0  and  Σ_{s ≤ t} attention_mask_bs > 1    without the first

    Args:
        input_ids: token ids, (batch, tokens).
        attention_mask: 1 where a token is not padding, (batch, tokens); None when there is no padding.
        include_first: if False, exclude each row's first unpadded position too. That is the place of BOS, an attention
            sink whose activations have an extreme norm in many models; its id does not matter.

    Returns:
        (batch, tokens) bool.

    Raises:
        ValueError: the two have different shapes.
    """
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if mask.shape != input_ids.shape:
        shapes = f"{tuple(input_ids.shape)}, got {tuple(mask.shape)}"
        raise ValueError(f"attention_mask must have the shape of input_ids {shapes}")
    return mask if include_first else mask & (mask.cumsum(-1) > 1)


def activation_mask(
    inputs: Mapping[str, Tensor], x: Tensor, include_first: bool = True, decoder: bool = False
) -> Tensor:
    """Return a mask that is True where an activation of `capture_mlps` counts.

    This is `token_mask` if x has a position for every token, and True everywhere if its positions are not the tokens of
    the batch (patches of an image, frames of a sound).

    Args:
        inputs: inputs of the model.
        x: (batch, tokens, I), or (n · batch, tokens, I) for a layer that runs n times.
        decoder: whether x comes from the decoder of an encoder–decoder model, whose tokens are `decoder_input_ids`, or
            the `labels` that the model shifts.

    Returns:
        (batch, tokens) bool, or (n · batch, tokens).
    """
    ids, padding = inputs.get("input_ids"), inputs.get("attention_mask")
    if decoder and ("decoder_input_ids" in inputs or "labels" in inputs):
        labels = inputs.get("labels")
        ids, padding = inputs.get("decoder_input_ids", labels), inputs.get("decoder_attention_mask")
        if padding is None and labels is not None and ids is not None and labels.shape == ids.shape:
            padding = labels != _IGNORED  # collators pad labels with it, and add no mask
    if ids is None or ids.shape[1] != x.shape[1] or len(x) % len(ids):
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    return token_mask(ids, padding, include_first).repeat(len(x) // len(ids), 1).to(x.device)


def next_token_mask(mask: Tensor) -> Tensor:
    """Return where a position and its next one both count, for masks (batch, tokens): (batch, tokens − 1)."""
    return mask[:, :-1] & mask[:, 1:]

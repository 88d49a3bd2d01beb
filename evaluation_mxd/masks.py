"""The one definition of which positions count, in training and in evaluation."""

import torch
from torch import Tensor


def token_mask(input_ids: Tensor, attention_mask: Tensor | None = None, include_first: bool = True) -> Tensor:
    """True where a position counts: everything that is not padding, on whichever side the padding is.

        mask_bt = attention_mask_bt ≠ 0                                          include_first
        mask_bt = attention_mask_bt ≠ 0  and  Σ_{s ≤ t} attention_mask_bs > 1    without the first

    Args:
        input_ids: token ids, (batch, tokens).
        attention_mask: 1 where a token is not padding, (batch, tokens); None when there is no padding.
        include_first: off, each row's first unpadded position is left out too. That is where BOS stands: an
            attention sink, whose activations have an extreme norm in many models. It is told by its position, so
            that a BOS id of 0, or a tokenizer without BOS, makes no difference.

    Returns:
        (batch, tokens) bool.

    Raises:
        ValueError: when the two have different shapes.
    """
    if attention_mask is None:
        mask = torch.ones_like(input_ids, dtype=torch.bool)
    elif attention_mask.shape == input_ids.shape:
        mask = attention_mask.bool()
    else:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    return mask if include_first else mask & (mask.cumsum(-1) > 1)


def next_token_mask(mask: Tensor) -> Tensor:
    """True where a prediction counts: where a position and its next one both do.

    Args:
        mask: which positions count, (batch, tokens) bool.

    Returns:
        (batch, tokens − 1) bool: of every position but the last.
    """
    return mask[:, :-1] & mask[:, 1:]

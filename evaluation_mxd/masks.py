"""The one definition of which positions count, in training and in evaluation."""

import torch
from torch import Tensor


def token_mask(input_ids: Tensor, attention_mask: Tensor | None = None, include_first: bool = True) -> Tensor:
    """True where a position counts: everything that is not padding.

    Args:
        input_ids: token ids, (batch, tokens).
        attention_mask: 1 where a token is not padding, (batch, tokens); None when there is no padding.
        include_first: off, each row's first unpadded position is left out too. That is where BOS stands: an
            attention sink, whose activations have an extreme norm in many models. It is told by its position, so
            that a BOS id of 0, or a tokenizer without BOS, makes no difference.

    Returns:
        (batch, tokens) bool.
    """
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if include_first:
        return mask
    return mask & (mask.cumsum(-1) > 1)

"""Losses on next-token logits that never hold all logits.

With vocabularies of 50,000 to 260,000 the logits of a batch are its largest tensor, and a divergence of two models
takes many of their size. Here both models run only as far as their last hidden states, (batch, tokens, hidden); logits
are computed for a chunk of tokens at a time, with that chunk's loss and its gradient for the hidden states.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from mxd.evaluation.metrics import CHUNK_ELEMENTS


class LanguageModelHead:
    """A causal language model in two parts: its body, which returns hidden states, and its head, which returns logits.

    The head is the output embedding, with the soft cap of the config if there is one. A short forward pass checks that;
    where it does not hold, the "hidden states" are the logits themselves, and only the copies are saved. The output
    embedding must be frozen: `chunked_sum` gives it no gradient.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.output: nn.Module | None = model.get_output_embeddings()
        self.body: nn.Module = model.get_decoder()  # OPT calls this part of its base model, not the base model
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        probe = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=model.device), "use_cache": False}
        whole = model(**probe).logits
        self.chunk = max(1, CHUNK_ELEMENTS // whole.shape[-1])  # tokens whose logits are computed at a time
        if self.output is not None:
            kept = self._kept(model, probe)
            made = self.logits(kept[0]) if kept else whole[:0]
            if made.shape != whole.shape or not torch.allclose(made.float(), whole.float(), rtol=1e-2, atol=1e-2):
                self.output = None

    def hidden(self, run: Callable[..., Any], input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the last hidden states (batch, tokens, hidden) of `run`: the model, or what calls it, such as DDP."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.output is not None:
            return self._kept(run, inputs)[0]
        logits: Tensor = run(**inputs).logits
        return logits

    def _kept(self, run: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
        """Return the body's output in a forward pass; empty if the model does not call the body."""
        kept: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept.append(output[0])

        with self.body.register_forward_hook(keep):
            run(**inputs, logits_to_keep=1)
        return kept

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (…, vocabulary) for hidden states (…, hidden)."""
        if self.output is None:
            return hidden
        logits: Tensor = self.output(hidden)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


ChunkLoss = Callable[..., Tensor]
"""Maps a chunk of hidden states (chunk, hidden), and of every other tensor, to the sum of the tokens' losses."""


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: ChunkLoss, chunk: int, *others: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        grad = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            # The graph of a chunk ends here: only its loss and gradient are kept of its logits.
            with torch.set_grad_enabled(grad is not None):
                leaf = hidden[part].detach().requires_grad_(grad is not None)
                value = loss(leaf, *(other[part] for other in others))
            if grad is not None:
                (grad[part],) = torch.autograd.grad(value, leaf)
            total += value.detach()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_output.to(grad.dtype), *[None] * (len(ctx.needs_input_grad) - 1))


def chunked_sum(loss: ChunkLoss, chunk: int, hidden: Tensor, *others: Tensor) -> Tensor:
    """Return Σ over chunks of loss(hidden[chunk], *others[chunk]), with a gradient for `hidden` only.

    Args:
        loss: See `ChunkLoss`; the parameters that it uses must be frozen.
        chunk: Tokens at a time.
        hidden: (tokens, hidden).
        others: Further tensors (tokens, …), without gradients.
    """
    return _ChunkedSum.apply(hidden, loss, chunk, *others)

"""Definitions of the metrics, each once: sums in float64 over batches, the ratio last."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class ErrorSums:
    """Errors of a layer's output over tokens, streamed.

        NMSE = mean_t ‖ŷ_t − y_t‖² / ‖y_t‖²                   (paper's normalised error; tokens with y = 0 left out)
        FVU  = Σ_t ‖ŷ_t − y_t‖² / Σ_t ‖y_t − ȳ‖²              ȳ the mean output over the same tokens

    NMSE weighs every token alike, FVU by its norm.
    """

    tokens: int = 0
    ratios: float = 0.0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    total: Tensor | float = field(default=0.0)
    """Σ_t y_t, (O), float64"""

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add tokens: ŷ and y, both (tokens, O)."""
        target = target.double()
        norm = target.square().sum(-1)
        counted = norm > 0
        error = (prediction.double() - target).square().sum(-1)
        self.tokens += int(counted.sum())
        self.ratios += float((error[counted] / norm[counted]).sum())
        self.squared_error += float(error.sum())
        self.squared_norm += float(norm.sum())
        self.total = self.total + target.sum(0)
        self._all_tokens = getattr(self, "_all_tokens", 0) + len(target)

    @property
    def nmse(self) -> float:
        """Mean over tokens of the normalised squared error; 0 is exact, 1 is what an output of zero gets."""
        return self.ratios / self.tokens if self.tokens else float("nan")

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; 0 is exact, 1 is what the mean output gets."""
        if not isinstance(self.total, Tensor):
            return float("nan")
        variance = self.squared_norm - float(self.total.square().sum()) / self._all_tokens
        return self.squared_error / variance if variance > 0 else float("nan")


def explained_share(error: float, ablated_error: float) -> float:
    """Share of what a layer explains that is lost when a part of it is ablated: (e_ablated − e) / (1 − e)."""
    return (ablated_error - error) / (1 - error) if error < 1 else float("nan")


@dataclass
class LogitSums:
    """Next-token metrics of one model, and against a reference model, streamed.

    cross-entropy = −mean log p(next token)               nats per token
    KL            = mean Σ_v p_ref(v) log(p_ref(v) / p(v))  nats per token
    agreement     = share of tokens at which both have the same most likely next token
    """

    targets: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    agreements: int = 0

    def update(self, logits: Tensor, input_ids: Tensor, mask: Tensor, reference: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: (batch, tokens, vocabulary).
            input_ids: (batch, tokens).
            mask: (batch, tokens) bool, True where not padding. A position counts when it and its next token do.
            reference: logits of the reference model, or None for the loss alone.
        """
        for row in range(len(input_ids)):  # a row at a time: no second (batch, tokens, vocabulary) tensor is alive
            counted = mask[row, :-1] & mask[row, 1:]
            log_p = F.log_softmax(logits[row, :-1][counted].float(), dim=-1)
            targets = input_ids[row, 1:][counted]
            self.targets += len(targets)
            self.loss -= float(log_p.gather(-1, targets.unsqueeze(-1)).double().sum())
            if reference is not None:
                log_q = F.log_softmax(reference[row, :-1][counted].float(), dim=-1)
                self.divergence += float(
                    F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).double().sum()
                )
                self.agreements += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    @property
    def cross_entropy(self) -> float:
        """Nats per token."""
        return self.loss / self.targets if self.targets else float("nan")

    @property
    def kl(self) -> float:
        """KL(reference ‖ this model), nats per token."""
        return self.divergence / self.targets if self.targets else float("nan")

    @property
    def agreement(self) -> float:
        """Share of tokens with the reference's most likely next token."""
        return self.agreements / self.targets if self.targets else float("nan")


def recovered_share(untouched: float, spliced: float, zero_ablated: float) -> float:
    """(CE_zero − CE_spliced) / (CE_zero − CE_untouched): 1 as good as the original MLP, 0 as bad as none."""
    gap = zero_ablated - untouched
    return (zero_ablated - spliced) / gap if gap else float("nan")


def normalised_entropy(counts: Tensor) -> float:
    """−Σ_n p_n log p_n / log N with p = counts / Σ counts, (N): 1 when all are used alike, 0 when only one is."""
    shares = counts.double() / counts.sum().clamp_min(1)
    entropy = -torch.special.xlogy(shares, shares).sum()
    return float(entropy / torch.log(torch.tensor(float(len(counts))))) if len(counts) > 1 else 0.0

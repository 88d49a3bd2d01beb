"""Definitions of the metrics, each once: functions of a token, sums in float64 over batches, the ratio last."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mxd.base.masks import next_token_mask

# Elements of the largest temporary made of logits: 64 MiB in float32.
CHUNK_ELEMENTS = 2**24


def squared_norm(x: Tensor) -> Tensor:
    """‖x_t‖² in float64; (..., O) → (...)."""
    return x.double().square().sum(-1)


def normalised_error(prediction: Tensor, target: Tensor) -> Tensor:
    """‖ŷ_t − y_t‖² / ‖y_t‖² of every token (the paper's normalised error), in float64; NaN where y_t = 0.

    Args:
        prediction: ŷ, (..., O).
        target: y, (..., O).

    Returns:
        (...).
    """
    norm = squared_norm(target)
    return torch.where(norm > 0, squared_norm(prediction.double() - target.double()) / norm, torch.nan)


def next_token_loss(log_p: Tensor, targets: Tensor) -> Tensor:
    """−log p(next token), nats.

    Args:
        log_p: log-probabilities, (..., vocabulary).
        targets: ids of the next tokens, (...).

    Returns:
        (...).
    """
    return -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def kl_divergence(log_reference: Tensor, log_p: Tensor) -> Tensor:
    """KL(ref ‖ p) = Σ_v p_ref(v) (log p_ref(v) − log p(v)), nats; log-probabilities (..., vocabulary) → (...).
    Tokens that the reference rules out (log-probability −inf, as where a model masks some) count 0."""
    terms = F.kl_div(log_p, log_reference, log_target=True, reduction="none")
    return terms.masked_fill(log_reference == -torch.inf, 0.0).sum(-1)


def explained_share(error: float, ablated_error: float) -> float:
    """Share of what a layer explains that is lost when a part of it is ablated: (e_ablated − e) / (1 − e).

    NaN for a layer that explains nothing (e ≥ 1).
    """
    return (ablated_error - error) / (1 - error) if error < 1 else math.nan


def recovered_share(untouched: float, spliced: float, zero_ablated: float) -> float:
    """(CE_zero − CE_spliced) / (CE_zero − CE_untouched): 1 as good as the original MLP, 0 as bad as none.

    NaN when zeros do no harm, or even help.
    """
    gap = zero_ablated - untouched
    return (zero_ablated - spliced) / gap if gap > 0 else math.nan


def normalised_entropy(counts: Tensor) -> float:
    """−Σ_n p_n log p_n / log N with p = counts / Σ counts, (N): 1 when all are used alike, 0 when only one is.

    NaN for a single expert, or when none was ever used.
    """
    total = counts.double().sum()
    if len(counts) < 2 or total == 0:
        return math.nan
    shares = counts.double() / total
    return float(torch.special.entr(shares).sum()) / math.log(len(counts))


class ErrorSums:
    """Errors of a layer's output over tokens, streamed.

        NMSE = mean_t ‖ŷ_t − y_t‖² / ‖y_t‖²                   tokens with y_t = 0, which have no ratio, left out
        FVU  = Σ_t ‖ŷ_t − y_t‖² / Σ_t ‖y_t − ȳ‖²              ȳ the mean output over the same tokens
        clipped NMSE = mean_t min(1, ‖ŷ_t − y_t‖² / ‖y_t‖²)

    NMSE weighs every token alike, but a single one's error has no bound; clipped, a token that is worse than an output
    of zero counts as one. In FVU a token weighs as much as it is far from the mean.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._nonzero_tokens = 0
        self._ratios = 0.0
        self._clipped_ratios = 0.0
        self._squared_error = 0.0
        # Deviations are from the first token, so that Σ‖d‖² − ‖Σd‖²/n is exact where y does not vary at all.
        self._origin: Tensor | None = None
        self._deviation: Tensor | None = None
        self._squared_deviation = 0.0

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add tokens: ŷ and y, both (..., O)."""
        prediction, target = prediction.flatten(0, -2).double(), target.flatten(0, -2).double()
        if not len(target):
            return
        if self._origin is None:
            self._origin, self._deviation = target[0].clone(), torch.zeros_like(target[0])
        assert self._deviation is not None
        ratios = normalised_error(prediction, target)
        nonzero = squared_norm(target) > 0
        self.tokens += len(target)
        self._nonzero_tokens += int(nonzero.sum())
        self._ratios += float(ratios[nonzero].sum())
        self._clipped_ratios += float(ratios[nonzero].clamp_max(1).sum())
        self._squared_error += float(squared_norm(prediction - target).sum())
        deviation = target - self._origin
        self._deviation = self._deviation + deviation.sum(0)
        self._squared_deviation += float(squared_norm(deviation).sum())

    @property
    def nmse(self) -> float:
        """Mean over tokens of the normalised squared error; 0 is exact, 1 is what an output of zero gets.

        NaN when there is no token with y ≠ 0.
        """
        return self._ratios / self._nonzero_tokens if self._nonzero_tokens else math.nan

    @property
    def clipped_nmse(self) -> float:
        """Mean over tokens of the normalised squared error, of which each counts at most 1; NaN as `nmse`."""
        return self._clipped_ratios / self._nonzero_tokens if self._nonzero_tokens else math.nan

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; 0 is exact, 1 is what the mean output gets. NaN without variance."""
        if self._deviation is None:
            return math.nan
        variance = self._squared_deviation - float(squared_norm(self._deviation)) / self.tokens
        return self._squared_error / variance if variance > 0 else math.nan


class LogitSums:
    """Next-token metrics of one model, and against a reference model, streamed.

    cross-entropy = mean −log p(next token)                            nats per token
    KL            = mean Σ_v p_ref(v) (log p_ref(v) − log p(v))        nats per token
    agreement     = share of tokens at which both have the same most likely next token

    Probabilities are a float32 log-softmax of a chunk of tokens at a time: no second (batch, tokens, vocabulary)
    tensor is ever alive.
    """

    def __init__(self) -> None:
        self.targets = 0
        self._compared = 0
        self._loss = 0.0
        self._divergence = 0.0
        self._agreements = 0

    def update(self, logits: Tensor, input_ids: Tensor, mask: Tensor, reference: Tensor | None = None) -> Tensor:
        """Add a batch.

        Args:
            logits: (batch, tokens, vocabulary).
            input_ids: (batch, tokens).
            mask: (batch, tokens) bool, True where not padding. A position counts when it and its next token do.
            reference: logits of the reference model, or None for the loss alone.

        Returns:
            −log p(next token), (batch, tokens − 1) float64, 0 where a position does not count.
        """
        input_ids, mask = input_ids.to(logits.device), mask.to(logits.device)
        losses = logits.new_zeros(len(mask), mask.shape[1] - 1, dtype=torch.float64)
        rows, columns = next_token_mask(mask).nonzero(as_tuple=True)
        chunk = max(1, CHUNK_ELEMENTS // logits.shape[-1])
        for row, column in zip(rows.split(chunk), columns.split(chunk), strict=True):
            part = logits[row, column]
            log_p = F.log_softmax(part.float(), dim=-1)
            self.targets += len(row)
            losses[row, column] = next_token_loss(log_p, input_ids[row, column + 1]).double()
            if reference is not None:
                self._compare(part, log_p, reference[row, column])
        self._loss += float(losses.sum())
        return losses

    def _compare(self, logits: Tensor, log_p: Tensor, reference: Tensor) -> None:
        log_reference = F.log_softmax(reference.float(), dim=-1)
        self._compared += len(logits)
        self._divergence += float(kl_divergence(log_reference, log_p).double().sum())
        self._agreements += int((logits.argmax(-1) == reference.argmax(-1)).sum())

    @property
    def cross_entropy(self) -> float:
        """Nats per token; NaN when no token has a next one."""
        return self._loss / self.targets if self.targets else math.nan

    @property
    def kl(self) -> float:
        """KL(reference ‖ this model), nats per token; NaN without a reference."""
        return self._divergence / self._compared if self._compared else math.nan

    @property
    def agreement(self) -> float:
        """Share of tokens with the reference's most likely next token; NaN without a reference."""
        return self._agreements / self._compared if self._compared else math.nan

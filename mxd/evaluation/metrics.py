"""Define every metric once: functions per token, sums in float64 over batches, the ratio last."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mxd.base.masks import next_token_mask

# Elements of the largest temporary made from logits: 64 MiB in float32.
CHUNK_ELEMENTS = 2**24
# Nats per token by which zero-ablation must raise the cross-entropy for a share of it to be told.
LEAST_ABLATION_RISE = 0.01
LEAST_EXPERT_SHARE = 0.2


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def squared_norm(x: Tensor) -> Tensor:
    """Return ‖x_t‖² in float64; (..., O) → (...)."""
    return x.double().square().sum(-1)


def normalised_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return ‖ŷ_t − y_t‖² / ‖y_t‖² of every token (the paper's normalised error), in float64; NaN if y_t = 0.

    ŷ and y (..., O) → (...).
    """
    norm = squared_norm(target)
    return torch.where(norm > 0, squared_norm(prediction.double() - target.double()) / norm, torch.nan)


def next_token_loss(log_p: Tensor, targets: Tensor) -> Tensor:
    """Return −log p(next token) in nats.

    Log-probabilities (..., vocabulary) and ids of the next tokens (...) → (...).
    """
    return -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def kl_divergence(log_reference: Tensor, log_p: Tensor) -> Tensor:
    """Return KL(ref ‖ p) = Σ_v p_ref(v) (log p_ref(v) − log p(v)) in nats.

    Log-probabilities (..., vocabulary) → (...). Tokens with reference log-probability −inf count 0.
    """
    terms = F.kl_div(log_p, log_reference, log_target=True, reduction="none")
    return terms.masked_fill(log_reference == -torch.inf, 0.0).sum(-1)


def explained_share(error: float, ablated_error: float) -> float:
    """Return the share of a layer's explained error that an ablation loses, (e_ablated − e) / (1 − e); NaN if e ≥ 1."""
    return _ratio(ablated_error - error, 1 - error)


def recovered_share(untouched: float, spliced: float, zero_ablated: float) -> float:
    """Return (CE_zero − CE_spliced) / (CE_zero − CE_untouched): 1 for the original MLP, 0 for no MLP.

    NaN if zero-ablation raises the cross-entropy by less than `LEAST_ABLATION_RISE`: noise would decide.
    """
    rise = zero_ablated - untouched
    return (zero_ablated - spliced) / rise if rise >= LEAST_ABLATION_RISE else math.nan


def weak_experts(rows: Mapping[str, Any]) -> str:
    """Return a warning that names the rows whose `expert_share` is below `LEAST_EXPERT_SHARE`; empty without any."""
    shares = {name: row.get("expert_share") for name, row in rows.items()}
    weak = [
        f"{name} ({100 * share:.3g} %)"
        for name, share in shares.items()
        if isinstance(share, int | float) and share < LEAST_EXPERT_SHARE
    ]
    below = f"the expert share is below {100 * LEAST_EXPERT_SHARE:.0f} % in {', '.join(weak)}"
    advice = "train on more tokens, or measure on text like that of the training"
    return f"the dense part does the work, not the experts: {below}; {advice}" if weak else ""


def normalised_entropy(counts: Tensor) -> float:
    """Return −Σ_n p_n log p_n / log N with p = counts / Σ counts, (N): 1 for uniform use, 0 if only one is used.

    NaN for a single expert, or if none was ever used.
    """
    total = counts.double().sum()
    if len(counts) < 2 or total == 0:
        return math.nan
    shares = counts.double() / total
    return float(torch.special.entr(shares).sum()) / math.log(len(counts))


class ErrorSums:
    """Sum the errors of a layer's output, streamed over tokens.

        NMSE = mean_t ‖ŷ_t − y_t‖² / ‖y_t‖²                   without tokens with y_t = 0
        FVU  = Σ_t ‖ŷ_t − y_t‖² / Σ_t ‖y_t − ȳ‖²              ȳ the mean output over the same tokens
        clipped NMSE = mean_t min(1, ‖ŷ_t − y_t‖² / ‖y_t‖²)

    NMSE weighs all tokens equally, but the error of one token has no bound; clipped, it counts at most as much as an
    output of zero. In FVU a token weighs by its squared distance from the mean.
    """

    def __init__(self) -> None:
        self.tokens = self._nonzero_tokens = 0
        self._ratios = self._clipped_ratios = self._squared_error = self._squared_deviation = 0.0
        # Deviations are from the first token, so that Σ‖d‖² − ‖Σd‖²/n is exactly 0 if y does not vary.
        self._origin = self._deviation = torch.zeros(0)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add tokens: ŷ and y, both (..., O)."""
        prediction, target = prediction.flatten(0, -2).double(), target.flatten(0, -2).double()
        if not len(target):
            return
        if not self.tokens:
            self._origin, self._deviation = target[0].clone(), torch.zeros_like(target[0])
        ratios = normalised_error(prediction, target)
        ratios = ratios[squared_norm(target) > 0]
        self.tokens += len(target)
        self._nonzero_tokens += len(ratios)
        self._ratios += float(ratios.sum())
        self._clipped_ratios += float(ratios.clamp_max(1).sum())
        self._squared_error += float(squared_norm(prediction - target).sum())
        deviation = target - self._origin
        self._deviation = self._deviation + deviation.sum(0)
        self._squared_deviation += float(squared_norm(deviation).sum())

    @property
    def nmse(self) -> float:
        """Return the NMSE: 0 for an exact output, 1 for an output of zero; NaN without a token with y ≠ 0."""
        return _ratio(self._ratios, self._nonzero_tokens)

    @property
    def clipped_nmse(self) -> float:
        """Return the clipped NMSE; NaN without a token with y ≠ 0."""
        return _ratio(self._clipped_ratios, self._nonzero_tokens)

    @property
    def fvu(self) -> float:
        """Return the fraction of variance unexplained: 0 for an exact output, 1 for the mean; NaN without variance."""
        variance = self._squared_deviation - float(squared_norm(self._deviation)) / max(self.tokens, 1)
        return _ratio(self._squared_error, variance)


class LogitSums:
    """Sum next-token metrics of one model, and against a reference model, streamed over batches.

    cross-entropy = mean −log p(next token)                            nats per token
    KL            = mean Σ_v p_ref(v) (log p_ref(v) − log p(v))        nats per token
    agreement     = share of tokens at which both have the same most likely next token

    The log-softmax is in float32, over a chunk of tokens at a time: there is never a second (batch, tokens,
    vocabulary) tensor.
    """

    def __init__(self) -> None:
        self.targets = self._compared = self._agreements = 0
        self._loss = self._divergence = 0.0

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
        """Return nats per token; NaN if no token has a next one."""
        return _ratio(self._loss, self.targets)

    @property
    def kl(self) -> float:
        """Return KL(reference ‖ this model), nats per token; NaN without a reference."""
        return _ratio(self._divergence, self._compared)

    @property
    def agreement(self) -> float:
        """Return the share of tokens with the reference's most likely next token; NaN without a reference."""
        return _ratio(self._agreements, self._compared)

"""Compare the cross-entropies of two models token by token, with a confidence interval."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

_QUANTILE = NormalDist().inv_cdf(0.975)


def half_width(interval: Sequence[float | None] | None) -> float | None:
    """Return half the width of an interval; None if there is none, or it is not defined."""
    low, high = interval or (None, None)
    return None if low is None or high is None else (high - low) / 2


class PairedDifference:
    """Mean difference d of two models' losses on the same tokens, streamed, with its clustered standard error.

        mean = Σ_r S_r / T        S_r = Σ_t d_rt over the n_r tokens of row r,  T = Σ_r n_r
        SE²  = G / (G − 1) · Σ_r (S_r − mean · n_r)² / T²                        G rows that have a token

    Tokens of one row are dependent, so the clusters are the rows of the batches. Several rows of one long document
    count as independent, which makes the interval too narrow.

    Source: Cameron and Miller, "A Practitioner's Guide to Cluster-Robust Inference" (2015).
    """

    def __init__(self) -> None:
        self._sums = [torch.zeros(0, dtype=torch.float64)]
        self._counts = [torch.zeros(0, dtype=torch.int64)]

    def update(self, difference: Tensor, counted: Tensor) -> None:
        """Add rows: d and the mask of the tokens that count, both (batch, tokens)."""
        counted = counted.to(difference.device)
        self._sums.append(torch.where(counted, difference.double(), 0.0).sum(-1).cpu())
        self._counts.append(counted.sum(-1).cpu())

    def _rows(self) -> tuple[Tensor, Tensor]:
        sums, counts = torch.cat(self._sums), torch.cat(self._counts)
        return sums[counts > 0], counts[counts > 0]

    @property
    def mean(self) -> float:
        """Return the mean over tokens; NaN without a token."""
        sums, counts = self._rows()
        return float(sums.sum() / counts.sum()) if len(sums) else math.nan

    @property
    def standard_error(self) -> float:
        """Return SE; NaN with fewer than two rows."""
        sums, counts = self._rows()
        rows = len(sums)
        if rows < 2:
            return math.nan
        residuals = sums - self.mean * counts
        return math.sqrt(rows / (rows - 1) * float(residuals.square().sum())) / int(counts.sum())

    @property
    def interval(self) -> list[float]:
        """Return the 95 % interval, mean ± 1.96 standard errors (a normal approximation for dozens of rows or more)."""
        half = _QUANTILE * self.standard_error
        return [self.mean - half, self.mean + half]

"""Measure the rank of experts: W_n = D diag(c_n) keeps the rank of D if c_n has no zero (paper, Lemma 1)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxd.base.progress import progress_bar
from mxd.modeling_mxd import MxDLayer, MxDModel

SAMPLED_EXPERTS = 64
_BATCH_ELEMENTS = 2**23  # of the matrices of one SVD call: 64 MiB in float64


@dataclass(frozen=True)
class ExpertRanks:
    """Ranks of a sample of a layer's experts.

    Attributes:
        experts: indices of the sample, (S) int64, ascending.
        normalised_rank: rank of W_n / min(H, O), (S) float64.
        smallest, largest: extreme singular values among the min(H, O) of W_n, (S) float64.
        zeros: share of entries that are exactly 0, in C of all N experts.
        experts_with_zeros: number of experts with a zero in c_n, of all N.
    """

    experts: Tensor
    normalised_rank: Tensor
    smallest: Tensor
    largest: Tensor
    zeros: float
    experts_with_zeros: int

    def summary(self) -> dict[str, Any]:
        """Return the numbers of evaluation.json; singular values as {"minimum", "median", "maximum"} of the sample."""
        return {
            "experts": len(self.experts),
            "normalised_rank": float(self.normalised_rank.mean()),
            "minimum_normalised_rank": float(self.normalised_rank.min()),
            "smallest_singular_value": _spread(self.smallest),
            "largest_singular_value": _spread(self.largest),
            "zeros": self.zeros,
            "experts_with_zeros": self.experts_with_zeros,
        }


def _spread(values: Tensor) -> dict[str, float]:
    quantiles = {"minimum": 0.0, "median": 0.5, "maximum": 1.0}
    return {name: float(values.quantile(quantile)) for name, quantile in quantiles.items()}


@torch.no_grad()
def expert_ranks(layer: MxDLayer, experts: int = SAMPLED_EXPERTS, seed: int = 0) -> ExpertRanks:
    """Compute rank and extreme singular values of experts W_n = D diag(c_n).

    D = QR is factored once: R diag(c_n), at most (O, O), has the singular values of W_n. Everything is in float64, and
    nothing is squared (as in DᵀD), so that small singular values keep their digits. A singular value counts towards the
    rank if it is over max(H, O) · ε · the largest one, as in `torch.linalg.matrix_rank`, with ε of the weights' dtype
    or of float32, whichever is finer.

    Args:
        layer: an MxD layer.
        experts: number of experts to sample at random; all of them if there are fewer.
        seed: seed of the sample.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(layer.config.num_experts, generator=generator)[:experts].sort().values
    table, decoder = layer.modulation.detach().cpu(), layer.decoder.weight.detach().cpu()  # (N, O), Dᵀ (O, H)
    dtype = torch.promote_types(decoder.dtype, torch.float32)
    triangle = torch.linalg.qr(decoder.double().T, mode="r").R  # (min(H, O), O)
    size = max(1, _BATCH_ELEMENTS // triangle.numel())
    values = torch.cat(
        [torch.linalg.svdvals(triangle * table[part].double().unsqueeze(1)) for part in chosen.split(size)]
    )  # (S, min(H, O))
    rank = (values > max(decoder.shape) * torch.finfo(dtype).eps * values[:, :1]).double().mean(-1)
    zeros = table == 0
    share, count = float(zeros.double().mean()), int(zeros.any(-1).sum())
    return ExpertRanks(
        chosen, rank, smallest=values[:, -1], largest=values[:, 0], zeros=share, experts_with_zeros=count
    )


def decomposition_ranks(
    decomposition: MxDModel, experts: int = SAMPLED_EXPERTS, seed: int = 0, progress: bool = False
) -> dict[int, ExpertRanks]:
    """Return {layer: `expert_ranks`} of the MxD layers of a decomposition; `progress` shows a bar."""
    indices = progress_bar(decomposition.config.layers, desc="ranks", unit="layer", show=progress)
    layers = ((index, decomposition.layer(index)) for index in indices)
    return {index: expert_ranks(layer, experts, seed) for index, layer in layers if isinstance(layer, MxDLayer)}

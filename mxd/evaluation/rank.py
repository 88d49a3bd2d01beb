"""The rank of experts: an MxD's experts W_n = D diag(c_n) keep the rank of D where c_n has no zero (paper, Lemma 1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxd.modeling_mxd import MxDLayer, MxDModel

SAMPLED_EXPERTS = 64
# Elements of a batch of matrices whose singular values are taken at once: 64 MiB in float64.
_BATCH_ELEMENTS = 2**23


@dataclass(frozen=True)
class ExpertRanks:
    """Ranks of a sample of a layer's experts.

    Attributes:
        experts: which experts, (S) int64, ascending.
        normalised_rank: rank of W_n / min(H, O), (S) float64.
        smallest: smallest of the min(H, O) singular values of W_n, (S) float64.
        largest: the largest, (S) float64.
        zeros: entries of c_n that are exactly 0, of all N experts, (N) int64; Lemma 1 asks for none.
        output_size: O.
    """

    experts: Tensor
    normalised_rank: Tensor
    smallest: Tensor
    largest: Tensor
    zeros: Tensor
    output_size: int

    @property
    def share_of_zeros(self) -> float:
        """Zeros among all N · O entries of C."""
        return float(self.zeros.sum()) / (len(self.zeros) * self.output_size)

    def summary(self) -> dict[str, Any]:
        """The numbers of evaluation.json.

        Returns:
            `experts`: how many were sampled, S. `normalised_rank`: mean over them, `minimum_normalised_rank` the least.
            `smallest_singular_value`: {"minimum", "median", "maximum"} over them, `largest_singular_value` alike.
            `zeros`: see `share_of_zeros`. `experts_with_zeros`: of the N experts.
        """
        return {
            "experts": len(self.experts),
            "normalised_rank": float(self.normalised_rank.mean()),
            "minimum_normalised_rank": float(self.normalised_rank.min()),
            "smallest_singular_value": _spread(self.smallest),
            "largest_singular_value": _spread(self.largest),
            "zeros": self.share_of_zeros,
            "experts_with_zeros": int((self.zeros > 0).sum()),
        }


def _spread(values: Tensor) -> dict[str, float]:
    middle = float(values.quantile(0.5))
    return {"minimum": float(values.min()), "median": middle, "maximum": float(values.max())}


@torch.no_grad()
def expert_ranks(layer: MxDLayer, experts: int | Sequence[int] = SAMPLED_EXPERTS, seed: int = 0) -> ExpertRanks:
    """Rank and extreme singular values of experts W_n = D diag(c_n).

    D = QR is factored once: R diag(c_n), at most (O, O), has the singular values of W_n. All is in float64, and nothing
    is squared, as it would be in DᵀD, so that small singular values keep their digits. A singular value counts
    towards the rank when it is over max(H, O) · ε · the largest one, as in `torch.linalg.matrix_rank`, where ε is that
    of the weights' dtype, or of float32 where that is coarser.

    Args:
        layer: an MxD layer.
        experts: how many to sample at random, all of them when there are fewer; or the experts' indices.
        seed: of the sample.

    Raises:
        ValueError: when the layer is no MxD, which has no matrices for experts, or an expert does not exist.
    """
    if not isinstance(layer, MxDLayer):
        raise ValueError(f"only an MxD has experts with a rank: a latent of a {layer.config.method} is one vector")
    count = layer.config.num_experts
    chosen = _chosen(experts, count, seed)
    table, decoder = layer.modulation.detach().cpu(), layer.decoder.weight.detach().cpu()  # (N, O), Dᵀ (O, H)
    dtype = decoder.dtype if decoder.dtype == torch.float64 else torch.float32
    outputs, units = decoder.shape
    triangle = torch.linalg.qr(decoder.double().T, mode="r").R  # (min(H, O), O)
    size = max(1, _BATCH_ELEMENTS // triangle.numel())
    values = torch.cat(
        [torch.linalg.svdvals(triangle * table[part].double().unsqueeze(1)) for part in chosen.split(size)]
    )  # (S, min(H, O))
    tolerance = max(units, outputs) * torch.finfo(dtype).eps * values[:, :1]
    return ExpertRanks(
        experts=chosen,
        normalised_rank=(values > tolerance).double().mean(-1),
        smallest=values[:, -1],
        largest=values[:, 0],
        zeros=(table == 0).sum(-1),
        output_size=outputs,
    )


def _chosen(experts: int | Sequence[int], count: int, seed: int) -> Tensor:
    if isinstance(experts, int):
        if experts < 1:
            raise ValueError(f"at least one expert must be sampled, got {experts}")
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(count, generator=generator)[:experts].sort().values
    chosen = torch.tensor(sorted(set(experts)), dtype=torch.int64)
    if not len(chosen) or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"experts must be indices from 0 to {count - 1}, at least one; got {list(experts)[:10]}")
    return chosen


def decomposition_ranks(
    decomposition: MxDModel, experts: int = SAMPLED_EXPERTS, seed: int = 0
) -> dict[int, ExpertRanks]:
    """`expert_ranks` of every MxD layer of a decomposition, {layer: ranks}; transcoders, which have none, left out."""
    layers = {index: decomposition.layer(index) for index in decomposition.config.layers}
    return {index: expert_ranks(layer, experts, seed) for index, layer in layers.items() if isinstance(layer, MxDLayer)}

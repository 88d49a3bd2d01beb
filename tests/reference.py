"""The layers written as the paper's equations, dense and slow: what the fast path is tested against."""

import torch
from torch import Tensor

from mxd.modeling_mxd.layers import MxDLayer, TranscoderLayer


def dense_coefficients(layer: MxDLayer | TranscoderLayer, x: Tensor) -> Tensor:
    """a = TopK(ReLU(Gx + g)), dense: (..., I) → (..., N). With a router only the experts in open groups compete."""
    a = torch.relu(x @ layer.gate.weight.T + (0 if layer.gate.bias is None else layer.gate.bias))
    if layer.router is not None:
        r = x @ layer.router.weight.T + layer.router.bias
        groups = r.topk(layer.config.num_groups_per_tok or r.shape[-1], dim=-1).indices
        group_of_expert = torch.arange(layer.config.num_experts, device=x.device) // layer.config.expert_group_size
        a = a * (groups[..., None, :] == group_of_expert[:, None]).any(-1)  # (..., 1, M), (N, 1) → (..., N)
    kept = a.topk(layer.config.num_experts_per_tok, dim=-1)
    return torch.zeros_like(a).scatter(-1, kept.indices, kept.values)


def reference_forward(layer: MxDLayer | TranscoderLayer, x: Tensor) -> Tensor:
    """y = (Cᵀa) * (Dᵀz) + b, or y = Cᵀa (+ Sᵀx) + b for the transcoders; (..., I) → (..., O)."""
    a = dense_coefficients(layer, x)
    bias = 0 if layer.output_bias is None else layer.output_bias
    if isinstance(layer, MxDLayer):
        return (a @ layer.modulation) * (layer.hidden(x) @ layer.decoder.weight.T) + bias
    skip = 0 if layer.skip is None else x @ layer.skip.weight.T
    return a @ layer.decoder + skip + bias


def explicit_mixture(layer: MxDLayer, x: Tensor) -> Tensor:
    """y = Σ_n a_n W_nᵀ z + b with every expert's matrix W_n = D diag(c_n) built (paper eq. 3)."""
    a, z = dense_coefficients(layer, x), layer.hidden(x)
    weights = torch.stack([layer.expert_weight(n) for n in range(layer.config.num_experts)])  # (N, H, O)
    y = torch.einsum("...n,nho,...h->...o", a, weights, z)
    return y if layer.output_bias is None else y + layer.output_bias


def khatri_rao_unfolding(layer: MxDLayer) -> Tensor:
    """W_(3) = (C ⊙ D)ᵀ, (O, N·H): column n·H + h is c_n * d_h, ⊙ the column-wise Khatri-Rao product."""
    c, d = layer.modulation, layer.decoder.weight.T  # (N, O), (H, O)
    return torch.einsum("no,ho->nho", c, d).reshape(-1, c.shape[1]).T

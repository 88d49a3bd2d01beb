"""Read which experts are active on the tokens of a text, how much they contribute, and how unusual that is.

With y the layer's output, b its bias, and a_n v_n(x) what expert n adds to y (v_n(x) = c_n * (Dᵀz), of a transcoder its
decoder row):

    share_n  = a_n v_n(x) · (y − b) / ‖y − b‖²       the shares of all active experts sum to 1
    rarity_n = −log₂ ((T_n(a_n) + 1) / (T + 1))      bits

T is the number of tokens of a collection, T_n(a) that on which the expert's coefficient is at least a. A skip
transcoder's skip has a share too, so that its experts' shares sum to 1 less the skip's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mxd.base.capture import capture_mlps
from mxd.base.forward import evaluating
from mxd.modeling_mxd import ExpertCoefficients, MxDLayer, MxDModel, SparseLayer
from mxd.modeling_mxd.functional import row_products
from mxd.modeling_mxd.surgery import running_device

from .collection import ExpertCollection


class Inspection(NamedTuple):
    """The experts of one layer on the tokens of a text; K is the number of active experts, times the layer's runs."""

    experts: Tensor
    """(tokens, K) int64"""
    coefficients: Tensor
    """(tokens, K), 0 where fewer are active"""
    shares: Tensor
    """(tokens, K)"""
    rarity: Tensor
    """(tokens, K), in bits; 0 for experts that are not active"""

    def unusual(self) -> dict[int, tuple[float, int]]:
        """Return {expert: (its largest rarity after the first position, the position)}, the most unusual first."""
        found: dict[int, tuple[float, int]] = {}
        for position, (experts, bits) in enumerate(zip(self.experts.tolist(), self.rarity.tolist(), strict=True)):
            for expert, value in zip(experts, bits, strict=True):
                if position > 0 and value > found.get(expert, (0.0, 0))[0]:
                    found[expert] = (value, position)
        return dict(sorted(found.items(), key=lambda entry: -entry[1][0]))


@torch.no_grad()
def inspect_tokens(
    model: nn.Module, decomposition: MxDModel, ids: Sequence[int], collections: dict[int, ExpertCollection]
) -> dict[int, Inspection]:
    """Inspect the layers that `collections` names on the token ids of a text, on the untouched model's activations."""
    found: dict[int, Inspection] = {}
    with evaluating(model, decomposition):
        batch = torch.tensor([list(ids)], device=running_device(model))
        captured = capture_mlps(model, list(collections), batch, **decomposition.config.where)
        for layer, collection in collections.items():
            module = decomposition.layer(layer)
            x = captured[layer][0].to(module.expert_table.device, module.expert_table.dtype)  # (runs, tokens, I)
            coefficients = module.encode(x.flatten(0, 1))
            shares = output_shares(module, coefficients, x.flatten(0, 1)) / len(x)
            experts, values, shares = (
                part.view(len(x), x.shape[1], -1).transpose(0, 1).flatten(1).cpu()
                for part in (coefficients.indices, coefficients.values.float(), shares.float())
            )
            least = collection.at_least(experts, values)
            rarity = -((least + 1) / (collection.tokens + 1)).log2() * (values > 0)
            found[layer] = Inspection(experts, values, shares, rarity.float())
    return found


def output_shares(layer: SparseLayer, coefficients: ExpertCoefficients, x: Tensor) -> Tensor:
    """Return the share of each active expert in the layer's output, (T, K), for inputs x (T, I)."""
    y = layer.decode(coefficients, x)
    left = y if layer.output_bias is None else y - layer.output_bias
    dense = layer.decoder(layer.hidden(x)) if isinstance(layer, MxDLayer) else 1.0
    products = row_products(coefficients.indices, left * dense, layer.expert_table)
    return coefficients.values * products / left.square().sum(-1, keepdim=True).clamp_min(1e-30)


@torch.no_grad()
def last_token_outputs(
    model: nn.Module, decomposition: MxDModel, layer: int, places: Sequence[tuple[int, Sequence[int]]]
) -> Tensor:
    """Return what experts add to the MLP's output at the last tokens of rows, a_n v_n(x), (n, O) float32.

    `places` are pairs of an expert and a row of token ids. If the layer runs several times, its strongest run counts.
    """
    module, outputs = decomposition.layer(layer), []
    with evaluating(model, decomposition):
        for expert, ids in places:
            batch = torch.tensor([list(ids)], device=running_device(model))
            x = capture_mlps(model, [layer], batch, **decomposition.config.where)[layer][0][:, -1]
            x = x.to(module.expert_table.device, module.expert_table.dtype)
            values, indices = module.encode(x)
            strength, run = (values * (indices == expert)).sum(-1).max(0)
            output = strength * module.expert_table[expert]
            if isinstance(module, MxDLayer):
                output = output * module.decoder(module.hidden(x[run]))
            outputs.append(output.float().cpu())
    return torch.stack(outputs)

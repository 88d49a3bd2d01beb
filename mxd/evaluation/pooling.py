"""Pool an MLP's input, hidden units and output, and the coefficients of decompositions, to one vector per text.

All representations come from one pass of the model over the texts, up to the layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mxd.base.capture import capture_mlps
from mxd.base.forward import batch_for, evaluating
from mxd.base.masks import token_mask
from mxd.base.pretrained_weights import mlp_hidden_act, mlp_layout, mlp_weights, mlp_widths
from mxd.base.progress import progress_bar
from mxd.data.packing import CausalCollator
from mxd.modeling_mxd import ExpertCoefficients, MLPSite, SparseLayer, TranscoderLayer

from .metrics import squared_norm

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Features: TypeAlias = "np.ndarray | csr_array"
"""Pooled features: (texts, features) float32, a scipy CSR array if few are not zero."""
POOLINGS = ("mean", "max")
_TOLERANCE = 0.05  # of ‖ŷ − y‖ / ‖y‖, for neurons of a model in bfloat16


@dataclass(frozen=True)
class Representation:
    """Features of a token.

    Attributes:
        width: number of features.
        encode: function from x (tokens, I) and y (tokens, O), the MLP's input and output, to the features (tokens,
            width), or to the coefficients of the active features, which are all ≥ 0.
        directions: what a feature adds to the MLP's output per unit, (width, O); None if it has no direction.
    """

    width: int
    encode: Callable[[Tensor, Tensor], Tensor | ExpertCoefficients]
    directions: Tensor | None = None


def input_representation(site: MLPSite) -> Representation:
    """Represent a token by x, the MLP's input."""
    return Representation(_widths(site)[0], lambda x, y: x)


def output_representation(site: MLPSite) -> Representation:
    """Represent a token by y, the MLP's output."""
    return Representation(_widths(site)[2], lambda x, y: y)


def neuron_representation(site: MLPSite) -> Representation:
    """Represent a token by z, the MLP's hidden units, computed from x and checked against y.

    Raises:
        ValueError: the MLP is a mixture of experts, or its weights or activation are unknown.
    """
    layout, activation = mlp_layout(site), mlp_hidden_act(site)
    if layout is None or layout.experts is not None or layout.shared is not None or activation is None:
        raise ValueError(
            f"the hidden units of layer {site.layer} ({site.kind}) cannot be read: its weights or activation follow "
            "no known rule, or a router chooses among them; leave the neurons out"
        )
    weights = mlp_weights(site)

    def encode(x: Tensor, y: Tensor) -> Tensor:
        z = weights.hidden(x, ACT2FN[activation])
        error = squared_norm(F.linear(z, weights.decoder, weights.decoder_bias) - y).sum() / squared_norm(y).sum()
        if not error < _TOLERANCE**2:
            raise ValueError(f"the weights of layer {site.layer} do not give its outputs: leave the neurons out")
        return z

    return Representation(_widths(site)[1], encode, weights.decoder.T)


def expert_representation(layer: SparseLayer, directions: Tensor | None = None) -> Representation:
    """Represent a token by a, the coefficients of a decomposition's experts (a transcoder's latents).

    The direction of a transcoder's latent is its decoder row; those of an MxD's experts are stored beside it.
    """
    if directions is None and isinstance(layer, TranscoderLayer):
        directions = layer.decoder.detach()
    how = layer.config.num_experts, lambda x, y: layer.encode(x.to(layer.gate.weight.device))
    return Representation(*how, directions)


def _widths(site: MLPSite) -> tuple[int, int, int]:
    widths = mlp_widths(site)
    if widths is None:
        raise ValueError(f"the weights of layer {site.layer}, which set its widths, follow no known rule")
    return widths


@torch.no_grad()
def pool_features(
    model: nn.Module,
    layer: int,
    texts: Sequence[Sequence[int]],
    representations: Mapping[str, Representation],
    *,
    pooling: str = "mean",
    include_first: bool = False,
    stack: str | None = None,
    site: str = "mlp",
    batch_tokens: int = 2048,
    progress: bool = False,
) -> dict[str, Features]:
    """Pool the features of every text in each representation over its tokens T:

        mean    (1/|T|) Σ_{t ∈ T} f_t        including the tokens where a sparse feature is 0
        max     max_{t ∈ T} f_t

    Args:
        model: the base model.
        layer: index of the layer of the MLP.
        texts: token ids of each text, of any lengths, beginning with BOS if the tokenizer has one.
        representations: by name.
        pooling: `"mean"` or `"max"`.
        include_first: whether each text's first position counts. It is an attention sink in many models, with
            activations of an extreme norm; both papers exclude it.
        stack, site: see `find_mlps`.
        batch_tokens: tokens in a forward pass.
        progress: show a progress bar.

    Returns:
        {name: (texts, width) float32}, a numpy array for dense representations, a scipy CSR array for sparse ones.

    Raises:
        ValueError: a text is empty, the pooling is unknown, or the model runs the layer several times in a pass
            (ALBERT).
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if min(map(len, texts), default=0) < (1 if include_first else 2):
        raise ValueError("there are no texts, or one of them has no token to pool over")
    parts: dict[str, list[Features]] = {name: [] for name in representations}
    batches, collate = _batches(texts, batch_tokens), CausalCollator()
    with evaluating(model), progress_bar(total=len(texts), desc="texts", show=progress) as bar:
        for chosen in batches:
            ids, mask = batch_for(model, collate([{"input_ids": texts[index]} for index in chosen]))
            x, y = capture_mlps(model, [layer], ids, mask, stack=stack, site=site)[layer]
            check_each_token(layer, x, ids)
            counted = token_mask(ids, mask, include_first).to(x.device)
            rows = counted.nonzero()[:, 0].cpu()  # the text of each token, in `chosen`
            for name, representation in representations.items():
                encoded = representation.encode(x[counted], y[counted])
                pool: Any = pool_dense if isinstance(encoded, Tensor) else pool_sparse
                parts[name].append(pool(encoded, rows, representation.width, pooling))
            bar.update(len(chosen))
    back = np.argsort(np.concatenate(batches))
    return {name: _stacked(parts.pop(name))[back] for name in representations}


def check_each_token(layer: int, x: Tensor, input_ids: Tensor) -> None:
    """Raise `ValueError` unless x (batch, tokens, I) has one activation of a layer for each token."""
    if x.shape[:2] != input_ids.shape:
        raise ValueError(f"layer {layer} has not one activation for each token: it runs several times a pass")


def _batches(texts: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Group the indices of texts of similar lengths, so that there is little padding."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(texts)), key=lambda index: len(texts[index])):
        if batches[-1] and (len(batches[-1]) + 1) * len(texts[index]) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def pool_dense(features: Tensor, rows: Tensor, width: int, pooling: str) -> np.ndarray:
    """Pool features (tokens, width) of tokens of the texts `rows` (tokens) to (texts, width); sums are in float64."""
    index = rows[:, None].expand(-1, width)
    pooled = torch.zeros(int(rows.max()) + 1, width, dtype=torch.float64)
    reduce = "mean" if pooling == "mean" else "amax"
    return pooled.scatter_reduce_(0, index, features.cpu().double(), reduce, include_self=False).float().numpy()


def pool_sparse(coefficients: ExpertCoefficients, rows: Tensor, width: int, pooling: str) -> "csr_array":
    """Pool coefficients (tokens, K) ≥ 0 of tokens of the texts `rows` (tokens) to (texts, width)."""
    from scipy.sparse import csr_array

    values, indices = (tensor.detach().cpu() for tensor in coefficients)
    active = values != 0
    keys, place = (rows[:, None] * width + indices)[active].unique(return_inverse=True)
    pooled = torch.zeros(len(keys), dtype=torch.float64)
    pooled.scatter_reduce_(0, place, values[active].double(), "sum" if pooling == "mean" else "amax")
    tokens = rows.bincount()
    texts = keys // width
    if pooling == "mean":
        pooled /= tokens[texts]
    shape = (len(tokens), width)
    return csr_array((pooled.float().numpy(), (texts.int().numpy(), (keys % width).int().numpy())), shape=shape)


def _stacked(parts: list[Features]) -> Features:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    from scipy.sparse import vstack

    return vstack(parts, format="csr")

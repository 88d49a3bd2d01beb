"""Pool an MLP's input, hidden units and output, and the coefficients of decompositions, to one vector per text.

All representations come from one pass of the model over the texts, up to the layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.activations import ACT2FN

from mxd.base.capture import capture_mlps
from mxd.base.forward import batch_for, evaluating
from mxd.base.masks import token_mask
from mxd.base.pretrained_weights import PretrainedWeights, mlp_hidden_act, mlp_layout, mlp_weights, mlp_widths
from mxd.data.packing import CausalCollator
from mxd.modeling_mxd import ExpertCoefficients, MLPSite, SparseLayer

from .metrics import squared_norm

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Features: TypeAlias = "np.ndarray | csr_array"
"""Pooled features: (texts, features) float32, a scipy CSR array if few are not zero."""
POOLINGS = ("mean", "max")
MAX_BYTES = 4 * 2**30
# Per non-zero sparse feature: text, index and value, twice while the array is built.
_SPARSE_BYTES, _DENSE_BYTES = 20, 4
_TOLERANCE = 0.05  # of ‖ŷ − y‖ / ‖y‖, for neurons of a model in bfloat16


@dataclass(frozen=True)
class Representation:
    """Features of a token.

    Attributes:
        width: number of features.
        encode: function from x (tokens, I) and y (tokens, O), the MLP's input and output, to the features (tokens,
            width), or to the coefficients of the active features, which are all ≥ 0.
        active: maximum number of non-zero features of a token; None if all may be.
    """

    width: int
    encode: Callable[[Tensor, Tensor], Tensor | ExpertCoefficients]
    active: int | None = None

    def bytes_for(self, texts: int, tokens: int) -> int:
        """Return the maximum memory of the pooled features of `texts` texts of `tokens` tokens each."""
        if self.active is None:
            return _DENSE_BYTES * texts * self.width
        return _SPARSE_BYTES * texts * min(self.width, tokens * self.active)


def input_representation(site: MLPSite) -> Representation:
    """Represent a token by x, the MLP's input."""
    return Representation(_widths(site)[0], lambda x, y: x)


def output_representation(site: MLPSite) -> Representation:
    """Represent a token by y, the MLP's output."""
    return Representation(_widths(site)[2], lambda x, y: y)


def neuron_representation(site: MLPSite) -> Representation:
    """Represent a token by z, the MLP's hidden units, computed from x and checked against y on the first tokens.

    Raises:
        ValueError: the MLP is a mixture of experts, or its weights or activation are unknown.
    """
    widths = _widths(site)
    layout, activation = mlp_layout(site), mlp_hidden_act(site)
    if layout is None or layout.experts is not None or layout.shared is not None or activation is None:
        raise ValueError(
            f"the hidden units of layer {site.layer} ({site.kind}) cannot be read: its weights or activation follow "
            "no known rule, or a router chooses among them; leave the neurons out"
        )
    return Representation(widths[1], _Neurons(mlp_weights(site), activation, site.layer))


def expert_representation(layer: SparseLayer) -> Representation:
    """Represent a token by a, the coefficients of a decomposition's experts (a transcoder's latents)."""

    def encode(x: Tensor, _: Tensor) -> ExpertCoefficients:
        return layer.encode(x.to(layer.gate.weight.device))

    return Representation(layer.config.num_experts, encode, layer.config.num_experts_per_tok)


def _widths(site: MLPSite) -> tuple[int, int, int]:
    widths = mlp_widths(site)
    if widths is None:
        raise ValueError(f"the weights of layer {site.layer}, which set its widths, follow no known rule")
    return widths


@dataclass
class _Neurons:
    weights: PretrainedWeights
    hidden_act: str
    layer: int
    checked: bool = field(default=False)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        activation = ACT2FN[self.hidden_act]
        if not self.checked:
            error = squared_norm(self.weights.apply(x, activation) - y).sum() / squared_norm(y).sum()
            if not error < _TOLERANCE**2:
                raise ValueError(
                    f"the weights of layer {self.layer} do not give its outputs, so its hidden units are unknown: "
                    "leave the neurons out"
                )
            self.checked = True
        return self.weights.hidden(x, activation)


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
    max_bytes: int = MAX_BYTES,
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
        max_bytes: refuse to start if the result could take more memory, see `Representation.bytes_for`.
        progress: show a progress bar.

    Returns:
        {name: (texts, width) float32}, a numpy array for dense representations, a scipy CSR array for sparse ones.

    Raises:
        ValueError: a text is empty, the pooling is unknown, the result would take too much memory, or the model runs
            the layer several times in a pass (ALBERT).
    """
    _check_texts(texts, representations, pooling, include_first, max_bytes)
    pools = {name: _Pool(item, len(texts), pooling) for name, item in representations.items()}
    collate = CausalCollator()
    with evaluating(model), tqdm(total=len(texts), desc="texts", disable=not progress, dynamic_ncols=True) as bar:
        for chosen in _batches(texts, batch_tokens):
            ids, mask = batch_for(model, collate([{"input_ids": texts[index]} for index in chosen]))
            x, y = capture_mlps(model, [layer], ids, mask, stack=stack, site=site)[layer]
            if x.shape[:2] != ids.shape:
                raise ValueError(
                    f"layer {layer} has not one activation for each token: it runs several times in a pass"
                )
            counted = token_mask(ids, mask, include_first).to(x.device)
            x, y, rows = x[counted], y[counted], counted.nonzero()[:, 0].cpu()
            for pool in pools.values():
                pool.add(x, y, rows, chosen)
            bar.update(len(chosen))
    return {name: pool.result() for name, pool in pools.items()}


class _Pool:
    """Collect the pooled features of one representation, batch by batch.

    Args:
        representation: the representation.
        texts: number of all texts.
        pooling: see `pool_features`.
    """

    def __init__(self, representation: Representation, texts: int, pooling: str):
        self.representation, self.pooling = representation, pooling
        self.shape = (texts, representation.width)
        self._dense = np.empty(self.shape if representation.active is None else 0, dtype=np.float32)
        self._sparse: list[tuple[Tensor, Tensor, Tensor]] = []  # texts, features, values
        if representation.active is not None:
            from scipy.sparse import csr_array  # here, so that a missing scipy is reported before the first batch

            self._array = csr_array

    def add(self, x: Tensor, y: Tensor, rows: Tensor, chosen: list[int]) -> None:
        """Add the texts `chosen`: x (tokens, I), y (tokens, O), and the place of each token's text in `chosen`."""
        encoded = self.representation.encode(x, y)
        if isinstance(encoded, Tensor):
            self._dense[chosen] = pool_dense(encoded.cpu(), rows, len(chosen), self.pooling).numpy()
        else:
            texts, features, values = pool_sparse(encoded, rows, self.shape[1], self.pooling)
            self._sparse.append((torch.tensor(chosen)[texts].int(), features.int(), values))

    def result(self) -> Features:
        """Return the features of all texts, and free the parts."""
        if self.representation.active is None:
            return self._dense
        texts, features, values = (torch.cat(parts).numpy() for parts in zip(*self._sparse, strict=True))
        self._sparse.clear()
        return self._array((values, (texts, features)), shape=self.shape)


def _check_texts(
    texts: Sequence[Sequence[int]],
    representations: Mapping[str, Representation],
    pooling: str,
    include_first: bool,
    max_bytes: int,
) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    lengths = [len(text) for text in texts]
    if not lengths or min(lengths) < (1 if include_first else 2):
        raise ValueError("there are no texts, or one of them has no token to pool over")
    needed = sum(item.bytes_for(len(texts), max(lengths)) for item in representations.values())
    if needed > max_bytes:
        raise ValueError(
            f"{len(texts):,} texts of up to {max(lengths)} tokens in {len(representations)} representations could take "
            f"{needed / 2**30:.1f} GiB, over {max_bytes / 2**30:.1f} GiB: take fewer texts or representations"
        )


def _batches(texts: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Group the indices of texts of similar lengths, so that there is little padding."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(texts)), key=lambda index: len(texts[index])):
        if batches[-1] and (len(batches[-1]) + 1) * len(texts[index]) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def pool_dense(features: Tensor, rows: Tensor, texts: int, pooling: str) -> Tensor:
    """Pool features (tokens, width) of tokens of the texts `rows` (tokens) to (texts, width) float32.

    Sums are in float64.
    """
    if pooling == "max":
        pooled = features.new_full((texts, features.shape[1]), -torch.inf)
        return pooled.scatter_reduce_(0, rows[:, None].expand_as(features), features, "amax").float()
    sums = features.new_zeros((texts, features.shape[1]), dtype=torch.float64)
    counts = rows.bincount(minlength=texts).clamp_min(1)
    return (sums.index_add_(0, rows, features.double()) / counts[:, None]).float()


def pool_sparse(
    coefficients: ExpertCoefficients, rows: Tensor, width: int, pooling: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool coefficients (tokens, K) ≥ 0 of tokens of the texts `rows` (tokens).

    Returns:
        Texts, features and values (float32) of the pooled features that are not zero.
    """
    values, indices = (tensor.detach().cpu() for tensor in coefficients)
    active = values != 0
    keys, place = (rows[:, None] * width + indices)[active].unique(return_inverse=True)
    pooled = torch.zeros(len(keys), dtype=torch.float64)
    pooled.scatter_reduce_(0, place, values[active].double(), "sum" if pooling == "mean" else "amax")
    texts = keys // width
    if pooling == "mean":
        pooled /= rows.bincount()[texts]
    return texts, keys % width, pooled.float()

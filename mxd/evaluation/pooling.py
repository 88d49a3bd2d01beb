"""One vector a text: what an MLP is given, computes and gives, and the coefficients of decompositions of it, pooled
over the text's tokens. All of them in one pass of the model over the texts, as far as the layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers.activations import ACT2FN

from mxd.base.capture import capture_mlps
from mxd.base.forward import evaluating
from mxd.base.masks import token_mask
from mxd.base.pretrained_weights import PretrainedWeights, mlp_hidden_act, mlp_layout, mlp_weights, mlp_widths
from mxd.modeling_mxd import ExpertCoefficients, MLPSite, SparseLayer
from mxd.modeling_mxd.surgery import running_device

from .metrics import squared_norm

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Features: TypeAlias = "np.ndarray | csr_array"
"""Pooled: (texts, features) float32, a scipy CSR array where few are not zero."""
POOLINGS = ("mean", "max")
MAX_BYTES = 4 * 2**30
# Of a sparse feature that is not zero: its text, index and value, and again when the array is made.
_SPARSE_BYTES, _DENSE_BYTES = 20, 4
_TOLERANCE = 0.05  # of ‖ŷ − y‖ / ‖y‖, for neurons of a model in bfloat16


@dataclass(frozen=True)
class Representation:
    """Features of a token.

    Attributes:
        width: how many.
        encode: from x (tokens, I) and y (tokens, O), the MLP's input and output, to the features (tokens, width), or
            to the coefficients of those that are active, all of them ≥ 0.
        active: how many features of a token are not zero at most; None where all may be.
    """

    width: int
    encode: Callable[[Tensor, Tensor], Tensor | ExpertCoefficients]
    active: int | None = None

    def bytes_for(self, texts: int, tokens: int) -> int:
        """Bytes of memory that the pooled features of so many texts of so many tokens take at most."""
        if self.active is None:
            return _DENSE_BYTES * texts * self.width
        return _SPARSE_BYTES * texts * min(self.width, tokens * self.active)


def input_representation(site: MLPSite) -> Representation:
    """x, the raw activations that the MLP is given."""
    return Representation(_widths(site)[0], lambda x, y: x)


def output_representation(site: MLPSite) -> Representation:
    """y, what the MLP gives."""
    return Representation(_widths(site)[2], lambda x, y: y)


def neuron_representation(site: MLPSite) -> Representation:
    """The MLP's hidden units z, computed from x with its own weights, and checked against y on the first tokens.

    Raises:
        ValueError: they cannot be had: of a mixture of experts, whose router decides which of them work, and where no
            rule finds weights or activation.
    """
    widths = _widths(site)
    layout, activation = mlp_layout(site), mlp_hidden_act(site)
    if layout is None or layout.experts is not None or layout.shared is not None or activation is None:
        raise ValueError(
            f"the hidden units of layer {site.layer} ({site.kind}) cannot be read: its weights or activation follow "
            "no rule, or a router chooses among them; leave the neurons out"
        )
    return Representation(widths[1], _Neurons(mlp_weights(site), activation, site.layer))


def expert_representation(layer: SparseLayer) -> Representation:
    """a, the coefficients of a decomposition's experts (latents of a transcoder)."""

    def encode(x: Tensor, _: Tensor) -> ExpertCoefficients:
        return layer.encode(x.to(layer.gate.weight.device))

    return Representation(layer.config.num_experts, encode, layer.config.num_experts_per_tok)


def _widths(site: MLPSite) -> tuple[int, int, int]:
    widths = mlp_widths(site)
    if widths is None:
        raise ValueError(f"no rule finds the weights of layer {site.layer}, which tell its widths")
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
                    f"the weights of layer {self.layer} do not give its outputs, so that its hidden units are not "
                    "known: leave the neurons out"
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
    """Features of every text in each representation, pooled over its tokens:

        mean    (1/|T|) Σ_{t ∈ T} f_t        T the text's tokens, of sparse features those count where they are 0
        max     max_{t ∈ T} f_t

    Args:
        model: the base model, untouched.
        layer: the layer whose MLP it is about.
        texts: token ids of each text, of any lengths; the first is BOS, or stands where BOS does.
        representations: by name.
        pooling: `"mean"` or `"max"`.
        include_first: whether each text's first position counts. It is an attention sink in many models, with
            activations of an extreme norm; both papers leave it out.
        stack, site: see `modeling_mxd.find_mlps`.
        batch_tokens: tokens of a forward pass.
        max_bytes: refuse to start where the result could take more memory than this: 4 bytes times texts times width
            of a dense representation, 20 bytes times texts times min(N, tokens of a text · K) of a sparse one.
        progress: show a bar.

    Returns:
        {name: (texts, width) float32}, numpy where the representation is dense, scipy CSR where it is sparse.

    Raises:
        ValueError: a text is empty, the pooling is unknown, the result would take too much memory, or the model runs
            the layer several times (ALBERT).
    """
    _check_texts(texts, representations, pooling, include_first, max_bytes)
    pools = {name: _Pool(item, len(texts), pooling) for name, item in representations.items()}
    with evaluating(model), tqdm(total=len(texts), desc="texts", disable=not progress, dynamic_ncols=True) as bar:
        for chosen in _batches(texts, batch_tokens):
            x, y, rows = _activations(model, layer, [texts[index] for index in chosen], include_first, stack, site)
            for pool in pools.values():
                pool.add(x, y, rows, chosen)
            bar.update(len(chosen))
    return {name: pool.result() for name, pool in pools.items()}


class _Pool:
    """Pooled features of a representation, batch by batch.

    Args:
        representation: whose features.
        texts: how many in all.
        pooling: see `pool_features`.
    """

    def __init__(self, representation: Representation, texts: int, pooling: str):
        self.representation, self.pooling = representation, pooling
        self.shape = (texts, representation.width)
        self._dense = np.empty(self.shape if representation.active is None else 0, dtype=np.float32)
        self._sparse: list[tuple[Tensor, Tensor, Tensor]] = []  # texts, features, values
        if representation.active is not None:
            from scipy.sparse import csr_array  # where it is missing, that is said before the first batch

            self._array = csr_array

    def add(self, x: Tensor, y: Tensor, rows: Tensor, chosen: list[int]) -> None:
        """Add the texts `chosen`: x (tokens, I), y (tokens, O) and rows (tokens), which of them each token is of."""
        encoded = self.representation.encode(x, y)
        if isinstance(encoded, Tensor):
            self._dense[chosen] = pool_dense(encoded.cpu(), rows, len(chosen), self.pooling).numpy()
        else:
            texts, features, values = pool_sparse(encoded, rows, self.shape[1], self.pooling)
            self._sparse.append((torch.tensor(chosen)[texts].int(), features.int(), values))

    def result(self) -> Features:
        """All texts' features; a pool gives them once, and keeps nothing of what they were made of."""
        if self.representation.active is None:
            return self._dense
        texts, features, values = (torch.cat(parts).numpy() for parts in zip(*self._sparse, strict=True))
        self._sparse.clear()
        return self._array((values, (texts, features)), shape=self.shape)


def _activations(
    model: nn.Module,
    layer: int,
    texts: Sequence[Sequence[int]],
    include_first: bool,
    stack: str | None,
    site: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens that count: x (tokens, I), y (tokens, O), and on the CPU the text that each is of (tokens)."""
    ids, mask = _padded(texts, running_device(model))
    x, y = capture_mlps(model, [layer], ids, mask, stack=stack, site=site)[layer]
    if x.shape[:2] != ids.shape:
        raise ValueError(f"layer {layer} has not one activation for each token: it runs several times in a pass")
    counted = token_mask(ids, mask, include_first).to(x.device)
    return x[counted], y[counted], counted.nonzero()[:, 0].cpu()


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
    """Indices of texts of similar lengths, so that little is padding."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    batches: list[list[int]] = [[]]
    for index in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(texts[index]) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask`, padded on the right."""
    ids = [torch.tensor(text, dtype=torch.long) for text in texts]
    masks = [torch.ones_like(text) for text in ids]
    return tuple(pad_sequence(side, batch_first=True).to(device) for side in (ids, masks))  # type: ignore[return-value]


def pool_dense(features: Tensor, rows: Tensor, texts: int, pooling: str) -> Tensor:
    """Features (tokens, width) of tokens that belong to the texts `rows` (tokens), pooled: (texts, width) float32; the
    sums are in float64."""
    if pooling == "max":
        pooled = features.new_full((texts, features.shape[1]), -torch.inf)
        return pooled.scatter_reduce_(0, rows[:, None].expand_as(features), features, "amax").float()
    sums = features.new_zeros((texts, features.shape[1]), dtype=torch.float64)
    counts = rows.bincount(minlength=texts).clamp_min(1)
    return (sums.index_add_(0, rows, features.double()) / counts[:, None]).float()


def pool_sparse(
    coefficients: ExpertCoefficients, rows: Tensor, width: int, pooling: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients (tokens, K) ≥ 0 of tokens that belong to the texts `rows` (tokens), pooled.

    Returns:
        Of the pooled features that are not zero, each text and feature once: texts, features, values (float32).
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

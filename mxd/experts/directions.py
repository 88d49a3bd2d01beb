"""Fit the directions of an MxD's experts by least squares, for a decomposition that was trained without any.

With a the coefficients, x and y the MLP's input and output, the directions are the rows of V in

    min over V, S, v of   Σ_t ‖y_t − Vᵀa_t − Sᵀx_t − v‖²  +  r Σ_n m_n² ‖v_n‖²

m_n is the largest coefficient of expert n, so that the ridge r counts as r tokens on which the expert is at its maximum
and adds nothing: an expert that is active on a few tokens only gets a small direction, one that never is gets 0.
"""

import logging
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxd.base.capture import Capture
from mxd.evaluation.expert_use import encode_tokens
from mxd.modeling_mxd import ExpertCoefficients, MxDModel

logger = logging.getLogger(__name__)

BEFORE_TRAINING = ", before the last training"
RIDGE = 1.0
STEPS = 60
TOLERANCE = 1e-3
COLUMNS = 128
"""Columns of V that are solved at a time, which bounds the memory for AV, (tokens, columns)."""


class DirectionFit:
    """Collect what the fit of one layer needs, a batch at a time, and solve it.

    The coefficients are kept, 12 bytes for each of K per token (50 MB for 131,072 tokens at K = 32); of x and y only
    sums, 4 N (I + O) bytes.
    """

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.values: list[Tensor] = []
        self.indices: list[Tensor] = []
        self.inputs: Tensor | None = None  # Aᵀ[x, 1], (N, I + 1)
        self.outputs: Tensor | None = None  # Aᵀy, (N, O)
        self.moments: Tensor | None = None  # [x, 1]ᵀ[x, 1, y], (I + 1, I + 1 + O) float64

    def update(self, coefficients: ExpertCoefficients, x: Tensor, y: Tensor) -> None:
        """Add tokens: values and indices (tokens, K) as `SparseLayer.encode` returns them, x (tokens, I), y (…, O)."""
        values, indices = (part.detach().cpu() for part in coefficients)
        x, y = (part.detach().float().cpu() for part in (x, y))
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        if self.inputs is None or self.outputs is None or self.moments is None:
            self.inputs = x.new_zeros(self.num_experts, x.shape[1])
            self.outputs = y.new_zeros(self.num_experts, y.shape[1])
            self.moments = torch.zeros(x.shape[1], x.shape[1] + y.shape[1], dtype=torch.float64)
        moved = torch.cat([x, y], 1)
        sums = _Coefficients(values.float(), indices, self.num_experts).transposed_times(moved)
        self.inputs += sums[:, : x.shape[1]]
        self.outputs += sums[:, x.shape[1] :]
        self.moments += (x.T @ moved).double()
        self.values.append(values.float())
        self.indices.append(indices.int())

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return sum(map(len, self.values))

    def solve(self, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
        """Return the directions V (N, O) and the experts' maxima (N), by conjugate gradients on the normal equations.

        S and v are eliminated exactly: they enter through the inverse of the moments of [x, 1].

        Raises:
            ValueError: No token was added.
        """
        if self.inputs is None or self.outputs is None or self.moments is None or not self.tokens:
            raise ValueError("no tokens to fit directions on: batches is empty, or contains only padding")
        a = _Coefficients(torch.cat(self.values), torch.cat(self.indices), self.num_experts)
        experts, values, width = a.indices.flatten().long(), a.values.flatten(), self.inputs.shape[1]
        maximum = torch.zeros(self.num_experts).scatter_reduce(0, experts, values, "amax")
        squares = torch.zeros(self.num_experts).index_add(0, experts, values.square())
        squared = self.moments.diagonal()
        inner = self.moments[:, :width] + torch.diag((1e-6 * squared).clamp_min(1e-12 * float(squared.max())))
        outer = torch.linalg.solve(inner, torch.cat([self.inputs.T.double(), self.moments[:, width:]], 1)).float()
        regressed, target = outer[:, : self.num_experts], self.outputs - self.inputs @ outer[:, self.num_experts :]
        penalty = (ridge * maximum.square())[:, None]

        def apply(v: Tensor) -> Tensor:
            return a.transposed_times(a.times(v)) - self.inputs @ (regressed @ v) + penalty * v

        scale = (squares[:, None] + penalty).clamp_min(torch.finfo(torch.float32).tiny)
        parts = [conjugate_gradients(apply, part, scale) for part in target.split(COLUMNS, 1)]
        return torch.cat(parts, 1), maximum


class _Coefficients:
    """Sparse coefficients as a matrix A (tokens, N)."""

    def __init__(self, values: Tensor, indices: Tensor, num_experts: int):
        self.values, self.indices = values, indices
        flat = indices.flatten().long()
        order = flat.argsort(stable=True)  # by expert
        self._tokens, self._by_expert = order // values.shape[1], values.flatten()[order]
        counts = torch.bincount(flat, minlength=num_experts)
        self._starts = counts.cumsum(0) - counts

    def times(self, v: Tensor) -> Tensor:
        """Return A v, (N, columns) → (tokens, columns)."""
        return F.embedding_bag(self.indices, v, mode="sum", per_sample_weights=self.values)

    def transposed_times(self, u: Tensor) -> Tensor:
        """Return Aᵀ u, (tokens, columns) → (N, columns)."""
        return F.embedding_bag(self._tokens, u, self._starts, mode="sum", per_sample_weights=self._by_expert)


def conjugate_gradients(apply: Callable[[Tensor], Tensor], target: Tensor, scale: Tensor) -> Tensor:
    """Solve apply(v) = target for every column, up to `TOLERANCE`; `scale` (N, 1) is about apply's diagonal."""
    tiny = torch.finfo(torch.float32).tiny
    solved, left = torch.zeros_like(target), target
    step = scaled = left / scale
    size = first = (left * scaled).sum(0)
    for _ in range(STEPS):
        if bool((size <= TOLERANCE**2 * first).all()):
            break
        applied = apply(step)
        length = size / (step * applied).sum(0).clamp_min(tiny)
        solved, left = solved + length * step, left - length * applied
        scaled = left / scale
        size, before = (left * scaled).sum(0), size
        step = scaled + size / before.clamp_min(tiny) * step
    return solved


@torch.no_grad()
def fit_directions(
    model: nn.Module | Capture, decomposition: MxDModel, batches: Iterable[Mapping[str, Tensor]], ridge: float = RIDGE
) -> str:
    """Fit the directions of all experts in one pass over a text, and set them: see `MxDModel.directions`.

    For the arguments see `count_expert_use`; `ridge` is r of the module's equation. A transcoder's directions are its
    decoder rows: only the maxima of its coefficients are measured. Returns the origin that the file names.

    Raises:
        ValueError: there is no token to fit on.
    """
    config = decomposition.config
    fits = {layer: DirectionFit(config.layer(layer).num_experts) for layer in config.layers}
    encode_tokens(model, decomposition, batches, lambda layer, *tokens: fits[layer].update(*tokens))
    return set_fitted_directions(decomposition, fits, ridge)


def set_fitted_directions(decomposition: MxDModel, fits: Mapping[int, DirectionFit], ridge: float = RIDGE) -> str:
    """Solve the fits of all layers and set the directions; returns their origin."""
    solved = {layer: fit.solve(ridge) for layer, fit in fits.items()}
    of_mxd = [layer for layer in fits if decomposition.config.layer(layer).method == "mxd"]
    source = f"least squares on {min(fit.tokens for fit in fits.values())} tokens" if of_mxd else "decoder"
    maxima = {layer: maximum for layer, (_, maximum) in solved.items()}
    decomposition.set_directions(maxima, {layer: solved[layer][0] for layer in of_mxd}, source)
    return source


def carried_directions(decomposition: MxDModel) -> tuple[dict[int, Tensor] | None, str]:
    """Return {layer: directions (N, O)} that the MxD layers had before a training, and their origin.

    The directions are None, with a warning, if an MxD layer had none.
    """
    of_mxd = [layer for layer in decomposition.config.layers if decomposition.config.layer(layer).method == "mxd"]
    if not of_mxd:
        return {}, "decoder"
    try:
        source = decomposition.direction_file.source.removesuffix(BEFORE_TRAINING) + BEFORE_TRAINING
    except (ValueError, OSError) as error:
        logger.warning("the experts have no directions, and are saved without: %s", error)
        return None, ""
    return {layer: decomposition.directions(layer).direction for layer in of_mxd}, source

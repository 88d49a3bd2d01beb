"""How the experts of a layer are used: how often, how strongly, by how many tokens."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mxd.base.capture import Capture, capture_mlps
from mxd.base.forward import evaluating, right_padded
from mxd.base.masks import activation_mask
from mxd.modeling_mxd import ExpertCoefficients, MxDModel
from mxd.modeling_mxd.surgery import running_device

from .metrics import normalised_entropy

SPECIALISED_FREQUENCY = 0.25
ALWAYS_ON_FREQUENCY = 0.9


class ExpertUse:
    """Counts over tokens, streamed. An expert is active on a token when its coefficient is not 0.

    Args:
        num_experts: N.

    Attributes:
        tokens: T, tokens so far.
        counts: tokens on which each expert was active, (N) int64.
        sums: Σ_t a_t, (N) float64.
    """

    def __init__(self, num_experts: int):
        self.tokens = 0
        self.counts = torch.zeros(num_experts, dtype=torch.int64)
        self.sums = torch.zeros(num_experts, dtype=torch.float64)

    def update(self, coefficients: ExpertCoefficients) -> None:
        """Add tokens: values and indices (..., K), as `SparseLayer.encode` gives them (no expert twice a token)."""
        values, indices = (tensor.detach().cpu() for tensor in coefficients)
        active = values != 0
        self.tokens += values.shape[:-1].numel()
        self.counts += torch.bincount(indices[active], minlength=len(self.counts))
        self.sums += torch.bincount(indices[active], weights=values[active].double(), minlength=len(self.counts))

    @property
    def frequency(self) -> Tensor:
        """Share of tokens on which each expert is active, counts / T, (N) float64."""
        return self.counts.double() / max(self.tokens, 1)

    @property
    def mean(self) -> Tensor:
        """Mean coefficient of each expert over all tokens, zeros included, Σ_t a_t / T, (N) float64."""
        return self.sums / max(self.tokens, 1)

    def always_on(self, at_least: float = ALWAYS_ON_FREQUENCY) -> dict[str, float]:
        """{expert: frequency} of the experts active on at least this share of tokens, the most frequent first; with K
        active experts a token there are at most K / `at_least`."""
        order = self.frequency.argsort(descending=True, stable=True).tolist()
        return {str(expert): float(self.frequency[expert]) for expert in order if self.frequency[expert] >= at_least}

    def summary(self, frequent_above: float = SPECIALISED_FREQUENCY) -> dict[str, float]:
        """The numbers of evaluation.json.

        Returns:
            `l0`: active experts a token, Σ counts / T. `dead_experts`: share of experts active on none of these
            tokens. `expert_entropy`: of counts / Σ counts, see `normalised_entropy`. `max_expert_frequency`.
            `frequent_experts`: number of experts with a frequency over `frequent_above`.
        """
        return {
            "l0": float(self.counts.sum()) / max(self.tokens, 1),
            "dead_experts": float((self.counts == 0).double().mean()),
            "expert_entropy": normalised_entropy(self.counts),
            "max_expert_frequency": float(self.frequency.max()),
            "frequent_experts": int((self.frequency > frequent_above).sum()),
        }


@torch.no_grad()
def count_expert_use(
    model: nn.Module | Capture,
    decomposition: MxDModel,
    batches: Iterable[Mapping[str, Tensor]],
    include_first: bool = True,
) -> dict[int, ExpertUse]:
    """Use of the experts of every layer over all unpadded positions.

    Args:
        model: the base model, or a function that gives the MLPs' inputs and outputs for a batch, such as a
            recording of them.
        decomposition: its layers.
        batches: `input_ids` (batch, tokens) and, where there is padding, `attention_mask`.
        include_first: whether each row's first position (BOS) counts.

    Returns:
        {layer: use}.
    """
    config = decomposition.config
    uses = {layer: ExpertUse(config.layer(layer).num_experts) for layer in config.layers}
    with evaluating(*([model, decomposition] if isinstance(model, nn.Module) else [decomposition])):
        for batch in batches:
            captured, masks = captured_activations(model, decomposition, batch, include_first)
            for layer, (x, _) in captured.items():
                module = decomposition.layer(layer)
                uses[layer].update(module.encode(x[masks[layer]].to(module.gate.weight.device)))
    return uses


def captured_activations(
    model: nn.Module | Capture, decomposition: MxDModel, batch: Mapping[str, Tensor], include_first: bool
) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[int, Tensor]]:
    """{layer: (x, y)} of a batch, and {layer: mask of the positions that count}."""
    config = decomposition.config
    if isinstance(model, nn.Module):
        ids, attention_mask = right_padded(batch, running_device(model))
        captured = capture_mlps(model, config.layers, ids, attention_mask, **config.where)
        batch = {"input_ids": ids} if attention_mask is None else {"input_ids": ids, "attention_mask": attention_mask}
    else:
        captured = model(batch)
    masks = {layer: activation_mask(batch, x, include_first, config.of_decoder) for layer, (x, _) in captured.items()}
    return captured, masks


def measure_expert_statistics(
    model: nn.Module | Capture,
    decomposition: MxDModel,
    batches: Iterable[Mapping[str, Tensor]],
    include_first: bool = True,
) -> None:
    """Write frequency and mean coefficient of every expert over `batches` (training tokens) into the layers'
    buffers `expert_frequency` and `expert_mean`, from where evaluation takes them. Arguments as for
    `count_expert_use`.

    Raises:
        ValueError: when there is no token to measure on; the buffers are left as they are.
    """
    uses = count_expert_use(model, decomposition, batches, include_first)
    if not all(use.tokens for use in uses.values()):
        raise ValueError("no tokens to measure the experts on: batches is empty, or all of it is padding")
    for layer, use in uses.items():
        module = decomposition.layer(layer)
        module.expert_frequency.copy_(use.frequency)
        module.expert_mean.copy_(use.mean)

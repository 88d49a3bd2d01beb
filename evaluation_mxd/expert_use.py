"""How the experts of a layer are used: how often, how strongly, by how many tokens."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from modeling_mxd import Capture, ExpertCoefficients, MxDModel

from .masks import token_mask
from .metrics import normalised_entropy

SPECIALISED_FREQUENCY = 0.25


class ExpertUse:
    """Counts over tokens, streamed. An expert is active on a token when its coefficient is not 0.

    Args:
        num_experts: N.
    """

    def __init__(self, num_experts: int):
        self.tokens = 0
        self.counts = torch.zeros(num_experts, dtype=torch.int64)
        self.sums = torch.zeros(num_experts, dtype=torch.float64)

    def update(self, coefficients: ExpertCoefficients) -> None:
        """Add tokens: values and indices (tokens, K)."""
        values, indices = (tensor.detach().cpu() for tensor in coefficients)
        active = values != 0
        self.tokens += len(values)
        self.counts += torch.bincount(indices[active], minlength=len(self.counts))
        self.sums += torch.bincount(indices[active], weights=values[active].double(), minlength=len(self.counts))

    @property
    def frequency(self) -> Tensor:
        """Share of tokens on which each expert is active, (N) float64."""
        return self.counts.double() / max(self.tokens, 1)

    @property
    def mean(self) -> Tensor:
        """Mean coefficient of each expert over all tokens, zeros included, (N) float64."""
        return self.sums / max(self.tokens, 1)

    def summary(self) -> dict[str, float]:
        """`l0` (active experts a token), `dead_experts` (share active on none of these tokens),
        `expert_entropy` (normalised), `max_expert_frequency`, `frequent_experts` (number above 25 %)."""
        return {
            "l0": float(self.counts.sum()) / max(self.tokens, 1),
            "dead_experts": float((self.counts == 0).double().mean()),
            "expert_entropy": normalised_entropy(self.counts),
            "max_expert_frequency": float(self.frequency.max()),
            "frequent_experts": int((self.frequency > SPECIALISED_FREQUENCY).sum()),
        }


@torch.no_grad()
def count_expert_use(
    capture: Capture, decomposition: MxDModel, batches: Iterable[Mapping[str, Tensor]]
) -> dict[int, ExpertUse]:
    """Use of the experts of every layer over all unpadded positions of `batches`, by layer index; `capture` gives
    the MLPs' inputs for a batch."""
    config = decomposition.config
    uses = {layer: ExpertUse(config.layer(layer).num_experts) for layer in config.layers}
    for batch in batches:
        mask = token_mask(batch["input_ids"], batch.get("attention_mask"))
        for layer, (x, _) in capture(batch).items():
            uses[layer].update(decomposition.layer(layer).encode(x[mask]))
    return uses


def measure_expert_statistics(
    capture: Capture, decomposition: MxDModel, batches: Iterable[Mapping[str, Tensor]]
) -> None:
    """Write frequency and mean coefficient of every expert over `batches` (training tokens) into the layers'
    buffers `expert_frequency` and `expert_mean`, from where evaluation takes them."""
    for layer, use in count_expert_use(capture, decomposition, batches).items():
        module = decomposition.layer(layer)
        module.expert_frequency.copy_(use.frequency)
        module.expert_mean.copy_(use.mean)

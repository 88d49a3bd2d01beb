"""Find the places in a text where each expert is most active."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxd.base.forward import evaluating, padding_last
from mxd.modeling_mxd import ExpertCoefficients, MxDModel

from .expert_use import captured_activations


@dataclass
class TopExamples:
    """The M rows on which each of N experts is most active, streamed; each row counts with its strongest position.

    Attributes:
        values: coefficients, (N, M) float32, the largest first; 0 if an expert is active on fewer rows.
        rows: index of the row, in the order of the text, (N, M) int64.
        positions: position in the row, (N, M) int64.
    """

    values: Tensor
    rows: Tensor
    positions: Tensor

    @classmethod
    def empty(cls, num_experts: int, count: int) -> "TopExamples":
        """Create a table without rows."""
        none = torch.zeros(num_experts, count, dtype=torch.int64)
        return cls(torch.zeros(num_experts, count), none, none.clone())

    def update(self, coefficients: ExpertCoefficients, mask: Tensor, first_row: int) -> None:
        """Add a batch.

        Args:
            coefficients: values and indices, both (batch, tokens, K), as `SparseLayer.encode` returns them.
            mask: the positions that count, (batch, tokens) bool.
            first_row: index of the batch's first row in the text.
        """
        values, indices, mask = (tensor.detach().cpu() for tensor in (*coefficients, mask))
        row, position, slot = ((values > 0) & mask[..., None]).nonzero(as_tuple=True)
        value, expert = values[row, position, slot].float(), indices[row, position, slot]
        experts, place = expert.unique(return_inverse=True)
        # The strongest position of every row, the first of several: (experts, batch), flat.
        key, shape = place * len(values) + row, (len(experts), len(values))
        strongest = torch.zeros(shape).flatten().scatter_reduce(0, key, value, "amax")
        first = value == strongest[key]
        positions = torch.zeros(shape, dtype=torch.int64).flatten()
        positions = positions.scatter_reduce(0, key[first], position[first], "amin", include_self=False)
        rows = (first_row + torch.arange(len(values))).expand(shape)
        merged = torch.cat([self.values[experts], strongest.view(shape)], 1)
        self.values[experts], kept = merged.topk(self.values.shape[1], dim=1)
        for table, found in ((self.rows, rows), (self.positions, positions.view(shape))):
            table[experts] = torch.cat([table[experts], found], 1).gather(1, kept)


@torch.no_grad()
def top_examples(
    model: nn.Module,
    decomposition: MxDModel,
    batches: Iterable[Mapping[str, Tensor]],
    count: int = 10,
    include_first: bool = False,
) -> dict[int, TopExamples]:
    """Find where the experts of every layer are most active, on the untouched model's activations.

    Args:
        model, decomposition, batches: see `count_expert_use`.
        count: M, rows per expert.
        include_first: whether each row's first position counts. It is an attention sink in many models, on which a few
            experts are most active whatever the text is.

    Returns:
        {layer: examples}; row indices run over all batches, positions are those of `batches`, padding included.
    """
    config = decomposition.config
    found = {layer: TopExamples.empty(config.layer(layer).num_experts, count) for layer in config.layers}
    first_row = 0
    with evaluating(model, decomposition):
        for batch in batches:
            captured, masks = captured_activations(model, decomposition, batch, include_first)
            for layer, (x, _) in captured.items():
                module = decomposition.layer(layer)
                coefficients, mask = module.encode(x.to(module.gate.weight.device)), masks[layer]
                if batch.get("attention_mask") is not None:  # the model read rows with their padding on the right
                    back = (
                        padding_last(batch["attention_mask"]).argsort(-1).repeat(len(x) // len(batch["input_ids"]), 1)
                    )
                    coefficients = ExpertCoefficients(*(_moved(part, back) for part in coefficients))
                    mask = _moved(mask[..., None], back)[..., 0]
                found[layer].update(coefficients, mask, first_row)
            first_row += len(batch["input_ids"])
    return found


def _moved(tensor: Tensor, order: Tensor) -> Tensor:
    """Reorder the positions of each row of a tensor (batch, tokens, K)."""
    return tensor.take_along_dim(order.to(tensor.device)[..., None], 1)

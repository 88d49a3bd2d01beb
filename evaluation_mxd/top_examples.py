"""Where in a text the experts are most active: what one reads to learn what an expert responds to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modeling_mxd import ExpertCoefficients, MxDModel

from .expert_use import captured_activations
from .forward import evaluating


@dataclass
class TopExamples:
    """The M rows on which each of N experts is most active, streamed; of a row only the strongest position.

    Attributes:
        values: coefficients, (N, M) float32, the largest first; 0 where an expert is active on fewer rows.
        rows: index of the row, in the order of the text, (N, M) int64.
        positions: in the row, (N, M) int64.
    """

    values: Tensor
    rows: Tensor
    positions: Tensor

    @classmethod
    def empty(cls, num_experts: int, count: int) -> "TopExamples":
        """Of no rows yet."""
        none = torch.zeros(num_experts, count, dtype=torch.int64)
        return cls(torch.zeros(num_experts, count), none, none.clone())

    def update(self, coefficients: ExpertCoefficients, mask: Tensor, first_row: int) -> None:
        """Add a batch.

        Args:
            coefficients: values and indices, both (batch, tokens, K), as `SparseLayer.encode` gives them.
            mask: the positions that count, (batch, tokens) bool.
            first_row: index of the batch's first row in the text.
        """
        values, indices, mask = (tensor.detach().cpu() for tensor in (*coefficients, mask))
        row, position, slot = ((values > 0) & mask[..., None]).nonzero(as_tuple=True)
        value, expert = values[row, position, slot].float(), indices[row, position, slot]
        order = value.argsort(descending=True, stable=True)
        order = order[(expert * len(values) + row)[order].argsort(stable=True)]
        chosen = order[_first_of_each((expert * len(values) + row)[order])]  # the strongest position of each row
        chosen = chosen[value[chosen].argsort(descending=True, stable=True)]
        chosen = chosen[expert[chosen].argsort(stable=True)]
        of_experts, place = expert[chosen].unique_consecutive(return_inverse=True)
        starts = _first_of_each(expert[chosen]).nonzero().squeeze(1)
        rank = torch.arange(len(chosen)) - starts[place]
        chosen, place, rank = (tensor[rank < self.values.shape[1]] for tensor in (chosen, place, rank))
        new = TopExamples.empty(len(of_experts), self.values.shape[1])
        for table, found in ((new.values, value), (new.rows, row + first_row), (new.positions, position)):
            table[place, rank] = found[chosen]
        merged = torch.cat([self.values[of_experts], new.values], 1)
        self.values[of_experts], kept = merged.topk(self.values.shape[1], dim=1)
        for table, found in ((self.rows, new.rows), (self.positions, new.positions)):
            table[of_experts] = torch.cat([table[of_experts], found], 1).gather(1, kept)


def _first_of_each(ordered: Tensor) -> Tensor:
    """True where a value differs from the one before it, (n) bool."""
    return torch.cat([torch.ones(len(ordered[:1]), dtype=torch.bool), ordered[1:] != ordered[:-1]])


@torch.no_grad()
def top_examples(
    model: nn.Module,
    decomposition: MxDModel,
    batches: Iterable[Mapping[str, Tensor]],
    count: int = 10,
    include_first: bool = True,
) -> dict[int, TopExamples]:
    """Where the experts of every layer are most active, on the untouched model's activations.

    Args:
        model: the base model.
        decomposition: its layers.
        batches: `input_ids` (batch, tokens) and, where there is padding on the right, `attention_mask`.
        count: M, rows of each expert.
        include_first: whether each row's first position (BOS) counts.

    Returns:
        {layer: examples}; rows are counted over all batches.
    """
    config = decomposition.config
    found = {layer: TopExamples.empty(config.layer(layer).num_experts, count) for layer in config.layers}
    first_row = 0
    with evaluating(model, decomposition):
        for batch in batches:
            captured, masks = captured_activations(model, decomposition, batch, include_first)
            for layer, (x, _) in captured.items():
                module = decomposition.layer(layer)
                found[layer].update(module.encode(x.to(module.gate.weight.device)), masks[layer], first_row)
            first_row += len(batch["input_ids"])
    return found

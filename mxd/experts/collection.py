"""Hold what a pass over a text collected of experts: how often, how strongly and where each is active, and effects."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .contexts import Context, distinct

HISTOGRAM_EDGES = 2.0 ** (torch.arange(-24, 24) / 2)
"""Edges between the bins of the histograms; the first and the last bin are open."""


@dataclass
class ExpertCollection:
    """The collection of one layer with N experts. An expert is active on a token if its coefficient is not 0.

    The first position of a row counts in `tokens`, `frequency` and `domain_counts` only, see `collect_experts`.

    Attributes:
        tokens: T, number of tokens.
        frequency: share of tokens on which each expert is active, (N) float64.
        maximum: largest coefficient, (N) float32.
        histogram: number of tokens with a coefficient between two of `HISTOGRAM_EDGES`, (N, bins) int32.
        top_values: the M largest coefficients that are in different contexts, (N, M) float32, the largest first; 0 if
            there are fewer.
        top_rows, top_positions: where they are, (N, M) int32: number of a row of the collection, and position in it;
            -1 if there are fewer.
        sample_values, sample_rows, sample_positions: R tokens drawn at random from those on which the expert is active,
            (N, R), the largest coefficient first.
        top_windows, sample_windows: the expert's coefficients on the `AROUND` tokens on each side of these, and on
            themselves, (N, M, 25) and (N, R, 25) uint8: 1 + the bin of the histogram, 0 where it is not active or
            beyond the row. None in files of earlier versions.
        domain_counts: number of tokens of each domain on which each expert is active, (N, D) int32.
        domain_tokens: number of tokens of each domain, (D) int64.
        promoted_ids, promoted_values: the tokens whose logits the expert's direction raises most, (N, 10) int32, and by
            how much, relative to the mean over the vocabulary, (N, 10) float32; None without directions, or if the
            model's final norm is not found.
        suppressed_ids, suppressed_values: the same for those that it lowers most.
        alignment: how far the direction promotes the tokens that follow the top contexts, (N) float32, see
            `Unembedding.alignment`.
        similar_direction_ids, similar_direction_values: the 5 experts whose directions have the largest cosine with the
            expert's, (N, 5) int32, -1 for none, and the cosines, (N, 5) float32. None without directions.
        similar_modulation_ids, similar_modulation_values: the same of the modulations c_n less their mean; None for
            transcoders, whose rows are the directions.
        co_firing_ids, co_firing_values: the 5 experts that are most often active on the same tokens, see `co_firing`.
    """

    tokens: int
    frequency: Tensor
    maximum: Tensor
    histogram: Tensor
    top_values: Tensor
    top_rows: Tensor
    top_positions: Tensor
    sample_values: Tensor
    sample_rows: Tensor
    sample_positions: Tensor
    domain_counts: Tensor
    domain_tokens: Tensor
    co_firing_ids: Tensor
    co_firing_values: Tensor
    top_windows: Tensor | None = None
    sample_windows: Tensor | None = None
    promoted_ids: Tensor | None = None
    promoted_values: Tensor | None = None
    suppressed_ids: Tensor | None = None
    suppressed_values: Tensor | None = None
    alignment: Tensor | None = None
    similar_direction_ids: Tensor | None = None
    similar_direction_values: Tensor | None = None
    similar_modulation_ids: Tensor | None = None
    similar_modulation_values: Tensor | None = None

    @property
    def domain_frequency(self) -> Tensor:
        """Return the share of each domain's tokens on which each expert is active, (N, D) float64."""
        return self.domain_counts.double() / self.domain_tokens.clamp_min(1)

    def at_least(self, experts: Tensor, values: Tensor) -> Tensor:
        """Return on how many tokens experts (…) have coefficients of at least `values` (…), by the histogram."""
        edges = torch.cat([HISTOGRAM_EDGES[:1] / 2, HISTOGRAM_EDGES, self.maximum.max().clamp_min(2**12)[None]])
        counts = self.histogram[experts].double()  # (…, bins)
        place = torch.bucketize(values, HISTOGRAM_EDGES, right=True)
        above = counts.flip(-1).cumsum(-1).flip(-1).gather(-1, place[..., None])[..., 0]
        low, high = edges[place], edges[place + 1]
        below = ((values / low).log2() / (high / low).log2()).clamp(0, 1)  # share of the bin that is smaller
        return (above - below * counts.gather(-1, place[..., None])[..., 0]) * (values <= self.maximum[experts])


@dataclass
class Collection:
    """What one pass over a text collected of the experts of all layers.

    Attributes:
        layers: {layer: collection}.
        ids, offsets: token ids of the rows that the layers name, one after another, int32, and where each row begins,
            (rows + 1) int64. Rows have no padding.
        documents: number of the document that each row is of, (rows) int32.
        domains: names of the D domains.
        settings: the text, and how it was read.
    """

    layers: dict[int, ExpertCollection]
    ids: Tensor
    offsets: Tensor
    documents: Tensor
    domains: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def row(self, number: int | Tensor) -> list[int]:
        """Return the token ids of a row."""
        return self.ids[self.offsets[int(number)] : self.offsets[int(number) + 1]].tolist()

    def tokens_at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the token ids at positions of rows, int64; -1 where there is none."""
        begin, place = self.offsets[rows.long().clamp_min(0)], positions.long()
        stop = self.offsets[rows.long().clamp_min(0) + 1]
        there = (rows >= 0) & (place >= 0) & (begin + place < stop)
        return self.ids.long()[(begin + place).masked_fill(~there, 0)].masked_fill(~there, -1)

    def token_counts(self, vocabulary: int) -> Tensor:
        """Return how often the rows have each token, without their first positions, (vocabulary) int64."""
        inside = torch.ones_like(self.ids, dtype=torch.bool)
        inside[self.offsets[:-1][self.offsets.diff() > 0]] = False
        return self.ids[inside].bincount(minlength=vocabulary)[:vocabulary]

    def top(self, layer: int, expert: int, count: int = 8) -> list[Context]:
        """Return the strongest contexts of an expert, of as many documents as there are."""
        found = self._contexts(layer, expert, "top")
        per_document = -(-count // max(1, int(self.documents.max()) + 1)) if found else 1
        rows = {context.row: self.row(context.row) for context in found}
        documents = {row: int(self.documents[row]) for row in rows}
        places = [(context.row, context.position) for context in found]
        return [found[index] for index in distinct(places, rows, documents, count, per_document)]

    def quantiles(self, layer: int, expert: int, count: int = 5) -> list[Context]:
        """Return contexts at evenly spaced quantiles of an expert's coefficients, if possible of other documents.

        Quantile (i + ½) / count of the sample for i = 0, 1 …, from large coefficients to small ones.
        """
        found = self._contexts(layer, expert, "sample")
        chosen: list[int] = []
        seen: set[int] = set()
        for part in range(min(count, len(found))):
            middle = int((part + 0.5) * len(found) / count)
            near = sorted(set(range(len(found))).difference(chosen), key=lambda index: (abs(index - middle), index))
            near = [index for index in near if abs(index - middle) <= len(found) // (2 * count) + 1] or near[:1]
            new = [index for index in near if int(self.documents[found[index].row]) not in seen] or near
            chosen.append(new[0])
            seen.add(int(self.documents[found[new[0]].row]))
        return [found[index] for index in sorted(chosen)]

    def _contexts(self, layer: int, expert: int, kind: str) -> list[Context]:
        parts = (
            getattr(self.layers[layer], f"{kind}_{name}")[expert].tolist() for name in ("values", "rows", "positions")
        )
        return [Context(*entry) for entry in zip(*parts, strict=True) if entry[0] > 0]

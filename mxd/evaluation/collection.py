"""Collect, in one pass over a text, how often, how strongly and where each expert is active.

    collection = collect_experts(model, decomposition, batches)
    layer = collection.layers[15]
    layer.frequency, layer.maximum                                    # (N)
    collection.row(layer.top_rows[812, 0]), layer.top_positions[812, 0]   # where expert 812 is most active

Memory does not grow with the text, except for its token ids: a few tables of N rows a layer are kept. A batch costs a
few operations on its K active experts a token, since most of them beat no entry of the tables.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mxd.base.forward import evaluating, right_padded
from mxd.modeling_mxd import ExpertCoefficients, MxDLayer, MxDModel, SparseLayer

from .contexts import Context, distinct, distinct_places
from .directions import DirectionFit, set_fitted_directions
from .expert_use import captured_activations
from .logit_effects import find_unembedding, nearest_rows
from .streamed_tables import (
    LargestEntries,
    TokenSample,
    count_pairs,
    hashed,
    make_places,
    split_places,
    strongest_of_rows,
)

logger = logging.getLogger(__name__)

TOP = 16
"""Contexts of the largest coefficients that are kept of each expert."""
SAMPLE = 32
"""Tokens that are kept of each expert, drawn at random from those on which it is active."""
CANDIDATES = 6
"""Rows kept during the pass for each context, of which near-duplicates and rows of the same document are left out."""
CO_FIRING_PAIRS = 2**22
"""Pairs of a token and an expert that co-firing is counted on."""
_PRUNED_FROM = 2**14

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
        domain_counts: number of tokens of each domain on which each expert is active, (N, D) int32.
        domain_tokens: number of tokens of each domain, (D) int64.
        promoted_ids, promoted_values: the tokens whose logits the expert's direction raises most, (N, 10) int32, and by
            how much, relative to the mean over the vocabulary, (N, 10) float32; None without directions, or if the
            model's final norm is not found.
        suppressed_ids, suppressed_values: the same for those that it lowers most.
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
    promoted_ids: Tensor | None = None
    promoted_values: Tensor | None = None
    suppressed_ids: Tensor | None = None
    suppressed_values: Tensor | None = None
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


class _LayerPass:
    """The tables of one layer during the pass."""

    def __init__(self, layer: SparseLayer, top: int, sample: int, domains: int, fit: bool = False):
        experts, device = layer.config.num_experts, layer.expert_table.device
        self.layer, self.fit = layer, DirectionFit(experts) if fit else None
        self.experts, self.tokens, self.wanted = experts, 0, top
        self.counts, self.histogram, self.domain_counts = (
            torch.zeros(experts, size, dtype=torch.int64, device=device)
            for size in (1, len(HISTOGRAM_EDGES) + 1, domains)
        )
        self.domain_tokens = torch.zeros(domains, dtype=torch.int64, device=device)
        self.edges = HISTOGRAM_EDGES.to(device)
        self.top = LargestEntries(experts, top * CANDIDATES, torch.float32, device)
        self.sample = LargestEntries(experts, sample, torch.int64, device)
        self.together = TokenSample(CO_FIRING_PAIRS // layer.config.num_experts_per_tok)

    def read(self, x: Tensor, y: Tensor, places: Tensor, inside: Tensor, domains: Tensor | None) -> None:
        """Add tokens: x (T, I) and y (T, O), and what `update` takes."""
        device = self.layer.gate.weight.device
        values, indices = self.layer.encode(x.to(device))
        if self.fit is not None:
            self.fit.update(ExpertCoefficients(values, indices), x, y)
        here = None if domains is None else domains.to(device)
        self.update(values, indices, places.to(device), inside.to(device), here)

    def update(self, values: Tensor, indices: Tensor, places: Tensor, inside: Tensor, domains: Tensor | None) -> None:
        """Add coefficients (T, K), the places of their tokens (T), whether contexts may show them, and domains (T)."""
        self.tokens += len(values)
        token, slot = (values > 0).nonzero(as_tuple=True)
        expert, value = indices[token, slot], values[token, slot].float()
        count_pairs(self.counts, expert, torch.zeros_like(expert))
        if domains is not None:  # -1: none
            named = domains[token] >= 0
            count_pairs(self.domain_counts, expert[named], domains[token][named])
            self.domain_tokens += domains[domains >= 0].bincount(minlength=len(self.domain_tokens))
        self.together.update(indices.masked_fill(values <= 0, -1), hashed(places))
        shown = inside[token]
        expert, value, place = expert[shown], value[shown], places[token[shown]]
        count_pairs(self.histogram, expert, torch.bucketize(value, self.edges, right=True))
        self.sample.update(expert, hashed(place, expert), place, value)
        better = value > self.top.least(expert)
        expert, value, place = strongest_of_rows(expert[better], value[better], place[better])
        self.top.update(expert, value, place, value)

    def places(self) -> Tensor:
        """Return the places in the tables, (P)."""
        places = torch.cat([self.top.places.flatten(), self.sample.places.flatten()])
        return places[places >= 0].cpu()

    def finish(self, rows: Mapping[int, list[int]], documents: Mapping[int, int]) -> dict[str, Any]:
        """Return the fields of the collection; `rows` has {row: token ids} and `documents` {row: document}."""
        top = distinct_places(self.top.values.cpu(), self.top.places.cpu(), rows, documents, self.wanted)
        values, order = self.sample.values.cpu().sort(1, descending=True)
        sample = (values, self.sample.places.cpu().gather(1, order))
        fields: dict[str, Any] = {"tokens": self.tokens, "maximum": self.top.values[:, 0].cpu().clone()}
        for name, (values, places) in (("top", top), ("sample", sample)):
            fields[f"{name}_values"] = values
            fields[f"{name}_rows"], fields[f"{name}_positions"] = split_places(places)
        fields["frequency"] = self.counts[:, 0].cpu().double() / max(self.tokens, 1)
        fields["histogram"] = self.histogram.cpu().int()
        fields["domain_counts"], fields["domain_tokens"] = self.domain_counts.cpu().int(), self.domain_tokens.cpu()
        fields["co_firing_ids"], fields["co_firing_values"] = self.together.co_firing(self.experts)
        return fields


class _Rows:
    """The token ids of the rows that are still in a table."""

    def __init__(self) -> None:
        self.rows: dict[int, list[int]] = {}
        self.count, self.pruned_at = 0, _PRUNED_FROM

    def add(self, ids: Tensor, mask: Tensor | None) -> None:
        lengths = [ids.shape[1]] * len(ids) if mask is None else mask.bool().sum(1).tolist()
        self.rows |= {
            self.count + n: row[:length] for n, (row, length) in enumerate(zip(ids.tolist(), lengths, strict=True))
        }
        self.count += len(ids)

    def prune(self, passes: Iterable[_LayerPass], finished: bool = False) -> None:
        if len(self.rows) > self.pruned_at or finished:
            named = set((torch.cat([one.places() for one in passes]) >> 32).unique().tolist())
            self.rows = {number: row for number, row in self.rows.items() if number in named}
            self.pruned_at = max(_PRUNED_FROM, 2 * len(self.rows))


@torch.no_grad()
def collect_experts(
    model: nn.Module,
    decomposition: MxDModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    documents: Sequence[int] | None = None,
    domains: Mapping[str, Iterable[int]] | None = None,
    directions: Mapping[int, Tensor] | None = None,
    fit: bool = False,
    include_first: bool = False,
    top: int = TOP,
    sample: int = SAMPLE,
    settings: Mapping[str, Any] | None = None,
) -> Collection:
    """Collect the experts of all layers, on the untouched model's activations.

    Args:
        model, decomposition: the base model and its decomposition.
        batches: `input_ids` (batch, tokens) and, if there is padding, `attention_mask`.
        documents: for every row a number that the rows of its document share; None: each row is a document.
        domains: {domain: the numbers of its rows}.
        directions: {layer: (N, O)}, what each expert adds to the MLP's output per unit of its coefficient. A
            transcoder's are the rows of its decoder, if the layer is not named.
        fit: fit the directions in the same pass instead, and set them, see `fit_directions`.
        include_first: whether contexts, sample, histogram and maximum include each row's first position, often a sink.
        top, sample: M and R, entries of each expert.
        settings: what to record of the text.

    Returns:
        The collection. Top contexts are of different documents, if there are M documents, and no two share half of
        their text. A row that the model runs several times (ALBERT) counts with each run.

    Raises:
        ValueError: there are no tokens, or the layer's positions are not those of the tokens.
    """
    config, names, kept, example = decomposition.config, list(domains or {}), _Rows(), None
    passes = {layer: _LayerPass(decomposition.layer(layer), top, sample, len(names), fit) for layer in config.layers}
    domain_of = {row: number for number, name in enumerate(names) for row in (domains or {})[name]}
    with evaluating(model, decomposition):
        for batch in batches:
            ids, padding = right_padded(batch, torch.device("cpu"))
            example = ids[:1, :8] if example is None else example
            captured, masks = captured_activations(model, decomposition, batch)
            of_batch = torch.tensor([domain_of.get(kept.count + row, -1) for row in range(len(ids))])
            for layer, (x, y) in captured.items():
                if x.shape[1] != ids.shape[1] or len(x) % len(ids):
                    raise ValueError(f"layer {layer} does not run on the {ids.shape[1]} tokens of a row")
                run, position = masks[layer].nonzero(as_tuple=True)
                row = run % len(ids)  # a layer may run on them again
                places, inside = make_places(row + kept.count, position), (position > 0) | include_first
                domain = of_batch.to(row.device)[row] if names else None
                passes[layer].read(x[run, position], y[run, position], places, inside, domain)
            kept.add(ids, padding)
            kept.prune(passes.values())
        if example is None:
            raise ValueError("no tokens to collect experts on: batches is empty")
        kept.prune(passes.values(), finished=True)
        of_row = {row: row if documents is None else documents[row] for row in kept.rows}
        found = _finish(model, decomposition, passes, kept.rows, of_row, directions or {}, example)
    return _compact(found, kept.rows, of_row, names, dict(settings or {}))


def _finish(
    model: nn.Module,
    decomposition: MxDModel,
    passes: Mapping[int, _LayerPass],
    rows: Mapping[int, list[int]],
    of_row: Mapping[int, int],
    directions: Mapping[int, Tensor],
    example: Tensor,
) -> dict[int, ExpertCollection]:
    """Return the collection of every layer, with directions that are fitted now or given."""
    if fits := {layer: one.fit for layer, one in passes.items() if one.fit is not None}:
        set_fitted_directions(decomposition, fits)
        directions = {layer: decomposition.directions(layer).direction for layer in fits}
    return {
        layer: ExpertCollection(
            **one.finish(rows, of_row), **expert_effects(model, decomposition, layer, directions.get(layer), example)
        )
        for layer, one in passes.items()
    }


@torch.no_grad()
def expert_effects(
    model: nn.Module, decomposition: MxDModel, layer: int, direction: Tensor | None, example: Tensor
) -> dict[str, Any]:
    """Return the fields of `ExpertCollection` that come from weights alone: logit effects and nearest experts.

    `direction` is (N, O), or None; a transcoder's directions are then its rows. `example` are token ids (1, tokens).
    """
    module = decomposition.layer(layer)
    fields: dict[str, Any] = {}
    if isinstance(module, MxDLayer):
        found = nearest_rows(module.modulation - module.modulation.mean(0))
        fields = dict(zip(("similar_modulation_ids", "similar_modulation_values"), found, strict=True))
    else:
        direction = module.expert_table if direction is None else direction
    if direction is None:
        return fields
    fields |= zip(("similar_direction_ids", "similar_direction_values"), nearest_rows(direction), strict=True)
    try:
        fields |= find_unembedding(model, example, decomposition.config.stack).largest(direction)
    except ValueError as error:
        logger.warning("%s", error)
    return fields


def _compact(
    layers: dict[int, ExpertCollection],
    rows: dict[int, list[int]],
    documents: dict[int, int],
    domains: list[str],
    settings: dict[str, Any],
) -> Collection:
    """Keep the rows that the layers name, and number them and their documents anew."""
    named = torch.cat([part.flatten() for one in layers.values() for part in (one.top_rows, one.sample_rows)])
    numbers = named[named >= 0].unique()
    for one in layers.values():
        for name in ("top_rows", "sample_rows"):
            old = getattr(one, name)
            setattr(one, name, torch.where(old < 0, -1, torch.searchsorted(numbers, old)).int())
    kept = [rows[number] for number in numbers.tolist()]
    lengths = torch.tensor([0, *map(len, kept)])
    ids = torch.tensor([token for row in kept for token in row], dtype=torch.int32)
    of_rows = [documents[row] for row in numbers.tolist()]
    names = {name: number for number, name in enumerate(dict.fromkeys(of_rows))}
    of_row = torch.tensor([names[name] for name in of_rows], dtype=torch.int32)
    return Collection(layers, ids, lengths.cumsum(0), of_row, domains, settings)

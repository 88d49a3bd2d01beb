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
from typing import Any

import torch
from torch import Tensor, nn

from mxd.base.forward import evaluating, right_padded
from mxd.evaluation.expert_use import captured_activations
from mxd.modeling_mxd import ExpertCoefficients, MxDLayer, MxDModel, SparseLayer

from .collection import HISTOGRAM_EDGES, Collection, ExpertCollection
from .contexts import AROUND, distinct_places
from .directions import DirectionFit, set_fitted_directions
from .logit_effects import Unembedding, find_unembedding, nearest_rows
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
        self.top = LargestEntries(experts, top * CANDIDATES, torch.float32, device, 2 * AROUND + 1)
        self.sample = LargestEntries(experts, sample, torch.int64, device, 2 * AROUND + 1)
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
        expert, value, token = expert[shown], value[shown], token[shown]
        place = places[token]
        count_pairs(self.histogram, expert, torch.bucketize(value, self.edges, right=True))
        bins = ((torch.bucketize(values.float(), self.edges, right=True) + 1) * (values > 0) * inside[:, None]).byte()

        def window(entries: Tensor) -> Tensor:
            return _windows(bins, indices, places, expert[entries], token[entries])

        self.sample.update(expert, hashed(place, expert), place, value, window)
        better = (value > self.top.least(expert)).nonzero().squeeze(1)
        better = better[strongest_of_rows(expert[better], value[better], place[better])]
        expert, value, token, place = expert[better], value[better], token[better], place[better]
        self.top.update(expert, value, place, value, window)

    def places(self) -> Tensor:
        """Return the places in the tables, (P)."""
        places = torch.cat([self.top.places.flatten(), self.sample.places.flatten()])
        return places[places >= 0].cpu()

    def finish(self, rows: Mapping[int, list[int]], documents: Mapping[int, int]) -> dict[str, Any]:
        """Return the fields of the collection; `rows` has {row: token ids} and `documents` {row: document}."""
        distinct = distinct_places(self.top.places.cpu(), rows, documents, self.wanted)
        order = self.sample.values.cpu().argsort(1, descending=True)
        fields: dict[str, Any] = {"tokens": self.tokens, "maximum": self.top.values[:, 0].cpu().clone()}
        for name, table, chosen in (("top", self.top, distinct), ("sample", self.sample, order)):
            column, none = chosen.clamp_min(0), chosen < 0
            fields[f"{name}_values"] = table.values.cpu().gather(1, column).masked_fill(none, 0.0)
            places = table.places.cpu().gather(1, column).masked_fill(none, -1)
            fields[f"{name}_rows"], fields[f"{name}_positions"] = split_places(places)
            windows = table.windows.cpu().take_along_dim(column[..., None], 1)
            fields[f"{name}_windows"] = windows.masked_fill(none[..., None], 0)
        fields["frequency"] = self.counts[:, 0].cpu().double() / max(self.tokens, 1)
        fields["histogram"] = self.histogram.cpu().int()
        fields["domain_counts"], fields["domain_tokens"] = self.domain_counts.cpu().int(), self.domain_tokens.cpu()
        fields["co_firing_ids"], fields["co_firing_values"] = self.together.co_firing(self.experts)
        return fields


def _windows(bins: Tensor, indices: Tensor, places: Tensor, expert: Tensor, token: Tensor) -> Tensor:
    """Return the bins of experts (P) on the tokens around each of theirs (P), (P, W) uint8.

    bins and indices are (T, K); places (T) are those of the tokens, rows one after another.
    """
    found = []
    for step in range(-AROUND, AROUND + 1):
        near = (token + step).clamp(0, len(places) - 1)
        same_row = places[near] == places[token] + step
        found.append((bins[near] * (indices[near] == expert[:, None])).amax(1) * same_row)
    return torch.stack(found, 1)


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
        top, sample, settings: M and R, entries of each expert; and what to record of the text.

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
                _read(passes[layer], x, y, masks[layer], kept.count, of_batch, include_first)
            kept.add(ids, padding)
            kept.prune(passes.values())
        if example is None:
            raise ValueError("no tokens to collect experts on: batches is empty")
        kept.prune(passes.values(), finished=True)
        of_row = {row: row if documents is None else documents[row] for row in kept.rows}
        layers = {layer: ExpertCollection(**one.finish(kept.rows, of_row)) for layer, one in passes.items()}
        found = _compact(layers, kept.rows, of_row, names, dict(settings or {}))
        if fits := {layer: one.fit for layer, one in passes.items() if one.fit is not None}:
            set_fitted_directions(decomposition, fits)
            directions = {layer: decomposition.directions(layer).direction for layer in fits}
        _add_effects(found, model, decomposition, directions or {}, example)
    return found


def _read(
    into: _LayerPass, x: Tensor, y: Tensor, mask: Tensor, first_row: int, domains: Tensor, include_first: bool
) -> None:
    """Add the activations (runs · rows, tokens, width) of a layer on a batch; `domains` (rows) are numbers."""
    run, position = mask.nonzero(as_tuple=True)
    row = run % len(domains)  # a layer may run on them again
    places, inside = make_places(row + first_row, position), (position > 0) | include_first
    domain = domains.to(row.device)[row] if len(into.domain_tokens) else None
    into.read(x[run, position], y[run, position], places, inside, domain)


def _add_effects(
    collection: Collection, model: nn.Module, decomposition: MxDModel, directions: Mapping[int, Tensor], example: Tensor
) -> None:
    """Set the fields that come from weights: nearest experts, effects on the logits, and alignment.

    `directions` are {layer: (N, O)}; a transcoder's are its rows, if the layer is not named. `example` are token ids
    (1, tokens).
    """
    known: dict[int, Tensor] = {}
    for layer, one in collection.layers.items():
        module = decomposition.layer(layer)
        if isinstance(module, MxDLayer):
            nearest = nearest_rows(module.modulation - module.modulation.mean(0))
            one.similar_modulation_ids, one.similar_modulation_values = nearest
        else:
            known[layer] = module.expert_table
        known |= {layer: directions[layer]} if layer in directions else {}
        if layer in known:
            one.similar_direction_ids, one.similar_direction_values = nearest_rows(known[layer])
    try:
        unembedding = find_unembedding(model, example, decomposition.config.stack) if known else None
    except ValueError as error:
        logger.warning("%s", error)
        return
    for layer, direction in known.items():
        assert unembedding is not None
        one = collection.layers[layer]
        vars(one).update(unembedding.largest(direction))
        one.alignment = context_alignment(collection, layer, direction, unembedding)


def context_alignment(collection: Collection, layer: int, direction: Tensor, unembedding: Unembedding) -> Tensor:
    """Return how far each expert's direction (N, O) promotes what follows its top contexts, (N); see `Unembedding`."""
    one, counts = collection.layers[layer], collection.token_counts(len(unembedding.weight))
    return unembedding.alignment(direction, collection.tokens_at(one.top_rows, one.top_positions + 1), counts)


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

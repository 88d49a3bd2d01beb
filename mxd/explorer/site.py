"""The explorer's data: what the page reads of a collection of experts, as JSON values by path.

index.json            the decomposition, its layers, and how the text was read
15/experts.json       a column for each property that experts of layer 15 are sorted and found by
15/3.json             the pages of the experts from 3 * chunk on
15/words.json         of each word the experts in whose contexts it is; only exported, to search without the model
rows/3.json           the tokens of the text's rows from 3 * chunk on
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mxd.experts.collection import HISTOGRAM_EDGES, Collection, ExpertCollection
from mxd.experts.contexts import AROUND, TokenPieces, whole_character

QUANTILES = (0.9, 0.75, 0.5, 0.25, 0.1)
PER_QUANTILE = 2
PROMOTED = 3
"""Promoted tokens in the list of experts."""
LEVELS = 4
"""Shades of tokens on which an expert is active."""
CHUNK = 128
"""Experts, or rows, of a file of an exported site."""
# Largest coefficient of each bin of the histograms; bin 0 stands for none.
_LARGEST = torch.cat([HISTOGRAM_EDGES[:1], HISTOGRAM_EDGES, HISTOGRAM_EDGES[-1:]])
_WORD, _NUMBER = re.compile(r"[^\W_]+"), re.compile(r"[0-9]{1,9}")
_NEIGHBOURS = {
    "similar_direction": "nearest directions (cosine)",
    "similar_modulation": "nearest modulations (cosine)",
    "co_firing": "active on the same tokens",
}


class ExplorerSite:
    """Values of the site's files.

    Args:
        collection: what was collected.
        tokenizer: the base model's.
        about: `name`, `about` (a sentence on the decomposition and its text) and `warning` of the index.
        api: whether the page may call the model.
        chunk: experts, or rows, of a file. One where files are made when they are asked for.
    """

    def __init__(
        self,
        collection: Collection,
        tokenizer: PreTrainedTokenizerBase,
        about: dict[str, str],
        api: bool = False,
        chunk: int = 1,
    ):
        self.collection, self.about, self.api, self.chunk = collection, about, api, chunk
        self.pieces = TokenPieces(tokenizer)
        self._row = lru_cache(2**16)(lambda row: self.pieces.of(collection.row(row)))

    def paths(self) -> Iterator[str]:
        """Yield the path of every file."""
        yield "index.json"
        for layer, experts in self.collection.layers.items():
            yield from (f"{layer}/experts.json", f"{layer}/words.json")
            yield from (f"{layer}/{number}.json" for number in range(-(-len(experts.frequency) // self.chunk)))
        yield from (f"rows/{number}.json" for number in range(-(-len(self.collection.documents) // self.chunk)))

    def value(self, path: str) -> Any:
        """Return the content of a file, or None if there is no such file."""
        if path == "index.json":
            return self._index()
        folder, _, name = path.removesuffix(".json").partition("/")
        if not path.endswith(".json") or not (folder == "rows" or _NUMBER.fullmatch(folder)):
            return None
        first = int(name) * self.chunk if _NUMBER.fullmatch(name) else None
        if folder == "rows":
            count = len(self.collection.documents)
            rows = range(0) if first is None else range(first, min(first + self.chunk, count))
            return list(map(self._row, rows)) or None
        layer = self.collection.layers.get(int(folder))
        if layer is None:
            return None
        if first is None:
            make = {"experts": self._columns, "words": self._words}.get(name)
            return make and make(layer)
        experts = range(first, min(first + self.chunk, len(layer.frequency)))
        return [self._page(layer, expert) for expert in experts] or None

    def _index(self) -> dict[str, Any]:
        collection = self.collection
        layers = [{"layer": number, "experts": len(one.frequency)} for number, one in collection.layers.items()]
        edges = [0.0, *HISTOGRAM_EDGES.tolist(), None]
        shared = {"layers": layers, "chunk": self.chunk, "domains": collection.domains, "edges": edges}
        return {**self.about, "api": self.api, **shared}

    def _columns(self, layer: ExpertCollection) -> dict[str, list[Any]]:
        places = self.collection.tokens_at(layer.top_rows, layer.top_positions)
        ids = places.mode(1).values.where((places >= 0).all(1), places[:, 0])
        counts = layer.domain_frequency
        promoted = [] if layer.promoted_ids is None else layer.promoted_ids[:, :PROMOTED].tolist()
        return {
            "frequency": _rounded(layer.frequency),
            "maximum": _rounded(layer.maximum),
            "token": [None if one < 0 else self.pieces.one(one) for one in ids.tolist()],
            "promoted": [" ".join(self.pieces.one(one).strip() for one in ids) for ids in promoted],
            "alignment": [] if layer.alignment is None else _rounded(layer.alignment),
            "domain": torch.where(counts.amax(1) > 0, counts.argmax(1), -1).tolist() if counts.shape[1] else [],
        }

    def _page(self, layer: ExpertCollection, expert: int) -> dict[str, Any]:
        contexts = self._contexts(layer, expert, "top")
        groups = [{"name": "the largest coefficients", "contexts": contexts}] if contexts else []
        active = int((layer.sample_values[expert] > 0).sum())
        for quantile in QUANTILES if active >= len(QUANTILES) * PER_QUANTILE else ():
            start = min(int((1 - quantile) * active), active - PER_QUANTILE)
            shown = self._contexts(layer, expert, "sample", slice(start, start + PER_QUANTILE))
            groups.append({"name": f"larger than {quantile:.0%} of its coefficients", "contexts": shown})
        similar = []
        for name, title in _NEIGHBOURS.items():
            ids, near = getattr(layer, f"{name}_ids"), getattr(layer, f"{name}_values")
            pairs = [] if ids is None else zip(ids[expert].tolist(), _rounded(near[expert]), strict=True)
            if found := [pair for pair in pairs if pair[0] >= 0]:
                similar.append({"name": title, "experts": found})
        shares = layer.domain_frequency[expert]
        domains = sorted(zip(self.collection.domains, _rounded(shares), strict=True), key=lambda pair: -(pair[1] or 0))
        return {
            "frequency": float(layer.frequency[expert]),
            "maximum": float(layer.maximum[expert]),
            "alignment": None if layer.alignment is None else float(f"{float(layer.alignment[expert]):.3g}"),
            "histogram": layer.histogram[expert].tolist(),
            "contexts": groups,
            "promoted": self._effects(layer.promoted_ids, layer.promoted_values, expert),
            "suppressed": self._effects(layer.suppressed_ids, layer.suppressed_values, expert),
            "similar": similar,
            "domains": [pair for pair in domains if pair[1]],
        }

    def _effects(self, ids: Tensor | None, values: Tensor | None, expert: int) -> list[tuple[str, float | None]]:
        if ids is None or values is None:
            return []
        return list(zip(map(self.pieces.one, ids[expert].tolist()), _rounded(values[expert]), strict=True))

    def _contexts(
        self, layer: ExpertCollection, expert: int, kind: str, part: slice = slice(None)
    ) -> list[dict[str, Any]]:
        """Return an expert's contexts: where they are, and their text in `parts`.

        A part is text, or [text of a token on which the expert is active, how strongly: see `_levels`, its position].
        """
        values, rows, positions = (
            getattr(layer, f"{kind}_{name}")[expert, part].tolist() for name in ("values", "rows", "positions")
        )
        windows, maximum = getattr(layer, f"{kind}_windows"), max(float(layer.maximum[expert]), 1e-30)
        around = [[]] * len(values) if windows is None else _levels(windows[expert, part], maximum)
        found = []
        for value, row, position, levels in zip(values, rows, positions, around, strict=True):
            if value > 0 and row >= 0:
                pieces = self._row(row)
                here = whole_character(pieces, position)
                active = {here: max(1, min(LEVELS, math.ceil(LEVELS * value / maximum)))}
                for place, level in enumerate(levels, position - AROUND):
                    if level and 0 <= place < len(pieces) and place != position:
                        whole = whole_character(pieces, place)
                        active[whole] = max(level, active.get(whole, 0))
                shown = range(max(0, here - AROUND), min(len(pieces), here + AROUND + 1))
                parts = [[pieces[place], active[place], place] if place in active else pieces[place] for place in shown]
                found.append({"value": float(f"{value:.3g}"), "row": row, "position": here, "parts": _joined(parts)})
        return found

    def _words(self, layer: ExpertCollection) -> dict[str, list[int]]:
        """Return {word: [expert, number of its top contexts with the word, expert, …]}, lower case."""
        words: dict[str, list[int]] = {}
        for expert in range(len(layer.frequency)):
            counted = Counter(word for one in self._contexts(layer, expert, "top") for word in _words_of(one))
            for word, count in counted.items():
                words.setdefault(word, []).extend((expert, count))
        return words


def _levels(bins: Tensor, maximum: float) -> list[list[int]]:
    """Return how strong coefficients are in parts of the maximum, from their bins: 1 to `LEVELS`, 0 for none."""
    largest = _LARGEST[bins.int()]
    return ((LEVELS * largest / maximum).ceil().clamp(1, LEVELS) * (bins > 0)).int().tolist()


def _joined(parts: list[Any]) -> list[Any]:
    """Join parts that are text."""
    groups = [(kind, list(group)) for kind, group in groupby(parts, type)]
    return [one for kind, group in groups for one in (["".join(group)] if kind is str else group)]


def _words_of(context: dict[str, Any]) -> set[str]:
    text = "".join(part if isinstance(part, str) else part[0] for part in context["parts"])
    return set(_WORD.findall(text.lower()))


def _rounded(values: Tensor) -> list[float]:
    """Return numbers with three digits, which keeps files small."""
    return [float(f"{value:.3g}") for value in values.tolist()]

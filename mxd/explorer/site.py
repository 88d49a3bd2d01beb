"""The explorer's data: what the page reads of a collection of experts, as JSON values by path.

index.json            the decomposition, its layers, and how the text was read
15/experts.json       a column for each property that experts of layer 15 are sorted and found by
15/3.json             the pages of the experts from 3 * chunk on
15/words.json         of each word the experts in whose contexts it is; only exported, to search without the model
rows/3.json           the tokens of the text's rows from 3 * chunk on
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mxd.evaluation.collection import HISTOGRAM_EDGES, Collection, ExpertCollection
from mxd.evaluation.contexts import AROUND, TokenPieces

QUANTILES = (0.9, 0.75, 0.5, 0.25, 0.1)
PER_QUANTILE = 2
CHUNK = 128
"""Experts, or rows, of a file of an exported site."""
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
        places = self._ids_at(layer.top_rows, layer.top_positions)
        ids = places.mode(1).values.where((places >= 0).all(1), places[:, 0])
        counts = layer.domain_frequency
        promoted = layer.promoted_ids[:, 0].tolist() if layer.promoted_ids is not None else []
        return {
            "frequency": _rounded(layer.frequency),
            "maximum": _rounded(layer.maximum),
            "token": [None if one < 0 else self.pieces.one(one) for one in ids.tolist()],
            "promoted": list(map(self.pieces.one, promoted)),
            "domain": torch.where(counts.amax(1) > 0, counts.argmax(1), -1).tolist() if counts.shape[1] else [],
        }

    def _ids_at(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the token ids of places, -1 for those that are none."""
        places = self.collection.offsets[rows.long().clamp_min(0)] + positions
        return self.collection.ids.long()[places.clamp_min(0)].masked_fill(rows < 0, -1)

    def _page(self, layer: ExpertCollection, expert: int) -> dict[str, Any]:
        top = (layer.top_values, layer.top_rows, layer.top_positions)
        sample = (layer.sample_values, layer.sample_rows, layer.sample_positions)
        contexts = self._contexts(*(part[expert].tolist() for part in top))
        groups = [{"name": "the largest coefficients", "contexts": contexts}] if contexts else []
        values, rows, positions = (part[expert].tolist() for part in sample)
        active = sum(value > 0 for value in values)
        for quantile in QUANTILES if active >= len(QUANTILES) * PER_QUANTILE else ():
            start = min(int((1 - quantile) * active), active - PER_QUANTILE)
            here = slice(start, start + PER_QUANTILE)
            shown = self._contexts(values[here], rows[here], positions[here])
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

    def _contexts(self, values: list[float], rows: list[int], positions: list[int]) -> list[dict[str, Any]]:
        found = []
        for value, row, position in zip(values, rows, positions, strict=True):
            if value > 0 and row >= 0:
                pieces, here = self._row(row), position
                while here and not pieces[here]:  # inside a character
                    here -= 1
                found.append(
                    {
                        "value": float(f"{value:.3g}"),
                        "row": row,
                        "position": here,
                        "before": "".join(pieces[max(0, here - AROUND) : here]),
                        "token": pieces[here],
                        "after": "".join(pieces[here + 1 : here + 1 + AROUND]),
                    }
                )
        return found

    def _words(self, layer: ExpertCollection) -> dict[str, list[int]]:
        """Return {word: [expert, number of its top contexts with the word, expert, …]}, lower case."""
        words: dict[str, list[int]] = {}
        for expert in range(len(layer.frequency)):
            contexts = self._contexts(
                *(part[expert].tolist() for part in (layer.top_values, layer.top_rows, layer.top_positions))
            )
            counted = Counter(word for one in contexts for word in self._words_of(one))
            for word, count in counted.items():
                words.setdefault(word, []).extend((expert, count))
        return words

    @staticmethod
    def _words_of(context: dict[str, Any]) -> set[str]:
        return set(_WORD.findall(f"{context['before']}{context['token']}{context['after']}".lower()))


def _rounded(values: Tensor) -> list[float]:
    """Return numbers with three digits, which keeps files small."""
    return [float(f"{value:.3g}") for value in values.tolist()]

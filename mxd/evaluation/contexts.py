"""Choose and show contexts: the text around the tokens on which an expert is active."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

AROUND = 12
"""Tokens of context on each side of a token."""
MAX_BYTES = 4
"""Bytes of a character in UTF-8, each of which may be a token."""
INCOMPLETE = "\ufffd"


class Context(NamedTuple):
    """A token on which an expert is active."""

    coefficient: float
    row: int
    """number of the row in the collection"""
    position: int
    """of the token in the row"""


def distinct(
    places: Iterable[tuple[int, int]],
    rows: Mapping[int, Sequence[int]] | Sequence[Sequence[int]],
    documents: Mapping[int, int] | Sequence[int],
    count: int,
    per_document: int = 1,
) -> Iterator[int]:
    """Yield the indices of the first `count` places whose contexts differ.

    Args:
        places: row and position.
        rows, documents: {row: token ids}, and {row: the document that it is of}.
        count: most places to take.
        per_document: most places to take of one document.

    A context that shares half of its sequences of four tokens with an earlier one is left out.
    """
    seen: list[set[tuple[int, ...]]] = []
    taken: Counter[int] = Counter()
    for index, (row, position) in enumerate(places):
        if len(seen) == count:
            return
        if taken[documents[row]] == per_document:
            continue
        window = rows[row][max(0, position - AROUND) : position + 1 + AROUND]
        sequences = {tuple(window[begin : begin + 4]) for begin in range(max(1, len(window) - 3))}
        if not any(2 * len(sequences & other) >= min(len(sequences), len(other)) for other in seen):
            seen.append(sequences)
            taken[documents[row]] += 1
            yield index


def distinct_places(
    values: Tensor, places: Tensor, rows: Mapping[int, Sequence[int]], documents: Mapping[int, int], count: int
) -> tuple[Tensor, Tensor]:
    """Return the first `count` entries of each expert with distinct contexts, values and places, (N, C) → (N, count).

    They are of distinct documents, or of as many as there are. Empty entries are 0 and -1.
    """
    per_document = -(-count // max(1, len(set(documents.values()))))
    chosen = torch.zeros(len(values), count, dtype=torch.int64)
    there = torch.zeros(len(values), count, dtype=torch.bool)
    for expert, line in enumerate(places.tolist()):
        split = ((place >> 32, place & 2**32 - 1) for place in line if place >= 0)
        found = list(distinct(split, rows, documents, count, per_document))
        chosen[expert, : len(found)] = torch.tensor(found, dtype=torch.int64)
        there[expert, : len(found)] = True
    return values.gather(1, chosen).where(there, 0.0), places.gather(1, chosen).where(there, -1)


def in_context(
    tokenizer: PreTrainedTokenizerBase, row: Sequence[int], position: int, around: int = AROUND
) -> dict[str, str]:
    """Return {"before", "token", "after"}: a token and the text around it, without a character that is incomplete.

    A token inside a character is shown with the rest of the character.
    """
    row = list(row)
    first, last = max(0, position - around), min(len(row), position + 1 + around)
    upto = {stop: str(tokenizer.decode(row[first:stop])) if stop > first else "" for stop in range(first, last + 1)}
    whole = upto[last]  # decoded together: a token alone loses the space before it
    ends = [stop for stop, text in upto.items() if whole.startswith(text) and not text.endswith(INCOMPLETE)]
    start = max((stop for stop in ends if position - MAX_BYTES < stop <= position), default=None)
    end = min((stop for stop in ends if position < stop < position + 1 + MAX_BYTES), default=None)
    if start is None or end is None:
        before, token = upto[position], str(tokenizer.decode([row[position]]))
        after = str(tokenizer.decode(row[position + 1 : last])) if position + 1 < last else ""
    else:
        before, token, after = upto[start], whole[len(upto[start]) : len(upto[end])], whole[len(upto[end]) :]
    return {"before": before.strip(INCOMPLETE), "token": token, "after": after.strip(INCOMPLETE)}

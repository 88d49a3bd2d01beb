"""Choose and show contexts: the text around the tokens on which an expert is active."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mxd.data.tokens import token_ids

AROUND = 12
"""Tokens of context on each side of a token."""
MAX_TOKENS = 8
"""Tokens that a character may consist of, each a byte or more of it."""
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
    places: Tensor, rows: Mapping[int, Sequence[int]], documents: Mapping[int, int], count: int
) -> Tensor:
    """Return the columns of the first `count` places of each expert with distinct contexts, (N, C) → (N, count).

    They are of distinct documents, or of as many as there are. -1 where there are fewer.
    """
    per_document = -(-count // max(1, len(set(documents.values()))))
    chosen = torch.full((len(places), count), -1)
    for expert, line in enumerate(places.tolist()):
        split = ((place >> 32, place & 2**32 - 1) for place in line if place >= 0)
        found = list(distinct(split, rows, documents, count, per_document))
        chosen[expert, : len(found)] = torch.tensor(found, dtype=torch.int64)
    return chosen


class TokenPieces:
    """Split rows of token ids into the text of each token.

    A token is decoded after another one, since alone it would lose the space before it. Tokens that hold parts of a
    character are decoded together: the first has the whole character as its text, the others have none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.count = tokenizer, len(tokenizer)
        plain = token_ids(tokenizer, ["a"])[0]
        self._before, self._plain = plain[-1:], len(plain)
        self._skip = len(self._decoded([]))
        self.one = lru_cache(maxsize=None)(lambda token: self._decoded([token])[self._skip :])

    def following(self, text: str) -> list[int]:
        """Return the token ids of a text that follows a space."""
        return token_ids(self.tokenizer, [f"a {text.strip()}"])[0][self._plain :] if text.strip() else []

    def _decoded(self, ids: Sequence[int]) -> str:
        known = [token for token in ids if 0 <= token < self.count]
        return str(self.tokenizer.decode([*self._before, *known])) if known or self._before else ""

    def of(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token of a row."""
        pieces = list(map(self.one, ids))
        place = 0
        while place < len(pieces):
            if INCOMPLETE in pieces[place]:
                place += self._join(ids, pieces, place)
            place += 1
        return pieces

    def _join(self, ids: Sequence[int], pieces: list[str], start: int) -> int:
        """Put the character that begins at `start` into its first piece; return how many more tokens it has."""
        for stop in range(start + 2, min(start + MAX_TOKENS, len(ids)) + 1):
            text = self._decoded(ids[start:stop])[self._skip :]
            if INCOMPLETE not in text:
                pieces[start:stop] = [text, *[""] * (stop - start - 1)]
                return stop - start - 1
        return 0


def in_context(tokens: TokenPieces, row: Sequence[int], position: int, around: int = AROUND) -> dict[str, str]:
    """Return {"before", "token", "after"}: a token and the text around it, without a character that is incomplete.

    A token inside a character is shown with the rest of the character.
    """
    pieces = tokens.of(row)
    here = whole_character(pieces, position)
    before, after = pieces[max(0, here - around) : here], pieces[here + 1 : here + 1 + around]
    return {
        "before": "".join(before).strip(INCOMPLETE), "token": pieces[here], "after": "".join(after).strip(INCOMPLETE)
    }  # fmt: skip


def whole_character(pieces: Sequence[str], position: int) -> int:
    """Return the position of the piece that has the text of a token, which may be inside a character."""
    while position and not pieces[position]:
        position -= 1
    return position

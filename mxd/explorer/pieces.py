"""The text of single tokens, with their spaces, such that a row's pieces make up its text."""

from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from mxd.evaluation.contexts import INCOMPLETE

_MAX_TOKENS = 8
"""Tokens that a character may consist of, each a byte or more of it."""


class TokenPieces:
    """Split rows of token ids into the text of each token.

    A token is decoded after another one, since alone it would lose the space before it. Tokens that hold parts of a
    character are decoded together: the first has the whole character as its text, the others have none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.count = tokenizer, len(tokenizer)
        plain = tokenizer.encode("a", add_special_tokens=False)
        self._before = plain[-1:]
        self._skip = len(self._decoded([]))
        self.one = lru_cache(maxsize=None)(lambda token: self._decoded([token])[self._skip :])

    def _decoded(self, ids: list[int]) -> str:
        known = [token for token in ids if 0 <= token < self.count]
        return str(self.tokenizer.decode([*self._before, *known])) if known or self._before else ""

    def of(self, ids: list[int]) -> list[str]:
        """Return the text of each token of a row."""
        pieces = list(map(self.one, ids))
        place = 0
        while place < len(pieces):
            if INCOMPLETE in pieces[place]:
                place += self._join(ids, pieces, place)
            place += 1
        return pieces

    def _join(self, ids: list[int], pieces: list[str], start: int) -> int:
        """Put the character that begins at `start` into its first piece; return how many more tokens it has."""
        for stop in range(start + 2, min(start + _MAX_TOKENS, len(ids)) + 1):
            text = self._decoded(ids[start:stop])[self._skip :]
            if INCOMPLETE not in text:
                pieces[start:stop] = [text, *[""] * (stop - start - 1)]
                return stop - start - 1
        return 0

"""Read where features of an MLP fire in a text. The scores of meaning are made from these contexts.

A feature is an expert of an MxD, a latent of a transcoder, or a neuron. It fires on a token if its coefficient there is
positive and, of a dense representation made sparse by `most_active`, among the K largest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mxd.base.capture import Capture, capture_mlps
from mxd.base.forward import batch_for, evaluating, right_padded
from mxd.base.masks import token_mask
from mxd.evaluation.pooling import Representation, check_each_token
from mxd.modeling_mxd import ExpertCoefficients

from .contexts import AROUND, INCOMPLETE, distinct

MARKS = "<<", ">>"
"""Put around the tokens on which a feature fires, as in Delphi."""
_MARKED_FROM = 0.3  # of the largest value in the context, as in Delphi


class Context(NamedTuple):
    """A place in a text: a row, and a position in it."""

    row: int
    position: int


def most_active(representation: Representation, count: int) -> Representation:
    """Keep, of a dense representation, the `count` largest positive values of each token, as Delphi does of neurons."""

    def encode(x: Tensor, y: Tensor) -> ExpertCoefficients:
        encoded = representation.encode(x, y)
        if not isinstance(encoded, Tensor):
            return encoded
        values, indices = encoded.topk(min(count, representation.width), dim=-1)
        return ExpertCoefficients(values.relu(), indices)

    return Representation(representation.width, encode, representation.directions)


@dataclass(frozen=True)
class FeatureContexts:
    """Places in a text where each of F features fires.

    Attributes:
        features: indices of the features in their representation.
        rows: token ids of each row of the text, without padding.
        documents: for each row, a number that rows of its document share.
        places: for each feature the row, position and value of every token on which it fires, three arrays of equal
            length, in the order of the text.
        include_first: whether the first position of a row counts.
    """

    features: list[int]
    rows: list[list[int]]
    documents: list[int]
    places: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(repr=False)
    include_first: bool = False

    def window(self, context: Context) -> tuple[int, int]:
        """Return begin and end of the positions of a context."""
        begin = max(0 if self.include_first else 1, context.position - AROUND)
        return begin, min(len(self.rows[context.row]), context.position + AROUND + 1)

    def top(self, index: int, count: int) -> list[Context]:
        """Return at most `count` contexts in which feature `index` (0 to F − 1) is most active, the strongest first.

        Each is the strongest position of its row. They are `distinct`, and of distinct documents if that leaves enough.
        """
        order = self._strongest(index)
        found = self._distinct(order, count, per_document=1)
        if len(found) == count:
            return found
        return sorted(self._distinct(found + order, count, per_document=count), key=order.index)

    def spread(self, index: int, count: int, apart: list[Context]) -> list[Context]:
        """Return at most `count` contexts evenly spaced over the values of a feature, none like those of `apart`."""
        rows = {context.row for context in apart}
        order = [context for context in self._strongest(index) if context.row not in rows]
        even = [order[place] for place in np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]
        return self._distinct(apart + even + order, len(apart) + count, per_document=len(self.rows))[len(apart) :]

    def _strongest(self, index: int) -> list[Context]:
        """Return the strongest position of every row in which a feature is active, the strongest row first."""
        rows, positions, values = self.places[index]
        order = np.argsort(-values, kind="stable")
        _, first = np.unique(rows[order], return_index=True)
        return [Context(int(rows[place]), int(positions[place])) for place in order[np.sort(first)]]

    def _distinct(self, places: list[Context], count: int, per_document: int) -> list[Context]:
        return [places[place] for place in distinct(places, self.rows, self.documents, count, per_document)]

    def _ids(self, context: Context) -> list[int]:
        begin, end = self.window(context)
        return self.rows[context.row][begin:end]

    def live(self, count: int, features: int | None = None) -> "FeatureContexts":
        """Keep the features with at least `count` distinct contexts, the first `features` of them."""
        kept = [index for index in range(len(self.features)) if len(self.top(index, count)) == count][:features]
        chosen = [self.features[index] for index in kept], [self.places[index] for index in kept]
        return replace(self, features=chosen[0], places=chosen[1])

    def firing(self, index: int, context: Context) -> dict[int, float]:
        """Return {position: value} of feature `index` inside a context."""
        rows, positions, values = self.places[index]
        begin, end = self.window(context)
        inside = (rows == context.row) & (positions >= begin) & (positions < end)
        return dict(zip(positions[inside].tolist(), values[inside].tolist(), strict=True))

    def marked(self, index: int, context: Context) -> set[int]:
        """Return the positions of a context on which feature `index` has at least 0.3 of its largest value there."""
        values = self.firing(index, context)
        least = _MARKED_FROM * max(values.values(), default=0.0)
        return {position for position, value in values.items() if value >= least}

    def random_contexts(self, count: int, rng: np.random.Generator, without: int | None = None) -> list[Context]:
        """Draw contexts of distinct rows, in which feature `without` does not fire if it is given."""
        found: list[Context] = []
        for row in rng.permutation(len(self.rows)):
            first = 0 if self.include_first else 1
            if len(found) == count:
                break
            if len(self.rows[row]) <= first:
                continue
            context = Context(int(row), int(rng.integers(first, len(self.rows[row]))))
            if without is None or not self.firing(without, context):
                found.append(context)
        return found

    def text(self, tokenizer: PreTrainedTokenizerBase, context: Context, marked: Iterable[int] = ()) -> str:
        """Return the text of a context, with marks around the tokens at the positions `marked`.

        Where such a token is a part of a character, the marks are around the whole character.
        """
        begin, _ = self.window(context)
        ids, inside = self._ids(context), {position - begin for position in marked}
        parts, done, start = [], "", 0
        for flag, group in groupby(range(len(ids)), inside.__contains__):
            stop = list(group)[-1] + 1
            while start < stop < len(ids) and _decode(tokenizer, ids[:stop]).endswith(INCOMPLETE):
                stop += 1 if flag else -1
            if stop <= start:
                continue
            upto = _decode(tokenizer, ids[:stop])  # decoded together: a token alone may lose the space before it
            part = upto[len(done) :] if upto.startswith(done) else _decode(tokenizer, ids[start:stop])
            parts.append(part.join(MARKS) if flag else part)
            done, start = upto, stop
        return "".join(parts)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@torch.no_grad()
def collect_contexts(
    model: nn.Module | Capture,
    layer: int,
    batches: Iterable[Mapping[str, Tensor]],
    representations: Mapping[str, Representation],
    features: Mapping[str, Sequence[int]],
    *,
    documents: Sequence[int] | None = None,
    include_first: bool = False,
    stack: str | None = None,
    site: str = "mlp",
) -> dict[str, FeatureContexts]:
    """Collect where features fire, for all representations in one pass of the model, up to the layer.

    Args:
        model: the base model, untouched; or a function from a batch to the MLPs' inputs and outputs.
        layer: index of the layer of the MLP.
        batches: `input_ids` (batch, tokens) and, if there is padding, `attention_mask`.
        representations: by name; make dense ones sparse by `most_active`.
        features: for each representation, the features to read; memory is that of the tokens on which they fire.
        documents: for each row a number that rows of its document share, as `document_batches` returns it. Without it
            every row is a document.
        include_first: whether each row's first position counts; see `pool_features`.
        stack, site: see `find_mlps`.

    Returns:
        {name: contexts}.

    Raises:
        ValueError: a representation has no such feature; `documents` is not one number for each row; or the model runs
            the layer several times in a pass (ALBERT).
    """
    places = {name: _places(features[name], representations[name].width, name) for name in features}
    rows: list[list[int]] = []
    parts: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in features}
    with evaluating(*([model] if isinstance(model, nn.Module) else [])):
        for batch in batches:
            if isinstance(model, nn.Module):
                ids, mask = batch_for(model, batch)
                x, y = capture_mlps(model, [layer], ids, mask, stack=stack, site=site)[layer]
            else:
                (ids, mask), (x, y) = right_padded(batch, torch.device("cpu")), model(batch)[layer]
            check_each_token(layer, x, ids)
            counted = token_mask(ids, mask, include_first).to(x.device)
            row, position = (part.cpu() for part in counted.nonzero(as_tuple=True))
            for name, place in places.items():
                token, feature, value = _chosen(representations[name].encode(x[counted], y[counted]), place)
                found = (len(rows) + row[token], position[token], feature, value.float())
                parts[name].append(tuple(part.numpy() for part in found))
            lengths = token_mask(ids, mask).sum(-1).tolist()
            rows += [one[:length].tolist() for one, length in zip(ids, lengths, strict=True)]
    if documents is not None and len(documents) != len(rows):
        raise ValueError(f"documents must be one number for each of the {len(rows)} rows, got {len(documents)}")
    origins = list(range(len(rows)) if documents is None else documents)
    return {name: _grouped(list(features[name]), rows, origins, parts[name], include_first) for name in features}


def _places(features: Sequence[int], width: int, name: str) -> Tensor:
    """Return the place of each of `width` features among the chosen ones; −1 for others."""
    if wrong := [feature for feature in features if not 0 <= feature < width]:
        raise ValueError(f"{name} has no feature {wrong[0]}: they are 0 to {width - 1}")
    places = torch.full((width,), -1)
    places[torch.as_tensor(list(features), dtype=torch.int64)] = torch.arange(len(features))
    return places


def _chosen(encoded: Tensor | ExpertCoefficients, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the token, place and value of every token on which a chosen feature fires, each (found)."""
    if isinstance(encoded, Tensor):
        encoded = ExpertCoefficients(encoded, torch.arange(encoded.shape[-1]).expand(encoded.shape))
    values, indices = (tensor.detach().cpu() for tensor in encoded)
    place = places[indices]
    token, slot = ((place >= 0) & (values > 0)).nonzero(as_tuple=True)
    return token, place[token, slot], values[token, slot]


def _grouped(
    features: list[int], rows: list[list[int]], documents: list[int], parts: list[Any], include_first: bool
) -> FeatureContexts:
    if not parts:
        raise ValueError("there is no text to read: batches is empty")
    row, position, feature, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    of_feature = [feature == index for index in range(len(features))]
    places = [(row[mine], position[mine], value[mine]) for mine in of_feature]
    return FeatureContexts(features, rows, documents, places, include_first)

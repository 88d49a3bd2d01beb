"""Load labelled documents from any `datasets` source, and cut them into short texts of token ids for probing.

documents = load_labelled_text("fancyzhx/ag_news", label_column="label")
texts = cut_texts(documents, tokenizer, context_length=128, texts_per_class=500)
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from .documents import DataError, load_text
from .readers import class_names, spell
from .tokens import begin_of_row, token_ids, warn_of_unknown_tokens, without_bos

MIN_TOKENS = 5
"""Shorter texts are dropped; BOS does not count."""
MAX_CLASSES = 100
_SHOWN = 8


@dataclass(frozen=True)
class LabelledDocuments:
    """Documents with a class and a group each.

    Attributes:
        texts: D texts, read lazily.
        labels: class of each document, (D) str.
        groups: group of each document, (D) str; a group is never split between training and test texts.
    """

    texts: Sequence[str | None]
    labels: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class LabelledTexts:
    """Texts as token ids, with a class and a group each.

    Attributes:
        ids: T texts, each a list of token ids of any length, BOS first if the tokenizer has one.
        labels, groups: of each text, (T) str; see `LabelledDocuments`.
    """

    ids: list[list[int]]
    labels: np.ndarray
    groups: np.ndarray


def load_labelled_text(
    dataset: str | Sequence[str],
    *,
    label_column: str,
    group_column: str | None = None,
    classes: Sequence[str] | None = None,
    text_column: str = "text",
    config_name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    chat: bool = False,
) -> LabelledDocuments:
    """Load documents with a class each.

    Args:
        dataset, text_column, config_name, split, revision, chat: see `load_text`.
        label_column: column of the classes: words, numbers or a `ClassLabel`. Rows without a class are dropped.
        group_column: column whose equal values group documents, such as chunks of one book; None if every document is
            its own group.
        classes: classes to keep; None for all.

    Raises:
        DataError: as `load_text`; a column is missing, there are fewer than two classes or more than `MAX_CLASSES`, or
            a class of `classes` does not occur.
    """
    if label_column == text_column:
        raise DataError(f"{label_column!r} is named as the text column and as the label column")
    keep = list(filter(None, [label_column, group_column]))
    found = load_text(
        dataset, text_column=text_column, config_name=config_name, split=split, revision=revision, keep=keep, chat=chat
    )
    assert isinstance(found, Dataset)
    labels = label_names(found, label_column)
    known = {str(label) for label in labels if label is not None}
    if classes is not None and (missing := sorted(set(classes) - known)):
        raise DataError(f"column {label_column!r} has no class {missing[0]!r}, only {some(known)}")
    wanted = known if classes is None else set(classes)
    if len(wanted) < 2:
        raise DataError(f"probing needs two classes, and column {label_column!r} has only {some(wanted) or 'none'}")
    if len(wanted) > MAX_CLASSES:
        raise DataError(f"column {label_column!r} has {len(wanted)} classes ({some(wanted)}), over {MAX_CLASSES}")
    chosen = [index for index, label in enumerate(labels) if label in wanted]
    groups = label_names(found, group_column) if group_column else [str(row) for row in range(len(found))]
    return LabelledDocuments(
        texts=found.select(chosen, keep_in_memory=True)["text"],
        labels=np.array([labels[index] for index in chosen]),
        # A row without a group is its own group.
        groups=np.array([f"(row {index})" if groups[index] is None else groups[index] for index in chosen]),
    )


def label_names(found: Dataset, column: str) -> list[str | None]:
    """Return each row's value in a column as text (for a `ClassLabel` its name); None for a missing value."""
    feature, values = found.features[column], list(found[column])
    names = class_names(values, feature) if isinstance(feature, ClassLabel) else map(spell, values)
    return [name or None for name in names]


def some(names: Iterable[str]) -> str:
    """Return the first few of some names, sorted, for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:_SHOWN]) + (f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else "")


def cut_texts(
    documents: LabelledDocuments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int = 128,
    texts_per_class: int = 500,
    seed: int = 0,
) -> LabelledTexts:
    """Cut documents into windows, and draw at most `texts_per_class` of each class, evenly over its documents.

    The windows of a document do not overlap, and are drawn at random. Each has `context_length` tokens, including BOS
    at its start if the tokenizer has one; the last may be shorter.

    Raises:
        DataError: `context_length` is too small, or a class has no text of `MIN_TOKENS` tokens.
    """
    start = begin_of_row(tokenizer)
    length = context_length - len(start)
    if length < MIN_TOKENS:
        raise DataError(f"context_length must be at least {MIN_TOKENS + len(start)}, got {context_length}")
    ids: list[list[int]] = []
    origins: list[int] = []
    for number, label in enumerate(np.unique(documents.labels)):
        rng = np.random.default_rng([seed, number])
        order = rng.permutation(np.flatnonzero(documents.labels == label)).tolist()
        left = texts_per_class
        for place, index in enumerate(order):
            if not left:
                break
            share = -(-left // (len(order) - place))  # later documents make up for short ones
            windows = _windows(documents.texts[index], tokenizer, length)
            drawn = rng.permutation(len(windows))[:share]
            ids.extend(start + windows[window] for window in sorted(drawn))
            origins.extend([index] * len(drawn))
            left -= len(drawn)
        if left == texts_per_class:
            raise DataError(f"class {label!r} has no text of at least {MIN_TOKENS} tokens")
    warn_of_unknown_tokens(tokenizer, list(itertools.chain.from_iterable(ids)))
    return LabelledTexts(ids, documents.labels[origins], documents.groups[origins])


def _windows(text: str | None, tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    (encoded,) = token_ids(tokenizer, [text or ""])
    encoded = without_bos(tokenizer, encoded)
    windows = (without_bos(tokenizer, encoded[begin : begin + length]) for begin in range(0, len(encoded), length))
    return [window for window in windows if len(window) >= MIN_TOKENS]


def count_texts(texts: LabelledTexts) -> dict[str, dict[str, int]]:
    """Count the texts and groups of every class: {class: {"texts": …, "groups": …}}."""
    groups = {label: set(texts.groups[texts.labels == label]) for label in np.unique(texts.labels)}
    counts = Counter(texts.labels.tolist())
    return {str(label): {"texts": counts[label], "groups": len(members)} for label, members in groups.items()}

"""Documents packed into rows of token ids.

    rows = pack(train, tokenizer, context_length=1024, seed=0, repeat=True)

Everything is lazy, and the order depends on the data and the seed alone, so a second iteration, here or in a new
process, gives the same rows. `rows.state_dict()` holds the place in every shard and what the shuffle buffers hold, so
that after `load_state_dict` the rows go on where they were, and no document is read again. Two things change the
order: the number of DataLoader workers, and `set_epoch`, which the Trainer calls when an iterable dataset runs out.
"""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetInfo, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from .documents import DataError, read_chats, read_rows, require_text
from .readers import CHAT, MESSAGES
from .shared_rows import shared
from .streams import PackedRows, ShardedRows
from .tokens import begin_of_row, token_ids, warn_of_unknown_tokens, without_bos

logger = logging.getLogger(__name__)

PASSAGE_CHARACTERS = 16_384
PASSAGES_PER_BATCH = 64
ROWS_PER_BATCH = 16
DOCUMENTS_PER_PART = 100  # that are read together

# Cut before the last whitespace within the limit; inside a word only if the word itself is longer.
_PASSAGE = re.compile(rf"(?s).{{1,{PASSAGE_CHARACTERS}}}(?=\s|\Z)|.{{1,{PASSAGE_CHARACTERS}}}")


def pack(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    buffer_size: int | tuple[int, int, int] = 1000,
    repeat: bool = False,
) -> IterableDataset:
    """Pack documents into rows of exactly `context_length` token ids, lazily and in an order set by the seed.

    Documents are shuffled (map-style: all of them; a stream: its shards, of which ten are read in turn unless
    `load_text` did so, and its documents through a buffer), cut at whitespace into passages of at most 16,384
    characters so that a book is spread over the run, and shuffled again. Batches of passages are tokenised (see
    `token_ids`: control tokens that a text spells are text), joined with the EOS token if the tokenizer has one, and
    cut into rows that each start with one BOS token if it has one; the rows are shuffled once more. Chats are not cut,
    and keep their template's control tokens. The rest of a batch after its last row is dropped, on average at most some
    3 % of the text. Attention crosses document boundaries in a row: only the EOS tokens mark them.

    Args:
        documents: Rows with a `"text"` column, as `load_text` returns them; missing and blank texts are skipped. Or
            rows with a `"messages"` column of chats, and none of text.
        tokenizer: The model's tokenizer.
        context_length: Tokens in a row, BOS included.
        seed: Seed of the order.
        shuffle: If False, keep the order of the documents, for held-out text.
        buffer_size: Size of the shuffle buffers of streamed documents, passages and rows, or a size of each.
        repeat: Start again after the last row, endlessly and in the same order.

    Returns:
        Rows `{"input_ids": list[int]}`, each of length `context_length`.

    Raises:
        DataError: `context_length` is below 2, there is no `"text"` column, or the text is too short for a single row.
            The documents for a first row are read at once to find out; a stream's are not read again.
    """
    if context_length < 2:
        raise DataError(f"context_length must be at least 2, one token to predict another from; got {context_length}")
    if MESSAGES in (columns := documents.column_names or ()) and "text" not in columns:
        documents = read_chats(documents.select_columns([MESSAGES]), MESSAGES, "the column of messages")
    if isinstance(documents, IterableDataset):
        documents = shared(documents, seed if shuffle else None)
    require_text(documents)
    batch_size = _passages_per_batch(documents, tokenizer, context_length)
    sizes = buffer_size if isinstance(buffer_size, tuple) else (buffer_size,) * 3
    if isinstance(documents, Dataset):
        sizes = (1, *sizes[1:])
        source: Any = _read_whole(documents, seed if shuffle else None)
    else:
        source = documents._ex_iterable
    features = Features({"input_ids": List(Value("int64"), length=context_length)})
    join = partial(_pack_batch, tokenizer=tokenizer, context_length=context_length)
    packed = PackedRows(source, _cut, join, batch_size, sizes if shuffle else (1, 1, 1), features, (seed,))
    of = {name: getattr(documents, f"_{name}", None) for name in ("distributed", "token_per_repo_id")}
    rows = IterableDataset(packed, info=DatasetInfo(features=features), **of)
    return rows.repeat(None) if repeat else rows


def _read_whole(documents: Dataset, seed: int | None) -> ShardedRows:
    """Return map-style documents as a part of an `IterableDataset`, in their order or in a random one."""
    documents = documents.with_format(None)
    if seed is not None:
        documents = documents.shuffle(seed=seed, keep_in_memory=True)
    shards = [range(*part.indices(len(documents))) for part in _parts(len(documents))]
    return ShardedRows(partial(_read_part, documents), shards, Features({"text": Value("string")}))


def _parts(count: int) -> list[slice]:
    return [slice(begin, begin + DOCUMENTS_PER_PART) for begin in range(0, count, DOCUMENTS_PER_PART)]


def _read_part(documents: Dataset, part: range, start: int) -> Iterator[dict[str, Any]]:
    yield from ({"text": text} for text in documents[part.start + start : part.stop]["text"])


def _cut(text: str | None) -> list[str]:
    """Cut a document into passages of at most `PASSAGE_CHARACTERS` each, losing no character; none of a blank one."""
    if not text or text.isspace():
        return []
    return [text] if text.startswith(CHAT) else _PASSAGE.findall(text)


def _token_stream(passages: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of all passages in one list, with EOS in between if there is one."""
    stream: list[int] = []
    for ids in token_ids(tokenizer, passages):
        if stream and tokenizer.eos_token_id not in (None, stream[-1]):  # a chat may end with it
            stream.append(tokenizer.eos_token_id)
        stream.extend(ids)
    return stream


def _pack_batch(passages: list[str], tokenizer: PreTrainedTokenizerBase, context_length: int) -> list[list[int]]:
    start = begin_of_row(tokenizer)
    stream, rows, begin = _token_stream(passages, tokenizer), [], 0
    while len(row := start + without_bos(tokenizer, stream[begin : begin + context_length])) >= context_length:
        rows.append(row[:context_length])
        begin += context_length - (0 if stream[begin : begin + 1] == start else len(start))
    return rows


def _passages_per_batch(
    documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, context_length: int
) -> int:
    """Return how many passages to tokenise together, estimated from the first ones in their original order."""
    needed = context_length - (tokenizer.bos_token_id is not None)
    count = tokens = 0
    passages = (passage for row in read_rows(documents) for passage in _cut(row["text"]))
    # One by one of a stream: its start, which is kept, then suffices.
    while batch := list(islice(passages, PASSAGES_PER_BATCH if isinstance(documents, Dataset) else 1)):
        count += len(batch)
        tokens += len(stream := _token_stream(batch, tokenizer))
        if tokens >= needed:
            warn_of_unknown_tokens(tokenizer, stream)
            break
    else:
        raise DataError(
            f"the text is too short to pack: its {count} passage(s) make {tokens} tokens, and one row takes {needed} "
            f"(context_length={context_length})"
        )
    return max(PASSAGES_PER_BATCH, math.ceil(ROWS_PER_BATCH * context_length * count / tokens))


def take_tokens(rows: IterableDataset, tokens: int) -> IterableDataset:
    """Take the first `ceil(tokens / context_length)` rows of `pack`'s result, or all of them if there are fewer."""
    return rows.take(math.ceil(tokens / rows.features["input_ids"].length))


def materialize(rows: IterableDataset, tokens: int | None = None) -> Dataset:
    """Read rows into memory, for evaluation, which passes over the same rows repeatedly.

    Args:
        rows: The result of `pack`; with `repeat=True` it is endless, so give `tokens` too.
        tokens: Stop once there are this many token ids; None takes every row.

    Returns:
        A map-style dataset whose `input_ids` are LongTensors of shape (context_length,).

    Raises:
        DataError: There are no rows.
    """
    limited = rows if tokens is None else take_tokens(rows, tokens)
    ids = [np.asarray(row["input_ids"], dtype=np.int64) for row in limited]
    if not ids:
        raise DataError("there are no rows to materialize; give more text or a smaller context_length")
    if tokens is not None and sum(map(len, ids)) < tokens:
        logger.warning("asked for %d tokens, the text gives %d", tokens, sum(map(len, ids)))
    features = Features({"input_ids": List(Value("int64"))})
    return Dataset.from_dict({"input_ids": ids}, features=features).with_format("torch")


class CausalCollator:
    """Stack rows into a batch for a causal language model, padded on the right with the id 0, which the mask hides."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Stack B rows with `input_ids` and, optionally, `attention_mask` (lists or tensors); drop other columns.

        Returns:
            `input_ids` and `attention_mask`, both LongTensors of shape (B, T), T the length of the longest row.
        """
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]  # each (t,)
        masks = [
            torch.ones_like(tokens) if row.get("attention_mask") is None else torch.as_tensor(row["attention_mask"])
            for row, tokens in zip(rows, ids, strict=True)
        ]
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return {
            "input_ids": pad(ids, padding_value=0),
            "attention_mask": pad([mask.long() for mask in masks], padding_value=0),
        }

"""Load the text of a run: documents to train on, held-out documents, and batches to evaluate on."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from mxd import demo

from .documents import DataError, load_text, split_documents
from .packing import CausalCollator, materialize, pack, take_tokens
from .provenance import TextOptions, check_apart
from .tokens import begin_of_row, token_ids, warn_of_unknown_tokens, without_bos

logger = logging.getLogger(__name__)

Documents: TypeAlias = Dataset | IterableDataset


def count_documents(*parts: Documents) -> int | None:
    """Count the documents of all parts, which fixes how `split_documents` splits them; None if one is a stream."""
    counts = [len(part) for part in parts if isinstance(part, Dataset)]
    return sum(counts) if len(counts) == len(parts) else None


def load_documents(text: TextOptions, seed: int) -> tuple[Documents, Documents]:
    """Load the training documents and the held-out documents.

    Of a stream, read the held-out documents first: see `split_documents`.

    Raises:
        ValueError: `heldout_split` has no dataset, or the held-out text is trained on; and see `load_text`.
    """
    check_apart(text)
    documents = _load(text, text.split, "train")
    if text.heldout_dataset:
        return documents, load_text(text.heldout_dataset, split=text.heldout_split or "train", **_how(text))
    if text.heldout_split or not text.dataset:
        return documents, _load(text, text.heldout_split or text.split, "heldout")
    return split_documents(documents, seed=seed)


def load_one(text: TextOptions, keep: Sequence[str] = ()) -> Documents:
    """Load all documents of a text, with the columns of `keep`; the held-out sample if it names no dataset."""
    return _load(text, text.split, "heldout", keep)


def _load(text: TextOptions, split: str, sample: Literal["train", "heldout"], keep: Sequence[str] = ()) -> Documents:
    """Load a split of the dataset, or a split of the sample text, to which the other options do not apply."""
    if not text.dataset:
        return load_text(str(demo.text_path(sample)))
    return load_text(
        text.dataset, config_name=text.config_name, revision=text.dataset_revision, split=split, keep=keep, **_how(text)
    )


def _how(text: TextOptions) -> dict[str, Any]:
    return {"text_column": text.text_column, "streaming": text.streaming, "chat": text.chat, "in_turn": text.streaming}


def warn_of_embedded_text(text: TextOptions, model: str | None) -> None:
    """Warn if a model other than the embedded one is trained on the small sample text."""
    if not text.dataset and model != demo.MODEL_NAME:
        logger.warning("no dataset is named: %s is trained on the small text that ships with mxd, over and over", model)


def evaluation_batches(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, context_length: int, tokens: int, warn: bool = True
) -> list[dict[str, torch.Tensor]]:
    """Pack documents into batches of about 2,048 tokens, shuffled with a fixed seed, until they hold `tokens`.

    Of a stream, no more is read than that takes. If the text is shorter, all of it is used, with a warning unless
    `warn` is False.
    """
    sizes = (1, 1, -(-tokens // context_length)) if isinstance(documents, IterableDataset) else 1000
    packed = pack(documents, tokenizer, context_length, seed=0, buffer_size=sizes)
    rows = materialize(packed, tokens) if warn else materialize(take_tokens(packed, tokens))
    batches = (part["input_ids"] for part in rows.iter(max(1, 2048 // context_length)))  # (batch, tokens)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]


def document_batches(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, context_length: int, tokens: int
) -> tuple[list[dict[str, torch.Tensor]], list[int]]:
    """Cut documents into rows that hold text of one document each, spread over documents in random order.

    Returns:
        Batches of about 2,048 tokens, padded on the right, with `tokens` tokens or all that there are; and for every
        row a number that copies of its document share.

    Raises:
        DataError: no document has a token.
    """
    start = begin_of_row(tokenizer)
    length, rng = context_length - len(start), np.random.default_rng(0)
    count = len(documents) if isinstance(documents, Dataset) else None
    rows: list[dict[str, list[int]]] = []
    origins: list[int] = []
    shuffled = documents.shuffle(seed=0, **({"keep_in_memory": True} if count else {}))
    for number, document in enumerate(shuffled):
        if tokens <= len(start):
            break
        ids = without_bos(tokenizer, token_ids(tokenizer, [document["text"] or ""])[0])
        # Later documents make up for short ones; how many follow in a stream is not known.
        share = 16 if count is None else -(-tokens // (context_length * (count - number)))
        for window in sorted(rng.permutation(-(-len(ids) // length))[:share]):
            if tokens > len(start):
                rows.append({"input_ids": (start + ids[window * length : (window + 1) * length])[:tokens]})
                origins.append(hash(document["text"]))
                tokens -= len(rows[-1]["input_ids"])
    if not rows:
        raise DataError("the text is too short: no document has a token")
    if tokens > len(start):
        logger.warning("the text gives %d tokens fewer than were asked for", tokens)
    warn_of_unknown_tokens(tokenizer, [token for row in rows for token in row["input_ids"]])
    size, collate = max(1, 2048 // context_length), CausalCollator()
    return [collate(rows[begin : begin + size]) for begin in range(0, len(rows), size)], origins


def evaluation_settings(text: TextOptions, dtype: str) -> dict[str, Any]:
    """Return the settings of evaluation.json that say on which text a decomposition was measured."""
    settings = asdict(text)
    split = settings.pop("heldout_split")
    if text.heldout_dataset:
        heldout = {"dataset": text.heldout_dataset, "split": split or "train"}
        settings |= {**heldout, "heldout_dataset": [], "config_name": None}
    elif split:
        settings["split"] = split
    return {**settings, "model_dtype": dtype}

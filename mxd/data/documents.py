"""Load documents from any `datasets` source, and split them into a training and a held-out side.

documents = load_text("HuggingFaceFW/fineweb-edu", config_name="sample-10BT", streaming=True)
train, heldout = split_documents(documents, heldout_fraction=0.01)
"""

import glob
import hashlib
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetInfo, Features, IterableDataset, Value, load_dataset

from mxd.data_files import COMPRESSIONS, FORMATS, is_data_file, split_ending

from .local_text import LocalText, features_of, read_rows_from
from .readers import (
    MESSAGES,
    DataError,
    MissingColumnError,
    chat_document,
    check_columns,
    describe,
    first_line,
)
from .shared_rows import keeping, shared, shared_rows
from .streams import ShardedRows

logger = logging.getLogger(__name__)

_GLOB = re.compile(r"[*?\[]")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# `Dataset.save_to_disk` writes them beside its arrow files.
_DESCRIPTIONS = ("dataset_dict.json", "dataset_info.json", "state.json")
_KNOWN = f"{', '.join(FORMATS)}, also with {', '.join(COMPRESSIONS)}"
_SHOWN = 20
HELDOUT_FRACTION = 0.05
START_ROWS, _START_CHARACTERS = 100, 1 << 24
"""Bounds of the start of a stream, which is read to check it."""
_SHARD_SEED = 0  # always the same, so that all runs on a stream begin with the same text, and recognise it
_CONVERTED = "refs/convert/parquet"  # the Hub's branch of datasets in other formats


def load_text(
    dataset: str | Sequence[str],
    *,
    config_name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    revision: str | None = None,
    streaming: bool = False,
    keep: Sequence[str] = (),
    chat: bool = False,
    in_turn: bool = False,
) -> Dataset | IterableDataset:
    """Load documents from the Hub or from local files.

    A stream is opened once for its checks and what is made of it: see `split_documents` and `pack`.

    Args:
        dataset: A Hub dataset, or one or several local paths: files, folders (searched recursively, without hidden
            files) and globs, of parquet, arrow, jsonl, ndjson, json, csv, tsv, txt, md, rst and py files in any
            mixture, also compressed (gz, bz2, xz, zst). A file of the last four kinds is one document. Text is UTF-8,
            or UTF-16 with a byte order mark. A name that looks like a path or a data file is never sent to the Hub.
        config_name: Configuration of the Hub dataset.
        split: The split, for example `"train"` or, when not streaming, `"train[:1%]"`. Local files have only `"train"`.
        text_column: The text column of tables; text files need none.
        revision: Commit, tag or branch of the Hub dataset.
        streaming: Read lazily instead of downloading and converting everything first.
        keep: Further columns to keep, such as a label. Every source must have them. No other column is read from local
            files.
        chat: The documents are chats: `pack` reads the control tokens that a text spells. Without it, text is text.
            Lists of messages (`{"role", "content"}`) are chats in any case. They are in the text column, or in the
            column `"messages"` if there is no text column, or if `chat` is set.
        in_turn: Read ten shards of a stream in turn, in a random order that is always the same. Without it `pack` does
            that, and opens the stream again.

    Returns:
        Rows `{"text": str}`, with the columns of `keep`: of local files as strings. A chat is `CHAT` and its JSON,
        which `pack` renders by the tokenizer's chat template.

    Raises:
        DataError: A file or Hub dataset cannot be found or read, an ending is unknown, the text column is missing or
            does not hold text, a column of `keep` is missing, or there are no documents.
    """
    sources = [dataset] if isinstance(dataset, str) else list(dataset)
    remote = [source for source in sources if not _is_local(source)]
    shard_seed = _SHARD_SEED if in_turn else None
    if remote and len(sources) > 1:
        raise DataError(f"no such file or folder: {remote[0]!r}; a Hub dataset is given alone")
    if remote:
        loaded = _load_hub(sources[0], config_name, split, revision, streaming)
        return _select_text(
            loaded, text_column, f"dataset {sources[0]!r}", keep, chat, _SHARD_SEED if in_turn else None
        )
    if config_name is not None or revision is not None:
        raise DataError(f"config_name and revision choose among Hub datasets, but {sources} are local paths")
    return _load_files(sources, split, text_column, streaming, keep, chat, shard_seed)


def _is_local(source: str) -> bool:
    """Whether a source is a path, existing or not, rather than a Hub dataset."""
    looks_local = source.startswith((".", "/", "~")) or is_data_file(source)
    return looks_local or _GLOB.search(source) is not None or Path(source).exists()


def _load_hub(name: str, config_name: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    if not _HUB_NAME.fullmatch(name):
        raise DataError(f"no such file or folder: {name!r}; nor is it a Hub dataset's name (owner/name)")
    if revision == _CONVERTED and config_name:  # a configuration is a folder there
        place: dict[str, Any] = {"data_dir": config_name}
        config_name = None
    else:
        place = {}
    try:
        return load_dataset(name, config_name, split=split, revision=revision, streaming=streaming, **place)
    except Exception as error:  # datasets, huggingface_hub and the HTTP client have unrelated exception classes
        reason = first_line(error)
        if "scripts are no longer supported" in reason:
            reason = (
                "it is a script, which datasets no longer runs; the Hub keeps many of these as parquet: pass "
                f'revision="{_CONVERTED}", or --dataset-revision {_CONVERTED}'
            )
        raise DataError(
            f"no local path {name!r}, and the Hub dataset of that name cannot be loaded: {reason}"
        ) from error


def _load_files(
    sources: Sequence[str],
    split: str,
    text_column: str,
    streaming: bool,
    keep: Sequence[str],
    chat: bool,
    shard_seed: int | None,
) -> Dataset | IterableDataset:
    files = [file.absolute() for file in dict.fromkeys(itertools.chain.from_iterable(map(_expand, sources)))]
    facts = [(file, file.stat()) for file in files]
    filled = tuple((str(file), fact.st_size, fact.st_mtime_ns) for file, fact in facts if fact.st_size > 0)
    if not filled:
        raise DataError(f"no documents: every file of {', '.join(map(repr, sources))} is empty")
    try:
        if streaming:
            if split != "train":
                raise DataError(f"local files have the split 'train' and no other, but the split is {split!r}")
            read = partial(read_rows_from, text_column=text_column, keep=keep, chat=chat)
            rows = ShardedRows(read, [path for path, *_ in filled], features_of(keep))
            stream = shared(IterableDataset(rows, info=DatasetInfo(features=rows.features)), shard_seed)
            if stream_start(stream)[0]:  # a wrong column shows here already
                return stream
        else:
            builder = LocalText(files=filled, text_column=text_column, keep=tuple(keep), chat=chat)
            builder.download_and_prepare()
            if builder.info.splits["train"].num_examples:
                return builder.as_dataset(split)
    except Exception as error:  # datasets wraps the reader's error in an uninformative one
        cause = error if isinstance(error, DataError) else error.__cause__
        if isinstance(cause, DataError):
            raise cause from None
        raise DataError(f"cannot read {', '.join(map(repr, sources))}: {first_line(error)}") from error
    more = f" (and {len(filled) - 1} more)" if len(filled) > 1 else ""
    raise DataError(f"no documents: {describe(filled[0][0])}{more} has no rows")


def local_files(source: str) -> list[Path]:
    """Return the data files of a path, folder or glob, sorted; empty for a missing path or a Hub dataset."""
    try:
        return _expand(source) if _is_local(source) else []
    except DataError:
        return []


def _expand(source: str) -> list[Path]:
    """Return the data files of a path, folder or glob, sorted; warn of those that are left out."""
    path = Path(source).expanduser()
    if path.is_file():
        if not split_ending(path.name)[0]:
            raise DataError(f"unknown ending {path.suffix!r} of {source!r}; rename or convert it to one of {_KNOWN}")
        return [path]
    # A folder may be called "notes [1]"; and Path.glob takes no absolute patterns.
    matches = [path] if path.is_dir() else [Path(found) for found in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
    if not matches:
        raise DataError(f"no such file, folder or glob: {source!r} (looked in {Path.cwd()})")
    found = [file for match in matches for file in (_folder_files(match) if match.is_dir() else [match])]
    found = [file for file in found if file.name not in _DESCRIPTIONS]
    files = [file for file in found if split_ending(file.name)[0] and file.is_file()]
    if not files:
        raise DataError(f"{source!r} matches nothing with a known ending; known are {_KNOWN}")
    if skipped := sorted({str(file) for file in found} - set(map(str, files))):
        more = f" and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
        logger.warning("not read: %s%s; files are read that end in %s", ", ".join(skipped[:_SHOWN]), more, _KNOWN)
    return files


def _folder_files(folder: Path) -> list[Path]:
    """Return the files anywhere below a folder, and links to none, sorted, without hidden ones."""
    paths = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _select_text(
    part: Any, text_column: str, name: str, keep: Sequence[str], chat: bool, shard_seed: int | None
) -> Any:
    """Check the first rows, and keep the text (renamed to "text") and the columns of `keep`."""
    streamed = isinstance(part, IterableDataset)
    if streamed and not part.column_names:  # the first row shows them
        part = shared(part, shard_seed)
    # Columns that nobody asked for may be large: the rows are read without them.
    columns = part.column_names or list(next(read_rows(part), {text_column: None}))
    text_column = MESSAGES if MESSAGES in columns and (chat or text_column not in columns) else text_column
    try:
        check_columns(columns, text_column, keep)
    except MissingColumnError as missing:
        raise DataError(f"{name} {missing}") from None
    part = part.select_columns(list(dict.fromkeys([text_column, *keep])))
    part = part if text_column == "text" else part.rename_column(text_column, "text")
    part = shared(part, shard_seed) if streamed else part
    first = next(iter(stream_start(part)[0] if streamed else read_rows(part)), None)
    if first is None:
        raise DataError(f"no documents: {name} has no rows")
    where = f"column {text_column!r} of {name}"
    if chat or isinstance(first["text"], list):
        return read_chats(part, "text", where, keep, chat)
    if not isinstance(first["text"], str | None):
        raise DataError(f"{where} holds {type(first['text']).__name__}, not text; set text_column to another")
    return part


def read_chats(part: Any, column: str, where: str, keep: Sequence[str] = (), templated: bool = False) -> Any:
    """Return rows whose column holds chats as documents, `{"text": str}` with the columns of `keep`."""
    kept = {one: part.features[one] if part.features else Value("string") for one in keep}
    read = partial(_read_chat, column=column, where=where, templated=templated)
    left = [column] if column != "text" else []
    return part.map(read, remove_columns=left, features=Features({**kept, "text": Value("string")}))


def _read_chat(row: dict[str, Any], column: str, where: str, templated: bool) -> dict[str, str | None]:
    text = chat_document(row[column], templated)
    if not isinstance(text, str | None):
        raise DataError(f"{where} holds {type(text).__name__}, neither text nor a list of messages with a role each")
    return {"text": text}


def split_documents(
    documents: Dataset | IterableDataset, heldout_fraction: float = HELDOUT_FRACTION, seed: int = 0
) -> tuple[Dataset, Dataset] | tuple[IterableDataset, IterableDataset]:
    """Return a training and a held-out side of documents, split the same way for the same seed.

    Documents are split by a hash of their text and the seed, so copies of a document stay on one side. A map-style
    dataset has at least one document on either side, and the fraction is that of its different documents; of a stream
    the fraction holds on average. (Positions would leak held-out documents into training: shuffling the shards of the
    training side renumbers the documents.)

    A stream is opened once for both sides if the held-out side is read first: what it passes over waits in memory for
    the training side, which goes on behind it. That is about `1 / heldout_fraction` times the held-out text.

    Args:
        documents: Rows with a `"text"` column, as `load_text` returns them.
        heldout_fraction: The share of documents to hold out, between 0 and 1.
        seed: Seed of the split.

    Raises:
        DataError: The fraction is out of range, there is no `"text"` column, or a side would have no documents.
    """
    if not 0 < heldout_fraction < 1:
        raise DataError(f"heldout_fraction must lie between 0 and 1, got {heldout_fraction}")
    documents = documents if isinstance(documents, Dataset) else shared(documents)
    require_text(documents)
    if isinstance(documents, Dataset):
        batches = documents.with_format(None).select_columns("text").iter(1000)
        digests = [digest(text, str(seed)) for batch in batches for text in batch["text"]]
        different, places = np.unique(np.array(digests, dtype=np.uint64), return_inverse=True)
        if (count := len(different)) < 2:
            raise DataError(f"{count} document(s) cannot be split by document; pass a separate held-out dataset")
        held = places < min(count - 1, max(1, round(count * heldout_fraction)))
        # train_test_split of datasets 5.2 cannot keep the indices of a cached dataset in memory.
        train, heldout = (documents.select(np.flatnonzero(side), keep_in_memory=True) for side in (~held, held))
        return train, heldout
    on_side = partial(_on_side, fraction=heldout_fraction, seed=seed)
    train, heldout = (
        part.filter(partial(on_side, heldout=part is not documents), input_columns=["text"])
        for part in (documents, keeping(documents))
    )
    for name, side in (("training", train), ("held-out", heldout)):
        if next(read_rows(side), None) is None:
            raise DataError(f"heldout_fraction={heldout_fraction} leaves the {name} side of the stream empty")
    return train, heldout


def stream_start(documents: IterableDataset) -> tuple[list[dict[str, Any]], bool]:
    """Return the first rows of a stream, those among the first `START_ROWS` of its source, and whether they are all."""
    documents = keeping(shared(documents))
    sources = shared_rows(documents._ex_iterable)
    rows: list[dict[str, Any]] = []
    size = 0
    for row in documents:
        read = sum(source.taken for source in sources)
        if read <= START_ROWS:
            rows.append(row)
        size += len(str(row.get("text") or ""))
        if read >= START_ROWS or size > _START_CHARACTERS:
            return rows, False
    return rows, True


def read_rows(documents: Dataset | IterableDataset) -> Iterator[dict[str, Any]]:
    """Iterate over rows from the first one; those of a stream are kept for whoever reads it."""
    yield from documents.with_format(None) if isinstance(documents, Dataset) else keeping(documents)


def require_text(documents: Dataset | IterableDataset) -> None:
    """Raise `DataError` if the documents have no text column."""
    columns = documents.column_names or list(next(read_rows(documents), {"text": ""}))
    if "text" not in columns:
        raise DataError(f"the documents have no column 'text', only {columns}; load them with load_text")


def _on_side(text: str | None, heldout: bool, fraction: float, seed: int) -> bool:
    return (digest(text, str(seed)) < fraction * 2**64) == heldout


def digest(text: str | None, key: str = "") -> int:
    """Return a hash of a text and a key, below 2**64."""
    return int.from_bytes(hashlib.blake2b((text or "").encode(), digest_size=8, key=key.encode()).digest(), "big")

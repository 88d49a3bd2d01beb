"""Load documents from any `datasets` source, and split them into a training and a held-out side.

documents = load_text("HuggingFaceFW/fineweb-edu", config_name="sample-10BT", streaming=True)
train, heldout = split_documents(documents, heldout_fraction=0.01)
"""

import glob
import hashlib
import itertools
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, load_dataset

DATA_ENDINGS = (".parquet", ".jsonl", ".json", ".csv", ".txt", ".md", ".rst", ".py")

_TABLES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_BUILDERS = {ending: _TABLES.get(ending, "text") for ending in DATA_ENDINGS}
_GLOB = re.compile(r"[*?\[]")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class DataError(ValueError):
    """Text cannot be found, read or packed; the message names the source and the remedy."""


def load_text(
    dataset: str | Sequence[str],
    *,
    config_name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    revision: str | None = None,
    streaming: bool = False,
    keep: Sequence[str] = (),
) -> Dataset | IterableDataset:
    """Load documents from the Hub or from local files.

    Args:
        dataset: A Hub dataset, or one or several local paths: files, folders (searched recursively, without hidden
            files) and globs, of parquet, jsonl, json, csv, txt, md, rst and py files in any mixture. A file of the
            last four kinds is one document. A name that looks like a path is never sent to the Hub.
        config_name: Configuration of the Hub dataset.
        split: The split, for example `"train"` or, when not streaming, `"train[:1%]"`. Local files have only `"train"`.
        text_column: The text column of tables; text files need none.
        revision: Commit, tag or branch of the Hub dataset.
        streaming: Read lazily instead of downloading and converting everything first.
        keep: Further columns to keep, such as a label. Every source must have them.

    Returns:
        Rows `{"text": str}`, with the columns of `keep`.

    Raises:
        DataError: A file or Hub dataset cannot be found or read, an ending is unknown, the text column is missing or
            does not hold text, a column of `keep` is missing, or there are no documents.
    """
    sources = [dataset] if isinstance(dataset, str) else list(dataset)
    remote = [source for source in sources if not _is_local(source)]
    if remote and len(sources) > 1:
        raise DataError(f"no such file or folder: {remote[0]!r}; a Hub dataset is given alone")
    if remote:
        loaded = _load_hub(sources[0], config_name, split, revision, streaming)
        return _select_text(loaded, text_column, f"dataset {sources[0]!r}", keep)
    if config_name is not None or revision is not None:
        raise DataError(f"config_name and revision choose among Hub datasets, but {sources} are local paths")
    parts = _load_files(sources, split, text_column, streaming, keep)
    # Parquet may hold string or large_string, which do not concatenate.
    strings = Features({column: Value("string") for column in ["text", *keep]})
    return parts[0] if len(parts) == 1 else concatenate_datasets([part.cast(strings) for part in parts])


def _is_local(source: str) -> bool:
    """Whether a source is a path, existing or not, rather than a Hub dataset."""
    looks_local = source.startswith((".", "/", "~")) or Path(source).suffix.lower() in _BUILDERS
    return looks_local or _GLOB.search(source) is not None or Path(source).exists()


def _load_hub(name: str, config_name: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    if not _HUB_NAME.fullmatch(name):
        raise DataError(f"no such file or folder: {name!r}; nor is it a Hub dataset's name (owner/name)")
    try:
        return load_dataset(name, config_name, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # datasets, huggingface_hub and the HTTP client have unrelated exception classes
        raise DataError(
            f"no local path {name!r}, and the Hub dataset of that name cannot be loaded: {_first_line(error)}"
        ) from error


def _load_files(
    sources: Sequence[str], split: str, text_column: str, streaming: bool, keep: Sequence[str]
) -> list[Any]:
    """Load local files, one part per format, in the order in which the formats first appear."""
    by_builder: dict[str, list[Path]] = {}
    for file in dict.fromkeys(itertools.chain.from_iterable(map(_expand, sources))):
        if file.stat().st_size > 0:  # the builders fail on an empty file
            by_builder.setdefault(_BUILDERS[file.suffix.lower()], []).append(file)
    if not by_builder:
        raise DataError(f"no documents: every file of {', '.join(map(repr, sources))} is empty")
    parts = []
    for builder, files in by_builder.items():
        name = f"{builder} file {files[0]}" + (f" (or {len(files) - 1} more)" if len(files) > 1 else "")
        options = {"sample_by": "document"} if builder == "text" else {}
        # load_dataset expands globs, and a file may be called "notes [1].txt".
        paths = [glob.escape(str(file.absolute())) for file in files]
        try:
            part = load_dataset(builder, data_files={"train": paths}, split=split, streaming=streaming, **options)
            column = "text" if builder == "text" else text_column
            parts.append(_select_text(part, column, name, keep))
        except DataError:
            raise
        except Exception as error:  # each builder has its own errors, StopIteration among them
            cause = error.__cause__ or error  # datasets wraps the builder's error in an uninformative one
            raise DataError(f"cannot read {name}: {_first_line(cause)}") from error
    return parts


def local_files(source: str) -> list[Path]:
    """Return the data files of a path, folder or glob, sorted; empty for a missing path or a Hub dataset."""
    try:
        return _expand(source) if _is_local(source) else []
    except DataError:
        return []


def _expand(source: str) -> list[Path]:
    """Return the data files of a path, folder or glob, sorted."""
    known = ", ".join(DATA_ENDINGS)
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() not in _BUILDERS:
            raise DataError(f"unknown ending {path.suffix!r} of {source!r}; rename or convert it to one of {known}")
        return [path]
    # A folder may be called "notes [1]"; and Path.glob takes no absolute patterns.
    matches = [path] if path.is_dir() else [Path(found) for found in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
    if not matches:
        raise DataError(f"no such file, folder or glob: {source!r} (looked in {Path.cwd()})")
    found = [file for match in matches for file in (_folder_files(match) if match.is_dir() else [match])]
    files = [file for file in found if file.suffix.lower() in _BUILDERS]
    if not files:
        raise DataError(f"{source!r} matches nothing with a known ending; known are {known}")
    return files


def _folder_files(folder: Path) -> list[Path]:
    """Return the files anywhere below a folder, sorted, without hidden ones."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip().split("\n", 1)[0] or type(error).__name__)[:300]


def _select_text(part: Any, text_column: str, name: str, keep: Sequence[str]) -> Any:
    """Check the first row, and keep the text (renamed to "text") and the columns of `keep`."""
    first = next(iter(part), None)
    if first is None:
        raise DataError(f"no documents: {name} has no rows")
    columns = part.column_names or list(first)
    if text_column not in columns:
        raise DataError(f"{name} has no column {text_column!r}; set text_column to one of {', '.join(columns)}")
    if not isinstance(first[text_column], str | None):
        kind = type(first[text_column]).__name__
        raise DataError(f"column {text_column!r} of {name} holds {kind}, not text; set text_column to another")
    if missing := [column for column in keep if column not in columns]:
        raise DataError(f"{name} has no column {missing[0]!r}, only {', '.join(columns)}")
    part = part.select_columns(list(dict.fromkeys([text_column, *keep])))
    return part if text_column == "text" else part.rename_column(text_column, "text")


def split_documents(
    documents: Dataset | IterableDataset, heldout_fraction: float = 0.05, seed: int = 0
) -> tuple[Dataset, Dataset] | tuple[IterableDataset, IterableDataset]:
    """Return a training and a held-out side of documents, split the same way for the same seed.

    Map-style datasets are split at random, with at least one document on either side. A stream is split by a hash of
    each document's text, so copies of a document stay on one side, and the fraction holds on average. (Positions would
    leak held-out documents into training: shuffling the shards of the training side renumbers the documents.)

    Args:
        documents: Rows with a `"text"` column, as `load_text` returns them.
        heldout_fraction: The share of documents to hold out, between 0 and 1.
        seed: Seed of the split.

    Raises:
        DataError: The fraction is out of range, there is no `"text"` column, or a side would have no documents.
    """
    if not 0 < heldout_fraction < 1:
        raise DataError(f"heldout_fraction must lie between 0 and 1, got {heldout_fraction}")
    if isinstance(documents, Dataset):
        count = len(documents)
        if count < 2:
            raise DataError(f"{count} document(s) cannot be split by document; pass a separate held-out dataset")
        heldout_count = min(count - 1, max(1, round(count * heldout_fraction)))
        # train_test_split of datasets 5.2 cannot keep the indices of a cached dataset in memory.
        order = np.random.default_rng(seed).permutation(count)
        train_rows, heldout_rows = np.sort(order[heldout_count:]), np.sort(order[:heldout_count])
        return documents.select(train_rows, keep_in_memory=True), documents.select(heldout_rows, keep_in_memory=True)
    require_text(documents)
    on_side = partial(_on_side, fraction=heldout_fraction, seed=seed)
    train, heldout = (
        documents.filter(partial(on_side, heldout=heldout), input_columns=["text"]) for heldout in (False, True)
    )
    for side, name in ((train, "training"), (heldout, "held-out")):
        if next(iter(side), None) is None:
            raise DataError(f"heldout_fraction={heldout_fraction} leaves the {name} side of the stream empty")
    return train, heldout


def require_text(documents: Dataset | IterableDataset) -> None:
    """Raise `DataError` if the documents have no text column."""
    columns = documents.column_names or list(next(iter(documents), {"text": ""}))
    if "text" not in columns:
        raise DataError(f"the documents have no column 'text', only {columns}; load them with load_text")


def _on_side(text: str | None, heldout: bool, fraction: float, seed: int) -> bool:
    digest = hashlib.blake2b((text or "").encode(), digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest, "big") < fraction * 2**64) == heldout

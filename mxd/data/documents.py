"""Documents of any `datasets` source: loaded, and divided into a training and a held-out side.

documents = load_text("HuggingFaceFW/fineweb-edu", config_name="sample-10BT", streaming=True)
train, heldout = split_documents(documents, heldout_fraction=0.01)
"""

import glob
import hashlib
import itertools
import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, load_dataset

from mxd.hub_cards.safe_text import DATA_ENDINGS
from mxd.modeling_mxd.loading import first_line

logger = logging.getLogger(__name__)

_OF_TABLES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_BUILDERS = {ending: _OF_TABLES.get(ending, "text") for ending in DATA_ENDINGS}
_ENDINGS = ", ".join(_BUILDERS)
_GLOB = re.compile(r"[*?\[]")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class DataError(ValueError):
    """Text that cannot be found, read or packed; the message names the offender and what to do about it."""


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
        dataset: The name of a Hub dataset, or one or several local paths: files, folders (searched recursively, hidden
            files left out) and globs, of parquet, jsonl, json, csv, txt, md, rst and py files in any mixture. A file
            of the last four kinds is one document. What looks like a path (starts with `.`, `/` or `~`, ends as a
            data file does, contains a glob character, or exists on disk) is never sent to the Hub.
        config_name: The Hub dataset's configuration.
        split: The split, for example `"train"` or, when not streaming, `"train[:1%]"`. Local files have only `"train"`.
        text_column: The column that holds the text in tables; text files need none.
        revision: The Hub dataset's commit, tag or branch.
        streaming: Whether to read lazily instead of downloading and converting everything first.
        keep: Further columns to keep, such as a label, which every source has to have.

    Returns:
        Rows `{"text": str}`, with a `"domain"` column where any source has one (empty for the sources that don't), and
        those of `keep`.

    Raises:
        DataError: when a file or Hub dataset cannot be found or read, an ending is unknown, the text column is missing
            or holds something other than text, a column of `keep` is missing, or there are no documents at all.
    """
    sources = [dataset] if isinstance(dataset, str) else list(dataset)
    if not sources:
        raise DataError("dataset is an empty list; name a Hub dataset or at least one local path")
    remote = [source for source in sources if not _is_local(source)]
    if not remote:
        if config_name is not None or revision is not None:
            raise DataError(f"config_name and revision choose among Hub datasets, but {sources} are local paths")
        parts = _load_files(sources, split, text_column, streaming, keep)
    elif len(sources) == 1:
        loaded = _load_hub(sources[0], config_name, split, revision, streaming)
        parts = [_select_text(loaded, text_column, f"dataset {sources[0]!r}", keep)]
    else:
        raise DataError(
            f"no such file or folder: {', '.join(map(repr, remote))}; several sources have to be local paths, "
            "and a Hub dataset is given alone"
        )
    return _join(parts, keep)


def _is_local(source: str) -> bool:
    """Whether a source is a path, existing or not, rather than the name of a Hub dataset."""
    looks_local = source.startswith((".", "/", "~")) or Path(source).suffix.lower() in _BUILDERS
    return looks_local or _GLOB.search(source) is not None or Path(source).exists()


def _load_hub(name: str, config_name: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    if not _HUB_NAME.fullmatch(name):
        raise DataError(f"no such file or folder: {name!r}; nor is it a Hub dataset's name (owner/name)")
    try:
        return load_dataset(name, config_name, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # datasets, huggingface_hub and the HTTP client each have families of their own
        raise DataError(
            f"no local path {name!r}, and the Hub dataset of that name cannot be loaded: {first_line(error)}; "
            "check the name, config_name, split and revision, the network, and for a gated dataset `hf auth login`"
        ) from error


def _load_files(
    sources: Sequence[str], split: str, text_column: str, streaming: bool, keep: Sequence[str]
) -> list[Any]:
    """Load local files, one part per format, in the order in which the formats first appear."""
    files = list(dict.fromkeys(itertools.chain.from_iterable(_expand(source) for source in sources)))
    by_builder: dict[str, list[Path]] = {}
    for file in files:
        if file.stat().st_size > 0:  # the builders fail on a file of nothing
            by_builder.setdefault(_BUILDERS[file.suffix.lower()], []).append(file)
    if not by_builder:
        raise DataError(f"no documents: every file of {', '.join(map(repr, sources))} is empty")
    parts = []
    for builder, group in by_builder.items():
        shown = ", ".join(str(file) for file in group[:3]) + (f" and {len(group) - 3} more" if len(group) > 3 else "")
        logger.info("%d %s file(s): %s", len(group), builder, shown)
        options = {"sample_by": "document"} if builder == "text" else {}
        # load_dataset takes paths for globs, and a file may well be called "notes [1].txt"
        paths = [glob.escape(str(file.absolute())) for file in group]
        try:
            part = load_dataset(builder, data_files={"train": paths}, split=split, streaming=streaming, **options)
            column = "text" if builder == "text" else text_column
            parts.append(_select_text(part, column, f"{builder} file(s) {shown}", keep))
        except DataError:
            raise
        except Exception as error:  # each builder has its own errors, StopIteration among them
            raise DataError(f"cannot read {builder} file(s) {shown}: {_explain(error, group)}") from error
    return parts


def _expand(source: str) -> list[Path]:
    """The data files that a path, folder or glob stands for, sorted."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() not in _BUILDERS:
            raise DataError(f"unknown ending {path.suffix!r} of {source!r}; rename or convert it to one of {_ENDINGS}")
        return [path]
    # A folder may be called "notes [1]"; and Path.glob takes no absolute patterns.
    found = [path] if path.is_dir() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
    matches = [Path(match) for match in found]
    if not matches:
        raise DataError(f"no such file, folder or glob: {source!r} (looked in {Path.cwd()})")
    files: list[Path] = []
    for match in matches:
        if match.is_dir():
            files.extend(_folder_files(match))
        elif match.suffix.lower() in _BUILDERS:
            files.append(match)
    if not files:
        raise DataError(f"{source!r} matches nothing with a known ending; known are {_ENDINGS}")
    return files


def local_files(source: str) -> list[Path]:
    """The data files that a path, folder or glob stands for, sorted; none of what is not there, or on the Hub."""
    try:
        return _expand(source) if _is_local(source) else []
    except DataError:
        return []


def _folder_files(folder: Path) -> list[Path]:
    """The data files anywhere below a folder, sorted, without hidden ones."""
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        raise DataError(f"{str(folder)!r} was written by save_to_disk; load it with datasets.load_from_disk instead")
    files = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in _BUILDERS and path.is_file() and not hidden:
            files.append(path)
    return files


def _explain(error: BaseException, files: Sequence[Path]) -> str:
    """The first line of what went wrong, and for text that is not UTF-8, in which file."""
    cause = error.__cause__ or error  # datasets wraps the builder's error in one that says nothing
    if isinstance(cause, UnicodeDecodeError):
        for file in files:
            try:
                file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                return f"{file} is not UTF-8; convert it or leave it out"
    return first_line(cause)


def _select_text(part: Any, text_column: str, name: str, keep: Sequence[str]) -> Any:
    """Keep the text, renamed to "text", the domain, and what is asked for, once the first row has shown that there is
    text."""
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
    kept = [column for column in (text_column, "domain", *keep) if column in columns]
    part = part.select_columns(list(dict.fromkeys(kept)))
    return part if text_column == "text" else part.rename_column(text_column, "text")


def _join(parts: list[Any], keep: Sequence[str]) -> Any:
    """Concatenate what the formats gave, with a domain everywhere if it is anywhere."""
    if len(parts) == 1:
        return parts[0]
    # only now are all columns needed, which in streaming mode means those of the first rows
    columns = [part.column_names or list(next(iter(part))) for part in parts]
    if any("domain" in names for names in columns):
        parts = [
            part if "domain" in names else _add_blank_domain(part) for part, names in zip(parts, columns, strict=True)
        ]
        keep = [*dict.fromkeys(["domain", *keep])]
    return concatenate_datasets([_as_strings(part, ("text", *keep)) for part in parts])


def _add_blank_domain(part: Any) -> Any:
    if isinstance(part, Dataset):
        return part.add_column("domain", [""] * len(part))
    return part.map(_blank_domain, features=Features({"text": Value("string"), "domain": Value("string")}))


def _blank_domain(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": row["text"], "domain": ""}


def _as_strings(part: Any, columns: Sequence[str]) -> Any:
    """Parquet may hold string or large_string, which don't concatenate."""
    wanted = Features({column: Value("string") for column in columns})
    if part.features is not None and all(part.features[column] == wanted[column] for column in columns):
        return part.select_columns(list(columns))
    return part.select_columns(list(columns)).cast(wanted)


def split_documents(
    documents: Dataset | IterableDataset, heldout_fraction: float = 0.05, seed: int = 0
) -> tuple[Dataset, Dataset] | tuple[IterableDataset, IterableDataset]:
    """Divide documents into a training and a held-out side, the same way for the same seed.

    Map-style datasets are divided at random, with the fraction exact up to rounding and a document or more on either
    side. A stream is divided by a hash of each document's text. (A hash of its position would be wrong: shuffling the
    shards of the training side, or sharing them among workers, renumbers the documents, and held-out ones would
    return.) So copies of a document in a stream stay on one side, and the fraction holds on average. About
    `1 / heldout_fraction` documents are read at once, to find the first of each side.

    Args:
        documents: Rows with a `"text"` column, as `load_text` gives them.
        heldout_fraction: The share of documents to hold out, between 0 and 1.
        seed: Another seed, another division.

    Returns:
        The training side and the held-out side, of the same kind as `documents`.

    Raises:
        DataError: when the fraction is out of range, there is no `"text"` column, or a side would be left without
            documents.
    """
    if not 0 < heldout_fraction < 1:
        raise DataError(f"heldout_fraction must lie between 0 and 1, got {heldout_fraction}")
    if isinstance(documents, Dataset):
        count = len(documents)
        if count < 2:
            raise DataError(f"{count} document(s) cannot be divided by document; pass a separate held-out dataset")
        heldout_count = min(count - 1, max(1, round(count * heldout_fraction)))
        # Not train_test_split: in datasets 5.2 it cannot keep the indices of a cached dataset in memory.
        order = np.random.default_rng(seed).permutation(count)
        train_rows, heldout_rows = np.sort(order[heldout_count:]), np.sort(order[:heldout_count])
        return documents.select(train_rows, keep_in_memory=True), documents.select(heldout_rows, keep_in_memory=True)
    require_text(documents)
    is_heldout = partial(_is_heldout, fraction=heldout_fraction, seed=seed)
    train = documents.filter(partial(_is_train, is_heldout=is_heldout), input_columns=["text"])
    heldout = documents.filter(is_heldout, input_columns=["text"])
    for side, name in ((train, "training"), (heldout, "held-out")):
        if next(iter(side), None) is None:
            raise DataError(
                f"heldout_fraction={heldout_fraction} leaves the {name} side of the stream without documents; "
                "change it, or pass a separate held-out dataset"
            )
    return train, heldout


def require_text(documents: Dataset | IterableDataset) -> None:
    """Refuse documents without a column of text."""
    columns = documents.column_names or list(next(iter(documents), {"text": ""}))
    if "text" not in columns:
        raise DataError(f"the documents have no column 'text', only {columns}; load them with load_text")


def _is_heldout(text: str | None, fraction: float, seed: int) -> bool:
    digest = hashlib.blake2b((text or "").encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _is_train(text: str | None, is_heldout: partial[bool]) -> bool:
    return not is_heldout(text)

"""Text of any `datasets` source, packed into rows of token ids.

    documents = load_text("HuggingFaceFW/fineweb-edu", config_name="sample-10BT", streaming=True)
    train, heldout = split_documents(documents, heldout_fraction=0.01)
    rows = pack(train, tokenizer, context_length=1024, seed=0, repeat=True)

Everything after `load_text` is lazy: documents are shuffled, cut into passages, shuffled, tokenised, joined, cut into
rows and shuffled again only as the rows are asked for. The order depends on the data and on the seed alone, so a
second iteration, here or in a new process, gives the same rows. That is what resuming needs, since
`transformers.Trainer` resumes by skipping the batches it has seen. Two things change the order: the number of
DataLoader workers, and `set_epoch`, which the Trainer calls when an iterable dataset runs out (train with
`repeat=True`, which never does).
"""

import glob
import hashlib
import itertools
import logging
import math
import re
import sysconfig
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, load_dataset
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PASSAGE_CHARACTERS = 16_384
PASSAGES_PER_BATCH = 64
ROWS_PER_BATCH = 16

_BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".py": "text",
}
_ENDINGS = ", ".join(_BUILDERS)
_GLOB = re.compile(r"[*?\[]")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Cut before the last whitespace that leaves the passage short enough; inside a "word" only where one is longer still.
_PASSAGE = re.compile(rf"(?s).{{1,{PASSAGE_CHARACTERS}}}(?=\s|\Z)|.{{1,{PASSAGE_CHARACTERS}}}")
_LIBRARY_SKIPS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


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
            f"no local path {name!r}, and the Hub dataset of that name cannot be loaded: {_first_line(error)}; "
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
    # Path.glob takes no absolute patterns
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
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
    return _first_line(cause)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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


def python_library_files() -> Iterator[tuple[str, str]]:
    """Path in the running interpreter's standard library, and text, of every source file, in the order of the paths.

    Tests, installed packages, empty files and files that are not UTF-8 are left out.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if _LIBRARY_SKIPS.intersection(inside.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield str(inside), text


def python_library_documents() -> Dataset:
    """The running interpreter's standard library, one document per source file, as text that is always at hand: see
    `python_library_files`.

    Returns:
        Rows `{"text": str, "domain": "code"}`, in the order of the files' paths.

    Raises:
        DataError: when the interpreter comes without its sources.
    """
    texts = [text for _, text in python_library_files()]
    if not texts:
        library = sysconfig.get_paths()["stdlib"]
        raise DataError(f"no Python sources under {library!r}; this interpreter has none to offer as text")
    return Dataset.from_dict({"text": texts, "domain": ["code"] * len(texts)})


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
    _require_text(documents)
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


def _require_text(documents: Dataset | IterableDataset) -> None:
    columns = documents.column_names or list(next(iter(documents), {"text": ""}))
    if "text" not in columns:
        raise DataError(f"the documents have no column 'text', only {columns}; load them with load_text")


def _is_heldout(text: str | None, fraction: float, seed: int) -> bool:
    digest = hashlib.blake2b((text or "").encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _is_train(text: str | None, is_heldout: partial[bool]) -> bool:
    return not is_heldout(text)


def pack(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    buffer_size: int = 1000,
    repeat: bool = False,
) -> IterableDataset:
    """Turn documents into rows of exactly `context_length` token ids, lazily and in an order set by the seed.

    Documents are shuffled (map-style: all of them; a stream: through a buffer, and its shards), cut at whitespace into
    passages of at most 16,384 characters so that a book is spread over the run, and shuffled again. Batches of
    passages are tokenised without special tokens, joined with the EOS token if the tokenizer has one, and cut into
    rows that each start with the BOS token if it has one; the rows are shuffled once more. What is left of a batch
    after its last row is dropped. A batch is at least 64 passages and, where those are short, as many as make about
    16 rows, so that what is dropped is some 3 % of the text on average, or less. Nothing marks the texts in a row but
    the EOS tokens: attention crosses them.

    Args:
        documents: Rows with a `"text"` column, as `load_text` gives them; missing and blank texts are skipped.
        tokenizer: The model's own.
        context_length: Tokens in a row, BOS included.
        seed: Another seed, another order.
        shuffle: False keeps the documents' order, for held-out text.
        buffer_size: Documents of a stream, passages and rows that the three shuffles choose among.
        repeat: Start again after the last row, for ever and in the same order.

    Returns:
        Rows `{"input_ids": list[int]}`, each of length `context_length`.

    Raises:
        DataError: when `context_length` is below 2, `buffer_size` below 1, there is no `"text"` column, or the text is
            too short for a single row. The documents for a first row are read at once to find out.
    """
    if context_length < 2:
        raise DataError(f"context_length must be at least 2, one token to predict another from; got {context_length}")
    if buffer_size < 1:
        raise DataError(f"buffer_size must be at least 1, got {buffer_size}")
    _require_text(documents)
    batch_size = _passages_per_batch(_passages(documents), tokenizer, context_length)
    if shuffle:
        how = {"keep_in_memory": True} if isinstance(documents, Dataset) else {"buffer_size": buffer_size}
        documents = documents.shuffle(seed=seed, **how)
    passages = _passages(documents)
    if shuffle:
        passages = _shuffle_locally(passages, seed + 1, buffer_size)
    rows = passages.map(
        _pack_batch,
        batched=True,
        batch_size=batch_size,
        remove_columns=["text"],
        features=Features({"input_ids": List(Value("int64"), length=context_length)}),
        fn_kwargs={"tokenizer": tokenizer, "context_length": context_length},
    )
    if shuffle:
        rows = _shuffle_locally(rows, seed + 2, buffer_size)
    return rows.repeat(None) if repeat else rows


def _passages(documents: Dataset | IterableDataset) -> IterableDataset:
    """Rows `{"text": str}` of at most `PASSAGE_CHARACTERS` each, which joined give the documents back."""
    if isinstance(documents, Dataset):
        documents = documents.with_format(None).to_iterable_dataset()
    return documents.select_columns(["text"]).map(
        _cut_documents, batched=True, batch_size=16, features=Features({"text": Value("string")})
    )


def _cut_documents(batch: dict[str, list[str | None]]) -> dict[str, list[str]]:
    texts = (text for text in batch["text"] if text and not text.isspace())
    return {"text": [passage for text in texts for passage in _PASSAGE.findall(text)]}


def _shuffle_locally(dataset: IterableDataset, seed: int, buffer_size: int) -> IterableDataset:
    """Shuffle through a buffer, without touching the shards that the documents come from.

    A plain shuffle would also open up to ten shards at once, each with all buffers below it: a hundred times the
    documents to read before the first row. Datasets shuffle but don't reorder what skip() has fixed the order of.
    """
    return dataset.skip(0).shuffle(seed=seed, buffer_size=buffer_size)


def _token_stream(passages: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The passages' ids, one after the other, with EOS in between if there is one."""
    # verbose=False: a passage longer than the model's context is no mistake here, it is cut below
    encoded = tokenizer(
        passages,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for index, ids in enumerate(encoded):
        if index:
            stream += separator
        stream += ids
    return stream


def _pack_batch(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, context_length: int
) -> dict[str, list[list[int]]]:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]  # an id of 0 is an id
    length = context_length - len(start)
    stream = _token_stream(batch["text"], tokenizer)
    full = range(0, len(stream) - length + 1, length)
    return {"input_ids": [start + stream[begin : begin + length] for begin in full]}


def _passages_per_batch(passages: IterableDataset, tokenizer: PreTrainedTokenizerBase, context_length: int) -> int:
    """How many passages to tokenise together, judged by the first ones in their original order."""
    needed = context_length - (tokenizer.bos_token_id is not None)
    count = tokens = 0
    for batch in passages.iter(batch_size=PASSAGES_PER_BATCH):
        count += len(batch["text"])
        tokens += len(_token_stream(batch["text"], tokenizer))
        if tokens >= needed:
            break
    else:
        raise DataError(
            f"the text is too short to pack: its {count} passage(s) make {tokens} tokens, and one row takes {needed} "
            f"(context_length={context_length}); give more text or a smaller context_length"
        )
    return max(PASSAGES_PER_BATCH, math.ceil(ROWS_PER_BATCH * context_length * count / tokens))


def take_tokens(rows: IterableDataset, tokens: int) -> IterableDataset:
    """The first rows that together hold at least `tokens` token ids, BOS included.

    Args:
        rows: What `pack` returned.
        tokens: How many are wanted; rounded up to whole rows.

    Returns:
        `ceil(tokens / context_length)` rows, or all there are.

    Raises:
        DataError: when `tokens` is below 1, or the rows are not `pack`'s, whose features tell their length.
    """
    if tokens < 1:
        raise DataError(f"tokens must be at least 1, got {tokens}")
    feature = (rows.features or {}).get("input_ids")
    if not isinstance(feature, List) or feature.length < 1:
        raise DataError(f"the rows do not say how long they are (features: {rows.features}); pass what pack returns")
    return rows.take(math.ceil(tokens / feature.length))


def materialize(rows: IterableDataset, tokens: int | None = None) -> Dataset:
    """Read rows into memory, for evaluation, which passes over the same ones again and again.

    Args:
        rows: What `pack` returned; with `repeat=True` there is no end to it, so give `tokens` too.
        tokens: Stop once there are this many token ids; None takes every row.

    Returns:
        A map-style dataset whose `input_ids` come as LongTensors of shape (context_length,).

    Raises:
        DataError: when there are no rows, or `tokens` is below 1.
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
    """Stack rows into a batch for a causal language model, padding on the right where lengths differ.

    Args:
        tokenizer: Gives the padding id: its PAD, else its EOS. Without a tokenizer, or without either, the id is 0,
            which the mask hides as well as any other.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        candidates = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        self.pad_token_id: int = next((token for token in candidates if token is not None), 0)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Stack rows.

        Args:
            rows: B rows with `input_ids` and, optionally, `attention_mask`, as lists or tensors; others are dropped.

        Returns:
            `input_ids` and `attention_mask`, both LongTensors of shape (B, T), T the length of the longest row.

        Raises:
            DataError: when there are no rows, or a row's mask is not as long as its ids.
        """
        if not rows:
            raise DataError("a batch needs at least one row")
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]  # each (t,)
        masks = [
            torch.ones_like(tokens) if row.get("attention_mask") is None else torch.as_tensor(row["attention_mask"])
            for row, tokens in zip(rows, ids, strict=True)
        ]
        for tokens, mask in zip(ids, masks, strict=True):
            if tokens.shape != mask.shape:
                raise DataError(f"attention_mask is {tuple(mask.shape)} but input_ids is {tuple(tokens.shape)}")
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return {
            "input_ids": pad(ids, padding_value=self.pad_token_id),
            "attention_mask": pad([mask.long() for mask in masks], padding_value=0),
        }

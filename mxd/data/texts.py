"""Text of a run: what is trained on, what is held out, and whether that is so."""

import fnmatch
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from mxd import demo

from .documents import load_text, local_files, split_documents
from .packing import CausalCollator, materialize, pack, take_tokens

logger = logging.getLogger(__name__)

Documents: TypeAlias = Dataset | IterableDataset

MAX_NAME = 4096


@dataclass
class TextOptions:
    """Which text, and how it becomes rows of tokens.

    Attributes:
        dataset: Hub name, or files, folders and globs; empty for the embedded sample.
        heldout_dataset: text to evaluate on; by default documents held out of `dataset`.
        heldout_split: split to evaluate on, of `heldout_dataset` (by default `"train"`), else of `dataset`.
        config_name, split, text_column: of the dataset.
        streaming: read a Hub dataset as it comes instead of downloading it first.
        context_length: tokens a row, BOS included.
    """

    dataset: list[str] = field(default_factory=list)
    heldout_dataset: list[str] = field(default_factory=list)
    config_name: str | None = None
    split: str = "train"
    text_column: str = "text"
    streaming: bool = False
    context_length: int = 128
    heldout_split: str | None = None


class TextPart(NamedTuple):
    """A split of a local file, or of a configuration of a Hub dataset."""

    name: str
    config_name: str | None = None
    split: str = "train"

    def overlaps(self, recorded: "TextPart") -> bool:
        """Whether it has documents in common with what was recorded, as far as names tell: `train` and `train[:1%]` do,
        of two slices it is not known, and no configuration may be any."""
        configs, splits = {self.config_name, recorded.config_name}, {self.split, recorded.split}
        whole = {self.split.partition("[")[0], recorded.split.partition("[")[0]}
        return (
            _covers(recorded.name, self.name)
            and (len(configs) == 1 or None in configs)
            and (len(splits) == 1 or (len(whole) == 1 and bool(whole & splits)))
        )


def _covers(recorded: str, name: str) -> bool:
    """Whether a recorded file, folder or glob is, or holds, a file. A stranger may have recorded it: it is compared as
    text, and no file of that name is looked for."""
    if recorded == name:
        return True
    if not os.path.isabs(name) or len(recorded) > MAX_NAME:  # noqa: PTH117
        return False
    path = os.path.abspath(os.path.expanduser(recorded))  # noqa: PTH100, PTH111, pathlib raises for strange names
    return any(
        file == path or file.startswith(os.path.join(path, "")) or fnmatch.fnmatch(file, path)  # noqa: PTH118
        for file in {name, os.path.realpath(name)}
    )


def text_parts(dataset: Iterable[str], config_name: str | None, split: str | None) -> set[TextPart]:
    """What a dataset that this run was asked for consists of: the files that folders and globs stand for, or the Hub
    dataset."""
    found = set()
    for name in dataset:
        for part in [str(file.absolute()) for file in local_files(name)] or [name]:
            found.add(TextPart(part, config_name, split or "train"))
    return found


def recorded_parts(text: Mapping[str, Any]) -> set[TextPart]:
    """The same of what evaluation.json says of a training's text, which a stranger may have written: nothing on this
    machine is looked at."""
    names, config, split = (text.get(key) for key in ("dataset", "config_name", "split"))
    return {
        TextPart(name, config if isinstance(config, str) else None, str(split or "train"))
        for name in (names if isinstance(names, list) else [])
        if isinstance(name, str)
    }


def common(parts: Iterable[TextPart], recorded: Iterable[TextPart]) -> list[str]:
    """Names of the parts that have documents in common with what was recorded, in order."""
    known = list(recorded)
    return sorted({part.name for part in parts if any(part.overlaps(of_other) for of_other in known)})


def division(text: Mapping[str, Any], seed: Any) -> tuple[Any, ...]:
    """What decides which documents are held out of a text: two trainings that have it in common hold out the same."""
    names = text.get("dataset")
    paths = [os.path.abspath(name) for name in names if isinstance(name, str)] if isinstance(names, list) else None  # noqa: PTH100
    return paths, text.get("config_name"), text.get("split"), bool(text.get("streaming")), seed


def count_documents(*parts: Documents) -> int | None:
    """How many documents they have together, from which a division of them follows; None where a stream is among
    them, which is divided by what each document holds."""
    counts = [len(part) for part in parts if isinstance(part, Dataset)]
    return sum(counts) if len(counts) == len(parts) else None


def load_documents(text: TextOptions, seed: int) -> tuple[Documents, Documents]:
    """Training documents and held-out documents.

    Raises:
        DataError: as `trainers.load_text`.
        ValueError: `heldout_split` is of nothing, or what is held out is trained on.
    """
    if text.heldout_split and not text.heldout_dataset and not text.dataset:
        raise ValueError(f"the held-out split {text.heldout_split!r} is of no dataset: name one")
    trained_on = text_parts(text.dataset, text.config_name, text.split)
    if again := common(trained_on, heldout_parts(text)):
        raise ValueError(f"what is to be held out is trained on: {again[0]}; name another dataset or split")
    documents = _load(text, text.split, "train")
    if text.heldout_dataset:
        how: dict[str, Any] = {"text_column": text.text_column, "streaming": text.streaming}
        return documents, load_text(text.heldout_dataset, split=text.heldout_split or "train", **how)
    if text.heldout_split or not text.dataset:
        return documents, _load(text, text.heldout_split or text.split, "heldout")
    return split_documents(documents, seed=seed)


def _load(text: TextOptions, split: str, sample: Literal["train", "heldout"]) -> Documents:
    """A split of the dataset; where none is named, an embedded sample, of which the options for one say nothing."""
    if not text.dataset:
        return load_text(str(demo.text_path(sample)))
    return load_text(
        text.dataset,
        config_name=text.config_name,
        split=split,
        text_column=text.text_column,
        streaming=text.streaming,
    )


def warn_of_embedded_text(text: TextOptions, model: str | None) -> None:
    """A model of one's own on the small embedded text is seldom what was meant."""
    if not text.dataset and model != demo.MODEL_NAME:
        logger.warning("no dataset is named: %s is trained on the small text that ships with mxd, over and over", model)


def load_one(text: TextOptions) -> Documents:
    """The documents of a text as a whole; the embedded held-out sample if it names none.

    Raises:
        DataError: as `trainers.load_text`.
    """
    return _load(text, text.split, "heldout")


def heldout_parts(text: TextOptions) -> set[TextPart]:
    """What is evaluated on, where that was named."""
    if text.heldout_dataset:
        return text_parts(text.heldout_dataset, None, text.heldout_split)
    return text_parts(text.dataset, text.config_name, text.heldout_split) if text.heldout_split else set()


def evaluation_batches(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    tokens: int,
    warn: bool = True,
) -> list[dict[str, torch.Tensor]]:
    """Held-out rows in batches of about 2,048 tokens, shuffled with a fixed seed: the first that hold `tokens`
    together, or all there are, with a warning unless `warn` is False."""
    packed = pack(documents, tokenizer, context_length, seed=0)
    rows = materialize(packed, tokens) if warn else materialize(take_tokens(packed, tokens))
    size, collate = max(1, 2048 // context_length), CausalCollator()
    return [
        collate([rows[index] for index in range(start, min(start + size, len(rows)))])
        for start in range(0, len(rows), size)
    ]


def evaluation_settings(text: TextOptions, dtype: str) -> dict[str, Any]:
    """On which text a decomposition was measured, for evaluation.json."""
    settings = asdict(text)
    split = settings.pop("heldout_split")
    if text.heldout_dataset:
        heldout = {"dataset": text.heldout_dataset, "split": split or "train"}
        settings |= {**heldout, "heldout_dataset": [], "config_name": None}
    elif split:
        settings["split"] = split
    return {**settings, "model_dtype": dtype}

"""Name texts, and tell whether a text was trained on.

evaluation.json records how a decomposition was made: settings.training, and settings.finetuning, a list. Each of them
holds `text` (dataset, config_name, split, streaming, heldout_dataset, heldout_split), `seed` and `documents`. Recorded
names may come from a stranger: they are compared as text, and no file of that name is opened.
"""

import fnmatch
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .documents import local_files


@dataclass
class TextOptions:
    """Name a text, and say how it becomes rows of tokens.

    Attributes:
        dataset: Hub dataset, or files, folders and globs; empty for the sample text that ships with mxd.
        heldout_dataset: text to evaluate on; by default documents split off `dataset`.
        heldout_split: split to evaluate on, of `heldout_dataset` (by default `"train"`) or else of `dataset`.
        config_name, split, text_column: see `load_text`.
        dataset_revision: branch, tag or commit of the Hub dataset.
        streaming: read a Hub dataset lazily instead of downloading it first.
        context_length: tokens in a row, BOS included.
    """

    dataset: list[str] = field(default_factory=list)
    heldout_dataset: list[str] = field(default_factory=list)
    config_name: str | None = None
    dataset_revision: str | None = None
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
        """Return whether the two share documents, as far as names tell.

        `train` and `train[:1%]` do; two slices count as disjoint; no configuration may be any configuration.
        """
        configs, splits = {self.config_name, recorded.config_name}, {self.split, recorded.split}
        whole = {split.partition("[")[0] for split in splits}
        return (
            _covers(recorded.name, self.name)
            and (len(configs) == 1 or None in configs)
            and (len(splits) == 1 or (len(whole) == 1 and bool(whole & splits)))
        )


def _covers(recorded: str, name: str) -> bool:
    """Return whether a recorded file, folder or glob is, or holds, a file."""
    if recorded == name:
        return True
    if not os.path.isabs(name):  # noqa: PTH117
        return False
    path = os.path.abspath(os.path.expanduser(recorded))  # noqa: PTH100, PTH111, pathlib raises for strange names
    return any(
        file == path or file.startswith(os.path.join(path, "")) or fnmatch.fnmatch(file, path)  # noqa: PTH118
        for file in {name, os.path.realpath(name)}
    )


def text_parts(dataset: Iterable[str], config_name: str | None, split: str | None) -> set[TextPart]:
    """Return the parts of a dataset of this run: the files of folders and globs, or the Hub dataset."""
    return {
        TextPart(part, config_name, split or "train")
        for name in dataset
        for part in [str(file.absolute()) for file in local_files(name)] or [name]
    }


def heldout_parts(text: TextOptions) -> set[TextPart]:
    """Return the parts of a held-out dataset or split; empty if held-out documents are split off the dataset."""
    if text.heldout_dataset:
        return text_parts(text.heldout_dataset, None, text.heldout_split)
    return text_parts(text.dataset, text.config_name, text.heldout_split) if text.heldout_split else set()


def recorded_parts(text: Mapping[str, Any]) -> set[TextPart]:
    """Return the parts of a recorded training text, without looking for files."""
    names, config, split = (text.get(key) for key in ("dataset", "config_name", "split"))
    return {
        TextPart(name, config if isinstance(config, str) else None, str(split or "train"))
        for name in (names if isinstance(names, list) else [])
        if isinstance(name, str)
    }


def common(parts: Iterable[TextPart], recorded: Iterable[TextPart]) -> list[str]:
    """Return the names of the parts that overlap a recorded part, sorted."""
    known = list(recorded)
    return sorted({part.name for part in parts if any(part.overlaps(other) for other in known)})


def check_apart(text: TextOptions) -> None:
    """Raise `ValueError` if the held-out dataset or split of a run overlaps its training text."""
    if text.heldout_split and not text.heldout_dataset and not text.dataset:
        raise ValueError(f"the held-out split {text.heldout_split!r} is of no dataset: name one")
    if again := common(text_parts(text.dataset, text.config_name, text.split), heldout_parts(text)):
        raise ValueError(f"the held-out text is trained on: {again[0]}; name another dataset or split")


def recorded_runs(settings: Any) -> dict[str, Any]:
    """Return "training" (a dict) and "finetuning" (a list) of evaluation.json's settings, where they are present."""
    kinds = {"training": dict, "finetuning": list}
    settings = settings if isinstance(settings, dict) else {}
    return {key: settings[key] for key, kind in kinds.items() if isinstance(settings.get(key), kind)}


def _trained_on(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the runs that record their text."""
    runs = [settings.get("training"), *settings.get("finetuning", [])]
    texts = ((run, run.get("text")) for run in runs if isinstance(run, dict))
    return [run for run, text in texts if isinstance(text, dict) and isinstance(text.get("dataset"), list)]


def is_held_out(settings: Mapping[str, Any], seen: Collection[str]) -> bool | None:
    """Return whether no part of a text was trained on, given `seen_in_training` of it; None if that is not known."""
    known = len(_trained_on(settings)) == 1 + len(settings.get("finetuning", []))
    return False if seen else True if known else None


def split_seed(settings: Mapping[str, Any], own: Any) -> Any:
    """Return the seed with which a fine-tuning splits its text: the recorded training's, else its `own`.

    With the training's seed, the same text has the same held-out documents, which the decomposition has not seen.
    """
    seed = settings.get("training", {}).get("seed")
    return seed if isinstance(seed, int) and seed >= 0 else own


def seen_in_training(
    settings: Mapping[str, Any], text: TextOptions, seed: int | None = None, documents: int | None = None
) -> list[str]:
    """Return the names of the evaluated parts of a text that a decomposition may have been trained on.

    Args:
        settings: what `recorded_runs` returns for the decomposition.
        text: the text.
        seed: None if the whole dataset is evaluated; else the seed with which held-out documents are split off. A
            recorded run with the same text, seed and, if known, number of documents held out the same ones.
        documents: the number of documents of the dataset, None if not known.
    """
    heldout = set() if seed is None else heldout_parts(text)
    evaluated = heldout or text_parts(text.dataset, text.config_name, text.split)
    own = {name: getattr(text, name) for name in ("dataset", "config_name", "split", "streaming")}
    own_split = _split(own, split_seed(settings, seed))
    seen: set[str] = set()
    for run in _trained_on(settings):
        recorded = run["text"]
        was_split = not recorded.get("heldout_dataset") and not recorded.get("heldout_split")
        same = _split(recorded, split_seed(settings, run.get("seed"))) == own_split
        same = same and (None in (documents, run.get("documents")) or documents == run["documents"])
        if seed is None or heldout or not was_split or not same:
            seen.update(common(evaluated, recorded_parts(recorded)))
    return sorted(seen)


def _split(text: Mapping[str, Any], seed: Any) -> tuple[Any, ...]:
    """Return the values that decide which documents are held out of a text."""
    names = text.get("dataset")
    paths = [os.path.abspath(name) for name in names if isinstance(name, str)] if isinstance(names, list) else None  # noqa: PTH100
    return paths, text.get("config_name"), text.get("split"), bool(text.get("streaming")), seed

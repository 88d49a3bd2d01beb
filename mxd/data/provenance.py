"""Name texts, and tell whether a text was trained on.

evaluation.json records how a decomposition was made: settings.training, and settings.finetuning, a list. Each of them
holds `text` (dataset, config_name, split, streaming, heldout_dataset, heldout_split), `seed` and `sketch`, a
fingerprint of the training documents, by which a text is recognised under any name.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset

from .documents import HELDOUT_FRACTION, digest, local_files, stream_start

logger = logging.getLogger(__name__)

SKETCH_SIZE = 1024
ENOUGH_DOCUMENTS = 30
"""Evaluated documents that must be checked before they all count as held out, if there are so many."""
_SENTENCE = re.compile(r"[^.!?。！？\n]{32,}")
_ENOUGH_SENTENCES = 3
_SENTENCES_OF = 1 << 25  # characters, the first ones: some seconds


@dataclass
class TextOptions:
    """Name a text, and say how it becomes rows of tokens.

    Attributes:
        dataset: Hub dataset, or files, folders and globs; empty for the sample text that ships with mxd.
        heldout_dataset: text to evaluate on; by default documents split off `dataset`.
        heldout_split: split to evaluate on, of `heldout_dataset` (by default `"train"`) or else of `dataset`.
        config_name, split, text_column, chat: see `load_text`.
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
    chat: bool = False


def check_apart(text: TextOptions) -> None:
    """Raise `ValueError` if the held-out dataset or split of a run overlaps its training text, as far as names tell.

    `train` and `train[:1%]` overlap; two slices count as disjoint.
    """
    if text.heldout_split and not text.heldout_dataset and not text.dataset:
        raise ValueError(f"the held-out split {text.heldout_split!r} is of no dataset: name one")
    if not text.heldout_dataset and not text.heldout_split:
        return
    again = _sources(text.dataset) & _sources(text.heldout_dataset or text.dataset)
    splits = {text.split, text.heldout_split or "train"}
    whole = {split.partition("[")[0] for split in splits}
    if again and (len(splits) == 1 or (len(whole) == 1 and whole & splits)):
        raise ValueError(f"the held-out text is trained on: {min(again)}; name another dataset or split")


def _sources(dataset: Iterable[str]) -> set[str]:
    """Return the files of folders and globs, or the name of a Hub dataset."""
    return {part for name in dataset for part in [str(file.resolve()) for file in local_files(name)] or [name]}


def recorded_runs(settings: Any) -> dict[str, Any]:
    """Return "training" (a dict) and "finetuning" (a list) of evaluation.json's settings, where they are present."""
    kinds = {"training": dict, "finetuning": list}
    settings = settings if isinstance(settings, dict) else {}
    return {key: settings[key] for key, kind in kinds.items() if isinstance(settings.get(key), kind)}


def split_seed(settings: Mapping[str, Any], own: Any) -> Any:
    """Return the seed with which a fine-tuning splits its text: the recorded training's, else its `own`.

    With the training's seed, the same text has the same held-out documents, which the decomposition has not seen.
    """
    seed = settings.get("training", {}).get("seed")
    return seed if isinstance(seed, int) and seed >= 0 else own


def sketch(text: TextOptions, documents: Dataset | IterableDataset, seed: int) -> dict[str, Any]:
    """Return a fingerprint of the training documents, from which `is_held_out` later recognises documents.

    Args:
        text: the text of the run.
        documents: the documents that are trained on.
        seed: the seed with which held-out documents were split off.

    Returns:
        "hashes", "sentences": the `SKETCH_SIZE` smallest hashes of texts and of their sentences, by which a text is
        recognised that is cut into other documents; "complete": whether all documents were read, which is false for
        the longer streams; "seed"; and "least", a lower bound of the hashes of texts and seed, below which
        the held-out documents are. Hashes have 16 hexadecimal digits.
    """
    hashes, sentences, complete = _hashes(documents, ["", str(seed)])
    of_stream = round(HELDOUT_FRACTION * 2**64) if _is_split(vars(text)) else 0
    least = min((own for _, own in hashes), default=0) if complete else of_stream
    return {
        "hashes": _digits({of_text for of_text, _ in hashes}),
        "sentences": _digits(sentences),
        "complete": complete,
        "seed": seed,
        "least": _digits([least]),
    }


def _digits(numbers: Iterable[int]) -> str:
    """Write the smallest of some hashes."""
    return "".join(f"{number:016x}" for number in sorted(numbers)[:SKETCH_SIZE])


def _numbers(digits: str) -> set[int]:
    return {int(digits[place : place + 16], 16) for place in range(0, len(digits), 16)}


def _is_split(text: Mapping[str, Any]) -> bool:
    """Return whether the held-out documents are split off the dataset."""
    return bool(text.get("dataset")) and not text.get("heldout_dataset") and not text.get("heldout_split")


def _hashes(documents: Dataset | IterableDataset, keys: Sequence[str]) -> tuple[set[tuple[int, ...]], set[int], bool]:
    """Hash all documents that are not blank, or a stream's first ones.

    Returns:
        Hashes of each document with every key, hashes of sentences, and whether all documents were read.
    """
    if isinstance(documents, Dataset):
        batches = documents.with_format(None).select_columns("text").iter(1000)
        texts, complete = (text for batch in batches for text in batch["text"]), True
    else:
        rows, complete = stream_start(documents)
        texts = (row["text"] for row in rows)
    found: set[tuple[int, ...]] = set()
    sentences: set[int] = set()
    left = _SENTENCES_OF
    for text in texts:
        if text and not text.isspace():
            found.add(tuple(digest(text if key else text.strip(), key) for key in keys))
            sentences.update(digest(" ".join(one.split())) for one in _SENTENCE.findall(text[: max(left, 0)]))
            left -= len(text)
    return found, sentences, complete


def _is_apart(
    recorded: Any, hashes: dict[str, list[int]], sentences: set[int], complete: bool, split: str | None
) -> bool | None:
    """Return whether no evaluated document is among those of a sketch, which may be a stranger's; None if not known.

    Args:
        recorded: the sketch.
        hashes: of the evaluated documents, by key.
        sentences: hashes of their sentences.
        complete: whether these are all.
        split: the key with which the documents were split off by `split_documents`, None if they were not.
    """
    if not _is_sketch(recorded):
        return None
    known, known_sentences = _numbers(recorded["hashes"]), _numbers(recorded["sentences"])
    least, key = int(recorded["least"], 16), str(recorded["seed"])
    again = known_sentences & sentences
    compared = sum(one <= max(known_sentences) for one in sentences) if again else 0
    if not known.isdisjoint(hashes[""]) or (len(again) >= _ENOUGH_SENTENCES and 2 * len(again) > compared):
        return False
    if split == key and least >= round(HELDOUT_FRACTION * 2**64) and not complete:
        return True  # both are sides of streams split alike
    # Up to this bound, the sketch shows whether a document was trained on; below `least`, none was.
    bound = (2**64 if len(known) < SKETCH_SIZE else max(known)) if recorded["complete"] else -1
    checked = [one <= bound for one in hashes[""]]
    known_all = all(one or own < least for one, own in zip(checked, hashes[key], strict=True))
    return True if complete and checked and (known_all or sum(checked) >= ENOUGH_DOCUMENTS) else None


def _is_sketch(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(
            re.fullmatch(rf"([0-9a-f]{{16}}){count}", str(value.get(name)))
            for name, count in (("hashes", "+"), ("sentences", "*"), ("least", ""))
        )
        and isinstance(value.get("complete"), bool)
        and isinstance(value.get("seed"), int)
    )


def is_held_out(
    settings: Mapping[str, Any],
    text: TextOptions,
    documents: Dataset | IterableDataset,
    seed: int | None = None,
    own_sketch: Any = None,
) -> bool | None:
    """Return whether none of the documents was trained on, None if that is not known; warn if some were.

    Args:
        settings: what `recorded_runs` returns for the decomposition.
        text: the text of the documents.
        documents: the evaluated documents.
        seed: with which they were split off as held-out documents; None if the whole dataset is evaluated.
        own_sketch: of the documents of this run, among which a held-out dataset or split of its own may be.
    """
    runs = [settings.get("training"), *settings.get("finetuning", [])]
    sketches = [run.get("sketch") if isinstance(run, dict) else None for run in runs]
    if own_sketch is not None and not _is_split(vars(text)):
        sketches.append(own_sketch)
    keys = ["", *sorted({str(one["seed"]) for one in sketches if one is not None and _is_sketch(one)})]
    found, sentences, complete = _hashes(documents, keys)
    hashes = {key: [one[place] for one in found] for place, key in enumerate(keys)}
    split = str(split_seed(settings, seed)) if seed is not None and _is_split(vars(text)) else None
    apart = [_is_apart(one, hashes, sentences, complete, split) for one in sketches]
    if False in apart:
        logger.warning("this decomposition was trained on documents of this text: it is not held out")
        return False
    return None if None in apart else True

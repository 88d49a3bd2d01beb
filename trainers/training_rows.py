"""Rows of an iterable dataset for a training: opened once, measured from the first ones, and resumable."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset
from transformers.trainer_pt_utils import safe_globals

from mxd.data.shared_rows import apart, loses_rows

STATE_NAME = "training_rows.pt"


class TrainingRows(IterableDataset[Any]):
    """The rows of an iterable dataset. Every iteration is an epoch of the training, the first of which begins with the
    rows that were measured before.

    Attributes:
        dataset: The dataset.
        resumes: Whether `state_dict` can hold the position. Otherwise a resumed Trainer reads rows and skips them.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset
        of_state = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
        self.resumes = of_state and not hasattr(dataset, "__len__") and not loses_rows(dataset)
        self._of_datasets = isinstance(dataset, datasets.IterableDataset)  # whose iterations begin anew
        self._initial = dataset.state_dict() if self.resumes and not self._of_datasets else None
        self._start: dict[str, Any] | None = None
        self._reset(None)

    def _reset(self, of_dataset: Any) -> None:
        start = self._start or {"first": [], "waiting": [], "epoch": 0}
        self._first: list[Any] = list(start["first"])
        self._waiting = deque(start["waiting"])  # read, and not trained on yet
        self._epoch = self._first_epoch = start["epoch"]
        self._epochs = 0  # that have begun
        self._source: Iterator[Any] | None = None
        self._opened = self.dataset
        self._of_dataset = of_dataset  # to load into the dataset before it is opened
        self._error: Exception | None = None

    def start(self, state: dict[str, Any] | None = None) -> None:
        """Begin a training at a position, by default the first row. Rows that were only measured are not read again."""
        if state is not None or self._start is not None or self._epochs or self._error:
            self._start = state
            self._reset(self._initial if state is None else state["dataset"])

    def restart(self) -> None:
        """Begin the training again where it began, if it has begun."""
        if self._epochs:
            self._reset(self._initial if self._start is None else self._start["dataset"])

    def __len__(self) -> int:
        return len(self.dataset)  # a TypeError if it has no length

    def __iter__(self) -> Iterator[Any]:
        if self._epochs:  # what waits of the epoch before makes no whole step
            self._waiting.clear()
            self._source = None
        self._epochs += 1
        yield from list(self._waiting)
        if not self.resumes:
            self._waiting.clear()
        for row in self._read():
            if self.resumes:
                self._waiting.append(row)
            yield row

    def measured(self) -> Iterator[Any]:
        """Yield the first rows; until the training begins, read further ones, which wait for it."""
        yield from list(self._first)
        if self._start is None and not self._epochs:
            for row in self._read():
                self._first.append(row)
                self._waiting.append(row)
                yield row

    def _read(self) -> Iterator[Any]:
        """Yield further rows of the dataset, which stays open. An error is raised again by whoever reads on."""
        if self._error:
            raise self._error
        self._source = self._source or self._open()
        try:
            for row in self._source:  # noqa: UP028, `yield from` would close the source with this iteration
                yield row
        except Exception as error:
            self._error = error
            raise

    def _open(self) -> Iterator[Any]:
        if self._of_datasets:  # others may iterate over it meanwhile, an evaluation for example
            self._opened = apart(self.dataset)
        if hasattr(self._opened, "set_epoch"):
            self._opened.set_epoch(self._epoch)
        if self._of_dataset is not None:
            self._opened.load_state_dict(self._of_dataset)
        for row in self._opened:
            self._of_dataset = None
            yield row

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch; a resumed Trainer counts from 0."""
        self._epoch = self._first_epoch + epoch

    def release(self, rows: int) -> None:
        """Note that so many rows more were trained on."""
        for _ in range(min(rows, len(self._waiting))):
            self._waiting.popleft()

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last row that was trained on."""
        of_dataset = self._opened.state_dict() if self._of_dataset is None else self._of_dataset
        return {"dataset": of_dataset, "epoch": self._epoch, "first": self._first, "waiting": list(self._waiting)}


class FirstRows(IterableDataset[Any]):
    """The rows to measure on: `TrainingRows.measured`."""

    def __init__(self, rows: TrainingRows):
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return self.rows.measured()


def load_position(checkpoint: Path) -> dict[str, Any] | None:
    """Read the `state_dict` that a checkpoint holds; None if it holds none."""
    path = checkpoint / STATE_NAME
    if not path.is_file():
        return None
    with safe_globals():
        return dict(torch.load(path, weights_only=True))

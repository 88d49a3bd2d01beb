"""Streams that are opened once for several users: checks, held-out text, and the training that goes on behind them.

`datasets` opens a stream for every iteration. Here users read one after another: those that keep rows, whose rows the
next ones find in memory, and then one that reads on where they ended.

    documents = shared(documents, seed=0)
    first = next(iter(keeping(documents)))     # a check
    for document in documents: ...             # begins with the same document, which is not read again
"""

from collections.abc import Iterator
from contextlib import suppress
from copy import copy
from itertools import islice
from typing import Any

import numpy as np
from datasets import IterableDataset, iterable_dataset

from .streams import SHARDS_AT_ONCE, RowsInTurn, StreamPart


class Reading:
    """The reading of a source, and the rows that it kept, which are the first ones."""

    def __init__(self, source: RowsInTurn):
        self.source, self.rows = source, list[dict[str, Any]]()
        self._iterator: Iterator[tuple[Any, dict[str, Any]]] | None = None
        self._end: dict[str, Any] | None = None  # the source's state behind `rows`, once somebody reads on there

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_iterator": None}

    def keep_next(self) -> bool:
        """Read and keep a further row; return False if there is none, or if somebody reads on."""
        if self._end is None:
            self._iterator = self._iterator or iter(self.source)
            try:
                for _, row in self._iterator:
                    self.rows.append(row)
                    return True
            except Exception:
                self._iterator = None  # it is over; the next one begins where this one failed
                raise
        return False

    def read_on(self) -> tuple[RowsInTurn, Iterator[tuple[Any, dict[str, Any]]]]:
        """Return the source and its rows behind those kept: to the first caller as they are, to others opened anew."""
        if self._end is not None:
            return opened_at(self.source, self._end)
        if self.source._state_dict is None:
            self.source._init_state_dict()
        iterator, self._iterator = self._iterator or iter(self.source), None
        self._end = self.source.state_dict()
        return self.source, iterator


class SharedRows(StreamPart):
    """Rows of a source, and copies of this object that share its reading."""

    _sleep_on_threads_shutdown = False

    def __init__(self, ex_iterable: RowsInTurn):
        super().__init__(ex_iterable)
        self.reading: Reading | None = None
        self.keeps = False

    @property
    def taken(self) -> int:
        """How many kept rows the last iteration over this object took."""
        return int(self._state_dict["taken"])

    def _init_state_dict(self) -> dict[str, Any]:
        self._state_dict: dict[str, Any] = {"taken": 0, "source": None, "type": type(self).__name__}
        return self._state_dict

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        state: dict[str, Any] = self._state_dict or self._init_state_dict()
        reading = self.reading = self.reading or Reading(self.ex_iterable)
        skipped = 0
        if state["source"] is None:
            # A state may be of a process that kept more rows.
            while (left := len(reading.rows) - state["taken"]) > 0 or (self.keeps and reading.keep_next()):
                if left >= 0:
                    state["taken"] += 1
                    yield "row", dict(reading.rows[state["taken"] - 1])
            source, rows = reading.read_on()
            skipped = state["taken"] - len(reading.rows)
        else:
            source, rows = opened_at(self.ex_iterable, state["source"])
        state["source"] = source._state_dict
        yield from islice(rows, skipped, None)

    def shuffle_data_sources(self, generator: np.random.Generator) -> "SharedRows":
        """Return the rows of the same shards in another order, several of which are read in turn."""
        return SharedRows(RowsInTurn(self.ex_iterable.ex_iterable.shuffle_data_sources(generator), SHARDS_AT_ONCE))

    def shift_rngs(self, value: int) -> "SharedRows":
        """Return the rows of another epoch or worker, which have a reading of their own."""
        return SharedRows(self.ex_iterable)


def shared(documents: IterableDataset, seed: int | None = None) -> IterableDataset:
    """Return a stream that is opened once for all that is made of it.

    With a seed, its shards are in random order, and ten of them are read in turn, unless they are so already.
    """
    source = documents._ex_iterable
    in_turn = any(part.ex_iterable.count > 1 for part in shared_rows(source))
    if not shared_rows(source):
        source = SharedRows(RowsInTurn(_copied(source), 1))
    if seed is not None and not in_turn and source.num_shards > 1:
        with suppress(iterable_dataset.DataSourcesShufflingDisallowed):  # of `take` and `skip`, which count rows
            source = source.shuffle_data_sources(np.random.default_rng(seed))
    for part in shared_rows(source):
        part.reading = part.reading or Reading(part.ex_iterable)
    return _of(documents, source)


def keeping(documents: IterableDataset) -> IterableDataset:
    """Return the same stream, of which every row that is read is kept for others."""
    found = apart(documents)
    for part in shared_rows(found._ex_iterable):
        part.keeps = True
    return found


def apart(documents: IterableDataset) -> IterableDataset:
    """Return the same dataset, whose `state_dict` does not change with iterations over the other."""
    return _of(documents, _copied(documents._ex_iterable))


def _of(documents: IterableDataset, source: Any) -> IterableDataset:
    return IterableDataset(
        source,
        info=documents._info,
        split=documents._split,
        formatting=documents._formatting,
        distributed=documents._distributed,
        token_per_repo_id=documents._token_per_repo_id,
    )


def opened_at(source: Any, state: dict[str, Any]) -> tuple[Any, Iterator[Any]]:
    """Return a copy of a source, and its rows from a state on."""
    source = _copied(source)
    source.load_state_dict(state)
    return source, iter(source)


def _copied(source: Any) -> Any:
    """Copy the parts of a stream, which hold the state of its last iteration; share their data."""
    source = copy(source)
    if hasattr(source, "ex_iterable"):
        source.ex_iterable = _copied(source.ex_iterable)
    if hasattr(source, "ex_iterables"):
        source.ex_iterables = [_copied(one) for one in source.ex_iterables]
    return source


def parts(source: Any) -> Iterator[Any]:
    """Yield the parts of a stream: where it is read, mapped, filtered and so on."""
    yield source
    for part in (getattr(source, "ex_iterable", None), *getattr(source, "ex_iterables", ())):
        if part is not None:
            yield from parts(part)


def shared_rows(source: Any) -> list[SharedRows]:
    """Return the parts of a stream at which readings are shared."""
    return [part for part in parts(source) if isinstance(part, SharedRows)]


def loses_rows(dataset: Any) -> bool:
    """Return whether the `state_dict` of a dataset lacks rows: those in a shuffle buffer of `datasets`."""
    lossy = iterable_dataset.BufferShuffledExamplesIterable
    return isinstance(dataset, IterableDataset) and any(isinstance(one, lossy) for one in parts(dataset._ex_iterable))

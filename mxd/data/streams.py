"""Streams whose whole position is in `state_dict()`: the place in each shard, and what the shuffle buffers hold.

`datasets` reads a shard again from its start when a stream is resumed, and its shuffle buffers lose their rows. The
classes here are parts of a `datasets.IterableDataset` that do neither.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, iterable_dataset

from .readers import first_line

logger = logging.getLogger(__name__)

RETRY_SECONDS = (1, 2, 4, 8, 16, 32)
"""Pauses before a stream that failed is read again; `datasets` itself waits longer for a connection."""
SHARDS_AT_ONCE = 10
"""Shards of a stream that are read in turn, as many as `IterableDataset.shuffle` reads."""
_BUFFER_CHARACTERS = 1 << 26  # of a shuffle buffer, whose content every checkpoint holds


class ShardedRows(iterable_dataset._BaseExamplesIterable):
    """Rows of shards, each of which can be read from any row on: `read(shard, start)` yields those after `start`."""

    _sleep_on_threads_shutdown = False
    is_typed = True

    def __init__(self, read: Callable[[Any, int], Iterator[dict[str, Any]]], shards: Sequence[Any], features: Features):
        super().__init__()
        self.read, self.shards, self._features = read, shards, features

    @property
    def features(self) -> Features:
        """Types of the columns."""
        return self._features

    def _init_state_dict(self) -> dict[str, Any]:
        self._state_dict: dict[str, Any] = {"shard_idx": 0, "shard_example_idx": 0, "type": type(self).__name__}
        return self._state_dict

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        state: dict[str, Any] = self._state_dict or self._init_state_dict()
        for shard in self.shards[state["shard_idx"] :]:
            for row in self.read(shard, state["shard_example_idx"]):
                state["shard_example_idx"] += 1
                yield f"{state['shard_idx']}_{state['shard_example_idx']}", row
            state |= {"shard_idx": state["shard_idx"] + 1, "shard_example_idx": 0}

    def _of(self, indices: Sequence[int]) -> "ShardedRows":
        return ShardedRows(self.read, [self.shards[index] for index in indices], self._features)

    def shuffle_data_sources(self, generator: np.random.Generator) -> "ShardedRows":
        """Return the same rows, with the shards in another order."""
        return self._of(generator.permutation(len(self.shards)).tolist())

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> "ShardedRows":
        """Return the rows of a part of the shards."""
        return self._of(self.split_shard_indices_by_worker(num_shards, index, contiguous=contiguous))

    def reshard_data_sources(self) -> "ShardedRows":
        """Return the same rows: shards are not divided."""
        return self

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.shards)


class StreamPart(iterable_dataset._BaseExamplesIterable):
    """Rows made of those of `ex_iterable`. `_with` makes the same of the rows of other shards."""

    def __init__(self, ex_iterable: Any):
        super().__init__()
        self.ex_iterable = ex_iterable

    def _with(self, ex_iterable: Any) -> Any:
        return type(self)(ex_iterable)

    @property
    def is_typed(self) -> bool:
        """Whether the types of the columns are known."""
        return bool(self.ex_iterable.is_typed)

    @property
    def features(self) -> Features | None:
        """Types of the columns."""
        return self.ex_iterable.features

    def shuffle_data_sources(self, generator: np.random.Generator) -> Any:
        """Return the rows of the same shards in another order."""
        return self._with(self.ex_iterable.shuffle_data_sources(generator))

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> Any:
        """Return the rows of a part of the shards."""
        return self._with(self.ex_iterable.shard_data_sources(num_shards, index, contiguous=contiguous))

    def reshard_data_sources(self) -> Any:
        """Return the rows of smaller shards."""
        return self._with(self.ex_iterable.reshard_data_sources())

    @property
    def num_shards(self) -> int:
        """Number of shards of the source."""
        return int(self.ex_iterable.num_shards)


class RowsInTurn(StreamPart):
    """Rows of `count` parts of a source, from one after the other; what fails to be read is read again."""

    def __init__(self, ex_iterable: Any, count: int):
        super().__init__(ex_iterable)
        self.count = count
        self._sources: list[Any] = []

    def _with(self, ex_iterable: Any) -> "RowsInTurn":
        return RowsInTurn(ex_iterable, self.count)

    def _init_state_dict(self) -> dict[str, Any]:
        count = min(self.count, self.num_shards)
        whole = [self.ex_iterable] if count == 1 else []
        self._sources = whole or [self.ex_iterable.shard_data_sources(count, index) for index in range(count)]
        self._state_dict: dict[str, Any] = {
            "sources": [source._init_state_dict() for source in self._sources],
            "over": [False] * count,
            "turn": 0,
            "type": type(self).__name__,
        }
        return self._state_dict

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        state: dict[str, Any] = self._state_dict or self._init_state_dict()
        iterators, began, failures = [iter(source) for source in self._sources], set[int](), 0
        while not all(state["over"]):
            turn = state["turn"]
            source, row = self._sources[turn], None
            before = source.state_dict()
            try:
                row = None if state["over"][turn] else next(iterators[turn])
            except StopIteration:
                state["over"][turn] = True
            except Exception as error:
                state["sources"][turn] = source.load_state_dict(before)
                # A source whose first row cannot be read is refused at once, by the checks before a run.
                if turn not in began or not may_pass(error) or failures == len(RETRY_SECONDS):
                    raise
                pause = RETRY_SECONDS[failures]
                failures += 1
                of = f"{failures} of {len(RETRY_SECONDS)}"
                logger.warning("the text could not be read (%s): again in %d s, %s", first_line(error), pause, of)
                time.sleep(pause)
                iterators[turn] = iter(source)
                continue
            state["turn"] = (turn + 1) % len(self._sources)
            if row is not None:
                began.add(turn)
                failures = 0
                yield row


class ShuffleBuffer:
    """Mix items through a buffer, as `IterableDataset.shuffle` does: fill it, permute it, and release one half.

    `state` holds all that changes, as plain values. A `size` of 1 keeps the order.
    """

    def __init__(self, state: dict[str, Any], size: int, seed: Sequence[int]):
        self.state, self.size, self.seed = state, size, seed
        if not state:
            state |= {"kept": [], "ready": [], "characters": 0, "released": 0, "ended": False}

    def draw(self, refill: Callable[[], list[Any] | None]) -> Any:
        """Return the next item, None after the last one. `refill` returns further items, None if there are no more."""
        state = self.state
        while not state["ready"]:
            items = None if state["ended"] else refill()
            state["ended"] = items is None
            state["kept"].extend(items or ())
            state["characters"] += sum(len(item) for item in items or () if isinstance(item, str))
            full = len(state["kept"]) >= self.size or state["characters"] > _BUFFER_CHARACTERS
            if items is None and not state["kept"]:
                return None
            if items is None or full:
                self._release(0 if items is None else self.size // 2)
        return state["ready"].pop()

    def _release(self, stay: int) -> None:
        kept = self.state["kept"]
        if self.size > 1:
            order = np.random.default_rng([*self.seed, self.state["released"]]).permutation(len(kept))
            kept = [kept[index] for index in order]
        stay = min(stay, len(kept) // 2)
        self.state |= {"kept": kept[:stay], "ready": kept[stay:][::-1], "released": self.state["released"] + 1}
        self.state["characters"] = sum(len(item) for item in kept[:stay] if isinstance(item, str))


class PackedRows(StreamPart):
    """Rows that are packed from documents.

    Documents, the passages that `cut` makes of each, and the rows that `join` makes of `batch_size` passages each pass
    through a shuffle buffer.

    Args:
        ex_iterable: Documents with a "text".
        cut, join: Functions from a document to passages, and from passages to rows of ids.
        batch_size: Passages to join.
        sizes: Of the buffers of documents, passages and rows.
        features: Types of the rows.
        seed: Seed of the buffers; further numbers are those of epochs and workers.
    """

    is_typed = True

    def __init__(
        self,
        ex_iterable: Any,
        cut: Callable[[str | None], list[str]],
        join: Callable[[list[str]], list[list[int]]],
        batch_size: int,
        sizes: tuple[int, int, int],
        features: Features,
        seed: Sequence[int],
    ):
        super().__init__(ex_iterable)
        self._features, self.seed = features, tuple(seed)
        self.cut, self.join, self.batch_size, self.sizes = cut, join, batch_size, sizes

    @property
    def features(self) -> Features:
        """Types of the rows."""
        return self._features

    def _init_state_dict(self) -> dict[str, Any]:
        self._state_dict: dict[str, Any] = {
            "source": self.ex_iterable._init_state_dict(),
            # None where `load_state_dict` puts a list or a dict of any length.
            **dict.fromkeys(("documents", "passages", "batch", "rows")),
            "type": type(self).__name__,
        }
        return self._state_dict

    def __iter__(self) -> Iterator[tuple[str, dict[str, list[int]]]]:
        state: dict[str, Any] = self._state_dict or self._init_state_dict()
        state["batch"] = state["batch"] or []
        texts, buffers = (row.get("text") or "" for _, row in self.ex_iterable), []
        for place, (name, size) in enumerate(zip(("documents", "passages", "rows"), self.sizes, strict=True)):
            state[name] = state[name] or {}
            buffers.append(ShuffleBuffer(state[name], size, (*self.seed, place)))
        documents, passages, rows = buffers

        def text() -> list[str] | None:
            found = next(texts, None)
            return None if found is None else [found]

        def cut() -> list[str] | None:
            document = documents.draw(text)
            return None if document is None else self.cut(document)

        def join() -> list[list[int]] | None:
            batch = state["batch"]  # kept there, since the source may fail before it is full
            while len(batch) < self.batch_size and (passage := passages.draw(cut)) is not None:
                batch.append(passage)
            state["batch"] = []
            return self.join(batch) if batch else None

        while (row := rows.draw(join)) is not None:
            yield "row", {"input_ids": row}

    def _with(self, ex_iterable: Any, seed: Sequence[int] = ()) -> "PackedRows":
        return PackedRows(
            ex_iterable, self.cut, self.join, self.batch_size, self.sizes, self._features, (*self.seed, *seed)
        )

    def shift_rngs(self, value: int) -> "PackedRows":
        """Return the same documents in another order, that of an epoch or a worker."""
        return self._with(self.ex_iterable, (value,))


def may_pass(error: BaseException | None) -> bool:
    """Return whether reading again may help: a connection, a disk or a download failed rather than a file's content."""
    while error is not None:
        # By name: the Hub's client has errors of httpx or httpx2, fsspec those of aiohttp.
        broken = {"TransportError", "ClientError"} & {kind.__name__ for kind in type(error).__mro__}
        if broken or isinstance(error, OSError | EOFError | pa.ArrowException):
            return True
        error = error.__cause__ or error.__context__
    return False

"""The `datasets` builder of local files. It reads them elsewhere: `datasets` replaces `open` in a builder's module."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets import ArrowBasedBuilder, BuilderConfig, DatasetInfo, Features, SplitGenerator, Value

from .readers import read_tables


@dataclass
class LocalTextConfig(BuilderConfig):
    """The files, each a tuple of path, size and time of its last change, and what to read of them."""

    files: tuple[tuple[str, int, int], ...] = ()
    text_column: str = "text"
    keep: tuple[str, ...] = ()
    chat: bool = False


def features_of(keep: Sequence[str]) -> Features:
    """Return the types of the rows of local files: "text" and the columns of `keep`, all of them strings."""
    return Features({column: Value("string") for column in ("text", *keep)})


def read_rows_from(
    path: str, start: int, text_column: str, keep: Sequence[str], chat: bool
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file but the first `start`."""
    for table in read_tables(path, text_column, keep, chat, start):
        yield from table.to_pylist()


class LocalText(ArrowBasedBuilder):
    """Rows of strings, "text" and the columns of `keep`."""

    VERSION = "1.1.0"  # raise it when files are read differently, since the cache keeps what was read
    BUILDER_CONFIG_CLASS = LocalTextConfig

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=features_of(self.config.keep))

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        return [SplitGenerator("train", gen_kwargs={"files": [path for path, *_ in self.config.files]})]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[tuple[int, int], pa.Table]]:
        asked = (self.config.text_column, self.config.keep, self.config.chat)
        for shard, path in enumerate(files):
            for number, table in enumerate(read_tables(path, *asked)):
                yield (shard, number), table

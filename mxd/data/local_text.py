"""The `datasets` builder of local files. It reads them elsewhere: `datasets` replaces `open` in a builder's module."""

from collections.abc import Iterator
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


class LocalText(ArrowBasedBuilder):
    """Rows of strings, "text" and the columns of `keep`. A file is a shard of the stream."""

    VERSION = "1.1.0"  # raise it when files are read differently, since the cache keeps what was read
    BUILDER_CONFIG_CLASS = LocalTextConfig

    def _info(self) -> DatasetInfo:
        columns = ["text", *self.config.keep]
        return DatasetInfo(features=Features({column: Value("string") for column in columns}))

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        return [SplitGenerator("train", gen_kwargs={"files": [path for path, *_ in self.config.files]})]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[tuple[int, int], pa.Table]]:
        asked = (self.config.text_column, self.config.keep, self.config.chat)
        for shard, path in enumerate(files):
            for number, table in enumerate(read_tables(path, *asked)):
                yield (shard, number), table

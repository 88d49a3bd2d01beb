"""Read text from one local file as tables of strings: the columns that are asked for and no others.

Every format gives the same text: an encoding is recognised by its byte order mark, csv values are never numbers, and
numbers of JSON keep their spelling.
"""

import bisect
import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from mxd.data_files import split_ending

MESSAGES = "messages"
"""Column of chats, if no other is named."""
CHAT = "\0chat\0"
"""Start of a document that is a chat; the JSON of its messages follows, or of its templated text."""
_ROWS, _CHARACTERS = 1000, 1 << 22  # bounds of a table
_PARQUET_ROWS = 100
# The first two bytes of a UTF-32 mark are a UTF-16 mark.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
Columns = Mapping[str, Sequence[Any] | pa.Array]


class DataError(ValueError):
    """Text cannot be found, read or packed; the message names the source and the remedy."""


class _Number(str):
    """A number of JSON as it is spelled."""


def read_tables(
    path: str, text_column: str, keep: Sequence[str] = (), chat: bool = False, start: int = 0
) -> Iterator[pa.Table]:
    """Read a file as tables of the columns "text" and `keep`, all of them strings, without its first `start` rows.

    Raises:
        DataError: The file cannot be read, lacks a column, or `text_column` holds something other than text. The
            message names the file and, where there is one, the row (counted from 1).
    """
    reader, kind = _reader(path)
    text_column = "text" if kind == "text" else text_column
    name, row = describe(path), start + 1
    try:
        for column, columns in _with_text(partial(reader, start=start), path, text_column, keep, chat):
            found = {"text": _text(columns[column], column, name, row, chat)}
            found |= {column: as_strings(columns[column]) for column in keep}
            table = pa.table(found, schema=pa.schema(dict.fromkeys(found, pa.string())))
            yield table
            row += len(table)
    except MissingColumnError as missing:
        raise DataError(f"{name} {missing}") from None
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {name}: {_undecodable(path, error)}") from error
    except Exception as error:  # each format and compression has its own errors
        raise DataError(f"cannot read {name}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip().split("\n", 1)[0] or type(error).__name__)[:300]


def describe(path: str) -> str:
    """Return a file's kind and path, for messages."""
    return f"{_reader(path)[1]} file {path}"


def _reader(path: str) -> tuple[Any, str]:
    """Return the reader of a file, and its kind; a file of no other kind is one document."""
    return _READERS.get(split_ending(path)[0], (_read_document, "text"))


class MissingColumnError(Exception):
    """The message follows the file's name."""


def check_columns(columns: Iterable[str], text_column: str, keep: Sequence[str]) -> None:
    """Raise if columns that are asked for are missing; the message lacks the name of the source."""
    known = list(columns)
    shown = ", ".join(known)
    if text_column not in known:
        raise MissingColumnError(f"has no column {text_column!r}; set text_column to one of {shown}")
    if missing := [column for column in keep if column not in known]:
        raise MissingColumnError(f"has no column {missing[0]!r}, only {shown}")


def _with_text(
    reader: Any, path: str, text_column: str, keep: Sequence[str], chat: bool
) -> Iterator[tuple[str, Columns]]:
    """Yield the text column's name and the columns; it is `MESSAGES` if that is there and `text_column` is not."""
    reason: MissingColumnError | None = None
    for column in (MESSAGES, text_column) if chat else (text_column, MESSAGES):
        try:
            for columns in reader(path, column, keep):
                yield column, columns
            return
        except MissingColumnError as missing:  # before the first rows
            reason = missing if column == text_column else reason
    assert reason is not None
    raise reason


def chat_document(chat: Any, templated: bool = False) -> Any:
    """Return a list of messages, or `templated` text, as a document that is a chat; any other value as it is."""
    if isinstance(chat, list) and all(isinstance(one, dict) and "role" in one for one in chat):
        # Columns of structures have every key in every message; in JSON their order differs between copies of a chat.
        messages = [{key: one[key] for key in sorted(one) if one[key] is not None} for one in chat]
        # As it is written: the characters of control tokens may be no ASCII.
        return CHAT + json.dumps(messages, ensure_ascii=False) if messages else None
    return CHAT + json.dumps(chat) if templated and isinstance(chat, str) and not isinstance(chat, _Number) else chat


def _text(values: Sequence[Any] | pa.Array, column: str, name: str, row: int, chat: bool) -> pa.Array:
    if isinstance(values, pa.Array):
        if _holds_text(values.type) and not chat:
            return values.cast(pa.string())
        values = values.to_pylist()
    values = [chat_document(value, chat) for value in values]
    for index, value in enumerate(values):
        if not isinstance(value, str | None) or isinstance(value, _Number):
            kind = type(json.loads(value) if isinstance(value, _Number) else value).__name__
            raise DataError(
                f"column {column!r} of {name} holds {kind}, not text, in row {row + index}; set text_column to another"
            )
    return _strings(values)


def as_strings(values: Sequence[Any] | pa.Array) -> pa.Array:
    """Spell any values as strings; see `spell`."""
    if isinstance(values, pa.Array):
        if _holds_text(values.type):
            return values.cast(pa.string())
        values = values.to_pylist()
    return _strings([spell(value) for value in values])


def _strings(values: list[str | None]) -> pa.Array:
    """Return strings as an array. Half of a surrogate pair, which JSON can spell, becomes U+FFFD."""
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        whole = [one and one.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for one in values]
        return pa.array(whole, pa.string())


def spell(value: Any) -> str | None:
    """Spell a value as text; None for a missing one. Whole numbers have no point, as tables with gaps add one."""
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return None if value is None else str(value)


def _holds_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


# --- files as bytes and as characters


def _open(path: str) -> Any:
    packed = split_ending(path)[1]
    if packed == ".zst":
        if not pa.Codec.is_available("zstd"):
            raise ValueError("this pyarrow cannot decompress zstd: decompress the file, or install another pyarrow")
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(path, "rb"), "zstd"))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(packed, open)(path, "rb")


def _open_text(path: str, newline: str | None = None) -> io.TextIOWrapper:
    stream = _open(path)
    head = stream.peek(1024)[:1024]
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "")
    zeros = [head[place::2].count(0) for place in (0, 1)]
    if not encoding and min(zeros) == 0 and max(zeros) > max(1, len(head) / 32):  # of ASCII, or of letters and spaces
        raise ValueError("it looks like UTF-16 without a byte order mark: save it as UTF-8, or with the mark")
    encoding = encoding or "utf-8"
    return io.TextIOWrapper(stream, encoding=encoding, newline=newline)


def _undecodable(path: str, error: UnicodeDecodeError) -> str:
    """Describe the first bytes that are no text; the offset of the error itself counts from some buffer's start."""
    with _open_text(path) as text:
        decoder, start = codecs.getincrementaldecoder(text.encoding)(), 0
        while chunk := bytes(text.buffer.read(1 << 20)):
            kept = len(decoder.getstate()[0])  # of the chunk before
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as found:
                start, error = start - kept + found.start, found
                break
            start += len(chunk)
    return (
        f"{text.encoding!r} codec can't decode byte 0x{error.object[error.start]:02x} at byte {start} "
        f"({error.reason}); save it as UTF-8, or as UTF-16 with a byte order mark"
    )


# --- formats


def _read_parquet(path: str, text_column: str, keep: Sequence[str], start: int) -> Iterator[Columns]:
    with pq.ParquetFile(_random_access(path)) as file:
        check_columns(file.schema_arrow.names, text_column, keep)
        counts = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        ends = list(itertools.accumulate(counts))
        first = bisect.bisect_right(ends, start)  # groups before it are not read
        groups, columns = list(range(first, len(ends))), [text_column, *keep]
        batches = file.iter_batches(_PARQUET_ROWS, groups, columns=columns, use_threads=False)
        batches = _after(batches, start - (ends[first - 1] if first else 0))
        yield from _named_classes(batches, file.schema_arrow, keep)


def _read_arrow(path: str, text_column: str, keep: Sequence[str], start: int) -> Iterator[Columns]:
    source = _random_access(path)
    try:
        file = pa.ipc.open_file(source)
        batches: Iterable[pa.RecordBatch] = map(file.get_batch, range(file.num_record_batches))
    except pa.ArrowInvalid:  # datasets writes the other kind
        source.seek(0)
        batches = file = pa.ipc.open_stream(source)
    check_columns(file.schema.names, text_column, keep)
    yield from _named_classes(_after(batches, start), file.schema, keep)


def _after(batches: Iterable[pa.RecordBatch], start: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of batches but the first `start`."""
    for batch in batches:
        if start < len(batch):
            yield batch.slice(start)
        start = max(0, start - len(batch))


def _random_access(path: str) -> Any:
    return pa.BufferReader(_open(path).read()) if split_ending(path)[1] else pa.memory_map(path)


def _named_classes(batches: Iterable[pa.RecordBatch], schema: pa.Schema, keep: Sequence[str]) -> Iterator[Columns]:
    """Yield the columns of batches, numbers of a `ClassLabel` by their names."""
    features = Features.from_arrow_schema(pa.schema([schema.field(name) for name in keep], metadata=schema.metadata))
    classes = {name: feature for name, feature in features.items() if isinstance(feature, ClassLabel)}
    for batch in batches:
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        yield columns | {name: class_names(columns[name].to_pylist(), classes[name]) for name in classes}


def class_names(values: Iterable[int | None], feature: ClassLabel) -> list[str | None]:
    """Return the names of a `ClassLabel`'s numbers; None for a missing one, or -1."""
    return [feature.int2str(value) if value is not None and value >= 0 else None for value in values]


def _read_json(path: str, text_column: str, keep: Sequence[str], start: int) -> Iterator[Columns]:
    with _open_text(path) as text:
        yield from _in_batches(_json_rows(text, start), text_column, keep, start)


def _json_rows(text: io.TextIOWrapper, start: int) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of JSON lines, of a list, or one after the other however they are laid out."""
    values = (one for value in _json_values(text, start) for one in (value if isinstance(value, list) else [value]))
    for row, value in enumerate(values, 1):
        if isinstance(value, dict):
            yield value
        elif isinstance(value, str) and not isinstance(value, _Number):
            yield {"text": value}
        else:
            raise ValueError(f"row {row} is {spell(value)!s:.40}, no object with columns")


def _json_values(text: io.TextIOWrapper, start: int) -> Iterator[Any]:
    """Yield the values; in place of a line before row `start`, after the first ones, an object that was not decoded."""
    decoder = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=lambda _: None)
    first, rows = True, 0
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        if _ROWS <= rows < start and line.startswith(("{", '"')):
            rows += 1
            yield {}
            continue
        try:
            value = decoder.decode(line)
        except json.JSONDecodeError as error:
            if first:  # no JSON lines: values are laid out over several lines
                break
            what = error.msg.removesuffix(" at")
            raise ValueError(f"line {number} is no JSON: {what} at character {error.pos + 1}") from None
        yield value
        first, rows = False, rows + (len(value) if isinstance(value, list) else 1)
    else:
        return
    rest, place = (line + text.read()).strip(), 0
    while place < len(rest):
        value, place = decoder.raw_decode(rest, place)
        yield value
        while rest[place : place + 1].isspace():
            place += 1


def _read_csv(path: str, text_column: str, keep: Sequence[str], start: int) -> Iterator[Columns]:
    with _open_text(path, newline="") as text:
        rows = _csv_rows(text, "\t" if split_ending(path)[0] == ".tsv" else ",")
        yield from _in_batches(rows, text_column, keep, start)


def _csv_rows(text: io.TextIOWrapper, delimiter: str) -> Iterator[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)  # a document may be of any length
    ended: list[None] = []
    rows = csv.reader(itertools.chain(text, _note_end(ended)), delimiter=delimiter)
    header = next(rows, [])
    places = {name: header.index(name) for name in header}  # of two columns of a name the first
    for number, row in enumerate(filter(None, rows), 1):
        if ended:
            raise ValueError(f"row {number} opens a quotation mark that is never closed")
        if len(row) > len(header):
            raise ValueError(f"row {number} has {len(row)} values for {len(header)} columns")
        yield {name: row[place] for name, place in places.items() if place < len(row)}


def _note_end(ended: list[None]) -> Iterator[str]:
    """Yield nothing, and note that the lines before are used up."""
    ended.append(None)
    yield from ()


def _read_document(path: str, text_column: str, keep: Sequence[str], start: int) -> Iterator[Columns]:
    if start == 0:
        with _open_text(path) as text:
            yield from _in_batches([{"text": text.read()}], text_column, keep, start)


def _in_batches(
    rows: Iterable[Mapping[str, Any]], text_column: str, keep: Sequence[str], start: int
) -> Iterator[Columns]:
    """Collect the columns of the rows after the first `start`, which may lack some, but not all rows up to the end of
    the first batch."""
    columns = (text_column, *keep)
    names: dict[str, None] | None = {}
    batch: list[list[Any]] = []
    size = 0
    for index, row in enumerate(itertools.chain(rows, [None])):
        if row is not None:
            if names is not None:
                names.update(dict.fromkeys(row))
            if index < start:
                continue
            batch.append([row.get(column) for column in columns])
            size += len(str(batch[-1][0]))
        if batch and (row is None or len(batch) == _ROWS or size > _CHARACTERS):
            if names is not None:
                check_columns(names, text_column, keep)
            yield dict(zip(columns, zip(*batch, strict=True), strict=True))
            batch, names, size = [], None, 0


_READERS = {
    ".parquet": (_read_parquet, "parquet"),
    ".arrow": (_read_arrow, "arrow"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), (_read_json, "json")),
    **dict.fromkeys((".csv", ".tsv"), (_read_csv, "csv")),
}

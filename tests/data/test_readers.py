"""Local files of every format, encoding and compression give the same text, and only the columns that are asked for."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from mxd.data import local_text
from mxd.data.documents import DataError, load_text
from mxd.data.labelled_text import load_labelled_text
from mxd.data.readers import CHAT

pytestmark = pytest.mark.usefixtures("private_cache")

TABLES = ["parquet", "arrow", "jsonl", "ndjson", "json", "csv", "tsv"]
COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}
streamed = pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])


def encode_rows(rows, ending):
    """The bytes of a file of rows, in which a value of None is left out."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if ending in ("parquet", "arrow"):
        sink = pa.BufferOutputStream()
        table = pa.table({name: [row.get(name) for row in rows] for name in columns})
        pq.write_table(table, sink) if ending == "parquet" else pyarrow.feather.write_feather(table, sink)
        return sink.getvalue().to_pybytes()
    if ending in ("csv", "tsv"):
        cells = [columns, *([str(row.get(name, "")) for name in columns] for row in rows)]
        return "".join(("," if ending == "csv" else "\t").join(row) + "\n" for row in cells).encode()
    if ending == "json":
        return json.dumps(rows, indent=1).encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, rows):
    path.write_bytes(encode_rows(rows, path.name.split(".")[1]))
    return str(path)


def read(source, streaming=False, **how):
    return list(load_text(source, streaming=streaming, **how))


# --- columns


@streamed
@pytest.mark.parametrize("ending", TABLES)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"more": "x"}),
        ({"more": "x"}, {}),
        ({"more": 1}, {"more": "x"}),
        ({"more": "2024-01-01"}, {"more": 1.5}),
        ({"meta": "x", "more": True}, {"other": 2}),
    ],
)
def test_columns_that_nobody_asked_for_may_differ(tmp_path, ending, first, second, streaming):
    for name, extra in enumerate((first, second)):
        write(tmp_path / f"{name}.{ending}", [{"text": f"of file {name}", **extra}, {"text": "", **extra}])
    texts = [row["text"] for row in read(str(tmp_path), streaming)]
    assert [text for text in texts if text] == ["of file 0", "of file 1"]


@streamed
@pytest.mark.parametrize("ending", ["parquet", "arrow", "jsonl", "json"])
def test_nested_columns_may_differ(tmp_path, ending, streaming):
    for name, extra in enumerate(([1], [{"a": 1}], {"a": [1.5]}, {"b": "x"})):
        write(tmp_path / f"{name}.{ending}", [{"text": f"of file {name}", "more": extra}])
    assert [row["text"] for row in read(str(tmp_path), streaming)] == [f"of file {name}" for name in range(4)]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_a_large_column_that_nobody_asked_for_is_not_cached(tmp_path, ending):
    write(tmp_path / f"a.{ending}", [{"text": "a text", "more": "x" * 5_000_000}])
    documents = load_text(str(tmp_path / f"a.{ending}"))
    assert list(documents) == [{"text": "a text"}]
    assert documents.dataset_size < 1000
    assert sum(file.stat().st_size for file in (tmp_path / ".cache").rglob("*") if file.is_file()) < 100_000


@streamed
@pytest.mark.parametrize("ending", ["parquet", "arrow", "jsonl", "json"])
def test_another_type_of_the_text_is_named_with_file_and_row(tmp_path, ending, streaming):
    first = write(tmp_path / f"a.{ending}", [{"text": "one"}, {"text": None}])
    second = write(tmp_path / f"b.{ending}", [{"text": 7}])
    with pytest.raises(DataError, match=rf"column 'text' of .*b\.{ending} holds int, not text, in row 1"):
        read([first, second], streaming)


@streamed
@pytest.mark.parametrize("ending", TABLES)
def test_a_file_without_the_text_is_named(tmp_path, ending, streaming):
    first = write(tmp_path / f"a.{ending}", [{"text": "one", "n": 1}])
    second = write(tmp_path / f"b.{ending}", [{"body": "two", "n": 1}])
    with pytest.raises(DataError, match=rf"b\.{ending} has no column 'text'; set text_column to one of body, n"):
        read([first, second], streaming)


def test_a_wrong_row_of_json_lines_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "one"}] * 1500 + [{"text": ["two"]}])
    with pytest.raises(DataError, match=r"a\.jsonl holds list, not text, in row 1501"):
        read(path)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"\n')
    with pytest.raises(DataError, match=r"cannot read json file .*b\.jsonl: line 3 is no JSON"):
        read(str(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl").write_text("7\n")
    with pytest.raises(DataError, match=r"c\.jsonl: row 1 is 7, no object"):
        read(str(tmp_path / "c.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,n\n"never closed,1\nb,2\n', "row 1 opens a quotation mark that is never closed"),
        ("text,n\na,1\nb, and c,2\n", "row 2 has 3 values for 2 columns"),
    ],
)
def test_a_broken_csv_is_named(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=rf"cannot read csv file .*a\.csv: {message}"):
        read(str(tmp_path / "a.csv"))


def test_csv_of_all_kinds(tmp_path):
    (tmp_path / "a.csv").write_text('n,text,text\r\n1,"two ""lines""\r\nhere",x\r\n\r\n2\r\n3,' + "y" * 200_000)
    assert read(str(tmp_path / "a.csv")) == [{"text": 'two "lines"\r\nhere'}, {"text": None}, {"text": "y" * 200_000}]


@pytest.mark.parametrize(
    "content",
    ['["a", "b"]', '{"text": "a"}\n["b"]', '{\n "text": "a"\n}\n{"text": "b"}', '[{"text":\n"a"},{"text":"b"}]'],
)
def test_json_of_all_kinds(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert read(str(tmp_path / "a.json")) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_half_of_a_surrogate_pair_is_replaced(tmp_path, ending):
    write(tmp_path / f"a.{ending}", [{"text": "a \ud800 b", "kind": "\ude00"}, {"text": "\ud83d\ude00", "kind": None}])
    expected = [{"text": "a \ufffd b", "kind": "\ufffd"}, {"text": "\U0001f600", "kind": None}]
    assert read(str(tmp_path / f"a.{ending}"), keep=["kind"]) == expected
    write(tmp_path / f"b.{ending}", [{"messages": [{"role": "user", "content": "a \ud800"}]}])
    assert "a \ufffd" in read(str(tmp_path / f"b.{ending}"))[0]["text"]


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "one"}])
    assert read(path) == [{"text": "one"}]
    write(tmp_path / "a.jsonl", [{"text": "another"}])
    assert read(path) == [{"text": "another"}]


def test_streams_are_lazy_sharded_and_resumable(tmp_path, monkeypatch):
    for name in range(3):
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {row}"} for row in range(60)])
    opened, read_tables = [], local_text.read_tables
    monkeypatch.setattr(local_text, "read_tables", lambda path, *how: opened.append(path) or read_tables(path, *how))
    stream = load_text(str(tmp_path), streaming=True)
    assert stream.num_shards == 3 and stream.column_names == ["text"]
    rows = iter(stream)
    first = [next(rows)["text"] for _ in range(5)]
    assert len(opened) == 2
    state = stream.state_dict()
    rest = [row["text"] for row in rows]
    assert first + rest == [f"{name} {row}" for name in range(3) for row in range(60)]
    assert len(opened) == 3
    stream.load_state_dict(state)
    assert [row["text"] for row in stream] == rest


# --- compression and encoding


@streamed
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("ending", [*TABLES, "txt", "md"])
def test_compressed_files(tmp_path, ending, compression, streaming):
    content = b"a text" if ending in ("txt", "md") else encode_rows([{"text": "a text", "n": 1}], ending)
    path = tmp_path / f"a.{ending}.{compression}"
    path.write_bytes(COMPRESS[compression](content))
    assert read(str(path), streaming) == [{"text": "a text"}]
    (tmp_path / "b.txt").write_text("b text")
    assert [row["text"] for row in read(str(tmp_path), streaming)] == ["a text", "b text"]
    path.write_bytes(COMPRESS[compression](content)[:-5])
    with pytest.raises(DataError, match=rf"cannot read .* file .*a\.{ending}\.{compression}: "):
        read(str(path), streaming)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "txt", "csv.gz"])
def test_encodings_are_alike_in_all_formats(tmp_path, ending, encoding):
    text, kind = "ein schöner Text – 国家", ending.split(".")[0]
    rows = [{"text": text, "n": 1}]
    content = text if kind == "txt" else json.dumps(rows[0], ensure_ascii=False) if "json" in kind else None
    content = encode_rows(rows, kind).decode() if content is None else content
    data = content.encode(encoding)
    (tmp_path / f"a.{ending}").write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    assert read(str(tmp_path / f"a.{ending}")) == [{"text": text}]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("words", ["It was the best of times", "Это было лучшее из времён", "x"])
@pytest.mark.parametrize("ending", ["txt", "md", "jsonl", "csv", "tsv", "txt.gz"])
def test_utf_16_without_a_mark_is_named(tmp_path, ending, words, encoding):
    path, quoted = tmp_path / f"a.{ending}", json.dumps({"text": words}, ensure_ascii=False)
    content = (quoted if ending == "jsonl" else f"text\n{words}\n").encode(encoding)
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    with pytest.raises(DataError, match=rf"{path}.*UTF-16 without a byte order mark: save it as UTF-8"):
        read(str(path))


@pytest.mark.parametrize("text", ["a\0bc", "words " * 40 + "\0", "ab\0" * 9])
def test_zeros_in_other_text_are_kept(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read(str(tmp_path / "a.txt")) == [{"text": text}]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_copies_of_a_chat_are_one_document_whatever_the_order_of_keys(tmp_path, ending):
    one = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]
    other = [dict(reversed(message.items())) for message in one]
    write(tmp_path / f"a.{ending}", [{"messages": one}])
    write(tmp_path / f"b.{ending}", [{"messages": other}])
    first, second = read(str(tmp_path))
    assert first == second and first["text"].startswith(CHAT)
    assert json.loads(first["text"].removeprefix(CHAT)) == one


@streamed
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "txt", "txt.gz"])
def test_what_is_no_text_is_named_with_its_place(tmp_path, ending, streaming):
    start = {"jsonl": '{"text": "', "json": '[{"text": "', "csv": "text\n"}.get(ending, "")
    data = start.encode() + b"x" * 100_000 + "é".encode("latin-1") + b"y" * 100
    (tmp_path / f"a.{ending}").write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    place = rf"a\.{ending}: 'utf-8' codec can't decode byte 0xe9 at byte {len(start) + 100_000} "
    with pytest.raises(DataError, match=place + r".*save it as UTF-8"):
        read(str(tmp_path / f"a.{ending}"), streaming)


# --- labels


@streamed
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_labels_are_text(tmp_path, ending, streaming):
    labels = ["NA", "None", "null", "nan", "007", "7", "1", "1.0", "1e3", "True", "-"]
    path = write(tmp_path / f"a.{ending}", [{"text": "x", "kind": label} for label in labels])
    assert [row["kind"] for row in read(path, streaming, keep=["kind"])] == labels
    assert load_labelled_text(path, label_column="kind").labels.tolist() == labels


@pytest.mark.parametrize(
    ("ending", "values", "spelled"),
    [
        ("parquet", [1, 20, None], ["1", "20", None]),
        ("parquet", [1.0, 2.5, float("nan")], ["1", "2.5", None]),
        ("arrow", [True, False, None], ["True", "False", None]),
        ("jsonl", [1, 2.50, None], ["1", "2.5", None]),
        ("json", [["a"], {"b": 1}, True], ['["a"]', '{"b": "1"}', "True"]),
        ("csv", ["1", "2.50", ""], ["1", "2.50", ""]),
    ],
)
def test_other_values_are_spelled(tmp_path, ending, values, spelled):
    path = write(tmp_path / f"a.{ending}", [{"text": "x", "kind": value} for value in values])
    assert [row["kind"] for row in read(path, keep=["kind"])] == spelled


def test_numbers_of_json_keep_their_spelling(tmp_path):
    spelled = ["1.50", "1e3", "-0", "12345678901234567890"]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "x", "kind": {number}}}\n' for number in spelled))
    assert [row["kind"] for row in read(str(tmp_path / "a.jsonl"), keep=["kind"])] == spelled


@pytest.mark.parametrize("saved", ["parquet", "folder"])
def test_a_class_label_keeps_its_names(tmp_path, saved):
    features = Features({"text": Value("large_string"), "kind": ClassLabel(names=["World", "Sports"])})
    rows = Dataset.from_dict({"text": ["x", "y", "z"], "kind": [1, 0, -1]}, features=features)
    rows.to_parquet(tmp_path / "a.parquet") if saved == "parquet" else rows.save_to_disk(tmp_path / "folder")
    source = str(tmp_path / ("a.parquet" if saved == "parquet" else "folder"))
    assert [row["kind"] for row in read(source, keep=["kind"])] == ["Sports", "World", None]


def test_skipped_files_are_named(tmp_path, caplog):
    for name in ("a.txt", "b.log", "c.jsonl.lz4", "state.json", ".hidden.log"):
        (tmp_path / name).write_text("a text")
    (tmp_path / "d.txt").symlink_to(tmp_path / "nothing")
    for source in (str(tmp_path), f"{tmp_path}/*"):
        caplog.clear()
        assert [row["text"] for row in read([source])][:1] == ["a text"]
        skipped = ", ".join(str(tmp_path / name) for name in ("b.log", "c.jsonl.lz4", "d.txt"))
        assert f"not read: {skipped}; files are read that end in .parquet" in caplog.text

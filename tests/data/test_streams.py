"""Rows of streams go on where they were: in a new process, in any epoch, and after the stream failed."""

import json
from collections import Counter
from itertools import islice

import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset
from text_cases import documents, ids_of, texts, to_json, write

from mxd.data import streams
from mxd.data.documents import START_ROWS, DataError, load_text, split_documents
from mxd.data.local_text import read_rows_from
from mxd.data.packing import pack

pytestmark = pytest.mark.usefixtures("private_cache")

ENDINGS = ["parquet", "arrow", "jsonl", "json", "csv", "tsv", "jsonl.gz", "txt"]


def counted(dataset, read):
    """Note every row of a stream as it is read."""

    def note(row):
        read.append(row["text"])
        return row

    return dataset.map(note)


def resumed(make, at):
    """Return all rows, and those from `at` on of a new dataset that loads the state of another one."""
    whole = ids_of(make())
    first = make()
    rows = iter(first)
    before = [next(rows)["input_ids"] for _ in range(at)]
    assert before == whole[:at]
    state = json.loads(json.dumps(first.state_dict()))
    second = make()
    second.load_state_dict(state)
    return whole[at:], ids_of(second)


@pytest.mark.parametrize("at", [0, 1, 37])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_stream_goes_on_where_it_was(tmp_path, tokenizer, ending, at):
    source = write(tmp_path / "text", ending)
    left, found = resumed(lambda: pack(load_text(source, streaming=True), tokenizer, 16, seed=3, buffer_size=20), at)
    assert found == left and len(left) > 30


def rows_of(shards):
    yield from ({"text": text} for shard in shards for text in shard)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", ["map-style", "generator", "split", "taken", "chats"])
def test_rows_go_on_whatever_the_documents_are(tmp_path, tokenizer, kind, shuffle):
    def make():
        if kind == "map-style":
            source = documents(150)
        elif kind == "generator":
            shards = [texts(40), texts(30), texts(50)]
            source = IterableDataset.from_generator(rows_of, gen_kwargs={"shards": shards})
        elif kind == "split":
            source = split_documents(load_text(write_once(tmp_path), streaming=True), 0.3, seed=1)[0]
        elif kind == "taken":
            source = load_text(write_once(tmp_path), streaming=True).take(70)
        else:
            chats = [[{"role": "user", "content": text}] for text in texts(60)]
            source = Dataset.from_dict({"messages": chats}).to_iterable_dataset()
            tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        return pack(source, tokenizer, 16, seed=3, buffer_size=10, shuffle=shuffle)

    left, found = resumed(make, 21)
    assert found == left and len(left) > 30


def write_once(folder):
    return str(folder / "text") if (folder / "text").exists() else write(folder / "text", "jsonl")


@pytest.mark.parametrize("at", [5, 90, 200, 333])
def test_repeated_rows_go_on_in_any_epoch(tokenizer, at):
    def make():
        return pack(documents(30).to_iterable_dataset(3), tokenizer, 16, buffer_size=10, repeat=True)

    rows = list(islice(make(), 400))
    once = ids_of(pack(documents(30).to_iterable_dataset(3), tokenizer, 16, buffer_size=10))
    assert len(once) < 100
    first = make()
    assert [row["input_ids"] for row in islice(first, at)] == [row["input_ids"] for row in rows[:at]]
    second = make()
    second.load_state_dict(first.state_dict())
    assert list(islice(second, 400 - at)) == rows[at:]


def test_the_state_of_another_epoch_is_that_of_its_order(tokenizer):
    def make(epoch):
        rows = pack(documents(90).to_iterable_dataset(3), tokenizer, 16, buffer_size=10)
        rows.set_epoch(epoch)
        return rows

    assert ids_of(make(0)) != ids_of(make(1)) != ids_of(make(2))
    left, found = resumed(lambda: make(2), 25)
    assert found == left


@pytest.mark.parametrize("at", [40, 600])
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_no_document_is_read_again(tmp_path, tokenizer, monkeypatch, ending, at):
    source, read = write(tmp_path / "text", ending, per_file=100), []

    def noted(path, start, *how, **named):
        for row in read_rows_from(path, start, *how, **named):
            read.append(row["text"])
            yield row

    monkeypatch.setattr("mxd.data.documents.read_rows_from", noted)

    def make():
        read.clear()
        return pack(load_text(source, streaming=True, in_turn=True), tokenizer, 16, seed=3, buffer_size=20)

    first = make()
    assert len(read) == START_ROWS
    list(islice(first, at))
    before, state = list(read), first.state_dict()
    assert (len(before) == START_ROWS) == (at == 40)
    second = make()
    assert read == before[:START_ROWS]  # the checks
    second.load_state_dict(state)
    assert len(list(second)) > 100
    assert Counter(before + read[START_ROWS:]) == Counter(texts(400))


def test_ten_shards_are_read_in_turn(tmp_path, tokenizer):
    read = []
    stream = load_text(write(tmp_path / "text", "jsonl", files=20), streaming=True)
    rows = pack(counted(stream, read), tokenizer, 16, buffer_size=10)
    read.clear()
    next(iter(rows))
    assert len({int(text[1:].split()[0]) // 30 for text in read[:20]}) == 10


@pytest.mark.parametrize("start", [0, 1, 7, 8, 1500, 2500, 2999, 3000, 4000])
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json", "csv"])
def test_files_are_read_from_any_row_on(tmp_path, ending, start):
    path = tmp_path / f"a.{ending}"
    rows = Dataset.from_dict({"text": [f"text {number}" for number in range(3000)]})
    {"parquet": lambda: rows.to_parquet(path, batch_size=700), "csv": lambda: rows.to_csv(path, index=False)}.get(
        ending, lambda: to_json(rows, path)
    )()
    found = [row["text"] for row in read_rows_from(str(path), start, "text", (), False)]
    assert found == rows["text"][:][start:]


# --- failures


class Flaky:
    """Documents whose source fails `times` times at document `at`."""

    def __init__(self, error, at=50, times=3):
        self.error, self.at, self.left = error, at, times

    def __call__(self, shards):
        for shard in shards:
            for number, text in enumerate(shard):
                if number == self.at and self.left:
                    self.left -= 1
                    raise self.error
                yield {"text": text}

    def rows(self, tokenizer):
        stream = IterableDataset.from_generator(self, gen_kwargs={"shards": [texts(80), texts(90)]})
        return pack(stream, tokenizer, 16, buffer_size=10)


@pytest.fixture
def pauses(monkeypatch):
    found = []
    monkeypatch.setattr(streams.time, "sleep", found.append)
    return found


ERRORS = [
    ConnectionError("the network is gone"),
    FileNotFoundError(2, "No such file", "part-7.parquet"),
    TimeoutError("read timed out"),
    EOFError("the archive ends early"),
    pa.ArrowInvalid("Parquet magic bytes not found in footer"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_stream_that_fails_for_a_while_loses_nothing(tokenizer, pauses, caplog, error):
    whole = ids_of(Flaky(error, times=0).rows(tokenizer))
    source = Flaky(error, times=0)
    rows = source.rows(tokenizer)
    source.left = 3
    assert ids_of(rows) == whole
    assert pauses == [1, 2, 4] and "again in 4 s, 3 of 6" in caplog.text


@pytest.mark.parametrize(
    ("error", "tried"), [(ConnectionError("gone"), 6), (ValueError("no text"), 0), (DataError("row 5 is no text"), 0)]
)
def test_a_stream_that_stays_broken_is_given_up_and_goes_on_when_it_is_mended(tokenizer, pauses, error, tried):
    whole = ids_of(Flaky(error, times=0).rows(tokenizer))
    broken = Flaky(error, times=100)
    rows, found = broken.rows(tokenizer), []
    with pytest.raises(type(error)):
        for row in rows:
            found.append(row["input_ids"])
    assert len(pauses) == tried and found
    broken.left = 0
    mended = broken.rows(tokenizer)
    mended.load_state_dict(rows.state_dict())
    assert found + ids_of(mended) == whole

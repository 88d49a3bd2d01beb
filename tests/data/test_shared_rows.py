"""A stream is opened once for the checks, the held-out text, the fingerprint and the training."""

from collections import Counter
from itertools import islice

import pytest
from datasets import Dataset, Features, IterableDataset, Value
from text_cases import document, documents, ids_of, texts, write

from mxd.data import documents as documents_module
from mxd.data import local_text
from mxd.data.documents import DataError, load_text, split_documents
from mxd.data.packing import pack
from mxd.data.provenance import TextOptions, is_held_out, sketch
from mxd.data.texts import evaluation_batches, load_documents
from mxd.trainers.training_rows import TrainingRows

pytestmark = pytest.mark.usefixtures("private_cache")

PER_FILE, ROWS = 100, 1000


class Source:
    """Files, or a Hub dataset of as many shards: which are opened, and which documents are read of them."""

    def __init__(self, monkeypatch):
        self.opened, self.read = [], []
        monkeypatch.setattr(documents_module, "load_dataset", self.load_dataset)
        read_rows_from = local_text.read_rows_from

        def rows(path, start, **how):
            self.opened.append(path)
            for row in read_rows_from(path, start, **how):
                self.read.append(row["text"])
                yield row

        monkeypatch.setattr(documents_module, "read_rows_from", rows)

    def shard(self, shards):
        for shard in shards:
            self.opened.append(shard)
            for number in range(shard * PER_FILE, (shard + 1) * PER_FILE):
                self.read.append(document(number))
                yield {"url": "a", "text": document(number)}

    def load_dataset(self, name, *_, split, **__):
        features = Features({"url": Value("string"), "text": Value("string")}) if name == "typed" else None
        return IterableDataset.from_generator(self.shard, features=features, gen_kwargs={"shards": [*range(4)]})


@pytest.fixture
def source(monkeypatch):
    monkeypatch.setattr("mxd.data.packing.PASSAGES_PER_BATCH", 8)  # of held-out text
    return Source(monkeypatch)


def text_of(tmp_path, kind):
    name = kind if kind in ("typed", "untyped") else write(tmp_path / kind, kind, per_file=PER_FILE)
    return TextOptions(dataset=[name], streaming=True, context_length=16)


def train(text, tokenizer, rows=ROWS, seed=0, state=None):
    """Do what a command does with its text; return the held-out and the training rows, and the training's state."""
    documents, heldout = load_documents(text, seed)
    fingerprint = sketch(text, documents, seed)
    assert is_held_out({}, text, heldout, seed, fingerprint) is not False
    batches = evaluation_batches(heldout, tokenizer, 16, 320)
    training = TrainingRows(pack(documents, tokenizer, 16, seed=seed, buffer_size=50, repeat=True))
    training.start(state)
    measured = list(islice(training.measured(), 50)) if state is None else []
    found = []
    for row in islice(iter(training), rows):
        found.append(row["input_ids"])
        training.release(1)
    assert sketch(text, documents, seed) == fingerprint
    assert [row["input_ids"] for row in measured] == found[: len(measured)]
    return [row for batch in batches for row in batch["input_ids"].tolist()], found, training.state_dict()


@pytest.mark.parametrize("kind", ["json", "jsonl.gz", "csv", "parquet", "arrow", "typed", "untyped"])
def test_a_stream_is_opened_once_and_no_document_read_twice(tmp_path, tokenizer, source, kind):
    text = text_of(tmp_path, kind)
    heldout, found, _ = train(text, tokenizer)
    assert len(source.opened) == len(set(source.opened)) == 4
    assert max(Counter(source.read).values()) == 1
    assert len(heldout) == 20 and len(found) == ROWS
    # Nothing of it is lost to the training, and nothing is on both sides.
    documents, held = load_documents(text, 0)
    sides = [[row["text"] for row in side] for side in (documents, held)]
    assert Counter(sides[0] + sides[1]) == Counter(texts(4 * PER_FILE))
    alone = pack(Dataset.from_dict({"text": sides[0]}).to_iterable_dataset(), tokenizer, 16, shuffle=False)
    once = pack(documents, tokenizer, 16, shuffle=False)
    assert ids_of(once) == ids_of(alone)


def test_a_folder_of_texts_is_opened_once(tmp_path, tokenizer, source):
    text = text_of(tmp_path, "txt")
    train(text, tokenizer, rows=60)
    assert len(source.opened) == len(set(source.opened)) <= 40


@pytest.mark.parametrize("rows", [60, 700], ids=["within the held-out text's", "behind it"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_resumed_training_reads_no_document_again(tmp_path, tokenizer, source, kind, rows):
    text = text_of(tmp_path, kind)
    _, whole, _ = train(text, tokenizer, rows=1000)
    source.opened.clear(), source.read.clear()
    held, first, state = train(text, tokenizer, rows=rows)
    before = set(source.read)
    source.opened.clear(), source.read.clear()
    again, second, _ = train(text, tokenizer, rows=1000 - rows, state=state)
    assert first + second == whole and held == again
    # Its checks and held-out text are read again, and then what was not read.
    checked = next(place for place, one in enumerate(source.read) if one not in before)
    assert set(source.read[:checked]) <= before and before.isdisjoint(source.read[checked:])
    assert len(source.opened) <= 8


def test_a_heldout_dataset_of_its_own_is_opened_once(tmp_path, tokenizer, source):
    text = text_of(tmp_path, "jsonl")
    other = tmp_path / "other.csv"
    Dataset.from_dict({"text": [f"other {text}" for text in texts(PER_FILE)]}).to_csv(other)
    text.heldout_dataset = [str(other)]
    train(text, tokenizer)
    assert len(source.opened) == len(set(source.opened)) == 5


@pytest.mark.parametrize("kind", ["jsonl", "untyped"])
def test_a_second_training_reads_on_behind_what_is_kept(tmp_path, tokenizer, source, kind):
    documents, heldout = load_documents(text_of(tmp_path, kind), 0)
    evaluation_batches(heldout, tokenizer, 16, 320)
    first, second = (pack(documents, tokenizer, 16, buffer_size=50) for _ in range(2))
    rows = ids_of(first)
    assert ids_of(second) == rows == ids_of(first) and len(source.opened) == 12
    more = evaluation_batches(heldout, tokenizer, 16, 1000)  # of documents that the training passed
    assert sum(len(batch["input_ids"]) for batch in more) > 50


def test_the_same_stream_is_trained_and_evaluated_on(tokenizer):
    """An evaluation of the training's own dataset does not move the place that a checkpoint holds."""
    rows = pack(documents(200).to_iterable_dataset(4), tokenizer, 16, buffer_size=20)
    whole = ids_of(rows)
    training = TrainingRows(rows)
    drawn = [row["input_ids"] for row in islice(iter(training), 150)]
    training.release(150)
    assert ids_of(rows) == whole
    next(iter(rows))
    resumed = TrainingRows(pack(documents(200).to_iterable_dataset(4), tokenizer, 16, buffer_size=20))
    resumed.start(training.state_dict())
    assert drawn + ids_of(resumed) == whole


@pytest.mark.parametrize("bad", range(4))
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_file_without_the_column_is_refused_by_the_first_check(tmp_path, ending, bad):
    folder = write(tmp_path / "text", ending)
    wrong = Dataset.from_dict({"content": texts(3)})
    path = tmp_path / "text" / f"{bad}.{ending}"
    {"jsonl": wrong.to_json, "csv": wrong.to_csv, "parquet": wrong.to_parquet}[ending](path)
    with pytest.raises(DataError, match=rf"{bad}\.{ending} has no column 'text'"):
        load_text(folder, streaming=True, in_turn=True)


def test_the_order_of_shards_is_the_same_for_all_seeds(tmp_path):
    folder = write(tmp_path / "text", "jsonl", files=12)
    rows = list(load_text(folder, streaming=True, in_turn=True)["text"])
    assert len({int(text[1:].split()[0]) // 30 for text in rows[:10]}) == 10
    for seed in (1, 2):
        train, _ = load_documents(TextOptions(dataset=[folder], streaming=True), seed)
        side = list(train["text"])
        assert [text for text in rows if text in set(side)] == side
    own = list(load_text(folder, streaming=True)["text"])
    assert own != rows and sorted(own) == sorted(rows)


def test_what_is_made_of_a_stream_may_change_its_rows():
    stream = split_documents(documents(50).to_iterable_dataset())[0].map(lambda row: {"text": row["text"].upper()})
    assert [row.pop("text") for row in stream] == [row["text"] for row in stream]

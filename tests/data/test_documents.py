import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, IterableDataset, Value
from text_cases import documents, ids_of, texts, write_shards

from mxd.data import documents as documents_module
from mxd.data.documents import START_ROWS, DataError, load_text, split_documents
from mxd.data.packing import pack
from mxd.data.provenance import sketch
from mxd.data.texts import TextOptions

pytestmark = pytest.mark.usefixtures("private_cache")


def write_mixture(folder):
    folder.mkdir()
    wide = pa.table({"text": pa.array(["in parquet"], pa.large_string()), "domain": ["web"]})
    pq.write_table(wide, folder / "a.parquet")
    lines = [{"text": f"in jsonl {i}", "extra": i} for i in range(2)]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "c.json").write_text(json.dumps([{"text": "in json", "extra": 3}]))
    (folder / "d.csv").write_text("text,n\nin csv,1\n")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes [1].txt").write_text("first line\n\nsecond line\n")
    (folder / "sub" / "page.md").write_text("# title\n")
    (folder / "sub" / "code.py").write_text("x = 1\n")
    (folder / "sub" / "empty.txt").write_text("")
    (folder / "sub" / ".hidden.txt").write_text("hidden")
    (folder / "ignored.bin").write_bytes(b"\0")


EXPECTED_MIXTURE = [
    "in parquet", "in jsonl 0", "in jsonl 1", "in json", "in csv",
    "x = 1\n", "first line\n\nsecond line\n", "# title\n",
]  # fmt: skip


# --- loading


@pytest.mark.parametrize("streaming", [False, True])
def test_mixed_formats_give_text(tmp_path, streaming):
    write_mixture(tmp_path / "corpus")
    loaded = load_text(str(tmp_path / "corpus"), streaming=streaming)
    assert isinstance(loaded, IterableDataset if streaming else Dataset)
    assert list(loaded) == [{"text": text} for text in EXPECTED_MIXTURE]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_kept_on_request(tmp_path, streaming):
    wide = pa.table({"text": pa.array(["one"], pa.large_string()), "domain": ["web"]})
    pq.write_table(wide, tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("text,domain\ntwo,law\n")
    paths = [str(tmp_path / "b.csv"), str(tmp_path / "a.parquet")]
    expected = [{"text": "two", "domain": "law"}, {"text": "one", "domain": "web"}]
    assert list(load_text(paths, streaming=streaming, keep=["domain"])) == expected
    with pytest.raises(DataError, match="no column 'kind', only text, domain"):
        load_text(paths, streaming=streaming, keep=["kind"])


def test_paths_globs_and_repetitions(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    everything = load_text([str(tmp_path / "c.md"), str(tmp_path / "*.txt"), str(tmp_path)])["text"]
    assert list(everything) == ["c.md", "a.txt", "b.txt"]
    assert list(load_text(str(tmp_path / "**"))["text"]) == ["a.txt", "b.txt", "c.md"]
    monkeypatch.chdir(tmp_path)
    assert list(load_text("a.txt")["text"]) == ["a.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(load_text("~/b.txt")["text"]) == ["b.txt"]


@pytest.mark.parametrize("name", ["notes [1]", "what?", "a*"])
def test_a_folder_is_no_glob_whatever_it_is_called(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.txt").write_text("a text")
    (tmp_path / "a2").mkdir()
    (tmp_path / "a2" / "b.txt").write_text("of another folder")
    assert list(load_text(str(tmp_path / name))["text"]) == ["a text"]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_column_is_renamed(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": "hello", "text": 5, "domain": "web"}))
    path = str(tmp_path / "a.jsonl")
    assert list(load_text(path, text_column="content", streaming=streaming)) == [{"text": "hello"}]
    with pytest.raises(DataError, match=r"no column 'body'.*content, text, domain"):
        load_text(path, text_column="body", streaming=streaming)
    with pytest.raises(DataError, match=r"'text' of .* holds int, not text"):
        load_text(path, streaming=streaming)


def test_text_files_need_no_text_column(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": "hello"}))
    (tmp_path / "b.txt").write_text("world")
    assert list(load_text(str(tmp_path), text_column="content")["text"]) == ["hello", "world"]


def test_split_may_be_a_slice(tmp_path):
    path = write_shards(tmp_path / "shards")
    assert len(load_text(path, split="train[:10]")) == 10


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./missing", r"no such file, folder or glob: '\./missing'"),
        ("missing.parquet", "no such file, folder or glob"),
        *[(f"missing{ending}", "no such file, folder or glob") for ending in (".jsonl.gz", ".JSONL", ".tsv", ".arrow")],
        *[(f"owner/missing{ending}", "no such file, folder or glob") for ending in (".txt.zst", ".zip", ".xlsx")],
        ("notes.log", "unknown ending '.log'"),
        ("mis*ing", "no such file, folder or glob"),
        ("~/missing-folder/deep", "no such file, folder or glob"),
        ("one/two/three", "no such file or folder: 'one/two/three'; nor is it a Hub dataset's name"),
        (["someone/something", "a.txt"], "no such file or folder: 'someone/something'; a Hub dataset is given alone"),
        ("data.bin", "unknown ending '.bin'"),
        ("./nothing", "'./nothing' matches nothing with a known ending; known are .parquet"),
        ("*.bin", "matches nothing with a known ending"),
        ("empty.jsonl", "every file of 'empty.jsonl' is empty"),
        ("header.csv", "csv file .*header.csv.* no (rows|data)"),
        ("broken.jsonl", "cannot read json file.*broken.jsonl"),
        ("latin.txt", "latin.txt: 'utf-8' codec can't decode"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch, source, message, streaming):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(documents_module, "load_dataset", sent_to_the_hub)
    Path("data.bin").write_bytes(b"\0")
    Path("notes.log").write_text("a text")
    Path("nothing").mkdir()
    Path("empty.jsonl").write_text("")
    Path("header.csv").write_text("text,n\n")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"tex')
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=message):
        load_text(source, streaming=streaming)


def sent_to_the_hub(name, *args, **kwargs):
    raise AssertionError(f"{name} was sent to the Hub")


@pytest.mark.parametrize("streaming", [False, True])
def test_local_files_have_one_split_and_no_config(tmp_path, streaming):
    path = write_shards(tmp_path / "shards", files=1)
    with pytest.raises(DataError, match="test"):
        load_text(path, split="test", streaming=streaming)
    with pytest.raises(DataError, match="config_name and revision choose among Hub datasets"):
        load_text(path, config_name="en")


def test_hub_names_go_to_the_hub_and_failures_are_short(monkeypatch):
    calls = []

    def offline(*args, **kwargs):
        calls.append((args, kwargs))
        raise ConnectionError("Couldn't reach it\nand a long story")

    monkeypatch.setattr(documents_module, "load_dataset", offline)
    with pytest.raises(DataError, match=r"no local path 'foo/bar'.*Couldn't reach it") as caught:
        load_text("foo/bar", config_name="en", split="test", revision="abc", streaming=True)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert "long story" not in str(caught.value)
    assert calls == [(("foo/bar", "en"), {"split": "test", "revision": "abc", "streaming": True})]


@pytest.mark.parametrize("how", [{}, {"config_name": "en"}, {"revision": "main"}])
def test_a_script_on_the_hub_is_read_from_its_conversion(monkeypatch, how):
    def load(name, config_name, revision, data_dir=None, **_):
        if revision != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found bar.py")
        return Dataset.from_dict({"text": [f"of {data_dir}, {config_name}"]})

    monkeypatch.setattr(documents_module, "load_dataset", load)
    with pytest.raises(
        DataError, match=r'is a script.*revision="refs/convert/parquet", or --dataset-revision refs/con'
    ):
        load_text("foo/bar", **how)
    converted = load_text("foo/bar", **how | {"revision": "refs/convert/parquet"})
    assert list(converted["text"]) == [f"of {how.get('config_name')}, None"]


def test_hub_rows_pass_the_same_checks(monkeypatch):
    hub = Dataset.from_dict({"content": ["a"], "score": [0.5], "domain": ["web"]})
    monkeypatch.setattr(documents_module, "load_dataset", lambda *args, **kwargs: hub)
    assert list(load_text("foo", text_column="content")) == [{"text": "a"}]
    with pytest.raises(DataError, match=r"dataset 'foo' has no column 'text'; set text_column to one of content"):
        load_text("foo")


# --- dividing


def test_split_of_a_map_style_dataset():
    train, heldout = split_documents(documents(40), heldout_fraction=0.1, seed=3)
    assert (len(train), len(heldout)) == (36, 4)
    assert sorted([*train["text"], *heldout["text"]]) == sorted(texts(40))
    again = split_documents(documents(40), heldout_fraction=0.1, seed=3)
    assert list(again[1]["text"]) == list(heldout["text"])
    other = split_documents(documents(40), heldout_fraction=0.1, seed=4)
    assert set(other[1]["text"]) != set(heldout["text"])


@pytest.mark.parametrize("seed", range(3))
def test_copies_of_a_document_stay_on_one_side(seed):
    many = Dataset.from_dict({"text": texts(30) * 2 + texts(10) + [None, "", None]})
    for rows in (many, many.to_iterable_dataset(), many.with_format("torch")):
        train, heldout = ({row["text"] or "" for row in side} for side in split_documents(rows, 0.2, seed))
        assert train and heldout and train.isdisjoint(heldout) and train | heldout == {*texts(30), ""}
    assert sum(map(len, split_documents(many, 0.2, seed))) == len(many)
    order = many.shuffle(seed=seed)
    assert set(split_documents(order, 0.2, seed)[1]["text"]) == set(split_documents(many, 0.2, seed)[1]["text"])
    with pytest.raises(DataError, match=r"1 document\(s\).*pass a separate held-out dataset"):
        split_documents(Dataset.from_dict({"text": ["the same"] * 9}))


def test_split_leaves_a_document_on_each_side():
    for fraction in (1e-6, 1 - 1e-6):
        assert min(map(len, split_documents(documents(2), fraction))) == 1
    with pytest.raises(DataError, match=r"1 document\(s\).*pass a separate held-out dataset"):
        split_documents(documents(1))
    for fraction in (0.0, 1.0, -1, 2):
        with pytest.raises(DataError, match="heldout_fraction must lie between 0 and 1"):
            split_documents(documents(5), fraction)


def test_split_of_a_stream_stays_apart_when_shards_are_shuffled(tmp_path, bare_tokenizer):
    stream = load_text(write_shards(tmp_path / "shards", words=6), streaming=True)
    train, heldout = split_documents(stream, heldout_fraction=0.2, seed=1)
    held = {row["text"] for row in heldout}
    assert 5 < len(held) < 40
    for seed in range(3):
        kept = {row["text"] for row in train.shuffle(seed=seed, buffer_size=10)}
        assert held.isdisjoint(kept) and held | kept == set(texts(100, words=6))
        rows = pack(train, bare_tokenizer, 8, seed=seed, buffer_size=10)
        seen = " ".join(bare_tokenizer.decode(ids) for ids in ids_of(rows))
        assert not any(text in seen for text in held)
    assert {row["text"] for row in split_documents(stream, 0.2, seed=2)[1]} != held


def test_the_start_of_a_stream_is_read_once(bare_tokenizer):
    opened, read = [], []

    def rows():
        opened.append(1)
        for text in texts(1500):
            read.append(text)
            yield {"text": text}

    for features in (None, Features({"text": Value("string")})):
        opened.clear(), read.clear()
        stream = IterableDataset.from_generator(rows, features=features)
        train, heldout = split_documents(stream, seed=1)
        packed = [pack(side, bare_tokenizer, 16, seed=0) for side in (train, heldout)]
        sketches = [sketch(TextOptions(["a"], streaming=True), side, 1) for side in (train, heldout, stream)]
        assert len(opened) == 2 and len(read) < 2 * START_ROWS + 50  # `stream` itself is not shared
        assert len(list(packed[1])) > 50 and len(list(packed[0])) > 1000
        assert len(opened) == 2 and len(read) == 1500 + START_ROWS
        assert not any(one["complete"] for one in sketches) or len(sketches[1]["hashes"]) < 16 * START_ROWS


def test_what_a_stream_raises_later_is_raised_later(bare_tokenizer, monkeypatch):
    monkeypatch.setattr("mxd.data.streams.RETRY_SECONDS", (0, 0))

    def rows():
        yield from ({"text": text} for text in texts(100))
        raise ConnectionError("the network is gone")

    train, _ = split_documents(IterableDataset.from_generator(rows))
    packed = pack(train, bare_tokenizer, 16, shuffle=False)
    with pytest.raises(ConnectionError, match="the network is gone"):
        list(packed)


def test_split_of_too_short_a_stream():
    stream = documents(2).to_iterable_dataset()
    with pytest.raises(DataError, match="held-out side of the stream empty"):
        split_documents(stream, heldout_fraction=1e-9)
    with pytest.raises(DataError, match="training side of the stream empty"):
        split_documents(stream, heldout_fraction=1 - 1e-9)

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from trainers import data
from trainers.data import (
    CausalCollator,
    DataError,
    load_text,
    materialize,
    pack,
    python_library_documents,
    split_documents,
    take_tokens,
)

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "small", "boats"]


def document(number, words=40):
    return f"d{number} " + " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words))


def texts(count, words=40):
    return [document(number, words) for number in range(count)]


def documents(count, words=40):
    return Dataset.from_dict({"text": texts(count, words)})


def build_tokenizer(**special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(20), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special)


@pytest.fixture(scope="module")
def tokenizer():
    built = build_tokenizer(bos_token="<s>", eos_token="</s>")
    assert (built.bos_token_id, built.eos_token_id) == (0, 1)
    return built


@pytest.fixture(scope="module")
def bare_tokenizer():
    built = build_tokenizer()
    assert built.bos_token_id is None and built.eos_token_id is None
    return built


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    # newer versions pause for 5 s after each shuffled pass over streamed parquet files
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)


def ids_of(rows):
    return [row["input_ids"] for row in rows]


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def write_shards(folder, ending="jsonl", files=4, per_file=25, words=40):
    """Several files with documents of their own."""
    folder.mkdir(exist_ok=True)
    for file in range(files):
        numbers = range(file * per_file, (file + 1) * per_file)
        rows = Dataset.from_dict({"text": [document(n, words) for n in numbers], "url": [str(n) for n in numbers]})
        path = folder / f"{file}.{ending}"
        if ending == "parquet":
            rows.to_parquet(path)
        else:
            rows.to_json(path)
    return str(folder)


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


EXPECTED_MIXTURE = {
    "in parquet": "web",
    "in jsonl 0": "",
    "in jsonl 1": "",
    "in json": "",
    "in csv": "",
    "first line\n\nsecond line\n": "",
    "# title\n": "",
    "x = 1\n": "",
}


# --- loading


@pytest.mark.parametrize("streaming", [False, True])
def test_mixed_formats_give_text_and_domain(tmp_path, streaming):
    write_mixture(tmp_path / "corpus")
    loaded = load_text(str(tmp_path / "corpus"), streaming=streaming)
    assert isinstance(loaded, IterableDataset if streaming else Dataset)
    rows = list(loaded)
    assert all(set(row) == {"text", "domain"} for row in rows)
    assert {row["text"]: row["domain"] for row in rows} == EXPECTED_MIXTURE
    assert len(rows) == len(EXPECTED_MIXTURE)


@pytest.mark.parametrize("streaming", [False, True])
def test_formats_without_domain_give_text_alone(tmp_path, streaming):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.csv").write_text("text,domain_name\ntwo,x\n")
    loaded = load_text([str(tmp_path / "b.csv"), str(tmp_path / "a.txt")], streaming=streaming)
    assert list(loaded) == [{"text": "two"}, {"text": "one"}]


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


@pytest.mark.parametrize("streaming", [False, True])
def test_text_column_is_renamed(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": "hello", "text": 5, "domain": "web"}))
    path = str(tmp_path / "a.jsonl")
    assert list(load_text(path, text_column="content", streaming=streaming)) == [{"domain": "web", "text": "hello"}]
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
        ("mis*ing", "no such file, folder or glob"),
        ("~/missing-folder/deep", "no such file, folder or glob"),
        ("one/two/three", "no such file or folder: 'one/two/three'; nor is it a Hub dataset's name"),
        (["someone/something", "a.txt"], "no such file or folder: 'someone/something'; several sources"),
        ([], "empty list"),
        ("data.bin", "unknown ending '.bin'"),
        ("./nothing", "'./nothing' matches nothing with a known ending; known are .parquet"),
        ("*.bin", "matches nothing with a known ending"),
        ("empty.jsonl", "every file of 'empty.jsonl' is empty"),
        ("header.csv", r"csv file\(s\) header.csv.* no (rows|data)"),
        ("broken.jsonl", "cannot read json file.*broken.jsonl"),
        ("latin.txt", "latin.txt is not UTF-8; convert it"),
        ("saved", "written by save_to_disk"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch, source, message, streaming):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_dataset", only_local(data.load_dataset))
    Path("data.bin").write_bytes(b"\0")
    Path("nothing").mkdir()
    Path("empty.jsonl").write_text("")
    Path("header.csv").write_text("text,n\n")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"tex')
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    Path("saved").mkdir()
    Path("saved/state.json").write_text("{}")
    with pytest.raises(DataError, match=message):
        load_text(source, streaming=streaming)


def only_local(load_dataset):
    def checked(builder, *args, **kwargs):
        assert builder in {"parquet", "json", "csv", "text"}, f"{builder} was sent to the Hub"
        return load_dataset(builder, *args, **kwargs)

    return checked


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

    monkeypatch.setattr(data, "load_dataset", offline)
    with pytest.raises(DataError, match=r"no local path 'foo/bar'.*Couldn't reach it; check the name") as caught:
        load_text("foo/bar", config_name="en", split="test", revision="abc", streaming=True)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert "long story" not in str(caught.value)
    assert calls == [(("foo/bar", "en"), {"split": "test", "revision": "abc", "streaming": True})]


def test_hub_rows_pass_the_same_checks(monkeypatch):
    hub = Dataset.from_dict({"content": ["a"], "score": [0.5], "domain": ["web"]})
    monkeypatch.setattr(data, "load_dataset", lambda *args, **kwargs: hub)
    assert list(load_text("foo", text_column="content")) == [{"text": "a", "domain": "web"}]
    with pytest.raises(DataError, match=r"dataset 'foo' has no column 'text'; set text_column to one of content"):
        load_text("foo")


def test_python_library_documents():
    loaded = python_library_documents()
    assert loaded.column_names == ["text", "domain"]
    assert set(loaded["domain"]) == {"code"}
    assert len(loaded) > 200
    assert any("def heappush(" in text for text in loaded["text"])
    assert not any("import pytest" in text for text in loaded["text"])


# --- dividing


def test_split_of_a_map_style_dataset():
    train, heldout = split_documents(documents(40), heldout_fraction=0.1, seed=3)
    assert (len(train), len(heldout)) == (36, 4)
    assert sorted([*train["text"], *heldout["text"]]) == sorted(texts(40))
    again = split_documents(documents(40), heldout_fraction=0.1, seed=3)
    assert list(again[1]["text"]) == list(heldout["text"])
    other = split_documents(documents(40), heldout_fraction=0.1, seed=4)
    assert set(other[1]["text"]) != set(heldout["text"])


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


def test_split_of_too_short_a_stream():
    stream = documents(2).to_iterable_dataset()
    with pytest.raises(DataError, match="held-out side of the stream without documents"):
        split_documents(stream, heldout_fraction=1e-9)
    with pytest.raises(DataError, match="training side of the stream without documents"):
        split_documents(stream, heldout_fraction=1 - 1e-9)


# --- packing


def reference_rows(passages, tokenizer, context_length, batch):
    """One batch after the other: join with EOS, cut, put BOS in front, drop the rest."""
    rows = []
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for begin in range(0, len(passages), batch):
        stream = []
        for passage in passages[begin : begin + batch]:
            if stream and tokenizer.eos_token_id is not None:
                stream.append(tokenizer.eos_token_id)
            stream.extend(encode(tokenizer, passage))
        while len(stream) >= context_length - len(start):
            rows.append(start + stream[: context_length - len(start)])
            stream = stream[context_length - len(start) :]
    return rows


@pytest.mark.parametrize("kind", ["tokenizer", "bare_tokenizer"])
@pytest.mark.parametrize("context_length", [2, 3, 16, 31])
def test_rows_are_the_token_stream(request, kind, context_length):
    built = request.getfixturevalue(kind)
    rows = ids_of(pack(documents(150), built, context_length, shuffle=False))
    assert rows == reference_rows(texts(150), built, context_length, batch=64)
    assert {len(row) for row in rows} == {context_length}


def test_every_row_starts_with_a_bos_of_id_zero(tokenizer):
    rows = ids_of(pack(documents(30), tokenizer, 16))
    assert all(row[0] == 0 and 0 not in row[1:] for row in rows)
    assert any(1 in row for row in rows)


def test_short_texts_are_joined_in_larger_batches(tokenizer):
    count, context_length = 4000, 512
    rows = ids_of(pack(documents(count, words=1), tokenizer, context_length, shuffle=False))
    tokens = sum(len(encode(tokenizer, text)) + 1 for text in texts(count, words=1))
    assert len(rows) * (context_length - 1) > 0.9 * tokens  # 64 such texts would not fill a row


def test_long_documents_are_cut_at_whitespace(bare_tokenizer):
    long = "".join(f"word{n}{' ' if n % 3 else chr(10)}" for n in range(6000)) + "x" * 40_000 + " end"
    passages = [row["text"] for row in data._passages(Dataset.from_dict({"text": [None, long, " \n", "b"]}))]
    assert "".join(passages) == long + "b"
    assert all(len(passage) <= data.PASSAGE_CHARACTERS for passage in passages)
    assert all(passage[0].isspace() for passage in passages[1:4])
    rows = ids_of(pack(Dataset.from_dict({"text": [long]}), bare_tokenizer, 64, shuffle=False))
    decoded = bare_tokenizer.decode([token for row in rows for token in row])
    assert len(decoded) > 0.99 * len(long) and long.startswith(decoded)


def test_shuffling_keeps_the_texts_and_follows_the_seed(tokenizer):
    def order(seed, shuffle=True):
        return ids_of(pack(documents(60), tokenizer, 16, seed=seed, shuffle=shuffle))

    plain, first, other = order(0, shuffle=False), order(0), order(1)
    assert first == order(0)
    assert first not in (other, plain)
    near = sum(a[1:] == b[1:] for a, b in zip(first, other, strict=False))
    assert near < len(first) / 10
    counts = [Counter(token for row in rows for token in row) for rows in (plain, first, other)]
    assert sum((counts[1] - counts[0]).values()) < 40  # all but the dropped end, and one EOS or other, is the same
    assert sum((counts[2] - counts[0]).values()) < 40


def test_map_style_documents_are_shuffled_as_a_whole(bare_tokenizer):
    rows = pack(documents(300), bare_tokenizer, 16, buffer_size=1)
    start = bare_tokenizer.decode([token for row in ids_of(rows.take(100)) for token in row])
    numbers = [int(word[1:]) for word in start.replace("d", " d").split() if word[1:].isdigit()]
    assert len(numbers) > 10 and max(numbers) > 150 and numbers != sorted(numbers)


@pytest.mark.parametrize(("ending", "streaming"), [("jsonl", False), ("jsonl", True), ("parquet", True)])
def test_second_iteration_gives_the_same_rows(tmp_path, tokenizer, ending, streaming):
    loaded = load_text(write_shards(tmp_path / "shards", ending), streaming=streaming)
    rows = pack(loaded, tokenizer, 16, seed=5, buffer_size=20)
    first = ids_of(rows)
    assert len(first) > 100
    assert first == ids_of(rows)
    assert first == ids_of(pack(loaded, tokenizer, 16, seed=5, buffer_size=20))
    assert first != ids_of(pack(loaded, tokenizer, 16, seed=6, buffer_size=20))
    skipped = ids_of(islice(rows, 50, None))
    assert skipped == first[50:]


def test_new_process_gives_the_same_rows(tmp_path, tokenizer):
    folder = write_shards(tmp_path / "shards")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = (
        "import json, sys, datasets, transformers\n"
        "from trainers.data import load_text, pack\n"
        "datasets.config.HF_DATASETS_CACHE = sys.argv[1] + '/.cache'\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1] + '/tokenizer')\n"
        "rows = [[r['input_ids'] for r in pack(load_text(sys.argv[2], streaming=s), tokenizer, 16, seed=5)]\n"
        "        for s in (False, True)]\n"
        "print(json.dumps(rows))\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path), folder]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=root)
    here = [ids_of(pack(load_text(folder, streaming=s), tokenizer, 16, seed=5)) for s in (False, True)]
    assert json.loads(done.stdout.splitlines()[-1]) == here


def test_streams_are_read_lazily(bare_tokenizer):
    read = []

    def endless():
        for number in range(10**9):
            read.append(number)
            yield {"text": document(number)}

    stream = IterableDataset.from_generator(endless)
    rows = pack(stream, bare_tokenizer, 16, buffer_size=10)
    assert len(read) < 200
    assert len(ids_of(rows.take(5))) == 5
    assert len(read) < 500


def test_many_shards_are_not_all_read_for_the_first_row(tmp_path, bare_tokenizer):
    stream = load_text(write_shards(tmp_path / "shards", files=20, per_file=50), streaming=True)
    read = []
    counted = stream.map(lambda row: read.append(row["text"]) or row)
    rows = pack(counted, bare_tokenizer, 16, buffer_size=10)
    read.clear()
    next(iter(rows))
    assert len(read) < 300


def test_repeat_is_endless(tokenizer):
    once = ids_of(pack(documents(20), tokenizer, 16, seed=2))
    rows = pack(documents(20), tokenizer, 16, seed=2, repeat=True)
    assert ids_of(rows.take(2 * len(once) + 3)) == once + once + once[:3]


def test_long_passages_raise_no_length_warning(caplog, monkeypatch):
    fresh = build_tokenizer()  # the warning comes once per tokenizer
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert ids_of(pack(documents(3, words=400), fresh, 16))
        assert not caplog.records
        fresh(document(0, words=400), add_special_tokens=False)
        assert "longer than the specified maximum" in caplog.text


def test_text_too_short_for_a_row_is_an_error(tokenizer, bare_tokenizer):
    exact = len(encode(bare_tokenizer, document(0)))
    assert len(ids_of(pack(documents(1), bare_tokenizer, exact))) == 1
    assert len(ids_of(pack(documents(1), tokenizer, exact + 1))) == 1
    with pytest.raises(DataError, match=rf"make {exact} tokens, and one row takes {exact + 1} \(context_length="):
        pack(documents(1), bare_tokenizer, exact + 1)
    with pytest.raises(DataError, match=rf"make {exact} tokens, and one row takes {exact + 1} "):
        pack(documents(1), tokenizer, exact + 2, repeat=True)
    with pytest.raises(DataError, match=r"0 passage\(s\) make 0 tokens"):
        pack(Dataset.from_dict({"text": ["", None, " "]}), tokenizer, 4)


def test_pack_refuses_nonsense(tokenizer):
    with pytest.raises(DataError, match=r"context_length must be at least 2.*got 1"):
        pack(documents(3), tokenizer, 1)
    with pytest.raises(DataError, match="buffer_size must be at least 1, got 0"):
        pack(documents(3), tokenizer, 8, buffer_size=0)
    unnamed = IterableDataset.from_generator(lambda: iter([{"content": "a"}]))
    for wrong in (Dataset.from_dict({"content": ["a"]}), unnamed):
        with pytest.raises(DataError, match=r"no column 'text', only \['content'\]"):
            pack(wrong, tokenizer, 8)
    with pytest.raises(DataError, match="no column 'text'"):
        split_documents(unnamed)


# --- rows


def test_take_tokens_rounds_up(tokenizer):
    rows = pack(documents(20), tokenizer, 16)
    for tokens, expected in ((1, 1), (16, 1), (17, 2), (160, 10)):
        assert len(list(take_tokens(rows, tokens))) == expected
    with pytest.raises(DataError, match="tokens must be at least 1, got 0"):
        take_tokens(rows, 0)
    with pytest.raises(DataError, match="pass what pack returns"):
        take_tokens(documents(3).to_iterable_dataset(), 5)


def test_materialize(tokenizer, caplog):
    rows = pack(documents(20), tokenizer, 16, shuffle=False)
    whole = materialize(rows)
    assert isinstance(whole, Dataset)
    assert torch.equal(whole[:]["input_ids"], torch.tensor(ids_of(rows)))
    assert whole[0]["input_ids"].dtype == torch.long
    assert len(materialize(pack(documents(20), tokenizer, 16, repeat=True), tokens=100)) == 7
    with caplog.at_level(logging.WARNING):
        assert len(materialize(rows, tokens=10**6)) == len(whole)
    assert "asked for 1000000 tokens" in caplog.text
    with pytest.raises(DataError, match="no rows to materialize"):
        materialize(rows.take(0))


def test_collator_stacks_equal_rows(tokenizer):
    rows = pack(documents(20), tokenizer, 16)
    batch = next(iter(DataLoader(rows, batch_size=4, collate_fn=CausalCollator(tokenizer))))
    assert torch.equal(batch["input_ids"], torch.tensor(ids_of(rows.take(4))))
    assert torch.equal(batch["attention_mask"], torch.ones(4, 16, dtype=torch.long))
    tensors = [materialize(rows)[i] for i in range(2)]
    assert CausalCollator(tokenizer)(tensors)["input_ids"].shape == (2, 16)


def test_collator_pads_on_the_right(tokenizer, bare_tokenizer):
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [0, 1, 1], "label": 3}, {"input_ids": torch.tensor([8])}]
    for built, pad in ((tokenizer, 1), (bare_tokenizer, 0), (None, 0)):
        batch = CausalCollator(built)(rows)
        assert set(batch) == {"input_ids", "attention_mask"}
        assert batch["input_ids"].tolist() == [[5, 6, 7], [8, pad, pad]]
        assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 0, 0]]
        assert all(tensor.dtype == torch.long for tensor in batch.values())
    padded = build_tokenizer(eos_token="</s>", pad_token="<s>")
    assert CausalCollator(padded).pad_token_id == 0


def test_collator_refuses_nonsense():
    with pytest.raises(DataError, match="at least one row"):
        CausalCollator()([])
    with pytest.raises(DataError, match=r"attention_mask is \(1,\) but input_ids is \(2,\)"):
        CausalCollator()([{"input_ids": [1, 2], "attention_mask": [1]}])

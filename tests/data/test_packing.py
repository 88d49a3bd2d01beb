import json
import logging
from collections import Counter
from itertools import islice

import pytest
import torch
import warm_process
from datasets import Dataset, IterableDataset
from text_cases import build_tokenizer, document, documents, encode, ids_of, texts, write_shards
from torch.utils.data import DataLoader

from mxd.data import packing
from mxd.data.documents import DataError, load_text, split_documents
from mxd.data.packing import CausalCollator, materialize, pack, take_tokens

pytestmark = pytest.mark.usefixtures("private_cache")


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
    passages = [passage for text in (None, long, " \n", "b") for passage in packing._cut(text)]
    assert "".join(passages) == long + "b"
    assert all(len(passage) <= packing.PASSAGE_CHARACTERS for passage in passages)
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
        "from mxd import load_text, pack\n"
        "datasets.config.HF_DATASETS_CACHE = sys.argv[1] + '/.cache'\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1] + '/tokenizer')\n"
        "rows = [[r['input_ids'] for r in pack(load_text(sys.argv[2], streaming=s), tokenizer, 16, seed=5)]\n"
        "        for s in (False, True)]\n"
        "print(json.dumps(rows))\n"
    )
    done = warm_process.run("-c", script, tmp_path, folder)
    assert done.returncode == 0, done.stderr
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
    batch = next(iter(DataLoader(rows, batch_size=4, collate_fn=CausalCollator())))
    assert torch.equal(batch["input_ids"], torch.tensor(ids_of(rows.take(4))))
    assert torch.equal(batch["attention_mask"], torch.ones(4, 16, dtype=torch.long))
    tensors = [materialize(rows)[i] for i in range(2)]
    assert CausalCollator()(tensors)["input_ids"].shape == (2, 16)


def test_collator_pads_on_the_right():
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [0, 1, 1], "label": 3}, {"input_ids": torch.tensor([8])}]
    batch = CausalCollator()(rows)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())

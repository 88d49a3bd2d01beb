import json

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from text_cases import build_tokenizer

from mxd.data.documents import DataError
from mxd.data.labelled_text import MAX_CLASSES, LabelledDocuments, count_texts, cut_texts, load_labelled_text


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count=6, **columns):
    return [{"text": f"text {i}", "kind": "ab"[i % 2], "book": i // 2, **columns} for i in range(count)]


def test_labels_and_groups_come_along(tmp_path):
    found = load_labelled_text(written(tmp_path / "a.jsonl", rows()), label_column="kind", group_column="book")
    assert list(found.texts) == [f"text {i}" for i in range(6)]
    assert found.labels.tolist() == list("ababab")
    assert found.groups.tolist() == ["0", "0", "1", "1", "2", "2"]
    alone = load_labelled_text(written(tmp_path / "a.jsonl", rows()), label_column="book")
    assert alone.labels.tolist() == ["0", "0", "1", "1", "2", "2"]  # whole numbers are classes too
    assert len(set(alone.groups)) == 6


def test_some_classes_and_rows_without_one(tmp_path):
    table = [*rows(), {"text": "nobody's", "kind": None, "book": 9}, {"text": "a c", "kind": "c", "book": 10}]
    source = written(tmp_path / "a.jsonl", table)
    assert load_labelled_text(source, label_column="kind").labels.tolist() == list("abababc")
    some = load_labelled_text(source, label_column="kind", classes=["c", "a"])
    assert some.labels.tolist() == list("aaac") and some.texts[-1] == "a c"


def test_a_class_label_gives_its_names(monkeypatch):
    features = Features({"body": Value("string"), "kind": ClassLabel(names=["World", "Sports"])})
    hub = Dataset.from_dict({"body": ["x", "y", "z"], "kind": [1, 0, -1]}, features=features)
    monkeypatch.setattr("mxd.data.documents.load_dataset", lambda *_, **__: hub)
    found = load_labelled_text("owner/news", label_column="kind", text_column="body")
    assert found.labels.tolist() == ["Sports", "World"] and list(found.texts) == ["x", "y"]


def test_formats_are_joined_with_their_labels(tmp_path):
    first = written(tmp_path / "a.jsonl", rows(2))
    Dataset.from_list(rows(4)).to_parquet(tmp_path / "b.parquet")
    found = load_labelled_text([first, str(tmp_path / "b.parquet")], label_column="kind", group_column="book")
    assert found.labels.tolist() == list("ababab") and found.groups.tolist() == ["0", "0", "0", "0", "1", "1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "colour"}, "no column 'colour', only text, kind, book"),
        ({"label_column": "kind", "group_column": "shelf"}, "no column 'shelf'"),
        ({"label_column": "text"}, "named as the text column and as the label column"),
        ({"label_column": "kind", "classes": ["a", "z"]}, "has no class 'z', only a, b"),
        ({"label_column": "kind", "classes": ["a"]}, "has only a"),
        ({"label_column": "same"}, "has only x"),
        ({"label_column": "kind", "text_column": "body"}, "no column 'body'"),
    ],
)
def test_bad_columns_are_named(tmp_path, options, message):
    source = written(tmp_path / "a.jsonl", rows(same="x"))
    with pytest.raises(DataError, match=message):
        load_labelled_text(source, **options)


def test_what_are_no_classes(tmp_path):
    many = [{"text": "x", "year": 1000 + i} for i in range(MAX_CLASSES + 1)]
    with pytest.raises(DataError, match=r"has 101 classes \(1000, 1001, .* and 93 more\), over 100"):
        load_labelled_text(written(tmp_path / "a.jsonl", many), label_column="year")
    assert len(load_labelled_text(str(tmp_path / "a.jsonl"), label_column="year", classes=["1000", "1001"]).labels) == 2
    (tmp_path / "a.txt").write_text("no columns here")
    with pytest.raises(DataError, match="no column 'kind', only text"):
        load_labelled_text(str(tmp_path / "a.txt"), label_column="kind")


def documents(lengths, labels):
    texts = [" ".join(["fox", "dog", "boats"][(i + j) % 3] for j in range(n)) for i, n in enumerate(lengths)]
    return LabelledDocuments(texts, np.array(list(labels)), np.array([f"g{i}" for i in range(len(texts))]))


def test_windows_do_not_overlap_and_begin_with_bos(tokenizer):
    found = documents([40, 40], "ab")
    texts = cut_texts(found, tokenizer, context_length=9, texts_per_class=100)
    assert texts.labels.tolist() == ["a"] * 5 + ["b"] * 5
    assert texts.groups.tolist() == ["g0"] * 5 + ["g1"] * 5
    assert all(ids[0] == tokenizer.bos_token_id for ids in texts.ids)
    for number, text in enumerate(found.texts):
        joined = [token for ids in texts.ids[5 * number : 5 * number + 5] for token in ids[1:]]
        assert joined == tokenizer(text, add_special_tokens=False)["input_ids"][: len(joined)]


def test_without_bos_windows_are_of_text_alone():
    tokenizer, found = build_tokenizer(), documents([16, 16], "ab")
    texts = cut_texts(found, tokenizer, context_length=8, texts_per_class=1)
    assert all(len(ids) <= 8 for ids in texts.ids)
    for ids, text in zip(texts.ids, found.texts, strict=True):
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids in [whole[begin : begin + 8] for begin in range(0, len(whole), 8)]


def test_classes_are_cut_to_equal_numbers_from_all_their_documents(tokenizer):
    found = documents([80] * 10 + [400, 400], "a" * 10 + "b" * 2)
    texts = cut_texts(found, tokenizer, context_length=9, texts_per_class=20)
    counts = count_texts(texts)
    assert counts == {"a": {"texts": 20, "groups": 10}, "b": {"texts": 20, "groups": 2}}
    of_each = [int((texts.groups == f"g{i}").sum()) for i in range(12)]
    assert of_each == [2] * 10 + [10] * 2
    uneven = cut_texts(found, tokenizer, context_length=9, texts_per_class=25)
    assert sorted(int((uneven.groups == f"g{i}").sum()) for i in range(10)) == [2] * 5 + [3] * 5
    few = cut_texts(found, tokenizer, context_length=9, texts_per_class=3)
    assert [count["texts"] for count in count_texts(few).values()] == [3, 3]
    again, other = (cut_texts(found, tokenizer, context_length=9, texts_per_class=20, seed=seed) for seed in (0, 1))
    assert again.ids == texts.ids and other.ids != texts.ids


def test_short_texts_are_left_out(tokenizer):
    found = documents([2, 40, 0, 40], "aabb")
    texts = cut_texts(found, tokenizer, context_length=64, texts_per_class=10)
    assert texts.groups.tolist() == ["g1", "g3"]
    with pytest.raises(DataError, match=r"class .*a.* has no text of at least 5 tokens"):
        cut_texts(documents([2, 40], "ab"), tokenizer, context_length=64)


def test_numbers_out_of_range(tokenizer):
    with pytest.raises(DataError, match="context_length must be at least 6, got 5"):
        cut_texts(documents([40, 40], "ab"), tokenizer, context_length=5)


def test_texts_are_read_only_when_they_are_cut(tmp_path):
    found = load_labelled_text(written(tmp_path / "a.jsonl", rows()), label_column="kind")
    assert isinstance(found.texts, datasets.arrow_dataset.Column)


def test_whole_numbers_as_floats_and_gaps(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("text,stars,book\nfine,5,a\npoor,1,\nlost,,a\nwell,5,\n")
    found = load_labelled_text(str(path), label_column="stars", group_column="book")
    assert found.labels.tolist() == ["5", "1", "5"]
    assert found.groups[0] == "a" and len(set(found.groups)) == 3  # rows without a group stand alone

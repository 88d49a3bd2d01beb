"""The text of a run: which documents are trained on and held out, and what is recorded of them."""

import re

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from mxd import demo
from mxd.data.documents import load_text
from mxd.data.texts import (
    TextOptions,
    count_documents,
    evaluation_batches,
    evaluation_settings,
    load_documents,
    load_one,
)


def test_documents_of_a_stream_are_not_counted():
    documents = Dataset.from_dict({"text": ["a", "b"]})
    assert count_documents(documents, documents) == 4
    assert count_documents(documents, documents.to_iterable_dataset()) is None


@pytest.mark.parametrize(
    ("heldout", "expected"),
    [
        ({"heldout_dataset": ["ann/plays"]}, (["ann/plays"], None, "train")),
        ({"heldout_dataset": ["ann/plays"], "heldout_split": "test"}, (["ann/plays"], None, "test")),
        ({"heldout_split": "test"}, (["wikitext"], "wikitext-2", "test")),
        ({}, (["wikitext"], "wikitext-2", "train")),
    ],
)
def test_which_text_is_held_out(monkeypatch, heldout, expected):
    loaded = []

    def load(dataset, *, config_name=None, split, **_):
        loaded.append((dataset, config_name, split))
        return Dataset.from_dict({"text": ["a", "b"]})

    monkeypatch.setattr("mxd.data.texts.load_text", load)
    text = TextOptions(["wikitext"], config_name="wikitext-2", **heldout)
    load_documents(text, seed=0)
    assert loaded == [(["wikitext"], "wikitext-2", "train"), *([expected] if heldout else [])]
    said = evaluation_settings(text, "float32")
    assert (said["dataset"], said["config_name"], said["split"]) == expected


def test_options_of_a_dataset_are_not_of_the_embedded_text(tmp_path):
    path = tmp_path / "held.jsonl"
    path.write_text('{"body": "a text"}\n')
    how = {"config_name": "new", "split": "test", "text_column": "body"}
    documents, heldout = load_documents(TextOptions(heldout_dataset=[str(path)], **how), seed=0)
    sides = [list(load_text(str(demo.text_path(side)))["text"]) for side in ("train", "heldout")]
    assert [list(documents["text"]), list(heldout["text"])] == [sides[0], ["a text"]]
    assert [list(side["text"]) for side in load_documents(TextOptions(**how), seed=0)] == sides
    assert list(load_one(TextOptions(**how))["text"]) == sides[1]


def test_fewer_tokens_than_asked_for_are_warned_of(caplog):
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    documents = Dataset.from_dict({"text": ["some words " * 200]})
    batches = evaluation_batches(documents, tokenizer, 64, 10_000)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    assert f"asked for 10000 tokens, the text gives {tokens}" in caplog.text
    assert evaluation_batches(documents, tokenizer, 64, 65)[0]["input_ids"].shape == (2, 64)  # whole rows


def test_what_is_trained_on_is_not_held_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("words " * 100)
    for text, message in (
        (TextOptions(heldout_split="test"), "is of no dataset"),
        (TextOptions(["ann/plays"], heldout_split="train[:5%]"), "trained on: ann/plays"),
        (TextOptions(["ann/plays"], config_name="new", heldout_dataset=["ann/plays"]), "trained on: ann/plays"),
        (TextOptions([str(tmp_path)], heldout_dataset=[str(path)]), f"trained on: {path}"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_documents(text, seed=0)

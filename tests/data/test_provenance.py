"""Was a text trained on? By the names of files and Hub datasets, and by how a text was split."""

from dataclasses import asdict

import pytest

from mxd.data.provenance import (
    TextPart,
    common,
    heldout_parts,
    is_held_out,
    recorded_parts,
    recorded_runs,
    seen_in_training,
    text_parts,
)
from mxd.data.texts import TextOptions


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (TextPart("x"), TextPart("x"), True),
        (TextPart("x"), TextPart("y"), False),
        (TextPart("x", split="train"), TextPart("x", split="train[:1%]"), True),
        (TextPart("x", split="train[1%:]"), TextPart("x", split="train[:1%]"), False),
        (TextPart("x", split="train"), TextPart("x", split="test"), False),
        (TextPart("x", "en"), TextPart("x", "fr"), False),
        (TextPart("x", "en"), TextPart("x"), True),
    ],
)
def test_overlap_of_parts(one, other, expected):
    assert one.overlaps(other) is other.overlaps(one) is expected


def test_folders_and_globs_are_their_files(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("words")
    both = {TextPart(str(tmp_path / name)) for name in ("a.txt", "b.txt")}
    assert text_parts([str(tmp_path)], None, None) == text_parts([f"{tmp_path}/*.txt"], None, None) == both
    assert text_parts(["ann/plays"], "new", "test") == {TextPart("ann/plays", "new", "test")}
    monkeypatch.chdir(tmp_path)
    one = text_parts(["a.txt"], None, None)
    for recorded in ("a.txt", str(tmp_path / "a.txt"), str(tmp_path), f"{tmp_path}/*.txt", "*.txt", "/"):
        assert common(one, recorded_parts({"dataset": [recorded]})) == [str(tmp_path / "a.txt")]
    for recorded in ("b.txt", f"{tmp_path}/a", "*.csv", "~nobody/a.txt", "x" * 5000, "a/" + "b" * 300, 7, None):
        assert common(one, recorded_parts({"dataset": [recorded]})) == []
    assert common(one, recorded_parts({"dataset": "a.txt"})) == []


def test_recorded_names_are_not_looked_up_on_disk(monkeypatch):
    def look(source):
        raise AssertionError(f"looked for {source}")

    monkeypatch.setattr("mxd.data.provenance.local_files", look)
    assert recorded_parts({"dataset": ["/", "/**"], "split": "test"}) == {
        TextPart("/", None, "test"),
        TextPart("/**", None, "test"),
    }


def test_slices_of_local_files(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("words")
    text = TextOptions([str(path)], split="train[:90%]", heldout_split="train[90%:]")
    parts = text_parts(text.dataset, None, text.split)
    assert parts == {TextPart(str(path), None, "train[:90%]")}
    assert common(parts, heldout_parts(text)) == []
    assert common(parts, [TextPart(str(path))]) == [str(path)]


def test_held_out_documents_of_a_finetuning_may_have_been_trained_on(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("words")
    a, b = (str(tmp_path / name) for name in ("a.txt", "b.txt"))

    def run(dataset, **changes):
        return {"text": {**asdict(TextOptions(dataset)), **changes}, "seed": 3}

    def seen(text, training, *finetunings, documents=None):
        return seen_in_training({"training": training, "finetuning": list(finetunings)}, text, 5, documents)

    assert seen(TextOptions([a, b]), run([a, b])) == []  # the same split
    assert seen(TextOptions([b, a]), run([a, b])) == [a, b]  # another order, another split
    assert seen(TextOptions([a, b], streaming=True), run([a, b])) == [a, b]
    assert seen(TextOptions([a]), run([a, b])) == [a]
    assert seen(TextOptions([a, b]), run([a, b]), run([b])) == [b]  # the fine-tuning split b alone
    assert seen(TextOptions(["ann/plays"], heldout_dataset=[a]), run([a])) == [a]
    assert seen(TextOptions(["ann/plays"]), run([a])) == []
    assert seen(TextOptions([a]), run([a], heldout_dataset=[b])) == [a]  # nothing was held out of it
    # With another number of documents, others are held out.
    counted = {**run([a]), "documents": 100}
    assert seen(TextOptions([a]), counted, documents=100) == seen(TextOptions([a]), run([a]), documents=101) == []
    assert seen(TextOptions([a]), counted, documents=101) == [a]
    # Without a recorded seed of the training, each fine-tuning splits by its own.
    assert seen_in_training({"finetuning": [run([a])]}, TextOptions([a]), 3, None) == []
    assert seen_in_training({"finetuning": [run([a])]}, TextOptions([a]), 4, None) == [a]


def test_a_whole_text_that_was_trained_on_is_seen_however_it_was_split(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("words")
    text = TextOptions([str(path)])
    settings = {"training": {"text": asdict(text), "seed": 0}}
    assert seen_in_training(settings, text) == [str(path)]
    assert seen_in_training(settings, text, seed=0) == []
    assert seen_in_training(settings, TextOptions()) == []  # the held-out sample


def test_only_well_formed_records_are_read():
    training, finetuning = {"seed": 1}, [{"seed": 2}]
    settings = {"training": training, "finetuning": finetuning, "tokens": 5}
    assert recorded_runs(settings) == {"training": training, "finetuning": finetuning}
    assert recorded_runs({"training": [], "finetuning": {}}) == recorded_runs("x") == recorded_runs(None) == {}


@pytest.mark.parametrize(
    ("made", "held_out"),
    [
        ({"training": {"text": {"dataset": []}}}, True),
        ({}, None),
        ({"training": {"text": {}}}, None),
        ({"training": {"text": {"dataset": []}}, "finetuning": [{}]}, None),
        ({"finetuning": [{"text": {"dataset": []}}]}, None),
    ],
)
def test_text_is_held_out_only_if_every_run_records_its_text(made, held_out):
    assert is_held_out(made, []) is held_out
    assert is_held_out(made, ["a.txt"]) is False

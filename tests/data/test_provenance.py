"""Was a text trained on? By its content, whatever it is called."""

from dataclasses import asdict

import pytest
from datasets import Dataset
from text_cases import texts

from mxd.data.documents import START_ROWS, split_documents
from mxd.data.provenance import (
    SKETCH_SIZE,
    check_apart,
    is_held_out,
    recorded_runs,
    sketch,
)
from mxd.data.texts import TextOptions


@pytest.mark.parametrize("heldout", ["a.txt", "*.txt", ".", "link.txt"])
@pytest.mark.parametrize("split", [None, "train", "train[:10%]"])
def test_held_out_files_that_are_trained_on_are_refused(tmp_path, monkeypatch, heldout, split):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("words")
    (tmp_path / "link.txt").symlink_to("a.txt")
    for trained in ("a.txt", str(tmp_path / "a.txt"), "./a.txt"):
        with pytest.raises(ValueError, match=r"the held-out text is trained on: .*a\.txt"):
            check_apart(TextOptions([trained], heldout_dataset=[heldout], heldout_split=split))
    check_apart(TextOptions(["a.txt"], heldout_dataset=["b.txt"], heldout_split=split))


@pytest.mark.parametrize(
    ("split", "heldout", "apart"),
    [
        ("train", "train", False), ("train", "train[:1%]", False), ("train[1%:]", "train", False),
        ("train[1%:]", "train[:1%]", True), ("train", "test", True), ("train", "test[:1%]", True),
    ],
)  # fmt: skip
def test_splits_of_one_dataset(split, heldout, apart):
    for text in (
        TextOptions(["ann/plays"], split=split, heldout_split=heldout),
        TextOptions(["ann/plays"], split=split, heldout_dataset=["ann/plays"], heldout_split=heldout),
    ):
        if apart:
            check_apart(text)
        else:
            with pytest.raises(ValueError, match="the held-out text is trained on: ann/plays"):
                check_apart(text)
    check_apart(TextOptions(["ann/plays"], heldout_dataset=["ann/poems"]))
    check_apart(TextOptions(["ann/plays"]))


def test_only_well_formed_records_are_read():
    training, finetuning = {"seed": 1}, [{"seed": 2}]
    settings = {"training": training, "finetuning": finetuning, "tokens": 5}
    assert recorded_runs(settings) == {"training": training, "finetuning": finetuning}
    assert recorded_runs({"training": [], "finetuning": {}}) == recorded_runs("x") == recorded_runs(None) == {}


def rows(words):
    return Dataset.from_dict({"text": words})


def trained_on(documents, seed=0, name="trained.txt"):
    text = TextOptions([name], streaming=not isinstance(documents, Dataset))
    return {"text": asdict(text), "seed": seed, "sketch": sketch(text, documents, seed)}


OTHER = TextOptions(["another name.txt"])


@pytest.mark.parametrize("count", [5, 150, 3 * SKETCH_SIZE])
@pytest.mark.parametrize("streamed", [False, True])
def test_documents_are_recognised_by_their_text(count, streamed, caplog):
    known, new = texts(count, words=6), [f"{text} x" for text in texts(count, words=6)]
    documents = rows(known).to_iterable_dataset() if streamed else rows(known)
    settings = {"training": trained_on(documents)}
    read = not streamed or count < START_ROWS  # of a longer stream, only the start is
    assert is_held_out(settings, OTHER, rows(new)) is (True if read else None)
    assert is_held_out(settings, OTHER, rows(new).to_iterable_dataset()) is (True if count < START_ROWS else None)
    assert caplog.text == ""
    assert is_held_out(settings, OTHER, rows([*reversed(known)])) is False
    assert is_held_out(settings, OTHER, rows([*known[:30], *new]).to_iterable_dataset()) is False
    assert is_held_out(settings, OTHER, rows([f"\n{text} " for text in known])) is False
    assert "was trained on documents of this text: it is not held out" in caplog.text


BOOK = [[f"In chapter {n} of the book, number {m} is told at length" for m in range(8)] for n in range(200)]
CUTS = {
    "chapters": [". ".join(chapter) + "." for chapter in BOOK],
    "sentences": [f"{sentence}." for chapter in BOOK for sentence in chapter],
    "lines": ["\n".join(chapter) for chapter in BOOK],
    "one book": [".\n\n".join(". ".join(chapter) for chapter in BOOK) + "."],
    "with a header": ["Copied from a page. " + ".  ".join(chapter) for chapter in BOOK],
}


@pytest.mark.parametrize(
    ("trained", "streamed"), [*((cut, False) for cut in CUTS), ("chapters", True), ("one book", True)]
)
def test_a_text_that_is_cut_into_other_documents_is_recognised(trained, streamed):
    settings = {"training": trained_on(rows(CUTS[trained]))}
    for cut in CUTS.values():
        documents = rows(cut).to_iterable_dataset() if streamed else rows(cut)
        assert is_held_out(settings, OTHER, documents) is False
        others = [text.replace("chapter", "part") for text in [*cut, "The end of the book is told at length."]]
        assert is_held_out(settings, OTHER, rows(others)) is not False


def test_sentences_that_many_documents_have_do_not_tell():
    known = [f"{text}. Thank you, and may God bless all of America. All rights are reserved here" for text in texts(90)]
    settings = {"training": trained_on(rows(known[:60]))}
    assert is_held_out(settings, OTHER, rows(known[60:])) is True


def test_too_few_documents_are_not_known():
    settings = {"training": trained_on(rows(texts(20 * SKETCH_SIZE, words=6)))}
    assert is_held_out(settings, OTHER, rows(["one new document"] * 40)) is None
    assert is_held_out(settings, OTHER, rows([f"new {number}" for number in range(2000)])) is True
    assert is_held_out(settings, OTHER, rows([None, " ", ""])) is None


@pytest.mark.parametrize("streamed", [False, True])
def test_documents_that_were_split_off_are_held_out(streamed):
    documents = rows(texts(5 * SKETCH_SIZE, words=6))
    documents = documents.to_iterable_dataset() if streamed else documents
    train, heldout = split_documents(documents, seed=3)
    settings = {"training": trained_on(train, seed=3)}
    text = TextOptions(["trained.txt"], streaming=streamed)
    assert is_held_out(settings, text, heldout, seed=3) is True
    assert is_held_out(settings, OTHER, heldout) is (None if streamed else True)  # the start of a stream is compared
    assert is_held_out(settings, OTHER, documents) is False
    assert is_held_out(settings, text, train) is False


def test_held_out_text_of_the_run_itself():
    own = sketch(OTHER, rows(texts(50)), 0)
    text = TextOptions(["a.txt"], heldout_dataset=["copy of a.txt"])
    before = {"training": trained_on(rows(["something else"]))}
    assert is_held_out(before, text, rows(texts(50)), 0, own) is False
    assert is_held_out(before, text, rows(["new"]), 0, own) is True
    assert is_held_out(before, TextOptions(["a.txt"]), rows(["new"]), 0, own) is True


@pytest.mark.parametrize(
    "changed",
    [
        {"hashes": ""}, {"hashes": "xyz"}, {"hashes": 7}, {"sentences": 7}, {"sentences": "x"},
        {"hashes": "0" * 15}, {"least": "x"}, {"least": None},
        {"complete": 1}, {"seed": "x"},
    ],
)  # fmt: skip
def test_a_sketch_that_is_none_tells_nothing(changed):
    made = trained_on(rows(texts(5)))
    made["sketch"] |= changed
    assert is_held_out({"training": made}, OTHER, rows(["new"])) is None


@pytest.mark.parametrize("made", [{}, {"training": {"text": {"dataset": []}}}, {"training": {"sketch": 7}}])
def test_text_is_held_out_only_if_every_run_has_a_sketch(made):
    assert is_held_out(made, OTHER, rows(["new"])) is None
    known = trained_on(rows(texts(5)))
    assert is_held_out({"training": known, "finetuning": [made.get("training", {})]}, OTHER, rows(["new"])) is None
    assert is_held_out({"training": known, "finetuning": [known]}, OTHER, rows(["new"])) is True

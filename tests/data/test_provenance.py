"""Was a text trained on? By the names of files and Hub datasets, and by how a text was split."""

from dataclasses import asdict

import pytest
from datasets import Dataset
from text_cases import texts

from mxd.data.documents import START_ROWS, split_documents
from mxd.data.provenance import (
    SKETCH_SIZE,
    TextPart,
    common,
    heldout_parts,
    is_held_out,
    recorded_parts,
    recorded_runs,
    seen_in_training,
    sketch,
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

    def seen(text, training, *finetunings):
        return seen_in_training({"training": training, "finetuning": list(finetunings)}, text, 5)

    assert seen(TextOptions([a, b]), run([a, b])) == []  # the same split
    assert seen(TextOptions([b, a]), run([a, b])) == [a, b]  # another order, another split
    assert seen(TextOptions([a, b], streaming=True), run([a, b])) == [a, b]
    assert seen(TextOptions([a]), run([a, b])) == [a]
    assert seen(TextOptions([a, b]), run([a, b]), run([b])) == [b]  # the fine-tuning split b alone
    assert seen(TextOptions(["ann/plays"], heldout_dataset=[a]), run([a])) == [a]
    assert seen(TextOptions(["ann/plays"]), run([a])) == []
    assert seen(TextOptions([a]), run([a], heldout_dataset=[b])) == [a]  # nothing was held out of it
    # Without a recorded seed of the training, each fine-tuning splits by its own.
    assert seen_in_training({"finetuning": [run([a])]}, TextOptions([a]), 3) == []
    assert seen_in_training({"finetuning": [run([a])]}, TextOptions([a]), 4) == [a]


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
    assert "was trained on documents of this text: the text is not held out" in caplog.text


BOOK = [[f"In chapter {n} of the book, number {m} is told at length" for m in range(8)] for n in range(200)]
CUTS = {
    "chapters": [". ".join(chapter) + "." for chapter in BOOK],
    "sentences": [f"{sentence}." for chapter in BOOK for sentence in chapter],
    "lines": ["\n".join(chapter) for chapter in BOOK],
    "one book": [".\n\n".join(". ".join(chapter) for chapter in BOOK) + "."],
    "with a header": ["Copied from a page. " + ".  ".join(chapter) for chapter in BOOK],
}


@pytest.mark.parametrize("trained", CUTS)
@pytest.mark.parametrize("streamed", [False, True])
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
    assert is_held_out(settings, text, heldout) is False  # all that has this name


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

import json
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import refused, run
from datasets import Dataset
from factories import byte_tokenizer, word_tokenizer

from mxd import ExpertsOptions, read_experts
from mxd.cli.tables import print_experts
from mxd.data.labelled_text import LabelledDocuments, cut_texts
from mxd.data.texts import document_batches, evaluation_batches
from mxd.experts import load_collection, save_collection
from mxd.experts.contexts import TokenPieces, distinct_places, in_context
from mxd.experts.streamed_tables import make_places
from mxd.jobs.expert_page import expert_page
from mxd.jobs.experts import experts_that_promote, open_experts


def test_a_random_sample_is_shown_and_written(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    config = tmp_path / "sample.yaml"
    config.write_text("sample: 5")
    code, output, error = run("experts", folder, "--tokens", "4096", "--examples", "3", "--config", config)
    assert code == 0, error
    assert "where experts are most active" in output and "experts.html" in output
    assert "experts: 100%" in error
    collection = load_collection(folder / "experts.safetensors")
    found = collection.layers[2]
    assert len(found.frequency) == 64 and collection.settings["tokens"] <= 4096
    shown = (folder / "experts.html").read_text()
    assert shown.count("<h2 ") == 5 and "<mark>" in shown and "evenly spaced" in shown
    named = [int(expert) for expert in re.findall(r"<h2 id=.2-(\d+)", shown)]
    assert (found.maximum[named] > 0).all()
    for expert in named:
        assert re.search(rf"│ +{expert} │", output)


@pytest.fixture(scope="module")
def collected(finished, tmp_path_factory):
    """A copy of the small decomposition with its collection."""
    folder = shutil.copytree(finished[0], tmp_path_factory.mktemp("collected") / "copy")
    read_experts(ExpertsOptions(decomposition=str(folder), tokens=4096, experts=[1]))
    return folder


@pytest.mark.parametrize("word", ["people", " people", "States"])
def test_experts_that_promote_a_word(collected, word):
    """Their directions promote the word more than others' do, and they are among those that promote what follows."""
    opened = open_experts(ExpertsOptions(decomposition=str(collected)))
    found, one = experts_that_promote(opened, 2, word), opened.collection.layers[2]
    token = opened.tokenizer(f"of {word.strip()}", add_special_tokens=False)["input_ids"][1]
    effects = opened.unembedding.effects(opened.decomposition.directions(2).direction)[found]
    counts = opened.collection.token_counts(effects.shape[1]).double()
    mean = (effects.double() @ counts) / counts.sum()
    spread = (((effects - mean[:, None]).square().double() @ counts) / counts.sum()).sqrt()
    promoted = (effects[:, token] - mean) / spread
    assert (promoted.diff() <= 1e-4).all() and promoted[0] > 0.5
    assert len(found) == -(-int((one.maximum > 0).sum()) // 2) and (one.maximum[found] > 0).all()
    others = [n for n in range(64) if n not in found and one.maximum[n] > 0]
    assert one.alignment[found].min() >= one.alignment[others].max() - 1e-4


def test_the_command_shows_experts_to_steer_by(collected, tmp_path):
    config = tmp_path / "sample.yaml"
    config.write_text("sample: 3")
    code, output, error = run("experts", collected, "--promotes", "people", "--config", config)
    assert code == 0, error
    assert output.count("alignment") == 3 and "alignment of its direction" in (collected / "experts.html").read_text()
    asked = {"decomposition": str(collected), "output": "-", "promotes": "people", "sample": 3}
    opened = open_experts(ExpertsOptions(decomposition=str(collected)))
    experts = read_experts(ExpertsOptions(**asked))["layers"]["2"]
    assert [*map(int, experts)] == experts_that_promote(opened, 2, "people")[:3]
    assert all(isinstance(one["alignment"], float) for one in experts.values())
    with pytest.raises(ValueError, match="the word has no token: leave out --promotes"):
        read_experts(ExpertsOptions(**{**asked, "promotes": " "}))


def no_pass(*_, **__):
    raise AssertionError("the text is read again")


def test_a_recorded_collection_is_read_again_if_it_fits(finished, tmp_path, monkeypatch, caplog):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    asked = {"decomposition": str(folder), "tokens": 2048, "examples": 3}
    first = read_experts(ExpertsOptions(**asked, experts=[3, 5]))
    written = (folder / "experts.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("mxd.jobs.experts.collect_experts", no_pass)
        again = read_experts(ExpertsOptions(**asked, experts=[5, 9]))
        assert again["layers"]["2"]["5"] == first["layers"]["2"]["5"]
        read_experts(ExpertsOptions(decomposition=str(folder), experts=[5]))  # no text is asked for
        beside = read_experts(ExpertsOptions(**asked, experts=[5], output="-"))
        assert beside["layers"]["2"]["5"] == first["layers"]["2"]["5"]
        for other in ({"tokens": 1024}, {"examples": 17}, {"context_length": 64}, {"overwrite": True}):
            with pytest.raises(AssertionError, match="read again"):
                read_experts(ExpertsOptions(**{**asked, **other}))
    assert (folder / "experts.safetensors").read_bytes() == written
    (folder / "experts.safetensors").write_bytes(written[:-5])
    read_experts(ExpertsOptions(**asked, experts=[5]))
    assert "experts.safetensors is refused" in caplog.text
    assert load_collection(folder / "experts.safetensors").settings["tokens"] == first["settings"]["tokens"]


def test_a_collection_of_another_decomposition_or_model_is_not_read(finished, tmp_path, caplog):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    asked = {"decomposition": str(folder), "tokens": 1024, "experts": [5]}
    read_experts(ExpertsOptions(**asked))
    path = folder / "experts.safetensors"
    collection = load_collection(path)
    save_collection(replace(collection, layers={3: collection.layers[2]}), path)
    read_experts(ExpertsOptions(**asked))
    assert "is not of layer 2 with 64 experts" in caplog.text
    save_collection(replace(collection, ids=collection.ids + 10**6), path)
    with pytest.raises(ValueError, match="another vocabulary: --overwrite"):
        read_experts(ExpertsOptions(**asked))


def test_experts_by_domain(finished, tmp_path):
    path = tmp_path / "kinds.jsonl"
    kinds = {"war": "The army and the navy of the war. ", "money": "The treasury spent dollars on roads. "}
    rows = [{"text": text * 40, "kind": kind} for kind, text in kinds.items() for _ in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = read_experts(
        ExpertsOptions(decomposition=str(finished[0]), dataset=[str(path)], by="kind", tokens=2048, output="-")
    )
    for found in results["layers"]["2"].values():
        assert list(found["domains"]) == ["money", "war"] and sum(found["domains"].values()) == pytest.approx(1)


def test_named_experts_of_some_text_in_another_folder(finished, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    output = str(tmp_path / "results")
    asked = {"decomposition": str(finished[0]), "dataset": [str(text)], "examples": 2, "output": output}
    active = list(map(int, read_experts(ExpertsOptions(**asked, sample=2))["layers"]["2"]))
    (experts,) = read_experts(ExpertsOptions(**asked, experts=active))["layers"].values()
    assert list(map(int, experts)) == active
    assert not (finished[0] / "experts.safetensors").exists() and (tmp_path / "results" / "experts.html").is_file()
    examples = [example for found in experts.values() for example in found["examples"]]
    assert examples
    for example in examples:
        assert example["token"].strip() in text.read_text()
        assert " ".join((example["before"] + example["token"] + example["after"]).split()[1:-1]) in text.read_text()


def test_what_strangers_wrote_is_no_markup():
    example = {"coefficient": 1.0, "before": "<script>", "token": "&", "after": "</td>"}
    settings = {"tokens": 9, "dataset": ["<i>.txt"]}
    shown = expert_page({"layers": {"<b>": {"1": {"frequency": 0.5, "examples": [example]}}}, "settings": settings})
    assert "9 tokens of &lt;i&gt;.txt" in shown
    weak = expert_page({"layers": {}, "settings": settings, "warning": "the dense part does the work in <b>"})
    assert "the dense part does the work in &lt;b&gt;" in weak
    assert (
        "<script>" not in shown and "&lt;script&gt;" in shown and "<mark>&amp;</mark>" in shown and "<b>" not in shown
    )


def test_an_expert_that_is_not_active_is_said_to_be_none(capsys):
    example = {"coefficient": 1.0, "before": "a ", "token": "b", "after": " c"}
    experts = {"12": {"frequency": 0.5, "examples": [example]}, "99": {"frequency": None, "examples": []}}
    results = {"layers": {"4": experts}, "settings": {"tokens": 9, "dataset": []}}
    print_experts(results)
    shown = capsys.readouterr().out
    assert "a [b] c" in shown
    rows = [row for row in shown.splitlines() if "not active in this text" in row]
    assert len(rows) == 1 and "99" in rows[0]
    assert expert_page(results).count("not active in this text") == 1


def test_experts_of_a_low_share_come_with_a_warning(finished, tmp_path, caplog):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for share, weak in ((0.02, True), (0.5, False)):
        evaluation["layers"]["2"]["expert_share"] = share
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        caplog.clear()
        results = read_experts(ExpertsOptions(decomposition=str(folder), experts=[1], tokens=512))
        for text in (results["warning"], (folder / "experts.html").read_text(), caplog.text):
            assert ("the dense part does the work" in text) == weak


def test_what_is_not_there(finished, monkeypatch, capsys):
    folder = finished[0]
    assert "has no expert 64: they are 0 to 63" in refused(monkeypatch, capsys, "experts", folder, "--experts", "1,64")
    assert "layer 99 is not in the decomposition" in refused(monkeypatch, capsys, "experts", folder, "--layer", "99")
    assert "--output" in refused(monkeypatch, capsys, "experts", "user/on-the-hub")


# --- contexts


@pytest.mark.parametrize("text", ["a 国家 b", "naïve café", "🎉 done 🎉", "日本語の文章です"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_token_inside_a_character_is_shown_with_all_of_it(text, bos):
    tokenizer = byte_tokenizer(["hello"], bos_token="<s>")
    row = [tokenizer.bos_token_id] * bos + tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = TokenPieces(tokenizer)
    shown = [in_context(pieces, row, position) for position in range(bos, len(row))]
    assert not any("\ufffd" in part for example in shown for part in example.values())
    assert {example["token"] for example in shown} == set(text)
    cut = [in_context(pieces, row[: 2 + bos], position) for position in range(bos, 2 + bos)]
    assert not any("\ufffd" in example[part] for example in cut for part in ("before", "after"))


def examples_of(rows, origins, count):
    """The coefficients of the contexts of an expert that is most active on the first of these rows, and so on."""
    values = torch.arange(len(rows), 0, -1)[None].float()
    places = make_places(torch.arange(len(rows)), torch.tensor(3))[None]
    (chosen,) = distinct_places(places, dict(enumerate(rows)), dict(enumerate(origins)), count)
    return [values[0, column] for column in chosen.tolist() if column >= 0]


def test_no_two_examples_share_their_context():
    one, two = list(range(1, 21)), list(range(30, 50))
    shifted = [50, 51, *one[:-2]]
    nearly = [one[0], 55, *one[2:]]
    found = examples_of([one, one, shifted, nearly, two], [0, 1, 2, 3, 4], 5)
    assert found == [5, 1]


@pytest.mark.parametrize(
    ("origins", "expected"),
    [
        ([0, 0, 1, 1, 2, 2], [6, 4, 2]),  # as many documents as examples: one of each
        ([0, 0, 0, 0, 1, 1], [6, 5, 2]),  # fewer
        ([0, 0, 0, 0, 0, 0], [6, 5, 4]),  # one book
    ],
)
def test_examples_are_of_distinct_documents(origins, expected):
    rows = torch.randperm(60).view(6, 10).tolist()
    assert examples_of(rows, origins, 3) == expected


def test_examples_of_documents(finished, tmp_path):
    path = tmp_path / "documents.jsonl"
    rng = random.Random(0)
    words = ["union", "state", "people", "war", "peace", "house", "senate", "president", "money", "law", "land"]
    stories = [f"story{n} " + " ".join(rng.choice(words) + f" story{n}" for _ in range(150)) for n in range(6)]
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in [*stories, *stories]))
    results = read_experts(
        ExpertsOptions(decomposition=str(finished[0]), dataset=[str(path)], examples=4, tokens=4096, output="-")
    )
    (experts,) = results["layers"].values()
    assert any(len(found["examples"]) > 1 for found in experts.values())
    for found in experts.values():
        contexts = ["".join(example[part] for part in ("before", "token", "after")) for example in found["examples"]]
        named = [tuple(sorted(set(re.findall(r"story\d", context)))) for context in contexts]
        assert len(set(named)) == len(named) and all(len(names) <= 1 for names in named)
        assert all(example["before"] for example in found["examples"])  # no first position


# --- which text is read


def trained_on(folder, path, **changes):
    """Write into a decomposition's folder that it was trained on this text."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    training = evaluation["settings"]["training"]
    training["text"] |= {"dataset": [str(path)], **changes}
    training["model"] = "user/another"
    (folder / "evaluation.json").write_text(json.dumps(evaluation))


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.jsonl"
    rows = [{"body": f"Chapter {n}. The people of the United States, {n} of them. " * 9} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("command", ["experts", "evaluate"])
def test_the_text_of_the_training_is_read(copy, book, caplog, command):
    trained_on(copy, book, text_column="body")
    code, output, error = run(command, copy, "--tokens", "1024")
    assert code == 0, error
    assert "book" in " ".join(output.split()) and "sample of mxd" not in output
    assert "small text" not in caplog.text
    if command == "experts":
        assert load_collection(copy / "experts.safetensors").settings["dataset"] == [str(book)]
        assert "book.jsonl" in (copy / "experts.html").read_text()
    else:
        evaluated = json.loads((copy / "evaluation.json").read_text())["settings"]["evaluation"]
        assert evaluated["dataset"] == [str(book)] and evaluated["held_out"] is not False  # documents held out of it


@pytest.mark.parametrize(
    ("command", "why"),
    [("evaluate", "gone"), ("evaluate", "nonsense"), *(("experts", why) for why in ("a stranger's", "not recorded"))],
)
def test_the_sample_is_read_with_a_warning(copy, book, caplog, command, why):
    trained_on(copy, {"gone": book.with_name("gone.jsonl")}.get(why, book))
    if why == "a stranger's":
        (copy / "run.yaml").unlink()
    if why in ("not recorded", "nonsense"):
        trained_on(copy, book, dataset=[] if why == "not recorded" else 3)
    code, output, error = run(command, copy, "--tokens", "256")
    assert code == 0, error
    assert "sample of mxd" in " ".join(output.replace("│", " ").split())
    assert "reads the small text that ships with mxd" in caplog.text
    assert ("is not read" in caplog.text) == (why != "not recorded")


def test_a_text_that_the_tokenizer_does_not_know_is_warned_of(caplog):
    tokenizer = word_tokenizer(20, bos_token="<s>")
    tokenizer.unk_token = "word0"
    known, unknown = (
        Dataset.from_dict({"text": ["word1 word2 " * 60]}),
        Dataset.from_dict({"text": ["国 家 word1 " * 60]}),
    )
    labelled = LabelledDocuments(np.array([unknown[0]["text"]] * 2), np.array(["a", "b"]), np.array(["0", "1"]))
    for read in (
        lambda text: document_batches(text, tokenizer, 16, 64),
        lambda text: evaluation_batches(text, tokenizer, 16, 64),
        lambda text: cut_texts(labelled, tokenizer, context_length=16) if text is unknown else None,
    ):
        caplog.clear()
        read(known)
        assert not caplog.records
        read(unknown)
        assert "of the tokens are unknown to the model's tokenizer" in caplog.text

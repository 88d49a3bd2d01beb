import json
import random
import shutil
import sys

import pytest
from commands import refused
from typer.testing import CliRunner

from mxd import ProbingOptions, probe
from mxd.cli.main import app
from mxd.jobs import probe as command
from mxd.modeling_mxd import MxDModel

TEXTS = {
    "numbers": lambda draw: " ".join(str(draw.randrange(1000)) for _ in range(20)),
    "shouting": lambda draw: " ".join(draw.choice(["FIRE", "HELP", "STOP", "RUN", "NO"]) for _ in range(40)),
    "prose": lambda draw: " ".join(
        draw.choice(["the", "of", "union", "we", "people", "have", "been", "and", "to", "year"]) for _ in range(40)
    ),
}


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """15 books of two chapters each, of three kinds."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("labelled") / "books.jsonl"
    rows = [
        {
            "body": TEXTS[kind](draw),
            "kind": kind,
            "book": f"{kind} {book}",
            "same": "x",
            "coin": f"side {draw.randrange(2)}",
        }
        for kind in TEXTS
        for book in range(5)
        for _ in range(2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def transcoder(finished, tmp_path_factory):
    """A transcoder of the same layer and base model, untrained."""
    config = MxDModel.from_pretrained(finished[0]).config
    config.method = "transcoder"
    folder = tmp_path_factory.mktemp("probe") / "transcoder"
    MxDModel(config).save_pretrained(folder)
    return folder


COLUMNS = ["--label-column", "kind", "--text-column", "body", "--group-column", "book"]


def test_probe_shows_and_saves(finished, transcoder, labelled, tmp_path, drawn_figures):
    folder, config = tmp_path / "out", tmp_path / "few.yaml"
    config.write_text("{candidates: 3, folds: 3}")
    arguments = [
        "probe",
        finished[0],
        transcoder,
        "--dataset",
        labelled,
        *COLUMNS,
        "--config",
        config,
        "--output",
        folder,
    ]
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    assert shown.exit_code == 0, shown.output
    output = shown.output
    for word in (
        "MLP input",
        "MLP neurons",
        "MLP output",
        "decomposition",
        "transcoder",
        "shouting",
        "k = 5",
        "(always yes)",
    ):
        assert word in output
    results = json.loads((folder / "probing.json").read_text())
    assert list(results["representations"]) == ["MLP input", "MLP neurons", "MLP output", "decomposition", "transcoder"]
    assert results["classes"] == {kind: {"texts": 10, "groups": 5} for kind in sorted(TEXTS)}
    assert results["always_yes_f1"] == pytest.approx(dict.fromkeys(TEXTS, 0.5))
    assert (folder / "probing.png").stat().st_size > 1000
    found = results["representations"]
    assert [found[name]["width"] for name in found] == [192, 512, 192, 64, 64]
    # Kinds of text as different as these are told apart by single neurons, and well by few experts of an hour's start.
    assert found["MLP neurons"]["f1"] > 0.9 and found["MLP input"]["k_sparse"]["5"] > 0.9
    assert f"{found['MLP neurons']['f1']:.3f} ±" in output
    settings = results["settings"]
    assert settings["layer"] == 2 and settings["pooling"] == "mean" and settings["seed"] == 0
    assert settings["methods"]["transcoder"]["method"] == "transcoder"
    assert settings["methods"]["decomposition"]["num_experts_per_tok"] == 4
    assert {"mxd", "scikit-learn", "torch"} <= set(settings["versions"])


def options(finished, labelled, tmp_path, **changes):
    values = {
        "decompositions": [str(finished[0])], "dataset": [str(labelled)], "label_column": "kind",
        "text_column": "body", "group_column": "book", "output": str(tmp_path / "out"), "against": [],
        "candidates": 3, "folds": 3,
    }  # fmt: skip
    return ProbingOptions(**{**values, **changes})


def test_same_seed_same_figures_and_folders_of_one_name_are_told_apart(finished, labelled, tmp_path):
    names = [str(shutil.copytree(finished[0], tmp_path / parent / "mxd")) for parent in "ab"]
    noise = {"label_column": "coin", "overwrite": True, "decompositions": names}
    first, again = (probe(options(finished, labelled, tmp_path, **noise)) for _ in range(2))
    found = first["representations"]
    assert first == again and list(found) == names and found[names[0]] == found[names[1]]
    noise["decompositions"] = names[:1]
    (other,) = probe(options(finished, labelled, tmp_path, seed=1, **noise))["representations"].values()
    assert other != found[names[0]]


def test_maxima_of_some_classes(finished, labelled, tmp_path):
    largest = probe(options(finished, labelled, tmp_path, pooling="max", classes=["prose", "numbers"]))
    assert set(largest["classes"]) == {"prose", "numbers"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label-column", "colour"], "has no column 'colour'"),
        (["--label-column", "same"], "has only x"),
        (["--group-column", "shelf"], "has no column 'shelf'"),
        (["--text-column", "words"], "has no column 'words'"),
        (["--classes", "prose"], "has only prose"),
        (["--classes", "prose,verse"], "has no class 'verse'"),
        (["--group-column", "kind"], "fewer documents than the 5 folds"),
        (["--layer", "0"], "not every decomposition has layer 0 (decomposition: 2)"),
        (["--layer", "two"], "is no whole number"),
        (["--dataset", "missing.parquet"], "missing.parquet"),
        (["{tmp}/nothing"], "is no folder with a decomposition"),
    ],
)
def test_bad_input_is_one_message(monkeypatch, capsys, tmp_path, finished, labelled, arguments, message):
    monkeypatch.setattr(command, "pool_features", lambda *_, **__: pytest.fail("the model read the texts"))
    places = {"tmp": tmp_path, "mxd": finished[0]}
    arguments = [argument.format(**places) for argument in arguments]
    base = [] if "--dataset" in arguments else ["--dataset", labelled]
    error = refused(
        monkeypatch, capsys, "probe", finished[0], *base, *COLUMNS, "--output", tmp_path / "out", *arguments
    )
    assert message in " ".join(error.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_decompositions_must_be_of_one_layer_and_model(monkeypatch, capsys, tmp_path, finished, labelled):
    config = MxDModel.from_pretrained(finished[0]).config
    for name, changes in {"other layer": {"layers": [3]}, "other base": {"base_model_name_or_path": "gpt2"},
                          "both": {"layers": [2, 3]}, "narrow": {"hidden_size": 8}}.items():  # fmt: skip
        changed = type(config).from_dict({**config.to_dict(), **changes})
        MxDModel(changed).save_pretrained(tmp_path / name)

    def error(*names, layer=()):
        places = [tmp_path / name if isinstance(name, str) else name for name in names]
        return refused(monkeypatch, capsys, "probe", *places, "--dataset", labelled, *COLUMNS, *layer)

    monkeypatch.setattr(command, "pool_features", lambda *_, **__: pytest.fail("the model read the texts"))
    assert "have no layer in common (decomposition: 2; other layer: 3)" in error(finished[0], "other layer")
    assert "have several layers: say which with --layer (both: 2, 3)" in error("both")
    assert "are not of one base model" in error(finished[0], "other base")
    assert "narrow: the MLP of layer 2 maps 192 to 192 dimensions" in error("narrow")


def test_every_decomposition_is_where_the_model_is(finished, transcoder, labelled, tmp_path, monkeypatch):
    moved, move = [], MxDModel.to
    monkeypatch.setattr(MxDModel, "to", lambda self, *where: moved.append(self.config.method) or move(self, *where))
    monkeypatch.setattr(command, "pool_features", lambda *_, **__: pytest.fail("far enough"))
    with pytest.raises(pytest.fail.Exception):
        probe(options(finished, labelled, tmp_path, decompositions=[str(finished[0]), str(transcoder)]))
    assert {"mxd", "transcoder"} <= set(moved)


def test_results_are_not_overwritten(finished, labelled, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "probing.json").write_text("mine")
    with pytest.raises(ValueError, match="exists: pass --overwrite"):
        probe(options(finished, labelled, tmp_path))
    with pytest.raises(ValueError, match="is a file"):
        probe(options(finished, labelled, tmp_path, output=str(labelled)))
    assert (tmp_path / "out" / "probing.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": []}, "probing needs labelled text: name it with --dataset"),
        ({"against": ["input", "soul"]}, "against must be among input, neurons, output, got input, soul"),
    ],
)
def test_options_are_checked_before_anything_is_read(finished, labelled, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(command, "load_decomposition", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=message):
        probe(options(finished, labelled, tmp_path, **changes))


def test_without_scikit_learn_it_says_what_to_install(monkeypatch, capsys, finished, labelled):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    error = refused(monkeypatch, capsys, "probe", finished[0], "--dataset", labelled, *COLUMNS)
    assert "pip install scikit-learn scipy" in error

import json
import shutil

import pytest
import torch
from commands import interrupted, refused, run
from transformers import AutoModelForCausalLM

from mxd import FinetuningOptions, demo, finetune
from mxd.jobs import finetune as command
from mxd.jobs.run_folder import START_NAME, Interrupted
from mxd.modeling_mxd import MxDModel
from mxd.trainers import FinetuningTrainer

FEW = {
    "tokens": 1024,
    "batch_tokens": 256,
    "evaluation_tokens": 256,
    "training": {"disable_tqdm": True, "statistics_tokens": 256, "save_steps": 100},
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="session")
def finetuned(finished, tmp_path_factory):
    """A fine-tuning of the small decomposition by the command: folder, what it started from, output, errors."""
    before = contents(finished[0])
    folder = tmp_path_factory.mktemp("finetune") / "finetuned"
    sizes = ["--tokens", "2500", "--batch-tokens", "512", "--evaluation-tokens", "1024"]
    code, output, error = run("finetune", finished[0], *sizes, "--output", folder)
    assert code == 0, error
    assert contents(finished[0]) == before
    return folder, finished[0], output, error


def test_a_base_whose_folder_is_elsewhere_now(monkeypatch, capsys, finished, tmp_path):
    moved = shutil.copytree(finished[0], tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
    (moved / "config.json").write_text(json.dumps(config))
    error = refused(monkeypatch, capsys, "finetune", moved, "--output", tmp_path / "out")
    assert "of the base model is not here: write into base_model_name_or_path" in " ".join(
        error.replace("│", " ").split()
    )


def test_finetune_leaves_a_folder_that_loads(finetuned):
    folder, source, output, error = finetuned
    names = {path.name for path in folder.iterdir() if path.suffix != ".py"}
    assert names == {path.name for path in source.iterdir() if path.suffix != ".py"}
    assert {path.name for path in (folder / "figures").iterdir()} == {"expert_frequency.png", "training_loss.png"}
    model, info = MxDModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.layer(2).expert_frequency.any()
    before = MxDModel.from_pretrained(source).directions(2)
    assert torch.equal(model.directions(2).direction, before.direction)
    assert not torch.equal(model.directions(2).maximum, before.maximum)  # measured anew
    assert model.direction_file.source == "auxiliary transcoder, before the last training"
    door = AutoModelForCausalLM.from_pretrained(folder, base_model_name_or_path=str(demo.model_path()))
    assert door.decomposition.config.layers == [2]
    for words in ("before → after", "NMSE", "dead", "specialised", "rise of cross-entropy", "recovered", "KL"):
        assert words in output
    assert "finetune" in error and "tok/s" in error


def test_both_evaluations_are_kept(finetuned):
    folder, source, output, _ = finetuned
    results, earlier = (json.loads((path / "evaluation.json").read_text()) for path in (folder, source))
    assert results.keys() == earlier.keys()
    assert results["settings"]["training"] == earlier["settings"]["training"]
    (finetuning,) = results["settings"]["finetuning"]
    assert finetuning["decomposition"] == str(source)
    assert (finetuning["loss"], finetuning["tokens_trained"], finetuning["seed"]) == ("kl", 2048, 0)
    assert {
        "learning_rate",
        "nmse_weight",
        "seconds",
        "versions",
        "batch_tokens",
        "text",
        "training",
    } <= finetuning.keys()
    before = finetuning["before"]
    # The same text and model as in the earlier evaluation; the shares are measured anew, on a few tokens.
    intervals = [results["cross_entropy"].pop("rise_interval") for results in (before, earlier)]
    assert intervals[0] == pytest.approx(intervals[1], rel=1e-4, abs=1e-6)
    assert before["cross_entropy"] == pytest.approx(earlier["cross_entropy"], rel=1e-5, abs=1e-6)
    assert before["layers"]["2"] == pytest.approx(earlier["layers"]["2"], rel=5e-2)
    assert results["kl"] < before["kl"]
    assert f"{before['kl']:.4f} → {results['kl']:.4f}" in output


def test_measuring_again_keeps_how_it_was_made(finetuned):
    folder = finetuned[0]
    before = json.loads((folder / "evaluation.json").read_text())
    code, output, error = run("evaluate", folder, "--tokens", "1024", "--output", "-")
    assert code == 0, error
    after = json.loads(output)
    assert after["layers"]["2"] == pytest.approx(before["layers"]["2"], rel=1e-5)
    assert after["kl"] == pytest.approx(before["kl"], rel=1e-4)
    assert after["settings"]["finetuning"] == before["settings"]["finetuning"]


def test_a_second_fine_tuning_follows_the_first(finetuned, tmp_path):
    options = FinetuningOptions(
        decomposition=str(finetuned[0]), loss="cross_entropy", output=str(tmp_path / "twice"), **FEW
    )
    first, second = finetune(options)["settings"]["finetuning"]
    assert (first["loss"], second["loss"]) == ("kl", "cross_entropy")
    assert second["decomposition"] == str(finetuned[0])


@pytest.fixture
def interrupts(monkeypatch):
    """Makes the next fine-tuning be interrupted in its second step."""
    with monkeypatch.context() as patched:
        patched.setattr(command, "FinetuningTrainer", interrupted(FinetuningTrainer))
        yield patched


def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path, interrupts):
    def options(folder, **changes):
        values = {**FEW, "decomposition": str(finished[0]), "output": str(tmp_path / folder)}
        return FinetuningOptions(**{**values, **changes})

    with pytest.raises(Interrupted, match=r"interrupted at step 2 of 4.*--resume"):
        finetune(options("halved"))
    interrupts.undo()
    assert (tmp_path / "halved" / "checkpoint-2").is_dir()
    for changed in (
        {"loss": "cross_entropy"},
        {"decomposition": str(tmp_path / "another")},
        {"evaluation_tokens": 512},  # the figures from before are of 256
    ):
        name = next(iter(changed))
        with pytest.raises(ValueError, match=f"had {name} .*resume with the options of that run"):
            finetune(options("halved", resume=True, **changed))
    resumed, whole = finetune(options("halved", resume=True)), finetune(options("whole"))
    files = {folder: contents(tmp_path / folder) for folder in ("halved", "whole")}
    assert files["halved"]["model.safetensors"] == files["whole"]["model.safetensors"]
    assert files["halved"].keys() == files["whole"].keys()
    assert START_NAME not in files["whole"]
    assert not list(tmp_path.glob("*/checkpoint-*"))
    assert resumed["layers"] == whole["layers"]
    assert resumed["settings"]["finetuning"][0]["before"] == whole["settings"]["finetuning"][0]["before"]


class Seen(Exception):
    """Stands for all that follows what a test looks at."""


@pytest.mark.parametrize(
    ("training", "expected"), [({"seed": 5}, 5), ({}, 7), (None, 7), ({"seed": -5}, 7), ({"seed": "5"}, 7)]
)
def test_documents_are_split_as_where_the_decomposition_was_trained(
    finished, tmp_path, monkeypatch, training, expected
):
    def load(text, seed):
        raise Seen(seed)

    source = shutil.copytree(finished[0], tmp_path / "source")
    evaluation = json.loads((source / "evaluation.json").read_text())
    evaluation["settings"] = {} if training is None else {"training": training}
    (source / "evaluation.json").write_text(json.dumps(evaluation))
    monkeypatch.setattr(command, "load_documents", load)
    with pytest.raises(Seen) as seen:
        finetune(FinetuningOptions(decomposition=str(source), output=str(tmp_path / "out"), seed=7, **FEW))
    assert seen.value.args == (expected,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/missing"], "no folder with a decomposition"),
        (["{model}"], "holds a model, but no decomposition"),
        (["{tmp}/empty"], "there is no config.json"),
        (["{mxd}", "--output", "{mxd}", "--overwrite"], "must be two folders"),
        (["{mxd}", "--output", "{mxd}/inside"], "must be two folders"),
        (["{mxd}", "--tokens", "lots"], "is no number of tokens"),
        (["{mxd}", "--loss", "mse"], "'mse' is not one of kl, cross_entropy"),
        (["{mxd}", "--dataset", "missing.parquet"], "missing.parquet"),
        (["{mxd}", "--dtype", "int8"], "dtype must be one of"),
    ],
)
def test_bad_input_is_one_message(monkeypatch, capsys, tmp_path, finished, arguments, message):
    before = contents(finished[0])
    (tmp_path / "empty").mkdir()
    places = {"tmp": tmp_path, "model": demo.model_path(), "mxd": finished[0]}
    arguments = [argument.format(**places) for argument in arguments]
    if "--output" not in arguments:
        arguments += ["--output", str(tmp_path / "out")]
    error = refused(monkeypatch, capsys, "finetune", *arguments)
    assert message in " ".join(error.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
    assert contents(finished[0]) == before


def test_an_output_that_is_not_empty(monkeypatch, capsys, tmp_path, finished):
    (tmp_path / "thesis.txt").write_text("years of work")
    error = refused(monkeypatch, capsys, "finetune", finished[0], "--output", tmp_path)
    assert "is not empty: pass --overwrite" in error
    assert "will not delete" in refused(
        monkeypatch, capsys, "finetune", finished[0], "--output", tmp_path, "--overwrite"
    )
    assert (tmp_path / "thesis.txt").is_file()

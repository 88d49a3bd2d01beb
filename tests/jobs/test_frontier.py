"""The frontier on the embedded model."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import Interrupt, refused, run

from mxd import DistillationTrainer, FrontierOptions, load_base_model, measure_frontier
from mxd.data.texts import evaluation_batches, load_documents
from mxd.evaluation import faithfulness, load_evaluation
from mxd.jobs import frontier
from mxd.jobs.frontier import point_options
from mxd.jobs.run_folder import Interrupted, TrainingFailed
from mxd.modeling_mxd import MxDModel

SMALL = {"match_transcoder": 8, "tokens": 1024, "batch_tokens": 256, "evaluation_tokens": 256}
FLAGS = ["--match-transcoder", "8", "--tokens", "1024", "--batch-tokens", "256", "--evaluation-tokens", "256"]


def options(folder, **changes):
    values = {"methods": ["mxd"], "num_experts_per_tok": [2, 4], **SMALL, **changes}
    return FrontierOptions(output=str(folder), **values)


def measured(folder, **changes):
    return measure_frontier(options(folder, **changes), progress=False)


@pytest.fixture
def trained(monkeypatch):
    """Names of the points that are trained, in their order."""
    names, train = [], DistillationTrainer.train

    def noted(self, **how):
        names.append(self.args.output_dir.rpartition("/")[2])
        return train(self, **how)

    monkeypatch.setattr(DistillationTrainer, "train", noted)
    return names


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier") / "out"
    methods = "mxd,skip-transcoder"
    code, output, error = run("frontier", "-k", "4", "--methods", methods, *FLAGS, "--output", folder)
    assert code == 0, error
    return folder, output, error


@pytest.fixture(scope="module")
def point(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier") / "out"
    measured(folder, num_experts_per_tok=[2])
    return folder


@pytest.fixture
def copied(point, tmp_path):
    """A frontier whose only point, of K = 2, is finished: its folder, and its results."""
    folder = shutil.copytree(point, tmp_path / "out")
    return folder, json.loads((folder / "frontier.json").read_text())


def test_the_command_leaves_results_figure_and_decompositions(made):
    folder, output, error = made
    assert {path.name for path in folder.iterdir()} == {
        "frontier.json", "frontier.png", "recording", "run.yaml", "points",
    }  # fmt: skip
    assert "skip transcoder" in output and "2/2" in error and "tok/s" in error
    results = json.loads((folder / "frontier.json").read_text())
    mxd, skip = results["points"]
    assert (mxd["name"], skip["name"]) == ("mxd-k4", "skip-transcoder-k4")
    # Equal budgets, to a few rows of either.
    assert mxd["parameters"] == pytest.approx(skip["parameters"], rel=2e-3)
    assert (mxd["learning_rate"], skip["learning_rate"]) == (1e-3, 3e-3)
    for point in (mxd, skip):
        loss = point["cross_entropy"]
        assert loss["untouched"] == results["untouched"] and loss["zero_ablated"] == results["zero_ablated"]
        assert loss["rise_interval"][0] < loss["rise"] < loss["rise_interval"][1]
        assert {"nmse", "dead_experts", "expert_share", "specialised_share", "clipped_expert_share"} <= set(
            point["layers"]["2"]
        )
        assert point["tokens_trained"] == 1024 and point["kl"] > 0
    assert results["settings"]["tokens_recorded"] == 1024


def test_a_points_folder_is_a_decomposition_with_the_figures_of_the_frontier(made):
    folder = made[0] / "points" / "mxd-k4"
    point = json.loads((made[0] / "frontier.json").read_text())["points"][0]
    evaluation = load_evaluation(folder)
    assert evaluation["cross_entropy"] == point["cross_entropy"]
    assert evaluation["settings"]["training"]["training"]["num_train_epochs"] == 1
    decomposition = MxDModel.from_pretrained(folder)
    model, tokenizer, _ = load_base_model(decomposition.config.base_model_name_or_path)
    asked = options(made[0])
    heldout = evaluation_batches(load_documents(asked.text, asked.seed)[1], tokenizer, 128, 256)
    again = faithfulness(model, decomposition, heldout)
    assert again["cross_entropy"]["spliced"] == pytest.approx(point["cross_entropy"]["spliced"], rel=1e-6)
    assert again["layers"]["2"]["nmse"] == pytest.approx(point["layers"]["2"]["nmse"], rel=1e-4)


def test_what_is_finished_is_not_done_again(copied, trained):
    folder, first = copied
    recorded = {path.name: path.stat().st_mtime_ns for path in (folder / "recording").glob("*.bin")}
    assert measured(folder, num_experts_per_tok=[2])["points"] == first["points"] and not trained
    # Defaults count as settings: those of another version may differ.
    settings = json.loads((folder / "points" / "mxd-k2.json").read_text())["settings"]
    assert {"min_mean_ablation_error", "gate_init", "learning_rate", "mxd"} <= settings.keys()
    # Other settings of the training: these points anew, from the same recording.
    with pytest.raises(
        ValueError, match=r"mxd-k2\.json is finished, with training\.num_train_epochs 1, not 2: --overwrite"
    ):
        measured(folder, num_train_epochs=2, num_experts_per_tok=[2])
    more = measured(folder, num_train_epochs=2, num_experts_per_tok=[2], overwrite=True)
    assert trained == ["mxd-k2"] and more["points"][0]["tokens_trained"] == 2048
    assert more["points"][0]["layers"] != first["points"][0]["layers"]
    assert recorded == {path.name: path.stat().st_mtime_ns for path in (folder / "recording").glob("*.bin")}


def test_on_other_text_a_decomposition_is_only_measured_again(copied, trained):
    folder, results = copied
    before = results["points"][0]
    after = measured(folder, num_experts_per_tok=[2], evaluation_tokens=512)["points"][0]
    assert not trained
    assert (before["evaluated_tokens"], after["evaluated_tokens"]) == (256, 512)
    assert after["cross_entropy"] != before["cross_entropy"] and after["seconds"] == before["seconds"]


def test_an_interrupt_loses_only_the_point_at_work_and_one_that_fails_keeps_no_other_from_being_made(
    copied, trained, monkeypatch
):
    (folder, first), measure = copied, faithfulness

    def interrupted(*args, **kwargs):
        return DistillationTrainer(*args, callbacks=[Interrupt()], **kwargs)

    def fails(model, decomposition, *args, **kwargs):
        if decomposition.config.num_experts_per_tok == 4:
            raise MemoryError("too large")
        return measure(model, decomposition, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(frontier, "DistillationTrainer", interrupted)
        with pytest.raises(Interrupted, match="1 of 2 points finished, which are kept: run the same command"):
            measured(folder)
    with monkeypatch.context() as patched:
        patched.setattr(frontier, "faithfulness", fails)
        with pytest.raises(ValueError, match=r"1 of 2 points failed.*mxd-k4 \(MemoryError: too large\)"):
            measured(folder, num_experts_per_tok=[2, 4, 6])
    points = json.loads((folder / "frontier.json").read_text())["points"]
    assert [point["name"] for point in points] == ["mxd-k2", "mxd-k6"] and points[0] == first["points"][0]
    # The one that was trained and not measured is only measured now; those made before with its settings are shown too.
    points = measured(folder, num_experts_per_tok=[4])["points"]
    assert [point["name"] for point in points] == ["mxd-k2", "mxd-k4", "mxd-k6"]
    assert trained == ["mxd-k4", "mxd-k4", "mxd-k6"]


def test_a_point_whose_training_fails_is_said_to_fail_for_the_cause_and_not_to_be_resumable(monkeypatch):
    def fails(*_):
        raise TrainingFailed("run again with --resume") from ConnectionError("the Hub is gone")

    monkeypatch.setattr(frontier, "_run_point", fails)
    point, shared = SimpleNamespace(folder=Path("mxd-k2")), SimpleNamespace(progress=False)
    with pytest.raises(ValueError, match=r"mxd-k2 \(ConnectionError: the Hub is gone\)") as failed:
        frontier._run([point], 1, shared, lambda: None)
    assert "--resume" not in str(failed.value)


def test_the_tokens_of_a_short_last_batch_are_not_counted_as_a_whole_one(tmp_path):
    (row,) = measured(tmp_path / "out", tokens=256 + 128, num_train_epochs=2, num_experts_per_tok=[2])["points"]
    assert row["tokens_trained"] == 2 * (256 + 128)
    evaluation = load_evaluation(tmp_path / "out" / "points" / "mxd-k2")
    assert evaluation["settings"]["training"]["tokens_trained"] == row["tokens_trained"]


def test_another_text_is_refused_unless_it_shall_replace(copied, tmp_path, trained):
    text, heldout = tmp_path / "text.txt", tmp_path / "heldout.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 600)
    heldout.write_text("It is a truth universally acknowledged. " * 200)
    changes = {"num_experts_per_tok": [2], "dataset": [str(text)], "heldout_dataset": [str(heldout)]}
    with pytest.raises(ValueError, match=r"mxd-k2\.json is finished, with another text: --overwrite"):
        measured(tmp_path / "out", **changes)
    assert (tmp_path / "out" / "points" / "mxd-k2.json").is_file()
    measured(tmp_path / "out", overwrite=True, **changes)
    assert trained == ["mxd-k2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "mxd,sae"], "methods must be among mxd, transcoder, skip_transcoder, got 'sae'"),
        (["-k", "four"], "is no list of numbers"),
        (["-k", "4,99999"], "num_experts_per_tok (99999) must not exceed num_experts"),
        (["--layers", "99"], "layer 99 is out of range"),
    ],
)
def test_bad_input_is_one_message(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.setattr(frontier, "load_base_model", lambda *_, **__: pytest.fail("weights were loaded"))
    error = refused(monkeypatch, capsys, "frontier", *FLAGS, "--output", tmp_path / "out", *arguments)
    assert message in " ".join(error.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds 'thesis.txt', which is of no frontier"):
        measured(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        measured(tmp_path / "thesis.txt")


def test_learning_rates_are_those_of_decompose(tmp_path):
    with pytest.raises(ValueError, match="learning_rates must be among"):
        options(tmp_path, learning_rates={"sae": 1.0})
    chosen = options(tmp_path, learning_rates={"transcoder": 0.004}, bf16=True)
    points = [point_options(chosen, method, 4) for method in ("mxd", "transcoder", "skip_transcoder")]
    assert [point.learning_rate for point in points] == [1e-3, 0.004, 3e-3]
    assert all(point.trainer_arguments()["bf16"] for point in points)

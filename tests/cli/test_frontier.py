"""The frontier on the embedded model. Points run in this process, save where a test is of the processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from commands import killed_at_the_end, refused, run

from mxd import FrontierOptions, TextOptions, load_base_model, measure_frontier
from mxd.evaluation import faithfulness, load_evaluation
from mxd.jobs import frontier_point, frontier_processes
from mxd.jobs.frontier import _decomposition_options
from mxd.jobs.frontier_processes import FrontierError
from mxd.jobs.runs import Interrupted
from mxd.modeling_mxd import MxDModel

SMALL = {"match_transcoder": 8, "tokens": 4096, "batch_tokens": 1024, "evaluation_tokens": 1024}
FLAGS = ["--match-transcoder", "8", "--tokens", "4096", "--batch-tokens", "1024", "--evaluation-tokens", "1024"]


class Inline:
    """Stands for the process of a point: it is run when it is first asked whether it has ended."""

    def __init__(self, point):
        self.point, self.returncode, self.killed = point, None, False

    def poll(self):
        if self.returncode is None:
            job = json.loads(self.point.job())
            frontier_point.run_point(self.point.root, frontier_point.options_of(job), job["settings"])
            self.returncode = 0
        return self.returncode

    def kill(self):
        self.killed = True

    def wait(self):
        pass


class Started(list):
    """Names of the points that were started, and what becomes of some of them instead."""

    def __init__(self):
        self.instead, self.processes = {}, []


@pytest.fixture
def started(monkeypatch):
    names = Started()

    def start(point, jobs):
        frontier_point.clear(point)
        names.append(point.name)
        names.processes.append(names.instead.get(point.name, Inline)(point))
        return names.processes[-1]

    monkeypatch.setattr(frontier_processes, "start", start)
    monkeypatch.setattr(frontier_processes, "_POLL_SECONDS", 0)
    return names


def options(folder, **changes):
    values = {"methods": ["mxd"], "num_experts_per_tok": [2, 4], **SMALL, **changes}
    return FrontierOptions(output=str(folder), **values)


def measured(folder, **changes):
    return measure_frontier(options(folder, **changes), progress=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By the command, its points in processes of their own."""
    folder = tmp_path_factory.mktemp("frontier") / "out"
    methods = "mxd,skip-transcoder"
    code, output, error = run("frontier", "--k", "4", "--methods", methods, *FLAGS, "--jobs", "2", "--output", folder)
    assert code == 0, error
    return folder, output, error


def test_the_command_leaves_results_figure_and_decompositions(made):
    folder, output, error = made
    assert {path.name for path in folder.iterdir()} == {
        "frontier.json", "frontier.png", "recording", "heldout", "points",
    }  # fmt: skip
    assert "skip transcoder" in output and "2 of 2 points" in error and "tok/s" in error
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
        assert point["tokens_trained"] == 4096 and point["kl"] > 0
    assert results["settings"]["tokens_recorded"] == 4096


def test_a_points_folder_is_a_decomposition_with_the_figures_of_the_frontier(made):
    folder = made[0] / "points" / "mxd-k4"
    point = json.loads((made[0] / "frontier.json").read_text())["points"][0]
    evaluation = load_evaluation(folder)
    assert evaluation["cross_entropy"] == point["cross_entropy"]
    assert evaluation["settings"]["training"]["training"]["num_train_epochs"] == 1
    decomposition = MxDModel.from_pretrained(folder)
    model, _, _ = load_base_model(decomposition.config.base_model_name_or_path)
    again = faithfulness(model, decomposition, frontier_point.heldout_batches(made[0] / "heldout"))
    assert again["cross_entropy"]["spliced"] == pytest.approx(point["cross_entropy"]["spliced"], rel=1e-6)
    assert again["layers"]["2"]["nmse"] == pytest.approx(point["layers"]["2"]["nmse"], rel=1e-4)


def test_what_is_finished_is_not_done_again(tmp_path, started, monkeypatch):
    first = measured(tmp_path / "out", num_experts_per_tok=[2])
    recorded = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "recording").iterdir()}
    both = measured(tmp_path / "out")
    assert started == ["mxd-k2", "mxd-k4"]
    assert both["points"][0] == first["points"][0] and len(both["points"]) == 2
    # What was made there before with the same settings is shown too.
    assert measured(tmp_path / "out", num_experts_per_tok=[4])["points"] == both["points"]
    assert recorded == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "recording").iterdir()}
    # Defaults count as settings: another version's may be others.
    settings = json.loads((tmp_path / "out" / "points" / "mxd-k2.json").read_text())["settings"]
    assert {"min_mean_ablation_error", "gate_init", "learning_rate"} <= settings["training"].keys()
    # Other settings of the training: these points anew, from the same recording.
    with pytest.raises(ValueError, match=r"mxd-k2\.json is finished, with num_train_epochs 1, not 2: --overwrite"):
        measured(tmp_path / "out", num_train_epochs=2, num_experts_per_tok=[2])
    more = measured(tmp_path / "out", num_train_epochs=2, num_experts_per_tok=[2], overwrite=True)
    assert started[2:] == ["mxd-k2"] and more["points"][0]["tokens_trained"] == 8192
    assert more["points"][0]["layers"] != first["points"][0]["layers"]
    assert recorded == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "recording").iterdir()}


def test_on_other_text_a_decomposition_is_only_measured_again(tmp_path, started):
    before = measured(tmp_path / "out", num_experts_per_tok=[2])["points"][0]
    weights = tmp_path / "out" / "points" / "mxd-k2" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    after = measured(tmp_path / "out", num_experts_per_tok=[2], evaluation_tokens=2048)["points"][0]
    assert len(started) == 2 and weights.stat().st_mtime_ns == written
    assert (before["evaluated_tokens"], after["evaluated_tokens"]) == (1024, 2048)
    assert after["cross_entropy"] != before["cross_entropy"] and after["seconds"] == before["seconds"]
    again = measured(tmp_path / "out", num_experts_per_tok=[2])["points"][0]
    assert again["cross_entropy"] == before["cross_entropy"] and len(started) == 3


def test_without_the_decompositions(tmp_path, started):
    results = measured(tmp_path / "out", num_experts_per_tok=[2], save=False)
    assert {path.name for path in (tmp_path / "out" / "points").iterdir()} == {"mxd-k2.json"}
    assert measured(tmp_path / "out", num_experts_per_tok=[2], save=False) == results and len(started) == 1


class Failing(Inline):
    def poll(self):
        self.returncode = 1
        self.point.file(".log").write_text("Traceback\nRuntimeError: the third wheel fell off\n")
        return 1


def test_a_point_that_fails_keeps_no_other_from_being_made(tmp_path, started):
    started.instead = {"mxd-k2": Failing}
    with pytest.raises(FrontierError, match=r"1 of 2 points failed.*mxd-k2 \(exit code 1: .*third wheel.*mxd-k2.log"):
        measured(tmp_path / "out")
    (point,) = json.loads((tmp_path / "out" / "frontier.json").read_text())["points"]
    assert point["name"] == "mxd-k4"
    started.instead = {}
    assert [point["name"] for point in measured(tmp_path / "out")["points"]] == ["mxd-k2", "mxd-k4"]
    assert started == ["mxd-k2", "mxd-k4", "mxd-k2"]


class Unmeasured(Inline):
    """A point that trains and then fails."""

    def poll(self):
        def fails(*args, **kwargs):
            raise MemoryError

        with pytest.MonkeyPatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(frontier_point, "faithfulness", fails)
            super().poll()
        self.returncode = 1
        self.point.file(".log").write_text("MemoryError\n")
        return 1


def test_what_is_trained_and_could_not_be_measured_is_only_measured_again(tmp_path, started, monkeypatch):
    started.instead = {"mxd-k2": Unmeasured}
    with pytest.raises(FrontierError, match=r"mxd-k2 .*MemoryError"):
        measured(tmp_path / "out", num_experts_per_tok=[2])
    point = started.processes[0].point
    assert json.loads(point.file(".json").read_text()) == {"settings": point.settings, "results": None}
    assert point.trained() and point.finished() is None
    started.instead = {}
    monkeypatch.setattr(frontier_point, "ReplayTrainer", lambda *args: pytest.fail("it was trained again"))
    (row,) = measured(tmp_path / "out", num_experts_per_tok=[2])["points"]
    assert started == ["mxd-k2", "mxd-k2"]
    assert row["tokens_trained"] == 4096 and row["learning_rate"] == 1e-3 and row["cross_entropy"]["rise"]


def test_the_tokens_of_a_short_last_batch_are_not_counted_as_a_whole_one(tmp_path, started):
    changes = {"tokens": 4096 + 512, "num_train_epochs": 2, "num_experts_per_tok": [2]}
    (row,) = measured(tmp_path / "out", **changes)["points"]
    assert row["tokens_trained"] == 2 * (4096 + 512)
    evaluation = load_evaluation(tmp_path / "out" / "points" / "mxd-k2")
    assert evaluation["settings"]["training"]["tokens_trained"] == row["tokens_trained"]


class Interrupting(Inline):
    def poll(self):
        raise KeyboardInterrupt


def test_an_interrupt_loses_only_the_points_at_work(tmp_path, started):
    started.instead = {"mxd-k4": Interrupting}
    with pytest.raises(Interrupted, match="1 of 2 points finished, which are kept"):
        measured(tmp_path / "out")
    assert [process.killed for process in started.processes] == [False, True]
    assert (tmp_path / "out" / "points" / "mxd-k2.json").is_file()
    started.instead = {}
    assert len(measured(tmp_path / "out")["points"]) == 2
    assert started == ["mxd-k2", "mxd-k4", "mxd-k4"]


def test_ctrl_c_ends_the_processes(tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "mxd", "frontier", "--k", "4", *FLAGS, "--epochs", "1000", "--output", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
        # Tests that run in the background ignore it, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:
        deadline, at_work = time.monotonic() + 300, folder / "points" / "mxd-k4.progress"
        with killed_at_the_end(process):
            while not at_work.exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130, error
    assert "0 of 3 points finished" in error and "Traceback" not in error
    time.sleep(4)  # a point that lived on would say how far it is
    assert not at_work.exists()


def test_a_point_ends_with_its_parent(monkeypatch):
    ended, (read, write) = threading.Event(), os.pipe()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    frontier_point.exit_at_end_of(read)
    assert not ended.wait(0.1)
    os.close(write)
    assert ended.wait(5)


def test_another_text_is_refused_unless_it_shall_replace(tmp_path, started):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 600)
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("It is a truth universally acknowledged. " * 200)
    measured(tmp_path / "out", num_experts_per_tok=[2])
    changes = {"num_experts_per_tok": [2], "text": TextOptions([str(text)], [str(heldout)])}
    with pytest.raises(ValueError, match=r"mxd-k2\.json is finished, with another text: --overwrite"):
        measured(tmp_path / "out", **changes)
    assert (tmp_path / "out" / "points" / "mxd-k2.json").is_file()
    measured(tmp_path / "out", overwrite=True, **changes)
    assert started == ["mxd-k2", "mxd-k2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "mxd,sae"], "methods must be among mxd, transcoder, skip_transcoder, got 'sae'"),
        (["--k", "4,4"], "must name at least one, and none twice"),
        (["--k", "four"], "is no list of numbers"),
        (["--k", "4,99999"], "num_experts_per_tok (99999) must not exceed num_experts"),
        (["--layers", "99"], "layer 99 is out of range"),
        (["--learning-rates", "sae=1"], "learning_rates is by method"),
        (["--learning-rates", "mxd"], "is no list of learning rates"),
        (["--learning-rates", "mxd=-1"], "learning_rate must be a finite number from 0, got -1.0"),
        (["--teacher-dtype", "int8"], "teacher_dtype must be one of"),
    ],
)
def test_bad_input_is_one_message(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.setattr("mxd.jobs.frontier.load_base_model", lambda *_, **__: pytest.fail("weights were loaded"))
    error = refused(monkeypatch, capsys, "frontier", *FLAGS, "--output", tmp_path / "out", *arguments)
    assert message in " ".join(error.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds 'thesis.txt', which is of no frontier"):
        measured(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        measured(tmp_path / "thesis.txt")


def test_a_disk_that_is_too_full_is_told_of_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(ValueError, match="the frontier, its recording and its decompositions, takes"):
        measured(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_learning_rates_are_those_of_decompose(tmp_path):
    chosen = options(tmp_path, learning_rates={"transcoder": 0.004}, training={"bf16": True})
    trainings = [
        _decomposition_options(chosen, tmp_path, None, method, 4).training
        for method in ("mxd", "transcoder", "skip_transcoder")
    ]
    assert [training["learning_rate"] for training in trainings] == [1e-3, 0.004, 3e-3]
    assert all(training["bf16"] for training in trainings)

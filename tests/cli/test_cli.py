import errno
import importlib
import json
import os
import re
import shutil
import signal
import sys
import time

import pytest
import torch
import warm_process
from commands import refused, run
from safetensors.torch import load_file

from mxd import EvaluationOptions, demo, evaluate
from mxd.cli import main as cli
from mxd.data.texts import TextOptions, warn_of_embedded_text
from mxd.jobs import decompose as decompose_job
from mxd.jobs.decompositions import load_base_and_text
from mxd.jobs.run_folder import TrainingFailed
from mxd.modeling_mxd import MxDModel


def evaluated(folder, **changes):
    return evaluate(EvaluationOptions(decomposition=str(folder), **changes))


def test_decompose_leaves_a_folder_that_loads(finished):
    folder, output, error = finished
    names = {path.name for path in folder.iterdir() if path.suffix != ".py"}
    assert names == {
        "config.json",
        "directions.safetensors",
        "evaluation.json",
        "figures",
        "model.safetensors",
        "run.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_arguments.json",
        "training_log.json",
    }
    assert {path.name for path in (folder / "figures").iterdir()} == {"expert_frequency.png", "training_loss.png"}
    model, info = MxDModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.base_model_name_or_path == demo.MODEL_NAME
    for word in ("NMSE", "FVU", "L0", "dead", "specialised", "zero-ablated", "recovered", "mxd evaluate"):
        assert word in output
    assert "tok/s" in error
    for phase in ("Loading weights", "calibrate", "init", "distil layer 2", "statistics", "evaluate"):
        assert f"{phase}: 100%" in error, phase


def test_evaluation_is_complete(finished):
    results = json.loads((finished[0] / "evaluation.json").read_text())
    (layer,) = results["layers"].values()
    assert {"nmse", "fvu", "l0", "dead_experts", "expert_share", "specialised_share"} <= set(layer)
    assert {"expert_entropy", "max_expert_frequency"} <= set(layer)
    loss = results["cross_entropy"]
    assert set(loss) == {"untouched", "spliced", "zero_ablated", "rise", "rise_interval", "recovered"}
    half = (loss["rise_interval"][1] - loss["rise_interval"][0]) / 2
    assert f"{loss['rise']:+.4f} ± {half:.4f}" in finished[1]
    assert results["settings"]["expert_statistics"] == "training tokens"
    assert results["settings"]["training"]["tokens_trained"] == 3072  # whole steps
    # The untouched model predicts its held-out text as well as the record of its training says.
    assert results["cross_entropy"]["untouched"] == pytest.approx(demo.results()["heldout"]["cross_entropy"], abs=0.4)


def test_evaluate_again_gives_the_same_numbers(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    before = json.loads((folder / "evaluation.json").read_text())
    code, output, error = run("evaluate", folder, "--tokens", "1024", "--output", "-")
    assert code == 0, error
    after = json.loads(output)
    assert after["layers"]["2"] == pytest.approx(before["layers"]["2"], rel=1e-5)
    intervals = [results["cross_entropy"].pop("rise_interval") for results in (before, after)]
    assert intervals[1] == pytest.approx(intervals[0], rel=1e-4, abs=1e-6)
    assert after["cross_entropy"] == pytest.approx(before["cross_entropy"], rel=1e-5, abs=1e-6)
    assert after["settings"]["training"] == before["settings"]["training"]


def test_evaluate_on_the_text_of_the_training_says_so(finished, tmp_path, caplog):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    results = json.loads((folder / "evaluation.json").read_text())
    copies = {
        name: shutil.copy(demo.text_path(name), tmp_path / f"copy of {name}.txt.parquet")
        for name in ("train", "heldout")
    }
    for name, held_out in (("train", False), ("heldout", True)):  # by the text, not the path
        found = evaluated(folder, dataset=[str(copies[name])], context_length=64, tokens=256)
        assert found["settings"]["evaluation"]["held_out"] is held_out
    assert "was trained on documents of this text" in caplog.text
    del results["settings"]["training"]["sketch"]
    (folder / "evaluation.json").write_text(json.dumps(results))
    found = evaluated(folder, dataset=[str(copies["train"])], context_length=64, tokens=256)
    assert found["settings"]["evaluation"]["held_out"] is None
    (folder / "evaluation.json").unlink()  # as of what a Trainer made: on what it was trained is not known
    found = evaluated(folder, context_length=64, tokens=256)
    assert found["settings"]["evaluation"]["held_out"] is None


def test_evaluate_on_other_text(finished, tmp_path):
    folder, text = shutil.copytree(finished[0], tmp_path / "copy"), tmp_path / "other.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    code, output, error = run("evaluate", folder, "--dataset", text, "--context-length", "64")
    assert code == 0, error
    assert "NMSE" in output


def test_evaluate_with_ablation_and_ranks(finished, tmp_path, drawn_figures):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    code, output, error = run("evaluate", folder, "--tokens", "512", "--ablation", "coefficient", "--ranks")
    assert code == 0, error
    assert "strongest experts removed" in output
    for phase in ("evaluate", "ablate", "ranks"):
        assert f"{phase}: 100%" in error, phase
    results = json.loads((folder / "evaluation.json").read_text())
    curve = results["ablation"]
    assert (curve["order"], curve["removed"]) == ("coefficient", [0, 1, 2, 4])
    assert curve["cross_entropy"][0] == pytest.approx(results["cross_entropy"]["spliced"])
    assert results["ranks"]["2"]["experts"] == 64 and 0 < results["ranks"]["2"]["normalised_rank"] <= 1
    for name in ("ablation.png", "smallest_singular_values.png"):
        assert (folder / "figures" / name).stat().st_size
    again = evaluated(folder, tokens=256)  # it replaces the earlier one
    assert "ablation" not in again and "ranks" not in again
    assert {path.name for path in (folder / "figures").iterdir()}.isdisjoint(
        {"ablation.png", "smallest_singular_values.png"}
    )


def test_another_decomposition_s_figures_are_removed(finished, tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("ablation.png", "smallest_singular_values.png", "mine.png"):
        (tmp_path / "figures" / name).touch()
    evaluated(finished[0], tokens=256, output=str(tmp_path))
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"mine.png"}


def test_embedded_model_beats_unigrams_by_far():
    heldout = demo.results()["heldout"]
    assert heldout["cross_entropy"] < 0.6 * heldout["unigram_cross_entropy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such-model"], "cannot load the model 'no/such-model'"),
        (["--layers", "99"], "layer 99 is out of range: the model has layers 0 to 4"),
        (["--layers", "x"], "is no list of numbers"),
        (["--tokens", "lots"], "is no number of tokens"),
        (["-k", "65", "--num-experts", "64"], "num_experts_per_tok (65) must not exceed num_experts (64)"),
        (["--dataset", "missing.parquet"], "missing.parquet"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--context-length", "257"], "has 256 positions, fewer than a row of 257 tokens"),
    ],
)
def test_bad_input_is_one_message(monkeypatch, capsys, tmp_path, arguments, message):
    if "--dataset" not in arguments:
        monkeypatch.setattr(decompose_job, "load_documents", lambda *_: pytest.fail("text was fetched"))
    error = refused(monkeypatch, capsys, "decompose", "--output", tmp_path / "out", *arguments)
    assert message in " ".join(error.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["evaluate", "experts", "probe", "finetune"])
def test_what_the_base_cannot_do_is_refused_before_text_is_fetched(monkeypatch, capsys, tmp_path, finished, command):
    monkeypatch.chdir(tmp_path)
    labels = ["--label-column", "kind"] if command == "probe" else []
    (tmp_path / "long.yaml").write_text("context_length: 257")
    arguments = ["--config", "long.yaml", "--dataset", "missing.parquet", *labels]
    assert "fewer than a row of 257 tokens" in refused(monkeypatch, capsys, command, finished[0], *arguments)


def test_a_stranger_s_base_of_absurd_sizes_is_refused_before_a_config_is_made_of_it(finished, tmp_path, monkeypatch):
    base = shutil.copytree(demo.model_path(), tmp_path / "base")
    values = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    (base / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr("mxd.base.base_model.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("it was made"))
    decomposition = MxDModel.from_pretrained(finished[0])
    decomposition.config.base_model_name_or_path = str(base)
    with pytest.raises(ValueError, match="has sizes that no model has"):
        load_base_and_text(decomposition, "float32", 128, lambda: pytest.fail("text was fetched"))


def test_a_model_of_ones_own_on_the_embedded_text_is_warned_of(caplog):
    warn_of_embedded_text(TextOptions(), demo.MODEL_NAME)
    warn_of_embedded_text(TextOptions(["a.txt"]), "gpt2")
    assert not caplog.text
    warn_of_embedded_text(TextOptions(), "gpt2")
    assert "gpt2 is trained on the small text that ships with mxd" in caplog.text


def test_empty_dataset_and_missing_column(monkeypatch, capsys, tmp_path):
    empty, other = tmp_path / "empty.jsonl", tmp_path / "other.jsonl"
    empty.write_text("")
    other.write_text('{"body": "a text"}\n{"body": "another"}\n')
    assert "empty" in refused(monkeypatch, capsys, "decompose", "--dataset", empty, "--output", tmp_path / "out")
    error = refused(monkeypatch, capsys, "decompose", "--dataset", other, "--output", tmp_path / "out")
    assert "text" in error and "body" in error


def test_output_that_is_not_empty(monkeypatch, capsys, tmp_path, finished):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert "--overwrite" in refused(monkeypatch, capsys, "decompose", "--output", mine)
    assert "will not delete" in refused(monkeypatch, capsys, "decompose", "--output", mine, "--overwrite")
    assert (mine / "thesis.txt").read_text() == "years of work"
    # Bad input together with --overwrite costs nothing that was there.
    refused(monkeypatch, capsys, "decompose", "--output", finished[0], "--overwrite", "--layers", "99")
    assert (finished[0] / "model.safetensors").is_file()


def test_a_decomposition_is_no_model_to_decompose(monkeypatch, capsys, tmp_path, finished):
    error = refused(monkeypatch, capsys, "decompose", finished[0], "--output", tmp_path / "out")
    assert "is a decomposition itself: name its base model" in error
    assert "fewer than a row" in refused(monkeypatch, capsys, "evaluate", finished[0], "--context-length", "512")


def test_evaluate_of_what_is_no_decomposition(monkeypatch, capsys, tmp_path, finished):
    assert "holds no decomposition" in refused(monkeypatch, capsys, "evaluate", tmp_path)
    error = refused(monkeypatch, capsys, "evaluate", demo.model_path())
    assert "no decomposition" in error
    config = MxDModel.from_pretrained(finished[0]).config
    config.method = "transcoder"
    MxDModel(config).save_pretrained(tmp_path / "transcoder")
    assert "leave --ranks out" in refused(monkeypatch, capsys, "evaluate", tmp_path / "transcoder", "--ranks")


def test_what_is_finished_is_not_resumed(monkeypatch, capsys, finished):
    error = refused(monkeypatch, capsys, "decompose", "--resume", "--output", finished[0])
    assert "is finished, there is nothing to resume" in error


def test_resume_without_a_checkpoint(monkeypatch, capsys, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "notes").touch()
    assert "holds no run to resume" in refused(monkeypatch, capsys, "decompose", "--resume", "--output", tmp_path / "o")


class EndedInItsDestructor:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "end", [EndedInItsDestructor.__del__, lambda _: (EndedInItsDestructor() and None, time.sleep(20))]
)
@pytest.mark.parametrize(("job", "part"), [("decompose", "load_documents"), ("finetune", "load_decomposition")])
def test_sigterm_before_the_training_ends_a_run_that_resume_begins_anew(monkeypatch, capsys, tmp_path, job, part, end):
    module, handler = importlib.import_module(f"mxd.jobs.{job}"), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(module, part, lambda *_: end(None))
    arguments = [job, *(["folder"] if job == "finetune" else []), "--resume", "--output", str(tmp_path / "out")]
    assert run(*arguments)[0] == 75
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("1", 0), ("3", 0)])
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["decompose", "--config", "options.yaml"], "weigth_decay"),
        (["finetune", "folder", "--config", "options.yaml"], "weigth_decay"),
        (["decompose", "--tokens", "2x"], "2x"),
        (["evaluate", "nothing-here"], "nothing-here"),
    ],
)
def test_of_several_processes_the_first_says_what_is_wrong(tmp_path, monkeypatch, rank, said, arguments, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "OTHERS_WAIT", 0)
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    (tmp_path / "options.yaml").write_text("training: {weigth_decay: 1}")
    code, output, error = run(*arguments)
    assert (error.count(part) > 0) == bool(said) and output == ""
    # A command of one process ends in the others.
    assert (code == 0) == (arguments[0] == "evaluate" and rank != "0")


def test_a_command_of_one_process_takes_the_first_of_several(monkeypatch, caplog):
    for rank in ("0", "1"):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "4")):
            monkeypatch.setenv(name, value)
        code, output, _ = run("layers")
        assert code == 0 and bool(output) == (rank == "0")
        assert ("WORLD_SIZE" in os.environ) == (rank == "1")
    assert caplog.text.count("this command takes one process: the other 3 have ended") == 1


def test_a_cluster_ends_a_run_and_resumes_it(tmp_path):
    folder, config = tmp_path / "out", tmp_path / "few.yaml"
    config.write_text("{training: {calibration_tokens: 512, statistics_tokens: 512}, evaluation_tokens: 512}")
    arguments = ["--num-experts", "64", "-k", "4", "--tokens", "4k", "--batch-tokens", "256"]
    arguments += ["--dataset", demo.text_path("train"), "--config", config, "--output", folder]
    process = warm_process.WarmProcess("-m", "mxd", "decompose", *arguments)
    deadline = time.monotonic() + 300
    while not any(folder.glob("checkpoint-*/trainer_state.json")):
        assert process.process.is_alive() and time.monotonic() < deadline, process.wait().stderr
        time.sleep(0.02)
    os.kill(process.process.pid, signal.SIGTERM)
    done = process.wait(120)
    assert done.returncode == 75, done.stderr
    assert "--resume" in done.stderr and "Traceback" not in done.stderr
    assert list(folder.glob("checkpoint-*/trainer_state.json"))
    code, output, error = run("decompose", *arguments, "--resume")
    assert code == 0, error
    assert "NMSE" in output and (folder / "model.safetensors").is_file()


def test_a_disk_that_is_full_keeps_complete_checkpoints(tmp_path):
    """A limit on the size of files stands for the full disk: the write of the weights fails midway."""
    folder = tmp_path / "out"
    script = (
        "import resource\n"
        "from mxd import DistillationTrainer\n"
        "save = DistillationTrainer._save_checkpoint\n"
        "def limited(self, *a):\n"
        "    if self.state.global_step > 2:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "    save(self, *a)\n"
        "DistillationTrainer._save_checkpoint = limited\n"
        "from mxd.cli.main import main\n"
        "main()\n"
    )
    arguments = ["decompose", "--num-experts", "64", "-k", "4", "--tokens", "2048", "--batch-tokens", "512"]
    arguments += ["--dataset", demo.text_path("train"), "--output", folder]
    done = warm_process.run("-c", script, *arguments)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and "kept" in done.stderr
    assert list(folder.glob("checkpoint-*/trainer_state.json"))


def write_checkpoint(folder, complete=True):
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2" / ("trainer_state.json" if complete else "model.safetensors")).touch()


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        ("decompose", "run again with --resume"),
        ("finetune", "run again with --resume"),
        ("frontier", "run the same command to go on"),
        ("evaluate", None),
    ],
)
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full", "a.bin"), RuntimeError("PytorchStreamWriter: inline_container.cc:664")]
)
def test_of_a_disk_that_is_full_it_says_what_is_kept(monkeypatch, capsys, tmp_path, command, kept, error):
    def fails(**_):
        raise error

    monkeypatch.setattr(cli, "app", fails)
    write_checkpoint(tmp_path)
    message = refused(monkeypatch, capsys, command, "--output", tmp_path)
    assert ("No space left on device (a.bin)" if isinstance(error, OSError) else "the disk may be full") in message
    said = {words for words in ("run again with --resume", "run the same command to go on") if words in message}
    assert said == ({kept} if kept else set())
    assert ("kept" in message) == bool(kept)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TrainingFailed("failed after step 2; run again with --resume. KeyError: 'x'"), "run again with --resume. Key"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory; checkpoints that were complete are kept: put it"),
        (ConnectionError("the Hub is gone"), "the Hub is gone; checkpoints that were complete are kept: put it right"),
        (ValueError("the folder is not empty"), "the folder is not empty\n"),
    ],
)
def test_of_a_failed_run_it_says_what_is_kept_once(monkeypatch, capsys, tmp_path, error, message):
    def fails(**_):
        raise error

    monkeypatch.setattr(cli, "app", fails)
    write_checkpoint(tmp_path)
    said = refused(monkeypatch, capsys, "decompose", "--output", tmp_path)
    assert message in said and said.count("--resume") == (not isinstance(error, ValueError))
    assert cli.INTERRUPTED not in [code for code, *_ in [run("decompose", "--output", tmp_path)]]


@pytest.mark.parametrize(
    "command",
    ["decompose", "finetune mine", "frontier"],
)
def test_a_training_in_one_of_several_processes_without_a_rank_is_refused(monkeypatch, capsys, tmp_path, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    error = refused(monkeypatch, capsys, *command.split(), "--output", tmp_path / "out")
    assert "2 processes (WORLD_SIZE) would write into the same folder" in error and "torchrun" in error
    assert not list(tmp_path.iterdir())


def test_weights_that_cannot_be_read_are_no_full_disk(monkeypatch, capsys, tmp_path):
    (tmp_path / "short.safetensors").write_bytes(b"\x05")
    monkeypatch.setattr(cli, "app", lambda **_: load_file(tmp_path / "short.safetensors"))
    error = refused(monkeypatch, capsys, "decompose")
    assert "a file of weights cannot be read" in error and "disk" not in error


@pytest.mark.parametrize(
    ("arguments", "goes_on"),
    [
        (["decompose"], True),
        (["decompose", "gpt2", "--output=mxd-output", "--seed", "1"], True),
        (["decompose", "--output", "mxd-output", "gpt2"], True),
        (["decompose", "--output", "empty"], False),
        (["decompose", "--output"], True),
        (["finetune", "mxd-output"], False),
        (["push", "mxd-output"], False),
    ],
)
@pytest.mark.parametrize(("code", "what"), [(130, "interrupted"), (75, "terminated")])
def test_of_an_interrupt_it_says_how_to_go_on(monkeypatch, capsys, tmp_path, arguments, goes_on, code, what):
    def interrupts(**_):
        raise SystemExit(code)

    monkeypatch.setattr(cli, "app", interrupts)
    monkeypatch.setattr(sys, "argv", ["mxd", *arguments])
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "mxd-output")
    write_checkpoint(tmp_path / "empty", complete=False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == code and error.startswith(f"error: {what}")
    assert ("kept: run again with --resume" in error) == goes_on == ("kept" in error)


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [
        (["--learning-rate", "0"], 0.0),
        (["--learning-rate", "0", "--method", "skip-transcoder"], 0.0),
        ([], 1e-3),
        (["--method", "skip-transcoder"], 3e-3),
    ],
)
def test_the_learning_rate_is_the_one_that_is_asked_for(monkeypatch, capsys, arguments, rate):
    def decompose(options):
        raise ValueError(f"it is {options.learning_rate}")

    monkeypatch.setattr(decompose_job, "decompose", decompose)
    assert f"it is {rate}\n" in refused(monkeypatch, capsys, "decompose", *arguments)


def test_version_of_torch_is_recorded(finished):
    versions = json.loads((finished[0] / "evaluation.json").read_text())["settings"]["training"]["versions"]
    assert versions["torch"] == torch.__version__


def test_no_path_of_this_machine_in_the_embedded_files():
    for path in demo.model_path().glob("*.json"):
        assert not re.search(r"/home/|/root/|/Users/|[A-Z]:\\\\", path.read_text()), path

"""A run's folder: what is resumed, what is refused, and what is lost then, which is nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from commands import interrupted
from safetensors.torch import load_file

from mxd import DecompositionOptions, DistillationTrainer, decompose, demo
from mxd.base.processes import check_one_process
from mxd.data.documents import DataError
from mxd.jobs import decompose as job
from mxd.jobs import training
from mxd.jobs.decompositions import results_folder
from mxd.jobs.finetune import finetune
from mxd.jobs.frontier import measure_frontier
from mxd.jobs.options import FinetuningOptions, FrontierOptions
from mxd.jobs.run_folder import (
    RUN_NAME,
    START_NAME,
    Interrupted,
    TrainingFailed,
    begun,
    check_output,
    prepare_output,
    write_run,
)
from mxd.jobs.training import make_arguments
from mxd.trainers import DistillationArguments, FinetuningArguments

TRAINING = {"disable_tqdm": True, "calibration_tokens": 512, "statistics_tokens": 512, "save_steps": 100}


def options(folder, **changes):
    values = {"num_experts": 16, "num_experts_per_tok": 2, "tokens": 2048, "batch_tokens": 512, "learning_rate": 0.01}
    values |= {"evaluation_tokens": 256, "training": TRAINING, "output": str(folder)}
    return DecompositionOptions(**{**values, **changes})


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """A decomposition that was interrupted at its second step of four."""
    folder = tmp_path_factory.mktemp("runs") / "halved"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(job, "DistillationTrainer", interrupted(DistillationTrainer))
        with pytest.raises(Interrupted, match=r"interrupted at step 2 of 4.*--resume") as ended:
            decompose(options(folder))
    assert ended.value.exit_code == 130
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", RUN_NAME, START_NAME}
    return folder


@pytest.mark.parametrize("error", [ConnectionError("the Hub is gone"), DataError("row 7 is no text")])
def test_a_run_that_fails_says_how_to_go_on(tmp_path, monkeypatch, error):
    with monkeypatch.context() as patched:
        patched.setattr(job, "DistillationTrainer", interrupted(DistillationTrainer, error))
        with pytest.raises(TrainingFailed) as failed:
            decompose(options(tmp_path / "out"))
    assert failed.value.__cause__ is error
    said = f"failed after step 2 of 4; the checkpoint is kept in {tmp_path / 'out'}: run again with --resume"
    assert said in str(failed.value) and f"{type(error).__name__}: {error}" in str(failed.value)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-2", RUN_NAME, START_NAME}


def test_a_failure_before_the_first_step_is_raised_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(DistillationTrainer, "calibrate", lambda *_: {}[0])
    with pytest.raises(KeyError):
        decompose(options(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {RUN_NAME, START_NAME}


def test_an_interrupt_before_the_first_checkpoint_keeps_nothing_and_blocks_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    folder = tmp_path / "out"
    monkeypatch.setattr(DistillationTrainer, "calibrate", interrupt)
    for _ in range(2):
        with pytest.raises(Interrupted, match="interrupted before the first checkpoint: nothing is kept"):
            decompose(options(folder))
        assert list(folder.iterdir()) == []
    (folder / "notes").touch()
    with pytest.raises(ValueError, match="is not empty"):
        decompose(options(folder))


@pytest.mark.parametrize(
    ("tokens", "trained"),
    [(30_000, "28,672"), (8_000, "6,144"), (1000, "2,048"), (1_000_000, None), (20_480, None)],
)
def test_tokens_that_are_no_whole_steps_are_named(tmp_path, caplog, tokens, trained):
    asked = options(tmp_path, tokens=tokens, batch_tokens=2048, training={})
    made = make_arguments(DistillationArguments, asked, tmp_path)
    said = "" if trained is None else f"a training takes whole steps: {trained} tokens, not {tokens:,}"
    assert said in caplog.text and bool(said) == bool(caplog.text)
    assert made.max_steps == max(1, tokens // 2048)
    caplog.clear()
    make_arguments(DistillationArguments, options(tmp_path, tokens=tokens, training={"max_steps": 3}), tmp_path)
    assert caplog.text == ""


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_a_frontier_in_one_of_several_processes_is_refused(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    with pytest.raises(ValueError, match=rf"2 processes \({variable}\) would write into the same folder.*one process"):
        measure_frontier(FrontierOptions(output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists() and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("made", "tokens"),
    [
        (lambda folder: options(folder, batch_tokens=1152), 512),  # 9 rows of 128
        (lambda folder: options(folder, batch_tokens=128), 512),
        (lambda folder: options(folder, training={"per_device_train_batch_size": 6}), 512),
        (lambda folder: FinetuningOptions(decomposition="m", batch_tokens=192, context_length=64), 256),
    ],
)
def test_rows_that_the_processes_cannot_share_are_refused(tmp_path, monkeypatch, made, tokens):
    asked = made(tmp_path)
    kind = FinetuningArguments if isinstance(asked, FinetuningOptions) else DistillationArguments
    monkeypatch.setattr(kind, "world_size", 4)
    with pytest.raises(ValueError, match=rf"4 processes cannot share the \d rows .* a multiple of {tokens}, or start"):
        make_arguments(kind, asked, tmp_path)


def test_processes_that_accelerate_does_not_join_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "launched", lambda: (1, 2))
    with pytest.raises(ValueError, match="2 processes were started, of which accelerate joins 1"):
        make_arguments(DistillationArguments, options(tmp_path), tmp_path)


@pytest.mark.parametrize("value", ["1", "0", "", "many"])
def test_one_process_under_a_launcher_runs(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    check_one_process()


def test_a_process_group_without_the_launcher_s_variables_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"3 processes \(torch.distributed\)"):
        check_one_process()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("weigth_decay", "did you mean weight_decay?"),
        ("logging_step", "did you mean logging_steps or"),
        ("batch_size", "did you mean"),
        ("zzz", "see "),
        (7, "see "),
    ],
)
@pytest.mark.parametrize(
    ("run", "made"),
    [
        (decompose, options),
        (finetune, lambda folder, **changes: FinetuningOptions(decomposition="m", output=str(folder), **changes)),
        (measure_frontier, lambda folder, **changes: FrontierOptions(output=str(folder), **changes)),
    ],
)
def test_a_wrong_name_of_a_trainer_s_argument_is_refused(tmp_path, run, made, name, hint):
    with pytest.raises(ValueError, match=re.escape(f"training: {name} is no argument of the trainer; {hint}")):
        run(made(tmp_path / "out", training={"disable_tqdm": True, name: 1}))
    assert not (tmp_path / "out").exists()


SAMPLE = str(demo.text_path("train"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": 8192}, "tokens 2048, not 8192"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"learning_rate": 0.5}, "learning_rate 0.01, not 0.5"),
        ({"learning_rate": None}, "learning_rate 0.01, not 0.001"),
        ({"gate_init": "random"}, "gate_init 'data', not 'random'"),
        ({"training": {**TRAINING, "weight_decay": 0.1}}, "training.weight_decay None, not 0.1"),
        ({"training": {**TRAINING, "seed": 7}}, "training.seed None, not 7"),
        ({"training": {**TRAINING, "logging_steps": 1}}, "training.logging_steps None, not 1"),
        ({"dataset": [SAMPLE]}, f"dataset [], not [{SAMPLE!r}]"),
        ({"context_length": 64}, "context_length 128, not 64"),
    ],
)
def test_a_run_is_not_resumed_with_other_options(halved, changes, said):
    before = contents(halved)
    with pytest.raises(ValueError, match=re.escape(f"had {said}: resume with the options of that run")):
        decompose(options(halved, resume=True, **changes))
    assert contents(halved) == before


def test_a_run_is_resumed_elsewhere_and_with_other_evaluation_and_equals_an_uninterrupted_one(halved, tmp_path):
    folder = shutil.copytree(halved, tmp_path / "copy")
    training = {**TRAINING, "disable_tqdm": False}
    results = decompose(options(folder, resume=True, evaluation_tokens=512, training=training))
    assert results["settings"]["tokens"] == 512
    made = json.loads((folder / "evaluation.json").read_text())["settings"]["training"]
    assert made["tokens_trained"] == 2048 and made["documents"] == 100
    assert "seconds" not in made  # of the steps before the interrupt nobody knows them
    assert not (folder / START_NAME).exists() and not list(folder.glob("checkpoint-*"))
    whole = decompose(options(tmp_path / "whole"))["settings"]["training"]
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert whole["decoder_init"] == "pretrained" and "auxiliary_weight" in whole


def test_a_run_is_resumed_at_the_commit_that_it_began_with(halved, tmp_path, monkeypatch):
    def look(model, revision, *_):
        raise ValueError(f"{model} at {revision}")

    folder = shutil.copytree(halved, tmp_path / "copy")
    (folder / START_NAME).write_text(json.dumps({"commit": "5e1f"}))
    monkeypatch.setattr(job, "base_skeleton", look)
    with pytest.raises(ValueError, match=f"{demo.MODEL_NAME} at 5e1f"):
        decompose(options(folder, resume=True))


def test_an_interrupted_run_is_overwritten_with_what_trackers_wrote_beside(halved, tmp_path):
    folder = shutil.copytree(halved, tmp_path / "run")
    (folder / "runs").mkdir()
    assert check_output(options(folder, overwrite=True)) == folder
    (folder / START_NAME).unlink()
    with pytest.raises(ValueError, match="holds no decomposition"):
        check_output(options(folder, overwrite=True))


def test_the_output_folder_itself_stays(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "figure.png").touch()
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    prepare_output(Path(), "decompose", options("."))
    assert {path.name for path in tmp_path.iterdir()} == {".git", RUN_NAME, START_NAME}


def test_a_pickled_base_is_refused_before_anything_is_trained(tmp_path):
    source = demo.model_path()
    folder = shutil.copytree(source, tmp_path / "base")
    for file in folder.glob("*.safetensors"):
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
    with pytest.raises(ValueError, match=r"are in a pickle.*save_pretrained"):
        decompose(options(tmp_path / "out", model=str(folder)))
    assert not (tmp_path / "out").exists()


def test_the_init_of_a_transcoder_is_not_recorded(tmp_path):
    said = decompose(options(tmp_path / "made", tokens=512, method="transcoder"))["settings"]["training"]
    assert not {"auxiliary_weight", "encoder_init", "decoder_init"} & said.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be a finite number from 0"),
        (
            {"intermediate_size": 100, "encoder_init": "pretrained"},
            "intermediate_size 100 cannot be initialised from the pretrained MLP",
        ),
    ],
)
def test_what_is_refused_overwrites_nothing(halved, changes, message):
    before = contents(halved)
    with pytest.raises(ValueError, match=message):
        decompose(options(halved, overwrite=True, **changes))
    assert contents(halved) == before


def test_a_value_of_null_is_written_where_it_is_not_the_default(tmp_path):
    write_run(tmp_path, "finetune", FinetuningOptions(decomposition="ann/d", learning_rate=None))
    asked = yaml.safe_load((tmp_path / RUN_NAME).read_text())
    assert asked["learning_rate"] is None and "dataset_config" not in asked


def test_results_elsewhere_replace_no_other_model_s(halved, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds another model"):
        results_folder(str(halved), str(tmp_path))
    assert results_folder(str(halved), str(halved)) == halved
    assert results_folder("user/name", str(tmp_path / "new")) == tmp_path / "new"
    assert results_folder("user/name", "-") is None
    with pytest.raises(ValueError, match="--output"):
        results_folder("user/name", None)


def test_a_step_takes_whole_rows_and_the_init_is_recorded_that_happened(tmp_path):
    asked = options(tmp_path / "made", tokens=2048, batch_tokens=1000, encoder_init="random")
    made = decompose(asked)["settings"]["training"]
    assert made["decoder_init"] == "zero" and "auxiliary_weight" in made
    assert (made["batch_tokens"], made["tokens_trained"]) == (896, 1792)
    asked = yaml.safe_load((tmp_path / "made" / RUN_NAME).read_text())
    assert (asked["batch_tokens"], asked["learning_rate"], asked["num_experts"]) == (1000, 0.01, 16)
    assert {"tokens", "model", "dataset", "training", "gate_init"} <= asked.keys() and "overwrite" not in asked
    assert None not in asked.values() and "heldout_split" not in asked  # null, as by default


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_anew(tmp_path):
    (tmp_path / START_NAME).write_text("{}")
    assert check_output(options(tmp_path)) == tmp_path


@pytest.mark.parametrize("left", [[], [START_NAME], [START_NAME, RUN_NAME, "runs", "checkpoint-4", "slurm.log"]])
def test_resume_begins_a_run_without_a_checkpoint(tmp_path, caplog, left):
    for name in left:
        (tmp_path / name).touch() if "." in name else (tmp_path / name).mkdir()
    asked = options(tmp_path, resume=True)
    assert begun(asked) == {}
    assert f"there is no checkpoint in {tmp_path} yet: the run starts from its beginning" in caplog.text
    prepare_output(tmp_path, "decompose", asked, documents=3)
    assert {path.name for path in tmp_path.iterdir()} == {*left, START_NAME, RUN_NAME}
    assert json.loads((tmp_path / START_NAME).read_text()) == {"documents": 3}


@pytest.mark.parametrize("left", ["model.safetensors", "slurm.log"])
def test_resume_in_a_folder_of_something_else_is_refused(tmp_path, left):
    (tmp_path / left).touch()
    with pytest.raises(ValueError, match="holds no run to resume, and is not empty: name another folder"):
        begun(options(tmp_path, resume=True))
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_a_diverged_run_saves_nothing_and_keeps_its_checkpoints(tmp_path, monkeypatch):
    class Diverging(DistillationTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            for parameter in self.model.parameters():
                parameter.grad /= self.state.global_step < 2
            return loss

    monkeypatch.setattr(job, "DistillationTrainer", Diverging)
    with pytest.raises(ValueError, match=r"diverged: .* is not finite after step 3"):
        decompose(options(tmp_path / "run", training={**TRAINING, "save_steps": 1}))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-2", RUN_NAME, START_NAME}

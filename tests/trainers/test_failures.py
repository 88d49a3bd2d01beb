"""A training that fails keeps a checkpoint; a batch without a token that counts changes nothing."""

import logging

import pytest
import torch
from datasets.table import CastError
from factories import GLU, make_tiny_llama, random_mxd_model
from requests.exceptions import ReadTimeout
from trainer_cases import ARGUMENTS, PLAIN, arguments, decomposition, rows
from transformers import TrainerCallback

from mxd.modeling_mxd import make_spliced
from mxd.trainers import DistillationTrainer, FinetuningArguments, FinetuningTrainer, last_complete_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 100}


class Stream(torch.utils.data.IterableDataset):
    """Rows, and in place of row `at` an exception."""

    def __init__(self, data, at=None, error=None):
        self.data, self.at, self.error = data, at, error

    def __iter__(self):
        for index, row in enumerate(self.data):
            if index == self.at:
                raise self.error
            yield row


class Fail(TrainerCallback):
    """Raise in an event of the step after `step`."""

    def __init__(self, event, step, error):
        self.step, self.error = step, error
        setattr(self, event, self.fail)

    def fail(self, args, state, control, **_):
        if state.global_step == self.step:
            raise self.error


def distillation(base, folder, data, groups=None, **changes):
    torch.manual_seed(0)
    values = arguments(folder, **{**SAVING, **changes})
    return DistillationTrainer(decomposition(**groups or {}), base, values, train_dataset=data)


def finetuning(base, folder, data, **changes):
    torch.manual_seed(1)
    spliced = make_spliced(base, random_mxd_model((0, 2), **GLU), "decomposition")
    values = {"output_dir": str(folder), **ARGUMENTS, **SAVING, **changes}
    return FinetuningTrainer(spliced, FinetuningArguments(**values), train_dataset=data)


def fails(*_):
    raise RuntimeError("no space")


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


ERRORS = [
    ConnectionError("the Hub is gone"),
    ReadTimeout("read timed out"),
    CastError("Couldn't cast", table_column_names=["text"], requested_column_names=["label"]),
    MemoryError(),
]


@pytest.mark.parametrize(
    ("make", "error"),
    [*((distillation, error) for error in ERRORS), (finetuning, ERRORS[0])],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_stream_that_fails_leaves_a_checkpoint(tiny_llama, tmp_path, caplog, make, error):
    trainer = make(tiny_llama, tmp_path, Stream(rows(80), 48, error))
    with caplog.at_level(logging.WARNING), pytest.raises(type(error)) as raised:
        trainer.train()
    assert raised.value is error
    # Of six batches of eight rows one is read ahead.
    assert checkpoints(tmp_path) == ["checkpoint-5"] and trainer.saved_step == 5
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-5")
    assert f"the checkpoint of step 5 is kept in {tmp_path}: resume_from_checkpoint=True" in caplog.text


@pytest.mark.parametrize(("make", "same"), [(distillation, True), (finetuning, False)])
def test_failed_and_resumed_equals_uninterrupted(tmp_path, make, same):
    data = rows(80)
    whole = make(make_tiny_llama(), tmp_path / "whole", Stream(data))
    whole.train()
    stream = Stream(data, 48, ConnectionError())
    failed = make(make_tiny_llama(), tmp_path / "failed", stream)
    with pytest.raises(ConnectionError):
        failed.train()
    stream.at = None
    resumed = failed if same else make(make_tiny_llama(), tmp_path / "failed", Stream(data))
    assert resumed.train(resume_from_checkpoint=True).global_step == 10
    expected = whole.decomposition.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.decomposition.state_dict().items())


@pytest.mark.parametrize(
    ("event", "step", "saving", "kept"),
    [
        ("on_step_begin", 3, {}, ["checkpoint-3"]),
        ("on_optimizer_step", 3, {}, ["checkpoint-3"]),
        ("on_log", 4, {"logging_steps": 2}, ["checkpoint-4"]),
        ("on_save", 4, {"save_steps": 2}, ["checkpoint-2", "checkpoint-4"]),
        ("on_step_begin", 4, {"save_steps": 2}, ["checkpoint-2", "checkpoint-4"]),
        ("on_step_begin", 5, {"save_steps": 2, "save_total_limit": 1}, ["checkpoint-5"]),
        ("on_step_begin", 0, {}, []),
    ],
)
def test_wherever_it_fails_the_last_whole_step_is_kept(tiny_llama, tmp_path, event, step, saving, kept):
    trainer = distillation(tiny_llama, tmp_path, rows(), **saving)
    trainer.add_callback(Fail(event, step, RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert checkpoints(tmp_path) == kept
    assert trainer.saved_step == (int(kept[-1].split("-")[1]) if kept else 0)


def test_what_fails_after_the_last_step_is_resumed_there(tiny_llama, tmp_path, monkeypatch):
    trainer = distillation(tiny_llama, tmp_path, rows(), save_strategy="no")
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "measure_experts", fails)
        with pytest.raises(RuntimeError):
            trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-10"]
    assert trainer.train(resume_from_checkpoint=True).global_step == 10
    assert trainer.decomposition.layer(1).expert_frequency.any()


def test_a_checkpoint_that_cannot_be_saved_hides_no_failure(tiny_llama, tmp_path, monkeypatch, caplog):
    trainer = distillation(tiny_llama, tmp_path, rows())
    trainer.add_callback(Fail("on_step_begin", 3, ConnectionError("the Hub is gone")))
    monkeypatch.setattr(trainer, "_save_checkpoint", fails)
    with pytest.raises(ConnectionError, match="the Hub is gone"):
        trainer.train()
    assert "no checkpoint of step 3 was saved" in caplog.text and "kept" not in caplog.text


def test_a_failure_before_the_first_step_saves_nothing_of_an_earlier_training(tiny_llama, tmp_path, monkeypatch):
    trainer = distillation(tiny_llama, tmp_path, rows(), save_strategy="no")
    trainer.train()
    monkeypatch.setattr(trainer, "create_optimizer", fails)
    with pytest.raises(RuntimeError):
        trainer.train()
    assert not checkpoints(tmp_path) and not trainer.saved_step


# --- Batches in which no token counts


def uncounted(kind):
    """Eight rows without a token that counts."""
    if kind == "padding":
        return [{"input_ids": [3] * 12, "attention_mask": [0] * 12}] * 8
    return [{"input_ids": [3]}] * 8  # predicts nothing


CASES = {
    "kl": (finetuning, {"nmse_weight": 0.0}),
    "kl+layers": (finetuning, {"nmse_weight": 0.1}),
    "cross_entropy": (finetuning, {"loss": "cross_entropy"}),
    "distillation": (distillation, {}),
    "plain": (distillation, PLAIN),
    "routed": (distillation, {"groups": {"num_expert_groups": 6, "num_groups_per_tok": 2}}),
}


@pytest.mark.parametrize(
    ("case", "kind", "attention"),
    [
        *((case, "padding", "sdpa") for case in CASES),
        ("kl+layers", "one token", "sdpa"),
        ("cross_entropy", "one token", "sdpa"),
        ("kl+layers", "padding", "eager"),
        ("distillation", "padding", "eager"),
    ],
)
def test_a_batch_without_a_token_that_counts_contributes_nothing(tiny_llama, tmp_path, case, kind, attention):
    make, changes = CASES[case]
    tiny_llama.set_attn_implementation(attention)
    data = [*rows(8), *uncounted(kind), *rows(16)]
    values = {"max_steps": 4, "logging_steps": 1, "train_sampling_strategy": "sequential", "optim": "sgd", **changes}
    trainer = make(tiny_llama, tmp_path, data, calibration_tokens=64, statistics_tokens=96, **values)
    before = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            weights = trainer.decomposition.named_parameters()
            before.append({name: value.detach().clone() for name, value in weights})

    trainer.add_callback(Keep())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] == 0 and all(losses[:1] + losses[2:])
    assert all(torch.equal(value, before[0][name]) for name, value in before[1].items())
    assert any(not torch.equal(value, before[1][name]) for name, value in before[2].items())
    assert float(trainer.training_step(trainer.model, trainer.data_collator(uncounted("padding")))) == 0

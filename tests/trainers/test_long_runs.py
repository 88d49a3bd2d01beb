"""Checkpoints that are complete or not there, signals, and a divergence that names its batch."""

import json
import os
import signal

import pytest
import torch
from trainer_cases import arguments, decomposition, rows
from transformers import TrainerCallback

from mxd.base.files import UNFINISHED_NAME
from mxd.trainers import DistillationTrainer, DivergenceError, last_complete_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "save_total_limit": 1}


def make(base, folder, callbacks=(), **changes):
    torch.manual_seed(0)
    values = arguments(folder, **{**SAVING, **changes})
    data = rows(48)
    return DistillationTrainer(
        decomposition(), base, values, train_dataset=data, eval_dataset=data.select(range(8)), callbacks=list(callbacks)
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from factories import make_tiny_llama

    trainer = make(make_tiny_llama(), tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer.decomposition.state_dict()


@pytest.mark.parametrize(
    ("when", "method"),
    [("before", "_save"), ("after", "_save_optimizer_and_scheduler"), ("after", "_save_rng_state")],
)
def test_a_run_that_is_killed_while_it_saves_goes_on_from_the_checkpoint_before(
    tiny_llama, tmp_path, monkeypatch, whole, method, when
):
    trainer, save = make(tiny_llama, tmp_path), getattr(DistillationTrainer, method)

    def killed(self, *args, **kwargs):
        if self.state.global_step < 4 or when == "after":
            save(self, *args, **kwargs)
        if self.state.global_step == 4:
            raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(DistillationTrainer, method, killed)
        with pytest.raises(SystemExit):
            trainer.train()
    assert set(names(tmp_path)) - {UNFINISHED_NAME} == {"checkpoint-2"}
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-2")
    resumed = make(tiny_llama, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-6"]
    weights = resumed.decomposition.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in whole.items())


@pytest.mark.parametrize(("limit", "kept"), [(1, [2, 6]), (2, [2, 6]), (None, [2, 4, 6])])
def test_the_best_checkpoint_is_kept_beside_the_newest_and_named_by_its_place(
    tiny_llama, tmp_path, monkeypatch, limit, kept
):
    best = tmp_path / "checkpoint-2"
    trainer = make(tiny_llama, tmp_path, eval_strategy="steps", eval_steps=2, metric_for_best_model="loss",
                   save_total_limit=limit)  # fmt: skip
    monkeypatch.setattr(trainer, "compute_metrics", lambda *_: {"loss": trainer.state.global_step})

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **_):
            assert state.best_model_checkpoint == str(best)
            saved = json.loads((tmp_path / f"checkpoint-{state.global_step}" / "trainer_state.json").read_text())
            assert saved["best_model_checkpoint"] == str(best)
            if state.global_step == 6:
                assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]

    trainer.add_callback(Look())
    trainer.train()
    assert best.is_dir()


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM], [signal.SIGINT]])
def test_a_signal_saves_the_step_and_is_reported(tiny_llama, tmp_path, numbers):
    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                for number in numbers:
                    os.kill(os.getpid(), number)

    trainer = make(tiny_llama, tmp_path, [Signal()], save_steps=100)
    trainer.train()
    assert trainer.interrupted and trainer.signal == numbers[0]
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_second_interrupt_stops_one_process_at_once(tiny_llama, tmp_path):
    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make(tiny_llama, tmp_path, [Signal()]).train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("decode", [None, lambda ids: f"text of {len(ids)} ids"])
def test_a_divergence_names_the_step_and_its_batch(tiny_llama, tmp_path, accumulated, decode):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            if state.global_step == 3:
                with torch.no_grad():
                    next(model.parameters()).fill_(torch.inf)

    sizes = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 8 // accumulated}
    trainer = make(tiny_llama, tmp_path, [Spoil()], logging_steps=5, save_steps=3, **sizes)
    trainer.losses.decode = decode
    begins = r"begin with the token ids \[\d+, .*\]" if decode is None else "begin with 'text of 12 ids'"
    with pytest.raises(DivergenceError, match=rf"the first such loss is that of step 4, rows 25 to 32, which {begins}"):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-3"]

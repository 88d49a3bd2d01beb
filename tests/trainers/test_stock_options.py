"""What options of the stock Trainer do in ours."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from factories import mxd_model
from trainer_cases import arguments, decomposition, rows
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, TrainerCallback, TrainingArguments

from mxd.modeling_mxd import MxDModel, make_spliced
from mxd.trainers import DistillationTrainer, DivergenceError, FinetuningArguments, FinetuningTrainer


def trainer_of(model, teacher, folder, optimizers=(None, None), optimizer_cls_and_kwargs=None, **changes):
    return DistillationTrainer(
        model,
        teacher,
        arguments(folder, **changes),
        train_dataset=rows(),
        eval_dataset=rows(16),
        optimizers=optimizers,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
    )


BEST = {
    "load_best_model_at_end": True, "metric_for_best_model": "nmse",
    "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize("metric", [None, "nmse"])
def test_the_best_checkpoint_is_the_one_of_least_error(tiny_llama, tmp_path, metric):
    how = {**BEST, "metric_for_best_model": metric, "learning_rate": 0.5}
    trainer = trainer_of(decomposition(layers=(0, 1)), tiny_llama, tmp_path, **how)
    trainer.train()
    errors = [entry["eval_nmse"] for entry in trainer.state.log_history if "eval_nmse" in entry]
    assert len(set(errors)) == 5
    assert trainer.state.best_metric == min(errors)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(errors))


def test_only_the_process_that_saves_writes(tiny_llama, tmp_path, monkeypatch):
    trainer = trainer_of(decomposition(), tiny_llama, tmp_path)
    monkeypatch.setattr(TrainingArguments, "should_save", False)
    trainer.save_model(str(tmp_path / "other"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_weights_are_not_saved_beside_the_figures_of_others(tiny_llama, tmp_path):
    (tmp_path / "evaluation.json").write_text("{}")
    trainer_of(decomposition(), tiny_llama, tmp_path).save_model()
    assert (tmp_path / "model.safetensors").is_file() and not (tmp_path / "evaluation.json").exists()


def test_a_routed_layer_starts_at_unit_modulation_with_its_fitted_router(tiny_llama, tmp_path):
    model = decomposition(num_experts=240, num_expert_groups=24, num_groups_per_tok=2)
    trainer = trainer_of(model, tiny_llama, tmp_path, calibration_tokens=800)
    trainer.init_weights()
    layer = model.layer(1)
    x = torch.cat([trainer.capture(batch)[1][0].flatten(0, 1) for batch in trainer.training_batches()])
    assert layer.sum_experts(layer.encode(x)).mean().item() == pytest.approx(1, rel=0.1)


def test_tokens_seen_are_counted(tiny_llama, tmp_path):
    trainer = trainer_of(decomposition(), tiny_llama, tmp_path, include_num_input_tokens_seen="all", max_steps=3)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 3 * 8 * 12


def test_a_second_training_has_an_optimizer_of_its_own(tiny_llama, tmp_path):
    model = decomposition()
    trainer = trainer_of(model, tiny_llama, tmp_path, save_strategy="no")
    trainer.train()
    trainer.train()
    parameters = {parameter for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert {int(trainer.optimizer.state[parameter]["step"]) for parameter in parameters} == {10}


def test_a_chosen_optimizer_trains(tiny_llama, tmp_path):
    model = decomposition()
    chosen = (torch.optim.SGD, {"momentum": 0.5})
    trainer = trainer_of(model, tiny_llama, tmp_path, optimizer_cls_and_kwargs=chosen, learning_rate=0.01)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    assert len(optimizer.state) == len(list(model.parameters())) + len(list(trainer.auxiliary.parameters()))


def test_a_given_optimizer_is_refused_that_would_not_step_the_auxiliary_transcoder(tiny_llama, tmp_path):
    model = decomposition()
    given = (torch.optim.SGD(model.parameters(), lr=0.01), None)
    with pytest.raises(ValueError, match="auxiliary_weight"):
        trainer_of(model, tiny_llama, tmp_path, optimizers=given)
    trainer = trainer_of(model, tiny_llama, tmp_path, optimizers=given, auxiliary_weight=0.0)
    trainer.train()
    assert getattr(trainer.optimizer, "optimizer", trainer.optimizer) is given[0]


def test_a_teacher_that_accelerate_has_placed(tiny_llama, tmp_path):
    batch = {"input_ids": torch.randint(0, 64, (2, 12))}
    expected = trainer_of(decomposition(), tiny_llama, tmp_path).capture(batch)[1]
    names = [name for name, _ in tiny_llama.model.named_children() if name != "layers"]
    places = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" for layer in range(len(tiny_llama.model.layers))}
    dispatch_model(tiny_llama, places, main_device="cpu", offload_dir=str(tmp_path / "offloaded"))
    trainer = trainer_of(decomposition(), tiny_llama, tmp_path, encoder_init="random", max_steps=2)
    for found, wanted in zip(trainer.capture(batch)[1], expected, strict=True):
        torch.testing.assert_close(found, wanted)
    trainer.train()


def test_checkpointed_layers_have_no_dropout(tmp_path):
    base = OPTForCausalLM(
        OPTConfig(
            vocab_size=64, hidden_size=16, ffn_dim=40, num_hidden_layers=3, num_attention_heads=2,
            word_embed_proj_dim=16, max_position_embeddings=32, dropout=0.5, attention_dropout=0.5,
        )
    )  # fmt: skip
    model = make_spliced(base, mxd_model(hidden_act="relu"), "decomposition")
    settings = FinetuningArguments(
        output_dir=str(tmp_path), gradient_checkpointing=True, use_cpu=True, nmse_weight=0.0, max_steps=1
    )
    trainer = FinetuningTrainer(model, settings, train_dataset=rows(8))
    model.gradient_checkpointing_enable()
    batch = {"input_ids": torch.randint(0, 64, (2, 12))}
    first, second = (trainer.compute_loss(model, batch) for _ in range(2))
    assert first.requires_grad and torch.equal(first, second)


def test_on_apple_gpus_the_cpu_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert arguments(tmp_path, use_cpu=False).device.type == "cpu"


def test_after_a_training_in_bfloat16_nothing_runs_in_it(tiny_llama, tmp_path):
    ids = torch.randint(0, 64, (2, 12))
    model = make_spliced(tiny_llama, mxd_model(), "decomposition")
    settings = FinetuningArguments(output_dir=str(tmp_path), bf16=True, use_cpu=True, nmse_weight=0.0, max_steps=2)
    trainer = FinetuningTrainer(model, settings, train_dataset=rows(16))
    for _ in range(2):  # the second training is in bfloat16 again
        seen = []
        handle = model.model.layers[0].mlp.up_proj.register_forward_hook(
            lambda _, x, y, seen=seen: seen.append(y.dtype)
        )
        trainer.train()
        assert torch.bfloat16 in seen
        handle.remove()
        assert "forward" not in vars(model)
        with torch.no_grad(), model.untouched():
            expected = model.lm_head(model.model(ids).last_hidden_state)
            assert torch.equal(model(ids).logits, expected)


class FirstIsBest(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **_):
        metrics["eval_nmse"] += state.global_step


def test_an_interrupted_training_keeps_its_checkpoint_beside_the_best(tiny_llama, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = trainer_of(decomposition(), tiny_llama, tmp_path, save_total_limit=1, **BEST)
    trainer.add_callback(FirstIsBest())
    trainer.add_callback(Interrupt())
    trainer.train()
    assert trainer.interrupted and trainer.args.save_total_limit == 1
    assert trainer.state.best_global_step == 2
    last = trainer.state.global_step
    assert 5 <= last < 10 and (tmp_path / f"checkpoint-{last}" / "trainer_state.json").is_file()


def test_a_finished_training_that_is_resumed_has_the_best_weights(tiny_llama, tmp_path):
    trainers = [trainer_of(decomposition(), tiny_llama, tmp_path, max_steps=4, **BEST) for _ in range(2)]
    trainers[0].add_callback(FirstIsBest())
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=True)
    assert trainers[1].state.best_global_step == 2
    best = MxDModel.from_pretrained(tmp_path / "checkpoint-2")
    for trainer in trainers:
        assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), best.parameters(), strict=True))


def test_padding_on_the_left_is_moved(tmp_path):
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_inner=40, n_positions=32))
    trainer = trainer_of(mxd_model(hidden_act="gelu_new"), base.eval(), tmp_path)
    ids = torch.randint(0, 64, (2, 6))
    left = {"input_ids": F.pad(ids, (3, 0)), "attention_mask": F.pad(torch.ones_like(ids), (3, 0))}
    prepared = trainer.prepare_batch(left)
    assert torch.equal(prepared["input_ids"][:, :6], ids) and not prepared["attention_mask"][:, 6:].any()
    x, expected = (trainer.capture(batch)[1][0] for batch in (prepared, {"input_ids": ids}))
    torch.testing.assert_close(x[:, :6], expected)


def test_an_evaluation_of_the_same_weights_stays(tiny_llama, tmp_path):
    trainer = trainer_of(decomposition(), tiny_llama, tmp_path, max_steps=1)
    trainer.save_model()
    (tmp_path / "evaluation.json").write_text("{}")
    trainer.save_model()
    assert (tmp_path / "evaluation.json").exists()
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "evaluation.json").exists()


def test_the_auxiliary_transcoder_is_clipped_with_the_model(tiny_llama, tmp_path):
    trainer = trainer_of(decomposition(), tiny_llama, tmp_path, max_grad_norm=1e-3, max_steps=1)
    norms = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            parameters = [*trainer.model.layer(1).parameters(), *trainer.auxiliary.parameters()]
            norms.append(torch.stack([parameter.grad.square().sum() for parameter in parameters]).sum().sqrt())

    trainer.add_callback(Watch())
    trainer.train()
    assert norms[0].item() == pytest.approx(1e-3, rel=1e-2)
    assert all(parameter.grad is None for parameter in trainer.auxiliary.parameters())


class Diverge(TrainerCallback):
    """A step too far: a weight is not finite after it."""

    def __init__(self, model, step):
        self.model, self.step = model, step

    def on_optimizer_step(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            torch.nn.init.constant_(self.model.layer(1).decoder.weight, torch.nan)


@pytest.mark.parametrize(
    ("step", "changes", "said"),
    [
        (3, {"logging_steps": 2}, "the loss of the steps 3 to 4 is not finite"),
        (3, {"logging_steps": 20}, "is not finite after step 4"),
        (3, {"logging_steps": 2, "save_strategy": "no"}, "the loss of the steps 3 to 4 is not finite"),
        (4, {"logging_nan_inf_filter": True}, "decoder.weight is not finite after step 4"),
        (10, {"save_strategy": "no"}, "decoder.weight is not finite after step 10"),
    ],
)
def test_a_diverged_training_stops_and_is_not_saved(tiny_llama, tmp_path, step, changes, said):
    model = decomposition()
    how = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, **changes}
    trainer = trainer_of(model, tiny_llama, tmp_path, **how)
    trainer.add_callback(Diverge(model, step))
    with pytest.raises(DivergenceError, match=f"{said}.*--learning-rate.*0.01.*bfloat16.*kept in {tmp_path}"):
        trainer.train()
    kept = [] if how["save_strategy"] == "no" else ["checkpoint-2"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == kept


def test_a_learning_rate_that_is_far_too_high_is_said(tiny_llama, tmp_path):
    trainer = trainer_of(decomposition(), tiny_llama, tmp_path, learning_rate=1e20, warmup_steps=0)
    with pytest.raises(DivergenceError, match="the loss of the steps 1 to 10 is not finite"):
        trainer.train()

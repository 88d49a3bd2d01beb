import json
import math
import os
import re
import signal
from itertools import islice
from pathlib import Path

import distil
import pytest
import torch
import warm_process
from datasets import IterableDataset
from safetensors.torch import load_file
from trainer_cases import PLAIN, arguments, decomposition, rows
from transformers import Trainer, TrainerCallback

from mxd.base.capture import capture_mlps
from mxd.base.masks import token_mask
from mxd.evaluation import faithfulness, normalised_error
from mxd.modeling_mxd import MxDModel, SurgeryError
from mxd.trainers import DistillationArguments, DistillationTrainer, FinetuningTrainer, last_complete_checkpoint
from mxd.trainers.decomposition_trainer import PRIVATE_OVERRIDES, ROUTER_TOKENS
from mxd.trainers.router import router_loss, routing_recall

SCRIPT = Path(__file__).parent / "distil.py"


@pytest.mark.parametrize(
    ("normalization", "floor", "expected"),
    [
        # errors 1 + 1 = 2 and 9; norms² 25 and 1; the third token is masked
        ("squared_norm", 0.0, 2 / 25 + 9 / 1),
        ("squared_norm", 4.0, 2 / 25 + 9 / 4),
        ("norm", 0.0, 2 / 5 + 9 / 1),
    ],
)
def test_loss_by_hand(normalization, floor, expected):
    target = torch.tensor([[3.0, 4.0], [0.0, 1.0], [5.0, 5.0]])
    prediction = torch.tensor([[4.0, 3.0], [0.0, 4.0], [0.0, 0.0]])
    mask = torch.tensor([True, True, False])
    loss = DistillationTrainer.distillation_loss(prediction, target, mask, normalization, floor)
    assert loss.item() == pytest.approx(expected)


def test_loss_of_a_zero_target_is_finite():
    loss = DistillationTrainer.distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, dtype=torch.bool))
    assert loss.item() == 0


@pytest.mark.parametrize("method", ["mxd", "transcoder", "skip_transcoder"])
def test_loss_falls_and_every_parameter_moves(tiny_llama, tmp_path, method):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    model = decomposition(layers=(0, 2), method=method)
    trainer = DistillationTrainer(
        model, tiny_llama, arguments(tmp_path, max_steps=20, logging_steps=4, **PLAIN), train_dataset=rows()
    )
    trainer.init_weights()
    start = {name: value.clone() for name, value in model.named_parameters()}
    trainer.args.warm_start = True  # not anew: what was recorded is the start
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert not [name for name, value in model.named_parameters() if torch.equal(value, start[name])]
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())
    for layer in (0, 2):
        assert model.layer(layer).expert_frequency.sum() == pytest.approx(4, abs=0.5)


def test_what_is_missing_to_the_experts_share_by_hand(tiny_llama, tmp_path):
    model = decomposition()
    trainer = DistillationTrainer(
        model,
        tiny_llama,
        arguments(tmp_path, min_mean_ablation_error=0.9, mean_ablation_weight=2.0),
        train_dataset=rows(),
    )
    layer = model.layer(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, y, mask = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    losses = trainer.layer_losses(1, x, y, mask)
    torch.testing.assert_close(losses.distillation, trainer.distillation_loss(layer(x), y, mask))
    x, y = x[mask], y[mask]
    mean = layer.sum_experts(layer.encode(x)).mean(0)
    of_mean = mean * layer.decoder(layer.hidden(x)) + layer.output_bias
    errors = ((of_mean - y).square().sum(-1) / y.square().sum(-1)).clamp_max(1)
    assert losses.mean_ablation.item() == pytest.approx(2 * 8 * max(0.0, 0.9 - errors.mean().item()), rel=1e-4)


def test_experts_come_to_carry_the_share_that_is_asked_for(tiny_llama, tmp_path):
    shares = []
    for asked in (0.0, 0.5):
        torch.manual_seed(0)
        model, data = decomposition(), rows()
        settings = arguments(tmp_path, max_steps=45, min_mean_ablation_error=asked, learning_rate=4e-3)
        DistillationTrainer(model, tiny_llama, settings, train_dataset=data).train()
        ids = torch.tensor(data["input_ids"])
        shares.append(faithfulness(tiny_llama, model, [{"input_ids": ids}])["layers"]["1"]["clipped_expert_share"])
    assert shares[0] < 0.05
    assert shares[1] > 0.15


def test_transcoders_are_asked_for_no_share(tiny_llama, tmp_path):
    model = decomposition(method="skip_transcoder")
    trainer = DistillationTrainer(model, tiny_llama, arguments(tmp_path), train_dataset=rows())
    losses = trainer.layer_losses(1, torch.randn(5, 16), torch.randn(5, 16), torch.ones(5, dtype=torch.bool))
    assert losses.distillation > 0 and losses.mean_ablation == losses.auxiliary == 0


def test_logs_every_layer(tiny_llama, tmp_path):
    trainer = DistillationTrainer(
        decomposition(layers=(0, 2)), tiny_llama, arguments(tmp_path, logging_steps=5), train_dataset=rows()
    )
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx((entry["layer_0/loss"] + entry["layer_2/loss"]) / 2, rel=1e-4)


def test_after_a_resume_it_logs_every_layer_over_the_steps_since(tiny_llama, tmp_path):
    settings = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 3}
    trainers = [
        DistillationTrainer(
            decomposition(layers=(0, 2)),
            tiny_llama,
            arguments(tmp_path, max_steps=5, **settings),
            train_dataset=rows(),
        )
        for _ in range(2)
    ]
    trainers[0].train()
    for resumed in trainers:
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        entries = [entry for entry in resumed.state.log_history if "loss" in entry]
        assert [entry["step"] for entry in entries] == [2, 4]
        for entry in entries:
            assert entry["loss"] == pytest.approx((entry["layer_0/loss"] + entry["layer_2/loss"]) / 2, rel=1e-3)


def test_layerwise_backward_equals_the_whole_loss(tiny_llama, tmp_path):
    model = decomposition(layers=(0, 2))
    start = {"encoder_init": "pretrained", "decoder_init": "pretrained"}
    settings = arguments(tmp_path, modulation_init="unit", min_mean_ablation_error=0.9, auxiliary_weight=0.0, **start)
    trainer = DistillationTrainer(model, tiny_llama, settings, train_dataset=rows())
    trainer.init_weights()
    batch = trainer.data_collator([{"input_ids": row} for row in rows(8)["input_ids"]])
    captured, tokens = trainer.capture(batch), batch["input_ids"].numel()
    losses = [trainer.layer_losses(layer, x, y, torch.ones(x.shape[:2]).bool()) for layer, (x, y) in captured.items()]
    reported, penalty, auxiliary = (torch.stack(parts).sum() / tokens for parts in zip(*losses, strict=True))
    assert penalty > 0 and auxiliary == 0
    (reported + penalty).backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    stepwise = trainer.training_step(model, batch)
    torch.testing.assert_close(stepwise, reported.detach() / 2)  # the mean is shown; a layer learns as it does alone
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, gradients[name], rtol=1e-4, atol=1e-7)


def test_accumulated_micro_batches_equal_one_batch(tiny_llama, tmp_path):
    data = rows(16, ragged=True)
    trained = []
    for batch, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = decomposition()
        values = arguments(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            gate_init="random",
            train_sampling_strategy="sequential",
            min_mean_ablation_error=0.0,  # which is of the tokens that are there at once
        )
        trainer = DistillationTrainer(model, tiny_llama, values, train_dataset=data)
        torch.manual_seed(1)
        trainer.train()
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["stream", "routed"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, kind):
    """The killed training is a process of its own, and in one case the others too."""
    distil.main(str(tmp_path / "whole"), kind)
    killed = warm_process.run(SCRIPT, tmp_path / "killed", kind, "kill=5")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "final").exists()
    if kind == "stream":
        resumed = warm_process.run(SCRIPT, tmp_path / "killed", kind, "resume")
        assert resumed.returncode == 0, resumed.stderr
    else:
        distil.main(str(tmp_path / "killed"), kind, "resume")
    files = sorted(path.name for path in (tmp_path / "whole" / "final").glob("*.safetensors"))
    assert files
    for name in files:
        first, second = (load_file(tmp_path / folder / "final" / name) for folder in ("whole", "killed"))
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[key]) for key, value in first.items())


class Interrupt(TrainerCallback):
    """Ctrl-C in the fourth step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stream_is_opened_once_for_the_measurements_and_the_training(tiny_llama, tmp_path):
    data, opened = rows(200), []
    stream = IterableDataset.from_generator(lambda: opened.append(torch.rand(1)) or iter(data))
    found = []
    for training in (stream, data):
        args = arguments(tmp_path, max_steps=6, statistics_tokens=500, disable_tqdm=False)
        torch.manual_seed(0)
        trainer = DistillationTrainer(decomposition(), tiny_llama, args, train_dataset=training)
        monitored = list(map(torch.clone, (batch["input_ids"] for batch in islice(trainer.training_batches(), 12))))
        trainer.train()
        found.append(monitored)
    assert len(opened) == 1
    assert torch.equal(torch.cat(found[0]), torch.tensor(data["input_ids"])[:96])


def test_interrupt_keeps_a_checkpoint(tiny_llama, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    trainer = DistillationTrainer(
        decomposition(),
        tiny_llama,
        arguments(tmp_path, save_strategy="steps", save_steps=100),
        train_dataset=rows(),
        callbacks=[Interrupt()],
    )
    trainer.train()
    assert trainer.interrupted
    assert trainer.state.global_step == 4
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-4")
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("same", [False, True])
def test_a_training_at_its_last_step_takes_no_further_one(tiny_llama, tmp_path, same):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 100, "lr_scheduler_type": "constant"}
    trainers = [
        DistillationTrainer(
            decomposition(), tiny_llama, arguments(tmp_path, **changes), train_dataset=rows(), callbacks=callbacks
        )
        for callbacks in ([Interrupt()], [])
    ]
    trainers[0].train()
    assert trainers[0].interrupted  # in its last step: what follows it is still to be done
    saved = MxDModel.from_pretrained(last_complete_checkpoint(tmp_path))
    assert not saved.layer(1).expert_frequency.any()
    resumed = trainers[0 if same else 1]
    assert resumed.train(resume_from_checkpoint=True).global_step == resumed.state.global_step == 4
    assert not resumed.interrupted
    weights = dict(resumed.model.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in saved.named_parameters())
    assert resumed.model.layer(1).expert_frequency.any()


def test_checkpoint_holds_no_arguments_to_unpickle_and_no_teacher(tiny_llama, tmp_path):
    values = arguments(tmp_path, save_strategy="steps", save_steps=10)
    DistillationTrainer(decomposition(), tiny_llama, values, train_dataset=rows()).train()
    folder = tmp_path / "checkpoint-10"
    names = {path.name for path in folder.iterdir()}
    assert "training_args.bin" not in names
    assert {"model.safetensors", "config.json", "training_arguments.json", "activation_scales.json"} <= names
    assert json.loads((folder / "training_arguments.json").read_text())["learning_rate"] == 1e-2
    loaded, info = MxDModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.layers == [1]


def test_unfinished_checkpoint_is_not_resumed_from(tmp_path):
    for name, complete in (("5", True), ("10", False), ("best", True), ("9-copy", True)):
        folder = tmp_path / f"checkpoint-{name}"
        folder.mkdir()
        if complete:
            (folder / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-5")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        last_complete_checkpoint(tmp_path / "checkpoint-10")


def test_evaluate_gives_the_nmse_of_the_evaluation_room(tiny_llama, tmp_path):
    data = rows(10, ragged=True)
    model = decomposition(layers=(0, 1))
    for layer in (0, 1):
        torch.nn.init.normal_(model.layer(layer).decoder.weight)
    silent = tiny_llama.model.layers[1].mlp.register_forward_hook(
        lambda _, args, y: y.masked_fill(args[0].sum(-1, keepdim=True) > 0, 0.0)  # tokens with y = 0 have no error
    )
    trainer = DistillationTrainer(
        model, tiny_llama, arguments(tmp_path, per_device_eval_batch_size=4), eval_dataset=data
    )
    reported = trainer.evaluate()
    expected = faithfulness(tiny_llama, model, [trainer.data_collator(list(data))])["layers"]
    silent.remove()
    for layer in (0, 1):
        assert reported[f"eval_layer_{layer}/nmse"] == pytest.approx(expected[str(layer)]["nmse"], rel=1e-6)
    assert reported["eval_loss"] == reported["eval_nmse"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gate_init", "nonsense"),
        ("encoder_init", "keep"),
        ("modulation_init", "one"),
        ("loss_normalization", "l2"),
        ("calibration_tokens", 0),
        ("statistics_tokens", 0),
        ("minimum_relative_norm", 1.5),
        ("gate_learning_rate_factor", -0.1),
        ("modulation_learning_rate_factor", math.inf),
        ("modulation_learning_rate_factor", math.nan),
        ("auxiliary_weight", -1.0),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
    ],
)
def test_arguments_refuse_nonsense(tmp_path, field, value):
    with pytest.raises(ValueError, match=field):
        arguments(tmp_path, **{field: value})


def test_gate_and_modulations_learn_at_their_own_rates(tiny_llama, tmp_path):
    model = decomposition()
    settings = arguments(
        tmp_path,
        scale_activations=False,
        auxiliary_weight=0.0,
        gate_learning_rate_factor=0.0,
        modulation_learning_rate_factor=4.0,
    )
    trainer = DistillationTrainer(model, tiny_llama, settings, train_dataset=rows())
    optimizer = trainer.create_optimizer()
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    layer = model.layer(1)
    assert {rates[id(parameter)] for parameter in layer.gate.parameters()} == {0.0}
    assert rates[id(layer.modulation)] == pytest.approx(4e-2)
    others = [value for name, value in layer.named_parameters() if not name.startswith(("gate.", "modulation"))]
    assert {rates[id(parameter)] for parameter in others} == {1e-2}
    assert len(rates) == len(list(layer.parameters()))


ROUTED = {"num_expert_groups": 6, "num_groups_per_tok": 2}


def test_a_router_trains_jointly_and_only_from_its_own_loss(tiny_llama, tmp_path):
    model = decomposition(**ROUTED)
    data = rows()
    settings = arguments(tmp_path, max_steps=60, **PLAIN)
    trainer = DistillationTrainer(model, tiny_llama, settings, train_dataset=data)
    start, layer = {}, model.layer(1)

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            start.update({name: value.clone() for name, value in layer.state_dict().items()})

    trainer.add_callback(Watch())
    trainer.train()
    assert all(torch.isfinite(value).all() for value in model.parameters())
    for name, parameter in layer.named_parameters():
        assert not torch.equal(parameter, start[name]), name
    x, _ = capture_mlps(tiny_llama, [1], torch.tensor(data["input_ids"]))[1]
    trained = routing_recall(layer, x)
    layer.router.load_state_dict({name: start[f"router.{name}"] for name in ("weight", "bias")})
    assert trained.experts > max(0.5, routing_recall(layer, x).experts)  # the old router lags behind the gate
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_the_reported_loss_is_the_distillation_loss_alone(tiny_llama, tmp_path):
    model = decomposition(**ROUTED)
    trainer = DistillationTrainer(model, tiny_llama, arguments(tmp_path), train_dataset=rows())
    batch = next(iter(trainer.get_train_dataloader()))
    reported = trainer.training_step(model, dict(batch))
    mask = token_mask(batch["input_ids"])
    x, y = capture_mlps(tiny_llama, [1], batch["input_ids"])[1]
    torch.testing.assert_close(reported, trainer.layer_losses(1, x, y, mask).distillation.detach() / mask.sum())
    assert model.layer(1).router.weight.grad.any()


def test_a_routers_loss_is_a_mean_over_micro_batches(tiny_llama, tmp_path):
    data = rows(16)
    model = decomposition(**ROUTED)
    settings = arguments(tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=4, max_steps=1)
    trainer = DistillationTrainer(model, tiny_llama, settings, train_dataset=data)
    x = torch.randn(4, 32, 16)
    mask = torch.ones(4, 32).bool()
    whole = router_loss(model.layer(1), x[mask][::ROUTER_TOKENS])
    torch.testing.assert_close(4 * trainer.router_loss(1, x, mask), whole)


def test_unknown_layer_is_refused_before_training(tiny_llama, tmp_path):
    with pytest.raises(SurgeryError, match="layer 7 is out of range"):
        DistillationTrainer(decomposition(layers=(7,)), tiny_llama, arguments(tmp_path), train_dataset=rows())


@pytest.mark.parametrize(
    ("config", "start", "refused"),
    [
        ({"intermediate_size": 39}, {}, True),
        ({"encoder_type": "mlp"}, {}, True),
        ({"intermediate_size": 39}, {"encoder_init": "random", "decoder_init": "zero"}, False),
        ({"intermediate_size": 39}, {"warm_start": True}, False),
        ({"intermediate_size": 39, "method": "transcoder"}, {}, False),
    ],
)
def test_an_encoder_that_cannot_start_from_the_mlps_is_refused_before_training(
    tiny_llama, tmp_path, config, start, refused
):
    model, settings = decomposition(**config), arguments(tmp_path, max_steps=1, **start)
    if refused:
        with pytest.raises(ValueError, match=r"layer 1: .* from the pretrained MLP, which has form glu and 40"):
            DistillationTrainer(model, tiny_llama, settings, train_dataset=rows())
    else:
        DistillationTrainer(model, tiny_llama, settings, train_dataset=rows()).train()


def test_a_warm_start_trains_on_from_the_given_weights(tiny_llama, tmp_path):
    model = decomposition()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    given = {name: value.clone() for name, value in model.named_parameters()}
    settings = arguments(tmp_path, warm_start=True, learning_rate=0.0, max_steps=1)
    trainer = DistillationTrainer(model, tiny_llama, settings, train_dataset=rows())
    trainer.train()
    assert all(torch.equal(value, given[name]) for name, value in model.named_parameters())
    assert trainer.scales  # measured all the same
    settings = arguments(tmp_path, learning_rate=0.0, max_steps=1)
    DistillationTrainer(model, tiny_llama, settings, train_dataset=rows()).train()
    assert not [name for name, value in model.named_parameters() if torch.equal(value, given[name])]


def test_the_overridden_private_methods_are_the_listed_ones():
    found = set()
    ours = {*DistillationTrainer.mro(), *FinetuningTrainer.mro()}
    for trainer in (one for one in ours if one.__module__.startswith("mxd.")):
        found |= {name for name in vars(trainer) if re.match("_[a-z]", name) and hasattr(Trainer, name)}
    assert found == PRIVATE_OVERRIDES.keys()
    assert len(found) <= 5


def test_interventions_apply_in_training(tiny_llama, tmp_path):
    model = decomposition()
    trainer = DistillationTrainer(model, tiny_llama, arguments(tmp_path), train_dataset=rows())
    x, y, mask = torch.randn(5, 16), torch.randn(5, 16), torch.ones(5, dtype=torch.bool)
    torch.nn.init.normal_(model.layer(1).decoder.weight)
    before = trainer.layer_losses(1, x, y, mask).distillation
    with model.layer(1).intervene(ablate=range(48)):
        ablated = trainer.layer_losses(1, x, y, mask).distillation
    torch.testing.assert_close(ablated, trainer.distillation_loss(torch.zeros_like(y), y, mask))
    assert before != ablated


def test_other_columns_are_ignored(tiny_llama, tmp_path):
    data = rows().add_column("text", ["words"] * 64)
    trainer = DistillationTrainer(decomposition(), tiny_llama, arguments(tmp_path, max_steps=1), train_dataset=data)
    assert trainer.train().global_step == 1


def test_no_tracker_by_default(tmp_path):
    assert DistillationArguments(output_dir=str(tmp_path)).report_to in ([], "none")


@pytest.mark.parametrize(
    ("capabilities", "emulated"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "aarch64", "bf16": True}, False),
        ({}, False),
    ],
)
def test_bf16_is_warned_of_where_it_is_emulated(tmp_path, monkeypatch, caplog, capabilities, emulated):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    arguments(tmp_path, bf16=True, use_cpu=True)
    assert ("emulates bfloat16" in caplog.text) == emulated
    caplog.clear()
    arguments(tmp_path)
    assert "emulates" not in caplog.text


def test_bf16_products_keep_float32_weights(tiny_llama, tmp_path):
    model = decomposition()
    trainer = DistillationTrainer(model, tiny_llama, arguments(tmp_path, bf16=True), train_dataset=rows())
    dtypes = set()
    model.layer(1).encoder.register_forward_hook(lambda _, x, y: dtypes.add(y.dtype))
    trainer.train()
    assert torch.bfloat16 in dtypes
    assert all(value.dtype == torch.float32 for value in model.parameters())
    assert all(torch.isfinite(value).all() for value in model.parameters())


class OneMassiveToken(DistillationTrainer):
    """The MLP multiplies its output by a factor where a row has one of two ids, as some models do for "the"."""

    factor = 1.0

    def capture(self, inputs):
        ids = inputs["input_ids"][..., None]
        factors = torch.where((ids == 5) | (ids == 6), self.factor, 1.0)
        return {layer: (x, factors * y) for layer, (x, y) in super().capture(inputs).items()}


def test_massive_tokens_leave_the_others_as_accurate(tiny_llama, tmp_path):
    errors = []
    for factor in (1.0, 1000.0):
        torch.manual_seed(0)
        model, data = decomposition(), rows(128)
        trainer = OneMassiveToken(
            model, tiny_llama, arguments(tmp_path, max_steps=20, learning_rate=6e-3), train_dataset=data
        )
        trainer.factor = factor
        trainer.train()
        ids = torch.tensor(data["input_ids"])
        x, y = capture_mlps(tiny_llama, [1], ids)[1]
        ordinary = (ids != 5) & (ids != 6)
        errors.append(normalised_error(model.layer(1)(x), y)[ordinary].mean().item())
    assert errors[1] < 2 * errors[0] + 0.1


@pytest.mark.parametrize(
    ("changes", "experts", "calibrated", "counted"),
    [
        ({"max_steps": 3}, 48, 288, 288),
        ({"max_steps": 3, "gradient_accumulation_steps": 2}, 48, 576, 576),
        ({"max_steps": 3, "calibration_tokens": 900, "statistics_tokens": 900}, 48, 900, 900),
        ({"max_steps": 3}, 2000, 2000, 288),  # a token for each expert's gate row
        ({"max_steps": 3, "gate_init": "random"}, 2000, 288, 288),
        ({"max_steps": 3000}, 48, 768, 768),  # one epoch of the data
        ({"max_steps": -1, "num_train_epochs": 1}, 48, 768, 768),
    ],
)
def test_it_measures_on_no_more_tokens_than_it_trains_on(tiny_llama, tmp_path, changes, experts, calibrated, counted):
    count = 220 if calibrated > 768 else 64
    settings = arguments(tmp_path, **{"calibration_tokens": None, "statistics_tokens": None, **changes})
    trainer = DistillationTrainer(decomposition(num_experts=experts), tiny_llama, settings, train_dataset=rows(count))
    seen = []
    capture = trainer.capture
    trainer.capture = lambda inputs: seen.append(inputs["input_ids"].numel()) or capture(inputs)
    trainer.init_weights()
    assert sum(seen) == pytest.approx(calibrated, abs=0.12 * calibrated + 96)  # first positions do not count
    seen.clear()
    trainer.measure_experts()
    assert sum(seen) == pytest.approx(counted, abs=95)


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("groups", [None, 2])
def test_every_phase_has_a_bar(tiny_llama, tmp_path, capsys, groups, quiet):
    routed = {"num_expert_groups": 6, "num_groups_per_tok": groups} if groups else {}
    settings = arguments(tmp_path, max_steps=2, disable_tqdm=quiet)
    DistillationTrainer(decomposition(**routed), tiny_llama, settings, train_dataset=rows()).train()
    shown = capsys.readouterr().err
    for phase in ("calibrate", "init", "distil layer 1", "statistics", *(["fit router"] if groups else [])):
        assert (f"{phase}: 100%" in shown) != quiet, phase

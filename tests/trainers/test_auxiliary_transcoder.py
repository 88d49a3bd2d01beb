"""The auxiliary transcoder: its loss, its effect on the gate, its file in checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file
from trainer_cases import arguments, decomposition, rows

from mxd.base.capture import capture_mlps
from mxd.modeling_mxd import DIRECTIONS_NAME, MxDModel
from mxd.trainers import DistillationTrainer, last_complete_checkpoint
from mxd.trainers.auxiliary_transcoder import FILE_NAME


def test_its_error_is_that_of_a_skip_transcoder_on_the_gate(tiny_llama, tmp_path):
    model = decomposition()
    trainer = DistillationTrainer(model, tiny_llama, arguments(tmp_path, auxiliary_weight=0.5), train_dataset=rows())
    layer, auxiliary = model.layer(1), trainer.auxiliary.of_layer(1)
    for parameter in (*layer.parameters(), *auxiliary.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    x, y, mask = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    losses = trainer.layer_losses(1, x, y, mask)
    values, indices = layer.encode(x)
    dense = torch.zeros(2, 5, 48).scatter(-1, indices, values)
    coded = dense @ auxiliary.decoder + x @ auxiliary.skip.weight.T + auxiliary.output_bias
    error = ((coded - y).square().sum(-1) / y.square().sum(-1))[mask].sum()
    torch.testing.assert_close(losses.distillation, trainer.distillation_loss(layer(x), y, mask))
    torch.testing.assert_close(losses.auxiliary, 0.5 * error)


def test_the_gate_learns_to_code_the_output(tiny_llama, tmp_path):
    """With the gate that was trained with it, a decoder explains more than with the gate of a plain training."""
    errors = []
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        model, data = decomposition(), rows()
        settings = arguments(tmp_path, max_steps=80, learning_rate=3e-3, auxiliary_weight=weight)
        DistillationTrainer(model, tiny_llama, settings, train_dataset=data).train()
        x, y = capture_mlps(tiny_llama, [1], torch.tensor(data["input_ids"]))[1]
        values, indices = model.layer(1).encode(x)
        features = torch.zeros(*x.shape[:2], 48).scatter(-1, indices, values)
        known = torch.cat([features, x, torch.ones_like(x[..., :1])], -1).flatten(0, 1).detach()
        target = y.flatten(0, 1)
        found = torch.linalg.lstsq(known, target, driver="gelsd").solution
        errors.append(float((known @ found - target).square().sum() / target.square().sum()))
    assert errors[1] < 0.9 * errors[0]


def test_it_learns_at_a_transcoders_rate_and_scales(tiny_llama, tmp_path):
    model = decomposition()
    trainer = DistillationTrainer(model, tiny_llama, arguments(tmp_path, auxiliary_weight=1.0), train_dataset=rows())
    trainer.init_weights()
    optimizer = trainer.create_optimizer()
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    auxiliary, scales = trainer.auxiliary.of_layer(1), trainer.scales[1]
    assert rates[id(auxiliary.decoder)] == rates[id(auxiliary.output_bias)] == pytest.approx(3e-2 * scales.output_scale)
    assert rates[id(auxiliary.skip.weight)] == pytest.approx(3e-2 * scales.output_scale / scales.input_scale)


def test_only_checkpoints_keep_it_and_in_a_file_beside(tiny_llama, tmp_path):
    model = decomposition()
    settings = arguments(tmp_path, auxiliary_weight=1.0, save_strategy="steps", save_steps=10)
    trainer = DistillationTrainer(model, tiny_llama, settings, train_dataset=rows())
    names = set(model.state_dict())
    trainer.train()
    assert trainer.auxiliary.of_layer(1).decoder.any()
    assert set(model.state_dict()) == names
    trainer.save_model(tmp_path / "final")
    for folder in (tmp_path / "checkpoint-10", tmp_path / "final"):
        _, info = MxDModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (tmp_path / "checkpoint-10" / FILE_NAME).exists()
    assert not (tmp_path / "final" / FILE_NAME).exists()
    assert json.loads((tmp_path / "final" / "training_arguments.json").read_text())["auxiliary_weight"] == 1.0


def test_a_second_training_starts_it_anew(tiny_llama, tmp_path):
    settings = arguments(tmp_path, auxiliary_weight=1.0, max_steps=2)
    trainer = DistillationTrainer(decomposition(), tiny_llama, settings, train_dataset=rows())
    trainer.train()
    assert trainer.auxiliary.of_layer(1).decoder.any()
    trainer.init_weights()
    assert not any(parameter.any() for parameter in trainer.auxiliary.parameters())


def test_transcoders_have_none(tiny_llama, tmp_path):
    settings = arguments(tmp_path, auxiliary_weight=1.0, save_strategy="steps", save_steps=10)
    trainer = DistillationTrainer(decomposition(method="transcoder"), tiny_llama, settings, train_dataset=rows())
    trainer.train()
    assert not len(trainer.auxiliary)
    assert not (tmp_path / "checkpoint-10" / FILE_NAME).exists()


@pytest.mark.parametrize("sharding", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_training_is_refused(tiny_llama, tmp_path, sharding):
    trainer = DistillationTrainer(decomposition(), tiny_llama, arguments(tmp_path), train_dataset=rows())
    setattr(trainer, sharding, True)
    with pytest.raises(ValueError, match="FSDP and DeepSpeed do not train an auxiliary transcoder"):
        trainer.train()


def test_a_checkpoint_with_it_is_not_resumed_without(tiny_llama, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 5}
    DistillationTrainer(decomposition(), tiny_llama, arguments(tmp_path, **changes), train_dataset=rows()).train()
    settings = arguments(tmp_path, auxiliary_weight=0.0, max_steps=20)
    trainer = DistillationTrainer(decomposition(), tiny_llama, settings, train_dataset=rows())
    with pytest.raises(ValueError, match="was trained with an auxiliary transcoder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_checkpoint_without_it_is_not_resumed_from(tiny_llama, tmp_path):
    settings = arguments(tmp_path, auxiliary_weight=0.0, save_strategy="steps", save_steps=5)
    DistillationTrainer(decomposition(), tiny_llama, settings, train_dataset=rows()).train()
    settings = arguments(tmp_path, auxiliary_weight=1.0)
    trainer = DistillationTrainer(decomposition(), tiny_llama, settings, train_dataset=rows())
    with pytest.raises(ValueError, match="was trained with auxiliary_weight 0"):
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path))


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_its_decoder_is_kept_as_the_experts_directions(tiny_llama, tmp_path, layers):
    model = decomposition(layers)
    settings = arguments(tmp_path, auxiliary_weight=1.0, save_strategy="steps", save_steps=5)
    trainer = DistillationTrainer(model, tiny_llama, settings, train_dataset=rows())
    trainer.train()
    assert not (tmp_path / "checkpoint-5" / DIRECTIONS_NAME).exists()
    trainer.save_model(tmp_path / "final")
    loaded = MxDModel.from_pretrained(tmp_path / "final")
    for layer in layers:
        direction, maximum = loaded.directions(layer)
        assert torch.equal(direction, trainer.auxiliary.of_layer(layer).decoder)
        assert torch.equal(maximum > 0, model.layer(layer).expert_frequency > 0)
        assert (maximum >= model.layer(layer).expert_mean).all()
    assert loaded.direction_file.source == "auxiliary transcoder"


def test_they_are_those_of_the_best_checkpoint(tiny_llama, tmp_path):
    data = rows()
    settings = arguments(
        tmp_path, learning_rate=0.1, auxiliary_weight=1.0, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    trainer = DistillationTrainer(decomposition(), tiny_llama, settings, train_dataset=data, eval_dataset=data)
    trainer.evaluate = lambda *_, **__: {"eval_loss": trainer.state.global_step}  # the first is the best
    trainer.train()
    kept = load_file(tmp_path / "checkpoint-2" / FILE_NAME)["1.decoder"]
    assert torch.equal(trainer.model.directions(1).direction, kept)


@pytest.mark.parametrize("method", ["mxd", "transcoder", "skip_transcoder"])
def test_without_it_only_a_transcoder_has_directions(tiny_llama, tmp_path, method):
    settings = arguments(tmp_path, auxiliary_weight=0.0)
    trainer = DistillationTrainer(decomposition(method=method), tiny_llama, settings, train_dataset=rows())
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert (tmp_path / "final" / DIRECTIONS_NAME).exists() == (method != "mxd")

"""Training of layers that write to several MLPs: init, loss, caches, resumes, fine-tuning."""

import copy

import pytest
import torch
from factories import GLU, make_tiny_llama, mxd_model, randomise
from trainer_cases import PLAIN, arguments, decomposition, rows

from mxd.base.activation_cache import ActivationCache
from mxd.base.capture import capture_layers
from mxd.base.pretrained_weights import mlp_weights, record_base
from mxd.modeling_mxd import SurgeryError, find_mlp, make_spliced
from mxd.trainers import DistillationTrainer, FinetuningArguments, FinetuningTrainer
from mxd.trainers import initialization as init

SEVERAL = {"num_output_layers": 2}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("encoder_type", ["glu", "mlp"])
def test_later_outputs_begin_at_the_best_linear_map_of_the_units(bias, encoder_type):
    model, least = make_tiny_llama(), 0.3
    mxd = randomise(mxd_model((0,), output_bias=bias, **{**GLU, "encoder_type": encoder_type}, **SEVERAL))
    layer = mxd.layer(0)
    batches = [{"input_ids": torch.randint(0, 64, (8, 16))} for _ in range(6)]
    known = layer.decoder.weight[:16].clone()
    init.fit_later_outputs(mxd, lambda batch: capture_layers(model, mxd.config, **batch), iter(batches), {0: least})

    captured = [capture_layers(model, mxd.config, **batch)[0] for batch in batches]
    x, y = (torch.cat([pair[i][:, 1:].flatten(0, 1) for pair in captured]).double() for i in (0, 1))
    z = copy.deepcopy(layer).double().hidden(x)
    z = torch.cat([z, torch.ones_like(z[:, :1])], 1) if bias else z
    weight = y.square().sum(-1, keepdim=True).clamp_min(least).rsqrt()
    ridge = torch.diag((40 / len(z) * (weight * z).square().sum(0)).sqrt())
    left, right = torch.cat([weight * z, ridge]), torch.cat([weight * y[:, 16:], torch.zeros(len(ridge), 16)])
    expected = torch.linalg.lstsq(left, right).solution
    assert torch.equal(layer.decoder.weight[:16], known)
    assert torch.allclose(layer.decoder.weight[16:].double(), expected[:40].T, atol=1e-3)
    if bias:
        assert torch.allclose(layer.output_bias[16:].double(), expected[40], atol=1e-3)


@pytest.mark.parametrize("method", ["mxd", "skip_transcoder"])
def test_training_begins_at_the_mlp_lowers_the_loss_and_moves_every_parameter(tiny_llama, tmp_path, method):
    model = decomposition((0,), method, **SEVERAL)
    changes = {"max_steps": 20, "logging_steps": 4, "calibration_tokens": 1000, "min_mean_ablation_error": 0.0}
    trainer = DistillationTrainer(model, tiny_llama, arguments(tmp_path, **changes), train_dataset=rows())
    trainer.init_weights()
    layer, start = model.layer(0), {name: value.clone() for name, value in model.named_parameters()}
    if method == "mxd":
        weights = mlp_weights(find_mlp(tiny_llama, 0))
        assert torch.equal(layer.decoder.weight[:16], weights.decoder)
        assert torch.equal(layer.encoder.weight, weights.encoder)
        assert layer.decoder.weight[16:].abs().sum() > 0 and layer.output_bias[16:].abs().sum() > 0
    trainer.args.warm_start = True
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert not [name for name, value in model.named_parameters() if torch.equal(value, start[name])]
    directions, maxima = model.directions(0)
    assert directions.shape == (48, 32) and maxima.shape == (48,)


def test_a_decoder_at_zero_stays_at_zero(tiny_llama, tmp_path):
    trainer = DistillationTrainer(
        decomposition((0,), **SEVERAL), tiny_llama, arguments(tmp_path, **PLAIN), train_dataset=rows()
    )
    trainer.init_weights()
    assert not trainer.model.layer(0).decoder.weight.any()


def test_a_cache_and_a_resume_give_the_same_weights(tiny_llama, tmp_path):
    data = rows()
    how = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 5,
        "train_sampling_strategy": "sequential",
        "auxiliary_weight": 0.0,
    }
    ids = torch.tensor(data["input_ids"])
    tiny_llama.bfloat16()  # as a cache stores it

    def trained(folder, resume=False, **given):
        torch.manual_seed(0)
        model = decomposition((1,), **SEVERAL)
        trainer = DistillationTrainer(model, tiny_llama, arguments(tmp_path / folder, **how), **given)
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2") if resume else None)
        return model.state_dict()

    plain = trained("plain", train_dataset=data)
    cache = ActivationCache.record(tmp_path / "cache", tiny_llama, [1, 2], ids)
    found = {"cached": trained("cached", activations=cache), "resumed": trained("resumed", True, train_dataset=data)}
    for name, state in found.items():
        assert all(torch.equal(value, state[key]) for key, value in plain.items()), name
    few = ActivationCache.record(tmp_path / "few", tiny_llama, [1], ids)
    with pytest.raises(ValueError, match=r"has layers \[1\] of .* has layers \[1, 2\]"):
        trained("few", activations=few)


def test_layers_that_the_model_does_not_have_are_refused(tiny_llama, tmp_path):
    with pytest.raises(SurgeryError, match="layer 3 is out of range"):
        DistillationTrainer(decomposition((2,), **SEVERAL), tiny_llama, arguments(tmp_path), train_dataset=rows())


def test_fine_tuning(tiny_llama, tmp_path):
    mxd = randomise(decomposition((0,), **SEVERAL), 0.2)
    record_base(mxd, tiny_llama)
    model, data = make_spliced(tiny_llama, mxd, "a decomposition"), rows(16)
    start = {name: value.clone() for name, value in mxd.named_parameters()}
    values = {"per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 3e-3, "logging_steps": 1}
    values |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    values |= {"output_dir": str(tmp_path), "save_strategy": "no", "report_to": "none", "use_cpu": True}
    trainer = FinetuningTrainer(model, FinetuningArguments(**values), train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not [name for name, value in mxd.named_parameters() if torch.equal(value, start[name])]

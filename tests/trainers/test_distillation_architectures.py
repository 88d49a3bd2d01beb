"""Distillation of one member of every structural family: the loss falls, whatever the teacher reads."""

import pytest
import torch
from tiny_models import model_inputs, tiny_model
from trainer_cases import PLAIN

from mxd.base.pretrained_weights import mlp_active_units, mlp_encoder_type, mlp_hidden_act, mlp_widths
from mxd.modeling_mxd import MxDConfig, MxDLayerConfig, MxDModel, find_mlps
from mxd.trainers import DistillationArguments, DistillationTrainer

# type → (what stands for its family, stack, site)
FAMILIES = {
    "llama": ("GLU in a module", None, "mlp"),
    "gpt2": ("transposed MLP in a module", None, "mlp"),
    "phi3": ("fused GLU", None, "mlp"),
    "gpt_neox": ("beside the attention", None, "mlp"),
    "opt": ("inline in a decoder", None, "mlp"),
    "bert": ("inline in an encoder", None, "mlp"),
    "bert@chunk": ("run on slices of the row", None, "mlp"),
    "albert": ("one block for all layers", None, "mlp"),
    "bloom": ("adds the residual", None, "mlp"),
    "xlnet": ("residual and norm inside", None, "mlp"),
    "mixtral": ("mixture of experts", None, "mlp"),
    "deepseek_v3": ("dense layers, then mixtures with a shared expert", None, "mlp.experts"),
    "gpt_oss": ("mixture with interleaved stacks", None, "mlp"),
    "llama4_text": ("mixture that returns more than its output", None, "mlp"),
    "longcat_flash": ("several MLPs a layer", None, "mlps.1"),
    "nemotron_h": ("MLPs in some layers only", None, "mlp"),
    "zamba": ("weights tied over layers", None, "mlp"),
    "rwkv": ("a state, and the token before", None, "mlp"),
    "t5": ("decoder of an encoder-decoder", None, "mlp"),
    "bart": ("encoder of an encoder-decoder", "encoder", "mlp"),
    "whisper": ("reads sound", "encoder", "mlp"),
    "vit": ("reads images", None, "mlp"),
    "swin": ("widths that grow from stage to stage", None, "mlp"),
}

# Types whose causal class is the decoder alone.
WHOLE = {"bart": "AutoModelForSeq2SeqLM", "whisper": "AutoModelForSpeechSeq2Seq"}


def decomposition_of(teacher, stack, site):
    sites = [found for found in find_mlps(teacher, stack, site).values() if found.slots]
    configs = {}
    for found in sites[-2:]:
        inputs, _, outputs = mlp_widths(found)
        configs[found.layer] = MxDLayerConfig(
            hidden_size=inputs,
            output_size=outputs,
            intermediate_size=mlp_active_units(found),
            num_experts=24,
            num_experts_per_tok=4,
            hidden_act=mlp_hidden_act(found) or "silu",
            encoder_type=mlp_encoder_type(found),
        )
    return MxDModel(MxDConfig.from_layer_configs(configs, stack=stack, site=site))


@pytest.mark.parametrize("missing", [(), (1,), (0, 1, 2)])
def test_rows_of_an_encoder_decoder_without_a_token_contribute_nothing(tmp_path, missing):
    """Every micro-batch of `missing` has labels of padding only; its positions are counted by a forward pass."""
    teacher = tiny_model("t5")
    teacher.config.decoder_start_token_id = 0
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 60, (7,)), "labels": torch.randint(3, 60, (5 + i,))} for i in range(3)]
    for index in missing:
        rows[index]["labels"][:] = -100
    arguments = DistillationArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1,
        max_steps=1, save_strategy="no", disable_tqdm=True, warm_start=True, logging_steps=1, **PLAIN,
    )  # fmt: skip
    mxd = decomposition_of(teacher, None, "mlp")
    trainer = DistillationTrainer(mxd, teacher, arguments, train_dataset=rows, data_collator=collate)
    batches, count = trainer.get_batch_samples(iter([collate([row]) for row in rows]), 3, trainer.args.device)
    assert int(count) == max(1, sum(5 + i for i in range(3) if i not in missing))
    losses = [float(trainer.training_step(mxd, batch, count)) for batch in batches]
    assert [loss == 0 for loss in losses] == [index in missing for index in range(3)]
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in mxd.parameters())


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_loss_falls(model_type, tmp_path):
    _, stack, site = FAMILIES[model_type]
    teacher = tiny_model(model_type, WHOLE.get(model_type))
    inputs = model_inputs(teacher, batch=8)
    rows = [{name: tensor[row] for name, tensor in inputs.items()} for row in range(8)] * 4
    mxd = decomposition_of(teacher, stack, site)
    arguments = DistillationArguments(
        output_dir=str(tmp_path),
        max_steps=10,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        warmup_steps=0,
        learning_rate=2e-2,
        calibration_tokens=64,
        statistics_tokens=64,
        **PLAIN,
    )
    trainer = DistillationTrainer(mxd, teacher, arguments, train_dataset=rows, data_collator=collate, eval_dataset=rows)
    passes = []
    teacher.register_forward_pre_hook(lambda *_: passes.append(trainer.state.global_step))
    trainer.train()
    assert all(passes.count(step) == 1 for step in range(1, 10))  # once a step; more at 0 and 10, to measure
    assert not trainer._captured
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 10
    assert losses[-1] < 0.8 * losses[0]
    assert trainer.evaluate()["eval_nmse"] < 1
    frequencies = [mxd.layer(layer).expert_frequency for layer in mxd.config.layers]
    assert all(0 < frequency.sum() <= 4 + 1e-4 for frequency in frequencies)

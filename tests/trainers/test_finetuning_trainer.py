import math

import pytest
import torch
import torch.nn.functional as F
from factories import GLU, random_mxd_model
from peft import LoraConfig, get_peft_model
from trainer_cases import ARGUMENTS, rows
from transformers import GPT2Config, GPT2LMHeadModel

from mxd.base.capture import capture_mlps
from mxd.base.masks import token_mask
from mxd.evaluation import LogitSums
from mxd.modeling_mxd import MxDModel, make_spliced
from mxd.trainers import FinetuningArguments, FinetuningTrainer, fit_router, routing_recall

LAYERS = (0, 2)


def spliced(base, layers=LAYERS, **changes):
    """A base model with a random decomposition without a zero anywhere."""
    torch.manual_seed(1)
    return make_spliced(base, random_mxd_model(layers, **{**GLU, **changes}), "decomposition")


def arguments(folder, **changes):
    return FinetuningArguments(**{"output_dir": str(folder), "nmse_weight": 0.0, **ARGUMENTS, **changes})


def naive_loss(model, batch, loss):
    """The definition: all logits at once, means over the predictions of tokens that are no padding."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    counted = mask[:, :-1] & mask[:, 1:]
    log_q = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits.log_softmax(-1)[:, :-1][counted]
    if loss == "cross_entropy":
        return F.nll_loss(log_q, ids[:, 1:][counted])
    with torch.no_grad(), model.untouched():
        log_p = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits.log_softmax(-1)[:, :-1][counted]
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def test_losses_by_hand():
    untouched, target = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log()
    logits = torch.stack([target + 3, target - 1])  # softmax does not see the constants
    kl = FinetuningTrainer.kl_loss(logits, untouched.expand(2, 2))
    assert kl.item() == pytest.approx(2 * (0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)))
    loss = FinetuningTrainer.cross_entropy_loss(logits, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(-math.log(0.8) - math.log(0.2))


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_an_adapter_that_wraps_a_layer_is_refused_and_one_inside_trains(tiny_llama, tmp_path, loss):
    model = spliced(tiny_llama)
    inside = {"target_modules": ["gate", "decoder"]}
    model.add_adapter(LoraConfig(r=2, **inside))
    trainer = FinetuningTrainer(model, arguments(tmp_path, loss=loss), train_dataset=rows())
    trained = {id(one) for group in trainer.create_optimizer().param_groups for one in group["params"]}
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 8 and {id(parameter) for parameter in adapters} == trained
    model = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["mlp.modulation"]))
    with pytest.raises(ValueError, match=r"an adapter on the modulation, which wraps its layer, trains with"):
        FinetuningTrainer(model, arguments(tmp_path, loss=loss), train_dataset=rows())


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_loss_and_gradients_are_those_of_the_definition(tiny_llama, tmp_path, loss, padding):
    model = spliced(tiny_llama)
    trainer = FinetuningTrainer(model, arguments(tmp_path, loss=loss), train_dataset=rows())
    batch = trainer.data_collator([{"input_ids": row} for row in rows(6, ragged=True)["input_ids"]])
    expected = naive_loss(model, batch, loss)
    expected.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}
    model.zero_grad()
    if padding == "left":
        shifts = (batch["attention_mask"] == 0).sum(-1).tolist()
        batch = {
            name: torch.stack([row.roll(shift) for row, shift in zip(values, shifts, strict=True)])
            for name, values in batch.items()
        }
        assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"][:, 0].all()
    value = trainer.compute_loss(model, batch)
    value.backward()
    torch.testing.assert_close(value, expected)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_layers_own_errors_are_added(tiny_llama, tmp_path):
    model = spliced(tiny_llama)
    trainer = FinetuningTrainer(
        model, arguments(tmp_path, nmse_weight=0.5, minimum_relative_norm=0.0), train_dataset=rows()
    )
    batch = trainer.data_collator([{"input_ids": row} for row in rows(6, ragged=True)["input_ids"]])
    value = trainer.compute_loss(model, batch)
    with model.untouched():
        captured = capture_mlps(model, list(LAYERS), **batch)
    lengths = batch["attention_mask"].sum(-1).tolist()
    errors = []
    for layer, (x, y) in captured.items():
        ratios = (model.decomposition.layer(layer)(x) - y).square().sum(-1) / y.square().sum(-1)
        errors.append(torch.cat([ratios[row, : length - 1] for row, length in enumerate(lengths)]).mean())
    torch.testing.assert_close(value, naive_loss(model, batch, "kl") + 0.5 * torch.stack(errors).mean())


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"nmse_weight": 0.1}, 2),
        ({"nmse_weight": 0.0}, 2),
        ({"nmse_weight": 0.1, "loss": "cross_entropy"}, 2),
        ({"nmse_weight": 0.0, "loss": "cross_entropy"}, 1),
    ],
)
@pytest.mark.parametrize("head", ["hidden states", "logits"])
def test_the_base_runs_once_beside_the_spliced_model(tiny_llama, tmp_path, changes, passes, head):
    trainer = FinetuningTrainer(spliced(tiny_llama), arguments(tmp_path, **changes), train_dataset=rows())
    if head == "logits":
        trainer.head.output = None  # as for a head that is more than the output embedding
    ran = []
    tiny_llama.model.embed_tokens.register_forward_hook(lambda *_: ran.append(1))
    trainer.compute_loss(trainer.model, trainer.data_collator(list(rows(4)))).backward()
    assert len(ran) == passes


@pytest.mark.parametrize(("loss", "method"), [("kl", "mxd"), ("cross_entropy", "skip_transcoder")])
def test_loss_falls_and_only_the_decomposition_moves(tiny_llama, tmp_path, loss, method):
    base = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    model = spliced(tiny_llama, method=method)
    start = {name: value.clone() for name, value in model.decomposition.named_parameters()}
    # Batches of all rows, so that no other rows' loss is between the first and the last step's.
    values = arguments(tmp_path, loss=loss, max_steps=30, logging_steps=1, per_device_train_batch_size=64)
    trainer = FinetuningTrainer(model, values, train_dataset=rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert not [name for name, value in model.decomposition.named_parameters() if torch.equal(value, start[name])]
    for layer in LAYERS:
        assert model.decomposition.layer(layer).expert_frequency.sum() == pytest.approx(4, abs=0.5)
    trainer.save_model(str(tmp_path / "saved"))
    loaded, info = MxDModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    trained = model.decomposition.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in loaded.state_dict().items())
    restored = model.unsplice().state_dict()
    assert restored.keys() == base.keys()
    assert all(torch.equal(value, restored[name]) for name, value in base.items())


def test_accumulated_micro_batches_equal_one_batch(tiny_llama, tmp_path):
    data = rows(16, ragged=True)
    trained = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = spliced(tiny_llama)
        values = arguments(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            train_sampling_strategy="sequential",
        )
        trainer = FinetuningTrainer(model, values, train_dataset=data)
        trainer.train()
        trained.append(model.decomposition.state_dict())
        model.unsplice()
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_evaluate_gives_the_metrics_of_the_evaluation_room(tiny_llama, tmp_path):
    data = rows(10, ragged=True)
    model = spliced(tiny_llama)
    trainer = FinetuningTrainer(model, arguments(tmp_path, per_device_eval_batch_size=4), eval_dataset=data)
    reported = trainer.evaluate()
    batch = trainer.data_collator([{"input_ids": row} for row in data["input_ids"]])
    sums = LogitSums()
    with torch.no_grad():
        with model.untouched():
            reference = model(**batch).logits
        sums.update(model(**batch).logits, batch["input_ids"], token_mask(**batch), reference)
    assert reported["eval_kl"] == pytest.approx(sums.kl, rel=1e-4)
    assert reported["eval_cross_entropy"] == pytest.approx(sums.cross_entropy, rel=1e-4)
    assert reported["eval_loss"] == reported["eval_kl"]


def test_the_base_runs_without_dropout(tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=32, resid_pdrop=0.5, attn_pdrop=0.5)
    model = spliced(GPT2LMHeadModel(config), hidden_act="gelu", encoder_type="mlp")
    trainer = FinetuningTrainer(model, arguments(tmp_path), train_dataset=rows())
    batch = trainer.data_collator([{"input_ids": row} for row in rows(4)["input_ids"]])
    model.train()  # as the Trainer does before every step
    first = trainer.compute_loss(model, batch)
    assert torch.equal(first, trainer.compute_loss(model, batch))
    torch.testing.assert_close(first, naive_loss(model.eval(), batch, "kl"))


def test_a_router_keeps_up_with_its_gate(tiny_llama, tmp_path):
    model = spliced(tiny_llama, layers=(0,), num_experts=48, num_expert_groups=6, num_groups_per_tok=2)
    data = rows()
    settings = arguments(tmp_path, max_steps=30, learning_rate=0.03)
    trainer = FinetuningTrainer(model, settings, train_dataset=data)
    layer = model.decomposition.layer(0)
    x = trainer.capture({"input_ids": torch.tensor(data["input_ids"])})[0][0]
    fit_router(layer, x.flatten(0, 1))
    before = {name: value.clone() for name, value in layer.router.state_dict().items()}
    trainer.train()
    trained = routing_recall(layer, x)
    layer.router.load_state_dict(before)
    assert trained.experts > routing_recall(layer, x).experts + 0.02


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_llama, tmp_path):
    trained = []
    for checkpointing in (False, True):
        model = spliced(tiny_llama)
        calls = []
        values = arguments(tmp_path, gradient_checkpointing=checkpointing, max_steps=2, calibration_tokens=96)
        trainer = FinetuningTrainer(model, values, train_dataset=rows(8))
        model.decomposition.layer(2).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        trained.append((model.decomposition.state_dict(), len(calls)))
        tiny_llama = model.unsplice()
        tiny_llama.gradient_checkpointing_disable()
    (plain, forwards), (checkpointed, more_forwards) = trained
    assert more_forwards == forwards + 2  # each step's backward runs the layer again
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, msg=name)


def test_a_base_in_bfloat16_keeps_its_dtype_and_the_decomposition_trains_in_float32(tiny_llama, tmp_path):
    model = spliced(tiny_llama.bfloat16())
    trainer = FinetuningTrainer(model, arguments(tmp_path), train_dataset=rows())
    trainer.train()
    assert all(value.isfinite().all() for value in model.parameters())
    assert {value.dtype for value in model.decomposition.parameters()} == {torch.float32}
    assert {value.dtype for value in model.unsplice().parameters()} == {torch.bfloat16}


def test_bf16_products(tiny_llama, tmp_path):
    model = spliced(tiny_llama)
    trainer = FinetuningTrainer(model, arguments(tmp_path, bf16=True), train_dataset=rows())
    dtypes = set()
    model.decomposition.layer(0).encoder.register_forward_hook(lambda _, x, y: dtypes.add(y.dtype))
    trainer.train()
    assert torch.bfloat16 in dtypes
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in model.parameters())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    batch = trainer.data_collator([{"input_ids": row} for row in rows()["input_ids"]])
    assert losses[-1] == pytest.approx(naive_loss(model, batch, "kl").item(), rel=0.5)


def test_frozen_parts_of_the_decomposition_stay_as_they_are(tiny_llama, tmp_path):
    model = spliced(tiny_llama)
    gate = model.decomposition.layer(0).gate
    gate.requires_grad_(False)
    before = gate.weight.clone()
    FinetuningTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows()).train()
    assert torch.equal(gate.weight, before)


def test_a_training_at_its_last_step_takes_no_further_one(tiny_llama, tmp_path):
    model = spliced(tiny_llama)
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    FinetuningTrainer(model, arguments(tmp_path, **settings), train_dataset=rows()).train()
    trained = {name: value.clone() for name, value in model.decomposition.named_parameters()}
    again = spliced(model.unsplice())
    trainer = FinetuningTrainer(again, arguments(tmp_path, **settings), train_dataset=rows())
    assert trainer.train(resume_from_checkpoint=True).global_step == 3
    assert all(torch.equal(value, trained[name]) for name, value in again.decomposition.named_parameters())
    assert all(again.decomposition.layer(layer).expert_frequency.any() for layer in LAYERS)


def test_a_model_without_a_decomposition_is_refused(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="no decomposition is spliced into this LlamaForCausalLM"):
        FinetuningTrainer(tiny_llama, arguments(tmp_path), train_dataset=rows())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss", "mse"),
        ("nmse_weight", -1.0),
        ("calibration_tokens", 0),
        ("gate_learning_rate_factor", math.nan),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
    ],
)
def test_arguments_refuse_nonsense(tmp_path, field, value):
    with pytest.raises(ValueError, match=field):
        arguments(tmp_path, **{field: value})

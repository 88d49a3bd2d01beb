"""PEFT adapters on a spliced model: on the decomposition's linears and raw parameters, on the base's attention."""

import copy
import json

import pytest
import torch
from doors_cases import IDS, logits
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from mxd.modeling_mxd import SplicedLanguageModel, SurgeryError

OWN = ["gate", "encoder", "encoder_up", "decoder"]


def lora(**options):
    return LoraConfig(r=2, task_type="CAUSAL_LM", **options)


ADAPTERS = {
    "attention": lora(target_modules=["q_proj", "v_proj"]),
    "decomposition": lora(target_modules=OWN),
    "both": lora(target_modules=["q_proj", "gate", "decoder"]),
    "all-linear": lora(target_modules="all-linear"),
    "dora": lora(target_modules=["q_proj", "gate", "decoder"], use_dora=True),
    "ia3": IA3Config(
        target_modules=["k_proj", "gate", "decoder"], feedforward_modules=["decoder"], task_type="CAUSAL_LM"
    ),
    "modulation": lora(target_modules=[], target_parameters=["mlp.modulation"]),
    "modules_to_save": lora(target_modules=["gate"], modules_to_save=["encoder"]),
}
# These change nothing of the base: a merged model is saved whole.
STORABLE = ["decomposition", "modulation", "modules_to_save"]


def train(model, steps=3):
    """A loop as one writes it by hand; returns names of what trains, and of what moved."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval()
    return trained, {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_train_alone_and_come_back_bit_for_bit(repo, spliced, expected, tmp_path, name):
    model = get_peft_model(spliced, copy.deepcopy(ADAPTERS[name]))
    trained, moved = train(model)
    assert trained
    assert moved == trained
    want = logits(model)
    assert not torch.equal(want, expected)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(repo)
    assert not [key for key in load_file(folder / "adapter_model.safetensors") if "embed" in key or "lm_head" in key]
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), want)
    if name != "dora":  # transformers' own loader drops the magnitudes of DoRA, of any model
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), want)
    merged = model.merge_and_unload()
    assert isinstance(merged, SplicedLanguageModel)
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")  # the decomposition alone
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged)) == (name in STORABLE)


def test_unload_gives_the_spliced_model_back(spliced, expected, tiny_llama):
    model = get_peft_model(spliced, copy.deepcopy(ADAPTERS["both"]))
    train(model)
    unloaded = model.unload()
    assert unloaded is spliced
    assert torch.equal(logits(unloaded), expected)
    assert torch.equal(logits(unloaded.unsplice()), logits(tiny_llama))


def test_adapters_of_transformers_own_interface(repo, spliced, tmp_path):
    spliced.add_adapter(copy.deepcopy(ADAPTERS["both"]))
    trained, moved = train(spliced)
    assert moved == trained
    spliced.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(spliced))


def test_a_wrapped_gate_selects_as_a_plain_one_with_the_same_weights(spliced):
    """With an adapter the gate is a module that must be called; selection and gradients stay those of the product."""
    layer = spliced.decomposition.layer(0)
    x, upstream = torch.randn(5, 7, 16), torch.randn(5, 7, 16)
    model = get_peft_model(spliced, lora(target_modules=["gate"], init_lora_weights=False))
    gate = layer.gate
    update = gate.lora_B["default"].weight @ gate.lora_A["default"].weight * gate.scaling["default"]
    wrapped_x = x.clone().requires_grad_()
    wrapped = layer(wrapped_x)
    wrapped.backward(upstream)
    plain = copy.deepcopy(model).merge_and_unload().decomposition.layer(0)
    assert type(plain.gate) is nn.Linear
    plain.gate.weight.requires_grad_(True)
    plain_x = x.clone().requires_grad_()
    expected = plain(plain_x)
    expected.backward(upstream)
    torch.testing.assert_close(wrapped, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wrapped_x.grad, plain_x.grad, rtol=1e-4, atol=1e-4)
    assert update.norm() > 0.01
    gradient = plain.gate.weight.grad * gate.scaling["default"]  # of B A, from which the chain rule gives B's and A's
    torch.testing.assert_close(
        gate.lora_B["default"].weight.grad, gradient @ gate.lora_A["default"].weight.T, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        gate.lora_A["default"].weight.grad, gate.lora_B["default"].weight.T @ gradient, rtol=1e-3, atol=1e-4
    )


def test_a_whole_layer_that_an_adapter_replaced_is_not_saved_without_notice(spliced, tmp_path):
    config = lora(target_modules=["gate"], layers_to_transform=[2], modules_to_save=["layers.0.mlp"])
    model = get_peft_model(spliced, config)
    train(model)
    want = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), want)
    with pytest.raises(ValueError, match="another module replaced the decomposition's layer 0"):
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
    with pytest.raises(SurgeryError, match="changed after it was replaced"):
        spliced.unsplice()

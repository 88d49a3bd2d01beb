"""A base model that is spliced for the moment cannot be saved: its class would not load the decomposition's weights."""

import copy
import pickle

import pytest
import torch
from factories import random_mxd_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mxd.modeling_mxd import MxDModel, SurgeryError, make_spliced

IDS = torch.arange(2, 12)[None]
REFUSED = r"this LlamaForCausalLM cannot be saved while MLPs are replaced \(layers {}\)"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def decomposition(*layers):
    return random_mxd_model(layers, hidden_act="silu")


def assert_saves(model, folder, expected):
    model.save_pretrained(folder)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(folder)), expected)


def assert_refused(model, folder, layers):
    for method in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(SurgeryError, match=REFUSED.format(layers)):
            method(folder)
    assert not folder.exists()


def test_it_is_refused_until_all_is_restored(tiny_llama, tmp_path):
    before, attributes = logits(tiny_llama), set(vars(tiny_llama))
    with pytest.raises(RuntimeError, match="mine"), decomposition(0, 2).spliced(tiny_llama) as replaced:
        assert_refused(tiny_llama, tmp_path / "no", r"\[0, 2\]")
        with replaced[0].undone():
            assert_refused(tiny_llama, tmp_path / "no", r"\[2\]")
            with replaced[1].undone():
                assert_saves(tiny_llama, tmp_path / "undone", before)
        with decomposition(1).spliced(tiny_llama):
            assert_refused(tiny_llama, tmp_path / "no", r"\[0, 1, 2\]")
        assert_refused(tiny_llama, tmp_path / "no", r"\[0, 2\]")
        raise RuntimeError("mine")
    assert set(vars(tiny_llama)) == attributes
    assert_saves(tiny_llama, tmp_path / "restored", before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_refused_too(tiny_llama, tmp_path, copied):
    before = logits(tiny_llama)
    with decomposition(1).spliced(tiny_llama):
        spliced = logits(tiny_llama)
        other = copied(tiny_llama)
    assert torch.equal(logits(other), spliced)
    assert other.save_pretrained.model is other
    assert_refused(other, tmp_path / "no", r"\[1\]")
    assert_saves(tiny_llama, tmp_path / "yes", before)


def test_an_adapter_is_saved_as_ever(tiny_llama, tmp_path):
    from peft import LoraConfig

    with decomposition(1).spliced(tiny_llama):
        tiny_llama.add_adapter(LoraConfig(target_modules=["q_proj"], r=2))
        tiny_llama.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names


def test_a_model_that_is_spliced_for_good_saves_the_decomposition(tiny_llama, tmp_path):
    before = logits(tiny_llama)
    mxd = decomposition(0)
    model = make_spliced(tiny_llama, mxd, "mine")
    with model.untouched():
        pass
    with decomposition(2).spliced(model):
        assert_refused(model, tmp_path / "no", r"\[2\]")
    model.save_pretrained(tmp_path / "decomposition")
    saved = MxDModel.from_pretrained(tmp_path / "decomposition").state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in mxd.state_dict().items())
    assert_saves(model.unsplice(), tmp_path / "base", before)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "base")) is LlamaForCausalLM

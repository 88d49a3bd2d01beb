"""What other people's training loops find in a spliced model: only the decomposition trains, all of it does."""

import pytest
import torch
from doors_cases import IDS, decomposition, logits
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mxd.modeling_mxd import SurgeryError, make_spliced


def by_hand(model, tmp_path):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()


def stock_trainer(model, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()


@pytest.mark.parametrize("loop", [by_hand, stock_trainer])
@pytest.mark.parametrize("origin", ["loaded", "spliced in memory"])
def test_all_of_the_decomposition_moves_and_nothing_of_the_base(repo, base_folder, tiny_llama, tmp_path, loop, origin):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    if origin == "loaded":
        model = AutoModelForCausalLM.from_pretrained(repo)
    else:
        model = make_spliced(tiny_llama, decomposition(base_folder, tiny_llama), str(repo))
    start = {name: parameter.clone() for name, parameter in model.decomposition.named_parameters()}
    loss = model(IDS, labels=IDS).loss.item()
    loop(model, tmp_path)
    assert model(IDS, labels=IDS).loss.item() < 0.95 * loss
    assert not [name for name, value in model.decomposition.named_parameters() if torch.equal(value, start[name])]
    model.save_pretrained(tmp_path / "trained")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "trained")), logits(model.eval()))
    restored = model.unsplice().state_dict()
    assert all(torch.equal(value, restored[name]) for name, value in before.items())


@pytest.mark.parametrize("cast", [True, False])
def test_the_decomposition_comes_in_the_bases_dtype_or_keeps_its_own(base_folder, tiny_llama, cast):
    mxd = decomposition(base_folder, tiny_llama)
    before = mxd.layer(0).gate.weight.clone()
    model = make_spliced(tiny_llama.bfloat16(), mxd, "mine", cast=cast)
    weight = model.model.layers[0].mlp.gate.weight
    assert torch.equal(weight, before.bfloat16() if cast else before)
    assert logits(model).dtype == torch.bfloat16


def test_untouched(spliced, expected, tiny_llama):
    with spliced.untouched() as base:
        assert base is spliced
        assert torch.equal(logits(base), logits(tiny_llama))
        assert spliced.decomposition.layer(0) not in list(spliced.modules())
    assert torch.equal(logits(spliced), expected)


def test_untouched_after_an_exception(spliced, expected):
    with pytest.raises(KeyboardInterrupt), spliced.untouched():
        raise KeyboardInterrupt
    assert torch.equal(logits(spliced), expected)


def test_untouched_follows_the_models_dtype_and_mode(spliced, tiny_llama):
    spliced.to(torch.bfloat16).train()
    with spliced.untouched():
        assert {parameter.dtype for parameter in spliced.parameters()} == {torch.bfloat16}
        assert all(module.training for module in spliced.modules())
        spliced_logits = logits(spliced.eval())
    assert torch.equal(spliced_logits, logits(tiny_llama.to(torch.bfloat16)))
    spliced.decomposition.float()  # another dtype of the decomposition alone is none of the base's
    with spliced.untouched():
        assert {parameter.dtype for parameter in spliced.parameters()} == {torch.bfloat16}


def test_untouched_refuses_a_layer_that_was_replaced_since(spliced):
    ours = spliced.model.layers[2].mlp
    spliced.model.layers[2].mlp = nn.Identity()
    with pytest.raises(SurgeryError, match="changed after it was replaced"), spliced.untouched():
        pass
    assert spliced.model.layers[0].mlp is spliced.decomposition.layer(0)  # put back before the error left
    spliced.model.layers[2].mlp = ours
    with spliced.untouched():
        pass

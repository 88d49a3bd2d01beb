"""What the tests by module leave open: who else is touched by an evaluation, and where its numbers come from."""

import math

import pytest
import torch
from evaluation_cases import activations, approximate, batches, decomposition, exact, numbers, pad
from reference import dense_coefficients

from mxd.evaluation import faithfulness, measure_expert_statistics, normalised_entropy


def layer_numbers(results):
    return {name: value for name, value in numbers(results).items() if "/" in name}


def test_entropy_of_a_single_used_expert_is_written_as_a_plain_zero():
    assert math.copysign(1, normalised_entropy(torch.tensor([0, 9, 0]))) == 1


def test_expert_use_is_that_of_the_dense_coefficients(tiny_llama):
    rows, mxd = batches(), approximate(tiny_llama, layers=(0, 2))
    results = faithfulness(tiny_llama, mxd, rows)
    for index in (0, 2):
        active = dense_coefficients(mxd.layer(index), activations(tiny_llama, index, rows)[0]) > 0
        frequency, shares = active.double().mean(0), active.sum(0).double() / active.sum()
        row = results["layers"][str(index)]
        assert row["l0"] == pytest.approx(active.sum(-1).double().mean().item())
        assert row["dead_experts"] == pytest.approx((frequency == 0).double().mean().item())
        assert row["max_expert_frequency"] == pytest.approx(frequency.max().item())
        assert row["frequent_experts"] == (frequency > 0.25).sum().item() > 0
        entropy = sum(-p * math.log(p) for p in shares.tolist() if p) / math.log(24)
        assert row["expert_entropy"] == pytest.approx(entropy) and entropy < 0.999


@pytest.mark.parametrize("padding", [{"left": 3}, {"right": 3}, {"left": 2, "right": 1, "rows": 1, "token": 63}])
def test_padding_does_not_enter_statistics_that_are_measured_here(tiny_llama, padding):
    rows, mxd = batches(), approximate(tiny_llama, layers=(0, 2))
    expected = numbers(faithfulness(tiny_llama, mxd, rows))
    assert all(math.isfinite(value) for value in expected.values())
    padded = faithfulness(tiny_llama, mxd, [pad(batch, **padding) for batch in rows])
    assert numbers(padded) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_layer_without_statistics_leaves_the_others_theirs(tiny_llama):
    rows, mxd = batches(), approximate(tiny_llama, layers=(0, 2))
    here = faithfulness(tiny_llama, mxd, rows)["layers"]
    measure_expert_statistics(tiny_llama, mxd, batches(count=5))
    training = faithfulness(tiny_llama, mxd, rows)["layers"]
    assert training["0"]["expert_share"] != here["0"]["expert_share"]
    mxd.layer(2).expert_frequency.zero_()
    mxd.layer(2).expert_mean.fill_(5.0)  # means without frequencies are of no training
    mixed = faithfulness(tiny_llama, mxd, rows)["layers"]
    assert mixed == {"0": training["0"], "2": here["2"]}


def test_dropout_is_off(tiny_llama):
    rows, mxd = batches(), approximate(tiny_llama)
    expected = numbers(faithfulness(tiny_llama, mxd, rows))
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.9
    assert numbers(faithfulness(tiny_llama.train(), mxd.train(), rows)) == expected
    assert tiny_llama.training and mxd.layer(1).training


def test_an_intervention_acts_on_the_spliced_model_alone_and_stays(tiny_llama):
    rows, mxd = batches(), exact(tiny_llama)
    plain = faithfulness(tiny_llama, mxd, rows)
    with mxd.layer(1).intervene(ablate=range(4)):
        results = faithfulness(tiny_llama, mxd, rows)
        assert len(mxd.layer(1)._coefficient_hooks) == 1
    assert layer_numbers(results) == layer_numbers(plain)
    assert results["cross_entropy"]["untouched"] == plain["cross_entropy"]["untouched"]
    assert results["cross_entropy"]["recovered"] == pytest.approx(0, abs=1e-5)  # no expert is left: as zero-ablated
    assert plain["cross_entropy"]["recovered"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("method", ["mxd", "skip_transcoder"])
def test_a_bfloat16_model_leaves_the_decomposition_in_float32_bit_for_bit(tiny_llama, method):
    mxd = exact(tiny_llama, layers=(0, 2)) if method == "mxd" else decomposition(layers=(0, 2), method=method)
    tiny_llama.bfloat16()
    before = {name: value.clone() for name, value in mxd.state_dict().items()}
    results = faithfulness(tiny_llama, mxd, batches())
    assert results["settings"]["dtype"] == "bfloat16"
    for name, value in mxd.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name]), name
    assert {parameter.dtype for parameter in tiny_llama.parameters()} == {torch.bfloat16}


def state(model):
    return [
        (name, id(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


PLACES = {
    "statistics": ("mxd.modeling_mxd.layers.MxDLayer.encode", 0),
    "layer metrics": ("mxd.modeling_mxd.layers.MxDLayer.sum_experts", 0),
    "inside the untouched model": ("transformers.models.llama.modeling_llama.LlamaMLP.forward", 4),
    "spliced, second layer": ("mxd.modeling_mxd.layers.MxDLayer.forward", 1),
    "ablated, second batch": ("mxd.base.forward.ZeroMLP.forward", 2),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_failure_anywhere_leaves_both_models_as_they_were(tiny_llama, monkeypatch, place):
    rows, mxd = batches(), approximate(tiny_llama, layers=(0, 2)).train()
    mxd.layer(0).gate.weight.requires_grad_(False)
    expected = numbers(faithfulness(tiny_llama, mxd, rows))
    before = state(tiny_llama), state(mxd)
    target, successes = PLACES[place]
    owner, name = target.rsplit(".", 1)
    module, owner = owner.rsplit(".", 1)
    owner = getattr(__import__(module, fromlist=[owner]), owner)
    original, calls = getattr(owner, name), []

    def fail_later(self, *args):
        calls.append(1)
        if len(calls) > successes:
            raise RuntimeError("in the middle")
        return original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="in the middle"):
        patch.setattr(owner, name, fail_later)
        faithfulness(tiny_llama, mxd, rows)
    assert (state(tiny_llama), state(mxd)) == before
    assert not any(layer._coefficient_hooks for layer in mxd.layers.values())
    assert [p for p in mxd.parameters() if not p.requires_grad] == [mxd.layer(0).gate.weight]
    assert numbers(faithfulness(tiny_llama, mxd, rows)) == expected

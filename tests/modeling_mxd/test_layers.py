import copy
import pickle

import pytest
import torch
from factories import randomise
from reference import explicit_mixture, khatri_rao_unfolding, reference_forward
from torch import nn

from mxd.modeling_mxd import MxDLayerConfig, make_layer

FORMS = {
    "mxd-mlp": {"encoder_type": "mlp", "hidden_act": "gelu_new"},
    "mxd-glu": {"encoder_type": "glu", "hidden_act": "silu"},
    "transcoder": {"method": "transcoder"},
    "skip-transcoder": {"method": "skip_transcoder"},
}


def layer_of(form="mxd-glu", num_experts=30, k=5, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "output_size": 10, "intermediate_size": 16}
    config = MxDLayerConfig(**sizes, num_experts=num_experts, num_experts_per_tok=k, **{**FORMS[form], **changes})
    return randomise(make_layer(config), std=0.5).to(dtype)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def outputs_and_gradients(forward, layer, x, weights):
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = forward(x)
    (y * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return y.detach(), {"x": x.grad, **gradients}


def compare(layer, x, tolerance):
    """Against the oracle in float32: in bfloat16 it is the less exact of the two, since it rounds more often."""
    weights = torch.randn(*x.shape[:-1], layer.config.output_size).to(x.dtype)
    fast = outputs_and_gradients(layer, layer, x, weights)
    oracle = copy.deepcopy(layer).float()
    slow = outputs_and_gradients(lambda x: reference_forward(oracle, x), oracle, x.float(), weights.float())
    assert relative(fast[0], slow[0]) <= tolerance
    assert fast[1].keys() == slow[1].keys()
    for name, gradient in slow[1].items():
        assert gradient.abs().sum() > 0, name
        assert relative(fast[1][name], gradient) <= tolerance, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 5, 30])
def test_equals_the_oracle_in_float32(form, k):
    compare(layer_of(form, k=k), torch.randn(7, 12), tolerance=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 5, 30])
def test_equals_the_oracle_in_bfloat16(form, k):
    compare(layer_of(form, k=k, dtype=torch.bfloat16), torch.randn(7, 12, dtype=torch.bfloat16), tolerance=0.02)


@pytest.mark.parametrize("biases", [{"gate_bias": False}, {"encoder_bias": False}, {"output_bias": False}])
def test_equals_the_oracle_without_biases(biases):
    compare(layer_of(**biases), torch.randn(7, 12), tolerance=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_fewer_than_k_positive_gates(form):
    layer = layer_of(form, k=10)
    with torch.no_grad():
        layer.gate.bias[:27] = -100.0  # at most three experts can be active
    values = layer.encode(torch.randn(50, 12)).values
    assert 0 < (values > 0).sum(-1).max() <= 3
    assert (values >= 0).all()
    compare(layer, torch.randn(50, 12), tolerance=1e-5)


def test_ties_are_a_valid_choice():
    layer = layer_of(num_experts=20, k=3)
    with torch.no_grad():
        layer.gate.weight[10:] = layer.gate.weight[:10]
        layer.gate.bias[10:] = layer.gate.bias[:10]
    x = torch.randn(40, 12)
    coefficients = layer.encode(x)
    expected = layer.gate(x).relu().topk(3).values
    torch.testing.assert_close(coefficients.values.sort(descending=True).values, expected)
    torch.testing.assert_close(layer.gate(x).gather(-1, coefficients.indices).relu(), coefficients.values)
    assert all(len(set(row)) == 3 for row in coefficients.indices.tolist())
    dense = coefficients.to_dense(20)
    y = (dense @ layer.modulation) * layer.decoder(layer.hidden(x)) + layer.output_bias
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("form", FORMS)
def test_any_leading_dimensions(form, shape):
    layer, x = layer_of(form), torch.randn(*shape, 12)
    y = layer(x)
    assert y.shape == (*shape, 10)
    torch.testing.assert_close(y, reference_forward(layer, x))
    assert layer.encode(x).values.shape == layer.encode(x).indices.shape == (*shape, 5)


@pytest.mark.parametrize("form", ["mxd-mlp", "mxd-glu"])
def test_is_the_papers_explicit_mixture(form):
    layer, x = layer_of(form), torch.randn(2, 4, 12)
    assert relative(layer(x), explicit_mixture(layer, x)) <= 1e-5


def test_is_the_khatri_rao_unfolding():
    layer = layer_of()
    unfolding = khatri_rao_unfolding(layer)  # (O, N·H)
    assert unfolding.shape == (10, 30 * 16)
    for expert in (0, 13, 29):
        torch.testing.assert_close(unfolding[:, expert * 16 : (expert + 1) * 16].T, layer.expert_weight(expert))
    # y − b = W_(3) (a ⊗ z)
    x = torch.randn(12)
    a, z = layer.encode(x).to_dense(30), layer.hidden(x)
    torch.testing.assert_close(unfolding @ torch.kron(a, z) + layer.output_bias, layer(x), rtol=1e-4, atol=1e-4)


def test_lemma_1_experts_have_the_rank_of_the_decoder():
    layer = layer_of().double()
    with torch.no_grad():
        layer.decoder.weight.copy_(torch.randn(10, 4, dtype=torch.float64) @ torch.randn(4, 16, dtype=torch.float64))
    assert torch.linalg.matrix_rank(layer.expert_weight(3)) == torch.linalg.matrix_rank(layer.decoder.weight) == 4
    with torch.no_grad():
        layer.modulation[3, 2:] = 0  # the lemma's condition broken
    assert torch.linalg.matrix_rank(layer.expert_weight(3)) == 2


def test_a_lora_on_gate_and_encoder_trains_only_itself():
    peft = pytest.importorskip("peft")
    layer, x = layer_of(), torch.randn(4, 12)
    before = layer(x)
    holder = nn.ModuleDict({"layer": layer})
    adapted = peft.get_peft_model(holder, peft.LoraConfig(r=2, target_modules=["gate", "encoder"]))
    torch.testing.assert_close(adapted.base_model.model["layer"](x), before)
    adapted.base_model.model["layer"](x).sum().backward()
    moved = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert moved and all("lora_" in name for name in moved)


def test_compiles_without_graph_breaks():
    layer, x = layer_of(), torch.randn(6, 12, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    (compiled_gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(compiled_gradient, gradient)


def test_deepcopy_and_pickle():
    layer, x = layer_of(), torch.randn(3, 12)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)


def test_the_authors_start():
    layer = make_layer(MxDLayerConfig(16, 16, 32, 400, 8, "gelu", "mlp"))
    assert not layer.decoder.weight.any() and not layer.output_bias.any()
    for tensor, fan_in in ((layer.gate.weight, 16), (layer.encoder.weight, 16), (layer.modulation, 400)):
        bound = fan_in**-0.5
        assert 0.9 * bound < tensor.abs().max() <= bound
    assert not layer.expert_frequency.any() and not layer.expert_mean.any()

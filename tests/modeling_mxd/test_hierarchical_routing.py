import copy
import dataclasses

import pytest
import torch
from mxd_cases import gradients, random_layer, relative_error
from reference import dense_coefficients, reference_forward
from torch import nn

from mxd.modeling_mxd import MxDConfig, MxDModel, functional

FORMS = ["mxd", "mxd-glu", "transcoder", "skip_transcoder"]
ROUTED = {"num_expert_groups": 5, "num_groups_per_tok": 2}  # of 24 experts: four groups of 5, one of 4
each_form = pytest.mark.parametrize("form", FORMS)


def routed_layer(form="mxd", dtype=torch.float32, **changes):
    return random_layer(form, dtype, **{**ROUTED, **changes})


def with_all_open(layer):
    twin = copy.deepcopy(layer)
    twin.config = dataclasses.replace(twin.config, num_groups_per_tok=twin.config.num_expert_groups)
    return twin


def assert_equals_the_oracle(layer, x, tolerance=1e-5):
    output_gradient = torch.randn(*x.shape[:-1], 12)
    y, grads = gradients(layer, x, output_gradient)
    expected_y, expected = gradients(layer, x, output_gradient, lambda x: reference_forward(layer, x))
    assert relative_error(y, expected_y) <= tolerance
    for name, grad in grads.items():
        if name.startswith("router"):
            assert grad is None and expected[name] is None
        else:
            assert relative_error(grad, expected[name]) <= tolerance, name


@each_form
@pytest.mark.parametrize("k", [1, 4, 9])  # two groups hold at least 9
def test_output_and_gradients_are_the_oracles(form, k):
    assert_equals_the_oracle(routed_layer(form, num_experts_per_tok=k), torch.randn(60, 16))


@pytest.mark.parametrize("groups", [2, 4, 5, 24])
@pytest.mark.parametrize("opened", [1, 2])
def test_any_number_of_groups(groups, opened):
    k = 1 if groups == 24 else 4
    layer = routed_layer(num_expert_groups=groups, num_groups_per_tok=opened, num_experts_per_tok=k)
    assert_equals_the_oracle(layer, torch.randn(40, 16))


@pytest.mark.parametrize("biases", [{"gate_bias": False}, {"output_bias": False, "encoder_bias": False}])
def test_without_biases(biases):
    assert_equals_the_oracle(routed_layer(**biases), torch.randn(40, 16))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_any_leading_dimensions(shape):
    layer, x = routed_layer(), torch.randn(*shape, 16)
    torch.testing.assert_close(layer(x), reference_forward(layer, x))
    assert layer.encode(x).values.shape == layer.encode(x).indices.shape == (*shape, 4)
    assert layer.open_groups(x).shape == (*shape, 2)


def test_one_token_is_computed_as_among_others():
    layer, x = routed_layer(), torch.randn(40, 16)
    last = layer.config.num_expert_groups - 1  # is shorter
    assert 0 < (layer.open_groups(x) == last).any(-1).sum() < 40
    torch.testing.assert_close(torch.cat([layer(token[None]) for token in x]), layer(x))


def test_chunks_change_nothing(monkeypatch):
    layer, x = routed_layer(), torch.randn(17, 16)
    whole = layer(x)
    monkeypatch.setattr(functional, "CHUNK_ELEMENTS", 30)  # three tokens
    monkeypatch.setattr(functional, "CHUNK_TOKENS", 1)
    torch.testing.assert_close(layer(x), whole)


def test_fewer_than_k_positive_gates_and_the_short_last_group():
    layer = routed_layer(num_experts_per_tok=8)
    with torch.no_grad():
        layer.gate.bias[::2] = -100.0
        layer.router.bias[4] = 100.0  # the group of four is always open, with one of five
    x = torch.randn(50, 16)
    values, indices = layer.encode(x)
    assert (layer.open_groups(x) == 4).any(-1).all()
    assert (values >= 0).all() and (values > 0).sum(-1).max() < 8
    assert indices.min() >= 0 and indices.max() < 24
    assert_equals_the_oracle(layer, x)


def test_no_positive_gate_gives_the_bias():
    layer = routed_layer()
    nn.init.constant_(layer.gate.bias, -1000)
    torch.testing.assert_close(layer(torch.randn(4, 16)), layer.output_bias.expand(4, -1))


def test_ties_are_a_valid_choice():
    layer = routed_layer(num_expert_groups=4, num_groups_per_tok=2, num_experts_per_tok=3)
    with torch.no_grad():
        for tensor in (layer.gate.weight, layer.gate.bias):
            tensor[1::2] = tensor[::2]  # every expert has a twin in its group
    x = torch.randn(40, 16)
    coefficients = layer.encode(x)
    open_scores = layer.gate(x).where(layer.in_groups(layer.open_groups(x)), -torch.inf)
    torch.testing.assert_close(coefficients.values.sort(descending=True).values, open_scores.relu().topk(3).values)
    torch.testing.assert_close(layer.gate(x).gather(-1, coefficients.indices).relu(), coefficients.values)
    assert all(len(set(row)) == 3 for row in coefficients.indices.tolist())


@each_form
def test_with_all_groups_open_it_is_the_exact_layer_to_the_bit(form):
    layer, x = with_all_open(routed_layer(form)), torch.randn(30, 16)
    exact = random_layer(form)
    exact.load_state_dict({name: value for name, value in layer.state_dict().items() if not name.startswith("router")})
    assert layer.open_groups(x) is None
    assert torch.equal(layer(x), exact(x))
    assert_equals_the_oracle(layer, x)


def test_groups_that_no_token_opens_are_not_read():
    layer, x = routed_layer(), torch.randn(1, 16)
    expected = layer(x)
    closed = ~layer.in_groups(layer.open_groups(x))[0]
    assert 14 <= closed.sum() <= 15
    with torch.no_grad():
        layer.gate.weight[closed] = torch.nan
        layer.gate.bias[closed] = torch.nan
    assert torch.equal(layer(x), expected)


@each_form
def test_bfloat16(form):
    layer = routed_layer(form, torch.bfloat16)
    oracle, x = copy.deepcopy(layer).float(), torch.randn(4000, 16).bfloat16()
    scores, groups = oracle.gate(x.float()), oracle.router(x.float()).sort(descending=True).values
    ranked = scores.where(oracle.in_groups(oracle.open_groups(x.float())), -torch.inf).sort(descending=True).values
    # Inputs whose choices do not hang on the last bits.
    clear = (groups[:, 1] - groups[:, 2] > 0.1) & (ranked[:, 3] - ranked[:, 4].clamp_min(0) > 0.1)
    x = x[clear & (ranked[:, 3] > 0.1)][:200]
    assert len(x) == 200
    output_gradient = torch.randn(200, 12).bfloat16()
    y, grads = gradients(layer, x, output_gradient)
    expected_y, expected = gradients(oracle, x.float(), output_gradient.float(), lambda x: reference_forward(oracle, x))
    assert relative_error(y, expected_y) <= 0.01
    for name, grad in grads.items():
        if not name.startswith("router"):
            assert grad.dtype == torch.bfloat16
            assert relative_error(grad, expected[name]) <= 0.01, name


def test_autocast_leaves_the_choice_in_float32():
    layer, x = routed_layer(), torch.randn(100, 16)
    with torch.autocast("cpu", torch.bfloat16):
        coefficients = layer.encode(x)
    torch.testing.assert_close(coefficients.to_dense(24), dense_coefficients(layer, x))


def test_whatever_a_gate_does_beside_its_weights_counts():
    layer, x = routed_layer(), torch.randn(9, 16)
    expected = 2 * dense_coefficients(layer, x)
    layer.gate.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(layer.encode(x).to_dense(24), expected)


def test_gradients_by_differences():
    layer = routed_layer(dtype=torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: layer.encode(x).values, (x,))


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    layer, x, output_gradient = routed_layer(), torch.randn(6, 16), torch.randn(6, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (y, grads), (expected_y, expected) = (
        gradients(layer, x, output_gradient, forward) for forward in (compiled, layer)
    )
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(grads, expected)


def test_interventions_work_as_without_groups():
    layer, x = routed_layer(), torch.randn(30, 16)
    with layer.intervene(ablate=range(24)):
        torch.testing.assert_close(layer(x), layer.output_bias.expand(30, -1))


def test_saved_and_loaded_with_the_knob(tmp_path):
    config = MxDConfig(
        layers=[2, 5],
        hidden_size=16,
        num_experts=24,
        num_experts_per_tok=4,
        layer_overrides={"5": {"num_expert_groups": 5, "num_groups_per_tok": 2}},
    )
    model = MxDModel(config)
    assert model.layer(2).router is None and model.layer(5).router.weight.shape == (5, 16)
    assert model.num_parameters() == config.num_parameters
    nn.init.normal_(model.layer(5).decoder.weight)
    model.save_pretrained(tmp_path)
    loaded, x = MxDModel.from_pretrained(tmp_path), torch.randn(20, 16)
    assert loaded.config.layer(5).num_groups_per_tok == 2
    assert torch.equal(loaded.layer(5)(x), model.layer(5)(x))
    wider = MxDModel.from_pretrained(tmp_path, layer_overrides={"5": {"num_expert_groups": 5, "num_groups_per_tok": 5}})
    assert torch.equal(wider.layer(5)(x), with_all_open(model.layer(5))(x))
    assert not torch.equal(wider.layer(5)(x), loaded.layer(5)(x))

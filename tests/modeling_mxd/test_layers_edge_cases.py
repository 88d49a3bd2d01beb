import copy

import accelerate
import pytest
import torch
from mxd_cases import FORMS, clear_inputs, gradients, random_layer, relative_error
from reference import reference_forward
from torch import nn
from torch.utils.checkpoint import checkpoint

from mxd.modeling_mxd import functional

each_form = pytest.mark.parametrize("form", FORMS)


def assert_close(result, expected, tolerance):
    """Output and every gradient, as `gradients` gives them."""
    (y, grads), (expected_y, expected_grads) = result, expected
    assert relative_error(y, expected_y) <= tolerance
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) <= tolerance, name


@each_form
def test_bfloat16_is_as_close_to_float32_as_bfloat16_allows(form):
    layer = random_layer(form, dtype=torch.bfloat16)
    oracle = copy.deepcopy(layer).float()
    x, output_gradient = clear_inputs(oracle, tokens=256), torch.randn(256, 12).bfloat16()
    result = gradients(layer, x.bfloat16(), output_gradient)
    assert {tensor.dtype for tensor in (result[0], *result[1].values())} == {torch.bfloat16}
    # Two or three roundings to 8 bits each; a wrong mask or a lost token is an error of the order of one.
    expected = gradients(oracle, x, output_gradient.float(), lambda x: reference_forward(oracle, x))
    assert_close(result, expected, tolerance=0.01)


@each_form
def test_autocast_gradients(form, monkeypatch):
    layer = random_layer(form, num_experts=80)
    x, output_gradient = clear_inputs(layer, tokens=64), torch.randn(64, 12)
    products, selected = [], []
    product = functional.product
    monkeypatch.setattr(functional, "product", lambda *args: products.append(args[0].dtype) or product(*args))

    def under_autocast(x):
        with torch.autocast("cpu", torch.bfloat16), layer.record() as recorded:
            y = layer(x)
        selected.append(recorded[0].to_dense(80))
        return y

    result = gradients(layer, x, output_gradient, under_autocast)
    assert products == [torch.bfloat16]
    expected = gradients(layer, x, output_gradient)
    assert {tensor.dtype for tensor in (result[0], *result[1].values())} == {torch.float32}
    torch.testing.assert_close(selected[0], layer.encode(x).to_dense(80))  # chosen in float32, none rounded
    assert (relative_error(result[0], expected[0]) > 1e-5) == (form != "transcoder")  # the dense products
    assert_close(result, expected, tolerance=0.01)


@each_form
def test_without_a_positive_gate_only_the_gate_and_the_experts_rest(form):
    layer, x = random_layer(form), torch.randn(5, 16)
    nn.init.constant_(layer.gate.bias, -1000)
    y, grads = gradients(layer, x, torch.randn(5, 12))
    skip = x @ layer.skip.weight.T if form == "skip_transcoder" else 0
    torch.testing.assert_close(y, (layer.output_bias + skip).expand(5, 12).detach())
    experts = "modulation" if form.startswith("mxd") else "decoder"
    assert not any(grads[name].any() for name in ("gate.weight", "gate.bias", experts))
    assert grads["output_bias"].any()
    assert grads["x"].any() == (form == "skip_transcoder")


@each_form
def test_gradients_at_ties_are_those_of_the_chosen_experts(form):
    layer = random_layer(form)
    with torch.no_grad():  # eight experts, three times each: the fourth place is always contested
        layer.gate.weight.copy_(layer.gate.weight[:8].repeat(3, 1))
        layer.gate.bias.copy_(layer.gate.bias[:8].repeat(3))
    x, output_gradient = torch.randn(50, 16), torch.randn(50, 12)
    indices = layer.encode(x).indices

    def decode_chosen(x):
        dense = torch.zeros(50, 24).scatter(-1, indices, layer.gate(x).relu().gather(-1, indices))
        return layer.combine(dense @ layer.expert_table, x)

    expected = gradients(layer, x, output_gradient, decode_chosen)
    assert_close(gradients(layer, x, output_gradient), expected, tolerance=1e-5)


@each_form
@pytest.mark.parametrize("elements", [1, 24 * 3, 24 * 4 * 12])
def test_chunks_of_any_size_give_the_same_to_the_last_bits_of_float64(form, elements, monkeypatch):
    layer, x, output_gradient = random_layer(form, torch.float64), torch.randn(11, 16).double(), torch.randn(11, 12)
    expected = gradients(layer, x, output_gradient.double())
    monkeypatch.setattr(functional, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(functional, "CHUNK_TOKENS", 1)
    assert_close(gradients(layer, x, output_gradient.double()), expected, tolerance=1e-13)


@each_form
@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 1, 3)])
def test_backward_with_any_leading_dimensions(form, leading):
    layer, x = random_layer(form), torch.randn(*leading, 16)
    output_gradient = torch.randn(*leading, 12)
    y, grads = gradients(layer, x, output_gradient)
    assert y.shape == (*leading, 12) and grads["x"].shape == x.shape
    if x.numel():
        flat_y, flat_grads = gradients(layer, x.reshape(-1, 16), output_gradient.reshape(-1, 12))
        flat_grads["x"] = flat_grads["x"].reshape(x.shape)
        assert_close((y, grads), (flat_y.reshape(y.shape), flat_grads), tolerance=1e-6)
    else:
        assert not any(grad.any() for grad in grads.values())


@each_form
def test_input_and_output_gradient_need_not_be_contiguous(form):
    layer = random_layer(form)
    for x in (torch.randn(16, 5).T, torch.randn(5, 32)[:, ::2], torch.randn(3, 2, 16).transpose(0, 1)):
        leading = x.shape[:-1]
        for output_gradient in (torch.randn(12, *leading).movedim(0, -1), torch.ones(12).expand(*leading, 12)):
            assert not x.is_contiguous() and not output_gradient.is_contiguous()
            expected = gradients(layer, x.contiguous(), output_gradient.contiguous())
            assert_close(gradients(layer, x, output_gradient), expected, tolerance=1e-6)


def test_one_hot_modulations_give_a_glu():
    layer, x = random_layer(output_size=24, num_experts_per_tok=24), torch.randn(5, 16)
    with torch.no_grad():
        layer.modulation.copy_(torch.eye(24))
    glu = layer.gate(x).relu() * layer.decoder(layer.hidden(x)) + layer.output_bias
    assert relative_error(layer(x), glu) <= 1e-6


@each_form
@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float32", "float64"),
        ("bfloat16", "float16"),
    ],
)
def test_mixed_dtypes(form, weights, inputs):
    weights, inputs = getattr(torch, weights), getattr(torch, inputs)
    layer, x = random_layer(form, weights), torch.randn(7, 16).to(inputs)
    y, grads = gradients(layer, x, torch.ones(7, 12, dtype=inputs))
    assert y.dtype == grads["x"].dtype == layer.decode(layer.encode(x), x).dtype == inputs
    assert torch.equal(y, layer(x.to(weights)).to(inputs))
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {weights}


class Doubled(nn.Module):
    """A wrapper as libraries put around a linear: it has a weight, which is not all it does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    weight = property(lambda self: self.inner.weight)
    bias = property(lambda self: self.inner.bias)

    def forward(self, x):
        return 2 * self.inner(x)


def doubled_by_wrapper(layer):
    layer.gate = Doubled(layer.gate)


def doubled_by_forward_hook(layer):
    layer.gate.register_forward_hook(lambda module, args, output: 2 * output)


def doubled_by_pre_hook(layer):
    layer.gate.register_parameter("bias", None)
    layer.gate.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def doubled_by_new_forward(layer):
    forward = layer.gate.forward
    layer.gate.forward = lambda x: 2 * forward(x)


@each_form
@pytest.mark.parametrize(
    "double", [doubled_by_wrapper, doubled_by_forward_hook, doubled_by_pre_hook, doubled_by_new_forward]
)
def test_whatever_a_gate_does_beside_its_weights_counts(form, double):
    layer, x, output_gradient = random_layer(form), torch.randn(9, 16), torch.randn(9, 12)
    double(layer)
    linear = getattr(layer.gate, "inner", layer.gate)

    def dense(x):
        scores = 2 * nn.functional.linear(x, linear.weight, linear.bias).relu()
        kept = scores.topk(4)
        return layer.combine(torch.zeros_like(scores).scatter(-1, kept.indices, kept.values) @ layer.expert_table, x)

    expected = gradients(layer, x, output_gradient, dense)
    assert_close(gradients(layer, x, output_gradient), expected, tolerance=1e-5)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_on_the_gate_runs(register):
    layer, seen = random_layer(), []
    getattr(layer.gate, register)(lambda *args: seen.append(args[-1][0].shape))  # the last is grad_output
    layer(torch.randn(5, 16, requires_grad=True)).sum().backward()
    assert seen == [(5, 24)]


@each_form
def test_a_trained_lora_on_the_gate_equals_the_merged_weight(form):
    peft = pytest.importorskip("peft")
    layer, x = random_layer(form), torch.randn(9, 16)
    merged = copy.deepcopy(layer)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["gate"]), layer)
    down, up = layer.gate.lora_A["default"].weight, layer.gate.lora_B["default"].weight
    nn.init.normal_(up)
    with torch.no_grad():
        merged.gate.weight.add_(2 * up @ down)
    y = layer(x)
    assert relative_error(y, reference_forward(merged, x)) <= 1e-5
    y.square().sum().backward()
    assert down.grad.any() and up.grad.any()


@each_form
def test_weights_that_accelerate_offloads(form):
    layer, x = random_layer(form), torch.randn(5, 16)
    expected = layer(x).detach()
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    assert layer.gate.weight.device.type == "meta"
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@each_form
def test_activation_checkpointing_changes_nothing(form):
    layer, x, output_gradient = random_layer(form), torch.randn(5, 16), torch.randn(5, 12)
    result = gradients(layer, x, output_gradient, lambda x: checkpoint(layer, x, use_reentrant=False))
    assert_close(result, gradients(layer, x, output_gradient), tolerance=0)


@pytest.mark.parametrize("form", ["mxd-glu", "skip_transcoder"])
def test_a_compiled_layer_follows_its_interventions(form):
    torch._dynamo.reset()
    layer, x, output_gradient = random_layer(form), torch.randn(5, 16), torch.randn(5, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    result, expected = gradients(layer, x, output_gradient, compiled), gradients(layer, x, output_gradient)
    assert_close(result, expected, tolerance=1e-6)
    with layer.intervene(add={3: 2.0}):
        changed = compiled(x)
        torch.testing.assert_close(changed, layer(x))
    assert not torch.allclose(changed, expected[0])
    torch.testing.assert_close(compiled(x).detach(), expected[0])


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_only_a_deep_copy_has_its_own_interventions(duplicate):
    layer, x = random_layer(), torch.randn(5, 16)
    handle = layer.intervene(add={3: 2.0})
    twin = duplicate(layer)
    assert torch.equal(twin(x), layer(x))
    handle.remove()
    assert torch.equal(twin(x), layer(x)) == (duplicate is copy.copy)


@pytest.mark.parametrize("form", ["mxd", "mxd-glu"])
def test_the_start_has_the_spread_of_a_linear(form):
    layer = random_layer(form, hidden_size=100, num_experts=400)
    layer.reset_parameters()
    linears = [layer.gate, layer.encoder] + ([layer.encoder_up] if form == "mxd-glu" else [])
    spread = [(tensor, 100) for linear in linears for tensor in (linear.weight, linear.bias)]
    for tensor, fan_in in [*spread, (layer.modulation, 400)]:  # 20 to 40,000 numbers, uniform in ±1/√fan-in
        bound = fan_in**-0.5
        assert 0.8 * bound < tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.3 if tensor.numel() < 100 else 0.1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [{}, {"num_expert_groups": 4, "num_groups_per_tok": 2}])
def test_runs_on_the_meta_device(form, groups):
    layer = random_layer(form, **groups).to("meta")
    assert layer(torch.empty(2, 3, layer.config.hidden_size, device="meta")).shape == (2, 3, layer.config.output_size)


def test_a_gate_whose_weight_is_quantised_does_not_set_the_dtype():
    layer = random_layer("transcoder")
    gate = layer.gate

    class Quantised(nn.Linear):
        def forward(self, x):
            assert x.dtype == torch.float32
            return gate(x)

    layer.gate = Quantised(gate.in_features, gate.out_features)
    layer.gate.weight = nn.Parameter(torch.zeros_like(gate.weight, dtype=torch.int8), requires_grad=False)
    assert layer(torch.randn(3, gate.in_features)).dtype == torch.float32

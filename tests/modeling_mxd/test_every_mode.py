"""Every way in which a layer is computed, against the paper's equations: outputs and all gradients."""

import pytest
import torch
from mxd_cases import FORMS, clear_inputs, gradients, random_layer, relative_error
from reference import reference_forward
from torch import nn

from mxd.modeling_mxd import functional

ROUTINGS = {
    "exact": {"num_experts": 200},
    "routed": {"num_experts": 200, "num_expert_groups": 7, "num_groups_per_tok": 2},  # the last group is shorter
}
CASES = ("plain", "no biases", "few positive", "chunks")
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def layer_and_inputs(form, routing, case, monkeypatch, device="cpu"):
    biases = {"gate_bias": False, "encoder_bias": False, "output_bias": False} if case == "no biases" else {}
    layer = random_layer(form, **ROUTINGS[routing], **biases)
    if case == "few positive":  # fewer than K a token, often none
        with torch.no_grad():
            layer.gate.bias[torch.arange(200) % 20 > 0] = -100.0
    if case == "chunks":
        monkeypatch.setattr(functional, "CHUNK_ELEMENTS", 200)
        monkeypatch.setattr(functional, "CHUNK_TOKENS", 9)
    return layer.to(device), torch.randn(50, 16, device=device)


def assert_the_oracles(layer, x, forward, tolerance=1e-5):
    output_gradient = torch.randn(*x.shape[:-1], 12, device=x.device)
    y, grads = gradients(layer, x, output_gradient, forward)
    expected_y, expected = gradients(layer, x, output_gradient, lambda x: reference_forward(layer, x))
    assert relative_error(y, expected_y) <= tolerance
    for name, grad in grads.items():
        if name.startswith("router"):
            assert grad is None
            continue
        assert relative_error(grad, expected[name]) <= tolerance, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_eager(form, routing, case, device, monkeypatch):
    layer, x = layer_and_inputs(form, routing, case, monkeypatch, device)
    assert_the_oracles(layer, x, layer)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("form", ["mxd-glu", "skip_transcoder"])
def test_compiled(form, routing, case, monkeypatch):
    torch._dynamo.reset()
    layer, x = layer_and_inputs(form, routing, case, monkeypatch)
    assert_the_oracles(layer, x, torch.compile(layer, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_under_autocast(routing, case, compiled, device, monkeypatch):
    """The gate's choice and coefficients are float32's; of a transcoder nothing else is rounded."""
    torch._dynamo.reset()
    layer, x = layer_and_inputs("transcoder", routing, case, monkeypatch, device)
    monkeypatch.setattr(functional, "ROUNDED_TOKENS", 1)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer

    def forward(x):
        with torch.autocast(device, torch.bfloat16):
            return run(x)

    assert_the_oracles(layer, x, forward)


@pytest.mark.parametrize("num_experts", [24, 2000])  # the second's candidates are found by way of blocks
def test_candidates_of_lower_precision_are_the_largest_where_few_are_positive(num_experts):
    layer = random_layer("transcoder", num_experts=num_experts, num_experts_per_tok=4)
    nn.init.normal_(layer.gate.bias, mean=-6.0, std=0.5)
    x = torch.randn(400, 16)
    scores = layer.gate(x)
    assert ((scores > 0).sum(-1) < 12).any()
    found = functional.candidates(scores.bfloat16(), 12).sort(-1).values
    wanted = scores.bfloat16().float().topk(12).values
    torch.testing.assert_close(scores.bfloat16().float().gather(-1, found).sort(-1, descending=True).values, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        values = layer.encode(x).to_dense(num_experts)
    torch.testing.assert_close(values, layer.encode(x).to_dense(num_experts))


@pytest.mark.parametrize("columns", [15, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_nan_is_hidden_whatever_its_sign(dtype, columns):
    scores = torch.randn(20, columns, dtype=dtype)
    scores.view(torch.int32 if dtype == torch.float32 else torch.int16)[:10, 7] = -1  # NaN with its sign set
    values, indices = functional.largest_positive(scores, 3)
    assert (values.isnan() == (indices == 7))[:10].all()
    assert values.isnan().any(-1).tolist() == [True] * 10 + [False] * 10


def test_a_gate_row_that_overflowed_shows_in_the_output():
    layer, x = random_layer("mxd", num_experts=2000), torch.randn(20, 16)
    with torch.no_grad():
        layer.gate.weight[7, :2] = torch.tensor([torch.inf, -torch.inf])  # inf - inf is a NaN with its sign set
    assert layer(x[(x[:, 0] * x[:, 1] > 0)]).isnan().any(-1).all()


def test_a_gradient_that_is_not_finite_does_not_reach_what_was_not_active():
    layer, x = random_layer("transcoder"), torch.randn(5, 16)
    nn.init.constant_(layer.gate.bias, -1000)
    values = layer.encode(x).values
    (grad,) = torch.autograd.grad(values, layer.gate.weight, torch.full_like(values, torch.inf))
    assert not grad.any()


def test_few_tokens_are_not_rounded_under_autocast(monkeypatch):
    products = []
    product = functional.product
    monkeypatch.setattr(functional, "product", lambda *args: products.append(args[0].dtype) or product(*args))
    layer = random_layer("transcoder")
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(functional.ROUNDED_TOKENS, 16))
        layer(torch.randn(functional.ROUNDED_TOKENS - 1, 16))
    assert products == [torch.bfloat16, torch.float32]


def test_autocast_of_half_is_right_where_the_choice_is_clear():
    layer = random_layer("mxd", num_experts=80)
    x = clear_inputs(layer, tokens=64)
    with torch.autocast("cpu", torch.float16):
        assert relative_error(layer(x), reference_forward(layer, x)) <= 0.01

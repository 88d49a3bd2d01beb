"""Reading pretrained MLPs, however they are stored."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.activations import ACT2FN

from mxd.base.pretrained_weights import (
    PretrainedWeights,
    mlp_active_units,
    mlp_hidden_act,
    mlp_layout,
    mlp_weights,
    mlp_widths,
)
from mxd.modeling_mxd import SurgeryError, find_mlp, find_mlps

# A type for every layout → what the layout says.
DENSE = {
    "llama": "gate_proj, up_proj, down_proj",
    "gpt2": "c_fc, c_proj [transposed]",
    "phi3": "gate_up_proj (halves), down_proj",
    "moonshine": "fc1 (swapped halves), fc2",
    "modernbert-decoder": "Wi (halves), Wo",
    "moshi": "fc1 (halves), fc2",
    "lfm2": "w1, w3, w2",
    "t5": "wi, wo",
    "ctrl": "0, 2",
    "opt": "encoder, decoder",
    "xlnet": "encoder, decoder",
    "cpmant": "w_in.w_0, w_in.w_1, w_out",
}


def first(model):
    return next(site for site in find_mlps(model).values() if site.slots)


@torch.no_grad()
@pytest.mark.parametrize("model_type", DENSE)
def test_the_weights_are_the_function(model_type):
    site = first(tiny_model(model_type).double())
    assert str(mlp_layout(site)) == DENSE[model_type]
    x = torch.randn(1, 5, mlp_widths(site)[0], dtype=torch.float64)
    expected = x
    for module in site.modules:
        expected = module(expected)
    weights = mlp_weights(site)
    assert weights.encoder.shape == (mlp_widths(site)[1], mlp_widths(site)[0])
    assert weights.decoder.shape == (mlp_widths(site)[2], mlp_widths(site)[1])
    torch.testing.assert_close(weights.apply(x, ACT2FN[mlp_hidden_act(site)]), expected, rtol=1e-5, atol=1e-6)


def run_expert(experts, index, x):
    """One expert of a stack, by its own module: all tokens are sent to it with weight 1."""
    chosen = torch.full((len(x), 1), index)
    return experts(x, chosen, torch.ones(len(x), 1, dtype=x.dtype))


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe", "olmoe", "nemotron_h", "aria_text"])
def test_stacked_experts_are_read_one_after_another(model_type):
    """Halves, no GLU, transposed: each expert's slice of the weights is that expert."""
    model = tiny_model(model_type)
    site = next(s for s in find_mlps(model, site="mlp.experts").values() if s.slots)
    weights, experts, x = mlp_weights(site), site.modules[0], torch.randn(5, mlp_widths(site)[0])
    each = mlp_widths(site)[1] // mlp_layout(site).experts
    for index in range(mlp_layout(site).experts):
        part = slice(index * each, (index + 1) * each)
        up = None if weights.up is None else weights.up[part]
        own = PretrainedWeights(weights.encoder[part], None, up, None, weights.decoder[:, part], None)
        expected = run_expert(experts, index, x)
        torch.testing.assert_close(own.apply(x, ACT2FN[mlp_hidden_act(site)]), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_interleaved_halves_with_biases():
    """gpt_oss: gate and up in turn, both clamped, the output (up + 1) · gate · sigmoid(1.702 · gate)."""
    site = first(tiny_model("gpt_oss"))
    assert "interleaved" in str(mlp_layout(site)) and "transposed" in str(mlp_layout(site))
    weights, x = mlp_weights(site), 0.1 * torch.randn(5, mlp_widths(site)[0])
    each = mlp_widths(site)[1] // mlp_layout(site).experts
    gate = nn.functional.linear(x, weights.encoder[:each], weights.encoder_bias[:each])
    up = nn.functional.linear(x, weights.up[:each], weights.up_bias[:each])
    hidden = (up.clamp(-7, 7) + 1) * gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7))
    expected = run_expert(site.modules[0], 0, x) - site.modules[0].down_proj_bias[0]
    torch.testing.assert_close(hidden @ weights.decoder[:, :each].T, expected, rtol=1e-3, atol=1e-5)


def test_a_shared_expert_comes_first():
    model = tiny_model("deepseek_v3")
    site = next(s for s in find_mlps(model).values() if s.kind == "mixture-of-experts")
    weights, block = mlp_weights(site), site.input_module
    shared = block.shared_experts.gate_proj.weight
    assert torch.equal(weights.encoder[: len(shared)], shared)
    assert torch.equal(weights.decoder[:, : len(shared)], block.shared_experts.down_proj.weight)
    active = len(shared) + model.config.num_experts_per_tok * model.config.moe_intermediate_size
    assert mlp_active_units(site) == active < len(weights.encoder)


def test_the_strongest_units_in_their_order():
    encoder, decoder = torch.tensor([[1.0], [3.0], [0.1], [2.0]]), torch.tensor([[1.0, 1.0, 50.0, 0.1]])
    weights = PretrainedWeights(encoder, torch.arange(4.0), None, None, decoder, None).strongest(2)
    assert weights.encoder.flatten().tolist() == [3.0, pytest.approx(0.1)]
    assert weights.encoder_bias.tolist() == [1, 2] and weights.decoder.tolist() == [[1, 50]]


class Quantised(nn.Linear):
    """Keeps one byte a weight, as bitsandbytes' linears do, and multiplies them back in its forward."""

    def __init__(self, linear, readable=True):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.scale = linear.weight.detach().abs().max() / 127
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        if linear.bias is not None:
            self.bias = linear.bias
        self.readable = readable

    def forward(self, x):
        if not self.readable:
            raise RuntimeError("only on a GPU")
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("model_type", ["llama@bias", "gpt_neox"])
def test_quantised_linears_are_read_as_what_they_compute(model_type):
    model = tiny_model(model_type)
    site = find_mlp(model, 1)
    plain, widths = mlp_weights(site), mlp_widths(site)
    for name, module in list(site.input_module.named_children()):
        if isinstance(module, nn.Linear):
            setattr(site.input_module, name, Quantised(module))
    site = find_mlp(model, 1)
    assert mlp_widths(site) == widths
    for name, expected in vars(plain).items():
        got = getattr(mlp_weights(site), name)
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=0, atol=float(expected.abs().max()) / 100)


def test_what_cannot_be_read_says_what_to_do(tiny_llama):
    mlp = tiny_llama.model.layers[1].mlp
    mlp.gate_proj = Quantised(mlp.gate_proj, readable=False)
    with pytest.raises(SurgeryError, match=r"layer 1: the quantised weight of gate_proj .*only on a GPU.* at random"):
        mlp_weights(find_mlp(tiny_llama, 1))
    with pytest.raises(SurgeryError, match="layer 0: the weight of gate_proj is offloaded or was never loaded"):
        mlp_weights(find_mlp(tiny_llama.to("meta"), 0))


@pytest.mark.parametrize(
    ("model_type", "activation"),
    [("gpt2", "gelu_new"), ("openai-gpt", "gelu_new"), ("bloom", "gelu_new"), ("lfm2", "silu"), ("persimmon", "relu2")],
)
def test_activations_are_told_by_their_values(model_type, activation):
    """openai-gpt's config says gelu and means gelu_new; lfm2 names none and calls silu in its code."""
    assert mlp_hidden_act(first(tiny_model(model_type))) == activation


def test_an_activation_that_transformers_has_no_name_for():
    assert mlp_hidden_act(first(tiny_model("apertus"))) is None


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.2)])
def test_a_model_that_bitsandbytes_quantised_is_read_to_its_precision(tmp_path, bits, error):
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path)
    settings = {f"load_in_{bits}bit": True} | ({"bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {})
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
    )
    got, expected = find_mlp(quantised, 1), find_mlp(model, 1)
    assert not next(iter(got.input_module.parameters())).is_floating_point()
    assert mlp_widths(got) == mlp_widths(expected) and mlp_hidden_act(got) == mlp_hidden_act(expected)
    for name, weight in vars(mlp_weights(expected)).items():
        if weight is not None:
            assert (getattr(mlp_weights(got), name) - weight).norm() < error * weight.norm()

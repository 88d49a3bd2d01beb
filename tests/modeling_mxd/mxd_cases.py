"""What several test modules need: small layers with random weights, and how far two tensors are apart."""

import torch
from torch import nn

from mxd.modeling_mxd import MxDLayerConfig, make_layer

FORMS = {
    "mxd": {"method": "mxd"},
    "mxd-glu": {"method": "mxd", "encoder_type": "glu", "hidden_act": "silu"},
    "transcoder": {"method": "transcoder"},
    "skip_transcoder": {"method": "skip_transcoder"},
}
SIZES = {"hidden_size": 16, "output_size": 12, "intermediate_size": 20, "num_experts": 24, "num_experts_per_tok": 4}


def random_layer(form="mxd", dtype=torch.float32, **changes):
    """A layer without a zero anywhere: the start has decoder and output bias at zero, which would hide mistakes."""
    layer = make_layer(MxDLayerConfig(**{**SIZES, **FORMS[form], **changes}))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.to(dtype)


def relative_error(value, expected):
    value, expected = value.detach().double(), expected.detach().double()
    return ((value - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def clear_inputs(layer, tokens, margin=0.03):
    """Inputs of bfloat16 values whose choice of experts does not hang on the last bits of a pre-activation."""
    x = torch.randn(50 * tokens, layer.config.hidden_size).bfloat16().float()
    gate = layer.gate.float()
    ranked = gate(x).detach().sort(dim=-1, descending=True).values
    k, largest = layer.config.num_experts_per_tok, ranked[:, 0]
    gap = ranked[:, k - 1] - ranked[:, k].clamp_min(0)
    clear = x[(gap > margin * largest) & (ranked[:, k - 1] > margin * largest)]
    assert len(clear) >= tokens
    return clear[:tokens]


def gradients(layer, x, output_gradient, forward=None):
    """Output, and by name the gradient of x and of every parameter."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = (layer if forward is None else forward)(x)
    y.backward(output_gradient)
    return y.detach(), {"x": x.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}

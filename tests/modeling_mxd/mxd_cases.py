"""Inputs and gradients of small layers, and the relative error of one tensor against another."""

import torch
from factories import FORMS, random_layer

__all__ = ["FORMS", "clear_inputs", "gradients", "random_layer", "relative_error"]


def relative_error(value, expected):
    value, expected = value.detach().double(), expected.detach().double()
    return ((value - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def clear_inputs(layer, tokens, margin=0.03):
    """Return inputs of bfloat16 values for which the K-th and the next pre-activation are clearly apart."""
    x = torch.randn(50 * tokens, layer.config.hidden_size).bfloat16().float()
    gate = layer.gate.float()
    ranked = gate(x).detach().sort(dim=-1, descending=True).values
    k, largest = layer.config.num_experts_per_tok, ranked[:, 0]
    gap = ranked[:, k - 1] - ranked[:, k].clamp_min(0)
    clear = x[(gap > margin * largest) & (ranked[:, k - 1] > margin * largest)]
    assert len(clear) >= tokens
    return clear[:tokens]


def gradients(layer, x, output_gradient, forward=None):
    """Return the output, and by name the gradient of x and of every parameter."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = (layer if forward is None else forward)(x)
    y.backward(output_gradient)
    return y.detach(), {"x": x.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}

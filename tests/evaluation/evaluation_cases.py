"""Decompositions of the tiny Llama, rows of token ids, padding, and metrics computed by brute force."""

import math

import torch
from factories import mxd_model, random_mxd_model
from reference import dense_coefficients
from torch import nn

from mxd.base.capture import capture_mlps
from mxd.base.pretrained_weights import mlp_hidden_act, mlp_weights
from mxd.modeling_mxd import find_mlp


def decomposition(layers=(1,), **changes):
    """Random weights, small enough that the spliced model still resembles the model."""
    return random_mxd_model(layers, **{"intermediate_size": 20, **changes}).eval()


def exact(model, layers=(1,), num_experts=4):
    """A decomposition that computes the MLPs: experts that are always on at 1/N, every row of C is 1, so Cᵀa = 1."""
    site = find_mlp(model, layers[0])
    weights = mlp_weights(site)
    units, width = weights.encoder.shape
    copy = mxd_model(
        layers, hidden_size=width, intermediate_size=units, num_experts=num_experts, hidden_act=mlp_hidden_act(site),
        encoder_type="mlp" if weights.up is None else "glu", encoder_bias=weights.encoder_bias is not None,
        output_bias=weights.decoder_bias is not None,
    )  # fmt: skip
    for index in layers:
        layer, weights = copy.layer(index), mlp_weights(find_mlp(model, index))
        nn.init.zeros_(layer.gate.weight)
        nn.init.constant_(layer.gate.bias, 0.25)
        nn.init.ones_(layer.modulation)
        pairs = [
            (layer.encoder.weight, weights.encoder),
            (layer.encoder.bias, weights.encoder_bias),
            (layer.encoder_up and layer.encoder_up.weight, weights.up),
            (layer.decoder.weight, weights.decoder),
            (layer.output_bias, weights.decoder_bias),
        ]
        for parameter, weight in pairs:
            if parameter is not None:
                parameter.data.copy_(weight)
    return copy


def approximate(model, layers=(1,)):
    """A decomposition that computes the MLPs with an error: some experts are active more often, rows of C about 1."""
    mxd = exact(model, layers, num_experts=24)
    for index in layers:
        layer = mxd.layer(index)
        for parameter in (layer.gate.weight, layer.gate.bias, layer.modulation):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05 if parameter is layer.gate.weight else 0.1)
        layer.modulation.data.mul_(0.6)
    return mxd


def batches(count=2, rows=3, tokens=7):
    """Batches of rows that begin with BOS, whose id is 0."""
    ids = [torch.randint(2, 64, (rows, tokens)) for _ in range(count)]
    for batch in ids:
        batch[:, 0] = 0
    return [{"input_ids": batch} for batch in ids]


def pad(batch, left=0, right=0, rows=0, token=0):
    """Add padding on both sides, and `rows` rows of nothing but padding."""
    ids = nn.functional.pad(batch["input_ids"], (left, right, 0, rows), value=token)
    mask = nn.functional.pad(torch.ones_like(batch["input_ids"]), (left, right, 0, rows))
    return {"input_ids": ids, "attention_mask": mask}


def activations(model, layer, rows):
    """Return x (tokens, I) and y (tokens, O) of one MLP over unpadded batches."""
    pairs = [capture_mlps(model, [layer], batch["input_ids"])[layer] for batch in rows]
    return tuple(torch.cat([tensor.flatten(0, 1) for tensor in side]) for side in zip(*pairs, strict=True))


@torch.no_grad()
def nmse_with(layer, x, y, mean, replaced, most=math.inf):
    """Compute the NMSE token by token, the coefficients of `replaced` experts (N, bool) set to their `mean` (N); the
    error of a token counts at most `most`."""
    a = torch.where(replaced, mean, dense_coefficients(layer, x))
    total = 0.0
    for token in range(len(x)):
        summed = sum(a[token, n] * layer.expert_table[n] for n in range(layer.config.num_experts))
        error = layer.combine(summed, x[token]) - y[token]
        total += min(most, (error.square().sum() / y[token].square().sum()).item())
    return total / len(x)


def numbers(results):
    """Return all metrics of an evaluation in one dict, without the recovered share: it follows from the others, and a
    random model, which zeros may improve, has none."""
    flat = {f"{layer}/{name}": value for layer, row in results["layers"].items() for name, value in row.items()}
    loss = {name: value for name, value in results["cross_entropy"].items() if name != "recovered"}
    loss["rise_from"], loss["rise_to"] = loss.pop("rise_interval")
    return {**flat, **loss, "kl": results["kl"], "top1_agreement": results["top1_agreement"]}

"""What several test modules need: decompositions of the tiny llama, rows of token ids, padding, brute force."""

import math

import torch
from reference import dense_coefficients
from torch import nn

from mxd.base.capture import capture_mlps
from mxd.base.pretrained_weights import mlp_hidden_act, mlp_weights
from mxd.modeling_mxd import MxDConfig, MxDModel, find_mlp


def decomposition(layers=(1,), **changes):
    """Random weights without a zero anywhere, small enough that the spliced model still resembles the model."""
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_experts": 24, "num_experts_per_tok": 4, **changes}
    model = MxDModel(MxDConfig(layers=list(layers), **sizes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def exact(model, layers=(1,), num_experts=4):
    """The MLPs themselves: experts that are always on at 1/N, every row of C is 1, so that Cᵀa = 1."""
    site = find_mlp(model, layers[0])
    weights = mlp_weights(site)
    units, width = weights.encoder.shape
    copy = MxDModel(
        MxDConfig(
            layers=list(layers), hidden_size=width, intermediate_size=units, num_experts=num_experts,
            num_experts_per_tok=4, hidden_act=mlp_hidden_act(site), encoder_type="mlp" if weights.up is None else "glu",
            encoder_bias=weights.encoder_bias is not None, output_bias=weights.decoder_bias is not None,
        )
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
    """The MLPs with an error: 24 experts, K = 4, some of them active more often than others, rows of C about 1."""
    mxd = exact(model, layers, num_experts=24)
    for index in layers:
        layer = mxd.layer(index)
        for parameter in (layer.gate.weight, layer.gate.bias, layer.modulation):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05 if parameter is layer.gate.weight else 0.1)
        layer.modulation.data.mul_(0.6)
    return mxd


def batches(count=2, rows=3, tokens=7):
    """Rows that begin with BOS, of which the id is 0."""
    ids = [torch.randint(2, 64, (rows, tokens)) for _ in range(count)]
    for batch in ids:
        batch[:, 0] = 0
    return [{"input_ids": batch} for batch in ids]


def pad(batch, left=0, right=0, rows=0, token=0):
    """The same rows with padding on both sides, and `rows` rows of nothing but padding."""
    ids = nn.functional.pad(batch["input_ids"], (left, right, 0, rows), value=token)
    mask = nn.functional.pad(torch.ones_like(batch["input_ids"]), (left, right, 0, rows))
    return {"input_ids": ids, "attention_mask": mask}


def activations(model, layer, rows):
    """x (tokens, I) and y (tokens, O) of one MLP over unpadded batches."""
    pairs = [capture_mlps(model, [layer], batch["input_ids"])[layer] for batch in rows]
    return tuple(torch.cat([tensor.flatten(0, 1) for tensor in side]) for side in zip(*pairs, strict=True))


@torch.no_grad()
def nmse_with(layer, x, y, mean, replaced, most=math.inf):
    """NMSE, token by token, with the coefficients of `replaced` experts (N, bool) set to their `mean` (N); an error
    counts at most `most`."""
    a = torch.where(replaced, mean, dense_coefficients(layer, x))
    total = 0.0
    for token in range(len(x)):
        summed = sum(a[token, n] * layer.expert_table[n] for n in range(layer.config.num_experts))
        error = layer.combine(summed, x[token]) - y[token]
        total += min(most, (error.square().sum() / y[token].square().sum()).item())
    return total / len(x)


def numbers(results):
    """All metrics of an evaluation in one dict, but for the recovered share, which the others give: of a random model
    zeros are often better than an MLP, and there is none."""
    flat = {f"{layer}/{name}": value for layer, row in results["layers"].items() for name, value in row.items()}
    loss = {name: value for name, value in results["cross_entropy"].items() if name != "recovered"}
    loss["rise_from"], loss["rise_to"] = loss.pop("rise_interval")
    return {**flat, **loss, "kl": results["kl"], "top1_agreement": results["top1_agreement"]}

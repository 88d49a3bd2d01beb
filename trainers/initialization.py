"""Init of a decomposition: scales of the activations, and gates and encoders initialised from data and from the MLP.

The steps of an optimiser depend on the scale of what it is given, and MLP inputs and outputs are far from unit scale
(SmolLM2-135M layer 15: root mean squares 0.15 in, 1.6 out). Training a layer on x / s_x and (y − μ) / s_y, and then
folding s_x, s_y and μ into its weights, equals training it on x and y with folded initial weights, if Adam's steps are
scaled parameter by parameter: a weight w = w̃ / s takes the step lr / s, with an ε of ε·s. That is done here
(`parameter_scales`): the weights need no scaling at any moment, and checkpoints are decompositions.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mxd.base.capture import Capture
from mxd.base.masks import activation_mask
from mxd.base.pretrained_weights import mlp_encoder_type, mlp_weights, mlp_widths
from mxd.modeling_mxd import MLPSite, MxDLayer, MxDLayerConfig, MxDModel, SparseLayer, find_mlp

from .router import fit_router

if TYPE_CHECKING:
    from .distillation_arguments import DistillationArguments

GATE_INITS = ("data", "random")
ENCODER_INITS = ("pretrained", "random")
DECODER_INITS = ("pretrained", "zero")
MODULATION_INITS = ("random", "unit")


@dataclass(frozen=True)
class ActivationScales:
    """Scales of one MLP's activations over calibration tokens, without the first position of each row.

    Attributes:
        input_scale: Root mean square of the elements of x.
        output_scale: Root mean square of the elements of y − mean(y).
        output_norm: Mean of ‖y‖², the squared norm of a token's output.
    """

    input_scale: float = 1.0
    output_scale: float = 1.0
    output_norm: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """Scales of one MLP's activations, and a sample of its inputs.

    Attributes:
        scales: See `ActivationScales`.
        input_mean: Mean of x, (I).
        output_mean: Mean of y, (O).
        inputs: Inputs of the calibration tokens, (tokens, I), without first positions, in the model's dtype.
    """

    scales: ActivationScales
    input_mean: Tensor
    output_mean: Tensor
    inputs: Tensor


def calibrate(
    capture: Capture, batches: Iterable[Mapping[str, Tensor]], tokens: int, decoder: bool = False
) -> dict[int, Calibration]:
    """Capture batches until `tokens` tokens are seen, and measure every layer's activations.

    Args:
        capture: Returns {layer: (x, y)} for a batch.
        batches: `input_ids` (batch, tokens) and, if there is padding, `attention_mask`.
        tokens: Least number of tokens to measure.
        decoder: See `activation_mask`.

    Raises:
        ValueError: `batches` has no token, or an activation is not finite.
    """
    kept: dict[int, list[Tensor]] = {}
    outputs: dict[int, Tensor] = {}  # sums over tokens of y and of y², (2, O): the outputs themselves may be too large
    seen = 0
    for batch in batches:
        for layer, (x, y) in capture(batch).items():
            mask = activation_mask(batch, x, include_first=False, decoder=decoder)
            kept.setdefault(layer, []).append(x[mask])
            output = y[mask].double()
            sums = torch.stack([output.sum(0), output.square().sum(0)])
            outputs[layer] = outputs[layer] + sums if layer in outputs else sums
        seen = min(sum(map(len, inputs)) for inputs in kept.values())
        if seen >= tokens:
            break
    if not seen:
        raise ValueError("no tokens to calibrate on: the training data is empty")
    return {layer: _measure(layer, torch.cat(kept.pop(layer)), outputs[layer]) for layer in list(kept)}


def _measure(layer: int, x: Tensor, output_sums: Tensor) -> Calibration:
    mean, square = output_sums / len(x)
    scales = ActivationScales(
        input_scale=float(x.float().square().mean().sqrt()),
        output_scale=float((square - mean.square()).clamp_min(0).mean().sqrt()),
        output_norm=float(square.sum()),
    )
    if not all(math.isfinite(value) and value > 0 for value in vars(scales).values()):
        raise ValueError(
            f"the activations of layer {layer} are constant or not finite ({scales}): is the model loaded in float16? "
            "use bfloat16 or float32"
        )
    return Calibration(scales, x.float().mean(0), mean.float(), x)


@torch.no_grad()
def init_layer(
    layer: SparseLayer, calibration: Calibration, gate_init: str = "data", scale_activations: bool = True
) -> None:
    """Initialise a layer as the authors do, scaled to the activations.

    Scaled: G, E, U ← ·/s_x and b ← mean(y), the init of a layer that sees x / s_x and predicts y − mean(y).
    Gate from data: the gate row of expert n is the direction of a training input x_n from the mean,
    G_n ∝ x_n − mean(x), with the norm of the random init, and g_n = −G_n · mean(x). Each expert then wins on the
    neighbourhood of its token, so that nearly all are used from the first step on.

    Args:
        layer: Changed in place.
        calibration: Of the same MLP.
        gate_init: `"data"` or `"random"`.
        scale_activations: If false, use the authors' init on raw activations.
    """
    layer.reset_parameters()
    scale = calibration.scales.input_scale if scale_activations else 1.0
    for name in ("gate", "encoder", "encoder_up"):
        if isinstance(linear := getattr(layer, name, None), nn.Linear):
            linear.weight.div_(scale)
    if scale_activations and layer.output_bias is not None:
        layer.output_bias.copy_(calibration.output_mean)
    if gate_init == "data":
        _init_gate_from_data(layer, calibration, scale)


def _init_gate_from_data(layer: SparseLayer, calibration: Calibration, scale: float) -> None:
    inputs, experts = calibration.inputs, layer.config.num_experts
    # In a text shorter than the number of experts some get the same token.
    enough = len(inputs) >= experts
    chosen = torch.randperm(len(inputs))[:experts] if enough else torch.randint(len(inputs), (experts,))
    directions = inputs[chosen.to(inputs.device)].float() - calibration.input_mean
    # The norm of a row that nn.Linear initialises: sqrt(I) elements of root mean square 1 / sqrt(3 I).
    norm = 1 / (math.sqrt(3) * scale)
    weight = directions * (norm / directions.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    layer.gate.weight.copy_(weight)
    if layer.gate.bias is not None:
        layer.gate.bias.copy_(-(weight @ calibration.input_mean))


def check_encoder_init(config: MxDLayerConfig, site: MLPSite) -> None:
    """Raise a ValueError if the encoder has another form or width than the pretrained MLP's.

    Of a mixture of experts it may be narrower.
    """
    widths, form = mlp_widths(site), mlp_encoder_type(site)
    if widths is None:
        return  # `mlp_weights` says why there are none
    units, narrower = widths[1], site.kind == "mixture-of-experts"
    fits = config.intermediate_size == units or (narrower and config.intermediate_size < units)
    if config.encoder_type != form or not fits:
        raise ValueError(
            f"layer {site.layer}: an encoder of form {config.encoder_type} and intermediate_size "
            f"{config.intermediate_size} cannot be initialised from the pretrained MLP, which has form {form} and "
            f"{units}: use those, or encoder_init='random'"
        )


@torch.no_grad()
def init_from_pretrained(layer: MxDLayer, site: MLPSite, decoder: bool = False) -> None:
    """Copy the pretrained MLP's encoder (and up projection) into E and U.

    With `decoder`, also its decoder into D and b: where Cᵀa is 1, the layer then is the MLP. C stays as it is.

    Raises:
        ValueError: The encoder has another form or width than the MLP's.
    """
    check_encoder_init(layer.config, site)
    weights = mlp_weights(site)
    if layer.config.intermediate_size < len(weights.encoder):
        weights = weights.strongest(layer.config.intermediate_size)
    pairs = [(layer.encoder, weights.encoder, weights.encoder_bias)]
    if layer.encoder_up is not None and weights.up is not None:
        pairs.append((layer.encoder_up, weights.up, weights.up_bias))
    for linear, weight, bias in pairs:
        linear.weight.copy_(weight)
        _copy_bias(linear.bias, bias)
    if decoder:
        layer.decoder.weight.copy_(weights.decoder)
        _copy_bias(layer.output_bias, weights.decoder_bias)


def _copy_bias(to: Tensor | None, pretrained: Tensor | None) -> None:
    if to is not None:
        nn.init.zeros_(to) if pretrained is None else to.copy_(pretrained)


@torch.no_grad()
def init_modulation_at_unit(layer: MxDLayer, calibration: Calibration) -> None:
    """Draw C ~ U(0, 2 / s) with s the mean sum of a token's coefficients.

    Cᵀa is then about 1 everywhere and the layer about Dᵀz, so that experts only have to carry its errors.
    """
    sample = calibration.inputs[:8192]
    total = layer.encode(sample).values.float().sum(-1).mean().clamp_min(1e-6)
    nn.init.uniform_(layer.modulation, 0.0, float(2 / total))


def parameter_scales(module: nn.Module, scales: ActivationScales) -> dict[str, float]:
    """Return the factor on every parameter's learning rate with which Adam on raw activations takes the steps that it
    would take on x / s_x and (y − μ) / s_y, by parameter name: {"gate.weight": 1 / s_x, "decoder.weight": s_y}."""
    by_name = {
        "gate.weight": 1 / scales.input_scale,
        "router.weight": 1 / scales.input_scale,
        "encoder.weight": 1 / scales.input_scale,
        "encoder_up.weight": 1 / scales.input_scale,
        "skip.weight": scales.output_scale / scales.input_scale,
        "decoder.weight": scales.output_scale,
        "decoder": scales.output_scale,
        "output_bias": scales.output_scale,
    }
    return {name: by_name.get(name, 1.0) for name, _ in module.named_parameters()}


def init_decomposition(
    decomposition: MxDModel,
    model: nn.Module,
    calibrations: Mapping[int, Calibration],
    args: "DistillationArguments",
) -> None:
    """Initialise every layer as the arguments say; routers are fitted with `args.seed`.

    Transcoders have neither encoder nor modulations. A decoder is copied from the pretrained MLP only if the encoder,
    whose units it reads, is.
    """
    for index in decomposition.config.layers:
        layer, calibration = decomposition.layer(index), calibrations[index]
        init_layer(layer, calibration, args.gate_init, args.scale_activations)
        if layer.router is not None:
            fit_router(layer, calibration.inputs, seed=args.seed)  # it decides which experts are active
        if not isinstance(layer, MxDLayer):
            continue
        if args.encoder_init == "pretrained":
            site = find_mlp(model, index, **decomposition.config.where)
            init_from_pretrained(layer, site, decoder=args.decoder_init == "pretrained")
        if args.modulation_init == "unit":
            init_modulation_at_unit(layer, calibration)

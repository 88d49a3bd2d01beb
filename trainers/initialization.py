"""Where a decomposition starts: scales of the activations, and gates and encoders that begin from data.

Everything an optimiser does depends on the scale of what it is given, and MLP inputs and outputs are far from
unit scale (SmolLM2-135M layer 15: root mean squares 0.15 in, 1.6 out). A layer that is trained on x / s_x and
(y − μ) / s_y, and then has s_x, s_y and μ folded into its weights, is the same as one trained on x and y whose
weights start folded and whose Adam steps are scaled parameter by parameter: a weight w = w̃ / s takes the step
lr / s, its ε being ε·s. That is what is done here (`parameter_scales`): the saved weights need no scaling at any
moment, checkpoints are decompositions, and nothing has to be folded at the end.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mxd.base.capture import Capture
from mxd.base.masks import activation_mask
from mxd.base.pretrained_weights import mlp_encoder_type, mlp_weights, mlp_widths
from mxd.modeling_mxd import MLPSite, MxDLayer, MxDLayerConfig, MxDModel, SparseLayer, find_mlp

from .router import fit_router

GATE_INITS = ("data", "random", "keep")
ENCODER_INITS = ("pretrained", "random")
DECODER_INITS = ("pretrained", "zero")
MODULATION_INITS = ("random", "unit")


@dataclass(frozen=True)
class ActivationScales:
    """Scales of one MLP's activations over calibration tokens, each row's first position left out.

    Attributes:
        input_scale: root mean square of the elements of x.
        output_scale: root mean square of the elements of y − mean(y).
        output_norm: mean of ‖y‖² (squared norm of a token's output).
    """

    input_scale: float = 1.0
    output_scale: float = 1.0
    output_norm: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """Scales of one MLP's activations, and a sample of its inputs.

    Attributes:
        scales: see `ActivationScales`.
        input_mean: (I), mean of x.
        output_mean: (O), mean of y.
        inputs: (tokens, I), the calibration tokens' inputs, first positions left out, in the model's dtype.
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
        capture: gives {layer: (x, y)} for a batch.
        batches: `input_ids` (batch, tokens) and, where there is padding, `attention_mask`.
        tokens: how many to measure, at least.
        decoder: see `activation_mask`.

    Raises:
        ValueError: when `batches` has no token, or an activation is not finite.
    """
    kept: dict[int, list[Tensor]] = {}
    outputs: dict[int, _OutputSums] = {}
    seen = 0
    for batch in batches:
        for layer, (x, y) in capture(batch).items():
            mask = activation_mask(batch, x, include_first=False, decoder=decoder)
            kept.setdefault(layer, []).append(x[mask])
            outputs.setdefault(layer, _OutputSums()).update(y[mask])
        seen = min(sum(map(len, inputs)) for inputs in kept.values())
        if seen >= tokens:
            break
    if not seen:
        raise ValueError("no tokens to calibrate on: the training data is empty")
    return {layer: _measure(layer, torch.cat(kept.pop(layer)), outputs[layer]) for layer in list(kept)}


class _OutputSums:
    """Sums over tokens of y and of its squares, (O) float64: of many layers the outputs would be too much to keep."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums = self.squares = torch.zeros(())

    def update(self, y: Tensor) -> None:
        """Add y (tokens, O)."""
        self.tokens += len(y)
        y = y.double()
        self.sums = y.sum(0) + self.sums.to(y.device)
        self.squares = y.square().sum(0) + self.squares.to(y.device)


def _measure(layer: int, x: Tensor, outputs: _OutputSums) -> Calibration:
    mean, square = outputs.sums / outputs.tokens, outputs.squares / outputs.tokens
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
def initialize_layer(
    layer: SparseLayer, calibration: Calibration, gate_init: str = "data", scale_activations: bool = True
) -> None:
    """The authors' start, scaled to the activations; with `gate_init="data"` the gate starts from inputs.

    Scaled: G, E, U ← ·/s_x and b ← mean(y), the start of a layer that sees x / s_x and predicts y − mean(y).
    From data: expert n's gate row is the direction of one training input x_n from the mean,
    G_n ∝ x_n − mean(x), with the norm that the random start has, and g_n = −G_n · mean(x). Each expert then wins
    on the neighbourhood of its token, so that nearly all are used from the first step on.

    Args:
        layer: is changed in place.
        calibration: of the same MLP.
        gate_init: `"data"` or `"random"`; `"keep"` leaves the whole layer as it is.
        scale_activations: off, the start is the authors' own on raw activations.
    """
    if gate_init == "keep":
        return
    layer.reset_parameters()
    scale = calibration.scales.input_scale if scale_activations else 1.0
    for linear in _input_linears(layer):
        linear.weight.div_(scale)
    if scale_activations and layer.output_bias is not None:
        layer.output_bias.copy_(calibration.output_mean)
    if gate_init == "data":
        _gate_from_data(layer, calibration, scale)


def _input_linears(layer: SparseLayer) -> list[nn.Linear]:
    names = ("gate", "encoder", "encoder_up")
    return [linear for name in names if isinstance(linear := getattr(layer, name, None), nn.Linear)]


def _gate_from_data(layer: SparseLayer, calibration: Calibration, scale: float) -> None:
    inputs, experts = calibration.inputs, layer.config.num_experts
    # In a text shorter than the number of experts some start from the same token.
    enough = len(inputs) >= experts
    chosen = torch.randperm(len(inputs))[:experts] if enough else torch.randint(len(inputs), (experts,))
    directions = inputs[chosen.to(inputs.device)].float() - calibration.input_mean
    # The norm of a row of nn.Linear's start: sqrt(I) elements of root mean square 1 / sqrt(3 I).
    norm = 1 / (math.sqrt(3) * scale)
    weight = directions * (norm / directions.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    layer.gate.weight.copy_(weight)
    if layer.gate.bias is not None:
        layer.gate.bias.copy_(-(weight @ calibration.input_mean))


def check_encoder_init(config: MxDLayerConfig, site: MLPSite) -> None:
    """Refuse an encoder that cannot start from the pretrained MLP, by its sizes alone.

    Raises:
        ValueError: it has another form or width; of routed experts it may be narrower.
    """
    widths, form = mlp_widths(site), mlp_encoder_type(site)
    if widths is None:
        return  # `mlp_weights` says why there are none
    units, narrower = widths[1], site.kind == "mixture-of-experts"
    fits = config.intermediate_size == units or (narrower and config.intermediate_size < units)
    if config.encoder_type != form or not fits:
        raise ValueError(
            f"layer {site.layer}: an encoder of form {config.encoder_type} and intermediate_size "
            f"{config.intermediate_size} cannot start from the pretrained MLP, which has form {form} and "
            f"{units}: use those, or the random start"
        )


@torch.no_grad()
def start_encoder_from_pretrained(layer: MxDLayer, site: MLPSite, decoder: bool = False) -> None:
    """Copy the pretrained MLP's encoder (and up projection) into E and U, with `decoder` its decoder into D and b:
    where Cᵀa is 1, the layer is then the MLP. C stays as it is.

    Raises:
        ValueError: when its encoder has another form or width than the MLP's.
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
def start_modulation_at_unit(layer: MxDLayer, calibration: Calibration) -> None:
    """C ~ U(0, 2 / s) with s the mean sum of a token's coefficients, so that Cᵀa starts at about 1 everywhere and
    the layer at about Dᵀz: the dense function is learnt first, and the experts have only its errors left to carry."""
    sample = calibration.inputs[:8192]
    total = layer.encode(sample).values.float().sum(-1).mean().clamp_min(1e-6)
    nn.init.uniform_(layer.modulation, 0.0, float(2 / total))


def parameter_scales(module: nn.Module, scales: ActivationScales) -> dict[str, float]:
    """Factor on the learning rate of every parameter that makes Adam on raw activations take the steps that it
    would take on x / s_x and (y − μ) / s_y: by parameter name, e.g. {"gate.weight": 1 / s_x, "decoder.weight": s_y}.
    """
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
    *,
    gate_init: str,
    encoder_init: str,
    modulation_init: str,
    decoder_init: str,
    scale_activations: bool,
    seed: int,
) -> None:
    """Start every layer: see `initialize_layer`, `fit_router`, which draws with `seed`,
    `start_encoder_from_pretrained` and `start_modulation_at_unit`.
    Transcoders have neither encoder nor modulations and ignore those; a decoder starts from the pretrained one only
    where the encoder does, whose units it reads."""
    for index in decomposition.config.layers:
        layer = decomposition.layer(index)
        initialize_layer(layer, calibrations[index], gate_init, scale_activations)
        if layer.router is not None:
            fit_router(layer, calibrations[index].inputs, seed=seed)  # it decides which experts are active
        if not isinstance(layer, MxDLayer):
            continue
        if encoder_init == "pretrained":
            site = find_mlp(model, index, **decomposition.config.where)
            start_encoder_from_pretrained(layer, site, decoder=decoder_init == "pretrained")
        if modulation_init == "unit":
            start_modulation_at_unit(layer, calibrations[index])

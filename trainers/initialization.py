"""Init of a decomposition: scales of the activations, and gates and encoders initialised from data and from the MLP.

The steps of an optimiser depend on the scale of what it is given, and MLP inputs and outputs are far from unit scale
(SmolLM2-135M layer 15: root mean squares 0.15 in, 1.6 out). Training a layer on x / s_x and (y − μ) / s_y, and then
folding s_x, s_y and μ into its weights, equals training it on x and y with folded initial weights, if Adam's steps are
scaled parameter by parameter: a weight w = w̃ / s takes the step lr / s, with an ε of ε·s. That is done here
(`parameter_scales`): the weights need no scaling at any moment, and checkpoints are decompositions.

Some models give a few tokens ("the", a space) activations with hundreds of times the squared norm of others, anywhere
in a row. Scales and means leave them out, since a mean over all tokens would fit neither kind.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxd.base.capture import Capture
from mxd.base.masks import activation_mask
from mxd.base.pretrained_weights import mlp_encoder_type, mlp_weights, mlp_widths
from mxd.base.progress import progress_bar
from mxd.evaluation.expert_use import captured_activations
from mxd.evaluation.metrics import squared_norm
from mxd.modeling_mxd import MLPSite, MxDLayer, MxDLayerConfig, MxDModel, SparseLayer, find_mlp

from .distillation_arguments import DistillationArguments
from .router import fit_router

logger = logging.getLogger(__name__)

MASSIVE_FACTOR = 16
# A linear module's parameters, where PEFT may have wrapped it: "weight", "base_layer.weight", "lora_A.default.weight".
_KIND = re.compile(
    r"(?:base_layer\.|original_module\.|modules_to_save\.[^.]+\.)*"
    r"(|weight|bias|lora_A|lora_B|lora_E|lora_magnitude_vector|ia3_l)(?:\.[^.]+)*"
)


@dataclass(frozen=True)
class ActivationScales:
    """Scales of one MLP's activations over the ordinary calibration tokens.

    Each row's first position is left out, and so are massive tokens: inputs, and outputs, whose squared norm is
    `MASSIVE_FACTOR` to twice as many times the median, or more.
    """

    input_scale: float = 1.0  # root mean square of the elements of x
    output_scale: float = 1.0  # root mean square of the elements of y − mean(y)
    output_norm: float = 1.0  # mean of ‖y‖², the squared norm of a token's output


@dataclass(frozen=True)
class Calibration:
    """Scales and means of one MLP's activations, and the inputs of the calibration tokens, without massive ones."""

    scales: ActivationScales
    input_mean: Tensor  # (I)
    output_mean: Tensor  # (O)
    inputs: Tensor  # (tokens, I), in the model's dtype


def calibrate(
    capture: Capture,
    batches: Iterable[Mapping[str, Tensor]],
    tokens: int,
    decoder: bool = False,
    progress: bool = False,
) -> dict[int, Calibration]:
    """Capture batches until `tokens` tokens are seen, and measure every layer's activations.

    `capture` returns {layer: (x, y)} for a batch; `decoder` is that of `activation_mask`; `progress` shows a bar.

    Raises:
        ValueError: `batches` has no token, or an activation is not finite.
    """
    seen: dict[int, _Activations] = {}
    count = 0
    with progress_bar(desc="calibrate", total=tokens, unit="tok", unit_scale=True, show=progress) as bar:
        for batch in batches:
            for layer, (x, y) in capture(batch).items():
                mask = activation_mask(batch, x, include_first=False, decoder=decoder)
                ids = batch.get("input_ids")
                seen.setdefault(layer, _Activations()).add(x[mask], y[mask])
                if ids is not None and ids.shape == mask.shape:
                    seen[layer].ids.append(ids.to(mask.device)[mask])
            before, count = count, min(sum(map(len, of_layer.inputs)) for of_layer in seen.values())
            bar.update(min(count, tokens) - min(before, tokens))
            if count >= tokens:
                break
    if not any(len(x) for of_layer in seen.values() for x in of_layer.inputs):
        raise ValueError("no tokens to calibrate on: the training data is empty")
    return {layer: _measure(layer, seen.pop(layer)) for layer in list(seen)}


class _Activations:
    """The activations of one MLP so far: its inputs, and sums of its outputs, which may be too large to keep."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.ids: list[Tensor] = []
        self.norms: list[Tensor] = []  # ‖x‖² and ‖y‖² of every token, (2, tokens)
        # Σ y and Σ y², (2, O), apart by the power of two above ‖y‖²: which tokens are massive is known at the end only.
        self.sums: dict[int, Tensor] = {}

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens: x (tokens, I), y (tokens, O)."""
        self.inputs.append(x)
        self.norms.append(torch.stack([squared_norm(x), squared_norm(y)]))
        powers = squared_norm(y).frexp().exponent
        for power in powers.unique().tolist():
            part = y[powers == power].double()
            self.sums[power] = self.sums.get(power, 0) + torch.stack([part.sum(0), part.square().sum(0)])


def _measure(layer: int, seen: _Activations) -> Calibration:
    x, norms = torch.cat(seen.inputs), torch.cat(seen.norms, 1)
    if not norms.isfinite().all():
        raise ValueError(f"activations of layer {layer} are not finite: use bfloat16 instead of float16")
    powers = [_massive_power(of_side) for of_side in norms]
    massive = torch.stack([of_side >= 2.0**power for of_side, power in zip(norms, powers, strict=True)])
    _report_massive(layer, norms, massive, torch.cat(seen.ids) if seen.ids else None)
    if massive[0].any():
        x = x[~massive[0]]
    sums = torch.stack([part for power, part in seen.sums.items() if power <= powers[1]]).sum(0)
    mean, square = sums / (~massive[1]).sum()
    scales = ActivationScales(
        input_scale=float(x.float().square().mean().sqrt()),
        output_scale=float((square - mean.square()).clamp_min(0).mean().sqrt()),
        output_norm=float(square.sum()),
    )
    if not all(value > 0 for value in vars(scales).values()):
        raise ValueError(f"the activations of layer {layer} are constant ({scales}): choose another layer")
    return Calibration(scales, x.float().mean(0), mean.float(), x)


def _massive_power(norms: Tensor) -> int:
    """Return the power of two from which squared norms (tokens) are massive: 16 to 32 times the median of those not 0.

    It is a power of two because the outputs are summed apart by these.
    """
    positive = norms[norms > 0]
    return int((MASSIVE_FACTOR * positive.median()).frexp().exponent) if len(positive) else 0


def _report_massive(layer: int, norms: Tensor, massive: Tensor, ids: Tensor | None) -> None:
    """Warn of massive tokens, if there are any: norms, massive (2, tokens) of inputs and outputs, ids (tokens)."""
    for side, values, mask in zip(("input", "output"), norms, massive, strict=True):
        if not mask.any():
            continue
        common = [] if ids is None else Counter(ids[mask.to(ids.device)].tolist()).most_common(5)
        logger.warning(
            "layer %d: %.2g %% of the calibration tokens have a massive %s, typically %.0f times the others' squared "
            "norm%s. Scales, and the norm that minimum_relative_norm is relative to, leave these tokens out",
            layer, 100 * mask.double().mean(), side, values[mask].median() / values[~mask & (values > 0)].median(),
            f"; most frequent ids: {', '.join(str(token) for token, _ in common)}" if common else "",
        )  # fmt: skip


@torch.no_grad()
def init_layer(
    layer: SparseLayer, calibration: Calibration, gate_init: str = "data", scale_activations: bool = True
) -> None:
    """Initialise a layer as the authors do, scaled to the activations.

    Scaled: G, E, U ← ·/s_x and b ← mean(y), the init of a layer that sees x / s_x and predicts y − mean(y).
    Gate from data: the gate row of expert n is the direction of a training input x_n from the mean,
    G_n ∝ x_n − mean(x), with the norm of the random init, and g_n = −G_n · mean(x). Each expert then wins on the
    neighbourhood of its token, so that nearly all are used from the first step on.
    """
    layer.reset_parameters()
    scale = calibration.scales.input_scale if scale_activations else 1.0
    for name in ("gate", "encoder", "encoder_up"):
        if (linear := getattr(layer, name, None)) is not None:  # an adapter's wrapper has the weight, too
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
    weight = F.normalize(directions, dim=-1) / (math.sqrt(3) * scale)
    layer.gate.weight.copy_(weight)
    if layer.gate.bias is not None:
        layer.gate.bias.copy_(-(weight @ calibration.input_mean))


def check_encoder_init(config: MxDLayerConfig, site: MLPSite) -> None:
    """Raise a ValueError unless the encoder has the pretrained MLP's form and width; an MoE's may be narrower."""
    widths, form = mlp_widths(site), mlp_encoder_type(site)
    if widths is None:
        return  # `mlp_weights` says why there are none
    units, size = widths[1], config.intermediate_size
    fits = size <= units if site.kind == "mixture-of-experts" else size == units
    if config.encoder_type != form or not fits:
        raise ValueError(
            f"layer {site.layer}: an encoder of form {config.encoder_type} and intermediate_size {size} cannot be "
            f"initialised from the pretrained MLP, which has form {form} and {units}: set encoder_init='random'"
        )


@torch.no_grad()
def init_from_pretrained(layer: MxDLayer, site: MLPSite, decoder: bool = False) -> None:
    """Copy the pretrained MLP's encoder (and up projection) into E and U.

    With `decoder`, also its decoder into D and b: where Cᵀa is 1, the layer then is the MLP. A layer that writes to
    several MLPs has the decoder in their first output; see `fit_later_outputs`.
    """
    check_encoder_init(layer.config, site)
    weights = mlp_weights(site)
    if layer.config.intermediate_size < len(weights.encoder):
        weights = weights.strongest(layer.config.intermediate_size)
    pairs: list[tuple[Tensor | None, Tensor | None]]
    pairs = [(layer.encoder.weight, weights.encoder), (layer.encoder.bias, weights.encoder_bias)]
    if layer.encoder_up is not None:
        pairs += [(layer.encoder_up.weight, weights.up), (layer.encoder_up.bias, weights.up_bias)]
    if decoder:
        bias, size = layer.output_bias, len(weights.decoder)
        pairs += [(layer.decoder.weight[:size], weights.decoder)]
        pairs += [(None if bias is None else bias[:size], weights.decoder_bias)]
    for parameter, pretrained in pairs:
        if parameter is not None:
            nn.init.zeros_(parameter) if pretrained is None else parameter.copy_(pretrained)


@torch.no_grad()
def fit_later_outputs(
    decomposition: MxDModel, capture: Capture, batches: Iterable[Mapping[str, Tensor]], least_norms: Mapping[int, float]
) -> None:
    """Fit D and b of the MLPs after the first that a layer writes to, as the best linear map of its units z.

        min over D, b of   Σ_t w_t ‖y_t − Dᵀz_t − b‖² + r Σ_h ‖d_h‖² Σ_t w_t z_th²,   w_t = 1 / max(‖ȳ_t‖², m)

    with ȳ all outputs joined, m of `least_norms` by layer, and r the number of units a token, so that a fit on few
    tokens stays small: where Cᵀa is 1, this is the distillation loss.
    """
    layers: dict[int, Any] = {index: decomposition.layer(index) for index in least_norms}
    moments: dict[int, Tensor] = {}
    tokens = 0
    for batch in batches:
        captured, masks = captured_activations(capture, decomposition, batch, include_first=False)
        tokens += int(next(iter(masks.values())).sum())
        for index, layer in layers.items():
            x, y = (tensor[masks[index]].to(layer.expert_table) for tensor in captured[index])
            weight = squared_norm(y).clamp_min(max(least_norms[index], 1e-30)).rsqrt()[:, None].to(y)
            ones = torch.full_like(weight, float(layer.output_bias is not None))
            later = y[:, y.shape[1] // layer.num_output_layers :]
            known = weight * torch.cat([layer.hidden(x), ones], 1)
            moment = (known.T @ torch.cat([known, weight * later], 1)).double()
            moments[index] = moments.get(index, 0) + moment
    for index, layer in layers.items():
        square, products = moments[index].tensor_split([len(moments[index])], 1)
        scale = square.diagonal()
        ridge = ((len(scale) - 1) / max(tokens, 1) * scale).clamp_min(1e-12 * float(scale.max()))
        *decoder, bias = torch.linalg.solve(square + torch.diag(ridge), products)
        layer.decoder.weight[-len(bias) :] = torch.stack(decoder, 1).to(layer.decoder.weight)
        if layer.output_bias is not None:
            layer.output_bias[-len(bias) :] = bias.to(layer.output_bias)


@torch.no_grad()
def init_modulation_at_unit(layer: MxDLayer, calibration: Calibration) -> None:
    """Draw C ~ U(0, 2 / s) with s the mean sum of a token's coefficients.

    Cᵀa is then about 1 everywhere and the layer about Dᵀz, so that experts only have to carry its errors.
    """
    total = layer.encode(calibration.inputs[:8192]).values.float().sum(-1).mean().clamp_min(1e-6)
    nn.init.uniform_(layer.modulation, 0.0, float(2 / total))


def parameter_scales(module: nn.Module, scales: ActivationScales) -> dict[str, float]:
    """Return the factor on every parameter's learning rate with which Adam on raw activations takes the steps that it
    would take on x / s_x and (y − μ) / s_y, by parameter name: {"gate.weight": 1 / s_x, "decoder.weight": s_y}.

    Raises:
        ValueError: The factor of a trained parameter that an adapter added is not known.
    """
    factors = {}
    for name, parameter in module.named_parameters():
        part, _, rest = name.partition(".")
        of_input = 1 / scales.input_scale if part in ("gate", "router", "encoder", "encoder_up", "skip") else 1.0
        of_output = scales.output_scale if part in ("decoder", "skip", "output_bias") else 1.0
        kind = _KIND.fullmatch(rest)
        if kind is None and parameter.requires_grad and (of_input, of_output) != (1.0, 1.0):
            raise ValueError(
                f"no rule scales the learning rate of {name}: use LoRA, DoRA or IA³, merge the adapter first, or set "
                "scale_activations=False"
            )
        by_kind = {"bias": of_output, "lora_A": of_input, "lora_B": of_output, "lora_E": 1.0, "ia3_l": 1.0}
        factors[name] = by_kind.get(kind[1] if kind else "", of_input * of_output)
    return factors


def init_decomposition(
    decomposition: MxDModel,
    model: nn.Module,
    calibrations: Mapping[int, Calibration],
    args: DistillationArguments,
    progress: bool = False,
) -> None:
    """Initialise every layer as the arguments say. A decoder is the pretrained MLP's only if the encoder is, too.

    A layer draws the same random numbers whichever layers are initialised before it.
    """
    for index in progress_bar(decomposition.config.layers, desc="init", unit="layer", show=progress):
        torch.manual_seed(args.seed)
        layer, calibration = decomposition.layer(index), calibrations[index]
        init_layer(layer, calibration, args.gate_init, args.scale_activations)
        if layer.router is not None:
            # It decides which experts are active.
            fit_router(layer, calibration.inputs, seed=args.seed, progress=progress)
        if not isinstance(layer, MxDLayer):
            continue
        if args.encoder_init == "pretrained":
            site = find_mlp(model, index, **decomposition.config.where)
            init_from_pretrained(layer, site, decoder=args.decoder_init == "pretrained")
        if args.modulation_init == "unit":
            init_modulation_at_unit(layer, calibration)


def parameter_group(
    parameters: list[nn.Parameter], scale: float, factor: float, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a group of an optimizer for parameters of this scale, whose rate is multiplied by it and by `factor`."""
    decay = kwargs["weight_decay"] / scale  # it is multiplied by the rate
    group = {"params": parameters, "lr": kwargs["lr"] * scale * factor, "weight_decay": decay}
    if "eps" in kwargs:
        group["eps"] = kwargs["eps"] / scale
    return group

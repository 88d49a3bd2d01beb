"""`mxd plan`: what a decomposition takes before it starts, from the base model's config alone: no weights are read."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mxd.base.base_model import DTYPES, base_skeleton, default_device
from mxd.modeling_mxd import MxDLayerConfig, find_mlps
from mxd.trainers.decomposition_trainer import CALIBRATION_TOKENS, STATISTICS_TOKENS

from .costs import (
    CHECKPOINT,
    FLOAT,
    STEP_BYTES,
    BaseCost,
    LayerCost,
    base_cost,
    calibration_memory,
    evaluation_memory,
    layer_cost,
    memory,
    scores_bytes,
    split_cost,
    work_of,
)
from .decompose import build_config
from .layer_passes import groups_of, level_groups
from .options import PlanOptions
from .training import rows_per_step

EVALUATION_BATCH = 2048
# Bytes of text, tokenizer and libraries that a run loads after its start, in the memory of the host.
HOST_BYTES = 50_000_000
PROBE_WIDTH = 4096
# FLOPs that a device does while it moves a byte, where --flops is given without a bandwidth.
FLOPS_PER_BYTE = 100


class Rates(NamedTuple):
    """Throughput of a device: FLOPs a second in the base's products and in the layers', and bytes moved a second."""

    base: float
    layers: float
    bandwidth: float


class Plan:
    """The costs of one run, and what follows from them for several ways to place it.

    `rates` are by default those that the options give, or else measured here.
    """

    def __init__(self, options: PlanOptions, rates: Rates | None = None):
        self.options = options
        self.context = options.context_length
        model = base_skeleton(options.model, options.revision, options.dtype, self.context)
        config = self.config = build_config(model, None, options)
        sites, size = find_mlps(model, **config.where), DTYPES[options.dtype].itemsize
        self.base: BaseCost = base_cost(model, sites, size, self.context)
        auxiliary = options.method == "mxd" and options.auxiliary_weight > 0
        self.configs: dict[int, MxDLayerConfig] = {layer: config.layer(layer) for layer in config.layers}
        self.layers: dict[int, LayerCost] = {
            layer: layer_cost(each, [sites[i] for i in config.written_layers(layer)], size, auxiliary)
            for layer, each in self.configs.items()
        }
        self.batch = rows_per_step(options) * self.context
        self.steps = max(1, options.tokens // self.batch)
        self.tokens = self.steps * self.batch
        self.rates = rates or given_rates(options, self.base)  # after all that may be refused

    def base_seconds(self, last: int, tokens: float) -> float:
        """Return the seconds of the base's forward passes over tokens, up to the MLP of a layer."""
        depth = sorted(self.base.flops_to).index(last) + 1
        moved = self.base.traffic(depth) / self.rates.bandwidth
        return tokens * (self.base.flops_to[last] / self.rates.base + moved)

    def costs(self, layers: Sequence[int], split: int = 1) -> list[LayerCost]:
        """Return the costs of layers, or of a device's part if so many devices hold their experts together."""
        return [split_cost(self.layers[layer], self.configs[layer], split) for layer in layers]

    def training_seconds(self, layers: Sequence[int], devices: int = 1, split: int = 1) -> dict[str, float]:
        """Return the seconds to train layers in one pass, whose tokens several devices share, by part."""
        costs, last = self.costs(layers, split), max(self.config.written_layers(max(layers)))
        tokens, rates = self.tokens / devices, self.rates
        trained = sum(cost.parameters + cost.auxiliary for cost in costs)
        calibrated = self.calibration_tokens()
        counted = self._measured("statistics_tokens", STATISTICS_TOKENS)
        encoded = sum(cost.inference_flops for cost in costs) * (counted / devices + 8192) / rates.layers
        products = sum(cost.training_flops for cost in costs) / rates.layers
        moved = sum(cost.training_bytes for cost in costs) / rates.bandwidth
        return {
            "base": self.base_seconds(last, tokens),
            "layers": tokens * (products + moved),
            "optimiser": self.steps * trained * STEP_BYTES / rates.bandwidth,
            "calibration and statistics": self.base_seconds(last, (calibrated + counted) / devices) + encoded,
        }

    def calibration_tokens(self) -> int:
        """Return the tokens to calibrate on, at least one for each expert that is initialised from data."""
        experts = max(config.num_experts for config in self.configs.values())
        asked = self._measured("calibration_tokens", CALIBRATION_TOKENS)
        return max(asked, experts if self.options.gate_init == "data" else 0)

    def _measured(self, name: str, default: int) -> int:
        return int(self.options.training.get(name) or min(default, self.tokens))

    def evaluation_seconds(self) -> float:
        """Return the seconds to evaluate: the untouched, the spliced and the zero-ablated model."""
        tokens, base, rates = self.options.evaluation_tokens, self.base, self.rates
        logits = 30 * FLOAT * base.vocabulary / rates.bandwidth
        layers = sum(cost.inference_flops for cost in self.layers.values()) / rates.layers
        models = 3 * (base.flops / rates.base + base.traffic(base.layers) / rates.bandwidth)
        return tokens * (models + 3 * layers + logits)

    def memory(self, layers: Sequence[int], devices: int = 1, split: int = 1) -> dict[str, float]:
        """Return the bytes a device holds at its peak, by part: while layers are initialised or take a step together,
        or while all layers are evaluated on the first one."""
        costs, tokens = self.costs(layers), -(-self.batch // devices)
        scores = max(scores_bytes(self.configs[layer], tokens) for layer in layers)
        parts = memory(self.base, self.costs(layers, split), tokens, scores, buckets=devices > 1)
        batch = min(EVALUATION_BATCH, self.options.evaluation_tokens)
        evaluation = evaluation_memory(self.base, [*self.layers.values()], batch)
        calibration = calibration_memory(self.base, costs, self.calibration_tokens() // devices)
        return max(parts, evaluation, calibration, key=_total)

    def strategies(self) -> list[dict[str, Any]]:
        """Return ways to place the layers, each with memory of a device, passes of the base and seconds of training."""
        layers, devices = sorted(self.layers), self.options.devices
        per_pass = min(self.options.layers_per_pass or 1, len(layers))
        passes = groups_of(layers, per_pass)
        ways = [self._way("all layers on each device", [layers], devices)]
        if len(passes) > 1:
            ways.append(self._way(f"{per_pass} layer{'s' if per_pass > 1 else ''} a pass", passes, devices))
        if devices > 1 and len(layers) > 1:
            spread = level_groups(layers, devices, work_of(self.base, self.config, self.layers))
            ways.append(self._way("layers spread over devices", spread, 1, at_once=True))
        if devices > 1 and all(config.num_expert_groups is None for config in self.configs.values()):
            ways.append(self._way("experts split over devices", [layers], 1, split=devices))
        return ways

    def _way(
        self, name: str, groups: list[list[int]], sharing: int, at_once: bool = False, split: int = 1
    ) -> dict[str, Any]:
        """Return a way to train groups of layers, one after the other or `at_once`, one a device. `sharing` devices
        share the tokens, and `split` devices the experts."""
        seconds = [sum(self.training_seconds(group, sharing, split).values()) for group in groups]
        held = max((self.memory(group, sharing, split) for group in groups), key=_total)
        return {
            "strategy": name,
            "devices": len(groups) if at_once else self.options.devices,
            "memory_bytes": _total(held),
            "memory": held,
            "base_passes": len(groups),
            "training_seconds": max(seconds) if at_once else sum(seconds),
        }

    def result(self) -> dict[str, Any]:
        """Return the content of the plan."""
        costs, base = self.layers, self.base
        trained, last = sum(cost.parameters for cost in costs.values()), max(self.config.written_layers())
        auxiliary = sum(cost.auxiliary for cost in costs.values())
        directions = sum(c.num_experts * (c.output_size + 1) for c in self.configs.values() if c.method == "mxd")
        buffers = 2 * sum(config.num_experts for config in self.configs.values())
        step_flops = sum(cost.training_flops for cost in costs.values())
        inference, mlps = (
            sum(getattr(cost, name) for cost in costs.values()) for name in ("inference_flops", "mlp_flops")
        )
        return {
            "model": self.options.model,
            "host_bytes": HOST_BYTES,
            "base": {"parameters": base.parameters, "bytes": base.bytes},
            "layers": {
                str(layer): {
                    "num_experts": self.configs[layer].num_experts,
                    "parameters": cost.parameters,
                    "auxiliary_parameters": cost.auxiliary,
                    "inference_flops_per_token": cost.inference_flops,
                    "mlp_flops_per_token": cost.mlp_flops,
                }
                for layer, cost in costs.items()
            },
            "parameters": trained,
            "strategies": self.strategies(),
            "disk": {
                "checkpoint": (trained + auxiliary) * CHECKPOINT + FLOAT * buffers,
                "result": FLOAT * (trained + buffers + directions),
                "activation_cache": self.tokens * sum(cost.cache_bytes for cost in costs.values()),
            },
            "flops": {"base": self.tokens * base.flops_to[last], "layers": self.tokens * step_flops},
            "seconds": self.training_seconds(sorted(costs)) | {"evaluation": self.evaluation_seconds()},
            "inference": {
                "flops_per_token": inference,
                "mlp_flops_per_token": mlps,
                "against_mlp": inference / mlps,
                "against_model": 1 + (inference - mlps) / base.flops,
            },
            "settings": {
                "tokens": self.tokens,
                "batch_tokens": self.batch,
                "steps": self.steps,
                **self.rates._asdict(),
            },
        }


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def plan(options: PlanOptions) -> dict[str, Any]:
    """Plan a decomposition: parameters, memory a device, disk, FLOPs, time and the cost of inference.

    Returns:
        {"base", "layers", "parameters", "strategies", "disk", "flops", "seconds", "inference", "settings"}; sizes in
        bytes. "seconds" are of one device that trains all layers in one pass. A layer's FLOPs and all of "inference"
        are of a token.

    Raises:
        ValueError: what `decompose` refuses of the model, its layers and sizes.
    """
    return Plan(options).result()


def given_rates(options: PlanOptions, base: BaseCost) -> Rates:
    """Return the rates that the options give, or measure them on the device here."""
    if options.flops is not None:
        return Rates(options.flops, options.flops, options.bandwidth or options.flops / FLOPS_PER_BYTE)
    measured = measure_rates(base, DTYPES[options.dtype], torch.bfloat16 if options.bf16 else torch.float32)
    return measured if options.bandwidth is None else measured._replace(bandwidth=options.bandwidth)


def measure_rates(
    base: BaseCost, dtype: torch.dtype, layers: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> Rates:
    """Measure the rates of the device here by copies and by products of the base's widths; about a second.

    `dtype` is the base's, `layers` that of the layers' products.
    """
    device, widths = default_device(), (min(base.hidden, PROBE_WIDTH), min(base.units or PROBE_WIDTH, PROBE_WIDTH))

    def seconds(run: Callable[[], Any]) -> float:
        taken = []
        for _ in range(4):  # the first warms up
            started = clock()
            run()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            taken.append(clock() - started)
        return min(taken[1:])

    def products(dtype: torch.dtype) -> float:
        x, matrix = torch.randn(2048, widths[0], device=device, dtype=dtype), torch.randn(widths, device=device)
        weight = matrix.T.contiguous().to(dtype)
        return 2 * len(x) * weight.numel() / seconds(lambda: torch.nn.functional.linear(x, weight))

    source = torch.randn(2**24, device=device)
    target = torch.empty_like(source)
    of_base = products(dtype)
    moved = 2 * source.numel() * FLOAT / seconds(lambda: target.copy_(source))
    return Rates(of_base, of_base if layers == dtype else products(layers), moved)

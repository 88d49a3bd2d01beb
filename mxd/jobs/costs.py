"""Count what a decomposition takes, from sizes alone: parameters, FLOPs, bytes moved and bytes held.

A multiply-add is two FLOPs. Symbols: I, O widths of the MLP's input and output, H hidden units of the encoder,
N experts, K active ones, T tokens of a batch. Weights of layers are in float32; b is the bytes of a base's number.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from mxd.base.pretrained_weights import mlp_active_units, mlp_widths
from mxd.evaluation.metrics import CHUNK_ELEMENTS as LOGIT_CHUNK
from mxd.modeling_mxd import MLPSite, MxDConfig, MxDLayerConfig
from mxd.modeling_mxd.functional import CHUNK_ELEMENTS

FLOAT = 4
# Weight, gradient and two moments of AdamW; a checkpoint has no gradient.
TRAINED, CHECKPOINT = 4 * FLOAT, 3 * FLOAT
# A step of AdamW reads four numbers of a parameter and writes three; its gradient is zeroed, summed and added.
STEP_BYTES = 11 * FLOAT
# Tensors of T·H and T·O numbers in the graph of an MxD with penalty and auxiliary transcoder, with their gradients.
HIDDEN_TENSORS, OUTPUT_TENSORS = 7, 22


class LayerCost(NamedTuple):
    """What one layer takes. FLOPs and bytes are of a token."""

    parameters: int
    auxiliary: int
    """Parameters of the auxiliary transcoder, which only trains along."""
    inference_flops: float
    mlp_flops: float
    """FLOPs of the MLPs that the layer replaces."""
    training_flops: float
    training_bytes: float
    """Bytes moved by what is no large product: rows of experts, scores, elementwise functions."""
    graph_bytes: float
    """Bytes held by the layer's graph."""
    input_bytes: int
    activation_bytes: int
    """Bytes of the MLP's input and output, captured or in a cache of bfloat16."""
    cache_bytes: int


def layer_cost(config: MxDLayerConfig, sites: Sequence[MLPSite], dtype_bytes: int, auxiliary: bool) -> LayerCost:
    """Return the cost of a layer that replaces the MLPs of `sites`, in a base of `dtype_bytes` a number."""
    inputs, outputs, k = config.hidden_size, config.output_size, config.num_experts_per_tok
    units = config.intermediate_size if config.method == "mxd" else 0
    entries = inputs * (2 if config.encoder_type == "glu" else 1)  # numbers that a hidden unit's rows have
    encoder = units * entries
    decoder = units * outputs
    skip = inputs * outputs if config.method == "skip_transcoder" else 0
    scored = config.num_experts
    if config.num_groups_per_tok is not None:
        scored = config.num_groups_per_tok * config.expert_group_size
    gate = inputs * (scored + (config.num_expert_groups or 0))
    forward = gate + encoder + decoder + skip + k * outputs
    # Inputs need no gradient: a product's backward is that of its weight, the decoder's also that of z. The gate's and
    # the table's are sums of rows.
    backward = encoder + 2 * decoder + skip + k * inputs + 2 * k * outputs
    coded = inputs * outputs if auxiliary else 0
    rows = k * (3 * outputs + inputs) + (3 * k * outputs if auxiliary else 0)
    mlp = sum((mlp_active_units(site) or units) * (entries + outputs // len(sites)) for site in sites)
    elementwise = HIDDEN_TENSORS * units + OUTPUT_TENSORS * outputs
    return LayerCost(
        parameters=config.num_parameters,
        auxiliary=(config.num_experts + inputs + 1) * outputs if auxiliary else 0,
        inference_flops=2 * forward,
        mlp_flops=2 * mlp,
        training_flops=2 * (forward + backward + 2 * coded + (3 * k * outputs if auxiliary else 0)),
        training_bytes=FLOAT * (rows + 3 * scored + 2 * elementwise),
        graph_bytes=FLOAT * (elementwise + 3 * k + (2 * inputs if dtype_bytes < FLOAT else 0)),
        input_bytes=inputs * dtype_bytes,
        activation_bytes=(inputs + outputs) * dtype_bytes,
        cache_bytes=2 * (inputs * len(sites) + outputs),
    )


def split_cost(cost: LayerCost, config: MxDLayerConfig, devices: int) -> LayerCost:
    """Return what one of several devices takes, each of which holds and scores a part of the layer's experts."""
    others, outputs = config.num_experts * (1 - 1 / devices), config.output_size
    rows = config.hidden_size + int(config.gate_bias) + outputs
    return cost._replace(
        parameters=round(cost.parameters - others * rows),
        auxiliary=round(cost.auxiliary - others * outputs) if cost.auxiliary else 0,
        training_flops=cost.training_flops - 2 * others * config.hidden_size,
        training_bytes=cost.training_bytes - 3 * FLOAT * others,
    )


class BaseCost(NamedTuple):
    """What the base model takes. FLOPs are of a token."""

    parameters: int
    dtype_bytes: int
    flops_to: dict[int, float]
    """FLOPs of the forward pass that ends with the MLP of a layer."""
    flops: float
    """FLOPs of the whole forward pass, the head included."""
    hidden: int
    units: int
    layers: int
    vocabulary: int

    @property
    def bytes(self) -> int:
        """Bytes of the weights."""
        return self.parameters * self.dtype_bytes

    def traffic(self, layers: int) -> float:
        """Return the bytes that norms, residuals and activations of so many layers move for a token."""
        return layers * self.dtype_bytes * (20 * self.hidden + 6 * self.units)

    def evaluation_bytes(self, tokens: int) -> float:
        """Return the bytes of the logits of a batch of so many tokens, and of a chunk's temporaries.

        The untouched and the spliced model's logits are alive together; the allocator keeps the room of earlier ones.
        """
        logits = tokens * self.vocabulary
        return 3 * logits * self.dtype_bytes + 7 * FLOAT * min(LOGIT_CHUNK, logits)


def base_cost(model: PreTrainedModel, sites: dict[int, MLPSite], dtype_bytes: int, context_length: int) -> BaseCost:
    """Return the cost of a base model, which may be without weights; `sites` are all MLPs of its stack."""
    config = model.config.get_text_config(decoder=True)
    found = {layer: _layer_flops(model, site, context_length) for layer, site in sites.items()}
    before = 0.0
    flops_to = {}
    for layer in sorted(found):
        before += found[layer]
        flops_to[layer] = before
    head = model.get_output_embeddings()
    return BaseCost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype_bytes=dtype_bytes,
        flops_to=flops_to,
        flops=before + (2 * head.weight.numel() if isinstance(head, nn.Linear) else 0),
        hidden=config.hidden_size,
        units=max((widths[1] for site in sites.values() if site.slots and (widths := mlp_widths(site))), default=0),
        layers=len(sites),
        vocabulary=config.vocab_size,
    )


def work_of(base: BaseCost, config: MxDConfig, layers: Mapping[int, LayerCost]) -> Callable[[list[int]], float]:
    """Return a function from layers that train in one pass of the base to its FLOPs a token."""

    def work(group: list[int]) -> float:
        last = max(config.written_layers(max(group)))
        return base.flops_to[last] + sum(layers[layer].training_flops for layer in group)

    return work


def _layer_flops(model: PreTrainedModel, site: MLPSite, context_length: int) -> float:
    """Return the FLOPs of one transformer layer for a token: its matrices, and attention over half of the row."""
    layer = model.get_submodule(site.path)
    matrices = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim > 1)
    widths = mlp_widths(site) if site.slots else None
    if widths is not None and (active := mlp_active_units(site)) and active < widths[1]:  # a mixture of experts
        of_mlp = sum(parameter.numel() for module in site.modules for parameter in module.parameters())
        matrices -= round(of_mlp * (1 - active / widths[1]))
    hidden = model.config.get_text_config(decoder=True).hidden_size
    return 2 * matrices + 2 * context_length * hidden


def scores_bytes(config: MxDLayerConfig, tokens: int) -> int:
    """Return the bytes of the gate's scores that are in memory at a time."""
    return FLOAT * min(tokens * config.num_experts, max(CHUNK_ELEMENTS, 256 * config.num_experts))


def memory(
    base: BaseCost, layers: Sequence[LayerCost], tokens: int, scores: int, buckets: bool = False
) -> dict[str, float]:
    """Return the bytes that a device holds at the peak of a training step, by part.

    `buckets`: gradients are held twice, as DistributedDataParallel sums them in buckets.
    """
    trained = sum(cost.parameters + cost.auxiliary for cost in layers)
    graph = max(tokens * cost.graph_bytes for cost in layers)
    return {
        "base": base.bytes,
        "weights and optimiser": trained * (TRAINED + (FLOAT if buckets else 0)),
        "activations": tokens * sum(cost.activation_bytes for cost in layers) + max(graph, scores),
    }


def calibration_memory(base: BaseCost, layers: Sequence[LayerCost], tokens: int) -> dict[str, float]:
    """Return the bytes that a device holds while layers are initialised from the inputs of so many tokens, by part."""
    inputs = [cost.input_bytes for cost in layers]  # of one layer also joined, and in float32 and squared
    return {
        "base": base.bytes,
        "weights and optimiser": FLOAT * sum(cost.parameters + cost.auxiliary for cost in layers),
        "activations": tokens * (sum(inputs) + max(inputs) * (1 + 2 * FLOAT / base.dtype_bytes)),
    }


def evaluation_memory(base: BaseCost, layers: Sequence[LayerCost], tokens: int) -> dict[str, float]:
    """Return the bytes that a device holds while it evaluates a batch, by part; the optimiser is freed then."""
    return {
        "base": base.bytes,
        "weights and optimiser": FLOAT * sum(cost.parameters + cost.auxiliary for cost in layers),
        "activations": tokens * sum(cost.activation_bytes for cost in layers) + base.evaluation_bytes(tokens),
    }

"""Measure how the experts of a layer are used: how often, and how strongly."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mxd.base.capture import Capture, capture_layers
from mxd.base.forward import batch_for, check_causal, evaluating
from mxd.base.masks import activation_mask
from mxd.base.progress import progress_bar
from mxd.modeling_mxd import ExpertCoefficients, MxDModel

from .metrics import normalised_entropy

SPECIALISED_FREQUENCY = 0.25
ALWAYS_ON_FREQUENCY = 0.9
_TRAINING = "training tokens"
_EVALUATED = "the evaluated tokens, since the decomposition carries none from its training"

Statistics = tuple[Tensor, Tensor]
"""Frequency and mean coefficient of a layer's experts, (N) each."""


class ExpertUse:
    """Count, streamed over tokens, how N experts are used. An expert is active if its coefficient is not 0.

    Attributes:
        tokens: T, number of tokens so far.
        counts: number of tokens on which each expert was active, (N) int64.
        sums: Σ_t a_t, (N) float64.
        maximum: max_t a_t, (N) float32; 0 for an expert that was never active.
    """

    def __init__(self, num_experts: int):
        self.tokens = 0
        self.counts = torch.zeros(num_experts, dtype=torch.int64)
        self.sums = torch.zeros(num_experts, dtype=torch.float64)
        self.maximum = torch.zeros(num_experts)

    def update(self, coefficients: ExpertCoefficients) -> None:
        """Add tokens: values and indices (..., K), as `SparseLayer.encode` returns them."""
        values, indices = (tensor.detach().cpu() for tensor in coefficients)
        active = values != 0
        self.tokens += values.shape[:-1].numel()
        self.counts += torch.bincount(indices[active], minlength=len(self.counts))
        self.sums += torch.bincount(indices[active], weights=values[active].double(), minlength=len(self.counts))
        self.maximum.scatter_reduce_(0, indices[active], values[active].float(), "amax")

    @property
    def frequency(self) -> Tensor:
        """Return the share of tokens on which each expert is active, counts / T, (N) float64."""
        return self.counts.double() / max(self.tokens, 1)

    @property
    def mean(self) -> Tensor:
        """Return the mean coefficient of each expert over all tokens, zeros included, Σ_t a_t / T, (N) float64."""
        return self.sums / max(self.tokens, 1)

    def always_on(self) -> dict[str, float]:
        """Return {expert: frequency} of the experts active on nine tokens in ten or more, most frequent first."""
        frequency = self.frequency
        order = frequency.argsort(descending=True, stable=True).tolist()
        return {str(expert): float(frequency[expert]) for expert in order if frequency[expert] >= ALWAYS_ON_FREQUENCY}

    def summary(self, frequent_above: float = SPECIALISED_FREQUENCY) -> dict[str, float]:
        """Return the numbers of evaluation.json.

        `l0`: active experts per token, Σ counts / T. `dead_experts`: share of experts active on none of these tokens.
        `expert_entropy`: of counts / Σ counts, see `normalised_entropy`. `max_expert_frequency`. `frequent_experts`:
        number of experts with a frequency over `frequent_above`.
        """
        return {
            "l0": float(self.counts.sum()) / max(self.tokens, 1),
            "dead_experts": float((self.counts == 0).double().mean()),
            "expert_entropy": normalised_entropy(self.counts),
            "max_expert_frequency": float(self.frequency.max()),
            "frequent_experts": int((self.frequency > frequent_above).sum()),
        }


@torch.no_grad()
def count_expert_use(
    model: nn.Module | Capture, decomposition: MxDModel, batches: Iterable[Mapping[str, Tensor]]
) -> dict[int, ExpertUse]:
    """Count the use of the experts of every layer over all unpadded positions.

    Args:
        model: the base model, or a function from a batch to the MLPs' inputs and outputs, such as an activation cache.
        decomposition: the decomposition of the model.
        batches: `input_ids` (batch, tokens) and, if there is padding, `attention_mask`.

    Returns:
        {layer: use}.
    """
    config = decomposition.config
    uses = {layer: ExpertUse(config.layer(layer).num_experts) for layer in config.layers}
    encode_tokens(model, decomposition, batches, lambda layer, coefficients, x, y: uses[layer].update(coefficients))
    return uses


@torch.no_grad()
def encode_tokens(
    model: nn.Module | Capture,
    decomposition: MxDModel,
    batches: Iterable[Mapping[str, Tensor]],
    use: Callable[[int, ExpertCoefficients, Tensor, Tensor], None],
) -> None:
    """Call `use(layer, coefficients, x, y)` with the unpadded tokens of every batch and layer: x (T, I) and y (T, O).

    For the other arguments see `count_expert_use`. Both models are in eval mode meanwhile.
    """
    with evaluating(*(one for one in (model, decomposition) if isinstance(one, nn.Module))):
        for batch in batches:
            captured, masks = captured_activations(model, decomposition, batch)
            for layer, (x, y) in captured.items():
                module, mask = decomposition.layer(layer), masks[layer]
                use(layer, module.encode(x[mask].to(module.gate.weight.device)), x[mask], y[mask])


def captured_activations(
    model: nn.Module | Capture, decomposition: MxDModel, batch: Mapping[str, Tensor], include_first: bool = True
) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[int, Tensor]]:
    """Return {layer: (x, y)} of a batch, `right_padded`, and {layer: mask of the positions that count}."""
    config = decomposition.config
    if isinstance(model, nn.Module):
        ids, attention_mask = batch_for(model, batch)
        captured = capture_layers(model, config, ids, attention_mask)
        batch = {"input_ids": ids} if attention_mask is None else {"input_ids": ids, "attention_mask": attention_mask}
    else:
        captured = model(batch)
    how = {"include_first": include_first, "decoder": config.of_decoder}
    masks = {layer: activation_mask(batch, x, **how) for layer, (x, _) in captured.items()}
    return captured, masks


def measure_expert_statistics(
    model: nn.Module | Capture, decomposition: MxDModel, batches: Iterable[Mapping[str, Tensor]]
) -> dict[int, ExpertUse]:
    """Write every expert's frequency and mean coefficient on training tokens into the buffers that evaluation reads.

    For the arguments see `count_expert_use`. The buffers are `expert_frequency` and `expert_mean`.

    Returns:
        {layer: use}.

    Raises:
        ValueError: there is no token to measure on; the buffers are left unchanged.
    """
    uses = count_expert_use(model, decomposition, batches)
    if not all(use.tokens for use in uses.values()):
        raise ValueError("no tokens to measure the experts on: batches is empty, or contains only padding")
    for layer, use in uses.items():
        module = decomposition.layer(layer)
        module.expert_frequency.copy_(use.frequency)
        module.expert_mean.copy_(use.mean)
    return uses


def expert_statistics(
    model: nn.Module, decomposition: MxDModel, batches: Iterable[Mapping[str, Tensor]], progress: bool = False
) -> tuple[dict[int, Statistics], str]:
    """Return the statistics of every layer's experts, and a description of the tokens that they come from.

    They are read from the layers' buffers; layers without any are measured on `batches`, with a bar if `progress`.
    """
    layers = {index: decomposition.layer(index) for index in decomposition.config.layers}
    statistics = {index: (layer.expert_frequency, layer.expert_mean) for index, layer in layers.items()}
    unmeasured = [index for index, layer in layers.items() if not layer.expert_frequency.any()]
    if not unmeasured:
        return statistics, _TRAINING
    if isinstance(batches, Iterator):
        raise ValueError(
            f"the experts of layer {unmeasured[0]} have never been measured, which takes another pass over batches: "
            "give a list or a DataLoader, not an iterator"
        )
    uses = count_expert_use(model, decomposition, progress_bar(batches, desc="statistics", show=progress))
    statistics.update({index: (uses[index].frequency, uses[index].mean) for index in unmeasured})
    if len(unmeasured) == len(layers):
        return statistics, _EVALUATED
    return statistics, f"{_TRAINING}; for layers {', '.join(map(str, unmeasured))}: {_EVALUATED}"


@contextmanager
def evaluating_experts(
    model: nn.Module, decomposition: MxDModel, batches: Iterable[Mapping[str, Tensor]], progress: bool = False
) -> Iterator[tuple[dict[int, Statistics], str]]:
    """Check that a decomposition fits a causal model; inside the block both are in eval mode. Yield the statistics."""
    check_causal(model)
    with decomposition.spliced(model, cast=False):
        pass  # checks that it fits, and moves every layer to the device of its MLP
    with evaluating(model, decomposition):
        yield expert_statistics(model, decomposition, batches, progress)

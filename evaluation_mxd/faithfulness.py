"""How faithful a decomposition is to its model, and how much of that its experts carry."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from modeling_mxd import ExpertCoefficients, MxDModel, SparseLayer, capture_mlps, spliced_mlps

from .expert_use import SPECIALISED_FREQUENCY, ExpertUse, count_expert_use
from .masks import token_mask
from .metrics import ErrorSums, LogitSums, explained_share, recovered_share

EVALUATION_NAME = "evaluation.json"


class ZeroMLP(nn.Module):
    """An ablated MLP: (..., I) → zeros (..., O)."""

    def __init__(self, output_size: int):
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of the output's shape, in the dtype of x."""
        return x.new_zeros(*x.shape[:-1], self.output_size)


class LayerEvaluation:
    """Errors and expert use of one layer, streamed over the untouched model's activations.

    Args:
        layer: the layer.
        frequency: share of training tokens on which each expert is active, (N).
        mean: mean coefficient of each expert over training tokens, (N).
    """

    def __init__(self, layer: SparseLayer, frequency: Tensor, mean: Tensor):
        self.layer = layer
        table = layer.expert_table
        self.specialised = (frequency <= SPECIALISED_FREQUENCY).to(table.device)
        mean = mean.to(table)
        self.mean_sum = mean @ table
        self.mean_specialised_sum = (mean * self.specialised) @ table
        self.use = ExpertUse(layer.config.num_experts)
        self.errors, self.errors_without_first = ErrorSums(), ErrorSums()
        self.without_experts, self.without_specialised = ErrorSums(), ErrorSums()

    def update(self, x: Tensor, y: Tensor, mask: Tensor, mask_without_first: Tensor) -> None:
        """Add a batch: x (batch, tokens, I), y (batch, tokens, O), masks (batch, tokens)."""
        first = ~mask_without_first[mask]
        x, y = x[mask], y[mask]
        coefficients = self.layer.encode(x)
        self.use.update(coefficients)
        summed = self.layer.sum_experts(coefficients)
        values = coefficients.values * self.specialised[coefficients.indices]
        specialised = self.layer.sum_experts(ExpertCoefficients(values, coefficients.indices))
        inputs = x.to(summed.dtype)
        prediction = self.layer.combine(summed, inputs)
        self.errors.update(prediction, y)
        self.errors_without_first.update(prediction[~first], y[~first])
        self.without_experts.update(self.layer.combine(self.mean_sum.expand_as(summed), inputs), y)
        self.without_specialised.update(self.layer.combine(summed - specialised + self.mean_specialised_sum, inputs), y)

    def result(self) -> dict[str, float]:
        """The layer's entry of evaluation.json; see `faithfulness`."""
        nmse = self.errors.nmse
        return {
            "nmse": nmse,
            "nmse_without_first": self.errors_without_first.nmse,
            "fvu": self.errors.fvu,
            "fvu_without_first": self.errors_without_first.fvu,
            "expert_share": explained_share(nmse, self.without_experts.nmse),
            "specialised_share": explained_share(nmse, self.without_specialised.nmse),
            **self.use.summary(),
        }


@torch.no_grad()
def faithfulness(
    model: nn.Module,
    decomposition: MxDModel,
    batches: Iterable[Mapping[str, Tensor]],
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure a decomposition on held-out tokens.

    Every metric is over all unpadded positions, the first (BOS) included, since a spliced model runs the layer
    there too; NMSE and FVU are given without it as well. Layer metrics use the untouched model's activations.

        recovered          (CE_zero − CE_spliced) / (CE_zero − CE_untouched)
        expert_share       (NMSE_mean − NMSE) / (1 − NMSE), NMSE_mean with Cᵀa replaced by its mean over training
                           tokens: how much of what the layer explains its experts' choice explains
        specialised_share  the same when only experts active on at most 25 % of training tokens are so replaced

    Args:
        model: the base model; its MLPs are in place again afterwards.
        decomposition: its layers, moved to the model's device.
        batches: `input_ids` (batch, tokens) and, where there is padding, `attention_mask`.
        settings: added to the settings that are recorded.
        progress: show a progress bar.

    Returns:
        {"layers": {"15": {"nmse", "nmse_without_first", "fvu", "fvu_without_first", "expert_share",
        "specialised_share", "l0", "dead_experts", "expert_entropy", "max_expert_frequency",
        "frequent_experts"}}, "cross_entropy": {"untouched", "spliced", "zero_ablated", "recovered"}, "kl",
        "top1_agreement", "settings"}; cross-entropies and KL in nats per token.

    Raises:
        ValueError: when there are no batches.
        SurgeryError: when the model does not fit the decomposition.
    """
    device = next(model.parameters()).device
    rows = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    if not rows:
        raise ValueError("no held-out rows to evaluate on: the text is shorter than one row of context")
    decomposition.to(device)
    layers = decomposition.config.layers
    with _evaluating(model, decomposition):
        evaluations, source = _layer_evaluations(model, decomposition, rows)
        untouched, spliced, ablated = LogitSums(), LogitSums(), LogitSums()
        zeros = {layer: ZeroMLP(decomposition.config.layer(layer).output_size) for layer in layers}
        tokens = 0
        for batch in tqdm(rows, desc="evaluate", unit="batch", disable=not progress, dynamic_ncols=True):
            ids, attention_mask = batch["input_ids"], batch.get("attention_mask")
            mask, without_first = token_mask(ids, attention_mask), token_mask(ids, attention_mask, include_first=False)
            tokens += int(mask.sum())
            captured, logits = _capture_and_logits(model, layers, batch)
            for layer, (x, y) in captured.items():
                evaluations[layer].update(x, y, mask, without_first)
            untouched.update(logits, ids, mask)
            with decomposition.spliced(model, cast=False):
                spliced.update(_logits(model, batch), ids, mask, reference=logits)
            with spliced_mlps(model, zeros):
                ablated.update(_logits(model, batch), ids, mask)
    losses = (untouched.cross_entropy, spliced.cross_entropy, ablated.cross_entropy)
    return {
        "layers": {str(layer): evaluations[layer].result() for layer in layers},
        "cross_entropy": {
            **dict(zip(("untouched", "spliced", "zero_ablated"), losses, strict=True)),
            "recovered": recovered_share(*losses),
        },
        "kl": spliced.kl,
        "top1_agreement": spliced.agreement,
        "settings": {
            "tokens": tokens,
            "rows": sum(len(batch["input_ids"]) for batch in rows),
            "positions": "all but padding; *_without_first: also without each row's first position (BOS)",
            "expert_statistics": source,
            "specialised_frequency": SPECIALISED_FREQUENCY,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            **(settings or {}),
        },
    }


def _layer_evaluations(
    model: nn.Module, decomposition: MxDModel, batches: list[dict[str, Tensor]]
) -> tuple[dict[int, LayerEvaluation], str]:
    """Statistics of the experts come from the layers' buffers, or from these tokens where training left none."""
    layers = {index: decomposition.layer(index) for index in decomposition.config.layers}
    if all(bool(layer.expert_frequency.any()) for layer in layers.values()):
        statistics = {i: (layer.expert_frequency, layer.expert_mean) for i, layer in layers.items()}
        source = "training tokens"
    else:
        capture = partial(_capture_and_logits, model, list(layers))
        uses = count_expert_use(lambda batch: capture(batch)[0], decomposition, batches)
        statistics = {index: (use.frequency, use.mean) for index, use in uses.items()}
        source = "the evaluated tokens, since the decomposition carries none from its training"
    return {index: LayerEvaluation(layers[index], *statistics[index]) for index in layers}, source


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    output = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)
    logits = output.logits
    assert isinstance(logits, Tensor)
    return logits


def _capture_and_logits(
    model: nn.Module, layers: list[int], batch: Mapping[str, Tensor]
) -> tuple[dict[int, tuple[Tensor, Tensor]], Tensor]:
    """One forward pass that gives both."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept.append(output.logits)

    with model.register_forward_hook(keep):
        captured = capture_mlps(model, layers, batch["input_ids"], batch.get("attention_mask"), stop_after_last=False)
    return captured, kept[0]


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, each model's own mode afterwards."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)


def save_evaluation(results: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Write evaluation.json (values that are not finite as null) in one move, so that no half file is ever seen."""
    path = Path(folder) / EVALUATION_NAME
    text = json.dumps(_finite(results), indent=2, allow_nan=False) + "\n"
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
    return path


def load_evaluation(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read evaluation.json of a decomposition's folder.

    Raises:
        FileNotFoundError: when there is none.
    """
    results = json.loads((Path(folder) / EVALUATION_NAME).read_text(encoding="utf-8"))
    assert isinstance(results, dict)
    return results


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

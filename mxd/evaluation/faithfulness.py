"""Measure how faithful a decomposition is to its model, and how much of that its experts carry."""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxd.base.files import write_json
from mxd.base.forward import batch_for, capture_with_logits, next_token_logits, no_predictions, zero_ablated
from mxd.base.masks import next_token_mask, token_mask
from mxd.base.progress import progress_bar
from mxd.modeling_mxd import MxDModel, SparseLayer

from .ablation import MeanExperts
from .expert_use import SPECIALISED_FREQUENCY, ExpertUse, Statistics, evaluating_experts
from .metrics import ErrorSums, LogitSums, explained_share, recovered_share, weak_experts
from .paired import PairedDifference
from .untouched import UntouchedLosses

logger = logging.getLogger(__name__)

EVALUATION_NAME = "evaluation.json"
_POSITIONS = "all but padding; *_without_first: also without each row's first position (BOS)"


class LayerEvaluation:
    """Measure errors and expert use of one layer, streamed over the untouched model's activations."""

    def __init__(
        self, layer: SparseLayer, statistics: Statistics, specialised_frequency: float = SPECIALISED_FREQUENCY
    ):
        self.layer, self.specialised_frequency = layer, specialised_frequency
        # All experts at their mean, then the specialised ones.
        self.means = [(ErrorSums(), MeanExperts(layer, statistics, least)) for least in (1.0, specialised_frequency)]
        self.use = ExpertUse(layer.config.num_experts)
        self.errors, self.errors_without_first = ErrorSums(), ErrorSums()
        several = range(layer.num_output_layers if layer.num_output_layers > 1 else 0)
        self.errors_of_outputs = [ErrorSums() for _ in several]

    def update(self, x: Tensor, y: Tensor, mask: Tensor, mask_without_first: Tensor) -> None:
        """Add a batch: x (batch, tokens, I), y (batch, tokens, O), masks (batch, tokens)."""
        mask, mask_without_first = mask.to(x.device), mask_without_first.to(x.device)
        device = self.layer.expert_table.device
        x, y, first = (tensor[mask].to(device) for tensor in (x, y, ~mask_without_first))
        coefficients = self.layer.encode(x)
        self.use.update(coefficients)
        summed = self.layer.sum_experts(coefficients)
        x = x.to(summed.dtype)
        prediction = self.layer.combine(summed, x)
        self.errors.update(prediction, y)
        self.errors_without_first.update(prediction[~first], y[~first])
        for number, errors in enumerate(self.errors_of_outputs):
            errors.update(*(tensor.chunk(len(self.errors_of_outputs), -1)[number] for tensor in (prediction, y)))
        for errors, mean in self.means:
            errors.update(self.layer.combine(mean(self.layer, coefficients), x), y)

    def result(self) -> dict[str, Any]:
        """Return the layer's entry of evaluation.json; see `faithfulness`."""
        outputs = [{"nmse": errors.nmse, "fvu": errors.fvu} for errors in self.errors_of_outputs]
        nmse, clipped = self.errors.nmse, self.errors.clipped_nmse
        mean, mean_specialised = (errors for errors, _ in self.means)
        return {
            "nmse": nmse,
            "nmse_without_first": self.errors_without_first.nmse,
            "fvu": self.errors.fvu,
            "fvu_without_first": self.errors_without_first.fvu,
            "expert_share": explained_share(nmse, mean.nmse),
            "specialised_share": explained_share(nmse, mean_specialised.nmse),
            "clipped_expert_share": explained_share(clipped, mean.clipped_nmse),
            "clipped_specialised_share": explained_share(clipped, mean_specialised.clipped_nmse),
            **self.use.summary(self.specialised_frequency),
            **({"outputs": outputs} if outputs else {}),
        }


class ModelEvaluation:
    """Measure the base model untouched, spliced and zero-ablated, and its layers, streamed over batches.

    Models are in eval mode, the decomposition's layers on the devices of their MLPs.
    """

    def __init__(
        self,
        model: nn.Module,
        decomposition: MxDModel,
        layers: Mapping[int, LayerEvaluation],
        known: UntouchedLosses | None,
    ):
        self.unpredicted = no_predictions(model)
        known = None if self.unpredicted else known
        self.model, self.decomposition, self.layers, self.known = model, decomposition, layers, known
        self.known_ablated = None if known is None else known.zero_ablated(decomposition.config)
        self.untouched, self.spliced, self.ablated = LogitSums(), LogitSums(), LogitSums()
        self.rise = PairedDifference()
        self.batches = self.tokens = self.rows = 0

    def update(self, batch: Mapping[str, Tensor]) -> None:
        """Add a batch: three forward passes, two if the zero-ablated cross-entropy is known, one with a random head."""
        ids, attention_mask = rows = batch_for(self.model, batch)
        mask, without_first = token_mask(ids, attention_mask), token_mask(ids, attention_mask, include_first=False)
        self.rows += len(ids)
        self.tokens += int(mask.sum())
        config = self.decomposition.config
        captured, logits = capture_with_logits(self.model, config, rows)
        for layer, (x, y) in captured.items():
            self.layers[layer].update(x, y, mask, without_first)
        del captured
        self.batches += 1
        if self.unpredicted:
            return
        if self.known is None:
            untouched = self.untouched.update(logits, ids, mask)
        else:
            untouched = self.known.of_batch(self.batches - 1, ids)
        with self.decomposition.spliced(self.model, cast=False):
            spliced = self.spliced.update(next_token_logits(self.model, rows), ids, mask, reference=logits)
        self.rise.update(spliced - untouched.to(spliced.device), next_token_mask(mask))
        del logits
        if self.known_ablated is None:
            with zero_ablated(self.model, config):
                self.ablated.update(next_token_logits(self.model, rows), ids, mask)

    def result(self) -> dict[str, Any]:
        """Return the result of `faithfulness`, with the settings of the tokens and the model."""
        if not self.tokens:
            raise ValueError("no held-out tokens to evaluate on: there are no rows, or every position is padding")
        if self.known is not None:
            self.known.check_complete(self.batches)
        untouched = (self.known or self.untouched).cross_entropy
        ablated = self.ablated.cross_entropy if self.known_ablated is None else self.known_ablated
        spliced = self.spliced.cross_entropy
        return {
            "layers": {str(layer): evaluation.result() for layer, evaluation in self.layers.items()},
            "always_on": {str(layer): evaluation.use.always_on() for layer, evaluation in self.layers.items()},
            "cross_entropy": {
                "untouched": untouched,
                "spliced": spliced,
                "zero_ablated": ablated,
                "rise": self.rise.mean,
                "rise_interval": self.rise.interval,
                "recovered": recovered_share(untouched, spliced, ablated),
            },
            "kl": self.spliced.kl,
            "top1_agreement": self.spliced.agreement,
            "settings": {
                "tokens": self.tokens,
                "rows": self.rows,
                "positions": _POSITIONS,
                "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
                **({"no_predictions": self.unpredicted} if self.unpredicted else {}),
            },
        }


@torch.no_grad()
def faithfulness(
    model: nn.Module,
    decomposition: MxDModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
    specialised_frequency: float = SPECIALISED_FREQUENCY,
    untouched: UntouchedLosses | None = None,
) -> dict[str, Any]:
    """Measure a decomposition on held-out tokens.

    Metrics are over all unpadded positions, including the first (BOS); NMSE and FVU are given without it too. Layer
    metrics use the untouched model's activations; see `ErrorSums`, `LogitSums` and `ExpertUse`. NaN: not defined, as
    all that rests on predictions is if `load_base_model` found that they mean nothing (settings.no_predictions).

        rise               CE_spliced − CE_untouched with its 95 % `rise_interval`, see `PairedDifference`
        recovered          (CE_zero − CE_spliced) / (CE_zero − CE_untouched)
        expert_share       (NMSE_mean − NMSE) / (1 − NMSE), NMSE_mean with Cᵀa replaced by its mean over training
                           tokens: the share of the explained error that depends on the choice of experts
        specialised_share  the same with only the specialised experts replaced, those active on at most
                           `specialised_frequency` of the training tokens
        clipped_…_share    the same with clipped NMSEs; at most 1, while the others have no bound

    Args:
        model: the base model; its MLPs are in place again afterwards.
        decomposition: its layers; each moves to its MLP's device. Interventions act on the spliced model only.
        batches: `input_ids` (batch, tokens) and, if there is padding, `attention_mask`.
        settings: added to the recorded settings.
        progress: show a progress bar.
        specialised_frequency: see above; `frequent_experts` counts those active on more of the evaluated tokens.
        untouched: known losses on these batches, which save the pass of the zero-ablated model if they include it.

    Returns:
        {"layers": {"15": {"nmse", "nmse_without_first", "fvu", "fvu_without_first", "expert_share",
        "specialised_share", "clipped_expert_share", "clipped_specialised_share", and `ExpertUse.summary`; of a layer
        that writes to several MLPs these are over their outputs joined, and "outputs" has the errors of each}},
        "always_on": {"15": `ExpertUse.always_on`}, "cross_entropy": {"untouched", "spliced", "zero_ablated", "rise",
        "rise_interval": [low, high], "recovered"}, "kl", "top1_agreement", "settings"}; in nats per token.

    Raises:
        ValueError: the model is not causal, there are no tokens, `batches` is an iterator that is needed twice, or
            `untouched` is of other batches.
        SurgeryError: the model does not fit the decomposition; nothing is measured.
    """
    with evaluating_experts(model, decomposition, batches, progress) as (statistics, source):
        layers = {
            layer: LayerEvaluation(decomposition.layer(layer), statistics[layer], specialised_frequency)
            for layer in decomposition.config.layers
        }
        evaluation = ModelEvaluation(model, decomposition, layers, untouched)
        for batch in progress_bar(batches, desc="evaluate", show=progress):
            evaluation.update(batch)
    results = evaluation.result()
    results["settings"] |= {"expert_statistics": source, "specialised_frequency": specialised_frequency}
    results["settings"] |= settings or {}
    if weak := weak_experts({f"layer {layer}": row for layer, row in results["layers"].items()}):
        logger.warning(weak)
    return results


def save_evaluation(results: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Write evaluation.json atomically into a folder, with null for NaN and infinity; return its path."""
    path = Path(folder) / EVALUATION_NAME
    write_json(path, results)
    return path


def load_evaluation(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read evaluation.json of a decomposition's folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a JSON object.
    """
    path = Path(folder) / EVALUATION_NAME
    results = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(results, dict):
        raise ValueError(f"{path} is no evaluation: a JSON object was expected, got {type(results).__name__}")
    return results

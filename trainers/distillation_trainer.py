"""Layerwise distillation: train a decomposition to reproduce the MLPs of a frozen model.

A step: the model runs once on the token ids, only as far as the last layer needed; input and output of every
chosen MLP are captured on the way; then layer by layer the decomposition's loss is computed and propagated back,
so that the graph of only one layer is alive at a time. The Trainer's model is the decomposition alone: it alone is
wrapped, optimised, saved.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel

from modeling_mxd import MxDModel, capture_mlps, find_mlp

from .decomposition_trainer import DecompositionTrainer
from .distillation_arguments import DistillationArguments
from .initialization import initialize_decomposition


class DistillationTrainer(DecompositionTrainer):
    """Trains an `MxDModel` on the MLP inputs and outputs of a frozen model.

    Args:
        model: the decomposition.
        teacher: the causal language model that it decomposes; it is put into eval mode and its parameters are
            frozen, nothing else of it is changed, and it is not saved.
        args: a `DistillationArguments`.
        train_dataset, eval_dataset: rows with `input_ids` (and `attention_mask` where there is padding).
        **kwargs: as for `transformers.Trainer`.

    Raises:
        SurgeryError: when the teacher has no such layer, or one of other widths.

    Example:
        >>> trainer = DistillationTrainer(mxd, teacher, args, train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    args: DistillationArguments
    model: MxDModel
    progress_name = "distil"

    def __init__(
        self,
        model: MxDModel,
        teacher: PreTrainedModel,
        args: DistillationArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        compute_metrics: Any = None,
        **kwargs: Any,
    ):
        for layer in model.config.layers:
            find_mlp(teacher, layer).check_fits(model.config.layer(layer))
        model.record_base(teacher)
        if len(model.config.layers) > 1 and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # each backward uses one layer's parameters only
        super().__init__(
            model,
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics or normalised_errors,
            **kwargs,
        )
        self.teacher = teacher.eval().requires_grad_(False).to(args.device)
        self._layer_losses = dict.fromkeys(model.config.layers, torch.zeros((), device=args.device))
        self._layer_losses_since = 0

    def capture(self, inputs: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """{layer: (x, y)} of the teacher's MLPs for a batch of token ids; x (batch, tokens, I), y (…, O)."""
        return capture_mlps(self.teacher, self.model.config.layers, inputs["input_ids"], inputs.get("attention_mask"))

    @staticmethod
    def distillation_loss(
        prediction: Tensor,
        target: Tensor,
        mask: Tensor,
        normalization: str = "squared_norm",
        minimum_squared_norm: float = 0.0,
    ) -> Tensor:
        """Sum of the normalised squared errors of the tokens that count.

            squared_norm   Σ_t ‖ŷ_t − y_t‖² / max(‖y_t‖², m)   paper's reported error for m = 0
            norm           Σ_t ‖ŷ_t − y_t‖² / ‖y_t‖            the authors' code, up to the constant 1/O

        Args:
            prediction: ŷ, (..., O).
            target: y, (..., O).
            mask: which tokens count, (...) bool.
            normalization: `"squared_norm"` or `"norm"`.
            minimum_squared_norm: m; bounds the weight of tokens whose output is tiny.

        Returns:
            A scalar in float32.
        """
        prediction, target = prediction[mask].float(), target[mask].float()
        squared_norm = target.square().sum(-1)
        if normalization == "squared_norm":
            divisor = squared_norm.clamp_min(max(minimum_squared_norm, torch.finfo(torch.float32).tiny))
        else:
            divisor = squared_norm.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return ((prediction - target).square().sum(-1) / divisor).sum()

    def layer_loss(self, model: nn.Module, layer: int, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Sum of one layer's losses over the batch's tokens; `model` is the (wrapped) decomposition."""
        floor = 0.0
        if self.args.loss_normalization == "squared_norm" and layer in self.scales:
            floor = self.args.minimum_relative_norm * self.scales[layer].output_norm
        prediction = model(x, layer=layer).output
        return self.distillation_loss(prediction, y, mask, self.args.loss_normalization, floor)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean over layers and counted tokens of the loss; all layers' graphs are alive, see `training_step`."""
        mask = self.counted(inputs)
        tokens = mask.sum() if num_items_in_batch is None else num_items_in_batch
        captured = self.capture(inputs)
        losses = [self.layer_loss(model, layer, x, y, mask) for layer, (x, y) in captured.items()]
        loss = torch.stack(losses).mean() / tokens * self.args.world_size
        return (loss, {}) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of every layer in turn; returns the mean loss of the layers, detached."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        mask = self.counted(inputs)
        tokens = mask.sum() if num_items_in_batch is None else num_items_in_batch
        captured = self.capture(inputs)
        total = torch.zeros((), device=self.args.device)
        layers = list(captured)
        for layer in layers:
            x, y = captured.pop(layer)
            # DDP averages gradients over processes; the sum over all tokens is wanted.
            with self.compute_loss_context_manager():
                loss = self.layer_loss(model, layer, x, y, mask) / tokens * self.args.world_size
            self.accelerator.backward(loss / len(layers))
            self._layer_losses[layer] = self._layer_losses[layer] + loss.detach()
            total += loss.detach() / len(layers)
        return total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds every layer's own loss where there are several, as `layer_8/loss`."""
        steps = self.state.global_step - self._layer_losses_since
        if "loss" in logs and len(self._layer_losses) > 1 and steps > 0:
            for layer, total in self._layer_losses.items():
                logs[f"layer_{layer}/loss"] = float(total) / steps
        if "loss" in logs:
            self._layer_losses = dict.fromkeys(self._layer_losses, torch.zeros((), device=self.args.device))
            self._layer_losses_since = self.state.global_step
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Per row: the sum of ‖ŷ−y‖²/‖y‖² of every layer (rows, layers), and the tokens that count (rows)."""
        inputs = self._prepare_inputs(inputs)
        mask = self.counted(inputs)
        sums = torch.zeros(len(mask), len(self.model.config.layers), device=mask.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for column, (layer, (x, y)) in enumerate(self.capture(inputs).items()):
                error = (model(x, layer=layer).output.float() - y.float()).square().sum(-1)
                squared_norm = y.float().square().sum(-1)
                sums[:, column] = (error / squared_norm).where(mask & (squared_norm > 0), 0.0).sum(-1)
        return None, sums, mask.sum(-1)

    def _start(self) -> None:
        most = max(self.model.config.layer(layer).num_experts for layer in self.model.config.layers)
        from_data = self.args.gate_initialization == "data"
        calibrations = self._calibrate(max(self.args.calibration_tokens, most if from_data else 0))
        if self.args.gate_initialization != "keep":
            initialize_decomposition(
                self.model,
                self.teacher,
                calibrations,
                self.args.gate_initialization,
                self.args.encoder_initialization,
                self.args.modulation_initialization,
                self.args.scale_activations,
            )


def normalised_errors(prediction: EvalPrediction) -> dict[str, float]:
    """NMSE of every layer over all rows: sums divided once. From `prediction_step`'s rows."""
    sums, tokens = torch.as_tensor(prediction.predictions).double(), torch.as_tensor(prediction.label_ids).double()
    errors = sums.reshape(len(tokens), -1).sum(0) / tokens.sum()
    return {f"nmse_{column}": float(error) for column, error in enumerate(errors)} | {"nmse": float(errors.mean())}

"""Layerwise distillation: train a decomposition to reproduce the MLPs of a frozen model.

A step: the model runs once on the token ids, only as far as the last layer needed; input and output of every
chosen MLP are captured on the way; then layer by layer the decomposition's loss is computed and propagated back,
so that the graph of only one layer is alive at a time. The Trainer's model is the decomposition alone: it alone is
wrapped, optimised, saved.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel
from transformers.trainer_utils import TrainOutput

from mxd.base.activation_cache import ActivationCache
from mxd.base.capture import capture_mlps
from mxd.base.masks import activation_mask, token_mask
from mxd.evaluation import normalised_error
from mxd.modeling_mxd import MxDModel, find_mlps, site_of

from .auxiliary_transcoder import PARAMETERS as AUXILIARY_PARAMETERS
from .auxiliary_transcoder import AuxiliaryTranscoders, FreshGradients
from .decomposition_trainer import DecompositionTrainer
from .distillation_arguments import DistillationArguments
from .initialization import check_encoder_init, init_decomposition


class DistillationTrainer(DecompositionTrainer):
    """Trains an `MxDModel` on the MLP inputs and outputs of a frozen model.

    Args:
        model: the decomposition.
        teacher: the model that it decomposes, of any kind; it is put into eval mode and its parameters are frozen,
            nothing else of it is changed, and it is not saved.
        args: a `DistillationArguments`.
        train_dataset, eval_dataset: rows with `input_ids` (and `attention_mask` where there is padding), or what else
            the teacher reads; then with a `data_collator` for it.
        **kwargs: as for `transformers.Trainer`.

    Raises:
        SurgeryError: when the teacher has no such layer, or one of other widths.
        ValueError: an encoder shall start from the pretrained MLP's and has another form or width.

    Example:
        >>> trainer = DistillationTrainer(mxd, teacher, args, train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    args: DistillationArguments
    model: MxDModel
    progress_name = "distil"
    _layer_losses_since: int | None

    def __init__(
        self,
        model: MxDModel,
        teacher: PreTrainedModel,
        args: DistillationArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        compute_metrics: Any = None,
        activations: ActivationCache | None = None,
        **kwargs: Any,
    ):
        self.activations = activations
        if activations is not None and train_dataset is None:
            train_dataset = activations
        model.record_base(teacher)
        found = find_mlps(teacher, **model.config.where)
        self.sites = [site_of(found, layer) for layer in model.config.layers]
        starts = args.encoder_init == "pretrained" and args.gate_init != "keep"
        for site in self.sites:
            site.check_fits(model.config.layer(site.layer))
            if starts and model.config.layer(site.layer).method == "mxd":
                check_encoder_init(model.config.layer(site.layer), site)
        if len(model.config.layers) > 1 and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # each backward uses one layer's parameters only
        super().__init__(
            model,
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics or partial(normalised_errors, layers=model.config.layers),
            **kwargs,
        )
        self.codes = self._make_codes()
        if len(self.codes) and self._optimizer_was_given:
            raise ValueError("an optimizer of your own does not step the sparse codes: set auxiliary_weight to 0")
        self.teacher = teacher.eval().requires_grad_(False)
        if getattr(teacher, "hf_device_map", None) is None:  # else accelerate has placed it
            self.teacher.to(args.device)
        self._restart_layer_losses()

    def _make_codes(self) -> AuxiliaryTranscoders:
        codes = AuxiliaryTranscoders(self.model, wanted=self.args.auxiliary_weight > 0)
        if len(codes) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("neither FSDP nor DeepSpeed trains a sparse code: set auxiliary_weight to 0")
        self.add_callback(FreshGradients(codes))
        return codes.to(self.args.device)

    def _set_signature_columns_if_needed(self) -> None:
        columns = list(inspect.signature(self.teacher.forward).parameters)
        # Of labels a causal model makes nothing but a loss; an encoder–decoder model makes its decoder's inputs.
        self._signature_columns = [
            name for name in columns if name != "labels" or self.teacher.config.is_encoder_decoder
        ]

    @property
    def language_model(self) -> PreTrainedModel:
        """The teacher."""
        return self.teacher

    def capture(self, inputs: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """{layer: (x, y)} of the teacher's MLPs for a batch; x (batch, tokens, I), y (batch, tokens, O)."""
        if self.activations is not None:
            recorded, dtype = self.activations(inputs, self.model.config.layers), next(self.teacher.parameters()).dtype
            device = self.args.device
            return {layer: (x.to(device, dtype), y.to(device, dtype)) for layer, (x, y) in recorded.items()}
        given: dict[str, Any] = {**inputs, **self.model.config.where}
        captured = capture_mlps(self.teacher, self.model.config.layers, **given)
        device = self.args.device
        return {layer: (x.to(device), y.to(device)) for layer, (x, y) in captured.items()}

    def loss_mask(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Which positions the loss is of, (batch, tokens) bool. What is no text, and what a layer meets several times,
        is counted by a forward pass of its own."""
        ids = inputs.get("input_ids")
        if ids is None or any(site.repeated for site in self.sites) or self.teacher.config.is_encoder_decoder:
            x, _ = next(iter(self.capture(self._prepare_inputs(dict(inputs))).values()))
            return self._mask(inputs, x)
        return token_mask(ids, inputs.get("attention_mask"))

    def _mask(self, inputs: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return activation_mask(inputs, x, decoder=self.model.config.of_decoder)

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
            divisor = _at_least(squared_norm, minimum_squared_norm)
        else:
            divisor = squared_norm.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return ((prediction - target).square().sum(-1) / divisor).sum()

    def _losses_with_code(
        self, model: nn.Module, layer: int, x: Tensor, y: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`_losses`, with the error of the layer's sparse code, if it has one, times its weight in the second."""
        code = self.codes.of_layer(layer)
        if code is None:
            return self._losses(model, layer, x, y, mask)
        with self.codes.reading(self.model):
            loss, rest = self._losses(model, layer, x, y, mask)
            coefficients = self.codes.coefficients.pop(layer)
        coded = code(coefficients, x)
        error = self.distillation_loss(coded, y, mask, self.args.loss_normalization, self.least_norm(layer))
        return loss, rest + self.args.auxiliary_weight * error

    def _losses(self, model: nn.Module, layer: int, x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the batch's tokens of the distillation loss, and of what is missing to the experts' share:

            λ max(0, τ − ē),  ē = mean_t min(1, ‖m̄ * Dᵀz_t + b − y_t‖² / max(‖y_t‖², m)),  m̄ = mean_t Cᵀa_t

        with τ = `min_mean_ablation_error`, λ = `mean_ablation_weight`. A dense encoder that starts at the MLP's own can
        do everything by itself with Cᵀa = 1, and by the error alone it would: this asks that the layer fails where it is
        not told which experts are active."""
        least, normalization = self.least_norm(layer), self.args.loss_normalization
        asked = self.args.min_mean_ablation_error * self.args.mean_ablation_weight > 0
        if not asked or self.model.config.layer(layer).method != "mxd" or not mask.any():
            loss = self.distillation_loss(model(x, layer=layer).output, y, mask, normalization, least)
            return loss, torch.zeros_like(loss)
        outputs = model(x, layer=layer, mean_over=mask)
        of_mean, target = outputs.output_of_mean[mask].float(), y[mask].float()
        squared_norm = _at_least(target.square().sum(-1), least)
        error = ((of_mean - target).square().sum(-1) / squared_norm).clamp_max(1).mean()
        missing = (
            self.args.mean_ablation_weight * len(target) * (self.args.min_mean_ablation_error - error).clamp_min(0)
        )
        return self.distillation_loss(outputs.output, y, mask, normalization, least), missing

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of every layer in turn; returns the mean loss of the layers, detached."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        tokens = self.loss_mask(inputs).sum() if num_items_in_batch is None else num_items_in_batch
        captured = self.capture(inputs)
        if self._layer_losses_since is None:
            self._layer_losses_since = self.state.global_step
        total = torch.zeros((), device=self.args.device)
        layers = list(captured)
        for layer in layers:
            x, y = captured.pop(layer)
            mask = self._mask(inputs, x)
            # DDP averages gradients over processes; the sum over all tokens is wanted.
            with self.compute_loss_context_manager():
                sums = self._losses_with_code(model, layer, x, y, mask)
                loss, rest = (part / tokens * self.args.world_size for part in sums)
            self.accelerator.backward((loss + rest + self.router_loss(layer, x, mask)) / len(layers))
            self._layer_losses[layer] = self._layer_losses[layer] + loss.detach()
            total += loss.detach() / len(layers)
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            self.codes.average_gradients(self.args.world_size)
        return total

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float:
        # Stock clips what is in the model: the sparse codes are in none.
        if not len(self.codes):
            return super()._clip_grad_norm(model)
        parameters = [*model.parameters(), *self.codes.parameters()]
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        # Stock clips to infinity for it, which reads and writes every gradient at every step.
        if grad_norm is not None or self.args.world_size > 1:
            return super()._get_grad_norm(model, grad_norm)
        if (self.state.global_step + 1) % self.state.logging_steps:
            return None  # nobody reads it
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `DecompositionTrainer.train`."""
        self._restart_layer_losses()
        # For all steps at once: with another hook at every step a compiled layer would be compiled anew.
        with self.codes.reading(self.model):
            return super().train(*args, **kwargs)

    def trained_modules(self, layer: int) -> dict[str, nn.Module]:
        """The layer itself, and its sparse code."""
        code = self.codes.of_layer(layer)
        return super().trained_modules(layer) | ({} if code is None else {AUXILIARY_PARAMETERS: code})

    def save_beside(self, checkpoint: Path) -> None:
        """As `DecompositionTrainer.save_beside`, and the sparse codes."""
        super().save_beside(checkpoint)
        self.codes.save(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.codes.load(Path(resume_from_checkpoint))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds every layer's own loss where there are several, as `layer_8/loss`."""
        step = self.state.global_step
        steps = 0 if self._layer_losses_since is None else step - self._layer_losses_since
        if "loss" in logs and len(self._layer_losses) > 1 and steps > 0:
            for layer, total in self._layer_losses.items():
                logs[f"layer_{layer}/loss"] = float(self.accelerator.reduce(total, "mean")) / steps
        if "loss" in logs:
            self._restart_layer_losses(step)
        super().log(logs, *args, **kwargs)

    def _restart_layer_losses(self, step: int | None = None) -> None:
        """Sum every layer's losses from this step; by default the next one, in a resumed training not the first."""
        self._layer_losses = dict.fromkeys(self.model.config.layers, torch.zeros((), device=self.args.device))
        self._layer_losses_since = step

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Per row and layer: the sum of the tokens' normalised errors, and how many have one: both (rows, layers)."""
        inputs = self._prepare_inputs(inputs)
        rows = len(next(iter(inputs.values())))
        sums: list[Tensor] = []
        counts: list[Tensor] = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for layer, (x, y) in self.capture(inputs).items():
                counted = self._mask(inputs, x) & y.any(-1)  # where y = 0 there is none
                errors = normalised_error(model(x, layer=layer).output, y).where(counted, 0.0)
                # A layer that runs several times has all its runs, one after another.
                sums.append(errors.reshape(-1, rows, x.shape[1]).sum((0, 2)))
                counts.append(counted.reshape(-1, rows, x.shape[1]).sum((0, 2)))
        return None, torch.stack(sums, dim=1), torch.stack(counts, dim=1)

    def _start(self) -> None:
        most = max(self.model.config.layer(layer).num_experts for layer in self.model.config.layers)
        from_data = self.args.gate_init == "data"
        calibrations = self._calibrate(max(self.args.calibration_tokens, most if from_data else 0))
        if self.args.gate_init != "keep":
            init_decomposition(
                self.model,
                self.teacher,
                calibrations,
                gate_init=self.args.gate_init,
                encoder_init=self.args.encoder_init,
                modulation_init=self.args.modulation_init,
                decoder_init=self.args.decoder_init,
                scale_activations=self.args.scale_activations,
                seed=self.args.seed,
            )
            self.codes.restart()


def _at_least(squared_norm: Tensor, minimum: float) -> Tensor:
    return squared_norm.clamp_min(max(minimum, torch.finfo(torch.float32).tiny))


def normalised_errors(prediction: EvalPrediction, layers: Sequence[int]) -> dict[str, float]:
    """NMSE of every layer over all rows, as `layer_8/nmse`: that of `mxd.evaluation.ErrorSums`; their mean is the loss
    too, by which stock chooses the best checkpoint. From `prediction_step`'s rows."""
    sums, counts = (torch.as_tensor(part).double().sum(0) for part in prediction)
    errors = sums / counts
    mean = float(errors.mean())
    of_layers = {f"layer_{layer}/nmse": float(error) for layer, error in zip(layers, errors, strict=True)}
    return of_layers | {"nmse": mean, "loss": mean}

"""Layerwise distillation: train a decomposition to reproduce the MLPs of a frozen model.

A step: the model runs once on the token ids, only as far as the last layer needed; input and output of every
chosen MLP are captured on the way; then layer by layer the decomposition's loss is computed and propagated back,
so that the graph of only one layer is alive at a time. The Trainer's model is the decomposition alone: it alone is
wrapped, optimised, saved.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, ProgressCallback, Trainer
from transformers.trainer_utils import TrainOutput

from evaluation_mxd import token_mask
from evaluation_mxd.expert_use import measure_expert_statistics
from hub_cards import build_card, update_card
from modeling_mxd import MxDModel, capture_mlps, find_mlp

from .callbacks import InterruptCallback, TokenProgressCallback
from .data import CausalCollator
from .distillation_arguments import DistillationArguments
from .initialization import ActivationScales, calibrate, initialize_decomposition, parameter_scales
from .router import fit_router, router_loss
from .row_adamw import RowAdamW

logger = logging.getLogger(__name__)

SCALES_NAME = "activation_scales.json"
ARGUMENTS_NAME = "training_arguments.json"
# A router learns from one token in so many, for which every expert is scored.
ROUTER_TOKENS = 16
# Folders of this machine, and what only it needs: the file is pushed along with `push_to_hub=True`.
_LOCAL_ARGUMENTS = ("output_dir", "logging_dir", "resume_from_checkpoint", "run_name", "hub_token")


class DistillationTrainer(Trainer):
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
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: MxDModel,
        teacher: PreTrainedModel,
        args: DistillationArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        compute_metrics: Any = None,
        **kwargs: Any,
    ):
        if args.n_gpu > 1:
            raise ValueError("DataParallel is not supported: start one process per GPU with torchrun")
        for layer in model.config.layers:
            find_mlp(teacher, layer).check_fits(model.config.layer(layer))
            if model.config.layer(layer).num_expert_groups is not None and args.world_size > 1:
                raise ValueError(f"layer {layer} has a router, which trains in one process, not in {args.world_size}")
        model.record_base(teacher)
        if len(model.config.layers) > 1 and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # each backward uses one layer's parameters only
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator or CausalCollator(),
            compute_metrics=compute_metrics or normalised_errors,
            **kwargs,
        )
        self.teacher = teacher.eval().requires_grad_(False).to(args.device)
        self.scales: dict[int, ActivationScales] = {}
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._layer_losses = dict.fromkeys(model.config.layers, torch.zeros((), device=args.device))
        self._layer_losses_since = 0
        self._interrupt = InterruptCallback()
        self.add_callback(self._interrupt)

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        # The model's forward takes hidden states; the teacher is what reads the rows.
        self._signature_columns = ["input_ids", "attention_mask"]

    def capture(self, inputs: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """{layer: (x, y)} of the teacher's MLPs for a batch of token ids; x (batch, tokens, I), y (…, O)."""
        return capture_mlps(self.teacher, self.model.config.layers, inputs["input_ids"], inputs.get("attention_mask"))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        if not batch_samples:
            return None
        count = sum(
            token_mask(batch["input_ids"], batch.get("attention_mask")).sum().to(device) for batch in batch_samples
        )
        assert isinstance(count, Tensor)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    # Loss

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
        mask = token_mask(inputs["input_ids"], inputs.get("attention_mask"))
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
        mask = token_mask(inputs["input_ids"], inputs.get("attention_mask"))
        tokens = mask.sum() if num_items_in_batch is None else num_items_in_batch
        captured = self.capture(inputs)
        total = torch.zeros((), device=self.args.device)
        layers = list(captured)
        for layer in layers:
            x, y = captured.pop(layer)
            # DDP averages gradients over processes; the sum over all tokens is wanted.
            with self.compute_loss_context_manager():
                loss = self.layer_loss(model, layer, x, y, mask) / tokens * self.args.world_size
            self.accelerator.backward((loss + self._router_loss(layer, x, mask)) / len(layers))
            self._layer_losses[layer] = self._layer_losses[layer] + loss.detach()
            total += loss.detach() / len(layers)
        return total

    def _router_loss(self, layer: int, x: Tensor, mask: Tensor) -> Tensor | float:
        """`router.router_loss` of a part of the tokens, since it takes the exact gate; nothing else learns from it."""
        module = self.model.layer(layer)
        if module.router is None:
            return 0.0
        inputs = x[mask]
        return router_loss(module, inputs[self.state.global_step % ROUTER_TOKENS :: ROUTER_TOKENS])

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        # Stock clips to infinity for it, which reads and writes every gradient at every step.
        if grad_norm is not None or self.args.world_size > 1:
            return super()._get_grad_norm(model, grad_norm)
        if (self.state.global_step + 1) % self.state.logging_steps:
            return None  # nobody reads it
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in dense]))

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
        mask = token_mask(inputs["input_ids"], inputs.get("attention_mask"))
        sums = torch.zeros(len(mask), len(self.model.config.layers), device=mask.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for column, (layer, (x, y)) in enumerate(self.capture(inputs).items()):
                error = (model(x, layer=layer).output.float() - y.float()).square().sum(-1)
                squared_norm = y.float().square().sum(-1)
                sums[:, column] = (error / squared_norm).where(mask & (squared_norm > 0), 0.0).sum(-1)
        return None, sums, mask.sum(-1)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train; Ctrl-C finishes the step, saves a checkpoint and returns (then `interrupted` is true).

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last complete one in `output_dir`.
            **kwargs: as for `Trainer.train`.

        Raises:
            ValueError: when there is nothing to resume from, or no training data.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            self.scales = _read_scales(Path(str(resume_from_checkpoint)))
        else:
            self._initialize()
        self._use_token_progress()
        with self._interrupt.listening(), self._sparse_gradients():
            output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        if not self.interrupted:
            self._measure_experts()
        return output

    @contextmanager
    def _sparse_gradients(self) -> Iterator[None]:
        layers = [self.model.layer(layer) for layer in self.model.config.layers]
        for layer in layers:
            layer.sparse_gradients = self.args.sparse_optimizer
        try:
            yield
        finally:
            for layer in layers:
                layer.sparse_gradients = False

    @property
    def interrupted(self) -> bool:
        """Whether the last `train()` was ended by a signal."""
        return self._interrupt.interrupted

    def _training_batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches of the training data from its start, leaving the random state as it is."""
        with torch.random.fork_rng():
            for batch in self.get_train_dataloader():
                yield self._prepare_inputs(batch)

    def _initialize(self) -> None:
        layers = self.model.config.layers
        most = max(self.model.config.layer(layer).num_experts for layer in layers)
        wanted = max(self.args.calibration_tokens, most if self.args.gate_initialization == "data" else 0)
        logger.info("measuring the activations of %d training tokens", wanted)
        calibrations = calibrate(self.capture, self._training_batches(), wanted)
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
            for layer in layers:
                if self.model.layer(layer).router is not None:
                    fit_router(self.model.layer(layer), calibrations[layer].inputs, seed=self.args.seed)
        scales = [{layer: calibration.scales for layer, calibration in calibrations.items()}]
        # Weights are broadcast from process 0 by DDP; the scales must be the same everywhere too.
        self.scales = broadcast_object_list(scales)[0] if self.args.world_size > 1 else scales[0]

    def _measure_experts(self) -> None:
        rows = self.args.per_device_train_batch_size
        first = next(self._training_batches(), None)
        if first is None:
            return
        batches = -(-self.args.statistics_tokens // (rows * first["input_ids"].shape[1]))
        measure_expert_statistics(self.capture, self.model, islice(self._training_batches(), batches))

    def _use_token_progress(self) -> None:
        if self.args.disable_tqdm:
            return
        first = next(self._training_batches(), None)
        if first is None:
            raise ValueError("the training data is empty")
        self.remove_callback(ProgressCallback)
        self.remove_callback(TokenProgressCallback)
        accumulated = self.args.gradient_accumulation_steps * self.args.world_size
        self.add_callback(TokenProgressCallback(first["input_ids"].numel() * accumulated))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Our card instead of the stock one; what a person wrote into an earlier one is kept."""
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        card, path = build_card(folder, repo_id=self.hub_model_id), folder / "README.md"
        if path.is_file():
            card = update_card(path.read_text(encoding="utf-8"), card)
        card.save(path)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group per learning rate: see `initialization.parameter_scales` and the arguments' factors for gate and
        modulations. Weight decay as in `args`."""
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if self.args.sparse_optimizer:
                optimizer_class = RowAdamW
                kwargs.pop("fused", None)
            # The plain group first, since its rate is the one that is logged.
            groups: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, 1.0): []}
            for layer in self.model.config.layers:
                module = self.model.layer(layer)
                measured = self.scales.get(layer) if self.args.scale_activations else None
                scales = parameter_scales(module, measured or ActivationScales())
                for name, parameter in module.named_parameters():
                    if parameter.requires_grad:
                        factor = self.args.learning_rate_factor(name)
                        groups.setdefault((scales[name], factor), []).append(parameter)
            self.optimizer = optimizer_class(
                [_parameter_group(parameters, *key, kwargs) for key, parameters in groups.items() if parameters],
                weight_decay=self.args.weight_decay,
                **kwargs,
            )
        return self.optimizer

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Stock pickles its arguments beside the weights; a decomposition's folder holds nothing to unpickle.
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
        arguments = self.args.to_sanitized_dict()
        arguments = {name: value for name, value in arguments.items() if name not in _LOCAL_ARGUMENTS}
        (folder / ARGUMENTS_NAME).write_text(json.dumps(arguments, indent=2) + "\n")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            scales = {str(layer): vars(value) for layer, value in self.scales.items()}
            (folder / SCALES_NAME).write_text(json.dumps(scales, indent=2) + "\n")
        super()._save_checkpoint(model, trial)


def _parameter_group(
    parameters: list[nn.Parameter], scale: float, factor: float, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "lr": kwargs["lr"] * scale * factor}
    if "eps" in kwargs:
        group["eps"] = kwargs["eps"] / scale
    return group


def _read_scales(checkpoint: Path) -> dict[int, ActivationScales]:
    path = checkpoint / SCALES_NAME
    if not path.is_file():
        raise ValueError(f"{checkpoint} is no checkpoint of a distillation: it has no {SCALES_NAME}")
    return {int(layer): ActivationScales(**value) for layer, value in json.loads(path.read_text()).items()}


def last_complete_checkpoint(output_dir: str | os.PathLike[str] | None) -> str:
    """The newest checkpoint in a folder whose writing was finished (its trainer state is written last).

    Raises:
        ValueError: when there is none.
    """
    folders = Path(output_dir or ".").glob("checkpoint-*")
    complete = [folder for folder in folders if (folder / "trainer_state.json").is_file()]
    if not complete:
        raise ValueError(f"no complete checkpoint in {output_dir} to resume from")
    return str(max(complete, key=lambda folder: int(folder.name.rpartition("-")[2])))


def normalised_errors(prediction: EvalPrediction) -> dict[str, float]:
    """NMSE of every layer over all rows: sums divided once. From `prediction_step`'s rows."""
    sums, tokens = torch.as_tensor(prediction.predictions).double(), torch.as_tensor(prediction.label_ids).double()
    errors = sums.reshape(len(tokens), -1).sum(0) / tokens.sum()
    return {f"nmse_{column}": float(error) for column, error in enumerate(errors)} | {"nmse": float(errors.mean())}

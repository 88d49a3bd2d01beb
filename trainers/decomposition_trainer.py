"""Base of the trainers: masked losses, learning rates per kind of parameter, checkpoints that are decompositions.

`PRIVATE_OVERRIDES` lists the private methods of `transformers.Trainer` that the trainers override.
"""

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedModel, ProgressCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from mxd.base.allocation import freed_memory_kept
from mxd.base.forward import padding_last
from mxd.base.masks import token_mask
from mxd.data.packing import CausalCollator
from mxd.evaluation.expert_use import measure_expert_statistics
from mxd.evaluation.faithfulness import EVALUATION_NAME
from mxd.modeling_mxd import MxDModel

from .callbacks import DivergenceCallback, InterruptCallback, TokenProgressCallback
from .decomposition_arguments import DecompositionArguments
from .hub_pushes import HubPushes
from .initialization import ActivationScales, Calibration, calibrate, parameter_scales
from .router import router_loss

logger = logging.getLogger(__name__)

PRIVATE_OVERRIDES = {
    "_save": "transformers pickles its arguments beside the weights; a decomposition's folder holds no pickle",
    "_get_grad_norm": "transformers clips to infinity at every step, which reads and writes every gradient",
    "_push_from_checkpoint": "transformers uploads `output_dir` with pickled arguments, the token among them",
}
"""Overridden private methods of `transformers.Trainer`, and why. A test compares this list with the classes."""

# A router learns from one token in so many, since every expert is scored for it.
ROUTER_TOKENS = 16
_OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "labels"}  # one value for every token
SCALES_NAME = "activation_scales.json"
ARGUMENTS_NAME = "training_arguments.json"
# Left out of the file, which `push_to_hub=True` pushes: folders of this machine, and secrets.
_LOCAL_ARGUMENTS = ("output_dir", "logging_dir", "resume_from_checkpoint", "run_name", "hub_token")


class DivergenceError(ValueError):
    """The loss or a weight is not finite. Training was stopped, and these weights were not saved."""


class DecompositionTrainer(HubPushes):
    """Base of `DistillationTrainer` and `FinetuningTrainer`, which define `capture` and the loss.

    Args:
        model: Model that the Trainer wraps, optimises and saves.
        decomposition: `MxDModel` whose parameters are trained: `model` itself, or a part of it.
        args: A `DecompositionArguments`.
        train_dataset, eval_dataset: Rows with `input_ids` (and `attention_mask` if there is padding).
        **kwargs: As for `transformers.Trainer`.

    Raises:
        ValueError: A layer has a router and there are several processes.
    """

    args: DecompositionArguments
    optimizer: torch.optim.Optimizer | None
    progress_name = "train"

    def __init__(
        self,
        model: PreTrainedModel,
        decomposition: MxDModel,
        args: DecompositionArguments,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        if args.n_gpu > 1:
            logger.warning("using one of %d GPUs: to train on all, start one process per GPU with torchrun", args.n_gpu)
            args._n_gpu = 1  # a decomposition does not run under DataParallel
        self.decomposition = decomposition
        layers = decomposition.config.layers
        self.routed_layers = [layer for layer in layers if decomposition.layer(layer).router is not None]
        if self.routed_layers and args.world_size > 1:
            raise ValueError(
                f"layer {self.routed_layers[0]} has a router, which trains in one process, not in {args.world_size}"
            )
        super().__init__(model=model, args=args, data_collator=data_collator or CausalCollator(), **kwargs)
        self._optimizer_was_given = self.optimizer is not None
        self.scales: dict[int, ActivationScales] = {}
        # `compute_loss` divides by `num_items_in_batch`, the tokens of all micro-batches of a step.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # updated at every step
        self._running_losses: dict[str, Tensor] = {}
        self._running_since = 0
        self._interrupt = InterruptCallback()
        self.add_callback(self._interrupt)
        self.add_callback(DivergenceCallback(self.check_losses, self.check_weights))  # after it: it sees `should_save`

    # Data

    @property
    def language_model(self) -> PreTrainedModel:
        """The model whose MLPs are decomposed."""
        return self.model

    def capture(self, inputs: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return {layer: (x, y)} of the untouched model's MLPs for a batch; x (batch, tokens, I), y (…, O)."""
        raise NotImplementedError

    def loss_mask(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the positions that the loss includes; bool, of any shape."""
        return token_mask(inputs["input_ids"], inputs.get("attention_mask"))

    def prepare_batch(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Move a batch to the device, and the padding of text to the right, as evaluation does."""
        prepared: dict[str, Any] = self._prepare_inputs(dict(inputs))
        of_text = {"input_ids", "attention_mask"} <= set(prepared) <= _OF_TOKENS
        if not of_text or self.language_model.config.is_encoder_decoder:
            return prepared
        order = padding_last(prepared["attention_mask"])
        return {name: value.gather(-1, order) for name, value in prepared.items()}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the micro-batches of a step, and how many positions of all processes their loss includes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        count = torch.stack([self.loss_mask(batch).sum().to(device) for batch in batches]).sum()
        return batches, self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def _training_batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield batches of the training data from its start, without a change of the random state."""
        with torch.random.fork_rng(devices=[]):  # data are drawn on the CPU
            for batch in self.get_train_dataloader():
                yield self.prepare_batch(batch)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train. Ctrl-C finishes the step, saves a checkpoint and returns; `interrupted` is then true.

        Args:
            resume_from_checkpoint: Folder of a checkpoint, or True for the last complete one in `output_dir`.
            **kwargs: As for `Trainer.train`.

        Raises:
            ValueError: There is nothing to resume from, or no training data.
            DivergenceError: The loss or a weight is not finite; earlier checkpoints are kept.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        self._restart_running_losses()
        if resume_from_checkpoint:
            checkpoint = Path(str(resume_from_checkpoint))
            self.load_training_state(checkpoint)
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if 0 < self.args.max_steps <= state.global_step:
                return self._load_finished(checkpoint, state)
        else:
            if not self._optimizer_was_given:
                self.optimizer = self.lr_scheduler = None  # those of an earlier training
            self.init_weights()
        self._use_token_progress()
        on_cpu = self.args.device.type == "cpu"
        with self._interrupt.listening(self.args), freed_memory_kept() if on_cpu else nullcontext():
            try:
                output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
            finally:
                _without_autocast(self.model)
        if not self.interrupted:
            self.measure_experts()
        return output

    def _load_finished(self, checkpoint: Path, state: TrainerState) -> TrainOutput:
        """Load a checkpoint of the last step, from which `Trainer.train` would take another step."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        self._interrupt.interrupted = False
        self.measure_experts()
        return TrainOutput(state.global_step, math.nan, {})

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the last `train()`."""
        return self._interrupt.interrupted

    def init_weights(self) -> None:
        """Measure the activations and initialise what is trained, before the first step of a new training."""
        self.calibrate(self.args.calibration_tokens)

    def calibrate(self, tokens: int) -> dict[int, Calibration]:
        """Measure the layers' activations on the training data, and set `scales`."""
        logger.info("measuring the activations of %d training tokens", tokens)
        decoder = self.decomposition.config.of_decoder
        calibrations = calibrate(self.capture, self._training_batches(), tokens, decoder)
        scales = [{layer: calibration.scales for layer, calibration in calibrations.items()}]
        # DDP broadcasts the weights of process 0; the scales must be the same everywhere too.
        self.scales = broadcast_object_list(scales)[0] if self.args.world_size > 1 else scales[0]
        return calibrations

    def least_norm(self, layer: int) -> float:
        """Return the lower bound on the squared norm ‖y‖² of a token's output: see `minimum_relative_norm`."""
        return self.args.minimum_relative_norm * self.scales[layer].output_norm if layer in self.scales else 0.0

    def measure_experts(self) -> None:
        """Measure on training data how often and how strongly each expert is active, for the layers' buffers."""
        first = next(self._training_batches(), None)
        if first is None:
            return
        batches = -(-self.args.statistics_tokens // self.loss_mask(first).numel())
        measure_expert_statistics(self.capture, self.decomposition, islice(self._training_batches(), batches))

    def _use_token_progress(self) -> None:
        if self.args.disable_tqdm:
            return
        first = next(self._training_batches(), None)
        if first is None:
            raise ValueError("the training data is empty")
        self.remove_callback(ProgressCallback)
        self.remove_callback(TokenProgressCallback)
        accumulated = self.args.gradient_accumulation_steps * self.args.world_size
        self.add_callback(TokenProgressCallback(self.loss_mask(first).numel() * accumulated, self.progress_name))

    def trained_modules(self, layer: int) -> dict[str, nn.Module]:
        """Return the trained modules of a layer by the prefix of their parameters' names: the layer itself."""
        return {"": self.decomposition.layer(layer)}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with one group per learning rate: see `initialization.parameter_scales`, and the
        arguments' factors for gate and modulations. All parameters decay as in `args`."""
        if self.optimizer is None:
            optimizer_class, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, self.decomposition
            )
            kwargs = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay, **kwargs}
            # The plain group first, since its rate is the one that is logged.
            groups: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, 1.0): []}
            for layer in self.decomposition.config.layers:
                measured = self.scales.get(layer) if self.args.scale_activations else None
                for prefix, module in self.trained_modules(layer).items():
                    scales = parameter_scales(module, measured or ActivationScales())
                    for name, parameter in module.named_parameters():
                        if parameter.requires_grad:
                            factor = self.args.learning_rate_factor(prefix + name)
                            groups.setdefault((scales[name], factor), []).append(parameter)
            self.optimizer = optimizer_class(
                [_parameter_group(parameters, *key, kwargs) for key, parameters in groups.items() if parameters],
                **kwargs,
            )
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward on a micro-batch; returns its part of the step's mean loss, detached."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.add_losses({"loss": loss})
        return loss

    def router_loss(self, layer: int, x: Tensor, mask: Tensor) -> Tensor | float:
        """Return `router.router_loss` of some of the tokens in `mask`; 0 for a layer without a router.

        Only the router gets gradients from it.
        """
        module = self.decomposition.layer(layer)
        if module.router is None:
            return 0.0
        loss = router_loss(module, x[mask][self.state.global_step % ROUTER_TOKENS :: ROUTER_TOKENS])
        return loss / self.current_gradient_accumulation_steps  # a mean, unlike the other losses

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        if grad_norm is not None or self.args.world_size > 1:
            return super()._get_grad_norm(model, grad_norm)
        if (self.state.global_step + 1) % self.state.logging_steps:
            return None  # it is not logged
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))

    # Losses since the last log

    def add_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's losses, by the names under which their means are logged."""
        if not self._running_losses:
            self._running_since = self.state.global_step
        for name, loss in losses.items():
            self._running_losses[name] = self._running_losses.get(name, 0) + loss.detach()

    def _restart_running_losses(self) -> None:
        self._running_losses = {}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; beside the loss also each of several `add_losses`, such as `layer_8/loss`."""
        steps = self.state.global_step - self._running_since
        if "loss" in logs and steps > 0:
            for name, total in self._running_losses.items():
                if name not in logs:
                    logs[name] = float(self.accelerator.reduce(total, "mean")) / steps
            self._restart_running_losses()
        super().log(logs, *args, **kwargs)

    def check_losses(self) -> None:
        """Raise a DivergenceError, in all processes, if a loss since the last log was not finite."""
        if not self._running_losses or self.args.logging_nan_inf_filter:
            return
        total = torch.stack([*self._running_losses.values()]).sum()  # not finite if one of its terms is not
        if not self.accelerator.gather(total).isfinite().all():
            first, last = self._running_since + 1, self.state.global_step
            self._diverged(f"the loss of the steps {first} to {last} is not finite")

    def check_weights(self) -> None:
        """Raise a DivergenceError if a weight is not finite, as after a step whose loss was the last finite one."""
        for name, parameter in self.decomposition.named_parameters():
            if not parameter.detach().sum(dtype=torch.float32).isfinite():  # a sum needs no memory
                self._diverged(f"{name} is not finite after step {self.state.global_step}")

    def _diverged(self, what: str) -> None:
        raise DivergenceError(
            f"the training diverged: {what}. Start again with a lower learning rate (--learning-rate, learning_rate; "
            f"it was {self.args.learning_rate}), and with bfloat16 if the model runs in float16. Earlier checkpoints "
            f"are kept in {self.args.output_dir}"
        )

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the decomposition and the training arguments.

        Raises:
            DivergenceError: A weight is not finite.
        """
        self.check_weights()
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            self.save_training_state(folder)
        evaluation = folder / EVALUATION_NAME
        before = _weights_digest(folder) if evaluation.is_file() else None
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=self.saved_weights(state_dict))
        if before is not None and _weights_digest(folder) != before:
            evaluation.unlink()  # it measured the weights that were there
        arguments = self.args.to_sanitized_dict()
        arguments = {name: value for name, value in arguments.items() if name not in _LOCAL_ARGUMENTS}
        (folder / ARGUMENTS_NAME).write_text(json.dumps(arguments, indent=2) + "\n")

    def saved_weights(self, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the weights to save, given those that the Trainer gathered; None for the model's own."""
        return state_dict

    def save_training_state(self, checkpoint: Path) -> None:
        """Write to a checkpoint's folder what a resumed training needs beyond the Trainer's own files."""
        scales = {str(layer): vars(value) for layer, value in self.scales.items()}
        (checkpoint / SCALES_NAME).write_text(json.dumps(scales, indent=2) + "\n")

    def load_training_state(self, checkpoint: Path) -> None:
        """Read what `save_training_state` wrote.

        Raises:
            ValueError: The checkpoint is not one of a decomposition's training.
        """
        path = checkpoint / SCALES_NAME
        if not path.is_file():
            raise ValueError(f"{checkpoint} is no checkpoint of a decomposition's training: it has no {SCALES_NAME}")
        self.scales = {int(layer): ActivationScales(**value) for layer, value in json.loads(path.read_text()).items()}


def _weights_digest(folder: Path) -> str:
    digest = hashlib.blake2b()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def _without_autocast(model: nn.Module) -> None:
    """Remove the autocast that accelerate left on a model's forward, which would apply to later evaluations.

    Another training puts it back.
    """
    original = vars(model).pop("_original_forward", None)
    if original is None:
        return
    if getattr(original, "__func__", None) is type(model).forward:
        del model.forward
    else:
        model.forward = original
    model._is_accelerate_prepared = False  # type: ignore[assignment]


def _parameter_group(
    parameters: list[nn.Parameter], scale: float, factor: float, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "lr": kwargs["lr"] * scale * factor}
    group["weight_decay"] = kwargs["weight_decay"] / scale  # it is multiplied by the rate
    if "eps" in kwargs:
        group["eps"] = kwargs["eps"] / scale
    return group


def last_complete_checkpoint(output_dir: str | os.PathLike[str] | None) -> str:
    """Return the newest checkpoint in a folder that was written completely (its trainer state is written last).

    Raises:
        ValueError: There is none.
    """
    steps = {}
    for folder in Path(output_dir or ".").glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")  # a user's copy may be called checkpoint-best
        if re.fullmatch(r"[0-9]+", number) and (folder / TRAINER_STATE_NAME).is_file():
            steps[int(number)] = folder
    if not steps:
        raise ValueError(f"no complete checkpoint in {output_dir} to resume from: start again")
    return str(steps[max(steps)])

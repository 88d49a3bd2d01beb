"""Base of the trainers: masked losses, learning rates per kind of parameter, checkpoints that are decompositions.

`PRIVATE_OVERRIDES` lists the private methods of `transformers.Trainer` that the trainers override.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProgressCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from mxd.base.allocation import freed_memory_kept
from mxd.base.forward import padding_last
from mxd.base.masks import token_mask
from mxd.base.progress import progress_bar
from mxd.data.packing import CausalCollator
from mxd.evaluation.expert_use import measure_expert_statistics
from mxd.experts.directions import carried_directions
from mxd.modeling_mxd import MxDModel

from .callbacks import InterruptCallback, TokenProgressCallback
from .checkpoints import last_complete_checkpoint, write_decomposition
from .decomposition_arguments import DecompositionArguments
from .initialization import ActivationScales, Calibration, calibrate, parameter_group, parameter_scales
from .process_sums import sum_over_processes
from .router import router_loss
from .row_reading import DEFAULT_TOKENS, RowReading
from .running_losses import DivergenceError, RunningLosses

logger = logging.getLogger(__name__)

PRIVATE_OVERRIDES = {
    "_save": "transformers pickles its arguments beside the weights; a decomposition's folder holds no pickle",
    "_save_checkpoint": "transformers writes a checkpoint in its place, where a kill leaves half of it",
    "_get_output_dir": "a checkpoint is written elsewhere, and then renamed",
    "_get_grad_norm": "transformers clips to infinity at every step, which reads and writes every gradient",
    "_push_from_checkpoint": "transformers uploads `output_dir` with pickled arguments, the token among them",
}
"""Overridden private methods of `transformers.Trainer`, and why. A test compares this list with the classes."""

# Defaults of `calibration_tokens` and `statistics_tokens` for a training of as many tokens or more.
CALIBRATION_TOKENS, STATISTICS_TOKENS = 32768, DEFAULT_TOKENS
# A router learns from one token in so many, since every expert is scored for it.
ROUTER_TOKENS = 16
_OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "labels"}  # columns with one value per token
SCALES_NAME = "activation_scales.json"


class DecompositionTrainer(RowReading):
    """Base of `DistillationTrainer` and `FinetuningTrainer`, which define `capture` and the loss.

    `decomposition`, whose parameters are trained, is `model` itself or a part of it.
    """

    args: DecompositionArguments
    optimizer: torch.optim.Optimizer | None
    language_model: PreTrainedModel
    """The model whose MLPs are decomposed."""
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
            logger.warning("using one of %d GPUs: to use all, start one process per GPU with torchrun", args.n_gpu)
            args._n_gpu = 1  # a decomposition does not run under DataParallel
        self.decomposition = decomposition
        layers = decomposition.config.layers
        self.routed_layers = [layer for layer in layers if decomposition.layer(layer).router is not None]
        super().__init__(model=model, args=args, data_collator=data_collator or CausalCollator(), **kwargs)
        self._optimizer_was_given = self.optimizer is not None
        self.scales: dict[int, ActivationScales] = {}
        # `compute_loss` divides by `num_items_in_batch`, the tokens of all micro-batches of a step.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # updated at every step
        self.losses = RunningLosses()
        self._interrupt = InterruptCallback()
        self.add_callback(self._interrupt)

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
        self.losses.add_batch(self.state.global_step + 1, batches[0])
        count = torch.stack([self.count_positions(batch).to(device) for batch in batches]).sum()
        return batches, self.accelerator.gather(count).sum().clamp_min(1)  # the losses of no position are 0

    def count_positions(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return how many positions of a batch the loss includes."""
        return self.loss_mask(inputs).sum()

    def batch_of_all(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Prepare a batch, and join to it the rows of the other processes, in the order in which one process has them.

        Every process calibrates and measures on the same rows, so that all initialise alike.
        """
        batch = self.prepare_batch(inputs)
        if self.args.world_size > 1:
            batch = self.accelerator.gather(self.accelerator.pad_across_processes(batch, dim=1))
        return batch

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train. Ctrl-C finishes the step, saves a checkpoint and returns; `interrupted` is then true.

        An exception, such as that of a stream, is raised again after a checkpoint of the last whole step was saved.

        Args:
            resume_from_checkpoint: Folder of a checkpoint, or True for the last complete one in `output_dir`.

        Raises:
            ValueError: There is nothing to resume from, or no training data.
            DivergenceError: The loss or a weight is not finite; earlier checkpoints are kept.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        self.losses.reset()
        checkpoint = Path(str(resume_from_checkpoint)) if resume_from_checkpoint else None
        self.start_rows(checkpoint)
        self._interrupt.epochs_before = 0.0
        if checkpoint is not None:
            self.load_training_state(checkpoint)
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if self.reads_on:
                self._interrupt.epochs_before = state.epoch or 0.0
            if 0 < self.args.max_steps <= state.global_step:
                return self._load_finished(checkpoint, state)
        else:
            if not self._optimizer_was_given:
                self.optimizer = self.lr_scheduler = None  # those of an earlier training
            self.init_weights()
        self._use_token_progress()
        skips_no_data = self.args.ignore_data_skip
        self.args.ignore_data_skip = skips_no_data or self.reads_on
        try:
            with self._interrupt.listening(self.args), self.stepping():
                try:
                    output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
                finally:
                    self.args.ignore_data_skip = skips_no_data
                    _without_autocast(self.model)
            self.check_weights()
            if not self.interrupted:
                self.measure_experts()
        except Exception as error:
            if not isinstance(error, DivergenceError):
                self._interrupt.save_after_failure(self)
            raise
        return output

    def stepping(self) -> AbstractContextManager[None]:
        """Prepare for the steps of a training inside the block."""
        return freed_memory_kept() if self.args.device.type == "cpu" else nullcontext()

    @property
    def saved_step(self) -> int:
        """Step of the last checkpoint that `train()` saved or began from; 0 if there is none."""
        return self._interrupt.saved_step or 0

    def _load_finished(self, checkpoint: Path, state: TrainerState) -> TrainOutput:
        """Load a checkpoint of the last step, from which `Trainer.train` would take another step."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        self._interrupt.signal, self._interrupt.saved_step = 0, state.global_step
        self.measure_experts()
        return TrainOutput(state.global_step, math.nan, {})

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the last `train()`."""
        return self._interrupt.interrupted

    @property
    def signal(self) -> int:
        """Number of the signal that ended the last `train()`, in any process; 0 if none did."""
        return self._interrupt.signal

    def init_weights(self) -> None:
        """Calibrate and initialise before the first step of a new training."""
        self.calibrate(self.calibration_tokens())

    def calibration_tokens(self) -> int:
        """Return the number of tokens to calibrate on."""
        return self._tokens_to_measure(self.args.calibration_tokens, CALIBRATION_TOKENS)

    def calibrate(self, tokens: int) -> dict[int, Calibration]:
        """Measure the activations on the training data, and set `scales`."""
        of_decoder, show = self.decomposition.config.of_decoder, self.shows_progress
        calibrations = calibrate(self.capture, self.training_batches(), tokens, of_decoder, show)
        self.scales = {layer: calibration.scales for layer, calibration in calibrations.items()}
        return calibrations

    def least_norm(self, layer: int) -> float:
        """Return the lower bound on ‖y‖² in errors divided by it: see `minimum_relative_norm`."""
        return self.args.minimum_relative_norm * self.scales[layer].output_norm if layer in self.scales else 0.0

    def measure_experts(self) -> None:
        """Measure on training data how often and how strongly each expert is active, and set buffers and directions."""
        tokens = self._tokens_to_measure(self.args.statistics_tokens, STATISTICS_TOKENS)
        count = -(-tokens // self._batch_tokens)
        batches = islice(self.training_batches(), count)
        bar = progress_bar(batches, desc="statistics", total=count, show=self.shows_progress)
        uses = measure_expert_statistics(self.capture, self.decomposition, bar)
        directions, source = self.expert_directions()
        if directions is not None:
            maxima = {layer: use.maximum for layer, use in uses.items()}
            self.decomposition.set_directions(maxima, directions, source)

    def expert_directions(self) -> tuple[dict[int, Tensor] | None, str]:
        """Return {layer: directions (N, O)} of the MxD layers and their origin; None if an MxD layer has none."""
        return carried_directions(self.decomposition)

    @property
    def shows_progress(self) -> bool:
        """Whether this process shows progress bars."""
        return not self.args.disable_tqdm and self.is_world_process_zero()

    def _tokens_to_measure(self, asked: int | None, default: int) -> int:
        """Return the tokens asked for, by default no more than the training takes."""
        steps = self.args.max_steps
        if asked is not None or steps <= 0:  # without a number of steps, the data end after an epoch
            return default if asked is None else asked
        return min(default, steps * self.args.gradient_accumulation_steps * self._batch_tokens)

    @cached_property
    def _batch_tokens(self) -> int:
        """Tokens of the first batch of all processes."""
        return self.loss_mask(next(self.training_batches())).numel()

    def _use_token_progress(self) -> None:
        if self.args.disable_tqdm:
            return
        tokens = self._batch_tokens * self.args.gradient_accumulation_steps
        for earlier in (ProgressCallback, TokenProgressCallback):
            self.remove_callback(earlier)
        self.add_callback(TokenProgressCallback(tokens, self.progress_name))

    def trained_modules(self, layer: int) -> dict[str, nn.Module]:
        """Return the trained modules of a layer by the prefix of their parameters' names."""
        return {"": self.decomposition.layer(layer)}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer with a group per learning rate, from `parameter_scales` and the arguments' factors."""
        if self.optimizer is None:
            chosen = self.optimizer_cls_and_kwargs
            optimizer_class, kwargs = chosen or self.get_optimizer_cls_and_kwargs(self.args, self.decomposition)
            kwargs = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay, **kwargs}
            # The plain group first, since its rate is the one that is logged.
            groups: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, 1.0): []}
            measured = self.scales if self.args.scale_activations else {}
            for layer in self.decomposition.config.layers:
                for prefix, module in self.trained_modules(layer).items():
                    scales = parameter_scales(module, measured.get(layer, ActivationScales()))
                    for name, parameter in module.named_parameters():
                        if parameter.requires_grad:
                            factor = self.args.learning_rate_factor(prefix + name)
                            groups.setdefault((scales[name], factor), []).append(parameter)
            built = [parameter_group(parameters, *key, kwargs) for key, parameters in groups.items() if parameters]
            self.optimizer = optimizer_class(built, **kwargs)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward on a micro-batch; returns its part of the step's mean loss, detached."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.add_losses({"loss": loss})
        return loss

    def router_loss(self, layer: int, x: Tensor, mask: Tensor) -> Tensor | float:
        """Return `router.router_loss` of some of the tokens in `mask`; 0 for a layer without a router."""
        module = self.decomposition.layer(layer)
        if module.router is None:
            return 0.0
        start, world = self.state.global_step, self.args.world_size
        if world > 1:  # the tokens of the processes before this one come first
            start -= int(self.accelerator.gather(mask.sum())[: self.args.process_index].sum())
        with torch.autocast(x.device.type, enabled=False):
            loss = router_loss(module, x[mask][start % ROUTER_TOKENS :: ROUTER_TOKENS], sum_over_processes)
        return world * loss / self.current_gradient_accumulation_steps  # it is a mean, the other losses are sums

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        if grad_norm is None and (self.state.global_step + 1) % self.state.logging_steps:
            return None  # it is not logged
        return super()._get_grad_norm(model, grad_norm)

    def add_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's losses, by the names under which their means are logged."""
        self.losses.add(self.state.global_step + 1, losses)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; beside the loss also each of several `add_losses`, such as `layer_8/loss`.

        Raises:
            DivergenceError: A loss since the last log was not finite, in any process.
        """
        if "loss" in logs:
            step, reduce = self.state.global_step, partial(self.accelerator.reduce, reduction="mean")
            for name, mean in self.losses.means(step, reduce).items():
                if not math.isfinite(mean) and not self.args.logging_nan_inf_filter:
                    self._diverged(f"the loss of the steps {self.losses.since + 1} to {step} is not finite")
                logs.setdefault(name, mean)
            self.losses.reset()
        super().log(logs, *args, **kwargs)

    def check_weights(self) -> None:
        """Raise a DivergenceError if a weight is not finite."""
        for name, parameter in self.decomposition.named_parameters():
            if not self.finite(parameter):
                self._diverged(f"{name} is not finite after step {self.state.global_step}")

    def finite(self, parameter: nn.Parameter) -> Tensor:
        """Return 1 if a parameter is finite, else 0."""
        return parameter.detach().sum(dtype=torch.float32).isfinite().int()  # a sum needs no memory

    def _diverged(self, what: str) -> None:
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
        rows *= 1 if self.args.accelerator_config.split_batches else self.args.world_size
        where = self.losses.first_bad(rows, lambda step: step if self._alone else self.accelerator.gather(step))
        raise DivergenceError(
            f"the training diverged: {what}{where}. Lower the learning rate (--learning-rate; it was "
            f"{self.args.learning_rate}), and use bfloat16 instead of float16. Earlier checkpoints are kept in "
            f"{self.args.output_dir}"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save decomposition and training arguments, or raise a DivergenceError."""
        self.check_weights()
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            self.save_training_state(folder)
        write_decomposition(self.accelerator.unwrap_model(self.model), folder, state_dict, self.args)

    def save_training_state(self, checkpoint: Path) -> None:
        """Write to a checkpoint's folder what a resumed training needs beyond the Trainer's own files."""
        scales = {str(layer): vars(value) for layer, value in self.scales.items()}
        (checkpoint / SCALES_NAME).write_text(json.dumps(scales, indent=2) + "\n")
        self.save_rows(checkpoint)

    def load_training_state(self, checkpoint: Path) -> None:
        """Read what `save_training_state` wrote; raise a ValueError if there is nothing."""
        path = checkpoint / SCALES_NAME
        if not path.is_file():
            raise ValueError(f"{checkpoint} has no {SCALES_NAME}: it is no checkpoint of a decomposition's training")
        self.scales = {int(layer): ActivationScales(**value) for layer, value in json.loads(path.read_text()).items()}


def _without_autocast(model: nn.Module) -> None:
    """Remove the autocast that accelerate left on a model's forward; another training puts it back."""
    attributes = vars(model)
    if (original := attributes.pop("_original_forward", None)) is None:
        return
    attributes["forward"] = original
    if original == MethodType(type(model).forward, model):
        del attributes["forward"]
    attributes["_is_accelerate_prepared"] = False

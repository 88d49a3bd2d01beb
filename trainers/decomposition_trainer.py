"""What every training of a decomposition has in common: counted tokens, a learning rate for each kind of parameter,
checkpoints that are decompositions, an interrupt that keeps one, measured experts, our model card."""

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
from transformers.trainer_utils import TrainOutput

from mxd.base.allocation import freed_memory_kept
from mxd.base.forward import padding_last
from mxd.base.masks import token_mask
from mxd.data.packing import CausalCollator
from mxd.evaluation.expert_use import measure_expert_statistics
from mxd.evaluation.faithfulness import EVALUATION_NAME
from mxd.modeling_mxd import MxDModel

from .callbacks import InterruptCallback, RankCallback, TokenProgressCallback
from .decomposition_arguments import DecompositionArguments
from .hub_pushes import HubPushes
from .initialization import ActivationScales, Calibration, calibrate, parameter_scales
from .router import router_loss

logger = logging.getLogger(__name__)

# A router learns from one token in so many, for which every expert is scored.
ROUTER_TOKENS = 16
_OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "labels"}  # one value for every token
SCALES_NAME = "activation_scales.json"
ARGUMENTS_NAME = "training_arguments.json"
# Folders of this machine, and what only it needs: the file is pushed along with `push_to_hub=True`.
_LOCAL_ARGUMENTS = ("output_dir", "logging_dir", "resume_from_checkpoint", "run_name", "hub_token")


class DivergenceError(ValueError):
    """Training was stopped since its loss, or what it trains, is no longer finite; nothing of that was saved."""


class DecompositionTrainer(HubPushes):
    """Base of `DistillationTrainer` and `FinetuningTrainer`, which give `capture` and the loss.

    Args:
        model: what the Trainer wraps, optimises and saves.
        decomposition: the `MxDModel` whose parameters are trained: `model` itself, or a part of it.
        args: a `DecompositionArguments`.
        train_dataset, eval_dataset: rows with `input_ids` (and `attention_mask` where there is padding).
        **kwargs: as for `transformers.Trainer`.
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
            logger.warning(
                "one of %d GPUs is used: to train on all, start a process for each with torchrun", args.n_gpu
            )
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
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # stock sets it anew at every step
        self._interrupt = InterruptCallback()
        self.add_callback(self._interrupt)
        if args.rank_logging_steps:
            self.add_callback(RankCallback(decomposition, args.rank_logging_steps, self.log))

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        # Stock keeps the columns that the model's forward names: a decomposition's takes hidden states.
        self._signature_columns = ["input_ids", "attention_mask"]

    @property
    def language_model(self) -> PreTrainedModel:
        """The model whose MLPs are decomposed."""
        return self.model

    def capture(self, inputs: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """{layer: (x, y)} of the untouched model's MLPs for a batch of ids; x (batch, tokens, I), y (…, O)."""
        raise NotImplementedError

    def loss_mask(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Which positions the loss is of; bool, of any shape."""
        return token_mask(inputs["input_ids"], inputs.get("attention_mask"))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As stock, but of text the padding of every row is on its right, as where a decomposition is measured."""
        inputs = super()._prepare_inputs(inputs)
        of_text = {"input_ids", "attention_mask"} <= set(inputs) <= _OF_TOKENS
        if not of_text or self.language_model.config.is_encoder_decoder:
            return inputs
        order = padding_last(inputs["attention_mask"])
        return {name: value.gather(-1, order) for name, value in inputs.items()}

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        if not batch_samples:
            return None
        count = torch.stack([self.loss_mask(batch).sum().to(device) for batch in batch_samples]).sum()
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def _track_num_input_tokens(self, inputs: Mapping[str, Tensor]) -> None:
        # Stock counts the elements of the model's own main input, which is in no batch here.
        if self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen += int(self.accelerator.gather(self.loss_mask(inputs).sum()).sum())

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train; Ctrl-C finishes the step, saves a checkpoint and returns (then `interrupted` is true).

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last complete one in `output_dir`.
            **kwargs: as for `Trainer.train`.

        Raises:
            ValueError: when there is nothing to resume from, or no training data.
            DivergenceError: the loss or a weight is not finite; earlier checkpoints are kept.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            self.scales = _read_scales(Path(str(resume_from_checkpoint)))
            state = TrainerState.load_from_json(str(Path(str(resume_from_checkpoint)) / TRAINER_STATE_NAME))
            if 0 < self.args.max_steps <= state.global_step:  # stock takes one step more
                self._load_from_checkpoint(str(resume_from_checkpoint))
                self.state = state
                if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                    self._load_best_model()
                self._interrupt.interrupted = False
                self.measure_experts()
                return TrainOutput(state.global_step, math.nan, {})
        else:
            if not self._optimizer_was_given:
                self.optimizer = self.lr_scheduler = None  # those of an earlier training
            self._start()
        self._use_token_progress()
        keep = self.args.keep_freed_memory and self.args.device.type == "cpu"
        with self._interrupt.listening(), freed_memory_kept() if keep else nullcontext():
            try:
                output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
            finally:
                _without_autocast(self.model)
        if not self.interrupted:
            self.measure_experts()
        return output

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # Only where the loss is read anyway: looking at every step's would wait for the device. A sum, it stays NaN.
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._refuse_loss(tr_loss)
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _refuse_loss(self, total: Tensor) -> None:
        """Stop where the sum of the losses since they were last logged is not finite, in all processes alike."""
        if not self.accelerator.gather(total).isfinite().all():
            first, last = self._globalstep_last_logged + 1, self.state.global_step
            self._diverged(f"the loss of the steps {first} to {last} is not finite")

    def _refuse_weights(self) -> None:
        """Stop where a weight is not finite, as after a step too far, whose loss was the last finite one."""
        for name, parameter in self.decomposition.named_parameters():
            # A sum needs no memory, and is not finite where one of its terms is not.
            if not parameter.detach().sum(dtype=torch.float32).isfinite():
                self._diverged(f"{name} is not finite after step {self.state.global_step}")

    def _diverged(self, what: str) -> None:
        raise DivergenceError(
            f"the training diverged: {what}. Begin it anew with a lower learning rate (--learning-rate, "
            f"learning_rate; it was {self.args.learning_rate}), and with bfloat16 where the model runs in float16. "
            f"Checkpoints from before are kept in {self.args.output_dir}"
        )

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._refuse_loss(self._tr_loss)
        self._refuse_weights()
        # Stock deletes all checkpoints but the best with `save_total_limit=1`: also the one of an interrupted training.
        limit = self.args.save_total_limit
        self.args.save_total_limit = None if self.interrupted else limit
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    @property
    def interrupted(self) -> bool:
        """Whether the last `train()` was ended by a signal."""
        return self._interrupt.interrupted

    def _training_batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches of the training data from its start, leaving the random state as it is."""
        with torch.random.fork_rng(devices=[]):  # data are drawn on the CPU
            for batch in self.get_train_dataloader():
                yield self._prepare_inputs(batch)

    def _start(self) -> None:
        """Before the first step of a training that is not resumed."""
        self._calibrate(self.args.calibration_tokens)

    def _calibrate(self, tokens: int) -> dict[int, Calibration]:
        """Measure the layers' activations on the training data, and set `scales`."""
        logger.info("measuring the activations of %d training tokens", tokens)
        decoder = self.decomposition.config.of_decoder
        calibrations = calibrate(self.capture, self._training_batches(), tokens, decoder)
        scales = [{layer: calibration.scales for layer, calibration in calibrations.items()}]
        # Weights are broadcast from process 0 by DDP; the scales must be the same everywhere too.
        self.scales = broadcast_object_list(scales)[0] if self.args.world_size > 1 else scales[0]
        return calibrations

    def least_norm(self, layer: int) -> float:
        """What the squared norm ‖y‖² of a token's output counts as at least: see `minimum_relative_norm`."""
        return self.args.minimum_relative_norm * self.scales[layer].output_norm if layer in self.scales else 0.0

    def measure_experts(self) -> None:
        """Measure on training data how often and how strongly each expert is active, for the layers' buffers; `train`
        does so after the last step."""
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
        """What is trained for a layer, by what its parameters' names begin with: the layer itself."""
        return {"": self.decomposition.layer(layer)}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group per learning rate: see `initialization.parameter_scales` and the arguments' factors for gate and
        modulations. Weight decay as in `args`, of all parameters."""
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

    def router_loss(self, layer: int, x: Tensor, mask: Tensor) -> Tensor | float:
        """`router.router_loss` of a part of the tokens that count, since it takes the exact gate; 0 for a layer without
        a router. Nothing else learns from it."""
        module = self.decomposition.layer(layer)
        if module.router is None:
            return 0.0
        loss = router_loss(module, x[mask][self.state.global_step % ROUTER_TOKENS :: ROUTER_TOKENS])
        return loss / self.current_gradient_accumulation_steps  # a mean: stock leaves dividing to us

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Stock pickles its arguments beside the weights; a decomposition's folder holds nothing to unpickle.
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        evaluation = folder / EVALUATION_NAME
        before = _weights_digest(folder) if evaluation.is_file() else None
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
        if before is not None and _weights_digest(folder) != before:
            evaluation.unlink()  # it is of the weights that were there
        arguments = self.args.to_sanitized_dict()
        arguments = {name: value for name, value in arguments.items() if name not in _LOCAL_ARGUMENTS}
        (folder / ARGUMENTS_NAME).write_text(json.dumps(arguments, indent=2) + "\n")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._refuse_weights()
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.save_beside(folder)
        super()._save_checkpoint(model, trial)

    def save_beside(self, checkpoint: Path) -> None:
        """Write into a checkpoint's folder what a resumed training needs that stock does not keep."""
        scales = {str(layer): vars(value) for layer, value in self.scales.items()}
        (checkpoint / SCALES_NAME).write_text(json.dumps(scales, indent=2) + "\n")


def _weights_digest(folder: Path) -> str:
    digest = hashlib.blake2b()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def _without_autocast(model: nn.Module) -> None:
    """Take from a model's forward the autocast that accelerate left there, in which all that is measured later would
    run; another training puts it back."""
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


def _read_scales(checkpoint: Path) -> dict[int, ActivationScales]:
    path = checkpoint / SCALES_NAME
    if not path.is_file():
        raise ValueError(f"{checkpoint} is no checkpoint of a decomposition's training: it has no {SCALES_NAME}")
    return {int(layer): ActivationScales(**value) for layer, value in json.loads(path.read_text()).items()}


def last_complete_checkpoint(output_dir: str | os.PathLike[str] | None) -> str:
    """The newest checkpoint in a folder whose writing was finished (its trainer state is written last).

    Raises:
        ValueError: when there is none.
    """
    steps = {}
    for folder in Path(output_dir or ".").glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")  # a person's copy may be called checkpoint-best
        if re.fullmatch(r"[0-9]+", number) and (folder / TRAINER_STATE_NAME).is_file():
            steps[int(number)] = folder
    if not steps:
        raise ValueError(f"no complete checkpoint in {output_dir} to resume from: begin it anew")
    return str(steps[max(steps)])

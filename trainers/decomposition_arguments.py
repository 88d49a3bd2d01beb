"""Arguments that every trainer of decompositions has, beside transformers' `TrainingArguments`."""

import logging
import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from mxd.base.base_model import bfloat16_is_emulated

logger = logging.getLogger(__name__)


@dataclass(repr=False)  # that of TrainingArguments does not show tokens
class DecompositionArguments(TrainingArguments):
    """Arguments of `DecompositionTrainer`; below are only the fields that `TrainingArguments` does not have, and those
    whose default differs there.

    Raises:
        ValueError: naming the field.
    """

    gate_learning_rate_factor: float = field(
        default=1.0,
        metadata={"help": "On the gate's learning rate. Below 1 more experts stay in use at high learning rates."},
    )
    modulation_learning_rate_factor: float = field(
        default=1.0, metadata={"help": "On the learning rate of an MxD's modulations C."}
    )
    scale_activations: bool = field(
        default=True,
        metadata={"help": "Train as on inputs and outputs of unit mean square; the saved weights need no scaling."},
    )
    minimum_relative_norm: float = field(
        default=0.25,
        metadata={
            "help": "In errors over |y|^2, a token's |y|^2 counts as at least this share of the mean |y|^2, so that a "
            "position of tiny output (BOS, in some layers) does not dominate the loss."
        },
    )
    warmup_steps: float = field(default=0.04, metadata={"help": "Warm-up: steps, or below 1 a share of the training."})
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Gradient clipping, off: one norm over all layers would couple them."}
    )
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Trackers; none unless asked for."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Log a mean in place of a loss that is not finite: no, the training stops there."},
    )
    calibration_tokens: int = field(default=32768, metadata={"help": "Training tokens measured before the first step."})
    statistics_tokens: int = field(
        default=65536, metadata={"help": "Training tokens over which the experts' use is measured after the last step."}
    )
    rank_logging_steps: int = field(
        default=0,
        metadata={"help": "Log the rank of an MxD's experts every so many steps; 0: never."},
    )
    keep_freed_memory: bool = field(
        default=True,
        metadata={
            "help": "On CPUs, keep the memory that a step frees for the next step: faster by a sixth of a step at "
            "GPT-2's sizes, for some 100 MB more of resident memory."
        },
    )
    greater_is_better: bool | None = field(
        default=False,
        metadata={"help": "Of `metric_for_best_model`: no, all that the trainers report is an error or a loss."},
    )
    hub_base_model: str | None = field(
        default=None, metadata={"help": "With push_to_hub: Hub id of the base model, if it was loaded from a folder."}
    )

    def __post_init__(self) -> None:
        for name in ("calibration_tokens", "statistics_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rank_logging_steps < 0:
            raise ValueError(f"rank_logging_steps must be at least 0, got {self.rank_logging_steps}")
        for name in ("learning_rate", "gate_learning_rate_factor", "modulation_learning_rate_factor"):
            self.check_finite(name)
        if not 0 <= self.minimum_relative_norm <= 1:
            raise ValueError(f"minimum_relative_norm must be from 0 to 1, got {self.minimum_relative_norm}")
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # Trainer refuses bfloat16 on a machine without a GPU unless the CPU is asked for
        if torch.backends.mps.is_available():
            self.use_cpu = True  # Apple GPUs have no float64, which gradients of biases and all measures are summed in
        super().__post_init__()
        if self.bf16 and self.device.type == "cpu" and bfloat16_is_emulated():
            logger.warning("this processor emulates bfloat16: training is faster without bf16")

    def check_finite(self, name: str) -> None:
        """Refuse a field that is not a finite number from 0."""
        if not 0 <= getattr(self, name) < math.inf:
            raise ValueError(f"{name} must be a finite number from 0, got {getattr(self, name)}")

    def check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        """Refuse a field that is not one of `allowed`."""
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def learning_rate_factor(self, parameter: str) -> float:
        """Factor on the learning rate of a layer's parameter, by its name in the layer."""
        if parameter.startswith("gate."):
            return self.gate_learning_rate_factor
        return self.modulation_learning_rate_factor if parameter == "modulation" else 1.0

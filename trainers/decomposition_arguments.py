"""Arguments that the trainers of decompositions share, in addition to transformers' `TrainingArguments`."""

import logging
import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from mxd.base.base_model import bfloat16_is_emulated

logger = logging.getLogger(__name__)


@dataclass(repr=False)  # that of TrainingArguments does not show tokens
class DecompositionArguments(TrainingArguments):
    """Arguments of `DecompositionTrainer`: the fields that `TrainingArguments` does not have, or has with another
    default.

    Raises:
        ValueError: A field is out of range; the message names it.
    """

    gate_learning_rate_factor: float = field(
        default=1.0,
        metadata={"help": "Factor on the gate's learning rate. Below 1, more experts stay in use at high rates."},
    )
    modulation_learning_rate_factor: float = field(
        default=1.0, metadata={"help": "Factor on the learning rate of an MxD's modulations C."}
    )
    scale_activations: bool = field(
        default=True,
        metadata={
            "help": "Train as if inputs and outputs had a mean square of 1. The saved weights need no scaling.",
        },
    )
    minimum_relative_norm: float = field(
        default=0.25,
        metadata={
            "help": "Lower bound on a token's |y|^2 in errors divided by |y|^2, relative to the mean |y|^2. Keeps "
            "positions with a tiny output (BOS, in some layers) from dominating the loss."
        },
    )
    warmup_steps: float = field(
        default=0.04, metadata={"help": "Warm-up steps; a value below 1 is a fraction of all steps."}
    )
    max_grad_norm: float = field(
        default=0.0,
        metadata={"help": "Maximum gradient norm for clipping; 0 disables it, since one norm couples the layers."},
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Leave this off: the data collator chooses the columns, not a decomposition's `forward`."},
    )
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Trackers to report to, such as tensorboard or wandb."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Number of steps between two logs."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Log an average instead of a loss that is not finite, rather than stop the training."},
    )
    calibration_tokens: int = field(
        default=32768, metadata={"help": "Number of training tokens on which activations are measured before training."}
    )
    statistics_tokens: int = field(
        default=65536, metadata={"help": "Number of training tokens on which expert use is measured after training."}
    )
    greater_is_better: bool | None = field(
        default=False,
        metadata={"help": "Whether `metric_for_best_model` is better when greater. The trainers report errors only."},
    )
    hub_base_model: str | None = field(
        default=None,
        metadata={"help": "Hub id of the base model for `push_to_hub`, if the base was loaded from a folder."},
    )

    def __post_init__(self) -> None:
        for name in ("calibration_tokens", "statistics_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gate_learning_rate_factor", "modulation_learning_rate_factor"):
            self.check_finite(name)
        if not 0 <= self.minimum_relative_norm <= 1:
            raise ValueError(f"minimum_relative_norm must be from 0 to 1, got {self.minimum_relative_norm}")
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # Trainer refuses bfloat16 on a machine without a GPU unless the CPU is asked for
        if torch.backends.mps.is_available():
            self.use_cpu = True  # Apple GPUs have no float64, in which gradients of biases and metrics are summed
        super().__post_init__()
        if self.bf16 and self.device.type == "cpu" and bfloat16_is_emulated():
            logger.warning("this processor emulates bfloat16: training is faster without bf16")

    def check_finite(self, name: str) -> None:
        """Raise unless the field is a finite number of at least 0."""
        if not 0 <= getattr(self, name) < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}")

    def check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        """Raise unless the field is one of `allowed`."""
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def learning_rate_factor(self, parameter: str) -> float:
        """Return the factor on the learning rate of a layer's parameter, given its name in the layer."""
        if parameter.startswith("gate."):
            return self.gate_learning_rate_factor
        return self.modulation_learning_rate_factor if parameter == "modulation" else 1.0

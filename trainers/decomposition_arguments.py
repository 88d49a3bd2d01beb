"""Arguments that the trainers of decompositions share, in addition to transformers' `TrainingArguments`."""

# ruff: noqa: RUF009
import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from mxd.base.base_model import bfloat16_is_emulated

logger = logging.getLogger(__name__)


def argument(default: Any, help: str) -> Any:  # noqa: A002, metadata's own name
    """Declare a field of arguments with its help."""
    return field(default=default, metadata={"help": help})


@dataclass(repr=False)  # that of TrainingArguments does not show tokens
class DecompositionArguments(TrainingArguments):
    """Arguments of `DecompositionTrainer`: fields that `TrainingArguments` lacks, or has with another default."""

    gate_learning_rate_factor: float = argument(1.0, "Factor on the gate's rate; below 1 more experts stay in use.")
    modulation_learning_rate_factor: float = argument(1.0, "Factor on the learning rate of an MxD's modulations C.")
    scale_activations: bool = argument(True, "Train as if inputs and outputs had a mean square of 1.")
    minimum_relative_norm: float = argument(
        0.25,
        "Lower bound on a token's |y|^2 in errors divided by |y|^2, relative to the mean |y|^2 "
        "without massive tokens. Keeps positions with a tiny output (BOS, in some layers) from dominating the loss.",
    )
    warmup_steps: float = argument(0.04, "Warm-up steps; a value below 1 is a fraction of all steps.")
    max_grad_norm: float = argument(0.0, "Maximum gradient norm; 0: no clipping, since one norm couples the layers.")
    remove_unused_columns: bool = argument(False, "Leave this off: the data collator chooses the columns.")
    report_to: None | str | list[str] = argument("none", "Trackers to report to, such as tensorboard or wandb.")
    logging_steps: float = argument(10, "Number of steps between two logs.")
    logging_nan_inf_filter: bool = argument(False, "Log an average rather than stop at a loss that is not finite.")
    calibration_tokens: int | None = argument(
        None, "Tokens to measure activations on, at least one per expert. [32768, or those of the training if fewer]"
    )
    statistics_tokens: int | None = argument(
        None, "Tokens to measure the experts' use on at the end. [65536, or those of the training if fewer]"
    )
    greater_is_better: bool | None = argument(False, "The trainers' metrics are errors: less is better.")
    hub_base_model: str | None = argument(None, "Hub id of the base model, if it was loaded from a folder.")

    # Of processes that train apart (`mxd.base.processes.train_apart`), which transformers takes for one each: the
    # index of this one, and how many hold parts of the same layers.
    rank, shards = 0, 1

    def __post_init__(self) -> None:
        self.check_range("calibration_tokens", "statistics_tokens", least=1)
        self.check_range("learning_rate", "gate_learning_rate_factor", "modulation_learning_rate_factor")
        self.check_range("minimum_relative_norm", most=1)
        # Unless the CPU is asked for, a machine without a GPU refuses bfloat16, and keeps several processes apart.
        # Apple GPUs have no float64, in which gradients of biases and metrics are summed.
        if not torch.accelerator.is_available() or torch.backends.mps.is_available():
            self.use_cpu = True
        super().__post_init__()
        if self.bf16 and self.device.type == "cpu" and bfloat16_is_emulated():
            logger.warning("this processor emulates bfloat16: training is faster without bf16")

    @property
    def process_index(self) -> int:
        """Index of this process: the first one logs and, of those that train together, saves."""
        return self.rank or int(super().process_index)

    local_process_index = process_index

    @property
    def should_save(self) -> bool:
        """Whether this process writes checkpoints."""
        return bool(super().should_save) or (self.rank > 0 and self.shards == 1)

    def check_range(self, *names: str, least: float = 0, most: float = math.inf) -> None:
        """Raise a ValueError unless the fields are None or finite numbers from `least` to `most`."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and least <= value <= most):
                raise ValueError(f"{name} must be a finite number from {least} to {most}, got {value}")

    def check_choice(self, name: str, *allowed: str) -> None:
        """Raise a ValueError unless the field is one of `allowed`."""
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    def learning_rate_factor(self, parameter: str) -> float:
        """Return the factor on the learning rate of a layer's parameter, given its name in the layer."""
        if parameter.startswith("gate."):
            return self.gate_learning_rate_factor
        return self.modulation_learning_rate_factor if parameter == "modulation" else 1.0

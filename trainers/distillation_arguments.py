"""Arguments of layerwise distillation: transformers' `TrainingArguments` with the method's own fields."""

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from .initialization import ENCODER_STARTS, GATE_STARTS, MODULATION_STARTS

LOSS_NORMALIZATIONS = ("squared_norm", "norm")


@dataclass
class DistillationArguments(TrainingArguments):
    """Arguments of `DistillationTrainer`; below are only the fields that `TrainingArguments` does not have, and
    those whose default differs there.

    Raises:
        ValueError: naming the field.
    """

    learning_rate: float = field(
        default=3e-3,
        metadata={
            "help": "Peak learning rate in units of the scaled activations (the authors: 1e-4 for 480 M tokens)."
        },
    )
    gate_learning_rate_factor: float = field(
        default=0.3,
        metadata={"help": "On the gate's learning rate: a slower gate keeps its experts in use while the rest learns."},
    )
    modulation_learning_rate_factor: float = field(
        default=3.0, metadata={"help": "On the learning rate of an MxD's modulations C, which are rarely updated each."}
    )
    warmup_steps: float = field(default=0.04, metadata={"help": "Warm-up: steps, or below 1 a share of the training."})
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Gradient clipping, off: one norm over all layers would couple them."}
    )
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Trackers; none unless asked for."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    gate_initialization: str = field(
        default="data",
        metadata={
            "help": "'data': gate rows from training inputs; 'random': as nn.Linear, the authors' start; 'keep': "
            "train on from the model as it is given."
        },
    )
    encoder_initialization: str = field(
        default="pretrained",
        metadata={"help": "'pretrained': from the MLP's own encoder; 'random': as nn.Linear, the authors' start."},
    )
    modulation_initialization: str = field(
        default="random",
        metadata={"help": "'random': around 0, the authors' start; 'unit': C^T a starts at 1, the layer at D^T z."},
    )
    scale_activations: bool = field(
        default=True,
        metadata={"help": "Train as on inputs and outputs of unit mean square; the saved weights need no scaling."},
    )
    loss_normalization: str = field(
        default="squared_norm",
        metadata={"help": "'squared_norm': |y^ - y|^2 / |y|^2 per token; 'norm': |y^ - y|^2 / |y|, the authors' code."},
    )
    minimum_relative_norm: float = field(
        default=0.25,
        metadata={
            "help": "With 'squared_norm': a token's |y|^2 counts as at least this share of the mean |y|^2, so that a "
            "position of tiny output (BOS, in some layers) does not dominate the loss."
        },
    )
    sparse_optimizer: bool = field(
        default=False,
        metadata={
            "help": "Step gate and experts with RowAdamW: only those that fired since the last step, each on its own "
            "clock. For steps so small that most experts do not fire; one process, no gradient clipping."
        },
    )
    calibration_tokens: int = field(
        default=32768, metadata={"help": "Training tokens measured before the first step, at least one per expert."}
    )
    statistics_tokens: int = field(
        default=65536, metadata={"help": "Training tokens over which the experts' use is measured after the last step."}
    )

    def __post_init__(self) -> None:
        for name, allowed in (
            ("gate_initialization", GATE_STARTS),
            ("encoder_initialization", ENCODER_STARTS),
            ("modulation_initialization", MODULATION_STARTS),
            ("loss_normalization", LOSS_NORMALIZATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("calibration_tokens", "statistics_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("gate_learning_rate_factor", "modulation_learning_rate_factor"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number from 0, got {getattr(self, name)}")
        if not 0 <= self.minimum_relative_norm <= 1:
            raise ValueError(f"minimum_relative_norm must be from 0 to 1, got {self.minimum_relative_norm}")
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # Trainer refuses bfloat16 on a machine without a GPU unless the CPU is asked for
        super().__post_init__()
        if self.sparse_optimizer:
            self._check_sparse_optimizer()

    def _check_sparse_optimizer(self) -> None:
        if self.max_grad_norm:
            raise ValueError(f"sparse_optimizer cannot clip: max_grad_norm must be 0, not {self.max_grad_norm}")
        if self.world_size > 1:
            raise ValueError(f"sparse_optimizer works in one process, not in {self.world_size}")
        if self.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(f"sparse_optimizer is an AdamW of its own: leave optim as it is, not {self.optim!s}")

    def learning_rate_factor(self, parameter: str) -> float:
        """Factor on the learning rate of a layer's parameter, by its name in the layer."""
        if parameter.startswith("gate."):
            return self.gate_learning_rate_factor
        return self.modulation_learning_rate_factor if parameter == "modulation" else 1.0

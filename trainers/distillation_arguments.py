"""Arguments of layerwise distillation: those of every training of a decomposition with the method's own fields."""

from dataclasses import dataclass, field

from .decomposition_arguments import DecompositionArguments
from .initialization import ENCODER_STARTS, GATE_STARTS, MODULATION_STARTS

LOSS_NORMALIZATIONS = ("squared_norm", "norm")


@dataclass
class DistillationArguments(DecompositionArguments):
    """Arguments of `DistillationTrainer`; below are only the fields that `DecompositionArguments` does not have, and
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
    calibration_tokens: int = field(
        default=32768, metadata={"help": "Training tokens measured before the first step, at least one per expert."}
    )

    def __post_init__(self) -> None:
        self.check_choice("gate_initialization", GATE_STARTS)
        self.check_choice("encoder_initialization", ENCODER_STARTS)
        self.check_choice("modulation_initialization", MODULATION_STARTS)
        self.check_choice("loss_normalization", LOSS_NORMALIZATIONS)
        if not 0 <= self.minimum_relative_norm <= 1:
            raise ValueError(f"minimum_relative_norm must be from 0 to 1, got {self.minimum_relative_norm}")
        super().__post_init__()

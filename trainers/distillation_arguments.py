"""Arguments of layerwise distillation."""

from dataclasses import dataclass, field

from mxd.base.training_help import HELP

from .auxiliary_transcoder import ATTRIBUTE as AUXILIARY
from .decomposition_arguments import DecompositionArguments
from .initialization import DECODER_INITS, ENCODER_INITS, GATE_INITS, MODULATION_INITS

LOSS_NORMALIZATIONS = ("squared_norm", "norm")
# Transcoders do best at three times an MxD's learning rate.
_AUXILIARY_FACTOR = 3.0


@dataclass(repr=False)
class DistillationArguments(DecompositionArguments):
    """Arguments of `DistillationTrainer`: the fields that `DecompositionArguments` does not have, or has with another
    default. "Paper" is the authors' code of https://arxiv.org/abs/2505.21364.

    Raises:
        ValueError: A field is out of range; the message names it.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": HELP["learning_rate"]})
    warm_start: bool = field(
        default=False,
        metadata={"help": "Continue from the weights of the given model instead of initialising it."},
    )
    gate_init: str = field(default="data", metadata={"help": HELP["gate_init"]})
    encoder_init: str = field(default="pretrained", metadata={"help": HELP["encoder_init"]})
    modulation_init: str = field(default="unit", metadata={"help": HELP["modulation_init"]})
    decoder_init: str = field(
        default="pretrained",
        metadata={"help": "Init of an MxD's decoder D. 'pretrained': the MLP's own; 'zero': zeros (paper)."},
    )
    min_mean_ablation_error: float = field(default=0.45, metadata={"help": HELP["min_mean_ablation_error"]})
    mean_ablation_weight: float = field(
        default=1.0, metadata={"help": "Weight of the `min_mean_ablation_error` penalty; 0 disables it (paper)."}
    )
    auxiliary_weight: float = field(default=1.0, metadata={"help": HELP["auxiliary_weight"]})
    loss_normalization: str = field(
        default="squared_norm",
        metadata={"help": "Error of a token. 'squared_norm': |y^ - y|^2 / |y|^2; 'norm': |y^ - y|^2 / |y| (paper)."},
    )
    calibration_tokens: int = field(
        default=32768,
        metadata={
            "help": "Number of training tokens on which activations are measured before training; at least one per "
            "expert is used."
        },
    )

    def __post_init__(self) -> None:
        self.check_choice("gate_init", GATE_INITS)
        self.check_choice("encoder_init", ENCODER_INITS)
        self.check_choice("modulation_init", MODULATION_INITS)
        self.check_choice("decoder_init", DECODER_INITS)
        self.check_choice("loss_normalization", LOSS_NORMALIZATIONS)
        self.check_finite("mean_ablation_weight")
        self.check_finite("auxiliary_weight")
        if not 0 <= self.min_mean_ablation_error < 1:
            raise ValueError(f"min_mean_ablation_error must be from 0 to below 1, got {self.min_mean_ablation_error}")
        super().__post_init__()

    def learning_rate_factor(self, parameter: str) -> float:
        """Return the factor on a parameter's learning rate; auxiliary transcoders have their own."""
        if parameter.startswith(f"{AUXILIARY}."):
            return _AUXILIARY_FACTOR
        return super().learning_rate_factor(parameter)

"""Arguments of layerwise distillation: those of every training of a decomposition with the method's own fields."""

from dataclasses import dataclass, field

from .auxiliary_transcoder import PARAMETERS as AUXILIARY_PARAMETERS
from .decomposition_arguments import DecompositionArguments
from .initialization import DECODER_INITS, ENCODER_INITS, GATE_INITS, MODULATION_INITS

LOSS_NORMALIZATIONS = ("squared_norm", "norm")
# Transcoders do best at three times an MxD's rate.
_AUXILIARY_RATE = 3.0


@dataclass(repr=False)
class DistillationArguments(DecompositionArguments):
    """Arguments of `DistillationTrainer`; below are only the fields that `DecompositionArguments` does not have, and
    those whose default differs there.

    Raises:
        ValueError: naming the field.
    """

    learning_rate: float = field(
        default=1e-3,
        metadata={
            "help": "Peak learning rate in units of the scaled activations (the authors: 1e-4 for 480 M tokens). "
            "Transcoders do better with 3e-3 on a million tokens."
        },
    )
    gate_init: str = field(
        default="data",
        metadata={
            "help": "'data': gate rows from training inputs; 'random': as nn.Linear, the authors' start; 'keep': "
            "train on from the model as it is given."
        },
    )
    encoder_init: str = field(
        default="pretrained",
        metadata={"help": "'pretrained': from the MLP's own encoder; 'random': as nn.Linear, the authors' start."},
    )
    modulation_init: str = field(
        default="unit",
        metadata={"help": "'random': around 0, the authors' start; 'unit': C^T a starts at 1, the layer at D^T z."},
    )
    decoder_init: str = field(
        default="pretrained",
        metadata={"help": "'pretrained': D from the MLP's own decoder; 'zero': D at 0, the authors' start."},
    )
    min_mean_ablation_error: float = field(
        default=0.45,
        metadata={
            "help": "How wrong an MxD has to be, at least, when C^T a is replaced by its mean: the normalised error, "
            "of a token at most 1, that `mean_ablation_weight` holds it to; about what its experts then carry."
        },
    )
    mean_ablation_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of what is missing to `min_mean_ablation_error` in the loss; 0 for none (the authors)."
        },
    )
    auxiliary_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of a second error of an MxD: that of a skip transcoder's decoder on its coefficients, "
            "trained along and then dropped (N * O parameters). Experts then stand for something; 0 for none (the "
            "authors)."
        },
    )
    loss_normalization: str = field(
        default="squared_norm",
        metadata={"help": "'squared_norm': |y^ - y|^2 / |y|^2 per token; 'norm': |y^ - y|^2 / |y|, the authors' code."},
    )
    calibration_tokens: int = field(
        default=32768, metadata={"help": "Training tokens measured before the first step, at least one per expert."}
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
        """As `DecompositionArguments.learning_rate_factor`; a layer's sparse code's parameters begin with its name."""
        if parameter.startswith(AUXILIARY_PARAMETERS):
            return _AUXILIARY_RATE
        return super().learning_rate_factor(parameter)

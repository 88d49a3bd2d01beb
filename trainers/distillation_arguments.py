"""Arguments of layerwise distillation: those of every training of a decomposition with the method's own fields."""

from dataclasses import dataclass, field

from .decomposition_arguments import DecompositionArguments
from .initialization import DECODER_STARTS, ENCODER_STARTS, GATE_STARTS, MODULATION_STARTS
from .sparse_code import PARAMETERS as SPARSE_CODE_PARAMETERS

LOSS_NORMALIZATIONS = ("squared_norm", "norm")
# Transcoders do best at three times an MxD's rate.
_SPARSE_CODE_RATE = 3.0


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
        default="unit",
        metadata={"help": "'random': around 0, the authors' start; 'unit': C^T a starts at 1, the layer at D^T z."},
    )
    decoder_initialization: str = field(
        default="pretrained",
        metadata={"help": "'pretrained': D from the MLP's own decoder; 'zero': D at 0, the authors' start."},
    )
    expert_share: float = field(
        default=0.45,
        metadata={
            "help": "How wrong an MxD has to be, at least, when C^T a is replaced by its mean: the normalised error, "
            "of a token at most 1, that `expert_share_weight` holds it to; about what its experts then carry."
        },
    )
    expert_share_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of what is missing to `expert_share` in the loss; 0 for none (the authors)."},
    )
    sparse_code_weight: float = field(
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
    sparse_optimizer: bool = field(
        default=False,
        metadata={
            "help": "Step gate and experts with RowAdamW: only those that fired since the last step, each on its own "
            "clock. For steps so small that most experts do not fire; one process, no gradient clipping, no "
            "torch_compile."
        },
    )
    calibration_tokens: int = field(
        default=32768, metadata={"help": "Training tokens measured before the first step, at least one per expert."}
    )

    def __post_init__(self) -> None:
        self.check_choice("gate_initialization", GATE_STARTS)
        self.check_choice("encoder_initialization", ENCODER_STARTS)
        self.check_choice("modulation_initialization", MODULATION_STARTS)
        self.check_choice("decoder_initialization", DECODER_STARTS)
        self.check_choice("loss_normalization", LOSS_NORMALIZATIONS)
        self.check_finite("expert_share_weight")
        self.check_finite("sparse_code_weight")
        if not 0 <= self.expert_share < 1:
            raise ValueError(f"expert_share must be from 0 to below 1, got {self.expert_share}")
        super().__post_init__()
        if self.sparse_optimizer:
            self._check_sparse_optimizer()

    def learning_rate_factor(self, parameter: str) -> float:
        """As `DecompositionArguments.learning_rate_factor`; a layer's sparse code's parameters begin with its name."""
        if parameter.startswith(SPARSE_CODE_PARAMETERS):
            return _SPARSE_CODE_RATE
        return super().learning_rate_factor(parameter)

    def _check_sparse_optimizer(self) -> None:
        if self.torch_compile:
            raise ValueError(
                "sparse_optimizer follows the experts that fired, which the dense gradients of compiled layers do not "
                "tell: leave torch_compile off"
            )
        if self.max_grad_norm:
            raise ValueError(f"sparse_optimizer cannot clip: max_grad_norm must be 0, not {self.max_grad_norm}")
        if self.world_size > 1:
            raise ValueError(f"sparse_optimizer works in one process, not in {self.world_size}")
        if self.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(f"sparse_optimizer is an AdamW of its own: leave optim as it is, not {self.optim!s}")

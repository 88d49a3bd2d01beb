"""Arguments of layerwise distillation."""

from dataclasses import dataclass

from mxd.base.training_help import HELP

from .auxiliary_transcoder import ATTRIBUTE as AUXILIARY
from .decomposition_arguments import DecompositionArguments, argument


@dataclass(repr=False)
class DistillationArguments(DecompositionArguments):
    """Arguments of `DistillationTrainer`. "Paper" is the authors' code of https://arxiv.org/abs/2505.21364."""

    learning_rate: float = argument(1e-3, HELP["learning_rate"])
    warm_start: bool = argument(False, "Continue from the weights of the given model instead of initialising it.")
    gate_init: str = argument("data", HELP["gate_init"])
    encoder_init: str = argument("pretrained", HELP["encoder_init"])
    modulation_init: str = argument("unit", HELP["modulation_init"])
    decoder_init: str = argument("pretrained", "Init of the decoder D. 'pretrained': the MLP's; 'zero' (paper).")
    min_mean_ablation_error: float = argument(0.45, HELP["min_mean_ablation_error"])
    mean_ablation_weight: float = argument(1.0, "Weight of that penalty; 0 disables it (paper).")
    auxiliary_weight: float = argument(1.0, HELP["auxiliary_weight"])
    loss_normalization: str = argument(
        "squared_norm", "Error of a token. 'squared_norm': |y^ - y|^2 / |y|^2; 'norm': |y^ - y|^2 / |y| (paper)."
    )

    def __post_init__(self) -> None:
        self.check_choice("gate_init", "data", "random")
        self.check_choice("encoder_init", "pretrained", "random")
        self.check_choice("modulation_init", "unit", "random")
        self.check_choice("decoder_init", "pretrained", "zero")
        self.check_choice("loss_normalization", "squared_norm", "norm")
        self.check_range("mean_ablation_weight", "auxiliary_weight")
        self.check_range("min_mean_ablation_error", most=1)
        super().__post_init__()

    def learning_rate_factor(self, parameter: str) -> float:
        """Return also an auxiliary transcoder's factor: transcoders do best at three times an MxD's learning rate."""
        return 3.0 if parameter.startswith(f"{AUXILIARY}.") else super().learning_rate_factor(parameter)

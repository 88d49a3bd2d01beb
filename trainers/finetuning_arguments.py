"""Arguments of end-to-end fine-tuning."""

from dataclasses import dataclass

from mxd.base.training_help import HELP

from .decomposition_arguments import DecompositionArguments, argument


@dataclass(repr=False)
class FinetuningArguments(DecompositionArguments):
    """Arguments of `FinetuningTrainer`: fields that `DecompositionArguments` lacks, or has with another default."""

    loss: str = argument("kl", HELP["loss"])
    nmse_weight: float = argument(0.1, HELP["nmse_weight"])
    learning_rate: float = argument(3e-4, HELP["learning_rate"])
    gate_learning_rate_factor: float = argument(0.3, "Factor on the gate's rate; a slow gate keeps the experts.")
    modulation_learning_rate_factor: float = argument(3.0, "Factor on the rate of C, whose rows are rarely updated.")

    def __post_init__(self) -> None:
        self.check_choice("loss", "kl", "cross_entropy")
        self.check_range("nmse_weight")
        super().__post_init__()

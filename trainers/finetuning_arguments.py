"""Arguments of end-to-end fine-tuning."""

from dataclasses import dataclass, field

from mxd.base.training_help import HELP

from .decomposition_arguments import DecompositionArguments

LOSSES = ("kl", "cross_entropy")


@dataclass(repr=False)
class FinetuningArguments(DecompositionArguments):
    """Arguments of `FinetuningTrainer`: the fields that `DecompositionArguments` does not have, or has with another
    default.

    Raises:
        ValueError: A field is out of range; the message names it.
    """

    loss: str = field(default="kl", metadata={"help": HELP["loss"]})
    nmse_weight: float = field(default=0.1, metadata={"help": HELP["nmse_weight"]})
    learning_rate: float = field(default=3e-4, metadata={"help": HELP["learning_rate"]})
    gate_learning_rate_factor: float = field(
        default=0.3,
        metadata={"help": "Factor on the gate's learning rate. A slower gate keeps the experts what they are."},
    )
    modulation_learning_rate_factor: float = field(
        default=3.0,
        metadata={"help": "Factor on the learning rate of an MxD's modulations C, each of which is rarely updated."},
    )

    def __post_init__(self) -> None:
        self.check_choice("loss", LOSSES)
        self.check_finite("nmse_weight")
        super().__post_init__()

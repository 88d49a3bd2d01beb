"""Arguments of end-to-end fine-tuning: those of every training of a decomposition with the method's own fields."""

from dataclasses import dataclass, field

from .decomposition_arguments import DecompositionArguments

LOSSES = ("kl", "cross_entropy")


@dataclass(repr=False)
class FinetuningArguments(DecompositionArguments):
    """Arguments of `FinetuningTrainer`; below are only the fields that `DecompositionArguments` does not have, and
    those whose default differs there.

    Raises:
        ValueError: naming the field.
    """

    loss: str = field(
        default="kl",
        metadata={"help": "'kl': to the untouched model; 'cross_entropy': of the next token, as language models."},
    )
    nmse_weight: float = field(
        default=0.1,
        metadata={"help": "Of the layers' own error |y^ - y|^2 / |y|^2, added to the loss so that they stay faithful."},
    )
    learning_rate: float = field(
        default=3e-4, metadata={"help": "Peak learning rate in units of the scaled activations."}
    )
    gate_learning_rate_factor: float = field(
        default=0.3, metadata={"help": "On the gate's learning rate: a slower gate keeps the experts what they are."}
    )
    modulation_learning_rate_factor: float = field(
        default=3.0, metadata={"help": "On the learning rate of an MxD's modulations C, which are rarely updated each."}
    )

    def __post_init__(self) -> None:
        self.check_choice("loss", LOSSES)
        self.check_finite("nmse_weight")
        super().__post_init__()

"""Arguments of end-to-end fine-tuning."""

from dataclasses import dataclass, field

from .decomposition_arguments import DecompositionArguments

LOSSES = ("kl", "cross_entropy")


@dataclass(repr=False)
class FinetuningArguments(DecompositionArguments):
    """Arguments of `FinetuningTrainer`: the fields that `DecompositionArguments` does not have, or has with another
    default.

    Raises:
        ValueError: A field is out of range; the message names it.
    """

    loss: str = field(
        default="kl",
        metadata={"help": "Loss. 'kl': divergence from the untouched model; 'cross_entropy': of the next token."},
    )
    nmse_weight: float = field(
        default=0.1,
        metadata={"help": "Weight of the layers' own error |y^ - y|^2 / |y|^2, which keeps them faithful."},
    )
    learning_rate: float = field(
        default=3e-4, metadata={"help": "Peak learning rate, in units of the scaled activations."}
    )
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

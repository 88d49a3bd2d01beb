"""Making decompositions: data, initialisation, the distillation trainer and its arguments."""

from .data import CausalCollator, DataError, load_text, materialize, pack, split_documents, take_tokens
from .decomposition_trainer import last_complete_checkpoint
from .distillation_arguments import DistillationArguments
from .distillation_trainer import DistillationTrainer
from .finetuning_arguments import FinetuningArguments
from .finetuning_trainer import FinetuningTrainer

__all__ = [
    "CausalCollator",
    "DataError",
    "DistillationArguments",
    "DistillationTrainer",
    "FinetuningArguments",
    "FinetuningTrainer",
    "last_complete_checkpoint",
    "load_text",
    "materialize",
    "pack",
    "split_documents",
    "take_tokens",
]

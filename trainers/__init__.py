"""Making decompositions: data, initialisation, the distillation trainer and its arguments."""

from .decomposition_trainer import DivergenceError, last_complete_checkpoint
from .distillation_arguments import DistillationArguments
from .distillation_trainer import DistillationTrainer
from .documents import DataError, load_text, split_documents
from .finetuning_arguments import FinetuningArguments
from .finetuning_trainer import FinetuningTrainer
from .labelled_text import LabelledDocuments, LabelledTexts, cut_texts, load_labelled_text
from .packing import CausalCollator, materialize, pack, take_tokens
from .recording import RecordedTeacher, ReplayTrainer
from .router import RoutingRecall, fit_router, fit_routers, routing_recall
from .row_adamw import RowAdamW

__all__ = [
    "CausalCollator",
    "DataError",
    "DistillationArguments",
    "DistillationTrainer",
    "DivergenceError",
    "FinetuningArguments",
    "FinetuningTrainer",
    "LabelledDocuments",
    "LabelledTexts",
    "RecordedTeacher",
    "ReplayTrainer",
    "RoutingRecall",
    "RowAdamW",
    "cut_texts",
    "fit_router",
    "fit_routers",
    "last_complete_checkpoint",
    "load_labelled_text",
    "load_text",
    "materialize",
    "pack",
    "routing_recall",
    "split_documents",
    "take_tokens",
]

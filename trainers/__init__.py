"""Making decompositions: data, initialisation, the distillation trainer and its arguments."""

from .decomposition_trainer import DivergenceError, last_complete_checkpoint
from .distillation_arguments import DistillationArguments
from .distillation_trainer import DistillationTrainer
from .finetuning_arguments import FinetuningArguments
from .finetuning_trainer import FinetuningTrainer
from .recording import RecordedTeacher, ReplayTrainer
from .router import RoutingRecall, fit_router, fit_routers, routing_recall
from .row_adamw import RowAdamW

__all__ = [
    "DistillationArguments",
    "DistillationTrainer",
    "DivergenceError",
    "FinetuningArguments",
    "FinetuningTrainer",
    "RecordedTeacher",
    "ReplayTrainer",
    "RoutingRecall",
    "RowAdamW",
    "fit_router",
    "fit_routers",
    "last_complete_checkpoint",
    "routing_recall",
]

"""Training of decompositions: initialisation, the trainers and their arguments."""

from .checkpoints import last_complete_checkpoint
from .distillation_arguments import DistillationArguments
from .distillation_trainer import DistillationTrainer
from .finetuning_arguments import FinetuningArguments
from .finetuning_trainer import FinetuningTrainer
from .router import RoutingRecall, fit_router, fit_routers, routing_recall
from .running_losses import DivergenceError

__all__ = [
    "DistillationArguments",
    "DistillationTrainer",
    "DivergenceError",
    "FinetuningArguments",
    "FinetuningTrainer",
    "RoutingRecall",
    "fit_router",
    "fit_routers",
    "last_complete_checkpoint",
    "routing_recall",
]

"""Making decompositions: data, initialisation, the distillation trainer and its arguments."""

from mxd.base.activation_cache import ActivationCache

from .decomposition_trainer import DivergenceError, last_complete_checkpoint
from .distillation_arguments import DistillationArguments
from .distillation_trainer import DistillationTrainer
from .finetuning_arguments import FinetuningArguments
from .finetuning_trainer import FinetuningTrainer
from .router import RoutingRecall, fit_router, fit_routers, routing_recall

__all__ = [
    "ActivationCache",
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

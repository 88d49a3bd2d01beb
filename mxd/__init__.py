"""MxD: take the MLPs of a language model apart without breaking the model.

The public names of all rooms in one place; each is imported when it is first used, so that the command's help
needs no torch. `python -m mxd` and the command `mxd` are the same.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation_mxd import (
        PairedDifference,
        UntouchedLosses,
        ablation_curve,
        domain_use,
        expert_ranks,
        faithfulness,
        grouped_folds,
        load_evaluation,
        measure_expert_statistics,
        pool_features,
        probe_features,
        token_mask,
        top_examples,
    )
    from hub_cards import build_card, list_decompositions, push_decomposition, show_decomposition
    from modeling_mxd import (
        ExpertCoefficients,
        ExpertIntervention,
        MxDConfig,
        MxDForCausalLM,
        MxDLayer,
        MxDLayerConfig,
        MxDModel,
        SurgeryError,
        TranscoderLayer,
        capture_mlps,
        find_mlp,
        find_mlps,
        make_spliced,
        num_experts_matching_transcoder,
        num_latents_matching_transcoder,
        replace_mlp,
        spliced_mlps,
    )
    from trainers import (
        CausalCollator,
        DataError,
        DistillationArguments,
        DistillationTrainer,
        FinetuningArguments,
        FinetuningTrainer,
        RecordedTeacher,
        ReplayTrainer,
        fit_routers,
        load_text,
        materialize,
        pack,
        routing_recall,
        split_documents,
    )

    from .base_model import BaseModelError, load_base_model
    from .domains import measure_domain_use
    from .experts import read_experts
    from .finetuning import FinetuningOptions, finetune
    from .frontier import FrontierOptions, measure_frontier
    from .pipeline import DecompositionOptions, decompose, evaluate
    from .probing import ProbingOptions, probe
    from .texts import TextOptions

_HOME = {
    "evaluation_mxd": [
        "PairedDifference",
        "UntouchedLosses",
        "ablation_curve",
        "domain_use",
        "expert_ranks",
        "faithfulness",
        "grouped_folds",
        "load_evaluation",
        "measure_expert_statistics",
        "pool_features",
        "probe_features",
        "token_mask",
        "top_examples",
    ],
    "hub_cards": ["build_card", "list_decompositions", "push_decomposition", "show_decomposition"],
    "modeling_mxd": [
        "ExpertCoefficients",
        "ExpertIntervention",
        "MxDConfig",
        "MxDForCausalLM",
        "MxDLayer",
        "MxDLayerConfig",
        "MxDModel",
        "SurgeryError",
        "TranscoderLayer",
        "capture_mlps",
        "find_mlp",
        "find_mlps",
        "make_spliced",
        "num_experts_matching_transcoder",
        "num_latents_matching_transcoder",
        "replace_mlp",
        "spliced_mlps",
    ],
    "trainers": [
        "CausalCollator",
        "DataError",
        "DistillationArguments",
        "DistillationTrainer",
        "FinetuningArguments",
        "FinetuningTrainer",
        "RecordedTeacher",
        "ReplayTrainer",
        "fit_routers",
        "load_text",
        "materialize",
        "pack",
        "routing_recall",
        "split_documents",
    ],
    "mxd.base_model": ["BaseModelError", "load_base_model"],
    "mxd.domains": ["measure_domain_use"],
    "mxd.experts": ["read_experts"],
    "mxd.finetuning": ["FinetuningOptions", "finetune"],
    "mxd.frontier": ["FrontierOptions", "measure_frontier"],
    "mxd.pipeline": ["DecompositionOptions", "decompose", "evaluate"],
    "mxd.probing": ["ProbingOptions", "probe"],
    "mxd.texts": ["TextOptions"],
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = list(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'mxd' has no attribute {name!r}")
    return getattr(import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

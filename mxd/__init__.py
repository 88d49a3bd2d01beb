"""MxD: take the MLPs of a language model apart without breaking the model.

The public names of all rooms in one place; each is imported when it is first used, so that the command's help
needs no torch. `python -m mxd` and the command `mxd` are the same.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mxd.base.activation_cache import ActivationCache
    from mxd.base.base_model import BaseModelError, load_base_model
    from mxd.base.capture import capture_mlps
    from mxd.base.masks import token_mask
    from mxd.data.documents import DataError, load_text, split_documents
    from mxd.data.packing import CausalCollator, materialize, pack
    from mxd.data.texts import TextOptions
    from mxd.evaluation import (
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
        top_examples,
    )
    from mxd.hub_cards import build_card, list_decompositions, push_decomposition, show_decomposition
    from mxd.jobs.domains import measure_domain_use
    from mxd.jobs.experts import read_experts
    from mxd.jobs.finetuning import FinetuningOptions, finetune
    from mxd.jobs.frontier import FrontierOptions, measure_frontier
    from mxd.jobs.pipeline import DecompositionOptions, decompose, evaluate
    from mxd.jobs.probing import ProbingOptions, probe
    from mxd.modeling_mxd import (
        ExpertCoefficients,
        ExpertIntervention,
        MxDConfig,
        MxDForCausalLM,
        MxDLayer,
        MxDLayerConfig,
        MxDModel,
        SurgeryError,
        TranscoderLayer,
        find_mlp,
        find_mlps,
        make_spliced,
        replace_mlp,
        spliced_mlps,
    )
    from mxd.trainers import (
        DistillationArguments,
        DistillationTrainer,
        FinetuningArguments,
        FinetuningTrainer,
        fit_routers,
        routing_recall,
    )
    from mxd.trainers.parameter_budget import num_experts_matching_transcoder, num_latents_matching_transcoder

_HOME = {
    "mxd.base.activation_cache": ["ActivationCache"],
    "mxd.base.base_model": ["BaseModelError", "load_base_model"],
    "mxd.base.capture": ["capture_mlps"],
    "mxd.base.masks": ["token_mask"],
    "mxd.data.documents": ["DataError", "load_text", "split_documents"],
    "mxd.data.packing": ["CausalCollator", "materialize", "pack"],
    "mxd.data.texts": ["TextOptions"],
    "mxd.evaluation": [
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
        "top_examples",
    ],
    "mxd.hub_cards": ["build_card", "list_decompositions", "push_decomposition", "show_decomposition"],
    "mxd.jobs.domains": ["measure_domain_use"],
    "mxd.jobs.experts": ["read_experts"],
    "mxd.jobs.finetuning": ["FinetuningOptions", "finetune"],
    "mxd.jobs.frontier": ["FrontierOptions", "measure_frontier"],
    "mxd.jobs.pipeline": ["DecompositionOptions", "decompose", "evaluate"],
    "mxd.jobs.probing": ["ProbingOptions", "probe"],
    "mxd.modeling_mxd": [
        "ExpertCoefficients",
        "ExpertIntervention",
        "MxDConfig",
        "MxDForCausalLM",
        "MxDLayer",
        "MxDLayerConfig",
        "MxDModel",
        "SurgeryError",
        "TranscoderLayer",
        "find_mlp",
        "find_mlps",
        "make_spliced",
        "replace_mlp",
        "spliced_mlps",
    ],
    "mxd.trainers": [
        "DistillationArguments",
        "DistillationTrainer",
        "FinetuningArguments",
        "FinetuningTrainer",
        "fit_routers",
        "routing_recall",
    ],
    "mxd.trainers.parameter_budget": ["num_experts_matching_transcoder", "num_latents_matching_transcoder"],
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = list(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'mxd' has no attribute {name!r}")
    return getattr(import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

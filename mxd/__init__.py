"""MxD: the public names of all rooms. Each is imported at its first use, so that the command's help needs no torch."""

import ast
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the only list of public names: `__getattr__` reads it too
    from mxd.base.activation_cache import ActivationCache
    from mxd.base.base_model import BaseModelError, load_base_model
    from mxd.base.capture import capture_mlps
    from mxd.base.masks import token_mask
    from mxd.data.documents import DataError, load_text, split_documents
    from mxd.data.packing import CausalCollator, materialize, pack
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
    from mxd.jobs.decompose import decompose
    from mxd.jobs.evaluate import evaluate
    from mxd.jobs.experts import read_experts
    from mxd.jobs.finetune import finetune
    from mxd.jobs.frontier import measure_frontier
    from mxd.jobs.options import (
        DecompositionOptions,
        EvaluationOptions,
        ExpertsOptions,
        FinetuningOptions,
        FrontierOptions,
        ProbingOptions,
    )
    from mxd.jobs.probe import probe
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

_MODULES = {
    alias.name: str(node.module)
    for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mxd.")
    for alias in node.names
}
__all__ = list(_MODULES)
__version__ = version("mxd")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mxd' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Measure how faithful a decomposition is and how its experts are used, and plot both."""

from .ablation import ablation_curve
from .collecting import collect_experts
from .collection import Collection, ExpertCollection
from .collection_file import load_collection, save_collection
from .directions import DirectionFit, fit_directions
from .domain_use import domain_use
from .expert_use import ExpertUse, count_expert_use, measure_expert_statistics
from .faithfulness import faithfulness, load_evaluation, save_evaluation
from .feature_contexts import FeatureContexts, collect_contexts, most_active
from .meaning import coherence_score, detection_score, fuzzing_score, keyword_explainer, keyword_judge
from .metrics import (
    ErrorSums,
    LogitSums,
    explained_share,
    kl_divergence,
    next_token_loss,
    normalised_entropy,
    normalised_error,
    recovered_share,
    weak_experts,
)
from .paired import PairedDifference
from .plots import (
    plot_ablation,
    plot_domain_use,
    plot_expert_frequency,
    plot_frontier,
    plot_probing,
    plot_singular_values,
    plot_training_loss,
)
from .pooling import (
    Representation,
    expert_representation,
    input_representation,
    neuron_representation,
    output_representation,
    pool_features,
)
from .probing import always_yes_f1, grouped_folds, probe_features
from .rank import ExpertRanks, decomposition_ranks, expert_ranks
from .steering_score import random_directions, steer_prompts, steering_score
from .untouched import UntouchedLosses

__all__ = [
    "Collection", "DirectionFit", "ErrorSums", "ExpertCollection", "ExpertRanks", "ExpertUse", "FeatureContexts",
    "LogitSums", "PairedDifference", "Representation", "UntouchedLosses", "ablation_curve", "always_yes_f1",
    "coherence_score", "collect_contexts", "collect_experts", "count_expert_use", "decomposition_ranks",
    "detection_score", "domain_use", "expert_ranks", "expert_representation", "explained_share", "faithfulness",
    "fit_directions", "fuzzing_score", "grouped_folds", "input_representation", "keyword_explainer", "keyword_judge",
    "kl_divergence", "load_collection", "load_evaluation", "measure_expert_statistics", "most_active",
    "neuron_representation", "next_token_loss", "normalised_entropy", "normalised_error", "output_representation",
    "plot_ablation", "plot_domain_use", "plot_expert_frequency", "plot_frontier", "plot_probing",
    "plot_singular_values", "plot_training_loss", "pool_features", "probe_features", "random_directions",
    "recovered_share", "save_collection", "save_evaluation", "steer_prompts", "steering_score", "weak_experts",
]  # fmt: skip

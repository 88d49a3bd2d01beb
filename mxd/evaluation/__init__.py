"""Measure how faithful a decomposition is and how its experts are used, and plot both."""

from .ablation import ablation_curve
from .domain_use import domain_use
from .expert_use import ExpertUse, count_expert_use, measure_expert_statistics
from .faithfulness import faithfulness, load_evaluation, save_evaluation
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
from .untouched import UntouchedLosses

__all__ = [
    "ErrorSums", "ExpertRanks", "ExpertUse", "LogitSums", "PairedDifference", "Representation", "UntouchedLosses",
    "ablation_curve", "always_yes_f1", "count_expert_use", "decomposition_ranks", "domain_use", "expert_ranks",
    "expert_representation", "explained_share", "faithfulness", "grouped_folds", "input_representation",
    "kl_divergence", "load_evaluation", "measure_expert_statistics", "neuron_representation", "next_token_loss",
    "normalised_entropy", "normalised_error", "output_representation", "plot_ablation", "plot_domain_use",
    "plot_expert_frequency", "plot_frontier", "plot_probing", "plot_singular_values", "plot_training_loss",
    "pool_features", "probe_features", "recovered_share", "save_evaluation", "weak_experts",
]  # fmt: skip

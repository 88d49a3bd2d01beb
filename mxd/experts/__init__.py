"""Read experts, find them from a text, and judge what they mean: contexts, directions, logit effects, scores."""

from .collecting import collect_experts
from .collection import Collection, ExpertCollection
from .collection_file import load_collection, save_collection
from .directions import DirectionFit, fit_directions
from .feature_contexts import FeatureContexts, collect_contexts, most_active
from .meaning import coherence_score, detection_score, fuzzing_score, keyword_explainer, keyword_judge
from .steering_score import random_directions, steer_prompts, steering_score

__all__ = [
    "Collection", "DirectionFit", "ExpertCollection", "FeatureContexts", "coherence_score", "collect_contexts",
    "collect_experts", "detection_score", "fit_directions", "fuzzing_score", "keyword_explainer", "keyword_judge",
    "load_collection", "most_active", "random_directions", "save_collection", "steer_prompts", "steering_score",
]  # fmt: skip

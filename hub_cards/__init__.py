"""Sharing decompositions: model card, push, and the catalogue of those that others share."""

from .card import build_card, update_card
from .catalogue import DecompositionDetails, DecompositionInfo, list_decompositions, show_decomposition
from .hub import HubError
from .push import PushedDecomposition, push_decomposition

__all__ = [
    "DecompositionDetails",
    "DecompositionInfo",
    "HubError",
    "PushedDecomposition",
    "build_card",
    "list_decompositions",
    "push_decomposition",
    "show_decomposition",
    "update_card",
]

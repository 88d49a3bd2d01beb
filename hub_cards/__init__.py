"""Sharing decompositions: model card, push, and the catalogue of those that others share."""

from .card import build_card
from .catalogue import DecompositionDetails, DecompositionInfo, list_decompositions, show_decomposition
from .hub import HubError
from .push import push_decomposition
from .updating import update_card

__all__ = [
    "DecompositionDetails",
    "DecompositionInfo",
    "HubError",
    "build_card",
    "list_decompositions",
    "push_decomposition",
    "show_decomposition",
    "update_card",
]

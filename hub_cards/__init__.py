"""Share decompositions on the Hub: build and update cards, push, search, and read what others share."""

from .card import build_card
from .catalogue import DecompositionDetails, DecompositionInfo, list_decompositions, show_decomposition
from .hub import HubError
from .push import OLDEST_TRANSFORMERS, check_base_id, push_decomposition
from .updating import update_card

__all__ = [
    "OLDEST_TRANSFORMERS",
    "DecompositionDetails",
    "DecompositionInfo",
    "HubError",
    "build_card",
    "check_base_id",
    "list_decompositions",
    "push_decomposition",
    "show_decomposition",
    "update_card",
]

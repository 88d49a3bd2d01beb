"""What a Hub repo carries: configuration, layers, model and surgery. Needs torch and transformers only."""

from .configuration_mxd import MxDConfig, MxDLayerConfig
from .interventions import ExpertCoefficients, ExpertIntervention
from .layers import MxDLayer, SparseLayer, TranscoderLayer, make_layer
from .modeling_mxd import MxDModel, MxDOutput
from .parameter_budget import num_experts_matching_transcoder, num_latents_matching_transcoder
from .surgery import (
    Capture,
    MLPSite,
    ReplacedMLP,
    SurgeryError,
    capture_mlps,
    find_mlp,
    find_mlps,
    replace_mlp,
    spliced_mlps,
)

__all__ = [
    "Capture",
    "ExpertCoefficients",
    "ExpertIntervention",
    "MLPSite",
    "MxDConfig",
    "MxDLayer",
    "MxDLayerConfig",
    "MxDModel",
    "MxDOutput",
    "ReplacedMLP",
    "SparseLayer",
    "SurgeryError",
    "TranscoderLayer",
    "capture_mlps",
    "find_mlp",
    "find_mlps",
    "make_layer",
    "num_experts_matching_transcoder",
    "num_latents_matching_transcoder",
    "replace_mlp",
    "spliced_mlps",
]

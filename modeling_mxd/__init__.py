"""What a Hub repo carries: configuration, layers, model and surgery. Needs torch and transformers only."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_mxd import MxDConfig, MxDLayerConfig
from .interventions import ExpertCoefficients, ExpertIntervention
from .layers import MxDLayer, SparseLayer, TranscoderLayer, make_layer
from .modeling_mxd import MxDForCausalLM, MxDModel, MxDOutput
from .parameter_budget import num_experts_matching_transcoder, num_latents_matching_transcoder
from .spliced_language_model import SplicedLanguageModel, make_spliced
from .surgery import (
    Capture,
    MLPSite,
    ReplacedMLP,
    SurgeryError,
    capture_mlps,
    find_mlp,
    find_mlps,
    replace_mlp,
    replace_mlps,
    spliced_mlps,
)

__all__ = [
    "Capture",
    "ExpertCoefficients",
    "ExpertIntervention",
    "MLPSite",
    "MxDConfig",
    "MxDForCausalLM",
    "MxDLayer",
    "MxDLayerConfig",
    "MxDModel",
    "MxDOutput",
    "ReplacedMLP",
    "SparseLayer",
    "SplicedLanguageModel",
    "SurgeryError",
    "TranscoderLayer",
    "capture_mlps",
    "find_mlp",
    "find_mlps",
    "make_layer",
    "make_spliced",
    "num_experts_matching_transcoder",
    "num_latents_matching_transcoder",
    "replace_mlp",
    "replace_mlps",
    "spliced_mlps",
]

# All or none: a local config would meet a remote model.
AutoConfig.register(MxDConfig.model_type, MxDConfig, exist_ok=True)
AutoModel.register(MxDConfig, MxDModel, exist_ok=True)
AutoModelForCausalLM.register(MxDConfig, MxDForCausalLM, exist_ok=True)

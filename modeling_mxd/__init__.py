"""The part of mxd that every Hub repo carries: configuration, layers, models and surgery, on torch and transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_mxd import MxDConfig, MxDLayerConfig
from .interventions import ExpertCoefficients, ExpertIntervention, Steering, SteeringChange
from .layers import MxDLayer, SparseLayer, TranscoderLayer, make_layer
from .modeling_mxd import MxDForCausalLM, MxDModel, MxDOutput
from .sites import MLPSite, SurgeryError, find_mlp, find_mlps, find_stacks, site_of
from .spliced_language_model import SplicedLanguageModel, make_spliced
from .steering import DIRECTIONS_NAME, ExpertDirections
from .surgery import MLPReplacement, ReplacedMLP, replace_mlp, replace_mlps, spliced_mlps, verify_sites

__all__ = [
    "DIRECTIONS_NAME", "ExpertCoefficients", "ExpertDirections", "ExpertIntervention", "MLPReplacement", "MLPSite",
    "MxDConfig", "MxDForCausalLM", "MxDLayer", "MxDLayerConfig", "MxDModel", "MxDOutput", "ReplacedMLP", "SparseLayer",
    "SplicedLanguageModel", "Steering", "SteeringChange", "SurgeryError", "TranscoderLayer", "find_mlp", "find_mlps",
    "find_stacks", "make_layer",
    "make_spliced", "replace_mlp", "replace_mlps", "site_of", "spliced_mlps", "verify_sites",
]  # fmt: skip

# All or none: a local config would meet a remote model.
AutoConfig.register(MxDConfig.model_type, MxDConfig, exist_ok=True)
AutoModel.register(MxDConfig, MxDModel, exist_ok=True)
AutoModelForCausalLM.register(MxDConfig, MxDForCausalLM, exist_ok=True)

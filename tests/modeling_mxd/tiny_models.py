"""A tiny random model of any architecture that transformers ships, built from its config class, no network needed."""

import dataclasses
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from tiny_model_overrides import (
    CACHE_CHANGES_TOKENS,
    GENERATE_FAILS,
    OTHER_TYPES,
    OVERRIDES,
    SIZES,
    UNBUILDABLE,
    VARIANTS,
    VOCABULARY,
)
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = [
    "CACHE_CHANGES_TOKENS",
    "CAUSAL_TYPES",
    "GENERATE_FAILS",
    "OTHER_TYPES",
    "UNBUILDABLE",
    "VARIANTS",
    "VOCABULARY",
    "model_inputs",
    "tiny_config",
    "tiny_model",
]

LARGEST = 3_000_000  # parameters: more means that a size was missed

CAUSAL_TYPES: list[str] = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in UNBUILDABLE]
# Composite types whose causal class takes the config of one part only.
CAUSAL_PART = {"musicgen": "decoder", "musicgen_melody": "decoder"}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The config of `model_type`, or of a variant of it (`type@variant`), with every size made small."""
    return _shrunk(CONFIG_MAPPING[model_type.partition("@")[0]], {**VARIANTS.get(model_type, {}), **changes})


def _shrunk(config_class: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    default = config_class()
    fields = {field.name for field in dataclasses.fields(config_class)}
    lists = {name for name, value in vars(default).items() if isinstance(value, list | tuple)}  # one size a stage
    values = {name: size for name, size in SIZES.items() if name in fields - lists}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention expands to all heads
    own = {**OVERRIDES.get(config_class.model_type, {}), **changes}
    for name in config_class.sub_configs:
        nested = getattr(default, name, None)
        if isinstance(nested, PreTrainedConfig):  # not those that are optional and absent
            own[name] = _shrunk(type(nested), own.get(name, {}))
    return config_class(**{**values, **own})


def tiny_model(model_type: str, auto_class: Any = None, **changes: Any) -> PreTrainedModel:
    """A model in eval mode whose float32 weights are random, biases and norms included, and the same at every call.

    Args:
        model_type: A type of transformers, or `type@variant` of VARIANTS.
        auto_class: The transformers auto class that builds it, or its name; by default AutoModelForCausalLM for
            CAUSAL_TYPES, otherwise what OTHER_TYPES says.
        changes: Fields of the config.

    Raises:
        ValueError: If it would have more than LARGEST parameters; nothing of that size is initialised.
    """
    plain = model_type.partition("@")[0]
    if auto_class is None:
        auto_class = "AutoModelForCausalLM" if plain in CAUSAL_TYPES else OTHER_TYPES[plain]
    if isinstance(auto_class, str):
        auto_class = getattr(transformers, auto_class)
    config = tiny_config(model_type, **changes)
    build = auto_class.from_config
    if auto_class is transformers.AutoModelForCausalLM:
        if plain in CAUSAL_PART:
            build = auto_class._model_mapping[type(config)]._from_config
            config = getattr(config, CAUSAL_PART[plain])
        if hasattr(config, "is_decoder"):
            config.is_decoder = True  # else the bert-like ones look ahead
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.random.fork_rng(devices=[]), _limited(model_type):
            torch.manual_seed(0)
            model = build(config).float().eval()
            _randomise(model)
    if model.can_generate():
        generation = model.generation_config
        generation.eos_token_id = None  # always as many tokens as asked for
        generation.forced_bos_token_id = generation.forced_eos_token_id = None
        generation.suppress_tokens = [SIZES[f"{kind}_token_id"] for kind in ("image", "video", "audio")]
        generation.num_return_sequences = 1  # musicgen multiplies by it
        generation.bos_token_id = 1 if generation.bos_token_id is None else generation.bos_token_id
        generation.pad_token_id = 0 if generation.pad_token_id is None else generation.pad_token_id
        generation.decoder_start_token_id = generation.bos_token_id
    return model


@contextmanager
def _limited(model_type: str) -> Iterator[None]:
    """Raise before a model of more than LARGEST parameters is initialised; tied ones are registered twice."""
    size = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal size
        size += 0 if parameter is None else parameter.numel()
        if size > 2 * LARGEST:
            raise ValueError(f"{model_type} has over {LARGEST:,} parameters: shrink more of its config")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Weights large enough that what every layer does is seen in the output; nothing stays at zero or one."""
    owner = {parameter: module for module in model.modules() for parameter in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.dim() < 2:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        elif parameter.numel() and parameter.abs().max() < 0.5 and parameter.std() < 0.1:
            # Not what has a scale of its own, like the decay rates of a state space.
            convolution = isinstance(owner[parameter], nn.Conv1d | nn.Conv2d | nn.Conv3d)
            inputs = parameter[0].numel() if convolution else parameter.shape[-1]
            parameter.normal_(std=inputs**-0.5)


# Type of OTHER_TYPES that takes images beside text → how many placeholder tokens an image has in the text.
IMAGE_TOKENS: dict[str, int] = {
    **dict.fromkeys(["altclip", "blip", "chinese_clip", "clip", "clipseg", "flava", "groupvit", "owlvit", "siglip"], 0),
    **dict.fromkeys(["aya_vision", "blip-2", "idefics3", "instructblip", "internvl", "mistral3", "smolvlm"], 4),
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], 4),
    **{"llava": 16, "paligemma": 16, "vilt": 0},
}

_TOKENS = -1  # as many as the text has
_PATCHES: dict[str, Any] = {"pixel_values": (16, 192), "pixel_attention_mask": [1] * 16, "spatial_shapes": [4, 4]}
_GRID: dict[str, Any] = {"pixel_values": (16, 384), "image_grid_thw": [1, 4, 4]}
# Type → input that the general rules don't give → its shape without the batch, or, as a list, its values.
MORE_INPUTS: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"input_values": (32, 16)},
    "bros": {"bbox": (_TOKENS, 4)},
    "decision_transformer": {
        "states": (8, 17),
        "actions": (8, 4),
        "rewards": (8, 1),
        "returns_to_go": (8, 1),
        "timesteps": list(range(8)),
    },
    "idefics3": {"pixel_values": (1, 3, 32, 32)},
    "instructblip": {"qformer_input_ids": [5, 6, 7]},
    "lxmert": {"visual_feats": (5, 16), "visual_pos": (5, 4)},
    "mistral3": {"image_sizes": [32, 32]},
    "parakeet_encoder": {"input_features": (64, 16)},
    "patchtsmixer": {"past_values": (32, 1)},
    "patchtst": {"past_values": (32, 1)},
    "qwen2_5_vl": _GRID,
    "qwen2_vl": _GRID,
    "qwen3_vl": _GRID,
    "seggpt": dict.fromkeys(["pixel_values", "prompt_pixel_values", "prompt_masks"], (3, 32, 32)),
    "siglip2": _PATCHES,
    "siglip2_vision_model": _PATCHES,
    "smolvlm": {"pixel_values": (1, 3, 32, 32)},
    "speech_to_text": {"input_features": (32, 16)},
    "vjepa2": {"pixel_values_videos": (4, 3, 32, 32)},
    "wav2vec2-bert": {"input_features": (32, 16)},
}


class _Source:
    """Seeded random tensors."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def ids(self, *shape: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY - 6, shape, generator=self.generator)  # no special token of SIZES

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)


def model_inputs(model: PreTrainedModel, batch: int = 2, tokens: int = 8) -> dict[str, Any]:
    """What `model(**inputs)` needs; the same at every call.

    Args:
        model: A model of `tiny_model`.
        batch: Rows.
        tokens: Tokens of text in a row, the placeholders of an image not counted.

    Returns:
        Name → tensor; gemma4_unified_assistant takes a dictionary of pairs as well.
    """
    source = _Source()
    config = model.config
    if config.model_type == "gemma4_unified_assistant":
        return _drafter_inputs(config, source, batch, tokens)
    if config.model_type in ("musicgen_decoder", "musicgen_melody_decoder"):
        batch *= config.num_codebooks
    inputs = _text_inputs(model, source, batch, tokens)
    if config.model_type in IMAGE_TOKENS or model.main_input_name == "pixel_values":
        inputs["pixel_values"] = source.noise(batch, *_image_shape(getattr(config, "vision_config", config)))
    elif model.main_input_name == "input_values":
        inputs["input_values"] = source.noise(batch, 2000)
    elif model.main_input_name == "input_features":
        inputs["input_features"] = source.noise(batch, SIZES["num_mel_bins"], 2 * SIZES["max_source_positions"])
    for name, shape in MORE_INPUTS.get(config.model_type, {}).items():
        if isinstance(shape, list):
            inputs[name] = torch.tensor([shape] * batch)
        else:
            inputs[name] = source.noise(batch, *(tokens if size == _TOKENS else size for size in shape))
    if "image_grid_thw" in inputs:  # the patches of all images in one row
        inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == SIZES["image_token_id"]).int()
    return inputs


def _text_inputs(model: PreTrainedModel, source: _Source, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    takes = inspect.signature(model.forward).parameters
    inputs = {}
    if "input_ids" in takes:
        image = torch.full((batch, IMAGE_TOKENS.get(model.config.model_type, 0)), SIZES["image_token_id"])
        inputs["input_ids"] = torch.cat([image, source.ids(batch, tokens)], dim=1)
    if model.config.is_encoder_decoder and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = source.ids(batch, tokens)
    return inputs


def _image_shape(config: PreTrainedConfig) -> tuple[int, ...]:
    size = getattr(config, "image_size", SIZES["image_size"])
    height, width = size if isinstance(size, list | tuple) else (size, size)
    frames = [config.num_frames] if hasattr(config, "num_frames") else []
    return (*frames, getattr(config, "num_channels", SIZES["num_channels"]), height, width)


def _drafter_inputs(config: PreTrainedConfig, source: _Source, batch: int, tokens: int) -> dict[str, Any]:
    """Embeddings, and the keys and values, of the model that a drafter assists."""
    text = config.text_config
    return {
        "inputs_embeds": source.noise(batch, tokens, 2 * config.backbone_hidden_size),
        "shared_kv_states": {
            kind: source.noise(2, batch, layer.num_key_value_heads, tokens, layer.head_dim).unbind()
            for kind, layer in zip(text.layer_types, text.per_layer_config, strict=True)
        },
    }

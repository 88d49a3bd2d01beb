"""A tiny random model of any architecture that transformers ships, built from its config class, no network needed."""

import dataclasses
import inspect
import warnings
from typing import Any

import torch
import transformers
from tiny_model_overrides import (
    GENERATE_FAILS,
    IMAGE_TOKENS,
    MORE_INPUTS,
    OTHER_TYPES,
    OVERRIDES,
    SIZES,
    UNBUILDABLE,
    VARIANTS,
    VOCABULARY,
)
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = [
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
    values = {name: size for name, size in SIZES.items() if name in fields and _is_scalar(getattr(default, name))}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention expands to all heads
    own = {**OVERRIDES.get(config_class.model_type, {}), **changes}
    for name in config_class.sub_configs:
        nested = getattr(default, name, None)
        if isinstance(nested, PreTrainedConfig):  # not those that are optional and absent
            own[name] = _shrunk(type(nested), own.get(name, {}))
    return config_class(**{**values, **own})


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, list | tuple)  # a size of each stage needs an override


def tiny_model(model_type: str, auto_class: Any = None, **changes: Any) -> PreTrainedModel:
    """A model in eval mode whose float32 weights are random, biases and norms included, and the same at every call.

    Args:
        model_type: A type of transformers, or `type@variant` of VARIANTS.
        auto_class: The transformers auto class that builds it, or its name; by default AutoModelForCausalLM for
            CAUSAL_TYPES, otherwise what OTHER_TYPES says.
        changes: Fields of the config.

    Raises:
        ValueError: If it would have more than LARGEST parameters; nothing of that size is allocated.
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
        with torch.device("meta"):
            size = build(config).num_parameters()
        if size > LARGEST:
            raise ValueError(f"{model_type}: {size:,} parameters, at most {LARGEST:,} wanted: shrink more of {config}")
        torch.manual_seed(0)
        model = build(config).float().eval()
    _randomise(model)
    if model.can_generate():
        generation = model.generation_config
        generation.eos_token_id = None  # always as many tokens as asked for
        generation.num_return_sequences = 1  # musicgen multiplies by it
        generation.bos_token_id = 1 if generation.bos_token_id is None else generation.bos_token_id
        generation.pad_token_id = 0 if generation.pad_token_id is None else generation.pad_token_id
        generation.decoder_start_token_id = generation.bos_token_id
    return model


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Weights large enough that what every layer does is seen in the output; nothing stays at zero or one."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.dim() < 2:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        elif (
            parameter.numel() and parameter.abs().max() < 0.5 and parameter.std() < 0.1
        ):  # so not the decay rates of a state space
            parameter.normal_(std=0.15)


def model_inputs(model: PreTrainedModel, batch: int = 2, tokens: int = 8) -> dict[str, Any]:
    """What `model(**inputs)` needs; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    config = model.config

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY - 6, shape, generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if config.model_type == "gemma4_unified_assistant":  # drafts from the states of the model that it assists
        text = config.text_config
        states = {
            kind: noise(2, batch, layer.num_key_value_heads, tokens, layer.head_dim).unbind()
            for kind, layer in zip(text.layer_types, text.per_layer_config, strict=True)
        }
        return {"inputs_embeds": noise(batch, tokens, 2 * config.backbone_hidden_size), "shared_kv_states": states}
    if config.model_type in ("musicgen_decoder", "musicgen_melody_decoder"):
        return {"input_ids": ids(batch * config.num_codebooks, tokens)}

    kind = config.model_type
    takes = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    if "input_ids" in takes:
        image = torch.full((batch, IMAGE_TOKENS.get(kind, 0)), SIZES["image_token_id"])
        inputs["input_ids"] = torch.cat([image, ids(batch, tokens)], dim=1)
    if config.is_encoder_decoder and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = ids(batch, tokens)
    if kind in IMAGE_TOKENS or model.main_input_name == "pixel_values":
        inputs["pixel_values"] = noise(batch, *_image_shape(getattr(config, "vision_config", config)))
    elif model.main_input_name == "input_values":
        inputs["input_values"] = noise(batch, 2000)
    elif model.main_input_name == "input_features":
        inputs["input_features"] = noise(batch, 16, 128)
    for name, shape in MORE_INPUTS.get(kind, {}).items():
        if isinstance(shape, list):
            inputs[name] = torch.tensor([shape] * batch)
        else:
            inputs[name] = noise(batch, *(tokens if size == "tokens" else size for size in shape))
    if "image_grid_thw" in inputs:  # the patches of all images in one row
        inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == SIZES["image_token_id"]).int()
    return inputs


def _image_shape(config: PreTrainedConfig) -> tuple[int, ...]:
    size = getattr(config, "image_size", 32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    frames = [config.num_frames] if hasattr(config, "num_frames") else []
    return (*frames, getattr(config, "num_channels", 3), height, width)

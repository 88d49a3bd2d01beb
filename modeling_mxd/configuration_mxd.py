"""Configuration of a decomposition: which MLPs of which model, and the layer that stands for each.

Parameter names follow transformers (`hidden_size`, `num_experts`, `num_experts_per_tok`, `hidden_act`).
"""

import json
import os
import re
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig  # by the name that transformers 4 knows too
from transformers.activations import ACT2FN

FORMAT_VERSION = 1
METHODS = ("mxd", "transcoder", "skip_transcoder")
ENCODER_TYPES = ("mlp", "glu")
_LEARNED_ACTIVATIONS = ("prelu", "xielu")
# Token and expert indices are sorted as one flat int64 range, and safetensors shapes are read from files
# that strangers wrote: no real layer comes near this.
MAX_SIZE = 2**31 - 1
MAX_NAME = 4096
MAX_LAYERS = 1024
MAX_FILE_BYTES = 10_000_000
# The base of the library's demo: it looks like a Hub id and is none, and whoever registered it would be loaded.
DEMO_MODEL = "mxd/embedded-default"

# Transformers' own names, which in a decomposition's config could only do harm.
_FOREIGN = ("quantization_config", "transformers_weights", "configuration_files")

# `-1` is the last item of a list, `*` stands for the numbers of a list of lists.
_PATH = r"[A-Za-z_]\w*(\.(\w+|-1))*"
_SITE = re.compile(rf"{_PATH}(, ?{_PATH})*", re.ASCII)
_STACK = re.compile(r"[A-Za-z_]\w*(\.(\w+|\*))*", re.ASCII)

AUTO_MAP = {
    "AutoConfig": "configuration_mxd.MxDConfig",
    "AutoModel": "modeling_mxd.MxDModel",
    "AutoModelForCausalLM": "modeling_mxd.MxDForCausalLM",
}


def _listed(layers: Any) -> list[int]:
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ValueError(f"layers must be a list of layer indices, got {shorten(layers)}")
    return list(layers)


def shorten(value: Any) -> str:
    """For a message: of what a stranger's file holds, however large, only the start."""
    return reprlib.repr(value)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size.

    Raises:
        ValueError: the file is too large, is not JSON or is not an object.
    """
    if os.stat(path).st_size > MAX_FILE_BYTES:  # noqa: PTH116, transformers passes a str or a path
        raise ValueError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes: it is not read")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON, or is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _check_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
        raise ValueError(f"{name} must be a whole number from 1 to {MAX_SIZE}, got {shorten(value)}")


@dataclass(frozen=True)
class MxDLayerConfig:
    """Sizes and form of one layer; refuses nonsense when built.

    Attributes:
        hidden_size: width I of the MLP's input.
        output_size: width O of the MLP's output.
        intermediate_size: hidden units H of the dense encoder (ignored by the transcoders).
        num_experts: experts N of an MxD, latents of a transcoder.
        num_experts_per_tok: K, at most this many coefficients of a token are non-zero.
        hidden_act: activation of the dense encoder, a name in transformers' `ACT2FN`.
        encoder_type: `"mlp"` for z = act(Ex + e), `"glu"` for z = act(Ex + e) * (Ux + u).
        method: `"mxd"`, `"transcoder"` or `"skip_transcoder"`.
        gate_bias: whether the gate has the bias g.
        encoder_bias: whether the encoder has the biases e and u.
        output_bias: whether the output has the bias b.
        num_expert_groups: groups G of neighbouring experts that a router chooses from, see `hierarchical_routing`; √N
            or so. None for the exact gate, which scores every expert.
        num_groups_per_tok: groups M that each token opens, from fast (few) to exact (all).

    Raises:
        ValueError: naming the field, what was given and what is allowed.
    """

    hidden_size: int
    output_size: int
    intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    hidden_act: str = "gelu"
    encoder_type: str = "mlp"
    method: str = "mxd"
    gate_bias: bool = True
    encoder_bias: bool = True
    output_bias: bool = True
    num_expert_groups: int | None = None
    num_groups_per_tok: int | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "output_size", "intermediate_size", "num_experts", "num_experts_per_tok"):
            _check_size(name, getattr(self, name))
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed num_experts ({self.num_experts})"
            )
        for name, allowed in (("method", METHODS), ("encoder_type", ENCODER_TYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {shorten(getattr(self, name))}")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act must be a name in transformers.activations.ACT2FN "
                f"(such as gelu, gelu_new, silu, relu), got {shorten(self.hidden_act)}"
            )
        if self.hidden_act in _LEARNED_ACTIVATIONS:
            raise ValueError(f"hidden_act must not have parameters of its own, got {shorten(self.hidden_act)}")
        for name in ("gate_bias", "encoder_bias", "output_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {shorten(getattr(self, name))}")
        self._check_groups()

    def _check_groups(self) -> None:
        groups, opened = self.num_expert_groups, self.num_groups_per_tok
        if (groups is None) != (opened is None):
            raise ValueError(
                f"num_expert_groups ({shorten(groups)}) and num_groups_per_tok ({shorten(opened)}) go together: "
                "give both, or neither for a gate without groups"
            )
        if groups is None or opened is None:
            return
        _check_size("num_expert_groups", groups)
        _check_size("num_groups_per_tok", opened)
        if opened > groups:
            raise ValueError(f"num_groups_per_tok ({opened}) must not exceed num_expert_groups ({groups})")
        size = self.expert_group_size
        in_last = self.num_experts - (groups - 1) * size
        if in_last < 1:
            raise ValueError(
                f"num_expert_groups ({groups}) groups of {size} are more than num_experts ({self.num_experts}) fill: "
                f"use {-(-self.num_experts // size)}"
            )
        if (opened - 1) * size + in_last < self.num_experts_per_tok:
            raise ValueError(
                f"num_groups_per_tok ({opened}) groups may hold {(opened - 1) * size + in_last} experts, fewer than "
                f"num_experts_per_tok ({self.num_experts_per_tok}): open more, or use larger groups"
            )

    @property
    def expert_group_size(self) -> int:
        """Experts in every group but the last, which may have fewer; without groups all."""
        return -(-self.num_experts // (self.num_expert_groups or 1))

    @property
    def num_parameters(self) -> int:
        """Trainable parameters: gate N·I (+N), expert table N·O, what the method adds, output bias O, router."""
        inputs, outputs, units, experts = self.hidden_size, self.output_size, self.intermediate_size, self.num_experts
        count = experts * (inputs + outputs) + experts * self.gate_bias + outputs * self.output_bias
        count += (self.num_expert_groups or 0) * (inputs + 1)
        if self.method == "mxd":
            halves = 2 if self.encoder_type == "glu" else 1
            count += halves * units * (inputs + self.encoder_bias) + units * outputs
        elif self.method == "skip_transcoder":
            count += inputs * outputs
        return count


_LAYER_FIELDS = tuple(field.name for field in fields(MxDLayerConfig))


class MxDConfig(PretrainedConfig):
    """A decomposition of some MLPs of one base model.

    The layer fields given at the top hold for every layer; `layer_overrides` changes some of them for single
    layers. `config.layer(8)` is the resolved `MxDLayerConfig` of layer 8.

    Args:
        layers: indices of the base model's decomposed layers, each at most once.
        base_model_name_or_path: Hub id or folder of the base model.
        base_model_revision: commit of the base model on the Hub, if it came from there.
        base_model_type: `model_type` of the base model; another one is refused when splicing.
        base_hidden_act: activation of the base model's MLPs; another one is refused when splicing.
        vocab_size, num_attention_heads: of the base model, whose config class PEFT reads ours with.
        site: which function of the layer is decomposed: `"mlp"` for the layer's main MLP, from its input (after the
            layer norm) to its output (before the residual is added); or the dotted paths, from the layer, of other
            modules that make up one, separated by commas (`"mlp.experts"`, `"shared_mlp"`, `"fc1,act,fc2"`).
        stack: which list of transformer layers `layers` counts: None for the language model's (the decoder's of an
            encoder–decoder model), `"encoder"`, `"decoder"`, or the list's dotted path.
        hidden_size, output_size, intermediate_size, num_experts, num_experts_per_tok, hidden_act, encoder_type,
        method, gate_bias, encoder_bias, output_bias, num_expert_groups, num_groups_per_tok: see `MxDLayerConfig`.
            `output_size` defaults to `hidden_size`, `intermediate_size` to four times `hidden_size`.
        layer_overrides: `{"8": {"num_experts": 1024}}`, layer index (as text, since JSON has no other keys) to
            the fields that differ there.

    Raises:
        ValueError: naming the field, and the layer where it is one layer's.

    Example:
        >>> config = MxDConfig(layers=[8, 9], hidden_size=768, num_experts=21490, num_experts_per_tok=32)
        >>> config.layer(9).num_experts
        21490
    """

    model_type = "mxd"

    def __init__(
        self,
        layers: Sequence[int] = (),
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        base_model_type: str | None = None,
        base_hidden_act: str | None = None,
        vocab_size: int | None = None,
        num_attention_heads: int | None = None,
        site: str = "mlp",
        stack: str | None = None,
        hidden_size: int = 768,
        output_size: int | None = None,
        intermediate_size: int | None = None,
        num_experts: int = 4096,
        num_experts_per_tok: int = 32,
        hidden_act: str = "gelu",
        encoder_type: str = "mlp",
        method: str = "mxd",
        gate_bias: bool = True,
        encoder_bias: bool = True,
        output_bias: bool = True,
        num_expert_groups: int | None = None,
        num_groups_per_tok: int | None = None,
        layer_overrides: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ):
        if format_version != FORMAT_VERSION:
            raise ValueError(f"this decomposition was saved by a newer mxd (format {shorten(format_version)})")
        self.format_version = format_version
        self.layers = _listed(layers)
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.base_model_type = base_model_type
        self.base_hidden_act = base_hidden_act
        self.vocab_size = vocab_size
        self.num_attention_heads = num_attention_heads
        self.site = site
        self.stack = stack
        self.hidden_size = hidden_size
        self.output_size = hidden_size if output_size is None else output_size
        # A hidden_size that is no number is refused below, by name.
        default = 4 * hidden_size if isinstance(hidden_size, int) else hidden_size
        self.intermediate_size = default if intermediate_size is None else intermediate_size
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.hidden_act = hidden_act
        self.encoder_type = encoder_type
        self.method = method
        self.gate_bias = gate_bias
        self.encoder_bias = encoder_bias
        self.output_bias = output_bias
        self.num_expert_groups = num_expert_groups
        self.num_groups_per_tok = num_groups_per_tok
        overrides = {} if layer_overrides is None else layer_overrides
        if not isinstance(overrides, Mapping) or not all(isinstance(value, Mapping) for value in overrides.values()):
            raise ValueError(
                f"layer_overrides must map layers to the fields that differ there, got {shorten(overrides)}"
            )
        self.layer_overrides = {str(key): dict(value) for key, value in overrides.items()}
        self.check()
        self._check_stock(kwargs)
        try:
            super().__init__(**kwargs)
        except (AttributeError, TypeError) as error:  # transformers' own fields, of another type than it expects
            raise ValueError(f"the configuration cannot be read: {shorten(str(error))}") from None
        # Saving a class writes only its own entry: every copy names all doors.
        self.auto_map = dict(AUTO_MAP)

    def check(self) -> None:
        """Refuse nonsense, as when built: for a config of which fields were set later.

        Raises:
            ValueError: naming the field, and the layer where it is one layer's.
        """
        if len(self.layers) > MAX_LAYERS:
            raise ValueError(f"layers must be at most {MAX_LAYERS}, got {len(self.layers)}")
        for layer in self.layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= MAX_SIZE:
                raise ValueError(
                    f"layers must be whole numbers from 0 to {MAX_SIZE}, got {shorten(layer)} in {shorten(self.layers)}"
                )
        repeated = [layer for layer, times in Counter(self.layers).items() if times > 1]
        if repeated:
            raise ValueError(f"layers names layer {min(repeated)} more than once: {shorten(self.layers)}")
        if not isinstance(self.site, str) or len(self.site) > MAX_NAME or not _SITE.fullmatch(self.site):
            raise ValueError(
                "site must be 'mlp', or dotted paths of modules in a transformer layer, separated by commas, got "
                f"{shorten(self.site)}"
            )
        stack_fits = isinstance(self.stack, str) and len(self.stack) <= MAX_NAME and _STACK.fullmatch(self.stack)
        if self.stack is not None and not stack_fits:
            raise ValueError(
                "stack must be None, 'encoder', 'decoder' or the dotted path of a list of transformer layers, got "
                f"{shorten(self.stack)}"
            )
        self._check_names()
        self._check_overrides()
        # Also without layers the shared fields are checked, so that a mistake shows where it is made.
        MxDLayerConfig(**{name: getattr(self, name) for name in _LAYER_FIELDS})
        for layer in self.layers:
            try:
                self.layer(layer)
            except ValueError as error:
                raise ValueError(f"layer {layer}: {error}") from None

    def _check_names(self) -> None:
        for name in ("base_model_name_or_path", "base_model_revision", "base_model_type", "base_hidden_act"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME or not value.isprintable():
                raise ValueError(
                    f"{name} must be a text of at most {MAX_NAME} printable characters, got {shorten(value)}"
                )
        for name in ("vocab_size", "num_attention_heads"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (not whole or not 1 <= value <= MAX_SIZE):
                raise ValueError(f"{name} must be a whole number from 1 to {MAX_SIZE}, got {shorten(value)}")

    def _check_stock(self, values: Mapping[str, Any]) -> None:
        """Refuse what transformers would take from a config file without a question: names of methods, a label for
        each of 10^12 classes, weights of another format or place."""
        for name in values:
            known = getattr(type(self), name, None)
            unset = isinstance(known, property) and known.fset is None
            if unset or callable(known) or isinstance(known, dict | list | tuple) or name in _FOREIGN:
                raise ValueError(f"{shorten(name)} is no field that a decomposition's config can set")
        if values.get("num_labels") not in (None, 2):  # 2 is what transformers assumes without labels
            raise ValueError(f"num_labels: a decomposition has no labels, got {shorten(values['num_labels'])}")
        for name in ("dtype", "torch_dtype"):
            dtype = values.get(name)
            dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
            if values.get(name) is not None and not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name} must name a dtype of torch, got {shorten(values[name])}")

    def _check_overrides(self) -> None:
        unknown = sorted(set(self.layer_overrides) - {str(layer) for layer in self.layers})
        if unknown:
            raise ValueError(
                f"layer_overrides names layer {shorten(unknown[0])}, which is not in layers {shorten(self.layers)}"
            )
        for key, override in self.layer_overrides.items():
            odd = sorted(set(override) - set(_LAYER_FIELDS))
            if odd:
                raise ValueError(f"layer_overrides[{key!r}] has the unknown field {shorten(odd[0])}")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        # How transformers reads it when it is asked for this class; a stranger may have written it.
        if os.stat(json_file).st_size > MAX_FILE_BYTES:  # noqa: PTH116, transformers gives a text or a path
            raise ValueError(f"{json_file} is larger than {MAX_FILE_BYTES:,} bytes: it is not read")
        try:
            values = super()._dict_from_json_file(json_file)
        except RecursionError:
            raise ValueError(f"{json_file} is too deep to be a configuration") from None
        if not isinstance(values, dict):
            raise ValueError(f"{json_file} must hold a JSON object, got {type(values).__name__}")
        return values

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if "format_version" not in config_dict:
            raise ValueError("this decomposition was saved by a version before the first release: decompose again")
        return super().from_dict(config_dict, **kwargs)

    def keep_layers(self, layers: Sequence[int]) -> None:
        """Name only these layers.

        Raises:
            ValueError: when `layers` is nonsense.
        """
        self.layers = _listed(layers)
        kept = {str(layer) for layer in self.layers}
        self.layer_overrides = {key: value for key, value in self.layer_overrides.items() if key in kept}
        self.check()

    def layer(self, layer: int) -> MxDLayerConfig:
        """The resolved configuration of one layer.

        Raises:
            KeyError: when this decomposition has no such layer.
        """
        if layer not in self.layers:
            raise KeyError(f"layer {layer} is not in this decomposition, which has layers {self.layers}")
        values = {name: getattr(self, name) for name in _LAYER_FIELDS}
        return MxDLayerConfig(**{**values, **self.layer_overrides.get(str(layer), {})})

    @classmethod
    def from_layer_configs(cls, layer_configs: Mapping[int, MxDLayerConfig], **kwargs: Any) -> "MxDConfig":
        """Build the shortest config that resolves to `layer_configs`: the first layer's values are shared.

        Raises:
            ValueError: when `layer_configs` is empty.
        """
        if not layer_configs:
            raise ValueError("layer_configs is empty: name at least one layer")
        first = next(iter(layer_configs.values()))
        shared = {name: getattr(first, name) for name in _LAYER_FIELDS}
        overrides = {}
        for layer, layer_config in layer_configs.items():
            changed = {name: getattr(layer_config, name) for name in _LAYER_FIELDS}
            changed = {name: value for name, value in changed.items() if value != shared[name]}
            if changed:
                overrides[str(layer)] = changed
        return cls(layers=list(layer_configs), layer_overrides=overrides, **shared, **kwargs)

    @property
    def where(self) -> dict[str, Any]:
        """`stack` and `site`, as the functions of surgery take them."""
        return {"stack": self.stack, "site": self.site}

    @property
    def of_decoder(self) -> bool:
        """Whether the stack is a decoder's."""
        return self.stack is not None and "decoder" in self.stack

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of all layers."""
        return sum(self.layer(layer).num_parameters for layer in self.layers)

    def check_memory(self, dtype: torch.dtype) -> None:
        """Refuse sizes that this machine cannot hold, before anything is allocated.

        Raises:
            ValueError: naming the layer with the most parameters and its sizes.
        """
        needed, held = self.num_parameters * dtype.itemsize, machine_memory()
        if needed > held:
            largest = max(self.layers, key=lambda layer: self.layer(layer).num_parameters)
            sizes = self.layer(largest)
            raise ValueError(
                f"the decomposition needs {needed / 2**30:,.1f} GiB for its parameters, this machine has "
                f"{held / 2**30:,.1f} GiB; reduce num_experts ({sizes.num_experts}), hidden_size "
                f"({sizes.hidden_size}) or intermediate_size ({sizes.intermediate_size}) of layer {largest}"
            )


def machine_memory() -> int:
    """Bytes of physical memory and of all GPUs together."""
    total = 0
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        total += sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    # Where the system does not say, only what no machine holds is refused.
    return total or 2**46

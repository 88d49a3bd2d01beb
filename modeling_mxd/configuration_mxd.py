"""Configuration of a decomposition: which MLPs of which model it replaces, and by which layers."""

import copy
import inspect
import json
import math
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

# Version of what a repo stores. Raise it with every change that this code's readers would misread.
FORMAT_VERSION = 1
METHODS = ("mxd", "transcoder", "skip_transcoder")
ENCODER_TYPES = ("mlp", "glu")
_LEARNED_ACTIVATIONS = ("prelu", "xielu")
_SIZES = ("num_output_layers", "hidden_size", "output_size", "intermediate_size", "num_experts", "num_experts_per_tok")
# Token and expert indices are sorted as one flat int64 range.
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1024
MAX_FILE_BYTES = 10_000_000
# The base model of the library's demo. It looks like a Hub id, and whoever registered it would be loaded.
DEMO_MODEL = "mxd/embedded-default"

# Fields that transformers, its Trainer or PEFT may add to any config; each version knows others.
_STOCK_FIELDS = frozenset(PretrainedConfig().to_dict()) | {
    "architectures", "auto_map", "dtype", "torch_dtype", "model_type", "transformers_version", "name_or_path",
    "attn_implementation", "experts_implementation", "output_attentions", "output_hidden_states", "return_dict",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id",
    "tie_word_embeddings", "is_decoder", "torchscript", "use_bfloat16", "pruned_heads", "task_specific_params",
}  # fmt: skip

# `*` stands for the numbers of a list of lists.
_PATH = r"[A-Za-z_]\w*(\.\w+)*"
_SITE = re.compile(rf"{_PATH}(, ?{_PATH})*", re.ASCII)
_STACK = re.compile(r"[A-Za-z_]\w*(\.(\w+|\*))*", re.ASCII)

AUTO_MAP = {
    "AutoConfig": "configuration_mxd.MxDConfig",
    "AutoModel": "modeling_mxd.MxDModel",
    "AutoModelForCausalLM": "modeling_mxd.MxDForCausalLM",
}


def shorten(value: Any) -> str:
    """Shorten an untrusted value for an error message."""
    return reprlib.repr(value)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object from a file, or raise a ValueError if it is none, repeats a key, or is too large."""
    if os.stat(path).st_size > MAX_FILE_BYTES:  # noqa: PTH116, transformers passes a str or a path
        raise ValueError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes: it is not read")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except KeyError as error:
        raise ValueError(f"{path} names {shorten(error.args[0])} twice: keep one of them") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON, or is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):  # readers differ in which one they take
        raise KeyError(next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place])))
    return values


def _as_list(layers: Any) -> list[int]:
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ValueError(f"layers must be a list of layer indices, got {shorten(layers)}")
    return list(layers)


def _check_size(name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise ValueError(f"{name} must be a whole number from 1 to {MAX_SIZE}, got {shorten(value)}")


@dataclass(frozen=True)
class MxDLayerConfig:
    """Hold the sizes and form of one layer. A field that has a value which is not allowed raises a ValueError.

    Attributes:
        hidden_size, output_size: widths I and O of the MLP's input and output.
        intermediate_size: hidden units H of the dense encoder (ignored by the transcoders).
        num_experts: experts N of an MxD, latents of a transcoder.
        num_experts_per_tok: K, at most this many coefficients of a token are non-zero.
        hidden_act: activation of the dense encoder, a name in transformers' `ACT2FN`.
        encoder_type: `"mlp"` for z = act(Ex + e), `"glu"` for z = act(Ex + e) * (Ux + u).
        method: `"mxd"`, `"transcoder"` or `"skip_transcoder"`.
        gate_bias, encoder_bias, output_bias: whether there are the biases g, e (and u), b.
        num_expert_groups: groups G of neighbouring experts that a router chooses from (about √N), see
            `functional`. None for the exact gate, which scores every expert.
        num_groups_per_tok: groups M that each token opens, from fast (few) to exact (all).
        num_output_layers: neighbouring MLPs J that the layer writes to, from its own on. `output_size` is the width of
            their outputs joined.
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
    num_output_layers: int = 1

    def __post_init__(self) -> None:
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        if self.num_output_layers > MAX_LAYERS or self.output_size % self.num_output_layers:
            wrong = f"num_output_layers ({self.num_output_layers}) must divide output_size ({self.output_size})"
            raise ValueError(f"{wrong}, and be at most {MAX_LAYERS}")
        experts, k = self.num_experts, self.num_experts_per_tok
        if k > experts:
            raise ValueError(f"num_experts_per_tok ({k}) must not exceed num_experts ({experts})")
        for name, allowed in (("method", METHODS), ("encoder_type", ENCODER_TYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {shorten(getattr(self, name))}")
        act = self.hidden_act
        if not isinstance(act, str) or act not in ACT2FN or act in _LEARNED_ACTIVATIONS:
            raise ValueError(f"hidden_act must be in transformers' ACT2FN and without parameters, got {shorten(act)}")
        for name in ("gate_bias", "encoder_bias", "output_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {shorten(getattr(self, name))}")
        self._check_groups()

    def _check_groups(self) -> None:
        groups, opened = self.num_expert_groups, self.num_groups_per_tok
        if groups is None and opened is None:
            return
        if groups is None or opened is None:
            given = f"num_expert_groups ({shorten(groups)}) and num_groups_per_tok ({shorten(opened)})"
            raise ValueError(f"{given} go together: give both, or neither for a gate without groups")
        _check_size("num_expert_groups", groups)
        _check_size("num_groups_per_tok", opened)
        size, experts = self.expert_group_size, self.num_experts
        fewest = experts - (groups - opened) * size  # in the open groups, the last among them
        if opened > groups:
            raise ValueError(f"num_groups_per_tok ({opened}) must not exceed num_expert_groups ({groups})")
        if experts <= (groups - 1) * size:
            wrong = f"num_expert_groups ({groups}) groups of {size} are more than num_experts ({experts}) fill"
            raise ValueError(f"{wrong}: use {-(-experts // size)}")
        if fewest < self.num_experts_per_tok:
            wrong = f"num_groups_per_tok ({opened}) groups may hold {fewest} experts, fewer than num_experts_per_tok"
            raise ValueError(f"{wrong} ({self.num_experts_per_tok}): open more, or use larger groups")

    @property
    def expert_group_size(self) -> int:
        """Experts of every group but the last, which may have fewer; N without groups."""
        return -(-self.num_experts // (self.num_expert_groups or 1))

    @property
    def weight_shapes(self) -> dict[str, list[int]]:
        """Name → shape of every weight of the layer, and of its buffers, `expert_frequency` and `expert_mean`."""
        inputs, outputs, units, experts = self.hidden_size, self.output_size, self.intermediate_size, self.num_experts
        linears = {"gate": (experts, inputs, self.gate_bias)}
        shapes = {"expert_frequency": [experts], "expert_mean": [experts]}
        if self.num_expert_groups is not None:
            linears["router"] = (self.num_expert_groups, inputs, True)
        if self.output_bias:
            shapes["output_bias"] = [outputs]
        if self.method == "mxd":
            shapes["modulation"] = [experts, outputs]
            linears |= {"encoder": (units, inputs, self.encoder_bias), "decoder": (outputs, units, False)}
            if self.encoder_type == "glu":
                linears["encoder_up"] = (units, inputs, self.encoder_bias)
        else:
            shapes["decoder"] = [experts, outputs]
            if self.method == "skip_transcoder":
                linears["skip"] = (outputs, inputs, False)
        for name, (rows, columns, bias) in linears.items():
            shapes |= {f"{name}.weight": [rows, columns]} | ({f"{name}.bias": [rows]} if bias else {})
        return shapes

    @property
    def num_parameters(self) -> int:
        """Trainable parameters: all weights but the two buffers."""
        return sum(map(math.prod, self.weight_shapes.values())) - 2 * self.num_experts


_LAYER_FIELDS = tuple(field.name for field in fields(MxDLayerConfig))


class MxDConfig(PretrainedConfig):
    """Describe a decomposition of some MLPs of one base model.

    The fields of `MxDLayerConfig` hold for every layer; `layer_overrides` changes some of them for single layers.

    Args:
        layers: indices of the base model's decomposed layers, each at most once.
        base_model_name_or_path, base_model_revision: Hub id or folder of the base model, and its commit on the Hub.
        base_model_type: `model_type` of the base model; splicing into another type is refused.
        base_hidden_act: activation of the base model's MLPs; a model whose config names only others is refused.
        vocab_size, num_attention_heads: of the base model. PEFT reads them.
        site: `"mlp"` for a layer's main MLP, from its input (after the layer norm) to its output (before the residual
            is added), or the dotted paths of the modules that make up another MLP; see `find_mlps`.
        stack: the list of transformer layers that `layers` counts; see `choose_stack`.
        hidden_size and the other fields of `MxDLayerConfig`: `output_size` defaults to `hidden_size` for each of the
            `num_output_layers`, `intermediate_size` to four times `hidden_size`. No two layers write to the same MLP.
        layer_overrides: `{"8": {"num_experts": 1024}}`, layer index as text to the fields that differ there.
        format_version: version of the stored format.

    Raises:
        ValueError: a field is unknown or has a value that is not allowed; the message names it, and its layer.
    """

    model_type = "mxd"

    def __init__(
        self, layers: Sequence[int] = (), base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None, base_model_type: str | None = None, base_hidden_act: str | None = None,
        vocab_size: int | None = None, num_attention_heads: int | None = None, site: str = "mlp",
        stack: str | None = None, hidden_size: int = 768, output_size: int | None = None,
        intermediate_size: int | None = None, num_experts: int = 4096, num_experts_per_tok: int = 32,
        hidden_act: str = "gelu", encoder_type: str = "mlp", method: str = "mxd", gate_bias: bool = True,
        encoder_bias: bool = True, output_bias: bool = True, num_expert_groups: int | None = None,
        num_groups_per_tok: int | None = None, num_output_layers: int = 1,
        layer_overrides: Mapping[str, Mapping[str, Any]] | None = None, format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ):  # fmt: skip
        _check_format(format_version, kwargs)
        given = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        for name, value in given.items():
            setattr(self, name, value)
        self.layers = _as_list(layers)
        if isinstance(hidden_size, int) and isinstance(num_output_layers, int):  # others are refused below, by name
            self.output_size = hidden_size * num_output_layers if output_size is None else output_size
            self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        overrides = {} if layer_overrides is None else layer_overrides
        if not isinstance(overrides, Mapping) or not all(isinstance(value, Mapping) for value in overrides.values()):
            raise ValueError(f"layer_overrides must map layers to fields, got {shorten(overrides)}")
        self.layer_overrides = {str(key): dict(value) for key, value in overrides.items()}
        self.check()
        try:
            super().__init__(**kwargs)
        except (AttributeError, TypeError) as error:  # transformers' own fields, of another type than it expects
            raise ValueError(f"the configuration cannot be read: {shorten(str(error))}") from None
        # transformers writes only the entry of the class that is saved; a copy needs all of them.
        self.auto_map = dict(AUTO_MAP)

    def check(self) -> None:
        """Check all fields again, after some were set."""
        if len(self.layers) > MAX_LAYERS:
            raise ValueError(f"layers must be at most {MAX_LAYERS}, got {len(self.layers)}")
        for layer in self.layers:
            if type(layer) is not int or not 0 <= layer <= MAX_SIZE:
                raise ValueError(f"layers must be whole numbers from 0 to {MAX_SIZE}, got {shorten(layer)}")
            if self.layers.count(layer) > 1:
                raise ValueError(f"layers names layer {layer} more than once: {shorten(self.layers)}")
        self._check_names()
        # The shared fields are checked even without layers, so that a mistake shows where it is made.
        MxDLayerConfig(**{name: getattr(self, name) for name in _LAYER_FIELDS})
        for key, override in self.layer_overrides.items():
            if key not in map(str, self.layers):
                raise ValueError(f"layer_overrides names layer {shorten(key)}, which is not in {shorten(self.layers)}")
            if odd := sorted(set(override) - set(_LAYER_FIELDS)):
                raise ValueError(f"layer_overrides[{key!r}] has the unknown field {shorten(odd[0])}")
            try:
                self.layer(int(key))
            except ValueError as error:
                raise ValueError(f"layer {key}: {error}") from None
        if twice := [layer for layer, count in Counter(self.written_layers()).items() if count > 1]:
            raise ValueError(f"several layers write to layer {twice[0]}: name layers that are num_output_layers apart")

    def _check_names(self) -> None:
        if not isinstance(self.site, str) or not _SITE.fullmatch(self.site):
            raise ValueError(f"site must be 'mlp', or dotted paths separated by commas, got {shorten(self.site)}")
        if self.stack is not None and not (isinstance(self.stack, str) and _STACK.fullmatch(self.stack)):
            wanted = "None, 'encoder', 'decoder' or the dotted path of a list"
            raise ValueError(f"stack must be {wanted}, got {shorten(self.stack)}")
        for name in ("base_model_name_or_path", "base_model_revision", "base_model_type", "base_hidden_act"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} must be text or None, got {shorten(getattr(self, name))}")
        for name in ("vocab_size", "num_attention_heads"):
            if getattr(self, name) is not None:
                _check_size(name, getattr(self, name))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the config that a file holds; raise a ValueError also if it has no `format_version`."""
        if "format_version" not in config_dict:
            raise ValueError("this decomposition was saved by a version before the first release: decompose again")
        if not kwargs.pop("return_unused_kwargs", False):
            return super().from_dict(dict(config_dict), **kwargs)
        # The Auto classes: `from_pretrained` tells the decomposition's arguments from the base model's.
        stock = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("_") or name == "name_or_path"}
        return super().from_dict(dict(config_dict), **stock), kwargs

    @classmethod
    def of_repo(cls, name: str, path: str, given: Any, kwargs: dict[str, Any]) -> "MxDConfig":
        """Return the config to load: a repo's or a copy of the given one, with the fields taken out of `kwargs`."""
        values = read_json(path)
        if values.get("model_type") != cls.model_type:
            kind = shorten(values.get("model_type"))
            raise ValueError(f"{name} holds a model of type {kind}, not a decomposition")
        config = cls.from_dict(values) if given is None else copy.deepcopy(given)
        there, layers = config.layers, kwargs.pop("layers", None)
        for field in inspect.signature(cls.__init__).parameters.keys() & kwargs.keys():
            setattr(config, field, kwargs.pop(field))
        config.layers = there if layers is None else _as_list(layers)
        kept = set(map(str, config.layers))
        config.layer_overrides = {key: value for key, value in config.layer_overrides.items() if key in kept}
        config.check()
        if not config.layers:
            raise ValueError("config.layers is empty: a decomposition needs at least one layer")
        if unknown := [layer for layer in config.layers if layer not in there]:
            raise ValueError(f"layer {unknown[0]} is not in the decomposition {name}, which has layers {there}")
        config.check_memory(torch.float8_e4m3fn)  # the narrowest dtype of weights
        return config

    def layer(self, layer: int) -> MxDLayerConfig:
        """Return the resolved configuration of one layer, or raise a KeyError."""
        if layer not in self.layers:
            raise KeyError(f"layer {layer} is not in this decomposition, which has layers {self.layers}")
        values = {name: getattr(self, name) for name in _LAYER_FIELDS}
        return MxDLayerConfig(**{**values, **self.layer_overrides.get(str(layer), {})})

    def written_layers(self, layer: int | None = None) -> list[int]:
        """Return the layers whose MLPs one layer of the decomposition, or all, write to."""
        layers = self.layers if layer is None else [layer]
        return [written + i for written in layers for i in range(self.layer(written).num_output_layers)]

    @classmethod
    def from_layer_configs(cls, layer_configs: Mapping[int, MxDLayerConfig], **kwargs: Any) -> "MxDConfig":
        """Build the shortest config that resolves to `layer_configs`: the first layer's values are shared."""
        if not layer_configs:
            raise ValueError("layer_configs is empty: name at least one layer")
        shared = vars(next(iter(layer_configs.values())))
        own = {str(layer): vars(config).items() - shared.items() for layer, config in layer_configs.items()}
        overrides = {layer: dict(sorted(fields)) for layer, fields in own.items() if fields}
        return cls(layers=list(layer_configs), layer_overrides=overrides, **shared, **kwargs)

    @property
    def where(self) -> dict[str, Any]:
        """`stack` and `site`, as keyword arguments of the surgery functions."""
        return {"stack": self.stack, "site": self.site}

    @property
    def of_decoder(self) -> bool:
        """Whether the stack is a decoder's."""
        return self.stack is not None and "decoder" in self.stack

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of all layers."""
        return sum(self.layer(layer).num_parameters for layer in self.layers)

    @property
    def weight_shapes(self) -> dict[str, list[int]]:
        """Name → shape of every weight that is saved."""
        return {f"layers.{i}.{name}": shape for i in self.layers for name, shape in self.layer(i).weight_shapes.items()}

    def check_memory(self, dtype: torch.dtype) -> None:
        """Raise a ValueError if this machine cannot hold the decomposition, before anything is allocated."""
        needed, held = self.num_parameters * dtype.itemsize / 2**30, machine_memory() / 2**30
        if needed > held:
            largest = max(self.layers, key=lambda layer: self.layer(layer).num_parameters)
            names = ("num_experts", "hidden_size", "intermediate_size")
            sizes = ", ".join(f"{name} ({getattr(self.layer(largest), name)})" for name in names)
            wrong = f"the decomposition needs {needed:,.1f} GiB for its parameters, this machine has {held:,.1f} GiB"
            raise ValueError(f"{wrong}: reduce {sizes} of layer {largest}")


def _check_format(version: Any, others: Mapping[str, Any]) -> None:
    """Check the format's version first, then that no field is unknown: a newer version may have further fields."""
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version must be a whole number from 1, got {shorten(version)}")
    if version > FORMAT_VERSION:
        newer = f"saved by a newer mxd (format {version}, this one reads {FORMAT_VERSION})"
        raise ValueError(f"this decomposition was {newer}: update with pip, as its README says")
    # Names with an underscore are transformers' own state, in the dictionaries of to_dict().
    if unknown := sorted(name for name in others if name not in _STOCK_FIELDS and not name.startswith("_")):
        raise ValueError(f"{shorten(unknown[0])} is not a field of a decomposition's config")


def machine_memory() -> int:
    """Return the bytes of physical memory and of all GPUs together."""
    known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ())
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0
    if torch.cuda.is_available():
        total += sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return total or 2**46  # where the system does not say, only what no machine holds is refused

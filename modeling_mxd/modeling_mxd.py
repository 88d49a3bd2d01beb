"""The two doors of a decomposition's repo. `MxDModel`, by `AutoModel`: its layers as a transformers model, saved
and loaded like any other. `MxDForCausalLM`, by `AutoModelForCausalLM`: the base language model with them spliced in."""

import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, ModelOutput, cached_file, logging

# Every sibling is imported here, also the unused: a Hub repo carries only what its entry file names.
from .configuration_mxd import MxDConfig
from .functional import topk_gate  # noqa: F401
from .hierarchical_routing import routed_gate  # noqa: F401
from .interventions import ExpertCoefficients  # noqa: F401
from .layers import MxDLayer, SparseLayer, TranscoderLayer, make_layer
from .parameter_budget import transcoder_parameters  # noqa: F401
from .reference import reference_forward  # noqa: F401
from .spliced_language_model import make_spliced
from .surgery import ReplacedMLP, SurgeryError, find_mlps, replace_mlps, spliced_mlps

logger = logging.get_logger(__name__)

# What says where files come from: as good for the base model's files as for ours,
_ACCESS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# and what says which of our repo's files, which must never be passed on to the base.
_OWN = ("revision", "subfolder")


@dataclass
class MxDOutput(ModelOutput):
    """Output of `MxDModel.forward`."""

    output: Tensor | None = None
    """(..., O), the layer's approximation of the MLP's output"""


class MxDModel(PreTrainedModel):
    """The decomposed layers of one base model, without the base model.

    `model.layers["8"]` (or `model.layer(8)`) is the layer that stands for the MLP of transformer layer 8.

    Raises:
        ValueError: when the config names no layer, or sizes that this machine cannot hold.

    Example:
        >>> mxd = MxDModel.from_pretrained("gpt2-l8")  # doctest: +SKIP
        >>> with mxd.spliced(base_model):  # doctest: +SKIP
        ...     base_model.generate(**inputs)
    """

    config_class = MxDConfig
    config: MxDConfig
    base_model_prefix = "mxd"
    main_input_name = "hidden_states"
    _no_split_modules = ["MxDLayer", "TranscoderLayer"]

    def __init__(self, config: MxDConfig):
        super().__init__(config)
        if not config.layers:
            raise ValueError("config.layers is empty: a decomposition needs at least one layer")
        config.check_memory(torch.get_default_dtype())
        self.layers = nn.ModuleDict({str(layer): make_layer(config.layer(layer)) for layer in config.layers})
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MxDLayer | TranscoderLayer):
            module.reset_parameters()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As transformers' `from_pretrained`, and stricter: only safetensors are read, and weights that are missing,
        of another shape or not the decomposition's are an error. Of several layers, `layers=[8]` loads some, and
        downloads no other's weights if the repo is sharded by layer, as `save_pretrained` does.

        Raises:
            ValueError: weights and config do not fit.
            OSError: files are not there.
        """
        access = {name: kwargs[name] for name in (*_ACCESS, *_OWN) if name in kwargs}
        config = _load_config(config, pretrained_model_name_or_path, access, kwargs)
        config.keep_layers(config.layers)  # `layers=` may have been set after it was read
        config.check_memory(torch.float8_e4m3fn)  # the narrowest that weights come in: before any download
        kwargs["use_safetensors"] = True
        tensors = None
        if pretrained_model_name_or_path is not None:
            commit = getattr(config, "_commit_hash", None)
            tensors = _some_layers(pretrained_model_name_or_path, config.layers, {**access, "_commit_hash": commit})
        if tensors is not None:
            pretrained_model_name_or_path, kwargs["state_dict"] = None, tensors
            kwargs = {name: value for name, value in kwargs.items() if name not in access}
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        _check_loaded(info, config.layers)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers' `save_pretrained`; by default in shards as large as the largest layer, so that one layer
        can be had without the others."""
        largest = max(sum(t.nbytes for t in layer.state_dict().values()) for layer in self.layers.values())
        if kwargs.get("max_shard_size", "50GB") == "50GB":  # the stock default, which push_to_hub spells out
            kwargs["max_shard_size"] = largest
        super().save_pretrained(save_directory, *args, **kwargs)

    def layer(self, layer: int) -> SparseLayer:
        """The layer that stands for the MLP of transformer layer `layer`.

        Raises:
            KeyError: when this decomposition has no such layer.
        """
        if str(layer) not in self.layers:
            raise KeyError(f"layer {layer} is not in this decomposition, which has layers {self.config.layers}")
        module = self.layers[str(layer)]
        assert isinstance(module, SparseLayer)
        return module

    def forward(self, hidden_states: Tensor, layer: int | None = None) -> MxDOutput:
        """Run one layer.

        Args:
            hidden_states: the MLP's input x, (..., I).
            layer: which layer; may be left out when there is only one.

        Raises:
            ValueError: when `layer` is left out and there are several.
        """
        if layer is None:
            if len(self.config.layers) > 1:
                raise ValueError(f"this decomposition has layers {self.config.layers}: say which with layer=")
            layer = self.config.layers[0]
        return MxDOutput(output=self.layer(layer)(hidden_states))

    def splice(self, model: nn.Module, cast: bool = True) -> list[ReplacedMLP]:
        """Put every layer in place of the base model's MLP, until `restore()` is called on what is returned.

        Raises:
            SurgeryError: as `replace_mlp`; the model is then as it was.
        """
        self.check_base(model)
        return replace_mlps(model, self._modules_by_layer(), cast=cast)

    @contextmanager
    def spliced(self, model: nn.Module, cast: bool = True) -> Iterator[list[ReplacedMLP]]:
        """Splice inside the block; afterwards, also after an exception, the base model is as it was."""
        self.check_base(model)
        with spliced_mlps(model, self._modules_by_layer(), cast=cast) as replaced:
            yield replaced

    def record_base(self, model: PreTrainedModel) -> None:
        """Note in the config which base model this decomposition is of, where it does not say yet.

        Raises:
            SurgeryError: when the model type is not supported.
        """
        text_config = model.config.get_text_config(decoder=True)
        found = {
            "base_model_name_or_path": model.config._name_or_path or None,
            "base_model_type": model.config.model_type,
            "base_hidden_act": next(iter(find_mlps(model).values())).hidden_act,
            "vocab_size": getattr(text_config, "vocab_size", None),
            "num_attention_heads": getattr(text_config, "num_attention_heads", None),
        }
        if self.config.base_model_name_or_path in (None, found["base_model_name_or_path"]):
            found["base_model_revision"] = getattr(model.config, "_commit_hash", None)
        for name, value in found.items():
            if getattr(self.config, name) is None:
                setattr(self.config, name, value)

    def check_base(self, model: nn.Module) -> None:
        """Refuse a base model that is not the one that the config names; another commit of it is only warned about.

        Raises:
            SurgeryError: saying both, theirs and ours.
        """
        sites, config = find_mlps(model), getattr(model, "config", None)
        have = {"base_model_type": getattr(config, "model_type", None)}
        have["base_hidden_act"] = next((site.hidden_act for site in sites.values()), None)
        for name, value in have.items():
            named = getattr(self.config, name)
            if named is not None and named != value:
                raise SurgeryError(f"the decomposition is of a base with {name} {named!r}, this model's is {value!r}")
        commit, named = getattr(config, "_commit_hash", None), self.config.base_model_revision
        if commit and named and re.fullmatch(r"[0-9a-f]{40}", named) and commit != named:
            logger.warning(
                f"the decomposition is of commit {named} of {self.config.base_model_name_or_path}, this model is "
                f"commit {commit}: its weights may differ"
            )

    def _modules_by_layer(self) -> dict[int, nn.Module]:
        return {layer: self.layer(layer) for layer in self.config.layers}


class MxDForCausalLM(PreTrainedModel, GenerationMixin):
    """The door for `AutoModelForCausalLM`: `from_pretrained` gives the base language model, of its own class, with
    the decomposition spliced in. It has no instances."""

    config_class = MxDConfig
    base_model_prefix = "mxd"

    def __init__(self, config: MxDConfig, *_: Any, **__: Any):
        raise TypeError(
            "MxDForCausalLM has no instances: use MxDForCausalLM.from_pretrained(repo), or, for a base model that is "
            "in memory, mxd.spliced(model)"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load base model and decomposition, and splice.

        The base comes from where the config says, at the commit that it names; `base_model_name_or_path=` overrides
        it. All other arguments (dtype, device_map, quantization_config, attn_implementation …) are the base's, and
        the decomposition follows its dtype and device. No remote code of the base is run and no pickle is read: for
        a base that needs them, load it yourself and use `MxDModel.spliced`.

        Returns:
            The base model in eval mode; its `decomposition` is the `MxDModel`, `unsplice()` undoes it. With
            `output_loading_info` also the decomposition's loading info.

        Raises:
            ValueError: the config names no base model, or one that is a decomposition itself; weights do not fit.
            SurgeryError: the base is not the one that the config names.
            OSError: files are not there.
        """
        access = {name: kwargs.pop(name) for name in _ACCESS if name in kwargs}
        own = {name: kwargs.pop(name) for name in _OWN if name in kwargs}
        adapter = kwargs.pop("adapter_kwargs", None)
        for name in ("trust_remote_code", "code_revision", "_commit_hash", "_from_auto", "use_safetensors"):
            kwargs.pop(name, None)
        config = _load_config(config, pretrained_model_name_or_path, access | own, kwargs)
        source = {"revision": config.base_model_revision, **access}
        _check_base_name(config, source)
        base = AutoModelForCausalLM.from_pretrained(
            config.base_model_name_or_path,
            *model_args,
            trust_remote_code=False,
            use_safetensors=True,
            **source,
            **kwargs,
        )
        mxd, info = MxDModel.from_pretrained(
            pretrained_model_name_or_path, config=config, dtype=base.dtype, output_loading_info=True, **own, **access
        )
        model = make_spliced(base, mxd.eval(), str(pretrained_model_name_or_path))
        if adapter is not None and adapter.get("_adapter_model_path"):
            model.load_adapter(adapter.pop("_adapter_model_path"), adapter_kwargs=adapter)
        return (model, info) if output_loading_info else model


_CONFIG_FIELDS = frozenset(inspect.signature(MxDConfig.__init__).parameters) - {"self", "kwargs"}


def _load_config(config: Any, name: Any, access: dict[str, Any], kwargs: dict[str, Any]) -> MxDConfig:
    """The config that `from_pretrained` was given, or the repo's with the fields among `kwargs`, which leave them."""
    if isinstance(config, PreTrainedConfig):
        return config
    fields = {field: kwargs.pop(field) for field in _CONFIG_FIELDS & kwargs.keys()}
    return MxDConfig.from_pretrained(config or name, **access, **fields)


def _check_base_name(config: MxDConfig, source: dict[str, Any]) -> None:
    name = config.base_model_name_or_path
    if not name:
        raise ValueError("the config names no base_model_name_or_path to splice into: pass base_model_name_or_path=")
    base, _ = PreTrainedConfig.get_config_dict(name, **source)
    if base.get("model_type") == MxDConfig.model_type:
        raise ValueError(f"base_model_name_or_path {name!r} is a decomposition itself: name the language model")


def _check_loaded(info: dict[str, Any], layers: list[int]) -> None:
    unexpected = sorted(info["unexpected_keys"])
    # The weights of layers that were not asked for are no mistake.
    unexpected = [key for key in unexpected if not (match := _LAYER.match(key)) or int(match[1]) in layers]
    wrong = {"missing": sorted(info["missing_keys"]), "of another shape": list(info["mismatched_keys"])}
    for what, keys in {**wrong, "not the decomposition's": unexpected}.items():
        if keys:
            raise ValueError(f"the weights do not fit the config of layers {layers}: {keys[0]} is {what}")


_LAYER = re.compile(r"layers\.(\d+)\.")


def _some_layers(name: Any, layers: list[int], access: dict[str, Any]) -> dict[str, Tensor] | None:
    """The weights of `layers` from a sharded repo that has more layers; None otherwise."""
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **access)
    if index is None:
        return None
    weight_map = json.loads(Path(index).read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(weight_map, dict) or any(not isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} of {name} has no weight_map of names to files")
    for file in weight_map.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} of {name} names a file outside of the repo: {file[:200]!r}")
    wanted = {key: file for key, file in weight_map.items() if (m := _LAYER.match(key)) and int(m[1]) in layers}
    if len(wanted) == len(weight_map):
        return None
    tensors = {}
    for file in sorted(set(wanted.values())):
        with safe_open(cached_file(name, file, **access), framework="pt") as shard:
            tensors.update({key: shard.get_tensor(key) for key, where in wanted.items() if where == file})
    return tensors


# A saved copy carries this code and can save itself again.
MxDConfig.register_for_auto_class()
MxDModel.register_for_auto_class("AutoModel")
MxDForCausalLM.register_for_auto_class("AutoModelForCausalLM")

"""The two doors of a decomposition's repo. `MxDModel`, by `AutoModel`: its layers as a transformers model, saved
and loaded like any other. `MxDForCausalLM`, by `AutoModelForCausalLM`: the base language model with them spliced in."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, ModelOutput, logging

# Every sibling is imported here, also the unused: a Hub repo carries only what its entry file names.
from .architectures import layer_chains  # noqa: F401
from .configuration_mxd import MxDConfig
from .downloads import with_retries
from .functional import topk_gate  # noqa: F401
from .hierarchical_routing import routed_gate  # noqa: F401
from .interventions import ExpertCoefficients  # noqa: F401
from .layers import MxDLayer, SparseLayer, TranscoderLayer, make_layer
from .loading import (
    ACCESS,
    OWN,
    arguments_of_base,
    base_source,
    check_loaded,
    commit_of,
    load_config,
    once,
    pin_revision,
)
from .pretrained_weights import PretrainedWeights  # noqa: F401
from .sharing import push_to_hub
from .sites import SurgeryError, find_mlps
from .spliced_language_model import make_spliced
from .surgery import ReplacedMLP, replace_mlps, spliced_mlps
from .verification import verify_sites  # noqa: F401
from .weight_files import check_headers, check_one_set, expected_shapes, load_layers, weight_files

logger = logging.get_logger(__name__)

# What says where `save_pretrained(push_to_hub=True)` pushes to.
_PUSH = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


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
            ValueError: weights and config do not fit, or `layers` names one that is not there.
            OSError: files are not there.
        """
        access = {name: kwargs.pop(name) for name in (*ACCESS, *OWN) if name in kwargs}
        if pretrained_model_name_or_path is not None:
            access = pin_revision(pretrained_model_name_or_path, access)
        config, _ = load_config(config, pretrained_model_name_or_path, access, kwargs)
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        name = pretrained_model_name_or_path
        if name is not None:
            check_one_set(name)
            files = weight_files(name, config.layers, access)
            if files.paths:  # else transformers says what is missing
                check_headers(files.paths, config)
                access = once(access)
            if not files.whole:
                kwargs["state_dict"], name, access = load_layers(files.paths, config.layers), None, {}
        load = partial(super().from_pretrained, name, *model_args, config=config, **kwargs, **access)
        model, info = with_retries(load, pretrained_model_name_or_path)
        check_loaded(info, config.layers)
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As transformers' `save_pretrained`; by default in shards as large as the largest layer, so that one layer
        can be had without the others.

        Raises:
            ValueError: there are other parameters than the config says, such as an adapter's.
        """
        push, how = kwargs.pop("push_to_hub", False), {name: kwargs.pop(name) for name in _PUSH if name in kwargs}
        extra = sorted((state_dict or self.state_dict()).keys() - expected_shapes(self.config).keys())
        if extra:
            raise ValueError(f"{extra[0]} is no weight of a decomposition: save adapters alone, or merge them first")
        largest = max(sum(t.nbytes for t in layer.state_dict().values()) for layer in self.layers.values())
        if kwargs.get("max_shard_size", "50GB") == "50GB":  # the stock default, which push_to_hub spells out
            kwargs["max_shard_size"] = largest
        # Of an earlier saving transformers leaves the files that this one does not replace, and loads them.
        index, single = (Path(save_directory) / name for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))
        if is_main_process:
            index.unlink(missing_ok=True)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if is_main_process and index.exists():
            single.unlink(missing_ok=True)
        if push and is_main_process:
            self.push_to_hub(how.pop("repo_id", Path(save_directory).name), **how)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """As transformers' `push_to_hub`, and complete: see `sharing.push_to_hub`."""
        return push_to_hub(self, self.config, repo_id, **kwargs)

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

    def splice(self, model: nn.Module, cast: bool = True, **options: Any) -> list[ReplacedMLP]:
        """Put every layer in place of the base model's MLP, until `restore()` is called on what is returned. Options
        are `verify` and `example_inputs` of `replace_mlps`.

        Raises:
            SurgeryError: as `replace_mlp`; the model is then as it was.
        """
        self.check_base(model)
        return replace_mlps(model, self._modules_by_layer(), cast, **self.config.where, **options)

    @contextmanager
    def spliced(self, model: nn.Module, cast: bool = True, **options: Any) -> Iterator[list[ReplacedMLP]]:
        """As `splice`, inside the block; afterwards, also after an exception, the base model is as it was."""
        self.check_base(model)
        with spliced_mlps(model, self._modules_by_layer(), cast, **self.config.where, **options) as replaced:
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
            "base_hidden_act": self._hidden_act(model),
            **{name: getattr(text_config, name, None) for name in ("vocab_size", "num_attention_heads")},
        }
        # Swin has a number of heads for every stage.
        found = {name: value for name, value in found.items() if isinstance(value, int | str)}
        if self.config.base_model_name_or_path in (None, found.get("base_model_name_or_path")):
            commit, certain = commit_of(model.config)
            found["base_model_revision"] = commit
            if not certain and self.config.base_model_revision is None:
                logger.warning(
                    f"{'no commit' if commit is None else f'commit {commit}'} of {model.config._name_or_path} is "
                    "recorded: if the model was loaded with revision=, set config.base_model_revision"
                )
        if model.config.is_encoder_decoder:
            found["stack"] = "decoder"  # which None means there; said, so that nobody has to know
        for name, value in found.items():
            if getattr(self.config, name) is None:
                setattr(self.config, name, value)

    def check_base(self, model: nn.Module) -> None:
        """Refuse a base model that is not the one that the config names; another commit of it is only warned about.

        Raises:
            SurgeryError: saying both, theirs and ours.
        """
        config = getattr(model, "config", None)
        have = {"base_model_type": getattr(config, "model_type", None)}
        have["base_hidden_act"] = self._hidden_act(model)
        for name, value in have.items():
            named = getattr(self.config, name)
            if named is not None and value is not None and named != value:
                raise SurgeryError(f"the decomposition is of a base with {name} {named!r}, this model's is {value!r}")
        self._check_commit(config)

    def _check_commit(self, config: Any) -> None:
        named = self.config.base_model_revision
        if named is None or not re.fullmatch(r"[0-9a-f]{40}", named):
            return
        commit, certain = commit_of(config)
        if commit is not None and commit != named:
            unless = "" if certain else f", unless it was loaded with revision={named!r},"
            logger.warning(
                f"the decomposition is of commit {named} of {self.config.base_model_name_or_path}; this model{unless} "
                f"is commit {commit} of {config._name_or_path}: its weights may differ"
            )

    def _hidden_act(self, model: nn.Module) -> str | None:
        """Activation of the base's MLPs; None where they all are replaced."""
        sites = find_mlps(model, **self.config.where)
        # Of the decomposed layers first, then of others: some may be replaced already.
        ordered = sorted(sites.values(), key=lambda site: site.layer not in self.config.layers)
        return next(filter(None, (site.hidden_act for site in ordered if site.slots)), None)

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

        The base comes from where the config says, at the commit that it names; `base_model_name_or_path=` (and
        `base_model_revision=`) have it loaded from elsewhere. All other arguments (dtype, device_map,
        quantization_config, attn_implementation …) are the base's, and the decomposition follows its dtype and
        device. No remote code of the base is run and no pickle is read: for a base that needs them, load it yourself
        and use `MxDModel.spliced`.

        Returns:
            The base model in eval mode; its `decomposition` is the `MxDModel`, `unsplice()` undoes it. With
            `output_loading_info` also the decomposition's loading info.

        Raises:
            ValueError: the config names no base model, or one that is a decomposition itself; weights do not fit, or
                `layers` names one that is not there.
            SurgeryError: the base is not the one that the config names.
            OSError: files are not there.
        """
        access = {name: kwargs.pop(name) for name in ACCESS if name in kwargs}
        own = {name: kwargs.pop(name) for name in OWN if name in kwargs}
        adapter, adapter_name = kwargs.pop("adapter_kwargs", None), kwargs.pop("adapter_name", None)
        for name in ("trust_remote_code", "code_revision", "_commit_hash", "_from_auto", "use_safetensors"):
            kwargs.pop(name, None)
        here = pin_revision(pretrained_model_name_or_path, {**access, **own})
        config, stored = load_config(config, pretrained_model_name_or_path, here, kwargs)
        kwargs = {**arguments_of_base(config, stored), **kwargs}
        name, source = base_source(
            config,
            stored,
            access,
            local=os.path.isdir(pretrained_model_name_or_path),  # noqa: PTH112
        )
        load = partial(AutoModelForCausalLM.from_pretrained, name, *model_args, use_safetensors=True, **source)
        base = with_retries(partial(load, trust_remote_code=False, **kwargs), name)
        base.config._commit_hash = source.get("revision")  # newer transformers don't keep it; it is never saved
        mxd, info = MxDModel.from_pretrained(
            pretrained_model_name_or_path, config=config, dtype=base.dtype, output_loading_info=True, **here
        )
        model = make_spliced(base, mxd.eval(), str(pretrained_model_name_or_path))
        if adapter is not None and adapter.get("_adapter_model_path"):
            path = adapter.pop("_adapter_model_path")
            model.load_adapter(path, adapter_name=adapter_name, adapter_kwargs={**access, **adapter})
        return (model, info) if output_loading_info else model


# A saved copy carries this code and can save itself again.
MxDConfig.register_for_auto_class()
MxDModel.register_for_auto_class("AutoModel")
MxDForCausalLM.register_for_auto_class("AutoModelForCausalLM")

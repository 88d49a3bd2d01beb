"""The models of a decomposition's repo.

`AutoModel` loads `MxDModel`, the decomposition's layers as a transformers model. `AutoModelForCausalLM` calls
`MxDForCausalLM.from_pretrained`, which returns the base language model with the decomposition spliced in.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, ModelOutput, logging

# Every sibling is imported here, also the unused: transformers copies only what the entry file names into a repo.
from .architectures import configured_activations
from .configuration_mxd import MxDConfig
from .functional import topk_gate  # noqa: F401
from .hierarchical_routing import routed_gate  # noqa: F401
from .interventions import ExpertCoefficients  # noqa: F401
from .layers import MxDLayer, SparseLayer, TranscoderLayer, make_layer
from .loading import (
    ACCESS,
    OWN,
    commit_of,
    decomposition_config,
    decomposition_files,
    expected_shapes,
    load_language_model,
    read_weights,
    resolve,
    resolve_base,
)
from .sites import SurgeryError
from .spliced_language_model import make_spliced
from .surgery import ReplacedMLP, replace_mlps, spliced_mlps

logger = logging.get_logger(__name__)


@dataclass
class MxDOutput(ModelOutput):
    """Output of `MxDModel.forward`."""

    output: Tensor | None = None
    """(..., O), the layer's approximation of the MLP's output"""


class MxDModel(PreTrainedModel):
    """The decomposed layers of one base model, without the base model.

    `model.layers["8"]`, or `model.layer(8)`, replaces the MLP of transformer layer 8.

    Raises:
        ValueError: the config names no layer, or sizes that this machine cannot hold.

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
        """Load a decomposition, as transformers' `from_pretrained`.

        Only safetensors are read, and they must match the config. `layers=[8]` loads some of several layers, and
        downloads no other layer's weights if the repo is sharded by layer, as `save_pretrained` does. Any other field
        of the config can be given too.

        Raises:
            ValueError: weights and config do not fit, or `layers` names one that is not there.
            OSError: files are not there.
        """
        access = {name: kwargs.pop(name) for name in (*ACCESS, *OWN) if name in kwargs}
        repo = resolve(pretrained_model_name_or_path, access)
        config = decomposition_config(repo, config, kwargs)
        files = decomposition_files(repo, config)
        model, info = cls._load(repo.name, config, files, *model_args, **kwargs)
        return (model, info) if output_loading_info else model

    @classmethod
    def _load(cls, name: str, config: MxDConfig, files: list[Path], *model_args: Any, **kwargs: Any) -> Any:
        """Load a decomposition from files that were checked. Returns the model and transformers' loading info."""
        weights = read_weights(files, config.layers)
        model, info = super().from_pretrained(
            None, *model_args, config=config, state_dict=weights, output_loading_info=True, **kwargs
        )
        model.name_or_path = model.config.name_or_path = name
        return model, info

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save a decomposition, as transformers' `save_pretrained`.

        By default every layer gets a file of its own, so that one can be downloaded without the others.

        Raises:
            ValueError: there are parameters that the config does not describe, such as an adapter's.
        """
        extra = sorted((state_dict or self.state_dict()).keys() - expected_shapes(self.config).keys())
        if extra:
            raise ValueError(f"{extra[0]} is no weight of a decomposition: save adapters alone, or merge them first")
        if kwargs.get("max_shard_size", "50GB") == "50GB":  # the stock default, which push_to_hub spells out
            kwargs["max_shard_size"] = max(sum(t.nbytes for t in m.state_dict().values()) for m in self.layers.values())
        # transformers leaves the files of an earlier saving that this one does not replace, and would load them.
        index, single = (Path(save_directory) / name for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))
        if is_main_process:
            index.unlink(missing_ok=True)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if is_main_process and index.exists():
            single.unlink(missing_ok=True)

    def layer(self, layer: int) -> SparseLayer:
        """Return the layer that replaces the MLP of transformer layer `layer`.

        Raises:
            KeyError: this decomposition has no such layer.
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
            layer: index of the transformer layer; may be left out if there is only one.

        Raises:
            ValueError: `layer` is left out and there are several.
        """
        if layer is None:
            if len(self.config.layers) > 1:
                raise ValueError(f"this decomposition has layers {self.config.layers}: say which with layer=")
            layer = self.config.layers[0]
        return MxDOutput(output=self.layer(layer)(hidden_states))

    def splice(self, model: nn.Module, cast: bool = True, **options: Any) -> list[ReplacedMLP]:
        """Replace the base model's MLPs by the layers, until `restore()` is called on what is returned.

        `cast` and the options (`verify`, `example_inputs`) are those of `replace_mlps`.

        Raises:
            SurgeryError: as `replace_mlps`, or the model is not the base that the config names.
        """
        self.check_base(model)
        return replace_mlps(model, self._modules_by_layer(), cast, **self.config.where, **options)

    @contextmanager
    def spliced(self, model: nn.Module, cast: bool = True, **options: Any) -> Iterator[list[ReplacedMLP]]:
        """Replace the base model's MLPs inside the block; afterwards, also after an exception, they are restored."""
        self.check_base(model)
        with spliced_mlps(model, self._modules_by_layer(), cast, **self.config.where, **options) as replaced:
            yield replaced

    def check_base(self, model: nn.Module) -> None:
        """Check that a model is the base that the config names. Another commit of it is only warned about.

        Raises:
            SurgeryError: it is of another type, or its config names other activations.
        """
        config, ours = getattr(model, "config", None), self.config
        kind, activations = getattr(config, "model_type", None), configured_activations(model)
        if None not in (kind, ours.base_model_type) and kind != ours.base_model_type:
            raise SurgeryError(
                f"the decomposition is of a base with base_model_type {ours.base_model_type!r}, this model's is {kind!r}"
            )
        if activations and ours.base_hidden_act not in (None, *activations):
            raise SurgeryError(
                f"the decomposition is of a base with base_hidden_act {ours.base_hidden_act!r}, this model's config "
                f"names {', '.join(map(repr, activations))}"
            )
        if re.fullmatch(r"[0-9a-f]{40}", ours.base_model_revision or ""):
            self._check_commit(config)

    def _check_commit(self, config: Any) -> None:
        named = self.config.base_model_revision
        commit, certain = commit_of(config)
        if commit not in (None, named):
            unless = "" if certain else f", unless it was loaded with revision={named!r},"
            logger.warning(
                f"the decomposition is of commit {named} of {self.config.base_model_name_or_path}; this model{unless} "
                f"is commit {commit} of {config._name_or_path}: its weights may differ"
            )

    def _modules_by_layer(self) -> dict[int, nn.Module]:
        return {layer: self.layer(layer) for layer in self.config.layers}


class MxDForCausalLM(PreTrainedModel, GenerationMixin):
    """Load the base language model, of its own class, with the decomposition spliced in.

    `AutoModelForCausalLM` calls its `from_pretrained`; it has no instances.
    """

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

        The base is the one that the config names, at the commit that it names; `base_model_name_or_path=` and
        `base_model_revision=` name another. `layers=[8]` splices some of several layers. All other arguments (dtype,
        device_map, quantization_config, attn_implementation …) are the base's, and the decomposition follows its dtype
        and device. No remote code of the base is run and no pickle is read: load a base that needs them yourself, and
        use `MxDModel.spliced`.

        Returns:
            The base model in eval mode. Its `decomposition` is the `MxDModel`, and `unsplice()` undoes the splice.
            With `output_loading_info` also the decomposition's loading info.

        Raises:
            ValueError: the config names no base model, or a decomposition as one; weights do not fit, or `layers`
                names one that is not there.
            SurgeryError: the base is not the one that the config names.
            OSError: files are not there.
        """
        access = {name: kwargs.pop(name) for name in ACCESS if name in kwargs}
        own = {name: kwargs.pop(name) for name in OWN if name in kwargs}
        base_name = kwargs.pop("base_model_name_or_path", None)
        base_revision = kwargs.pop("base_model_revision", None)
        adapter, adapter_name = kwargs.pop("adapter_kwargs", None) or {}, kwargs.pop("adapter_name", None)
        for name in ("trust_remote_code", "code_revision", "_commit_hash", "_from_auto", "use_safetensors"):
            kwargs.pop(name, None)
        repo = resolve(pretrained_model_name_or_path, {**access, **own})
        config = decomposition_config(repo, config, kwargs)
        base = resolve_base(repo, config, access, base_name, base_revision)
        files = decomposition_files(repo, config)
        language_model = load_language_model(base, *model_args, **kwargs)
        mxd, info = MxDModel._load(repo.name, config, files, dtype=language_model.dtype)
        model = make_spliced(language_model, mxd.eval(), repo.name)
        if path := adapter.pop("_adapter_model_path", None):
            model.load_adapter(path, adapter_name=adapter_name, adapter_kwargs={**access, **adapter})
        return (model, info) if output_loading_info else model


# A saved copy carries this code and can save itself again.
MxDConfig.register_for_auto_class()
MxDModel.register_for_auto_class("AutoModel")
MxDForCausalLM.register_for_auto_class("AutoModelForCausalLM")

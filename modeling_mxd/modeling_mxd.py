"""The models of a decomposition's repo: `MxDModel`, its layers as a transformers model, by `AutoModel`; and the base
language model with the decomposition spliced in, by `AutoModelForCausalLM`."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, ModelOutput, logging

# Every sibling is imported here, also the unused: transformers copies only what the entry file names into a repo.
from .architectures import configured_activations
from .configuration_mxd import MxDConfig
from .functional import topk_gate  # noqa: F401
from .interventions import Steering
from .layers import SparseLayer, make_layer
from .loading import (
    ACCESS,
    BY_LAYER,
    OWN,
    ResolvedRepo,
    check_language_model,
    commit_of,
    decomposition_files,
    load_decomposition,
    load_language_model,
    resolve,
    resolve_base,
    separate_layers,
)
from .sites import SurgeryError
from .spliced_language_model import make_spliced
from .steering import (
    DIRECTIONS_NAME,
    MISSING,
    DirectionFile,
    ExpertDirections,
    SteeringHandle,
    check_directions,
    direction_shapes,
    read_directions,
    steer,
)
from .surgery import ReplacedMLP, replace_mlps, restored_afterwards

logger = logging.get_logger(__name__)


@dataclass
class MxDOutput(ModelOutput):
    """Output of `MxDModel.forward`."""

    output: Tensor | None = None
    """(..., O), the layer's approximation of the MLP's output, of several MLPs' outputs one after another"""


class MxDModel(PreTrainedModel):
    """The decomposed layers of one base model, without it. `layer(8)` replaces the MLP of transformer layer 8."""

    config_class = MxDConfig
    config: MxDConfig
    base_model_prefix = "mxd"
    main_input_name = "hidden_states"
    _no_split_modules = ["MxDLayer", "TranscoderLayer"]
    _repo: ResolvedRepo | None = None
    _directions: DirectionFile | None = None

    def __init__(self, config: MxDConfig):
        super().__init__(config)
        if not config.layers:
            raise ValueError("config.layers is empty: a decomposition needs at least one layer")
        config.check_memory(torch.get_default_dtype())
        self.layers = nn.ModuleDict({str(layer): make_layer(config.layer(layer)) for layer in config.layers})
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SparseLayer):
            module.reset_parameters()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: MxDConfig | None = None, **kwargs: Any
    ) -> Any:
        """Load a decomposition, as transformers' `from_pretrained`.

        Only safetensors are read, and they must match the config. `layers=[8]` loads some of several layers, and
        downloads no other layer's weights if the repo is sharded by layer, as `save_pretrained` does. Other fields of
        the config can be given too.

        Raises:
            ValueError: weights and config do not fit, or `layers` names one that is not there.
            OSError: files are not there.
        """
        access = {key: kwargs.pop(key) for key in (*ACCESS, *OWN) if key in kwargs}
        repo = resolve(pretrained_model_name_or_path, access)
        config = MxDConfig.of_repo(repo.name, repo.config_file, config, kwargs)
        files = decomposition_files(repo, config.layers, config.weight_shapes)
        return load_decomposition(partial(super().from_pretrained, None, *args), repo, config, files, **kwargs)

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """Save a decomposition, as transformers' `save_pretrained`, every layer in a file of its own.

        `max_shard_size` makes a single file of a decomposition that fits into it, and several files of a larger layer.
        Raises a ValueError if there are parameters that the config does not describe, such as an adapter's.
        """
        extra = sorted((state_dict or self.state_dict()).keys() - self.config.weight_shapes.keys())
        if extra:
            raise ValueError(f"{extra[0]} is no weight of a decomposition: save adapters alone, or merge them first")
        if kwargs.get("max_shard_size", BY_LAYER) == BY_LAYER:
            kwargs["max_shard_size"] = max(sum(t.nbytes for t in m.state_dict().values()) for m in self.layers.values())
        # transformers leaves the files of an earlier saving that this one does not replace, and would load them.
        index, single = (Path(save_directory) / name for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))
        if is_main_process:
            index.unlink(missing_ok=True)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if is_main_process and index.exists():
            separate_layers(index)
            single.unlink(missing_ok=True)
        if is_main_process:
            self.save_directions(save_directory)

    def save_directions(self, save_directory: Any) -> None:
        """Save the directions that are in memory or on this machine; others in the folder belong to other weights."""
        path = Path(save_directory) / DIRECTIONS_NAME
        if self._directions is None and self._repo is not None:
            local = {**self._repo.access, "local_files_only": True}
            with suppress(ValueError):
                self._directions = read_directions(self._repo._replace(access=local), self.config)
        if self._directions is None:
            path.unlink(missing_ok=True)
            return
        metadata = {"format_version": "1", "source": self._directions.source}
        save_file(self._directions.tensors, path, metadata)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push what `save_pretrained` saves, as transformers' `push_to_hub`."""
        return super().push_to_hub(*args, **{"max_shard_size": BY_LAYER, **kwargs})

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        separate_layers(Path(working_dir, SAFE_WEIGHTS_INDEX_NAME))  # `save_pretrained(push_to_hub=True)` calls this
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def layer(self, layer: int) -> SparseLayer:
        """Return the layer that replaces the MLP of transformer layer `layer`, or raise a KeyError."""
        if str(layer) not in self.layers:
            self.config.layer(layer)  # raises
        return self.layers[str(layer)]  # type: ignore[return-value]

    @property
    def direction_file(self) -> DirectionFile:
        """Content of `directions.safetensors`, read at the first use from where the decomposition was loaded."""
        if self._directions is None:
            if self._repo is None:
                raise ValueError(f"this decomposition {MISSING}")
            self._directions = read_directions(self._repo, self.config)
        return self._directions

    def directions(self, layer: int) -> ExpertDirections:
        """Return the experts' directions (N, O) and maxima (N) of a layer.

        Raises a ValueError if the decomposition was saved without: `mxd experts FOLDER` makes them.
        """
        module, tensors = self.layer(layer), self.direction_file.tensors
        direction = tensors.get(f"layers.{layer}.direction", module.expert_table.detach())
        return ExpertDirections(direction, tensors[f"layers.{layer}.maximum"])

    def set_directions(self, maxima: Mapping[int, Tensor], directions: Mapping[int, Tensor], source: str) -> None:
        """Replace what `directions` returns and `save_pretrained` saves.

        Args:
            maxima: {layer: (N)}, for every layer.
            directions: {layer: (N, O)}, for every MxD layer; a transcoder's directions are its decoder.
            source: the directions' origin, for the file.
        """
        given = {f"layers.{layer}.maximum": maximum for layer, maximum in maxima.items()}
        given |= {f"layers.{layer}.direction": direction for layer, direction in directions.items()}
        tensors = {}
        for name, shape in direction_shapes(self.config).items():
            if name not in given or list(given[name].shape) != shape:
                raise ValueError(f"{name} must be given, with the shape {shape}")
            tensors[name] = given[name].detach().float().cpu().contiguous().clone()
        check_directions(tensors)
        self._directions = DirectionFile(tensors, source)

    def forward(self, hidden_states: Tensor, layer: int | None = None) -> MxDOutput:
        """Run one layer on the MLP's input x, (..., I). `layer` may be left out if there is only one."""
        if layer is None and len(self.config.layers) > 1:
            raise ValueError(f"this decomposition has layers {self.config.layers}: say which with layer=")
        return MxDOutput(output=self.layer(self.config.layers[0] if layer is None else layer)(hidden_states))

    def splice(self, model: nn.Module, cast: bool = True, **options: Any) -> list[ReplacedMLP]:
        """Replace the base model's MLPs by the layers, until `restore()` is called on what is returned.

        `cast`, the options (`verify`, `example_inputs`) and errors are those of `replace_mlps` and `check_base`.
        """
        self.check_base(model)
        modules = {layer: self.layer(layer) for layer in self.config.layers}
        return replace_mlps(model, modules, cast, **self.config.where, **options)

    @contextmanager
    def spliced(self, model: nn.Module, cast: bool = True, **options: Any) -> Iterator[list[ReplacedMLP]]:
        """Replace the base model's MLPs as `splice`, inside the block; they are restored also after an exception."""
        with restored_afterwards(self.splice(model, cast, **options)) as replaced:
            yield replaced

    def steer(self, model: nn.Module, steering: Any) -> SteeringHandle:
        """Steer a model into which this decomposition is spliced, until the handle is removed.

            with mxd.spliced(model), mxd.steer(model, [{"layer": 15, "expert": 812, "strength": 3}]):
                model.generate(...)

        Args:
            model: the model whose `forward` or `generate` is called.
            steering: a `Steering`, one change or several (a `SteeringChange`, or a dictionary with its fields), or the
                path of a JSON file.

        Returns:
            A handle: use it in a `with` statement, or call `remove()`.

        Raises:
            ValueError: no such layer or expert, there are no directions, or a value has no meaning.
            SurgeryError: the decomposition is not in the model.
        """
        return steer(self, model, steering)

    def check_base(self, model: nn.Module) -> None:
        """Raise a SurgeryError if a model's type or activations are not the base's; warn about another commit."""
        config: Any = getattr(model, "config", None)
        ours = self.config
        kind, activations = getattr(config, "model_type", None), configured_activations(model)
        of = "the decomposition is of a base with"
        if None not in (kind, ours.base_model_type) and kind != ours.base_model_type:
            raise SurgeryError(f"{of} base_model_type {ours.base_model_type!r}, this model's is {kind!r}")
        if activations and ours.base_hidden_act not in (None, *activations):
            names = ", ".join(map(repr, activations))
            raise SurgeryError(f"{of} base_hidden_act {ours.base_hidden_act!r}, this model's config names {names}")
        (commit, certain), named = commit_of(config), ours.base_model_revision
        if commit not in (None, named) and re.fullmatch(r"[0-9a-f]{40}", named or ""):
            unless = "" if certain else f", unless it was loaded with revision={named!r},"
            logger.warning(
                f"the decomposition is of commit {named} of {ours.base_model_name_or_path}; this model{unless} is "
                f"commit {commit} of {config._name_or_path}: its weights may differ"
            )


class MxDForCausalLM(PreTrainedModel, GenerationMixin):
    """Load the base language model, of its own class, with the decomposition spliced in.

    `AutoModelForCausalLM` calls its `from_pretrained`; it has no instances.
    """

    config_class = MxDConfig
    base_model_prefix = "mxd"

    def __init__(self, config: MxDConfig, *_: Any, **__: Any):
        raise TypeError("MxDForCausalLM has no instances: use from_pretrained, or MxDModel.spliced for a loaded base")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: MxDConfig | None = None, **kwargs: Any
    ) -> Any:
        """Load base model and decomposition, and splice.

        The base is the one that the config names, at its commit; `base_model_name_or_path=` and `base_model_revision=`
        name another. `layers=[8]` splices some of several layers. `steering=` steers the model, see `MxDModel.steer`;
        a path is of this machine or, if there is no such file, of the repo. All other arguments (dtype, device_map,
        quantization_config, attn_implementation …) are the base's, and the decomposition follows its dtype and device.
        No remote code of the base is run and no pickle is read: load a base that needs them yourself, and use
        `MxDModel.spliced`.

        Returns:
            The base model in eval mode. Its `decomposition` is the `MxDModel`, and `unsplice()` undoes the splice.
            With `output_loading_info` also the decomposition's loading info.

        Raises:
            ValueError: the config names no language model as its base, weights do not fit, or a layer is not there.
            SurgeryError: the base is not the one that the config names.
            OSError: files are not there.
        """
        access = {key: kwargs.pop(key) for key in ACCESS if key in kwargs}
        own = {key: kwargs.pop(key) for key in OWN if key in kwargs}
        other_base = [kwargs.pop(f"base_model_{key}", None) for key in ("name_or_path", "revision")]
        adapter, adapter_name = kwargs.pop("adapter_kwargs", None) or {}, kwargs.pop("adapter_name", None)
        with_info, steering = kwargs.pop("output_loading_info", False), kwargs.pop("steering", None)
        for key in ("trust_remote_code", "code_revision", "_commit_hash", "_from_auto", "use_safetensors"):
            kwargs.pop(key, None)
        repo = resolve(pretrained_model_name_or_path, {**access, **own})
        config = MxDConfig.of_repo(repo.name, repo.config_file, config, kwargs)
        base = resolve_base(repo, config, access, *other_base)
        files = decomposition_files(repo, config.layers, config.weight_shapes)
        check_language_model(base)
        language_model = load_language_model(base, *args, **kwargs)
        load = partial(super(MxDModel, MxDModel).from_pretrained, None, output_loading_info=True)
        mxd, info = load_decomposition(load, repo, config, files, dtype=language_model.dtype)
        model = make_spliced(language_model, mxd.eval(), repo.name)
        if steering is not None:
            mxd.steer(model, Steering.of(steering, repo))
        if path := adapter.pop("_adapter_model_path", None):
            model.load_adapter(path, adapter_name=adapter_name, adapter_kwargs={**access, **adapter})
        return (model, info) if with_info else model


# A saved copy carries this code and can save itself again.
MxDConfig.register_for_auto_class()
MxDModel.register_for_auto_class("AutoModel")
MxDForCausalLM.register_for_auto_class("AutoModelForCausalLM")

"""What both doors do before weights are read: whose config it is, where the base comes from, which files are needed.

Everything that can be refused is refused here, before weights are read.
"""

import copy
import inspect
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PretrainedConfig  # by the name that transformers 4 knows too
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, extract_commit_hash

from .configuration_mxd import DEMO_MODEL, MAX_LAYERS, MAX_SIZE, MxDConfig, shorten
from .downloads import file_if_any, first_line, is_transient, with_retries  # noqa: F401
from .weight_files import check_headers, layer_of, read_index, weight_files  # noqa: F401

# What says where files come from: as good for the base model's files as for ours,
ACCESS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# and what says which of our repo's files, which must never be passed on to the base.
OWN = ("revision", "subfolder")
# What every config has, so that the auto class keeps it from the arguments of `from_pretrained`.
_TAKEN = (
    "_attn_implementation", "_experts_implementation", "dtype", "output_attentions", "output_hidden_states",
    "return_dict",
)  # fmt: skip
_CONFIG_FIELDS = frozenset(inspect.signature(MxDConfig.__init__).parameters) - {"self", "kwargs"}


def pin_revision(name: Any, access: dict[str, Any]) -> dict[str, Any]:
    """`access` at the commit that it leads to now, so that all files are of one commit, whoever pushes meanwhile."""
    config = file_if_any(name, CONFIG_NAME, access)
    commit = extract_commit_hash(config, None)
    return access if commit is None else {**access, "revision": commit}


def once(access: dict[str, Any]) -> dict[str, Any]:
    """`access` for files that are downloaded by now, by force if that was asked for."""
    return {**access, "force_download": False} if access.get("force_download") else access


def load_config(
    config: Any, name: Any, access: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[MxDConfig, MxDConfig | None]:
    """The decomposition's config, and the repo's own if it has one.

    Args:
        config: as given to `from_pretrained`, of which a copy is returned, or None for the repo's.
        name: folder or Hub id of the decomposition, or None.
        access: how to get files of it.
        kwargs: of `from_pretrained`; fields of the config leave them, and are set.

    Raises:
        ValueError: the config is nonsense, names layers that the repo does not have, or more than memory holds.
        OSError: there is no config.
    """
    stored = _stored_config(name, access, needed=config is None)
    if not isinstance(config, PretrainedConfig):
        config = stored if config is None else MxDConfig.from_pretrained(config, **access)
    config = copy.deepcopy(config)
    for field in _CONFIG_FIELDS & kwargs.keys():
        setattr(config, field, kwargs.pop(field))
    if config.layers is None and stored is not None:
        config.layers = stored.layers
    config.keep_layers(config.layers)  # checks, since fields were set after it was built
    if not config.layers:
        raise ValueError("config.layers is empty: a decomposition needs at least one layer")
    there = config.layers if stored is None else stored.layers
    unknown = [layer for layer in config.layers if layer not in there]
    if unknown:
        raise ValueError(f"layer {unknown[0]} is not in the decomposition {name}, which has layers {there}")
    config.check_memory(torch.float8_e4m3fn)  # the narrowest that weights come in
    return config, stored


def _stored_config(name: Any, access: dict[str, Any], needed: bool) -> MxDConfig | None:
    if name is None:
        return None
    try:
        values, _ = with_retries(partial(MxDConfig.get_config_dict, name, **access), name)
    except OSError:
        if needed:
            raise
        return None
    if values.get("model_type") != MxDConfig.model_type:
        raise ValueError(f"{name} holds a model of type {values.get('model_type')!r}, not a decomposition")
    return MxDConfig.from_dict(values)


def arguments_of_base(config: MxDConfig, stored: MxDConfig | None) -> dict[str, Any]:
    """Arguments of the base that the auto class put into our config; they leave it."""
    found: dict[str, Any] = {}
    for name in _TAKEN if stored is not None else ():
        value, ours = getattr(config, name, None), getattr(stored, name, None)
        if value != ours:
            found[name.removeprefix("_")] = value
            setattr(config, name, ours)
    return found


def base_source(
    config: MxDConfig, stored: MxDConfig | None, access: dict[str, Any], local: bool
) -> tuple[str, dict[str, Any]]:
    """Name of the base, and how to get its files. From wherever it is loaded this time, `config` then names again
    what the decomposition was made of.

    Args:
        config, stored: as `load_config` returns them.
        access: how to get files of the base.
        local: whether the decomposition is in a folder of this machine, whose base may be in one too.

    Raises:
        ValueError: no base is named, or one that is a decomposition itself, or a stranger's repo names a folder.
        OSError: it is not there.
    """
    name, revision = config.base_model_name_or_path, config.base_model_revision
    if not name:
        raise ValueError("the config names no base_model_name_or_path to splice into: pass base_model_name_or_path=")
    if name == DEMO_MODEL:
        raise ValueError(
            "the decomposition's base model ships with the library mxd: pass "
            "base_model_name_or_path=str(mxd.demo.model_path())"
        )
    if stored is not None and stored.base_model_name_or_path:
        if name != stored.base_model_name_or_path and revision == stored.base_model_revision:
            revision = None  # is of another repo
        config.base_model_name_or_path = stored.base_model_name_or_path
        config.base_model_revision = stored.base_model_revision
    if os.path.isdir(name):  # noqa: PTH112, pathlib raises for names that are too long
        if not local and stored is not None and name == stored.base_model_name_or_path:
            raise ValueError(f"the base model that the repo names is a folder of this machine: {name!r}")
        revision = None
    try:
        source = pin_revision(name, {**access, "revision": revision})
        check_language_model(name, source)
        source = once(source)
    except OSError as error:
        raise OSError(
            f"the decomposition's base model {name!r} cannot be had; if it is elsewhere, pass "
            f"base_model_name_or_path=. {error}"
        ) from error
    return name, source


def check_language_config(name: str, access: dict[str, Any]) -> list[int]:
    """Refuse as a base what is a decomposition itself, or of which transformers would make a config that fills memory.
    No weights are downloaded.

    Returns:
        Its number of layers, width, units of an MLP and vocabulary; 1 where they are not known.

    Raises:
        ValueError: saying which.
        OSError: it is not there.
    """
    values, _ = with_retries(partial(PretrainedConfig.get_config_dict, name, **access), name)
    kind = values.get("model_type")
    if kind == MxDConfig.model_type:
        raise ValueError(f"the base model {name!r} is a decomposition itself: name the language model")
    if not is_causal(kind):
        raise ValueError(
            f"the base model {name!r} is of type {shorten(kind)}, which AutoModelForCausalLM does not load: load it with "
            "its own class, and the decomposition with AutoModel, whose spliced(model) puts it in"
        )
    text = values.get("text_config")
    sizes = [_largest(text if isinstance(text, dict) else values, names) for names in _BASE_SIZES]
    if max(sizes) > MAX_SIZE or sizes[0] > MAX_LAYERS:
        raise ValueError(f"config.json of the base model {name!r} has sizes that no model has: {sizes}")
    return sizes


def check_language_model(name: str, access: dict[str, Any]) -> None:
    """Refuse as `check_language_config`, and what describes far more than its files hold: it would be filled with
    random numbers.

    Raises:
        ValueError: saying which.
        OSError: it is not there.
    """
    layers, width, units, vocabulary = check_language_config(name, access)
    held = sum(path.stat().st_size for path in weight_files(name, None, access).paths)
    described = width * (vocabulary + layers * units)
    if held and described > 16 * held:  # more parameters in a byte than any quantisation puts there
        raise ValueError(f"the base model {name!r} has {held:,} bytes of weights, its config.json is of {described:,}")


def is_causal(model_type: Any) -> bool:
    """Whether `AutoModelForCausalLM` loads models of a type; true where no type is known."""
    registered = getattr(MODEL_FOR_CAUSAL_LM_MAPPING, "_extra_content", {})  # by AutoModelForCausalLM.register
    return (
        not isinstance(model_type, str)
        or model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or any(getattr(config, "model_type", None) == model_type for config in registered)
    )


# Names of the number of layers, of the width, of the MLPs' units, of the vocabulary in configs of language models.
_BASE_SIZES = (
    ("num_hidden_layers", "n_layer"),
    ("hidden_size", "n_embd"),
    ("intermediate_size", "n_inner", "ffn_dim"),
    ("vocab_size",),
)


def _largest(values: dict[str, Any], names: tuple[str, ...]) -> int:
    return max((values[name] for name in names if isinstance(values.get(name), int)), default=1)


def commit_of(config: Any) -> tuple[str | None, bool]:
    """Commit of the Hub from which a model with this config was loaded, if it can be told, and whether that is
    certain."""
    commit, name = getattr(config, "_commit_hash", None), getattr(config, "_name_or_path", None)
    if commit is not None or not name or os.path.isdir(name):  # noqa: PTH112, see above
        return commit, True
    # Newer transformers don't keep it. Nearly always it is the commit that the cache has as `main`.
    path = try_to_load_from_cache(name, CONFIG_NAME)
    if not isinstance(path, str):
        return None, False
    others = sum(1 for _ in Path(path).parent.parent.iterdir()) - 1  # of other commits
    return extract_commit_hash(path, None), not others


def check_loaded(info: dict[str, Any], layers: list[int]) -> None:
    """Refuse weights that do not fit, from transformers' loading info.

    Raises:
        ValueError: naming the first that is missing, of another shape or not the decomposition's.
    """
    unexpected = sorted(info["unexpected_keys"])
    # The weights of layers that were not asked for are no mistake.
    unexpected = [key for key in unexpected if layer_of(key) in (None, *layers)]
    wrong = {"missing": sorted(info["missing_keys"]), "of another shape": list(info["mismatched_keys"])}
    for what, keys in {**wrong, "not the decomposition's": unexpected}.items():
        if keys:
            raise ValueError(f"the weights do not fit the config: {keys[0]} is {what}")

"""Resolve, download and check the files of a decomposition and of its base model.

Everything that can be refused is refused here, before weights are read or a model is built. Downloads are retried,
since transformers gives up at the first fault, or takes one for a missing file.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, extract_commit_hash, logging
from transformers.utils.hub import cached_file, cached_files

from .configuration_mxd import DEMO_MODEL, MAX_LAYERS, MAX_SIZE, MxDConfig, read_json, shorten

logger = logging.get_logger(__name__)

ATTEMPTS = 4
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Arguments of `from_pretrained` that say how to download, from any repo,
ACCESS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# and what to download from the decomposition's repo; never passed on to the base model's.
OWN = ("revision", "subfolder")
# As `max_shard_size`: no size was asked for, every layer has a file of its own.
BY_LAYER = 2**62
# Names of the number of layers, the width, the MLPs' units and the vocabulary in configs of language models.
_SIZES = (("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd"), ("intermediate_size", "n_inner"),
          ("vocab_size",))  # fmt: skip
_LAYER = re.compile(r"layers\.(\d+)\.")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]

Result = TypeVar("Result")


def with_retries(call: Callable[[], Result], what: Any) -> Result:
    """Return `call()`, tried up to `ATTEMPTS` times while its errors are transient; then raise an OSError."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as error:
            cause = transient_cause(error)
            if cause is None:
                raise
            if attempt == ATTEMPTS - 1:
                raise OSError(f"{what}: {first_line(cause)}; what was downloaded is kept: try again") from error
            logger.warning(f"{what}: {first_line(cause)}; trying again")
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def transient_cause(error: BaseException | None) -> BaseException | None:
    """Return why trying again may help: the connection broke, or the Hub was busy. None for other errors."""
    while error is not None:  # transformers hides it behind errors of its own
        status = getattr(getattr(error, "response", None), "status_code", None)
        # By name: the client's HTTP library is httpx up to huggingface_hub 1, and httpx2 from 2.
        broken = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
        if broken or status in (429, 500, 502, 503, 504):
            return error
        error = error.__cause__ or error.__context__
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (re.sub(r":\s*\n\s*", ": ", str(error).strip()).split("\n", 1)[0] or type(error).__name__)[:300]


def file_if_any(name: Any, file: str, access: dict[str, Any]) -> str | None:
    """Return the path of a file of a folder or repo, downloaded if need be; None if it has no such file."""
    try:
        return with_retries(partial(cached_file, name, file, **access), name)
    except OSError as error:
        if transient_cause(error):
            raise
        return None


class ResolvedRepo(NamedTuple):
    """A folder, or a Hub repo at one commit."""

    name: str
    access: dict[str, Any]
    """keyword arguments that download its files; the revision is a commit"""
    config_file: str
    """path of its config.json"""

    def __repr__(self) -> str:  # models keep it: a token is neither shown nor pickled with them
        return f"{type(self).__name__}({self.name!r})"

    def __reduce__(self) -> Any:
        access = {name: value for name, value in self.access.items() if name != "token"}
        return ResolvedRepo, (self.name, access, self.config_file)


def resolve(name: Any, access: dict[str, Any]) -> ResolvedRepo:
    """Download config.json, and pin the commit that it comes from."""
    path = with_retries(partial(cached_file, name, CONFIG_NAME, **access), name)
    commit = extract_commit_hash(path, None)
    return ResolvedRepo(str(name), access if commit is None else {**access, "revision": commit}, path)


def recorded_model(name: str, revision: str | None, access: dict[str, Any]) -> str:
    """Return where to load a model from that a config names: not from a folder that happens to have a Hub id's name."""
    if not _HUB_ID.fullmatch(name) or not os.path.isdir(name):  # noqa: PTH112, pathlib raises for long names
        return name
    if revision is None:
        logger.warning(f"the base model {name} is taken from the folder {os.path.abspath(name)}")  # noqa: PTH100
        return name
    how = {key: value for key, value in access.items() if key != "proxies"}
    return with_retries(partial(snapshot_download, name, revision=revision, allow_patterns=_MODEL_FILES, **how), name)


def resolve_base(
    repo: ResolvedRepo, config: MxDConfig, access: dict[str, Any], name: str | None, revision: str | None
) -> ResolvedRepo:
    """Resolve the base model that a decomposition's config names, or the given one, and check what kind it is."""
    recorded, given = config.base_model_name_or_path, name
    name = given or recorded
    if not name:
        raise ValueError("the config names no base_model_name_or_path to splice into: pass base_model_name_or_path=")
    if name == DEMO_MODEL:
        try:
            name = recorded = given = str(import_module("mxd.demo").model_path())
        except ImportError:
            raise ValueError("the base model ships with mxd: install mxd, or pass base_model_name_or_path=") from None
    revision = revision or (config.base_model_revision if name == recorded else None)
    try:
        place = name if given else recorded_model(name, revision, access)
        is_folder = os.path.isdir(place)  # noqa: PTH112, pathlib raises for names that are too long
        if is_folder and place == name and given is None and not os.path.isdir(repo.name):  # noqa: PTH112
            raise ValueError(f"the base model that the repo names is a folder of this machine: {name!r}")
        base = resolve(place, {**access, "revision": None if is_folder else revision})
    except OSError as error:
        wrong = f"the base model {name!r} cannot be had; if it is elsewhere, pass base_model_name_or_path="
        raise OSError(f"{wrong}. {error}") from error
    check_language_config(base)
    return base


def check_language_config(base: ResolvedRepo) -> int:
    """Check that a config is a language model's, of sizes that one has. Returns about the number of its parameters."""
    values, _ = PretrainedConfig.get_config_dict(base.name, **base.access)
    kind, text = values.get("model_type"), values.get("text_config")
    if kind == MxDConfig.model_type:
        raise ValueError(f"the base model {base.name!r} is a decomposition itself: name the language model")
    if not is_causal(kind):
        wrong = f"the base model {base.name!r} is of type {shorten(kind)}, which AutoModelForCausalLM does not load"
        raise ValueError(f"{wrong}: load it with its own class, and use spliced(model) of AutoModel")
    values = text if isinstance(text, dict) else values
    sizes = [max((values[name] for name in names if isinstance(values.get(name), int)), default=1) for names in _SIZES]
    if max(sizes) > MAX_SIZE or sizes[0] > MAX_LAYERS:
        raise ValueError(f"config.json of the base model {base.name!r} has sizes that no model has: {sizes}")
    layers, width, units, vocabulary = sizes
    return width * (vocabulary + layers * units)


def check_language_model(base: ResolvedRepo) -> None:
    """Download a base model's weights, and check that its config describes no more: they would be made at random."""
    described = check_language_config(base)
    held = sum(path.stat().st_size for path in weight_files(base.name, None, base.access))
    if held and described > 16 * held:  # more parameters in a byte than any quantisation puts there
        size = f"{held:,} bytes of weights, its config.json describes {described:,} parameters"
        raise ValueError(f"the base model {base.name!r} has {size}")


def load_language_model(base: ResolvedRepo, *model_args: Any, **kwargs: Any) -> Any:
    """Load a base model whose files were checked, without remote code or pickles."""
    access = {**base.access, "force_download": False}  # they are cached by now
    load = partial(AutoModelForCausalLM.from_pretrained, base.name, *model_args, use_safetensors=True)
    model = with_retries(partial(load, trust_remote_code=False, **access, **kwargs), base.name)
    model.config._commit_hash = base.access.get("revision")  # newer transformers don't keep it; it is never saved
    return model


def is_causal(model_type: Any) -> bool:
    """Return whether `AutoModelForCausalLM` loads models of a type; true if the type is unknown."""
    registered = getattr(MODEL_FOR_CAUSAL_LM_MAPPING, "_extra_content", {})  # by AutoModelForCausalLM.register
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(getattr(config, "model_type", None) for config in registered)}
    return not isinstance(model_type, str) or model_type in known


def commit_of(config: Any) -> tuple[str | None, bool]:
    """Return the Hub commit from which a model with this config was loaded, if known, and whether that is certain."""
    commit, name = getattr(config, "_commit_hash", None), getattr(config, "_name_or_path", None)
    if commit is not None or not name or os.path.isdir(name):  # noqa: PTH112
        return commit, True
    # Newer transformers don't keep it. Nearly always it is the commit that the cache has as `main`.
    path = try_to_load_from_cache(name, CONFIG_NAME)
    if not isinstance(path, str):
        return None, False
    commits = list(Path(path).parent.parent.iterdir())
    return extract_commit_hash(path, None), len(commits) == 1


def decomposition_files(repo: ResolvedRepo, layers: list[int], shapes: dict[str, list[int]]) -> list[Path]:
    """Download the weights of some layers, and check their headers against the shapes by the config."""
    both = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if all(Path(repo.name, file).is_file() for file in both):
        raise ValueError(f"{repo.name} holds {' and '.join(both)}; delete the one that is left from an earlier saving")
    paths = weight_files(repo.name, layers, repo.access)
    if not paths:
        raise OSError(f"{repo.name} has no safetensors, and no other weights are read")
    check_headers(paths, layers, shapes)
    return paths


def weight_files(name: Any, layers: list[int] | None, access: dict[str, Any]) -> list[Path]:
    """Return the safetensors files with the weights of some layers (None: of all), downloaded if need be."""
    in_cache = {**access, "local_files_only": True}  # asked first, since the Hub may be out of reach
    if not access.get("force_download") and (cached := file_if_any(name, SAFE_WEIGHTS_NAME, in_cache)):
        return [Path(cached)]
    index = file_if_any(name, SAFE_WEIGHTS_INDEX_NAME, access)
    if index is None:
        file = file_if_any(name, SAFE_WEIGHTS_NAME, access)
        return [] if file is None else [Path(file)]
    weight_map = read_index(Path(index), name)
    wanted = {file for key, file in weight_map.items() if layers is None or layer_of(key) in (None, *layers)}
    return [Path(path) for path in with_retries(partial(cached_files, name, sorted(wanted), **access), name) or []]


def read_index(path: Path, name: Any) -> dict[str, str]:
    """Return weight → file from the index of a sharded repo, which may name no file elsewhere."""
    values = read_json(path)
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not isinstance(values.get("metadata"), dict):
        raise ValueError(f"{path.name} of {name} has no weight_map, or no metadata")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{path.name} of {name} names a file outside of the repo: {shorten(file)}")
    return weight_map


def separate_layers(index: Path) -> None:
    """Divide each file with weights of several layers, so that who loads one layer downloads no other's."""
    values = read_json(index) if index.is_file() else {"weight_map": {}}
    folder, weight_map = index.parent, values["weight_map"]
    parts = sorted({(file, layer_of(key) or 0) for key, file in weight_map.items()})
    if len(parts) == len(shared := {file for file, _ in parts}):
        return
    for number, (file, layer) in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        with safe_open(folder / file, framework="pt") as whole:
            part = {key: whole.get_tensor(key) for key in whole.keys() if layer_of(key) == layer}  # noqa: SIM118
        save_file(part, folder / name, metadata={"format": "pt"})  # no old one's name: there are more of them now
        weight_map.update(dict.fromkeys(part, name))
    index.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in shared:
        (folder / file).unlink()


def check_headers(paths: Iterable[Path], layers: list[int], shapes: dict[str, list[int]]) -> dict[str, str]:
    """Check that files hold the weights of some layers, in these shapes, and perhaps others'. Returns weight → file."""
    found: dict[str, str] = {}
    for path in paths:
        for key, (shape, dtype) in _read_header(path).items():
            wrong = ""
            if key in found:
                wrong = f"is in {found[key]} and in {path.name}"
            elif key not in shapes:
                wrong = "is not the decomposition's" if layer_of(key) in (None, *layers) else ""
            elif shape != shapes[key]:
                wrong = f"has the shape {shorten(shape)}, by the config it must be {shapes[key]}"
            elif dtype not in DTYPES:
                wrong = f"has the dtype {dtype}, not a floating-point one"
            if wrong:
                raise ValueError(f"the weights do not fit the config: {shorten(key)} {wrong}")
            found[key] = path.name
    missing = sorted(shapes.keys() - found.keys())
    if missing:
        raise ValueError(f"the weights do not fit the config: {missing[0]} is missing")
    return found


def _read_header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Return weight → shape and dtype of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: (entry.get_shape(), entry.get_dtype()) for key, entry in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no complete safetensors file: {error}") from None


def load_decomposition(load: Any, repo: ResolvedRepo, config: MxDConfig, files: list[Path], **kwargs: Any) -> Any:
    """Load a decomposition from files that were checked, by `load`, transformers' own `from_pretrained`."""
    weights = {}
    for path in files:
        with safe_open(path, framework="pt") as shard:
            weights.update({key: shard.get_tensor(key) for key in shard.keys() if layer_of(key) in config.layers})  # noqa: SIM118
    loaded = load(config=config, state_dict=weights, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = repo.name
    model._repo = repo._replace(access={**repo.access, "force_download": False})
    return loaded


def layer_of(key: str) -> int | None:
    """Return the layer that a weight belongs to; None if it is no layer's."""
    match = _LAYER.match(key)
    return int(match[1]) if match else None

"""Load the frozen language model that a decomposition replaces MLPs of."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mxd import demo
from mxd.data_files import is_data_file
from mxd.modeling_mxd import MxDConfig
from mxd.modeling_mxd.architectures import is_other_tower
from mxd.modeling_mxd.loading import (
    check_language_config,
    check_language_model,
    first_line,
    recorded_model,
    resolve,
    transient_cause,
    with_retries,
)

from .forward import sees_later_tokens

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BaseModelError(ValueError):
    """The base model cannot be loaded; the message names the model and the remedy."""


def default_device() -> torch.device:
    """Return the accelerator if there is one that supports float64 (Apple's do not), else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None or accelerator.type == "mps" else accelerator


def bfloat16_is_emulated() -> bool:
    """Return whether this CPU has no bfloat16 instructions, which makes bfloat16 slower than float32."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    known = capabilities.get("architecture") in ("x86_64", "arm64", "aarch64")
    return known and not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def resolve_name(name: str) -> str:
    """Return the name under which a config records a base model: an absolute path for a folder, else `name`."""
    return str(Path(name).resolve()) if name and name != demo.MODEL_NAME and Path(name).is_dir() else name


def model_source(name: str) -> str:
    """Return the folder of the embedded model if it has this name, else `name`; refuse the name of a data file."""
    if is_data_file(name) and not Path(name).is_dir():
        raise BaseModelError(f"{name!r} is a data file, not a model: pass it with --dataset")
    return str(demo.model_path()) if name == demo.MODEL_NAME else name


def check_base_model(
    name: str,
    revision: str | None = None,
    dtype: str = "float32",
    pickles: bool = True,
    context_length: int | None = None,
) -> PreTrainedConfig:
    """Return the config of a model, after checking it as far as `load_base_model` does without other files."""
    if dtype not in DTYPES:
        raise BaseModelError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    source = model_source(name)
    with _base_model_errors(name):
        if not pickles:  # an untrusted config: check it before transformers builds a config object
            source = recorded_model(source, revision, {})
            check_language_config(resolve(source, {"revision": revision}))
        load = partial(AutoConfig.from_pretrained, source, revision=revision, trust_remote_code=False)
        config = with_retries(load, name)
        positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(config, MxDConfig):
        raise BaseModelError(
            f"{name!r} is a decomposition itself: name its base model, {config.base_model_name_or_path}"
        )
    if context_length is not None and isinstance(positions, int) and 0 < positions < context_length:
        shorter = f"fewer than a row of {context_length} tokens (context_length)"
        raise BaseModelError(f"the model {name!r} has {positions} positions, {shorter}")
    return config


def base_skeleton(
    name: str, revision: str | None = None, dtype: str = "float32", context_length: int | None = None
) -> PreTrainedModel:
    """Build the language model without its weights, on the meta device; see `check_base_model`."""
    config = check_base_model(name, revision, dtype, context_length=context_length)
    with _base_model_errors(name), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_base_model(
    name: str,
    revision: str | None = None,
    dtype: str = "float32",
    pickles: bool = True,
    context_length: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    """Load a causal language model and its tokenizer, in eval mode, on the CPU.

    Args:
        name: Hub id, folder, or the name of the embedded model.
        revision: branch, tag or commit on the Hub.
        dtype: a key of `DTYPES`.
        pickles: whether weights may be read from a pickle; False if a decomposition, perhaps a stranger's, names the
            model. Its commit on the Hub is then loaded even if a folder here has the same name.
        context_length: tokens in a row, which the model must have positions for.

    Returns:
        Model, tokenizer, and the loaded Hub commit (None for a folder).

    Raises:
        BaseModelError: it is neither a folder nor on the Hub, is a decomposition, lacks weights below its head, or has
            fewer positions than `context_length`.
    """
    check_base_model(name, revision, dtype, pickles, context_length)
    if dtype == "bfloat16" and not torch.accelerator.is_available() and bfloat16_is_emulated():
        logger.warning("this processor emulates bfloat16: the model is faster with float32")
    source = model_source(name)
    how: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    weights: dict[str, Any] = {"dtype": DTYPES[dtype], **({} if pickles else {"use_safetensors": True})}
    with _base_model_errors(name, pickles):
        if not pickles:
            source = recorded_model(source, revision, {})
            check_language_model(resolve(source, {"revision": revision}))
    tokenizer = _load_tokenizer(name, source, how)
    with _base_model_errors(name, pickles):
        load = partial(AutoModelForCausalLM.from_pretrained, source, output_loading_info=True, **how, **weights)
        model, info = with_retries(load, name)
    _judge_predictions(name, model.eval(), sorted(info["missing_keys"]))
    commit = _loaded_commit(source, revision)
    model.config._commit_hash = commit  # transformers 5 does not keep it; it is never saved
    return model, tokenizer, commit


def _judge_predictions(name: str, model: PreTrainedModel, missing: list[str]) -> None:
    """Keep in the model why its predictions mean nothing, or refuse a checkpoint whose layers would be random."""
    trunk = [key for key in missing if key.startswith(f"{model.base_model_prefix}.") and not is_other_tower(key)]
    if trunk:
        lacks = f"the checkpoint of {name!r} lacks {len(trunk)} weights of the layers and embeddings"
        raise BaseModelError(f"{lacks}, which would be random: {', '.join(trunk[:3])}: name a complete checkpoint")
    reason = "the base model sees the tokens that come after the one it predicts" if sees_later_tokens(model) else ""
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        reason = f"the checkpoint of the base model lacks weights ({', '.join(missing[:3])}{more}), which are random"
    if reason:
        logger.warning("%s: %s: figures that need its predictions are left out", name, reason)
    vars(model)["_no_predictions"] = reason


def load_tokenizer(name: str, revision: str | None = None, pickles: bool = True) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a language model without the model; see `load_base_model`."""
    source = model_source(name)
    if not pickles:
        with _base_model_errors(name, pickles):
            source = recorded_model(source, revision, {})
    return _load_tokenizer(name, source, {"revision": revision, "trust_remote_code": False})


def _load_tokenizer(name: str, source: str, how: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, or raise `BaseModelError`: without its files, transformers may make an empty one."""
    reason = "no file of a vocabulary"
    try:
        load = partial(AutoTokenizer.from_pretrained, source, **how)
        tokenizer: PreTrainedTokenizerBase = with_retries(load, name)
        added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()  # mistral-common has none
        special = {*tokenizer.all_special_tokens, *added, "▁"}
        if len(tokenizer) > len(special) or tokenizer.get_vocab().keys() - special:
            return tokenizer
    except Exception as error:  # each class of tokenizer has its own
        if transient_cause(error):
            raise BaseModelError(f"cannot load the tokenizer of {name!r}: {first_line(error)}") from error
        if "instantiate the backend tokenizer" not in str(error):  # a list of ways to make one
            reason = first_line(error)
    raise BaseModelError(
        f"{name!r} has no tokenizer that loads ({reason}): add tokenizer.json and tokenizer_config.json, as "
        "AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER) writes them, beside the model's config.json"
    )


@contextmanager
def _base_model_errors(name: str, pickles: bool = True) -> Iterator[None]:
    """Turn the errors of transformers into a `BaseModelError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        reason = first_line(error)
        if not pickles and "use_safetensors" in reason:
            reason = "it has no safetensors, and no pickle is read of a model that a decomposition names"
        where = "" if Path(model_source(name)).is_dir() else "it is not a local folder with a model, and: "
        raise BaseModelError(f"cannot load the model {name!r}: {where}{reason}") from error


def _loaded_commit(source: str, revision: str | None) -> str | None:
    if Path(source).is_dir():
        return None
    # The cache keeps every file under its commit: .../snapshots/<commit>/config.json
    path = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else revision


def check_safetensors(name: str, commit: str | None) -> None:
    """Raise `BaseModelError` if a model's weights are in a pickle, which loading a decomposition of it never reads."""
    source = model_source(name)
    names = ("model.safetensors", "model.safetensors.index.json")
    if Path(source).is_dir():
        found = any(Path(source).glob("*.safetensors"))
    else:
        found = any(isinstance(try_to_load_from_cache(source, file, revision=commit), str) for file in names)
    if not found:
        raise BaseModelError(
            f"the weights of {name!r} are in a pickle: load it, save it again with save_pretrained, and name that "
            "folder or repo"
        )

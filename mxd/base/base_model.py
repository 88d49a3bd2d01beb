"""Loading the language model that a decomposition belongs to."""

import logging
from collections.abc import Iterator
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
from mxd.modeling_mxd import MxDConfig
from mxd.modeling_mxd.downloads import first_line, with_retries
from mxd.modeling_mxd.loading import check_language_config, check_language_model

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BaseModelError(ValueError):
    """The base model cannot be loaded; the message says which and what to do."""


def default_device() -> torch.device:
    """Where models run: an accelerator if there is one that knows float64, as Apple's do not."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None or accelerator.type == "mps" else accelerator


def bfloat16_is_emulated() -> bool:
    """Whether the CPU has no bfloat16 instructions, so that products in bfloat16 are slower than in float32 (three
    times slower on an Intel Cascade Lake); False where this torch cannot tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    known = capabilities.get("architecture") in ("x86_64", "arm64", "aarch64")
    return known and not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def resolve_name(name: str) -> str:
    """The name under which a config records a base model: folders as absolute paths, the rest as given."""
    return str(Path(name).resolve()) if name != demo.MODEL_NAME and Path(name).is_dir() else name


def model_source(name: str) -> str:
    """Where a model of this name is loaded from: the embedded one's folder, else as given."""
    return str(demo.model_path()) if name == demo.MODEL_NAME else name


def check_base_model(
    name: str,
    revision: str | None = None,
    dtype: str = "float32",
    pickles: bool = True,
    context_length: int | None = None,
) -> PreTrainedConfig:
    """The config of a model, once it shows nothing that `load_base_model`, which has these arguments too, refuses. No
    more than that is downloaded.

    Raises:
        BaseModelError: as `load_base_model`.
    """
    if dtype not in DTYPES:
        raise BaseModelError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    source = model_source(name)
    with _explained(name):
        if not pickles:  # a stranger chose it: before transformers makes anything of its config
            check_language_config(source, {"revision": revision})
        load = partial(AutoConfig.from_pretrained, source, revision=revision, trust_remote_code=False)
        config = with_retries(load, name)
        _check_config(config, name, context_length)
    return config


def base_skeleton(
    name: str, revision: str | None = None, dtype: str = "float32", context_length: int | None = None
) -> PreTrainedModel:
    """The language model without its weights, on the meta device; see `check_base_model`."""
    config = check_base_model(name, revision, dtype, context_length=context_length)
    with _explained(name), torch.device("meta"):
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
        name: Hub id, folder, or the name of the embedded default.
        revision: branch, tag or commit on the Hub.
        dtype: a key of `DTYPES`.
        pickles: whether weights may be read from a pickle, where there are no safetensors; False where a stranger
            chose the model.
        context_length: tokens a row that it shall read.

    Returns:
        Model, tokenizer, and the Hub commit that was loaded (None for a folder).

    Raises:
        BaseModelError: when it is neither a folder nor can be had from the Hub, is a decomposition, or has fewer
            positions than `context_length`.
    """
    check_base_model(name, revision, dtype, pickles, context_length)
    if dtype == "bfloat16" and not torch.accelerator.is_available() and bfloat16_is_emulated():
        logger.warning("this processor emulates bfloat16: the model is faster with float32")
    source = model_source(name)
    how: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    with _explained(name, pickles):
        if not pickles:
            check_language_model(source, {"revision": revision})
        tokenizer = with_retries(partial(AutoTokenizer.from_pretrained, source, **how), name)
        how |= {"dtype": DTYPES[dtype]} if pickles else {"dtype": DTYPES[dtype], "use_safetensors": True}
        model = with_retries(partial(AutoModelForCausalLM.from_pretrained, source, **how), name)
    commit = _loaded_commit(source, revision)
    model.config._commit_hash = commit  # newer transformers don't keep it; it is never saved
    return model.eval(), tokenizer, commit


@contextmanager
def _explained(name: str, pickles: bool = True) -> Iterator[None]:
    """Makes a `BaseModelError` of whatever transformers raises."""
    try:
        yield
    except BaseModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        reason = first_line(error)
        if not pickles and "use_safetensors" in reason:
            reason = "it has no safetensors, and of a model that a decomposition names no pickle is read"
        where = "" if Path(model_source(name)).is_dir() else "it is no folder with a model, and: "
        raise BaseModelError(f"cannot load the model {name!r}: {where}{reason}") from error


def _check_config(config: PreTrainedConfig, name: str, context_length: int | None) -> None:
    """Refuse, before any weight is read, what is no language model, or reads no row of so many tokens."""
    if isinstance(config, MxDConfig):
        raise BaseModelError(
            f"{name!r} is a decomposition itself: name the model that it is of, {config.base_model_name_or_path!r}"
        )
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context_length is not None and isinstance(positions, int) and 0 < positions < context_length:
        raise BaseModelError(
            f"the model {name!r} has {positions} positions, fewer than a row of {context_length} tokens: take a "
            "context length (--context-length) that it can read"
        )


def _loaded_commit(source: str, revision: str | None) -> str | None:
    if Path(source).is_dir():
        return None
    # The cache keeps every file under its commit: .../snapshots/<commit>/config.json
    path = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else revision


def check_safetensors(name: str, commit: str | None) -> None:
    """Refuse a loaded model whose weights are in a pickle only: no decomposition of it could be put to use, since of a
    model that a decomposition names no pickle is read.

    Raises:
        BaseModelError: saying what to do.
    """
    source = model_source(name)
    names = ("model.safetensors", "model.safetensors.index.json")
    if Path(source).is_dir():
        found = any(Path(source).glob("*.safetensors"))
    else:
        found = any(isinstance(try_to_load_from_cache(source, file, revision=commit), str) for file in names)
    if not found:
        raise BaseModelError(
            f"the weights of {name!r} are in a pickle, which a decomposition's base is never read from: load it, write "
            "it anew with save_pretrained, and name that folder or repo"
        )

"""Decompositions that are there: loaded from a folder or the Hub, with their base, and how they were made."""

from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from mxd.base.base_model import BaseModelError, check_base_model, default_device, load_base_model
from mxd.data.provenance import recorded_runs
from mxd.evaluation.faithfulness import EVALUATION_NAME
from mxd.hub_cards.reading import check_weights, read_config, read_json
from mxd.modeling_mxd import MxDModel
from mxd.modeling_mxd.downloads import file_if_any, first_line, with_retries


def load_decomposition(name: str, layers: list[int] | None = None) -> MxDModel:
    """A decomposition from a folder or the Hub (`user/repo`, or `user/repo@revision`), or some layers of it; no code of
    it is run.

    Raises:
        ValueError: it is none, or cannot be had.
    """
    source, how = _source(name)
    if Path(source).is_dir():
        path = Path(source) / "config.json"
    else:
        try:
            path = Path(with_retries(partial(cached_file, source, "config.json", **how), name))
        except (OSError, ValueError) as error:
            raise ValueError(f"{name!r} is no folder with a decomposition, and: {first_line(error)}") from error
    config = read_config(path, name)
    if file_if_any(source, "adapter_config.json", how) is not None:
        raise ValueError(f"{name} holds an adapter beside the decomposition, which would be loaded with it")
    if path.parent == Path(source):  # a folder
        check_weights(path.parent, config)
    some: dict[str, Any] = {} if layers is None else {"layers": layers}
    decomposition = MxDModel.from_pretrained(source, **how, **some)
    assert isinstance(decomposition, MxDModel)
    return decomposition


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """Folder or Hub id, and the revision that stands behind its `@`, as in the Hub client's `hf://` paths."""
    repo, _, revision = name.partition("@")
    return (name, {}) if Path(name).is_dir() or not revision else (repo, {"revision": revision})


def output_folder(name: str) -> Path:
    """A folder to write into, which need not be there.

    Raises:
        ValueError: it is a file.
    """
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output {folder} is a file: name a folder with --output")
    return folder


def results_folder(source: str, output: str | None) -> Path:
    """Where what was measured of a decomposition is written: a folder that was asked for, else its own.

    Raises:
        ValueError: neither is a folder, or the one that was asked for is of another decomposition.
    """
    if output is None and not Path(source).is_dir():
        raise ValueError(f"{source} is no folder: if it is on the Hub, name a folder for the results with --output")
    folder = output_folder(source if output is None else output)
    if (folder / "config.json").is_file() and folder.resolve() != Path(source).resolve():
        raise ValueError(f"the output {folder} holds another model, whose results it would replace: name another")
    return folder


def check_base_of(decomposition: MxDModel, dtype: str, context_length: int | None = None) -> None:
    """Refuse what `load_base_of` refuses, as far as the base model's config shows it; no more is downloaded.

    Raises:
        ValueError: the decomposition names no base model (`BaseModelError`: or one that cannot be loaded).
    """
    name, revision = _base_of(decomposition)
    check_base_model(name, revision, dtype, pickles=False, context_length=context_length)


def _base_of(decomposition: MxDModel) -> tuple[str, str | None]:
    """Name and revision."""
    config = decomposition.config
    if not config.base_model_name_or_path:
        raise ValueError("config.json of the decomposition names no base_model_name_or_path, which its layers are of")
    name, revision = config.base_model_name_or_path, config.base_model_revision
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise BaseModelError(
            f"the folder {name} of the base model is not here: write into base_model_name_or_path of the "
            "decomposition's config.json where it is now, or what it is called on the Hub"
        )
    return name, revision


def load_base_of(
    decomposition: MxDModel, dtype: str, context_length: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model that a decomposition's config names, and its tokenizer; see `load_base_model`. Both models are
    then on the accelerator, where there is one.

    Raises:
        ValueError: as `check_base_of`.
    """
    name, revision = _base_of(decomposition)
    model, tokenizer, _ = load_base_model(name, revision, dtype, pickles=False, context_length=context_length)
    decomposition.to(default_device())
    return model.to(default_device()), tokenizer


def made_how(name: str) -> dict[str, Any]:
    """What evaluation.json of a decomposition (named as for `load_decomposition`) says of how it was made: the settings
    of its training and of its fine-tunings. Empty where it says nothing."""
    source, how = _source(name)
    path = file_if_any(source, EVALUATION_NAME, how)
    return recorded_runs(None if path is None else read_json(Path(path)).get("settings"))

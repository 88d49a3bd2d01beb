"""Load decompositions from folders or the Hub, with their base models and the record of how they were made."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from mxd import demo
from mxd.base.base_model import BaseModelError, check_base_model, default_device, load_base_model
from mxd.data.documents import DataError, local_files
from mxd.data.provenance import TextOptions, recorded_runs
from mxd.data.texts import Documents, load_documents, load_one
from mxd.data_files import is_data_file
from mxd.evaluation import weak_experts
from mxd.evaluation.faithfulness import EVALUATION_NAME
from mxd.hub_cards.reading import check_weights, read_config, read_json
from mxd.modeling_mxd import MxDModel
from mxd.modeling_mxd.configuration_mxd import shorten
from mxd.modeling_mxd.loading import file_if_any, first_line, recorded_model, with_retries

from .options import STDOUT
from .run_folder import RUN_NAME, output_folder

logger = logging.getLogger(__name__)

Text = TypeVar("Text")


def load_decomposition(name: str, layers: list[int] | None = None) -> MxDModel:
    """Load a decomposition, or some of its layers, from a folder or `user/repo[@revision]`; run no code of its repo.

    Raises:
        ValueError: there is no decomposition of that name, or it cannot be read.
    """
    source, how = _source(name)
    if is_data_file(name) and not Path(source).is_dir():
        raise ValueError(f"{name!r} is a data file, not a decomposition: pass it with --dataset")
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
    return cast(MxDModel, MxDModel.from_pretrained(source, **how, **some))


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """Return folder or Hub id, and the revision that follows `@`, as in the Hub client's `hf://` paths."""
    repo, _, revision = name.partition("@")
    if Path(name).is_dir() or not revision:
        return name, {}
    return recorded_model(repo, revision, {}), {"revision": revision}


def results_folder(source: str, output: str | None) -> Path | None:
    """Return the folder for a decomposition's results: the one asked for, else its own; None for standard output.

    Raises:
        ValueError: neither is a folder, or the one asked for holds another decomposition.
    """
    if output == STDOUT:
        return None
    if output is None and not Path(source).is_dir():
        raise ValueError(f"there is no folder {source}: if it is a repo on the Hub, give a folder with --output")
    folder = output_folder(source if output is None else output)
    if (folder / "config.json").is_file() and folder.resolve() != Path(source).resolve():
        raise ValueError(f"the output {folder} holds another model, whose results it would replace: name another")
    return folder


def load_base_and_text(
    decomposition: MxDModel, dtype: str, context_length: int, load_text: Callable[[], Text]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Text]:
    """Load the base model of a decomposition, and text; move both models to the accelerator, if there is one.

    What the base model's config shows to be wrong is refused before `load_text` fetches the text, and a wrong text
    before the base model's weights are fetched.

    Returns:
        Base model, its tokenizer, and what `load_text` returned.

    Raises:
        ValueError: the decomposition names no base model, or one that cannot be loaded (`BaseModelError`).
    """
    name, revision = decomposition.config.base_model_name_or_path, decomposition.config.base_model_revision
    if not name:
        raise ValueError("config.json of the decomposition names no base model (base_model_name_or_path)")
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise BaseModelError(
            f"the folder {name} of the base model is not here: write into base_model_name_or_path of the "
            "decomposition's config.json where it is now, or its id on the Hub"
        )
    how: dict[str, Any] = {"pickles": False, "context_length": context_length}
    check_base_model(name, revision, dtype, **how)
    text = load_text()
    model, tokenizer, _ = load_base_model(name, revision, dtype, **how)
    decomposition.to(default_device())
    return model.to(default_device()), tokenizer, text


def read_text(
    text: TextOptions, name: str, made: Mapping[str, Any], heldout: bool = False
) -> tuple[Documents, TextOptions, int | None]:
    """Load the text that a command reads: the one asked for, else that of the training, else the sample of mxd.

    The text of the training is known from the decomposition's evaluation.json. Local files that it names are read only
    beside a run.yaml, which is never pushed: a stranger's record opens no file of this machine.

    Args:
        text: the text asked for.
        name: the decomposition.
        made: what `made_how` returns for it.
        heldout: of the training's text, take the documents that the training held out.

    Returns:
        Documents, the text that they are of, and the seed with which they were held out (None: they are all of it).

    Raises:
        DataError: the text asked for cannot be read.
    """
    if text.dataset:
        return load_one(text), text, None
    training = made.get("training", {})
    recorded, seed = training.get("text"), training.get("seed")
    if isinstance(recorded, dict) and recorded.get("dataset"):
        known = {one.name: recorded[one.name] for one in fields(TextOptions) if one.name in recorded}
        try:
            used = TextOptions(**{**known, "context_length": text.context_length})
            if not Path(name, RUN_NAME).is_file() and any(map(local_files, used.dataset)):
                raise DataError("it is on this machine, and the decomposition was not made here")
            if heldout and isinstance(seed, int):
                return load_documents(used, seed)[1], used, seed
            return load_one(used), used, None
        except (ValueError, TypeError, AttributeError, OSError) as error:
            shown = shorten(str(recorded["dataset"]))
            logger.warning("the text of the training, %s, is not read: %s", shown, first_line(error))
    if training.get("model") != demo.MODEL_NAME:
        logger.warning("no dataset is named: %s reads the small text that ships with mxd", name)
    return load_one(text), text, None


def made_how(name: str) -> dict[str, Any]:
    """Return {"training": dict, "finetuning": list} of a decomposition's evaluation.json, each if it is recorded."""
    return recorded_runs(recorded_evaluation(name).get("settings"))


def warn_of_weak_experts(evaluation: Mapping[str, Any]) -> str:
    """Warn if the expert share of a layer in an evaluation.json is low, and return the warning."""
    layers = evaluation.get("layers")
    rows = layers.items() if isinstance(layers, dict) else ()
    if weak := weak_experts({f"layer {layer[:9]}": row for layer, row in rows if isinstance(row, dict)}):
        logger.warning(weak)
    return weak


def recorded_evaluation(name: str) -> dict[str, Any]:
    """Return a decomposition's evaluation.json, which may be a stranger's; empty if there is none."""
    path = source_file(name, EVALUATION_NAME)
    return {} if path is None else read_json(path)


def source_file(name: str, file: str) -> Path | None:
    """Return the path of a file of a decomposition, downloaded if need be; None if there is none."""
    source, how = _source(name)
    path = file_if_any(source, file, how)
    return None if path is None else Path(path)

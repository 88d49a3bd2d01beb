"""The output folder of a training: create, overwrite, resume.

Every run keeps `run.yaml` there, its options, and an unfinished one `run_start.json`, the facts of its beginning.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

import yaml

from mxd.base.base_model import resolve_name
from mxd.base.files import UNFINISHED_NAME, replace_text
from mxd.hub_cards.reading import read_json
from mxd.modeling_mxd import MxDConfig

from .options import INTERRUPTED, ResumableOptions, resumable, values

logger = logging.getLogger(__name__)

START_NAME, RUN_NAME = "run_start.json", "run.yaml"


class Interrupted(Exception):
    """Training was interrupted; the message says what was kept and how to continue."""

    def __init__(self, message: str, exit_code: int = INTERRUPTED):
        super().__init__(message)
        self.exit_code = exit_code  # of the command


class TrainingFailed(Exception):
    """Training raised `__cause__`; the message says what was kept and how to continue."""


def output_folder(name: str, option: str = "output") -> Path:
    """Return the path of a folder to write into, which need not exist; raise `ValueError` if it is a file."""
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the {option} {folder} is a file: name a folder with --{option}")
    return folder


def write_run(folder: Path, command: str, options: Any) -> None:
    """Write run.yaml: all options of a run, so that `mxd COMMAND --config run.yaml` repeats it.

    The run.yaml of a decomposition, which says how it was made, is kept when results are written beside it.
    """
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(_settled(options), sort_keys=False, allow_unicode=True, width=120)
    replace_text(folder / RUN_NAME, f"# Repeat: mxd {command} --config {RUN_NAME} --output OTHER\n{text}")


def _settled(options: Any) -> dict[str, Any]:
    """Return the options that make a run, as plain values; local models by absolute paths, no default of None."""

    def is_needed(one: Field[Any]) -> bool:
        return one.name not in ("overwrite", "resume") and not (one.default is None is getattr(options, one.name))

    asked = values(options, is_needed)
    for name in {"model", "decomposition"}.intersection(asked):
        asked[name] = resolve_name(asked[name])
    return dict(json.loads(json.dumps(asked)))


def check_output(options: ResumableOptions) -> Path:
    """Return the output folder of a training if it may be written to; create and delete nothing yet.

    Raises:
        ValueError: it is not empty and `overwrite` is not set, nor is `resume` and a run there to continue; it holds
            something other than a decomposition; or the run to resume is finished.
    """
    folder = output_folder(options.output)
    if options.resume and (folder / "config.json").is_file() and not (folder / START_NAME).is_file():
        raise ValueError(f"what is in {folder} is finished, there is nothing to resume: --overwrite makes it anew")
    names = {entry.name for entry in visible_entries(folder)} if folder.is_dir() else set()
    left = names - {START_NAME, RUN_NAME, UNFINISHED_NAME}  # by a run that ended before its first checkpoint
    if not left or (options.resume and (folder / START_NAME).is_file()):
        return folder
    if options.resume and not options.overwrite:
        raise ValueError(f"the output folder {folder} holds no run to resume, and is not empty: name another folder")
    if not options.overwrite:
        raise ValueError(f"the output folder {folder} is not empty: pass --overwrite to replace it, or --resume")
    if not _ours(folder):
        raise ValueError(f"the output folder {folder} holds no decomposition: --overwrite will not delete it")
    return folder


def begun(options: ResumableOptions) -> dict[str, Any]:
    """Return the facts that `prepare_output` wrote of the run to go on with; empty for a run that begins.

    A script that is started again and again may always pass `resume`: a run without a checkpoint begins.

    Raises:
        ValueError: the output folder is refused (`check_output`), or its run began with other options.
    """
    folder = check_output(options)
    if not options.resume:
        return {}
    if resumable(folder):
        return resumed_start(folder, options)
    logger.warning("there is no checkpoint in %s yet: the run starts from its beginning", folder)
    return {}


def visible_entries(folder: Path) -> list[Path]:
    """Return the entries of a folder without hidden files (.git, .DS_Store), which are ignored and never deleted."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _ours(folder: Path) -> bool:
    config = folder / "config.json"
    if config.is_file():
        return bool(read_json(config).get("model_type") == MxDConfig.model_type)
    return (folder / START_NAME).is_file()


def prepare_output(folder: Path, command: str, options: ResumableOptions, **facts: Any) -> None:
    """Empty the output folder, and write run.yaml and run_start.json with `facts`; with `resume` delete nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    deleted = visible_entries(folder) if options.overwrite or not options.resume else []
    for entry in deleted:  # the folder itself may be a mount point, or the working directory
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    write_run(folder, command, options)
    (folder / START_NAME).write_text(json.dumps(facts) + "\n")


def resumed_start(folder: Path, options: ResumableOptions) -> dict[str, Any]:
    """Return the facts that `prepare_output` wrote; raise `ValueError` if the run began with other options."""
    before, now = flat(yaml.safe_load((folder / RUN_NAME).read_text(encoding="utf-8"))), flat(_settled(options))
    for name in {**before, **now}:
        if name not in (*options.may_change, "output") and before.get(name) != now.get(name):
            was = f"{name} {before.get(name)!r}, not {now.get(name)!r}"
            raise ValueError(f"the run in {folder} had {was}: resume with the options of that run")
    return read_json(folder / START_NAME)


def check_same_documents(folder: Path, start: Mapping[str, Any], documents: int | None) -> None:
    """Raise a `ValueError` if the text has another number of documents than when the run began."""
    before = start.get("documents")
    if None not in (before, documents) and before != documents:
        was = f"had {before} documents when the run began and has {documents} now"
        raise ValueError(f"the text of the run in {folder} {was}: resume with the same files, or use --overwrite")


def flat(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with the trainer's beside them, so that a message can name the one that differs."""
    training = {f"training.{name}": value for name, value in asked.get("training", {}).items()}
    return {**asked, **training, "training": None}


def finish(folder: Path) -> None:
    """Remove checkpoints, the folders of passes and the record of the beginning: the run is finished."""
    for unneeded in (*folder.glob("checkpoint-*"), *folder.glob("layers-*")):
        shutil.rmtree(unneeded)
    shutil.rmtree(folder / UNFINISHED_NAME, ignore_errors=True)
    (folder / START_NAME).unlink(missing_ok=True)

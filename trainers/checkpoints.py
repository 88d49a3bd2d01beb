"""Files of a checkpoint: write a decomposition and the arguments that trained it, and find the newest one."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mxd.evaluation.faithfulness import EVALUATION_NAME

from .decomposition_arguments import DecompositionArguments

ARGUMENTS_NAME = "training_arguments.json"
# Not written to that file, which is pushed: folders of this machine, and secrets.
_LOCAL_ARGUMENTS = ("output_dir", "logging_dir", "resume_from_checkpoint", "run_name", "hub_token")


def write_decomposition(
    model: PreTrainedModel, folder: Path, state_dict: dict[str, Any] | None, args: DecompositionArguments
) -> None:
    """Save a model and its training's arguments, and delete an evaluation of other weights that were in the folder."""
    evaluation = folder / EVALUATION_NAME
    before = _digests(folder) if evaluation.is_file() else None
    if ignored := model._keys_to_ignore_on_save:  # an auxiliary transcoder's
        weights = state_dict or model.state_dict()
        state_dict = {name: value for name, value in weights.items() if name not in ignored}
    # By itself transformers saves in the first process only, and others may save layers of their own.
    vars(model)["should_save_on_this_rank"] = bool
    try:
        model.save_pretrained(folder, state_dict=state_dict)
    finally:
        del vars(model)["should_save_on_this_rank"]
    if before is not None and _digests(folder) != before:
        evaluation.unlink()
    arguments = {k: v for k, v in args.to_sanitized_dict().items() if k not in _LOCAL_ARGUMENTS}
    (folder / ARGUMENTS_NAME).write_text(json.dumps(arguments, indent=2) + "\n")


def _digests(folder: Path) -> dict[str, bytes]:
    return {path.name: hashlib.blake2b(path.read_bytes()).digest() for path in folder.glob("model*.safetensors")}


def last_complete_checkpoint(output_dir: str | os.PathLike[str] | None) -> str:
    """Return the newest complete checkpoint in a folder (the trainer state is written last); ValueError if none."""
    steps = {}
    for folder in Path(output_dir or ".").glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")  # a user's copy may be called checkpoint-best
        if number.isdecimal() and (folder / TRAINER_STATE_NAME).is_file():
            steps[int(number)] = folder
    if not steps:
        raise ValueError(f"no complete checkpoint in {output_dir} to resume from: start again")
    return str(steps[max(steps)])

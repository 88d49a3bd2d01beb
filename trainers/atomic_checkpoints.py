"""Checkpoints that are complete or not there: they are written under another name, and then renamed."""

import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from mxd.base.files import UNFINISHED_NAME


class AtomicCheckpoints(Trainer):
    """A Trainer that can be killed at any moment and leaves no half-written checkpoint.

    Of `save_total_limit` the newest checkpoint and the best one are kept in any case. The best one's place is in the
    trainer's state.
    """

    _staged: Path | None = None
    _alone = False  # the other processes do not save with this one

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Remove what a process that was killed left behind, and train."""
        if self.args.should_save:
            shutil.rmtree(Path(str(self.args.output_dir), UNFINISHED_NAME), ignore_errors=True)
        return super().train(*args, **kwargs)

    def save_alone(self) -> None:
        """Save a checkpoint without the other processes, whose random states it then lacks."""
        self._alone = True
        try:
            self._save_checkpoint(self.model, None)
        finally:
            self._alone = False

    def store_flos(self) -> None:
        """Add up the operations of all processes, unless this one is alone."""
        if not self._alone:
            super().store_flos()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staged or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output, state = Path(super()._get_output_dir(trial)), self.state
        self._staged = output / UNFINISHED_NAME
        checkpoint = self._staged / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staged = None
        if not self._alone:
            self.accelerator.wait_for_everyone()
        final = output / checkpoint.name
        is_best = state.best_model_checkpoint == str(checkpoint)
        if is_best:
            state.best_model_checkpoint = str(final)
        if self.args.should_save:
            if is_best:
                state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))
            if final.exists():  # of an earlier training
                shutil.rmtree(final)
            checkpoint.rename(final)
            rotate_checkpoints(str(output), self.args.save_total_limit, state.best_model_checkpoint, use_mtime=True)
        if not self._alone:
            self.accelerator.wait_for_everyone()
        shutil.rmtree(checkpoint.parent, ignore_errors=True)  # on another machine, it holds a random state

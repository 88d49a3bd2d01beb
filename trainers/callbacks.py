"""Trainer callbacks: progress in tokens, and a checkpoint when training is interrupted or fails."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .atomic_checkpoints import AtomicCheckpoints
from .decomposition_arguments import DecompositionArguments

logger = logging.getLogger(__name__)


class TokenProgressCallback(ProgressCallback):
    """Progress bar that counts the tokens of all processes, with the loss at its end."""

    def __init__(self, tokens_per_step: int, name: str):
        super().__init__()
        self.tokens_per_step = tokens_per_step
        self.name = name

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar, at the resumed step if there is one."""
        if state.is_world_process_zero:
            total, done = state.max_steps * self.tokens_per_step, state.global_step * self.tokens_per_step
            self.training_bar: tqdm[Any] = tqdm(
                desc=self.name, total=total, initial=done, unit="tok", unit_scale=True, dynamic_ncols=True
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance to the tokens of the steps so far."""
        if self.training_bar is not None:
            self.training_bar.update(state.global_step * self.tokens_per_step - self.training_bar.n)

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        """Show the latest loss at the bar's end rather than a line per log, and the largest of several layers."""
        if self.training_bar is not None and logs and "loss" in logs:
            shown = f"loss {float(logs['loss']):.4f}"
            if layers := {name: value for name, value in logs.items() if name.endswith("/loss")}:
                worst = max(layers, key=layers.__getitem__)
                shown += f", {worst.removesuffix('/loss').replace('_', ' ')} {layers[worst]:.4f}"
            self.training_bar.set_postfix_str(shown, refresh=False)


class InterruptCallback(TrainerCallback):
    """Finish the current step on Ctrl-C or SIGTERM, save a checkpoint and stop.

    A second Ctrl-C stops one process at once. torchrun repeats a signal that all processes have got already, and a
    cluster repeats SIGTERM.
    """

    def __init__(self) -> None:
        self.signal = 0  # the number of the signal to any process
        self.saved_step: int | None = None  # of the last checkpoint; None before the training has begun
        self.epochs_before = 0.0  # of a resumed training whose Trainer counts from 0
        self._processes = 1  # that take steps together

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the training."""
        return self.signal > 0

    @contextmanager
    def listening(self, args: DecompositionArguments) -> Iterator[None]:
        """Handle the signals inside the block. Python allows this in the main thread only; other threads skip it."""
        self.signal, self.saved_step, self._processes = 0, None, args.world_size * args.shards
        limit = args.save_total_limit
        in_main_thread = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            args.save_total_limit = limit
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start from the step of the checkpoint that is resumed, or from 0."""
        self.saved_step = state.global_step

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and self._processes == 1 and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal:
            again = " (interrupt again to stop at once)" if self._processes == 1 else ""
            logger.warning("interrupted: finishing this step and saving a checkpoint%s", again)
        self.signal = max(self.signal, number)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Request a checkpoint and the end of the training once any process was signalled."""
        state.epoch = (state.epoch or 0.0) + self.epochs_before
        if self._processes > 1:
            signalled = torch.tensor(self.signal, device=args.device)
            torch.distributed.all_reduce(signalled, torch.distributed.ReduceOp.MAX)
            self.signal = int(signalled)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def save_after_failure(self, trainer: AtomicCheckpoints) -> None:
        """Save a checkpoint of the last whole step, unless there is one; a failure to do so is only logged.

        Of several processes that hold the same weights, the first saves it.
        """
        step, args = trainer.state.global_step, trainer.args
        try:
            whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
            if self.saved_step is not None and step > self.saved_step and args.should_save and whole:
                trainer.save_alone()
                self.saved_step = step
        except Exception as error:  # of any kind, such as a full disk: the first one is the one to raise
            logger.warning("no checkpoint of step %d was saved: %s", step, error)
        if self.saved_step:
            where = f"{args.output_dir}: resume_from_checkpoint=True goes on from it"
            logger.warning("the training failed; the checkpoint of step %d is kept in %s", self.saved_step, where)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the last checkpoint, which transformers deletes beside the best one if `save_total_limit` is 1."""
        self.saved_step = state.global_step
        if self.interrupted:
            args.save_total_limit = None

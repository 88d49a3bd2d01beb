"""Trainer callbacks: progress in tokens, and a Ctrl-C that keeps what was made."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mxd.evaluation.rank import decomposition_ranks
from mxd.modeling_mxd import MxDModel

logger = logging.getLogger(__name__)


class TokenProgressCallback(ProgressCallback):
    """A training bar that counts tokens, so that it shows tokens/s and the time left; losses go beside the bar.

    Args:
        tokens_per_step: tokens that one optimiser step trains on, over all processes.
        name: what stands before the bar.
    """

    def __init__(self, tokens_per_step: int, name: str):
        super().__init__()
        self.tokens_per_step = tokens_per_step
        self.name = name
        self.training_bar: tqdm[Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar, at the resumed step if there is one."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                desc=self.name,
                total=state.max_steps * self.tokens_per_step,
                initial=state.global_step * self.tokens_per_step,
                unit="tok",
                unit_scale=True,
                dynamic_ncols=True,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance by the tokens of the steps since the last call."""
        if self.training_bar is not None:
            self.training_bar.update((state.global_step - self.current_step) * self.tokens_per_step)
        self.current_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show the latest loss at the bar's end rather than a line per log."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.4f}", refresh=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


class InterruptCallback(TrainerCallback):
    """Finishes the step at hand on Ctrl-C (or SIGTERM), saves a checkpoint and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._signalled = False  # this process itself

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block; afterwards the handlers are as they were. Only the main thread
        can: elsewhere signals are left alone."""
        self.interrupted = self._signalled = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self.interrupted = self._signalled = True
        logger.warning("interrupted: finishing this step and saving a checkpoint (interrupt again to stop at once)")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint and for the end once a signal has come, to whichever process."""
        if args.world_size > 1:
            signalled = torch.tensor(float(self.interrupted), device=args.device)
            torch.distributed.all_reduce(signalled, torch.distributed.ReduceOp.MAX)
            self.interrupted = bool(signalled)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True


class RankCallback(TrainerCallback):
    """Logs the rank of an MxD's experts every so many steps and after the last one: `layer_8/normalised_rank`,
    `layer_8/smallest_singular_value` (both means over a sample of experts, the same at each step) and
    `layer_8/zeros`, the share of zeros in C. See `mxd.evaluation.expert_ranks`.

    Args:
        decomposition: what is trained; transcoder layers, which have no rank, are passed over.
        steps: every how many.
        log: `Trainer.log`.
        experts: how many a layer to sample.
    """

    def __init__(self, decomposition: MxDModel, steps: int, log: Callable[[dict[str, float]], None], experts: int = 16):
        self.decomposition = decomposition
        self.steps = steps
        self.log = log
        self.experts = experts

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure and log, in the first process."""
        due = state.global_step % self.steps == 0 or state.global_step == state.max_steps
        if not (due and state.is_world_process_zero):
            return
        logs: dict[str, float] = {}
        for layer, ranks in decomposition_ranks(self.decomposition, self.experts).items():
            logs[f"layer_{layer}/normalised_rank"] = float(ranks.normalised_rank.mean())
            logs[f"layer_{layer}/smallest_singular_value"] = float(ranks.smallest.mean())
            logs[f"layer_{layer}/zeros"] = ranks.share_of_zeros
        if logs:
            due = control.should_log
            self.log(logs)
            control.should_log = due  # logging has put it at False, and with it the loss that is due with this step

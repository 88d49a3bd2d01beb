"""Training data of a decomposition's trainers: measured on, trained on and, after an interruption, read on."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .hub_pushes import HubPushes
from .training_rows import STATE_NAME, FirstRows, TrainingRows, load_position

DEFAULT_TOKENS = 65536  # to measure on


class RowReading(HubPushes):
    """Trainer that opens an iterable dataset once, for what it measures and for the training.

    If the dataset has `state_dict` and `load_state_dict`, as those of `pack` and others of `datasets` have, checkpoints
    hold the position, and a resumed training reads on there. Otherwise it reads again what it trained on, and skips it,
    as the stock Trainer does.
    """

    train_dataset: Any
    _training_rows: TrainingRows | None = None
    _drawn = (0, 0)  # the step that rows were drawn in, and how many
    _resumed_from: str | None = None  # the checkpoint with the position at which the training began
    _random_state = True  # whether it is the checkpoint's

    def batch_of_all(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Prepare a batch, with the rows of all processes."""
        raise NotImplementedError

    def loss_mask(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the positions that the loss includes."""
        raise NotImplementedError

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the micro-batches of a step, and note how many rows they are."""
        self._release_rows()
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._keeps_position:
            rows = sum(find_batch_size(batch) for batch in batches) * self.args.world_size
            self._drawn = self.state.global_step, rows
        if self._resumed_from is not None and not self._random_state:  # opening a DataLoader draws a random number
            self._load_rng_state(self._resumed_from)
            self._random_state = True
        return batches, count

    @property
    def _rows(self) -> TrainingRows | None:
        """The training data if they are iterable; None of others, and with workers, each of which reads its own."""
        data = self.train_dataset
        if not isinstance(data, IterableDataset) or self.args.dataloader_num_workers:
            return None
        if self._training_rows is None or self._training_rows.dataset is not data:
            self._training_rows = TrainingRows(data)
        return self._training_rows

    @property
    def _keeps_position(self) -> bool:
        """Whether checkpoints hold the position in the training data: not if several processes read apart."""
        reads_all = self.args.world_size == 1 or self.accelerator.dispatch_batches is not False
        return self._rows is not None and self._rows.resumes and reads_all

    @property
    def reads_on(self) -> bool:
        """Whether the training began at the position that a checkpoint holds."""
        return self._resumed_from is not None

    def _release_rows(self) -> None:
        """Note that the rows drawn were trained on, if their step is done."""
        step, count = self._drawn
        if self._rows is not None and self.state.global_step > step:
            self._rows.release(count)
            self._drawn = self.state.global_step, 0

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the DataLoader of a training, which begins at its start."""
        if self._rows is not None:
            self._rows.restart()
        return self._dataloader(self._rows)

    def _dataloader(self, rows: TrainingRows | FirstRows | None) -> DataLoader[Any]:
        data = self.train_dataset
        self.train_dataset = data if rows is None else rows
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = data

    def training_batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield training batches from the start of the data; the random state stays as it is."""
        with torch.random.fork_rng(devices=[]):  # data are drawn on the CPU
            for batch in self._dataloader(None if self._rows is None else FirstRows(self._rows)):
                yield self.batch_of_all(batch)

    def start_rows(self, checkpoint: Path | None) -> None:
        """Begin the training data at a checkpoint's position, or at the first row and read what is measured on."""
        self._drawn, self._resumed_from = (0, 0), None
        if self._rows is None:
            return
        position = load_position(checkpoint) if checkpoint is not None and self._keeps_position else None
        self._rows.start(position)
        if position is not None:
            self._resumed_from, self._random_state = str(checkpoint), False
            return
        asked = (self.args.calibration_tokens, self.args.statistics_tokens)
        tokens, count = max(DEFAULT_TOKENS if one is None else one for one in asked), 0
        steps = self.args.max_steps * self.args.gradient_accumulation_steps
        try:
            for number, batch in enumerate(self.training_batches(), 1):
                count += self.loss_mask(batch).numel()
                if count >= tokens or number == steps:
                    break
        except Exception:
            if not count:
                raise  # others are raised again by what reads on

    def save_rows(self, checkpoint: Path) -> None:
        """Write the position in the training data into a checkpoint, after the last whole step."""
        self._release_rows()
        if self._rows is not None and self._keeps_position:
            torch.save(self._rows.state_dict(), checkpoint / STATE_NAME)

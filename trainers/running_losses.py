"""The losses of a training since its last log, and the first step in which one was not finite."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

STORED_TOKENS = 24


class DivergenceError(ValueError):
    """The loss or a weight is not finite. Training was stopped, and these weights were not saved."""


class RunningLosses:
    """Sums of losses on the training's device; nothing waits for the device before `means`."""

    decode: Callable[[list[int]], str] | None = None
    """Turns token ids into text, to name a batch by."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all losses."""
        self._sums: dict[str, Tensor] = {}
        self._first_bad: Tensor | None = None  # () float: the step, or infinity
        self._starts: dict[int, Tensor] = {}
        self.since = 0

    def add_batch(self, step: int, batch: Mapping[str, Tensor]) -> None:
        """Keep the first token ids of a step's batch, to name it by."""
        ids = batch.get("input_ids")
        if ids is not None and ids.dim() > 1:
            self._starts[step] = ids[0, :STORED_TOKENS]

    def add(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of a micro-batch of a step, by name."""
        if not self._sums:
            self.since = step - 1
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0) + loss.detach()
            bad = torch.where(loss.detach().isfinite(), math.inf, float(step))
            self._first_bad = bad if self._first_bad is None else torch.minimum(self._first_bad, bad)

    def means(self, step: int, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the mean of every loss over the steps until `step`; `reduce` is the mean over processes."""
        steps = step - self.since
        return {name: float(reduce(total)) / steps for name, total in self._sums.items()} if steps > 0 else {}

    def first_bad(self, rows: int, gather: Callable[[Tensor], Tensor]) -> str:
        """Name the first step in which a loss of any process was not finite, and its batch; empty if there is none.

        `rows` are those of a step; `gather` stacks a number of every process.
        """
        found = math.inf if self._first_bad is None else float(gather(self._first_bad).min())
        if not math.isfinite(found):
            return ""
        step, ids = int(found), self._starts.get(int(found))
        text = "" if ids is None else f", which begin with the token ids {ids.tolist()}"
        if ids is not None and self.decode is not None:
            text = f", which begin with {self.decode(ids.tolist())!r}"
        return f"; the first such loss is that of step {step}, rows {rows * (step - 1) + 1} to {rows * step}{text}"

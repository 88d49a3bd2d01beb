"""Keep the first batches of a stream, from which all measurements of a training read, so that it is opened once."""

from typing import Any

import torch
from torch.utils.data import IterableDataset

DEFAULT_TOKENS = 65536


def stream_start(trainer: Any) -> list[dict[str, Any]]:
    """Return the batches of a stream that a `DecompositionTrainer` calibrates and measures on; none of other data."""
    if not isinstance(trainer.train_dataset, IterableDataset):
        return []
    asked = (trainer.args.calibration_tokens, trainer.args.statistics_tokens)
    tokens, count = max(DEFAULT_TOKENS if one is None else one for one in asked), 0
    steps = trainer.args.max_steps * trainer.args.gradient_accumulation_steps
    batches: list[dict[str, Any]] = []
    with torch.random.fork_rng(devices=[]):
        try:
            for batch in trainer.get_train_dataloader():
                batches.append(batch)
                count += trainer.loss_mask(trainer.batch_of_all(batch)).numel()
                if count >= tokens or len(batches) == steps:
                    break
        except Exception:
            if not batches:
                raise  # later errors are raised again for what needs more batches
    return batches

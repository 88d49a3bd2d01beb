"""Short rows of random tokens, a decomposition and arguments for a training of a few steps."""

import torch
from datasets import Dataset
from factories import GLU, mxd_model

from mxd.trainers import DistillationArguments

ARGUMENTS = {
    "per_device_train_batch_size": 8,
    "max_steps": 10,
    "learning_rate": 1e-2,
    "calibration_tokens": 200,
    "statistics_tokens": 200,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
# An init far from the MLP and no term but the error: the training must then lower the error.
PLAIN = {
    "decoder_init": "zero",
    "modulation_init": "random",
    "min_mean_ablation_error": 0.0,
    "auxiliary_weight": 0.0,
}


def rows(count=64, length=12, ragged=False):
    """Rows of ids below 64; ragged rows have 3 to `length` − 1 tokens."""
    ids = torch.randint(0, 64, (count, length)).tolist()
    if ragged:
        ids = [row[: 3 + index % (length - 3)] for index, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids})


def decomposition(layers=(1,), method="mxd", **changes):
    return mxd_model(layers, **{"num_experts": 48, "method": method, **GLU, **changes})


def arguments(folder, **changes):
    return DistillationArguments(**{"output_dir": str(folder), **ARGUMENTS, **changes})

"""What the tests of both trainers share: short rows of random tokens, and arguments for a training of moments."""

import torch
from datasets import Dataset

from mxd.modeling_mxd import MxDConfig, MxDModel
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
# A start far from the MLP and nothing but the error to learn: what a training then has to do is known.
PLAIN = {
    "decoder_init": "zero",
    "modulation_init": "random",
    "min_mean_ablation_error": 0.0,
    "auxiliary_weight": 0.0,
}


def rows(count=64, length=12, ragged=False):
    """Rows of ids below 64; ragged: of 3 to `length` − 1 tokens."""
    ids = torch.randint(0, 64, (count, length)).tolist()
    if ragged:
        ids = [row[: 3 + index % (length - 3)] for index, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids})


def decomposition(layers=(1,), method="mxd", **changes):
    values = {
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_experts": 48,
        "num_experts_per_tok": 4,
        "hidden_act": "silu",
        "encoder_type": "glu",
        "method": method,
    }
    return MxDModel(MxDConfig(layers=list(layers), **{**values, **changes}))


def arguments(folder, **changes):
    return DistillationArguments(**{"output_dir": str(folder), **ARGUMENTS, **changes})

"""Train in two processes that share experts or layers: `python sharded.py OUTPUT OPTIONS`, where OPTIONS are JSON.

Trainers of tiny models are compared with one that trains in one process, as each of these also does by itself. Then
`decompose` takes the OPTIONS. Prints lines of JSON: one for each case of the trainers, and what `decompose` returns.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from factories import GLU, make_tiny_llama, mxd_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from mxd import DecompositionOptions, decompose
from mxd.base.processes import join_apart, train_apart
from mxd.jobs import decompose as job
from mxd.jobs.run_folder import Interrupted
from mxd.trainers import DistillationArguments, DistillationTrainer
from mxd.trainers.expert_shards import ShardedTrainer

CASES = {
    "mxd": {**GLU, "num_experts": 47},
    "few": {**GLU, "num_experts": 5, "num_experts_per_tok": 4},
    "skip": {"method": "skip_transcoder", "num_experts": 48, "gate_bias": False},
}
ARGUMENTS = {"per_device_train_batch_size": 4, "max_steps": 2, "save_steps": 1, "learning_rate": 1e-2, "use_cpu": True,
             "logging_steps": 1, "calibration_tokens": 100, "statistics_tokens": 48, "disable_tqdm": True,
             "train_sampling_strategy": "sequential"}  # fmt: skip


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def difference(one, two):
    """Return the largest norm of a difference of two tensors of a name, relative to the tensor's."""
    assert one.keys() == two.keys()
    norms = [((two[name] - value).double().norm(), value.double().norm()) for name, value in one.items()]
    return max(float(different / norm.clamp_min(1e-3)) for different, norm in norms)


def saved(folder):
    files = [*folder.glob("*.safetensors")]
    state = torch.load(folder / "optimizer.pt")["state"] if (folder / "optimizer.pt").exists() else {}
    tensors = {(file.name, name): value for file in files for name, value in load_file(file).items()}
    return tensors | {(index, name): value for index, values in state.items() for name, value in values.items()}


def train(kind, case, folder, resume=None):
    """Train in one process, or in all that there are."""
    rank, count = train_apart()
    args = DistillationArguments(output_dir=str(folder), **ARGUMENTS)
    join_apart()
    args.rank, args.shards = (rank, count) if kind is ShardedTrainer else (0, 1)
    model, rows = make_tiny_llama(), Dataset.from_dict({"input_ids": torch.randint(0, 64, (96, 12)).tolist()})
    trainer = kind(mxd_model([0, 2], **CASES[case]), model, args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    torch.distributed.barrier()
    return trainer


def compare(output, case):
    """Return how a training in all processes differs from one in this process."""
    alone, together = output / f"{case}-alone-{train_apart()[0]}", output / case
    trainers = [train(DistillationTrainer, case, alone), train(ShardedTrainer, case, together)]
    logs = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in trainers]
    steps = zip(*logs, strict=True)
    states = [trainer.model.state_dict() for trainer in trainers]
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (alone, together)]
    folders = ["final", "checkpoint-1", "checkpoint-2"]
    return {
        "case": case,
        "same files": files[0] == files[1],
        "log": max(abs(two[name] / one[name] - 1) for one, two in steps for name in ("loss", "grad_norm")),
        "weights": difference(*states),
        "saved": max(difference(saved(alone / name), saved(together / name)) for name in folders),
    }


def main(output, options):
    torch.set_num_threads(1)
    output, options, lines = Path(output), json.loads(options), []
    lines += [compare(output, case) for case in CASES]
    # What one process saved goes on in two, and what two saved in one.
    rank = train_apart()[0]
    train(ShardedTrainer, "mxd", output / "on", str(output / "mxd-alone-0" / "checkpoint-1"))
    train(DistillationTrainer, "mxd", output / f"on-{rank}", str(output / "mxd" / "checkpoint-1"))
    reference = saved(output / "mxd" / "final")
    differences = {name: difference(reference, saved(output / name / "final")) for name in ("on", f"on-{rank}")}
    lines.append({"case": "resumed", "same files": True, **differences})
    whole = job.DistillationTrainer, job.ShardedTrainer
    for shard, stops in (("layers", False), ("layers", True), ("experts", True)):
        callbacks = [Interrupt()] if stops else []
        job.DistillationTrainer, job.ShardedTrainer = (partial(kind, callbacks=callbacks) for kind in whole)
        folder = str(output / f"{shard}{'-part' * stops}")
        try:
            lines.append(decompose(DecompositionOptions(**options, shard=shard, output=folder))["layers"])
        except Interrupted as error:
            lines.append(str(error))
    sys.stdout.write("\n" + "".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main(*sys.argv[1:])

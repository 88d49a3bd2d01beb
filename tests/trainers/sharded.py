"""Train in two processes that hold half of the experts each, and compare with training in one: `python sharded.py OUTPUT`.

Every process also trains by itself, as one process does. Prints a line of JSON for every case.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from factories import GLU, make_tiny_llama, mxd_model
from safetensors.torch import load_file

from mxd.base.processes import join_apart, train_apart
from mxd.trainers import DistillationArguments, DistillationTrainer
from mxd.trainers.expert_shards import ShardedTrainer

CASES = {
    "mxd": {**GLU, "num_experts": 47},
    "few": {**GLU, "num_experts": 5, "num_experts_per_tok": 4},
    "all": {**GLU, "num_experts": 6, "num_experts_per_tok": 6},
    "transcoder": {"method": "transcoder", "num_experts": 48},
    "skip": {"method": "skip_transcoder", "num_experts": 48, "gate_bias": False},
}


def difference(one, two):
    assert one.keys() == two.keys()
    return max(
        float((two[name] - value).double().norm() / value.double().norm().clamp_min(1e-3))
        for name, value in one.items()
    )


def saved(folder):
    files = [*folder.glob("*.safetensors")]
    return {(file.name, name): value for file in files for name, value in load_file(file).items()}


def states(folder):
    state = torch.load(folder / "optimizer.pt")["state"]
    return {(index, name): value for index, values in state.items() for name, value in values.items()}


def main(output):
    torch.set_num_threads(1)
    rank, count = train_apart()
    teacher, rows = make_tiny_llama(), Dataset.from_dict({"input_ids": torch.randint(0, 64, (96, 12)).tolist()})
    common = {"per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 3, "learning_rate": 1e-2, "logging_steps": 2,
              "calibration_tokens": 200, "statistics_tokens": 96, "disable_tqdm": True, "use_cpu": True,
              "train_sampling_strategy": "sequential"}  # fmt: skip

    def train(case, kind, folder, resume=None, **changes):
        args = DistillationArguments(output_dir=str(folder), **{**common, **changes})
        join_apart()
        args.rank, args.shards = (rank, count) if kind is ShardedTrainer else (0, 1)
        trainer = kind(mxd_model([0, 2], **CASES[case]), teacher, args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(folder / "final"))
        return trainer

    for case in CASES:
        alone = Path(output, f"{case}-alone-{rank}")
        together = Path(output, case)
        trainers = [train(case, DistillationTrainer, alone), train(case, ShardedTrainer, together)]
        norms = [
            [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry] for trainer in trainers
        ]
        losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in trainers]
        own = {name: value.detach() for name, value in trainers[1].model.state_dict().items()}
        report = {"case": case, "rank": rank, "norms": norms, "losses": losses,
                  "model": difference(trainers[0].model.state_dict(), own)}  # fmt: skip
        torch.distributed.barrier()
        if rank == 0:
            for name in ("final", "checkpoint-3", "checkpoint-6"):
                report[name] = difference(saved(alone / name), saved(together / name))
                files = [sorted(path.name for path in (folder / name).iterdir()) for folder in (alone, together)]
                report["files"] = files[0] == files[1]
            report["optimizer"] = difference(states(alone / "checkpoint-3"), states(together / "checkpoint-3"))
        torch.distributed.barrier()
        print(json.dumps(report), flush=True)
    # A checkpoint of one process goes on in two, and one of two in one.
    for case in ("mxd", "skip"):
        whole = train(
            case, DistillationTrainer, Path(output, f"{case}-on-{rank}"), str(Path(output, case, "checkpoint-3"))
        )
        half = train(
            case, ShardedTrainer, Path(output, f"{case}-on"), str(Path(output, f"{case}-alone-0", "checkpoint-3"))
        )
        reference = saved(Path(output, f"{case}-alone-{rank}", "final"))
        found = {
            "resumed": case,
            "rank": rank,
            "whole": difference(saved(Path(whole.args.output_dir, "final")), reference),
        }
        torch.distributed.barrier()
        found["half"] = difference(saved(Path(half.args.output_dir, "final")), reference)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Train a tiny model in a process of its own, or several one after another, between which are `--`:
`python distil.py OUTPUT KIND [kill=STEP] [interrupt=STEP] [resume] [plain]`. Prints the step at which each ends.

kill, interrupt: send the signal to the last of the processes. plain: rows in their order, and a step of 2 × 8 rows in
one process or in two.

KIND: distillation on `rows` (map-style) or a `stream` (an iterable dataset with a shuffle buffer), `padded` (one in
which every second batch, that of the second process, has a fourth of the tokens), `routed` (rows, hierarchical
routing; with `plain` of 3 to 11 tokens), `auxiliary` (rows, auxiliary transcoder), or `finetuning`.
"""

import os
import signal
import sys

import torch
from datasets import Dataset
from factories import GLU, make_tiny_llama, mxd_model, randomise
from transformers import TrainerCallback

from mxd.modeling_mxd import make_spliced
from mxd.trainers import DistillationArguments, DistillationTrainer, FinetuningArguments, FinetuningTrainer


class Signal(TrainerCallback):
    def __init__(self, number, step):
        self.number = number
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), self.number)


def main(output, kind, *options):
    torch.set_num_threads(1)
    teacher = make_tiny_llama()
    groups = {"num_expert_groups": 6, "num_groups_per_tok": 2} if kind == "routed" else {}
    model = mxd_model([0, 2], num_experts=48, **GLU, **groups)
    ids = torch.randint(0, 64, (96, 12)).tolist()
    if kind == "routed" and "plain" in options:
        ids = [row[: 3 + index % 9] for index, row in enumerate(ids)]
    rows = Dataset.from_dict({"input_ids": ids})
    if kind == "stream":
        rows = rows.to_iterable_dataset().shuffle(seed=3, buffer_size=20).repeat(None)
    if kind == "padded":
        masks = [[1] * (12 if index // 4 % 2 == 0 else 3) + [0] * (9 * (index // 4 % 2)) for index in range(96)]
        rows = rows.add_column("attention_mask", masks).to_iterable_dataset().repeat(None)
    arguments = {
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "calibration_tokens": 200,
        "statistics_tokens": 176,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if "plain" in options:
        arguments["per_device_train_batch_size"] = 8 // int(os.environ.get("WORLD_SIZE", "1"))
        arguments["train_sampling_strategy"] = "sequential"
    signals = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}
    asked = [option.split("=") for option in options if "=" in option]
    callbacks = [Signal(signals[what], int(step)) for what, step in asked]
    common = {"train_dataset": rows, "callbacks": callbacks}
    if kind == "finetuning":
        spliced = make_spliced(teacher, randomise(model), "decomposition")
        trainer = FinetuningTrainer(spliced, FinetuningArguments(**arguments), **common)
    else:
        arguments |= {"auxiliary_weight": float(kind in ("auxiliary", "routed"))}
        trainer = DistillationTrainer(model, teacher, DistillationArguments(**arguments), **common)
    trainer.train(resume_from_checkpoint="resume" in options)
    trainer.save_model(output + "/final")
    return trainer.state.global_step


if __name__ == "__main__":
    trainings = [training.split(",") for training in ",".join(sys.argv[1:]).split(",--,")]
    sys.stdout.write(f"\n{[main(*training) for training in trainings]}\n")

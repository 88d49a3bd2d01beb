"""A real training on a tiny model in a process of its own:
`python distil.py OUTPUT KIND [kill=STEP] [interrupt=STEP] [resume] [plain]`.

kill, interrupt: the last of the processes; plain: SGD, rows in their order, and a step of 8 rows in one process or in
two.

KIND: distillation on `rows` (map-style) or a `stream` (an iterable dataset with a shuffle buffer), `routed` (rows,
hierarchical routing), `auxiliary` (rows, auxiliary transcoder), or `finetuning`.
"""

import os
import signal
import sys

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from mxd.modeling_mxd import MxDConfig, MxDModel, make_spliced
from mxd.trainers import DistillationArguments, DistillationTrainer, FinetuningArguments, FinetuningTrainer


class Signal(TrainerCallback):
    def __init__(self, number, step):
        self.number = number
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), self.number)


def started(config):
    """Weights without a zero: the start has decoders at zero, which give no other parameter a gradient."""
    model = MxDModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def main(output, kind, *options):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2, initializer_range=0.3,
        )
    )  # fmt: skip
    config = MxDConfig(
        layers=[0, 2], hidden_size=16, intermediate_size=40, num_experts=48, num_experts_per_tok=4,
        hidden_act="silu", encoder_type="glu",
    )  # fmt: skip
    if kind == "routed":
        config = MxDConfig(**{**config.to_dict(), "num_expert_groups": 6, "num_groups_per_tok": 2})
    rows = Dataset.from_dict({"input_ids": torch.randint(0, 64, (96, 12)).tolist()})
    if kind == "stream":
        rows = rows.to_iterable_dataset().shuffle(seed=3, buffer_size=20).repeat(None)
    arguments = {
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "save_steps": 5,
        "learning_rate": 1e-2,
        "calibration_tokens": 200,
        "statistics_tokens": 200,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if "plain" in options:
        accumulated = 2 // int(os.environ.get("WORLD_SIZE", "1"))
        arguments |= {
            "gradient_accumulation_steps": accumulated,
            "optim": "sgd",
            "train_sampling_strategy": "sequential",
        }
    signals = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}
    asked = [option.split("=") for option in options if "=" in option]
    callbacks = [Signal(signals[what], int(step)) for what, step in asked]
    common = {"train_dataset": rows, "callbacks": callbacks}
    if kind == "finetuning":
        model = make_spliced(teacher, started(config), "decomposition")
        trainer = FinetuningTrainer(model, FinetuningArguments(**arguments), **common)
    else:
        arguments |= {
            "auxiliary_weight": float(kind in ("auxiliary", "routed")),
        }
        model = MxDModel(config)
        if "plain" in options:  # each process would start it from its own rows, and scale it by them
            model = started(config)
            arguments |= {"warm_start": True, "scale_activations": False}
        trainer = DistillationTrainer(model, teacher, DistillationArguments(**arguments), **common)
    trainer.train(resume_from_checkpoint="resume" in options)
    trainer.save_model(output + "/final")


if __name__ == "__main__":
    main(*sys.argv[1:])

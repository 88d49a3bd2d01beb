"""Compare `mxd plan` with runs of `mxd decompose`: memory and time, each run in a process of its own.

    python benchmarks/plan.py FOLDER_OF_SMOLLM2 [--only TEXT] [--replan]
    python benchmarks/plan.py --largest          # steps of the largest layers of docs/how-to/large-models.md
    python benchmarks/plan.py --llama            # the plans of that page

Memory is the largest resident memory of a run less that of the interpreter with its imports. Times, of a step and of
the evaluation, are processor time on one thread, which other work on the machine changes less; the run's process
measures the plan's rates.
Writes benchmarks/results/plan.json after every run; runs that are there are not repeated. `--replan` plans them anew.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from report import machine, markdown_table
from transformers import TrainerCallback

RESULTS = Path(__file__).parent / "results" / "plan.json"
SIZES = {"embedded": (1024, 4096), "SmolLM2-135M": (4096, 16127)}
# Few tokens: what does not grow with them is measured as well.
HOW: dict[str, Any] = {
    "tokens": 8192,
    "evaluation_tokens": 2048,
    "gate_init": "random",
    "training": {"calibration_tokens": 4096, "statistics_tokens": 4096, "disable_tqdm": True, "save_strategy": "no"},
}
# name: width of input and output, units of the encoder, multiple of the transcoder that is matched, tokens, auxiliary
LARGEST = {
    "Llama-3.1-8B": (4096, 14336, 8, 256, True),
    "Llama-3.1-70B, H = 8192": (8192, 8192, 4, 128, False),
}


# name: config, and devices
LLAMAS: dict[str, tuple[dict[str, int], int]] = {
    "Llama-3.1-8B": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}, 8
    ),
    "Llama-3.1-70B": (
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}, 8
    ),
}  # fmt: skip
# Throughput of a device, not measured; tokens of the paper's trainings of GPT-2; K as there.
ASSUMED: dict[str, Any] = {
    "flops": 2e14, "bandwidth": 2e12, "tokens": 480_000_000, "context_length": 1024, "batch_tokens": 16384,
}  # fmt: skip


def cases(smollm: str) -> dict[str, dict[str, Any]]:
    """Return the options of every run, by its name."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        for model, sizes in SIZES.items():
            for layers in ([3], [1, 2, 3]):
                for experts in sizes:
                    options = {**HOW, "layers": layers, "num_experts": experts, "dtype": dtype}
                    if model != "embedded":
                        options["model"] = smollm
                    found[f"{model}, {len(layers)} layers, N = {experts}, {dtype}"] = options
    return found


def peak() -> int:
    """Return the bytes of the largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StepClock(TrainerCallback):
    """Measure the processor time of every step, without loading its rows."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.times.append(-time.process_time())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self.times[-1] += time.process_time()

    @property
    def seconds(self) -> float:
        """Return the median of all steps but the first, in which memory is requested."""
        return statistics.median(self.times[1:])


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Decompose in this process; return memory, seconds and rates."""
    import torch

    import mxd.jobs.decompose as job
    from mxd.base.base_model import DTYPES
    from mxd.jobs.options import DecompositionOptions, PlanOptions
    from mxd.jobs.plan import Plan, measure_rates

    imported, clock, seconds = peak(), StepClock(), []
    trainer, faithfulness = job.DistillationTrainer, job.faithfulness

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        results = faithfulness(*args, **kwargs)
        seconds.append(time.process_time() - started)
        return results

    job.DistillationTrainer = partial(trainer, callbacks=[clock])  # type: ignore[assignment,misc]
    job.faithfulness = evaluate
    with tempfile.TemporaryDirectory() as folder:
        job.decompose(DecompositionOptions(output=folder, **options))
    memory = peak() - imported
    base = Plan(PlanOptions(**options, flops=1.0)).base
    rates = measure_rates(base, DTYPES[options["dtype"]], torch.float32, time.process_time)
    return {"memory": memory, "step": clock.seconds, "evaluation": seconds[0], "rates": rates._asdict()}


def planned(options: dict[str, Any], rates: dict[str, float]) -> dict[str, float]:
    """Return what the plan says of a run."""
    from mxd.jobs.options import PlanOptions
    from mxd.jobs.plan import Plan, Rates

    made = Plan(PlanOptions(**options), Rates(**rates)).result()
    step = sum(made["seconds"][part] for part in ("base", "layers", "optimiser")) / made["settings"]["steps"]
    return {"memory": made["strategies"][0]["memory_bytes"] + made["host_bytes"], "step": step,
            "evaluation": made["seconds"]["evaluation"]}  # fmt: skip


def compared(options: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Return options, measurement and plan of a run, with the plan's relative errors."""
    plan = planned(options, measured["rates"])
    errors = {name: plan[name] / measured[name] - 1 for name in plan}
    shown = {**options, "model": Path(options["model"]).name} if "model" in options else options
    return {"options": shown, "measured": measured, "plan": plan, "errors": errors}


def largest(name: str) -> dict[str, Any]:
    """Take two training steps of a large layer, in a base of one layer; return memory and seconds beside the plan."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from mxd.jobs.decompose import build_config
    from mxd.jobs.options import PlanOptions
    from mxd.jobs.plan import HOST_BYTES, Plan, measure_rates
    from mxd.modeling_mxd import MxDModel
    from mxd.trainers import DistillationArguments, DistillationTrainer

    width, units, multiple, tokens, auxiliary = LARGEST[name]
    heads = {"num_attention_heads": width // 128, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=256, hidden_size=width, intermediate_size=units, num_hidden_layers=1, **heads)
    imported, clock = peak(), StepClock()
    measured = {"calibration_tokens": tokens, "statistics_tokens": tokens, "max_steps": 2}
    how = {"gate_init": "random", "auxiliary_weight": float(auxiliary)}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        options = PlanOptions(
            model=folder, layers=[0], match_transcoder=multiple, dtype="bfloat16", tokens=2 * tokens,
            batch_tokens=tokens, training=measured, **how,
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        base = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        decomposition = MxDModel(build_config(base, None, options))
        rows = Dataset.from_dict({"input_ids": torch.randint(256, (4 * tokens // 128, 128)).tolist()})
        arguments = DistillationArguments(
            folder, per_device_train_batch_size=tokens // 128, save_strategy="no", use_cpu=True, **measured, **how
        )
        DistillationTrainer(decomposition, base, arguments, train_dataset=rows, callbacks=[clock]).train()
        memory = peak() - imported
        del decomposition, base
        base_cost = Plan(replace(options, flops=1.0)).base
        plan = Plan(options, measure_rates(base_cost, torch.bfloat16, torch.float32, time.process_time))
    parts = plan.training_seconds([0])
    step = sum(parts[part] for part in ("base", "layers", "optimiser")) / 2
    return {
        "num_experts": plan.configs[0].num_experts,
        "parameters": plan.layers[0].parameters,
        "auxiliary": plan.layers[0].auxiliary,
        "tokens": tokens,
        "measured": {"memory": memory, "step_seconds": clock.seconds},
        "plan": {"memory": sum(plan.memory([0]).values()) + HOST_BYTES, "step_seconds": step},
    }


def llamas() -> dict[str, Any]:
    """Return the plans of Llama 3.1, from configs: one layer in the middle and all, for two sizes of decomposition."""
    from transformers import LlamaConfig

    from mxd.jobs.options import PlanOptions
    from mxd.jobs.plan import plan

    found = {}
    for name, (values, devices) in LLAMAS.items():
        with tempfile.TemporaryDirectory() as folder:
            LlamaConfig(vocab_size=128256, num_key_value_heads=8, tie_word_embeddings=False, **values).save_pretrained(
                folder
            )
            count = values["num_hidden_layers"]
            for multiple in (8, 32):
                for title, layers in (("one layer", [count // 2]), ("all layers", list(range(count)))):
                    options = PlanOptions(
                        model=folder, layers=layers, match_transcoder=multiple, dtype="bfloat16", devices=devices,
                        **ASSUMED,
                    )  # fmt: skip
                    found[f"{name}, {title}, {multiple} ×"] = plan(options) | {"model": name}
    return found


def llama_table(results: dict[str, Any]) -> str:
    """Return a row for every way to place the layers of Llama 3.1, in Markdown."""
    head = ["what", "N", "layers' parameters", "placement", "devices", "memory of a device", "passes", "time"]
    rows = []
    for name, made in results["llama"].items():
        experts = next(iter(made["layers"].values()))["num_experts"]
        for row in made["strategies"]:
            rows.append((
                name, f"{experts:,}", f"{made['parameters'] / 1e9:,.1f} B", row["strategy"], str(row["devices"]),
                f"{row['memory_bytes'] / 1e9:,.0f} GB", str(row["base_passes"]),
                f"{row['training_seconds'] / 3600:,.0f} h",
            ))  # fmt: skip
    return markdown_table(head, rows)


def largest_table(results: dict[str, Any]) -> str:
    """Return a row for every large layer that was stepped here, in Markdown."""
    head = ["layer", "N", "parameters", "tokens", "memory, plan", "measured", "a step, plan", "measured"]
    rows = []
    for name, row in results.get("largest", {}).items():
        plan, measured = row["plan"], row["measured"]
        rows.append((
            name, f"{row['num_experts']:,}", f"{(row['parameters'] + row['auxiliary']) / 1e6:,.0f} M",
            str(row["tokens"]), f"{plan['memory'] / 1e9:.1f} GB", f"{measured['memory'] / 1e9:.1f} GB",
            f"{plan['step_seconds']:.0f} s", f"{measured['step_seconds']:.0f} s",
        ))  # fmt: skip
    return markdown_table(head, rows)


def table(results: dict[str, Any]) -> str:
    """Return a row for every run, in Markdown."""
    head, rows = ["run"], []
    for part in ("memory", "a step", "evaluation"):
        head += [f"{part}, plan", "measured", ""]
    for name, row in results["runs"].items():
        cells = [name]
        for part, unit, style in (("memory", 1e6, ",.0f"), ("step", 1, ".2f"), ("evaluation", 1, ".1f")):
            cells += [
                f"{row[of][part] / unit:{style}} {'MB' if part == 'memory' else 's'}" for of in ("plan", "measured")
            ]
            cells.append(f"{100 * row['errors'][part]:+.0f} %")
        rows.append(cells)
    return markdown_table(head, rows)


def child(*arguments: str) -> dict[str, Any]:
    """Run this script in a process of its own, on one thread, and return the JSON of its last line."""
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Measure what is missing, and write the results after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("smollm", nargs="?", default="SmolLM2-135M", help="folder of SmolLM2-135M")
    parser.add_argument("--only", default="", help="runs whose names contain this")
    parser.add_argument("--replan", action="store_true", help="plan anew, run nothing")
    parser.add_argument("--largest", nargs="*", choices=list(LARGEST), help="step these layers")
    parser.add_argument("--llama", action="store_true", help="plan Llama 3.1 from its configs")
    parser.add_argument("--run", help="JSON of one run's options")
    parser.add_argument("--step", help="step this layer in this process")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(json.loads(options.run))), flush=True)  # noqa: T201
        return
    if options.step:
        print(json.dumps(largest(options.step)), flush=True)  # noqa: T201
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"machine": machine(1, "cpu"), "runs": {}}
    if options.llama:
        RESULTS.write_text(json.dumps(results | {"llama": llamas()}, indent=1) + "\n")
        return
    if options.largest is not None:
        for name in options.largest or LARGEST:
            results.setdefault("largest", {})[name] = child("--step", name)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        return
    for name, case in cases(options.smollm).items():
        measured = results["runs"].get(name, {}).get("measured")
        if options.only not in name or (measured is None and options.replan):
            continue
        if measured is None:
            measured = child("--run", json.dumps(case))
        elif not options.replan:
            continue
        results["runs"][name] = compared(case, measured)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

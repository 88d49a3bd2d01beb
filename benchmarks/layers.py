"""Measure decompositions of many layers: the speed of one pass, all layers spliced, and layers one after another.

    python benchmarks/layers.py MODEL --dataset texts/*.parquet --work FOLDER [--parts throughput together sequential]

MODEL is SmolLM2-135M in the results; the part "sequential" is of the embedded model. Times are CPU seconds of one
thread, so that other load on the machine does not count. Trainings are kept in the work folder: finished ones are not
repeated, and an interrupted one goes on. Writes benchmarks/results/layers.json, part by part.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report import machine, markdown_table
from transformers import PreTrainedModel, TrainerCallback

from mxd import DecompositionOptions, FinetuningOptions, decompose, demo, finetune
from mxd.base.activation_cache import ActivationCache
from mxd.base.base_model import load_base_model
from mxd.base.capture import capture_mlps
from mxd.data.packing import materialize, pack
from mxd.data.texts import load_documents
from mxd.evaluation import load_evaluation
from mxd.evaluation.paired import half_width
from mxd.jobs.decompose import build_config
from mxd.jobs.run_folder import START_NAME, resumable
from mxd.modeling_mxd import MxDModel
from mxd.trainers import DistillationArguments, DistillationTrainer

RESULTS = Path(__file__).parent / "results" / "layers.json"
COUNTS = (1, 3, 10, 30)
SINGLE = (4, 14, 24)  # layers that are trained alone; the time of others is interpolated
BATCH_TOKENS, STEPS, ROW = 512, 2, 128
MATCH = 8
PROMPTS = (
    "The Roman Empire began",
    "To make a good soup, first",
    "My fellow citizens,",
    "The main exports of the country are",
    "Once upon a time there was a",
)
NEW_TOKENS = 50
METHODS = {"mxd": "MxD", "skip_transcoder": "skip transcoder"}


class Clock(TrainerCallback):
    """CPU seconds of every step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.process_time() - self.began)


def step_seconds(model: PreTrainedModel, name: str, layers: list[int], rows: Any) -> float:
    """Return the CPU seconds of a training step on these layers, the median without the first."""
    options = DecompositionOptions(model=name, layers=layers, match_transcoder=MATCH)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = DistillationArguments(
            output_dir=folder, per_device_train_batch_size=BATCH_TOKENS // ROW, max_steps=1 + STEPS, gate_init="random",
            calibration_tokens=ROW, statistics_tokens=ROW, save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        decomposition = MxDModel(build_config(model, None, options))
        DistillationTrainer(decomposition, model, arguments, train_dataset=rows, callbacks=[clock]).train()
    return median(clock.steps[1:])


def throughput(name: str, dataset: list[str]) -> dict[str, Any]:
    """Time steps on 1, 3, 10 and all layers in one pass, on single layers, the base model's pass, and a cache of it."""
    model, tokenizer, _ = load_base_model(name, None, "float32", context_length=ROW)
    options = DecompositionOptions(dataset=dataset)
    documents, _ = load_documents(options.text, 0)
    rows = materialize(pack(documents, tokenizer, ROW), (1 + STEPS) * BATCH_TOKENS)
    single = {layer: step_seconds(model, name, [layer], rows) for layer in SINGLE}
    every = model.config.num_hidden_layers
    one_pass = {}
    for count in COUNTS:
        layers = [int((i + 0.5) * every / count) for i in range(count)]
        seconds = step_seconds(model, name, layers, rows)
        separate = seconds if count == 1 else sum(interpolated(single, layer) for layer in layers)
        one_pass[str(count)] = {"layers": layers, "seconds": seconds, "separate_seconds": separate}
    return {
        "model": Path(name).name,
        "batch_tokens": BATCH_TOKENS,
        "match_transcoder": MATCH,
        "single": {str(layer): seconds for layer, seconds in single.items()},
        "one_pass": one_pass,
        "machine": machine(torch.get_num_threads(), "cpu"),
    }


def interpolated(single: dict[int, float], layer: int) -> float:
    """Return the time of a layer on the line through the first and the last measured layer, which passes grow by."""
    first, last = min(single), max(single)
    return single[first] + (single[last] - single[first]) * (layer - first) / (last - first)


def cache_costs(name: str, dataset: list[str], tokens: int = 2048) -> dict[str, Any]:
    """Measure what repeating the base model's pass costs a token, and what writing and reading its activations does."""
    model, tokenizer, _ = load_base_model(name, None, "float32", context_length=ROW)
    documents, _ = load_documents(DecompositionOptions(dataset=dataset).text, 0)
    rows = materialize(pack(documents, tokenizer, ROW), tokens)[:]["input_ids"]
    layers = list(range(model.config.num_hidden_layers))
    began = time.process_time()
    for part in rows.split(4):
        capture_mlps(model, layers, part)
    seconds = {"pass": time.process_time() - began}
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        cache = ActivationCache.record(folder, model, layers, rows, rows_per_step=4)
        seconds["write"] = max(0.0, time.process_time() - began - seconds["pass"])
        began = time.process_time()
        for part in rows.split(4):
            for x, y in cache({"input_ids": part}).values():
                x.float(), y.float()
        seconds["read"] = time.process_time() - began
        size = sum(path.stat().st_size for path in Path(folder).glob("layer_*"))
    count = rows.numel()
    return {
        "layers": len(layers),
        "bytes": size / count,
        "microseconds": {what: 1e6 * value / count for what, value in seconds.items()},
        "machine": machine(torch.get_num_threads(), "cpu"),
    }


def trained(run: Any, options: Any) -> dict[str, Any]:
    """Return evaluation.json of a run, which goes on if it was interrupted, and is not repeated if it is finished."""
    folder = Path(options.output)
    if not (folder / "evaluation.json").is_file() or (folder / START_NAME).is_file():
        options.resume = resumable(folder)
        run(options)
    return load_evaluation(folder)


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Return what the tables show of an evaluation.json."""
    layers = [row["nmse"] for row in results["layers"].values()]
    shares = [row["expert_share"] for row in results["layers"].values()]
    return {
        **{name: results["cross_entropy"][name] for name in ("untouched", "spliced", "zero_ablated", "rise_interval")},
        "kl": results["kl"],
        "top1_agreement": results["top1_agreement"],
        "nmse": sum(layers) / len(layers),
        "worst_nmse": max(layers),
        "expert_share": sum(shares) / len(shares),
        "evaluated_tokens": results["settings"]["tokens"],
    }


def together(name: str, dataset: list[str], work: Path, methods: list[str], common: dict[str, Any]) -> dict[str, Any]:
    """Train all layers in one pass, by each method at equal parameters and tokens; measure, and generate text."""
    rows, folders = {}, {}
    for method in methods:
        folder = work / f"smol-{method}"
        options = DecompositionOptions(
            model=name, layers="all", method=method, dataset=dataset, output=str(folder), **common
        )
        results = trained(decompose, options)
        made = results["settings"]["training"]
        folders[method] = folder
        rows[method] = figures(results) | {
            "parameters": MxDModel.from_pretrained(folder).config.num_parameters,
            "tokens": made["tokens_trained"],
        }
    return {"model": Path(name).name, **common, "methods": rows, "texts": continuations(name, folders)}


@torch.no_grad()
def continuations(name: str, folders: dict[str, Path]) -> list[dict[str, str]]:
    """Return greedy continuations of the prompts by the untouched model and with each decomposition spliced in."""
    model, tokenizer, _ = load_base_model(name, None, "float32", context_length=ROW)

    def text(prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    found = [{"prompt": prompt, "untouched": text(prompt)} for prompt in PROMPTS]
    for method, folder in folders.items():
        with MxDModel.from_pretrained(folder).eval().spliced(model):
            for row in found:
                row[method] = text(row["prompt"])
    return found


def sequential(work: Path, tokens: int, finetuning_tokens: int, seed: int) -> dict[str, Any]:
    """Compare one pass over all layers of the embedded model with one layer after another, each fine-tuned or not."""
    rows = {}
    for kind in ("one pass", "sequential"):
        folder = work / f"embedded-{kind.replace(' ', '-')}-{seed}"
        how = {"seed": seed, "batch_tokens": 1024, "evaluation_tokens": 8192}
        options = DecompositionOptions(
            layers="all", sequential=kind == "sequential", tokens=tokens, output=str(folder), **how
        )
        rows[kind] = figures(trained(decompose, options))
        tuned = FinetuningOptions(decomposition=str(folder), output=f"{folder}-tuned", tokens=finetuning_tokens, **how)
        rows[f"{kind}, fine-tuned"] = figures(trained(finetune, tuned))
    made = load_evaluation(folder)["settings"]["training"]
    kept = ("match_transcoder", "num_experts_per_tok", "learning_rate", "batch_tokens")
    return {
        "model": demo.MODEL_NAME,
        "tokens": made["tokens_trained"],
        "finetuning_tokens": finetuning_tokens,
        "seed": seed,
        **{name: made[name] for name in kept},
        "rows": rows,
    }


def throughput_table(results: dict[str, Any]) -> str:
    """Return the table of the part "throughput" in Markdown."""
    rows = []
    for count, row in results["throughput"]["one_pass"].items():
        one, separate = row["seconds"], row["separate_seconds"]
        rows.append((count, f"{one:.1f} s", f"{separate:.1f} s", f"{separate / one:.2f} ×"))
    return markdown_table(["layers", "one pass", "separate runs", "ratio"], rows)


def costs_table(results: dict[str, Any]) -> str:
    """Return the table of the costs of a repeated pass and of a cache in Markdown."""
    rows = []
    for name, row in results["costs"].items():
        cells = [f"{row['microseconds'][what]:,.0f} µs" for what in ("pass", "write", "read")]
        rows.append((name, str(row["layers"]), *cells, f"{row['bytes']:,.0f}"))
    head = ["model", "layers", "a pass of the base", "write to the cache", "read from it", "bytes"]
    return markdown_table(head, rows)


def _faithfulness_table(rows: dict[str, dict[str, Any]]) -> str:
    cells = [
        (
            name,
            f"{row['spliced'] - row['untouched']:+.3f} ± {half_width(row['rise_interval']):.3f}",
            f"{row['kl']:.3f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['nmse']:.3f}",
            f"{row['worst_nmse']:.3f}",
            f"{100 * row['expert_share']:.0f} %",
        )
        for name, row in rows.items()
    ]
    return markdown_table(
        ["", "CE rise", "KL", "same most likely token", "mean NMSE", "worst layer's", "expert share"], cells
    )


def together_table(results: dict[str, Any]) -> str:
    """Return the table of the part "together" in Markdown."""
    return _faithfulness_table({METHODS[method]: row for method, row in results["together"]["methods"].items()})


def texts_list(results: dict[str, Any]) -> str:
    """Return the continuations of each prompt as a list in Markdown."""
    names = {"untouched": "untouched", **{name: METHODS[name] for name in results["together"]["methods"]}}
    parts = []
    for row in results["together"]["texts"]:
        texts = {label: " ".join(row[name].split()).replace("<", "&lt;") for name, label in names.items()}
        parts.append(f"**{row['prompt']}** …\n\n" + "\n".join(f"- *{label}*: {text}" for label, text in texts.items()))
    return "\n\n".join(parts)


def sequential_table(results: dict[str, Any]) -> str:
    """Return the table of the part "sequential" in Markdown."""
    return _faithfulness_table(results["sequential"]["rows"])


def main() -> None:
    """Measure the parts asked for, and write each into the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=["throughput", "costs", "together", "sequential"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="of the part together")
    parser.add_argument("--tokens", type=int, default=10_240, help="of the part together")
    parser.add_argument("--sequential-tokens", type=int, default=32_768)
    parser.add_argument("--evaluation-tokens", type=int, default=2048)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    common = {
        "match_transcoder": MATCH, "batch_tokens": BATCH_TOKENS, "tokens": asked.tokens,
        "evaluation_tokens": asked.evaluation_tokens,
        "training": {"calibration_tokens": 2048, "statistics_tokens": 2048, "save_steps": 5},
    }  # fmt: skip
    measure = {
        "throughput": lambda: throughput(asked.model, asked.dataset),
        "costs": lambda: {
            Path(asked.model).name: cache_costs(asked.model, asked.dataset),
            "embedded": cache_costs(demo.MODEL_NAME, []),
        },
        "together": lambda: together(asked.model, asked.dataset, asked.work, asked.methods, common),
        "sequential": lambda: sequential(asked.work, asked.sequential_tokens, asked.sequential_tokens // 4, seed=0),
    }
    for part in asked.parts:
        measured = measure[part]()
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        results[part] = measured
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What fine-tuning gives and costs: LoRA on a spliced model, and a decomposition trained end to end on KL or
cross-entropy, against the same tokens of further distillation.

    python benchmarks/finetuning.py MODEL --corpus FOLDER [--layer 15] [--work FOLDER]

A decomposition of one layer is made with the library itself, small, so that all of it takes minutes; then every row
starts from it, trains on the same tokens and is measured on the same held-out documents. What is trained is in float32;
the base runs in bfloat16, for LoRA in float32 too. Parts already in the work folder are not run again. Writes
benchmarks/results/finetuning.json, and the tables into docs/finetuning.md.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pages import write_between
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from evaluation_mxd import LogitSums, faithfulness, token_mask
from modeling_mxd import make_spliced
from mxd import DecompositionOptions, FinetuningOptions, TextOptions, decompose, finetune
from mxd.cli_options import parse_count
from mxd.decompositions import load_base_of, load_decomposition
from mxd.finetuning import MEASURED
from mxd.runs import step_arguments
from mxd.texts import evaluation_batches, load_documents
from trainers import DistillationArguments, DistillationTrainer, FinetuningArguments, FinetuningTrainer, pack

RESULTS = Path(__file__).parent / "results" / "finetuning.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "finetuning.md"
MARK = "benchmarks/finetuning.py"
CONTEXT = 256
DTYPE = "bfloat16"
EVALUATION_TOKENS = 16384
EXPERTS = 2048
LORA_TARGETS = ["q_proj", "v_proj", "gate", "encoder", "encoder_up", "decoder"]
LORA_RATE = 1e-3

ROWS: dict[str, dict[str, Any]] = {
    "KL to the untouched model": {"loss": "kl"},
    "KL, without the layer's own error": {"loss": "kl", "nmse_weight": 0.0},
    "cross-entropy of the text": {"loss": "cross_entropy"},
}
DISTILLED = "distilled on, for comparison"


def text(options: argparse.Namespace) -> TextOptions:
    """The corpus."""
    return TextOptions(dataset=sorted(str(path) for path in options.corpus.glob("*.parquet")), context_length=CONTEXT)


def run_options(options: argparse.Namespace, tokens: int, seed: int, output: str) -> dict[str, Any]:
    """What all trainings have in common."""
    return {
        "text": text(options),
        "dtype": DTYPE,
        "tokens": tokens,
        "evaluation_tokens": EVALUATION_TOKENS,
        "seed": seed,
        "output": str(options.work / output),
        "overwrite": True,
    }


def make_decomposition(options: argparse.Namespace) -> Path:
    """The decomposition that every row starts from."""
    folder = options.work / "decomposition"
    if not (folder / "evaluation.json").exists():
        common = run_options(options, options.distillation_tokens, 0, "decomposition")
        model = str(options.model)
        decompose(DecompositionOptions(model=model, layers=[options.layer], num_experts=EXPERTS, **common))
    return Path(folder)


def finetuned(options: argparse.Namespace, source: Path, name: str) -> dict[str, Any]:
    """One row of `mxd finetune`: figures before and after. Another order than the distillation's: seed 1."""
    common = run_options(options, options.tokens, 1, f"finetuned-{list(ROWS).index(name)}")
    results = finetune(FinetuningOptions(decomposition=str(source), **common, **ROWS[name]))
    run = results["settings"]["finetuning"][-1]
    settings = {key: run[key] for key in ("loss", "nmse_weight", "learning_rate", "tokens_trained", "seconds")}
    return {"name": name, **settings, "before": run["before"], **{key: results[key] for key in MEASURED}}


def distilled(options: argparse.Namespace, source: Path) -> dict[str, Any]:
    """The same tokens, steps and learning rate of layerwise distillation, from the same start."""
    common = FinetuningOptions(decomposition=str(source), **run_options(options, options.tokens, 1, "distilled"))
    decomposition = load_decomposition(str(source))
    base, tokenizer = load_base_of(decomposition, DTYPE)
    documents, heldout = load_documents(common.text, seed=0)
    batches = evaluation_batches(heldout, tokenizer, CONTEXT, EVALUATION_TOKENS)
    rows = pack(documents, tokenizer, CONTEXT, seed=1, repeat=True)
    values = {
        **step_arguments(common, options.work / "distilled"),
        "learning_rate": FinetuningArguments.learning_rate,
        "gate_initialization": "keep",
        "sparse_code_weight": 0.0,
        "save_strategy": "no",
    }
    trainer = DistillationTrainer(decomposition, base, DistillationArguments(**values), train_dataset=rows)
    trainer.measure_experts()
    before = faithfulness(base, decomposition, batches)
    started = time.monotonic()
    trainer.train()
    settings = {"learning_rate": values["learning_rate"], "tokens_trained": options.tokens}
    settings["seconds"] = time.monotonic() - started
    results = faithfulness(base, decomposition, batches)
    figures = {"before": {key: before[key] for key in MEASURED}, **{key: results[key] for key in MEASURED}}
    return {"name": DISTILLED, **settings, **figures}


def cross_entropy(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """Nats per token of a model on held-out batches."""
    sums = LogitSums()
    with torch.no_grad():
        for batch in batches:
            sums.update(model(**batch).logits, batch["input_ids"], token_mask(**batch))
    return sums.cross_entropy


def lora(options: argparse.Namespace, source: Path) -> dict[str, Any]:
    """A LoRA adapter on the decomposition's linears and the base's attention, trained by the stock Trainer."""
    set_seed(0)
    folder = options.work / "adapter"
    _, tokenizer = load_base_of(load_decomposition(str(source)), "float32")
    documents, heldout = load_documents(text(options), seed=0)
    batches = evaluation_batches(heldout, tokenizer, CONTEXT, EVALUATION_TOKENS)
    rows = pack(documents, tokenizer, CONTEXT, seed=1).map(lambda row: {"labels": row["input_ids"]})
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    before = cross_entropy(model, batches)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=options.lora_tokens // (4 * CONTEXT),
        learning_rate=LORA_RATE,
        warmup_steps=2,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(adapted, arguments, train_dataset=rows)
    trainer.train()
    adapted.save_pretrained(folder)
    adapted.eval()
    ids = batches[0]["input_ids"][:1]
    with torch.no_grad():
        want = adapted(ids).logits
        equal = {
            door.__name__: torch.equal(door.from_pretrained(folder, dtype="float32").eval()(ids).logits, want)
            for door in (AutoPeftModelForCausalLM, AutoModelForCausalLM)
        }
    return {
        "rank": config.r,
        "targets": LORA_TARGETS,
        "learning_rate": LORA_RATE,
        "tokens": options.lora_tokens,
        "parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "adapter_bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "training_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "cross_entropy": {"before": before, "after": cross_entropy(adapted, batches)},
        "reload_bit_equal": equal,
    }


def memory_of_a_step(source: str, how: str) -> None:
    """In a process of its own: how far one KL loss with its gradients raises the peak of the memory; prints bytes."""
    decomposition = load_decomposition(source)
    base, tokenizer = load_base_of(decomposition, "float32")
    model: Any = make_spliced(base, decomposition, source, cast=False)
    torch.manual_seed(0)
    ids = torch.randint(len(tokenizer), (8, CONTEXT))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    trainer = FinetuningTrainer(
        model, FinetuningArguments(output_dir="unused", nmse_weight=0.0, use_cpu=True), train_dataset=[batch]
    )
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    if how == "chunked":
        loss = trainer.compute_loss(model, batch)
    else:
        with torch.no_grad(), model.untouched():
            reference = model(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
        prediction = model(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
        loss = F.kl_div(prediction, reference, log_target=True, reduction="none").sum(-1).mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in decomposition.parameters()]).norm()
    print(json.dumps({"bytes": _memory("VmHWM") - before, "loss": loss.item(), "norm": gradient.item()}))  # noqa: T201


def _memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory(options: argparse.Namespace, source: Path) -> dict[str, Any]:
    """Peak memory of a KL step whose logits are whole, and of one whose logits are made by chunks."""
    measured = {}
    for how in ("whole", "chunked"):
        command = [sys.executable, *sys.argv, "--memory-of", str(source), "--how", how]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        measured[how] = json.loads(done.stdout.splitlines()[-1])
    return {"tokens": 8 * CONTEXT, **measured}


def _pairs(row: dict[str, Any]) -> list[str]:
    (layer,), (earlier,) = row["layers"].values(), row["before"]["layers"].values()
    rises = [r["cross_entropy"]["spliced"] - r["cross_entropy"]["untouched"] for r in (row["before"], row)]
    return [
        f"{earlier['nmse']:.3f} → {layer['nmse']:.3f}",
        f"{rises[0]:+.4f} → {rises[1]:+.4f}",
        " → ".join(f"{100 * r['cross_entropy']['recovered']:.1f}" for r in (row["before"], row)) + " %",
        f"{row['before']['kl']:.4f} → {row['kl']:.4f}",
        *(
            f"{100 * earlier[name]:.1f} → {100 * layer[name]:.1f} %"
            for name in ("dead_experts", "expert_share", "specialised_share")
        ),
    ]


def change_table(results: dict[str, Any]) -> str:
    """Before and after of every row, as Markdown."""
    head = ["trained on", "NMSE", "CE rise", "recovered", "KL", "dead", "expert share", "specialised share", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in results["rows"]:
        lines.append("| " + " | ".join([row["name"], *_pairs(row), f"{row['seconds']:.0f}"]) + " |")
    row = results["rows"][0]
    lines.append("")
    lines.append(
        f"Layer {results['layer']}, {EXPERTS:,} experts, K = 32, made with {results['distillation_tokens']:,} tokens; "
        f"then {row['tokens_trained']:,} tokens of each row at a learning rate of {row['learning_rate']:g}; "
        f"{results['evaluation_tokens']:,} held-out tokens, cross-entropy untouched "
        f"{row['cross_entropy']['untouched']:.4f} nats. One seed; seconds are of training, on {results['threads']} "
        "thread(s) of a shared machine."
    )
    return "\n".join(lines) + "\n"


def lora_table(results: dict[str, Any]) -> str:
    """The adapter, and the memory of a step, as Markdown."""
    adapter, loss = results["lora"], results["lora"]["cross_entropy"]
    peak = results["memory"]
    lines = [
        "| | |",
        "|---|---|",
        f"| LoRA, rank {adapter['rank']}, on {', '.join(f'`{name}`' for name in adapter['targets'])} | "
        f"{adapter['parameters']:,} parameters, {adapter['tokens']:,} tokens |",
        f"| held-out cross-entropy, before → after | {loss['before']:.4f} → {loss['after']:.4f} |",
        f"| size of the adapter | {adapter['adapter_bytes'] / 1e6:.2f} MB |",
        f"| logits after reloading, bit for bit | {'; '.join(_equal(*item) for item in _doors(adapter))} |",
        f"| peak memory of a KL step on {peak['tokens']:,} tokens, all logits at once → by chunks | "
        f"{peak['whole']['bytes'] / 2**20:,.0f} → {peak['chunked']['bytes'] / 2**20:,.0f} MiB |",
    ]
    return "\n".join(lines) + "\n"


def _doors(adapter: dict[str, Any]) -> list[tuple[str, bool]]:
    return list(adapter["reload_bit_equal"].items())


def _equal(door: str, equal: bool) -> str:
    return f"{door}: {'equal' if equal else 'NOT equal'}"


def write_tables(results: dict[str, Any]) -> None:
    """Put the tables between their marks in the document."""
    for name, table in tables(results).items():
        write_between(DOCUMENT, f"{MARK}, {name}", table)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """All tables of the document, by the names in their marks."""
    return {"change": change_table(results), "adapter": lora_table(results)}


def _cached(options: argparse.Namespace, name: str, make: Any) -> Any:
    path = options.work / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text())


def main() -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--distillation-tokens", type=parse_count, default=300_000)
    parser.add_argument("--tokens", type=parse_count, default=49_152)
    parser.add_argument("--lora-tokens", type=parse_count, default=32_768)
    parser.add_argument("--work", type=Path, default=Path("runs/finetuning"))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--how", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        memory_of_a_step(options.memory_of, options.how)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    source = make_decomposition(options)
    results = {
        "layer": options.layer,
        "distillation_tokens": options.distillation_tokens,
        "evaluation_tokens": EVALUATION_TOKENS,
        "threads": torch.get_num_threads(),
        "lora": _cached(options, "lora", lambda: lora(options, source)),
        "rows": [
            *(
                _cached(options, f"row-{i}", lambda name=name: finetuned(options, source, name))
                for i, name in enumerate(ROWS)
            ),
            _cached(options, "row-distilled", lambda: distilled(options, source)),
        ],
        "memory": _cached(options, "memory", lambda: memory(options, source)),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_tables(results)


if __name__ == "__main__":
    main()

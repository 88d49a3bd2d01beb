"""What each start and method costs and gains at equal tokens: one layer, one pass, the same text for all.

    python benchmarks/methods.py MODEL --corpus FOLDER [--layer 15] [--tokens 1M] [--jobs 2] [--rows NAME ...]

One teacher pass records the layer's inputs and outputs; every row trains on the recording, in the same order, in a
process of its own (one thread each, `--jobs` at a time), and is measured on the same held-out documents. Text: the
parquet files of FOLDER and the running interpreter's standard library. Rows already in the work folder are not run
again. Writes benchmarks/results/methods.json, and the table in docs/recipe.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from pages import write_between
from python_library import python_library_documents
from transformers import PreTrainedModel, set_seed

from evaluation_mxd import faithfulness
from modeling_mxd import MxDConfig, MxDModel, find_mlp
from mxd.base_model import load_base_model
from mxd.cli_options import parse_count
from mxd.pipeline import DecompositionOptions, evaluation_batches, layer_config
from trainers import (
    DistillationArguments,
    RecordedTeacher,
    ReplayTrainer,
    load_text,
    materialize,
    pack,
    split_documents,
    take_tokens,
)
from trainers.decomposition_arguments import bfloat16_is_emulated

RESULTS = Path(__file__).parent / "results" / "methods.json"
PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"
MARK = "benchmarks/methods.py"
CONTEXT = 256
ROWS_PER_STEP = 8
EVALUATION_TOKENS = 16384
BFLOAT16 = not bfloat16_is_emulated()
"""Whether products are in bfloat16, which a processor without such instructions emulates at a third of the speed."""

EARLIER = {
    "modulation_initialization": "random",
    "decoder_initialization": "zero",
    "expert_share": 0.0,
    "sparse_code_weight": 0.0,
}
NAIVE = {**EARLIER, "learning_rate": 1e-3}
DATA = {**NAIVE, "encoder_initialization": "random"}
SCALED = {**DATA, "gate_initialization": "random"}
RAW = {**SCALED, "scale_activations": False}
PRETRAINED = {"encoder_initialization": "pretrained"}
SLOW_GATE = {"learning_rate": 3e-3, "gate_learning_rate_factor": 0.3, "modulation_learning_rate_factor": 3.0}
SKIP = {"method": "skip_transcoder"}
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (options of the layer, arguments of the training)
    "skip transcoder, raw": (SKIP, RAW),
    "MxD, authors' start, raw": ({}, RAW),
    "skip transcoder, scaled": (SKIP, SCALED),
    "MxD, authors' start, scaled": ({}, SCALED),
    "MxD, authors' start, scaled, H = 576": ({"intermediate_size": 576}, SCALED),
    "MxD, pretrained encoder, raw": ({}, {**RAW, **PRETRAINED}),
    "MxD, pretrained encoder, scaled": ({}, {**SCALED, **PRETRAINED}),
    "MxD, gate from data": ({}, DATA),
    "MxD, gate from data, lr 3e-3": ({}, {**DATA, "learning_rate": 3e-3}),
    "MxD, gate from data, pretrained encoder, Cᵀa from 1": (
        {},
        {**DATA, **PRETRAINED, "modulation_initialization": "unit"},
    ),
    "MxD, gate from data, pretrained encoder, lr 3e-3": ({}, {**DATA, **PRETRAINED, "learning_rate": 3e-3}),
    "skip transcoder, gate from data, lr 3e-3": (SKIP, {**DATA, "learning_rate": 3e-3}),
    "skip transcoder, gate from data, lr 3e-3, slow gate": (SKIP, SLOW_GATE),
    "MxD, gate from data, pretrained encoder, lr 3e-3, slow gate, fast C": ({}, {**EARLIER, **SLOW_GATE}),
}


def text(options: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Documents of all domains, and those held out."""
    files = load_text(sorted(str(path) for path in options.corpus.glob("*.parquet")))
    return split_documents(concatenate_datasets([files, python_library_documents()]), seed=0)


def record(model_folder: Path, recording: Path, layers: list[int], documents: Dataset, tokens: int) -> RecordedTeacher:
    """Record the teacher once, on the same rows in the same order for every training."""
    model, tokenizer, _ = load_base_model(str(model_folder), dtype="bfloat16" if BFLOAT16 else "float32")
    rows = materialize(take_tokens(pack(documents, tokenizer, CONTEXT, seed=0), tokens))[:]["input_ids"]
    return RecordedTeacher.record(recording, model, layers, rows, rows_per_step=ROWS_PER_STEP, progress=True)


def distil(
    model: PreTrainedModel, layer: int, options: DecompositionOptions, recording: Path, output: Path, **training: Any
) -> tuple[MxDModel, float]:
    """A decomposition trained on a recording, in its order; and seconds."""
    config = layer_config(find_mlp(model, layer), options)
    decomposition = MxDModel(MxDConfig.from_layer_configs({layer: config}))
    stock: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": ROWS_PER_STEP,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "bf16": BFLOAT16,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = DistillationArguments(output_dir=str(output), **{**stock, **training})
    trainer = ReplayTrainer(decomposition, model, arguments, RecordedTeacher(recording))
    started = time.monotonic()
    trainer.train()
    return decomposition, time.monotonic() - started


def run_row(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train and measure one row."""
    layer_options, training = ROWS[name]
    set_seed(0)
    model, tokenizer, _ = load_base_model(str(options.model))
    chosen = DecompositionOptions(num_experts_per_tok=32, match_transcoder=32, **layer_options)
    recording = options.work / "recording"
    decomposition, seconds = distil(model, options.layer, chosen, recording, options.work / "trainer", **training)
    config = decomposition.config.layer(options.layer)
    heldout = evaluation_batches(text(options)[1], tokenizer, CONTEXT, EVALUATION_TOKENS)
    results = faithfulness(model, decomposition, heldout)
    return {
        "name": name,
        "num_experts": config.num_experts,
        "intermediate_size": config.intermediate_size,
        "parameters": config.num_parameters,
        "training": training,
        "tokens": RecordedTeacher(recording).rows.numel(),
        "seconds": seconds,
        **results,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    head = ["", "NMSE", "without BOS", "CE rise", "KL", "recovered", "dead", "expert share", "specialised share"]
    head.append("seconds")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        (layer,), loss = row["layers"].values(), row["cross_entropy"]
        cells = [
            row["name"],
            f"{layer['nmse']:.3f}",
            f"{layer['nmse_without_first']:.3f}",
            f"{loss['spliced'] - loss['untouched']:+.4f}",
            f"{row['kl']:.4f}",
            f"{100 * loss['recovered']:.1f} %",
            f"{100 * layer['dead_experts']:.1f} %",
            f"{100 * layer['expert_share']:.0f} %",
            f"{100 * layer['specialised_share']:.0f} %",
            f"{row['seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    loss = rows[0]["cross_entropy"]
    lines.append("")
    lines.append(
        f"{rows[0]['tokens']:,} training tokens, {rows[0]['settings']['tokens']:,} held-out tokens; cross-entropy "
        f"untouched {loss['untouched']:.4f}, zero-ablated {loss['zero_ablated']:.4f} nats per token; products in "
        "bfloat16, weights in float32; seconds are of training from the recording, on one thread."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--tokens", type=parse_count, default=10**6)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/methods"))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--one-row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.one_row:
        path = _row_path(options, options.one_row)
        path.write_text(json.dumps(run_row(options, options.one_row), indent=1) + "\n")
        return
    missing = [name for name in options.rows if not _row_path(options, name).exists()]
    if missing:
        record(options.model, options.work / "recording", [options.layer], text(options)[0], options.tokens)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(_run_in_process, missing))
    rows = [
        {**json.loads(path.read_text()), "name": name} for name in ROWS if (path := _row_path(options, name)).exists()
    ]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    write_between(PAGE, MARK, table(rows))


def _row_path(options: argparse.Namespace, name: str) -> Path:
    return Path(options.work) / f"row-{list(ROWS).index(name):02d}.json"


def _run_in_process(name: str) -> None:
    command = [sys.executable, *sys.argv, "--one-row", name]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()

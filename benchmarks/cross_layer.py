"""Compare one layer that writes to three MLPs with three layers of together the same parameters, on the same tokens.

    python benchmarks/cross_layer.py --work FOLDER [MODEL --dataset texts/*.parquet] [--methods mxd skip_transcoder]

Each is trained with several seeds. The dense start is the layer before training with Cᵀa = 1: the first MLP itself, and
the least squares of the others on its hidden units. Trainings are kept in the work folder: finished ones are not
repeated. Writes benchmarks/results/cross-layer.json, for the embedded model by default.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from layers import METHODS, trained
from report import machine
from torch import Tensor

from mxd import DecompositionOptions, decompose, demo
from mxd.base.base_model import base_skeleton, load_base_model
from mxd.base.forward import batch_for, capture_with_logits, next_token_logits
from mxd.data.packing import pack
from mxd.data.texts import evaluation_batches, load_documents
from mxd.evaluation.ablation import ChangedExperts
from mxd.evaluation.metrics import ErrorSums, LogitSums
from mxd.jobs.decompose import build_config
from mxd.modeling_mxd import ExpertCoefficients, MxDModel, SparseLayer, spliced_mlps
from mxd.trainers import DistillationArguments, DistillationTrainer

RESULTS = Path(__file__).parent / "results" / "cross-layer.json"
OUTPUTS, K = 3, 32
CALIBRATION = 8192
DENSE = "dense start"


def matched(options: DecompositionOptions) -> int:
    """Return the experts of one layer that writes to all MLPs, with the parameters of a layer for each of them."""
    model = base_skeleton(options.model, None, options.dtype, options.context_length)
    config = build_config(model, None, options)
    assert options.layers is not None and options.layers != "all"
    one = {"layers": options.layers[:1], "num_output_layers": OUTPUTS}
    few, more = (
        build_config(model, None, DecompositionOptions(**{**vars(options), **one, "num_experts": n})).num_parameters
        for n in (K, K + 1)
    )
    return K + (config.num_parameters - few) // (more - few)


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Return the NMSE of each MLP, the expert shares, and what the predictions lose, from evaluation.json."""
    errors = [row["nmse"] for layer in results["layers"].values() for row in layer.get("outputs", [layer])]
    shares = [layer["expert_share"] for layer in results["layers"].values()]
    rise = results["cross_entropy"]["rise"]
    share = None if None in shares else mean(shares)  # not defined where a layer explains nothing
    return {"nmse": errors, "expert_share": share, "rise": rise, "kl": results["kl"]}


@torch.no_grad()
def dense_start(options: DecompositionOptions) -> dict[str, Any]:
    """Return the same figures for a layer before its training, with Cᵀa = 1."""
    model, tokenizer, commit = load_base_model(options.model, None, options.dtype)
    documents, heldout = load_documents(options.text, options.seed)
    mxd = MxDModel(build_config(model, commit, options))
    rows = pack(documents, tokenizer, options.context_length, seed=options.seed, repeat=True)
    arguments = DistillationArguments(
        output_dir=options.output, per_device_train_batch_size=16, max_steps=1, gate_init="random", disable_tqdm=True
    )
    trainer = DistillationTrainer(mxd, model, arguments, train_dataset=rows)
    trainer.calibration_tokens = lambda: CALIBRATION  # type: ignore[method-assign]
    trainer.init_weights()

    def ones(layer: SparseLayer, coefficients: ExpertCoefficients) -> Tensor:
        return torch.ones(*coefficients.values.shape[:-1], layer.config.output_size)

    layer = mxd.config.layers[0]
    dense, errors = ChangedExperts(mxd.layer(layer), ones), [ErrorSums() for _ in range(OUTPUTS)]
    untouched, spliced = LogitSums(), LogitSums()
    for one in evaluation_batches(heldout, tokenizer, options.context_length, options.evaluation_tokens):
        batch = batch_for(model, one)
        mask = torch.ones_like(batch[0], dtype=torch.bool) if batch[1] is None else batch[1].bool()
        captured, logits = capture_with_logits(model, mxd.config, batch)
        x, y = (tensor[mask] for tensor in captured[layer])
        for sums, prediction, target in zip(errors, dense(x).chunk(OUTPUTS, -1), y.chunk(OUTPUTS, -1), strict=True):
            sums.update(prediction, target)
        untouched.update(logits, batch[0], mask)
        with spliced_mlps(model, {layer: dense}):
            spliced.update(next_token_logits(model, batch), batch[0], mask, reference=logits)
    rise = spliced.cross_entropy - untouched.cross_entropy
    return {"nmse": [sums.nmse for sums in errors], "expert_share": 0.0, "rise": rise, "kl": spliced.kl}


def compare(
    method: str, options: dict[str, Any], first: int, active: list[int], seeds: int, work: Path
) -> Iterator[dict[str, Any]]:
    """Train both for every seed, and yield the figures of every run so far."""
    layers = list(range(first, first + OUTPUTS))
    separate = DecompositionOptions(**options, method=method, layers=layers)
    one = {
        **options,
        "method": method,
        "layers": [first],
        "num_output_layers": OUTPUTS,
        "num_experts": matched(separate),
    }
    asked = {f"one layer each, K = {K}": {**options, "method": method, "layers": layers}}
    asked |= {f"one layer for all, K = {k}": {**one, "num_experts_per_tok": k} for k in active}
    found: dict[str, Any] = {"layers": layers, "rows": {}}
    if method == "mxd":
        starts = [DecompositionOptions(**one, seed=seed, output=str(work / "dense")) for seed in range(seeds)]
        found["rows"][DENSE] = {"runs": [dense_start(start) for start in starts]}
        yield found
    for name, wanted in asked.items():
        model = base_skeleton(options["model"], None, separate.dtype, separate.context_length)
        config = build_config(model, None, DecompositionOptions(**wanted))
        folders = [work / f"{method}, {name}, {seed}".replace(" ", "-") for seed in range(seeds)]
        runs = [DecompositionOptions(**wanted, seed=seed, output=str(folder)) for seed, folder in enumerate(folders)]
        found["rows"][name] = {
            "parameters": config.num_parameters,
            "num_experts": config.layer(first).num_experts,
            "runs": [figures(trained(decompose, run)) for run in runs],
        }
        yield found


def _cell(values: list[float], style: str) -> str:
    spread = f" ± {stdev(values):{style.lstrip('+')}}" if len(values) > 1 else ""
    return f"{mean(values):{style}}{spread}"


def table(results: dict[str, Any]) -> str:
    """Return the table of all methods in Markdown: means over seeds ± their standard deviation."""
    lines = []
    for method, found in results["methods"].items():
        names = [f"NMSE, layer {layer}" for layer in found["layers"]]
        lines += ["", f"| {METHODS[method]} | parameters | {' | '.join(names)} | expert share | CE rise | KL |"]
        lines += ["|" + "---|" * (len(names) + 5)]
        for name, row in found["rows"].items():
            runs = row["runs"]
            cells = [f"{row['parameters']:,}" if "parameters" in row else ""]
            cells += [_cell([run["nmse"][i] for run in runs], ".4f") for i in range(len(names))]
            shares = [100 * run["expert_share"] for run in runs if run["expert_share"] is not None]
            cells += [_cell(shares, ".0f") + " %" if shares and name != DENSE else "–"]
            cells += [_cell([run["rise"] for run in runs], "+.4f"), _cell([run["kl"] for run in runs], ".4f")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    settings, seeds = results["settings"], len(next(iter(results["methods"]["mxd"]["rows"].values()))["runs"])
    last = f"{settings['tokens']:,} training tokens, {seeds} seeds, ± their standard deviation. {results['machine']}."
    return "\n".join([*lines[1:], "", last]) + "\n"


def main() -> None:
    """Measure the methods asked for, and write each into the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=demo.MODEL_NAME)
    parser.add_argument("--dataset", nargs="+", default=[])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["mxd"], choices=list(METHODS))
    parser.add_argument("--first", type=int, default=1, help="layer that the cross-layer one reads")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--active", nargs="+", type=int, default=[K, OUTPUTS * K], help="K of the cross-layer ones")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--match", type=int, default=8, help="match_transcoder of each single layer")
    asked = parser.parse_args()
    options = {
        "model": asked.model, "dataset": asked.dataset, "tokens": asked.tokens, "match_transcoder": asked.match,
        "num_experts_per_tok": K, "batch_tokens": 1024, "evaluation_tokens": 4096,
        "training": {"calibration_tokens": CALIBRATION, "statistics_tokens": CALIBRATION},
    }  # fmt: skip
    for method in asked.methods:
        for found in compare(method, options, asked.first, asked.active, asked.seeds, asked.work):
            kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"methods": {}}
            kept["methods"][method] = found
            kept |= {"settings": options, "machine": machine(torch.get_num_threads(), "cpu")}
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

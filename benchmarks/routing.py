"""What hierarchical routing costs in accuracy and gains in speed, on a trained decomposition and real text.

    python benchmarks/routing.py MODEL DECOMPOSITION --corpus FOLDER [--trained FOLDER ...]

MODEL is the folder of the base model, DECOMPOSITION one with the exact gate (`mxd decompose`). A router is fitted to
its first layer on training text, and for every number of opened groups: recall of the exact TopK, NMSE, rise of
cross-entropy with its 95 % interval over the exact layer's, KL to the untouched model, and time of gate and layer
against the exact ones, in turns: of many tokens, and of one with the weights not in the processor's cache, as
generation finds them. Each `--trained` folder is a decomposition that was trained with routing (`mxd decompose
--groups-per-token`); its own number of groups is measured. Last, greedy generation at batch size 1 by the spliced and
the untouched model, in turns. Text: the parquet files of FOLDER; that `mxd decompose` with seed 0 holds out of them is
evaluated on. Writes benchmarks/results/routing.json and the tables in docs/speed.md.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pages import machine, write_between
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, set_seed

from evaluation_mxd.forward import ZeroMLP, capture_with_logits, evaluating, next_token_logits
from evaluation_mxd.metrics import ErrorSums, LogitSums
from evaluation_mxd.paired import PairedDifference, half_width
from modeling_mxd import MxDConfig, MxDModel, SparseLayer, capture_mlps, spliced_mlps
from mxd.base_model import load_base_model
from mxd.pipeline import TextOptions, evaluation_batches, load_documents
from trainers import CausalCollator, fit_router, pack, routing_recall

RESULTS = Path(__file__).parent / "results" / "routing.json"
PAGE = Path(__file__).parent.parent / "docs" / "speed.md"
MARK = "benchmarks/routing.py"
CONTEXT = 256
OPENED = (1, 2, 4, 6, 8, 12, 16, 24, 32)
TIMED_TOKENS, MANY_TOKENS = 1024, 4096
FLUSHED = 2**27
"""Numbers that are read before a timed step of one token: 512 MiB, more than a processor's cache."""
GENERATED = 64


class Evaluated:
    """Held-out text, what the untouched model does on it, and how far a layer is from that."""

    def __init__(self, model: PreTrainedModel, config: MxDConfig, batches: list[dict[str, Tensor]]):
        self.model, self.index, self.batches = model, config.layers[0], batches
        self.captured: list[tuple[Tensor, Tensor]] = []
        self.logits: list[Tensor] = []
        self.exact: list[Tensor] = []  # losses of the first layer that is measured
        self.untouched, ablated = LogitSums(), LogitSums()
        for batch in tqdm(batches, desc="untouched", unit="batch"):
            ids, every = batch["input_ids"], torch.ones_like(batch["input_ids"], dtype=torch.bool)
            captured, logits = capture_with_logits(model, config, (ids, None))
            self.captured.append(captured[self.index])
            self.logits.append(logits)
            self.untouched.update(logits, ids, every)
            with spliced_mlps(model, {self.index: ZeroMLP(config.layer(self.index).output_size)}):
                ablated.update(next_token_logits(model, (ids, None)), ids, every)
        self.zero_ablated = ablated.cross_entropy

    @property
    def inputs(self) -> Tensor:
        """The MLP's inputs, (tokens, I)."""
        return torch.cat([x.flatten(0, 1) for x, _ in self.captured])

    def measure(self, layer: SparseLayer) -> dict[str, Any]:
        """Recall, NMSE, KL and rise of cross-entropy, of a layer as it is configured; the exact one comes first."""
        errors, spliced, difference, losses = ErrorSums(), LogitSums(), PairedDifference(), list[Tensor]()
        for batch, (x, y), reference in zip(self.batches, self.captured, self.logits, strict=True):
            ids, every = batch["input_ids"], torch.ones_like(batch["input_ids"], dtype=torch.bool)
            errors.update(layer(x), y)
            with spliced_mlps(self.model, {self.index: layer}):
                logits = next_token_logits(self.model, (ids, None))
            losses.append(spliced.update(logits, ids, every, reference=reference))
        self.exact = self.exact or losses
        for of_layer, of_exact in zip(losses, self.exact, strict=True):
            difference.update(of_layer - of_exact, torch.ones_like(of_layer, dtype=torch.bool))
        recall = routing_recall(layer, self.inputs)
        return {
            "recall": recall.experts,
            "recall_of_coefficients": recall.coefficients,
            "nmse": errors.nmse,
            "cross_entropy_rise": spliced.cross_entropy - self.untouched.cross_entropy,
            "rise_over_exact": difference.mean,
            "interval_over_exact": difference.interval,
            "kl": spliced.kl,
        }


def with_groups_opened(layer: SparseLayer, opened: int) -> SparseLayer:
    """The same layer, weights shared, that opens so many groups."""
    twin = copy.copy(layer)
    twin.config = replace(layer.config, num_groups_per_tok=opened)
    return twin


def in_turns(
    functions: dict[str, Callable[[], Any]], turns: int, before: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Median seconds of each, without what is done before it."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            if before is not None:
                before()
            started = time.perf_counter()
            function()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def time_layers(
    layers: dict[str, SparseLayer], x: Tensor, turns: int, before: Callable[[], Any] | None = None
) -> dict[str, dict[str, float]]:
    """Seconds of gate and of layer, by name; and of all but the gate, which no routing makes faster."""
    functions: dict[str, Callable[[], Any]] = {}
    for name, layer in layers.items():
        functions[f"gate of {name}"] = lambda layer=layer: layer.encode(x)
        functions[f"layer of {name}"] = lambda layer=layer: layer(x)
    any_layer = next(iter(layers.values()))
    chosen = any_layer.encode(x)
    functions["rest"] = lambda: any_layer.decode(chosen, x)
    seconds = in_turns(functions, turns, before)
    timed = {name: {part: seconds[f"{part} of {name}"] for part in ("gate", "layer")} for name in layers}
    return timed | {"rest": {"layer": seconds["rest"]}}


def time_generation(
    model: PreTrainedModel, index: int, layers: dict[str, SparseLayer], prompt: Tensor, turns: int
) -> dict[str, float]:
    """Greedy tokens a second at batch size 1, untouched and with each layer."""

    def generate() -> None:
        model.generate(prompt, max_new_tokens=GENERATED, min_new_tokens=GENERATED, do_sample=False, pad_token_id=0)

    def spliced(layer: SparseLayer) -> Callable[[], None]:
        def run() -> None:
            with spliced_mlps(model, {index: layer}):
                generate()

        return run

    seconds = in_turns({"untouched": generate} | {name: spliced(layer) for name, layer in layers.items()}, turns)
    return {name: GENERATED / value for name, value in seconds.items()}


def fitting_inputs(model: PreTrainedModel, index: int, rows: Iterator[dict[str, Any]], tokens: int) -> Tensor:
    """Inputs of the MLP on training text, (tokens, I)."""
    collate, size = CausalCollator(), max(1, 2048 // CONTEXT)
    found = []
    for _ in tqdm(range(0, tokens, size * CONTEXT), desc="inputs", unit="batch"):
        batch = collate(list(islice(rows, size)))
        found.append(capture_mlps(model, [index], batch["input_ids"])[index][0].flatten(0, 1))
    return torch.cat(found)


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements."""
    set_seed(0)
    model, tokenizer, _ = load_base_model(str(options.model))
    decomposition = MxDModel.from_pretrained(options.decomposition).eval()
    index = decomposition.config.layers[0]
    exact = decomposition.layer(index)
    files = sorted(str(path) for path in options.corpus.glob("*.parquet"))
    training, heldout = load_documents(TextOptions(dataset=files, context_length=CONTEXT), seed=0)
    rows = iter(pack(training, tokenizer, CONTEXT, seed=0, repeat=True))
    fitted = copy.deepcopy(exact)
    fit_router(fitted, fitting_inputs(model, index, rows, options.fit_tokens))
    evaluated = Evaluated(model, decomposition.config, evaluation_batches(heldout, tokenizer, CONTEXT, options.tokens))
    layers: dict[str, SparseLayer] = {"exact": exact}
    layers |= {f"fitted, {m} groups": with_groups_opened(fitted, m) for m in OPENED}
    for folder in options.trained:
        trained = MxDModel.from_pretrained(folder).eval().layer(index)
        layers[f"trained with {trained.config.num_groups_per_tok} groups"] = trained
    with evaluating(model):
        measured = {
            name: evaluated.measure(layer) | _sizes(layer) for name, layer in tqdm(layers.items(), desc="layers")
        }
        timed = time_layers(layers, evaluated.inputs[:TIMED_TOKENS], options.turns)
        many = time_layers(layers, evaluated.inputs[:MANY_TOKENS], options.turns)
        flushed = torch.zeros(FLUSHED)
        one_token = time_layers(layers, evaluated.inputs[:1], 4 * options.turns, before=flushed.sum)
        chosen = {name: layers[name] for name in ("exact", "fitted, 8 groups")}
        prompt = evaluated.batches[0]["input_ids"][:1, :16]
        generation = time_generation(model, index, chosen, prompt, options.turns)
    return {
        "machine": machine(options.threads, "cpu"),
        "layer": index,
        "sizes": {name: value for name, value in vars(exact.config).items() if isinstance(value, int)},
        "tokens": {"fitting": options.fit_tokens, "held out": sum(b["input_ids"].numel() for b in evaluated.batches)},
        "cross_entropy": {"untouched": evaluated.untouched.cross_entropy, "zero_ablated": evaluated.zero_ablated},
        "layers": {
            name: {
                **measured[name],
                "seconds": timed[name],
                "seconds_of_many_tokens": many[name],
                "seconds_of_one_token": one_token[name],
            }
            for name in layers
        },
        "rest_seconds": timed["rest"]["layer"],
        "generation_tokens_per_second": generation,
    }


def _sizes(layer: SparseLayer) -> dict[str, Any]:
    config = layer.config
    if config.num_expert_groups is None or config.num_groups_per_tok is None:
        return {"rows_scored": config.num_experts}
    rows = config.num_expert_groups + config.num_groups_per_tok * config.expert_group_size
    return {"groups": config.num_expert_groups, "opened": config.num_groups_per_tok, "rows_scored": rows}


def table(results: dict[str, Any]) -> str:
    """The page's tables in Markdown."""
    exact, sizes = results["layers"]["exact"], results["sizes"]
    lines = [
        f"{results['machine']}. SmolLM2-135M layer {results['layer']}, N = {sizes['num_experts']:,}, "
        f"K = {sizes['num_experts_per_tok']}; {results['tokens']['held out']:,} held-out tokens, routers fitted on "
        f"{results['tokens']['fitting']:,}. Gate and layer: their times on {TIMED_TOKENS:,} tokens, float32; many: the "
        f"layer's on {MANY_TOKENS:,}; step: on one token, weights not in the cache.",
        "",
        "|  | rows scored | recall | of coefficients | NMSE | CE rise | over exact | KL | to exact's | gate | layer "
        "| many | step |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results["layers"].items():
        cells = [
            name,
            f"{row['rows_scored']:,}",
            f"{100 * row['recall']:.1f} %",
            f"{100 * row['recall_of_coefficients']:.1f} %",
            f"{row['nmse']:.4f}",
            f"{row['cross_entropy_rise']:+.4f}",
            f"{row['rise_over_exact']:+.4f} ± {half_width(row['interval_over_exact']):.4f}",
            f"{row['kl']:.4f}",
            f"{100 * (row['kl'] / exact['kl'] - 1):+.1f} %",
            f"{exact['seconds']['gate'] / row['seconds']['gate']:.1f} ×",
            f"{exact['seconds']['layer'] / row['seconds']['layer']:.1f} ×",
            *(
                f"{exact[seconds]['layer'] / row[seconds]['layer']:.1f} ×"
                for seconds in ("seconds_of_many_tokens", "seconds_of_one_token")
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    bound = exact["seconds"]["layer"] / results["rest_seconds"]
    lines += ["", f"With a gate that costs nothing the layer would be {bound:.1f} × as fast as the exact one."]
    speeds = results["generation_tokens_per_second"]
    untouched = speeds["untouched"]
    spliced = "; ".join(
        f"{name} {speed:.1f} ({speed / untouched:.2f} ×)" for name, speed in speeds.items() if name != "untouched"
    )
    lines += ["", f"Greedy generation at batch size 1, tokens a second: untouched {untouched:.1f}; {spliced}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("decomposition", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--trained", type=Path, nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens")
    parser.add_argument("--fit-tokens", type=int, default=65536)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.tokens < MANY_TOKENS:
        parser.error(f"--tokens must be at least {MANY_TOKENS}, of which a layer's time is taken")
    torch.set_num_threads(options.threads)
    results = run(options)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_between(PAGE, MARK, table(results))


if __name__ == "__main__":
    main()

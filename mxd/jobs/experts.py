"""`mxd experts`: the places in a text where experts are most active."""

import html
import random
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mxd.base.files import replace_text, write_json
from mxd.base.progress import progress_bar
from mxd.data.texts import evaluation_batches, evaluation_settings, load_one
from mxd.evaluation.top_examples import top_examples

from .decompositions import load_base_and_text, load_decomposition, results_folder
from .options import ExpertsOptions
from .run_folder import write_run

EXPERTS_NAME, PAGE_NAME = "experts.json", "experts.html"
AROUND = 12
"""Tokens of context on each side of an example."""
NOT_ACTIVE = "not active in this text"
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "td{vertical-align:top;padding:.1em .6em .1em 0}td:first-child{text-align:right;color:#666}mark{background:#fd6}"
)


def read_experts(options: ExpertsOptions, progress: bool = True) -> dict[str, Any]:
    """Find where experts are most active in a text; write experts.json, and experts.html to read.

    Without named experts, a random sample of the active ones is shown. Each example is the strongest position of a row.

    Returns:
        {"layers": {"15": {"1234": {"frequency": share of training tokens on which the expert is active, None if it was
        not measured, "examples": [{"coefficient", "before", "token", "after"}]}}}, "settings"}; the strongest example
        first.

    Raises:
        ValueError: there is no such decomposition, layer or expert, or the text cannot be read.
    """
    folder = results_folder(options.decomposition, options.output)
    decomposition = load_decomposition(options.decomposition, None if options.layer is None else [options.layer])
    for layer in decomposition.config.layers:
        count = decomposition.config.layer(layer).num_experts
        if unknown := [expert for expert in options.experts or [] if not 0 <= expert < count]:
            raise ValueError(f"layer {layer} has no expert {unknown[0]}: they are 0 to {count - 1}")
    model, tokenizer, documents = load_base_and_text(
        decomposition, options.dtype, options.context_length, lambda: load_one(options.text)
    )
    batches = evaluation_batches(documents, tokenizer, options.context_length, options.tokens)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    found = top_examples(model, decomposition, progress_bar(batches, desc="experts", show=progress), options.examples)
    results: dict[str, Any] = {"layers": {}}
    for layer in decomposition.config.layers:
        top, chosen = found[layer], options.experts
        if chosen is None:
            active = (top.values[:, 0] > 0).nonzero().squeeze(1).tolist()
            chosen = sorted(random.Random(options.seed).sample(active, min(options.sample, len(active))))
        frequency = decomposition.layer(layer).expert_frequency
        results["layers"][str(layer)] = {
            str(expert): {
                "frequency": float(frequency[expert]) if frequency.any() else None,
                "examples": [
                    {"coefficient": value, **_in_context(tokenizer, ids[row].tolist(), position)}
                    for value, row, position in zip(
                        *(part[expert].tolist() for part in (top.values, top.rows, top.positions)), strict=True
                    )
                    if value > 0
                ],
            }
            for expert in chosen
        }
    settings = evaluation_settings(options.text, options.dtype)
    results["settings"] = {**settings, "tokens": ids.numel(), "seed": options.seed}
    if folder is not None:
        write_run(folder, "experts", options)
        write_json(folder / EXPERTS_NAME, results)
        replace_text(folder / PAGE_NAME, page(results))
    return results


def _in_context(tokenizer: PreTrainedTokenizerBase, row: list[int], position: int) -> dict[str, str]:
    start, end = max(0, position - AROUND), position + 1 + AROUND
    before, through, whole = (str(tokenizer.decode(row[start:stop])) for stop in (position, position + 1, end))
    if through.startswith(before) and whole.startswith(through):  # a token alone loses the space before it
        return {"before": before, "token": through[len(before) :], "after": whole[len(through) :]}
    token, after = (str(tokenizer.decode(part)) for part in (row[position : position + 1], row[position + 1 : end]))
    return {"before": before, "token": token, "after": after}


def page(results: dict[str, Any]) -> str:
    """Return the results of `read_experts` as an HTML page of one file."""
    lines = [f'<!doctype html><meta charset="utf-8"><title>Experts</title><style>{_STYLE}</style>']
    for layer, experts in results["layers"].items():
        lines.append(f"<h1>Layer {html.escape(layer)}</h1>")
        for expert, found in experts.items():
            often = f"active on {percent(found['frequency'])} % of the training tokens"
            lines.append(f"<h2>Expert {html.escape(expert)}</h2><p>{often}</p>")
            rows = [
                f"<tr><td>{example['coefficient']:.3g}</td><td>{html.escape(example['before'])}"
                f"<mark>{html.escape(example['token'])}</mark>{html.escape(example['after'])}</td></tr>"
                for example in found["examples"]
            ]
            lines.append(f"<table>{''.join(rows)}</table>" if rows else f"<p>{NOT_ACTIVE}</p>")
    return "\n".join([*lines, ""])


def percent(frequency: float | None) -> str:
    """Return a share as a percentage with two decimals; a dash for None."""
    return "–" if frequency is None else f"{100 * frequency:.2f}"

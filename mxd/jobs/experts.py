"""`mxd experts`: what experts respond to, by the places in a text where they are most active."""

import html
import random
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from mxd.base.files import replace_text, write_json
from mxd.cli.tables import cell
from mxd.data.texts import TextOptions, evaluation_batches, evaluation_settings, load_one
from mxd.evaluation import top_examples
from mxd.modeling_mxd import MxDModel

from .decompositions import check_base_of, load_base_of, load_decomposition, results_folder

EXPERTS_NAME, PAGE_NAME = "experts.json", "experts.html"
AROUND = 12  # tokens before and after
SHOWN = 3  # examples of each on screen
NOT_ACTIVE = "not active in this text"
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "td{vertical-align:top;padding:.1em .6em .1em 0}td:first-child{text-align:right;color:#666}mark{background:#fd6}"
)


def read_experts(
    decomposition: str,
    text: TextOptions,
    experts: Sequence[int] | None = None,
    layer: int | None = None,
    sample: int = 20,
    examples: int = 10,
    tokens: int = 128_000,
    dtype: str = "float32",
    seed: int = 0,
    output: str | None = None,
) -> dict[str, Any]:
    """Find where experts are most active in a text; written as experts.json and, to read, as experts.html.

    Args:
        decomposition: folder or Hub id.
        text: what to search; the embedded sample if it names no dataset.
        experts: which; None for a random sample of those that are active at all, not the ones that are easy to read.
        layer: of which layer; None for all.
        sample: how many of each layer.
        examples: rows for each, the strongest position of each row.
        tokens: how many to search.
        dtype: in which the base model runs.
        seed: of the sample.
        output: folder to write into instead; of a decomposition on the Hub there has to be one.

    Returns:
        {"layers": {"15": {"1234": {"frequency": share of training tokens on which it is active, None where that
        was not measured, "examples": [{"coefficient", "before", "token", "after"}]}}}, "settings"}; the strongest
        example first.

    Raises:
        ValueError: there is no decomposition, layer or expert of that number, or the text cannot be read.
    """
    folder = results_folder(decomposition, output)
    loaded = load_decomposition(decomposition, None if layer is None else [layer])
    layers = loaded.config.layers
    _check(loaded, experts)
    check_base_of(loaded, dtype, text.context_length)
    documents = load_one(text)
    model, tokenizer = load_base_of(loaded, dtype, text.context_length)
    batches = evaluation_batches(documents, tokenizer, text.context_length, tokens)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    found = top_examples(model, loaded, batches, examples)
    results: dict[str, Any] = {"layers": {}}
    for index in layers:
        top = found[index]
        alive = (top.values[:, 0] > 0).nonzero().squeeze(1).tolist()
        chosen = experts if experts is not None else sorted(random.Random(seed).sample(alive, min(sample, len(alive))))
        frequency = loaded.layer(index).expert_frequency
        results["layers"][str(index)] = {
            str(expert): {
                "frequency": float(frequency[expert]) if frequency.any() else None,
                "examples": [
                    {"coefficient": value, **_in_context(tokenizer, ids[row].tolist(), position)}
                    for value, row, position in zip(
                        top.values[expert].tolist(),
                        top.rows[expert].tolist(),
                        top.positions[expert].tolist(),
                        strict=True,
                    )
                    if value > 0
                ],
            }
            for expert in chosen
        }
    results["settings"] = {**evaluation_settings(text, dtype), "tokens": ids.numel(), "seed": seed}
    write_json(folder / EXPERTS_NAME, results)
    replace_text(folder / PAGE_NAME, page(results))
    return results


def _check(decomposition: MxDModel, experts: Sequence[int] | None) -> None:
    for layer in decomposition.config.layers:
        count = decomposition.config.layer(layer).num_experts
        if unknown := [expert for expert in experts or [] if not 0 <= expert < count]:
            raise ValueError(f"layer {layer} has no expert {unknown[0]}: they are 0 to {count - 1}")


def _in_context(tokenizer: PreTrainedTokenizerBase, row: list[int], position: int) -> dict[str, str]:
    start, end = max(0, position - AROUND), position + 1 + AROUND
    before, through, whole = (str(tokenizer.decode(row[start:stop])) for stop in (position, position + 1, end))
    if through.startswith(before) and whole.startswith(through):  # a token by itself loses the space before it
        return {"before": before, "token": through[len(before) :], "after": whole[len(through) :]}
    token, after = (str(tokenizer.decode(part)) for part in (row[position : position + 1], row[position + 1 : end]))
    return {"before": before, "token": token, "after": after}


def page(results: dict[str, Any]) -> str:
    """What `read_experts` gives as a page that needs nothing else."""
    parts = []
    for layer, experts in results["layers"].items():
        parts.append(f"<h1>Layer {html.escape(layer)}</h1>")
        for expert, found in experts.items():
            often = f"active on {_percent(found['frequency'])} % of the training tokens"
            parts.append(f"<h2>Expert {html.escape(expert)}</h2><p>{often}</p>")
            rows = [
                f"<tr><td>{example['coefficient']:.3g}</td><td>{html.escape(example['before'])}"
                f"<mark>{html.escape(example['token'])}</mark>{html.escape(example['after'])}</td></tr>"
                for example in found["examples"]
            ]
            parts.append(f"<table>{''.join(rows)}</table>" if rows else f"<p>{NOT_ACTIVE}</p>")
    return (
        f'<!doctype html><meta charset="utf-8"><title>Experts</title><style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n"
    )


def _percent(frequency: float | None) -> str:
    return "–" if frequency is None else f"{100 * frequency:.2f}"


def print_experts(results: dict[str, Any]) -> None:
    """A table per layer: of every expert the strongest examples."""
    for layer, experts in results["layers"].items():
        table = Table(title=cell(f"Layer {layer}: where experts are most active"))
        table.add_column("expert", justify="right")
        table.add_column("% of training\ntokens", justify="right")
        table.add_column("a", justify="right")
        table.add_column("text")
        for expert, found in experts.items():
            for number, example in enumerate(found["examples"][:SHOWN]):
                head = ("", "") if number else (expert, _percent(found["frequency"]))
                before, after = cell(example["before"][-30:]), cell(example["after"][:30])
                text = Text.assemble(before, (cell(example["token"]).plain, "bold reverse"), after)
                table.add_row(*map(cell, (*head, f"{example['coefficient']:.3g}")), text)
            if not found["examples"]:
                table.add_row(*map(cell, (expert, _percent(found["frequency"]), "–", NOT_ACTIVE)))
        Console().print(table)

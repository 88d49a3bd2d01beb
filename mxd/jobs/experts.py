"""`mxd experts`: the places in a text where experts are most active."""

import html
import random
from collections import Counter
from typing import Any

from transformers import PreTrainedTokenizerBase

from mxd.base.files import replace_text, write_json
from mxd.base.progress import progress_bar
from mxd.data.provenance import recorded_runs
from mxd.data.texts import document_batches, evaluation_settings
from mxd.evaluation.top_examples import TopExamples, top_examples

from .decompositions import (
    load_base_and_text,
    load_decomposition,
    read_text,
    recorded_evaluation,
    results_folder,
    warn_of_weak_experts,
)
from .options import ExpertsOptions, text_name
from .run_folder import write_run

EXPERTS_NAME, PAGE_NAME = "experts.json", "experts.html"
AROUND = 12
"""Tokens of context on each side of an example."""
CANDIDATES = 8
"""Rows kept for each example that is shown, of which the near-duplicates are left out."""
MAX_BYTES = 4
"""Bytes of a character in UTF-8, each of which may be a token."""
_INCOMPLETE = "\ufffd"
NOT_ACTIVE = "not active in this text"
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "td{vertical-align:top;padding:.1em .6em .1em 0}td:first-child{text-align:right;color:#666}mark{background:#fd6}"
)


def read_experts(options: ExpertsOptions, progress: bool = True) -> dict[str, Any]:
    """Find where experts are most active in a text; write experts.json, and experts.html to read.

    Without named experts, a random sample of the active ones is shown. Each example is the strongest position of a row,
    without the row's first; examples are of distinct documents (if the text has as many), and no two share half of
    their context. Without a dataset, the text is that of the training, see `read_text`.

    Returns:
        {"layers": {"15": {"1234": {"frequency": share of training tokens on which the expert is active, None if it was
        not measured, "examples": [{"coefficient", "before", "token", "after"}]}}}, "settings", "warning": of a low
        expert share, or empty}; the strongest example first.

    Raises:
        ValueError: there is no such decomposition, layer or expert, or the text cannot be read.
    """
    folder = results_folder(options.decomposition, options.output)
    decomposition = load_decomposition(options.decomposition, None if options.layer is None else [options.layer])
    for layer in decomposition.config.layers:
        count = decomposition.config.layer(layer).num_experts
        if unknown := [expert for expert in options.experts or [] if not 0 <= expert < count]:
            raise ValueError(f"layer {layer} has no expert {unknown[0]}: they are 0 to {count - 1}")
    evaluation = recorded_evaluation(options.decomposition)
    model, tokenizer, (documents, text, _) = load_base_and_text(
        decomposition,
        options.dtype,
        options.context_length,
        lambda: read_text(options.text, options.decomposition, recorded_runs(evaluation.get("settings"))),
    )
    batches, origins = document_batches(documents, tokenizer, options.context_length, options.tokens)
    rows = [ids[mask > 0].tolist() for batch in batches for ids, mask in zip(*batch.values(), strict=True)]
    bar = progress_bar(batches, desc="experts", show=progress)
    found = top_examples(model, decomposition, bar, CANDIDATES * options.examples)
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
                "examples": _examples(top, expert, rows, origins, tokenizer, options.examples),
            }
            for expert in chosen
        }
    settings = evaluation_settings(text, options.dtype)
    results["settings"] = {**settings, "tokens": sum(map(len, rows)), "seed": options.seed}
    results["warning"] = warn_of_weak_experts(evaluation)
    if folder is not None:
        write_run(folder, "experts", options)
        write_json(folder / EXPERTS_NAME, results)
        replace_text(folder / PAGE_NAME, page(results))
    return results


def _examples(
    top: TopExamples,
    expert: int,
    rows: list[list[int]],
    origins: list[int],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> list[dict[str, Any]]:
    """Return the strongest examples of an expert, without near-duplicates; of distinct documents, if enough."""
    per_document = -(-count // len(set(origins)))
    seen: list[set[tuple[int, ...]]] = []
    taken: Counter[int] = Counter()
    examples: list[dict[str, Any]] = []
    for value, row, position in zip(
        *(part[expert].tolist() for part in (top.values, top.rows, top.positions)), strict=True
    ):
        if value <= 0 or len(examples) == count:
            break
        window = rows[row][max(0, position - AROUND) : position + 1 + AROUND]
        sequences = {tuple(window[begin : begin + 4]) for begin in range(max(1, len(window) - 3))}
        again = any(2 * len(sequences & other) >= min(len(sequences), len(other)) for other in seen)
        context = _in_context(tokenizer, rows[row], position)
        cut = _INCOMPLETE in context["token"] and not context["token"].strip(_INCOMPLETE)  # the row ends inside it
        if not again and not cut and taken[origins[row]] < per_document:
            seen.append(sequences)
            taken[origins[row]] += 1
            examples.append({"coefficient": value, **context})
    return examples


def _in_context(tokenizer: PreTrainedTokenizerBase, row: list[int], position: int) -> dict[str, str]:
    """Return a token and the text around it. A token inside a character is shown with the rest of the character."""
    first, last = max(0, position - AROUND), min(len(row), position + 1 + AROUND)
    upto = {stop: str(tokenizer.decode(row[first:stop])) if stop > first else "" for stop in range(first, last + 1)}
    whole = upto[last]  # decoded together: a token alone loses the space before it
    ends = [stop for stop, text in upto.items() if whole.startswith(text) and not text.endswith(_INCOMPLETE)]
    start = max((stop for stop in ends if position - MAX_BYTES < stop <= position), default=None)
    end = min((stop for stop in ends if position < stop < position + 1 + MAX_BYTES), default=None)
    if start is None or end is None:
        before, token = upto[position], str(tokenizer.decode([row[position]]))
        after = str(tokenizer.decode(row[position + 1 : last])) if position + 1 < last else ""
    else:
        before, token, after = upto[start], whole[len(upto[start]) : len(upto[end])], whole[len(upto[end]) :]
    return {"before": before.strip(_INCOMPLETE), "token": token, "after": after.strip(_INCOMPLETE)}


def page(results: dict[str, Any]) -> str:
    """Return the results of `read_experts` as an HTML page of one file."""
    lines = [f'<!doctype html><meta charset="utf-8"><title>Experts</title><style>{_STYLE}</style>']
    read = f"{results['settings']['tokens']:,} tokens of {text_name(results['settings']['dataset'])}"
    lines.append(f"<p>Text: {html.escape(read)}</p><p>{html.escape(results.get('warning', ''))}</p>")
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

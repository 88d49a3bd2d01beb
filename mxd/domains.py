"""`mxd use`: which experts of a decomposition are of one domain of text."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from evaluation_mxd import count_expert_use, domain_use, plot_domain_use
from trainers import DataError, load_text
from trainers.labelled_text import label_names

from .runs import TextOptions, evaluation_batches, load_base_of, load_decomposition
from .tables import MAX_ROWS, cell

USE_NAME = "domain_use.json"
MAX_DOMAINS = 50


def documents_by_domain(text: TextOptions, column: str) -> dict[str, Dataset]:
    """Documents of every domain, by the names in the dataset's domain column; those without a name are left out.

    Raises:
        ValueError: when there are fewer than two domains, or too many of them.
        DataError: as `trainers.load_text`; there is no such column.
    """
    if not text.dataset:
        raise ValueError("no text to compare domains on: pass --dataset, and with --by the column that names them")
    if column == text.text_column:
        raise ValueError(f"the column {column!r} holds the text: name with --by the one that says what it is")
    documents = load_text(
        text.dataset,
        config_name=text.config_name,
        split=text.split,
        text_column=text.text_column,
        keep=[column],
    )
    assert isinstance(documents, Dataset)
    rows: dict[str, list[int]] = {}
    for index, domain in enumerate(label_names(documents, column)):
        if domain is not None:
            rows.setdefault(domain, []).append(index)
    if not 2 <= len(rows) <= MAX_DOMAINS:
        raise ValueError(f"the column {column!r} must have 2 to {MAX_DOMAINS} different values, it has {len(rows)}")
    return {domain: documents.select(rows[domain]) for domain in sorted(rows)}


def measure_domain_use(
    folder: str, text: TextOptions, column: str = "domain", tokens: int = 32768, dtype: str = "float32"
) -> dict[str, Any]:
    """Count which experts are active on the text of which domain; written into the decomposition's folder as
    domain_use.json and figures/experts_per_domain.png.

    Args:
        folder: of a decomposition.
        text: a dataset; it is not streamed, since it is divided first.
        column: of the dataset, which names the domain of every document.
        tokens: at most so many of each domain, all alike where there are as many.
        dtype: in which the base model runs.

    Returns:
        {"layers": {"15": what `domain_use` gives}, "settings"}.

    Raises:
        ValueError: when the folder holds no decomposition, or the text cannot be read or has no domains.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder: name that of a decomposition")
    decomposition = load_decomposition(folder)
    documents = documents_by_domain(text, column)
    model, tokenizer = load_base_of(decomposition, dtype, text.context_length)
    batches = {}
    for domain, part in documents.items():
        try:
            batches[domain] = evaluation_batches(part, tokenizer, text.context_length, tokens)
        except DataError as error:
            raise ValueError(f"domain {domain!r}: {error}") from error
    uses = {domain: count_expert_use(model, decomposition, of_domain) for domain, of_domain in batches.items()}
    layers = {
        layer: domain_use({domain: use[layer] for domain, use in uses.items()}) for layer in decomposition.config.layers
    }
    results: dict[str, Any] = {
        "layers": {str(layer): use for layer, use in layers.items()},
        "settings": {**asdict(text), "domain_column": column, "tokens_per_domain": tokens, "model_dtype": dtype},
    }
    (Path(folder) / USE_NAME).write_text(json.dumps(results, indent=2) + "\n")
    figures = Path(folder) / "figures"
    figures.mkdir(exist_ok=True)
    plot_domain_use({f"layer {layer}": use for layer, use in layers.items()}, figures / "experts_per_domain.png")
    return results


def print_domain_use(results: dict[str, Any]) -> None:
    """A table per layer: of every domain, how many experts are active there, and how many there alone."""
    for layer, use in list(results["layers"].items())[:MAX_ROWS]:
        own = f"experts with {100 * use['share']:.0f} % of their firings there"
        table = Table(title=cell(f"Layer {layer}: {use['judged_experts']} of {use['experts']} experts judged"))
        table.add_column("domain")
        for column in ("tokens", "active experts", own, "most frequent of them"):
            table.add_column(column, justify="right")
        for domain, row in use["domains"].items():
            first = ", ".join(list(row["own_experts"])[:5]) or "–"
            table.add_row(*map(cell, (domain, row["tokens"], row["active_experts"], len(row["own_experts"]), first)))
        Console().print(table)

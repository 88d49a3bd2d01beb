"""`mxd use`: which experts of a decomposition are of one domain of text."""

import logging
from dataclasses import asdict
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from mxd.base.files import write_json
from mxd.cli.tables import MAX_ROWS, cell
from mxd.data.documents import DataError, load_text
from mxd.data.labelled_text import label_names
from mxd.data.texts import TextOptions, evaluation_batches
from mxd.evaluation import count_expert_use, domain_use, plot_domain_use

from .decompositions import check_base_of, load_base_of, load_decomposition, results_folder

logger = logging.getLogger(__name__)

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
    decomposition: str,
    text: TextOptions,
    column: str = "domain",
    tokens: int = 32768,
    dtype: str = "float32",
    output: str | None = None,
) -> dict[str, Any]:
    """Count which experts are active on the text of which domain; written into the decomposition's folder as
    domain_use.json and figures/experts_per_domain.png.

    Args:
        decomposition: folder or Hub id.
        text: a dataset; it is not streamed, since it is divided first.
        column: of the dataset, which names the domain of every document.
        tokens: so many of each domain, in whole rows, or all that it has.
        dtype: in which the base model runs.
        output: folder to write into instead; of a decomposition on the Hub there has to be one.

    Returns:
        {"layers": {"15": what `domain_use` gives}, "settings"}.

    Raises:
        ValueError: when there is no decomposition, or the text cannot be read or has no domains.
    """
    folder = results_folder(decomposition, output)
    loaded = load_decomposition(decomposition)
    check_base_of(loaded, dtype, text.context_length)
    documents = documents_by_domain(text, column)
    model, tokenizer = load_base_of(loaded, dtype, text.context_length)
    batches, short = {}, []
    for domain, part in documents.items():
        try:
            # A domain with fewer tokens shows so in the table.
            batches[domain] = evaluation_batches(part, tokenizer, text.context_length, tokens, warn=False)
        except DataError as error:
            logger.warning("domain %r is left out: %s", domain, error)
            short.append(domain)
    if len(batches) < 2:
        raise ValueError(f"of the domains {', '.join(map(repr, documents))} fewer than two have enough text")
    uses = {domain: count_expert_use(model, loaded, of_domain) for domain, of_domain in batches.items()}
    layers = {layer: domain_use({domain: use[layer] for domain, use in uses.items()}) for layer in loaded.config.layers}
    results: dict[str, Any] = {
        "layers": {str(layer): use for layer, use in layers.items()},
        "settings": {
            **asdict(text),
            "domain_column": column,
            "tokens_per_domain": tokens,
            "left_out": short,
            "model_dtype": dtype,
        },
    }
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    write_json(folder / USE_NAME, results)
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

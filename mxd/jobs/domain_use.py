"""`mxd evaluate --by COLUMN`: which experts are active on which kinds of text."""

import logging
from typing import Any

from datasets import Dataset, concatenate_datasets

from mxd.base.files import write_json
from mxd.base.progress import progress_bar
from mxd.data.documents import DataError
from mxd.data.labelled_text import label_names, some
from mxd.data.provenance import is_held_out
from mxd.data.texts import TextOptions, evaluation_batches, load_one
from mxd.evaluation import ExpertUse, count_expert_use, domain_use, plot_domain_use
from mxd.evaluation.plots import decomposition_title

from .decompositions import load_base_and_text, load_decomposition, made_how, results_folder
from .options import EvaluationOptions
from .run_folder import write_run

logger = logging.getLogger(__name__)

USE_NAME = "domain_use.json"
MAX_DOMAINS = 50
FEW_TOKENS = 10_000


def documents_by_domain(text: TextOptions, column: str) -> dict[str, Dataset]:
    """Return the documents of each value of a column, without those that have none.

    Raises:
        ValueError: the column has fewer than two values, or more than `MAX_DOMAINS`.
        DataError: the text cannot be read, or has no such column.
    """
    if not text.dataset:
        raise ValueError("no text to compare: name it with --dataset, and the column of its kinds with --by")
    if column == text.text_column:
        raise ValueError(f"the column {column!r} holds the text: name the column of its kinds with --by")
    if text.streaming:
        raise ValueError("--by divides the whole dataset, which cannot be streamed: leave --streaming out")
    documents = load_one(text, keep=[column])
    assert isinstance(documents, Dataset)
    rows: dict[str, list[int]] = {}
    for index, domain in enumerate(label_names(documents, column)):
        if domain is not None:
            rows.setdefault(domain, []).append(index)
    if not 2 <= len(rows) <= MAX_DOMAINS:
        raise ValueError(
            f"the column {column!r} must have 2 to {MAX_DOMAINS} different values, it has {len(rows)}: {some(rows)}"
        )
    return {domain: documents.select(rows[domain]) for domain in sorted(rows)}


def measure_domain_use(options: EvaluationOptions, progress: bool = True) -> dict[str, Any]:
    """Count which experts are active on which domain of text; write domain_use.json and a figure.

    Each domain gets `tokens` tokens in whole rows, or all that it has.

    Returns:
        {"layers": {"15": what `domain_use` returns}, "settings"}.

    Raises:
        ValueError: there is no such decomposition, or the text cannot be read or has no domains.
    """
    column = options.by or "domain"
    if options.ablation or options.ranks:
        raise ValueError("--by measures the experts' use alone: leave --ablation and --ranks out")
    folder = results_folder(options.decomposition, options.output)
    decomposition = load_decomposition(options.decomposition)
    model, tokenizer, documents = load_base_and_text(
        decomposition, options.dtype, options.context_length, lambda: documents_by_domain(options.text, column)
    )
    batches, short = {}, []
    for domain, part in documents.items():
        try:  # the table shows which domain has fewer tokens, no warning is needed
            batches[domain] = evaluation_batches(part, tokenizer, options.context_length, options.tokens, warn=False)
        except DataError as error:
            logger.warning("domain %r is left out: %s", domain, error)
            short.append(domain)
    if len(batches) < 2:
        all_of_them, enough = (", ".join(map(repr, names)) or "none" for names in (documents, batches))
        raise ValueError(f"of the domains {all_of_them} fewer than two have enough text for one row: {enough}")
    uses = {
        domain: count_expert_use(model, decomposition, progress_bar(of_domain, desc=domain, show=progress))
        for domain, of_domain in batches.items()
    }
    _warn_of_few_tokens(uses)
    layers = {
        str(layer): domain_use({domain: use[layer] for domain, use in uses.items()})
        for layer in decomposition.config.layers
    }
    whole = concatenate_datasets(list(documents.values()))
    results: dict[str, Any] = {
        "layers": layers,
        "settings": {
            **vars(options.text),
            "held_out": is_held_out(made_how(options.decomposition), options.text, whole),
            "domain_column": column,
            "tokens_per_domain": options.tokens,
            "left_out": short,
            "model_dtype": options.dtype,
        },
    }
    if folder is not None:
        write_run(folder, "evaluate", options)
        write_json(folder / USE_NAME, results)
        figure = folder / "figures" / "experts_per_domain.png"
        figure.parent.mkdir(exist_ok=True)
        title = decomposition_title(decomposition.config)
        plot_domain_use({f"layer {layer}": use for layer, use in layers.items()}, figure, title)
    return results


def _warn_of_few_tokens(uses: dict[str, dict[int, ExpertUse]]) -> None:
    tokens = {domain: next(iter(use.values())).tokens for domain, use in uses.items()}
    if few := [f"{domain!r} ({count:,})" for domain, count in tokens.items() if count < FEW_TOKENS]:
        logger.warning(
            "few tokens of %s: chance assigns experts to such a domain; give each at least %s, with --tokens and text",
            ", ".join(few), f"{FEW_TOKENS:,}",
        )  # fmt: skip

"""`mxd evaluate`: measure a saved decomposition on text, or compare its experts' use between kinds of text."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from mxd.base.forward import check_predictions
from mxd.data.provenance import is_held_out
from mxd.data.texts import evaluation_batches, evaluation_settings
from mxd.evaluation import (
    ExpertRanks,
    ablation_curve,
    decomposition_ranks,
    faithfulness,
    load_evaluation,
    plot_ablation,
    plot_singular_values,
    save_evaluation,
)
from mxd.evaluation.plots import decomposition_title
from mxd.evaluation.tasks import find_tasks, score_tasks

from .decompositions import load_base_and_text, load_decomposition, made_how, read_text, results_folder
from .domain_use import measure_domain_use
from .options import EvaluationOptions
from .run_folder import write_run

_ABLATION_FIGURE, _RANKS_FIGURE = "ablation.png", "smallest_singular_values.png"


def evaluate(options: EvaluationOptions, progress: bool = True) -> dict[str, Any]:
    """Measure a saved decomposition on text and write evaluation.json into its folder.

    With `by`, compare instead which experts are active on which values of that column of the text; see
    `mxd.jobs.domain_use.measure_domain_use`.

    Returns:
        The content of evaluation.json, see `mxd.evaluation.faithfulness`; with `ablation`, `ranks` and `tasks` what
        `ablation_curve`, `expert_ranks` and `score_tasks` measured, under these names.

    Raises:
        ValueError: there is no such decomposition or task, or the text cannot be read.
        ImportError: `tasks` are named, and lm-evaluation-harness is not installed.
    """
    if options.by is not None:
        return measure_domain_use(options, progress)
    folder = results_folder(options.decomposition, options.output)
    made = made_how(options.decomposition)
    decomposition = load_decomposition(options.decomposition)
    methods = {decomposition.config.layer(layer).method for layer in decomposition.config.layers}
    if options.ranks and methods != {"mxd"}:
        raise ValueError("only an MxD's experts have a rank: leave --ranks out for a transcoder")
    manager = find_tasks(options.tasks) if options.tasks else None
    model, tokenizer, (documents, text, seed) = load_base_and_text(
        decomposition,
        options.dtype,
        options.context_length,
        lambda: read_text(options.text, options.decomposition, made, heldout=True),
    )
    for wanted, name in ((options.ablation, "--ablation"), (options.tasks, "--tasks")):
        if wanted:
            check_predictions(model, name)
    batches = evaluation_batches(documents, tokenizer, options.context_length, options.tokens)
    measured_on = evaluation_settings(text, options.dtype)
    measured_on["held_out"] = is_held_out(made, text, documents, seed)
    settings = {"evaluation": measured_on, **made}
    results = faithfulness(model, decomposition, batches, settings=settings, progress=progress)
    if folder is not None:
        save_evaluation(results, folder)  # already now: the rest may take longer than this did
        write_run(folder, "evaluate", options)
    if options.ablation is not None:
        results["ablation"] = ablation_curve(model, decomposition, batches, progress=progress)
    if options.tasks:
        how: dict[str, Any] = {"limit": options.task_limit, "batch_size": options.task_batch_size}
        results["tasks"] = score_tasks(model, decomposition, tokenizer, options.tasks, manager=manager, **how)
        results["settings"]["tasks"] = {"lm_eval": version("lm_eval"), **how}
    ranks = decomposition_ranks(decomposition, progress=progress) if options.ranks else {}
    if ranks:
        results["ranks"] = {str(layer): rank.summary() for layer, rank in ranks.items()}
    if folder is None:
        return results
    _plot(results, ranks, folder / "figures", decomposition_title(decomposition.config))
    save_evaluation(results, folder)
    return load_evaluation(folder)


def _plot(results: dict[str, Any], ranks: dict[int, ExpertRanks], figures: Path, title: str) -> None:
    """Plot what was measured, and delete the figures of an earlier evaluation."""
    for name in (_ABLATION_FIGURE, _RANKS_FIGURE):
        (figures / name).unlink(missing_ok=True)
    if "ablation" in results or ranks:
        figures.mkdir(exist_ok=True)
    if "ablation" in results:
        plot_ablation({"all layers": results["ablation"]}, figures / _ABLATION_FIGURE, title)
    if ranks:
        smallest = {f"layer {layer}": rank.smallest for layer, rank in ranks.items()}
        plot_singular_values(smallest, figures / _RANKS_FIGURE, title)

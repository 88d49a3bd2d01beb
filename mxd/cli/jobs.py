"""What each command does: run the job, show its results, and say what was saved. torch is imported only then."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from mxd.jobs.options import (
    STDOUT,
    DecompositionOptions,
    EvaluationOptions,
    ExpertsOptions,
    FinetuningOptions,
    FrontierOptions,
    LayersOptions,
    ProbingOptions,
    PushOptions,
    SearchOptions,
    ShowOptions,
)

from . import tables


def decompose(options: DecompositionOptions) -> None:
    """Replace MLPs of a language model by a decomposition, trained by distillation, and measure it.

    Without arguments: the small model and text that ship with mxd.
    """
    from mxd.jobs.decompose import decompose

    _quiet()
    saved = "weights, evaluation.json, run.yaml, training_log.json, figures/"
    _report(decompose(options), options.output, tables.print_evaluation, saved)
    typer.echo(f"Next:  mxd evaluate {options.output} --dataset <other text>")
    typer.echo(
        f'       mxd.MxDModel.from_pretrained("{options.output}")   # the README shows how to read and steer experts'
    )


def evaluate(options: EvaluationOptions) -> None:
    """Measure a decomposition on text, and write evaluation.json into its folder, in place of an earlier one.

    With `--by`: which experts are active on which kinds of text.
    """
    from mxd.jobs.evaluate import evaluate

    _quiet()
    results = evaluate(options, progress=options.output != STDOUT)
    show = tables.print_evaluation if options.by is None else tables.print_domain_use
    saved = "evaluation.json" if options.by is None else "domain_use.json, figures/experts_per_domain.png"
    _report(results, options.output or options.decomposition, show, saved)


def experts(options: ExpertsOptions) -> None:
    """Show where in a text experts are most active, on screen and as a page, experts.html."""
    from mxd.jobs.experts import read_experts

    _quiet()
    folder = options.output or options.decomposition
    _report(read_experts(options), folder, tables.print_experts, "experts.json, experts.html")


def probe(options: ProbingOptions) -> None:
    """Sparse probing: how well single experts, or a few, tell classes of texts apart, and the MLP's own neurons."""
    from mxd.jobs.probe import probe

    _quiet()
    results = probe(options, progress=options.output != STDOUT)
    _report(results, options.output, tables.print_probing, "probing.json, probing.png")


def frontier(options: FrontierOptions) -> None:
    """Compare methods at several K, at equal parameters and on the same tokens (the paper's Fig. 3).

    The same command continues an interrupted one.
    """
    from mxd.jobs.frontier import measure_frontier

    _quiet()
    results = measure_frontier(options)
    _report(results, options.output, tables.print_frontier, "frontier.json, frontier.png, run.yaml, points/")


def finetune(options: FinetuningOptions) -> None:
    """Train a decomposition further, end to end in its language model, and show what that changed."""
    from mxd.jobs.finetune import finetune

    _quiet()
    results = finetune(options)

    def show(results: dict[str, Any]) -> None:
        tables.print_change(results["settings"]["finetuning"][-1]["before"], results)

    saved = "weights, evaluation.json, run.yaml, training_log.json, figures/"
    _report(results, options.output, show, f"{saved}; {options.decomposition} is unchanged")


def push(options: PushOptions) -> None:
    """Share a decomposition on the Hub: weights, results, code and a card, in one commit."""
    from mxd.hub_cards import push_decomposition
    from mxd.hub_cards.reading import read_config
    from mxd.modeling_mxd.loading import is_causal

    asked = {name: value for name, value in vars(options).items() if name not in ("folder", "repo")}
    pushed = push_decomposition(options.folder, options.repo, **asked)
    typer.echo(f"Pushed to {pushed.pr_url or pushed.repo_url} (commit {pushed.oid[:8]})")
    where = pushed.pr_revision or options.revision
    at = f', revision="{where}"' if where else ""
    config = read_config(Path(options.folder) / "config.json", options.folder)
    door = "AutoModelForCausalLM" if is_causal(config.base_model_type) else "AutoModel"
    typer.echo(f'Next:  {door}.from_pretrained("{pushed.repo_url.repo_id}"{at}, trust_remote_code=True)')


def search(options: SearchOptions) -> None:
    """List decompositions that others share on the Hub."""
    from mxd.hub_cards import list_decompositions

    tables.print_found(list(list_decompositions(**vars(options))))


def show(options: ShowOptions) -> None:
    """Show configuration, results and size of a decomposition on the Hub; download no weights and run no code."""
    from mxd.hub_cards import show_decomposition

    tables.print_details(show_decomposition(options.repo, revision=options.revision))


def layers(options: LayersOptions) -> None:
    """Show where a model keeps its MLPs, which can be decomposed, and why others cannot; download no weights."""
    from mxd.jobs.layers import layer_groups, load_skeleton

    _quiet()
    model = load_skeleton(options.model, options.revision)
    tables.print_layers(type(model).__name__, layer_groups(model))


def _quiet() -> None:
    """Turn off progress bars and warnings of the libraries: the commands have their own."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _report(results: dict[str, Any], folder: str, show: Callable[[dict[str, Any]], None], saved: str) -> None:
    """Show results, and say what was saved; with `--output -` print them as JSON and nothing else."""
    if folder == STDOUT:
        from mxd.base.files import json_text

        typer.echo(json_text(results))
        return
    show(results)
    typer.echo(f"\nSaved in {folder}: {saved}")

"""What each command does: run its job, show the results, and say what was saved. torch is imported only then."""

import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import typer

from mxd.base.processes import launched, leave
from mxd.jobs import options as classes
from mxd.jobs import use_options

from . import tables

logger = logging.getLogger(__name__)

_TRAINED = "weights, evaluation.json, run.yaml, training_log.json, figures/"


class Command(NamedTuple):
    """A command; its help is the docstring of its options."""

    options: type
    job: str | Callable[[Any], None]
    """Name of a function in `mxd.jobs` that returns results, or a function that shows them itself."""
    show: Callable[[Any], None] = partial(tables.print_evaluation, warn=False)
    saved: str = ""
    says: str = "loading {decomposition} and its base model"
    """What happens in the seconds before anything else is shown: torch is imported, and models are loaded."""

    def run(self, options: Any) -> None:
        """Do the command. Several processes train together; anything else is done, and all is shown, by the first."""
        rank, processes = launched()
        if processes > 1 and not isinstance(options, classes.ResumableOptions):
            if rank > 0:
                return
            leave()
            logger.warning("this command takes one process: the other %d have ended", processes - 1)
        if rank == 0:
            typer.echo(f"{self.says.format(**vars(options))} …", err=True)
        if not isinstance(self.job, str):
            self.job(options)
            return
        _quiet(bars=rank == 0)
        module, _, name = self.job.partition(":")
        with _exit_on_sigterm() if isinstance(options, classes.RunOptions) else nullcontext():
            results = getattr(import_module(f"mxd.jobs.{module}"), name)(options)
        if rank > 0:
            return
        folder = options.output or options.decomposition
        if folder == classes.STDOUT:
            from mxd.base.files import json_text

            typer.echo(json_text(results))
            return
        by = isinstance(options, classes.EvaluationOptions) and options.by is not None
        (tables.print_domain_use if by else self.show)(results)
        typer.echo(f"\nSaved in {folder}: {'domain_use.json, figures/' if by else self.saved}")
        if isinstance(options, classes.DecompositionOptions):
            quoted = shlex.quote(folder)
            typer.echo(f"Next:  mxd evaluate {quoted} --dataset TEXT   # on another text")
            typer.echo(f"       mxd experts {quoted}   # what the experts are active on and do")


def push(options: classes.PushOptions) -> None:
    """Push, and show how to load what was pushed."""
    from mxd.hub_cards import push_decomposition
    from mxd.hub_cards.reading import read_config
    from mxd.modeling_mxd.loading import is_causal

    asked = {name: value for name, value in vars(options).items() if name not in ("folder", "repo")}
    pushed = push_decomposition(options.folder, options.repo, **asked)
    typer.echo(f"Pushed to {pushed.pr_url or pushed.repo_url} (commit {pushed.oid[:8]})")
    where = pushed.pr_revision or options.revision
    at = f', revision="{where}"' if where else ""
    config = read_config(Path(options.folder) / "config.json", options.folder)
    auto = "AutoModelForCausalLM" if is_causal(config.base_model_type) else "AutoModel"
    load = f'{auto}.from_pretrained("{pushed.repo_url.repo_id}"{at}, trust_remote_code=True)'
    typer.echo(f"Next:  from transformers import {auto}; model = {load}")


def search(options: classes.SearchOptions) -> None:
    """Show decompositions on the Hub."""
    from mxd.hub_cards import list_decompositions

    tables.print_found(list(list_decompositions(**vars(options))))


def show(options: classes.ShowOptions) -> None:
    """Show a decomposition on the Hub."""
    from mxd.hub_cards import show_decomposition

    tables.print_details(show_decomposition(options.repo, revision=options.revision))


def layers(options: classes.LayersOptions) -> None:
    """Show where a model keeps its MLPs."""
    from mxd.jobs.layers import layer_groups, load_skeleton

    _quiet()
    model = load_skeleton(options.model, options.revision)
    tables.print_layers(type(model).__name__, layer_groups(model))


def plan(options: classes.PlanOptions) -> None:
    """Show what a decomposition takes."""
    from mxd.base.files import json_text
    from mxd.jobs.plan import plan as planned

    from .plan_tables import print_plan

    _quiet()
    made = planned(options)
    if options.output == classes.STDOUT:
        typer.echo(json_text(made))
    else:
        print_plan(made)


def explore(options: use_options.ExploreOptions) -> None:
    """Serve or export a page on experts."""
    from mxd.jobs.explore import explore

    _quiet()
    made = explore(options)
    if isinstance(made, str):
        typer.echo(f"Exported to {made}")
        return
    typer.echo(f"Open {made.url} in a browser. Ctrl-C ends it.")
    with made, suppress(KeyboardInterrupt):
        made.serve_forever()


def steer(options: use_options.SteeringOptions) -> None:
    """Show the untouched and the steered text."""
    from mxd.jobs.steer import steer as continued

    _quiet()
    tables.print_steered(continued(options))
    if options.save is not None:
        typer.echo(f"Saved in {options.save}; in Python: model.steer({options.save!r})")


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Exit with `TERMINATED` when a cluster ends the run; a training saves a checkpoint first."""
    if threading.current_thread() is not threading.main_thread():  # others have no signals
        yield
        return
    before, report = signal.signal(signal.SIGTERM, lambda *_: sys.exit(classes.TERMINATED)), sys.unraisablehook
    again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))

    def ignored(error: Any) -> None:
        """Send the signal once more if it came inside a destructor, where Python ignores exceptions."""
        if error.exc_type is SystemExit and again.ident is None:
            again.start()
        else:
            report(error)

    sys.unraisablehook = ignored
    try:
        yield
    finally:
        again.cancel()
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = report


def _quiet(bars: bool = True) -> None:
    """Turn off warnings of transformers: the commands have their own. Without `bars`, turn off progress bars too."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not bars:
        import datasets
        import huggingface_hub.utils

        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()


_MODEL = "loading {model}"
_CONFIG = "reading the config of {model}"
COMMANDS = {
    "decompose": Command(classes.DecompositionOptions, "decompose:decompose", saved=_TRAINED, says=_MODEL),
    "evaluate": Command(classes.EvaluationOptions, "evaluate:evaluate", saved="evaluation.json"),
    "experts": Command(
        classes.ExpertsOptions, "experts:read_experts", tables.print_experts, "experts.safetensors, experts.html"
    ),
    "steer": Command(use_options.SteeringOptions, steer),
    "inspect": Command(
        use_options.InspectOptions, "inspect_text:inspect_text", tables.print_inspection, "inspect.html"
    ),
    "probe": Command(
        classes.ProbingOptions, "probe:probe", tables.print_probing, "probing.json, probing.png",
        "loading the decompositions and their base model",
    ),
    "frontier": Command(
        classes.FrontierOptions, "frontier:measure_frontier", tables.print_frontier, "frontier.json, points/", _MODEL
    ),
    "finetune": Command(
        classes.FinetuningOptions,
        "finetune:finetune",
        lambda results: tables.print_evaluation(results, results["settings"]["finetuning"][-1]["before"], warn=False),
        _TRAINED,
    ),
    "explore": Command(use_options.ExploreOptions, explore, says="reading what {decomposition} has of its experts"),
    "push": Command(classes.PushOptions, push, says="checking {folder}, then uploading it"),
    "search": Command(classes.SearchOptions, search, says="asking the Hub"),
    "show": Command(classes.ShowOptions, show, says="reading {repo}"),
    "layers": Command(classes.LayersOptions, layers, says=_CONFIG),
    "plan": Command(classes.PlanOptions, plan, says=_CONFIG),
}  # fmt: skip

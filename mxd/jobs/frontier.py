"""`mxd frontier`: cross-entropy of each method at each K, at equal parameters and tokens (the paper's Fig. 3).

The base model runs once, and its activations are cached. Every point, a method at a K, trains on the cache and is
measured on the same held-out rows, one point after another. Finished points are kept, so the same command continues an
interrupted run. docs/how-to/compare.md describes the output folder.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mxd.base.activation_cache import rows_digest
from mxd.base.base_model import base_skeleton, check_safetensors, load_base_model, resolve_name
from mxd.base.files import write_json
from mxd.base.processes import check_one_process
from mxd.base.progress import progress_bar
from mxd.data.packing import materialize, pack
from mxd.data.texts import evaluation_batches, load_documents, warn_of_embedded_text
from mxd.evaluation import UntouchedLosses, faithfulness, plot_frontier, save_evaluation
from mxd.evaluation.plots import model_title
from mxd.modeling_mxd import MxDConfig, MxDModel
from mxd.modeling_mxd.loading import first_line
from mxd.trainers import DistillationArguments, DistillationTrainer

from .decompose import build_config, run_settings
from .decompositions import load_decomposition, made_how
from .options import INTERRUPTED, LEARNING_RATES, DecompositionOptions, FrontierOptions, values
from .run_folder import RUN_NAME, Interrupted, TrainingFailed, flat, output_folder, visible_entries, write_run
from .training import asked_for, cached_rows, make_arguments, rows_per_step, run_training, save_results, versions

logger = logging.getLogger(__name__)

FRONTIER_NAME, FIGURE_NAME, POINTS, RECORDING = "frontier.json", "frontier.png", "points", "recording"
# Options on which no result depends, or that `common` in `measure_frontier` records more exactly.
_NOT_SETTINGS = ("model", "revision", "dataset", "dataset_config", "split", "text_column", "chat", "streaming",
                 "tokens", "cache", "heldout_dataset", "heldout_split", "evaluation_tokens", "report_to", "output",
                 "overwrite", "resume")  # fmt: skip


class _Shared(NamedTuple):
    """The base model, the recording, and the held-out text with the base model's losses on it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    commit: str | None
    cached: dict[str, Any]  # rows to train on, and their activations
    heldout: list[dict[str, Tensor]]
    untouched: UntouchedLosses
    progress: bool


class _Point:
    """A method at a K: its options, its files, and all settings on which its results depend."""

    def __init__(self, options: DecompositionOptions, common: Mapping[str, Any]):
        self.options, self.folder, self.path = options, Path(options.output), Path(f"{options.output}.json")
        asked = values(options, lambda one: one.name not in _NOT_SETTINGS)
        self.settings = json.loads(json.dumps({**common, "mxd": version("mxd"), **asked}))

    def found(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return settings and results in the file of the point; None if it was not measured."""
        if not self.path.is_file():
            return {}, None
        content = json.loads(self.path.read_text(encoding="utf-8"))
        return content["settings"], content["row"]

    def write(self, row: dict[str, Any] | None) -> None:
        write_json(self.path, {"settings": self.settings, "row": row})

    def finished(self) -> bool:
        settings, row = self.found()
        return row is not None and settings == self.settings

    def trained(self) -> bool:
        """Return whether only its measurement, on these held-out rows, is missing."""
        same = {**self.found()[0], "heldout": None} == {**self.settings, "heldout": None}
        return same and any(self.folder.glob("*.safetensors"))

    def check_kept(self) -> None:
        """Refuse to replace a finished point that was trained with other settings."""
        found, row = self.found()
        if row is None or self.trained():
            return
        before, now = flat(found), flat(self.settings)
        name = next(name for name in {**now, **before} if before.get(name) != now.get(name))
        what = "another text" if name == "text" else f"{name} {before.get(name)!r}, not {now.get(name)!r}"
        raise ValueError(f"{self.path.name} is finished, with {what}: --overwrite makes it anew")


def measure_frontier(options: FrontierOptions, progress: bool = True) -> dict[str, Any]:
    """Train and measure every method at every K; finished points of the output folder are not repeated.

    Returns:
        The content of frontier.json: {"untouched", "zero_ablated": cross-entropies in nats per token, "points": a list
        of {"name", "method", "num_experts_per_tok", "num_experts", "parameters", "learning_rate", "seconds", and what
        `faithfulness` returns}, "settings"}.

    Raises:
        ValueError: bad input of any kind, before anything expensive runs; or points failed, the others are finished.
        Interrupted: Ctrl-C; finished points are kept, the one in progress is lost.
    """
    check_one_process()
    root = _check_root(options)
    asked = [point_options(options, method, k) for method in options.methods for k in options.num_experts_per_tok]
    base = (options.model, options.revision, options.dtype)
    skeleton = base_skeleton(*base, options.context_length)
    for each in asked:  # refuse bad arguments before text or weights are fetched
        make_arguments(DistillationArguments, each, Path(each.output))
        build_config(skeleton, None, each)
    model, tokenizer, commit = load_base_model(*base, context_length=options.context_length)
    check_safetensors(options.model, commit)
    rows, heldout = _texts(options, tokenizer)
    common = {
        "base_model": resolve_name(options.model),
        "base_model_revision": commit,
        "text": rows_digest(rows),
        "recorded_tokens": rows.numel(),
        "heldout": rows_digest(torch.cat([batch["input_ids"] for batch in heldout])),
    }
    config = build_config(model, commit, asked[0])
    points = [_Point(each, common) for each in asked]
    if missing := [point for point in points if not point.finished()]:
        for point in missing if not options.overwrite else ():
            point.check_kept()
        write_run(root, "frontier", options)
        cached = cached_rows(Path(options.cache or root / RECORDING), model, config, rows, options, progress)
        untouched = UntouchedLosses(model, heldout, ablated=config, progress=progress)
        shared = _Shared(model, tokenizer, commit, cached, heldout, untouched, progress)
        _run(missing, len(points), shared, lambda: _write(options, common, config.layers))
    return _write(options, common, config.layers)


def point_options(options: FrontierOptions, method: str, k: int) -> DecompositionOptions:
    """Return the options of the decomposition of one point."""
    shared = FrontierOptions.__dataclass_fields__.keys() & DecompositionOptions.__dataclass_fields__.keys()
    changed = {
        "method": method,
        "num_experts_per_tok": k,
        "learning_rate": options.learning_rates.get(method, LEARNING_RATES[method]),
        "training": {
            "max_steps": -1,
            "num_train_epochs": options.num_train_epochs,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            **options.training,
        },
        "output": str(Path(options.output) / POINTS / f"{method.replace('_', '-')}-k{k}"),
    }
    return DecompositionOptions(**values(options, lambda one: one.name in shared) | changed)


def _check_root(options: FrontierOptions) -> Path:
    root = output_folder(options.output)
    ours = {FRONTIER_NAME, FIGURE_NAME, RUN_NAME, RECORDING, POINTS}
    names = [path.name for path in visible_entries(root)] if root.is_dir() else []
    if others := [name for name in names if name not in ours and not name.endswith(".tmp")]:
        raise ValueError(f"the output folder {root} holds {others[0]!r}, which is of no frontier: name another")
    return root


def _texts(options: FrontierOptions, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return training rows, (rows, tokens), and held-out batches."""
    warn_of_embedded_text(options.text, options.model)
    documents, heldout_documents = load_documents(options.text, options.seed)
    context = options.context_length
    heldout = evaluation_batches(heldout_documents, tokenizer, context, options.evaluation_tokens)
    rows = materialize(pack(documents, tokenizer, context, seed=options.seed), options.tokens)
    return rows[:]["input_ids"], heldout


def _run(points: list[_Point], total: int, shared: _Shared, write: Callable[[], Any]) -> None:
    """Run points one after another; one that fails does not stop the others. `write` follows each."""
    done, failures = total - len(points), []
    for point in progress_bar(points, desc="frontier", unit="point", show=shared.progress):
        try:
            _run_point(point, shared)
        except (KeyboardInterrupt, Interrupted) as ended:
            kept = f"{done} of {total} points finished, which are kept"
            code = getattr(ended, "exit_code", INTERRUPTED)
            raise Interrupted(f"interrupted with {kept}: run the same command to go on", code) from None
        except Exception as failure:
            # A point is not resumed: its cause only.
            error = (isinstance(failure, TrainingFailed) and failure.__cause__) or failure
            logger.debug("%s failed", point.folder, exc_info=True)
            failures.append(f"{point.folder.name} ({type(error).__name__}: {first_line(error)})")
        else:
            done += 1
            write()
    if failures:
        raise ValueError(f"{len(failures)} of {len(points)} points failed, the others are kept: {'; '.join(failures)}")


def _run_point(point: _Point, shared: _Shared) -> None:
    """Train a point, unless it is trained, measure it, and write its results last."""
    set_seed(point.options.seed)
    if point.trained():
        decomposition, made = load_decomposition(str(point.folder)), made_how(str(point.folder))
    else:
        decomposition, made = _train(point, shared)
    results = faithfulness(
        shared.model, decomposition, shared.heldout, settings=made, untouched=shared.untouched, progress=shared.progress
    )
    results = save_results(results, decomposition, point.folder)
    point.write(_row(point, decomposition.config, results))


def _train(point: _Point, shared: _Shared) -> tuple[MxDModel, dict[str, Any]]:
    point.path.unlink(missing_ok=True)
    if point.folder.is_dir():
        shutil.rmtree(point.folder)
    decomposition = MxDModel(build_config(shared.model, shared.commit, point.options))
    arguments = make_arguments(DistillationArguments, point.options, point.folder, disable_tqdm=not shared.progress)
    trainer = DistillationTrainer(decomposition, shared.model, arguments, **shared.cached)
    how = run_training(trainer, shared.tokenizer, point.options, None)
    made = {"training": run_settings(point.options, trainer, how)}
    made["training"]["tokens_trained"] = int(point.settings["recorded_tokens"] * arguments.num_train_epochs)
    save_evaluation({"settings": made}, point.folder)
    point.write(None)  # training is not repeated if measuring fails
    return decomposition, made


def _row(point: _Point, config: MxDConfig, results: Mapping[str, Any]) -> dict[str, Any]:
    made = results["settings"]["training"]
    return {
        "name": point.folder.name,
        "method": point.options.method,
        "num_experts_per_tok": point.options.num_experts_per_tok,
        "num_experts": {str(layer): config.layer(layer).num_experts for layer in config.layers},
        "parameters": config.num_parameters,
        **{name: made[name] for name in ("learning_rate", "tokens_trained", "seconds")},
        **{name: results[name] for name in ("cross_entropy", "kl", "top1_agreement", "layers", "always_on")},
        "evaluated_tokens": results["settings"]["tokens"],
    }


def _write(options: FrontierOptions, common: Mapping[str, Any], layers: list[int]) -> dict[str, Any]:
    """Write frontier.json and frontier.png of all finished points whose other settings are those of the options."""
    root, rows, methods = Path(options.output), [], list(LEARNING_RATES)
    for path in sorted((root / POINTS).glob("*.json")):
        method, _, k = path.stem.rpartition("-k")
        point = _Point(point_options(options, method.replace("-", "_"), int(k)), common)
        if point.finished():
            rows.append(cast(dict[str, Any], point.found()[1]))
    rows.sort(key=lambda row: (methods.index(row["method"]), row["num_experts_per_tok"]))
    loss = rows[0]["cross_entropy"] if rows else {}
    results = {
        "untouched": loss.get("untouched"),
        "zero_ablated": loss.get("zero_ablated"),
        "points": rows,
        "settings": {
            **asked_for(options),
            "layers": layers,
            "revision": common["base_model_revision"],
            "batch_tokens": rows_per_step(options) * options.context_length,
            "tokens_recorded": common["recorded_tokens"],
            "versions": versions(),
        },
    }
    write_json(root / FRONTIER_NAME, results)
    if rows:
        plot_frontier(results, root / FIGURE_NAME, model_title(options.model, layers))
    return results

"""`mxd frontier`: cross-entropy of each method at each K, at equal parameters and tokens (the paper's Fig. 3).

The base model runs once and is recorded. Every point, a method at a K, trains on the recording and is measured on the
same held-out rows, one point after another. Finished points are kept, so the same command continues an interrupted
run. The output folder:

    frontier.json, frontier.png    results of the finished points
    points/mxd-k16.json            settings and results of a point
    points/mxd-k16/                its decomposition, as `mxd decompose` writes one
    recording/                     shared by all points; not needed once they are finished
"""

import json
import logging
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mxd.base.activation_cache import ActivationCache, rows_digest
from mxd.base.base_model import base_skeleton, check_safetensors, default_device, load_base_model, resolve_name
from mxd.base.files import write_json
from mxd.data.packing import materialize, pack
from mxd.data.texts import evaluation_batches, load_documents, warn_of_embedded_text
from mxd.evaluation import UntouchedLosses, faithfulness, plot_frontier, save_evaluation
from mxd.modeling_mxd import MxDConfig, MxDModel
from mxd.modeling_mxd.loading import first_line
from mxd.trainers import DistillationArguments, DistillationTrainer

from .decompose import build_config, run_settings
from .decompositions import load_decomposition, made_how
from .options import LEARNING_RATES, DecompositionOptions, FrontierOptions, values
from .run_folder import RUN_NAME, Interrupted, flat, output_folder, visible_entries, write_run
from .training import asked_for, rows_per_step, run_training, save_results, step_arguments, versions, warn_of_whole_rows

logger = logging.getLogger(__name__)

FRONTIER_NAME, FIGURE_NAME, POINTS, RECORDING = "frontier.json", "frontier.png", "points", "recording"
# Options on which no result depends, or that `common` in `measure_frontier` records more exactly.
_NOT_SETTINGS = ("model", "revision", "dataset", "dataset_config", "split", "text_column", "streaming", "tokens",
                 "heldout_dataset", "heldout_split", "evaluation_tokens", "report_to", "output", "overwrite",
                 "resume")  # fmt: skip


class FrontierError(ValueError):
    """Points failed; the message says which, and why."""


class _Shared(NamedTuple):
    """What all points use: the base model, the recording, and the held-out text with the base model's losses on it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    commit: str | None
    recording: Path
    heldout: list[dict[str, Tensor]]
    untouched: UntouchedLosses
    progress: bool


def measure_frontier(options: FrontierOptions, progress: bool = True) -> dict[str, Any]:
    """Train and measure every method at every K; finished points of the output folder are not repeated.

    Returns:
        The content of frontier.json: {"untouched", "zero_ablated": cross-entropies in nats per token, "points": a list
        of {"name", "method", "num_experts_per_tok", "num_experts", "parameters", "learning_rate", "seconds", and what
        `faithfulness` returns}, "settings"}.

    Raises:
        ValueError: bad input of any kind, before anything expensive runs.
        FrontierError: points failed; the others are finished.
        Interrupted: Ctrl-C; finished points are kept, the one in progress is lost.
    """
    root = _check_root(options)
    warn_of_whole_rows(options)
    points = [point_options(options, method, k) for method in options.methods for k in options.num_experts_per_tok]
    base = (options.model, options.revision, options.dtype)
    skeleton = base_skeleton(*base, options.context_length)
    for point in points:  # refuse bad arguments before text or weights are fetched
        DistillationArguments(**step_arguments(point, Path(point.output)))
        build_config(skeleton, None, point)
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
    config = build_config(model, commit, points[0])
    if missing := [point for point in points if _finished(point, common) is None]:
        if not options.overwrite:
            _check_kept(missing, common)
        write_run(root, "frontier", options)
        ActivationCache.record(
            root / RECORDING, model.to(default_device()), config.layers, rows, rows_per_step=rows_per_step(options),
            overwrite=options.overwrite, progress=progress, **config.where,
        )  # fmt: skip
        untouched = UntouchedLosses(model, heldout, ablated=config, progress=progress)
        shared = _Shared(model, tokenizer, commit, root / RECORDING, heldout, untouched, progress)
        _run(options, missing, len(points), shared, common, config)
    return _write(options, common, config)


def point_options(options: FrontierOptions, method: str, k: int) -> DecompositionOptions:
    """Return the options of the decomposition of one point."""
    shared = FrontierOptions.__dataclass_fields__.keys() & DecompositionOptions.__dataclass_fields__.keys()
    changed = {
        "method": method,
        "num_experts_per_tok": k,
        "learning_rate": options.learning_rates.get(method, LEARNING_RATES.get(method)),
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


def _settings(point: DecompositionOptions, common: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that the results of a point depend on, as JSON values; `common` is that of all points."""
    asked = values(point, lambda one: one.name not in _NOT_SETTINGS)
    return dict(json.loads(json.dumps({**common, "mxd": version("mxd"), **asked})))


def _results_file(point: DecompositionOptions) -> Path:
    return Path(f"{point.output}.json")


def _read(path: Path) -> dict[str, Any]:
    """Return {"settings", "row"} of a point; the row is None if the point is not finished."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {"settings": {}, "row": None}


def _finished(point: DecompositionOptions, common: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the row of a point; None if it is not finished, or was made with other settings."""
    found = _read(_results_file(point))
    return found["row"] if found["settings"] == _settings(point, common) else None


def _trained(point: DecompositionOptions, common: Mapping[str, Any]) -> bool:
    """Return whether the decomposition exists, so that only its measurement, on these held-out rows, is missing."""
    before, now = _read(_results_file(point))["settings"], _settings(point, common)
    return {**before, "heldout": None} == {**now, "heldout": None} and any(Path(point.output).glob("*.safetensors"))


def _check_kept(points: list[DecompositionOptions], common: Mapping[str, Any]) -> None:
    """Refuse to replace a finished point that was trained with other settings."""
    for point in points:
        found, settings = _read(_results_file(point)), flat(_settings(point, common))
        if found["row"] is None or _trained(point, common):
            continue
        before = flat(found["settings"])
        name = next(name for name in {**settings, **before} if before.get(name) != settings.get(name))
        what = "another text" if name == "text" else f"{name} {before.get(name)!r}, not {settings.get(name)!r}"
        raise ValueError(f"{_results_file(point).name} is finished, with {what}: --overwrite makes it anew")


def _check_root(options: FrontierOptions) -> Path:
    root = output_folder(options.output)
    ours = {FRONTIER_NAME, FIGURE_NAME, RUN_NAME, RECORDING, POINTS}
    names = sorted(path.name for path in visible_entries(root)) if root.is_dir() else []
    if others := [name for name in names if name not in ours and not name.endswith(".tmp")]:
        raise ValueError(f"the output folder {root} holds {others[0]!r}, which is of no frontier: name another")
    return root


def _texts(options: FrontierOptions, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return training rows, (rows, tokens), and held-out batches."""
    warn_of_embedded_text(options.text, options.model)
    documents, heldout_documents = load_documents(options.text, options.seed)
    context = options.context_length
    rows = materialize(pack(documents, tokenizer, context, seed=options.seed), options.tokens)
    return rows[:]["input_ids"], evaluation_batches(heldout_documents, tokenizer, context, options.evaluation_tokens)


def _run(
    options: FrontierOptions, points: list[DecompositionOptions], total: int, shared: _Shared,
    common: Mapping[str, Any], config: MxDConfig,
) -> None:  # fmt: skip
    """Run points one after another; one that fails does not stop the others."""
    done, failures = total - len(points), []
    try:
        for point in tqdm(points, desc="frontier", unit="point", disable=not shared.progress, dynamic_ncols=True):
            try:
                _run_point(point, shared, common)
            except Exception as error:
                if isinstance(error, Interrupted):
                    raise
                logger.debug("%s failed", point.output, exc_info=True)
                failures.append(f"{Path(point.output).name} ({type(error).__name__}: {first_line(error)})")
                continue
            done += 1
            _write(options, common, config)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(
            f"interrupted with {done} of {total} points finished, which are kept: run the same command to go on"
        ) from None
    if failures:
        raise FrontierError(
            f"{len(failures)} of {len(points)} points failed, the others are kept: {'; '.join(failures)}; run the same "
            "command to go on"
        )


def _run_point(point: DecompositionOptions, shared: _Shared, common: Mapping[str, Any]) -> None:
    """Train a point, unless it is trained, measure it, and write its results last."""
    set_seed(point.seed)
    folder, settings, path = Path(point.output), _settings(point, common), _results_file(point)
    if _trained(point, common):
        decomposition, made = load_decomposition(point.output), made_how(point.output)
    else:
        path.unlink(missing_ok=True)
        if folder.is_dir():
            shutil.rmtree(folder)
        decomposition = MxDModel(build_config(shared.model, shared.commit, point))
        arguments = DistillationArguments(**{**step_arguments(point, folder), "disable_tqdm": not shared.progress})
        cache = ActivationCache(shared.recording)
        trainer = DistillationTrainer(decomposition, shared.model, arguments, activations=cache)
        made = {"training": run_settings(point, trainer, run_training(trainer, shared.tokenizer, point, None))}
        made["training"]["tokens_trained"] = int(common["recorded_tokens"] * arguments.num_train_epochs)
        save_evaluation({"settings": made}, folder)
        write_json(path, {"settings": settings, "row": None})  # training is not repeated if measuring fails
    results = faithfulness(
        shared.model, decomposition, shared.heldout, settings=made, untouched=shared.untouched, progress=shared.progress
    )
    results = save_results(results, decomposition, folder)
    write_json(path, {"settings": settings, "row": _row(point, decomposition.config, results)})


def _row(point: DecompositionOptions, config: MxDConfig, results: Mapping[str, Any]) -> dict[str, Any]:
    made = results["settings"]["training"]
    return {
        "name": Path(point.output).name,
        "method": point.method,
        "num_experts_per_tok": point.num_experts_per_tok,
        "num_experts": {str(layer): config.layer(layer).num_experts for layer in config.layers},
        "parameters": config.num_parameters,
        **{name: made[name] for name in ("learning_rate", "tokens_trained", "seconds")},
        **{name: results[name] for name in ("cross_entropy", "kl", "top1_agreement", "layers", "always_on")},
        "evaluated_tokens": results["settings"]["tokens"],
    }


def _write(options: FrontierOptions, common: Mapping[str, Any], config: MxDConfig) -> dict[str, Any]:
    """Write frontier.json and frontier.png of all finished points whose other settings are those of the options."""
    root, rows, methods = Path(options.output), [], list(LEARNING_RATES)
    for path in sorted((root / POINTS).glob("*.json")):
        found = _read(path)
        method, k = found["settings"].get("method"), found["settings"].get("num_experts_per_tok")
        if found["row"] is None or method not in methods:
            continue
        if found["settings"] == _settings(point_options(options, method, k), common):
            rows.append(found["row"])
        else:
            logger.warning("%s is left out: it was made with other settings", path.name)
    rows.sort(key=lambda row: (methods.index(row["method"]), row["num_experts_per_tok"]))
    loss = rows[0]["cross_entropy"] if rows else {}
    results = {
        "untouched": loss.get("untouched"),
        "zero_ablated": loss.get("zero_ablated"),
        "points": rows,
        "settings": {
            **asked_for(options),
            "layers": config.layers,
            "revision": common["base_model_revision"],
            "batch_tokens": rows_per_step(options) * options.context_length,
            "tokens_recorded": common["recorded_tokens"],
            "versions": versions(),
        },
    }
    write_json(root / FRONTIER_NAME, results)
    if rows:
        plot_frontier(results, root / FIGURE_NAME)
    return results

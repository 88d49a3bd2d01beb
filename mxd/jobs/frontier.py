"""The sparsity–accuracy frontier (paper, Fig. 3): what each method costs a model at each K, at equal parameters and on
the same tokens in the same order.

The teacher runs once and is recorded. Every point, a method at a K, trains on the recording in a process of its own
(`mxd.frontier_point`) and is measured on the same held-out rows. The output folder:

    frontier.json, frontier.png    the result, of the points that are finished
    points/mxd-k16.json            a finished point: its settings and results
    points/mxd-k16/                its decomposition, as `mxd decompose` leaves one
    points/mxd-k16.log             what its process said
    recording/, heldout/           for all points; not needed any more once they are finished
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from mxd import demo
from mxd.base.activation_cache import (
    ActivationCache,
    check_free_space,
    model_identity,
    recording_bytes,
    rows_digest,
)
from mxd.base.base_model import (
    DTYPES,
    BaseModelError,
    base_skeleton,
    check_safetensors,
    default_device,
    load_base_model,
)
from mxd.base.files import replace_text
from mxd.data.packing import materialize, pack
from mxd.data.texts import evaluation_batches, load_documents, warn_of_embedded_text
from mxd.evaluation import UntouchedLosses, plot_frontier
from mxd.modeling_mxd import MxDConfig
from mxd.trainers import DistillationArguments

from .decompositions import output_folder
from .frontier_point import (
    HELDOUT,
    POINTS,
    RECORDING,
    UNTOUCHED_NAME,
    Point,
    heldout_batches,
    point_name,
    save_heldout,
)
from .frontier_processes import run_points
from .pipeline import LEARNING_RATES, DecompositionOptions, build_config
from .runs import RunOptions, rows_per_step, step_arguments, versions, visible_entries, warn_of_whole_rows

logger = logging.getLogger(__name__)

FRONTIER_NAME, FIGURE_NAME = "frontier.json", "frontier.png"
_ABOUT = "about.json"
# A point of an earlier version, whose defaults were others, is another point.
_STOCK = {argument.name for argument in fields(TrainingArguments)}
_OWN = [argument for argument in fields(DistillationArguments) if argument.name not in _STOCK]
_DEFAULTS = {argument.name: argument.default for argument in _OWN}


@dataclass(kw_only=True)
class FrontierOptions(RunOptions):
    """What `measure_frontier` is asked for, beside what `RunOptions` has.

    Of those, `tokens` are recorded once, `output` keeps what is finished (`resume` has no meaning), `overwrite`
    replaces a recording of another model, text or layer, and `training` goes to every method.

    Attributes:
        model, revision, layers, stack, site, match_transcoder, intermediate_size: see `DecompositionOptions`. Several
            layers are decomposed together, as by `decompose`.
        methods: some of `"mxd"`, `"transcoder"`, `"skip_transcoder"`.
        num_experts_per_tok: every K.
        num_train_epochs: passes over the recorded tokens.
        learning_rates: of a method, where it is not its default in `LEARNING_RATES`.
        teacher_dtype: in which the base model is recorded; None for `dtype`, in which all is measured.
        jobs: points at work at a time. Of several, each has its share of the cores.
        save: keep every point's decomposition.
    """

    model: str = demo.MODEL_NAME
    revision: str | None = None
    layers: list[int] | None = None
    stack: str | None = None
    site: str = "mlp"
    methods: list[str] = field(default_factory=lambda: list(LEARNING_RATES))
    num_experts_per_tok: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 256])
    match_transcoder: int = 32
    intermediate_size: int | None = None
    num_train_epochs: int = 1
    learning_rates: dict[str, float] = field(default_factory=dict)
    teacher_dtype: str | None = None
    jobs: int = 1
    save: bool = True
    output: str = "mxd-frontier"

    def __post_init__(self) -> None:
        for name, known in (("methods", list(LEARNING_RATES)), ("num_experts_per_tok", None)):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must name at least one, and none twice; got {values}")
            if known and (unknown := [value for value in values if value not in known]):
                raise ValueError(f"{name} must be among {', '.join(known)}, got {unknown[0]!r}")
        if unknown := [method for method in self.learning_rates if method not in LEARNING_RATES]:
            raise ValueError(f"learning_rates is by method ({', '.join(LEARNING_RATES)}), got {unknown[0]!r}")
        for name in ("num_train_epochs", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.teacher_dtype is not None and self.teacher_dtype not in DTYPES:
            raise BaseModelError(f"teacher_dtype must be one of {', '.join(DTYPES)}, got {self.teacher_dtype!r}")


def measure_frontier(options: FrontierOptions, progress: bool = True) -> dict[str, Any]:
    """Train and measure every method at every K; what is finished in the output folder is not done again.

    Returns:
        What frontier.json holds: {"untouched", "zero_ablated": cross-entropies in nats per token, "points": a list of
        {"name", "method", "num_experts_per_tok", "num_experts", "parameters", "learning_rate", "seconds", and what
        `faithfulness` gives}, "settings"}.

    Raises:
        ValueError: bad input of any kind, or a disk that is too full, before anything expensive.
        FrontierError: points failed; the others are finished.
        Interrupted: Ctrl-C; points that are finished are kept, those at work are lost.
    """
    root = _check_root(options)
    warn_of_whole_rows(options)
    base = (options.model, options.revision, options.dtype)
    context = options.text.context_length
    skeleton = base_skeleton(*base, context)
    asked = [
        _decomposition_options(options, root, None, method, k)
        for method in options.methods
        for k in options.num_experts_per_tok
    ]
    for chosen in asked:  # refuses bad arguments before text or weights are fetched
        DistillationArguments(**step_arguments(chosen, Path(chosen.output)))
        build_config(skeleton, None, chosen)
    model, tokenizer, commit = load_base_model(*base, context_length=context)
    check_safetensors(options.model, commit)
    asked = [replace(chosen, revision=commit or options.revision) for chosen in asked]
    training, heldout = _texts(options, tokenizer)
    common = {
        "weights": model_identity(model),
        "text": rows_digest(training),
        "tokens": training.numel(),
        "heldout": rows_digest(heldout),
        "teacher_dtype": options.teacher_dtype or options.dtype,
    }
    points = [_point(root, chosen, build_config(model, commit, chosen), common) for chosen in asked]
    earlier = _earlier(options, root, model, commit, common)
    there = {point.name for point in points if point.finished() is not None}
    if missing := [point for point in points if point.name not in there]:
        if not options.overwrite:
            for point in missing:
                point.check_kept()
        if untrained := [point for point in missing if not point.trained()]:
            _check_space(options, root, untrained, training)
            _record(options, root, model, commit, untrained[0].config, training, progress)
        _measure_untouched(root, model, missing[0].config, heldout, progress)
        del model  # the processes load their own
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        after_each = partial(_write, options, root, points + earlier)
        how: dict[str, Any] = {"jobs": options.jobs, "save": options.save, "progress": progress}
        finished = [point for point in points if point.name in there]
        run_points(missing, finished, after_each=after_each, **how)
    return _write(options, root, points + earlier)


def _earlier(
    options: FrontierOptions, root: Path, model: PreTrainedModel, commit: str | None, common: Mapping[str, Any]
) -> list[Point]:
    """Points of other methods and K that are finished in this folder, and differ from what is asked for in nothing
    else: the frontier shows them too."""
    points = []
    for path in sorted((root / POINTS).glob("*.json")):
        name, _, k = path.stem.rpartition("-k")
        method = name.replace("-", "_")
        asked = method in options.methods and k.isdecimal() and int(k) in options.num_experts_per_tok
        if asked or method not in LEARNING_RATES or not k.isdecimal():
            continue
        chosen = _decomposition_options(options, root, commit, method, int(k))
        try:
            point = _point(root, chosen, build_config(model, commit, chosen), common)
        except ValueError:  # of other sizes, which have so many experts
            continue
        if point.finished() is not None:
            points.append(point)
        else:
            logger.warning("%s is left out: it was made with other settings", path.name)
    return points


def _check_root(options: FrontierOptions) -> Path:
    root = output_folder(options.output)
    ours = {FRONTIER_NAME, FIGURE_NAME, RECORDING, HELDOUT, POINTS}
    names = sorted(path.name for path in visible_entries(root)) if root.is_dir() else []
    if others := [name for name in names if name not in ours and not name.startswith(f"{FRONTIER_NAME}.")]:
        raise ValueError(f"the output folder {root} holds {others[0]!r}, which is of no frontier: name another")
    return root


def _texts(options: FrontierOptions, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Training and held-out rows, both (rows, tokens)."""
    warn_of_embedded_text(options.text, options.model)
    documents, heldout_documents = load_documents(options.text, options.seed)
    context = options.text.context_length
    rows = materialize(pack(documents, tokenizer, context, seed=options.seed), options.tokens)
    batches = evaluation_batches(heldout_documents, tokenizer, context, options.evaluation_tokens)
    return rows[:]["input_ids"], torch.cat([batch["input_ids"] for batch in batches])


def _decomposition_options(
    options: FrontierOptions, root: Path, commit: str | None, method: str, k: int
) -> DecompositionOptions:
    training = {
        "learning_rate": options.learning_rates.get(method, LEARNING_RATES[method]),
        "max_steps": -1,
        "num_train_epochs": options.num_train_epochs,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    same = ("model", "layers", "stack", "site", "match_transcoder", "intermediate_size", "dtype", "tokens", "seed")
    sizes = ("batch_tokens", "evaluation_tokens", "text")
    return DecompositionOptions(
        **{name: getattr(options, name) for name in (*same, *sizes)},
        revision=commit or options.revision,
        method=method,
        num_experts_per_tok=k,
        output=str(root / POINTS / point_name(method, k)),
        training={**training, **options.training},
    )


def _point(root: Path, options: DecompositionOptions, config: MxDConfig, common: Mapping[str, Any]) -> Point:
    layers = [asdict(config.layer(layer)) for layer in config.layers]
    names = ("stack", "site", "method", "dtype", "batch_tokens", "seed")
    settings = {**common, **{name: getattr(options, name) for name in names}, "layers": config.layers, "sizes": layers}
    settings["training"] = {**_DEFAULTS, **options.training}
    return Point(root, options, config, json.loads(json.dumps(settings)))


def _check_space(options: FrontierOptions, root: Path, missing: list[Point], rows: Tensor) -> None:
    kept = missing if options.save else missing[: options.jobs]
    needed = sum(4 * point.config.num_parameters for point in kept)
    layers = [missing[0].config.layer(layer) for layer in missing[0].config.layers]
    if not (root / RECORDING).is_dir():
        needed += recording_bytes(rows.numel(), [(layer.hidden_size, layer.output_size) for layer in layers])
    check_free_space(root, needed, "the frontier, its recording and its decompositions,")


def _record(
    options: FrontierOptions, root: Path, model: PreTrainedModel, commit: str | None, config: MxDConfig,
    rows: Tensor, progress: bool,
) -> None:  # fmt: skip
    """Record the teacher, or see that it was."""
    teacher = model
    if options.teacher_dtype not in (None, options.dtype):
        teacher, _, _ = load_base_model(options.model, commit or options.revision, str(options.teacher_dtype))
    ActivationCache.record(
        root / RECORDING, teacher.to(default_device()), config.layers, rows,
        rows_per_step=rows_per_step(options),
        overwrite=options.overwrite, progress=progress, **config.where,
    )  # fmt: skip


def _measure_untouched(root: Path, model: PreTrainedModel, config: MxDConfig, rows: Tensor, progress: bool) -> None:
    """Keep the held-out rows and the untouched model's losses on them, or see that they are kept."""
    folder = root / HELDOUT
    about = {"weights": model_identity(model), "text": rows_digest(rows), "layers": config.layers, **config.where}
    if (folder / _ABOUT).is_file() and json.loads((folder / _ABOUT).read_text()) == about:
        return
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    save_heldout(rows, folder)
    known = UntouchedLosses(model.to(default_device()), heldout_batches(folder), ablated=config, progress=progress)
    known.save(folder / UNTOUCHED_NAME)
    replace_text(folder / _ABOUT, json.dumps(about) + "\n")


def _write(options: FrontierOptions, root: Path, points: list[Point]) -> dict[str, Any]:
    """frontier.json and frontier.png of the points that are finished."""
    methods = list(LEARNING_RATES)
    points = sorted(points, key=lambda point: (methods.index(point.options.method), point.options.num_experts_per_tok))
    rows = [_row(point, found) for point in points if (found := point.finished()) is not None]
    loss = rows[0]["cross_entropy"] if rows else {}
    asked = asdict(options)
    for name in ("output", "overwrite", "resume", "jobs", "save"):
        del asked[name]
    results = {
        "untouched": loss.get("untouched"),
        "zero_ablated": loss.get("zero_ablated"),
        "points": rows,
        "settings": {
            **asked,
            "layers": points[0].config.layers,
            "revision": points[0].config.base_model_revision,
            "batch_tokens": rows_per_step(options) * options.text.context_length,
            "tokens_recorded": points[0].settings["tokens"],
            "versions": versions(),
        },
    }
    root.mkdir(parents=True, exist_ok=True)
    replace_text(root / FRONTIER_NAME, json.dumps(results, indent=1) + "\n")
    if rows:
        plot_frontier(results, root / FIGURE_NAME)
    return results


def _row(point: Point, results: Mapping[str, Any]) -> dict[str, Any]:
    made = results["settings"]["training"]
    return {
        "name": point.name,
        "method": point.options.method,
        "num_experts_per_tok": point.options.num_experts_per_tok,
        "num_experts": {str(layer): point.config.layer(layer).num_experts for layer in point.config.layers},
        "parameters": point.config.num_parameters,
        "learning_rate": made["learning_rate"],
        "tokens_trained": made["tokens_trained"],
        "seconds": made["seconds"],
        **{name: results[name] for name in ("cross_entropy", "kl", "top1_agreement", "layers", "always_on")},
        "evaluated_tokens": results["settings"]["tokens"],
    }

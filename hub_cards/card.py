"""Build the model card of a decomposition from its folder alone: config.json, evaluation.json and figures/.

Anybody may have written these files. Every value that the template prints passes `escape_markdown`, every value in a
block of code passes `code_word`, and no value is ever part of a template.
"""

import re
import shlex
from collections.abc import Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from mxd.base.layer_names import layer_label, layer_names, layer_ranges
from mxd.evaluation import weak_experts
from mxd.modeling_mxd import MxDConfig
from mxd.modeling_mxd.configuration_mxd import DEMO_MODEL
from mxd.modeling_mxd.loading import is_causal

from .reading import read_config, read_json
from .safe_text import (
    UNKNOWN,
    code_word,
    escape_markdown,
    finite_number,
    format_number,
    format_percent,
    get_nested,
    is_dataset_id,
    is_hub_id,
    last_path_part,
    one_line,
    strings_in,
    without_folders,
)  # fmt: skip

BEGIN, END = "<!-- mxd: begin -->", "<!-- mxd: end -->"
"""Marks around the part of a card that a later push replaces."""
METHOD_TAGS = {"mxd": "mixture-of-decoders", "transcoder": "transcoder", "skip_transcoder": "skip-transcoder"}

_METHODS = {"mxd": "Mixture of Decoders", "transcoder": "transcoder", "skip_transcoder": "skip transcoder"}
_FIGURE = re.compile(r"[A-Za-z0-9][\w-]{0,80}\.png", re.ASCII)
_MAX_ITEMS = 20
# Settings of a run that are options of its command by the same name,
_FLAGS = (
    "dataset", "heldout_dataset", "dataset_config", "dataset_revision", "split", "text_column", "chat", "streaming",
    "context_length", "revision", "site", "num_experts_per_tok", "num_experts", "match_transcoder", "tokens",
    "batch_tokens", "learning_rate", "nmse_weight", "min_mean_ablation_error", "auxiliary_weight", "dtype",
    "evaluation_tokens", "seed", "bf16",
)  # fmt: skip
# and those that the card lists.
_FACTS = (
    "tokens_trained", "seconds", "device", "threads", "loss", "loss_normalization", "stack", "intermediate_size",
    "num_groups_per_tok", "layers_per_pass", "sequential", "heldout_split", "num_train_epochs", "gate_init",
    "encoder_init", "decoder_init", "modulation_init", "mean_ablation_weight", "scale_activations",
    "gate_learning_rate_factor", "modulation_learning_rate_factor",
)  # fmt: skip


def build_card(
    folder: str | Path,
    repo_id: str | None = None,
    license: str | None = None,  # noqa: A002, the Hub's name for it
    base_model: str | None = None,
    base_commit: str | None = None,
) -> ModelCard:
    """Build the card of the decomposition in a folder, without asking the Hub.

    Args:
        folder: holds config.json and, if they exist, evaluation.json, figures/*.png and training_arguments.json.
        repo_id: `user/name` that the card's code loads; by default the name of the folder.
        license: the Hub's identifier of a licence; without one the card names none.
        base_model: Hub id of the base model, if config.json names another place.
        base_commit: commit of the base model, if config.json names none.

    Raises:
        ValueError: config.json is missing, or it or evaluation.json cannot be read or is nonsense (naming the file);
            `repo_id` is not an id that the Hub allows.
    """
    folder = Path(folder)
    if repo_id is not None:
        validate_repo_id(repo_id)
    config, evaluation = read_config(folder / "config.json", folder), read_evaluation(folder)
    named = base_model or config.base_model_name_or_path
    commit = base_commit or (config.base_model_revision if named == config.base_model_name_or_path else None)
    base_id = named if named and named != DEMO_MODEL and is_hub_id(named, commit) else None
    base_name = base_id or (one_line(last_path_part(named)) if named else "an unnamed language model")
    data = _metadata(config, evaluation or {}, base_id)
    data["license"] = one_line(license) or None
    layers = [config.layer(layer) for layer in config.layers]
    methods = {_METHODS[layer.method] for layer in layers}
    kind = methods.pop() if len(methods) == 1 else "decomposition"
    where = layer_names(sorted(config.written_layers()))
    share = partial(get_nested, evaluation, "layers")
    shares = {f"layer {i}": {"expert_share": finite_number(share(str(i), "expert_share"))} for i in config.layers}
    body = _template().render(
        {
            "title": f"{kind[0].upper()}{kind[1:]} of {base_name[:80]}, {where}",
            "code": code_word,
            "repo": repo_id or folder.resolve().name,
            "base_id": base_id,
            "base_name": base_name,
            "base_commit": base_id and commit,
            "causal": is_causal(config.base_model_type),
            "own_tokenizer": any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")),
            "first": config.layers[0],
            "dense": any(layer.method == "mxd" for layer in layers),
            "experts": f"{max(layer.num_experts for layer in layers):,}",
            "active": max(layer.num_experts_per_tok for layer in layers),
            "weak": weak_experts(shares),
            "rows": [row for layer in config.layers for row in _layer_rows(layer, config, evaluation)],
            "several": len(config.written_layers()) > len(layers),
            "layers": len(layers),
            "results": None if evaluation is None else _results(evaluation),
            "runs": _runs(config, base_name, evaluation, folder),
            "figures": _figures(folder / "figures"),
        }
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{BEGIN}\n{body.strip()}\n{END}\n")


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return evaluation.json without folders of this machine; None if there is none."""
    path = folder / "evaluation.json"
    if not path.is_file():
        return None
    evaluation = read_json(path)
    return evaluation | {"settings": without_folders(evaluation.get("settings", {}))}


def _metadata(config: MxDConfig, evaluation: Mapping[str, Any], base_id: str | None) -> ModelCardData:
    layers = [config.layer(layer) for layer in config.layers]
    runs = [get_nested(evaluation, "settings", "training"), *_finetunings(evaluation)]
    datasets = [name for run in runs for name in strings_in(get_nested(run, "text", "dataset")) if is_dataset_id(name)]
    methods = dict.fromkeys(METHOD_TAGS[layer.method] for layer in layers)
    sizes = {name: getattr(layers[0], name) for name in ("method", "num_experts", "num_experts_per_tok")}
    rise = finite_number(get_nested(evaluation, "cross_entropy", "rise"))
    return ModelCardData(
        base_model=base_id,
        # Of the Hub's relations the nearest: an adapter, too, needs its base model. The others are whole models.
        base_model_relation="adapter" if base_id else None,
        library_name="mxd",
        pipeline_tag="text-generation" if is_causal(config.base_model_type) else None,
        tags=["mxd", *methods, "interpretability", *(f"mxd-layer-{layer}" for layer in config.written_layers())],
        datasets=list(dict.fromkeys(datasets))[:_MAX_ITEMS] or None,
        mxd={"layers": config.layers, **sizes, **({} if rise is None else {"cross_entropy_rise": rise})},
    )


def _format_rise(evaluation: Any) -> Markup:
    """Format the rise as `+0.0081 ± 0.0012`, with half the width of its 95 % interval if there is one."""
    rise = format_number(get_nested(evaluation, "cross_entropy", "rise"), "+.4f")
    interval = get_nested(evaluation, "cross_entropy", "rise_interval")
    low, high = map(finite_number, interval) if isinstance(interval, list) and len(interval) == 2 else (None, None)
    return rise if low is None or high is None else rise + " ± " + format_number((high - low) / 2, ".4f")


def _evaluated_on(settings: Any) -> str:
    """Return the names of the text that was measured on: by a later `mxd evaluate`, or else by the training."""
    later, text = get_nested(settings, "evaluation"), get_nested(settings, "training", "text")
    held_out = ", ".join(strings_in(get_nested(text, "heldout_dataset")))
    return (held_out or _text_names(text)) if later is None else _text_names(later)


def _text_names(text: Any) -> str:
    """Return the names of a text's datasets; an empty list in the settings stands for the sample of mxd."""
    names = get_nested(text, "dataset")
    return "the text sample that ships with mxd" if names == [] else ", ".join(strings_in(names))


def _layer_rows(layer: int, whole: MxDConfig, evaluation: Any) -> list[list[Any]]:
    """Return the cells of a layer in the table of results, its sizes, then its metrics; then of each of its outputs, if
    there are several, the errors."""
    config, written = whole.layer(layer), whole.written_layers(layer)
    get = partial(get_nested, evaluation, "layers", str(layer))
    sizes = [f"{config.num_experts:,}", config.num_experts_per_tok, f"{config.num_parameters:,}"]
    shares = (format_percent(get(name)) for name in ("expert_share", "specialised_share"))
    errors = [format_number(get("nmse")), *shares, format_number(get("fvu"))]
    use = [format_number(get("l0"), ".1f"), format_percent(get("dead_experts"))]
    rows = [[layer_label(layer, written), _METHODS[config.method], *sizes, *errors, *use]]
    outputs = get("outputs")
    for place, output in zip(written, outputs if isinstance(outputs, list) else (), strict=False):
        nmse, fvu = (format_number(get_nested(output, name)) for name in ("nmse", "fvu"))
        rows.append([f"{layer} → {place}", *[""] * 4, nmse, "", "", fvu, "", ""])
    return rows


def _results(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    loss, settings = evaluation.get("cross_entropy"), evaluation["settings"]
    later = get_nested(settings, "evaluation")
    return {
        "cross_entropy": [
            *(format_number(get_nested(loss, key), ".4f") for key in ("untouched", "spliced", "zero_ablated")),
            _format_rise(evaluation),
            format_percent(get_nested(loss, "recovered")),
            format_number(evaluation.get("kl"), ".4f"),
            format_percent(evaluation.get("top1_agreement")),
        ],
        "unpredicted": one_line(get_nested(settings, "no_predictions")),
        "tokens": format_number(get_nested(settings, "tokens"), ",.0f"),
        "dtype": get_nested(settings, "dtype"),
        "text": _evaluated_on(settings),
        # A training measures on held-out text. None: it is not known what was trained on.
        "held_out": True if later is None else get_nested(later, "held_out"),
        "specialised_frequency": format_percent(get_nested(settings, "specialised_frequency"), ".0f"),
    }


def _runs(config: MxDConfig, base_name: str, evaluation: Any, folder: Path) -> list[dict[str, Any]]:
    """Return what is known of the training and of each fine-tuning: `title`, `lines` (name to value) and `command`."""
    runs: list[dict[str, Any]] = []
    training = get_nested(evaluation, "settings", "training")
    if isinstance(training, Mapping):
        method = config.layer(config.layers[0]).method
        start = [
            "mxd decompose " + _shell_word(base_name),
            f"--layers {layer_ranges(config.layers)}",
            f"--method {method}",
        ]
        if (outputs := config.layer(config.layers[0]).num_output_layers) > 1:
            start.append(f"--num-output-layers {outputs}")
        runs.append(_run("Training", start, training))
    elif (arguments := folder / "training_arguments.json").is_file():  # by a Trainer from Python
        lines = _lines(without_folders(read_json(arguments)), (*_FACTS, *_FLAGS))
        runs.append({"title": "Training", "lines": lines, "command": None})
    for finetuning in _finetunings(evaluation):
        start = ["mxd finetune " + _shell_word(finetuning.get("decomposition") or "FOLDER")]
        start += [f"--loss {loss}" for loss in ("kl", "cross_entropy") if loss == finetuning.get("loss")]
        run = _run("Fine-tuning in the language model", start, finetuning)
        run["lines"]["Cross-entropy rise before"] = _format_rise(finetuning.get("before"))
        run["lines"]["KL divergence before"] = format_number(get_nested(finetuning, "before", "kl"), ".4f")
        runs.append(run)
    return runs


def _finetunings(evaluation: Any) -> list[Mapping[str, Any]]:
    """Return the settings of every fine-tuning that followed the training."""
    runs = get_nested(evaluation, "settings", "finetuning")
    return [run for run in runs if isinstance(run, Mapping)][:_MAX_ITEMS] if isinstance(runs, list) else []


def _run(title: str, start: list[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    parts = (get_nested(settings, name) for name in ("text", "training"))
    text, further = (part if isinstance(part, Mapping) else {} for part in parts)
    settings = {**text, "dataset_config": text.get("config_name"), **further, **settings}
    return {"title": title, "lines": _lines(settings, _FACTS), "command": _command(start, settings)}


def _command(start: list[str], settings: Mapping[str, Any]) -> Markup | None:
    """Return the command that repeats a run; None if it has too many files to print."""
    lines = list(start)
    for name in _FLAGS:
        option, value = f"--{name.replace('_', '-')}", settings.get(name)
        values = value if isinstance(value, list) else [value]
        if len(values) > _MAX_ITEMS:
            return None
        lines += [option for value in values if value is True]
        lines += [f"{option} {_shell_word(value)}" for value in values if one_line(value)]
    return Markup(" \\\n    ".join(lines))


def _shell_word(value: Any) -> str:
    return shlex.quote(str(code_word(value)))


def _lines(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the lines of the card about a run: a name for people, and the value."""
    lines: dict[str, Any] = {"Text": _text_names(settings)}
    for name in names:
        value = settings.get(name)
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif not isinstance(value, str):
            value = format_number(value, ",.0f" if isinstance(value, int) or name == "seconds" else "g")
        lines[name.replace("_", " ").capitalize()] = value
    if isinstance(versions := settings.get("versions"), Mapping):
        lines["Versions"] = ", ".join(f"{one_line(name)} {one_line(version)}" for name, version in versions.items())
    return {name: value for name, value in lines.items() if value not in ("", "None", UNKNOWN)}


def _figures(folder: Path) -> list[tuple[str, Markup]]:
    """Return the alternative text and the path in the repo of each figure whose name is a plain one."""
    paths = sorted(path for path in folder.glob("*.png") if path.is_file() and _FIGURE.fullmatch(path.name))
    return [(path.stem.replace("_", " ").capitalize(), Markup(f"figures/{path.name}")) for path in paths[:_MAX_ITEMS]]


@cache
def _template() -> Template:
    environment = SandboxedEnvironment(
        autoescape=True, finalize=escape_markdown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string((Path(__file__).parent / "card_template.md").read_text(encoding="utf-8"))

"""Build the model card of a decomposition from its folder alone: config.json, evaluation.json and figures/.

Anybody may have written these files. Every value that the template prints passes `escape_markdown`, every value in a
block of code passes `code_word`, and no value is ever part of a template.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from mxd.modeling_mxd import MxDConfig, MxDLayerConfig
from mxd.modeling_mxd.configuration_mxd import DEMO_MODEL
from mxd.modeling_mxd.loading import is_causal

from .reading import read_config, read_json
from .safe_text import (
    MAX_NAMES,
    UNKNOWN,
    code_word,
    dataset_id,
    dataset_names,
    escape_markdown,
    finite_number,
    format_number,
    format_percent,
    get_nested,
    is_hub_id,
    last_path_part,
    one_line,
    shell_word,
    strings_in,
    without_folders,
)  # fmt: skip

BEGIN, END = "<!-- mxd: begin -->", "<!-- mxd: end -->"
"""Marks around the part of a card that a later push replaces."""
METHOD_TAGS = {"mxd": "mixture-of-decoders", "transcoder": "transcoder", "skip_transcoder": "skip-transcoder"}

_TEMPLATE = Path(__file__).parent / "card_template.md"
_FIGURE = re.compile(r"[A-Za-z0-9][\w-]{0,80}\.png", re.ASCII)
_METHODS = {"mxd": "Mixture of Decoders", "transcoder": "transcoder", "skip_transcoder": "skip transcoder"}
# Fields of a run's settings, and of its text, that are options of its command by the same name.
_OPTIONS = (
    "revision", "site", "num_experts_per_tok", "num_experts", "match_transcoder", "num_groups_per_tok", "tokens",
    "batch_tokens", "learning_rate", "nmse_weight", "min_mean_ablation_error", "auxiliary_weight", "dtype",
    "evaluation_tokens", "seed", "bf16",
)  # fmt: skip
# Fields that a YAML file sets and the command line does not: a run with other values has no command on its card.
_DEFAULTS = {
    "stack": None, "intermediate_size": None, "gate_init": "data", "encoder_init": "pretrained",
    "modulation_init": "unit",
}  # fmt: skip
_TEXT_OPTIONS = ("config_name", "split", "heldout_split", "text_column", "streaming", "context_length")
# Further fields that the card lists; the options too where there is no command.
_FACTS = (
    "tokens_trained", "seconds", "device", "threads", "loss", "loss_normalization", "decoder_init",
    "mean_ablation_weight", "scale_activations", "gate_learning_rate_factor", "modulation_learning_rate_factor",
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
    config = read_config(folder / "config.json", folder)
    evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").is_file() else None
    name = one_line(repo_id.split("/")[-1] if repo_id else folder.resolve().name) or "decomposition"
    base = _Base(base_model or config.base_model_name_or_path)
    data = _metadata(config, evaluation or {}, base)
    data["license"] = one_line(license) or None
    layers = [config.layer(layer) for layer in config.layers]
    body = _render(
        {
            "title": _title(config, base),
            "repo": code_word(repo_id or name),
            "base": base,
            "base_commit": code_word(base_commit or config.base_model_revision) if base.hub_id else None,
            "causal": is_causal(config.base_model_type),
            "own_tokenizer": any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")),
            "first": config.layers[0],
            "dense": any(layer.method == "mxd" for layer in layers),
            "experts": f"{max(layer.num_experts for layer in layers):,}",
            "active": max(layer.num_experts_per_tok for layer in layers),
            "rows": [_layer_row(layer, config.layer(layer), evaluation) for layer in config.layers],
            "results": None if evaluation is None else _results(evaluation),
            "runs": _runs(config, base, evaluation, folder),
            "figures": _figures(folder / "figures"),
        }
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{BEGIN}\n{body.strip()}\n{END}\n")


class _Base:
    """The base model as a card may name it: `hub_id` (None if it is not on the Hub), `name` for people, and `argument`
    for code; of a path, both names are the last part."""

    def __init__(self, name: str | None):
        on_hub = name is not None and name != DEMO_MODEL and is_hub_id(name)
        self.hub_id = name if on_hub else None
        shown = name if on_hub or name is None else last_path_part(name)
        self.name = one_line(shown) or "an unnamed language model"
        self.argument = code_word(self.name if name else "MODEL")


def layer_ranges(layers: list[int], separator: str = ",") -> str:
    """Format layers as `mxd decompose --layers` takes them: `[4, 5, 6, 10]` as `"4-6,10"`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return separator.join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _title(config: MxDConfig, base: _Base) -> str:
    methods = {config.layer(layer).method for layer in config.layers}
    kind = _METHODS[methods.pop()] if len(methods) == 1 else "decomposition"
    layers = f"layer{'s' if len(config.layers) > 1 else ''} {layer_ranges(config.layers)}"
    return f"{kind[0].upper()}{kind[1:]} of {base.name[:80]}, {layers}"


def _metadata(config: MxDConfig, evaluation: Mapping[str, Any], base: _Base) -> ModelCardData:
    layers = [config.layer(layer) for layer in config.layers]
    runs = [get_nested(evaluation, "settings", "training"), *_finetunings(evaluation)]
    datasets = [name for run in runs for name in strings_in(get_nested(run, "text", "dataset"))]
    own: dict[str, Any] = {
        "layers": config.layers,
        "method": layers[0].method,
        "num_experts": layers[0].num_experts,
        "num_experts_per_tok": layers[0].num_experts_per_tok,
    }
    rise = _cross_entropy_rise(evaluation)
    return ModelCardData(
        base_model=base.hub_id,
        # The Hub knows adapter, finetune, merge and quantized. Like an adapter, a decomposition is a small set of
        # weights that needs its base model; the other three are whole models.
        base_model_relation="adapter" if base.hub_id else None,
        library_name="mxd",
        pipeline_tag="text-generation" if is_causal(config.base_model_type) else None,
        tags=[
            "mxd",
            *dict.fromkeys(METHOD_TAGS[layer.method] for layer in layers),
            "interpretability",
            *(f"mxd-layer-{layer}" for layer in config.layers),
        ],
        datasets=list(dict.fromkeys(filter(None, map(dataset_id, datasets))))[:MAX_NAMES] or None,
        mxd=own if rise is None else own | {"cross_entropy_rise": rise},
    )


def _cross_entropy_rise(evaluation: Mapping[str, Any]) -> float | None:
    spliced = finite_number(get_nested(evaluation, "cross_entropy", "spliced"))
    untouched = finite_number(get_nested(evaluation, "cross_entropy", "untouched"))
    return None if spliced is None or untouched is None else finite_number(spliced - untouched)


def _format_rise(evaluation: Mapping[str, Any]) -> Markup:
    """Format the rise as `+0.0081 ± 0.0012`, with half the width of its 95 % interval if there is one."""
    rise = format_number(_cross_entropy_rise(evaluation), "+.4f")
    interval = get_nested(evaluation, "cross_entropy", "rise_interval")
    ends = [finite_number(end) for end in interval] if isinstance(interval, list) else []
    if rise == UNKNOWN or len(ends) != 2 or ends[0] is None or ends[1] is None:
        return rise
    return rise + " ± " + format_number((ends[1] - ends[0]) / 2, ".4f")


def _evaluated_on(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the names of the text that was measured on: by a later `mxd evaluate`, or else by the training."""
    text = get_nested(evaluation, "settings", "evaluation")
    if text is not None:
        return _text_names(text)
    text = get_nested(evaluation, "settings", "training", "text")
    return dataset_names(get_nested(text, "heldout_dataset")) or _text_names(text)


def _text_names(text: Any) -> list[str]:
    """Return the names of the datasets of a text; an empty list in the settings stands for the sample of mxd."""
    sample = get_nested(text, "dataset") == []
    return ["the text sample that ships with mxd"] if sample else dataset_names(get_nested(text, "dataset"))


def _layer_row(layer: int, config: MxDLayerConfig, evaluation: Any) -> list[Any]:
    """Return the cells of a layer in the table of results: its sizes, then its metrics."""
    result = get_nested(evaluation, "layers", str(layer))
    nmse, fvu = (format_number(get_nested(result, key)) for key in ("nmse", "fvu"))
    expert, specialised, dead = (
        format_percent(get_nested(result, key)) for key in ("expert_share", "specialised_share", "dead_experts")
    )
    sizes = [f"{config.num_experts:,}", config.num_experts_per_tok, f"{config.num_parameters:,}"]
    l0 = format_number(get_nested(result, "l0"), ".1f")
    return [layer, _METHODS[config.method], *sizes, nmse, expert, specialised, fvu, l0, dead]


def _results(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    loss, settings = (get_nested(evaluation, key) for key in ("cross_entropy", "settings"))
    frequency = finite_number(get_nested(settings, "specialised_frequency"))
    later = get_nested(settings, "evaluation")
    return {
        "cross_entropy": [
            *(format_number(get_nested(loss, key), ".4f") for key in ("untouched", "spliced", "zero_ablated")),
            _format_rise(evaluation),
            format_percent(get_nested(loss, "recovered")),
            format_number(get_nested(evaluation, "kl"), ".4f"),
            format_percent(get_nested(evaluation, "top1_agreement")),
        ],
        "tokens": format_number(get_nested(settings, "tokens"), ",.0f"),
        "dtype": get_nested(settings, "dtype"),
        "text": ", ".join(_evaluated_on(evaluation)) or None,
        # A training measures on held-out text. None: it is not known what was trained on.
        "held_out": True if later is None else get_nested(later, "held_out"),
        "specialised_frequency": format_number(0.25 if frequency is None else frequency, ".0f", 100, " %"),
    }


def _runs(config: MxDConfig, base: _Base, evaluation: Any, folder: Path) -> list[dict[str, Any]]:
    """Return what is known of the training and of each fine-tuning: `title`, `lines` (name to value) and `command`."""
    runs: list[dict[str, Any]] = []
    training = get_nested(evaluation, "settings", "training")
    if isinstance(training, Mapping):
        layers = [f"--layers {layer_ranges(config.layers)}", f"--method {config.layer(config.layers[0]).method}"]
        start = [f"mxd decompose {shell_word(base.argument)}", *layers]
        if training.get("num_experts") is not None:  # it takes precedence over the budget that is otherwise matched
            training = {**training, "match_transcoder": None}
        runs.append(_run("Training", start, training))
    elif (arguments := folder / "training_arguments.json").is_file():  # by a Trainer from Python
        runs.append(
            {"title": "Training", "lines": _lines(read_json(arguments), (*_OPTIONS, *_DEFAULTS)), "command": None}
        )
    for finetuning in _finetunings(evaluation):
        source = next(iter(strings_in(finetuning.get("decomposition"))), "FOLDER")
        start = [f"mxd finetune {shell_word(dataset_id(source) or last_path_part(source))}"]
        if finetuning.get("loss") in ("kl", "cross_entropy"):
            start.append(f"--loss {finetuning['loss']}")
        run = _run("Fine-tuning in the language model", start, finetuning)
        before = get_nested(finetuning, "before") or {}
        run["lines"]["Cross-entropy rise before"] = _format_rise(before)
        run["lines"]["KL divergence before"] = format_number(get_nested(before, "kl"), ".4f")
        runs.append(run)
    return runs


def _finetunings(evaluation: Any) -> list[Mapping[str, Any]]:
    """Return the settings of every fine-tuning that followed the training."""
    runs = get_nested(evaluation, "settings", "finetuning")
    return [run for run in runs if isinstance(run, Mapping)][:MAX_NAMES] if isinstance(runs, list) else []


def _run(title: str, start: list[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    command = _command(start, settings)
    lines = _lines(settings, () if command else (*_OPTIONS, *_DEFAULTS))
    return {"title": title, "lines": lines, "command": Markup(" \\\n    ".join(command))}


def _command(start: list[str], settings: Mapping[str, Any]) -> list[str]:
    """Return the lines of the command that repeats a run, with files named by the last part of their path.

    No lines if the command would be another one: too many files to print, options without a flag, or several passes
    over recorded activations (`mxd frontier`)."""
    text = get_nested(settings, "text")
    names = {name: strings_in(get_nested(text, name)) for name in ("dataset", "heldout_dataset")}
    epochs = finite_number(get_nested(settings, "training", "num_train_epochs"))
    other = any(settings.get(name) not in (None, default) for name, default in _DEFAULTS.items())
    if sum(map(len, names.values())) > MAX_NAMES or epochs not in (None, 1) or other:
        return []
    lines = list(start)
    for option, values in names.items():
        lines += [f"--{option.replace('_', '-')} {shell_word(dataset_id(v) or last_path_part(v))}" for v in values]
    options = [(name, settings.get(name)) for name in _OPTIONS]
    for name, value in [*options, *((name, get_nested(text, name)) for name in _TEXT_OPTIONS)]:
        option = "--dataset-config" if name == "config_name" else f"--{name.replace('_', '-')}"
        number = finite_number(value)
        if value is True:
            lines.append(option)
        elif isinstance(value, str) and code_word(value) == value:  # an altered value would be another command
            lines.append(f"{option} {shell_word(value)}")
        elif number is not None and abs(number) < 1e15:
            lines.append(f"{option} {value}")
    return lines


def _lines(settings: Mapping[str, Any], options: Iterable[str]) -> dict[str, Any]:
    """Return the lines of the card about a run: a name for people, and the value."""
    lines: dict[str, Any] = {"Text": ", ".join(_text_names(settings.get("text"))) or None}
    for name in (*_FACTS, *options):
        value = without_folders(settings.get(name))
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif not isinstance(value, str):
            value = format_number(value, ",.0f" if isinstance(value, int) or name == "seconds" else "g")
        lines[name.replace("_", " ").capitalize()] = value
    versions = get_nested(settings, "versions")
    if isinstance(versions, Mapping):
        shown = list(versions.items())[:MAX_NAMES]
        lines["Versions"] = ", ".join(f"{one_line(name)[:40]} {one_line(version)[:40]}" for name, version in shown)
    return {name: value for name, value in lines.items() if value and value != UNKNOWN}


def _figures(folder: Path) -> list[tuple[str, Markup]]:
    """Return the alternative text and the path in the repo of each figure whose name is a plain one."""
    paths = sorted(path for path in folder.glob("*.png") if path.is_file() and _FIGURE.fullmatch(path.name))
    return [(path.stem.replace("_", " ").capitalize(), Markup(f"figures/{path.name}")) for path in paths[:MAX_NAMES]]


def _render(values: Mapping[str, Any]) -> str:
    environment = SandboxedEnvironment(
        autoescape=True, finalize=escape_markdown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(values)

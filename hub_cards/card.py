"""The model card of a decomposition, filled from its folder alone: config.json, evaluation.json, figures/.

What those files hold was written by strangers. Every value that the template prints passes `_escaped`, and what goes
into a block of code passes `_argument`; no value is ever a template.
"""

import html
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from modeling_mxd import MxDConfig, MxDLayerConfig
from modeling_mxd.sharing import BEGIN, END, HUB_ID

from .reading import read_config, read_json, texts

UNKNOWN = "–"
MAX_TEXT = 200
MAX_NAMES = 20

_TEMPLATE = Path(__file__).parent / "card_template.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FIGURE = re.compile(r"[A-Za-z0-9][\w-]{0,80}\.png", re.ASCII)
_DATA_ENDINGS = (".parquet", ".jsonl", ".json", ".csv", ".txt", ".md", ".py", ".rst")
# `mxd.embedded.MODEL_NAME`: it looks like a Hub id and is none.
_EMBEDDED_MODEL = "mxd/embedded-default"
_EMBEDDED_TEXT = "the text sample that ships with mxd"
_METHODS = {"mxd": "Mixture of Decoders", "transcoder": "transcoder", "skip_transcoder": "skip transcoder"}
_METHOD_TAGS = {"mxd": "mixture-of-decoders", "transcoder": "transcoder", "skip_transcoder": "skip-transcoder"}
_LAYER_METRICS = {
    "nmse": "NMSE",
    "expert_share": "expert share",
    "specialised_share": "specialised share",
    "dead_experts": "dead experts",
}
# Option of `mxd decompose` or `mxd finetune` → where the settings of its run hold its value.
_OPTIONS = {
    "--revision": ("revision",),
    "--stack": ("stack",),
    "--site": ("site",),
    "--dataset-config": ("text", "config_name"),
    "--split": ("text", "split"),
    "--text-column": ("text", "text_column"),
    "--k": ("num_experts_per_tok",),
    "--experts": ("num_experts",),
    "--match-transcoder": ("match_transcoder",),
    "--intermediate-size": ("intermediate_size",),
    "--groups-per-token": ("num_groups_per_tok",),
    "--tokens": ("tokens",),
    "--context-length": ("text", "context_length"),
    "--batch-tokens": ("batch_tokens",),
    "--learning-rate": ("learning_rate",),
    "--nmse-weight": ("nmse_weight",),
    "--gate-start": ("gate_initialization",),
    "--encoder-start": ("encoder_initialization",),
    "--modulation-start": ("modulation_initialization",),
    "--expert-share": ("expert_share",),
    "--sparse-code-weight": ("sparse_code_weight",),
    "--dtype": ("dtype",),
    "--evaluation-tokens": ("evaluation_tokens",),
    "--seed": ("seed",),
}


def build_card(
    folder: str | Path,
    repo_id: str | None = None,
    license: str | None = None,  # noqa: A002, the card's own name for it
    base_model: str | None = None,
    base_commit: str | None = None,
) -> ModelCard:
    """The card of the decomposition in a folder; nothing is asked of the network.

    Args:
        folder: holds config.json; evaluation.json, figures/*.png and training_arguments.json if there are any.
        repo_id: user/name that the card's code loads; by default the folder's name.
        license: the Hub's identifier of a licence; without one the card names none.
        base_model: Hub id of the base model, where config.json names another place of it.
        base_commit: of the base model that is loaded with it, where config.json names none.

    Raises:
        ValueError: config.json is missing, or it or evaluation.json cannot be read or is nonsense (naming the file);
            `repo_id` is not one that the Hub allows.
    """
    folder = Path(folder)
    if repo_id is not None:
        validate_repo_id(repo_id)
    config = read_config(folder / "config.json", folder)
    evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").is_file() else None
    name = _plain(repo_id.split("/")[-1] if repo_id else folder.resolve().name) or "decomposition"
    base = _Base(base_model or config.base_model_name_or_path, given=base_model is not None)
    data = _metadata(config, evaluation or {}, name, base, license)
    body = _render(
        {
            "title": _title(config, base),
            "repo": _argument(repo_id or name),
            "license": license,
            "base": base,
            "own_tokenizer": any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")),
            "base_commit": _argument(base_commit or config.base_model_revision) if base.hub_id else None,
            "experts": _range(config.layer(layer).num_experts for layer in config.layers),
            "methods": {config.layer(layer).method for layer in config.layers},
            "layers": config.layers,
            "configurations": [_configuration_row(layer, config.layer(layer)) for layer in config.layers],
            "parameters": f"{config.num_parameters:,}",
            "results": None if evaluation is None else _results(config, evaluation),
            "training": _training(config, base, _at(evaluation, "settings", "training")) or _trained_by(folder),
            "finetunings": [_finetuning(run) for run in _finetunings(evaluation)],
            "figures": _figures(folder / "figures"),
        }
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{BEGIN}\n{body.strip()}\n{END}\n")


class _Base:
    """The base model as a card may name it: by its Hub id, or by the last part of a path.

    Attributes:
        hub_id: None when it is not on the Hub.
        name: what is shown.
        argument: of the command; None for the model that ships with mxd.
    """

    def __init__(self, name: str | None, given: bool):
        self.embedded = name == _EMBEDDED_MODEL and not given
        on_hub = bool(name and len(name) <= MAX_TEXT and HUB_ID.fullmatch(name) and not Path(name).is_dir())
        self.hub_id = name if on_hub and not self.embedded else None
        shown = name if on_hub or name is None else _last_part(name)
        self.name = _plain(shown) or "an unnamed language model"
        self.argument = None if self.embedded else _argument(self.name if name else "MODEL")


# What strangers wrote, made harmless.


def _plain(value: Any) -> str:
    """One line of visible characters, at most `MAX_TEXT` of them."""
    text = value if isinstance(value, str) else "" if _number(value) is None else str(value)
    text = "".join(character if character.isprintable() else " " for character in text[: MAX_TEXT + 1])
    return text.strip() if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _escaped(value: Any) -> Markup:
    """For Markdown and HTML, in a table too: what could be markup becomes a character reference."""
    if isinstance(value, Markup):
        return value
    text = html.escape(_plain(value) or UNKNOWN)
    # An underscore within a word is no emphasis, and names have many.
    return Markup(re.sub(r"[`|\\*\[\]~${}@!]|(?<!\w)_|_(?!\w)|^[#+=-]", lambda match: f"&#{ord(match[0])};", text))


def _argument(value: Any) -> Markup:
    """For blocks of code, where there are no references: what is neither a word nor harmless becomes `_`."""
    return Markup(re.sub(r"[^\w./:+@,=%*\[\]-]", "_", _plain(value)).lstrip("-"))


def _quoted(value: Any) -> str:
    """For a shell, which would expand a glob."""
    return shlex.quote(str(_argument(value)))


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _shown(value: Any, style: str = ".3f", factor: float = 1.0, unit: str = "") -> Markup:
    """A number in a format, `UNKNOWN` where there is none, few digits for what no measurement gives."""
    number = _number(value)
    if number is None:
        return Markup(UNKNOWN)
    number *= factor
    return Markup(f"{number:{style if abs(number) < 1e15 else '.3g'}}{unit}")


def _share(value: Any) -> Markup:
    return _shown(value, ".1f", 100, " %")


def _at(value: Any, *keys: str) -> Any:
    """`value[keys[0]][keys[1]]…`, None where there is no such thing."""
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _last_part(path: str) -> str:
    return PureWindowsPath(path.split("?", maxsplit=1)[0] if "://" in path else path).name or "a local folder"


def _dataset_id(name: str) -> str | None:
    """The Hub id that a data set's name is, or None for what may be a path: as `trainers.load_text` tells them."""
    on_hub = _HUB_ID.fullmatch(name) and not name.lower().endswith(_DATA_ENDINGS) and not Path(name).exists()
    return name if on_hub and len(name) <= MAX_TEXT else None


def _dataset_names(names: Any) -> list[str]:
    """Names without this machine's folders."""
    shown = [_dataset_id(name) or _plain(_last_part(name)) for name in texts(names)]
    return [*shown[:MAX_NAMES], f"and {len(shown) - MAX_NAMES} more"] if len(shown) > MAX_NAMES else shown


def _range(numbers: Iterable[int]) -> str:
    """`64`, or `64 to 128`."""
    known = list(numbers)
    least, most = min(known), max(known)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def layer_ranges(layers: list[int], separator: str = ",") -> str:
    """`[4, 5, 6, 10]` → `"4-6,10"`, as `mxd decompose --layers` takes them."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return separator.join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


# What the card says.


def _title(config: MxDConfig, base: _Base) -> str:
    methods = {config.layer(layer).method for layer in config.layers}
    kind = _METHODS[methods.pop()] if len(methods) == 1 else "decomposition"
    layers = f"layer{'s' if len(config.layers) > 1 else ''} {layer_ranges(config.layers)}"
    return f"{kind[0].upper()}{kind[1:]} of {base.name[:80]}, {layers}"


def _metadata(
    config: MxDConfig, evaluation: Mapping[str, Any], name: str, base: _Base, license_name: str | None
) -> ModelCardData:
    layers = [config.layer(layer) for layer in config.layers]
    runs = [_at(evaluation, "settings", "training"), *_finetunings(evaluation)]
    datasets = [name for run in runs for name in texts(_at(run, "text", "dataset"))]
    own: dict[str, Any] = {
        "layers": config.layers,
        "method": layers[0].method,
        "num_experts": layers[0].num_experts,
        "num_experts_per_tok": layers[0].num_experts_per_tok,
    }
    rise = _cross_entropy_rise(evaluation)
    return ModelCardData(
        base_model=base.hub_id,
        # The Hub knows adapter, finetune, merge and quantized. Like an adapter, a decomposition is small weights of its
        # own that are nothing without the base's, which stay as they are; the others are whole models.
        base_model_relation="adapter" if base.hub_id else None,
        library_name="mxd",
        pipeline_tag="text-generation",
        tags=[
            "mxd",
            *dict.fromkeys(_METHOD_TAGS[layer.method] for layer in layers),
            "interpretability",
            *(f"mxd-layer-{layer}" for layer in config.layers),
        ],
        datasets=list(dict.fromkeys(filter(None, map(_dataset_id, datasets))))[:MAX_NAMES] or None,
        license=_plain(license_name) if license_name else None,
        model_name=name,
        eval_results=_eval_results(config, evaluation) or None,
        mxd=own if rise is None else own | {"cross_entropy_rise": rise},
    )


def _cross_entropy_rise(evaluation: Mapping[str, Any]) -> float | None:
    spliced = _number(_at(evaluation, "cross_entropy", "spliced"))
    untouched = _number(_at(evaluation, "cross_entropy", "untouched"))
    return None if spliced is None or untouched is None else _number(spliced - untouched)


def _rise_shown(evaluation: Mapping[str, Any]) -> Markup:
    """`+0.0081 ± 0.0012`, half the width of the 95 % interval where there is one."""
    shown = _shown(_cross_entropy_rise(evaluation), "+.4f")
    interval = _at(evaluation, "cross_entropy", "rise_interval")
    ends = [_number(end) for end in interval] if isinstance(interval, list) else []
    if shown == UNKNOWN or len(ends) != 2 or ends[0] is None or ends[1] is None:
        return shown
    return shown + " ± " + _shown((ends[1] - ends[0]) / 2, ".4f")


def _eval_results(config: MxDConfig, evaluation: Mapping[str, Any]) -> list[EvalResult]:
    text, names = _evaluated_on(evaluation)
    hub_ids = [name for name in names if _dataset_id(name)]
    values = [
        ("cross_entropy_rise", "cross-entropy rise, nats per token", _cross_entropy_rise(evaluation)),
        ("cross_entropy_recovered", "recovered share", _number(_at(evaluation, "cross_entropy", "recovered"))),
    ]
    for layer in config.layers:
        result = _at(evaluation, "layers", str(layer))
        for key, label in _LAYER_METRICS.items():
            values.append((key, f"{label}, layer {layer}", _number(_at(result, key))))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub_ids[0] if len(names) == len(hub_ids) == 1 else "text",
            dataset_name=_plain(", ".join(names)) or "held-out text",
            dataset_config=_plain(_at(text, "config_name")) or None,
            dataset_split=_plain(_at(text, "split")) or None,
            metric_type=kind,
            metric_name=label,
            metric_value=value,
        )
        for kind, label, value in values
        if value is not None
    ]


def _evaluated_on(evaluation: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The settings of the text that was measured on, and its names: those of a later `mxd evaluate`, else those of
    the training."""
    text = _at(evaluation, "settings", "evaluation")
    if text is None:
        text = _at(evaluation, "settings", "training", "text")
        if texts(_at(text, "heldout_dataset")):  # it has no configuration and no split of its own
            return None, _dataset_names(_at(text, "heldout_dataset"))
    return text, _text_names(text)


def _text_names(text: Any) -> list[str]:
    """Names of the data sets that the settings of a text have; an empty list there is mxd's own text."""
    return [_EMBEDDED_TEXT] if _at(text, "dataset") == [] else _dataset_names(_at(text, "dataset"))


def _configuration_row(layer: int, config: MxDLayerConfig) -> list[str | int]:
    dense = config.method == "mxd"
    return [
        layer,
        _METHODS[config.method],
        f"{config.num_experts:,}",
        config.num_experts_per_tok,
        f"{config.intermediate_size:,}" if dense else UNKNOWN,
        f"{config.hidden_act}, {config.encoder_type.upper()}" if dense else UNKNOWN,
        f"{config.hidden_size:,} → {config.output_size:,}",
        f"{config.num_parameters:,}",
    ]


def _results(config: MxDConfig, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for layer in config.layers:
        result = _at(evaluation, "layers", str(layer))
        errors = [_shown(_at(result, "nmse")), _shown(_at(result, "fvu")), _shown(_at(result, "l0"), ".1f")]
        shares = [_share(_at(result, key)) for key in ("dead_experts", "expert_share", "specialised_share")]
        rows.append([layer, *errors, *shares])
    cross_entropy = _at(evaluation, "cross_entropy")
    settings = _at(evaluation, "settings")
    frequency = _number(_at(settings, "specialised_frequency"))
    return {
        "rows": rows,
        "cross_entropy": [_shown(_at(cross_entropy, key), ".4f") for key in ("untouched", "spliced", "zero_ablated")]
        + [_rise_shown(evaluation), _share(_at(cross_entropy, "recovered"))],
        "kl": _shown(_at(evaluation, "kl"), ".4f"),
        "agreement": _share(_at(evaluation, "top1_agreement")),
        "tokens": _shown(_at(settings, "tokens"), ",.0f"),
        "dtype": _at(settings, "dtype"),
        "text": ", ".join(_evaluated_on(evaluation)[1]) or None,
        "held_out": _at(settings, "evaluation", "held_out") is not False,
        "specialised_frequency": _shown(0.25 if frequency is None else frequency, ".0f", 100, " %"),
    }


def _training(config: MxDConfig, base: _Base, training: Any) -> dict[str, Any] | None:
    """How it was made: lines of name and value, and the command; None where evaluation.json does not say."""
    if not isinstance(training, Mapping):
        return None
    method = config.layer(config.layers[0]).method
    if method == "mxd":  # what was made before there were sparse codes says nothing of them
        training = {"sparse_code_weight": 0.0, **training}
    start = [f"mxd decompose {_quoted(base.argument)}" if base.argument else "mxd decompose"]
    chosen = [f"--layers {layer_ranges(config.layers)}", f"--method {method.replace('_', '-')}"]
    command = _command(start, chosen, training)
    if training.get("num_experts") is not None:  # it goes before the budget that is otherwise matched
        command = [line for line in command if not line.startswith("--match-transcoder")]
    return {"lines": _lines(training), "command": _joined(command)}


def _trained_by(folder: Path) -> dict[str, Any] | None:
    """What the arguments that a Trainer left say of how it was made, where evaluation.json does not."""
    path = folder / "training_arguments.json"
    if not path.is_file():
        return None
    arguments = read_json(path)
    return {"lines": _lines({**arguments, "loss": arguments.get("loss_normalization")}), "command": None}


def _finetunings(evaluation: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The settings of every fine-tuning that the decomposition went through after its training."""
    runs = _at(evaluation, "settings", "finetuning")
    return [run for run in runs if isinstance(run, Mapping)][:MAX_NAMES] if isinstance(runs, list) else []


def _finetuning(run: Mapping[str, Any]) -> dict[str, Any]:
    """How it was trained on, as `_training` says it, and the figures of before."""
    source = next(iter(texts(run.get("decomposition"))), "FOLDER")
    loss = {"kl": ["--loss kl"], "cross_entropy": ["--loss cross-entropy"]}.get(str(run.get("loss")), [])
    before = {
        "Rise of cross-entropy before it": _rise_shown(_at(run, "before") or {}),
        "KL to the untouched model before it": _shown(_at(run, "before", "kl"), ".4f"),
    }
    command = _command([f"mxd finetune {_quoted(_dataset_id(source) or _last_part(source))}"], loss, run)
    return {"lines": _lines(run) | _known(before), "command": _joined(command)}


def _lines(run: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values of what evaluation.json says of a training or of a fine-tuning."""
    versions = _at(run, "versions")
    versions = list(versions.items())[:MAX_NAMES] if isinstance(versions, Mapping) else []
    return _known(
        {
            "Training tokens": _shown(run.get("tokens_trained"), ",.0f"),
            "Text": ", ".join(_text_names(run.get("text"))) or None,
            "Context length": _shown(_at(run, "text", "context_length"), ",.0f"),
            "Tokens of a step": _shown(run.get("batch_tokens"), ",.0f"),
            "Learning rate": _shown(run.get("learning_rate"), "g"),
            "Its factor for the gate": _shown(run.get("gate_learning_rate_factor"), "g"),
            "Its factor for the modulations": _shown(run.get("modulation_learning_rate_factor"), "g"),
            "Gate starts from": run.get("gate_initialization"),
            "Encoder starts from": run.get("encoder_initialization"),
            "Decoder starts from": run.get("decoder_initialization"),
            "Modulations start from": run.get("modulation_initialization"),
            "Expert share asked for": _shown(run.get("expert_share"), "g"),
            "Weight of the sparse code": _shown(run.get("sparse_code_weight"), "g"),
            "Loss": run.get("loss"),
            "Weight of the layers' own error": _shown(run.get("nmse_weight"), "g"),
            "Activations scaled": _yes_or_no(run.get("scale_activations")),
            "Products in bfloat16": _yes_or_no(run.get("bf16")),
            "Dtype of the base model": run.get("dtype"),
            "Seed": _shown(run.get("seed"), ".0f"),
            "Device": run.get("device"),
            "Threads": _shown(run.get("threads"), ",.0f"),
            "Seconds": _shown(run.get("seconds"), ",.0f"),
            "Versions": ", ".join(f"{_plain(name)[:40]} {_plain(version)[:40]}" for name, version in versions) or None,
        }
    )


def _known(lines: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in lines.items() if value is not None and value != UNKNOWN}


def _yes_or_no(value: Any) -> str | None:
    return ("yes" if value else "no") if isinstance(value, bool) else None


def _command(start: list[str], chosen: list[str], run: Mapping[str, Any]) -> list[str]:
    """The lines of the command that would make it again, local data by the last parts of their paths; none where a
    command would be another: too many files to print, or several passes over recorded tokens (`mxd frontier`)."""
    files = {
        option: texts(_at(run, "text", key))
        for option, key in (("--dataset", "dataset"), ("--heldout-dataset", "heldout_dataset"))
    }
    if sum(map(len, files.values())) > MAX_NAMES or _number(_at(run, "training", "num_train_epochs")) not in (None, 1):
        return []
    lines = list(start)
    for option, names in files.items():
        lines += [f"{option} {_quoted(_dataset_id(name) or _last_part(name))}" for name in names]
    if _at(run, "text", "streaming") is True:
        lines.append("--streaming")
    lines += chosen
    for option, keys in _OPTIONS.items():
        value = _at(run, *keys)
        if isinstance(value, str) and _argument(value) == value:  # an altered one would be another command
            lines.append(f"{option} {_quoted(value)}")
        elif (number := _number(value)) is not None and abs(number) < 1e15:
            lines.append(f"{option} {value}")
    if run.get("bf16") is True:
        lines.append("--bf16")
    return lines


def _joined(lines: list[str]) -> Markup:
    return Markup(" \\\n    ".join(lines))


def _figures(folder: Path) -> list[tuple[str, Markup]]:
    """Alternative text and path in the repo; a name that is no plain one is left out."""
    paths = sorted(path for path in folder.glob("*.png") if path.is_file() and _FIGURE.fullmatch(path.name))
    return [(path.stem.replace("_", " ").capitalize(), Markup(f"figures/{path.name}")) for path in paths[:MAX_NAMES]]


def _render(values: Mapping[str, Any]) -> str:
    environment = SandboxedEnvironment(
        autoescape=True, finalize=_escaped, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(values)

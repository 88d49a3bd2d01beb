"""The model card of a decomposition, filled from its folder alone: config.json, evaluation.json, figures/.

What those files hold was written by strangers. Every value that the template prints passes `escaped`, and what goes
into a block of code passes `argument`; no value is ever a template.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from mxd.modeling_mxd import MxDConfig, MxDLayerConfig
from mxd.modeling_mxd.configuration_mxd import DEMO_MODEL
from mxd.modeling_mxd.loading import is_causal
from mxd.modeling_mxd.sharing import BEGIN, END, HUB_ID

from .reading import read_config, read_json, texts
from .safe_text import (
    MAX_NAMES,
    MAX_TEXT,
    UNKNOWN,
    argument,
    dataset_id,
    dataset_names,
    escaped,
    finite,
    formatted,
    get_nested,
    last_part,
    percentage,
    plain,
    quoted,
)

_TEMPLATE = Path(__file__).parent / "card_template.md"
_FIGURE = re.compile(r"[A-Za-z0-9][\w-]{0,80}\.png", re.ASCII)
_EMBEDDED_TEXT = "the text sample that ships with mxd"
_METHODS = {"mxd": "Mixture of Decoders", "transcoder": "transcoder", "skip_transcoder": "skip transcoder"}
METHOD_TAGS = {"mxd": "mixture-of-decoders", "transcoder": "transcoder", "skip_transcoder": "skip-transcoder"}
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
    "--heldout-split": ("text", "heldout_split"),
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
    "--gate-init": ("gate_init",),
    "--encoder-init": ("encoder_init",),
    "--modulation-init": ("modulation_init",),
    "--min-mean-ablation-error": ("min_mean_ablation_error",),
    "--auxiliary-weight": ("auxiliary_weight",),
    "--dtype": ("dtype",),
    "--evaluation-tokens": ("evaluation_tokens",),
    "--seed": ("seed",),
}


def build_card(
    folder: str | Path,
    repo_id: str | None = None,
    license: str | None = None,  # noqa: A002, the card's own name for it
    license_name: str | None = None,
    license_link: str | None = None,
    base_model: str | None = None,
    base_commit: str | None = None,
) -> ModelCard:
    """The card of the decomposition in a folder; nothing is asked of the network.

    Args:
        folder: holds config.json; evaluation.json, figures/*.png and training_arguments.json if there are any.
        repo_id: user/name that the card's code loads; by default the folder's name.
        license: the Hub's identifier of a licence; without one the card names none.
        license_name, license_link: of one that the Hub does not know, whose identifier is `other`.
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
    name = plain(repo_id.split("/")[-1] if repo_id else folder.resolve().name) or "decomposition"
    base = _Base(base_model or config.base_model_name_or_path, given=base_model is not None)
    data = _metadata(config, evaluation or {}, name, base, license)
    data["license_name"] = plain(license_name) or None
    data["license_link"] = plain(license_link) or None
    body = _render(
        {
            "title": _title(config, base),
            "repo": argument(repo_id or name),
            "license": license_name or license,
            "base": base,
            "causal": is_causal(config.base_model_type),
            "own_tokenizer": any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")),
            "base_commit": argument(base_commit or config.base_model_revision) if base.hub_id else None,
            "experts": _range(config.layer(layer).num_experts for layer in config.layers),
            "methods": {config.layer(layer).method for layer in config.layers},
            "layers": config.layers,
            "configurations": [_configuration_row(layer, config.layer(layer)) for layer in config.layers],
            "parameters": f"{config.num_parameters:,}",
            "results": None if evaluation is None else _results(config, evaluation),
            "training": _training(config, base, get_nested(evaluation, "settings", "training")) or _trained_by(folder),
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
        self.embedded = name == DEMO_MODEL and not given
        on_hub = bool(name and len(name) <= MAX_TEXT and HUB_ID.fullmatch(name) and not Path(name).is_dir())
        self.hub_id = name if on_hub and not self.embedded else None
        shown = name if on_hub or name is None else last_part(name)
        self.name = plain(shown) or "an unnamed language model"
        self.argument = None if self.embedded else argument(self.name if name else "MODEL")


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


def _title(config: MxDConfig, base: _Base) -> str:
    methods = {config.layer(layer).method for layer in config.layers}
    kind = _METHODS[methods.pop()] if len(methods) == 1 else "decomposition"
    layers = f"layer{'s' if len(config.layers) > 1 else ''} {layer_ranges(config.layers)}"
    return f"{kind[0].upper()}{kind[1:]} of {base.name[:80]}, {layers}"


def _metadata(
    config: MxDConfig, evaluation: Mapping[str, Any], name: str, base: _Base, license_name: str | None
) -> ModelCardData:
    layers = [config.layer(layer) for layer in config.layers]
    runs = [get_nested(evaluation, "settings", "training"), *_finetunings(evaluation)]
    datasets = [name for run in runs for name in texts(get_nested(run, "text", "dataset"))]
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
        pipeline_tag="text-generation" if is_causal(config.base_model_type) else None,
        tags=[
            "mxd",
            *dict.fromkeys(METHOD_TAGS[layer.method] for layer in layers),
            "interpretability",
            *(f"mxd-layer-{layer}" for layer in config.layers),
        ],
        datasets=list(dict.fromkeys(filter(None, map(dataset_id, datasets))))[:MAX_NAMES] or None,
        license=plain(license_name) if license_name else None,
        model_name=name,
        eval_results=_eval_results(config, evaluation) or None,
        mxd=own if rise is None else own | {"cross_entropy_rise": rise},
    )


def _cross_entropy_rise(evaluation: Mapping[str, Any]) -> float | None:
    spliced = finite(get_nested(evaluation, "cross_entropy", "spliced"))
    untouched = finite(get_nested(evaluation, "cross_entropy", "untouched"))
    return None if spliced is None or untouched is None else finite(spliced - untouched)


def _rise_shown(evaluation: Mapping[str, Any]) -> Markup:
    """`+0.0081 ± 0.0012`, half the width of the 95 % interval where there is one."""
    shown = formatted(_cross_entropy_rise(evaluation), "+.4f")
    interval = get_nested(evaluation, "cross_entropy", "rise_interval")
    ends = [finite(end) for end in interval] if isinstance(interval, list) else []
    if shown == UNKNOWN or len(ends) != 2 or ends[0] is None or ends[1] is None:
        return shown
    return shown + " ± " + formatted((ends[1] - ends[0]) / 2, ".4f")


def _eval_results(config: MxDConfig, evaluation: Mapping[str, Any]) -> list[EvalResult]:
    text, names = _evaluated_on(evaluation)
    hub_ids = [name for name in names if dataset_id(name)]
    values = [
        ("cross_entropy_rise", "cross-entropy rise, nats per token", _cross_entropy_rise(evaluation)),
        ("cross_entropy_recovered", "recovered share", finite(get_nested(evaluation, "cross_entropy", "recovered"))),
    ]
    for layer in config.layers:
        result = get_nested(evaluation, "layers", str(layer))
        for key, label in _LAYER_METRICS.items():
            values.append((key, f"{label}, layer {layer}", finite(get_nested(result, key))))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub_ids[0] if len(names) == len(hub_ids) == 1 else "text",
            dataset_name=plain(", ".join(names)) or "unnamed text",
            dataset_config=plain(get_nested(text, "config_name")) or None,
            dataset_split=plain(get_nested(text, "split")) or None,
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
    text = get_nested(evaluation, "settings", "evaluation")
    if text is None:
        text = get_nested(evaluation, "settings", "training", "text")
        split = get_nested(text, "heldout_split")
        if texts(get_nested(text, "heldout_dataset")):  # it has no configuration of its own
            return {"split": split}, dataset_names(get_nested(text, "heldout_dataset"))
        if split is not None:
            text = {**text, "split": split}
    return text, _text_names(text)


def _text_names(text: Any) -> list[str]:
    """Names of the data sets that the settings of a text have; an empty list there is mxd's own text."""
    return [_EMBEDDED_TEXT] if get_nested(text, "dataset") == [] else dataset_names(get_nested(text, "dataset"))


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
        result = get_nested(evaluation, "layers", str(layer))
        errors = [
            formatted(get_nested(result, "nmse")),
            formatted(get_nested(result, "fvu")),
            formatted(get_nested(result, "l0"), ".1f"),
        ]
        shares = [percentage(get_nested(result, key)) for key in ("dead_experts", "expert_share", "specialised_share")]
        rows.append([layer, *errors, *shares])
    cross_entropy = get_nested(evaluation, "cross_entropy")
    settings = get_nested(evaluation, "settings")
    frequency = finite(get_nested(settings, "specialised_frequency"))
    return {
        "rows": rows,
        "cross_entropy": [
            formatted(get_nested(cross_entropy, key), ".4f") for key in ("untouched", "spliced", "zero_ablated")
        ]
        + [_rise_shown(evaluation), percentage(get_nested(cross_entropy, "recovered"))],
        "kl": formatted(get_nested(evaluation, "kl"), ".4f"),
        "agreement": percentage(get_nested(evaluation, "top1_agreement")),
        "tokens": formatted(get_nested(settings, "tokens"), ",.0f"),
        "dtype": get_nested(settings, "dtype"),
        "text": ", ".join(_evaluated_on(evaluation)[1]) or None,
        # What a training itself measured on is held out; null: it is not known what was trained on.
        "held_out": get_nested(settings, "evaluation", "held_out")
        if get_nested(settings, "evaluation") is not None
        else True,
        "specialised_frequency": formatted(0.25 if frequency is None else frequency, ".0f", 100, " %"),
    }


def _training(config: MxDConfig, base: _Base, training: Any) -> dict[str, Any] | None:
    """How it was made: lines of name and value, and the command; None where evaluation.json does not say."""
    if not isinstance(training, Mapping):
        return None
    method = config.layer(config.layers[0]).method
    if method == "mxd":  # what was made before there were sparse codes says nothing of them
        training = {"auxiliary_weight": 0.0, **training}
    start = [f"mxd decompose {quoted(base.argument)}" if base.argument else "mxd decompose"]
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
    runs = get_nested(evaluation, "settings", "finetuning")
    return [run for run in runs if isinstance(run, Mapping)][:MAX_NAMES] if isinstance(runs, list) else []


def _finetuning(run: Mapping[str, Any]) -> dict[str, Any]:
    """How it was trained on, as `_training` says it, and the figures of before."""
    source = next(iter(texts(run.get("decomposition"))), "FOLDER")
    loss = {"kl": ["--loss kl"], "cross_entropy": ["--loss cross-entropy"]}.get(str(run.get("loss")), [])
    before = {
        "Rise of cross-entropy before it": _rise_shown(get_nested(run, "before") or {}),
        "KL to the untouched model before it": formatted(get_nested(run, "before", "kl"), ".4f"),
    }
    command = _command([f"mxd finetune {quoted(dataset_id(source) or last_part(source))}"], loss, run)
    return {"lines": _lines(run) | _known(before), "command": _joined(command)}


def _lines(run: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values of what evaluation.json says of a training or of a fine-tuning."""
    versions = get_nested(run, "versions")
    versions = list(versions.items())[:MAX_NAMES] if isinstance(versions, Mapping) else []
    return _known(
        {
            "Training tokens": formatted(run.get("tokens_trained"), ",.0f"),
            "Text": ", ".join(_text_names(run.get("text"))) or None,
            "Context length": formatted(get_nested(run, "text", "context_length"), ",.0f"),
            "Tokens of a step": formatted(run.get("batch_tokens"), ",.0f"),
            "Learning rate": formatted(run.get("learning_rate"), "g"),
            "Its factor for the gate": formatted(run.get("gate_learning_rate_factor"), "g"),
            "Its factor for the modulations": formatted(run.get("modulation_learning_rate_factor"), "g"),
            "Gate starts from": run.get("gate_init"),
            "Encoder starts from": run.get("encoder_init"),
            "Decoder starts from": run.get("decoder_init"),
            "Modulations start from": run.get("modulation_init"),
            "Expert share asked for": formatted(run.get("min_mean_ablation_error"), "g"),
            "Weight of the sparse code": formatted(run.get("auxiliary_weight"), "g"),
            "Loss": run.get("loss"),
            "Weight of the layers' own error": formatted(run.get("nmse_weight"), "g"),
            "Activations scaled": _yes_or_no(run.get("scale_activations")),
            "Products in bfloat16": _yes_or_no(run.get("bf16")),
            "Dtype of the base model": run.get("dtype"),
            "Seed": formatted(run.get("seed"), ".0f"),
            "Device": run.get("device"),
            "Threads": formatted(run.get("threads"), ",.0f"),
            "Seconds": formatted(run.get("seconds"), ",.0f"),
            "Versions": ", ".join(f"{plain(name)[:40]} {plain(version)[:40]}" for name, version in versions) or None,
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
        option: texts(get_nested(run, "text", key))
        for option, key in (("--dataset", "dataset"), ("--heldout-dataset", "heldout_dataset"))
    }
    if sum(map(len, files.values())) > MAX_NAMES or finite(get_nested(run, "training", "num_train_epochs")) not in (
        None,
        1,
    ):
        return []
    lines = list(start)
    for option, names in files.items():
        lines += [f"{option} {quoted(dataset_id(name) or last_part(name))}" for name in names]
    if get_nested(run, "text", "streaming") is True:
        lines.append("--streaming")
    lines += chosen
    for option, keys in _OPTIONS.items():
        value = get_nested(run, *keys)
        if isinstance(value, str) and argument(value) == value:  # an altered one would be another command
            lines.append(f"{option} {quoted(value)}")
        elif (number := finite(value)) is not None and abs(number) < 1e15:
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
        autoescape=True, finalize=escaped, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(values)

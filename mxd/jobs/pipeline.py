"""The main job: from a pretrained model and text to a faithful decomposition in a folder."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed

from mxd import demo
from mxd.base.base_model import base_skeleton, check_safetensors, load_base_model, resolve_name
from mxd.data.packing import pack
from mxd.data.provenance import is_held_out, seen_in_training
from mxd.data.texts import (
    TextOptions,
    count_documents,
    evaluation_batches,
    evaluation_settings,
    load_documents,
    load_one,
    warn_of_embedded_text,
)
from mxd.evaluation import (
    ablation_curve,
    decomposition_ranks,
    faithfulness,
    load_evaluation,
    plot_ablation,
    plot_singular_values,
    save_evaluation,
)
from mxd.evaluation.faithfulness import EVALUATION_NAME
from mxd.hub_cards.reading import read_json
from mxd.modeling_mxd import MLPSite, MxDConfig, MxDLayerConfig, MxDModel, SurgeryError, find_mlps, site_of
from mxd.modeling_mxd.hierarchical_routing import default_num_expert_groups
from mxd.trainers import DistillationArguments, DistillationTrainer, last_complete_checkpoint
from mxd.trainers.parameter_budget import num_experts_matching_transcoder, num_latents_matching_transcoder

from .decompositions import check_base_of, load_base_of, load_decomposition, made_how, results_folder
from .runs import (
    RunOptions,
    asked_for,
    check_output,
    check_same_documents,
    prepare_output,
    resumed_start,
    run_training,
    save_results,
    step_arguments,
    warn_of_whole_rows,
)

logger = logging.getLogger(__name__)

LEARNING_RATES = {"mxd": 1e-3, "transcoder": 3e-3, "skip_transcoder": 3e-3}
"""Of a million tokens or so, by method."""
_ABLATION_FIGURE, _RANKS_FIGURE = "ablation.png", "smallest_singular_values.png"


@dataclass(kw_only=True)
class DecompositionOptions(RunOptions):
    """What `decompose` is asked for, beside what `RunOptions` has, with the command's defaults.

    Attributes:
        model, revision: the base model and its Hub revision.
        layers: indices of the layers to decompose; None for the middle one.
        stack, site: which stack of layers, and which of a layer's MLPs; see `modeling_mxd.find_mlps`.
        method: `"mxd"`, `"transcoder"` or `"skip_transcoder"`.
        num_experts_per_tok: K.
        num_experts: N; None to match a transcoder's parameters.
        match_transcoder: m, latents per input dimension of the transcoder whose parameters are matched.
        intermediate_size: width of the dense encoder; None for the MLP's own.
        num_groups_per_tok: hierarchical routing: experts in about √N groups, of which a token opens so many; None
            for the exact gate.
    """

    model: str = demo.MODEL_NAME
    revision: str | None = None
    layers: list[int] | None = None
    stack: str | None = None
    site: str = "mlp"
    method: str = "mxd"
    num_experts_per_tok: int = 32
    num_experts: int | None = None
    match_transcoder: int = 32
    intermediate_size: int | None = None
    num_groups_per_tok: int | None = None

    def __post_init__(self) -> None:
        defaults = {
            "learning_rate": LEARNING_RATES.get(self.method),
            # For an encoder of another width the pretrained one is no start.
            "encoder_init": "pretrained" if self.intermediate_size is None else "random",
        }
        self.training = {**defaults, **self.training}


def layer_config(site: MLPSite, options: DecompositionOptions) -> MxDLayerConfig:
    """Configuration of the layer that will stand for one MLP, sizes read from its weights."""
    if site.widths is None:
        raise SurgeryError(
            f"no rule finds the weights of layer {site.layer} ({', '.join(site.slots)}), which tell its sizes: build "
            "the MxDConfig yourself and use DistillationTrainer"
        )
    inputs, _, outputs = site.widths
    units = options.intermediate_size or site.active_units or inputs
    encoder_type = site.encoder_type
    if options.num_experts is not None:
        experts = options.num_experts
    elif options.method == "mxd":
        experts = num_experts_matching_transcoder(inputs, outputs, units, options.match_transcoder, encoder_type)
    else:
        skip = options.method == "skip_transcoder"
        experts = num_latents_matching_transcoder(inputs, outputs, options.match_transcoder, skip)
    return MxDLayerConfig(
        hidden_size=inputs,
        output_size=outputs,
        intermediate_size=units,
        num_experts=experts,
        num_experts_per_tok=options.num_experts_per_tok,
        # Where the MLP's own is none of transformers', the usual one of its form.
        hidden_act=site.hidden_act or ("silu" if encoder_type == "glu" else "gelu"),
        encoder_type=encoder_type,
        method=options.method,
        num_expert_groups=None if options.num_groups_per_tok is None else default_num_expert_groups(experts),
        num_groups_per_tok=options.num_groups_per_tok,
    )


def choose_layers(sites: dict[int, MLPSite], layers: list[int] | None) -> list[int]:
    """The layers asked for, or the middle one.

    Raises:
        ValueError: naming a layer that the model does not have, that has no MLP, or that is named twice.
    """
    there = [layer for layer, site in sites.items() if site.slots]
    if not there:
        raise ValueError(f"the model has no MLP to decompose: {sites[0].reason}")
    chosen = [there[len(there) // 2]] if layers is None else layers
    for layer in chosen:
        if chosen.count(layer) > 1:
            raise ValueError(f"layer {layer} is named more than once")
        site_of(sites, layer)
    return chosen


def build_config(model: PreTrainedModel, commit: str | None, options: DecompositionOptions) -> MxDConfig:
    """Configuration of the decomposition that the options ask for, of this base model, at this Hub commit.

    Raises:
        ValueError: as `choose_layers` and `layer_config`.
    """
    sites = find_mlps(model, options.stack, options.site)
    configs = {layer: layer_config(sites[layer], options) for layer in choose_layers(sites, options.layers)}
    return MxDConfig.from_layer_configs(
        configs,
        base_model_name_or_path=resolve_name(options.model),
        base_model_revision=commit,
        stack=options.stack,
        site=options.site,
    )


def check_resumable(folder: Path, config: MxDConfig) -> str:
    """The checkpoint to go on from.

    Raises:
        ValueError: when there is none, or it is of another decomposition than the options describe.
    """
    checkpoint = last_complete_checkpoint(folder)
    before = MxDConfig.from_pretrained(checkpoint)
    same = before.layers == config.layers and all(before.layer(i) == config.layer(i) for i in config.layers)
    same = same and before.where == config.where
    if not same or before.base_model_name_or_path != config.base_model_name_or_path:
        raise ValueError(f"{checkpoint} is of another model, layer or size: resume with the options of that run")
    if before.base_model_revision != config.base_model_revision:
        raise ValueError(
            f"{checkpoint} is of the base model at {before.base_model_revision}, not at {config.base_model_revision}: "
            "begin it anew with --overwrite"
        )
    return checkpoint


def decompose(options: DecompositionOptions) -> dict[str, Any]:
    """Replace MLPs by a decomposition, train it by distillation, measure it, and save all of it in a folder.

    Returns:
        What evaluation.json holds, see `mxd.evaluation.faithfulness`.

    Raises:
        ValueError: bad input of any kind (`SurgeryError`, `DataError`, `BaseModelError` are among them), before
            anything expensive.
        Interrupted: Ctrl-C in training; a checkpoint was saved.
    """
    folder = check_output(options.output, options.overwrite, options.resume)
    arguments = DistillationArguments(**step_arguments(options, folder))
    start, revision, context = {}, options.revision, options.text.context_length
    if options.resume:
        before = MxDConfig.from_pretrained(last_complete_checkpoint(folder))
        start = resumed_start(folder, options)
        revision = before.base_model_revision or revision  # the branch may have moved on since the run began
    # What the base model's config shows to be wrong is refused before text or weights are fetched.
    build_config(base_skeleton(options.model, revision, options.dtype, context), None, options)
    set_seed(options.seed)
    warn_of_whole_rows(options)
    warn_of_embedded_text(options.text, options.model)
    documents, heldout_documents = load_documents(options.text, options.seed)
    count = count_documents(documents, heldout_documents)
    check_same_documents(folder, start, count)
    model, tokenizer, commit = load_base_model(options.model, revision, options.dtype, context_length=context)
    check_safetensors(options.model, commit)
    config = build_config(model, commit, options)
    checkpoint = check_resumable(folder, config) if options.resume else None
    rows = pack(documents, tokenizer, context, seed=options.seed, repeat=True)
    heldout = evaluation_batches(heldout_documents, tokenizer, context, options.evaluation_tokens)
    decomposition = MxDModel(config)
    trainer = DistillationTrainer(decomposition, model, arguments, train_dataset=rows)
    prepare_output(folder, options, documents=count)  # only now, when nothing is left to be refused
    how = run_training(trainer, tokenizer, options, checkpoint)
    settings = {"training": {**run_settings(options, trainer, how), "documents": count}}
    results = faithfulness(model, decomposition, heldout, settings=settings, progress=not trainer.args.disable_tqdm)
    return save_results(results, decomposition, folder)


def run_settings(options: DecompositionOptions, trainer: DistillationTrainer, how: dict[str, Any]) -> dict[str, Any]:
    """How a decomposition was made, for evaluation.json; `how` is what `run_training` gave."""
    arguments = trainer.args
    of_mxd = ("encoder_init", "decoder_init", "modulation_init")
    terms = ("min_mean_ablation_error", "mean_ablation_weight", "auxiliary_weight")
    names = ("gate_init", *(of_mxd + terms if options.method == "mxd" else ()))
    chosen = {name: getattr(arguments, name) for name in names}
    if chosen.get("encoder_init") == "random":
        chosen["decoder_init"] = "zero"  # the pretrained one reads the pretrained encoder's units
    return {
        **asked_for(options),
        **chosen,
        **how,
        "model": trainer.model.config.base_model_name_or_path,
        "layers": trainer.model.config.layers,
        "loss": arguments.loss_normalization,
    }


def evaluate(
    decomposition: str,
    text: TextOptions,
    tokens: int = 32768,
    dtype: str = "float32",
    progress: bool = False,
    ablation: str | None = None,
    ranks: bool = False,
    output: str | None = None,
) -> dict[str, Any]:
    """Measure a saved decomposition on text and write evaluation.json into its folder.

    Args:
        decomposition: folder or Hub id.
        text, tokens, dtype, progress: on what and how.
        ablation: also an `ablation_curve` in this order, as "ablation" and figures/ablation.png.
        ranks: also the `expert_ranks` of MxD layers, as "ranks" and figures/smallest_singular_values.png.
        output: folder to write into instead; of a decomposition on the Hub there has to be one.

    Raises:
        ValueError: when there is no decomposition, or the text cannot be read.
    """
    folder = results_folder(decomposition, output)
    earlier = _earlier(folder)  # already now: what cannot be read is refused before anything is measured
    made = made_how(decomposition)
    loaded = load_decomposition(decomposition)
    methods = {loaded.config.layer(layer).method for layer in loaded.config.layers}
    if ranks and methods != {"mxd"}:
        raise ValueError("only an MxD's experts have a rank: leave --ranks out for a transcoder")
    check_base_of(loaded, dtype, text.context_length)
    documents = load_one(text)
    model, tokenizer = load_base_of(loaded, dtype, text.context_length)
    batches = evaluation_batches(documents, tokenizer, text.context_length, tokens)
    if seen := seen_in_training(made, text):
        logger.warning("this decomposition was trained on %s: the text is not held out", ", ".join(seen))
    settings = {"evaluation": {**evaluation_settings(text, dtype), "held_out": is_held_out(made, seen)}, **made}
    results = faithfulness(model, loaded, batches, settings=settings, progress=progress)
    own = folder.resolve() == Path(decomposition).resolve()
    results = _still_true(earlier, results, own, folder / "figures") | results
    folder.mkdir(parents=True, exist_ok=True)
    save_evaluation(results, folder)  # already now: what follows may take longer than this did
    figures = folder / "figures"
    if ablation is not None or ranks:
        figures.mkdir(exist_ok=True)
    if ablation is not None:
        curve = ablation_curve(model, loaded, batches, order=ablation, progress=progress)
        results["ablation"] = curve
        plot_ablation({"all layers": curve}, figures / _ABLATION_FIGURE)
    if ranks:
        measured = decomposition_ranks(loaded)
        results["ranks"] = {str(layer): rank.summary() for layer, rank in measured.items()}
        smallest = {f"layer {layer}": rank.smallest for layer, rank in measured.items()}
        plot_singular_values(smallest, figures / _RANKS_FIGURE)
    save_evaluation(results, folder)
    return load_evaluation(folder)


def _earlier(folder: Path) -> dict[str, Any]:
    """The evaluation that a folder holds and that will be replaced, if any.

    Raises:
        ValueError: it cannot be read.
    """
    path = folder / EVALUATION_NAME
    try:
        return read_json(path) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"of {folder}, {error}: move it away, or name another --output") from None


def _still_true(before: dict[str, Any], results: dict[str, Any], own: bool, figures: Path) -> dict[str, Any]:
    """What the evaluation that is replaced measured and still holds: of the folder's own weights ranks, and on the same
    tokens the ablation. Figures of what does not are removed."""
    settings = before.get("settings")
    same = (
        own
        and isinstance(settings, dict)
        and all(settings.get(name) == results["settings"][name] for name in ("evaluation", "tokens", "dtype"))
    )
    kept = {"ranks": (own, _RANKS_FIGURE), "ablation": (same, _ABLATION_FIGURE)}
    for holds, figure in kept.values():
        if not holds:
            (figures / figure).unlink(missing_ok=True)
    return {name: before[name] for name, (holds, _) in kept.items() if holds and name in before}

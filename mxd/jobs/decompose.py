"""`mxd decompose`: replace MLPs of a pretrained model by a decomposition, train it, and measure it."""

from typing import Any

from transformers import PreTrainedModel, set_seed

from mxd.base.base_model import base_skeleton, check_safetensors, load_base_model, resolve_name
from mxd.base.pretrained_weights import mlp_active_units, mlp_encoder_type, mlp_hidden_act, mlp_widths
from mxd.data.packing import pack
from mxd.data.provenance import is_held_out, sketch
from mxd.data.texts import (
    count_documents,
    evaluation_batches,
    evaluation_settings,
    load_documents,
    warn_of_embedded_text,
)
from mxd.evaluation import faithfulness
from mxd.modeling_mxd import MLPSite, MxDConfig, MxDLayerConfig, MxDModel, SurgeryError, find_mlps, site_of
from mxd.trainers import DistillationArguments, DistillationTrainer, last_complete_checkpoint
from mxd.trainers.parameter_budget import num_experts_matching_transcoder, num_latents_matching_transcoder
from mxd.trainers.router import default_num_expert_groups

from .options import DecompositionOptions
from .run_folder import check_output, check_same_documents, prepare_output, resumed_start
from .training import asked_for, make_arguments, run_training, save_results


def layer_config(site: MLPSite, options: DecompositionOptions) -> MxDLayerConfig:
    """Return the configuration of the layer that replaces an MLP; raise `SurgeryError` if no rule finds its weights."""
    widths = mlp_widths(site)
    if widths is None:
        raise SurgeryError(
            f"no rule finds the weights of layer {site.layer}: build the MxDConfig yourself and use DistillationTrainer"
        )
    inputs, _, outputs = widths
    units = options.intermediate_size or mlp_active_units(site) or inputs
    encoder_type = mlp_encoder_type(site)
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
        # The usual one of its form, where the MLP's own is not one of transformers'.
        hidden_act=mlp_hidden_act(site) or ("silu" if encoder_type == "glu" else "gelu"),
        encoder_type=encoder_type,
        method=options.method,
        num_expert_groups=None if options.num_groups_per_tok is None else default_num_expert_groups(experts),
        num_groups_per_tok=options.num_groups_per_tok,
    )


def choose_layers(sites: dict[int, MLPSite], layers: list[int] | None) -> list[int]:
    """Return the layers asked for, or the middle one; raise `ValueError` if one has no MLP or is not there."""
    there = [layer for layer, site in sites.items() if site.slots]
    if not there:
        raise ValueError(f"the model has no MLP to decompose: {sites[0].reason}")
    chosen = [there[len(there) // 2]] if layers is None else layers
    for layer in chosen:
        site_of(sites, layer)
    return chosen


def build_config(model: PreTrainedModel, commit: str | None, options: DecompositionOptions) -> MxDConfig:
    """Return the configuration of the decomposition of a base model, which may be without weights, at a Hub commit."""
    sites = find_mlps(model, options.stack, options.site)
    configs = {layer: layer_config(sites[layer], options) for layer in choose_layers(sites, options.layers)}
    return MxDConfig.from_layer_configs(
        configs,
        base_model_name_or_path=resolve_name(options.model),
        base_model_revision=commit,
        stack=options.stack,
        site=options.site,
    )


def decompose(options: DecompositionOptions) -> dict[str, Any]:
    """Replace MLPs by a decomposition, train it by distillation, measure it, and save all of it in a folder.

    Returns:
        The content of evaluation.json, see `mxd.evaluation.faithfulness`.

    Raises:
        ValueError: bad input of any kind (`SurgeryError`, `DataError`, `BaseModelError` among them), before anything
            expensive runs.
        Interrupted: Ctrl-C during training; a checkpoint was saved.
    """
    folder = check_output(options)
    arguments = make_arguments(DistillationArguments, options, folder)
    start: dict[str, Any] = {}
    checkpoint, revision, context = None, options.revision, options.context_length
    if options.resume:
        checkpoint = last_complete_checkpoint(folder)
        start = resumed_start(folder, options)
        # The branch may have moved since the run began.
        revision = MxDConfig.from_pretrained(checkpoint).base_model_revision or revision
    # Refuse what the base model's config shows to be wrong before text or weights are fetched.
    build_config(base_skeleton(options.model, revision, options.dtype, context), None, options)
    set_seed(options.seed)
    warn_of_embedded_text(options.text, options.model)
    documents, heldout_documents = load_documents(options.text, options.seed)
    count = count_documents(documents, heldout_documents)
    check_same_documents(folder, start, count)
    model, tokenizer, commit = load_base_model(options.model, revision, options.dtype, context_length=context)
    check_safetensors(options.model, commit)
    rows = pack(documents, tokenizer, context, seed=options.seed, repeat=True)
    heldout = evaluation_batches(heldout_documents, tokenizer, context, options.evaluation_tokens)
    decomposition = MxDModel(build_config(model, commit, options))
    trainer = DistillationTrainer(decomposition, model, arguments, train_dataset=rows)
    prepare_output(folder, "decompose", options, documents=count)  # nothing is refused from here on
    how = run_training(trainer, tokenizer, options, checkpoint)
    made = {
        **run_settings(options, trainer, how),
        "documents": count,
        "sketch": sketch(options.text, documents, options.seed),
    }
    settings: dict[str, Any] = {"training": made}
    if options.text.heldout_dataset or options.text.heldout_split:  # it may hold documents of the training's
        held_out = is_held_out(settings, options.text, heldout_documents, options.seed)
        settings["evaluation"] = evaluation_settings(options.text, options.dtype) | {"held_out": held_out}
    results = faithfulness(model, decomposition, heldout, settings=settings, progress=not trainer.args.disable_tqdm)
    return save_results(results, decomposition, folder)


def run_settings(options: DecompositionOptions, trainer: DistillationTrainer, how: dict[str, Any]) -> dict[str, Any]:
    """Return how a decomposition was made, for evaluation.json; `how` is what `run_training` returned."""
    of_mxd = ("encoder_init", "decoder_init", "modulation_init", "min_mean_ablation_error", "mean_ablation_weight",
              "auxiliary_weight")  # fmt: skip
    names = ("gate_init", *(of_mxd if options.method == "mxd" else ()))
    chosen = {name: getattr(trainer.args, name) for name in names}
    if chosen.get("encoder_init") == "random":
        chosen["decoder_init"] = "zero"  # the pretrained decoder reads the pretrained encoder's units
    return {
        **asked_for(options),
        **chosen,
        **how,
        "model": trainer.model.config.base_model_name_or_path,
        "layers": trainer.model.config.layers,
        "loss": trainer.args.loss_normalization,
    }

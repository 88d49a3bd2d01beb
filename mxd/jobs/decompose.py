"""`mxd decompose`: replace MLPs of a pretrained model by a decomposition, train it, and measure it."""

import gc
import logging
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from mxd.base.base_model import base_skeleton, check_safetensors, load_base_model, resolve_name
from mxd.base.layer_names import layer_names
from mxd.base.pretrained_weights import (
    check_widths,
    mlp_active_units,
    mlp_encoder_type,
    mlp_hidden_act,
    mlp_widths,
    record_base,
)
from mxd.base.processes import in_first_process, joined, wait_for_all
from mxd.data.packing import materialize, pack, take_tokens
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
from mxd.modeling_mxd.surgery import written_sites
from mxd.trainers import DistillationArguments, DistillationTrainer
from mxd.trainers.checkpoints import write_decomposition
from mxd.trainers.decomposition_trainer import CALIBRATION_TOKENS
from mxd.trainers.distillation_trainer import check_layers
from mxd.trainers.expert_shards import ShardedTrainer
from mxd.trainers.parameter_budget import num_experts_matching_transcoder, num_latents_matching_transcoder
from mxd.trainers.router import default_num_expert_groups

from .costs import base_cost, layer_cost, work_of
from .layer_passes import LayerPass, groups_of, join_layers, join_logs, join_runs, level_groups, split_layers
from .options import DecompositionOptions
from .run_folder import begun, check_same_documents, prepare_output
from .training import asked_for, cached_rows, make_arguments, run_training, save_beside, save_results

logger = logging.getLogger(__name__)


def layer_config(site: MLPSite, options: DecompositionOptions) -> MxDLayerConfig:
    """Return the configuration of the layer that replaces an MLP; raise `SurgeryError` if no rule finds its weights."""
    widths = mlp_widths(site)
    if widths is None:
        raise SurgeryError(
            f"no rule finds the weights of layer {site.layer}: build the MxDConfig yourself and use DistillationTrainer"
        )
    inputs, outputs = widths[0], widths[2] * options.num_output_layers
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
        num_output_layers=options.num_output_layers,
    )


def choose_layers(sites: dict[int, MLPSite], layers: list[int] | Literal["all"] | None) -> list[int]:
    """Return the layers asked for, or the middle one; raise `ValueError` if one has no MLP or is not there."""
    there = [layer for layer, site in sites.items() if site.slots]
    if not there:
        raise ValueError(f"the model has no MLP to decompose: {sites[0].reason}")
    if layers == "all":
        if left_out := sites.keys() - set(there):
            first = min(left_out)
            logger.warning("%s left out: %s", layer_names(sorted(left_out)), sites[first].reason)
        return there
    chosen = [there[len(there) // 2]] if layers is None else layers
    for layer in chosen:
        site_of(sites, layer)
    return chosen


def options_of_layer(options: DecompositionOptions, layer: int) -> DecompositionOptions:
    """Return the options with those of `per_layer` for one layer; a `match_transcoder` there sets its `num_experts`."""
    own: dict[str, Any] = dict(options.per_layer.get(layer, {}))
    if "match_transcoder" in own:
        own.setdefault("num_experts", None)
    return replace(options, **own)


def build_config(model: PreTrainedModel, commit: str | None, options: DecompositionOptions) -> MxDConfig:
    """Return the configuration of the decomposition of a base model, which may be without weights, at a Hub commit."""
    sites = find_mlps(model, options.stack, options.site)
    layers = choose_layers(sites, options.layers)
    if unknown := options.per_layer.keys() - set(layers):
        raise ValueError(f"per_layer sets layer {min(unknown)}, which is not decomposed: {layer_names(layers)} are")
    configs = {layer: layer_config(sites[layer], options_of_layer(options, layer)) for layer in layers}
    config = MxDConfig.from_layer_configs(
        configs,
        base_model_name_or_path=resolve_name(options.model),
        base_model_revision=commit,
        stack=options.stack,
        site=options.site,
    )
    for layer, one in configs.items():
        check_widths(written_sites(sites, layer, one.num_output_layers), one)
    return config


def decompose(options: DecompositionOptions) -> dict[str, Any]:
    """Replace MLPs by a decomposition, train it by distillation, measure it, and save all of it in a folder.

    Several processes, as torchrun starts them, train together. The first one writes and measures; all return the same.

    Returns:
        The content of evaluation.json, see `mxd.evaluation.faithfulness`.

    Raises:
        ValueError: bad input of any kind (`SurgeryError`, `DataError`, `BaseModelError` among them), before anything
            expensive runs.
        Interrupted: Ctrl-C during training; a checkpoint was saved.
    """
    folder = Path(options.output)
    arguments = make_arguments(DistillationArguments, options, folder)
    start = in_first_process(lambda: begun(options))
    # The branch may have moved since the run began.
    revision, context = start.get("commit") or options.revision, options.context_length
    # Refuse what the base model's config shows to be wrong before text or weights are fetched.
    build_config(base_skeleton(options.model, revision, options.dtype, context), None, options)
    set_seed(options.seed)
    warn_of_embedded_text(options.text, options.model)
    documents, heldout_documents = load_documents(options.text, options.seed)
    count = count_documents(documents, heldout_documents)
    check_same_documents(folder, start, count)
    model, tokenizer, commit = load_base_model(options.model, revision, options.dtype, context_length=context)
    check_safetensors(options.model, commit)
    heldout = evaluation_batches(heldout_documents, tokenizer, context, options.evaluation_tokens)
    config = build_config(model, commit, options)
    groups = start.get("groups") or layer_groups(config, model, options)
    training = LayersTraining(config, model, tokenizer, documents, options, arguments, groups)
    training.begin()
    if not start:  # nothing is refused from here on
        facts = {"documents": count, "commit": commit, "groups": groups}
        in_first_process(lambda: prepare_output(folder, "decompose", options, **facts))
    training.run()

    def measure() -> dict[str, Any]:
        decomposition, made = training.result()
        how = {**made, "documents": count, "sketch": sketch(options.text, documents, options.seed)}
        settings: dict[str, Any] = {"training": how}
        if options.text.heldout_dataset or options.text.heldout_split:  # it may hold documents of the training's
            held_out = is_held_out(settings, options.text, heldout_documents, options.seed)
            settings["evaluation"] = evaluation_settings(options.text, options.dtype) | {"held_out": held_out}
        results = faithfulness(model, decomposition, heldout, settings=settings, progress=not arguments.disable_tqdm)
        return save_results(results, decomposition, folder)

    return in_first_process(measure)


def layer_groups(config: MxDConfig, model: PreTrainedModel, options: DecompositionOptions) -> list[list[int]]:
    """Return the groups of layers that train in one pass each: of `layers_per_pass`, or one a process that shards them.

    Raises:
        ValueError: there are fewer layers than processes, or layers that wait for one another.
    """
    layers, spread = config.layers, joined() if options.shard == "layers" else 1
    if spread > 1 and options.sequential:
        raise ValueError("sequential layers train one after another, and cannot be shared: no --shard layers")
    if options.layers_per_pass is not None or spread == 1:
        return groups_of(layers, options.layers_per_pass or len(layers))
    if spread > len(layers):
        raise ValueError(f"{spread} processes cannot share {len(layers)} layers: start at most {len(layers)}")
    sites, size, auxiliary = find_mlps(model, **config.where), model.dtype.itemsize, options.auxiliary_weight > 0
    costs = {
        layer: layer_cost(config.layer(layer), [sites[i] for i in config.written_layers(layer)], size, auxiliary)
        for layer in layers
    }
    return level_groups(layers, spread, work_of(base_cost(model, sites, size, options.context_length), config, costs))


@dataclass
class LayersTraining:
    """Train the layers of a decomposition in one pass of the base model over the rows, or in several.

    With `shard="layers"`, every process takes its turn of the passes, and trains them by itself.
    """

    config: MxDConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    documents: Dataset | IterableDataset
    options: DecompositionOptions
    arguments: DistillationArguments
    groups: list[list[int]]

    def __post_init__(self) -> None:
        self.passes = split_layers(self.config, Path(self.options.output), self.groups)
        self.processes = joined() if self.options.shard == "layers" else 1
        self.own = self.passes[self.arguments.rank :: self.processes] if self.processes > 1 else self.passes
        self.cached: dict[str, Any] | None = None

    def make_trainer(self, one: LayerPass) -> DistillationTrainer:
        """Return the trainer of a pass, which is the same whether other passes came before it or not."""
        set_seed(self.options.seed)
        arguments = copy(self.arguments)
        arguments.output_dir = str(one.folder)
        if self.cached is None:
            data: dict[str, Any] = {"train_dataset": self.rows(repeat=True)}
        else:
            data, arguments.train_sampling_strategy = self.cached, "sequential"
        kind = DistillationTrainer if arguments.shards == 1 else ShardedTrainer
        return kind(MxDModel(one.config), self.model, arguments, **data)

    def rows(self, repeat: bool) -> IterableDataset:
        """Return the rows to train on, in their order."""
        options = self.options
        return pack(self.documents, self.tokenizer, options.context_length, seed=options.seed, repeat=repeat)

    def record(self, folder: Path) -> dict[str, Any]:
        """Return the rows to train on, with the activations of all layers, which are in a folder or recorded there."""
        output, folder = Path(self.options.output).resolve(), folder.resolve()
        if output == folder or output in folder.parents:
            raise ValueError(f"the cache {folder} would be emptied with the output folder: name one outside of it")
        arguments, context = self.arguments, self.options.context_length
        rows = arguments.per_device_train_batch_size
        count = arguments.max_steps * rows * arguments.gradient_accumulation_steps
        count = count if count > 0 else -(-self.options.tokens // context)
        # A short training is measured on more rows: at least a token for each expert, and none is a row's first.
        calibrated = arguments.calibration_tokens or min(CALIBRATION_TOKENS, count * context)
        experts = max(self.config.layer(layer).num_experts for layer in self.config.layers)
        measured = max(calibrated, experts, arguments.statistics_tokens or 0)
        count = max(count, -(-measured // (context - 1)) + rows)
        ids = materialize(take_tokens(self.rows(repeat=False), count * context))[:]["input_ids"]
        progress = not arguments.disable_tqdm
        return cached_rows(folder, self.model, self.config, ids, self.options, progress, count)

    def begin(self) -> None:
        """Make the trainer of the first pass that is not finished; raise what any layer or argument is refused for.

        Before that, activations are recorded if there is a `cache`. Nothing is read of an output folder that the run
        replaces.
        """
        if self.arguments.push_to_hub and len(self.passes) > 1:
            raise ValueError("push_to_hub would push the layers of each pass alone: push the result with `mxd push`")
        self.config.check_memory(torch.get_default_dtype())
        check_layers(self.config, self.model, self.arguments)
        if self.options.cache is not None:
            self.cached = self.record(Path(self.options.cache))
        waiting = [one for one in self.own if not (self.options.resume and one.finished)]
        self.trainer = self.make_trainer(waiting[0]) if waiting else None

    def run(self) -> None:
        """Train what is not finished. With `sequential`, the layers of finished passes stay in the base model."""
        try:
            with ExitStack() as replaced:
                for one in self.own:
                    if not one.finished:
                        self.train(one)
                        gc.collect()  # the optimizer of a training is in reference cycles
                    if self.options.sequential and one is not self.own[-1]:
                        replaced.enter_context(one.load().spliced(self.model, cast=False))
        except Exception as error:
            vars(error)["of_one_process"] = self.processes > 1
            raise
        wait_for_all()

    def result(self) -> tuple[MxDModel, dict[str, Any]]:
        """Return the decomposition, saved in the output folder, and how it was made; in the first process."""
        if len(self.passes) == 1:
            return self.trained
        decomposition = join_layers(self.passes, self.config)
        record_base(decomposition, self.model)
        self.save(decomposition)
        return decomposition, join_runs(self.passes, self.config.layers, self.processes)

    def train(self, one: LayerPass) -> None:
        """Train the layers of a pass, or go on; keep no trainer."""
        trainer, self.trainer = self.trainer or self.make_trainer(one), None
        how = run_training(trainer, self.tokenizer, self.options, one.checkpoint)
        made = run_settings(self.options, trainer, how)
        if not one.is_part:
            self.trained = trainer.model, made
        elif self.processes > 1:
            one.keep(made)
        else:
            in_first_process(lambda: one.keep(made))

    def save(self, decomposition: MxDModel) -> None:
        """Save the layers of all passes in the output folder, as the training of one pass does."""
        folder = Path(self.options.output)
        write_decomposition(decomposition, folder, None, self.arguments)
        save_beside(self.tokenizer, join_logs(self.passes), folder)


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

"""The main job: from a pretrained model and text to a faithful decomposition in a folder."""

import json
import platform
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, set_seed

from evaluation_mxd import faithfulness, load_evaluation, plot_expert_frequency, plot_training_loss, save_evaluation
from modeling_mxd import (
    MLPSite,
    MxDConfig,
    MxDLayerConfig,
    MxDModel,
    find_mlps,
    num_experts_matching_transcoder,
    num_latents_matching_transcoder,
)
from modeling_mxd.hierarchical_routing import default_num_expert_groups
from trainers import (
    CausalCollator,
    DistillationArguments,
    DistillationTrainer,
    last_complete_checkpoint,
    load_text,
    materialize,
    pack,
    split_documents,
    take_tokens,
)

from . import embedded
from .base_model import load_base_model, resolve_name

LOG_NAME = "training_log.json"

Documents: TypeAlias = Dataset | IterableDataset


class Interrupted(Exception):
    """Training was interrupted after a checkpoint was saved; the message says how to go on."""


@dataclass
class TextOptions:
    """Which text, and how it becomes rows of tokens.

    Attributes:
        dataset: Hub name, or files, folders and globs; empty for the embedded sample.
        heldout_dataset: text to evaluate on; by default documents held out of `dataset`.
        config_name, split, text_column, revision: of the dataset.
        streaming: read a Hub dataset as it comes instead of downloading it first.
        context_length: tokens a row, BOS included.
    """

    dataset: list[str] = field(default_factory=list)
    heldout_dataset: list[str] = field(default_factory=list)
    config_name: str | None = None
    split: str = "train"
    text_column: str = "text"
    streaming: bool = False
    context_length: int = 128


@dataclass
class DecompositionOptions:
    """What `decompose` is asked for; the command's options by the same names.

    Attributes:
        model, revision, dtype: the base model, its Hub revision, and the dtype that it runs in.
        layers: indices of the layers to decompose; None for the middle one.
        method: `"mxd"`, `"transcoder"` or `"skip_transcoder"`.
        num_experts_per_tok: K.
        num_experts: N; None to match a transcoder's parameters.
        match_transcoder: m, latents per input dimension of the transcoder whose parameters are matched.
        intermediate_size: width of the dense encoder; None for the MLP's own.
        num_groups_per_tok: hierarchical routing: experts in about √N groups, of which a token opens so many; None
            for the exact gate.
        tokens: training tokens.
        batch_tokens: tokens of one optimiser step.
        evaluation_tokens: held-out tokens to evaluate on.
        seed: of data order and initialisation.
        output: folder for the result.
        overwrite, resume: replace what is in `output`, or go on from its last checkpoint.
        text: see `TextOptions`.
        training: further fields of `DistillationArguments`.
    """

    model: str = embedded.MODEL_NAME
    revision: str | None = None
    dtype: str = "float32"
    layers: list[int] | None = None
    method: str = "mxd"
    num_experts_per_tok: int = 32
    num_experts: int | None = None
    match_transcoder: int = 32
    intermediate_size: int | None = None
    num_groups_per_tok: int | None = None
    tokens: int = 1_000_000
    batch_tokens: int = 2048
    evaluation_tokens: int = 32768
    seed: int = 0
    output: str = "mxd-output"
    overwrite: bool = False
    resume: bool = False
    text: TextOptions = field(default_factory=TextOptions)
    training: dict[str, Any] = field(default_factory=dict)


def layer_config(site: MLPSite, options: DecompositionOptions) -> MxDLayerConfig:
    """Configuration of the layer that will stand for one MLP, sizes read from its weights."""
    weights = site.weights()
    inputs, outputs = weights.encoder.shape[1], weights.decoder.shape[0]
    units = options.intermediate_size or weights.encoder.shape[0]
    encoder_type = site.architecture.encoder_type
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
        hidden_act=site.hidden_act,
        encoder_type=encoder_type,
        method=options.method,
        num_expert_groups=None if options.num_groups_per_tok is None else default_num_expert_groups(experts),
        num_groups_per_tok=options.num_groups_per_tok,
    )


def choose_layers(sites: dict[int, MLPSite], layers: list[int] | None) -> list[int]:
    """The layers asked for, or the middle one.

    Raises:
        ValueError: naming a layer that the model does not have, or that is named twice.
    """
    chosen = [len(sites) // 2] if layers is None else layers
    for layer in chosen:
        if chosen.count(layer) > 1:
            raise ValueError(f"layer {layer} is named more than once")
        if layer not in sites:
            raise ValueError(f"layer {layer} is out of range: the model has layers 0 to {len(sites) - 1}")
    return chosen


def check_output(output: str, overwrite: bool, resume: bool) -> Path:
    """The output folder, if it may be written to; nothing is made or deleted yet.

    Raises:
        ValueError: when it holds something and neither overwriting nor resuming was asked for, or something that
            is no decomposition.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output {folder} is a file: name a folder with --output")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        if not overwrite:
            raise ValueError(f"the output folder {folder} is not empty: pass --overwrite to replace it, or --resume")
        if not _ours(folder):
            raise ValueError(f"the output folder {folder} holds no decomposition: --overwrite will not delete it")
    return folder


def _ours(folder: Path) -> bool:
    config = folder / "config.json"
    if config.is_file():
        return bool(json.loads(config.read_text()).get("model_type") == MxDConfig.model_type)
    return all(entry.name.startswith("checkpoint-") for entry in folder.iterdir())


def check_resumable(folder: Path, config: MxDConfig) -> str:
    """The checkpoint to go on from.

    Raises:
        ValueError: when there is none, or it is of another decomposition than the options describe.
    """
    checkpoint = last_complete_checkpoint(folder)
    before = MxDConfig.from_pretrained(checkpoint)
    same = before.layers == config.layers and all(before.layer(i) == config.layer(i) for i in config.layers)
    if not same or before.base_model_name_or_path != config.base_model_name_or_path:
        raise ValueError(f"{checkpoint} is of another model, layer or size: resume with the options of that run")
    return checkpoint


def load_documents(text: TextOptions, seed: int) -> tuple[Documents, Documents]:
    """Training documents and held-out documents.

    Raises:
        DataError: as `trainers.load_text`.
    """
    if not text.dataset and not text.heldout_dataset:
        return load_text(str(embedded.text_path("train"))), load_text(str(embedded.text_path("heldout")))
    loading: dict[str, Any] = {"text_column": text.text_column, "streaming": text.streaming}
    source = text.dataset or [str(embedded.text_path("train"))]
    documents = load_text(source, config_name=text.config_name, split=text.split, **loading)
    if text.heldout_dataset:
        return documents, load_text(text.heldout_dataset, **loading)
    return split_documents(documents, seed=seed)


def evaluation_batches(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, context_length: int, tokens: int
) -> list[dict[str, torch.Tensor]]:
    """Held-out rows in batches of about 2,048 tokens, shuffled with a fixed seed, at most `tokens` in all."""
    rows = materialize(take_tokens(pack(documents, tokenizer, context_length, seed=0), tokens))
    size, collate = max(1, 2048 // context_length), CausalCollator()
    return [
        collate([rows[index] for index in range(start, min(start + size, len(rows)))])
        for start in range(0, len(rows), size)
    ]


def training_arguments(options: DecompositionOptions, folder: Path) -> DistillationArguments:
    """`DistillationArguments` for these options: rows per step, steps, checkpoints; `options.training` goes over."""
    rows = max(1, options.batch_tokens // options.text.context_length)
    steps = max(1, options.tokens // (rows * options.text.context_length))
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": rows,
        "max_steps": steps,
        "lr_scheduler_type": "linear",
        "save_steps": max(1, min(500, steps // 4)),
        "save_total_limit": 1,
        "seed": options.seed,
        "disable_tqdm": False,  # the stock default follows transformers' verbosity
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return DistillationArguments(**{**defaults, **options.training})


def decompose(options: DecompositionOptions) -> dict[str, Any]:
    """Replace MLPs by a decomposition, train it by distillation, measure it, and save all of it in a folder.

    Returns:
        What evaluation.json holds, see `evaluation_mxd.faithfulness`.

    Raises:
        ValueError: bad input of any kind (`SurgeryError`, `DataError`, `BaseModelError` are among them), before
            anything expensive.
        Interrupted: Ctrl-C in training; a checkpoint was saved.
    """
    set_seed(options.seed)
    folder = check_output(options.output, options.overwrite, options.resume)
    documents, heldout_documents = load_documents(options.text, options.seed)
    model, tokenizer, commit = load_base_model(options.model, options.revision, options.dtype)
    sites = find_mlps(model)
    configs = {layer: layer_config(sites[layer], options) for layer in choose_layers(sites, options.layers)}
    config = MxDConfig.from_layer_configs(
        configs, base_model_name_or_path=resolve_name(options.model), base_model_revision=commit
    )
    checkpoint = check_resumable(folder, config) if options.resume else None
    context = options.text.context_length
    rows = pack(documents, tokenizer, context, seed=options.seed, repeat=True)
    heldout = evaluation_batches(heldout_documents, tokenizer, context, options.evaluation_tokens)
    decomposition = MxDModel(config)
    trainer = DistillationTrainer(decomposition, model, training_arguments(options, folder), train_dataset=rows)
    if folder.is_dir() and not options.resume:  # only now, when nothing is left to be refused
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.interrupted:
        raise Interrupted(
            f"interrupted at step {trainer.state.global_step} of {trainer.state.max_steps}; the checkpoint is kept in "
            f"{folder}: run the same command with --resume to go on"
        )
    trainer.save_model()
    tokenizer.save_pretrained(folder)  # so that pipelines find it beside the decomposition
    (folder / LOG_NAME).write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
    settings = {"training": run_settings(options, trainer, time.monotonic() - started)}
    results = faithfulness(model, decomposition, heldout, settings=settings, progress=not trainer.args.disable_tqdm)
    save_evaluation(results, folder)
    draw(decomposition, trainer.state.log_history, folder)
    for unneeded in folder.glob("checkpoint-*"):
        shutil.rmtree(unneeded)
    return load_evaluation(folder)


def run_settings(options: DecompositionOptions, trainer: DistillationTrainer, seconds: float) -> dict[str, Any]:
    """How a decomposition was made, for evaluation.json."""
    arguments = trainer.args
    starts = ("gate_initialization", "encoder_initialization", "modulation_initialization")
    rates = ("learning_rate", "gate_learning_rate_factor", "modulation_learning_rate_factor")
    names = (*rates, *starts, "scale_activations", "bf16")
    return {
        **{name: value for name, value in asdict(options).items() if name not in ("output", "overwrite", "resume")},
        **{name: getattr(arguments, name) for name in names},
        "model": trainer.model.config.base_model_name_or_path,
        "layers": trainer.model.config.layers,
        "loss": arguments.loss_normalization,
        "tokens_trained": arguments.max_steps * arguments.per_device_train_batch_size * options.text.context_length,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "device": str(arguments.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def draw(decomposition: MxDModel, log_history: list[dict[str, Any]], folder: Path) -> None:
    """Plots of the training loss and of how often each expert is used, into `folder/figures`."""
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    plot_training_loss(log_history, figures / "training_loss.png")
    frequencies = {f"layer {i}": decomposition.layer(i).expert_frequency for i in decomposition.config.layers}
    plot_expert_frequency(frequencies, figures / "expert_frequency.png")


def evaluate(
    folder: str, text: TextOptions, tokens: int = 32768, dtype: str = "float32", progress: bool = False
) -> dict[str, Any]:
    """Measure a saved decomposition on text and write evaluation.json into its folder.

    Raises:
        ValueError: when the folder holds no decomposition, or the text cannot be read.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds no decomposition: there is no config.json in it")
    if json.loads((Path(folder) / "config.json").read_text()).get("model_type") != MxDConfig.model_type:
        raise ValueError(f"{folder} holds a model, but no decomposition")
    documents = load_text(
        text.dataset or [str(embedded.text_path("heldout"))],
        config_name=text.config_name,
        split=text.split,
        text_column=text.text_column,
        streaming=text.streaming,
    )
    decomposition = MxDModel.from_pretrained(folder)
    config = decomposition.config
    if not config.base_model_name_or_path:
        raise ValueError(f"{folder}/config.json names no base_model_name_or_path to evaluate against")
    model, tokenizer, _ = load_base_model(config.base_model_name_or_path, config.base_model_revision, dtype)
    batches = evaluation_batches(documents, tokenizer, text.context_length, tokens)
    settings = {"evaluation": {**asdict(text), "model_dtype": dtype}, **_training_settings(Path(folder))}
    results = faithfulness(model, decomposition, batches, settings=settings, progress=progress)
    save_evaluation(results, folder)
    return load_evaluation(folder)


def _training_settings(folder: Path) -> dict[str, Any]:
    """What an earlier evaluation.json says of the training, so that measuring again does not lose it."""
    path = folder / "evaluation.json"
    if not path.is_file():
        return {}
    training = json.loads(path.read_text()).get("settings", {}).get("training")
    return {"training": training} if training else {}

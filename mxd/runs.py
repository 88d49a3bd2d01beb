"""What the commands that train share: options, the output folder, text, training and saving."""

import json
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
import transformers
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from evaluation_mxd import load_evaluation, plot_expert_frequency, plot_training_loss, save_evaluation
from evaluation_mxd.faithfulness import EVALUATION_NAME
from hub_cards.reading import check_weights, read_config, read_json
from modeling_mxd import MxDConfig, MxDModel
from modeling_mxd.downloads import file_if_any, tried
from trainers import CausalCollator, load_text, materialize, pack, split_documents, take_tokens
from trainers.decomposition_trainer import DecompositionTrainer

from . import embedded
from .base_model import load_base_model, resolve_name

LOG_NAME = "training_log.json"
START_NAME = "run_start.json"  # in the output folder of a run that is not finished: what it was asked for

Documents: TypeAlias = Dataset | IterableDataset


class Interrupted(Exception):
    """Training was interrupted after a checkpoint was saved; the message says how to go on."""


@dataclass
class TextOptions:
    """Which text, and how it becomes rows of tokens.

    Attributes:
        dataset: Hub name, or files, folders and globs; empty for the embedded sample.
        heldout_dataset: text to evaluate on; by default documents held out of `dataset`.
        config_name, split, text_column: of the dataset.
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


@dataclass(kw_only=True)
class RunOptions:
    """What every command that trains is asked for; the command's options by the same names.

    Attributes:
        dtype: in which the base model runs.
        tokens: training tokens.
        batch_tokens: tokens of one optimiser step.
        evaluation_tokens: held-out tokens to evaluate on.
        seed: of data order and initialisation.
        output: folder for the result.
        overwrite, resume: replace what is in `output`, or go on from its last checkpoint.
        text: see `TextOptions`.
        training: further fields of the trainer's arguments.
    """

    dtype: str = "float32"
    tokens: int = 1_000_000
    batch_tokens: int = 2048
    evaluation_tokens: int = 32768
    seed: int = 0
    output: str = "mxd-output"
    overwrite: bool = False
    resume: bool = False
    text: TextOptions = field(default_factory=TextOptions)
    training: dict[str, Any] = field(default_factory=dict)

    # What a run that is resumed may be asked for otherwise. Not when to log or to save: a checkpoint's own counts.
    may_change: ClassVar[tuple[str, ...]] = ("evaluation_tokens", "report_to", "disable_tqdm")


def asked_for(options: RunOptions) -> dict[str, Any]:
    """The options for evaluation.json, without those of this machine's folders."""
    return {name: value for name, value in asdict(options).items() if name not in ("output", "overwrite", "resume")}


def check_output(output: str, overwrite: bool, resume: bool) -> Path:
    """The output folder, if it may be written to; nothing is made or deleted yet.

    Raises:
        ValueError: when it holds something and neither overwriting nor resuming was asked for, or something that
            is no decomposition.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output {folder} is a file: name a folder with --output")
    if folder.is_dir() and any(_shown(folder)) and not resume:
        if not overwrite:
            raise ValueError(f"the output folder {folder} is not empty: pass --overwrite to replace it, or --resume")
        if not _ours(folder):
            raise ValueError(f"the output folder {folder} holds no decomposition: --overwrite will not delete it")
    return folder


def _shown(folder: Path) -> list[Path]:
    """What is in a folder but for hidden files (.git, .DS_Store), which neither make it full nor are deleted."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _ours(folder: Path) -> bool:
    config = folder / "config.json"
    if config.is_file():
        return bool(read_json(config).get("model_type") == MxDConfig.model_type)
    return (folder / START_NAME).is_file() or all(
        entry.name.startswith("checkpoint-") and (entry / "config.json").is_file() and _ours(entry)
        for entry in folder.iterdir()
    )


def load_decomposition(name: str) -> MxDModel:
    """A decomposition from a folder or the Hub; no code of it is run.

    Raises:
        ValueError: it is none, or cannot be had.
    """
    if Path(name).is_dir():
        path = Path(name) / "config.json"
    else:
        try:
            path = Path(tried(partial(cached_file, name, "config.json"), name))
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise ValueError(f"{name!r} is no folder with a decomposition, and: {reason}") from error
    config = read_config(path, name)
    if file_if_any(name, "adapter_config.json", {}) is not None:
        raise ValueError(f"{name} holds an adapter beside the decomposition, which would be loaded with it")
    if path.parent == Path(name):  # a folder
        check_weights(path.parent, config)
    decomposition = MxDModel.from_pretrained(name)
    assert isinstance(decomposition, MxDModel)
    return decomposition


def load_base_of(
    decomposition: MxDModel, dtype: str, context_length: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model that a decomposition's config names, and its tokenizer; see `load_base_model`.

    Raises:
        ValueError: it names none (`BaseModelError`: or one that cannot be loaded).
    """
    config = decomposition.config
    if not config.base_model_name_or_path:
        raise ValueError("config.json of the decomposition names no base_model_name_or_path, which its layers are of")
    name, revision = config.base_model_name_or_path, config.base_model_revision
    model, tokenizer, _ = load_base_model(name, revision, dtype, pickles=False, context_length=context_length)
    return model, tokenizer


def made_how(name: str) -> dict[str, Any]:
    """What evaluation.json of a decomposition (folder or Hub id) says of how it was made: the settings of its training
    and of its fine-tunings. Empty where it says nothing."""
    path = file_if_any(name, EVALUATION_NAME, {})
    settings = {} if path is None else read_json(Path(path)).get("settings")
    if not isinstance(settings, dict):
        return {}
    kinds = {"training": dict, "finetuning": list}
    return {key: settings[key] for key, kind in kinds.items() if isinstance(settings.get(key), kind)}


def trained_on(made: Mapping[str, Any]) -> set[str]:
    """Of what `made_how` gives, the data sets that were trained on, files and folders as `resolved`."""
    settings = [made.get("training"), *made.get("finetuning", [])]
    texts = [part["text"] for part in settings if isinstance(part, dict) and isinstance(part.get("text"), dict)]
    names = [name for text in texts if isinstance(text.get("dataset"), list) for name in text["dataset"]]
    return {resolved(name) for name in names if isinstance(name, str)}


def resolved(source: str) -> str:
    """A file's or folder's whole path; what is none, as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source


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


def evaluation_settings(options: RunOptions) -> dict[str, Any]:
    """On which text a trained decomposition was measured, for evaluation.json."""
    text = asdict(options.text)
    if options.text.heldout_dataset:
        text |= {"dataset": options.text.heldout_dataset, "heldout_dataset": [], "config_name": None, "split": "train"}
    return {**text, "model_dtype": options.dtype}


def step_arguments(options: RunOptions, folder: Path) -> dict[str, Any]:
    """Trainer arguments for these options: rows per step, steps, checkpoints; `options.training` goes over."""
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
    return {**defaults, **options.training}


def prepare_output(folder: Path, options: RunOptions, **kept: Any) -> None:
    """Make the output folder, without what was in it, and keep there what the run was asked for, and `kept`; nothing
    where a run is resumed, of which `resumed_start` gives that."""
    if options.resume:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for entry in _shown(folder):  # the folder itself may be where something is mounted, or the one that we are in
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (folder / START_NAME).write_text(json.dumps({"asked": _settled(options), **kept}) + "\n")


def resumed_start(folder: Path, options: RunOptions) -> dict[str, Any]:
    """What `prepare_output` kept when the run began that is to be resumed.

    Raises:
        ValueError: it was asked for something else, or nothing was kept.
    """
    path = folder / START_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no interrupted run: it has no {START_NAME}")
    start = read_json(path)
    before, now = start.get("asked"), _settled(options)
    if not isinstance(before, dict):
        raise ValueError(f"{path} does not say what the run was asked for: begin it anew with --overwrite")
    if "sparse_code_weight" in now:  # which runs had none of that began before there was one
        before.setdefault("sparse_code_weight", 0.0)
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"the run in {folder} had {name} {before.get(name)!r}, not {now.get(name)!r}: resume with the options "
                "of that run"
            )
    return start


def _settled(options: RunOptions) -> dict[str, Any]:
    """What a run stays with from its first step to its last, by JSON values."""
    asked = json.loads(json.dumps(asked_for(options)))
    for name in {"model", "decomposition"}.intersection(asked):
        asked[name] = resolve_name(asked[name])
    training = asked.pop("training")
    flat = {**asked.pop("text"), **asked}
    flat |= {f"training's {name}" if name in flat else name: value for name, value in training.items()}
    return {name: value for name, value in flat.items() if name not in options.may_change}


def run_training(
    trainer: DecompositionTrainer, tokenizer: PreTrainedTokenizerBase, options: RunOptions, checkpoint: str | None
) -> dict[str, Any]:
    """Train, and save decomposition, tokenizer and log in the output folder.

    Returns:
        How it was run, for evaluation.json; without its seconds where it was resumed.

    Raises:
        Interrupted: Ctrl-C; a checkpoint was saved.
    """
    folder, started = Path(options.output), time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.interrupted:
        raise Interrupted(
            f"interrupted at step {trainer.state.global_step} of {trainer.state.max_steps}; the checkpoint is kept in "
            f"{folder}: run the same command with --resume to go on"
        )
    seconds = {} if checkpoint else {"seconds": round(time.monotonic() - started, 1)}
    trainer.save_model()
    tokenizer.save_pretrained(folder)  # so that pipelines find it beside the decomposition
    (folder / LOG_NAME).write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
    arguments = trainer.args
    rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    names = ("learning_rate", "gate_learning_rate_factor", "modulation_learning_rate_factor", "scale_activations")
    return {
        **{name: getattr(arguments, name) for name in (*names, "bf16")},
        "tokens_trained": trainer.state.max_steps * rows * options.text.context_length,
        **seconds,
        "threads": torch.get_num_threads(),
        "device": str(arguments.device),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what results depend on."""
    return {
        "mxd": version("mxd"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save_results(
    results: dict[str, Any], decomposition: MxDModel, folder: Path, loss: str = "normalised squared error"
) -> dict[str, Any]:
    """Write evaluation.json and figures, and remove checkpoints, which are no longer needed.

    Args:
        results: of `evaluation_mxd.faithfulness`.
        decomposition: its experts' use is drawn.
        folder: where `run_training` saved.
        loss: what the training log's loss is.

    Returns:
        What evaluation.json holds.
    """
    save_evaluation(results, folder)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    plot_training_loss(json.loads((folder / LOG_NAME).read_text()), figures / "training_loss.png", loss)
    frequencies = {f"layer {i}": decomposition.layer(i).expert_frequency for i in decomposition.config.layers}
    plot_expert_frequency(frequencies, figures / "expert_frequency.png")
    for unneeded in folder.glob("checkpoint-*"):
        shutil.rmtree(unneeded)
    (folder / START_NAME).unlink(missing_ok=True)
    return load_evaluation(folder)

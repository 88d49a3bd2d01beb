"""What the commands that train share: options, the output folder, text, training and saving."""

import json
import logging
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from mxd.base.base_model import resolve_name
from mxd.data.texts import TextOptions
from mxd.evaluation import load_evaluation, plot_expert_frequency, plot_training_loss, save_evaluation
from mxd.hub_cards.reading import read_json
from mxd.modeling_mxd import MxDConfig, MxDModel
from mxd.trainers.decomposition_trainer import DecompositionTrainer

from .decompositions import output_folder

logger = logging.getLogger(__name__)

LOG_NAME = "training_log.json"
START_NAME = "run_start.json"  # in the output folder of a run that is not finished: what it was asked for


class Interrupted(Exception):
    """Training was interrupted after a checkpoint was saved; the message says how to go on."""


@dataclass(kw_only=True)
class RunOptions:
    """What every command that trains is asked for.

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
            is no decomposition, or a run is to be resumed that is finished.
    """
    folder = output_folder(output)
    if resume and (folder / "config.json").is_file() and not (folder / START_NAME).is_file():
        raise ValueError(f"what is in {folder} is finished, there is nothing to resume: --overwrite makes it anew")
    # A run that was ended before its first checkpoint left nothing but what it was asked for.
    if folder.is_dir() and any(entry.name != START_NAME for entry in visible_entries(folder)) and not resume:
        if not overwrite:
            raise ValueError(f"the output folder {folder} is not empty: pass --overwrite to replace it, or --resume")
        if not _ours(folder):
            raise ValueError(f"the output folder {folder} holds no decomposition: --overwrite will not delete it")
    return folder


def visible_entries(folder: Path) -> list[Path]:
    """What is in a folder but for hidden files (.git, .DS_Store), which neither make it full nor are deleted."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _ours(folder: Path) -> bool:
    config = folder / "config.json"
    if config.is_file():
        return bool(read_json(config).get("model_type") == MxDConfig.model_type)
    return (folder / START_NAME).is_file() or all(
        entry.name.startswith("checkpoint-") and (entry / "config.json").is_file() and _ours(entry)
        for entry in visible_entries(folder)
    )


def rows_per_step(options: RunOptions) -> int:
    """Whole rows of one optimiser step."""
    return max(1, options.batch_tokens // options.text.context_length)


def warn_of_whole_rows(options: RunOptions) -> None:
    """Say it where a step cannot take exactly the tokens that were asked for."""
    context = options.text.context_length
    if (real := rows_per_step(options) * context) != options.batch_tokens:
        logger.warning("a step takes whole rows of %d: %d tokens, not %d", context, real, options.batch_tokens)


def step_arguments(options: RunOptions, folder: Path) -> dict[str, Any]:
    """Trainer arguments for these options: rows per step, steps, checkpoints; `options.training` goes over."""
    rows = rows_per_step(options)
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
    for entry in visible_entries(
        folder
    ):  # the folder itself may be where something is mounted, or the one that we are in
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
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"the run in {folder} had {name} {before.get(name)!r}, not {now.get(name)!r}: resume with the options "
                "of that run"
            )
    return start


def check_same_documents(folder: Path, start: Mapping[str, Any], documents: int | None) -> None:
    """Refuse to go on with another text of the same name, which would be divided and ordered otherwise.

    Args:
        folder: of the run.
        start: of `resumed_start`; of earlier versions' runs the number is not known.
        documents: how many there are now.

    Raises:
        ValueError: saying how many there were.
    """
    before = start.get("documents")
    if before is not None and documents is not None and before != documents:
        raise ValueError(
            f"the text of the run in {folder} had {before} documents and has {documents} now: resume with the files "
            "of that run, or begin it anew with --overwrite"
        )


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
        DivergenceError: the loss or a weight is not finite; nothing was saved, and no checkpoint is removed.
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
    batch_tokens = rows * options.text.context_length
    names = ("learning_rate", "gate_learning_rate_factor", "modulation_learning_rate_factor", "scale_activations")
    return {
        **{name: getattr(arguments, name) for name in (*names, "bf16")},
        "batch_tokens": batch_tokens,
        "tokens_trained": trainer.state.max_steps * batch_tokens,
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
        results: of `mxd.evaluation.faithfulness`.
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

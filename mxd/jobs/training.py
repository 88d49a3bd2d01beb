"""Training as `decompose`, `finetune` and `frontier` do it: the trainer's arguments, the run, and its results."""

import json
import logging
import platform
import shutil
import signal
import time
from dataclasses import fields
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.data import Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mxd.base.activation_cache import ActivationCache
from mxd.base.base_model import default_device
from mxd.base.processes import check_one_process, in_first_process, join_apart, launched, train_apart
from mxd.evaluation import load_evaluation, plot_expert_frequency, plot_training_loss, save_evaluation
from mxd.evaluation.plots import decomposition_title
from mxd.modeling_mxd import MxDConfig, MxDModel
from mxd.trainers.decomposition_arguments import DecompositionArguments
from mxd.trainers.decomposition_trainer import DecompositionTrainer
from mxd.trainers.running_losses import DivergenceError

from .options import INTERRUPTED, TERMINATED, RunOptions, resumable, values
from .run_folder import RUN_NAME, START_NAME, Interrupted, TrainingFailed, finish, output_folder

logger = logging.getLogger(__name__)

Arguments = TypeVar("Arguments", bound=DecompositionArguments)
LOG_NAME = "training_log.json"


def asked_for(options: RunOptions) -> dict[str, Any]:
    """Return the options for evaluation.json: those of the text under "text"; the trainer's are recorded as used."""
    text = vars(options.text)
    left_out = {*text, "dataset_config", "cache", "output", "overwrite", "resume"}
    return {**values(options, lambda one: one.name not in left_out and not one.metadata.get("trainer")), "text": text}


def rows_per_step(options: RunOptions) -> int:
    """Return the number of whole rows in one optimiser step."""
    return max(1, options.batch_tokens // options.context_length)


def make_arguments(kind: type[Arguments], options: RunOptions, folder: Path, **changes: Any) -> Arguments:
    """Return the trainer's arguments for these options: rows per step, steps, checkpoints, and what they set.

    They join this process to the others of the run, if there are several. Whatever the number of processes, a step has
    the same rows, which the processes share unless they share layers or experts.

    Raises:
        ValueError: `training` names no argument of the trainer, a value is refused, or the processes cannot share the
            rows of a step equally.
    """
    known = [one.name for one in fields(kind) if one.init]
    for name in map(str, options.training):
        if name not in known:
            close = " or ".join(get_close_matches(name, known))
            hint = f"did you mean {close}?" if close else f"see {kind.__name__}"
            raise ValueError(f"training: {name} is no argument of the trainer; {hint}")
    shard = getattr(options, "shard", None)
    rank, count = train_apart() if shard else (0, 1)
    _, started = launched()
    if started == count == 1:
        check_one_process()  # the arguments would join processes that nobody told apart
    rows = rows_per_step(options)
    steps = max(1, options.tokens // (rows * options.context_length))
    trained = steps * rows * options.context_length
    if abs(trained - options.tokens) > options.tokens / 100 and "max_steps" not in {**options.training, **changes}:
        logger.warning("a training takes whole steps: %s tokens, not %s", f"{trained:,}", f"{options.tokens:,}")
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": rows,
        "max_steps": steps,
        "lr_scheduler_type": "linear",
        "save_steps": max(1, min(500, steps // 4)),
        "save_total_limit": 1,
        "seed": options.seed,
        "disable_tqdm": False,  # the default follows transformers' verbosity
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    arguments = kind(**{**defaults, **options.trainer_arguments(), **changes})
    arguments.accelerator_config.split_batches = True
    join_apart()
    arguments.rank, arguments.shards = rank, count if shard == "experts" else 1
    if arguments.shards > 1 and arguments.max_grad_norm > 0:
        raise ValueError("training: with --shard experts no process knows the norm of all gradients: no max_grad_norm")
    rows, processes = arguments.per_device_train_batch_size, arguments.world_size
    if started not in (1, processes):
        raise ValueError(f"{started} processes were started, of which accelerate joins {processes}: see its set-up")
    if rows % processes:
        raise ValueError(
            f"{processes} processes cannot share the {rows} rows of a step equally: make --batch-tokens a multiple of "
            f"{processes * options.context_length}, or start a number of processes that divides {rows}"
        )
    return arguments


def cached_rows(
    folder: Path,
    model: PreTrainedModel,
    config: MxDConfig,
    rows: Tensor,
    options: RunOptions,
    progress: bool,
    count: int | None = None,
) -> dict[str, Any]:
    """Record the activations of rows of ids, (rows, tokens), in a folder, or open those that are there.

    Returns:
        Arguments of a `DistillationTrainer` that trains on the rows in their order, from the first one again until
        there are `count`; it needs `train_sampling_strategy="sequential"`.

    Raises:
        ValueError: the folder is a file, holds those of other rows or of another model, or a broken file, or another
            process records them.
        OSError: the disk has too little space.
    """

    output_folder(str(folder), "cache")

    def record() -> None:
        ActivationCache.record(
            folder, model.to(default_device()), config.written_layers(), rows, rows_per_step=rows_per_step(options),
            overwrite=options.overwrite, progress=progress, **config.where,
        )  # fmt: skip

    in_first_process(record)
    cache = ActivationCache(folder, verify=False)
    order = np.arange(len(rows) if count is None else count) % len(rows)
    return {"activations": cache, "train_dataset": Subset(cache, order)}  # type: ignore[arg-type]


def run_training(
    trainer: DecompositionTrainer, tokenizer: PreTrainedTokenizerBase, options: RunOptions, checkpoint: str | None
) -> dict[str, Any]:
    """Train, and save decomposition, tokenizer and log in the output folder.

    Returns:
        How it was trained, for evaluation.json; without "seconds" if it was resumed.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved, or there was nothing to keep yet.
        TrainingFailed: anything else was raised once there was a checkpoint; one was saved then.
        DivergenceError: the loss or a weight is not finite; nothing was saved, and no checkpoint was removed.
    """
    folder, started, arguments = Path(options.output), time.monotonic(), trainer.args
    own_folder = Path(str(arguments.output_dir))  # of a pass over some of the layers, inside of it
    trainer.losses.decode = tokenizer.decode
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        if checkpoint is not None or resumable(folder):
            raise
        for name in (START_NAME, RUN_NAME):
            (folder / name).unlink(missing_ok=True)
        if own_folder != folder:
            shutil.rmtree(own_folder, ignore_errors=True)
        raise Interrupted("interrupted before the first checkpoint: nothing is kept") from None
    except Exception as error:
        if isinstance(error, DivergenceError) or not trainer.saved_step:
            raise
        said = f"the training failed after {_kept(trainer)}. Put right what stopped it: {type(error).__name__}: {error}"
        raise TrainingFailed(said) from error
    if trainer.interrupted:
        code = TERMINATED if trainer.signal == signal.SIGTERM else INTERRUPTED
        raise Interrupted(f"interrupted at {_kept(trainer)}", code)
    seconds = {} if checkpoint else {"seconds": round(time.monotonic() - started, 1)}
    trainer.save_model()
    if arguments.should_save:
        save_beside(tokenizer, trainer.state.log_history, own_folder)
    rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    batch_tokens = rows * options.context_length
    names = ("learning_rate", "gate_learning_rate_factor", "modulation_learning_rate_factor", "scale_activations",
             "bf16")  # fmt: skip
    return {
        **{name: getattr(arguments, name) for name in names},
        "batch_tokens": batch_tokens,
        "tokens_trained": trainer.state.max_steps * batch_tokens,
        **seconds,
        "threads": torch.get_num_threads(),
        "device": str(arguments.device),
        "versions": versions(),
    }


def save_beside(tokenizer: PreTrainedTokenizerBase, log: list[dict[str, Any]], folder: Path) -> None:
    """Save the tokenizer, which pipelines look for, and the log of the training beside a decomposition."""
    tokenizer.save_pretrained(folder)
    (folder / LOG_NAME).write_text(json.dumps(log, indent=1) + "\n")


def _kept(trainer: DecompositionTrainer) -> str:
    step = f"step {trainer.saved_step} of {trainer.state.max_steps}"
    return f"{step}; the checkpoint is kept in {trainer.args.output_dir}: run again with --resume"


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {
        "mxd": version("mxd"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save_results(
    results: dict[str, Any], decomposition: MxDModel, folder: Path, loss: str = "normalised squared error"
) -> dict[str, Any]:
    """Write the results of `faithfulness` and figures into the folder of a training, and mark it as finished.

    Returns:
        The content of evaluation.json.
    """
    save_evaluation(results, folder)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    title, made = decomposition_title(decomposition.config), results["settings"]
    from_the_mlp = "finetuning" not in made and made.get("training", {}).get("encoder_init") == "pretrained"
    note = "\nTraining starts at the pretrained MLP, so the loss first rises" if from_the_mlp else ""
    log = json.loads((folder / LOG_NAME).read_text())
    plot_training_loss(log, figures / "training_loss.png", loss, title + note)
    frequencies = {f"layer {i}": decomposition.layer(i).expert_frequency for i in decomposition.config.layers}
    plot_expert_frequency(frequencies, figures / "expert_frequency.png", title)
    finish(folder)
    return load_evaluation(folder)

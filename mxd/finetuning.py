"""Fine-tuning a decomposition end to end: from a folder or the Hub to another folder, measured before and after."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from evaluation_mxd import faithfulness
from modeling_mxd import SplicedLanguageModel, make_spliced
from trainers import FinetuningArguments, FinetuningTrainer, last_complete_checkpoint, pack

from .base_model import resolve_name
from .runs import (
    START_NAME,
    RunOptions,
    asked_for,
    check_output,
    evaluation_batches,
    evaluation_settings,
    load_base_of,
    load_decomposition,
    load_documents,
    made_how,
    prepare_output,
    run_training,
    save_results,
    step_arguments,
)

_MEASURED = ("layers", "cross_entropy", "kl", "top1_agreement")
_LOSS_NAMES = {"kl": "KL to the untouched model, nats per token", "cross_entropy": "cross-entropy, nats per token"}


@dataclass(kw_only=True)
class FinetuningOptions(RunOptions):
    """What `finetune` is asked for, beside what `RunOptions` has; the command's options by the same names.

    Attributes:
        decomposition: folder or Hub id of the decomposition to start from, which is left as it is.
        loss: `"kl"` to the untouched model, or `"cross_entropy"` of the text.
    """

    decomposition: str
    loss: str = "kl"
    output: str = "mxd-finetuned"


def finetune(options: FinetuningOptions) -> dict[str, Any]:
    """Train a decomposition on in its language model, measure it before and after, and save it in another folder.

    Returns:
        What evaluation.json holds: the result's own figures, as `evaluation_mxd.faithfulness` gives them, and in
        settings.finetuning a list of the fine-tunings that it went through. The last is this one: how it was made, and
        `before`, the figures of the decomposition that it started from, on the same held-out tokens.

    Raises:
        ValueError: bad input of any kind, before anything expensive.
        Interrupted: Ctrl-C in training; a checkpoint was saved.
    """
    set_seed(options.seed)
    folder = check_output(options.output, options.overwrite, options.resume)
    _check_apart(folder, Path(options.decomposition))
    arguments = FinetuningArguments(**step_arguments(options, folder), loss=options.loss)
    checkpoint = last_complete_checkpoint(folder) if options.resume else None
    start = _resumed_start(folder, options) if checkpoint else {}
    documents, heldout_documents = load_documents(options.text, options.seed)
    decomposition = load_decomposition(options.decomposition)
    base, tokenizer = load_base_of(decomposition, options.dtype)
    context = options.text.context_length
    rows = pack(documents, tokenizer, context, seed=options.seed, repeat=True)
    heldout = evaluation_batches(heldout_documents, tokenizer, context, options.evaluation_tokens)
    model = make_spliced(base, decomposition, options.decomposition)
    assert isinstance(model, SplicedLanguageModel)
    trainer = FinetuningTrainer(model, arguments, train_dataset=rows)

    def measure(settings: dict[str, Any]) -> dict[str, Any]:
        with model.untouched():
            return faithfulness(base, decomposition, heldout, settings=settings, progress=not arguments.disable_tqdm)

    if checkpoint is None:
        measured = measure({})
        start = {**_identity(options), "before": {name: measured[name] for name in _MEASURED}}
        prepare_output(folder, options.resume)  # only now, when nothing is left to be refused
        (folder / START_NAME).write_text(json.dumps(start) + "\n")
    how = run_training(trainer, tokenizer, options, checkpoint)
    settings = made_how(options.decomposition)
    settings["finetuning"] = [*settings.get("finetuning", []), {**asked_for(options), **how, **start}]
    settings["evaluation"] = evaluation_settings(options)
    return save_results(measure(settings), decomposition, folder, _LOSS_NAMES[options.loss])


def _identity(options: FinetuningOptions) -> dict[str, Any]:
    return {"decomposition": resolve_name(options.decomposition), "loss": options.loss}


def _check_apart(output: Path, source: Path) -> None:
    """Refuse an output that would change the decomposition that is started from."""
    output, source = output.resolve(), source.resolve()
    if output == source or source in output.parents or output in source.parents:
        raise ValueError(
            f"the output {output} and the decomposition {source} must be two folders, neither inside the other: the "
            "decomposition is left as it is"
        )


def _resumed_start(folder: Path, options: FinetuningOptions) -> dict[str, Any]:
    """What was written before the first step: what is trained, and the figures from before."""
    path = folder / START_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no interrupted fine-tuning: it has no {START_NAME}")
    start: dict[str, Any] = json.loads(path.read_text())
    for name, value in _identity(options).items():
        if start.get(name) != value:
            raise ValueError(
                f"the fine-tuning in {folder} has {name} {start.get(name)!r}, not {value!r}: resume with the options "
                "of that run"
            )
    return start

"""Fine-tuning a decomposition end to end: from a folder or the Hub to another folder, measured before and after."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import set_seed

from mxd.base.base_model import resolve_name
from mxd.data.packing import pack
from mxd.data.provenance import is_held_out, seen_in_training, split_seed
from mxd.data.texts import (
    count_documents,
    evaluation_batches,
    evaluation_settings,
    load_documents,
    warn_of_embedded_text,
)
from mxd.evaluation import faithfulness
from mxd.modeling_mxd import SplicedLanguageModel, make_spliced
from mxd.trainers import FinetuningArguments, FinetuningTrainer, last_complete_checkpoint

from .decompositions import check_base_of, load_base_of, load_decomposition, made_how
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

MEASURED = ("layers", "cross_entropy", "kl", "top1_agreement")
_LOSS_NAMES = {"kl": "KL to the untouched model, nats per token", "cross_entropy": "cross-entropy, nats per token"}


@dataclass(kw_only=True)
class FinetuningOptions(RunOptions):
    """What `finetune` is asked for, beside what `RunOptions` has. The command's `tokens` are fewer.

    Attributes:
        decomposition: folder or Hub id of the decomposition to start from, which is left as it is.
        loss: `"kl"` to the untouched model, or `"cross_entropy"` of the text.
        nmse_weight: of the layers' own error, added to the loss.
    """

    decomposition: str
    loss: str = "kl"
    nmse_weight: float = FinetuningArguments.nmse_weight
    output: str = "mxd-finetuned"

    # Not what it is measured on: what was measured before the first step is kept.
    may_change: ClassVar[tuple[str, ...]] = ("report_to", "disable_tqdm")


def finetune(options: FinetuningOptions) -> dict[str, Any]:
    """Train a decomposition on in its language model, measure it before and after, and save it in another folder.

    Returns:
        What evaluation.json holds: the result's own figures, as `mxd.evaluation.faithfulness` gives them, and in
        settings.finetuning a list of the fine-tunings that it went through. The last is this one: how it was made, and
        `before`, the figures of the decomposition that it started from, on the same held-out tokens.

    Raises:
        ValueError: bad input of any kind, before anything expensive.
        Interrupted: Ctrl-C in training; a checkpoint was saved.
    """
    set_seed(options.seed)
    folder = check_output(options.output, options.overwrite, options.resume)
    _check_apart(folder, Path(options.decomposition))
    losses = {"loss": options.loss, "nmse_weight": options.nmse_weight}
    arguments = FinetuningArguments(**{**losses, **step_arguments(options, folder)})
    checkpoint = last_complete_checkpoint(folder) if options.resume else None
    start = resumed_start(folder, options) if checkpoint else {}
    decomposition = load_decomposition(options.decomposition)
    settings, context = made_how(options.decomposition), options.text.context_length
    check_base_of(decomposition, options.dtype, context)
    warn_of_whole_rows(options)
    warn_of_embedded_text(options.text, decomposition.config.base_model_name_or_path)
    documents, heldout_documents = load_documents(options.text, split_seed(settings, options.seed))
    count = count_documents(documents, heldout_documents)
    check_same_documents(folder, start, count)
    if seen := seen_in_training(settings, options.text, options.seed, count):
        logger.warning("the decomposition was trained on %s: the figures are not of held-out text", ", ".join(seen))
    base, tokenizer = load_base_of(decomposition, options.dtype, context)
    rows = pack(documents, tokenizer, context, seed=options.seed, repeat=True)
    heldout = evaluation_batches(heldout_documents, tokenizer, context, options.evaluation_tokens)
    model = make_spliced(base, decomposition, options.decomposition, cast=False)
    assert isinstance(model, SplicedLanguageModel)
    trainer = FinetuningTrainer(model, arguments, train_dataset=rows)

    def measure(settings: dict[str, Any]) -> dict[str, Any]:
        with model.untouched():
            return faithfulness(base, decomposition, heldout, settings=settings, progress=not arguments.disable_tqdm)

    if checkpoint is None:
        trainer.measure_experts()  # on the tokens of the later measurement, or the shares of both do not compare
        measured = measure({})
        start = {"before": {name: measured[name] for name in MEASURED}, "documents": count}
        prepare_output(folder, options, **start)  # only now, when nothing is left to be refused
    how = run_training(trainer, tokenizer, options, checkpoint)
    made = {
        **asked_for(options),
        "decomposition": resolve_name(options.decomposition),
        **how,
        "documents": count,
        "before": start["before"],
    }
    held_out = is_held_out(settings, seen)
    settings["finetuning"] = [*settings.get("finetuning", []), made]
    settings["evaluation"] = {**evaluation_settings(options.text, options.dtype), "held_out": held_out}
    return save_results(measure(settings), decomposition, folder, _LOSS_NAMES[options.loss])


def _check_apart(output: Path, source: Path) -> None:
    """Refuse an output that would change the decomposition that is started from."""
    output, source = output.resolve(), source.resolve()
    if output == source or source in output.parents or output in source.parents:
        raise ValueError(
            f"the output {output} and the decomposition {source} must be two folders, neither inside the other: the "
            "decomposition is left as it is"
        )

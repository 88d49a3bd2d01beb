"""`mxd finetune`: train a decomposition further, end to end in its language model, and measure it before and after."""

from pathlib import Path
from typing import Any

from transformers import set_seed

from mxd.base.base_model import resolve_name
from mxd.base.processes import in_first_process
from mxd.data.packing import pack
from mxd.data.provenance import is_held_out, sketch, split_seed
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

from .decompositions import load_base_and_text, load_decomposition, made_how
from .options import FinetuningOptions
from .run_folder import begun, check_same_documents, prepare_output
from .training import asked_for, make_arguments, run_training, save_results

MEASURED = ("layers", "cross_entropy", "kl", "top1_agreement")
_LOSS_NAMES = {"kl": "KL to the untouched model, nats per token", "cross_entropy": "cross-entropy, nats per token"}


def finetune(options: FinetuningOptions) -> dict[str, Any]:
    """Train a decomposition further in its language model, measure it before and after, and save it in another folder.

    Returns:
        The content of evaluation.json: the figures of the result, as `mxd.evaluation.faithfulness` returns them, and in
        settings.finetuning a list of the decomposition's fine-tunings. The last is this one: how it was made, and
        `before`, the figures of the decomposition that it started from, on the same held-out tokens.

    Raises:
        ValueError: bad input of any kind, before anything expensive runs.
        Interrupted: Ctrl-C during training; a checkpoint was saved.
    """
    set_seed(options.seed)
    folder = Path(options.output)
    arguments = make_arguments(FinetuningArguments, options, folder)
    _check_apart(folder, Path(options.decomposition))
    start = in_first_process(lambda: begun(options))
    checkpoint = last_complete_checkpoint(folder) if start else None
    decomposition = load_decomposition(options.decomposition)
    settings, context = made_how(options.decomposition), options.context_length
    warn_of_embedded_text(options.text, decomposition.config.base_model_name_or_path)
    base, tokenizer, (documents, heldout_documents) = load_base_and_text(
        decomposition,
        options.dtype,
        context,
        lambda: load_documents(options.text, split_seed(settings, options.seed)),
    )
    count = count_documents(documents, heldout_documents)
    check_same_documents(folder, start, count)
    own_sketch = in_first_process(lambda: sketch(options.text, documents, split_seed(settings, options.seed)))
    held_out = is_held_out(settings, options.text, heldout_documents, options.seed, own_sketch)
    rows = pack(documents, tokenizer, context, seed=options.seed, repeat=True)
    heldout = evaluation_batches(heldout_documents, tokenizer, context, options.evaluation_tokens)
    model = make_spliced(base, decomposition, options.decomposition, cast=False)
    assert isinstance(model, SplicedLanguageModel)
    trainer = FinetuningTrainer(model, arguments, train_dataset=rows)

    def measure(settings: dict[str, Any]) -> dict[str, Any]:
        with model.untouched():
            return faithfulness(base, decomposition, heldout, settings=settings, progress=not arguments.disable_tqdm)

    if checkpoint is None:
        trainer.measure_experts()  # on the tokens of the later measurement, so that both are comparable
        measured = in_first_process(lambda: measure({}))
        start = {"before": {name: measured[name] for name in MEASURED}, "documents": count}
        in_first_process(lambda: prepare_output(folder, "finetune", options, **start))
    how = run_training(trainer, tokenizer, options, checkpoint)
    made = {
        **asked_for(options),
        **how,
        "decomposition": resolve_name(options.decomposition),
        "loss": options.loss,
        "nmse_weight": options.nmse_weight,
        "documents": count,
        "sketch": own_sketch,
        "before": start["before"],
    }
    evaluated = evaluation_settings(options.text, options.dtype) | {"held_out": held_out}
    settings |= {"finetuning": [*settings.get("finetuning", []), made], "evaluation": evaluated}
    return in_first_process(lambda: save_results(measure(settings), decomposition, folder, _LOSS_NAMES[options.loss]))


def _check_apart(output: Path, source: Path) -> None:
    """Refuse an output that would change the decomposition to start from."""
    output, source = output.resolve(), source.resolve()
    if output == source or source in output.parents or output in source.parents:
        raise ValueError(f"the output {output} and the decomposition {source} must be two folders, not nested")

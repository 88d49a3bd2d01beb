"""A resumed training on an iterable dataset reads on where it was: no row is read again, lost or repeated."""

import pytest
import torch
from datasets import IterableDataset
from factories import GLU, make_tiny_llama, random_mxd_model
from text_cases import build_tokenizer, document
from trainer_cases import ARGUMENTS, PLAIN, arguments, decomposition
from transformers import TrainerCallback

from mxd.data.packing import pack
from mxd.modeling_mxd import make_spliced
from mxd.trainers import DistillationTrainer, FinetuningArguments, FinetuningTrainer, last_complete_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6, "per_device_train_batch_size": 2, "optim": "sgd"}


class Stop(TrainerCallback):
    """Fail before the step after `step`, in which a row was read ahead."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise ConnectionError("the network is gone")


class Counted:
    """Documents, and which of them were read."""

    def __init__(self):
        self.read = []

    def note(self, row):
        self.read.append(row["text"])
        return row

    def rows(self, kind, tokenizer):
        self.read = []
        shards = [[document(n) for n in range(at, at + (4 if kind == "epochs" else 30))] for at in (0, 30, 60)]

        def rows(shards):
            yield from ({"text": text} for shard in shards for text in shard)

        stream = IterableDataset.from_generator(rows, gen_kwargs={"shards": shards}).map(self.note)
        if kind == "plain":  # another dataset with a state
            ids = [3, *range(4, 15)]
            return stream.map(lambda row: {"input_ids": [int(row["text"][1:].split()[0]) % 60, *ids[1:]]})
        packed = pack(stream, tokenizer, 12, buffer_size=8, repeat=kind == "repeated")
        self.read = []
        return packed


def train(folder, data, make="distillation", stop=None, resume=False, **changes):
    """Train, and return the trainer, and the ids of all steps, which `stop` ends."""
    steps = []

    def noted(trainer):
        of_step = trainer.training_step

        def training_step(model, inputs, *rest, **named):
            steps.extend(inputs["input_ids"].tolist())
            return of_step(model, inputs, *rest, **named)

        trainer.training_step = training_step
        return trainer

    base, callbacks = make_tiny_llama(vocab_size=400), [Stop(stop)] if stop else []
    torch.manual_seed(0)
    if make == "finetuning":
        spliced = make_spliced(base, random_mxd_model((0, 2), **GLU), "decomposition")
        values = FinetuningArguments(**{"output_dir": str(folder), **ARGUMENTS, **SAVING, **changes})
        trainer = FinetuningTrainer(spliced, values, train_dataset=data, callbacks=callbacks)
    else:
        values = arguments(folder, **{**PLAIN, **SAVING, **changes})
        trainer = DistillationTrainer(decomposition(), base, values, train_dataset=data, callbacks=callbacks)
    noted(trainer)
    if stop:
        with pytest.raises(ConnectionError):
            trainer.train()
    else:
        trainer.train(resume_from_checkpoint=resume)
    return trainer, steps


@pytest.mark.parametrize(
    ("kind", "make", "changes"),
    [
        ("stream", "distillation", {"gradient_accumulation_steps": 3}),
        ("epochs", "distillation", {"max_steps": 16}),
        ("plain", "distillation", {}),
        ("repeated", "finetuning", {"gradient_accumulation_steps": 2}),
    ],
    ids=str,
)
def test_no_row_is_read_again_lost_or_repeated(tmp_path, kind, make, changes):
    tokenizer, source = build_tokenizer(), Counted()
    whole, expected = train(tmp_path / "whole", source.rows(kind, tokenizer), make, **changes)
    all_read, stop = list(source.read), changes.get("max_steps", 6) - 3
    _, before = train(tmp_path / "part", source.rows(kind, tokenizer), make, stop=stop, **changes)
    read_before = list(source.read)
    assert last_complete_checkpoint(tmp_path / "part").endswith(f"-{stop}")
    resumed, after = train(tmp_path / "part", source.rows(kind, tokenizer), make, resume=True, **changes)
    assert before + after == expected
    assert read_before + source.read == all_read
    for name, value in whole.decomposition.state_dict().items():
        assert torch.equal(resumed.decomposition.state_dict()[name], value), name
    losses = [{k: v for k, v in entry.items() if k in ("loss", "epoch", "step")} for entry in whole.state.log_history]
    assert [{k: v for k, v in one.items() if k in losses[0]} for one in resumed.state.log_history[:-1]] == losses[:-1]


@pytest.mark.parametrize("kind", ["workers", "shuffle buffer"])
def test_what_cannot_be_resumed_is_skipped(tmp_path, kind):
    """The state of other workers, and of the buffers of `datasets`, is not known: rows are read again, as ever."""
    tokenizer = build_tokenizer()

    def rows():
        found = Counted().rows("stream", tokenizer)
        return found.shuffle(seed=1, buffer_size=5) if kind == "shuffle buffer" else found

    changes = {"dataloader_num_workers": 1, "max_steps": 4} if kind == "workers" else {"max_steps": 4}
    _, expected = train(tmp_path / "whole", rows(), **changes)
    _, before = train(tmp_path / "part", rows(), stop=2, **changes)
    _, after = train(tmp_path / "part", rows(), resume=True, **changes)
    assert before + after == expected


def test_trainings_on_the_same_rows_each_begin_at_the_first(tmp_path):
    rows = Counted().rows("stream", build_tokenizer())
    _, expected = train(tmp_path / "a", rows, max_steps=4)
    train(tmp_path / "b", rows, stop=2, max_steps=4)
    trainer, _ = train(tmp_path / "b", rows, resume=True, max_steps=4)
    assert train(tmp_path / "c", rows, max_steps=4)[1] == expected
    again = []
    trainer.training_step = lambda model, inputs, *_: again.extend(inputs["input_ids"].tolist()) or torch.tensor(0.0)
    trainer.train()
    assert again == expected

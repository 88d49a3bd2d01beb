"""Memory of a training step on several layers: the graph of one layer, whatever their number."""

import weakref
from contextlib import contextmanager

import pytest
from factories import GLU, make_tiny_llama, random_mxd_model
from torch.autograd.graph import saved_tensors_hooks
from trainer_cases import arguments, decomposition, rows

from mxd.modeling_mxd import make_spliced
from mxd.trainers import DistillationTrainer, FinetuningTrainer
from mxd.trainers.finetuning_arguments import FinetuningArguments


class Saved:
    def __init__(self, tensor):
        self.tensor = tensor


@contextmanager
def saved_for_backward():
    """Yield {"now", "most"}: bytes of the tensors that autograd keeps for backward passes."""
    count = {"now": 0, "most": 0}

    def add(size):
        count["now"] += size
        count["most"] = max(count["most"], count["now"])

    def pack(tensor):
        saved, size = Saved(tensor), tensor.nbytes
        add(size)
        weakref.finalize(saved, add, -size)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield count


def peak(trainer):
    batch = trainer.data_collator(list(rows(8)))
    with saved_for_backward() as count:
        trainer.training_step(trainer.model, batch)
    assert count["now"] == 0
    return count["most"]


@pytest.mark.parametrize("form", [{}, {"method": "skip_transcoder"}, {"num_expert_groups": 6, "num_groups_per_tok": 2}])
def test_one_layer_s_graph_is_in_memory_at_a_time(tmp_path, form):
    teacher = make_tiny_llama(num_hidden_layers=8)
    peaks = []
    for layers in ([3], range(8)):
        model = decomposition(list(layers), **form)
        peaks.append(peak(DistillationTrainer(model, teacher, arguments(tmp_path), train_dataset=rows())))
    assert peaks[0] == peaks[1] > 0


def test_fine_tuning_adds_one_layer_s_error_to_the_graph_of_the_model(tmp_path):
    peaks = {}
    for weight in (0.0, 1.0):
        model = make_spliced(make_tiny_llama(num_hidden_layers=8), random_mxd_model(range(8), **GLU), "decomposition")
        args = FinetuningArguments(output_dir=str(tmp_path), nmse_weight=weight, use_cpu=True)
        peaks[weight] = peak(FinetuningTrainer(model, args, train_dataset=rows()))
    assert peaks[0.0] == peaks[1.0] > 0


def test_activations_are_freed_with_their_layer(tmp_path, monkeypatch):
    trainer = DistillationTrainer(decomposition(range(3)), make_tiny_llama(), arguments(tmp_path), train_dataset=rows())
    kept, alive, losses = [], [], trainer.layer_losses

    def note(layer, x, y, mask):
        kept.append(weakref.ref(x))
        alive.append(sum(one() is not None for one in kept))
        return losses(layer, x, y, mask)

    monkeypatch.setattr(trainer, "layer_losses", note)
    trainer.training_step(trainer.model, trainer.data_collator(list(rows(8))))
    assert alive == [1, 1, 1]

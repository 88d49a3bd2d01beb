"""Routing that starts in the middle of a training."""

import pytest
import torch
from trainer_cases import arguments, decomposition, rows
from transformers import TrainerCallback

from modeling_mxd import capture_mlps
from trainers import DistillationTrainer, last_complete_checkpoint, routing_recall

ROUTED = {"num_expert_groups": 6, "num_groups_per_tok": 2}
ALL_OPEN = {"num_expert_groups": 6, "num_groups_per_tok": 6}


class Watch(TrainerCallback):
    """How many groups the layer opens, before every step."""

    def __init__(self, layer):
        self.layer, self.opened = layer, []

    def on_step_begin(self, *_, **__):
        self.opened.append(self.layer.config.num_groups_per_tok)


def trained(teacher, folder, data, groups, **changes):
    """A decomposition from the same start whatever its groups, and how many it opened at every step."""
    model = decomposition(**groups)
    trainer = DistillationTrainer(model, teacher, arguments(folder, seed=3, **changes), train_dataset=data)
    watch = Watch(model.layer(1))
    trainer.add_callback(watch)
    trainer.train()
    return model, watch.opened


@pytest.mark.parametrize(("share", "whole"), [(0.0, 0), (0.25, 3), (0.5, 5), (1.0, 10)])
def test_all_groups_are_open_for_that_share_of_the_steps(tiny_llama, tmp_path, share, whole):
    model, opened = trained(tiny_llama, tmp_path, rows(), ROUTED, routing_start=share)
    assert opened == [6] * whole + [2] * (10 - whole)
    assert model.layer(1).config == model.config.layer(1)
    assert model.layer(1).config.num_groups_per_tok == 2


@pytest.mark.parametrize(
    "changes", [{}, {"sparse_optimizer": True, "max_grad_norm": 0.0}, {"optim": "sgd", "learning_rate": 0.1}]
)
@pytest.mark.parametrize("method", ["mxd", "skip_transcoder"])
def test_experts_and_what_the_optimiser_keeps_of_them_are_renumbered_together(tiny_llama, tmp_path, method, changes):
    """With all groups open before and after, the training is that of a layer without any."""
    data = rows()
    start = decomposition(method=method).layer(1).state_dict()
    models = []
    for groups in ({}, ALL_OPEN):
        model = decomposition(method=method, **groups)
        model.layer(1).load_state_dict(start, strict=False)
        settings = arguments(tmp_path, gate_initialization="keep", **changes)
        trainer = DistillationTrainer(model, tiny_llama, settings, train_dataset=data)
        trainer._routing_start.__init__(model, trainer.codes, 0.5, trainer._routing_inputs, 0)
        trainer._routing_start.wait()
        trainer.train()
        models.append(model)
    x, _ = capture_mlps(tiny_llama, [1], torch.tensor(data["input_ids"]))[1]
    plain, routed = (model.layer(1) for model in models)
    torch.testing.assert_close(routed(x), plain(x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(routed.gate.weight, plain.gate.weight)  # the experts' order is another
    torch.testing.assert_close(routed.gate.weight.sum(0), plain.gate.weight.sum(0), rtol=1e-3, atol=1e-4)


def test_the_router_is_fitted_to_the_trained_experts(tiny_llama, tmp_path):
    data = rows(256)
    x, _ = capture_mlps(tiny_llama, [1], torch.tensor(data["input_ids"]))[1]
    model, _ = trained(tiny_llama, tmp_path, data, ROUTED, routing_start=1.0)
    fitted = routing_recall(model.layer(1), x)
    torch.nn.init.normal_(model.layer(1).router.weight)
    assert fitted.coefficients > 0.5 > routing_recall(model.layer(1), x).coefficients


@pytest.mark.parametrize("saved", [4, 5, 6], ids=["before", "at", "after"])
def test_resumed_equals_uninterrupted(tiny_llama, tmp_path, saved):
    data = rows()
    changes = {"routing_start": 0.5, "save_strategy": "steps", "save_steps": saved, "save_total_limit": 1}
    whole, opened = trained(tiny_llama, tmp_path / "whole", data, ROUTED, **changes)
    folder = tmp_path / "part"
    first = DistillationTrainer(
        decomposition(**ROUTED), tiny_llama, arguments(folder, seed=3, **changes), train_dataset=data
    )

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    first.add_callback(Stop())
    first.train()
    assert last_complete_checkpoint(folder).endswith(f"checkpoint-{saved}")
    model = decomposition(**ROUTED)
    resumed = DistillationTrainer(model, tiny_llama, arguments(folder, seed=3, **changes), train_dataset=data)
    watch = Watch(model.layer(1))
    resumed.add_callback(watch)
    resumed.train(resume_from_checkpoint=True)
    assert watch.opened == opened[saved:]
    for (name, one), other in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_decomposition_that_is_trained_on_keeps_its_groups(tiny_llama, tmp_path):
    _, opened = trained(tiny_llama, tmp_path, rows(), ROUTED, gate_initialization="keep")
    assert opened == [2] * 10


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_no_other_share(tmp_path, share):
    with pytest.raises(ValueError, match=f"routing_start must be from 0 to 1, got {share}"):
        arguments(tmp_path, routing_start=share)

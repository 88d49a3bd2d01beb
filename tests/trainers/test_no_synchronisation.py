"""Training steps queue work for a GPU without waiting for it, and make every tensor where their inputs are.

A dispatch mode refuses the operators that wait for a GPU, and the meta device those that mix devices: no GPU is needed.
"""

import sys
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from datasets import Dataset, Features, List, Value
from factories import FORMS, GLU, random_layer, random_mxd_model
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_cases import ARGUMENTS, arguments, decomposition, rows
from transformers import TrainerCallback

from mxd.modeling_mxd import functional, make_spliced
from mxd.trainers import DistillationTrainer, FinetuningArguments, FinetuningTrainer
from mxd.trainers.auxiliary_transcoder import AuxiliaryTranscoder
from mxd.trainers.router import router_loss

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2", "unique_dim",
           "unique_consecutive")  # fmt: skip


class WouldWait(AssertionError):
    """An operator reads a value of the device on the host."""


def _of_transformers():
    """Whether the base model is making its mask: transformers looks whether rows are padded, or packed."""
    frame = sys._getframe(1)
    while frame and "masking_utils" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


class NoWaiting(TorchDispatchMode):
    """Refuse operators that wait for a GPU, also inside the layers' own operators."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in (known := torch._library.custom_ops.OPDEFS):
            with self:
                return known[name]._init_fn(*args, **(kwargs or {}))
        short = name.removeprefix("aten::").removesuffix("_")
        by_mask = short in ("index", "index_put") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        of_tensor = short == "repeat_interleave" and isinstance(args[0], torch.Tensor) and args[1:2] == ()
        if (short in WAITING or by_mask or of_tensor) and not _of_transformers():
            raise WouldWait(name)
        return function(*args, **(kwargs or {}))


class Watched(TrainerCallback):
    """Watch every step but what follows it: logging and saving."""

    def __init__(self):
        self.step, self.steps = ExitStack(), 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.step.enter_context(NoWaiting())

    def on_step_end(self, args, state, control, **kwargs):
        self.step.close()
        self.steps += 1


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Take the paths of other devices where a function has one for CPUs, and refuse what dispatch does not see."""

    def largest_positive(scores, k):
        values, columns = scores.topk(k, dim=-1, sorted=False)
        return values.relu(), columns

    monkeypatch.setattr(functional, "largest_positive", largest_positive)
    monkeypatch.setattr(functional, "candidates", lambda scores, k: largest_positive(scores, k)[1])
    allowed = torch.Tensor.tolist

    def refuse(tensor, *_):
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise WouldWait("tolist, numpy or cpu")
        return allowed(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", refuse)


def packed(count=64, length=12):
    """Rows of one length, as `pack` declares them."""
    features = Features({"input_ids": List(Value("int64"), length=length)})
    return Dataset.from_dict({"input_ids": torch.randint(0, 64, (count, length)).tolist()}, features=features)


def watch(trainer):
    watched = Watched()
    trainer.add_callback(watched)
    counted, mode = trainer.count_positions, NoWaiting()

    def count_positions(batch):
        with mode:
            return counted(batch)

    trainer.count_positions = count_positions
    with watched.step:
        trainer.train()
    assert watched.steps == trainer.state.global_step == 3
    return trainer


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({}, {"bf16": True}),
        ({}, {"gradient_accumulation_steps": 2, "loss_normalization": "norm"}),
        ({"layers": (0, 2)}, {"max_grad_norm": 1.0}),
        ({"method": "transcoder"}, {}),
        ({"method": "skip_transcoder"}, {"weight_decay": 0.1}),
    ],
    ids=["mxd", "bf16", "accumulated", "two layers", "transcoder", "skip transcoder"],
)
def test_distillation_waits_for_nothing(tiny_llama, tmp_path, as_on_a_gpu, changes, settings):
    settings = arguments(tmp_path, max_steps=3, logging_steps=3, **settings)
    watch(DistillationTrainer(decomposition(**changes), tiny_llama, settings, train_dataset=packed()))


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_finetuning_waits_for_nothing(tiny_llama, tmp_path, as_on_a_gpu, loss):
    model = make_spliced(tiny_llama, random_mxd_model((0, 2), **GLU), "decomposition")
    settings = FinetuningArguments(str(tmp_path), **{**ARGUMENTS, "max_steps": 3, "logging_steps": 3, "loss": loss})
    watch(FinetuningTrainer(model, settings, train_dataset=packed()))


def test_losses_of_padded_rows_wait_for_nothing(tiny_llama, tmp_path, as_on_a_gpu):
    trainer = DistillationTrainer(decomposition(), tiny_llama, arguments(tmp_path), train_dataset=rows(ragged=True))
    batch = trainer.prepare_batch(next(iter(trainer.get_train_dataloader())))
    x, y = trainer.capture(batch)[1]
    mask = trainer.loss_mask(batch)
    assert not mask.all()
    whole = trainer.layer_losses(1, x, y, mask)
    with NoWaiting():
        sum(trainer.layer_losses(1, x, y, mask)).backward()
    alone = trainer.layer_losses(1, x[mask][None], y[mask][None], torch.ones(1, int(mask.sum()), dtype=torch.bool))
    for one, other in zip(whole, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_the_watch_sees_what_waits():
    mask, values = torch.tensor([True, False]), torch.randn(2, 3)
    for waits in (lambda: values[mask], lambda: bool(mask.any()), mask.nonzero, lambda: float(values.sum())):
        with pytest.raises(WouldWait), NoWaiting():
            waits()
    layer, x = random_layer(num_expert_groups=6, num_groups_per_tok=2), torch.randn(4, 16)
    with pytest.raises(WouldWait), NoWaiting():  # hierarchical routing sorts tokens by group on the host
        layer(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_and_losses_make_no_tensor_on_another_device(form, dtype):
    layer = random_layer(form, dtype=dtype).to("meta")
    x, y = (torch.empty(2, 3, size, device="meta", dtype=dtype) for size in (16, 12))
    mask = torch.empty(2, 3, device="meta", dtype=torch.bool)
    auxiliary = AuxiliaryTranscoder(layer.config).to("meta", dtype)
    with layer.intervene(add={1: 2.0}, set={2: 1.0}, scale={3: 0.5}, ablate=4), layer.record() as recorded:
        output = layer(x)
    coefficients = layer.encode(x)
    error = partial(DistillationTrainer.distillation_loss, target=y, mask=mask, minimum_squared_norm=1.0)
    loss = error(output) + error(layer.decode(coefficients, x), normalization="norm")
    loss = loss + error(auxiliary(coefficients, x)) + DistillationTrainer.mean_ablation_loss(output, y, mask, 0.4)
    loss.backward()
    assert recorded[0].to_dense(24).is_meta and loss.is_meta
    assert all(parameter.grad.is_meta for parameter in layer.parameters())


def test_routers_and_steering_make_no_tensor_on_another_device():
    layer = random_layer(num_expert_groups=6, num_groups_per_tok=2).to("meta")
    x = torch.empty(4, 16, device="meta")
    router_loss(layer, x).backward()
    assert layer.router.weight.grad.is_meta and layer.in_groups(layer.open_groups(x)).is_meta
    assert layer(x).is_meta


@pytest.mark.parametrize("name", ["scatter_rows", "_expert_sum", "_topk_gate"])
def test_operators_make_no_tensor_on_another_device(name):
    """Inside: on the meta device, torch calls only what describes an operator's result."""
    make = partial(torch.empty, device="meta")
    indices = make(5, 4, dtype=torch.int64)
    given = {
        "scatter_rows": (indices, make(5, 4), make(5, 16), 24),
        "_expert_sum": (make(5, 4), indices, make(24, 12)),
        "_topk_gate": (make(5, 16), make(24, 16), make(24), 4, torch.float32),
    }
    made = getattr(functional, name)._init_fn(*given[name])
    assert all(one.is_meta for one in (made if isinstance(made, tuple) else (made,)))

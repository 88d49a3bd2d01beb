"""Layers that write to several MLPs: the config, the splice, and everything that is done with a spliced model."""

import copy
import pickle
import re

import pytest
import torch
from census import outputs, same_randomness
from factories import FORMS, make_tiny_llama, random_mxd_model, with_directions
from peft import LoraConfig, get_peft_model
from tiny_models import model_inputs, tiny_model
from transformers import AutoModelForCausalLM

from mxd.base.capture import capture_layers, capture_mlps
from mxd.base.forward import ZeroMLP, zero_ablated
from mxd.base.pretrained_weights import mlp_widths, record_base
from mxd.evaluation.ablation import ChangedExperts
from mxd.modeling_mxd import (
    MxDConfig,
    MxDLayerConfig,
    MxDModel,
    SurgeryError,
    find_mlps,
    make_spliced,
    replace_mlp,
    spliced_mlps,
)

IDS = torch.arange(2, 22).reshape(2, 10)
each_form = pytest.mark.parametrize("form", FORMS)


def several(layers=(0,), count=3, form="mxd-glu", **changes):
    """A decomposition whose layers write to `count` MLPs each."""
    return random_mxd_model(layers, num_output_layers=count, **FORMS[form], **changes)


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def by_hooks(model, mxd, run):
    """What `run` returns with the MLPs' outputs replaced by hooks, by the definition alone."""
    sites, found, handles = find_mlps(model, **mxd.config.where), {}, []
    for index in mxd.config.layers:
        layer, written = mxd.layer(index), mxd.config.written_layers(index)

        def read(_, args, kwargs, layer=layer, written=written):
            y = layer(args[0] if args else next(iter(kwargs.values())))
            found.update(zip(written, y.split(y.shape[-1] // len(written), -1), strict=True))

        handles.append(sites[index].input_module.register_forward_pre_hook(read, with_kwargs=True))
        for place in written:

            def write(_, args, output, place=place):
                return (found[place], *output[1:]) if isinstance(output, tuple) else found[place]

            handles.append(sites[place].output_module.register_forward_hook(write))
    result = run()
    for handle in handles:
        handle.remove()
    return result


@each_form
@pytest.mark.parametrize(("layers", "count"), [((0,), 3), ((1,), 2), ((2, 0), 2)])
def test_the_model_has_the_outputs_that_the_definition_gives(layers, count, form):
    model = make_tiny_llama(num_hidden_layers=4)
    mxd, untouched, modules = several(layers, count, form), logits(model), dict(model.named_modules())
    expected = by_hooks(model, mxd, lambda: logits(model))
    with mxd.spliced(model) as replaced:
        assert [one.site.layer for one in replaced] == mxd.config.written_layers()
        assert torch.equal(logits(model), expected)
    assert not torch.allclose(expected, untouched, atol=1e-3)
    assert torch.equal(logits(model), untouched)
    assert dict(model.named_modules()) == modules
    with pytest.raises(RuntimeError, match="stop"), mxd.spliced(model):
        raise RuntimeError("stop")
    assert dict(model.named_modules()) == modules


# Linears of Conv1D, parallel blocks, inline MLPs, a residual inside, tuples as output, mixtures, norms after the MLP.
TYPES = ("gpt2", "gpt_neox", "opt", "bloom", "falcon", "mixtral", "gemma2", "rwkv", "t5", "bert", "phi3")


@pytest.mark.parametrize("model_type", TYPES)
def test_many_architectures(model_type):
    model = tiny_model(model_type)
    inputs, sites = model_inputs(model), find_mlps(model)
    widths = mlp_widths(sites[0]) or (model.config.hidden_size,) * 3
    layer = MxDLayerConfig(widths[0], 2 * widths[2], 8, 12, 3, num_output_layers=2)
    mxd = MxDModel(MxDConfig.from_layer_configs({0: layer}))
    for parameter in mxd.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with same_randomness(), torch.no_grad():
        expected = by_hooks(model, mxd, lambda: outputs(model, inputs))
    with mxd.spliced(model, example_inputs=inputs), same_randomness(), torch.no_grad():
        found = outputs(model, inputs)
    assert torch.equal(found[0], expected[0])


@pytest.fixture
def spliced():
    model, mxd = make_tiny_llama(), several(count=2)
    record_base(mxd, model)
    return make_spliced(model, mxd.eval(), "a decomposition")


@each_form
def test_a_layer_is_captured_with_the_outputs_of_all_mlps_that_it_writes_to(form):
    model, mxd = make_tiny_llama(num_hidden_layers=5), several((3, 0), 2, form)
    single, joined = capture_mlps(model, list(range(5)), IDS), capture_layers(model, mxd.config, IDS)
    assert list(joined) == [3, 0]
    for layer, (x, y) in joined.items():
        assert torch.equal(x, single[layer][0])
        assert torch.equal(y, torch.cat([single[layer][1], single[layer + 1][1]], -1))


def test_generation_with_a_cache_is_that_without(spliced):
    how = {"max_new_tokens": 6, "do_sample": False}
    found = [spliced.generate(IDS, use_cache=cached, **how) for cached in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_after_a_training_step_is_a_model_of_its_own(spliced, copied):
    spliced(input_ids=IDS, labels=IDS).loss.backward()  # what a layer computed for the next is part of a graph
    other, before = copied(spliced), logits(spliced)
    assert torch.equal(logits(other), before)
    for parameter in spliced.decomposition.parameters():
        parameter.data.mul_(0)
    assert torch.equal(logits(other), before) and not torch.equal(logits(spliced), before)
    assert torch.equal(logits(other.unsplice()), logits(make_tiny_llama()))


def test_compiled():
    torch.compiler.reset()
    model, mxd = make_tiny_llama(num_hidden_layers=2), several(count=2)
    spliced = make_spliced(model, mxd.eval(), "a decomposition").requires_grad_(True)
    grads = []
    for model in (spliced, torch.compile(spliced, backend="eager", fullgraph=True)):
        spliced.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({name: one.grad.clone() for name, one in spliced.decomposition.named_parameters()})
    assert torch.allclose(logits(model, use_cache=False), logits(spliced), atol=1e-5)  # without gradients
    for name, grad in grads[0].items():
        assert grad.abs().sum() > 0, name
        assert torch.allclose(grads[1][name], grad, rtol=1e-4, atol=1e-6), name
    torch.compiler.reset()


def test_gradient_checkpointing(spliced):
    spliced.requires_grad_(True)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            spliced.gradient_checkpointing_enable({"use_reentrant": False})
        spliced.train().zero_grad()
        spliced(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([parameter.grad.clone() for parameter in spliced.decomposition.parameters()])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))
    spliced.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(SurgeryError, match="'use_reentrant': False"):  # it would lose the gradients of later outputs
        spliced(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()


def test_an_adapter_trains_and_merges(spliced):
    before = logits(spliced)
    targets = ["gate", "encoder", "decoder", "q_proj"]
    model = get_peft_model(spliced, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted = logits(model)
    assert not torch.allclose(adapted, before, atol=1e-3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_B" in name)
    assert torch.allclose(logits(model.merge_and_unload()), adapted, atol=1e-5)


def test_untouched_and_unsplice_after_a_move(spliced):
    base = logits(make_tiny_llama().double())
    spliced.double()
    with spliced.untouched():
        assert torch.equal(logits(spliced), base)
    assert torch.equal(logits(spliced.unsplice()), base)


def test_steering_adds_a_direction_to_every_output(spliced):
    mxd = with_directions(spliced.decomposition)
    direction, maximum = mxd.directions(0)
    before = mxd.layer(0)(torch.ones(1, 16))
    with spliced.steer({"layer": 0, "expert": 3, "strength": 2.0}):
        added = mxd.layer(0)(torch.ones(1, 16)) - before
        steered = logits(spliced)
    assert torch.allclose(added[0], 2 * maximum[3] * direction[3], atol=1e-5)
    assert not torch.allclose(steered, logits(spliced), atol=1e-3)


@each_form
def test_it_is_saved_and_loads_as_what_it_was(form, tmp_path):
    base, mxd = make_tiny_llama(), several((0,), 2, form)
    base.save_pretrained(tmp_path / "base")
    record_base(mxd, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    with_directions(mxd).save_pretrained(tmp_path / "mxd")
    config = MxDConfig.from_pretrained(tmp_path / "mxd")
    assert config.to_dict() == mxd.config.to_dict() and config.written_layers() == [0, 1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mxd", trust_remote_code=True)
    with mxd.spliced(base):
        assert torch.equal(logits(loaded), logits(base))
    loaded.save_pretrained(tmp_path / "again")
    again = MxDModel.from_pretrained(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in mxd.state_dict().items())
    assert torch.equal(again.directions(0).direction, mxd.directions(0).direction)


def test_other_modules_may_write_to_several_mlps():
    model, mxd = make_tiny_llama(num_hidden_layers=4), several((1,), 2)
    with mxd.spliced(model):
        expected = logits(model)
    same = ChangedExperts(mxd.layer(1), lambda layer, coefficients: layer.sum_experts(coefficients))
    with spliced_mlps(model, {1: same}):
        assert torch.equal(logits(model), expected)
    with spliced_mlps(model, {1: ZeroMLP(16), 2: ZeroMLP(16)}):
        expected = logits(model)
    with zero_ablated(model, mxd.config):
        assert torch.equal(logits(model), expected)


def test_an_output_follows_the_dtype_and_the_shape_of_its_own_input():
    model, mxd = make_tiny_llama(), several((0,), 2)
    x = torch.randn(2, 10, 16)
    expected = mxd.layer(0)(x)[..., 16:]
    with mxd.spliced(model):
        model.model.layers[0].mlp(x)
        other = model.model.layers[1].mlp(torch.ones(20, 16).double())  # a block may run its MLP on tokens without rows
    assert other.dtype == torch.float64 and torch.equal(other, expected.double().flatten(0, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [0, 1], "num_output_layers": 2}, "several layers write to layer 1"),
        ({"layers": [4, 2], "num_output_layers": 3}, "several layers write to layer 4"),
        ({"num_output_layers": 3, "output_size": 16}, "num_output_layers (3) must divide output_size (16)"),
        ({"num_output_layers": 2000, "output_size": 2000}, "and be at most 1024"),
        ({"num_output_layers": 0}, "num_output_layers must be a whole number from 1"),
        ({"num_output_layers": "2"}, "num_output_layers must be a whole number from 1"),
        ({"num_output_layers": True}, "num_output_layers must be a whole number from 1"),
    ],
)
def test_a_config_that_means_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MxDConfig(**{"layers": [0], "hidden_size": 16, **changes})


@pytest.mark.parametrize(
    ("model_type", "layer", "outputs", "message"),
    [
        ("llama", -1, 64, "is out of range: the model has layers 0 to"),
        ("llama", 0, 24, "the MLP of layer 0 maps 32 to 32 dimensions, the decomposition's layer 32 to 12"),
        ("nemotron_h", 0, 64, "has no MLP"),
    ],
)
def test_a_decomposition_that_does_not_fit_is_refused(model_type, layer, outputs, message):
    model = tiny_model(model_type)
    layer %= len(find_mlps(model))
    sizes = MxDLayerConfig(32, outputs, 8, 12, 3, num_output_layers=2)
    before = dict(model.named_modules())
    with pytest.raises(SurgeryError, match=re.escape(message)):
        MxDModel(MxDConfig.from_layer_configs({layer: sizes})).splice(model)
    assert dict(model.named_modules()) == before


def test_an_mlp_that_is_taken_absent_or_run_twice_is_refused_by_name():
    model, mxd = make_tiny_llama(), several((0,), 2)
    with mxd.spliced(model):
        for layer in (0, 1):
            with pytest.raises(SurgeryError, match=f"layer {layer} is already replaced"):
                replace_mlp(model, layer, ZeroMLP(16))
        with pytest.raises(SurgeryError, match="layer 0 is already replaced"):
            mxd.splice(model)
    with pytest.raises(SurgeryError, match="layer 1 is already replaced"):
        spliced_mlps(model, {0: mxd.layer(0), 1: ZeroMLP(16)}).__enter__()
    with pytest.raises(SurgeryError, match="several MLPs: use replace_mlps"):
        replace_mlp(model, 0, mxd.layer(0))
    with mxd.spliced(model), pytest.raises(SurgeryError, match="has not run: call the whole model"):
        model.model.layers[1].mlp(torch.ones(1, 2, 16))
    sizes = MxDLayerConfig(32, 64, 8, 12, 3, num_output_layers=2)
    with pytest.raises(SurgeryError, match="layer 0 runs several times in a pass"):
        MxDModel(MxDConfig.from_layer_configs({0: sizes})).splice(tiny_model("bert", chunk_size_feed_forward=4))

"""Splices under what models are run with: checkpointing, compilation, narrow dtypes, static caches, offloading. One
member of every structural family; the families are those of tests/trainers/test_distillation_architectures.py."""

import pytest
import torch
from accelerate import cpu_offload
from census import decomposition_of, outputs
from tiny_models import model_inputs, tiny_model
from torch import nn

from mxd.modeling_mxd import find_mlps

FAMILIES = [
    "llama", "gpt2", "phi3", "gpt_neox", "opt", "bert", "albert", "bloom", "xlnet", "mixtral", "deepseek_v3",
    "gpt_oss", "llama4_text", "longcat_flash", "nemotron_h", "zamba2", "t5", "vit", "swin",
]  # fmt: skip
WITH_STATIC_CACHE = ["llama", "gpt2", "phi3", "gpt_neox", "opt", "mixtral", "gpt_oss"]


def spliced_case(model_type, **changes):
    model = tiny_model(model_type, **changes)
    sites = [site for site in find_mlps(model).values() if site.slots]
    return model, decomposition_of(model, sites), model_inputs(model)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def gradients(model, mxd, inputs):
    mxd.zero_grad()
    torch.manual_seed(0)
    found = [tensor for tensor in model(**inputs).to_tuple() if isinstance(tensor, torch.Tensor)]
    found[0].float().square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in mxd.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(model_type):
    model, mxd, inputs = spliced_case(model_type)
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers has no checkpointing for it")
    without_dropout(model)
    with mxd.spliced(model, example_inputs=inputs):
        model.train()
        plain = gradients(model, mxd, inputs)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        checkpointed = gradients(model, mxd, inputs)
    assert plain and any(gradient.any() for gradient in plain.values())
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_narrow_dtypes(model_type, dtype):
    model, mxd, inputs = spliced_case(model_type)
    model.to(dtype)
    inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    untouched = outputs(model, inputs)
    with mxd.spliced(model, example_inputs=inputs):
        assert mxd.dtype == dtype
        spliced = outputs(model, inputs)
    assert [tensor.dtype for tensor in spliced] == [tensor.dtype for tensor in untouched]
    assert all(tensor.isfinite().all() for tensor in spliced)


@pytest.mark.parametrize("model_type", WITH_STATIC_CACHE)
def test_static_and_dynamic_caches_agree(model_type):
    model, mxd, inputs = spliced_case(model_type)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "disable_compile": True}
    with mxd.spliced(model), torch.no_grad():
        dynamic = model.generate(**inputs, **settings)
        static = model.generate(**inputs, **settings, cache_implementation="static")
    assert torch.equal(static, dynamic)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_that_are_offloaded(model_type):
    """Weights come to the device for each module's forward alone, as with device_map and CPU or disk offload."""
    model, mxd, inputs = spliced_case(model_type)
    with mxd.spliced(model, example_inputs=inputs):
        expected = outputs(model, inputs)
    cpu_offload(model, execution_device="cpu")
    try:
        outputs(model, inputs)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"the unmodified model does not run offloaded: {error}")
    with mxd.spliced(model, example_inputs=inputs):
        got = outputs(model, inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiled_spliced_model_whose_mlp_is_called_inline():
    """Traced whole and run by the eager backend: what is checked is that nothing of ours stops the tracing."""
    model, mxd, inputs = spliced_case("opt", num_hidden_layers=1)

    def compiled_outputs():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        got = outputs(torch.compile(model, backend="eager"), inputs)
        return got, sum(torch._dynamo.utils.counters["graph_break"].values())

    with torch.no_grad():
        _, untouched_breaks = compiled_outputs()
    with mxd.spliced(model, example_inputs=inputs), torch.no_grad():
        expected = outputs(model, inputs)
        got, breaks = compiled_outputs()
    assert breaks <= untouched_breaks
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

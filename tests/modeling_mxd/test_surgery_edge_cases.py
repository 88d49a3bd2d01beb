from functools import partial

import pytest
import torch
from mxd_cases import random_layer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import FalconConfig, FalconForCausalLM

from mxd.base.capture import capture_mlps
from mxd.base.pretrained_weights import mlp_hidden_act, mlp_weights, mlp_widths
from mxd.modeling_mxd import SurgeryError, find_mlp, find_mlps, replace_mlps, spliced_mlps
from mxd.modeling_mxd.surgery import _move_to


def test_capture_of_a_layer_named_twice_stops_early(tiny_llama):
    handle = tiny_llama.model.layers[1].register_forward_hook(lambda *args: pytest.fail("layer 1 ran"))
    assert capture_mlps(tiny_llama, [0, 0], torch.zeros(1, 3, dtype=torch.int64)).keys() == {0}
    handle.remove()


def test_a_compiled_model_is_refused_by_name(tiny_llama):
    with pytest.raises(SurgeryError, match="OptimizedModule is not a transformers model itself"):
        find_mlps(torch.compile(tiny_llama, backend="eager"))


def test_a_layer_without_its_mlp_says_so(tiny_llama):
    del tiny_llama.model.layers[1].mlp
    sites = find_mlps(tiny_llama)
    assert [site.kind for site in sites.values()] == ["module", "none", "module"]
    assert sites[1].reason.startswith("LlamaDecoderLayer has no module that is an MLP, only self_attn (LlamaAttention)")
    for attempt in (lambda: find_mlp(tiny_llama, 1), lambda: sites[1].modules, lambda: mlp_weights(sites[1])):
        with pytest.raises(SurgeryError, match="layer 1 of LlamaForCausalLM has no MLP: LlamaDecoderLayer has"):
            attempt()
    with pytest.raises(SurgeryError, match=r"layer 1 .* has no MLP"):
        replace_mlps(tiny_llama, {0: nn.Identity(), 1: nn.Identity()})
    assert find_mlp(tiny_llama, 0).kind == "module"


def test_the_activation_is_told_by_its_values_not_by_the_config(tiny_llama):
    assert mlp_hidden_act(find_mlp(tiny_llama, 0)) == "silu"
    tiny_llama.config.hidden_act = "relu"
    assert mlp_hidden_act(find_mlp(tiny_llama, 0)) == "silu"
    tiny_llama.model.layers[0].mlp.act_fn = nn.ReLU()
    assert mlp_hidden_act(find_mlp(tiny_llama, 0)) == "relu"


def test_widths_that_no_weights_tell_are_probed(tiny_llama):
    """A block of unknown make: its widths show when tokens are run through it."""
    tiny_llama.model.layers[1].mlp = nn.Sequential(tiny_llama.model.layers[1].mlp)
    site = find_mlp(tiny_llama, 1)
    assert mlp_widths(site) is None and mlp_hidden_act(site) is None
    with (
        pytest.raises(SurgeryError, match="layer 1 maps 16 to 16 dimensions, the decomposition's layer 8 to 16"),
        spliced_mlps(tiny_llama, {1: random_layer(hidden_size=8, output_size=16)}),
    ):
        pytest.fail("the block ran")
    with spliced_mlps(tiny_llama, {1: random_layer(hidden_size=16, output_size=16)}):
        tiny_llama(torch.zeros(1, 3, dtype=torch.int64))


def test_activation_checkpointing_gives_the_same_gradients(tiny_llama):
    ids, grads = torch.randint(2, 64, (2, 7)), []
    layer = random_layer("mxd-glu", hidden_size=16, output_size=16)
    tiny_llama.train()
    for how in ("plain", "checkpointing"):
        if how == "checkpointing":
            tiny_llama.model.layers[1].gradient_checkpointing = True
            tiny_llama.model.layers[1]._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.zero_grad()
        with spliced_mlps(tiny_llama, {1: layer}):
            tiny_llama(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: parameter.grad.clone() for name, parameter in layer.named_parameters()})
    assert all(grad.any() for grad in grads[0].values())
    torch.testing.assert_close(*grads)


@torch.no_grad()
@pytest.mark.parametrize("stop", [True, False])
def test_outputs_are_captured_before_the_model_adds_to_them(stop):
    config = FalconConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, initializer_range=0.3
    )
    model = FalconForCausalLM(config).eval()  # parallel attention: mlp_output += attention_output
    captured = capture_mlps(model, [0, 1], torch.arange(8)[None], stop_after_last=stop)
    for layer, (x, y) in captured.items():
        torch.testing.assert_close(y, model.transformer.h[layer].mlp(x))


@pytest.mark.parametrize("kept_as", ["float8", "buffers"])
def test_a_layer_takes_the_models_dtype_where_the_mlp_is_quantised(tiny_llama, kept_as):
    site, layer = find_mlp(tiny_llama.bfloat16(), 1), random_layer()
    for linear in site.output_module.children():
        if isinstance(linear, nn.Linear):
            weight = linear.weight.detach()
            del linear.weight
            if kept_as == "float8":
                linear.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
            else:  # as GPTQ's
                linear.register_buffer("qweight", weight.to(torch.int8))
    _move_to(site, tiny_llama, layer, cast=True)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}

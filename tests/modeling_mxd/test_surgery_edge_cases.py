from functools import partial

import pytest
import torch
from mxd_cases import random_layer
from torch import nn
from torch.utils.checkpoint import checkpoint

from modeling_mxd import SurgeryError, capture_mlps, find_mlp, find_mlps, spliced_mlps


def test_capture_of_a_layer_named_twice_stops_early(tiny_llama):
    handle = tiny_llama.model.layers[1].register_forward_hook(lambda *args: pytest.fail("layer 1 ran"))
    assert capture_mlps(tiny_llama, [0, 0], torch.zeros(1, 3, dtype=torch.int64)).keys() == {0}
    handle.remove()


def test_a_compiled_model_is_refused_by_name(tiny_llama):
    with pytest.raises(SurgeryError, match="OptimizedModule is not a transformers model itself"):
        find_mlps(torch.compile(tiny_llama, backend="eager"))


def test_a_layer_without_its_mlp_is_named(tiny_llama):
    del tiny_llama.model.layers[1].mlp
    with pytest.raises(SurgeryError, match="layer 1 of LlamaForCausalLM has no module 'mlp'"):
        find_mlps(tiny_llama)


def test_the_activation_is_the_configs(tiny_llama):
    assert find_mlp(tiny_llama, 0).hidden_act == "silu"
    tiny_llama.config.hidden_act = "relu"
    assert find_mlp(tiny_llama, 0).hidden_act == "relu"


def test_a_foreign_replacement_is_not_taken_for_the_mlp(tiny_llama):
    with (
        spliced_mlps(tiny_llama, {1: nn.Sequential(find_mlp(tiny_llama, 1).input_module)}),
        pytest.raises(SurgeryError, match="MLP of layer 1 is not the pretrained one"),
        spliced_mlps(tiny_llama, {1: random_layer(hidden_size=16, output_size=16)}),
    ):
        pytest.fail("the block ran")


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

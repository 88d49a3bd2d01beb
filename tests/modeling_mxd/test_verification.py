"""Splices are verified: exact ones pass unseen, others are refused and leave the model as it was."""

import pytest
import torch
from mxd_cases import random_layer
from tiny_models import model_inputs, tiny_model
from torch import nn

from mxd.base.pretrained_weights import mlp_widths
from mxd.modeling_mxd import MLPReplacement, SurgeryError, find_mlp, find_mlps, replace_mlps, spliced_mlps, verify_sites


def layer():
    return random_layer(hidden_size=16, output_size=16)


class Remembering(nn.Module):
    """Adds its input, which it remembers from the call, not from its arguments: no position-wise function."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x, residual=None):
        return self.mlp(x) if residual is None else (self.mlp(x), residual)


@pytest.fixture
def odd_llama(tiny_llama):
    """Its second block gives a pair, which its caller takes apart."""
    block = tiny_llama.model.layers[1]
    block.mlp = Remembering(block.mlp)
    inner = block.mlp

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = inner

        def forward(self, x):
            y, residual = self.block(x, x)
            return y + 0 * residual

    block.mlp = Calls()
    return tiny_llama


def test_what_loses_something_is_refused(odd_llama):
    """The named module gives two tensors and its caller needs both: a decomposition gives one."""
    names = dict(odd_llama.named_modules())
    ids = torch.randint(0, 64, (2, 5))
    before = odd_llama(ids).logits
    with pytest.raises(SurgeryError, match="LlamaForCausalLM cannot be run to verify surgery"):
        replace_mlps(odd_llama, {1: layer()}, site="mlp.block")
    assert dict(odd_llama.named_modules()) == names
    assert torch.equal(odd_llama(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in odd_llama.modules())
    with spliced_mlps(odd_llama, {1: layer()}):
        pass  # the block around it is exact


class Lenient(nn.Module):
    """Adds the second tensor of a pair, and does without it where there is none."""

    def __init__(self, mlp):
        super().__init__()
        self.block = Remembering(mlp)

    def forward(self, x):
        y = self.block(x, x)
        return y[0] + y[1] if isinstance(y, tuple) else y


def test_a_caller_that_runs_but_gives_other_values_is_refused(tiny_llama):
    block = tiny_llama.model.layers[1]
    block.mlp = Lenient(block.mlp)
    names = dict(tiny_llama.named_modules())
    with pytest.raises(SurgeryError, match=r"layers \[1\] .* changes the outputs, so they cannot be replaced"):
        replace_mlps(tiny_llama, {1: layer()}, site="mlp.block")
    assert dict(tiny_llama.named_modules()) == names


def test_a_site_is_verified_once(tiny_llama):
    ran = []
    for index, block in enumerate(tiny_llama.model.layers):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    with spliced_mlps(tiny_llama, {1: layer()}):
        assert ran == [0, 1, 2, 0, 1, 2]
    with spliced_mlps(tiny_llama, {1: layer()}):
        assert ran == [0, 1, 2, 0, 1, 2]
    with spliced_mlps(tiny_llama, {0: layer(), 1: layer()}):
        assert ran == [0, 1, 2] * 4


def test_verification_can_be_left_out(tiny_llama):
    handle = tiny_llama.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with spliced_mlps(tiny_llama, {1: layer()}, verify=False):
        handle.remove()


def test_the_model_is_as_it_was(tiny_llama):
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    modes = [module.training for module in tiny_llama.modules()]
    state = torch.get_rng_state()
    verify_sites(tiny_llama, list(find_mlps(tiny_llama).values()))
    assert [module.training for module in tiny_llama.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_cannot_be_run_says_what_to_pass(tiny_llama):
    tiny_llama.model.embed_tokens.forward = lambda *_: (_ for _ in ()).throw(RuntimeError("no such tokens"))
    with pytest.raises(SurgeryError, match=r"cannot be run .* no such tokens\): pass example_inputs="):
        replace_mlps(tiny_llama, {1: layer()})
    assert type(find_mlp(tiny_llama, 1).input_module).__name__ == "LlamaMLP"


def test_a_layer_that_does_not_run_is_refused():
    model = tiny_model("mllama")  # its cross-attention layers run on images only
    skipped = model.model.layers[3]
    assert type(skipped).__name__ == "MllamaCrossAttentionDecoderLayer"
    with pytest.raises(SurgeryError, match=r"layer 3 of model\.layers does not run on the example inputs"):
        replace_mlps(model, {3: nn.Identity()})


def test_a_model_on_the_meta_device_is_not_run(tiny_llama):
    with spliced_mlps(tiny_llama.to("meta"), {1: layer()}) as replaced:
        assert replaced[0].replacement.gate.weight.is_meta


def test_router_logits_of_the_routers_that_stay():
    model = tiny_model("mixtral")
    inputs = {**model_inputs(model), "labels": model_inputs(model)["input_ids"]}
    model.config.output_router_logits = True
    identities = {index: nn.Identity() for index in find_mlps(model)}
    with spliced_mlps(model, {0: nn.Identity()}):
        assert model(**inputs).aux_loss.isfinite()
    with spliced_mlps(model, identities, site="mlp.experts"):
        assert model(**inputs).aux_loss.isfinite()


@pytest.mark.parametrize("model_type", ["llama4_text", "rwkv", "deepseek_v4", "zamba2", "gpt_oss", "zaya"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_what_callers_pass_and_expect_besides(model_type, batch):
    """A batch of 2 is where a tensor is silently taken apart as if it were a pair."""
    model = tiny_model(model_type)
    inputs = model_inputs(model, batch=batch)
    site = next(site for site in find_mlps(model).values() if site.slots)

    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    with torch.no_grad(), spliced_mlps(model, {site.layer: Double()}):
        assert isinstance(model.get_submodule(site.slots[0]), MLPReplacement)
        together = model(**inputs).logits
        alone = torch.cat([model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits for row in range(batch)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("model_type", "stack"), [("bert", None), ("t5", None), ("t5", "encoder"), ("gemma3", None)])
def test_models_that_read_text_run_on_a_few_tokens(model_type, stack):
    model = tiny_model(model_type)
    site = find_mlp(model, 0, stack)
    assert verify_sites(model, [site]) == {site.slots: mlp_widths(site)[::2]}


def test_models_that_read_something_else_need_inputs():
    model = tiny_model("vit")
    with pytest.raises(SurgeryError, match=r"cannot be run to verify surgery .*pass example_inputs="):
        verify_sites(model, [find_mlp(model, 0)])
    verify_sites(model, [find_mlp(model, 0)], model_inputs(model))

import copy
from contextlib import ExitStack, contextmanager

import pytest
import torch
from factories import random_layer, random_mxd_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.activations import ACT2FN

from mxd.base.capture import capture_mlps
from mxd.base.pretrained_weights import check_widths, mlp_encoder_type, mlp_hidden_act, mlp_weights
from mxd.modeling_mxd import (
    MxDLayerConfig,
    SurgeryError,
    find_mlp,
    find_mlps,
    replace_mlp,
    spliced_mlps,
)

VOCABULARY, HIDDEN, UNITS, LAYERS = 48, 32, 56, 3

SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": UNITS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
GEMMA = {**HEADS, "query_pre_attn_scalar": 16, "sliding_window": 8}
OWN_NAMES = {
    "gpt2": {"n_embd": HIDDEN, "n_inner": UNITS, "n_layer": LAYERS, "n_head": 2, "n_positions": 64},
    "opt": {"ffn_dim": UNITS, "word_embed_proj_dim": HIDDEN},
    "llama": {**HEADS, "mlp_bias": True},
    "mistral": HEADS,
    "qwen2": HEADS,
    "qwen3": HEADS,
    "phi3": {"num_key_value_heads": 2},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# The families that are used the most, each examined closely here; every other type is in test_architectures.
TYPES = [*OWN_NAMES, "gpt_neox", "gemma3"]
each_type = pytest.mark.parametrize("model_type", TYPES)


def tiny_model(model_type, **changes):
    torch.manual_seed(0)
    if model_type == "gemma3":
        text = {**SHARED, **GEMMA, **changes}
        config = AutoConfig.for_model(
            "gemma3", text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=VOCABULARY - 1
        )
        model = AutoModelForImageTextToText.from_config(config)
    else:
        config = AutoConfig.for_model(model_type, **{**SHARED, **OWN_NAMES.get(model_type, {}), **changes})
        model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():  # biases start at zero, which would hide them
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(params=TYPES)
def model(request):
    return tiny_model(request.param)


def ids(*shape):
    return torch.randint(3, VOCABULARY - 1, shape or (2, 7))


@torch.no_grad()
def logits(model, input_ids):
    return model(input_ids=input_ids, use_cache=False).logits


def mlp_modules(model):
    return [site.modules for site in find_mlps(model).values()]


@contextmanager
def left_as_it_was(model):
    """The very same modules, hooks and outputs after the block as before it."""
    names = dict(model.named_modules())
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in names.items()}
    input_ids = ids()
    before = logits(model, input_ids)
    yield
    after = dict(model.named_modules())
    assert list(after) == list(names)
    assert all(after[name] is module for name, module in names.items())
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in after.items()} == hooks
    assert torch.equal(logits(model, input_ids), before)


class Chain(nn.Module):
    """Calls the original modules of an MLP."""

    def __init__(self, modules):
        super().__init__()
        self.chain = nn.ModuleList(modules)

    def forward(self, x):
        for module in self.chain:
            x = module(x)
        return x


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def sparse_layer(width=HIDDEN, **changes):
    sizes = {"output_size": width, "intermediate_size": 16, "num_experts": 40, "num_experts_per_tok": 4, **changes}
    return random_layer(std=0.2, hidden_size=width, **sizes)


def random_decomposition(layers, **changes):
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 16, "num_experts": 40, **changes}
    return random_mxd_model(layers, std=0.2, **sizes)


def test_finds_every_mlp_with_its_sizes(model):
    sites = find_mlps(model)
    assert list(sites) == list(range(LAYERS))
    for layer, site in sites.items():
        weights = mlp_weights(site)
        assert site.layer == layer
        assert weights.encoder.shape == (UNITS, HIDDEN)
        assert weights.decoder.shape == (HIDDEN, UNITS)
        assert site.input_module is site.modules[0]
        assert site.output_module is site.modules[-1]
        assert len({s.path for s in sites.values()}) == LAYERS
        check_widths([site], MxDLayerConfig(HIDDEN, HIDDEN, 8, 8, 2))


@torch.no_grad()
def test_weights_reproduce_the_function_exactly(model):
    model.double()
    x = torch.randn(5, HIDDEN, dtype=torch.float64)
    for site in find_mlps(model).values():
        weights = mlp_weights(site)
        hidden = ACT2FN[mlp_hidden_act(site)](nn.functional.linear(x, weights.encoder, weights.encoder_bias))
        if weights.up is not None:
            hidden = hidden * nn.functional.linear(x, weights.up, weights.up_bias)
        assert (weights.up is not None) == (mlp_encoder_type(site) == "glu")
        want = Chain(site.modules)(x)
        assert want.std() > 0.01
        got = nn.functional.linear(hidden, weights.decoder, weights.decoder_bias)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_weights_are_copies(model):
    with left_as_it_was(model):
        for tensor in vars(mlp_weights(find_mlp(model, 1))).values():
            if tensor is not None:
                assert not tensor.requires_grad
                tensor.zero_()


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_capture_equals_manual_hooks(model, stop, masked):
    input_ids = ids(2, 7)
    mask = torch.tensor([[0, 0] + [1] * 5, [1] * 7]) if masked else None
    want, ran, handles = {}, [], []
    for layer, site in find_mlps(model).items():
        handles.append(model.get_submodule(site.path).register_forward_hook(lambda *_, layer=layer: ran.append(layer)))
        if layer in (0, 1):
            want[layer] = {}
            handles.append(
                site.input_module.register_forward_pre_hook(
                    lambda _, args, layer=layer: want[layer].update(x=args[0].reshape(2, 7, -1))
                )
            )
            handles.append(
                site.output_module.register_forward_hook(
                    lambda _, args, out, layer=layer: want[layer].update(y=out.reshape(2, 7, -1))
                )
            )
    with torch.no_grad():
        model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    ran.clear()
    handles = [
        model.get_submodule(site.path).register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, site in find_mlps(model).items()
    ]
    with left_as_it_was(model):
        ran.clear()
        got = capture_mlps(model, [1, 0], input_ids, mask, stop_after_last=stop)
        # The layer of the last MLP does not come to its end, and those behind it do not start.
        assert ran == ([0] if stop else [0, 1, 2])
    assert got.keys() == {0, 1}
    for layer, (x, y) in got.items():
        assert x.shape == y.shape == (2, 7, HIDDEN)
        assert not x.requires_grad and not y.requires_grad
        assert torch.equal(x, want[layer]["x"])
        assert torch.equal(y, want[layer]["y"])
        with torch.no_grad():
            torch.testing.assert_close(Chain(find_mlp(model, layer).modules)(x), y, rtol=1e-5, atol=1e-6)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("layers", [[0, 3], [-1], [1, 7, 0]], ids=str)
def test_capture_out_of_range_leaves_no_hook(model, layers):
    with left_as_it_was(model), pytest.raises(SurgeryError, match="out of range"):
        capture_mlps(model, layers, ids())


def test_capture_leaves_no_hook_when_the_forward_fails(model):
    with left_as_it_was(model), pytest.raises((IndexError, ValueError, RuntimeError)):
        capture_mlps(model, [1], torch.full((1, 3), VOCABULARY + 1000))


def test_capture_of_a_layer_named_twice(model):
    input_ids = ids()
    got, want = capture_mlps(model, [1, 1], input_ids), capture_mlps(model, [1], input_ids)
    assert all(torch.equal(g, w) for g, w in zip(got[1], want[1], strict=True))


def test_splicing_the_original_is_bit_equal(model):
    input_ids = ids()
    before = logits(model, input_ids)
    calls = []
    modules = {layer: Chain(site.modules) for layer, site in find_mlps(model).items()}
    for layer, module in modules.items():
        module.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    with spliced_mlps(model, modules):
        assert torch.equal(logits(model, input_ids), before)
    assert calls == [0, 1, 2]


def test_zero_changes_the_logits_and_is_gone_afterwards(model):
    input_ids = ids()
    with left_as_it_was(model):
        before = logits(model, input_ids)
        with spliced_mlps(model, {1: Zero()}):
            changed = logits(model, input_ids)
        assert (changed - before).abs().max() > 1e-3


@torch.no_grad()
def test_the_replacement_sees_and_gives_what_the_original_did(model):
    input_ids, layer = ids(), sparse_layer()
    x, _ = capture_mlps(model, [1], input_ids)[1]
    with spliced_mlps(model, {1: layer}):
        seen, y = capture_mlps(model, [1], input_ids)[1]
    assert torch.equal(seen, x)
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("how", ["block", "exception", "by hand"])
def test_the_very_same_modules_come_back(model, how):
    layers = {0: sparse_layer(), 2: sparse_layer(method="transcoder")}
    with left_as_it_was(model):
        originals = mlp_modules(model)
        if how == "by hand":
            replaced = [replace_mlp(model, layer, module) for layer, module in layers.items()]
            assert mlp_modules(model)[0][0] is layers[0]
            for replacement in replaced:
                replacement.restore()
        else:
            with ExitStack() as stack:
                if how == "exception":
                    stack.enter_context(pytest.raises(ZeroDivisionError))
                replaced = stack.enter_context(spliced_mlps(model, layers))
                inside = mlp_modules(model)
                assert [r.replacement for r in replaced] == list(layers.values())
                assert [r.original for r in replaced] == [originals[0], originals[2]]
                assert inside[0][0] is layers[0]
                assert inside[2][0] is layers[2]
                assert all(isinstance(extra, nn.Identity) for extra in inside[0][1:])
                assert inside[1] == originals[1]
                if how == "exception":
                    raise ZeroDivisionError
        assert mlp_modules(model) == originals


def bad_splices():
    return {
        "second layer out of range": ({0: sparse_layer(), 3: sparse_layer()}, "layer 3 is out of range"),
        "negative layer": ({-1: sparse_layer()}, "out of range"),
        "nothing": ({}, "at least one layer"),
        "second too narrow": ({0: sparse_layer(), 1: sparse_layer(width=24)}, "maps 32 to 32 .* 24 to 24"),
        "output too wide": ({0: sparse_layer(output_size=33)}, "maps 32 to 32 .* 32 to 33"),
    }


@each_type
@pytest.mark.parametrize("case", bad_splices())
def test_a_splice_that_cannot_be_leaves_the_model_as_it_was(model_type, case):
    model, (modules, message) = tiny_model(model_type), bad_splices()[case]
    with left_as_it_was(model), pytest.raises(SurgeryError, match=message), spliced_mlps(model, modules):
        pytest.fail("the block must not run")


def test_an_mlp_is_not_replaced_twice(model):
    with left_as_it_was(model):
        first = replace_mlp(model, 1, sparse_layer())
        with left_as_it_was(model), pytest.raises(SurgeryError, match="layer 1 is already replaced"):
            replace_mlp(model, 1, sparse_layer())
        with left_as_it_was(model), pytest.raises(SurgeryError, match="already replaced"):
            random_decomposition([0, 1]).splice(model)
        first.restore()


def test_restoring_out_of_order_is_refused(model):
    with left_as_it_was(model):
        first = replace_mlp(model, 1, Zero())
        second = replace_mlp(model, 1, Zero())
        with left_as_it_was(model), pytest.raises(SurgeryError, match="layer 1 was changed"):
            first.restore()
        second.restore()
        assert find_mlp(model, 1).input_module is first.replacement
        first.restore()
    with left_as_it_was(model), pytest.raises(SurgeryError, match="changed after"):
        first.restore()


def test_weights_of_a_replaced_mlp_are_refused(model):
    with (
        spliced_mlps(model, {0: sparse_layer()}),
        left_as_it_was(model),
        pytest.raises(
            SurgeryError, match=r"no rule finds the pretrained weights of layer 0 .MxDLayer.*: undo a replacement"
        ),
    ):
        mlp_weights(find_mlp(model, 0))


def test_another_failed_restore_does_not_stop_the_rest(model):
    originals = mlp_modules(model)
    with pytest.raises(SurgeryError, match="layer 2"), spliced_mlps(model, {0: Zero(), 2: Zero()}):
        stranger = replace_mlp(model, 2, Zero())
    assert mlp_modules(model)[:2] == originals[:2]
    assert find_mlp(model, 2).input_module is stranger.replacement


@pytest.mark.parametrize("wrong", ["no model", "wrapped"])
def test_what_is_no_model_of_transformers_is_refused(wrong, tiny_llama):
    wrapper = nn.Module()
    wrapper.config, wrapper.model = tiny_llama.config, tiny_llama.model
    model = {"no model": nn.Linear(2, 2), "wrapped": wrapper}[wrong]
    names = list(model.named_modules())
    for attempt in (
        lambda: find_mlps(model),
        lambda: replace_mlp(model, 0, Zero()),
        lambda: capture_mlps(model, [0], ids()),
    ):
        with pytest.raises(SurgeryError, match=f"{type(model).__name__} is not a transformers model itself"):
            attempt()
    assert list(model.named_modules()) == names


def test_a_model_without_its_head_has_the_same_mlps(tiny_llama):
    sites = find_mlps(tiny_llama.model)
    assert [site.modules for site in sites.values()] == mlp_modules(tiny_llama)
    assert [site.path for site in sites.values()] == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize("cast", [True, False])
def test_a_bfloat16_model(model, cast):
    model.bfloat16()
    layer = sparse_layer()
    with spliced_mlps(model, {1: layer}, cast=cast):
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16 if cast else torch.float32}
        out = logits(model, ids())
    assert out.isfinite().all()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_refused_layer_is_not_cast(model):
    model.bfloat16()
    narrow, late = sparse_layer(width=24), sparse_layer()
    for layer, module in ((0, narrow), (LAYERS, late)):
        with pytest.raises(SurgeryError):
            replace_mlp(model, layer, module)
        assert {p.dtype for p in module.parameters()} == {torch.float32}


def generate(model, prompt, use_cache):
    return model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        use_cache=use_cache,
    )


def test_generation_with_cache_equals_generation_without(model):
    mxd, prompt = random_decomposition([0, 2]), ids(2, 5)
    with left_as_it_was(model), mxd.spliced(model) as replaced:
        assert [r.site.layer for r in replaced] == [0, 2]
        calls = []
        mxd.layer(2).register_forward_hook(lambda _, args, out: calls.append(out.numel() // HIDDEN))
        cached = generate(model, prompt, True)
        assert calls == [10] + [2] * 7, "one token a step"
        assert torch.equal(cached, generate(model, prompt, False))
    assert cached.shape == (2, 13)


def test_forward_and_backward_through_a_spliced_model(model):
    mxd, input_ids = random_decomposition([0, 1], encoder_type="glu"), ids()
    model.train()
    extra = {"token_type_ids": torch.zeros_like(input_ids)} if model.config.model_type == "gemma3" else {}
    with mxd.spliced(model):
        model(input_ids=input_ids, labels=input_ids, **extra).loss.backward()
    for name, parameter in mxd.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    originals = [p for layer in (0, 1) for module in mlp_modules(model)[layer] for p in module.parameters()]
    assert all(p.grad is None for p in originals)
    assert all(p.grad is not None for module in mlp_modules(model)[2] for p in module.parameters())


@pytest.mark.parametrize("cast", [True, False])
def test_splice_without_a_block(model, cast):
    mxd, input_ids = random_decomposition([2, 0]), ids()
    model.bfloat16()
    with left_as_it_was(model):
        replaced = mxd.splice(model, cast=cast)
        assert mxd.dtype == (torch.bfloat16 if cast else torch.float32)
        assert find_mlp(model, 2).input_module is mxd.layer(2)
        by_splice = logits(model, input_ids)
        for replacement in replaced:
            replacement.restore()
        with mxd.spliced(model, cast=cast):
            assert torch.equal(logits(model, input_ids), by_splice)


def test_an_intervention_steers_the_spliced_model(model):
    mxd, input_ids = random_decomposition([1]), ids()
    with mxd.spliced(model):
        plain = logits(model, input_ids)
        with mxd.layer(1).intervene(add={7: 50.0}):
            assert not torch.allclose(logits(model, input_ids), plain)
        assert torch.equal(logits(model, input_ids), plain)


def test_a_copied_model_has_its_own_sites(model):
    twin = copy.deepcopy(model)
    with left_as_it_was(model), spliced_mlps(twin, {0: Zero()}):
        pass
    assert all(a[0] is not b[0] for a, b in zip(mlp_modules(model), mlp_modules(twin), strict=True))

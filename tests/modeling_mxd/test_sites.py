"""Finding MLPs: stacks, sites by name, what is said where there is none."""

import re
import time

import pytest
import torch
from mxd_cases import random_layer
from tiny_models import model_inputs, tiny_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mxd.base.capture import capture_mlps
from mxd.base.pretrained_weights import mlp_hidden_act, mlp_weights, mlp_widths
from mxd.jobs.layers import find_all_mlps
from mxd.modeling_mxd import (
    MxDConfig,
    MxDModel,
    SurgeryError,
    find_mlp,
    find_mlps,
    find_stacks,
    spliced_mlps,
)


def stacks_of(model):
    return list(find_stacks(model))


def test_an_encoder_decoder_has_two_stacks_and_the_decoder_is_meant():
    model = tiny_model("t5")
    assert stacks_of(model) == ["encoder.block", "decoder.block"]
    assert find_mlp(model, 0).slots == ("decoder.block.0.layer.2.DenseReluDense",)
    assert find_mlp(model, 0, "encoder").slots == ("encoder.block.0.layer.1.DenseReluDense",)
    assert find_mlp(model, 0, "encoder.block").slots == find_mlp(model, 0, "encoder").slots


def test_a_language_model_is_meant_not_its_eye():
    model = tiny_model("gemma3")
    assert len(stacks_of(model)) == 2
    assert find_mlp(model, 1).stack == "model.language_model.layers"
    assert find_mlp(model, 1, "model.vision_tower.encoder.layers").kind == "module"


def test_lists_that_differ_in_a_number_are_one_stack():
    model = tiny_model("swin")
    [stack] = stacks_of(model)
    assert stack.endswith("layers.*.blocks")
    widths = [mlp_widths(site)[0] for site in find_mlps(model).values()]
    assert widths == sorted(widths) and widths[0] < widths[-1]


@pytest.mark.parametrize("model_type", ["blt", "hrm_text"])
def test_several_stacks_that_may_be_meant_are_asked_for(model_type):
    model = tiny_model(model_type)
    names = stacks_of(model)
    with pytest.raises(SurgeryError, match=f"has the stacks {re.escape(', '.join(names))}: say which"):
        find_mlps(model)
    for name in names:
        assert all(site.stack == name for site in find_mlps(model, name).values())


def test_an_unknown_stack_is_refused_with_those_that_there_are(tiny_llama):
    with pytest.raises(SurgeryError, match=r"LlamaForCausalLM has no stack 'model\.blocks'; it has model\.layers"):
        find_mlps(tiny_llama, "model.blocks")
    with pytest.raises(SurgeryError, match="LlamaForCausalLM has no encoder; it has model"):
        find_mlps(tiny_llama, "encoder")


def test_an_unknown_site_is_refused_with_those_that_there_are():
    model = tiny_model("longcat_flash")
    with pytest.raises(
        SurgeryError, match=r"no layer of model\.layers .* has mlps\.7; they have mlp; mlps\.0; mlps\.1"
    ):
        find_mlps(model, site="mlps.7")


def test_all_mlps_of_a_layer_are_listed():
    names = [site.name for site in find_all_mlps(tiny_model("longcat_flash")) if site.layer == 0]
    assert names == ["mlp", "mlps.0", "mlps.1", "mlp.experts"]


def test_layers_without_an_mlp_say_why():
    sites = find_mlps(tiny_model("nemotron_h"))
    kinds = [site.kind for site in sites.values()]
    assert set(kinds) == {"none", "module", "mixture-of-experts"}
    for site in sites.values():
        assert bool(site.slots) == (site.kind != "none")
        assert "NemotronHBlock has no module that is an MLP" in site.reason or site.slots
    none = kinds.index("none")
    with pytest.raises(SurgeryError, match=f"layer {none} of NemotronHForCausalLM has no MLP: NemotronHBlock has no"):
        find_mlp(tiny_model("nemotron_h"), none)


class OwnBlock(nn.Module):
    """A layer as somebody's own code may have it."""

    def __init__(self, width=16):
        super().__init__()
        self.project_in, self.squash, self.project_out = nn.Linear(width, 24), nn.Tanh(), nn.Linear(24, width)

    def forward(self, x, **_):
        return x + self.project_out(self.squash(self.project_in(x)))


@pytest.fixture
def own_model(tiny_llama):
    """A model that no rule knows: its MLPs stand in blocks of its own."""
    tiny_llama.model.layers = nn.ModuleList()
    tiny_llama.model.stages = nn.ModuleList(OwnBlock() for _ in range(2))

    def forward(input_ids, use_cache=False, **_):
        x = tiny_llama.model.embed_tokens(input_ids)
        for stage in tiny_llama.model.stages:
            x = stage(x)
        return tiny_llama.lm_head(x)

    tiny_llama.forward = forward
    return tiny_llama


def test_an_unknown_model_is_addressed_by_paths(own_model):
    where = {"stack": "model.stages", "site": "project_in,squash,project_out"}
    with pytest.raises(SurgeryError, match="layer 0 of LlamaForCausalLM has no MLP: OwnBlock has no module that is an"):
        find_mlp(own_model, 0, "model.stages")
    site = find_mlp(own_model, 1, **where)
    assert mlp_widths(site) == (16, 24, 16) and mlp_hidden_act(site) == "tanh" and site.kind == "inline"
    ids = torch.randint(0, 64, (2, 5))
    before, (x, y) = own_model(ids), capture_mlps(own_model, [1], ids, **where)[1]
    torch.testing.assert_close(mlp_weights(site).apply(x, torch.tanh), y)
    layer = random_layer(hidden_size=16, output_size=16)
    config = MxDConfig.from_layer_configs({1: layer.config}, **where)
    mxd = MxDModel(config)
    for parameter in mxd.parameters():
        nn.init.normal_(parameter)
    with mxd.spliced(own_model):
        assert not torch.equal(own_model(ids), before)
        assert own_model.model.stages[1].project_in is mxd.layer(1)
    assert torch.equal(own_model(ids), before)


@pytest.mark.parametrize("model_type", ["mixtral", "llama4_text", "jamba"])
def test_the_routed_experts_alone_leave_router_and_shared_expert(model_type):
    """`mlp.experts` is understood whatever the model calls its MLP."""
    model = tiny_model(model_type)
    site = next(s for s in find_mlps(model, site="mlp.experts").values() if s.slots)
    block = find_mlp(model, site.layer).input_module
    assert site.input_module is block.experts
    with spliced_mlps(model, {site.layer: nn.Identity()}, site="mlp.experts"):
        assert find_mlp(model, site.layer).input_module is block


def test_a_repeated_layer_gives_all_its_runs():
    model = tiny_model("albert")
    inputs = model_inputs(model, batch=2, tokens=8)
    sites = find_mlps(model)
    assert len(sites) == 1 and sites[0].repeated
    x, y = capture_mlps(model, [0], **inputs)[0]
    runs = model.config.num_hidden_layers
    assert x.shape[:2] == y.shape[:2] == (2 * runs, 8)
    assert not torch.equal(x[:2], x[2:4])


def test_slices_of_a_row_are_put_together():
    whole, sliced = tiny_model("bert"), tiny_model("bert@chunk")
    assert sliced.config.chunk_size_feed_forward
    sliced.load_state_dict(whole.state_dict())
    inputs = model_inputs(whole, batch=3, tokens=8)
    for expected, got in zip(
        capture_mlps(whole, [1], **inputs)[1], capture_mlps(sliced, [1], **inputs)[1], strict=True
    ):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected)


def test_both_sides_of_an_encoder_decoder_are_captured():
    model = tiny_model("bart", "AutoModelForSeq2SeqLM")
    inputs = model_inputs(model, batch=2, tokens=8)
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :5]
    inputs.pop("decoder_attention_mask", None)
    assert capture_mlps(model, [0], stack="encoder", **inputs)[0][0].shape[:2] == (2, 8)
    assert capture_mlps(model, [0], stack="decoder", **inputs)[0][0].shape[:2] == (2, 5)


def test_finding_takes_no_time_that_anybody_notices():
    """Not a benchmark (that is benchmarks/architectures.py): a guard against something quadratic."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=32, num_attention_heads=2
    )
    model, started = LlamaForCausalLM(config), time.process_time()
    assert len(find_mlps(model)) == 32
    assert time.process_time() - started < 2

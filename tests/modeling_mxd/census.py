"""What surgery must do on one architecture: splice exactly, run, learn, generate, come off, be saved and loaded."""

import inspect
import tempfile
from dataclasses import dataclass, field

import torch
from torch import nn

from modeling_mxd import MxDConfig, MxDLayerConfig, MxDModel
from modeling_mxd.sites import MLPSite, find_mlps
from modeling_mxd.verification import _tensors, originals_routed

NUM_EXPERTS, K = 12, 3


@dataclass
class Examined:
    """One stack of one architecture."""

    stack: str
    layers: int
    kinds: dict[str, int]
    layout: str
    hidden_act: str | None
    reasons: list[str] = field(default_factory=list)


def outputs(model, inputs):
    """All floating tensors that the model gives, the same at every call."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        found = list(_tensors(model(**inputs)))
    return [tensor.clone() for tensor in found if tensor.is_floating_point()]


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True)
    )


def identity_splice_is_exact(model, sites, inputs):
    """The model's own functions through the wrapper: all outputs equal to the last bit."""
    before = outputs(model, inputs)
    with originals_routed(sites):
        return equal(outputs(model, inputs), before)


def decomposition_of(model, sites: list[MLPSite]) -> MxDModel:
    """A random decomposition of these sites, with outputs of the MLPs' order of magnitude."""
    layers = {}
    for site in sites:
        inputs, units, width = site.widths
        layers[site.layer] = MxDLayerConfig(
            hidden_size=inputs,
            output_size=width,
            intermediate_size=min(units, 64),
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=K,
            hidden_act=site.hidden_act or "silu",
            encoder_type=site.encoder_type,
        )
    config = MxDConfig.from_layer_configs(layers, stack=sites[0].stack, site=sites[0].name)
    decomposition = MxDModel(config)
    for parameter in decomposition.parameters():
        nn.init.normal_(parameter, std=0.3)
    decomposition.record_base(model)
    return decomposition.eval()


def examine_splice(model, sites, inputs):
    """Splice a decomposition, run forward and backward, come off; save, load, splice again: equal outputs."""
    untouched = outputs(model, inputs)
    decomposition = decomposition_of(model, sites)
    with decomposition.spliced(model, example_inputs=inputs):
        spliced = outputs(model, inputs)
        assert not equal(spliced, untouched), "the decomposition has no effect on the outputs"
        assert all(a.shape == b.shape for a, b in zip(spliced, untouched, strict=True)), "outputs of another shape"
        _check_backward(model, decomposition, inputs)
    assert equal(outputs(model, inputs), untouched), "not as it was after splicing"
    with tempfile.TemporaryDirectory() as folder:
        decomposition.save_pretrained(folder)
        loaded = MxDModel.from_pretrained(folder)
    with loaded.spliced(model, example_inputs=inputs):
        assert equal(outputs(model, inputs), spliced), "other outputs after saving and loading"
    return decomposition


def _check_backward(model, decomposition, inputs):
    decomposition.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = [t for t in _tensors(model(**inputs, **_no_cache(model))) if t.is_floating_point() and t.requires_grad]
    assert found, "no output depends on the decomposition"
    sum(t.float().square().sum() for t in found).backward()
    for layer in decomposition.config.layers:
        gradients = [p.grad for p in decomposition.layer(layer).parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), f"no gradient reaches layer {layer}"
    decomposition.zero_grad()


def _no_cache(model):
    """RWKV changes the state that it returns in place."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def examine(model, inputs, stack=None) -> Examined:
    """All of it for all layers of a stack together, and for one layer.

    Raises:
        AssertionError: saying what does not hold.
    """
    found = find_mlps(model, stack)
    sites = [site for site in found.values() if site.slots]
    kinds = {kind: sum(site.kind == kind for site in found.values()) for kind in {site.kind for site in found.values()}}
    first = sites[0] if sites else None
    examined = Examined(
        next(iter(found.values())).stack,
        len(found),
        kinds,
        str(first.layout) if first else "",
        first.hidden_act if first else None,
        sorted({site.reason for site in found.values() if site.reason}),
    )
    if not sites:
        return examined
    assert identity_splice_is_exact(model, sites, inputs), "identity splice is not exact"
    decomposition = examine_splice(model, sites, inputs)
    if len(sites) > 1:
        examine_splice(model, sites[len(sites) // 2 :][:1], inputs)
    examine_generation(model, decomposition)
    return examined


def examine_generation(model, decomposition):
    """Greedy tokens with the cache as without, where the model can generate from text."""
    if not (model.can_generate() and model.main_input_name == "input_ids") or model.config.is_encoder_decoder:
        return
    ids = torch.randint(10, 60, (2, 5))
    with torch.random.fork_rng(), decomposition.spliced(model):
        torch.manual_seed(0)
        tokens = model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape[1] >= 8, "generate gives no tokens"

"""What surgery must do on one architecture: splice exactly, run, learn, generate, come off, be saved and loaded."""

import inspect
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tiny_models import GENERATE_FAILS, model_inputs, tiny_model
from torch import nn

from mxd.base.pretrained_weights import mlp_encoder_type, mlp_hidden_act, mlp_layout, mlp_widths, record_base
from mxd.jobs.layers import find_all_mlps
from mxd.modeling_mxd import MxDConfig, MxDLayerConfig, MxDModel, find_mlps
from mxd.modeling_mxd.architectures import is_other_tower
from mxd.modeling_mxd.sites import MAIN, MLPSite
from mxd.modeling_mxd.surgery import tensors_in

# Stacks whose MLPs cannot be seen in the model's outputs, and why.
WITHOUT_EFFECT = {
    ("blt", "model.patcher.layers"): "it only chooses where patches end, a choice that a tiny model makes alike",
}
# Kind of stack, site and encoder of what was saved and loaded: the files are the same whatever the architecture.
SAVED: set[tuple[bool, str, str]] = set()
# Code of layers and MLPs on which surgery was found to work: many architectures are another's under other names.
WORKS: set[tuple[object, ...]] = set()
# Models that refuse to run backward in eval mode, and the row length that they then want.
ONLY_TRAINING = {"reformer": 64}


@dataclass
class Examined:
    """One kind of MLP in one stack of one architecture, found to work."""

    stack: str
    site: str
    layers: list[int]
    kind: str
    slots: str
    layout: str
    hidden_act: str | None
    reason: str


@contextmanager
def same_randomness():
    """Seed the CPU's generator inside the block alone; `torch.manual_seed` formats a stack trace for CUDA each time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def outputs(model, inputs):
    """Return all floating tensors of the model's output, the same at every call."""
    with torch.no_grad(), same_randomness():
        found = list(tensors_in(model(**inputs)))
    return [tensor.clone() for tensor in found if tensor.is_floating_point()]


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True)
    )


def decomposition_of(model, sites: list[MLPSite]) -> MxDModel:
    """A random decomposition of these sites."""
    layers = {}
    for site in sites:
        inputs, units, width = mlp_widths(site)
        layers[site.layer] = MxDLayerConfig(
            hidden_size=inputs,
            output_size=width,
            intermediate_size=min(units, 64),
            num_experts=12,
            num_experts_per_tok=3,
            hidden_act=mlp_hidden_act(site) or "silu",
            encoder_type=mlp_encoder_type(site),
        )
    decomposition = MxDModel(MxDConfig.from_layer_configs(layers, stack=sites[0].stack, site=sites[0].name))
    for parameter in decomposition.parameters():
        nn.init.normal_(parameter, std=0.3)
    record_base(decomposition, model)
    return decomposition.eval()


def examine_splice(model, sites, inputs, untouched, has_effect, generates):
    """Splice a decomposition, which checks that surgery is exact, run forward and backward, generate, come off; for
    each kind of site save it, load one layer, splice that alone."""
    decomposition = decomposition_of(model, sites)
    with decomposition.spliced(model, example_inputs=inputs):
        check_outputs(outputs(model, inputs), untouched, has_effect)
        if has_effect:
            examine_backward(model, decomposition, inputs)
        if generates:
            examine_generation(model, model_inputs(model))
    one = sites[len(sites) // 2]
    key = (is_other_tower(one.stack), one.name, decomposition.config.layer(one.layer).encoder_type)
    if key not in SAVED:
        SAVED.add(key)
        with saved_and_loaded(decomposition, one.layer).spliced(model, example_inputs=inputs):
            check_outputs(outputs(model, inputs), untouched, has_effect)


def saved_and_loaded(decomposition, layer):
    """Return one layer of a decomposition from its folder."""
    with tempfile.TemporaryDirectory() as folder:
        decomposition.save_pretrained(folder)
        loaded = MxDModel.from_pretrained(folder, layers=[layer])
    weights, saved = (one.layer(layer).state_dict() for one in (loaded, decomposition))
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved), "other weights after saving and loading"
    return loaded


def check_outputs(spliced, untouched, has_effect):
    """The outputs have the untouched model's shapes, and other values."""
    assert not has_effect or not equal(spliced, untouched), "the decomposition has no effect on the outputs"
    assert [a.shape for a in spliced] == [b.shape for b in untouched], "outputs of another shape"


def examine_backward(model, decomposition, inputs):
    """A gradient reaches every layer of the decomposition."""
    # RWKV changes the state that it returns in place.
    without_cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    model.train(model.config.model_type in ONLY_TRAINING)
    with same_randomness():
        found = [tensor for tensor in tensors_in(model(**inputs, **without_cache)) if tensor.requires_grad]
        sum(tensor.float().square().sum() for tensor in found).backward()
    model.eval()
    reached = [
        any(
            parameter.grad is not None and parameter.grad.any() for parameter in decomposition.layer(layer).parameters()
        )
        for layer in decomposition.config.layers
    ]
    # Of a vision tower the last layer may have no part in what the language model sees.
    assert all(reached[:-1] if is_other_tower(decomposition.config.stack) else reached), "no gradient in a layer"
    model.zero_grad()


def examine_generation(model, inputs):
    """Greedy generation from the same inputs, with the cache that the model keeps."""
    with same_randomness(), torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape[-1] >= 3, "generate gives no tokens"


def examine(model_type: str) -> list[Examined]:
    """All of it for every stack and every MLP of a tiny model: all layers together, and one alone.

    Raises:
        AssertionError, SurgeryError: saying what does not hold.
    """
    model = tiny_model(model_type)
    inputs = model_inputs(model, tokens=ONLY_TRAINING.get(model_type, 8))
    untouched, running = outputs_and_paths(model, inputs)
    whole = [site for site in find_all_mlps(model) if not site.name.startswith("mlp.")]
    kinds = dict.fromkeys((site.stack, site.name) for site in whole)
    kinds |= dict.fromkeys((site.stack, f"{site.name}.experts") for site in whole if has_routed_experts(site))
    generates = model.can_generate() and model_type not in GENERATE_FAILS and model.main_input_name == "input_ids"
    examined = []
    for stack, name in kinds:
        examined += _examine_sites(model, inputs, stack, name, untouched, running, generates)
        generates = generates and not any(row.slots for row in examined)  # the first stack alone
    return examined


def outputs_and_paths(model, inputs):
    """Outputs, and the paths of the modules that take part: a vision tower does not, on text alone."""
    ran: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, path=path: ran.add(path)) for path, module in model.named_modules()
    ]
    untouched = outputs(model, inputs)
    for handle in handles:
        handle.remove()
    return untouched, ran


def code_of(module, *, children=True) -> tuple[object, ...]:
    """What a module and those in it compute, whatever their classes are called."""
    kind = type(module)
    if kind.__module__.startswith("torch."):
        return (kind,)
    bodies = [
        inspect.unwrap(value).__code__
        for cls in kind.__mro__
        if cls.__module__.startswith("transformers.models")
        for value in vars(cls).values()
        if inspect.isfunction(value) and value.__name__ != "__init__"
    ]
    inside = [(name, code_of(child)) for name, child in module.named_children()] if children else []
    return (*((body.co_code, body.co_names, body.co_varnames) for body in bodies), *inside)


def has_routed_experts(site: MLPSite) -> bool:
    """Whether the routed experts of a mixture can be replaced alone, its router and its shared expert staying."""
    experts = getattr(site.modules[0], "experts", None) if site.slots else None
    return isinstance(experts, nn.Module) and not isinstance(experts, nn.ModuleList)


def _examine_sites(model, inputs, stack, name, untouched, running, generates) -> list[Examined]:
    found = {layer: site for layer, site in find_mlps(model, stack, name).items() if site.path in running}
    sites = [site for site in found.values() if site.slots]
    layers = [model.get_submodule(site.path) for site in sites]
    code = (
        name,
        *dict.fromkeys(
            (code_of(layer, children=False), *map(code_of, site.modules))
            for layer, site in zip(layers, sites, strict=True)
        ),
    )
    if sites and code not in WORKS:
        has_effect = (model.config.model_type, stack) not in WITHOUT_EFFECT
        examine_splice(model, sites, inputs, untouched, has_effect, generates)
        assert equal(outputs(model, inputs), untouched), "not as it was after splicing"
        WORKS.add(code)
    rows: dict[tuple[str, ...], Examined] = {}
    for site in found.values():
        slots = ", ".join(slot.removeprefix(f"{site.path}.") for slot in site.slots)
        layout, act = (str(mlp_layout(site)), mlp_hidden_act(site)) if site.slots else ("", None)
        reason = site.reason if site.slots else site.reason.partition(", only")[0]
        key = (site.kind, slots, layout)
        if key in rows:
            rows[key].layers.append(site.layer)
        elif site.slots or name == MAIN:
            rows[key] = Examined(stack, name, [site.layer], site.kind, slots, layout, act, reason)
    return list(rows.values())

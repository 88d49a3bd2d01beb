"""Find the MLPs of a model: its stacks of transformer layers, and one `MLPSite` for every layer.

A stack is a list of transformer layers; an encoder–decoder or multimodal model has several. The rules in
`architectures` say where a layer keeps its MLP; for a model that they do not know, the caller gives the paths.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .architectures import LAYER_EXCEPTIONS, is_other_tower, layer_chains, resolve

MAIN = "mlp"
"""Name of a layer's main MLP, whatever the model calls it."""


class SurgeryError(ValueError):
    """Report an MLP that cannot be found, replaced or restored, and what to do."""


@dataclass(frozen=True, eq=False)
class MLPSite:
    """Say where one MLP of a model is.

    Attributes:
        model: the model.
        stack: dotted path of the list of transformer layers; `*` for the numbers of a list of lists.
        layer, path: index of the transformer layer in its stack, and its dotted path.
        name: `"mlp"` for the layer's main MLP, else the paths that the caller gave.
        slots: dotted paths, from the model, of the modules that make up the MLP, in the order in which they run;
            empty if the layer has none.
        reason: why there is none, or why the rules do not fit; empty for an ordinary MLP.
        repeated: the layer runs several times in one forward pass.
    """

    model: nn.Module = field(repr=False)
    stack: str
    layer: int
    path: str
    name: str
    slots: tuple[str, ...]
    reason: str = ""
    repeated: bool = False

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that are in the slots now."""
        self.check_exists()
        try:
            return tuple(self.model.get_submodule(slot) for slot in self.slots)
        except AttributeError as error:
            raise SurgeryError(f"layer {self.layer} was changed since its MLP was found: {error}") from None

    @property
    def kind(self) -> str:
        """`"module"`, `"mixture-of-experts"`, `"none"`; `"inline"` if the layer calls the linears itself, and
        `"residual-inside"` if a block does that also holds a residual or a norm."""
        if len(self.slots) != 1:
            return ("residual-inside" if "residual" in self.reason else "inline") if self.slots else "none"
        names = {name.rpartition(".")[2] for name, _ in self.input_module.named_modules(prefix=self.slots[0])}
        routed = names & {"experts", "router"} or "Experts" in type(self.input_module).__name__
        return "mixture-of-experts" if routed else "module"

    @property
    def input_module(self) -> nn.Module:
        """The module whose first input is the MLP's."""
        return self.modules[0]

    @property
    def output_module(self) -> nn.Module:
        """The module whose (first) output is the MLP's."""
        return self.modules[-1]

    def put(self, modules: tuple[nn.Module, ...]) -> None:
        """Put modules into the slots, one each."""
        for slot, module in zip(self.slots, modules, strict=True):
            parent, _, name = slot.rpartition(".")
            setattr(self.model.get_submodule(parent), name, module)

    def check_exists(self) -> None:
        """Raise a SurgeryError with the reason if the layer has no MLP."""
        if not self.slots:
            raise SurgeryError(f"layer {self.layer} of {type(self.model).__name__} has no MLP: {self.reason}")


def find_stacks(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """Return all lists of transformer layers as {stack: [(path of a layer, the layer), …]}, without lists in a layer.

    Lists that differ only in a number (the stages of a Swin transformer) are one stack, `encoder.layers.*.blocks`.
    """
    if not isinstance(model, PreTrainedModel):
        raise SurgeryError(f"{type(model).__name__} is not a transformers model itself: pass the model inside of it")
    found: dict[str, list[tuple[str, nn.Module]]] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or path.startswith(inside or "\0"):
            continue
        if any(layer_chains(layer) for layer in module):
            inside = (*inside, f"{path}.")
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)
            found.setdefault(pattern, []).extend((f"{path}.{name}", layer) for name, layer in module.named_children())
    return found


def choose_stack(model: PreTrainedModel, stack: str | None, stacks: Mapping[str, Any]) -> str:
    """Return the path of the stack that is meant, or raise a SurgeryError that lists the model's `stacks`.

    `stack` is a stack's path, `"encoder"` or `"decoder"`, or None for the language model's (of an encoder–decoder
    model: the decoder's).
    """
    kind, found, names = type(model).__name__, list(stacks), ", ".join(stacks)
    if not stacks:
        raise SurgeryError(f"{kind} has no MLP: no list of its modules holds layers with one")
    if stack in ("encoder", "decoder"):
        found = [path for path in stacks if re.search(rf"(^|[._]){stack}([._]|$)", path)]
    elif stack is not None:
        found = [path for path in stacks if path == stack]
    elif len(stacks) > 1:
        decoder = model.get_decoder()
        prefix = next((f"{path}." for path, module in model.named_modules() if module is decoder and path), "")
        found = [path for path in stacks if path.startswith(prefix)] or found
    if stack is not None and not found:
        what = stack if stack in ("encoder", "decoder") else f"stack {stack!r}"
        raise SurgeryError(f"{kind} has no {what}; it has {names}")
    if len(found) > 1:
        found = [path for path in found if not is_other_tower(path)]
    if len(found) != 1:
        raise SurgeryError(f"{kind} has the stacks {names}: say which is meant with stack=")
    return found[0]


def find_mlps(model: nn.Module, stack: str | None = None, site: str = MAIN) -> dict[int, MLPSite]:
    """Return one site for every transformer layer of a stack, by the layer's index, also for layers without an MLP.

    Args:
        model: a transformers model, itself rather than inside a wrapper.
        stack: see `choose_stack`; for an unknown model the path of any list of modules.
        site: `"mlp"` for a layer's main MLP, or dotted paths from the layer, separated by commas, of the modules that
            make up another one: `"mlp.experts"` (the routed experts of a mixture without router and shared expert,
            whatever the model calls its MLP), `"shared_mlp"`, `"fc1,act,fc2"`.

    Raises:
        SurgeryError: the model has no such stack, or none of its layers has such modules.
    """
    stacks = find_stacks(model)
    if stack is not None and stack not in (*stacks, "encoder", "decoder"):
        named = resolve(model, stack)
        if isinstance(named, nn.ModuleList | nn.Sequential):
            stacks = {stack: [(f"{stack}.{name}", layer) for name, layer in named.named_children()]}
    chosen = choose_stack(model, stack, stacks)
    layers = stacks[chosen]
    sites = {index: _site(model, chosen, index, path, layer, site) for index, (path, layer) in enumerate(layers)}
    if site != MAIN and not any(found.slots for found in sites.values()):
        others = "; ".join(sorted({",".join(chain) for _, layer in layers for chain in layer_chains(layer)}))
        raise SurgeryError(f"no layer of {chosen} in {type(model).__name__} has {site}; they have {others or 'no MLP'}")
    return sites


def _site(model: nn.Module, stack: str, index: int, path: str, layer: nn.Module, name: str) -> MLPSite:
    exception = LAYER_EXCEPTIONS.get(type(layer).__name__)
    chains = layer_chains(layer)
    if name != MAIN:
        chain = tuple(_physical(layer, part.strip(), chains) for part in name.split(","))
        there = all(resolve(layer, part) is not None for part in chain)
        chains = [chain] if there else []
    reason = exception.reason if exception is not None else ""
    says_why = exception is not None and not exception.slots and name == MAIN
    if not chains and not says_why:
        inside = ", ".join(f"{child} ({type(module).__name__})" for child, module in layer.named_children())
        what = "an MLP" if name == MAIN else name
        reason = f"{type(layer).__name__} has no module that is {what}, only {inside[:300] or 'nothing'}"
    slots = tuple(f"{path}.{part}" if part else path for part in chains[0]) if chains else ()
    repeated = bool(chains) and exception is not None and exception.repeated
    return MLPSite(model, stack, index, path, name, slots, reason, repeated)


def _physical(layer: nn.Module, path: str, chains: list[tuple[str, ...]]) -> str:
    """Resolve `mlp.experts` also where the model calls its MLP otherwise."""
    first, _, rest = path.partition(".")
    renamed = first == MAIN and not hasattr(layer, MAIN) and chains and len(chains[0]) == 1
    return f"{chains[0][0]}.{rest}".rstrip(".") if renamed else path


def site_of(sites: Mapping[int, MLPSite], layer: int) -> MLPSite:
    """Return the MLP of a layer that `find_mlps` found, or raise a SurgeryError if it has none."""
    if layer not in sites:
        raise SurgeryError(f"layer {layer} is out of range: the model has layers 0 to {len(sites) - 1}")
    sites[layer].check_exists()
    return sites[layer]


def find_mlp(model: nn.Module, layer: int, stack: str | None = None, site: str = MAIN) -> MLPSite:
    """Return the MLP of one layer, or raise a SurgeryError if it has none; see `find_mlps`."""
    return site_of(find_mlps(model, stack, site), layer)

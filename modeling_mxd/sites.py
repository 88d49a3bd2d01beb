"""Finding the MLPs of any model: its stacks of transformer layers, and one `MLPSite` for every layer.

A stack is a list of transformer layers: most models have one, others an encoder's and a decoder's, or a language
model's and a vision tower's. Where a layer keeps its MLP is told by the rules in `architectures`; for a model that
they do not know, stack and MLP can be named by their paths.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .architectures import LAYER_EXCEPTIONS, RESIDUAL_INSIDE, is_other_tower, layer_chains, resolve, spelled_out
from .configuration_mxd import MxDLayerConfig
from .pretrained_weights import (
    PretrainedWeights,
    WeightLayout,
    find_activation,
    find_layout,
    layout_widths,
    read_weights,
)

MAIN = "mlp"
"""Name of a layer's main MLP, whatever the model calls it."""
_ACTIVE_EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token", "moe_top_k")


class SurgeryError(ValueError):
    """An MLP cannot be found, replaced or restored; the message says which and what to do."""


@dataclass(frozen=True, eq=False)
class MLPSite:
    """One MLP of a model, as it stands. Sizes are read from the weights, never from the model's config.

    Attributes:
        model: the model.
        stack: dotted path of the list of transformer layers; `*` for the numbers of a list of lists.
        layer: index of the transformer layer in its stack.
        path: dotted path of the transformer layer.
        name: `"mlp"` for the layer's main MLP, else what was asked for.
        slots: dotted paths, from the model, of the modules that make up the MLP, in the order in which they run;
            empty where the layer has none.
        kind: `"module"`; `"inline"`: the layer calls the linears itself; `"residual-inside"`: inline in a block that
            holds a residual or a norm too; `"mixture-of-experts"`; `"none"`.
        reason: why there is none, or why the rules do not fit; empty for an ordinary one.
        repeated: the layer runs several times in one forward pass.
    """

    model: nn.Module = field(repr=False)
    stack: str
    layer: int
    path: str
    name: str
    slots: tuple[str, ...]
    kind: str
    reason: str = ""
    repeated: bool = False

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """What the slots hold at this moment.

        Raises:
            SurgeryError: the layer has no MLP, or was taken apart since it was found.
        """
        self.check_exists()
        try:
            return tuple(self.model.get_submodule(slot) for slot in self.slots)
        except AttributeError as error:
            raise SurgeryError(f"layer {self.layer} was changed since its MLP was found: {error}") from None

    @property
    def parent(self) -> nn.Module:
        """The transformer layer."""
        return self.model.get_submodule(self.path)

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

    @cached_property
    def layout(self) -> WeightLayout | None:
        """Where the pretrained weights are; None where no rule finds them."""
        return find_layout(self.modules)

    @cached_property
    def widths(self) -> tuple[int, int, int] | None:
        """(I, H, O), from the weights: input, hidden units (of all experts), output; None without a layout."""
        return None if self.layout is None else layout_widths(self.modules, self.layout)

    @property
    def active_units(self) -> int | None:
        """Hidden units that work on one token: H, or of a mixture those of its active experts and the shared one's.
        Where the config does not say how many experts are active, two."""
        if self.layout is None or self.widths is None or self.layout.experts is None:
            return None if self.widths is None else self.widths[1]
        shared = 0 if self.layout.shared is None else layout_widths(self.modules, self.layout.shared)[1]
        config = getattr(self.model, "config", None)
        text = config.get_text_config(decoder=True) if config is not None else None
        configs = (text, getattr(text, "ffn_config", None))  # DBRX has it in the second
        named = [getattr(config, name, None) for config in configs for name in _ACTIVE_EXPERTS]
        active = next(filter(None, named), 2)
        if isinstance(active, list | tuple):  # of each layer
            active = active[self.layer]
        return shared + (self.widths[1] - shared) // self.layout.experts * min(active, self.layout.experts)

    @cached_property
    def hidden_act(self) -> str | None:
        """Name of the activation in transformers' `ACT2FN`; None where none of them is it."""
        if self.layout is None:  # something else may stand in the MLP's place
            return None
        return find_activation(self.modules, self.layout, _configured_activations(self.model))

    @property
    def encoder_type(self) -> str:
        """`"glu"` or `"mlp"`, as in `MxDLayerConfig`."""
        return "mlp" if self.layout is None else self.layout.encoder_type

    def check_exists(self) -> None:
        """Raise a SurgeryError where the layer has no MLP, with the reason."""
        if not self.slots:
            raise SurgeryError(f"layer {self.layer} of {type(self.model).__name__} has no MLP: {self.reason}")

    def check_fits(self, config: MxDLayerConfig, probed: tuple[int, int] | None = None) -> None:
        """Raise a SurgeryError when a layer of this configuration maps between other widths than the MLP: those that
        its weights have, or that were `probed` where no rule finds them."""
        self.check_exists()
        want = (config.hidden_size, config.output_size)
        have = probed if self.widths is None else (self.widths[0], self.widths[2])
        if have is not None and have != want:
            raise SurgeryError(
                f"the MLP of layer {self.layer} maps {have[0]} to {have[1]} dimensions, the decomposition's layer "
                f"{want[0]} to {want[1]}: is it of another base model?"
            )

    def weights(self) -> PretrainedWeights:
        """Copies of the pretrained weights, detached, on their own device; quantised ones dequantised.

        Raises:
            SurgeryError: something else stands in the MLP's place, or they cannot be found or read.
        """
        if self.layout is None:
            kinds = ", ".join(type(module).__name__ for module in self.modules)
            raise SurgeryError(
                f"no rule finds the pretrained weights of layer {self.layer} ({kinds}): undo a replacement first, or "
                "start the encoder at random (encoder_init='random', --encoder-init random)"
            )
        try:
            return read_weights(self.modules, self.layout)
        except ValueError as error:
            raise SurgeryError(
                f"layer {self.layer}: {error}; start the encoder at random (encoder_init='random', "
                "--encoder-init random)"
            ) from error


def _configured_activations(model: nn.Module) -> list[str]:
    """What the model's config names as an activation, the language model's first."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return []
    values: dict[str, Any] = {**vars(config.get_text_config(decoder=True)), **vars(config)}
    fields = sorted(name for name in values if re.search(r"act(ivation)?($|_)|^afn$", name))
    fields.sort(key=lambda name: name not in ("hidden_act", "hidden_activation", "activation_function"))
    return [values[name] for name in fields if isinstance(values[name], str)]


# Stacks


def find_stacks(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """All lists of transformer layers: {stack: [(path of a layer, the layer), …]}.

    Lists inside the layers of another are not stacks of their own; lists that differ only in a number (the stages of
    a Swin transformer) are one stack, `encoder.layers.*.blocks`.

    Raises:
        SurgeryError: when it is no model of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise SurgeryError(
            f"{type(model).__name__} is not a transformers model itself: pass the model inside the wrapper"
        )
    found: dict[str, list[tuple[str, nn.Module]]] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or path.startswith(inside or "\0"):
            continue
        if any(layer_chains(layer) for layer in module):
            inside = (*inside, f"{path}.")
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)
            found.setdefault(pattern, []).extend((f"{path}.{name}", layer) for name, layer in module.named_children())
    return found or _layers_without_mlp(model)


def _layers_without_mlp(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """Of a model without any MLP (Mamba), its longest list: so that each layer can say that it has none."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return {}
    path, longest = max(lists, key=lambda item: len(item[1]))
    return {path: [(f"{path}.{name}", layer) for name, layer in longest.named_children()]}


def choose_stack(model: PreTrainedModel, stack: str | None, stacks: Mapping[str, Any]) -> str:
    """The stack that is meant.

    Args:
        model: the model.
        stack: a stack's path, `"encoder"` or `"decoder"`, or None for the language model's (of an encoder–decoder
            model: the decoder's).
        stacks: those that the model has.

    Raises:
        SurgeryError: no stack or several are meant; the message names those that there are.
    """
    if stack in stacks:
        return str(stack)
    candidates = list(stacks)
    if stack in ("encoder", "decoder"):
        candidates = [path for path in stacks if re.search(rf"(^|[._]){stack}([._]|$)", path)]
    elif stack is not None:
        raise SurgeryError(f"{type(model).__name__} has no stack {stack!r}; it has {', '.join(stacks) or 'no stack'}")
    elif len(candidates) > 1:
        decoder = model.get_decoder()
        under = next((path for path, module in model.named_modules() if module is decoder), "")
        candidates = [path for path in candidates if path.startswith(f"{under}." if under else "")] or candidates
    if len(candidates) > 1:
        candidates = [path for path in candidates if not is_other_tower(path)] or candidates
    if not candidates and stack is not None:
        raise SurgeryError(f"{type(model).__name__} has no {stack}; it has {', '.join(stacks) or 'no stack'}")
    if len(candidates) != 1:
        raise SurgeryError(
            f"{type(model).__name__} has the stacks {', '.join(stacks) or '(none)'}: say which is meant with stack="
        )
    return candidates[0]


# Sites


def find_mlps(model: nn.Module, stack: str | None = None, site: str = MAIN) -> dict[int, MLPSite]:
    """One record for every transformer layer of a stack, by the layer's index; also for layers without an MLP, which
    say why.

    Args:
        model: any model of transformers, itself rather than inside a wrapper.
        stack: see `choose_stack`; for an unknown model the path of any list of modules.
        site: `"mlp"` for a layer's main MLP, or dotted paths from the layer, separated by commas, of other modules
            that make up one: `"mlp.experts"` (of a mixture, whatever the model calls it, the routed experts alone:
            router and shared expert stay), `"shared_mlp"`, `"fc1,act,fc2"`.

    Raises:
        SurgeryError: the model has no such stack, or none of its layers has such modules.
    """
    stacks = find_stacks(model)
    if stack is not None and stack not in stacks and stack not in ("encoder", "decoder"):
        stacks = {**stacks, **_named_stack(model, stack)}
    chosen = choose_stack(model, stack, stacks)
    sites = {
        index: _site(model, chosen, index, path, layer, site) for index, (path, layer) in enumerate(stacks[chosen])
    }
    if site != MAIN and not any(found.slots for found in sites.values()):
        others = sorted({",".join(chain) for _, layer in stacks[chosen] for chain in layer_chains(layer)})
        raise SurgeryError(
            f"no layer of {chosen} in {type(model).__name__} has {site}; they have {'; '.join(others) or 'no MLP'}"
        )
    return sites


def _named_stack(model: nn.Module, stack: str) -> dict[str, list[tuple[str, nn.Module]]]:
    module = resolve(model, stack)
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return {}
    return {stack: [(f"{stack}.{name}", layer) for name, layer in module.named_children()]}


def _site(model: nn.Module, stack: str, index: int, path: str, layer: nn.Module, name: str) -> MLPSite:
    exception = LAYER_EXCEPTIONS.get(type(layer).__name__)
    chains = layer_chains(layer)
    if name != MAIN:
        chain = tuple(_physical(layer, part.strip(), chains) for part in name.split(","))
        there = all(resolve(layer, part) is not None for part in chain)
        chains = [tuple(spelled_out(layer, part) for part in chain)] if there else []
    if not chains:
        inside = ", ".join(f"{child} ({type(module).__name__})" for child, module in layer.named_children())
        what = "an MLP" if name == MAIN else name
        reason = f"{type(layer).__name__} has no module that is {what}, only {inside[:300] or 'nothing'}"
        if exception is not None and not exception.slots and name == MAIN:
            reason = exception.reason
        return MLPSite(model, stack, index, path, name, (), "none", reason)
    slots = tuple(f"{path}.{part}" if part else path for part in chains[0])
    modules = [model.get_submodule(slot) for slot in slots]
    repeated = exception is not None and exception.repeated
    reason = exception.reason if exception is not None else ""
    return MLPSite(model, stack, index, path, name, slots, _kind(modules, reason), reason, repeated)


def _physical(layer: nn.Module, path: str, chains: list[tuple[str, ...]]) -> str:
    """`mlp.experts` also where the model calls its MLP otherwise."""
    first, _, rest = path.partition(".")
    renamed = first == MAIN and not hasattr(layer, MAIN) and chains and len(chains[0]) == 1
    return f"{chains[0][0]}.{rest}".rstrip(".") if renamed else path


def _kind(modules: list[nn.Module], reason: str) -> str:
    if len(modules) > 1:
        return "residual-inside" if reason in RESIDUAL_INSIDE else "inline"
    names = {name.rpartition(".")[2] for name, _ in modules[0].named_modules()}
    routed = names & {"experts", "router"} or "Experts" in type(modules[0]).__name__
    return "mixture-of-experts" if routed else "module"


def site_of(sites: Mapping[int, MLPSite], layer: int) -> MLPSite:
    """The MLP of one of the layers that `find_mlps` found.

    Raises:
        SurgeryError: there is no such layer, or it has no MLP.
    """
    if layer not in sites:
        raise SurgeryError(f"layer {layer} is out of range: the model has layers 0 to {len(sites) - 1}")
    sites[layer].check_exists()
    return sites[layer]


def find_mlp(model: nn.Module, layer: int, stack: str | None = None, site: str = MAIN) -> MLPSite:
    """The MLP of one layer; see `find_mlps`.

    Raises:
        SurgeryError: also when the model has no such layer, or the layer has no MLP.
    """
    return site_of(find_mlps(model, stack, site), layer)


def find_all_mlps(model: nn.Module) -> list[MLPSite]:
    """The MLPs of all stacks, also those beside a layer's main one, and a record for every layer without."""
    found = []
    for stack, layers in find_stacks(model).items():
        for index, (path, layer) in enumerate(layers):
            names = [MAIN, *(",".join(chain) for chain in layer_chains(layer)[1:])]
            found += [_site(model, stack, index, path, layer, name) for name in names]
    return found

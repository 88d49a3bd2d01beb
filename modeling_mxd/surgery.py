"""Replacing the MLPs of any model, and putting them back.

The new module goes into the first slot of the MLP and the identity into the others. Before the first replacement a
few tokens are run through the model with its own MLPs routed the same way: unless the result is equal to the last
bit, the model is refused (see `verification`). While MLPs are replaced the model cannot be saved: its class would not
load what is in their places.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layers import SparseLayer
from .pretrained_weights import is_quantised
from .sites import MAIN, MLPSite, SurgeryError, find_mlps, site_of
from .verification import StandIn, execution_device, needs_stand_in, second_output, verify_sites


class ReplacedMLP:
    """A replacement that can be undone; made by `replace_mlp`.

    Attributes:
        site: the MLP's place.
        original: the modules that were there, one per slot (a single one unless the MLP is inline).
        replacement: the module that is there now; inside of a `StandIn` where the model's callers pass more than the
            input, or expect more than the output.
    """

    def __init__(self, site: MLPSite, replacement: nn.Module):
        self.site = site
        self.original = site.modules
        self.replacement = replacement
        first = StandIn(replacement, second_output(site)) if needs_stand_in(site) else replacement
        self._installed = (first, *(nn.Identity() for _ in self.original[1:]))
        self._savable = False
        self._install()

    def _install(self) -> None:
        self.site.put(self._installed)
        if not self._savable:
            _refuse_saving(self.site)

    def permit_saving(self) -> None:
        """Let the model be saved with this replacement in it: whoever says so has seen to what is saved."""
        self._savable = True
        _permit_saving(self.site)

    def restore(self) -> None:
        """Put back the very same module objects.

        Raises:
            SurgeryError: when the slots no longer hold what was put there; the model is left as it is.
        """
        if any(now is not ours for now, ours in zip(self.site.modules, self._installed, strict=True)):
            raise SurgeryError(
                f"the MLP of layer {self.site.layer} was changed after it was replaced: undo later replacements "
                "first, in reverse order"
            )
        self.site.put(self.original)
        if not self._savable:
            _permit_saving(self.site)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Inside the block the original modules are back; afterwards, also after an exception, the replacement is.

        Raises:
            SurgeryError: as `restore`.
        """
        self.restore()
        try:
            yield
        finally:
            self._install()


class _SavingRefused:
    """Stands before a method of a model that saves it, while MLPs of these `layers` are replaced."""

    def __init__(self, model: nn.Module, method: str):
        self.model, self.method = model, method
        self.layers: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.model, "_hf_peft_config_loaded", False):  # transformers then saves the adapter alone
            return getattr(type(self.model), self.method)(self.model, *args, **kwargs)
        raise SurgeryError(
            f"this {type(self.model).__name__} cannot be saved while MLPs are replaced (layers {sorted(self.layers)}), "
            "since its class would not load the result: save the decomposition by its own save_pretrained, the base "
            "model after it is restored"
        )


_SAVING = ("save_pretrained", "push_to_hub")


def _refuse_saving(site: MLPSite) -> None:
    model = site.model
    for method in _SAVING:
        if hasattr(model, method):
            refusal = model.__dict__.setdefault(method, _SavingRefused(model, method))
            if isinstance(refusal, _SavingRefused):
                refusal.layers.append(site.layer)


def _permit_saving(site: MLPSite) -> None:
    for method in _SAVING:
        refusal = site.model.__dict__.get(method)
        if isinstance(refusal, _SavingRefused):
            refusal.layers.remove(site.layer)
            if not refusal.layers:
                del site.model.__dict__[method]


def replace_mlp(model: nn.Module, layer: int, module: nn.Module, **options: Any) -> ReplacedMLP:
    """Put `module` in place of the MLP of one layer; see `replace_mlps` for what can be said besides.

    Returns:
        The replacement, which holds the original and can `restore()` it.
    """
    return replace_mlps(model, {layer: module}, **options)[0]


def replace_mlps(
    model: nn.Module,
    modules: Mapping[int, nn.Module],
    cast: bool = True,
    *,
    stack: str | None = None,
    site: str = MAIN,
    verify: bool = True,
    example_inputs: Mapping[str, Tensor] | None = None,
) -> list[ReplacedMLP]:
    """Put {layer: module} in place of the MLPs of several layers: all, or none and neither model nor modules touched.

    Args:
        model: any model of transformers, itself rather than inside a wrapper.
        modules: by index of the transformer layer; each maps (..., I) to (..., O).
        cast: move each module, in place, to the replaced MLP's device and dtype. Off: only the device.
        stack, site: which stack of layers, and which of a layer's MLPs; see `find_mlps`.
        verify: run 8 tokens through the model first, once for each of its MLPs, to see that surgery there is exact.
        example_inputs: what to run, for a model that the 8 tokens do not suit.

    Returns:
        The replacements in the order of `modules`, each of which can `restore()`.

    Raises:
        SurgeryError: nothing to replace, no such stack, layer or MLP, an MLP that is already replaced, another width,
            or surgery is not exact there.
    """
    if not modules:
        raise SurgeryError("nothing to splice: name at least one layer")
    found = find_mlps(model, stack, site)
    sites = {layer: _check_replaceable(found, layer, module) for layer, module in modules.items()}
    _check_routers(model, found, sites)
    if verify:
        probed = verify_sites(model, list(sites.values()), example_inputs)
        for layer, module in modules.items():
            if isinstance(module, SparseLayer):
                sites[layer].check_fits(module.config, probed.get(sites[layer].slots))
    for layer, module in modules.items():
        _move_to(sites[layer], model, module, cast)
    return [ReplacedMLP(sites[layer], module) for layer, module in modules.items()]


@contextmanager
def spliced_mlps(
    model: nn.Module, modules: Mapping[int, nn.Module], cast: bool = True, **options: Any
) -> Iterator[list[ReplacedMLP]]:
    """Replace the MLPs of several layers inside the block; afterwards, also after an exception, the very same
    modules are back, save where one was changed meanwhile: the others are still restored and the error is raised.

    Raises:
        SurgeryError: as `replace_mlps`, which also says what the options are.
    """
    with ExitStack() as stack:  # calls every restore, also after one that failed
        replaced = replace_mlps(model, modules, cast, **options)
        for replacement in replaced:
            stack.callback(replacement.restore)
        yield replaced


def _check_replaceable(found: Mapping[int, MLPSite], layer: int, module: nn.Module) -> MLPSite:
    site = site_of(found, layer)
    if any(isinstance(part, SparseLayer | StandIn) for part in site.modules):
        raise SurgeryError(
            f"the MLP of layer {layer} is already replaced by a decomposition: restore it first, or of a model with a "
            "decomposition inside take what `unsplice()` gives"
        )
    if isinstance(module, SparseLayer):
        site.check_fits(module.config)
    return site


def _check_routers(model: nn.Module, found: Mapping[int, MLPSite], sites: Mapping[int, MLPSite]) -> None:
    """Refuse to take away the last router of a model that is told to return router logits."""
    routed = {layer for layer, site in found.items() if site.kind == "mixture-of-experts"}
    whole = {layer for layer in routed & sites.keys() if not sites[layer].slots[0].endswith("experts")}
    if routed and routed == whole and getattr(model.config, "output_router_logits", False):
        raise SurgeryError(
            f"{type(model).__name__} is configured to return router logits (config.output_router_logits), and no "
            "router would be left: turn that off, or replace the experts alone (site='mlp.experts')"
        )


def _device(module: nn.Module, parameter: Tensor) -> torch.device | str | int:
    """Where a module runs: an offloaded one's parameters are elsewhere."""
    device = execution_device(module)
    return parameter.device if device is None else device


def _move_to(site: MLPSite, model: nn.Module, module: nn.Module, cast: bool) -> None:
    # GPTQ's and AWQ's linears have buffers alone. A mixture's router may be in float32 beside experts in 16 bits.
    parameters: list[Tensor] = list(site.output_module.parameters())
    parameters = parameters or list(site.output_module.buffers())
    if not parameters:
        return
    like = max(parameters, key=Tensor.numel)
    dtype = like.dtype
    if is_quantised(like):
        assert isinstance(model, PreTrainedModel)
        dtype = model.dtype
    module.to(device=_device(site.output_module, like), dtype=dtype if cast else None)

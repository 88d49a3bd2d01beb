"""The base language model with a decomposition spliced in, whose class saves only the decomposition."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .loading import BY_LAYER
from .sites import SurgeryError
from .steering import SteeringHandle
from .surgery import ReplacedMLP


@dataclass
class _Splice:
    """What `unsplice` needs: the MxDModel, its replacements, and the base's class, dtype, name, trainable weights."""

    decomposition: Any
    replaced: list[ReplacedMLP]
    base_class: type
    dtype: torch.dtype
    base_name: str
    trainable: set[str]


class SplicedLanguageModel:
    """Add to a base model what it needs while a decomposition is spliced in; made by `make_spliced`.

    `save_pretrained` and `push_to_hub` save the decomposition alone. The base's own weights are therefore frozen, and
    changes to them (a merged adapter, resized embeddings) are not saved: use adapters, which train and are saved as
    usual, or `model.unsplice().save_pretrained(...)` for the base.
    """

    _splice: _Splice

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: pickle and deepcopy make it anew from the base's.
        return _new_spliced, (self._splice.base_class,), self.__dict__

    @property
    def decomposition(self) -> Any:
        """The `MxDModel` whose layers replace the MLPs."""
        return self._splice.decomposition

    def steer(self, steering: Any) -> SteeringHandle:
        """Steer by experts, until the handle is removed: see `MxDModel.steer`."""
        return self.decomposition.steer(self, steering)

    def unsteer(self) -> None:
        """End all steering, also that of `from_pretrained(..., steering=...)`."""
        for handle in [*vars(self)["_steering"].handles] if "_steering" in vars(self) else ():
            handle.remove()

    def unsplice(self) -> PreTrainedModel:
        """Restore the base's own MLPs, in place, and return the base model with its class, name and trainable weights.

        Raises a SurgeryError if an MLP was replaced again since; the model is left as it is.
        """
        assert isinstance(self, PreTrainedModel)
        with self.untouched():  # raises, if it must, before anything is undone for good
            pass
        self.unsteer()
        splice = self.__dict__.pop("_splice")
        for replaced in reversed(splice.replaced):
            replaced.restore()
        self.__class__ = splice.base_class  # also after `fully_shard` made another of it
        self.name_or_path = splice.base_name
        _set_trainable(self, splice.trainable)
        return self

    @contextmanager
    def untouched(self) -> Iterator[PreTrainedModel]:
        """Restore the base's own MLPs inside the block, as `unsplice`; no weights are copied."""
        assert isinstance(self, PreTrainedModel)
        with ExitStack() as stack:
            for replaced in self._splice.replaced:
                self._fetch(replaced)
                stack.enter_context(replaced.undone())
            yield self

    def _fetch(self, replaced: ReplacedMLP) -> None:
        # Modules that are out of the model were left out when it was moved, cast or put into another mode.
        assert isinstance(self, PreTrainedModel)
        # The replacement of an MLP that an earlier layer writes to has no weights.
        weights = [*replaced.replacement.parameters()] or [*self.get_submodule(replaced.site.path).parameters()]
        device = weights[0].device
        dtype = None if self.dtype == self._splice.dtype else self.dtype
        for module in replaced.original:
            module.train(self.training)
            if all(p.is_floating_point() and not p.is_meta for p in module.parameters()):
                module.to(device=device, dtype=dtype)

    def save_pretrained(
        self, save_directory: Any, state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """Save the decomposition; with a PEFT adapter in the model only the adapter, as transformers does.

        Raises a ValueError if an adapter on the decomposition is not merged, or replaced a whole layer of it.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)  # type: ignore[misc]
        assert isinstance(self, nn.Module)
        places = {id(module): name for name, module in self.named_modules()}
        prefixes = {name: places.get(id(layer)) for name, layer in self.decomposition.layers.items()}
        replaced = [name for name, prefix in prefixes.items() if prefix is None]
        if replaced:
            wrong = f"another module replaced the decomposition's layer {replaced[0]}, and would not be saved"
            raise ValueError(f"{wrong}: name single linears in an adapter's modules_to_save, not a whole layer")
        if state_dict is not None:
            state_dict = {
                f"layers.{name}.{key.removeprefix(f'{prefix}.')}": value
                for name, prefix in prefixes.items()
                for key, value in state_dict.items()
                if key.startswith(f"{prefix}.")
            }
        kwargs.pop("save_peft_format", None)
        return self.decomposition.save_pretrained(save_directory, state_dict=state_dict, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push what `save_pretrained` saves, as transformers' `push_to_hub`."""
        return super().push_to_hub(*args, **{"max_shard_size": BY_LAYER, **kwargs})  # type: ignore[misc]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Accept also the decomposition's own state, as `save_pretrained` wrote it, so that a Trainer can resume."""
        if state_dict and state_dict.keys() <= self.decomposition.state_dict().keys():
            return self.decomposition.load_state_dict(state_dict, *args, **kwargs)
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]


def make_spliced(base: PreTrainedModel, decomposition: Any, name: str, cast: bool = True) -> PreTrainedModel:
    """Splice an `MxDModel` into a base model, in place: its class becomes a subclass of the same name.

    Args:
        base, decomposition: a causal language model, which is returned, and the `MxDModel`.
        name: folder or Hub id of the decomposition; adapters name it as their base.
        cast: move the decomposition to the base's dtype. If False it keeps its own, which training needs.

    Raises:
        SurgeryError: it does not fit, or a decomposition is spliced in already; `base` is then as it was.
    """
    if isinstance(base, SplicedLanguageModel):
        raise SurgeryError("a decomposition is spliced in: unsplice() it first, or splice more layers by MxDModel")
    trainable = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    base.requires_grad_(False)
    try:
        replaced: list[ReplacedMLP] = decomposition.splice(base, cast=cast)
    except Exception:
        _set_trainable(base, trainable)
        raise
    for replacement in replaced:
        replacement.permit_saving()  # the class saves the decomposition alone
    # Not registered as a module: its layers already are, where the MLPs were.
    base.__dict__["_splice"] = _Splice(decomposition, replaced, type(base), base.dtype, base.name_or_path, trainable)
    base.name_or_path = name
    base.__class__ = _spliced_class(type(base))  # type: ignore[arg-type]  # classes are hashable
    return base


def _set_trainable(model: nn.Module, names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(True)


@cache
def _spliced_class(base: type) -> type:
    return type(base.__name__, (SplicedLanguageModel, base), {"__module__": base.__module__})


def _new_spliced(base: type) -> Any:
    return object.__new__(_spliced_class(base))

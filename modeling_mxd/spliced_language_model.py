"""The base language model with a decomposition spliced in: a class of the base's own name that saves only the
decomposition."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .sites import SurgeryError
from .surgery import ReplacedMLP

_SAMPLE = 1024
_CLASSES: dict[type, type] = {}


class SplicedLanguageModel:
    """What a base model gains when a decomposition is spliced in for good; made by `make_spliced`.

    The base's own weights are frozen, since no decomposition's repo stores them. Adapters train as usual.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time: pickle and deepcopy make it again from the base's.
        return _new_spliced, (_base_class(self),), self.__dict__

    @property
    def decomposition(self) -> Any:
        """The `MxDModel` whose layers stand in the MLPs' places."""
        return self.__dict__["_decomposition"]

    def unsplice(self) -> PreTrainedModel:
        """Put the base's own MLPs back, in place, and give the base model: its class and its name as they were, and
        the weights that were frozen for the splice train again.

        Raises:
            SurgeryError: when an MLP was replaced again since; the model is left as it is.
        """
        assert isinstance(self, PreTrainedModel)
        with self.untouched():  # raises, if it must, before anything is undone for good
            pass
        for replaced in reversed(self.__dict__["_replaced"]):
            replaced.restore()
        self.__dict__.update(self.__dict__.pop("_base_attributes"))
        trainable = self.__dict__["_trainable"]
        for name in ("_decomposition", "_replaced", "_samples", "_trainable", "_spliced_dtype"):
            del self.__dict__[name]
        self.__class__ = _base_class(self)
        _set_trainable(self, trainable)
        return self

    @contextmanager
    def untouched(self) -> Iterator[PreTrainedModel]:
        """Inside the block the base's own MLPs are in their places, and this is the model that it was before the
        splice; afterwards, also after an exception, the decomposition is back. No weights are copied.

        Raises:
            SurgeryError: when an MLP was replaced again since.
        """
        assert isinstance(self, PreTrainedModel)
        with ExitStack() as stack:
            for replaced in self.__dict__["_replaced"]:
                self._fetch(replaced)
                stack.enter_context(replaced.undone())
            yield self

    def _fetch(self, replaced: ReplacedMLP) -> None:
        # Modules that are out of the model were left out when it was moved, cast or put into another mode.
        assert isinstance(self, PreTrainedModel)
        device = next(replaced.replacement.parameters()).device
        dtype = None if self.dtype == self.__dict__["_spliced_dtype"] else self.dtype
        for module in replaced.original:
            module.train(self.training)
            if all(p.is_floating_point() and not p.is_meta for p in module.parameters()):
                module.to(device=device, dtype=dtype)

    def save_pretrained(
        self, save_directory: Any, state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """Save the decomposition (or, with a PEFT adapter in the model, only the adapter, as transformers does).

        Raises:
            ValueError: when weights of the base were changed, which a decomposition's repo cannot store, or an adapter
                is not merged, or put other modules in the places of the decomposition's layers.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)  # type: ignore[misc]
            return
        assert isinstance(self, nn.Module)
        changed = changed_parameters(self, self.__dict__["_samples"])
        if changed:
            raise ValueError(
                f"weights of the base model were changed ({changed[0]} and {len(changed) - 1} more), and a "
                "decomposition's repo does not store them: save adapters unmerged, or save the base by "
                "model.unsplice().save_pretrained(...)"
            )
        self._check_layers()
        kwargs.pop("save_peft_format", None)
        if state_dict is not None:
            state_dict = self._of_decomposition(state_dict)
        self.decomposition.save_pretrained(save_directory, state_dict=state_dict, **kwargs)

    def _check_layers(self) -> None:
        """Refuse to save layers that are not what runs."""
        assert isinstance(self, nn.Module)
        present = {id(module) for module in self.modules()}
        replaced = [name for name, layer in self.decomposition.layers.items() if id(layer) not in present]
        if replaced:
            raise ValueError(
                f"another module stands in the place of the decomposition's layer {replaced[0]}, and would not be "
                "saved: name single linears in an adapter's modules_to_save, not a whole layer"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Also takes the decomposition's own state, as `save_pretrained` wrote it: so a Trainer resumes."""
        if state_dict and state_dict.keys() <= self.decomposition.state_dict().keys():
            return self.decomposition.load_state_dict(state_dict, *args, **kwargs)
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]

    def _of_decomposition(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(self, nn.Module)
        places = {id(module): name for name, module in self.named_modules()}
        own = {}
        for name, module in self.decomposition.layers.items():
            prefix = places[id(module)] + "."
            for key, value in state_dict.items():
                if key.startswith(prefix):
                    own[f"layers.{name}.{key.removeprefix(prefix)}"] = value
        return own


def make_spliced(base: PreTrainedModel, decomposition: Any, name: str, cast: bool = True) -> PreTrainedModel:
    """Splice a decomposition into a base model for good: in place, and the base's class becomes a subclass of the
    same name.

    Args:
        base: a causal language model that fits the decomposition.
        decomposition: the `MxDModel`.
        name: folder or Hub id of the decomposition; adapters name it as their base.
        cast: bring the decomposition to the base's dtype. Off: it keeps its own, which training wants.

    Returns:
        `base`.

    Raises:
        SurgeryError: when it does not fit, or another decomposition was spliced in for good before; `base` is then
            as it was.
    """
    if isinstance(base, SplicedLanguageModel):
        raise SurgeryError(
            "a decomposition is spliced into this model for good: unsplice() it first, or use mxd.splice(model) for "
            "further layers"
        )
    before = dict(base.named_parameters())
    trainable = [name for name, parameter in before.items() if parameter.requires_grad]
    base.requires_grad_(False)
    try:
        samples = sample_parameters(base)
        replaced: list[ReplacedMLP] = decomposition.splice(base, cast=cast)
    except Exception:
        _set_trainable(base, trainable)
        raise
    for replacement in replaced:
        replacement.permit_saving()  # by the class, which saves the decomposition alone
    after = dict(base.named_parameters())
    samples = {name: sample for name, sample in samples.items() if after.get(name) is before[name]}
    attributes = {"name_or_path": base.name_or_path}
    # Not registered as a module: its layers already are, in the MLPs' places.
    base.__dict__.update(_decomposition=decomposition, _replaced=replaced, _samples=samples, _trainable=trainable)
    base.__dict__["_spliced_dtype"] = base.dtype
    base.__dict__["_base_attributes"] = attributes
    base.name_or_path = name
    base.__class__ = _spliced_class(type(base))
    return base


def _set_trainable(model: nn.Module, names: list[str]) -> None:
    wanted = set(names)
    for name, parameter in model.named_parameters():
        if name in wanted:
            parameter.requires_grad_(True)


def _spliced_class(base: type) -> type:
    if base not in _CLASSES:
        _CLASSES[base] = type(base.__name__, (SplicedLanguageModel, base), {"__module__": base.__module__})
    return _CLASSES[base]


def _base_class(model: Any) -> type:
    return type(model).__mro__[2]  # after the class made by `_spliced_class` and SplicedLanguageModel


def _new_spliced(base: type) -> Any:
    return object.__new__(_spliced_class(base))


def sample_parameters(model: nn.Module) -> dict[str, tuple[torch.Size, Tensor]]:
    """Shape, and up to 1,024 evenly spaced entries on the CPU, of every parameter: to tell later whether it was
    changed. Parameters that are offloaded or quantised are left out."""
    return {name: _sample(parameter) for name, parameter in model.named_parameters() if _is_plain(parameter)}


def changed_parameters(model: nn.Module, samples: Mapping[str, tuple[torch.Size, Tensor]]) -> list[str]:
    """Names of the parameters that are gone, or differ from their samples by more than a change of dtype does."""
    parameters = dict(model.named_parameters())
    gone = [name for name in samples if name not in parameters]
    return gone + [
        name
        for name, parameter in parameters.items()
        if name in samples and _is_plain(parameter) and not _same(samples[name], _sample(parameter))
    ]


def _is_plain(parameter: Tensor) -> bool:
    # Quantised ones are integers (bitsandbytes) or of a class of their own that calls itself floating (torchao).
    return not parameter.is_meta and parameter.is_floating_point() and type(parameter.data) is Tensor


def _sample(parameter: Tensor) -> tuple[torch.Size, Tensor]:
    flat = parameter.detach().reshape(-1)
    places = torch.linspace(0, len(flat) - 1, min(_SAMPLE, len(flat)), dtype=torch.float64).long()
    return parameter.shape, flat[places.to(flat.device)].cpu()


def _same(before: tuple[torch.Size, Tensor], after: tuple[torch.Size, Tensor]) -> bool:
    (shape, old), (shape_now, new) = before, after
    if shape != shape_now:
        return False
    if any(torch.equal(old.to(dtype), new.to(dtype)) for dtype in (new.dtype, torch.bfloat16, torch.float16)):
        return True
    # Two changes of dtype, one after the other, round twice.
    return new.dtype != old.dtype and torch.allclose(old.float(), new.float(), rtol=2**-7, atol=1e-7)

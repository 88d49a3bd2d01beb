"""Directions of experts, and steering: along directions, or by coefficients.

An expert's direction v_n (O) is the vector that it adds to the MLP's output per unit of its coefficient. A transcoder's
is its decoder row. An MxD's expert multiplies the dense part instead, so its direction is the row of a linear decoder
that predicts the MLP's output from the coefficients: y ≈ Vᵀa + Sᵀx + v. With m_n the largest coefficient of expert n on
text, a strength s changes each chosen position's output or coefficient,

    direction  y + s m_n v_n        add  a_n + s m_n        set  a_n = s m_n        scale  s a_n        ablate  a_n = 0
"""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .configuration_mxd import MxDConfig
from .interventions import ExpertCoefficients, ExpertIntervention, Steering, SteeringChange
from .layers import SparseLayer
from .loading import ResolvedRepo, check_headers, file_if_any, layer_of
from .sites import SurgeryError

DIRECTIONS_NAME = "directions.safetensors"
MISSING = f"has no {DIRECTIONS_NAME}, with its experts' directions: `mxd experts FOLDER` makes it"


class ExpertDirections(NamedTuple):
    """Directions of the experts of one layer, and the unit of their strength."""

    direction: Tensor
    """(N, O); row v_n is added to the MLP's output per unit of coefficient"""
    maximum: Tensor
    """(N) float32, the largest coefficient on the tokens it was measured on"""


class DirectionFile(NamedTuple):
    """Content of `directions.safetensors`: `layers.8.maximum`, of an MxD also `layers.8.direction`; and its origin."""

    tensors: dict[str, Tensor]
    source: str


def read_directions(repo: ResolvedRepo, config: MxDConfig) -> DirectionFile:
    """Read the directions beside a decomposition's weights; raise a ValueError if they are missing or do not fit."""
    path = file_if_any(repo.name, DIRECTIONS_NAME, repo.access)
    if path is None:
        raise ValueError(f"{repo.name} {MISSING}")
    try:
        check_headers([Path(path)], config.layers, direction_shapes(config))
        with safe_open(path, framework="pt") as file:
            ours = [key for key in file.keys() if layer_of(key) in config.layers]  # noqa: SIM118
            tensors, metadata = {key: file.get_tensor(key).float() for key in ours}, file.metadata() or {}
        check_directions(tensors)
    except ValueError as error:
        raise ValueError(f"{DIRECTIONS_NAME} of {repo.name} is refused: {error}") from None
    return DirectionFile(tensors, metadata.get("source", ""))


def check_directions(tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names a tensor with values that are not finite, or a maximum below 0."""
    for key, tensor in tensors.items():
        if not tensor.isfinite().all() or (key.endswith("maximum") and (tensor < 0).any()):
            raise ValueError(f"{key} has values that are not finite, or negative")


def direction_shapes(config: MxDConfig) -> dict[str, list[int]]:
    """Return name → shape of the tensors in `directions.safetensors`."""
    layers = {index: config.layer(index) for index in config.layers}
    shapes = {f"layers.{index}.maximum": [layer.num_experts] for index, layer in layers.items()}
    of_mxd = {index: layer for index, layer in layers.items() if layer.method == "mxd"}
    return shapes | {f"layers.{i}.direction": [layer.num_experts, layer.output_size] for i, layer in of_mxd.items()}


class _Pass(NamedTuple):
    """Tokens that a forward pass reads."""

    columns: Tensor  # (tokens) place in the row, with padding and what is cached
    places: Tensor  # (rows, tokens) place among the row's tokens, -1 for padding
    in_prompt: Tensor  # (tokens) bool
    batch_rows: Tensor  # (rows) row of the caller's batch

    def of_change(self, change: SteeringChange) -> Tensor:
        """Return the positions of a change, (rows, tokens) bool."""
        given, chosen = change.positions, self.places >= 0
        if given in ("prompt", "generated"):
            chosen = chosen & (self.in_prompt == (given == "prompt"))
        elif given != "all" and isinstance(given[0], int):
            chosen = (self.places >= given[0]) & (self.places < (math.inf if given[1] is None else given[1]))
        elif given != "all":
            mask = torch.tensor(given, device=chosen.device).bool()
            row, column = self.batch_rows.clamp(max=len(mask) - 1), self.columns.clamp(max=mask.shape[1] - 1)
            inside = (self.batch_rows < len(mask))[:, None] & (self.columns < mask.shape[1])
            chosen = chosen & inside & mask[row][:, column]
        if change.rows is not None:
            chosen = chosen & torch.isin(self.batch_rows, torch.tensor(change.rows, device=chosen.device))[:, None]
        return chosen


class _Tracker:
    """Follow the forward passes of a model while it is steered."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.handles: list[SteeringHandle] = []
        self.prompt: tuple[int, int] | None = None  # rows and tokens of the prompt, inside `generate`
        self.current: _Pass | None = None
        self.calls = [_Tracked(self, name) for name in ("forward", "generate") if hasattr(model, name)]

    def read(self, given: Mapping[str, Any]) -> _Pass | None:
        """Return which tokens a forward pass with these arguments reads; None if it reads no tokens."""
        ids = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
        if ids is None or ids.ndim < 2:
            return None
        mask: Any
        positions: Any
        mask, positions = (given.get(name) for name in ("attention_mask", "position_ids"))
        # By its method: transformers 5.24 calls `past_key_values` `cache`.
        cache: Any = next((value for value in given.values() if hasattr(value, "get_seq_length")), None)
        (rows, tokens), device = ids.shape[:2], ids.device
        masked = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= tokens
        past = cache.get_seq_length() if cache is not None else mask.shape[1] - tokens if masked else 0
        order = torch.arange(tokens, device=device)
        columns = order + past
        places = columns.expand(rows, tokens)
        if masked:
            places = (mask.bool().cumsum(-1) - 1).masked_fill(mask == 0, -1)[:, -tokens:]
        elif isinstance(positions, Tensor) and positions.ndim == 2:  # with a static cache the mask has four dimensions
            places = positions.expand(rows, tokens)
        batch, length = self.prompt or (rows, None)
        in_prompt = columns == order if length is None else columns < length
        return _Pass(columns, places, in_prompt, torch.arange(rows, device=device) // max(1, rows // batch))


class _Tracked:
    """Call a model's `forward` or `generate`, and tell the tracker.

    It is set as an attribute of the model, which `torch.compile` guards on; it does not guard on hooks.
    """

    def __init__(self, tracker: _Tracker, name: str):
        self.tracker, self.name, self.call = tracker, name, getattr(tracker.model, name)
        self.own = vars(tracker.model).get(name)  # accelerate's, or a compiled one
        self.names = list(self.__signature__.parameters)
        setattr(tracker.model, name, self)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.call)  # transformers asks for it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracker, given = self.tracker, {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.name == "forward":
            tracker.current = tracker.read(given)
            output = self.call(*args, **kwargs)
            tracker.current = None  # positions are those of one pass
            return output
        inputs = [given.get(name) for name in ("inputs_embeds", "inputs", "input_ids")]
        shapes = [one.shape for one in inputs if isinstance(one, Tensor) and one.ndim > 1]
        before, tracker.prompt = tracker.prompt, ((*shapes[0][:2],) if shapes else (1, 1))  # (1, 1): BOS
        try:
            return self.call(*args, **kwargs)
        finally:
            tracker.prompt = before

    def remove(self) -> None:
        attributes = vars(self.tracker.model)
        if attributes.get(self.name) is self:
            del attributes[self.name]
            if self.own is not None:
                attributes[self.name] = self.own


class _LayerChanges:
    """Hooks of one layer: a steering's changes of it, and the conditions that its experts decide."""

    def __init__(self, tracker: _Tracker, fired: dict[tuple[int, int, float], Tensor]):
        self.tracker, self.fired = tracker, fired
        self.conditions: dict[tuple[int, int, float], float] = {}
        self.made: list[tuple[SteeringChange, Tensor | ExpertIntervention]] = []

    def change_coefficients(self, layer: SparseLayer, x: Tensor, found: ExpertCoefficients) -> ExpertCoefficients:
        for key, least in self.conditions.items():
            self.fired[key] = (found.values * (found.indices == key[1])).sum(-1) > least
        for change, by in self.made:
            if isinstance(by, ExpertIntervention):
                changed, where = by(layer, x, found), self.where(change, x)
                if where is not None:
                    kept = F.pad(found.values, (0, changed.values.shape[-1] - found.values.shape[-1]))
                    changed = ExpertCoefficients(changed.values.where(where, kept), changed.indices)
                found = changed
        return found

    def change_output(self, layer: SparseLayer, x: Tensor, y: Tensor) -> Tensor:
        for change, by in self.made:
            if isinstance(by, Tensor):
                where, added = self.where(change, x), by.to(y)
                y = y + (added if where is None else where * added)
        return y

    def where(self, change: SteeringChange, x: Tensor) -> Tensor | None:
        """Return the positions of x (..., I) that a change is for, (..., 1) bool; None for all."""
        where = None if change.when is None else self.fired[_key(change.when)][..., None]
        if change.positions == "all" and change.rows is None:
            return where
        chosen = None if self.tracker.current is None else self.tracker.current.of_change(change)
        if chosen is None or chosen.numel() != x[..., 0].numel():
            raise ValueError("steering at some positions or rows needs a forward pass of the whole model on its tokens")
        chosen = chosen.reshape(*x.shape[:-1], 1)
        return chosen if where is None else chosen & where


def _key(when: Mapping[str, Any]) -> tuple[int, int, float]:
    return when["layer"], when["expert"], when.get("above", 0)


class SteeringHandle:
    """Ends a steering: use it in a `with` statement, or call `remove()`."""

    def __init__(self, tracker: _Tracker, hooks: list[RemovableHandle]):
        self.tracker, self.hooks = tracker, hooks
        tracker.handles.append(self)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        if self in self.tracker.handles:
            self.tracker.handles.remove(self)
            if not self.tracker.handles:
                vars(self.tracker.model).pop("_steering", None)
                for call in self.tracker.calls:
                    call.remove()

    def __enter__(self) -> "SteeringHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def steer(decomposition: Any, model: Any, given: Any) -> SteeringHandle:
    """Steer a model into which a decomposition is spliced: see `MxDModel.steer`."""
    steering = Steering.of(given)
    if any(layer not in model.modules() for layer in decomposition.layers.values()):
        raise SurgeryError("the decomposition is not spliced into this model: steer it inside spliced(model)")
    if model.config.is_encoder_decoder and any((one.positions, one.rows) != ("all", None) for one in steering):
        raise ValueError("an encoder–decoder model is steered at all positions and rows only")
    made = [(one, _amount(decomposition, one), _least(decomposition, one)) for one in steering]
    tracker = vars(model)["_steering"] = vars(model).get("_steering") or _Tracker(model)
    fired: dict[tuple[int, int, float], Tensor] = {}
    layers = {index: _LayerChanges(tracker, fired) for index in decomposition.config.layers}
    for change, amount, least in made:
        layers[change.layer].made.append((change, amount))
        if change.when is not None:
            layers[change.when["layer"]].conditions[_key(change.when)] = least
    hooks = []
    for index, changes in layers.items():
        if changes.made or changes.conditions:
            hooks.append(decomposition.layer(index).register_coefficient_hook(changes.change_coefficients))
            hooks.append(decomposition.layer(index).register_output_hook(changes.change_output))
    return SteeringHandle(tracker, hooks)


def _amount(decomposition: Any, change: SteeringChange) -> Tensor | ExpertIntervention:
    """Check a change, and return the vector to add to the output, or the intervention on coefficients."""
    _check_expert(decomposition, change.layer, change.expert)
    if change.by in ("scale", "ablate"):
        return ExpertIntervention(scale={change.expert: change.strength if change.by == "scale" else 0.0})
    direction, maximum = decomposition.directions(change.layer)
    if not (unit := float(maximum[change.expert])):
        raise ValueError(
            f"expert {change.expert} of layer {change.layer} was never active, and has no unit to steer by"
        )
    if change.by != "direction":
        return ExpertIntervention(**{change.by: {change.expert: change.strength * unit}})
    vector = (change.strength * unit * direction[change.expert]).to(decomposition.layer(change.layer).expert_table)
    if not vector.isfinite().all():
        raise ValueError(f"strength {change.strength:g} of expert {change.expert} overflows {vector.dtype}")
    return vector


def _least(decomposition: Any, change: SteeringChange) -> float:
    """Check a change's condition, and return the coefficient that the expert must exceed."""
    if change.when is None:
        return 0.0
    layer, expert, above = _key(change.when)
    _check_expert(decomposition, layer, expert)
    if layer > change.layer:
        raise ValueError(f"a change of layer {change.layer} cannot depend on layer {layer}, which comes later")
    return above * float(decomposition.directions(layer).maximum[expert]) if above else 0.0


def _check_expert(decomposition: Any, layer: int, expert: int) -> None:
    config = decomposition.config
    if layer not in config.layers or expert >= config.layer(layer).num_experts:
        counts = ", ".join(f"layer {i}: {config.layer(i).num_experts}" for i in config.layers)
        raise ValueError(f"the steering names expert {expert} of layer {layer}; the numbers of experts are {counts}")

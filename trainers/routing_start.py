"""Hierarchical routing that starts in the middle of a training.

Which experts belong together shows only when they have become something. So a layer with groups is first trained as
if it had none, every expert scored; then its groups and its router are fitted to what the experts do by then, and it
goes on with the groups that each token opens. Groups that are formed at the start are of what the gate starts from.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_mxd import MxDModel

from .router import fit_router
from .sparse_code import SparseCodes

logger = logging.getLogger(__name__)


class RoutingStart(TrainerCallback):
    """Opens all groups of the layers with routing until a share of the steps is over, then fits them.

    Args:
        decomposition: is changed in place; its configuration is what comes after the start.
        codes: of its layers, whose rows follow the experts.
        share: of the steps, from 0 (the layers are left alone) to 1 (after the last step).
        inputs: gives the MLPs' inputs to fit to, {layer: (tokens, I)}.
        seed: of the fit.

    Attributes:
        waiting: whether all groups are open until the start.
    """

    def __init__(
        self,
        decomposition: MxDModel,
        codes: SparseCodes,
        share: float,
        inputs: Callable[[], Mapping[int, Tensor]],
        seed: int,
    ):
        layers = {index: decomposition.layer(index) for index in decomposition.config.layers}
        self.layers = {index: layer for index, layer in layers.items() if layer.router is not None and share > 0}
        self.configs = {index: decomposition.config.layer(index) for index in self.layers}
        self.codes, self.share, self.inputs, self.seed = codes, share, inputs, seed
        self.waiting = False

    def wait(self) -> None:
        """Open all groups."""
        self.waiting = bool(self.layers)
        for index, layer in self.layers.items():
            config = self.configs[index]
            layer.config = dataclasses.replace(config, num_groups_per_tok=config.num_expert_groups)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A training that is resumed before the start waits on."""
        if 0 < state.global_step < self._start(state):
            self.wait()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **_: Any,
    ) -> None:
        """Fit, after the step that completes the share and before its checkpoint."""
        if not self.waiting or state.global_step < self._start(state):
            return
        self.waiting = False
        inputs = self.inputs()
        for index, layer in self.layers.items():
            config = self.configs[index]
            logger.info("layer %d: fitting %s groups of experts and their router", index, config.num_expert_groups)
            order = fit_router(layer, inputs[index], num_groups_per_tok=config.num_groups_per_tok, seed=self.seed)
            by_expert = [layer.gate.weight, layer.gate.bias, layer.expert_table]
            code = self.codes.of_layer(index)
            if code is not None:
                code.decoder.data.copy_(code.decoder.data[order])
                by_expert.append(code.decoder)
            _renumber_state(by_expert, order, optimizer)

    def _start(self, state: TrainerState) -> int:
        return math.ceil(self.share * state.max_steps)


def _renumber_state(
    parameters: Iterable[Tensor | None], order: Tensor, optimizer: torch.optim.Optimizer | None
) -> None:
    """What an optimiser keeps for every row, after row n was row `order[n]`."""
    for parameter in parameters:
        state = {} if parameter is None or optimizer is None else optimizer.state.get(parameter, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape[:1] == order.shape:
                value.copy_(value[order.to(value.device)])

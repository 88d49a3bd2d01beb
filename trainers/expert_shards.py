"""The experts of every layer, split over processes that train on the same rows.

Process r of R holds rows r of the gate (G, g), of the experts' table C and of the auxiliary transcoder's V, with their
gradients and their state in the optimizer; the other weights are the same in every process, and take the same steps.

    local     the K largest of ReLU(G_r x + g_r) in each process
    gathered  K·R values and expert indices a token; the K largest of them are those of all experts
    summed    Cᵀa = Σ_r C_rᵀa_r

Each process computes the whole loss from the sums. The gradient of a process's part of a sum is that of the sum, so
no gradient is exchanged.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

from mxd.modeling_mxd import ExpertCoefficients, MxDModel, SparseLayer
from mxd.modeling_mxd.functional import expert_sum, topk_gate

from .auxiliary_transcoder import AuxiliaryTranscoders
from .distillation_trainer import DistillationTrainer


class ExpertShards:
    """The part of all layers' experts that this process holds, inside of `split`.

    Raises:
        ValueError: a layer has a router, which scores groups of experts that may lie in several processes, or fewer
            experts than there are processes.
    """

    def __init__(self, decomposition: MxDModel, auxiliary: AuxiliaryTranscoders, device: torch.device):
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
        self.mesh = init_device_mesh(device.type, (self.count,))
        self.tables: list[tuple[nn.Module, dict[str, nn.Parameter], int]] = []
        self._whole: dict[Tensor, Tensor] | None = None  # while the first process saves
        for index in decomposition.config.layers:
            layer = decomposition.layer(index)
            if layer.router is not None:
                raise ValueError(f"layer {index} has a router: --shard experts takes layers without num_groups_per_tok")
            if layer.config.num_experts < self.count:
                experts = layer.config.num_experts
                raise ValueError(f"{self.count} processes cannot share the {experts} experts of layer {index}")
            table = "modulation" if layer.config.method == "mxd" else "decoder"
            names = {"gate.weight", "gate.bias", table}
            named = {name: parameter for name, parameter in layer.named_parameters() if name in names}
            self.tables.append((layer, named, layer.config.num_experts))
            if (coded := auxiliary.of_layer(index)) is not None:
                self.tables.append((coded, {"decoder": coded.decoder}, layer.config.num_experts))

    @property
    def parameters(self) -> dict[nn.Parameter, int]:
        """The parameters that are split, with their numbers of rows in all."""
        return {parameter: experts for _, named, experts in self.tables for parameter in named.values()}

    @property
    def saving(self) -> bool:
        """Whether the first process is saving, by itself."""
        return self._whole is not None

    def sizes(self, experts: int) -> list[int]:
        """Return how many of a layer's experts each process holds."""
        size, more = divmod(experts, self.count)
        return [size + (rank < more) for rank in range(self.count)]

    def rows(self, experts: int) -> slice:
        """Return the rows that this process holds of a table with so many experts."""
        sizes = self.sizes(experts)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    @contextmanager
    def split(self) -> Iterator[None]:
        """Keep this process's part only inside the block; after it all processes hold all experts again.

        Weights that are loaded inside the block are whole.
        """
        hooks = []
        for parameter, experts in self.parameters.items():
            parameter.data = parameter.data[self.rows(experts)].clone()
        for module, named, experts in self.tables:
            rows = self.rows(experts)
            if isinstance(module, SparseLayer):
                vars(module)["encode"] = partial(self.encode, module, rows)
            table = named["modulation" if "modulation" in named else "decoder"]
            vars(module)["sum_experts"] = partial(self.sum_experts, table, rows)
            hooks.append(module.register_load_state_dict_pre_hook(partial(_keep_rows, named, rows)))
            hooks.append(module.register_state_dict_post_hook(partial(self._replace, named)))
        yield
        for hook in hooks:
            hook.remove()
        for module, _, _ in self.tables:
            vars(module).pop("encode", None)
            del vars(module)["sum_experts"]
        for parameter, experts in self.parameters.items():
            parameter.data, parameter.grad = self.gather(parameter.data, experts), None

    def encode(self, layer: SparseLayer, rows: slice, x: Tensor) -> ExpertCoefficients:
        """Return the K largest coefficients of all processes' experts; only those held here have a gradient."""
        gate, k = layer.gate, layer.config.num_experts_per_tok
        here = min(k, rows.stop - rows.start)
        values, indices = topk_gate(x.to(gate.weight.dtype), gate.weight, gate.bias, here)
        values, indices = F.pad(values, (0, k - here)), F.pad(indices + rows.start, (0, k - here), value=rows.start)
        gathered = [[torch.empty_like(part) for _ in range(self.count)] for part in (values, indices)]
        for parts, part in zip(gathered, (values, indices), strict=True):
            distributed.all_gather(parts, part.detach().contiguous())
        gathered[0][self.rank] = values
        all_values, all_indices = (torch.cat(parts, -1) for parts in gathered)
        at = all_values.detach().topk(k, dim=-1, sorted=False).indices
        return ExpertCoefficients(all_values.gather(-1, at), all_indices.gather(-1, at))

    def sum_experts(self, table: Tensor, rows: slice, coefficients: ExpertCoefficients) -> Tensor:
        """Return Cᵀa (..., O) of all processes' experts."""
        values, indices = coefficients
        here = (indices >= rows.start) & (indices < rows.stop)
        # Experts of other processes count as 0; they are spread over the rows, since sums over one long row are slow.
        part = expert_sum(values.where(here, 0.0).to(table.dtype), (indices - rows.start) % len(table), table)
        return DTensor.from_local(part, self.mesh, [Partial()], run_check=False).full_tensor()

    def gather(self, part: Tensor, experts: int) -> Tensor:
        """Return the rows of all processes of a table with one row an expert."""
        sizes = self.sizes(experts)
        most = max(sizes)
        parts = [part.new_empty(most, *part.shape[1:]) for _ in sizes]
        distributed.all_gather(parts, torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])]))
        return torch.cat([one[:size] for one, size in zip(parts, sizes, strict=True)])

    def share_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimizer's state whole where it is saved, and this process's part where it is loaded."""
        counts, order = self.parameters, [one for group in optimizer.param_groups for one in group["params"]]

        def whole(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
            kept = self._whole or {}
            state = {
                index: {name: kept.get(value, value) if _is_table(value) else value for name, value in values.items()}
                for index, values in saved["state"].items()
            }
            return {**saved, "state": state}

        def part(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
            state = dict(saved["state"])
            for index, values in state.items():
                if (experts := counts.get(order[index])) is not None:
                    rows = self.rows(experts)
                    state[index] = {name: one[rows] if _is_table(one) else one for name, one in values.items()}
            return {**saved, "state": state}

        optimizer.register_state_dict_post_hook(whole)
        optimizer.register_load_state_dict_pre_hook(part)

    @contextmanager
    def collected(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Gather parameters and the optimizer's state, a tensor at a time, in the memory of the first process's host;
        inside the block its `state_dict`s are whole."""
        kept: dict[Tensor, Tensor] = {}
        for parameter, experts in self.parameters.items():
            state = [value for value in optimizer.state.get(parameter, {}).values() if _is_table(value)]
            for tensor in (parameter, *state):
                if tensor.shape != parameter.shape:
                    raise ValueError("--shard experts takes optimizers whose state has the shape of the weights: AdamW")
                whole = self.gather(tensor.detach(), experts)
                if self.rank == 0:
                    kept[tensor] = whole.cpu()
        self._whole = kept
        try:
            yield
        finally:
            self._whole = None

    def _replace(
        self, named: dict[str, nn.Parameter], module: nn.Module, state: dict[str, Any], prefix: str, _: Any
    ) -> None:
        for name, parameter in named.items():
            if self._whole is not None and parameter in self._whole:
                state[prefix + name] = self._whole[parameter]


def _is_table(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _keep_rows(
    named: dict[str, nn.Parameter], rows: slice, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    for name in {prefix + name for name in named} & state.keys():  # a file may have some of the weights only
        state[name] = state[name][rows]


class ShardedTrainer(DistillationTrainer):
    """A `DistillationTrainer` in one of several processes that hold parts of the experts; the first one saves."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.shards = ExpertShards(self.model, self.auxiliary, self.args.device)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Hold this process's experts only while steps are taken."""
        with super().stepping(), self.shards.split():
            yield

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer of the weights that this process holds."""
        if self.optimizer is None:
            self.shards.share_optimizer(super().create_optimizer(model))
        assert self.optimizer is not None
        return self.optimizer

    def finite(self, parameter: nn.Parameter) -> Tensor:
        """Return 1 if a parameter is finite in all processes, else 0."""
        finite = super().finite(parameter)
        if not self.shards.saving:
            distributed.all_reduce(finite, distributed.ReduceOp.MIN)
        return finite

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        if (self.state.global_step + 1) % self.state.logging_steps:
            return None  # it is not logged, and gradients are not clipped
        split, squares = self.shards.parameters, torch.zeros(2, device=self.args.device)
        for parameter in model.parameters():
            if parameter.grad is not None:
                squares[int(parameter in split)] += parameter.grad.float().square().sum()
        distributed.all_reduce(squares[1:])
        return squares.sum().sqrt()

    def save_alone(self) -> None:
        """Raise a RuntimeError: no process has all weights."""
        raise RuntimeError("each process holds a part of the experts")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.optimizer is not None
        self.check_weights()
        with self.shards.collected(self.optimizer):
            if self.args.should_save:
                super()._save_checkpoint(model, trial)

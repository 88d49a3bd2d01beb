"""The layers that replace an MLP: Mixture of Decoders, TopK transcoder, skip transcoder.

With x the MLP's input (..., I), N experts (latents) of which at most K are active:

    all              a = TopK(ReLU(Gx + g))
    MxDLayer         y = (Cᵀa) * (Dᵀz) + b,   z = act(Ex + e)  or  z = act(Ex + e) * (Ux + u)
    TranscoderLayer  y = Cᵀa + b              and + Sᵀx with a skip

A layer that writes to J neighbouring MLPs has their outputs one after another, O = J × their width: its own rows of D
and b, and columns of C, for each, with one gate and one z.

Parameters of an MxD: N(I + O + 1) for gate and modulations, H(I + 1) for the encoder (twice that for a GLU),
H·O for the shared decoder, O for the bias. Each expert is the full-rank map W_n = D diag(c_n).

Source: Oldfield et al., "Towards Interpretability Without Sacrifice", https://arxiv.org/abs/2505.21364.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN

from .configuration_mxd import MxDLayerConfig
from .functional import expert_sum, routed_gate, topk_gate
from .interventions import ExpertCoefficients, ExpertIntervention

CoefficientHook = Callable[["SparseLayer", Tensor, ExpertCoefficients], ExpertCoefficients | None]
OutputHook = Callable[["SparseLayer", Tensor, Tensor], Tensor]


class SparseLayer(nn.Module):
    """Base of all layers: select experts by a gate, and let their coefficients be read and changed.

    Inputs may have any leading dimensions and any floating dtype: they are cast to the weights' dtype, and the
    output to the input's.

    Attributes:
        gate: `nn.Linear` with weight G (N, I) and bias g (N).
        output_bias: b (O), or None.
        router: `nn.Linear` that scores the groups of experts, or None if every expert is scored.
        expert_frequency: buffer (N), share of training tokens on which each expert was active.
        expert_mean: buffer (N), mean coefficient of each expert over training tokens, zeros included. Both buffers
            are zero until training has measured them.
    """

    def __init__(self, config: MxDLayerConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=config.gate_bias)
        self.output_bias = nn.Parameter(torch.empty(config.output_size)) if config.output_bias else None
        groups = config.num_expert_groups
        self.router = nn.Linear(config.hidden_size, groups) if groups is not None else None
        self.register_buffer("expert_frequency", torch.zeros(config.num_experts))
        self.register_buffer("expert_mean", torch.zeros(config.num_experts))
        self._coefficient_hooks: OrderedDict[int, CoefficientHook] = OrderedDict()
        self._output_hooks: OrderedDict[int, OutputHook] = OrderedDict()

    expert_frequency: Tensor
    expert_mean: Tensor

    def reset_parameters(self) -> None:
        """Initialise as the paper's code: every matrix as `nn.Linear` does, the decoder D (or S) and b at zero."""
        _init_linear(self.gate)
        if self.router is not None:
            _init_linear(self.router)
        if self.output_bias is not None:
            nn.init.zeros_(self.output_bias)
        nn.init.zeros_(self.expert_frequency)
        nn.init.zeros_(self.expert_mean)

    @property
    def num_output_layers(self) -> int:
        """Number of MLPs that the layer writes to."""
        return self.config.num_output_layers

    @property
    def expert_table(self) -> nn.Parameter:
        """Parameter with one row per expert, C (N, O)."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> ExpertCoefficients:
        """Return the gate's coefficients, without interventions: x (..., I) → values and indices (..., K)."""
        x, k, opened = x.to(self.expert_table.dtype), self.config.num_experts_per_tok, self.open_groups(x)
        gate = self.gate
        if not _is_plain_linear(gate):
            scores = gate(x) if opened is None else gate(x).masked_fill(~self.in_groups(opened), -torch.inf)
            values, indices = scores.topk(k, dim=-1, sorted=False)
            return ExpertCoefficients(values.relu(), indices)
        if opened is None:
            return ExpertCoefficients(*topk_gate(x, gate.weight, gate.bias, k))
        return ExpertCoefficients(*routed_gate(x, gate.weight, gate.bias, opened, self.config.expert_group_size, k))

    @torch.no_grad()
    def open_groups(self, x: Tensor) -> Tensor | None:
        """Return the groups whose experts are scored, (..., M) int64 in no order; None if all are. No gradient."""
        opened = self.config.num_groups_per_tok
        if self.router is None or opened is None or opened == self.config.num_expert_groups:
            return None
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            return self.router(x.to(self.router.weight.dtype)).topk(opened, dim=-1, sorted=False).indices

    def in_groups(self, groups: Tensor) -> Tensor:
        """Return whether each expert is in one of the groups, (..., M) → (..., N) bool."""
        c = self.config
        shape = (*groups.shape[:-1], c.num_expert_groups or 1)
        named = torch.zeros(shape, dtype=torch.bool, device=groups.device).scatter(-1, groups, True)
        return named.repeat_interleave(c.expert_group_size, dim=-1)[..., : c.num_experts]

    def combine(self, summed: Tensor, x: Tensor) -> Tensor:
        """Return the output for Cᵀa, `summed` (..., O), and the input x (..., I), in the dtype of the weights."""
        raise NotImplementedError

    def sum_experts(self, coefficients: ExpertCoefficients) -> Tensor:
        """Return Cᵀa (..., O) in the dtype of the weights."""
        table = self.expert_table
        return expert_sum(coefficients.values.to(table.dtype), coefficients.indices, table)

    def decode(self, coefficients: ExpertCoefficients, x: Tensor) -> Tensor:
        """Return y (..., O), in the dtype of x, for given coefficients and the input x (..., I)."""
        return self.combine(self.sum_experts(coefficients), x.to(self.expert_table.dtype)).to(x.dtype)

    def coefficients(self, x: Tensor) -> ExpertCoefficients:
        """Return the coefficients that `forward` decodes: `encode(x)` with registered interventions applied."""
        coefficients = self.encode(x)
        for hook in tuple(self._coefficient_hooks.values()):
            changed = hook(self, x, coefficients)
            coefficients = coefficients if changed is None else changed
        return coefficients

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., O) for x (..., I), with registered interventions applied to the coefficients."""
        y = self.decode(self.coefficients(x), x)
        for hook in tuple(self._output_hooks.values()):
            y = hook(self, x, y)
        return y

    def register_coefficient_hook(self, hook: CoefficientHook) -> RemovableHandle:
        """Call `hook(layer, x, coefficients)` in every forward; what it returns, unless None, replaces them.

        Returns a handle that removes the hook: use it in a `with` statement, or call `remove()`.
        """
        handle = RemovableHandle(self._coefficient_hooks)
        self._coefficient_hooks[handle.id] = hook
        return handle

    def register_output_hook(self, hook: OutputHook) -> RemovableHandle:
        """Return `hook(layer, x, y)` in place of y in every forward; compiled code sees it, unlike PyTorch's hooks."""
        handle = RemovableHandle(self._output_hooks)
        self._output_hooks[handle.id] = hook
        return handle

    def intervene(self, **changes: Any) -> RemovableHandle:
        """Change expert coefficients by the `add`, `set`, `scale` and `ablate` of `ExpertIntervention`.

        Returns a handle that ends the intervention: use it in a `with` statement, or call `remove()`. Raises a
        ValueError if no change is given, or an expert does not exist.
        """
        intervention = ExpertIntervention(**changes)
        intervention.check(self.config.num_experts)
        return self.register_coefficient_hook(intervention)

    @contextmanager
    def record(self) -> Iterator[list[ExpertCoefficients]]:
        """Collect the detached coefficients of every forward inside the block, after earlier interventions."""
        recorded: list[ExpertCoefficients] = []

        def keep(_: SparseLayer, x: Tensor, coefficients: ExpertCoefficients) -> None:
            recorded.append(ExpertCoefficients(coefficients.values.detach(), coefficients.indices))

        with self.register_coefficient_hook(keep):
            yield recorded

    def extra_repr(self) -> str:
        c = self.config
        return f"{c.method}, num_experts={c.num_experts}, num_experts_per_tok={c.num_experts_per_tok}"


class MxDLayer(SparseLayer):
    """Mixture of Decoders: y = (Cᵀa) * (Dᵀz) + b (paper eq. 5).

    Attributes:
        encoder: `nn.Linear` with E (H, I) and e (H).
        encoder_up: `nn.Linear` with U (H, I) and u (H) in the GLU form, else None.
        decoder: `nn.Linear` without bias, weight Dᵀ (O, H).
        modulation: C (N, O).
    """

    def __init__(self, config: MxDLayerConfig):
        super().__init__(config)
        inputs, units, outputs = config.hidden_size, config.intermediate_size, config.output_size
        self.encoder = nn.Linear(inputs, units, bias=config.encoder_bias)
        self.encoder_up = nn.Linear(inputs, units, bias=config.encoder_bias) if config.encoder_type == "glu" else None
        self.decoder = nn.Linear(units, outputs, bias=False)
        self.modulation = nn.Parameter(torch.empty(config.num_experts, outputs))
        self.act_fn = ACT2FN[config.hidden_act]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _init_linear(self.encoder)
        if self.encoder_up is not None:
            _init_linear(self.encoder_up)
        nn.init.zeros_(self.decoder.weight)
        bound = 1 / math.sqrt(self.config.num_experts)  # Cᵀ is an nn.Linear(N, O) in the authors' code
        nn.init.uniform_(self.modulation, -bound, bound)

    @property
    def expert_table(self) -> nn.Parameter:
        return self.modulation

    def hidden(self, x: Tensor) -> Tensor:
        """Return z (..., H), the dense encoder's units for x (..., I)."""
        x = x.to(self.expert_table.dtype)
        z = self.act_fn(self.encoder(x))
        return z if self.encoder_up is None else z * self.encoder_up(x)

    def combine(self, summed: Tensor, x: Tensor) -> Tensor:
        y = summed * self.decoder(self.hidden(x))
        return y if self.output_bias is None else y + self.output_bias

    def expert_weight(self, expert: int) -> Tensor:
        """Return W_n = D diag(c_n), (H, O), the linear map from z to y of one expert (paper eq. 4)."""
        return self.decoder.weight.T * self.modulation[expert]


class TranscoderLayer(SparseLayer):
    """TopK transcoder y = Cᵀa + b, with `method="skip_transcoder"` also + Sᵀx (Paulo et al., arXiv 2501.18823).

    Attributes:
        decoder: C (N, O), one row per latent. Initialised to zero, like the skip.
        skip: `nn.Linear` without bias, weight Sᵀ (O, I), or None.
    """

    def __init__(self, config: MxDLayerConfig):
        super().__init__(config)
        self.decoder = nn.Parameter(torch.empty(config.num_experts, config.output_size))
        has_skip = config.method == "skip_transcoder"
        self.skip = nn.Linear(config.hidden_size, config.output_size, bias=False) if has_skip else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.decoder)
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)

    @property
    def expert_table(self) -> nn.Parameter:
        return self.decoder

    def combine(self, summed: Tensor, x: Tensor) -> Tensor:
        y = summed if self.skip is None else summed + self.skip(x)
        return y if self.output_bias is None else y + self.output_bias


def make_layer(config: MxDLayerConfig) -> SparseLayer:
    """Make the layer that a configuration describes, initialised as in the paper's code."""
    return MxDLayer(config) if config.method == "mxd" else TranscoderLayer(config)


def _is_plain_linear(module: nn.Module) -> bool:
    """Return whether weight and bias may be read: a gate that is wrapped (LoRA), hooked or offloaded must be called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    # accelerate offloads weights by putting a `forward` on the instance.
    hooked = "forward" in vars(module) or any(getattr(module, name) for name in hooks)
    return type(module) is nn.Linear and not hooked


def _init_linear(linear: nn.Linear) -> None:
    # As nn.Linear does it, written with nn.init so that transformers sees which weights were loaded.
    bound = 1 / math.sqrt(linear.in_features)
    nn.init.uniform_(linear.weight, -bound, bound)
    if linear.bias is not None:
        nn.init.uniform_(linear.bias, -bound, bound)

"""Fit routers for hierarchical routing: experts that fire together become neighbours, and a linear map learns which
groups of experts a token needs.

Both are fitted on inputs. With v(t, n) the coefficients of the exact gate, and p(g | t) a token's share of coefficients
in group g, two steps alternate:

    router      r = Rx + ρ minimises the cross-entropy of softmax(r) to p(· | t)
    groups      expert n goes to the group in which Σ_t v(t, n) · softmax(r(t))_g is largest, at most ⌈N/G⌉ to each

At first, clusters of the inputs take the place of the router's scores. Groups of similar gate rows capture less
(`benchmarks/routing.py`): similar is not the same as active together.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxd.base.progress import progress_bar
from mxd.modeling_mxd import ExpertCoefficients, MxDLayerConfig, MxDModel, SparseLayer
from mxd.modeling_mxd.functional import scatter_rows, topk_gate

BATCH = 512
LEARNING_RATE = 3e-3
CLUSTER_ROUNDS = 10
CLUSTER_SHARPNESS = 20.0
PART = 4096  # tokens at a time where intermediate tensors are large


def default_num_expert_groups(num_experts: int) -> int:
    """Return a number of groups, about √N, of which none is empty."""
    return -(-num_experts // max(1, round(num_experts**0.5)))


class RoutingRecall(NamedTuple):
    """Share of the exact gate's active experts that routing finds, and of the sum of their coefficients."""

    experts: float
    coefficients: float


@torch.no_grad()
def routing_recall(layer: SparseLayer, inputs: Tensor, num_groups_per_tok: int | None = None) -> RoutingRecall:
    """Return the recall of the exact TopK by the routed one; 1 for a layer without a router.

    `inputs` are those of the layer's MLP, (..., I); `num_groups_per_tok` by default as the configuration says.
    """
    config, sums = layer.config, torch.zeros(4, dtype=torch.float64)
    opened = config.num_groups_per_tok if num_groups_per_tok is None else num_groups_per_tok
    for x in inputs.reshape(-1, inputs.shape[-1]).split(PART):
        values, indices = exact_coefficients(layer, x)
        if layer.router is None or opened == config.num_expert_groups:
            found = torch.ones_like(values, dtype=torch.bool)
        else:
            groups = layer.router(x.to(layer.router.weight)).topk(opened, dim=-1).indices
            # An expert of the exact TopK in an open group is in the routed TopK: it has fewer rivals there.
            found = (indices // config.expert_group_size)[..., None].eq(groups[:, None]).any(-1)
        values = values.double()
        for index, part in enumerate((values * found > 0, values > 0, values * found, values)):
            sums[index] += part.sum().cpu()
    kept, total, kept_sum, total_sum = sums.tolist()
    return RoutingRecall(kept / max(total, 1.0), kept_sum / total_sum if total_sum else 1.0)


def exact_coefficients(layer: SparseLayer, x: Tensor) -> ExpertCoefficients:
    """Return the gate's coefficients without routing; x (T, I) → values and indices (T, K)."""
    weight = layer.gate.weight
    return ExpertCoefficients(*topk_gate(x.to(weight), weight, layer.gate.bias, layer.config.num_experts_per_tok))


def router_loss(layer: SparseLayer, x: Tensor, total: Callable[[Tensor], Tensor] = lambda count: count) -> Tensor:
    """Return the mean cross-entropy of the router's softmax to the exact gate's shares of coefficients; x (T, I).

    Only the router gets gradients. Tokens without an active expert are left out. With `total`, which sums a tensor over
    processes, it is this process's part of the mean over all.
    """
    router = layer.router
    assert router is not None
    with torch.no_grad():
        values, indices = exact_coefficients(layer, x)
        target = _shares(values.float(), indices // layer.config.expert_group_size, router.out_features)
    return _cross_entropy(router(x.detach().to(router.weight.dtype)), target, total)


@torch.no_grad()
def fit_router(
    layer: SparseLayer,
    inputs: Tensor,
    num_expert_groups: int | None = None,
    num_groups_per_tok: int | None = None,
    rounds: int = 3,
    epochs: int = 4,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Give a layer hierarchical routing, fitted to its exact gate on some inputs.

    The layer is changed in place: its experts are renumbered, so that groups are neighbours, and it gets a router and a
    configuration with groups. With all groups opened it computes what it did before.

    Args:
        layer: Layer with a plain `nn.Linear` as gate.
        inputs: Inputs of the layer's MLP, (..., I), on any device; about 60,000 tokens.
        num_expert_groups: G; by default the layer's, or about √N.
        num_groups_per_tok: M, groups that a token opens; by default the layer's, or 8.
        rounds: How often groups are formed anew from the router.
        epochs: Passes over the inputs for each router; `seed` orders them.
        progress: Show a progress bar of the routers fitted.

    Returns:
        (N) int64: expert n was expert `order[n]` before.

    Raises:
        ValueError: No inputs, inputs of another width, an adapted gate, or groups that the configuration refuses.
    """
    x, config = inputs.reshape(-1, inputs.shape[-1]), layer.config
    if not len(x) or x.shape[1] != config.hidden_size:
        raise ValueError(f"inputs must be (tokens, {config.hidden_size}), got {tuple(inputs.shape)}")
    if type(layer.gate) is not nn.Linear:
        raise ValueError(f"the gate must be a plain nn.Linear, not {type(layer.gate).__name__}: merge adapters first")
    groups = num_expert_groups or config.num_expert_groups or default_num_expert_groups(config.num_experts)
    opened = num_groups_per_tok or config.num_groups_per_tok or 8
    config = dataclasses.replace(config, num_expert_groups=groups, num_groups_per_tok=opened)
    fitting = _Fitting(layer, x.to(layer.gate.weight.device), config, seed)
    group = fitting.groups_from_clusters(layer)
    router = fitting.fit_router(group, epochs)
    for _ in progress_bar(range(rounds), desc="fit router", unit="round", show=progress):
        group = fitting.groups_from_scores(router, preferred=F.one_hot(group, groups).float())
        router = fitting.fit_router(group, epochs)
    order = torch.argsort(group, stable=True)
    for tensor in (layer.gate.weight, layer.gate.bias, layer.expert_table, layer.expert_frequency, layer.expert_mean):
        if tensor is not None:
            tensor.copy_(tensor[order])
    router.weight.div_(fitting.scale)  # for inputs as they are
    router.bias.sub_(router.weight @ fitting.mean)
    router = router.to(layer.gate.weight)
    if layer.router is not None and layer.router.weight.shape == router.weight.shape:
        layer.router.load_state_dict(router.state_dict())  # an optimiser may have its parameters
    else:
        layer.router = router
    layer.config = config
    return order


def fit_routers(model: MxDModel, inputs: Mapping[int, Tensor], **options: Any) -> dict[int, Tensor]:
    """Fit the routers of some layers of a model with `fit_router`, and update the model's configuration.

    `inputs` are those of every layer that gets a router, by layer index; returns the orders of experts, too.
    """
    orders = {}
    for index, x in inputs.items():
        layer = model.layer(index)
        orders[index] = fit_router(layer, x, **options)
        fields = {name: getattr(layer.config, name) for name in ("num_expert_groups", "num_groups_per_tok")}
        overrides = model.config.layer_overrides
        model.config.layer_overrides = {**overrides, str(index): {**overrides.get(str(index), {}), **fields}}
    model.config.check()
    return orders


class _Fitting:
    """The inputs of one layer, centred and scaled, with its exact coefficients; fits groups and router in turn."""

    def __init__(self, layer: SparseLayer, x: Tensor, config: MxDLayerConfig, seed: int):
        self.config, self.random = config, torch.Generator().manual_seed(seed)
        self.num_groups = config.num_expert_groups or 1
        coefficients = [exact_coefficients(layer, part) for part in x.split(PART)]
        self.values = torch.cat([values for values, _ in coefficients]).float()
        self.indices = torch.cat([indices for _, indices in coefficients])
        self.mean = x.float().mean(0)
        self.scale = (x.float() - self.mean).square().mean().sqrt().clamp_min(1e-12)
        self.x = (x.float() - self.mean) / self.scale

    def groups_from_clusters(self, layer: SparseLayer) -> Tensor:
        """Return the first groups (N), from clusters of the inputs; idle experts go where their gate rows point."""
        centers = self._cluster_centers()
        preferred = F.normalize(layer.gate.weight.float(), dim=-1) @ centers.T
        return self.groups_from_scores(lambda x: CLUSTER_SHARPNESS * F.normalize(x, dim=-1) @ centers.T, preferred)

    def groups_from_scores(self, score: Callable[[Tensor], Tensor], preferred: Tensor) -> Tensor:
        """Put every expert into the group that is scored highest where it fires, → (N).

        `score` maps inputs (T, I) to scores (T, G); `preferred` (N, G) decides for experts that do not fire.
        """
        weights = torch.cat([score(part).softmax(-1) for part in self.x.split(PART)])
        affinity = scatter_rows(self.indices, self.values, weights, self.config.num_experts)
        affinity /= affinity.sum(-1, keepdim=True).clamp_min(1e-12)
        return balanced_groups(affinity + 1e-3 * preferred, self.config.expert_group_size)

    def _cluster_centers(self) -> Tensor:
        """Return the directions (G, I) of clusters of the inputs, by k-means on the sphere from k-means++."""
        directions = F.normalize(self.x, dim=-1)
        distance = torch.ones(len(directions), device=directions.device)  # to the nearest center so far
        chosen = []
        for _ in range(self.num_groups):
            chosen.append(directions[int(torch.multinomial(distance.cpu(), 1, generator=self.random))])
            distance = torch.minimum(distance, 1 - directions @ chosen[-1]).clamp_min_(1e-6)
        centers = torch.stack(chosen)
        for _ in range(CLUSTER_ROUNDS):
            nearest = torch.cat([(part @ centers.T).argmax(-1) for part in directions.split(PART)])
            sums = torch.zeros_like(centers).index_add_(0, nearest, directions)
            centers = F.normalize(sums, dim=-1).where(sums.any(-1, keepdim=True), centers)
        return centers

    def fit_router(self, group: Tensor, epochs: int) -> nn.Linear:
        """Fit a router for scaled inputs to the tokens' shares of coefficients in each group; `group` (N)."""
        router = nn.utils.skip_init(nn.Linear, self.x.shape[1], self.num_groups, device=self.x.device)
        for parameter in router.parameters():
            nn.init.zeros_(parameter)
        optimizer = torch.optim.Adam(router.parameters(), lr=LEARNING_RATE)
        steps = epochs * -(-len(self.x) // BATCH)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        with torch.enable_grad():
            for _ in range(epochs):
                for rows in torch.randperm(len(self.x), generator=self.random).to(self.x.device).split(BATCH):
                    target = _shares(self.values[rows], group[self.indices[rows]], self.num_groups)
                    loss = _cross_entropy(router(self.x[rows]), target)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        return router


def balanced_groups(scores: Tensor, size: int) -> Tensor:
    """Assign experts to groups of `size` (the last takes the rest) by their scores, (N, G) → (N).

    Deferred acceptance: every expert asks the best group that has not refused it, and every group keeps the `size`
    best of those that asked. No expert and group would both prefer each other to what they got.
    """
    experts, groups = scores.shape
    room = torch.full((groups,), size, device=scores.device)
    room[-1] = experts - (groups - 1) * size
    open_scores, group = scores.clone(), torch.full((experts,), -1, device=scores.device)
    free = torch.arange(experts, device=scores.device)
    while len(free):
        group[free] = open_scores[free].argmax(-1)
        # Experts by group, and in each by score; those behind its room are refused.
        order = scores.gather(1, group[:, None])[:, 0].argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        counts = torch.bincount(group, minlength=groups)
        rank = torch.arange(experts, device=scores.device) - (counts.cumsum(0) - counts)[group[order]]
        free = order[rank >= room[group[order]]]
        open_scores[free, group[free]] = -torch.inf
    return group


def _shares(values: Tensor, groups_of_indices: Tensor, groups: int) -> Tensor:
    """Return a token's share of coefficients in each group, (T, K), (T, K) → (T, G); zeros if none is active."""
    sums = values.new_zeros(len(values), groups).scatter_add_(1, groups_of_indices, values)
    return sums / sums.sum(-1, keepdim=True).clamp_min(1e-12)


def _cross_entropy(scores: Tensor, target: Tensor, total: Callable[[Tensor], Tensor] = lambda count: count) -> Tensor:
    return -(target * F.log_softmax(scores.float(), dim=-1)).sum() / total(target.sum()).clamp_min(1)

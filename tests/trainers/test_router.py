import copy
import dataclasses
from itertools import permutations

import pytest
import torch
from torch import nn

from mxd.modeling_mxd import MxDConfig, MxDLayerConfig, MxDModel, make_layer
from mxd.trainers.router import (
    balanced_groups,
    default_num_expert_groups,
    exact_coefficients,
    fit_router,
    fit_routers,
    router_loss,
    routing_recall,
)

CLUSTERS, PER_CLUSTER, WIDTH = 6, 9, 16


def clustered(num_experts=CLUSTERS * PER_CLUSTER, k=5, method="mxd", tokens=900):
    """A layer whose experts each fire on one kind of input, numbered at random, and such inputs."""
    torch.manual_seed(0)
    centers = 4 * nn.functional.normalize(torch.randn(CLUSTERS, WIDTH), dim=-1)
    layer = make_layer(MxDLayerConfig(WIDTH, 12, 20, num_experts, k, method=method))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    kind = torch.randperm(num_experts) % CLUSTERS
    with torch.no_grad():
        layer.gate.weight.copy_(centers[kind] + 0.3 * torch.randn(num_experts, WIDTH))
        layer.gate.bias.zero_()
        layer.expert_frequency.copy_(torch.rand(num_experts))
        layer.expert_mean.copy_(torch.rand(num_experts))
    return layer, centers[torch.arange(tokens) % CLUSTERS] + 0.3 * torch.randn(tokens, WIDTH)


@pytest.mark.parametrize("method", ["mxd", "transcoder"])
def test_a_fitted_layer_is_the_old_one_with_its_experts_renumbered(method):
    layer, x = clustered(method=method)
    before = copy.deepcopy(layer)
    order = fit_router(layer, x, CLUSTERS, 2, epochs=2)
    assert sorted(order.tolist()) == list(range(54)) and order.tolist() != list(range(54))
    for name in ("gate.weight", "gate.bias", "expert_frequency", "expert_mean"):
        assert torch.equal(layer.state_dict()[name], before.state_dict()[name][order]), name
    assert torch.equal(layer.expert_table, before.expert_table[order])
    layer.config = dataclasses.replace(layer.config, num_groups_per_tok=CLUSTERS)
    torch.testing.assert_close(layer(x), before(x))


def test_groups_and_router_find_what_fires_together():
    layer, x = clustered()
    fit_router(layer, x, CLUSTERS, 1, epochs=20)
    held_out = x[::7] + 0.05 * torch.randn_like(x[::7])
    recall = routing_recall(layer, held_out)
    assert recall.experts > 0.95 and recall.coefficients > 0.95
    mixed = copy.deepcopy(layer)
    with torch.no_grad():  # the same router, experts anywhere
        for tensor in (mixed.gate.weight, mixed.gate.bias):
            tensor.copy_(tensor[torch.randperm(54, generator=torch.Generator().manual_seed(1))])
    assert routing_recall(mixed, held_out).experts < 0.5


def test_recall_is_counted_as_a_loop_counts_it():
    layer, x = clustered(num_experts=50)  # the last group has fewer
    fit_router(layer, x, CLUSTERS, 2, epochs=1, rounds=0)
    nn.init.normal_(layer.router.weight)  # a poor one
    found = total = found_sum = total_sum = 0
    for token in x[:40]:
        exact = layer.gate(token).relu().topk(5)
        active = set(layer.encode(token).indices[layer.encode(token).values > 0].tolist())
        for value, expert in zip(exact.values.tolist(), exact.indices.tolist(), strict=True):
            if value > 0:
                total, total_sum = total + 1, total_sum + value
                if expert in active:
                    found, found_sum = found + 1, found_sum + value
    recall = routing_recall(layer, x[:40].view(5, 8, WIDTH))
    assert 0 < found < total
    assert recall == pytest.approx((found / total, found_sum / total_sum))
    assert routing_recall(layer, x[:40], num_groups_per_tok=CLUSTERS) == (1.0, 1.0)
    assert routing_recall(clustered()[0], x[:40]) == (1.0, 1.0)  # without router


def test_fitting_is_reproducible_and_leaves_the_random_state():
    layers = [clustered()[0] for _ in range(2)]
    x = clustered()[1]
    state = torch.get_rng_state()
    orders = [fit_router(layer, x, CLUSTERS, 2, epochs=1, seed=3) for layer in layers]
    assert torch.equal(*orders) and torch.equal(layers[0].router.weight, layers[1].router.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_balanced_groups_are_full_and_stable():
    scores = torch.rand(23, 5)
    group = balanced_groups(scores, 5)
    assert torch.bincount(group).tolist() == [5, 5, 5, 5, 3]
    for expert, better in permutations(range(23), 2):
        # Nobody would rather be where a less wanted expert sits.
        would_move = scores[expert, group[better]] > scores[expert, group[expert]]
        assert not (would_move and scores[expert, group[better]] > scores[better, group[better]])


@pytest.mark.parametrize("experts", [1, 2, 3, 7, 50, 1000, 16127, 21490, 131072])
def test_the_default_number_of_groups_is_one_that_a_configuration_takes(experts):
    groups = default_num_expert_groups(experts)
    MxDLayerConfig(16, 16, 16, experts, 1, num_expert_groups=groups, num_groups_per_tok=1)
    assert experts < 50 or groups == pytest.approx(experts**0.5, rel=0.15)


def test_the_routers_loss_by_hand_and_its_gradient():
    layer, x = clustered()
    fit_router(layer, x, CLUSTERS, 2, epochs=1)
    layer.zero_grad()
    loss = router_loss(layer, x[:10])
    expected = 0.0
    for token in x[:10]:
        values, indices = exact_coefficients(layer, token[None])
        log_probabilities = layer.router(token).log_softmax(-1)
        for value, expert in zip(values[0], indices[0], strict=True):
            expected -= value / values.sum() * log_probabilities[expert // PER_CLUSTER]
    torch.testing.assert_close(loss, expected / 10)
    loss.backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"router.weight", "router.bias"}


def test_refusals_name_what_is_wrong():
    layer, x = clustered()
    with pytest.raises(ValueError, match=r"inputs must be \(tokens, 16\), got \(0, 16\)"):
        fit_router(layer, x[:0])
    with pytest.raises(ValueError, match=r"inputs must be .* got \(900, 8\)"):
        fit_router(layer, x[:, :8])
    with pytest.raises(ValueError, match="num_expert_groups"):
        fit_router(layer, x, 50)
    layer.gate = nn.Sequential(layer.gate)
    with pytest.raises(ValueError, match=r"must be a plain nn\.Linear, not Sequential"):
        fit_router(layer, x)


def test_fitted_routers_are_saved_with_the_model_and_load(tmp_path):
    config = MxDConfig(
        layers=[1, 4], hidden_size=WIDTH, output_size=12, num_experts=54, num_experts_per_tok=5,
        layer_overrides={"4": {"intermediate_size": 24}},
    )  # fmt: skip
    model, x = MxDModel(config), torch.randn(300, WIDTH)
    nn.init.normal_(model.layer(4).decoder.weight)
    orders = fit_routers(model, {4: x}, num_groups_per_tok=3, epochs=1)
    assert list(orders) == [4]
    model.save_pretrained(tmp_path)
    loaded = MxDModel.from_pretrained(tmp_path)
    assert loaded.layer(1).router is None
    assert (loaded.config.layer(4).num_expert_groups, loaded.config.layer(4).num_groups_per_tok) == (8, 3)
    assert loaded.config.layer(4).intermediate_size == 24
    assert loaded.num_parameters() == loaded.config.num_parameters
    assert torch.equal(loaded.layer(4)(x), model.layer(4)(x))

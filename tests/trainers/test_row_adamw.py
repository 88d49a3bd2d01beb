import copy

import pytest
import torch
from torch import nn

from modeling_mxd import MxDLayerConfig, make_layer
from trainers.row_adamw import RowAdamW

SETTINGS = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}


def sparse(rows, values, size):
    return torch.sparse_coo_tensor(torch.tensor(rows)[None], values, (size, *values.shape[1:]))


def test_every_row_is_an_adamw_of_its_own():
    parameter = nn.Parameter(torch.randn(6, 4))
    alone = [nn.Parameter(row.detach().clone()) for row in parameter]
    optimizers = [torch.optim.AdamW([row], **SETTINGS) for row in alone]
    together = RowAdamW([parameter], **SETTINGS)
    before = parameter.detach().clone()
    for rows in ([0, 3], [3], [5, 0, 2], [2], [0, 2, 3, 5], [5, 5]):
        values = torch.randn(len(rows), 4)
        parameter.grad = sparse(rows, values, 6)
        together.step()
        for row in set(rows):
            alone[row].grad = parameter.grad.to_dense()[row]
            optimizers[row].step()
    torch.testing.assert_close(parameter.detach(), torch.stack([row.detach() for row in alone]))
    state = together.state[parameter]
    for row in (1, 4):  # in no gradient
        assert torch.equal(parameter[row], before[row])
        assert not state["exp_avg"][row].any() and not state["exp_avg_sq"][row].any() and state["step"][row] == 0


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 3, 2)])
def test_with_all_rows_in_every_gradient_it_is_adamw(shape, monkeypatch):
    monkeypatch.setattr("trainers.row_adamw.PIECE_ELEMENTS", 10)  # rows in several pieces
    rowwise, plain = (nn.Parameter(torch.linspace(-1, 1, 7).expand(*shape[::-1]).T.clone()) for _ in range(2))
    dense, plain_dense = (nn.Parameter(torch.ones(3)) for _ in range(2))
    ours, theirs = RowAdamW([rowwise, dense], **SETTINGS), torch.optim.AdamW([plain, plain_dense], **SETTINGS)
    for _ in range(5):
        plain.grad, plain_dense.grad = torch.randn(*shape), torch.randn(3)
        rowwise.grad, dense.grad = sparse(list(range(7)), plain.grad, 7), plain_dense.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(rowwise, plain)
    torch.testing.assert_close(dense, plain_dense)


def layer_and_inputs(method="mxd"):
    torch.manual_seed(0)
    layer = make_layer(MxDLayerConfig(8, 6, 10, 200, 3, method=method))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer, torch.randn(5, 8)


@pytest.mark.parametrize("method", ["mxd", "transcoder"])
def test_the_sparse_gradients_of_a_layer_are_the_dense_ones(method):
    layer, x = layer_and_inputs(method)
    with torch.no_grad():
        layer.gate.bias[:195] = -100.0  # 5 can fire: some tokens have fewer than K
    dense = copy.deepcopy(layer)
    layer.sparse_gradients = True
    for twin in (layer, dense):
        for part in x.split(2):  # accumulated
            twin(part).square().sum().backward()
    fired = layer.encode(x).to_dense(200).sum(0).nonzero()[:, 0]
    for name, parameter in layer.named_parameters():
        by_rows = name.startswith("gate.") or parameter is layer.expert_table
        assert parameter.grad.is_sparse == by_rows, name
        expected = dict(dense.named_parameters())[name].grad
        torch.testing.assert_close(parameter.grad.to_dense() if by_rows else parameter.grad, expected)
        if by_rows:
            assert parameter.grad.coalesce().indices()[0].tolist() == fired.tolist()


def test_experts_that_never_fired_are_untouched_and_all_others_moved():
    layer, x = layer_and_inputs()
    layer.sparse_gradients = True
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer = RowAdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
    fired = torch.zeros(200, dtype=torch.bool)
    for _ in range(4):
        fired |= layer.encode(x).to_dense(200).sum(0) > 0
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 3 <= fired.sum() < 60
    for name in ("gate.weight", "gate.bias", "modulation"):
        changed = (dict(layer.named_parameters())[name] != before[name]).reshape(200, -1).any(1)
        assert torch.equal(changed, fired), name


def test_its_state_goes_on_from_where_it_was_saved():
    layer, x = layer_and_inputs()
    layer.sparse_gradients = True
    optimizer = RowAdamW(layer.parameters(), lr=0.01)

    def step(layer, optimizer):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(layer, optimizer)
    twin = copy.deepcopy(layer)
    resumed = RowAdamW(twin.parameters(), lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(layer, optimizer)
    step(twin, resumed)
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_that_was_loaded_to_the_cpu_moves_to_its_parameters():
    rowwise, dense = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3))
    optimizer = RowAdamW([rowwise, dense])
    rowwise.grad, dense.grad = sparse([1, 4], torch.randn(2, 4), 6), torch.randn(3)
    optimizer.step()
    elsewhere = RowAdamW([nn.Parameter(parameter.to("meta")) for parameter in (rowwise, dense)])
    elsewhere.load_state_dict(optimizer.state_dict())
    devices = [{name: value.device.type for name, value in state.items()} for state in elsewhere.state.values()]
    assert devices == [dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), "meta")] * 2

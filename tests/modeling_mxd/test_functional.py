import pytest
import torch
from torch.autograd import gradcheck

from mxd.modeling_mxd import functional
from mxd.modeling_mxd.functional import expert_sum, largest_positive, scatter_rows, topk_gate


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_topk_gate_passes_gradcheck(k, has_bias):
    x, weight, bias = doubles(2, 3, 5), doubles(7, 5), doubles(7) if has_bias else None
    assert gradcheck(lambda x, weight, bias: topk_gate(x, weight, bias, k)[0], (x, weight, bias))


def test_expert_sum_passes_gradcheck_also_where_an_expert_is_named_twice():
    indices = torch.tensor([[[0, 1, 2], [3, 3, 5], [6, 6, 6]], [[1, 0, 6], [2, 3, 4], [5, 1, 5]]])
    assert gradcheck(lambda values, table: expert_sum(values, indices, table), (doubles(2, 3, 3), doubles(7, 4)))


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_topk_gate_gives_only_the_gradient_that_is_asked(needed):
    tensors = {"x": torch.randn(6, 5), "weight": torch.randn(7, 5), "bias": torch.randn(7)}
    tensors[needed].requires_grad_()
    scores = torch.nn.functional.linear(*tensors.values())
    values, indices = topk_gate(**tensors, k=3)
    (grad,) = torch.autograd.grad(values.sum(), tensors[needed])
    (expected,) = torch.autograd.grad(scores.gather(-1, indices).relu().sum(), tensors[needed])
    torch.testing.assert_close(grad, expected)


def test_second_derivatives_are_right_or_refused():
    x, weight = doubles(3, 5), doubles(7, 5)
    values, indices = topk_gate(x, weight, None, 2)
    (grad,) = torch.autograd.grad(values.square().sum(), x, create_graph=True)
    second = torch.autograd.grad(grad.sum(), (x, weight))
    dense = torch.nn.functional.linear(x, weight).gather(-1, indices).relu()
    (grad,) = torch.autograd.grad(dense.square().sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(grad.sum(), (x, weight)))

    values, _ = topk_gate(x, weight, None, 2)
    (grad,) = torch.autograd.grad(values.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [15, 767, 768, 799])  # from 768 on, 3 are found by way of blocks
@pytest.mark.parametrize("top", [-3, 2, 250])  # no score is positive, one is, many are
@pytest.mark.parametrize("alike", [False, True])
def test_the_largest_positive_scores_are_those_of_topk(dtype, columns, top, alike):
    ranks = torch.stack([torch.randperm(columns) for _ in range(9)])
    ranks[:3] = torch.arange(columns)  # the largest are neighbours, at the beginning or the end
    ranks[0] = columns - 1 - ranks[0]
    ranks = torch.where(ranks < 250, ranks, 250)  # so that every number is exact in 16 bits
    scores = ((top - ranks) // (50 if alike else 1)).to(dtype) / 2
    values, indices = largest_positive(scores.clone(), 3)
    torch.testing.assert_close(values.sort(-1).values, scores.topk(3).values.relu().sort(-1).values, rtol=0, atol=0)
    torch.testing.assert_close(values, scores.gather(-1, indices).relu(), rtol=0, atol=0)
    assert all(len(set(row)) == 3 for row in indices.tolist())


@pytest.mark.parametrize("columns", [769, 799])
def test_the_largest_may_be_the_first_column_behind_the_last_whole_block(columns):
    scores = torch.rand(9, columns)
    scores[:, 768] = 2
    values, indices = largest_positive(scores.clone(), 3)
    assert (indices == 768).any(-1).all()
    torch.testing.assert_close(values, scores.gather(-1, indices), rtol=0, atol=0)


@pytest.mark.parametrize("nan", [torch.nan, -torch.nan])
def test_an_input_that_is_not_a_number_is_not_hidden(nan):
    values, _ = topk_gate(torch.full((1, 5), nan), torch.randn(7, 5), None, 2)
    assert values.isnan().all()


def test_a_gate_row_that_is_not_a_number_is_not_hidden():
    weight = torch.randn(500, 5)
    weight[77] = torch.nan
    values, indices = topk_gate(torch.randn(9, 5), weight, None, 3)
    assert (values.isnan() == (indices == 77)).all()
    assert values.isnan().any(-1).all()


def test_indices_carry_no_gradient():
    assert not topk_gate(doubles(3, 5), doubles(7, 5), None, 2)[1].requires_grad


def test_the_sums_of_rows_by_hand():
    table = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    indices, weights = torch.tensor([[0, 2], [1, 1]]), torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    assert expert_sum(weights, indices, table).tolist() == [[201, 402], [20, 40]]
    rows = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    assert scatter_rows(indices, weights, rows, 4).tolist() == [[1, 2], [20, 40], [2, 4], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_many_tokens_do_not_stall_in_low_precision(dtype):
    # A running sum kept in bfloat16 stops growing at 256 ones.
    tokens = 2000
    ones, indices = torch.ones(tokens, 1, dtype=dtype), torch.zeros(tokens, 1, dtype=torch.int64)
    assert scatter_rows(indices, ones, ones, 1).item() == pytest.approx(tokens, rel=0.01)
    weight, bias = torch.ones(1, 1, dtype=dtype, requires_grad=True), torch.ones(1, dtype=dtype, requires_grad=True)
    topk_gate(ones, weight, bias, 1)[0].sum().backward()
    assert weight.grad.item() == pytest.approx(tokens, rel=0.01)
    assert bias.grad.item() == pytest.approx(tokens, rel=0.01)


def test_the_largest_temporary_is_a_chunk(monkeypatch):
    monkeypatch.setattr(functional, "CHUNK_ELEMENTS", 70)
    monkeypatch.setattr(functional, "CHUNK_TOKENS", 1)
    sizes = []
    linear = torch.nn.functional.linear

    def measured(*args):
        sizes.append(linear(*args).numel())
        return linear(*args)

    monkeypatch.setattr(functional.F, "linear", measured)
    topk_gate(torch.randn(4, 6, 5), torch.randn(7, 5), None, 2)
    assert sizes == [56, 56, 56]

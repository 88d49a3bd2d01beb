import pytest
import torch
from evaluation_cases import activations, batches, decomposition, pad
from reference import dense_coefficients

from mxd.evaluation import TopExamples, top_examples
from mxd.modeling_mxd import ExpertCoefficients


def by_hand(dense: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """The values of the examples, (N, M), from dense coefficients (rows, tokens, N)."""
    of_rows = dense.masked_fill(~mask[..., None], 0).amax(1)  # (rows, N)
    values = of_rows.sort(dim=0, descending=True).values[:count].T
    return torch.nn.functional.pad(values, (0, count - values.shape[1]))


@pytest.mark.parametrize("count", [1, 3, 9])
def test_streamed_examples_are_those_of_dense_coefficients(count):
    torch.manual_seed(0)
    values, indices = torch.rand(7, 11, 20).topk(4)
    values = (values - 0.98).relu()  # some are not active
    mask = torch.rand(7, 11) > 0.2
    dense = torch.zeros(7, 11, 20).scatter(-1, indices, values)
    found = TopExamples.empty(20, count)
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        part = ExpertCoefficients(values[start:stop], indices[start:stop])
        found.update(part, mask[start:stop], start)
    assert torch.equal(found.values, by_hand(dense, mask, count))
    assert (found.values == 0).any() and (found.values > 0).any()
    experts = torch.arange(20)[:, None].expand_as(found.rows)
    there = found.values > 0
    assert torch.equal(dense[found.rows, found.positions, experts][there], found.values[there])
    assert mask[found.rows, found.positions][there].all()


def test_nothing_active_changes_nothing():
    found = TopExamples.empty(5, 2)
    found.update(
        ExpertCoefficients(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1, dtype=torch.int64)), torch.ones(2, 3) > 0, 0
    )
    assert not found.values.any()


@pytest.mark.parametrize("method", ["mxd", "transcoder"])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 2), (3, 0), (1, 2)])
def test_examples_of_a_model_padded_rows_too(tiny_llama, method, left, right):
    rows, model = batches(), decomposition(layers=(0, 2), method=method)
    found = top_examples(tiny_llama, model, rows, count=4, include_first=True)
    for index in (0, 2):
        layer, x = model.layer(index), activations(tiny_llama, index, rows)[0]
        assert x.ndim == 2  # all tokens that count
        largest = dense_coefficients(layer, x).detach().amax(0)
        torch.testing.assert_close(found[index].values[:, 0], largest)
    padded = top_examples(
        tiny_llama, model, [pad(batch, left=left, right=right) for batch in rows], count=4, include_first=True
    )
    torch.testing.assert_close(padded[0].values, found[0].values)
    assert torch.equal(padded[0].rows, found[0].rows)
    there = found[0].values > 0
    assert torch.equal(padded[0].positions[there], found[0].positions[there] + left)  # the caller's


@pytest.mark.parametrize("left", [0, 2])
def test_the_first_position_is_left_out(tiny_llama, left):
    rows, model = [pad(batch, left=left, right=1) for batch in batches()], decomposition()
    every = top_examples(tiny_llama, model, rows, count=6, include_first=True)[1]
    found = top_examples(tiny_llama, model, rows, count=6)[1]
    assert (every.positions[every.values > 0] == left).any()
    assert (found.positions[found.values > 0] > left).all()

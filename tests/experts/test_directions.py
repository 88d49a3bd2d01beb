"""Directions by least squares: a planted decoder is recovered, and the ridge and the skip part are exact."""

import pytest
import torch
from evaluation_cases import batches, decomposition, pad
from factories import FORMS

from mxd.base.capture import capture_mlps
from mxd.experts import DirectionFit, fit_directions
from mxd.modeling_mxd import ExpertCoefficients


def random_tokens(tokens=400, experts=24, k=4, inputs=6, outputs=5):
    values, indices = torch.rand(tokens, experts).topk(k)
    values, x = torch.rand(tokens, k).relu() + 0.1, torch.randn(tokens, inputs)
    return ExpertCoefficients(values, indices), x, torch.randn(experts, outputs), torch.randn(inputs, outputs)


def fitted(coefficients, x, y, experts=24, parts=3, ridge=1.0):
    fit = DirectionFit(experts)
    for value, index, *inputs in zip(*(t.tensor_split(parts) for t in (*coefficients, x, y)), strict=True):
        fit.update(ExpertCoefficients(value, index), *inputs)
    assert fit.tokens == len(x)
    return fit.solve(ridge)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("outputs", [5, 300])  # 300: in several blocks of columns
def test_a_planted_decoder_is_recovered(parts, outputs):
    coefficients, x, decoder, skip = random_tokens(outputs=outputs)
    dense = coefficients.to_dense(24)
    found, maximum = fitted(coefficients, x, dense @ decoder + x @ skip + 3.0, parts=parts, ridge=1e-6)
    torch.testing.assert_close(found, decoder, rtol=0, atol=0.02)
    assert torch.equal(maximum, dense.amax(0))


@pytest.mark.parametrize("ridge", [0.1, 10.0])
def test_it_is_the_solution_of_the_ridge_regression(ridge):
    coefficients, x, decoder, skip = random_tokens()
    dense = coefficients.to_dense(24)
    dense[:, 7] = 0
    values = coefficients.values.masked_fill(coefficients.indices == 7, 0)
    y = dense @ decoder + x @ skip + torch.randn(400, 5)
    found, maximum = fitted(ExpertCoefficients(values, coefficients.indices), x, y, ridge=ridge)
    known = torch.cat([dense, x, torch.ones(400, 1)], 1).double()
    penalty = torch.diag(torch.cat([ridge * dense.amax(0).square(), torch.zeros(7)])).double()
    expected = torch.linalg.lstsq(known.T @ known + penalty, known.T @ y.double(), driver="gelsd").solution[:24]
    torch.testing.assert_close(found, expected.float(), rtol=0.01, atol=0.01)
    assert not found[7].any() and maximum[7] == 0  # an expert that is never active


@pytest.mark.parametrize("form", FORMS)
def test_the_directions_of_a_decomposition_are_set(tiny_llama, form):
    rows, model = batches(), decomposition(layers=(0, 2), **FORMS[form])
    source = fit_directions(tiny_llama, model, [pad(row, left=2) for row in rows])
    for layer in (0, 2):
        x = torch.cat([capture_mlps(tiny_llama, [layer], **row)[layer][0].flatten(0, 1) for row in rows])
        direction, maximum = model.directions(layer)
        dense = model.layer(layer).encode(x).to_dense(24)
        torch.testing.assert_close(maximum, dense.amax(0), rtol=1e-4, atol=1e-5)
        assert direction.shape == (24, 16) and direction[maximum > 0].any(-1).all()
        if "transcoder" in form:
            assert torch.equal(direction, model.layer(layer).decoder)
    assert source == ("decoder" if "transcoder" in form else "least squares on 42 tokens")


def test_no_tokens_are_refused(tiny_llama):
    nothing = pad({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, right=3)
    for rows in ([], [nothing]):
        with pytest.raises(ValueError, match="no tokens to fit directions on"):
            fit_directions(tiny_llama, decomposition(), rows)

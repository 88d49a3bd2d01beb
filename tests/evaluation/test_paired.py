import math

import pytest
import torch

from mxd.evaluation import PairedDifference


def paired(difference, counted=None):
    sums = PairedDifference()
    sums.update(difference, torch.ones_like(difference, dtype=torch.bool) if counted is None else counted)
    return sums


def test_rows_of_one_length_have_the_standard_error_of_their_means():
    difference = torch.randn(40, 9, dtype=torch.float64)
    means = difference.mean(-1)
    assert paired(difference).mean == pytest.approx(difference.mean().item())
    assert paired(difference).standard_error == pytest.approx((means.std() / math.sqrt(40)).item())


def test_a_repeated_token_tells_nothing_new():
    once = torch.randn(30, 1)
    assert paired(once.expand(30, 8)).standard_error == pytest.approx(paired(once).standard_error)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    def holds():
        difference = 0.3 + torch.randn(60, 1) + 0.5 * torch.randn(60, 6)  # tokens of a row depend on one another
        low, high = paired(difference, torch.rand(60, 6) < 0.7).interval
        return low < 0.3 < high

    assert 0.91 < sum(holds() for _ in range(1000)) / 1000 < 0.98


def test_what_does_not_count_does_not_matter():
    difference, counted = torch.randn(5, 4), torch.tensor([[True, True, False, False]] * 5)
    padded = torch.cat([difference.masked_fill(~counted, torch.nan), torch.full((2, 4), torch.nan)])
    sums = paired(padded, torch.cat([counted, torch.zeros(2, 4, dtype=torch.bool)]))
    assert sums.interval == paired(difference[:, :2]).interval


def test_one_row_has_no_interval():
    assert math.isnan(paired(torch.randn(1, 5)).standard_error) and math.isnan(PairedDifference().mean)

import pytest
import torch
from evaluation_cases import decomposition

from mxd.evaluation import decomposition_ranks, expert_ranks


@pytest.mark.parametrize("units", [20, 16, 5])
def test_ranks_and_singular_values_are_those_of_the_experts_matrices(units):
    layer = decomposition(intermediate_size=units).layer(1)
    layer.modulation.data[3, :4] = 0
    layer.modulation.data[5] = 0
    layer.modulation.data[7, 2] = 1e-12  # not zero, but under the tolerance
    ranks = expert_ranks(layer)  # of float32 weights; below they are cast, which is exact
    assert ranks.experts.tolist() == list(range(24))  # all, as there are fewer than the sample
    for expert in range(24):
        matrix = layer.expert_weight(expert).detach()
        values = torch.linalg.svdvals(matrix.double())
        assert ranks.largest[expert].item() == pytest.approx(values[0].item(), rel=1e-6)
        assert ranks.smallest[expert].item() == pytest.approx(values[-1].item(), rel=1e-3, abs=1e-8)
        assert ranks.normalised_rank[expert] * min(units, 16) == torch.linalg.matrix_rank(matrix)
    summary = ranks.summary()
    assert summary["zeros"] == 20 / (24 * 16) and summary["experts_with_zeros"] == 2
    assert summary["minimum_normalised_rank"] == summary["smallest_singular_value"]["minimum"] == 0
    assert decomposition_ranks(decomposition(method="transcoder")) == {}

import pytest
import torch
from evaluation_cases import decomposition

from mxd.evaluation import decomposition_ranks, expert_ranks


@pytest.mark.parametrize("units", [20, 16, 5])
def test_singular_values_are_those_of_the_experts_matrices(units):
    layer = decomposition(intermediate_size=units).layer(1)
    ranks = expert_ranks(layer)  # of float32 weights; below they are cast, which is exact
    assert ranks.experts.tolist() == list(range(24))  # all, as there are fewer than the sample
    for expert in range(24):
        values = torch.linalg.svdvals(layer.double().expert_weight(expert))
        assert ranks.largest[expert].item() == pytest.approx(values[0].item(), rel=1e-12)
        assert ranks.smallest[expert].item() == pytest.approx(values[-1].item(), rel=1e-9)
    assert ranks.normalised_rank.tolist() == [1] * 24


def test_zeros_are_counted_and_take_rank():
    layer = decomposition().layer(1)
    layer.modulation.data[3, :4] = 0
    layer.modulation.data[5] = 0
    layer.modulation.data[7, 2] = 1e-12  # not zero, but under the tolerance
    ranks = expert_ranks(layer, [7, 3, 5, 0])
    assert ranks.experts.tolist() == [0, 3, 5, 7]
    assert ranks.normalised_rank.tolist() == [1, 12 / 16, 0, 15 / 16]
    for row, expert in enumerate([0, 3, 5, 7]):
        assert ranks.normalised_rank[row] * 16 == torch.linalg.matrix_rank(layer.expert_weight(expert).detach())
    assert ranks.zeros[[0, 3, 5, 7]].tolist() == [0, 4, 16, 0]  # of all experts, sampled or not
    assert 0 < ranks.smallest[3] < 1e-11  # kept, where squaring would have lost it
    summary = ranks.summary()
    assert summary["zeros"] == 20 / (24 * 16) and summary["experts_with_zeros"] == 2
    assert summary["normalised_rank"] == pytest.approx((1 + 12 / 16 + 15 / 16) / 4)
    assert summary["minimum_normalised_rank"] == summary["smallest_singular_value"]["minimum"] == 0


def test_a_decoder_of_low_rank_shows_in_every_expert():
    layer = decomposition().layer(1)
    layer.decoder.weight.data = layer.decoder.weight.data[:, :3] @ torch.randn(3, 20)
    assert set(expert_ranks(layer).normalised_rank.tolist()) == {3 / 16}


def test_a_sample_is_drawn_with_a_seed():
    layer = decomposition(num_experts=200).layer(1)
    first, again, other = (expert_ranks(layer, 10, seed).experts for seed in (0, 0, 1))
    assert len(first.unique()) == 10 and torch.equal(first, again) and not torch.equal(first, other)


def test_half_precision_weights_are_judged_as_float32():
    assert expert_ranks(decomposition().layer(1).to(torch.bfloat16)).normalised_rank.tolist() == [1] * 24


def test_what_has_no_rank_is_refused():
    transcoder = decomposition(method="transcoder")
    with pytest.raises(ValueError, match="transcoder is one vector"):
        expert_ranks(transcoder.layer(1))
    assert decomposition_ranks(transcoder) == {}
    layer = decomposition().layer(1)
    for wrong in (0, [], [24], [-1]):
        with pytest.raises(ValueError, match="expert"):
            expert_ranks(layer, wrong)


def test_every_layer_of_a_decomposition():
    assert list(decomposition_ranks(decomposition(layers=(0, 2)), experts=3)) == [0, 2]

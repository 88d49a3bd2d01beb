import pytest
import torch
from evaluation_cases import activations, batches, decomposition, pad
from reference import dense_coefficients

from mxd.base.capture import capture_mlps
from mxd.evaluation import ExpertUse, count_expert_use, measure_expert_statistics
from mxd.modeling_mxd import ExpertCoefficients

# Four tokens, K = 2, five experts; a value of 0 is not active.
VALUES = torch.tensor([[2.0, 1.0], [4.0, 0.0], [3.0, 5.0], [1.0, 0.0]])
INDICES = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 0]])


def test_use_by_hand():
    use = ExpertUse(5)
    use.update(ExpertCoefficients(VALUES, INDICES))
    assert use.tokens == 4
    assert use.frequency.tolist() == [3 / 4, 2 / 4, 0, 1 / 4, 0]
    assert use.mean.tolist() == [9 / 4, 6 / 4, 0, 1 / 4, 0]
    summary = use.summary()
    # p = 1/2, 1/3, 1/6.
    entropy = torch.tensor([1 / 2, 1 / 3, 1 / 6]).pow(-1).log() @ torch.tensor([1 / 2, 1 / 3, 1 / 6])
    assert summary["expert_entropy"] == pytest.approx((entropy / torch.tensor(5.0).log()).item())
    assert {name: value for name, value in summary.items() if name != "expert_entropy"} == {
        "l0": 6 / 4,
        "dead_experts": 2 / 5,
        "max_expert_frequency": 3 / 4,
        "frequent_experts": 2,  # a quarter exactly is not over a quarter
    }
    assert use.summary(frequent_above=0.5)["frequent_experts"] == 1


def test_always_on_experts_are_named_the_most_frequent_first():
    use = ExpertUse(4)
    use.update(ExpertCoefficients(torch.ones(10, 3), torch.tensor([[2, 0, 3]] * 8 + [[2, 0, 1], [1, 0, 3]])))
    assert use.always_on() == {"0": 1.0, "2": 0.9, "3": 0.9}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_in_any_shape_equals_one_batch(dtype):
    whole, parts = ExpertUse(5), ExpertUse(5)
    whole.update(ExpertCoefficients(VALUES, INDICES))
    parts.update(ExpertCoefficients(VALUES[:1].to(dtype), INDICES[:1]))
    parts.update(ExpertCoefficients(VALUES[:0].to(dtype), INDICES[:0]))
    parts.update(ExpertCoefficients(VALUES[1:3].to(dtype).view(2, 1, 1, 2), INDICES[1:3].view(2, 1, 1, 2)))
    parts.update(ExpertCoefficients(VALUES[3].to(dtype).requires_grad_(), INDICES[3]))
    assert parts.tokens == 4
    assert torch.equal(parts.counts, whole.counts) and torch.equal(parts.sums, whole.sums)


@pytest.mark.parametrize("method", ["mxd", "transcoder", "skip_transcoder"])
def test_statistics_are_those_of_the_dense_coefficients(tiny_llama, method):
    rows, model = batches(), decomposition(layers=(0, 2), method=method)
    measure_expert_statistics(tiny_llama, model, rows)
    for index in (0, 2):
        layer = model.layer(index)
        dense = dense_coefficients(layer, activations(tiny_llama, index, rows)[0]).detach()
        torch.testing.assert_close(layer.expert_frequency, (dense > 0).float().mean(0))
        torch.testing.assert_close(layer.expert_mean, dense.mean(0))


@pytest.mark.parametrize("padding", [{"left": 3, "rows": 2}, {"right": 3}, {"left": 1, "right": 2, "token": 63}])
def test_padding_does_not_count(tiny_llama, padding):
    rows, model = batches(), decomposition()
    expected = count_expert_use(tiny_llama, model, rows)[1]
    use = count_expert_use(tiny_llama, model, [pad(row, **padding) for row in rows])[1]
    assert use.tokens == expected.tokens == 42
    assert torch.equal(use.counts, expected.counts)
    torch.testing.assert_close(use.sums, expected.sums, rtol=1e-5, atol=1e-6)


def test_recorded_activations_do_for_the_model(tiny_llama):
    rows, model = [pad(row, right=2) for row in batches()], decomposition()
    calls = []

    def capture(batch):
        calls.append(batch)
        return capture_mlps(tiny_llama, [1], **batch)

    use = count_expert_use(capture, model, rows)[1]
    assert len(calls) == len(rows)
    assert torch.equal(use.counts, count_expert_use(tiny_llama, model, rows)[1].counts)


def test_no_tokens_are_refused_and_the_buffers_stay(tiny_llama):
    model = decomposition()
    model.layer(1).expert_mean.fill_(7)
    nothing = pad({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, right=3)
    for rows in ([], [nothing]):
        with pytest.raises(ValueError, match="no tokens to measure the experts on"):
            measure_expert_statistics(tiny_llama, model, rows)
    assert (model.layer(1).expert_mean == 7).all() and not model.layer(1).expert_frequency.any()


def test_dropout_is_off_and_modes_are_kept(tiny_llama):
    rows, model = batches(), decomposition()
    expected = count_expert_use(tiny_llama, model, rows)[1].counts
    tiny_llama.model.layers[0].self_attn.attention_dropout = 0.9
    tiny_llama.train()
    assert torch.equal(count_expert_use(tiny_llama, model, rows)[1].counts, expected)
    assert tiny_llama.training and not model.training

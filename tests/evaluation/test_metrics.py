import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mxd.evaluation import (
    ErrorSums,
    LogitSums,
    explained_share,
    kl_divergence,
    metrics,
    next_token_loss,
    normalised_entropy,
    normalised_error,
    recovered_share,
)

Y = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
PREDICTION = torch.tensor([[3.0, 5.0], [1.0, 2.0]])


def errors(*pairs):
    sums = ErrorSums()
    for prediction, target in pairs:
        sums.update(prediction, target)
    return sums


def logit_sums(*batches):
    sums = LogitSums()
    for batch in batches:
        sums.update(*batch)
    return sums


def test_errors_by_hand():
    # Squared errors 1 and 1, squared norms 25 and 4; mean (3/2, 3), deviations ±(3/2, 1) with squares 13/4 each.
    sums = errors((PREDICTION, Y))
    assert normalised_error(PREDICTION, Y).tolist() == pytest.approx([1 / 25, 1 / 4])
    assert sums.nmse == pytest.approx((1 / 25 + 1 / 4) / 2)
    assert sums.fvu == pytest.approx(2 / (13 / 2))
    assert sums.tokens == 2


def test_a_target_of_zero_has_no_normalised_error_but_counts_in_the_variance():
    target = torch.cat([Y, torch.zeros(1, 2)])
    prediction = torch.cat([PREDICTION, torch.tensor([[0.0, 3.0]])])
    assert normalised_error(prediction, target)[2].isnan()
    # Mean (1, 2); deviations (2, 2), (-1, 0), (-1, -2) with squares 8, 1, 5.
    sums = errors((prediction, target))
    assert sums.nmse == pytest.approx((1 / 25 + 1 / 4) / 2)
    assert sums.fvu == pytest.approx((1 + 1 + 9) / (8 + 1 + 5))


def test_what_zero_and_the_mean_get():
    target = torch.randn(50, 6) + 2
    assert errors((torch.zeros(50, 6), target)).nmse == pytest.approx(1)
    assert errors((target.mean(0).expand(50, 6), target)).fvu == pytest.approx(1)
    assert (errors((target, target)).nmse, errors((target, target)).fvu) == (0, 0)


def test_errors_streamed_in_any_parts_equal_one_batch():
    target, prediction = torch.randn(31, 5) + 10, torch.randn(31, 5) + 10
    whole = errors((prediction, target))
    parts = errors(*zip(prediction.split([1, 0, 20, 10]), target.split([1, 0, 20, 10]), strict=True))
    shaped = errors((prediction[:30].view(2, 3, 5, 5), target[:30].view(2, 3, 5, 5)), (prediction[30:], target[30:]))
    for other in (parts, shaped):
        assert (other.tokens, other.nmse, other.fvu) == pytest.approx((31, whole.nmse, whole.fvu), rel=1e-12)
    plain = (prediction - target).square().sum() / (target - target.mean(0)).square().sum()
    assert whole.fvu == pytest.approx(plain.item(), rel=1e-5)


def test_variance_far_from_zero_and_no_variance_at_all():
    far = torch.tensor([[1e8], [1e8 + 1]], dtype=torch.float64)
    assert errors((far + 0.5, far)).fvu == pytest.approx(1)  # squared errors 1/4 + 1/4, variance 1/4 + 1/4
    same = torch.full((3, 2), 0.1)
    assert math.isnan(errors((same + 1, same)).fvu)
    assert math.isnan(errors((PREDICTION[:1], Y[:1]), (PREDICTION[:1], Y[:1])).fvu)
    assert math.isnan(errors().nmse) and math.isnan(errors().fvu)
    assert math.isnan(errors((torch.ones(1, 2), torch.zeros(1, 2))).nmse)


def test_a_prediction_that_is_not_finite_shows():
    assert math.isnan(errors((torch.tensor([[math.nan, 0.0], [0.0, 2.0]]), Y)).nmse)


# Two tokens of vocabulary: probabilities (1/4, 3/4) after the first position, (1/2, 1/2) after the second.
LOGITS = torch.tensor([[[0.0, math.log(3)], [5.0, 5.0], [9.0, -9.0]]])
IDS = torch.tensor([[0, 1, 0]])
# (1/2, 1/2), then (4/5, 1/5).
REFERENCE = torch.tensor([[[2.0, 2.0], [math.log(4), 0.0], [-9.0, 9.0]]])
ALL = torch.ones(1, 3, dtype=torch.bool)


def test_next_token_metrics_by_hand():
    sums = logit_sums((LOGITS, IDS, ALL, REFERENCE))
    assert sums.targets == 2
    assert sums.cross_entropy == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2)) / 2)
    first = (math.log(2) + math.log(2 / 3)) / 2
    second = 4 / 5 * math.log(8 / 5) + 1 / 5 * math.log(2 / 5)
    assert sums.kl == pytest.approx((first + second) / 2)
    # Most likely: token 1 and (a tie) token 0; of the reference: token 0 (a tie) and token 0.
    assert sums.agreement == 1 / 2
    assert next_token_loss(LOGITS.log_softmax(-1), IDS)[0, 0].item() == pytest.approx(math.log(4))
    by_position = kl_divergence(REFERENCE.log_softmax(-1), LOGITS.log_softmax(-1))
    assert by_position[0, :2].tolist() == pytest.approx([first, second])


def test_a_model_against_itself():
    logits, ids, mask = torch.randn(2, 9, 30), torch.randint(30, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    sums = logit_sums((logits, ids, mask, logits))
    assert (sums.kl, sums.agreement) == (0, 1)


@pytest.mark.parametrize(
    ("mask", "targets", "loss"),
    [
        ([1, 1, 0], 1, math.log(4 / 3)),  # padding on the right: only the first has a next token
        ([0, 1, 1], 1, math.log(2)),  # on the left
        ([1, 0, 1], 0, math.nan),
        ([0, 0, 0], 0, math.nan),
    ],
)
def test_padding_is_neither_source_nor_target(mask, targets, loss):
    sums = logit_sums((LOGITS, IDS, torch.tensor([mask]).bool(), REFERENCE))
    assert sums.targets == targets
    assert sums.cross_entropy == pytest.approx(loss, nan_ok=True)
    assert math.isnan(sums.kl) == math.isnan(sums.agreement) == (not targets)


@pytest.mark.parametrize("elements", [1, 64, 2**24])
def test_logits_in_chunks_and_batches_equal_the_plain_equations(monkeypatch, elements):
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", elements)
    logits, reference = torch.randn(2, 4, 6, 20).bfloat16().unbind()
    ids, mask = torch.randint(20, (4, 6)), torch.rand(4, 6) > 0.2
    counted = mask[:, :-1] & mask[:, 1:]
    log_p, log_q = (tensor[:, :-1][counted].double().log_softmax(-1) for tensor in (logits, reference))
    parts = [(logits[i : i + 2], ids[i : i + 2], mask[i : i + 2], reference[i : i + 2]) for i in (0, 2)]
    for sums in (logit_sums((logits, ids, mask, reference)), logit_sums(*parts)):
        assert sums.targets == counted.sum()
        plain = torch.nn.functional.nll_loss(log_p, ids[:, 1:][counted])
        assert sums.cross_entropy == pytest.approx(plain.item(), rel=1e-6)
        assert sums.kl == pytest.approx((log_q.exp() * (log_q - log_p)).sum(-1).mean().item(), rel=1e-5)
        assert sums.agreement == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.elements = max(self.elements, output.numel())
        return output


def test_no_copy_of_all_logits_is_made(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 1000)
    logits = torch.randn(4, 16, 100)
    with LargestTensor() as largest:
        logit_sums((logits, torch.randint(100, (4, 16)), torch.ones(4, 16, dtype=torch.bool), logits))
    assert 0 < largest.elements <= 1000 < logits.numel()


def test_shares_by_hand():
    assert recovered_share(untouched=3.0, spliced=3.1, zero_ablated=4.0) == pytest.approx(0.9)
    assert recovered_share(3.0, 3.0, 4.0) == 1 and recovered_share(3.0, 4.0, 4.0) == 0
    assert recovered_share(3.0, 5.0, 4.0) == -1  # worse than none
    assert math.isnan(recovered_share(3.0, 3.0, 3.0))
    assert math.isnan(recovered_share(3.1, 3.2, 3.0))  # zeros do better than the MLP
    assert explained_share(0.2, 0.6) == pytest.approx(0.5)
    assert explained_share(0.2, 1.0) == pytest.approx(1)
    assert math.isnan(explained_share(1.0, 1.0))


def test_entropy_by_hand():
    # p = 1/4, 1/4, 1/2, 0: entropy (1/4 · 2 + 1/4 · 2 + 1/2 · 1) log 2 = 3/2 log 2, of log 4 = 2 log 2.
    assert normalised_entropy(torch.tensor([1, 1, 2, 0])) == pytest.approx(3 / 4)
    assert normalised_entropy(torch.tensor([7, 7, 7])) == pytest.approx(1)
    assert normalised_entropy(torch.tensor([0, 9, 0])) == 0
    assert math.isnan(normalised_entropy(torch.tensor([0, 0]))) and math.isnan(normalised_entropy(torch.tensor([5])))


def test_kl_of_tokens_that_the_reference_rules_out_is_zero():
    reference = torch.tensor([0.5, 0.5, 0.0]).log()
    p = torch.tensor([0.25, 0.75, 0.0]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(reference, p).item() == pytest.approx(expected)
    assert kl_divergence(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()).item() == math.inf


def test_clipped_errors_by_hand():
    sums = ErrorSums()
    target = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    sums.update(torch.tensor([[1.0, 0.5], [6.0, 2.0], [3.0, 3.0]]), target)  # errors 1/4, 9 and, for y = 0, none
    assert sums.nmse == pytest.approx((1 / 4 + 9) / 2)
    assert sums.clipped_nmse == pytest.approx((1 / 4 + 1) / 2)

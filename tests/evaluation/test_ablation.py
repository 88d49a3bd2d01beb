import pytest
import torch
from evaluation_cases import activations, approximate, batches, decomposition, exact, pad
from factories import make_tiny_llama

from mxd.evaluation import ablation_curve, faithfulness, measure_expert_statistics
from mxd.evaluation.ablation import removal_counts, remove_strongest
from mxd.modeling_mxd import ExpertCoefficients, SurgeryError


@pytest.fixture(scope="module")
def mxd():
    model = make_tiny_llama()
    made = approximate(model, (0, 2))
    measure_expert_statistics(model, made, batches(count=3))
    return made


def test_the_strongest_go_first():
    coefficients = ExpertCoefficients(
        torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.0, 0.0, 0.0, 5.0]]), torch.tensor([[9, 4, 7, 2], [1, 2, 3, 4]])
    )
    expected = {
        0: coefficients.values.tolist(),
        1: [[1, 0, 0, 2], [0, 0, 0, 0]],
        2: [[1, 0, 0, 0], [0, 0, 0, 0]],
        4: [[0, 0, 0, 0], [0, 0, 0, 0]],
        9: [[0, 0, 0, 0], [0, 0, 0, 0]],
    }
    for count, values in expected.items():
        kept = remove_strongest(coefficients, count)
        assert kept.values.tolist() == values and torch.equal(kept.indices, coefficients.indices)


def test_counts_double_up_to_all():
    assert [removal_counts(k) for k in (1, 2, 4, 6)] == [[0, 1], [0, 1, 2], [0, 1, 2, 4], [0, 1, 2, 4, 6]]


def test_its_ends_and_shares_are_those_of_faithfulness(tiny_llama, mxd):
    rows = [pad(batch, left=2, right=1, rows=1) for batch in batches()]
    curve, results = ablation_curve(tiny_llama, mxd, rows), faithfulness(tiny_llama, mxd, rows)
    assert curve["removed"] == [0, 1, 2, 4] and curve["order"] == "coefficient"
    assert curve["settings"]["tokens"] == results["settings"]["tokens"] == 42
    loss = results["cross_entropy"]
    assert curve["cross_entropy"][0] == pytest.approx(loss["spliced"])
    assert curve["rise"][0] == pytest.approx(loss["spliced"] - loss["untouched"])
    assert curve["zero_ablated"] == pytest.approx(loss["zero_ablated"])
    for layer in ("0", "2"):
        assert curve["layers"][layer]["nmse"][0] == pytest.approx(results["layers"][layer]["nmse"])
        assert curve["layers"][layer]["nmse"][-1] == pytest.approx(1)  # an MxD without experts and bias is zero


def test_a_point_in_the_middle_token_by_token(tiny_llama, mxd):
    rows = batches()
    curve = ablation_curve(tiny_llama, mxd, rows)
    assert curve["removed"][2] == 2
    x, y = activations(tiny_llama, 2, rows)
    layer, total = mxd.layer(2), 0.0
    for token in range(len(x)):
        values, indices = layer.encode(x[token])
        kept = values.argsort(descending=True)[2:]
        output = layer.decode(ExpertCoefficients(values[kept], indices[kept]), x[token])
        total += ((output - y[token]).square().sum() / y[token].square().sum()).item()
    assert curve["layers"]["2"]["nmse"][2] == pytest.approx(total / len(x), rel=1e-5)


@torch.no_grad()
def test_shares_of_the_cross_entropy_by_brute_force(tiny_llama, mxd):
    # Text that the model itself likes, so that taking its MLPs away does harm.
    starts = torch.randint(2, 64, (12, 2))
    ids = tiny_llama.generate(starts, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=1)
    curve = ablation_curve(tiny_llama, mxd, [{"input_ids": ids}])

    def loss_with(threshold):
        """Every expert of at most this frequency set to its mean, one by one, in dense coefficients."""
        handles = []
        for index in (0, 2):
            layer = mxd.layer(index)
            replaced = layer.expert_frequency <= threshold

            def hook(layer, x, coefficients, replaced=replaced):
                dense = torch.zeros(*x.shape[:-1], 24).scatter(-1, coefficients.indices, coefficients.values)
                dense = torch.where(replaced, layer.expert_mean, dense)
                return ExpertCoefficients(dense, torch.arange(24).expand_as(dense))

            handles.append(layer.register_coefficient_hook(hook))
        with mxd.spliced(tiny_llama):
            loss = tiny_llama(ids, labels=ids).loss.item()
        for handle in handles:
            handle.remove()
        return loss

    spliced, mean, specialised = loss_with(-1), loss_with(1), loss_with(0.25)
    assert len({round(value, 6) for value in (spliced, mean, specialised)}) == 3
    gap = curve["zero_ablated"] - spliced
    found = {name: curve[name] for name in ("mean", "mean_specialised", "expert_share", "specialised_share")}
    assert gap > 0.01
    assert found == pytest.approx(
        {
            "mean": mean,
            "mean_specialised": specialised,
            "expert_share": (mean - spliced) / gap,
            "specialised_share": (specialised - spliced) / gap,
        },
        rel=1e-3,
    )


def test_experts_that_never_change_carry_nothing(tiny_llama):
    copy = exact(tiny_llama)
    curve = ablation_curve(tiny_llama, copy, batches())
    assert curve["mean"] == pytest.approx(curve["cross_entropy"][0], rel=1e-6)
    # Every expert is worth a quarter: removing c of them leaves (1 − c/4) y.
    assert curve["layers"]["1"]["nmse"] == pytest.approx([(count / 4) ** 2 for count in (0, 1, 2, 4)], abs=1e-6)


def test_the_model_is_as_it_was(tiny_llama, mxd):
    before = [layer.mlp for layer in tiny_llama.model.layers]
    ablation_curve(tiny_llama, mxd.train(), batches(count=1))
    assert [layer.mlp for layer in tiny_llama.model.layers] == before and mxd.training
    mxd.eval()


def test_wrong_use(tiny_llama, mxd):
    with pytest.raises(ValueError, match="no tokens"):
        ablation_curve(tiny_llama, mxd, [])
    with pytest.raises(SurgeryError):
        ablation_curve(tiny_llama, decomposition(layers=(7,)), batches())

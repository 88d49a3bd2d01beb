import numpy as np
import pytest
import torch

from modeling_mxd import ExpertCoefficients, ExpertIntervention, MxDLayerConfig, make_layer


@pytest.fixture
def layer():
    layer = make_layer(MxDLayerConfig(6, 5, 8, 12, 4, "silu", "glu"))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def output_of_dense(layer, dense, x):
    return layer.combine(dense @ layer.modulation, x)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"add": {1: 2.0}}, lambda a, b: a + 2.0 * b[1]),
        ({"set": {1: 2.0}}, lambda a, b: a * (1 - b[1]) + 2.0 * b[1]),
        ({"scale": {1: 3.0, 2: 0.5}}, lambda a, b: a * (1 + 2 * b[1] - 0.5 * b[2])),
        ({"ablate": [1, 2, 3]}, lambda a, b: a * (1 - b[1] - b[2] - b[3])),
        ({"ablate": [1], "add": {1: 7.0}}, lambda a, b: a * (1 - b[1]) + 7.0 * b[1]),
        ({"scale": {1: 5.0}, "set": {1: 1.0}, "add": {1: 1.0}}, lambda a, b: a * (1 - b[1]) + 2.0 * b[1]),
        ({"set": {1: 4.0, 2: 5.0}}, lambda a, b: a * (1 - b[1] - b[2]) + 4 * b[1] + 5 * b[2]),
    ],
)
def test_changes_equal_those_of_the_dense_vector(layer, changes, expected):
    x = torch.randn(30, 6)
    before = layer.encode(x).to_dense(12)
    one_hot = torch.eye(12)
    assert 0 < (before[:, 1] > 0).sum() < 30  # active on some of the tokens, not on all
    plain = layer(x)
    with layer.intervene(**changes), layer.record() as recorded:
        y = layer(x)
    dense = expected(before, one_hot)
    torch.testing.assert_close(recorded[0].to_dense(12), dense)
    # Outputs are sums of products in the tens, which processors round differently.
    torch.testing.assert_close(y, output_of_dense(layer, dense, x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer(x), plain)


def test_interventions_add_up_and_can_be_removed(layer):
    x = torch.randn(5, 6)
    plain = layer(x)
    first, second = layer.intervene(add={3: 1.0}), layer.intervene(add={3: 2.0})
    both = layer(x)
    second.remove()
    one = layer(x)
    first.remove()
    torch.testing.assert_close(layer(x), plain)
    torch.testing.assert_close(both - plain, 3 * (one - plain), rtol=1e-4, atol=1e-4)


def test_removed_after_an_exception(layer):
    x = torch.randn(5, 6)
    plain = layer(x)
    with pytest.raises(RuntimeError), layer.intervene(add={0: 9.0}):
        raise RuntimeError
    torch.testing.assert_close(layer(x), plain)


@pytest.mark.parametrize(
    "changes", [{"add": {12: 1.0}}, {"set": {-1: 1.0}}, {"scale": {"a": 1.0}}, {"ablate": [99]}, {"ablate": [True]}]
)
def test_unknown_experts_are_named(layer, changes):
    (name, experts) = next(iter(changes.items()))
    with pytest.raises(
        ValueError, match=f"{name} names expert {next(iter(experts))!r}; this layer has experts 0 to 11"
    ):
        layer.intervene(**changes)
    assert not layer._coefficient_hooks


def test_nothing_asked_is_refused(layer):
    with pytest.raises(ValueError, match="at least one of"):
        layer.intervene()


def test_hook_reads_and_replaces(layer):
    x = torch.randn(2, 3, 6)
    seen = []

    def halve(module, inputs, coefficients):
        seen.append((module, inputs, coefficients))
        return ExpertCoefficients(coefficients.values / 2, coefficients.indices)

    with layer.register_coefficient_hook(halve):
        y = layer(x)
    assert seen[0][0] is layer and seen[0][1] is x and seen[0][2].values.shape == (2, 3, 4)
    torch.testing.assert_close(y, output_of_dense(layer, layer.encode(x).to_dense(12) / 2, x), rtol=1e-5, atol=1e-4)


def test_record_keeps_no_graph(layer):
    with layer.record() as recorded:
        layer(torch.randn(2, 6))
        layer(torch.randn(3, 6))
    assert [len(item.values) for item in recorded] == [2, 3]
    assert not recorded[0].values.requires_grad


def test_gradients_flow_through_an_intervention(layer):
    with layer.intervene(scale={0: 2.0}, add={1: 1.0}):
        layer(torch.randn(9, 6)).sum().backward()
    assert layer.gate.weight.grad.any()


def test_duplicates_add_in_dense():
    coefficients = ExpertCoefficients(torch.tensor([[1.0, 2.0]]), torch.tensor([[3, 3]]))
    assert coefficients.to_dense(5).tolist() == [[0, 0, 0, 3, 0]]


def test_the_arguments_are_left_alone():
    values, indices = torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 1]])
    ExpertIntervention(ablate=[0], set={1: 5.0})(None, values, ExpertCoefficients(values, indices))
    assert values.tolist() == [[1.0, 2.0]] and indices.tolist() == [[0, 1]]


def test_experts_named_by_numpy_and_by_tensors(layer):
    expected = ExpertIntervention(add={3: 1.0}, ablate=[5])
    given = ExpertIntervention(add={np.int64(3): 1.0}, ablate=torch.tensor([5]))
    assert (given.add, given.ablate) == (expected.add, expected.ablate)
    for wrong in (True, 1.0, "3"):
        with pytest.raises(ValueError, match="names expert"):
            ExpertIntervention(add={wrong: 1.0}).check(12)

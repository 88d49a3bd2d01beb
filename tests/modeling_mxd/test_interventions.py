import numpy as np
import pytest
import torch
from mxd_cases import FORMS, gradients, random_layer, relative_error

from mxd.modeling_mxd import ExpertCoefficients, ExpertIntervention

EXPERT, OTHER = 3, 8


def changed_dense(dense, add=None, set=None, scale=None, ablate=()):  # noqa: A002
    """The documented order on dense coefficients: ablate, scale, set, add."""
    dense = dense.clone()
    for expert in ablate:
        dense[..., expert] = 0
    for expert, factor in (scale or {}).items():
        dense[..., expert] *= factor
    for expert, value in (set or {}).items():
        dense[..., expert] = value
    for expert, constant in (add or {}).items():
        dense[..., expert] += constant
    return dense


def decode_dense(layer, dense, x):
    return layer.combine(dense @ layer.expert_table, x)


@pytest.mark.parametrize(
    "changes",
    [
        {"add": {EXPERT: 100.0}},
        {"add": {EXPERT: -2.5, OTHER: 1}},
        {"set": {EXPERT: 0.0, OTHER: -1.0}},
        {"scale": {EXPERT: -0.5, OTHER: 2}},
        {"ablate": range(24)},
        {"ablate": [EXPERT], "scale": {EXPERT: 4.0}},
        {"scale": {EXPERT: 4.0}, "set": {EXPERT: 1.5}},
        {"scale": {EXPERT: 4.0}, "add": {EXPERT: 0.25}},
        {"ablate": [EXPERT, 1], "scale": {EXPERT: 2.0, OTHER: 3.0}, "set": {EXPERT: 5.0, 9: 1.0}, "add": {EXPERT: 1.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
def test_output_is_the_decoding_of_the_changed_coefficients(form, changes):
    layer, x = random_layer(form), torch.randn(2, 20, 16)
    before = layer.encode(x).to_dense(24)
    assert 0 < (before[..., EXPERT] > 0).sum() < 40  # active at some positions, not at others
    expected = changed_dense(before, **changes)
    assert not torch.equal(expected, before)
    with layer.intervene(**changes), layer.record() as recorded:
        y = layer(x)
        assert torch.equal(layer.encode(x).to_dense(24), before)  # what the gate says stays what it is
    torch.testing.assert_close(recorded[0].to_dense(24), expected)
    assert relative_error(y, decode_dense(layer, expected, x)) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_changed_dense_coefficients(form):
    layer, x, output_gradient = random_layer(form), torch.randn(6, 16), torch.randn(6, 12)
    changes = {"ablate": [0, 1], "scale": {EXPERT: 3.0}, "set": {OTHER: 2.0}, "add": {5: 1.0}}
    indices = layer.encode(x).indices

    def dense(x):
        chosen = torch.zeros(6, 24).scatter(-1, indices, 1.0)
        return decode_dense(layer, changed_dense(layer.gate(x).relu() * chosen, **changes), x)

    with layer.intervene(**changes):
        y, grads = gradients(layer, x, output_gradient)
    expected, expected_grads = gradients(layer, x, output_gradient, dense)
    assert relative_error(y, expected) <= 1e-5
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) <= 1e-5, name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"ablate": [3]}, 0), ({"scale": {3: 2}}, 10), ({"set": {3: 7}}, 7), ({"add": {3: 7}}, 12)],
)
def test_changes_reach_every_mention_of_an_expert(changes, expected):
    twice = ExpertCoefficients(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[3, 0, 3]]))
    assert twice.to_dense(5).tolist() == [[2, 0, 0, 5, 0]]
    assert ExpertIntervention(**changes)(None, None, twice).to_dense(5).tolist() == [[2, 0, 0, expected, 0]]
    assert twice.values.tolist() == [[1, 2, 4]] and twice.indices.tolist() == [[3, 0, 3]]


@pytest.mark.parametrize("order", [1, -1])
def test_interventions_apply_in_the_order_of_registration(order):
    layer, x = random_layer(), torch.randn(6, 16)
    first, second = [{"add": {EXPERT: 5}}, {"scale": {EXPERT: 2}}][::order]
    with layer.intervene(**first), layer.intervene(**second), layer.record() as recorded:
        layer(x)
    expected = changed_dense(changed_dense(layer.encode(x).to_dense(24), **first), **second)
    torch.testing.assert_close(recorded[0].to_dense(24), expected)


def test_handles_may_be_removed_in_any_order():
    layer, x = random_layer(), torch.randn(6, 16)
    untouched = layer(x)
    first, second = layer.intervene(add={EXPERT: 5.0}), layer.intervene(add={OTHER: 5.0})
    first.remove()
    expected = decode_dense(layer, changed_dense(layer.encode(x).to_dense(24), add={OTHER: 5.0}), x)
    assert relative_error(layer(x), expected) <= 1e-5
    second.remove()
    assert torch.equal(layer(x), untouched)


@pytest.mark.parametrize("expert", [-1, 24, 99, True, 1.0, "a", "3", None])
@pytest.mark.parametrize("kind", ["add", "set", "scale", "ablate"])
def test_every_kind_refuses_experts_that_do_not_exist(kind, expert):
    layer = random_layer()
    with pytest.raises(ValueError, match=rf"{kind} names expert {expert!r}; this layer has experts 0 to 23"):
        layer.intervene(**{kind: [0, expert] if kind == "ablate" else {0: 1.0, expert: 1.0}})
    assert not layer._coefficient_hooks


def test_record_sees_the_interventions_so_far_and_not_those_that_follow():
    layer, x = random_layer(), torch.randn(2, 3, 16)
    with layer.intervene(add={EXPERT: 5.0}), layer.record() as recorded, layer.intervene(add={OTHER: 9.0}):
        layer(x)
        layer(x[0])
    layer(x)
    expected = changed_dense(layer.encode(x).to_dense(24), add={EXPERT: 5.0})
    assert [item.values.shape for item in recorded] == [(2, 3, 5), (3, 5)]
    torch.testing.assert_close(recorded[0].to_dense(24), expected)
    torch.testing.assert_close(recorded[1].to_dense(24), expected[0])


def test_a_hook_that_returns_nothing_changes_nothing():
    layer, x = random_layer(), torch.randn(6, 16)
    expected = layer(x)
    with layer.register_coefficient_hook(lambda layer, x, coefficients: None):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_interventions_keep_the_dtype(dtype):
    layer = random_layer(dtype=dtype)
    with layer.intervene(add={EXPERT: 1.0}, scale={OTHER: 2.0}), layer.record() as recorded:
        assert layer(torch.randn(4, 16, dtype=dtype)).dtype == recorded[0].values.dtype == dtype


def test_removed_after_an_exception():
    layer, x = random_layer(), torch.randn(5, 16)
    plain = layer(x)
    with pytest.raises(RuntimeError), layer.intervene(add={0: 9.0}):
        raise RuntimeError
    torch.testing.assert_close(layer(x), plain)


def test_nothing_asked_is_refused():
    with pytest.raises(ValueError, match="at least one of"):
        random_layer().intervene()


def test_hook_reads_and_replaces():
    layer, x = random_layer(), torch.randn(2, 3, 16)
    seen = []

    def halve(module, inputs, coefficients):
        seen.append((module, inputs, coefficients))
        return ExpertCoefficients(coefficients.values / 2, coefficients.indices)

    with layer.register_coefficient_hook(halve):
        y = layer(x)
    assert seen[0][0] is layer and seen[0][1] is x and seen[0][2].values.shape == (2, 3, 4)
    torch.testing.assert_close(y, decode_dense(layer, layer.encode(x).to_dense(24) / 2, x), rtol=1e-5, atol=1e-4)


def test_record_keeps_no_graph():
    layer = random_layer()
    with layer.record() as recorded:
        layer(torch.randn(2, 16))
        layer(torch.randn(3, 16))
    assert [len(item.values) for item in recorded] == [2, 3]
    assert not recorded[0].values.requires_grad


def test_experts_named_by_numpy_and_by_tensors():
    expected = ExpertIntervention(add={3: 1.0}, ablate=[5])
    given = ExpertIntervention(add={np.int64(3): 1.0}, ablate=torch.tensor([5]))
    assert (given.add, given.ablate) == (expected.add, expected.ablate)


@pytest.mark.parametrize("expert", [EXPERT, np.int64(EXPERT), torch.tensor(EXPERT)])
def test_one_expert_can_be_ablated_by_its_number(expert):
    layer, x = random_layer("mxd"), torch.randn(5, 16)
    with layer.intervene(ablate=[EXPERT]):
        expected = layer(x)
    with layer.intervene(ablate=expert):
        assert torch.equal(layer(x), expected)
    with pytest.raises(ValueError, match="ablate names expert 99"), layer.intervene(ablate=99):
        pass

import pytest
import torch
from evaluation_cases import approximate, batches, pad

from mxd.base.forward import ZeroMLP
from mxd.evaluation import UntouchedLosses, faithfulness


@pytest.fixture
def rows():
    return [pad(batch, left=2, right=1, rows=1) for batch in batches(count=3)]


def test_faithfulness_is_the_same_with_what_is_known(tiny_llama, rows, monkeypatch):
    first, second, other = (approximate(tiny_llama, layers) for layers in ((1,), (1,), (0,)))
    known = UntouchedLosses(tiny_llama, rows, ablated=first.config)
    assert known.tokens == 54
    expected = {mxd: faithfulness(tiny_llama, mxd, rows) for mxd in (first, second, other)}
    runs = []
    monkeypatch.setattr(ZeroMLP, "forward", lambda self, x: runs.append(1) or torch.zeros_like(x))
    assert faithfulness(tiny_llama, first, rows, untouched=known) == expected[first]
    assert faithfulness(tiny_llama, second, rows, untouched=known) == expected[second]
    assert not runs
    # Of another layer's ablation nothing is known: that pass is run.
    assert faithfulness(tiny_llama, other, rows, untouched=known) == expected[other]
    assert len(runs) == len(rows)


def test_other_batches_are_refused(tiny_llama):
    rows = batches(count=2)
    untouched, mxd = UntouchedLosses(tiny_llama, rows), approximate(tiny_llama)
    with pytest.raises(ValueError, match="batch 0 is not the one"):
        faithfulness(tiny_llama, mxd, rows[::-1], untouched=untouched)
    with pytest.raises(ValueError, match="of 2 batches, got 1"):
        faithfulness(tiny_llama, mxd, rows[:1], untouched=untouched)
    with pytest.raises(ValueError, match="batch 2 is not the one"):
        faithfulness(tiny_llama, mxd, [*rows, rows[0]], untouched=untouched)

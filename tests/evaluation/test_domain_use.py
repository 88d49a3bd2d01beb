import pytest
import torch

from mxd.evaluation import ExpertUse, domain_use


def use(tokens, counts):
    made = ExpertUse(len(counts))
    made.tokens, made.counts = tokens, torch.tensor(counts)
    return made


def test_by_hand_with_domains_of_different_sizes():
    # Expert 0 fires everywhere, 1 in speeches alone, 2 nowhere, 3 once, 4 nine times as often in plays, 5 eight times.
    uses = {"plays": use(100, [100, 0, 0, 1, 90, 80]), "speeches": use(200, [200, 40, 0, 0, 20, 20])}
    found = domain_use(uses)
    plays, speeches = found["domains"]["plays"], found["domains"]["speeches"]
    assert plays["own_experts"] == pytest.approx({"4": 0.9}) and speeches["own_experts"] == {"1": 1.0}
    assert (plays["tokens"], plays["active_experts"], speeches["active_experts"]) == (100, 4, 4)
    assert (found["experts"], found["judged_experts"], found["dead_experts"]) == (6, 4, 1 / 6)
    assert "3" in domain_use(uses, min_firings=1)["domains"]["plays"]["own_experts"]
    assert list(domain_use(uses, share=0.85)["domains"]["plays"]["own_experts"]) == ["4", "5"]  # most frequent first
    assert set(domain_use(uses, min_firings=0)["domains"]["plays"]["own_experts"]) == {"3", "4"}  # never the dead


def test_wrong_use():
    one = use(10, [1, 2])
    with pytest.raises(ValueError, match="at least two domains, got plays"):
        domain_use({"plays": one})
    with pytest.raises(ValueError, match="no tokens of the domain 'law'"):
        domain_use({"plays": one, "law": use(0, [0, 0])})
    with pytest.raises(ValueError, match="share must be"):
        domain_use({"plays": one, "law": one}, share=0.5)

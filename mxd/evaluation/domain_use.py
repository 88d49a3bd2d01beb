"""Find experts that are specific to one domain of text."""

from collections.abc import Mapping
from typing import Any

import torch

from .expert_use import ExpertUse

ONE_DOMAIN_SHARE = 0.9
MIN_FIRINGS = 10


def domain_use(
    uses: Mapping[str, ExpertUse], share: float = ONE_DOMAIN_SHARE, min_firings: int = MIN_FIRINGS
) -> dict[str, Any]:
    """Assign the experts of one layer to domains.

    An expert belongs to domain d if f_d / Σ_d f_d is at least `share`, with f_d the share of the domain's tokens on
    which it is active (so that all domains weigh the same). An expert that fired fewer than `min_firings` times in all
    domains belongs to none. `uses` has {domain: use of the layer's experts on its text}, from `count_expert_use`.

    Returns:
        {"domains": {domain: {"tokens", "active_experts": number that fired there, "expert_entropy", "own_experts":
        {expert: share of its firings there}, most frequent first}}, "experts": N, "dead_experts": share that fired
        nowhere, "judged_experts": number that fired `min_firings` times, "share", "min_firings"}.

    Raises:
        ValueError: there are fewer than two domains, a domain has no tokens, or `share` is at most 1/2.
    """
    if len(uses) < 2:
        raise ValueError(f"experts are compared over at least two domains, got {', '.join(uses) or 'none'}")
    if empty := [domain for domain, use in uses.items() if not use.tokens]:
        raise ValueError(f"no tokens of the domain {empty[0]!r}")
    if not 0.5 < share <= 1:
        raise ValueError(f"share must be over 0.5 and at most 1, got {share}")
    frequencies = torch.stack([use.frequency for use in uses.values()])  # (domains, N)
    firings = torch.stack([use.counts for use in uses.values()]).sum(0)
    judged = firings >= max(1, min_firings)
    shares = torch.where(judged, frequencies / frequencies.sum(0).clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    domains: dict[str, Any] = {}
    for row, (domain, use) in enumerate(uses.items()):
        order = use.frequency.argsort(descending=True, stable=True).tolist()
        domains[domain] = {
            "tokens": use.tokens,
            "active_experts": int((use.counts > 0).sum()),
            "expert_entropy": use.summary()["expert_entropy"],
            "own_experts": {str(n): float(shares[row, n]) for n in order if shares[row, n] >= share},
        }
    return {
        "domains": domains,
        "experts": len(firings),
        "dead_experts": float((firings == 0).double().mean()),
        "judged_experts": int(judged.sum()),
        "share": share,
        "min_firings": min_firings,
    }

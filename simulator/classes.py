"""Requests of several classes: each draws its class on arrival and follows that class's policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.cascade import Mixture
from theory.errors import require
from theory.outcomes import SUM_TOLERANCE, Outcomes

from .cluster import Paths, decide


class ClassRule(NamedTuple):
    """A class of requests: how many there are, who is right on them, what they follow."""

    share: float  # of all requests [-]
    outcomes: Outcomes
    policy: Mixture  # a part of theory.request_classes.Served


def decide_classes(count: int, rules: Sequence[ClassRule], rng: np.random.Generator) -> tuple[Paths, NDArray[np.intp]]:
    """Draw the class and the path of ``count`` requests; return the paths in order of arrival and the classes, (n,).

    Raises
    ------
    InputError
        If the shares do not add up to 1, or the classes have different tiers.

    Examples
    --------
    >>> from theory.cascade import frontier
    >>> from theory.outcomes import from_patterns, with_verifier
    >>> from theory.request_classes import RequestClass, at_price
    >>> table = with_verifier(from_patterns(("small", "large"), {"11": 60, "01": 25, "10": 5, "00": 10}), 1.0, 0.0)
    >>> curve = frontier(table, (1.0, 5.0))
    >>> plan = at_price([RequestClass("free", 0.8, 2.0, curve), RequestClass("paid", 0.2, 20.0, curve)])
    >>> rules = [ClassRule(share, table, part) for share, part in zip((0.8, 0.2), plan.parts)]
    >>> paths, which = decide_classes(20_000, rules, np.random.default_rng(0))
    >>> [round(float(paths.visits[which == k, 1].mean()), 1) for k in (0, 1)]  # who may escalate
    [0.0, 0.3]
    """
    share = np.array([r.share for r in rules])
    total = float(share.sum())
    require(abs(total - 1) <= SUM_TOLERANCE, "share", "must add up to 1 over the classes [-]", total)
    tiers = {r.outcomes.tiers for r in rules}
    require(len(tiers) == 1, "rules", "must have the same tiers in every class", sorted(tiers))
    which = rng.choice(len(rules), size=count, p=share / total).astype(np.intp)
    width = len(rules[0].outcomes.tiers)
    visits, answer, quality = (
        np.zeros((count, width), dtype=np.bool_),
        np.full(count, -1, dtype=np.intp),
        np.zeros(count),
    )
    for k, rule in enumerate(rules):
        at, mix = which == k, rule.policy
        part = decide(int(at.sum()), rule.outcomes, mix.low.policy, rng, mix.high.policy, mix.gamma)
        visits[at], answer[at], quality[at] = part.visits, part.answer, part.quality
    return Paths(visits, answer, quality), which

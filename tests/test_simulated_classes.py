"""Requests that draw a class on arrival agree with the theory of classes, class by class and on average."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.classes import ClassRule, decide_classes
from theory.cascade import frontier
from theory.errors import InputError
from theory.outcomes import Outcomes, from_patterns, with_binormal_signal
from theory.request_classes import RequestClass, Served, at_price, joint_frontier

COSTS = np.array([1.6, 4.2, 8.8])
TIERS = ("13b", "34b", "70b")
EASY = {"111": 70, "011": 12, "001": 6, "110": 2, "000": 10}
HARD = {"111": 20, "011": 25, "001": 20, "101": 3, "000": 32}
COUNT = 40_000


def classes() -> tuple[tuple[Outcomes, Outcomes], tuple[RequestClass, RequestClass]]:
    """A free product with easy requests and a paid one with hard ones."""
    tables = tuple(with_binormal_signal(from_patterns(TIERS, p), 0.8, 4) for p in (EASY, HARD))
    easy, hard = (frontier(t, COSTS) for t in tables)
    return (tables[0], tables[1]), (RequestClass("free", 0.7, 20.0, easy), RequestClass("paid", 0.3, 90.0, hard))


def rules(tables: tuple[Outcomes, Outcomes], kinds: tuple[RequestClass, ...], plan: Served) -> list[ClassRule]:
    return [ClassRule(k.share, t, part) for k, t, part in zip(kinds, tables, plan.parts, strict=True)]


@pytest.mark.parametrize("budget", [None, 4.0])
def test_simulated_classes_agree_with_theory(budget: float | None) -> None:
    tables, kinds = classes()
    plan = at_price(kinds) if budget is None else joint_frontier(kinds).at_budget(budget)
    paths, which = decide_classes(COUNT, rules(tables, kinds, plan), np.random.default_rng(0))
    cost = paths.visits @ COSTS

    def within(values: np.ndarray, expected: float) -> bool:
        return bool(abs(values.mean() - expected) <= 3.3 * values.std() / np.sqrt(len(values)) + 1e-9)

    assert within(cost, plan.cost)
    assert within(paths.quality, plan.quality)
    assert within((which == 1).astype(float), 0.3)
    for k, part in enumerate(plan.parts):
        assert within(cost[which == k], part.cost)
        assert within(paths.quality[which == k], part.quality)
    assert not within(cost[which == 0], plan.parts[1].cost)  # the classes are not the same: the test can fail
    if budget is not None:
        assert plan.cost == pytest.approx(budget)
        assert sum(0 < part.gamma < 1 for part in plan.parts) <= 1


def test_refusals() -> None:
    tables, kinds = classes()
    plan = at_price(kinds)
    found = rules(tables, kinds, plan)
    with pytest.raises(InputError, match=r"`share` must add up to 1 over the classes \[-\]; got 0.3"):
        decide_classes(10, found[1:], np.random.default_rng(0))
    other = found[0]._replace(outcomes=from_patterns(("a", "b"), {"11": 1, "01": 1}))
    with pytest.raises(InputError, match="`rules` must have the same tiers"):
        decide_classes(10, [other, found[1]], np.random.default_rng(0))

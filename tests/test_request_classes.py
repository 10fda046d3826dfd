"""Categories and classes of requests: the common price against enumeration, linear programming and a free tier."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from theory.cascade import Policy, evaluate, frontier, solve
from theory.errors import InfeasibleError, InputError
from theory.outcomes import Outcomes, from_patterns
from theory.request_classes import JointFrontier, RequestClass, at_price, given, joint_frontier

COSTS = (1.0, 4.0)


def law(seed: int, tiers: int = 2, levels: int = 2, rows: int = 8) -> Outcomes:
    rng = np.random.default_rng(seed)
    return Outcomes(
        tuple("abcd"[:tiers]),
        rng.dirichlet(np.ones(rows)),
        rng.uniform(size=(rows, tiers)) ** 0.5,
        rng.dirichlet(np.full(levels, 0.5), size=(rows, tiers)),
    )


def membership(seed: int, rows: int = 8, categories: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(categories, 0.3), size=rows)


def categories(seed: int, worth: float = 1.0, abstain: bool = False) -> tuple[RequestClass, ...]:
    parts = given(law(seed), membership(seed))
    curves = [frontier(o, COSTS, abstain=abstain) for _, o in parts]
    return tuple(RequestClass(str(x), s, worth, c) for x, ((s, _), c) in enumerate(zip(parts, curves, strict=True)))


def every_policy(levels: int = 2) -> list[Policy]:
    """All rules of two tiers: start with either; after the first stop or go on, by level; answer either at the end."""
    found = []
    for first, second, last in product((0, 1), product((2, 1), repeat=levels), product((2, 3), repeat=levels**2)):
        table = np.array([first, *second, *([3] * levels), *last], dtype=np.int8)
        found.append(Policy(("a", "b"), levels, table))
    return found


def test_each_category_against_every_policy() -> None:
    """The best rule that sees the category, found by trying all rules in each category, is that of `at_price`."""
    parts = given(law(3), membership(3))
    values = [[evaluate(p, o, COSTS) for p in every_policy()] for _, o in parts]
    for lam in (0.5, 3.0, 8.0, 20.0, 60.0):
        classes = categories(3, lam)
        plan = at_price(classes)
        brute = sum(s * max(lam * v.quality - v.cost for v in vs) for (s, _), vs in zip(parts, values, strict=True))
        assert plan.worth - plan.cost == pytest.approx(brute, abs=1e-9)


def test_budget_against_linear_programming_over_pairs_of_policies() -> None:
    parts = given(law(3), membership(3))
    values = [{(v.cost, v.quality) for v in (evaluate(p, o, COSTS) for p in every_policy())} for _, o in parts]
    points = np.array(
        [[sum(s * v[i] for (s, _), v in zip(parts, pair, strict=True)) for i in (0, 1)] for pair in product(*values)]
    )
    curve = joint_frontier(categories(3))
    for budget in np.linspace(curve.cost[0], curve.cost[-1], 7):
        best = linprog(-points[:, 1], points[:, :1].T, [budget], np.ones((1, len(points))), [1.0])
        plan = curve.at_budget(float(budget))
        assert plan.quality == pytest.approx(-best.fun, abs=1e-9)
        assert plan.cost == pytest.approx(budget, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_category_is_a_free_tier_that_is_never_right(seed: int) -> None:
    """Routing before the answer and the cascade with a free signal in front are one problem."""
    table, member = law(seed), membership(seed)
    rows = len(table.weight)
    shown = np.concatenate([member[:, None, :], table.signal], axis=1)
    ahead = Outcomes(("x", *table.tiers), table.weight, np.column_stack([np.zeros(rows), table.correct]), shown)
    for lam in (1.0, 6.0, 30.0):
        value = evaluate(solve(ahead, (0.0, *COSTS), lam), ahead, (0.0, *COSTS))
        plan = at_price(categories(seed, lam, abstain=True))  # to return the free tier's answer is to abstain
        assert lam * value.quality - value.cost == pytest.approx(plan.worth - plan.cost, abs=1e-9)


def test_the_category_decides_the_first_tier() -> None:
    table = from_patterns(("small", "large"), {"11": 60, "01": 40})
    easy, hard = given(table, [0, 1])
    policies = [solve(o, (1.0, 5.0), 10.0) for _, o in (easy, hard)]
    assert [p.first.tier for p in policies] == [0, 1]
    assert solve(table, (1.0, 5.0), 10.0).first.tier == 0  # who does not see it sends all requests to the small one


@settings(deadline=None, max_examples=25)
@examples(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_no_split_of_the_budget_beats_the_common_lambda(seed: int, where: float, split: float) -> None:
    classes = categories(seed)
    curve = joint_frontier(classes)
    budget = float(curve.cost[0] + where * (curve.cost[-1] - curve.cost[0]))
    best = curve.at_budget(budget)
    first, second = classes
    low, high = first.frontier.cost[0], first.frontier.cost[-1]
    spent = float(low + split * (high - low))
    rest = (budget - first.share * spent) / second.share
    if rest < second.frontier.cost[0]:
        return
    quality = first.share * first.frontier.at_budget(spent).quality
    quality += second.share * second.frontier.at_budget(min(rest, float(second.frontier.cost[-1]))).quality
    assert quality <= best.quality + 1e-9
    pooled = frontier(law(seed), COSTS)  # a rule that does not see the category is one of those that may
    if pooled.cost[0] <= budget <= pooled.cost[-1]:
        assert pooled.at_budget(budget).quality <= best.quality + 1e-9


def test_an_unequal_split_is_worse() -> None:
    """The comparison can fail: lambdas far apart at the same total cost lose quality."""
    first, second = categories(5)
    low, high = first.frontier.vertices[0], second.frontier.vertices[-1]
    budget = first.share * low.cost + second.share * high.cost
    split = first.share * low.quality + second.share * high.quality
    assert joint_frontier((first, second)).at_budget(budget).quality > split + 1e-3


@settings(deadline=None, max_examples=25)
@examples(st.integers(0, 10**6), st.floats(0.5, 30), st.floats(0.5, 30), st.floats(0.05, 0.95), st.floats(0.5, 30))
def test_own_lambda_is_worth_at_least_any_common_one(
    seed: int, low: float, high: float, share: float, common: float
) -> None:
    curve = frontier(law(seed), COSTS)
    classes = (RequestClass("free", 1 - share, low, curve), RequestClass("paid", share, high, curve))
    plan = at_price(classes)
    one = curve.at_lambda(common)
    mean_worth = ((1 - share) * low + share * high) * one.quality
    assert plan.worth - plan.cost >= mean_worth - one.cost - 1e-9
    for part, k in zip(plan.parts, classes, strict=True):
        assert part.low == curve.at_lambda(k.worth)
    assert plan.cost == pytest.approx((1 - share) * plan.parts[0].cost + share * plan.parts[1].cost)


def test_joint_frontier_is_concave_and_its_vertices_are_those_of_the_prices() -> None:
    curve = frontier(law(1, tiers=3, levels=3), (1.0, 3.0, 9.0))
    classes = (RequestClass("free", 0.7, 5.0, curve), RequestClass("paid", 0.3, 40.0, curve))
    joint = joint_frontier(classes)
    assert np.all(np.diff(joint.price) <= 1e-12)
    assert np.allclose(np.diff(joint.worth) / np.diff(joint.cost), joint.price)
    for i in (0, len(joint.price) // 2):
        plan = at_price(classes, float(joint.price[i]) * (1 - 1e-9))
        assert plan.worth == pytest.approx(joint.worth[i + 1], abs=1e-9)
        assert plan.cost == pytest.approx(joint.cost[i + 1], abs=1e-9)


def test_limits() -> None:
    curve = frontier(law(0), COSTS)
    alone = RequestClass("all", 1.0, 7.0, curve)
    assert at_price([alone]).parts[0].low == curve.at_lambda(7.0)
    single: JointFrontier = joint_frontier([RequestClass("worthless", 1.0, 0.0, curve)])
    assert single.at_budget(float(curve.cost[0])).cost == curve.cost[0]
    assert np.allclose(joint_frontier([alone]).quality, curve.quality)


def test_refusals() -> None:
    curve = frontier(law(0), COSTS)
    with pytest.raises(InputError, match=r"`share` must add up to 1 over the classes \[-\]; got 0.7"):
        at_price([RequestClass("a", 0.7, 1.0, curve)])
    with pytest.raises(InputError, match="`share` must lie in"):
        RequestClass("a", 70, 1.0, curve)
    with pytest.raises(InputError, match="`worth` must be finite"):
        RequestClass("a", 1.0, -1.0, curve)
    with pytest.raises(InputError, match="`price` must be above 0"):
        at_price([RequestClass("a", 1.0, 1.0, curve)], 0.0)
    with pytest.raises(InputError, match="different names"):
        joint_frontier([RequestClass("a", 0.5, 1.0, curve)] * 2)
    with pytest.raises(InfeasibleError, match="`budget` must be at least"):
        joint_frontier([RequestClass("a", 1.0, 1.0, curve)]).at_budget(0.0)
    with pytest.raises(InputError, match="`budget` binds only up to"):
        joint_frontier([RequestClass("a", 1.0, 1.0, curve)]).at_budget(99.0)
    with pytest.raises(InputError, match=r"`category` must each have a share.*without gaps"):
        given(law(0), np.array([0, 0, 0, 0, 2, 2, 2, 2]))
    with pytest.raises(InputError, match="`category` must hold 8 integers"):
        given(law(0), [0.5, 1.0])
    with pytest.raises(InputError, match="add up to 1 over the categories"):
        given(law(0), np.full((8, 2), 0.4))

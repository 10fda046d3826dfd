"""Load prices: closed forms, every mixture of every rule, optimality conditions, and a loop that does not converge."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from theory.cascade import evaluate, solve
from theory.errors import InfeasibleError, InputError
from theory.load_prices import Array, Curve, Demand, LoadPlan, SharedProcessor, Station, plan_under_load
from theory.outcomes import Outcomes, from_patterns, with_binormal_signal, with_verifier, without_signal

# Abel-13B, ToRA-Code-34B, ToRA-70B on the 1319 problems of the GSM8K test set; counted from the authors' own outputs
GSM8K = {"111": 771, "110": 29, "101": 49, "100": 27, "011": 229, "010": 33, "001": 63, "000": 118}
TIERS = ("13b", "34b", "70b")
COSTS = np.array([1.6, 4.2, 8.8])  # 0.125 per billion parameters [cost unit]

seeds = st.integers(0, 2**32 - 1)


def two_tiers(sensitivity: float = 0.9, false_accept: float = 0.2) -> Outcomes:
    table = from_patterns(("small", "large"), {"11": 60, "01": 25, "10": 5, "00": 10})
    return with_verifier(table, sensitivity, false_accept)


def gsm8k(levels: int = 6) -> Outcomes:
    return with_binormal_signal(from_patterns(TIERS, GSM8K), (0.81, 0.84, 0.86), levels)


def random_demand(seed: int) -> tuple[Demand, tuple[Station, ...]]:
    """Two or three tiers, two levels, stations that all requests may or may not overload."""
    rng = np.random.default_rng(seed)
    K = 2 + seed % 2
    table = Outcomes(
        tuple("abc"[:K]), rng.dirichlet(np.ones(5)), np.round(rng.random((5, K))), rng.dirichlet([1, 1], (5, K))
    )
    stations = tuple(SharedProcessor(s, int(rng.integers(1, 4))) for s in rng.uniform(0.3, 2.0, K))
    together = sum(s.capacity for s in stations)
    rate = float(rng.uniform(0.1, 0.9)) * together  # routing alone can serve it
    demand = Demand(table, rng.uniform(0.1, 3.0, K), rate, float(rng.uniform(1, 40)), float(rng.uniform(0.0, 1.0)))
    return demand, stations


def every_rule(demand: Demand) -> Array:
    """Return (cost, quality, visits) of every deterministic rule, (rules, 2 + K), by enumeration."""
    outcomes, costs = demand.outcomes, demand.spent
    K, L = len(outcomes.tiers), outcomes.levels

    def from_here(run: tuple[int, ...], mass: Array) -> Array:
        rules = [np.concatenate([[0.0, mass @ outcomes.correct[:, k]], np.zeros(K)]) for k in run]
        for j in range(run[-1] + 1 if run else 0, K):
            after = [from_here((*run, j), mass * outcomes.signal[:, j, level]) for level in range(L)]
            visit = np.concatenate([[costs[j], 0.0], np.eye(K)[j]]) * mass.sum()
            rules += [np.sum(combination, axis=0) + visit for combination in itertools.product(*after)]
        return np.unique(np.round(rules, 13), axis=0)

    return from_here((), outcomes.weight)


def worth(demand: Demand, stations: tuple[Station, ...], of: Array) -> float:
    """U of a mean (cost, quality, visits), as written in the module."""
    waiting = sum(s.number(demand.rate * v) for s, v in zip(stations, of[2:], strict=True))
    return float(demand.lam * of[1] - of[0] - demand.time_value * waiting / demand.rate)


# ---------------------------------------------------------------- closed forms and limits


@pytest.mark.parametrize("rate", [0.2, 1.0, 2.0, 2.7])
def test_two_tiers_without_a_signal_share_the_load_as_the_first_order_condition_says(rate: float) -> None:
    """lambda (q2 - q1) - (c2 - c1) = tau (s2 / (1 - rho2)^2 - s1 / (1 - rho1)^2) at the share x of the second."""
    table, c, s, lam, tau = without_signal(two_tiers()), (1.0, 2.5), (0.5, 1.0), 10.0, 0.3
    stations = (SharedProcessor(s[0]), SharedProcessor(s[1]))
    plan = plan_under_load(Demand(table, c, rate, lam, tau), stations, tolerance=1e-8)

    def gain(x: float) -> float:
        rho = rate * (1 - x) * s[0], rate * x * s[1]
        price = [tau * s[i] / (1 - rho[i]) ** 2 for i in range(2)]
        return lam * (0.85 - 0.65) - (c[1] - c[0]) - (price[1] - price[0])

    low, high = max(0.0, 1 - 0.999 / (rate * s[0])), min(1.0, 0.999 / (rate * s[1]))
    expected = low if gain(low) < 0 else high if gain(high) > 0 else brentq(gain, low, high, xtol=1e-14)
    assert (expected == 1) == (rate == 0.2)  # at little load the better tier takes all
    assert plan.value.visits == pytest.approx([1 - expected, expected], abs=1e-4)
    assert plan.converged


def test_without_load_it_is_the_plain_programme_with_time_paid_for() -> None:
    table, stations = gsm8k(), tuple(SharedProcessor(s) for s in (1.0, 2.0, 4.0))
    for lam in (10.0, 30.0, 100.0):
        plan = plan_under_load(Demand(table, COSTS, 1e-7, lam, 0.5), stations)
        plain = evaluate(solve(table, COSTS + 0.5 * np.array([1.0, 2.0, 4.0]), lam), table, COSTS)
        assert plan.value.visits == pytest.approx(plain.visits, abs=1e-9)
        assert plan.value.quality == pytest.approx(plain.quality, abs=1e-9)
        assert plan.congestion == pytest.approx([0, 0, 0], abs=1e-4)


def test_time_that_is_worth_nothing_leaves_the_capacities_alone() -> None:
    """The large tier bears 0.1 visits per request; the multiplier of its capacity makes 10 % go there exactly."""
    stations = (SharedProcessor(1e-3), SharedProcessor(0.999, load=0.1 * 0.999))
    plan = plan_under_load(Demand(two_tiers(), (1.0, 5.0), 1.0, 20.0, 0.0), stations)
    assert plan.rates == pytest.approx([1.0, 0.1], abs=1e-6)
    assert plan.capacity[0] == 0.0
    assert plan.capacity[1] > 0.0
    assert plan.own.tolist() == plan.congestion.tolist() == [0.0, 0.0]
    assert len(plan.policies) == 2  # a tie: both rules are worth the same at the price


# ---------------------------------------------------------------- every mixture of every rule


@settings(deadline=None, max_examples=25)
@given(seeds)
def test_no_mixture_is_worth_more(seed: int) -> None:
    """All pairs of rules in steps of a 200th, and random mixtures of all: none beats the plan, one comes near."""
    demand, stations = random_demand(2 * (seed // 2))  # two tiers: few enough rules
    plan = plan_under_load(demand, stations, tolerance=1e-8)
    rules, room = every_rule(demand), np.array([s.capacity for s in stations]) / demand.rate
    share = np.linspace(0, 1, 201)[:, None, None, None]
    pairs = ((1 - share) * rules[:, None] + share * rules).reshape(-1, 4)
    among_all = np.random.default_rng(seed).dirichlet(np.full(len(rules), 0.05), 2000) @ rules
    mixtures = np.concatenate([pairs, among_all])
    mixtures = mixtures[np.all(mixtures[:, 2:] <= room, axis=1)]
    waiting = sum(s.number(demand.rate * v) for s, v in zip(stations, mixtures[:, 2:].T, strict=True))
    best = (demand.lam * mixtures[:, 1] - mixtures[:, 0] - demand.time_value * waiting / demand.rate).max()
    assert plan.converged
    assert best <= plan.objective + plan.gap + 1e-7 * demand.lam
    if len(plan.policies) <= 2 and np.all(plan.rates < 0.9 * room * demand.rate):
        assert best >= plan.objective - 0.01 * demand.lam


@settings(deadline=None, max_examples=15)
@given(seeds)
def test_optimality_conditions(seed: int) -> None:
    """Prices are tau N' + kappa; kappa only at a full tier; no rule is worth more at them than those mixed."""
    demand, stations = random_demand(seed)
    plan = plan_under_load(demand, stations, tolerance=1e-8)
    assert plan.converged
    rising = [s.marginal(r) for s, r in zip(stations, plan.rates, strict=True)]
    assert plan.own + plan.congestion == pytest.approx(demand.time_value * np.array(rising), rel=1e-6)
    full = plan.rates >= np.array([s.capacity for s in stations]) * (1 - 1e-5)
    assert np.all(full | (plan.capacity < 1e-6 * demand.lam))
    rules = every_rule(demand)
    at_prices = demand.lam * rules[:, 1] - rules[:, 0] - rules[:, 2:] @ plan.prices
    short = 0.0  # of the best rule, by those that are mixed: a rule hardly followed may be off by more
    for policy, share in zip(plan.policies, plan.shares, strict=True):
        value = evaluate(policy, demand.outcomes, demand.costs)
        own = demand.lam * value.quality - value.cost - value.visits @ plan.prices
        short += float(share) * (at_prices.max() - own)
    assert -1e-9 * demand.lam <= short <= 1e-3 * demand.lam
    assert plan.objective == pytest.approx(
        worth(demand, stations, np.array([plan.value.cost, plan.value.quality, *plan.value.visits])), abs=1e-9
    )


@settings(deadline=None, max_examples=10)
@given(seeds)
def test_more_load_is_never_worth_more(seed: int) -> None:
    demand, stations = random_demand(seed)
    rates = demand.rate * np.array([0.2, 0.5, 0.8, 1.0])
    plans = [
        plan_under_load(Demand(demand.outcomes, demand.costs, r, demand.lam, demand.time_value), stations)
        for r in rates
    ]
    for less, more in itertools.pairwise(plans):
        assert more.objective <= less.objective + less.gap + 1e-9


# ---------------------------------------------------------------- loops that are not this one


def undamped(demand: Demand, stations: tuple[Station, ...], steps: int) -> list[Array]:
    """Policy -> loads -> prices -> policy, the visits of each step."""
    visits = [np.zeros(len(stations))]
    for _ in range(steps):
        rate = np.minimum(demand.rate * visits[-1], [s.capacity for s in stations])
        price = [demand.time_value * s.marginal(r) for s, r in zip(stations, rate, strict=True)]
        visits.append(evaluate(demand.best(price), demand.outcomes, demand.costs).visits)
    return visits


def test_the_undamped_loop_cycles_where_this_one_converges() -> None:
    demand = Demand(two_tiers(), (1.0, 5.0), 0.5, 20.0, 0.5)
    stations = (SharedProcessor(1.0), SharedProcessor(4.0, 1))
    tail = undamped(demand, stations, 40)[-4:]
    assert not np.allclose(tail[-1], tail[-2])  # it jumps
    assert np.allclose(tail[-1], tail[-3])  # and comes back
    plan = plan_under_load(demand, stations)
    assert plan.converged
    assert plan.gap < 1e-3
    values = [evaluate(p, demand.outcomes, demand.costs).visits for p in plan.policies]
    assert plan.shares @ values == pytest.approx(plan.value.visits, abs=1e-12)
    assert len(values) == len(np.unique(np.round(values, 9), axis=0)) == 2
    for visits in (tail[-1], tail[-2]):
        assert np.abs(plan.value.visits - visits).max() > 0.02


def test_users_who_pay_their_own_time_alone_are_worse_off_together() -> None:
    """Wardrop: x where the own times balance, lambda dq - dc = tau (W2 - W1). U there is below that of the plan."""
    table, c, s, lam, tau, rate = without_signal(two_tiers()), (1.0, 2.5), (0.5, 1.0), 20.0, 1.0, 1.5
    demand, stations = Demand(table, c, rate, lam, tau), (SharedProcessor(s[0]), SharedProcessor(s[1]))
    plan = plan_under_load(demand, stations, tolerance=1e-8)

    def gain(x: float) -> float:
        time = [s[0] / (1 - rate * (1 - x) * s[0]), s[1] / (1 - rate * x * s[1])]
        return lam * 0.2 - (c[1] - c[0]) - tau * (time[1] - time[0])

    x = brentq(gain, 0.01, 0.66)
    selfish = worth(demand, stations, np.array([1 + 1.5 * x, 0.65 + 0.2 * x, 1 - x, x]))
    assert selfish < plan.objective - 0.01
    assert x > plan.value.visits[1] + 0.01  # too many visits of the slow tier


def test_giving_up_early_is_said() -> None:
    """Two steps are not enough: the plan says so, and its bound still holds."""
    import theory.load_prices as module

    demand, stations = Demand(gsm8k(), COSTS, 19.0, 60.0, 0.5), tuple(SharedProcessor(s, 20) for s in (1.0, 2.0, 4.0))
    full = plan_under_load(demand, stations)
    loop = module._Loop(demand, stations)
    loop.make_room()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ITERATIONS", 2)
        early = loop.run(1e-6)
    assert full.converged
    assert not early.converged
    assert early.gap > 1e-3
    assert early.objective <= full.objective + full.gap
    assert early.bound >= full.objective


# ---------------------------------------------------------------- stations


def test_a_table_of_times_is_the_station_it_was_taken_from() -> None:
    exact = SharedProcessor(0.7, replicas=3, load=0.9)
    rate = np.linspace(0.002, 0.95 / 0.7, 400)
    curve = Curve(rate, 0.7 / (1 - 0.7 * rate), exact.capacity, replicas=3)
    for r in np.linspace(0.05, 0.9, 7) * 3 / 0.7:
        assert curve.number(r) == pytest.approx(exact.number(r), rel=2e-3)
        assert curve.marginal(r) == pytest.approx(exact.marginal(r), rel=5e-3)
    demand = Demand(two_tiers(), (1.0, 5.0), 2.0, 20.0, 0.5)
    plans = [plan_under_load(demand, (station, SharedProcessor(2.0, 3))) for station in (exact, curve)]
    assert plans[0].value.visits == pytest.approx(plans[1].value.visits, abs=0.01)
    assert plans[0].objective == pytest.approx(plans[1].objective, rel=1e-3)


@pytest.mark.parametrize(
    "station", [SharedProcessor(2.0, 2), Curve(np.linspace(0.1, 2, 9), np.linspace(1, 3, 9), 3, 2)]
)
def test_slopes_are_slopes(station: Station) -> None:
    for r in np.linspace(0.05, 0.9, 9):
        rise = (station.number(r + 1e-6) - station.number(r - 1e-6)) / 2e-6
        assert station.marginal(r) == pytest.approx(rise, rel=1e-5)


# ---------------------------------------------------------------- refusals


def test_an_overload_names_the_nearest_load_and_that_load_fits() -> None:
    stations = (SharedProcessor(1.0), SharedProcessor(4.0))
    with pytest.raises(
        InfeasibleError, match=r"no stop rule serves 2 requests/s.*small 0\.999, large 0\.2497"
    ) as error:
        plan_under_load(Demand(two_tiers(), (1.0, 5.0), 2.0, 20.0, 0.5), stations)
    nearest = float(str(error.value).split("rate = ")[1].split(";")[0])
    assert nearest == pytest.approx(0.999 * 1.25, rel=1e-3)  # both tiers full, nobody runs both

    def at(rate: float) -> LoadPlan:
        return plan_under_load(Demand(two_tiers(), (1.0, 5.0), rate, 20.0, 0.5), stations)

    assert at(0.999 * nearest).converged
    with pytest.raises(InfeasibleError):
        at(1.001 * nearest)


RATES = np.linspace(0.1, 1.0, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SharedProcessor(0.0), r"`service_s` must be finite and above 0 \[s\]; got 0\.0"),
        (lambda: SharedProcessor(1.0, load=90), r"`load` must lie inside \(0, 1\).*got 90\. It is a share: pass 0\.9"),
        (lambda: Curve(RATES, RATES[::-1], 1.0), r"`time_s` must make N = r W convex"),
        (lambda: Curve(RATES[::-1], RATES, 1.0), r"`rate` must be at least three rates that increase"),
        (lambda: Curve(RATES, -RATES, 1.0), r"`time_s` must be 5 finite times above 0"),
        (lambda: Curve(RATES, RATES, 1.5), r"`capacity` must be above 0 and at most 1, the last rate .*got 1\.5"),
        (lambda: Demand(two_tiers(), (1, 5), 0.0, 20.0, 0.5), r"`rate` must be finite and above 0 \[request/s\]"),
        (lambda: Demand(two_tiers(), (1, 5), 1.0, math.inf, 0.5), r"`lam` must be finite and at least 0"),
        (lambda: Demand(two_tiers(), (1, 5), 1.0, 20.0, -1.0), r"`time_value` must be finite and at least 0"),
        (
            lambda: plan_under_load(Demand(two_tiers(), (1, 5), 1.0, 20.0, 0.5), (SharedProcessor(1.0),)),
            r"`stations` must be one for each of the 2 tiers; got 1",
        ),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()

r"""Costs that depend on load, loads that depend on the policy: the prices at which the two agree, and the policy then.

Tiers are stations: with r visits a second there are N(r) requests in one, each for W(r) = N(r) / r seconds (Little's
law), and no more than its capacity may come. With Lambda requests a second, of which :math:`v_i` visit tier i, and time
worth :math:`\tau`, the policy is to maximise

.. math:: U(x) = \lambda q(x) - \sum_i c_i v_i(x) - \frac{\tau}{\Lambda} \sum_i N_i(\Lambda v_i(x))
          \quad \text{with } \Lambda v_i \le m_i

over the mixtures x of stop rules. One more visit costs everybody

.. math:: \nu_i = \tau \frac{dN_i}{dr} + \kappa_i = \tau W_i + \tau r_i W_i'(r_i) + \kappa_i

its own time, the time that it costs the others, and the multiplier of the capacity. A policy is best for the load
that it makes iff it is best for fixed costs :math:`c + \nu`: this fixed point is the *social optimum*. (Users who pay
their own time alone settle at another one, a Wardrop equilibrium, with too many visits.)

Why the loop converges. Iterating policy -> loads -> prices -> policy does not: at a tie the best deterministic rule
jumps and the load jumps with it. N is convex, q and v are linear in the mixture, so U is concave and its optimum a
linear programme but for N: rules are added one by one, each the solution of the dynamic programme at the prices of the
last mixture (column generation; with the stop rules as extreme points, Frank-Wolfe with all weights corrected), N is
cut from below by tangents. Rules and tangents are finitely many up to the tolerance, and any prices bound the optimum
from above,

.. math:: U^* \le \max_\pi\, (\lambda q_\pi - (c + \nu)\, v_\pi)
          + \frac{1}{\Lambda} \sum_i \max_{r \le m_i} (\nu_i r - \tau N_i(r))

so that the distance from the best bound found is a certificate, not a guess.

Source: Beckmann, McGuire & Winsten (1956) for congestion prices; Dantzig & Wolfe (1960), Operations Research 8:101-111,
for the columns; Frank & Wolfe (1956) for the gap; Kelley (1960) for the tangents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cascade import Policy, PolicyValue, evaluate, solve
from .errors import InfeasibleError, require
from .outcomes import Outcomes

Array = NDArray[np.float64]

TANGENTS = 24  # of each station's N(r) before the first step; more are added where the mixture lies
ITERATIONS = 100  # steps after which the loop is given up; about ten are usual
WEIGHT = 1e-9  # share of a rule in a mixture below which it is dropped: what the linear programme rounds to [-]
NEAR = 1e-9  # share of requests by which two tangents must differ [-]
EXACT = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}  # of the linear programmes
SLACK = 1e-7  # share of a capacity that rounding may exceed [-]


class Station(Protocol):
    """What serves the visits of one tier."""

    @property
    def capacity(self) -> float:
        """Most visits that may come [1/s]."""

    def number(self, rate: float) -> float:
        """N(r), mean number of requests in it at r visits a second, convex [-]."""

    def marginal(self, rate: float) -> float:
        """dN/dr = W + r W' [s]."""


@dataclass(frozen=True, slots=True)
class SharedProcessor:
    r"""Replicas that share themselves equally among the requests in them, each fed by chance (M/G/1-PS).

    .. math:: N = m \frac{\rho}{1 - \rho}, \qquad \frac{dN}{dr} = \frac{s}{(1 - \rho)^2}, \qquad \rho = \frac{r s}{m}

    The same N as M/M/1; insensitive to the law of the service time.

    Raises
    ------
    InputError
        If the service time, the replicas or the load are not above 0, or the load is not below 1.

    Source
    ------
    Kleinrock (1976), Queueing Systems II, section 4.4.

    Examples
    --------
    >>> station = SharedProcessor(service_s=2.0)
    >>> station.number(0.25), station.marginal(0.25)
    (1.0, 8.0)
    """

    service_s: float  # s, time of a visit that is alone [s]
    replicas: int = 1  # m [-]
    load: float = 0.999  # rho that may not be exceeded [-]

    def __post_init__(self) -> None:
        ok = self.service_s > 0 and math.isfinite(self.service_s)
        require(ok, "service_s", "must be finite and above 0 [s]", self.service_s)
        require(self.replicas >= 1, "replicas", "must be at least 1 [-]", self.replicas)
        require(0 < self.load < 1, "load", "must lie inside (0, 1) [-]", self.load, "It is a share: pass 0.9, not 90.")

    @property
    def capacity(self) -> float:
        """Most visits that may come [1/s]."""
        return self.load * self.replicas / self.service_s

    def number(self, rate: float) -> float:
        """N(r) [-]."""
        rho = rate * self.service_s / self.replicas
        return self.replicas * rho / (1.0 - rho)

    def marginal(self, rate: float) -> float:
        """dN/dr [s]."""
        return self.service_s / (1.0 - rate * self.service_s / self.replicas) ** 2


@dataclass(frozen=True, eq=False)
class Curve:
    r"""A station known by its mean time of a visit at some rates, such as those of :mod:`theory.queueing`.

    N = r W is taken between the rates as a polynomial of degree two, its slope as linear; m replicas each get r / m.

    Raises
    ------
    InputError
        If there are fewer than three rates, they do not increase from above 0, a time is not above 0, or N is not
        convex (there would be no certificate): a draft schedule that jumps to slower rounds can do that.

    Examples
    --------
    M/M/1 with a service time of one second, tabulated:

    >>> rate = np.linspace(0.01, 0.95, 200)
    >>> curve = Curve(rate, 1 / (1 - rate), capacity=0.9)
    >>> round(curve.number(0.5), 3), round(curve.marginal(0.5), 2)
    (1.0, 4.0)
    """

    rate: Array  # (n,) of one replica [1/s]
    time_s: Array  # (n,) W, mean time of a visit [s]
    capacity: float  # most visits that may come, all replicas [1/s]
    replicas: int = 1  # m [-]
    _slope: Array = field(init=False)
    _number: Array = field(init=False)

    def __post_init__(self) -> None:
        rate, time = (np.array(x, dtype=np.float64) for x in (self.rate, self.time_s))
        grows = rate.ndim == 1 and rate.size >= 3 and rate[0] > 0 and bool(np.all(np.diff(rate) > 0))
        require(grows, "rate", "must be at least three rates that increase from above 0 [1/s]", rate)
        timed = time.shape == rate.shape and bool(np.all(np.isfinite(time) & (time > 0)))
        require(timed, "time_s", f"must be {rate.size} finite times above 0 [s]", time)
        reach = self.replicas * rate[-1]
        inside = self.replicas >= 1 and 0 < self.capacity <= reach * (1 + 1e-12)
        require(inside, "capacity", f"must be above 0 and at most {reach:.6g}, the last rate [1/s]", self.capacity)
        slope = np.gradient(rate * time, rate, edge_order=2)
        dip = float(np.diff(slope).min())
        rule = "must make N = r W convex in the rate [s]"
        require(dip >= -1e-9 * slope[-1], "time_s", rule, dip, "Use fewer rates, or a schedule without jumps.")
        rate, slope = np.concatenate([[0.0], rate]), np.concatenate([[min(time[0], slope[0])], slope])
        steps = (slope[1:] + slope[:-1]) / 2 * np.diff(rate)
        for name, value in (
            ("rate", rate),
            ("time_s", time),
            ("_slope", slope),
            ("_number", np.concatenate([[0.0], np.cumsum(steps)])),
        ):
            object.__setattr__(self, name, value)

    def number(self, rate: float) -> float:
        """N(r) [-]."""
        r = rate / self.replicas
        i = int(np.clip(np.searchsorted(self.rate, r, side="right") - 1, 0, len(self.rate) - 2))
        step = r - self.rate[i]
        bend = (self._slope[i + 1] - self._slope[i]) / (self.rate[i + 1] - self.rate[i])
        return float(self.replicas * (self._number[i] + step * (self._slope[i] + bend * step / 2)))

    def marginal(self, rate: float) -> float:
        """dN/dr [s]."""
        return float(np.interp(rate / self.replicas, self.rate, self._slope))


@dataclass(frozen=True, eq=False)
class LoadPlan:
    """The best mixture of stop rules at a load, and what a visit costs there; arrays of one entry per tier."""

    policies: tuple[Policy, ...]
    shares: Array  # how often each is followed, adds up to 1 [-]
    value: PolicyValue  # of the mixture, at the costs without prices
    rates: Array  # visits [1/s]
    time_s: Array  # W, mean time of a visit; at no load that of the first one [s]
    own: Array  # tau W, price of the own time [cost unit per visit]
    congestion: Array  # tau r W', price of the others' time [cost unit per visit]
    capacity: Array  # kappa, multiplier of the capacity [cost unit per visit]
    objective: float  # U [cost unit per request]
    bound: float  # least upper bound of U found [cost unit per request]
    converged: bool  # whether the gap is within the tolerance
    iterations: int  # dynamic programmes solved [-]

    @property
    def prices(self) -> Array:
        """nu, what a visit costs beside c [cost unit per visit]."""
        return self.own + self.congestion + self.capacity

    @property
    def gap(self) -> float:
        """Most that any other mixture can be worth more [cost unit per request]."""
        return max(0.0, self.bound - self.objective)

    @property
    def request_s(self) -> float:
        """Mean time that a request spends in all tiers together [s]."""
        return float(self.value.visits @ self.time_s)


@dataclass(frozen=True, eq=False)
class Demand:
    """Requests, what their answers are worth, and what stop rules may do with them."""

    outcomes: Outcomes
    costs: ArrayLike  # (K,) or (R, K) of a visit beside time and capacity [cost unit]
    rate: float  # Lambda [request/s]
    lam: float  # price of one more correct answer [cost unit]
    time_value: float  # tau [cost unit per s of one request]
    recall: bool = True
    abstain: bool = False
    wrong: float = 0.0  # theta, correct answers that a wrong one takes away [-]

    def __post_init__(self) -> None:
        for name, unit, above in (
            ("rate", "request/s", True),
            ("lam", "cost unit per correct answer", False),
            ("time_value", "cost unit per s", False),
        ):
            value = getattr(self, name)
            ok = math.isfinite(value) and (value > 0 if above else value >= 0)
            require(ok, name, f"must be finite and {'above' if above else 'at least'} 0 [{unit}]", value)

    @property
    def spent(self) -> Array:
        """The costs as an array [cost unit]."""
        return np.asarray(self.costs, dtype=np.float64)

    def best(self, prices: ArrayLike, lam: float | None = None) -> Policy:
        """Return the best stop rule where a visit costs ``prices`` more, (K,)."""
        worth = self.lam if lam is None else lam
        spent = (self.spent if lam is None else 0.0 * self.spent) + np.maximum(prices, 0.0)
        return solve(self.outcomes, spent, worth, recall=self.recall, abstain=self.abstain, wrong=self.wrong)


def plan_under_load(demand: Demand, stations: Sequence[Station], *, tolerance: float = 1e-6) -> LoadPlan:
    r"""Return the mixture of stop rules that is best at the prices of the loads that it makes.

    Parameters
    ----------
    demand : Demand
    stations : one for each tier
    tolerance : float
        Gap at which the loop ends, as a share of :math:`\lambda + \sum_i \bar c_i`; linear programmes are solved to
        about 1e-10, so 1e-8 is as fine as it gets [-].

    Returns
    -------
    LoadPlan
        ``converged`` is False where the gap is still larger after ``ITERATIONS`` steps.

    Raises
    ------
    InputError
        If there is not one station per tier, or the demand is refused.
    InfeasibleError
        If no mixture keeps all capacities; the message gives the greatest rate that one does.

    Source
    ------
    Module docstring.

    Examples
    --------
    >>> from theory.outcomes import from_patterns, with_verifier
    >>> table = with_verifier(from_patterns(("small", "large"), {"11": 60, "01": 25, "10": 5, "00": 10}), 0.9, 0.2)
    >>> stations = (SharedProcessor(1.0, replicas=4), SharedProcessor(4.0, replicas=4))
    >>> for rate in (0.1, 1.0, 3.0):
    ...     plan = plan_under_load(Demand(table, (1.0, 5.0), rate, lam=20.0, time_value=0.5), stations)
    ...     print(plan.value.visits.round(2).tolist(), plan.prices.round(1).tolist(), plan.converged)
    [1.0, 0.34] [0.5, 2.1] True
    [1.0, 0.34] [0.9, 4.7] True
    [0.96, 0.15] [6.3, 6.3] True
    """

    tiers = len(demand.outcomes.tiers)
    require(len(stations) == tiers, "stations", f"must be one for each of the {tiers} tiers", len(stations))
    require(tolerance > 0, "tolerance", "must be above 0 [-]", tolerance)
    loop = _Loop(demand, tuple(stations))
    loop.make_room()
    mean = demand.spent if demand.spent.ndim == 1 else demand.outcomes.weight @ demand.spent
    return loop.run(tolerance * (demand.lam + float(mean.sum())))


class _Step(NamedTuple):
    """A solution of the linear programme."""

    weights: Array  # of the rules known [-]
    mixed: PolicyValue
    objective: float  # U of the mixture [cost unit per request]
    prices: Array  # of the linear programme [cost unit per visit]
    kappa: Array  # their part from the capacities [cost unit per visit]
    missed: float  # by how much the tangents promise more than U [cost unit per request]


class _Loop:
    """The rules and tangents found so far."""

    def __init__(self, demand: Demand, stations: tuple[Station, ...]) -> None:
        self.demand, self.stations = demand, stations
        self.room = np.array([s.capacity for s in stations]) / demand.rate  # visits per request that fit
        self.policies: list[Policy] = []
        self.values: list[PolicyValue] = []
        self.cuts: list[list[float]] = [list(np.linspace(0, min(m, 1.0), TANGENTS)) for m in self.room]

    # ------------------------------------------------------------ congestion, per request

    def congestion(self, i: int, visits: float) -> float:
        """F = tau N / Lambda at a share of requests that visits tier i [cost unit per request]."""
        d = self.demand
        return d.time_value * self.stations[i].number(d.rate * visits) / d.rate

    def slope(self, i: int, visits: float) -> float:
        """F' = tau dN/dr [cost unit per visit]."""
        return self.demand.time_value * self.stations[i].marginal(self.demand.rate * visits)

    def conjugate(self, i: int, price: float) -> float:
        """Return the largest price x visits - F(visits) within the capacity; nobody visits a tier twice."""
        low, high = 0.0, min(1.0, float(self.room[i]))
        if self.slope(i, high) > price:
            for _ in range(50):
                middle = (low + high) / 2
                low, high = (middle, high) if self.slope(i, middle) < price else (low, middle)
        return price * high - self.congestion(i, high)

    # ------------------------------------------------------------ steps

    def add(self, prices: ArrayLike, lam: float | None = None) -> PolicyValue:
        """Solve for the best rule at these prices, keep it, and return its value."""
        policy = self.demand.best(prices, lam)
        value = evaluate(policy, self.demand.outcomes, self.demand.costs)
        self.policies.append(policy)
        self.values.append(value)
        return value

    def worth(self, value: PolicyValue) -> float:
        """Lambda q - c of a rule, congestion left out [cost unit per request]."""
        return self.demand.lam * (value.quality - self.demand.wrong * value.wrong) - value.cost

    def make_room(self) -> None:
        """Find rules whose mixture keeps the capacities, by making the fullest tier as empty as can be."""
        self.add(np.zeros(len(self.stations)))
        for _ in range(ITERATIONS):
            fullest, price = _fullest(np.array([v.visits for v in self.values]), self.room)
            if fullest <= 1.0 + SLACK:
                return
            if price @ self.add(price, lam=0.0).visits >= fullest - SLACK:  # no rule makes it emptier
                raise InfeasibleError(self._too_much(fullest))

    def run(self, tolerance: float) -> LoadPlan:
        """Add rules until the bound is met."""
        bound, best = math.inf, None
        for _ in range(ITERATIONS):
            step = self.master(tolerance / 2)
            best = step if best is None or step.objective > best.objective else best
            value = self.add(step.prices)
            free = sum(self.conjugate(i, p) for i, p in enumerate(step.prices))
            bound = min(bound, self.worth(value) - float(step.prices @ value.visits) + free)
            if bound - best.objective <= tolerance:
                break
        assert best is not None
        return self._plan(best, float(bound), bool(bound - best.objective <= tolerance))

    def master(self, tolerance: float) -> _Step:
        """Return the best mixture of the rules known; tangents are added until N is met within the tolerance."""
        step = self.linear()
        for _ in range(ITERATIONS):
            new = [
                (cuts, x)
                for cuts, x in zip(self.cuts, step.mixed.visits, strict=True)
                if np.abs(np.array(cuts) - x).min() > NEAR
            ]
            if step.missed <= tolerance or not new:
                break
            for cuts, x in new:
                cuts.append(float(x))
            step = self.linear()
        return step

    def linear(self) -> _Step:
        """Return the solution of the linear programme of the rules and tangents known."""
        from scipy.optimize import linprog  # a third of a second to load

        n, tiers = len(self.values), len(self.stations)
        visits = np.array([v.visits for v in self.values])
        at = [(i, x) for i, cuts in enumerate(self.cuts) for x in cuts]
        rise = np.array([self.slope(i, x) for i, x in at])
        level = np.array([self.congestion(i, x) for i, x in at]) - rise * [x for _, x in at]
        of = np.eye(tiers)[[i for i, _ in at]]
        found = linprog(
            np.concatenate([[-self.worth(v) for v in self.values], np.ones(tiers)]),
            A_ub=np.block([[visits.T, np.zeros((tiers, tiers))], [rise[:, None] * (of @ visits.T), -of]]),
            b_ub=np.concatenate([np.minimum(self.room, 2.0) * (1 + SLACK), -level]),  # nobody visits a tier twice
            A_eq=[np.concatenate([np.ones(n), np.zeros(tiers)])],
            b_eq=[1.0],
            method="highs",
            options=EXACT,
        )
        if found.status != 0:  # cannot happen once there is room: a guarantee of our own
            raise ArithmeticError(f"the linear programme of {n} rules ended with: {found.message}")
        weights = np.where(found.x[:n] > WEIGHT, found.x[:n], 0.0)
        dual = np.maximum(-np.asarray(found.ineqlin.marginals), 0.0)
        weights /= weights.sum()
        mixed = _mixture(self.values, weights)
        objective = float(self.worth(mixed) - sum(self.congestion(i, x) for i, x in enumerate(mixed.visits)))
        prices = dual[:tiers] + of.T @ (dual[tiers:] * rise)
        return _Step(weights, mixed, objective, prices, dual[:tiers], -found.fun - objective)

    def _plan(self, best: _Step, bound: float, converged: bool) -> LoadPlan:
        rates = self.demand.rate * best.mixed.visits
        shares: dict[tuple[float, ...], tuple[int, float]] = {}  # a rule may have been found more than once
        for i in np.flatnonzero(best.weights):
            v = self.values[i]
            key = tuple(np.round([v.cost, v.quality, *v.visits, *v.answers], 10).tolist())
            shares[key] = (int(i), shares.get(key, (0, 0.0))[1] + float(best.weights[i]))
        time = np.array([_time(s, r) for s, r in zip(self.stations, rates, strict=True)])
        own = self.demand.time_value * time
        rising = np.array([self.slope(i, x) for i, x in enumerate(best.mixed.visits)])
        return LoadPlan(
            policies=tuple(self.policies[i] for i, _ in shares.values()),
            shares=np.array([share for _, share in shares.values()]),
            value=best.mixed,
            rates=rates,
            time_s=time,
            own=own,
            congestion=np.maximum(rising - own, 0.0),
            capacity=best.kappa,
            objective=best.objective,
            bound=bound,
            converged=converged,
            iterations=len(self.values),
        )

    def _too_much(self, fullest: float) -> str:
        fits = ", ".join(
            f"{t} {s.capacity:.4g}" for t, s in zip(self.demand.outcomes.tiers, self.stations, strict=True)
        )
        return (
            f"no stop rule serves {self.demand.rate:.4g} requests/s within the capacities ({fits} visits/s). "
            f"The nearest load has rate = {self.demand.rate / fullest:.4g}; or add replicas, or allow abstaining."
        )


def _fullest(visits: Array, room: Array) -> tuple[float, Array]:
    r"""Return the least z with :math:`v_i \le z\, m_i / \Lambda` for a mixture of these rules, and its multipliers."""
    from scipy.optimize import linprog

    n = len(visits)
    found = linprog(
        np.append(np.zeros(n), 1.0),
        A_ub=np.column_stack([visits.T, -room]),
        b_ub=np.zeros(len(room)),
        A_eq=[np.append(np.ones(n), 0.0)],
        b_eq=[1.0],
        method="highs",
    )
    return float(found.fun), -np.asarray(found.ineqlin.marginals)


def _mixture(values: Sequence[PolicyValue], weights: Array) -> PolicyValue:
    """Return the value of following each rule with its weight."""
    used = [(v, w) for v, w in zip(values, weights, strict=True) if w > 0]
    total = used[0][1]

    def join(one: tuple[PolicyValue, float], other: tuple[PolicyValue, float]) -> tuple[PolicyValue, float]:
        both = one[1] + other[1]
        return one[0].mixed(other[0], other[1] / both), both

    return reduce(join, used[1:], (used[0][0], total))[0]


def _time(station: Station, rate: float) -> float:
    return station.number(rate) / rate if rate > 0 else station.marginal(0.0)

"""The search: policies solved exactly, replicas chosen for their loads, prices tried by Optuna, the best simulated."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simulator.engine import Routing
from theory import cascade
from theory.cascade import Frontier, Policy, Vertex
from theory.errors import InfeasibleError
from theory.load_prices import Demand, LoadPlan, SharedProcessor, plan_under_load
from theory.outcomes import Outcomes, accuracy

from .build import Problem
from .replications import Workers
from .scenario import Objective
from .service import Service
from .space import Space, occupancy
from .storage import Ledger, Params, Proposals, Told

Array = NDArray[np.float64]
FILL_STEPS = 6  # halvings of the share of requests that follow the dearer rule [-]
LOADED = 0.999  # load at which a station of known capacity is full: any will do where time has no price [-]
PRICE_SPAN = 8.0  # Optuna tries tier prices up to this factor off their GPU time [-]


@dataclass(frozen=True, slots=True)
class Rule:
    """A stop rule over some of the tiers: two policies and how often the dearer one is followed."""

    tiers: tuple[int, ...]  # indices in the scenario, ascending
    outcomes: Outcomes | None  # of these tiers; None for a single tier of unknown quality
    low: Policy | None  # None: a single tier answers everything
    high: Policy | None
    gamma: float  # share of requests that follow `high` [-]
    quality: float  # [-]; nan if unknown
    visits: Array  # share of requests that run each of `tiers` [-]
    answers: Array  # share of requests whose answer is each one's [-]


@dataclass(frozen=True, slots=True)
class Group:
    """The replicas of one tier."""

    tier: int
    service: Service
    replicas: int
    rate: float  # arrivals at one replica [requests/s]
    routing: Routing = "round-robin"
    ready_s: float = 0.0  # when its replicas have loaded their model [s]

    @property
    def gpus(self) -> int:
        """GPUs of the tier."""
        return self.replicas * self.service.gpus


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan: a stop rule and the replicas that carry it."""

    rule: Rule
    groups: tuple[Group, ...]
    cost: float  # of one request, all GPUs of the plan paid whether busy or not [USD]
    e2e_s: float  # mean time to the final answer, analytic [s]

    @property
    def gpus(self) -> int:
        """GPUs of the plan."""
        return sum(g.gpus for g in self.groups)

    @property
    def key(self) -> tuple[object, ...]:
        """What tells two plans apart: tiers, services, replicas, and the rule to four digits."""
        return (
            tuple((g.tier, id(g.service), g.replicas) for g in self.groups),
            round(self.rule.quality, 4) if not math.isnan(self.rule.quality) else None,
        )


Frontiers = dict[tuple[tuple[int, ...], bytes], tuple[Frontier, list[Rule]]]  # by tiers and prices; a rule a vertex


class Search:
    """Candidates of a problem under the analytic model, and which is best."""

    def __init__(self, problem: Problem, space: Space, floor: float | None, frontiers: Frontiers | None = None) -> None:
        """Start from the frontiers that another search of the same outcomes has found; what is new is added to them."""
        self.problem, self.space, self.floor = problem, space, floor
        self.evaluated = 0  # (policy, service) pairs priced analytically
        self._capacity = [c.copy() for c in space.capacity]
        self._simulated: set[tuple[int, int]] = set()  # tier and index of the services whose capacity was simulated
        self._beaten: dict[tuple[int, int], int] = {}  # of these by which other one of the tier, in simulation
        self._frontiers: Frontiers = {} if frontiers is None else frontiers
        pools = problem.pools
        pool = [[pools.index(problem.pool(s.deployment)) for s in of] for of in space.services]
        self._of_pool = [  # by tier and pool: the services and their GPUs
            [[(i, s.gpus) for i, s in enumerate(of) if at[i] == p] for p in range(len(pools))]
            for of, at in zip(space.services, pool, strict=True)
        ]

    def subsets(self) -> list[tuple[int, ...]]:
        """Return every non-empty set of tiers that can serve at all, as ascending indices."""
        able = [i for i, c in enumerate(self._capacity) if np.any(c > 0)]
        return [s for n in range(1, len(able) + 1) for s in itertools.combinations(able, n)]

    def prices(self, tiers: Sequence[int]) -> Array:
        """Return what a visit to each tier costs at the capacity of its best service [USD]."""
        return np.array([self.space.unit_cost(self.problem, i) for i in tiers])

    def enumerate(self) -> list[Candidate]:
        """Return the candidates of all subsets of tiers, policies priced by the GPU time of a visit."""
        return [c for tiers in self.subsets() for c in self.of_prices(tiers, self.prices(tiers))]

    def of_prices(self, tiers: tuple[int, ...], prices: Array) -> list[Candidate]:
        """Return the feasible candidates whose policies are best at these prices of a visit [USD]."""
        return self.carried(list(self.rules(tiers, prices)))

    def carried(self, rules: list[Rule]) -> list[Candidate]:
        """Return the feasible candidates of the rules of one frontier, and of the mixtures that use spare capacity."""
        built = [self.allocate(rule) for rule in rules]
        costs = [math.inf if c is None else c.cost for c in built]
        order = sorted(range(len(rules)), key=lambda i: rules[i].quality)
        steps = [(i, j) for i, j in itertools.pairwise(order) if costs[i] < costs[j] * (1 - 1e-9)]
        full = [self.filled(rules[i], rules[j]) for i, j in steps]
        return [c for c in built + full if c is not None]

    def filled(self, low: Rule, high: Rule) -> Candidate | None:
        """Return the dearest mixture of two pure rules that costs no more GPUs than the cheaper one.

        GPUs come in whole groups, so a plan has capacity to spare; the spare escalates more requests.
        """
        start = self.allocate(low)
        if start is None or low.gamma > 0 or high.gamma > 0 or low.low is None or high.low is None:
            return None
        best, inside, outside = None, 0.0, 1.0
        for _ in range(FILL_STEPS):
            share = (inside + outside) / 2
            candidate = self.allocate(_blend(low, high, share))
            if candidate is not None and candidate.cost <= start.cost * (1 + 1e-9):
                best, inside = candidate, share
            else:
                outside = share
        return best

    def rules(self, tiers: tuple[int, ...], prices: Array) -> Iterable[Rule]:
        """Yield the vertices of the frontier at these prices, and the mixture that meets the quality floor."""
        table = self.problem.outcomes
        if table is None:
            yield single(self.problem, tiers[0])
            return
        key = tiers, prices.tobytes()
        if key not in self._frontiers:
            part = subset(table, tiers)
            front = cascade.frontier(part, prices)
            self._frontiers[key] = front, [_pure(tiers, part, prices, vertex) for vertex in front.vertices]
        front, pure = self._frontiers[key]
        yield from pure
        if self.floor is not None and front.quality[0] < self.floor < front.quality[-1]:
            mixture = front.at_quality(self.floor)
            low, high = (next(r for r in pure if r.low is v.policy) for v in (mixture.low, mixture.high))
            yield _blend(low, high, mixture.gamma)

    def allocate(self, rule: Rule) -> Candidate | None:
        """Return the rule on the cheapest GPUs that carry it within the SLOs, or None if the fleet is too small.

        Of one pool the fewest GPUs of a tier are the best for any plan; which pool each tier runs on is tried out.
        """
        used = [(i, v) for i, v in zip(rule.tiers, rule.visits, strict=True) if v > 1e-9]
        self.evaluated += sum(len(self.space.services[i]) for i, _ in used)
        pools = range(len(self.problem.pools))
        of_pool = [[self._group(i, self.problem.rate * float(v), p) for p in pools] for i, v in used]
        options = [[g for g in of_tier if g is not None] for of_tier in of_pool]
        fitting = [chosen for chosen in itertools.product(*options) if fits(self.problem, chosen)]
        if not fitting:
            return None
        chosen = min(fitting, key=lambda groups: price(self.problem, groups))
        return Candidate(rule, chosen, price(self.problem, chosen) / self.problem.rate, math.nan)

    def _group(self, tier: int, rate: float, pool: int) -> Group | None:
        """Return the replicas of a tier on the fewest GPUs of a pool; of equal ones those with most to spare."""
        best, count, fewest, most = -1, 0, math.inf, 0.0
        capacity = self._capacity[tier].tolist()
        for at, gpus in self._of_pool[tier][pool]:  # a loop: few services, many calls
            if capacity[at] > 0:
                replicas = math.ceil(rate / capacity[at] - 1e-9)
                total, borne = replicas * gpus, replicas * capacity[at]
                if total < fewest or (total == fewest and borne > most):
                    best, count, fewest, most = at, replicas, total, borne
        if best < 0:
            return None
        return Group(tier, self.space.services[tier][best], count, rate / count)

    def capacities(self) -> Array:
        """Return what a replica of each service bears, as far as known, all tiers' services in one row [requests/s]."""
        return np.concatenate(self._capacity)

    def known_capacity(self) -> tuple[Array, ...]:
        """Return what a replica of each service bears, as far as is known, by tier [requests/s]."""
        return tuple(c.copy() for c in self._capacity)

    def at_capacity(self, candidate: Candidate, lam: float) -> LoadPlan | None:
        """Return the best mixture of stop rules on a plan's own replicas, and what a visit is worth there.

        GPUs are paid whether busy or not, so a visit costs nothing but the room it takes: its price is the multiplier
        of the load that the replicas bear within the SLOs. None where there is nothing to choose.

        Parameters
        ----------
        lam : float
            What a correct answer is worth; the prices are in its unit [USD].
        """
        if self.problem.outcomes is None or len(candidate.groups) < 2:
            return None
        groups = sorted(candidate.groups, key=lambda g: g.tier)
        table = subset(self.problem.outcomes, tuple(g.tier for g in groups))
        bears = [g.replicas * float(self._capacity[g.tier][self._index(g)]) for g in groups]
        stations = [SharedProcessor(LOADED / b, load=LOADED) for b in bears]
        demand = Demand(table, np.zeros(len(groups)), self.problem.rate, lam, time_value=0.0)
        return plan_under_load(demand, stations)

    def measure(self, group: Group, capacity: float) -> None:
        """Replace the analytic capacity of a group's service by the simulated one [requests/s]."""
        at = self._index(group)
        self._capacity[group.tier][at] = capacity
        self._simulated.add((group.tier, at))

    def hope(self, factor: float) -> None:
        """Take services that were not simulated to bear ``factor`` times what they do analytically.

        A plan that is best on such capacities is best of all whose services bear no more, simulated or not.
        """
        for tier, (capacity, analytic) in enumerate(zip(self._capacity, self.space.capacity, strict=True)):
            free = [i for i in range(len(analytic)) if (tier, i) not in self._simulated]
            capacity[free] = factor * analytic[free]

    def correction(self) -> float:
        """Return simulated over analytic capacity, the geometric mean over the services that were simulated [-]."""
        pairs = [(self._capacity[t][i], self.space.capacity[t][i]) for t, i in self._simulated]
        logs = [math.log(own / analytic) for own, analytic in pairs if own > 0 and analytic > 0]
        return math.exp(sum(logs) / len(logs)) if logs else 1.0

    def corrected(self, most: float) -> Space:
        """Return the space with simulated capacities, and analytic ones times the mean correction where there is none.

        Parameters
        ----------
        most : float
            Greatest correction of a service that was not simulated: the factor that :meth:`hope` was given [-].
        """
        other = copy.copy(self)
        other._capacity = [c.copy() for c in self._capacity]
        other.hope(min(self.correction(), most))
        return replace(self.space, capacity=tuple(other._capacity))

    def beats(self, winner: Candidate, loser: Candidate) -> None:
        """Note that a plan is faster in simulation than one that differs from it in a single service."""
        for a, b in zip(winner.groups, loser.groups, strict=True):
            if a.service is not b.service:
                self._beaten[b.tier, self._index(b)] = self._index(a)

    def like(self, problem: Problem, space: Space) -> Search:
        """Return the search of a problem that differs in a number, which services are faster in simulation known."""
        known = self._frontiers if problem.outcomes is self.problem.outcomes else None
        other = Search(problem, space, quality_floor(problem), known)
        other._beaten = self._beaten
        return other

    def is_simulated(self, group: Group) -> bool:
        """Return whether the capacity of a group's service was simulated."""
        return (group.tier, self._index(group)) in self._simulated

    def analytic(self, group: Group) -> float:
        """Return what a replica of a group bears by the analytic model [requests/s]."""
        return float(self.space.capacity[group.tier][self._index(group)])

    def bears(self, candidate: Candidate) -> bool:
        """Return whether every replica of a plan bears its load, as far as is known."""
        return bool(np.all(self.used(candidate) <= 1 + 1e-9))

    def within_fleet(self, candidate: Candidate) -> bool:
        """Return whether every pool has the GPUs that a plan runs on it."""
        return fits(self.problem, candidate.groups)

    def used(self, candidate: Candidate) -> Array:
        """Return the load of each group over the greatest its replicas bear within the SLOs [-]."""
        with np.errstate(divide="ignore"):
            return np.array([np.divide(g.rate, self._capacity[g.tier][self._index(g)]) for g in candidate.groups])

    def lower_capacity(self, group: Group, share: float) -> None:
        """Note that a replica of this service does not bear this rate: its capacity is ``share`` of it."""
        self.measure(group, share * group.rate)

    def _index(self, group: Group) -> int:
        return next(i for i, s in enumerate(self.space.services[group.tier]) if s is group.service)

    def capacity(self, group: Group) -> float:
        """Return what a replica of a group bears, as far as is known [requests/s]."""
        return float(self._capacity[group.tier][self._index(group)])

    def label(self, group: Group) -> str:
        """Return what tells a service from all others of the search, in any process."""
        return f"{self.problem.scenario.tiers[group.tier].name} {self._index(group)}"

    def settle(self, candidate: Candidate) -> Candidate:
        """Return the candidate with the fastest service among those that need the same GPUs, and its mean latency."""
        fastest = [self._fastest(g) for g in candidate.groups]
        visits = dict(zip(candidate.rule.tiers, candidate.rule.visits, strict=True))
        e2e = sum(float(visits[g.tier]) * wait for g, wait in fastest)
        return replace(candidate, groups=tuple(g for g, _ in fastest), e2e_s=e2e)

    def alike(self, group: Group) -> list[Group]:
        """Return the ways to carry the load of a group on as many GPUs of the same kind."""
        rate = group.rate * group.replicas
        return [
            Group(group.tier, s, group.gpus // s.gpus, rate / (group.gpus // s.gpus))
            for s, c in zip(self.space.services[group.tier], self._capacity[group.tier], strict=True)
            if s.deployment.accelerator == group.service.deployment.accelerator
            and group.gpus % s.gpus == 0
            and rate / (group.gpus // s.gpus) <= c
        ]

    def _fastest(self, group: Group) -> tuple[Group, float]:
        """Return the fastest way to carry the load of a group on its GPUs, and the mean time of a visit [s]."""
        options = self.alike(group) or [group]
        there = {self._index(o) for o in options}
        options = [o for o in options if self._beaten.get((o.tier, self._index(o))) not in there] or options
        state = occupancy([o.service for o in options], np.array([o.rate for o in options]), self.space.load)
        best = int(np.argmin(state.e2e_s))
        return options[best], float(state.e2e_s[best])

    def e2e(self, group: Group) -> float:
        """Return the mean time of a visit, analytic [s]."""
        return float(occupancy([group.service], np.array([group.rate]), self.space.load).e2e_s[0])


def price(problem: Problem, groups: Iterable[Group]) -> float:
    """Return what the GPUs of some tiers cost [USD/s]."""
    return sum(g.gpus * problem.pool(g.service.deployment).price for g in groups)


def fits(problem: Problem, groups: Sequence[Group]) -> bool:
    """Return whether every pool has the GPUs that run on it."""
    return all(
        sum(g.gpus for g in groups if problem.pool(g.service.deployment) is pool) <= pool.gpus for pool in problem.pools
    )


def _blend(low: Rule, high: Rule, share: float) -> Rule:
    keep = 1 - share
    return replace(
        low,
        high=high.low,
        gamma=share,
        quality=keep * low.quality + share * high.quality,
        visits=keep * low.visits + share * high.visits,
        answers=keep * low.answers + share * high.answers,
    )


def subset(outcomes: Outcomes, tiers: tuple[int, ...]) -> Outcomes:
    """Return the joint outcomes of some of the tiers."""
    at = list(tiers)
    names = tuple(outcomes.tiers[i] for i in at)
    return replace(outcomes, tiers=names, correct=outcomes.correct[:, at], signal=outcomes.signal[:, at])


def single(problem: Problem, tier: int) -> Rule:
    """Return the rule that sends every request to one tier."""
    if problem.outcomes is None:
        return Rule((tier,), None, None, None, 0.0, math.nan, np.ones(1), np.ones(1))
    part = subset(problem.outcomes, (tier,))
    return Rule((tier,), part, None, None, 0.0, float(accuracy(part)[0]), np.ones(1), np.ones(1))


def _pure(tiers: tuple[int, ...], part: Outcomes, prices: Array, vertex: Vertex) -> Rule:
    value = cascade.evaluate(vertex.policy, part, prices)
    return Rule(tiers, part, vertex.policy, vertex.policy, 0.0, value.quality, value.visits, value.answers)


def quality_floor(problem: Problem) -> float | None:
    """Return the floor of the objective, ``top`` resolved to the last tier's accuracy; None if it has none [-]."""
    floor = problem.scenario.objective.quality_floor if problem.scenario.objective else None
    if floor == "top":
        return float(accuracy(problem.outcomes)[-1]) if problem.outcomes is not None else None
    return floor


def order(objective: Objective | None, floor: float | None, candidate: Candidate) -> tuple[float, ...]:
    """Return what sorts candidates, best first: unmet constraint [-], then the objective, then the rest."""
    q = 0.0 if math.isnan(candidate.rule.quality) else candidate.rule.quality
    cost = candidate.cost
    if objective is not None and objective.lambda_usd is not None:
        return (0.0, cost - objective.lambda_usd * q, cost, len(candidate.groups))
    if objective is not None and objective.budget_usd_per_1000 is not None:
        return (max(0.0, 1000 * cost - objective.budget_usd_per_1000 * (1 + 1e-12)), -q, cost, len(candidate.groups))
    return (max(0.0, (floor or 0.0) - q - 1e-9), cost, -q, len(candidate.groups))


def refine(
    search: Search, trials: int, seed: int, ledger: Ledger, progress: Callable[[str, int, int], None]
) -> list[Rule]:
    """Return the rules of tier prices other than GPU time, tried by Optuna: they may fit whole GPUs better.

    The enumerated optimum (all factors 1) is tried first, so the search never ends below it.
    """
    if trials == 0 or search.problem.outcomes is None:
        return []
    import optuna

    everything = search.subsets()[-1]
    span = math.log(PRICE_SPAN)
    names = [f"ln_price_{i}" for i in everything]
    ranges = dict.fromkeys(names, optuna.distributions.FloatDistribution(-span, span))
    proposals = Proposals([dict.fromkeys(names, 0.0)], ranges, lambda s: optuna.samplers.TPESampler(seed=s))
    bare = copy.copy(search)
    bare._frontiers = {}  # each trial has its own prices
    sent = pickle.dumps(bare)

    def evaluate(workers: Workers, params: list[Params]) -> Iterator[tuple[Told, tuple[list[Rule], int]]]:
        return workers(_tried, [(sent, tuple(p[n] for n in names)) for p in params])

    found = ledger.minimise(proposals, trials, seed, evaluate, progress)
    search.evaluated += sum(evaluated for _, evaluated in found)
    return [rule for rules, _ in found for rule in rules]


def _tried(task: tuple[bytes, tuple[float, ...]]) -> tuple[Told, tuple[list[Rule], int]]:
    """Return how good the best plan is at tier prices off their GPU time, the rules there, and how many were priced."""
    sent, ln_price = task
    search = copy.copy(_received(sent))  # its own count: a Dask worker may have several threads
    search.evaluated, everything = 0, search.subsets()[-1]
    candidates = search.of_prices(everything, search.prices(everything) * np.exp(ln_price))
    objective = search.problem.scenario.objective
    best = min((order(objective, search.floor, c) for c in candidates), default=(math.inf, math.inf))
    value = float(min(1e6 * best[0] + best[1], 1e9))
    return Told((value,)), ([c.rule for c in candidates], search.evaluated)


@lru_cache(maxsize=1)
def _received(sent: bytes) -> Search:
    """Return a search as a worker got it; it comes with each trial and is unpacked once."""
    found = pickle.loads(sent)
    assert isinstance(found, Search)
    return found


def best_of(search: Search, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates that meet the constraint, best first, each plan once.

    Raises
    ------
    InfeasibleError
        If there is none; the message says what binds and what comes nearest.
    """
    objective = search.problem.scenario.objective
    ranked = sorted(candidates, key=lambda c: order(objective, search.floor, c))
    if not ranked:
        raise InfeasibleError(_too_small(search))
    if order(objective, search.floor, ranked[0])[0] > 0:
        raise InfeasibleError(_unmet(search, ranked[0]))
    unique: dict[tuple[object, ...], Candidate] = {}
    for candidate in ranked:
        if order(objective, search.floor, candidate)[0] <= 0:
            unique.setdefault(candidate.key, candidate)
    return list(unique.values())


def _too_small(search: Search) -> str:
    pools, rate = search.problem.pools, search.problem.rate
    alone = []
    for (i, choice), (p, pool) in itertools.product(enumerate(search.problem.scenario.tiers), enumerate(pools)):
        group = search._group(i, rate, p)
        if group is not None:
            alone.append((group.gpus / pool.gpus, group.gpus, choice.name, pool))
    if not alone:
        return "no tier keeps the SLOs at any load. Relax `slo`, or allow other degrees in `tiers.tp`."
    _, gpus, name, pool = min(alone, key=lambda a: a[:3])
    of = f" of {pool.accelerator.name}" if len(pools) > 1 else ""
    return (
        f"the load does not fit: {rate:.3g} requests/s within the SLOs need at least {gpus} GPUs{of} (all on {name}); "
        f"`fleet.gpus`{of} is {pool.gpus}. The nearest plan has fleet.gpus = {gpus}{of}, or "
        f"traffic.rate = {rate * pool.gpus / gpus:.3g}."
    )


def _unmet(search: Search, nearest: Candidate) -> str:
    objective = search.problem.scenario.objective
    if objective is not None and objective.budget_usd_per_1000 is not None:
        return (
            f"`objective.budget_usd_per_1000` = {objective.budget_usd_per_1000:g} USD is below the cheapest plan. "
            f"The nearest plan costs {1000 * nearest.cost:.4g} USD per 1000 requests."
        )
    gpus = sum(pool.gpus for pool in search.problem.pools)
    return (
        f"`objective.quality_floor` = {search.floor:.4g} is above what {gpus} GPUs reach "
        f"at this load. The nearest plan has quality {nearest.rule.quality:.4g}."
    )

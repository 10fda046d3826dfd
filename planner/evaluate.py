r"""Analytic figures of many configurations at once: cost, quality, latency, energy, what binds; and the best of all.

A configuration is a service and a number of replicas for each tier, and a policy. Its figures need, of each service,
only its steady state against the load :math:`u = r / r_{max}`: tabulated once (:func:`tables`) on a grid even in
:math:`t = \ln((1 + u / u_0) / (1 - u))`, fine where waits diverge and where a replica is first busy, and interpolated
linearly. With r requests a second,
policy visits v and m replicas of g GPUs at p USD a second,

.. math:: u_k = \frac{r\, v_k}{m_k\, r_{max,k}}, \qquad c = \frac{1}{r} \sum_k m_k g_k p_k, \qquad
          \mathrm{E2E} = \sum_k v_k\, \mathrm{E2E}_k(u_k), \qquad
          E = \frac{1}{r} \sum_k m_k g_k P_k(u_k)

P the linear power model of :mod:`theory.cost` at the share of time a replica is busy. A tier keeps the SLOs up to the
capacity that :mod:`planner.space` found for its service; the tables only say how long things take below it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from theory import queueing
from theory.cost import joules
from theory.errors import require

from .scenario import Objective
from .search import Rule, Search
from .space import P99, occupancy

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
FULL = 0.995  # load beyond which a replica counts as unstable, that of space.RATE_GRID [-]
FAINT = 0.05  # u0, load below which the grid is evenly fine [-]
POINTS = 400  # loads of each service tabulated: interpolated figures are within 1 % (tests/test_evaluate.py)
CHUNK = 2**16  # configurations worked on at once: the temporaries stay in the cache
ROUNDING = 1e-9  # share of a limit that rounding may exceed [-]
BINDING = ("p99 TTFT", "mean TPOT", "stability", "fleet.gpus", "quality floor", "budget", "unserved tier")
_GPUS, _FLOOR, _BUDGET, _UNSERVED = range(3, 7)


@dataclass(frozen=True, eq=False)
class Tables:
    """What is looked up: S services of all K tiers one after another, P policies, pools of GPUs."""

    rate: float  # arrivals of requests [requests/s]
    begin: IntArray  # (K + 1,) where the services of each tier begin
    gpus: IntArray  # (S,) of a replica
    pool: IntArray  # (S,) whose GPUs it runs on
    price: Array  # (S,) of a replica [USD/s]
    capacity: Array  # (S,) greatest rate of a replica within the SLOs [requests/s]
    binds: IntArray  # (S,) index in BINDING of what sets that capacity
    limit: Array  # (S,) stability limit of a replica [requests/s]
    state: Array  # (S * POINTS, 4) p99 TTFT [s], mean TPOT [s], mean E2E [s], power of a replica [W] against load
    visits: Array  # (P, K) share of requests that run a tier [-]
    quality: Array  # (P,) [-]; nan if unknown
    fleet: IntArray  # GPUs of each pool

    @property
    def tiers(self) -> int:
        """Tiers of the scenario."""
        return len(self.begin) - 1


@dataclass(frozen=True, eq=False)
class Configurations:
    """N configurations; a tier with no replicas has any service."""

    service: IntArray  # (N, K) index among the services of the tier
    replicas: IntArray  # (N, K)
    policy: IntArray  # (N,)

    def at(self, which: slice | Sequence[int] | NDArray[np.intp]) -> Configurations:
        """Return some of them."""
        return Configurations(self.service[which], self.replicas[which], self.policy[which])


@dataclass(frozen=True, eq=False)
class Figures:
    """Figures of N configurations, (N,) each; times are inf where a tier is unstable."""

    cost: Array  # of one request, all GPUs paid whether busy or not [USD]
    quality: Array  # [-]
    ttft_p99_s: Array  # of the slowest tier visited, as the SLO is meant [s]
    tpot_s: Array  # mean over visits [s]
    e2e_s: Array  # mean to the final answer [s]
    joules: Array  # of one request, by the linear power model [J]
    gpus: IntArray
    feasible: NDArray[np.bool_]
    binding: IntArray  # index in BINDING of the constraint with the least slack, or the one most exceeded
    used: Array  # how much of that constraint is used: above 1 where infeasible [-]
    excess: Array  # quality or budget missed, the first key of search.order [-] or [USD per 1000]
    fits: NDArray[np.bool_]  # whether it fits the fleet within the SLOs, whatever the objective says

    def at(self, which: Sequence[int] | NDArray[np.intp]) -> Figures:
        """Return those of some of them."""
        return Figures(**{f.name: getattr(self, f.name)[which] for f in fields(self)})


def load_grid() -> Array:
    """Return the loads at which services are tabulated, (POINTS,) [-]."""
    grown = np.exp(_stretched(np.array(FULL)) * np.linspace(0.0, 1.0, POINTS))
    return np.maximum((grown - 1) / (1 / FAINT + grown), 1e-9)


def _stretched(load: Array) -> Array:
    return np.asarray(np.log((1 + load / FAINT) / (1 - load)))


def tables(search: Search, rules: Sequence[Rule]) -> Tables:
    """Return the tables of a search's services, at the capacities it knows now, and of these rules.

    Raises
    ------
    InputError
        If there is no rule or no service.
    """
    problem, space = search.problem, search.space
    services = [s for of_tier in space.services for s in of_tier]
    require(bool(services) and bool(rules), "rules", "must hold a rule, and the space a service", len(rules))
    gpus, pools = np.array([s.gpus for s in services]), [problem.pool(s.deployment) for s in services]
    idle = np.full(len(services), 1e-9)
    limit = occupancy(services, idle, space.load).rate_limit
    repeated = [s for s in services for _ in range(POINTS)]
    state = occupancy(repeated, (limit[:, None] * load_grid()).ravel(), space.load)
    ttft = queueing.ttft_quantile(state, P99)
    busy = 1.0 - state.pi[:, 0]
    watts = [
        s.gpus * np.asarray(joules(np.ones(POINTS), np.clip(row, 0.0, 1.0), s.deployment.accelerator))
        for s, row in zip(services, busy.reshape(-1, POINTS), strict=True)
    ]
    table = np.stack([ttft, state.tpot_s, state.e2e_s, np.concatenate(watts)], axis=1)
    capacity = search.capacities()
    slo = problem.scenario.slo
    at = _look_up(table, np.arange(len(services)), np.maximum(capacity, 1e-9) / limit)
    shares = [at[:, 0] / slo.ttft_p99_s, at[:, 1] / slo.tpot_mean_s, capacity / limit]
    return Tables(
        rate=problem.rate,
        begin=np.cumsum([0, *(len(s) for s in space.services)]),
        gpus=gpus,
        pool=np.array([problem.pools.index(p) for p in pools]),
        price=gpus * np.array([p.price for p in pools]),
        capacity=capacity,
        binds=np.argmax(np.array(shares), axis=0),
        limit=limit,
        state=table,
        visits=_visits(rules, len(space.services)),
        quality=np.array([r.quality for r in rules]),
        fleet=np.array([p.gpus for p in problem.pools]),
    )


def with_rules(tables: Tables, rules: Sequence[Rule]) -> Tables:
    """Return the tables of the same services with other rules.

    Raises
    ------
    InputError
        If there is no rule.
    """
    require(bool(rules), "rules", "must hold a rule", len(rules))
    return replace(tables, visits=_visits(rules, tables.tiers), quality=np.array([r.quality for r in rules]))


def _visits(rules: Sequence[Rule], tiers: int) -> Array:
    visits = np.zeros((len(rules), tiers))
    for row, rule in zip(visits, rules, strict=True):
        row[list(rule.tiers)] = np.where(rule.visits > 1e-9, rule.visits, 0.0)
    return visits


def _look_up(state: Array, service: IntArray, load: Array) -> Array:
    """Return the figures of services at loads below ``FULL``, linear in t between the points, (..., 4)."""
    t = _stretched(np.minimum(load, FULL)) * ((POINTS - 1) / float(_stretched(np.array(FULL))))
    left = np.minimum(t.astype(np.int64), POINTS - 2)
    share = (t - left)[..., None]
    at = service * POINTS + left
    low, high = state.take(at, axis=0), state.take(at + 1, axis=0)
    return np.asarray(low + share * (high - low))


def evaluate(
    tables: Tables, configurations: Configurations, objective: Objective | None = None, floor: float | None = None
) -> Figures:
    """Return the analytic figures of configurations.

    Parameters
    ----------
    objective : Objective, optional
        Its budget is a constraint; without one only the SLOs and the fleet are.
    floor : float, optional
        Least quality [-].

    Raises
    ------
    InputError
        If an index is out of range or a number of replicas is negative.
    """
    c = configurations
    _check(tables, c)
    budget = objective.budget_usd_per_1000 if objective is not None else None
    starts = range(0, max(len(c.policy), 1), CHUNK)
    parts = [_evaluate(tables, c.at(slice(i, i + CHUNK)), budget, floor) for i in starts]
    if len(parts) == 1:
        return parts[0]
    return Figures(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Figures)})


def _check(t: Tables, c: Configurations) -> None:
    shape = (len(c.policy), t.tiers)
    fits = c.service.shape == shape and c.replicas.shape == shape
    require(fits, "service", f"and `replicas` must have shape {shape}", (c.service.shape, c.replicas.shape))
    require(bool(np.all(c.replicas >= 0)), "replicas", "must be at least 0 [-]", c.replicas.min(initial=0))
    known = (c.service >= 0) & (c.service < np.diff(t.begin)) | (c.replicas == 0)
    require(bool(np.all(known)), "service", f"must lie in 0..n - 1 with n = {np.diff(t.begin).tolist()}", shape)
    most = len(t.quality) - 1
    ok = bool(np.all((c.policy >= 0) & (c.policy <= most)))
    require(ok, "policy", f"must lie in 0..{most}", (c.policy.min(initial=0), c.policy.max(initial=0)))


def _evaluate(t: Tables, c: Configurations, budget: float | None, floor: float | None) -> Figures:
    on = c.replicas > 0
    last = np.maximum(np.diff(t.begin) - 1, 0)
    s = np.minimum(np.clip(c.service, 0, last) + t.begin[:-1], len(t.gpus) - 1)
    visits = t.visits[c.policy]
    run = visits > 0
    rate = t.rate * visits / np.maximum(c.replicas, 1)
    load = rate / t.limit[s]
    at = _look_up(t.state, s, load)
    wait = np.where((load > FULL)[..., None], np.inf, at[..., :3])
    wait = np.where((run & ~on)[..., None], np.inf, np.where(run[..., None], wait, 0.0))
    gpus = np.where(on, c.replicas * t.gpus[s], 0)
    cost = np.where(on, c.replicas * t.price[s], 0.0).sum(axis=1) / t.rate
    energy = np.where(on, c.replicas * at[..., 3], 0.0).sum(axis=1) / t.rate
    quality = t.quality[c.policy]
    with np.errstate(invalid="ignore", divide="ignore"):
        slack = _used(t, c, s, rate, gpus, (cost, quality), (budget, floor))
        tpot = np.where(run, visits * wait[..., 1], 0.0).sum(axis=1) / visits.sum(axis=1)
        e2e = np.where(run, visits * wait[..., 2], 0.0).sum(axis=1)
    used, binding, fits = slack
    excess = np.zeros(len(cost))
    if floor is not None:
        excess = np.maximum(excess, floor - np.nan_to_num(quality) - ROUNDING)
    if budget is not None:
        excess = np.maximum(excess, 1000 * cost - budget * (1 + 1e-12))
    excess = np.maximum(excess, 0.0)
    return Figures(
        cost=cost,
        quality=quality,
        ttft_p99_s=wait[..., 0].max(axis=1),
        tpot_s=tpot,
        e2e_s=e2e,
        joules=energy,
        gpus=gpus.sum(axis=1),
        feasible=fits & (excess <= 0),
        binding=binding,
        used=used,
        excess=excess,
        fits=fits,
    )


def _used(
    t: Tables,
    c: Configurations,
    service: IntArray,
    rate: Array,
    gpus: IntArray,
    worth: tuple[Array, Array],
    asked: tuple[float | None, float | None],
) -> tuple[Array, IntArray, NDArray[np.bool_]]:
    """Return how much of its tightest constraint each configuration uses, which one that is, and whether it fits."""
    run, (cost, quality), (budget, floor) = rate > 0, worth, asked
    of_tier = np.where(run, rate / t.capacity[service], 0.0)
    of_tier = np.where(run & (c.replicas == 0), np.inf, of_tier)
    kind = np.where(run & (c.replicas == 0), _UNSERVED, t.binds[service])
    row = np.arange(len(cost))
    tier = of_tier.argmax(axis=1)
    used, binding = of_tier[row, tier], kind[row, tier]
    pool = t.pool[service]
    of_fleet = np.max([np.where(pool == i, gpus, 0).sum(axis=1) / n for i, n in enumerate(t.fleet)], axis=0)
    fits = (used <= 1 + ROUNDING) & (of_fleet <= 1)
    shares = [(_GPUS, of_fleet)]
    shares += [(_FLOOR, floor / np.nan_to_num(quality))] if floor is not None else []
    shares += [(_BUDGET, 1000 * cost / budget)] if budget is not None else []
    for code, share in shares:
        tighter = share > used
        used, binding = np.where(tighter, share, used), np.where(tighter, code, binding)
    return used, binding, fits


# ---------------------------------------------------------------------------------------------------------------------
# All configurations
# ---------------------------------------------------------------------------------------------------------------------


def every(tables: Tables) -> Iterator[Configurations]:
    """Yield all configurations that the fleet has room for, some at a time.

    For each set of tiers that policies visit: every service with a capacity, every number of replicas up to the GPUs
    of its pool, every policy of the set. Tiers a policy does not visit get no replicas: they would only cost.
    """
    masks = tables.visits > 0
    for mask in np.unique(masks, axis=0):
        policies = np.flatnonzero((masks == mask).all(axis=1))
        layouts = _layouts(tables, np.flatnonzero(mask))
        step = max(1, CHUNK // max(len(policies), 1))
        for i in range(0, len(layouts), step):
            part = layouts[i : i + step]
            n = len(policies)
            yield Configurations(
                np.repeat(part[..., 0], n, axis=0), np.repeat(part[..., 1], n, axis=0), np.tile(policies, len(part))
            )


def _layouts(t: Tables, visited: IntArray) -> IntArray:
    """Return (service, replicas) of each tier for all layouts of the visited tiers on the fleet, (n, K, 2)."""
    layouts = np.zeros((1, t.tiers, 2), dtype=np.int64)
    held = np.zeros((1, len(t.fleet)), dtype=np.int64)
    for tier in visited:
        options = [
            (s - t.begin[tier], m, t.pool[s], m * t.gpus[s])
            for s in range(t.begin[tier], t.begin[tier + 1])
            if t.capacity[s] > 0
            for m in range(1, int(t.fleet[t.pool[s]] // t.gpus[s]) + 1)
        ]
        if not options:
            return np.zeros((0, t.tiers, 2), dtype=np.int64)
        at = np.array(options, dtype=np.int64)
        takes = np.zeros((len(at), len(t.fleet)), dtype=np.int64)
        takes[np.arange(len(at)), at[:, 2]] = at[:, 3]
        total = held[:, None] + takes
        i, j = np.nonzero((total <= t.fleet).all(axis=2))
        layouts, held = layouts[i], total[i, j]
        layouts[:, tier] = at[j, :2]
    return layouts


@dataclass(frozen=True, eq=False)
class Optimum:
    """The best of all configurations under the analytic model."""

    configuration: Configurations  # one of them
    figures: Figures  # its own
    evaluated: int  # configurations looked at
    feasible: int  # of them


def worth(figures: Figures, objective: Objective | None) -> Array:
    """Return what is to be made small, (N,): cost, cost less the worth of answers [USD], or minus the quality [-]."""
    quality = np.nan_to_num(figures.quality)
    if objective is not None and objective.lambda_usd is not None:
        return figures.cost - objective.lambda_usd * quality
    if objective is not None and objective.budget_usd_per_1000 is not None:
        return -quality
    return figures.cost


def optimum(tables: Tables, objective: Objective | None, floor: float | None) -> Optimum | None:
    """Return the best of all configurations by exhaustion, ties by the order of :func:`planner.search.order`; or None.

    The reference against which searches are measured; a search need not look at all of them.
    """
    best: tuple[tuple[float, ...], Configurations, Figures] | None = None
    evaluated = feasible = 0
    for some in every(tables):
        figures = evaluate(tables, some, objective, floor)
        evaluated += len(some.policy)
        feasible += int(figures.feasible.sum())
        at = np.flatnonzero(figures.feasible)
        if not len(at):
            continue
        keys = np.array([worth(figures, objective), figures.cost, -np.nan_to_num(figures.quality)])[:, at]
        i = at[np.lexsort(keys[::-1])[0]]
        key = tuple(keys[:, np.searchsorted(at, i)].tolist())
        if best is None or key < best[0]:
            best = key, some.at([i]), figures.at([i])
    return Optimum(best[1], best[2], evaluated, feasible) if best is not None else None


def rules_of(search: Search) -> list[Rule]:
    """Return the rules that the enumeration tries: of all sets of tiers, at the prices of their GPU time."""
    found = [search.rules(tiers, search.prices(tiers)) for tiers in search.subsets()]
    return list(itertools.chain.from_iterable(found))

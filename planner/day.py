r"""The plan of a day: replicas, stop rule and draft lengths for each hour, and what going from one to the next takes.

Requests come at a rate that is constant on pieces of time. A piece lasts far longer than a request, so each is planned
in its own steady state (the pointwise stationary approximation: Green & Kolesar 1991, Management Science 37:84). Step
times, the loads that replicas bear and the frontiers of stop rules do not depend on the rate: they are found once, and
a piece costs only the counting of replicas, whatever the number of GPUs.

Between pieces replicas of some services start and of others stop. A replica that serves from the beginning of a piece
is asked for a lead of

.. math:: \ell_s = \text{provisioning} + \text{loading of } s

before, is paid from then on, and is there beside all that still serve. With m replicas of services s in piece h, prices
p a second and durations d the day costs

.. math:: \sum_h d_h \sum_s m_{h,s} p_s + \sum_h \sum_s (m_{h+1,s} - m_{h,s})^+\, p_s\, \ell_s

(round the clock where the pieces repeat). The best of the leading plans of each piece are chained by dynamic
programming on that sum, or on what the objective makes of it: less lambda for each correct answer, or the most correct
answers within the budget of each piece.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.workload import Workload, at_rate, poisson
from theory.errors import InfeasibleError, refuse

from . import explain
from .build import Problem, joined_names, resolve
from .day_report import clock
from .frontier import hull, lambda_of
from .plan import Progress, check_plannable, silent
from .scenario import Arrivals, Scenario, Slo
from .search import Candidate, Group, Rule, Search, best_of, price, quality_floor
from .service import Service
from .simulate import load_seconds, missed, simulated_capacity, simulated_plan
from .space import Space, enumerate_space
from .storage import Ledger, Means, ledger

Array = NDArray[np.float64]
LEADING = 16  # plans of a piece that the chain chooses from [-]
TRIES = 12  # times the day is planned anew because a simulation says that a replica bears less [-]
CAPACITY_REQUESTS = 6000  # simulated at each rate to find what a replica bears [-]
CAPACITY_STEP = 0.95  # a service that misses an SLO in simulation is taken to bear this share of that load [-]
CHECKED = 4  # pieces simulated, from the least to the greatest rate [-]
ANSWER_USD = 1e3  # worth of a correct answer within a budget: more than any GPU that could bring one [USD]


@dataclass(frozen=True, slots=True)
class Period:
    """A piece of time with one rate."""

    start_s: float  # from the beginning of the day [s]
    duration_s: float  # [s]
    rate: float  # [requests/s]


@dataclass(frozen=True, slots=True)
class Switch:
    """What happens between a period and the one before."""

    started: int  # GPUs of replicas that start [-]
    stopped: int  # GPUs of replicas that stop [-]
    held: int  # GPUs while both are up, during the lead [-]
    lead_s: float  # longest time before the period at which a replica is asked for [s]
    usd: float  # of GPUs that do not serve yet [USD]


def periods(law: Arrivals | None, rate: float | None) -> list[Period]:
    """Return the pieces of a scenario's arrivals, scaled to a mean rate if one is given.

    Raises
    ------
    InputError
        If the arrivals are not piecewise.
    """
    if law is None or law.kind != "piecewise" or law.rates is None or law.durations_s is None:
        way_out = "Give arrivals: {kind: piecewise, rates: [...], durations_s: [3600]} with one rate an hour."
        refuse("traffic.arrivals.kind", "must be piecewise to plan a day", law.kind if law else "poisson", way_out)
    lasting = np.broadcast_to(law.durations_s, len(law.rates)).astype(float)
    begin = np.concatenate([[0.0], np.cumsum(lasting)[:-1]])
    mean = float(lasting @ np.array(law.rates) / lasting.sum())
    factor = 1.0 if rate is None else rate / mean
    return [Period(float(b), float(d), r * factor) for b, d, r in zip(begin, lasting, law.rates, strict=True)]


def plan_day(
    scenario: Scenario,
    folder: Path,
    profile: str | None = None,
    seed: int | None = None,
    progress: Progress = silent,
    means: Means | None = None,
) -> dict[str, Any]:
    """Return the plan of a scenario's day with the keys of ``tierwise plan --day --format json``.

    Raises
    ------
    InputError
        If the scenario's arrivals are not piecewise, or something is not there or does not make sense.
    InfeasibleError
        If a piece has no plan within the constraints, or two that follow each other do not fit the fleet together.
    """
    start = time.perf_counter()
    check_plannable(scenario)
    pieces = periods(scenario.traffic.arrivals, scenario.traffic.rate)
    used_seed = scenario.search.seed if seed is None else seed
    progress("enumerating", 0, 1)
    problem = resolve(scenario, folder, profile, used_seed)
    space = enumerate_space(problem)
    day = Day(problem, space, pieces, used_seed)
    analytic = time.perf_counter()
    with ledger(problem, used_seed, means or Means()) as kept:
        checked, runs = _settled(day, kept, progress)
    planned = time.perf_counter()
    result = _result(scenario, day, checked, runs, used_seed)
    result["wall_s"] = {
        "enumerating": analytic - start,
        "planning": day.wall_s,
        "simulating": planned - analytic - day.wall_s,
        "total": time.perf_counter() - start,
    }
    return result


class Day:
    """The pieces of a day, and the best chain of plans as far as is known what replicas bear."""

    def __init__(self, problem: Problem, space: Space, pieces: Sequence[Period], seed: int) -> None:
        self.problem, self.space, self.pieces, self.seed = problem, space, list(pieces), seed
        self.floor = quality_floor(problem)
        law = problem.scenario.traffic.arrivals
        self.repeats = law is not None and law.repeat
        self.problems = [
            _at(problem, _evenly(problem.workload, np.random.default_rng([seed, 4, i])), p.rate) if p.rate > 0 else None
            for i, p in enumerate(self.pieces)
        ]
        self.search = Search(problem, space, self.floor)  # keeps what is known of capacities
        self.fronts = [list(self.search.rules(t, self.search.prices(t))) for t in self.search.subsets()]
        self.plans: list[Candidate | None] = []  # of each piece; None where nothing comes
        self.leading: list[list[Candidate]] = []  # feasible plans of each piece, best first
        self.wall_s = 0.0  # spent on planning [s]
        self.plan()

    def plan(self) -> None:
        """Choose the plans of all pieces with what is now known of capacities."""
        start = time.perf_counter()
        at_rate_of = {p.rate: (p, problem) for p, problem in zip(self.pieces, self.problems, strict=True) if problem}
        known = {rate: self._of(piece, problem, None) for rate, (piece, problem) in at_rate_of.items()}
        top = self.pieces[self.peak].rate
        alike = {id(g.service) for g in known[top][0].groups}
        for rate, (piece, problem) in at_rate_of.items():
            known[rate] += self._of(piece, problem, alike) if rate != top else []
        self.leading = [known.get(p.rate, []) if p.rate > 0 else [] for p in self.pieces]
        self.plans = self._chain()
        self.wall_s += time.perf_counter() - start

    @property
    def peak(self) -> int:
        """Index of the first piece of the greatest rate."""
        return int(np.argmax([p.rate for p in self.pieces]))

    def _of(self, piece: Period, problem: Problem, only: set[int] | None) -> list[Candidate]:
        """Return the leading plans of a piece; ``only`` on some services, where that is possible at all."""
        capacity = self.search.known_capacity()
        if only is not None:
            capacity = tuple(
                np.where([id(s) in only for s in of], c, 0.0)
                for of, c in zip(self.space.services, capacity, strict=True)
            )
        search = Search(problem, replace(self.space, capacity=capacity), self.floor)
        try:
            found = best_of(search, [c for front in self._fronts(only) for c in search.carried(front)])
        except InfeasibleError as error:
            if only is not None:
                return []
            raise InfeasibleError(f"from {clock(piece.start_s)} on, {error}") from None
        return found[:LEADING]

    def _fronts(self, only: set[int] | None) -> list[list[Rule]]:
        if only is None:
            return self.fronts
        able = {i for i, of in enumerate(self.space.services) if any(id(s) in only for s in of)}
        return [front for front in self.fronts if front and set(front[0].tiers) <= able]

    def _chain(self) -> list[Candidate | None]:
        """Return the plans whose day is best; from the last piece back to the first where pieces repeat."""
        options: list[list[Candidate | None]] = [list(of) or [None] for of in self.leading]
        worth = [np.array([self._worth(p, c) for c in of]) for p, of in zip(self.pieces, options, strict=True)]
        steps = self._steps(options)
        if not self.repeats:
            steps[-1] = np.zeros_like(steps[-1])
        best: tuple[float, list[int]] = (np.inf, [])
        for first in range(len(options[0])):
            total, chosen = _shortest(worth, steps, first)
            if total < best[0]:
                best = total, chosen
        if not np.isfinite(best[0]):
            raise InfeasibleError(self._no_way(options))
        return [of[i] for of, i in zip(options, best[1], strict=True)]

    def _no_way(self, options: list[list[Candidate | None]]) -> str:
        """Say which two pieces do not fit the fleet together, at the best plans of each."""
        held = [self.switch(a[0], b[0]).held for a, b in zip(options, options[1:] + options[:1], strict=True)]
        worst = int(np.argmax(held))
        gpus = sum(pool.gpus for pool in self.problem.pools)
        at = self.pieces[(worst + 1) % len(self.pieces)].start_s
        return (
            f"the plans before and after {clock(at)} do not fit the fleet together while replicas load: they hold "
            f"{held[worst]} GPUs; `fleet.gpus` is {gpus}. The nearest plan has fleet.gpus = {held[worst]}, or no "
            "`autoscaling`."
        )

    def _worth(self, piece: Period, candidate: Candidate | None) -> float:
        """Return what a plan of a piece costs, less what its correct answers are worth [USD]."""
        if candidate is None:
            return 0.0
        objective = self.problem.scenario.objective
        lam = objective.lambda_usd if objective is not None else None
        if objective is not None and objective.budget_usd_per_1000 is not None:
            lam = ANSWER_USD
        requests = piece.rate * piece.duration_s
        return requests * (candidate.cost - (lam * candidate.rule.quality if lam else 0.0))

    def _steps(self, options: list[list[Candidate | None]]) -> list[Array]:
        """Return what each change from a piece to the next costs, inf where both do not fit the fleet together [USD].

        One array (plans before, plans after) for each piece; the last one leads back to the first piece.
        """
        services = list({k: s for of in options for c in of for k, (s, _) in _replicas(c).items()}.values())
        pools = self.problem.pools
        own = [self.problem.pool(s.deployment) for s in services]
        gpus = np.array([[s.gpus * (pool is p) for p in pools] for s, pool in zip(services, own, strict=True)])
        fleet = np.array([p.gpus for p in pools])
        lead = np.array([self.lead_s(s) for s in services])
        price_of = lead * np.array([s.gpus * pool.price for s, pool in zip(services, own, strict=True)])
        counts = [np.array([[_replicas(c).get(id(s), (s, 0))[1] for s in services] for c in of]) for of in options]
        steps = []
        for before, after in zip(counts, counts[1:] + counts[:1], strict=True):
            up = np.maximum(after[None] - before[:, None], 0)
            held = np.maximum(after[None], before[:, None]) @ gpus
            fits = (held <= fleet).all(axis=2) | ~((up > 0) & (lead > 0)).any(axis=2)
            steps.append(np.where(fits, up @ price_of, np.inf))
        return steps

    def switch(self, before: Candidate | None, after: Candidate | None) -> Switch:
        """Return what it takes to go from one plan to the next."""
        old, new = _replicas(before), _replicas(after)
        up = {k: max(n - old.get(k, (s, 0))[1], 0) for k, (s, n) in new.items()}
        down = {k: max(n - new.get(k, (s, 0))[1], 0) for k, (s, n) in old.items()}
        leads = {k: self.lead_s(new[k][0]) for k, n in up.items() if n > 0}
        usd = sum(
            up[k] * new[k][0].gpus * self.problem.pool(new[k][0].deployment).price * lead for k, lead in leads.items()
        )
        return Switch(
            started=sum(n * new[k][0].gpus for k, n in up.items()),
            stopped=sum(n * old[k][0].gpus for k, n in down.items()),
            held=sum(n * s.gpus for s, n in _held(before, after)),
            lead_s=max(leads.values(), default=0.0),
            usd=float(usd),
        )

    def lead_s(self, service: Service) -> float:
        """Return how long before it serves a replica must be asked for; 0 where nothing is known of it [s]."""
        scaling = self.problem.scenario.autoscaling
        return 0.0 if scaling is None else scaling.provision_s + load_seconds(service, scaling.loading)

    def switches(self) -> list[Switch]:
        """Return what happens at the beginning of each piece; at the first, nothing where pieces do not repeat."""
        before = [self.plans[-1] if self.repeats else self.plans[0], *self.plans[:-1]]
        return [self.switch(a, b) for a, b in zip(before, self.plans, strict=True)]


def _evenly(workload: Workload, rng: np.random.Generator) -> Workload:
    """Return the same requests as a Poisson process, at one a second."""
    return replace(workload, arrival=poisson(1.0, workload.requests, rng))


def _at(problem: Problem, flat: Workload, rate: float) -> Problem:
    traffic = problem.scenario.traffic.model_copy(update={"arrivals": None, "rate": rate})
    scenario = problem.scenario.model_copy(update={"traffic": traffic})
    return replace(problem, scenario=scenario, workload=at_rate(flat, rate))


def _replicas(candidate: Candidate | None) -> dict[int, tuple[Service, int]]:
    return {} if candidate is None else {id(g.service): (g.service, g.replicas) for g in candidate.groups}


def _held(before: Candidate | None, after: Candidate | None) -> list[tuple[Service, int]]:
    """Return the replicas of each service while those that start load and those that stop still serve."""
    old, new = _replicas(before), _replicas(after)
    both = {k: s for k, (s, _) in (old | new).items()}
    return [(s, max(old.get(k, (s, 0))[1], new.get(k, (s, 0))[1])) for k, s in both.items()]


def _shortest(worth: list[Array], steps: list[Array], first: int) -> tuple[float, list[int]]:
    """Return the least sum of a chain that begins and, by the last step, ends with option ``first``; and the chain."""
    so_far = np.full(len(worth[0]), np.inf)
    so_far[first] = worth[0][first]
    back: list[NDArray[np.intp]] = []
    for own, step in zip(worth[1:], steps[:-1], strict=True):
        through = so_far[:, None] + step
        back.append(through.argmin(axis=0))
        so_far = through.min(axis=0) + own
    so_far = so_far + steps[-1][:, first]
    at = int(so_far.argmin())
    chain = [at]
    for of in reversed(back):
        chain.append(int(of[chain[-1]]))
    return float(so_far.min()), chain[::-1]


# ---------------------------------------------------------------------------------------------------------------------
# What replicas bear, and a sample of pieces, by simulation
# ---------------------------------------------------------------------------------------------------------------------


def _settled(day: Day, kept: Ledger, progress: Progress) -> tuple[dict[int, dict[str, Any]], int]:
    """Plan until the replicas of all plans bear their loads in simulation and a sample of pieces keeps the SLOs.

    Returns the simulated figures of the sample by piece, and how many runs that took.
    """
    known: set[int] = set()
    runs = 0
    for attempt in range(TRIES):
        progress("planning", attempt, TRIES)
        new = _unknown(day, known)
        tasks = {f"day: {day.search.label(g)}": _capacity_task(day, g) for g in new}
        for group, bears in zip(new, kept.simulations(simulated_capacity, tasks), strict=True):
            known.add(id(group.service))
            day.search.measure(group, bears)
            runs += 1
        if new:
            day.plan()
            if _unknown(day, known):
                continue
        checked, short = _check(day, kept, progress)
        runs += len(checked)
        if not short:
            return checked, runs
        for group in short:
            day.search.lower_capacity(group, CAPACITY_STEP)
        day.plan()
    raise InfeasibleError(
        f"no plan of the day keeps the SLOs in simulation ({runs} runs). The nearest plan used "
        f"{max(c.gpus for c in day.plans if c)} GPUs at its peak; relax `slo`."
    )


def _unknown(day: Day, known: set[int]) -> list[Group]:
    """Return one group of each service in use whose capacity was not simulated, in the order of the day."""
    groups = {id(g.service): g for c in day.plans if c is not None for g in c.groups}
    return [g for k, g in groups.items() if k not in known]


def _capacity_task(day: Day, group: Group) -> tuple[Service, Workload, Slo, float, int]:
    problem = next(p for p in day.problems if p is not None)
    sample = problem.workload.take(slice(CAPACITY_REQUESTS))
    return group.service, sample, problem.scenario.slo, day.search.capacity(group), day.seed


def _check(day: Day, kept: Ledger, progress: Progress) -> tuple[dict[int, dict[str, Any]], list[Group]]:
    """Return the simulated figures of a sample of pieces, greatest rate first, to the first that misses an SLO.

    With them the groups that miss it there; the loads of replicas differ little between pieces.
    """
    checked: dict[int, dict[str, Any]] = {}
    sample = sampled([p.rate for p in day.pieces])[::-1]
    for done, i in enumerate(sample):
        progress("simulating", done, len(sample))
        plan, problem = day.plans[i], day.problems[i]
        assert plan is not None
        assert problem is not None
        settled = replace(plan, e2e_s=_answer_s(day, plan))
        [checked[i]] = kept.simulations(simulated_plan, {_label(day, i, plan): (problem, settled, day.seed + i)})
        short = missed(checked[i], plan, problem)
        if short:
            return checked, short
    return checked, []


def _label(day: Day, index: int, plan: Candidate) -> str:
    groups = ", ".join(f"{g.replicas} x {day.search.label(g)}" for g in plan.groups)
    return f"day: {index} {groups}, right {plan.rule.quality!r}, visits {plan.rule.visits.tolist()}"


def _answer_s(day: Day, plan: Candidate) -> float:
    visits = dict(zip(plan.rule.tiers, plan.rule.visits, strict=True))
    return sum(float(visits[g.tier]) * day.search.e2e(g) for g in plan.groups)


def sampled(rates: Sequence[float], count: int = CHECKED) -> list[int]:
    """Return the pieces that are simulated: evenly by the rank of their rate, the least and the greatest among them.

    Examples
    --------
    >>> sampled([5.0, 0.0, 1.0, 9.0, 7.0, 3.0], 3)
    [2, 0, 3]
    """
    order = [int(i) for i in np.argsort(rates, kind="stable") if rates[i] > 0]
    ranks = np.unique(np.rint(np.linspace(0, len(order) - 1, min(count, len(order)))).astype(int))
    return [order[r] for r in ranks]


# ---------------------------------------------------------------------------------------------------------------------
# The result
# ---------------------------------------------------------------------------------------------------------------------


def _result(scenario: Scenario, day: Day, checked: dict[int, dict[str, Any]], runs: int, seed: int) -> dict[str, Any]:
    rows = [_row(day, i, switch, checked.get(i)) for i, switch in enumerate(day.switches())]
    total, static = _total(day, rows), _static(day)
    result: dict[str, Any] = {
        "scenario": scenario.name,
        "feasible": True,
        "periods": rows,
        "day": total,
        "static": static,
        "saved": 1 - total["usd"] / static["usd"],
        "checked": [_compared(rows[i], checked[i]) for i in sorted(checked)],
        "traffic": explain.traffic(day.problem) | {"requests_per_s": total["requests"] / total["duration_s"]},
        "autoscaling": None if scenario.autoscaling is None else scenario.autoscaling.model_dump(mode="json"),
        "evaluated": {"plans": sum(len(of) for of in day.leading), "simulated": runs},
        "provenance": {
            "step_time": joined_names(p.profile.provenance for p in day.problem.pools),
            "profile": joined_names(p.profile.name for p in day.problem.pools),
            "quality": scenario.quality.source if scenario.quality else None,
            "traffic": day.problem.workload.source,
            "seed": seed,
        },
    }
    result["explanation"] = sentences(result)
    return result


def _row(day: Day, index: int, switch: Switch, simulated: dict[str, Any] | None) -> dict[str, Any]:
    piece, plan, problem = day.pieces[index], day.plans[index], day.problems[index]
    row: dict[str, Any] = {
        "start_s": piece.start_s,
        "duration_s": piece.duration_s,
        "requests_per_s": piece.rate,
        "gpus": plan.gpus if plan else 0,
        "started_gpus": switch.started,
        "stopped_gpus": switch.stopped,
        "held_gpus": switch.held if switch.lead_s > 0 else (plan.gpus if plan else 0),
        "lead_s": switch.lead_s,
        "switching_usd": switch.usd,
    }
    if plan is None or problem is None:
        idle: dict[str, Any] = {
            "usd_per_hour": 0.0,
            "usd_per_1000_requests": None,
            "quality": None,
            "used": 0.0,
            "tiers": [],
        }
        return row | idle | dict.fromkeys(("first_stops", "stop_rule", "lambda_interval", "predicted", "simulated"))
    predicted = explain.predicted(problem, day.space, plan)
    tiers = explain.tiers(problem, day.space, plan)
    for tier, own in zip(tiers, predicted["tiers"], strict=True):
        tier |= {"mean_batch": own["mean_batch"], "draft_length_at_mean_batch": length_at(tier, own["mean_batch"])}
    vertices = hull(day.leading[index])
    interval = lambda_of(plan, vertices)
    return row | {
        "usd_per_hour": predicted["usd_per_hour"],
        "usd_per_1000_requests": predicted["usd_per_1000_requests"],
        "quality": predicted["quality"],
        "used": float(day.search.used(plan).max()),
        "tiers": tiers,
        "first_stops": explain.first_stops(plan.rule),
        "stop_rule": explain.stop_rule(plan.rule),
        "lambda_interval": None if interval is None else [x if np.isfinite(x) else None for x in interval],
        "predicted": predicted,
        "simulated": simulated,
    }


def length_at(tier: dict[str, Any], batch: float) -> int:
    """Return the draft length of a tier at a batch, 0 without a draft [tokens]."""
    n, schedule = max(round(batch), 1), tier["schedule"]
    return next((g for _, end, g in schedule if n <= end), schedule[-1][2] if schedule else 0)


def _total(day: Day, rows: list[dict[str, Any]]) -> dict[str, Any]:
    requests = [p.rate * p.duration_s for p in day.pieces]
    serving = sum(r["usd_per_hour"] * r["duration_s"] / 3600 for r in rows)
    switching = sum(r["switching_usd"] for r in rows)
    right = [n * c.rule.quality for n, c in zip(requests, day.plans, strict=True) if c is not None]
    seconds = sum(p.duration_s for p in day.pieces)
    return {
        "duration_s": seconds,
        "requests": sum(requests),
        "usd": serving + switching,
        "switching_usd": switching,
        "usd_per_1000_requests": 1000 * (serving + switching) / sum(requests),
        "gpu_hours": sum(r["gpus"] * r["duration_s"] / 3600 for r in rows),
        "least_gpus": min(r["gpus"] for r in rows),
        "peak_gpus": max(r["gpus"] for r in rows),
        "held_gpus": max(r["held_gpus"] for r in rows),
        "started_gpus": sum(r["started_gpus"] for r in rows),
        "quality": sum(right) / sum(requests) if day.problem.outcomes is not None else None,
    }


def _static(day: Day) -> dict[str, Any]:
    """Return the best plan of the peak, kept up all day."""
    plan, problem = day.leading[day.peak][0], day.problems[day.peak]
    assert problem is not None
    seconds = sum(p.duration_s for p in day.pieces)
    requests = sum(p.rate * p.duration_s for p in day.pieces)
    usd = price(problem, plan.groups) * seconds
    return {
        "gpus": plan.gpus,
        "usd": usd,
        "usd_per_1000_requests": 1000 * usd / requests,
        "quality": plan.rule.quality if day.problem.outcomes is not None else None,
        "tiers": [f"{g.replicas} x {g.service.name}{problem.where(g.service.deployment)}" for g in plan.groups],
    }


def _compared(row: dict[str, Any], simulated: dict[str, Any]) -> dict[str, Any]:
    """Return predicted beside simulated figures of a piece, with the intervals of both."""
    own = row["predicted"]
    low, high = own["tpot_interval_s"]
    return {
        "start_s": row["start_s"],
        "requests_per_s": row["requests_per_s"],
        "fleet_share": simulated["fleet_share"],
        "requests": simulated["requests"],
        "tpot_mean_s": {
            "predicted": own["tpot_mean_s"],
            "predicted_interval": own["tpot_interval_s"],
            "simulated": simulated["tpot_s"]["mean"],
            "simulated_interval": simulated["tpot_s"]["interval"],
            "inside": low <= simulated["tpot_s"]["mean"] <= high,
        },
        "ttft_p99_s": {"predicted": own["ttft_p99_s"], "simulated": simulated["ttft_s"]["p99"]},
        "e2e_mean_s": {
            "predicted": own["e2e_mean_s"],
            "simulated": simulated["e2e_s"]["mean"],
            "simulated_interval": simulated["e2e_s"]["interval"],
        },
        "quality": {
            "predicted": own["quality"],
            "simulated": simulated["quality"]["mean"] if simulated["quality"] else None,
            "simulated_interval": simulated["quality"]["interval"] if simulated["quality"] else None,
        },
        "usd_per_1000_requests": {
            "predicted": own["usd_per_1000_requests"],
            "simulated": simulated["cost"]["usd_per_1000_requests"],
            "simulated_interval": simulated["cost"]["usd_per_1000_requests_interval"],
        },
        "status": simulated["status"],
    }


def sentences(result: dict[str, Any]) -> list[str]:
    """Return the day in sentences: what it costs, against what, how it switches, how far to trust it."""
    day, static = result["day"], result["static"]
    hours = day["duration_s"] / 3600
    quality = "" if day["quality"] is None else f", quality {day['quality']:.4f} against {static['quality']:.4f}"
    said = [
        f"{hours:g} hours from {day['least_gpus']} to {day['peak_gpus']} GPUs cost {day['usd']:,.0f} USD, "
        f"{day['usd_per_1000_requests']:.3f} per 1000 requests.",
        f"The best plan of the peak, up all day on {static['gpus']} GPUs, costs {static['usd']:,.0f} USD "
        f"({static['usd_per_1000_requests']:.3f} per 1000): following the load saves {result['saved']:.0%}{quality}.",
        _switching(result),
    ]
    inside = [c for c in result["checked"] if c["tpot_mean_s"]["inside"]]
    said.append(
        f"{len(result['checked'])} of {len(result['periods'])} pieces were simulated and keep the SLOs; mean TPOT lies "
        f"inside the predicted interval in {len(inside)} of them."
    )
    said.append(
        "Each piece is taken in its own steady state; requests that a replica still serves when it is stopped are not "
        "counted."
    )
    return said


def _switching(result: dict[str, Any]) -> str:
    day = result["day"]
    if result["autoscaling"] is None:
        return (
            f"{day['started_gpus']} GPUs start in the course of it, taken as instant and free: give `autoscaling` "
            "(provision_s and loading) to count them."
        )
    lead = max(r["lead_s"] for r in result["periods"])
    return (
        f"{day['started_gpus']} GPUs start in the course of it, up to {lead:.0f} s ahead of their piece: "
        f"{day['switching_usd']:,.0f} USD of the cost, and {day['held_gpus']} GPUs at once at most."
    )

"""Plans put to the test: ranked analytically, their replicas simulated for a while, the best simulated until sure.

1. *Analytic.* Cost and quality of a plan are known; whether it keeps the SLOs is not. Services that were not simulated
   are taken to bear ``HOPE`` times what they do analytically, so that no good plan is ranked too low to be looked at.
2. *Short.* What a replica bears is simulated for the services of the leading plan; plans are ranked anew, until all
   services of the leader were simulated.
3. *Long.* The leader runs the scenario's own requests, a large fleet a slice of itself (:mod:`planner.slices`). If it
   breaks an SLO there it is out; if not, that may be luck, and it runs those of other seeds until each of its limits is
   known to be kept or broken (:mod:`planner.selection`). A plan that is out tells what its replicas bear under the
   arrivals they get there, and plans are ranked anew. Dearer plans need no simulation: their cost is known.
4. *Best of equals.* Plans that differ from it in one service on the same GPUs cost the same and are as often right; of
   those the one with the least mean time to the final answer is selected, on the same requests and random numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from simulator import metrics
from simulator.cluster import ClusterRecords, replace_requests
from simulator.workload import Workload
from theory.errors import InfeasibleError
from theory.queueing import ttft_quantile

from .build import Problem, redrawn
from .figures import in_order, measured, times_of
from .frontier import worth_allocating
from .replications import seeds
from .scenario import Slo
from .search import Candidate, Group, Rule, Search, best_of
from .selection import SOURCE, Verdict, best, keeps, spent
from .selection import Rule as Band
from .simulate import measured_capacity, missed, run, simulate_slice, simulated_capacity
from .slices import fleet_slice
from .space import P99, occupancy
from .storage import Ledger

CAPACITY_REQUESTS = 6000  # of the scenario, simulated at each rate to find what a replica bears [-]
HOPE = 1.05  # over analytic capacity, more than any service reached in studies/capacity_without_simulation [-]
BATCHES = metrics.BATCHES  # observations a run gives: means of as many equal parts of its requests [-]
LATE = 0.01  # share of visits that may exceed the TTFT of `slo.ttft_p99_s`, by what a 99th percentile is [-]
LATE_TOLERANCE = 0.005  # of it, that makes no difference: a 98.5th percentile, or a load one or two percent lower [-]
TPOT_TOLERANCE = 0.02  # of `slo.tpot_mean_s` [-]
E2E_TOLERANCE = 0.05  # of the mean time to the final answer [-]
RIVAL = 1.15  # analytic time to the final answer of a plan worth comparing, over that of the fastest [-]
RUNS = 16  # of one plan at most: what is open then is judged by its mean, and said to be [-]
STABLE = 0.995  # of the analytic stability limit: beyond it nothing is predicted, whatever simulation bears [-]
LOWERED = (0.7, 0.99)  # of the load a service fails at, the least and the most it is taken to bear [-]
SLOWER = 0.95  # the same where only the time to the final answer is too long [-]
RULE = (
    "plans are ranked by cost and quality, which are known; the best that keeps the SLOs in the scenario's own run "
    "and, at the stated confidence, over others is taken, and of plans equal in both the fastest; a sum of batch means "
    "tells as it leaves a closing band"
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What simulations need besides the plan."""

    problem: Problem
    folder: Path  # where relative paths of the scenario start
    seed: int
    kept: Ledger
    progress: Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Verified:
    """The best plan that keeps the SLOs in simulation, and how that came to be known."""

    chosen: Candidate
    simulated: dict[str, Any]  # figures of the scenario's own run
    candidates: list[Candidate]  # all plans, on the capacities known in the end
    shortlist: list[dict[str, Any]]
    selection: dict[str, Any]
    simulations: int


@dataclass(slots=True, eq=False)
class Tested:
    """A plan and what its runs showed."""

    plan: Candidate
    error: float  # probability of a wrong verdict [-]
    runs: list[dict[str, Any]] = field(default_factory=list)
    requests: int = 0
    why: str = ""

    def observations(self, name: str) -> list[float]:
        """Return the batch means of a figure over all runs [-] or [s]."""
        return [x for r in self.runs for x in r["batches"][name]]

    def limits(self, slo: Slo) -> list[tuple[str, float, float]]:
        """Return name, limit and tolerance of each figure that has a limit [-] or [s]."""
        found = []
        for name in self.runs[0]["batches"]:
            if name.startswith("late"):
                found.append((name, LATE, LATE_TOLERANCE))
            elif name.startswith("tpot"):
                found.append((name, slo.tpot_mean_s, TPOT_TOLERANCE * slo.tpot_mean_s))
        return found

    def verdicts(self, slo: Slo) -> dict[str, Verdict]:
        """Return what is known of each limit."""
        limits = self.limits(slo)
        band = Band(BATCHES, self.error / max(len(limits), 1))
        return {name: keeps(self.observations(name), limit, tol, band) for name, limit, tol in limits}

    @property
    def overloaded(self) -> bool:
        """Whether a run was."""
        return any(r["figures"]["status"] != "steady" for r in self.runs)


def verified(search: Search, rules: list[Rule], asked: Asked) -> Verified:
    """Return the best plan of some stop rules that keeps the SLOs in simulation.

    Raises
    ------
    InfeasibleError
        If none of those tried does.
    """
    problem, tries = asked.problem, 6 * asked.problem.scenario.search.shortlist
    error = 1 - problem.scenario.search.confidence
    search.hope(HOPE)
    tests: list[Tested] = []
    refuted: list[tuple[Candidate, str]] = []
    services, rules, filled = 0, worth_allocating(rules), True  # the enumeration has just filled what replicas bear
    more: list[Rule] = []
    while len(tests) < tries:
        built = [c for c in map(search.allocate, [*rules, *more]) if c is not None]
        try:
            first = search.settle(best_of(search, built)[0])
        except InfeasibleError as reason:
            raise InfeasibleError(f"{reason} (What replicas bear in simulation is counted.)") from None
        new = [g for g in first.groups if not search.is_simulated(g)]
        asked.progress("simulating", len(tests) + services, tries)
        if new:
            services, filled = services + len(new), False
            short = _measure(search, new, asked)
            if short:
                refuted.append((first, short))
            continue
        if not filled:  # mixtures that fill what is now known of the replicas
            more, filled = worth_allocating([c.rule for c in search.enumerate()]), True
            continue
        test = Tested(first, spent(error / 2, len(tests) + 1))
        tests.append(test)
        if _passes(search, test, asked):
            chosen, rivals = _fastest(search, test, error / 2, asked)
            every = [*tests[:-1], chosen, *rivals]
            return _found(search, chosen, every, (refuted, built, services), asked)
        _lower(search, test, asked)
        filled = False
    raise InfeasibleError(
        f"none of the {len(tests)} best plans keeps the SLOs in simulation. "
        f"The nearest plan used {first.gpus} GPUs; raise `search.shortlist`, or relax `slo`."
    )


def _measure(search: Search, groups: list[Group], asked: Asked) -> str:
    """Simulate what replicas bear; return in words what they bear less than hoped."""
    problem = asked.problem
    sample = first_requests(problem.workload, CAPACITY_REQUESTS)
    tasks = {
        f"capacity: {search.label(g)}": (g.service, sample, problem.scenario.slo, search.analytic(g), asked.seed)
        for g in groups
    }
    less = []
    limits = occupancy([g.service for g in groups], np.full(len(groups), 1e-9), search.space.load).rate_limit
    found = asked.kept.simulations(simulated_capacity, tasks)
    for group, simulated, limit in zip(groups, found, limits.tolist(), strict=True):
        bears = min(simulated, STABLE * limit)
        search.measure(group, bears)
        if bears < group.rate:
            name = problem.scenario.tiers[group.tier].name
            less.append(
                f"a replica of {name} bears {bears:.3g} requests/s in simulation, it would need {group.rate:.3g}"
            )
    return "; ".join(less)


def _passes(search: Search, test: Tested, asked: Asked) -> bool:
    """Run a plan until one of its limits is known to be broken or all are known to be kept; return whether it is in."""
    if not test.runs:
        _run([test], search, asked)
    while not _broken(test, asked.problem):
        if "open" not in test.verdicts(asked.problem.scenario.slo).values() or len(test.runs) >= RUNS:
            return True
        _run([test], search, asked)
    return False


def _broken(test: Tested, problem: Problem) -> list[Group]:
    """Return the groups of a plan that break an SLO: in the scenario's own run, by all runs, or as a run is overloaded.

    By all runs: it is known to, or ``RUNS`` of them did not tell and their mean does.
    """
    slo, plan = problem.scenario.slo, test.plan
    verdicts, bad = test.verdicts(slo), set[str]()
    for name, limit, _ in test.limits(slo):
        last = len(test.runs) >= RUNS and verdicts[name] == "open"
        if verdicts[name] == "out" or (last and float(np.mean(test.observations(name))) > limit):
            bad.add(name.partition(" ")[2])
    for r in test.runs:
        bad |= {t["name"] for t in r["figures"]["tiers"] if t["status"] != "steady"}
    own = {g.tier for g in missed(test.runs[0]["figures"], plan, problem)}
    names = problem.scenario.tiers
    everything = "" in bad  # the time to the final answer
    return [g for g in plan.groups if everything or g.tier in own or names[g.tier].name in bad]


def _lower(search: Search, test: Tested, asked: Asked) -> None:
    """Note what the replicas that broke a limit bear under the arrivals they get in the plan."""
    problem, slo = asked.problem, asked.problem.scenario.slo
    broken = _broken(test, problem)
    visits_keep = not test.overloaded and all(v != "out" for n, v in test.verdicts(slo).items() if n != "late")
    if visits_keep and len(broken) == len(test.plan.groups) and "late" in test.runs[0]["batches"]:
        test.why = "the time to the final answer is too long"
        for group in broken:
            search.lower_capacity(group, SLOWER)
        return
    label = _label(search, test.plan)
    tasks = {f"capacity in {label}: {search.label(g)}": (problem, test.plan, g.tier, asked.seed) for g in broken}
    said = []
    for group, bears in zip(broken, asked.kept.simulations(_capacity_within, tasks), strict=True):
        low, high = LOWERED
        search.measure(group, min(max(bears, low * group.rate), high * group.rate))
        name = problem.scenario.tiers[group.tier].name
        said.append(
            f"{name} breaks an SLO at {group.rate:.3g} requests/s a replica and bears {search.capacity(group):.3g}"
        )
    test.why = "; ".join(said)


def _capacity_within(task: tuple[Problem, Candidate, int, int]) -> float:
    """Return what a replica of a tier bears under arrivals that have the pattern they have in a plan [requests/s]."""
    problem, plan, tier, seed = task
    part = fleet_slice(problem, plan, seed)
    groups = in_order(part.candidate)
    at = next(i for i, g in enumerate(groups) if g.tier == tier)
    records = run(part.problem, part.candidate, seed)
    visits, group = records.tiers[at], groups[at]
    assert visits is not None
    mine = np.arange(visits.arrival.size)[:: group.replicas][:CAPACITY_REQUESTS]
    if mine.size < 2 or visits.arrival[mine[-1]] <= visits.arrival[mine[0]]:
        return 0.0
    who = records.visitors[at][mine]
    stream = replace_requests(
        part.problem.workload, who, visits.arrival[mine] - visits.arrival[mine[0]], visits.output[mine]
    )
    return measured_capacity(group.service, stream, problem.scenario.slo, group.rate, seed)


def _fastest(search: Search, test: Tested, error: float, asked: Asked) -> tuple[Tested, list[Tested]]:
    """Return which of a plan and its equals on other services is the fastest, and the others."""
    equals = _equals(search, test.plan)
    rivals = [Tested(c, error / 2 / len(equals)) for c in equals]
    _run(rivals, search, asked)
    good = [test, *(t for t in rivals if not _broken(t, asked.problem))]
    while (winner := _selected(good, error / 2, search, asked)) is not test and not _passes(search, winner, asked):
        good.remove(winner)
    for t in (test, *rivals):
        if t is winner:
            continue
        if all(t is not g for g in good):
            t.why = "breaks an SLO in simulation"
            continue
        slower = float(np.mean(t.observations("e2e")) / np.mean(winner.observations("e2e"))) - 1
        t.why = f"costs as much and is right as often; mean time to the final answer {slower:+.1%} in simulation"
        if _differ(winner.plan, t.plan) == 1:
            search.beats(winner.plan, t.plan)
    return winner, [t for t in (test, *rivals) if t is not winner]


def _selected(good: list[Tested], error: float, search: Search, asked: Asked) -> Tested:
    """Return the plan with the least mean time to the final answer, running those that may have it."""
    tolerance = E2E_TOLERANCE * float(np.mean(good[0].observations("e2e")[:BATCHES]))
    alive = good
    while True:
        count = min(len(t.runs) for t in alive)
        seen = [t.observations("e2e")[: count * BATCHES] for t in good]
        alive = [good[i] for i in best(seen, tolerance, error, BATCHES).stay]
        if len(alive) == 1 or count >= RUNS:
            return min(alive, key=lambda t: float(np.mean(t.observations("e2e"))))
        _run([t for t in alive if len(t.runs) == count], search, asked)


def _equals(search: Search, plan: Candidate) -> list[Candidate]:
    """Return the plans that differ in one service, cost the same and are hardly slower analytically, fastest first."""
    visits = dict(zip(plan.rule.tiers, plan.rule.visits, strict=True))
    found = []
    for i, group in enumerate(plan.groups):
        for other in search.alike(group):
            if other.service is group.service:
                continue
            more = float(visits[group.tier]) * (search.e2e(other) - search.e2e(group))
            e2e = plan.e2e_s + more
            if e2e <= RIVAL * plan.e2e_s:
                found.append(replace(plan, groups=(*plan.groups[:i], other, *plan.groups[i + 1 :]), e2e_s=e2e))
    return sorted(found, key=lambda c: c.e2e_s)[: search.problem.scenario.search.shortlist - 1]


def _differ(a: Candidate, b: Candidate) -> int:
    return sum(x.service is not y.service for x, y in zip(a.groups, b.groups, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def _run(tests: list[Tested], search: Search, asked: Asked) -> None:
    """Give each plan one more run: the scenario's own requests first, then those of other seeds, the same for all."""
    tasks: dict[str, tuple[Problem, Candidate, int]] = {}
    for t in tests:
        number = len(t.runs)
        seed = asked.seed if number == 0 else seeds(asked.seed, RUNS)[number]
        problem = asked.problem if number == 0 else redrawn(asked.problem, asked.folder, seed)
        tasks[f"plan: {_label(search, t.plan)}, run {number}"] = problem, t.plan, seed
    for t, found in zip(tests, asked.kept.simulations(_simulated, tasks), strict=True):
        t.runs.append(found)
        t.requests += found["figures"]["requests"]


def _label(search: Search, plan: Candidate) -> str:
    groups = ", ".join(f"{g.replicas} x {search.label(g)}" for g in plan.groups)
    return f"{groups}, right {plan.rule.quality!r}, mixed {plan.rule.gamma!r}, visits {plan.rule.visits.tolist()}"


def _simulated(task: tuple[Problem, Candidate, int]) -> dict[str, Any]:
    found, part, records = simulate_slice(*task)
    return {"figures": found, "batches": batches(part.problem, part.candidate, records)}


def batches(problem: Problem, plan: Candidate, records: ClusterRecords) -> dict[str, list[float]]:
    """Return the batch means of a run past its warm-up, ``BATCHES`` equal parts of the visits or requests in order.

    ``late TIER``: share of visits whose TTFT exceeds the objective; ``tpot TIER``: mean TPOT [s]; ``late``: share of
    requests whose time to the final answer exceeds its objective, if it has one; ``e2e``: mean of that time [s]. A
    refused request is late.
    """
    slo = problem.scenario.slo
    kept = measured(problem, records)
    found: dict[str, list[float]] = {}
    for group, visits, who in zip(in_order(plan), records.tiers, records.visitors, strict=True):
        if visits is None:
            continue
        name = problem.scenario.tiers[group.tier].name
        counted = who >= kept[0]
        ttft, tpot = (x[counted] for x in times_of(visits))
        found[f"late {name}"] = _means(~(ttft <= slo.ttft_p99_s))
        found[f"tpot {name}"] = _means(tpot[(visits.output[counted] > 1) & ~visits.refused[counted]])
    e2e = (records.completion - records.arrival)[kept[0] :]
    if slo.e2e_p99_s is not None:
        found["late"] = _means(~(e2e <= slo.e2e_p99_s))
    return found | {"e2e": _means(e2e[np.isfinite(e2e)])}


def _means(values: Any) -> list[float]:
    """Return the means of equal parts; the mean of all in the place of each where there are too few for that."""
    x = np.asarray(values, dtype=float)
    if x.size < BATCHES:
        return [float(x.mean()) if x.size else 0.0] * BATCHES
    return [float(part.mean()) for part in np.array_split(x, BATCHES)]


def first_requests(workload: Workload, count: int) -> Workload:
    """Return the first requests of an open loop."""
    return workload.take(slice(count), clients=0, think_time=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# What is said of them
# ---------------------------------------------------------------------------------------------------------------------


def _found(
    search: Search,
    chosen: Tested,
    tests: list[Tested],
    known: tuple[list[tuple[Candidate, str]], list[Candidate], int],
    asked: Asked,
) -> Verified:
    refuted, built, services = known
    scenario = asked.problem.scenario
    sure = "open" not in chosen.verdicts(scenario.slo).values()
    rest = [(c, _no_better(chosen.plan, c)) for c in _others(search, [t.plan for t in tests], built)]
    chosen.why = (
        "keeps every SLO" if sure else f"keeps every SLO on average; {RUNS} runs did not tell at the stated confidence"
    )
    listed = [(t, "plan") for t in [chosen, *(t for t in tests if t is not chosen)]]
    listed += [(Tested(c, 0.0, why=why), "replicas") for c, why in refuted]
    listed += [(Tested(c, 0.0, why=why), "ranking") for c, why in rest]
    analytic = _predicted(search, [t.plan for t, _ in listed])
    rows = [
        _row(t, stage, figures_, t is chosen, asked.problem)
        for (t, stage), figures_ in zip(listed, analytic, strict=True)
    ]
    selection = {
        "confidence": scenario.search.confidence if sure else None,
        "rule": RULE,
        "source": SOURCE,
        "tolerance": {"late_share": LATE_TOLERANCE, "tpot": TPOT_TOLERANCE, "e2e_mean": E2E_TOLERANCE},
        "observations": f"means of {BATCHES} equal parts of each run past its warm-up",
        "capacity_margin": HOPE,
        "plans_tested": len(tests),
        "services_measured": services,
        "requests_simulated": sum(t.requests for t in tests),
    }
    simulations = services + sum(len(t.runs) for t in tests)
    return Verified(chosen.plan, chosen.runs[0]["figures"], built, rows, selection, simulations)


def _others(search: Search, tested: list[Candidate], built: list[Candidate]) -> list[Candidate]:
    """Return the next best plans of other deployments, each with its best rule, as many as there is room for."""
    room = max(search.problem.scenario.search.shortlist - len(tested), 1)
    known, found = {_deployed(c) for c in tested}, []
    for candidate in itertools.islice(best_of(search, built), 400):
        if _deployed(candidate) not in known:
            known.add(_deployed(candidate))
            found.append(search.settle(candidate))
        if len(found) == room:
            break
    return found


def _deployed(plan: Candidate) -> tuple[tuple[int, int], ...]:
    return tuple((g.tier, g.gpus) for g in plan.groups)


def _no_better(chosen: Candidate, other: Candidate) -> str:
    dearer = other.cost / chosen.cost - 1
    quality = "" if math.isnan(other.rule.quality) else f", quality {other.rule.quality:.4f}"
    cost = "costs as much" if abs(dearer) < 1e-9 else f"costs {abs(dearer):.1%} {'more' if dearer > 0 else 'less'}"
    return f"{cost}{quality}: ranked behind, whatever simulation says"


def _row(test: Tested, stage: str, predicted: dict[str, float | None], is_in: bool, problem: Problem) -> dict[str, Any]:
    """Return a row of the shortlist."""
    plan = test.plan
    keys = ("ttft_p99_s", "tpot_mean_s", "e2e_mean_s", "quality")
    figures_ = test.runs[0]["figures"] if test.runs else None
    simulated = None
    if figures_ is not None:
        simulated = {
            "ttft_p99_s": max(t["ttft_s"]["p99"] or 0.0 for t in figures_["tiers"]),
            "tpot_mean_s": figures_["tpot_s"]["mean"],
            "e2e_mean_s": figures_["e2e_s"]["mean"],
            "e2e_mean_interval_s": figures_["e2e_s"]["interval"],
            "quality": figures_["quality"]["mean"] if figures_["quality"] else None,
            "quality_interval": figures_["quality"]["interval"] if figures_["quality"] else None,
            "status": figures_["status"],
        }
    verdicts = test.verdicts(problem.scenario.slo) if test.runs else {}
    return {
        "in": is_in,
        "stage": stage,
        "why": test.why,
        "gpus": plan.gpus,
        "usd_per_1000_requests": 1000 * plan.cost,
        "tiers": [f"{g.replicas} x {g.service.name}{problem.where(g.service.deployment)}" for g in plan.groups],
        "predicted": predicted,
        "simulated": simulated,
        "difference": None if simulated is None else {k: _relative(simulated[k], predicted[k]) for k in keys},
        "requests_simulated": test.requests,
        "limits": [
            {
                "what": name,
                "mean": float(np.mean(test.observations(name))),
                "limit": limit,
                "tolerance": tolerance,
                "verdict": verdicts[name],
            }
            for name, limit, tolerance in (test.limits(problem.scenario.slo) if test.runs else ())
        ],
    }


def _predicted(search: Search, plans: list[Candidate]) -> list[dict[str, float | None]]:
    """Return the analytic figures of plans; none where a replica is unstable."""
    every = [g for plan in plans for g in plan.groups]
    state = occupancy([g.service for g in every], np.array([g.rate for g in every]), search.space.load)
    late, found, begin = ttft_quantile(state, P99), [], 0
    for plan in plans:
        at = slice(begin, begin := begin + len(plan.groups))
        visits = np.array([plan.rule.visits[plan.rule.tiers.index(g.tier)] for g in plan.groups])
        figures_ = {
            "ttft_p99_s": float(late[at].max()),
            "tpot_mean_s": float(visits @ state.tpot_s[at] / visits.sum()),
            "e2e_mean_s": float(visits @ state.e2e_s[at]),
            "quality": plan.rule.quality,
        }
        found.append({k: v if math.isfinite(v) else None for k, v in figures_.items()})
    return found


def _relative(simulated: float | None, predicted: float | None) -> float | None:
    return simulated / predicted - 1 if simulated is not None and predicted else None

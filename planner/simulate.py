"""Plans run request by request: what one replica bears, what a whole plan does, and whether it keeps the SLOs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from simulator import metrics
from simulator.cluster import ClusterRecords, Paths, TierSetup, decide, only, simulate_cluster
from simulator.engine import Records, is_compiled, simulate
from simulator.workload import Workload, at_rate
from theory import cascade
from theory.errors import InfeasibleError, refuse, require
from theory.memory import load_time
from theory.work import kv_bytes_per_token

from .build import Pool, Problem, joined_names, resolve
from .figures import STATUS_RULE, WARMUP_RULE, Tree, figures, in_order, joined, published, times_of
from .predict import draft_degrees
from .replications import replicate, seeds
from .requests import Column, request_columns
from .scenario import DeploymentChoice, Loading, Scenario, Slo, TierDeployment
from .search import Candidate, Group, Rule, Search, best_of, price, quality_floor, single, subset
from .service import Load, Service, build_service
from .slices import Slice, fleet_slice, of_fleet
from .space import capacities, enumerate_space, occupancy
from .timeline import Timeline, timeline

HEADROOM = (
    0.9  # of the analytic capacity, mostly within 10 % of the simulated (studies/capacity_without_simulation) [-]
)
LIKELY = (0.93, 1.06)  # shares of the analytic capacity between which the simulated one mostly lies [-]
WIDTH = 0.0085  # of the bracket of a replica's capacity in the end, as a share of the analytic one [-]


def measured_capacity(service: Service, workload: Workload, slo: Slo, guess: float, seed: int) -> float:
    """Return the greatest rate at which one replica keeps the SLOs in simulation; 0 if it never does [requests/s].

    Parameters
    ----------
    workload : Workload
        Requests whose lengths and pattern of arrivals are kept; the time axis is stretched to each rate tried.
    guess : float
        The analytic capacity; the answer lies between 0.3 and 1.3 times it [requests/s].
    """

    def good(share: float) -> bool:
        return keeps(run_at(service, workload, share * guess, seed), slo)

    low, high = LIKELY
    if not good(low):
        low, high = 0.3, low
        if not good(low):
            return 0.0
    elif good(high):
        low, high = high, 1.3
    while high - low > WIDTH:
        middle = (low + high) / 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low * guess


def run_at(service: Service, workload: Workload, rate: float, seed: int) -> Records:
    """Run one replica at an arrival rate [requests/s]."""
    return simulate(
        at_rate(workload, rate),
        service.table,
        service.deployment.limits,
        service.kv_tokens,
        service.schedule,
        service.acceptance,
        seed,
    )


def keeps(records: Records, slo: Slo) -> bool:
    """Return whether a run was steady and kept mean TPOT and p99 TTFT of a visit; a refused request breaks them."""
    if records.refused.any() or metrics.status(records) != "steady":
        return False
    ttft, tpot = times_of(records)
    return float(np.quantile(ttft, 0.99)) <= slo.ttft_p99_s and float(tpot.mean()) <= slo.tpot_mean_s


def simulate_candidate(problem: Problem, candidate: Candidate, seed: int) -> dict[str, Any]:
    """Return the simulated figures of a plan: the keys of ``tierwise simulate`` but for the time it took.

    A fleet too large for the requests of the scenario is simulated in part, ``fleet_share`` of it (:mod:`.slices`).
    """
    return simulate_slice(problem, candidate, seed)[0]


def simulate_slice(problem: Problem, candidate: Candidate, seed: int) -> tuple[dict[str, Any], Slice, ClusterRecords]:
    """Return :func:`simulate_candidate`, the part of the fleet that was run, and its requests."""
    part = fleet_slice(problem, candidate, seed)
    records = run(part.problem, part.candidate, seed)
    return published(of_fleet(figures(part.problem, part.candidate, records), part, candidate)), part, records


def simulated_plan(task: tuple[Problem, Candidate, int]) -> dict[str, Any]:
    """Return :func:`simulate_candidate` of a task that a process can be sent."""
    return simulate_candidate(*task)


def simulated_capacity(task: tuple[Service, Workload, Slo, float, int]) -> float:
    """Return :func:`measured_capacity` of a task that a process can be sent [requests/s]."""
    return measured_capacity(*task)


def run(problem: Problem, candidate: Candidate, seed: int) -> ClusterRecords:
    """Run the requests of a problem through a plan."""
    groups = {g.tier: g for g in candidate.groups}
    order = [i for i in candidate.rule.tiers if i in groups]
    setups = [_setup(problem, groups, i) for i in order]
    rng = np.random.default_rng([seed, 2])
    return simulate_cluster(problem.workload, setups, _paths(problem, candidate.rule, order, rng), seed)


def _setup(problem: Problem, groups: dict[int, Group], tier: int) -> TierSetup:
    group, names = groups[tier], [t.name for t in problem.scenario.tiers]
    s = group.service
    kv_from, kv_read_s = "", 0.0
    source = problem.scenario.tiers[tier].kv_from
    earlier = groups.get(names.index(source.tier)) if source else None
    if source and earlier and _draft_name(earlier.service) == _draft_name(s):
        kv_from, kv_read_s = source.tier, _kv_bytes(s) / source.bytes_per_s
    return TierSetup(
        names[tier],
        s.table,
        s.deployment.limits,
        s.kv_tokens,
        s.schedule,
        s.acceptance,
        group.replicas,
        s.gpus,
        group.routing,
        group.ready_s,
        kv_from,
        kv_read_s,
    )


def _draft_name(service: Service) -> str:
    return service.draft.model.name if service.draft else ""


def _kv_bytes(service: Service) -> float:
    """Return the bytes of keys and values of one token, of the target and its draft, each head once [byte/token]."""
    d, draft = service.deployment, service.draft
    models = [d.model] + ([draft.model] if draft else [])
    return sum(kv_bytes_per_token(m, d.kv_precision) for m in models)


def _paths(problem: Problem, rule: Rule, order: list[int], rng: np.random.Generator) -> Paths:
    count = problem.workload.requests
    if rule.outcomes is None:
        return only(0, 1, count)
    if rule.low is None:
        right = rng.random(count) < rule.quality
        return only(0, 1, count, right.astype(float))
    paths = decide(count, rule.outcomes, rule.low, rng, rule.high if rule.gamma > 0 else None, rule.gamma)
    used = [rule.tiers.index(i) for i in order]  # tiers that no request visits have no replicas
    place = np.full(len(rule.tiers), -1)
    place[used] = np.arange(len(used))
    return Paths(paths.visits[:, used], np.where(paths.answer >= 0, place[paths.answer], -1), paths.quality)


def missed(simulated: dict[str, Any], candidate: Candidate, problem: Problem) -> list[Group]:
    """Return the groups of a plan that break an SLO in simulation; all of them if only the time to the answer does."""
    slo = problem.scenario.slo
    bad = [
        group
        for group, tier in zip(in_order(candidate), simulated["tiers"], strict=True)
        if tier["status"] != "steady"
        or (tier["ttft_s"]["p99"] or 0.0) > slo.ttft_p99_s
        or (tier["tpot_s"]["mean"] or 0.0) > slo.tpot_mean_s
    ]
    if not bad and slo.e2e_p99_s is not None and simulated["e2e_s"]["p99"] > slo.e2e_p99_s:
        return list(candidate.groups)
    return bad


# ---------------------------------------------------------------------------------------------------------------------
# A scenario as it stands
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Task:
    """One replication of a plan: what it runs, and on which draws."""

    scenario: Scenario
    folder: Path  # where relative paths of the scenario start
    profile: str | None
    candidate: Candidate
    number: int  # from 0 [-]
    seed: int
    in_detail: bool  # also request by request and over time


@dataclass(frozen=True, slots=True, eq=False)
class Replication:
    """What one replication gave."""

    figures: Tree
    wall_s: float  # the engine's time [s]
    requests: tuple[Column, ...]  # empty unless in detail
    timeline: Timeline | None  # of the first one in detail


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """What ``tierwise simulate`` found: its JSON; in detail, each replication's requests and the first over time."""

    result: dict[str, Any]
    requests: tuple[tuple[Column, ...], ...] = ()
    timeline: Timeline | None = None


def simulate_scenario(
    scenario: Scenario,
    folder: Path,
    profile: str | None,
    seed: int | None,
    progress: Callable[[str, int, int], None],
    replications: int = 1,
    workers: int = 1,
) -> dict[str, Any]:
    """Return what happens when the deployment of a scenario serves its traffic; see :func:`simulation`."""
    return simulation(scenario, folder, profile, seed, progress, replications, workers).result


def simulation(
    scenario: Scenario,
    folder: Path,
    profile: str | None,
    seed: int | None,
    progress: Callable[[str, int, int], None],
    replications: int = 1,
    workers: int = 1,
    in_detail: bool = False,
) -> Simulation:
    """Return what happens when the deployment of a scenario serves its traffic.

    Without a deployment in the scenario it is the one that the analytic planner picks for the traffic of the seed.
    Replications differ in their requests (but for a trace, which is what it is), paths and acceptances.

    Parameters
    ----------
    replications : int
        Independent runs; their spread gives the intervals. One run has them from batch means [-].
    workers : int
        Processes; they do not change the result [-].
    in_detail : bool
        Whether to keep every request, and the first run over time.

    Raises
    ------
    InputError
        If the deployment names what is not there, or a closed loop is asked of several tiers.
    InfeasibleError
        If the deployment does not fit.
    """
    used_seed = scenario.search.seed if seed is None else seed
    given = seeds(used_seed, replications)
    progress("preparing", 0, 1)
    problem = resolve(scenario, folder, profile, used_seed)
    if scenario.deployment is not None:
        candidate = deployed(problem, scenario.deployment)
    else:
        require(
            scenario.traffic.clients == 0,
            "deployment",
            "must be given for a closed loop: there is no load to plan for",
            None,
        )
        candidate = analytic_candidate(problem)
    progress("simulating", 0, replications)
    tasks = [Task(scenario, folder, profile, candidate, i, s, in_detail) for i, s in enumerate(given)]
    if replications == 1:
        runs = [_replication(tasks[0], problem)]
    else:
        _compile(candidate.groups[0].service)  # once, not in every process
        runs = replicate(_replicate, tasks, workers, lambda done: progress("simulating", done, replications))
    progress("simulating", replications, replications)
    result = {"scenario": scenario.name, **published(joined([r.figures for r in runs]))}
    result |= {
        "intervals": {
            "level": metrics.LEVEL,
            "method": _method(scenario, replications),
            "replications": replications,
        },
        "rules": {"status": STATUS_RULE, "warmup": WARMUP_RULE},
        "provenance": {
            "step_time": joined_names(p.profile.provenance for p in problem.pools),
            "profile": joined_names(p.profile.name for p in problem.pools),
            "seed": used_seed,
            "traffic": problem.workload.source,
        },
        "wall_s": sum(r.wall_s for r in runs),
    }
    return Simulation(result, tuple(r.requests for r in runs) if in_detail else (), runs[0].timeline)


def _method(scenario: Scenario, replications: int) -> str:
    if replications == 1:
        return "batch means of one run"
    given = " of the one trace: its own chance is not in them" if scenario.traffic.trace else ""
    return f"Student's t over independent replications{given}"


def _replicate(task: Task) -> Replication:
    return _replication(task, resolve(task.scenario, task.folder, task.profile, task.seed))


def _replication(task: Task, problem: Problem) -> Replication:
    plan = task.candidate
    start = time.perf_counter()
    records = run(problem, plan, task.seed)
    wall = time.perf_counter() - start
    return Replication(
        figures(problem, plan, records),
        wall,
        request_columns(problem, plan, records, task.number) if task.in_detail else (),
        timeline(problem, plan, records) if task.in_detail and task.number == 0 else None,
    )


def _compile(service: Service) -> None:
    """Compile the engine if no disk has it yet."""
    if not is_compiled():
        simulate(Workload([0.0], [1], [1]), service.table, service.deployment.limits, service.kv_tokens)


def analytic_candidate(problem: Problem) -> Candidate:
    """Return the best candidate of the enumeration alone, with room for what the analytic model does not see."""
    space = enumerate_space(problem)
    careful = replace(space, capacity=tuple(HEADROOM * c for c in space.capacity))
    search = Search(problem, careful, quality_floor(problem))
    return search.settle(best_of(search, search.enumerate())[0])


def deployed(problem: Problem, choice: DeploymentChoice) -> Candidate:
    """Return the plan that a scenario's deployment describes.

    Raises
    ------
    InputError
        If a tier is named twice or unknown, or a draft or pool is.
    InfeasibleError
        If the deployment needs more GPUs than there are, or does not fit in memory.
    """
    load = Load.of(problem.workload)
    names = [t.name for t in problem.scenario.tiers]
    chosen = sorted(choice.tiers, key=lambda t: names.index(t.tier))
    services = [_deployed_service(problem, names.index(t.tier), t, load) for t in chosen]
    tiers = tuple(s.tier for s in services)
    require(len(set(tiers)) == len(tiers), "deployment.tiers", "must name each tier once", [t.tier for t in chosen])
    rule = _deployed_rule(problem, services, tiers, choice.lambda_usd, load)
    rate = problem.rate if problem.workload.clients == 0 else math.nan
    groups = tuple(
        Group(s.tier, s, t.replicas, rate * float(v) / t.replicas, t.routing, load_seconds(s, choice.loading))
        for s, t, v in zip(services, chosen, rule.visits, strict=True)
    )
    used = tuple(g for g, v in zip(groups, rule.visits, strict=True) if v > 0)
    for pool in problem.pools:
        gpus = sum(g.gpus for g in used if problem.pool(g.service.deployment) is pool)
        if gpus > pool.gpus:
            of = f" of {pool.accelerator.name}" if len(problem.pools) > 1 else ""
            raise InfeasibleError(
                f"`deployment` needs {gpus} GPUs{of}; `fleet.gpus`{of} is {pool.gpus}. "
                f"The nearest plan has fleet.gpus = {gpus}{of}."
            )
    return Candidate(rule, used, price(problem, used) / rate, math.nan)


def load_seconds(service: Service, loading: Loading | None) -> float:
    """Return when a replica that begins to load its weights at 0 has them [s]."""
    if loading is None:
        return 0.0
    if loading.seconds is not None:
        return loading.seconds
    assert loading.bytes_per_s is not None
    draft = service.draft
    return load_time(service.deployment, loading.bytes_per_s, *((draft.model, draft.tp) if draft else ()))


def _deployed_service(problem: Problem, tier: int, choice: TierDeployment, load: Load) -> Service:
    draft = None
    if choice.draft is not None:
        known = {d.model.name: d for d in problem.drafts[tier]}
        by_choice = dict(zip((c.model for c in problem.scenario.tiers[tier].drafts), problem.drafts[tier], strict=True))
        draft = by_choice.get(choice.draft) or known.get(choice.draft)
        if draft is None:
            refuse(
                "deployment.tiers.draft",
                f"must be one of the drafts of {choice.tier}",
                choice.draft,
                f"Known: {', '.join(known) or 'none'}.",
            )
    pool = _pool(problem, choice.accelerator)
    deployment = problem.deployment(tier, choice.tp, pool)
    length = None if choice.draft_length == "auto" else choice.draft_length
    degrees = draft_degrees(draft.model, choice.tp) if draft else [1]
    placed = [replace(draft, tp=d) if draft else None for d in degrees]
    built = [build_service(tier, deployment, pool.profile, p, load, length) for p in placed]
    good = [b for b in built if isinstance(b, Service)]
    if not good:
        raise InfeasibleError(f"the deployment does not fit: {built[0]}. The nearest plan needs a higher tp.")
    return min(good, key=lambda s: float(s.rounds.time[0] / s.rounds.tokens[0]))


def _pool(problem: Problem, accelerator: str | None) -> Pool:
    known = {p.accelerator.name: p for p in problem.pools}
    if accelerator is not None and accelerator not in known:
        name, way_out = "deployment.tiers.accelerator", f"Known: {', '.join(known)}."
        refuse(name, "must be one of the fleet's pools", accelerator, way_out)
    return known[accelerator] if accelerator is not None else problem.pools[0]


def _deployed_rule(
    problem: Problem, services: list[Service], tiers: tuple[int, ...], lam: float | None, load: Load
) -> Rule:
    if len(tiers) == 1:
        return single(problem, tiers[0])
    assert problem.outcomes is not None
    assert lam is not None
    bears = capacities(services, load, problem.scenario.slo)
    most = occupancy(services, np.full(len(services), 1e-9), load).rate_limit
    bears = np.where(bears > 0, bears, most)
    prices = np.array([s.gpus * problem.pool(s.deployment).price for s in services]) / bears
    part = subset(problem.outcomes, tiers)
    policy = cascade.solve(part, prices, lam)
    value = cascade.evaluate(policy, part, prices)
    return Rule(tiers, part, policy, policy, 0.0, value.quality, value.visits, value.answers)

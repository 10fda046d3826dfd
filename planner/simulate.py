"""Plans run request by request: what one replica bears, what a whole plan does, and whether it keeps the SLOs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator import metrics
from simulator.cluster import ClusterRecords, Paths, TierSetup, decide, only, simulate_cluster
from simulator.engine import Records, simulate
from simulator.metrics import Estimate, Summary
from simulator.workload import Workload, at_rate
from theory import cascade
from theory.cost import dollars_per_correct_answer, dollars_per_million_tokens, joules_at_most
from theory.errors import InfeasibleError, refuse, require
from theory.memory import load_time

from .build import Problem, resolve
from .predict import draft_degrees
from .scenario import DeploymentChoice, Loading, Scenario, Slo, TierDeployment
from .search import Candidate, Group, Rule, Search, best_of, quality_floor, single, subset
from .service import Load, Service, build_service
from .space import capacities, enumerate_space, occupancy

HEADROOM = (
    0.9  # of the analytic capacity, mostly within 10 % of the simulated (studies/capacity_without_simulation) [-]
)
BISECTIONS = 7  # halvings of the bracket of a replica's capacity: its width ends below 1 % of the rate [-]


def measured_capacity(service: Service, workload: Workload, slo: Slo, guess: float, seed: int) -> float:
    """Return the greatest rate at which one replica keeps the SLOs in simulation; 0 if it never does [requests/s].

    Parameters
    ----------
    workload : Workload
        Requests whose lengths and pattern of arrivals are kept; the time axis is stretched to each rate tried.
    guess : float
        The analytic capacity; the bracket starts from 0.3 to 1.3 times it [requests/s].
    """
    if not keeps(run_at(service, workload, 0.3 * guess, seed), slo):
        return 0.0
    low, high = 0.3 * guess, 1.3 * guess
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if keeps(run_at(service, workload, middle, seed), slo):
            low = middle
        else:
            high = middle
    return low


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
    ttft, tpot = _visit_times(records)
    return float(np.quantile(ttft, 0.99)) <= slo.ttft_p99_s and float(tpot.mean()) <= slo.tpot_mean_s


def _visit_times(records: Records) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return TTFT [s] and TPOT [s/token] of each visit."""
    ttft = records.first_token - records.arrival
    return ttft, (records.completion - records.first_token) / np.maximum(records.output - 1, 1)


def simulate_candidate(problem: Problem, candidate: Candidate, seed: int) -> dict[str, Any]:
    """Return the simulated figures of a plan: the keys of ``tierwise simulate`` but for the time it took."""
    return figures(problem, candidate, run(problem, candidate, seed))


def run(problem: Problem, candidate: Candidate, seed: int) -> ClusterRecords:
    """Run the requests of a problem through a plan."""
    groups = {g.tier: g for g in candidate.groups}
    order = [i for i in candidate.rule.tiers if i in groups]
    setups = [_setup(problem, groups[i]) for i in order]
    rng = np.random.default_rng([seed, 2])
    return simulate_cluster(problem.workload, setups, _paths(problem, candidate.rule, order, rng), seed)


def _setup(problem: Problem, group: Group) -> TierSetup:
    s = group.service
    return TierSetup(
        problem.scenario.tiers[group.tier].name,
        s.table,
        s.deployment.limits,
        s.kv_tokens,
        s.schedule,
        s.acceptance,
        group.replicas,
        s.gpus,
        group.routing,
        group.ready_s,
    )


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


def figures(problem: Problem, candidate: Candidate, records: ClusterRecords) -> dict[str, Any]:
    """Return the figures of a run; times of visits pool all tiers, ``e2e_s`` ends with the final answer."""
    served = ~records.refused
    require(bool(served.any()), "kv_tokens", "must hold at least one request; every request was refused", 0)
    e2e = records.completion - records.arrival
    closed = problem.workload.clients > 0
    warm = 0 if closed else metrics.warmup_requests(records.arrival[served], e2e[served])
    kept = np.flatnonzero(served)[warm:]
    late = np.zeros(len(e2e), dtype=bool)
    late[kept] = True
    visits = [(_visit_times(r), late[v] & ~r.refused) for r, v in _visited(records)]
    span = float(np.nanmax(records.completion) - np.min(records.arrival))
    steady = records.status == "steady" and not closed
    rate = problem.rate if steady else float(served.sum()) / span  # an overloaded system completes less than arrives
    tokens = float(records.output[kept].mean())
    good = _good(problem.scenario.slo, records, kept)
    quality = None if np.isnan(records.correct).all() else metrics.mean_interval(records.correct[kept])
    began = np.argsort(np.concatenate([r.arrival[k] for (r, _), (_, k) in zip(_visited(records), visits, strict=True)]))
    ttft, tpot = (np.concatenate([t[i][k] for t, k in visits])[began] for i in (0, 1))
    speed = 1.0 / tpot[tpot > 0]
    return {
        "requests": int(problem.workload.requests),
        "warmup_requests": int(warm),
        "refused": int(records.refused.sum()),
        "left_out_fraction": problem.left_out,
        "status": records.status,
        "ttft_s": _summary(metrics.summary(ttft)),
        "tpot_s": _summary(metrics.summary(tpot)),
        "e2e_s": _summary(metrics.summary(e2e[kept])),
        "answer_ttft_s": _summary(metrics.summary((records.first_token - records.arrival)[kept])),
        "throughput": {
            "requests_per_s": float(rate),
            "output_tokens_per_s": float(rate * tokens),
            "per_gpu": float(rate * tokens / candidate.gpus),
            "per_user": float(speed.mean()) if len(speed) else None,
        },
        "goodput": {
            "fraction": good.value,
            "interval": _ends(good),
            "requests_per_s": float(rate * good.value),
        },
        "tiers": [
            _tier(problem, g, r, late[v], len(kept), float(np.mean(records.answer[kept] == i)))
            for i, (g, (r, v)) in enumerate(zip(_in_order(candidate), _visited(records), strict=True))
        ],
        "quality": {"mean": quality.value, "interval": _ends(quality)} if quality else None,
        "cost": _money(problem, candidate, float(rate), tokens, quality, records, kept),
    }


def _in_order(candidate: Candidate) -> list[Group]:
    return sorted(candidate.groups, key=lambda g: g.tier)


def _visited(records: ClusterRecords) -> list[tuple[Records, NDArray[np.intp]]]:
    return [(r, v) for r, v in zip(records.tiers, records.visitors, strict=True) if r is not None]


def _good(slo: Slo, records: ClusterRecords, kept: NDArray[np.intp]) -> Estimate:
    """Return the share of requests all of whose visits keep the TTFT and TPOT objectives, and E2E if there is one."""
    good = ~records.refused
    for run_of, who in _visited(records):
        ttft, tpot = _visit_times(run_of)
        good[who] &= (ttft <= slo.ttft_p99_s) & (tpot <= slo.tpot_mean_s)
    if slo.e2e_p99_s is not None:
        good &= (records.completion - records.arrival) <= slo.e2e_p99_s
    return metrics.mean_interval(good[kept].astype(float))


def _tier(
    problem: Problem, group: Group, records: Records, late: NDArray[np.bool_], requests: int, stops: float
) -> dict[str, Any]:
    ttft, tpot = (x[late & ~records.refused] for x in _visit_times(records))
    drafted = int(records.drafted.sum())
    span = max(float(np.nanmax(records.completion) - np.min(records.arrival)), 1e-300)
    return {
        "name": problem.scenario.tiers[group.tier].name,
        "routing": group.routing,
        "ready_s": group.ready_s,
        "share": float(late.sum() / requests),
        "stop_fraction": stops,
        "mean_batch": float(records.decode_s / span / group.replicas),
        "utilisation": float(records.busy_s / span / group.replicas),
        "acceptance": float(records.accepted.sum() / drafted) if drafted else None,
        "acceptance_kind": "accepted / drafted",
        "preemptions_per_request": float(records.preemptions.mean()),
        "status": metrics.status(records),
        "ttft_s": _summary(metrics.summary(ttft)),
        "tpot_s": _summary(metrics.summary(tpot)),
    }


def _money(
    problem: Problem,
    candidate: Candidate,
    rate: float,
    tokens: float,
    quality: Estimate | None,
    records: ClusterRecords,
    kept: NDArray[np.intp],
) -> dict[str, Any]:
    price = problem.scenario.fleet.price_per_gpu_hour
    each = candidate.gpus * price / 3600 / rate
    correct = float(dollars_per_correct_answer(each, quality.value)) if quality and quality.value > 0 else None
    return {
        "gpus": candidate.gpus,
        "usd_per_1000_requests": 1000 * each,
        "usd_per_correct_answer": correct,
        "usd_per_million_output_tokens": float(dollars_per_million_tokens(candidate.gpus, price, rate * tokens)),
        "gpu_s_per_request": float(records.gpu_s[kept].mean()),
        "joules_per_request_at_most": float(joules_at_most(candidate.gpus / rate, problem.accelerator)),
    }


def _summary(s: Summary) -> dict[str, Any]:
    return {
        **{name: _finite(getattr(s, name).value) for name in ("mean", "p50", "p90", "p95", "p99")},
        "interval": _ends(s.mean),
        "p99_interval": _ends(s.p99),
    }


def _ends(estimate: Estimate) -> list[float | None]:
    return [_finite(estimate.low), _finite(estimate.high)]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def missed(simulated: dict[str, Any], candidate: Candidate, problem: Problem) -> list[Group]:
    """Return the groups of a plan that break an SLO in simulation; all of them if only the time to the answer does."""
    slo = problem.scenario.slo
    bad = [
        group
        for group, tier in zip(_in_order(candidate), simulated["tiers"], strict=True)
        if tier["status"] != "steady"
        or tier["ttft_s"]["p99"] > slo.ttft_p99_s
        or tier["tpot_s"]["mean"] > slo.tpot_mean_s
    ]
    if not bad and slo.e2e_p99_s is not None and simulated["e2e_s"]["p99"] > slo.e2e_p99_s:
        return list(candidate.groups)
    return bad


# ---------------------------------------------------------------------------------------------------------------------
# A scenario as it stands
# ---------------------------------------------------------------------------------------------------------------------


def simulate_scenario(
    scenario: Scenario,
    folder: Path,
    profile: str | None,
    seed: int | None,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Return what happens when the deployment of a scenario serves its traffic.

    Without a deployment in the scenario it is the one that the analytic planner picks.

    Raises
    ------
    InputError
        If the deployment names what is not there, or a closed loop is asked of several tiers.
    InfeasibleError
        If the deployment does not fit.
    """
    used_seed = scenario.search.seed if seed is None else seed
    progress("preparing", 0, 2)
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
    progress("simulating", 1, 2)
    start = time.perf_counter()
    records = run(problem, candidate, used_seed)
    wall = time.perf_counter() - start
    result = {"scenario": scenario.name, **figures(problem, candidate, records)}
    progress("simulating", 2, 2)
    provenance = {"step_time": problem.profile.provenance, "profile": problem.profile.name, "seed": used_seed}
    provenance["traffic"] = problem.workload.source
    return {**result, "provenance": provenance, "wall_s": wall}


def analytic_candidate(problem: Problem) -> Candidate:
    """Return the best candidate of the enumeration alone, with room for what the analytic model does not see."""
    space = enumerate_space(problem)
    careful = replace(space, capacity=tuple(HEADROOM * c for c in space.capacity))
    search = Search(problem, careful, quality_floor(problem))
    return search.settle(best_of(search, search.enumerate())[0])


def deployed(problem: Problem, choice: DeploymentChoice) -> Candidate:
    """Return the plan that a scenario's deployment describes."""
    load = Load.of(problem.workload)
    names = [t.name for t in problem.scenario.tiers]
    chosen = sorted(choice.tiers, key=lambda t: names.index(t.tier))
    services = [_deployed_service(problem, names.index(t.tier), t, load) for t in chosen]
    tiers = tuple(s.tier for s in services)
    require(len(set(tiers)) == len(tiers), "deployment.tiers", "must name each tier once", [t.tier for t in chosen])
    rule = _deployed_rule(problem, services, tiers, choice.lambda_usd, load)
    rate = problem.rate if problem.workload.clients == 0 else math.nan
    groups = tuple(
        Group(s.tier, s, t.replicas, rate * float(v) / t.replicas, t.routing, _load_s(s, choice.loading))
        for s, t, v in zip(services, chosen, rule.visits, strict=True)
    )
    used = tuple(g for g, v in zip(groups, rule.visits, strict=True) if v > 0)
    gpus = sum(g.gpus for g in used)
    if gpus > problem.scenario.fleet.gpus:
        raise InfeasibleError(
            f"`deployment` needs {gpus} GPUs; `fleet.gpus` is {problem.scenario.fleet.gpus}. "
            f"The nearest plan has fleet.gpus = {gpus}."
        )
    return Candidate(rule, used, gpus * problem.price / rate, math.nan)


def _load_s(service: Service, loading: Loading | None) -> float:
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
    deployment = problem.deployment(tier, choice.tp)
    length = None if choice.draft_length == "auto" else choice.draft_length
    degrees = draft_degrees(draft.model, choice.tp) if draft else [1]
    placed = [replace(draft, tp=d) if draft else None for d in degrees]
    built = [build_service(tier, deployment, problem.profile, p, load, length) for p in placed]
    good = [b for b in built if isinstance(b, Service)]
    if not good:
        raise InfeasibleError(f"the deployment does not fit: {built[0]}. The nearest plan needs a higher tp.")
    return min(good, key=lambda s: float(s.rounds.time[0] / s.rounds.tokens[0]))


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
    prices = np.array([s.gpus for s in services]) / bears * problem.price
    part = subset(problem.outcomes, tiers)
    policy = cascade.solve(part, prices, lam)
    value = cascade.evaluate(policy, part, prices)
    return Rule(tiers, part, policy, policy, 0.0, value.quality, value.visits, value.answers)

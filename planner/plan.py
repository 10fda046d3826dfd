"""The plan of a scenario: enumerate, search, simulate, compare with everything on the top tier, explain."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from simulator.workload import at_rate
from theory.errors import InfeasibleError, require

from . import explain
from .build import Problem, joined_names, resolve
from .crossover import crossover
from .curves import curves
from .frontier import PlanVertex, hull, lambda_of, pareto
from .scenario import Scenario
from .search import Candidate, Group, Search, best_of, quality_floor, refine, single
from .simulate import missed, simulated_plan
from .space import Space, enumerate_space, under_slo
from .storage import Ledger, Means, ledger
from .tipping import tipping_points
from .today import today
from .verify import HOPE, Asked, verified


class Progress(Protocol):
    """Shows what is being done."""

    def __call__(self, what: str, done: int, of: int) -> None: ...


def silent(what: str, done: int, of: int) -> None:
    """Show nothing."""


def check_plannable(scenario: Scenario) -> None:
    """Refuse a scenario that nothing can be planned for.

    Raises
    ------
    InputError
        If it has no objective, or its load is a closed loop.
    """
    require(
        scenario.objective is not None,
        "objective",
        "must be given to plan: `lambda_usd`, `budget_usd_per_1000` or `quality_floor`",
        None,
        "{quality_floor: top} asks for the cheapest plan that is right as often as the last tier.",
    )
    require(
        scenario.traffic.clients == 0,
        "traffic.clients",
        "must be 0 to plan: a closed loop sets its own load",
        scenario.traffic.clients,
        "Give `traffic.rate` [requests/s], or use `tierwise simulate`.",
    )


def plan_scenario(
    scenario: Scenario,
    folder: Path,
    profile: str | None = None,
    seed: int | None = None,
    progress: Progress = silent,
    means: Means | None = None,
) -> dict[str, Any]:
    """Return the plan of a scenario with the keys of ``tierwise plan --format json``.

    Parameters
    ----------
    means : Means, optional
        Where the search is kept and who does its work; by default in memory and this process.

    Raises
    ------
    InputError
        If the scenario asks for something that is not there or does not make sense.
    InfeasibleError
        If no plan keeps the constraints; the message names the one that binds and the nearest plan.
    """
    start = time.perf_counter()
    check_plannable(scenario)
    used_seed = scenario.search.seed if seed is None else seed
    progress("enumerating", 0, 1)
    problem = resolve(scenario, folder, profile, used_seed)
    space = enumerate_space(problem)
    search = Search(problem, space, quality_floor(problem))
    candidates = search.enumerate()
    best_of(search, candidates)  # refuse before searching when nothing is feasible
    with ledger(problem, used_seed, means or Means()) as kept:
        rules = [c.rule for c in candidates] + refine(search, scenario.search.trials, used_seed, kept, progress)
        found = verified(search, rules, Asked(problem, folder, used_seed, kept, progress))
        baseline = _baseline(search, used_seed, kept, progress) | {"today": today(search, used_seed, kept)}
    chosen, candidates = found.chosen, found.candidates
    vertices = hull(candidates)
    figures = explain.predicted(problem, space, chosen)
    result = {
        "scenario": scenario.name,
        "feasible": True,
        "plan": {
            "gpus": chosen.gpus,
            "accelerator": joined_names(_accelerator(g) for g in chosen.groups),
            "tiers": explain.tiers(problem, space, chosen),
            "first_stops": explain.first_stops(chosen.rule),
            "stop_rule": explain.stop_rule(chosen.rule),
        },
        "traffic": explain.traffic(problem),
        "predicted": figures,
        "simulated": found.simulated,
        "shortlist": found.shortlist,
        "selection": found.selection,
        "baseline": baseline,
        "frontier": frontier_rows(problem, candidates, vertices),
        "lambda": (price := shadow_price(problem, chosen, vertices, search.floor)),
        "load_prices": _load_prices(search, chosen, price["value"]),
        "speculation": speculation(problem, space, chosen),
        "curves": curves(problem, space, chosen),
        "binding": explain.binding(problem, space, chosen, search.used(chosen)),
        "sensitivity": _sensitivity(search, chosen, candidates, progress),
        "changes": _changes(search, chosen, candidates, progress),
        "evaluated": {
            "analytic": search.evaluated,
            "policies": len(candidates),
            "simulated": found.simulations,
            "excluded": list(space.excluded),
        },
        "provenance": {
            "step_time": joined_names(p.profile.provenance for p in problem.pools),
            "profile": joined_names(p.profile.name for p in problem.pools),
            "profile_source": joined_names(p.profile.source for p in problem.pools),
            "quality": scenario.quality.source if scenario.quality else None,
            "signal": scenario.quality.signal.source if scenario.quality else None,
            "traffic": problem.workload.source,
            "seed": used_seed,
        },
    }
    said = explain.paragraphs(problem, result)
    result |= {"paragraphs": said, "explanation": [sentence for of in said.values() for sentence in of]}
    result["wall_s"] = time.perf_counter() - start
    return result


def _where(problem: Problem, group: Group) -> str:
    return problem.where(group.service.deployment)


def _accelerator(group: Group) -> str:
    return group.service.deployment.accelerator.name


def _baseline(search: Search, seed: int, kept: Ledger, progress: Progress) -> dict[str, Any]:
    """Return everything on the top tier: without a draft, and with the best one, each on the fewest GPUs."""
    problem = search.problem
    top = len(problem.models) - 1
    name = problem.scenario.tiers[top].name
    rule = single(problem, top)
    found: dict[str, tuple[Search, Candidate]] = {}
    for key, drafts in (("plain", False), ("speculative", True)):
        restricted = _only(search, top, drafts)
        candidate = restricted.allocate(rule)
        if candidate is not None:
            found[key] = restricted, restricted.settle(candidate)
    progress("baseline", 0, 1)
    tasks = {f"baseline: {key}": (problem, candidate, seed) for key, (_, candidate) in found.items()}
    rows: dict[str, Any] = {"name": f"everything on {name}", "plain": None, "speculative": None}
    for (key, (restricted, candidate)), simulated in zip(
        found.items(), kept.simulations(simulated_plan, tasks), strict=True
    ):
        rows[key] = {
            "tiers": explain.tiers(problem, search.space, candidate),
            "predicted": explain.predicted(problem, restricted.space, candidate),
            "simulated": simulated,
            "keeps_slos": not missed(simulated, candidate, problem),
        }
    return rows


def _only(search: Search, tier: int, drafts: bool) -> Search:
    """Return the search with the services of other tiers, and with those with drafts if not wanted, taken away."""
    services, capacity = list(search.space.services), list(search.space.capacity)
    for i in range(len(services)):
        keep = [j for j, s in enumerate(services[i]) if i == tier and (drafts or s.draft is None)]
        services[i] = tuple(services[i][j] for j in keep)
        capacity[i] = capacity[i][keep]
    space = Space(search.space.load, tuple(services), tuple(capacity), ())
    return Search(search.problem, space, None)


def frontier_rows(problem: Problem, candidates: list[Candidate], vertices: list[PlanVertex]) -> list[dict[str, Any]]:
    """Return the plans that none beats, cheapest first, and the lambdas at which those on the hull are best."""
    on_hull = {id(v.candidate): v for v in vertices}
    rows = []
    for c in pareto(candidates):
        vertex = on_hull.get(id(c))
        rows.append(
            {
                "usd_per_1000_requests": 1000 * c.cost,
                "quality": c.rule.quality if problem.outcomes is not None else None,
                "gpus": c.gpus,
                "tiers": [
                    f"{g.replicas} x {problem.scenario.tiers[g.tier].name} tp{g.service.gpus}{_where(problem, g)}"
                    + (f" + {g.service.draft.model.name}" if g.service.draft else "")
                    for g in c.groups
                ],
                "on_hull": vertex is not None,
                "lambda_usd_interval": [vertex.lam_low, _open(vertex.lam_high)] if vertex else None,
            }
        )
    return rows


def _open(value: float) -> float | None:
    return value if np.isfinite(value) else None


def shadow_price(
    problem: Problem, chosen: Candidate, vertices: list[PlanVertex], floor: float | None
) -> dict[str, Any]:
    """Return lambda of the plan: given, or the shadow price of the budget or floor that was given."""
    objective = problem.scenario.objective
    assert objective is not None
    interval = lambda_of(chosen, vertices)
    given = objective.lambda_usd
    if given is not None:
        value: float | None = given
    elif interval is not None:
        value = interval[0]
    else:
        around = [v.lam_low for v in vertices if v.candidate.rule.quality >= chosen.rule.quality]
        value = _open(around[0]) if around else None
    return {
        "value": value,
        "unit": "USD per correct answer",
        "interval": [interval[0], _open(interval[1])] if interval else None,
        "given_as": next(n for n in ("lambda_usd", "budget_usd_per_1000", "quality_floor") if getattr(objective, n)),
        "budget": 1000 * chosen.cost,
        "budget_unit": "USD per 1000 requests",
        "quality_floor": floor,
    }


def _load_prices(search: Search, chosen: Candidate, lam: float | None) -> dict[str, Any] | None:
    """Return what visits are worth at the fixed point of policy, loads and prices on the plan's own replicas.

    ``quality`` is what the best mixture of stop rules reaches there with every replica allowed to be full; a plan of
    two policies with room to spare stays below it. Prices in USD at the plan's lambda, in correct answers without one.
    """
    found = search.at_capacity(chosen, lam or 1.0)
    if found is None:
        return None
    names = [search.problem.scenario.tiers[g.tier].name for g in sorted(chosen.groups, key=lambda g: g.tier)]
    return {
        "converged": found.converged,
        "gap": found.gap,
        "unit": "USD per visit" if lam else "correct answers per visit",
        "price": dict(zip(names, found.prices.tolist(), strict=True)),
        "visits": dict(zip(names, found.value.visits.tolist(), strict=True)),
        "quality": found.value.quality,
        "policies": len(found.policies),
    }


def speculation(problem: Problem, space: Space, chosen: Candidate) -> dict[str, Any]:
    """Return the draft lengths by batch, and the loads from which a fixed length hurts."""
    crossings = [crossover(problem, space, group) for group in chosen.groups]
    return {
        "schedule": {t["name"]: t["schedule"] for t in explain.tiers(problem, space, chosen)},
        "crossover_requests_per_s": {c["tier"]: c["crossover_requests_per_s"] for c in crossings if c is not None},
        "crossover_interval_requests_per_s": {
            c["tier"]: c["crossover_interval_requests_per_s"] for c in crossings if c is not None
        },
        "by_tier": [c for c in crossings if c is not None],
    }


def _sensitivity(
    search: Search, chosen: Candidate, candidates: list[Candidate], progress: Progress
) -> list[dict[str, Any]]:
    """Return the plan when load or TTFT objective change, one at a time, on the capacities that simulation corrected.

    A capacity keeps its ratio of simulated to analytic, and only stop rules that the plan was chosen from are
    compared, less load aside: a tighter objective or more load is never cheaper than the plan itself.
    """
    problem, space = search.problem, search.corrected(HOPE)
    tight = problem.scenario.slo.model_copy(update={"ttft_p99_s": problem.scenario.slo.ttft_p99_s / 2})
    changes: list[tuple[str, Problem, Space]] = [
        ("traffic.rate x 0.8", _at_load(problem, 0.8), space),
        ("traffic.rate x 1.25", _at_load(problem, 1.25), space),
        ("slo.ttft_p99_s x 0.5", problem, under_slo(search.space, space, tight)),
    ]
    rules = [chosen.rule, *(c.rule for c in candidates)]
    rows = []
    for done, (name, changed, its_space) in enumerate(changes):
        progress("sensitivity", done, len(changes))
        row: dict[str, Any] = {"change": name}
        other = search.like(changed, its_space)
        known = [c for c in map(other.allocate, rules) if c is not None]
        known += other.enumerate() if changed.rate < problem.rate else []
        try:
            best = other.settle(best_of(other, known)[0])
            row |= {
                "usd_per_1000_requests": 1000 * best.cost,
                "quality": best.rule.quality if problem.outcomes is not None else None,
                "gpus": best.gpus,
                "tiers": [f"{g.replicas} x {g.service.name}{_where(problem, g)}" for g in best.groups],
            }
        except InfeasibleError as error:
            row |= {"infeasible": str(error)}
        rows.append(row)
    return rows


def _changes(
    search: Search, chosen: Candidate, candidates: list[Candidate], progress: Progress
) -> list[dict[str, Any]]:
    """Return what would change the decision, on the capacities that simulation corrected."""
    progress("changes", 0, 1)
    rules = [chosen.rule, *(c.rule for c in pareto(candidates))]
    return tipping_points(search.problem, search.corrected(HOPE), chosen, rules, search)


def _at_load(problem: Problem, factor: float) -> Problem:
    return replace(problem, workload=at_rate(problem.workload, factor * problem.rate))

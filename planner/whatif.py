"""What-if: the analytic plan of a scenario again and again, each time a setting moves, with what did not change kept.

A plan is made in stages, and a setting changes only those behind it:

=========================================  ==================================================================
found                                      anew when these change
=========================================  ==================================================================
requests, services of replicas             lengths, models and their drafts, accelerator, engine, kind of arrivals
what a replica bears                       the SLOs, a fixed draft length
stop rules                                 prices of visits beyond a common factor
plans                                      always: rate, GPUs, prices, drafts used, objective with its quality floor
=========================================  ==================================================================

The answer is that of :func:`planner.simulate.analytic_candidate`, what ``tierwise simulate`` runs: the best of the
enumeration with replicas filled to ``HEADROOM`` of what they bear by the analytic model, room for what it does not see.
Figures are those of :mod:`planner.explain`.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from simulator.workload import at_rate
from theory.errors import InfeasibleError

from . import explain
from .build import Problem, joined_names, resolve
from .crossover import crossover
from .frontier import hull, lambda_of
from .plan import check_plannable, frontier_rows, shadow_price
from .scenario import DraftChoice, Objective, Scenario, Slo, TierChoice
from .search import Candidate, Frontiers, Rule, Search, best_of, quality_floor, single
from .service import Load, Service, with_length
from .simulate import HEADROOM
from .space import Space, allowed, capacities, must_draft, nothing, of_degree

KEPT = 8  # sets of services remembered [-]
SLOS_KEPT = 64  # objectives under which their capacities are remembered [-]
FRONTIERS_KEPT = 1024  # frontiers of stop rules remembered, each of a set of tiers and the prices of a visit [-]


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The analytic plan of a scenario, and what it was chosen from."""

    problem: Problem
    space: Space
    search: Search  # whose capacities leave HEADROOM
    chosen: Candidate
    candidates: tuple[Candidate, ...]  # all that were enumerated
    top: Candidate | None  # everything on the last tier; None if it does not fit
    binding: dict[str, Any]  # the fullest tier and what it would break first, :func:`planner.explain.binding`


@dataclass(frozen=True, slots=True)
class Confidence:
    """What takes longer than a move: intervals, and where speculation stops paying."""

    predicted: dict[str, Any]  # :func:`planner.explain.predicted`
    crossings: dict[str, dict[str, Any]]  # :func:`planner.crossover.crossover` by tier; none without a draft


@dataclass(slots=True, eq=False)
class _Base:
    """What holds as long as lengths, models, drafts, accelerators and engine stay."""

    problem: Problem  # at 1 request/s, or as its trace or its pieces say
    load: Load
    services: dict[tuple[int, int, int], list[Service | str]] = field(default_factory=dict)  # by tier, pool, tp
    fixed: dict[tuple[int, int], Service] = field(default_factory=dict)  # by service and draft length
    bears: dict[Slo, dict[int, float]] = field(default_factory=dict)  # by service [requests/s]
    frontiers: Frontiers = field(default_factory=dict)
    crossings: dict[int, dict[str, Any] | None] = field(default_factory=dict)  # by service


class Planner:
    """Answers scenarios; threads may share it, it works for one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bases: OrderedDict[str, _Base] = OrderedDict()

    def answer(self, scenario: Scenario, folder: Path) -> Answer:
        """Return the analytic plan of a scenario.

        Parameters
        ----------
        folder : Path
            Where relative paths of the scenario start.

        Raises
        ------
        InputError
            If the scenario asks for something that is not there or does not make sense.
        InfeasibleError
            If no plan keeps the constraints; the message says what binds and what comes nearest.
        """
        check_plannable(scenario)
        with self._lock:
            base = self._base(scenario, folder)
            problem = _at(base.problem, scenario)
            space = _space(base, problem)
            careful = replace(space, capacity=tuple(HEADROOM * c for c in space.capacity))
            if len(base.frontiers) >= FRONTIERS_KEPT:
                base.frontiers.clear()
            search = Search(problem, careful, quality_floor(problem), base.frontiers)
            candidates = [c for front in _fronts(search) for c in search.carried(front)]
            chosen = search.settle(best_of(search, candidates)[0])
            top = search.allocate(single(problem, len(problem.models) - 1))
            return Answer(
                problem=problem,
                space=space,
                search=search,
                chosen=chosen,
                candidates=tuple(candidates),
                top=search.settle(top) if top is not None else None,
                binding=explain.binding(problem, space, chosen, HEADROOM * search.used(chosen)),
            )

    def confidence(self, answer: Answer, folder: Path) -> Confidence:
        """Return the intervals of an answer, as ``tierwise plan`` has them."""
        problem, chosen = answer.problem, answer.chosen
        with self._lock:
            known = self._base(problem.scenario, folder).crossings
        crossings = {}
        for group in chosen.groups:
            at = id(group.service)
            if at not in known:
                known[at] = crossover(problem, answer.space, group)
            found = known[at]
            if found is not None:
                crossings[problem.scenario.tiers[group.tier].name] = found
        return Confidence(explain.predicted(problem, answer.space, chosen), crossings)

    def _base(self, scenario: Scenario, folder: Path) -> _Base:
        plain = _plain(scenario)
        key = json.dumps([plain.model_dump(mode="json"), str(folder)], sort_keys=True)
        if key not in self._bases:
            problem = resolve(plain, folder)
            self._bases[key] = _Base(problem, Load.of(problem.workload))
            if len(self._bases) > KEPT:
                self._bases.popitem(last=False)
        self._bases.move_to_end(key)
        return self._bases[key]


def lambdas(answer: Answer) -> tuple[float, float] | None:
    """Return the worths of a correct answer at which no enumerated plan is better; None if there are none [USD]."""
    return lambda_of(answer.chosen, hull(answer.candidates))


def plan_json(answer: Answer, confidence: Confidence, simulated: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the answer with the keys of ``tierwise plan --format json``, as far as they are known without its search.

    Parameters
    ----------
    simulated : dict, optional
        The keys of ``tierwise simulate`` for this plan.
    """
    problem, space, chosen = answer.problem, answer.space, answer.chosen
    vertices = hull(answer.candidates)
    quality = problem.scenario.quality
    return {
        "scenario": problem.scenario.name,
        "feasible": True,
        "plan": {
            "gpus": chosen.gpus,
            "accelerator": joined_names(g.service.deployment.accelerator.name for g in chosen.groups),
            "tiers": explain.tiers(problem, space, chosen),
            "first_stops": explain.first_stops(chosen.rule),
            "stop_rule": explain.stop_rule(chosen.rule),
        },
        "traffic": explain.traffic(problem),
        "predicted": confidence.predicted,
        "simulated": simulated,
        "frontier": frontier_rows(problem, list(answer.candidates), vertices),
        "lambda": shadow_price(problem, chosen, vertices, answer.search.floor),
        "speculation": {
            "schedule": {t["name"]: t["schedule"] for t in explain.tiers(problem, space, chosen)},
            "by_tier": list(confidence.crossings.values()),
        },
        "binding": answer.binding,
        "provenance": {
            "step_time": joined_names(p.profile.provenance for p in problem.pools),
            "profile": joined_names(p.profile.name for p in problem.pools),
            "quality": quality.source if quality else None,
            "signal": quality.signal.source if quality else None,
            "traffic": problem.workload.source,
            "seed": problem.scenario.search.seed,
            "planner": "analytic enumeration, as tierwise simulate picks a deployment",
        },
    }


def _plain(scenario: Scenario) -> Scenario:
    """Return the scenario with all that changes no service at one value."""
    pools = [pool.model_copy(update={"gpus": 1, "price_per_gpu_hour": 1.0}) for pool in scenario.pools]
    traffic = scenario.traffic.model_copy(update={"rate": 1.0}) if _stretches(scenario) else scenario.traffic
    auto: dict[str, Any] = {"draft": "auto"}
    tiers = [t.model_copy(update=auto | {"drafts": [_auto(d) for d in t.drafts]}) for t in scenario.tiers]
    same = {"name": "-", "description": "", "slo": Slo(), "objective": Objective(quality_floor="top")}
    fleet = pools if isinstance(scenario.fleet, list) else pools[0]
    return scenario.model_copy(update=same | {"fleet": fleet, "traffic": traffic, "tiers": tiers, "deployment": None})


def _auto(draft: DraftChoice) -> DraftChoice:
    return draft.model_copy(update={"draft_lengths": ["auto"]})


def _stretches(scenario: Scenario) -> bool:
    """Return whether another rate only stretches the time between arrivals."""
    law = scenario.traffic.arrivals
    return scenario.traffic.rate is not None and (law is None or law.kind != "piecewise")


def _at(base: Problem, scenario: Scenario) -> Problem:
    pools = tuple(
        replace(pool, gpus=asked.gpus, price_per_gpu_hour=asked.price_per_gpu_hour)
        for pool, asked in zip(base.pools, scenario.pools, strict=True)
    )
    workload, rate = base.workload, scenario.traffic.rate
    if rate is not None and _stretches(scenario):
        workload = at_rate(workload, rate * workload.rate)
    return replace(base, scenario=scenario, pools=pools, workload=workload)


def _space(base: _Base, problem: Problem) -> Space:
    """Return what :func:`planner.space.enumerate_space` returns, from what is known."""
    slo, tiers = problem.scenario.slo, problem.scenario.tiers
    services: list[tuple[Service, ...]] = []
    excluded: list[str] = []
    for tier in range(len(tiers)):
        found, reasons = _of_tier(base, problem, tier)
        services.append(tuple(found))
        excluded += reasons
    drafted = tuple(must_draft(choice) for choice in tiers)
    bears = _bears(base, [s for found in services for s in found], slo)
    capacity = tuple(
        allowed(found, np.array([bears[id(s)] for s in found]), d) for found, d in zip(services, drafted, strict=True)
    )
    if not any(np.any(c > 0) for c in capacity):
        raise InfeasibleError(nothing(problem, services, base.load, excluded))
    return Space(base.load, tuple(services), capacity, tuple(excluded), drafted)


def _of_tier(base: _Base, problem: Problem, tier: int) -> tuple[list[Service], list[str]]:
    """Return the services of a tier on the GPUs there are, with the drafts and lengths asked for; and the reasons."""
    choice = problem.scenario.tiers[tier]
    found: list[Service] = []
    excluded: list[str] = []
    for (p, pool), tp in itertools.product(enumerate(problem.pools), choice.tp):
        deployment = problem.deployment(tier, tp, pool)
        if tp > pool.gpus:
            excluded.append(f"{choice.name} tp{tp}{problem.where(deployment)}: exceeds fleet.gpus = {pool.gpus}")
            continue
        if (tier, p, tp) not in base.services:
            base.services[tier, p, tp] = of_degree(base.problem, deployment, tier, base.load)
        for one in base.services[tier, p, tp]:
            if isinstance(one, str):
                excluded.append(one)
            else:
                found += _asked(base, one, problem.drafts[tier], choice)
    return found, excluded


def _asked(base: _Base, service: Service, drafts: tuple[Any, ...], choice: TierChoice) -> list[Service]:
    """Return the service at each draft length asked for, itself for ``auto``; nothing if its draft is not."""
    if service.draft is None:
        return [service]
    tp, each = service.draft.tp, zip(drafts, choice.drafts, strict=True)
    asked = next(a for d, a in each if replace(d, tp=tp) == service.draft)
    if choice.draft not in ("auto", asked.model):
        return []
    found = []
    for length in asked.draft_lengths:
        at = (id(service), 0 if length == "auto" else length)
        if at not in base.fixed:
            base.fixed[at] = service if length == "auto" else with_length(service, base.load, length)
        found.append(base.fixed[at])
    return found


def _bears(base: _Base, services: list[Service], slo: Slo) -> dict[int, float]:
    """Return the capacity of each service by its id."""
    if slo not in base.bears and len(base.bears) >= SLOS_KEPT:
        base.bears.clear()
    known = base.bears.setdefault(slo, {})
    new = [s for s in services if id(s) not in known]
    known.update((id(s), float(c)) for s, c in zip(new, capacities(new, base.load, slo), strict=True))
    return known


def _fronts(search: Search) -> list[list[Rule]]:
    """Return the stop rules of each set of tiers: a common factor of the prices of visits changes none of them."""
    found = []
    for tiers in search.subsets():
        prices = search.prices(tiers)
        found.append(list(search.rules(tiers, np.round(prices / prices[0], 12))))
    return found

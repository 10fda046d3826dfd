"""Plans that none beats in several objectives at once: cost, quality, time to the final answer, energy.

Where all configurations can be looked at they are (:func:`planner.evaluate.every`), and the set is exact. Beyond
``EXHAUSTIVE`` of them Optuna proposes services, replicas and a policy. The best plans of the enumeration and their
neighbours come first; the policy is drawn among those that the replicas carry within the SLOs, so that a proposal whose
GPUs exceed the fleet or carry no policy is known to be infeasible without looking at it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.errors import InfeasibleError, require

from . import explain
from .build import Problem, joined_names, resolve
from .evaluate import Configurations, Figures, Tables, evaluate, every, rules_of, tables
from .frontier import non_dominated
from .plan import Progress, silent
from .replications import Workers
from .scenario import Objective, Scenario
from .search import Candidate, Group, Rule, Search, price, quality_floor
from .simulate import HEADROOM, missed, simulated_plan
from .space import enumerate_space
from .storage import Means, Params, Proposals, Told, ledger

Array = NDArray[np.float64]
OBJECTIVES = {
    "cost": "usd_per_1000_requests",
    "quality": "quality",
    "latency": "e2e_mean_s",
    "energy": "joules_per_request",
}
EXHAUSTIVE = 10_000_000  # configurations, by their bound, up to which all are looked at [-]
TRIALS = 10  # times `search.trials` that Optuna gets beyond that: a set takes more than one plan [-]
FIRST = 0.3  # share of the trials given at most to the enumerated plans and their neighbours [-]
WORST = 1e9  # value of what is infeasible [-]


@dataclass(frozen=True, eq=False)
class Field:
    """What is searched: tables, the rules behind their policies, and what must hold."""

    table: Tables
    rules: tuple[Rule, ...]
    objective: Objective | None
    floor: float | None  # least quality [-]
    names: tuple[str, ...]  # of the objectives

    def figures(self, some: Configurations) -> Figures:
        """Return the figures of configurations under the scenario's floor or budget."""
        return evaluate(self.table, some, self.objective, self.floor)


@dataclass(frozen=True, eq=False)
class ParetoSet:
    """Configurations that none of those looked at beats in all objectives."""

    configurations: Configurations
    figures: Figures
    values: Array  # (n, M) to be made small: USD, -share, s or J of a request [-]
    looked_at: int
    feasible: int


def values_of(figures: Figures, names: Sequence[str]) -> Array:
    """Return the objectives of configurations, all to be made small, (N, M) [USD], [-], [s], [J]."""
    columns = {
        "cost": figures.cost,
        "quality": -np.nan_to_num(figures.quality),
        "latency": figures.e2e_s,
        "energy": figures.joules,
    }
    return np.stack([columns[n] for n in names], axis=1)


def covered(values: Array, reference: Array, rng: np.random.Generator, points: int = 50_000) -> float:
    r"""Return the share of the volume that a reference set dominates which another set dominates too [-].

    Volumes up to a tenth of its range beyond the worst value of the reference in each objective, by uniform points in
    that box; 1 for a set as good as the reference, at most 1 where that is the true Pareto set. A ratio of
    hypervolumes (Zitzler & Thiele 1999, IEEE Trans. Evolutionary Computation 3:257).
    """
    low, high = reference.min(axis=0), reference.max(axis=0)
    at = rng.uniform(low, high + 0.1 * np.maximum(high - low, 1e-9), (points, values.shape[1]))
    return float(_dominated(at[_dominated(at, reference)], values).mean())


def _dominated(points: Array, values: Array) -> NDArray[np.bool_]:
    found = np.zeros(len(points), dtype=bool)
    for value in values:
        found |= (value <= points).all(axis=1)
    return found


def searched_field(search: Search, names: Sequence[str]) -> Field:
    """Return the field of a search: the rules of its frontiers and the mixtures of its enumeration, by quality."""
    mixed = [c.rule for c in search.enumerate() if 0 < c.rule.gamma < 1]
    rules = sorted([*rules_of(search), *mixed], key=lambda r: r.quality)
    objective = search.problem.scenario.objective
    return Field(tables(search, rules), tuple(rules), objective, search.floor, tuple(names))


def bound(table: Tables) -> int:
    """Return an upper bound of the number of configurations: that of the fleet being shared is left out."""
    total = 0
    able = [
        sum(int(table.fleet[table.pool[s]] // table.gpus[s]) for s in range(a, b) if table.capacity[s] > 0)
        for a, b in zip(table.begin[:-1], table.begin[1:], strict=True)
    ]
    masks, counts = np.unique(table.visits > 0, axis=0, return_counts=True)
    for mask, policies in zip(masks, counts, strict=True):
        total += int(policies) * int(np.prod([n for n, on in zip(able, mask, strict=True) if on], dtype=object))
    return total


def exhaustive(field: Field) -> ParetoSet | None:
    """Return the Pareto set of all configurations; None if none is feasible."""
    found: ParetoSet | None = None
    looked_at = feasible = 0
    for some in every(field.table):
        figures = field.figures(some)
        at = np.flatnonzero(figures.feasible)
        looked_at += len(some.policy)
        feasible += len(at)
        if len(at):
            found = _joined(field, found, some.at(at), figures.at(at))
    if found is None:
        return None
    return ParetoSet(found.configurations, found.figures, found.values, looked_at, feasible)


def _joined(field: Field, one: ParetoSet | None, some: Configurations, figures: Figures) -> ParetoSet:
    """Return the Pareto set of one and more feasible configurations."""
    if one is not None:
        c = one.configurations
        some = Configurations(
            *(np.concatenate([getattr(c, n), getattr(some, n)]) for n in ("service", "replicas", "policy"))
        )
        figures = _both(one.figures, figures)
    values = values_of(figures, field.names)
    keep = non_dominated(values)
    return ParetoSet(some.at(keep), figures.at(keep), values[keep], 0, 0)


def _both(a: Figures, b: Figures) -> Figures:
    return Figures(*(np.concatenate([getattr(a, n), getattr(b, n)]) for n in Figures.__dataclass_fields__))


# ---------------------------------------------------------------------------------------------------------------------
# Optuna
# ---------------------------------------------------------------------------------------------------------------------


def ranges(table: Tables) -> dict[str, Any]:
    """Return what a trial draws: service and replicas of each tier, and a rank among the policies they carry."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for k in range(table.tiers):
        services = range(table.begin[k], table.begin[k + 1])
        found[f"service_{k}"] = CategoricalDistribution(list(range(len(services))))
        found[f"replicas_{k}"] = IntDistribution(
            0, max(int(table.fleet[table.pool[s]] // table.gpus[s]) for s in services)
        )
    return found | {"policy": FloatDistribution(0.0, 1.0)}


def configuration(table: Tables, params: Params) -> tuple[Configurations | None, float]:
    """Return the configuration of a trial and by how much it breaks its constraints, None where they are broken [-].

    Policies carried are ranked by quality; a tier that the policy does not visit gets no replicas.
    """
    service = np.array([int(params[f"service_{k}"]) for k in range(table.tiers)])
    replicas = np.array([int(params[f"replicas_{k}"]) for k in range(table.tiers)])
    at = service + table.begin[:-1]
    held = np.bincount(table.pool[at], weights=replicas * table.gpus[at], minlength=len(table.fleet))
    over = float(np.maximum(held / table.fleet - 1, 0.0).max())
    if over > 0:
        return None, over
    carried = np.flatnonzero((table.rate * table.visits <= replicas * table.capacity[at] * (1 + 1e-9)).all(axis=1))
    if not len(carried):
        return None, 1.0
    policy = carried[min(int(params["policy"] * len(carried)), len(carried) - 1)]
    replicas = np.where(table.visits[policy] > 0, replicas, 0)
    return Configurations(service[None], replicas[None], np.array([policy])), 0.0


def told(field: Field, params: Params) -> Told:
    """Return what a trial comes to."""
    one, broken = configuration(field.table, params)
    if one is None:
        return Told((WORST,) * len(field.names), {"fits": broken})
    figures = field.figures(one)
    feasible = bool(figures.feasible[0])
    values = tuple(float(v) for v in np.minimum(values_of(figures, field.names)[0], WORST))
    return Told(values, {"fits": 0.0 if feasible else max(float(figures.used[0]) - 1, 1e-9)})


def neighbours(field: Field, search: Search) -> list[Params]:
    """Return the trials that come first: plans of the enumeration, and those one replica or service off them."""
    plans = sorted((c for c in search.enumerate() if field.floor is None or c.rule.quality >= field.floor), key=_cost)
    found: list[Params] = []
    spread = plans[:: max(1, len(plans) // 8)][:8]
    limits = ranges(field.table)
    for plan in spread:
        start = _params(field, search, plan)
        near = [start]
        for k in range(field.table.tiers):
            for name, step in ((f"replicas_{k}", 1), (f"replicas_{k}", -1)):
                near.append(start | {name: start[name] + step})
            near += [start | {f"service_{k}": s} for s in limits[f"service_{k}"].choices]
        for params in near:
            inside = all(0 <= params[f"replicas_{k}"] <= limits[f"replicas_{k}"].high for k in range(field.table.tiers))
            if inside and params not in found:
                found.append(params)
    return found


def _cost(plan: Candidate) -> tuple[float, float]:
    return plan.cost, -plan.rule.quality


def _params(field: Field, search: Search, plan: Candidate) -> Params:
    """Return the trial of a plan, its policy the best one that its replicas carry."""
    params: Params = {"policy": 1.0}
    for k in range(field.table.tiers):
        params |= {f"service_{k}": 0, f"replicas_{k}": 0}
    for g in plan.groups:
        place = next(i for i, s in enumerate(search.space.services[g.tier]) if s is g.service)
        params |= {f"service_{g.tier}": place, f"replicas_{g.tier}": g.replicas}
    return params


def _tried(task: tuple[bytes, Params]) -> tuple[Told, Params]:
    sent, params = task
    return told(_received(sent), params), params


@lru_cache(maxsize=1)
def _received(sent: bytes) -> Field:
    found = pickle.loads(sent)
    assert isinstance(found, Field)
    return found


def from_trials(field: Field, trials: Sequence[Params]) -> ParetoSet | None:
    """Return the Pareto set of the feasible trials; None if there is none."""
    found: ParetoSet | None = None
    feasible = 0
    for params in trials:
        one, _ = configuration(field.table, params)
        figures = None if one is None else field.figures(one)
        if one is not None and figures is not None and bool(figures.feasible[0]):
            feasible += 1
            found = _joined(field, found, one, figures)
    if found is None:
        return None
    return ParetoSet(found.configurations, found.figures, found.values, len(trials), feasible)


# ---------------------------------------------------------------------------------------------------------------------
# A scenario
# ---------------------------------------------------------------------------------------------------------------------


def parse_objectives(text: str) -> tuple[str, ...]:
    """Return the objectives of ``cost,quality,...``.

    Raises
    ------
    InputError
        If a name is unknown or given twice, or there is only one.

    Examples
    --------
    >>> parse_objectives("cost, energy")
    ('cost', 'energy')
    """
    names = tuple(word.strip() for word in text.split(","))
    unknown = [n for n in names if n not in OBJECTIVES]
    require(not unknown, "objectives", f"must be of {', '.join(OBJECTIVES)}", text, "E.g. cost,quality,latency.")
    require(len(set(names)) == len(names) > 1, "objectives", "must be two or more, each once", text)
    return names


def pareto_plans(
    scenario: Scenario,
    folder: Path,
    names: Sequence[str],
    seed: int | None = None,
    progress: Progress = silent,
    means: Means | None = None,
    exhaust: int = EXHAUSTIVE,
) -> dict[str, Any]:
    """Return the plans of a scenario that none beats in all of some objectives, as ``tierwise plan --objectives``.

    Figures are analytic, with replicas loaded to at most ``HEADROOM`` of what they bear by the analytic model; the best
    plan of each objective is simulated too. A quality floor or budget of the scenario is kept; lambda plays no part.

    Raises
    ------
    InputError
        If the scenario asks for something that is not there or does not make sense.
    InfeasibleError
        If no plan keeps the constraints.
    """
    require(scenario.traffic.clients == 0, "traffic.clients", "must be 0 to plan", scenario.traffic.clients)
    used_seed = scenario.search.seed if seed is None else seed
    progress("enumerating", 0, 1)
    problem = resolve(scenario, folder, None, used_seed)
    space = enumerate_space(problem)
    careful = replace(space, capacity=tuple(HEADROOM * c for c in space.capacity))
    search = Search(problem, careful, quality_floor(problem))
    field = searched_field(search, names)
    with ledger(problem, used_seed, means or Means(), names) as kept:
        exact = bound(field.table) <= exhaust
        if exact:
            found = exhaustive(field)
        else:
            trials = TRIALS * scenario.search.trials
            found = from_trials(field, _optuna(field, search, trials, used_seed, kept.minimise, progress))
        if found is None:
            raise InfeasibleError(
                "no configuration keeps the SLOs and the objective's floor or budget on this fleet. "
                "Relax `slo` or `objective`, or raise `fleet.gpus`: `tierwise plan` says what binds."
            )
        c, e2e = found.configurations, found.figures.e2e_s
        plans = [plan_of(search, field.rules[p], c.at([i]), float(e2e[i])) for i, p in enumerate(c.policy)]
        best = {name: int(np.argmin(found.values[:, j])) for j, name in enumerate(names)}
        progress("simulating", 0, 1)
        tasks = {f"extreme: {i}": (problem, plans[i], used_seed) for i in dict.fromkeys(best.values())}
        simulated = dict(zip(dict.fromkeys(best.values()), kept.simulations(simulated_plan, tasks), strict=True))
    rows = [_row(problem, found, i, plans[i]) for i in range(len(plans))]
    for i, figures in simulated.items():
        keeps = {"keeps_slos": not missed(figures, plans[i], problem)}
        rows[i] |= {"best_in": [n for n in names if best[n] == i], "simulated": _key_figures(figures) | keeps}
    rows.sort(key=lambda r: tuple((-1 if n == "quality" else 1) * (r[OBJECTIVES[n]] or 0.0) for n in names))
    return {
        "scenario": scenario.name,
        "objectives": [{"name": n, "key": OBJECTIVES[n], "goal": "max" if n == "quality" else "min"} for n in names],
        "pareto": rows,
        "search": {
            "method": "exhaustive" if exact else "optuna",
            "looked_at": found.looked_at,
            "feasible": found.feasible,
            "configurations_at_most": bound(field.table),
            "load_at_most": HEADROOM,
        },
        "provenance": {
            "step_time": joined_names(p.profile.provenance for p in problem.pools),
            "profile": joined_names(p.profile.name for p in problem.pools),
            "traffic": problem.workload.source,
            "seed": used_seed,
        },
    }


def _optuna(
    field: Field,
    search: Search,
    trials: int,
    seed: int,
    minimise: Callable[..., list[Params]],
    progress: Progress,
) -> list[Params]:
    """Return the parameters of all trials."""
    import optuna

    sent = pickle.dumps(field)
    first = neighbours(field, search)[: int(FIRST * trials)]
    proposals = Proposals(first, ranges(field.table), lambda s: optuna.samplers.TPESampler(seed=s))

    def each(workers: Workers, params: list[Params]) -> Iterator[tuple[Told, Params]]:
        return workers(_tried, [(sent, p) for p in params])

    return minimise(proposals, trials, seed, each, progress)


def plan_of(search: Search, rule: Rule, configuration: Configurations, e2e_s: float) -> Candidate:
    """Return one configuration as a plan."""
    problem, visits = search.problem, dict(zip(rule.tiers, rule.visits, strict=True))
    groups = tuple(
        Group(k, search.space.services[k][s], int(m), problem.rate * float(visits[k]) / int(m))
        for k, (s, m) in enumerate(zip(configuration.service[0], configuration.replicas[0], strict=True))
        if m > 0
    )
    return Candidate(rule, groups, price(problem, groups) / problem.rate, e2e_s)


def _row(problem: Problem, found: ParetoSet, i: int, plan: Candidate) -> dict[str, Any]:
    f = found.figures
    return {
        "usd_per_1000_requests": 1000 * float(f.cost[i]),
        "quality": float(f.quality[i]) if np.isfinite(f.quality[i]) else None,
        "e2e_mean_s": float(f.e2e_s[i]),
        "joules_per_request": float(f.joules[i]),
        "ttft_p99_s": float(f.ttft_p99_s[i]),
        "tpot_mean_s": float(f.tpot_s[i]),
        "gpus": int(f.gpus[i]),
        "tiers": [
            f"{g.replicas} x {problem.scenario.tiers[g.tier].name} tp{g.service.gpus}"
            f"{problem.where(g.service.deployment)}" + (f" + {g.service.draft.model.name}" if g.service.draft else "")
            for g in plan.groups
        ],
        "first_stops": explain.first_stops(plan.rule),
        "best_in": [],
        "simulated": None,
    }


def _key_figures(simulated: dict[str, Any]) -> dict[str, Any]:
    return {
        "usd_per_1000_requests": simulated["cost"]["usd_per_1000_requests"],
        "quality": simulated["quality"]["mean"] if simulated["quality"] else None,
        "e2e_mean_s": simulated["e2e_s"]["mean"],
        "joules_per_request": simulated["energy_j"]["per_request"],
        "ttft_p99_s": max(t["ttft_s"]["p99"] or 0.0 for t in simulated["tiers"]),
        "tpot_mean_s": simulated["tpot_s"]["mean"],
        "status": simulated["status"],
    }

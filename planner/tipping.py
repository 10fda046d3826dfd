"""What would change the decision: the nearest load, price, acceptance or objective at which another plan wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from simulator.workload import at_rate
from theory.errors import InfeasibleError

from .build import Problem
from .search import Candidate, Group, Rule, Search, best_of, quality_floor
from .service import Service, with_acceptance
from .space import Space, capacities

FACTORS = (1.1, 1.25, 1.5, 2.0, 3.0)  # by which load and objective are multiplied or divided, nearest first [-]
STEPS = (0.005, 0.02, 0.05)  # by which a quality floor is moved, nearest first [-]
DROPS = (0.1, 0.3)  # by which an acceptance falls, nearest first [-]
HALVINGS = 3  # of the bracket around a change [-]

Deployed = tuple[tuple[int, str, int], ...]
Winner = Callable[[float], "Candidate | None"]


def tipping_points(
    problem: Problem, space: Space, chosen: Candidate, rules: list[Rule], known: Search | None = None
) -> list[dict[str, Any]]:
    """Return, for each thing that may turn out different, the nearest value at which another deployment wins.

    Analytic, from what replicas bear in ``space``; values between those tried (FACTORS, STEPS, DROPS) are found by
    halving, so a plan that wins only between two values tried is missed. ``to`` is None when the same plan wins at all
    of them. The price of a GPU has no search of its own: multiplying it by f is dividing lambda or the budget by f, and
    under a quality floor it multiplies every cost alike and changes nothing.

    Parameters
    ----------
    space : Space
        With the capacities that the plan was chosen on.
    rules : list of Rule
        Stop rules known to be good, tried besides the enumerated ones.
    known : Search, optional
        That knows which services are faster in simulation.

    Source
    ------
    Derivation.
    """
    deployed, search = _deployed(chosen), (known or Search(problem, space, None)).like(problem, space)
    # the load changes no price of a visit, hence no frontier: they are found once
    fronts = [list(search.rules(tiers, search.prices(tiers))) for tiers in search.subsets()]
    rows = [
        *_both_ways("traffic.rate", "requests/s", problem.rate, _by_rate(search, rules, fronts), deployed),
        *_objective(search, rules, deployed),
    ]
    rows += [row for g in chosen.groups if g.service.draft is not None for row in _acceptance(search, rules, g, chosen)]
    return rows


def _deployed(candidate: Candidate) -> Deployed:
    return tuple((g.tier, _name(g.service), g.replicas) for g in candidate.groups)


def _name(service: Service) -> str:
    d = service.deployment
    return f"{service.name} on {d.accelerator.name}, {d.limits.max_num_seqs} sequences"


def _best(search: Search, rules: list[Rule], fronts: list[list[Rule]] | None = None) -> Candidate | None:
    """Return the best plan of the known rules and frontiers, enumerated if not given; None if none is feasible."""
    known = [c for c in (search.allocate(rule) for rule in rules) if c is not None]
    more = search.enumerate() if fronts is None else [c for front in fronts for c in search.carried(front)]
    try:
        return search.settle(best_of(search, known + more)[0])
    except InfeasibleError:
        return None


def _by_rate(search: Search, rules: list[Rule], fronts: list[list[Rule]]) -> Winner:
    def best(rate: float) -> Candidate | None:
        changed = replace(search.problem, workload=at_rate(search.problem.workload, rate))
        return _best(search.like(changed, search.space), rules, fronts)

    return best


def _both_ways(key: str, unit: str, value: float, best: Winner, deployed: Deployed) -> list[dict[str, Any]]:
    """Return the nearest change below and above."""
    lower, higher = ([value * f**sign for f in FACTORS] for sign in (-1, 1))
    return [_nearest(key, unit, value, tried, best, deployed) for tried in (lower, higher)]


def _nearest(key: str, unit: str, value: float, tried: list[float], best: Winner, deployed: Deployed) -> dict[str, Any]:
    """Walk through the values tried until another deployment wins, then halve the bracket."""
    row: dict[str, Any] = {"key": key, "unit": unit, "from": value, "to": None, "tried_to": tried[-1], "plan": None}
    same = value
    for other in tried:
        winner = best(other)
        if winner is not None and _deployed(winner) == deployed:
            same = other
            continue
        for _ in range(HALVINGS):
            middle = (same + other) / 2
            at = best(middle)
            if at is not None and _deployed(at) == deployed:
                same = middle
            else:
                other, winner = middle, at
        return row | {"to": other, "plan": _described(winner)}
    return row


def _described(winner: Candidate | None) -> dict[str, Any] | None:
    if winner is None:
        return None
    return {
        "gpus": winner.gpus,
        "usd_per_1000_requests": 1000 * winner.cost,
        "tiers": [f"{g.replicas} x {g.service.name}" for g in winner.groups],
    }


def _objective(search: Search, rules: list[Rule], deployed: Deployed) -> list[dict[str, Any]]:
    """Return the changes of lambda, the budget or the quality floor, and of the price of a GPU that amount to them."""
    problem = search.problem
    objective = problem.scenario.objective
    assert objective is not None
    several = len(problem.pools) > 1
    price, per = (1.0, "of the price of every pool") if several else (problem.pools[0].price_per_gpu_hour, "USD/h")

    def best(value: float) -> Candidate | None:
        changed = objective.model_copy(update={name: value})
        asked = replace(problem, scenario=problem.scenario.model_copy(update={"objective": changed}))
        return _best(search.like(asked, search.space), rules)

    floor = quality_floor(problem)
    if floor is not None:
        name = "quality_floor"
        ways = [[floor - s for s in STEPS if s < floor], [floor + s for s in STEPS if floor + s <= 1] or [1.0]]
        rows = [_nearest(f"objective.{name}", "-", floor, tried, best, deployed) for tried in ways]
        return [*rows, _price_row(price, per, price, None, None)]
    if objective.quality_floor is not None:  # as often right as the one tier there is: nothing to move
        return [_price_row(price, per, price, None, None)]
    name = "lambda_usd" if objective.lambda_usd is not None else "budget_usd_per_1000"
    unit = "USD per correct answer" if name == "lambda_usd" else "USD per 1000 requests"
    rows = _both_ways(f"objective.{name}", unit, float(getattr(objective, name)), best, deployed)
    factors = [(None if r["to"] is None else r["from"] / r["to"], r["from"] / r["tried_to"], r["plan"]) for r in rows]
    prices = [
        _price_row(price, per, price * end, None if f is None else price * f, p) for f, end, p in reversed(factors)
    ]
    return rows + prices


def _price_row(price: float, unit: str, tried: float, to: float | None, plan: dict[str, Any] | None) -> dict[str, Any]:
    scaled = (
        None
        if plan is None or to is None
        else plan | {"usd_per_1000_requests": plan["usd_per_1000_requests"] * to / price}
    )
    return {
        "key": "fleet.price_per_gpu_hour",
        "unit": unit,
        "from": price,
        "to": to,
        "tried_to": tried,
        "plan": scaled,
    }


def _acceptance(search: Search, rules: list[Rule], group: Group, chosen: Candidate) -> list[dict[str, Any]]:
    """Return the fall of the acceptance of one tier's draft, the others as they are, at which another plan wins."""
    problem, space, service = search.problem, search.space, group.service
    assert service.draft is not None
    value, deployed = service.draft.acceptance.value, _deployed(chosen)

    same = _of_draft(space, group)
    before = capacities([space.services[group.tier][i] for i in same], space.load, problem.scenario.slo)

    def best(acceptance: float) -> Candidate | None:
        changed = _with_acceptance(problem, space, group.tier, dict(zip(same, before, strict=True)), acceptance)
        return _best(search.like(problem, changed), rules, [])

    tried = [value - d for d in DROPS if d < value]
    key = f"acceptance of {service.draft.model.name} for {problem.scenario.tiers[group.tier].name}"
    return [_nearest(key, "-", value, tried, best, deployed)] if tried else []


def _of_draft(space: Space, group: Group) -> list[int]:
    """Return which services of a tier have the draft of a group, on however many GPUs."""
    draft, services = group.service.draft, space.services[group.tier]
    assert draft is not None
    return [i for i, s in enumerate(services) if s.draft is not None and s.draft.model == draft.model]


def _with_acceptance(problem: Problem, space: Space, tier: int, before: dict[int, float], acceptance: float) -> Space:
    """Return the space with another acceptance of some services of a tier, by index with their analytic capacity.

    What is known of a capacity stays as far from the analytic one as it was.
    """
    services, capacity = list(space.services[tier]), space.capacity[tier].copy()
    changed = {i: with_acceptance(services[i], space.load, acceptance) for i in before}
    after = capacities(list(changed.values()), space.load, problem.scenario.slo)
    for (i, service), now in zip(changed.items(), after, strict=True):
        services[i] = service
        capacity[i] *= now / before[i] if before[i] > 0 else 1.0
    every, bears = list(space.services), list(space.capacity)
    every[tier], bears[tier] = tuple(services), capacity
    return replace(space, services=tuple(every), capacity=tuple(bears))

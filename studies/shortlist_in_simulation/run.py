"""Claim: the best plan under long simulation is in the shortlist that `tierwise plan` reports; its plan keeps the SLOs.

Three spaces of more than 20,000 configurations, those of studies/search_regret. Candidates: all layouts (service and
replicas of each tier) that are as good as the plan to within MARGIN of its worth if every replica bore HOPE times what
the analytic model says, so that a plan the analytic model thinks too little of is among them. Each is run over LONG
requests that the planner never saw, with its best policies; those that keep the SLOs compete on their worth.

    python studies/shortlist_in_simulation/run.py [--quick] [--output DIR]

Exits with 1 when a better candidate keeps the SLOs and is not in the shortlist, or the plan breaks them.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from planner.build import Problem, redrawn, resolve
from planner.evaluate import Configurations, every, worth
from planner.objectives import plan_of, searched_field
from planner.plan import silent
from planner.scenario import load_scenario
from planner.search import Candidate, Search, order, quality_floor, refine
from planner.simulate import missed, simulate_candidate
from planner.space import enumerate_space
from planner.storage import Means, ledger
from planner.verify import HOPE, Asked, Verified, verified
from studies.search_regret.run import SPACES
from studies.study import Study

LONG, SHORT = 60_000, 10_000  # requests of a long run, and of one in quick mode [-]
SEED = 4242  # of those requests: the planner uses 0 and its children
MARGIN = 0.01  # of the worth of the plan, by which a candidate may be worse analytically [-]
POLICIES = 3  # of a layout that are run at most, best first; one where all are worth the same [-]
MOST, FEW = 24, 4  # candidates run at most, best first, and in quick mode [-]


def planned(overrides: tuple[str, ...]) -> tuple[Problem, Verified, Path]:
    """Return the problem of a space and what the planner verified for it."""
    scenario, folder = load_scenario(overrides=overrides)
    problem = resolve(scenario, folder, None, 0)
    search = Search(problem, enumerate_space(problem), quality_floor(problem))
    with ledger(problem, 0, Means()) as kept:
        rules = [c.rule for c in search.enumerate()] + refine(search, scenario.search.trials, 0, kept, silent)
        return problem, verified(search, rules, Asked(problem, folder, 0, kept, silent)), folder


def candidates(problem: Problem, plan: Candidate, most: int) -> tuple[list[Candidate], int, int]:
    """Return the plans to run, how many configurations were looked at, and how many lay within the margin."""
    search = Search(problem, enumerate_space(problem), quality_floor(problem))
    search.hope(HOPE)
    field = searched_field(search, ("cost", "quality"))
    objective = problem.scenario.objective
    limit = order(objective, search.floor, plan)[1]
    limit += MARGIN * abs(limit)
    parts: list[tuple[np.ndarray, Configurations, Any]] = []
    looked_at = 0
    for some in every(field.table):
        figures = field.figures(some)
        looked_at += len(some.policy)
        at = np.flatnonzero(figures.feasible & (worth(figures, objective) <= limit))
        parts.append((worth(figures, objective)[at], some.at(at), figures.at(at)))
    rows = [(float(w), float(f.used[i]), c.at([i]), float(f.e2e_s[i])) for ws, c, f in parts for i, w in enumerate(ws)]
    rows.sort(key=lambda r: r[:2])
    same = objective is not None and objective.quality_floor is not None  # the worth is the cost, whatever the policy
    taken: dict[tuple[int, ...], int] = {}
    found: list[Candidate] = []
    for _, _, one, e2e in rows:
        service, replicas = one.service[0], one.replicas[0]
        layout = (*np.where(replicas > 0, service, -1), *replicas)
        if taken.get(layout, 0) < (1 if same else POLICIES) and len(found) < most:
            taken[layout] = taken.get(layout, 0) + 1
            found.append(plan_of(search, field.rules[one.policy[0]], one, e2e))
    return found, looked_at, len(rows)


def runs_long(task: tuple[Problem, Candidate]) -> bool:
    """Return whether a plan keeps the SLOs over the long run."""
    problem, plan = task
    return not missed(simulate_candidate(problem, plan, SEED), plan, problem)


def named(problem: Problem, plan: Candidate) -> list[str]:
    """Return the deployment as the shortlist writes it."""
    return [f"{g.replicas} x {g.service.name}{problem.where(g.service.deployment)}" for g in plan.groups]


def row_of(space: str, quick: bool) -> dict[str, Any]:
    """Return what one space showed."""
    start = time.perf_counter()
    problem, found, folder = planned(SPACES[space])
    tried, looked_at, within = candidates(problem, found.chosen, FEW if quick else MOST)
    scenario = problem.scenario
    traffic = scenario.traffic.model_copy(update={"requests": SHORT if quick else LONG})
    longer = Problem(
        **{f: getattr(problem, f) for f in Problem.__dataclass_fields__}
        | {"scenario": scenario.model_copy(update={"traffic": traffic})}
    )
    long = redrawn(longer, folder, SEED)
    with ProcessPoolExecutor(2) as pool:
        keeps = list(pool.map(runs_long, [(long, c) for c in [found.chosen, *tried]]))
    floor = quality_floor(problem)
    value = {id(c): order(scenario.objective, floor, c)[1] for c in [found.chosen, *tried]}
    good = [c for c, kept in zip([found.chosen, *tried], keeps, strict=True) if kept]
    best = min(good, key=lambda c: value[id(c)]) if good else None
    shortlist = [set(r["tiers"]) for r in found.shortlist]
    own = value[id(found.chosen)]
    return {
        "space": space,
        "configurations": looked_at,
        "within_margin": within,
        "run_long": len(tried),
        "requests": SHORT if quick else LONG,
        "keep_slos": sum(keeps[1:]),
        "plan": named(problem, found.chosen),
        "plan_worth": own,
        "plan_keeps_slos": keeps[0],
        "best": named(problem, best) if best else None,
        "best_worth": value[id(best)] if best else None,
        "gain": (own - value[id(best)]) / abs(own) if best else None,
        "in_shortlist": best is not None and (best is found.chosen or set(named(problem, best)) in shortlist),
        "shortlist": [r["tiers"] for r in found.shortlist],
        "plans_tested": found.selection["plans_tested"],
        "requests_of_planner": found.selection["requests_simulated"],
        "wall_s": time.perf_counter() - start,
    }


def readme(result: dict[str, Any]) -> str:
    """Return README.md with the numbers of the result."""
    lines = [
        f"| {r['space']} | {r['configurations']:,} | {r['within_margin']:,} | {r['run_long']} | {r['keep_slos']} | "
        f"{' + '.join(r['plan'])} | {'same' if r['best'] == r['plan'] else ' + '.join(r['best'] or ['none'])} | "
        f"{'-' if r['gain'] is None else format(r['gain'], '.2%')} | {'yes' if r['in_shortlist'] else '**no**'} |"
        for r in result["rows"]
    ]
    return README.format(
        rows="\n".join(lines),
        long=f"{LONG:,}",
        margin=f"{MARGIN:.0%}",
        hope=f"{HOPE:.2f}",
        most=MOST,
        policies=POLICIES,
        verdicts="\n".join(f"- {'yes' if ok else '**no**'}: {name}" for name, ok in result["verdicts"].items()),
    )


README = """# The shortlist holds the best plan of long simulations

**Claim.** In three spaces of more than 20,000 configurations the best plan under long simulation is in the shortlist
that `tierwise plan` reports, and the plan it picks keeps the SLOs over requests it never saw.

{verdicts}

Written by `python studies/shortlist_in_simulation/run.py`, which fails when the claim stops being true.

| space | configurations | in margin | run long | keep the SLOs | plan | best in simulation | better by | in shortlist |
|---|---|---|---|---|---|---|---|---|
{rows}

A candidate is within the margin if it is at most {margin} worse than the plan (cost under a floor, quality under a
budget, cost less worth of answers with lambda) where every replica bears {hope} times what the analytic model says; in
[another study](../capacity_without_simulation/README.md) none of 47 services bears more. Of these the {most} best are
run over {long} requests of another seed, at most {policies} policies of a layout (one under a floor, where all are
worth the same: the least loaded).

## What it does not say

- That no configuration of the margin beyond the {most} best would have kept the SLOs: they were not run.
- The policies are those of the tabulated frontiers; the plan may use others, found by the search over prices.
- What would refute it: a service that bears more than {hope} times its analytic capacity.
"""


def analyse(given: argparse.Namespace) -> dict[str, Any]:
    """Return the result of the study."""
    rows = []
    for space in list(SPACES)[:1] if given.quick else SPACES:
        rows.append(row_of(space, given.quick))
        sys.stderr.write(f"{space}: {rows[-1]['wall_s']:.0f} s\n")
    return {
        "rows": rows,
        "verdicts": {
            "every space has 20,000 configurations": all(r["configurations"] >= 20_000 for r in rows),
            "the best plan of long simulations is in the shortlist": all(r["in_shortlist"] for r in rows),
            "the plan keeps the SLOs over requests it never saw": all(r["plan_keeps_slos"] for r in rows),
        },
    }


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    rows = result["rows"]
    inside = sum(r["in_shortlist"] for r in rows)
    most = max((r["gain"] for r in rows if r["gain"] is not None), default=0.0)
    ran = sum(r["run_long"] for r in rows)
    return f"best of {ran} long runs in {inside} of {len(rows)} shortlists, better by {most:.2%} at most"


STUDY = Study(
    __file__,
    __doc__,
    analyse,
    readme,
    headline,
    n=lambda result: sum(r["run_long"] for r in result["rows"]),
    quick="one space, short runs",
    times=("wall_s",),
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

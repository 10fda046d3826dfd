"""Claim: the planner evaluates 100,000 configurations a second on one core, latency, queueing and policy included.

All configurations of the shipped scenario that the fleet has room for, in shuffled order, by `planner.evaluate`;
against a plain loop over the exact functions (`planner.space.occupancy`, `theory.queueing.ttft_quantile`), one
configuration at a time, and the differences between the two. numpy's arithmetic on arrays uses one core.

    python studies/planner_speed/run.py [--quick] [--output DIR]

Exits with 1 when the rate is below 100,000 a second, or a figure differs by more than 1 %.
"""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from planner.build import resolve
from planner.evaluate import Configurations, Tables, evaluate, every, rules_of, tables
from planner.scenario import load_scenario
from planner.search import Search, quality_floor
from planner.space import P99, enumerate_space, occupancy
from studies.study import Study
from theory.queueing import ttft_quantile

HERE = Path(__file__).parent
RATE, ERROR = 100_000, 0.01  # stated [configurations/s], [-]
REPEATS, LOOPED = 5, 400


def one_by_one(search: Search, table: Tables, some: Configurations) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return (TTFT p99, mean TPOT, mean E2E) of each configuration by the exact functions, (n, 3) [s]."""
    rows = []
    for service, replicas, policy in zip(some.service, some.replicas, some.policy, strict=True):
        visits = table.visits[policy]
        on = np.flatnonzero(visits)
        groups = [search.space.services[k][service[k]] for k in on]
        state = occupancy(groups, table.rate * visits[on] / replicas[on], search.space.load)
        tpot = visits[on] @ state.tpot_s / visits.sum()
        rows.append((float(ttft_quantile(state, P99).max()), float(tpot), float(visits[on] @ state.e2e_s)))
    return np.array(rows)


def analyse(quick: bool) -> dict[str, Any]:
    """Return the result of the study."""
    scenario, folder = load_scenario(overrides=["traffic.requests=4000"])
    problem = resolve(scenario, folder)
    search = Search(problem, enumerate_space(problem), quality_floor(problem))
    rules = rules_of(search)
    start = time.perf_counter()
    table = tables(search, rules)
    built = time.perf_counter() - start
    parts = list(every(table))
    rng = np.random.default_rng(0)
    mixed = rng.permutation(sum(len(p.policy) for p in parts))
    joined = Configurations(
        *(np.concatenate([getattr(p, name) for p in parts])[mixed] for name in ("service", "replicas", "policy"))
    )
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        figures = evaluate(table, joined, problem.scenario.objective, search.floor)
        times.append(time.perf_counter() - start)
    n = len(joined.policy)
    stable = np.flatnonzero(np.isfinite(figures.e2e_s) & figures.fits)[: 60 if quick else LOOPED]
    start = time.perf_counter()
    exact = one_by_one(search, table, joined.at(stable))
    loop = len(stable) / (time.perf_counter() - start)
    found = np.stack([figures.ttft_p99_s, figures.tpot_s, figures.e2e_s], axis=1)[stable]
    error = np.abs(found / exact - 1).max(axis=0)
    rate = n / float(np.median(times))
    return {
        "configurations": n,
        "services": len(table.gpus),
        "policies": len(rules),
        "feasible": int(figures.feasible.sum()),
        "per_s": rate,
        "slowest_per_s": n / max(times),
        "loop_per_s": loop,
        "ratio": rate / loop,
        "tables_s": built,
        "largest_error": dict(zip(("p99 TTFT", "mean TPOT", "mean E2E"), error.tolist(), strict=True)),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}",
        "verdicts": {
            "100,000 configurations a second": rate >= RATE,
            "figures within 1 % of the exact functions": bool(np.all(error <= ERROR)),
        },
    }


README = """# Speed of the planner's evaluation

**Claim.** 100,000 configurations a second on one core, with latency, queueing and policy.
Measured: **{per_s:,.0f}** a second (median of {repeats}; slowest {slowest_per_s:,.0f}), {ratio:,.0f} times a plain loop
over the exact functions ({loop_per_s:,.0f} a second).

Written by `python studies/planner_speed/run.py`, which fails when the claim stops being true. Machine: {machine},
shared with other work: rates are lower bounds.

| | |
|---|---|
| configurations that the fleet has room for | {configurations:,} |
| of them feasible | {feasible:,} |
| services, policies | {services}, {policies} |
| tables of all services, once [s] | {tables_s:.2f} |
| largest difference from the exact functions, p99 TTFT | {largest_error[p99 TTFT]:.2%} |
| mean TPOT | {largest_error[mean TPOT]:.3%} |
| mean E2E | {largest_error[mean E2E]:.3%} |

## What it does not say

- The tables take their time first: for a few thousand configurations a loop is no slower.
- Nothing of how far the queueing theory is from simulation: see `capacity_without_simulation`.
- What would refute it: a scenario whose tables leave the cache.
"""


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.quick),
    lambda result: README.format(**result, repeats=REPEATS),
    lambda result: f"{result['per_s']:,.0f} configurations a second",
    n=lambda result: result["configurations"],
    quick="a shorter loop",
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

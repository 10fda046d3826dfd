"""Claim: the whole frontier of three tiers on 10,000 prompts is solved in under a second, on one core.

An empirical table (one row per prompt, its signals certain) of three tiers that share a difficulty; every vertex of the
frontier. The same with levels smeared over their neighbours, as the fitted tables have them. Then how the time grows
with prompts, levels and tiers.

    python studies/frontier_speed/run.py [--quick] [--output DIR]

Exits with 1 when the time of the stated case is a second or more.
"""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from scipy.special import expit

from calibration.outcome_models import smoothed_outcomes
from studies.study import Study
from theory.cascade import frontier
from theory.outcomes import Outcomes, from_samples

HERE = Path(__file__).parent
LIMIT = 1.0  # of the stated case [s]
PROMPTS, LEVELS, TIERS = 10_000, 20, 3  # the stated case
REPEATS = 5
SKILL = (0.6, 1.6, 2.2, 2.6)  # mean ease of a prompt for each tier (assumed)
COSTS = (1.6, 4.2, 8.8, 16.0)  # 0.125 per 1e9 parameters, and a fourth tier of 128B
GRID = (
    *((n, LEVELS, TIERS) for n in (1_000, 10_000, 100_000)),
    *((PROMPTS, levels, TIERS) for levels in (5, 10, 40)),
    (PROMPTS, 10, 4),
)


def prompts(n: int, levels: int, tiers: int, rng: np.random.Generator) -> Outcomes:
    """Return an empirical table of prompts with a common difficulty, levels of equal width."""
    ease = rng.normal(0, 1.5, (n, 1)) + np.array(SKILL[:tiers]) + rng.normal(0, 0.7, (n, tiers))
    right = (rng.random((n, tiers)) < expit(2 * ease)).astype(float)
    level = np.clip((ease + 3) / 8 * levels, 0, levels - 1).astype(int)
    return from_samples([str(k) for k in range(tiers)], right, level, levels)


def measure(n: int, levels: int, tiers: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return the times of all vertices, table included, and of the hull to a hundredth of a point."""
    times: dict[str, list[float]] = {"exact": [], "0.01 points": [], "smeared": []}
    for _ in range(REPEATS):
        certain = prompts(n, levels, tiers, rng)
        shown = certain.signal.argmax(axis=2)
        smeared = smoothed_outcomes(certain.tiers, certain.correct, shown, levels, 0.7)
        cases = (("exact", 1e-10, certain), ("0.01 points", 1e-4, certain), ("smeared", 1e-4, smeared))
        for name, tolerance, table in cases:
            fresh = Outcomes(table.tiers, table.weight, table.correct, table.signal)  # nothing kept from before
            start = time.perf_counter()
            curve = frontier(fresh, COSTS[:tiers], tolerance=tolerance)
            times[name].append(time.perf_counter() - start)
            if name == "exact":
                vertices = len(curve.vertices)
    return {
        "prompts": n,
        "levels": levels,
        "tiers": tiers,
        "states": (levels + 1) ** tiers,
        "vertices": vertices,
        "seconds": {k: float(np.median(v)) for k, v in times.items()},
        "slowest_s": max(times["exact"]),
    }


def analyse(quick: bool) -> dict[str, Any]:
    """Return the result of the study."""
    rng = np.random.default_rng(0)
    cases = [measure(*case, rng) for case in (((PROMPTS, LEVELS, TIERS),) if quick else GRID)]
    stated = next(c for c in cases if (c["prompts"], c["levels"], c["tiers"]) == (PROMPTS, LEVELS, TIERS))
    return {
        "stated": stated,
        "cases": cases,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "verdicts": {f"{k}: under a second": t < LIMIT for k, t in stated["seconds"].items()},
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw time against prompts and against states."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, key, cases in (
        (left, "prompts", [c for c in result["cases"] if (c["levels"], c["tiers"]) == (LEVELS, TIERS)]),
        (right, "states", [c for c in result["cases"] if c["prompts"] == PROMPTS]),
    ):
        cases = sorted(cases, key=lambda c: c[key])
        for name in ("exact", "0.01 points", "smeared"):
            axis.loglog([c[key] for c in cases], [c["seconds"][name] for c in cases], "o-", label=name)
        axis.axhline(LIMIT, color="tab:red", lw=1)
    left.set(xlabel="prompts (3 tiers, 20 levels)", ylabel="time of the frontier [s]")
    right.set(xlabel="belief states (10,000 prompts)")
    left.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def readme(result: dict[str, Any]) -> str:
    """Return README.md with the numbers of the result."""
    rows = "\n".join(
        f"| {c['prompts']:,} | {c['tiers']} | {c['levels']} | {c['states']:,} | {c['vertices']} | "
        f"{c['seconds']['exact']:.3f} | {c['seconds']['0.01 points']:.3f} | {c['seconds']['smeared']:.3f} |"
        for c in result["cases"]
    )
    return README.format(rows=rows, machine=result["machine"], s=result["stated"])


README = """# Speed of the cascade frontier

**Claim.** All vertices of the frontier of three tiers on 10,000 prompts with 20 levels of signal: under a second.
Measured: **{s[seconds][exact]:.3f} s** (median of 5 tables; slowest {s[slowest_s]:.3f} s), {s[vertices]} vertices.

Written by `python studies/frontier_speed/run.py`, which fails when the claim stops being true. Machine: {machine},
shared with other work: times are upper bounds.

![times](times.png)

| prompts | tiers | levels | belief states | vertices | exact [s] | to 0.01 points [s] | smeared, to 0.01 points [s] |
|---|---|---|---|---|---|---|---|
{rows}

The prompts are counted once into a table of signal vectors, in time proportional to their number; solving then depends
on the states and vertices only. Smeared levels cost little more: prompts of one level share their law, so the counts
are smeared instead of every prompt.

## What it does not say

- The time to fit the table, or to simulate the policies.
- What would refute it: a table on which the number of vertices grows faster than the states.
"""


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.quick),
    readme,
    lambda result: f"{result['stated']['seconds']['exact']:.3f} s, {result['stated']['vertices']} vertices",
    draw=lambda given, result: plot(result, given.folder / "times.png"),
    n=lambda result: len(result["cases"]),
    quick="the stated case only",
    recheck=True,
    times=("seconds", "slowest_s", "machine", "*under a second"),
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

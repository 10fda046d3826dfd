"""Claim: at costs 1.6 / 4.2 / 8.8 lambda in {0.5, 1, 2, 5} escalates nothing; it acts from about 7 to a few hundred.

Costs are a ratio (0.125 per 1e9 parameters), lambda is in the same unit per correct answer. Outcomes of a 13B, a 34B
and a 70B on GSM8K as counts of 1319 problems by who is right; answers seen through verifiers from perfect to none.

    python studies/seed_lambda_grid/run.py [--quick] [--output DIR]

Exits with 1 when a verdict differs from the one in EXPECTED.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from studies.study import Study
from theory.cascade import evaluate, frontier, oracle, solve
from theory.outcomes import Outcomes, accuracy, from_patterns, union_accuracy, with_verifier, without_signal

HERE = Path(__file__).parent
TIERS = ("13b", "34b", "70b")
COSTS = (1.6, 4.2, 8.8)  # cost units of a call
GRID = (0.5, 1.0, 2.0, 5.0)  # the seed's lambdas [cost unit per correct answer]
COUNTS = {"111": 771, "110": 29, "101": 49, "100": 27, "011": 229, "010": 33, "001": 63, "000": 118}  # GSM8K, n = 1319
VERIFIERS = {"perfect": (1.0, 0.0), "good (.95, .1)": (0.95, 0.1), "fair (.9, .3)": (0.9, 0.3), "none": None}
WANTED = (0.6, 0.8)  # the seed's recommended share of early stops [-]
LAMBDAS = np.geomspace(0.5, 1000, 200)
EXPECTED = {
    "no policy escalates below lambda = 4.2, not even with a perfect verifier": True,
    "at lambda 0.5, 1, 2 and 5 every policy is 13B alone": True,
    "lambda acts from 7 on, with a perfect verifier": True,
    "without a signal the frontier changes tier at 18 and at 121": True,
    "with a perfect verifier lambda acts nowhere above 26": True,
    "60 to 80 % of early stops are optimal somewhere with any verifier": True,
    "60 to 80 % of early stops are optimal somewhere without a signal": False,
}


def seen(name: str) -> Outcomes:
    """Return the outcomes seen through a verifier."""
    table, rates = from_patterns(TIERS, COUNTS), VERIFIERS[name]
    return without_signal(table) if rates is None else with_verifier(table, *rates)


def row(table: Outcomes, lam: float) -> dict[str, Any]:
    """Return what the best policy does at a lambda; an early stop runs nothing but the first tier."""
    value = evaluate(solve(table, COSTS, lam), table, COSTS)
    escalated = float(value.visits[1:].sum()) > 0
    return {
        "lambda": lam,
        "cost": value.cost,
        "quality": value.quality,
        "visits": value.visits.tolist(),
        "escalates": escalated,
        "stops_at_first": early_stop(table, lam),
    }


def early_stop(table: Outcomes, lam: float) -> float:
    """Return the share of requests that run the first tier and no other [-]."""
    return float(evaluate(solve(table, COSTS, lam), table, COSTS).stops[0])


def ranges(table: Outcomes) -> list[list[float]]:
    """Return the intervals of lambda on which the best policy stops 60 to 80 % of requests at the first tier."""
    found: list[list[float]] = []
    for vertex in frontier(table, COSTS).vertices:
        low, high = vertex.lam_low, min(vertex.lam_high, 1e6)
        inside = WANTED[0] <= early_stop(table, (low * high) ** 0.5 if low > 0 else high / 2) <= WANTED[1]
        if inside and found and found[-1][1] == low:
            found[-1][1] = high
        elif inside:
            found.append([low, high])
    return found


def analyse() -> dict[str, Any]:
    """Return the result of the study."""
    tables = {name: seen(name) for name in VERIFIERS}
    grid = {name: [row(t, lam) for lam in GRID] for name, t in tables.items()}
    edges = {name: [v.lam_high for v in frontier(t, COSTS).vertices[:-1]] for name, t in tables.items()}
    low = [row(t, lam)["escalates"] for t in tables.values() for lam in np.linspace(0.1, 4.199, 40)]
    stops = {name: ranges(t) for name, t in tables.items()}
    base = tables["none"]
    return {
        "verdicts": {
            "no policy escalates below lambda = 4.2, not even with a perfect verifier": not any(low),
            "at lambda 0.5, 1, 2 and 5 every policy is 13B alone": all(
                np.allclose(r["visits"], [1, 0, 0]) for rows in grid.values() for r in rows
            ),
            "lambda acts from 7 on, with a perfect verifier": round(edges["perfect"][0]) == 7,
            "without a signal the frontier changes tier at 18 and at 121": [round(e) for e in edges["none"]]
            == [18, 121],
            "with a perfect verifier lambda acts nowhere above 26": max(edges["perfect"]) < 26,
            "60 to 80 % of early stops are optimal somewhere with any verifier": all(
                stops[name] for name in VERIFIERS if name != "none"
            ),
            "60 to 80 % of early stops are optimal somewhere without a signal": bool(stops["none"]),
        },
        "accuracy": accuracy(base).tolist(),
        "union": union_accuracy(base),
        "oracle": list(oracle(base, COSTS)),
        "grid": grid,
        "edges": edges,
        "early_stop_ranges": stops,
        "curves": {name: [early_stop(t, float(lam)) for lam in LAMBDAS] for name, t in tables.items()},
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the share of early stops against lambda."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    axis.axhspan(*WANTED, color="0.9", label="recommended: 60 to 80 %")
    for (name, curve), style in zip(result["curves"].items(), ("-", "--", "-.", ":"), strict=True):
        axis.plot(LAMBDAS, curve, style, label=f"verifier: {name}")
    for lam in GRID:
        axis.axvline(lam, color="0.6", lw=0.8)
    axis.set(xscale="log", xlabel="lambda [cost units per correct answer]", ylabel="requests that stop at 13B [-]")
    axis.set_title("GSM8K, 13B / 34B / 70B at 1.6 / 4.2 / 8.8; vertical lines: the grid 0.5, 1, 2, 5", fontsize=10)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def readme(result: dict[str, Any]) -> str:
    """Return README.md with the numbers of the result."""
    rows = []
    for name in VERIFIERS:
        at_five = result["grid"][name][-1]
        found = result["early_stop_ranges"][name]
        stops = ", ".join(f"{a:.1f} to {b:.1f}" if b < 1e6 else f"above {a:.1f}" for a, b in found)
        edges = result["edges"][name]
        share = ", ".join(f"{v:.3f}" for v in at_five["visits"])
        rows.append(f"| {name} | {share} | {edges[0]:.1f} to {edges[-1]:.0f} | {stops or 'nowhere'} |")
    verdicts = "\n".join(f"- {name}: **{'yes' if v else 'no'}**" for name, v in result["verdicts"].items())
    return README.format(verdicts=verdicts, rows="\n".join(rows), union=result["union"], oracle=result["oracle"])


README = """# What lambda does at costs 1.6 / 4.2 / 8.8

**Claim.** The grid lambda = 0.5, 1, 2, 5 at costs 1.6 / 4.2 / 8.8 for 13B / 34B / 70B is below the range on which
lambda acts. An answer is right or wrong, so no escalation can gain more than lambda, and it costs 4.2 or 8.8 in full:
what the first tier cost is spent. 34B rescues 59 % of what 13B gets wrong: 4.2 / 0.59 = 7.1 is where it starts. The
mean latencies' "70B for every prompt" cannot be the optimum of that value.

{verdicts}

Written by `python studies/seed_lambda_grid/run.py`, which fails when a verdict changes.

![early stops](stops.png)

| verifier (P(accept right), P(accept wrong)) | visits at lambda 5 | lambda acts | 60-80 % optimal at lambda |
|---|---|---|---|
{rows}

"Lambda acts": from the first to the last change of the best policy. An early stop runs 13B and nothing else.
On GSM8K some tier is right on {union:.1%}; a router that knows which reaches that at {oracle[0]:.2f} per request.

## The recommendation of 60 to 80 % early stops

It is an outcome, not a target. It is optimal only on the ranges above, at this data and these costs: with a verifier
that sees what is right it follows from 13B being right on 66 % of the problems; without a signal the
share is 100 % or 0 and never between. At other accuracies and costs (load changes them) the range moves.

## What it does not say

- Costs are a ratio of work per token; lengths, batching and load are left out.
- Verdicts of the three verifiers are independent given who is right (assumed); real verifiers fail on the same prompts.
- Counts are one run of each model on 1319 problems: shares are known to about 3 points (95 %).
- What would refute it: a lambda below 4.2 with a policy that escalates and has a larger lambda q - c.
"""


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    edges = result["edges"]
    return (
        f"lambda acts from {edges['perfect'][0]:.1f} on with a perfect verifier, from {edges['none'][0]:.0f} with none"
    )


STUDY = Study(
    __file__,
    __doc__,
    lambda _: analyse(),
    readme,
    headline,
    draw=lambda given, result: plot(result, given.folder / "stops.png"),
    expected=EXPECTED,
    n=lambda _: 1319,
    recheck=True,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

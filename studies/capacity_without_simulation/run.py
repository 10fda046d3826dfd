"""Claim: the load a replica bears within its SLOs follows from the queueing theory within 15 %, without simulation.

    python studies/capacity_without_simulation/run.py [--quick]

For every service of the shipped scenario (model x tensor parallelism x draft) the greatest Poisson rate that keeps
p99 TTFT and mean TPOT is computed analytically and found again by bisection of simulated runs. Exits with 1 when a
verdict differs from the one in EXPECTED. --quick takes every fifth service and writes nothing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from planner.build import resolve
from planner.scenario import load_scenario
from planner.simulate import measured_capacity
from planner.space import enumerate_space
from studies.study import Bar, Study, Validation

HERE = Path(__file__).parent
CLAIM = 0.15  # worst relative difference [-]
ROOMY = 32  # sequences a KV cache holds, from which its limit seldom binds [-]
EXPECTED = {"roomy": True, "tight": False}  # whether the claim holds, by room in the KV cache
REQUESTS = 8000  # simulated at each rate tried [-]
SEED = 11


def rows(every: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return one row per service, and how long the two routes took [s]."""
    scenario, folder = load_scenario(overrides=[f"traffic.requests={REQUESTS}"])
    problem = resolve(scenario, folder)
    start = time.perf_counter()
    space = enumerate_space(problem)
    analytic_s = time.perf_counter() - start
    pairs = [
        (s, float(c))
        for of, caps in zip(space.services, space.capacity, strict=True)
        for s, c in zip(of, caps, strict=True)
    ]
    start, found = time.perf_counter(), []
    for service, analytic in pairs[::every]:
        simulated = measured_capacity(service, problem.workload, scenario.slo, analytic, SEED)
        found.append(
            {
                "service": service.name,
                "gpus": service.gpus,
                "batch_cap": service.batch_cap,
                "analytic_requests_per_s": round(analytic, 3),
                "simulated_requests_per_s": round(simulated, 3),
                "error": round(analytic / simulated - 1, 4),
            }
        )
    return found, {"analytic_s": analytic_s, "simulated_s": time.perf_counter() - start}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the error summary; errors as fractions of the simulated capacity."""
    error = np.array([row["error"] for row in found])
    worst = max(found, key=lambda row: abs(row["error"]))
    return {
        "n": len(found),
        "mape": round(float(np.abs(error).mean()), 4),
        "median_ape": round(float(np.median(np.abs(error))), 4),
        "bias": round(float(error.mean()), 4),
        "p90_ape": round(float(np.quantile(np.abs(error), 0.9)), 4),
        "worst": worst,
        "holds": bool(np.abs(error).max() <= CLAIM),
    }


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draw analytic against simulated capacity."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    x = np.array([row["simulated_requests_per_s"] for row in found])
    y = np.array([row["analytic_requests_per_s"] for row in found])
    line = np.array([x.min() * 0.8, x.max() * 1.25])
    axes.fill_between(line, 0.9 * line, 1.1 * line, color="#555555", alpha=0.12, label="within 10 %")
    axes.plot(line, line, color="#555555", lw=1)
    for name, colour in (("llama-2-13b", "#0072B2"), ("codellama-34b", "#009E73"), ("llama-2-70b", "#D55E00")):
        at = [row["service"].startswith(name) for row in found]
        axes.plot(x[at], y[at], "o", ms=4, color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlim=line, ylim=line)
    axes.set_xlabel("simulated capacity of a replica [requests/s]")
    axes.set_ylabel("analytic capacity [requests/s]")
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def analyse(every: int) -> dict[str, Any]:
    """Return the result of the study."""
    found, spent = rows(every)
    print(f"analytic {spent['analytic_s']:.1f} s for all services, simulated {spent['simulated_s']:.1f} s")
    split = {
        "roomy": [r for r in found if r["batch_cap"] >= ROOMY],
        "tight": [r for r in found if r["batch_cap"] < ROOMY],
    }
    return {
        "claim": CLAIM,
        "summary": {k: summary(v) for k, v in split.items() if v} | {"all": summary(found)},
        "rows": found,
    }


def readme(result: dict[str, Any]) -> str:
    """Return the page of this study."""
    lines = "\n".join(
        f"| {r['service']} | {r['batch_cap']} | {r['analytic_requests_per_s']:.2f} | "
        f"{r['simulated_requests_per_s']:.2f} | {r['error']:+.1%} |"
        for r in result["rows"]
    )
    names = {"roomy": f"KV cache of {ROOMY} sequences or more", "tight": "fewer", "all": "all"}
    table = "\n".join(
        f"| {names[k]} | {s['n']} | {s['mape']:.1%} | {s['median_ape']:.1%} | {s['bias']:+.1%} | {s['p90_ape']:.1%} | "
        f"{s['worst']['error']:+.1%} | {'holds' if s['holds'] else 'does not hold'} |"
        for k, s in result["summary"].items()
    )
    return f"""# What a replica bears, without simulation

**Claim.** The greatest Poisson load at which a replica keeps p99 TTFT (1 s) and mean TPOT (50 ms) follows from the
queueing theory within {CLAIM:.0%}, without simulation.

**Verdict.** {"Holds" if result["summary"]["all"]["holds"] else "Does not hold everywhere"}. Where the KV cache holds a
dozen or two sequences the theory is optimistic: it knows the limit as a number of slots and no preemption, and takes
the wait for a slot from M/G/1. The planner therefore simulates the replicas of every plan it is about to recommend.
(The split by room was made after seeing the numbers.)

| services of the shipped scenario | n | MAPE | median | bias | p90 | worst | claim |
|---|---|---|---|---|---|---|---|
{table}

Written by `python studies/capacity_without_simulation/run.py`, which exits with 1 when a verdict changes. Bisection of
runs of {REQUESTS} requests (log-normal lengths, Poisson arrivals, seed {SEED}) ends with a bracket below 1 %.

![analytic against simulated capacity](capacity.png)

| service | slots | analytic [requests/s] | simulated [requests/s] | error |
|---|---|---|---|---|
{lines}
"""


def bars(result: dict[str, Any]) -> list[Bar]:
    """Return whether the worst error is within the claim, by room in the KV cache."""
    return [
        Bar(f"worst error, {name}", part["holds"], abs(part["worst"]["error"]), CLAIM)
        for name, part in result["summary"].items()
        if name in EXPECTED
    ]


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    of = result["summary"]["all"]
    return f"analytic capacity within {of['mape']:.1%} of the simulated, {abs(of['worst']['error']):.1%} at worst"


def validations(result: dict[str, Any]) -> list[Validation]:
    """Return how far analytic capacities are from simulated ones."""
    names = {"roomy": f"KV cache of {ROOMY} sequences or more", "tight": "a smaller KV cache"}
    return [
        Validation.of(
            part,
            "queueing against simulation",
            f"capacity of a replica within its SLOs, {names[name]}",
            "simulated",
            "nothing",
            worst=abs(part["worst"]["error"]),
        )
        for name, part in result["summary"].items()
        if name in names
    ]


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(5 if given.quick else 1),
    readme,
    headline,
    bars=bars,
    draw=lambda given, result: draw(result["rows"], given.folder / "capacity.png"),
    expected={f"worst error, {name}": holds for name, holds in EXPECTED.items()},
    n=lambda result: len(result["rows"]),
    validations=validations,
    quick="every fifth service",
    quick_judged=False,
    recheck=True,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

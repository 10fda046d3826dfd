"""Claim: on a fixed fleet the best stop rule moves with the load: from 70B alone without load towards stops at 13B.

The shipped scenario (GSM8K outcomes, conversation lengths, H100) on eight GPUs that are paid for whether busy or not:
13B on two, 34B on two, 70B on four, each with its draft. A visit then costs nobody money but everybody time: lambda is
fixed, a second of a request is worth 10 USD an hour, and the prices of visits are those of the load that the rule makes
(theory/load_prices.py). Three loads are run in the simulator.

    python studies/load_moves_the_policy/run.py [--quick] [--output DIR]

Exits with 1 when a verdict differs from the one in EXPECTED.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np

from planner.build import Problem, resolve
from planner.scenario import load_scenario
from planner.service import Service
from planner.space import congestion, enumerate_space
from simulator import metrics
from simulator.cluster import Paths, TierSetup, decide, simulate_cluster
from simulator.workload import at_rate
from studies.study import Study, Validation
from theory.cascade import evaluate
from theory.load_prices import Demand, LoadPlan, Station, plan_under_load

HERE = Path(__file__).parent
DEPLOYED = (  # service and replicas of each tier: eight GPUs
    ("llama-2-13b tp1 + llama-68m (tp1)", 2),
    ("codellama-34b tp2 + llama-68m (tp2)", 1),
    ("llama-2-70b tp4 + tinyllama-1.1b (tp4)", 1),
)
TIME_VALUE = 10 / 3600  # of a second of a request [USD/s]; assumed
LAMBDAS = (0.02, 0.05, 0.2)  # [USD per correct answer]; assumed
SHOWN = 1  # the lambda that is simulated and tabled
RATES = (0.25, 0.5, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22)  # [requests/s]
SIMULATED = (4.0, 12.0, 18.0)  # [requests/s]
REQUESTS = 30_000  # of a simulated load
NEAR = 0.05  # difference of analytic and simulated time of a request that is allowed [-]
STEPS = 60  # of the undamped loop
EARLY = (0.6, 0.8)  # the recommended share of stops at the first tier [-]
EXPECTED = {
    "every plan has its certificate: gap below 1e-6 of lambda": True,
    "without load no request stops at 13B at any lambda": True,
    "the share that stops at 13B never falls as load rises": True,
    "quality never rises by more than 0.01 as load rises": True,
    "the undamped loop policy -> loads -> prices settles at no load from 4 requests/s": True,
    "60 to 80 % of stops at 13B are the optimum at no load and lambda tried": True,
    "simulated shares, quality and time agree with the plan": True,
    "simulated time tells the loads apart: it refutes the plan of another load": True,
}


class Fleet(NamedTuple):
    """What serves."""

    problem: Problem
    services: tuple[Service, ...]
    stations: tuple[Station, ...]

    def demand(self, rate: float, lam: float) -> Demand:
        """Return the requests at a rate and what their answers are worth."""
        assert self.problem.outcomes is not None
        return Demand(self.problem.outcomes, np.zeros(len(DEPLOYED)), rate, lam, TIME_VALUE)


def fleet(requests: int) -> Fleet:
    """Return the deployment with its congestion curves."""
    problem = resolve(*load_scenario(overrides=[f"traffic.requests={requests}"]))
    space = enumerate_space(problem)
    services, stations = [], []
    for i, (name, replicas) in enumerate(DEPLOYED):
        j = [s.name for s in space.services[i]].index(name)
        services.append(space.services[i][j])
        stations.append(congestion(services[-1], space.load, float(space.capacity[i][j]), replicas))
    return Fleet(problem, tuple(services), tuple(stations))


def row(of: Fleet, rate: float, lam: float) -> dict[str, Any]:
    """Return the plan at a rate and a lambda."""
    plan = plan_under_load(of.demand(rate, lam), of.stations)
    gpus = sum(s.gpus * n for s, (_, n) in zip(of.services, DEPLOYED, strict=True))
    return {
        "rate": rate,
        "lambda": lam,
        "stops": plan.value.stops.tolist(),
        "visits": plan.value.visits.tolist(),
        "quality": plan.value.quality,
        "request_s": plan.request_s,
        "usd_per_1000_gpus": 1000 * gpus * of.problem.pools[0].price / rate,
        "usd_per_1000_time": 1000 * TIME_VALUE * plan.request_s,
        "price_usd_per_1000_visits": (1000 * plan.prices).tolist(),
        "of_which_others_time": (1000 * plan.congestion).tolist(),
        "of_which_capacity": (1000 * plan.capacity).tolist(),
        "policies": len(plan.policies),
        "gap_of_lambda": plan.gap / lam,
        "converged": plan.converged,
        "undamped_settles": settles(of, rate, lam),
    }


def settles(of: Fleet, rate: float, lam: float) -> bool:
    """Return whether policy -> loads -> prices -> policy, undamped, comes to rest."""
    demand, visits = of.demand(rate, lam), np.zeros(len(DEPLOYED))
    for _ in range(STEPS):
        loads = np.minimum(rate * visits, [s.capacity for s in of.stations])
        price = [TIME_VALUE * s.marginal(r) for s, r in zip(of.stations, loads, strict=True)]
        before, visits = visits, evaluate(demand.best(price), demand.outcomes, demand.costs).visits
        if np.allclose(before, visits):
            return True
    return False


# ---------------------------------------------------------------- in the simulator


def simulated(of: Fleet, rate: float, requests: int) -> dict[str, Any]:
    """Return the plan of a rate run request by request, beside what it promised."""
    plan = plan_under_load(of.demand(rate, LAMBDAS[SHOWN]), of.stations)
    problem = of.problem
    setups = [
        TierSetup(
            problem.scenario.tiers[i].name,
            s.table,
            s.deployment.limits,
            s.kv_tokens,
            s.schedule,
            s.acceptance,
            replicas,
            s.gpus,
        )
        for i, (s, (_, replicas)) in enumerate(zip(of.services, DEPLOYED, strict=True))
    ]
    paths = mixed_paths(of, plan, requests, np.random.default_rng(1))
    records = simulate_cluster(at_rate(problem.workload, rate), setups, paths, 1)
    e2e = records.completion - records.arrival
    kept = slice(metrics.warmup_requests(records.arrival, e2e), None)
    only_first = paths.visits[:, 0] & ~paths.visits[:, 1:].any(axis=1)
    figures = {"request_s": e2e, "quality": records.correct, "stops_at_first": only_first.astype(float)}
    means = {name: metrics.mean_interval(values[kept]) for name, values in figures.items()}
    promised = {"request_s": plan.request_s, "quality": plan.value.quality, "stops_at_first": plan.value.stops[0]}
    return {
        "rate": rate,
        "status": records.status,
        **{name: [m.value, m.low, m.high] for name, m in means.items()},
        "planned": {name: float(v) for name, v in promised.items()},
    }


def mixed_paths(of: Fleet, plan: LoadPlan, requests: int, rng: np.random.Generator) -> Paths:
    """Return the paths of requests that each follow one of the plan's policies."""
    assert of.problem.outcomes is not None
    which = rng.choice(len(plan.policies), size=requests, p=plan.shares)
    each = [decide(requests, of.problem.outcomes, policy, rng) for policy in plan.policies]
    at = np.arange(requests)
    pick = [np.stack([getattr(p, name) for p in each])[which, at] for name in ("visits", "answer", "quality")]
    return Paths(*pick)


def agrees(found: dict[str, Any], planned: dict[str, float]) -> bool:
    """Return whether a run is steady and keeps what was planned: within its interval, time within a twentieth."""

    def inside(name: str, near: float) -> bool:
        _, low, high = found[name]
        return low * (1 - near) <= planned[name] <= high * (1 + near)

    return bool(
        found["status"] == "steady"
        and inside("quality", 0.0)
        and inside("stops_at_first", 0.0)
        and inside("request_s", NEAR)
    )


# ---------------------------------------------------------------- the study


def analyse(quick: bool) -> dict[str, Any]:
    """Return the result of the study."""
    requests = 6_000 if quick else REQUESTS
    of = fleet(requests)
    lambdas, rates = (LAMBDAS[SHOWN : SHOWN + 1], RATES[1::3]) if quick else (LAMBDAS, RATES)
    rows = [row(of, rate, lam) for lam in lambdas for rate in rates]
    runs = [simulated(of, rate, requests) for rate in (SIMULATED[:1] if quick else SIMULATED)]
    return {"verdicts": verdicts(rows, runs, lambdas), "rows": rows, "simulated": runs}


def verdicts(rows: list[dict[str, Any]], runs: list[dict[str, Any]], lambdas: tuple[float, ...]) -> dict[str, bool]:
    """Return what the rows say."""
    series = [[r for r in rows if r["lambda"] == lam] for lam in lambdas]
    stops = [np.array([r["stops"][0] for r in s]) for s in series]
    quality = [np.array([r["quality"] for r in s]) for s in series]
    others = [
        agrees(run, other["planned"] | {"quality": run["quality"][0], "stops_at_first": run["stops_at_first"][0]})
        for run in runs
        for other in runs
        if other is not run
    ]
    return {
        "every plan has its certificate: gap below 1e-6 of lambda": all(
            r["converged"] and r["gap_of_lambda"] < 1e-6 for r in rows
        ),
        "without load no request stops at 13B at any lambda": all(s[0] < 1e-6 for s in stops),
        "the share that stops at 13B never falls as load rises": all(np.diff(s).min() > -1e-3 for s in stops),
        "quality never rises by more than 0.01 as load rises": all(np.diff(q).max() < 0.01 for q in quality),
        "the undamped loop policy -> loads -> prices settles at no load from 4 requests/s": not any(
            r["undamped_settles"] for r in rows if r["rate"] >= 4
        ),
        "60 to 80 % of stops at 13B are the optimum at no load and lambda tried": not any(
            EARLY[0] <= x <= EARLY[1] for s in stops for x in s
        ),
        "simulated shares, quality and time agree with the plan": all(agrees(r, r["planned"]) for r in runs),
        "simulated time tells the loads apart: it refutes the plan of another load": not any(others),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw stops, quality, time and prices against load."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names, styles = ("13B", "34B", "70B"), ("-", "--", ":")
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex=True)
    shown = [r for r in result["rows"] if r["lambda"] == LAMBDAS[SHOWN]]
    rate = [r["rate"] for r in shown]
    axes[0, 0].stackplot(
        rate, np.array([r["stops"] for r in shown]).T, labels=[f"stop at {n}" for n in names], alpha=0.75
    )
    for run in result["simulated"]:
        middle, low, high = run["stops_at_first"]
        axes[0, 0].errorbar(run["rate"], middle, [[middle - low], [high - middle]], fmt="ko", capsize=3)
    axes[0, 0].set(ylabel="requests [-]", ylim=(0, 1), title=f"lambda = {LAMBDAS[SHOWN]} USD (dots: simulated, 13B)")
    axes[0, 0].legend(loc="upper right", fontsize=8)
    axes[0, 1].axhspan(*EARLY, color="0.9", label="recommended: 60 to 80 %")
    for lam, style in zip(LAMBDAS, styles, strict=True):
        own = [r for r in result["rows"] if r["lambda"] == lam]
        at = [r["rate"] for r in own]
        axes[0, 1].plot(at, [r["stops"][0] for r in own], style, color="C0", label=f"stop at 13B, lambda {lam}")
        axes[0, 1].plot(at, [r["quality"] for r in own], style, color="C3", label=f"quality, lambda {lam}")
    axes[0, 1].set(title="lambda in USD per correct answer", ylim=(0, 1.4))
    axes[0, 1].legend(fontsize=7, loc="upper center", ncols=2)
    axes[1, 0].plot(rate, [r["request_s"] for r in shown], "C0", label="plan")
    for run in result["simulated"]:
        middle, low, high = run["request_s"]
        axes[1, 0].errorbar(run["rate"], middle, [[middle - low], [high - middle]], fmt="ko", capsize=3)
    axes[1, 0].set(xlabel="requests/s", ylabel="mean time of a request [s]", ylim=(0, None), title="dots: simulated")
    for i, name in enumerate(names):
        axes[1, 1].plot(rate, [r["price_usd_per_1000_visits"][i] for r in shown], f"C{i}", label=f"{name}: price")
        axes[1, 1].plot(rate, [r["of_which_others_time"][i] for r in shown], f"C{i}:", label="  the others' time")
    axes[1, 1].set(xlabel="requests/s", ylabel="USD per 1000 visits", ylim=(0, None), title="price of a visit")
    axes[1, 1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def readme(result: dict[str, Any]) -> str:
    """Return README.md with the numbers of the result."""
    rows = []
    for r in result["rows"]:
        if r["lambda"] == LAMBDAS[SHOWN] and r["rate"] >= 0.5:
            stops = " / ".join(f"{x:.0%}" for x in r["stops"])
            price = " / ".join(f"{x:.1f}" for x in r["price_usd_per_1000_visits"])
            cells = (f"{r['rate']:g}", stops, f"{r['quality']:.4f}", f"{r['request_s']:.2f}")
            money = (f"{r['usd_per_1000_gpus']:.2f}", price, r["policies"])
            settles_ = "yes" if r["undamped_settles"] else "no"
            rows.append("| " + " | ".join(map(str, (*cells, *money, settles_))) + " |")
    runs = []
    for r in result["simulated"]:
        cells_ = [f"{r['rate']:g}"]
        for name, digits in (("stops_at_first", 3), ("quality", 4), ("request_s", 3)):
            m, low, high = r[name]
            cells_.append(f"{r['planned'][name]:.{digits}f} / {m:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        runs.append("| " + " | ".join(cells_) + " |")
    verdict = "\n".join(f"- {name}: **{'yes' if v else 'no'}**" for name, v in result["verdicts"].items())
    most = {lam: max(r["stops"][0] for r in result["rows"] if r["lambda"] == lam) for lam in LAMBDAS}
    said = ", ".join(f"{x:.0%} at lambda {lam}" for lam, x in most.items())
    return README.format(verdicts=verdict, rows="\n".join(rows), runs="\n".join(runs), most=said, last=RATES[-1])


README = """# The best stop rule moves with the load

**Claim.** On a fleet that is paid for whether busy or not, the best rule at a fixed lambda changes from the 70B for
everything (no load: its time is all it costs) to one that stops more and more requests at the 13B.

{verdicts}

Written by `python studies/load_moves_the_policy/run.py`, which fails when a verdict changes.

![the policy against load](load.png)

## What is computed

13B on 2 GPUs, 34B on 2, 70B on 4 (H100), drafts as the scenario has them; GSM8K outcomes with confidences of AUROC
.81 / .84 / .86; a second of a request is worth 10 USD/h (assumed). At each load the mixture of stop rules that is worth
most when each visit pays for its own time, for the time it costs the others (r dW/dr) and for capacity. The optimum is
that of a concave programme, found with a certificate (`theory/load_prices.py`): no other mixture is worth 1e-6 lambda
more. lambda = 0.05 USD per correct answer:

USD per 1000: of the GPUs per request; price of a visit at 13B / 34B / 70B.

| requests/s | stop at 13B / 34B / 70B | quality | time [s] | GPUs | price of a visit | rules mixed | undamped settles |
|---|---|---|---|---|---|---|---|
{rows}

Undamped: the best rule at the prices of the loads of the last rule, and so on. It jumps between rules for ever, because
the optimum is a mixture of several: requests are spread over the tiers by chance where nothing else tells them apart.

## In the simulator

Planned / simulated with 95 % interval, lambda = 0.05:

| requests/s | stops at 13B | quality | time of a request [s] |
|---|---|---|---|
{runs}

Time may lie 5 % outside the interval (the queueing approximation's own error).

## The recommendation of 60 to 80 % early stops

Up to {last} requests/s the largest share that stops at the 13B is
{most}.
It rises with load and falls with lambda: on this fleet and these outcomes 60 to 80 % are the optimum nowhere in this
range. Data where it is: `studies/early_stops`.

## What it does not say

- The fleet is fixed and split by hand; how many GPUs each tier should get is the planner's question (`tierwise plan`).
- Time is paid by its mean; a tail objective would tax two visits more than one long one.
- Confidences are independent between tiers given who is right (assumed): escalations gain less in truth.
- The social optimum, not what users who choose for themselves would do; that one sends more to the slow tiers.
- What would refute it: a mixture that is worth more at one of these loads, or a simulated time off by more than 5 %.
"""


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    rate = max(r["rate"] for r in result["rows"])
    first = max(r["stops"][0] for r in result["rows"] if r["rate"] == rate)
    return f"none stop at 13B without load, up to {first:.0%} at {rate:g} requests/s"


def validations(result: dict[str, Any]) -> list[Validation]:
    """Return planned against simulated time to the final answer."""
    return [
        Validation.errors(
            [r["planned"]["request_s"] / r["request_s"][0] - 1 for r in result["simulated"]],
            "queueing against simulation",
            "mean time to the final answer of a cascade on eight GPUs",
            "simulated",
            "nothing",
        )
    ]


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.quick),
    readme,
    headline,
    draw=lambda given, result: plot(result, given.folder / "load.png"),
    expected=EXPECTED,
    n=lambda result: len(result["rows"]),
    validations=validations,
    quick="one lambda, few loads",
    recheck=True,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

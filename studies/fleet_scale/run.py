"""Claim: a day of traffic on 10,000 GPUs is planned in under a minute, and a simulated sample of it agrees.

Planning time against GPUs and hours; the cost of 1000 requests against the size of the fleet, beside what whole
replicas can lose at most; a replica in a fleet of m under three rules of routing, beside the theory of Poisson
arrivals; the day of the shipped scenario `fleet-day`, predicted and simulated; what happens when replicas come up late.

    python studies/fleet_scale/run.py [--quick] [--output DIR]

Times are CPU seconds of one process. Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from planner.build import resolve
from planner.day import Day, _at, periods, plan_day
from planner.figures import times_of
from planner.scenario import load_scenario
from planner.search import Search, best_of
from planner.service import Service
from planner.simulate import run_at
from planner.space import Space, enumerate_space, occupancy
from simulator.cluster import TierSetup, simulate_tier
from simulator.engine import ROUTINGS
from simulator.metrics import mean_interval
from simulator.workload import PiecewiseRates, Workload, at_rate, piecewise, poisson
from studies.study import Study
from theory.queueing import ttft_quantile

MINUTE = 60.0  # stated bar of planning a day at 10,000 GPUs, CPU time, simulation left aside [s]
FLEETS = (8, 100, 1000, 10_000)  # [GPUs]
HOURS = (6, 24, 96)
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10_000)  # [GPUs]
MEMBERS = (1, 2, 4, 8, 16, 32)  # replicas of a fleet
REQUESTS = 5000  # of each replica in a run of the routing comparison [-]
SHARE = 0.85  # load of those replicas over the most they bear, analytic [-]
AGREES = 0.06  # spread that the planner allows the queueing theory in mean TPOT [-]
LIMIT_RATE = 1e7  # at which whole replicas lose nothing [requests/s]
WINDOW = 600.0  # before and after a step of the load [s]


def cpu(work: Any) -> tuple[float, Any]:
    """Return the CPU seconds of a piece of work and what it gave."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def scaled_day(gpus: int, hours: int) -> tuple[Any, Path]:
    """Return the shipped day with rates for so many GPUs, its hours over and over, on a fleet of twice as many."""
    scenario, _ = load_scenario("fleet-day")
    assert scenario.traffic.arrivals is not None
    assert scenario.traffic.arrivals.rates is not None
    rates = [r * gpus / 10_000 for r in scenario.traffic.arrivals.rates]
    long = [rates[i % len(rates)] * (1 + 0.01 * (i // len(rates))) for i in range(hours)]
    top = max(long) / max(rates)
    arrivals = {"kind": "piecewise", "rates": [r / top for r in long], "durations_s": [3600]}
    return load_scenario("fleet-day", [f"fleet.gpus={2 * gpus}", f"traffic.arrivals={json.dumps(arrivals)}"])


def planning_time(gpus: int, hours: int) -> dict[str, Any]:
    """Return the CPU seconds of the space and of one plan of all hours."""
    scenario, folder = scaled_day(gpus, hours)
    problem = resolve(scenario, folder, None, 0)
    enumerating, space = cpu(lambda: enumerate_space(problem))
    planning, day = cpu(lambda: Day(problem, space, periods(scenario.traffic.arrivals, None), 0))
    peak = max(c.gpus for c in day.plans if c is not None)
    return {"gpus": gpus, "hours": hours, "space_s": enumerating, "plan_s": planning, "peak_gpus": peak}


def cost_by_size(day: Day, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return the cheapest plan at the load that a large fleet of each size carries, and what rounding may cost.

    A tier of a fixed plan needs x replicas and gets at most x + 1, so 1000 requests cost at most
    1000 sum_k g_k p / r more than without rounding; a better plan costs no more than that one.
    """
    problem = day.problems[0]
    assert problem is not None
    limit = _cheapest(day, LIMIT_RATE)
    per_gpu = LIMIT_RATE / limit.gpus
    price = problem.pools[0].price
    rows = []
    for gpus in sizes:
        rate = per_gpu * gpus
        plan = _cheapest(day, rate)
        bound = sum(g.service.gpus for g in limit.groups) * price / rate
        rows.append(
            {
                "gpus": gpus,
                "requests_per_s": rate,
                "used_gpus": plan.gpus,
                "usd_per_1000": 1000 * plan.cost,
                "loss": plan.cost / limit.cost - 1,
                "loss_at_most": bound / limit.cost,
                "plan": " + ".join(f"{g.replicas} x {g.service.name}" for g in plan.groups),
            }
        )
    return rows


def _cheapest(day: Day, rate: float) -> Any:
    problem = day.problems[0]
    assert problem is not None
    pools = tuple(replace(p, gpus=10**9) for p in problem.pools)
    search = Search(replace(_at(problem, problem.workload, rate), pools=pools), day.space, day.floor)
    return best_of(search, [c for front in day.fronts for c in search.carried(front)])[0]


def routing(day: Day, members: tuple[int, ...], seeds: int) -> dict[str, Any]:
    """Return mean TPOT and p99 TTFT of a replica at one load in fleets of m under each routing, and by theory."""
    plan = day.plans[day.peak]
    assert plan is not None
    service = plan.groups[0].service
    rate = SHARE * day.search.capacity(plan.groups[0])
    theory = _theory(service, rate, day.space)
    rows = []
    for m in members:
        for rule in ROUTINGS:
            seen = [_fleet(day, service, rate, m, rule, seed) for seed in range(seeds)]
            tpot, ttft = (np.array(x) for x in zip(*seen, strict=True))
            rows.append({"replicas": m, "routing": rule, "tpot_s": tpot.mean(), "ttft_p99_s": ttft.mean()})
            rows[-1] |= {"tpot_spread_s": [tpot.min(), tpot.max()], "ttft_spread_s": [ttft.min(), ttft.max()]}
    return {
        "service": service.name,
        "requests_per_s": rate,
        "theory": theory,
        "theory_at_a_fifth_more": _theory(service, 1.2 * rate, day.space),
        "rows": rows,
    }


def _theory(service: Service, rate: float, space: Space) -> dict[str, float]:
    state = occupancy([service], np.array([rate]), space.load)
    return {"tpot_s": float(state.tpot_s[0]), "ttft_p99_s": float(ttft_quantile(state, 0.99)[0])}


def _setup(service: Service, m: int, rule: str, ready: Any = 0.0) -> TierSetup:
    d = service.deployment
    return TierSetup(
        service.name,
        service.table,
        d.limits,
        service.kv_tokens,
        service.schedule,
        service.acceptance,
        m,
        d.tp,
        rule,
        ready,
    )


def _requests(day: Day, arrival: Any, rng: np.random.Generator) -> Workload:
    """Return requests at these times whose lengths are those of the scenario, each as often: the load has no chance."""
    w = day.problem.workload
    times = -(-len(arrival) // w.requests)
    who = np.concatenate([rng.permutation(w.requests) for _ in range(times)])[: len(arrival)]
    return Workload(arrival, w.prompt[who], w.output[who])


def _fleet(day: Day, service: Service, rate: float, m: int, rule: str, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng([seed, m])
    workload = at_rate(_requests(day, poisson(rate * m, REQUESTS * m, rng), rng), rate * m)
    records = simulate_tier(workload, _setup(service, m, rule), seed)
    ttft, tpot = (x[REQUESTS * m // 10 :] for x in times_of(records))
    return float(tpot.mean()), float(np.quantile(ttft, 0.99))


def late(day: Day, seed: int) -> dict[str, Any]:
    """Return p99 TTFT after a step of the load with the added replicas up in time, and up a lead too late."""
    plan = day.plans[day.peak]
    assert plan is not None
    group = plan.groups[0]
    before, after = 10, 14
    lead = day.lead_s(group.service)
    rng = np.random.default_rng(seed)
    rates = PiecewiseRates((before * group.rate, after * group.rate), (WINDOW, WINDOW), repeat=False)
    workload = _requests(day, piecewise(rates, 10**6, rng), rng)
    found: dict[str, Any] = {"service": group.service.name, "lead_s": lead, "from": before, "to": after}
    at = (workload.arrival >= WINDOW) & (workload.arrival < WINDOW + lead)
    for name, ready in (("in_time", WINDOW), ("late", WINDOW + lead)):
        times = np.concatenate([np.zeros(before), np.full(after - before, ready)])
        records = simulate_tier(workload, _setup(group.service, after, "round-robin", times), seed)
        ttft, tpot = times_of(records)
        found[f"{name}_ttft_p99_s"] = float(np.quantile(ttft[at], 0.99))
        found[f"{name}_tpot_s"] = float(tpot[at].mean())
    return found


def analyse(quick: bool) -> dict[str, Any]:
    """Return the result of the study."""
    scenario, folder = load_scenario("fleet-day")
    run_at_once()
    by_gpus = [planning_time(g, 24) for g in (FLEETS[::3] if quick else FLEETS)]
    by_hours = [planning_time(10_000, h) for h in (HOURS[:2] if quick else HOURS)]
    spent, whole = cpu(lambda: plan_day(scenario, folder))
    problem = resolve(scenario, folder, None, 0)
    day = Day(problem, enumerate_space(problem), periods(scenario.traffic.arrivals, None), 0)
    sizes = cost_by_size(day, SIZES)
    routed = routing(day, MEMBERS[:3] if quick else MEMBERS, 1 if quick else 3)
    step = late(day, 0)
    slo = scenario.slo
    random = [r for r in routed["rows"] if r["routing"] == "random"]
    turn, least = ([r for r in routed["rows"] if r["routing"] == k] for k in ("round-robin", "least-outstanding"))
    one = by_hours[-1] if quick else by_hours[1]
    verdicts = {
        "a day of 24 hours at 10,000 GPUs is planned in under a minute of one core": one["space_s"] + one["plan_s"]
        < MINUTE,
        "planning takes no longer on 10,000 GPUs than twice the time on 8": by_gpus[-1]["plan_s"]
        < 2 * by_gpus[0]["plan_s"],
        "whole replicas lose no more than one replica of each tier": all(
            r["loss"] <= r["loss_at_most"] + 1e-9 for r in sizes
        ),
        "under a tenth of a percent is lost at 10,000 GPUs": sizes[-1]["loss"] < 1e-3,
        "every simulated hour keeps the SLOs, its mean TPOT inside the predicted 90 % interval": all(
            c["tpot_mean_s"]["inside"] and c["status"] == "steady" for c in whole["checked"]
        ),
        "with random routing a replica is as the theory says, at any size of the fleet": all(
            abs(r["tpot_s"] / routed["theory"]["tpot_s"] - 1) < AGREES for r in random
        ),
        "the theory at a fifth more load is refused (negative control)": not any(
            abs(r["tpot_s"] / routed["theory_at_a_fifth_more"]["tpot_s"] - 1) < AGREES for r in random
        ),
        "in turn and by the fewest outstanding first tokens come no later than at random": all(
            r["ttft_p99_s"] <= x["ttft_p99_s"] * 1.02 for of in (turn, least) for r, x in zip(of, random, strict=True)
        ),
        "replicas up in time keep the TTFT objective over a step of the load, late ones miss it": step[
            "in_time_ttft_p99_s"
        ]
        <= slo.ttft_p99_s
        < step["late_ttft_p99_s"],
    }
    return {
        "verdicts": verdicts,
        "by_gpus": by_gpus,
        "by_hours": by_hours,
        "day": {
            "cpu_s": spent,
            **{k: whole[k] for k in ("day", "static", "saved", "checked", "evaluated")},
            "started": [r["started_gpus"] for r in whole["periods"]],
        },
        "sizes": sizes,
        "routing": routed,
        "late": step,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }


def run_at_once() -> None:
    """Compile the engine, so that no time has that in it."""
    scenario, folder = load_scenario("fleet-day", ["traffic.requests=200"])
    problem = resolve(scenario, folder, None, 0)
    service = enumerate_space(problem).services[0][0]
    run_at(service, problem.workload, 1.0, 0)
    mean_interval(np.arange(100.0))


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw planning time, quantisation loss, and the fleet of m replicas."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    blue, orange, green, grey = "#0072B2", "#D55E00", "#009E73", "#555555"
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    spent, lost, tpot, ttft = axes.ravel()
    for key, name, colour, mark in (
        ("gpus", "GPUs, 24 hours", blue, "o"),
        ("hours", "hours, 10,000 GPUs", orange, "s"),
    ):
        rows = result[f"by_{key}"]
        spent.plot(
            [r[key] for r in rows], [r["space_s"] + r["plan_s"] for r in rows], marker=mark, color=colour, label=name
        )
    spent.axhline(MINUTE, color=grey, ls="--", lw=1, label="a minute")
    spent.set(xscale="log", yscale="log", title="planning a day [CPU s]", xlabel="GPUs, or hours")
    rows = result["sizes"]
    lost.plot(
        [r["gpus"] for r in rows], [100 * max(r["loss"], 1e-5) for r in rows], "o-", color=blue, label="best plan"
    )
    most = [100 * r["loss_at_most"] for r in rows]
    lost.plot([r["gpus"] for r in rows], most, "--", color=grey, label="a replica of each tier")
    lost.set(xscale="log", yscale="log", title="cost lost to whole replicas [%]", xlabel="GPUs")
    routed = result["routing"]
    for rule, colour, mark in zip(ROUTINGS, (blue, orange, green), "os^", strict=True):
        rows = [r for r in routed["rows"] if r["routing"] == rule]
        for axis, key in ((tpot, "tpot"), (ttft, "ttft")):
            value = "tpot_s" if key == "tpot" else "ttft_p99_s"
            middle = 1000 * np.array([r[value] for r in rows])
            ends = 1000 * np.array([r[f"{key}_spread_s"] for r in rows]).T
            bars = [middle - ends[0], ends[1] - middle]
            axis.errorbar([r["replicas"] for r in rows], middle, bars, marker=mark, color=colour, capsize=3, label=rule)
    for axis, value, name in ((tpot, "tpot_s", "mean TPOT [ms]"), (ttft, "ttft_p99_s", "p99 TTFT [ms]")):
        axis.axhline(1000 * routed["theory"][value], color=grey, ls="--", lw=1, label="theory, Poisson")
        axis.set(xscale="log", title=f"{name} at one load of a replica", xlabel="replicas in the fleet", ylim=(0, None))
        axis.set_xticks([r["replicas"] for r in rows], [str(r["replicas"]) for r in rows])
        axis.set_xticks([], minor=True)
    for axis in axes.ravel():
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": "tierwise"})
    plt.close(figure)


def readme(r: dict[str, Any]) -> str:
    """Return the README of the study."""
    day, static, step, routed = r["day"]["day"], r["day"]["static"], r["late"], r["routing"]
    verdicts = "\n".join(f"| {name} | {'holds' if ok else 'does not hold'} |" for name, ok in r["verdicts"].items())
    spent = "\n".join(
        f"| {x['gpus']:,} | {x['hours']} | {x['space_s']:.1f} | {x['plan_s']:.1f} |"
        for x in r["by_gpus"] + r["by_hours"]
    )
    sizes = "\n".join(
        f"| {x['gpus']:,} | {x['requests_per_s']:,.0f} | {x['used_gpus']:,} | {x['usd_per_1000']:.4f} "
        f"| {x['loss']:.2%} | {x['loss_at_most']:.2%} | {x['plan']} |"
        for x in r["sizes"]
    )

    def ms(x: float | None) -> str:
        return "-" if x is None else f"{1000 * x:.3g}"

    checked = "\n".join(
        f"| {int(c['start_s'] // 3600):02d}:00 | {c['requests_per_s']:,.0f} | {c['fleet_share']:.2g} | "
        f"{ms(c['tpot_mean_s']['predicted'])} ({' to '.join(map(ms, c['tpot_mean_s']['predicted_interval']))}) | "
        f"{ms(c['tpot_mean_s']['simulated'])} ({' to '.join(map(ms, c['tpot_mean_s']['simulated_interval']))}) | "
        f"{ms(c['ttft_p99_s']['predicted'])} / {ms(c['ttft_p99_s']['simulated'])} | "
        f"{c['quality']['predicted']:.4f} / {c['quality']['simulated']:.4f} |"
        for c in r["day"]["checked"]
    )

    def gain(key: str) -> str:
        best = next(x for x in reversed(routed["rows"]) if x["routing"] == "least-outstanding")
        return f"{1 - best[key] / routed['theory'][key]:.0%}"

    last = {x["routing"]: x for x in routed["rows"][-3:]}

    def above(key: str) -> str:
        off = [x[key] / routed["theory"][key] - 1 for x in routed["rows"] if x["routing"] == "random"]
        return f"{min(off):.0%} to {max(off):.0%}"

    fleets = ", ".join(f"{k}: TPOT {ms(x['tpot_s'])} ms, p99 TTFT {ms(x['ttft_p99_s'])} ms" for k, x in last.items())
    return f"""# A day on 10,000 GPUs

**Claim.** A day of traffic on 10,000 GPUs, replicas and stop rules by the hour, is planned by the analytic model in
under a minute, whatever the number of GPUs, and a simulated sample of its hours agrees.

| verdict | |
|---|---|
{verdicts}

Written by `python studies/fleet_scale/run.py`, which exits with 1 when a bar is missed. Times are CPU seconds of one
process ({r["machine"]}); the scenario is the shipped `fleet-day`.

![planning time, loss, routing](fleet.png)

## How planning time grows

| GPUs | hours | services and what they bear [s] | one plan of all hours [s] |
|---|---|---|---|
{spent}

What a replica bears and the frontiers of stop rules do not depend on the load: they are found once. An hour then costs
the counting of replicas, which does not depend on how many there are; a small fleet has fewer plans that fit, and is
planned faster for that alone. The chain through the day compares the leading
plans of neighbouring hours only, so it grows with the hours, not with their square.

The whole command, with {r["day"]["evaluated"]["simulated"]} simulations of replicas and hours, took
{r["day"]["cpu_s"]:.0f} CPU seconds. The day goes from {day["least_gpus"]:,} to {day["peak_gpus"]:,} GPUs and costs
{day["usd"]:,.0f} USD ({day["usd_per_1000_requests"]:.3f} per 1000 requests), {r["day"]["saved"]:.0%} less than
{static["gpus"]:,} GPUs kept up for the peak; starting {day["started_gpus"]:,} GPUs ahead of their hour is
{day["switching_usd"]:,.0f} USD of it.

## What whole replicas lose

The cheapest plan at the load that a fleet of each size would carry if replicas came in any fraction. A tier gets at
most one replica more than it needs, so the loss is at most the GPUs of one replica of each tier over those of the
fleet: it falls with the size.

| GPUs | requests/s | used | USD per 1000 | lost | at most | plan |
|---|---|---|---|---|---|---|
{sizes}

## Hours predicted and simulated

Simulated is a slice of the fleet whose replicas have the loads of all (`planner.slices`): 20,000 requests would last
half a second on the whole of it, and show batches that never grew. Times in ms.

| from | requests/s | slice | TPOT predicted (90 %) | TPOT simulated (95 %) | p99 TTFT | quality |
|---|---|---|---|---|---|---|
{checked}

## A replica in a fleet of m

{routed["service"]} at {routed["requests_per_s"]:.3g} requests/s, {SHARE:.0%} of what it bears. Split at random,
Poisson requests are Poisson at every replica, so nothing changes with m: theory has TPOT
{ms(routed["theory"]["tpot_s"])} ms and p99 TTFT {ms(routed["theory"]["ttft_p99_s"])} ms. Simulated, mean TPOT is
{above("tpot_s")} higher and p99 TTFT {above("ttft_p99_s")}, whatever the number of
replicas: errors of the theory of one replica, not of the size of the fleet. In turn, gaps at a replica
become even; sent to whoever has least to do, requests see the mean of the fleet.
In a fleet of {routed["rows"][-1]["replicas"]}: {fleets}.

So a large fleet gains, beyond whole replicas, {gain("tpot_s")} of mean TPOT and {gain("ttft_p99_s")} of p99 TTFT by
sending each request to whoever has least to do, against the Poisson figures that the plan takes at every size.

## Replicas that come late

The load of {step["from"]} replicas rises to that of {step["to"]}. With the {step["to"] - step["from"]} added ones up
when it rises, p99 TTFT over the next {step["lead_s"]:.0f} s is {ms(step["in_time_ttft_p99_s"])} ms; asked for only
then, and up after provisioning and loading, it is {ms(step["late_ttft_p99_s"])} ms. That lead is what the plan pays
for.

## What this does not say

The shape of the day, its prices and the time to bring up a node are assumed. Hours are taken in their own steady state;
bursts within one are Poisson. Nodes do not fail. GPUs are taken as one pool that any replica fits: how TP groups pack
onto nodes of eight is not modelled (2, 4 and 8 do).
"""


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    last = result["by_gpus"][-1]
    return (
        f"{last['hours']} hours on {last['gpus']:,} GPUs in {last['space_s'] + last['plan_s']:.1f} s of one core, "
        f"{result['sizes'][-1]['loss']:.2%} lost to whole replicas"
    )


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.quick),
    readme,
    headline,
    draw=lambda given, result: draw(result, given.folder / "fleet.png"),
    n=lambda result: len(result["by_gpus"]) + len(result["by_hours"]),
    quick="fewer points",
    times=("space_s", "plan_s", "cpu_s"),
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

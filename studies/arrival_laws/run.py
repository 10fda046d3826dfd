"""Claim: at equal mean rate, Poisson, gamma or Weibull arrivals predict the trace's p99 TTFT within 25 %.

    python studies/arrival_laws/run.py --trace FILE [--quick] [--output DIR]

Replicas of the shipped scenario serve the requests of a trace at the times of the trace, and the same requests,
shuffled, at times drawn from each law with the trace's rate and variation of the gaps. Piecewise rates by five minutes
are a further law; two controls tell what the order of the lengths does. FILE is the Azure LLM inference trace 2023
(conversation), in a format of ``simulator.traces``. Exits with 1 when a verdict differs from the one in EXPECTED.
--quick draws each law twice and writes nothing unless --output is given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from planner.build import Problem, resolve
from planner.scenario import load_scenario
from planner.service import Load, Service, build_service
from planner.simulate import measured_capacity, run_at
from planner.space import capacities
from simulator.traces import read_trace
from simulator.workload import PiecewiseRates, Workload, gamma, piecewise, poisson, weibull, weibull_shape
from studies.study import Bar, Data, Study, Validation

HERE = Path(__file__).parent
REPLICAS = {"roomy": (2, 4), "tight": (0, 1)}  # tier of the shipped scenario and TP: 256 slots, and 46 [-, GPUs]
CONTEXT = 4096  # longest request of the trace that is kept: the context of the models [tokens]
WINDOWS = (1, 2, 5, 10, 20, 30, 60, 120, 300)  # in which arrivals are counted [s]
MINUTE = 60  # the window of the claim on counts [s]
PIECE = 300.0  # of piecewise rates [s]
LOADS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # mean rate over the analytic capacity [-]
AT = 0.8  # load of the claim on latency [-]
DRAWS = 10  # of each law; 2 with --quick
SEED = 20231116  # the day of the trace
KS_99 = 1.628  # 1 % critical value of sqrt(n) D (Smirnov 1948); rate and variation were fitted, so this is lenient
FACTOR = 2.0  # a law explains the counts of a minute when its dispersion is within this factor [-]
TOLERANCE = 0.25  # a law predicts p99 TTFT when its relative error is at most this [-]
BEARS = 0.10  # a law predicts capacity when its relative error is at most this; set after seeing the numbers [-]
LAWS = ("poisson", "gamma", "weibull", "piecewise")  # with lengths shuffled: independent of the time of day
CONTROLS = {"ordered": "piecewise, lengths in order", "shuffled": "times of the trace, lengths shuffled"}
MODELS = (*LAWS, *CONTROLS)
NO = dict.fromkeys(("poisson", "gamma", "weibull"), False)
YES = dict.fromkeys(("poisson", "gamma", "weibull"), True)
EXPECTED = {
    "gaps": NO,
    "counts": NO | {"piecewise": True},
    "p99 TTFT, roomy": YES | {"piecewise": True},
    "capacity, roomy": YES | {"piecewise": True},
    "p99 TTFT, tight": NO | {"piecewise": False},
    "capacity, tight": NO | {"piecewise": True},
}

Floats = NDArray[np.float64]
Times = Callable[[np.random.Generator], Floats]


def laws(trace: Workload) -> dict[str, Times]:
    """Return each law as what draws arrival times from it, at the rate of the trace."""
    n, rate, cv = trace.requests, trace.rate, variation(trace)
    day = rates_by_piece(trace)
    return {
        "poisson": lambda rng: poisson(rate, n, rng),
        "gamma": lambda rng: gamma(rate, cv, n, rng),
        "weibull": lambda rng: weibull(rate, cv, n, rng),
        "piecewise": lambda rng: piecewise(day, n, rng),
    }


def variation(trace: Workload) -> float:
    """Return the coefficient of variation of the gaps [-]."""
    gaps = np.diff(trace.arrival)
    return float(gaps.std() / gaps.mean())


def rates_by_piece(trace: Workload) -> PiecewiseRates:
    """Return the requests of each five minutes over their duration; the last piece ends with the trace."""
    end = float(trace.arrival[-1])
    edges = np.append(np.arange(0.0, end, PIECE), end)
    counts = np.histogram(trace.arrival, edges)[0]
    return PiecewiseRates(tuple(counts / np.diff(edges)), tuple(np.diff(edges)))


def dispersion(arrival: Floats, window: float) -> float:
    """Return the variance over the mean of the arrivals in whole windows [-]; 1 for a Poisson process."""
    counts = np.bincount((arrival // window).astype(int))[:-1]
    return float(counts.var(ddof=1) / counts.mean())


def gap_laws(trace: Workload) -> dict[str, Any]:
    """Return the distribution of gaps by each renewal law with the rate and variation of the trace."""
    mean, cv = 1 / trace.rate, variation(trace)
    shape = weibull_shape(cv)
    return {
        "poisson": stats.expon(scale=mean),
        "gamma": stats.gamma(1 / cv**2, scale=cv**2 * mean),
        "weibull": stats.weibull_min(shape, scale=mean / stats.weibull_min(shape).mean()),
    }


def replica(problem: Problem, name: str) -> Service:
    """Return a replica of the shipped scenario, decoding plainly."""
    tier, tp = REPLICAS[name]
    service = build_service(tier, problem.deployment(tier, tp), problem.profile, None, Load.of(problem.workload))
    if not isinstance(service, Service):
        raise SystemExit(f"the replica does not fit: {service}")
    return service


def drawn(trace: Workload, draws: int) -> dict[str, list[Workload]]:
    """Return what each model makes of the requests: other times, lengths shuffled or not, ``draws`` times."""
    of, result = laws(trace), {name: [] for name in MODELS}
    for k in range(draws):
        order = np.random.default_rng([SEED, k, 1]).permutation(trace.requests)
        prompt, output = trace.prompt[order], trace.output[order]
        for name in LAWS:
            times = of[name](np.random.default_rng([SEED, k]))
            result[name].append(Workload(times, prompt, output))
            if name == "piecewise":
                result["ordered"].append(Workload(times, trace.prompt, trace.output))
        result["shuffled"].append(Workload(trace.arrival, prompt, output))
    return result


def p99_ttft(service: Service, work: Workload, rate: float) -> float:
    """Return the 99th percentile of the time to first token over all requests [s]."""
    run = run_at(service, work, rate, SEED)
    return float(np.quantile(run.first_token - run.arrival, 0.99))


def served(trace: Workload, of: dict[str, list[Workload]], problem: Problem, name: str) -> dict[str, Any]:
    """Return p99 TTFT by load and capacity on one replica, for the trace and by each model."""
    service, slo = replica(problem, name), problem.scenario.slo
    analytic = float(capacities([service], Load.of(trace), slo)[0])
    tails: dict[str, Any] = {"trace": [p99_ttft(service, trace, x * analytic) for x in LOADS]}
    tails |= {m: [interval([p99_ttft(service, d, x * analytic) for d in of[m]]) for x in LOADS] for m in MODELS}
    bears = {"trace": measured_capacity(service, trace, slo, analytic, SEED)}
    for m in MODELS:
        some = of[m][: max(1, len(of[m]) // 3)]
        bears[m] = float(np.mean([measured_capacity(service, d, slo, analytic, SEED) for d in some]))
    return {
        "service": service.name,
        "slots": service.batch_cap,
        "analytic_capacity_per_s": analytic,
        "p99_ttft_s": tails,
        "capacity_per_s": bears,
    }


def drift(trace: Workload) -> dict[str, float]:
    """Return how rate and answers go together over pieces of the trace (the last one is not whole)."""
    piece = (trace.arrival // PIECE).astype(int)
    whole = range(int(piece[-1]))
    rates = np.array([np.count_nonzero(piece == k) for k in whole]) / PIECE
    outputs = np.array([trace.output[piece == k].mean() for k in whole])
    slow, fast = int(rates.argmin()), int(rates.argmax())
    return {
        "least_rate_per_s": float(rates[slow]),
        "output_at_least_rate": float(outputs[slow]),
        "greatest_rate_per_s": float(rates[fast]),
        "output_at_greatest_rate": float(outputs[fast]),
        "correlation": float(np.corrcoef(rates, outputs)[0, 1]),
    }


def interval(values: list[float]) -> dict[str, float]:
    """Return the mean over draws and its 95 % interval (Student)."""
    array = np.array(values)
    half = stats.t.ppf(0.975, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size) if array.size > 1 else 0.0
    return {"mean": float(array.mean()), "low": float(array.mean() - half), "high": float(array.mean() + half)}


def analyse(whole: Workload, draws: int) -> dict[str, Any]:
    """Return everything the study says."""
    kept = whole.prompt + whole.output <= CONTEXT
    trace = Workload(whole.arrival[kept] - whole.arrival[kept][0], whole.prompt[kept], whole.output[kept], whole.source)
    problem, of = resolve(*load_scenario()), drawn(trace, draws)
    gaps = np.diff(trace.arrival)
    counts = {"trace": [dispersion(trace.arrival, w) for w in WINDOWS]}
    counts |= {n: [float(np.mean([dispersion(d.arrival, w) for d in of[n]])) for w in WINDOWS] for n in LAWS}
    result = {
        "source": whole.source,
        "requests_kept": trace.requests,
        "rate_per_s": trace.rate,
        "cv": variation(trace),
        "lag_1_correlation": float(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]),
        "drift": drift(trace),
        "draws": draws,
        "seed": SEED,
        "ks": {n: float(stats.kstest(gaps, d.cdf).statistic) for n, d in gap_laws(trace).items()},
        "ks_critical_1_percent": KS_99 / float(np.sqrt(gaps.size)),
        "windows_s": WINDOWS,
        "dispersion": counts,
        "loads": LOADS,
        "replicas": {name: served(trace, of, problem, name) for name in REPLICAS},
    }
    return {"verdicts": verdicts(result), **result}


def verdicts(r: dict[str, Any]) -> dict[str, dict[str, bool]]:
    """Return what each law explains or predicts."""
    minute, at = WINDOWS.index(MINUTE), LOADS.index(AT)
    truth = r["dispersion"]["trace"][minute]
    result = {
        "gaps": {n: bool(d <= r["ks_critical_1_percent"]) for n, d in r["ks"].items()},
        "counts": {n: bool(1 / FACTOR <= r["dispersion"][n][minute] / truth <= FACTOR) for n in LAWS},
    }
    for name, of in r["replicas"].items():
        tail = of["p99_ttft_s"]
        errors = {n: tail[n][at]["mean"] / tail["trace"][at] - 1 for n in LAWS}
        result[f"p99 TTFT, {name}"] = {n: bool(abs(e) <= TOLERANCE) for n, e in errors.items()}
        bears = of["capacity_per_s"]
        result[f"capacity, {name}"] = {n: bool(abs(bears[n] / bears["trace"] - 1) <= BEARS) for n in LAWS}
    return result


COLOURS = dict(zip(MODELS, ("#0072B2", "#009E73", "#CC79A7", "#D55E00", "#E69F00", "#777777"), strict=True))
MARKS = dict(zip(MODELS, "osx^vd", strict=True))


def draw(r: dict[str, Any], path: Path) -> None:
    """Draw dispersion by window, and p99 TTFT by load on each replica."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    figure, axes = plt.subplots(1, 3, figsize=(12.6, 4.0), layout="constrained")
    style: dict[str, dict[str, Any]] = {m: {"color": COLOURS[m], "marker": MARKS[m], "ms": 5, "lw": 1} for m in MODELS}
    axes[0].plot(WINDOWS, r["dispersion"]["trace"], color="black", lw=2, label="trace")
    for n in LAWS:
        axes[0].plot(WINDOWS, r["dispersion"][n], label=n, **style[n])
    axes[0].set(xscale="log", yscale="log", xlabel="window [s]", ylabel="variance / mean of the arrivals [-]")
    axes[0].set_title("counts of arrivals", fontsize=10)
    for axis, of in zip(axes[1:], r["replicas"].values(), strict=True):
        axis.plot(LOADS, of["p99_ttft_s"]["trace"], color="black", lw=2, label="trace", zorder=3)
        for m in MODELS:
            means, low, high = (np.array([x[k] for x in of["p99_ttft_s"][m]]) for k in ("mean", "low", "high"))
            axis.errorbar(LOADS, means, (means - np.maximum(low, means / 10), high - means), capsize=2,
                          label=CONTROLS.get(m, m), ls=":" if m in CONTROLS else "-", **style[m])  # fmt: skip
        axis.set(yscale="log", xlabel="mean rate / analytic capacity [-]", ylabel="p99 time to first token [s]")
        axis.set_ylim(0.08, 40.0)  # the same on both, to be compared
        axis.set_title(f"{of['service']}, {of['slots']} slots", fontsize=10)
    for axis in axes:
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25, which="both")
    axes[0].legend(fontsize=8)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def law_row(r: dict[str, Any], name: str) -> str:
    """Return a line of the table of laws; an x marks what misses its bar."""
    minute = WINDOWS.index(MINUTE)
    if name == "trace":
        return f"| trace | | {r['dispersion']['trace'][minute]:.1f} |"
    v, distance = r["verdicts"], r["ks"].get(name)
    gap = "" if distance is None else f"{distance:.3f}{'' if v['gaps'][name] else ' x'}"
    return f"| {name} | {gap} | {r['dispersion'][name][minute]:.1f}{'' if v['counts'][name] else ' x'} |"


def served_row(r: dict[str, Any], model: str) -> str:
    """Return a line of the table of what is served."""
    at, cells = LOADS.index(AT), []
    for name, of in r["replicas"].items():
        tail, bears = of["p99_ttft_s"], of["capacity_per_s"]
        if model == "trace":
            cells += [f"{tail['trace'][at]:.2f}", f"{bears['trace']:.2f}"]
            continue
        mean, low, high = (tail[model][at][k] for k in ("mean", "low", "high"))
        marks = ["" if r["verdicts"][f"{k}, {name}"].get(model, True) else " x" for k in ("p99 TTFT", "capacity")]
        cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f}), {mean / tail['trace'][at] - 1:+.0%}{marks[0]}")
        cells.append(f"{bears[model]:.2f}, {bears[model] / bears['trace'] - 1:+.1%}{marks[1]}")
    return f"| {CONTROLS.get(model, model)} | " + " | ".join(cells) + " |"


def readme(r: dict[str, Any]) -> str:
    """Return the text of README.md with the numbers of this run."""
    over = {
        name: {m: f"{x / of['capacity_per_s']['trace'] - 1:+.0%}" for m, x in of["capacity_per_s"].items()}
        for name, of in r["replicas"].items()
    }
    return README.format(
        laws="\n".join(law_row(r, n) for n in ("trace", *LAWS)),
        rows="\n".join(served_row(r, m) for m in ("trace", *MODELS)),
        tolerance=TOLERANCE,
        bears=BEARS,
        at=AT,
        factor=FACTOR,
        context=CONTEXT,
        minutes=PIECE / 60,
        short=r["dispersion"]["trace"][0],
        long=r["dispersion"]["trace"][-1],
        asymptote=r["cv"] ** 2,
        d=r["drift"],
        roomy=r["replicas"]["roomy"],
        tight=r["replicas"]["tight"],
        over=over,
        steep=r["replicas"]["tight"]["p99_ttft_s"]["trace"][-1] / r["replicas"]["tight"]["p99_ttft_s"]["trace"][-3],
        r=r,
    )


README = """# Which arrival law?

**Claim.** At equal mean rate, a Poisson process, or gamma or Weibull gaps with the trace's coefficient of variation,
predict the trace's p99 time to first token within {tolerance:.0%}.

**Verdict.** Holds where slots are plenty and first tokens wait for prefills only; fails where requests wait for a slot.
None of the three is the law of the trace: gaps look almost exponential (coefficient of variation {r[cv]:.2f}, lag-1
correlation {r[lag_1_correlation]:.2f}), so they are nearly one law, but the rate drifts over minutes.

| arrivals | KS distance of gaps | variance / mean of the counts of a minute |
|---|---|---|
{laws}

An x: rejected at 1 % (distance above {r[ks_critical_1_percent]:.3f}), or off by more than a factor of {factor:g}.
Source: {r[source]}; the {r[requests_kept]} of at most
{context} tokens, {r[rate_per_s]:.2f} request/s.

| arrivals | {roomy[service]}: p99 TTFT [s] | capacity [1/s] | {tight[service]}: p99 TTFT [s] | capacity [1/s] |
|---|---|---|---|---|
{rows}

An x: off by more than {tolerance:.0%} (p99 TTFT), or {bears:.0%} (capacity; this bar was set after seeing the numbers).

- The replicas are those of the shipped scenario, decoding plainly: {roomy[service]} with {roomy[slots]} slots,
  {tight[service]} with {tight[slots]}.
- p99 TTFT is at {at:.0%} load: the mean rate over the analytic Poisson capacity of the replica, here
  {roomy[analytic_capacity_per_s]:.2f} and {tight[analytic_capacity_per_s]:.2f} request/s.
- Capacity is the greatest mean rate that keeps the scenario's p99 TTFT and mean TPOT in simulation.
- Laws serve the requests of the trace in random order, the last two rows as they say. The time axis is stretched to
  each rate. Means over {r[draws]} draws of each law with 95 % intervals; capacity over a third of them.

Written by `python studies/arrival_laws/run.py --trace FILE`, which fails when a verdict changes.

![dispersion of counts, and p99 TTFT by load](arrivals.png)

## What it says

- **The variation of gaps says nothing about minutes.** The variance of the counts over their mean rises from
  {short:.1f} in a second to {long:.0f} in five minutes. For a renewal law it tends to the squared variation of the
  gaps, here {asymptote:.2f} (Cox & Lewis 1966, ch. 4): a law fitted to gaps cannot show what is not in gaps.
- **The wrong law costs capacity where slots bind.** There the capacity for Poisson traffic is
  {over[tight][poisson]} off that of the trace (gamma {over[tight][gamma]}, Weibull {over[tight][weibull]}), and its p99
  misses the wait for a slot altogether; that for piecewise rates is {over[tight][piecewise]} off. Where slots are
  plenty it is {over[roomy][poisson]} for Poisson traffic and {over[roomy][piecewise]} for piecewise rates.
- **No law predicts p99 at a load near the knee.** On the tight replica that of the trace rises {steep:.0f}-fold
  between the last two steps of 10 % of load, so that draws of one law differ widely in it; capacity is the
  better-conditioned figure.
- **Lengths drift with the rate.** Busy minutes bring short answers: {d[output_at_greatest_rate]:.0f} tokens at
  {d[greatest_rate_per_s]:.1f} request/s, {d[output_at_least_rate]:.0f} at {d[least_rate_per_s]:.1f} (correlation
  {d[correlation]:.2f} over pieces of {minutes:.0f} minutes). That evens out the load: at the times of the trace but
  with lengths shuffled, capacity is {over[roomy][shuffled]} (roomy) and {over[tight][shuffled]} (tight).
- For figures near the limit of a replica, replay the trace (`traffic.trace`).

## What it does not say

- The piecewise rates were counted on the hour they are tested on: they show which structure is needed, not that
  tomorrow's rates are known.
- The load and the tight replica were chosen after a first run, on the roomy one at 70 %, had shown little. The p99 of
  the trace is that of one hour: it has no interval.
- One hour of one service. Elsewhere gaps are burstier, and gamma or Weibull laws describe them better than Poisson
  (Xiang et al. 2025, arXiv:2505.09999); the prediction then depends on the gaps too.
- That busy minutes bring short answers is a fact of this hour, not a law. Stretching the time axis to a load shortens
  the drift with it.
"""


def bars(result: dict[str, Any]) -> list[Bar]:
    """Return each claim of each law."""
    return [Bar(f"{law}: {claim}", holds) for claim, of in result["verdicts"].items() for law, holds in of.items()]


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    over = {
        name: of["capacity_per_s"]["poisson"] / of["capacity_per_s"]["trace"] - 1
        for name, of in result["replicas"].items()
    }
    return (
        f"Poisson arrivals promise {over['roomy']:+.0%} capacity where slots are plenty, {over['tight']:+.0%} where not"
    )


def validations(result: dict[str, Any]) -> list[Validation]:
    """Return what each law makes of the capacity of the two replicas at the times of the trace."""
    fitted = "rate and variation of gaps of the trace; piecewise: its rates by five minutes"
    capacity = [of["capacity_per_s"] for of in result["replicas"].values()]
    return [
        Validation.errors(
            [of[law] / of["trace"] - 1 for of in capacity],
            "queueing against simulation",
            f"capacity of a replica by arrival law: {law}",
            "simulated at the times of a trace",
            fitted,
        )
        for law in MODELS
    ]


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(read_trace(given.data), 2 if given.quick else DRAWS),
    readme,
    headline,
    bars=bars,
    draw=lambda given, result: draw(result, given.folder / "arrivals.png"),
    expected={f"{law}: {claim}": holds for claim, of in EXPECTED.items() for law, holds in of.items()},
    n=lambda result: result["requests_kept"],
    validations=validations,
    data=Data("traces/splitwise_conv.csv", option="--trace"),
    quick="two draws of each law",
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

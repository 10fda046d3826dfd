"""Claims: requests simulated a second on one core; cost and memory linear in requests; the same as stepping, faster.

    python studies/engine_speed/run.py [--trace FILE] [--quick] [--output DIR]

Replicas of the shipped scenario, Poisson arrivals at three quarters of the throughput of a full queue. Lengths follow
the log-normal laws of the scenario; with --trace also those of the requests of FILE, drawn with replacement (the Azure
LLM inference trace 2023, conversation; columns: see ``simulator.traces.read_trace``). The engine that steps is
``tests/reference_engine.py``, plain Python. Seconds are those of the processor, after compilation, the least of three
runs: other work on the machine only adds to them. Where the two engines are compared, the least of nine against the
least of two, which favours the one that steps if either. The start is that of the shipped scenario from the shell, by
the clock on the wall, the least of five.

Exits with 1 when a bar is missed. --quick runs a hundredth of the requests, has no bars but the one that both engines
agree, and writes nothing. --output is the folder of this study by default.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.build import resolve
from planner.scenario import load_scenario
from planner.service import Load, Service, build_service
from simulator.cluster import ClusterRecords, Paths, TierSetup, simulate_cluster, simulate_tier
from simulator.engine import Records, simulate
from simulator.traces import read_trace
from simulator.workload import LogNormalLengths, Workload, poisson
from studies.study import Bar, Data, Study
from theory.specs import Limits

HERE = Path(__file__).parent
DEGREES = (1, 2, 4)  # tensor-parallel degrees of the 13B, 34B and 70B [GPUs]
ESCALATED = (1.0, 0.35, 0.12)  # share of the requests that reach each tier [-]
LOAD = 0.75  # of the throughput of a full queue [-]
COUNT = 1_000_000  # requests of a speed
SPREAD = (10_000, 100_000, 1_000_000, 10_000_000)  # requests of the claim that cost is linear
AGAINST = 100_000  # requests that the stepping engine runs too
CONTEXT = 4096  # longest request of the trace that is kept [tokens]
CHUNK = 512  # token budget of a step where prompts are to be chunked [tokens]
HELD = 40_000  # KV cache where it is to be tight [tokens]
SEED = 7

PLAIN, ALL, MEMORY, AGAIN, LINEAR = 1e6, 2e5, 4.0, 1000.0, 1.5  # bars: requests/s (2), GB, ratio, ratio of costs
START = 3.0  # bar [s]
Lengths = tuple[NDArray[Any], NDArray[Any]]


@cache
def services() -> tuple[Service, ...]:
    """Return a replica of each tier, the first draft of the scenario beside it, as the planner builds it."""
    problem = resolve(*load_scenario())
    load = Load.of(problem.workload)
    built = [
        build_service(k, problem.deployment(k, tp), problem.profile, problem.drafts[k][0], load)
        for k, tp in enumerate(DEGREES)
    ]
    return tuple(s for s in built if isinstance(s, Service))


def law_lengths(count: int) -> Lengths:
    """Return prompts and outputs by the laws of the scenario [tokens]."""
    traffic, rng = load_scenario()[0].traffic, np.random.default_rng(SEED)
    laws = [LogNormalLengths(s.median, s.sigma, s.low, s.high) for s in (traffic.prompt_tokens, traffic.output_tokens)]
    return laws[0].draw(count, rng), laws[1].draw(count, rng)


def trace_lengths(path: Path, count: int) -> Lengths:
    """Return prompts and outputs of requests of a trace, drawn with replacement [tokens]."""
    trace = read_trace(path, sort=True)
    kept = np.flatnonzero(trace.prompt + trace.output <= CONTEXT)
    row = np.random.default_rng(SEED).choice(kept, count)
    return trace.prompt[row], trace.output[row]


def plain(work: Workload) -> Records:
    """Plain decoding on the 70B, a KV cache that does not bind."""
    s = services()[2]
    return simulate(work, s.table, s.deployment.limits, 10**7)


def all_at_once(work: Workload) -> Records:
    """Drafts by batch, chunked prompts and a tight KV cache on the 70B."""
    s = services()[2]
    return simulate(work, s.table, chunked(s), HELD, s.schedule, s.acceptance, SEED)


def fixed_drafts(work: Workload) -> Records:
    """The same with four drafts in every round, whatever the batch: the dearest case."""
    s = services()[2]
    return simulate(work, s.table, chunked(s), HELD, 4, s.acceptance, SEED)


def four_replicas(work: Workload) -> Records:
    """Plain decoding on four replicas of the 70B, each request to the one with the fewest outstanding."""
    s = services()[2]
    tier = TierSetup("70b", s.table, s.deployment.limits, 10**7, replicas=4, routing="least-outstanding")
    return simulate_tier(work, tier, SEED)


def three_tiers(work: Workload) -> ClusterRecords:
    """The same on all three tiers, some requests escalating."""
    tiers = [
        TierSetup(str(s.tier), s.table, chunked(s), HELD, s.schedule, s.acceptance, gpus=s.gpus) for s in services()
    ]
    reach = np.random.default_rng(SEED).random(work.requests)[:, None] < np.array(ESCALATED)
    last = reach.sum(axis=1) - 1
    return simulate_cluster(work, tiers, Paths(reach, last, np.ones(work.requests)), SEED)


def chunked(service: Service) -> Limits:
    """Return the limits of the replica with a small token budget."""
    limits = service.deployment.limits
    return Limits(limits.max_num_seqs, CHUNK, limits.gpu_memory_utilization, limits.block_size)


def offered(engine: Callable[[Workload], Any], lengths: Lengths) -> Workload:
    """Return the requests with Poisson arrivals at LOAD times the throughput of a full queue."""
    few = min(lengths[0].size, 5000)
    burst = engine(Workload(np.zeros(few), lengths[0][:few], lengths[1][:few]))
    rate = LOAD * few / float(np.nanmax(burst.completion))
    return Workload(poisson(rate, lengths[0].size, np.random.default_rng(SEED)), *lengths)


def seconds(engine: Callable[[Workload], Any], work: Workload, repeats: int = 3) -> tuple[float, Any]:
    """Return processor seconds of a run, the least of some, and its records."""
    best, records = float("inf"), None
    for _ in range(repeats):
        begun = time.process_time()
        records = engine(work)
        best = min(best, time.process_time() - begun)
    return best, records


def speed(engine: Callable[[Workload], Any], lengths: Lengths) -> dict[str, float]:
    """Return requests a second, and what was run."""
    work = offered(engine, lengths)
    spent, records = seconds(engine, work)
    found = {"rate": work.requests / spent, "preempted": float(records.preemptions.sum() / work.requests)}
    if isinstance(records, Records):
        found |= {"batch": records.decode_s / records.busy_s, "steps": records.steps / work.requests}
    return found


def in_child(count: int) -> tuple[float, float]:
    """Return processor seconds of ``count`` plain requests and the most memory of the process [GB]; runs alone."""
    plain(Workload([0.0], [10], [10]))
    work = offered(plain, law_lengths(count))
    spent, _ = seconds(plain, work)
    return spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def spread(sizes: Sequence[int]) -> list[dict[str, float]]:
    """Return cost and memory by size, each in a process of its own."""
    rows = []
    for count in sizes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            spent, memory = pool.apply(in_child, (count,))
        rows.append({"requests": count, "s": spent, "us": spent / count * 1e6, "gb": memory})
    return rows


def against(count: int) -> dict[str, float]:
    """Return how often faster the engine is than the stepping one, and how far their completions differ."""
    module = importlib.util.spec_from_file_location("reference", HERE.parents[1] / "tests" / "reference_engine.py")
    assert module is not None
    assert module.loader is not None
    stepping = importlib.util.module_from_spec(module)
    sys.modules["reference"] = stepping
    module.loader.exec_module(stepping)
    s = services()[2]
    work = offered(plain, law_lengths(count))
    fast, run = seconds(plain, work, 9)
    slow, (expected, _) = seconds(lambda w: stepping.reference(w, s.table, s.deployment.limits, 10**7), work, 2)
    apart = float(np.max(np.abs(run.completion / expected.completion - 1)))
    return {"requests": count, "fast_s": fast, "slow_s": slow, "ratio": slow / fast, "apart": apart}


def start(repeats: int = 5) -> float:
    """Return the seconds from the shell to the end of ``tierwise simulate``, the engine compiled before."""
    taken = []
    for _ in range(1 + repeats):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tierwise", "simulate"], check=True, capture_output=True)
        taken.append(time.perf_counter() - begun)
    return min(taken[1:])


def analyse(trace: Path | None, share: float) -> dict[str, Any]:
    """Return all figures."""
    found: dict[str, Any] = {"spread": spread([int(n * share) for n in SPREAD])}  # first: a child inherits the peak
    count = int(COUNT * share)
    lengths = law_lengths(count)
    engines = {
        "plain": plain,
        "together": four_replicas,
        "all": all_at_once,
        "fixed": fixed_drafts,
        "tiers": three_tiers,
    }
    found |= {name: speed(engine, lengths) for name, engine in engines.items()}
    if trace is not None:
        found["trace"] = speed(plain, trace_lengths(trace, count))
        found["trace_all"] = speed(all_at_once, trace_lengths(trace, count))
    found["against"] = against(int(AGAINST * share))
    found["start_s"] = start()
    return found


def verdicts(found: dict[str, Any]) -> dict[str, bool]:
    """Return which claims hold."""
    cost = [row["us"] for row in found["spread"]]
    return {
        f"plain decoding, {PLAIN:,.0f} requests/s": min(found[k]["rate"] for k in ("plain", "trace") if k in found)
        >= PLAIN,
        f"chunks, tight KV cache and drafts, on one and on three tiers, {ALL:,.0f} requests/s": min(
            found[k]["rate"] for k in ("all", "fixed", "tiers", "trace_all") if k in found
        )
        >= ALL,
        f"cost of a request within a factor of {LINEAR} over the sizes": max(cost) <= LINEAR * min(cost),
        f"most memory below {MEMORY:.0f} GB": max(row["gb"] for row in found["spread"]) < MEMORY,
        f"{AGAIN:,.0f} times the engine that steps": found["against"]["ratio"] >= AGAIN,
        "the same completions to 1e-9": found["against"]["apart"] <= 1e-9,
        f"the shipped scenario from the shell within {START:.0f} s": found["start_s"] <= START,
    }


LABELS = {
    "plain": "plain decoding",
    "trace": "plain decoding, lengths of the trace",
    "together": "plain decoding, four replicas, fewest outstanding",
    "all": "drafts by batch, chunks, tight KV cache",
    "trace_all": "the same, lengths of the trace",
    "fixed": "four drafts always, chunks, tight KV cache",
    "tiers": "drafts by batch, chunks, tight KV caches, three tiers",
}


def readme(found: dict[str, Any]) -> str:
    """Return the page of this study."""
    a = found["against"]
    lines = [
        "# Requests simulated a second",
        "",
        "Written by `python studies/engine_speed/run.py --trace FILE`, which exits with 1 if a claim does not hold.",
        "",
        "| claim | verdict |",
        "|---|---|",
        *(f"| {claim} | {'holds' if holds else 'does not hold'} |" for claim, holds in verdicts(found).items()),
        "",
        f"One core, {COUNT:,} requests, Poisson arrivals at {LOAD:.0%} of the throughput of a full queue:",
        "",
        "| run | million requests/s | mean batch | steps per request | preemptions per request |",
        "|---|---|---|---|---|",
    ]
    for key, label in LABELS.items():
        if key in found:
            row = found[key]
            shape = f"{row['batch']:.1f} | {row['steps']:.1f}" if "batch" in row else "- | -"
            lines.append(f"| {label} | {row['rate'] / 1e6:.3f} | {shape} | {row['preempted']:.4f} |")
    lines += [
        "",
        "Plain decoding by size, each in a process of its own (memory is that of the whole process):",
        "",
        "| requests | s | microseconds per request | GB |",
        "|---|---|---|---|",
        *(f"| {r['requests']:,} | {r['s']:.3f} | {r['us']:.3f} | {r['gb']:.2f} |" for r in found["spread"]),
        "",
        f"Against the plain-Python engine that steps, {a['requests']:,} requests: {a['slow_s']:.0f} s to "
        f"{a['fast_s']:.3f} s, **{a['ratio']:,.0f} times**",
        "(the least processor time of nine runs against the least of two, on the same machine);",
        f"completions differ by at most {a['apart']:.0e} of themselves.",
        "",
        f"`tierwise simulate` of the shipped scenario: {found['start_s']:.2f} s from the shell, once compiled.",
        "",
        f"Tight is a KV cache of {HELD:,} tokens; chunks come from a budget of {CHUNK} tokens a step. With drafts the",
        "engine takes steps one by one, so that its cost is that of a draw per sequence and round.",
        "",
    ]
    return "\n".join(lines)


def headline(found: dict[str, Any]) -> str:
    """Return the number to remember."""
    plain, ratio = min(found[k]["rate"] for k in ("plain", "trace") if k in found), found["against"]["ratio"]
    cost = [row["us"] for row in found["spread"]]
    return (
        f"{plain / 1e6:.1f} million requests/s, {ratio:,.0f} times the engine that steps; "
        f"cost of a request within a factor of {max(cost) / min(cost):.2f}"
    )


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.data, 0.01 if given.quick else 1.0),
    readme,
    headline,
    bars=lambda found: [Bar(name, bool(holds)) for name, holds in verdicts(found).items()],
    n=lambda found: max(row["requests"] for row in found["spread"]),
    data=Data("traces/splitwise_conv.csv", option="--trace", required=False),
    quick="a hundredth of the requests",
    quick_judged=False,
    times=("*",),
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

"""Claim: speculation turns from a gain into a loss as load grows, theory and simulation say where, and so do servers.

Six pairs: Llama-2-70B on four and on eight H100 with llama-68m, tinyllama-1.1b and llama-2-7b drafting, each with the
draft length that is best for one request, held at every batch size. Load is the arrival rate at one replica, gain the
mean time of a visit without the draft over that with it. Then the one crossover that is published with its setting:
llm-d/llm-d pull request 2074, Qwen3-32B with an EAGLE-3 head on 2 x H200.

    python studies/speculation_crossover/run.py [--output DIR]

Exits with 1 when a verdict differs from the one in EXPECTED.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from planner.build import Problem, resolve
from planner.crossover import crossing_rate, crossover, gains, without_draft
from planner.predict import DraftModel
from planner.scenario import load_scenario, parse_scenario
from planner.search import Group
from planner.service import Load, Service, build_service, with_length
from planner.space import Space, enumerate_space, occupancy
from simulator.engine import simulate
from simulator.workload import Workload, at_rate
from studies.study import Study, Validation
from theory.acceptance import Acceptance
from theory.catalog import model
from theory.specs import Transformer

Array = NDArray[np.float64]
HERE = Path(__file__).parent
TARGET = 2  # the tier of the shipped scenario that is Llama-2-70B
TPS = (4, 8)  # [GPUs]
REQUESTS = 6000  # of each run, the first fifth left out [-]
SEEDS = (1, 2, 3)
SHARES = np.array([0.03, 0.15, 0.3, 0.45, 0.6, 0.7, 0.78, 0.84, 0.89, 0.93, 0.96, 0.985])  # of the stability limit [-]
WITHIN = 0.10  # asked of a simulated crossover: its distance from the analytic one [-]
DRAFTS = """[
  {model: llama-68m, acceptance: 0.51, acceptance_interval: [0.46, 0.56],
   source: "Spec-Bench, vicuna-68m for Vicuna-33B on A100: 2.01 tokens a round; assumed to carry over to 70B"},
  {model: tinyllama-1.1b, draft_tokens: 3.0e+12, target_tokens: 2.0e+12},
  {model: llama-2-7b, draft_tokens: 2.0e+12, target_tokens: 2.0e+12}]"""

# github.com/llm-d/llm-d/pull/2074, guides/spec-decoding/benchmark-results/vllm-qwen3-32b-eagle3: Qwen3-32B, EAGLE-3,
# 3 drafted tokens, one replica on 2 x H200, 120 s at each constant rate, random tokens; input normal (2048, 1024) in
# 10..4096, output normal (256, 128) in 10..512
PUBLISHED = {  # requests/s: (TPOT p50 [ms], output tokens/s) without the draft, the same with it
    1: ((13.2, 265.0), (9.7, 244.0)),
    2: ((15.1, 525.0), (11.7, 538.0)),
    4: ((24.6, 1006.0), (21.4, 1032.0)),
    8: ((209.7, 1649.0), (210.1, 1442.0)),
    16: ((222.5, 1645.0), (220.7, 1473.0)),
}
PUBLISHED_CROSSOVER = (4.0, 8.0)  # [requests/s]
STAGE_S = 120.0  # [s]
HEAD_LENGTH = 3  # drafted tokens [tokens]
EXPECTED = {
    "each draft gains without load": True,
    "theory and simulation agree on which pairs turn": True,
    "simulated crossovers within 10 % of the analytic ones": True,
    "crossovers come later on eight GPUs than on four": True,
    "the longer the drafts' work, the earlier: 7B turns before 1.1B": True,
    "published crossover between 4 and 8 requests/s: predicted there": True,
    "published gains in TPOT at 2 and 4 requests/s: predicted within 10 points": False,
}


@dataclass(frozen=True)
class Pair:
    """A replica with a fixed draft length, and the same without."""

    fixed: Service
    plain: Service
    length: int


def pairs(problem: Problem, space: Space) -> dict[str, tuple[Pair, dict[str, Any]]]:
    """Return the six pairs by name with their analytic crossovers, drafts placed where one request is fastest."""
    found: dict[str, tuple[Pair, dict[str, Any]]] = {}
    for tp in TPS:
        for draft in dict.fromkeys(d.model.name for d in problem.drafts[TARGET]):
            ways = [
                s
                for s in space.services[TARGET]
                if s.deployment.tp == tp and s.draft is not None and s.draft.model.name == draft
            ]
            best = min(ways, key=lambda s: float(s.rounds.time[0] / s.rounds.tokens[0]))
            group = Group(TARGET, best, 1, 1.0)
            row = crossover(problem, space, group)
            assert row is not None
            fixed = with_length(best, space.load, row["fixed_length"])
            found[f"{draft}, TP {tp}"] = (Pair(fixed, without_draft(space, group), row["fixed_length"]), row)
    return found


def mean_time(service: Service, workload: Workload, rate: float, seed: int) -> float:
    """Return the simulated mean time of a visit, after the first fifth [s]."""
    d = service.deployment
    run = simulate(
        at_rate(workload, rate),
        service.table,
        d.limits,
        service.kv_tokens,
        service.schedule,
        service.acceptance,
        seed,
    )
    return float((run.completion - run.arrival)[run.arrival.size // 5 :].mean())


def curve(pair: Pair, problem: Problem, load: Load) -> dict[str, Any]:
    """Return analytic and simulated gains over load, and the simulated crossing of each seed."""
    limit = float(occupancy([pair.fixed, pair.plain], np.full(2, 1e-9), load).rate_limit.min())
    rates = SHARES * limit
    runs = np.array(
        [
            [
                np.log(mean_time(pair.plain, problem.workload, r, s) / mean_time(pair.fixed, problem.workload, r, s))
                for r in rates
            ]
            for s in SEEDS
        ]
    )
    return {
        "rates": rates.tolist(),
        "theory": np.exp(gains(pair.fixed, pair.plain, rates, load)).tolist(),
        "simulated": np.exp(runs.mean(axis=0)).tolist(),
        "simulated_low": np.exp(runs.min(axis=0)).tolist(),
        "simulated_high": np.exp(runs.max(axis=0)).tolist(),
        "simulated_crossing": crossing(rates, runs.mean(axis=0)),
        "simulated_crossing_by_seed": [crossing(rates, run) for run in runs],
    }


def crossing(rates: Array, gain: Array) -> float | None:
    """Return the rate at which ln(gain) first falls through 0, interpolated; None if it does not [requests/s]."""
    below = np.flatnonzero(gain < 0)
    if not len(below) or below[0] == 0:
        return None if not len(below) else 0.0
    i = int(below[0])
    return float(rates[i - 1] + (rates[i] - rates[i - 1]) * gain[i - 1] / (gain[i - 1] - gain[i]))


# ------------------------------------------------------------------------------------------------ the published one


def head(target: Transformer) -> Transformer:
    """Return an EAGLE-3 head: one layer of the target's shape, a vocabulary of 32,000, its fusing layer left out."""
    return replace(target, name="eagle3-head", layers=1, vocab=32000)


@cache
def h200() -> tuple[Problem, Load]:
    """Return the published setting: engine limits vLLM's defaults on this GPU, host times those of our vLLM preset."""
    scenario = parse_scenario(
        {
            "name": "llm-d-2074",
            "fleet": {"accelerator": "h200-sxm", "gpus": 2, "price_per_gpu_hour": 1.0},
            "engine": {"preset": "vllm", "max_num_seqs": 1024, "max_num_batched_tokens": 8192},
            "traffic": {"rate": 1.0, "requests": 2, "prompt_tokens": {"median": 9}, "output_tokens": {"median": 9}},
            "tiers": [{"name": "qwen", "model": "qwen3-32b", "tp": [2]}],
        }
    )
    return resolve(scenario, Path.cwd()), Load.of(stage(1.0, 20000))


def stage(rate: float, requests: int, seed: int = 0) -> Workload:
    """Return requests at a constant rate with the published lengths."""
    rng = np.random.default_rng(seed)
    prompt = np.clip(rng.normal(2048, 1024, requests), 10, 4096).round().astype(int)
    output = np.clip(rng.normal(256, 128, requests), 10, 512).round().astype(int)
    return Workload(np.arange(requests) / rate, prompt, output, "llm-d pull request 2074")


def with_head(acceptance: float | None) -> Service:
    """Return the replica with a head of this acceptance, or without one."""
    problem, load = h200()
    deployment = problem.deployment(0, 2)
    draft = None
    if acceptance is not None:
        given = Acceptance(acceptance, acceptance, acceptance, "fitted", "TPOT at 1 request/s of llm-d#2074")
        draft = DraftModel(head(model("qwen3-32b")), given, 2, HEAD_LENGTH)
    built = build_service(0, deployment, problem.profile, draft, load, None if draft is None else HEAD_LENGTH)
    assert isinstance(built, Service)
    return built


def tpot(service: Service, rate: float) -> float:
    """Return the analytic mean TPOT [s]."""
    return float(occupancy([service], np.array([rate]), h200()[1]).tpot_s[0])


def fitted_acceptance() -> float:
    """Return the acceptance at which the analytic gain in TPOT at 1 request/s is the published one [-]."""
    (plain, _), (spec, _) = PUBLISHED[1]
    low, high = 0.0, 0.99
    for _ in range(12):
        middle = (low + high) / 2
        if tpot(with_head(None), 1.0) / tpot(with_head(middle), 1.0) < plain / spec:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def staged(service: Service, rate: float) -> tuple[float, float]:
    """Return TPOT p50 [s] and output tokens/s of a simulated stage."""
    run = simulate(
        stage(rate, int(rate * STAGE_S)),
        service.table,
        service.deployment.limits,
        service.kv_tokens,
        service.schedule,
        service.acceptance,
        0,
    )
    each = (run.completion - run.first_token) / np.maximum(run.output - 1, 1)
    return float(np.median(each)), float(run.output.sum() / (run.completion.max() - run.arrival.min()))


def published() -> dict[str, Any]:
    """Return the published ladder beside ours, and where ours turns."""
    alpha = fitted_acceptance()
    plain, spec = with_head(None), with_head(alpha)
    load = h200()[1]
    rows = []
    for rate, (base, drafted) in PUBLISHED.items():
        own, own_drafted = staged(plain, float(rate)), staged(spec, float(rate))
        rows.append(
            {
                "requests_per_s": rate,
                "tpot_ms": [base[0], drafted[0]],
                "own_tpot_ms": [1000 * own[0], 1000 * own_drafted[0]],
                "tpot_change": drafted[0] / base[0] - 1,
                "own_tpot_change": own_drafted[0] / own[0] - 1,
                "tokens_change": drafted[1] / base[1] - 1,
                "own_tokens_change": own_drafted[1] / own[1] - 1,
            }
        )
    return {
        "acceptance": alpha,
        "rows": rows,
        "crossover_requests_per_s": crossing_rate(spec, plain, load),
        "limit_without": float(occupancy([plain], np.full(1, 1e-9), load).rate_limit[0]),
        "limit_with": float(occupancy([spec], np.full(1, 1e-9), load).rate_limit[0]),
    }


# ------------------------------------------------------------------------------------------------ the study


def analyse() -> dict[str, Any]:
    """Return all numbers and verdicts."""
    settings = [f"traffic.requests={REQUESTS}", f"tiers.2.drafts={DRAFTS}", "tiers.2.tp=[4, 8]"]
    problem = resolve(*load_scenario(overrides=[*settings, "tiers.0.tp=[8]", "tiers.1.tp=[8]"]), None, 0)
    space = enumerate_space(problem)
    rows = {
        name: {**row, "length": pair.length, **curve(pair, problem, space.load)}
        for name, (pair, row) in pairs(problem, space).items()
    }
    theirs = published()
    turn = {n: (r["crossover_requests_per_s"], r["simulated_crossing"]) for n, r in rows.items()}
    both = [t for t in turn.values() if None not in t]
    later = [
        _or_inf(turn[f"{d}, TP 8"][0]) > _or_inf(turn[f"{d}, TP 4"][0])
        for d in ("llama-68m", "tinyllama-1.1b", "llama-2-7b")
    ]
    small, large = (_or_inf(turn[f"{d}, TP 4"][1]) for d in ("tinyllama-1.1b", "llama-2-7b"))
    at, (low, high) = theirs["crossover_requests_per_s"], PUBLISHED_CROSSOVER
    near = [
        abs(r["tpot_change"] - r["own_tpot_change"]) <= 0.10 for r in theirs["rows"] if r["requests_per_s"] in (2, 4)
    ]
    return {
        "verdicts": {
            "each draft gains without load": all(min(r["theory"][0], r["simulated"][0]) > 1 for r in rows.values()),
            "theory and simulation agree on which pairs turn": all(
                (a is None) == (b is None) for a, b in turn.values()
            ),
            "simulated crossovers within 10 % of the analytic ones": all(abs(b / a - 1) <= WITHIN for a, b in both),
            "crossovers come later on eight GPUs than on four": all(later),
            "the longer the drafts' work, the earlier: 7B turns before 1.1B": large < small,
            "published crossover between 4 and 8 requests/s: predicted there": at is not None and low <= at <= high,
            "published gains in TPOT at 2 and 4 requests/s: predicted within 10 points": all(near),
        },
        "profile": {"name": problem.profile.name, "provenance": problem.profile.provenance},
        "traffic": problem.workload.source,
        "pairs": rows,
        "published": theirs,
    }


def _or_inf(value: float | None) -> float:
    return np.inf if value is None else value


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw gain over load for both degrees, theory as lines, simulation as points; and the published ladder."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"llama-68m": "#0072B2", "tinyllama-1.1b": "#D55E00", "llama-2-7b": "#009E73"}  # Okabe and Ito (2008)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for axis, tp in zip(axes, TPS, strict=False):
        for draft, colour in colours.items():
            row = result["pairs"][f"{draft}, TP {tp}"]
            x, mean = np.array(row["rates"]), np.array(row["simulated"])
            spread = [mean - row["simulated_low"], np.array(row["simulated_high"]) - mean]
            axis.plot(x, row["theory"], color=colour, label=f"{draft}, {row['length']} tokens")
            axis.errorbar(x, mean, spread, fmt="o", ms=4, color=colour, capsize=2)
            low, high = row["crossover_interval_requests_per_s"]
            if low is not None:
                end = x[-1] if high is None else high
                axis.axvspan(low, end, ymin=0, ymax=0.025, color=colour, alpha=0.5)
        axis.axhline(1.0, color="black", lw=0.8)
        axis.set(
            xlabel="load of a replica [requests/s]",
            ylabel="time without draft / with it [-]",
            title=f"Llama-2-70B on {tp} x H100",
            ylim=(0.2, None),
        )
        axis.legend(frameon=False, fontsize=8, loc="lower left")
        axis.grid(alpha=0.3)
    rows, axis = result["published"]["rows"], axes[2]
    x = [r["requests_per_s"] for r in rows]
    axis.plot(x, [1 / (1 + r["tpot_change"]) for r in rows], "s-", color="#0072B2", label="TPOT p50, published")
    axis.plot(
        x, [1 / (1 + r["own_tpot_change"]) for r in rows], "o--", color="#0072B2", mfc="none", label="TPOT p50, ours"
    )
    axis.plot(x, [1 + r["tokens_change"] for r in rows], "s-", color="#D55E00", label="tokens/s, published")
    axis.plot(x, [1 + r["own_tokens_change"] for r in rows], "o--", color="#D55E00", mfc="none", label="tokens/s, ours")
    axis.axvspan(*PUBLISHED_CROSSOVER, color="black", alpha=0.08)
    at = result["published"]["crossover_requests_per_s"]
    if at is not None:
        axis.axvline(at, color="black", ls=":", label="crossover, ours")
    axis.axhline(1.0, color="black", lw=0.8)
    axis.set(
        xscale="log",
        xlabel="load [requests/s]",
        ylabel="gain [-]",
        title="Qwen3-32B + EAGLE-3, 2 x H200",
    )
    axis.set_xticks(x, [str(v) for v in x])
    axis.set_xticks([], minor=True)
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def readme(result: dict[str, Any]) -> str:
    """Return the text of README.md with the numbers of this run."""
    verdicts = "\n".join(
        f"| {name} | {'holds' if held else 'does not hold'} |" for name, held in result["verdicts"].items()
    )
    table = "\n".join(_pair_row(name, row) for name, row in result["pairs"].items())
    theirs = result["published"]
    ladder = "\n".join(
        f"| {r['requests_per_s']} | {r['tpot_ms'][0]:.1f} -> {r['tpot_ms'][1]:.1f} ({r['tpot_change']:+.0%}) | "
        f"{r['own_tpot_ms'][0]:.1f} -> {r['own_tpot_ms'][1]:.1f} ({r['own_tpot_change']:+.0%}) | "
        f"{r['tokens_change']:+.0%} | {r['own_tokens_change']:+.0%} |"
        for r in theirs["rows"]
    )
    at = theirs["crossover_requests_per_s"]
    at_four = next(r for r in theirs["rows"] if r["requests_per_s"] == 4)
    fallen = (
        f"at 4 requests/s the published gain has fallen to\n{-at_four['tpot_change']:.0%} of TPOT and ours is still "
        f"{-at_four['own_tpot_change']:.0%}"
    )
    return f"""# The load at which speculation starts to hurt

**Claim.** With a fixed draft length speculation turns from a gain into a loss as load grows; the queueing theory says
at which load, the simulator agrees within {WITHIN:.0%}, and the published crossover comes out where it was measured.
(The last verdict was asked for before the first run and is missed.)

| verdict | |
|---|---|
{verdicts}

Written by `python studies/speculation_crossover/run.py`, which exits with 1 when a verdict changes. Profile
{result["profile"]["name"]} ({result["profile"]["provenance"]}); the traffic of the shipped scenario, {REQUESTS}
requests a run, {len(SEEDS)} seeds. Gain: mean time of a visit without the draft over that with it.

![gain over load](crossover.png)

Lines are theory, points simulation (bars: lowest and highest seed), coloured strips at the bottom the 90 % interval of
the crossover from step times and acceptance.

| draft of Llama-2-70B | length | gain, no load | crossover [requests/s] | 90 % interval | simulated | by batch |
|---|---|---|---|---|---|---|
{table}

"None" in an interval: speculation still gains where the replica without a draft can take no more. By batch: the least
batch at which a round gives fewer tokens a second than plain steps, with its interval.

## The published crossover

llm-d/llm-d pull request 2074 (github.com/llm-d/llm-d, benchmark results of Qwen3-32B with an EAGLE-3 head, three
drafted tokens, one replica on 2 x H200, 120 s at each rate) reports a crossover at "4-8" requests/s. One number is
fitted to it: the acceptance, {theirs["acceptance"]:.2f}, from the gain in TPOT at 1 request/s. Ours turns at
{"no load below the limit" if at is None else f"{at:.2f} requests/s"}; the replica is full at
{theirs["limit_without"]:.2f} requests/s without and {theirs["limit_with"]:.2f} with the head.

| requests/s | TPOT p50 published [ms] | ours [ms] | tokens/s published | ours |
|---|---|---|---|---|
{ladder}

The crossover comes out where it was measured; the way there does not: {fallen}. What costs a
speculating engine more as the batch grows (sampling and rejection on the host, prompts of the drafter) may be missing
from the host times we have; this one table cannot tell.

The other crossovers in that list are not published with enough of their setting to be computed: the thread vLLM#4565
gives none, and the documentation of vLLM a qualitative table (low load gains, high load loses), which the figure agrees
with.

## What this does not say

Host times are those fitted on H100 with another model; drafts are assumed to cost no host time of their own. The head
is taken as one layer of the target, vLLM's limits as its defaults on this GPU; the published server ran random tokens,
whose acceptance is lower than that of text. At 8 and 16 requests/s the published server is overloaded: what it shows
there depends on how long it ran. A gain in the time of a visit is not one in throughput at saturation.
"""


def _pair_row(name: str, row: dict[str, Any]) -> str:
    low, high = row["crossover_interval_requests_per_s"]
    small, large = row["crossover_batch_interval"]
    return (
        f"| {name} | {row['length']} | {row['theory'][0]:.2f} | {_shown(row['crossover_requests_per_s'])} | "
        f"{_shown(low)} to {_shown(high)} | {_shown(row['simulated_crossing'])} | "
        f"{_shown(row['crossover_batch'])} ({_shown(small)} to {_shown(large)}) |"
    )


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    off, at = max(map(abs, crossing_errors(result))), result["published"]["crossover_requests_per_s"]
    return f"simulated crossovers within {off:.1%} of the analytic; published 4 to 8, predicted {at:.1f} requests/s"


def crossing_errors(result: dict[str, Any]) -> list[float]:
    """Return analytic over simulated crossover, less 1, of the pairs that turn in both."""
    pairs = result["pairs"].values()
    both = [(p["crossover_requests_per_s"], p["simulated_crossing"]) for p in pairs]
    return [theory / simulated - 1 for theory, simulated in both if theory and simulated]


def validations(result: dict[str, Any]) -> list[Validation]:
    """Return crossovers against simulation, and changes of TPOT against the published ones."""
    return [
        Validation.errors(
            crossing_errors(result),
            "queueing against simulation",
            "load at which a draft stops gaining",
            "simulated",
            "nothing",
        ),
        Validation.errors(
            [r["own_tpot_change"] - r["tpot_change"] for r in result["published"]["rows"]],
            "speculation",
            "change of TPOT by a draft, as a share of TPOT, under load",
            "published benchmark",
            "acceptance, at the lowest load",
            unit="absolute",
        ),
    ]


STUDY = Study(
    __file__,
    __doc__,
    lambda _: analyse(),
    readme,
    headline,
    draw=lambda given, result: plot(result, given.folder / "crossover.png"),
    expected=EXPECTED,
    n=lambda result: len(result["pairs"]),
    validations=validations,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

"""Claim: 60 to 80 % of stops at the first tier are the optimum only on a stretch of lambda that data and load decide.

Per-prompt outcomes and signals of five chains. For each: the best stop rule at every lambda, the share of requests that
run the first tier and no other, and the stretch of lambda on which that share is 60 to 80 %, with a bootstrap interval
over prompts; rules fitted on one half of the prompts are followed on the other. Then the same with load prices: tiers
that are busy charge for the time that a visit costs the others (theory/load_prices.py).

    python studies/early_stops/run.py --data DIR [--quick] [--output DIR]

Exits with 1 when a verdict differs from the one in EXPECTED.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from calibration.outcome_models import fit_score_model, level_cuts, smoothed_outcomes, to_levels
from calibration.quality_readers import Samples, read_quality
from studies.study import Data, Study
from theory.cascade import evaluate, execute, solve
from theory.load_prices import Demand, SharedProcessor, Station, plan_under_load
from theory.outcomes import Outcomes

HERE = Path(__file__).parent
FILES = (("zellinger_cascades.csv.gz", None), ("gsm8k_tiers.csv.gz", ("abel-13b", "tora-code-34b", "tora-70b")))
LARGE = 1000  # prompts from which a group is used
LEVELS, DEGREE, WIDTH = 10, 2, 0.7  # of the joint model, the first recipe of calibration/cascade_validation.py
WANTED = (0.6, 0.8)  # the recommended share of stops at the first tier [-]
LAMBDAS = np.geomspace(0.2, 50, 71)  # lambda' = lambda / mean cost of the top tier [-]
SEED_GRID = (0.5 / 8.8, 5 / 8.8)  # where the seed's lambdas 0.5 to 5 lie at its costs 1.6 / 4.2 / 8.8 [-]
COARSE = 3  # every third of them is solved with load
RESAMPLES = 40  # of the prompts
UTILISATION = (0.5, 0.8, 0.9)  # of every tier at the rule that stops 70 % without load [-]
TIME_VALUE = 0.25  # of a second, in calls of the top tier; a visit of it lasts one second when alone (assumed)
SERVERS = 200  # at full load, over all tiers: how finely replicas can be dealt out [-]
NEAR = 0.05  # difference of planned and followed share of stops [-]
EXPECTED = {
    "60 to 80 % are the optimum for some lambda on every set": False,
    "60 to 80 % are the optimum for some lambda on every set whose signal is a confidence": True,
    "at the seed's lambdas, lambda' up to 0.57, at least 95 % stop at the first tier on every set": True,
    "one lambda makes them the optimum on every set": False,
    "load moves the beginning of the stretch up on every set that has one": True,
    "load widens the stretch on every set that has one on busy tiers": True,
    "every plan under load has its certificate": True,
    "on prompts not seen the share of stops is within 5 points of the planned": True,
}


def groups(data: Path) -> list[Samples]:
    """Return the chains of the study."""
    return [g for file, tiers in FILES for g in read_quality(data / file, tiers) if len(g.correct) >= LARGE]


class Fitted:
    """The joint model of some prompts of a chain."""

    def __init__(self, samples: Samples, at: np.ndarray) -> None:
        score, correct, tiers = samples.score[at], samples.correct[at], range(len(samples.tiers))
        self.samples, self.price = samples, samples.cost[at].mean(axis=0)
        self.cuts = [level_cuts(score[:, k], LEVELS, correct[:, k]) for k in tiers]
        quality = fit_score_model(score, correct, DEGREE)(score)
        self.table: Outcomes = smoothed_outcomes(samples.tiers, quality, self.levels(at), LEVELS, WIDTH)

    def levels(self, at: np.ndarray) -> np.ndarray:
        """Return the levels that prompts show, (len(at), K)."""
        shown = [to_levels(self.samples.score[at, k], cuts) for k, cuts in enumerate(self.cuts)]
        return np.stack(shown, axis=1)

    def shares(self) -> np.ndarray:
        """Return the share of stops at the first tier at each lambda."""
        return np.array([self.at(lam).stops[0] for lam in LAMBDAS])

    def at(self, lam: float) -> Any:
        """Return the value of the best rule at lambda' calls of the top tier per correct answer."""
        return evaluate(solve(self.table, self.price, lam * self.price[-1]), self.table, self.price)


def stretch(shares: np.ndarray, lambdas: np.ndarray = LAMBDAS) -> tuple[float, float] | None:
    """Return the first and the last lambda' at which the share is as wanted, None if it nowhere is."""
    inside = np.flatnonzero((shares >= WANTED[0]) & (shares <= WANTED[1]))
    return (float(lambdas[inside[0]]), float(lambdas[inside[-1]])) if len(inside) else None


def bootstrap(samples: Samples, resamples: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return intervals of both ends over resampled prompts, and how often there is a stretch at all."""
    n = len(samples.correct)
    found = [stretch(Fitted(samples, rng.integers(0, n, n)).shares()) for _ in range(resamples)]
    ends = np.array([f for f in found if f is not None])
    interval = np.quantile(ends, (0.025, 0.975), axis=0).T.tolist() if len(ends) else None
    return {"ends_interval": interval, "exists_in": len(ends) / resamples}


def followed(samples: Samples, lam: float, rng: np.random.Generator) -> tuple[float, float]:
    """Return planned and followed share of stops at a lambda', each half of the prompts planning for the other."""
    half = rng.permutation(len(samples.correct)) % 2
    planned, done = [], []
    for side in (0, 1):
        fitted, other = Fitted(samples, np.flatnonzero(half == side)), np.flatnonzero(half != side)
        planned.append(fitted.at(lam).stops[0])
        visits, _ = execute(solve(fitted.table, fitted.price, lam * fitted.price[-1]), fitted.levels(other))
        done.append(np.mean(visits[:, 0] & ~visits[:, 1:].any(axis=1)))
    return float(np.mean(planned)), float(np.mean(done))


# ---------------------------------------------------------------- with load


def stations(fitted: Fitted, lam: float) -> tuple[Station, ...]:
    """Return tiers whose replicas are in proportion to the work of the rule at a lambda', and none idle."""
    seconds = fitted.price / fitted.price[-1]
    work = np.maximum(fitted.at(lam).visits, 0.02) * seconds
    replicas = np.maximum(np.round(SERVERS * work / work.sum()), 1).astype(int)
    return tuple(SharedProcessor(float(s), int(m)) for s, m in zip(seconds, replicas, strict=True))


def under_load(fitted: Fitted, lam: float, quick: bool) -> dict[str, Any]:
    """Return the stretch of lambda' with every tier as busy as UTILISATION at the rule of ``lam``."""
    served = stations(fitted, lam)
    visits = np.maximum(fitted.at(lam).visits, 0.02)
    full = min(s.capacity / v for s, v in zip(served, visits, strict=True))
    curves: dict[str, Any] = {}
    grid = LAMBDAS[::COARSE]
    for busy in (0.0, *(UTILISATION[-1:] if quick else UTILISATION)):
        rate = max(busy, 1e-6) * full
        top = fitted.price[-1]
        plans = [
            plan_under_load(Demand(fitted.table, fitted.price, rate, x * top, TIME_VALUE * top), served) for x in grid
        ]
        shares = np.array([p.value.stops[0] for p in plans])
        curves[str(busy)] = {
            "stops": shares.tolist(),
            "stretch": stretch(shares, grid),
            "converged": all(p.converged for p in plans),
        }
    return curves


# ---------------------------------------------------------------- the study


def analyse(data: Path, quick: bool) -> dict[str, Any]:
    """Return the result of the study."""
    rng, rows = np.random.default_rng(0), []
    for samples in groups(data)[: 1 if quick else None]:
        fitted = Fitted(samples, np.arange(len(samples.correct)))
        shares = fitted.shares()
        ends = stretch(shares)
        middle = math.sqrt(ends[0] * ends[1]) if ends else float(LAMBDAS[np.argmin(np.abs(shares - 0.7))])
        planned, done = followed(samples, middle, rng)
        rows.append(
            {
                "name": samples.name,
                "tiers": list(samples.tiers),
                "n": len(samples.correct),
                "signal": samples.signal,
                "cost_of_top": (fitted.price / fitted.price[-1]).tolist(),
                "accuracy": samples.correct.mean(axis=0).tolist(),
                "stops": shares.tolist(),
                "stretch": ends,
                **bootstrap(samples, 5 if quick else RESAMPLES, rng),
                "largest_lambda_all_stop": float(LAMBDAS[np.flatnonzero(shares > 1 - 1e-9)[-1]])
                if np.any(shares > 1 - 1e-9)
                else 0.0,
                "middle": {"lambda": middle, "planned": planned, "followed": done},
                "load": under_load(fitted, middle, quick),
            }
        )
    return {"verdicts": verdicts(rows), "lambdas": LAMBDAS.tolist(), "rows": rows}


def verdicts(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Return what the rows say; a stretch that begins beyond the last lambda tried has moved up too."""
    ends = [r["stretch"] for r in rows]
    some = [e for e in ends if e is not None]
    busiest = str(UTILISATION[-1])
    moved = [(r["load"]["0.0"]["stretch"], r["load"][busiest]["stretch"]) for r in rows]
    both = [(a, b) for a, b in moved if a is not None and b is not None]
    common = len(some) == len(rows) and max(e[0] for e in some) <= min(e[1] for e in some)
    return {
        "60 to 80 % are the optimum for some lambda on every set": len(some) == len(rows),
        "60 to 80 % are the optimum for some lambda on every set whose signal is a confidence": all(
            r["stretch"] is not None for r in rows if r["signal"] == "confidence"
        ),
        "at the seed's lambdas, lambda' up to 0.57, at least 95 % stop at the first tier on every set": all(
            np.min(np.array(r["stops"])[SEED_GRID[1] >= LAMBDAS]) >= 0.95 for r in rows
        ),
        "one lambda makes them the optimum on every set": bool(common),
        "load moves the beginning of the stretch up on every set that has one": all(
            b is None or b[0] > a[0] for a, b in moved if a is not None
        ),
        "load widens the stretch on every set that has one on busy tiers": all(
            b[1] / b[0] > a[1] / a[0] for a, b in both
        ),
        "every plan under load has its certificate": all(c["converged"] for r in rows for c in r["load"].values()),
        "on prompts not seen the share of stops is within 5 points of the planned": all(
            abs(r["middle"]["planned"] - r["middle"]["followed"]) <= NEAR for r in rows
        ),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the share of stops against lambda, without and with load."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained", sharey=True)
    for axis in axes:
        axis.axhspan(*WANTED, color="0.9")
        axis.set(xscale="log", xlabel="lambda' [calls of the top tier per correct answer]")
    axes[0].axvspan(*SEED_GRID, color="C1", alpha=0.15, label="lambda 0.5 to 5 at 1.6 / 4.2 / 8.8")
    for i, row in enumerate(result["rows"]):
        axes[0].plot(LAMBDAS, row["stops"], f"C{i}", label=row["name"])
        for busy, style in zip(row["load"], ("-", "--", "-.", ":"), strict=False):
            axes[1].plot(LAMBDAS[::COARSE], row["load"][busy]["stops"], style, color=f"C{i}", lw=1)
    axes[0].set(ylabel="requests that stop at the first tier [-]", title="no load; grey: 60 to 80 %")
    axes[0].legend(fontsize=8)
    axes[1].set(title="with load prices: tiers busy 0 (line), 50, 80, 90 % (dots)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def span(ends: list[float] | tuple[float, float] | None) -> str:
    """Return a stretch in words."""
    if ends is None:
        return "nowhere"
    return f"{ends[0]:.2g} to {ends[1]:.2g}" + (" or more" if ends[1] > LAMBDAS[-1 - COARSE] else "")


def readme(result: dict[str, Any]) -> str:
    """Return README.md with the numbers of the result."""
    rows, loads, moves = [], [], []
    for r in result["rows"]:
        ends = r["ends_interval"]
        known = "" if ends is None else f"[{ends[0][0]:.2g}, {ends[0][1]:.2g}] to [{ends[1][0]:.2g}, {ends[1][1]:.2g}] "
        cells = (
            r["name"],
            r["n"],
            r["signal"],
            " / ".join(f"{a:.3f}" for a in r["accuracy"]),
            f"{r['largest_lambda_all_stop']:.2g}",
            span(r["stretch"]),
            f"{known}({r['exists_in']:.0%})",
            f"{r['middle']['planned']:.2f} / {r['middle']['followed']:.2f}",
        )
        rows.append("| " + " | ".join(map(str, cells)) + " |")
        loads.append("| " + " | ".join([r["name"], *(span(v["stretch"]) for v in r["load"].values())]) + " |")
        a, b = r["load"]["0.0"]["stretch"], r["load"][str(UTILISATION[-1])]["stretch"]
        moves += [b[0] / a[0]] if a and b else []
    verdict = "\n".join(f"- {name}: **{'yes' if v else 'no'}**" for name, v in result["verdicts"].items())
    factor = f"{min(moves):.1f} to {max(moves):.1f}" if moves else "no"
    return README.format(verdicts=verdict, rows="\n".join(rows), loads="\n".join(loads), factor=factor)


README = """# When are 60 to 80 % early stops the optimum?

**Claim.** The recommendation to stop 60 to 80 % of requests at the first tier is no rule of thumb: each data set has
its own stretch of lambda on which it is the optimum, or none, and load moves that stretch.

{verdicts}

Written by `python studies/early_stops/run.py --data DIR`, which fails when a verdict changes.

![stops against lambda](stops.png)

## Without load

lambda' is lambda over the mean cost of the top tier: how many of its calls one more correct answer is worth; tried from
0.2 to 50. A stop runs the first tier and no other. "All stop": largest lambda' at which nothing is escalated.
Intervals: 95 % over resampled prompts (share of resamples in which there is such a stretch). Planned / followed: share
of stops in the middle of the stretch, planned on one half of the prompts, followed on the other.

| set | n | signal | accuracy | all stop up to | 60-80 % best at lambda' | interval of its ends | planned / followed |
|---|---|---|---|---|---|---|---|
{rows}

## With load

Replicas of each tier in proportion to its work at the middle of the stretch, tiers as M/G/1-PS queues, a second worth a
quarter of a call of the top tier (which lasts a second alone). All tiers 0, 50, 80, 90 % busy at that rule; every third
lambda' of the grid:

| set | no load | 50 % | 80 % | 90 % |
|---|---|---|---|---|
{loads}

At 90 % the stretch begins at {factor} times the lambda' of no load: what was worth an escalation on empty servers is
not on busy ones. It also becomes wide: busy tiers leave no room for much more escalation at any lambda, so a fleet that
was sized for 70 % of stops gets about that share as its optimum. Sizing decides it, not lambda. (Below the stretch some
requests skip a busy first tier, which is why fewer than all stop there.) On a fleet with room and paid for anyway the
opposite holds, down to no early stop at all: `studies/load_moves_the_policy`.

## Verdict

60 to 80 % are the optimum where a correct answer is worth about one to five calls of the top tier, on sets with a
confidence and a first tier that is right on 63 to 79 %. With a first tier right on 90 % (TriviaQA, 4o-mini) it takes
more than thirty. With the length of the answer as the only signal (GSM8K) they are the optimum nowhere: the share jumps
from all to none. Below half a call (the seed's lambdas 0.5 to 5 at costs 1.6 / 4.2 / 8.8) the optimum is to stop always
or nearly so. It is an outcome to read off, not a setting.

## What it does not say

- Costs are API prices, or 0.125 per 1e9 parameters; with others the stretch lies elsewhere even in lambda'.
- GSM8K's "planned / followed" is at the last lambda' before the jump, where all stop.
- What would refute it: prompts on which rules planned elsewhere stop a share off by more than 5 points.
"""


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    found = [r["stretch"] for r in result["rows"] if r["stretch"]]
    ends = ", ".join(f"{low:.2g} to {high:.2g}" for low, high in found)
    return f"60 to 80 % are the optimum on {len(found)} of {len(result['rows'])} sets, at lambda' {ends}"


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.data, given.quick),
    readme,
    headline,
    draw=lambda given, result: plot(result, given.folder / "stops.png"),
    expected=EXPECTED,
    n=lambda result: sum(r["n"] for r in result["rows"]),
    data=Data("quality", tuple(name for name, _ in FILES)),
    quick="first set, few resamples",
    quick_judged=False,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

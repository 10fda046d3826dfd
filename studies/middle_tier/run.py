"""Claim: 13B drafting for 34B drafting for 70B hardly pays on H100s; 68M drafting for 7B drafting for 70B can.

A target, a middle tier and a small draft: is the chain of three faster than the better of the two pairs? Step times are
those of the latency model, acceptances are a map, since nobody has published the three of one trio. The third
acceptance (small draft at the target) is not free: 1 - alpha is a distance, so it lies between middle + small - 1 and,
in every measured trio, the lesser of the two. Where in between is taken from the 20 trios of a measured family.

    python studies/middle_tier/run.py [--quick] [--output DIR]

Exits with 1 when a verdict differs from the one in EXPECTED. Run it again when a profile changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from calibration.profiles import load_profile
from studies.study import Study
from theory.catalog import accelerator, model
from theory.chains import Plan, Trio, middle_tier
from theory.latency import Pass, Profile, step_time

HERE = Path(__file__).parent
Array = NDArray[np.float64]

TARGET = "llama-2-70b"
PAIRS = (  # middle tier, small draft
    ("codellama-34b", "llama-2-13b"),
    ("codellama-34b", "llama-2-7b"),
    ("codellama-34b", "llama-68m"),
    ("llama-2-13b", "llama-2-7b"),
    ("llama-2-13b", "llama-68m"),
    ("llama-2-7b", "llama-68m"),
)
GPU = "h100-sxm"
PROFILES = ("h100-sxm", "h100-sxm-vllm")
DEGREES = (1, 2, 4)  # tensor-parallel degrees a draft may run at; the target runs at the last [GPUs]
BATCHES = (1, 32)  # sequences [-]
CONTEXT = 1024.0  # cached tokens of each sequence [tokens]
LONGEST = 10  # longest draft or buffer [tokens]
ROUNDS = 6  # most rounds of the middle tier per target pass [-]
MIDDLE = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95)  # acceptance of the middle tier at the target [-]
SMALL = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # acceptance of the small draft at the middle tier [-]
WORTH = 0.05  # gain from which on a third model is worth its weights and trouble [-]; assumed

# Acceptance sum min(p, q) on held-out text, draft -> target; six Llama-type models of 12 thousand to 1.6 million
# parameters trained alike on source code (feasibility run of this project, standard error at most 0.009)
MEASURED = {
    "d16": {"d32": 0.650, "d48": 0.538, "d64": 0.480, "d96": 0.444, "d128": 0.426},
    "d32": {"d48": 0.644, "d64": 0.584, "d96": 0.547, "d128": 0.525},
    "d48": {"d64": 0.713, "d96": 0.683, "d128": 0.660},
    "d64": {"d96": 0.749, "d128": 0.734},
    "d96": {"d128": 0.775},
}
EXPECTED = {
    "every measured trio lies between the triangle's floor and the lesser acceptance": True,
    "13B for 34B for 70B: worth it on at most 5 % of the map, gain at most 10 %": True,
    "68M for 7B for 70B: worth it on a third of the map or more": True,
    "no chain is worth it on more of the map at batch 32 than at batch 1": True,
}


class Place(NamedTuple):
    """Where a direct acceptance lies between the triangle's floor (0) and the lesser of the two others (1)."""

    low: float
    median: float
    high: float


def trios() -> list[tuple[float, float, float]]:
    """Return (middle, small, direct) of all measured trios."""
    return [
        (MEASURED[middle][target], MEASURED[small][middle], MEASURED[small][target])
        for small in MEASURED
        for middle in MEASURED[small]
        for target in MEASURED.get(middle, {})
    ]


def floor(middle: float, small: float) -> float:
    """Return the least direct acceptance that the triangle inequality allows."""
    return max(0.0, middle + small - 1)


def place() -> Place:
    """Return where the direct acceptance of the measured trios lies."""
    found = [(d - floor(m, s)) / (min(m, s) - floor(m, s)) for m, s, d in trios()]
    return Place(min(found), float(np.median(found)), max(found))


def direct(middle: float, small: float, at: float) -> float:
    """Return the direct acceptance at a place between floor and lesser acceptance."""
    low = floor(middle, small)
    return low + at * (min(middle, small) - low)


def best_degree(name: str, profile: Profile, batch: int) -> int:
    """Return the tensor-parallel degree at which a draft decodes fastest [GPUs]; no draft needs all of them."""
    times = [
        float(step_time(model(name), accelerator(GPU), profile, Pass(batch, 1.0, CONTEXT), t).total) for t in DEGREES
    ]
    return DEGREES[int(np.argmin(times))]


def pass_time(name: str, profile: Profile, batch: int, degree: int) -> Callable[[float], float]:
    """Return the time of a pass as a function of the tokens of each sequence [s]."""
    widths = np.arange(1.0, ROUNDS * (LONGEST + 1) + 3)
    gpu = accelerator(GPU)
    times = step_time(model(name), gpu, profile, Pass(batch, widths, CONTEXT), degree).total
    return lambda width: float(np.interp(width, widths, times))


class Case(NamedTuple):
    """Times of one target, middle tier and small draft at one batch."""

    target: Callable[[float], float]
    middle: Callable[[float], float]
    small: float

    def gains(self, middles: tuple[float, ...], smalls: tuple[float, ...], at: float) -> Array:
        """Return the gain of the chain over the map, shape (middles, smalls) [-]."""
        return np.array([[self.solve(m, s, direct(m, s, at))[0] for s in smalls] for m in middles])

    def solve(self, middle: float, small: float, straight: float) -> tuple[float, Plan]:
        """Return the gain and the best chain for one set of acceptances."""
        found = middle_tier(Trio(middle, small, straight, self.target, self.middle, self.small), LONGEST, ROUNDS)
        return found.gain, found.best("vertical", "horizontal", "buffered")


def case(middle: str, small: str, profile: Profile, batch: int) -> Case:
    """Return the times of a trio; each draft on as many GPUs as make it fastest."""
    quick = pass_time(small, profile, batch, best_degree(small, profile, batch))
    return Case(
        pass_time(TARGET, profile, batch, DEGREES[-1]),
        pass_time(middle, profile, batch, best_degree(middle, profile, batch)),
        quick(1.0),
    )


def table(profile_name: str, middles: tuple[float, ...], smalls: tuple[float, ...]) -> list[dict[str, Any]]:
    """Return one row per pair and batch: times, gains over the map at three places of the direct acceptance."""
    profile, where, rows = load_profile(profile_name), place(), []
    for batch in BATCHES:
        for middle, small in PAIRS:
            trio = case(middle, small, profile, batch)
            gains = {name: trio.gains(middles, smalls, at) for name, at in where._asdict().items()}
            i, j = np.unravel_index(int(np.argmax(gains["median"])), gains["median"].shape)
            best = trio.solve(middles[i], smalls[j], direct(middles[i], smalls[j], where.median))[1]
            rows.append(
                {
                    "profile": profile_name,
                    "batch": batch,
                    "middle": middle,
                    "small": small,
                    "target_ms": 1e3 * trio.target(1.0),
                    "middle_cost": trio.middle(1.0) / trio.target(1.0),
                    "small_cost": trio.small / trio.target(1.0),
                    "gain": gains["median"].tolist(),
                    "best_gain": {name: float(g.max()) for name, g in gains.items()},
                    "share_worth_it": {name: float(np.mean(g > WORTH)) for name, g in gains.items()},
                    "best_at": [middles[i], smalls[j]],
                    "best_plan": {"kind": best.kind, "passes": list(best.passes), "speedup": best.speedup},
                }
            )
    return rows


def analyse(quick: bool) -> dict[str, Any]:
    """Return the result of the study."""
    middles, smalls = (MIDDLE[::2], SMALL[::2]) if quick else (MIDDLE, SMALL)
    rows = [row for name in PROFILES[: 1 if quick else None] for row in table(name, middles, smalls)]
    measured = trios()
    ratio = [d / (m * s) for m, s, d in measured]

    large = [r for r in rows if (r["middle"], r["small"]) == ("codellama-34b", "llama-2-13b")]
    tiny = [r for r in rows if (r["middle"], r["small"]) == ("llama-2-7b", "llama-68m")]
    shares = {(r["profile"], r["middle"], r["small"], r["batch"]): r["share_worth_it"]["median"] for r in rows}
    between = all(floor(m, s) <= d <= min(m, s) for m, s, d in measured)
    first, last = BATCHES
    return {
        "verdicts": {
            "every measured trio lies between the triangle's floor and the lesser acceptance": between,
            "13B for 34B for 70B: worth it on at most 5 % of the map, gain at most 10 %": all(
                r["share_worth_it"]["median"] <= 0.05 and r["best_gain"]["median"] <= 0.1 for r in large
            ),
            "68M for 7B for 70B: worth it on a third of the map or more": all(
                r["share_worth_it"]["median"] >= 1 / 3 for r in tiny
            ),
            "no chain is worth it on more of the map at batch 32 than at batch 1": all(
                share <= shares[(*key[:3], first)] for key, share in shares.items() if key[3] == last
            ),
        },
        "map": {"middle": list(middles), "small": list(smalls)},
        "measured_trios": len(measured),
        "place": place()._asdict(),
        "direct_over_product": [min(ratio), float(np.median(ratio)), max(ratio)],
        "rows": rows,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the map of gains of every pair at batch 1."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in result["rows"] if r["batch"] == BATCHES[0] and r["profile"] == PROFILES[0]]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
    for axis, row in zip(axes.flat, rows, strict=True):
        gain = 100 * np.array(row["gain"])
        image = axis.imshow(gain, origin="lower", cmap="RdBu", vmin=-40, vmax=40, aspect="auto")
        for i, j in np.ndindex(*gain.shape):
            axis.text(j, i, f"{gain[i, j]:+.0f}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(result["map"]["small"])), result["map"]["small"])
        axis.set_yticks(range(len(result["map"]["middle"])), result["map"]["middle"])
        axis.set_title(
            f"{row['small']} for {row['middle']}\nsteps {row['small_cost']:.3f}, {row['middle_cost']:.2f}", fontsize=9
        )
        axis.set(xlabel="acceptance small -> middle", ylabel="acceptance middle -> 70B")
    figure.colorbar(image, ax=axes, label="gain of three models over the better two [%]", shrink=0.7)
    figure.suptitle(f"Is a middle tier worth it? {TARGET}, batch {BATCHES[0]}, profile {PROFILES[0]}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def row_of_readme(row: dict[str, Any]) -> str:
    """Return one line of the table in README.md."""
    share, plan = row["share_worth_it"], row["best_plan"]
    cells = (
        row["profile"],
        row["batch"],
        f"{row['small']} for {row['middle']}",
        f"{row['small_cost']:.3f}",
        f"{row['middle_cost']:.2f}",
        f"{share['median']:.0%} ({share['high']:.0%} to {share['low']:.0%})",
        f"{row['best_gain']['median']:+.0%} at {row['best_at'][0]:g}, {row['best_at'][1]:g}",
        f"{plan['kind']} {tuple(plan['passes'])}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def readme(result: dict[str, Any]) -> str:
    """Return README.md with the numbers of the result."""
    rows = "\n".join(row_of_readme(r) for r in result["rows"])
    verdicts = "\n".join(f"- {name}: **{'yes' if v else 'no'}**" for name, v in result["verdicts"].items())
    low, median, high = result["direct_over_product"]
    return README.format(
        verdicts=verdicts,
        rows=rows,
        n=result["measured_trios"],
        place=result["place"],
        low=low,
        median=median,
        high=high,
        worth=WORTH,
        degree=DEGREES[-1],
        context=CONTEXT,
        longest=LONGEST,
        rounds=ROUNDS,
    )


README = """# When is a middle tier worth it?

**Claim.** 13B drafting for 34B drafting for 70B hardly pays on H100s: a step of the 34B costs about half a step of the
70B, and one of the 13B more than half of that. What makes a chain pay is a middle tier much cheaper than the target
that the target nearly always accepts, over a draft much cheaper still: 68M for 7B for 70B.

{verdicts}

Written by `python studies/middle_tier/run.py`, which fails when a verdict changes.

![gain over the map](middle_tier.png)

## What is compared

Three lossless arrangements of both drafts (vertical, horizontal, buffered; `theory/chains.py`), at their best lengths,
against the better of the two drafts alone, at its best length (drafts and buffers to {longest} tokens, {rounds} rounds
of the middle tier; a draft alone may go as far as the longest chain). llama-2-70b on {degree} H100s, each draft on as
many of them as make it fastest, {context:.0f} cached tokens, bf16. Step and verify times from the latency model:
kernels, no host time. Chains that serve need memory for three models; that is not charged here.

| profile | batch | chain | small step | middle step | map worth {worth:.0%} | best gain | how |
|---|---|---|---|---|---|---|---|
{rows}

Steps in units of a target step. "Map worth": share of the 36 acceptance pairs with a gain above {worth:.0%}, with the
direct acceptance at its measured place (in brackets: at the highest and the lowest place measured). "Best gain": at
acceptance of the middle tier at the target, of the small draft at the middle tier. "How": rounds or buffered tokens of
the middle tier, tokens of the small draft.

## The third acceptance

A chain competes with the small draft drafting for the target directly. 1 - alpha is the mean total variation distance,
so direct >= middle + small - 1. In all {n} trios of a measured family of six small models the direct acceptance lies
between that floor and the lesser of the two, {place[low]:.2f} to {place[high]:.2f} of the way up (median
{place[median]:.2f}), and is {low:.2f} to {high:.2f} times (median {median:.2f}) the product of the two: models err
alike. Taking the product for the direct acceptance would flatter chains.

## What it does not say

- The acceptances of real 70B trios are not known; the map shows which would do. Acceptance pairs are not equally
  likely: 13B at 34B of 0.4 is not, 68M at 7B of 0.9 is not.
- Independence of neighbouring acceptances is assumed. In a simulation with three real distributions the tokens of a
  round are within 5 % of the formula (`tests/test_chains.py`).
- The place of the direct acceptance comes from models a thousand times smaller.
- Host time and launches are not in these profiles. They weigh on the small draft and on many short passes: against
  chains.
- Where the best chain is at {rounds} rounds the true gain is a little larger.
- What would refute it: a measured 13B/34B/70B trio on one machine, with step times, in which the chain beats both
  pairs by more than a tenth.
"""


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    share = {
        chain: max(r["share_worth_it"]["median"] for r in result["rows"] if (r["small"], r["middle"]) == chain)
        for chain in (("llama-2-13b", "codellama-34b"), ("llama-68m", "llama-2-7b"))
    }
    large, small = share.values()
    return f"worth it on at most {large:.0%} of the map for 13B-34B-70B, {small:.0%} for 68M-7B-70B"


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.quick),
    readme,
    headline,
    draw=lambda given, result: plot(result, given.folder / "middle_tier.png"),
    expected=EXPECTED,
    n=lambda result: len(result["rows"]),
    quick="coarse map, one profile",
    recheck=True,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

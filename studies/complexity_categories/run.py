"""Claim: simple, medium and complex prompts want different policies at one lambda; knowing which is which pays.

Categories are thirds of the predicted P(first tier right) before any tier ran, from what the tables know by then: the
length of the prompt and the data set. Everything is fitted on other folds than the one it is judged on.

    python studies/complexity_categories/run.py --data DIR [--quick] [--output DIR]

Exits with 1 when a verdict differs from the one in EXPECTED.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from calibration.category_policy import compare
from calibration.quality_features import Known, pool, read_known
from calibration.quality_readers import Samples, read_quality
from studies.study import Data, Study

HERE = Path(__file__).parent
ZELLINGER, ZEROEVAL = "zellinger_cascades.csv.gz", "zeroeval_math_crux.csv.gz"
LARGE = 1000  # prompts
COLOURS = {"simple": "tab:green", "medium": "tab:orange", "complex": "tab:red"}
EXPECTED = {
    "the first tier is right less often from simple to complex on every set": True,
    "stop shares of simple and complex differ by 0.1 at some lambda on every set": True,
    "the category raises the area beyond chance on every set": False,
    "the category raises the area beyond chance where the data set is known": False,
    "the category raises the area beyond chance on at least one set": True,
    "the category decides the first tier at some lambda on at least one set": True,
    "posteriors with covariates as signals raise the area beyond chance on every set": False,
    "one lambda for all attains no less than equal budgets, mean over sets and lambdas": True,
}


def groups(data: Path) -> list[tuple[Samples, Known]]:
    """Return pools of the data sets of each chain, then each large set of its own."""
    found, alone = [], []
    for file in (ZEROEVAL, ZELLINGER):
        parts = [(s, read_known(data / file, s)) for s in read_quality(data / file)]
        found += [pool([p for p in parts if p[0].tiers == t]) for t in sorted({s.tiers for s, _ in parts})]
        alone += [p for p in parts if len(p[0].correct) >= LARGE]
    return found + alone


def analyse(data: Path, quick: bool) -> dict[str, Any]:
    """Return the result of the study."""
    parts = groups(data)
    found = [compare(samples, known) for samples, known in (parts[:1] if quick else parts)]
    return {"verdicts": verdicts(found), "by_group": found}


def verdicts(found: list[dict[str, Any]]) -> dict[str, bool]:
    """Return which targets are met."""
    told = [g for g in found if "+" in g["name"]]
    split = [s["quality"] - s["quality_if_split"] for g in found for s in g["split"]]
    return {
        "the first tier is right less often from simple to complex on every set": all(
            bool(np.all(np.diff([c["accuracy"][0] for c in g["categories"]]) < 0)) for g in found
        ),
        "stop shares of simple and complex differ by 0.1 at some lambda on every set": all(
            max(apart(g, "stop")) >= 0.1 for g in found
        ),
        "the category raises the area beyond chance on every set": all(surely(g, "category") for g in found),
        "the category raises the area beyond chance where the data set is known": all(
            surely(g, "category") for g in told
        ),
        "the category raises the area beyond chance on at least one set": any(surely(g, "category") for g in found),
        "the category decides the first tier at some lambda on at least one set": any(
            max(apart(g, "first")) >= 0.5 for g in found
        ),
        "posteriors with covariates as signals raise the area beyond chance on every set": all(
            surely(g, "posterior") for g in found
        ),
        "one lambda for all attains no less than equal budgets, mean over sets and lambdas": float(np.mean(split)) >= 0,
    }


def surely(group: dict[str, Any], step: str) -> bool:
    """Return whether the 95 % interval of a gain lies above 0."""
    return bool(group["gain"][step]["interval"][0] > 0)


def apart(group: dict[str, Any], shares: str) -> list[float]:
    """Return at each lambda the largest difference of a share between the simplest and the most complex category."""
    first, last = group["categories"][0]["plans"], group["categories"][-1]["plans"]
    return [float(np.abs(np.subtract(a[shares], b[shares])).max()) for a, b in zip(first, last, strict=True)]


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw for each set frontiers and stop shares of the categories, and what knowing them is worth."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = result["by_group"][:3]
    figure, axes = plt.subplots(2, len(shown) + 1, figsize=(4 * len(shown) + 4, 7), squeeze=False, layout="constrained")
    for k, g in enumerate(shown):
        top = g["categories"][0]["price"][-1]
        for c in g["categories"]:
            curve, colour = c["frontier"], COLOURS[c["category"]]
            order = np.argsort(curve["cost"], kind="stable")
            cost, quality = (np.array(curve[n])[order] for n in ("cost", "quality"))
            axes[0, k].plot(cost / top, quality, "-", color=colour, lw=1.4, label=f"{c['category']} ({c['share']:.0%})")
            for plan, marker in zip(c["plans"], "o^s", strict=True):
                axes[0, k].plot(plan["cost"] / top, plan["quality"], marker, color=colour, ms=6, mec="black", mew=0.5)
        axes[0, k].set_title(g["name"].replace(" + ", "\n+ "), fontsize=8)
        axes[0, k].set(xlabel="cost [calls of the top tier, simple]", ylabel="quality [-]")
        axes[0, k].legend(fontsize=8, loc="lower right")
        stacks(axes[1, k], g)
    gains(axes[0, -1], result["by_group"])
    axes[1, -1].axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def stacks(axis: Any, group: dict[str, Any]) -> None:
    """Draw the share of each tier among the answers, by lambda and category."""
    count = len(group["categories"])
    ticks, names = [], []
    for i, plan in enumerate(group["categories"][0]["plans"]):
        for j, c in enumerate(group["categories"]):
            at, base = i * (count + 1) + j, 0.0
            for tier, share in enumerate(c["plans"][i]["stop"]):
                label = group["tiers"][tier] if i == j == 0 else None
                axis.bar(at, share, 0.85, bottom=base, color=str(0.85 - 0.35 * tier), label=label)
                base += share
            ticks.append(at)
            names.append(c["category"])
        middle = i * (count + 1) + (count - 1) / 2
        axis.text(middle, 1.02, rf"$\lambda$ = {plan['lambda_top']:.0f}", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(ticks, names, fontsize=7, rotation=90)
    axis.set(ylabel="share of answers [-]", ylim=(0, 1.5))
    axis.legend(fontsize=7, loc="upper center")


def gains(axis: Any, found: list[dict[str, Any]]) -> None:
    """Draw what the posteriors and the categories add to the area, with intervals."""
    for k, (step, colour) in enumerate((("posterior", "tab:blue"), ("category", "tab:purple"))):
        value = np.array([g["gain"][step]["value"] for g in found])
        ends = np.array([g["gain"][step]["interval"] for g in found]).T
        at = np.arange(len(found)) + 0.2 * (2 * k - 1)
        axis.errorbar(value, at, xerr=np.abs(ends - value), fmt="o", color=colour, label=f"+ {step}")
    axis.axvline(0, color="0.6", lw=1)
    axis.set_yticks(range(len(found)), [g["name"].replace(" + ", "\n+ ") for g in found], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="gain of normalised area [-]")
    axis.legend(fontsize=8)


def readme(result: dict[str, Any]) -> str:
    """Return README.md with the numbers of the result."""
    areas, plans, split = [], [], []
    for g in result["by_group"]:
        a, gain = g["area"], g["gain"]
        cells = [
            f"{gain[s]['value']:+.3f} [{gain[s]['interval'][0]:+.3f}, {gain[s]['interval'][1]:+.3f}]"
            for s in ("posterior", "category")
        ]
        areas.append(
            f"| {g['name']} | {g['n']} | {a['singles']:.3f} | {a['own_signal']:.3f} | {a['posterior']:.3f} | "
            f"{a['category']:.3f} | {' | '.join(cells)} |"
        )
        for c in g["categories"]:
            cells = [f"{_shares(p['stop'])}; {_shares(p['first'])}" for p in c["plans"]]
            plans.append(
                f"| {g['name']} | {c['category']} | {c['share']:.2f} | {_shares(c['accuracy'])} | {' | '.join(cells)} |"
            )
        split += [
            f"| {g['name']} | {s['lambda_top']:.1f} | {s['quality']:.4f} | {s['quality_if_split']:.4f} | "
            f"{s['cost_if_split'] / s['cost'] - 1:+.1%} |"
            for s in g["split"]
        ]
    heads = [f"lambda {p['lambda_top']:.1f}" for p in result["by_group"][0]["categories"][0]["plans"]]
    return README.format(
        verdicts="\n".join(f"- {name}: **{'yes' if v else 'no'}**" for name, v in result["verdicts"].items()),
        areas="\n".join(areas),
        heads=" | ".join(heads),
        plans="\n".join(plans),
        split="\n".join(split),
    )


def _shares(values: list[float]) -> str:
    return " / ".join(f"{v:.2f}" for v in values)


README = """# Simple, medium, complex: one lambda, several policies

**Claim.** Prompts of different predicted difficulty want different policies at the same lambda, and knowing the
category before any tier runs is worth something.

{verdicts}

Written by `python studies/complexity_categories/run.py --data DIR`, which fails when a verdict changes. DIR holds
`zeroeval_math_crux.csv.gz` and `zellinger_cascades.csv.gz`.

![frontiers, stop shares, gains](categories.png)

Marks on the frontiers: lambda of about 3 (circle), 10 (triangle) and 30 (square) calls of the top tier per correct
answer.

## Area under the frontier, out of fold

*Own signal*: the scores of the tiers, nothing else. *Posterior*: the predictor's P(right) as the signal, with lengths,
prompt length and data set in it. *Category*: these signals and a frontier for each category, one lambda for all.
Gains with 95 % intervals (resampled prompts, policies fixed).

| set | n | singles | own signal | posterior | category | posterior - own signal | category - posterior |
|---|---|---|---|---|---|---|---|
{areas}

Where the categories are tasks that differ in what the larger tiers bring (CRUXEval against MATH, whose answers carry no
confidence), knowing them is worth more than the signals. Where answers show a confidence, the category adds 0.03 at
most, and with prompt length as all that is known beforehand it gains on one set beyond chance and loses as much on
another. Posteriors that see lengths and covariates are no better signals than the scores alone.

## Stop shares and first tier at one lambda

Share of the answers by tier; then share of the requests by the tier run first.

| set | category | share | accuracy of the tiers | {heads} |
|---|---|---|---|---|---|---|
{plans}

Where the first tier differs between categories, this is routing before the answer.

## One lambda against equal budgets

In theory no split of a budget beats one lambda for all (`theory/request_classes.py`, tested against enumeration). Here,
out of fold: quality at one lambda, and if each category gets the same mean cost instead. The last column says by how
much the split overspends where a category's cheapest policy costs more than its budget.

| set | lambda | one lambda | equal budgets | cost of the split |
|---|---|---|---|---|
{split}

## How

`calibration/category_policy.py`. The predictor is a logistic regression for each state; categories are thirds of
P(first tier right) before any tier ran; levels are tenths of P(tier right) after that tier alone; rows of the joint
table are the training prompts with P(right) after all tiers as quality. Costs are those of the calls themselves.

## What it does not say

- The tables hold no prompts: prompt length and data set are all that is known before the first tier. A featuriser of
  the text may know more. MATH has level 5 only, so no level is given by a data set.
- A pool of data sets is not a traffic: shares are those of the tables.
- The curves of the categories are chosen by lambda on other folds; they are not hulls in hindsight.
- One seed of the folds.
- What would refute it: a set on which the stop shares of the categories agree at every lambda.
"""


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    gains = [g["gain"]["category"] for g in result["by_group"]]
    beyond = sum(g["interval"][0] > 0 for g in gains)
    return (
        f"a gain of area beyond chance on {beyond} of {len(gains)} sets, {max(g['value'] for g in gains):+.3f} at most"
    )


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.data, given.quick),
    readme,
    headline,
    draw=lambda given, result: plot(result, given.folder / "categories.png"),
    expected=EXPECTED,
    n=lambda result: sum(g["n"] for g in result["by_group"]),
    data=Data("quality", (ZELLINGER, ZEROEVAL)),
    quick="one set",
    quick_judged=False,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

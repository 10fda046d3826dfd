"""Claim: on GSM8K with 13B / 34B / 70B, length as the only signal saves little; a verifier would save most of the cost.

Per-problem outcomes of a 13B, a 34B and a 70B at costs 0.125 per 1e9 parameters. The policy sees only how long an
answer was; it is planned out of fold, on a regression and on a latent difficulty (item response). For the shift,
7B / 13B / 70B of one family are planned on GSM8K and judged on the same problems with altered numbers, each fold on
templates it has not seen.

    python studies/gsm8k_tiers/run.py --data DIR [--quick] [--output DIR]

Exits with 1 when a verdict differs from the one in EXPECTED.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from calibration.cascade_validation import RECIPES, Candidates, Fitted, cost_share, singles, validate_group
from calibration.joint_models import item_response
from calibration.outcome_models import fit_score_model, fold_of, level_cuts, smoothed_outcomes, to_levels
from calibration.quality_readers import TYPICAL_LENGTH, Samples, read_quality
from studies.study import Data, Study, Validation
from theory.cascade import evaluate, frontier, oracle, solve
from theory.outcomes import Outcomes, from_samples, with_verifier

HERE = Path(__file__).parent
ONE_FAMILY = ("abel-7b", "abel-13b", "abel-70b")
LEVELS, WIDTH, FOLDS = 10, 0.7, 5
RESAMPLES = 200
SHARES = (0.25, 0.5, 0.75)  # of the quality gap, at which plans are judged under the shift [-]
EXPECTED = {
    "length alone gains less than 0.05 of area over single models": True,
    "an oracle matches 70B at less than a quarter of its cost": False,  # 24.2 %, but its interval ends above 25 %
    "a perfect verifier matches 70B at less than half of its cost": True,
    "a latent difficulty seen by length saves less than 5 % at the quality of 70B": True,
    "costs that ignore the lengths of hard problems promise at least 2 % too little to a verifier": True,
    "under the shift predicted quality is off by at most 2 points": True,
    "under the shift predicted cost is off by at most 3 %": True,
}


def cheapest(table: Outcomes, price: np.ndarray, wanted: float) -> dict[str, Any]:
    """Return the cheapest mixture of policies that is right as often as wanted."""
    curve = frontier(table, price)
    if curve.quality[0] >= wanted:
        value = evaluate(curve.vertices[0].policy, table, price)
    else:
        mixture = curve.at_quality(wanted)
        low, high = (evaluate(v.policy, table, price) for v in (mixture.low, mixture.high))
        value = low.mixed(high, mixture.gamma)
    return {"cost": value.cost, "visits": value.visits.tolist(), "stops": value.answers.tolist()}


def oracle_cost(table: Outcomes, price: np.ndarray, wanted: float) -> tuple[float, list[float]]:
    """Return the cost at which the hull of all-knowing routers is right as often as wanted, and where it stops.

    Where no tier is right it takes the cheapest; the rest of the share wanted is left with it too, dearest gains first.
    """
    points = [oracle(table, price, lam) for lam in (0.0, *np.geomspace(1, 1000, 60))]
    stops = []
    for lam in (0.0, *np.geomspace(1, 1000, 60)):
        chosen = (lam * table.correct - price).argmax(axis=1)
        stops.append([float((chosen == k).mean()) for k in range(len(price))])
    at, quality = np.array(stops), [p.quality for p in points]
    return float(np.interp(wanted, quality, [p.cost for p in points])), [
        float(np.interp(wanted, quality, at[:, k])) for k in range(len(price))
    ]


def bounds(samples: Samples, at: np.ndarray) -> dict[str, Any]:
    """Return what an oracle and a perfect verifier need to be right as often as the top tier on the problems ``at``."""
    table, price = from_samples(samples.tiers, samples.correct[at]), samples.price
    wanted = float(samples.correct[at, -1].mean())
    verified = with_verifier(table, 1.0, 0.0)
    best = cheapest(verified, price, wanted)
    cost, stops = oracle_cost(table, price, wanted)
    every = evaluate(solve(verified, price, 1e3), verified, price)
    return {
        "top_quality": wanted,
        "oracle_cost_share": cost / price[-1],
        "oracle_stops": stops,
        "verifier_cost_share": best["cost"] / price[-1],
        "verifier_visits": best["visits"],
        "verifier_stops": best["stops"],
        "verifier_best": {"cost": every.cost, "quality": every.quality, "visits": every.visits.tolist()},
    }


def with_intervals(samples: Samples, rng: np.random.Generator) -> dict[str, Any]:
    """Return the bounds with 95 % intervals over resampled problems."""
    n = len(samples.correct)
    found = bounds(samples, np.arange(n))
    again = [bounds(samples, rng.integers(0, n, n)) for _ in range(RESAMPLES)]
    for key in ("oracle_cost_share", "verifier_cost_share"):
        found[f"{key}_interval"] = np.quantile([b[key] for b in again], (0.025, 0.975)).tolist()
    for key in ("oracle_stops", "verifier_stops"):
        found[f"{key}_interval"] = np.quantile([b[key] for b in again], (0.025, 0.975), axis=0).T.tolist()
    return found


def latent(samples: Samples, rng: np.random.Generator) -> dict[str, Any]:
    """Return what policies planned on a latent difficulty seen by length cost at the quality of the top tier.

    Out of fold; the hull of the policies realised, single tiers among them. Intervals over resampled problems.
    """
    n, every = len(samples.correct), tuple(range(len(samples.tiers)))
    fold = fold_of(n, FOLDS, rng)
    cost, right, stops = (np.zeros((80, n)), np.zeros((80, n)), np.zeros((len(SHARES), len(every))))
    planned = np.zeros((len(SHARES), 2, n))
    for f in range(FOLDS):
        train, test = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        fitted = Fitted(samples, train, RECIPES[0])
        levels = fitted.table.levels
        fitted.table = item_response(samples.correct[train], fitted.level[train], levels).outcomes(samples.tiers)
        found = fitted.along(every, test)
        cost[:, test], right[:, test] = found.cost, found.quality
        curve, new = (
            fitted.frontier(every),
            from_samples(samples.tiers, samples.correct[test], fitted.level[test], levels),
        )
        accuracy = samples.correct[train].mean(axis=0)
        for i, share in enumerate(SHARES):
            low, top = curve.vertices[0].quality, curve.vertices[-1].quality
            mix = curve.at_quality(float(np.clip(accuracy[0] + share * (accuracy[-1] - accuracy[0]), low, top)))
            both = [evaluate(v.policy, new, samples.price) for v in (mix.low, mix.high)]
            stops[i] += both[0].mixed(both[1], mix.gamma).answers * len(test) / n
            runs = [fitted.run(v.policy, every, test) for v in (mix.low, mix.high)]
            planned[i, 0, test] = (1 - mix.gamma) * runs[0][0] + mix.gamma * runs[1][0]
            planned[i, 1, test] = (1 - mix.gamma) * runs[0][1] + mix.gamma * runs[1][1]
    policies = Candidates(cost, right).join(singles(samples))
    again = []
    for _ in range(RESAMPLES):
        at = rng.integers(0, n, n)
        part = replace(samples, correct=samples.correct[at], score=samples.score[at], cost=samples.cost[at])
        again.append(cost_share(Candidates(policies.cost[:, at], policies.quality[:, at]), part, 1.0))
    known = [a for a in again if a is not None]
    mean = planned.mean(axis=2)
    error = 1.96 * planned.std(axis=2) / np.sqrt(n)
    return {
        "cost_share": cost_share(policies, samples, 1.0),
        "cost_share_interval": np.quantile(known, (0.025, 0.975)).tolist(),
        "plans": [
            {
                "share_of_gap": s,
                "cost": float(m[0]),
                "quality": float(m[1]),
                "cost_error": float(e[0]),
                "quality_error": float(e[1]),
                "stops": t.tolist(),
            }
            for s, m, e, t in zip(SHARES, mean, error, stops, strict=True)
        ],
    }


def long_failures(samples: Samples) -> dict[str, Any]:
    """Return the cost of the perfect verifier's cascade where a call costs what its words cost, and at mean prices.

    Words are read off the scores (1 / (1 + words / 100)).
    """
    words = TYPICAL_LENGTH * (1.0 / samples.score - 1.0)
    paid = samples.price * words / words.mean(axis=0)
    verified = with_verifier(from_samples(samples.tiers, samples.correct), 1.0, 0.0)
    policy = solve(verified, paid, 1e3)
    flat, real = (evaluate(policy, verified, c).cost for c in (samples.price, paid))
    wrong = [
        float(words[samples.correct[:, k] == 0, k].mean() / words[samples.correct[:, k] == 1, k].mean())
        for k in range(len(samples.tiers))
    ]
    return {"ignored": flat, "by_words": real, "wrong_to_right": wrong}


def shifted(home: Samples, away: Samples, rng: np.random.Generator, model: str) -> list[dict[str, Any]]:
    """Return plans made on ``home``, predicted there and realised on ``away``, in folds of templates."""
    number = [np.array([int(i.rsplit("-", 1)[1]) for i in s.ids]) for s in (home, away)]
    fold = fold_of(int(number[0].max()) + 1, FOLDS, rng)
    K, price = len(home.tiers), home.price
    total = np.zeros((len(SHARES), 5))
    for f in range(FOLDS):
        train, new, same = fold[number[0]] != f, fold[number[1]] == f, fold[number[0]] == f
        cuts = [level_cuts(home.score[train, k], LEVELS, home.correct[train, k]) for k in range(K)]
        level = [np.stack([to_levels(s.score[:, k], cuts[k]) for k in range(K)], axis=1) for s in (home, away)]
        quality = fit_score_model(home.score[train], home.correct[train], 1)(home.score[train])
        table = (
            item_response(home.correct[train], level[0][train], LEVELS).outcomes(home.tiers)
            if model == "item response"
            else smoothed_outcomes(home.tiers, quality, level[0][train], LEVELS, WIDTH)
        )
        curve = frontier(table, price, tolerance=1e-5)
        tests = [
            from_samples(home.tiers, s.correct[m], lv[m], LEVELS)
            for s, m, lv in ((home, same, level[0]), (away, new, level[1]))
        ]
        accuracy = home.correct[train].mean(axis=0)
        for i, share in enumerate(SHARES):
            low, top = curve.vertices[0].quality, curve.vertices[-1].quality
            mix = curve.at_quality(float(np.clip(accuracy[0] + share * (accuracy[-1] - accuracy[0]), low, top)))
            row = [mix.cost, mix.quality]
            for test in tests:
                value = evaluate(mix.low.policy, test, price).mixed(evaluate(mix.high.policy, test, price), mix.gamma)
                row += [value.cost, value.quality]
            total[i] += np.array([row[0], row[1], row[3], row[4], row[5]]) * new.mean()
    keys = ("predicted_cost", "predicted_quality", "home_quality", "away_cost", "away_quality")
    return [
        {"model": model, "share_of_gap": s} | dict(zip(keys, map(float, t), strict=True))
        for s, t in zip(SHARES, total, strict=True)
    ]


def analyse(data: Path) -> dict[str, Any]:
    """Return the result of the study."""
    rng = np.random.default_rng(0)
    (tiers,) = read_quality(data / "gsm8k_tiers.csv.gz")
    (home,) = read_quality(data / "gsm8k_tiers.csv.gz", ONE_FAMILY)
    (away,) = read_quality(data / "gsm8k_robust_abel.csv.gz", ONE_FAMILY)
    length, limit, seen = validate_group(tiers, rng, repeats=1), with_intervals(tiers, rng), latent(tiers, rng)
    shift = [r for model in ("score regression", "item response") for r in shifted(home, away, rng, model)]
    area, failures = length["area"], long_failures(tiers)
    return {
        "verdicts": {
            "length alone gains less than 0.05 of area over single models": area["policy"] - area["singles"] < 0.05,
            "an oracle matches 70B at less than a quarter of its cost": limit["oracle_cost_share_interval"][1] < 0.25,
            "a perfect verifier matches 70B at less than half of its cost": limit["verifier_cost_share_interval"][1]
            < 0.5,
            "a latent difficulty seen by length saves less than 5 % at the quality of 70B": seen["cost_share"] > 0.95,
            "costs that ignore the lengths of hard problems promise at least 2 % too little to a verifier": (
                failures["ignored"] <= 0.98 * failures["by_words"]
            ),
            "under the shift predicted quality is off by at most 2 points": all(
                abs(r["predicted_quality"] - r["away_quality"]) <= 0.02 for r in shift
            ),
            "under the shift predicted cost is off by at most 3 %": all(
                abs(r["predicted_cost"] / r["away_cost"] - 1) <= 0.03 for r in shift
            ),
        },
        "length": length,
        "bounds": limit,
        "latent": seen,
        "failures": failures,
        "shift": shift,
        "accuracy": {"home": home.correct.mean(axis=0).tolist(), "away": away.correct.mean(axis=0).tolist()},
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the cost of matching the top tier, and the areas."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    limit = result["bounds"]
    shares = {
        "oracle": (limit["oracle_cost_share"], limit["oracle_cost_share_interval"]),
        "perfect\nverifier": (limit["verifier_cost_share"], limit["verifier_cost_share_interval"]),
        "latent difficulty\nseen by length": (result["latent"]["cost_share"], result["latent"]["cost_share_interval"]),
    }
    for k, (value, ends) in enumerate(shares.values()):
        left.bar(k, value, 0.5, color="0.6")
        left.errorbar(k, value, np.abs(np.array(ends) - value)[:, None], fmt="none", ecolor="black")
    left.axhline(1, color="tab:red", lw=1)
    left.set_xticks(range(3), list(shares), fontsize=8)
    left.set(ylabel="cost to be right as often as 70B [calls of 70B]")
    for k, (name, value) in enumerate(result["length"]["area"].items()):
        ends = np.array(result["length"]["area_interval"][name])
        right.bar(k, value, 0.6, color="tab:blue" if name == "policy" else "0.6")
        right.errorbar(k, value, np.abs(ends - value)[:, None], fmt="none", ecolor="black")
    right.set_xticks(range(4), list(result["length"]["area"]))
    right.set(ylabel="normalised area [-]", title="signal: length of the answer")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def readme(result: dict[str, Any]) -> str:
    """Return README.md with the numbers of the result."""
    g, b = result["length"], result["bounds"]
    full = g["cost_share"]["100%"]["policy"]
    return README.format(
        verdicts="\n".join(f"- {name}: **{'yes' if v else 'no'}**" for name, v in result["verdicts"].items()),
        areas="\n".join(
            f"| {n} | {v:.3f} | {g['area_interval'][n][0]:.2f} to {g['area_interval'][n][1]:.2f} |"
            for n, v in g["area"].items()
        ),
        full="never" if full is None else f"{full:.0%}",
        ece=g["ece"],
        b=b,
        oracle_low=b["oracle_cost_share_interval"][0],
        oracle_high=b["oracle_cost_share_interval"][1],
        low=b["verifier_cost_share_interval"][0],
        high=b["verifier_cost_share_interval"][1],
        visits=", ".join(f"{v:.2f}" for v in b["verifier_best"]["visits"]),
        stops="\n".join(
            f"| {label} | "
            + " | ".join(f"{v:.0%} [{i[0]:.0%}, {i[1]:.0%}]" for v, i in zip(b[key], b[f"{key}_interval"], strict=True))
            + " |"
            for label, key in (("oracle", "oracle_stops"), ("perfect verifier", "verifier_stops"))
        ),
        plans="\n".join(
            f"| {p['share_of_gap']:.0%} | {p['cost']:.2f} ± {p['cost_error']:.2f} | "
            f"{p['quality']:.3f} ± {p['quality_error']:.3f} | " + " | ".join(f"{v:.0%}" for v in p["stops"]) + " |"
            for p in result["latent"]["plans"]
        ),
        seen=result["latent"]["cost_share"],
        seen_low=result["latent"]["cost_share_interval"][0],
        seen_high=result["latent"]["cost_share_interval"][1],
        ratio=", ".join(f"{100 * (r - 1):.0f} %" for r in result["failures"]["wrong_to_right"]),
        f=result["failures"],
        more=result["failures"]["by_words"] / result["failures"]["ignored"] - 1,
        shift="\n".join(
            f"| {r['model']} | {r['share_of_gap']:.0%} | {r['predicted_cost']:.2f} | {r['away_cost']:.2f} | "
            f"{r['predicted_quality']:.3f} | {r['home_quality']:.3f} | {r['away_quality']:.3f} |"
            for r in result["shift"]
        ),
        home=", ".join(f"{a:.3f}" for a in result["accuracy"]["home"]),
        away=", ".join(f"{a:.3f}" for a in result["accuracy"]["away"]),
    )


README = """# GSM8K with 13B, 34B and 70B: what length tells, what a verifier would

**Claim.** With the length of the answer as the only signal a cascade of Abel-13B, ToRA-Code-34B and ToRA-70B gains
little over single models; a verifier would save most of the cost of the 70B.

{verdicts}

Written by `python studies/gsm8k_tiers/run.py --data DIR`, which fails when a verdict changes. DIR holds
`gsm8k_tiers.csv.gz` and `gsm8k_robust_abel.csv.gz`. Costs: 0.125 per 1e9 parameters.

![costs and areas](tiers.png)

| | area | 95 % interval |
|---|---|---|
{areas}

Length alone, out of fold: cost of the quality of the 70B in calls of the 70B: {full}; calibration error {ece:.3f}.

At the quality of the 70B ({b[top_quality]:.3f}) an oracle needs {b[oracle_cost_share]:.0%} of its cost
[{oracle_low:.1%}, {oracle_high:.1%}], a perfect verifier {b[verifier_cost_share]:.0%} [{low:.0%}, {high:.0%}]. Run to
the end, the verifier's cascade is right on {b[verifier_best][quality]:.3f} at {b[verifier_best][cost]:.2f} per request
(visits {visits}): problems no tier solves pay for all three.

Planned on a latent difficulty that is seen by length only, out of fold, the quality of the 70B costs {seen:.0%}
[{seen_low:.0%}, {seen_high:.0%}] of it: the 70B itself. Whose answer is returned at the quality of the 70B:

| | 13B | 34B | 70B |
|---|---|---|---|
{stops}

and by the latent-difficulty policy at shares of the quality gap (realised out of fold, 95 %):

| share of the gap | cost | quality | 13B | 34B | 70B |
|---|---|---|---|---|---|
{plans}

Wrong answers are {ratio} longer than right ones (13B, 34B, 70B). If a call costs what its words cost, the perfect
verifier's cascade costs {f[by_words]:.2f}, {more:.1%} more than with the mean price of each tier ({f[ignored]:.2f}):
what is escalated is hard, and its answers are long at every tier.

## The same problems with altered numbers

Abel 7B / 13B / 70B, planned on GSM8K, judged on altered numbers of templates not planned on.
Accuracies {home} there, {away} here.

| model | share of the gap | cost predicted | realised | quality predicted | GSM8K, other fold | altered numbers |
|---|---|---|---|---|---|---|
{shift}

## What it does not say

- The three tiers are of two families; the two ToRA models run code. Lengths are words, verdicts are free.
- The shift is mild: new numbers, the same problems.
- What would refute it: a signal-free plan as good as the length plan, or a shift that breaks the predictions.
"""


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    gain = result["length"]["area"]["policy"] - result["length"]["area"]["singles"]
    share = result["bounds"]["verifier_cost_share"]
    return f"length gains {gain:+.3f} of area; a perfect verifier is as good as 70B at {share:.0%} of its cost"


def validations(result: dict[str, Any]) -> list[Validation]:
    """Return cost and quality promised on GSM8K, against the same problems with other numbers."""
    errors = {
        "cost": ([r["predicted_cost"] / r["away_cost"] - 1 for r in result["shift"]], "relative"),
        "quality": ([r["predicted_quality"] - r["away_quality"] for r in result["shift"]], "absolute"),
    }
    return [
        Validation.errors(
            found,
            "cascades",
            f"{what} of a plan after a shift of the prompts, length as the signal",
            "real answers to altered problems",
            "outcomes of the original problems, other templates",
            unit=unit,
        )
        for what, (found, unit) in errors.items()
    ]


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.data),
    readme,
    headline,
    draw=lambda given, result: plot(result, given.folder / "tiers.png"),
    expected=EXPECTED,
    n=lambda result: result["length"]["n"],
    validations=validations,
    data=Data("quality", ("gsm8k_tiers.csv.gz", "gsm8k_robust_abel.csv.gz")),
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

"""Claim: on GSM8K with 13B / 34B / 70B, length as the only signal saves little; a verifier would save most of the cost.

Per-problem outcomes of a 13B, a 34B and a 70B at costs 0.125 per 1e9 parameters. The policy sees only how long an
answer was; it is planned out of fold. For the shift, 7B / 13B / 70B of one family are planned on GSM8K and judged on
the same problems with altered numbers, each fold on templates it has not seen.

    python studies/gsm8k_tiers/run.py --data DIR [--quick] [--output DIR]

Exits with 1 when a verdict differs from the one in EXPECTED.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from calibration.cascade_validation import validate_group
from calibration.outcome_models import fit_score_model, fold_of, level_cuts, smoothed_outcomes, to_levels
from calibration.quality_readers import Samples, read_quality
from theory.cascade import evaluate, frontier, oracle, solve
from theory.outcomes import Outcomes, from_samples, with_verifier

HERE = Path(__file__).parent
ONE_FAMILY = ("abel-7b", "abel-13b", "abel-70b")
LEVELS, WIDTH, FOLDS = 10, 0.7, 5
RESAMPLES = 300
SHARES = (0.25, 0.5, 0.75)  # of the quality gap, at which plans are judged under the shift [-]
EXPECTED = {
    "length alone gains less than 0.05 of area over single models": True,
    "an oracle matches 70B at less than a quarter of its cost": True,
    "a perfect verifier matches 70B at less than half of its cost": True,
    "under the shift predicted quality is off by at most 2 points": True,
    "under the shift predicted cost is off by at most 3 %": True,
}


def cheapest(table: Outcomes, price: np.ndarray, wanted: float) -> dict[str, Any]:
    """Return the cheapest mixture of policies that is right as often as wanted."""
    curve = frontier(table, price)
    cost, quality = (np.array([getattr(v, k) for v in curve.vertices]) for k in ("cost", "quality"))
    if quality[0] >= wanted:
        return {"cost": float(cost[0]), "visits": evaluate(curve.vertices[0].policy, table, price).visits.tolist()}
    mixture = curve.at_quality(wanted)
    low, high = (evaluate(v.policy, table, price) for v in (mixture.low, mixture.high))
    return {"cost": mixture.cost, "visits": low.mixed(high, mixture.gamma).visits.tolist()}


def oracle_cost(table: Outcomes, price: np.ndarray, wanted: float) -> float:
    """Return the cost at which the hull of all-knowing routers is right as often as wanted."""
    points = [oracle(table, price, lam) for lam in (0.0, *np.geomspace(1, 1000, 60))]
    return float(np.interp(wanted, [p.quality for p in points], [p.cost for p in points]))


def bounds(samples: Samples, at: np.ndarray) -> dict[str, Any]:
    """Return what an oracle and a perfect verifier need to be right as often as the top tier on the problems ``at``."""
    table, price = from_samples(samples.tiers, samples.correct[at]), samples.price
    wanted = float(samples.correct[at, -1].mean())
    verified = with_verifier(table, 1.0, 0.0)
    best = cheapest(verified, price, wanted)
    every = evaluate(solve(verified, price, 1e3), verified, price)
    return {
        "top_quality": wanted,
        "oracle_cost_share": oracle_cost(table, price, wanted) / price[-1],
        "verifier_cost_share": best["cost"] / price[-1],
        "verifier_visits": best["visits"],
        "verifier_best": {"cost": every.cost, "quality": every.quality, "visits": every.visits.tolist()},
    }


def with_intervals(samples: Samples, rng: np.random.Generator) -> dict[str, Any]:
    """Return the bounds with 95 % intervals over resampled problems."""
    n = len(samples.correct)
    found = bounds(samples, np.arange(n))
    again = [bounds(samples, rng.integers(0, n, n)) for _ in range(RESAMPLES)]
    for key in ("oracle_cost_share", "verifier_cost_share"):
        found[f"{key}_interval"] = np.quantile([b[key] for b in again], (0.025, 0.975)).tolist()
    return found


def shifted(home: Samples, away: Samples, rng: np.random.Generator) -> list[dict[str, float]]:
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
        curve = frontier(smoothed_outcomes(home.tiers, quality, level[0][train], LEVELS, WIDTH), price, tolerance=1e-5)
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
        {"share_of_gap": s} | dict(zip(keys, map(float, t), strict=True)) for s, t in zip(SHARES, total, strict=True)
    ]


def analyse(data: Path) -> dict[str, Any]:
    """Return the result of the study."""
    rng = np.random.default_rng(0)
    (tiers,) = read_quality(data / "gsm8k_tiers.csv.gz")
    (home,) = read_quality(data / "gsm8k_tiers.csv.gz", ONE_FAMILY)
    (away,) = read_quality(data / "gsm8k_robust_abel.csv.gz", ONE_FAMILY)
    length, limit, shift = validate_group(tiers, rng), with_intervals(tiers, rng), shifted(home, away, rng)
    area = length["area"]
    return {
        "verdicts": {
            "length alone gains less than 0.05 of area over single models": area["policy"] - area["singles"] < 0.05,
            "an oracle matches 70B at less than a quarter of its cost": limit["oracle_cost_share_interval"][1] < 0.25,
            "a perfect verifier matches 70B at less than half of its cost": limit["verifier_cost_share_interval"][1]
            < 0.5,
            "under the shift predicted quality is off by at most 2 points": all(
                abs(r["predicted_quality"] - r["away_quality"]) <= 0.02 for r in shift
            ),
            "under the shift predicted cost is off by at most 3 %": all(
                abs(r["predicted_cost"] / r["away_cost"] - 1) <= 0.03 for r in shift
            ),
        },
        "length": length,
        "bounds": limit,
        "shift": shift,
        "accuracy": {"home": home.correct.mean(axis=0).tolist(), "away": away.correct.mean(axis=0).tolist()},
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the cost of matching the top tier, and the areas."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    limit = result["bounds"]
    for k, name in enumerate(("oracle", "verifier")):
        value, ends = limit[f"{name}_cost_share"], np.array(limit[f"{name}_cost_share_interval"])
        left.bar(k, value, 0.5, color="0.6")
        left.errorbar(k, value, np.abs(ends - value)[:, None], fmt="none", ecolor="black")
    left.axhline(1, color="tab:red", lw=1)
    left.set_xticks((0, 1), ("oracle", "perfect verifier"))
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
        shift="\n".join(
            f"| {r['share_of_gap']:.0%} | {r['predicted_cost']:.2f} | {r['away_cost']:.2f} | "
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
[{oracle_low:.0%}, {oracle_high:.0%}], a perfect verifier {b[verifier_cost_share]:.0%} [{low:.0%}, {high:.0%}]. Run to
the end, the verifier's cascade is right on {b[verifier_best][quality]:.3f} at {b[verifier_best][cost]:.2f} per request
(visits {visits}): problems no tier solves pay for all three.

## The same problems with altered numbers

Abel 7B / 13B / 70B, planned on GSM8K, judged on altered numbers of templates not planned on.
Accuracies {home} there, {away} here.

| share of the gap | cost predicted | realised | quality predicted | GSM8K, other fold | altered numbers |
|---|---|---|---|---|---|
{shift}

## What it does not say

- The three tiers are of two families; the two ToRA models run code. Lengths are words, verdicts are free.
- The shift is mild: new numbers, the same problems.
- What would refute it: a signal-free plan as good as the length plan, or a shift that breaks the predictions.
"""


def main() -> int:
    """Run the study; 0 if the verdicts are the expected ones, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the tables")
    parser.add_argument("--quick", action="store_true", help="writes only with --output")
    parser.add_argument("--output", type=Path, help="where to write (default: the folder of the study)")
    arguments = parser.parse_args()
    result = analyse(arguments.data)
    shown = {"areas": result["length"]["area"], "bounds": result["bounds"], "shift": result["shift"]}
    print(json.dumps({"verdicts": result["verdicts"], **shown}, indent=2))
    folder = arguments.output or (None if arguments.quick else HERE)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(readme(result), encoding="utf-8")
        plot(result, folder / "tiers.png")
    return 0 if result["verdicts"] == EXPECTED else 1


if __name__ == "__main__":
    sys.exit(main())

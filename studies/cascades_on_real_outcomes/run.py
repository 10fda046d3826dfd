"""Claim: on real outcomes a cascade planned out of fold beats single models by 0.05 of area and keeps its promises.

Each prompt is judged by policies fitted without it (five folds, three divisions). Targets: area of the policy at least
that of single models + 0.05 and at least that of pairwise thresholds picked in hindsight; predicted cost within 3 % and
quality within 1 point of the realised, their 95 % intervals covering 90 to 99 % of the test folds; calibration error at
most 0.02; worth at least as much as thresholds tuned by Optuna at as many evaluations.

    python studies/cascades_on_real_outcomes/run.py --data DIR [--quick] [--output DIR]

Exits with 1 when a verdict differs from the one in EXPECTED.
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from scipy.special import ndtr

from calibration.cascade_validation import FOLDS, Fitted, choose_recipe, validate_group
from calibration.outcome_models import fold_of
from calibration.quality_readers import Samples, read_quality
from studies.study import Data, Study, Validation

HERE = Path(__file__).parent
FILE = "zellinger_cascades.csv.gz"
LARGE = 1000  # prompts from which a group counts for the verdicts
TARGETS = {"mmlu/llama": 0.855, "mmlu/qwen_oai": 1.046, "triviaqa/llama": 0.905, "triviaqa/qwen_oai": 0.895}
EXPECTED = {
    "area at least single models + 0.05 on every set": True,
    "area at least the stated pairwise envelope on every set": False,
    "area above the stated pairwise envelope on at least two sets": True,
    "policy at least the pairwise thresholds, both chosen in training, on every set": True,
    "programme alone at least the pairwise thresholds, both chosen in training, on every set": False,
    "quality predicted within 1 point on every set": True,
    "cost predicted within 3 % on every set": True,
    "intervals of the predictions cover 90 to 99 % of the test folds": True,
    "calibration error at most 0.02 on every set": True,
    "programme worth at least thresholds tuned by TPE at 100 evaluations, mean of the sets": True,
}
PRICES = (0.3, 1.0, 3.0, 10.0)  # lambda of the comparison with Optuna [calls of the top tier per correct answer]
TRIALS = (25, 100)  # policies evaluated on the training prompts, for each price [-]


def analyse(data: Path, quick: bool) -> dict[str, Any]:
    """Return the result of the study."""
    groups = [g for g in read_quality(data / FILE) if len(g.correct) >= LARGE]
    groups = groups[:1] if quick else groups
    found = {g.name: validate_group(g, np.random.default_rng(0)) for g in groups}
    tuned = {g.name: against_optuna(g, np.random.default_rng(1)) for g in groups}
    covered = {k: float(np.mean([g["coverage"][k] for g in found.values()])) for k in ("cost", "quality")}
    return {
        "verdicts": verdicts(found, tuned, covered),
        "by_group": found,
        "optuna": tuned,
        "covered": covered,
        "tests": sum(g["coverage"]["n"] for g in found.values()),
    }


def verdicts(found: dict[str, dict[str, Any]], tuned: dict[str, Any], covered: dict[str, float]) -> dict[str, bool]:
    """Return which targets are met."""
    area = {name: g["area"] for name, g in found.items()}
    chosen = [g["area_chosen_in_training"] for g in found.values()]
    worth = {k: np.mean([t["realised"][k] for t in tuned.values()]) for k in ("programme", "tpe 100")}
    return {
        "area at least single models + 0.05 on every set": all(
            a["policy"] >= a["singles"] + 0.05 for a in area.values()
        ),
        "area at least the stated pairwise envelope on every set": all(
            a["policy"] >= TARGETS[name] for name, a in area.items()
        ),
        "area above the stated pairwise envelope on at least two sets": (
            sum(a["policy"] > TARGETS[name] for name, a in area.items()) >= 2
        ),
        "policy at least the pairwise thresholds, both chosen in training, on every set": all(
            c["policy"] >= c["pairwise"] for c in chosen
        ),
        "programme alone at least the pairwise thresholds, both chosen in training, on every set": all(
            c["dynamic_programme"] >= c["pairwise"] for c in chosen
        ),
        "quality predicted within 1 point on every set": all(
            abs(p["predicted_quality"] - p["realised_quality"]) <= 0.01 for g in found.values() for p in g["plans"]
        ),
        "cost predicted within 3 % on every set": all(
            abs(cost_error(p)) <= 0.03 for g in found.values() for p in g["plans"]
        ),
        "intervals of the predictions cover 90 to 99 % of the test folds": all(
            0.90 <= c <= 0.99 for c in covered.values()
        ),
        "calibration error at most 0.02 on every set": all(g["ece"] <= 0.02 for g in found.values()),
        "programme worth at least thresholds tuned by TPE at 100 evaluations, mean of the sets": bool(
            worth["programme"] >= worth["tpe 100"]
        ),
    }


# ---------------------------------------------------------------- thresholds tuned by Optuna


def against_optuna(samples: Samples, rng: np.random.Generator) -> dict[str, Any]:
    """Return what policies are worth on test folds more than the best single tier, mean of the prices and folds.

    In calls of the top tier. The programme's whole frontier is solved once for all prices; Optuna searches chain and
    thresholds for each price by their value on the training prompts. ``promised``: the same on the training prompts.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    fold = fold_of(len(samples.correct), FOLDS, rng)
    chains = [*combinations(range(len(samples.tiers)), 2), tuple(range(len(samples.tiers)))]
    names = ["programme", *(f"{kind} {n}" for kind in ("tpe", "random") for n in TRIALS)]
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    policies = []
    for f in range(FOLDS):
        train, test = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        fitted = Fitted(samples, train, choose_recipe(samples, train, rng))
        curve = fitted.frontier(tuple(range(len(samples.tiers))))
        policies.append(len(curve.vertices))
        for price in PRICES:
            lam = price * samples.price[-1]
            vertex = curve.at_lambda(lam)
            kept = [fitted.run(vertex.policy, tuple(range(len(samples.tiers))), at) for at in (train, test)]
            rows["programme"].append(
                tuple(worth(samples, at, *k, lam) for at, k in zip((train, test), kept, strict=True))
            )
            for kind in ("tpe", "random"):
                seed = int(rng.integers(2**31))
                sampler = (
                    optuna.samplers.TPESampler(seed=seed) if kind == "tpe" else optuna.samplers.RandomSampler(seed=seed)
                )
                study = optuna.create_study(direction="maximize", sampler=sampler)

                def value(trial: optuna.Trial, train: np.ndarray = train, lam: float = lam) -> float:
                    chain = chains[trial.suggest_categorical("chain", range(len(chains)))]
                    shares = [trial.suggest_float(f"share_{k}", 0.0, 1.0) for k in range(len(samples.tiers) - 1)]
                    return worth(samples, train, *thresholds(samples, train, train, chain, shares), lam)

                study.optimize(value, n_trials=max(TRIALS))
                for n in TRIALS:
                    best = max(study.trials[:n], key=lambda t: t.value)
                    chain = chains[best.params["chain"]]
                    shares = [best.params[f"share_{k}"] for k in range(len(samples.tiers) - 1)]
                    new = worth(samples, test, *thresholds(samples, train, test, chain, shares), lam)
                    rows[f"{kind} {n}"].append((best.value, new))
    mean = {name: np.mean(r, axis=0) / samples.price[-1] for name, r in rows.items()}
    by_fold = {
        name: np.array(r)[:, 1].reshape(FOLDS, len(PRICES)).mean(axis=1) / samples.price[-1] for name, r in rows.items()
    }
    return {
        "ahead_by_fold": {
            name: (by_fold["programme"] - v).tolist() for name, v in by_fold.items() if name != "programme"
        },
        "promised": {name: float(m[0]) for name, m in mean.items()},
        "realised": {name: float(m[1]) for name, m in mean.items()},
        "policies_on_the_frontier": float(np.mean(policies)),
        "evaluations": {name: int(name.split()[1]) * len(PRICES) for name in names[1:]},
    }


def thresholds(
    samples: Samples, train: np.ndarray, at: np.ndarray, chain: tuple[int, ...], shares: list[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return cost and outcome of a chain that goes on below the quantile ``shares`` of each tier's training scores."""
    cost, right = np.full(len(at), samples.price[chain[0]]), samples.correct[at, chain[0]].copy()
    going = np.ones(len(at), dtype=bool)
    for here, there, share in zip(chain, chain[1:], shares, strict=False):
        going &= samples.score[at, here] < np.quantile(samples.score[train, here], share)
        cost += going * samples.price[there]
        right = np.where(going, samples.correct[at, there], right)
    return cost, right


def worth(samples: Samples, at: np.ndarray, cost: np.ndarray, right: np.ndarray, lam: float) -> float:
    """Return lambda q - c above that of the best single tier on the same prompts [cost unit]."""
    single = (lam * samples.correct[at].mean(axis=0) - samples.price).max()
    return float(lam * right.mean() - cost.mean() - single)


def cost_error(row: dict[str, Any]) -> float:
    """Return predicted / realised - 1 of the cost [-]."""
    return float(row["predicted_cost"] / row["realised_cost"] - 1)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw areas with their intervals, and predicted against realised."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(3, 2))
    groups = result["by_group"]
    for k, (name, colour) in enumerate(
        (("singles", "0.6"), ("pairwise", "tab:orange"), ("policy", "tab:blue"), ("oracle", "0.3"))
    ):
        value = np.array([g["area"][name] for g in groups.values()])
        bounds = np.array([g["area_interval"][name] for g in groups.values()]).T
        at = np.arange(len(groups)) + 0.2 * (k - 1.5)
        left.bar(at, value, 0.18, color=colour, label=name)
        left.errorbar(at, value, np.abs(bounds - value), fmt="none", ecolor="black", lw=0.8)
    left.set_xticks(range(len(groups)), list(groups))
    left.set(ylabel="normalised area under the frontier [-]")
    left.set_ylim(top=1.15 * left.get_ylim()[1])
    left.legend(fontsize=8, loc="upper left", ncols=4)
    for name, g in groups.items():
        cost = [100 * cost_error(p) for p in g["plans"]]
        quality = [100 * (p["predicted_quality"] - p["realised_quality"]) for p in g["plans"]]
        right.plot(cost, quality, "o", label=name)
    right.add_patch(Rectangle((-3, -1), 6, 2, fill=False, ls="--", label="target"))
    right.set(xlabel="cost: predicted / realised - 1 [%]", ylabel="quality: predicted - realised [points]")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def readme(result: dict[str, Any]) -> str:
    """Return README.md with the numbers of the result."""
    areas, errors = [], []
    for name, g in result["by_group"].items():
        a, i, c = g["area"], g["area_interval"], g["area_chosen_in_training"]
        areas.append(
            f"| {name} | {g['n']} | "
            f"{a['policy']:.3f} [{i['policy'][0]:.2f}, {i['policy'][1]:.2f}] | {g['area_spread']['policy']:.3f} | "
            f"{TARGETS[name]:.3f} | {a['pairwise']:.3f} | {a['singles']:.3f} | {a['oracle']:.3f} | "
            f"{c['policy']:.3f} | {c['dynamic_programme']:.3f} | {c['pairwise']:.3f} |"
        )
        errors += [
            f"| {name} | {p['share_of_gap']:.0%} | {100 * cost_error(p):+.1f} | {100 * p['cost_noise']:.1f} | "
            f"{100 * (p['predicted_quality'] - p['realised_quality']):+.2f} |"
            for p in g["plans"]
        ]
    kinds = list(next(iter(result["optuna"].values()))["realised"])
    tuned = [
        f"| {name} | " + " | ".join(f"{t['realised'][k]:.3f} ({t['promised'][k]:.3f})" for k in kinds) + " |"
        for name, t in result["optuna"].items()
    ]
    ahead = {k: np.array([t["ahead_by_fold"][k] for t in result["optuna"].values()]) for k in kinds[1:]}
    noise = [p["cost_noise"] for g in result["by_group"].values() for p in g["plans"]]
    return README.format(
        verdicts="\n".join(f"- {name}: **{'yes' if v else 'no'}**" for name, v in result["verdicts"].items()),
        areas="\n".join(areas),
        errors="\n".join(errors),
        calibration="\n".join(f"| {n} | {g['ece_raw']:.3f} | {g['ece']:.3f} |" for n, g in result["by_group"].items()),
        cost=result["covered"]["cost"],
        quality=result["covered"]["quality"],
        tests=result["tests"],
        quiet=min(noise),
        loud=max(noise),
        chance=float(2 * ndtr(0.03 / max(noise)) - 1),
        kinds=" | ".join(kinds),
        bar="|".join("---" for _ in kinds),
        tuned="\n".join(tuned),
        ahead="; ".join(f"{k}: {v.mean():+.4f} ± {v.std(ddof=1) / np.sqrt(v.size):.4f}" for k, v in ahead.items()),
        vertices=np.mean([t["policies_on_the_frontier"] for t in result["optuna"].values()]),
        trials=max(TRIALS),
        prices=len(PRICES),
    )


README = """# Cascades on real outcomes, out of fold

**Claim.** On real answers with real confidences, a cascade planned on other prompts is worth at least 0.05 of area more
than single models, at least as much as pairwise thresholds, and costs and attains what was predicted.

{verdicts}

Written by `python studies/cascades_on_real_outcomes/run.py --data DIR`, which fails when a verdict changes. DIR holds
`zellinger_cascades.csv.gz` (Zellinger & Thomson, arXiv:2501.09345).

![areas and errors](areas.png)

## Area under the frontier

Cost and quality are 0 at the smallest and 1 at the top tier; random mixing of these two has area 0.5. Means over three
divisions into five folds; "spread" is the standard deviation over the divisions, "stated" the target.

| set | n | policy [95 %] | spread | stated | pairwise | singles | oracle | policy* | programme* | pairwise* |
|---|---|---|---|---|---|---|---|---|---|---|
{areas}

- **policy**: the hull over the dynamic programmes of all subsets of tiers and the pair and threshold chosen in
  training, each at 80 budgets. Which subset is used where is read off the pooled test prompts; no threshold is.
- **pairwise** (and the stated targets, computed the same way): the hull over all pairs and thresholds, both picked on
  the test prompts: more hindsight than the policy has.
- **\\***: nothing is left open but the budget. One programme on all tiers; one pair and threshold; the hull of the two.

The intervals (resampled prompts, policies fixed) are wider than the differences between policy and pairwise: on these
tables the two cannot be told apart set by set. Both leave most of the way to the oracle: the signal is the bottleneck.

## Thresholds tuned by Optuna

What policies are worth on the test folds more than the best single tier, lambda q - c in calls of the top tier, mean of
{prices} prices; in brackets what they were worth on the training prompts. Optuna (chain and quantiles of the scores)
evaluates 25 or {trials} policies for each price; the programme solves its frontier once for all of them.

| set | {kinds} |
|---|{bar}|
{tuned}

The programme is ahead by (mean of sets and folds ± standard error, in calls of the top tier):
{ahead}.
A lead below twice its error is none: with enough evaluations per price a search comes level, and promises more on the
training prompts than it keeps. The programme's frontier has {vertices:.0f} policies for all prices together; Optuna
evaluated 100 and 400.

## Predicted against realised

The plan that reaches a share of the quality gap between smallest and top tier. "Noise": the standard deviation of the
cost that the plan would show on as many new prompts if its law were known exactly.

| set | share of the gap | cost error [%] | noise [%] | quality error [points] |
|---|---|---|---|---|
{errors}

The 95 % intervals of the predictions (sampling of training and test prompts) hold {cost:.0%} of the costs and
{quality:.0%} of the qualities realised on {tests} test folds and plans. The errors above are smaller than the noise
because training and test folds are the same prompts; on new prompts the noise is {quiet:.1%} to {loud:.1%}, and at the
larger figure even a perfect model is within 3 % only {chance:.0%} of the time.

An earlier form promised 2 to 7 % too little on TriviaQA: smearing the levels moved prompts from the large level of
certain answers. The smearing now keeps every level's share.

## Calibration

Expected calibration error of P(right | own confidence), all tiers pooled, 10 bins:

| set | raw | calibrated, out of fold |
|---|---|---|
{calibration}

## How

Confidences are calibrated (beta), each tier's outcome is regressed on all tiers' log odds, and the table of training
prompts keeps the regressed qualities and levels smeared over their neighbours (`calibration/outcome_models.py`). Terms,
ridge and width are chosen by likelihood in folds inside the training folds.

Tried and not kept, as means over six divisions on these sets: splines of each score in the regression (0.002 to 0.02
lower), 40 levels (the same), a share of each prompt's own outcome in its quality (up to 0.03 lower on MMLU, 0.005
higher on TriviaQA), the prompt's length as a covariate (0.003 to 0.01 lower on MMLU), choosing the recipe by area.

## What it does not say

- That the smearing, the levels and the subsets would be the same had these four sets not been seen: the folds protect
  what is fitted, not the choice of the method. A table not looked at would be the fair test.
- Costs are mean prices per call: a call's length is not in them.
- One grading, one run of each model; no shift of the prompts.
- What would refute it: another table on which the policy falls below single models + 0.05.
"""


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    gains = [g["area"]["policy"] - g["area"]["singles"] for g in result["by_group"].values()]
    costs = [abs(cost_error(p)) for g in result["by_group"].values() for p in g["plans"]]
    return f"{min(gains):+.3f} to {max(gains):+.3f} of area over single models; costs within {max(costs):.1%}"


def validations(result: dict[str, Any]) -> list[Validation]:
    """Return cost and quality promised by the plans, against prompts they were not fitted on."""
    plans = [p for g in result["by_group"].values() for p in g["plans"]]
    errors = {
        "cost": ([cost_error(p) for p in plans], "relative"),
        "quality": ([p["predicted_quality"] - p["realised_quality"] for p in plans], "absolute"),
    }
    return [
        Validation.errors(
            found,
            "cascades",
            f"{what} of a plan, {len(result['by_group'])} sets",
            "real answers to other prompts",
            "outcomes and confidences of the prompts of other folds",
            coverage=result["covered"][what],
            level=0.95,
            unit=unit,
        )
        for what, (found, unit) in errors.items()
    ]


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.data, given.quick),
    readme,
    headline,
    draw=lambda given, result: plot(result, given.folder / "areas.png"),
    expected=EXPECTED,
    n=lambda result: sum(g["n"] for g in result["by_group"].values()),
    validations=validations,
    data=Data("quality", (FILE,)),
    quick="one set",
    quick_judged=False,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

"""Claim: tiers are not independent, and models that share a difficulty say so on prompts they have not seen.

Joint laws of (right, confidence level) over three tiers are fitted on four fifths of the prompts and judged on the
rest: log likelihood, the share of prompts that any tier solves (union), and P(top right | smallest wrong) (rescue).
Independence is the negative control: it must lose everywhere and promise too much.

    python studies/joint_outcome_models/run.py --data DIR [--quick] [--output DIR]

Exits with 1 when a verdict differs from the one in EXPECTED.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from calibration.joint_models import choose_classes, confidence_chain, item_response, latent_classes, log_likelihood
from calibration.outcome_models import fit_score_model, fold_of, level_cuts, smoothed_outcomes, to_levels
from calibration.quality_readers import Samples, read_quality
from studies.study import Data, Study, Validation
from theory.outcomes import Outcomes, rescue

HERE = Path(__file__).parent
FILES = ("zellinger_cascades.csv.gz", "gsm8k_tiers.csv.gz")
LARGE = 1000  # prompts from which a group counts
FOLDS, LEVELS, WIDTH = 5, 8, 0.7
CANDIDATES = (2, 4, 8)  # numbers of latent classes, chosen in folds inside the training prompts
CONTROL = "independent"
EXPECTED = {
    "every joint model has a better likelihood than independence on every set": True,
    "independence promises a union at least 2 points too large on every set": True,
    "item response predicts the union within 1.5 points where the signal is a confidence": True,
    "item response predicts the rescue within 3 points where the signal is a confidence": True,
    "item response predicts the union within 1.5 points where the signal is a length": False,
    "latent classes predict the union within 2 points where the signal is a confidence": True,
    "chains of confidences promise a union at least 1 point too large on every set": True,
}


def models(samples: Samples, level: np.ndarray, rng: np.random.Generator) -> dict[str, Callable[..., Outcomes]]:
    """Return how each model makes a table of the training prompts."""
    names = samples.tiers

    def classes(at: np.ndarray, number: int | None = None) -> Outcomes:
        c, lv = samples.correct[at], level[at]
        number = number or choose_classes(c, lv, LEVELS, rng, CANDIDATES)[0]
        return latent_classes(c, lv, LEVELS, number, rng).outcomes(names)

    def regression(at: np.ndarray) -> Outcomes:
        quality = fit_score_model(samples.score[at], samples.correct[at], 2)(samples.score[at])
        return smoothed_outcomes(names, quality, level[at], LEVELS, WIDTH)

    return {
        CONTROL: lambda at: classes(at, 1),
        "chain, gaussian": lambda at: confidence_chain(samples.correct[at], level[at], LEVELS, "gaussian").outcomes(
            names
        ),
        "chain, gumbel": lambda at: confidence_chain(samples.correct[at], level[at], LEVELS, "gumbel").outcomes(names),
        "latent classes": classes,
        "item response": lambda at: item_response(samples.correct[at], level[at], LEVELS).outcomes(names),
        "score regression": regression,
    }


def union(table: Outcomes) -> float:
    """Return P(any tier right); outcomes are independent given the row [-]."""
    return float(1 - table.weight @ (1 - table.correct).prod(axis=1))


def judge(samples: Samples, rng: np.random.Generator) -> dict[str, Any]:
    """Return the comparison on one set, out of fold."""
    n, K = samples.correct.shape
    fold = fold_of(n, FOLDS, rng)
    held: dict[str, list[float]] = {}
    promised: dict[str, list[tuple[float, float]]] = {}
    for f in range(FOLDS):
        train, test = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        cuts = [level_cuts(samples.score[train, k], LEVELS) for k in range(K)]
        level = np.stack([to_levels(samples.score[:, k], cuts[k]) for k in range(K)], axis=1)
        for name, make in models(samples, level, rng).items():
            table = make(train)
            held.setdefault(name, []).append(log_likelihood(table, samples.correct[test], level[test]))
            promised.setdefault(name, []).append((union(table), float(rescue(table)[0, -1])))
    wrong = samples.correct[:, 0] == 0
    gain = {name: np.array(v) - np.array(held[CONTROL]) for name, v in held.items()}
    return {
        "n": n,
        "signal": samples.signal,
        "union": float(samples.correct.max(axis=1).mean()),
        "rescue": float(samples.correct[wrong, -1].mean()),
        "models": {
            name: {
                "log_likelihood": float(np.mean(v)),
                "gain": float(gain[name].mean()),
                "gain_error": float(gain[name].std(ddof=1) / np.sqrt(FOLDS)),
                "union": float(np.mean([p[0] for p in promised[name]])),
                "rescue": float(np.mean([p[1] for p in promised[name]])),
            }
            for name, v in held.items()
        },
    }


def verdicts(found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Return which claims hold."""
    others = [m for g in found.values() for name, m in g["models"].items() if name != CONTROL]
    chains = [g["models"][f"chain, {f}"]["union"] - g["union"] for g in found.values() for f in ("gaussian", "gumbel")]
    return {
        "every joint model has a better likelihood than independence on every set": all(
            m["gain"] > 2 * m["gain_error"] for m in others
        ),
        "independence promises a union at least 2 points too large on every set": all(
            g["models"][CONTROL]["union"] >= g["union"] + 0.02 for g in found.values()
        ),
        "item response predicts the union within 1.5 points where the signal is a confidence": (
            off(found, "item response", "union", "confidence") <= 0.015
        ),
        "item response predicts the rescue within 3 points where the signal is a confidence": (
            off(found, "item response", "rescue", "confidence") <= 0.03
        ),
        "item response predicts the union within 1.5 points where the signal is a length": (
            off(found, "item response", "union", "length") <= 0.015
        ),
        "latent classes predict the union within 2 points where the signal is a confidence": (
            off(found, "latent classes", "union", "confidence") <= 0.02
        ),
        "chains of confidences promise a union at least 1 point too large on every set": min(chains) >= 0.01,
    }


def off(found: dict[str, dict[str, Any]], model: str, what: str, signal: str) -> float:
    """Return the largest error of a promise over the sets with a kind of signal [-]; 0 if there is none."""
    return max((abs(g["models"][model][what] - g[what]) for g in found.values() if g["signal"] == signal), default=0.0)


def analyse(data: Path, quick: bool) -> dict[str, Any]:
    """Return the result of the study."""
    groups = [g for file in FILES for g in read_quality(data / file) if len(g.correct) >= LARGE]
    found = {g.name: judge(g, np.random.default_rng(0)) for g in (groups[:1] if quick else groups)}
    return {"verdicts": verdicts(found), "by_group": found}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the gain in likelihood, and promised against real unions."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(3, 2))
    groups = result["by_group"]
    names = list(next(iter(groups.values()))["models"])
    colours = dict(zip(names, ("0.3", "tab:brown", "tab:orange", "tab:green", "tab:blue", "tab:purple"), strict=True))
    for k, name in enumerate(n for n in names if n != CONTROL):
        m = [g["models"][name] for g in groups.values()]
        at = np.arange(len(groups)) + 0.16 * (k - 2)
        left.bar(at, [v["gain"] for v in m], 0.15, color=colours[name], label=name)
        left.errorbar(at, [v["gain"] for v in m], [2 * v["gain_error"] for v in m], fmt="none", ecolor="black", lw=0.8)
    left.set_xticks(range(len(groups)), list(groups), fontsize=8)
    left.set(ylabel="log likelihood above independence [nat/prompt]", title="prompts not seen in the fit")
    left.legend(fontsize=8)
    for name in names:
        x = [100 * g["union"] for g in groups.values()]
        right.plot(x, [100 * g["models"][name]["union"] for g in groups.values()], "o", color=colours[name], label=name)
    ends = np.array([min(x) - 1, 100])
    right.plot(ends, ends, color="0.7", lw=1, zorder=0)
    right.set(xlabel="solved by any tier [%]", ylabel="promised [%]")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def readme(result: dict[str, Any]) -> str:
    """Return README.md with the numbers of the result."""
    rows = []
    for name, g in result["by_group"].items():
        rows.append(f"| **{name}** ({g['n']}, {g['signal']}) | | | {g['union']:.3f} | {g['rescue']:.3f} |")
        rows += [
            f"| {kind} | {m['log_likelihood']:.3f} | {m['gain']:+.3f} ± {m['gain_error']:.3f} | {m['union']:.3f} | "
            f"{m['rescue']:.3f} |"
            for kind, m in g["models"].items()
        ]
    return README.format(
        verdicts="\n".join(f"- {name}: **{'yes' if v else 'no'}**" for name, v in result["verdicts"].items()),
        rows="\n".join(rows),
        levels=LEVELS,
    )


README = """# Joint models of who is right and what is seen of it

**Claim.** Tiers are not independent; models in which prompts differ in difficulty predict, on prompts they have not
seen, how often any tier is right and how often the top tier rescues the smallest.

{verdicts}

Written by `python studies/joint_outcome_models/run.py --data DIR`, which fails when a verdict changes. DIR holds
`zellinger_cascades.csv.gz` and `gsm8k_tiers.csv.gz`.

![likelihood and union](models.png)

Log likelihood of (right, level) of three tiers, {levels} levels, five folds; its gain over independence ± standard
error over the folds; P(any tier right) and P(top right | smallest wrong) promised. First row of a set: realised.

| model | log likelihood [nat/prompt] | above independence | union | rescue |
|---|---|---|---|---|
{rows}

- *independent*: one class, the negative control.
- *chain*: confidences in a Markov chain joined by copulas, each outcome following its own confidence (Zellinger &
  Thomson, arXiv:2501.09345). The dependence of confidences is seen, that of outcomes given the confidences is not: it
  promises rescues that do not happen.
- *latent classes*: a mixture, the number of classes chosen inside the training prompts.
- *item response*: one ability per prompt, two parameters per tier, graded signals. Where the signal is a length, long
  answers go together whether they are right or not: the one ability explains the lengths and leaves the outcomes nearly
  independent. Classes, which need not be in order, keep more of them; there a second ability is wanted.
- *score regression*: the table of training prompts that the cascade policies use; its quality is conditional on all
  scores, and outcomes are independent given them.

## What it does not say

- Which model makes the best policy: a policy needs the gain of the next tier, not the whole law
  (`studies/cascades_on_real_outcomes`).
- Levels are cut in the training folds, their number is fixed; finer ones would favour models with fewer parameters.
- What would refute it: a set on which independence is as likely as the rest.
"""


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    confident = [g for g in result["by_group"].values() if g["signal"] == "confidence"]
    alone, joint = (
        [100 * (g["models"][name]["union"] - g["union"]) for g in confident]
        for name in ("independent", "item response")
    )
    return f"independence promises {min(alone):.1f} to {max(alone):.1f} points too much, item response {max(joint):.1f}"


def validations(result: dict[str, Any]) -> list[Validation]:
    """Return how far promised unions are from those of prompts not seen, by model."""
    sets = list(result["by_group"].values())
    return [
        Validation.errors(
            [g["models"][name]["union"] - g["union"] for g in sets],
            "quality",
            f"share of prompts that any tier solves: {name}",
            "real answers to other prompts",
            "outcomes and signals of the prompts of other folds",
            unit="absolute",
        )
        for name in sets[0]["models"]
    ]


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.data, given.quick),
    readme,
    headline,
    draw=lambda given, result: plot(result, given.folder / "models.png"),
    expected=EXPECTED,
    n=lambda result: sum(g["n"] for g in result["by_group"].values()),
    validations=validations,
    data=Data("quality", FILES),
    quick="one set",
    quick_judged=False,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

"""Claim: theorem 3.8 gives Leviathan's printed predictions within rounding, and misses the measured rows by 15 %.

Table 4 of the appendix gives, for twelve pairs of T5 models, acceptance alpha, draft length gamma, cost ratio c, the
speed-up their theory expects (Exp) and the one they measured (Emp). We recompute the first and compare with both. Then
Chen et al.: from two published step times and three measured speed-ups follow tokens per round, acceptance, and the
draft length that should have been best.

    python studies/leviathan_rows/run.py [--data DIR] [--quick] [--output DIR]

With --data (a folder that holds published_speculation.csv) the typed rows are checked against that collection.
Exits with 1 when a verdict differs from the one in EXPECTED.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np

from studies.study import Data, Study, Validation
from theory.acceptance import from_tokens_per_round
from theory.speculation import best_length, speedup, tokens_per_round

HERE = Path(__file__).parent
ROUNDING = 0.05  # Exp is printed with one digit [-]
TOLERANCE = 0.15  # median miss of the measured rows that the claim allows [-]
ALPHA_ROUNDING = 0.005  # alpha and c are printed with two digits [-]


class Row(NamedTuple):
    """One row of Leviathan et al. (2023), arXiv:2211.17192, appendix A.3, table 4 (transcription read second-hand)."""

    task: str
    draft: str
    temperature: int
    gamma: int  # [tokens]
    alpha: float  # [-]
    cost: float  # c, from the authors' profiler traces [-]
    expected: float  # Exp [-]
    measured: float  # Emp [-]


ROWS = (
    Row("EnDe", "T5-small", 0, 7, 0.75, 0.02, 3.2, 3.4),
    Row("EnDe", "T5-base", 0, 7, 0.80, 0.04, 3.3, 2.8),
    Row("EnDe", "T5-large", 0, 7, 0.82, 0.11, 2.5, 1.7),
    Row("EnDe", "T5-small", 1, 7, 0.62, 0.02, 2.3, 2.6),
    Row("EnDe", "T5-base", 1, 5, 0.68, 0.04, 2.4, 2.4),
    Row("EnDe", "T5-large", 1, 3, 0.71, 0.11, 2.0, 1.4),
    Row("CNNDM", "T5-small", 0, 5, 0.65, 0.02, 2.4, 3.1),
    Row("CNNDM", "T5-base", 0, 5, 0.73, 0.04, 2.6, 3.0),
    Row("CNNDM", "T5-large", 0, 3, 0.74, 0.11, 2.0, 2.2),
    Row("CNNDM", "T5-small", 1, 5, 0.53, 0.02, 1.9, 2.3),
    Row("CNNDM", "T5-base", 1, 3, 0.55, 0.04, 1.8, 2.2),
    Row("CNNDM", "T5-large", 1, 3, 0.56, 0.11, 1.6, 1.7),
)

# Chen et al. (2023), arXiv:2302.01318, table 1 and text (read second-hand): Chinchilla 70B, 4B draft, batch 1
CHEN_TARGET = 14.1e-3  # one decode step of the target [s]
CHEN_DRAFT = 1.8e-3  # one decode step of the draft [s]
CHEN_LENGTH = 4  # K [tokens]
CHEN = {"XSum, nucleus": 1.92, "XSum, greedy": 2.01, "HumanEval": 2.46}  # measured speed-ups [-]
CHEN_BEST_XSUM = 3  # draft length they found best on XSum [tokens]

EXPECTED = {
    "recomputed Exp within rounding of inputs and output": True,
    "recomputed Exp within rounding of the output alone": False,
    "measured rows within 15 % in the median": True,
    "measured rows within 25 % at worst": False,
    "misses go by task": True,
    "no measured row above its tokens per round": False,
    "gamma of the rows within 3 % of the best speed-up": True,
    "best length on XSum is the published 3": False,
    "published best length on XSum within 2.5 % of the best speed-up": True,
}


def predicted(row: Row) -> float:
    """Return theorem 3.8 for a row [-]."""
    return float(speedup(row.alpha, row.gamma, target=1, verify=1, draft=row.cost))


def leviathan() -> list[dict[str, Any]]:
    """Return the rows with prediction, deviation from Exp and Emp, and the best length by the theory."""
    rows = []
    for row in ROWS:
        ours, best = predicted(row), best_length(row.alpha, row.cost)
        rows.append(
            {
                **row._asdict(),
                "predicted": ours,
                "ceiling": float(tokens_per_round(row.alpha, row.gamma)),
                "minus_expected": ours - row.expected,
                "over_measured": ours / row.measured - 1,
                "range_of_inputs": _rounding(row),
                "best_length": int(best.length),
                "share_of_best": ours / float(best.speedup),
            }
        )
    return rows


def _rounding(row: Row) -> list[float]:
    """Return the least and largest prediction when alpha and c are half a digit off [-]."""
    off = (-ALPHA_ROUNDING, ALPHA_ROUNDING)
    return [float(speedup(row.alpha + d, row.gamma, target=1, verify=1, draft=row.cost - d)) for d in off]


def chen() -> list[dict[str, Any]]:
    """Return, per task, what the measured speed-up implies when verification takes one target step."""
    cost, rows = CHEN_DRAFT / CHEN_TARGET, []
    for task, measured in CHEN.items():
        tokens = measured * (1 + CHEN_LENGTH * cost)
        alpha = from_tokens_per_round(tokens, CHEN_LENGTH)
        best = best_length(alpha, cost)
        by_length = tokens_per_round(alpha, np.arange(1, 8)) / (1 + cost * np.arange(1, 8))
        rows.append(
            {
                "task": task,
                "measured": measured,
                "tokens_per_round": tokens,
                "acceptance": alpha,
                "best_length": int(best.length),
                "speedup_at_best": float(best.speedup),
                "by_length": by_length.tolist(),
                "loss_of_published_best": 1 - float(by_length[CHEN_BEST_XSUM - 1] / best.speedup),
            }
        )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the error summary against the measured speed-ups."""
    errors = np.array([row["over_measured"] for row in rows])
    return {
        "n": len(rows),
        "mape": float(np.abs(errors).mean()),
        "median_ape": float(np.median(np.abs(errors))),
        "bias": float(errors.mean()),
        "p90_ape": float(np.percentile(np.abs(errors), 90)),
    }


def by(rows: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Return the mean signed miss of each value of ``key`` [-]."""
    return {
        str(value): float(np.mean([row["over_measured"] for row in rows if row[key] == value]))
        for value in dict.fromkeys(row[key] for row in rows)
    }


def check_against(folder: Path) -> int:
    """Return how many of the typed rows the collection holds too; an error if one differs."""
    with (folder / "published_speculation.csv").open(encoding="utf-8") as file:
        known = [line for line in csv.DictReader(file) if line["source_locator"] == "Table 2"]
    tasks = {"EnDe": "WMT EnDe", "CNNDM": "CNN/DM"}
    theirs = {
        (
            line["dataset"],
            line["draft_model"],
            int(line["temperature"]),
            int(line["gamma"]),
            float(line["alpha"]),
            float(line["speedup"]),
        )
        for line in known
        if line["speedup"] and "Leviathan" in line["source"]
    }
    ours = {(tasks[r.task], r.draft, r.temperature, r.gamma, r.alpha, r.measured) for r in ROWS}
    if ours != theirs:
        raise SystemExit(f"typed rows and {folder} differ: {sorted(ours ^ theirs)}")
    return len(ours)


def analyse() -> dict[str, Any]:
    """Return all numbers and verdicts."""
    rows, lengths = leviathan(), chen()
    tasks = by(rows, "task")
    xsum = [row for row in lengths if row["task"].startswith("XSum")]
    total = summary(rows)
    return {
        "verdicts": {
            "recomputed Exp within rounding of inputs and output": all(
                r["range_of_inputs"][0] - ROUNDING <= r["expected"] <= r["range_of_inputs"][1] + ROUNDING for r in rows
            ),
            "recomputed Exp within rounding of the output alone": all(
                abs(r["minus_expected"]) <= ROUNDING for r in rows
            ),
            "measured rows within 15 % in the median": total["median_ape"] <= TOLERANCE,
            "measured rows within 25 % at worst": max(abs(r["over_measured"]) for r in rows) <= 0.25,
            "misses go by task": tasks["EnDe"] > 0.05 and tasks["CNNDM"] < -0.05,
            "no measured row above its tokens per round": all(r["measured"] <= r["ceiling"] for r in rows),
            "gamma of the rows within 3 % of the best speed-up": all(r["share_of_best"] >= 0.97 for r in rows),
            "best length on XSum is the published 3": all(r["best_length"] == CHEN_BEST_XSUM for r in xsum),
            "published best length on XSum within 2.5 % of the best speed-up": all(
                r["loss_of_published_best"] <= 0.025 for r in xsum
            ),
        },
        "against_measured": total,
        "by_task": tasks,
        "by_draft": by(rows, "draft"),
        "by_temperature": by(rows, "temperature"),
        "rows": rows,
        "chen": lengths,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw predicted against measured speed-ups, and Chen's speed-up over draft lengths."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for task, colour in (("EnDe", "tab:blue"), ("CNNDM", "tab:orange")):
        for draft, mark in (("T5-small", "o"), ("T5-base", "s"), ("T5-large", "^")):
            rows = [r for r in result["rows"] if (r["task"], r["draft"]) == (task, draft)]
            left.plot(
                [r["measured"] for r in rows],
                [r["predicted"] for r in rows],
                mark,
                color=colour,
                label=f"{task}, {draft}",
            )
    ends = np.array([1.2, 3.6])
    left.plot(ends, ends, "k-", lw=0.8)
    left.fill_between(ends, ends * 0.85, ends * 1.15, color="black", alpha=0.08, label="15 %")
    left.set(xlabel="measured speed-up [-]", ylabel="theorem 3.8 [-]")
    left.legend(frameon=False, fontsize=7)
    for row in result["chen"]:
        (line,) = right.plot(range(1, 8), row["by_length"], "o-", ms=3, label=f"{row['task']}: {row['acceptance']:.2f}")
        right.plot(CHEN_LENGTH, row["measured"], "D", color=line.get_color())
    right.axvline(CHEN_BEST_XSUM, color="black", lw=0.8, ls=":")
    right.set(xlabel="draft length [tokens]", ylabel="speed-up [-]")
    right.legend(frameon=False, fontsize=7, title="implied acceptance", title_fontsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def readme(result: dict[str, Any]) -> str:
    """Return the text of README.md with the numbers of this run."""
    lines = [
        f"| {r['task']} | {r['draft']} | {r['temperature']} | {r['gamma']} | {r['alpha']} | {r['cost']} | "
        f"{r['predicted']:.2f} | {r['expected']} | {r['measured']} | {r['over_measured']:+.0%} | "
        f"{r['best_length']} | {r['share_of_best']:.3f} |"
        for r in result["rows"]
    ]
    chens = [
        f"| {r['task']} | {r['measured']} | {r['tokens_per_round']:.2f} | {r['acceptance']:.3f} | {r['best_length']} | "
        f"{r['speedup_at_best']:.2f} | {r['loss_of_published_best']:.1%} |"
        for r in result["chen"]
    ]
    total = result["against_measured"]
    over = [r for r in result["rows"] if r["measured"] > r["ceiling"]]
    above, names = len(over), "; ".join(f"{r['task']} {r['draft']} T = {r['temperature']}" for r in over)
    xsum = " and ".join(str(r["best_length"]) for r in result["chen"] if r["task"].startswith("XSum"))
    worst = max(abs(r["minus_expected"]) for r in result["rows"])
    close = sum(abs(r["minus_expected"]) <= ROUNDING for r in result["rows"])
    largest = max(abs(r["over_measured"]) for r in result["rows"])
    rounding = max(r["range_of_inputs"][1] / r["predicted"] - 1 for r in result["rows"])
    named = {"by_task": "", "by_draft": "", "by_temperature": "T = "}
    groups = ", ".join(
        f"{prefix}{name} {miss:+.0%}" for key, prefix in named.items() for name, miss in result[key].items()
    )
    return f"""# Leviathan's and Chen's rows

**Claim.** Theorem 3.8 gives Leviathan's printed predictions within rounding, and misses the measured rows by at most
15 % in the median.

**Verdict: holds, with large misses in single rows.** {close} of the twelve printed predictions come out within half a
digit (largest difference {worst:.3f}), all twelve once alpha and c may be half a digit off themselves. Against the
measured speed-ups the median miss is {total["median_ape"]:.1%}, the mean {total["mape"]:.1%}, the bias
{total["bias"]:+.1%}, the 90th percentile {total["p90_ape"]:.0%}, the worst {largest:.0%}.

Written by `python studies/leviathan_rows/run.py`, which fails when a verdict changes.

## Row by row

| task | draft | T | gamma | alpha | c | theorem 3.8 | Exp | measured | miss | best gamma | share of best |
|---|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}

Source: Leviathan et al. (2023), arXiv:2211.17192, appendix A.3, table 4, in a transcription; c comes from the authors'
profiler traces; rounding of alpha and c alone moves a prediction by up to {rounding:.1%}. "Share of best": speed-up at
the gamma used over that at the best one; no row uses a longer draft than the best.

Mean signed miss: {groups}.
The misses are not scatter: the summarisation rows run faster than predicted, the translation rows with the large draft
much slower. In {above} rows ({names}) the measured speed-up even exceeds the tokens per round, which no draft, however
fast, can explain: there the speculative run and the baseline must differ in more than speculation (the authors name
differences of implementation), or alpha was not the acceptance of that run. Dependence between tokens, the other cause
they name, would act the other way.

![predicted against measured](rows.png)

## Chen et al. from the published latencies

Step times {1e3 * CHEN_TARGET:.1f} and {1e3 * CHEN_DRAFT:.1f} ms, K = {CHEN_LENGTH}, verification taken as one target
step: the measured speed-up gives tokens per round, those give the acceptance (which the paper only plots).

| task | measured | tokens per round | acceptance | best K | speed-up there | lost at K = {CHEN_BEST_XSUM} |
|---|---|---|---|---|---|---|
{chr(10).join(chens)}

The paper reports K = {CHEN_BEST_XSUM} as best on XSum; from the speed-up at K = {CHEN_LENGTH} alone the theory says
{xsum}, with a loss at {CHEN_BEST_XSUM} that a measurement would hardly see. A shorter best draft is what a verify pass
that grows with K, or acceptance that falls with position, would give; the published latencies do not say which.

## What would refute it

- A row whose Exp lies outside what the rounding of its inputs allows: the formula would be read wrongly.
- Step times per task for the T5 rows: with c and the verify time of each run the rows would have to fall into place.
- Chen's acceptances in numbers, to compare with the implied ones.
"""


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    of = result["against_measured"]
    return f"{of['median_ape']:.1%} from the measured speed-ups in the median, {worst(result):.0%} at worst"


def worst(result: dict[str, Any]) -> float:
    """Return the largest miss [-]."""
    return max(abs(r["over_measured"]) for r in result["rows"])


def validations(result: dict[str, Any]) -> list[Validation]:
    """Return theorem 3.8 against the measured speed-ups."""
    return [
        Validation.of(
            result["against_measured"],
            "speculation",
            "speed-up of twelve T5 pairs, theorem 3.8 with published acceptance and costs",
            "published measurements",
            "nothing",
            worst=worst(result),
        )
    ]


def checked(given: argparse.Namespace) -> dict[str, Any]:
    """Return the result, the typed rows held against the collection where one is given."""
    if given.data is not None:
        print(f"{check_against(given.data)} typed rows agree with the collection", file=sys.stderr)
    return analyse()


STUDY = Study(
    __file__,
    __doc__,
    checked,
    readme,
    headline,
    draw=lambda given, result: plot(result, given.folder / "rows.png"),
    expected=EXPECTED,
    n=lambda result: len(result["rows"]),
    validations=validations,
    data=Data("speculation", ("published_speculation.csv",), required=False),
    recheck=True,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

"""Claim: a rejected answer is worth little as the next tier's draft unless its tail fits on after a wrong token.

13B -> 34B -> 70B on H100s, answers of 200 tokens, times of verify passes and decode steps from the latency model. The
next tier verifies the rejected answer, keeps what stands (lossless), and goes on from there: saving of decoding time
over the acceptance of a token and the probability that the tail still fits after a replaced one; each at its best
width of a pass. Compared with decoding alone and with a small draft.

    python studies/answer_as_draft/run.py [--quick] [--output DIR]

Exits with 1 when a verdict differs from the one in EXPECTED.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np

from calibration.profiles import load_profile
from studies.study import Study
from theory.catalog import accelerator, model
from theory.latency import Pass, step_time
from theory.speculation import best_schedule
from theory.speculative_cascades import Reuse, answer_as_draft, escalation_cost

HERE = Path(__file__).parent
PROFILE, GPU = "h100-sxm", "h100-sxm"
STEPS = (("13B -> 34B", "codellama-34b", 2), ("13B -> 70B", "llama-2-70b", 4))  # 34B -> 70B has the times of 13B -> 70B
SMALL, SMALL_ACCEPTANCE = "tinyllama-1.1b", 0.6  # the tier's own draft and its acceptance (assumed) [-]
BATCHES = (1, 16)  # sequences [-]
CONTEXT, PROMPT, ANSWER = 1024.0, 900.0, 200  # cached tokens of others; of a prompt; of an answer [tokens]
ACCEPTANCES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)  # of a token given those before [-]
REALIGNED = (0.0, 0.5, 1.0)  # probability that the tail fits after a replaced token [-]
WIDTHS = (4, 8, 16, 32, 64, 200)  # tokens of a pass [tokens]
COSTS = {"codellama-34b": 4.2, "llama-2-70b": 8.8}  # cost of a visit, 0.125 per 1e9 parameters [cost unit]
EXPECTED = {
    "without realignment it saves less than 5 % of decoding at acceptance 0.9 or less": True,
    "without realignment it saves a quarter only above acceptance 0.98": True,
    "with perfect realignment it saves at least 60 % from acceptance 0.8 on at batch 1": True,
    "beside a small draft and without realignment it saves less than 5 % at acceptance 0.9 or less": True,
    "it is never worth less than half as much of the saving at batch 16 as at batch 1, realignment 1": True,
}


class Times(NamedTuple):
    """Of one tier at one batch [s]."""

    verify: np.ndarray  # (ANSWER,) a pass over 1..ANSWER tokens of one more sequence, the others decoding
    plain: float  # a token decoded alone
    drafted: float  # a token with the small draft
    prompt: float  # a prompt


def times(name: str, tp: int, batch: int) -> Times:
    """Return the times of a tier; the others of the batch decode one token each beside a pass."""
    gpu, profile = accelerator(GPU), load_profile(PROFILE)

    def step(of: str, tokens: float, degree: int) -> float:
        return float(step_time(model(of), gpu, profile, Pass(batch, tokens, CONTEXT), degree).total)

    alone = step(name, 1.0, tp)
    more = np.arange(ANSWER, dtype=float)
    passes = step_time(model(name), gpu, profile, Pass(batch, 1.0, CONTEXT, prefill_tokens=more), tp).total
    small, lengths = step(SMALL, 1.0, 1), np.arange(9)
    rounds = np.array([step(name, g + 1.0, tp) + g * small for g in lengths])
    schedule = best_schedule(SMALL_ACCEPTANCE, rounds[:, None])
    drafted = float(schedule.time[0] / schedule.tokens[0])
    prompt = float(step_time(model(name), gpu, profile, Pass(0.0, 1.0, 0.0, prefill_tokens=PROMPT), tp).total)
    return Times(np.maximum.accumulate(passes), alone, min(drafted, alone), prompt)


def best(at: Times, decode: float, acceptance: float, realigned: float) -> tuple[int, Reuse]:
    """Return the width that saves most, and what it saves."""
    found = [(w, answer_as_draft([acceptance] * ANSWER, at.verify[:w], decode, realigned)) for w in WIDTHS]
    return max(found, key=lambda f: f[1].saved)


def analyse(quick: bool) -> dict[str, Any]:
    """Return the result of the study."""
    rows = []
    for step, name, tp in STEPS[: 1 if quick else None]:
        for batch in BATCHES:
            at = times(name, tp, batch)
            for beside, decode in (("nothing", at.plain), ("small draft", at.drafted)):
                share = decode * ANSWER / (decode * ANSWER + at.prompt)
                for r in REALIGNED:
                    each = [best(at, decode, a, r) for a in ACCEPTANCES]
                    rows.append(
                        {
                            "step": step,
                            "batch": batch,
                            "beside": beside,
                            "realigned": r,
                            "decode_ms": 1e3 * decode,
                            "verify_ms_at": {str(w): 1e3 * float(at.verify[w - 1]) for w in (8, 64, 200)},
                            "saved": [reuse.saved for _, reuse in each],
                            "kept": [reuse.kept for _, reuse in each],
                            "passes": [reuse.passes for _, reuse in each],
                            "width": [w for w, _ in each],
                            "cost": [escalation_cost(COSTS[name], reuse, share) for _, reuse in each],
                            "full_cost": COSTS[name],
                        }
                    )
    return {"verdicts": verdicts(rows), "acceptances": list(ACCEPTANCES), "rows": rows}


def verdicts(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Return what the rows say."""

    def saved(beside: str, realigned: float, low: float, high: float, batch: int | None = None) -> np.ndarray:
        at = [i for i, a in enumerate(ACCEPTANCES) if low <= a <= high]
        return np.array(
            [
                [r["saved"][i] for i in at]
                for r in rows
                if r["beside"] == beside and r["realigned"] == realigned and batch in (None, r["batch"])
            ]
        )

    one, many = (saved("nothing", 1.0, 0.5, 1.0, batch) for batch in BATCHES)
    return {
        "without realignment it saves less than 5 % of decoding at acceptance 0.9 or less": bool(
            saved("nothing", 0.0, 0.0, 0.9).max() < 0.05
        ),
        "without realignment it saves a quarter only above acceptance 0.98": bool(
            saved("nothing", 0.0, 0.0, 0.98).max() < 0.25 <= saved("nothing", 0.0, 0.99, 1.0).min()
        ),
        "with perfect realignment it saves at least 60 % from acceptance 0.8 on at batch 1": bool(
            saved("nothing", 1.0, 0.8, 1.0, 1).min() >= 0.6
        ),
        "beside a small draft and without realignment it saves less than 5 % at acceptance 0.9 or less": bool(
            saved("small draft", 0.0, 0.0, 0.9).max() < 0.05
        ),
        "it is never worth less than half as much of the saving at batch 16 as at batch 1, realignment 1": bool(
            np.all(many >= one / 2)
        ),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the saving against acceptance."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained", sharey=True)
    rows = [r for r in result["rows"] if r["step"] == STEPS[-1][0]]
    for axis, beside in zip(axes, ("nothing", "small draft"), strict=True):
        for r in rows:
            if r["beside"] == beside:
                style = "-" if r["batch"] == BATCHES[0] else "--"
                label = f"tail fits {r['realigned']:g}" if r["batch"] == BATCHES[0] else None
                axis.plot(ACCEPTANCES, r["saved"], style, color=f"C{REALIGNED.index(r['realigned'])}", label=label)
        against = "decoding alone" if beside == "nothing" else f"decoding with {SMALL} at {SMALL_ACCEPTANCE}"
        axis.axhline(0, color="0.6", lw=0.8)
        axis.set(xlabel="acceptance of a token of the rejected answer [-]", title=f"against {against}", ylim=(-0.1, 1))
    axes[0].set_ylabel("decoding time saved [-]")
    axes[0].legend(fontsize=8, title="line: batch 1, dashed: 16")
    figure.suptitle(f"{STEPS[-1][0]}, answer of {ANSWER} tokens as draft, best width of a pass")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def readme(result: dict[str, Any]) -> str:
    """Return README.md with the numbers of the result."""
    at = [ACCEPTANCES.index(a) for a in (0.7, 0.8, 0.9, 0.95, 0.99)]
    rows = []
    for r in result["rows"]:
        cells = [r["step"], r["batch"], r["beside"], f"{r['realigned']:g}"]
        cells += [f"{r['saved'][i]:.0%} ({r['width'][i]}; {r['cost'][i]:.2f})" for i in at]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    verdict = "\n".join(f"- {name}: **{'yes' if v else 'no'}**" for name, v in result["verdicts"].items())
    return README.format(
        verdicts=verdict,
        rows="\n".join(rows),
        answer=ANSWER,
        small=SMALL,
        small_acceptance=SMALL_ACCEPTANCE,
        prompt=int(PROMPT),
    )


README = """# A rejected answer as the next tier's draft

**Claim.** Verifying the answer that the stop rule rejected, instead of decoding from nothing, saves next to nothing
where the draft ends at its first wrong token: at acceptance 0.8 four tokens of {answer} stand. What decides is whether
the tail goes on fitting after a replaced token.

{verdicts}

Written by `python studies/answer_as_draft/run.py`, which fails when a verdict changes.

![time saved](saved.png)

## What is computed

`theory/speculative_cascades.py`, `answer_as_draft`: lossless verification in passes of the best width, expected time by
exact recursion over the tokens (tested against enumeration and simulation). Times from the latency model (H100,
kernels): 34B on 2, 70B on 4; the other sequences of the batch decode one token beside each pass. Saved: of the time to
decode {answer} tokens, alone or with {small} at acceptance {small_acceptance} (assumed). In brackets: best width of a
pass [tokens]; what a visit then costs where it costs 4.2 (34B) or 8.8 (70B) without reuse, with a prompt of {prompt}
tokens that is paid in any case.

| step | batch | beside | tail fits | 0.7 | 0.8 | 0.9 | 0.95 | 0.99 |
|---|---|---|---|---|---|---|---|---|
{rows}

## Reading

Without realignment the saving is about a / (1 - a) tokens less the first pass. With realignment the rejected answer is
a draft that costs nothing to make, worth what such a draft is worth. Real answers lie between: a target that words a
sentence differently rarely returns to the same tokens at the same places.

## What it does not say

- Acceptance of *rejected* answers is not measured. They are rejected because they are likely wrong, so they should
  agree with the next tier less than answers in general do: read the left half of the figure.
- Both answers are taken to have {answer} tokens, and acceptance to be the same at each.
- Host time per pass is left out; it favours wide passes a little.
- What would refute it: pairs of answers of a 13B and a 70B to the same prompts with a realignment near 1.
"""


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    at, step = ACCEPTANCES.index(0.8), result["rows"][0]["step"]
    rows = [r for r in result["rows"] if (r["step"], r["batch"], r["beside"]) == (step, 1, "nothing")]
    saved = {r["realigned"]: r["saved"][at] for r in rows}
    return f"{step} at acceptance 0.8: saves {saved[0.0]:.0%} of decoding without realignment, {saved[1.0]:.0%} with"


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.quick),
    readme,
    headline,
    draw=lambda given, result: plot(result, given.folder / "saved.png"),
    expected=EXPECTED,
    n=lambda result: len(result["rows"]),
    quick="one step",
    recheck=True,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

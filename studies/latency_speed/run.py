"""Claim: two million step times a second on one core, vectorised.

    python studies/latency_speed/run.py [--quick]

Decode and verify steps of Llama-2-70b at TP 4 on an H100. Three ways to ask: a grid (batch x context), a million
points with whole numbers of tokens in no order, a million points whose token counts are all different; and a plain
Python loop. Element-wise numpy runs on one core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from calibration.profiles import load_profile
from studies.study import Bar, Study
from theory.catalog import accelerator, model
from theory.latency import Pass, step_time

HERE = Path(__file__).parent
BAR = 2e6  # step times a second
POINTS = 1_000_000
LOOP = 2_000  # steps of the plain loop
TP = 4
ASKED = ("grid", "whole_tokens", "all_different")  # ways of asking that the claim is about


def rate(ask: Callable[[], int], repeats: int) -> float:
    """Return the best of ``repeats`` rates [1/s]."""
    best = 0.0
    for _ in range(repeats):
        begun = time.perf_counter()
        count = ask()
        best = max(best, count / (time.perf_counter() - begun))
    return best


def analyse(quick: bool) -> dict[str, Any]:
    """Return the rates."""
    points, repeats = (POINTS // 10, 1) if quick else (POINTS, 3)
    target, gpu, profile = model("llama-2-70b"), accelerator("h100-sxm"), load_profile("h100-sxm-vllm")
    rng = np.random.default_rng(0)
    batch, query = rng.integers(1, 257, points), rng.integers(1, 9, points)
    context, tokens = rng.uniform(1, 4096, points), rng.uniform(1, 2048, points)

    def steps(work: Pass) -> int:
        return step_time(target, gpu, profile, work, TP).total.size

    def loop() -> int:
        for b, q, s in zip(batch[:LOOP], query, context, strict=False):
            step_time(target, gpu, profile, Pass(float(b), float(q), float(s)), TP)
        return LOOP

    return {
        "grid": rate(lambda: steps(Pass(np.arange(1, 257)[:, None], 5.0, context[None, : points // 256])), repeats),
        "whole_tokens": rate(lambda: steps(Pass(batch, query, context)), repeats),
        "all_different": rate(lambda: steps(Pass(tokens, 1.0, context)), repeats),
        "loop": rate(loop, 1),
    }


def readme(result: dict[str, Any]) -> str:
    """Return the page of this study."""
    says = "holds" if min(result[k] for k in ASKED) >= BAR else "does not hold"
    rows = {
        "grid": "grid of 256 batches x contexts",
        "whole_tokens": "1,000,000 points in no order, whole tokens",
        "all_different": "1,000,000 points, no two token counts equal",
        "loop": "plain Python loop, one call per point",
    }
    return "\n".join(
        [
            "# Step times a second",
            "",
            "**Claim.** At least two million step-time evaluations a second on one core, vectorised.",
            "",
            f"**Verdict: {says}**, in no order and with fractional token counts as well.",
            "",
            "Written by `python studies/latency_speed/run.py`, which exits with 1 if the bar is missed.",
            "",
            "| asked as | million a second | times the loop |",
            "|---|---|---|",
            *(
                f"| {label} | {result[key] / 1e6:.3f} | {result[key] / result['loop']:.0f} |"
                for key, label in rows.items()
            ),
            "",
            "The products of a step depend on the number of tokens, not on the context: they are computed once per",
            "distinct whole number of tokens, and a fractional number (a mean batch) lies between two whole ones.",
            "",
        ]
    )


def bars(result: dict[str, Any]) -> list[Bar]:
    """Return the rates against the bar."""
    return [
        Bar(f"{key.replace('_', ' ')}, two million a second", result[key] >= BAR, result[key], BAR) for key in ASKED
    ]


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.quick),
    readme,
    lambda result: f"{min(result[key] for key in ASKED) / 1e6:.1f} million step times a second, however asked",
    bars=bars,
    n=lambda _: POINTS,
    quick="a tenth of the points",
    quick_judged=False,
    times=("*",),
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

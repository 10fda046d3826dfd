"""Claim: at real step times the best draft is smaller than FLOPs say, and load shortens it more than it shrinks it.

SDSL counts FLOPs: a draft of N parameters costs N / M of a target step. On a GPU a small model is bound by its kernels,
not by its weights, and verification stops being free when the batch is large. The same question, same laws of loss and
acceptance, is asked with step times from the latency model: which draft, how long, what gain, at batch 1, 8, 32, 128?
Targets of 70 B on four GPUs and of 13 B on one. The study also counts how many drafts are evaluated in a second.

    python studies/draft_size_under_load/run.py [--profile NAME] [--quick] [--output DIR]

Exits with 1 when a verdict differs from the one in EXPECTED.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from calibration.profiles import load_profile
from planner.draft import Costs, Hardware, Laws, Training, best_sizes, draft_plan, hardware_plan, hardware_rows
from studies.study import Study
from theory.acceptance import SDSL
from theory.catalog import accelerator, model, models
from theory.latency import Pass, Profile, step_time
from theory.shapes import VOCAB, llama_shape
from theory.work import parameters

HERE = Path(__file__).parent

BATCHES = (1, 8, 32, 128)  # [sequences]
CONTEXT = 1024.0  # [tokens]
SETUPS = {"70 B, tp 4": (Training(70e9, 2e12, 1e11), 4), "13 B, tp 1": (Training(13e9, 2e12, 1e11), 1)}
# SDSL's line is flat in N; beside it one that rises three times as fast and meets it at a draft perplexity of 11
STEEP = replace(SDSL, name="sdsl-steep", draft_slope=3 * SDSL.draft_slope, intercept=0.642 + 2 * 0.0067 * 11)
SMALLEST = 44e6  # search below the fitted sizes of the acceptance law, down to those of the loss law [parameters]
TARGET_RATE = 1000.0  # draft evaluations a second that are asked for [1/s]
EXPECTED = {
    "batch 1: best draft smaller than at FLOP cost": True,
    "batch 1: cost ratio of the best draft at least twice N / M": True,
    "batch 1: draft length shorter than at FLOP cost": True,
    "gain at batch 128 below that at batch 1": True,
    "draft length falls with the batch": True,
    "best size moves less than a factor 3 with the batch": True,
    "FLOP answer costs less than 5 % at batch 1": True,
    "derived shapes: median step time within 10 % of the catalog's": True,
    "a thousand draft evaluations a second": True,
}


def solve(name: str, profile: Profile, laws: Laws) -> dict[str, Any]:
    """Return the answers at FLOP cost and at each batch for one target."""
    training, tp = SETUPS[name]
    hardware = Hardware(accelerator(profile.accelerator), profile, tp=tp, batches=BATCHES, context=CONTEXT)
    flops = draft_plan(training, laws=laws)
    costs = Costs(training.target_params, hardware, (SMALLEST, 4e9))
    plan = hardware_plan(training, costs, laws)
    at_flop_size = [
        hardware_rows(training, costs, laws, np.array([flops["draft_params"]]), i)[0] for i in range(len(BATCHES))
    ]
    sizes = np.geomspace(SMALLEST, 4e9, 121)
    curves = [hardware_rows(training, costs, laws, sizes, i) for i in range(len(BATCHES))]
    return {
        "flops": {key: flops[key] for key in ("draft_params", "draft_length", "acceptance", "speedup", "cost_ratio")},
        "by_batch": plan["by_batch"],
        "paying_batches": plan["paying_batches"],
        "paying_contexts": plan["paying_contexts"],
        "largest_batch": plan["largest_batch"],
        "schedule": plan["schedule"],
        "lost_with_flop_size": [
            1 - row["speedup"] / best["speedup"] for row, best in zip(at_flop_size, plan["by_batch"], strict=True)
        ],
        "curves": [
            {
                "draft_params": [row["draft_params"] for row in rows],
                "speedup": [row["speedup"] for row in rows],
                "low": [row["speedup_interval"][0] for row in rows],
                "high": [row["speedup_interval"][1] for row in rows],
            }
            for rows in curves
        ],
        "depth": depths(costs, plan),
    }


def depths(costs: Costs, plan: dict[str, Any]) -> list[dict[str, float]]:
    """Return the gain at batch 1 with drafts of the same size and other depths: what the shape rule leaves open."""
    rows, shape = [], llama_shape(plan["draft_params"])
    for factor in (0.5, 1.0, 2.0):
        layers = max(1, round(shape.layers * factor))
        width = int(round(shape.hidden * (shape.layers / layers) ** 0.5 / 64) * 64)
        heads = width // 64
        other = replace(
            shape, layers=layers, hidden=width, heads=heads, kv_heads=heads, head_dim=64, ffn=int(3.5 * width)
        )
        draft = float(costs.draft_time(other, 1.0, CONTEXT))
        gamma = costs.lengths
        tokens = (1 - plan["acceptance"] ** (gamma + 1)) / (1 - plan["acceptance"])
        gains = tokens * costs.plain[0] / (costs.verify[:, 0] + gamma * draft)
        rows.append(
            {
                "layers": layers,
                "hidden": width,
                "params": parameters(other),
                "draft_s": draft,
                "draft_length": int(np.argmax(gains)),
                "speedup": float(gains.max()),
            }
        )
    return rows


def shape_check(profile: Profile) -> dict[str, float]:
    """Return how far step times of derived shapes are from those of the catalog's models of the same size [-]."""
    gpu, rows = accelerator(profile.accelerator), []
    for known in map(model, models()):
        shape = llama_shape(parameters(known), known.vocab)
        own, derived = (float(step_time(m, gpu, profile, Pass(1, 1, CONTEXT)).total) for m in (known, shape))
        rows.append((parameters(known), derived / own - 1))
    size, miss = np.array(rows).T
    small = size < 4e9
    return {
        "median": float(np.median(np.abs(miss))),
        "median_below_4b": float(np.median(np.abs(miss[small]))),
        "median_above_4b": float(np.median(np.abs(miss[~small]))),
        "worst": float(np.abs(miss).max()),
        "bias": float(miss.mean()),
    }


def rates(profile: Profile) -> dict[str, float]:
    """Return evaluations a second on one core: whole answers at FLOP cost, whole curves, points on hardware."""
    targets = np.geomspace(13e9, 110e9, 2000)
    training, tp = SETUPS["70 B, tp 4"]
    hardware = Hardware(accelerator(profile.accelerator), profile, tp=tp, batches=BATCHES, context=CONTEXT)
    costs = Costs(training.target_params, hardware, (1e8, 4e9))
    sizes = np.geomspace(1e8, 4e9, 500)
    costs.draft(sizes)  # step times are computed once

    def timed(call: Any, repeats: int) -> float:
        start = time.process_time()
        for _ in range(repeats):
            call()
        return (time.process_time() - start) / repeats

    optimum = timed(lambda: best_sizes(targets, 2e12, 1e11, Laws()), 2) / len(targets)
    points = timed(lambda: costs.gains(sizes, np.full(500, 0.65)).max(axis=0), 5) / (len(sizes) * len(BATCHES))
    once = timed(lambda: draft_plan(training, hardware), 1)
    return {
        "flop_optima_per_s": 1 / optimum,
        "hardware_drafts_per_s": 1 / points,
        "whole_hardware_plan_s": once,
        "whole_flop_plan_s": timed(lambda: draft_plan(training), 3),
    }


def analyse(profile_name: str) -> dict[str, Any]:
    """Return all numbers and verdicts."""
    profile = load_profile(profile_name)
    # the curves go below the sizes the acceptance law was fitted on: asked for, and marked in the text
    laws = Laws(acceptance=replace(SDSL, draft_sizes=(SMALLEST, 4e9)))
    steep = Laws(acceptance=replace(STEEP, draft_sizes=(SMALLEST, 4e9)))
    answers = {name: solve(name, profile, laws) for name in SETUPS}
    steeper = {name: solve(name, profile, steep) for name in SETUPS}
    check, speed = shape_check(profile), rates(profile)
    firsts = [(a["by_batch"][0], a["flops"], SETUPS[name][0]) for name, a in answers.items()]
    smaller = all(b["draft_params"] < f["draft_params"] for b, f, _ in firsts)
    shorter = all(b["draft_length"] < f["draft_length"] for b, f, _ in firsts)
    both = list(answers.values())
    return {
        "verdicts": {
            "batch 1: best draft smaller than at FLOP cost": smaller,
            "batch 1: cost ratio of the best draft at least twice N / M": all(
                b["cost_ratio"] >= 2 * b["draft_params"] / t.target_params for b, _, t in firsts
            ),
            "batch 1: draft length shorter than at FLOP cost": shorter,
            "gain at batch 128 below that at batch 1": all(
                a["by_batch"][-1]["speedup"] < a["by_batch"][0]["speedup"] for a in both
            ),
            "draft length falls with the batch": all(
                all(np.diff([b["draft_length"] for b in a["by_batch"]]) <= 0) for a in both
            ),
            "best size moves less than a factor 3 with the batch": all(_range(a["by_batch"]) < 3 for a in both),
            "FLOP answer costs less than 5 % at batch 1": all(a["lost_with_flop_size"][0] < 0.05 for a in both),
            "derived shapes: median step time within 10 % of the catalog's": check["median"] < 0.10,
            "a thousand draft evaluations a second": min(speed["flop_optima_per_s"], speed["hardware_drafts_per_s"])
            >= TARGET_RATE,
        },
        "profile": {"name": profile.name, "provenance": profile.provenance, "date": profile.date},
        "answers": answers,
        "steep": {name: {k: a[k] for k in ("flops", "by_batch")} for name, a in steeper.items()},
        "shape_check": check,
        "rates": speed,
    }


def _range(rows: list[dict[str, Any]]) -> float:
    sizes = [row["draft_params"] for row in rows]
    return float(max(sizes) / min(sizes))


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the speed-up over draft sizes at each batch for both targets."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, (name, answer) in zip(axes, result["answers"].items(), strict=True):
        for batch, curve, best in zip(BATCHES, answer["curves"], answer["by_batch"], strict=True):
            (line,) = axis.plot(curve["draft_params"], curve["speedup"], label=f"batch {batch}")
            if batch == 1:
                band = (curve["draft_params"], curve["low"], curve["high"])
                axis.fill_between(*band, alpha=0.15, color=line.get_color())
            axis.plot(best["draft_params"], best["speedup"], "o", color=line.get_color())
            axis.annotate(
                f"{best['draft_length']}",
                (best["draft_params"], best["speedup"]),
                (0, 5),
                textcoords="offset points",
                fontsize=8,
                ha="center",
            )
        flops = answer["flops"]
        axis.axvline(flops["draft_params"], color="black", lw=0.8, ls="--", label="best at FLOP cost")
        axis.axvspan(SMALLEST, SDSL.draft_sizes[0] if SDSL.draft_sizes else SMALLEST, color="black", alpha=0.06)
        axis.axhline(1.0, color="black", lw=0.8)
        axis.set(xscale="log", xlabel="draft parameters [-]", ylabel="speed-up [-]", title=f"target {name}")
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def readme(result: dict[str, Any]) -> str:
    """Return the text of README.md with the numbers of this run."""
    parts = []
    for name, answer in result["answers"].items():
        flops, steep = answer["flops"], result["steep"][name]
        ratio = flops["draft_params"] / SETUPS[name][0].target_params
        other = [f"{row['draft_params'] / 1e6:.0f}" for row in (steep["flops"], *steep["by_batch"])]
        rows = [
            f"| FLOP cost | {flops['draft_params'] / 1e6:.0f} | | {flops['draft_length']} | {flops['acceptance']:.3f} "
            f"| {ratio:.4f} | {flops['speedup']:.2f} | | | {other[0]} |"
        ]
        for b, lost, size in zip(answer["by_batch"], answer["lost_with_flop_size"], other[1:], strict=True):
            low, high = (end / 1e6 for end in b["draft_params_within_1_percent"])
            span = "{:.2f} to {:.2f}".format(*b["speedup_interval"])
            rows.append(
                f"| batch {b['batch']} | {b['draft_params'] / 1e6:.0f} | {low:.0f} to {high:.0f} | {b['draft_length']} "
                f"| {b['acceptance']:.3f} | {b['cost_ratio']:.4f} | {b['speedup']:.2f} | {span} | {lost:.1%} | {size} |"
            )
        depth = "; ".join(
            f"{r['layers']} layers of {r['hidden']}: {1e3 * r['draft_s']:.2f} ms, {r['speedup']:.2f} x"
            for r in answer["depth"]
        )
        schedule, fits = answer["schedule"], answer["largest_batch"]
        runs = ", ".join(f"{a}-{b}: {g}" for a, b, g in schedule["num_speculative_tokens_per_batch_size"])
        parts.append(
            f"""### Target {name}

| | draft [1e6] | within 1 % | length | alpha | c | speed-up | 90 % | lost with FLOP size | draft [1e6], steep law |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Same size, other depths (batch 1): {depth}.

Speculation pays at {_ranges(answer["paying_batches"], "batch")} and at {_ranges(answer["paying_contexts"], "context")}
(batch 1). Largest batch in memory: {fits["plain"]} plain, {fits["with_draft"]} with the draft.

Draft length by batch: {runs}.

Over batches 1 to {fits["with_draft"]}, taken equally often, this schedule gains {schedule["gain_over_fixed"] - 1:.1%}
over the best fixed length ({schedule["fixed_length"]}) and {schedule["gain_over_plain"] - 1:.0%} over plain decoding.
"""
        )
    check, speed = result["shape_check"], result["rates"]
    profile = result["profile"]
    first = next(iter(result["answers"].values()))
    flop, one, many = first["flops"], first["by_batch"][0], first["by_batch"][-1]
    return f"""# Draft size under load

**Claim.** At real step times the best draft is smaller than FLOPs say, and load shortens it more than it shrinks it.

**Verdict: holds with SDSL's acceptance law.** For a 70 B target the best draft falls from
{flop["draft_params"] / 1e6:.0f} M parameters and {flop["draft_length"]} tokens (FLOP cost) to
{one["draft_params"] / 1e6:.0f} M and {one["draft_length"]} tokens at batch 1. From batch 1 to {BATCHES[-1]} the length
falls to {many["draft_length"]} and the gain from {one["speedup"]:.2f} to {many["speedup"]:.2f}; the best size goes to
{many["draft_params"] / 1e6:.0f} M, and its optimum is flat.
The reason is the cost ratio: a draft step is bound by kernels and layers, not by parameters, so c is several times
N / M and grows slowly with N, while this law lets the acceptance rise slowly too.

Written by `python studies/draft_size_under_load/run.py`, which fails when a verdict changes. Profile
{profile["name"]} ({profile["provenance"]}, {profile["date"]}); context {CONTEXT:.0f}; Hoffmann losses, target on 2 T
tokens, draft on 100 B.
Sizes below 100 M (grey in the figure) are outside what the acceptance law was fitted on.

{chr(10).join(parts)}
![speed-up over draft size](sizes.png)

Numbers at the dots are draft lengths; the band is 90 % of the acceptance law at batch 1. Intervals in the tables hold
the step times too, taken as independent, which is too wide where errors cancel. Lengths that jump with the batch follow
the tiles of the kernels: a pass of 128 tokens costs little more than one of 100.

## How far to trust it

- **The law decides more than the load.** With a law whose acceptance rises three times as fast with the draft's quality
  (last column) the best drafts are two to three times larger, and shrink more with the batch. See
  `studies/which_acceptance_law`.
- **Shapes.** A draft that does not exist has a Llama-style shape by rule. Against the catalog's models of the same size
  its step time at batch 1 is off by {check["median"]:.1%} in the median ({check["median_below_4b"]:.0%} below 4 B,
  {check["median_above_4b"]:.1%} above), at worst {check["worst"]:.0%} (a 68 M model with two layers). Depth is a free
  choice at equal size: the lines above say what it is worth if the loss depends on size alone, which the loss law
  assumes and nobody tested at half the usual depth.
- **Left out**: the second token a draft must process after a fully accepted round, sampling, the queue.
- **The vocabulary** ({VOCAB} rows) is most of a draft below 100 M; loss laws were fitted on models with smaller ones.

## Speed

On one core (seconds of the processor): {speed["flop_optima_per_s"]:.0f} best drafts a second at FLOP cost (each a
search over sizes and lengths),
{speed["hardware_drafts_per_s"]:.0f} drafts a second on hardware (best of 25 lengths at one size and batch, step times
at hand). A whole answer with curve takes {speed["whole_flop_plan_s"] * 1e3:.0f} ms at FLOP cost and
{speed["whole_hardware_plan_s"]:.2f} s on hardware at four batches, nearly all of it step times and their intervals.

## What would refute it

- A measured step time of a 100 M to 300 M draft near N / M of its target's.
- Acceptance of one family against one 70 B target at 0.1 B and 3 B (see the other study).
- Measured gains at batch 32 to 128 with draft lengths above those of the schedule.
"""


def _ranges(runs: list[Any], what: str) -> str:
    if not runs:
        return f"no {what}"
    ends = [f"{low:.0f} to {high:.0f}" if high is not None else f"{low:.0f} up to all searched" for low, high in runs]
    return f"{what} {' and '.join(ends)}"


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    name, answer = next(iter(result["answers"].items()))
    flops, at_1 = answer["flops"]["draft_params"], answer["by_batch"][0]["draft_params"]
    return f"target {name}: the best draft has {at_1 / 1e6:.0f} M parameters at batch 1, {flops / 1e6:.0f} M by FLOPs"


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.profile),
    readme,
    headline,
    draw=lambda given, result: plot(result, given.folder / "sizes.png"),
    expected=EXPECTED,
    n=lambda result: sum(len(a["by_batch"]) for a in result["answers"].values()),
    options=lambda parser: parser.add_argument("--profile", default="h100-sxm", help="profile of the accelerator"),
    recheck=True,
    times=("rates", "a thousand draft evaluations a second"),
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

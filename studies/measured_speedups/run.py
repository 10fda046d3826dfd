"""Claim: measured tokens per round and step times explain measured speed-ups within 5 %, and batches end late.

Two checks against published measurements:

1. *Time model.* S = E[N] / (k T_D / T_T + T_V / T_T) with everything but S measured, T_V = T_T where no verify time is
   given. Whether a verify pass fits into a decode step is judged beforehand, from the datasheet.
2. *Batch effects.* Speed-ups of an EAGLE-3 draft on an H100 (Llama-3.1-8B, batch 1 to 64, draft length 1 to 7) from the
   latency model with one fitted number, the time of a draft step; then with the time a batch waits for its last
   request as a second one, against other second numbers.

    python studies/measured_speedups/run.py --data DIR [--quick] [--output DIR]

DIR holds `published_speculation.csv` and `verify_latency.csv`. Exits with 1 when a verdict differs from the one in
EXPECTED, with 2 when the data are not there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import integrate, optimize, stats

from calibration.profiles import load_profile
from calibration.speculation import read_published, read_verify, time_model, validate_speculation, verify_width
from calibration.validate import error_summary
from studies.study import Data, Study, Validation
from theory.catalog import accelerator, model
from theory.latency import Pass, roofline_time, step_time
from theory.specs import Accelerator

HERE = Path(__file__).parent
DATA = HERE.parents[2] / "shared" / "data" / "speculation"
Array = NDArray[np.float64]

T4 = Accelerator("t4", 16e9, 320e9, 65e12, 65e12, 16e9, 40, 4e6, 70, source="NVIDIA T4 datasheet (2019)")
FITS = {  # hardware and target of the file: what they are; the smaller A100, since the source does not say which
    ("A100", "Llama2-7B"): (accelerator("a100-40g-sxm"), model("llama-2-7b")),
    ("T4 16GB", "Llama-3.2-3B"): (T4, model("llama-3.2-3b")),
}
MEDIAN = 0.05  # the claim: median absolute error of the time model [-]

EAGLE = ("eagle3 (chain)", "H100", "Llama-3.1-8B-Instruct")  # method, hardware, target of the rows of the second check
TARGET = "llama-3.1-8b"  # dimensions of that target
GPU = "h100-sxm"
PROFILES = ("h100-sxm", "h100-sxm-vllm")  # of kernel tables; the second of the engine the rows were run with
CONTEXT = 512.0  # tokens cached per sequence; not stated by the source, assumed [tokens]
CONTEXTS = (256.0, 512.0, 1024.0)  # to see what the assumption matters [tokens]
ONE_NUMBER = 0.15  # mean absolute error with the draft cost alone [-]
TWO_NUMBERS = 2 / 3  # error with the end of the batch, in units of that without [-]
EXPECTED = {
    "time model: median error at most 5 %, all rows": True,
    "time model: median error at most 5 %, verification fits one step": True,
    "rows that miss have a verify pass of more than 1.2 steps, or less than one": True,
    "EAGLE-3: one draft cost, mean error at most 15 %": True,
    "EAGLE-3: the end of the batch takes a third or more of it off, batch left out": True,
    "EAGLE-3: no other second number does as well": True,
}


# --- 1. the time model -----------------------------------------------------------------------------------------------


def one_step(row: pd.Series) -> bool | None:
    """Return whether a verify pass fits into the measured decode step by the datasheet; None where none is known."""
    known = FITS.get((str(row["hardware"]), str(row["target_model"])))
    if known is None:
        return None
    gpu, target = known
    least = float(roofline_time(target, gpu, Pass(1, verify_width(row), CONTEXT)).total)
    return bool(least <= 1e-3 * float(row["t_target_ms"]))


def timed_rows(table: pd.DataFrame, verify: pd.DataFrame) -> pd.DataFrame:
    """Return the rows the time model predicts, with the verify time that would make it exact."""
    rows = []
    for p in time_model(table, verify)[0]:
        row = table.loc[p.line]
        cost = row["gamma"] * row["t_draft_ms"] / row["t_target_ms"]
        implied = p.predicted * (cost + 1) / p.measured - cost  # the prediction takes T_V = T_T here
        rows.append(
            {
                "line": p.line,
                "source": str(row["source"])[:24],
                "method": row["method"],
                "data": row["dataset"],
                "temperature": row["temperature"],
                "gamma": int(row["gamma"]),
                "width": verify_width(row),
                "predicted": p.predicted,
                "measured": p.measured,
                "error": p.predicted / p.measured - 1,
                "implied_verify": implied,
                "fits_one_step": one_step(row),
            }
        )
    return pd.DataFrame(rows)


# --- 2. batch effects ------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The EAGLE-3 rows as arrays of one length."""

    batch: Array
    length: Array  # gamma [tokens]
    tokens: Array  # measured tokens per round [tokens/round]
    speedup: Array  # measured [-]
    data: NDArray[np.str_]
    decode: Array  # T_T of the latency model [s]
    verify: Array  # T_V of the latency model [s]
    late: Array  # mean of the largest of `batch` standard normal numbers [-]


class Law(NamedTuple):
    """Speed-up as a function of one or two numbers, and where to start looking for them."""

    predict: Callable[[Rows, Array], Array]
    start: tuple[float, ...]
    meaning: str


def largest_normal(n: int) -> float:
    """Return the mean of the largest of n standard normal numbers [-]."""
    return float(integrate.quad(lambda x: x * n * stats.norm.pdf(x) * stats.norm.cdf(x) ** (n - 1), -9, 9)[0])


def eagle_rows(table: pd.DataFrame, profile_name: str, context: float) -> Rows:
    """Return the rows of the second check with the step times that the latency model gives them."""
    method, hardware, target = EAGLE
    chosen = (table["method"] == method) & (table["hardware"] == hardware) & (table["target_model"] == target)
    rows = table[chosen & table["speedup"].notna() & table["mean_accepted_len"].notna()]
    batch, length = rows["batch_size"].to_numpy(float), rows["gamma"].to_numpy(float)
    gpu, profile, llama = accelerator(GPU), load_profile(profile_name), model(TARGET)
    late = {n: largest_normal(int(n)) for n in np.unique(batch)}
    return Rows(
        batch,
        length,
        rows["mean_accepted_len"].to_numpy(float),
        rows["speedup"].to_numpy(float),
        rows["dataset"].to_numpy(str),
        step_time(llama, gpu, profile, Pass(batch, 1.0, context)).total,
        step_time(llama, gpu, profile, Pass(batch, length + 1, context)).total,
        np.array([late[n] for n in batch]),
    )


def speedup(rows: Rows, extra: Array, wait: Array | float = 1.0) -> Array:
    """Return E[N] T_T / ((T_V + extra) wait); ``extra`` in milliseconds."""
    return rows.tokens * rows.decode / ((rows.verify + 1e-3 * extra) * wait)


LAWS = {
    "draft cost": Law(lambda r, x: speedup(r, r.length * x[0]), (0.5,), "T_D [ms]"),
    "draft cost + end of the batch": Law(
        lambda r, x: speedup(r, r.length * x[0], 1 + x[1] * r.late * (r.tokens - 1) / r.tokens),
        (0.5, 0.1),
        "T_D [ms], spread of accepted tokens between requests [-]",
    ),
    "draft cost + cost per round": Law(
        lambda r, x: speedup(r, r.length * x[0] + x[1]), (0.5, 0.1), "T_D [ms], per round [ms]"
    ),
    "draft cost + cost per round and request": Law(
        lambda r, x: speedup(r, r.length * x[0] + x[1] * r.batch), (0.5, 0.01), "T_D [ms], per request [ms]"
    ),
    "draft cost that grows with the batch": Law(
        lambda r, x: speedup(r, r.length * (x[0] + x[1] * r.batch)), (0.5, 0.01), "T_D [ms], growth [ms per request]"
    ),
}
CLAIMED = "draft cost + end of the batch"


def fit(law: Law, rows: Rows, use: NDArray[np.bool_]) -> Array:
    """Return the numbers of ``law`` by least squares of ln S over the rows in ``use``, none of them negative."""

    def residuals(x: Array) -> Array:
        return np.log(law.predict(rows, x) / rows.speedup)[use]

    solved = optimize.least_squares(residuals, law.start, bounds=(0, np.inf), x_scale=np.array(law.start))
    return np.asarray(solved.x, np.float64)


def left_out(law: Law, rows: Rows) -> Array:
    """Return the predictions for each batch size by the numbers fitted on the others."""
    out = np.empty_like(rows.speedup)
    for batch in np.unique(rows.batch):
        out[rows.batch == batch] = law.predict(rows, fit(law, rows, rows.batch != batch))[rows.batch == batch]
    return out


def score(predicted: Array, rows: Rows) -> dict[str, float]:
    """Return the error summary, and the share of rows whose side of 1 is right."""
    right = float(np.mean((predicted > 1) == (rows.speedup > 1)))
    return error_summary(predicted, rows.speedup) | {"faster_or_slower_right": right}


def regret(predicted: Array, rows: Rows) -> dict[str, float]:
    """Return what is lost, against the best measured draft length, by the length with the best prediction [-]."""
    lost = []
    for batch in np.unique(rows.batch):
        for data in np.unique(rows.data):
            here = np.flatnonzero((rows.batch == batch) & (rows.data == data))
            lost.append(1 - rows.speedup[here[np.argmax(predicted[here])]] / rows.speedup[here].max())
    return {"n": len(lost), "mean": float(np.mean(lost)), "worst": float(np.max(lost))}


def floor(rows: Rows) -> float:
    """Return the mean error of the best function of batch and draft length: data sets differ by that much [-]."""
    table = pd.DataFrame({"b": rows.batch, "k": rows.length, "cost": np.log(rows.tokens / rows.speedup)})
    return float((table["cost"] - table.groupby(["b", "k"])["cost"].transform("mean")).abs().mean())


def batch_effects(table: pd.DataFrame, profile: str, contexts: tuple[float, ...]) -> dict[str, Any]:
    """Return every law fitted, its errors in and out of the fit, and what the assumed context matters."""
    rows = eagle_rows(table, profile, CONTEXT)
    every = np.ones(rows.batch.size, bool)
    result: dict[str, Any] = {"n": int(rows.batch.size), "target": TARGET, "context": CONTEXT, "profile": profile}
    result["laws"] = {
        name: {
            "meaning": law.meaning,
            "numbers": (x := fit(law, rows, every)).tolist(),
            "fit": score(law.predict(rows, x), rows),
            "batch_left_out": score(left_out(law, rows), rows),
            "bias_by_batch": {
                f"{b:.0f}": float((law.predict(rows, x) / rows.speedup - 1)[rows.batch == b].mean())
                for b in np.unique(rows.batch)
            },
            "regret": regret(law.predict(rows, x), rows),
        }
        for name, law in LAWS.items()
    }
    alone = rows.batch == 1
    single = fit(LAWS["draft cost"], rows, alone)
    result["draft_cost_at_batch_1_ms"] = float(single[0])
    result["error_at_batch_1"] = error_summary(LAWS["draft cost"].predict(rows, single)[alone], rows.speedup[alone])
    result["floor_mape"] = floor(rows)
    result["by_context"] = {}
    for context in contexts:
        r = eagle_rows(table, profile, context)
        names = ("draft cost", CLAIMED)
        errors = {name: score(LAWS[name].predict(r, fit(LAWS[name], r, every)), r)["mape"] for name in names}
        result["by_context"][f"{context:.0f}"] = errors
    return result | {"plain_step_at_32": plain_step(table, rows)}


def plain_step(table: pd.DataFrame, rows: Rows) -> dict[str, Any]:
    """Return the plain decode step at batch 32, measured (batch / throughput) and by the latency model [ms]."""
    method, hardware, _ = EAGLE
    at = (table["method"] == method) & (table["hardware"] == hardware) & (table["batch_size"] == 32)
    rates = table[at].groupby("dataset")["baseline_tok_s"].first().dropna()
    return {
        "measured_ms": {str(k): 32e3 / float(v) for k, v in rates.items()},
        "predicted_ms": 1e3 * float(rows.decode[rows.batch == 32][0]),
    }


# --- the study -------------------------------------------------------------------------------------------------------


def analyse(data: Path, contexts: tuple[float, ...]) -> dict[str, Any]:
    """Return the result of the study."""
    table = read_published(data / "published_speculation.csv")
    rows = timed_rows(table, read_verify(data / "verify_latency.csv"))
    report = validate_speculation(data / "published_speculation.csv")
    fits = rows[rows["fits_one_step"] == True]  # noqa: E712  (None is neither)
    unknown = rows[rows["fits_one_step"].isna()]
    missed = rows[rows["error"].abs() > 2 * MEDIAN]
    eagle = {name: batch_effects(table, name, contexts) for name in PROFILES}
    explained = (missed["implied_verify"] > 1.2) | (missed["implied_verify"] < 1)
    return {
        "verdicts": {
            "time model: median error at most 5 %, all rows": report["time_model"]["median_ape"] <= MEDIAN,
            "time model: median error at most 5 %, verification fits one step": summary(fits)["median_ape"] <= MEDIAN,
            "rows that miss have a verify pass of more than 1.2 steps, or less than one": bool(explained.all()),
            **{name: all(found[name] for found in map(eagle_verdicts, eagle.values())) for name in EAGLE_VERDICTS},
        },
        "source": "published_speculation.csv and verify_latency.csv, figures with their sources row by row",
        "time_model": {
            "all": report["time_model"],
            "median_without": without_a_source(rows),
            "fits_one_step": summary(fits),
            "not_known": summary(unknown),
            "not_known_narrow": summary(unknown[unknown["width"] <= 13]),
            "not_known_wide": summary(unknown[unknown["width"] > 13]),
            "rows": [{k: clean(v) for k, v in row.items()} for row in rows.to_dict("records")],
        },
        "length_model": report["length_model"],
        "length_by_method": [g for g in report["by_group"] if g["model"] == "length"],
        "skipped": {k: [{"reason": r["reason"], "rows": r["rows"]} for r in v] for k, v in report["skipped"].items()},
        "eagle": eagle,
    }


EAGLE_VERDICTS = tuple(name for name in EXPECTED if name.startswith("EAGLE-3"))


def eagle_verdicts(eagle: dict[str, Any]) -> dict[str, bool]:
    """Return the verdicts of the second check for one profile."""
    laws = eagle["laws"]
    fitted = laws["draft cost"]["fit"]["mape"]
    out = {name: law["batch_left_out"]["mape"] for name, law in laws.items()}
    others = min(error for name, error in out.items() if name != CLAIMED)
    answers = (fitted <= ONE_NUMBER, out[CLAIMED] <= TWO_NUMBERS * out["draft cost"], out[CLAIMED] < others)
    return dict(zip(EAGLE_VERDICTS, answers, strict=True))


def clean(value: Any) -> Any:
    """Return a value as JSON has it: absent numbers as null, numpy's numbers as Python's."""
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 4)
    return value


def without_a_source(rows: pd.DataFrame) -> dict[str, float]:
    """Return the median error with the rows of one source left out [-]."""
    return {str(name): summary(rows[rows["source"] != name])["median_ape"] for name in rows["source"].unique()}


def summary(rows: pd.DataFrame) -> dict[str, float]:
    """Return the error summary of some of the rows."""
    return error_summary(rows["predicted"], rows["measured"])


def plot(result: dict[str, Any], data: Path, path: Path) -> None:
    """Draw predicted against measured speed-ups, and the speed-up over the batch size."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    rows = pd.DataFrame(result["time_model"]["rows"])
    for (source, method), part in rows.groupby(["source", "method"]):
        left.plot(part["measured"], part["predicted"], "o", ms=5, label=f"{source[:12]}, {method} ({len(part)})")
    ends = np.array([0.8, 12.0])
    left.plot(ends, ends, "k-", lw=0.8)
    left.fill_between(ends, 0.95 * ends, 1.05 * ends, color="0.85", label="5 %")
    left.set(xscale="log", yscale="log", xlabel="measured speed-up", ylabel="predicted speed-up")
    left.set_title(f"lengths and step times given: median error {result['time_model']['all']['median_ape']:.1%}")
    left.legend(fontsize=7)
    table = read_published(data / "published_speculation.csv")
    eagle = eagle_rows(table, PROFILES[0], CONTEXT)
    for length, colour in ((1, "tab:blue"), (2, "tab:green"), (3, "tab:orange"), (4, "tab:red")):
        at = eagle.length == length
        right.plot(eagle.batch[at], eagle.speedup[at], "o", ms=4, color=colour, label=f"measured, K = {length}")
        for name, style in (("draft cost", ":"), (CLAIMED, "-")):
            curve = LAWS[name].predict(eagle, np.array(result["eagle"][PROFILES[0]]["laws"][name]["numbers"]))[at]
            mean = pd.Series(curve).groupby(eagle.batch[at]).mean()
            right.plot(mean.index, mean.to_numpy(), style, color=colour)
    right.axhline(1, color="k", lw=0.8)
    right.set(xscale="log", xlabel="batch", ylabel="speed-up")
    right.set_xticks([1, 8, 16, 32, 64], ["1", "8", "16", "32", "64"])
    right.minorticks_off()
    right.set_title("EAGLE-3, Llama-3.1-8B, H100: dotted one draft cost,\nsolid with the end of the batch")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def readme(result: dict[str, Any]) -> str:
    """Return README.md with the numbers of the result."""
    time, eagle = result["time_model"], result["eagle"][PROFILES[0]]
    rows = "\n".join(
        f"| {r['line']} | {r['source']} | {r['method']} | {r['data']} | {r['gamma']} | {r['width']:.0f} | "
        f"{r['predicted']:.2f} | {r['measured']:.2f} | {r['error']:+.1%} | {r['implied_verify']:.2f} | "
        f"{ {True: 'yes', False: 'no', None: 'not known'}[r['fits_one_step']] } |"
        for r in time["rows"]
    )
    laws = "\n".join(
        f"| {profile} | {name} | {', '.join(f'{x:.3g}' for x in law['numbers'])} | {law['fit']['mape']:.1%} | "
        f"{law['fit']['median_ape']:.1%} | {law['batch_left_out']['mape']:.1%} | "
        f"{law['batch_left_out']['faster_or_slower_right']:.0%} | {law['regret']['mean']:.1%} |"
        for profile, found in result["eagle"].items()
        for name, law in found["laws"].items()
    )
    bias = "\n".join(
        f"| {b} | {eagle['laws']['draft cost']['bias_by_batch'][b]:+.1%} | "
        f"{eagle['laws'][CLAIMED]['bias_by_batch'][b]:+.1%} |"
        for b in eagle["laws"]["draft cost"]["bias_by_batch"]
    )
    lengths = "\n".join(
        f"| {g['source'][:40]} | {g['method']} | {g['n']} | {g['mape']:.1%} | {g['bias']:+.1%} |"
        for g in result["length_by_method"]
    )
    skipped = "\n".join(f"- {r['rows']}: {r['reason']}" for r in result["skipped"]["time_model"])
    step = eagle["plain_step_at_32"]
    one, two = eagle["laws"]["draft cost"], eagle["laws"][CLAIMED]
    contexts = ", ".join(f"{c} tokens {e['draft cost']:.1%} / {e[CLAIMED]:.1%}" for c, e in eagle["by_context"].items())
    verdicts = "\n".join(f"- {name}: **{'yes' if v else 'no'}**" for name, v in result["verdicts"].items())
    return README.format(
        all=time["all"],
        fits=time["fits_one_step"],
        narrow=time["not_known_narrow"],
        wide=time["not_known_wide"],
        rows=rows,
        laws=laws,
        bias=bias,
        lengths=lengths,
        length=result["length_model"],
        skipped=skipped,
        eagle=eagle,
        one=one,
        two=two,
        alone=eagle["error_at_batch_1"],
        measured=", ".join(f"{v:.2f}" for v in step["measured_ms"].values()),
        step=step,
        contexts=contexts,
        verdicts=verdicts,
        without=", ".join(f"{v:.1%} without {k.strip()}" for k, v in time["median_without"].items()),
        meanings="; ".join(f"{name}: {law.meaning}" for name, law in LAWS.items()),
    )


README = """# Measured speed-ups: what lengths, step times and batches explain

**Claim.** Given measured tokens per round and step times, the time model reproduces measured speed-ups within 5 %
(median); and what it misses at larger batches is mostly that a batch ends with its slowest request.

{verdicts}

Written by `python studies/measured_speedups/run.py --data DIR`, which fails when a verdict changes.

![predicted and measured](speedups.png)

## 1. Time model: S = E[N] / (gamma T_D/T_T + T_V/T_T)

All {all[n]} rows that state a length, both step times and a speed-up: **median error {all[median_ape]:.1%}**, mean
{all[mape]:.1%}, bias {all[bias]:+.1%}, 90 % within {all[p90_ape]:.1%}. No verify time of the same source covers one of
these rows, so T_V = T_T is assumed for all; only tokens, step times and speed-up are measured, nothing is fitted.

The median is close to the claim and leans on one source: {without}.

Whether T_V = T_T is fair is judged beforehand: by the datasheet, the verify pass fits into the measured decode step
(these engines are host-bound) for {fits[n]} rows: median {fits[median_ape]:.1%}, bias {fits[bias]:+.1%}. For the CPU
rows nothing of the kind is known.

| line | source | method | data | gamma | width | predicted | measured | error | T_V/T_T needed | fits a step |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}

The rows that miss:

- **CPU, wide verification** (EPYC, K of 16 and more): {wide[bias]:+.1%} on {wide[n]} rows; {narrow[bias]:+.1%} on the
  {narrow[n]} with K up to 12. The same T_V/T_T of about 1.3 explains all the wide ones and about 1.05 the narrow ones:
  on a CPU verification of 17 tokens and more is not one step. Its source has no verify times.
- **T4**: errors fall from positive to negative with K; K = 7 and 10 would need a verify pass shorter than a decode
  step. Draft steps measured in a separate run are too long for this loop, or it drafts less than K (its notes say the
  draft schedule may be adaptive). K = 3 and 5 would need 1.3 to 1.4 steps although the datasheet leaves room: the same
  source measured 1.83 steps for a tree of 16 nodes, so fitting by the datasheet is necessary, not sufficient.
- **Trees on the A100, sampling** (temperature 0.6): T_V/T_T of about 1.1 where greedy decoding needs 1.04; sampling
  without replacement over a tree takes time that the two step times do not contain (a guess, not measured).
- **SpecInfer, MT-Bench, greedy**: faster than its own step times allow even if verification were free of any extra;
  the stated 24.2 ms or its speed-up is off.

Rows of the file that are left out, by reason:

{skipped}

## 2. Length model: E[N] = (1 - alpha^(gamma+1)) / (1 - alpha)

alpha of the shortest draft length of a series predicts the other lengths: median error {length[median_ape]:.1%}, mean
{length[mape]:.1%}, bias {length[bias]:+.1%}, n {length[n]}. An accepted fraction is no test of its own row.

| source | method | n | mean error | bias |
|---|---|---|---|---|
{lengths}

The law is good for drafts that draft one token after another and bad for those that draft all at once (PARD), whose
acceptance falls with the position; on a single prompt (EPYC) the acceptance itself moves between runs.

## 3. Batch effects: EAGLE-3 on an H100, {eagle[n]} rows

Target {eagle[target]} (bf16, {eagle[context]:.0f} cached tokens assumed), T_T and T_V from the latency model, tokens
per round measured. Text and plot: profile `{eagle[profile]}`.

| profile | numbers fitted | values | mean error | median | batch left out | side of 1 | lost by K |
|---|---|---|---|---|---|---|---|
{laws}

Values: {meanings}.
"Batch left out": each batch size predicted by numbers fitted on the others (mean error, and share of rows on the right
side of 1). "Lost by K": speed-up given away, on average, by taking the draft length with the best prediction. The data
sets differ among themselves: a free number for each batch and draft length would still err by {eagle[floor_mape]:.1%}.

| batch | bias, draft cost alone | bias, with the end of the batch |
|---|---|---|
{bias}

- **At batch 1 one draft cost suffices**: {eagle[draft_cost_at_batch_1_ms]:.2f} ms a draft step, mean error
  {alone[mape]:.1%} on {alone[n]} rows. With the end of the batch the fit over all rows has {two[numbers][0]:.2f} ms.
- **One draft cost for all batches errs by {one[fit][mape]:.1%}**, low at batch 1 and high at large ones.
- **The end of the batch** is what is missing. A batch of prompts of one output length ends with its slowest request.
  Plain decoding has none; with speculation requests advance by different tokens per round, and the slowest of B is
  about e_B spreads behind the mean (e_B: mean of the largest of B normal numbers). With accepted tokens spread by a
  share s over requests, time grows by 1 + s e_B (E[N] - 1)/E[N]; s = {two[numbers][1]:.2f} brings the mean error to
  {two[fit][mape]:.1%}, and {two[batch_left_out][mape]:.1%} with the batch left out. Costs per round, per request, or
  per draft step and request do not (table). A measured spread of accepted tokens between requests would test it.
- A serving system that refills its batch has no such end: there, use the draft cost alone.
- Plain step at batch 32: {measured} ms measured on three data sets, {step[predicted_ms]:.2f} ms predicted
  (kernels only).
- Assumed context, mean error with one / two numbers: {contexts}.
"""


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    of = result["time_model"]["all"]
    return f"time model {of['median_ape']:.1%} from the measured speed-ups in the median, {of['mape']:.1%} in the mean"


def validations(result: dict[str, Any]) -> list[Validation]:
    """Return the time model, the length model and the law of EAGLE-3 against the published measurements."""
    errors = [abs(r["error"]) for r in result["time_model"]["rows"]]
    out = [
        Validation.of(
            result["time_model"]["all"],
            "speculation",
            "speed-up from tokens per round and step times",
            "published measurements",
            "nothing",
            worst=max(errors),
        ),
        Validation.of(
            result["length_model"],
            "speculation",
            "tokens per round from acceptance and draft length",
            "published measurements",
            "nothing",
        ),
    ]
    for profile, of in result["eagle"].items():
        for name, law in of["laws"].items():
            out.append(
                Validation.of(
                    law["batch_left_out"],
                    "speculation",
                    f"speed-up of EAGLE-3 at batch sizes left out, {name}, profile {profile}",
                    "published measurements",
                    f"{law['meaning']}, on the other batch sizes",
                )
            )
    return out


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.data, (CONTEXT,) if given.quick else CONTEXTS),
    readme,
    headline,
    draw=lambda given, result: plot(result, given.data, given.folder / "speedups.png"),
    expected=EXPECTED,
    n=lambda result: result["time_model"]["all"]["n"],
    validations=validations,
    data=Data("speculation", ("published_speculation.csv", "verify_latency.csv")),
    quick="one context",
    recheck=True,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

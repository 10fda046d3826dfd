"""Claim: log-normal laws cut at the longest request give the mean lengths of the conversation trace within 10 %.

They are not the law of the trace: prompts and outputs come in lumps, and the test rejects them. The study says by how
much they miss what a serving simulation feels: quantiles, the KV load of a request, prompts with outputs, bursts.

    python studies/conversation_lengths/run.py --trace FILE [--quick] [--output DIR]

FILE is the Azure LLM inference trace 2023 (conversation) as a CSV (columns: see ``simulator.traces.read_trace``).
Exits with 1 when a verdict differs from the one in EXPECTED.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import spearmanr

from simulator.traces import read_trace
from simulator.workload import LogNormalLengths, Workload
from studies.study import Bar, Data, Study

HERE = Path(__file__).parent
SEED = 20231116  # of the resampling; the day of the trace
RESAMPLES = 200  # for the 95 % intervals; 20 with --quick
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)  # [-]
TOLERANCE = 0.10  # a claim holds when its relative error is at most this [-]
CONTEXT = 4096  # longest sequence of Llama-2, the models of the shipped scenario [tokens]
EXPECTED = {"mean lengths": True, "mean lengths at context 4096": True, "mean KV load": False, "quantiles": False}
KS_99 = 1.628  # 1 % critical value of sqrt(n) D (Smirnov 1948); parameters were fitted, so this is lenient
DRAWN = 200_000  # requests drawn to compare derived quantities

Ints = NDArray[np.int64]


def fit(values: Ints, counts: Ints, high: int) -> LogNormalLengths:
    """Return the maximum-likelihood log-normal law cut to [1, high], each length being a whole token.

    The likelihood of a length l is P(l - 1/2 <= X < l + 1/2), given the cut.
    """
    logs = np.log(values)
    mean = float(np.average(logs, weights=counts))
    start = (mean, 0.5 * np.log(np.average((logs - mean) ** 2, weights=counts)))

    def loss(point: tuple[float, float]) -> float:
        law = LogNormalLengths(float(np.exp(point[0])), float(np.exp(point[1])), 1, high)
        mass = law.cdf(values) - law.cdf(values - 1)
        return -float(counts @ np.log(np.maximum(mass, 1e-300)))

    best = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-3}).x
    return LogNormalLengths(float(np.exp(best[0])), float(np.exp(best[1])), 1, high)


def intervals(lengths: Ints, high: int, resamples: int, rng: np.random.Generator) -> dict[str, list[float]]:
    """Return 95 % intervals of median and sigma by resampling requests; the cut stays."""
    values, counts = np.unique(lengths, return_counts=True)
    draws = rng.multinomial(lengths.size, counts / lengths.size, size=resamples)
    laws = [fit(values[drawn > 0], drawn[drawn > 0], high) for drawn in draws]
    ends = [2.5, 97.5]
    return {name: np.percentile([getattr(law, name) for law in laws], ends).tolist() for name in ("median", "sigma")}


def misfit(lengths: Ints, law: LogNormalLengths) -> dict[str, Any]:
    """Return the distance of the law from the lengths: Kolmogorov-Smirnov, mean and quantiles."""
    values = np.unique(lengths)
    empirical = np.searchsorted(np.sort(lengths), values, side="right") / lengths.size
    before = np.concatenate([[0.0], empirical[:-1]])
    distance = max(np.abs(empirical - law.cdf(values)).max(), np.abs(before - law.cdf(values - 1)).max())
    grid = np.arange(law.high + 1)
    rows = []
    for q in QUANTILES:
        trace, fitted = float(np.quantile(lengths, q)), int(grid[np.searchsorted(law.cdf(grid), q)])
        rows.append({"quantile": q, "trace_tokens": trace, "fit_tokens": fitted, "error": fitted / trace - 1})
    mean = float(lengths.mean())
    return {
        "ks_distance": float(distance),
        "ks_critical_1_percent": KS_99 / float(np.sqrt(lengths.size)),
        "mean_trace_tokens": mean,
        "mean_fit_tokens": law.mean,
        "mean_error": law.mean / mean - 1,
        "share_of_20_commonest_lengths": float(np.sort(np.unique(lengths, return_counts=True)[1])[-20:].sum())
        / lengths.size,
        "quantiles": rows,
    }


def study(lengths: Ints, high: int, resamples: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return the law fitted to one kind of length and everything said about it."""
    law = fit(*np.unique(lengths, return_counts=True), high)
    fitted = {"median_tokens": law.median, "sigma": law.sigma, "low_tokens": law.low, "high_tokens": law.high}
    return {"fit": fitted, "interval_95": intervals(lengths, high, resamples, rng), **misfit(lengths, law)}


def law_of(part: dict[str, Any]) -> LogNormalLengths:
    """Return the fitted law of a part of the result."""
    f = part["fit"]
    return LogNormalLengths(f["median_tokens"], f["sigma"], f["low_tokens"], f["high_tokens"])


def kv_load(prompt: Ints, output: Ints) -> NDArray[np.float64]:
    """Return the KV load of requests, tokens held summed over the output tokens: L (P + L / 2) [tokens^2]."""
    return output * (prompt + output / 2.0)


def together(trace: Workload, prompt: LogNormalLengths, output: LogNormalLengths, rng: np.random.Generator) -> Any:
    """Return what independent laws miss of the pairs, and how bursty arrivals are."""
    rank = spearmanr(trace.prompt, trace.output)
    load, load_fit = kv_load(trace.prompt, trace.output), kv_load(prompt.draw(DRAWN, rng), output.draw(DRAWN, rng))
    shuffled = kv_load(trace.prompt, rng.permutation(trace.output))
    gaps = np.diff(trace.arrival)
    return {
        "rank_correlation_prompt_output": float(rank.statistic),
        "mean_output_after_long_prompts": float(trace.output[trace.prompt > CONTEXT // 2].mean()),
        "mean_output_after_short_prompts": float(trace.output[trace.prompt <= CONTEXT // 2].mean()),
        "kv_load_error_mean": float(load_fit.mean() / load.mean() - 1),
        "kv_load_error_p99": float(np.quantile(load_fit, 0.99) / np.quantile(load, 0.99) - 1),
        "kv_load_error_mean_if_only_pairs_are_shuffled": float(shuffled.mean() / load.mean() - 1),
        "arrival_rate_per_s": trace.rate,
        "arrival_cv": float(gaps.std() / gaps.mean()),
        "arrival_lag_1_correlation": float(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]),
        "requests_per_minute_variance_over_mean": _dispersion(trace.arrival),
    }


def _dispersion(arrival: NDArray[np.float64]) -> float:
    """Return the variance of requests a minute over their mean: 1 for a Poisson process."""
    counts = np.bincount((arrival // 60).astype(int))[:-1]  # the last minute is not whole
    return float(counts.var(ddof=1) / counts.mean())


def plot(trace: Workload, result: dict[str, Any], path: Path) -> None:
    """Draw the distribution functions of both kinds of length."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, name, lengths in zip(axes, ("prompt", "output"), (trace.prompt, trace.output), strict=True):
        law, x = law_of(result["whole"][name]), np.sort(lengths)
        axis.plot(x, np.arange(1, x.size + 1) / x.size, label=f"trace, {x.size} requests", color="tab:blue")
        grid = np.unique(np.geomspace(law.low, law.high, 400).round())
        label = f"log-normal, median {law.median:.0f}, sigma {law.sigma:.2f},\ncut at {law.high}"
        axis.plot(grid, law.cdf(grid), "--", color="tab:orange", label=label)
        axis.set(xscale="log", xlabel=f"{name} length [tokens]", xlim=(max(5, x[0]), law.high))
        axis.legend(loc="upper left", fontsize=8, frameon=False)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests at most this long [-]")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each claim with its error and whether it holds."""
    whole, served = result["whole"], result["served_at_context_4096"]
    worst = {
        "mean lengths": max(abs(part["mean_error"]) for part in whole.values()),
        "mean lengths at context 4096": max(abs(served[name]["mean_error"]) for name in ("prompt", "output")),
        "mean KV load": abs(result["together"]["kv_load_error_mean"]),
        "quantiles": max(abs(row["error"]) for part in whole.values() for row in part["quantiles"]),
    }
    return [{"claim": name, "worst_error": error, "holds": bool(error <= TOLERANCE)} for name, error in worst.items()]


def law_row(name: str, part: dict[str, Any]) -> str:
    """Return a row of the table of laws."""
    f, i = part["fit"], part["interval_95"]
    return (
        f"| {name} | {f['median_tokens']:.0f} ({i['median'][0]:.0f} to {i['median'][1]:.0f}) "
        f"| {f['sigma']:.3f} ({i['sigma'][0]:.3f} to {i['sigma'][1]:.3f}) | {f['high_tokens']} "
        f"| {part['mean_trace_tokens']:.0f} / {part['mean_fit_tokens']:.0f} ({part['mean_error']:+.1%}) "
        f"| {part['ks_distance']:.3f} (critical {part['ks_critical_1_percent']:.3f}) |"
    )


def readme(result: dict[str, Any]) -> str:
    """Return the text of README.md with the numbers of this run."""
    whole, served, t = result["whole"], result["served_at_context_4096"], result["together"]
    laws = [law_row(f"{name}, whole trace", part) for name, part in whole.items()]
    laws += [law_row(f"{name}, prompt at most {served['prompt_at_most']}", served[name]) for name in whole]
    rows = [
        f"| {p['quantile']:g} | {p['trace_tokens']:.0f} / {p['fit_tokens']} ({p['error']:+.0%}) "
        f"| {o['trace_tokens']:.0f} / {o['fit_tokens']} ({o['error']:+.0%}) |"
        for p, o in zip(whole["prompt"]["quantiles"], whole["output"]["quantiles"], strict=True)
    ]
    verdicts = [
        f"| {c['claim']} | {c['worst_error']:.1%} | {'holds' if c['holds'] else 'does not hold'} |"
        for c in result["claims"]
    ]
    lumps = [whole[name]["share_of_20_commonest_lengths"] for name in ("prompt", "output")]
    return README.format(
        verdicts="\n".join(verdicts),
        laws="\n".join(laws),
        rows="\n".join(rows),
        lumps=lumps,
        tolerance=TOLERANCE,
        context=CONTEXT,
        half=CONTEXT // 2,
        **{k: result[k] for k in ("source", "resamples")},
        served=served,
        t=t,
    )


README = """# Lengths of a conversation trace as log-normal laws

**Claim.** Log-normal laws, cut at the longest request, give this within {tolerance:.0%}:

| quantity | worst relative error | verdict |
|---|---|---|
{verdicts}

Source: {source}.
Written by `python studies/conversation_lengths/run.py --trace FILE`, which fails when a verdict changes.

## The laws

| length | median of the uncut law [tokens] | sigma [-] | cut at [tokens] | mean: trace / fit [tokens] | KS distance |
|---|---|---|---|---|---|
{laws}

Maximum likelihood of whole tokens, given the cut to [1, longest of the trace]; intervals are 95 %, by resampling
requests {resamples} times. The second pair is for models of {context} tokens (Llama-2): {served[share_too_long]:.1%} of
the requests are longer than that, prompt and output together, and cannot be served by them. Those laws are fitted to
the {served[requests]} requests with a prompt of at most {served[prompt_at_most]} tokens, so that a prompt and the
longest output always fit.

![distribution functions](lengths.png)

## What a log-normal misses

| quantile | prompt: trace / fit [tokens] | output: trace / fit [tokens] |
|---|---|---|
{rows}

- **It is not the law of the trace.** All KS distances exceed their 1 % critical values. Lengths come in lumps (the 20
  commonest make up {lumps[0]:.0%} of prompts and {lumps[1]:.0%} of outputs), outputs have two modes, and the tails are
  shorter than those of the fit.
- **The KV load of a request**, output x (prompt + output / 2), comes out {t[kv_load_error_mean]:+.1%} in the mean and
  {t[kv_load_error_p99]:+.0%} at the 99th percentile: a scenario with these laws is pessimistic about memory.
- **Independence is a part of that.** The rank correlation of prompt and output is only
  {t[rank_correlation_prompt_output]:.2f}, but prompts of more than {half} tokens get outputs of
  {t[mean_output_after_long_prompts]:.0f} tokens on average and the others {t[mean_output_after_short_prompts]:.0f};
  shuffling the outputs of the trace, lengths unchanged, moves the mean KV load by
  {t[kv_load_error_mean_if_only_pairs_are_shuffled]:+.1%}.
- **Arrivals look Poisson from one to the next and not over minutes.** Gaps have coefficient of variation
  {t[arrival_cv]:.2f} and lag-1 correlation {t[arrival_lag_1_correlation]:.2f} at {t[arrival_rate_per_s]:.2f} request/s,
  but the variance of the requests per minute is {t[requests_per_minute_variance_over_mean]:.0f} times their mean
  (Poisson: 1). A Poisson scenario at the mean rate is optimistic about busy minutes.

For tails (p99 of TTFT, full KV caches) use the trace itself: `read_trace(FILE, rate=...)`.

**What would refute the claim.** An error above {tolerance:.0%} in a quantity said to hold. The fit maximises a
likelihood, not the agreement of means, so the means can miss.
"""


def analyse(trace: Workload, resamples: int) -> dict[str, Any]:
    """Return the result of the study."""
    rng = np.random.default_rng(SEED)
    longest = int(trace.output.max())
    whole = {
        "prompt": study(trace.prompt, int(trace.prompt.max()), resamples, rng),
        "output": study(trace.output, longest, resamples, rng),
    }
    cap = CONTEXT - longest
    kept = trace.prompt <= cap
    served = {
        "prompt_at_most": cap,
        "requests": int(kept.sum()),
        "share_too_long": float((trace.prompt + trace.output > CONTEXT).mean()),
        "prompt": study(trace.prompt[kept], cap, resamples, rng),
        "output": study(trace.output[kept], longest, resamples, rng),
    }
    result = {
        "source": "Azure LLM inference trace 2023, conversation (Azure/AzurePublicDataset, CC-BY), as processed by "
        f"microsoft/vidur; {trace.requests} requests",
        "seed": SEED,
        "resamples": resamples,
        "whole": whole,
        "served_at_context_4096": served,
        "together": together(trace, law_of(whole["prompt"]), law_of(whole["output"]), rng),
    }
    return {"claims": claims(result), **result}


def bars(result: dict[str, Any]) -> list[Bar]:
    """Return the claims with the worst error of each."""
    return [Bar(c["claim"], c["holds"], c["worst_error"], TOLERANCE) for c in result["claims"]]


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    worst = {c["claim"]: c["worst_error"] for c in result["claims"]}
    return f"mean lengths within {worst['mean lengths']:.1%}, quantiles off by up to {worst['quantiles']:.0%}"


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(read_trace(given.data), 20 if given.quick else RESAMPLES),
    readme,
    headline,
    bars=bars,
    draw=lambda given, result: plot(read_trace(given.data), result, given.folder / "lengths.png"),
    expected=EXPECTED,
    n=lambda result: result["served_at_context_4096"]["requests"],
    data=Data("traces/splitwise_conv.csv", option="--trace"),
    quick="20 resamples",
    recheck=True,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

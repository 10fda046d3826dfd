"""Observed runs in the figures of ``tierwise simulate``, so that both can be laid side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.benchmark_readers import Aggregates
from calibration.observe import Load, Observation, Server, Speculation, observe
from simulator import metrics
from theory.errors import require

from .build import resolve
from .figures import PERCENTILES, WARMUP_RULE, published
from .report import write_files
from .requests import Column, write_requests
from .scenario import Scenario, Slo

THROUGHPUT_RULE = "completions and output tokens per second from the first request sent to the last completion"


def observe_scenario(
    server: Server,
    scenario: Scenario,
    folder: Path,
    seed: int | None,
    progress: Callable[[str, int, int], None],
) -> tuple[dict[str, Any], Observation]:
    """Send the requests that ``simulate`` would simulate to a running server; return the figures and the requests.

    Raises
    ------
    InputError
        If the scenario cannot be resolved, or nothing answers at the address.
    """
    used_seed = scenario.search.seed if seed is None else seed
    workload = resolve(scenario, folder, None, used_seed).workload
    require(
        workload.blocks is None,
        "traffic.prefix_block_tokens",
        "must not be given: prompts that share blocks cannot be sent",
        scenario.traffic.prefix_block_tokens,
    )
    load = Load(
        workload.arrival,
        workload.prompt,
        workload.output,
        workload.clients,
        workload.pauses if workload.clients else None,
        workload.cached,
    )
    seen = observe(server, load, np.random.default_rng([used_seed, 4]), progress)
    found = {"scenario": scenario.name, **observed_figures(seen, scenario.slo)}
    found["provenance"] |= {"seed": used_seed, "traffic": workload.source}
    return found, seen


def observed_figures(seen: Observation, slo: Slo | None = None) -> dict[str, Any]:
    """Return the figures of an observed run, with the keys, intervals and warm-up of ``tierwise simulate``.

    Times count from sending. A failed request has no TTFT, TPOT or E2E; it is in ``errors`` and breaks the SLOs.

    Parameters
    ----------
    slo : Slo, optional
        What goodput asks for; without it there is no goodput.
    """
    order = np.argsort(seen.sent, kind="stable")  # what was never sent, nan, comes last
    ok = seen.ok[order]
    kept = _kept(seen, order[ok])
    ttft, tpot, e2e = (x[kept] for x in (seen.ttft, seen.tpot, seen.e2e))
    tpot = tpot[np.isfinite(tpot) & (tpot > 0)]
    speed = metrics.summary(1.0 / tpot)
    counted = seen.output[kept]
    rate = _rate(seen, kept)
    return published(
        {
            "requests": len(seen.status),
            "answered": int(ok.sum()),
            "warmup_requests": int(ok.sum()) - kept.size,
            "errors": seen.errors(),
            "ended": seen.ended,
            "ttft_s": metrics.summary(ttft),
            "tpot_s": metrics.summary(tpot),
            "e2e_s": metrics.summary(e2e),
            "user_speed_tokens_per_s": speed,
            "throughput": {
                "requests_per_s": rate,
                "output_tokens_per_s": metrics.scaled(rate, float(counted.mean())) if kept.size else metrics.UNKNOWN,
                "per_user": speed.mean,
            },
            "goodput": _goodput(seen, order, kept, rate, slo),
            "client_lag_s": metrics.summary((seen.sent - seen.due)[np.isfinite(seen.sent) & np.isfinite(seen.due)]),
            "tokens": {
                "prompt_asked": _mean(seen.prompt_asked[kept]),
                "prompt": _mean(seen.prompt[kept]),
                "output_asked": _mean(seen.output_asked[kept]),
                "output": _mean(counted),
                "per_word": _finite(seen.tokens_per_word),
                "counted_requests": int(np.isfinite(counted).sum()),
            },
            "intervals": {"level": metrics.LEVEL, "method": "batch means of one run"},
            "rules": {"warmup": WARMUP_RULE, "throughput": THROUGHPUT_RULE},
            "provenance": {"measured": seen.source},
        }
    ) | {"speculation": _speculation(seen.speculation)}


def aggregate_figures(read: Aggregates) -> dict[str, Any]:
    """Return the figures of a file that holds no single requests: without intervals, nothing left out as warm-up.

    Examples
    --------
    >>> read = Aggregates("a file", 10, {}, {"mean": 0.2}, {"mean": 0.01}, {}, 2.0, 100.0)
    >>> found = aggregate_figures(read)
    >>> found["ttft_s"]["mean"], found["ttft_s"]["p99"], found["ttft_s"]["interval"]
    (0.2, None, [None, None])
    """
    tables = {"ttft_s": read.ttft_s, "tpot_s": read.tpot_s, "e2e_s": read.e2e_s}
    answered = read.answered
    return published(
        {
            "requests": answered + sum(read.errors.values()),
            "answered": answered,
            "warmup_requests": 0,
            "errors": read.errors,
            "ended": "complete",
            **{key: _without_intervals(table, answered) for key, table in tables.items()},
            "throughput": {
                "requests_per_s": _alone(read.requests_per_s),
                "output_tokens_per_s": _alone(read.tokens_per_s),
                "per_user": None,
            },
            "goodput": None,
            "provenance": {"measured": read.source},
        }
    ) | {"speculation": _speculation(read.speculation)}


def _without_intervals(table: Mapping[str, float], count: int) -> metrics.Summary:
    mean, p50, p90, p95, p99 = (_alone(table.get(name, math.nan)) for name in PERCENTILES)
    return metrics.Summary(mean, p50, p90, p95, p99, count, False)


def _alone(value: float) -> metrics.Estimate:
    return metrics.without_interval(metrics.Estimate(value, math.nan, math.nan))


def _kept(seen: Observation, served: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the requests that count, in the order of sending: answered, and past the warm-up of an open loop."""
    if seen.closed or served.size == 0 or np.isnan(seen.sent[served]).any():
        return served
    return served[metrics.warmup_requests(seen.sent[served], seen.e2e[served]) :]


def _rate(seen: Observation, kept: NDArray[np.intp]) -> metrics.Estimate:
    """Return requests answered per second, over all that were answered [requests/s]."""
    end = seen.completion[seen.ok]
    if kept.size == 0 or np.isnan(end).all():
        return metrics.UNKNOWN
    edges = np.linspace(float(np.nanmin(seen.sent)), float(np.nanmax(end)), metrics.SLICES + 1)
    return metrics.time_mean(metrics.rates(end, edges), end.size)


def _goodput(
    seen: Observation, order: NDArray[np.intp], kept: NDArray[np.intp], rate: metrics.Estimate, slo: Slo | None
) -> dict[str, metrics.Estimate] | None:
    """Return the share of the requests sent past the warm-up that were answered within the SLOs, and their rate."""
    if slo is None or kept.size == 0:
        return None
    late = order[np.flatnonzero(order == kept[0])[0] :]
    late = late[np.isfinite(seen.sent[late])]
    tpot = np.where(np.isnan(seen.tpot), 0.0, seen.tpot)  # of one token, or of none counted: it cannot break a mean
    good = seen.ok & (seen.ttft <= slo.ttft_p99_s) & (tpot <= slo.tpot_mean_s)
    if slo.e2e_p99_s is not None:
        good &= seen.e2e <= slo.e2e_p99_s
    share = metrics.share_interval(good[late])
    return {"fraction": share, "requests_per_s": metrics.product(rate, metrics.scaled(share, late.size / kept.size))}


def _speculation(spent: Speculation | None) -> dict[str, Any] | None:
    if spent is None or spent.drafts == 0:
        return None
    return {
        "acceptance": _finite(spent.acceptance),
        "tokens_per_round": _finite(spent.tokens_per_round),
        "rounds": spent.drafts,
        "drafted_tokens": spent.drafted,
        "accepted_tokens": spent.accepted,
        "accepted_by_position": [a / spent.drafts for a in spent.by_position],
    }


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def observed_columns(seen: Observation) -> tuple[Column, ...]:
    """Return one row per request, in the order of the load; what did not happen stays empty."""
    kinds = tuple(sorted(set(seen.status)))
    return (
        Column("request", np.arange(len(seen.status))),
        Column("status", np.array([kinds.index(s) for s in seen.status]), names=kinds),
        Column("due_s", seen.due, 6),
        Column("sent_s", seen.sent, 6),
        Column("first_token_s", seen.first_token, 6),
        Column("completion_s", seen.completion, 6),
        Column("prompt_tokens_asked", seen.prompt_asked),
        Column("output_tokens_asked", seen.output_asked),
        Column("prompt_tokens", seen.prompt),
        Column("output_tokens", seen.output),
    )


def write_observation(found: dict[str, Any], seen: Observation | None, folder: Path) -> list[Path]:
    """Write observe.json and, where requests are known one by one, requests.csv; return their paths.

    Raises
    ------
    InputError
        If the folder cannot be made or written.
    """
    content = (json.dumps(found, indent=2, allow_nan=False) + "\n").encode()
    writers: dict[str, Callable[[Path], object]] = {"observe.json": lambda path: path.write_bytes(content)}
    if seen is not None:
        writers["requests.csv"] = lambda path: write_requests((observed_columns(seen),), "csv", path)
    return write_files(folder, writers)

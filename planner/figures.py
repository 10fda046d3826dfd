"""What a simulated plan did, in figures: a tree of estimates for one run, for several, and as the keys of the JSON.

A leaf that is an estimate carries its interval; in the JSON it becomes two keys, ``x`` and ``x_interval`` (``interval``
beside a ``mean`` or a ``fraction``). Replications are joined leaf by leaf: :func:`simulator.metrics.replicated`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator import metrics
from simulator.cluster import ClusterRecords
from simulator.engine import Records
from simulator.metrics import Estimate, Metrics, Summary
from theory.cost import SERVING, dollars_per_correct_answer, dollars_per_million_tokens, joules, joules_at_most
from theory.errors import require
from theory.specs import Accelerator

from .build import Problem
from .search import Candidate, Group, price

Tree = dict[str, Any]  # of numbers, texts, estimates, summaries, lists and trees

SHARES = (
    "fraction",
    "good_fraction",
    "share",
    "stop_fraction",
    "quality",
    "utilisation",
    "acceptance",
    "cached_prompt_share",
)  # within 0 and 1
SUMMED = ("requests", "warmup_requests", "refused")  # over replications; any other number is the same in all [-]
STATUS_RULE = (
    "overloaded if, at any tier, the waiting line never emptied from the median arrival to the last, was longer at the "
    f"end of that time, and the last request waited for more than {metrics.STEPS:g} mean steps; else steady; what "
    "grows with the length of an overloaded run has no interval"
)
WARMUP_RULE = (
    f"the first {metrics.WARMUP_SHARE:.0%} of the requests, or those that arrive within {metrics.WARMUP_TIMES:g} mean "
    "E2E of the first if that is more, at most half; none in a closed loop"
)


def figures(problem: Problem, candidate: Candidate, records: ClusterRecords) -> Tree:
    """Return the figures of a run; times of visits pool all tiers, ``e2e_s`` ends with the final answer.

    Raises
    ------
    InputError
        If every request was refused.
    """
    kept = measured(problem, records)
    late = np.zeros(records.arrival.size, dtype=bool)
    late[kept] = True
    rate = _rate(problem, records)
    flow = metrics.scaled(rate, float(records.output[kept].mean()))
    good, served = _good(problem, records, kept)
    quality = None if np.isnan(records.correct).all() else metrics.share_interval(records.correct[kept])
    tiers = [
        (group, _measure(problem, run_of, late[who]), who)
        for group, run_of, who in zip(in_order(candidate), records.tiers, records.visitors, strict=True)
    ]
    busy = _weighted([(group.gpus, m.utilisation) for group, m, _ in tiers])
    drawn = _weighted(
        [(group.gpus * group.service.deployment.accelerator.power, m.utilisation) for group, m, _ in tiers]
    )
    times = _times(records, kept, late)
    return {
        "requests": int(problem.workload.requests),
        "warmup_requests": int(np.count_nonzero(~records.refused)) - kept.size,
        "refused": int(records.refused.sum()),
        "left_out_fraction": problem.left_out,
        "status": records.status,
        **times,
        "throughput": {
            "requests_per_s": rate,
            "output_tokens_per_s": flow,
            "per_gpu": metrics.scaled(flow, 1 / candidate.gpus),
            "per_user": times["user_speed_tokens_per_s"].mean,
        },
        "goodput": {
            "fraction": good,
            "requests_per_s": metrics.product(rate, metrics.scaled(good, 1 / served)),
        },
        "in_system": {"mean": _inside(problem, records, kept)},
        "utilisation": {"mean": busy},
        "rounds_per_request": metrics.mean_interval(records.rounds[kept]),
        "preemptions_per_request": metrics.mean_interval(records.preemptions[kept]),
        "tiers": [
            _tier(problem, group, m)
            | {
                "share": metrics.share_interval(np.isin(kept, who)),
                "stop_fraction": metrics.share_interval(records.answer[kept] == i),
            }
            for i, (group, m, who) in enumerate(tiers)
        ],
        "quality": {"mean": quality} if quality else None,
        "cost": _money(problem, candidate, rate, flow, quality)
        | {"gpu_s_per_request": metrics.mean_interval(records.gpu_s[kept])},
        "energy_j": _energy(candidate, rate, flow, drawn),
    }


def _times(records: ClusterRecords, kept: NDArray[np.intp], late: NDArray[np.bool_]) -> dict[str, Summary]:
    grows = records.status == "overloaded"
    ttft, tpot = visit_times(records, late)
    tpot = tpot[tpot > 0]  # a visit of one token has none
    return {
        "ttft_s": metrics.summary(ttft, grows),
        "tpot_s": metrics.summary(tpot),
        "e2e_s": metrics.summary((records.completion - records.arrival)[kept], grows),
        "answer_ttft_s": metrics.summary((records.first_token - records.arrival)[kept], grows),
        "user_speed_tokens_per_s": metrics.summary(1.0 / tpot),
    }


def _inside(problem: Problem, records: ClusterRecords, kept: NDArray[np.intp]) -> Estimate:
    """Return the time average of the requests between arrival and answer."""
    edges = metrics.slices(records.arrival, records.completion, kept, problem.workload.clients > 0)
    mean = metrics.time_mean(metrics.present(records.arrival, records.completion, edges), kept.size)
    return metrics.without_interval(mean) if records.status == "overloaded" else mean


def measured(problem: Problem, records: ClusterRecords) -> NDArray[np.intp]:
    """Return the requests that count: served, and past the warm-up of an open loop.

    Raises
    ------
    InputError
        If every request was refused.
    """
    served = np.flatnonzero(~records.refused)
    require(served.size > 0, "kv_tokens", "must hold at least one request; every request was refused", 0)
    e2e = (records.completion - records.arrival)[served]
    return served[0 if problem.workload.clients else metrics.warmup_requests(records.arrival[served], e2e) :]


def visit_times(records: ClusterRecords, late: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return TTFT [s] and TPOT [s/token] of the visits of some requests to all tiers, in the order of their arrival."""
    some = [
        (r, late[who] & ~r.refused) for r, who in zip(records.tiers, records.visitors, strict=True) if r is not None
    ]
    began = np.argsort(np.concatenate([r.arrival[k] for r, k in some]), kind="stable")
    times = [tuple(x[k] for x in times_of(r)) for r, k in some]
    ttft, tpot = (np.concatenate([t[i] for t in times])[began] for i in (0, 1))
    return ttft, tpot


def times_of(records: Records) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return TTFT [s] and TPOT [s/token] of each visit to a tier; TPOT is 0 where one token was asked for."""
    ttft = records.first_token - records.arrival
    return ttft, (records.completion - records.first_token) / np.maximum(records.output - 1, 1)


def _rate(problem: Problem, records: ClusterRecords) -> Estimate:
    """Return requests served per second: as many as arrive if the system is steady, else as many as complete."""
    served = ~records.refused
    arrived = records.arrival[served]
    steady = records.status == "steady" and problem.workload.clients == 0 and arrived[-1] > records.arrival[0]
    events, last = (arrived, records.arrival[-1]) if steady else (records.completion, np.nanmax(records.completion))
    edges = np.linspace(float(records.arrival.min()), float(last), metrics.SLICES + 1)
    return metrics.time_mean(metrics.rates(events, edges), arrived.size)


def in_order(candidate: Candidate) -> list[Group]:
    """Return the groups of a plan from the cheapest tier to the dearest, as ``figures`` lists them."""
    return sorted(candidate.groups, key=lambda g: g.tier)


def _measure(problem: Problem, records: Records | None, late: NDArray[np.bool_]) -> Metrics:
    """Return the figures of a tier; nothing is known where nobody who counts was served."""
    if records is None or not (late & ~records.refused).any():
        return metrics.UNMEASURED
    slo = problem.scenario.slo
    return metrics.measure(records, metrics.Slo(slo.ttft_p99_s, slo.tpot_mean_s), kept=late)


def _good(problem: Problem, records: ClusterRecords, kept: NDArray[np.intp]) -> tuple[Estimate, float]:
    """Return the share of requests all of whose visits keep the SLOs, refused ones included, and the share served."""
    slo = problem.scenario.slo
    good = ~records.refused
    for run_of, who in zip(records.tiers, records.visitors, strict=True):
        if run_of is not None:
            ttft, tpot = times_of(run_of)
            good[who] &= (ttft <= slo.ttft_p99_s) & (tpot <= slo.tpot_mean_s)
    if slo.e2e_p99_s is not None:
        good &= (records.completion - records.arrival) <= slo.e2e_p99_s
    after = good[kept[0] :]
    return metrics.share_interval(after), kept.size / after.size


def _tier(problem: Problem, group: Group, m: Metrics) -> Tree:
    return {
        "name": problem.scenario.tiers[group.tier].name,
        "replicas": group.replicas,
        "gpus": group.gpus,
        "routing": group.routing,
        "ready_s": group.ready_s,
        "status": m.status,
        "requests_per_s": m.requests_per_s,
        "output_tokens_per_s": m.tokens_per_s,
        "good_fraction": m.good,
        "mean_batch": m.batch,
        "mean_waiting": m.waiting,
        "utilisation": m.utilisation,
        "kv_peak": m.kv_peak,
        "cached_prompt_share": m.found,
        "acceptance": m.acceptance,
        "acceptance_kind": "accepted / drafted",
        "tokens_per_round": m.tokens_per_round,
        "rounds_per_request": m.rounds,
        "preemptions_per_request": m.preemptions,
        "gpu_s_per_request": metrics.scaled(m.service_s, group.service.gpus),
        "ttft_s": m.ttft_s,
        "tpot_s": m.tpot_s,
    }


def _weighted(shares: list[tuple[float, Estimate]]) -> Estimate:
    """Return the mean over the tiers by weight, such as their GPUs; its ends are those of the ends."""
    total = sum(weight for weight, _ in shares)
    return Estimate(*(sum(weight * e[i] for weight, e in shares) / total for i in range(3)))


def _mean_gpu(candidate: Candidate) -> Accelerator:
    """Return an accelerator that draws what the GPUs of the plan do on average."""
    kinds = [(g.gpus, g.service.deployment.accelerator) for g in candidate.groups]
    return replace(kinds[0][1], power=sum(n * gpu.power for n, gpu in kinds) / candidate.gpus)


def _money(problem: Problem, candidate: Candidate, rate: Estimate, flow: Estimate, quality: Estimate | None) -> Tree:
    usd_per_s = price(problem, candidate.groups)
    held = _held(candidate, rate)
    each = metrics.scaled(held, usd_per_s / candidate.gpus)
    correct = None
    if quality and quality.value > 0:
        correct = metrics.product(each, _inverse(quality, lambda share: dollars_per_correct_answer(1.0, share)))
    return {
        "gpus": candidate.gpus,
        "usd_per_1000_requests": metrics.scaled(each, 1000.0),
        "usd_per_correct_answer": correct,
        "usd_per_million_output_tokens": _inverse(
            flow, lambda tokens: dollars_per_million_tokens(1.0, 3600 * usd_per_s, tokens)
        ),
        "gpu_s_held_per_request": held,
        "joules_per_request_at_most": metrics.scaled(held, _mean_gpu(candidate).power),
    }


def _energy(candidate: Candidate, rate: Estimate, flow: Estimate, busy: Estimate) -> Tree:
    """Return joules by the linear power model, ``busy`` weighted by board power.

    The model's own doubt is in ``at_least`` and ``at_most``, not in intervals.
    """
    gpu, held = _mean_gpu(candidate), _held(candidate, rate)
    low, share, high = (min(max(x, 0.0), 1.0) if math.isfinite(x) else 1.0 for x in (busy.low, busy.value, busy.high))
    least = replace(SERVING, busy=SERVING.busy_low)
    power = Estimate(*(float(joules(1.0, x, gpu)) for x in (share, low, high)))
    each = metrics.scaled(held, power.value)
    return {
        "per_request": each,
        "per_request_at_least": metrics.scaled(held, float(joules(1.0, share, gpu, least))),
        "per_request_at_most": metrics.scaled(held, float(joules_at_most(1.0, gpu))),
        "per_output_token": metrics.scaled(each, rate.value / flow.value),
        "watts_per_gpu": power,
        "provenance": SERVING.source,
    }


def _held(candidate: Candidate, rate: Estimate) -> Estimate:
    """Return the GPU time that is paid for a request, idle time included [GPU s]."""
    return _inverse(rate, lambda r: candidate.gpus / r)


def _inverse(estimate: Estimate, of: Callable[[float], float]) -> Estimate:
    """Return a falling function of an estimate that is above 0."""
    low = of(estimate.high) if math.isfinite(estimate.high) else -math.inf
    return Estimate(of(estimate.value), low, of(estimate.low) if estimate.low > 0 else math.inf)


# ---------------------------------------------------------------------------------------------------------------------
# Several runs, and their JSON
# ---------------------------------------------------------------------------------------------------------------------


def joined(runs: Sequence[Tree]) -> Tree:
    """Return the figures of independent replications: estimates over replications, counts summed, the worst status."""
    if len(runs) == 1:
        return runs[0]
    tree: Tree = _joined("", list(runs))
    for tier in tree["tiers"]:
        if tier["status"] == "overloaded":
            tier["mean_waiting"] = metrics.without_interval(tier["mean_waiting"])
    if tree["status"] == "overloaded":
        tree["in_system"] = {"mean": metrics.without_interval(tree["in_system"]["mean"])}
    return tree


def _joined(key: str, values: list[Any], share: bool = False) -> Any:
    """Return one leaf or branch of several trees joined; ``share``: it lies within 0 and 1."""
    given = [v for v in values if v is not None]
    first = given[0] if given else None
    if isinstance(first, Estimate):
        estimate = metrics.replicated([v.value for v in given])
        return metrics.as_share(estimate) if share else estimate
    if isinstance(first, Summary):
        return metrics.replicated_summary(given)
    if isinstance(first, dict):
        return {k: _joined(k, [v[k] for v in given], k in SHARES or key in SHARES) for k in first}
    if isinstance(first, list):
        return [_joined(key, list(same)) for same in zip(*given, strict=True)]
    if key == "status":
        return "overloaded" if "overloaded" in given else "steady"
    if key in SUMMED:
        return sum(given)
    if isinstance(first, float):
        return max(given) if key == "kv_peak" else sum(given) / len(given)
    return first


def published(tree: Tree) -> dict[str, Any]:
    """Return the tree as JSON takes it: what is not finite is None, intervals stand beside their values."""
    keys: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Estimate):
            keys[key] = _finite(value.value)
            keys["interval" if key in ("mean", "fraction") else f"{key}_interval"] = _ends(value)
        elif isinstance(value, Summary):
            keys[key] = published({name: getattr(value, name) for name in PERCENTILES} | {"count": value.count})
        elif isinstance(value, dict):
            keys[key] = published(value)
        elif isinstance(value, list):
            keys[key] = [published(item) for item in value]
        else:
            keys[key] = value
    return keys


PERCENTILES = ("mean", "p50", "p90", "p95", "p99")


def _ends(estimate: Estimate) -> list[float | None]:
    return [_finite(estimate.low), _finite(estimate.high)]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

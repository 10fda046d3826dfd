"""A run over time: requests inside, batches, TTFT, arrivals against completions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from simulator import metrics
from simulator.cluster import ClusterRecords
from simulator.engine import Records

from .build import Problem
from .figures import in_order, measured, times_of
from .search import Candidate

Array = NDArray[np.float64]

BINS = 150  # of the time axis [-]
FLOW_BINS = 50  # for arrivals and completions, which are counts and need more of them [-]
WINDOWS = 75  # of the rolling quantiles, each sharing half its visits with the next [-]
LEAST = 50  # visits in a window, or there is no quantile [-]
QUANTILES = (0.5, 0.99)


@dataclass(frozen=True, slots=True, eq=False)
class TierTimeline:
    """What happened at one tier, by bins of time."""

    name: str
    batch: Array  # mean decoding sequences of a replica (BINS,) [-]
    waiting: Array  # mean requests not admitted yet, of all replicas (BINS,) [-]
    arrivals: Array  # (FLOW_BINS,) [request/s]
    completions: Array  # (FLOW_BINS,) [request/s]
    ttft_at: Array  # mean arrival of the visits of a window (W,) [s]
    ttft: Array  # rolling quantiles (W, 2) [s]


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """A run by bins of time."""

    edges: Array  # (BINS + 1,) [s]
    inside: Array  # mean requests between arrival and answer (BINS,) [-]
    tiers: tuple[TierTimeline, ...]
    warmup_s: float  # arrival of the first request that counts [s]
    last_arrival_s: float  # [s]
    status: str


def timeline(problem: Problem, candidate: Candidate, records: ClusterRecords) -> Timeline:
    """Return a run by equal bins of the time from first arrival to last completion."""
    edges = np.linspace(float(records.arrival.min()), float(np.nanmax(records.completion)), BINS + 1)
    tiers = zip(in_order(candidate), records.tiers, strict=True)
    return Timeline(
        edges=edges,
        inside=metrics.present(records.arrival, records.completion, edges),
        tiers=tuple(_tier(problem.scenario.tiers[g.tier].name, r, edges) for g, r in tiers if r is not None),
        warmup_s=float(records.arrival[measured(problem, records)[0]]),
        last_arrival_s=float(records.arrival.max()),
        status=records.status,
    )


def _tier(name: str, records: Records, edges: Array) -> TierTimeline:
    served = ~records.refused
    at, ttft = rolling_quantiles(records.arrival[served], times_of(records)[0][served])
    return TierTimeline(
        name=name,
        batch=metrics.present(records.first_token, records.completion, edges) / records.replicas,
        waiting=metrics.present(records.arrival, records.admitted, edges),
        arrivals=_flow(records.arrival, edges),
        completions=_flow(records.completion[served], edges),
        ttft_at=at,
        ttft=ttft,
    )


def _flow(events: Array, edges: Array) -> Array:
    counts, bins = np.histogram(events, FLOW_BINS, (edges[0], edges[-1]))
    return np.asarray(counts / np.diff(bins))


def rolling_quantiles(at: Array, values: Array) -> tuple[Array, Array]:
    """Return mean time [s] and quantiles of windows of consecutive values; none where there are under ``LEAST``.

    Examples
    --------
    >>> at, ttft = rolling_quantiles(np.arange(200.0), np.ones(200))
    >>> at.size, ttft.shape
    (7, (7, 2))
    """
    size = max(LEAST, 2 * values.size // (WINDOWS + 1))
    if values.size < size:
        return np.empty(0), np.empty((0, len(QUANTILES)))
    step = size // 2
    windows = sliding_window_view(values, size)[::step]
    times = sliding_window_view(at, size)[::step].mean(axis=1)
    return times, np.quantile(windows, QUANTILES, axis=1).T

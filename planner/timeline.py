"""A run over time: requests inside, batches, TTFT, arrivals against completions; and its picture."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

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
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito (2008), safe for colour-blind readers
GREY = "#555555"


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


def draw(run: Timeline, title: str) -> dict[str, bytes]:
    """Return the picture of a run as PNG and SVG, the same bytes for the same run.

    Four panels over time: requests inside and waiting, batch of a replica, rolling TTFT, arrivals and completions.
    The warm-up is shaded; a dotted line marks the last arrival.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with mpl.rc_context({"svg.hashsalt": "tierwise", "svg.fonttype": "path"}):
        figure, panels = plt.subplots(4, 1, figsize=(7.2, 9.0), sharex=True, layout="constrained")
        _inside(panels[0], run)
        _batches(panels[1], run)
        _first_tokens(panels[2], run)
        _flows(panels[3], run)
        for axes in panels:
            axes.axvspan(run.edges[0], run.warmup_s, color="0.85", lw=0, zorder=0)
            axes.axvline(run.last_arrival_s, color=GREY, ls=":", lw=1)
            axes.grid(alpha=0.25)
            axes.set_xlim(run.edges[0], run.edges[-1])
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        panels[0].set_title(_heading(run, title), fontsize=10)
        panels[-1].set_xlabel("time since the start of the run [s]")
        pictures = {}
        for kind, metadata in (("png", {"Software": "tierwise"}), ("svg", {"Creator": "tierwise", "Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            pictures[f"timeseries.{kind}"] = buffer.getvalue()
        plt.close(figure)
    return pictures


def _heading(run: Timeline, title: str) -> str:
    said = "steady" if run.status == "steady" else "overloaded, what waits grows with the length of the run"
    shade = "shaded: warm-up, not counted; " if run.warmup_s > run.edges[0] else ""
    return f"{title}: {said}\n{shade}dotted: last arrival"


def _inside(axes: Any, run: Timeline) -> None:
    axes.stairs(run.inside, run.edges, color=GREY, baseline=None, label="inside")
    for tier, colour in zip(run.tiers, COLOURS, strict=False):
        axes.stairs(tier.waiting, run.edges, color=colour, baseline=None, ls="--", label=f"{tier.name}: waiting")
    axes.set_ylabel("requests [-]")
    axes.set_ylim(bottom=0)


def _batches(axes: Any, run: Timeline) -> None:
    for tier, colour in zip(run.tiers, COLOURS, strict=False):
        axes.stairs(tier.batch, run.edges, color=colour, baseline=None, label=tier.name)
    axes.set_ylabel("batch of a replica [-]")
    axes.set_ylim(bottom=0)


def _first_tokens(axes: Any, run: Timeline) -> None:
    for tier, colour in zip(run.tiers, COLOURS, strict=False):
        for i, (style, name) in enumerate((("-", "median"), ("--", "p99"))):
            axes.plot(tier.ttft_at, tier.ttft[:, i], style, color=colour, lw=1.2, label=f"{tier.name}: {name}")
    axes.set_yscale("log")
    axes.set_ylabel("TTFT of a visit [s]")


def _flows(axes: Any, run: Timeline) -> None:
    edges = np.linspace(run.edges[0], run.edges[-1], FLOW_BINS + 1)
    for tier, colour in zip(run.tiers, COLOURS, strict=False):
        axes.stairs(tier.arrivals, edges, color=colour, baseline=None, label=f"{tier.name}: arrive")
        axes.stairs(tier.completions, edges, color=colour, baseline=None, ls="--", label=f"{tier.name}: complete")
    axes.set_ylabel("requests per second [1/s]")
    axes.set_ylim(bottom=0)

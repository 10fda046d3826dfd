"""A simulated run over time, from :class:`planner.timeline.Timeline`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tierwise.style import LIGHT, WIDTH, Palette, canvas, plain, style

from .picture import Picture, beside, few_ticks

if TYPE_CHECKING:
    from planner.timeline import Timeline


def pictures(run: Timeline, palette: Palette = LIGHT) -> list[Picture]:
    """Return the one figure of a simulation: four panels over time, the same bytes for the same run."""
    with style(palette) as ink:
        return [timeseries(run, ink)]


def timeseries(run: Timeline, palette: Palette) -> Picture:
    """Draw requests inside and waiting, batch of a replica, rolling TTFT, arrivals and completions."""
    figure, panels = canvas(4, 1, size=(WIDTH, 8.2), sharex=True)
    for axes, panel in zip(panels, (_inside, _batches, _first_tokens, _flows), strict=True):
        panel(axes, run, palette)
        axes.axvspan(run.edges[0], run.warmup_s, color=palette.line, lw=0, zorder=0)
        axes.axvline(run.last_arrival_s, color=palette.soft, ls=":", lw=1)
        axes.set_xlim(run.edges[0], run.edges[-1])
        beside(axes)
    panels[-1].set_xlabel("time since the start of the run [s]")
    said = "Steady." if run.status == "steady" else "Overloaded: what waits grows with the length of the run."
    shade = " Shaded: warm-up, not counted." if run.warmup_s > run.edges[0] else ""
    return Picture("timeseries", "Over time", f"{said}{shade} Dotted: the last arrival.", figure)


def _inside(axes: Any, run: Timeline, palette: Palette) -> None:
    axes.stairs(run.inside, run.edges, color=palette.ink, baseline=None, label="inside")
    for i, tier in enumerate(run.tiers):
        kept = {"color": palette.tier(i), "ls": "--", "label": plain(f"{tier.name}: waiting")}
        axes.stairs(tier.waiting, run.edges, baseline=None, **kept)
    axes.set_ylabel("requests [-]")
    axes.set_ylim(bottom=0)


def _batches(axes: Any, run: Timeline, palette: Palette) -> None:
    for i, tier in enumerate(run.tiers):
        axes.stairs(tier.batch, run.edges, color=palette.tier(i), baseline=None, label=plain(tier.name))
    axes.set_ylabel("batch of\na replica [-]")
    axes.set_ylim(bottom=0)


def _first_tokens(axes: Any, run: Timeline, palette: Palette) -> None:
    shown = [tier.ttft for tier in run.tiers if tier.ttft.size]
    for i, tier in enumerate(run.tiers):
        for k, (line, name) in enumerate((("-", "median"), ("--", "p99"))):
            kept = {"color": palette.tier(i), "ls": line, "lw": 1.2, "label": plain(f"{tier.name}: {name}")}
            axes.plot(tier.ttft_at, tier.ttft[:, k], **kept)
    if not shown:
        axes.text(0.5, 0.5, "too few visits for quantiles", ha="center", transform=axes.transAxes, color=palette.soft)
    axes.set_yscale("log")
    if shown:
        few_ticks(axes.yaxis, float(max(t.max() for t in shown) / min(t.min() for t in shown)))
    axes.set_ylabel("TTFT of a\nvisit [s]")


def _flows(axes: Any, run: Timeline, palette: Palette) -> None:
    for i, tier in enumerate(run.tiers):
        edges = np.linspace(run.edges[0], run.edges[-1], len(tier.arrivals) + 1)
        for flow, line, name in ((tier.arrivals, "-", "arrive"), (tier.completions, "--", "complete")):
            kept = {"color": palette.tier(i), "ls": line, "label": plain(f"{tier.name}: {name}")}
            axes.stairs(flow, edges, baseline=None, **kept)
    axes.set_ylabel("requests per\nsecond [1/s]")
    axes.set_ylim(bottom=0)

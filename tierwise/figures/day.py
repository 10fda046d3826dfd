"""The plan of a day, from the dictionary of ``tierwise plan --day --format json``."""

from __future__ import annotations

from typing import Any

import numpy as np

from tierwise.style import LIGHT, WIDE, Palette, canvas, interval_bars, plain

from .picture import Picture, drawn

HOUR = 3600.0  # [s]


def pictures(result: dict[str, Any], palette: Palette = LIGHT) -> list[Picture]:
    """Return the one figure of a day."""
    return drawn((day,), result, palette)


def day(result: dict[str, Any], palette: Palette) -> Picture:
    """Draw load, GPUs by tier, cost of 1000 requests and mean TPOT over the day, simulated pieces as points."""
    rows, static = result["periods"], result["static"]
    edges = np.array([*(r["start_s"] for r in rows), rows[-1]["start_s"] + rows[-1]["duration_s"]]) / HOUR
    figure, panels = canvas(2, 2, size=(WIDE, 6.0), sharex=True)
    load, gpus, cost, times = panels.ravel()
    kept_up = {"color": palette.soft, "ls": "--", "label": "kept up for the peak"}
    rates = [r["requests_per_s"] for r in rows]
    load.stairs(rates, edges, color=palette.predicted, fill=True, alpha=0.2)
    load.stairs(rates, edges, color=palette.predicted)
    load.set(title="load", ylabel="requests/s", ylim=(0, None))
    below = np.zeros(len(rows))
    for i, name in enumerate(dict.fromkeys(t["name"] for r in rows for t in r["tiers"])):
        top = below + [sum(t["gpus"] for t in r["tiers"] if t["name"] == name) for r in rows]
        gpus.stairs(top, edges, baseline=below, fill=True, color=palette.tier(i), label=plain(name))
        below = top
    gpus.axhline(static["gpus"], **kept_up)
    gpus.set(title="GPUs of each tier", ylabel="GPUs [-]", ylim=(0, 1.25 * static["gpus"]))
    hourly = HOUR * static["usd"] / result["day"]["duration_s"]
    own = [np.nan if r["predicted"] is None else r["usd_per_1000_requests"] for r in rows]
    peak = [np.nan if rate == 0 else hourly / (3.6 * rate) for rate in rates]
    cost.stairs(own, edges, color=palette.predicted, lw=1.6, label="this plan", baseline=None)
    cost.stairs(peak, edges, baseline=None, **kept_up)
    cost.set(title="cost", ylabel="USD per 1000 requests", ylim=(0, 1.08 * np.nanmax(own + peak)))
    _tpot(times, rows, edges, palette)
    for axes in panels.ravel():
        axes.set_xlim(edges[0], edges[-1])
    for axes in (gpus, cost, times):
        axes.legend(loc="upper left" if axes is gpus else "best", ncols=3 if axes is gpus else 1)
    for axes in panels[1]:
        axes.set_xlabel("time of day [h]")
    if edges[-1] == 24:
        times.set_xticks(range(0, 25, 4))
    caption = (
        "Each piece of the day planned in its own steady state; TPOT predicted with its 90 % interval, and simulated "
        "with its 95 % interval in a sample of the pieces."
    )
    return Picture("day", "The day", caption, figure)


def _tpot(axes: Any, rows: list[dict[str, Any]], edges: Any, palette: Palette) -> None:
    nothing: dict[str, Any] = {"tpot_mean_s": np.nan, "tpot_interval_s": [np.nan, np.nan]}
    own: list[dict[str, Any]] = [r["predicted"] or nothing for r in rows]
    low, high = ([1e3 * p["tpot_interval_s"][end] for p in own] for end in (0, 1))
    axes.stairs(high, edges, baseline=low, fill=True, color=palette.predicted, alpha=0.2, label="predicted (90 %)")
    axes.stairs([1e3 * p["tpot_mean_s"] for p in own], edges, color=palette.predicted, baseline=None)
    seen = [(i, r["simulated"]["tpot_s"]) for i, r in enumerate(rows) if r["simulated"] is not None]
    if seen:
        middle = [float(edges[i] + edges[i + 1]) / 2 for i, _ in seen]
        ends = [tuple(None if e is None else 1e3 * e for e in tpot["interval"]) for _, tpot in seen]
        means = [1e3 * tpot["mean"] for _, tpot in seen]
        interval_bars(axes, middle, means, [(a, b) for a, b in ends], palette, label="simulated (95 %)")
    axes.set(title="mean TPOT", ylabel="ms/token", ylim=(0, None))

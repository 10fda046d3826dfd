"""Cost, latency and the gain of speculation against load, for the replicas of a plan."""

from __future__ import annotations

from typing import Any

from tierwise.style import SMALL, WIDTH, Palette, canvas, interval_bars, plain

from .picture import Picture, beside, few_ticks

WAYS = {"schedule": ("-", "drafts by schedule"), "fixed": ("--", "one draft length"), "none": (":", "no drafts")}


def load(result: dict[str, Any], palette: Palette) -> Picture:
    """Draw cost, mean time to the answer, mean TPOT and each tier's speed-up against the rate of requests."""
    title = "Against load"
    curves = result.get("curves", {}).get("load")
    if not curves:
        return Picture("load", title, "Not drawn: this plan was made without its figures at other loads.")
    drafted = bool(curves["tiers"])
    count = 4 if drafted else 3
    figure, panels = canvas(count, 1, size=(WIDTH, 0.7 + 1.85 * count), sharex=True)
    cost, answer, token = panels[:3]
    _cost(cost, curves, palette)
    simulated, rate = result["simulated"], result["simulated"]["throughput"]["requests_per_s"]
    for axes, key, scale, seen, name in (
        (answer, "e2e_mean_s", 1, simulated["e2e_s"], "time to the answer,\nmean [s]"),
        (token, "tpot_mean_s", 1e3, simulated["tpot_s"], "TPOT, mean\n[ms/token]"),
    ):
        _ways(axes, curves, key, scale, palette)
        if seen["mean"] is not None:
            ends = [(None if e is None else scale * e) for e in seen["interval"]]
            interval_bars(axes, [rate], [scale * seen["mean"]], [(ends[0], ends[1])], palette, label="simulated (95 %)")
        axes.set_ylabel(name)
    if drafted:
        _speedup(panels[3], result, curves, palette)
    for axes in panels:
        axes.axvline(curves["own_requests_per_s"], color=palette.soft, lw=0.9, ls="-.")
        beside(axes)
    cost.annotate(
        "this load",
        (curves["own_requests_per_s"], 1.0),
        (-3, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        fontsize=SMALL,
        color=palette.soft,
        ha="right",
        va="top",
    )
    panels[-1].set_xlabel("requests of all tiers together [requests/s]")
    panels[-1].set_xlim(0, 1.02 * max(w["limit_requests_per_s"] for w in curves["ways"].values()))
    caption = (
        "The plan's own replicas at other loads, analytic; every tier keeps its share of the requests. A line ends "
        "where the replicas cannot bear more."
    )
    if drafted:
        caption += (
            " Speed-up: time of a visit without a draft over that with one; a band is the interval of the load from "
            "which one fixed draft length hurts."
        )
    return Picture("load", title, caption, figure)


def _known(x: list[float], y: list[Any], scale: float = 1.0) -> tuple[list[float], list[float]]:
    pairs = [(a, scale * b) for a, b in zip(x, y, strict=True) if b is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _cost(axes: Any, curves: dict[str, Any], palette: Palette) -> None:
    x, y = curves["requests_per_s"], curves["usd_per_1000_requests"]
    limit = curves["ways"]["schedule"]["limit_requests_per_s"]
    kept = [(a, b) for a, b in zip(x, y, strict=True) if a <= limit]
    axes.plot([a for a, _ in kept], [b for _, b in kept], **palette.mark("predicted"), label="all GPUs paid")
    own = curves["own_requests_per_s"] * min(y) * max(x)  # p / r is the same product at every rate
    axes.plot(
        curves["own_requests_per_s"],
        own / curves["own_requests_per_s"] ** 2,
        **palette.mark("predicted", point=True),
        label="this plan",
    )
    axes.set_yscale("log")
    axes.set_ylabel("cost [USD per\n1000 requests]")
    few_ticks(axes.yaxis)


def _ways(axes: Any, curves: dict[str, Any], key: str, scale: float, palette: Palette) -> None:
    for way, figures in curves["ways"].items():
        line, name = WAYS[way]
        name = name if len(curves["ways"]) > 1 else "predicted"
        x, y = _known(curves["requests_per_s"], figures[key], scale)
        axes.plot(x, y, **(palette.mark("predicted") | {"linestyle": line}), label=name)
    axes.set_yscale("log")
    few_ticks(axes.yaxis)


def _speedup(axes: Any, result: dict[str, Any], curves: dict[str, Any], palette: Palette) -> None:
    names = [t["name"] for t in result["plan"]["tiers"]]
    crossings = {c["tier"]: c for c in result["speculation"]["by_tier"]}
    for tier in curves["tiers"]:
        colour = palette.tier(names.index(tier["name"]))
        for way, line in (("schedule", "-"), ("fixed", "--")):
            x, y = _known(curves["requests_per_s"], tier["speedup"][way])
            label = plain(tier["name"]) if way == "schedule" else None
            axes.plot(x, y, color=colour, ls=line, label=label)
        own = crossings.get(tier["name"])
        if own is not None and own["crossover_requests_per_s"] is not None:
            scale = curves["requests_per_s"][0] / tier["requests_per_s_per_replica"][0]
            low, high = own["crossover_interval_requests_per_s"]
            end = own["searched_to_requests_per_s"] if high is None else high
            axes.axvspan(scale * (low or 0.0), scale * end, color=colour, alpha=0.15, lw=0)
            axes.axvline(scale * own["crossover_requests_per_s"], color=colour, lw=0.9)
    axes.axhline(1.0, color=palette.ink, lw=0.8)
    axes.plot([], [], color=palette.soft, ls="--", label="one length")
    axes.set_ylabel("speed-up of\na visit [-]")
    axes.set_ylim(bottom=min(0.8, axes.get_ylim()[0]))

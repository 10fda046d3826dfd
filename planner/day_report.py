"""The plan of a day as a table and as a picture."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"  # Okabe and Ito (2008), safe for colour-blind readers
TIER_COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")


def described(row: dict[str, Any]) -> str:
    """Return the tiers of a piece in a line, with the draft length at the mean batch."""
    return " + ".join(
        f"{t['replicas']} x {t['name']} tp{t['tp']}"
        + (f" {t['draft']} {t['draft_length_at_mean_batch']}" if t["draft"] else "")
        for t in row["tiers"]
    )


def stops(row: dict[str, Any]) -> str:
    """Return where requests end in a piece."""
    return " ".join(f"{t['stop_fraction']:.0%}" for t in row["tiers"])


def day_csv(result: dict[str, Any]) -> str:
    """Return one row a piece: load, plan, cost, and figures predicted and, where it was simulated, simulated."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["start_s", "duration_s", "requests_per_s", "gpus", "started_gpus", "stopped_gpus", "held_gpus", "lead_s"]
    names += ["switching_usd", "usd_per_hour", "usd_per_1000_requests", "quality"]
    times = ["ttft_p99_s", "tpot_mean_s", "e2e_mean_s"]
    writer.writerow([*names, *(f"{t}_predicted" for t in times), *(f"{t}_simulated" for t in times), "stops", "tiers"])
    for row in result["periods"]:
        predicted, simulated = row["predicted"] or {}, row["simulated"]
        seen = (
            [simulated[key][of] for key, of in (("ttft_s", "p99"), ("tpot_s", "mean"), ("e2e_s", "mean"))]
            if simulated
            else [None] * 3
        )
        cells = [*(row.get(n) for n in names), *(predicted.get(t) for t in times), *seen]
        writer.writerow([*cells, stops(row), described(row)])
    return text.getvalue()


def day_png(result: dict[str, Any]) -> bytes:
    """Draw load, GPUs by tier, cost of 1000 requests and mean TPOT over the day, simulated pieces as points."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["periods"]
    edges = np.array([*(r["start_s"] for r in rows), rows[-1]["start_s"] + rows[-1]["duration_s"]]) / 3600
    middle = (edges[1:] + edges[:-1]) / 2
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained", sharex=True)
    load, gpus, cost, times = axes.ravel()
    load.stairs([r["requests_per_s"] for r in rows], edges, color=BLUE, fill=True, alpha=0.25)
    load.stairs([r["requests_per_s"] for r in rows], edges, color=BLUE)
    load.set(title="load [requests/s]", ylim=(0, None))
    below = np.zeros(len(rows))
    names = list(dict.fromkeys(t["name"] for r in rows for t in r["tiers"]))
    for name, colour in zip(names, TIER_COLOURS, strict=False):
        top = below + [sum(t["gpus"] for t in r["tiers"] if t["name"] == name) for r in rows]
        gpus.stairs(top, edges, baseline=below, fill=True, color=colour, label=name)
        below = top
    static = result["static"]
    gpus.axhline(static["gpus"], color=ORANGE, ls="--", lw=1.2, label="kept up for the peak")
    gpus.set(title="GPUs by tier [-]", ylim=(0, 1.18 * static["gpus"]))
    own_cost = [np.nan if r["predicted"] is None else r["usd_per_1000_requests"] for r in rows]
    kept = [np.nan if r["requests_per_s"] == 0 else _hourly(static, result) / (3.6 * r["requests_per_s"]) for r in rows]
    cost.stairs(own_cost, edges, color=BLUE, lw=1.6, label="this plan", baseline=None)
    cost.stairs(kept, edges, color=ORANGE, ls="--", label="kept up for the peak", baseline=None)
    cost.set(title="cost [USD per 1000 requests]", ylim=(0, 1.08 * np.nanmax(own_cost + kept)))
    own = [r["predicted"] or {"tpot_mean_s": np.nan, "tpot_interval_s": [np.nan, np.nan]} for r in rows]
    low, high = ([1000 * p["tpot_interval_s"][end] for p in own] for end in (0, 1))
    mean = [1000 * p["tpot_mean_s"] for p in own]
    times.stairs(high, edges, baseline=low, fill=True, color=BLUE, alpha=0.2, label="predicted, 90 %")
    times.stairs(mean, edges, color=BLUE, baseline=None)
    for i, r in enumerate(rows):
        if r["simulated"] is not None:
            seen = r["simulated"]["tpot_s"]
            least, most = (seen["mean"] if end is None else end for end in seen["interval"])
            bars = 1000 * np.array([[seen["mean"] - least], [most - seen["mean"]]])
            label = "simulated, 95 %" if i == min(j for j, x in enumerate(rows) if x["simulated"]) else None
            times.errorbar(
                [middle[i]], [1000 * seen["mean"]], bars, fmt="o", ms=4, color=ORANGE, capsize=3, label=label
            )
    times.set(title="mean TPOT [ms]", ylim=(0, None))
    for axis in axes.ravel():
        axis.grid(alpha=0.25)
        axis.set_xlim(edges[0], edges[-1])
    for axis in (gpus, cost, times):
        axis.legend(
            fontsize=8, frameon=False, ncols=3 if axis is gpus else 1, loc="upper left" if axis is gpus else "best"
        )
    for axis in axes[1]:
        axis.set_xlabel("time of day [h]")
    if edges[-1] == 24:
        axes[1, 0].set_xticks(range(0, 25, 4))
    figure.suptitle(f"{result['scenario']}: {result['explanation'][0]}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": "tierwise"})
    plt.close(figure)
    return buffer.getvalue()


def _hourly(static: dict[str, Any], result: dict[str, Any]) -> float:
    return float(3600 * static["usd"] / result["day"]["duration_s"])

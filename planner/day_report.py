"""The plan of a day as a table."""

from __future__ import annotations

import csv
import io
from typing import Any


def clock(time_s: float) -> str:
    """Return a time of the day.

    Examples
    --------
    >>> clock(5400.0)
    '01:30'
    """
    return f"{int(time_s // 3600):02d}:{int(time_s % 3600 // 60):02d}"


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

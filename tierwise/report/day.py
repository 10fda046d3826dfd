"""The report of a day: ``report.html`` and its figure, from the dictionary of ``tierwise plan --day``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.day_report import clock
from planner.launch import resolved
from planner.scenario import Scenario
from tierwise import __version__
from tierwise.figures import picture
from tierwise.figures.day import pictures

from .page import NOTHING, Table, amount, figures, percent, render, seconds, span
from .plan import tag

CONTENTS = (
    ("day", "The day"),
    ("periods", "Piece by piece"),
    ("agreement", "Predicted and simulated"),
    ("scenario", "Scenario"),
    ("provenance", "Provenance"),
)


def files(result: dict[str, Any], scenario: Scenario, start: Path, folder: Path) -> dict[str, bytes]:
    """Return report.html and the figure of a day as files by name.

    Parameters
    ----------
    start, folder : Path
        Where relative paths of the scenario start, and where the files will lie.
    """
    drawn = pictures(result)
    images = picture.files(drawn)
    page = render(
        "day.html",
        kind="Plan of a day",
        title=result["scenario"],
        description=scenario.description,
        contents=CONTENTS,
        words=result["explanation"],
        headline=_headline(result),
        periods=_periods(result),
        compared=_compared(result),
        scenario=resolved(scenario, result["provenance"]["seed"], start, folder),
        provenance=_provenance(result),
        figures=figures(drawn, images),
    )
    return {"report.html": page, **images}


def _headline(result: dict[str, Any]) -> list[dict[str, Any]]:
    day, static, source = result["day"], result["static"], result["provenance"]
    tags = ["given price", f"step times {source['step_time']}"]

    def card(name: str, value: str, line: str) -> dict[str, Any]:
        return {"name": name, "value": value, "lines": [{"kind": "predicted", "text": line}], "tags": tags}

    cards = [
        card("GPUs", f"{day['least_gpus']:,} to {day['peak_gpus']:,}", f"{static['gpus']:,} kept up for the peak"),
        card("USD a day", f"{day['usd']:,.0f}", f"{static['usd']:,.0f} kept up for the peak"),
        card(
            "USD per 1000 requests",
            amount(day["usd_per_1000_requests"]),
            f"{amount(static['usd_per_1000_requests'])} kept up for the peak",
        ),
        card("saved", percent(result["saved"]), f"{amount(day['switching_usd'])} USD of it spent on starting replicas"),
    ]
    if day["quality"] is not None:
        tags_of_quality = [f"quality {tag(source['quality'])}"]
        line = f"{percent(static['quality'], 2)} kept up for the peak"
        cards.append(card("quality", percent(day["quality"], 2), line) | {"tags": tags_of_quality})
    return cards


def _periods(result: dict[str, Any]) -> Table:
    rows = []
    for r in result["periods"]:
        tiers = ", ".join(
            f"{t['name']} {t['replicas']} x {t['tp']}" + (f" with {t['draft']}" if t["draft"] else "")
            for t in r["tiers"]
        )
        ends = " ".join(percent(t["stop_fraction"], 0) for t in r["tiers"])
        figures_ = (amount(r["requests_per_s"]), f"{r['gpus']:,}", f"{r['started_gpus']:,}", amount(r["usd_per_hour"]))
        rows.append((clock(r["start_s"]), tiers or "none", *figures_, amount(r["usd_per_1000_requests"]), ends))
    columns = ("from", "replicas x TP", "requests/s", "GPUs", "GPUs started", "USD/h", "USD per 1000 requests")
    return Table((*columns, "end at each tier"), rows, words=2)


def _compared(result: dict[str, Any]) -> Table:
    rows = []
    for c in result["checked"]:
        tpot, quality = c["tpot_mean_s"], c["quality"]
        own = f"{seconds(tpot['predicted'])} ({span(tpot['predicted_interval'], seconds)})"
        seen = f"{seconds(tpot['simulated'])} ({span(tpot['simulated_interval'], seconds)})"
        pairs = [f"{seconds(c[k]['predicted'])} / {seconds(c[k]['simulated'])}" for k in ("ttft_p99_s", "e2e_mean_s")]
        right = NOTHING
        if quality["predicted"] is not None:
            right = f"{percent(quality['predicted'], 2)} / {percent(quality['simulated'], 2)}"
        rows.append((clock(c["start_s"]), own, seen, *pairs, right, percent(c["fleet_share"])))
    columns = ("from", "TPOT predicted (90 %)", "TPOT simulated (95 %)", "p99 TTFT", "time to the answer", "quality")
    note = "Pairs: predicted / simulated. A large fleet is simulated as a share of its replicas at the loads of all."
    return Table((*columns, "of the fleet"), rows, caption=note)


def _provenance(result: dict[str, Any]) -> list[tuple[str, str]]:
    source = result["provenance"]
    return [
        ("tierwise", __version__),
        ("seed", str(source["seed"])),
        ("step times", f"{source['step_time']}, profile {source['profile']}"),
        ("quality", source["quality"] or "not given"),
        ("traffic", source["traffic"]),
        ("again", f"tierwise plan scenario.yaml --day --seed {source['seed']}"),
        ("as data", "day.json, day.csv"),
    ]

"""The report of a simulation: ``report.html`` and its figure, from what ``tierwise simulate`` found."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tierwise import __version__
from tierwise.figures import picture
from tierwise.figures.simulation import pictures

from .page import Table, amount, figures, percent, render, seconds, span

if TYPE_CHECKING:
    from planner.simulate import Simulation

CONTENTS = (
    ("headline", "Headline numbers"),
    ("latency", "Latency"),
    ("tiers", "Tiers"),
    ("time", "Over time"),
    ("provenance", "Provenance"),
)


def files(simulation: Simulation) -> dict[str, bytes]:
    """Return report.html and the figure of a simulation in detail as files by name; the figure is of its first run."""
    result, run = simulation.result, simulation.timeline
    assert run is not None
    drawn = pictures(run)
    images = picture.files(drawn)
    page = render(
        "simulation.html",
        kind="Simulation",
        title=result["scenario"],
        contents=CONTENTS,
        warnings=_warnings(result),
        headline=_headline(result),
        latency=_latency(result),
        tiers=_tiers(result),
        provenance=_provenance(result),
        figures=figures(drawn, images),
    )
    return {"report.html": page, **images}


def _warnings(result: dict[str, Any]) -> list[str]:
    said = []
    if result["status"] == "overloaded":
        who = ", ".join(t["name"] for t in result["tiers"] if t["status"] == "overloaded")
        said.append(
            f"Overloaded at {who}: more arrives than completes. TTFT and the time to the final answer grow with the "
            "length of the run; what stands here is of this run alone."
        )
    if result["refused"]:
        said.append(f"{result['refused']:,} of {result['requests']:,} requests did not fit and were refused.")
    return said


def _headline(result: dict[str, Any]) -> list[dict[str, Any]]:
    flow, cost, good, quality = result["throughput"], result["cost"], result["goodput"], result["quality"]
    rows: list[tuple[str, Callable[[float | None], str], float | None, Any]] = [
        ("requests/s", amount, flow["requests_per_s"], flow["requests_per_s_interval"]),
        ("output tokens/s", amount, flow["output_tokens_per_s"], flow["output_tokens_per_s_interval"]),
        ("goodput, share within the SLOs", percent, good["fraction"], good["interval"]),
        ("USD per 1000 requests", amount, cost["usd_per_1000_requests"], cost["usd_per_1000_requests_interval"]),
        ("p99 TTFT of a visit", seconds, result["ttft_s"]["p99"], result["ttft_s"]["p99_interval"]),
        ("mean TPOT", seconds, result["tpot_s"]["mean"], result["tpot_s"]["interval"]),
        ("mean time to the answer", seconds, result["e2e_s"]["mean"], result["e2e_s"]["interval"]),
    ]
    if quality is not None:
        rows.insert(0, ("quality", percent, quality["mean"], quality["interval"]))
    return [
        {
            "name": name,
            "value": form(value),
            "lines": [{"kind": "simulated", "text": f"{span(ends, form)} (95 %)"}],
            "tags": [f"step times {result['provenance']['step_time']}"] if form is seconds else [],
        }
        for name, form, value, ends in rows
    ]


def _latency(result: dict[str, Any]) -> Table:
    rows = []
    names = (("ttft_s", "TTFT of a visit"), ("tpot_s", "TPOT of a visit"), ("e2e_s", "time to the final answer"))
    for key, name in names:
        m = result[key]
        cells = [seconds(m[p]) for p in ("mean", "p50", "p90", "p95", "p99")]
        rows.append((name, *cells, span(m["interval"], seconds)))
    return Table(("time", "mean", "p50", "p90", "p95", "p99", "95 % of the mean"), rows)


def _tiers(result: dict[str, Any]) -> Table:
    rows = [
        (
            t["name"],
            t["status"],
            f"{t['gpus']}",
            percent(t["share"]),
            percent(t["stop_fraction"]),
            amount(t["mean_batch"]),
            amount(t["mean_waiting"]),
            percent(t["utilisation"], 0),
            amount(t["acceptance"]),
            amount(t["preemptions_per_request"]),
        )
        for t in result["tiers"]
    ]
    columns = ("tier", "status", "GPUs", "runs for", "answers", "batch", "waiting", "busy", "accepted / drafted")
    return Table((*columns, "preempted"), rows, words=2, caption="Batch and waiting are means over time.")


def _provenance(result: dict[str, Any]) -> list[tuple[str, str]]:
    source, intervals = result["provenance"], result["intervals"]
    return [
        ("tierwise", __version__),
        ("seed", str(source["seed"])),
        ("requests", f"{result['requests']:,}, of which {result['warmup_requests']:,} warm-up"),
        ("traffic", source["traffic"]),
        ("step times", f"{source['step_time']}, profile {source['profile']}"),
        ("intervals", f"{intervals['level']:.0%}, {intervals['method']}, {intervals['replications']} replications"),
        ("status", result["rules"]["status"]),
        ("warm-up", result["rules"]["warmup"]),
        ("energy", result["energy_j"]["provenance"]),
    ]

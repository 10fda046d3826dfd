"""What if: the plan over a grid of scenario settings, finished points kept, infeasible ones rows like the others."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from theory.catalog import accelerator
from theory.errors import InfeasibleError, InputError, require

from .plan import plan_scenario
from .scenario import Scenario, load_scenario

ALIASES = {
    "gpu": "fleet.accelerator",
    "gpus": "fleet.gpus",
    "price": "fleet.price_per_gpu_hour",
    "rate": "traffic.rate",
    "floor": "objective.quality_floor",
}
KIND, PRICE = "fleet.accelerator", "fleet.price_per_gpu_hour"
RANGE = re.compile(r"([^:,]+):([^:,]+):(log|lin)(\d+)")
KEPT = "sweep.jsonl"  # finished points, one a line
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Axis:
    """A scenario key and the values it takes."""

    key: str
    values: tuple[str, ...]  # as they would stand after --set key=


@dataclass(frozen=True, slots=True)
class Point:
    """One scenario of the grid."""

    settings: tuple[tuple[str, str], ...]  # key and value of each axis
    scenario: Scenario
    folder: Path


def parse_axis(text: str) -> Axis:
    """Return the axis of ``KEY=a:b:logN``, ``KEY=a:b:linN`` or ``KEY=v1,v2,...``; short names are in ALIASES.

    N points from a to b, both ends in, evenly spaced or evenly in the logarithm, to four digits. A kind of GPU may come
    with its price, ``gpu=h100-sxm@2.5,h200@3.6`` [USD/h]; without, the scenario's holds for it.

    Raises
    ------
    InputError
        If the text has another form, a bound is no number, N is below 2, or a logarithm is asked of nothing positive.

    Examples
    --------
    >>> parse_axis("rate=1:16:log5").values
    ('1', '2', '4', '8', '16')
    >>> parse_axis("gpu=h100-sxm,h200-sxm").key
    'fleet.accelerator'
    """
    key, sign, given = text.partition("=")
    way_out = "E.g. traffic.rate=1:64:log10, fleet.gpus=4:16:lin4 or gpu=h100-sxm,h200-sxm."
    require(bool(sign and key.strip() and given.strip()), "--sweep", "must have the form KEY=VALUES", text, way_out)
    name = ALIASES.get(key.strip(), key.strip())
    found = RANGE.fullmatch(given.strip())
    if found is None:
        require(":" not in given, "--sweep", "must give a range as a:b:logN or a:b:linN", text, way_out)
        values = tuple(v.strip() for v in given.split(","))
        require(all(values), "--sweep", "must give a value between commas", text, way_out)
        require(len(set(values)) == len(values), "--sweep", "must give each value once", text)
        return Axis(name, values)
    return Axis(name, _spaced(text, *found.groups(), way_out=way_out))


def _spaced(text: str, low: str, high: str, kind: str, count: str, *, way_out: str) -> tuple[str, ...]:
    try:
        start, end, n = float(low), float(high), int(count)
    except ValueError:
        raise InputError(f"`--sweep` must have numbers for a and b; got {text!r}. {way_out}") from None
    require(bool(np.isfinite([start, end]).all()), "--sweep", "must have finite bounds", text, way_out)
    require(n >= 2, "--sweep", "must have at least 2 points", text, way_out)
    require(start < end, "--sweep", "must rise from a to b", text, way_out)
    require(kind == "lin" or start > 0, "--sweep", "must have bounds above 0 for a logarithmic axis", text, way_out)
    points = np.geomspace(start, end, n) if kind == "log" else np.linspace(start, end, n)
    return tuple(f"{p:.4g}" if abs(p) < 1e4 else f"{p:.0f}" for p in points)


def grid(axes: Sequence[Axis], source: str | Path, overrides: Sequence[str] = ()) -> list[Point]:
    """Return every combination of the axes as a checked scenario, the last axis fastest.

    Raises
    ------
    InputError
        If an axis is given twice or a key or value is none of a scenario; nothing has been planned by then.
    """
    keys = [a.key for a in axes]
    require(len(set(keys)) == len(keys), "--sweep", "must name each key once", ", ".join(keys))
    both = PRICE in keys and any("@" in v for a in axes if a.key == KIND for v in a.values)
    require(not both, "--sweep", f"must give prices with the GPUs or as {PRICE}, not both", ", ".join(keys))
    points = []
    for values in itertools.product(*(a.values for a in axes)):
        given = list(zip(keys, values, strict=True))
        changes = [f"{k}={v}" for key, value in given for k, v in _priced(key, value)]
        scenario, folder = load_scenario(source, [*overrides, *changes])
        settings = tuple((k, accelerator(v.partition("@")[0]).name if k == KIND else v) for k, v in given)
        points.append(Point(settings, scenario, folder))
    return points


def _priced(key: str, value: str) -> list[tuple[str, str]]:
    """Return a setting, and beside a kind of GPU the price it comes with."""
    kind, sign, price = value.partition("@")
    return [(KIND, kind), (PRICE, price)] if key == KIND and sign else [(key, value)]


def sweep(
    points: Sequence[Point], seed: int | None, progress: Progress, keep: Path | None = None
) -> tuple[list[dict[str, Any]], int]:
    """Return one row a point, in order, and how many were at hand from an earlier run.

    Parameters
    ----------
    keep : Path, optional
        Folder whose ``sweep.jsonl`` holds finished points: read first, and written after each point.
    """
    known = _known(keep / KEPT) if keep is not None else {}
    rows, reused = [], 0
    for done, point in enumerate(points):
        progress("sweep", done, len(points))
        mark = _mark(point, seed)
        if mark in known:
            reused += 1
        else:
            known[mark] = planned(point, seed)
            if keep is not None:
                _append(keep / KEPT, {"mark": mark, "row": known[mark]})
        rows.append(known[mark])
    progress("sweep", len(points), len(points))
    return rows, reused


def planned(point: Point, seed: int | None) -> dict[str, Any]:
    """Return the row of a point: its settings, and the plan in a line or why there is none."""
    settings = {key: _typed(value) for key, value in point.settings}
    prices = [pool.price_per_gpu_hour for pool in point.scenario.pools]
    head = {"settings": settings, "price_per_gpu_hour": prices[0] if len(prices) == 1 else None}
    try:
        return {
            **head,
            "feasible": True,
            "reason": None,
            **summary(plan_scenario(point.scenario, point.folder, seed=seed)),
        }
    except InfeasibleError as error:
        return {**head, "feasible": False, "reason": str(error)}


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return what changes with a setting: cost, tiers, draft lengths, lambda, and what was simulated."""
    tiers, loads = result["plan"]["tiers"], {t["name"]: t["mean_batch"] for t in result["predicted"]["tiers"]}
    simulated = result["simulated"]
    return {
        "gpus": result["plan"]["gpus"],
        **{k: result["predicted"][k] for k in ("usd_per_1000_requests", "usd_per_correct_answer", "quality")},
        "tiers": [
            {
                "name": t["name"],
                "tp": t["tp"],
                "replicas": t["replicas"],
                "share": t["share"],
                "draft": t["draft"],
                "mean_batch": loads[t["name"]],
                "draft_length": _length_at(t["schedule"], loads[t["name"]]),
            }
            for t in tiers
        ],
        "lambda": result["lambda"]["value"],
        "lambda_interval": result["lambda"]["interval"],
        "ttft_p99_s": simulated["ttft_s"]["p99"],
        "tpot_mean_s": simulated["tpot_s"]["mean"],
        "step_time": result["provenance"]["step_time"],
    }


def _length_at(schedule: list[list[int]], batch: float) -> int:
    """Return the draft length at a batch, 0 without a draft; the last range holds beyond its end [tokens]."""
    n = max(round(batch), 1)
    return next((g for _, end, g in schedule if n <= end), schedule[-1][2] if schedule else 0)


def _typed(value: str) -> str | float | None:
    """Return a number or a name as what it is, and anything else as it was written."""
    found = yaml.safe_load(value)
    return found if found is None or isinstance(found, str | int | float) else value


def _mark(point: Point, seed: int | None) -> str:
    """Return what tells a point from others: another scenario, seed or axis is planned anew."""
    said = json.dumps([point.settings, point.scenario.model_dump(mode="json"), seed], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:24]


def _known(path: Path) -> dict[str, dict[str, Any]]:
    """Return finished points; a last line that an interruption cut short is dropped from the file."""
    if not path.exists():
        return {}
    found: dict[str, dict[str, Any]] = {}
    try:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        for line in whole.splitlines():
            entry = json.loads(line)
            found[entry["mark"]] = entry["row"]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError):
        raise InputError(f"`{path}` must hold the points of a sweep; got something else. Remove it.") from None
    return found


def _append(path: Path, entry: dict[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"`output` must be a folder that can be written; got {path} ({error.strerror}).") from None


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """Return what a sweep over kinds of GPU assumes of their prices, and at which price one costs as much as another.

    The second is the price of a GPU times the GPUs of the first kind over those of the other, at the same load: exact
    under a quality floor, where the price of a GPU changes no plan.
    """
    if not any(KIND in r["settings"] for r in rows):
        return []
    price = {r["settings"][KIND]: r["price_per_gpu_hour"] for r in rows}
    said = []
    if len(set(price.values())) == 1 and len(price) > 1:
        same = next(iter(price.values()))
        said.append(
            f"Every kind of GPU is taken at {same:g} USD/h: give prices as gpu="
            + ",".join(f"{kind}@PRICE" for kind in price)
        )
    first, *others = price
    by_point = {_rest(r): r for r in rows if r["settings"][KIND] == first and r["feasible"]}
    for kind in others:
        ratios = [
            by_point[_rest(r)]["gpus"] / r["gpus"]
            for r in rows
            if r["settings"][KIND] == kind and r["feasible"] and _rest(r) in by_point
        ]
        if ratios:
            low, high = (price[first] * f(ratios) for f in (min, max))
            at = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}, depending on the point,"
            said.append(
                f"A plan on {kind} costs what one on {first} at {price[first]:g} USD/h does when {kind} is {at} USD/h."
            )
    return said


def _rest(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(v for k, v in row["settings"].items() if k != KIND)


def described(tiers: list[dict[str, Any]]) -> str:
    """Return the tiers of a row in a line."""
    return " + ".join(
        f"{t['replicas']} x {t['name']} tp{t['tp']}" + (f" {t['draft']} {t['draft_length']}" if t["draft"] else "")
        for t in tiers
    )


def sweep_csv(rows: list[dict[str, Any]]) -> str:
    """Return the rows as CSV: one column a setting, then the plan."""
    keys = list(rows[0]["settings"])
    names = [
        "gpus",
        "usd_per_1000_requests",
        "usd_per_correct_answer",
        "quality",
        "lambda",
        "ttft_p99_s",
        "tpot_mean_s",
        "step_time",
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, "feasible", "price_per_gpu_hour", *names, "tiers", "reason"])
    for r in rows:
        plan = [*(r.get(n) for n in names), described(r["tiers"]) if r["feasible"] else None]
        writer.writerow([*r["settings"].values(), r["feasible"], r["price_per_gpu_hour"], *plan, r["reason"]])
    return text.getvalue()

"""The plans of a sweep along one setting, from the dictionary of ``tierwise plan --sweep --format json``."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from planner.sweep import KIND
from tierwise.style import LIGHT, WIDE, Palette, canvas, plain

from .picture import Picture, drawn

LINES = ("-", "--", ":", "-.")
Row = dict[str, Any]


def pictures(result: dict[str, Any], palette: Palette = LIGHT) -> list[Picture]:
    """Return the one figure of a sweep."""
    return drawn((sweep,), result, palette)


def sweep(result: dict[str, Any], palette: Palette) -> Picture:
    """Draw cost, lambda, GPUs and draft length of each tier along the first axis with numbers."""
    rows: list[Row] = result["points"]
    keys = list(rows[0]["settings"])
    numbers = [k for k in keys if all(isinstance(r["settings"][k], int | float) for r in rows)]
    along = numbers[0] if numbers else keys[0]
    values = sorted({r["settings"][along] for r in rows}, key=float if numbers else str)
    place = {v: v if numbers else i for i, v in enumerate(values)}
    series: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        series.setdefault(tuple(v for k, v in r["settings"].items() if k != along), []).append(r)
    tiers = list(dict.fromkeys(t["name"] for r in rows if r["feasible"] for t in r["tiers"]))
    figure, panels = canvas(2, 2, size=(WIDE, 6.2), sharex=True)
    cost, price, gpus, length = panels.ravel()
    for line, (name, of) in zip(cycle(LINES), series.items(), strict=False):
        good = sorted((r for r in of if r["feasible"]), key=lambda r: values.index(r["settings"][along]))
        bad = [place[r["settings"][along]] for r in of if not r["feasible"]]
        x = [place[r["settings"][along]] for r in good]
        look = palette.mark("predicted") | {"linestyle": line, "marker": "o", "ms": 4}
        kinds = f" at {of[0]['price_per_gpu_hour']:g} USD/h" if name and KIND in keys and along != KIND else ""
        label = plain(", ".join(map(str, name)) + kinds) or None
        cost.plot(x, [r["usd_per_1000_requests"] for r in good], **look, label=label)
        price.plot(x, [_or_nan(r["lambda"]) for r in good], **look)
        cost.plot(bad, [0.03] * len(bad), "x", color=palette.bad, transform=cost.get_xaxis_transform())
        for i, tier in enumerate(tiers):
            own = [next((t for t in r["tiers"] if t["name"] == tier), None) for r in good]
            kept = {"color": palette.tier(i), "ls": line, "marker": "o", "ms": 4}
            kept["label"] = plain(tier) if of is next(iter(series.values())) else None
            gpus.plot(x, [t["tp"] * t["replicas"] if t else 0 for t in own], **kept)
            length.plot(x, [_or_nan(t and t["draft_length"]) for t in own], **kept)
    if any(not r["feasible"] for r in rows):
        cost.plot([], [], "x", color=palette.bad, label="nothing feasible")
    cost.set(title="cost", ylabel="USD per 1000 requests", ylim=(0, None))
    price.set(title="lambda", ylabel="USD per correct answer")
    gpus.set(title="GPUs of each tier", ylabel="GPUs [-]")
    length.set(title="draft length at the mean batch", ylabel="drafted [tokens]")
    for axes in (gpus, length):
        axes.yaxis.get_major_locator().set_params(integer=True)
    for axes in panels.ravel():
        _along(axes, values, bool(numbers))
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="best", handlelength=3.2)  # long enough for dashes
    for axes in panels[1]:
        axes.set_xlabel(plain(along))
    others = ", ".join(k for k in keys if k != along)
    caption = f"The plan at each value of {along}, predicted." + (f" Lines differ in {others}." if others else "")
    return Picture("sweep", "Plans along the sweep", caption, figure)


def _or_nan(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _along(axes: Any, values: list[Any], number: bool) -> None:
    if number and min(values) > 0 and max(values) / min(values) >= 8:
        axes.set_xscale("log")
    if number and len(values) <= 12:
        axes.set_xticks(values, [f"{v:g}" for v in values])
        axes.set_xticks([], minor=True)
    elif not number:
        axes.set_xticks(range(len(values)), [plain(str(v)) for v in values])

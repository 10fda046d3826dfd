"""Predictions against measurements: scatter with y = x and a band of 10 %, and errors by group with their bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, product
from typing import TYPE_CHECKING, Any

from tierwise.style import LIGHT, WIDE, WIDTH, Palette, canvas, interval_bars, plain, style

from .picture import Picture, below, identity

if TYPE_CHECKING:
    import pandas as pd

MOST_GROUPS = 40  # drawn in one figure of errors [-]
LABEL = 44  # characters of the name of a group in a figure [-]
MARKERS = ("D", "o", "s", "^", "v")


@dataclass(frozen=True, slots=True)
class Series:
    """Pairs of predicted and measured values that belong together."""

    name: str
    predicted: Sequence[float]
    measured: Sequence[float]
    aside: bool = False  # drawn faint: not in the error summary


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity, predicted and measured."""

    title: str
    quantity: str  # with its unit
    series: Sequence[Series]


def scatter(name: str, title: str, comparisons: Sequence[Comparison], palette: Palette = LIGHT) -> Picture:
    """Draw predicted against measured values, one panel a quantity; says so where there is nothing to compare."""
    some = [c for c in comparisons if any(len(s.measured) for s in c.series)]
    if not some:
        return Picture(name, title, "Not drawn: no row has what the prediction needs.")
    with style(palette):
        size = (WIDE if len(some) > 1 else WIDTH, 5.2 if len(some) > 1 else 5.6)
        figure, panels = canvas(1, len(some), size=size, squeeze=False)
        names = list(dict.fromkeys(s.name for c in some for s in c.series))
        looks = dict(zip(names, cycle((m, p) for m, p in product(MARKERS, _colours(palette)[:6])), strict=False))
        drawn: set[str] = set()
        for axes, c in zip(panels[0], some, strict=True):
            kept = [s for s in c.series if len(s.measured)]
            identity(axes, [float(v) for s in kept for of in (s.predicted, s.measured) for v in of], palette)
            for s in kept:
                marker, colour = looks[s.name]
                label = plain(s.name) if s.name not in drawn else None
                faint = {"alpha": 0.35 if s.aside else 0.9}
                panels[0][0].plot([], [], marker, color=colour, mfc="none", ms=4.5, label=label)
                axes.plot(s.measured, s.predicted, marker, color=colour, mfc="none", ms=4.5, mew=0.9, **faint)
                drawn.add(s.name)
            axes.text(0.03, 0.97, plain(c.title), transform=axes.transAxes, va="top", weight="bold")
            axes.set(xlabel=f"measured {c.quantity}", ylabel=f"predicted {c.quantity}")
        below(figure, panels[0][0], 3)
    return Picture(
        name, title, "Predicted against measured; on the line they agree, the band is 10 % either way.", figure
    )


def _colours(palette: Palette) -> tuple[str, ...]:
    return (palette.predicted, palette.bad, palette.good, palette.tiers[1], palette.tiers[3], palette.ink)


def errors(
    name: str, rows: Sequence[dict[str, Any]], keys: Sequence[str], palette: Palette = LIGHT, title: str = ""
) -> Picture:
    """Draw the mean absolute error of each group and its signed bias, worst group first."""
    title = title or "Error by group"
    known = sorted((r for r in rows if r["n"]), key=lambda r: -r["mape"])
    if not known:
        return Picture(name, title, "Not drawn: no group has a row that could be compared.")
    shown = known[:MOST_GROUPS]
    with style(palette):
        figure, axes = canvas(size=(WIDTH, 1.2 + 0.24 * len(shown)))
        names = [f"{shortened(_group(r, keys))} (n {int(r['n'])})" for r in shown]
        places = list(range(len(shown)))[::-1]
        sizes = [100 * r["mape"] for r in shown]
        axes.barh(places, sizes, height=0.62, color=palette.line, label="mean absolute error")
        axes.plot([100 * r["p90_ape"] for r in shown], places, "|", color=palette.soft, ms=9, label="90th percentile")
        bias = [100 * r["bias"] for r in shown]
        axes.plot(bias, places, **palette.mark("measured"), label="bias (below 0: predicted too little)")
        axes.axvline(0, color=palette.ink, lw=0.8)
        axes.set_yticks(places, [plain(name) for name in names])
        axes.set(xlabel="predicted against measured [%]", ylim=(-0.7, len(shown) - 0.3))
        axes.grid(axis="y", visible=False)
        below(figure, axes, 3)
    left = (
        f" The {len(known) - len(shown)} groups of least error are in the table alone."
        if len(known) > len(shown)
        else ""
    )
    return Picture(name, title, f"Groups in the order of their mean absolute error, the worst first.{left}", figure)


def _group(row: dict[str, Any], keys: Sequence[str]) -> str:
    """Return the name of a group: its texts as they are, its numbers with what they count."""
    return ", ".join(row[k] if isinstance(row[k], str) else f"{k} {row[k]}" for k in keys if row[k] != "")


def shortened(text: str, most: int = LABEL) -> str:
    """Return a long name with its middle left out; the table beside the figure has the whole.

    Examples
    --------
    >>> shortened("a name of many words", 11)
    'a nam..ords'
    """
    if len(text) <= most:
        return text
    kept = most - 2
    return f"{text[: kept - kept // 2]}..{text[len(text) - kept // 2 :]}"


def steps(table: pd.DataFrame, name: str = "scatter", palette: Palette = LIGHT) -> Picture:
    """Draw step times of :func:`calibration.validate.predict_steps`: a panel a phase, a series a degree."""
    return scatter(
        name,
        "Step times",
        [
            Comparison(
                str(phase),
                "step [ms]",
                [_series(f"TP {tp}", of, "predicted", "measured", 1e3) for tp, of in part.groupby("tp")],
            )
            for phase, part in table.groupby("phase", sort=True)
        ],
        palette,
    )


def _series(name: str, rows: pd.DataFrame, predicted: str, measured: str, scale: float, aside: bool = False) -> Series:
    return Series(name, (scale * rows[predicted]).tolist(), (scale * rows[measured]).tolist(), aside)


def serving(rows: pd.DataFrame, name: str = "scatter", palette: Palette = LIGHT) -> Picture:
    """Draw TPOT and TTFT of serving points, those set apart faint; suspect ones are left out."""
    kept = rows[rows["apart"] != "suspect"]
    return scatter(
        name,
        "Serving points",
        [
            Comparison(
                f"mean {time.upper()}",
                f"mean {time.upper()} [ms]",
                [
                    _series(
                        ", ".join(map(str, key)), points, f"{time}_predicted_s", f"{time}_s", 1e3, aside=bool(apart)
                    )
                    for key, of in kept.groupby(["model", "system", "backend"])
                    for apart, points in of.groupby("apart")
                ],
            )
            for time in ("tpot", "ttft")
        ],
        palette,
    )


def reliability(result: dict[str, Any], least: int, palette: Palette = LIGHT) -> Picture:
    """Draw the reliability of predicted probabilities: P(right) above, P(rescue) below, one column a group.

    Parameters
    ----------
    least : int
        Prompts that a bin must hold to be drawn [-].
    """
    groups = result["by_group"]
    with style(palette) as ink:
        figure, panels = canvas(2, len(groups), size=(3.0 * max(len(groups), 2) + 0.8, 6.4), squeeze=False, sharex=True)
        for column, g in enumerate(groups):
            for row, kind in enumerate(("right", "rescue")):
                axes = panels[row, column]
                axes.plot((0, 1), (0, 1), color=ink.soft, lw=0.9)
                for (marker, colour), entry in zip(product(MARKERS, _colours(ink)), g[kind], strict=False):
                    each = [b for b in entry["reliability"] if b["n"] >= least]
                    x, y = [b["predicted"] for b in each], [b["observed"] for b in each]
                    chance = [1.96 * (b["predicted"] * (1 - b["predicted"]) / b["n"]) ** 0.5 for b in each]
                    look = {"marker": marker, "color": colour, "mfc": "none", "ms": 4, "lw": 0.8, "elinewidth": 0.8}
                    axes.errorbar(x, y, chance, capsize=2, label=plain(entry["name"]), **look)
                axes.set(xlim=(0, 1), ylim=(-0.03, 1.03))
                axes.legend(loc="lower right", fontsize=6.5)
            panels[0, column].set_title(plain(f"{g['name']} (n = {g['n']})"))
            panels[1, column].set_xlabel("predicted [-]")
        panels[0, 0].set_ylabel("share right [-]")
        panels[1, 0].set_ylabel("share rescued [-]")
    caption = (
        f"Observed share against predicted probability, out of fold; bars are 95 % of chance were the prediction true; "
        f"bins of fewer than {least} prompts are left out."
    )
    return Picture("reliability", "Reliability", caption, figure)


def cascades(result: dict[str, Any], palette: Palette = LIGHT) -> Picture:
    """Draw planned cascades and what they did on prompts they had not seen, one panel a group."""
    groups = result["by_group"]
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    with style(palette) as ink:
        figure, panels = canvas(lines, columns, size=(WIDE, 0.8 + 2.7 * lines), squeeze=False)
        for axes, g in zip(panels.ravel(), groups, strict=False):
            plans = g["plans"]
            predicted = [p["predicted_cost"] for p in plans], [p["predicted_quality"] for p in plans]
            axes.plot(*predicted, **(ink.mark("predicted") | {"marker": "o", "ms": 4}), label="planned")
            spans = [p["realised_quality_interval"] or (None, None) for p in plans]
            realised = [p["realised_cost"] for p in plans], [p["realised_quality"] for p in plans]
            look = {**ink.mark("measured"), "label": "realised on unseen prompts (95 %)"}
            interval_bars(axes, *realised, [tuple(s) for s in spans], ink, **look)
            axes.set_title(plain(f"{g['name']} (n = {g['n']})"))
            axes.set(xlabel=plain(f"cost [{g['cost_unit']}]"), ylabel="quality [-]")
            axes.tick_params(axis="x", labelrotation=20)
        for axes in panels.ravel()[len(groups) :]:
            axes.remove()
        below(figure, panels[0, 0], 2)
    caption = "Plans for shares of the quality gap between the tiers: fitted on training folds, run on the others."
    return Picture("cascade", "Planned and realised cascades", caption, figure)

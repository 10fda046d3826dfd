"""What-if charts drawn twice from the same data: as options of ECharts for the browser, with matplotlib for files.

Colours in the browser are the CSS variables of :func:`tierwise.style.variables`: another theme needs no new chart.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from planner.whatif_charts import Axis, Chart, Panel, Series, Stack

from .style import LIGHT, SMALL, FileKind, Palette, canvas, plain, rendered, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
TINY = 1e-100  # below it a value is drawn as none [-]
_TEXT = {"color": "var(--soft)", "fontSize": 11, "fontFamily": FONT}
_NEVER = "never here"  # a part that is the rest of a bar, not something


# --- in the browser --------------------------------------------------------------------------------------------------


def options(chart: Chart | Stack) -> dict[str, Any]:
    """Return the ECharts options of a chart."""
    return _stack_options(chart) if isinstance(chart, Stack) else _chart_options(chart)


def _chart_options(chart: Chart) -> dict[str, Any]:
    count = len(chart.panels)
    series = [_series(s, i, chart) for i, panel in enumerate(chart.panels) for s in panel.series if s.x]
    bars = [_interval(s, i) for i, panel in enumerate(chart.panels) for s in panel.series if s.low]
    marks = [_marks(chart, panel, i) for i, panel in enumerate(chart.panels) if chart.marks or panel.level is not None]
    first = chart.panels[0].series[:1]
    along = bool(first) and first[0].shape == "line"
    return _base("axis" if along else "item") | {
        "legend": [_legend(panel, i, count) for i, panel in enumerate(chart.panels)],
        "grid": [_grid(i, count) for i in range(count)],
        "xAxis": [_axis(chart.x, i, name=i == count - 1) for i in range(count)],
        "yAxis": [_axis(panel.y, i) | _room(panel) | {"nameGap": 44} for i, panel in enumerate(chart.panels)],
        "axisPointer": {"link": [{"xAxisIndex": "all"}]},
        "series": series + bars + marks,
    }


def _base(trigger: str = "item") -> dict[str, Any]:
    """Return what all charts share; ``trigger`` axis: one box for all lines at an x, item: one for a point [-]."""
    return {
        "animation": False,
        "textStyle": _TEXT,
        "tooltip": {
            "trigger": trigger,
            "confine": True,
            "appendTo": "body",
            ":formatter": "tierwise.tip",
            "axisPointer": {"lineStyle": {"color": "var(--soft)"}},
            "backgroundColor": "var(--paper)",
            "borderColor": "var(--line)",
            "textStyle": {"color": "var(--ink)", "fontSize": 12},
            "extraCssText": "max-width: 26rem; white-space: normal;",
        },
    }


def _grid(i: int, count: int) -> dict[str, Any]:
    """Return where panel ``i`` lies: rows of one height below each other, each under its own legend [%]."""
    legend, foot = (13.0, 15.0) if count == 1 else (5.0, 6.5)
    row = (100.0 - foot) / count
    return {
        "left": 62,
        "right": 20,
        "top": f"{i * row + legend}%",
        "height": f"{row - legend - (0 if count == 1 else 2.5)}%",
    }


def _legend(panel: Panel, i: int, count: int) -> dict[str, Any]:
    row = (100.0 - 6.5) / count
    return {
        "top": f"{i * row}%" if count > 1 else 0,
        "left": 24,
        "right": 4,
        "itemWidth": 15,
        "itemHeight": 9,
        "itemGap": 8,
        "selectedMode": False,
        "type": "scroll",
        "pageIconSize": 9,
        "pageTextStyle": _TEXT,
        "pageIconColor": "var(--soft)",
        "textStyle": _TEXT,
        "data": list({s.name: {"name": s.name} | _icon(s, panel) for s in panel.series if s.x}.values()),
    }


def _icon(s: Series, panel: Panel) -> dict[str, Any]:
    """Return the sign of a series in the legend; one name for several tiers has no tier's colour."""
    colour = _css(s) if sum(o.name == s.name for o in panel.series) == 1 or s.role[:4] != "tier" else "var(--soft)"
    if s.shape in ("line", "dashed", "step"):
        line = {"type": "dashed" if s.shape == "dashed" else "solid", "width": 2, "color": colour}
        return {"lineStyle": line, "itemStyle": {"opacity": 0}}
    if s.shape in ("ring", "open"):
        return {"itemStyle": {"color": "transparent", "borderColor": colour, "borderWidth": 2}}
    return {"itemStyle": {"color": colour}}


def _axis(axis: Axis, i: int, name: bool = True) -> dict[str, Any]:
    return {
        "type": "log" if axis.log else "value",
        "gridIndex": i,
        "name": axis.label if name else "",
        "nameLocation": "middle",
        "nameGap": 28,
        "nameTextStyle": _TEXT | {"color": "var(--ink)"},
        "scale": True,
        "axisLine": {"show": True, "lineStyle": {"color": "var(--soft)"}},
        "axisTick": {"show": True, "lineStyle": {"color": "var(--soft)"}},
        "axisLabel": _TEXT | {"hideOverlap": True} | ({} if name else {"show": False}),
        "splitLine": {"lineStyle": {"color": "var(--line)"}},
        "splitNumber": 4,
    } | ({"minInterval": 1, "min": 0} if axis.whole else {})


def _room(panel: Panel) -> dict[str, Any]:
    """Return ends of a linear y axis that leave room above and below, at round numbers."""
    values = [v for s in panel.series for v in (*s.y, *(() if s.across else (*s.low, *s.high)))]
    values += [] if panel.level is None else [panel.level]
    if panel.y.log or panel.y.whole or not values:
        return {}
    step, low, high = ticks(min(values), max(values))
    return {"min": low, "max": high, "interval": step}


def ticks(least: float, most: float, wanted: int = 4) -> tuple[float, float, float]:
    """Return a round step and the multiples of it that hold a range between them.

    A range narrower than a billionth of its values is one value.

    Examples
    --------
    >>> ticks(0.81, 0.87), ticks(3.0, 3.0)[0] > 0
    ((0.02, 0.8, 0.88), True)
    """
    size = max(abs(least), abs(most))
    span = most - least if most - least > 1e-9 * size + TINY else size if size > TINY else 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= span / wanted * 0.999)
    digits = max(0, 2 - math.floor(math.log10(step)))
    low, high = math.floor(least / step + 1e-9) * step, math.ceil(most / step - 1e-9) * step
    return round(step, digits), round(low, digits), round(max(high, low + step), digits)


def _series(s: Series, i: int, chart: Chart) -> dict[str, Any]:
    notes = s.notes or ("",) * len(s.x)
    points = zip(s.x, s.y, notes, strict=True)
    drawn: dict[str, Any] = {
        "name": s.name,
        "type": "line" if s.shape in ("line", "dashed", "step") else "scatter",
        "xAxisIndex": i,
        "yAxisIndex": i,
        "data": [{"value": [x, y], "note": note} if note else [x, y] for x, y, note in points],
        "dimensions": [chart.x.unit, chart.panels[i].y.unit],  # what a box over the chart calls the two
        "itemStyle": {"color": _css(s)},
        "emphasis": {"disabled": True},
        "z": 5 if s.role == "simulated" else 4 if s.shape == "ring" else 3,
    }
    if drawn["type"] == "line":
        dash = {"type": "dashed" if s.shape == "dashed" else "solid", "width": 2, "color": _css(s)}
        return drawn | {
            "lineStyle": dash,
            "showSymbol": s.shape == "step",  # few points, each the end of a step: pointed at one by one
            "symbol": "circle",
            "symbolSize": 9,
            "itemStyle": {"color": _css(s), "opacity": 0},
            "step": "end" if s.shape == "step" else False,
        }
    symbol = {"simulated": "rect", "other": "triangle"}.get(s.role, "circle")
    hollow = {"color": "transparent", "borderColor": _css(s), "borderWidth": 2}
    if s.shape == "ring":
        return drawn | {"symbol": "circle", "symbolSize": 15, "itemStyle": hollow}
    size = {"simulated": 9, "other": 10}.get(s.role, 7)
    return drawn | {"symbol": symbol, "symbolSize": size} | ({"itemStyle": hollow} if s.shape == "open" else {})


def _interval(s: Series, i: int) -> dict[str, Any]:
    """Return the bars of the intervals of a series: lines from end to end, a gap between two."""
    data: list[list[float | None]] = []
    for x, y, low, high in zip(s.x, s.y, s.low, s.high, strict=True):
        from_, to = ((low, y), (high, y)) if s.across else ((x, low), (x, high))
        data += [[*from_], [*to], [None, None]]
    return {
        "name": f"{s.name}, interval",
        "type": "line",
        "xAxisIndex": i,
        "yAxisIndex": i,
        "data": data,
        "connectNulls": False,
        "symbol": "none",
        "silent": True,
        "tooltip": {"show": False},
        "lineStyle": {"color": _css(s), "width": 2},
        "z": 4,
    }


def _marks(chart: Chart, panel: Panel, i: int) -> dict[str, Any]:
    """Return the lines through a panel; their names stand in the first panel only."""
    lines: list[dict[str, Any]] = [
        {
            "xAxis": x,
            "label": {"show": i == 0, "formatter": name, "position": "insideEndTop"},
        }
        for name, x in chart.marks
    ]
    if panel.level is not None:
        lines.append({"yAxis": panel.level, "label": {"show": False}})
    return {
        "name": "",
        "type": "line",
        "xAxisIndex": i,
        "yAxisIndex": i,
        "data": [],
        "tooltip": {"show": False},
        "markLine": {
            "symbol": "none",
            "silent": True,
            "label": _TEXT | {"color": "var(--ink)"},
            "lineStyle": {"color": "var(--soft)", "type": [4, 4], "width": 1.2},
            "data": lines,
        },
    }


def _stack_options(chart: Stack) -> dict[str, Any]:
    colours = part_colours(chart, [f"var(--part-{i})" for i in range(7)], "var(--line)")
    return _base() | {
        "legend": [
            {
                "top": 0,
                "left": 8,
                "right": 8,
                "itemWidth": 11,
                "itemHeight": 11,
                "itemGap": 10,
                "selectedMode": False,
                "textStyle": _TEXT,
                "data": [name for name, _ in chart.parts],
            }
        ],
        "grid": [{"left": 62, "right": 20, "top": 54, "bottom": 46}],
        "xAxis": [_axis(chart.x, 0) | {"scale": False} | ({"max": 100} if chart.x.unit == "%" else {})],
        "yAxis": [
            {
                "type": "category",
                "data": list(chart.categories),
                "inverse": True,
                "axisLabel": _TEXT | {"color": "var(--ink)", "fontSize": 12},
                "axisLine": {"lineStyle": {"color": "var(--soft)"}},
                "axisTick": {"show": False},
            }
        ],
        "series": [
            {
                "name": name,
                "type": "bar",
                "stack": "all",
                "barMaxWidth": 26,
                "itemStyle": {"color": colours[name], "borderColor": "var(--paper)", "borderWidth": 1},
                "emphasis": {"disabled": True},
                "data": [{"value": v, "note": chart.x.unit} for v in values],
            }
            for name, values in chart.parts
        ],
    }


def part_colours(chart: Stack, colours: list[str], rest: str) -> dict[str, str]:
    """Return the colour of each part; what is not there has the colour of the grid."""
    return {name: rest if name == _NEVER else colours[_place(chart, name)] for name, _ in chart.parts}


def _place(chart: Stack, name: str) -> int:
    from planner.whatif_charts import PARTS

    names = [n for n, _ in chart.parts]
    return PARTS.index(name) if name in PARTS else {0: 2, 1: 1}.get(names.index(name), 6)


def _css(s: Series) -> str:
    return {"predicted": "var(--predicted)", "simulated": "var(--simulated)", "other": "var(--soft)"}.get(
        s.role, f"var(--tier-{s.role[-1]})"
    )


# --- in files --------------------------------------------------------------------------------------------------------


def picture(chart: Chart | Stack, kind: FileKind, title: str, palette: Palette = LIGHT) -> bytes:
    """Return a chart as the bytes of an SVG or PNG, in the style of all figures."""
    with style(palette) as ink:
        figure = _stack_figure(chart, ink) if isinstance(chart, Stack) else _chart_figure(chart, ink)
        figure.suptitle(plain(f"{title}: {chart.title[0].lower()}{chart.title[1:]}"))
        return rendered(figure, kind)


def _chart_figure(chart: Chart, ink: Palette) -> Figure:
    count = len(chart.panels)
    figure, axes = canvas(count, 1, size=(7.2, 1.4 + 2.6 * count), sharex=True, squeeze=False)
    for panel, ax in zip(chart.panels, axes[:, 0], strict=True):
        for s in panel.series:
            _draw(ax, s, ink)
        for _, x in chart.marks:
            ax.axvline(x, color=ink.soft, lw=1, ls=(0, (4, 4)))
        if panel.level is not None:
            ax.axhline(panel.level, color=ink.soft, lw=1, ls=(0, (4, 4)))
        ax.set_ylabel(panel.y.label)
        ax.set_yscale("log" if panel.y.log else "linear")
        if any(s.x for s in panel.series):
            ax.legend()
    for name, x in chart.marks:
        axes[0, 0].annotate(name, (x, 1), xycoords=("data", "axes fraction"), fontsize=SMALL, ha="center", va="bottom")
    axes[-1, 0].set_xlabel(chart.x.label)
    axes[-1, 0].set_xscale("log" if chart.x.log else "linear")
    return figure


def _draw(ax: Axes, s: Series, ink: Palette) -> None:
    fixed = {"predicted": ink.predicted, "simulated": ink.simulated, "other": ink.soft}
    colour = fixed[s.role] if s.role in fixed else ink.tier(int(s.role[-1]))
    if s.low:
        middle = s.x if s.across else s.y
        below = [max(v - low, 0.0) for v, low in zip(middle, s.low, strict=True)]
        above = [max(high - v, 0.0) for v, high in zip(middle, s.high, strict=True)]
        x_ends, y_ends = ([below, above], None) if s.across else (None, [below, above])
        ax.errorbar(s.x, s.y, y_ends, x_ends, fmt="none", ecolor=colour, capsize=3)
    if s.shape in ("line", "dashed", "step"):
        ax.plot(
            s.x,
            s.y,
            color=colour,
            ls="--" if s.shape == "dashed" else "-",
            drawstyle="steps-post" if s.shape == "step" else "default",
            label=s.name,
        )
        return
    marker = {"simulated": "s", "other": "^"}.get(s.role, "o")
    hollow = s.shape in ("ring", "open")
    ax.plot(
        s.x, s.y, marker, color=colour, ms=9 if s.shape == "ring" else 5, mfc="none" if hollow else None, label=s.name
    )


def _stack_figure(chart: Stack, ink: Palette) -> Figure:
    figure, ax = canvas(size=(7.2, 1.9 + 0.5 * len(chart.categories)))
    colours = part_colours(chart, list(ink.parts), ink.line)
    left = [0.0] * len(chart.categories)
    for name, values in chart.parts:
        ax.barh(chart.categories, values, left=left, color=colours[name], edgecolor=ink.paper, height=0.6, label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(chart.x.label)
    ax.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return figure

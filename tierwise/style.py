"""How everything that tierwise draws looks: colours, marks, sizes and files, here and nowhere else.

Colours are those of Okabe and Ito (2008), told apart by colour-blind readers; the dark variants are lighter tints of
the same hues. What a number is decides how it is drawn: **predicted** is a line or a filled mark in blue, **simulated**
points with bars of their interval in orange, **measured** hollow diamonds in near-black. Tiers have other colours.
matplotlib is imported when something is drawn; colours and marks are plain data, for other painters.

Examples
--------
>>> import tempfile
>>> with style() as ink:
...     figure, axes = canvas()
...     _ = axes.plot([1, 2], [3, 4], **ink.mark("predicted"))
...     [path.name for path in save(figure, Path(tempfile.mkdtemp()) / "pair")]
['pair.svg', 'pair.png']
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["predicted", "simulated", "measured"]
FileKind = Literal["svg", "png"]
KINDS_OF_FILE: tuple[FileKind, ...] = ("svg", "png")

WIDTH = 7.2  # of a figure [inch]
WIDE = 9.6  # of one with panels side by side [inch]
HEIGHT = 4.2  # [inch]
DPI = 150  # of PNG [1/inch]
FONTS = ("DejaVu Sans",)  # comes with matplotlib: the same on every machine
CSS_FONTS = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'  # of pages
FONT_SIZE = 9.0  # [pt]
SMALL = 7.5  # of legends and labels in a plot [pt]


@dataclass(frozen=True, slots=True)
class Palette:
    """The colours of a picture or a page, as ``#rrggbb``; ``tiers`` from the cheapest tier to the dearest."""

    name: str
    paper: str  # background
    panel: str  # background of a box on the paper
    ink: str  # text and axes
    soft: str  # secondary text, plans that were not chosen
    line: str  # grid and rules
    predicted: str
    simulated: str
    measured: str
    good: str
    bad: str
    tiers: tuple[str, ...]
    parts: tuple[str, ...]  # of a whole, such as a step

    def colour(self, kind: Kind) -> str:
        """Return the colour of what is predicted, simulated or measured."""
        return {"predicted": self.predicted, "simulated": self.simulated, "measured": self.measured}[kind]

    def mark(self, kind: Kind, *, point: bool = False) -> dict[str, Any]:
        """Return the arguments of ``Axes.plot`` for one kind of number; ``point``: a single one, not a line.

        Only what is predicted is ever joined by a line: there is nothing between simulated or measured points.
        """
        colour = self.colour(kind)
        if kind == "measured":
            return {"color": colour, "linestyle": "none", "marker": "D", "markersize": 5.5, "markerfacecolor": "none"}
        if kind == "simulated":
            return {"color": colour, "linestyle": "none", "marker": "s", "markersize": 5}
        if point:
            return {"color": colour, "linestyle": "none", "marker": "o", "markersize": 6}
        return {"color": colour, "linestyle": "-", "linewidth": 1.6}

    def tier(self, i: int) -> str:
        """Return the colour of tier ``i``, counted from the cheapest."""
        return self.tiers[i % len(self.tiers)]


LIGHT = Palette(
    name="light",
    paper="#ffffff",
    panel="#f4f6f8",
    ink="#1b1f24",
    soft="#5f6873",
    line="#d5dae0",
    predicted="#0072b2",
    simulated="#e69f00",
    measured="#222222",
    good="#009e73",
    bad="#d55e00",
    tiers=("#009f74", "#cc79a7", "#d55e01", "#56b4e9"),
    parts=("#0072b3", "#56b4ea", "#009e74", "#f0e442", "#e69f01", "#cc79a8", "#9aa3ad"),
)
DARK = Palette(
    name="dark",
    paper="#14181d",
    panel="#1e242b",
    ink="#e8ebef",
    soft="#a3adb8",
    line="#39424c",
    predicted="#4fa9e2",
    simulated="#f0b030",
    measured="#eeeeee",
    good="#2fc498",
    bad="#f07f3c",
    tiers=("#2fc499", "#dd9abf", "#f07f3d", "#8fd0f5"),
    parts=("#4fa9e3", "#8fd0f6", "#2fc49a", "#f0e443", "#f0b031", "#dd9ac0", "#8a94a0"),
)
PALETTES = {palette.name: palette for palette in (LIGHT, DARK)}


def variables(palette: Palette) -> dict[str, str]:
    """Return the colours by the names of their CSS variables; within a palette no colour has two names.

    Examples
    --------
    >>> variables(LIGHT)["--predicted"], variables(DARK)["--tier-0"]
    ('#0072b2', '#2fc499')
    """
    single = ("paper", "panel", "ink", "soft", "line", "predicted", "simulated", "measured", "good", "bad")
    return (
        {f"--{name}": getattr(palette, name) for name in single}
        | {f"--tier-{i}": colour for i, colour in enumerate(palette.tiers)}
        | {f"--part-{i}": colour for i, colour in enumerate(palette.parts)}
    )


@contextmanager
def style(palette: Palette = LIGHT) -> Iterator[Palette]:
    """Draw in the one style within this block; what was set before is set again after it.

    The same drawing gives the same bytes of SVG and PNG, on any day and in any process.
    """
    import matplotlib as mpl
    from cycler import cycler

    settings: Any = {
        "font.family": "sans-serif",
        "font.sans-serif": list(FONTS),
        "font.size": FONT_SIZE,
        "axes.titlesize": FONT_SIZE + 0.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.labelsize": FONT_SIZE,
        "xtick.labelsize": FONT_SIZE - 1,
        "ytick.labelsize": FONT_SIZE - 1,
        "legend.fontsize": SMALL,
        "legend.frameon": False,
        "figure.titlesize": FONT_SIZE + 1,
        "figure.facecolor": palette.paper,
        "savefig.facecolor": palette.paper,
        "axes.facecolor": palette.paper,
        "axes.edgecolor": palette.soft,
        "axes.labelcolor": palette.ink,
        "axes.titlecolor": palette.ink,
        "text.color": palette.ink,
        "xtick.color": palette.soft,
        "ytick.color": palette.soft,
        "xtick.labelcolor": palette.ink,
        "ytick.labelcolor": palette.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=[palette.predicted, palette.bad, *palette.tiers]),
        "grid.color": palette.line,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "errorbar.capsize": 3,
        "figure.constrained_layout.w_pad": 0.08,
        "figure.constrained_layout.h_pad": 0.08,
        "figure.dpi": DPI,
        "savefig.dpi": DPI,
        "svg.hashsalt": "tierwise",
        "svg.fonttype": "path",
    }
    with mpl.rc_context(settings):
        yield palette


def canvas(rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None, **kept: Any) -> tuple[Figure, Any]:
    """Return a new figure and its axes, as ``pyplot.subplots`` would, which no window knows of; ``size`` [inch]."""
    from matplotlib.figure import Figure

    width = WIDTH if columns == 1 else WIDE
    figure = Figure(figsize=size or (width, HEIGHT), layout="constrained")
    return figure, figure.subplots(rows, columns, **kept)


def interval_bars(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    intervals: Sequence[tuple[float | None, float | None]],
    palette: Palette = LIGHT,
    **kept: Any,
) -> None:
    """Draw simulated points with their intervals; a point whose interval is not known has no bar.

    Examples
    --------
    >>> with style() as ink:
    ...     figure, axes = canvas()
    ...     interval_bars(axes, [1, 2], [3, 4], [(2.5, 3.5), (None, None)], ink, label="simulated")
    """
    ends = [
        (value - low, high - value) if low is not None and high is not None else (float("nan"), float("nan"))
        for value, (low, high) in zip(y, intervals, strict=True)
    ]
    bars = [[max(low, 0.0) if low == low else low for low, _ in ends], [max(h, 0.0) if h == h else h for _, h in ends]]
    axes.errorbar(x, y, bars, **(palette.mark("simulated") | {"elinewidth": 1.4} | kept))


def rendered(figure: Figure, kind: FileKind) -> bytes:
    """Return a figure as the bytes of an SVG or PNG; call it within :func:`style`."""
    metadata: dict[str, Any] = {"Creator": "tierwise", "Date": None} if kind == "svg" else {"Software": "tierwise"}
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def files_of(figure: Figure) -> dict[FileKind, bytes]:
    """Return a figure as SVG and as PNG, laid out once; call it within :func:`style`."""
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # so that saving does not lay it out once more
    return {kind: rendered(figure, kind) for kind in KINDS_OF_FILE}


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write ``path`` as .svg and as .png, whatever its own suffix; return both. Call it within :func:`style`."""
    stem = Path(path)
    stem = stem.with_suffix("") if stem.suffix in (".svg", ".png") else stem
    written = []
    for kind, data in files_of(figure).items():
        written.append(stem.with_name(f"{stem.name}.{kind}"))
        written[-1].write_bytes(data)
    return written


def plain(text: str) -> str:
    """Return a name that somebody else chose so that matplotlib writes it as it is, without reading mathematics.

    Examples
    --------
    >>> plain("$3 a GPU")
    '\\\\$3 a GPU'
    """
    return text.replace("$", r"\$")

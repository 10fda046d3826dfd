"""A figure with its name and what it says, and figures as files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierwise.style import LIGHT, Palette, files_of, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A figure, or why there is none."""

    name: str  # of its files, without suffix
    title: str
    caption: str  # what is shown, in a sentence or two; why nothing is, where there is no figure
    figure: Figure | None = None


Draw = Callable[[dict[str, Any], Palette], Picture]


def drawn(painters: Iterable[Draw], result: dict[str, Any], palette: Palette = LIGHT) -> list[Picture]:
    """Return what each painter makes of a result."""
    with style(palette):
        return [painter(result, palette) for painter in painters]


def files(pictures: Iterable[Picture]) -> dict[str, bytes]:
    """Return the .svg and .png of all pictures that have a figure, by file name: the same bytes for the same result."""
    with style():
        return {
            f"{p.name}.{kind}": data
            for p in pictures
            if p.figure is not None
            for kind, data in files_of(p.figure).items()
        }


def draw(picture: Picture, path: Path) -> list[Path]:
    """Write the figure of a picture beside ``path`` as .svg and .png and return both; nothing if it has none."""
    with style():
        return save(picture.figure, path) if picture.figure is not None else []


def apart(values: Sequence[float], least: float) -> list[bool]:
    """Return which values to label so that labels lie at least ``least`` of their range apart, the last one always.

    Examples
    --------
    >>> apart([0.0, 0.01, 0.5, 0.98, 1.0], 0.1)
    [True, False, True, False, True]
    """
    span = (max(values) - min(values)) or 1.0
    keep, last = [], float("-inf")
    for i, value in enumerate(values):
        end = i == len(values) - 1
        clear = value - last >= least * span and (end or values[-1] - value >= least * span)
        keep.append(end or clear)
        last = value if keep[-1] else last
    return keep


def below(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """Put the legend of ``axes`` under everything, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def beside(axes: Axes) -> None:
    """Put the legend to the right of the axes, where it hides nothing."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def identity(axes: Axes, values: Sequence[float], palette: Palette, band: float = 0.1) -> None:
    """Draw y = x over the range of some values and a band of 10 % about it, both axes logarithmic."""
    low, high = min(values) / 1.3, max(values) * 1.3
    ends = [low, high]
    axes.fill_between(ends, [(1 - band) * e for e in ends], [(1 + band) * e for e in ends], color=palette.line, lw=0)
    axes.plot(ends, ends, color=palette.soft, lw=0.9)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_box_aspect(1)
    for axis in (axes.xaxis, axes.yaxis):
        few_ticks(axis, high / low)


def few_ticks(axis: Any, spread: float = 100.0, unit: float = 1.0) -> None:
    """Write the ticks of a logarithmic axis as plain numbers in a unit, few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    steps = [1.0]
    if spread < 200:
        steps = [1.0, 2.0, 5.0] if spread >= 8 else [1.0, 1.5, 2.0, 3.0, 5.0, 7.0]
    axis.set_major_locator(LogLocator(subs=steps, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axis.set_minor_formatter(NullFormatter())

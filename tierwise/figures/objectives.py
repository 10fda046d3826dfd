"""Plans that none beats in several objectives, from the dictionary of ``tierwise plan --objectives --format json``."""

from __future__ import annotations

from typing import Any

from tierwise.style import LIGHT, WIDTH, Palette, canvas

from .picture import Picture, drawn

LABELS = {
    "cost": "cost [USD per 1000 requests]",
    "quality": "quality [share of right answers]",
    "latency": "mean time to the answer [s]",
    "energy": "energy [J per request]",
}


def pictures(result: dict[str, Any], palette: Palette = LIGHT) -> list[Picture]:
    """Return the one figure of several objectives."""
    return drawn((pareto,), result, palette)


def pareto(result: dict[str, Any], palette: Palette) -> Picture:
    """Draw every objective against the first one; of three or more another one is the shade of the points."""
    names = [o["name"] for o in result["objectives"]]
    data = {o["name"]: [r[o["key"]] for r in result["pareto"]] for o in result["objectives"]}
    first, others = names[0], names[1:]
    figure, panels = canvas(1, len(others), size=(max(WIDTH, 4.4 * len(others)), 3.8), squeeze=False)
    for axes, other in zip(panels[0], others, strict=True):
        shade = next((n for n in (others[0], others[-1]) if n != other), None)
        look: dict[str, Any] = {"c": data[shade], "cmap": "cividis"} if shade else {"color": palette.predicted}
        dots = axes.scatter(data[first], data[other], s=20, **look)
        if shade:
            figure.colorbar(dots, ax=axes, label=LABELS[shade])
        axes.set(xlabel=LABELS[first], ylabel=LABELS[other])
    return Picture("pareto", "Plans that none beats", f"In {', '.join(names)}, predicted.", figure)

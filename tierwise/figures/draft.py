"""The best draft for a target, from the dictionary of ``tierwise draft --format json``."""

from __future__ import annotations

from typing import Any

from tierwise.style import LIGHT, SMALL, WIDTH, Palette, canvas, plain

from .picture import Picture, below, drawn, few_ticks


def pictures(result: dict[str, Any], palette: Palette = LIGHT) -> list[Picture]:
    """Return the one figure of a draft plan."""
    return drawn((curve,), result, palette)


def curve(result: dict[str, Any], palette: Palette) -> Picture:
    """Draw the speed-up with its interval over draft sizes, and the best draft length below."""
    rows = result["curve"]
    size = [row["draft_params"] for row in rows]
    low, high = zip(*(row["speedup_interval"] for row in rows), strict=True)
    figure, (top, bottom) = canvas(2, 1, size=(WIDTH, 5.4), sharex=True, height_ratios=(3, 1))
    level = f"{result['interval_level']:.0%}"
    top.fill_between(size, low, high, alpha=0.2, color=palette.predicted, lw=0, label=f"{level} of the acceptance")
    top.plot(size, [r["speedup"] for r in rows], **palette.mark("predicted"), label="speed-up at the best draft length")
    top.axhline(1.0, color=palette.ink, lw=0.8)
    best = f"best: {result['draft_params'] / 1e6:.0f} M, {result['draft_length']} tokens, {result['speedup']:.2f} x"
    top.plot(result["draft_params"], result["speedup"], **palette.mark("predicted", point=True), label=best)
    near = sorted(result["nearest_models"], key=lambda r: r["draft_params"])
    for i, row in enumerate(near):
        top.plot(
            row["draft_params"], row["speedup"], "x", color=palette.good, label="a catalog model" if not i else None
        )
        off = (4, -12 - 11 * i)
        top.annotate(
            plain(row["model"]),
            (row["draft_params"], row["speedup"]),
            off,
            textcoords="offset points",
            fontsize=SMALL,
            color=palette.good,
            arrowprops={"arrowstyle": "-", "color": palette.good, "lw": 0.5},
        )
    top.set(ylabel="speed-up [-]", xscale="log", ylim=(min(0.9, *low) - 0.05, None))
    bottom.step(size, [row["draft_length"] for row in rows], where="mid", **palette.mark("predicted"))
    bottom.set(xlabel="draft parameters [million]", ylabel="draft length\n[tokens]", ylim=(0, None))
    few_ticks(bottom.xaxis, unit=1e6)
    bottom.yaxis.get_major_locator().set_params(integer=True)
    below(figure, top, 2)
    where = "at the cost of its FLOPs"
    if result["cost"] == "hardware":
        where = f"on {result['tp']} x {result['accelerator']}, batch {result['batch']}, "
        where += f"context {result['context_tokens']:.0f} tokens"
    caption = f"Predicted speed-up of a target of {result['target_params'] / 1e9:.3g} B parameters {where}."
    return Picture("draft", "Speed-up by draft size", caption, figure)

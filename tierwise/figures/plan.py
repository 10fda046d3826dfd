"""The figures of a plan, from the dictionary of ``tierwise plan --format json``."""

from __future__ import annotations

from typing import Any

from tierwise.style import LIGHT, SMALL, WIDTH, Kind, Palette, canvas, interval_bars, plain

from .load import load
from .picture import Picture, apart, below, drawn

PARTS = {
    "weights": "weights",
    "compute": "compute",
    "attention": "attention and KV",
    "elementwise": "element-wise",
    "communication": "communication",
    "overhead": "host and launches",
    "draft": "draft passes",
}  # of a round, in the order they are stacked

BATCHES: tuple[Kind, ...] = ("predicted", "simulated")


def pictures(result: dict[str, Any], palette: Palette = LIGHT) -> list[Picture]:
    """Return all figures of a plan."""
    return drawn((frontier, agreement, stops, rounds, schedule, load), result, palette)


def frontier(result: dict[str, Any], palette: Palette) -> Picture:
    """Draw cost against quality: the plans no other beats, this one predicted and simulated, the top tier alone."""
    title = "Quality against cost"
    predicted, simulated = result["predicted"], result["simulated"]
    rows = [r for r in result["frontier"] if r["quality"] is not None]
    if predicted["quality"] is None or not rows:
        return Picture("frontier", title, "Not drawn: the scenario gives no quality, so plans differ in cost alone.")
    figure, axes = canvas()
    rows.sort(key=lambda r: r["usd_per_1000_requests"])
    cost, quality = [r["usd_per_1000_requests"] for r in rows], [r["quality"] for r in rows]
    hull = [r for r in rows if r["on_hull"]]
    soft = {"color": palette.soft}
    axes.plot([r["usd_per_1000_requests"] for r in hull], [r["quality"] for r in hull], lw=1, **soft, label="hull")
    axes.plot(cost, quality, "o", ms=4, **soft, label="plans no other beats, predicted")
    for r, x, y, shown in zip(rows, cost, quality, apart(cost, 0.05), strict=True):
        if shown:
            text = f"{r['gpus']} GPU" + ("s" if r["gpus"] > 1 else "")
            _label(axes, text, x, y, (-6, 6), "right", palette)
    base = result["baseline"]
    spots: dict[tuple[float, float], list[str]] = {}
    for key, said in (("plain", "no draft"), ("speculative", "with a draft")):
        if base[key] is not None and base[key]["predicted"]["quality"] is not None:
            at = base[key]["predicted"]
            spots.setdefault((at["usd_per_1000_requests"], at["quality"]), []).append(said)
    for marker, ((x, y), said_of) in zip("^v", spots.items(), strict=False):
        label = plain(f"{base['name']}, {' or '.join(said_of)}, predicted")
        axes.plot(x, y, marker, color=palette.predicted, ms=7, label=label)
    at = (predicted["usd_per_1000_requests"], predicted["quality"])
    axes.plot(*at, **(palette.mark("predicted", point=True) | {"markersize": 9}), label="this plan, predicted")
    interval_bars(
        axes,
        [simulated["cost"]["usd_per_1000_requests"]],
        [simulated["quality"]["mean"]],
        [tuple(simulated["quality"]["interval"])],
        palette,
        label="this plan, simulated (95 %)",
    )
    axes.margins(x=0.1, y=0.12)
    axes.set(xlabel="cost [USD per 1000 requests]", ylabel="quality [share of correct answers]")
    below(figure, axes, 2)
    caption = (
        "Every plan that no other beats on cost and quality; the line is the best that mixing two of them could do. "
        "Blue is this plan as predicted, orange as simulated with its 95 % interval."
    )
    return Picture("frontier", title, caption, figure)


def _label(axes: Any, text: str, x: float, y: float, off: tuple[int, int], side: str, palette: Palette) -> None:
    axes.annotate(text, (x, y), off, textcoords="offset points", ha=side, fontsize=SMALL, color=palette.soft)


def agreement(result: dict[str, Any], palette: Palette) -> Picture:
    """Draw how far each simulated figure is from its prediction."""
    title = "Predicted and simulated"
    rows, unknown = _compared(result)
    figure, axes = canvas(size=(WIDTH, 1.1 + 0.36 * len(rows)))
    places = list(range(len(rows)))[::-1]
    axes.axvspan(-10, 10, color=palette.panel, lw=0)
    axes.axvline(0, color=palette.predicted, lw=1.2)
    axes.plot([0] * len(rows), places, **palette.mark("predicted", point=True), label="predicted")
    for place, row in zip(places, rows, strict=True):
        if row["band"] is not None:
            low, high = (100 * (end / row["predicted"] - 1) for end in row["band"])
            axes.plot([low, high], [place, place], color=palette.predicted, lw=5, alpha=0.3, solid_capstyle="butt")
    points = [100 * (r["simulated"] / r["predicted"] - 1) for r in rows]
    ends = [[e if e is None else 100 * (e / r["predicted"] - 1) for e in r["interval"]] for r in rows]
    bars = [
        [float("nan") if e[i] is None else abs(x - e[i]) for x, e in zip(points, ends, strict=True)] for i in (0, 1)
    ]
    axes.errorbar(points, places, xerr=bars, **palette.mark("simulated"), elinewidth=1.4, label="simulated (95 %)")
    axes.set_yticks(places, [plain(r["label"]) for r in rows])
    axes.set(xlabel="simulated against predicted [%]", ylim=(-0.7, len(rows) - 0.3))
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    below(figure, axes, 2)
    level = result["predicted"]["interval_level"]
    caption = (
        f"How far simulation lies from prediction; grey: within 10 %, pale blue: the {level:.0%} interval of the "
        "prediction where there is one. Labels give predicted / simulated."
        + (f" Not known: {', '.join(unknown)}." if unknown else "")
    )
    return Picture("agreement", title, caption, figure)


def _compared(result: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows of a predicted value, its band, the simulated value and its interval; and the names without one."""
    p, s = result["predicted"], result["simulated"]
    cost = s["cost"]
    quality = s["quality"]
    rows: list[tuple[str, str, float, Any, Any, Any, Any]] = [
        ("cost", "USD/1000", 1, p["usd_per_1000_requests"], None, *_pair(cost, "usd_per_1000_requests")),
        ("time to the answer, mean", "s", 1, p["e2e_mean_s"], None, *_pair(s["e2e_s"], "mean")),
        ("TPOT, mean", "ms", 1e3, p["tpot_mean_s"], p["tpot_interval_s"], *_pair(s["tpot_s"], "mean")),
        ("TTFT, p99", "ms", 1e3, p["ttft_p99_s"], None, *_pair(s["ttft_s"], "p99")),
    ]
    if p["quality"] is not None and quality is not None:
        rows.insert(0, ("quality", "", 1, p["quality"], None, *_pair(quality, "mean")))
    for own, seen in _both(result):
        name = own["name"]
        rows.append((f"{name}: batch", "", 1, own["mean_batch"], None, *_pair(seen, "mean_batch")))
        rows.append((f"{name}: TPOT, mean", "ms", 1e3, own["tpot_mean_s"], None, *_pair(seen["tpot_s"], "mean")))
        rows.append((f"{name}: TTFT, p99", "ms", 1e3, own["ttft_p99_s"], None, *_pair(seen["ttft_s"], "p99")))
    known = [r for r in rows if r[3] and r[5] is not None]
    return [
        {
            "label": f"{name}  {scale * value:.3g} / {scale * seen:.3g}{' ' + unit if unit else ''}",
            "predicted": value,
            "band": band,
            "simulated": seen,
            "interval": interval,
        }
        for name, unit, scale, value, band, seen, interval in known
    ], [r[0] for r in rows if r not in known]


def _pair(figures: dict[str, Any], key: str) -> tuple[Any, Any]:
    return figures[key], figures["interval" if key == "mean" else f"{key}_interval"]


def _both(result: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the predicted and simulated figures of each tier, in the order of the plan."""
    seen = {t["name"]: t for t in result["simulated"]["tiers"]}
    return [(t, seen[t["name"]]) for t in result["predicted"]["tiers"]]


def stops(result: dict[str, Any], palette: Palette) -> Picture:
    """Draw the share of requests that each tier runs for and answers."""
    tiers = result["plan"]["tiers"]
    seen = {t["name"]: t for t in result["simulated"]["tiers"]}
    figure, panels = canvas(1, 2, size=(WIDTH, 1.5 + 0.45 * len(tiers)), sharey=True)
    places = list(range(len(tiers)))[::-1]
    for axes, key, said in zip(
        panels, ("share", "stop_fraction"), ("runs for [% of requests]", "answers [% of requests]"), strict=True
    ):
        predicted = [100 * t[key] for t in tiers]
        points = [100 * seen[t["name"]][key] for t in tiers]
        ends = [seen[t["name"]][f"{key}_interval"] for t in tiers]
        bars = [
            [float("nan") if e[i] is None else abs(x - 100 * e[i]) for x, e in zip(points, ends, strict=True)]
            for i in (0, 1)
        ]
        axes.barh(places, predicted, height=0.55, color=palette.predicted, label="predicted")
        axes.errorbar(points, places, xerr=bars, **palette.mark("simulated"), elinewidth=1.4, label="simulated (95 %)")
        axes.set(xlabel=said, xlim=(0, 109), ylim=(-0.6, len(tiers) - 0.4))
        axes.set_yticks(places, [plain(t["name"]) for t in tiers])
        axes.grid(axis="y", visible=False)
    below(figure, panels[0], 2)
    caption = "The share of requests that visit each tier, and the share whose answer is given there."
    return Picture("stops", "Which tier answers", caption, figure)


def rounds(result: dict[str, Any], palette: Palette) -> Picture:
    """Draw the parts of a round of each tier at its mean batch."""
    title = "Where the time of a step goes"
    rows = result.get("curves", {}).get("rounds")
    if not rows:
        return Picture("rounds", title, "Not drawn: this plan was made without the parts of its rounds.")
    figure, axes = canvas(size=(WIDTH, 1.7 + 0.55 * len(rows)))
    places = list(range(len(rows)))[::-1]
    left = [0.0] * len(rows)
    for (key, name), colour in zip(PARTS.items(), palette.parts, strict=True):
        widths = [1e3 * r["parts_s"][key] for r in rows]
        if any(widths):
            axes.barh(places, widths, left=left, height=0.6, color=colour, label=name, ec=palette.paper, lw=0.5)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, end, r in zip(places, left, rows, strict=True):
        per = "" if r["draft_length"] == 0 else f", {r['tokens_per_round']:.2g} tokens"
        axes.annotate(
            f"{end:.3g} ms{per}", (end, place), (5, 0), textcoords="offset points", va="center", fontsize=SMALL
        )
    labels = [
        f"{r['tier']}\nbatch {r['batch']:.0f}, " + (f"draft {r['draft_length']}" if r["draft_length"] else "no draft")
        for r in rows
    ]
    axes.set_yticks(places, [plain(label) for label in labels])
    axes.set(
        xlabel="time of a round, decode or draft and verify [ms]",
        xlim=(0, 1.22 * max(left)),
        ylim=(-0.6, len(rows) - 0.4),
    )
    axes.grid(axis="y", visible=False)
    below(figure, axes, 4)
    caption = (
        "One round at the mean batch of each tier, predicted: the target's pass by its parts, and the draft's passes "
        f"(step times: {', '.join(dict.fromkeys(r['provenance'] for r in rows))})."
    )
    return Picture("rounds", title, caption, figure)


def schedule(result: dict[str, Any], palette: Palette) -> Picture:
    """Draw the draft length of each tier against its batch, and the batches it meets."""
    title = "Draft length by batch"
    tiers = [t for t in result["plan"]["tiers"] if t["schedule"]]
    if not tiers:
        return Picture("schedule", title, "Not drawn: no tier of this plan has a draft.")
    seen = {t["name"]: t for t in result["simulated"]["tiers"]}
    predicted = {t["name"]: t for t in result["predicted"]["tiers"]}
    figure, panels = canvas(len(tiers), 1, size=(WIDTH, 1.0 + 1.35 * len(tiers)), squeeze=False)
    for axes, t in zip(panels[:, 0], tiers, strict=True):
        ranges = [(low, min(high, t["batch_cap"]), length) for low, high, length in t["schedule"]]
        edges = [low - 0.5 for low, _, _ in ranges] + [ranges[-1][1] + 0.5]
        lengths = [length for *_, length in ranges]
        axes.stairs(lengths, edges, baseline=None, color=palette.predicted, lw=1.8, label="draft length")
        for kind in BATCHES:
            batch = (predicted if kind == "predicted" else seen)[t["name"]]["mean_batch"]
            if batch is not None:
                at = next((g for low, high, g in ranges if low - 0.5 <= batch < high + 0.5), lengths[0])
                axes.plot(max(batch, 0.5), at, **palette.mark(kind, point=True), label=f"mean batch, {kind}")
        axes.set(ylim=(-0.4, max(lengths) + 0.9), xlim=(0.5, edges[-1]))
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_title(plain(f"{t['name']} with {t['draft']}"))
        axes.set_ylabel("drafted [tokens]")
    panels[-1, 0].set_xlabel("sequences in the batch of a replica [-]")
    below(figure, panels[-1, 0], 3)
    caption = (
        "How many tokens are drafted for each sequence of the batch, up to the largest batch that memory holds; 0 is "
        "no speculation. Marks: the mean batch at this load."
    )
    return Picture("schedule", title, caption, figure)

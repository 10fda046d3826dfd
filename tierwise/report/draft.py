"""The report of a draft: ``report.html`` and its figure, from the dictionary of ``tierwise draft``."""

from __future__ import annotations

from typing import Any

from tierwise import __version__
from tierwise.figures import picture
from tierwise.figures.draft import pictures

from .page import Table, amount, figures, render, span

CONTENTS = (
    ("draft", "Best draft"),
    ("models", "Models like it"),
    ("curve", "Over sizes and batches"),
    ("provenance", "Provenance"),
)
SHOWN = 16  # rows of the curve in its table [-]
COLUMNS = ("draft", "draft length", "acceptance", "speed-up", "interval")


def files(result: dict[str, Any]) -> dict[str, bytes]:
    """Return report.html and the figure of a draft plan as files by name."""
    drawn = pictures(result)
    images = picture.files(drawn)
    where = "at the cost of its FLOPs"
    if result["cost"] == "hardware":
        where = f"on {result['tp']} x {result['accelerator']}, batch {result['batch']}, "
        where += f"context {result['context_tokens']:.0f} tokens"
    asked = f"A target of {size(result['target_params'])} trained on {amount(result['target_tokens'])} tokens, {where}."
    low, high = result["draft_params_within_1_percent"]
    curve = result["curve"]
    page = render(
        "draft.html",
        kind="Draft",
        title=f"A draft for {size(result['target_params'])}",
        question=asked,
        contents=CONTENTS,
        lead=(
            f"Train a draft of {size(result['draft_params'])} and let it write {result['draft_length']} tokens a "
            f"round: {result['speedup']:.2f} times faster. Drafts of {size(low)} to {size(high)} come within 1 % "
            "of that."
        ),
        headline=_headline(result),
        models=_table(result["nearest_models"], "Nearest models of the catalog", "model", "model"),
        batches=_table(result.get("by_batch", []), "The best draft for each batch", "batch", "batch"),
        curve=_table(curve[:: max(1, len(curve) // SHOWN)], "Over draft sizes"),
        notes=[f"{note[:1].upper()}{note[1:]}." for note in result["notes"]],
        provenance=[
            ("tierwise", __version__),
            ("loss law", result["loss_law"]),
            ("acceptance law", result["acceptance_law"]),
            *((key.replace("_", " "), str(value)) for key, value in result["provenance"].items()),
        ],
        figures=figures(drawn, images),
    )
    return {"report.html": page, **images}


def size(parameters: float) -> str:
    """Return a number of parameters in words.

    Examples
    --------
    >>> size(70e9), size(312_345_678)
    ('70 B parameters', '312 M parameters')
    """
    count = f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"
    return f"{count} parameters"


def _headline(result: dict[str, Any]) -> list[dict[str, Any]]:
    ends = span(result["acceptance_interval"], amount)
    level = f"{result['interval_level']:.0%}"
    gain = f"{span(result['speedup_interval'], amount)} ({level})"
    rows = [
        ("draft", size(result["draft_params"]).removesuffix(" parameters"), "parameters"),
        ("draft length", str(result["draft_length"]), "tokens a round"),
        ("acceptance", amount(result["acceptance"]), f"{ends} ({level})"),
        ("speed-up", amount(result["speedup"]), gain),
    ]
    return [
        {"name": name, "value": value, "lines": [{"kind": "predicted", "text": said}], "tags": []}
        for name, value, said in rows
    ]


def _table(rows: list[dict[str, Any]], caption: str, key: str = "", name: str = "") -> Table:
    cells = [
        (
            *((str(r[key]),) if key else ()),
            size(r["draft_params"]).removesuffix(" parameters"),
            str(r["draft_length"]),
            f"{r['acceptance']:.3f}",
            f"{r['speedup']:.2f}",
            span(r["speedup_interval"], amount),
        )
        for r in rows
    ]
    return Table((*((name,) if key else ()), *COLUMNS), cells, caption=caption)

"""Reports of ``tierwise validate``: errors, by group with their bias, worst rows, and what the profile has seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tierwise import __version__
from tierwise.figures import picture, validation
from tierwise.figures.picture import Picture

from .page import NOTHING, Table, amount, figures, percent, render, seconds, signed, span

if TYPE_CHECKING:
    import pandas as pd

    from calibration.speculation import Predictions

ERRORS = ("n", "mean absolute error", "median", "90th percentile", "bias", "within interval")
Row = dict[str, Any]
Part = tuple[str, str, Sequence[Table]]  # anchor, heading, tables
GROUP = ("model", "tp", "phase")


def kernels(result: Row, steps: pd.DataFrame, command: str) -> dict[str, bytes]:
    """Return the report of ``validate kernels``, files by name; ``steps``: `calibration.validate.device_steps`."""
    total = [{"phase": phase, **result[phase]} for phase in ("decode", "prefill")]
    return _page(
        "Step times composed from kernels",
        "Predicted against measured step times; nothing is fitted here.",
        [_errors(total, ("phase",))],
        _step_parts(result),
        [validation.steps(steps, "kernels"), validation.errors("kernels-errors", result["by_group"], GROUP)],
        _profile(result),
        [f"Not compared, for want of a measured attention: {', '.join(result['skipped'])}."]
        if result["skipped"]
        else [],
        command,
    )


def steps(result: Row, table: pd.DataFrame, command: str) -> dict[str, bytes]:
    """Return the report of ``validate steps``, files by name; ``table``: :func:`calibration.step_fit.unseen_steps`."""
    return _page(
        "Measured steps",
        "Predicted against measured steps of models the profile was not fitted on; nothing is fitted here.",
        [_errors([{"steps": "all", **result["steps"]}], ("steps",))],
        _step_parts(result),
        [validation.steps(table, "steps"), validation.errors("steps-errors", result["by_group"], GROUP)],
        [
            *_profile(result),
            ("mode", result["mode"]),
            ("rows it has seen, left out", str(result["left_out"])),
            ("spread of repeats", percent(result["noise"])),
        ],
        [],
        command,
    )


def serving(result: Row, rows: pd.DataFrame, command: str) -> dict[str, bytes]:
    """Return the report of ``validate serving`` as files by name; ``rows``: those of :func:`validate_serving`."""
    keys = ("model", "system", "backend")
    total = [{"time": t.upper(), "points": "all", **result[t]} for t in ("tpot", "ttft")]
    for name in ("unsaturated", "suspect"):
        total += [{"time": t.upper(), "points": name, **e} for t, e in (result[name] or {}).items()]
    groups = {t: [{k: g[k] for k in keys} | g[t] for g in result["by_group"]] for t in ("tpot", "ttft")}
    where = ("model", "system", "backend", "tp", "clients", "prompt", "output")
    worst = [(*(str(r[k]) for k in where), signed(r["tpot_error"])) for r in result["worst"]]
    return _page(
        "Serving points",
        "Mean TPOT and TTFT of measured closed loops, simulated with the engine's rules; nothing is fitted.",
        [_errors(total, ("time", "points"))],
        [
            ("groups", "By group", [_errors(g, keys, t.upper()) for t, g in groups.items()]),
            ("worst", "Worst rows", [Table((*where, "error of TPOT"), worst, words=3)]),
        ],
        [
            validation.serving(rows, "serving"),
            *(
                validation.errors(f"serving-errors-{t}", g, keys, title=f"Error of {t.upper()} by group")
                for t, g in groups.items()
            ),
        ],
        [("not predicted", "; ".join(f"{n} {why}" for why, n in result["skipped"].items()) or "nothing")],
        [],
        command,
    )


def speculation(result: Row, found: Predictions, command: str) -> dict[str, bytes]:
    """Return the report of ``validate speculation`` as files by name."""
    models = (("time_model", "speed-up by the time model"), ("length_model", "tokens per round by the length model"))
    keys = ("model", "source", "method", "hardware")
    pictures = [
        validation.scatter(
            "speculation",
            "Speculation",
            [
                validation.Comparison("Time model", "speed-up [-]", _by_basis(found.timed)),
                validation.Comparison("Length model", "tokens per round [tokens]", _by_basis(found.lengths)),
            ],
        ),
        validation.errors("speculation-errors", result["by_group"], keys),
    ]
    worst = result["worst"]
    columns = tuple(k for k in (worst[0] if worst else {}) if k != "error")
    rows = [(*(_cell(r[k]) for k in columns), signed(r["error"])) for r in worst]
    left = {
        name: "; ".join(f"{r['rows']} {r['reason']}" for r in result["skipped"][model]) or "nothing"
        for model, name in models
    }
    return _page(
        "Published speculation",
        "The time model given lengths and step times, the length model given acceptances; nothing is fitted.",
        [_errors([{"model": name, **result[model]} for model, name in models], ("model",))],
        [
            ("groups", "By group", [_errors(result["by_group"], keys)]),
            ("worst", "Worst rows", [Table((*columns, "error"), rows, words=len(columns))]),
        ],
        pictures,
        [("rows", str(result["rows"])), *((f"left out of {name}", why) for name, why in left.items())],
        [],
        command,
    )


def _by_basis(rows: Sequence[Any]) -> list[validation.Series]:
    by = {basis: [p for p in rows if p.basis == basis] for basis in dict.fromkeys(p.basis for p in rows)}
    return [validation.Series(b, [p.predicted for p in of], [p.measured for p in of]) for b, of in by.items()]


def cascade(result: Row, command: str) -> dict[str, bytes]:
    """Return the report of ``validate cascade`` as files by name."""
    groups = result["by_group"]
    kinds = ("policy", "pairwise", "singles", "oracle")
    areas = [
        (
            g["name"],
            str(g["n"]),
            *(_with(g["area"][k], g["area_interval"][k]) for k in kinds),
            amount(g["ece"]),
        )
        for g in groups
    ]
    plans = [
        (
            g["name"],
            percent(p["share_of_gap"], 0),
            amount(p["predicted_cost"]),
            _with(p["realised_cost"], p["realised_cost_interval"]),
            amount(p["predicted_quality"]),
            _with(p["realised_quality"], p["realised_quality_interval"]),
        )
        for g in groups
        for p in g["plans"]
    ]
    covered = [
        (g["name"], str(g["coverage"]["n"]), percent(g["coverage"]["cost"]), percent(g["coverage"]["quality"]))
        for g in groups
    ]
    return _page(
        "Cascades on real outcomes",
        "Stop-or-escalate policies fitted and tested in disjoint folds.",
        [Table(("set", "n", *kinds, "calibration error"), areas, caption="Normalised area under the frontier, 95 %")],
        [
            (
                "plans",
                "Plans, predicted and realised",
                [
                    Table(
                        ("set", "share of gap", "cost predicted", "realised", "quality predicted", "realised"),
                        plans,
                        caption="Plans for shares of the quality gap; intervals of 95 %.",
                    ),
                    Table(
                        ("set", "tests", "cost inside", "quality inside"),
                        covered,
                        caption="Realised means inside the 95 % interval of their prediction.",
                    ),
                ],
            ),
        ],
        [validation.cascades(result)],
        [("folds", f"{result['folds']}, divided {result['repeats']} times"), ("seed", str(result["seed"]))],
        [],
        command,
    )


def quality(result: Row, least: int, command: str) -> dict[str, bytes]:
    """Return the report of ``validate quality`` as files by name; ``least``: prompts of a bin that is drawn [-]."""
    columns = ("predicted", "n", "Brier", "log loss", "AUROC", "R2", "ECE raw", "ECE", "ECE by chance")
    keys = ("brier", "log_loss", "auroc", "r2", "ece_raw", "ece")
    tables = [
        Table(
            columns,
            [
                (e["name"], str(e["n"]), *(amount(e.get(k)) for k in keys), amount(e["ece_by_chance"]["mean"]))
                for e in (*g["right"], *g["rescue"])
            ],
            caption=f"{g['name']}: {g['n']} prompts, signal {g['signal']}",
        )
        for g in result["by_group"]
    ]
    pooled = [
        (g["name"], str(g["n"]), amount(g["ece_raw"]), amount(g["ece"]), amount(g["ece_by_chance"]["mean"]))
        for g in result["by_group"]
    ]
    return _page(
        "Quality predictors",
        "P(tier right) and P(next tier rescues), out of fold.",
        [Table(("set", "n", "ECE raw", "ECE", "ECE by chance"), pooled, caption="Calibration error, all tiers pooled")],
        [("groups", "By group", tables)],
        [validation.reliability(result, least)],
        [],
        [],
        command,
    )


def live(result: Row, command: str) -> dict[str, bytes]:
    """Return the report of ``validate live`` as files by name."""
    rows = result["speedup"]["rows"]
    names = dict.fromkeys(f"{r['decoding']}, draft {r['draft']}" for r in rows)

    def series(predicted: str, measured: str) -> list[validation.Series]:
        of = {n: [r for r in rows if f"{r['decoding']}, draft {r['draft']}" == n] for n in names}
        return [validation.Series(n, [r[predicted] for r in k], [r[measured] for r in k]) for n, k in of.items()]

    said = {True: "holds", False: "missed", None: "not judged"}
    verdicts = [
        (v["bar"], said[v["holds"]], NOTHING if v["limit"] is None else amount(v["reached"]), amount(v["limit"]))
        for v in result["verdicts"]
    ]
    gains = [
        (
            f"{r['draft']} for {r['target']}",
            r["decoding"],
            str(r["draft_length"]),
            f"{r['tokens_iid']:.2f}",
            f"{r['tokens_measured']:.2f}",
            f"{r['predicted_speedup']:.2f}",
            f"{r['measured_speedup']:.2f} ({span(r['measured_interval'], amount)})",
        )
        for r in rows
    ]
    plans = [
        (
            percent(r["share_of_gap"], 0),
            seconds(r["predicted_cost"]),
            seconds(r["realised_cost"]),
            amount(r["predicted_quality"]),
            amount(r["realised_quality"]),
        )
        for r in result["cascade"]["rows"]
    ]
    noise = result["noise"]
    quiet = "quiet enough" if noise["quiet"] else "too noisy: no verdict is given on times"
    columns = ("pair", "decoding", "length", "tokens predicted", "measured", "speed-up predicted", "measured (90 %)")
    return _page(
        "Theory on models trained on the spot",
        "Small models trained, timed and run on this machine; nothing is predicted from what it is compared with.",
        [Table(("bar", "verdict", "reached", "limit"), verdicts, words=2)],
        [
            ("speculation", "Speculation", [Table(columns, gains, words=2)]),
            (
                "cascade",
                "Cascade",
                [Table(("share of gap", "cost predicted", "run", "quality predicted", "run"), plans)],
            ),
        ],
        [
            validation.scatter(
                "live",
                "Speculation",
                [
                    validation.Comparison("Speed-up", "speed-up [-]", series("predicted_speedup", "measured_speedup")),
                    validation.Comparison(
                        "Tokens per round", "tokens per round [tokens]", series("tokens_iid", "tokens_measured")
                    ),
                ],
            )
        ],
        [
            ("size", f"{result['size']}: {len(result['models'])} models, {result['trained_tokens']} tokens each"),
            ("text", result["text"]["source"]),
            ("the same run again", f"differs by {percent(noise['repeat_spread'])}: {quiet}"),
        ],
        [],
        command,
    )


def _step_parts(result: Row) -> list[Part]:
    where = (*GROUP, "batch", "context", "tokens")
    worst = [
        (*(str(r[k]) for k in where), seconds(r["measured"]), seconds(r["predicted"]), signed(r["error"]))
        for r in result["worst"]
    ]
    return [
        ("groups", "By group", [_errors(result["by_group"], GROUP)]),
        ("worst", "Worst rows", [Table((*where, "measured", "predicted", "error"), worst, words=3)]),
    ]


def _profile(result: Row) -> list[tuple[str, str]]:
    p = result["profile"]
    return [("profile", f"{p['name']} ({p['provenance']})"), ("rows it was fitted on", p["rows"])]


def _errors(rows: Sequence[Row], keys: Sequence[str], caption: str = "") -> Table:
    """Return error summaries as a table; bias is the mean of predicted / measured - 1."""
    cells = []
    for r in rows:
        names = tuple(_cell(r[k]) for k in keys)
        if not r["n"]:
            cells.append((*names, "0", *[NOTHING] * 5))
            continue
        inside = percent(r["coverage"], 0) if "coverage" in r else NOTHING
        errors = (percent(r["mape"]), percent(r["median_ape"]), percent(r["p90_ape"]), signed(r["bias"]))
        cells.append((*names, f"{int(r['n']):,}", *errors, inside))
    return Table((*keys, *ERRORS), cells, words=len(keys), caption=caption)


def _with(value: float | None, ends: Any) -> str:
    return amount(value) + ("" if ends is None else f" ({span(ends, amount)})")


def _cell(value: Any) -> str:
    if value is None:
        return NOTHING
    return amount(value) if isinstance(value, float) else str(value)


def _page(
    title: str,
    lead: str,
    summary: Sequence[Table],
    parts: Sequence[Part],
    pictures: Sequence[Picture],
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    command: str,
) -> dict[str, bytes]:
    images = picture.files(pictures)
    contents = [("errors", "Errors"), *((id_, name) for id_, name, _ in parts), ("provenance", "What it rests on")]
    page = render(
        "validation.html",
        kind="Validation",
        title=title,
        lead=lead,
        contents=contents,
        summary=summary,
        parts=parts,
        figures=figures(pictures, images),
        notes=notes,
        provenance=[("tierwise", __version__), *facts],
        command=command,
    )
    return {"report.html": page, **images}

"""Published speculation measurements: reading them, and the time and the length model validated apart, without a fit.

The file has one row per measurement, in the layout of ``published_speculation.csv``: an empty cell is a quantity the
source does not state. What the source means by acceptance and by mean accepted length is said in the ``notes``
(``alpha_def=``, ``mal_def=``) and is converted here, never assumed: a row that does not say is left out and counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from theory.acceptance import from_tokens_per_round
from theory.errors import refuse, require
from theory.speculation import tokens_per_round

from .validate import WORST, error_summary

MILLISECOND = 1e-3  # [s]
TEXT = (
    "source",
    "source_locator",
    "hardware",
    "dtype",
    "target_model",
    "draft_model",
    "method",
    "dataset",
    "notes",
)
RULES = {  # numeric columns: what holds for a value that is there
    "temperature": "at least 0 [-]",
    "batch_size": "above 0 [-]",
    "context_len": "at least 0 [tokens]",
    "gamma": "at least 0 [tokens]",
    "alpha": "in [0, 1] [-]",
    "mean_accepted_len": "at least 0 [tokens/round]",
    "t_draft_ms": "above 0 [ms]",
    "t_target_ms": "above 0 [ms]",
    "baseline_tok_s": "above 0 [token/s]",
    "sd_tok_s": "above 0 [token/s]",
    "speedup": "above 0 [-]",
}
VERIFY_FILE = "verify_latency.csv"  # looked for beside the measurements
RETRIEVAL = ("ngram", "suffix", "rest", "lookahead", "recycling")  # methods that draft only where they find a match
AT_ONCE = ("medusa", "pard", "dflash", *RETRIEVAL)  # methods that propose all tokens of a round at once
NOT_A_SUM = {  # methods whose round is not draft steps plus one verification, and why
    "parallel": "the draft runs beside the verification",
    "pearl": "the draft runs beside the verification",
    "tier": "more than one draft: one step time does not describe the round",
    "staged": "more than one draft: one step time does not describe the round",
}
WIDEST_GAP = 2.0  # verify times are interpolated between widths at most this far apart: kernels switch in between [-]
ROUNDING = 0.02  # how far 1 + gamma alpha may be from a stated length and still be called the same [-]
ONE_STEP = "assumed to take one decode step"
MEASURED = "measured by the same source"


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row predicted."""

    line: int  # of the file
    predicted: float  # [that of the quantity]
    measured: float  # [that of the quantity]
    basis: str  # what the prediction rests on


# --- reading ---------------------------------------------------------------------------------------------------------


def read_published(path: Path) -> pd.DataFrame:
    """Return the measurements, checked, with the file's line number as index; absent values are not a number or "".

    Raises
    ------
    InputError
        If the file is no CSV, lacks a column, holds a value that no measurement has (the line is named), or no row.
    """
    table = _read(path, (*TEXT, *RULES))
    require(len(table) > 0, "csv", "must hold at least one measurement", path.name)
    for column, rule in RULES.items():
        table[column] = _numbers(table[column], column, rule, path.name)
    return table


def read_verify(path: Path) -> pd.DataFrame:
    """Return verify times: ``source``, ``hardware``, ``model``, ``batch_size``, ``n_query_tokens`` and ``ratio_vs_1``.

    Rows without a ratio, and rows that time a whole round instead of a verify pass, are left out.

    Raises
    ------
    InputError
        As for :func:`read_published`.
    """
    numeric = {"batch_size": "above 0 [-]", "n_query_tokens": "above 0 [tokens]", "ratio_vs_1": "above 0 [-]"}
    table = _read(path, ("source", "hardware", "model", "notes", *numeric))
    for column, rule in numeric.items():
        table[column] = _numbers(table[column], column, rule, path.name)
    whole_round = table["notes"].str.contains("speculative cycle", regex=False)
    return table[table["ratio_vs_1"].notna() & ~whole_round]


def _read(path: Path, columns: Iterable[str]) -> pd.DataFrame:
    require(path.is_file(), "csv", "must be a readable CSV file", str(path))
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        refuse("csv", f"must hold CSV ({error})", path.name)
    for column in columns:
        require(column in table.columns, column, f"must be a column of {path.name}", sorted(table.columns))
    table.index = pd.RangeIndex(2, len(table) + 2, name="line")  # line 1 is the header
    return table


def _numbers(cells: pd.Series, column: str, rule: str, file: str) -> pd.Series:
    """Return the cells as floats, empty ones as not a number."""
    stated = cells.str.strip() != ""
    values = pd.to_numeric(cells.where(stated), errors="coerce").astype(float)
    low = values > 0 if rule.startswith("above 0") else values >= 0
    high = values <= 1 if rule.startswith("in [0, 1]") else np.isfinite(values)
    wrong = cells[stated & ~(low & high)]
    if not wrong.empty:
        hint = "It is a share: write 0.64, not 64." if column == "alpha" else "Leave unknown values empty."
        refuse(column, f"must be {rule} in {file}, line {wrong.index[0]}", wrong.iloc[0], hint)
    return values


# --- what a row says -------------------------------------------------------------------------------------------------


def row_tokens(row: pd.Series) -> tuple[float, str]:
    """Return the mean tokens of a round [tokens], bonus token included, and "" or why the row does not tell.

    ``mean_accepted_len`` counts as stated by ``mal_def=`` in the notes (or ``incl_bonus``, ``block efficiency``); if
    the notes are silent, it must agree with gamma alpha in one of the two readings, which no other acceptance would.
    Without it, an accepted fraction of rounds that all draft gamma gives 1 + gamma alpha.
    """
    length, notes = float(row["mean_accepted_len"]), str(row["notes"])
    if math.isnan(length):
        tokens = _tokens_by_fraction(row)
        return tokens, "no accepted length, nor a fraction to derive it from" if math.isnan(tokens) else ""
    if re.search(r"mal_def=\s*excl|excl_bonus", notes):
        return length + 1, ""
    if re.search(r"mal_def=\s*(incl|block efficiency)|incl_bonus|block efficiency", notes):
        return length, ""
    one_more = 1 + float(row["gamma"]) * float(row["alpha"])
    for tokens in (length, length + 1):
        if abs(tokens / one_more - 1) <= ROUNDING:
            return tokens, ""
    return math.nan, "the notes do not say whether the accepted length includes the bonus token"


def _tokens_by_fraction(row: pd.Series) -> float:
    """Return 1 + gamma alpha where alpha is accepted / drafted and every round drafts gamma; else not a number."""
    notes, method = str(row["notes"]), str(row["method"])
    sparse = "drafts per generated token" in notes or any(name in method for name in RETRIEVAL)
    if sparse or "alpha_def=frac_accepted_of_drafted" not in notes:
        return math.nan
    return 1 + float(row["gamma"]) * float(row["alpha"])


def row_speedup(row: pd.Series) -> float:
    """Return the measured speed-up: as stated, or the ratio of the two throughputs; nan if neither is [-]."""
    stated = float(row["speedup"])
    return stated if stated == stated else float(row["sd_tok_s"]) / float(row["baseline_tok_s"])


def verify_width(row: pd.Series) -> float:
    """Return the tokens of one sequence in the verify pass: gamma + 1 of a chain, or the size of a tree [tokens]."""
    if "tree" not in str(row["method"]):
        return float(row["gamma"]) + 1
    notes = str(row["notes"])
    if size := re.search(r"tree size=(\d+)", notes):
        return float(size.group(1))
    if fan := re.search(r"(\d+)x(\d+) independent sequences", notes):
        return float(fan.group(1)) * float(fan.group(2)) + 1
    return math.nan


def verify_ratio(row: pd.Series, verify: pd.DataFrame) -> float:
    """Return T_V / T_T of a row from its own source's verify times [-]; not a number where they do not cover it.

    Same source, model and batch, hardware the same or not stated; widths between two measured ones are interpolated
    if these are at most a factor of 2 apart.
    """
    same = (
        (verify["source"] == row["source"])
        & (verify["model"].str.casefold() == str(row["target_model"]).casefold())
        & verify["hardware"].isin([row["hardware"], "not stated"])
        & (verify["batch_size"] == row["batch_size"])
    )
    curve = verify[same].groupby("n_query_tokens")["ratio_vs_1"].median()
    width, widths = verify_width(row), curve.index.to_numpy(float)
    below, above = widths[widths <= width], widths[widths >= width]
    if not below.size or not above.size or above[0] > WIDEST_GAP * below[-1]:
        return math.nan
    return float(np.interp(width, widths, curve.to_numpy(float)))


def draft_passes(row: pd.Series) -> float:
    """Return the draft's forward passes a round: gamma, a tree's depth (same column), or 1 for all at once [-]."""
    return 1.0 if any(name in str(row["method"]) for name in AT_ONCE) else float(row["gamma"])


# --- the time model --------------------------------------------------------------------------------------------------


def time_model(table: pd.DataFrame, verify: pd.DataFrame) -> tuple[list[Prediction], dict[int, str]]:
    r"""Return the speed-up of each row from its measured tokens and step times, and why rows were skipped.

    .. math:: S = \frac{E[N]}{k\, T_D / T_T + T_V / T_T}

    with k the draft passes of a round, and T_V / T_T from the same source where it measured it, 1 where not.

    Source
    ------
    Leviathan, Kalman & Matias (2023), arXiv:2211.17192, theorem 3.8, with the tokens measured and T_V apart.
    """
    done: list[Prediction] = []
    skipped: dict[int, str] = {}
    for line, row in table.iterrows():
        reason = _untimed(row)
        if reason:
            skipped[int(str(line))] = reason
            continue
        ratio = verify_ratio(row, verify)
        basis = ONE_STEP if math.isnan(ratio) else MEASURED
        cost = draft_passes(row) * float(row["t_draft_ms"]) / float(row["t_target_ms"])
        speedup = row_tokens(row)[0] / (cost + (1.0 if math.isnan(ratio) else ratio))
        done.append(Prediction(int(str(line)), speedup, row_speedup(row), basis))
    return done, skipped


def _untimed(row: pd.Series) -> str:
    """Return why the time model cannot predict a row, "" if it can."""
    for column, name in (("t_draft_ms", "draft step time"), ("t_target_ms", "target step time"), ("gamma", "length")):
        if math.isnan(float(row[column])):
            return f"no {name}"
    if math.isnan(row_speedup(row)):
        return "no measured speed-up"
    for method, reason in NOT_A_SUM.items():
        if method in str(row["method"]).casefold():
            return reason
    return row_tokens(row)[1]


# --- the length model ------------------------------------------------------------------------------------------------

SERIES = ("source", "series", "hardware", "dtype", "target_model", "draft_model", "method", "dataset")


def length_model(table: pd.DataFrame) -> tuple[list[Prediction], dict[int, str]]:
    r"""Return the tokens per round of each row from an acceptance measured elsewhere, and why rows were skipped.

    .. math:: E[N] = \frac{1 - \alpha^{\gamma+1}}{1 - \alpha}

    alpha is the row's own if the source measured it token by token (``alpha_def=iid_per_token``); else it is that of
    the shortest draft length of the same series (same source, pair, data, temperature, batch), and the other lengths
    are predicted. A row's own accepted fraction is no test: it is its tokens per round by definition.
    """
    done: list[Prediction] = []
    skipped: dict[int, str] = {}
    chains = table.assign(series=table["source_locator"].str.replace(r"\d+", "#", regex=True))
    keys = [*SERIES, "temperature", "batch_size", "context_len"]
    for _, rows in chains.groupby(keys, dropna=False, sort=False):
        known = {int(str(line)): _unmeasured(row) for line, row in rows.iterrows()}
        skipped |= {line: reason for line, reason in known.items() if reason}
        usable = rows[[not reason for reason in known.values()]].sort_values("gamma")
        own = usable["notes"].str.contains("alpha_def=iid_per_token", regex=False) & usable["alpha"].notna()
        for line, row in usable[own].iterrows():
            done.append(_predict_length(int(str(line)), row, float(row["alpha"]), "its own acceptance, token by token"))
        series, lost = _predict_series(usable[~own])
        done += series
        skipped |= lost
    return sorted(done, key=lambda p: p.line), dict(sorted(skipped.items()))


def _unmeasured(row: pd.Series) -> str:
    """Return why the length model cannot use a row, "" if it can."""
    tokens, reason = row_tokens(row)
    gamma = float(row["gamma"])
    if math.isnan(gamma) or gamma < 1 or gamma != int(gamma):
        return "no whole draft length of at least 1"
    if "tree" in str(row["method"]) or "multi-draft" in str(row["method"]):
        return "a tree, not a chain: one acceptance does not describe it"
    if reason:
        return reason
    return "" if 1 <= tokens <= gamma + 1 else "more tokens than a chain of that length can emit, or fewer than one"


def _predict_series(rows: pd.DataFrame) -> tuple[list[Prediction], dict[int, str]]:
    lines = [int(str(line)) for line in rows.index]
    if len(lines) < 2:
        return [], dict.fromkeys(lines, "no other draft length in its series")
    if rows["gamma"].duplicated().any():
        return [], dict.fromkeys(lines, "several rows of its series have the same draft length")
    first = rows.iloc[0]
    length = int(first["gamma"])
    alpha = from_tokens_per_round(row_tokens(first)[0], length)
    basis = f"acceptance of its series at draft length {length}"
    rest = list(rows.iterrows())[1:]
    skipped = {lines[0]: "gives the acceptance of its series"}
    return [_predict_length(int(str(line)), row, alpha, basis) for line, row in rest], skipped


def _predict_length(line: int, row: pd.Series, alpha: float, basis: str) -> Prediction:
    return Prediction(line, float(tokens_per_round(alpha, row["gamma"])), row_tokens(row)[0], basis)


# --- the report ------------------------------------------------------------------------------------------------------


def validate_speculation(csv: str | Path, verify: str | Path | None = None) -> dict[str, Any]:
    """Return how far the time model and the length model are from the measurements in ``csv``; nothing is fitted.

    Parameters
    ----------
    csv : path
        Measurements in the layout of ``published_speculation.csv``.
    verify : path, optional
        Verify times in the layout of ``verify_latency.csv``; by default the file of that name beside ``csv``, if any.

    Returns
    -------
    dict
        ``time_model`` and ``length_model`` (error summaries; ``n`` 0 and None elsewhere if no row qualifies), the
        former also ``by_verification``; ``length_identity``, the rows whose fraction and length must agree by
        definition; ``by_group`` (one per model x source x method x hardware), ``worst`` (rows), ``skipped`` (reason,
        number and lines of the rows left out), ``rows``.

    Raises
    ------
    InputError
        If a file is missing, lacks a column, or holds a value that no measurement has.
    """
    found = predictions(csv, verify)
    table, timed, lengths = found.table, found.timed, found.lengths
    bases = {MEASURED: "measured", ONE_STEP: "one_step"}
    return {
        "time_model": _summary(timed)
        | {"by_verification": {key: _summary([p for p in timed if p.basis == b]) for b, key in bases.items()}},
        "length_model": _summary(lengths),
        "length_identity": _identity(table),
        "by_group": [*_groups("time", timed, table), *_groups("length", lengths, table)],
        "worst": _worst(table, time=timed, length=lengths),
        "skipped": {"time_model": _reasons(found.untimed), "length_model": _reasons(found.unmeasured)},
        "rows": len(table),
    }


class Predictions(NamedTuple):
    """The rows of a file as the two models predict them."""

    table: pd.DataFrame
    timed: list[Prediction]  # speed-up by the time model [-]
    untimed: dict[int, str]  # lines left out of it, and why
    lengths: list[Prediction]  # tokens per round by the length model [tokens]
    unmeasured: dict[int, str]  # lines left out of it, and why


def predictions(csv: str | Path, verify: str | Path | None = None) -> Predictions:
    """Return every row that qualifies for a model, predicted; arguments and errors of :func:`validate_speculation`."""
    path = Path(csv)
    table = read_published(path)
    beside = path.with_name(VERIFY_FILE)
    times = read_verify(Path(verify) if verify else beside) if verify or beside.is_file() else _no_verify_times()
    return Predictions(table, *time_model(table, times), *length_model(table))


def _no_verify_times() -> pd.DataFrame:
    text = {c: pd.Series(dtype=str) for c in ("source", "hardware", "model")}
    return pd.DataFrame(text | {c: pd.Series(dtype=float) for c in ("batch_size", "n_query_tokens", "ratio_vs_1")})


def _summary(rows: list[Prediction]) -> dict[str, Any]:
    if not rows:
        return {"n": 0, "mape": None, "median_ape": None, "bias": None, "p90_ape": None, "worst_ape": None}
    return dict(error_summary([p.predicted for p in rows], [p.measured for p in rows]))


def _identity(table: pd.DataFrame) -> dict[str, Any]:
    """Return the summary of 1 + gamma alpha against the stated length, over rows that give both."""
    both = [
        Prediction(int(str(line)), _tokens_by_fraction(row), row_tokens(row)[0], "")
        for line, row in table[table["mean_accepted_len"].notna()].iterrows()
    ]
    return _summary([p for p in both if p.predicted == p.predicted and p.measured == p.measured])


def _groups(model: str, rows: list[Prediction], table: pd.DataFrame) -> list[dict[str, Any]]:
    groups: dict[tuple[str, ...], list[Prediction]] = {}
    for p in rows:
        key = tuple(str(table.at[p.line, c]) for c in ("source", "method", "hardware"))
        groups.setdefault(key, []).append(p)
    names = ("source", "method", "hardware")
    return [
        {"model": model} | dict(zip(names, key, strict=True)) | _summary(part) for key, part in sorted(groups.items())
    ]


def _worst(table: pd.DataFrame, **models: list[Prediction]) -> list[dict[str, Any]]:
    rows = [(abs(p.predicted / p.measured - 1), model, p) for model, part in models.items() for p in part]
    return [
        {
            "model": model,
            "line": p.line,
            "source": str(table.at[p.line, "source"]),
            "method": str(table.at[p.line, "method"]),
            "gamma": float(table["gamma"][p.line]),
            "predicted": round(p.predicted, 4),
            "measured": round(p.measured, 4),
            "error": round(p.predicted / p.measured - 1, 4),
            "basis": p.basis,
        }
        for _, model, p in sorted(rows, key=lambda r: -r[0])[:WORST]
    ]


def _reasons(skipped: dict[int, str]) -> list[dict[str, Any]]:
    """Return each reason with the number and the lines of the rows it left out, most frequent first."""
    lines: dict[str, list[int]] = {}
    for line, reason in skipped.items():
        lines.setdefault(reason, []).append(line)
    parts = sorted(lines.items(), key=lambda item: -len(item[1]))
    return [{"reason": reason, "rows": len(where), "lines": _ranges(where)} for reason, where in parts]


def _ranges(lines: list[int]) -> str:
    """Return line numbers as ranges, ``2-26, 33``."""
    edges = [i for i in range(1, len(lines)) if lines[i] != lines[i - 1] + 1]
    runs = [(lines[a], lines[b - 1]) for a, b in zip([0, *edges], [*edges, len(lines)], strict=True)]
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)

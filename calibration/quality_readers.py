"""Per-prompt outcomes of model tiers: the CSV layouts of the quality tables as arrays. Strict: a bad cell is named.

One row of a file is one (prompt, model). With the column ``confidence_logprob`` the signal is the confidence and the
cost the mean price of a call in US dollars; otherwise the only signal is the length of the answer and the cost is 0.125
per billion parameters, a ratio of work per token (assumed; 1.6 / 4.2 / 8.8 for 13B / 34B / 70B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from theory.errors import refuse, require

Array = NDArray[np.float64]

COST_PER_BILLION = 0.125  # cost unit of a call, per 1e9 parameters: work relative to an 8B model (assumed)
TYPICAL_LENGTH = 100.0  # words at which the score of a length is 1/2 (any value gives the same order) [-]
COMMON = ("sample_id", "dataset", "model", "params_b", "correct")
LAYOUTS = {
    "confidence": (*COMMON, "chain", "confidence_logprob", "cost_usd"),
    "length": (*COMMON, "output_words"),
}
# Tiers taken by default where all of them are in the file (small, middle, top), first match first.
DEFAULT_TIERS: tuple[tuple[str, ...], ...] = (
    ("llama3.1-8b", "llama3.1-70b", "llama3.1-405b"),
    ("gpt-4o-mini", "qwen2.5-72b-instruct", "gpt-4o"),
    ("abel-13b", "tora-code-34b", "tora-70b"),
    ("qwen2.5-7b-instruct", "qwen2.5-32b-instruct", "qwen2.5-72b-instruct"),
    ("abel-7b", "abel-13b", "abel-70b"),
)


@dataclass(frozen=True, eq=False)
class Samples:
    """What n prompts show of K tiers, in order of mean cost."""

    name: str  # data set, and chain if the file has one
    signal: str  # "confidence" or "length"
    unit: str  # of the costs
    tiers: tuple[str, ...]
    ids: tuple[str, ...]  # (n,)
    correct: Array  # (n, K) 0 or 1 [-]
    score: Array  # (n, K) in [0, 1]: exp(log-probability), or 1 / (1 + words / 100) [-]
    cost: Array  # (n, K) of a call [unit]

    @property
    def price(self) -> Array:
        """Mean cost of a call of each tier, (K,) [unit]."""
        return np.asarray(self.cost.mean(axis=0))


def read_quality(path: Path, tiers: Sequence[str] | None = None) -> tuple[Samples, ...]:
    """Return one :class:`Samples` for each data set (and chain) of a CSV, gzip or plain.

    Parameters
    ----------
    path : Path
    tiers : names of 2 to 4 models, optional
        Groups without all of them are left out. By default the usual three of the file (``DEFAULT_TIERS``), otherwise
        the cheapest, the middle and the dearest model of the group.

    Raises
    ------
    InputError
        If the file is no CSV of a known layout, a cell has an impossible value (column and line are named), a prompt
        lacks one of the tiers, or no group has the tiers asked for.
    """
    table, layout = _read(path)
    group = ["dataset", "chain"] if layout == "confidence" else ["dataset"]
    found = []
    for key, rows in table.groupby(group, sort=True):
        names = _tiers(rows, tiers)
        if names is not None:
            found.append(_samples(rows, "/".join(map(str, key)), layout, names, path.name))
    have = sorted(table["model"].unique())
    require(bool(found), "tiers", f"must be models of one group of {path.name}", list(tiers or ()), f"It has {have}.")
    return tuple(found)


def _read(path: Path) -> tuple[pd.DataFrame, str]:
    require(path.is_file(), "csv", "must be a readable CSV file", str(path))
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError, EOFError) as error:
        refuse("csv", f"must hold CSV ({error})", path.name)
    layout = "confidence" if "confidence_logprob" in table.columns else "length"
    for column in LAYOUTS[layout]:
        require(column in table.columns, column, f"must be a column of {path.name}", sorted(table.columns))
    require(len(table) > 0, "csv", "must hold at least one row", path.name)
    table.index = pd.RangeIndex(2, len(table) + 2, name="line")  # line 1 is the header
    rules = {"correct": (0.0, 1.0, "0 or 1"), "params_b": (1e-9, np.inf, "above 0, or empty [billion]")}
    if layout == "confidence":
        rules["confidence_logprob"] = (-np.inf, 0.0, "at most 0 (-inf allowed) [nat]")
        rules["cost_usd"] = (0.0, np.finfo(float).max, "at least 0 [USD]")
    else:
        rules["output_words"] = (0.0, np.finfo(float).max, "at least 0 [words]")
    for column, (low, high, rule) in rules.items():
        table[column] = _numbers(table[column], column, low, high, rule, path.name)
    return table, layout


def _numbers(cells: pd.Series, column: str, low: float, high: float, rule: str, file: str) -> pd.Series:
    """Return the cells as floats; only ``params_b`` may be empty."""
    values = pd.to_numeric(cells, errors="coerce").astype(float)
    good = (values >= low) & (values <= high)
    if column == "correct":
        good &= values.isin((0.0, 1.0))
    if column == "params_b":
        good |= cells.str.strip() == ""
    wrong = cells[~good]
    if not wrong.empty:
        refuse(column, f"must be {rule} in {file}, line {wrong.index[0]}", wrong.iloc[0])
    return values


def _tiers(rows: pd.DataFrame, asked: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the models to use in a group, or None if it lacks those asked for."""
    have = set(rows["model"])
    if asked is not None:
        require(2 <= len(set(asked)) <= 4, "tiers", "must be 2 to 4 different models", list(asked))
        return tuple(asked) if set(asked) <= have else None
    for names in DEFAULT_TIERS:
        if set(names) <= have:
            return names
    by = "cost_usd" if "cost_usd" in rows.columns else "params_b"
    order = rows.groupby("model")[by].mean().dropna().sort_values(kind="stable").index.tolist()
    if len(order) < 2:
        return None
    return tuple(order) if len(order) < 3 else (order[0], order[len(order) // 2], order[-1])


def _samples(rows: pd.DataFrame, name: str, layout: str, tiers: tuple[str, ...], file: str) -> Samples:
    rows = rows[rows["model"].isin(tiers)]
    twice = rows[rows.duplicated(["sample_id", "model"])]
    if not twice.empty:
        refuse("sample_id", f"must occur once per model in {file}, line {twice.index[0]}", twice["sample_id"].iloc[0])
    columns = ("correct", "confidence_logprob", "cost_usd") if layout == "confidence" else ("correct", "output_words")
    wide = {c: rows.pivot(index="sample_id", columns="model", values=c)[list(tiers)] for c in columns}
    gaps = wide["correct"].index[wide["correct"].isna().any(axis=1)]
    rule = f"must have a row for each of {tiers} in {file} ({name})"
    require(len(gaps) == 0, "sample_id", rule, gaps[0] if len(gaps) else None, "Drop incomplete prompts.")
    array = {c: table.to_numpy(dtype=np.float64) for c, table in wide.items()}
    if layout == "confidence":
        score, cost, unit = np.exp(array["confidence_logprob"]), array["cost_usd"], "USD"
    else:
        score = 1.0 / (1.0 + array["output_words"] / TYPICAL_LENGTH)
        cost, unit = np.tile(_work(rows, tiers, file), (len(score), 1)), "0.125 per 1e9 parameters"
    order = np.argsort(cost.mean(axis=0), kind="stable")
    ids = tuple(map(str, wide["correct"].index))
    names = tuple(tiers[k] for k in order)
    return Samples(name, layout, unit, names, ids, array["correct"][:, order], score[:, order], cost[:, order])


def _work(rows: pd.DataFrame, tiers: tuple[str, ...], file: str) -> Array:
    """Return the cost of a call of each tier from its parameters, (K,)."""
    size = rows.groupby("model")["params_b"].first()
    for tier in tiers:
        rule = f"must be stated for {tier} in {file}: without prices the cost follows from the size [billion]"
        require(bool(np.isfinite(size[tier])), "params_b", rule, "", "Choose `tiers` of known size.")
    return COST_PER_BILLION * size[list(tiers)].to_numpy(dtype=np.float64)

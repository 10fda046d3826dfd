"""One row per request: what it waited for, what it got, what it cost; as a table of columns, as CSV, as Parquet."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from simulator.cluster import ClusterRecords
from theory.cost import dollars
from theory.errors import require

from .build import Problem
from .figures import in_order, measured
from .search import Candidate

RequestFormat = Literal["csv", "parquet"]
CHUNK = 1 << 16  # rows formatted at a time [-]


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """A column of numbers, or of names by number. What is not finite stays empty."""

    name: str
    values: NDArray[Any]  # (n,)
    decimals: int = 0  # digits after the point [-]
    names: tuple[str, ...] = ()  # if given, values count into it


def request_columns(
    problem: Problem, candidate: Candidate, records: ClusterRecords, replication: int = 0
) -> tuple[Column, ...]:
    """Return the columns of a run, requests in the order of the workload.

    ``path`` names the tiers run, ``answer_tier`` the one whose answer is returned. ``gpu_s`` is the request's share of
    busy GPUs, ``usd`` its price; GPUs that stand idle are in the cost of the plan, not in here. Times count from the
    start of the run. ``warmup`` is 1 for requests left out of the figures.
    """
    names = tuple(problem.scenario.tiers[g.tier].name for g in in_order(candidate))
    paths = tuple(
        ">".join(name for k, name in enumerate(names) if code >> k & 1) for code in range(int(records.path.max()) + 1)
    )
    warmup = ~records.refused
    warmup[measured(problem, records)] = False
    count = records.arrival.size
    return (
        Column("replication", np.full(count, replication)),
        Column("request", np.arange(count)),
        Column("arrival_s", records.arrival, 6),
        Column("path", records.path, names=paths),
        Column("answer_tier", np.where(records.answer < 0, len(names), records.answer), names=(*names, "")),
        Column("first_token_s", records.first_token, 6),
        Column("completion_s", records.completion, 6),
        Column("prompt_tokens", records.prompt),
        Column("output_tokens", records.output),
        Column("rounds", records.rounds),
        Column("drafted_tokens", records.drafted),
        Column("accepted_tokens", records.accepted),
        Column("preemptions", records.preemptions),
        Column("gpu_s", records.gpu_s, 6),
        Column("usd", _dollars(problem, candidate, records), 9),
        Column("correct", records.correct, 0 if _whole(records.correct) else 6),
        Column("refused", records.refused.astype(np.int64)),
        Column("warmup", warmup.astype(np.int64)),
    )


def _dollars(problem: Problem, candidate: Candidate, records: ClusterRecords) -> NDArray[np.float64]:
    """Return what each request's share of busy GPUs costs, tier by tier at the price of its pool [USD]."""
    paid = np.zeros(records.arrival.size)
    for group, run, who in zip(in_order(candidate), records.tiers, records.visitors, strict=True):
        if run is not None:
            held = run.service_s * group.service.gpus
            paid[who] += dollars(held, problem.pool(group.service.deployment).price_per_gpu_hour)
    return paid


def _whole(values: NDArray[np.float64]) -> bool:
    known = values[np.isfinite(values)]
    return bool(np.all(known == np.floor(known)))


def check_format(form: RequestFormat) -> None:
    """Refuse a format whose writer is not installed, before anything is simulated.

    Raises
    ------
    InputError
        If Parquet is asked for and pyarrow is not installed.
    """
    require(
        form == "csv" or importlib.util.find_spec("pyarrow") is not None,
        "requests",
        "must be csv where pyarrow is not installed",
        form,
        "Run `pip install pyarrow`, or pass --requests csv.",
    )


def write_requests(runs: Sequence[tuple[Column, ...]], form: RequestFormat, path: Path) -> None:
    """Write the requests of all replications to a file."""
    if form == "csv":
        with path.open("wb") as file:
            file.write((",".join(c.name for c in runs[0]) + "\n").encode())
            for columns in runs:
                write_rows(columns, file)
        return
    import pandas as pd

    frames = [pd.DataFrame({c.name: _series(c) for c in columns}) for columns in runs]
    pd.concat(frames, ignore_index=True).to_parquet(path, index=False)


def _series(column: Column) -> Any:
    return np.array(column.names, dtype=object)[column.values] if column.names else column.values


# ---------------------------------------------------------------------------------------------------------------------
# Many rows at once: digits are computed for whole columns, a hundred times faster than row by row
# ---------------------------------------------------------------------------------------------------------------------


def write_rows(columns: Sequence[Column], file: BinaryIO) -> None:
    """Write the rows of a table as CSV without a header; numbers must be at least 0, and are rounded to decimals.

    Examples
    --------
    >>> from io import BytesIO
    >>> out = BytesIO()
    >>> write_rows([Column("a", np.array([7, 12])), Column("b", np.array([0.25, np.nan]), 3)], out)
    >>> out.getvalue()
    b'7,0.250\\n12,\\n'
    """
    for start in range(0, columns[0].values.size, CHUNK):
        rows = slice(start, start + CHUNK)
        parts = [_cells(c, c.values[rows]) for c in columns]
        for i, (text, used) in enumerate(parts):
            text[:, -1], used[:, -1] = ord("\n" if i == len(parts) - 1 else ","), True
        text, used = (np.concatenate([p[i] for p in parts], axis=1) for i in (0, 1))
        file.write(text[used].tobytes())


def _cells(column: Column, values: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the characters of each cell, right-aligned with a place for what follows, and which of them are used."""
    if column.names:
        quoted = [_quoted(name).encode() for name in column.names]
        width = max(map(len, quoted))
        text = np.array([list(name.ljust(width + 1)) for name in quoted], dtype=np.uint8)
        used = np.array([[i < len(name) for i in range(width + 1)] for name in quoted])
        return text[values], used[values]
    known = np.isfinite(values)
    left = np.rint(np.where(known, values, 0) * 10.0**column.decimals).astype(np.int64)
    width = max(len(str(int(left.max(initial=0)))), column.decimals + 1) + (column.decimals > 0) + 1
    text, used = np.zeros((values.size, width), dtype=np.uint8), np.zeros((values.size, width), dtype=np.bool_)
    for place in range(width - 2, -1, -1):
        after = width - 2 - place  # characters to the right of this one
        if column.decimals and after == column.decimals:
            text[:, place], used[:, place] = ord("."), known
            continue
        digits = after - (column.decimals > 0 and after > column.decimals)
        used[:, place] = known & ((left > 0) | (digits <= column.decimals))
        left, digit = np.divmod(left, 10)
        text[:, place] = digit + ord("0")
    return text, used


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if any(c in name for c in ',"\n\r') else name

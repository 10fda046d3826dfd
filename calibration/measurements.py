"""A file of measured step times: rows under a header that says how they came about.

The header is lines ``# key: value``; below it is CSV with one row for each point tried, written when it is known. The
last row of a point counts. What the header calls conditions must be the same for a run to be continued.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pandas as pd

from theory.errors import InputError, refuse, require
from theory.latency import Pass
from theory.specs import Accelerator, Transformer

FORMAT = "tierwise measurements 1"
Phase = Literal["decode", "verify", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "verify", "prefill")
COLUMNS = (
    *("model", "tp", "mode", "phase", "batch", "context", "new", "status"),
    *("median_s", "low_s", "high_s", "memory_bytes", "temperature_c", "clock_mhz", "load", "times_s", "note"),
)
# Header keys that may differ when a run is continued: what is said of the first run stays.
CIRCUMSTANCES = ("run", "started", "accelerator")
NUMBER_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}  # [byte per number]


@dataclass(frozen=True, slots=True)
class Point:
    """One forward pass to be timed: which model, run how, and what it processes.

    Raises
    ------
    InputError
        If a count is out of range, or the phase is unknown.
    """

    model: str
    tp: int  # GPUs the layers are split over [-]
    mode: str  # eager, graphs or compile
    phase: Phase
    batch: int  # sequences [-]
    context: int  # tokens cached of each [tokens]
    new: int  # new tokens of each [tokens]

    def __post_init__(self) -> None:
        require(self.phase in PHASES, "phase", f"must be one of {', '.join(PHASES)}", self.phase)
        for name, least in (("tp", 1), ("batch", 1), ("new", 1), ("context", 0)):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= least, name, f"must be an integer of at least {least}", value)

    def within(self, other: Point) -> bool:
        """Return whether ``other`` of the same model, split and mode is at least as large in every way."""
        same = (self.model, self.tp, self.mode, self.phase) == (other.model, other.tp, other.mode, other.phase)
        smaller = self.batch <= other.batch and self.context <= other.context and self.new <= other.new
        return same and smaller


def work_of(points: Sequence[Point]) -> Pass:
    """Return what the points process, as arrays the step-time law takes.

    Examples
    --------
    >>> work_of([Point("m", 1, "eager", "prefill", 2, 0, 128), Point("m", 1, "eager", "verify", 4, 512, 5)]).tokens
    array([256.,  20.])
    """
    prompt = np.array([p.phase == "prefill" for p in points])
    batch, context, new = (np.array([getattr(p, k) for p in points], float) for k in ("batch", "context", "new"))
    return Pass(
        sequences=np.where(prompt, 0, batch),
        query=new,
        context=context,
        prefill_tokens=np.where(prompt, batch * new, 0),
        prefill_sequences=np.where(prompt, batch, 1),
    )


@dataclass(frozen=True, slots=True)
class Row:
    """What came of a point."""

    point: Point
    status: Literal["ok", "oom", "skipped", "failed"]
    times: tuple[float, ...] = ()  # every repeat in its order, outliers kept [s]
    memory: float | None = None  # most memory of one GPU so far in this launch, or of the process [byte]
    sensors: Mapping[str, float | None] | None = None  # temperature_c [C], clock_mhz [MHz], load [-]
    note: str = ""

    def cells(self) -> dict[str, object]:
        """Return the row by column; the median with the quartiles about it."""
        times = pd.Series(self.times, dtype=float)
        quartiles = [f"{times.quantile(q):.6e}" if len(times) else "" for q in (0.5, 0.25, 0.75)]
        sensors = {k: "" if v is None else f"{v:.6g}" for k, v in (self.sensors or {}).items()}
        return {
            **asdict(self.point),
            "status": self.status,
            **dict(zip(("median_s", "low_s", "high_s"), quartiles, strict=True)),
            "memory_bytes": "" if self.memory is None else f"{self.memory:.0f}",
            **sensors,
            "times_s": " ".join(f"{t:.6e}" for t in self.times),
            "note": " ".join(self.note.split()),
        }


@dataclass(frozen=True, slots=True)
class Measurements:
    """A file of measurements as read."""

    header: dict[str, str]
    rows: pd.DataFrame  # the last row of each point

    @property
    def accelerator(self) -> Accelerator:
        """The machine as the step-time law takes it."""
        return Accelerator(**json.loads(self.header["accelerator"]))

    @property
    def models(self) -> dict[str, Transformer]:
        """The models measured, by name."""
        return {k: Transformer(**v) for k, v in json.loads(self.header["models"]).items()}

    @property
    def run(self) -> str:
        """What tells this file from all others."""
        return self.header["run"]

    def done(self) -> set[Point]:
        """Return the points that were timed."""
        return {point_of(r) for r in self.rows[self.rows["status"] == "ok"].to_dict("records")}


def point_of(row: Mapping[Any, Any]) -> Point:
    """Return the point that a row of a table is about."""
    numbers = {k: int(row[k]) for k in ("tp", "batch", "context", "new")}
    return Point(model=str(row["model"]), mode=str(row["mode"]), phase=row["phase"], **numbers)


def header_of(
    models: Mapping[str, Transformer], accelerator: Accelerator, conditions: Mapping[str, str]
) -> dict[str, str]:
    """Return the header of a new file."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "format": FORMAT,
        "run": uuid.uuid4().hex[:12],
        "started": now,
        **conditions,
        "accelerator": json.dumps(asdict(accelerator)),
        "models": json.dumps({name: asdict(model) for name, model in models.items()}),
    }


def read_measurements(path: Path) -> Measurements:
    """Return what is in a file of measurements.

    Raises
    ------
    InputError
        If there is no such file, or it is not one of measurements.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        refuse("measurements", f"must be a CSV that `tierwise measure` wrote ({type(error).__name__})", str(path))
    text = text[: text.rfind("\n") + 1]  # a row cut off by a crash is measured again
    lines = text.splitlines()
    head = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
    header = {key: value for key, _, value in head}
    require(
        header.get("format") == FORMAT,
        "measurements",
        f"must begin with `# format: {FORMAT}`",
        header.get("format", "no header"),
        "Write the file with `tierwise measure`.",
    )
    missing = [k for k in ("run", "accelerator", "models", "dtype") if k not in header]
    require(not missing, "measurements", "must give run, accelerator, models and dtype in the header", missing)
    body = "\n".join(line for line in lines if not line.startswith("# "))
    rows = pd.read_csv(io.StringIO(body), dtype=str, keep_default_na=False)
    require(tuple(rows.columns) == COLUMNS, "measurements", f"must have the columns {', '.join(COLUMNS)}", str(path))
    try:
        rows = rows.astype(dict.fromkeys(("tp", "batch", "context", "new"), int))
        for name in ("median_s", "low_s", "high_s"):
            rows[name] = pd.to_numeric(rows[name])
        found = Measurements(header, rows.drop_duplicates(subset=list(COLUMNS[:7]), keep="last").reset_index(drop=True))
        _check(found)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"`measurements` must hold what `tierwise measure` writes; {path} does not: {error}."
        ) from None
    return found


def _check(found: Measurements) -> None:
    known, timed = found.models, found.rows[found.rows["status"] == "ok"]
    strangers = sorted(set(found.rows["model"]) - set(known))
    require(not strangers, "model", f"must be one of the header's: {', '.join(known)}", strangers)
    require(bool((timed["median_s"] > 0).all()), "median_s", "must be above 0 [s]", timed["median_s"].min())
    require(found.accelerator.bandwidth > 0, "accelerator", "must be given", found.accelerator)


class Log:
    """A file of measurements being written; continues one of the same conditions.

    Raises
    ------
    InputError
        If the file exists with other conditions, is being written by another run, or cannot be written.
    """

    def __init__(self, path: Path, header: Mapping[str, str]) -> None:
        self.path = path
        old = read_measurements(path) if path.exists() and path.stat().st_size > 0 else None
        self.header = dict(old.header if old else header)
        if old:
            _same_conditions(path, old.header, header)
        try:
            self._file = path.open("a+b")
        except OSError as error:
            refuse("output", f"must be a file that can be written ({error.strerror})", str(path))
        try:
            _lock(self._file.fileno(), path)
        except InputError:
            self._file.close()
            raise
        if old:
            self._file.truncate(_last_newline(path))
        else:
            self._write("".join(f"# {k}: {v}\n" for k, v in header.items()) + _line(COLUMNS))

    def add(self, row: Row) -> None:
        """Write a row, all of it, to the disk."""
        cells = row.cells()
        self._write(_line([cells.get(c, "") for c in COLUMNS]))

    def _write(self, text: str) -> None:
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _same_conditions(path: Path, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    keys = [k for k in {**old, **new} if k not in CIRCUMSTANCES and old.get(k) != new.get(k)]
    if keys:
        said = "; ".join(f"{k}: {str(old.get(k))[:60]} there, {str(new.get(k))[:60]} now" for k in keys)
        raise InputError(
            f"`output` must be a new file, or one measured under the same conditions; {path} was not ({said}). "
            "Give another --output, or the options of the first run."
        )


def _lock(descriptor: int, path: Path) -> None:
    """Let no second run write the same file."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        refuse("output", "must not be in use by another run", str(path), "Wait for it, or give another --output.")


def _last_newline(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1


def _line(cells: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()

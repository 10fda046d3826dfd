"""Measured serving points: reading them, the protocol each was measured under, and predicted against measured.

A point is one run of a load generator against one server: so many clients, each sending its next request when the last
answer is complete, and the mean TTFT and TPOT that came out. What the file does not say (precision, lengths, requests
per client, limits of the engine) is a named field of a :class:`Protocol` with its source, never a constant in the code.
How a point is predicted is the caller's: ``predict`` is handed in, so that this module knows no simulator.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from theory.catalog import accelerators, models
from theory.errors import InputError, refuse, require
from theory.specs import PRECISION_BYTES, Precision

from .validate import WORST, error_summary

PROTOCOLS = Path(__file__).parent / "protocols.toml"
MILLISECOND = 1e-3  # [s]
MOST_CLIENTS = 65536  # of a point; more are a slip of the pen [-]
TEXT = ("id", "backend", "backend_version", "model_path", "system", "precision", "mode")
WHOLE = ("isl", "osl", "batch_size", "tp_size")
NUMBERS = (*WHOLE, "silicon_ttft_ms", "silicon_tpot_ms")
Apart = Literal["", "suspect", "saturated"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How points of one engine and model were measured, as far as the file leaves it open.

    Raises
    ------
    InputError
        If a precision is unknown, a share or a count is out of range, or the source is missing.
    """

    engine: str  # engine and preset of its rules: vllm, trtllm, sglang
    model: str = ""  # model of the catalogue; "": any
    accelerator: str = ""  # accelerator of the catalogue; "": any
    precision: Precision = "bf16"  # where the file does not say
    kv_precision: Precision = "bf16"  # of the KV cache
    shortest: float = 1.0  # lengths are drawn evenly from this share of the nominal one up to it [-]
    requests_per_client: int = 10  # [-]
    think_s: float = 0.002  # from an answer's last token to the client's next request [s]
    stagger_s: float = 0.001  # between the first requests of two clients [s]
    prompts_per_step: int = 0  # prompts for which the token budget of a step leaves room; 0: the engine's default
    slots_below_clients: int = 0  # running sequences allowed fewer than clients [-]
    settings: dict[str, float | str | bool] = field(default_factory=dict)  # more of the scenario's engine [own]
    only: dict[str, list[int]] = field(default_factory=dict)  # points it holds for, by prompt, output, tp or clients
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("precision", "kv_precision"):
            value = getattr(self, name)
            require(value in PRECISION_BYTES, name, f"must be one of {', '.join(PRECISION_BYTES)}", value)
        require(0 < self.shortest <= 1, "shortest", "must lie in (0, 1] [-]", self.shortest)
        require(
            self.requests_per_client >= 1, "requests_per_client", "must be at least 1 [-]", self.requests_per_client
        )
        for name in ("think_s", "stagger_s", "prompts_per_step", "slots_below_clients"):
            require(getattr(self, name) >= 0, name, "must be at least 0", getattr(self, name))
        require(bool(self.source), "source", "must say where the protocol is from", self.source)


@dataclass(frozen=True, slots=True)
class SetApart:
    """Points that are reported apart: what they have in common, as what, and why."""

    engine: str
    why: str
    kind: Apart = "suspect"
    model_path: str = ""  # as the file writes it; "": any
    precision: str | None = None  # as the file writes it; absent: any
    version: str = ""  # of the engine; "": any
    least_clients: int = 0  # [-]
    least_tp: int = 0  # [GPUs]

    def holds(self, row: dict[str, str], sizes: dict[str, float]) -> bool:
        """Return whether a row, with its numbers by column, is one of them."""
        return (
            self.engine == row["backend"]
            and self.model_path in ("", row["model_path"])
            and self.version in ("", row["backend_version"])
            and (self.precision is None or self.precision == row["precision"])
            and sizes["batch_size"] >= self.least_clients
            and sizes["tp_size"] >= self.least_tp
        )


@dataclass(frozen=True, slots=True)
class ServingPoint:
    """One measured point."""

    name: str
    engine: str
    version: str
    model: str  # of the catalogue
    accelerator: str  # of the catalogue
    precision: Precision
    tp: int  # [GPUs]
    clients: int  # [-]
    prompt: int  # nominal [tokens]
    output: int  # nominal [tokens]
    ttft_s: float  # mean [s]
    tpot_s: float  # mean of (last - first token) / (tokens - 1) [s]
    protocol: Protocol
    apart: Apart = ""  # as what it is reported apart

    @property
    def requests_per_s(self) -> float:
        """Return the completed requests that the measured times imply, N / (TTFT + (L - 1) TPOT) [requests/s]."""
        return self.clients / (self.ttft_s + (self.output - 1) * self.tpot_s)


class Prediction(NamedTuple):
    """What the model says of a point."""

    ttft_s: float  # mean [s]
    tpot_s: float  # mean [s]


Predict = Callable[[ServingPoint], Prediction]
_Entry = TypeVar("_Entry")


class Serving(NamedTuple):
    """The points of a file, and how many rows were left out for which reason."""

    points: tuple[ServingPoint, ...]
    skipped: dict[str, int]


# --- reading ---------------------------------------------------------------------------------------------------------


def load_protocols(path: Path = PROTOCOLS) -> tuple[tuple[Protocol, ...], tuple[SetApart, ...]]:
    """Return the protocols of a TOML file in order, and the points it sets apart.

    Raises
    ------
    InputError
        If the file is missing or no TOML, or holds a key or a value that a protocol has not.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"`protocols` must be a readable TOML file; got {path.name} ({error}).") from None
    found = tuple(_entry(Protocol, entry) for entry in table.get("protocol", []))
    require(bool(found), "protocols", "must hold at least one [[protocol]]", path.name)
    return found, tuple(_entry(SetApart, entry) for entry in table.get("apart", []))


def _entry(kind: type[_Entry], entry: dict[str, Any]) -> _Entry:
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    require(set(entry) <= known, kind.__name__, f"may hold {', '.join(sorted(known))}", sorted(set(entry) - known))
    try:
        return kind(**entry)
    except TypeError as error:  # a key without a default is missing
        raise InputError(f"`{kind.__name__}` must be complete; got {entry} ({error}).") from None


def read_serving(path: Path, protocols: Path = PROTOCOLS) -> Serving:
    """Return the points of a CSV in the layout of AIConfigurator's ``silicon_e2e`` table.

    Rows of models that are not in the catalogue (mixtures of experts among them), of disaggregated or pipelined
    servers, and of engines without a protocol are skipped and counted. Points that ``protocols`` sets apart, with its
    reason, are summarised apart.

    Raises
    ------
    InputError
        If the file is no CSV, a column is missing, or a value is not what it must be (the line is named).
    """
    table = _table(path)
    rules, apart = load_protocols(protocols)
    points: list[ServingPoint] = []
    skipped: Counter[str] = Counter()
    for line, row in zip(table.index, _records(table), strict=True):
        reason = _not_served(row)
        sizes = {} if reason else {name: _number(row, name, line, whole=name in WHOLE) for name in NUMBERS}
        protocol = None if reason else _protocol(row, sizes, rules)
        if protocol is None:
            skipped[reason or f"no protocol for engine {row['backend']}"] += 1
            continue
        points.append(_point(row, sizes, protocol, next((a.kind for a in apart if a.holds(row, sizes)), ""), line))
    require(bool(points), "csv", "must hold points of dense models of the catalogue", dict(skipped))
    return Serving(tuple(points), dict(skipped))


def _table(path: Path) -> pd.DataFrame:
    require(path.is_file(), "csv", "must be a CSV file that exists", str(path))
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        refuse("csv", f"must hold CSV ({error})", path.name)
    for column in (*TEXT, *NUMBERS):
        require(column in table.columns, column, f"must be a column of {path.name}", sorted(table.columns))
    table.index = pd.RangeIndex(2, len(table) + 2, name="line")  # line 1 is the header
    return table


def _records(table: pd.DataFrame) -> list[dict[str, str]]:
    return [{str(k): str(v) for k, v in row.items()} for row in table.to_dict("records")]


def catalogue_model(path: str) -> str:
    """Return the name in the catalogue of a model as a hub names it; "" if it is not there.

    Examples
    --------
    >>> catalogue_model("meta-llama/Llama-3.1-8B-Instruct"), catalogue_model("openai/gpt-oss-120b")
    ('llama-3.1-8b', '')
    """
    name = path.rsplit("/", 1)[-1].lower().removesuffix("-fp8").removesuffix("-instruct")
    return name if name in models() else ""


def _not_served(row: dict[str, str]) -> str:
    """Return why a row cannot be predicted; "" if it can."""
    if row["mode"] != "agg":
        return "prefill and decode on different servers"
    if not catalogue_model(row["model_path"]):
        return f"model not in the catalogue: {row['model_path']}"
    if row["system"].replace("_", "-") not in accelerators():
        return f"accelerator not in the catalogue: {row['system']}"
    if row.get("pp_size", "") not in ("", "1", "1.0"):
        return "pipeline parallel"
    return ""


def _protocol(row: dict[str, str], sizes: dict[str, float], rules: Sequence[Protocol]) -> Protocol | None:
    """Return the first protocol that is made for a row."""
    named = {"prompt": "isl", "output": "osl", "tp": "tp_size", "clients": "batch_size"}
    for rule in rules:
        same = rule.engine == row["backend"] and rule.model in ("", catalogue_model(row["model_path"]))
        same = same and rule.accelerator in ("", row["system"].replace("_", "-"))
        if same and all(sizes[named[name]] in values for name, values in rule.only.items()):
            return rule
    return None


def _point(row: dict[str, str], sizes: dict[str, float], protocol: Protocol, apart: Apart, line: int) -> ServingPoint:
    given = row["precision"]
    require(given in ("", *PRECISION_BYTES), f"line {line}, precision", f"must be {', '.join(PRECISION_BYTES)}", given)
    clients = int(sizes["batch_size"])
    require(clients <= MOST_CLIENTS, f"line {line}, batch_size", f"must be at most {MOST_CLIENTS} clients", clients)
    precision: Precision = "fp8" if (given or protocol.precision) == "fp8" else "bf16"
    return ServingPoint(
        name=row["id"],
        engine=row["backend"],
        version=row["backend_version"],
        model=catalogue_model(row["model_path"]),
        accelerator=row["system"].replace("_", "-"),
        precision=precision,
        tp=int(sizes["tp_size"]),
        clients=clients,
        prompt=int(sizes["isl"]),
        output=int(sizes["osl"]),
        ttft_s=sizes["silicon_ttft_ms"] * MILLISECOND,
        tpot_s=sizes["silicon_tpot_ms"] * MILLISECOND,
        protocol=protocol,
        apart=apart,
    )


def _number(row: dict[str, str], column: str, line: int, whole: bool = False) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = float("nan")
    good = np.isfinite(value) and value > 0 and (not whole or value == int(value))
    require(bool(good), f"line {line}, {column}", f"must be a {'whole ' if whole else ''}number above 0", row[column])
    return value


# --- predicted against measured --------------------------------------------------------------------------------------


def compare(points: Sequence[ServingPoint], predict: Predict) -> pd.DataFrame:
    """Return the points as rows with what is predicted and its errors (predicted / measured - 1)."""
    return pd.DataFrame([_row(point, predict(point)) for point in points])


def _row(point: ServingPoint, said: Prediction) -> dict[str, Any]:
    return {
        "name": point.name,
        "model": point.model,
        "system": point.accelerator,
        "backend": point.engine,
        "precision": point.precision,
        "tp": point.tp,
        "clients": point.clients,
        "prompt": point.prompt,
        "output": point.output,
        "ttft_s": point.ttft_s,
        "ttft_predicted_s": said.ttft_s,
        "ttft_error": said.ttft_s / point.ttft_s - 1,
        "tpot_s": point.tpot_s,
        "tpot_predicted_s": said.tpot_s,
        "tpot_error": said.tpot_s / point.tpot_s - 1,
        "apart": point.apart,
    }


def validate_serving(
    path: Path, predict: Predict, protocols: Path = PROTOCOLS, done: Callable[[int, int], None] = lambda _i, _n: None
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Return how far ``predict`` is from the serving points of a file, nothing fitted, and the rows that say so.

    A point that ``predict`` refuses (weights or requests that do not fit, a degree that does not split the model) is
    counted with the reason, like a row that cannot be read as a point.

    Returns
    -------
    dict
        ``tpot`` and ``ttft`` (error summaries of all points but the suspect ones), ``unsaturated`` (the same without
        the points whose server's front end was full), ``by_group`` (one per model x system x backend), ``worst``
        (rows by error of TPOT), ``suspect`` (error summaries of what was set apart), ``skipped`` (rows by reason).

    Raises
    ------
    InputError
        As :func:`read_serving`, or if no point is left.
    """
    serving = read_serving(path, protocols)
    found: list[dict[str, Any]] = []
    skipped = Counter(serving.skipped)
    for i, point in enumerate(serving.points):
        try:
            found.append(_row(point, predict(point)))
        except InputError as error:
            skipped[f"{point.name}: {error}"] += 1
        done(i + 1, len(serving.points))
    require(bool(found), "csv", "must hold a point that can be predicted", dict(skipped))
    rows = pd.DataFrame(found)
    kept, suspect = rows[rows["apart"] != "suspect"], rows[rows["apart"] == "suspect"]
    require(not kept.empty, "csv", "must hold a point that is not set apart as suspect", len(suspect))
    groups = kept.groupby(["model", "system", "backend"], sort=True)
    result = {
        **summaries(kept),
        "unsaturated": summaries(kept[kept["apart"] == ""]) if (kept["apart"] == "").any() else None,
        "by_group": [dict(zip(("model", "system", "backend"), k, strict=True)) | summaries(g) for k, g in groups],
        "worst": _worst(kept),
        "suspect": summaries(suspect) if len(suspect) else None,
        "skipped": dict(skipped),
    }
    return result, rows


def summaries(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return the error summaries of TPOT and TTFT [-]."""
    return {name: error_summary(rows[f"{name}_predicted_s"], rows[f"{name}_s"]) for name in ("tpot", "ttft")}


def _worst(rows: pd.DataFrame) -> list[dict[str, Any]]:
    order = rows["tpot_error"].abs().sort_values(ascending=False).index[:WORST]
    return [{str(k): v for k, v in row.items()} for row in rows.loc[order].to_dict("records")]

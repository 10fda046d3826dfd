"""What arrives: request times, prompt and output lengths, drawn from laws or read from a trace."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from theory.errors import refuse, require

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Requests in the order of arrival; the arrays are copied and made read-only.

    With ``clients`` > 0 it is a closed loop: arrival times are ignored, each client keeps one request in flight and
    sends the next one of the list ``think_time`` after its previous one completes.

    Raises
    ------
    InputError
        If there is no request, lengths differ, an arrival is not finite, negative or out of order, or a prompt or an
        output is not a whole number of at least 1; the row is named.

    Examples
    --------
    >>> Workload([0.0, 0.5], [100, 200], [10, 30]).mean_output
    20.0
    """

    arrival: Floats  # (n,) since the start, sorted [s]
    prompt: Ints  # (n,) [tokens]
    output: Ints  # (n,) [tokens]
    source: str = ""  # where the numbers come from
    clients: int = 0  # requests in flight in a closed loop; 0: open loop [-]
    think_time: float = 0.0  # closed loop: from a completion to the next request of the client [s]

    def __init__(
        self,
        arrival: ArrayLike,
        prompt: ArrayLike,
        output: ArrayLike,
        source: str = "",
        clients: int = 0,
        think_time: float = 0.0,
    ) -> None:
        set_field = object.__setattr__
        set_field(self, "arrival", _arrivals(arrival))
        set_field(self, "prompt", _tokens("prompt", prompt))
        set_field(self, "output", _tokens("output", output))
        set_field(self, "source", source)
        set_field(self, "clients", clients)
        set_field(self, "think_time", think_time)
        sizes = (self.arrival.size, self.prompt.size, self.output.size)
        require(len(set(sizes)) == 1, "workload", "must have as many arrivals as prompts and outputs", sizes)
        require(sizes[0] > 0, "workload", "must hold at least one request", sizes[0])
        _check_loop(clients, think_time)

    @property
    def requests(self) -> int:
        """Number of requests [-]."""
        return int(self.arrival.size)

    @property
    def mean_prompt(self) -> float:
        """Mean prompt length [tokens]."""
        return float(self.prompt.mean())

    @property
    def mean_output(self) -> float:
        """Mean output length [tokens]."""
        return float(self.output.mean())

    @property
    def rate(self) -> float:
        """Mean arrival rate of an open loop, (n - 1) / (last - first) [request/s]."""
        require(self.clients == 0, "rate", "is given by the system in a closed loop, not by the workload", self.clients)
        span = float(self.arrival[-1] - self.arrival[0])
        require(span > 0, "rate", "needs at least two different arrival times [s]", span)
        return (self.requests - 1) / span


def _check_loop(clients: int, think_time: float) -> None:
    ok = isinstance(clients, int) and not isinstance(clients, bool) and clients >= 0
    require(ok, "clients", "must be an integer of at least 0 [-]", clients, "0 is an open loop.")
    require(
        math.isfinite(think_time) and think_time >= 0, "think_time", "must be finite and at least 0 [s]", think_time
    )


def _arrivals(values: ArrayLike) -> Floats:
    array = np.array(values, dtype=np.float64, ndmin=1)
    bad = ~(np.isfinite(array) & (array >= 0))
    bad[1:] |= np.diff(array) < 0
    _refuse_first(bad, "arrival", "must be finite, at least 0 and not before its predecessor [s]", array)
    array.flags.writeable = False
    return array


def _tokens(name: str, values: ArrayLike) -> Ints:
    array = np.array(values, dtype=np.float64, ndmin=1)
    whole = np.isfinite(array) & (array == np.floor(array))
    _refuse_first(~(whole & (array >= 1)), name, "must be a whole number of at least 1 [tokens]", array)
    tokens = array.astype(np.int64)
    tokens.flags.writeable = False
    return tokens


def _refuse_first(bad: NDArray[np.bool_], name: str, rule: str, array: Floats) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        refuse(f"{name}[{row}]", rule, float(array[row]), "Drop or mend this request.")


# Arrival times


def poisson(rate: float, n: int, rng: np.random.Generator) -> Floats:
    """Return ``n`` arrival times of a Poisson process [s].

    Raises
    ------
    InputError
        If the rate [request/s] is not above 0 or ``n`` is not at least 1.

    Examples
    --------
    >>> poisson(2.0, 3, np.random.default_rng(0)).shape
    (3,)
    """
    return gamma(rate, 1.0, n, rng)


def gamma(rate: float, cv: float, n: int, rng: np.random.Generator) -> Floats:
    r"""Return ``n`` arrival times with gamma-distributed gaps [s].

    .. math:: \Delta \sim \Gamma(k = 1/c_v^2,\; \theta = c_v^2 / r)

    ``cv`` is the coefficient of variation of the gaps: 0 is a clock, 1 a Poisson process, more is bursts.

    Raises
    ------
    InputError
        If the rate [request/s] is not above 0, ``cv`` [-] is negative or ``n`` is not at least 1.

    Examples
    --------
    >>> gamma(2.0, 0.0, 3, np.random.default_rng(0)).tolist()
    [0.5, 1.0, 1.5]
    """
    require(math.isfinite(rate) and rate > 0, "rate", "must be finite and above 0 [request/s]", rate)
    require(math.isfinite(cv) and cv >= 0, "cv", "must be finite and at least 0 [-]", cv, "1 is a Poisson process.")
    require(n >= 1, "requests", "must be at least 1 [-]", n)
    gaps = np.full(n, 1.0) if cv == 0 else rng.gamma(1.0 / cv**2, cv**2, n)
    return np.asarray(np.cumsum(gaps) / rate)


# Lengths


class Lengths(Protocol):
    """A law of prompt or output lengths."""

    @property
    def mean(self) -> float:
        """Mean length [tokens]."""

    def draw(self, n: int, rng: np.random.Generator) -> Ints:
        """Return ``n`` lengths of at least 1 [tokens]."""


@dataclass(frozen=True, slots=True)
class FixedLengths:
    """Every request has the same length.

    Examples
    --------
    >>> FixedLengths(5).draw(2, np.random.default_rng(0)).tolist()
    [5, 5]
    """

    tokens: int  # [tokens]

    def __post_init__(self) -> None:
        ok = isinstance(self.tokens, int) and self.tokens >= 1
        require(ok, "tokens", "must be a whole number of at least 1 [tokens]", self.tokens)

    @property
    def mean(self) -> float:
        """Mean length [tokens]."""
        return float(self.tokens)

    def draw(self, n: int, rng: np.random.Generator) -> Ints:  # noqa: ARG002 the protocol hands it over
        """Return ``n`` lengths [tokens]."""
        return np.full(n, self.tokens, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class GeometricLengths:
    r"""Geometric lengths, the exponential law of whole tokens: :math:`P(L = l) = (1 - 1/m)^{l-1} / m`, l = 1, 2, ...

    Examples
    --------
    >>> GeometricLengths(1.0).draw(2, np.random.default_rng(0)).tolist()
    [1, 1]
    """

    mean: float  # m [tokens]

    def __post_init__(self) -> None:
        ok = math.isfinite(self.mean) and self.mean >= 1
        require(ok, "mean", "must be finite and at least 1 [tokens]", self.mean)

    def draw(self, n: int, rng: np.random.Generator) -> Ints:
        """Return ``n`` lengths [tokens]."""
        return rng.geometric(1.0 / self.mean, n).astype(np.int64)


@dataclass(frozen=True, slots=True)
class LogNormalLengths:
    r"""Log-normal lengths cut to [low, high] and rounded to whole tokens.

    .. math:: L = \operatorname{round}(X),\quad \ln X \sim N(\ln m, \sigma^2) \mid l - 1/2 \le X < h + 1/2

    The cut conditions the law (it does not pile up mass at the ends).

    Raises
    ------
    InputError
        If the median or sigma is not above 0, or low and high are not whole with 1 <= low <= high.

    Examples
    --------
    >>> lengths = LogNormalLengths(median=100.0, sigma=1.0, low=1, high=2000)
    >>> bool(1 <= lengths.draw(3, np.random.default_rng(0)).min()), round(float(lengths.cdf(100)), 3)
    (True, 0.503)
    """

    median: float  # of the uncut law [tokens]
    sigma: float  # standard deviation of ln X [-]
    low: int  # shortest [tokens]
    high: int  # longest [tokens]

    def __post_init__(self) -> None:
        for name, unit in (("median", "tokens"), ("sigma", "-")):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, name, f"must be finite and above 0 [{unit}]", value)
        ok = isinstance(self.low, int) and isinstance(self.high, int) and 1 <= self.low <= self.high
        require(ok, "low, high", "must be whole numbers with 1 <= low <= high [tokens]", (self.low, self.high))

    def _z(self, tokens: float | Floats) -> Floats:
        return np.asarray((np.log(tokens) - math.log(self.median)) / self.sigma)

    @property
    def _ends(self) -> tuple[float, float]:
        return float(self._z(self.low - 0.5)), float(self._z(self.high + 0.5))

    @property
    def mean(self) -> float:
        r"""Mean length of the cut law before rounding [tokens].

        .. math:: m\,e^{\sigma^2/2}\,\frac{\Phi(b - \sigma) - \Phi(a - \sigma)}{\Phi(b) - \Phi(a)}
        """
        a, b = self._ends
        share = (ndtr(b - self.sigma) - ndtr(a - self.sigma)) / (ndtr(b) - ndtr(a))
        return float(self.median * math.exp(self.sigma**2 / 2) * share)

    def cdf(self, tokens: ArrayLike) -> Floats:
        """Return P(L <= tokens), exact for whole tokens [-]."""
        a, b = self._ends
        edge = np.clip(np.floor(np.asarray(tokens, float)), self.low - 1, self.high) + 0.5
        return np.asarray((ndtr(self._z(edge)) - ndtr(a)) / (ndtr(b) - ndtr(a)))

    def draw(self, n: int, rng: np.random.Generator) -> Ints:
        """Return ``n`` lengths [tokens], by inversion: one uniform number each."""
        a, b = self._ends
        z = ndtri(rng.uniform(ndtr(a), ndtr(b), n))
        tokens = np.rint(self.median * np.exp(self.sigma * z))
        return np.asarray(np.clip(tokens, self.low, self.high), np.int64)


# Workloads


def open_loop(arrival: ArrayLike, prompt: Lengths, output: Lengths, rng: np.random.Generator) -> Workload:
    """Return requests at given times with independent lengths.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> open_loop(poisson(2.0, 4, rng), FixedLengths(10), GeometricLengths(5.0), rng).requests
    4
    """
    times = np.asarray(arrival, float)
    return Workload(times, prompt.draw(times.size, rng), output.draw(times.size, rng), f"drawn: {prompt}, {output}")


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """A fixed number of clients, each with one request in flight.

    Raises
    ------
    InputError
        If there is no client or no request, or the think time is negative.
    """

    clients: int  # requests in flight [-]
    requests: int  # over all clients [-]
    think_time: float = 0.0  # from a completion to the next request of the client [s]

    def __post_init__(self) -> None:
        _check_loop(self.clients, self.think_time)
        require(self.clients >= 1, "clients", "must be at least 1 in a closed loop [-]", self.clients)
        require(self.requests >= 1, "requests", "must be at least 1 [-]", self.requests)


def closed_loop(spec: ClosedLoop, prompt: Lengths, output: Lengths, rng: np.random.Generator) -> Workload:
    """Return the requests of a closed loop, lengths independent; their arrival times are not used.

    Examples
    --------
    >>> closed_loop(ClosedLoop(2, 5), FixedLengths(10), FixedLengths(5), np.random.default_rng(0)).clients
    2
    """
    n = spec.requests
    source = f"drawn: {spec}, {prompt}, {output}"
    lengths = prompt.draw(n, rng), output.draw(n, rng)
    return Workload(np.zeros(n), *lengths, source, clients=spec.clients, think_time=spec.think_time)


# Traces


class _Columns(NamedTuple):
    arrival: str
    prompt: str
    output: str


_LAYOUTS = (
    _Columns("arrived_at", "num_prefill_tokens", "num_decode_tokens"),  # Vidur
    _Columns("TIMESTAMP", "ContextTokens", "GeneratedTokens"),  # Azure public dataset
)


def read_trace(path: str | Path, rate: float | None = None, limit: int | None = None, sort: bool = False) -> Workload:
    """Return the requests of a CSV trace, times counted from the first arrival.

    Parameters
    ----------
    path : str or Path
        CSV with columns ``arrived_at`` [s], ``num_prefill_tokens``, ``num_decode_tokens`` (Vidur), or ``TIMESTAMP``
        (date and time), ``ContextTokens``, ``GeneratedTokens`` (Azure). Other columns are ignored.
    rate : float, optional
        Stretch the time axis to this mean rate [request/s]; the pattern of the gaps stays.
    limit : int, optional
        Read only this many requests from the start.
    sort : bool
        Sort by time; without it a time before its predecessor is refused.

    Raises
    ------
    InputError
        If the file is missing, not text or empty, a column is missing, or a value is not what it must be; the line is
        named.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
    ...     _ = file.write("arrived_at,num_prefill_tokens,num_decode_tokens\\n7.0,100,10\\n9.0,50,20\\n")
    ...     file.flush()
    ...     read_trace(file.name, rate=4.0).arrival.tolist()
    [0.0, 0.25]
    """
    path = Path(path)
    require(limit is None or limit >= 1, "limit", "must be at least 1 [requests]", limit)
    rows = _rows(path, limit)
    require(len(rows) > 0, "trace", "must hold at least one request", str(path), "The file has a header at most.")
    if sort:
        rows.sort(key=lambda row: row.arrival)
    _check_order(rows)
    arrival, prompt, output = (np.array([row[i] for row in rows], float) for i in (1, 2, 3))
    trace = Workload(arrival - arrival[0], prompt, output, f"trace {path.name}, {len(rows)} requests")
    return trace if rate is None else at_rate(trace, rate)


def at_rate(workload: Workload, rate: float) -> Workload:
    """Return the workload with its time axis stretched to a mean rate [request/s]; the pattern of the gaps stays.

    Raises
    ------
    InputError
        If the rate is not above 0, or all requests arrive at one time, or it is a closed loop.

    Examples
    --------
    >>> at_rate(Workload([0.0, 1.0, 4.0], [1, 1, 1], [1, 1, 1]), rate=1.0).arrival.tolist()
    [0.0, 0.5, 2.0]
    """
    require(math.isfinite(rate) and rate > 0, "rate", "must be finite and above 0 [request/s]", rate)
    source = f"{workload.source}, stretched to {rate:g} request/s".lstrip(", ")
    return Workload(workload.arrival * (workload.rate / rate), workload.prompt, workload.output, source)


class _Row(NamedTuple):
    line: int
    arrival: float
    prompt: int
    output: int


def _rows(path: Path, limit: int | None) -> list[_Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(islice(_parse(csv.reader(file), path), limit))
    except FileNotFoundError:
        refuse("trace", "must be a CSV file that exists", str(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        refuse("trace", f"must be a readable CSV file ({error})", str(path))


def _parse(lines: Iterator[list[str]], path: Path) -> Iterator[_Row]:
    header = [name.strip() for name in next(lines, [])]
    require(bool(header), "trace", "must hold a header and requests", str(path), "The file is empty.")
    places = _places(header)
    for number, cells in enumerate(lines, start=2):
        if not any(cell.strip() for cell in cells):
            continue
        require(len(cells) == len(header), f"trace line {number}", f"must have {len(header)} columns", ",".join(cells))
        time, prompt, output = (cells[i].strip() for i in places)
        yield _Row(number, _time(time, number), _count(prompt, number), _count(output, number))


def _places(header: list[str]) -> tuple[int, int, int]:
    layouts = [layout for layout in _LAYOUTS if set(layout) <= set(header)]
    known = " or ".join(", ".join(layout) for layout in _LAYOUTS)
    require(bool(layouts), "trace", "must have the columns of a known layout", ",".join(header), f"Known: {known}.")
    arrival, prompt, output = (header.index(column) for column in layouts[0])
    return arrival, prompt, output


def _time(cell: str, line: int) -> float:
    try:
        time = float(cell)
    except ValueError:
        try:
            date = datetime.fromisoformat(cell)
            time = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
        except ValueError:
            time = math.nan
    ok = math.isfinite(time) and time >= 0
    require(ok, f"trace line {line}, arrival", "must be a time of at least 0 [s] or a date", cell)
    return time


def _count(cell: str, line: int) -> int:
    try:
        tokens = float(cell)
    except ValueError:
        tokens = math.nan
    ok = math.isfinite(tokens) and tokens >= 1 and tokens == int(tokens)
    require(ok, f"trace line {line}, tokens", "must be a whole number of at least 1 [tokens]", cell, "Drop this line.")
    return int(tokens)


def _check_order(rows: list[_Row]) -> None:
    for before, row in pairwise(rows):
        if row.arrival < before.arrival:
            rule = f"must not be before line {before.line} ({before.arrival:.6f} s)"
            refuse(f"trace line {row.line}, arrival", rule, row.arrival, "Pass sort=True to sort by time.")

"""Records to figures: TTFT, TPOT, E2E, speed, goodput, occupancy, acceptance, each with an interval, and a status.

Warm-up is removed by a fixed rule, :func:`warmup_requests`. A rule that reads the noise (MSER-5, White
1997) was tried: it biases the mean of a stationary queue low and lowered the coverage of the intervals from 95 to 89 %
(M/M/4 at load 0.7).
Intervals are by batch means, widened by the correlation that is left between batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from theory.errors import require

from .engine import Records

Array = NDArray[np.float64]
Status = Literal["steady", "overloaded"]

LEVEL = 0.95  # coverage of the intervals [-]
BATCHES = 20  # batches of an interval: 10 to 30 lose little (Schmeiser 1982, Operations Research 30:556) [-]
PROBABILITIES = (0.5, 0.9, 0.95, 0.99)  # of the percentiles reported [-]


class Estimate(NamedTuple):
    """A figure and its interval; an end the data cannot bound is infinite."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The distribution of a time over requests, in its own unit."""

    mean: Estimate
    p50: Estimate
    p90: Estimate
    p95: Estimate
    p99: Estimate
    count: int  # requests [-]


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count as good."""

    ttft_s: float = math.inf  # [s]
    tpot_s: float = math.inf  # mean over the tokens after the first [s]
    e2e_s: float = math.inf  # [s]

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            require(getattr(self, name) > 0, name, "must be above 0 [s]", getattr(self, name))


@dataclass(frozen=True, slots=True)
class Metrics:
    """One run. Of an overloaded run the times depend on how long it was: read ``status`` first."""

    status: Status
    requests: int  # in the run [-]
    warmup: int  # left out at the start [-]
    refused: int  # larger than the KV cache [-]
    ttft_s: Summary
    tpot_s: Summary  # over the tokens after the first; requests of one token have none [s/token]
    e2e_s: Summary
    user_speed: Summary  # (tokens - 1) / (E2E - TTFT) [token/s]
    requests_per_s: float  # completions in the measured span
    tokens_per_s: float  # output tokens of those requests, by their rate
    good: Estimate  # share of requests that keep the SLO; a refused request does not [-]
    goodput: float  # good requests [request/s]
    batch: float  # decoding sequences of a replica, time average over the measured span [-]
    utilisation: float  # busy share of the time from first arrival to last completion [-]
    acceptance: float  # accepted / drafted: the accepted fraction; nan without drafts [-]
    tokens_per_round: float  # tokens past the first / rounds, by requests; nan if nobody decoded [tokens]
    rounds: float  # decode rounds of a request [-]
    preemptions: float  # of a request [-]


def measure(records: Records, slo: Slo | None = None, warmup: int | None = None) -> Metrics:
    """Return the figures of a run.

    Parameters
    ----------
    records : Records
        Of one replica, or of a tier with its replicas merged.
    slo : Slo, optional
        What goodput asks for; nothing by default.
    warmup : int, optional
        Requests to leave out at the start; by :func:`warmup_requests` in an open loop, none in a closed one (serving
        benchmarks count every request) by default [-].

    Returns
    -------
    Metrics
        Every mean and percentile with its interval of level ``LEVEL``.

    Raises
    ------
    InputError
        If no request is left to measure.

    Examples
    --------
    >>> from simulator.engine import StepTable, simulate
    >>> from simulator.workload import Workload
    >>> from theory.specs import Limits
    >>> table = StepTable([0], [[0.0, 0.01]], [[0.0, 0.0]], [0, 1000], [0.0, 0.1])
    >>> run = simulate(Workload([0.0, 5.0], [100, 100], [11, 11]), table, Limits(max_num_seqs=1), 10_000)
    >>> figures = measure(run)
    >>> figures.status, round(figures.tpot_s.mean.value, 6)
    ('steady', 0.01)
    """
    served = ~records.refused
    require(bool(served.any()), "records", "must hold a request that was served", int(served.sum()))
    e2e = records.completion - records.arrival
    if warmup is None:
        warmup = 0 if records.closed else warmup_requests(records.arrival[served], e2e[served])
    kept = np.flatnonzero(served)[warmup:]
    require(kept.size > 0, "warmup", f"must be below the {int(served.sum())} requests served", warmup)
    ttft, decode, tokens = (
        (records.first_token - records.arrival)[kept],
        _decode(records, kept),
        records.output[kept] - 1,
    )
    many = tokens > 0
    tpot = decode[many] / tokens[many]
    start, end = _span(records, kept)
    rate = _rate(records, kept, start, end)
    good = _good(records, kept, slo or Slo())
    after = np.flatnonzero(records.refused & (records.arrival >= records.arrival[kept[0]])).size
    share = kept.size / (kept.size + after)
    drafted, rounds = int(records.drafted[kept].sum()), int(records.rounds[kept].sum())
    return Metrics(
        status=status(records),
        requests=records.arrival.size,
        warmup=warmup,
        refused=int(records.refused.sum()),
        ttft_s=summary(ttft),
        tpot_s=summary(tpot),
        e2e_s=summary(e2e[kept]),
        user_speed=summary(1.0 / tpot),
        requests_per_s=rate,
        tokens_per_s=rate * float(records.output[kept].mean()),
        good=Estimate(*(share * x for x in mean_interval(good))),
        goodput=rate * float(good.mean()),
        batch=_mean_batch(records, start, end) / records.replicas,
        utilisation=records.busy_s / records.replicas / max(records.end_s - float(records.arrival[0]), 1e-300),
        acceptance=float(records.accepted[kept].sum()) / drafted if drafted else math.nan,
        tokens_per_round=float(tokens.sum()) / rounds if rounds else math.nan,
        rounds=rounds / kept.size,
        preemptions=float(records.preemptions[kept].mean()),
    )


WARMUP_SHARE = 0.1  # of the requests [-]; assumed
WARMUP_TIMES = 3.0  # mean E2E from the first arrival: the batch has filled by then [-]; assumed


def warmup_requests(arrival: Array, e2e: Array) -> int:
    """Return how many of the requests served in an open loop are warm-up, given their arrivals and E2E [s].

    A tenth, or those that arrive within three mean E2E of the first, whichever is more, but never over half.

    Examples
    --------
    >>> warmup_requests(np.arange(100.0), np.full(100, 2.0)), warmup_requests(np.arange(100.0), np.full(100, 5.0))
    (10, 15)
    """
    early = int(np.count_nonzero(arrival < arrival[0] + WARMUP_TIMES * float(e2e.mean())))
    return min(max(int(WARMUP_SHARE * arrival.size), early), arrival.size // 2)


STEPS = 5  # mean steps that the last request of an overloaded run waits at least; a round boundary is one or two [-]


def status(records: Records) -> Status:
    """Return whether the run was steady or overloaded.

    Overloaded: from the median arrival to the last one the waiting line never emptied, more requests waited at the end
    of that time than at its beginning, and the last one waited for more than ``STEPS`` mean steps. Below capacity the
    line clears again and again; above it, it does not once the backlog has passed its fluctuations. A run shorter than
    those is called overloaded too: its means are not steady. A closed loop has a bounded line and is steady.
    """
    served = np.flatnonzero(~records.refused)
    if records.closed or served.size < 2:
        return "steady"
    middle, last = float(np.median(records.arrival)), float(records.arrival[-1])
    step = records.busy_s / records.steps
    if records.clear_s >= middle or records.admitted[served[-1]] - records.arrival[served[-1]] <= STEPS * step:
        return "steady"
    return "overloaded" if _waiting(records, last) > _waiting(records, middle) else "steady"


def _waiting(records: Records, time: float) -> int:
    return int(np.count_nonzero((records.arrival <= time) & (records.admitted > time)))


def _decode(records: Records, kept: NDArray[np.intp]) -> Array:
    return (records.completion - records.first_token)[kept]


def _span(records: Records, kept: NDArray[np.intp]) -> tuple[float, float]:
    """Return the time over which rates are taken: kept arrivals in an open loop, all in a closed one or in a burst."""
    start, last = float(records.arrival[kept[0]]), float(records.arrival[kept[-1]])
    end = float(np.nanmax(records.completion))
    return (start, end) if records.closed or last <= start else (start, last)


def _rate(records: Records, kept: NDArray[np.intp], start: float, end: float) -> float:
    """Return completions per second within the span, whoever arrived before it included [request/s]."""
    if records.arrival.size == 1 or kept.size == 1:
        return kept.size / max(end - start, 1e-300)
    done = np.count_nonzero((records.completion > start) & (records.completion <= end))
    return float(done / (end - start))


def _mean_batch(records: Records, start: float, end: float) -> float:
    """Return the time average of requests between first token and completion, waiting after a preemption included."""
    first, last = np.clip(records.first_token, start, end), np.clip(records.completion, start, end)
    return float(np.nansum(last - first) / max(end - start, 1e-300))


def _good(records: Records, kept: NDArray[np.intp], slo: Slo) -> Array:
    ttft = (records.first_token - records.arrival)[kept]
    tpot = _decode(records, kept) / np.maximum(records.output[kept] - 1, 1)
    e2e = (records.completion - records.arrival)[kept]
    return ((ttft <= slo.ttft_s) & (tpot <= slo.tpot_s) & (e2e <= slo.e2e_s)).astype(np.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Estimators
# ---------------------------------------------------------------------------------------------------------------------


def summary(values: ArrayLike) -> Summary:
    """Return mean and percentiles, with intervals, of values in the order of arrival (all nan if there is none)."""
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        nothing = Estimate(math.nan, math.nan, math.nan)
        return Summary(nothing, nothing, nothing, nothing, nothing, 0)
    p50, p90, p95, p99 = (quantile_interval(x, p) for p in PROBABILITIES)
    return Summary(mean_interval(x), p50, p90, p95, p99, x.size)


def mean_interval(values: ArrayLike, level: float = LEVEL) -> Estimate:
    r"""Return the mean of a correlated series and its interval by batch means.

    .. math:: \bar x \pm t_{b-1}\, \frac{s_b}{\sqrt b} \sqrt{\frac{1 + \rho}{1 - \rho}}

    with s_b the deviation of b batch means and rho their lag-one correlation if it is positive (capped at 0.9): what is
    left of it is taken as that of an AR(1) series. Under four values there is no interval.

    Source
    ------
    Law (2015), Simulation Modeling and Analysis, section 9.5.3; the last factor: variance of the mean of AR(1).

    Examples
    --------
    >>> estimate = mean_interval(np.tile([1.0, 3.0], 100))
    >>> estimate.value, estimate.low <= 2.0 <= estimate.high
    (2.0, True)
    """
    x = np.asarray(values, dtype=np.float64)
    half = _half_width(x, level)
    mean = float(x.mean())
    return Estimate(mean, mean - half, mean + half)


def _half_width(x: Array, level: float) -> float:
    count = min(BATCHES, x.size // 2)
    if count < 2:
        return math.inf
    size = x.size // count
    means = x[x.size - count * size :].reshape(count, size).mean(axis=1)  # what is left over goes from the start
    spread = means - means.mean()
    square = float(spread @ spread)
    if square == 0.0:
        return 0.0
    rho = min(max(float(spread[1:] @ spread[:-1]) / square, 0.0), 0.9)
    error = math.sqrt(square / (count - 1) / count * (1 + rho) / (1 - rho))
    return float(stdtrit(count - 1, 0.5 + level / 2)) * error


def quantile_interval(values: ArrayLike, probability: float, level: float = LEVEL) -> Estimate:
    r"""Return a quantile of a correlated series and its interval from the order statistics.

    The share of values up to the estimate is itself a mean, of indicators in the order of arrival; its half width h by
    batch means carries their correlation. The interval is the quantiles at :math:`p \pm h`. Where p + h passes 1 the
    largest value bounds nothing, and the end is infinite. The half width is never below that of independent values.

    Source
    ------
    Woodruff (1952), Journal of the American Statistical Association 47:635-646, with the variance of
    :func:`mean_interval`.

    Examples
    --------
    >>> quantile_interval(np.arange(101.0), 0.5).value
    50.0
    """
    x = np.asarray(values, dtype=np.float64)
    value = float(np.quantile(x, probability))
    independent = float(stdtrit(1e6, 0.5 + level / 2)) * math.sqrt(probability * (1 - probability) / x.size)
    half = max(_half_width((x <= value).astype(np.float64), level), independent)
    low = float(np.quantile(x, probability - half)) if half < probability else -math.inf
    high = float(np.quantile(x, probability + half)) if probability + half < 1 else math.inf
    return Estimate(value, low, high)

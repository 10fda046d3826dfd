"""Records to figures: TTFT, TPOT, E2E, speed, goodput, occupancy, acceptance, each with an interval, and a status.

Warm-up is removed by a fixed rule, :func:`warmup_requests`. A rule that reads the noise (MSER-5, White
1997) was tried: it biases the mean of a stationary queue low and lowered the coverage of the intervals from 95 to 89 %
(M/M/4 at load 0.7).
Intervals of one run are by batch means, widened by the correlation that is left between batches; a time average is
batched over equal slices of the measured span. Those of several independent runs are Student's: :func:`replicated`.
An overloaded run has no interval on what grows with its length: TTFT, E2E and the line of those who wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
SLICES = 2 * BATCHES  # equal parts of the measured span, for time averages [-]
PROBABILITIES = (0.5, 0.9, 0.95, 0.99)  # of the percentiles reported [-]


class Estimate(NamedTuple):
    """A figure and its interval; an end the data cannot bound is infinite [that of the figure]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The distribution of a figure over requests [that of the figure]."""

    mean: Estimate
    p50: Estimate
    p90: Estimate
    p95: Estimate
    p99: Estimate
    count: int  # requests [-]
    diverges: bool = False  # grows with the length of the run: no interval holds what a longer one would show


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
    """One run of a tier. Of an overloaded one TTFT, E2E and the line grow with its length: read ``status`` first."""

    status: Status
    requests: int  # in the run [-]
    warmup: int  # served, but left out [-]
    refused: int  # larger than the KV cache [-]
    ttft_s: Summary
    tpot_s: Summary  # over the tokens after the first; requests of one token have none [s/token]
    e2e_s: Summary
    user_speed: Summary  # (tokens - 1) / (E2E - TTFT) [token/s]
    requests_per_s: Estimate  # completions in the measured span [request/s]
    tokens_per_s: Estimate  # output tokens of those requests [token/s]
    good: Estimate  # share of requests that keep the SLO; a refused request does not [-]
    goodput: Estimate  # good requests [request/s]
    batch: Estimate  # decoding sequences of a replica, time average over the measured span [-]
    waiting: Estimate  # requests not admitted yet, of a replica, time average over the measured span [-]
    utilisation: Estimate  # busy share of the time from first arrival to last completion [-]
    kv_peak: float  # largest share of a replica's KV blocks ever reserved [-]
    found: Estimate  # share of prompt tokens that needed no computing when their request was first admitted [-]
    acceptance: Estimate  # accepted / drafted: the accepted fraction; nan without drafts [-]
    tokens_per_round: Estimate  # tokens past the first / rounds, by requests; nan if nobody decoded [tokens]
    rounds: Estimate  # decode rounds of a request [-]
    preemptions: Estimate  # of a request [-]
    service_s: Estimate  # a request's share of the busy time of its replica [s]


def measure(
    records: Records, slo: Slo | None = None, warmup: int | None = None, kept: NDArray[np.bool_] | None = None
) -> Metrics:
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
    kept : array of bool, optional
        Which requests to measure, in the place of ``warmup``: for a tier, those that are past the warm-up of the
        whole system.

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
    conserved(records)
    who = _measured(records, warmup) if kept is None else np.flatnonzero(kept & ~records.refused)
    require(who.size > 0, "kept", "must leave a request that was served", int(who.size))
    overloaded = status(records) == "overloaded"
    ttft, e2e, decode = (
        (end - start)[who]
        for start, end in (
            (records.arrival, records.first_token),
            (records.arrival, records.completion),
            (records.first_token, records.completion),
        )
    )
    tokens, rounds = records.output[who] - 1, records.rounds[who]
    tpot = decode[tokens > 0] / tokens[tokens > 0]
    edges = slices(records.arrival, records.completion, who, records.closed)
    rate = time_mean(rates(records.completion, edges), who.size)
    good = share_interval(_good(slo or Slo(), ttft, decode / np.maximum(tokens, 1), e2e))
    late = np.flatnonzero(records.refused & (records.arrival >= records.arrival[who[0]])).size
    batch = present(records.first_token, records.completion, edges) / records.replicas
    line = time_mean(present(records.arrival, records.admitted, edges) / records.replicas, who.size)
    return Metrics(
        status="overloaded" if overloaded else "steady",
        requests=records.arrival.size,
        warmup=int(np.count_nonzero(~records.refused)) - who.size,
        refused=int(records.refused.sum()),
        ttft_s=summary(ttft, diverges=overloaded),
        tpot_s=summary(tpot),
        e2e_s=summary(e2e, diverges=overloaded),
        user_speed=summary(1.0 / tpot),
        requests_per_s=rate,
        tokens_per_s=scaled(rate, float(records.output[who].mean())),
        good=scaled(good, who.size / (who.size + late)),
        goodput=product(rate, good),
        batch=time_mean(batch, who.size),
        waiting=without_interval(line) if overloaded else line,
        utilisation=utilisation(records, edges),
        kv_peak=records.kv_peak_tokens / records.kv_tokens,
        found=as_share(ratio_interval(records.found[who], records.prompt[who])),
        acceptance=ratio_interval(records.accepted[who], records.drafted[who]),
        tokens_per_round=ratio_interval(tokens, rounds),
        rounds=mean_interval(rounds),
        preemptions=mean_interval(records.preemptions[who]),
        service_s=mean_interval(records.service_s[who]),
    )


def conserved(records: Records) -> None:
    """Check what holds on every run: who arrived completed or was refused, every token asked for came, KV fitted.

    Tokens are counted twice, as outputs and by rounds: a request emits one with each prefill it completes (at most one
    more than it was preempted), one in each round, and its accepted drafts, of which the last round may have some too
    many. Busy time is what its requests used.

    Raises
    ------
    RuntimeError
        If it does not: a defect of the engine, never of the input.
    """
    done = np.isfinite(records.completion)
    beyond = (records.rounds + records.accepted - (records.output - 1))[done]
    kept = (
        bool(np.array_equal(done, ~records.refused))
        and records.emitted == int(records.output[done].sum())
        and bool(np.all(beyond >= -records.preemptions[done]) and np.all(beyond <= records.accepted[done]))
        and records.kv_peak_tokens <= records.kv_tokens
        and math.isclose(records.busy_s, float(records.service_s.sum()), rel_tol=1e-6, abs_tol=1e-9)
    )
    if not kept:
        raise RuntimeError("the engine lost requests, tokens, KV blocks or time: this is a defect, please report it")


def _good(slo: Slo, ttft: Array, tpot: Array, e2e: Array) -> Array:
    return ((ttft <= slo.ttft_s) & (tpot <= slo.tpot_s) & (e2e <= slo.e2e_s)).astype(np.float64)


def _measured(records: Records, warmup: int | None) -> NDArray[np.intp]:
    """Return the requests served after the warm-up."""
    served = np.flatnonzero(~records.refused)
    require(served.size > 0, "records", "must hold a request that was served", int(served.size))
    if warmup is None:
        e2e = (records.completion - records.arrival)[served]
        warmup = 0 if records.closed else warmup_requests(records.arrival[served], e2e)
    require(warmup < served.size, "warmup", f"must be below the {served.size} requests served", warmup)
    return served[warmup:]


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


def slices(arrival: Array, completion: Array, kept: NDArray[np.intp], closed: bool) -> Array:
    """Return the edges of equal slices of the measured span: kept arrivals in an open loop, all in a closed or a burst.

    Examples
    --------
    >>> slices(np.arange(9.0), np.arange(9.0) + 5.0, np.arange(1, 9), closed=False)[[0, -1]].tolist()
    [1.0, 8.0]
    """
    start, last = float(arrival[kept[0]]), float(arrival[kept[-1]])
    return np.linspace(start, float(np.nanmax(completion)) if closed or last <= start else last, SLICES + 1)


def utilisation(records: Records, edges: Array) -> Estimate:
    """Return the busy share of the replicas' time from first arrival to last completion [-].

    The share is exact. Its interval is from slices, over which the service of each request is spread evenly between
    its admission and its completion.
    """
    share = records.busy_s / records.replicas / max(records.end_s - float(records.arrival[0]), 1e-300)
    value = min(share, 1.0)  # sums of step times may pass their span by a rounding
    stay = np.maximum(records.completion - records.admitted, 1e-300)
    busy = present(records.admitted, records.completion, edges, records.service_s / stay) / records.replicas
    half = time_mean(busy, records.arrival.size)
    return Estimate(value, max(value - (half.high - half.value), 0.0), min(value + (half.high - half.value), 1.0))


# ---------------------------------------------------------------------------------------------------------------------
# Over time
# ---------------------------------------------------------------------------------------------------------------------


def present(begin: Array, end: Array, edges: Array, weight: Array | None = None) -> Array:
    r"""Return the mean number present in each slice of time, i present from begin to end, nan never [-].

    .. math:: \frac{1}{t_{j+1} - t_j} \int_{t_j}^{t_{j+1}} \sum_i w_i 1(b_i \le t < e_i)\,dt

    Examples
    --------
    >>> present(np.array([0.0, 1.0]), np.array([2.0, 1.5]), np.array([0.0, 1.0, 2.0])).tolist()
    [1.0, 1.5]
    """
    known = np.isfinite(begin) & np.isfinite(end)
    w = np.ones(int(known.sum())) if weight is None else weight[known]
    area = _area(begin[known], w, edges) - _area(end[known], w, edges)
    return np.asarray(np.diff(area) / np.diff(edges))


def _area(events: Array, weight: Array, at: Array) -> Array:
    """Return the integral up to each time of the weight of the events so far."""
    order = np.argsort(events, kind="stable")
    passed = np.searchsorted(events[order], at, side="right")
    start = float(at[0])  # times from here on: keeps the digits of late runs
    mass = np.concatenate([[0.0], np.cumsum(weight[order])])
    moment = np.concatenate([[0.0], np.cumsum(weight[order] * (events[order] - start))])
    return np.asarray((at - start) * mass[passed] - moment[passed])


def rates(events: Array, edges: Array) -> Array:
    """Return events per second in each slice of time; what is nan did not happen [1/s]."""
    counts = np.diff(np.searchsorted(np.sort(events[np.isfinite(events)]), edges, side="right"))
    return np.asarray(counts / np.diff(edges))


def time_mean(levels: Array, requests: int) -> Estimate:
    """Return the mean over equal slices of time; no interval without a request a slice [that of them]."""
    estimate = mean_interval(levels)
    return estimate if requests >= levels.size else without_interval(estimate)


# ---------------------------------------------------------------------------------------------------------------------
# Estimators
# ---------------------------------------------------------------------------------------------------------------------


UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def summary(values: ArrayLike, diverges: bool = False) -> Summary:
    """Return mean and percentiles, with intervals, of values in the order of arrival (all nan if there is none).

    Examples
    --------
    >>> summary([1.0, 2.0, 4.0]).p50.value
    2.0
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        return Summary(UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, 0, diverges)
    return _summary([mean_interval(x), *(quantile_interval(x, p) for p in PROBABILITIES)], x.size, diverges)


def _summary(estimates: Sequence[Estimate], count: int, diverges: bool) -> Summary:
    mean, p50, p90, p95, p99 = (without_interval(e) for e in estimates) if diverges else estimates
    return Summary(mean, p50, p90, p95, p99, count, diverges)


UNMEASURED = Metrics(
    "steady",
    *(0, 0, 0),
    *(summary([]),) * 4,
    *(UNKNOWN,) * 7,
    0.0,
    *(UNKNOWN,) * 6,
)  # of a tier that nobody visited


def without_interval(estimate: Estimate) -> Estimate:
    """Return the value with nothing known about how far it is off [its own]."""
    return Estimate(estimate.value, -math.inf, math.inf)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """Return an estimate times a number of at least 0 [of the product]."""
    return Estimate(*(factor * x for x in estimate))


def product(a: Estimate, b: Estimate) -> Estimate:
    """Return the product of two estimates of at least 0, of their ends its ends: it covers more [of the product]."""
    low = max(a.low, 0.0) * max(b.low, 0.0)
    return Estimate(a.value * b.value, low, a.high * b.high)


def replicated(values: ArrayLike, level: float = LEVEL) -> Estimate:
    r"""Return the mean of independent replications and its interval.

    .. math:: \bar x \pm t_{n-1,\,(1 + p)/2}\, s / \sqrt n

    over the n replications that have the value; with one there is no interval.

    Source
    ------
    Law (2015), Simulation Modeling and Analysis, section 9.5.2, replication/deletion.

    Examples
    --------
    >>> [round(x, 3) for x in replicated([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    x = np.asarray(values, dtype=np.float64)
    x = x[np.isfinite(x)]
    if x.size == 0:
        return UNKNOWN
    mean = float(x.mean())
    if x.size == 1:
        return Estimate(mean, -math.inf, math.inf)
    half = float(stdtrit(x.size - 1, 0.5 + level / 2)) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Estimate(mean, mean - half, mean + half)


def replicated_summary(runs: Sequence[Summary]) -> Summary:
    """Return the mean over independent replications of each figure, percentiles included."""
    values = [[run.mean, run.p50, run.p90, run.p95, run.p99] for run in runs]
    estimates = [replicated([e.value for e in same]) for same in zip(*values, strict=True)]
    return _summary(estimates, sum(run.count for run in runs), any(run.diverges for run in runs))


def ratio_interval(numerator: ArrayLike, denominator: ArrayLike) -> Estimate:
    r"""Return a ratio of sums, :math:`r = \sum y / \sum x`, and its interval; nan if x is all 0 [of y / x].

    The half width is that of the mean of :math:`(y - r x) / \bar x` (delta method: Cochran 1977, Sampling Techniques,
    equation 6.12).

    Examples
    --------
    >>> ratio_interval(np.tile([1.0, 3.0], 50), np.tile([2.0, 4.0], 50)).value
    0.6666666666666666
    """
    y, x = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if not x.any():
        return UNKNOWN
    value = float(y.sum() / x.sum())
    half = _half_width((y - value * x) / x.mean(), LEVEL)
    return Estimate(value, value - half, value + half)


def mean_interval(values: ArrayLike, level: float = LEVEL) -> Estimate:
    r"""Return the mean of a correlated series and its interval by batch means [that of the values].

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


def share_interval(hits: ArrayLike) -> Estimate:
    """Return a share and its interval by batch means, kept within 0 and 1.

    Examples
    --------
    >>> share_interval([True, True, False, True]).high
    1.0
    """
    return as_share(mean_interval(hits))


def as_share(estimate: Estimate) -> Estimate:
    """Return an estimate with its interval cut to [0, 1]; where nothing is known of it, nothing is [-]."""
    value, low, high = estimate
    return Estimate(value, max(low, 0.0), min(high, 1.0)) if math.isfinite(high - low) else estimate


def quantile_interval(values: ArrayLike, probability: float, level: float = LEVEL) -> Estimate:
    r"""Return a quantile of a correlated series and its interval from order statistics [that of the values].

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

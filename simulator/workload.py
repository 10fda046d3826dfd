"""What arrives: request times, prompt and output lengths, drawn from laws. Traces are read in :mod:`.traces`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, ndtr, ndtri

from theory.errors import refuse, require

from .prefixes import PromptBlocks

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Requests in the order of arrival; the arrays are copied and made read-only.

    With ``clients`` > 0 it is a closed loop: arrival times are ignored, each client keeps one request in flight and
    sends the next one of the list ``think_time`` after its previous one completes; see :class:`ClosedLoop`.

    Raises
    ------
    InputError
        If there is no request, lengths differ, an arrival is not finite, negative or out of order, a prompt or an
        output is not a whole number of at least 1 (an engine computes at least one token and emits at least one), a
        think time is not finite or negative, not fewer tokens are cached than the prompt has, or a prompt has fewer
        blocks than are named; the row is named.

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
    think_time: float | Floats = 0.0  # closed loop: pause before a request, see ``pauses``; one for all or (n,) [s]
    cached: Ints | None = (
        None  # prompt tokens whose keys and values are at hand and need no computing; None: 0 [tokens]
    )
    blocks: PromptBlocks | None = None  # by which an engine finds what prompts share in its KV cache; None: nothing

    def __init__(
        self,
        arrival: ArrayLike,
        prompt: ArrayLike,
        output: ArrayLike,
        source: str = "",
        clients: int = 0,
        think_time: float | ArrayLike = 0.0,
        cached: ArrayLike | None = None,
        blocks: PromptBlocks | None = None,
    ) -> None:
        set_field = object.__setattr__
        set_field(self, "arrival", _arrivals(arrival))
        set_field(self, "prompt", _tokens("prompt", prompt))
        set_field(self, "output", _tokens("output", output))
        set_field(self, "source", source)
        set_field(self, "clients", clients)
        set_field(self, "think_time", _think_time(think_time))
        sizes = (self.arrival.size, self.prompt.size, self.output.size)
        require(len(set(sizes)) == 1, "workload", "must have as many arrivals as prompts and outputs", sizes)
        require(sizes[0] > 0, "workload", "must hold at least one request", sizes[0])
        _check_clients(clients)
        rule = "must be one number or one per request [s]"
        require(np.size(self.think_time) in (1, sizes[0]), "think_time", rule, np.size(self.think_time))
        set_field(self, "cached", None if cached is None else _cached(cached, self.prompt))
        set_field(self, "blocks", blocks)
        if blocks is not None:
            blocks.check(self.prompt)

    def take(self, who: slice | NDArray[Any], **other: Any) -> Workload:
        """Return some of the requests, in the order of ``who``, with ``other`` fields in place of their own.

        Examples
        --------
        >>> Workload([0.0, 0.5], [100, 200], [10, 30]).take(slice(1), output=[7]).output.tolist()
        [7]
        """
        rows = np.arange(self.requests)[who]
        own: dict[str, Any] = {name: getattr(self, name)[rows] for name in ("arrival", "prompt", "output")}
        for name in ("think_time", "cached"):
            values = getattr(self, name)
            own[name] = values[rows] if isinstance(values, np.ndarray) else values
        own["blocks"] = None if self.blocks is None else self.blocks.take(rows)
        return replace(self, **(own | other))

    @property
    def at_hand(self) -> Ints:
        """Prompt tokens that need no computing if nothing is forgotten: cached, or in blocks seen before [tokens]."""
        cached = np.zeros_like(self.prompt) if self.cached is None else self.cached
        return cached if self.blocks is None else np.maximum(cached, self.blocks.seen_before(self.prompt))

    @property
    def pauses(self) -> Floats:
        """Pause before each request of a closed loop, (n,) [s].

        The first ``clients`` count from the start, the others from the completion that sets their client free. A think
        time of one number is the pause of those others: all clients start at once.
        """
        if isinstance(self.think_time, np.ndarray):
            return self.think_time
        return np.where(np.arange(self.requests) < self.clients, 0.0, self.think_time)

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
        """Mean arrival rate of an open loop, (n - 1) / (last - first) [request/s].

        Raises
        ------
        InputError
            If the loop is closed, or all requests arrive at once.
        """
        require(self.clients == 0, "rate", "is given by the system in a closed loop, not by the workload", self.clients)
        span = float(self.arrival[-1] - self.arrival[0])
        require(span > 0, "rate", "needs at least two different arrival times [s]", span)
        return (self.requests - 1) / span


def _check_clients(clients: int) -> None:
    ok = isinstance(clients, int) and not isinstance(clients, bool) and clients >= 0
    require(ok, "clients", "must be an integer of at least 0 [-]", clients, "0 is an open loop.")


def _think_time(values: float | ArrayLike) -> float | Floats:
    array = np.array(values, dtype=np.float64, ndmin=1)
    bad = ~(np.isfinite(array) & (array >= 0))
    if np.ndim(values) == 0:
        require(not bad[0], "think_time", "must be finite and at least 0 [s]", values)
        return float(array[0])
    _refuse_first(bad, "think_time", "must be finite and at least 0 [s]", array)
    array.flags.writeable = False
    return array


def _cached(values: ArrayLike, prompt: Ints) -> Ints:
    array = np.array(values, dtype=np.float64, ndmin=1)
    require(array.shape == prompt.shape, "cached", "must have one value per request [tokens]", array.shape)
    bad = ~((array >= 0) & (array < prompt) & (array == np.floor(array)))
    rule = "must be a whole number of at least 0 and below the prompt, whose last token is always computed [tokens]"
    _refuse_first(bad, "cached", rule, array)
    tokens = array.astype(np.int64)
    tokens.flags.writeable = False
    return tokens


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
    _refuse_first(array >= 2.0**53, name, "must be less than 2^53 [tokens]", array)
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
    _check_renewal(rate, cv, n)
    gaps = np.full(n, 1.0) if cv == 0 else rng.gamma(1.0 / cv**2, cv**2, n)
    return np.asarray(np.cumsum(gaps) / rate)


def weibull(rate: float, cv: float, n: int, rng: np.random.Generator) -> Floats:
    r"""Return ``n`` arrival times with Weibull-distributed gaps [s].

    .. math:: P(\Delta > t) = e^{-(t / \theta)^k},\quad \theta = \frac{1}{r\,\Gamma(1 + 1/k)}

    with the shape k of :func:`weibull_shape`. At the same ``cv`` its tail is heavier than the gamma law's above 1.

    Raises
    ------
    InputError
        If the rate [request/s] is not above 0, ``cv`` [-] is neither 0 nor in [0.0001, 1000], or ``n`` is below 1.

    Source
    ------
    Johnson, Kotz & Balakrishnan (1994), Continuous Univariate Distributions 1, ch. 21. Arrivals at LLM services:
    Xiang et al. (2025), ServeGen, arXiv:2505.09999, who find gamma or Weibull gaps by service.

    Examples
    --------
    >>> weibull(2.0, 0.0, 3, np.random.default_rng(0)).tolist()
    [0.5, 1.0, 1.5]
    """
    _check_renewal(rate, cv, n)
    power = 0.0 if cv == 0 else 1 / weibull_shape(cv)
    gaps = np.exp(power * np.log(rng.standard_exponential(n)) - gammaln(1 + power))
    return np.asarray(np.cumsum(gaps) / rate)


def weibull_shape(cv: float) -> float:
    r"""Return the shape k of the Weibull law whose coefficient of variation is ``cv`` [-].

    .. math:: 1 + c_v^2 = \frac{\Gamma(1 + 2/k)}{\Gamma(1 + 1/k)^2}

    The right side falls from infinity to 1 as k rises, so there is one root; cv = 1 is k = 1, the exponential law.

    Raises
    ------
    InputError
        If ``cv`` does not lie in [0.0001, 1000]: rounding would show below.

    Source
    ------
    The first two moments: Johnson, Kotz & Balakrishnan (1994), Continuous Univariate Distributions 1, ch. 21.

    Examples
    --------
    >>> round(weibull_shape(1.0), 9), round(weibull_shape(5**0.5), 9)
    (1.0, 0.5)
    """
    rule = "must be 0 or lie in [0.0001, 1000] for a Weibull law [-]"
    require(1e-4 <= cv <= 1000, "cv", rule, cv, "0 is a clock, 1 a Poisson process.")

    def excess(log_power: float) -> float:
        power = math.exp(log_power)
        return float(gammaln(1 + 2 * power) - 2 * gammaln(1 + power) - math.log1p(cv**2))

    # for a small 1/k the left side is (pi/k)^2 / 6 to first order; 1/k = 12 is cv = 1644
    least = math.log(min(cv, 1.0) / 10)
    from scipy.optimize import brentq

    return math.exp(-brentq(excess, least, math.log(12.0), xtol=1e-14, rtol=1e-14))


def _check_renewal(rate: float, cv: float, n: int) -> None:
    _check_rate(rate)
    require(math.isfinite(cv) and cv >= 0, "cv", "must be finite and at least 0 [-]", cv, "1 is a Poisson process.")
    require(n >= 1, "requests", "must be at least 1 [-]", n)


def _check_rate(rate: float) -> None:
    require(math.isfinite(rate) and rate > 0, "rate", "must be finite and above 0 [request/s]", rate)


@dataclass(frozen=True, slots=True)
class PiecewiseRates:
    """A rate of arrivals that is constant on pieces of time: a day by the hour.

    Raises
    ------
    InputError
        If there is no piece, rates and durations differ in number, a rate is negative or a duration not above 0, or
        all rates are 0.

    Examples
    --------
    >>> PiecewiseRates((1.0, 4.0), (20.0, 10.0)).mean
    2.0
    """

    rates: tuple[float, ...]  # of each piece [request/s]
    durations: tuple[float, ...]  # of each piece [s]
    repeat: bool = True  # begin again at the end, instead of stopping there

    def __post_init__(self) -> None:
        sizes = (len(self.rates), len(self.durations))
        require(0 < sizes[0] == sizes[1], "rates", "must be at least one, with as many durations", sizes)
        good = all(math.isfinite(r) and r >= 0 for r in self.rates) and any(r > 0 for r in self.rates)
        require(good, "rates", "must be finite, at least 0 and not all 0 [request/s]", self.rates)
        good = all(math.isfinite(d) and d > 0 for d in self.durations)
        require(good, "durations", "must be finite and above 0 [s]", self.durations)

    @property
    def mean(self) -> float:
        """Mean rate over the pieces [request/s]."""
        return float(np.dot(self.rates, self.durations) / sum(self.durations))

    def at(self, rate: float) -> PiecewiseRates:
        """Return the same shape with another mean rate [request/s]; the durations stay."""
        _check_rate(rate)
        return PiecewiseRates(tuple(r * rate / self.mean for r in self.rates), self.durations, self.repeat)


def piecewise(law: PiecewiseRates, n: int, rng: np.random.Generator) -> Floats:
    r"""Return at most ``n`` arrival times of a Poisson process whose rate is piecewise constant [s].

    .. math:: t_i = \Lambda^{-1}(S_i),\quad \Lambda(t) = \int_0^t r(u)\,du,\quad S_i = E_1 + \ldots + E_i

    with independent standard exponential E: a change of time, exact, without thinning. Within a piece that begins at
    :math:`b_j`, :math:`\Lambda^{-1}(s) = b_j + (s - \Lambda(b_j)) / r_j`. When the pieces repeat there are ``n``
    arrivals; when they stop, those before their end, and at most ``n``.

    Raises
    ------
    InputError
        If ``n`` is not at least 1, or no request arrives before the end of pieces that do not repeat.

    Source
    ------
    Cinlar (1975), Introduction to Stochastic Processes, ch. 4, section 7; Lewis & Shedler (1979), Naval Research
    Logistics Quarterly 26, section 1.

    Examples
    --------
    >>> night = PiecewiseRates((0.0, 5.0), (100.0, 50.0))
    >>> bool((piecewise(night, 200, np.random.default_rng(0)) % 150 >= 100).all())
    True
    """
    require(n >= 1, "requests", "must be at least 1 [-]", n)
    begin = np.concatenate([[0.0], np.cumsum(law.durations)])
    mass = np.concatenate([[0.0], np.cumsum(np.multiply(law.rates, law.durations))])  # Lambda where pieces begin
    total = np.cumsum(rng.standard_exponential(n))
    if not law.repeat:
        total = total[total < mass[-1]]
        require(total.size > 0, "rates", "must let a request arrive before they end", law.rates, "Let them repeat.")
    round_, rest = np.divmod(total, mass[-1])
    piece = np.minimum(np.searchsorted(mass, rest, side="right") - 1, len(law.rates) - 1)
    within = (rest - mass[piece]) / np.asarray(law.rates)[piece]
    return np.asarray(round_ * begin[-1] + begin[piece] + within)


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
    """A fixed number of clients, each with one request in flight: the protocol of serving benchmarks.

    All clients start at once, or spread evenly over ``start_over``. The requests are one queue: a client that is free
    takes the next one, as under ``vllm bench serve --max-concurrency``. With a list of N requests for each client
    instead, independent lengths make the same process in law until the first client has finished its list; from then
    on clients drop out one by one, while the shared queue keeps all of them busy to its end. The two are the same
    throughout only if all clients finish together, as with equal lengths.

    Raises
    ------
    InputError
        If there is no client or no request, or a time is negative or not finite.

    Source
    ------
    Closed and open loops: Schroeder, Wierman & Harchol-Balter (2006), Open Versus Closed, NSDI, section 2.
    """

    clients: int  # requests in flight [-]
    requests: int  # over all clients [-]
    think_time: float = 0.0  # mean, from a completion to the next request of the client [s]
    exponential: bool = False  # exponential think times, instead of equal ones
    start_over: float = 0.0  # client i of c sends its first request at i / c of this time [s]

    def __post_init__(self) -> None:
        _check_clients(self.clients)
        require(self.clients >= 1, "clients", "must be at least 1 in a closed loop [-]", self.clients)
        require(self.requests >= 1, "requests", "must be at least 1 [-]", self.requests)
        for name in ("think_time", "start_over"):
            time = getattr(self, name)
            require(math.isfinite(time) and time >= 0, name, "must be finite and at least 0 [s]", time)


def closed_loop(spec: ClosedLoop, prompt: Lengths, output: Lengths, rng: np.random.Generator) -> Workload:
    """Return the requests of a closed loop, lengths independent; their arrival times are not used.

    Examples
    --------
    >>> closed_loop(ClosedLoop(2, 5), FixedLengths(10), FixedLengths(5), np.random.default_rng(0)).clients
    2
    """
    drawn = open_loop(np.zeros(spec.requests), prompt, output, rng)
    return in_closed_loop(drawn, spec, rng)


def in_closed_loop(workload: Workload, spec: ClosedLoop, rng: np.random.Generator) -> Workload:
    """Return the first requests of a workload, in their order, as clients send them.

    Raises
    ------
    InputError
        If the workload has fewer requests than the loop sends.

    Examples
    --------
    >>> served = Workload([0.0, 1.0, 2.0], [10, 20, 30], [5, 5, 5])
    >>> in_closed_loop(served, ClosedLoop(2, 3, 1.5, start_over=4.0), np.random.default_rng(0)).pauses.tolist()
    [0.0, 2.0, 1.5]
    """
    n, first = spec.requests, min(spec.clients, spec.requests)
    require(n <= workload.requests, "requests", f"must be at most the {workload.requests} of the workload [-]", n)
    think: float | Floats = spec.think_time
    if spec.exponential or spec.start_over > 0:
        later = rng.exponential(spec.think_time, n) if spec.exponential else np.full(n, spec.think_time)
        think = np.concatenate([spec.start_over * np.arange(first) / spec.clients, later[first:]])
    source = f"{workload.source}; {spec}".lstrip("; ")
    return workload.take(slice(n), arrival=np.zeros(n), source=source, clients=spec.clients, think_time=think)


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
    _check_rate(rate)
    rule = "must span a time in which a rate can be told [request/s]"
    require(math.isfinite(workload.rate), "arrival", rule, workload.rate)
    source = f"{workload.source}, stretched to {rate:g} request/s".lstrip(", ")
    return replace(workload, arrival=workload.arrival * (workload.rate / rate), source=source)


def repeated(workload: Workload, times: int, rng: np.random.Generator) -> Workload:
    """Return an open loop that goes on ``times`` times as long: the same gaps again, lengths dealt out anew each time.

    Raises
    ------
    InputError
        If ``times`` is not at least 1, or it is a closed loop.

    Examples
    --------
    >>> w = repeated(Workload([0.0, 1.0], [7, 7], [3, 3]), 2, np.random.default_rng(0))
    >>> w.arrival.tolist(), w.rate
    ([0.0, 1.0, 2.0, 3.0], 1.0)
    """
    require(times >= 1, "times", "must be at least 1 [-]", times)
    w, n = workload, workload.requests
    begin = np.repeat(np.arange(times) * (n / w.rate), n)
    who = np.concatenate([np.arange(n), *(rng.permutation(n) for _ in range(times - 1))])
    return w.take(who, arrival=np.tile(w.arrival, times) + begin)


def with_cached(workload: Workload, share: float) -> Workload:
    """Return the workload with that share of each prompt cached, rounded down, its last token never.

    Raises
    ------
    InputError
        If the share is outside [0, 1].

    Examples
    --------
    >>> with_cached(Workload([0.0, 1.0], [10, 1], [5, 5]), 0.75).cached.tolist()
    [7, 0]
    """
    require(0.0 <= share <= 1.0, "cached_prompt_share", "must lie in [0, 1] [-]", share, "Pass 0.5, not 50.")
    w = workload
    cached = np.minimum(np.floor(share * w.prompt), w.prompt - 1)
    return replace(w, cached=cached, source=f"{w.source}; {share:g} of each prompt cached".lstrip("; "))

"""Speculative decoding: tokens per round, speed-up, best draft length, and how both change with the batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import require

Array = NDArray[np.float64]
NEWTON_STEPS = 60  # far more than the handful that are needed; a bound, not a tolerance


class LengthLaw(Protocol):
    """How many drafted tokens of a round are accepted; the laws are in :mod:`theory.acceptance`."""

    def survival(self, length: int) -> Array:
        """Return P(accepted >= i) for i = 0 .. ``length``, shape (length + 1,) [-]."""
        ...


def tokens_per_round(acceptance: ArrayLike, length: ArrayLike) -> Array:
    r"""Return the mean number of tokens one draft-and-verify round emits, the bonus token included.

    .. math:: E[N] = \sum_{i=0}^{\gamma} \alpha^i = \frac{1 - \alpha^{\gamma+1}}{1 - \alpha}

    Parameters
    ----------
    acceptance : array_like
        alpha_iid [-].
    length : array_like
        Draft length gamma [tokens]; broadcast against ``acceptance``.

    Returns
    -------
    ndarray
        Between 1 and gamma + 1 [tokens/round].

    Raises
    ------
    InputError
        If an acceptance is outside [0, 1] or a length negative.

    Assumes
    -------
    Acceptances are independent with one common probability.

    Source
    ------
    Leviathan, Kalman & Matias (2023), arXiv:2211.17192, eq. (1).

    Examples
    --------
    >>> round(float(tokens_per_round(0.8, 4)), 4)
    3.3616
    """
    a, g = _checked(acceptance, length)
    with np.errstate(divide="ignore", invalid="ignore"):
        # expm1 and log1p keep the ratio exact to rounding where alpha is close to 1
        geometric = -np.expm1((g + 1) * np.log(a)) / -np.expm1(np.log(a))
    return np.where(a == 0.0, 1.0, np.where(a == 1.0, g + 1.0, geometric))


def tokens_variance(acceptance: ArrayLike, length: ArrayLike) -> Array:
    r"""Return the variance of the tokens of one round [tokens^2].

    .. math:: \mathrm{Var}[N] = \sum_{i=0}^{\gamma} (2 i + 1) \alpha^i - E[N]^2

    Source
    ------
    Derivation from :math:`P(N > i) = \alpha^i` for :math:`i \le \gamma` (the capped geometric law of
    :func:`tokens_per_round`) and :math:`E[N^2] = \sum_i (2 i + 1) P(N > i)`.

    Examples
    --------
    >>> round(float(tokens_variance(0.5, 1)), 4)
    0.25
    """
    a, g = np.broadcast_arrays(*_checked(acceptance, length))
    i = np.arange(int(g.max(initial=0)) + 1, dtype=float)
    terms = (2 * i + 1) * a[..., None] ** i * (i <= g[..., None])
    return np.asarray(terms.sum(axis=-1) - tokens_per_round(a, g) ** 2)


def speedup(
    acceptance: ArrayLike,
    length: ArrayLike,
    *,
    target: ArrayLike,
    verify: ArrayLike,
    draft: ArrayLike,
    overhead: ArrayLike = 0.0,
) -> Array:
    r"""Return how many times faster speculation emits tokens than plain decoding.

    .. math:: S = \frac{E[N]\; T_T}{\gamma\, T_D + T_V + T_o}

    Parameters
    ----------
    acceptance, length : array_like
        alpha_iid [-] and gamma [tokens].
    target : array_like
        T_T, one plain decode step of the target [s].
    verify : array_like
        T_V, the target's pass over gamma + 1 tokens a sequence [s].
    draft : array_like
        T_D, one decode step of the draft [s].
    overhead : array_like
        T_o, what a round takes besides (sampling, accept and reject) [s].

    Returns
    -------
    ndarray
        Speed-up [-]; all arguments broadcast.

    Raises
    ------
    InputError
        If a time is not above 0 (draft and overhead: below 0).

    Source
    ------
    Leviathan et al. (2023), theorem 3.8, with T_V apart from T_T.

    Examples
    --------
    >>> round(float(speedup(0.8, 8, target=1.0, verify=1.0, draft=0.05)), 2)
    3.09
    """
    t, v, d, o = (np.asarray(x, dtype=float) for x in (target, verify, draft, overhead))
    require(bool(np.all(t > 0)), "target", "must be above 0 [s]", target)
    require(bool(np.all(v > 0)), "verify", "must be above 0 [s]", verify)
    require(bool(np.all(d >= 0)), "draft", "must be at least 0 [s]", draft)
    require(bool(np.all(o >= 0)), "overhead", "must be at least 0 [s]", overhead)
    return np.asarray(tokens_per_round(acceptance, length) * t / (np.asarray(length, dtype=float) * d + v + o))


def mean_tokens(law: float | LengthLaw, length: int) -> float:
    r"""Return the mean tokens of a round for any law of accepted tokens [tokens/round].

    .. math:: E[N] = \sum_{i=0}^{\gamma} P(\text{accepted} \ge i)

    Parameters
    ----------
    law : float or LengthLaw
        alpha_iid, or a law with a ``survival`` (by position, mixed over requests, measured).
    length : int
        Draft length gamma [tokens].

    Source
    ------
    Derivation: N = 1 + accepted, and the mean of a count is the sum of its survival function. With
    :math:`P = \prod_j a_j` this is the positional form used for EAGLE-type drafts.

    Examples
    --------
    >>> round(mean_tokens(0.8, 4), 4)
    3.3616
    """
    return float(_survival(law, length).sum())


def variance_tokens(law: float | LengthLaw, length: int) -> float:
    r"""Return the variance of the tokens of a round for any law of accepted tokens [tokens^2].

    .. math:: \mathrm{Var}[N] = \sum_{i=0}^{\gamma} (2 i + 1) P(\text{accepted} \ge i) - E[N]^2

    Source
    ------
    Derivation, as :func:`tokens_variance`.
    """
    survival = _survival(law, length)
    return float(((2 * np.arange(length + 1) + 1) * survival).sum() - survival.sum() ** 2)


def _survival(law: float | LengthLaw, length: int) -> Array:
    require(length >= 0, "length", "must be an integer of at least 0 [tokens]", length)
    if isinstance(law, int | float):
        a, _ = _checked(law, length)
        return np.asarray(a ** np.arange(length + 1))
    return law.survival(length)


class BestLength(NamedTuple):
    """The best draft length and what it brings."""

    length: Array  # gamma, whole numbers stored as floats [tokens]
    speedup: Array  # at that length [-]


def real_best_length(acceptance: ArrayLike, cost: ArrayLike) -> BestLength:
    r"""Return the draft length, as a real number, that maximises Leviathan's speed-up, and the speed-up there.

    .. math:: \gamma^* = \frac{v - 1}{|\ln\alpha|} - \frac{1}{c}, \quad
              S^* = \frac{|\ln\alpha|}{c\,(1 - \alpha)\,v}, \quad
              v - \ln v = 1 + \left(\tfrac{1}{c} - 1\right) |\ln\alpha|

    that is :math:`v = -W_{-1}(-\alpha^{1/c - 1} / e)`; solved by Newton, since the argument of W underflows.

    Parameters
    ----------
    acceptance : array_like
        alpha_iid, inside (0, 1) [-].
    cost : array_like
        c = draft step / target step, inside (0, 1) [-]. With a verify pass that takes :math:`T_0 + \gamma\,T_1`, c is
        :math:`(T_D + T_1) / T_0` and the speed-up is in units of :math:`T_T / T_0`.

    Returns
    -------
    BestLength
        The length may be negative where speculation does not pay.

    Raises
    ------
    InputError
        If an acceptance or a cost is outside (0, 1).

    Source
    ------
    Derivation (:mod:`theory.derivations`) from Leviathan et al. (2023), theorem 3.8. SDSL (2026), arXiv:2603.11053,
    is reported to contain the same Lambert function; its own form was not seen.

    Examples
    --------
    >>> best = real_best_length(0.65, 1 / 110)
    >>> round(float(best.length), 3), round(float(best.speedup), 4)
    (8.168, 2.6084)
    """
    a, c = np.asarray(acceptance, dtype=float), np.asarray(cost, dtype=float)
    require(bool(np.all((a > 0) & (a < 1))), "acceptance", "must lie inside (0, 1) [-]", acceptance)
    require(bool(np.all((c > 0) & (c < 1))), "cost", "must lie inside (0, 1) [-]", cost)
    decay = -np.log(a)
    u = _lambert_excess((1 / c - 1) * decay)
    return BestLength(np.asarray(u / decay - 1 / c), np.asarray(decay / (c * (1 - a) * (1 + u))))


def _lambert_excess(x: Array) -> Array:
    r"""Return u > 0 with u - ln(1 + u) = x for x > 0, that is :math:`u = -1 - W_{-1}(-e^{-1-x})`.

    Newton from :math:`x + \sqrt{2x}`, which lies above the root (Chatzigeorgiou 2013, arXiv:1601.04895, theorem 1);
    the left side is convex, so no step overshoots.
    """
    u = x + np.sqrt(2 * x)
    for _ in range(NEWTON_STEPS):
        step = (u - np.log1p(u) - x) * (1 + u) / u
        u = u - step
        if np.all(np.abs(step) <= 1e-14 * u):
            break
    return np.asarray(u)


def best_length(acceptance: ArrayLike, cost: ArrayLike) -> BestLength:
    r"""Return the whole draft length that maximises Leviathan's speed-up; 0 where speculation does not pay.

    .. math:: \gamma^* = \arg\max_{\gamma \in \{0, 1, \ldots\}}
              \frac{1 - \alpha^{\gamma+1}}{(1 - \alpha)(\gamma c + 1)}

    Parameters
    ----------
    acceptance : array_like
        alpha_iid, inside [0, 1) [-].
    cost : array_like
        c = draft step / target step, above 0 [-].

    Raises
    ------
    InputError
        If an acceptance is outside [0, 1) (at 1 every token more gains: no best length) or a cost not above 0.

    Source
    ------
    Derivation: a concave over a positive affine function has one maximum, so the best whole number is a neighbour of
    :func:`real_best_length`. Leviathan et al. (2023) find it numerically.

    Examples
    --------
    >>> best = best_length(0.8, 0.05)
    >>> int(best.length), round(float(best.speedup), 2)
    (8, 3.09)
    """
    a, c = np.broadcast_arrays(np.asarray(acceptance, dtype=float), np.asarray(cost, dtype=float))
    require(bool(np.all((a >= 0) & (a < 1))), "acceptance", "must lie in [0, 1) [-]", acceptance)
    require(bool(np.all(c > 0)), "cost", "must be above 0 [-]", cost)
    pays = (a > c) & (a > 0)  # Leviathan et al., corollary 3.9
    inner = real_best_length(np.where(pays, a, 0.5), np.where(pays, c, 0.25)).length
    below = np.where(pays, np.maximum(np.floor(inner), 0.0), 0.0)
    low, high = _gain(a, below, c), _gain(a, below + 1, c)
    up = pays & (high > low)
    return BestLength(np.where(up, below + 1, below), np.where(up, high, low))


def _gain(acceptance: Array, length: Array, cost: Array) -> Array:
    return np.asarray(tokens_per_round(acceptance, length) / (length * cost + 1))


def operations_factor(acceptance: ArrayLike, length: ArrayLike, operations_ratio: ArrayLike) -> Array:
    r"""Return how many times the arithmetic operations per token grow under speculation [-].

    .. math:: \frac{(1 - \alpha)(\gamma \hat c + \gamma + 1)}{1 - \alpha^{\gamma+1}}

    Parameters
    ----------
    operations_ratio : array_like
        Operations per token of the draft over those of the target, hat c [-].

    Raises
    ------
    InputError
        If the ratio is negative.

    Source
    ------
    Leviathan et al. (2023), theorem 3.11.

    Examples
    --------
    >>> round(float(operations_factor(0.8, 5, 0.05)), 3)
    1.694
    """
    ratio = np.asarray(operations_ratio, dtype=float)
    require(bool(np.all(ratio >= 0)), "operations_ratio", "must be at least 0 [-]", operations_ratio)
    g = np.asarray(length, dtype=float)
    return np.asarray((g * ratio + g + 1) / tokens_per_round(acceptance, length))


def throughput(tokens: ArrayLike, round_time: ArrayLike, batch: ArrayLike) -> Array:
    r"""Return the tokens a second of a batch, :math:`n\,E[N] / T_{round}` [tokens/s].

    Parameters
    ----------
    tokens : array_like
        E[N], tokens per round of one sequence [tokens/round].
    round_time : array_like
        T_round at that batch [s].
    batch : array_like
        n [sequences].

    Raises
    ------
    InputError
        If a round time is not above 0.

    Examples
    --------
    >>> float(throughput(3.0, 0.03, 8))
    800.0
    """
    time = np.asarray(round_time, dtype=float)
    require(bool(np.all(time > 0)), "round_time", "must be above 0 [s]", round_time)
    return np.asarray(np.asarray(batch, dtype=float) * np.asarray(tokens, dtype=float) / time)


def cost_per_token(
    tokens: ArrayLike, round_time: ArrayLike, batch: ArrayLike, gpus: ArrayLike, price: ArrayLike = 1.0
) -> Array:
    r"""Return what an output token costs, :math:`p\,t\,T_{round} / (n\,E[N])`.

    Parameters
    ----------
    gpus : array_like
        GPUs that are busy for the round, t [GPUs].
    price : array_like
        Price of a GPU second [USD/GPU-s]; 1 gives GPU-seconds per token.

    Examples
    --------
    >>> float(cost_per_token(3.0, 0.03, 8, gpus=4))
    0.005
    """
    rate = throughput(tokens, round_time, batch)
    return np.asarray(np.asarray(price, dtype=float) * np.asarray(gpus, dtype=float) / rate)


def break_even_verify(acceptance: ArrayLike, length: ArrayLike, draft_ratio: ArrayLike) -> Array:
    r"""Return the verify time, in target steps, above which a draft length loses, :math:`E[N] - \gamma c` [-].

    Source
    ------
    Derivation: S = 1 in :func:`speedup`.

    Examples
    --------
    >>> round(float(break_even_verify(0.8, 4, 0.05)), 4)
    3.1616
    """
    c = np.asarray(draft_ratio, dtype=float)
    return np.asarray(tokens_per_round(acceptance, length) - np.asarray(length, dtype=float) * c)


def paying_ranges(grid: ArrayLike, gain: ArrayLike) -> list[tuple[float, float | None]]:
    """Return where speculation pays: (first, last) of each run of the grid with a gain above 1; last None if open.

    The ends between two points of the grid are found where the logarithm of the gain, linear between them, crosses 0.
    A batch or a context may have more than one such run: weights stop being shared, KV reads start to be.

    Parameters
    ----------
    grid : array_like
        Batches or contexts, rising.
    gain : array_like
        Speed-up at the best draft length above 0 [-].

    Raises
    ------
    InputError
        If the grid does not rise.

    Examples
    --------
    >>> paying_ranges([1, 2, 4], [2.0, 1.5, 0.5])[0][0]
    1.0
    """
    x, y = np.asarray(grid, dtype=float), np.log(np.asarray(gain, dtype=float))
    require(bool(np.all(np.diff(x) > 0)), "grid", "must rise", grid)
    pays = np.concatenate([[False], y > 0, [False]])
    starts, ends = np.flatnonzero(~pays[:-1] & pays[1:]), np.flatnonzero(pays[:-1] & ~pays[1:]) - 1
    return [
        (_crossing(x, y, a - 1) if a > 0 else float(x[0]), _crossing(x, y, b) if b + 1 < len(x) else None)
        for a, b in zip(starts.tolist(), ends.tolist(), strict=True)
    ]


def _crossing(x: Array, y: Array, i: int) -> float:
    """Return where the line through points i and i + 1 is 0."""
    return float(x[i] + (x[i + 1] - x[i]) * y[i] / (y[i] - y[i + 1]))


class Elasticities(NamedTuple):
    """Relative change of the speed-up per relative change of each of its arguments [-]."""

    acceptance: Array
    cost: Array
    length: Array


def elasticities(acceptance: ArrayLike, length: ArrayLike, cost: ArrayLike) -> Elasticities:
    r"""Return the elasticities of Leviathan's speed-up with respect to alpha, c and gamma [-].

    .. math:: \varepsilon_\alpha = \frac{\alpha}{1-\alpha} - \frac{(\gamma+1)\alpha^{\gamma+1}}{1-\alpha^{\gamma+1}},
              \quad \varepsilon_c = -\frac{\gamma c}{\gamma c + 1}, \quad
              \varepsilon_\gamma = \gamma \left(\frac{-\ln\alpha\;\alpha^{\gamma+1}}{1-\alpha^{\gamma+1}}
              - \frac{c}{\gamma c + 1}\right)

    Raises
    ------
    InputError
        If an acceptance is outside (0, 1).

    Source
    ------
    Derivation (:mod:`theory.derivations`), :math:`\varepsilon_x = \partial \ln S / \partial \ln x`.

    Examples
    --------
    >>> [round(float(e), 3) for e in elasticities(0.8, 5, 0.05)]
    [1.868, -0.2, 0.196]
    """
    a, g = _checked(acceptance, length)
    require(bool(np.all((a > 0) & (a < 1))), "acceptance", "must lie inside (0, 1) [-]", acceptance)
    c = np.asarray(cost, dtype=float)
    tail = a ** (g + 1) / -np.expm1((g + 1) * np.log(a))
    return Elasticities(
        np.asarray(a / (1 - a) - (g + 1) * tail),
        np.asarray(-g * c / (g * c + 1)),
        np.asarray(g * (-np.log(a) * tail - c / (g * c + 1))),
    )


@dataclass(frozen=True, slots=True)
class Schedule:
    """The best draft length for each batch size, as vLLM's ``num_speculative_tokens_per_batch_size``."""

    length: NDArray[np.int64]  # gamma for batch n = index + 1 [tokens]
    tokens: Array  # E[N] at that gamma [tokens/round]
    time: Array  # round time at that gamma [s]

    def ranges(self) -> list[tuple[int, int, int]]:
        """Return (first batch, last batch, draft length) for each run of equal draft length."""
        edges = [0, *(np.flatnonzero(np.diff(self.length)) + 1).tolist(), len(self.length)]
        return [(a + 1, b, int(self.length[a])) for a, b in pairwise(edges)]


def best_schedule(
    acceptance: float | LengthLaw, round_time: Array, lengths: ArrayLike | None = None, tolerance: float = 0.0
) -> Schedule:
    r"""Return for each batch size the draft length that emits most tokens a second.

    .. math:: \gamma^*(n) = \arg\max_\gamma \frac{E[N](\gamma)}{T_{round}(\gamma, n)}

    Parameters
    ----------
    acceptance : float or LengthLaw
        alpha_iid [-], or any law of accepted tokens.
    round_time : ndarray, shape (lengths, batches)
        T_round: gamma draft steps plus one verify pass; row 0 is the plain decode step if ``lengths`` is omitted [s].
    lengths : array_like, optional
        gamma of each row [tokens]; 0, 1, 2, ... by default.
    tolerance : float
        Share of the best rate that may be given up at a batch size for a schedule of fewer ranges [-].

    Raises
    ------
    InputError
        If a round time is not finite and above 0, or the tolerance is not in [0, 1).

    Source
    ------
    Derivation: every sequence of the batch advances E[N] tokens a round, so the rate per sequence is E[N] / T_round.
    The fewest ranges: extending each as far as some length is good enough everywhere in it is optimal for intervals.
    """
    require(0.0 <= tolerance < 1.0, "tolerance", "must lie in [0, 1) [-]", tolerance)
    gammas, tokens, times = _table(acceptance, round_time, lengths)
    rate = tokens[:, None] / times
    best = np.argmax(rate, axis=0) if tolerance == 0.0 else _fewest_ranges(rate / rate.max(axis=0), tolerance)
    batch = np.arange(times.shape[1])
    return Schedule(gammas[best].astype(np.int64), tokens[best], times[best, batch])


def _fewest_ranges(share: Array, tolerance: float) -> NDArray[np.intp]:
    """Return for each batch the row used, from the share of the best rate that each row reaches there."""
    chosen, start = np.empty(share.shape[1], dtype=np.intp), 0
    while start < share.shape[1]:
        good = np.logical_and.accumulate(share[:, start:] >= 1 - tolerance, axis=1)
        reach = int(good.any(axis=0).sum())
        able = np.flatnonzero(good[:, reach - 1])
        chosen[start : start + reach] = able[np.argmax(share[able, start : start + reach].sum(axis=1))]
        start += reach
    return chosen


class ScheduleGain(NamedTuple):
    """What a schedule brings over the best draft length that never changes."""

    gain: float  # mean rate of the schedule over that of the best fixed length [-]
    fixed_length: int  # that length [tokens]
    over_plain: float  # mean rate of the schedule over plain decoding [-]


def schedule_gain(
    acceptance: float | LengthLaw, round_time: Array, occupancy: ArrayLike, lengths: ArrayLike | None = None
) -> ScheduleGain:
    r"""Return the gain of :func:`best_schedule` over the best fixed draft length, for a load that is met.

    .. math:: G = \frac{\sum_n \pi(n)\, n \max_\gamma E_\gamma / T_\gamma(n)}
                       {\max_\gamma \sum_n \pi(n)\, n\, E_\gamma / T_\gamma(n)}

    Parameters
    ----------
    round_time : ndarray, shape (lengths, batches)
        As in :func:`best_schedule`.
    occupancy : array_like, shape (batches,)
        Share of time spent at batch n = index + 1; normalised here [-].

    Raises
    ------
    InputError
        If a share is negative, none is positive, or their number is not that of the batches; if no length is 0.

    Assumes
    -------
    The same occupancy for all policies. In an open system a faster policy empties the batch, so this is the gain in
    capacity at that occupancy, not in latency.

    Source
    ------
    Derivation.

    Examples
    --------
    >>> times = np.array([[1.0, 1.0], [1.1, 2.5]])
    >>> schedule_gain(0.8, times, [0.5, 0.5]).fixed_length
    1
    """
    gammas, tokens, times = _table(acceptance, round_time, lengths)
    share = np.asarray(occupancy, dtype=float)
    require(
        share.shape == times.shape[1:] and bool(np.all(share >= 0)) and float(share.sum()) > 0,
        "occupancy",
        f"must give {times.shape[1]} shares of at least 0, not all 0 [-]",
        occupancy,
    )
    require(0 in gammas, "lengths", "must hold 0, plain decoding [tokens]", lengths)
    weight = share / share.sum() * np.arange(1, times.shape[1] + 1)
    rates = tokens[:, None] / times
    fixed = rates @ weight
    scheduled = float(rates.max(axis=0) @ weight)
    best = int(np.argmax(fixed))
    plain = float(fixed[np.flatnonzero(gammas == 0)[0]])
    return ScheduleGain(scheduled / float(fixed[best]), int(gammas[best]), scheduled / plain)


def _table(
    acceptance: float | LengthLaw, round_time: Array, lengths: ArrayLike | None
) -> tuple[NDArray[np.int64], Array, Array]:
    """Return draft lengths, tokens per round of each, and the checked table of round times."""
    times = np.asarray(round_time, dtype=float)
    require(
        times.ndim == 2 and bool(np.all(np.isfinite(times) & (times > 0))),
        "round_time",
        "must be a table of finite times above 0 [s]",
        round_time,
    )
    gammas = np.arange(times.shape[0]) if lengths is None else np.asarray(lengths, dtype=np.int64)
    if isinstance(acceptance, int | float):
        return gammas, tokens_per_round(acceptance, gammas), times
    return gammas, np.array([mean_tokens(acceptance, int(g)) for g in gammas]), times


def _checked(acceptance: ArrayLike, length: ArrayLike) -> tuple[Array, Array]:
    a, g = np.asarray(acceptance, dtype=float), np.asarray(length, dtype=float)
    require(
        bool(np.all((a >= 0) & (a <= 1))),
        "acceptance",
        "must lie in [0, 1] [-]",
        acceptance,
        "It is a probability per drafted token: pass 0.8, not 80.",
    )
    require(bool(np.all((g >= 0) & (g == np.floor(g)))), "length", "must be an integer of at least 0 [tokens]", length)
    return a, g

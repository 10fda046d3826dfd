"""Speculative decoding: tokens per round, speed-up, best draft length, and how both change with the batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import require

Array = NDArray[np.float64]


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


def best_schedule(acceptance: float, round_time: Array, lengths: ArrayLike | None = None) -> Schedule:
    r"""Return for each batch size the draft length that emits most tokens a second.

    .. math:: \gamma^*(n) = \arg\max_\gamma \frac{E[N](\gamma)}{T_{round}(\gamma, n)}

    Parameters
    ----------
    acceptance : float
        alpha_iid [-].
    round_time : ndarray, shape (lengths, batches)
        T_round: gamma draft steps plus one verify pass; row 0 is the plain decode step if ``lengths`` is omitted [s].
    lengths : array_like, optional
        gamma of each row [tokens]; 0, 1, 2, ... by default.

    Raises
    ------
    InputError
        If a round time is not finite and above 0.

    Source
    ------
    Derivation: every sequence of the batch advances E[N] tokens a round, so the rate per sequence is E[N] / T_round.
    """
    times = np.asarray(round_time, dtype=float)
    require(
        times.ndim == 2 and bool(np.all(np.isfinite(times) & (times > 0))),
        "round_time",
        "must be a table of finite times above 0 [s]",
        round_time,
    )
    gammas = np.arange(times.shape[0]) if lengths is None else np.asarray(lengths, dtype=np.int64)
    tokens = tokens_per_round(acceptance, gammas)
    best = np.argmax(tokens[:, None] / times, axis=0)
    batch = np.arange(times.shape[1])
    return Schedule(gammas[best].astype(np.int64), tokens[best], times[best, batch])


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

r"""Which simulated systems keep their limits and which is best, at a stated confidence, with no more runs than needed.

Both rules watch a sum of observations leave a band that narrows as they come. With S^2 the variance of the first
:math:`n_0` observations and :math:`\epsilon` what makes no difference to whoever asks, the band after n of them is

.. math:: R(n) = \max\Big(0, \frac{h^2 S^2}{2 \epsilon} - \frac{\epsilon\, n}{2}\Big), \qquad
          h^2 = 2 \eta (n_0 - 1), \qquad \eta = \tfrac12 \big[(2 \beta)^{-2 / (n_0 - 1)} - 1\big]

A normal sum with drift of at least :math:`\epsilon` leaves it on the wrong side with probability at most
:math:`\beta`, and no sum is in it after :math:`h^2 S^2 / \epsilon^2` observations.

Source
------
Kim & Nelson (2001), ACM TOMACS 11:251, procedure KN with c = 1, for the best of several, valid with common random
numbers; Batur & Kim (2010), ACM TOMACS 20:13, and Andradottir & Kim (2010), Naval Research Logistics 57:403, for the
limits. Batch means in the place of independent observations: Kim & Nelson (2006), Operations Research 54:475.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.errors import require

Array = NDArray[np.float64]
Verdict = Literal["in", "out", "open"]
SOURCE = (
    "feasibility: Batur & Kim (2010), ACM TOMACS 20:13, and Andradottir & Kim (2010), Naval Research Logistics 57:403; "
    "best: Kim & Nelson (2001), ACM TOMACS 11:251; batch means: Kim & Nelson (2006), Operations Research 54:475"
)


@dataclass(frozen=True, slots=True)
class Rule:
    """How a band is set up."""

    first: int  # n0, observations that the variance is estimated from [-]
    error: float  # beta, probability that a sum leaves on the wrong side [-]

    def __post_init__(self) -> None:
        require(self.first >= 2, "first", "must be at least 2 observations [-]", self.first)
        require(0 < self.error < 0.5, "error", "must lie between 0 and 0.5 [-]", self.error)

    @property
    def h2(self) -> float:
        r"""Return :math:`h^2 = (n_0 - 1) [(2 \beta)^{-2/(n_0 - 1)} - 1]` [-].

        Examples
        --------
        >>> round(Rule(first=10, error=0.05).h2, 2)
        6.01
        """
        n = self.first - 1
        return float(n * ((2 * self.error) ** (-2 / n) - 1))

    def band(self, variance: float, tolerance: float, n: ArrayLike) -> Array:
        """Return the half width R(n) of the band of a sum of n observations, in their unit [-]."""
        return np.maximum(0.0, self.h2 * variance / (2 * tolerance) - tolerance * np.asarray(n, dtype=float) / 2)

    def most(self, variance: float, tolerance: float) -> int:
        """Return after how many observations the band has closed: none takes more [-]."""
        return max(self.first, math.ceil(self.h2 * variance / tolerance**2))


def keeps(observations: ArrayLike, limit: float, tolerance: float, rule: Rule) -> Verdict:
    """Return whether the mean of a system is at most a limit: "in", "out", or "open" while that is not known.

    A mean below ``limit`` - ``tolerance`` is taken to be out, and one above ``limit`` + ``tolerance`` in, with
    probability at most ``rule.error``; between them either answer will do.

    Parameters
    ----------
    observations : (n,) array
        In the order in which they came.

    Raises
    ------
    InputError
        If the tolerance is not above 0.
    """
    require(tolerance > 0, "tolerance", "must be above 0, in the unit of the limit", tolerance)
    excess = np.asarray(observations, dtype=float) - limit
    if excess.size < rule.first:
        return "open"
    n = np.arange(rule.first, excess.size + 1)
    total = np.cumsum(excess)[rule.first - 1 :]
    band = rule.band(float(excess[: rule.first].var(ddof=1)), tolerance, n)
    left = np.abs(total) >= band
    if not left.any():
        return "open"
    return "in" if total[np.argmax(left)] <= 0 else "out"


@dataclass(frozen=True, slots=True)
class Selection:
    """How far the search for the best has come."""

    stay: tuple[int, ...]  # systems that may still be the best, ascending
    taken: tuple[int, ...]  # observations of each that this took [-]


def best(observations: Sequence[ArrayLike], tolerance: float, error: float, first: int) -> Selection:
    r"""Return which systems may still have the smallest mean; one of them once it is separated from the rest.

    With one left it is the best with probability at least 1 - ``error`` if the others are worse by at least
    ``tolerance``, whatever the correlation between systems: observation j of each may share its random numbers.
    The systems i that stay after r observations are those with

    .. math:: \sum_{j \le r} (X_{ij} - X_{lj}) \le R_{il}(r) \quad \text{for all } l \text{ that stayed so far}

    Parameters
    ----------
    observations : sequence of k arrays
        Of each system in the order in which they came; one that was dropped need not have as many as the others.
    tolerance : float
        A difference of means that makes no difference, in their unit.
    error : float
        Probability of a wrong selection, shared evenly among the k - 1 others [-].
    first : int
        Observations that the variances of differences are estimated from [-].

    Raises
    ------
    InputError
        If there is no system, the tolerance is not above 0, or a system that may be the best has too few observations.
    """
    data = [np.asarray(x, dtype=float) for x in observations]
    require(len(data) > 0, "observations", "must hold a system", len(data))
    require(tolerance > 0, "tolerance", "must be above 0, in the unit of the observations", tolerance)
    stay, taken = list(range(len(data))), [0] * len(data)
    if len(data) == 1 or min(x.size for x in data) < first:
        return Selection(tuple(stay), tuple(min(x.size, first) if len(data) > 1 else 0 for x in data))
    rule = Rule(first, error / (len(data) - 1))
    early = np.array([x[:first] for x in data])
    open_at = rule.h2 * (early[:, None] - early[None]).var(axis=2, ddof=1) / (2 * tolerance)
    sums = [np.cumsum(x) for x in data]
    for r in range(first, max(x.size for x in data) + 1):
        few = [sums[i].size for i in stay if sums[i].size < r]
        require(not few, "observations", f"must be {r} of each system that stays", few)
        for i in stay:
            taken[i] = r
        at = np.array([sums[i][r - 1] for i in stay])
        band = np.maximum(0.0, open_at[np.ix_(stay, stay)] - tolerance * r / 2)
        good = (at[:, None] - at[None] <= band).all(axis=1)
        stay = [i for i, kept in zip(stay, good, strict=True) if kept]
        if len(stay) == 1:
            break
    return Selection(tuple(stay), tuple(taken))


def spent(error: float, test: int) -> float:
    r"""Return what test number 1, 2, ... of a sequence of unknown length may err by, :math:`\alpha / (i (i + 1))` [-].

    The sum over all tests is the error itself.

    Examples
    --------
    >>> round(sum(spent(0.05, i) for i in range(1, 10_000)), 4)
    0.05
    """
    return error / (test * (test + 1))

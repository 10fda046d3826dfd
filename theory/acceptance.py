"""Acceptance: what a draft's quality implies for the probability that its tokens are accepted, and conversions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import norm

from .errors import require
from .speculation import tokens_per_round


@dataclass(frozen=True, slots=True)
class PerplexityLaw:
    r"""Acceptance affine in the perplexities of draft (x) and target (y), :math:`\alpha = A x + B y + C`."""

    name: str
    draft_slope: float  # A [-]
    target_slope: float  # B [-]
    intercept: float  # C [-]
    residual: float  # standard deviation of alpha about the law [-]
    r_squared: float  # share of variance explained on the pairs it was fitted on [-]
    source: str


SDSL = PerplexityLaw(
    name="sdsl",
    draft_slope=-0.0067,
    target_slope=0.01297,
    intercept=0.642,
    residual=0.00128**0.5,
    r_squared=0.602,
    source="SDSL (2026), arXiv:2603.11053 as summarised second-hand: R^2 0.602, mean squared error 0.00128",
)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """An acceptance with its interval and where it comes from."""

    value: float  # alpha_iid [-]
    low: float
    high: float
    provenance: str  # measured, fitted, published or assumed
    source: str

    def __post_init__(self) -> None:
        require(
            0.0 <= self.low <= self.value <= self.high <= 1.0,
            "acceptance",
            "must satisfy 0 <= low <= value <= high <= 1 [-]",
            (self.low, self.value, self.high),
            "It is a probability per drafted token: pass 0.8, not 80.",
        )


def predicted_acceptance(
    law: PerplexityLaw, draft_perplexity: float, target_perplexity: float, level: float = 0.9
) -> Acceptance:
    r"""Return :math:`\alpha = A x + B y + C`, clipped to [0, 1], with the interval of the law's residual.

    Parameters
    ----------
    draft_perplexity, target_perplexity : float
        x and y [-].
    level : float
        Coverage of the interval [-].

    Raises
    ------
    InputError
        If a perplexity is below 1.

    Source
    ------
    The law's own ``source``.

    Examples
    --------
    >>> round(predicted_acceptance(SDSL, 12.0, 7.0).value, 4)
    0.6524
    """
    for name, value in (("draft_perplexity", draft_perplexity), ("target_perplexity", target_perplexity)):
        require(value >= 1.0, name, "must be at least 1 [-]", value)
    mean = law.draft_slope * draft_perplexity + law.target_slope * target_perplexity + law.intercept
    half = float(norm.ppf((1 + level) / 2)) * law.residual
    low, value, high = np.clip((mean - half, mean, mean + half), 0.0, 1.0)
    return Acceptance(float(value), float(low), float(high), "fitted", law.source)


def from_fraction(fraction: ArrayLike, length: int) -> NDArray[np.float64]:
    r"""Return alpha_iid from the accepted fraction that logs print (accepted / drafted).

    Solves :math:`1 + \gamma\,\alpha_{frac} = (1 - \alpha^{\gamma+1}) / (1 - \alpha)`.

    Parameters
    ----------
    fraction : array_like
        Accepted tokens over drafted tokens [-].
    length : int
        Draft length gamma, at least 1 [tokens].

    Raises
    ------
    InputError
        If a fraction is outside [0, 1] or the length below 1.

    Source
    ------
    Derivation: both sides are the mean tokens per round.

    Examples
    --------
    >>> round(float(from_fraction(0.644, 5)), 3)
    0.857
    """
    values = np.asarray(fraction, dtype=float)
    require(length >= 1, "length", "must be at least 1 [tokens]", length)
    require(
        bool(np.all((values >= 0) & (values <= 1))),
        "fraction",
        "must lie in [0, 1] [-]",
        fraction,
        "It is accepted over drafted: pass 0.64, not 64.",
    )
    return np.vectorize(lambda f: from_tokens_per_round(1 + length * f, length), otypes=[float])(values)


def from_tokens_per_round(tokens: float, length: int) -> float:
    r"""Return the alpha_iid whose mean round of draft length gamma emits ``tokens`` tokens [-].

    Raises
    ------
    InputError
        Unless 1 <= tokens <= length + 1.

    Examples
    --------
    >>> round(from_tokens_per_round(3.3616, 4), 6)
    0.8
    """
    require(
        1.0 <= tokens <= length + 1 + 1e-12,
        "tokens",
        f"must lie in [1, {length + 1}] [tokens/round]",
        tokens,
        "Mean accepted length includes the bonus token.",
    )
    if tokens >= length + 1:
        return 1.0
    return float(brentq(lambda a: float(tokens_per_round(a, length)) - tokens, 0.0, 1.0, xtol=1e-14))


def to_fraction(acceptance: ArrayLike, length: int) -> NDArray[np.float64]:
    r"""Return the accepted fraction :math:`(E[N] - 1) / \gamma` of an alpha_iid [-]; inverse of :func:`from_fraction`."""
    require(length >= 1, "length", "must be at least 1 [tokens]", length)
    return np.asarray((tokens_per_round(acceptance, length) - 1) / length)

"""Loss laws: parameters and training tokens -> loss -> perplexity. Laws are data with a source and a fitted range."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import require


@dataclass(frozen=True, slots=True)
class LossLaw:
    r"""Loss of a model of N parameters trained on D tokens, :math:`L(N, D) = E + A N^{-\alpha} + B D^{-\beta}`."""

    name: str
    irreducible: float  # E [nat/token]
    parameter_scale: float  # A [nat/token]
    parameter_exponent: float  # alpha [-]
    data_scale: float  # B [nat/token]
    data_exponent: float  # beta [-]
    parameter_range: tuple[float, float]  # of the models it was fitted on [-]
    token_range: tuple[float, float]  # of their training sets [tokens]
    source: str


HOFFMANN = LossLaw(
    name="hoffmann-2022",
    irreducible=1.69,
    parameter_scale=406.4,
    parameter_exponent=0.34,
    data_scale=410.7,
    data_exponent=0.28,
    parameter_range=(44e6, 16e9),
    token_range=(5e9, 500e9),
    source="Hoffmann et al. (2022), arXiv:2203.15556, eq. (10)",
)


def loss(law: LossLaw, parameters: ArrayLike, tokens: ArrayLike) -> NDArray[np.float64]:
    r"""Return the pre-training loss :math:`L(N, D) = E + A N^{-\alpha} + B D^{-\beta}` [nat/token].

    Parameters
    ----------
    parameters : array_like
        N [-].
    tokens : array_like
        D [tokens]; broadcast against ``parameters``.

    Raises
    ------
    InputError
        If N or D is not positive.

    Source
    ------
    The law's own ``source``.

    Examples
    --------
    >>> round(float(loss(HOFFMANN, 70e9, 1.4e12)), 3)
    1.937
    """
    n, d = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
    require(bool(np.all(n > 0)), "parameters", "must be above 0 [-]", parameters)
    require(bool(np.all(d > 0)), "tokens", "must be above 0 [tokens]", tokens)
    return np.asarray(
        law.irreducible + law.parameter_scale * n**-law.parameter_exponent + law.data_scale * d**-law.data_exponent
    )


def perplexity(law: LossLaw, parameters: ArrayLike, tokens: ArrayLike) -> NDArray[np.float64]:
    r"""Return :math:`e^{L(N, D)}` [-]; arguments as in :func:`loss`."""
    return np.asarray(np.exp(loss(law, parameters, tokens)))


def inside(law: LossLaw, parameters: float, tokens: float) -> bool:
    """Return whether (N, D) lies in the range the law was fitted on; outside, a figure is an extrapolation."""
    low_n, high_n = law.parameter_range
    low_d, high_d = law.token_range
    return low_n <= parameters <= high_n and low_d <= tokens <= high_d

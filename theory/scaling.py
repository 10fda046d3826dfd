"""Loss laws: parameters and training tokens -> loss -> perplexity. Laws are data with a source and a fitted range."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import refuse, require

REACH = 10.0  # how far beyond its fitted range a law is used without being asked, as a factor [-]; assumed


@dataclass(frozen=True, slots=True)
class LossLaw:
    r"""Loss of a model of N parameters trained on D tokens, :math:`L(N, D) = E + A N^{-\alpha} + B D^{-\beta}`.

    A law of one's own is one more instance of this class. Losses are per token of the law's own tokenizer: two laws
    compare only through what they imply for the same text.

    Raises
    ------
    InputError
        If a coefficient is not positive (E: below 0) or a range is empty.
    """

    name: str
    irreducible: float  # E [nat/token]
    parameter_scale: float  # A [nat/token]
    parameter_exponent: float  # alpha [-]
    data_scale: float  # B [nat/token]
    data_exponent: float  # beta [-]
    parameter_range: tuple[float, float]  # of the models it was fitted on [-]
    token_range: tuple[float, float]  # of their training sets [tokens]
    source: str

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.irreducible) and self.irreducible >= 0,
            "irreducible",
            "must be finite and at least 0 [nat/token]",
            self.irreducible,
        )
        for name in ("parameter_scale", "parameter_exponent", "data_scale", "data_exponent"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, name, "must be finite and above 0", value)
        for name in ("parameter_range", "token_range"):
            low, high = getattr(self, name)
            require(0 < low < high, name, "must be (low, high) with 0 < low < high", (low, high))


HOFFMANN = LossLaw(
    name="hoffmann-2022",
    irreducible=1.69,
    parameter_scale=406.4,
    parameter_exponent=0.34,
    data_scale=410.7,
    data_exponent=0.28,
    parameter_range=(44e6, 16e9),
    token_range=(5e9, 500e9),
    source="Hoffmann et al. (2022), arXiv:2203.15556, eq. (10), as rounded there",
)

EPOCH = LossLaw(
    name="epoch-2024",
    irreducible=1.8172,  # standard error 0.03
    parameter_scale=482.01,  # standard error 124.58
    parameter_exponent=0.3478,  # standard error 0.02
    data_scale=2085.43,  # standard error 1293.23
    data_exponent=0.3658,  # standard error 0.02
    parameter_range=(44e6, 16e9),
    token_range=(5e9, 500e9),
    source="Besiroglu et al. (2024), arXiv:2404.10102: refit of Hoffmann et al. on 240 points read off their figure",
)

LOSS_LAWS: dict[str, LossLaw] = {law.name: law for law in (HOFFMANN, EPOCH)}


def loss_law(name: str) -> LossLaw:
    """Return the loss law of that name.

    Raises
    ------
    InputError
        If the name is unknown; the known ones are given.

    Examples
    --------
    >>> loss_law("epoch-2024").irreducible
    1.8172
    """
    if name not in LOSS_LAWS:
        refuse("loss_law", f"must be one of {', '.join(LOSS_LAWS)}", name, "Or make a LossLaw of your own.")
    return LOSS_LAWS[name]


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
    return beyond(law, parameters, tokens) == 1.0


def beyond(law: LossLaw, parameters: float, tokens: float) -> float:
    """Return the factor by which (N, D) lies outside the fitted range, the larger of the two; 1 inside [-].

    Examples
    --------
    >>> round(beyond(HOFFMANN, 70e9, 2e12), 3)
    4.375
    """
    pairs = ((parameters, law.parameter_range), (tokens, law.token_range))
    return max(max(1.0, low / value, value / high) for value, (low, high) in pairs)


def tag(law: LossLaw, parameters: float, tokens: float, extrapolate: bool = False) -> str:
    """Return ``fitted`` inside the range of the law, ``extrapolated`` outside, or refuse.

    Up to a factor REACH beyond the range the law is used and tagged: the law was made to be read beyond its largest
    model, and there its terms in N and D are small. Further out it is used only when asked.

    Raises
    ------
    InputError
        If (N, D) lies more than a factor REACH outside the range and ``extrapolate`` is false.

    Examples
    --------
    >>> tag(HOFFMANN, 1e9, 1e11), tag(HOFFMANN, 70e9, 2e12)
    ('fitted', 'extrapolated')
    """
    factor = beyond(law, parameters, tokens)
    require(
        extrapolate or factor <= REACH,
        "parameters, tokens",
        f"must lie within a factor {REACH:g} of what {law.name} was fitted on "
        f"({law.parameter_range[0]:.3g} to {law.parameter_range[1]:.3g} parameters, "
        f"{law.token_range[0]:.3g} to {law.token_range[1]:.3g} tokens)",
        (parameters, tokens),
        "Ask for extrapolation (`--extrapolate`), and the result is tagged.",
    )
    return "fitted" if factor == 1.0 else "extrapolated"

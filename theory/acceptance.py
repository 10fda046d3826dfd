"""Acceptance: what a draft's quality implies for the probability that its tokens are accepted, and conversions.

*Quality laws* turn the losses of draft and target into an acceptance, each with its spread. *Length laws* say how many
drafted tokens of a round are accepted, without assuming one common probability. *Conversions* turn what logs print into
alpha_iid. Acceptance here is that of sampling, :math:`\\sum_x \\min(p, q)`; greedy decoding has another one, which must
be measured apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, expit, logit, ndtri, roots_sh_jacobi

from .errors import refuse, require
from .speculation import tokens_per_round

Array = NDArray[np.float64]
Sizes = tuple[float, float]  # smallest and largest model [parameters]


# --- quality laws ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QualityLaw:
    r"""Acceptance affine in the quality of draft and target, through a link: :math:`g(\alpha) = A x + B y + C`."""

    name: str
    draft_slope: float  # A [-]
    target_slope: float  # B [-]
    intercept: float  # C [-]
    residual: float  # standard deviation of alpha about the law [-]
    r_squared: float  # share of the variance of alpha explained on the pairs it was fitted on [-]
    source: str
    draft_sizes: Sizes | None = None  # drafts it is good for [parameters]; None: not stated
    target_sizes: Sizes | None = None  # targets it is good for [parameters]; None: not stated
    provenance: str = "fitted"

    form: ClassVar[str] = ""  # the law in words

    def mean(self, draft_loss: ArrayLike, target_loss: ArrayLike) -> Array:
        """Return the mean acceptance for losses of draft and target [nat/token], not clipped [-]."""
        x, y = (self.measure(np.asarray(value, dtype=float)) for value in (draft_loss, target_loss))
        return self.unlink(np.asarray(self.draft_slope * x + self.target_slope * y + self.intercept))

    @staticmethod
    def measure(loss: Array) -> Array:
        """Return the measure of quality of a model from its loss [nat/token]."""
        return loss

    @staticmethod
    def link(acceptance: Array) -> Array:
        """Return g(alpha) [-]."""
        return acceptance

    @staticmethod
    def unlink(value: Array) -> Array:
        """Return alpha from g(alpha) [-]."""
        return value


@dataclass(frozen=True, slots=True)
class PerplexityLaw(QualityLaw):
    r"""Acceptance affine in the perplexities of draft (x) and target (y), :math:`\alpha = A x + B y + C`."""

    form: ClassVar[str] = "alpha affine in perplexity"

    @staticmethod
    def measure(loss: Array) -> Array:
        """Return the perplexity [-]."""
        return np.asarray(np.exp(loss))


@dataclass(frozen=True, slots=True)
class LossAffineLaw(QualityLaw):
    r"""Acceptance affine in the losses, :math:`\alpha = A L_d + B L_t + C`; A = -B is affine in their difference."""

    form: ClassVar[str] = "alpha affine in loss"


@dataclass(frozen=True, slots=True)
class LogLossLaw(QualityLaw):
    r"""Logarithm of the acceptance affine in the losses, :math:`\ln\alpha = A L_d + B L_t + C`."""

    form: ClassVar[str] = "log alpha affine in loss"

    @staticmethod
    def link(acceptance: Array) -> Array:
        """Return ln(alpha) [-]."""
        return np.asarray(np.log(acceptance))

    @staticmethod
    def unlink(value: Array) -> Array:
        """Return alpha from its logarithm [-]."""
        return np.asarray(np.exp(value))


@dataclass(frozen=True, slots=True)
class LogitLossLaw(QualityLaw):
    r"""Log-odds of the acceptance affine in the losses, :math:`\ln\frac{\alpha}{1-\alpha} = A L_d + B L_t + C`."""

    form: ClassVar[str] = "logit alpha affine in loss"

    @staticmethod
    def link(acceptance: Array) -> Array:
        """Return the log-odds [-]."""
        return np.asarray(logit(acceptance))

    @staticmethod
    def unlink(value: Array) -> Array:
        """Return alpha from its log-odds [-]."""
        return np.asarray(expit(value))


SDSL = PerplexityLaw(
    name="sdsl",
    draft_slope=-0.0067,
    target_slope=0.01297,
    intercept=0.642,
    residual=0.00128**0.5,
    r_squared=0.602,
    source="SDSL (2026), arXiv:2603.11053 as summarised second-hand: R^2 0.602, mean squared error 0.00128",
    draft_sizes=(0.1e9, 4e9),  # fitted on 125 M to 4 B; its authors apply it down to 117 M (their table 5)
    target_sizes=(13e9, 110e9),
    provenance="published",
)

# source, sizes of drafts and of targets [parameters]
_SMALL_FAMILY: tuple[str, Sizes, Sizes] = (
    "six Llama-style models trained on 1.5 M tokens of Python source each, vocabulary 512; 15 pairs, sum of min(p, q) "
    "on held-out text; one family, one seed; fitted in studies/which_acceptance_law",
    (11.6e3, 492e3),
    (28.3e3, 1.62e6),
)
SMALL_FAMILY_LOG = LogLossLaw("small-family-log", -0.4599, 0.4378, -0.1626, 0.0059, 0.998, *_SMALL_FAMILY)
SMALL_FAMILY_LOSS = LossAffineLaw("small-family-loss", -0.2699, 0.2408, 0.8520, 0.0064, 0.997, *_SMALL_FAMILY)
SMALL_FAMILY_PERPLEXITY = PerplexityLaw(
    "small-family-perplexity", -0.0132, 0.0178, 0.7044, 0.0268, 0.952, *_SMALL_FAMILY
)

ACCEPTANCE_LAWS: dict[str, QualityLaw] = {
    law.name: law for law in (SDSL, SMALL_FAMILY_LOG, SMALL_FAMILY_LOSS, SMALL_FAMILY_PERPLEXITY)
}


def acceptance_law(name: str) -> QualityLaw:
    """Return the quality law of that name.

    Raises
    ------
    InputError
        If the name is unknown; the known ones are given.

    Examples
    --------
    >>> acceptance_law("sdsl").r_squared
    0.602
    """
    if name not in ACCEPTANCE_LAWS:
        refuse("acceptance_law", f"must be one of {', '.join(ACCEPTANCE_LAWS)}", name, "Or fit a law of your own.")
    return ACCEPTANCE_LAWS[name]


def tag(law: QualityLaw, draft_size: float, target_size: float, extrapolate: bool = False) -> str:
    """Return the law's provenance inside its sizes, ``extrapolated`` outside them, or refuse.

    Raises
    ------
    InputError
        If a size lies outside what the law was fitted on, or the law does not say, and ``extrapolate`` is false.

    Examples
    --------
    >>> tag(SDSL, 0.5e9, 70e9), tag(SDSL, 0.5e9, 7e9, extrapolate=True)
    ('published', 'extrapolated')
    """
    for name, value, sizes in (
        ("draft_params", draft_size, law.draft_sizes),
        ("target_params", target_size, law.target_sizes),
    ):
        if sizes is not None and sizes[0] <= value <= sizes[1]:
            continue
        stated = "sizes it does not state" if sizes is None else f"{sizes[0]:.3g} to {sizes[1]:.3g}"
        require(
            extrapolate,
            name,
            f"must lie in the range of the acceptance law {law.name}, {stated} [parameters]",
            value,
            "Ask for extrapolation (`--extrapolate`), and the result is tagged.",
        )
        return "extrapolated"
    return law.provenance


def fit_law(
    kind: type[QualityLaw], draft_loss: ArrayLike, target_loss: ArrayLike, acceptance: ArrayLike, name: str, source: str
) -> QualityLaw:
    r"""Return the law of ``kind`` that fits measured pairs best, by least squares of g(alpha).

    .. math:: g(\alpha_i) \approx A x_i + B y_i + C, \quad
              \text{residual}^2 = \frac{\sum_i (\alpha_i - \hat\alpha_i)^2}{n - 3}

    Parameters
    ----------
    draft_loss, target_loss, acceptance : array_like, shape (pairs,)
        Losses [nat/token] and measured alpha_iid [-]; at least five pairs.

    Raises
    ------
    InputError
        If there are fewer than five pairs, an acceptance is outside (0, 1), or the pairs do not determine the law.

    Source
    ------
    Ordinary least squares; the residual with n - 3 degrees of freedom.
    """
    x, y, a = (np.asarray(v, dtype=float) for v in (draft_loss, target_loss, acceptance))
    require(len(a) >= 5, "acceptance", "must hold at least five pairs [-]", len(a), "Three numbers are fitted.")
    require(bool(np.all((a > 0) & (a < 1))), "acceptance", "must lie inside (0, 1) [-]", acceptance)
    columns = np.stack([kind.measure(x), kind.measure(y), np.ones(len(a))], axis=1)
    require(
        int(np.linalg.matrix_rank(columns)) == 3,
        "draft_loss",
        "must vary apart from the target's",
        draft_loss,
        "Measure more than one draft and more than one target.",
    )
    slopes = np.asarray(np.linalg.lstsq(columns, kind.link(a), rcond=None)[0], dtype=float)
    misses = kind.unlink(columns @ slopes) - a
    squares = float((misses**2).sum())
    draft_slope, target_slope, intercept = slopes.tolist()
    return kind(
        name,
        draft_slope,
        target_slope,
        intercept,
        residual=math.sqrt(squares / (len(a) - 3)),
        r_squared=1 - squares / float(((a - a.mean()) ** 2).sum()),
        source=source,
    )


@dataclass(frozen=True, slots=True)
class Acceptance:
    """An acceptance with its interval and where it comes from."""

    value: float  # alpha_iid [-]
    low: float  # [-]
    high: float  # [-]
    provenance: str  # measured, fitted, published, extrapolated or assumed
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
    law: QualityLaw, draft_perplexity: float, target_perplexity: float, level: float = 0.9
) -> Acceptance:
    r"""Return the acceptance of a pair by a quality law, clipped to [0, 1], with the interval of the law's residual.

    For :class:`PerplexityLaw`, :math:`\alpha = A x + B y + C`. The interval holds for a new pair like those the law was
    fitted on; it does not know of other families or texts.

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
    low, middle, high = acceptance_band(law, np.log(draft_perplexity), np.log(target_perplexity), level)
    return Acceptance(float(middle), float(low), float(high), law.provenance, law.source)


def acceptance_band(
    law: QualityLaw, draft_loss: ArrayLike, target_loss: ArrayLike, level: float = 0.9
) -> tuple[Array, Array, Array]:
    r"""Return (low, mean, high) of the acceptance for losses, each clipped to [0, 1] [-].

    .. math:: \alpha \pm z_{(1+\text{level})/2}\,\sigma

    Raises
    ------
    InputError
        If the level is outside (0, 1).

    Source
    ------
    Derivation: the law's own spread, normal, cut to [0, 1].
    """
    require(0 < level < 1, "level", "must lie inside (0, 1) [-]", level, "It is a coverage: pass 0.9, not 90.")
    mean = law.mean(draft_loss, target_loss)
    half = float(ndtri((1 + level) / 2)) * law.residual
    return np.clip(mean - half, 0.0, 1.0), np.clip(mean, 0.0, 1.0), np.clip(mean + half, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class LogLinearLaw:
    r"""Acceptance linear in the logarithm of one quantity, :math:`\alpha = k \ln x + b`; coefficients are the user's.

    The form in which acceptance is reported to depend on the draft's training tokens, its layers, or the batch (Yan et
    al. 2025, arXiv:2505.07858, theorems 1.1 to 1.3). Only the form is taken from there: no coefficients were seen.
    """

    name: str
    variable: str  # what x is, with its unit
    slope: float  # k [-]
    intercept: float  # b [-]
    residual: float  # standard deviation of alpha about the law [-]
    low: float  # smallest x it was fitted on [that of x]
    high: float  # largest x it was fitted on [that of x]
    source: str

    def __post_init__(self) -> None:
        require(0 < self.low < self.high, "low", "must satisfy 0 < low < high", (self.low, self.high))
        require(self.residual >= 0, "residual", "must be at least 0 [-]", self.residual)


def log_linear_acceptance(law: LogLinearLaw, x: float, level: float = 0.9, extrapolate: bool = False) -> Acceptance:
    r"""Return :math:`\alpha = k \ln x + b`, clipped to [0, 1], with the interval of the law's residual.

    Raises
    ------
    InputError
        If x lies outside the law's range and ``extrapolate`` is false.

    Examples
    --------
    >>> law = LogLinearLaw("mine", "draft layers", 0.05, 0.6, 0.02, 1, 8, "own runs")
    >>> round(log_linear_acceptance(law, 4).value, 4)
    0.6693
    """
    within = law.low <= x <= law.high
    require(
        within or (extrapolate and x > 0),
        "x",
        f"must lie in [{law.low:g}, {law.high:g}], the range of {law.name} [{law.variable}]",
        x,
        "Ask for extrapolation (`--extrapolate`), and the result is tagged.",
    )
    mean = law.slope * math.log(x) + law.intercept
    half = float(ndtri((1 + level) / 2)) * law.residual
    low, value, high = (min(1.0, max(0.0, v)) for v in (mean - half, mean, mean + half))
    return Acceptance(value, low, high, "fitted" if within else "extrapolated", law.source)


# --- length laws -----------------------------------------------------------------------------------------------------


def _within(length: int, known: int, extrapolate: bool, law: str) -> None:
    require(
        length <= known or extrapolate,
        "length",
        f"must be at most the {known} positions {law} knows [tokens]",
        length,
        "Measure longer drafts, or set `extrapolate` to hold the last position's acceptance.",
    )


def _hold_last(conditional: Array, length: int) -> Array:
    """Return P(accepted >= i), i = 0 .. length, from acceptances by position, the last one held beyond the end."""
    padded = np.concatenate([conditional, np.full(max(0, length - len(conditional)), conditional[-1])])
    return np.concatenate([[1.0], np.cumprod(padded[:length])])


@dataclass(frozen=True, slots=True)
class Iid:
    r"""Every drafted token is accepted with one probability: :math:`P(\text{accepted} \ge i) = \alpha^i`.

    Source
    ------
    Leviathan et al. (2023), arXiv:2211.17192, section 3.1.
    """

    acceptance: float  # alpha_iid [-]

    def __post_init__(self) -> None:
        _probability("acceptance", self.acceptance)

    def survival(self, length: int) -> Array:
        """Return P(accepted >= i) for i = 0 .. length [-]."""
        return np.asarray(self.acceptance ** np.arange(length + 1, dtype=float))


@dataclass(frozen=True, slots=True)
class Positional:
    r"""Acceptance by position, :math:`P(\text{accepted} \ge i) = \prod_{j \le i} a_j`, as EAGLE-type heads show it.

    Source
    ------
    Definition of the conditional acceptances a_j; the EAGLE papers report them as n-alpha.
    """

    acceptances: tuple[float, ...]  # a_j of position j given that all before it were accepted [-]
    extrapolate: bool = False  # whether the last one is held beyond the end

    def __post_init__(self) -> None:
        require(len(self.acceptances) >= 1, "acceptances", "must hold at least one position [-]", self.acceptances)
        for value in self.acceptances:
            _probability("acceptances", value)

    def survival(self, length: int) -> Array:
        """Return P(accepted >= i) for i = 0 .. length [-]."""
        _within(length, len(self.acceptances), self.extrapolate, "the vector")
        return _hold_last(np.asarray(self.acceptances, dtype=float), length)


def from_cumulative(cumulative: Sequence[float], extrapolate: bool = False) -> Positional:
    """Return the positional law of cumulative acceptances P(accepted >= 1), P(accepted >= 2), ... as logs print them.

    Raises
    ------
    InputError
        If a value is not a probability, or they rise.

    Examples
    --------
    >>> [round(a, 3) for a in from_cumulative([0.76, 0.56, 0.43]).acceptances]
    [0.76, 0.737, 0.768]
    """
    values = np.asarray(cumulative, dtype=float)
    ok = len(values) > 0 and bool(np.all((values >= 0) & (values <= 1)) and np.all(np.diff(values) <= 0))
    require(ok, "cumulative", "must be falling probabilities [-]", cumulative)
    before = np.concatenate([[1.0], values[:-1]])
    return Positional(tuple((values / np.where(before > 0, before, 1.0)).tolist()), extrapolate)


@dataclass(frozen=True, slots=True)
class BetaMixture:
    r"""Each request has its own alpha_iid, drawn from a Beta law: :math:`P(\text{accepted} \ge i) = E[\alpha^i]`.

    .. math:: E[\alpha^i] = \prod_{j=0}^{i-1} \frac{a + j}{a + b + j}

    Two means follow. Over *rounds of equally many rounds per request* tokens per round are :math:`\sum_i E[\alpha^i]`
    (``survival``). Over requests of *equal output length* a poor request takes more rounds, and the pool shows
    :math:`1 / E[1 / E_\gamma(\alpha)]` (``pooled_tokens``), which is less.

    Source
    ------
    Derivation (moments of the Beta law).
    """

    a: float  # [-]
    b: float  # [-]

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, name, "must be finite and above 0 [-]", value)

    @classmethod
    def from_moments(cls, mean: float, spread: float) -> BetaMixture:
        r"""Return the Beta law with that mean and standard deviation of alpha over requests.

        Raises
        ------
        InputError
            Unless 0 < mean < 1 and :math:`0 < \text{spread}^2 < \text{mean} (1 - \text{mean})`.
        """
        require(0 < mean < 1, "mean", "must lie inside (0, 1) [-]", mean)
        top = math.sqrt(mean * (1 - mean))
        require(0 < spread < top, "spread", f"must lie inside (0, {top:.3g}) [-]", spread)
        size = mean * (1 - mean) / spread**2 - 1
        return cls(mean * size, (1 - mean) * size)

    def survival(self, length: int) -> Array:
        """Return P(accepted >= i) for i = 0 .. length, every request weighing the same [-]."""
        j = np.arange(length, dtype=float)
        return np.concatenate([[1.0], np.cumprod((self.a + j) / (self.a + self.b + j))])

    def quantile(self, share: ArrayLike) -> Array:
        """Return the alpha_iid that this share of requests does not exceed [-]; of uniform numbers, a draw."""
        return np.asarray(betaincinv(self.a, self.b, np.asarray(share, dtype=float)))

    def pooled_tokens(self, length: int, nodes: int = 64) -> float:
        r"""Return tokens over rounds when every request emits equally many tokens, :math:`1 / E[1 / E_\gamma(\alpha)]`.

        By Gauss-Jacobi quadrature with ``nodes`` nodes.

        Examples
        --------
        >>> law = BetaMixture.from_moments(0.7, 0.15)
        >>> law.pooled_tokens(4) < float(law.survival(4).sum())
        True
        """
        alpha, weight = roots_sh_jacobi(nodes, self.a + self.b - 1, self.a)
        inverse = 1 / tokens_per_round(alpha, length)
        return float(weight.sum() / (weight @ inverse))

    @property
    def in_batch(self) -> InBatch:
        """The law of the rounds that a batch shows."""
        return InBatch(self)


@dataclass(frozen=True, slots=True)
class InBatch:
    r"""Accepted tokens of a round met in a batch, where a poor request is met more often because it takes more rounds.

    .. math:: P(\text{accepted} \ge i) = \frac{E[\alpha^i / E_\gamma(\alpha)]}{E[1 / E_\gamma(\alpha)]}

    with expectations over requests, whose outputs do not depend on alpha: a request takes
    :math:`L / E_\gamma(\alpha)` rounds, and each is met as often. Its mean is ``pooled_tokens``. The law depends on the
    draft length, unlike the others.

    Source
    ------
    Derivation (length-biased sampling).

    Examples
    --------
    >>> law = BetaMixture.from_moments(0.7, 0.15)
    >>> bool(abs(law.in_batch.survival(4).sum() - law.pooled_tokens(4)) < 1e-9)
    True
    """

    over_requests: BetaMixture
    nodes: int = 64  # of the Gauss-Jacobi quadrature [-]

    def survival(self, length: int) -> Array:
        """Return P(accepted >= i) for i = 0 .. length in rounds of that draft length [-]."""
        law = self.over_requests
        alpha, weight = roots_sh_jacobi(self.nodes, law.a + law.b - 1, law.a)
        rounds = weight / tokens_per_round(alpha, length)
        return np.asarray((alpha[:, None] ** np.arange(length + 1.0)).T @ rounds / rounds.sum())


@dataclass(frozen=True, slots=True)
class Histogram:
    r"""Accepted tokens per round as counted: :math:`P(\text{accepted} \ge i) = \sum_{k \ge i} n_k / \sum_k n_k`.

    Assumes
    -------
    Acceptance by position does not depend on the draft length: shorter drafts are the counted ones cut off.
    """

    counts: tuple[int, ...]  # rounds that accepted 0, 1, ..., gamma tokens
    extrapolate: bool = False  # whether the last position's acceptance is held beyond gamma

    def __post_init__(self) -> None:
        ok = len(self.counts) >= 2 and min(self.counts) >= 0 and sum(self.counts) > 0
        require(ok, "counts", "must hold at least two counts of at least 0, not all 0 [rounds]", self.counts)

    def survival(self, length: int) -> Array:
        """Return P(accepted >= i) for i = 0 .. length [-]."""
        _within(length, len(self.counts) - 1, self.extrapolate, "the histogram")
        at_least = np.cumsum(np.asarray(self.counts, dtype=float)[::-1])[::-1]
        conditional = at_least[1:] / np.where(at_least[:-1] > 0, at_least[:-1], 1.0)
        return _hold_last(conditional, length)

    def iid(self, level: float = 0.9) -> Acceptance:
        """Return the one alpha_iid that these counts make likeliest, with its interval; see :func:`counted`."""
        accepted = sum(k * n for k, n in enumerate(self.counts))
        return counted(accepted, sum(self.counts[:-1]), level)


def counted(accepted: int, rejected: int, level: float = 0.9) -> Acceptance:
    r"""Return alpha_iid from counts of accepted and rejected tokens, with the equal-tailed Jeffreys interval.

    .. math:: \hat\alpha = \frac{n_a}{n_a + n_r}

    the maximum-likelihood estimate of the capped geometric law: a round contributes its accepted tokens, and one
    rejection unless all were accepted. Tokens drafted after a rejection were never tested and do not count.

    Raises
    ------
    InputError
        If a count is negative or both are 0.

    Assumes
    -------
    Independent tokens; positive autocorrelation, which real text has, makes the interval too narrow.

    Source
    ------
    Derivation; Brown, Cai & DasGupta (2001), Statistical Science 16(2), for the interval.

    Examples
    --------
    >>> counted(800, 200).value
    0.8
    """
    require(
        min(accepted, rejected) >= 0 and accepted + rejected > 0,
        "accepted, rejected",
        "must be counts of at least 0, not both 0 [tokens]",
        (accepted, rejected),
    )
    value = accepted / (accepted + rejected)
    tail = (1 - level) / 2
    low, high = betaincinv(accepted + 0.5, rejected + 0.5, [tail, 1 - tail])
    return Acceptance(
        value, min(float(low), value), max(float(high), value), "measured", f"{accepted + rejected} tested tokens"
    )


def _probability(name: str, value: float) -> None:
    require(
        0.0 <= value <= 1.0,
        name,
        "must lie in [0, 1] [-]",
        value,
        "It is a probability per drafted token: pass 0.8, not 80.",
    )


# --- conversions -----------------------------------------------------------------------------------------------------


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
    inverted = [from_tokens_per_round(1 + length * float(f), length) for f in values.ravel()]
    return np.array(inverted, dtype=float).reshape(values.shape)


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
    from scipy.optimize import brentq

    return float(brentq(lambda a: float(tokens_per_round(a, length)) - tokens, 0.0, 1.0, xtol=1e-14))


def to_fraction(acceptance: ArrayLike, length: int) -> NDArray[np.float64]:
    r"""Return the accepted fraction :math:`(E[N] - 1) / \gamma` of an alpha_iid [-]; inverts :func:`from_fraction`.

    Raises
    ------
    InputError
        If the length is below 1.
    """
    require(length >= 1, "length", "must be at least 1 [tokens]", length)
    return np.asarray((tokens_per_round(acceptance, length) - 1) / length)

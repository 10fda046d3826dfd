r"""Speculative cascades: a draft's token kept or handed to the target, one knob from lossless speculation to a cascade.

At each position the draft has the law q and the target p over a vocabulary. The rule defers (delta = 1) or not, and
the text follows :math:`\pi = (1 - \delta) q + \delta p`, executed without loss against :math:`\pi` by speculative
sampling: a draft token v is kept with probability :math:`\min(1, \pi(v)/q(v))`. ``alpha`` is the price of a rejection
in units of quality (the loss is 1 - P(right token)), so a larger alpha defers less.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import require

Array = NDArray[np.float64]
Rule = Literal["speculation", "cascade", "chow", "difference", "optimal"]

RULES: tuple[Rule, ...] = ("speculation", "cascade", "chow", "difference", "optimal")
SUM_TOLERANCE = 1e-9  # how far from 1 a law may add up [-]


def total_variation(p: ArrayLike, q: ArrayLike) -> Array:
    r"""Return :math:`D_{TV}(p, q) = \tfrac12 \sum_v |p(v) - q(v)|` of laws over the last axis [-].

    Examples
    --------
    >>> float(total_variation([0.5, 0.5, 0.0], [0.5, 0.0, 0.5]))
    0.5
    """
    a, b = _laws(p, q)
    return np.asarray(np.abs(a - b).sum(axis=-1) / 2)


def defers(p: ArrayLike, q: ArrayLike, alpha: float, rule: Rule) -> NDArray[np.bool_]:
    r"""Return at which positions the target's law is used, shape of p without the last axis.

    .. math::
        \text{chow: } \max q < 1 - \alpha, \qquad
        \text{difference: } \max q < \max p - \alpha, \qquad
        \text{optimal: } \max q < \max p - \alpha D_{TV}(p, q)

    ``speculation`` always defers (the target's law exactly), ``cascade`` never does (the draft's law).

    Parameters
    ----------
    p, q : (..., V) arrays
        Laws of the target and the draft [-].
    alpha : float
        Price of a rejection, at least 0 [quality].
    rule : str

    Raises
    ------
    InputError
        If a law has negative entries or does not add up to 1, alpha is negative, or the rule is unknown.

    Source
    ------
    Narasimhan et al. (2025), arXiv:2405.19261. Derivation: the optimal rule minimises
    :math:`(1 - \delta)\ell(q) + \delta(\ell(p) + \alpha D_{TV}(p, q))`, linear in delta, with loss
    :math:`\ell(p) = 1 - \max p` of a calibrated law. The difference rule takes the rejection to be certain (D = 1).

    Examples
    --------
    >>> p, q = [0.9, 0.1], [0.6, 0.4]  # D = 0.3: a gain of 0.3 for at most 0.3 alpha
    >>> bool(defers(p, q, 0.5, "difference")), bool(defers(p, q, 0.5, "optimal"))
    (False, True)
    """
    a, b = _laws(p, q)
    require(alpha >= 0, "alpha", "must be at least 0 [quality]", alpha)
    require(rule in RULES, "rule", f"must be one of {RULES}", rule)
    target, draft = a.max(axis=-1), b.max(axis=-1)
    if rule in ("speculation", "cascade"):
        return np.full(draft.shape, rule == "speculation")
    limits = {"chow": 1.0 - alpha, "difference": target - alpha, "optimal": target - alpha * total_variation(a, b)}
    return np.asarray(draft < limits[rule])


def law(p: ArrayLike, q: ArrayLike, alpha: float, rule: Rule) -> Array:
    r"""Return the law of the text, :math:`\pi = (1 - \delta) q + \delta p`, (..., V) [-]."""
    a, b = _laws(p, q)
    return np.where(defers(a, b, alpha, rule)[..., None], a, b)


def token_law(p: ArrayLike, q: ArrayLike, alpha: float) -> Array:
    r"""Return the law of the token-specific rule: a draft token is kept if the target thinks well of it, (..., V) [-].

    .. math:: \pi(v) = q(v) 1[v \in A] + p(v) \sum_{u \notin A} q(u), \qquad
              A = \{v : p(v) \ge (1 - \alpha) \max p\}

    Raises
    ------
    InputError
        If alpha leaves [0, 1] or a law is refused.

    Source
    ------
    Narasimhan et al. (2025), arXiv:2405.19261, the third token-specific rule.

    Examples
    --------
    >>> token_law([0.6, 0.4, 0.0], [0.2, 0.3, 0.5], alpha=0.5).round(3).tolist()
    [0.5, 0.5, 0.0]
    """
    a, b = _laws(p, q)
    require(0 <= alpha <= 1, "alpha", "must lie in [0, 1] [-]", alpha)
    kept = np.where(a >= (1 - alpha) * a.max(axis=-1, keepdims=True), b, 0.0)
    return np.asarray(kept + a * (1.0 - kept.sum(axis=-1, keepdims=True)))


def acceptance(text: ArrayLike, q: ArrayLike) -> float:
    r"""Return the mean probability that a draft token is kept when the text is to follow a law [-].

    .. math:: E\Big[\sum_v q(v) \min(1, \pi(v)/q(v))\Big] = E[\sum_v \min(\pi(v), q(v))] = 1 - E[D_{TV}(\pi, q)]

    With :math:`\pi = (1 - \delta) q + \delta p` the rejection is :math:`\delta D_{TV}(p, q)`: only where it defers.
    Tokens per round follow from it as for lossless speculation (:func:`theory.speculation.tokens_per_round`).

    Examples
    --------
    >>> p, q = [[0.9, 0.1], [0.5, 0.5]], [[0.6, 0.4], [0.5, 0.5]]
    >>> acceptance(law(p, q, 0.0, "speculation"), q), acceptance(law(p, q, 0.0, "cascade"), q)
    (0.85, 1.0)
    """
    return round(float(1.0 - np.mean(total_variation(text, q))), 15)


def agreement(text: ArrayLike, p: ArrayLike) -> float:
    r"""Return the mean probability, under the target's law, of a token of the text, :math:`E[\sum_v \pi(v) p(v)]` [-].

    The expected quality where p is the law of the right token. It is largest for greedy text, not for p itself.
    """
    a, b = _laws(text, p)
    return float(np.mean((a * b).sum(axis=-1)))


def objective(p: ArrayLike, q: ArrayLike, alpha: float, deferred: NDArray[np.bool_]) -> float:
    r"""Return the mean loss with the price of rejections of a rule given by where it defers [quality].

    .. math:: E[(1 - \delta)(1 - \max q) + \delta (1 - \max p + \alpha D_{TV}(p, q))]

    Assumes
    -------
    Calibrated laws, so that 1 - max is the error of the most likely token.
    """
    a, b = _laws(p, q)
    handed = 1.0 - a.max(axis=-1) + alpha * total_variation(a, b)
    return float(np.mean(np.where(deferred, handed, 1.0 - b.max(axis=-1))))


def draft_reuse_tokens(length: int, accepted: float) -> float:
    r"""Return how many leading tokens of a rejected answer the next tier keeps when it verifies it as a draft [tokens].

    .. math:: E[N] = \sum_{i=1}^{n} a^i = \frac{a (1 - a^n)}{1 - a}

    One verification pass then replaces as many decode steps: at acceptance 0.8 about four tokens, so reuse of a whole
    answer pays only where tiers agree almost always.

    Parameters
    ----------
    length : int
        n, tokens of the rejected answer [tokens].
    accepted : float
        a, probability that a token is kept given that those before it were [-].

    Assumes
    -------
    The same acceptance at each token, independently.

    Raises
    ------
    InputError
        If the length is negative or the acceptance is no probability.

    Examples
    --------
    >>> round(draft_reuse_tokens(200, 0.8), 3), draft_reuse_tokens(200, 1.0)
    (4.0, 200.0)
    """
    require(length >= 0, "length", "must be at least 0 [tokens]", length)
    require(0 <= accepted <= 1, "accepted", "must lie in [0, 1] [-]", accepted)
    return float(length) if accepted == 1.0 else accepted * (1 - accepted**length) / (1 - accepted)


def _laws(p: ArrayLike, q: ArrayLike) -> tuple[Array, Array]:
    """Return two laws as arrays of one shape after checking them."""
    a, b = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    require(a.ndim > 0 and a.shape == b.shape, "q", f"must have the shape of the other law {a.shape}", b.shape)
    for name, value in (("p", a), ("q", b)):
        off = float(np.abs(value.sum(axis=-1) - 1.0).max(initial=0.0))
        require(bool(np.all(value >= 0)) and off <= SUM_TOLERANCE, name, "must be at least 0 and add up to 1 [-]", off)
    return a, b

"""Joint laws of (right, level) over the tiers, fitted: latent classes, item response, a chain of confidences.

Each is fitted by maximum likelihood and becomes a table (:class:`theory.outcomes.Outcomes`), which the dynamic
programme plans on and from which the simulator draws; :func:`log_likelihood` compares any two tables on prompts
neither has seen. Lengths of answers follow from who is right and the level shown: wrong answers are longer, so costs
rise with failure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_expit, logsumexp, ndtri

from theory.errors import require
from theory.outcomes import Outcomes, draw

from .outcome_models import Levels, fold_of

Array = NDArray[np.float64]
Family = Literal["gaussian", "gumbel"]

ROUNDS = 200  # EM steps at most [-]
GAIN = 1e-6  # EM stops when a step adds less than this to the mean log likelihood [nat]
PSEUDO_COUNT = 1.0  # weight of the marginal law in each class: one prompt [-]
CLASSES = (1, 2, 3, 4, 6, 8, 12)  # numbers of classes compared by default [-]
NODES = 21  # Gauss-Hermite nodes of the ability; 41 change the fitted likelihoods by less than 1e-4 nat [-]
PRIOR = 10.0  # standard deviation of the normal prior on item parameters: 100 prompts outweigh it everywhere [-]
TINY = 1e-12  # probabilities are kept above this in a logarithm [-]
_CHUNK = 2**22  # numbers held at once in a likelihood [-]


def log_likelihood(table: Outcomes, correct: ArrayLike, level: ArrayLike) -> float:
    r"""Return the mean log likelihood of prompts under a table [nat/prompt].

    .. math:: \frac1n \sum_n \ln \sum_r w_r \prod_k q_{rk}^{c_{nk}} (1 - q_{rk})^{1 - c_{nk}} P(l_{nk} \mid r, k)

    Parameters
    ----------
    table : Outcomes
    correct, level : (n, K) arrays
        0 or 1; the level shown, below the levels of the table.

    Assumes
    -------
    Within a row whose quality lies strictly between 0 and 1 the answer is right independently of the level shown.

    Raises
    ------
    InputError
        If shapes disagree, outcomes are not 0 or 1, or a level is outside the table's.

    Examples
    --------
    >>> from theory.outcomes import from_patterns
    >>> coin = from_patterns(("a",), {"1": 0.5, "0": 0.5})
    >>> round(log_likelihood(coin, [[1], [0]], [[0], [0]]), 4)
    -0.6931
    """
    c, lv = _checked(correct, level, table.levels)
    require(c.shape[1] == len(table.tiers), "correct", f"must have {len(table.tiers)} columns", c.shape)
    found, k = np.empty(len(c)), np.arange(c.shape[1])
    step = max(1, _CHUNK // (len(table.weight) * c.shape[1]))
    for i in range(0, len(c), step):
        at = slice(i, i + step)
        right = np.where(c[at][:, None, :] == 1, table.correct, 1.0 - table.correct)  # (step, R, K)
        shown = table.signal[:, k, lv[at]].transpose(1, 0, 2)
        found[at] = (right * shown).prod(axis=2) @ table.weight
    return float(np.log(np.maximum(found, TINY)).mean())


def _checked(correct: ArrayLike, level: ArrayLike, levels: int) -> tuple[NDArray[np.generic], Levels]:
    c, lv = np.asarray(correct), np.asarray(level).astype(np.intp)
    require(c.ndim == 2 and c.size > 0, "correct", "must have shape (prompts, tiers)", c.shape)
    require(lv.shape == c.shape, "level", f"must have shape {c.shape}", lv.shape)
    require(bool(np.isin(c, (0, 1)).all()), "correct", "must hold 0 and 1 [-]", np.unique(c)[:4].tolist())
    inside = bool(lv.min() >= 0 and lv.max() < levels)
    require(inside, "level", f"must lie in 0..{levels - 1}", (int(lv.min()), int(lv.max())))
    return c, lv


# ---------------------------------------------------------------- latent classes


@dataclass(frozen=True, eq=False)
class LatentClasses:
    """Shares of Z classes and, in each, the joint law of (right, level) of each tier."""

    share: Array  # (Z,) [-]
    emission: Array  # (Z, K, 2, L) P(right = c, level = l | class) of each tier [-]

    def outcomes(self, tiers: Sequence[str]) -> Outcomes:
        r"""Return the table with one row for each class and pattern of right and wrong.

        .. math:: w_{zc} = \pi_z \prod_k P(c_k \mid z), \qquad P(l_k \mid z, c_k)
        """
        right = self.emission.sum(axis=3)  # (Z, K, 2)
        signal = self.emission / right[..., None]
        patterns = list(product((0, 1), repeat=right.shape[1]))
        k = np.arange(right.shape[1])
        weight = np.stack([self.share * right[:, k, p].prod(axis=1) for p in patterns], axis=1)
        shown = np.stack([signal[:, k, p] for p in patterns], axis=1)
        correct = np.tile(np.array(patterns, dtype=np.float64), (len(self.share), 1))
        return Outcomes(tuple(tiers), weight.ravel() / weight.sum(), correct, shown.reshape(-1, *shown.shape[2:]))


def latent_classes(
    correct: ArrayLike, level: ArrayLike, levels: int, classes: int, rng: np.random.Generator
) -> LatentClasses:
    r"""Return the mixture fitted by expectation maximisation from a random start.

    .. math:: P(c, l) = \sum_z \pi_z \prod_k \theta_{zk}(c_k, l_k)

    Each class starts from, and is pulled towards, the marginal law of the tier with the weight of one prompt
    (``PSEUDO_COUNT``): no level is impossible in a class for want of prompts.

    Parameters
    ----------
    correct : (n, K) array
        0 or 1 [-].
    level : (n, K) array of integers in 0..levels - 1
    levels, classes : int
        L and Z, at least 1 [-].
    rng : numpy.random.Generator

    Raises
    ------
    InputError
        If shapes disagree, outcomes are not 0 or 1, or a level is outside its range.

    Source
    ------
    Dempster, Laird & Rubin (1977); Goodman (1974), latent class analysis; Dirichlet prior centred at the marginals.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> easy = rng.uniform(size=2000) < 0.6
    >>> right = rng.uniform(size=(2, 2000)) < np.where(easy, 0.95, 0.1)
    >>> fit = latent_classes(right.T, np.zeros((2000, 2)), levels=1, classes=2, rng=rng)
    >>> bool(np.abs(fit.share.max() - 0.6) < 0.05)
    True
    """
    c, lv = _checked(correct, level, levels)
    require(classes >= 1, "classes", "must be at least 1 [-]", classes)
    n = len(c)
    seen = _one_hot(c, lv, levels)
    prior = _marginal(seen)
    if classes == 1:
        return LatentClasses(np.ones(1), prior[None])
    belong = rng.dirichlet(np.full(classes, 0.5), size=n)
    share, emission = _maximise(seen, belong, prior)
    before = -np.inf
    for _ in range(ROUNDS):
        logs = seen.reshape(n, -1) @ np.log(emission.reshape(classes, -1)).T + np.log(share)
        total = logsumexp(logs, axis=1)
        if total.mean() - before < GAIN:
            break
        before = total.mean()
        share, emission = _maximise(seen, np.exp(logs - total[:, None]), prior)
    return LatentClasses(share, emission)


def _one_hot(correct: NDArray[np.generic], level: NDArray[np.generic], levels: int) -> Array:
    """Return which (right, level) each tier showed, (n, K, 2, L)."""
    code = correct.astype(np.intp) * levels + level.astype(np.intp)
    return np.asarray((code[:, :, None] == np.arange(2 * levels)).astype(np.float64).reshape(*code.shape, 2, levels))


def _marginal(seen: Array) -> Array:
    """Return P(right, level) of each tier over all prompts, with half a prompt in each cell, (K, 2, L)."""
    count = seen.sum(axis=0) + 0.5
    return np.asarray(count / count.sum(axis=(1, 2), keepdims=True))


def _maximise(seen: Array, belong: Array, prior: Array) -> tuple[Array, Array]:
    """Return shares and emissions given how much each prompt belongs to each class, (n, Z)."""
    share = belong.sum(axis=0) + PSEUDO_COUNT
    count = np.tensordot(belong.T, seen, axes=1) + PSEUDO_COUNT * prior
    return share / share.sum(), count / count.sum(axis=(2, 3), keepdims=True)


def average(models: Sequence[LatentClasses]) -> LatentClasses:
    """Return the equal mixture of mixtures: all their classes, shares divided by their number.

    Raises
    ------
    InputError
        If no model is given.
    """
    require(len(models) > 0, "models", "must be at least one", len(models))
    share = np.concatenate([m.share for m in models]) / len(models)
    return LatentClasses(share, np.concatenate([m.emission for m in models]))


def choose_classes(
    correct: ArrayLike,
    level: ArrayLike,
    levels: int,
    rng: np.random.Generator,
    candidates: Sequence[int] = CLASSES,
    folds: int = 3,
) -> tuple[int, dict[int, float]]:
    """Return the number of classes with the best held-out log likelihood, and that of each candidate [nat/prompt]."""
    c, lv = np.asarray(correct), np.asarray(level)
    fold = fold_of(len(c), folds, rng)
    names, score = [str(k) for k in range(c.shape[1])], {}
    for z in candidates:
        held = []
        for f in range(folds):
            train, test = fold != f, fold == f
            table = latent_classes(c[train], lv[train], levels, z, rng).outcomes(names)
            held.append(log_likelihood(table, c[test], lv[test]))
        score[z] = float(np.mean(held))
    return max(score, key=lambda z: score[z]), score


# ---------------------------------------------------------------- latent difficulty (item response)


@dataclass(frozen=True, eq=False)
class ItemResponse:
    r"""Two-parameter logistic item response with graded signals; the ability theta is N(0, 1) over the prompts.

    .. math:: P(c_k = 1 \mid \theta) = \sigma(a_k(\theta - b_k)), \qquad
              P(l_k \ge l \mid \theta, c_k) = \sigma(\alpha_k \theta + \delta_k c_k - \tau_{kl})

    theta is how easy the prompt is for all tiers at once.
    """

    discrimination: Array  # (K,) a, how sharply a tier separates easy from hard prompts [-]
    difficulty: Array  # (K,) b, the ease at which a tier is right half the time [-]
    sight: Array  # (K,) alpha, how much a signal says of the ease beyond the outcome [-]
    verdict: Array  # (K,) delta, how much it says of the outcome itself [-]
    cuts: Array  # (K, L - 1) tau, non-decreasing [-]

    def outcomes(self, tiers: Sequence[str], nodes: int = NODES) -> Outcomes:
        """Return the table with a row for each Gauss-Hermite node of theta and pattern of right and wrong."""
        theta, share = _nodes(nodes)
        emission = np.exp(np.stack([_log_item(p, theta)[0] for p in self._parameters()], axis=1))
        return LatentClasses(share, emission).outcomes(tiers)

    def _parameters(self) -> Array:
        slope = np.stack([self.discrimination, -self.discrimination * self.difficulty, self.sight, self.verdict])
        return np.concatenate([slope.T, self.cuts], axis=1)


def item_response(correct: ArrayLike, level: ArrayLike, levels: int, nodes: int = NODES) -> ItemResponse:
    r"""Return the parameters of largest marginal likelihood.

    .. math:: \sum_n \ln \int \phi(\theta) \prod_k P(c_{nk} \mid \theta)\, P(l_{nk} \mid \theta, c_{nk})\, d\theta

    The integral is a Gauss-Hermite sum; its gradient is that of the expected complete likelihood (Fisher's identity).

    Parameters
    ----------
    correct, level : (n, K) arrays
        As in :func:`latent_classes`; two tiers or more, else theta cannot be told from chance.
    levels, nodes : int
        L, and the number of nodes [-].

    Raises
    ------
    InputError
        If data are refused as in :func:`latent_classes`, or there is a single tier.

    Source
    ------
    Bock & Aitkin (1981), Psychometrika 46:443-459, marginal maximum likelihood; Birnbaum (1968), the 2PL; Samejima
    (1969), graded responses.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> theta = rng.normal(size=4000)
    >>> right = rng.random((3, 4000)) < expit(np.outer([1.5, 1.5, 1.5], theta) + [[0.0], [1.0], [1.5]])
    >>> fit = item_response(right.T, np.zeros((4000, 3)), levels=1)
    >>> bool(np.abs(fit.discrimination - 1.5).max() < 0.25)
    True
    """
    c, lv = _checked(correct, level, levels)
    n, tiers = c.shape
    require(tiers >= 2, "correct", "must have at least 2 tiers", tiers)
    seen = _one_hot(c, lv, levels)
    marginal = _marginal(seen)
    theta, share = _nodes(nodes)
    start = np.stack([_start(m) for m in marginal])
    flat = seen.reshape(n, -1)

    def loss(x: Array) -> tuple[float, Array]:
        steps = x.reshape(tiers, -1)
        items = [_log_item(_with_cuts(s), theta) for s in steps]
        logs = flat @ np.stack([i[0] for i in items], axis=1).reshape(nodes, -1).T + np.log(share)
        total = logsumexp(logs, axis=1)
        expected = (np.exp(logs - total[:, None]).T @ flat).reshape(nodes, tiers, 2, levels)
        slope = [_chain(s, np.einsum("zcl,zclp->p", expected[:, k], items[k][1])) for k, s in enumerate(steps)]
        # a wide prior: a level nobody shows, or a separable handful, drives nothing to infinity
        return float(0.5 * (x @ x) / (PRIOR**2 * n) - total.mean()), x / (PRIOR**2 * n) - np.concatenate(slope) / n

    fit = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    found = np.stack([_with_cuts(s) for s in fit.x.reshape(tiers, -1)])
    if found[:, 0].sum() < 0:  # theta and -theta have the same likelihood
        found[:, (0, 2)] *= -1
    a = np.where(np.abs(found[:, 0]) < TINY, TINY, found[:, 0])
    return ItemResponse(a, -found[:, 1] / a, found[:, 2], found[:, 3], found[:, 4:])


def _nodes(nodes: int) -> tuple[Array, Array]:
    """Return Gauss-Hermite nodes and weights of N(0, 1)."""
    at, weight = np.polynomial.hermite_e.hermegauss(nodes)
    return np.asarray(at), np.asarray(weight / weight.sum())


def _start(marginal: Array) -> Array:
    """Return (a, -ab, alpha, delta, first cut, log steps) that give the marginal law of a tier with little theta."""
    right = marginal[1].sum() / marginal.sum()
    above = 1.0 - np.cumsum(marginal.sum(axis=0))[:-1]
    cuts = 0.5 - np.log(above / (1.0 - above))
    steps = np.log(np.maximum(np.diff(cuts), 1e-3))
    return np.concatenate([[1.0, math.log(right / (1.0 - right)), 0.5, 1.0], cuts[:1], steps])


def _with_cuts(steps: Array) -> Array:
    """Return (a, -ab, alpha, delta, cuts) from (..., first cut, log steps): cuts cannot cross."""
    rise = np.exp(np.minimum(steps[5:], 5.0))
    return np.concatenate([steps[:4], steps[4:5], steps[4:5] + np.cumsum(rise)])


def _chain(steps: Array, slope: Array) -> Array:
    """Return the gradient in (..., first cut, log steps) from that in (..., cuts)."""
    if len(slope) == 4:
        return slope
    later = np.cumsum(slope[:3:-1])[::-1]  # sum over this cut and the ones above
    rise = np.where(steps[5:] < 5.0, np.exp(np.minimum(steps[5:], 5.0)), 0.0)
    return np.concatenate([slope[:4], later[:1], later[1:] * rise])


def _log_item(item: Array, theta: Array) -> tuple[Array, Array]:
    """Return ln P(right = c, level = l | theta) of a tier, (Z, 2, L), and its gradient, (Z, 2, L, 4 + L - 1)."""
    a, d, alpha, delta = item[:4]
    cuts, Z = item[4:], len(theta)
    L, c = len(cuts) + 1, np.array([0.0, 1.0])
    odds = a * theta + d
    eta = alpha * theta[:, None] + delta * c  # (Z, 2)
    above = np.ones((Z, 2, L + 1))  # P(level >= l), 1 at l = 0 and 0 at l = L
    above[..., 1:L] = expit(eta[..., None] - cuts)
    above[..., L] = 0.0
    p = np.maximum(above[..., :-1] - above[..., 1:], TINY)
    bend = above * (1.0 - above)
    log_right = np.stack([log_expit(-odds), log_expit(odds)], axis=1)
    surprise = c - expit(odds)[:, None]  # (Z, 2)
    by_eta = (bend[..., :-1] - bend[..., 1:]) / p
    slope = np.zeros((Z, 2, L, 3 + L))
    slope[..., 0] = (surprise * theta[:, None])[..., None]
    slope[..., 1] = surprise[..., None]
    slope[..., 2], slope[..., 3] = by_eta * theta[:, None, None], by_eta * c[:, None]
    at = np.arange(L - 1)
    slope[..., at + 1, 4 + at] = -bend[..., 1:L] / p[..., 1:]
    slope[..., at, 4 + at] = bend[..., 1:L] / p[..., :-1]
    return log_right[..., None] + np.log(p), slope


# ---------------------------------------------------------------- a chain of confidences (copulas)


@dataclass(frozen=True, eq=False)
class ConfidenceChain:
    r"""A Markov chain of confidence levels whose neighbours are joined by copulas; outcomes follow the own level.

    .. math:: P(l, c) = P(l_1) \prod_{k > 1} P(l_k \mid l_{k-1}) \prod_k P(c_k \mid l_k)
    """

    family: Family
    dependence: Array  # (K - 1,) rho of the Gaussian copula, in (-1, 1), or theta of Gumbel's, at least 1 [-]
    share: Array  # (K, L) marginal law of the levels [-]
    right: Array  # (K, L) P(right | own level) [-]

    def outcomes(self, tiers: Sequence[str]) -> Outcomes:
        """Return the table with a row for each vector of levels that can occur."""
        K, L = self.share.shape
        law = self.share[0]
        for k in range(1, K):
            step = rectangles(self.share[k - 1], self.share[k], self.family, float(self.dependence[k - 1]))
            law = law[..., None] * (step / step.sum(axis=1, keepdims=True)).reshape((1,) * (k - 1) + (L, L))
        level = np.argwhere(law > 0)
        weight = law[law > 0]
        correct = np.take_along_axis(self.right, level.T, axis=1).T
        signal = (level[:, :, None] == np.arange(L)).astype(np.float64)
        return Outcomes(tuple(tiers), weight / weight.sum(), correct, signal)


def confidence_chain(correct: ArrayLike, level: ArrayLike, levels: int, family: Family = "gumbel") -> ConfidenceChain:
    r"""Return the chain fitted by maximum likelihood: margins from counts, then one dependence for each step.

    Margins have half a prompt in each cell, and P(right | level) one prompt at the tier's accuracy.

    Parameters
    ----------
    correct, level : (n, K) arrays
        As in :func:`latent_classes`.
    levels : int
    family : "gumbel" or "gaussian"
        Gumbel's copula ties the highest confidences more than the lowest.

    Assumes
    -------
    A tier's outcome depends on nothing but its own level, a level on nothing but that of the tier before: what the
    other tiers' outcomes and earlier levels tell beyond that is lost.

    Raises
    ------
    InputError
        If the family is not known, or data are refused as in :func:`latent_classes`.

    Source
    ------
    Zellinger & Thomson (2025), arXiv:2501.09345, Markov factorisation with Gumbel copulas, here on levels; margins
    first: Joe (1997), inference functions for margins.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> z = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 4000)
    >>> level = (z[:, :, None] > [-0.5, 0.5]).sum(axis=2)
    >>> fit = confidence_chain(np.ones((4000, 2)), level, 3, "gaussian")
    >>> bool(abs(fit.dependence[0] - 0.6) < 0.05)
    True
    """
    c, lv = _checked(correct, level, levels)
    require(family in ("gaussian", "gumbel"), "family", "must be gaussian or gumbel", family)
    count = _one_hot(c, lv, levels).sum(axis=0)  # (K, 2, L)
    share = count.sum(axis=1) + 0.5
    share /= share.sum(axis=1, keepdims=True)
    accuracy = count[:, 1].sum(axis=1, keepdims=True) / len(c)
    right = (count[:, 1] + accuracy) / (count.sum(axis=1) + 1.0)
    dependence = [_dependence(share[k - 1 : k + 1], lv[:, k - 1 : k + 1], family) for k in range(1, c.shape[1])]
    return ConfidenceChain(family, np.array(dependence), share, right)


def _dependence(share: Array, level: Levels, family: Family) -> float:
    """Return the dependence of largest likelihood of a pair of levels; margins given."""
    levels = share.shape[1]
    count = np.bincount(level[:, 0] * levels + level[:, 1], minlength=levels**2).reshape(levels, levels)

    def loss(x: float) -> float:
        return -float((count * np.log(rectangles(share[0], share[1], family, x))).sum())

    bounds = (-0.99, 0.99) if family == "gaussian" else (1.0, 20.0)
    return float(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4}).x)


def rectangles(first: Array, second: Array, family: Family, dependence: float) -> Array:
    r"""Return P(both levels) = the copula's mass of each rectangle of the two marginal laws, (L, L) [-].

    .. math:: C_{\rho}(u, v) = \Phi_2(\Phi^{-1}u, \Phi^{-1}v; \rho), \qquad
              C_{\theta}(u, v) = \exp(-((-\ln u)^\theta + (-\ln v)^\theta)^{1/\theta})

    Examples
    --------
    >>> rectangles(np.array([0.5, 0.5]), np.array([0.5, 0.5]), "gaussian", 0.5).round(4).tolist()  # 1/4 + asin/(2 pi)
    [[0.3333, 0.1667], [0.1667, 0.3333]]
    >>> rectangles(np.array([0.4, 0.6]), np.array([0.5, 0.5]), "gumbel", 1.0).round(2).tolist()
    [[0.2, 0.2], [0.3, 0.3]]
    """
    u, v = (np.cumsum(p)[:-1] for p in (first, second))
    inner = _gaussian(u, v, dependence) if family == "gaussian" else _gumbel(u, v, dependence)
    full = np.zeros((len(first) + 1, len(second) + 1))
    full[1:-1, 1:-1] = inner
    full[-1, 1:-1], full[1:-1, -1], full[-1, -1] = v, u, 1.0
    return np.maximum(np.diff(np.diff(full, axis=0), axis=1), TINY)


def _gaussian(u: Array, v: Array, rho: float) -> Array:
    r"""Return C(u_i, v_j) = u v + \int_0^{asin rho} exp(-(h^2 + k^2 - 2 h k sin t) / (2 cos^2 t)) dt / 2 pi.

    Plackett (1954), Biometrika 41:351-360, in the angle.
    """
    at, weight = np.polynomial.legendre.leggauss(32)
    angle = math.asin(rho) * (at + 1) / 2
    h, k = ndtri(u)[:, None, None], ndtri(v)[None, :, None]
    density = np.exp(-(h**2 + k**2 - 2 * h * k * np.sin(angle)) / (2 * np.cos(angle) ** 2))
    return np.asarray(np.outer(u, v) + density @ weight * math.asin(rho) / (4 * math.pi))


def _gumbel(u: Array, v: Array, theta: float) -> Array:
    x, y = -np.log(u)[:, None], -np.log(v)[None, :]
    return np.asarray(np.exp(-((x**theta + y**theta) ** (1.0 / theta))))


# ---------------------------------------------------------------- lengths of answers


class Draws(NamedTuple):
    """What n simulated prompts would show of each of K tiers if it were run."""

    correct: Array  # (n, K) 0 or 1 [-]
    level: Levels  # (n, K)
    length: Array  # (n, K) length of the answer [that of the lengths fitted]


def resample(correct: ArrayLike, level: ArrayLike, length: ArrayLike, n: int, rng: np.random.Generator) -> Draws:
    """Return n real prompts drawn with replacement, each with all that it showed: no model between data and simulator.

    Raises
    ------
    InputError
        If shapes disagree, or data are refused as in :func:`latent_classes`.

    Examples
    --------
    >>> seen = resample([[1, 0]], [[2, 0]], [[30, 70]], n=2, rng=np.random.default_rng(0))
    >>> seen.length.tolist()
    [[30.0, 70.0], [30.0, 70.0]]
    """
    c, lv = _checked(correct, level, int(np.max(level)) + 1)
    size = np.asarray(length, dtype=np.float64)
    require(size.shape == c.shape, "length", f"must have shape {c.shape}", size.shape)
    row = rng.integers(0, len(c), n)
    return Draws(c[row].astype(np.float64), lv[row], size[row])


@dataclass(frozen=True, eq=False)
class Lengths:
    """Lengths of answers by tier, outcome and level: the answers seen, sorted into cells."""

    sorted: tuple[Array, ...]  # K arrays (n,) of lengths, cell after cell (wrong first, then by level) [own]
    begin: NDArray[np.intp]  # (K, 2, L) where a cell begins
    end: NDArray[np.intp]  # (K, 2, L) and ends; an empty cell is that of the outcome at all levels

    def mean(self) -> Array:
        """Return E[length | tier, outcome, level], (K, 2, L)."""
        total = np.stack([np.concatenate([[0.0], np.cumsum(x)]) for x in self.sorted])
        k = np.arange(len(self.sorted))[:, None, None]
        return np.asarray((total[k, self.end] - total[k, self.begin]) / (self.end - self.begin))

    def expected(self, table: Outcomes) -> Array:
        r"""Return E[length | row], (R, K): times a price, the costs of each row for the dynamic programme.

        .. math:: \sum_l P(l \mid r, k)\, (q_{rk} m_{k1l} + (1 - q_{rk}) m_{k0l})
        """
        mean = self.mean()
        wrong, right = (np.einsum("rkl,kl->rk", table.signal, mean[:, c]) for c in (0, 1))
        return np.asarray(table.correct * right + (1.0 - table.correct) * wrong)

    def draw(self, table: Outcomes, n: int, rng: np.random.Generator) -> Draws:
        """Return n prompts drawn from a table, each answer as long as one seen of its tier, outcome and level."""
        row, level = draw(table, n, rng)
        right = (rng.random(level.shape) < table.correct[row]).astype(np.intp)
        k = np.arange(level.shape[1])
        begin, end = self.begin[k, right, level], self.end[k, right, level]
        pick = begin + (rng.random(level.shape) * (end - begin)).astype(np.intp)
        length = np.stack([self.sorted[j][pick[:, j]] for j in k], axis=1)
        return Draws(right.astype(np.float64), level, length)


def fit_lengths(correct: ArrayLike, level: ArrayLike, length: ArrayLike, levels: int) -> Lengths:
    """Return the lengths seen of each tier, outcome and level.

    Parameters
    ----------
    correct, level : (n, K) arrays
        As in :func:`latent_classes`.
    length : (n, K) array
        Lengths of the answers, at least 0 [tokens, or any unit].
    levels : int

    Assumes
    -------
    Lengths of different tiers are independent given outcomes and levels. An outcome that a tier never has gets the
    lengths of all its answers.

    Raises
    ------
    InputError
        If a length is negative or not finite, or data are refused as in :func:`latent_classes`.

    Examples
    --------
    >>> fit = fit_lengths([[1], [1], [0], [0]], [[0], [0], [0], [0]], [[10], [14], [20], [30]], levels=1)
    >>> fit.mean().tolist()
    [[[25.0], [12.0]]]
    """
    c, lv = _checked(correct, level, levels)
    size = np.asarray(length, dtype=np.float64)
    require(size.shape == c.shape, "length", f"must have shape {c.shape}", size.shape)
    good = bool(np.all(np.isfinite(size) & (size >= 0)))
    require(good, "length", "must be finite and at least 0", float(np.nanmin(size)))
    code = c.astype(np.intp) * levels + lv
    ordered, begin, end = [], [], []
    for k in range(c.shape[1]):
        ordered.append(size[np.argsort(code[:, k], kind="stable"), k])
        count = np.bincount(code[:, k], minlength=2 * levels).reshape(2, levels)
        last = np.cumsum(count).reshape(2, levels)
        first = last - count
        whole = np.stack([first[:, :1], last[:, -1:]])  # of the outcome at all levels
        whole = np.where(whole[1] > whole[0], whole, np.array([0, len(c)])[:, None, None])
        begin.append(np.where(count > 0, first, whole[0]))
        end.append(np.where(count > 0, last, whole[1]))
    return Lengths(tuple(ordered), np.stack(begin), np.stack(end))

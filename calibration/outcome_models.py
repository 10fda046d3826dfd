"""From scores to a table of outcomes on real prompts: calibration, levels, regression on the scores of all tiers.

A prompt shows, for each tier, whether the answer was right and a score (a confidence, minus a length). The score is
calibrated to P(right) and cut into levels; the outcomes are regressed on the scores. Joint laws of (right, level) with
parameters are in :mod:`calibration.joint_models`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit

from theory.errors import require
from theory.outcomes import Outcomes

Array = NDArray[np.float64]
Levels = NDArray[np.intp]
Method = Literal["isotonic", "platt", "beta"]

METHODS: tuple[Method, ...] = ("platt", "beta", "isotonic")
EDGE = 1e-6  # scores and probabilities are kept this far from 0 and 1 [-]
ROUNDS = 500  # scaling steps at most until a smearing keeps the shares [-]


# ---------------------------------------------------------------- probability calibration


@dataclass(frozen=True, eq=False)
class Calibrator:
    """A non-decreasing map from a score to P(right)."""

    method: Method
    at: Array  # isotonic: scores of the knots; platt, beta: coefficients [-]
    value: Array  # isotonic: probabilities at the knots; otherwise empty [-]

    def __call__(self, score: ArrayLike) -> Array:
        """Return P(right) for scores in [0, 1], of the same shape [-]."""
        s = np.clip(np.asarray(score, dtype=np.float64), EDGE, 1 - EDGE)
        if self.method == "isotonic":
            return np.asarray(np.interp(s, self.at, self.value))
        return np.asarray(expit(_features(s, self.method) @ self.at))


def _features(score: Array, method: Method) -> Array:
    r"""Return (1, logit s) for Platt, (1, ln s, -ln(1 - s)) for beta calibration, (..., 2 or 3)."""
    parts = [np.log(score) - np.log1p(-score)] if method == "platt" else [np.log(score), -np.log1p(-score)]
    return np.stack([np.ones_like(score), *parts], axis=-1)


def fit_calibrator(score: ArrayLike, correct: ArrayLike, method: Method) -> Calibrator:
    r"""Return the map fitted by maximum likelihood (isotonic: least squares, the same for a monotone map).

    .. math:: \text{platt: } \sigma(a + b\,\mathrm{logit}\,s),\ b \ge 0; \qquad
              \text{beta: } \sigma(a + b \ln s - c \ln(1 - s)),\ b, c \ge 0

    Parameters
    ----------
    score : (n,) array
        Scores in [0, 1], such as exp(log-probability) [-].
    correct : (n,) array
        0 or 1 [-].

    Raises
    ------
    InputError
        If lengths differ, a score leaves [0, 1], or the method is not known.

    Source
    ------
    Platt (1999); Kull, Silva Filho & Flach (2017), AISTATS, beta calibration; Zadrozny & Elkan (2002), isotonic.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> s = rng.uniform(size=4000)
    >>> right = rng.uniform(size=4000) < s**2  # overconfident
    >>> calibrated = fit_calibrator(s, right, "beta")
    >>> abs(float(calibrated(0.7)) - 0.49) < 0.03
    True
    """
    s, y = np.asarray(score, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    require(s.ndim == 1 and s.shape == y.shape and s.size > 0, "score", "must be as long as `correct`", s.shape)
    require(bool(np.all((s >= 0) & (s <= 1))), "score", "must lie in [0, 1] [-]", (float(s.min()), float(s.max())))
    require(method in METHODS, "method", f"must be one of {METHODS}", method)
    s = np.clip(s, EDGE, 1 - EDGE)
    if method == "isotonic":
        knots, at = np.unique(s, return_inverse=True)
        count = np.bincount(at).astype(np.float64)
        fit = isotonic_regression(np.bincount(at, y) / count, weights=count)
        # half a surprise in the outer blocks: at 0 or 1 a single one would cost an infinite log loss
        low, high = (1 / (2 * w + 2) for w in (fit.weights[0], fit.weights[-1]))
        return Calibrator(method, knots, np.clip(fit.x, low, 1 - high))
    x = _features(s, method)

    def loss(w: Array) -> tuple[float, Array]:
        z = x @ w
        grad = x.T @ (expit(z) - y) / len(y) + 1e-6 * w
        return float(np.mean(np.logaddexp(0, z) - y * z) + 0.5e-6 * w @ w), grad

    start = np.concatenate([[0.0], np.ones(x.shape[1] - 1)])
    bounds = [(None, None)] + [(0.0, None)] * (x.shape[1] - 1)
    fit = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return Calibrator(method, np.asarray(fit.x), np.zeros(0))


def best_calibrator(score: ArrayLike, correct: ArrayLike, rng: np.random.Generator, folds: int = 5) -> Calibrator:
    """Return the method of smallest out-of-fold log loss, fitted on all prompts given."""
    s, y = np.asarray(score, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    fold = fold_of(len(s), folds, rng)

    def loss(method: Method) -> float:
        p = np.empty_like(s)
        for f in range(folds):
            p[fold == f] = fit_calibrator(s[fold != f], y[fold != f], method)(s[fold == f])
        return log_loss(p, y)

    return fit_calibrator(s, y, min(METHODS, key=loss))


def fold_of(n: int, folds: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return the fold of each of n prompts, sizes as equal as can be, (n,).

    Raises
    ------
    InputError
        If there are fewer than 2 folds, or more than prompts.
    """
    require(2 <= folds <= n, "folds", f"must be an integer in 2..{n}, the number of prompts", folds)
    return np.asarray(rng.permutation(np.arange(n) % folds), dtype=np.intp)


def log_loss(probability: Array, correct: Array) -> float:
    """Return the mean of -ln P(what happened) [nat]."""
    p = np.clip(probability, EDGE, 1 - EDGE)
    return float(-np.mean(correct * np.log(p) + (1 - correct) * np.log1p(-p)))


def calibration_error(probability: ArrayLike, correct: ArrayLike, bins: int = 10) -> float:
    r"""Return the expected calibration error over bins of equal width [-].

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{n} |\bar y_b - \bar p_b|

    Source
    ------
    Naeini, Cooper & Hauskrecht (2015), AAAI. It is biased upwards by chance: about sqrt(bins / n) p (1 - p) matters.

    Examples
    --------
    >>> calibration_error([0.9, 0.9, 0.1, 0.1], [1, 1, 0, 0])
    0.1
    """
    p, y = np.asarray(probability, dtype=np.float64).ravel(), np.asarray(correct, dtype=np.float64).ravel()
    at = np.minimum((p * bins).astype(int), bins - 1)
    gap = np.bincount(at, y - p, bins)
    return round(float(np.abs(gap).sum() / len(p)), 12)


# ---------------------------------------------------------------- levels


def level_cuts(score: ArrayLike, levels: int, correct: ArrayLike | None = None) -> Array:
    """Return the cuts that make levels of about equal share, at most levels - 1, fewer where scores tie [own].

    With ``correct`` the share is half that of all prompts and half that of the wrong ones: where a tier is mostly
    right, what matters is decided among its few low scores, and they get finer levels.

    Raises
    ------
    InputError
        If ``levels`` is below 1.

    Examples
    --------
    >>> level_cuts([1, 2, 3, 4, 5, 6, 7, 8], 4).tolist()
    [3.0, 5.0, 7.0]
    >>> level_cuts([1, 2, 3, 4, 5, 6, 7, 8], 4, [0, 0, 1, 1, 1, 1, 1, 1]).tolist()
    [2.0, 3.0, 5.0]
    """
    s = np.asarray(score, dtype=np.float64)
    require(levels >= 1, "levels", "must be at least 1 [-]", levels)
    wrong = np.zeros(len(s)) if correct is None else 1.0 - np.asarray(correct, dtype=np.float64)
    weight = 1.0 / len(s) + wrong / max(wrong.sum(), 1.0)
    order = np.argsort(s, kind="stable")
    below = (np.cumsum(weight[order]) - weight[order]) / weight.sum()
    first = np.searchsorted(below, np.arange(1, levels) / levels - 1e-12)
    cuts = np.unique(s[order][np.minimum(first, len(s) - 1)])
    return np.asarray(cuts[cuts > s.min()])


def to_levels(score: ArrayLike, cuts: Array) -> Levels:
    """Return the level of each score: how many cuts it reaches."""
    return np.asarray(np.searchsorted(cuts, np.asarray(score, dtype=np.float64), side="right"), dtype=np.intp)


# ---------------------------------------------------------------- table regressed on all scores


@dataclass(frozen=True, eq=False)
class ScoreModel:
    """P(each tier right | scores of all tiers): logistic in the calibrated log odds of every tier."""

    calibrators: tuple[Calibrator, ...]  # K
    mean: Array  # (K,) of the calibrated log odds [-]
    spread: Array  # (K,) their standard deviation [-]
    coefficients: Array  # (features, K) [-]
    degree: int  # 1: log odds; 2: their squares and products too

    def __call__(self, score: ArrayLike) -> Array:
        """Return P(right), (n, K), for scores (n, K) [-]."""
        return np.asarray(expit(self._features(np.asarray(score, dtype=np.float64)) @ self.coefficients))

    def _features(self, score: Array) -> Array:
        return _terms((_log_odds(self.calibrators, score) - self.mean) / self.spread, self.degree)


def fit_score_model(score: ArrayLike, correct: ArrayLike, degree: int, ridge: float = 1.0) -> ScoreModel:
    r"""Return the regression of each tier's outcome on the scores of all tiers.

    .. math:: P(c_k = 1 \mid s) = \sigma(w_k^\top \phi(z)), \qquad
              z_j = \text{standardised logit of the calibrated } P(c_j = 1 \mid s_j)

    Parameters
    ----------
    score, correct : (n, K) arrays
        As in :func:`fit_calibrator`; beta calibration of each tier.
    degree : 1 or 2
        Whether squares and products enter.
    ridge : float
        Penalty on the coefficients, in prompts [-].

    Raises
    ------
    InputError
        If the degree is not 1 or 2, or scores are refused.
    """
    s, c = np.asarray(score, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    require(degree in (1, 2), "degree", "must be 1 or 2 [-]", degree)
    require(s.ndim == 2 and s.shape == c.shape, "score", f"must have shape {c.shape}", s.shape)
    calibrators = tuple(fit_calibrator(s[:, k], c[:, k], "beta") for k in range(s.shape[1]))
    odds = _log_odds(calibrators, s)
    mean, spread = odds.mean(axis=0), odds.std(axis=0) + EDGE
    x = _terms((odds - mean) / spread, degree)
    w = np.stack([_logistic(x, c[:, k], ridge) for k in range(s.shape[1])], axis=1)
    return ScoreModel(calibrators, mean, spread, w, degree)


def _log_odds(calibrators: Sequence[Calibrator], score: Array) -> Array:
    """Return the log odds of each tier's own calibrated probability, kept within 0.02 and 0.99, (n, K)."""
    p = np.stack([np.clip(f(score[:, k]), 0.02, 0.99) for k, f in enumerate(calibrators)], axis=1)
    return np.asarray(np.log(p) - np.log1p(-p))


def _terms(z: Array, degree: int) -> Array:
    """Return (1, z_1..z_K) and for degree 2 all z_i z_j with i <= j, (n, features)."""
    linear = [np.ones(len(z)), *z.T]
    if degree == 1:
        return np.stack(linear, axis=1)
    return np.stack(linear + [z[:, i] * z[:, j] for j in range(z.shape[1]) for i in range(j + 1)], axis=1)


def _logistic(x: Array, y: Array, ridge: float) -> Array:
    """Return the coefficients of largest penalised likelihood; the constant (first column) is not penalised."""

    def loss(w: Array) -> tuple[float, Array]:
        z, slope = x @ w, np.concatenate([[0.0], w[1:]])
        value = np.sum(np.logaddexp(0, z) - y * z) + ridge / 2 * slope @ slope
        return float(value) / len(y), (x.T @ (expit(z) - y) + ridge * slope) / len(y)

    return np.asarray(minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x)


def smoothed_outcomes(
    tiers: Sequence[str], quality: ArrayLike, level: ArrayLike, levels: int, width: float
) -> Outcomes:
    r"""Return the table with one row per prompt: regressed quality, and levels smeared over their neighbours.

    .. math:: P(l' \mid \text{prompt}, k) \propto x_{l'}\, e^{-(l' - l_k)^2 / 2 w^2}

    with x such that every level keeps the share of prompts it has: the plan's cost is decided by how many prompts show
    a level, and a kernel that moved prompts from large levels to small ones would promise too few escalations (2 to 7 %
    of the cost where four prompts in five show one level). Where scores are tied a level is large, and little of it
    is smeared over the small ones beside it. A raw table of prompts promises too much quality: with one prompt in a
    cell, the tier that happened to be right there looks certain. Regressed quality removes the chance of the outcome,
    smearing that of the cell.

    Parameters
    ----------
    quality : (n, K) array
        P(right | all scores), from :class:`ScoreModel` [-].
    level : (n, K) array of integers
        Level each tier showed.
    levels : int
    width : float
        Standard deviation of the smearing, above 0 [levels].

    Raises
    ------
    InputError
        If the width is not above 0 or the shapes are refused by :class:`theory.outcomes.Outcomes`.

    Examples
    --------
    >>> quality = [[0.5, 0.9], [0.6, 0.9], [0.7, 0.9]]
    >>> table = smoothed_outcomes(("a", "b"), quality, [[0, 2], [1, 1], [2, 0]], levels=3, width=0.5)
    >>> table.signal[0].round(2).tolist()
    [[0.89, 0.11, 0.0], [0.0, 0.11, 0.89]]
    """
    require(width > 0, "width", "must be above 0 [levels]", width)
    lv = np.asarray(level).astype(np.intp)
    signal = np.stack([_smeared(lv[:, k], levels, width)[lv[:, k]] for k in range(lv.shape[1])], axis=1)
    return Outcomes(tuple(tiers), np.full(len(lv), 1.0 / len(lv)), np.asarray(quality, dtype=np.float64), signal)


def _smeared(level: Levels, levels: int, width: float) -> Array:
    r"""Return P(level l' is shown | prompt of level l), (L, L), rows and columns of levels nobody shows at 0.

    .. math:: m_l P(l' \mid l) = x_l\, e^{-(l - l')^2 / 2 w^2} x_{l'}, \qquad x_l (K x)_l = m_l

    by symmetric scaling: x <- sqrt(x m / K x) (Knight, Ruiz & Ucar 2014, SIAM J. Matrix Anal. Appl. 35:931-955).
    """
    share = np.bincount(level, minlength=levels) / len(level)
    at = np.arange(levels)
    kernel = np.exp(-0.5 * ((at[:, None] - at) / width) ** 2)
    shown, x = np.maximum(share, np.finfo(float).tiny), np.sqrt(share)
    for _ in range(ROUNDS):
        mass = x * (kernel @ x)
        if np.abs(mass - share).max() < EDGE / levels:
            break
        x = np.sqrt(x * share / np.maximum(kernel @ x, np.finfo(float).tiny))
    moved = x[:, None] * kernel * x / shown[:, None]
    return np.asarray(moved / np.maximum(moved.sum(axis=1, keepdims=True), np.finfo(float).tiny))

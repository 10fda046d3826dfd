"""Who is right when, and what is seen of it: the joint law of the tiers' answers and of their confidence signals.

Independence between tiers is never assumed by default: on GSM8K it would promise that 99.0 % of the problems are solved
by one of 13B, 34B and 70B, where 91.1 % are. Within a row of the table the signals of different tiers are independent
given the row; how much that assumes depends on what a row is. One real prompt: nothing. A latent class of prompts
(expected quality and signal law of each tier in it): that the classes are fine enough. An outcome pattern: that a
tier's confidence depends on nothing but who is right, which is optimistic: hard prompts lower all confidences at once.

What is known before any tier runs (a category, a predicted difficulty) is the covariate: one value per request, seen
for nothing. With it and without signals a rule is a router, with signals and without it a cascade, with both a cascade
that routes: one table, one programme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from .errors import refuse, require

Array = NDArray[np.float64]

MAX_TIERS = 4  # the policy table grows as (levels + 1)^tiers
MAX_STATES = 2**22  # entries of the policy table that are still quick to solve [-]
SUM_TOLERANCE = 1e-9  # how far from 1 given probabilities may add up [-]
_CHUNK = 2**22  # numbers held at once while rows with soft signals are added up [-]


@dataclass(frozen=True, eq=False)
class Outcomes:
    """A joint table of R rows: what each of K tiers gets right and which of L signal levels it then shows.

    A row is an outcome pattern (its weight a probability), a real prompt (its weight 1/n, its signals one-hot) or a
    latent class of prompts (its weight a share, `correct` and `signal` the law within it).
    Levels are ordered from least to most confident; a tier with fewer levels than L leaves some at probability 0.

    Raises
    ------
    InputError
        If shapes disagree, numbers are not finite, probabilities leave [0, 1] or do not add up to 1, there are more
        than 4 tiers, or the policy table would exceed ``MAX_STATES`` entries.
    """

    tiers: tuple[str, ...]  # K names, in the order in which tiers may be run
    weight: Array  # (R,) probability of the row, adds up to 1 [-]
    correct: Array  # (R, K) 0 or 1, or the expected quality in [0, 1] [-]
    signal: Array  # (R, K, L) P(tier k shows level l | row) [-]
    covariate: Array = field(default_factory=lambda: np.ones((1, 1)))  # (R, X) P(x is known beforehand | row) [-]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiers", tuple(self.tiers))
        for name in ("weight", "correct", "signal"):
            object.__setattr__(self, name, _frozen(name, getattr(self, name)))
        known = np.asarray(self.covariate, dtype=np.float64)
        one = known.ndim == 2 and len(known) == 1  # the same law in every row
        shape = (np.atleast_1d(self.weight).size, known.shape[-1]) if one else known.shape
        object.__setattr__(self, "covariate", _frozen("covariate", np.broadcast_to(known, shape)))
        _check_tiers(self.tiers)
        _check_shapes(self)
        _check_probabilities(self)

    @property
    def levels(self) -> int:
        """L, the number of signal levels of a tier [-]."""
        return int(self.signal.shape[2])

    @property
    def covariates(self) -> int:
        """X, the number of values that the covariate takes [-]."""
        return int(self.covariate.shape[1])

    @cached_property
    def joint(self) -> Array:
        r"""Mass of each complete signal vector, and of tier k being right with it, (1 + K, L, ..., L) [-].

        .. math:: J_0(l) = \sum_r w_r \prod_k P(l_k \mid r), \qquad J_k(l) = \sum_r w_r q_{rk} \prod_k P(l_k \mid r)

        Its sum over the axes of tiers not run is the unnormalised belief after the tiers that were.

        Source
        ------
        Derivation: product of row weight and the law of the signals given the row.
        """
        return expected_by_signal(self, np.column_stack([np.ones_like(self.weight), self.correct]))

    @cached_property
    def _laws(self) -> tuple[NDArray[np.intp], tuple[Array, ...]]:
        """Which law each row has of the covariate and of each signal, (R, 1 + K), and the different laws of each.

        Prompts that show the same level share a law, smeared or not: far fewer laws than rows.
        """
        seen = [self.covariate, *(self.signal[:, k] for k in range(len(self.tiers)))]
        if all(bool(np.all((law == 0.0) | (law == 1.0))) for law in seen):  # certain ones need no search
            certain = np.column_stack([law.argmax(axis=1) for law in seen])
            return certain, tuple(np.eye(law.shape[1]) for law in seen)
        at, laws = [], []
        for each in seen:
            law = np.ascontiguousarray(each)
            # rows compared as bytes: twenty times faster than number by number
            _, first, inverse = np.unique(
                law.view(np.dtype((np.void, law[0].nbytes))).ravel(), return_index=True, return_inverse=True
            )
            at.append(inverse.ravel())
            laws.append(law[first])
        return np.stack(at, axis=1), tuple(laws)


def expected_by_signal(outcomes: Outcomes, values: Array) -> Array:
    r"""Return :math:`\sum_r w_r v_{rm} P(x \mid r) \prod_k P(l_k \mid r)` at x and l, (m, X, L, ..., L) [that of v].

    Parameters
    ----------
    outcomes : Outcomes
    values : (R, m) array
        What is to be averaged, in its own unit.
    """
    weighted = outcomes.weight[:, None] * values
    shape = (outcomes.covariates, *[outcomes.levels] * len(outcomes.tiers))
    codes = math.prod(shape)
    at, laws = outcomes._laws
    kinds = tuple(len(law) for law in laws)
    if math.prod(kinds) <= max(codes, len(weighted)):
        code = np.ravel_multi_index(tuple(at.T), kinds)
        counts = np.stack([np.bincount(code, column, math.prod(kinds)) for column in weighted.T])
        smeared: Array = counts.astype(np.float64).reshape(-1, *kinds)
        for law in laws:
            # the first axis left is summed over and its levels go last: after all of them the order is back
            smeared = np.tensordot(smeared, law, axes=(1, 0))
        return smeared
    table = np.zeros((values.shape[1], codes), dtype=np.float64)
    step = max(1, _CHUNK // codes)
    for i in range(0, len(weighted), step):
        part = slice(i, i + step)
        table += weighted[part].T @ _likelihood(outcomes.covariate[part], outcomes.signal[part])
    return table.reshape(-1, *shape)


def _likelihood(covariate: Array, signal: Array) -> Array:
    """Return P(covariate, complete signal vector | row), (R, X L^K), the last tier's level running fastest."""
    product = covariate
    for k in range(signal.shape[1]):
        product = (product[:, :, None] * signal[:, k, None, :]).reshape(len(signal), -1)
    return product


# ---------------------------------------------------------------- tables of outcomes


def from_patterns(tiers: Sequence[str], probabilities: Mapping[str, float]) -> Outcomes:
    """Return the table whose rows are patterns such as "101" (first and third tier right), in the order given.

    Whole numbers throughout are taken as counts of problems and divided by their sum; otherwise the numbers are
    probabilities and must add up to 1. Patterns left out have probability 0. There is no signal yet.

    Raises
    ------
    InputError
        If a pattern is not K characters 0 or 1, a number is negative, or probabilities do not add up to 1.

    Examples
    --------
    >>> table = from_patterns(("small", "large"), {"11": 60, "01": 25, "10": 5, "00": 10})
    >>> accuracy(table).round(3).tolist()
    [0.65, 0.85]
    """
    require(len(probabilities) > 0, "probabilities", "must name at least one pattern", dict(probabilities))
    for pattern in probabilities:
        valid = len(pattern) == len(tiers) and set(pattern) <= {"0", "1"}
        require(valid, "probabilities", f"must have keys of {len(tiers)} characters 0 or 1", pattern)
    values = list(probabilities.values())
    weight = np.array(values, dtype=np.float64)
    if all(isinstance(v, int | np.integer) and v >= 0 for v in values) and weight.sum() > 0:
        weight /= weight.sum()
    correct = np.array([[float(c) for c in pattern] for pattern in probabilities])
    return Outcomes(tuple(tiers), weight, correct, np.ones((*correct.shape, 1)))


def from_margins(tiers: Sequence[str], accuracy: Sequence[float], rescue: Sequence[float], union: float) -> Outcomes:
    r"""Return the eight pattern probabilities of three tiers from six published figures, by maximum entropy.

    The figures and the sum to 1 fix all cells but one. Given that the first tier is wrong everything is known:

    .. math:: P(2,3 \mid \bar 1) = r_2 + r_3 - (u - a_1)/(1 - a_1)

    Given that it is right only the margins :math:`(a_j - (1 - a_1) r_j)/a_1` are, and the table of largest entropy with
    those margins is their product.

    Parameters
    ----------
    tiers : three names
    accuracy : (a_1, a_2, a_3)
        P(tier right) [-].
    rescue : (r_2, r_3)
        P(second right | first wrong) and P(third right | first wrong) [-].
    union : float
        P(any tier right) [-].

    Raises
    ------
    InputError
        If a figure is not a probability or no table has these figures; the message gives the feasible range.

    Assumes
    -------
    The second and third tier are right independently of each other where the first is right, and only there.

    Source
    ------
    Derivation: entropy is concave and the free cell changes only the table given "first right", whose entropy at fixed
    margins is largest for the product (Cover & Thomas 2006, section 2.6, independence bound on entropy).

    Examples
    --------
    Published for Abel-13B, ToRA-Code-34B and ToRA-70B on GSM8K (1319 problems):

    >>> table = from_margins(("13b", "34b", "70b"), (0.664, 0.805, 0.843), (0.591, 0.659), 0.911)
    >>> round(float(union_accuracy(table)), 3)
    0.911
    """
    require(len(tiers) == 3, "tiers", "must be three names", tuple(tiers), "Use `from_patterns` otherwise.")
    for name, values, size in (("accuracy", accuracy, 3), ("rescue", rescue, 2), ("union", (union,), 1)):
        _check_fractions(name, np.asarray(values, dtype=np.float64), (size,))
    a, wrong = accuracy[0], 1.0 - accuracy[0]
    require(0.0 < a < 1.0, "accuracy", "must lie strictly inside (0, 1) for the first tier [-]", a)
    low, high = a + wrong * max(rescue), a + wrong * min(1.0, sum(rescue))
    require(low <= union <= high, "union", f"must lie in [{low:.4f}, {high:.4f}] given the other figures [-]", union)
    both = sum(rescue) - (union - a) / wrong
    right = [_margin_if_right(accuracy, rescue, j) for j in (0, 1)]
    given_wrong = {"11": both, "10": rescue[0] - both, "01": rescue[1] - both, "00": (1.0 - union) / wrong}
    cells = {f"0{key}": wrong * p for key, p in given_wrong.items()}
    for i, j in ((1, 1), (1, 0), (0, 1), (0, 0)):
        cells[f"1{i}{j}"] = a * (right[0] if i else 1 - right[0]) * (right[1] if j else 1 - right[1])
    return from_patterns(tiers, {key: max(0.0, p) for key, p in cells.items()})


def _margin_if_right(accuracy: Sequence[float], rescue: Sequence[float], j: int) -> float:
    """Return P(tier j + 2 right | first right) = (a_j - (1 - a_1) r_j) / a_1 [-]."""
    a, rescued = accuracy[0], (1.0 - accuracy[0]) * rescue[j]
    rule = f"must lie in [{rescued:.4f}, {rescued + a:.4f}] for tier {j + 2} given the other figures [-]"
    require(rescued <= accuracy[j + 1] <= rescued + a, "accuracy", rule, accuracy[j + 1])
    return (accuracy[j + 1] - rescued) / a


def from_samples(
    tiers: Sequence[str],
    correct: ArrayLike,
    signal_level: ArrayLike | None = None,
    levels: int | None = None,
    weight: ArrayLike | None = None,
) -> Outcomes:
    """Return the empirical table of n prompts: one row each, its signals certain.

    Parameters
    ----------
    correct : (n, K) array
        0 or 1, or quality in [0, 1] [-].
    signal_level : (n, K) array of integers, optional
        Level each tier showed, 0 the least confident; without it the table has no signal.
    levels : int, optional
        Number of levels; by default the largest seen plus 1 (give it where train and test must agree).
    weight : (n,) array, optional
        Probability of each prompt; equal by default.

    Raises
    ------
    InputError
        If shapes disagree or a level is not an integer in 0..levels - 1.
    """
    right = np.asarray(correct, dtype=np.float64)
    require(right.ndim == 2 and right.size > 0, "correct", "must have shape (prompts, tiers)", right.shape)
    shown = np.zeros(right.shape) if signal_level is None else np.asarray(signal_level, dtype=np.float64)
    require(shown.shape == right.shape, "signal_level", f"must have shape {right.shape}", shown.shape)
    whole = bool(np.all(np.isfinite(shown))) and bool(np.all(shown == np.floor(shown)))
    require(whole and shown.min() >= 0, "signal_level", "must hold integers of at least 0", float(shown.min()))
    count = int(shown.max()) + 1 if levels is None else levels
    require(shown.max() < count, "signal_level", f"must be below `levels` = {count}", int(shown.max()))
    signal = (shown[:, :, None] == np.arange(count)).astype(np.float64)
    rows = np.full(len(right), 1.0 / len(right)) if weight is None else np.asarray(weight, dtype=np.float64)
    return Outcomes(tuple(tiers), rows, right, signal)


# ---------------------------------------------------------------- signals


def without_signal(outcomes: Outcomes) -> Outcomes:
    """Return the same outcomes with nothing seen of them (one level)."""
    return replace(outcomes, signal=np.ones((*outcomes.correct.shape, 1)))


def with_verifier(outcomes: Outcomes, sensitivity: ArrayLike, false_accept: ArrayLike) -> Outcomes:
    """Return the outcomes seen through a verifier of each tier's answer: level 1 accepted, level 0 rejected.

    Parameters
    ----------
    sensitivity, false_accept : float or (K,) array
        P(accept | right) and P(accept | wrong) of each tier [-].

    Assumes
    -------
    Verdicts on different tiers are independent given who is right.

    Raises
    ------
    InputError
        If a rate is not a probability, or outcomes are qualities between 0 and 1.
    """
    tiers = len(outcomes.tiers)
    accept = [np.broadcast_to(np.asarray(rate, dtype=np.float64), (tiers,)) for rate in (sensitivity, false_accept)]
    _check_fractions("sensitivity", accept[0], (tiers,))
    _check_fractions("false_accept", accept[1], (tiers,))
    given_right, given_wrong = (np.column_stack([1.0 - p, p]) for p in accept)
    return _with_levels(outcomes, given_right, given_wrong)


def with_binormal_signal(outcomes: Outcomes, auroc: ArrayLike, levels: int) -> Outcomes:
    r"""Return the outcomes with a confidence score of given AUROC, cut into levels of equal probability.

    .. math:: S \mid \text{right} \sim N(d/2, 1), \quad S \mid \text{wrong} \sim N(-d/2, 1),
              \quad d = \sqrt2\,\Phi^{-1}(A)

    The cuts are the quantiles of the tier's own mixture of right and wrong answers: each level is shown equally often.
    Cutting loses information: the AUROC of the levels (:func:`signal_auroc`) is a little below the one asked for.

    Parameters
    ----------
    auroc : float or (K,) array
        P(a right answer scores above a wrong one), in [0.5, 1) [-]; 0.5 is a tier whose score says nothing.
    levels : int
        Number of levels, at least 2 [-].

    Assumes
    -------
    Scores of different tiers are independent given who is right (assumed: published chains give each tier's AUROC but
    not the correlation of scores), normal, and of equal spread. Real scores share the difficulty of the prompt, so a
    chain planned on this table is promised more than it will get; where prompts with scores exist, fit to them instead.

    Raises
    ------
    InputError
        If an AUROC lies outside [0.5, 1), there are fewer than 2 levels, or outcomes are qualities between 0 and 1.

    Source
    ------
    Binormal ROC, AUROC = Phi(d / sqrt 2): Green & Swets (1966); Hanley & McNeil (1982), Radiology 143:29-36.
    """
    whole = isinstance(levels, int) and levels >= 2
    require(whole, "levels", "must be an integer of at least 2 [-]", levels, "Use `without_signal` for none.")
    area = np.broadcast_to(np.asarray(auroc, dtype=np.float64), (len(outcomes.tiers),))
    way_out = "Flip the sign of the score if it is below 0.5; use with_verifier(outcomes, 1, 0) for a perfect one."
    require(bool(np.all((area >= 0.5) & (area < 1.0))), "auroc", "must lie in [0.5, 1) [-]", area.tolist(), way_out)
    separation = np.sqrt(2.0) * ndtri(area)
    cuts = _mixture_quantiles(accuracy(outcomes), separation, np.arange(1, levels) / levels)
    given_right, given_wrong = (
        np.diff(ndtr(cuts - shift[:, None]), axis=1, prepend=0.0, append=1.0)
        for shift in (separation / 2, -separation / 2)
    )
    return _with_levels(outcomes, given_right, given_wrong)


def _mixture_quantiles(right: Array, separation: Array, probability: Array) -> Array:
    """Return the score t with a Phi(t - d/2) + (1 - a) Phi(t + d/2) = p, (K, len(p)), by bisection."""
    a, d = right[:, None], separation[:, None]
    low, high = ndtri(probability) - d / 2, ndtri(probability) + d / 2
    for _ in range(60):  # the bracket is d wide: 60 halvings reach rounding
        middle = (low + high) / 2
        below = a * ndtr(middle - d / 2) + (1 - a) * ndtr(middle + d / 2) < probability
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.asarray((low + high) / 2)


# ---------------------------------------------------------------- what is known beforehand


def by_covariate(tables: Sequence[Outcomes], share: Sequence[float]) -> Outcomes:
    r"""Return the outcomes of requests whose covariate x is known before any tier runs.

    .. math:: P(x, \text{row}) = P(x)\, P(\text{row} \mid x)

    Parameters
    ----------
    tables : X outcomes of the same tiers and levels
        P(outcomes, signals | x) of each value x = 0..X - 1; a covariate they have of their own is left out.
    share : (X,)
        P(x), adds up to 1 [-].

    Raises
    ------
    InputError
        If there is no table, tiers or levels differ, or shares are no probabilities.

    Source
    ------
    Derivation: law of total probability.

    Examples
    --------
    >>> easy, hard = (from_patterns(("small", "large"), p) for p in ({"11": 1.0}, {"01": 0.5, "00": 0.5}))
    >>> accuracy(by_covariate((easy, hard), (0.6, 0.4))).tolist()
    [0.6, 0.8]
    """
    require(len(tables) > 0 and len(tables) == len(share), "share", f"must have {len(tables)} entries", len(share))
    first = tables[0]
    for table in tables:
        same = table.tiers == first.tiers and table.levels == first.levels
        rule = f"must all have the tiers {first.tiers} and {first.levels} levels"
        require(same, "tables", rule, (table.tiers, table.levels))
    value = np.repeat(np.arange(len(tables)), [len(t.weight) for t in tables])
    return Outcomes(
        first.tiers,
        np.concatenate([p * t.weight for p, t in zip(share, tables, strict=True)]),
        np.concatenate([t.correct for t in tables]),
        np.concatenate([t.signal for t in tables]),
        np.eye(len(tables))[value],
    )


def with_covariate(outcomes: Outcomes, value: ArrayLike, values: int | None = None) -> Outcomes:
    """Return the outcomes with the covariate that each row shows, for certain.

    Parameters
    ----------
    value : (R,) array of integers
        The covariate of each row, 0..X - 1.
    values : int, optional
        X; by default the largest seen plus 1 (give it where train and test must agree).

    Raises
    ------
    InputError
        If the values are no integers in 0..X - 1, or not one for each row.
    """
    x = np.asarray(value, dtype=np.float64)
    require(x.shape == outcomes.weight.shape, "value", f"must have shape {outcomes.weight.shape}", x.shape)
    count = int(x.max()) + 1 if values is None else values
    whole = bool(np.all((x == np.floor(x)) & (x >= 0) & (x < count)))
    require(whole, "value", f"must hold integers in 0..{count - 1}", float(x.max()))
    return replace(outcomes, covariate=np.eye(count)[x.astype(np.intp)])


def without_covariate(outcomes: Outcomes) -> Outcomes:
    """Return the same outcomes with nothing known before the first tier."""
    return replace(outcomes, covariate=np.ones((1, 1)))


def draw_covariate(outcomes: Outcomes, row: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """Return the covariate of requests of these rows (:func:`draw`), (n,)."""
    reached = np.cumsum(outcomes.covariate, axis=1)[row]
    return np.asarray((rng.random((len(row), 1)) >= reached[:, :-1]).sum(axis=1))


def _with_levels(outcomes: Outcomes, given_right: Array, given_wrong: Array) -> Outcomes:
    """Attach P(level | right) and P(level | wrong), each (K, L)."""
    way_out = "A signal of right and wrong needs rows that are right or wrong: split each row into outcome patterns."
    binary = bool(np.all((outcomes.correct == 0.0) | (outcomes.correct == 1.0)))
    require(binary, "outcomes", "must have `correct` 0 or 1 in every row", outcomes.correct.tolist(), way_out)
    return replace(outcomes, signal=np.where(outcomes.correct[:, :, None] == 1.0, given_right, given_wrong))


# ---------------------------------------------------------------- quantities


def accuracy(outcomes: Outcomes) -> Array:
    """Return P(tier right), (K,) [-]."""
    return outcomes.weight @ outcomes.correct


def union_accuracy(outcomes: Outcomes) -> float:
    """Return P(any tier right), what an all-knowing router reaches; of qualities, the mean of the best [-]."""
    return float(outcomes.weight @ outcomes.correct.max(axis=1))


def rescue(outcomes: Outcomes) -> Array:
    """Return P(tier j right | tier i wrong) at [i, j], (K, K) [-]; nan in the row of a tier that is never wrong.

    Assumes
    -------
    Where rows hold qualities between 0 and 1: answers are independent given the row. The diagonal is 0 by definition.
    """
    wrong = outcomes.weight[:, None] * (1.0 - outcomes.correct)
    joint, mass = wrong.T @ outcomes.correct, wrong.sum(axis=0)
    np.fill_diagonal(joint, 0.0)
    return np.where(mass[:, None] > 0, joint / np.where(mass > 0, mass, 1.0)[:, None], np.nan)


def signal_auroc(outcomes: Outcomes) -> Array:
    r"""Return each tier's P(level of a right answer > of a wrong one) + P(equal)/2, (K,) [-].

    nan for a tier that is always right or always wrong.
    """
    right = np.einsum("r,rk,rkl->kl", outcomes.weight, outcomes.correct, outcomes.signal)
    wrong = np.einsum("r,rk,rkl->kl", outcomes.weight, 1.0 - outcomes.correct, outcomes.signal)
    below = np.cumsum(wrong, axis=1) - wrong / 2
    pairs = right.sum(axis=1) * wrong.sum(axis=1)
    return np.where(pairs > 0, (right * below).sum(axis=1) / np.where(pairs > 0, pairs, 1.0), np.nan)


def draw(outcomes: Outcomes, n: int, rng: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return n rows drawn by weight, (n,), and the level each tier would show if it were run, (n, K)."""
    row = rng.choice(len(outcomes.weight), size=n, p=outcomes.weight)
    reached = np.cumsum(outcomes.signal, axis=2)[row]
    level = (rng.random((n, len(outcomes.tiers), 1)) >= reached[:, :, :-1]).sum(axis=2)
    return row, level


# ---------------------------------------------------------------- checks


def _frozen(name: str, value: ArrayLike) -> Array:
    array = np.array(value, dtype=np.float64)
    bad = array[~np.isfinite(array)]
    require(bad.size == 0, name, "must be finite", float(bad[0]) if bad.size else None, "Drop or mend incomplete rows.")
    array.flags.writeable = False
    return array


def _check_tiers(tiers: tuple[str, ...]) -> None:
    require(1 <= len(tiers) <= MAX_TIERS, "tiers", f"must be 1 to {MAX_TIERS} names", tiers)
    require(len(set(tiers)) == len(tiers), "tiers", "must be different names", tiers)


def _check_shapes(outcomes: Outcomes) -> None:
    rows, tiers = len(np.atleast_1d(outcomes.weight)), len(outcomes.tiers)
    require(outcomes.weight.shape == (rows,), "weight", "must have shape (rows,)", outcomes.weight.shape)
    expected = f"must have shape (rows, tiers) = {(rows, tiers)}"
    require(outcomes.correct.shape == (rows, tiers), "correct", expected, outcomes.correct.shape)
    shape = outcomes.signal.shape
    require(shape[:2] == (rows, tiers) and len(shape) == 3 and shape[2] > 0, "signal", expected + " + (levels,)", shape)
    known = outcomes.covariate.shape
    require(
        len(known) == 2 and known[0] == rows and known[1] > 0, "covariate", f"must have shape ({rows}, values)", known
    )
    states = known[1] * (shape[2] + 1) ** tiers
    rule = f"must give at most {MAX_STATES} states, covariates x (levels + 1)^tiers"
    require(states <= MAX_STATES, "signal", rule, states, "Use fewer levels.")


def _check_probabilities(outcomes: Outcomes) -> None:
    _check_fractions("correct", outcomes.correct, outcomes.correct.shape)
    _check_fractions("weight", outcomes.weight, outcomes.weight.shape)
    total = float(outcomes.weight.sum())
    way_out = "Divide by the sum if the shares were rounded, or pass counts to `from_patterns`."
    require(abs(total - 1.0) <= SUM_TOLERANCE, "weight", "must add up to 1 [-]", total, way_out)
    require(float(outcomes.signal.min()) >= 0.0, "signal", "must be at least 0 [-]", float(outcomes.signal.min()))
    sums = outcomes.signal.sum(axis=2)
    worst = float(sums.flat[np.abs(sums - 1.0).argmax()])
    require(abs(worst - 1.0) <= SUM_TOLERANCE, "signal", "must add up to 1 over the levels [-]", worst)
    _check_fractions("covariate", outcomes.covariate, outcomes.covariate.shape)
    sums = outcomes.covariate.sum(axis=1)
    worst = float(sums[np.abs(sums - 1.0).argmax()])
    require(abs(worst - 1.0) <= SUM_TOLERANCE, "covariate", "must add up to 1 over its values [-]", worst)


def _check_fractions(name: str, values: Array, shape: tuple[int, ...]) -> None:
    require(values.shape == shape, name, f"must have shape {shape}", values.shape)
    outside = values[~((values >= 0.0) & (values <= 1.0))]
    if outside.size:
        refuse(name, "must lie in [0, 1] [-]", float(outside[0]), "It is a fraction: pass 0.8, not 80.")

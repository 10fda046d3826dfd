"""Cascade policies on real outcomes, out of fold: area under the frontier, calibration, predicted against realised.

Every prompt is tested by policies that were fitted without it: calibration, levels, regression, the dynamic programme
and its hyper-parameters all see the training folds only. The plan is *predicted* from the training folds and *realised*
on the test fold; the area compares it with pairwise thresholds, the hull of single models and an all-knowing router.
Everything is the mean over several divisions into folds: one division moves an area by about 0.003 to 0.015.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.cascade import Frontier, Policy, execute, frontier
from theory.errors import require
from theory.outcomes import Outcomes

from .joint_models import log_likelihood
from .outcome_models import (
    best_calibrator,
    calibration_error,
    fit_score_model,
    fold_of,
    level_cuts,
    smoothed_outcomes,
    to_levels,
)
from .quality_readers import Samples, read_quality

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

FOLDS = 5
REPEATS = 3  # divisions into folds, all reported as one mean
INNER_FOLDS = 3  # inside the training folds, for the choice of a recipe
BUDGETS = np.concatenate([[0.0], np.geomspace(0.002, 1.0, 79)])  # shares of the span from cheapest to top tier [-]
LAMBDAS = np.logspace(-2.5, 3.5, 120)  # prices of the all-knowing router, in calls of the top tier [-]
THRESHOLDS = 61  # per pair of tiers: quantiles of the training confidences
RESAMPLES = 200  # bootstrap resamples of the prompts
LEVELS = 20  # of each tier's score
TOLERANCE = 1e-5  # of the frontier [-]
NORMAL = 1.959963984540054  # two-sided 95 % of the normal law
FLOOR = 0.95  # the plan judged reaches this share of the quality between the smallest and the top tier [-]
PLANS = (0.25, 0.5, 0.75, FLOOR)  # shares at which predicted and realised are compared [-]


class Recipe(NamedTuple):
    """How a joint model is made of the training prompts."""

    degree: int  # of the regression on all scores
    ridge: float  # of that regression [prompts]
    width: float  # of the smearing [levels]


RECIPES = tuple(Recipe(*r, w) for r, w in product(((1, 1.0), (2, 1.0), (2, 10.0)), (0.7, 1.5)))  # in order of r


@dataclass(frozen=True, eq=False)
class Candidates:
    """What m policies cost and attain on each of n prompts, each prompt seen out of fold."""

    cost: Array  # (m, n) [cost unit]
    quality: Array  # (m, n) 0 or 1 [-]

    def means(self, weight: Array) -> tuple[Array, Array]:
        """Return mean cost [cost unit] and quality [-], (m,) each, for weights of the prompts that add up to 1."""
        return self.cost @ weight, self.quality @ weight

    def join(self, other: Candidates) -> Candidates:
        """Return the policies of both."""
        return Candidates(np.concatenate([self.cost, other.cost]), np.concatenate([self.quality, other.quality]))


def validate_cascade(csv: Path, tiers: Sequence[str] | None = None, *, seed: int = 0) -> dict[str, Any]:
    """Return the out-of-fold validation of cascade policies on a table of real outcomes.

    Parameters
    ----------
    csv : Path
        A layout of :func:`calibration.quality_readers.read_quality`.
    tiers : 2 to 4 model names, optional
        As there.
    seed : int
        Of the folds and resamples.

    Returns
    -------
    dict
        ``by_group``: for each data set and chain ``name``, ``n``, ``tiers``, ``signal``, ``cost_unit``; ``area`` and
        ``area_interval`` {policy, pairwise, singles, oracle}, means over the divisions into folds, with
        ``area_spread`` {policy, pairwise}, their standard deviations. The policy is the hull over the programmes of
        all subsets of tiers at each budget, and the pair and threshold chosen in training at each budget: which subset
        is used where is read off the pooled test prompts, thresholds are not. The pairwise envelope is the hull over
        all pairs and thresholds, both with that hindsight;
        ``area_chosen_in_training`` {policy, dynamic_programme, pairwise}: nothing but the budget is left open: one
        programme on all tiers, one pair and threshold, and the hull of these two;
        ``area_in_hindsight`` {policy, dynamic_programme, pairwise}: the policy with all thresholds added (it cannot be
        worse than they), the programmes alone, and the thresholds;
        ``ece`` (all tiers pooled), ``ece_raw``, ``ece_by_tier``; ``predicted_cost``, ``realised_cost``,
        ``predicted_quality``, ``realised_quality`` of the plan that reaches 95 % of the gap to the top tier, with
        ``realised_cost_interval`` and ``realised_quality_interval``; ``plans``: the same at other shares;
        ``coverage`` {"n", "cost", "quality"}: share of the n (test fold, plan) pairs whose realised mean lies in the
        95 % interval of its prediction; ``cost_noise``: standard deviation of the cost that the plan would show on as
        many new prompts even if its law were known, relative to its mean;
        ``cost_share`` {"95%", "100%"}: cost of reaching that share, in calls of the top tier, for each of
        {policy, pairwise}, null where it is never reached.

    Raises
    ------
    InputError
        If the file is refused, or a group has fewer than 50 prompts.
    """
    groups = read_quality(Path(csv), tiers)
    return {
        "by_group": [validate_group(g, np.random.default_rng(seed)) for g in groups],
        "folds": FOLDS,
        "repeats": REPEATS,
        "seed": seed,
    }


def validate_group(samples: Samples, rng: np.random.Generator, repeats: int = REPEATS) -> dict[str, Any]:
    """Return the entry of one group, the mean over ``repeats`` divisions into folds; see :func:`validate_cascade`.

    Raises
    ------
    InputError
        If the group has fewer than 50 prompts, or ``repeats`` is below 1.
    """
    n = len(samples.correct)
    require(n >= 50, "csv", f"must hold at least 50 prompts of {samples.name}", n)
    require(repeats >= 1, "repeats", "must be at least 1 [-]", repeats)
    folds = [fold_of(n, FOLDS, rng) for _ in range(repeats)]
    found = [out_of_fold(samples, fold, rng) for fold in folds]
    weights = np.vstack([np.full(n, 1.0 / n), rng.multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES) / n])
    alone = singles(samples)
    policy = [f.programmes.join(f.pairwise_chosen).join(alone) for f in found]
    pairwise = [f.pairwise.join(alone) for f in found]
    each = {
        name: np.array([areas(c, samples, weights) for c in of])
        for name, of in {
            "policy": policy,
            "pairwise": pairwise,
            "singles": [alone],
            "oracle": [all_knowing(samples)],
        }.items()
    }
    mean = {name: a.mean(axis=0) for name, a in each.items()}
    plans = [_plan(found, i, weights) for i in range(len(PLANS))]
    tests = np.concatenate([f.tests for f in found])
    now = weights[:1]

    def over(curves: list[Candidates]) -> float | None:
        return _finite(float(np.mean([areas(c, samples, now)[0] for c in curves])))

    return {
        "name": samples.name,
        "n": n,
        "tiers": list(samples.tiers),
        "signal": samples.signal,
        "cost_unit": samples.unit,
        "area": {name: _finite(a[0]) for name, a in mean.items()},
        "area_interval": {name: _interval(a[1:]) for name, a in mean.items()},
        "area_spread": {name: _finite(float(each[name][:, 0].std())) for name in ("policy", "pairwise")},
        "area_chosen_in_training": {
            "policy": over([f.chosen.join(f.pairwise_chosen).join(alone) for f in found]),
            "dynamic_programme": over([f.chosen for f in found]),
            "pairwise": over([f.pairwise_chosen.join(alone) for f in found]),
        },
        "area_in_hindsight": {
            "policy": over([p.join(f.pairwise) for p, f in zip(policy, found, strict=True)]),
            "dynamic_programme": over([f.programmes for f in found]),
            "pairwise": over(pairwise),
        },
        **_calibration(samples, folds[0], rng),
        **{key: plans[-1][key] for key in ("predicted_cost", "realised_cost", "predicted_quality", "realised_quality")},
        "realised_cost_interval": plans[-1]["realised_cost_interval"],
        "realised_quality_interval": plans[-1]["realised_quality_interval"],
        "cost_noise": plans[-1]["cost_noise"],
        "plans": plans,
        "coverage": {"n": len(tests), "cost": float(tests[:, 0].mean()), "quality": float(tests[:, 1].mean())},
        "cost_share": {
            f"{100 * share:.0f}%": {
                name: _mean_or_none([cost_share(c, samples, share) for c in curves])
                for name, curves in (("policy", policy), ("pairwise", pairwise))
            }
            for share in (FLOOR, 1.0)
        },
    }


def _plan(found: Sequence[OutOfFold], i: int, weights: Array) -> dict[str, Any]:
    """Return predicted and realised of plan i; the first row of ``weights`` is the sample itself."""
    cost = np.mean([f.planned.cost[i] @ weights.T for f in found], axis=0)
    quality = np.mean([f.planned.quality[i] @ weights.T for f in found], axis=0)
    predicted = np.mean([f.predicted[i] for f in found], axis=0)
    n = weights.shape[1]
    noise = np.mean([f.planned.cost[i].std() for f in found]) / math.sqrt(n) / cost[0]
    return {
        "share_of_gap": PLANS[i],
        "predicted_cost": float(predicted[0]),
        "realised_cost": float(cost[0]),
        "predicted_quality": float(predicted[1]),
        "realised_quality": float(quality[0]),
        "realised_cost_interval": _interval(cost[1:]),
        "realised_quality_interval": _interval(quality[1:]),
        "cost_noise": float(noise),
    }


# ---------------------------------------------------------------- out of fold


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """Everything fitted without the prompt it is tested on."""

    programmes: Candidates  # every subset of tiers at every budget
    chosen: Candidates  # at every budget, the programme on all tiers (it may leave any out)
    pairwise: Candidates  # every pair of tiers at every threshold
    pairwise_chosen: Candidates  # at every budget, the pair and threshold best on the training folds
    planned: Candidates  # plans for the shares of the quality gap, mixtures in expectation
    predicted: Array  # (plans, 2) cost [cost unit] and quality [-] expected from the training folds
    tests: NDArray[np.bool_]  # (folds x plans, 2) whether realised cost and quality lie in the predicted interval


def out_of_fold(samples: Samples, fold: Indices, rng: np.random.Generator) -> OutOfFold:
    """Return all candidate policies, each prompt judged by those of the fold that did not see it."""
    n, predicted, inside = len(fold), np.zeros((len(PLANS), 2)), []
    tables: list[Candidates] = []
    for f in range(fold.max() + 1):
        train, test = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        fitted = Fitted(samples, train, choose_recipe(samples, train, rng))
        every = [fitted.along(subset, test) for subset in subsets(len(samples.tiers))]
        planned, expected, bounds = fitted.plans(test)
        predicted += expected * len(test) / n
        inside.append(np.abs(np.stack([planned.cost.mean(1), planned.quality.mean(1)], axis=1) - expected) <= bounds)
        joined = Candidates(np.concatenate([c.cost for c in every]), np.concatenate([c.quality for c in every]))
        pairs = pairwise_thresholds(samples, train, test)
        parts = (joined, every[-1], pairs, best_pairs(samples, train, test), planned)
        if not tables:
            tables = [Candidates(*(np.zeros((len(p.cost), n)) for _ in range(2))) for p in parts]
        for table, part in zip(tables, parts, strict=True):
            table.cost[:, test], table.quality[:, test] = part.cost, part.quality
    return OutOfFold(tables[0], tables[1], tables[2], tables[3], tables[4], predicted, np.concatenate(inside))


def subsets(tiers: int) -> list[tuple[int, ...]]:
    """Return all subsets of two tiers or more, all tiers last."""
    return [s for size in range(2, tiers + 1) for s in combinations(range(tiers), size)]


class Fitted:
    """A recipe carried out on training prompts: the frontiers of its policies, and how they do on others."""

    def __init__(self, samples: Samples, train: Indices, recipe: Recipe) -> None:
        self.samples, self.train, self.price = samples, train, samples.cost[train].mean(axis=0)
        self.level = levels_of(samples, train)
        quality = _quality(samples, train, recipe)
        self.table = smoothed_outcomes(samples.tiers, quality, self.level[train], LEVELS, recipe.width)

    def frontier(self, subset: tuple[int, ...]) -> Frontier:
        """Return the frontier of the policies that run some tiers only."""
        at, t = list(subset), self.table
        part = Outcomes(tuple(t.tiers[k] for k in at), t.weight, t.correct[:, at], t.signal[:, at])
        return frontier(part, self.price[at], tolerance=TOLERANCE)

    def along(self, subset: tuple[int, ...], test: Indices) -> Candidates:
        """Return the best mixture at each budget, in expectation, on the test prompts, (budgets, test prompts)."""
        curve = self.frontier(subset)
        done = [self.run(v.policy, subset, test) for v in curve.vertices]
        low, high, gamma = _between(curve.cost, self.price[0] + BUDGETS * (self.price[-1] - self.price[0]))
        return _mixed(Candidates(np.stack([d[0] for d in done]), np.stack([d[1] for d in done])), low, high, gamma)

    def plans(self, test: Indices) -> tuple[Candidates, Array, Array]:
        """Return the cheapest mixtures that reach each share of the quality gap, on the test prompts; what they
        promise, (plans, 2) cost [cost unit] and quality [-]; and the half width of its 95 % interval, (plans, 2).

        The half width is that of the difference of two means, of the training and of the test prompts.
        """
        samples, train = self.samples, self.train
        every = tuple(range(len(samples.tiers)))
        curve, accuracy = self.frontier(every), samples.correct[train].mean(axis=0)
        cost, quality, expected, width = [], [], [], []
        for share in PLANS:
            wanted = accuracy[0] + share * (accuracy[-1] - accuracy[0])
            v = curve.vertices
            mixture = curve.at_quality(float(np.clip(wanted, v[0].quality, v[-1].quality)))
            g, policies = mixture.gamma, (mixture.low.policy, mixture.high.policy)
            for at, keep in ((test, True), (train, False)):
                low, high = (self.run(p, every, at) for p in policies)
                spent, right = ((1 - g) * a + g * b for a, b in zip(low, high, strict=True))
                if keep:
                    cost.append(spent)
                    quality.append(right)
                else:
                    deviation = np.array([spent.std(), right.std()])
            width.append(NORMAL * deviation * math.sqrt(1 / len(train) + 1 / len(test)))
            expected.append((mixture.cost, mixture.quality))
        return Candidates(np.array(cost), np.array(quality)), np.array(expected), np.array(width)

    def run(self, policy: Policy, subset: tuple[int, ...], at: Indices) -> tuple[Array, Array]:
        """Return what a policy costs [cost unit] and whether it is right [-] on the prompts ``at``, (len(at),) each."""
        chosen = np.array(subset)
        visited, answer = execute(policy, self.level[np.ix_(at, chosen)])
        right = np.take_along_axis(self.samples.correct[np.ix_(at, chosen)], answer[:, None], axis=1)[:, 0]
        return visited @ self.samples.price[chosen], right


def levels_of(samples: Samples, train: Indices) -> Indices:
    """Return the levels of all prompts by cuts made on the training prompts, (n, K)."""
    cuts = [level_cuts(samples.score[train, k], LEVELS, samples.correct[train, k]) for k in range(len(samples.tiers))]
    return np.stack([to_levels(samples.score[:, k], c) for k, c in enumerate(cuts)], axis=1)


def _quality(samples: Samples, train: Indices, recipe: Recipe) -> Array:
    """Return P(right | scores) of the training prompts by the recipe's regression, (n, K)."""
    return fit_score_model(samples.score[train], samples.correct[train], recipe.degree, recipe.ridge)(
        samples.score[train]
    )


def choose_recipe(samples: Samples, train: Indices, rng: np.random.Generator) -> Recipe:
    """Return the recipe of largest log likelihood in folds inside the training prompts.

    A likelihood is smooth in the prompts; an area is decided by a few of them, and would be chosen by chance.
    """
    inner, held = fold_of(len(train), INNER_FOLDS, rng), np.zeros(len(RECIPES))
    for f in range(INNER_FOLDS):
        fit, test = train[inner != f], train[inner == f]
        level = levels_of(samples, fit)
        for (degree, ridge), recipes in groupby(enumerate(RECIPES), key=lambda r: (r[1].degree, r[1].ridge)):
            quality = _quality(samples, fit, Recipe(degree, ridge, 1.0))
            for i, recipe in recipes:
                table = smoothed_outcomes(samples.tiers, quality, level[fit], LEVELS, recipe.width)
                held[i] += log_likelihood(table, samples.correct[test], level[test])
    return RECIPES[int(held.argmax())]


def _between(at: Array, wanted: Array) -> tuple[Indices, Indices, Array]:
    """Return for each wanted value the vertices on its two sides and the share of the upper; ``at`` increases."""
    value = np.clip(wanted, at[0], at[-1])
    low = np.clip(np.searchsorted(at, value, side="right") - 1, 0, max(len(at) - 2, 0))
    high = np.minimum(low + 1, len(at) - 1)
    gap = at[high] - at[low]
    return low, high, np.where(gap > 0, (value - at[low]) / np.where(gap > 0, gap, 1.0), 0.0)


def _mixed(of: Candidates, low: Indices, high: Indices, gamma: Array) -> Candidates:
    """Return the mixtures of two policies each, in expectation."""
    g = gamma[:, None]
    return Candidates((1 - g) * of.cost[low] + g * of.cost[high], (1 - g) * of.quality[low] + g * of.quality[high])


# ---------------------------------------------------------------- baselines


def pairwise_thresholds(samples: Samples, train: Indices, at: Indices) -> Candidates:
    """Return cascades of two tiers that escalate below a quantile of the training scores, on the prompts ``at``."""
    price, cost, quality = samples.price, [], []
    for i, j in combinations(range(len(samples.tiers)), 2):
        cuts = np.quantile(samples.score[train, i], np.linspace(0, 1, THRESHOLDS), method="higher")
        cuts[0], cuts[-1] = -np.inf, np.inf
        escalate = samples.score[at, i] < cuts[:, None]
        cost.append(price[i] + price[j] * escalate)
        quality.append(np.where(escalate, samples.correct[at, j], samples.correct[at, i]))
    return Candidates(np.concatenate(cost), np.concatenate(quality))


def best_pairs(samples: Samples, train: Indices, test: Indices) -> Candidates:
    """Return at each budget the pair and threshold (or mixture of two) that is best on the training prompts."""
    alone, price = singles(samples), samples.price
    seen, new = (
        pairwise_thresholds(samples, train, at).join(Candidates(alone.cost[:, at], alone.quality[:, at]))
        for at in (train, test)
    )
    cost, quality = seen.cost.mean(axis=1), seen.quality.mean(axis=1)
    hull = hull_indices(cost, quality)
    hull = hull[: int(quality[hull].argmax()) + 1]
    low, high, gamma = _between(cost[hull], price[0] + BUDGETS * (price[-1] - price[0]))
    return _mixed(new, hull[low], hull[high], gamma)


def singles(samples: Samples) -> Candidates:
    """Return every request sent to one tier, (K, n)."""
    return Candidates(np.tile(samples.price[:, None], (1, len(samples.correct))), samples.correct.T)


def all_knowing(samples: Samples) -> Candidates:
    """Return the router that knows who is right, at each lambda, (lambdas, n): a bound, not a policy."""
    lam = LAMBDAS[:, None, None] * samples.price[-1]
    best = (lam * samples.correct - samples.price).argmax(axis=2)
    return Candidates(samples.price[best], samples.correct[np.arange(len(samples.correct)), best])


# ---------------------------------------------------------------- metric


def hull_indices(x: Array, y: Array) -> Indices:
    """Return which points are vertices of the upper concave hull, in order of x."""
    hull: list[int] = []
    px, py = x.tolist(), y.tolist()
    for i in np.lexsort((-y, x)).tolist():
        # the last vertex goes if it lies on or below the line from the one before to the new point
        while len(hull) > 1 and (py[hull[-1]] - py[hull[-2]]) * (px[i] - px[hull[-2]]) <= (py[i] - py[hull[-2]]) * (
            px[hull[-1]] - px[hull[-2]]
        ):
            hull.pop()
        hull.append(i)
    return np.array(hull, dtype=np.intp)


def upper_hull(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the vertices of the upper concave hull [those of x, y], by x, non-decreasing in y beyond the highest."""
    hull = hull_indices(x, y)
    return x[hull], np.maximum.accumulate(y[hull])


def hull_area(x: Array, y: Array) -> float:
    """Return the area under the upper concave hull over [0, 1]; it is flat beyond its last point [-].

    Examples
    --------
    >>> hull_area(np.array([0.0, 1.0]), np.array([0.0, 1.0]))  # mixing two models at random
    0.5
    >>> hull_area(np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0, 1.0]))
    0.75
    """
    hx, hy = upper_hull(x, y)
    inside = np.unique(np.concatenate([[0.0, 1.0], hx[(hx > 0) & (hx < 1)]]))
    return float(np.trapezoid(np.interp(inside, hx, hy), inside))


def areas(candidates: Candidates, samples: Samples, weights: Array) -> Array:
    r"""Return the area under the frontier for each row of weights, 0 = smallest and 1 = top tier on both axes [-].

    .. math:: x = (c - c_1)/(c_K - c_1), \qquad y = (q - q_1)/(q_K - q_1)

    nan where the top tier is not right more often than the smallest.

    Source
    ------
    Performance gap recovered, averaged over cost: Ong et al. (2024), RouteLLM, arXiv:2406.18665, on the concave hull.
    """
    accuracy = weights @ samples.correct
    cost, quality = candidates.cost @ weights.T, candidates.quality @ weights.T
    span = samples.price[-1] - samples.price[0]
    found = np.full(len(weights), math.nan)
    for i, (low, top) in enumerate(accuracy[:, [0, -1]]):
        if top > low and span > 0:
            found[i] = hull_area((cost[:, i] - samples.price[0]) / span, (quality[:, i] - low) / (top - low))
    return found


def cost_share(candidates: Candidates, samples: Samples, share: float) -> float | None:
    """Return the cost at which the hull reaches a share of the quality gap, None if never [calls of the top tier]."""
    n = len(samples.correct)
    accuracy = samples.correct.mean(axis=0)
    wanted = accuracy[0] + share * (accuracy[-1] - accuracy[0])
    hx, hy = upper_hull(*candidates.means(np.full(n, 1.0 / n)))
    wanted -= 1e-12  # rounding: the top tier itself reaches it
    if hy[-1] < wanted or accuracy[-1] <= accuracy[0]:
        return None
    first = int(np.argmax(hy >= wanted))
    if first == 0:
        return float(hx[0] / samples.price[-1])
    part = (wanted - hy[first - 1]) / (hy[first] - hy[first - 1])
    return float((hx[first - 1] + part * (hx[first] - hx[first - 1])) / samples.price[-1])


def _calibration(samples: Samples, fold: Indices, rng: np.random.Generator) -> dict[str, Any]:
    """Return the calibration errors of P(right | own score), out of fold, and of the raw score."""
    p = np.empty_like(samples.score)
    for f in range(fold.max() + 1):
        for k in range(len(samples.tiers)):
            model = best_calibrator(samples.score[fold != f, k], samples.correct[fold != f, k], rng)
            p[fold == f, k] = model(samples.score[fold == f, k])
    by_tier = [calibration_error(p[:, k], samples.correct[:, k]) for k in range(len(samples.tiers))]
    raw = calibration_error(samples.score, samples.correct) if samples.signal == "confidence" else None
    return {"ece": calibration_error(p, samples.correct), "ece_raw": raw, "ece_by_tier": by_tier}


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _interval(values: Array) -> list[float] | None:
    """Return the 2.5 % and 97.5 % quantiles over resamples."""
    if not np.isfinite(values).all():
        return None
    return [float(v) for v in np.quantile(values, (0.025, 0.975))]

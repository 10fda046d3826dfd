"""Cascade policies on real outcomes, out of fold: area under the frontier, calibration, predicted against realised.

Every prompt is tested by policies that were fitted without it: calibration, levels, regression, the dynamic programme
and its hyper-parameters all see the training folds only. The plan is *predicted* from the training folds and *realised*
on the test fold; the area compares it with pairwise thresholds, the hull of single models and an all-knowing router.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.cascade import Frontier, Policy, execute, frontier
from theory.errors import require

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

FOLDS = 5
INNER_FOLDS = 3  # inside the training folds, for the choice of a recipe
LAMBDAS = np.logspace(-2.5, 3.5, 120)  # prices tried, in calls of the top tier per correct answer [-]
THRESHOLDS = 61  # per pair of tiers: quantiles of the training confidences
RESAMPLES = 400  # bootstrap resamples of the prompts
TOLERANCE = 1e-5  # of the frontier [-]
FLOOR = 0.95  # the plan judged reaches this share of the quality between the smallest and the top tier [-]
PLANS = (0.25, 0.5, 0.75, FLOOR)  # shares at which predicted and realised are compared [-]


class Recipe(NamedTuple):
    """How a joint model is made of the training prompts."""

    levels: int
    degree: int  # of the regression on all scores
    width: float  # of the smearing [levels]


RECIPES = (Recipe(10, 2, 0.7), Recipe(20, 2, 0.7), Recipe(20, 1, 1.5))


@dataclass(frozen=True, eq=False)
class Candidates:
    """What m policies cost and attain on each of n prompts, each prompt seen out of fold."""

    cost: Array  # (m, n)
    quality: Array  # (m, n) 0 or 1 [-]

    def means(self, weight: Array) -> tuple[Array, Array]:
        """Return mean cost and quality, (m,) each, for weights of the prompts that add up to 1."""
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
        ``area_interval`` {policy, pairwise, singles, oracle}: the policy is the hull over two rules for each lambda,
        both chosen on the training folds (a dynamic programme; a pair of tiers with its threshold), the pairwise
        envelope is the hull over all thresholds with the test prompts in hindsight;
        ``area_chosen_in_training`` {policy, dynamic_programme, pairwise} chooses for both sides without hindsight,
        ``area_in_hindsight`` {policy, dynamic_programme, pairwise} for both with it (there the policy contains the
        thresholds and cannot be worse);
        ``ece`` (all tiers pooled), ``ece_raw``, ``ece_by_tier``; ``predicted_cost``, ``realised_cost``,
        ``predicted_quality``, ``realised_quality`` of the plan that reaches 95 % of the gap to the top tier, with
        ``realised_cost_interval`` and ``realised_quality_interval``; ``plans``: the same at other shares;
        ``cost_share`` {"95%", "100%"}: cost of reaching that share, in calls of the top tier, for each of
        {policy, pairwise}, null where it is never reached.

    Raises
    ------
    InputError
        If the file is refused, or a group has fewer than 50 prompts.
    """
    groups = read_quality(Path(csv), tiers)
    return {"by_group": [validate_group(g, np.random.default_rng(seed)) for g in groups], "folds": FOLDS, "seed": seed}


def validate_group(samples: Samples, rng: np.random.Generator) -> dict[str, Any]:
    """Return the entry of one group; see :func:`validate_cascade`."""
    n = len(samples.correct)
    require(n >= 50, "csv", f"must hold at least 50 prompts of {samples.name}", n)
    fold = fold_of(n, FOLDS, rng)
    found = out_of_fold(samples, fold, rng)
    weights = np.vstack([np.full(n, 1.0 / n), rng.multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES) / n])
    curves = {
        "policy": found.chosen.join(found.pairwise_chosen).join(singles(samples)),
        "pairwise": found.pairwise.join(singles(samples)),
        "singles": singles(samples),
        "oracle": all_knowing(samples),
    }
    areas = {name: np.array([normalised_area(c, samples, w) for w in weights]) for name, c in curves.items()}
    plans = [found.plan(i, share, weights) for i, share in enumerate(PLANS)]
    return {
        "name": samples.name,
        "n": n,
        "tiers": list(samples.tiers),
        "signal": samples.signal,
        "cost_unit": samples.unit,
        "area": {name: _finite(a[0]) for name, a in areas.items()},
        "area_interval": {name: _interval(a[1:]) for name, a in areas.items()},
        "area_chosen_in_training": _areas(
            samples, curves["policy"], found.chosen, found.pairwise_chosen.join(singles(samples))
        ),
        "area_in_hindsight": _areas(samples, found.chosen.join(curves["pairwise"]), found.policies, curves["pairwise"]),
        **_calibration(samples, fold, rng),
        **{key: plans[-1][key] for key in ("predicted_cost", "realised_cost", "predicted_quality", "realised_quality")},
        "realised_cost_interval": plans[-1]["realised_cost_interval"],
        "realised_quality_interval": plans[-1]["realised_quality_interval"],
        "plans": plans,
        "cost_share": {
            f"{100 * share:.0f}%": {name: cost_share(curves[name], samples, share) for name in ("policy", "pairwise")}
            for share in (FLOOR, 1.0)
        },
    }


# ---------------------------------------------------------------- out of fold


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """Everything fitted without the prompt it is tested on."""

    policies: Candidates  # every recipe at every lambda
    chosen: Candidates  # at every lambda, the recipe chosen inside the training folds
    pairwise: Candidates  # every pair of tiers at every threshold
    pairwise_chosen: Candidates  # at every lambda, the pair and threshold best on the training folds
    planned: Candidates  # plans for the shares of the quality gap, mixtures in expectation
    predicted: Array  # (plans, 2) cost and quality expected from the training folds

    def plan(self, i: int, share: float, weights: Array) -> dict[str, Any]:
        """Return predicted and realised of plan i; the first row of ``weights`` is the sample itself."""
        cost, quality = self.planned.cost[i] @ weights.T, self.planned.quality[i] @ weights.T
        return {
            "share_of_gap": share,
            "predicted_cost": float(self.predicted[i, 0]),
            "realised_cost": float(cost[0]),
            "predicted_quality": float(self.predicted[i, 1]),
            "realised_quality": float(quality[0]),
            "realised_cost_interval": _interval(cost[1:]),
            "realised_quality_interval": _interval(quality[1:]),
        }


def out_of_fold(samples: Samples, fold: NDArray[np.intp], rng: np.random.Generator) -> OutOfFold:
    """Return all candidate policies, each prompt judged by those of the fold that did not see it."""
    n, m = len(fold), len(LAMBDAS)
    pairs = len(samples.tiers) * (len(samples.tiers) - 1) // 2 * THRESHOLDS
    sizes = (m * len(RECIPES), m, pairs, m, len(PLANS))
    tables = [Candidates(np.zeros((k, n)), np.zeros((k, n))) for k in sizes]
    predicted = np.zeros((len(PLANS), 2))
    for f in range(fold.max() + 1):
        train, test = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        curves = [_Fitted(samples, train, recipe) for recipe in RECIPES]
        best = curves[choose_recipe(samples, train, rng)]
        every, thresholds = [c.along(test) for c in curves], pairwise_thresholds(samples, train, test)
        planned, expected = best.plans(samples, train, test)
        predicted += expected * len(test) / n
        parts = (
            Candidates(np.concatenate([c.cost for c in every]), np.concatenate([c.quality for c in every])),
            every[curves.index(best)],
            thresholds,
            _best_pairs(samples, train, test),
            planned,
        )
        for table, part in zip(tables, parts, strict=True):
            table.cost[:, test], table.quality[:, test] = part.cost, part.quality
    return OutOfFold(tables[0], tables[1], tables[2], tables[3], tables[4], predicted)


class _Fitted:
    """A recipe carried out on training prompts: the frontier of its policies, and how they do on others."""

    def __init__(self, samples: Samples, train: NDArray[np.intp], recipe: Recipe) -> None:
        self.samples, self.price = samples, samples.cost[train].mean(axis=0)
        K = len(samples.tiers)
        cuts = [level_cuts(samples.score[train, k], recipe.levels, samples.correct[train, k]) for k in range(K)]
        self.level = np.stack([to_levels(samples.score[:, k], cuts[k]) for k in range(K)], axis=1)
        model = fit_score_model(samples.score[train], samples.correct[train], recipe.degree)
        quality = model(samples.score[train])
        table = smoothed_outcomes(samples.tiers, quality, self.level[train], recipe.levels, recipe.width)
        self.frontier: Frontier = frontier(table, self.price, tolerance=TOLERANCE)

    def along(self, test: NDArray[np.intp]) -> Candidates:
        """Return the best policy at each lambda, on the test prompts, (lambdas, test prompts)."""
        high = np.array([v.lam_high for v in self.frontier.vertices])
        at = np.searchsorted(high, LAMBDAS * self.price[-1])
        results = {int(v): run(self.frontier.vertices[v].policy, self.samples, self.level, test) for v in np.unique(at)}
        return Candidates(np.stack([results[v][0] for v in at]), np.stack([results[v][1] for v in at]))

    def plans(
        self, samples: Samples, train: NDArray[np.intp], test: NDArray[np.intp]
    ) -> tuple[Candidates, NDArray[np.float64]]:
        """Return the cheapest mixtures that reach each share of the quality gap, and what they promise."""
        accuracy = samples.correct[train].mean(axis=0)
        cost, quality, expected = [], [], []
        for share in PLANS:
            wanted = accuracy[0] + share * (accuracy[-1] - accuracy[0])
            v = self.frontier.vertices
            mixture = self.frontier.at_quality(float(np.clip(wanted, v[0].quality, v[-1].quality)))
            low, high = (run(p.policy, samples, self.level, test) for p in (mixture.low, mixture.high))
            cost.append((1 - mixture.gamma) * low[0] + mixture.gamma * high[0])
            quality.append((1 - mixture.gamma) * low[1] + mixture.gamma * high[1])
            expected.append((mixture.cost, mixture.quality))
        return Candidates(np.array(cost), np.array(quality)), np.array(expected)


def run(policy: Policy, samples: Samples, level: NDArray[np.intp], at: NDArray[np.intp]) -> tuple[Array, Array]:
    """Return what a policy costs and whether it is right on the prompts ``at``, (len(at),) each."""
    visited, answer = execute(policy, level[at])
    return visited @ samples.price, np.take_along_axis(samples.correct[at], answer[:, None], axis=1)[:, 0]


def choose_recipe(samples: Samples, train: NDArray[np.intp], rng: np.random.Generator) -> int:
    """Return which recipe has the largest area in folds inside the training prompts."""
    inner = fold_of(len(train), INNER_FOLDS, rng)
    area = []
    for recipe in RECIPES:
        table = Candidates(*(np.zeros((len(LAMBDAS), len(train))) for _ in range(2)))
        for f in range(INNER_FOLDS):
            part = _Fitted(samples, train[inner != f], recipe).along(train[inner == f])
            table.cost[:, inner == f], table.quality[:, inner == f] = part.cost, part.quality
        uniform = np.full(len(train), 1.0 / len(train))
        area.append(normalised_area(table, samples, uniform, train))
    return int(np.argmax(area)) if np.isfinite(area).all() else 0


# ---------------------------------------------------------------- baselines


def pairwise_thresholds(samples: Samples, train: NDArray[np.intp], at: NDArray[np.intp]) -> Candidates:
    """Return cascades of two tiers that escalate below a quantile of the training scores, on the prompts ``at``."""
    price, cost, quality = samples.price, [], []
    for i, j in combinations(range(len(samples.tiers)), 2):
        cuts = np.quantile(samples.score[train, i], np.linspace(0, 1, THRESHOLDS), method="higher")
        cuts[0], cuts[-1] = -np.inf, np.inf
        escalate = samples.score[at, i] < cuts[:, None]
        cost.append(price[i] + price[j] * escalate)
        quality.append(np.where(escalate, samples.correct[at, j], samples.correct[at, i]))
    return Candidates(np.concatenate(cost), np.concatenate(quality))


def _best_pairs(samples: Samples, train: NDArray[np.intp], test: NDArray[np.intp]) -> Candidates:
    """Return for each lambda the single tier, or pair and threshold, that is best on the training prompts."""
    alone = singles(samples)
    seen = pairwise_thresholds(samples, train, train).join(Candidates(alone.cost[:, train], alone.quality[:, train]))
    new = pairwise_thresholds(samples, train, test).join(Candidates(alone.cost[:, test], alone.quality[:, test]))
    value = LAMBDAS[:, None] * samples.price[-1] * seen.quality.mean(axis=1) - seen.cost.mean(axis=1)
    best = value.argmax(axis=1)
    return Candidates(new.cost[best], new.quality[best])


def singles(samples: Samples) -> Candidates:
    """Return every request sent to one tier, (K, n)."""
    return Candidates(np.tile(samples.price[:, None], (1, len(samples.correct))), samples.correct.T)


def all_knowing(samples: Samples) -> Candidates:
    """Return the router that knows who is right, at each lambda, (lambdas, n): a bound, not a policy."""
    lam = LAMBDAS[:, None, None] * samples.price[-1]
    best = (lam * samples.correct - samples.price).argmax(axis=2)
    return Candidates(samples.price[best], samples.correct[np.arange(len(samples.correct)), best])


# ---------------------------------------------------------------- metric


def upper_hull(x: Array, y: Array) -> tuple[Array, Array]:
    """Return the vertices of the upper concave hull, in order of x, non-decreasing in y beyond the highest."""
    hull: list[tuple[float, float]] = []
    for i in np.lexsort((-y, x)):
        while len(hull) > 1 and _below(hull[-2], hull[-1], (x[i], y[i])):
            hull.pop()
        hull.append((float(x[i]), float(y[i])))
    points = np.array(hull)
    return points[:, 0], np.maximum.accumulate(points[:, 1])


def _below(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Return whether b lies on or below the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


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


def normalised_area(
    candidates: Candidates, samples: Samples, weight: Array, at: NDArray[np.intp] | None = None
) -> float:
    r"""Return the area under the frontier, 0 = smallest and 1 = top tier on both axes; nan if they do not differ [-].

    .. math:: x = (c - c_1)/(c_K - c_1), \qquad y = (q - q_1)/(q_K - q_1)

    Source
    ------
    Performance gap recovered, averaged over cost: Ong et al. (2024), RouteLLM, arXiv:2406.18665, on the concave hull.
    """
    correct = samples.correct if at is None else samples.correct[at]
    low, top = weight @ correct[:, 0], weight @ correct[:, -1]
    span = samples.price[-1] - samples.price[0]
    if top <= low or span <= 0:
        return math.nan
    cost, quality = candidates.means(weight)
    return hull_area((cost - samples.price[0]) / span, (quality - low) / (top - low))


def cost_share(candidates: Candidates, samples: Samples, share: float) -> float | None:
    """Return the cost at which the hull reaches a share of the quality gap, in calls of the top tier; None if never."""
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


def _calibration(samples: Samples, fold: NDArray[np.intp], rng: np.random.Generator) -> dict[str, Any]:
    """Return the calibration errors of P(right | own score), out of fold, and of the raw score."""
    p = np.empty_like(samples.score)
    for f in range(fold.max() + 1):
        for k in range(len(samples.tiers)):
            model = best_calibrator(samples.score[fold != f, k], samples.correct[fold != f, k], rng)
            p[fold == f, k] = model(samples.score[fold == f, k])
    by_tier = [calibration_error(p[:, k], samples.correct[:, k]) for k in range(len(samples.tiers))]
    raw = calibration_error(samples.score, samples.correct) if samples.signal == "confidence" else None
    return {"ece": calibration_error(p, samples.correct), "ece_raw": raw, "ece_by_tier": by_tier}


def _areas(samples: Samples, policy: Candidates, programme: Candidates, pairwise: Candidates) -> dict[str, Any]:
    uniform = np.full(len(samples.correct), 1.0 / len(samples.correct))
    named = {"policy": policy, "dynamic_programme": programme, "pairwise": pairwise}
    return {name: _finite(normalised_area(c, samples, uniform)) for name, c in named.items()}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _interval(values: Array) -> list[float] | None:
    """Return the 2.5 % and 97.5 % quantiles over resamples."""
    if not np.isfinite(values).all():
        return None
    return [float(v) for v in np.quantile(values, (0.025, 0.975))]

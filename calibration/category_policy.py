"""From the quality predictor to decisions: posteriors as signals, predicted difficulty as a category, out of fold.

The predictor gives, for each prompt, P(right) of every tier in every state. Before any tier ran it makes the category
(simple, medium, complex: thirds of P(first tier right)); after tier k alone it makes the level that tier shows; after
all tiers it makes the quality of the row. Each category has a frontier of its own and all follow one lambda
(:mod:`theory.request_classes`): where the category decides the first tier, this is routing before the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.cascade import Frontier, Policy, execute, frontier
from theory.errors import require
from theory.request_classes import RequestClass, at_price, given

from .cascade_validation import LAMBDAS, Candidates, areas, singles
from .outcome_models import fold_of, level_cuts, smoothed_outcomes, to_levels
from .predictor import Shape, train
from .quality_features import Known, state_features
from .quality_readers import Samples

Array = NDArray[np.float64]
Index = NDArray[np.intp]

CATEGORIES = ("simple", "medium", "complex")
FOLDS = 5
INNER_FOLDS = 3  # of the training prompts: a posterior after a tier ran comes from a fit that did not see the outcome
LEVELS, WIDTH = 10, 0.7  # of the signals, and the smearing of the table [levels]
LINE = Shape(calibrate=False)  # cross-fitted beta features are calibrated to what levels and table can tell
SHOWN = (3.0, 10.0, 30.0)  # lambdas at which categories are compared [calls of the top tier per correct answer]
RESAMPLES = 400
TOLERANCE = 1e-5  # of the frontiers [-]
FEWEST = 60  # prompts of a category in training: fewer make no table of 10 levels [-]


@dataclass(frozen=True, eq=False)
class Posteriors:
    """P(right) of each tier for n prompts in the states that a policy needs."""

    before: Array  # (n, K) before any tier ran [-]
    alone: Array  # (n, K) of tier k once tier k alone ran [-]
    after: Array  # (n, K) once all ran [-]


@dataclass(frozen=True, eq=False)
class Decisions:
    """What m lambdas make of n prompts, each decided by what was fitted without it."""

    cost: Array  # (m, n) [cost unit]
    quality: Array  # (m, n) 0 or 1 [-]
    answer: Index  # (m, n) tier whose answer is returned
    first: Index  # (m, n) tier that is run first
    category: Index  # (n,) 0 is the simplest

    @property
    def candidates(self) -> Candidates:
        """Costs and qualities for the areas."""
        return Candidates(self.cost, self.quality)


def posteriors(known: Known, samples: Samples, at: Index, new: Index, seed: int) -> tuple[Posteriors, Posteriors]:
    """Return the posteriors of the training prompts ``at`` and of the ``new`` ones.

    Those of training prompts are cross-fitted once a tier ran. Before, one predictor speaks for all: where the data set
    is all that is known, predictors of several folds would tell equal prompts apart.
    """
    K = len(samples.tiers)
    masks = (0, *(1 << k for k in range(K)), (1 << K) - 1)
    fold = fold_of(len(at), INNER_FOLDS, np.random.default_rng(seed))
    inside, outside = np.empty((len(masks), len(at), K)), np.empty((len(masks), len(new), K))
    for i, mask in enumerate(masks):
        x = state_features(known, mask)
        whole = train(x[at], samples.correct[at], samples.tiers, LINE, seed)
        inside[i], outside[i] = whole(x[at])[:, :K], whole(x[new])[:, :K]
        for f in range(INNER_FOLDS if mask else 0):
            model = train(x[at[fold != f]], samples.correct[at[fold != f]], samples.tiers, LINE, seed)
            inside[i, fold == f] = model(x[at[fold == f]])[:, :K]
    own = np.arange(K)
    return tuple(Posteriors(p[0], p[1 + own, :, own].T, p[-1]) for p in (inside, outside))  # type: ignore[return-value]


def decide(samples: Samples, known: Known, seed: int, categories: bool) -> Decisions:
    """Return what the policies of all ``LAMBDAS`` do, out of fold, with or without a frontier for each category."""
    n, m = len(samples.correct), len(LAMBDAS)
    fold = fold_of(n, FOLDS, np.random.default_rng(seed))
    cost, quality = np.zeros((m, n)), np.zeros((m, n))
    answer, first, category = (np.zeros(s, dtype=np.intp) for s in ((m, n), (m, n), n))
    for f in range(FOLDS):
        train_at, test_at = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        seen, new = posteriors(known, samples, train_at, test_at, seed)
        where, category[test_at] = sorted_by_difficulty(seen, new)
        curves = frontiers(samples, train_at, seen, where if categories else np.zeros_like(where))
        level = np.stack([to_levels(new.alone[:, k], c) for k, c in enumerate(cuts(samples, train_at, seen))], axis=1)
        for x, curve in enumerate(curves):
            own = np.flatnonzero(category[test_at] == x) if categories else np.arange(len(test_at))
            found = along(curve, samples, level[own], test_at[own])
            for table, part in zip((cost, quality, answer, first), found, strict=True):
                table[:, test_at[own]] = part
    return Decisions(cost, quality, answer, first, category)


def sorted_by_difficulty(seen: Posteriors, new: Posteriors) -> tuple[Index, Index]:
    """Return the category of training and new prompts: thirds of P(first tier right) before any ran, simple first.

    Where the covariates tell fewer than three kinds of prompts apart, or a third would be too small to plan on, there
    are fewer categories.
    """
    for thirds in range(len(CATEGORIES), 0, -1):
        edges = level_cuts(seen.before[:, 0], thirds)
        where = len(edges) - to_levels(seen.before[:, 0], edges)
        if np.bincount(where, minlength=len(edges) + 1).min() >= FEWEST:
            break
    return where, len(edges) - to_levels(new.before[:, 0], edges)


def cuts(samples: Samples, at: Index, seen: Posteriors) -> list[Array]:
    """Return the cuts between the levels of each tier [that of the scores]."""
    return [level_cuts(seen.alone[:, k], LEVELS, samples.correct[at, k]) for k in range(len(samples.tiers))]


def frontiers(samples: Samples, at: Index, seen: Posteriors, category: Index) -> list[Frontier]:
    """Return the frontier of each category, at the mean costs of its own training prompts."""
    edges = cuts(samples, at, seen)
    level = np.stack([to_levels(seen.alone[:, k], c) for k, c in enumerate(edges)], axis=1)
    table = smoothed_outcomes(samples.tiers, seen.after, level, LEVELS, WIDTH)
    parts = given(table, category)
    price = [samples.cost[at][category == x].mean(axis=0) for x in range(len(parts))]
    return [frontier(o, p, tolerance=TOLERANCE) for (_, o), p in zip(parts, price, strict=True)]


def along(curve: Frontier, samples: Samples, level: Index, at: Index) -> tuple[Array, Array, Index, Index]:
    """Return cost [cost unit], quality [-], answering and first tier of the best policy, each (lambdas, len(at))."""
    lam = LAMBDAS * samples.price[-1]
    vertices = [at_price([RequestClass("all", 1.0, float(v), curve)]).parts[0].low for v in lam]
    done: dict[float, tuple[Array, Array, Index, Index]] = {}
    for v in vertices:
        if v.cost not in done:
            done[v.cost] = _run(v.policy, samples, level, at)
    return tuple(np.stack([done[v.cost][i] for v in vertices]) for i in range(4))  # type: ignore[return-value]


def _run(policy: Policy, samples: Samples, level: Index, at: Index) -> tuple[Array, Array, Index, Index]:
    visited, answer = execute(policy, level)
    right = np.take_along_axis(samples.correct[at], answer[:, None], axis=1)[:, 0]
    return (visited * samples.cost[at]).sum(axis=1), right, answer, visited.argmax(axis=1)


# ---------------------------------------------------------------- what it brings


def compare(samples: Samples, known: Known, seed: int = 0) -> dict[str, Any]:
    """Return the out-of-fold areas under the frontier with and without what is known of a prompt.

    Parameters
    ----------
    samples, known : of one group
    seed : int

    Returns
    -------
    dict
        ``area`` and ``area_interval`` {``own_signal``, ``posterior``, ``category``, ``singles``}: the scores of the
        tiers alone; posteriors with covariates and lengths as signals; these with a frontier for each category; single
        tiers. ``gain`` {``posterior``, ``category``}: differences to the line before, with paired bootstrap intervals.
        ``split``: quality lost if each category is given the same budget instead of the same lambda.
        ``categories``: for each its ``share``, ``accuracy`` of the tiers, and at some ``lambda_top`` (lambda in calls
        of the top tier) the realised ``cost``, ``quality``, ``stop`` shares and ``first`` shares of the tiers; its
        ``frontier`` over all lambdas.

    Raises
    ------
    InputError
        If there are fewer than 300 prompts.
    """
    n = len(samples.correct)
    require(n >= 300, "csv", f"must hold at least 300 prompts of {samples.name} to be split into categories", n)
    bare = Known((), np.zeros((n, 0)), known.score, np.zeros((n, 0)))
    found = {
        "own_signal": decide(samples, bare, seed, categories=False),
        "posterior": decide(samples, known, seed, categories=False),
        "category": decide(samples, known, seed, categories=True),
    }
    rng = np.random.default_rng(seed)
    weights = np.vstack([np.full(n, 1 / n), rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n])
    alone = singles(samples)
    alone = Candidates(samples.cost.T, alone.quality)
    curves = {name: d.candidates.join(alone) for name, d in found.items()} | {"singles": alone}
    under = {name: areas(c, samples, weights) for name, c in curves.items()}
    steps = {"posterior": "own_signal", "category": "posterior"}
    gains = {name: under[name] - under[before] for name, before in steps.items()}
    return {
        "name": samples.name,
        "n": n,
        "tiers": list(samples.tiers),
        "covariates": list(known.names),
        "area": {name: float(a[0]) for name, a in under.items()},
        "area_interval": {name: _ends(a[1:]) for name, a in under.items()},
        "gain": {name: {"value": float(g[0]), "interval": _ends(g[1:])} for name, g in gains.items()},
        "split": equal_budgets(found["category"]),
        "categories": by_category(samples, found["category"]),
    }


def equal_budgets(done: Decisions, shown: tuple[float, ...] = SHOWN) -> list[dict[str, float]]:
    """Return the quality at one lambda for all, and if its mean cost is the budget of each category, out of fold [-].

    A budget is met by mixing the policies of two lambdas; the cheapest policy is kept where the budget is below it.
    """
    groups = [done.category == x for x in range(int(done.category.max()) + 1)]
    found = []
    for i in (int(np.abs(np.log(LAMBDAS / v)).argmin()) for v in shown):
        budget = done.cost[i].mean()
        quality = spent = 0.0
        for at in groups:
            cost, right = done.cost[:, at].mean(axis=1), done.quality[:, at].mean(axis=1)
            order = np.argsort(cost, kind="stable")
            own = float(np.clip(budget, cost.min(), cost.max()))
            quality += at.mean() * float(np.interp(own, cost[order], right[order]))
            spent += at.mean() * own
        found.append(
            {
                "lambda_top": float(LAMBDAS[i]),
                "cost": float(budget),
                "quality": float(done.quality[i].mean()),
                "cost_if_split": spent,
                "quality_if_split": quality,
            }
        )
    return found


def by_category(samples: Samples, done: Decisions, shown: tuple[float, ...] = SHOWN) -> list[dict[str, Any]]:
    """Return share, accuracy, frontier and, at some lambdas, stop shares of each category."""
    K = len(samples.tiers)
    found = []
    for x in range(int(done.category.max()) + 1):
        at = done.category == x
        rows = [int(np.abs(np.log(LAMBDAS / v)).argmin()) for v in shown]
        plans = [
            {
                "lambda_top": float(LAMBDAS[i]),
                "cost": float(done.cost[i, at].mean()),
                "quality": float(done.quality[i, at].mean()),
                "stop": _shares(done.answer[i, at], K),
                "first": _shares(done.first[i, at], K),
            }
            for i in rows
        ]
        count = int(done.category.max()) + 1
        found.append(
            {
                "category": CATEGORIES[x] if count == len(CATEGORIES) else (CATEGORIES[0], CATEGORIES[-1])[x],
                "share": float(at.mean()),
                "accuracy": samples.correct[at].mean(axis=0).tolist(),
                "price": samples.cost[at].mean(axis=0).tolist(),
                "plans": plans,
                "frontier": {
                    "cost": done.cost[:, at].mean(axis=1).tolist(),
                    "quality": done.quality[:, at].mean(axis=1).tolist(),
                },
            }
        )
    return found


def _shares(tier: Index, K: int) -> list[float]:
    return [float(s) for s in np.bincount(tier, minlength=K) / max(len(tier), 1)]


def _ends(values: Array) -> list[float] | None:
    return np.quantile(values, (0.025, 0.975)).tolist() if np.isfinite(values).all() else None

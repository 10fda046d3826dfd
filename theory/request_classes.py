r"""Requests of several kinds at once: categories known before any tier runs, products that pay differently.

A class of requests has a share, a worth of its correct answers (its lambda) and a frontier. A category of difficulty
has a frontier of its own and the common lambda; a product has a lambda of its own and the common frontier.

Why one price rules all of them: the best joint plan under a budget,

.. math:: \max \sum_k s_k v_k q_k \quad \text{s.t.} \quad \sum_k s_k c_k \le B, \quad (c_k, q_k) \text{ on frontier } k,

has the Lagrangian :math:`\sum_k s_k (v_k q_k - \mu c_k) + \mu B`, a sum of one term for each class. So class k follows
its own frontier at :math:`\lambda_k = v_k / \mu` with one multiplier :math:`\mu` for all: categories of equal worth
share one lambda, and any other split of the same budget attains no more. (Everett 1963, Operations Research 11:399-417;
the joint frontier is the supremal convolution of concave functions, Rockafellar 1970, section 5.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cascade import Frontier, Mixture, Vertex
from .errors import InfeasibleError, require
from .outcomes import SUM_TOLERANCE, Outcomes

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RequestClass:
    """A kind of request that is known as such when it arrives."""

    name: str
    share: float  # of all requests [-]
    worth: float  # v, what one correct answer to it is worth [cost unit per correct answer]
    frontier: Frontier  # of its own requests

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, "share", "must lie in [0, 1] [-]", self.share)
        finite = bool(np.isfinite(self.worth)) and self.worth >= 0
        require(finite, "worth", "must be finite and at least 0 [cost unit per correct answer]", self.worth)


class Served(NamedTuple):
    """What each class gets, and all requests on average."""

    parts: tuple[Mixture, ...]  # of each class, in order; most are single vertices (gamma = 0)
    cost: float  # [cost unit per request]
    quality: float  # [-]
    worth: float  # sum of share x worth x quality [cost unit per request]
    price: float  # mu: class k follows lambda_k = v_k / mu [worth per cost unit]


def given(outcomes: Outcomes, category: ArrayLike) -> tuple[tuple[float, Outcomes], ...]:
    r"""Return the share and the outcomes of each category of a covariate that is known before any tier runs.

    .. math:: s_x = \sum_r w_r P(x \mid r), \qquad w_{r \mid x} = w_r P(x \mid r) / s_x

    Parameters
    ----------
    outcomes : Outcomes
    category : (R,) array of integers or (R, X) array
        The category of each row, or P(category | row) [-].

    Raises
    ------
    InputError
        If shapes disagree, probabilities do not add up to 1, or a category has no share.

    Assumes
    -------
    Category and signals are independent given the row: nothing where a row is a prompt.

    Source
    ------
    Bayes' rule.

    Examples
    --------
    >>> from theory.outcomes import accuracy, from_patterns
    >>> table = from_patterns(("small", "large"), {"11": 60, "01": 25, "10": 5, "00": 10})
    >>> [(round(s, 2), accuracy(o).round(2).tolist()) for s, o in given(table, [0, 1, 0, 1])]
    [(0.65, [1.0, 0.92]), (0.35, [0.0, 0.71])]
    """
    member = np.asarray(category)
    rows = len(outcomes.weight)
    if member.ndim == 1:
        whole = member.shape == (rows,) and member.dtype.kind in "iub" and bool(np.all(member >= 0))
        require(whole, "category", f"must hold {rows} integers of at least 0", member.shape)
        member = member[:, None] == np.arange(int(member.max()) + 1)
    p = member.astype(np.float64)
    require(p.shape[:1] == (rows,) and p.ndim == 2, "category", f"must have shape ({rows}, categories)", p.shape)
    sums = bool(np.all(p >= 0)) and bool(np.all(np.abs(p.sum(axis=1) - 1) <= SUM_TOLERANCE))
    require(sums, "category", "must be probabilities that add up to 1 over the categories [-]", p.sum(axis=1)[:3])
    weight = outcomes.weight[:, None] * p
    share = weight.sum(axis=0)
    way_out = "Number the categories 0, 1, ... without gaps."
    require(bool(np.all(share > 0)), "category", "must each have a share above 0 [-]", share.tolist(), way_out)
    return tuple((float(s), replace(outcomes, weight=w / w.sum())) for s, w in zip(share, weight.T, strict=True))


def at_price(classes: Sequence[RequestClass], price: float = 1.0) -> Served:
    r"""Return each class at its own :math:`\lambda_k = v_k / \mu`; of two equally good policies the cheaper.

    Parameters
    ----------
    price : float
        mu, worth given up for one cost unit; 1 where worth and cost are in the same money [-].

    Raises
    ------
    InputError
        If the shares do not add up to 1 or the price is not above 0.

    Examples
    --------
    >>> from theory.cascade import frontier
    >>> from theory.outcomes import from_patterns, with_verifier
    >>> table = with_verifier(from_patterns(("small", "large"), {"11": 60, "01": 25, "10": 5, "00": 10}), 1.0, 0.0)
    >>> curve = frontier(table, (1.0, 5.0))
    >>> plan = at_price([RequestClass("free", 0.8, 2.0, curve), RequestClass("paid", 0.2, 20.0, curve)])
    >>> [round(part.cost, 2) for part in plan.parts], round(plan.cost, 2), round(plan.quality, 2)
    ([1.0, 2.75], 1.35, 0.7)
    """
    _check(classes)
    require(price > 0, "price", "must be above 0 [worth per cost unit]", price)
    return _served(classes, [_single(k.frontier.at_lambda(k.worth / price)) for k in classes], price)


@dataclass(frozen=True, eq=False)
class JointFrontier:
    """The greatest worth at each mean cost of all requests: at each vertex every class is at a vertex of its own."""

    classes: tuple[RequestClass, ...]
    at: NDArray[np.intp]  # (n, classes) vertex of each class
    price: Array  # (n - 1,) mu of the edges, falling [worth per cost unit]

    @cached_property
    def cost(self) -> Array:
        """Mean cost of each vertex, (n,) [cost unit per request]."""
        return self._mean([k.share * k.frontier.cost for k in self.classes])

    @cached_property
    def worth(self) -> Array:
        """Mean worth of each vertex, (n,) [cost unit per request]."""
        return self._mean([k.share * k.worth * k.frontier.quality for k in self.classes])

    @cached_property
    def quality(self) -> Array:
        """Mean quality of each vertex, (n,) [-]."""
        return self._mean([k.share * k.frontier.quality for k in self.classes])

    def _mean(self, tables: list[Array]) -> Array:
        return np.asarray(sum(t[self.at[:, k]] for k, t in enumerate(tables)))

    def at_budget(self, budget: float) -> Served:
        """Return the plan of greatest worth whose mean cost is ``budget``; one class at most is mixed.

        Parameters
        ----------
        budget : float
            [cost unit per request]

        Raises
        ------
        InfeasibleError
            If even the cheapest plan costs more.
        InputError
            If the budget exceeds what the best plan can use.
        """
        low, high = float(self.cost[0]), float(self.cost[-1])
        unit, rounding = "[cost unit per request]", 1e-9 * max(high, 1e-300)
        if not budget >= low - rounding:
            raise InfeasibleError(f"`budget` must be at least {low:.6g} {unit}, the cheapest plan's; got {budget!r}.")
        rule, way_out = f"binds only up to {high:.6g} {unit}", f"Pass {high:.6g}."
        require(budget <= high + rounding, "budget", rule, budget, way_out)
        i = int(np.clip(np.searchsorted(self.cost, budget, side="right") - 1, 0, max(len(self.cost) - 2, 0)))
        parts = [_single(k.frontier.vertices[v]) for k, v in zip(self.classes, self.at[i], strict=True)]
        if len(self.cost) == 1:
            return _served(self.classes, parts, float("inf"))
        moved = int(np.argmax(self.at[i + 1] - self.at[i]))
        share = float(np.clip((budget - self.cost[i]) / (self.cost[i + 1] - self.cost[i]), 0.0, 1.0))
        parts[moved] = _between(parts[moved].low, self.classes[moved].frontier.vertices[self.at[i + 1, moved]], share)
        return _served(self.classes, parts, float(self.price[i]))


def joint_frontier(classes: Sequence[RequestClass]) -> JointFrontier:
    r"""Return the joint frontier: the edges of all classes in the order of what they bring per cost.

    .. math:: \mu_{\mathrm{edge}} = v_k \Delta q / \Delta c

    Raises
    ------
    InputError
        If the shares do not add up to 1.

    Source
    ------
    Derivation: classes share one price, so frontiers add edge by edge in the order of their slopes.
    """
    _check(classes)
    used = [k for k, c in enumerate(classes) if c.share > 0 and c.worth > 0]
    edges = [
        (-classes[k].worth * (b.quality - a.quality) / (b.cost - a.cost), k)
        for k in used
        for a, b in zip(classes[k].frontier.vertices, classes[k].frontier.vertices[1:], strict=False)
    ]
    edges.sort()  # a class's own edges keep their order: its frontier is concave
    at = np.zeros((len(edges) + 1, len(classes)), dtype=np.intp)
    for i, (_, k) in enumerate(edges):
        at[i + 1] = at[i]
        at[i + 1, k] += 1
    return JointFrontier(tuple(classes), at, np.array([-slope for slope, _ in edges]))


def _single(vertex: Vertex) -> Mixture:
    return Mixture(vertex, vertex, 0.0, vertex.cost, vertex.quality, vertex.lam_low)


def _between(low: Vertex, high: Vertex, gamma: float) -> Mixture:
    cost, quality = ((1 - gamma) * a + gamma * b for a, b in ((low.cost, high.cost), (low.quality, high.quality)))
    return Mixture(low, high, gamma, cost, quality, low.lam_high)


def _served(classes: Sequence[RequestClass], parts: Sequence[Mixture], price: float) -> Served:
    share, worth = (np.array([getattr(k, name) for k in classes]) for name in ("share", "worth"))
    cost, quality = (np.array([getattr(p, name) for p in parts]) for name in ("cost", "quality"))
    return Served(tuple(parts), float(share @ cost), float(share @ quality), float(share @ (worth * quality)), price)


def _check(classes: Sequence[RequestClass]) -> None:
    require(len(classes) > 0, "classes", "must be at least one", len(classes))
    names = [k.name for k in classes]
    require(len(set(names)) == len(names), "classes", "must have different names", names)
    total = sum(k.share for k in classes)
    require(abs(total - 1) <= SUM_TOLERANCE, "share", "must add up to 1 over the classes [-]", total)

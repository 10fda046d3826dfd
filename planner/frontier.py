"""Plans in the plane of cost and quality: which are worth having, and the lambdas at which each is best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .search import Candidate, Rule


def non_dominated(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return which rows no other is at most equal to everywhere and below somewhere; of equal rows the first.

    Examples
    --------
    >>> non_dominated(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0], [1.0, 2.0]])).tolist()
    [0, 1]
    """
    left, found = np.lexsort(values.T[::-1]), []
    while len(left):  # the first one left is dominated by none: all before it have been compared
        found.append(left[0])
        left = left[(values[left] < values[left[0]]).any(axis=1)]
    return np.sort(np.array(found, dtype=np.intp))


def worth_allocating(rules: Sequence[Rule]) -> list[Rule]:
    """Return the rules to which no other of the same tiers is as good in quality at no more visits to any tier.

    The others cost as much or more whatever replicas bear, and are right no more often.
    """
    found: list[int] = []
    for tiers in dict.fromkeys(r.tiers for r in rules):
        at = [i for i, r in enumerate(rules) if r.tiers == tiers]
        values = np.array([[*rules[i].visits, -np.nan_to_num(rules[i].quality)] for i in at])
        found += [at[i] for i in non_dominated(values)]
    return [rules[i] for i in sorted(found)]


@dataclass(frozen=True, slots=True)
class PlanVertex:
    """A plan no other beats at some lambda in [lam_low, lam_high]."""

    candidate: Candidate
    lam_low: float  # [USD per correct answer]
    lam_high: float  # [USD per correct answer]; inf for the best plan of all


def pareto(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the plans that none beats in both cost and quality, cheapest first."""
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.cost, -c.rule.quality, c.e2e_s)):
        if not best or candidate.rule.quality > best[-1].rule.quality + 1e-12:
            best.append(candidate)
    return best


def hull(candidates: Iterable[Candidate]) -> list[PlanVertex]:
    r"""Return the plans on the concave hull with the lambdas at which each maximises :math:`\lambda q - c`.

    Between two neighbours the lambda of equal worth is the slope :math:`\Delta c / \Delta q` [USD per correct answer].
    """
    chain: list[Candidate] = []
    for new in pareto(candidates):
        while len(chain) > 1 and slope(chain[-2], chain[-1]) >= slope(chain[-1], new):
            chain.pop()
        chain.append(new)
    edges = [0.0, *(slope(a, b) for a, b in itertools.pairwise(chain)), math.inf]
    return [PlanVertex(c, low, high) for c, low, high in zip(chain, edges[:-1], edges[1:], strict=True)]


def slope(low: Candidate, high: Candidate) -> float:
    """Return what one more correct answer costs on the way from one plan to another [USD per correct answer]."""
    gain = high.rule.quality - low.rule.quality
    return (high.cost - low.cost) / gain if gain > 0 else math.inf


def lambda_of(candidate: Candidate, vertices: list[PlanVertex]) -> tuple[float, float] | None:
    """Return the lambdas at which ``candidate`` is best of all; None if at none [USD per correct answer]."""
    for vertex in vertices:
        same_cost = math.isclose(vertex.candidate.cost, candidate.cost, rel_tol=1e-9)
        if same_cost and vertex.candidate.rule.quality <= candidate.rule.quality + 1e-9:
            return vertex.lam_low, vertex.lam_high
    return None

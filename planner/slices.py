r"""A slice of a fleet: some of its replicas at the loads of all, so that a run is long for each and short for us.

A run of N requests against a fleet that serves r of them a second lasts N / r seconds. What it shows is steady only if
that is long beside the time T a request takes: a warm-up of three T (:data:`simulator.metrics.WARMUP_TIMES`) stays at
its usual share of the run when

.. math:: N / r \ge 30\, T

Ten thousand GPUs serve 40,000 requests a second; 20,000 requests would last half a second there and show batches that
never grew. Replicas that are served in turn or at random are alike, and each sees a thinned stream of the fleet's
requests: m of M replicas, with m / M of the requests, see the same. In turn, the gaps at a replica are Erlang of M
stages, in the slice of m; both come close to even gaps from a few replicas on. With ``least-outstanding`` a larger
fleet balances better than its slice, which is then the more careful one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from simulator import metrics
from simulator.workload import at_rate, repeated

from .build import Problem
from .figures import Tree, in_order
from .search import Candidate, Group, price

SPAN = metrics.WARMUP_TIMES / metrics.WARMUP_SHARE  # mean times to the answer that a run lasts at least [-]
UNEVEN = 0.01  # by which the load of a replica may differ from the fleet's: replicas are whole [-]
MOST = 400_000  # requests of a slice [-]
HALF = 0.5  # share beyond which the whole fleet is simulated [-]
ROUNDING = 1e-12  # of a share [-]


@dataclass(frozen=True, slots=True)
class Slice:
    """A plan with some of its replicas, and the requests they get."""

    problem: Problem
    candidate: Candidate
    share: float  # of the fleet's requests; 1: all of it [-]


def fleet_slice(problem: Problem, candidate: Candidate, seed: int) -> Slice:
    """Return the smallest slice of a plan whose replicas have the plan's loads; the plan itself where a run is long.

    The price of the slice is the same share of the fleet's as its requests are, so a request costs the same in both;
    the load of each tier is that of the fleet within ``UNEVEN``, or as near as ``MOST`` requests allow.

    Parameters
    ----------
    candidate : Candidate
        With its mean time to the answer, as :meth:`.search.Search.settle` leaves it.
    seed : int
        Of the pairing of lengths and arrivals where the requests at hand are too few and are used again.
    """
    span, workload = SPAN * candidate.e2e_s, problem.workload
    if workload.clients or not math.isfinite(span) or workload.requests >= span * problem.rate:
        return Slice(problem, candidate, 1.0)
    most = MOST / (span * problem.rate)
    groups = _smaller(candidate.groups, most)
    share = price(problem, groups) / price(problem, candidate.groups)
    rate = share * problem.rate
    part = tuple(
        replace(g, rate=share * whole.rate * whole.replicas / g.replicas)
        for g, whole in zip(groups, candidate.groups, strict=True)
    )
    times = math.ceil(min(span * rate, MOST) / workload.requests)
    longer = repeated(workload, times, np.random.default_rng([seed, 3]))
    return Slice(replace(problem, workload=at_rate(longer, rate)), replace(candidate, groups=part), share)


def _smaller(groups: tuple[Group, ...], most: float) -> list[Group]:
    """Return the groups with the smallest share of their replicas that is even, at most about ``most`` if none is.

    Tried are the shares at which one group has a whole number of replicas; every group keeps one.
    """
    have = np.array([g.replicas for g in groups])
    shares = np.unique(np.concatenate([np.arange(1, n + 1) / n for n in have]))
    shares = shares[shares >= 1 / have.min() - ROUNDING]
    counts = np.maximum(np.rint(shares[:, None] * have), 1)
    uneven = np.abs(counts / (shares[:, None] * have) - 1).max(axis=1)
    even = int(np.argmax(uneven <= UNEVEN))  # the last one, all replicas, is
    if shares[even] > most:
        even = int(np.argmin(np.where(shares <= max(most, shares[0]), uneven, np.inf)))
    if shares[even] > HALF:
        return list(groups)
    return [replace(g, replicas=int(m)) for g, m in zip(groups, counts[even], strict=True)]


def of_fleet(figures: Tree, part: Slice, whole: Candidate) -> Tree:
    """Return the figures of a slice as those of the fleet: counts and flows are scaled up, all else is the same."""
    if part.share == 1:
        return figures | {"fleet_share": 1.0}

    def up(of: Tree, *names: str) -> Tree:
        return of | {name: metrics.scaled(of[name], 1 / part.share) for name in names}

    tiers = [
        up(tier, "requests_per_s", "output_tokens_per_s") | {"replicas": g.replicas, "gpus": g.gpus}
        for tier, g in zip(figures["tiers"], in_order(whole), strict=True)
    ]
    return figures | {
        "throughput": up(figures["throughput"], "requests_per_s", "output_tokens_per_s"),
        "goodput": up(figures["goodput"], "requests_per_s"),
        "in_system": up(figures["in_system"], "mean"),
        "tiers": tiers,
        "cost": figures["cost"] | {"gpus": whole.gpus},
        "fleet_share": part.share,
    }

"""What a plan would do at other loads than its own, and where the time of its rounds goes: figures to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory import queueing

from .build import Problem
from .crossover import without_draft
from .predict import draft_step, verify_step
from .search import Candidate, Group, price
from .service import Service, with_length
from .space import P99, Space, occupancy

Array = NDArray[np.float64]
SHARES = np.linspace(0.02, 0.98, 49)  # of the largest stable load at which a plan is looked at [-]


def curves(problem: Problem, space: Space, candidate: Candidate) -> dict[str, Any]:
    """Return ``load``, the plan against the arrival rate, and ``rounds``, the parts of a round of each tier.

    Analytic, on the replicas of the plan: every tier keeps its share of the requests while their rate changes.
    """
    return {"load": by_load(problem, space, candidate), "rounds": [_round(problem, space, g) for g in candidate.groups]}


def by_load(problem: Problem, space: Space, candidate: Candidate) -> dict[str, Any]:
    r"""Return cost, latency and the speed-up by speculation of a plan's replicas against the arrival rate.

    Cost is that of all GPUs over the requests, :math:`p / r`. Three ways to draft are compared on the same replicas:
    the schedule of the plan, the draft length that is best for one request at every batch, and none; ``None`` stands
    where a way cannot bear the load. The speed-up of a tier is the mean time of a visit without a draft over that with
    one.
    """
    groups = candidate.groups
    limit = min(_limit([g.service], [g.rate], space) for g in groups)
    ways = {
        "schedule": [g.service for g in groups],
        "fixed": [_fixed(g, space) for g in groups],
        "none": [_plain(g, space) for g in groups],
    }
    ends = {way: _limit(services, [g.rate for g in groups], space) for way, services in ways.items()}
    factors = SHARES * max(limit, *ends.values())
    rates = problem.rate * factors
    drafted = any(g.service.draft for g in groups)
    state = {way: _states(services, groups, factors, space) for way, services in ways.items()}
    visits = np.array([candidate.rule.visits[candidate.rule.tiers.index(g.tier)] for g in groups])
    return {
        "requests_per_s": rates.tolist(),
        "own_requests_per_s": problem.rate,
        "usd_per_1000_requests": (1000 * price(problem, groups) / rates).tolist(),
        "ways": {
            way: {
                "limit_requests_per_s": problem.rate * ends[way],
                "e2e_mean_s": _known(visits @ state[way]["e2e_s"]),
                "tpot_mean_s": _known(visits @ state[way]["tpot_s"] / visits.sum()),
                "ttft_p99_s": _known(state[way]["ttft_p99_s"].max(axis=0)),
            }
            for way in (ways if drafted else ("schedule",))
        },
        "tiers": [
            {
                "name": problem.scenario.tiers[g.tier].name,
                "requests_per_s_per_replica": (g.rate * factors).tolist(),
                "speedup": {
                    way: _known(_ratio(state["none"]["e2e_s"][i], state[way]["e2e_s"][i]))
                    for way in ("schedule", "fixed")
                },
            }
            for i, g in enumerate(groups)
            if g.service.draft is not None
        ],
    }


def _plain(group: Group, space: Space) -> Service:
    return group.service if group.service.draft is None else without_draft(space, group)


def _fixed(group: Group, space: Space) -> Service:
    length = int(group.service.rounds.length[0])
    return with_length(group.service, space.load, length) if group.service.draft and length else _plain(group, space)


def _limit(services: Sequence[Service], rates: Sequence[float], space: Space) -> float:
    """Return the largest stable load, as a multiple of the plan's own [-]."""
    at_most = occupancy(list(services), np.full(len(services), 1e-9), space.load).rate_limit
    return float((at_most / np.array(rates)).min())


def _states(services: Sequence[Service], groups: Sequence[Group], factors: Array, space: Space) -> dict[str, Array]:
    """Return the times of a visit to each tier at each load, (tiers, loads) [s]; inf where a tier cannot bear it."""
    rates = np.concatenate([g.rate * factors for g in groups])
    state = occupancy([s for s in services for _ in factors], rates, space.load)
    shape = (len(groups), len(factors))
    stable = state.stable.reshape(shape)
    times = {"e2e_s": state.e2e_s, "tpot_s": state.tpot_s, "ttft_p99_s": queueing.ttft_quantile(state, P99)}
    return {name: np.where(stable, values.reshape(shape), np.inf) for name, values in times.items()}


def _ratio(time: Array, other: Array) -> Array:
    """Return time / other where both are finite, else nan."""
    both = np.isfinite(time) & np.isfinite(other)
    return np.asarray(np.divide(time, other, out=np.full(time.shape, np.nan), where=both))


def _known(values: Array) -> list[float | None]:
    return [float(v) if math.isfinite(v) and v > 0 else None for v in values]


def _round(problem: Problem, space: Space, group: Group) -> dict[str, Any]:
    """Return the parts of a round at the mean batch and context of a tier [s]."""
    service, d = group.service, group.service.deployment
    profile = problem.pool(d).profile
    batch = max(float(occupancy([service], np.array([group.rate]), space.load).batch[0]), 1.0)
    at = min(round(batch), service.batch_cap)
    gamma = int(service.rounds.length[at - 1])
    n, context = np.asarray(batch), np.asarray(space.load.context)
    target = verify_step(d, profile, np.asarray(float(gamma)), n, context)
    parts = {name: float(value) for name, value in target.parts().items()}
    drafting = gamma * float(draft_step(d, profile, service.draft, n, context).total) if service.draft else 0.0
    return {
        "tier": problem.scenario.tiers[group.tier].name,
        "batch": batch,
        "context_tokens": space.load.context,
        "draft_length": gamma,
        "tokens_per_round": float(service.rounds.tokens[at - 1]),
        "round_s": float(target.total) + drafting,
        "parts_s": parts | {"draft": drafting},
        "provenance": profile.provenance,
    }

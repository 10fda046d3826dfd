"""Where speculation stops paying, by load and by batch, with an interval; and what the draft's memory costs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.speculation import tokens_per_round

from .build import Problem
from .predict import time_spread
from .search import Group
from .service import Load, Service, with_length
from .space import Space, occupancy

Array = NDArray[np.float64]
LEVEL = 0.9  # coverage of the intervals [-]
SHARES = np.linspace(0.01, 0.99, 99)  # of the stability limit at which the two are compared [-]


def crossover(problem: Problem, space: Space, group: Group) -> dict[str, Any] | None:
    r"""Return the load and the batch at which the draft length that is best for one request starts to hurt.

    By load: the arrival rate from which the mean time of a visit with that fixed length exceeds that of the same
    replica without a draft, analytic, from no load to the smaller of the two stability limits. By batch: the least
    batch whose round gives fewer tokens a second than plain steps do. Both are found again with rounds
    :math:`e^{\pm h}` times as long,

    .. math:: h^2 = h_{step}^2 + \tfrac14 \ln^2 \frac{E[N](\alpha_{high})}{E[N](\alpha_{low})}

    with the half widths of ln(speed-up) from step times and from the acceptance, taken as independent; that is the
    interval. An end of None lies beyond what was searched: speculation still gains there. None without a draft.

    Source
    ------
    Derivation; the question is vllm-project/vllm#4565, the interval ours.
    """
    service, load = group.service, space.load
    if service.draft is None or service.rounds.length[0] == 0:
        return None
    gamma = int(service.rounds.length[0])
    fixed, plain = with_length(service, load, gamma), without_draft(space, group)
    h = half_width(problem, fixed, gamma, load)
    rate, slow, fast = (
        crossing_rate(stretched(fixed, factor), plain, load) for factor in (1.0, math.exp(h), math.exp(-h))
    )
    batch, small, large = (crossing_batch(stretched(fixed, f), plain) for f in (1.0, math.exp(h), math.exp(-h)))
    limit = float(occupancy([fixed, plain], np.full(2, 1e-9), load).rate_limit.min())
    idle = np.full(1, SHARES[0] * limit)
    at = math.nan if rate is None else float(occupancy([fixed], np.array([rate]), load).batch[0])
    off = np.flatnonzero(service.rounds.length[: service.batch_cap] == 0)
    return {
        "tier": problem.scenario.tiers[group.tier].name,
        "draft": service.draft.model.name,
        "fixed_length": gamma,
        "crossover_requests_per_s": rate,
        "crossover_interval_requests_per_s": [slow, fast],
        "crossover_mean_batch": at if math.isfinite(at) else None,  # none at the rate at which its queue has no end
        "searched_to_requests_per_s": float(SHARES[-1] * limit),
        "crossover_batch": batch,
        "crossover_batch_interval": [small, large],
        "searched_to_batch": min(service.batch_cap, plain.batch_cap),
        "interval_level": LEVEL,
        "off_from_batch": int(off[0] + 1) if len(off) else None,
        "speedup_at_no_load": float(
            occupancy([plain], idle, load).e2e_s[0] / occupancy([fixed], idle, load).e2e_s[0],
        ),
    }


def without_draft(space: Space, group: Group) -> Service:
    """Return the same replica without its draft."""
    same = group.service.deployment
    return next(s for s in space.services[group.tier] if s.draft is None and s.deployment == same)


def half_width(problem: Problem, fixed: Service, gamma: int, load: Load) -> float:
    """Return the half width of ln(speed-up) of a fixed draft length, at half the batch a replica holds [-]."""
    assert fixed.draft is not None
    n, s = (np.asarray(float(x)) for x in (max(fixed.batch_cap // 2, 1), load.context))
    d, profile = fixed.deployment, problem.pool(fixed.deployment).profile
    step = time_spread(d, profile, fixed.draft, np.asarray(float(gamma)), n, s, LEVEL)
    low, high = tokens_per_round(np.array([fixed.draft.acceptance.low, fixed.draft.acceptance.high]), gamma)
    return math.hypot(step, math.log(float(high) / float(low)) / 2)


def stretched(service: Service, factor: float) -> Service:
    """Return the service with rounds that take ``factor`` times as long."""
    return replace(service, rounds=replace(service.rounds, time=factor * service.rounds.time))


def gains(fixed: Service, plain: Service, rates: Array, load: Load) -> Array:
    """Return ln(mean time of a visit without the draft / with it) at each arrival rate [-]."""
    n = len(rates)
    with_draft = occupancy([fixed] * n, rates, load).e2e_s
    return np.asarray(np.log(occupancy([plain] * n, rates, load).e2e_s / with_draft))


def crossing_rate(fixed: Service, plain: Service, load: Load) -> float | None:
    """Return the rate from which the draft hurts, 0 if it always does, None if it never does [requests/s]."""
    limits = occupancy([fixed, plain], np.full(2, 1e-9), load).rate_limit
    rates = SHARES * float(limits.min())
    gain = gains(fixed, plain, rates, load)
    worse = np.flatnonzero(gain < 0)
    if not len(worse):
        # with a draft the queue grows without bound from here on, without one it does not
        return float(limits[0]) if limits[0] < limits[1] else None
    i = int(worse[0])
    if i == 0:
        return 0.0
    return float(rates[i - 1] + (rates[i] - rates[i - 1]) * gain[i - 1] / (gain[i - 1] - gain[i]))


def crossing_batch(fixed: Service, plain: Service) -> int | None:
    """Return the least batch at which a fixed length gives fewer tokens a second, None if none does [sequences]."""
    most = min(fixed.batch_cap, plain.batch_cap)
    slower = (
        fixed.rounds.time[:most] / fixed.rounds.tokens[:most] > plain.rounds.time[:most] / plain.rounds.tokens[:most]
    )
    worse = np.flatnonzero(slower)
    return int(worse[0] + 1) if len(worse) else None


def concurrency(space: Space, group: Group) -> dict[str, Any] | None:
    """Return how many sequences a replica holds with its draft in memory, and would hold without; None without one.

    The draft takes its weights, its own KV cache and the look-ahead slots of each sequence.
    """
    service = group.service
    if service.draft is None:
        return None
    plain = without_draft(space, group)
    return {
        "kv_tokens": service.kv_tokens,
        "kv_tokens_without_draft": plain.kv_tokens,
        "sequences": service.batch_cap,
        "sequences_without_draft": plain.batch_cap,
        "lost": 1 - service.batch_cap / plain.batch_cap,
    }

"""Every way to run a replica of each tier, with the load one replica bears within the SLOs; and why others cannot."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from theory import queueing
from theory.errors import InfeasibleError
from theory.load_prices import Curve
from theory.queueing import Occupancy
from theory.specs import Deployment

from .build import Problem
from .predict import draft_degrees
from .scenario import Slo, TierChoice
from .service import Load, Service, build_service

Array = NDArray[np.float64]
RATE_GRID = np.linspace(0.02, 0.995, 48)  # shares of a replica's stability limit at which the SLOs are tried [-]
CONGESTION_GRID = np.concatenate([np.linspace(0.01, 0.9, 60), 1 - np.geomspace(0.1, 0.004, 40)[1:]])  # the same, finer
P99 = 0.99  # the percentile of the TTFT objective [-]


@dataclass(frozen=True, slots=True)
class Space:
    """The services of every tier and what each replica bears."""

    load: Load
    services: tuple[tuple[Service, ...], ...]  # by tier
    capacity: tuple[Array, ...]  # by tier, greatest arrival rate of a replica that keeps the SLOs; 0: none [requests/s]
    excluded: tuple[str, ...]  # why other combinations cannot serve
    drafted: tuple[bool, ...] = ()  # by tier, whether it must use its draft; none must by default

    def unit_cost(self, problem: Problem, tier: int) -> float:
        """Price of the GPU time of a visit to ``tier`` at the capacity of its best service; inf if none [USD]."""
        prices = np.array([s.gpus * problem.pool(s.deployment).price for s in self.services[tier]])
        with np.errstate(divide="ignore"):
            return float(np.min(prices / self.capacity[tier], initial=np.inf))


def enumerate_space(problem: Problem) -> Space:
    """Return all combinations of tensor parallelism, draft and draft placement that fit, with their capacities.

    Raises
    ------
    InfeasibleError
        If no tier has a service that keeps the SLOs at any load; the message says what binds.
    """
    load = Load.of(problem.workload)
    services: list[tuple[Service, ...]] = []
    excluded: list[str] = []
    drafted = tuple(must_draft(choice) for choice in problem.scenario.tiers)
    for tier, choice in enumerate(problem.scenario.tiers):
        found: list[Service] = []
        for pool, tp in itertools.product(problem.pools, choice.tp):
            deployment = problem.deployment(tier, tp, pool)
            if tp > pool.gpus:
                where = problem.where(deployment)
                excluded.append(f"{choice.name} tp{tp}{where}: exceeds fleet.gpus = {pool.gpus}")
                continue
            for built in of_degree(problem, deployment, tier, load):
                if isinstance(built, str):
                    excluded.append(built)
                else:
                    found.append(built)
        services.append(tuple(found))
    slo = problem.scenario.slo
    capacity = tuple(allowed(s, capacities(list(s), load, slo), d) for s, d in zip(services, drafted, strict=True))
    if not any(np.any(c > 0) for c in capacity):
        raise InfeasibleError(nothing(problem, services, load, excluded))
    return Space(load, tuple(services), capacity, tuple(excluded), drafted)


def must_draft(choice: TierChoice) -> bool:
    """Return whether a tier may not run without a draft."""
    return choice.draft not in ("auto", "none")


def allowed(services: Sequence[Service], capacity: Array, drafted: bool) -> Array:
    """Return the capacities, 0 for services without a draft where the tier must use one [requests/s]."""
    return np.where([drafted and s.draft is None for s in services], 0.0, capacity) if len(services) else capacity


def under_slo(analytic: Space, known: Space, slo: Slo) -> Space:
    """Return the space under other objectives; what is known of a capacity keeps its ratio to the analytic one."""
    drafted = analytic.drafted or (False,) * len(analytic.services)
    each = zip(analytic.services, drafted, strict=True)
    after = tuple(allowed(s, capacities(list(s), analytic.load, slo), d) for s, d in each)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = [np.where(a > 0, k / a, 1.0) for k, a in zip(known.capacity, analytic.capacity, strict=True)]
    return replace(known, capacity=tuple(r * c for r, c in zip(ratios, after, strict=True)))


def of_degree(problem: Problem, deployment: Deployment, tier: int, load: Load) -> list[Service | str]:
    """Return the services of a tier on one degree of one pool, or why they cannot be: without a draft, then with."""
    profile, choice = problem.pool(deployment).profile, problem.scenario.tiers[tier]
    built: list[Service | str] = []
    for seqs in choice.max_num_seqs or [deployment.limits.max_num_seqs]:
        limited = replace(deployment, limits=replace(deployment.limits, max_num_seqs=seqs))
        plain = build_service(tier, limited, profile, None, load)
        built.append(plain)
        if isinstance(plain, str):  # what does not fit alone does not fit beside a draft
            break
        for draft, asked in zip(problem.drafts[tier], choice.drafts, strict=True):
            if choice.draft not in ("auto", asked.model):
                continue
            for degree, length in itertools.product(draft_degrees(draft.model, deployment.tp), asked.draft_lengths):
                fixed = None if length == "auto" else length
                built.append(build_service(tier, limited, profile, replace(draft, tp=degree), load, fixed))
    return built


def occupancy(services: list[Service], rates: Array, load: Load) -> Occupancy:
    """Return the steady state of each service at the rate beside it; arrays of one entry per service."""
    states = max((len(s.rounds.time) for s in services), default=0)
    first, further = (_padded([getattr(s, f) for s in services], states) for f in ("first_s", "further_s"))
    alone = np.array([s.alone_s for s in services])
    return queueing.occupancy(
        rates,
        np.full(len(services), max(load.output - 1, 1e-9)),
        _padded([s.rounds.time for s in services], states),
        _padded([s.rounds.tokens for s in services], states),
        overshoot=np.array([s.overshoot for s in services]),
        slots=np.array([s.batch_cap for s in services]),
        prefill_time=first,
        prefill_further=further,
        prefill_square=first**2 * load.prompt_square / load.prompt**2,
        prefill_alone=alone,
        prefill_steps=np.ones(len(services)),
        length_cv2=load.output_cv2,
    )


def _padded(rows: list[Array], states: int) -> Array:
    """Return rows of one length: those of smaller batch limits go on at their last value, beyond their slots."""
    return np.array([row if len(row) == states else np.pad(row, (0, states - len(row)), mode="edge") for row in rows])


def congestion(service: Service, load: Load, capacity: float, replicas: int) -> Curve:
    """Return how many requests are in the replicas of a service against their rate, for :mod:`theory.load_prices`.

    Parameters
    ----------
    capacity : float
        The greatest rate that one replica bears within the SLOs [requests/s].
    """
    limit = float(occupancy([service], np.array([1e-9]), load).rate_limit[0])
    rates = np.unique(np.append(CONGESTION_GRID[CONGESTION_GRID * limit < capacity] * limit, [capacity]))
    times = occupancy([service] * len(rates), rates, load).e2e_s
    return Curve(rates, times, capacity * replicas, replicas)


def capacities(services: list[Service], load: Load, slo: Slo) -> Array:
    """Return the greatest rate at which each service keeps the SLOs; 0 where no rate does [requests/s]."""
    if not services:
        return np.zeros(0)
    limit = occupancy(services, np.full(len(services), 1e-9), load).rate_limit
    low, high = _bracket(services, limit[:, None] * RATE_GRID, load, slo, 8)
    fine = low[:, None] + (high - low)[:, None] * np.linspace(0.0, 1.0, 13)
    return _bracket(services, np.maximum(fine, 1e-9), load, slo, 4)[0]


def _bracket(services: list[Service], rates: Array, load: Load, slo: Slo, stride: int) -> tuple[Array, Array]:
    """Return for each service the last rate that keeps the SLOs before the first that does not, and that one.

    Waits grow with the load, so that every ``stride``-th rate is tried first, then those before the first bad one.
    """
    row, count = np.arange(len(services)), rates.shape[1]
    tried = np.arange(stride - 1, count + stride - 1, stride).clip(max=count - 1)
    block = _first_bad(services, rates[:, tried], load, slo)
    inner = block[:, None] * stride + np.arange(stride - 1)
    within_block = _first_bad(services, rates[row[:, None], np.minimum(inner, count - 1)], load, slo)
    first_bad = np.minimum(block * stride + within_block, count)
    low = np.where(first_bad > 0, rates[row, np.maximum(first_bad - 1, 0)], 0.0)
    return low, rates[row, np.minimum(first_bad, count - 1)]


def _first_bad(services: list[Service], rates: Array, load: Load, slo: Slo) -> NDArray[np.int64]:
    """Return the index of the first rate of each service that does not keep the SLOs, their number if all do."""
    repeated = [s for s in services for _ in range(rates.shape[1])]
    good = within(occupancy(repeated, rates.ravel(), load), slo).reshape(rates.shape)
    return np.asarray(np.where(good.all(axis=1), rates.shape[1], np.argmin(good, axis=1)))


def within(state: Occupancy, slo: Slo) -> NDArray[np.bool_]:
    """Return where a steady state keeps the SLOs of a visit."""
    with np.errstate(invalid="ignore"):
        late = queueing.ttft_tail(state, slo.ttft_p99_s)
        return np.asarray(state.stable & (state.tpot_s <= slo.tpot_mean_s) & (late <= 1 - P99))


def nothing(problem: Problem, services: Sequence[tuple[Service, ...]], load: Load, excluded: Sequence[str]) -> str:
    """Return why no service keeps the SLOs at any load, and what comes nearest."""
    flat = [s for of_tier in services for s in of_tier]
    if not flat:
        return f"nothing fits: {excluded[0]}. Allow more GPUs per replica (tiers.tp), fp8, or a smaller model."
    state = occupancy(flat, np.full(len(flat), 1e-6), load)
    slo = problem.scenario.slo
    ttft = float(np.min(queueing.ttft_quantile(state, P99)))
    tpot = float(np.min(state.tpot_s))
    if ttft > slo.ttft_p99_s:
        return (
            f"no deployment keeps `slo.ttft_p99_s` = {slo.ttft_p99_s:g} s even without load: the fastest needs "
            f"{ttft:.3g} s. The nearest plan has ttft_p99_s = {ttft:.3g}."
        )
    return (
        f"no deployment keeps `slo.tpot_mean_s` = {slo.tpot_mean_s:g} s even without load: the fastest needs "
        f"{tpot:.3g} s. The nearest plan has tpot_mean_s = {tpot:.3g}."
    )

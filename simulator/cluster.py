"""Tiers of replicas: who answers, who escalates, and what a request goes through from arrival to answer.

Escalation only goes up the tiers, so they are simulated in order: a request arrives at the next tier of its path when
the one before completes it. Which path it takes is drawn from the quality model before any time is simulated: a row of
outcomes, the signal each tier would show in it, and the policy's moves on those signals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from theory.cascade import Policy, execute
from theory.cost import dollars
from theory.errors import require
from theory.outcomes import Outcomes, draw, draw_covariate
from theory.specs import Limits

from .engine import (
    ROUTINGS,
    Acceptance,
    FloatArray,
    IntArray,
    Records,
    Routing,
    StepTable,
    acceptance_of,
    draws,
    ready_times,
    simulate,
    simulate_together,
)
from .metrics import Status, status
from .workload import Workload


@dataclass(frozen=True, slots=True, eq=False)
class TierSetup:
    """A tier as deployed: equal replicas behind a router."""

    name: str
    table: StepTable
    limits: Limits
    kv_tokens: int  # of one replica [tokens]
    schedule: int | Sequence[int] | IntArray = 0  # gamma, or gamma for n = 0..max_num_seqs [tokens]
    alpha: Acceptance = 0.0  # acceptance, one or per request of the workload, or a law [-]
    replicas: int = 1  # [-]
    gpus: int = 1  # of one replica [-]
    routing: Routing = "round-robin"
    ready_s: float | FloatArray = 0.0  # when the replicas have their model, one for all or one each [s]
    kv_from: str = ""  # name of an earlier tier of the same model whose KV cache of a prompt it reads; "": of none
    kv_read_s: float = 0.0  # time to read it [s/token]

    def __post_init__(self) -> None:
        require(self.replicas >= 1, "replicas", "must be at least 1 [-]", self.replicas)
        require(self.gpus >= 1, "gpus", "must be at least 1 [-]", self.gpus)
        require(self.routing in ROUTINGS, "routing", f"must be one of {', '.join(ROUTINGS)}", self.routing)
        ok = math.isfinite(self.kv_read_s) and self.kv_read_s >= 0
        require(ok, "kv_read_s", "must be finite and at least 0 [s/token]", self.kv_read_s)
        ready_times(self.ready_s, self.replicas)


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """What the quality model and the policy decide for each of n requests, time left aside."""

    visits: NDArray[np.bool_]  # tiers run, (n, K)
    answer: NDArray[np.intp]  # tier whose answer is returned, -1 for none, (n,)
    quality: FloatArray  # of that answer: 1 right, 0 wrong or none, (n,) [-]


@dataclass(frozen=True, slots=True, eq=False)
class ClusterRecords:
    """What happened to every request, in the order of the workload. Times are nan for a refused request."""

    arrival: FloatArray  # [s]
    first_token: (
        FloatArray  # of the tier whose answer is returned; visible to a user only if that was decided by then [s]
    )
    completion: FloatArray  # end of the last tier run: only then is the answer known to be the one [s]
    prompt: IntArray  # [tokens]
    output: IntArray  # of the returned answer; 0 if none [tokens]
    path: IntArray  # tiers run, bit k = tier k
    answer: NDArray[np.intp]  # tier index, -1 for none
    correct: FloatArray  # quality of the returned answer [-]
    rounds: IntArray  # over all tiers run [-]
    drafted: IntArray  # [tokens]
    accepted: IntArray  # [tokens]
    preemptions: IntArray  # [-]
    gpu_s: FloatArray  # share of the busy time of the replicas x their GPUs [GPU s]
    refused: NDArray[np.bool_]  # larger than the KV cache of a tier on its path
    tiers: tuple[Records | None, ...]  # of the visits to each tier, in order of arrival there; None if there was none
    visitors: tuple[NDArray[np.intp], ...]  # the requests those are

    def usd(self, price_per_gpu_hour: float) -> FloatArray:
        """Return what the GPU time of each request costs; time in which GPUs wait is nobody's [USD]."""
        return dollars(self.gpu_s, price_per_gpu_hour)

    @property
    def status(self) -> Status:
        """Return "overloaded" if any tier is."""
        return "overloaded" if any(t is not None and status(t) == "overloaded" for t in self.tiers) else "steady"


def decide(
    count: int,
    outcomes: Outcomes,
    policy: Policy,
    rng: np.random.Generator,
    other: Policy | None = None,
    gamma: float = 0.0,
) -> Paths:
    """Draw the paths of ``count`` requests: outcome row, signals, moves; ``other`` is followed with probability gamma.

    Raises
    ------
    InputError
        If gamma is not a probability, or is above 0 without another policy, or the policies have other tiers.

    Examples
    --------
    >>> from theory.cascade import solve
    >>> from theory.outcomes import from_patterns, with_verifier
    >>> table = with_verifier(from_patterns(("small", "large"), {"11": 60, "01": 25, "10": 5, "00": 10}), 1.0, 0.0)
    >>> paths = decide(10_000, table, solve(table, (1.0, 5.0), lam=10.0), np.random.default_rng(0))
    >>> bool(abs(paths.visits[:, 1].mean() - 0.35) < 0.02)
    True
    """
    require(0.0 <= gamma <= 1.0, "gamma", "must lie in [0, 1] [-]", gamma)
    require(other is not None or gamma == 0.0, "gamma", "must be 0 without another policy [-]", gamma)
    for rule in (policy, other):
        same = rule is None or rule.tiers == outcomes.tiers
        require(same, "policy", f"must have the tiers {outcomes.tiers}", getattr(rule, "tiers", None))
    row, level = draw(outcomes, count, rng)
    known = draw_covariate(outcomes, row, rng) if outcomes.covariates > 1 else None
    switched = rng.random(count) < gamma if other is not None else None
    return follow(policy, level, outcomes.correct[row], other, switched, known)


def follow(
    policy: Policy,
    level: NDArray[np.intp],
    correct: FloatArray,
    other: Policy | None = None,
    switched: NDArray[np.bool_] | None = None,
    known: NDArray[np.intp] | None = None,
) -> Paths:
    """Return the paths of requests whose signals and outcomes are known: real prompts, or drawn with their lengths.

    Parameters
    ----------
    policy : Policy
    level : (n, K) array of integers
        The level each tier shows if it is run.
    correct : (n, K) array
        Whether its answer is right, or its expected quality [-].
    other : Policy, optional
        Followed by the requests that are ``switched``, (n,).
    known : (n,) array of integers, optional
        The covariate of each request, where the policies have one.

    Raises
    ------
    InputError
        If shapes disagree.
    """
    require(correct.shape == level.shape, "correct", f"must have shape {level.shape}", correct.shape)
    visits, answer = execute(policy, level, known)
    if other is not None and switched is not None:
        visits_other, answer_other = execute(other, level, known)
        visits = np.where(switched[:, None], visits_other, visits)
        answer = np.where(switched, answer_other, answer)
    right = np.take_along_axis(correct, np.maximum(answer, 0)[:, None], axis=1)[:, 0]
    return Paths(visits, answer, np.where(answer >= 0, right, 0.0))


def only(tier: int, tiers: int, count: int, quality: FloatArray | None = None) -> Paths:
    """Return the paths of ``count`` requests that all run one tier and take its answer; quality nan if not given."""
    visits = np.zeros((count, tiers), dtype=np.bool_)
    visits[:, tier] = True
    unknown = np.full(count, np.nan) if quality is None else quality
    return Paths(visits, np.full(count, tier, dtype=np.intp), unknown)


def simulate_cluster(
    workload: Workload, tiers: Sequence[TierSetup], paths: Paths, seed: int, outputs: IntArray | None = None
) -> ClusterRecords:
    """Run ``workload`` through the tiers along its ``paths``.

    Parameters
    ----------
    workload : Workload
        Arrivals and lengths. The prompt of a request is the same at every tier. One that has run the tier ``kv_from``
        arrives when its prompt's keys and values have been read from there, and computes the last prompt token alone;
        they are read from a store that loses nothing, and beside the work of either tier.
    tiers : sequence of TierSetup
        In the order of escalation.
    paths : Paths
        Of as many requests over as many tiers (:func:`decide`).
    seed : int
        Of acceptances and random routing; the draws of a request do not depend on what others do.
    outputs : (n, K) array, optional
        Output length of each request at each tier; that of the workload at all by default [tokens].

    Returns
    -------
    ClusterRecords
        A request that a tier refuses goes no further and returns no answer.

    Raises
    ------
    InputError
        If shapes disagree, or a closed loop visits more than one tier (its next request would depend on a later tier).
    """
    count = workload.arrival.size
    require(paths.visits.shape == (count, len(tiers)), "paths", f"must be ({count}, {len(tiers)})", paths.visits.shape)
    lengths = np.broadcast_to(workload.output[:, None], paths.visits.shape) if outputs is None else np.asarray(outputs)
    require(lengths.shape == paths.visits.shape, "outputs", f"must be {paths.visits.shape}", lengths.shape)
    visited = int(np.count_nonzero(paths.visits.any(axis=0)))
    require(
        workload.clients == 0 or visited <= 1,
        "clients",
        "must be 0 where requests visit several tiers",
        workload.clients,
    )
    at = np.array(workload.arrival)
    refused = np.zeros(count, dtype=np.bool_)
    records: list[Records | None] = []
    visitors: list[NDArray[np.intp]] = []
    for k, tier in enumerate(tiers):
        here = np.flatnonzero(paths.visits[:, k] & ~refused)
        reads = _reads(tiers, k, paths)[here]
        at[here] += reads * (tier.kv_read_s * (workload.prompt[here] - 1))
        order = np.argsort(at[here], kind="stable")
        here, reads = here[order], reads[order]
        visitors.append(here)
        if here.size == 0:
            records.append(None)
            continue
        arrivals = replace_requests(workload, here, at[here], lengths[here, k])
        if reads.any():
            known = np.zeros_like(arrivals.prompt) if arrivals.cached is None else arrivals.cached
            arrivals = replace(arrivals, cached=np.where(reads, arrivals.prompt - 1, known))
        run = simulate_tier(arrivals, _for_requests(tier, here, count), _tier_seed(seed, k), here)
        records.append(run)
        refused[here] = run.refused
        at[here] = run.completion
    return _collect(workload, tiers, paths, lengths, (records, visitors), refused)


def _reads(tiers: Sequence[TierSetup], tier: int, paths: Paths) -> NDArray[np.bool_]:
    """Return which requests have run the earlier tier whose KV cache this one reads, (n,)."""
    earlier = [i for i in range(tier) if tiers[i].name == tiers[tier].kv_from]
    return np.asarray(paths.visits[:, earlier].any(axis=1))


def replace_requests(workload: Workload, who: NDArray[np.intp], arrival: FloatArray, output: IntArray) -> Workload:
    """Return some of the requests with other arrivals and outputs, and the clients and source of ``workload``."""
    return workload.take(who, arrival=arrival, output=output)


def _for_requests(tier: TierSetup, here: NDArray[np.intp], count: int) -> TierSetup:
    if not isinstance(tier.alpha, np.ndarray):
        return tier
    shape = tier.alpha.shape
    require(shape in ((), (count,)), "alpha", f"must be one number or one for each of {count} requests [-]", shape)
    return replace(tier, alpha=acceptance_of(tier.alpha, here))


def _tier_seed(seed: int, tier: int) -> int:
    return int(np.random.SeedSequence([seed, tier]).generate_state(1, np.uint64)[0])


def simulate_tier(workload: Workload, tier: TierSetup, seed: int, ids: NDArray[np.intp] | None = None) -> Records:
    """Run ``workload`` through the replicas of one tier; records in the order of the workload, totals summed.

    Who serves a request is decided when it arrives, among the replicas that are ready by then, or among all if none is:
    in turn, at random, or by the fewest requests outstanding; they are numbered in the order in which they get ready.
    In turn or at random in an open loop nothing else is needed, and each replica is simulated for itself. ``clear_s``
    is that of the overloaded replica whose line was full the longest, inf if none is.

    Raises
    ------
    InputError
        As :func:`simulator.engine.simulate`.
    """
    count = workload.arrival.size
    names = np.arange(count) if ids is None else ids
    ready = ready_times(tier.ready_s, tier.replicas)
    if tier.replicas > 1 and (workload.clients > 0 or tier.routing == "least-outstanding"):
        found = simulate_together(
            workload,
            tier.table,
            tier.limits,
            tier.kv_tokens,
            ready,
            tier.routing,
            tier.schedule,
            tier.alpha,
            seed,
            names,
        )
        return _merged([run for _, run in found], [who for who, _ in found], tier.replicas)
    turn = _turns(workload, tier, ready, seed)
    groups = [(r, g) for r in range(tier.replicas) if (g := np.flatnonzero(turn == r)).size]
    runs = [
        simulate(
            replace_requests(workload, g, workload.arrival[g], workload.output[g]),
            tier.table,
            tier.limits,
            tier.kv_tokens,
            tier.schedule,
            acceptance_of(tier.alpha, g),
            seed,
            names[g],
            float(ready[r]),
        )
        for r, g in groups
    ]
    return _merged(runs, [g for _, g in groups], tier.replicas)


def _turns(workload: Workload, tier: TierSetup, ready: FloatArray, seed: int) -> NDArray[np.intp]:
    """Return the replica of each request where that does not depend on what the replicas do."""
    among = np.searchsorted(ready, workload.arrival, side="right") if workload.clients == 0 else tier.replicas
    among = np.where(among == 0, tier.replicas, among)
    turn = np.arange(workload.requests)
    if tier.routing == "random":
        return np.floor(draws("random", turn.size, seed) * among).astype(np.intp)
    return turn % among


_PER_VISIT = (
    *("arrival", "admitted", "first_token", "completion", "prompt", "output", "rounds"),
    *("drafted", "accepted", "preemptions", "found", "service_s", "refused"),
)


def _merged(runs: Sequence[Records], groups: Sequence[NDArray[np.intp]], replicas: int) -> Records:
    order = np.argsort(np.concatenate(groups), kind="stable")
    columns = {name: np.concatenate([getattr(run, name) for run in runs])[order] for name in _PER_VISIT}
    return Records(
        **columns,
        batch_s=np.sum([run.batch_s for run in runs], axis=0),
        busy_s=sum(run.busy_s for run in runs),
        steps=sum(run.steps for run in runs),
        end_s=max(run.end_s for run in runs),
        emitted=sum(run.emitted for run in runs),
        kv_peak_tokens=max(run.kv_peak_tokens for run in runs),
        kv_tokens=runs[0].kv_tokens,
        clear_s=min(math.inf if status(run) == "steady" else run.clear_s for run in runs),
        closed=runs[0].closed,
        replicas=replicas,
    )


def _collect(
    workload: Workload,
    tiers: Sequence[TierSetup],
    paths: Paths,
    lengths: IntArray,
    visits: tuple[list[Records | None], list[NDArray[np.intp]]],
    refused: NDArray[np.bool_],
) -> ClusterRecords:
    count = workload.arrival.size
    arrival = np.array(workload.arrival)
    first, last, gpu_s = np.full(count, np.nan), np.full(count, np.nan), np.zeros(count)
    sums = {name: np.zeros(count, dtype=np.int64) for name in ("rounds", "drafted", "accepted", "preemptions")}
    path = np.zeros(count, dtype=np.int64)
    for k, (run, here) in enumerate(zip(*visits, strict=True)):
        if run is None:
            continue
        if workload.clients:
            arrival[here] = run.arrival
        last[here] = run.completion
        answering = paths.answer[here] == k
        first[here[answering]] = run.first_token[answering]
        gpu_s[here] += run.service_s * tiers[k].gpus
        path[here] |= 1 << k
        for name, total in sums.items():
            total[here] += getattr(run, name)
    answer = np.where(refused, -1, paths.answer)
    output = np.where(answer >= 0, np.take_along_axis(lengths, np.maximum(answer, 0)[:, None], axis=1)[:, 0], 0)
    first[refused] = last[refused] = np.nan
    return ClusterRecords(
        arrival=arrival,
        first_token=first,
        completion=last,
        prompt=np.array(workload.prompt),
        output=output,
        path=path,
        answer=answer,
        correct=np.where(refused, 0.0, paths.quality),
        **sums,
        gpu_s=gpu_s,
        refused=refused,
        tiers=tuple(visits[0]),
        visitors=tuple(visits[1]),
    )

"""Tiers: paths against the policy's exact value, stages that add up, replicas, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from simulator.cluster import Paths, TierSetup, decide, only, simulate_cluster, simulate_tier
from simulator.engine import ROUTINGS, StepTable, simulate
from simulator.metrics import measure
from simulator.workload import Workload
from theory.cascade import evaluate, frontier, solve
from theory.errors import InputError
from theory.outcomes import from_patterns, with_binormal_signal, with_verifier
from theory.specs import Limits

COSTS = (1.6, 4.2, 8.8)  # [cost unit per visit]
TIERS = ("13b", "34b", "70b")
TABLE = from_patterns(TIERS, {"111": 55, "011": 14, "101": 4, "110": 4, "001": 7, "010": 4, "100": 3, "000": 9})
VERIFIED = with_verifier(TABLE, 0.95, 0.15)


def setup(name: str = "13b", step: float = 0.01, **change: Any) -> TierSetup:
    slots = 16
    n = np.arange(slots + 1)
    base = np.array([step * (1 + 0.02 * n), step * (1.3 + 0.04 * n)])
    base[:, 0] = 0.0
    table = StepTable([0, 4], base, np.zeros(base.shape), [0, 1, 4096], [0.0, step, 10 * step])
    given = {"name": name, "table": table, "limits": Limits(max_num_seqs=slots), "kv_tokens": 10**6}
    return TierSetup(**(given | change))


def work(count: int = 2000, rate: float = 2.0, seed: int = 0) -> Workload:
    rng = np.random.default_rng(seed)
    return Workload(
        np.cumsum(rng.exponential(1 / rate, count)), rng.integers(10, 200, count), 1 + rng.geometric(0.02, count)
    )


def cascade(seed: int = 0, count: int = 2000) -> tuple[Workload, list[TierSetup], Paths]:
    paths = decide(count, VERIFIED, solve(VERIFIED, COSTS, lam=30.0), np.random.default_rng(seed))
    return work(count), [setup(t, 0.01 * (k + 1), gpus=2**k) for k, t in enumerate(TIERS)], paths


# ---------------------------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [5.0, 30.0, 200.0])
@pytest.mark.parametrize("table", [VERIFIED, with_binormal_signal(TABLE, 0.8, 3)])
def test_shares_and_quality_are_those_of_the_policy(lam: float, table: Any) -> None:
    count = 100_000
    policy = solve(table, COSTS, lam=lam)
    paths, exact = decide(count, table, policy, np.random.default_rng(1)), evaluate(policy, table, COSTS)
    error = 4 * 0.5 / np.sqrt(count)
    np.testing.assert_allclose(paths.visits.mean(axis=0), exact.visits, atol=error)
    np.testing.assert_allclose([(paths.answer == k).mean() for k in range(3)], exact.answers, atol=error)
    assert paths.quality.mean() == pytest.approx(exact.quality, abs=error)


def test_a_mixture_meets_its_budget() -> None:
    mixture = frontier(VERIFIED, COSTS).at_budget(3.0)
    count = 100_000
    paths = decide(count, VERIFIED, mixture.low.policy, np.random.default_rng(2), mixture.high.policy, mixture.gamma)
    spent = paths.visits @ np.array(COSTS)
    assert spent.mean() == pytest.approx(3.0, abs=4 * spent.std() / np.sqrt(count))
    assert paths.quality.mean() == pytest.approx(mixture.quality, abs=4 * 0.5 / np.sqrt(count))


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------


def test_stages_add_up() -> None:
    workload, tiers, paths = cascade()
    run = simulate_cluster(workload, tiers, paths, seed=1)
    assert run.status == "steady"
    np.testing.assert_array_equal(run.path, paths.visits @ [1, 2, 4])
    rounds, gpu_s, clock = np.zeros(2000, dtype=int), np.zeros(2000), np.array(workload.arrival)
    for k, (records, here) in enumerate(zip(run.tiers, run.visitors, strict=True)):
        assert records is not None
        np.testing.assert_array_equal(np.sort(here), np.flatnonzero(paths.visits[:, k]))
        assert np.all(np.diff(records.arrival) >= 0)
        np.testing.assert_array_equal(records.arrival, clock[here])  # it arrives when the tier before completes it
        clock[here] = records.completion
        rounds[here] += records.rounds
        gpu_s[here] += records.service_s * 2**k
        answering = paths.answer[here] == k
        np.testing.assert_array_equal(run.first_token[here[answering]], records.first_token[answering])
    np.testing.assert_array_equal(run.completion, clock)
    np.testing.assert_array_equal(run.rounds, rounds)
    np.testing.assert_allclose(run.gpu_s, gpu_s)
    total = sum(r.busy_s * 2**k for k, r in enumerate(run.tiers) if r is not None)
    assert run.gpu_s.sum() == pytest.approx(total)
    assert run.correct.mean() == paths.quality.mean()


def test_a_single_tier_is_the_engine() -> None:
    workload = work(300)
    tier = setup(alpha=0.7, schedule=4)
    run = simulate_cluster(workload, [tier, setup()], only(0, 2, 300), seed=1)
    assert run.tiers[1] is None
    assert np.all(run.path == 1)
    assert np.isnan(run.correct).all()
    alone = simulate_tier(workload, tier, 0)
    assert not np.array_equal(alone.accepted, run.accepted)  # another seed
    assert run.accepted.sum() / run.drafted.sum() == pytest.approx(alone.accepted.sum() / alone.drafted.sum(), abs=0.05)


def test_output_lengths_by_tier() -> None:
    workload, tiers, paths = cascade(count=500)
    outputs = np.stack([workload.output, workload.output + 5, workload.output + 9], axis=1)
    run = simulate_cluster(workload, tiers, paths, 1, outputs)
    np.testing.assert_array_equal(run.output, outputs[np.arange(500), paths.answer])


def test_a_request_too_large_for_a_tier_stops_there() -> None:
    workload = Workload([0.0, 1.0], [10, 500], [5, 5])
    paths = Paths(np.ones((2, 2), dtype=bool), np.array([1, 1]), np.ones(2))
    run = simulate_cluster(workload, [setup(), setup(kv_tokens=256)], paths, 1)
    assert run.refused.tolist() == [False, True]
    assert run.answer.tolist() == [1, -1]
    assert run.correct.tolist() == [1.0, 0.0]
    assert np.isnan(run.completion[1])
    assert run.gpu_s[1] > 0  # the first tier has worked for it
    run = simulate_cluster(workload, [setup(kv_tokens=256), setup()], paths, 1)
    assert run.tiers[1] is not None
    assert run.tiers[1].arrival.size == 1  # it never reached the second


def test_overload_of_one_tier_is_overload() -> None:
    workload, tiers, paths = cascade()
    tiers[2] = setup("70b", 1.0)
    assert simulate_cluster(workload, tiers, paths, seed=1).status == "overloaded"


# ---------------------------------------------------------------------------------------------------------------------
# Replicas
# ---------------------------------------------------------------------------------------------------------------------


def test_round_robin_is_one_engine_per_turn() -> None:
    workload = work(301)
    tier = setup(replicas=3)
    merged = simulate_tier(workload, tier, 7)
    for replica in range(3):
        mine = slice(replica, None, 3)
        alone = simulate(
            Workload(workload.arrival[mine], workload.prompt[mine], workload.output[mine]),
            tier.table, tier.limits, tier.kv_tokens, seed=7,
        )  # fmt: skip
        np.testing.assert_array_equal(merged.completion[mine], alone.completion)
    assert merged.replicas == 3
    assert measure(merged).utilisation.value <= 1.0


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("rate", "expected"), [(2.0, "steady"), (120.0, "overloaded")])
def test_status_of_a_tier_is_that_of_its_replicas(routing: Any, rate: float, expected: str) -> None:
    merged = simulate_tier(work(3000, rate), setup(replicas=3, routing=routing), 7)
    assert measure(merged).status == expected
    assert merged.emitted == merged.output.sum()


def test_random_routing_splits_evenly_but_not_in_turns() -> None:
    """Poisson arrivals split at random are Poisson; in turns they are more regular and wait less."""
    slow = {"limits": Limits(max_num_seqs=1), "replicas": 4}
    waits = []
    for routing in ("random", "round-robin"):
        run = simulate_tier(work(20_000, 5.0), setup(**slow, routing=routing), 3)
        waits.append((run.admitted - run.arrival).mean())
    assert waits[0] > 1.1 * waits[1]


def test_draws_of_a_request_are_its_own() -> None:
    """Common random numbers: more replicas change when, not what."""
    workload = work(300)
    one, three = (simulate_tier(workload, setup(schedule=4, alpha=0.7, replicas=r), 5) for r in (1, 3))
    np.testing.assert_array_equal(one.accepted, three.accepted)


def test_more_replicas_than_requests() -> None:
    assert simulate_tier(work(2), setup(replicas=5), 1).emitted == work(2).output.sum()


def test_same_seed_same_bytes() -> None:
    workload, tiers, paths = cascade(count=400)
    runs = [simulate_cluster(workload, tiers, paths, seed=9) for _ in range(2)]
    for name in ("completion", "gpu_s", "accepted"):
        assert getattr(runs[0], name).tobytes() == getattr(runs[1], name).tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_not_offered_is_named() -> None:
    with pytest.raises(InputError, match="`routing` must be one of round-robin, random, least-outstanding; got 'jsq'"):
        setup(routing="jsq")
    with pytest.raises(InputError, match=r"`ready_s` must be one number or one per replica \(1\)"):
        setup(ready_s=np.zeros(2))
    with pytest.raises(InputError, match="`ready_s` must be finite and at least 0"):
        setup(ready_s=-1.0)
    with pytest.raises(InputError, match="`replicas` must be at least 1"):
        setup(replicas=0)


def test_closed_loops_over_several_tiers_are_refused() -> None:
    closed = Workload(np.zeros(4), np.ones(4), np.full(4, 3), clients=2)
    both = Paths(np.ones((4, 2), dtype=bool), np.ones(4, dtype=int), np.ones(4))
    with pytest.raises(InputError, match="`clients` must be 0 where requests visit several tiers; got 2"):
        simulate_cluster(closed, [setup(), setup()], both, 1)
    run = simulate_cluster(closed, [setup()], only(0, 1, 4), 1)
    assert np.count_nonzero(run.arrival == 0.0) == 2


def test_shapes_and_mixtures_are_checked() -> None:
    policy = solve(VERIFIED, COSTS, lam=30.0)
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="`gamma` must be 0 without another policy"):
        decide(10, VERIFIED, policy, rng, gamma=0.5)
    with pytest.raises(InputError, match=r"`gamma` must lie in \[0, 1\]"):
        decide(10, VERIFIED, policy, rng, policy, 50)
    with pytest.raises(InputError, match=r"`paths` must be \(2000, 1\)"):
        simulate_cluster(work(), [setup()], only(0, 2, 2000), 1)
    with pytest.raises(InputError, match="`alpha` must be one number or one for each of 2000 requests"):
        simulate_cluster(work(), [setup(alpha=np.full(3, 0.5))], only(0, 1, 2000), 1)

"""Replicas on one clock, against plain Python that moves one step at a time; routing, load times, closed loops."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from simulator.cluster import Paths, TierSetup, simulate_cluster, simulate_tier
from simulator.engine import ROUTINGS, Records, Routing, StepTable, draws, simulate, simulate_together
from simulator.metrics import measure, status
from simulator.workload import Workload
from theory.errors import InputError
from theory.specs import Limits, Rules

LEAST: Routing = "least-outstanding"
GAMMAS = (0, 2, 4)
PLENTY = 10**7  # KV capacity that never binds [tokens]
TIE = 1e-9  # see test_reference_engine [s]
TIMES = ("arrival", "admitted", "first_token", "completion", "service_s", "batch_s", "busy_s", "end_s")
COUNTS = (
    *("rounds", "drafted", "accepted", "preemptions", "found", "refused", "steps", "emitted"),
    *("kv_peak_tokens", "kv_tokens"),
)
RULES = (
    Rules(),
    Rules(schedule_ahead=1),
    Rules(mixed_prefill=False),
    Rules(reserve_output=True),
    Rules(1, False, True),
    Rules(1, late_stop=True),
    Rules(1, False, late_stop=True),
)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "reference_engine_together", Path(__file__).with_name("reference_engine.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


reference_tier = load().reference_tier


def table(slots: int = 8, slope: float = 1.37e-5) -> StepTable:
    n = np.arange(slots + 1)
    base = np.array([0.02 * (1 + 0.1 * g) + 2.1e-4 * n * (1 + g) for g in GAMMAS])
    base[:, 0] = 0.0013
    grid, times = np.array([0.0, 7.0, 1e4]), np.array([0.0, 5e-4, 1.0])
    return StepTable(np.array(GAMMAS), base, np.full(base.shape, slope), grid, times, 1.1e-8)


def poisson(count: int, rate: float, seed: int = 0, output: int = 30) -> Workload:
    rng = np.random.default_rng(seed)
    return Workload(
        np.cumsum(rng.exponential(1 / rate, count)), rng.integers(1, 90, count), rng.integers(1, output, count)
    )


def check_same(run: Records, expected: Records, tolerance: float = 1e-9) -> None:
    for name in TIMES:
        a, b = getattr(run, name), getattr(expected, name)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(run, name), getattr(expected, name), err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# The same as plain Python, and as one replica
# ---------------------------------------------------------------------------------------------------------------------


@st.composite
def tiers(draw: st.DrawFn) -> tuple[Workload, Limits, int, list[float], Routing, int]:
    """Few requests; one to four replicas, some not ready; open and closed loops; all rules; small and large KV."""
    count = draw(st.integers(1, 50))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    gap = draw(st.sampled_from([0.0, 0.03, 0.2, 1.0]))
    clients = draw(st.sampled_from([0, 0, 1, 3, 9, 20]))
    think: Any = draw(st.sampled_from([0.0, 0.0717, rng.random(count) * 0.3])) if clients else 0.0
    work = Workload(
        np.cumsum(rng.exponential(gap, count)) if gap else np.zeros(count),
        rng.integers(1, 90, count),
        rng.integers(1, 60, count),
        clients=clients,
        think_time=think,
    )
    slots, block = draw(st.integers(1, 8)), draw(st.sampled_from([1, 3, 16]))
    limits = Limits(
        max_num_seqs=slots,
        max_num_batched_tokens=draw(st.integers(5 * slots, 120)),
        block_size=block,
        rules=draw(st.sampled_from(RULES)),
    )
    ready = sorted(draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, 2.0]), min_size=1, max_size=4)))
    gamma = draw(st.sampled_from([0, 0, 2, 4]))
    return work, limits, draw(st.sampled_from([100, 160, 300, PLENTY])), ready, draw(st.sampled_from(ROUTINGS)), gamma


@settings(deadline=None, max_examples=80)
@given(tier=tiers())
def test_the_same_as_one_step_at_a_time(tier: tuple[Workload, Limits, int, list[float], Routing, int]) -> None:
    work, limits, kv, ready, routing, gamma = tier
    steps = table(limits.max_num_seqs)
    given_ = (routing, gamma, 0.6, 3)
    expected, closest = reference_tier(
        work, steps, limits, kv, ready, *given_, draws(routing, work.requests, 3).tolist()
    )
    assume(closest > TIE)
    found = simulate_together(work, steps, limits, kv, np.array(ready), *given_)
    assert [who.tolist() for who, _ in found] == [who for who, _ in expected]
    for (_, run), (_, other) in zip(found, expected, strict=True):
        check_same(run, other)


@settings(deadline=None, max_examples=40)
@given(tier=tiers())
def test_one_replica_is_the_engine(tier: tuple[Workload, Limits, int, list[float], Routing, int]) -> None:
    work, limits, kv, ready, _, gamma = tier
    steps = table(limits.max_num_seqs)
    alone = simulate(work, steps, limits, kv, gamma, 0.6, 3, ready_s=ready[0])
    assume(not alone.refused.any())  # the engine notices at the end of a step, the door at once: clients swap requests
    ((_, run),) = simulate_together(work, steps, limits, kv, np.array(ready[:1]), LEAST, gamma, 0.6, 3)
    check_same(run, alone)
    assert status(run) == status(alone)


@pytest.mark.parametrize("routing", ["round-robin", "random"])
def test_on_one_clock_or_each_for_itself(routing: Routing) -> None:
    """In turn and at random, replicas need not be simulated together; if they are, nothing changes."""
    work, ready = poisson(2000, 12.0), np.array([0.0, 0.0, 40.0])
    tier = TierSetup("t", table(), Limits(max_num_seqs=8), PLENTY, replicas=3, routing=routing, ready_s=ready)
    apart = simulate_tier(work, tier, 5)
    for who, run in simulate_together(work, table(), tier.limits, PLENTY, ready, routing, seed=5):
        np.testing.assert_allclose(run.completion, apart.completion[who], rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Routing
# ---------------------------------------------------------------------------------------------------------------------


LOAD = 0.8  # of single servers with a mean service time of 1 s [-]


def waits(routing: Routing, seed: int, even: bool = False, replicas: int = 4) -> float:
    """Mean wait at single servers: requests of 10 steps of 0.1 s each (even), or geometric with that mean [s]."""
    steps = StepTable([0], [[0.0, 0.1]], [[0.0, 0.0]], [0, 1], [0.0, 0.0])
    rng = np.random.default_rng(seed)
    count = 8000
    at = np.cumsum(rng.exponential(1 / (LOAD * replicas), count))
    work = Workload(at, np.ones(count), 1 + (np.full(count, 10) if even else rng.geometric(0.1, count)))
    tier = TierSetup("t", steps, Limits(max_num_seqs=1), PLENTY, replicas=replicas, routing=routing)
    run = simulate_tier(work, tier, seed)
    return float((run.admitted - run.arrival)[count // 10 :].mean())


def test_the_fewest_outstanding_wait_less() -> None:
    """Paired by seed, 99 % interval: random, in turn, fewest outstanding; the reverse must fail."""
    mean = {routing: np.array([waits(routing, s) for s in range(8)]) for routing in ROUTINGS}

    def better(a: Routing, b: Routing) -> bool:
        saved = mean[b] - mean[a]
        return bool(saved.mean() - 3.5 * saved.std(ddof=1) / np.sqrt(len(saved)) > 0)  # t quantile, 7 degrees

    assert better(LEAST, "round-robin")
    assert better("round-robin", "random")
    assert not better("round-robin", LEAST)  # negative control


def test_random_routing_is_m_d_1_and_equal_requests_need_no_looking() -> None:
    """A Poisson stream split at random is Poisson: Pollaczek and Khinchine; in turn is best where all are equal."""
    expected = LOAD / (2 * (1 - LOAD))
    seen = np.array([waits("random", s, even=True) for s in range(8)])
    error = 3.5 * seen.std(ddof=1) / np.sqrt(seen.size)
    assert abs(seen.mean() - expected) < error
    assert abs(seen.mean() - 0.84 / (2 * (1 - 0.84))) > error  # negative control: another load
    saved = np.array([waits("round-robin", s, even=True) - waits(LEAST, s, even=True) for s in range(8)])
    assert saved.mean() < 3.5 * saved.std(ddof=1) / np.sqrt(saved.size)


def test_ties_go_to_the_first_and_ends_count_at_once() -> None:
    steps = StepTable([0], [[0.0, 0.01]], [[0.0, 0.0]], [0, 1], [0.0, 0.0])
    work = Workload([0.0, 0.0, 0.0, 10.0, 10.0], np.ones(5), [100, 50, 2, 2, 2])
    found = simulate_together(work, steps, Limits(max_num_seqs=1), PLENTY, np.zeros(3), LEAST)
    assert [who.tolist() for who, _ in found] == [[0, 3], [1, 4], [2]]


# ---------------------------------------------------------------------------------------------------------------------
# Load times
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ROUTINGS)
def test_arrivals_wait_until_a_replica_is_ready(routing: Routing) -> None:
    work = poisson(400, 6.0)
    tier = TierSetup("t", table(), Limits(max_num_seqs=8), PLENTY, replicas=3, routing=routing, ready_s=32.5)
    run = simulate_tier(work, tier, 1)
    early = work.arrival < 32.5
    assert early.any()
    assert run.admitted.min() == 32.5
    assert np.all(run.first_token >= 32.5)
    alone = simulate(work, table(), Limits(max_num_seqs=8), PLENTY, ready_s=32.5)
    assert alone.admitted[0] == 32.5
    assert alone.busy_s < alone.end_s - 32.5 + 1e-9


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_replica_that_is_not_ready_gets_nothing_while_another_is(routing: Routing) -> None:
    work = poisson(600, 6.0)
    tier = TierSetup("t", table(), Limits(max_num_seqs=8), PLENTY, replicas=2, routing=routing, ready_s=[50.0, 0.0])
    run = simulate_tier(work, tier, 1)
    first = simulate_together(work, table(), tier.limits, PLENTY, np.array([0.0, 50.0]), routing, seed=1)
    assert np.all(work.arrival[first[1][0]] >= 50.0)
    assert run.admitted.min() < 1.0
    np.testing.assert_allclose(run.completion[first[1][0]], first[1][1].completion, rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Closed loops, and stress
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_closed_loop_over_replicas_keeps_its_clients_in_flight(routing: Routing) -> None:
    work = Workload(np.zeros(400), np.full(400, 10), np.arange(400) % 37 + 1, clients=9, think_time=0.01)
    tier = TierSetup("t", table(), Limits(max_num_seqs=2), PLENTY, replicas=3, routing=routing)
    run = simulate_tier(work, tier, 1)
    for moment in np.linspace(0.0, float(run.completion.max()), 80):
        assert np.count_nonzero((run.arrival <= moment) & (run.completion > moment)) <= 9
    assert np.count_nonzero(run.arrival == 0.0) == 9
    assert run.emitted == work.output.sum()


def test_an_idle_replica_is_never_passed_over_in_a_closed_loop() -> None:
    """As many clients as replicas: by the fewest outstanding nobody waits; in turn somebody does."""
    work = Workload(np.zeros(300), np.full(300, 10), np.arange(300) % 37 + 1, clients=3)
    most = {}
    for routing in (LEAST, "round-robin"):
        tier = TierSetup("t", table(1), Limits(max_num_seqs=1), PLENTY, replicas=3, routing=routing)
        run = simulate_tier(work, tier, 1)
        most[routing] = float((run.admitted - run.arrival).max())
    assert most[LEAST] < 1e-9
    assert most["round-robin"] > 0.1


def cascade(
    count: int, at: Any, kv: int, prompt: int, output: int, **more: Any
) -> tuple[Workload, Any, list[TierSetup]]:
    work = Workload(at, np.full(count, prompt), np.full(count, output))
    limits = Limits(max_num_seqs=8, max_num_batched_tokens=64, block_size=4)
    setups = [TierSetup(str(k), table(), limits, kv, gpus=2**k, replicas=2, routing=LEAST, **more) for k in range(3)]
    rng = np.random.default_rng(0)
    reach = rng.random(count)[:, None] < np.array([1.0, 0.5, 0.2])
    return work, (setups, Paths(reach, reach.sum(axis=1) - 1, (rng.random(count) < 0.8).astype(float))), setups


@pytest.mark.parametrize("gamma", [0, 2])
def test_every_tier_preempts_and_every_request_completes(gamma: int) -> None:
    """One fits alone and hardly more, and each tier is slower than the one before: all but a few step back."""
    count, limits = 60, Limits(max_num_seqs=8, max_num_batched_tokens=64, block_size=4)
    work = Workload(np.zeros(count), np.full(count, 4), np.full(count, 110))
    setups = []
    for k in range(3):
        t = table()
        slow = StepTable(t.draft_lengths, t.base * 10**k, t.slope, t.prefill_tokens, t.prefill_s)
        setups.append(TierSetup(str(k), slow, limits, 120, gamma, 0.5, replicas=2, routing=LEAST))
    run = simulate_cluster(work, setups, Paths(np.ones((count, 3), bool), np.full(count, 2), np.ones(count)), 3)
    assert np.isfinite(run.completion).all()
    for records in run.tiers:
        assert records is not None
        assert (records.preemptions > 0).mean() > 0.9  # whoever is alone is not preempted
        assert records.emitted == records.output.sum()
        assert records.kv_peak_tokens <= records.kv_tokens


def test_a_million_at_once_on_three_tiers() -> None:
    count = 1_000_000
    work, (setups, paths), _ = cascade(count, np.zeros(count), 10**6, 1, 2)
    run = simulate_cluster(work, setups, paths, 3)
    assert np.isfinite(run.completion).all()
    assert [r.arrival.size for r in run.tiers if r] == paths.visits.sum(axis=0).tolist()
    assert run.rounds.sum() == paths.visits.sum()


def test_the_record_of_a_request_is_the_sum_of_its_visits() -> None:
    count = 800
    at = np.cumsum(np.random.default_rng(1).exponential(0.3, count))
    work, (setups, paths), _ = cascade(count, at, 400, 20, 40, schedule=2, alpha=0.6, ready_s=5.0)
    run, again = (simulate_cluster(work, setups, paths, 3) for _ in range(2))
    sums = {name: np.zeros(count) for name in ("rounds", "accepted", "drafted", "preemptions", "gpu_s")}
    ends, first = np.array(work.arrival), np.full(count, np.nan)
    for k, (records, who) in enumerate(zip(run.tiers, run.visitors, strict=True)):
        assert records is not None
        np.testing.assert_array_equal(records.arrival, ends[who])
        for name, total in sums.items():
            total[who] += records.service_s * 2**k if name == "gpu_s" else getattr(records, name)
        ends[who], first[who] = records.completion, records.first_token
    for name, total in sums.items():
        np.testing.assert_allclose(getattr(run, name), total, rtol=1e-12, err_msg=name)
    np.testing.assert_array_equal(run.completion, ends)
    np.testing.assert_array_equal(run.first_token, first)
    np.testing.assert_array_equal(run.path, paths.visits @ [1, 2, 4])
    np.testing.assert_array_equal(run.output, work.output)
    np.testing.assert_array_equal(run.correct, paths.quality)
    np.testing.assert_allclose(run.usd(3.6), run.gpu_s / 1000, rtol=1e-12)
    for name in ("arrival", "first_token", "completion", "rounds", "accepted", "preemptions", "gpu_s", "correct"):
        assert getattr(run, name).tobytes() == getattr(again, name).tobytes(), name


def test_metrics_take_a_tier_of_replicas_together() -> None:
    tier = TierSetup("t", table(), Limits(max_num_seqs=8), PLENTY, replicas=3, routing=LEAST)
    calm, full = (measure(simulate_tier(poisson(4000, rate), tier, 1)) for rate in (6.0, 200.0))
    assert calm.status == "steady"
    assert calm.utilisation.value <= 1.0
    assert full.status == "overloaded"


def test_refusals() -> None:
    with pytest.raises(InputError, match="`ready_s` must not fall"):
        simulate_together(poisson(3, 1.0), table(), Limits(max_num_seqs=8), PLENTY, np.array([1.0, 0.0]), LEAST)
    with pytest.raises(InputError, match="`routing` must be one of round-robin, random, least-outstanding; got 'kv'"):
        simulate_together(poisson(3, 1.0), table(), Limits(max_num_seqs=8), PLENTY, np.zeros(2), "kv")  # type: ignore[arg-type]

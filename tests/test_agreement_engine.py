"""Laws that hold on every run, whatever is in it: conservation, Little, renewal; and the warm-up rule against M/M/1.

Each comes with a negative control: records or parameters that are wrong and must be found out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from simulator.cluster import Paths, TierSetup, simulate_cluster, simulate_tier
from simulator.engine import Records, StepTable, simulate
from simulator.metrics import conserved, present, replicated, warmup_requests
from simulator.workload import Workload
from theory.specs import Limits
from theory.speculation import tokens_per_round

Array = NDArray[np.float64]

GAMMAS = (0, 2, 4)
SLOTS = 16


def table() -> StepTable:
    n = np.arange(SLOTS + 1)
    base = np.array([0.02 * (1 + 0.1 * g) + 2e-4 * n * (1 + g) for g in GAMMAS])
    base[:, 0] = 0.001
    return StepTable(np.array(GAMMAS), base, np.full(base.shape, 1e-7), [0.0, 1e4], [0.0, 1.0], 1e-8)


def work(rate: float, count: int = 1500, seed: int = 0, clients: int = 0) -> Workload:
    rng = np.random.default_rng([seed, 21])
    arrival = np.cumsum(rng.exponential(1 / rate, count))
    lengths = rng.integers(5, 300, count), 1 + rng.geometric(1 / 40, count)
    return Workload(arrival, *lengths, clients=clients, think_time=0.3 if clients else 0.0)


@dataclass(frozen=True)
class Regime:
    """A run of 1500 requests on one replica of 16 slots, or on several."""

    rate: float = 5.0  # [request/s]
    clients: int = 0
    gamma: int = 0
    kv_tokens: int = 10**6
    budget: int = 8192  # tokens of a step
    replicas: int = 1


REGIMES = {
    "light": Regime(0.5),
    "busy": Regime(10.0),
    "overloaded": Regime(100.0),
    "chunked prompts": Regime(8.0, budget=48),
    "speculation": Regime(10.0, gamma=4),
    "KV pressure": Regime(10.0, kv_tokens=1024),
    "KV pressure and speculation": Regime(10.0, gamma=2, kv_tokens=1024),
    "too large for the cache": Regime(5.0, kv_tokens=256),
    "closed loop": Regime(clients=12),
    "closed loop, KV pressure": Regime(clients=12, kv_tokens=800),
    "three replicas": Regime(20.0, gamma=2, replicas=3),
}


@cache
def run(name: str) -> Records:
    r = REGIMES[name]
    tier = TierSetup("t", table(), Limits(SLOTS, r.budget), r.kv_tokens, r.gamma, 0.7, r.replicas)
    return simulate_tier(work(r.rate, clients=r.clients), tier, seed=3)


def inside(records: Records, at: Array) -> NDArray[np.int64]:
    """Count who is in the system at some moments, request by request."""
    done = np.where(records.refused, records.arrival, records.completion)
    return np.array([np.count_nonzero((records.arrival <= t) & (done > t)) for t in at])


def balanced(records: Records) -> None:
    """At any moment: arrived = completed + refused + in flight, as counted by events and by stays."""
    conserved(records)
    edges = np.linspace(0.0, records.end_s, 101)
    done = np.where(records.refused, records.arrival, records.completion)
    arrived, left = (np.searchsorted(np.sort(x), edges, side="right") for x in (records.arrival, done))
    np.testing.assert_array_equal(arrived - left, inside(records, edges))
    flight = present(records.arrival, done, edges) * np.diff(edges)
    assert flight.sum() == pytest.approx((done - records.arrival).sum(), rel=1e-9)  # Little's law over the whole run


@pytest.mark.parametrize("name", REGIMES)
def test_what_arrives_is_served_refused_or_in_flight(name: str) -> None:
    records, regime = run(name), REGIMES[name]
    balanced(records)
    served = ~records.refused
    assert records.emitted == records.output[served].sum()
    assert records.kv_peak_tokens <= records.kv_tokens
    decoding = present(records.first_token, records.completion, np.linspace(0, records.end_s, 101)) / regime.replicas
    if not records.preemptions.any():  # one preempted waits between its first token and its last without a slot
        assert decoding.max() <= SLOTS
    assert records.refused.any() == (name == "too large for the cache")
    assert records.preemptions.any() == (regime.kv_tokens < 10**6)


@pytest.mark.parametrize("name", [n for n, r in REGIMES.items() if r.kv_tokens == 10**6])
def test_littles_law_between_the_engines_clock_and_the_records(name: str) -> None:
    """The clock adds steps x batch; the records add stays. Both are the time that sequences decoded."""
    records = run(name)
    stays = float(np.nansum(records.completion - records.first_token))
    assert records.decode_s == pytest.approx(stays, rel=1e-9)
    assert records.decode_s != pytest.approx(float(np.nansum(records.completion - records.admitted)), rel=1e-3)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: replace(r, completion=np.where(np.arange(r.arrival.size) == 7, np.nan, r.completion)),
        lambda r: replace(r, emitted=r.emitted + 1),
        lambda r: replace(r, kv_peak_tokens=r.kv_tokens + 16),
        lambda r: replace(r, rounds=np.where(np.arange(r.arrival.size) == 7, r.rounds - 1, r.rounds)),
        lambda r: replace(r, rounds=np.where(np.arange(r.arrival.size) == 7, r.rounds + 1, r.rounds)),
        lambda r: replace(r, busy_s=1.001 * r.busy_s),
    ],
)
def test_what_is_lost_is_found(spoil: Callable[[Records], Records]) -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        balanced(spoil(run("busy")))


def test_a_cascade_loses_nobody_between_its_tiers() -> None:
    workload, rng = work(4.0), np.random.default_rng(5)
    visits = rng.random((1500, 3)) < (0.8, 0.5, 0.3)
    visits[:, 2] |= ~visits.any(axis=1)
    paths = Paths(visits, 2 - np.argmax(visits[:, ::-1], axis=1), rng.random(1500).round())
    tiers = [TierSetup(n, table(), Limits(SLOTS), 10**6, g, 0.7, g or 1) for n, g in (("s", 0), ("m", 2), ("l", 4))]
    found = simulate_cluster(workload, tiers, paths, seed=1)
    assert np.isfinite(found.completion).all()
    emitted, stay = 0, np.zeros(1500)
    for records, who in zip(found.tiers, found.visitors, strict=True):
        assert records is not None
        balanced(records)
        emitted += records.emitted
        stay[who] += records.completion - records.arrival
    assert emitted == (visits * workload.output[:, None]).sum()
    np.testing.assert_allclose(stay, found.completion - found.arrival, atol=1e-9)  # no time between tiers


# ---------------------------------------------------------------------------------------------------------------------
# Speculation: rounds of a request by renewal, exactly
# ---------------------------------------------------------------------------------------------------------------------


def mean_rounds(output: int, alpha: float, gamma: int) -> float:
    r"""Expected rounds for ``output - 1`` tokens: :math:`R(n) = 1 + \sum_k p_k R(n - k)`, p a capped geometric law."""
    law = [(1 - alpha) * alpha**k for k in range(gamma)] + [alpha**gamma]  # k accepted, k + 1 emitted
    rounds = [0.0]
    for n in range(1, output):
        rounds.append(1 + sum(p * rounds[max(n - k - 1, 0)] for k, p in enumerate(law)))
    return rounds[-1]


@pytest.mark.parametrize("output", [2, 5, 12, 80])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.3, 2), (0.7, 4), (0.95, 4)])
def test_rounds_follow_the_renewal_equation(output: int, alpha: float, gamma: int) -> None:
    count = 6000
    requests = Workload(np.zeros(count), np.ones(count), np.full(count, output))
    found = simulate(requests, table(), Limits(SLOTS), 10**6, gamma, alpha, seed=output)
    error = 3.3 * max(found.rounds.std(), 1e-12) / np.sqrt(count)  # 99.9 %: twelve cases
    exact = mean_rounds(output, alpha, gamma)
    assert abs(found.rounds.mean() - exact) <= error
    if output > 2:  # one token takes one round at any acceptance
        assert abs(found.rounds.mean() - mean_rounds(output, alpha - 0.05, gamma)) > error
        assert abs(found.rounds.mean() - (output - 1) / tokens_per_round(alpha, gamma)) > error  # without overshoot


# ---------------------------------------------------------------------------------------------------------------------
# The warm-up rule
# ---------------------------------------------------------------------------------------------------------------------


def test_the_warmup_rule_takes_the_bias_of_an_empty_start_away() -> None:
    """M/M/1 at load 0.7 from empty: a mean over all of 600 requests is low, one after the warm-up is not."""
    load, service, count, runs = 0.7, 0.02, 600, 1500
    flat = StepTable([0], [[0.0, 0.001]], [[0.0, 0.0]], [0.0, 1.0], [0.0, 1e-9])
    means = np.empty((runs, 2))
    for seed in range(runs):
        rng = np.random.default_rng([seed, 22])
        arrival, output = np.cumsum(rng.exponential(service / load, count)), 1 + rng.geometric(0.05, count)
        found = simulate(Workload(arrival, np.ones(count), output), flat, Limits(1), 10**6)
        wait = found.admitted - found.arrival
        means[seed] = wait.mean(), wait[warmup_requests(arrival, found.completion - found.arrival) :].mean()
    exact = load * service * 1.95 / 2 / (1 - load)  # Pollaczek-Khinchine, as in test_metrics
    whole, after = (replicated(x, 0.99) for x in means.T)
    assert after.low <= exact <= after.high
    assert whole.high < exact

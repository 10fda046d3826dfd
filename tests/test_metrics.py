"""Figures of a run: estimators against series of known law, warm-up, status, goodput."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import lfilter

from simulator.engine import Records, StepTable, simulate
from simulator.metrics import (
    LEVEL,
    Slo,
    mean_interval,
    measure,
    quantile_interval,
    status,
    summary,
    warmup_requests,
)
from simulator.workload import Workload
from theory.errors import InputError
from theory.specs import Limits

Array = NDArray[np.float64]
SERVICE = 0.2  # seconds of a request that has a slot [s]


def run(load: float, count: int = 4000, slots: int = 4, seed: int = 0, clients: int = 0) -> Records:
    """Slots that are servers: constant rounds, 20 decode tokens; ``load`` is relative to capacity."""
    rng = np.random.default_rng(seed)
    flat = StepTable([0], [[0.0] + [0.01] * slots], [[0.0] * (slots + 1)], [0, 1], [0.0, 1e-9])
    arrival = np.cumsum(rng.exponential(SERVICE / slots / load, count))
    work = Workload(arrival, np.ones(count), 1 + rng.geometric(1 / 20, count), clients=clients)
    return simulate(work, flat, Limits(max_num_seqs=slots), 10**7)


def ar1(phi: float, count: int, rng: np.random.Generator) -> Array:
    """Stationary, mean 0, deviation 1, correlation phi from one value to the next."""
    noise = rng.standard_normal(count) * math.sqrt(1 - phi**2)
    noise[0] /= math.sqrt(1 - phi**2)
    return np.asarray(lfilter([1.0], [1.0, -phi], noise))


# ---------------------------------------------------------------------------------------------------------------------
# Estimators
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [0.0, 0.9, 0.98])
def test_intervals_cover_what_they_promise_under_correlation(phi: float) -> None:
    """Coverage over 300 series: mean 0, median 0 and the 90 % quantile 1.2816 of the normal law."""
    rng = np.random.default_rng(0)
    hits = np.zeros(3)
    for _ in range(300):
        x = ar1(phi, 4000, rng)
        for i, (estimate, truth) in enumerate(
            [(mean_interval(x), 0.0), (quantile_interval(x, 0.5), 0.0), (quantile_interval(x, 0.9), 1.2816)]
        ):
            hits[i] += estimate.low <= truth <= estimate.high
    assert np.all(hits / 300 > LEVEL - 0.04)
    assert np.all(hits / 300 < 0.997)


def test_ignoring_the_correlation_would_not_cover() -> None:
    """Negative control: the textbook interval of independent values at phi = 0.9."""
    rng = np.random.default_rng(0)
    series = [ar1(0.9, 4000, rng) for _ in range(300)]
    hits = [abs(x.mean()) <= 1.96 * x.std() / math.sqrt(x.size) for x in series]
    assert np.mean(hits) < 0.6


def test_little_data_bounds_little() -> None:
    assert mean_interval([1.0]) == (1.0, -math.inf, math.inf)
    assert quantile_interval(np.arange(20.0), 0.99).high == math.inf
    assert math.isnan(summary([]).mean.value)
    assert summary([]).count == 0


def test_constant_series_has_no_width() -> None:
    assert mean_interval(np.full(100, 3.0)) == (3.0, 3.0, 3.0)


def test_warmup_is_a_tenth_or_three_times_e2e_but_never_over_half() -> None:
    arrival = np.arange(1000.0)
    assert [warmup_requests(arrival, np.full(1000, e)) for e in (0.1, 50.0, 9000.0)] == [100, 150, 500]
    assert warmup_requests(np.zeros(1), np.ones(1)) == 0
    assert measure(run(0.5)).warmup == 400


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


def test_figures_follow_from_the_records() -> None:
    records = run(0.5)
    figures = measure(records, warmup=0)
    tokens = records.output - 1
    tpot = (records.completion - records.first_token)[tokens > 0] / tokens[tokens > 0]
    assert figures.tpot_s.mean.value == pytest.approx(tpot.mean())
    assert figures.tpot_s.mean.value == pytest.approx(0.01)
    assert figures.user_speed.p50.value == pytest.approx(100.0)
    assert figures.e2e_s.p99.value == pytest.approx(np.quantile(records.completion - records.arrival, 0.99))
    decoding = (records.completion - records.first_token).sum() / np.ptp(records.arrival)
    assert figures.batch.value == pytest.approx(decoding, rel=0.01)
    assert figures.requests_per_s.value == pytest.approx(10.0, rel=0.05)
    assert figures.tokens_per_s.value == pytest.approx(figures.requests_per_s.value * records.output.mean())
    assert figures.rounds.value == pytest.approx(20, rel=0.05)
    assert figures.tokens_per_round == (1.0, 1.0, 1.0)
    assert math.isnan(figures.acceptance.value)
    assert (figures.status, figures.refused, figures.preemptions) == ("steady", 0, (0.0, 0.0, 0.0))
    assert figures.service_s.value * 4000 == pytest.approx(records.busy_s)


def test_mean_intervals_contain_the_exact_mean_of_an_m_g_4() -> None:
    """Wait in M/M/4, C(4, a) S / (4 - a), for slots held for 21 rounds (one to prefill, 20 on average to decode).

    Times (1 + c^2) / 2 for the variance of those rounds; half a round for who finds a slot and a running batch.
    """
    slots, held, cv2 = 4, 0.21, 380 / 21**2
    offered = 0.7 * slots * held / SERVICE
    terms = [offered**k / math.factorial(k) for k in range(slots)]
    last = offered**slots / math.factorial(slots) / (1 - offered / slots)
    late = last / (sum(terms) + last)
    exact = late * held / (slots - offered) * (1 + cv2) / 2 + held + 0.005 * (1 - late - 1 / (sum(terms) + last))
    hits = [measure(run(0.7, 8000, seed=seed)).e2e_s.mean for seed in range(40)]
    assert sum(e.low <= exact <= e.high for e in hits) >= 34  # 38 expected, standard deviation 1.4
    assert sum(e.low <= 1.3 * exact <= e.high for e in hits) <= 4  # negative control


def test_goodput_counts_what_keeps_every_objective() -> None:
    records = run(0.9)
    ttft = records.first_token - records.arrival
    figures = measure(records, Slo(ttft_s=0.1), warmup=0)
    assert figures.good.value == pytest.approx((ttft <= 0.1).mean())
    assert figures.goodput.value == pytest.approx(figures.requests_per_s.value * figures.good.value)
    assert measure(records, Slo(tpot_s=0.009), warmup=0).good.value == 0.0
    assert measure(records, warmup=0).good.value == 1.0


def test_a_refused_request_is_not_good() -> None:
    flat = StepTable([0], [[0.0, 0.01]], [[0.0, 0.0]], [0, 1], [0.0, 1e-9])
    records = simulate(Workload([0.0, 1.0, 2.0, 3.0], [10, 10, 900, 10], [5] * 4), flat, Limits(max_num_seqs=1), 64)
    figures = measure(records, warmup=0)
    assert (figures.refused, figures.good.value) == (1, pytest.approx(0.75))
    assert figures.e2e_s.count == 3


# ---------------------------------------------------------------------------------------------------------------------
# Status
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.1, 0.5, 0.8, 0.9])
def test_below_capacity_is_steady(load: float) -> None:
    assert [status(run(load, seed=seed)) for seed in range(10)] == ["steady"] * 10


@pytest.mark.parametrize(("load", "count"), [(1.1, 4000), (1.5, 500), (10.0, 500)])
def test_above_capacity_is_overloaded(load: float, count: int) -> None:
    assert [status(run(load, count, seed=seed)) for seed in range(10)] == ["overloaded"] * 10


def test_a_service_longer_than_the_run_is_overloaded() -> None:
    """Nobody but the first is admitted while the rest arrive."""
    flat = StepTable([0], [[0.0, 1.0]], [[0.0, 0.0]], [0, 1], [0.0, 1e-9])
    assert (
        status(simulate(Workload(np.arange(20) / 10, np.ones(20), np.full(20, 9)), flat, Limits(max_num_seqs=1), 10**6))
        == "overloaded"
    )


def test_a_closed_loop_is_steady_and_counts_every_request() -> None:
    figures = measure(run(1.0, clients=12))
    assert (figures.status, figures.warmup) == ("steady", 0)
    assert figures.utilisation.value == pytest.approx(1.0, rel=1e-6)
    assert figures.utilisation.high == 1.0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_handful_is_steady(count: int) -> None:
    flat = StepTable([0], [[0.0] + [0.01] * 4], [[0.0] * 5], [0, 1], [0.0, 1e-9])
    records = simulate(
        Workload(np.arange(count) * 1e-4, np.ones(count), np.full(count, 4)), flat, Limits(max_num_seqs=4), 10**6
    )
    assert measure(records).status == "steady"


def test_nothing_to_measure_is_refused() -> None:
    flat = StepTable([0], [[0.0, 0.01]], [[0.0, 0.0]], [0, 1], [0.0, 1e-9])
    with pytest.raises(InputError, match="`records` must hold a request that was served"):
        measure(simulate(Workload([0.0], [900], [5]), flat, Limits(max_num_seqs=1), 64))
    with pytest.raises(InputError, match="`warmup` must be below the 10 requests served"):
        measure(run(0.5, 10), warmup=10)
    with pytest.raises(InputError, match=r"`ttft_s` must be above 0 \[s\]"):
        Slo(ttft_s=0.0)

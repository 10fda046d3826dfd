"""Figures of a run: estimators against series of known law, warm-up, status, goodput."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.signal import lfilter

from simulator.engine import Records, StepTable, simulate
from simulator.metrics import (
    LEVEL,
    Estimate,
    Slo,
    conserved,
    mean_interval,
    measure,
    present,
    quantile_interval,
    rates,
    ratio_interval,
    replicated,
    replicated_summary,
    status,
    summary,
    time_mean,
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


# ---------------------------------------------------------------------------------------------------------------------
# Over time, ratios, replications
# ---------------------------------------------------------------------------------------------------------------------

SPANS = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 30)), min_size=1, max_size=30)


@given(SPANS, st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_presence_over_time_adds_up_to_the_stays(spans: list[tuple[float, float]], bins: int) -> None:
    """The integral of the number present is the sum of the stays, and no slice sees more than come by."""
    begin = np.array([b for b, _ in spans])
    end = begin + np.array([length for _, length in spans])
    edges = np.linspace(0.0, 140.0, bins + 1)
    number = present(begin, end, edges)
    assert (number * np.diff(edges)).sum() == pytest.approx((end - begin).sum(), abs=1e-6)
    for j in range(bins):
        inside = np.clip(end, edges[j], edges[j + 1]) - np.clip(begin, edges[j], edges[j + 1])
        assert number[j] == pytest.approx(inside.sum() / (edges[j + 1] - edges[j]), abs=1e-6)


def test_what_never_happened_is_not_present() -> None:
    edges = np.array([0.0, 1.0, 3.0])
    assert present(np.array([0.0, math.nan]), np.array([3.0, 1.0]), edges).tolist() == [1.0, 1.0]
    assert rates(np.array([0.5, 1.0, 2.0, math.nan]), edges).tolist() == [2.0, 0.5]
    assert time_mean(np.ones(40), requests=39) == (1.0, -math.inf, math.inf)


def test_ratio_interval_covers_the_ratio_of_means_not_the_mean_of_ratios() -> None:
    rng = np.random.default_rng(2)
    hits, wrong = 0, 0
    for _ in range(300):
        x = rng.exponential(1.0, 2000) + 0.1
        y = 3 * x + rng.standard_normal(2000) + 1.0  # E[y] / E[x] = 4.3 / 1.1
        estimate = ratio_interval(y, x)
        hits += estimate.low <= 4.3 / 1.1 <= estimate.high
        wrong += estimate.low <= float((y / x).mean()) <= estimate.high
    assert 0.91 < hits / 300 < 0.99
    assert wrong / 300 < 0.1  # negative control
    assert math.isnan(ratio_interval([1.0], [0.0]).value)


def single_server(random: bool, load: float, count: int, seed: int, service: float = 0.02) -> Records:
    """One slot and 20 ms of service, constant or geometric in steps of 1 ms: M/D/1 or, nearly, M/M/1."""
    rng = np.random.default_rng([seed, 11])
    output = 1 + (rng.geometric(1 / 20, count) if random else np.full(count, 20))
    flat = StepTable([0], [[0.0, 0.001]], [[0.0, 0.0]], [0.0, 1.0], [0.0, 1e-9])
    work = Workload(np.cumsum(rng.exponential(service / load, count)), np.ones(count), output)
    return simulate(work, flat, Limits(max_num_seqs=1), 10**7)


def exact_wait(random: bool, load: float, service: float = 0.02) -> float:
    """Pollaczek-Khinchine; Kleinrock (1975), Queueing Systems I, equation 5.77 [s]."""
    return load * service * (1 + (0.95 if random else 0.0)) / 2 / (1 - load)


@pytest.mark.parametrize("random", [False, True])
def test_both_intervals_cover_the_exact_wait_of_m_d_1_and_m_m_1(random: bool) -> None:
    """95 %, give or take: of 100 sets of 8 replications, and of 100 single runs eight times as long."""
    load, count, sets, runs = 0.6, 2500, 100, 8
    exact = exact_wait(random, load)
    means = np.array(
        [
            [measured_wait(single_server(random, load, count, 1000 * i + j)).value for j in range(runs)]
            for i in range(sets)
        ]
    )
    across = [replicated(row) for row in means]
    along = [measured_wait(single_server(random, load, runs * count, 500_000 + i)) for i in range(sets)]
    for estimates in (across, along):
        share = np.mean([e.low <= exact <= e.high for e in estimates])
        assert 0.88 <= share <= 1.0  # 95 % expected, standard deviation 2.2 %
        wrong = np.mean([e.low <= exact_wait(random, 1.1 * load) <= e.high for e in estimates])
        assert wrong < 0.6 * share  # negative control: 10 % more load
    width = [np.mean([e.high - e.low for e in estimates]) for estimates in (across, along)]
    assert 0.6 < width[0] / width[1] < 1.8  # the same number of requests bounds the mean about as well
    assert np.mean([a.low <= b.high and b.low <= a.high for a, b in zip(across, along, strict=True)]) > 0.9


def measured_wait(records: Records) -> Estimate:
    kept = slice(warmup_requests(records.arrival, records.completion - records.arrival), None)
    return mean_interval((records.admitted - records.arrival)[kept])


def test_utilisation_and_line_are_those_of_m_d_1() -> None:
    """Busy share rho; mean line rate x W (Little)."""
    load = 0.6
    runs = [measure(single_server(False, load, 8000, seed)) for seed in range(20)]
    for wanted, found in (
        (load, [r.utilisation for r in runs]),
        (load / 0.02 * exact_wait(False, load), [r.waiting for r in runs]),
        (load / 0.02, [r.requests_per_s for r in runs]),
    ):
        assert sum(e.low <= wanted <= e.high for e in found) >= 16  # 19 expected
        assert sum(e.low <= 1.2 * wanted <= e.high for e in found) <= 4  # negative control
        together = replicated([e.value for e in found], 0.99)
        assert together.low <= wanted <= together.high


def test_replications_need_two_and_leave_out_what_a_run_does_not_have() -> None:
    assert replicated([2.0]) == (2.0, -math.inf, math.inf)
    assert math.isnan(replicated([math.nan]).value)
    assert replicated([1.0, math.nan, 3.0]).value == 2.0
    joined = replicated_summary([summary([1.0, 2.0]), summary([3.0, 4.0], diverges=True)])
    assert (joined.mean.value, joined.count, joined.diverges, joined.mean.high) == (2.5, 4, True, math.inf)


def test_what_grows_has_no_interval_in_an_overloaded_run() -> None:
    over, below = measure(run(1.3)), measure(run(0.8))
    for name in ("ttft_s", "e2e_s"):
        assert getattr(over, name).mean.high == math.inf
        assert getattr(over, name).p99.low == -math.inf
        assert math.isfinite(getattr(below, name).mean.high)
    assert over.waiting.high == math.inf
    assert math.isfinite(over.tpot_s.mean.high)  # a full batch is steady


def test_a_run_that_loses_something_is_a_defect() -> None:
    records = run(0.5, 200)
    conserved(records)
    lost = records.completion.copy()
    lost[3] = math.nan
    for change in ({"emitted": records.emitted - 1}, {"kv_peak_tokens": 10**9}, {"completion": lost}):
        with pytest.raises(RuntimeError, match="the engine lost requests, tokens, KV blocks or time"):
            measure(replace(records, **change))


def test_a_tier_is_measured_on_the_requests_asked_for() -> None:
    records = run(0.5, 1000)
    kept = np.zeros(1000, dtype=bool)
    kept[300:] = True
    assert measure(records, kept=kept).ttft_s == measure(records, warmup=300).ttft_s
    with pytest.raises(InputError, match="`kept` must leave a request that was served; got 0"):
        measure(records, kept=np.zeros(1000, dtype=bool))

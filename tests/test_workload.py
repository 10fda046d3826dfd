"""Workloads: limits, laws against samples, closed loops, refusals by row."""

from __future__ import annotations

import heapq
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from simulator.engine import StepTable, simulate
from simulator.workload import (
    ClosedLoop,
    FixedLengths,
    GeometricLengths,
    Lengths,
    LogNormalLengths,
    PiecewiseRates,
    Workload,
    at_rate,
    closed_loop,
    gamma,
    in_closed_loop,
    open_loop,
    piecewise,
    poisson,
    weibull,
    weibull_shape,
)
from theory.errors import InputError
from theory.specs import Limits


def rng(seed: int = 7) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_poisson_gaps_are_exponential_and_clocks_are_not() -> None:
    gaps = np.diff(poisson(2.0, 20_001, rng()))
    assert stats.kstest(gaps, stats.expon(scale=0.5).cdf).pvalue > 0.01
    assert stats.kstest(gaps, stats.expon(scale=0.52).cdf).pvalue < 0.01
    assert stats.kstest(np.diff(gamma(2.0, 1.3, 20_001, rng())), stats.expon(scale=0.5).cdf).pvalue < 0.01


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 2.0])
def test_gamma_gaps_have_the_rate_and_the_variation_asked_for(cv: float) -> None:
    gaps = np.diff(gamma(4.0, cv, 40_001, rng()), prepend=0.0)
    n = gaps.size
    assert abs(gaps.mean() - 0.25) <= 4 * 0.25 * cv / math.sqrt(n) + 1e-12
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.05 * max(cv, 1e-9))


def test_a_rate_is_a_scale_for_the_same_seed() -> None:
    assert np.allclose(poisson(1.0, 50, rng()), 3 * poisson(3.0, 50, rng()))
    assert np.allclose(weibull(1.0, 2.0, 50, rng()), 3 * weibull(3.0, 2.0, 50, rng()))


@pytest.mark.parametrize(
    ("shape", "cv"),
    [(0.5, math.sqrt(5.0)), (1.0, 1.0), (2.0, math.sqrt(4 / math.pi - 1)), (1 / 3, math.sqrt(19.0))],
)
def test_weibull_shapes_with_closed_moments(shape: float, cv: float) -> None:
    """Exponential, Rayleigh, and powers of an exponential: E X^m = Gamma(1 + m/k) is a factorial or a root of pi."""
    assert weibull_shape(cv) == pytest.approx(shape, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 100.0), st.floats(1.01, 2.0))
def test_weibull_shape_inverts_the_variation_and_falls_with_it(cv: float, factor: float) -> None:
    law = stats.weibull_min(weibull_shape(cv))
    assert law.std() / law.mean() == pytest.approx(cv, rel=1e-6)
    assert weibull_shape(cv * factor) < weibull_shape(cv)


@pytest.mark.parametrize("cv", [0.4, 1.0, 2.5])
def test_weibull_gaps_follow_their_law_and_not_the_gamma_law_of_equal_moments(cv: float) -> None:
    gaps = np.diff(weibull(4.0, cv, 20_001, rng()), prepend=0.0)
    law = stats.weibull_min(weibull_shape(cv), scale=0.25 / stats.weibull_min(weibull_shape(cv)).mean())
    assert stats.kstest(gaps, law.cdf).pvalue > 0.01
    same_moments = stats.gamma(1 / cv**2, scale=cv**2 / 4)
    assert (stats.kstest(gaps, same_moments.cdf).pvalue > 0.01) == (cv == 1.0)
    assert np.allclose(weibull(4.0, 0.0, 3, rng()), [0.25, 0.5, 0.75])


def dispersion(arrival: Any, window: float) -> tuple[float, float]:
    """Variance over mean of the counts in windows, and four of its standard errors, from fifty batches."""
    counts = np.bincount((arrival // window).astype(int))[:-1]
    batches = np.array_split(counts, 50)
    values = np.array([part.var(ddof=1) / counts.mean() for part in batches])
    return float(values.mean()), float(4 * values.std(ddof=1) / math.sqrt(50))


@pytest.mark.parametrize("law", [gamma, weibull])
@pytest.mark.parametrize("cv", [0.5, 2.0])
def test_dispersion_of_renewal_counts_tends_to_the_squared_variation(law: Any, cv: float) -> None:
    """Cox & Lewis (1966), ch. 4: Var N(t) / E N(t) -> cv^2 for long windows, here of 200 gaps."""
    value, bound = dispersion(law(1.0, cv, 400_000, rng()), 200.0)
    assert abs(value - cv**2) < bound + 0.03 * cv**2  # the limit is approached as 1 / window
    assert abs(dispersion(poisson(1.0, 400_000, rng()), 200.0)[0] - cv**2) > bound


DAY = PiecewiseRates((1.0, 0.0, 6.0, 3.0), (30.0, 20.0, 10.0, 40.0))  # mean 2.1


def test_piecewise_counts_are_poisson_in_each_piece() -> None:
    """Independent Poisson counts with mean rate x duration, by chi-squared; rates in another order do not pass."""
    days = 4000
    times = piecewise(DAY, round(DAY.mean * 100 * days), rng())
    day = (times // 100).astype(int)
    ends = np.cumsum((0.0, *DAY.durations))
    for begin, end, rate in zip(ends, ends[1:], DAY.rates, strict=False):
        inside = (times % 100 >= begin) & (times % 100 < end)
        counts = np.bincount(day[inside], minlength=days)[: days - 100]  # the last days may be short of requests
        mean = rate * (end - begin)
        if mean == 0:
            assert counts.sum() == 0
            continue
        spread = ((counts - mean) ** 2).sum() / mean
        assert stats.chi2.ppf(0.001, counts.size) < spread < stats.chi2.ppf(0.999, counts.size)
        wrong = ((counts - 1.1 * mean) ** 2).sum() / (1.1 * mean)
        assert wrong > stats.chi2.ppf(0.999, counts.size)


def test_piecewise_arrivals_are_uniform_within_a_piece() -> None:
    times = piecewise(DAY, 40_000, rng()) % 100
    late = times[times >= 60]
    assert stats.kstest(late, stats.uniform(60, 40).cdf).pvalue > 0.01
    assert stats.kstest(late, stats.uniform(60, 42).cdf).pvalue < 0.01


def test_piecewise_dispersion_is_that_of_the_mixture() -> None:
    """Windows within pieces: Var N / E N = 1 + w Var(r) / E(r), the law of total variance."""
    law, window = PiecewiseRates((1.0, 5.0), (200.0, 200.0)), 10.0
    value, bound = dispersion(piecewise(law, 400_000, rng()), window)
    expected = 1 + window * 4.0 / 3.0
    assert abs(value - expected) < bound
    assert abs(dispersion(poisson(3.0, 400_000, rng()), window)[0] - expected) > bound


def test_one_piece_is_a_poisson_process_and_scaling_keeps_the_day() -> None:
    assert np.allclose(piecewise(PiecewiseRates((2.0,), (7.0,)), 500, rng()), np.cumsum(rng().exponential(0.5, 500)))
    assert DAY.mean == pytest.approx(2.1)
    assert DAY.at(4.2).rates == pytest.approx((2.0, 0.0, 12.0, 6.0))
    assert DAY.at(4.2).durations == DAY.durations


def test_pieces_repeat_or_stop() -> None:
    once = PiecewiseRates(DAY.rates, DAY.durations, repeat=False)
    counts = [piecewise(once, 10_000, rng(seed)).size for seed in range(200)]
    assert abs(np.mean(counts) - 210) < 4 * math.sqrt(210 / 200)
    assert piecewise(once, 10_000, rng()).max() < 100
    assert piecewise(once, 5, rng()).size == 5
    assert piecewise(DAY, 10_000, rng()).max() > 100 * 40


LAWS: list[Lengths] = [
    FixedLengths(17),
    GeometricLengths(40.0),
    LogNormalLengths(median=100.0, sigma=1.0, low=1, high=2000),
    LogNormalLengths(median=1000.0, sigma=0.3, low=900, high=1000),
]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_lengths_are_whole_and_have_the_stated_mean(law: Lengths) -> None:
    drawn = law.draw(60_000, rng())
    assert drawn.dtype == np.int64
    assert drawn.min() >= 1
    half = 4 * drawn.std() / math.sqrt(drawn.size) + 0.1  # four standard errors and the rounding to whole tokens
    assert abs(drawn.mean() - law.mean) <= half
    assert law.draw(5, rng()).tolist() == law.draw(5, rng()).tolist()


def test_log_normal_lengths_follow_their_law_inside_the_cut() -> None:
    law = LogNormalLengths(median=100.0, sigma=1.0, low=10, high=300)
    drawn = law.draw(20_000, rng())
    assert drawn.min() >= 10
    assert drawn.max() <= 300
    grid = np.arange(9, 301)
    empirical = np.searchsorted(np.sort(drawn), grid, side="right") / drawn.size
    bound = stats.kstwobign.isf(0.01) / math.sqrt(drawn.size)
    assert np.abs(empirical - law.cdf(grid)).max() < bound
    assert np.abs(empirical - LogNormalLengths(110.0, 1.0, 10, 300).cdf(grid)).max() > bound
    assert law.cdf([9, 300, 1e9]).tolist() == [0.0, 1.0, 1.0]


def test_a_wide_cut_changes_nothing() -> None:
    law = LogNormalLengths(median=500.0, sigma=0.5, low=1, high=10**9)
    assert law.mean == pytest.approx(500 * math.exp(0.125), rel=1e-6)


def test_open_and_closed_loops() -> None:
    loop = open_loop(poisson(2.0, 100, rng()), FixedLengths(10), GeometricLengths(5.0), rng())
    assert loop.clients == 0
    assert loop.mean_prompt == 10
    assert "GeometricLengths" in loop.source
    closed = closed_loop(ClosedLoop(clients=4, requests=9, think_time=1.5), FixedLengths(3), FixedLengths(2), rng())
    assert (closed.requests, closed.clients, closed.think_time) == (9, 4, 1.5)
    with pytest.raises(InputError, match=r"`rate` is given by the system in a closed loop"):
        _ = closed.rate


def delay_table(step: float) -> StepTable:
    """Steps of one duration, whoever is in them: a request of L tokens takes L steps."""
    return StepTable([0], [[step] * 9], [[0.0] * 9], [0, 1_000_000], [0.0, 0.0])


def ended(work: Workload) -> float:
    limits = Limits(max_num_seqs=8, max_num_batched_tokens=100_000)
    return simulate(work, delay_table(0.01), limits, 1_000_000).end_s


def test_clients_share_one_queue_which_is_a_list_each_only_if_lengths_are_equal() -> None:
    """Without contention the shared queue is list scheduling; lists of N each end with the slowest client."""
    clients, each = 4, 25
    spec = ClosedLoop(clients, clients * each)
    drawn = closed_loop(spec, FixedLengths(10), GeometricLengths(60.0), rng())
    free = [0.0] * clients
    for length in drawn.output:
        heapq.heapreplace(free, free[0] + 0.01 * float(length))
    assert ended(drawn) == pytest.approx(max(free))
    lists = drawn.output.reshape(each, clients).sum(axis=0)
    assert ended(drawn) < 0.99 * 0.01 * float(lists.max())
    equal = closed_loop(spec, FixedLengths(10), FixedLengths(60), rng())
    assert ended(equal) == pytest.approx(0.01 * 60 * each)


@pytest.mark.parametrize("exponential", [False, True])
def test_think_times_and_a_staggered_start(exponential: bool) -> None:
    """Without contention, by Little's law: throughput = clients / (service + mean think time)."""
    spec = ClosedLoop(8, 8000, think_time=0.5, exponential=exponential, start_over=4.0)
    work = closed_loop(spec, FixedLengths(10), FixedLengths(50), rng())
    assert work.pauses[:8].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    limits = Limits(max_num_seqs=8, max_num_batched_tokens=100_000)
    run = simulate(work, delay_table(0.01), limits, 1_000_000)
    assert run.arrival[:8].tolist() == work.pauses[:8].tolist()
    rate = 8000 / run.end_s
    cycle = float((run.completion - run.arrival).mean()) + 0.5
    assert rate == pytest.approx(8 / cycle, rel=0.02)
    assert rate != pytest.approx(8 / (cycle - 0.5), rel=0.02)
    law = stats.expon(scale=0.5)
    assert (stats.kstest(work.pauses[8:], law.cdf).pvalue > 0.01) == exponential


def test_clients_replay_the_lengths_of_a_workload_in_order() -> None:
    served = Workload([0.0, 5.0, 9.0], [10, 20, 30], [1, 2, 3], "a trace")
    loop = in_closed_loop(served, ClosedLoop(2, 2), rng())
    assert loop.prompt.tolist() == [10, 20]
    assert (loop.clients, loop.think_time) == (2, 0.0)
    assert loop.source.startswith("a trace; ClosedLoop(clients=2")
    with pytest.raises(InputError, match=r"`requests` must be at most the 3 of the workload \[-\]; got 4"):
        in_closed_loop(served, ClosedLoop(2, 4), rng())


def test_a_workload_cannot_be_changed_from_outside() -> None:
    times = np.array([0.0, 1.0])
    w = Workload(times, [1, 1], [1, 1])
    times[0] = 9.0
    assert w.arrival[0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        w.prompt[0] = 5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=2, max_size=30, unique=True), st.floats(1e-3, 1e3))
def test_stretching_keeps_the_pattern(times: list[float], rate: float) -> None:
    assume(max(times) - min(times) > 1e-200)
    base = Workload(np.sort(times) - min(times), np.ones(len(times)), np.ones(len(times)))
    stretched = at_rate(base, rate)
    assert stretched.rate == pytest.approx(rate)
    span = base.arrival[-1], stretched.arrival[-1]
    assert np.allclose(base.arrival / span[0], stretched.arrival / span[1])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([0.0, -1.0], [1, 1], [1, 1]), r"`arrival\[1\]` must be finite, at least 0 and not before.*got -1.0"),
        (([2.0, 1.0], [1, 1], [1, 1]), r"`arrival\[1\]` must be .*not before its predecessor"),
        (([0.0, math.nan], [1, 1], [1, 1]), r"`arrival\[1\]` must be finite"),
        (([0.0, 1.0], [1, 0], [1, 1]), r"`prompt\[1\]` must be a whole number of at least 1 \[tokens\]; got 0.0"),
        (([0.0, 1.0], [1, 1], [0, 1]), r"`output\[0\]` must be a whole number of at least 1"),
        (([0.0, 1.0], [1, 1.5], [1, 1]), r"`prompt\[1\]` must be a whole number"),
        (([0.0, 1.0], [1, 1e300], [1, 1]), r"`prompt\[1\]` must be less than 2\^53 \[tokens\]; got 1e\+300"),
        (([0.0], [1, 1], [1, 1]), r"`workload` must have as many arrivals as prompts and outputs; got \(1, 2, 2\)"),
        (([], [], []), r"`workload` must hold at least one request"),
        (([0.0], [1], [1], "", -2), r"`clients` must be an integer of at least 0"),
        (([0.0], [1], [1], "", 2, -1.0), r"`think_time` must be finite and at least 0"),
        (([0.0], [1], [1], "", 2, [-1.0]), r"`think_time\[0\]` must be finite and at least 0 \[s\]; got -1.0"),
        (([0.0], [1], [1], "", 2, [1.0, 2.0]), r"`think_time` must be one number or one per request \[s\]; got 2"),
    ],
)
def test_bad_workloads_are_refused_by_row(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Workload(*arguments)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: poisson(-2.0, 5, rng()), r"`rate` must be finite and above 0 \[request/s\]; got -2.0"),
        (lambda: poisson(1.0, 0, rng()), r"`requests` must be at least 1"),
        (lambda: gamma(1.0, -1.0, 5, rng()), r"`cv` must be finite and at least 0"),
        (lambda: weibull(1.0, -1.0, 5, rng()), r"`cv` must be finite and at least 0"),
        (lambda: weibull(1.0, 2000.0, 5, rng()), r"`cv` must be 0 or lie in \[0.0001, 1000\] for a Weibull law"),
        (lambda: PiecewiseRates((), ()), r"`rates` must be at least one, with as many durations; got \(0, 0\)"),
        (lambda: PiecewiseRates((1.0, 2.0), (3.0,)), r"`rates` must be at least one.*got \(2, 1\)"),
        (lambda: PiecewiseRates((0.0, 0.0), (3.0, 1.0)), r"`rates` must be finite, at least 0 and not all 0"),
        (lambda: PiecewiseRates((1.0, -2.0), (3.0, 1.0)), r"`rates` must be finite, at least 0"),
        (lambda: PiecewiseRates((1.0, 2.0), (3.0, 0.0)), r"`durations` must be finite and above 0 \[s\]"),
        (lambda: DAY.at(0.0), r"`rate` must be finite and above 0"),
        (lambda: piecewise(DAY, 0, rng()), r"`requests` must be at least 1"),
        (
            lambda: piecewise(PiecewiseRates((1e-9,), (1.0,), repeat=False), 5, rng()),
            r"`rates` must let a request arrive before they end.*Let them repeat",
        ),
        (lambda: ClosedLoop(1, 5, start_over=-1.0), r"`start_over` must be finite and at least 0 \[s\]; got -1.0"),
        (lambda: FixedLengths(0), r"`tokens` must be a whole number of at least 1"),
        (lambda: GeometricLengths(0.5), r"`mean` must be finite and at least 1"),
        (lambda: LogNormalLengths(0.0, 1.0, 1, 10), r"`median` must be finite and above 0"),
        (lambda: LogNormalLengths(5.0, 1.0, 10, 9), r"`low, high` must be whole numbers with 1 <= low <= high"),
        (lambda: ClosedLoop(0, 5), r"`clients` must be at least 1 in a closed loop"),
        (lambda: ClosedLoop(1, 0), r"`requests` must be at least 1"),
        (lambda: at_rate(Workload([1.0], [1], [1]), 2.0), r"`rate` needs at least two different arrival times"),
        (lambda: at_rate(Workload([0.0, 1.0], [1, 1], [1, 1]), 0.0), r"`rate` must be finite and above 0"),
    ],
)
def test_bad_laws_are_refused(call: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        call()

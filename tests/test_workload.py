"""Workloads: limits, laws against samples, traces, refusals by row and line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from simulator.workload import (
    ClosedLoop,
    FixedLengths,
    GeometricLengths,
    Lengths,
    LogNormalLengths,
    Workload,
    at_rate,
    closed_loop,
    gamma,
    open_loop,
    poisson,
    read_trace,
)
from theory.errors import InputError

TRACE = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces" / "splitwise_conv.csv"
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


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
        (([0.0], [1, 1], [1, 1]), r"`workload` must have as many arrivals as prompts and outputs; got \(1, 2, 2\)"),
        (([], [], []), r"`workload` must hold at least one request"),
        (([0.0], [1], [1], "", -2), r"`clients` must be an integer of at least 0"),
        (([0.0], [1], [1], "", 2, -1.0), r"`think_time` must be finite and at least 0"),
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


def trace(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "trace.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_vidur_and_azure_layouts_say_the_same(tmp_path: Path) -> None:
    vidur = read_trace(trace(tmp_path, VIDUR + "5.0,374,44\n9.5,396,109\n\n"))
    azure = read_trace(
        trace(tmp_path, AZURE + "2023-11-16 23:59:58.0000000,374,44\n2023-11-17 00:00:02.5000000,396,109\n")
    )
    shuffled = read_trace(
        trace(tmp_path, "x,num_decode_tokens,arrived_at,num_prefill_tokens\n,109,9.5,396\n,44,5,374\n"), sort=True
    )
    for w in (vidur, azure, shuffled):
        assert w.arrival.tolist() == [0.0, 4.5]
        assert w.prompt.tolist() == [374, 396]
        assert w.output.tolist() == [44, 109]


def test_a_trace_can_be_cut_and_stretched(tmp_path: Path) -> None:
    file = trace(tmp_path, VIDUR + "0,1,1\n1,2,2\n4,3,3\nbroken\n")
    w = read_trace(file, rate=10.0, limit=3)
    assert w.arrival.tolist() == pytest.approx([0.0, 0.05, 0.2])
    assert "3 requests, stretched to 10 request/s" in w.source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"`trace` must hold a header and requests.*The file is empty"),
        (VIDUR, r"`trace` must hold at least one request"),
        ("arrived_at,num_prefill_tokens\n0,1\n", r"`trace` must have the columns of a known layout.*num_decode_tokens"),
        (VIDUR + "0,1,1\n1,nan,1\n", r"`trace line 3, tokens` must be a whole number of at least 1.*got 'nan'"),
        (VIDUR + "0,1,1\n1,1,0\n", r"`trace line 3, tokens` must be a whole number of at least 1.*got '0'"),
        (VIDUR + "0,-4,1\n", r"`trace line 2, tokens`.*got '-4'"),
        (VIDUR + "0,1.5,1\n", r"`trace line 2, tokens`.*got '1.5'"),
        (VIDUR + "0,1,\n", r"`trace line 2, tokens`.*got ''"),
        (VIDUR + "0,inf,1\n", r"`trace line 2, tokens`.*got 'inf'"),
        (VIDUR + "nan,1,1\n", r"`trace line 2, arrival` must be a time of at least 0 \[s\] or a date; got 'nan'"),
        (VIDUR + "-1,1,1\n", r"`trace line 2, arrival`.*got '-1'"),
        (VIDUR + "soon,1,1\n", r"`trace line 2, arrival`.*got 'soon'"),
        (VIDUR + "0,1\n", r"`trace line 2` must have 3 columns; got '0,1'"),
        (VIDUR + "5,1,1\n\n4,1,1\n", r"`trace line 4, arrival` must not be before line 2 .*Pass sort=True"),
    ],
)
def test_bad_traces_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_trace(trace(tmp_path, text))


def test_a_trace_that_is_no_file_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`trace` must be a CSV file that exists"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"`trace` must be a readable CSV file"):
        read_trace(tmp_path)
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00arrived")
    with pytest.raises(InputError, match=r"`trace` must be a readable CSV file"):
        read_trace(tmp_path / "bytes.csv")
    with pytest.raises(InputError, match=r"`limit` must be at least 1"):
        read_trace(trace(tmp_path, VIDUR + "0,1,1\n"), limit=0)


@pytest.mark.skipif(not TRACE.exists(), reason="the conversation trace is not part of the repository")
def test_the_conversation_trace_is_read_whole() -> None:
    w = read_trace(TRACE)
    assert w.requests == 19_366  # the count its README states
    assert read_trace(TRACE, rate=2.0).rate == pytest.approx(2.0)

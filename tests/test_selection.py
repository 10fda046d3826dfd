"""Ranking and selection on normal populations of known means: right as often as stated, which a first stage is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from planner.selection import Rule, Selection, best, keeps, spent
from theory.errors import InputError

FIRST, ERROR, RUNS = 10, 0.1, 400
MOST_WRONG = int(binom.ppf(0.999, RUNS, ERROR))  # wrong answers of a rule that errs as often as it may, with 99.9 %


def drawn(rng: np.random.Generator, means: np.ndarray, correlation: float, n: int) -> np.ndarray:
    """Return (n, k) normal observations of spread 1 that share random numbers."""
    shared, own = rng.normal(size=(n, 1)), rng.normal(size=(n, len(means)))
    return means + math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own


def selected(data: np.ndarray, tolerance: float) -> tuple[int, int]:
    """Return the best of the columns and how many observations that took."""
    found = best(list(data.T), tolerance, ERROR, FIRST)
    [chosen] = found.stay
    return chosen, sum(found.taken)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
@pytest.mark.parametrize("k", [2, 5])
def test_the_best_is_selected_as_often_as_stated(k: int, correlation: float) -> None:
    """All others worse by just what makes a difference, the hardest case; the first stage alone errs too often."""
    rng = np.random.default_rng([k, int(10 * correlation)])
    tolerance = 0.3
    means = np.full(k, tolerance)
    means[0] = 0.0
    wrong = early = 0
    for _ in range(RUNS // 4 if k == 5 else RUNS):
        data = drawn(rng, means, correlation, 2000)
        wrong += selected(data, tolerance)[0] != 0
        early += int(np.argmin(data[:FIRST].mean(axis=0))) != 0
    assert wrong <= (MOST_WRONG if k == 2 else binom.ppf(0.999, RUNS // 4, ERROR))
    assert early > MOST_WRONG * (1 if k == 2 else 0.25) or correlation > 0  # what is shared cancels in the first stage


def test_common_random_numbers_save_observations() -> None:
    rng = np.random.default_rng(0)
    means = np.array([0.0, 0.3, 0.5])
    apart, shared = (np.mean([selected(drawn(rng, means, c, 3000), 0.3)[1] for _ in range(30)]) for c in (0.0, 0.9))
    assert shared < 0.4 * apart


@given(gap=st.floats(1.0, 6.0), seed=st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_it_always_ends(gap: float, seed: int) -> None:
    """No later than the band closes, even between systems of equal means."""
    rng = np.random.default_rng(seed)
    tolerance = 1 / gap
    data = drawn(rng, np.zeros(3), 0.5, 4000)
    early = data[:FIRST]
    worst = max(float((early[:, i] - early[:, j]).var(ddof=1)) for i in range(3) for j in range(i))
    most = Rule(FIRST, ERROR / 2).most(worst, tolerance)
    if most > len(data):
        return
    assert selected(data, tolerance)[1] <= 3 * (most + 1)


@pytest.mark.parametrize(("mean", "right"), [(0.7, "in"), (1.3, "out")])
def test_limits_are_told_apart_as_often_as_stated(mean: float, right: str) -> None:
    """Means that far from the limit that it makes a difference; the sign of the first stage errs too often."""
    rng = np.random.default_rng(int(10 * mean))
    rule = Rule(FIRST, ERROR)
    wrong = early = 0
    for _ in range(RUNS):
        x = rng.normal(mean, 1.5, 3000)
        wrong += keeps(x, 1.0, 0.3, rule) != right
        early += ("in" if x[:FIRST].mean() <= 1 else "out") != right
    assert wrong <= MOST_WRONG
    assert early > MOST_WRONG


def test_far_from_the_limit_the_first_stage_suffices() -> None:
    x = np.random.default_rng(1).normal(size=FIRST)
    rule = Rule(FIRST, ERROR)
    assert keeps(x - 20, 0.0, 0.1, rule) == "in"
    assert keeps(x + 20, 0.0, 0.1, rule) == "out"
    assert keeps(x, 0.0, 0.01, rule) == "open"
    assert keeps(x[:-1] - 20, 0.0, 0.1, rule) == "open"


@given(st.lists(st.floats(-5, 5), min_size=FIRST, max_size=60), st.floats(0.01, 2))
@settings(max_examples=100, deadline=None)
def test_a_verdict_stays(values: list[float], tolerance: float) -> None:
    """What was decided is not taken back by what comes after."""
    rule, said = Rule(FIRST, ERROR), "open"
    for n in range(FIRST, len(values) + 1):
        now = keeps(values[:n], 0.0, tolerance, rule)
        assert said in ("open", now)
        said = now


def test_observations_that_do_not_vary_decide_at_once() -> None:
    assert keeps(np.zeros(FIRST), 0.01, 0.0025, Rule(FIRST, 0.001)) == "in"
    assert best([np.zeros(FIRST), np.ones(FIRST)], 0.1, ERROR, FIRST) == Selection((0,), (FIRST, FIRST))


def test_h2_meets_the_table_of_the_paper() -> None:
    """eta of the procedure: half of (2 beta)^(-2 / (n0 - 1)) - 1; large n0 gives the Brownian limit -2 ln(2 beta)."""
    assert Rule(10, 0.05).h2 == pytest.approx(9 * (0.1 ** (-2 / 9) - 1))
    assert Rule(10**6, 0.05).h2 == pytest.approx(-2 * math.log(0.1), rel=1e-4)


def test_errors_of_a_sequence_sum_to_the_whole() -> None:
    assert sum(spent(0.05, i) for i in range(1, 5000)) == pytest.approx(0.05, rel=1e-3)


def test_bad_input_is_refused() -> None:
    for bad, said in (
        (lambda: Rule(1, 0.1), "`first` must be at least 2"),
        (lambda: Rule(5, 0.7), "`error` must lie between"),
        (lambda: keeps([1.0, 2.0], 1.0, 0.0, Rule(2, 0.1)), "`tolerance` must be above 0"),
        (lambda: best([], 1.0, 0.1, 5), "`observations` must hold a system"),
        (lambda: best([[0, 1, 0], [0.1, 0, 1, 2]], 0.1, 0.1, 3), "`observations` must be 4 of each system that stays"),
    ):
        with pytest.raises(InputError, match=said):
            bad()

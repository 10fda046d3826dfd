"""Chains: event simulations that know no formula, real accept/reject sampling of three models, limits, refusals."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from theory.chains import (
    Level,
    MiddleTier,
    Trio,
    buffered_speedup,
    buffered_time,
    draft_time,
    horizontal_speedup,
    horizontal_tokens,
    middle_tier,
    parallel_speedup,
    proposed_tokens,
    recursive_time,
    vertical_speedup,
    vertical_tokens,
)
from theory.errors import InputError
from theory.speculation import speedup, tokens_per_round

Array = NDArray[np.float64]
ROUNDS = 12_000
PROBABILITY = st.floats(0.0, 1.0)


# --- simulations: coins and a clock ----------------------------------------------------------------------------------


def heads(probability: float, most: int, rng: np.random.Generator) -> int:
    """Return how many tosses in a row succeed, at most ``most``."""
    count = 0
    while count < most and rng.random() < probability:
        count += 1
    return count


def propose(levels: tuple[Level, ...], rng: np.random.Generator) -> tuple[int, float]:
    """Return the tokens that a chain proposes in one round, and the time it took, pass by pass."""
    if len(levels) == 1:
        return levels[0].passes, sum(levels[0].time for _ in range(levels[0].passes))
    tokens, clock = 0, 0.0
    for _ in range(levels[0].passes):
        drafted, spent = propose(levels[1:], rng)
        clock += spent + levels[0].time
        tokens += heads(levels[1].acceptance, drafted, rng) + 1
    return tokens, clock


def simulate_vertical(levels: tuple[Level, ...], verify: float, seed: int) -> tuple[Array, Array]:
    """Return the tokens and the time of each round."""
    rng = np.random.default_rng(seed)
    rounds = np.empty((ROUNDS, 2))
    for i in range(ROUNDS):
        drafted, clock = propose(levels, rng)
        rounds[i] = heads(levels[0].acceptance, drafted, rng) + 1, clock + verify
    return rounds[:, 0], rounds[:, 1]


def simulate_buffer(tokens: int, alpha: float, length: int, step: float, draft: float, seed: int) -> Array:
    """Return the times in which the first draft writes ``tokens`` tokens with the help of the second."""
    rng = np.random.default_rng(seed)
    times = np.zeros(ROUNDS)
    for i in range(ROUNDS):
        left = tokens
        while left:
            k = min(length, left - 1)
            times[i] += k * draft + step
            left -= heads(alpha, k, rng) + 1
    return times


def simulate_parallel(
    alpha: float, length: int, verify: float, draft: float, seed: int, until: int = 60_000
) -> tuple[float, float]:
    """Return tokens per second and its standard error: a draft and a target with an event list each."""
    rng = np.random.default_rng(seed)
    events: list[tuple[float, int, str, int]] = [(length * draft, 0, "drafted", 0)]
    serial, epoch, emitted, ready, busy = 0, 0, 0, False, False
    marks: list[tuple[float, int]] = []

    def add(time: float, what: str) -> None:
        nonlocal serial
        serial += 1
        heapq.heappush(events, (time, serial, what, epoch))

    while emitted < until:
        now, _, what, born = heapq.heappop(events)
        if what == "drafted":
            if born != epoch:
                continue  # drafted for a branch that was rejected meanwhile
            ready = True
        else:
            busy = False
            accepted = heads(alpha, length, rng)
            emitted += length if accepted == length else accepted + 1
            marks.append((now, emitted))
            if accepted < length:
                epoch, ready = epoch + 1, False
                add(now + length * draft, "drafted")
        if ready and not busy:
            ready, busy = False, True
            add(now + verify, "verified")
            add(now + length * draft, "drafted")
    return batch_rate(np.array(marks))


def batch_rate(marks: Array, batches: int = 40) -> tuple[float, float]:
    """Return the rate of a cumulative count and its standard error from batches of equal numbers of passes."""
    edges = np.linspace(0, len(marks) - 1, batches + 1).astype(int)
    steps = np.diff(marks[edges], axis=0)
    rates = steps[:, 1] / steps[:, 0]
    return float(marks[-1, 1] / marks[-1, 0]), float(rates.std(ddof=1) / np.sqrt(batches))


def interval(samples: Array) -> tuple[float, float]:
    """Return the 99 % interval of the mean; a hair of width, so that constants lie in their own."""
    half = 2.576 * samples.std(ddof=1) / np.sqrt(samples.size) + 1e-9
    return float(samples.mean() - half), float(samples.mean() + half)


CHAINS = [
    (Level(0.8, 2, 0.3), Level(0.7, 3, 0.05)),
    (Level(0.9, 3, 0.2), Level(0.5, 4, 0.02)),
    (Level(0.6, 1, 0.4), Level(0.9, 6, 0.1)),
    (Level(0.0, 2, 0.3), Level(0.7, 3, 0.05)),
    (Level(1.0, 2, 0.3), Level(0.7, 3, 0.05)),
    (Level(0.8, 2, 0.3), Level(0.0, 3, 0.05)),
    (Level(0.8, 2, 0.3), Level(1.0, 3, 0.05)),
    (Level(1.0, 2, 0.3), Level(1.0, 3, 0.05)),
    (Level(0.0, 2, 0.3), Level(0.0, 3, 0.05)),
    (Level(0.85, 2, 0.3), Level(0.8, 2, 0.1), Level(0.6, 3, 0.01)),
    (Level(0.8, 5, 0.1),),
]


@pytest.mark.parametrize("levels", CHAINS, ids=str)
def test_vertical_chain_agrees_with_the_simulation(levels: tuple[Level, ...]) -> None:
    tokens, times = simulate_vertical(levels, verify=1.1, seed=len(str(levels)))
    low, high = interval(tokens)
    assert low <= vertical_tokens(levels) <= high
    assert draft_time(levels) + 1.1 == pytest.approx(float(times.mean()), rel=1e-9)
    assert vertical_speedup(levels, 1.1, 1.0) == pytest.approx(vertical_tokens(levels) / float(times.mean()), rel=1e-9)
    if 0 < levels[0].acceptance < 1:
        wrong = (Level(0.9 * levels[0].acceptance, levels[0].passes, 0.3), *levels[1:])
        assert not low <= vertical_tokens(wrong) <= high  # the test can fail


def test_proposed_tokens_agree_with_the_simulation() -> None:
    rng = np.random.default_rng(5)
    for levels in CHAINS:
        low, high = interval(np.array([float(propose(levels, rng)[0]) for _ in range(5_000)]))
        assert low <= proposed_tokens(levels) <= high


@pytest.mark.parametrize(("a1", "a2"), [(0.8, 0.5), (0.0, 0.5), (1.0, 0.5), (0.8, 0.0), (0.8, 1.0), (1.0, 1.0)])
def test_horizontal_chain_agrees_with_the_simulation(a1: float, a2: float) -> None:
    rng = np.random.default_rng(11)
    first, second = Level(a1, 3, 0.2), Level(a2, 4, 0.03)
    tokens = np.empty(ROUNDS)
    for i in range(ROUNDS):
        head = heads(a1, 3, rng)
        tokens[i] = 1 + head + (heads(a2, 4, rng) if head == 3 else 0)
    low, high = interval(tokens)
    assert low <= horizontal_tokens(first, second) <= high
    assert horizontal_speedup(first, second, 1.0, 1.0) == pytest.approx(horizontal_tokens(first, second) / 1.72)
    if 0 < a1 < 1:
        assert not low <= horizontal_tokens(Level(0.9 * a1, 3, 0.2), second) <= high


@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize(("tokens", "length"), [(1, 4), (5, 2), (9, 4)])
def test_buffer_agrees_with_the_simulation(tokens: int, length: int, alpha: float) -> None:
    low, high = interval(simulate_buffer(tokens, alpha, length, 0.3, 0.05, seed=tokens))
    assert low <= buffered_time(tokens, alpha, length, 0.3, 0.05) <= high
    if 0 < alpha < 1 and tokens > 1:
        assert not low <= buffered_time(tokens, 0.85 * alpha, length, 0.3, 0.05) <= high


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("length", "draft"), [(1, 0.3), (4, 0.1), (4, 0.25), (6, 0.4)])
def test_parallel_drafting_agrees_with_the_event_simulation(alpha: float, length: int, draft: float) -> None:
    rate, error = simulate_parallel(alpha, length, verify=1.2, draft=draft, seed=length)
    predicted = float(parallel_speedup(alpha, length, target=1.0, verify=1.2, draft=draft))
    assert abs(predicted - rate) <= 3 * error + 1e-3 * rate
    if 0 < alpha < 1:
        wrong = float(parallel_speedup(0.9 * alpha, length, target=1.0, verify=1.2, draft=draft))
        assert abs(wrong - rate) > 3 * error + 1e-3 * rate  # the test can fail


# --- three real distributions ----------------------------------------------------------------------------------------


def draw(p: Array, rng: np.random.Generator) -> int:
    return int(np.searchsorted(np.cumsum(p), rng.random()))


def verify_block(drafted: list[int], q: Array, p: Array, rng: np.random.Generator) -> list[int]:
    """Return what a model p emits on tokens drawn from q: accepted ones, then a correction or the bonus token."""
    emitted = []
    for token in drafted:
        if rng.random() < min(1.0, p[token] / q[token]):
            emitted.append(token)
            continue
        residual = np.maximum(p - q, 0)
        return [*emitted, draw(residual / residual.sum(), rng)]
    return [*emitted, draw(p, rng)]


def test_a_chain_of_real_distributions_is_lossless_and_near_the_formula() -> None:
    """Neighbours' acceptances are *not* independent in truth; here that moves the tokens of a round by under 5 %."""
    rng = np.random.default_rng(3)
    target, middle, small = (rng.dirichlet(np.full(6, 2.0)) for _ in range(3))
    middle = 0.7 * target + 0.3 * middle
    small = 0.5 * middle + 0.5 * small
    levels = (
        Level(float(np.minimum(target, middle).sum()), 2, 0.3),
        Level(float(np.minimum(middle, small).sum()), 3, 0.05),
    )
    tokens, counts = np.empty(8_000), np.zeros(6)
    for i in range(tokens.size):
        block: list[int] = []
        for _ in range(2):
            block += verify_block([draw(small, rng) for _ in range(3)], small, middle, rng)
        out = verify_block(block, middle, target, rng)
        tokens[i] = len(out)
        counts += np.bincount(out, minlength=6)
    expected = target * counts.sum()
    # what is emitted is the target's own distribution: 99.9 % point of chi-square with 5 degrees of freedom
    assert float(((counts - expected) ** 2 / expected).sum()) < 20.5
    assert float(tokens.mean()) == pytest.approx(vertical_tokens(levels), rel=0.05)


# --- limits ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(a=PROBABILITY, b=PROBABILITY, n=st.integers(1, 6), k=st.integers(0, 6))
def test_known_special_cases(a: float, b: float, n: int, k: int) -> None:
    first = Level(a, n, 0.2)
    assert vertical_tokens((first,)) == pytest.approx(float(tokens_per_round(a, n)), rel=1e-9)
    # a useless or absent second draft leaves one draft of length n
    for idle in (Level(0.0, k, 0.01), Level(b, 0, 0.01)):
        assert vertical_tokens((first, idle)) == pytest.approx(float(tokens_per_round(a, n)), rel=1e-9)
    # a perfect second draft makes each round k + 1 tokens long
    perfect = vertical_tokens((first, Level(1.0, k, 0.01)))
    assert perfect == pytest.approx(float(tokens_per_round(a, n * (k + 1))), rel=1e-9)
    # what the target always accepts is all emitted
    always = (Level(1.0, n, 0.2), Level(b, k, 0.01))
    assert vertical_tokens(always) == pytest.approx(1 + n * float(tokens_per_round(b, k)), rel=1e-9)
    assert horizontal_tokens(Level(a, n, 0.2), Level(a, k, 0.2)) == pytest.approx(float(tokens_per_round(a, n + k)))


@settings(max_examples=60, deadline=None)
@given(a=st.floats(0.01, 0.99), b=st.floats(0.01, 0.99), n=st.integers(1, 6), k=st.integers(1, 6))
def test_the_textbook_form_of_two_drafts(a: float, b: float, n: int, k: int) -> None:
    phi = 1 + (a - 1) * (1 - (b * a) ** (k + 1)) / (1 - b * a)
    expected = (1 - a * phi**n) / (1 - a)
    assert vertical_tokens((Level(a, n, 0.2), Level(b, k, 0.01))) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(a=PROBABILITY, g=st.integers(0, 12), c=st.floats(0.0, 0.5))
def test_one_level_is_leviathan(a: float, g: int, c: float) -> None:
    expected = float(speedup(a, g, target=1.0, verify=1.1, draft=c))
    assert vertical_speedup((Level(a, g, c),), 1.1, 1.0) == pytest.approx(expected, rel=1e-9)


def test_a_long_buffer_costs_what_the_recursive_form_says() -> None:
    limit = recursive_time(0.7, 3, step=0.3, draft=0.05)
    assert buffered_time(400, 0.7, 3, 0.3, 0.05) / 400 == pytest.approx(limit, rel=0.01)
    assert buffered_time(4, 0.7, 3, 0.3, 0.05) / 4 > 1.05 * limit  # and a short one more


def test_parallel_drafting_at_the_ends() -> None:
    assert float(parallel_speedup(0.0, 4, target=1.0, verify=1.0, draft=0.1)) == pytest.approx(1 / 1.4)
    assert float(parallel_speedup(1.0, 4, target=1.0, verify=1.0, draft=0.1)) == pytest.approx(4.0)
    assert float(parallel_speedup(1.0, 4, target=1.0, verify=1.0, draft=0.5)) == pytest.approx(2.0)
    free = float(parallel_speedup(0.7, 4, target=1.0, verify=1.0, draft=0.0))
    assert free == pytest.approx(float(tokens_per_round(0.7, 3)))  # nothing to hide, and no bonus token


# --- the middle tier -------------------------------------------------------------------------------------------------


def trio(middle: float = 0.9, small: float = 0.6, direct: float = 0.5, step: float = 0.1) -> Trio:
    return Trio(middle, small, direct, lambda _: 1.0, lambda _: step, 0.02)


def test_a_middle_tier_as_slow_as_the_target_is_not_worth_it() -> None:
    result = middle_tier(trio(step=1.0))
    assert result.gain < 0
    assert result.best("plain", "small", "middle").kind == "small"


def test_a_small_draft_that_is_as_good_needs_no_middle_tier() -> None:
    assert middle_tier(trio(small=0.9, direct=0.9)).gain < 0


def test_a_cheap_good_middle_tier_between_unlike_neighbours_is_worth_it() -> None:
    result = middle_tier(trio(small=0.6, direct=0.5))
    assert result.gain > 0.05
    assert isinstance(result, MiddleTier)


def test_best_plans_are_not_beaten_by_neighbours() -> None:
    result = middle_tier(trio())
    n, k = result.best("vertical").passes
    for other in ((n + 1, k), (n, k + 1), (max(n - 1, 1), k), (n, k - 1)):
        levels = (Level(0.9, other[0], 0.1), Level(0.6, other[1], 0.02))
        assert vertical_speedup(levels, 1.0, 1.0) <= result.best("vertical").speedup + 1e-12
    g, k = result.best("buffered").passes
    assert buffered_speedup(Level(0.9, g, 0.1), Level(0.6, k, 0.02), 1.0, 1.0) == result.best("buffered").speedup


def test_gain_falls_as_the_direct_draft_improves() -> None:
    gains = [middle_tier(trio(direct=d), longest=8, rounds=4).gain for d in (0.5, 0.6, 0.7, 0.8, 0.9)]
    assert gains == sorted(gains, reverse=True)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_percent_is_refused() -> None:
    with pytest.raises(InputError, match=r"`acceptance` must lie in \[0, 1\].*got 80.*pass 0.8"):
        Level(80, 3, 0.1)


@pytest.mark.parametrize("passes", [-1, 2.5, True])
def test_passes_are_whole(passes: int) -> None:
    with pytest.raises(InputError, match=r"`passes` must be an integer of at least 0"):
        Level(0.8, passes, 0.1)


def test_times_are_checked() -> None:
    with pytest.raises(InputError, match=r"`time` must be finite and at least 0 \[s\]"):
        Level(0.8, 3, -0.1)
    with pytest.raises(InputError, match=r"`verify` must be finite and above 0 \[s\]"):
        vertical_speedup((Level(0.8, 3, 0.1),), 0.0, 1.0)
    with pytest.raises(InputError, match=r"`target` must be finite and above 0 \[s\]"):
        parallel_speedup(0.8, 3, target=float("inf"), verify=1.0, draft=0.1)


def test_parallel_drafting_needs_a_draft() -> None:
    with pytest.raises(InputError, match=r"`length` must be at least 1"):
        parallel_speedup(0.8, 0, target=1.0, verify=1.0, draft=0.1)


def test_acceptances_that_no_three_models_have_are_refused() -> None:
    with pytest.raises(InputError, match=r"`direct` must be at least about middle \+ small - 1 = 0.8.*triangle"):
        trio(middle=0.9, small=0.9, direct=0.5)

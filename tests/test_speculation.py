"""Rounds of speculative decoding: limits, refusals, and agreement with real accept/reject sampling."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from theory.acceptance import Positional
from theory.errors import InputError
from theory.speculation import (
    best_length,
    best_schedule,
    break_even_verify,
    cost_per_token,
    elasticities,
    mean_tokens,
    operations_factor,
    paying_ranges,
    real_best_length,
    schedule_gain,
    speedup,
    throughput,
    tokens_per_round,
    tokens_variance,
)

alphas = st.floats(0.0, 1.0)
inner = st.floats(0.01, 0.99)
lengths = st.integers(0, 20)


@pytest.mark.parametrize(("acceptance", "length", "expected"), [(0.9, 0, 1.0), (0.0, 4, 1.0), (1.0, 4, 5.0)])
def test_limits(acceptance: float, length: int, expected: float) -> None:
    assert tokens_per_round(acceptance, length) == expected


@given(alphas, lengths)
@settings(deadline=None)
def test_closed_form_is_the_sum(acceptance: float, length: int) -> None:
    assert tokens_per_round(acceptance, length) == pytest.approx(
        sum(acceptance**i for i in range(length + 1)), rel=1e-12
    )


def test_percent_is_refused() -> None:
    with pytest.raises(InputError, match=r"`acceptance` must lie in \[0, 1\].*got 80.*pass 0.8"):
        tokens_per_round(80, 4)
    with pytest.raises(InputError, match=r"pass 0\.8"):
        mean_tokens(80.0, 4)


# real rounds: two models over a small vocabulary, drafts verified and residuals sampled as the papers write it


class Rounds(NamedTuple):
    emitted: np.ndarray  # tokens in order, -1 where a round emitted none, shape (rounds, length + 1)
    tokens: np.ndarray  # tokens of each round, shape (rounds,)


def draw(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return one token per row of ``probabilities``."""
    edges = np.cumsum(probabilities, axis=-1)
    return (rng.random(len(probabilities))[:, None] * edges[:, -1:] > edges).sum(axis=-1)


def sampled_rounds(
    p: np.ndarray, q: np.ndarray, start: np.ndarray, length: int, rng: np.random.Generator, residual: bool = True
) -> Rounds:
    """Run one round of each sequence: Leviathan et al. (2023), algorithm 1, for models that look one token back.

    p and q have shape (vocabulary, vocabulary): row = previous token, column = next token.
    """
    rounds, alive, last = len(start), np.ones(len(start), bool), start
    emitted = np.full((rounds, length + 1), -1)
    for i in range(length):
        token = draw(q[last], rng)
        ratio = p[last, token] / q[last, token]
        keep = alive & (rng.random(rounds) < np.minimum(1.0, ratio))
        left = np.maximum(p[last] - q[last], 0.0) if residual else p[last]
        instead = draw(left, rng)
        emitted[:, i] = np.where(keep, token, np.where(alive, instead, -1))
        alive, last = keep, np.where(keep, token, last)
    emitted[:, length] = np.where(alive, draw(p[last], rng), -1)  # the bonus token
    return Rounds(emitted, (emitted >= 0).sum(axis=1))


SETTINGS = [(seed, length) for seed in (1, 2, 3) for length in (1, 3, 8)]


@pytest.mark.parametrize(("seed", "length"), SETTINGS)
def test_sampled_rounds_agree(seed: int, length: int) -> None:
    """Tokens per round lie inside the 99 % interval of real rounds; an acceptance 0.02 off does not."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(12)), rng.dirichlet(np.ones(12))
    acceptance = float(np.minimum(p, q).sum())
    same = (np.tile(row, (12, 1)) for row in (p, q))  # no memory: every position has the same two distributions
    tokens = sampled_rounds(*same, np.zeros(60_000, int), length, rng).tokens
    half = 2.576 * tokens.std() / np.sqrt(len(tokens))
    assert abs(tokens.mean() - tokens_per_round(acceptance, length)) < half
    assert abs(tokens.mean() - tokens_per_round(acceptance + 0.02, length)) > half  # the test can fail
    assert abs(tokens.mean() - tokens_per_round(acceptance - 0.02, length)) > half
    assert tokens.var() == pytest.approx(float(tokens_variance(acceptance, length)), rel=0.05)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_output_has_the_distribution_of_the_target(length: int) -> None:
    """The first three tokens of many sequences follow the target's chain; without the residual they do not."""
    vocabulary, sequences = 4, 60_000
    rng = np.random.default_rng(40 + length)
    p, q = (rng.dirichlet(np.ones(vocabulary), vocabulary) for _ in range(2))
    joint = p[0][:, None, None] * p[:, :, None] * p[None, :, :]  # of three tokens after token 0
    for residual in (True, False):
        text = three_tokens(p, q, length, sequences, rng, residual)
        cells = np.ravel_multi_index(tuple(text.T), (vocabulary,) * 3)
        counts = np.bincount(cells, minlength=vocabulary**3)
        probability = chisquare(counts, sequences * joint.ravel()).pvalue
        assert probability > 0.01 if residual else probability < 1e-6


def three_tokens(
    p: np.ndarray, q: np.ndarray, length: int, sequences: int, rng: np.random.Generator, residual: bool
) -> np.ndarray:
    """Return the first three tokens of each sequence, from as many rounds as the slowest one needs."""
    text, last = [[] for _ in range(sequences)], np.zeros(sequences, int)
    while min(map(len, text)) < 3:
        emitted = sampled_rounds(p, q, last, length, rng, residual).emitted
        for sequence, row in zip(text, emitted, strict=True):
            sequence.extend(row[row >= 0])
        last = np.array([sequence[-1] for sequence in text])
    return np.array([sequence[:3] for sequence in text])


def test_drafts_with_memory_are_not_independent() -> None:
    """With sticky hard and easy contexts the i.i.d. law is biased high: rounds start where drafts fail."""
    p = np.array([[0.95, 0.05], [0.05, 0.95]])
    q = np.array([[0.95, 0.05], [0.60, 0.40]])
    rng = np.random.default_rng(9)
    state = np.arange(20_000) % 2
    for _ in range(30):  # to the stationary law of round starts
        rounds = sampled_rounds(p, q, state, 4, rng)
        state = rounds.emitted[np.arange(len(state)), rounds.tokens - 1]
    acceptance = float(np.minimum(p, q).sum(axis=1).mean())  # both contexts are half of the target's text
    assert rounds.tokens.mean() < float(tokens_per_round(acceptance, 4)) - 0.05


# the best draft length


@given(inner, inner)
@settings(deadline=None)
def test_gain_iff_acceptance_above_cost(acceptance: float, cost: float) -> None:
    """Leviathan et al., corollary 3.9: some draft length gains if and only if alpha > c."""
    best = max(float(speedup(acceptance, g, target=1, verify=1, draft=cost)) for g in range(1, 40))
    if acceptance > cost + 1e-9:
        assert best > 1.0
        assert best >= (1 + acceptance) / (1 + cost) - 1e-9
    elif acceptance < cost - 1e-9:
        assert best < 1.0


@given(inner, st.floats(0.002, 3.0))
@settings(deadline=None)
def test_best_length_is_the_best_of_all(acceptance: float, cost: float) -> None:
    best = best_length(acceptance, cost)
    all_gains = tokens_per_round(acceptance, np.arange(2000)) / (np.arange(2000) * cost + 1)
    assert float(best.speedup) == pytest.approx(float(all_gains.max()), rel=1e-12)
    assert float(all_gains[int(best.length)]) == pytest.approx(float(all_gains.max()), rel=1e-12)


@given(inner, inner)
@settings(deadline=None)
def test_real_best_length_is_a_maximum(acceptance: float, cost: float) -> None:
    best = real_best_length(acceptance, cost)

    def gain(g: float) -> float:
        return (1 - acceptance ** (g + 1)) / ((1 - acceptance) * (g * cost + 1))

    g = float(best.length)
    assert float(best.speedup) == pytest.approx(gain(g), rel=1e-9)
    assert max(gain(g - 1e-3), gain(g + 1e-3)) <= gain(g) * (1 + 1e-12)
    assert float(best_length(acceptance, cost).speedup) <= max(1.0, float(best.speedup)) * (1 + 1e-12)


@pytest.mark.parametrize(("acceptance", "cost"), [(1 - 1e-15, 0.5), (1e-300, 1e-6), (0.9, 1e-12), (0.5, 1 - 1e-12)])
def test_best_length_at_the_edges(acceptance: float, cost: float) -> None:
    best = best_length(acceptance, cost)
    assert np.isfinite(best.length)
    assert float(best.speedup) >= 1.0


def test_best_length_where_nothing_pays() -> None:
    assert best_length([0.0, 0.3, 0.3], [0.1, 0.3, 2.0]).length.tolist() == [0, 0, 0]
    with pytest.raises(InputError, match=r"`acceptance` must lie in \[0, 1\)"):
        best_length(1.0, 0.1)
    with pytest.raises(InputError, match=r"`cost` must lie inside \(0, 1\)"):
        real_best_length(0.5, 1.5)


# published points


def test_published_operation_factors_and_speedups() -> None:
    """Leviathan et al. (2023), table 1: (gamma, alpha) -> operations and speed-up at negligible cost ratios."""
    table = [(2, 0.6, 1.53, 1.96), (3, 0.7, 1.58, 2.53), (2, 0.8, 1.23, 2.44), (5, 0.8, 1.63, 3.69)]
    for length, acceptance, operations, gain in [*table, (2, 0.9, 1.11, 2.71), (10, 0.9, 1.60, 6.86)]:
        assert float(operations_factor(acceptance, length, 0.0)) == pytest.approx(operations, abs=0.006)
        assert float(speedup(acceptance, length, target=1, verify=1, draft=0)) == pytest.approx(gain, abs=0.006)


# load


def test_throughput_and_cost_are_one_thing() -> None:
    assert float(cost_per_token(2.5, 0.02, 16, gpus=4)) == pytest.approx(4 / float(throughput(2.5, 0.02, 16)))
    with pytest.raises(InputError, match="`round_time` must be above 0"):
        throughput(1.0, 0.0, 1)


@given(inner, st.integers(1, 10), inner)
@settings(deadline=None, max_examples=50)
def test_break_even(acceptance: float, length: int, cost: float) -> None:
    verify = float(break_even_verify(acceptance, length, cost))
    if verify > 0:
        assert float(speedup(acceptance, length, target=1, verify=verify, draft=cost)) == pytest.approx(1.0, rel=1e-9)


def test_paying_ranges() -> None:
    assert paying_ranges([1, 2, 4], [0.9, 0.8, 0.7]) == []
    assert paying_ranges([1, 2, 4], [1.1, 1.2, 1.3]) == [(1.0, None)]
    (first, last), (again, end) = paying_ranges([1, 2, 4, 8], [1.2, 1 / 1.2, 1 / 1.2, 1.2])
    assert (first, last) == (1.0, pytest.approx(1.5))
    assert (again, end) == (pytest.approx(6.0), None)
    with pytest.raises(InputError, match="`grid` must rise"):
        paying_ranges([1, 1], [2.0, 2.0])


@given(inner, st.integers(1, 12), inner)
@settings(deadline=None, max_examples=50)
def test_elasticities_are_slopes(acceptance: float, length: int, cost: float) -> None:
    e, step = elasticities(acceptance, length, cost), 1e-5

    def log_gain(a: float, c: float) -> float:
        return float(np.log(speedup(a, length, target=1, verify=1, draft=c)))

    by_acceptance = log_gain(acceptance * (1 + step), cost) - log_gain(acceptance * (1 - step), cost)
    by_cost = log_gain(acceptance, cost * (1 + step)) - log_gain(acceptance, cost * (1 - step))
    assert float(e.acceptance) == pytest.approx(by_acceptance / (2 * step), rel=1e-4, abs=1e-6)
    assert float(e.cost) == pytest.approx(by_cost / (2 * step), rel=1e-4, abs=1e-6)


def knee(batches: int, gammas: int = 9) -> np.ndarray:
    """Return round times with a knee at 200 tokens, shape (gammas, batches)."""
    batch, gamma = np.arange(1, batches + 1), np.arange(gammas)[:, None]
    return np.maximum(1.0, (gamma + 1) * batch / 200) + 0.05 * gamma


def test_schedule_shrinks_when_verification_grows() -> None:
    schedule = best_schedule(0.75, knee(256))
    assert schedule.length[0] >= 4
    assert schedule.length[-1] == 0
    assert np.all(np.diff(schedule.length) <= 0)
    first, last, _ = zip(*schedule.ranges(), strict=True)
    assert first[0] == 1
    assert last[-1] == 256


def test_schedule_takes_any_law() -> None:
    flat, falling = best_schedule(0.75, knee(64)), best_schedule(Positional((0.75, 0.4, 0.2) + (0.1,) * 5), knee(64))
    assert np.all(falling.length <= flat.length)
    assert falling.length[0] < flat.length[0]


def test_schedule_gain_is_at_least_one_and_one_at_a_single_batch() -> None:
    times = knee(256)
    spread = schedule_gain(0.75, times, np.ones(256))
    assert spread.gain > 1.01
    assert spread.over_plain >= spread.gain or spread.fixed_length == 0
    single = np.zeros(256)
    single[9] = 1.0
    alone = schedule_gain(0.75, times, single)
    assert alone.gain == pytest.approx(1.0)
    assert alone.fixed_length == best_schedule(0.75, times).length[9]
    with pytest.raises(InputError, match="`occupancy` must give 256 shares"):
        schedule_gain(0.75, times, [1.0])


@given(st.integers(0, 2**32 - 1), st.floats(0.001, 0.2))
@settings(deadline=None, max_examples=50)
def test_a_tolerant_schedule_is_near_the_best_with_no_more_ranges(seed: int, tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.uniform(0.1, 1.0, (6, 40)), axis=0)
    best, coarse = best_schedule(0.7, times), best_schedule(0.7, times, tolerance=tolerance)
    assert len(coarse.ranges()) <= len(best.ranges())
    assert np.all(coarse.tokens / coarse.time >= (1 - tolerance) * best.tokens / best.time * (1 - 1e-12))

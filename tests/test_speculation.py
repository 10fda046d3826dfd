"""Rounds of speculative decoding: limits, refusals, and agreement with sampled accept/reject rounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.acceptance import SDSL, from_fraction, from_tokens_per_round, predicted_acceptance, to_fraction
from theory.errors import InputError
from theory.speculation import best_schedule, speedup, tokens_per_round, tokens_variance

alphas = st.floats(0.0, 1.0)
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


def sampled_rounds(p: np.ndarray, q: np.ndarray, length: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """Sample real rounds: draft from q, accept with min(1, p/q), stop at the first rejection (Leviathan, algorithm 1)."""
    drafted = rng.choice(len(q), size=(rounds, length), p=q)
    accepted = rng.random((rounds, length)) < np.minimum(1.0, p[drafted] / q[drafted])
    return 1 + np.cumprod(accepted, axis=1).sum(axis=1)


@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize("seed", [1, 2])
def test_sampled_rounds_agree(length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(12)), rng.dirichlet(np.ones(12))
    acceptance = float(np.minimum(p, q).sum())
    tokens = sampled_rounds(p, q, length, 200_000, rng)
    half = 2.807 * tokens.std() / np.sqrt(len(tokens))  # 99.5 % interval
    assert abs(tokens.mean() - tokens_per_round(acceptance, length)) < half
    assert abs(tokens.mean() - tokens_per_round(acceptance + 0.02, length)) > half  # the test can fail
    assert tokens.var() == pytest.approx(float(tokens_variance(acceptance, length)), rel=0.03)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
@settings(deadline=None)
def test_gain_iff_acceptance_above_cost(acceptance: float, cost: float) -> None:
    """Leviathan et al., corollary 3.9: some draft length gains if and only if alpha > c."""
    best = max(float(speedup(acceptance, g, target=1, verify=1, draft=cost)) for g in range(1, 40))
    if acceptance > cost + 1e-9:
        assert best > 1.0
        assert best >= (1 + acceptance) / (1 + cost) - 1e-9
    elif acceptance < cost - 1e-9:
        assert best < 1.0


@given(alphas, st.integers(1, 20))
@settings(deadline=None)
def test_fraction_round_trip(acceptance: float, length: int) -> None:
    back = float(from_fraction(to_fraction(acceptance, length), length))
    # Near alpha = 0 and 1 the map is flat for long drafts; what must survive the trip is the tokens per round.
    assert tokens_per_round(back, length) == pytest.approx(float(tokens_per_round(acceptance, length)), rel=1e-9)
    assert from_tokens_per_round(float(tokens_per_round(acceptance, length)), length) == pytest.approx(
        acceptance, abs=1e-4
    )


def test_measured_fractions_invert_to_one_acceptance() -> None:
    """Logged fractions at four draft lengths come from one alpha_iid (T4 rows of a published log)."""
    inverted = [float(from_fraction(f, g)) for f, g in [(0.732, 3), (0.644, 5), (0.550, 7), (0.488, 10)]]
    assert max(inverted) - min(inverted) < 0.015


def test_schedule_shrinks_when_verification_grows() -> None:
    batch = np.arange(1, 257)
    gammas = np.arange(9)
    verify = np.maximum(1.0, (gammas[:, None] + 1) * batch / 200)  # a knee at 200 tokens
    schedule = best_schedule(0.75, verify + 0.05 * gammas[:, None])
    assert schedule.length[0] >= 4
    assert schedule.length[-1] == 0
    assert np.all(np.diff(schedule.length) <= 0)
    first, last, _ = zip(*schedule.ranges(), strict=True)
    assert first[0] == 1
    assert last[-1] == 256


def test_law_carries_its_spread() -> None:
    acceptance = predicted_acceptance(SDSL, 12.0, 7.0, level=0.9)
    assert acceptance.high - acceptance.low == pytest.approx(2 * 1.645 * 0.00128**0.5, rel=1e-3)
    with pytest.raises(InputError, match="`draft_perplexity` must be at least 1"):
        predicted_acceptance(SDSL, 0.5, 7.0)

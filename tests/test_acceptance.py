"""Acceptance laws: limits, refusals, ranges, and agreement with sampled rounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.acceptance import (
    ACCEPTANCE_LAWS,
    SDSL,
    BetaMixture,
    Histogram,
    Iid,
    LogitLossLaw,
    LogLinearLaw,
    LogLossLaw,
    LossAffineLaw,
    PerplexityLaw,
    Positional,
    QualityLaw,
    acceptance_band,
    acceptance_law,
    counted,
    fit_law,
    from_cumulative,
    from_fraction,
    from_tokens_per_round,
    log_linear_acceptance,
    predicted_acceptance,
    tag,
    to_fraction,
)
from theory.errors import InputError
from theory.speculation import mean_tokens, tokens_per_round, tokens_variance, variance_tokens

alphas = st.floats(0.0, 1.0)
lengths = st.integers(0, 20)
KINDS = (PerplexityLaw, LossAffineLaw, LogLossLaw, LogitLossLaw)


# quality laws


@pytest.mark.parametrize("law", ACCEPTANCE_LAWS.values())
def test_a_better_draft_is_accepted_more(law: QualityLaw) -> None:
    low, middle, high = acceptance_band(law, [3.0, 2.6, 2.3], 2.2)
    assert np.all(np.diff(middle) > 0)
    assert np.all((low <= middle) & (middle <= high))
    assert law.r_squared < 1
    assert law.residual > 0
    assert law.source


@pytest.mark.parametrize("kind", KINDS)
def test_fit_recovers_the_law_that_made_the_data(kind: type[QualityLaw]) -> None:
    rng = np.random.default_rng(7)
    draft = rng.uniform(2.3, 3.2, 60)
    target = draft - rng.uniform(0.1, 0.8, 60)
    slopes = {PerplexityLaw: (-0.02, 0.03, 0.7), LossAffineLaw: (-0.4, 0.35, 0.8)}.get(kind, (-0.4, 0.35, 0.1))
    truth = kind("truth", *slopes, 0.0, 1.0, "made up")
    noisy = truth.mean(draft, target) + 0.01 * rng.standard_normal(60)
    law = fit_law(kind, draft, target, noisy, "fit", "made up")
    assert law.residual == pytest.approx(0.01, rel=0.35)
    assert np.abs(law.mean(draft, target) - truth.mean(draft, target)).max() < 0.02


def test_fit_refuses_pairs_that_do_not_determine_it() -> None:
    with pytest.raises(InputError, match="`acceptance` must hold at least five pairs"):
        fit_law(LossAffineLaw, [2.5, 2.4], [2.0, 2.0], [0.5, 0.6], "x", "y")
    with pytest.raises(InputError, match="`draft_loss` must vary apart from the target's"):
        fit_law(LossAffineLaw, [2.5, 2.4, 2.3, 2.6, 2.7], [2.0] * 5, [0.5, 0.6, 0.7, 0.5, 0.4], "x", "y")


def test_law_carries_its_spread() -> None:
    acceptance = predicted_acceptance(SDSL, 12.0, 7.0, level=0.9)
    assert acceptance.high - acceptance.low == pytest.approx(2 * 1.645 * 0.00128**0.5, rel=1e-3)
    wider = predicted_acceptance(SDSL, 12.0, 7.0, level=0.99)
    assert wider.low < acceptance.low < acceptance.high < wider.high
    with pytest.raises(InputError, match="`draft_perplexity` must be at least 1"):
        predicted_acceptance(SDSL, 0.5, 7.0)
    with pytest.raises(InputError, match=r"`level` must lie inside \(0, 1\).*pass 0.9"):
        predicted_acceptance(SDSL, 12.0, 7.0, level=90)


def test_intervals_cover_what_they_say() -> None:
    """Pairs drawn from a law with its residual fall inside its 90 % interval nine times in ten."""
    rng = np.random.default_rng(3)
    low, middle, high = acceptance_band(SDSL, np.full(4000, 2.5), 2.0, level=0.9)
    drawn = middle + SDSL.residual * rng.standard_normal(4000)
    assert np.mean((drawn >= low) & (drawn <= high)) == pytest.approx(0.9, abs=0.015)
    doubled = middle + 2 * SDSL.residual * rng.standard_normal(4000)
    assert np.mean((doubled >= low) & (doubled <= high)) < 0.75  # the check can fail


def test_ranges_are_refused_unless_asked() -> None:
    assert tag(SDSL, 117e6, 13e9) == "published"
    with pytest.raises(InputError, match=r"`target_params` must lie in the range of the acceptance law sdsl.*Ask for"):
        tag(SDSL, 0.5e9, 8e9)
    with pytest.raises(InputError, match="`draft_params` must lie in the range"):
        tag(SDSL, 7e9, 70e9)
    assert tag(SDSL, 0.5e9, 8e9, extrapolate=True) == "extrapolated"
    unstated = LossAffineLaw("mine", -0.3, 0.3, 0.8, 0.01, 0.99, "own pairs")
    with pytest.raises(InputError, match="sizes it does not state"):
        tag(unstated, 1e9, 70e9)
    with pytest.raises(InputError, match="`acceptance_law` must be one of sdsl"):
        acceptance_law("SDSL")


def test_log_linear_law() -> None:
    law = LogLinearLaw("mine", "draft tokens", 0.03, -0.1, 0.02, 1e9, 1e12, "own runs")
    at = log_linear_acceptance(law, 1e11)
    assert at.value == pytest.approx(0.03 * np.log(1e11) - 0.1)
    assert at.provenance == "fitted"
    with pytest.raises(InputError, match=r"`x` must lie in \[1e\+09, 1e\+12\], the range of mine \[draft tokens\]"):
        log_linear_acceptance(law, 1e13)
    assert log_linear_acceptance(law, 1e13, extrapolate=True).provenance == "extrapolated"


# length laws


@given(alphas, lengths)
@settings(deadline=None, max_examples=60)
def test_all_laws_reduce_to_the_iid_one(alpha: float, length: int) -> None:
    expected, variance = float(tokens_per_round(alpha, length)), float(tokens_variance(alpha, length))
    laws = [alpha, Iid(alpha), Positional((alpha,), extrapolate=True), Positional((alpha,) * (length + 1))]
    for law in laws:
        assert mean_tokens(law, length) == pytest.approx(expected, rel=1e-12)
        assert variance_tokens(law, length) == pytest.approx(variance, rel=1e-9, abs=1e-9)


@given(st.lists(alphas, min_size=1, max_size=8), st.integers(0, 12))
@settings(deadline=None, max_examples=60)
def test_survival_falls_from_one(acceptances: list[float], length: int) -> None:
    survival = Positional(tuple(acceptances), extrapolate=True).survival(length)
    assert survival.shape == (length + 1,)
    assert survival[0] == 1.0
    assert np.all(np.diff(survival) <= 0)


def test_positional_law_against_sampled_positions() -> None:
    rng = np.random.default_rng(11)
    p, q = rng.dirichlet(np.ones(9), 5), rng.dirichlet(np.ones(9), 5)
    law = Positional(tuple(np.minimum(p, q).sum(axis=1).tolist()))
    drafted = np.stack([rng.choice(9, 100_000, p=row) for row in q], axis=1)
    kept = rng.random(drafted.shape) < np.minimum(1, (p / q)[np.arange(5), drafted])
    tokens = 1 + np.cumprod(kept, axis=1).sum(axis=1)
    half = 2.576 * tokens.std() / np.sqrt(len(tokens))
    assert abs(tokens.mean() - mean_tokens(law, 5)) < half
    reversed_law = Positional(law.acceptances[::-1])
    assert abs(tokens.mean() - mean_tokens(reversed_law, 5)) > half  # the order of the positions matters
    assert tokens.var() == pytest.approx(variance_tokens(law, 5), rel=0.03)


def test_cumulative_acceptances_of_a_published_head() -> None:
    """MiniMax-M3 with an EAGLE-3 head: cumulative .76 / .56 / .43 at a published mean length of 2.80 (rounded)."""
    assert mean_tokens(from_cumulative([0.76, 0.56, 0.43]), 3) == pytest.approx(2.80, abs=0.06)
    with pytest.raises(InputError, match="`cumulative` must be falling probabilities"):
        from_cumulative([0.5, 0.6])


def test_beyond_the_last_position_only_when_asked() -> None:
    with pytest.raises(InputError, match="`length` must be at most the 2 positions the vector knows"):
        Positional((0.8, 0.7)).survival(3)
    with pytest.raises(InputError, match="`length` must be at most the 3 positions the histogram knows"):
        Histogram((5, 3, 2, 9)).survival(4)
    assert Histogram((5, 3, 2, 9), extrapolate=True).survival(4)[4] < 9 / 19
    with pytest.raises(InputError, match=r"pass 0\.8, not 80"):
        Positional((80.0,))


@pytest.mark.parametrize(("mean", "spread"), [(0.7, 0.15), (0.5, 0.25), (0.85, 0.05)])
def test_mixture_over_requests_against_simulation(mean: float, spread: float) -> None:
    rng = np.random.default_rng(5)
    law = BetaMixture.from_moments(mean, spread)
    alpha = rng.beta(law.a, law.b, 200_000)
    assert alpha.mean() == pytest.approx(mean, abs=0.003)
    kept = rng.random((len(alpha), 4)) < alpha[:, None]
    tokens = 1 + np.cumprod(kept, axis=1).sum(axis=1)
    half = 2.576 * tokens.std() / np.sqrt(len(tokens))
    assert abs(tokens.mean() - mean_tokens(law, 4)) < half
    assert tokens.var() == pytest.approx(variance_tokens(law, 4), rel=0.03)
    assert mean_tokens(law, 4) > float(tokens_per_round(mean, 4))  # alpha^i is convex: one mean alpha is too low
    equal_outputs = 1 / np.mean(1 / tokens_per_round(alpha, 4))  # rounds of a request of L tokens are L / E
    assert law.pooled_tokens(4) == pytest.approx(equal_outputs, rel=0.003)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=9).filter(lambda c: sum(c) > 0))
@settings(deadline=None, max_examples=60)
def test_histogram_gives_back_its_own_mean(counts: list[int]) -> None:
    accepted = np.repeat(np.arange(len(counts)), counts)
    law = Histogram(tuple(counts))
    assert mean_tokens(law, len(counts) - 1) == pytest.approx(1 + accepted.mean(), rel=1e-12)
    assert variance_tokens(law, len(counts) - 1) == pytest.approx(accepted.var(), rel=1e-9, abs=1e-9)
    shorter = np.minimum(accepted, 1)  # a draft of one token is the same rounds cut off
    assert mean_tokens(law, 1) == pytest.approx(1 + shorter.mean(), rel=1e-12)


def test_counts_estimate_the_acceptance() -> None:
    """The interval of `counted` covers the truth nine times in ten; accepted over drafted does not estimate it."""
    rng = np.random.default_rng(17)
    covered, truth, gamma = 0, 0.7, 5
    for _ in range(400):
        accepted = np.cumprod(rng.random((200, gamma)) < truth, axis=1).sum(axis=1)
        law = Histogram(tuple(np.bincount(accepted, minlength=gamma + 1).tolist()))
        estimate = law.iid(level=0.9)
        covered += estimate.low <= truth <= estimate.high
    assert 0.86 < covered / 400 < 0.94
    assert accepted.mean() / gamma < 0.5  # alpha_frac is another quantity
    assert estimate.provenance == "measured"
    assert counted(0, 10).low == 0.0
    assert counted(10, 0).high == 1.0


# conversions


@given(alphas, st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_fraction_round_trip(acceptance: float, length: int) -> None:
    back = float(from_fraction(to_fraction(acceptance, length), length))
    # Near alpha = 0 and 1 the map is flat for long drafts; what must survive the trip is the tokens per round.
    assert tokens_per_round(back, length) == pytest.approx(float(tokens_per_round(acceptance, length)), rel=1e-9)
    assert from_tokens_per_round(float(tokens_per_round(acceptance, length)), length) == pytest.approx(
        acceptance, abs=1e-4
    )


def test_both_acceptances_agree_only_for_one_token() -> None:
    assert float(to_fraction(0.8, 1)) == pytest.approx(0.8)
    assert float(to_fraction(0.8, 5)) < 0.6


def test_measured_fractions_invert_to_one_acceptance() -> None:
    """Logged fractions at four draft lengths come from one alpha_iid (rows of a published T4 log)."""
    inverted = [float(from_fraction(f, g)) for f, g in [(0.732, 3), (0.644, 5), (0.550, 7), (0.488, 10)]]
    assert max(inverted) - min(inverted) < 0.015
    assert from_fraction([[0.732, 0.5]], 3).shape == (1, 2)


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(InputError, match=r"`tokens` must lie in \[1, 5\].*includes the bonus token"):
        from_tokens_per_round(0.8, 4)
    with pytest.raises(InputError, match=r"pass 0\.64, not 64"):
        from_fraction(64, 4)

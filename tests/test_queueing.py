"""The closed form: classic queues, limits, stability, refusals, and many configurations at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.errors import InputError
from theory.queueing import (
    by_round,
    mean_context,
    mean_overshoot,
    occupancy,
    ttft_quantile,
    wait_tail,
)


def erlang_c(servers: int, offered: float) -> float:
    """Probability of waiting in M/M/c, Kleinrock (1975), equation 3.42."""
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) / (1 - offered / servers)
    return last / (sum(terms) + last)


# ---------------------------------------------------------------------------------------------------------------------
# Queues with formulas of their own
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("servers", "load"), [(1, 0.3), (1, 0.95), (4, 0.8), (32, 0.9)])
def test_constant_rounds_are_m_m_c(servers: int, load: float) -> None:
    """If a round takes the same time at any batch, the slots are servers."""
    service = 100 * 0.01
    rate = load * servers / service
    state = occupancy(rate, 100, np.full(servers, 0.01))
    waiting = erlang_c(servers, rate * service)
    assert state.p_wait[0] == pytest.approx(waiting, rel=1e-9)
    assert state.queue_s[0] == pytest.approx(waiting / (servers / service - rate), rel=1e-9)
    assert state.batch[0] == pytest.approx(rate * service, rel=1e-9)
    assert state.decode_s[0] == pytest.approx(service, rel=1e-9)
    assert state.load[0] == pytest.approx(load, rel=1e-12)
    assert wait_tail(state, 0.0)[0] == pytest.approx(waiting)
    assert wait_tail(state, 1.0)[0] == pytest.approx(waiting * math.exp(-(servers / service - rate)))


def test_many_slots_and_constant_rounds_are_m_g_infinity() -> None:
    """Poisson occupancy of mean r L T."""
    state = occupancy(3.0, 100, np.full(64, 0.01))
    n = np.arange(10)
    poisson = np.exp(-3.0) * 3.0**n / [math.factorial(k) for k in n]
    np.testing.assert_allclose(state.pi[0, :10], poisson, rtol=1e-9)


def test_rounds_in_proportion_to_the_batch_are_m_m_1_processor_sharing() -> None:
    """T(k) = k T(1): one server shared; geometric occupancy, E2E = S / (1 - rho)."""
    state = occupancy(0.8, 100, 0.01 * np.arange(1, 401))
    np.testing.assert_allclose(state.pi[0, :50], 0.2 * 0.8 ** np.arange(50), rtol=1e-9)
    assert state.decode_s[0] == pytest.approx(1.0 / 0.2, rel=1e-9)


@pytest.mark.parametrize(("cv2", "factor"), [(0.0, 0.5), (1.0, 1.0), (4.0, 2.5)])
def test_one_slot_is_pollaczek_khinchine(cv2: float, factor: float) -> None:
    state = occupancy(0.6, 100, [0.01], length_cv2=cv2)
    assert state.queue_s[0] == pytest.approx(factor * 0.6 / 0.4, rel=1e-9)


def test_closed_form_solves_the_birth_and_death_balance() -> None:
    """The stationary law of the chain, from its generator by linear algebra, tail included."""
    rate, tokens, cap, states = 2.4, 50.0, 12, 600
    rounds = 0.01 + 0.002 * np.arange(1, 41)
    per_round = 1 + 3 / np.arange(1, 41)
    k = np.minimum(np.arange(1, states), cap)
    death = k * per_round[k - 1] / (tokens * rounds[k - 1])
    law = np.concatenate([[1.0], np.cumprod(rate / death)])
    law /= law.sum()
    state = occupancy(rate, tokens, rounds, per_round, slots=cap)
    np.testing.assert_allclose(state.pi[0, :cap], law[:cap], rtol=1e-9)
    assert state.p_wait[0] == pytest.approx(law[cap:].sum(), rel=1e-9)
    assert state.queue_s[0] == pytest.approx(law @ np.maximum(np.arange(states) - cap, 0) / rate, rel=1e-9)
    assert np.all(state.pi[0, cap + 1 :] == 0)


# ---------------------------------------------------------------------------------------------------------------------
# Limits and corrections
# ---------------------------------------------------------------------------------------------------------------------


def test_light_load_is_one_request_alone() -> None:
    state = occupancy(1e-9, 200, np.linspace(0.02, 0.03, 32), prefill_time=0.01, prefill_alone=0.025, prefill_steps=1)
    assert state.e2e_s[0] == pytest.approx(0.025 + 200 * 0.02, rel=1e-6)
    assert state.ttft_s[0] == pytest.approx(0.025, rel=1e-6)
    assert ttft_quantile(state, 0.5)[0] == pytest.approx(0.025, rel=1e-3)


def test_unstable_has_no_mean() -> None:
    state = occupancy([1.0, 1.3], 100, np.full(1, 0.009))
    assert state.stable.tolist() == [True, False]
    for name in ("batch", "queue_s", "ttft_s", "tpot_s", "decode_s", "e2e_s", "admission_s", "round_s"):
        assert np.isinf(getattr(state, name)[1]), name
        assert np.isfinite(getattr(state, name)[0]), name
    assert np.isnan(state.pi[1]).all()
    assert np.isinf(ttft_quantile(state, 0.99)[1])
    assert wait_tail(state, 100.0)[1] == 1.0
    np.testing.assert_allclose(state.throughput, [1.0, state.rate_limit[1]])
    assert state.rate_limit[1] == pytest.approx(1 / 0.9)


@settings(deadline=None, max_examples=60)
@given(
    base=st.floats(1e-3, 0.1),
    slope=st.floats(0.0, 1e-3),
    tokens=st.floats(5.0, 500.0),
    prefill=st.floats(0.0, 0.05),
    further=st.floats(0.0, 0.05),
    slots=st.integers(1, 64),
)
def test_the_rate_limit_is_where_stability_ends(
    base: float, slope: float, tokens: float, prefill: float, further: float, slots: int
) -> None:
    rounds = base + slope * np.arange(1, 65)
    given_ = {
        "slots": slots,
        "prefill_time": prefill,
        "prefill_further": min(further, prefill + base),
        "prefill_steps": 1,
    }
    limit = occupancy(1e-6, tokens, rounds, **given_).rate_limit[0]
    near = occupancy([0.999 * limit, 1.001 * limit], tokens, rounds, **given_)
    assert near.stable.tolist() == [True, False]
    assert near.queue_s[0] > occupancy(0.5 * limit, tokens, rounds, **given_).queue_s[0]


@settings(deadline=None, max_examples=60)
@given(rate=st.floats(0.01, 0.98), prefill=st.floats(0.0, 0.02), tokens=st.floats(2.0, 300.0), slots=st.integers(2, 64))
def test_more_load_never_helps(rate: float, prefill: float, tokens: float, slots: int) -> None:
    rounds = 0.01 + 1e-4 * np.arange(1, 65)
    given_: dict[str, Any] = {"slots": slots, "prefill_time": prefill, "prefill_steps": 1}
    limit = occupancy(1e-6, tokens, rounds, **given_).rate_limit[0]
    state = occupancy(np.array([rate, rate + 0.01]) * limit, tokens, rounds, **given_)
    assert state.pi.sum(axis=1) == pytest.approx(1.0)
    for name in ("batch", "e2e_s", "tpot_s", "queue_s", "p_wait"):
        low, high = getattr(state, name)
        assert low <= high * (1 + 1e-9), name
    assert state.e2e_s == pytest.approx(state.ttft_s + state.decode_s)
    assert state.batch == pytest.approx(state.rate * state.decode_s)


def test_equal_prompts_stretch_rounds_by_the_share_left() -> None:
    """t1 = t2 = t: S = T / (1 - r t), here through decode time with a constant round."""
    state = occupancy(5.0, 100, np.full(64, 0.01), prefill_time=0.04)
    assert state.tpot_s[0] == pytest.approx(0.01 / (1 - 5.0 * 0.04), rel=1e-9)


def test_a_first_prompt_that_rides_free_costs_less() -> None:
    """S solves S = T + t2 (a - 1 + exp(-a)) with a = r S when the first prompt of a step costs nothing."""
    state = occupancy(5.0, 100, np.full(64, 0.01), prefill_time=0.0, prefill_further=0.04)
    s = state.tpot_s[0]
    assert s == pytest.approx(0.01 + 0.04 * (5 * s - 1 + math.exp(-5 * s)), rel=1e-9)
    assert 0.01 < s < 0.01 / (1 - 5.0 * 0.04)


def test_one_hot_extremes_do_not_overflow() -> None:
    """A batch of thousands, and next to nobody."""
    big = occupancy(99.0, 1000, np.full(4096, 0.04))
    assert np.isfinite(big.e2e_s[0])
    assert big.batch[0] == pytest.approx(3960, rel=1e-6)
    small = occupancy(1e-200, 1, np.full(4, 1e-3))
    assert small.batch[0] == pytest.approx(1e-203, rel=1e-6)


def test_two_long_prompts_cannot_share_the_budget() -> None:
    """Prompts of several steps queue for the budget and saturate it before the batch does."""
    calm, busy = (occupancy(r, 50, np.full(64, 0.01), prefill_time=0.2, prefill_steps=4) for r in (0.5, 4.3))
    assert calm.first.budget_s[0] > 0
    assert not busy.stable[0]


# ---------------------------------------------------------------------------------------------------------------------
# Many at once
# ---------------------------------------------------------------------------------------------------------------------


def test_rows_do_not_know_of_each_other() -> None:
    rng = np.random.default_rng(0)
    count, states = 3000, 96  # several blocks
    rounds = 0.01 + rng.uniform(1e-5, 1e-3, (count, 1)) * np.arange(1, states + 1)
    rate, tokens = rng.uniform(0.1, 20.0, count), rng.uniform(10, 300, count)
    cap = rng.integers(1, states + 1, count)
    prefill = rng.uniform(0, 0.02, count)
    given_ = {"prefill_steps": 1.0, "length_cv2": 0.5}
    every = occupancy(rate, tokens, rounds, 1.5, slots=cap, prefill_time=prefill, **given_)
    assert 0.1 < every.stable.mean() < 0.9
    quantile = ttft_quantile(every, 0.9)
    for i in (0, 1, 1499, 2999):
        one = occupancy(rate[i], tokens[i], rounds[i], 1.5, slots=cap[i], prefill_time=prefill[i], **given_)
        for name in ("stable", "batch", "ttft_s", "e2e_s", "rate_limit", "p_wait"):
            np.testing.assert_allclose(getattr(every, name)[i], getattr(one, name)[0], rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(quantile[i], ttft_quantile(one, 0.9)[0], rtol=1e-6)


def test_quantiles_rise_with_probability() -> None:
    state = occupancy(
        [0.5, 2.0, 4.0], 100, 0.01 + 1e-4 * np.arange(1, 25), slots=20, prefill_time=0.01, prefill_steps=1
    )
    values = np.array([ttft_quantile(state, p) for p in (0.1, 0.5, 0.9, 0.99, 0.999)])
    assert np.all(np.diff(values, axis=0) > -1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Small quantities
# ---------------------------------------------------------------------------------------------------------------------


def test_a_schedule_sees_rounds_not_time() -> None:
    pi = np.array([0.1, 0.3, 0.6])
    np.testing.assert_allclose(by_round(pi, [0.01, 0.03]), [0.6, 0.4])


def test_overshoot_of_certain_drafts_is_uniform_over_the_round() -> None:
    assert mean_overshoot(5.0, 0.0) == 2.0  # 0..4 with equal probability
    assert mean_overshoot(1.0, 0.0) == 0.0


def test_mean_context_counts_every_decode_token_once() -> None:
    tokens = [100 + j for j in range(9)] + [7 + j for j in range(3)]
    assert mean_context([100, 7], [10, 4]) == pytest.approx(np.mean(tokens))
    with pytest.raises(InputError, match="`output` must have tokens to decode"):
        mean_context([10], [1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rate": 0.0}, r"`rate` must be finite and above 0 \[request/s\]"),
        ({"rate": np.nan}, "`rate` must be finite"),
        ({"tokens": -1}, "`tokens` must be finite and above 0"),
        ({"round_time": [0.01, 0.0]}, r"`round_time` must be finite and above 0 \[s\]"),
        ({"tokens_per_round": 0.0}, "`tokens_per_round` must be finite and above 0"),
        ({"tokens_per_round": np.ones(3)}, "`tokens_per_round` must be one number or have the shape"),
        ({"slots": 3}, r"`slots` must be whole numbers in 1..2"),
        ({"slots": 1.5}, "`slots` must be whole numbers"),
        ({"prefill_time": -0.1}, "`prefill_time` must be finite and at least 0"),
        ({"length_cv2": [1.0, 1.0, 1.0], "rate": [1.0, 1.0]}, "must be one number or one per configuration"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], text: str) -> None:
    good: dict[str, Any] = {"rate": 1.0, "tokens": 10, "round_time": [0.01, 0.02]}
    with pytest.raises(InputError, match=text):
        occupancy(**(good | change))


@pytest.mark.parametrize("probability", [0.0, 1.0, 99])
def test_a_percentile_is_not_a_percentage(probability: float) -> None:
    with pytest.raises(InputError, match="`probability` must lie inside"):
        ttft_quantile(occupancy(1.0, 10, [0.01]), probability)

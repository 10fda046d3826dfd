"""The engine: exact cases by hand, an independent plain-Python engine, invariants on random scenarios, stress."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine import Records, StepTable, draft_rows, simulate
from simulator.workload import Workload
from theory.errors import InputError
from theory.queueing import mean_overshoot
from theory.specs import Limits
from theory.speculation import tokens_per_round, tokens_variance

A, B, SLOPE, HOST = 0.02, 2e-4, 1e-7, 0.001  # decode base [s], per sequence [s], per cached token [s], prefill-only [s]
PER_TOKEN, PAIR = 1e-4, 1e-8  # prefill [s/token], [s/token^2]
GAMMAS = (0, 2, 4)
PLENTY = 10**7  # KV capacity that never binds [tokens]


def table(slots: int = 8) -> StepTable:
    n = np.arange(slots + 1)
    base = np.array([A * (1 + 0.1 * g) + B * n * (1 + g) for g in GAMMAS])
    base[:, 0] = HOST
    return StepTable(
        np.array(GAMMAS), base, np.full(base.shape, SLOPE), np.array([0.0, 1e4]), np.array([0.0, 1e4 * PER_TOKEN]), PAIR
    )


def check(run: Records, slots: int) -> None:
    """What must hold on every run."""
    done = ~run.refused
    assert np.all(np.isfinite(run.completion[done]))
    assert np.all(np.isnan(run.completion[~done]))
    assert run.emitted == run.output[done].sum()
    assert run.kv_peak_tokens <= run.kv_tokens
    assert np.all(run.arrival[done] <= run.admitted[done] + 1e-12)
    assert np.all(run.admitted[done] < run.first_token[done])
    assert np.all(run.first_token[done] <= run.completion[done])
    assert np.all(run.accepted <= run.drafted)
    # a preemption makes the recomputed prefill emit a token that no round emits
    assert np.all((run.rounds + run.accepted + 1 + run.preemptions >= run.output)[done])
    assert run.busy_s == pytest.approx(run.service_s.sum(), rel=1e-9)
    assert run.busy_s <= run.end_s - run.arrival.min() + 1e-9
    assert run.batch_s.size == slots + 1
    if run.preemptions.sum() == 0:  # Little's law for decoding sequences: two ways to count their time
        assert run.decode_s == pytest.approx((run.completion - run.first_token)[done].sum(), rel=1e-9, abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------------------------------


def test_one_request_by_hand() -> None:
    prompt, output = 100, 5
    run = simulate(Workload([1.0], [prompt], [output]), table(), Limits(max_num_seqs=8), PLENTY)
    first = HOST + PER_TOKEN * prompt + PAIR * prompt**2 / 2
    rounds = sum(A + B + SLOPE * (prompt + j) for j in range(output - 1))
    assert run.first_token[0] - 1.0 == pytest.approx(first, rel=1e-12)
    assert run.completion[0] - 1.0 == pytest.approx(first + rounds, rel=1e-12)
    assert (run.rounds[0], run.steps, run.drafted[0]) == (output - 1, output, 0)


def test_chunks_of_a_long_prompt_cost_the_same_attention_as_one() -> None:
    prompt = 100
    limits = Limits(max_num_seqs=8, max_num_batched_tokens=16)
    run = simulate(Workload([0.0], [prompt], [1]), table(), limits, PLENTY)
    assert run.steps == 7
    assert run.completion[0] == pytest.approx(7 * HOST + PER_TOKEN * prompt + PAIR * prompt**2 / 2, rel=1e-12)


def test_all_drafts_accepted_and_the_last_round_is_cut() -> None:
    run = simulate(Workload([0.0], [10], [12]), table(), Limits(max_num_seqs=8), PLENTY, schedule=4, alpha=1.0)
    assert (run.rounds[0], run.drafted[0], run.accepted[0], run.emitted) == (3, 12, 12, 12)  # 1 + 5 + 5 + 1


def test_a_prompt_joins_a_decode_step_and_arrivals_wait_for_its_end() -> None:
    run = simulate(Workload([0.0, 0.02], [100, 50], [3, 1]), table(), Limits(max_num_seqs=8), PLENTY)
    first = HOST + PER_TOKEN * 100 + PAIR * 100**2 / 2
    plain = A + B + SLOPE * 100
    assert run.admitted[1] == pytest.approx(first + plain)
    mixed = A + B + SLOPE * 101 + PER_TOKEN * 50 + PAIR * 50**2 / 2
    assert run.first_token[1] == run.completion[0] == pytest.approx(first + plain + mixed)


def test_schedule_follows_the_batch() -> None:
    schedule = [0, 4, 2, 0]
    run = simulate(
        Workload([0.0] * 3, [10] * 3, [9] * 3), table(3), Limits(max_num_seqs=3), PLENTY, schedule, alpha=np.zeros(3)
    )
    assert run.drafted.sum() == 0  # three decode all the way: gamma 0
    run = simulate(Workload([0.0], [10], [9]), table(3), Limits(max_num_seqs=3), PLENTY, schedule, alpha=0.0)
    assert run.drafted[0] == 8 * 4


def test_token_budget_shortens_drafts() -> None:
    limits = Limits(max_num_seqs=8, max_num_batched_tokens=24)
    assert draft_rows(4, table(), limits).tolist() == [2, 2, 2, 2, 2, 1, 1, 1, 1]  # 5 x 5 = 25 > 24: down to gamma 2


# ---------------------------------------------------------------------------------------------------------------------
# An engine written another way: lists and floats, no KV cache
# ---------------------------------------------------------------------------------------------------------------------


def plain_engine(work: Workload, t: StepTable, slots: int, budget: int) -> list[tuple[float, float]]:
    coming, now = deque(range(work.requests)), 0.0
    waiting: deque[int] = deque()
    left = {i: [int(work.prompt[i]), int(work.output[i])] for i in coming}  # prompt tokens and tokens still to come
    running: list[int] = []
    times: dict[int, list[float]] = {i: [] for i in coming}
    while coming or waiting or running:
        if not (waiting or running):
            now = max(now, float(work.arrival[coming[0]]))
        while coming and work.arrival[coming[0]] <= now:
            waiting.append(coming.popleft())
        decoding = [i for i in running if left[i][0] == 0]
        room = budget - len(decoding)
        chunks: dict[int, int] = {i: min(room, left[i][0]) for i in running if left[i][0] > 0}
        room -= sum(chunks.values())
        while room > 0 and waiting and len(running) < slots:
            i = waiting.popleft()
            running.append(i)
            chunks[i] = min(room, left[i][0])
            room -= chunks[i]
        n = len(decoding)
        context = sum(int(work.prompt[i] + work.output[i]) - left[i][1] - 1 for i in decoding)
        now += float(t.base[0, n] + t.slope[0, n] * context)
        for i, c in chunks.items():
            now += PER_TOKEN * c + PAIR * c * (work.prompt[i] - left[i][0] + c / 2)
        for i in [*decoding, *chunks]:
            left[i][0] -= chunks.get(i, 0)
            if left[i][0] == 0:
                left[i][1] -= 1
                times[i].append(now)
        running = [i for i in running if left[i][1] > 0]
    return [(times[i][0], times[i][-1]) for i in range(work.requests)]


@settings(deadline=None, max_examples=60)
@given(
    gaps=st.lists(st.floats(0.0, 0.3), min_size=1, max_size=25),
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=25, max_size=25),
    slots=st.integers(1, 8),
    budget=st.integers(8, 80),
)
def test_equals_an_engine_written_another_way(
    gaps: list[float], sizes: list[tuple[int, int]], slots: int, budget: int
) -> None:
    prompt, output = zip(*sizes[: len(gaps)], strict=True)
    work = Workload(np.cumsum(gaps), prompt, output)
    run = simulate(work, table(), Limits(max_num_seqs=slots, max_num_batched_tokens=budget), PLENTY)
    check(run, slots)
    expected = np.array(plain_engine(work, table(), slots, budget))
    np.testing.assert_allclose(np.column_stack([run.first_token, run.completion]), expected, rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Invariants, whatever the scenario
# ---------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(
    gaps=st.lists(st.floats(0.0, 0.2), min_size=1, max_size=40),
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=40, max_size=40),
    blocks=st.integers(1, 30),
    gamma=st.sampled_from(GAMMAS),
    alpha=st.floats(0.0, 1.0),
    clients=st.integers(0, 5),
    seed=st.integers(-5, 2**64),
)
def test_nothing_is_lost_under_kv_pressure(
    gaps: list[float],
    sizes: list[tuple[int, int]],
    blocks: int,
    gamma: int,
    alpha: float,
    clients: int,
    seed: int,
) -> None:
    prompt, output = zip(*sizes[: len(gaps)], strict=True)
    work = Workload(np.cumsum(gaps), prompt, output, clients=clients, think_time=0.05 if clients else 0.0)
    limits = Limits(max_num_seqs=6, max_num_batched_tokens=40, block_size=4)
    run = simulate(work, table(), limits, 4 * blocks, gamma, alpha, seed)
    check(run, 6)
    longest = work.prompt + np.where(work.output > 1, work.output - 1 + gamma, 0)
    np.testing.assert_array_equal(run.refused, -(-longest // 4) > blocks)


def test_every_request_is_preempted_and_still_completes() -> None:
    work = Workload(np.zeros(30), np.full(30, 16), np.full(30, 100))
    limits = Limits(max_num_seqs=8, max_num_batched_tokens=64, block_size=4)
    run = simulate(work, table(), limits, 120)  # one at its longest needs 115
    check(run, 8)
    assert run.preemptions.sum() >= 29
    assert run.kv_peak_tokens == 120


def test_recompute_feeds_prompt_and_emitted_tokens_again() -> None:
    """Two requests that outgrow the cache together: the later one steps back and prefills all it had."""
    work = Workload([0.0, 0.0], [8, 8], [9, 9])
    limits = Limits(max_num_seqs=2, max_num_batched_tokens=64, block_size=4)
    run = simulate(work, table(2), limits, 20)
    assert run.preemptions.tolist() == [0, 1]
    assert run.rounds.tolist() == [8, 7]  # the recomputing prefill emits the token a round would have


def test_larger_than_the_cache_is_refused_and_counted() -> None:
    run = simulate(Workload([0.0, 0.1], [100, 10], [50, 5]), table(), Limits(max_num_seqs=8), 128)
    assert run.refused.tolist() == [True, False]
    assert np.isnan(run.completion[0])
    assert run.service_s[0] == 0.0
    check(run, 8)


def test_a_million_arrivals_at_once() -> None:
    count = 1_000_000
    run = simulate(Workload(np.zeros(count), np.ones(count), np.ones(count)), table(), Limits(max_num_seqs=8), PLENTY)
    assert run.steps == count // 8
    assert run.emitted == count


def test_closed_loop_keeps_clients_in_flight() -> None:
    work = Workload(np.zeros(40), np.full(40, 10), np.arange(1, 41), clients=4, think_time=0.5)
    run = simulate(work, table(), Limits(max_num_seqs=8), PLENTY)
    check(run, 8)
    for moment in np.linspace(0.0, float(run.completion.max()), 50):
        assert np.count_nonzero((run.arrival <= moment) & (run.completion > moment)) <= 4
    assert np.count_nonzero(run.arrival == 0.0) == 4
    assert run.arrival[4] == pytest.approx(run.completion[:4].min() + 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Speculation
# ---------------------------------------------------------------------------------------------------------------------


def test_rounds_and_acceptance_agree_with_renewal_theory() -> None:
    count, output, gamma, alpha = 4000, 200, 4, 0.7
    work = Workload(np.zeros(count), np.ones(count), np.full(count, output))
    run = simulate(work, table(256), Limits(), PLENTY, gamma, alpha)
    error = 2.576 * run.rounds.std() / np.sqrt(count)

    def rounds(a: float) -> float:
        mean = float(tokens_per_round(a, gamma))
        return (output - 1 + float(mean_overshoot(mean, tokens_variance(a, gamma)))) / mean

    assert abs(run.rounds.mean() - rounds(alpha)) < error
    assert abs(run.rounds.mean() - rounds(alpha + 0.01)) > error  # negative control
    fraction = (float(tokens_per_round(alpha, gamma)) - 1) / gamma
    assert run.accepted.sum() / run.drafted.sum() == pytest.approx(
        fraction, abs=2.576 * 0.5 / np.sqrt(run.rounds.sum())
    )


def test_accepted_run_lengths_have_the_capped_geometric_law() -> None:
    """One round each: output 2 needs exactly one, whose accepted drafts are counted whole."""
    count, alpha = 40_000, 0.6
    run = simulate(
        Workload(np.zeros(count), np.ones(count), np.full(count, 2)), table(), Limits(max_num_seqs=8), PLENTY, 4, alpha
    )
    seen = np.bincount(run.accepted, minlength=5) / count
    law = np.array([(1 - alpha) * alpha**k for k in range(4)] + [alpha**4])
    chi2 = float((count * (seen - law) ** 2 / law).sum())
    assert chi2 < 13.28  # 99 % quantile of chi-square with 4 degrees of freedom
    wrong = np.array([0.37 * 0.63**k for k in range(4)] + [0.63**4])
    assert float((count * (seen - wrong) ** 2 / wrong).sum()) > 13.28


def test_acceptance_does_not_depend_on_the_schedule() -> None:
    """Draws are named by request and round: another load, order of arrival or company changes none of them."""
    rng = np.random.default_rng(1)
    output = rng.integers(2, 60, 50)
    calm = simulate(
        Workload(np.arange(50.0) * 100, np.ones(50), output), table(), Limits(max_num_seqs=8), PLENTY, 4, 0.7, 3
    )
    rush = simulate(Workload(np.zeros(50), np.ones(50), output), table(), Limits(max_num_seqs=8), PLENTY, 4, 0.7, 3)
    np.testing.assert_array_equal(calm.accepted, rush.accepted)
    other = simulate(Workload(np.zeros(50), np.ones(50), output), table(), Limits(max_num_seqs=8), PLENTY, 4, 0.7, 4)
    assert not np.array_equal(calm.accepted, other.accepted)
    one = simulate(
        Workload([0.0], [1], output[7:8]), table(), Limits(max_num_seqs=8), PLENTY, 4, 0.7, 3, ids=np.array([7])
    )
    assert one.accepted[0] == calm.accepted[7]


def test_acceptance_per_request() -> None:
    alpha = np.array([0.0, 1.0])
    run = simulate(Workload([0.0, 0.0], [1, 1], [21, 21]), table(), Limits(max_num_seqs=8), PLENTY, 4, alpha)
    assert run.rounds.tolist() == [20, 4]
    assert run.accepted.tolist() == [0, 16]


def test_same_seed_same_bytes() -> None:
    rng = np.random.default_rng(0)
    work = Workload(np.cumsum(rng.exponential(0.05, 300)), rng.integers(1, 90, 300), rng.integers(1, 90, 300))
    runs = [simulate(work, table(), Limits(max_num_seqs=8), 600, 2, 0.7, seed=5) for _ in range(2)]
    for name in ("first_token", "completion", "accepted", "preemptions", "service_s"):
        assert getattr(runs[0], name).tobytes() == getattr(runs[1], name).tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------

ONE = Workload([0.0], [10], [10])
SMALL = Limits(max_num_seqs=8)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"alpha": 80}, r"`alpha` must lie in \[0, 1\] \[-\]; got 80. .*pass 0.8, not 80"),
        ({"schedule": 3}, r"`draft_length` must be one of \[0, 2, 4\] \[tokens\]; got 3"),
        ({"schedule": [0, 0]}, r"`schedule` must be one draft length or one for each n = 0..8"),
        ({"kv_tokens": 7}, r"`kv_tokens` must hold at least one block of 16 \[tokens\]; got 7"),
        ({"limits": Limits(max_num_seqs=9)}, r"`table` must reach `max_num_seqs` = 9 sequences; got 8"),
        ({"ids": np.arange(2)}, r"`ids` must name each of the 1 requests"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], text: str) -> None:
    given_ = {"workload": ONE, "table": table(), "limits": SMALL, "kv_tokens": 1000} | change
    with pytest.raises(InputError, match=text):
        simulate(**given_)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"draft_lengths": [2, 0]}, "`draft_lengths` must be ascending integers"),
        ({"base": [[0.0, -1.0]]}, "`base` must be finite and at least 0"),
        ({"base": [[0.0, 0.0]]}, "`base` must be above 0 where a sequence decodes"),
        ({"base": [[0.0, np.nan]]}, "`base` must be finite"),
        ({"slope": [[0.0, 0.0, 0.0]]}, r"`slope` must have the shape \(1, 2\) of `base`"),
        ({"prefill_tokens": [1.0, 2.0]}, "`prefill_tokens` must ascend from 0"),
        ({"prefill_s": [1.0, 0.5]}, "`prefill_s` must not fall"),
        ({"prefill_context_slope": -1.0}, "`prefill_context_slope` must be finite and at least 0"),
    ],
)
def test_bad_tables_are_refused(change: dict[str, Any], text: str) -> None:
    good = {
        "draft_lengths": [0],
        "base": [[0.0, 1.0]],
        "slope": [[0.0, 0.0]],
        "prefill_tokens": [0, 1],
        "prefill_s": [0, 1],
    }
    with pytest.raises(InputError, match=text):
        StepTable(**(good | change))


def test_a_budget_below_the_shortest_draft_is_refused() -> None:
    only_four = StepTable([4], [[0.0] + [1.0] * 8], [[0.0] * 9], [0, 1], [0, 1])
    with pytest.raises(InputError, match="shortest tabled gamma = 4"):
        simulate(ONE, only_four, Limits(max_num_seqs=8, max_num_batched_tokens=39), 1000, 4)

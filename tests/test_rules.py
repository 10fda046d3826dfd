"""The engine's rules, each by hand on few requests; what holds whatever the rules; refusals."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine import Records, StepTable, simulate
from simulator.workload import Workload
from theory.errors import InputError
from theory.specs import Limits, Rules

STEP, EACH, TOKEN, HOST = (
    0.02,
    0.001,
    1e-4,
    0.003,
)  # decode [s], per sequence [s], per prompt token [s], prompts alone [s]
PLENTY = 10**12  # KV capacity that never binds [tokens]
EVERY = [
    Rules(a, m, r, s, late_stop=late)
    for a, m, r, s, late in product((0, 1), (True, False), (True, False), (1, 20), (False, True))
    if a or not late
]


def table(slots: int = 4, floor: float = 0.0) -> StepTable:
    n = np.arange(slots + 1)
    base = np.array([STEP + EACH * n, STEP + EACH * 5 * n])
    base[:, 0] = HOST
    return StepTable([0, 4], base, np.zeros(base.shape), [0, 1e4], [0, 1e4 * TOKEN], prefill_floor=floor)


def limits(rules: Rules, slots: int = 4, budget: int = 1000, block: int = 16) -> Limits:
    return Limits(max_num_seqs=slots, max_num_batched_tokens=budget, block_size=block, rules=rules)


def one(n: int) -> float:
    """A step of n decoding sequences [s]."""
    return STEP + EACH * n


def check(run: Records) -> None:
    """What must hold on every run, whatever the rules: requests, tokens and memory are conserved."""
    done = ~run.refused
    assert np.isfinite(run.completion[done]).sum() + run.refused.sum() == run.arrival.size
    assert run.emitted == run.output[done].sum()
    assert run.kv_peak_tokens <= run.kv_tokens
    assert np.all(run.arrival[done] <= run.admitted[done] + 1e-12)
    assert np.all(run.admitted[done] < run.first_token[done])
    assert np.all(run.first_token[done] <= run.completion[done])
    assert run.busy_s == pytest.approx(run.service_s.sum(), rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Scheduled ahead
# ---------------------------------------------------------------------------------------------------------------------


def test_an_arrival_waits_for_the_running_and_the_scheduled_step() -> None:
    """It comes within the third step, sits out the fourth, and has its token at the end of the fifth."""
    first = HOST + 10 * TOKEN
    work = Workload([0.0, first + 1.5 * one(1)], [10, 10], [9, 2])
    run = simulate(work, table(), limits(Rules(schedule_ahead=1)), PLENTY)
    assert run.admitted[1] == pytest.approx(first + 3 * one(1))
    assert run.first_token[1] == pytest.approx(first + 4 * one(1) + 10 * TOKEN)
    soon = simulate(work, table(), limits(Rules()), PLENTY)
    assert soon.admitted[1] == pytest.approx(first + 2 * one(1))


def test_an_idle_replica_starts_at_once() -> None:
    work = Workload([1.0, 9.0], [10, 10], [3, 3])
    run = simulate(work, table(), limits(Rules(schedule_ahead=1)), PLENTY)
    np.testing.assert_allclose(run.first_token - work.arrival, HOST + 10 * TOKEN)


@pytest.mark.parametrize("schedule", [0, 4])
def test_a_slot_of_who_ends_serves_the_step_after_the_scheduled_one(schedule: int) -> None:
    """Two slots: the short one ends with step 2. Step 3 was fixed without its successor and runs without it itself."""
    work = Workload([0.0] * 3, [10] * 3, [30, 2, 2])
    run = simulate(work, table(), limits(Rules(schedule_ahead=1), slots=2), PLENTY, schedule, alpha=0.0)
    alone = STEP + EACH * (1 + schedule)
    assert run.completion[1] == pytest.approx(HOST + 20 * TOKEN + STEP + 2 * EACH * (1 + schedule))
    assert run.admitted[2] == pytest.approx(run.completion[1] + alone)
    assert run.first_token[2] == pytest.approx(run.completion[1] + 2 * alone + 10 * TOKEN)


def test_ttft_of_a_closed_loop_is_three_steps() -> None:
    """Equal requests spread over time: each waits for the running and for the scheduled step, then computes its own."""
    output = np.concatenate([np.arange(20, 61, 10), np.full(100, 50)])
    work = Workload(np.zeros(105), np.full(105, 10), output, clients=5, think_time=1e-4)
    steps = StepTable([0], [[0.02] * 9], [[0.0] * 9], [0, 1], [0.0, 0.0])
    for ahead, waits in ((0, 2), (1, 3)):
        run = simulate(work, steps, limits(Rules(schedule_ahead=ahead), slots=8), PLENTY)
        np.testing.assert_allclose((run.first_token - run.arrival)[5:], waits * 0.02 - 1e-4)


LATE = Rules(schedule_ahead=1, late_stop=True)


@pytest.mark.parametrize("schedule", [0, 4])
def test_who_has_ended_is_computed_once_more_in_vain(schedule: int) -> None:
    """Two of three end with step 2: step 3 has all three sequences and 36 tokens of context, step 4 has one."""
    slope = 1e-5
    steps = replace(table(), slope=np.full((2, 5), slope))
    work = Workload([0.0] * 3, [10, 10, 10], [4, 2, 2])
    run, known = (simulate(work, steps, limits(r), PLENTY, schedule) for r in (LATE, Rules(schedule_ahead=1)))

    def step(n: int, context: int) -> float:
        return STEP + EACH * n * (1 + schedule) + slope * context

    second = HOST + 30 * TOKEN + step(3, 30)
    assert run.completion[1:].tolist() == pytest.approx([second] * 2)  # the client has its answer at once
    assert run.completion[0] == pytest.approx(second + step(3, 11 + 11 + 11) + step(1, 12))
    assert known.completion[0] == pytest.approx(second + step(1, 11) + step(1, 12))
    assert run.service_s[1] == pytest.approx(known.service_s[1] + step(3, 33) / 3)
    assert run.rounds.tolist() == known.rounds.tolist() == [3, 1, 1]  # a vain step is no round
    assert run.busy_s == pytest.approx(run.service_s.sum())


def test_an_arrival_waits_for_the_step_in_vain() -> None:
    """The only sequence has ended, the step after it runs all the same; who arrives in it starts when it is over."""
    end = HOST + 10 * TOKEN + one(1)
    work = Workload([0.0, end + 0.5 * one(1)], [10, 10], [2, 1])
    run, known = (simulate(work, table(), limits(r), PLENTY) for r in (LATE, Rules(schedule_ahead=1)))
    assert known.admitted[1] == pytest.approx(end + 0.5 * one(1))
    assert run.admitted[1] == pytest.approx(end + one(1))
    assert run.end_s == pytest.approx(run.completion[1] + one(1))  # the last one too is computed once more
    assert run.steps == known.steps + 2


def test_a_request_pays_one_step_in_vain() -> None:
    """One slot, always full: the cycle of a request is longer by one step, and by none if the end is known."""
    count, output = 200, 20
    work = Workload(np.zeros(count), np.ones(count), np.full(count, output))
    flat = StepTable([0], [[0.02, 0.02]], [[0.0, 0.0]], [0, 1], [0.0, 0.0])
    late, known = (simulate(work, flat, limits(r, slots=1), PLENTY) for r in (LATE, Rules(schedule_ahead=1)))
    assert late.steps - known.steps == count
    assert late.end_s == pytest.approx(0.02 * count * (output + 1))
    assert known.end_s == pytest.approx(0.02 * count * output)


# ---------------------------------------------------------------------------------------------------------------------
# Separate prefill, reserved output, stream, floor
# ---------------------------------------------------------------------------------------------------------------------


def test_prompts_run_alone_and_decoding_waits() -> None:
    work = Workload([0.0, 0.01], [10, 2000], [3, 2])
    run = simulate(work, table(), limits(Rules(mixed_prefill=False)), PLENTY)
    first = HOST + 10 * TOKEN
    prompt = 2 * HOST + 2000 * TOKEN  # two chunks, no decode step between them
    assert run.first_token.tolist() == pytest.approx([first, first + one(1) + prompt])
    assert run.completion.tolist() == pytest.approx([first + one(1) + prompt + one(2)] * 2)
    assert run.steps == 5
    assert run.decode_s == pytest.approx((run.completion - run.first_token).sum())


def test_reserved_output_waits_for_memory_and_is_never_preempted() -> None:
    """Cache of 40 tokens, requests of 8 + 15: one at a time; grown on demand both start and one is preempted."""
    work = Workload([0.0, 0.0], [8, 8], [16, 16])
    whole, grown = (
        simulate(work, table(), limits(Rules(reserve_output=r), block=4), 40, schedule=0) for r in (True, False)
    )
    assert whole.preemptions.tolist() == [0, 0]
    assert whole.admitted[1] == pytest.approx(whole.completion[0])
    assert whole.kv_peak_tokens == 24
    assert grown.admitted[1] == 0.0
    assert grown.preemptions.tolist() == [0, 1]


def test_the_client_sees_its_first_token_with_the_kth() -> None:
    work = Workload([0.0, 0.0], [10, 10], [40, 5])
    run, plain = (simulate(work, table(), limits(Rules(stream_interval=k)), PLENTY) for k in (20, 1))
    start = HOST + 20 * TOKEN
    assert run.first_token[0] == pytest.approx(start + 4 * one(2) + 15 * one(1))  # 19 steps after its own first
    assert run.first_token[1] == run.completion[1]  # fewer than 20 in all: with the last
    np.testing.assert_array_equal(run.completion, plain.completion)
    drafted = simulate(work, table(), limits(Rules(stream_interval=20)), PLENTY, 4, 1.0)
    assert drafted.first_token[0] == pytest.approx(start + STEP + 10 * EACH + 3 * (STEP + 5 * EACH))  # 1 + 5 + 3 x 5


def test_a_step_with_prompts_has_a_floor() -> None:
    work = Workload([0.0, 0.2], [10, 10], [20, 2])
    run = simulate(work, table(floor=0.1), limits(Rules()), PLENTY)
    assert run.first_token[0] == pytest.approx(0.1)
    joined = 0.1 + np.ceil(0.1 / one(1)) * one(1)
    assert run.first_token[1] == pytest.approx(joined + 0.1)
    assert run.completion[1] == pytest.approx(joined + 0.1 + one(2))  # no floor where only decoding is done
    assert run.busy_s == pytest.approx(run.service_s.sum())


# ---------------------------------------------------------------------------------------------------------------------
# Whatever the rules
# ---------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    rules=st.sampled_from(EVERY),
    gaps=st.lists(st.floats(0.0, 0.2), min_size=1, max_size=40),
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=40, max_size=40),
    blocks=st.integers(1, 30),
    schedule=st.sampled_from([0, 4]),
    clients=st.integers(0, 5),
)
def test_nothing_is_lost_and_everybody_advances(
    rules: Rules, gaps: list[float], sizes: list[tuple[int, int]], blocks: int, schedule: int, clients: int
) -> None:
    prompt, output = zip(*sizes[: len(gaps)], strict=True)
    work = Workload(np.cumsum(gaps), prompt, output, clients=clients)
    run = simulate(work, table(6), limits(rules, 6, 40, 4), 4 * blocks, schedule, 0.7)
    check(run)
    longest = work.prompt + np.where(work.output > 1, work.output - 1 + schedule, 0)
    np.testing.assert_array_equal(run.refused, -(-longest // 4) > blocks)
    if rules.reserve_output:
        assert run.preemptions.sum() == 0


@pytest.mark.parametrize("rules", EVERY)
def test_tiny_memory_does_not_livelock(rules: Rules) -> None:
    """Every prompt fits beside another, no two outputs do: admit, overflow, preempt must not go on for ever."""
    work = Workload(np.zeros(30), np.full(30, 16), np.full(30, 100))
    run = simulate(work, table(8), limits(rules, 8, 64, 4), 120)
    check(run)
    if rules.reserve_output:
        assert run.preemptions.sum() == 0
    elif rules.mixed_prefill:
        assert run.preemptions.sum() >= 29
    else:
        assert 15 <= run.preemptions.sum() <= 30 * 8  # at most all others once per completion


@pytest.mark.parametrize("rules", EVERY)
def test_plain_decoding_jumps(rules: Rules) -> None:
    """A thousand million tokens: taken one by one they would need minutes."""
    work = Workload([0.0, 0.1, 1e6], [100, 2000, 5], [10**9, 5 * 10**8, 10**6])
    simulate(Workload([0.0], [1], [1]), table(), limits(rules), PLENTY)
    begun = time.process_time()
    run = simulate(work, table(), limits(rules), PLENTY)
    assert time.process_time() - begun < 1.0
    assert run.steps >= 10**9
    check(run)


@pytest.mark.parametrize("rules", EVERY)
def test_a_million_arrivals_at_once(rules: Rules) -> None:
    count = 1_000_000 if rules == LATE else 10_000
    run = simulate(Workload(np.zeros(count), np.ones(count), np.ones(count)), table(), limits(rules), PLENTY)
    assert run.emitted == count
    assert run.steps == count // 4 * (1 + rules.late_stop)  # slots are full: each step is followed by one in vain


@pytest.mark.parametrize("rules", EVERY)
def test_a_prompt_larger_than_the_budget_is_computed_in_chunks(rules: Rules) -> None:
    run = simulate(Workload([0.0, 0.0], [95, 10], [1, 1]), table(), limits(rules, budget=10), PLENTY)
    assert run.steps == 11 + rules.late_stop  # 105 tokens, at most ten a step
    assert run.first_token[0] == pytest.approx(10 * HOST + 100 * TOKEN)
    check(run)


@pytest.mark.parametrize("rules", EVERY)
def test_larger_than_the_whole_cache_is_refused_and_counted(rules: Rules) -> None:
    run = simulate(Workload([0.0, 0.0], [100, 10], [50, 5]), table(), limits(rules), 128)
    assert run.refused.tolist() == [True, False]
    check(run)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schedule_ahead": 2}, r"`schedule_ahead` must be 0 or 1 \[steps\]; got 2"),
        ({"stream_interval": 0}, r"`stream_interval` must be an integer of at least 1 \[tokens\]; got 0"),
        ({"eager_layer": -1.0}, r"`eager_layer` must be finite and at least 0 \[s\]; got -1.0"),
        ({"late_stop": True}, r"`late_stop` must be false unless `schedule_ahead` is 1; got True"),
    ],
)
def test_bad_rules_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Rules(**change)


@pytest.mark.parametrize(
    ("arrival", "prompt", "output", "text"),
    [
        ([0.0, 1.0], [5, 5], [5, 0], r"`output\[1\]` must be a whole number of at least 1 \[tokens\]; got 0"),
        ([0.0, 1.0], [0, 5], [5, 5], r"`prompt\[0\]` must be a whole number of at least 1 \[tokens\]; got 0"),
        ([1.0, 0.5], [5, 5], [5, 5], r"`arrival\[1\]` must be .*not before its predecessor \[s\]; got 0.5"),
    ],
)
def test_what_is_no_request_is_refused_by_row(
    arrival: list[float], prompt: list[int], output: list[int], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        Workload(arrival, prompt, output)


def test_a_negative_floor_is_refused() -> None:
    with pytest.raises(InputError, match=r"`prefill_floor` must be finite and at least 0 \[s\]; got -1"):
        replace(table(), prefill_floor=-1.0)

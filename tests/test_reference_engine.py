"""The compiled engine, which jumps, against the reference engine, which steps: same events, same times, same draws."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from simulator.engine import Records, StepTable, simulate
from simulator.prefixes import PromptBlocks
from simulator.workload import Workload, with_cached
from theory.acceptance import BetaMixture, Histogram, Positional
from theory.specs import Limits, Rules


def load() -> ModuleType:
    path = Path(__file__).with_name("reference_engine.py")
    spec = importlib.util.spec_from_file_location("reference_engine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


reference = load().reference

GAMMAS = (0, 2, 4)
PLENTY = 10**7  # KV capacity that never binds [tokens]
LAWS = [0.7, 1.0, Positional((0.8, 0.5, 1.0, 0.0)), Histogram((5, 3, 0, 2, 7)), BetaMixture.from_moments(0.7, 0.2)]
TIE = 1e-9  # an arrival nearer to the end of a step than this may be seen a step apart: sums are rounded [s]
TIMES = ("arrival", "admitted", "first_token", "completion", "service_s", "batch_s", "busy_s", "end_s")
COUNTS = (
    *("rounds", "drafted", "accepted", "preemptions", "found", "refused", "steps", "emitted"),
    *("kv_peak_tokens", "kv_tokens"),
)


def table(slots: int, slope: float = 1.37e-5) -> StepTable:
    """A steep slope over the context, so that a wrong sum of contexts shows."""
    n = np.arange(slots + 1)
    base = np.array([0.02 * (1 + 0.1 * g) + 2.1e-4 * n * (1 + g) for g in GAMMAS])
    base[:, 0] = 0.0013
    grid, times = np.array([0.0, 7.0, 1e4]), np.array([0.0, 5e-4, 1.0])
    return StepTable(np.array(GAMMAS), base, np.full(base.shape, slope), grid, times, 1.1e-8)


def check_same(run: Records, expected: Records) -> None:
    for name in TIMES:
        np.testing.assert_allclose(getattr(run, name), getattr(expected, name), rtol=1e-9, atol=1e-9, err_msg=name)
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(run, name), getattr(expected, name), err_msg=name)
    assert run.clear_s == pytest.approx(expected.clear_s, rel=1e-9, abs=1e-9)


@st.composite
def scenarios(draw: st.DrawFn, lengths: tuple[int, int] = (90, 60)) -> tuple[Workload, Limits, int]:
    """Few requests, small limits, KV caches from one block to plenty, open and closed loops."""
    count = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    gap = draw(st.sampled_from([0.0, 0.03, 0.2, 1.0]))
    clients = draw(st.sampled_from([0, 0, 1, 3, 9]))
    think = draw(st.sampled_from([0.0, 0.0717, np.linspace(0.3, 0.0, count)])) if clients else 0.0
    work = Workload(
        np.cumsum(rng.exponential(gap, count)) if gap else np.zeros(count),
        rng.integers(1, draw(st.integers(1, lengths[0])) + 1, count),
        rng.integers(1, draw(st.integers(1, lengths[1])) + 1, count),
        clients=clients,
        think_time=think,
    )
    slots, block = draw(st.integers(1, 8)), draw(st.sampled_from([1, 3, 4, 16]))
    budget = draw(st.integers(5 * slots, 120))
    longest = int((work.prompt + work.output).max()) + max(GAMMAS)
    kv = draw(st.one_of(st.integers(longest, 3 * longest), st.integers(0, longest), st.just(PLENTY)))
    return work, Limits(max_num_seqs=slots, max_num_batched_tokens=budget, block_size=block), kv + block


def begin_alike(work: Workload, tokens: int, seed: int) -> Workload:
    """Each prompt begins with some blocks of an earlier one, or with none, and goes on with blocks of its own."""
    rng = np.random.default_rng(seed)
    names: list[list[int]] = []
    for i, prompt in enumerate(work.prompt.tolist()):
        earlier = names[rng.integers(i)] if i and rng.random() < 0.8 else []
        kept = earlier[: rng.integers(0, len(earlier) + 1)]
        own = [1000 * i + k for k in range(-(-prompt // tokens))]
        names.append((kept + own)[: -(-prompt // tokens)])
    return replace(work, blocks=PromptBlocks.of(tokens, names))


@settings(deadline=None, max_examples=300)
@given(scenario=scenarios())
def test_plain_decoding_is_the_same_to_rounding(scenario: tuple[Workload, Limits, int]) -> None:
    work, limits, kv = scenario
    steps = table(limits.max_num_seqs)
    expected, closest = reference(work, steps, limits, kv)
    assume(closest > TIE)
    check_same(simulate(work, steps, limits, kv), expected)


@settings(deadline=None, max_examples=150)
@given(
    scenario=scenarios(),
    schedule=st.one_of(st.sampled_from([2, 4]), st.lists(st.sampled_from(GAMMAS), min_size=9, max_size=9)),
    alpha=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    seed=st.integers(-5, 2**64),
)
def test_speculation_has_the_same_draws(
    scenario: tuple[Workload, Limits, int], schedule: int | list[int], alpha: float, seed: int
) -> None:
    work, limits, kv = scenario
    steps = table(limits.max_num_seqs)
    expected, closest = reference(work, steps, limits, kv, schedule, alpha, seed)
    assume(closest > TIE)
    check_same(simulate(work, steps, limits, kv, schedule, alpha, seed), expected)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("ahead", "mixed", "reserve"), list(product([0, 1], [True, False], [True, False])))
def test_every_combination_of_rules_is_the_same_to_rounding(ahead: int, mixed: bool, reserve: bool, late: bool) -> None:
    if late and not ahead:
        pytest.skip("who schedules each step when it starts knows who has ended")

    @settings(deadline=None, max_examples=30)
    @given(
        scenario=scenarios(),
        stream=st.sampled_from([1, 1, 2, 7, 1000]),
        floor=st.sampled_from([0.0, 0.0317]),
        schedule=st.one_of(st.just(0), st.just(0), st.lists(st.sampled_from(GAMMAS), min_size=9, max_size=9)),
        law=st.sampled_from(LAWS),
        cached=st.sampled_from([None, 0.3, 1.0]),
        alike=st.sampled_from([0, 0, 1, 2, 3]),
    )
    def compare(
        scenario: tuple[Workload, Limits, int],
        stream: int,
        floor: float,
        schedule: int | list[int],
        law: Any,
        cached: float | None,
        alike: int,
    ) -> None:
        work, limits, kv = scenario
        work = work if cached is None else with_cached(work, cached)
        work = begin_alike(work, alike * limits.block_size, alike) if alike else work
        steps = replace(table(limits.max_num_seqs), prefill_floor=floor)
        ruled = replace(limits, rules=Rules(ahead, mixed, reserve, stream, late_stop=late))
        expected, closest = reference(work, steps, ruled, kv, schedule, law, 1)
        assume(closest > TIE)
        check_same(simulate(work, steps, ruled, kv, schedule, law, 1), expected)

    compare()


@pytest.mark.parametrize(
    ("rules", "others"),
    [
        *((Rules(), other) for other in (Rules(1), Rules(0, False), Rules(1, False), Rules(0, True, True))),
        *((Rules(1, mixed), Rules(1, mixed, late_stop=True)) for mixed in (True, False)),
    ],
)
def test_the_comparison_of_rules_can_fail(rules: Rules, others: Rules) -> None:
    """Under load each rule changes when somebody completes, so that agreement is not agreement of the same thing."""
    rng = np.random.default_rng(5)
    work = Workload(np.cumsum(rng.exponential(0.1, 60)), rng.integers(1, 90, 60), rng.integers(1, 60, 60))
    limits, steps = Limits(max_num_seqs=8, max_num_batched_tokens=64, block_size=4), table(8)
    other = reference(work, steps, replace(limits, rules=others), 400)[0]
    run = simulate(work, steps, replace(limits, rules=rules), 400)
    assert not np.allclose(run.completion, other.completion, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(rate=st.floats(0.1, 3.0), seed=st.integers(0, 10**6), slope=st.sampled_from([0.0, 1e-7, 1e-4]))
def test_an_arrival_is_seen_at_the_step_on_which_stepping_sees_it(rate: float, seed: int, slope: float) -> None:
    """Long jumps, ended by arrivals: thousands of steps, of which the arrival falls on one."""
    rng = np.random.default_rng(seed)
    work = Workload(np.cumsum(rng.exponential(1 / rate, 12)), rng.integers(1, 3000, 12), rng.integers(1, 900, 12))
    steps, limits = table(16, slope), Limits(max_num_seqs=16)
    expected, closest = reference(work, steps, limits, PLENTY)
    assume(closest > TIE)
    run = simulate(work, steps, limits, PLENTY)
    check_same(run, expected)
    other = simulate(Workload(work.arrival + 0.05, work.prompt, work.output), steps, limits, PLENTY)
    assert not np.allclose(other.completion, expected.completion, rtol=1e-9, atol=1e-9)  # negative control


@settings(deadline=None, max_examples=150)
@given(scenario=scenarios(), pieces=st.integers(1, 3), seed=st.integers(0, 10**6), late=st.booleans())
def test_shared_prompt_blocks_are_the_same(
    scenario: tuple[Workload, Limits, int], pieces: int, seed: int, late: bool
) -> None:
    """Who finds what, when it is forgotten, and what it does to memory and time."""
    work, limits, kv = scenario
    work = begin_alike(work, pieces * limits.block_size, seed)
    ruled = replace(limits, rules=Rules(int(late), late_stop=late))
    expected, closest = reference(work, table(limits.max_num_seqs), ruled, kv)
    assume(closest > TIE)
    check_same(simulate(work, table(limits.max_num_seqs), ruled, kv), expected)


def test_scenarios_reach_preemption_chunks_and_refusals() -> None:
    """What the comparison is worth: its scenarios do meet the cases it is about."""
    seen = {"preempted": 0, "chunked": 0, "refused": 0, "jumped": 0, "found": 0, "forgotten": 0}

    @settings(deadline=None, max_examples=100, database=None, derandomize=True)
    @given(scenario=scenarios())
    def look(scenario: tuple[Workload, Limits, int]) -> None:
        work, limits, kv = scenario
        run = simulate(work, table(limits.max_num_seqs), limits, kv)
        seen["preempted"] += int(run.preemptions.sum())
        seen["chunked"] += int((work.prompt > limits.max_num_batched_tokens).sum())
        seen["refused"] += int(run.refused.sum())
        seen["jumped"] += int(run.steps > 4 * work.requests)
        alike = begin_alike(work, limits.block_size, 0)
        tight, roomy = (simulate(alike, table(limits.max_num_seqs), limits, size) for size in (kv, PLENTY))
        seen["found"] += int((tight.found > 0).sum())
        seen["forgotten"] += int(tight.found.sum() < roomy.found.sum())

    look()
    assert min(seen.values()) >= 20, seen


@pytest.mark.parametrize("rules", [Rules(), Rules(1), Rules(1, False), Rules(1, True, True, 20)])
def test_times_under_speculation_have_the_same_law(rules: Rules) -> None:
    """Other seeds in the two engines: Kolmogorov-Smirnov on the time of a burst, and a control that must be seen."""
    work = Workload([0.0, 0.1, 0.15], [20, 30, 40], [60, 40, 50])
    steps, limits = table(4), Limits(max_num_seqs=4, max_num_batched_tokens=40, block_size=4, rules=rules)

    def ends(seeds: range, alpha: float) -> np.ndarray:
        return np.array([simulate(work, steps, limits, 200, 4, alpha, seed).end_s for seed in seeds])

    expected = np.array([reference(work, steps, limits, 200, 4, 0.7, seed)[0].end_s for seed in range(400)])
    assert ks_2samp(ends(range(1000, 2000), 0.7), expected).pvalue > 0.01
    assert ks_2samp(ends(range(1000, 2000), 0.6), expected).pvalue < 1e-6


@pytest.mark.parametrize(("gamma", "rules"), [(0, Rules()), (4, Rules()), (0, Rules(1, True, False, 20))])
def test_long_runs_lose_no_digits(gamma: int, rules: Rules) -> None:
    """A thousand requests, tight KV: no drift between sums over jumps and sums over steps."""
    rng = np.random.default_rng(3)
    work = Workload(np.cumsum(rng.exponential(0.45, 1000)), rng.integers(1, 400, 1000), rng.integers(1, 200, 1000))
    steps, limits = table(16, 1e-6), Limits(max_num_seqs=16, max_num_batched_tokens=128, rules=rules)
    run = simulate(work, steps, limits, 900, gamma, 0.7)
    expected, closest = reference(work, steps, limits, 900, gamma, 0.7)
    assert closest > TIE
    assert run.preemptions.sum() > 100
    check_same(run, expected)

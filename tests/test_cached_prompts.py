"""Prompt tokens that are cached: what they save, what they do not, and what the planner makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planner.build import resolve
from planner.scenario import load_scenario
from planner.service import Load, Service, build_service
from simulator.cluster import TierSetup, only, simulate_cluster
from simulator.engine import StepTable, simulate
from simulator.workload import ClosedLoop, Workload, at_rate, in_closed_loop, with_cached
from theory.errors import InputError
from theory.specs import Limits, Rules

STEP, HOST, TOKEN, PAIR = 0.02, 0.003, 1e-4, 1e-6  # decode, prompts alone [s], prompt token [s], pair of tokens [s]
PLENTY = 10**7


def table(slots: int = 4) -> StepTable:
    base = np.full((1, slots + 1), STEP)
    base[0, 0] = HOST
    return StepTable([0], base, np.zeros(base.shape), [0, 1e4], [0, 1e4 * TOKEN], PAIR)


def limits(**change: Any) -> Limits:
    return Limits(**({"max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 4} | change))


def work(prompt: list[int], output: list[int], cached: list[int] | None) -> Workload:
    return Workload(np.zeros(len(prompt)), prompt, output, cached=cached)


def test_prefill_starts_behind_what_is_cached() -> None:
    run = simulate(work([60], [1], [50]), table(), limits(), PLENTY)
    assert run.first_token[0] == pytest.approx(HOST + 10 * TOKEN + PAIR * 10 * (50 + 5))
    plain = simulate(work([60], [1], None), table(), limits(), PLENTY)
    assert plain.first_token[0] == pytest.approx(HOST + 60 * TOKEN + PAIR * 60**2 / 2)


def test_nothing_cached_is_no_column() -> None:
    rng = np.random.default_rng(0)
    prompt, output = rng.integers(1, 90, 50), rng.integers(1, 30, 50)
    runs = [
        simulate(Workload(np.zeros(50), prompt, output, cached=c), table(), limits(), 300) for c in (None, prompt * 0)
    ]
    np.testing.assert_array_equal(runs[0].completion, runs[1].completion)


def test_the_budget_counts_computed_tokens_and_the_memory_all() -> None:
    """Three prompts of 60, 20 to compute each: one step of 60 tokens, where without a cache each has its own."""
    cached = simulate(work([60] * 3, [2] * 3, [40] * 3), table(), limits(), PLENTY)
    assert cached.steps == 2
    np.testing.assert_array_equal(cached.admitted, 0.0)
    plain = simulate(work([60] * 3, [2] * 3, None), table(), limits(), PLENTY)
    assert plain.steps == 4
    tight = simulate(work([60] * 3, [2] * 3, [40] * 3), table(), limits(), 128)
    assert tight.kv_peak_tokens == 128  # two at a time: 16 blocks each
    assert tight.admitted[2] == tight.completion[0]


def test_a_preempted_request_finds_its_prefix_again() -> None:
    whole = work([8, 8], [9, 9], None)
    shared = work([8, 8], [9, 9], [0, 7])
    runs = [simulate(w, table(2), limits(max_num_seqs=2), 20) for w in (whole, shared)]
    assert [run.preemptions.tolist() for run in runs] == [[0, 1], [0, 1]]
    saved = [run.service_s[1] for run in runs]
    pairs = PAIR * (8**2 - 1 - 2 * 7) / 2
    assert saved[0] - saved[1] > 2 * 7 * TOKEN * 0.99 + pairs - 1e-9  # both prefills start behind 7 tokens


@pytest.mark.parametrize("rules", [Rules(), Rules(1, False), Rules(1, True, True)])
def test_all_but_one_token_cached(rules: Rules) -> None:
    count = 200
    rng = np.random.default_rng(2)
    prompt = rng.integers(1, 300, count)
    run = simulate(
        Workload(np.zeros(count), prompt, np.full(count, 5), cached=prompt - 1), table(), limits(rules=rules), 2000
    )
    assert run.emitted == 5 * count
    assert run.steps < 5 * count


@pytest.mark.parametrize(
    ("cached", "text"),
    [
        ([0, 20], r"`cached\[1\]` must be a whole number of at least 0 and below the prompt.*got 20"),
        ([-1, 0], r"`cached\[0\]` must be"),
        ([0.5, 0], r"`cached\[0\]` must be"),
        ([1], r"`cached` must have one value per request"),
    ],
)
def test_more_than_the_prompt_is_refused(cached: list[float], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Workload([0.0, 1.0], [10, 20], [1, 1], cached=cached)


def test_the_column_stays_with_its_requests() -> None:
    w = Workload([0.0, 1.0, 2.0], [10, 20, 30], [5, 5, 5], cached=[1, 2, 3])
    assert at_rate(w, 5.0).cached.tolist() == [1, 2, 3]  # type: ignore[union-attr]
    looped = in_closed_loop(w, ClosedLoop(1, 2), np.random.default_rng(0))
    assert looped.cached.tolist() == [1, 2]  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"`cached_prompt_share` must lie in \[0, 1\]"):
        with_cached(w, 50)
    tier = TierSetup("only", table(), limits(), PLENTY, replicas=2)
    found = simulate_cluster(w, [tier], only(0, 1, 3), 0)
    expected = [HOST + c * TOKEN + PAIR * c * (k + c / 2) for k, c in zip([1, 2, 3], [9, 18, 27], strict=True)]
    np.testing.assert_allclose(found.first_token - found.arrival, expected)


def test_a_scenario_says_which_share_of_prompts_is_cached() -> None:
    """The analytic model and the engine agree that it makes prefill cheaper, by as much."""
    services, ttft = [], []
    for share in (0.0, 0.75):
        settings = ["traffic.requests=2000", "traffic.rate=0.5", f"traffic.cached_prompt_share={share}"]
        problem = resolve(*load_scenario(overrides=settings))
        built = build_service(2, problem.deployment(2, 4), problem.profile, None, Load.of(problem.workload))
        assert isinstance(built, Service)
        run = simulate(problem.workload, built.table, built.deployment.limits, built.kv_tokens)
        services.append(built)
        ttft.append(float(np.mean(run.first_token - run.admitted)))
    assert services[1].alone_s < services[0].alone_s
    saved = (ttft[0] - ttft[1]) / ttft[0]
    predicted = 1 - services[1].alone_s / services[0].alone_s
    assert saved == pytest.approx(predicted, abs=0.15)
    with pytest.raises(InputError, match=r"`traffic.cached_prompt_share` must be less than or equal to 1; got 75"):
        load_scenario(overrides=["traffic.cached_prompt_share=75"])

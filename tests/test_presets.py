"""Engine presets of a scenario: what they fill in, what wins, what they change in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.engines import engine_times
from planner.build import Problem, resolve
from planner.presets import ENGINES
from planner.scenario import Engine, load_scenario, parse_scenario
from planner.service import Load, Service, build_service
from simulator.engine import simulate
from simulator.workload import at_rate
from theory.errors import InputError
from theory.specs import Limits, Rules


def problem(*settings: str) -> Problem:
    return resolve(*load_scenario(overrides=["traffic.requests=300", *settings]))


def service(found: Problem) -> Service:
    built = build_service(2, found.deployment(2, 4), found.profile, None, Load.of(found.workload))
    assert isinstance(built, Service)
    return built


@pytest.mark.parametrize("name", ENGINES)
def test_a_preset_fills_what_is_not_given(name: str) -> None:
    engine = Engine(preset=name)
    assert {key: getattr(engine, key) for key in ENGINES[name]} == ENGINES[name]
    assert set(ENGINES[name]) <= set(Engine.model_fields)
    assert engine.max_num_seqs == Engine().max_num_seqs


@pytest.mark.parametrize("name", ENGINES)
def test_explicit_fields_win(name: str) -> None:
    given: dict[str, Any] = {"schedule_ahead": 0, "block_size": 64, "stream_interval": 20, "mixed_prefill": True}
    engine = Engine(preset=name, **given)
    assert {key: getattr(engine, key) for key in given} == given


def test_without_a_preset_rules_are_the_defaults_of_the_engine() -> None:
    engine = Engine()
    assert Limits(engine.max_num_seqs, engine.max_num_batched_tokens) == Limits()
    assert problem().deployment(0, 1).limits.rules == Rules()


def test_an_unknown_preset_and_a_wrong_rule_are_refused() -> None:
    scenario, _ = load_scenario()
    data = scenario.model_dump(exclude_none=True)
    with pytest.raises(InputError, match=r"`engine.preset` must be 'vllm', 'trtllm' or 'sglang'; got 'vlm'"):
        parse_scenario({**data, "engine": {"preset": "vlm"}})
    with pytest.raises(InputError, match=r"`engine.schedule_ahead` must be less than or equal to 1; got 2"):
        parse_scenario({**data, "engine": {"schedule_ahead": 2}})
    with pytest.raises(InputError, match="Did you mean `stream_interval`"):
        parse_scenario({**data, "engine": {"preset": "vllm", "stream_intervall": 2}})


def test_rules_reach_limits_and_table() -> None:
    found = problem("engine={preset: trtllm, stream_interval: 20}")
    launch = engine_times("trtllm", found.pools[0].accelerator.name).eager_layer
    limits = found.deployment(2, 4).limits
    assert limits.rules == Rules(1, True, True, 20, launch, memory_left=True)
    assert limits.block_size == 32
    assert service(found).table.prefill_floor == pytest.approx(launch * found.models[2].layers)


def test_host_times_of_a_preset_yield_to_those_of_scenario_and_profile() -> None:
    usual, given = problem("engine={preset: vllm}"), problem("engine={preset: vllm, host_step_s: 1.0e-4}")
    own = usual.profile.efficiency
    times = engine_times("vllm", usual.pools[0].accelerator.name)
    assert (own.host_step, own.host_sequence) == (times.step, times.sequence)
    assert (given.profile.efficiency.host_step, given.profile.efficiency.host_sequence) == (1e-4, times.sequence)
    silent = problem("engine={preset: vllm, host_step_s: 0.0}")
    assert silent.profile.efficiency.host_step == 0.0


def test_what_presets_change_in_a_run() -> None:
    """Host times aside: schedule-ahead makes TTFT longer by about a step, reserving holds fewer sequences at once."""
    quiet = ", host_step_s: 0.0, eager_layer_s: 0.0, gpu_memory_utilization: 0.55, memory_left: false}"  # memory binds
    found = {name: problem(f"engine={{preset: {name}{quiet}") for name in ENGINES}
    found["none"] = problem("engine.gpu_memory_utilization=0.55")
    built = {name: service(p) for name, p in found.items()}
    runs = {}
    for name, s in built.items():
        work = at_rate(found["none"].workload, 0.5)
        runs[name] = simulate(work, s.table, s.deployment.limits, s.kv_tokens)
    ttft = {name: float(np.mean(run.first_token - run.arrival)) for name, run in runs.items()}
    step = float(built["none"].rounds.time[0])
    assert 0.5 * step < ttft["vllm"] - ttft["none"] < 1.5 * step
    assert ttft["sglang"] > ttft["none"]
    assert built["trtllm"].batch_cap < built["vllm"].batch_cap
    assert runs["trtllm"].preemptions.sum() == 0


def test_separate_prefill_and_a_floor_reach_the_analytic_model() -> None:
    mixed, apart, floored = (
        service(problem(*s)) for s in ([], ["engine.mixed_prefill=false"], ["engine.eager_layer_s=0.01"])
    )
    np.testing.assert_allclose(apart.first_s, mixed.alone_s)  # a step of its own
    assert np.all(apart.first_s[: mixed.batch_cap] > mixed.first_s[: mixed.batch_cap])
    assert floored.alone_s == pytest.approx(0.8)  # 80 layers
    np.testing.assert_allclose(floored.first_s + floored.rounds.time, 0.8)


def test_presets_run_end_to_end(tmp_path: Path) -> None:
    """As a user would: the command's own path, one deployment under each engine."""
    from planner.simulate import simulate_scenario

    deployment = "deployment={tiers: [{tier: 13b, tp: 1}]}"
    means = {}
    for name in ENGINES:
        scenario, folder = load_scenario(
            overrides=["traffic.requests=300", "traffic.rate=1.0", f"engine.preset={name}", deployment]
        )
        means[name] = simulate_scenario(scenario, folder, None, 0, lambda *_: None)["ttft_s"]["mean"]
    assert len(set(means.values())) == 3

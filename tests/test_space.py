"""The space of deployments: analytic capacity against simulated, memory rules, reasons for what is left out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from planner.build import Problem, resolve
from planner.frontier import hull, pareto, slope
from planner.scenario import Slo, load_scenario
from planner.search import Search, quality_floor
from planner.service import Load, build_service
from planner.simulate import keeps, measured_capacity, run_at
from planner.space import RATE_GRID, Space, _bracket, congestion, enumerate_space, occupancy
from theory.errors import InfeasibleError


@pytest.fixture(scope="module")
def problem() -> Problem:
    scenario, folder = load_scenario(overrides=["traffic.requests=8000", "traffic.rate=12"])
    return resolve(scenario, folder)


@pytest.fixture(scope="module")
def space(problem: Problem) -> Space:
    return enumerate_space(problem)


def test_every_combination_is_a_service_or_has_a_reason(problem: Problem, space: Space) -> None:
    for tier, choice in enumerate(problem.scenario.tiers):
        for tp in choice.tp:
            name = problem.models[tier].name
            known = any(s.deployment.tp == tp for s in space.services[tier])
            assert known or any(f"{name} tp{tp}" in reason for reason in space.excluded)
    assert any("llama-2-70b tp1: the weights do not fit" in reason for reason in space.excluded)


@pytest.mark.parametrize(("tier", "tp", "draft"), [(0, 1, None), (0, 2, "llama-68m"), (2, 4, None)])
def test_simulated_capacity_is_near_the_analytic_one(
    problem: Problem, space: Space, tier: int, tp: int, draft: str | None
) -> None:
    index, service = next(
        (i, s)
        for i, s in enumerate(space.services[tier])
        if s.deployment.tp == tp and (s.draft.model.name if s.draft else None) == draft
    )
    analytic = float(space.capacity[tier][index])
    simulated = measured_capacity(service, problem.workload, problem.scenario.slo, analytic, seed=3)
    assert simulated == pytest.approx(analytic, rel=0.15)
    assert not keeps(run_at(service, problem.workload, 1.3 * analytic, seed=3), problem.scenario.slo)


def test_a_coarse_search_finds_the_capacity_of_a_full_one(problem: Problem, space: Space) -> None:
    """Trying every 8th rate first loses nothing, because waits grow with the load."""
    services = [s for of_tier in space.services for s in of_tier]
    limit = occupancy(services, np.full(len(services), 1e-9), space.load).rate_limit
    rates = limit[:, None] * RATE_GRID
    for slo in (Slo(), Slo(ttft_p99_s=0.3), Slo(ttft_p99_s=5.0, tpot_mean_s=0.015)):
        full = _bracket(services, rates, space.load, slo, len(RATE_GRID))
        for found, all_tried in zip(_bracket(services, rates, space.load, slo, 8), full, strict=True):
            assert np.array_equal(found, all_tried)
    other = _bracket(services, rates, space.load, Slo(ttft_p99_s=0.1), 8)
    assert not np.array_equal(other[0], full[0])  # the test can fail


def test_congestion_is_the_occupancy_it_was_taken_from(space: Space) -> None:
    """Between the rates of the table: requests in two replicas against Little's law, slope against a difference."""
    for tier, at in ((0, 1), (1, 4), (2, 4)):
        service, bears = space.services[tier][at], float(space.capacity[tier][at])
        curve = congestion(service, space.load, bears, replicas=2)
        assert curve.capacity == pytest.approx(2 * bears)
        for share in (0.03, 0.333, 0.777, 0.951):
            rates = bears * share * np.array([1.0, 0.999, 1.001])
            inside = rates * occupancy([service] * 3, rates, space.load).e2e_s
            assert curve.number(2 * rates[0]) == pytest.approx(2 * inside[0], rel=0.01)
            slope_ = (inside[2] - inside[1]) / (rates[2] - rates[1])
            assert curve.marginal(2 * rates[0]) == pytest.approx(slope_, rel=0.03)


def test_the_best_rule_on_a_plan_is_no_worse_than_its_own(problem: Problem, space: Space) -> None:
    search = Search(problem, space, quality_floor(problem))
    for candidate in search.enumerate()[::7]:
        found = search.at_capacity(candidate, 0.05)
        if found is None:
            assert len(candidate.groups) == 1
            continue
        assert found.converged
        assert found.value.quality >= candidate.rule.quality - 1e-6
        bears = search.used(candidate)
        own = np.array([g.rate * g.replicas for g in sorted(candidate.groups, key=lambda g: g.tier)])
        assert np.all(found.rates <= own / bears * (1 + 1e-5))
        full = search.at_capacity(candidate, 0.1)
        assert full is not None
        assert full.prices == pytest.approx(2 * found.prices, abs=1e-6)  # in the unit of lambda


def test_theory_meets_simulation_at_half_load(problem: Problem, space: Space) -> None:
    """E2E and batch of real services agree within 6 % well below capacity: one model, two routes."""
    for tier, at in ((0, 0), (1, 4), (2, 4)):
        service, rate = space.services[tier][at], 0.5 * float(space.capacity[tier][at])
        state = occupancy([service], np.array([rate]), space.load)
        records = run_at(service, problem.workload, rate, seed=1)
        late = slice(len(records.arrival) // 10, None)
        e2e = float((records.completion - records.arrival)[late].mean())
        assert e2e == pytest.approx(float(state.e2e_s[0]), rel=0.06)
        assert records.decode_s / records.end_s == pytest.approx(float(state.batch[0]), rel=0.06)
        wrong = occupancy([service], np.array([1.3 * rate]), space.load)
        assert e2e != pytest.approx(float(wrong.e2e_s[0]), rel=0.06)


def test_replicas_are_the_fewest_gpus(problem: Problem, space: Space) -> None:
    """The separable choice equals a search over all services and replica counts."""
    search = Search(problem, space, quality_floor(problem))
    for candidate in search.enumerate():
        options = []
        for group in candidate.groups:
            rate = group.rate * group.replicas
            options.append(
                [
                    s.gpus * m
                    for s, c in zip(space.services[group.tier], space.capacity[group.tier], strict=True)
                    for m in range(1, problem.pools[0].gpus + 1)
                    if c > 0 and rate / m <= c * (1 + 1e-9)
                ]
            )
        assert candidate.gpus == min(sum(combination) for combination in itertools.product(*map(set, options)))


def test_hull_prices_each_plan_on_its_interval(problem: Problem, space: Space) -> None:
    candidates = Search(problem, space, quality_floor(problem)).enumerate()
    vertices = hull(candidates)
    assert len(pareto(candidates)) >= len(vertices) >= 2
    for vertex in vertices:
        low, high = vertex.lam_low, vertex.lam_high
        for lam in (low * 1.001 + 1e-9, high * 0.999 if np.isfinite(high) else 10 * low + 1):
            best = max(candidates, key=lambda c: lam * c.rule.quality - c.cost)
            mine = lam * vertex.candidate.rule.quality - vertex.candidate.cost
            assert mine == pytest.approx(lam * best.rule.quality - best.cost, abs=1e-12)
    for a, b in itertools.pairwise(vertices):
        assert slope(a.candidate, b.candidate) == pytest.approx(b.lam_low)


def test_longer_requests_are_left_out_and_said(problem: Problem) -> None:
    scenario, folder = load_scenario(overrides=["traffic.requests=4000", "traffic.max_tokens=1024"])
    cut = resolve(scenario, folder)
    assert 0.2 < cut.left_out < 0.9
    assert int((cut.workload.prompt + cut.workload.output).max()) <= 1024
    assert problem.left_out == 0.0


def test_a_model_with_too_short_a_context_is_excluded_with_the_reason(problem: Problem) -> None:
    load = Load.of(problem.workload)
    long = Load(**{f: getattr(load, f) for f in Load.__slots__ if f != "longest"}, longest=5000)
    reason = build_service(0, problem.deployment(0, 2), problem.profile, None, long)
    assert isinstance(reason, str)
    assert "context is 4096" in reason


def test_nothing_keeps_an_impossible_slo() -> None:
    scenario, folder = load_scenario(overrides=["traffic.requests=500", "slo.ttft_p99_s=0.001"])
    with pytest.raises(InfeasibleError, match=r"no deployment keeps `slo.ttft_p99_s` = 0.001 s.*nearest plan"):
        enumerate_space(resolve(scenario, folder))

"""Plans verified: the shortlist says what was run and why, and what would change follows from what simulation said."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.build import redrawn, resolve
from planner.figures import measured
from planner.frontier import worth_allocating
from planner.plan import plan_scenario
from planner.scenario import load_scenario
from planner.search import Candidate, Rule, Search, best_of, quality_floor
from planner.simulate import run
from planner.space import enumerate_space, under_slo
from planner.verify import BATCHES, HOPE, batches
from planner.verify import _equals as equals
from simulator.workload import at_rate
from theory.errors import InfeasibleError

SMALL = ("traffic.requests=3000", "search.trials=0", "tiers.1.tp=[2, 4]", "tiers.2.tp=[4]", "quality.signal.levels=3")
OBJECTIVES = (
    "objective={quality_floor: top}",
    "objective={lambda_usd: 0.003}",
    "objective={budget_usd_per_1000: 0.35}",
)


def test_no_service_bears_more_than_is_hoped_for() -> None:
    """Each service of the shipped scenario, simulated: ranking by hope looks at every plan that may be best."""
    study = Path(__file__).parents[1] / "studies" / "capacity_without_simulation" / "result.json"
    rows = json.loads(study.read_text())["rows"]
    assert max(r["simulated_requests_per_s"] / r["analytic_requests_per_s"] for r in rows) < HOPE


@lru_cache
def prepared(objective: str) -> tuple[Search, tuple[Rule, ...]]:
    """A search and the rules of its enumeration."""
    problem = resolve(*load_scenario(overrides=[*SMALL, objective]))
    search = Search(problem, enumerate_space(problem), quality_floor(problem))
    return search, tuple(c.rule for c in search.enumerate())


def simulated_at(search: Search, seed: int, low: float, high: float) -> Search:
    """Return the search as if some services had been simulated to bear ``low`` to ``high`` of what was predicted."""
    other = search.like(search.problem, search.space)
    rng = np.random.default_rng(seed)
    for tier, capacity in enumerate(search.space.capacity):
        for i in range(len(capacity)):
            if rng.random() < 0.5:
                other._capacity[tier][i] = capacity[i] * rng.uniform(low, high)
                other._simulated.add((tier, i))
    other.hope(HOPE)
    return other


def best(search: Search, rules: tuple[Rule, ...]) -> Candidate | None:
    found = [c for c in map(search.allocate, rules) if c is not None]
    try:
        return best_of(search, found)[0]
    except InfeasibleError:
        return None


def worth(search: Search, candidate: Candidate) -> float:
    """What the objective makes small, the load that it is divided by left out."""
    asked = search.problem.scenario.objective
    assert asked is not None
    if asked.lambda_usd is not None:
        return candidate.cost - asked.lambda_usd * candidate.rule.quality
    return -candidate.rule.quality if asked.budget_usd_per_1000 is not None else candidate.cost


@given(
    objective=st.sampled_from(OBJECTIVES),
    seed=st.integers(0, 2**16),
    tighter=st.floats(0.3, 0.99),
    ttft=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_a_tighter_slo_is_never_better(objective: str, seed: int, tighter: float, ttft: bool) -> None:
    """Whatever simulation said of some services, the plan chosen on it is at least as good as under a tighter SLO."""
    search, rules = prepared(objective)
    known = simulated_at(search, seed, 0.6, 1.1)
    plan = best(known, rules)
    slo = search.problem.scenario.slo
    change = {"ttft_p99_s": slo.ttft_p99_s * tighter} if ttft else {"tpot_mean_s": slo.tpot_mean_s * tighter}
    space = under_slo(search.space, known.corrected(HOPE), slo.model_copy(update=change))
    other = best(known.like(search.problem, space), rules)
    assert other is None or (plan is not None and worth(search, other) >= worth(search, plan) - 1e-12)


@given(objective=st.sampled_from(OBJECTIVES[:1]), seed=st.integers(0, 2**16), more=st.floats(1.01, 2.0))
@settings(max_examples=8, deadline=None)
def test_more_load_never_takes_less_money(objective: str, seed: int, more: float) -> None:
    search, rules = prepared(objective)
    known = simulated_at(search, seed, 0.6, 1.1)
    plan = best(known, rules)
    busier = replace(search.problem, workload=at_rate(search.problem.workload, more * search.problem.rate))
    other = best(known.like(busier, known.corrected(HOPE)), rules)
    if other is not None:
        assert plan is not None
        assert other.cost * busier.rate >= plan.cost * search.problem.rate * (1 - 1e-12)


def test_analytic_capacities_would_make_a_tighter_slo_cheaper() -> None:
    """The negative control: what simulation said forgotten, the tighter objective looks cheaper than the plan."""
    search, rules = prepared(OBJECTIVES[0])
    known = simulated_at(search, 3, 0.6, 0.7)
    for tier, capacity in enumerate(search.space.capacity):
        known._capacity[tier][:] = 0.65 * capacity
    plan = best(known, rules)
    slo = search.problem.scenario.slo
    forgotten = under_slo(search.space, search.space, slo.model_copy(update={"ttft_p99_s": 0.9 * slo.ttft_p99_s}))
    other = best(search.like(search.problem, forgotten), rules)
    assert other is not None
    assert plan is None or worth(search, other) < worth(search, plan)


@pytest.fixture(scope="module")
def planned() -> dict[str, Any]:
    return plan_scenario(*load_scenario(overrides=[*SMALL]))


def test_the_shortlist_says_what_was_run_and_why(planned: dict[str, Any]) -> None:
    rows, selection = planned["shortlist"], planned["selection"]
    assert [r["in"] for r in rows] == [True] + [False] * (len(rows) - 1)
    assert all(r["why"] for r in rows)
    assert len(rows) >= 2
    chosen = rows[0]
    assert chosen["usd_per_1000_requests"] == pytest.approx(planned["predicted"]["usd_per_1000_requests"])
    assert chosen["predicted"]["e2e_mean_s"] == pytest.approx(planned["predicted"]["e2e_mean_s"])
    assert chosen["simulated"]["e2e_mean_s"] == planned["simulated"]["e2e_s"]["mean"]
    assert chosen["difference"]["e2e_mean_s"] == pytest.approx(
        chosen["simulated"]["e2e_mean_s"] / chosen["predicted"]["e2e_mean_s"] - 1
    )
    assert selection["requests_simulated"] == sum(r["requests_simulated"] for r in rows)
    assert selection["requests_simulated"] % 3000 == 0
    assert {r["stage"] for r in rows} <= {"plan", "replicas", "ranking"}
    assert all(r["requests_simulated"] == 0 and r["simulated"] is None for r in rows if r["stage"] != "plan")
    if selection["confidence"] is not None:
        assert selection["confidence"] == 0.95
        assert {x["verdict"] for x in chosen["limits"]} == {"in"}
        assert all(x["mean"] <= x["limit"] for x in chosen["limits"])


def test_no_plan_of_the_shortlist_that_is_in_is_better(planned: dict[str, Any]) -> None:
    """What was not tested costs more: the reason it gives holds."""
    chosen = planned["shortlist"][0]
    for row in planned["shortlist"]:
        if row["stage"] == "ranking":
            assert row["usd_per_1000_requests"] >= chosen["usd_per_1000_requests"] - 1e-9


def test_sensitivities_are_never_cheaper_than_the_plan(planned: dict[str, Any]) -> None:
    own = planned["predicted"]["usd_per_1000_requests"]
    rows = {r["change"]: r for r in planned["sensitivity"]}
    tight, busy = rows["slo.ttft_p99_s x 0.5"], rows["traffic.rate x 1.25"]
    assert "infeasible" in tight or tight["usd_per_1000_requests"] >= own - 1e-9
    assert "infeasible" in busy or 1.25 * busy["usd_per_1000_requests"] >= own - 1e-9


def test_batches_have_the_mean_of_the_run() -> None:
    """Equal parts: their mean is that of the visits, and late visits are those beyond the objective."""
    problem = resolve(*load_scenario(overrides=[*SMALL]))
    search = Search(problem, enumerate_space(problem), quality_floor(problem))
    plan = search.settle(best_of(search, search.enumerate())[0])
    records = run(problem, plan, 0)
    found = batches(problem, plan, records)
    assert all(len(x) == BATCHES for x in found.values())
    e2e = (records.completion - records.arrival)[measured(problem, records)]
    assert np.mean(found["e2e"]) == pytest.approx(float(e2e.mean()), rel=0.01)
    tight = replace(
        problem,
        scenario=problem.scenario.model_copy(
            update={"slo": problem.scenario.slo.model_copy(update={"ttft_p99_s": 1e-6})}
        ),
    )
    late = batches(tight, plan, records)
    assert all(np.mean(x) == 1 for name, x in late.items() if name.startswith("late"))


def test_other_seeds_give_other_requests_at_the_same_rate() -> None:
    scenario, folder = load_scenario(overrides=[*SMALL])
    problem = resolve(scenario, folder)
    other = redrawn(problem, folder, 99)
    assert other.rate == pytest.approx(problem.rate, rel=1e-9)
    assert not np.array_equal(other.workload.prompt, problem.workload.prompt)


@given(objective=st.sampled_from(OBJECTIVES), seed=st.integers(0, 2**16))
@settings(max_examples=8, deadline=None)
def test_rules_left_out_are_never_needed(objective: str, seed: int) -> None:
    """A rule that visits every tier as often as another and is right no more often is best on no capacities."""
    search, enumerated = prepared(objective)
    tiers = search.subsets()[-1]
    other_prices = search.prices(tiers) * np.random.default_rng(seed).uniform(0.3, 3.0, len(tiers))
    rules = (*enumerated, *(c.rule for c in search.of_prices(tiers, other_prices)))
    fewer = tuple(worth_allocating((*rules, *rules[:3])))
    assert len(fewer) <= len(rules)
    known = simulated_at(search, seed, 0.4, 1.1)
    one, other = best(known, rules), best(known, fewer)
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert worth(search, other) == pytest.approx(worth(search, one), abs=1e-12)


def test_settling_heeds_what_simulation_said() -> None:
    """Of services on the same GPUs the one that was faster in simulation, in problems that differ in a number too."""
    search, rules = prepared(OBJECTIVES[0])
    known = search.like(search.problem, search.space)
    plan = best(known, rules)
    assert plan is not None
    plan = known.settle(plan)
    other = equals(known, plan)[0]
    known.beats(other, plan)
    for again in (known, known.like(search.problem, search.space)):
        assert [g.service for g in again.settle(plan).groups] == [g.service for g in other.groups]

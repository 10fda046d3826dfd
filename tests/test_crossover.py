"""Where speculation stops paying, its interval, the draft's memory, and what would change the decision."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from planner.build import Problem, resolve
from planner.crossover import concurrency, crossing_batch, crossing_rate, crossover, gains, stretched, without_draft
from planner.scenario import load_scenario
from planner.search import Candidate, Group, Search, best_of, quality_floor
from planner.service import with_acceptance, with_length
from planner.simulate import run_at
from planner.space import Space, enumerate_space
from planner.tipping import tipping_points


@cache
def setting(*overrides: str) -> tuple[Problem, Space]:
    problem = resolve(
        *load_scenario(
            overrides=["traffic.requests=4000", "tiers.0.tp=[1]", "tiers.1.tp=[2]", "tiers.2.tp=[4]", *overrides]
        ),
        None,
        0,
    )
    return problem, enumerate_space(problem)


def drafted(space: Space, tier: int, model: str) -> Group:
    """One replica with the draft on all its GPUs."""
    service = next(
        s for s in space.services[tier] if s.draft and s.draft.model.name == model and s.draft.tp == s.deployment.tp
    )
    return Group(tier, service, 1, 1.0)


def found(tier: int = 2, model: str = "llama-2-7b") -> dict[str, Any]:
    problem, space = setting()
    row = crossover(problem, space, drafted(space, tier, model))
    assert row is not None
    return row


def test_interval_holds_the_crossover() -> None:
    row = found()
    low, high = row["crossover_interval_requests_per_s"]
    assert low < row["crossover_requests_per_s"]
    assert high is None or high > row["crossover_requests_per_s"]
    small, large = row["crossover_batch_interval"]
    assert small < row["crossover_batch"]
    assert large is None or large > row["crossover_batch"]


def test_the_draft_gains_below_the_crossover_and_hurts_above_it_in_simulation_too() -> None:
    """An independent route: request by request, at half the crossover and just short of the stability limit."""
    problem, space = setting()
    group, row = drafted(space, 2, "llama-2-7b"), found()
    fixed, plain = with_length(group.service, space.load, row["fixed_length"]), without_draft(space, group)

    def gain(rate: float) -> float:
        runs = (run_at(s, problem.workload, rate, 1) for s in (fixed, plain))
        with_draft, without = (float((r.completion - r.arrival).mean()) for r in runs)
        return math.log(without / with_draft)

    assert gain(0.5 * row["crossover_requests_per_s"]) > 0.1
    assert gain(1.1 * row["crossover_requests_per_s"]) < 0.0


def test_every_number_of_a_row_can_be_published() -> None:
    problem, space = setting()
    for tier, services in enumerate(space.services):
        for service in services:
            json.dumps(crossover(problem, space, Group(tier, service, 1, 1.0)), allow_nan=False)


def test_limits_of_the_crossing() -> None:
    _, space = setting()
    group = drafted(space, 2, "tinyllama-1.1b")
    fixed, plain = with_length(group.service, space.load, 3), without_draft(space, group)
    assert crossing_rate(stretched(fixed, 100.0), plain, space.load) == 0.0
    assert crossing_rate(stretched(fixed, 0.01), plain, space.load) is None
    assert crossing_batch(stretched(fixed, 100.0), plain) == 1
    assert crossing_batch(stretched(fixed, 0.01), plain) is None
    assert np.all(gains(plain, plain, np.array([0.1, 1.0]), space.load) == 0.0)


def test_no_draft_no_crossover() -> None:
    problem, space = setting()
    group = drafted(space, 2, "tinyllama-1.1b")
    plain = replace(group, service=without_draft(space, group))
    assert crossover(problem, space, plain) is None
    assert concurrency(space, plain) is None


def test_a_surer_acceptance_narrows_the_interval() -> None:
    problem, space = setting()
    group = drafted(space, 2, "llama-2-7b")
    assert group.service.draft is not None
    sure = with_acceptance(group.service, space.load, group.service.draft.acceptance.value)  # low = high
    wide, narrow = (
        crossover(problem, space, replace(group, service=s))["crossover_interval_requests_per_s"]  # type: ignore[index]
        for s in (group.service, sure)
    )
    assert narrow[0] > wide[0]


def test_a_bigger_draft_takes_more_memory() -> None:
    _, space = setting()
    small, large = (concurrency(space, drafted(space, 2, m)) for m in ("tinyllama-1.1b", "llama-2-7b"))
    assert small is not None
    assert large is not None
    assert large["kv_tokens"] < small["kv_tokens"] < small["kv_tokens_without_draft"]
    assert large["lost"] >= small["lost"] >= 0


def analytic(problem: Problem, space: Space) -> Candidate:
    search = Search(problem, space, quality_floor(problem))
    return search.settle(best_of(search, search.enumerate())[0])


def deployed(candidate: Candidate) -> list[tuple[int, str, int]]:
    return [(g.tier, g.service.name, g.replicas) for g in candidate.groups]


@pytest.fixture(scope="module")
def tips() -> tuple[Candidate, list[dict[str, Any]]]:
    problem, space = setting()
    chosen = analytic(problem, space)
    return chosen, tipping_points(problem, space, chosen, [chosen.rule])


@pytest.mark.parametrize("way", [-1, 1])
def test_another_plan_wins_just_beyond_the_tip_and_not_just_before(
    tips: tuple[Candidate, list[dict[str, Any]]], way: int
) -> None:
    """An independent route: the problem planned anew at the rates on both sides."""
    problem, space = setting()
    chosen, rows = tips
    row = next(r for r in rows if r["key"] == "traffic.rate" and (r["tried_to"] - r["from"]) * way > 0)
    assert row["to"] is not None
    scaled = replace(
        problem, workload=replace(problem.workload, arrival=problem.workload.arrival * row["from"] / row["to"])
    )
    assert deployed(analytic(scaled, space)) != deployed(chosen)
    near = row["from"] + 0.2 * (row["to"] - row["from"])
    before = replace(problem, workload=replace(problem.workload, arrival=problem.workload.arrival * row["from"] / near))
    assert deployed(analytic(before, space)) == deployed(chosen)


def test_price_changes_nothing_under_a_floor(tips: tuple[Candidate, list[dict[str, Any]]]) -> None:
    (row,) = [r for r in tips[1] if r["key"] == "fleet.price_per_gpu_hour"]
    assert row["to"] is None


def test_price_and_lambda_are_one_thing() -> None:
    problem, space = setting("objective.quality_floor=null", "objective.lambda_usd=0.002")
    chosen = analytic(problem, space)
    rows = tipping_points(problem, space, chosen, [chosen.rule])
    lam = next(r for r in rows if r["key"] == "objective.lambda_usd" and r["to"] is not None and r["to"] > r["from"])
    price = next(r for r in rows if r["key"] == "fleet.price_per_gpu_hour" and r["to"] is not None and r["to"] < 2.5)
    assert price["to"] / price["from"] == pytest.approx(lam["from"] / lam["to"])
    dear, _ = setting(
        "objective.quality_floor=null", "objective.lambda_usd=0.002", f"fleet.price_per_gpu_hour={price['to']}"
    )
    assert deployed(analytic(dear, space)) != deployed(chosen)

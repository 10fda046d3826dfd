"""A slice of a fleet: the loads of the whole, the figures of the whole, and no slice where a run is long."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.build import resolve
from planner.figures import figures, published
from planner.scenario import load_scenario
from planner.search import Candidate, Group, Search, best_of, quality_floor
from planner.simulate import run, simulate_candidate
from planner.slices import HALF, SPAN, UNEVEN, _smaller, fleet_slice
from planner.space import enumerate_space
from simulator.workload import Workload, repeated
from theory.errors import InputError


def planned(rate: float, gpus: int, requests: int) -> tuple[Any, Candidate]:
    settings = [f"traffic.rate={rate}", f"fleet.gpus={gpus}", f"traffic.requests={requests}"]
    problem = resolve(*load_scenario(overrides=settings), None, 0)
    space = enumerate_space(problem)
    careful = replace(space, capacity=tuple(0.8 * c for c in space.capacity))
    search = Search(problem, careful, quality_floor(problem))
    return problem, search.settle(best_of(search, search.enumerate())[0])


@pytest.fixture(scope="module")
def fleet() -> tuple[Any, Candidate]:
    return planned(18_000, 10_000, 20_000)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=4))
def test_the_smallest_even_slice(replicas: list[int]) -> None:
    groups = tuple(Group(i, None, n, 1.0) for i, n in enumerate(replicas))  # type: ignore[arg-type]
    counts = [g.replicas for g in _smaller(groups, 1.0)]
    assert all(1 <= m <= n for m, n in zip(counts, replicas, strict=True))
    shares = [m / n for m, n in zip(counts, replicas, strict=True)]
    if counts != replicas:
        assert max(shares) / min(shares) - 1 <= 2.1 * UNEVEN
        assert min(shares) <= HALF * 1.02


def test_replicas_have_the_loads_of_the_fleet(fleet: tuple[Any, Candidate]) -> None:
    problem, plan = fleet
    part = fleet_slice(problem, plan, 0)
    assert part.share < 0.05
    for own, whole in zip(part.candidate.groups, plan.groups, strict=True):
        assert own.rate == pytest.approx(whole.rate, rel=2.1 * UNEVEN)
    gpus = [c.gpus for c in (part.candidate, plan)]
    assert gpus[0] / gpus[1] == pytest.approx(part.problem.rate / problem.rate, rel=1e-3)  # a request costs the same
    lasting = part.problem.workload.requests / part.problem.rate
    assert lasting >= SPAN * plan.e2e_s * 0.99


def test_a_long_run_is_not_cut() -> None:
    problem, plan = planned(12, 8, 20_000)
    part = fleet_slice(problem, plan, 0)
    assert (part.share, part.problem, part.candidate) == (1.0, problem, plan)
    assert simulate_candidate(problem, plan, 0) == published(figures(problem, plan, run(problem, plan, 0))) | {
        "fleet_share": 1.0
    }


def test_a_slice_shows_what_the_whole_fleet_does() -> None:
    problem, plan = planned(900, 600, 4000)
    part = simulate_candidate(problem, plan, 0)
    assert part["fleet_share"] < HALF
    longer = repeated(problem.workload, 30, np.random.default_rng(1))
    whole = published(figures(problem, plan, run(replace(problem, workload=longer), plan, 1)))
    for of, key in (("tpot_s", "mean"), ("e2e_s", "mean"), ("throughput", "requests_per_s")):
        assert part[of][key] == pytest.approx(whole[of][key], rel=0.04)
    assert part["tiers"][0]["replicas"] == whole["tiers"][0]["replicas"]
    assert part["cost"]["gpus"] == whole["cost"]["gpus"] == plan.gpus
    short = published(figures(problem, plan, run(problem, plan, 1)))  # what a run did before there were slices
    assert short["tpot_s"]["mean"] < 0.9 * whole["tpot_s"]["mean"]


def test_requests_used_again() -> None:
    rng = np.random.default_rng(0)
    once = Workload(np.sort(rng.random(50)), rng.integers(1, 9, 50), rng.integers(1, 9, 50))
    thrice = repeated(once, 3, rng)
    assert thrice.rate == pytest.approx(once.rate, rel=0.02)
    assert np.sort(thrice.output).tolist() == np.sort(np.tile(once.output, 3)).tolist()
    with pytest.raises(InputError, match=r"`times` must be at least 1"):
        repeated(once, 0, rng)

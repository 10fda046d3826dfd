"""Figures of many configurations: against the exact queue one by one, and the plan against the best of all of them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.build import resolve
from planner.evaluate import (
    BINDING,
    POINTS,
    Configurations,
    Tables,
    evaluate,
    every,
    optimum,
    rules_of,
    tables,
    with_rules,
    worth,
)
from planner.evaluate import _look_up as look_up
from planner.explain import predicted
from planner.plan import silent
from planner.scenario import load_scenario
from planner.search import Candidate, Group, Search, best_of, price, quality_floor
from planner.simulate import simulation
from planner.space import P99, enumerate_space, occupancy
from theory.catalog import accelerator
from theory.cost import joules
from theory.errors import InputError
from theory.queueing import ttft_quantile

TWO_POOLS = (
    "fleet=[{accelerator: h100-sxm, gpus: 6, price_per_gpu_hour: 2.5}, "
    "{accelerator: l40s, gpus: 8, price_per_gpu_hour: 0.6}]"
)
SPACES = {
    "floor": ("search.seed=0",),
    "lambda, two pools": (TWO_POOLS, 'objective={"lambda_usd": 0.004}', "tiers.2.tp=[2, 4]", "tiers.1.tp=[2, 4]"),
    "budget, batch limits and draft lengths": (
        'objective={"budget_usd_per_1000": 0.3}',
        "tiers.0.max_num_seqs=[64, 256]",
        "tiers.1.drafts.0.draft_lengths=[auto, 2]",
        "tiers.1.tp=[2, 4]",
    ),
}


@lru_cache
def searched(*overrides: str) -> Search:
    problem = resolve(*load_scenario(overrides=["traffic.requests=1500", *overrides]))
    return Search(problem, enumerate_space(problem), quality_floor(problem))


@pytest.fixture(scope="module")
def search() -> Search:
    return searched(*SPACES["floor"])


def test_interpolation_is_within_one_percent_of_the_exact_queue(search: Search) -> None:
    """Loads between the tabulated ones, all services; the same table read at 3 % more load is farther off."""
    table = tables_of(search)
    services = [s for of_tier in search.space.services for s in of_tier]
    rng = np.random.default_rng(5)
    at = rng.integers(len(services), size=600)
    load = rng.uniform(0.01, 0.985, at.size)
    state = occupancy([services[i] for i in at], load * table.limit[at], search.space.load)
    busy = 1 - state.pi[:, 0]
    watts = [
        services[i].gpus * joules(1.0, b, services[i].deployment.accelerator) for i, b in zip(at, busy, strict=True)
    ]
    exact = np.stack([ttft_quantile(state, P99), state.tpot_s, state.e2e_s, np.array(watts)], axis=1)
    assert np.abs(look_up(table.state, at, load) / exact - 1).max() < 0.01
    wrong = look_up(table.state, at, np.minimum(1.03 * load, 0.99))
    assert np.abs(wrong / exact - 1).max() > 0.02
    assert len(table.state) == POINTS * len(services)


@given(seed=st.integers(0, 2**20))
@settings(max_examples=15, deadline=None)
def test_figures_are_those_of_the_plan_of_each_configuration(seed: int) -> None:
    """A random configuration by the vectorised route and by that of ``tierwise plan``, one candidate at a time."""
    search = searched(*SPACES["lambda, two pools"])
    rules = rules_of(search)
    rng = np.random.default_rng(seed)
    policy = int(rng.integers(len(rules)))
    rule = rules[policy]
    service, replicas = np.zeros((1, 3), dtype=np.int64), np.zeros((1, 3), dtype=np.int64)
    groups = []
    for tier, visits in zip(rule.tiers, rule.visits, strict=True):
        if visits > 1e-9:
            i, m = int(rng.integers(len(search.space.services[tier]))), int(rng.integers(1, 5))
            service[0, tier], replicas[0, tier] = i, m
            rate = search.problem.rate * float(visits) / m
            groups.append(Group(tier, search.space.services[tier][i], m, rate))
    cost = price(search.problem, groups) / search.problem.rate
    candidate = Candidate(rule, tuple(groups), cost, float("nan"))
    found = evaluate(tables_of(search), Configurations(service, replicas, np.array([policy])))
    assert found.cost[0] == pytest.approx(cost, rel=1e-12)
    assert found.fits[0] == (search.bears(candidate) and search.within_fleet(candidate))
    if not all(g.rate < 0.98 * limit(search, g) for g in groups):
        assert not found.fits[0] or np.isfinite(found.e2e_s[0])
        return
    exact = predicted(search.problem, search.space, candidate)
    for name, key in (("ttft_p99_s", "ttft_p99_s"), ("tpot_s", "tpot_mean_s"), ("e2e_s", "e2e_mean_s")):
        assert getattr(found, name)[0] == pytest.approx(exact[key], rel=0.01)


@lru_cache
def tables_of(search: Search) -> Tables:
    return tables(search, rules_of(search))


def limit(search: Search, group: Group) -> float:
    return float(occupancy([group.service], np.array([1e-9]), search.space.load).rate_limit[0])


@pytest.mark.parametrize("name", list(SPACES))
def test_the_plan_is_the_best_of_all_configurations(name: str) -> None:
    """At least 20,000 configurations: nothing the fleet has room for is better than what the enumeration finds."""
    search = searched(*SPACES[name])
    objective = search.problem.scenario.objective
    candidates = search.enumerate()
    mine = best_of(search, candidates)[0]
    mixed = [c.rule for c in candidates if 0 < c.rule.gamma < 1]
    table = with_rules(tables_of(search), [*rules_of(search), *mixed])
    best = optimum(table, objective, search.floor)
    assert best is not None
    assert best.evaluated >= 20_000
    assert 0 < best.feasible < best.evaluated
    goal = float(worth(best.figures, objective)[0])
    assert value(search, mine) == pytest.approx(goal, rel=1e-9)
    # a search that overlooks the small replicas does not find it
    blind = Search(search.problem, search.space, search.floor)
    for tier, services in enumerate(search.space.services):
        for service in (s for s in services if s.gpus < 4):
            blind.lower_capacity(Group(tier, service, 1, 1.0), 1e-9)
    found = blind.enumerate()
    assert not found or value(search, best_of(blind, found)[0]) > goal + 1e-6


def value(search: Search, candidate: Candidate) -> float:
    """Return what is to be made small."""
    objective, quality = search.problem.scenario.objective, candidate.rule.quality
    assert objective is not None
    if objective.lambda_usd is not None:
        return candidate.cost - objective.lambda_usd * quality
    return -quality if objective.budget_usd_per_1000 is not None else candidate.cost


def test_every_configuration_fits_the_fleet_once(search: Search) -> None:
    table = with_rules(tables_of(search), rules_of(search)[:9])
    seen = set()
    for some in every(table):
        found = evaluate(table, some)
        assert np.all(found.gpus <= 8)
        rows = np.concatenate([some.service, some.replicas, some.policy[:, None]], axis=1)
        assert not seen & {tuple(r) for r in rows.tolist()}
        seen |= {tuple(r) for r in rows.tolist()}
    assert len(seen) > 1000


def test_what_binds_is_named(search: Search) -> None:
    """Too few replicas: the SLO of the tier; too many GPUs: the fleet; a tier without replicas: that."""
    rules = rules_of(search)
    table = with_rules(tables_of(search), rules)
    alone = next(i for i, r in enumerate(rules) if r.tiers == (0,))
    best = int(np.argmax((search.capacities() * (table.gpus == 1))[: table.begin[1]]))
    replicas = np.array([[1, 0, 0], [99, 0, 0], [0, 0, 0]])
    service = np.zeros((3, 3), dtype=np.int64)
    service[:, 0] = best
    assert search.capacities()[best] < search.problem.rate  # one replica does not bear the load
    found = evaluate(table, Configurations(service, replicas, np.full(3, alone)), floor=0.2)
    names = [BINDING[b] for b in found.binding]
    assert names[0] in ("p99 TTFT", "mean TPOT", "stability")
    assert names[1:] == ["fleet.gpus", "unserved tier"]
    assert not found.feasible.any()
    assert np.isinf(found.e2e_s[2])
    strict = evaluate(table, Configurations(service[:1], np.array([[8, 0, 0]]), np.array([alone])), floor=0.99)
    assert (BINDING[strict.binding[0]], strict.fits[0], strict.feasible[0]) == ("quality floor", True, False)


@pytest.mark.parametrize(
    ("service", "replicas", "policy", "message"),
    [
        ([[0, 0]], [[1, 0, 0]], [0], "must have shape"),
        ([[99, 0, 0]], [[1, 0, 0]], [0], "`service` must lie in"),
        ([[0, 0, 0]], [[-1, 0, 0]], [0], "`replicas` must be at least 0"),
        ([[0, 0, 0]], [[1, 0, 0]], [9999], "`policy` must lie in"),
    ],
)
def test_refusals(
    search: Search, service: list[list[int]], replicas: list[list[int]], policy: list[int], message: str
) -> None:
    table = tables_of(search)
    with pytest.raises(InputError, match=message):
        evaluate(table, Configurations(np.array(service), np.array(replicas), np.array(policy)))


# ---------------------------------------------------------------- pools


def test_a_list_of_one_pool_is_that_pool() -> None:
    one = searched("fleet=[{accelerator: h100-sxm, gpus: 8, price_per_gpu_hour: 2.5}]")
    plain = searched(*SPACES["floor"])
    for search in (one, plain):
        assert [c.key[1] for c in search.enumerate()]
    costs = [[(c.cost, c.rule.quality) for c in s.enumerate()] for s in (one, plain)]
    assert costs[0] == costs[1]


def test_plans_keep_the_limit_of_each_pool_and_use_the_cheap_one() -> None:
    search = searched(*SPACES["lambda, two pools"])
    gpus = {p.accelerator.name: p.gpus for p in search.problem.pools}
    used = dict.fromkeys(gpus, 0)
    for candidate in search.enumerate():
        held = dict.fromkeys(gpus, 0)
        for group in candidate.groups:
            held[group.service.deployment.accelerator.name] += group.gpus
        for name, n in held.items():
            assert n <= gpus[name]
            used[name] = max(used[name], n)
        assert candidate.cost == pytest.approx(
            sum(n * {"h100-sxm": 2.5, "l40s": 0.6}[name] for name, n in held.items()) / 3600 / search.problem.rate
        )
    assert min(used.values()) > 0


def test_a_dear_pool_changes_nothing() -> None:
    """At the same stop rules; a pool is only used where it is the cheaper, or where the other is full."""
    plain = searched(*SPACES["floor"])
    dear = searched(TWO_POOLS.replace("0.6", "60.0").replace("gpus: 6", "gpus: 8"))
    for rule in rules_of(plain):
        alone, beside = plain.allocate(rule), dear.allocate(rule)
        assert beside is not None or alone is None
        if alone is not None and beside is not None:
            assert beside.cost == pytest.approx(alone.cost)


def test_batch_limits_and_fixed_draft_lengths_are_tried() -> None:
    search = searched(*SPACES["budget, batch limits and draft lengths"])
    limits = {s.deployment.limits.max_num_seqs for s in search.space.services[0]}
    assert limits == {64, 256}
    fixed = [s for s in search.space.services[1] if s.draft and set(s.schedule.tolist()) == {2}]
    assert fixed
    # a smaller batch limit bears no more, a fixed length no more than the best length at each batch size
    by_limit = {
        n: max(
            c
            for s, c in zip(search.space.services[0], search.space.capacity[0], strict=True)
            if s.deployment.limits.max_num_seqs == n and s.draft is None and s.deployment.tp == 1
        )
        for n in limits
    }
    assert by_limit[64] <= by_limit[256] * 1.001


def test_tiers_on_two_kinds_of_gpu_are_paid_and_powered_each_at_its_own() -> None:
    """Simulated: 13B on two L40S, 70B on four H100; money, energy bound and the price of each request."""
    tiers = '[{"tier": "13b", "accelerator": "l40s", "tp": 2}, {"tier": "70b", "tp": 4}]'
    scenario, folder = load_scenario(
        overrides=[
            *("traffic.requests=1500", "traffic.rate=1.5", TWO_POOLS.replace("0.6", "0.3")),
            f'deployment={{"tiers": {tiers}, "lambda_usd": 0.0015}}',
        ]
    )
    done = simulation(scenario, folder, None, 1, silent, in_detail=True)
    cost, per_s = done.result["cost"], done.result["throughput"]["requests_per_s"]
    assert cost["usd_per_1000_requests"] == pytest.approx((2 * 0.3 + 4 * 2.5) / 3.6 / per_s, rel=1e-6)
    watts = 2 * accelerator("l40s").power + 4 * accelerator("h100-sxm").power
    assert done.result["energy_j"]["per_request_at_most"] == pytest.approx(watts / per_s, rel=1e-6)
    columns = {c.name: c.values for c in done.requests[0]}
    paths = next(c for c in done.requests[0] if c.name == "path")
    small = np.array([paths.names[code] == "13b" for code in columns["path"]])
    assert 0 < small.sum() < small.size
    np.testing.assert_allclose(columns["usd"][small], columns["gpu_s"][small] * 0.3 / 3600)
    assert np.all(columns["usd"][~small] > columns["gpu_s"][~small] * 0.3 / 3600)
    assert np.all(columns["usd"][~small] <= columns["gpu_s"][~small] * 2.5 / 3600 * (1 + 1e-9))

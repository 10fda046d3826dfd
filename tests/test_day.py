"""The plan of a day: the chain of plans, what switching costs, pieces without load, agreement, resumption, files."""

from __future__ import annotations

import csv
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner import explain
from planner.build import resolve
from planner.day import Day, _shortest, periods, plan_day, sampled
from planner.day_report import day_csv
from planner.scenario import Arrivals, load_scenario
from planner.search import Search, best_of
from planner.simulate import load_seconds
from planner.space import enumerate_space
from planner.storage import Means
from simulator.workload import at_rate
from theory.errors import InfeasibleError, InputError

TWO_TIERS = """
name: small-day
fleet: {accelerator: h100-sxm, gpus: 24, price_per_gpu_hour: 2}
traffic:
  requests: 3000
  arrivals: {kind: piecewise, rates: [8, 120, 40, 0], durations_s: [3600, 1800, 3600, 3600]}
  prompt_tokens: {median: 300}
  output_tokens: {median: 60, sigma: 0.5, high: 300}
tiers:
  - {name: small, model: llama-3.1-8b, tp: [1, 2], drafts: [{model: llama-3.2-1b, acceptance: 0.7, source: assumed}]}
  - {name: large, model: llama-2-70b, tp: [2, 4]}
quality:
  outcomes: {"11": 60, "01": 25, "10": 5, "00": 10}
  signal: {kind: confidence, auroc: [0.8, 0.8], source: assumed}
  source: assumed
objective: {quality_floor: 0.8}
search: {trials: 0}
"""
SCALING = "autoscaling={provision_s: 100, loading: {bytes_per_s: 1.0e+9, source: assumed}}"


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("day") / "small-day.yaml"
    path.write_text(TWO_TIERS)
    return path


def day_of(path: Path, *settings: str) -> Day:
    scenario, folder = load_scenario(path, settings)
    problem = resolve(scenario, folder, None, 0)
    return Day(problem, enumerate_space(problem), periods(scenario.traffic.arrivals, scenario.traffic.rate), 0)


@pytest.fixture(scope="module")
def planned(scenario: Path) -> dict[str, Any]:
    return plan_day(*load_scenario(scenario, [SCALING]))


def test_pieces_keep_their_shape_at_another_mean_rate() -> None:
    law = Arrivals(kind="piecewise", rates=[1, 3], durations_s=[100, 50])
    pieces = periods(law, 10.0)
    assert [p.start_s for p in pieces] == [0, 100]
    assert sum(p.rate * p.duration_s for p in pieces) == pytest.approx(10.0 * 150)
    assert pieces[1].rate == pytest.approx(3 * pieces[0].rate)
    with pytest.raises(InputError, match=r"`traffic.arrivals.kind` must be piecewise to plan a day; got 'poisson'"):
        periods(None, 1.0)


def test_the_shortest_chain_is_the_least_of_all_chains() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 5, rng.integers(1, 5))
        worth = [rng.random(n) for n in sizes]
        steps = [rng.random((a, b)) for a, b in zip(sizes, np.roll(sizes, -1), strict=True)]
        steps = [np.where(rng.random(s.shape) < 0.2, np.inf, s) for s in steps]
        for first in range(int(sizes[0])):
            total, _ = _shortest(worth, steps, first)
            chains = itertools.product(*(range(n) for n in sizes))
            least = min(
                sum(w[i] for w, i in zip(worth, c, strict=True))
                + sum(s[i, j] for s, i, j in zip(steps, c, (*c[1:], c[0]), strict=True))
                for c in chains
                if c[0] == first
            )
            assert total == pytest.approx(least)


def test_no_chain_of_leading_plans_is_cheaper(scenario: Path) -> None:
    day = day_of(scenario, SCALING)

    def usd(plans: list[Any]) -> float:
        serving = sum(p.rate * p.duration_s * c.cost for p, c in zip(day.pieces, plans, strict=True) if c is not None)
        return float(serving + sum(day.switch(a, b).usd for a, b in zip([plans[-1], *plans[:-1]], plans, strict=True)))

    own = usd(day.plans)
    few = [(of or [None])[:4] for of in day.leading]
    assert own <= min(usd(list(plans)) for plans in itertools.product(*few)) * (1 + 1e-9)
    costly = usd([*day.plans[:1], day.leading[1][-1], *day.plans[2:]])
    assert own <= costly


def test_without_switching_costs_every_piece_has_its_own_best_plan(scenario: Path) -> None:
    day = day_of(scenario)
    for plan, problem in zip(day.plans, day.problems, strict=True):
        if plan is None or problem is None:
            continue
        search = Search(problem, day.space, day.floor)
        assert plan.cost == pytest.approx(best_of(search, search.enumerate())[0].cost)


def test_a_replica_is_paid_from_the_beginning_of_its_lead(scenario: Path) -> None:
    day = day_of(scenario, SCALING)
    low, high = day.plans[0], day.plans[1]
    switch = day.switch(low, high)
    before = {id(g.service): g.replicas for g in low.groups} if low else {}
    more = [(g, max(g.replicas - before.get(id(g.service), 0), 0)) for g in (high.groups if high else ())]
    assert switch.started == sum(n * g.service.gpus for g, n in more)
    scaling = day.problem.scenario.autoscaling
    assert scaling is not None
    leads = [100 + load_seconds(g.service, scaling.loading) for g, _ in more]
    assert switch.usd == pytest.approx(
        sum(n * g.service.gpus * 2 / 3600 * s for (g, n), s in zip(more, leads, strict=True))
    )
    assert day.switch(high, high).usd == 0
    assert day.switch(None, None).held == 0


def test_pieces_without_requests_hold_no_gpus(planned: dict[str, Any]) -> None:
    rows = planned["periods"]
    assert [r["gpus"] > 0 for r in rows] == [True, True, True, False]
    assert rows[0]["started_gpus"] == rows[0]["gpus"]  # the day begins again after the quiet piece
    assert planned["day"]["least_gpus"] == 0
    assert planned["day"]["peak_gpus"] == rows[1]["gpus"] == planned["static"]["gpus"]


def test_the_day_adds_up(planned: dict[str, Any]) -> None:
    rows, total = planned["periods"], planned["day"]
    usd = sum(r["gpus"] * 2 * r["duration_s"] / 3600 + r["switching_usd"] for r in rows)
    assert total["usd"] == pytest.approx(usd)
    assert planned["static"]["usd"] == pytest.approx(rows[1]["gpus"] * 2 * 12_600 / 3600, rel=1e-9)
    assert planned["saved"] == pytest.approx(1 - total["usd"] / planned["static"]["usd"])
    assert total["requests"] == pytest.approx(8 * 3600 + 120 * 1800 + 40 * 3600)
    assert all(r["quality"] >= 0.8 - 1e-6 for r in rows if r["gpus"])


def test_simulated_pieces_are_as_predicted_and_a_heavier_load_is_not(scenario: Path, planned: dict[str, Any]) -> None:
    assert len(planned["checked"]) == 3
    for c in planned["checked"]:
        low, high = c["tpot_mean_s"]["predicted_interval"]
        assert low <= c["tpot_mean_s"]["simulated"] <= high
        assert c["usd_per_1000_requests"]["simulated"] == pytest.approx(
            c["usd_per_1000_requests"]["predicted"], rel=0.05
        )
    day = day_of(scenario, SCALING)
    plan, problem = day.plans[1], day.problems[1]
    assert plan is not None
    assert problem is not None
    half = replace(plan, groups=tuple(replace(g, rate=g.rate / 2) for g in plan.groups))
    low, high = explain.predicted(replace(problem, workload=at_rate(problem.workload, 60.0)), day.space, half)[
        "tpot_interval_s"
    ]
    peak = next(c for c in planned["checked"] if c["requests_per_s"] == 120)
    assert not low <= peak["tpot_mean_s"]["simulated"] <= high


def test_an_hour_that_does_not_fit_is_named(scenario: Path) -> None:
    with pytest.raises(InfeasibleError, match=r"from 01:00 on, .*The nearest plan has fleet.gpus"):
        day_of(scenario, "fleet.gpus=4", "traffic.arrivals.rates=[1, 900, 1, 1]")


def test_the_sample_has_the_least_and_the_greatest_rate() -> None:
    assert sampled([3.0, 1.0, 2.0], 2) == [1, 0]
    assert sampled([3.0, 0.0], 4) == [0]


def test_an_interrupted_day_goes_on(scenario: Path, tmp_path: Path, planned: dict[str, Any]) -> None:
    done: list[str] = []

    def stopped(what: str, at: int, of: int) -> None:
        if what == "simulating" and at == 1:
            raise KeyboardInterrupt

    def counted(what: str, at: int, of: int) -> None:
        done.append(what)

    asked, folder = load_scenario(scenario, [SCALING])
    store = str(tmp_path / "day.journal")
    with pytest.raises(KeyboardInterrupt):
        plan_day(asked, folder, progress=stopped, means=Means(storage=store))
    kept = (tmp_path / "day.journal").read_bytes()
    again = plan_day(asked, folder, progress=counted, means=Means(storage=store, resume=True))
    assert {**again, "wall_s": 0} == {**planned, "wall_s": 0}
    assert (tmp_path / "day.journal").read_bytes().startswith(kept)  # nothing finished was done again


def test_table_and_picture(planned: dict[str, Any]) -> None:
    rows = list(csv.DictReader(day_csv(planned).splitlines()))
    assert [float(r["requests_per_s"]) for r in rows] == [8, 120, 40, 0]
    assert math.isclose(float(rows[1]["usd_per_hour"]), planned["periods"][1]["usd_per_hour"])


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tierwise", *args], capture_output=True, text=True, timeout=300)


def test_command_line(scenario: Path, tmp_path: Path, planned: dict[str, Any]) -> None:
    out = tmp_path / "out"
    done = run("plan", str(scenario), "--day", "--set", SCALING, "--output", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {f.name for f in out.iterdir()} == {
        "report.html",
        "day.json",
        "day.csv",
        "day.png",
        "day.svg",
        "scenario.yaml",
    }
    assert "01:00" in done.stdout
    told = json.loads((out / "day.json").read_text())
    assert told == json.loads(json.dumps({k: v for k, v in planned.items() if k != "wall_s"}))
    assert plan_day(*load_scenario(out / "scenario.yaml"))["day"] == planned["day"]


def test_other_arrivals_leave_with_2_and_one_line() -> None:
    done = run("plan", "--day")
    assert (done.returncode, done.stdout) == (2, "")
    assert "must be piecewise to plan a day" in done.stderr
    assert len(done.stderr.splitlines()) == 1

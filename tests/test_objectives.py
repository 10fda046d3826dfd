"""Several objectives: the Pareto set against exhaustion by another route, and a search that is repeatable and kept."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from planner.build import resolve
from planner.evaluate import evaluate, every
from planner.frontier import non_dominated
from planner.objectives import (
    OBJECTIVES,
    Field,
    covered,
    exhaustive,
    pareto_plans,
    parse_objectives,
    searched_field,
    values_of,
)
from planner.scenario import Scenario, load_scenario
from planner.search import Search, quality_floor
from planner.simulate import HEADROOM
from planner.space import enumerate_space
from planner.storage import Means
from theory.errors import InfeasibleError, InputError

SMALL = [
    "traffic.requests=1500",
    "tiers.0.tp=[2]",
    "tiers.1.tp=[2]",
    "tiers.2.tp=[2, 4]",
    "tiers.0.drafts=[]",
    "quality.signal.levels=3",
    "search.trials=8",
    "objective={quality_floor: 0.7}",
]
NAMES = tuple(OBJECTIVES)


def scenario() -> tuple[Scenario, Path]:
    return load_scenario(overrides=SMALL)


@lru_cache
def field() -> Field:
    problem = resolve(*scenario())
    space = enumerate_space(problem)
    careful = replace(space, capacity=tuple(HEADROOM * c for c in space.capacity))
    return searched_field(Search(problem, careful, quality_floor(problem)), NAMES)


@given(hnp.arrays(float, st.tuples(st.integers(1, 40), st.integers(2, 4)), elements=st.integers(0, 6)))
@settings(max_examples=100, deadline=None)
def test_the_set_is_what_no_other_row_dominates(values: np.ndarray) -> None:
    kept = {tuple(values[i]) for i in non_dominated(values)}
    dominated = ((values[:, None] <= values[None]).all(axis=2) & (values[:, None] < values[None]).any(axis=2)).any(
        axis=0
    )
    assert kept == {tuple(v) for v in values[~dominated]}
    assert len(non_dominated(values)) == len(kept)


def test_all_configurations_give_the_exact_set() -> None:
    """Every feasible configuration at once, compared pair by pair."""
    found = exhaustive(field())
    assert found is not None
    parts = [evaluate(field().table, c, field().objective, field().floor) for c in every(field().table)]
    values = np.concatenate([values_of(f, NAMES)[f.feasible] for f in parts])
    assert found.feasible == len(values) > 100
    for value in values[:: max(1, len(values) // 500)]:
        assert (found.values <= value).all(axis=1).any()
    for value in found.values:
        assert not ((values <= value).all(axis=1) & (values < value).any(axis=1)).any()


def test_the_search_comes_near_the_exact_set_and_never_beyond() -> None:
    """Eighty trials, the enumerated plans first; the same set with its better half taken away is told apart."""
    exact = exhaustive(field())
    assert exact is not None
    found = pareto_plans(*scenario(), NAMES, exhaust=0)
    rows = found["pareto"]
    assert found["search"]["method"] == "optuna"
    signs = np.array([-1.0 if n == "quality" else 1.0 for n in NAMES]) * np.array([1e-3, 1.0, 1.0, 1.0])
    values = np.array([[r[OBJECTIVES[n]] for n in NAMES] for r in rows]) * signs
    for value in values:
        assert not (value < exact.values - 1e-9).all(axis=1).any()
    rng = np.random.default_rng(0)
    share = covered(values, exact.values, rng)
    assert 0.9 < share <= 1
    half = exact.values[exact.values[:, 2] > np.median(exact.values[:, 2])]
    assert covered(half, exact.values, rng) < 0.9 * share


def test_four_workers_and_an_interrupted_search_give_the_same_set(tmp_path: Path) -> None:
    whole = pareto_plans(*scenario(), NAMES, exhaust=0)
    assert pareto_plans(*scenario(), NAMES, means=Means(workers=4), exhaust=0) == whole
    journal = str(tmp_path / "set.journal")

    def stop(what: str, done: int, of: int) -> None:
        if what == "searching" and done == 19:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pareto_plans(*scenario(), NAMES, progress=stop, means=Means(journal), exhaust=0)
    assert Path(journal).read_bytes().count(b'"op_code":4') == 19
    assert pareto_plans(*scenario(), NAMES, means=Means(journal, resume=True), exhaust=0) == whole


def test_names_are_checked() -> None:
    assert parse_objectives("energy,cost") == ("energy", "cost")
    for text, said in (
        ("cost,speed", "must be of cost, quality, latency, energy"),
        ("cost", "must be two or more"),
        ("cost,cost", "each once"),
    ):
        with pytest.raises(InputError, match=said):
            parse_objectives(text)


def test_nothing_feasible_says_so() -> None:
    with pytest.raises(InfeasibleError, match="no configuration keeps"):
        pareto_plans(*load_scenario(overrides=[*SMALL, "objective={budget_usd_per_1000: 0.0001}"]), NAMES)


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tierwise", "plan", "--objectives", "cost,quality,latency", "--format", "json"]
    for setting in SMALL:
        command += ["--set", setting]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=300, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["search"]["method"] == "exhaustive"
    assert {r["key"] for r in result["objectives"]} == {"usd_per_1000_requests", "quality", "e2e_mean_s"}
    assert {n for r in result["pareto"] for n in r["best_in"]} == {"cost", "quality", "latency"}
    assert all(r["simulated"]["keeps_slos"] in (True, False) for r in result["pareto"] if r["best_in"])
    assert {f.name for f in tmp_path.iterdir()} == {"pareto.json", "pareto.csv", "pareto.png", "pareto.svg"}
    with (tmp_path / "pareto.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(result["pareto"])
    refused = subprocess.run([*command[:5], "cost"], capture_output=True, text=True, timeout=60, check=False)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)

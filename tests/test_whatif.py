"""What-if without a browser: its answers against the planner's, links, messages at fields, charts in both drawings."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner import explain
from planner.build import resolve
from planner.scenario import load_scenario, shipped_scenarios
from planner.simulate import analytic_candidate
from planner.whatif import Planner, lambdas, plan_json
from planner.whatif_charts import Chart, Stack, charts, rate_limits, simulate_at
from theory.errors import InfeasibleError, InputError
from tierwise.whatif_draw import options, picture, ticks
from tierwise.whatif_state import State, field_of, fields, of_query, opened, uploaded
from tierwise.whatif_state import settings as settings_of

SMALL = ["traffic.requests=3000"]
MOVES = (
    [],
    ["traffic.rate=7"],
    ["fleet.price_per_gpu_hour=3.3"],
    ["fleet.gpus=6"],
    ["slo.ttft_p99_s=0.6", "slo.tpot_mean_s=0.03"],
    ["objective={lambda_usd: 0.004}"],
    ["objective={budget_usd_per_1000: 0.4}"],
    ["objective={quality_floor: 0.82}", "tiers.0.draft=none"],
    ["tiers.2.draft=llama-2-7b", "tiers.2.drafts.1.draft_lengths=[2]"],
    ["tiers.1.drafts.0.draft_lengths=[1, auto, 6]"],
    ["traffic.output_tokens.median=120"],
    ["fleet.accelerator=h200-sxm", "traffic.arrivals={kind: gamma, cv: 2}"],
)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner()


@pytest.mark.parametrize("move", MOVES, ids=lambda m: ",".join(m) or "as shipped")
def test_an_answer_is_the_analytic_plan_found_afresh(planner: Planner, move: list[str]) -> None:
    """What was kept from other moves changes nothing: the plan and every figure of it to rounding."""
    scenario, folder = load_scenario(overrides=[*SMALL, *move])
    answer = planner.answer(scenario, folder)
    problem = resolve(scenario, folder)
    fresh = analytic_candidate(problem)
    assert [(g.tier, g.service.name, g.replicas) for g in answer.chosen.groups] == [
        (g.tier, g.service.name, g.replicas) for g in fresh.groups
    ]
    assert answer.chosen.cost == pytest.approx(fresh.cost, rel=1e-12)
    assert answer.chosen.rule.quality == pytest.approx(fresh.rule.quality, rel=1e-12)
    own, other = (explain.point(p, answer.space, c) for p, c in ((answer.problem, answer.chosen), (problem, fresh)))
    for mine, theirs in zip([own, *own.pop("tiers")], [other, *other.pop("tiers")], strict=True):
        for key, value in mine.items():
            assert value == (pytest.approx(theirs[key], rel=1e-9) if isinstance(value, float) else theirs[key]), key


def test_the_same_answer_twice_and_another_for_another_load(planner: Planner) -> None:
    """The negative control of the test above: a load that was not asked for gives other figures."""
    scenario, folder = load_scenario(overrides=SMALL)
    first, again = planner.answer(scenario, folder), planner.answer(scenario, folder)
    assert first.chosen.cost == again.chosen.cost
    other = planner.answer(load_scenario(overrides=[*SMALL, "traffic.rate=5"])[0], folder)
    assert other.chosen.cost != pytest.approx(first.chosen.cost, rel=1e-3)


def test_intervals_and_plan_are_those_of_the_planner(planner: Planner) -> None:
    scenario, folder = load_scenario(overrides=SMALL)
    answer = planner.answer(scenario, folder)
    confidence = planner.confidence(answer, folder)
    assert confidence.predicted == explain.predicted(answer.problem, answer.space, answer.chosen)
    exported = json.loads(json.dumps(plan_json(answer, confidence), allow_nan=False))
    assert set(exported) >= {"scenario", "feasible", "plan", "predicted", "simulated", "frontier", "lambda", "binding"}
    assert exported["lambda"]["interval"] == pytest.approx(list(lambdas(answer) or ()))
    assert exported["predicted"]["gpus"] == sum(t["gpus"] for t in exported["plan"]["tiers"]) == answer.chosen.gpus
    assert exported["binding"]["used"] <= 0.9 + 1e-9


def test_a_tier_told_its_draft_uses_it_and_one_told_none_does_not(planner: Planner) -> None:
    only_top = ["objective={quality_floor: null, lambda_usd: 1.0}"]
    for draft in ("none", "tinyllama-1.1b", "llama-2-7b"):
        scenario, folder = load_scenario(overrides=[*SMALL, *only_top, f"tiers.2.draft={draft}"])
        of_top = [g for g in planner.answer(scenario, folder).chosen.groups if g.tier == 2]
        assert [g.service.draft.model.name if g.service.draft else "none" for g in of_top] == [draft]
    with pytest.raises(InputError, match=r"`draft` must be one of auto, none, tinyllama-1.1b, llama-2-7b; got 'x'"):
        load_scenario(overrides=["tiers.2.draft=x"])


def test_what_cannot_be_is_said_with_the_nearest_plan(planner: Planner) -> None:
    for move, said in (
        ("traffic.rate=500", "The nearest plan has fleet.gpus"),
        ("slo.ttft_p99_s=0.001", "The nearest plan has ttft_p99_s"),
        ("objective={budget_usd_per_1000: 0.01}", "The nearest plan costs"),
        ("objective={quality_floor: 0.99}", "The nearest plan has quality"),
    ):
        with pytest.raises(InfeasibleError, match=said):
            planner.answer(*load_scenario(overrides=[*SMALL, move]))


# --- charts ----------------------------------------------------------------------------------------------------------


def test_charts_say_what_the_answer_says_and_can_be_drawn(planner: Planner) -> None:
    scenario, folder = load_scenario(overrides=SMALL)
    answer = planner.answer(scenario, folder)
    confidence = planner.confidence(answer, folder)
    run = simulate_at(answer.problem, answer.chosen, answer.problem.rate)
    drawn = dict(charts(answer, confidence, (run,)))
    frontier, load, stops, step = (drawn[name] for name in ("frontier", "load", "stops", "step"))
    assert isinstance(frontier, Chart)
    chosen = next(s for s in frontier.panels[0].series if s.name == "this plan")
    assert (chosen.x, chosen.y) == ((1000 * answer.chosen.cost,), (answer.chosen.rule.quality,))
    assert isinstance(load, Chart)
    now, slo = (x for _, x in load.marks)
    assert now == answer.problem.rate <= 0.9 * slo + 1e-9
    assert slo <= rate_limits(answer)[0]
    cost = load.panels[0].series[0]
    assert np.interp(now, cost.x, cost.y) == pytest.approx(1000 * answer.chosen.cost, rel=0.01)
    gains = [s for s in load.panels[2].series if s.shape == "line"]
    assert all(s.y[0] > 1 for s in gains)
    assert isinstance(stops, Stack)
    assert sum(dict(stops.parts)["answered here"]) == pytest.approx(100)
    assert [sum(values[i] for _, values in stops.parts) for i in range(len(stops.categories))] == pytest.approx(
        [100] * len(stops.categories)
    )
    assert isinstance(step, Stack)
    for name, chart in drawn.items():
        json.dumps(options(chart), allow_nan=False)
        assert picture(chart, "svg", "title").startswith(b"<?xml"), name
    assert picture(drawn["load"], "png", "title").startswith(b"\x89PNG")


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
@example(0.0, 5e-324)
@example(1e6, 1e-5)
@settings(max_examples=60, deadline=None)
def test_ticks_are_few_round_and_hold_the_range(low: float, span: float) -> None:
    step, first, last = ticks(low, low + span)
    assert first <= low + 1e-6 * step
    assert last >= low + span - 1e-6 * step
    assert 1 <= round((last - first) / step) <= 7


# --- state -----------------------------------------------------------------------------------------------------------


def test_a_link_opens_the_same_state() -> None:
    start = opened(None)
    state = start.move("traffic.rate", "7").move("tiers.0.draft", "none").move("traffic.rate", "8.5")
    from urllib.parse import parse_qsl

    assert of_query(parse_qsl(state.query()), start) == state
    assert state.scenario().traffic.rate == 8.5
    text = start.text.replace("name: 13b", "name: own-13b")
    own = uploaded("own.yaml", text.encode(), start.folder).move("fleet.gpus", "4")
    assert of_query(parse_qsl(own.query()), start) == own
    assert start.name in shipped_scenarios()
    assert "--set traffic.rate=8.5" in state.command()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ([("scenario", "../../etc/passwd")], "`scenario` must be a shipped name"),
        ([("yaml", "x")], "`yaml` must be a scenario as a link carries it"),
        ([("set", "rate")], "`set` must have the form a.b=value"),
    ],
)
def test_a_broken_link_is_refused(query: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        of_query(query, opened(None))


def test_every_field_moves_its_own_setting_and_takes_the_command_lines_message() -> None:
    state = opened(None)
    scenario = state.scenario()
    paths = [f.path for f in fields(scenario)]
    assert len(set(paths)) == len(paths)
    for field in fields(scenario):
        moved = state
        for path, value in settings_of(field, field.value, scenario):
            moved = moved.move(path, value)
        assert moved.scenario().model_dump() == scenario.model_dump(), field.path
    for path, value in (("traffic.rate", "-3"), ("fleet.gpus", "abc"), ("slo.tpot_mean_s", "0")):
        with pytest.raises(InputError) as here:
            state.move(path, value).scenario()
        with pytest.raises(InputError) as there:
            load_scenario(overrides=[f"{path}={value}"])
        assert str(here.value) == str(there.value)
        assert field_of(str(here.value), paths) == path


def test_a_file_that_is_no_scenario_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be UTF-8 text"):
        uploaded("a.yaml", b"\xff\xfe\x00", tmp_path)
    with pytest.raises(InputError, match="must be valid YAML"):
        State("a.yaml", "a: [", tmp_path).scenario()


# --- command line ----------------------------------------------------------------------------------------------------


def _refused(arguments: list[str], code: str = "from tierwise.cli import main; main()") -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, "whatif", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    return done.stderr


def test_a_port_that_is_taken_and_a_missing_library_are_said_in_one_line() -> None:
    pytest.importorskip("nicegui", reason="the what-if page needs NiceGUI: pip install 'tierwise[web]'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = _refused(["--no-browser", "--port", str(taken.getsockname()[1])])
    assert "`port` must be free on 127.0.0.1" in said
    assert "try --port" in said
    assert "`scenario` must be a YAML file or a shipped name" in _refused(["--no-browser", "nothing.yaml"])
    without = "import sys; sys.modules['nicegui'] = None; from tierwise.cli import main; main()"
    assert "pip install 'tierwise[web]'" in _refused(["--no-browser"], without)

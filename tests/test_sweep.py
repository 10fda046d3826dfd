"""Sweeps: axes, the grid, rows of infeasible points, finished points kept, files, refusals."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import planner.sweep as sweeping
from planner.plan import plan_scenario
from planner.scenario import load_scenario
from planner.sweep import grid, notes, parse_axis, sweep, sweep_csv
from theory.errors import InputError
from tierwise.figures import picture
from tierwise.figures.sweep import pictures

ONE_TIER = """
name: one
fleet: {accelerator: h100-sxm, gpus: 2, price_per_gpu_hour: 2}
traffic:
  rate: 4
  requests: 1500
  prompt_tokens: {median: 300}
  output_tokens: {median: 60}
tiers:
  - {name: small, model: llama-3.1-8b, tp: [1, 2], drafts: [{model: llama-3.2-1b, acceptance: 0.7, source: assumed}]}
objective: {budget_usd_per_1000: 10}
search: {trials: 0}
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    (tmp_path / "one.yaml").write_text(ONE_TIER)
    return tmp_path / "one.yaml"


def silent(what: str, done: int, of: int) -> None: ...


def test_axes() -> None:
    assert parse_axis("traffic.rate=1:64:log4").values == ("1", "4", "16", "64")
    assert parse_axis("fleet.gpus=2:8:lin4").values == ("2", "4", "6", "8")
    assert parse_axis("gpu = h100-sxm , h200-sxm") == sweeping.Axis("fleet.accelerator", ("h100-sxm", "h200-sxm"))
    assert parse_axis("rate=1:3:log10").values[-1] == "3"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("traffic.rate", "must have the form KEY=VALUES"),
        ("traffic.rate=", "must have the form KEY=VALUES"),
        ("=1,2", "must have the form KEY=VALUES"),
        ("rate=1:64", "must give a range as a:b:logN or a:b:linN"),
        ("rate=1:64:ten", "must give a range as a:b:logN"),
        ("rate=a:b:log3", "must have numbers for a and b"),
        ("rate=1:inf:lin3", "must have finite bounds"),
        ("rate=1:64:log1", "must have at least 2 points"),
        ("rate=64:1:log3", "must rise from a to b"),
        ("rate=0:64:log3", "must have bounds above 0"),
        ("rate=1,,2", "must give a value between commas"),
        ("rate=1,1", "must give each value once"),
    ],
)
def test_malformed_axes_are_refused(text: str, rule: str) -> None:
    with pytest.raises(InputError, match=f"`--sweep` {rule}"):
        parse_axis(text)


def test_grid_is_checked_before_anything_is_planned(scenario: Path) -> None:
    points = grid([parse_axis("rate=1,2"), parse_axis("gpu=h100-sxm,h200-sxm")], scenario)
    assert [p.settings for p in points][1] == (("traffic.rate", "1"), ("fleet.accelerator", "h200-sxm"))
    assert points[2].scenario.traffic.rate == 2
    with pytest.raises(InputError, match=r"`traffic.rat` must be a known key.*Did you mean `rate`"):
        grid([parse_axis("traffic.rat=1,2")], scenario)
    with pytest.raises(InputError, match=r"`traffic.rate` must be greater than 0"):
        grid([parse_axis("rate=0,2")], scenario)
    with pytest.raises(InputError, match=r"must name each key once"):
        grid([parse_axis("rate=1,2"), parse_axis("traffic.rate=3,4")], scenario)


def test_kinds_of_gpu_with_their_prices(scenario: Path) -> None:
    short, priced = (grid([parse_axis(axis)], scenario) for axis in ("gpu=h100-sxm,h200", "gpu=h100-sxm@2.5,h200@3.6"))
    assert [p.settings[0][1] for p in short] == ["h100-sxm", "h200-sxm"]
    assert [p.scenario.pools[0].price_per_gpu_hour for p in short] == [2, 2]
    assert [p.scenario.pools[0].price_per_gpu_hour for p in priced] == [2.5, 3.6]
    assert [p.settings for p in priced] == [p.settings for p in short]
    assert sweeping._mark(short[0], None) != sweeping._mark(priced[0], None)
    with pytest.raises(
        InputError, match=r"`accelerator` must be a name of the catalog \(nearest: h100-sxm, h100-pcie\)"
    ):
        grid([parse_axis("gpu=h100")], scenario)
    with pytest.raises(InputError, match=r"`fleet.price_per_gpu_hour` must be greater than 0"):
        grid([parse_axis("gpu=h200@0")], scenario)
    with pytest.raises(InputError, match=r"must give prices with the GPUs or as fleet.price_per_gpu_hour, not both"):
        grid([parse_axis("gpu=h200@3"), parse_axis("price=1,2")], scenario)


def test_what_a_sweep_over_gpus_assumes_is_said() -> None:
    def row(kind: str, rate: float, gpus: int, price: float) -> dict[str, Any]:
        settings = {"traffic.rate": rate, "fleet.accelerator": kind}
        return {"settings": settings, "feasible": True, "gpus": gpus, "price_per_gpu_hour": price}

    same = notes([row("a", 1, 4, 2.0), row("b", 1, 2, 2.0), row("a", 8, 6, 2.0), row("b", 8, 4, 2.0)])
    assert "Every kind of GPU is taken at 2 USD/h" in same[0]
    assert "when b is 3 to 4, depending on the point, USD/h" in same[1]
    assert len(notes([row("a", 1, 4, 2.0), row("b", 1, 2, 3.0)])) == 1
    assert notes([{"settings": {"traffic.rate": 1}, "feasible": True, "gpus": 1, "price_per_gpu_hour": 2.0}]) == []


def test_a_point_is_what_the_plan_of_its_settings_is(scenario: Path) -> None:
    (row,), _ = sweep(grid([parse_axis("rate=8")], scenario), None, silent)
    result = plan_scenario(*load_scenario(scenario, ["traffic.rate=8"]))
    assert row["usd_per_1000_requests"] == result["predicted"]["usd_per_1000_requests"]
    assert row["gpus"] == result["plan"]["gpus"]
    assert row["ttft_p99_s"] == result["simulated"]["ttft_s"]["p99"]


def test_infeasible_points_are_rows(scenario: Path) -> None:
    rows, _ = sweep(grid([parse_axis("rate=4,4000")], scenario), None, silent)
    assert [r["feasible"] for r in rows] == [True, False]
    assert "nearest plan" in rows[1]["reason"]
    table = list(csv.DictReader(sweep_csv(rows).splitlines()))
    assert [r["feasible"] for r in table] == ["True", "False"]
    assert table[1]["gpus"] == ""


def test_finished_points_survive_an_interruption(scenario: Path, tmp_path: Path) -> None:
    points = grid([parse_axis("rate=2,4")], scenario)

    def stopped(what: str, done: int, of: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(points, None, stopped, tmp_path)
    kept = tmp_path / "sweep.jsonl"
    (first,) = kept.read_text().splitlines()
    kept.write_text(kept.read_text() + '{"mark": "cut of')  # killed while writing
    rows, reused = sweep(points, None, silent, tmp_path)
    assert reused == 1
    assert len(kept.read_text().splitlines()) == 2
    assert rows[0] == json.loads(first)["row"]
    assert [r["settings"]["traffic.rate"] for r in rows] == [2, 4]


def test_another_seed_or_scenario_is_another_point(scenario: Path) -> None:
    (point,), (other,) = (grid([parse_axis("rate=2")], scenario, s) for s in ([], ["slo.ttft_p99_s=0.9"]))
    assert len({sweeping._mark(point, None), sweeping._mark(point, 1), sweeping._mark(other, None)}) == 3


def test_lists_and_names_as_values_are_drawn(scenario: Path) -> None:
    rows, _ = sweep(grid([parse_axis("tiers.0.tp=[1],[2]")], scenario), None, silent)
    assert [r["settings"]["tiers.0.tp"] for r in rows] == ["[1]", "[2]"]
    nothing = [{"settings": {"a": 1}, "feasible": False, "reason": "none", "price_per_gpu_hour": 2.0}]
    for points in (rows, nothing):
        drawn = picture.files(pictures({"scenario": "one", "points": points}))
        assert drawn["sweep.png"].startswith(b"\x89PNG")
        assert set(drawn) == {"sweep.png", "sweep.svg"}


def test_a_strange_file_is_refused(scenario: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match=r"must hold the points of a sweep"):
        sweep(grid([parse_axis("rate=2")], scenario), None, silent, tmp_path)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tierwise", *args], capture_output=True, text=True, timeout=300)


def test_command_line(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["plan", str(scenario), "--sweep", "rate=2,400", "--sweep", "gpu=h100-sxm,h200-sxm", "--output", str(out)]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "traffic.rate" in done.stdout
    assert "none: " in done.stdout
    assert {f.name for f in out.iterdir()} == {"sweep.csv", "sweep.json", "sweep.jsonl", "sweep.png", "sweep.svg"}
    again = run(*command, "--format", "json")
    assert "4 of 4 points were in" in again.stderr
    told: dict[str, Any] = json.loads(again.stdout)
    assert told == json.loads((out / "sweep.json").read_text())
    assert [p["feasible"] for p in told["points"]] == [True, True, False, False]


def test_points_survive_a_kill(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "tierwise",
        "plan",
        str(scenario),
        "--sweep",
        "rate=2,4,8",
        "--output",
        str(out),
    ]
    begun = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kept, limit = out / "sweep.jsonl", time.monotonic() + 200
    while time.monotonic() < limit and begun.poll() is None and not (kept.exists() and kept.read_bytes().count(b"\n")):
        time.sleep(0.02)
    begun.kill()
    begun.wait()
    first = kept.read_text()
    done = run(*command[3:])
    assert done.returncode == 0, done.stderr
    assert f"{first.count(chr(10))} of 3 points were in" in done.stderr
    assert kept.read_text().startswith(first[: first.rfind("\n") + 1])
    assert len(json.loads((out / "sweep.json").read_text())["points"]) == 3


def test_a_bad_sweep_leaves_with_2_and_one_line(scenario: Path) -> None:
    done = run("plan", str(scenario), "--sweep", "rate=1:64")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "`--sweep` must give a range" in done.stderr

"""`tierwise simulate`: every metric with its interval, replications on any number of workers, files, overload."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import figures as fg
from planner import timeline as tl
from planner.build import resolve
from planner.replications import replicate, seeds
from planner.report import write_simulation
from planner.requests import Column, write_rows
from planner.scenario import load_scenario
from planner.simulate import Simulation, analytic_candidate, deployed, run, simulation
from simulator.workload import Workload
from theory.errors import InputError
from tierwise.figures import picture
from tierwise.figures.simulation import pictures

ONE_TIER = "deployment.tiers=[{tier: 70b, tp: 8, draft: tinyllama-1.1b, draft_length: 3}]"
CASCADE = "deployment={lambda_usd: 0.001, tiers: [{tier: 13b, tp: 2}, {tier: 70b, tp: 4, draft: tinyllama-1.1b}]}"
FILES = ["report.html", "requests.csv", "simulate.json", "timeseries.png", "timeseries.svg"]


def silent(what: str, done: int, of: int) -> None: ...


def simulated(*overrides: str, replications: int = 1, workers: int = 1, detail: bool = False) -> Simulation:
    scenario, folder = load_scenario(overrides=overrides)
    return simulation(scenario, folder, None, None, silent, replications, workers, in_detail=detail)


def command(*args: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "tierwise", "simulate", *args]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def cascade() -> Simulation:
    return simulated("traffic.requests=6000", "traffic.rate=8", CASCADE, detail=True)


@pytest.fixture(scope="module")
def overloaded() -> Simulation:
    return simulated("traffic.requests=2500", "traffic.rate=60", ONE_TIER, detail=True)


# ---------------------------------------------------------------------------------------------------------------------
# What is reported
# ---------------------------------------------------------------------------------------------------------------------


def test_every_metric_is_there_with_an_interval_about_it(cascade: Simulation) -> None:
    result = cascade.result
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for name in ("ttft_s", "tpot_s", "e2e_s", "answer_ttft_s", "user_speed_tokens_per_s"):
        for of, around in (("mean", "interval"), *((p, f"{p}_interval") for p in ("p50", "p90", "p95", "p99"))):
            within(result[name], of, around)
    for branch, names in {
        "throughput": ("requests_per_s", "output_tokens_per_s", "per_gpu", "per_user"),
        "goodput": ("requests_per_s",),
        "cost": (
            *("usd_per_1000_requests", "usd_per_correct_answer", "usd_per_million_output_tokens"),
            *("gpu_s_per_request", "gpu_s_held_per_request"),
        ),
        "energy_j": ("per_request", "per_request_at_least", "per_request_at_most", "per_output_token", "watts_per_gpu"),
    }.items():
        for name in names:
            within(result[branch], name, f"{name}_interval")
    within(result["goodput"], "fraction", "interval")
    for name in ("quality", "in_system", "utilisation"):
        within(result[name], "mean", "interval")
    for name in ("rounds_per_request", "preemptions_per_request"):
        within(result, name, f"{name}_interval")
    for tier in result["tiers"]:
        for name in (
            *("share", "stop_fraction", "requests_per_s", "output_tokens_per_s", "mean_batch", "mean_waiting"),
            *("utilisation", "rounds_per_request", "tokens_per_round", "preemptions_per_request", "gpu_s_per_request"),
            *(("acceptance",) if tier["name"] == "70b" else ()),
        ):
            within(tier, name, f"{name}_interval")
        within(tier["ttft_s"], "p95", "p95_interval")
        assert 0 < tier["kv_peak"] <= 1
    assert result["tiers"][0]["acceptance"] is None  # no draft there
    assert result["intervals"] == {"level": 0.95, "method": "batch means of one run", "replications": 1}
    assert "never emptied" in result["rules"]["status"]
    assert "3 mean E2E" in result["rules"]["warmup"]
    assert "assumed" in result["energy_j"]["provenance"]


def within(branch: dict[str, Any], value: str, interval: str) -> None:
    low, high = branch[interval]
    assert (-math.inf if low is None else low) <= branch[value] <= (math.inf if high is None else high), value


def test_stop_fractions_add_up_and_shares_follow_from_them(cascade: Simulation) -> None:
    """Who does not stop at the first tier visits the second, where all stop."""
    first, second = cascade.result["tiers"]
    assert first["stop_fraction"] + second["stop_fraction"] == pytest.approx(1.0)
    assert first["share"] == 1.0
    assert second["share"] >= second["stop_fraction"]  # a recalled answer was visited for too
    assert 0.2 < second["stop_fraction"] < 0.98


def test_littles_law_for_the_whole_system(cascade: Simulation) -> None:
    """Requests inside = rate x time to the final answer, across tiers; not rate x TTFT."""
    result = cascade.result
    low, high = result["in_system"]["interval"]
    rate = result["throughput"]["requests_per_s"]
    assert low <= rate * result["e2e_s"]["mean"] <= high
    assert not low <= rate * result["answer_ttft_s"]["mean"] <= high


def test_littles_law_at_each_tier(cascade: Simulation) -> None:
    """Mean batch of a tier = visits per second x (output - 1) x TPOT, by tokens."""
    for tier in cascade.result["tiers"]:
        past_first = tier["output_tokens_per_s"] - tier["requests_per_s"]
        decode = tier["tpot_s"]["mean"] * past_first / tier["replicas"]
        assert decode == pytest.approx(tier["mean_batch"], rel=0.1)  # mean of ratios for ratio of means


def test_energy_lies_between_its_bounds_and_money_follows_gpu_time(cascade: Simulation) -> None:
    result = cascade.result
    energy, cost = result["energy_j"], result["cost"]
    assert energy["per_request_at_least"] < energy["per_request"] < energy["per_request_at_most"]
    assert energy["per_request_at_most"] == pytest.approx(700 * cost["gpu_s_held_per_request"])
    assert cost["usd_per_1000_requests"] == pytest.approx(1000 * cost["gpu_s_held_per_request"] * 2.5 / 3600)
    assert cost["gpu_s_per_request"] <= 1.1 * cost["gpu_s_held_per_request"]


def test_a_closed_loop_obeys_littles_law_and_has_no_warmup() -> None:
    loop = ("traffic.clients=16", "traffic.think_time_s=2", "traffic.rate=null", "traffic.requests=3000")
    result = simulated(*loop, ONE_TIER).result
    low, high = result["throughput"]["requests_per_s_interval"]
    assert low <= 16 / (result["e2e_s"]["mean"] + 2) <= high
    assert not low <= 16 / result["e2e_s"]["mean"] <= high  # without the think time
    assert (result["warmup_requests"], result["status"]) == (0, "steady")


def test_a_tier_that_nobody_reaches_is_reported_as_such() -> None:
    """A plan made for many requests serves two, none of which escalates."""
    scenario, folder = load_scenario(overrides=["traffic.requests=3000", "traffic.rate=8", CASCADE])
    problem = resolve(scenario, folder, None, 0)
    assert scenario.deployment is not None
    candidate = deployed(problem, scenario.deployment)
    whole = problem.workload
    two = replace(problem, workload=Workload(whole.arrival[:2], whole.prompt[:2], whole.output[:2]))
    records = next(r for seed in range(50) if (r := run(two, candidate, seed)).tiers[1] is None)
    result = fg.published(fg.figures(two, candidate, records))
    first, second = result["tiers"]
    assert (first["share"], second["share"], second["stop_fraction"]) == (1.0, 0.0, 0.0)
    assert second["ttft_s"]["mean"] is second["mean_batch"] is second["utilisation"] is None
    assert result["cost"]["gpus"] == 6
    joined = fg.published(fg.joined([fg.figures(two, candidate, run(two, candidate, seed)) for seed in range(6)]))
    assert joined["tiers"][1]["mean_batch"] > 0  # over the runs that have one


def test_a_refused_request_is_neither_served_nor_good() -> None:
    scenario, folder = load_scenario(overrides=["traffic.requests=300", "traffic.rate=0.2", ONE_TIER])
    problem = resolve(scenario, folder, None, 0)
    assert scenario.deployment is not None
    candidate = deployed(problem, scenario.deployment)
    (group,) = candidate.groups
    tight = replace(candidate, groups=(replace(group, service=replace(group.service, kv_tokens=2000)),))
    result = fg.published(fg.figures(problem, tight, run(problem, tight, 0)))
    share = 1 - result["refused"] / 300
    assert 0 < result["refused"] < 150
    assert result["throughput"]["requests_per_s"] == pytest.approx(share * problem.rate, rel=0.01)
    assert result["goodput"]["fraction"] <= share + 0.05
    two = Workload([0.0, 1.0], [100, 1990], [10, 100])  # only the first fits
    result = fg.published(
        fg.figures(replace(problem, workload=two), tight, run(replace(problem, workload=two), tight, 0))
    )
    assert result["goodput"]["fraction"] == 0.5
    assert result["throughput"]["requests_per_s"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Overload
# ---------------------------------------------------------------------------------------------------------------------


def test_an_overloaded_run_gives_no_interval_to_what_grows(overloaded: Simulation) -> None:
    result = overloaded.result
    assert result["status"] == "overloaded"
    for name in ("ttft_s", "e2e_s", "answer_ttft_s", "in_system"):
        assert result[name]["interval"] == [None, None]
    assert result["tiers"][0]["mean_waiting_interval"] == [None, None]
    assert None not in result["tpot_s"]["interval"]
    longer = simulated("traffic.requests=5000", "traffic.rate=60", ONE_TIER).result
    assert longer["ttft_s"]["mean"] > 1.6 * result["ttft_s"]["mean"]  # it does grow
    low, high = result["throughput"]["requests_per_s_interval"]
    assert longer["throughput"]["requests_per_s"] == pytest.approx((low + high) / 2, rel=0.1)  # and capacity does not


def test_one_overloaded_replication_makes_the_whole_so() -> None:
    result = simulated("traffic.requests=400", "traffic.rate=60", ONE_TIER, replications=3).result
    assert result["status"] == "overloaded"
    assert result["e2e_s"]["interval"] == result["in_system"]["interval"] == [None, None]
    assert result["tiers"][0]["mean_waiting_interval"] == [None, None]
    assert None not in result["tpot_s"]["interval"]


def test_the_table_says_that_it_is_overloaded() -> None:
    done = command("--set", "traffic.requests=600", "--set", "traffic.rate=60", "--set", ONE_TIER)
    assert done.returncode == 0, done.stderr
    assert "Overloaded at 70b: more arrives than completes" in done.stdout
    assert done.stdout.count("none: it grows") == 2


# ---------------------------------------------------------------------------------------------------------------------
# Replications
# ---------------------------------------------------------------------------------------------------------------------


def test_any_number_of_workers_gives_the_same_bytes() -> None:
    small = ("traffic.requests=250", "traffic.rate=8", CASCADE)
    runs = [simulated(*small, replications=4, workers=w, detail=True) for w in (1, 2, 4)]
    contents = [content(found) for found in runs]
    assert contents[0] == contents[1] == contents[2]
    other = simulated(*small, "search.seed=1", replications=4, detail=True)
    assert all(a != b for a, b in zip(content(other), contents[0], strict=True))  # negative control: another seed


def content(found: Simulation) -> list[bytes]:
    """Everything that the files are made from."""
    assert found.timeline is not None
    rows = io.BytesIO()
    for columns in found.requests:
        write_rows(columns, rows)
    result = {k: v for k, v in found.result.items() if k != "wall_s"}
    series = [a for tier in found.timeline.tiers for a in (tier.batch, tier.ttft)] + [found.timeline.inside]
    return [json.dumps(result).encode(), rows.getvalue(), b"".join(a.tobytes() for a in series)]


def test_replications_and_batch_means_bound_the_same_means() -> None:
    """Ten runs of 2000 against one of 20 000: means agree within both intervals, whose widths are alike."""
    short = simulated("traffic.requests=2000", "traffic.rate=6", ONE_TIER, replications=10).result
    long = simulated("traffic.requests=20000", "traffic.rate=6", ONE_TIER).result
    busier = simulated("traffic.requests=20000", "traffic.rate=7", ONE_TIER).result
    assert short["requests"] == long["requests"] == 20_000
    for name in ("e2e_s", "tpot_s", "ttft_s"):
        (low, high), (from_, to) = short[name]["interval"], long[name]["interval"]
        assert low <= to
        assert from_ <= high
        assert 1 / 3 < (high - low) / (to - from_) < 3
    assert busier["tpot_s"]["interval"][0] > short["tpot_s"]["interval"][1]  # negative control
    assert short["intervals"]["method"].startswith("Student")


def test_seeds_of_replications_are_spawned_and_nested() -> None:
    assert seeds(5, 1) == [5]
    assert seeds(5, 8)[:3] == seeds(5, 3)
    assert len(set(seeds(5, 50) + seeds(6, 50))) == 100
    with pytest.raises(InputError, match="`replications` must be at least 1"):
        seeds(5, 0)


def test_replications_come_in_order_and_say_how_far_they_are() -> None:
    heard: list[int] = []
    assert replicate(abs, [-3, 2, -1], 1, heard.append) == [3, 2, 1]
    assert heard == [1, 2, 3]
    with pytest.raises(InputError, match="`workers` must be at least 1"):
        replicate(abs, [1], 0, heard.append)


def test_a_worker_that_is_killed_is_answered() -> None:
    with pytest.raises(InputError, match="`workers` must be no more than memory holds"):
        replicate(os._exit, [1, 1], 2, lambda _: None)


def test_an_error_in_a_worker_is_the_callers() -> None:
    with pytest.raises(InputError, match="`replications` must be at least 1"):
        replicate(partial(seeds, replications=0), [1, 2], 2, lambda _: None)


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tierwise", "simulate", "--replications", "2000", "--workers", "2"]
    words += ["--set", "traffic.requests=2000", "--set", ONE_TIER, "--output", str(tmp_path / "out")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "out").exists():
        time.sleep(0.05)
    time.sleep(2.0)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does: all processes of the terminal get it
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "tierwise: interrupted; nothing was written.\n")
    assert list((tmp_path / "out").iterdir()) == []
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("a worker survived")


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_rows_carry_the_figures(cascade: Simulation, tmp_path: Path) -> None:
    write_simulation(cascade, "csv", tmp_path)
    rows = pd.read_csv(tmp_path / "requests.csv")
    result = json.loads((tmp_path / "simulate.json").read_text())
    assert "wall_s" not in result
    assert len(rows) == result["requests"] == 6000
    kept = rows[rows.warmup == 0]
    assert rows.warmup.sum() == result["warmup_requests"]
    assert (kept.completion_s - kept.arrival_s).mean() == pytest.approx(result["e2e_s"]["mean"], rel=1e-6)
    assert (kept.first_token_s - kept.arrival_s).mean() == pytest.approx(result["answer_ttft_s"]["mean"], rel=1e-5)
    assert kept.correct.mean() == pytest.approx(result["quality"]["mean"])
    assert kept.gpu_s.mean() == pytest.approx(result["cost"]["gpu_s_per_request"], rel=1e-5)
    assert kept.rounds.mean() == pytest.approx(result["rounds_per_request"])
    assert (kept.answer_tier == "70b").mean() == pytest.approx(result["tiers"][1]["stop_fraction"])
    assert kept.path.str.contains("70b").mean() == pytest.approx(result["tiers"][1]["share"])
    assert set(rows.path) <= {"13b", "70b", "13b>70b"}
    np.testing.assert_allclose(rows.usd, rows.gpu_s * 2.5 / 3600, atol=2e-9)
    assert rows.arrival_s.is_monotonic_increasing
    assert (rows.accepted_tokens <= rows.drafted_tokens).all()


def test_the_command_writes_its_files_and_tables_on_stdout(tmp_path: Path) -> None:
    small = ("--set", "traffic.requests=300", "--set", ONE_TIER, "--output", str(tmp_path))
    done = command(*small, "--replications", "2", "--workers", "1", "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    del result["wall_s"]
    assert json.loads((tmp_path / "simulate.json").read_text()) == result
    assert sorted(f.name for f in tmp_path.iterdir()) == FILES
    rows = pd.read_csv(tmp_path / "requests.csv")
    assert rows.groupby("replication").size().tolist() == [300, 300]


def test_parquet_needs_pyarrow(tmp_path: Path) -> None:
    done = command("--requests", "parquet", "--set", "traffic.requests=300", "--output", str(tmp_path / "out"))
    if importlib.util.find_spec("pyarrow") is not None:
        assert len(pd.read_parquet(tmp_path / "out" / "requests.parquet")) == 300
        return
    assert done.returncode == 2
    assert "`requests` must be csv where pyarrow is not installed; got 'parquet'." in done.stderr
    assert "pip install pyarrow" in done.stderr
    assert not (tmp_path / "out").exists()


CELLS = st.lists(
    st.tuples(st.integers(0, 10**12), st.floats(0, 1e6) | st.just(math.nan), st.integers(0, 3)), min_size=1, max_size=40
)


@given(CELLS, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_rows_read_back_as_they_were(cells: list[tuple[int, float, int]], decimals: int) -> None:
    """Against Python's own formatting and csv reader: any whole number, any fraction, names with commas and quotes."""
    names = ("13b", 'a "b", c', "", "größer")
    whole, fraction, name = (np.array(x) for x in zip(*cells, strict=True))
    out = io.BytesIO()
    columns = (Column("n", whole), Column("x", fraction, decimals), Column("name", name, names=names))
    write_rows(columns, out)
    rows = list(csv.reader(io.StringIO(out.getvalue().decode(), newline="")))
    assert len(rows) == len(cells)
    for (n, x, k), (said_n, said_x, said_name) in zip(cells, rows, strict=True):
        assert (said_n, said_name) == (str(n), names[k])
        assert (said_x == "") == math.isnan(x)
        if said_x:
            assert len(said_x.partition(".")[2]) == decimals
            assert float(said_x) == pytest.approx(x, abs=0.51 * 10.0**-decimals, rel=1e-12)


def test_many_rows_take_seconds() -> None:
    """A million rows of 18 columns in about two seconds of a core; here a tenth of them."""
    rng = np.random.default_rng(0)
    columns = [Column("t", rng.random(100_000) * 1e4, 6)] * 6 + [Column("n", rng.integers(0, 4000, 100_000))] * 12
    start = time.process_time()
    write_rows(columns, io.BytesIO())
    assert time.process_time() - start < 2.0


# ---------------------------------------------------------------------------------------------------------------------
# Over time
# ---------------------------------------------------------------------------------------------------------------------


def test_the_time_series_conserves_requests() -> None:
    scenario, folder = load_scenario(overrides=["traffic.requests=4000"])
    problem = resolve(scenario, folder, None, 3)
    candidate = analytic_candidate(problem)
    records = run(problem, candidate, 3)
    series = tl.timeline(problem, candidate, records)
    width = np.diff(series.edges)
    assert (series.inside * width).sum() == pytest.approx((records.completion - records.arrival).sum(), rel=1e-9)
    span = (series.edges[-1] - series.edges[0]) / tl.FLOW_BINS
    for tier, visits in zip(series.tiers, records.tiers, strict=True):
        assert visits is not None
        assert tier.arrivals.sum() * span == pytest.approx(visits.arrival.size)
        assert tier.completions.sum() * span == pytest.approx(visits.arrival.size)
        assert (tier.batch * width).sum() * visits.replicas == pytest.approx(visits.decode_s, rel=1e-6)
        assert np.all(tier.ttft[:, 0] <= tier.ttft[:, 1])
    assert series.warmup_s == records.arrival[fg.measured(problem, records)[0]]


def test_rolling_quantiles_of_a_known_law() -> None:
    rng = np.random.default_rng(0)
    at, found = tl.rolling_quantiles(np.arange(200_000.0), rng.random(200_000))
    assert np.all(np.diff(at) > 0)
    np.testing.assert_allclose(found.mean(axis=0), [0.5, 0.99], atol=0.005)
    assert tl.rolling_quantiles(np.arange(10.0), np.ones(10))[0].size == 0


def test_pictures_have_the_same_bytes_and_no_date(overloaded: Simulation) -> None:
    series = overloaded.timeline
    assert series is not None
    first, again = (picture.files(pictures(series)) for _ in range(2))
    assert first == again
    assert sorted(first) == ["timeseries.png", "timeseries.svg"]
    assert b"<dc:date>" not in first["timeseries.svg"]

"""The command line: keys of the JSON, files, exit codes, what goes to which stream."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.scenario import load_scenario
from planner.simulate import simulate_scenario

DEPLOYED = "deployment.tiers=[{tier: 70b, tp: 8, draft: tinyllama-1.1b, draft_length: 3}]"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tierwise", *args], capture_output=True, text=True, timeout=120)


def silent(what: str, done: int, of: int) -> None: ...


def simulated(*overrides: str) -> dict[str, Any]:
    scenario, folder = load_scenario(overrides=["traffic.requests=3000", *overrides])
    return simulate_scenario(scenario, folder, None, None, silent)


def test_predict_keys(tmp_path: Path) -> None:
    done = run(
        *("predict", "--target", "llama-2-13b", "--draft", "llama-68m", "--accelerator", "h100-sxm"),
        *("--batch", "4", "--context", "512", "--acceptance", "0.6", "--acceptance-interval", "0.5", "0.7"),
        *("--format", "json", "--output", str(tmp_path / "out")),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert json.loads((tmp_path / "out" / "prediction.json").read_text()) == result
    assert {"draft_length", "speedup", "speedup_interval", "tokens_per_round", "by_draft_length"} <= set(result)
    assert {"target", "verify", "draft", "parts"} <= set(result["step_time_s"])
    assert {"crossover_batch", "provenance"} <= set(result)
    assert 32 < result["verify_knee"]["tokens"] < 2048
    low, high = result["speedup_interval"]
    assert low < result["speedup"] < high
    assert sum(result["step_time_s"]["parts"].values()) == pytest.approx(result["step_time_s"]["target"])
    assert result["speedup"] == max(row["speedup"] for row in result["by_draft_length"])


def test_simulate_keys() -> None:
    done = run("simulate", "--format", "json", "--set", "traffic.requests=2000", "--set", DEPLOYED)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    keys = {"requests", "ttft_s", "tpot_s", "e2e_s", "throughput", "goodput", "tiers", "quality", "cost", "status"}
    assert keys | {"wall_s"} <= set(result)
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        assert {"mean", "p50", "p90", "p99", "interval"} <= set(result[name])
    assert {"requests_per_s", "output_tokens_per_s", "per_gpu", "per_user"} <= set(result["throughput"])
    assert {"name", "share", "stop_fraction", "mean_batch", "acceptance"} <= set(result["tiers"][0])


def test_accepted_fraction_is_that_of_the_acceptance() -> None:
    """At a fixed draft length, accepted / drafted follows from alpha_iid; another alpha does not give it."""
    from theory.acceptance import to_fraction

    result = simulated(DEPLOYED)
    scenario, folder = load_scenario()
    from planner.build import resolve

    draft = next(d for d in resolve(scenario, folder).drafts[2] if d.model.name == "tinyllama-1.1b")
    assert result["tiers"][0]["acceptance"] == pytest.approx(float(to_fraction(draft.acceptance.value, 3)), abs=0.01)
    assert result["tiers"][0]["acceptance"] != pytest.approx(float(to_fraction(0.5, 3)), abs=0.01)


def test_same_seed_same_numbers_other_seed_others() -> None:
    first, again, other = (
        simulated(DEPLOYED),
        simulated(DEPLOYED),
        simulated(DEPLOYED, "search.seed=7"),
    )
    for result in (first, again, other):
        del result["wall_s"]
    assert first == again
    assert first["ttft_s"] != other["ttft_s"]


def test_overload_is_said() -> None:
    """An overloaded run says so, and counts what it completed, not what arrived."""
    result = simulated("traffic.rate=60", DEPLOYED)
    assert result["status"] == "overloaded"
    assert result["throughput"]["requests_per_s"] < 50
    assert simulated("traffic.rate=4", DEPLOYED)["throughput"]["requests_per_s"] == pytest.approx(4, rel=0.1)


def test_closed_loop_throughput_is_concurrency_over_cycle_time() -> None:
    """Little's law for a closed loop: clients = throughput x (time in system + think time)."""
    result = simulated("traffic.clients=16", "traffic.think_time_s=2.0", "traffic.rate=null", DEPLOYED)
    cycle = result["e2e_s"]["mean"] + 2.0
    assert result["throughput"]["requests_per_s"] == pytest.approx(16 / cycle, rel=0.03)


def test_a_single_tier_needs_no_quality(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(
        """
name: one
fleet: {accelerator: h200-sxm, gpus: 2, price_per_gpu_hour: 4}
traffic: {rate: 2, requests: 1500, prompt_tokens: {median: 500}, output_tokens: {median: 100}}
tiers: [{name: only, model: qwen2.5-32b, tp: [1, 2]}]
objective: {budget_usd_per_1000: 5}
search: {trials: 0}
"""
    )
    done = run("plan", str(tmp_path / "one.yaml"), "--format", "json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["predicted"]["quality"] is None
    assert [t["name"] for t in result["plan"]["tiers"]] == ["only"]
    table = run("plan", str(tmp_path / "one.yaml"))
    assert table.returncode == 0, table.stderr


def test_a_handful_of_requests_has_no_interval_and_says_so(tmp_path: Path) -> None:
    done = run("simulate", "--set", "traffic.requests=5", "--set", DEPLOYED)
    assert done.returncode == 0, done.stderr
    assert "unknown" in done.stdout
    few = ("--set", "traffic.requests=3", "--set", "search.trials=0", "--output", str(tmp_path / "out"))
    assert run("plan", *few).returncode == 0


def test_draft_keys() -> None:
    sizes = ("--target-params", "70e9", "--target-tokens", "2e12", "--draft-tokens", "1e11")
    keys = {"draft_params", "draft_length", "acceptance", "acceptance_interval", "speedup", "speedup_interval"}
    for cost in (("--cost", "flops"), ("--accelerator", "h100-sxm", "--tp", "4", "--batch", "8")):
        done = run("draft", *sizes, *cost, "--format", "json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert keys | {"curve", "loss_law", "acceptance_law"} <= set(result)


def test_unwritable_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("plan", "--set", "traffic.requests=300", "--output", str(tmp_path / "file"))
    assert done.returncode == 2
    assert "`output` must be a folder" in done.stderr
    assert done.stderr.count("\n") == 1


def test_names_are_exported() -> None:
    import tierwise as tw

    for name in tw.__all__:
        assert getattr(tw, name) is not None
    with pytest.raises(AttributeError):
        tw.nothing  # noqa: B018

"""Plans: keys, stability, agreement of predicted and simulated, and moving the right way with load, price and SLO."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.plan import plan_scenario
from planner.report import write_report
from planner.scenario import load_scenario
from tierwise.report.plan import files as report_files

QUICK = ["traffic.requests=6000", "search.trials=8"]
FIGURES = ("frontier", "agreement", "stops", "rounds", "schedule", "load")
TRACE = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces" / "splitwise_conv.csv"


def planned(*overrides: str) -> dict[str, Any]:
    return plan_scenario(*load_scenario(overrides=[*QUICK, *overrides]))


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    return planned()


def test_keys(shipped: dict[str, Any]) -> None:
    keys = {"feasible", "plan", "predicted", "simulated", "frontier", "lambda", "speculation", "explanation"}
    assert keys | {"evaluated", "wall_s"} <= set(shipped)
    assert {"value", "unit", "interval", "budget"} <= set(shipped["lambda"])
    assert {"schedule", "crossover_requests_per_s"} <= set(shipped["speculation"])
    assert {"analytic", "simulated"} <= set(shipped["evaluated"])
    assert json.loads(json.dumps(shipped, allow_nan=False)) == shipped


def test_plan_keeps_the_slos_in_simulation(shipped: dict[str, Any]) -> None:
    assert shipped["simulated"]["ttft_s"]["p99"] <= 1.0
    assert shipped["simulated"]["tpot_s"]["mean"] <= 0.05
    assert shipped["simulated"]["status"] == "steady"


def test_predicted_meets_simulated(shipped: dict[str, Any]) -> None:
    predicted, simulated = shipped["predicted"], shipped["simulated"]
    low, high = simulated["quality"]["interval"]
    assert low <= predicted["quality"] <= high
    assert predicted["tpot_mean_s"] == pytest.approx(simulated["tpot_s"]["mean"], rel=0.15)
    assert predicted["e2e_mean_s"] == pytest.approx(simulated["e2e_s"]["mean"], rel=0.15)
    assert predicted["usd_per_1000_requests"] == pytest.approx(simulated["cost"]["usd_per_1000_requests"], rel=0.05)


def test_interval_of_tpot_holds_the_simulated_one_and_grows_with_doubt(shipped: dict[str, Any]) -> None:
    low, high = shipped["predicted"]["tpot_interval_s"]
    assert low < shipped["predicted"]["tpot_mean_s"] < high
    assert low <= shipped["simulated"]["tpot_s"]["mean"] <= high
    # the same plan on efficiencies that were not measured on this GPU knows less
    other = planned("fleet.profile=a100-80g-sxm")["predicted"]
    assert other["tpot_interval_s"][1] / other["tpot_interval_s"][0] > 1.3 * high / low


def test_plan_is_as_good_as_the_top_tier_and_not_dearer(shipped: dict[str, Any]) -> None:
    base = shipped["baseline"]["speculative"]["predicted"]
    assert shipped["predicted"]["quality"] >= base["quality"] - 1e-9
    assert shipped["predicted"]["usd_per_1000_requests"] <= base["usd_per_1000_requests"] + 1e-9


def test_prices_of_the_loads_are_at_their_fixed_point(shipped: dict[str, Any]) -> None:
    """No mixture of stop rules is right more often on the plan's replicas; the plan itself comes within a point."""
    prices = shipped["load_prices"]
    assert prices["converged"]
    assert prices["gap"] < 1e-6
    assert all(p >= 0 for p in prices["price"].values())
    own = shipped["predicted"]["quality"]
    assert own - 1e-6 <= prices["quality"] <= own + 0.01


def test_same_seed_same_bytes(shipped: dict[str, Any], tmp_path: Path) -> None:
    again = planned()
    for name, result in (("a", shipped), ("b", again)):
        asked, out = load_scenario(overrides=QUICK), tmp_path / name
        write_report(result, out, *asked, report_files(result, *asked, out))
    files = {f.name for f in (tmp_path / "a").iterdir()}
    assert {"plan.json", "frontier.csv", "report.html", "policy.json", "bench.sh", "scenario.yaml"} < files
    assert {f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")} < files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_price_scales_cost_and_lambda_alone(shipped: dict[str, Any]) -> None:
    dear = planned("fleet.price_per_gpu_hour=5.0")
    assert dear["plan"]["tiers"] == shipped["plan"]["tiers"]
    assert dear["predicted"]["usd_per_1000_requests"] == pytest.approx(
        2 * shipped["predicted"]["usd_per_1000_requests"]
    )
    if shipped["lambda"]["interval"] is not None:
        assert dear["lambda"]["interval"][0] == pytest.approx(2 * shipped["lambda"]["interval"][0])


def test_more_load_needs_no_fewer_gpus(shipped: dict[str, Any]) -> None:
    assert planned("traffic.rate=2")["plan"]["gpus"] <= shipped["plan"]["gpus"]


def test_a_looser_slo_costs_no_more(shipped: dict[str, Any]) -> None:
    loose = planned("slo.ttft_p99_s=4", "slo.tpot_mean_s=0.2")
    assert loose["predicted"]["usd_per_1000_requests"] <= shipped["predicted"]["usd_per_1000_requests"] + 1e-9


def test_a_higher_lambda_buys_quality() -> None:
    plans = [
        planned("objective.quality_floor=null", f"objective.lambda_usd={lam}", "search.trials=0")["predicted"]
        for lam in (1e-5, 1e-3, 0.1)
    ]
    for low, high in itertools.pairwise(plans):
        assert high["quality"] >= low["quality"] - 1e-9
        assert high["usd_per_1000_requests"] >= low["usd_per_1000_requests"] - 1e-9
    assert plans[-1]["quality"] > plans[0]["quality"] + 0.05


def test_a_budget_is_kept() -> None:
    result = planned("objective.quality_floor=null", "objective.budget_usd_per_1000=0.30", "search.trials=0")
    assert result["predicted"]["usd_per_1000_requests"] <= 0.30


def write_own_scenario(folder: Path, trace: Path) -> Path:
    """A cascade of a user's own config.json and a catalog model, on a trace."""
    config = {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
    (folder / "mine").mkdir()
    (folder / "mine" / "config.json").write_text(json.dumps(config))
    (folder / "own.yaml").write_text(
        f"""
name: own
fleet: {{accelerator: h100-sxm, gpus: 8, price_per_gpu_hour: 3}}
traffic: {{trace: {trace}, requests: 4000}}
tiers:
  - {{name: small, model: mine, tp: [1, 2, 4]}}
  - {{name: large, model: qwen2.5-72b, tp: [4, 8]}}
quality:
  outcomes: {{"11": 0.6, "10": 0.05, "01": 0.25, "00": 0.1}}
  source: an example, assumed
  signal: {{kind: confidence, auroc: [0.8, 0.8], source: an example}}
objective: {{quality_floor: top}}
search: {{trials: 4}}
"""
    )
    return folder / "own.yaml"


def test_own_model_and_trace(tmp_path: Path) -> None:
    """What a new user brings: a config.json and a trace; here a small one made on the spot."""
    rows = [f"{0.4 * i:.3f},{300 + 37 * (i % 50)},{20 + 11 * (i % 30)}" for i in range(1500)]
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "\n".join(rows) + "\n")
    result = plan_scenario(*load_scenario(write_own_scenario(tmp_path, trace)))
    assert result["feasible"]
    assert {t["model"] for t in result["plan"]["tiers"]} <= {"mine", "qwen2.5-72b"}


@pytest.mark.parametrize("objective", ["{quality_floor: top}", "{budget_usd_per_1000: 5}"])
def test_one_model_without_grades(tmp_path: Path, objective: str) -> None:
    """The least a user can bring: one model, its requests, and nothing known of how often it is right."""
    scenario = write_own_scenario(tmp_path, tmp_path / "trace.csv")
    scenario.write_text(
        f"name: least\nfleet: {{accelerator: h100-sxm, gpus: 8, price_per_gpu_hour: 2.5}}\n"
        f"traffic: {{rate: 20, requests: 1500, prompt_tokens: {{median: 500, sigma: 1, high: 4000}}, "
        f"output_tokens: {{median: 150, sigma: 0.7, high: 1000}}}}\n"
        f"tiers: [{{name: only, model: mine, tp: [1, 2]}}]\n"
        f"slo: {{ttft_p99_s: 1.0, tpot_mean_s: 0.05}}\nobjective: {objective}\n"
    )
    asked, start = load_scenario(scenario)
    result = plan_scenario(asked, start)
    assert result["feasible"]
    assert result["predicted"]["quality"] is None
    cheapest = result["frontier"][0]
    if "top" in objective:
        assert result["predicted"]["usd_per_1000_requests"] == pytest.approx(cheapest["usd_per_1000_requests"])
        moved = {r["key"] for r in result["changes"]}
        assert "objective.quality_floor" not in moved  # there is no quality to move
    page = report_files(result, asked, start, tmp_path)["report.html"].decode()
    assert "Recommended deployment" in page


@pytest.mark.skipif(not TRACE.exists(), reason="the conversation trace is not beside the project")
def test_conversation_trace(tmp_path: Path) -> None:
    result = plan_scenario(*load_scenario(write_own_scenario(tmp_path, TRACE)))
    assert result["feasible"]
    assert result["simulated"]["ttft_s"]["p99"] <= 1.0


def test_command_line_writes_the_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tierwise", "plan", "--format", "json"]
    for setting in QUICK:
        command += ["--set", setting]
    for name in ("out", "again"):
        put = ["--output", str(tmp_path / name)]
        done = subprocess.run([*command, *put], capture_output=True, text=True, check=True, timeout=240)
    assert json.loads(done.stdout)["feasible"] is True
    assert done.stderr == ""
    files = {f.name for f in (tmp_path / "out").iterdir()}
    launched = {f"launch-{t['name']}.sh" for t in json.loads(done.stdout)["plan"]["tiers"]}
    written = {"plan.json", "frontier.csv", "report.html", "policy.json", "bench.sh", "scenario.yaml"}
    assert files == written | launched | {f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")}
    for file in files:  # two processes, each with its own order of hashes
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file

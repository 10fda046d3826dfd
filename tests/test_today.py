"""Today's deployment beside the plan: its figures are those of `simulate`, and what it cannot do is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planner.plan import plan_scenario
from planner.scenario import load_scenario
from planner.simulate import simulate_scenario

ONE_TIER = """
name: one
fleet: {accelerator: h100-sxm, gpus: 4, price_per_gpu_hour: 2}
traffic:
  rate: 4
  requests: 1500
  prompt_tokens: {median: 300}
  output_tokens: {median: 60}
tiers:
  - {name: small, model: llama-3.1-8b, tp: [1], drafts: [{model: llama-3.2-1b, acceptance: 0.7, source: assumed}]}
objective: {budget_usd_per_1000: 10}
search: {trials: 0}
deployment: {tiers: [{tier: small, tp: 1, replicas: 3}]}
"""


def planned(folder: Path, *settings: str) -> dict[str, Any]:
    (folder / "one.yaml").write_text(ONE_TIER)
    return plan_scenario(*load_scenario(folder / "one.yaml", settings))


def test_it_is_what_simulate_says_of_it(tmp_path: Path) -> None:
    result = planned(tmp_path)
    row = result["baseline"]["today"]
    seen = simulate_scenario(*load_scenario(tmp_path / "one.yaml"), None, None, lambda *_: None)
    assert row["simulated"]["tpot_s"] == seen["tpot_s"]
    assert row["simulated"]["cost"] == seen["cost"]
    assert row["tiers"] == ["3 x llama-3.1-8b tp1"]
    assert row["predicted"]["gpus"] == 3
    assert row["keeps_slos"]
    saved = 1 - result["predicted"]["usd_per_1000_requests"] / row["predicted"]["usd_per_1000_requests"]
    assert any(f"the plan saves {saved:.0%}" in s for s in result["explanation"] if s.startswith("Today's deployment"))
    assert any(s.startswith("Simulated against predicted: mean TPOT") for s in result["explanation"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["traffic.rate=200", "deployment.tiers.0.replicas=1"], "more requests than its replicas can answer"),
        (["deployment.tiers.0.replicas=9"], "`deployment` needs 9 GPUs"),
    ],
)
def test_a_deployment_that_cannot_serve_is_said_to(tmp_path: Path, settings: list[str], said: str) -> None:
    row = (result := planned(tmp_path, *settings))["baseline"]["today"]
    assert not row["keeps_slos"]
    assert row["predicted"] is None
    assert any("does not bear this load" in s and said in s for s in result["explanation"])


def test_without_one_there_is_none(tmp_path: Path) -> None:
    assert planned(tmp_path, "deployment=null")["baseline"]["today"] is None

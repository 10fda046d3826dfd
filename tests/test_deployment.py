"""A deployment as given: routing and load times reach the simulation; what they are refused for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from planner.plan import silent
from planner.scenario import TierDeployment, load_scenario
from planner.simulate import simulate_scenario
from simulator.engine import ROUTINGS
from theory.catalog import accelerator, model
from theory.errors import InputError
from theory.memory import load_time, weights_per_gpu
from theory.specs import Deployment

TIERS: list[dict[str, Any]] = [{"tier": "13b", "tp": 1, "replicas": 3}]


def run(requests: int = 1500, rate: float = 25.0, loading: dict[str, Any] | None = None, **tier: Any) -> dict[str, Any]:
    deployment = {"tiers": [TIERS[0] | tier]} | ({"loading": loading} if loading else {})
    settings = [f"traffic.requests={requests}", f"traffic.rate={rate}", f"deployment={json.dumps(deployment)}"]
    return simulate_scenario(*load_scenario(overrides=settings), profile=None, seed=1, progress=silent)


def test_routings_of_the_scenario_are_those_of_the_engine() -> None:
    assert get_args(TierDeployment.model_fields["routing"].annotation) == ROUTINGS


def test_the_fewest_outstanding_see_their_first_token_sooner() -> None:
    """Common random numbers, near capacity. (At half of it round-robin is first: it keeps prompts apart.)"""
    ttft = {routing: run(4000, 18.0, routing=routing)["ttft_s"]["mean"] for routing in ROUTINGS}
    assert ttft["least-outstanding"] < ttft["round-robin"] < ttft["random"]


def test_models_are_loaded_before_the_first_step() -> None:
    loaded, loading = run(), run(loading={"seconds": 32.5, "source": "seed 0, measured"})
    assert loading["tiers"][0]["ready_s"] == 32.5
    assert loaded["tiers"][0]["ready_s"] == 0.0
    assert loading["ttft_s"]["p99"] > loaded["ttft_s"]["p99"]


def test_load_time_is_weights_over_rate() -> None:
    replica = Deployment(model("llama-2-70b"), accelerator("h100-sxm"), 4)
    draft = model("llama-2-7b")
    assert load_time(replica, 4e9) == pytest.approx(4 * weights_per_gpu(replica.model, 4) / 4e9)
    more = load_time(replica, 4e9, draft, 1) - load_time(replica, 4e9)
    assert more == pytest.approx(weights_per_gpu(draft) / 4e9)
    found = run(300, loading={"bytes_per_s": 8e8, "source": "assumed"})["tiers"][0]["ready_s"]
    assert found == pytest.approx(weights_per_gpu(model("llama-2-13b")) / 8e8)
    with pytest.raises(InputError, match=r"`bytes_per_s` must be above 0 \[byte/s\]; got 0"):
        load_time(replica, 0)


@pytest.mark.parametrize(
    ("loading", "text"),
    [
        ({"seconds": 30}, "`deployment.loading.source` must be given"),
        ({"source": "x"}, "needs exactly one of `seconds`"),
        ({"seconds": 30, "bytes_per_s": 1e9, "source": "x"}, "needs exactly one of `seconds`"),
        ({"seconds": -1, "source": "x"}, "`deployment.loading.seconds` must be greater than or equal to 0; got -1"),
    ],
)
def test_a_load_time_has_one_value_and_a_source(loading: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        run(loading=loading)


def test_unknown_routing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`deployment.tiers.0.routing` must be .*'least-outstanding'; got 'jsq'"):
        run(routing="jsq")

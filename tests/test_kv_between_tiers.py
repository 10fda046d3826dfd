"""A request that escalates between tiers of one model reads the KV cache of its prompt, and computes it no more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planner.scenario import load_scenario
from planner.simulate import simulate_scenario
from simulator.cluster import Paths, TierSetup, simulate_cluster
from simulator.engine import StepTable
from simulator.workload import Workload
from theory.catalog import model
from theory.errors import InputError
from theory.specs import Limits
from theory.work import kv_bytes_per_token

STEP, HOST, TOKEN, PAIR, READ = 0.02, 0.003, 1e-4, 1e-6, 1e-5  # decode, prompts [s], each token, pair, read [s/token]


def tier(name: str, **more: Any) -> TierSetup:
    base = np.full((1, 5), STEP)
    base[0, 0] = HOST
    steps = StepTable([0], base, np.zeros(base.shape), [0, 1e4], [0, 1e4 * TOKEN], PAIR)
    return TierSetup(name, steps, Limits(max_num_seqs=4, max_num_batched_tokens=1000), 10**6, **more)


def prefill(tokens: int, cached: int) -> float:
    return HOST + tokens * TOKEN + PAIR * tokens * (cached + tokens / 2)


def test_who_escalates_reads_and_who_skips_computes() -> None:
    """Far apart: the first runs both tiers, the second only the dearer one; another model's tier would find nothing."""
    work = Workload([0.0, 10.0], [500, 500], [3, 3])
    paths = Paths(np.array([[True, True], [False, True]]), np.array([1, 1]), np.ones(2))
    run = simulate_cluster(work, [tier("short"), tier("long", kv_from="short", kv_read_s=READ)], paths, 0)
    first, second = run.tiers
    assert first is not None
    assert second is not None
    assert second.found.tolist() == [499, 0]
    assert second.arrival[0] == pytest.approx(first.completion[0] + 499 * READ)
    assert (second.first_token - second.arrival).tolist() == pytest.approx([prefill(1, 499), prefill(500, 0)])
    apart = simulate_cluster(work, [tier("short"), tier("long", kv_from="other", kv_read_s=READ)], paths, 0).tiers[1]
    assert apart is not None
    assert apart.found.tolist() == [0, 0]
    assert apart.arrival[0] == first.completion[0]


def test_order_of_arrival_is_that_of_reading() -> None:
    """A long prompt that is done first but read for long arrives behind a short one."""
    work = Workload([0.0, 0.0], [5000, 10], [1, 2])
    paths = Paths(np.ones((2, 2), dtype=bool), np.array([1, 1]), np.ones(2))
    run = simulate_cluster(work, [tier("short"), tier("long", kv_from="short", kv_read_s=0.01)], paths, 0)
    assert run.visitors[1].tolist() == [1, 0]
    assert run.completion[0] > run.completion[1] + 40


def test_a_read_time_below_zero_is_refused() -> None:
    with pytest.raises(InputError, match=r"`kv_read_s` must be finite and at least 0 \[s/token\]; got -1"):
        tier("t", kv_from="s", kv_read_s=-1.0)


SHORT = "{name: 34b-short, model: codellama-34b, tp: [2]}"
LONG = "name: 34b-long, model: codellama-34b, tp: [2]"
READS = "kv_from: {tier: 34b-short, bytes_per_s: 2.0e10, source: of this test}"


def scenario(long: str, *more: str) -> Any:
    """The same model twice, the second time with more reasoning: right more often, by the outcomes alone."""
    return load_scenario(
        overrides=[
            "traffic.requests=1500",
            "traffic.rate=0.5",
            f"tiers=[{SHORT}, {{{long}}}]",
            'quality.outcomes={"00": 10, "01": 30, "10": 10, "11": 50}',
            "quality.signal={kind: verifier, sensitivity: 1.0, false_accept: 0.0, source: of this test}",
            "deployment={lambda_usd: 1.0, tiers: [{tier: 34b-short, tp: 2}, {tier: 34b-long, tp: 2}]}",
            *more,
        ]
    )


def test_a_scenario_says_where_prompts_are_read_from() -> None:
    """Some requests escalate. Reading saves their prefill, and changes neither who escalates nor who is right."""
    again, reads = (simulate_scenario(*scenario(long), None, 0, lambda *_: None) for long in (LONG, f"{LONG}, {READS}"))
    assert again["tiers"][1]["cached_prompt_share"] == 0.0
    assert reads["tiers"][1]["cached_prompt_share"] > 0.99
    assert reads["tiers"][1]["ttft_s"]["mean"] < 0.7 * again["tiers"][1]["ttft_s"]["mean"]
    assert reads["tiers"][1]["gpu_s_per_request"] < again["tiers"][1]["gpu_s_per_request"]
    assert reads["tiers"][0] == again["tiers"][0]
    assert reads["quality"] == again["quality"]
    slow = simulate_scenario(*scenario(LONG + ", " + READS.replace("2.0e10", "1.0e8")), None, 0, lambda *_: None)
    prompt = (slow["e2e_s"]["mean"] - reads["e2e_s"]["mean"]) / (1 / 1e8 - 1 / 2e10)
    share = slow["tiers"][1]["share"]
    mean = prompt / share / kv_bytes_per_token(model("codellama-34b"))  # tokens read by a request that escalates
    assert 300 < mean < 3000


@pytest.mark.parametrize(
    "long",
    [
        f"{LONG}, {READS.replace('34b-short', 'no-such')}",
        f"{LONG}, {READS.replace('34b-short', '34b-long')}",
        f"{LONG}, kv_precision: fp8, {READS}",
        f"{LONG.replace('codellama-34b', 'llama-2-70b')}, {READS}",
    ],
)
def test_only_an_earlier_tier_of_the_same_model_can_be_read(long: str) -> None:
    with pytest.raises(InputError, match=r"`tiers.1.kv_from.tier` must be an earlier tier of the same model"):
        scenario(long)

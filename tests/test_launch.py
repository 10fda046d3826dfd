"""What a plan writes to be run: vLLM's arguments, JSON, the routing policy, a scenario that gives the plan again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.build import resolve
from planner.explain import stop_rule
from planner.launch import launch_files, speculative_config
from planner.plan import plan_scenario
from planner.policy import level_of, policy, read_policy
from planner.scenario import load_scenario
from planner.search import Search, quality_floor
from planner.space import enumerate_space
from simulator.cluster import follow
from theory.catalog import hub, models
from theory.errors import InputError

QUICK = ["traffic.requests=3000", "search.trials=0", "tiers.0.tp=[1]", "tiers.1.tp=[2]", "tiers.2.tp=[2]"]

# docs.vllm.ai/en/v0.26.0, pages of `vllm serve` and `vllm bench serve`; vllm/engine/arg_utils.py and
# vllm/benchmarks/serve.py of github.com/vllm-project/vllm
SERVE = {
    "--port",
    "--served-model-name",
    "--tensor-parallel-size",
    "--dtype",
    "--max-model-len",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--gpu-memory-utilization",
    "--block-size",
    "--quantization",
    "--kv-cache-dtype",
    "--speculative-config",
}
BENCH = {
    "--model",
    "--backend",
    "--base-url",
    "--served-model-name",
    "--dataset-name",
    "--random-input-len",
    "--random-output-len",
    "--random-range-ratio",
    "--request-rate",
    "--burstiness",
    "--num-prompts",
    "--seed",
    "--percentile-metrics",
    "--metric-percentiles",
    "--goodput",
    "--result-dir",
    "--result-filename",
    "--ignore-eos",
    "--save-result",
}
# vllm/config/speculative.py; the schedule: docs, features/speculative_decoding/dynamic_speculative_decoding
SPECULATIVE = {
    "model",
    "method",
    "num_speculative_tokens",
    "draft_tensor_parallel_size",
    "num_speculative_tokens_per_batch_size",
    "use_heterogeneous_vocab",
}
PRINTS = "#!/usr/bin/env bash\npython3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\"\n"


@pytest.fixture(scope="module")
def planned() -> dict[str, Any]:
    return plan_scenario(*load_scenario(overrides=QUICK))


@pytest.fixture(scope="module")
def files(planned: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    scenario, start = load_scenario(overrides=QUICK)
    for name, text in launch_files(planned, scenario, start, folder).items():
        (folder / name).write_text(text)
    return folder


def commands(script: Path, **environment: str) -> list[list[str]]:
    """Return the arguments of each call of ``vllm`` that a script makes, as the shell hands them over."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    stand_in = script.parent / "bin"
    stand_in.mkdir(exist_ok=True)
    (stand_in / "vllm").write_text(PRINTS)
    (stand_in / "vllm").chmod(0o755)
    path = f"{stand_in}:{os.environ['PATH']}"
    done = subprocess.run(
        [bash, str(script)], capture_output=True, text=True, check=True, timeout=60, env={"PATH": path, **environment}
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def flags(arguments: list[str]) -> dict[str, str | None]:
    at = [i for i, a in enumerate(arguments) if a.startswith("--")]
    return {arguments[i]: arguments[i + 1] if i + 1 < len(arguments) and i + 1 not in at else None for i in at}


def check_schedule(schedule: list[list[int]], longest: int) -> None:
    """The rules of vLLM's validate_and_normalize_dynamic_sd_schedule."""
    assert schedule[0][0] == 1
    for (low, high, gamma), (start, _, _) in zip(schedule, [*schedule[1:], [schedule[-1][1] + 1, 0, 0]], strict=True):
        assert 0 < low <= high
        assert start == high + 1
        assert 0 <= gamma <= longest


def test_every_argument_is_one_of_vllm(planned: dict[str, Any], files: Path) -> None:
    for tier in planned["plan"]["tiers"]:
        calls = commands(files / f"launch-{tier['name']}.sh")
        assert len(calls) == tier["replicas"]
        for call in calls:
            given = flags(call)
            assert call[0] == "serve"
            assert call[1] == hub(tier["model"])
            assert set(given) <= SERVE
            assert given["--tensor-parallel-size"] == str(tier["tp"])
            assert given["--served-model-name"] == tier["name"]
            assert ("--speculative-config" in given) == (tier["draft"] is not None)
            if tier["draft"] is not None:
                config = json.loads(given["--speculative-config"] or "")
                assert set(config) <= SPECULATIVE
                assert config["model"] == hub(tier["draft"])
                assert config["draft_tensor_parallel_size"] == tier["tp"]
                assert config["num_speculative_tokens"] == max(g for _, _, g in tier["schedule"])
                check_schedule(tier["schedule"], config["num_speculative_tokens"])


def test_a_plan_of_many_nodes_starts_one_of_each_tier(planned: dict[str, Any], tmp_path: Path) -> None:
    tiers = [{**t, "replicas": 50 + i, "gpus": t["tp"] * (50 + i)} for i, t in enumerate(planned["plan"]["tiers"])]
    large = {**planned, "plan": {**planned["plan"], "tiers": tiers}}
    scenario, start = load_scenario(overrides=QUICK)
    files = launch_files(large, scenario, start, tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    told = {t["name"]: t["endpoints"] for t in json.loads(files["policy.json"])["tiers"]}
    for tier in tiers:
        text = files[f"launch-{tier['name']}.sh"]
        each = 8 // tier["tp"]
        assert f"Run it on {-(-tier['replicas'] // each)} nodes of 8 x h100-sxm, {each} replicas on each" in text
        starts = [line.split() for line in text.splitlines() if line.startswith("serve ")]
        used = [int(g) for _, gpus, _, _ in starts for g in gpus.split(",")]
        assert sorted(used) == list(range(8))
        assert [port for *_, port, _ in starts] == [str(8000 + i) for i in range(each)]
        assert told[tier["name"]] == [f"http://{tier['name']}/v1"]


def test_limits_of_the_tier_and_profiles_of_pools_are_written(planned: dict[str, Any], tmp_path: Path) -> None:
    tiers = [{**planned["plan"]["tiers"][0], "max_num_seqs": 32}]
    own = {**planned, "plan": {**planned["plan"], "tiers": tiers}}
    pool = "{accelerator: %s, gpus: 8, price_per_gpu_hour: 2, profile: %s}"
    pools = ", ".join(pool % x for x in (("h100-sxm", "mine.toml"), ("h200-sxm", "null")))
    scenario, start = load_scenario(overrides=[f"fleet=[{pools}]"])
    files = launch_files(own, scenario, start, tmp_path)
    assert "--max-num-seqs 32" in files[f"launch-{tiers[0]['name']}.sh"]
    assert f"profile: {os.path.abspath('mine.toml')}" in files["scenario.yaml"]


def test_a_draft_of_ones_own_is_put_into_the_json(files: Path, planned: dict[str, Any]) -> None:
    name = next(t["name"] for t in planned["plan"]["tiers"] if t["draft"] is not None)
    (call, *_) = commands(files / f"launch-{name}.sh", MODEL="/models/own one", DRAFT="mine/draft")
    assert call[1] == "/models/own one"
    assert json.loads(flags(call)["--speculative-config"] or "")["model"] == "mine/draft"


def test_ports_and_endpoints_agree(planned: dict[str, Any], files: Path) -> None:
    told = {t["name"]: t["endpoints"] for t in json.loads((files / "policy.json").read_text())["tiers"]}
    for tier in planned["plan"]["tiers"]:
        ports = {flags(call)["--port"] for call in commands(files / f"launch-{tier['name']}.sh")}
        assert told[tier["name"]] == [f"http://localhost:{port}/v1" for port in sorted(p or "" for p in ports)]


def test_the_benchmark_asks_for_the_rate_and_lengths_of_the_plan(planned: dict[str, Any], files: Path) -> None:
    calls = commands(files / "bench.sh")
    traffic = planned["traffic"]
    for call, tier in zip(calls, planned["plan"]["tiers"], strict=True):
        given = flags(call)
        assert call[:2] == ["bench", "serve"]
        assert set(given) <= BENCH
        assert float(given["--request-rate"] or 0) == pytest.approx(tier["requests_per_s_per_replica"], rel=1e-4)
        assert float(given["--random-input-len"] or 0) == pytest.approx(traffic["prompt_tokens_mean"], abs=1)
        assert float(given["--random-output-len"] or 0) == pytest.approx(traffic["output_tokens_mean"], abs=1)
        ratio = float(given["--random-range-ratio"] or 0)
        assert 0 <= ratio < 1
        assert (1 + ratio) * (traffic["prompt_tokens_mean"] + traffic["output_tokens_mean"]) <= traffic[
            "max_tokens"
        ] + 2


def test_unlike_vocabularies_and_fixed_lengths() -> None:
    tier = {"draft": "d", "tp": 4, "schedule": [[1, 256, 3]], "draft_shares_vocabulary": False}
    config = speculative_config(tier)
    assert config is not None
    assert config["use_heterogeneous_vocab"] is True
    assert "num_speculative_tokens_per_batch_size" not in config
    assert speculative_config({**tier, "schedule": [[1, 256, 0]]}) is None
    assert speculative_config({**tier, "draft": None, "schedule": []}) is None


def test_every_catalog_model_has_a_repository_and_others_must_be_named(tmp_path: Path, planned: dict[str, Any]) -> None:
    assert all("/" in (hub(name) or "") for name in models())
    assert hub("mine") is None
    tiers = [{**planned["plan"]["tiers"][0], "model": 'a "tricky" $name', "draft": None, "schedule": []}]
    own = {**planned, "plan": {**planned["plan"], "tiers": tiers}}
    scenario, start = load_scenario()
    script = tmp_path / "launch.sh"
    script.write_text(launch_files(own, scenario, start, tmp_path)[f"launch-{tiers[0]['name']}.sh"])
    with pytest.raises(subprocess.CalledProcessError) as failed:
        commands(script)
    assert "set it to the Hugging Face id or folder" in failed.value.stderr
    assert commands(script, MODEL="given")[0][1] == "given"


def test_the_written_scenario_gives_the_plan_again(planned: dict[str, Any], files: Path) -> None:
    again = plan_scenario(*load_scenario(files / "scenario.yaml"))
    assert {**again, "wall_s": 0} == {**planned, "wall_s": 0}


def test_paths_of_the_written_scenario_lead_to_the_same_files(tmp_path: Path, planned: dict[str, Any]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "trace.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,9,9\n1,9,9\n")
    scenario, _ = load_scenario(overrides=["traffic={trace: trace.csv}"])
    text = launch_files(planned, scenario, tmp_path / "in", tmp_path / "out")["scenario.yaml"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scenario.yaml").write_text(text)
    again, folder = load_scenario(tmp_path / "out" / "scenario.yaml")
    assert again.traffic.trace is not None
    assert (folder / again.traffic.trace).samefile(tmp_path / "in" / "trace.csv")


# ------------------------------------------------------------------------------------------------ routing policy


def routed(router: Any, tiers: tuple[str, ...], levels: np.ndarray, draw: float) -> tuple[list[bool], str]:
    """Carry out a policy file for one request that would show these levels."""
    ran: list[str] = []
    while True:
        step = router.next(ran, [int(levels[tiers.index(t)]) for t in ran], draw)
        if step.do != "run":
            return [t in ran for t in tiers], step.tier
        ran.append(step.tier)


def test_the_policy_file_decides_as_the_plan_does(planned: dict[str, Any], tmp_path: Path) -> None:
    problem = resolve(*load_scenario(overrides=QUICK), None, 0)
    search = Search(problem, enumerate_space(problem), quality_floor(problem))
    rule = next(c.rule for c in search.enumerate() if 0 < c.rule.gamma < 1 and len(c.rule.tiers) > 1)
    assert rule.outcomes is not None
    assert rule.low is not None
    tiers = rule.outcomes.tiers
    plan = {**planned["plan"], "tiers": [{"name": t, "model": t} for t in tiers], "stop_rule": stop_rule(rule)}
    (tmp_path / "policy.json").write_text(json.dumps(policy({**planned, "plan": plan}, {t: [] for t in tiers})))
    router = read_policy(tmp_path / "policy.json")
    rng = np.random.default_rng(0)
    levels, draws = rng.integers(0, rule.outcomes.levels, (300, len(tiers))), rng.random(300)
    expected = follow(rule.low, levels, np.zeros(levels.shape), rule.high, draws < rule.gamma)
    told = [routed(router, tiers, row, draw) for row, draw in zip(levels, draws, strict=True)]
    assert [ran for ran, _ in told] == expected.visits.tolist()
    assert [tiers.index(answer) for _, answer in told] == expected.answer.tolist()
    other = follow(rule.low, levels, np.zeros(levels.shape), rule.high, draws >= rule.gamma)
    assert [ran for ran, _ in told] != other.visits.tolist()  # the test can fail


def test_a_single_tier_answers_everything(tmp_path: Path, planned: dict[str, Any]) -> None:
    rule = {"levels": 0, "high_share": 0.0, "low": [], "high": []}
    plan = {**planned["plan"], "tiers": planned["plan"]["tiers"][:1], "stop_rule": rule}
    name = plan["tiers"][0]["name"]
    (tmp_path / "p.json").write_text(json.dumps(policy({**planned, "plan": plan}, {name: []})))
    router = read_policy(tmp_path / "p.json")
    assert router.next([], []) == ("run", name)
    assert router.next([name], [3]) == ("answer", name)


def test_refusals(tmp_path: Path, files: Path) -> None:
    with pytest.raises(InputError, match=r"`policy` must be a readable JSON file"):
        read_policy(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"format": "x"}')
    with pytest.raises(InputError, match=r"`policy` must have the format tierwise-policy/1; got 'x'"):
        read_policy(tmp_path / "other.json")
    (tmp_path / "short.json").write_text('{"format": "tierwise-policy/1"}')
    with pytest.raises(InputError, match=r"`policy` must hold `signal` and `rules`"):
        read_policy(tmp_path / "short.json")
    with pytest.raises(InputError, match=r"`state` must be one the policy can reach"):
        read_policy(files / "policy.json").next(["nobody"], [0])


def test_levels_are_counted_from_the_least_sure() -> None:
    assert [level_of(x, [0.2, 0.7]) for x in (-1.0, 0.2, 0.5, 0.7, 2.0)] == [0, 0, 1, 1, 2]

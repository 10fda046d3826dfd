"""Serving points: strict reading, protocols, predictions that follow the loop they were measured with, fitted times."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from calibration.engines import EngineTimes, engine_times, fit_times, slower, with_times
from calibration.fit import BLOCKS
from calibration.profiles import fused, load_profile
from calibration.serving import (
    PROTOCOLS,
    Prediction,
    Protocol,
    ServingPoint,
    catalogue_model,
    load_protocols,
    read_serving,
    validate_serving,
)
from planner.serving import deployed, predict_point, workload
from theory.catalog import accelerator, model
from theory.errors import InputError
from theory.latency import SHARES, Efficiency, Pass, step_time
from theory.memory import kv_capacity_tokens, weights_per_gpu

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "aiconfigurator" / "silicon_e2e_h100_h200.csv"
ROW = {
    "id": "one",
    "backend": "trtllm",
    "backend_version": "1.0",
    "model_path": "meta-llama/Llama-3.1-8B-Instruct",
    "system": "h100_sxm",
    "precision": "",
    "mode": "agg",
    "isl": "512",
    "osl": "64",
    "batch_size": "8.0",
    "tp_size": "1.0",
    "silicon_ttft_ms": "100.0",
    "silicon_tpot_ms": "8.0",
}


def written(folder: Path, *rows: dict[str, str]) -> Path:
    """A file of points."""
    path = folder / "points.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROW))
        writer.writeheader()
        writer.writerows({**ROW, **row} for row in rows)
    return path


def point(**changes: object) -> ServingPoint:
    """A point of an engine without particular rules."""
    given: dict[str, object] = {
        "name": "p",
        "engine": "vllm",
        "version": "",
        "model": "llama-3.1-8b",
        "accelerator": "h100-sxm",
        "precision": "bf16",
        "tp": 1,
        "clients": 4,
        "prompt": 256,
        "output": 64,
        "ttft_s": 0.1,
        "tpot_s": 0.01,
        "protocol": Protocol("vllm", source="test"),
    }
    return ServingPoint(**(given | changes))  # type: ignore[arg-type]


def test_a_row_becomes_a_point_with_the_first_protocol_that_matches(tmp_path: Path) -> None:
    (read,) = read_serving(written(tmp_path, {})).points
    assert (read.model, read.accelerator, read.tp, read.clients) == ("llama-3.1-8b", "h100-sxm", 1, 8)
    assert (read.ttft_s, read.tpot_s) == (0.1, 0.008)
    assert read.precision == "bf16"
    assert read.protocol.slots_below_clients == 1  # that of this engine and model, not the engine's general one
    assert read.requests_per_s == pytest.approx(8 / (0.1 + 63 * 0.008))


def test_what_cannot_be_predicted_is_skipped_and_counted(tmp_path: Path) -> None:
    rows = ({}, {"mode": "disagg"}, {"model_path": "openai/gpt-oss-120b"}, {"backend": "tgi"}, {"system": "tpu"})
    read = read_serving(written(tmp_path, *rows))
    assert len(read.points) == 1
    assert sorted(read.skipped.values()) == [1, 1, 1, 1]
    assert any("gpt-oss-120b" in reason for reason in read.skipped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"isl": "12.5"}, "line 2, isl"),
        ({"silicon_tpot_ms": "-1"}, "line 2, silicon_tpot_ms"),
        ({"batch_size": "many"}, "line 2, batch_size"),
        ({"precision": "int3"}, "line 2, precision"),
        ({"batch_size": "1e9"}, "line 2, batch_size"),
        ({"model_path": "who/knows"}, "must hold points of dense models"),
    ],
)
def test_bad_values_are_refused_by_line(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_serving(written(tmp_path, changes))


def test_a_missing_column_or_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {})
    path.write_text(path.read_text().replace("silicon_ttft_ms", "ttft"))
    with pytest.raises(InputError, match="silicon_ttft_ms"):
        read_serving(path)
    with pytest.raises(InputError, match="must be a CSV file that exists"):
        read_serving(tmp_path / "none.csv")


def test_shipped_protocols_are_complete_and_others_are_refused(tmp_path: Path) -> None:
    rules, apart = load_protocols()
    assert {"vllm", "trtllm", "sglang"} <= {r.engine for r in rules if not r.model}
    assert all(entry.why for entry in apart)
    mine = tmp_path / "p.toml"
    for text, message in (
        ("[[protocol]]\nengine='vllm'\nsource='s'\nspeed=3\n", "may hold"),
        ("[[protocol]]\nsource='s'\n", "complete"),
        ("[[protocol]]\nengine='vllm'\n", "source"),
        ("[[protocol]]\nengine='vllm'\nsource='s'\nshortest=2\n", "shortest"),
        ("nothing=1\n", "at least one"),
        ("[[", "TOML"),
    ):
        mine.write_text(text)
        with pytest.raises(InputError, match=message):
            load_protocols(mine)


def test_hub_names_are_found_in_the_catalogue() -> None:
    assert catalogue_model("nvidia/Llama-3.1-8B-Instruct-FP8") == "llama-3.1-8b"
    assert catalogue_model("Qwen/Qwen3-32B") == "qwen3-32b"
    assert catalogue_model("Qwen/Qwen3-235B-A22B") == ""


def test_the_protocol_reaches_engine_and_requests() -> None:
    rules = Protocol(
        "trtllm", source="t", prompts_per_step=1, slots_below_clients=1, shortest=0.5, settings={"stream_interval": 4}
    )
    p = point(engine="trtllm", protocol=rules)
    limits = deployed(p, engine_times("trtllm", "h100-sxm")).limits
    assert limits.max_num_seqs == 3
    assert 256 + 4 <= limits.max_num_batched_tokens < 2 * 256
    assert (limits.rules.stream_interval, limits.rules.reserve_output, limits.rules.memory_left) == (4, True, True)
    requests = workload(p)
    assert requests.clients == 4
    assert requests.requests == 40
    assert 128 <= requests.prompt.min() < requests.prompt.max() <= 256


def test_one_client_waits_for_its_own_steps_only() -> None:
    """Alone, TTFT is the time of a prompt and TPOT that of a decode step: the law, without a simulator."""
    times = EngineTimes("vllm", "h100-sxm", 1e-3, 0.0, 0.0, 0.0)
    alone = point(clients=1, prompt=512, output=128)
    got = predict_point(alone, "h100-sxm-vllm", times)
    profile = with_times(load_profile("h100-sxm-vllm"), times)
    gpu, net = accelerator("h100-sxm"), model("llama-3.1-8b")
    prompt = float(step_time(net, gpu, profile, Pass(0, prefill_tokens=512)).total)
    step = float(step_time(net, gpu, profile, Pass(1, context=512 + 64)).total)
    assert got.ttft_s == pytest.approx(prompt, rel=0.03)
    assert got.tpot_s == pytest.approx(step, rel=0.01)
    assert abs(got.ttft_s / step - 1) > 0.1  # a prompt is not a decode step


def test_engine_times_add_up() -> None:
    base = EngineTimes("vllm", "h100-sxm", 0.0, 0.0, 0.0, 0.0)
    layers = model("llama-3.1-8b").layers
    bare = predict_point(point(clients=1), "h100-sxm-vllm", base).tpot_s
    gaps = predict_point(point(clients=1), "h100-sxm-vllm", replace(base, layer=20e-6)).tpot_s
    steps = predict_point(point(clients=1), "h100-sxm-vllm", replace(base, step=layers * 20e-6)).tpot_s
    assert gaps - bare == pytest.approx(layers * 20e-6, rel=1e-6)
    assert gaps == pytest.approx(steps, rel=1e-9)


def test_times_are_found_again_from_points_made_with_them() -> None:
    true = EngineTimes("trtllm", "h100-sxm", 0.0, 23e-6, 10e-6, 0.8e-3)
    rules = Protocol("trtllm", source="t", prompts_per_step=1)

    def predict(p: ServingPoint, times: EngineTimes) -> Prediction:
        return predict_point(p, "h100-sxm-vllm", times)

    noise = np.random.default_rng(0)
    points = []
    for name in ("llama-3.1-8b", "qwen3-32b"):
        for tp in (2,):
            for clients in (8, 32):
                p = point(engine="trtllm", model=name, tp=tp, clients=clients, prompt=1024, protocol=rules)
                said, (a, b) = predict(p, true), np.exp(noise.normal(0, 0.02, 2))
                points.append(replace(p, ttft_s=said.ttft_s * a, tpot_s=said.tpot_s * b))
    found = fit_times(
        EngineTimes("trtllm", "h100-sxm", 0.0, 5e-6, 10e-6, 0.4e-3), ("layer", "eager_layer"), points, predict
    )
    assert found.layer == pytest.approx(true.layer, rel=0.1)
    assert found.eager_layer == pytest.approx(true.eager_layer, rel=0.1)
    assert found.sequence == true.sequence
    with pytest.raises(InputError, match="free"):
        fit_times(true, ("layer", "step", "sequence", "kernels"), points, predict)
    with pytest.raises(InputError, match="points"):
        fit_times(true, ("layer",), points[:1], predict)


def test_unknown_engines_are_refused_and_others_transferred() -> None:
    with pytest.raises(InputError, match="engine"):
        engine_times("tgi", "h100-sxm")
    assert engine_times("vllm", "a100-80g-sxm").provenance == "transferred"
    with pytest.raises(InputError, match="layer"):
        EngineTimes("vllm", "h100-sxm", 0.0, -1e-6, 0.0, 0.0)


def test_slower_kernels_take_that_much_longer() -> None:
    gpu, net, work = accelerator("h100-sxm"), model("llama-3.1-8b"), Pass([1, 64, 256], context=1024)
    profile = load_profile("h100-sxm-vllm")
    base = step_time(net, gpu, profile, work, 1).total
    longer = step_time(net, gpu, replace(profile, efficiency=slower(profile.efficiency, 1.25)), work, 1).total
    np.testing.assert_allclose(longer / base, 1.25, rtol=0.02)
    fastest = slower(Efficiency(), 0.5)
    assert all(getattr(fastest, share) <= 1 for share in SHARES)  # nothing passes its datasheet


def test_fused_kernels_are_never_slower() -> None:
    gpu, net, work = accelerator("h100-sxm"), model("qwen3-32b"), Pass([1, 64, 256], context=1024)
    profile = load_profile("h100-sxm-vllm")
    for precision in ("bf16", "fp8"):
        own = step_time(net, gpu, profile, work, 2, precision).total  # type: ignore[arg-type]
        other = step_time(net, gpu, fused(profile), work, 2, precision).total  # type: ignore[arg-type]
        assert np.all(other <= own)
        assert other[0] < own[0]


@pytest.mark.parametrize(("own", "other"), [("h100-sxm-trtllm", "h100-sxm-vllm"), ("h200-sxm-trtllm", "h200-sxm")])
def test_only_the_products_of_tensorrt_llm_are_its_own(own: str, other: str) -> None:
    mine, theirs = load_profile(own), load_profile(other)
    different = {
        f.name for f in fields(Efficiency) if getattr(mine.efficiency, f.name) != getattr(theirs.efficiency, f.name)
    }
    assert {"gemm_start", "gemm_bandwidth", "gemm_flops"} <= different
    assert different <= set(next(b for b in BLOCKS if b.name == "gemm").parameters)
    assert mine.allreduce == theirs.allreduce
    assert set(mine.parameters) - set(theirs.parameters) <= different


def test_memory_as_a_share_of_what_is_left() -> None:
    p = point(engine="trtllm", protocol=Protocol("trtllm", source="t"))
    d = deployed(p, engine_times("trtllm", "h100-sxm"))
    free = 0.9 * (d.accelerator.memory - weights_per_gpu(d.model) - 3e9)
    per_token = 2 * 32 * 8 * 128 * 2
    assert kv_capacity_tokens(d) == pytest.approx(free / per_token, abs=d.limits.block_size)


def test_validation_counts_suspect_points_apart(tmp_path: Path) -> None:
    suspect = {"model_path": "Qwen/Qwen3-32B", "backend": "vllm", "precision": "fp8", "id": "odd"}
    full = {"batch_size": "64", "tp_size": "2", "id": "full"}
    path = written(tmp_path, {}, suspect, full)
    exact: Callable[[ServingPoint], Prediction] = lambda p: Prediction(p.ttft_s, 1.1 * p.tpot_s)  # noqa: E731
    result, rows = validate_serving(path, exact)
    assert (result["tpot"]["n"], result["unsaturated"]["tpot"]["n"], result["suspect"]["tpot"]["n"]) == (2, 1, 1)
    assert result["tpot"]["mape"] == pytest.approx(0.1)
    assert result["ttft"]["mape"] == 0
    assert len(rows) == 3
    assert [g["model"] for g in result["by_group"]] == ["llama-3.1-8b"]


def test_points_that_are_refused_are_counted_by_name(tmp_path: Path) -> None:
    long, odd = {"isl": "4000000", "id": "long"}, {"tp_size": "3", "id": "odd"}
    result, rows = validate_serving(written(tmp_path, {}, long, odd), predict_point)
    assert rows["name"].tolist() == ["one"]
    reasons = " | ".join(result["skipped"])
    assert "long: `csv` must hold points whose requests fit the KV cache" in reasons
    assert "odd: `tp` must split" in reasons
    with pytest.raises(InputError, match=r"a point that can be predicted.*odd"):
        validate_serving(written(tmp_path, odd), predict_point)


@pytest.mark.skipif(not DATA.is_file(), reason="the measured serving points are not here")
def test_measured_points_are_predicted() -> None:
    """One point in eight; the whole table is studies/serving_rows."""
    points = [p for p in read_serving(DATA, PROTOCOLS).points if not p.apart][::8]
    said = [predict_point(p) for p in points]
    tpot = np.array([s.tpot_s / p.tpot_s - 1 for s, p in zip(said, points, strict=True)])
    ttft = np.array([s.ttft_s / p.ttft_s - 1 for s, p in zip(said, points, strict=True)])
    assert np.abs(tpot).mean() <= 0.06
    assert np.abs(ttft).mean() <= 0.16
    plain = [predict_point(replace(p, protocol=Protocol(p.engine, source="none"), engine="vllm")) for p in points]
    wrong = np.array([s.ttft_s / p.ttft_s - 1 for s, p in zip(plain, points, strict=True)])
    assert np.abs(wrong).mean() > 0.25  # another engine's rules and no protocol do not explain the rows

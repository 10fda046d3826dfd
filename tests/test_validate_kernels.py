"""calibration/validate.py: error summaries, the composition rule, and steps of made-up kernels predicted exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from calibration.profiles import load_profile
from calibration.readers import VIDUR_MODELS, read_vidur
from calibration.validate import (
    ACCELERATORS,
    error_summary,
    measured_steps,
    predict_steps,
    validate_kernels,
)
from theory.catalog import accelerator
from theory.errors import InputError
from theory.latency import (
    Efficiency,
    Profile,
    allreduce_time,
    decode_attention_time,
    elementwise_time,
    gemm_time,
    prefill_attention_time,
)
from theory.work import layer_gemms
from tierwise.report.validation import kernels

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "vidur"
TRUTH = Efficiency(gemm_flops=0.7, reduce_start=1e-5)
H100 = accelerator("h100-sxm")
EXACT = Profile(
    "exact",
    "h100-sxm",
    "test",
    "assumed",
    TRUTH,
    residual=dict.fromkeys(("gemm", "attention", "elementwise", "communication"), 0.05),
)
NAME = "Llama-2-7b-hf"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return kernels in Vidur's layout that follow the law with TRUTH, milliseconds."""
    path = tmp_path_factory.mktemp("vidur")
    model = VIDUR_MODELS[NAME]
    columns = {
        "qkv": "attn_pre_proj_ms",
        "output": "attn_post_proj_ms",
        "up": "mlp_up_proj_ms",
        "down": "mlp_down_proj_ms",
    }
    rows = []
    for tp in (1, 2, 8):
        for m in TOKENS:
            row: dict[str, float] = {"tp": tp, "num_tokens": m}
            for g in layer_gemms(model, tp):
                row[columns[g.name]] = 1e3 * float(gemm_time(m, g.n, g.k, H100, TRUTH))
            elements = 1e3 * float(elementwise_time(model, H100, TRUTH, np.asarray(float(m)), np.asarray(float(tp))))
            names = ("input_layernorm_ms", "attn_rope_ms", "post_attention_layernorm_ms", "mlp_act_ms", "add_ms")
            rows.append(row | dict.fromkeys(names, elements / 5))
    pd.DataFrame(rows).to_csv(path / f"h100_{NAME}_mlp.csv", index=False)
    sizes = np.unique(np.round(2.0 ** np.arange(10, 26, 0.01)))
    reduces = [(tp, tp, s, 1e3 * float(allreduce_time(s, tp, H100, TRUTH))) for tp in (2, 8) for s in sizes[::4]]
    names = ["num_workers", "devices_per_node", "size_bytes", "median_ms"]
    pd.DataFrame(reduces, columns=names).to_csv(path / "network_h100_dgx_all_reduce.csv", index=False)
    attention = []
    for h in (1, 4, 8, 16, 32):
        for s in (512, 1024, 2048, 4096):
            for b in 2.0 ** np.arange(0, 10):
                t = decode_attention_time(b, 1, s - 1, h, h, 128, H100, TRUTH)
                attention.append(("h100", "decode", h, h, b, s, 1e3 * float(t)))
        for p in TOKENS[7:]:
            t = prefill_attention_time(p, 0, 1, h, h, 128, H100, TRUTH)
            attention.append(("h100", "prefill", h, h, 1, p, 1e3 * float(t)))
    names = ["device", "phase", "q_heads", "kv_heads", "batch_size", "tokens", "latency_ms"]
    pd.DataFrame(attention, columns=names).to_csv(
        path / "substitute_attention_aiconfigurator_vllm0140.csv", index=False
    )
    return path


# --- error summary ---------------------------------------------------------------------------------------------------


def test_error_summary_of_known_errors() -> None:
    summary = error_summary([110, 90, 100, 150], [100, 100, 100, 100])
    p90 = pytest.approx(0.38)
    assert summary == {"n": 4, "mape": 0.175, "median_ape": 0.1, "bias": 0.125, "p90_ape": p90, "worst_ape": 0.5}


def test_error_summary_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(InputError, match=r"`predicted` must have the 2 values of `measured`; got 1"):
        error_summary([1], [1, 2])
    with pytest.raises(InputError, match=r"`measured` must be finite and above 0; got \[0.0\]"):
        error_summary([1, 1], [1, 0])


# --- steps -----------------------------------------------------------------------------------------------------------


def test_steps_of_lawful_kernels_are_predicted_exactly(folder: Path) -> None:
    """Composed from kernels that follow the law, steps must be the law's steps: the two compositions agree."""
    result = validate_kernels(folder, "h100", EXACT)
    assert result["decode"]["n"] > 60
    assert result["decode"]["mape"] < 1e-3
    assert result["prefill"]["mape"] < 1e-3
    assert result["decode"]["coverage"] == 1.0
    wrong = replace(EXACT, efficiency=replace(TRUTH, gemm_bandwidth=0.8))
    assert validate_kernels(folder, "h100", wrong)["decode"]["mape"] > 0.02  # the test can fail


def test_the_result_has_the_published_keys(folder: Path) -> None:
    result = validate_kernels(folder, "h100", EXACT)
    assert {"decode", "prefill", "by_group", "worst", "profile"} <= set(result)
    for summary in (result["decode"], result["prefill"], *result["by_group"]):
        assert {"n", "mape", "median_ape", "bias", "p90_ape"} <= set(summary)
    assert {"model", "tp", "phase"} <= set(result["by_group"][0])
    assert {(g["tp"], g["phase"]) for g in result["by_group"]} == {
        (t, p) for t in (1, 2, 8) for p in ("decode", "prefill")
    }
    assert len(result["worst"]) == 10
    assert abs(result["worst"][0]["error"]) >= abs(result["worst"][-1]["error"])


def test_steps_that_do_not_fit_the_memory_are_left_out(folder: Path) -> None:
    steps = measured_steps(folder, "h100")
    one = steps[(steps["tp"] == 1) & (steps["phase"] == "decode")]
    assert not ((one["batch"] == 128) & (one["context"] == 4096)).any()  # 275 GB of KV cache
    assert ((one["batch"] == 1) & (one["context"] == 4096)).any()


def test_a_measured_step_is_the_sum_of_its_parts(folder: Path) -> None:
    steps = measured_steps(folder, "h100")
    total = steps[["gemm", "elementwise", "attention", "communication"]].sum(axis=1)
    assert np.allclose(total, steps["measured"])
    assert (steps.loc[steps["tp"] == 1, "communication"] == 0).all()


def test_more_heads_count_as_a_larger_batch(folder: Path) -> None:
    """Without a row for 32 heads, 8 heads at four times the batch take their place (equal bytes)."""
    path = folder / "substitute_attention_aiconfigurator_vllm0140.csv"
    text = path.read_text()
    before = measured_steps(folder, "h100")
    table = pd.read_csv(path)
    try:
        table[~((table["phase"] == "decode") & (table["q_heads"] > 8))].to_csv(path, index=False)
        after = measured_steps(folder, "h100")
    finally:
        path.write_text(text)
    rows = (before["phase"] == "decode") & (before["batch"] >= 16)
    assert np.allclose(before.loc[rows, "attention"], after.loc[rows, "attention"], rtol=0.05)


def test_a_profile_of_another_accelerator_is_transferred_and_tagged(folder: Path) -> None:
    assert validate_kernels(folder, "h100", "a100-80g-sxm")["profile"]["provenance"] == "transferred"
    assert validate_kernels(folder, "h100", EXACT)["profile"]["provenance"] != "transferred"


def test_a_missing_table_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / f"h100_{NAME}_mlp.csv").write_text((folder / f"h100_{NAME}_mlp.csv").read_text())
    with pytest.raises(InputError, match=r"`path` must be a readable CSV file; got .*substitute_attention"):
        validate_kernels(tmp_path, "h100", EXACT)


def test_the_report_is_written(folder: Path) -> None:
    steps = predict_steps(measured_steps(folder, "h100"), H100, EXACT)
    files = kernels(validate_kernels(folder, "h100", EXACT), steps, "tierwise validate kernels")
    assert set(files) == {"report.html", *(f"kernels{k}.{f}" for k in ("", "-errors") for f in ("png", "svg"))}
    assert b"made up" in files["report.html"] or EXACT.rows.encode() in files["report.html"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the Vidur tables are not beside the project")
@pytest.mark.parametrize("device", ["h100", "a100"])
def test_shipped_profiles_are_close_to_silicon(device: str) -> None:
    """Wider bars than the studies', which name theirs; a profile that is 10 % off must fail here."""
    profile = load_profile(ACCELERATORS[device])
    result = validate_kernels(SHARED, device, profile)
    assert result["decode"]["mape"] < 0.05
    assert result["prefill"]["mape"] < 0.045
    assert abs(result["decode"]["bias"]) < 0.02
    assert abs(result["prefill"]["bias"]) < 0.02
    e = profile.efficiency
    slow = replace(profile, efficiency=replace(e, gemm_bandwidth=0.8 * e.gemm_bandwidth, gemm_flops=0.8 * e.gemm_flops))
    assert validate_kernels(SHARED, device, slow)["decode"]["bias"] > 0.05


@pytest.mark.skipif(not SHARED.is_dir(), reason="the Vidur tables are not beside the project")
def test_what_a_profile_is_fitted_on_is_in_serving_range() -> None:
    kernels = read_vidur(SHARED, "h100", (NAME,))
    assert (kernels.decode["heads"] <= 8 * kernels.decode["kv_heads"]).all()
    assert kernels.counts()["allreduce"] > 2000

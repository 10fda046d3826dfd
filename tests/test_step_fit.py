"""Measured steps to a profile: planted parameters come back, real ones predict another model, weak data are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration.fit import WeakDataError
from calibration.measure import Grid, Request, measure, plan_run
from calibration.measurements import COLUMNS, Log, Point, Row, header_of, work_of
from calibration.profiles import load_profile, save_profile
from calibration.step_fit import fit_steps, fitted_models, start_profile, validate_steps
from theory.catalog import accelerator, model
from theory.errors import InputError
from theory.latency import Efficiency, decode_attention_time, gemm_time, step_time
from tierwise.cli import app

GPU = accelerator("h100-sxm")
GRID = Grid(batch=(1, 8, 64), context=(128, 512, 2048), new=(1, 5), prefill=(128, 512, 1024, 4000))
MODELS = ("llama-2-7b", "llama-2-13b")


def test_vector_units_pad_no_rows() -> None:
    """Where compute decides, one row costs a sixteenth of sixteen on vector units, and as much on matrix units."""
    slow = replace(GPU, flops_bf16=1e9, flops_fp8=1e9, sms=1)
    one, sixteen = (float(gemm_time(m, 4096, 4096, slow, Efficiency())) for m in (1, 16))
    assert one == pytest.approx(sixteen, rel=0.02)
    vector = replace(slow, matrix_units=False)
    one, all16 = (float(gemm_time(m, 4096, 4096, vector, Efficiency())) for m in (1, 16))
    assert (one, all16) == (pytest.approx(sixteen / 16, rel=0.02), pytest.approx(sixteen, rel=0.02))
    heads = (1, 1, 4096, 32, 32, 128)
    padded, bare = (float(decode_attention_time(*heads, a, Efficiency(attention_start=0))) for a in (slow, vector))
    assert padded == pytest.approx(64 * bare, rel=0.02)


def planted(path: Path, mode: str, truth: Efficiency, noise: float, grid: Grid = GRID, seed: int = 0) -> Path:
    """A file of steps that take what the law says at ``truth``, with noise on each repeat."""
    rng = np.random.default_rng(seed)
    shapes = {name: model(name) for name in MODELS}
    header = header_of(shapes, GPU, {"dtype": "bf16", "processor": "planted"})
    profile = replace(start_profile(GPU, mode), efficiency=truth)
    with Log(path, header) as log:
        for name in MODELS:
            points = grid.points((name, 1, mode))
            for point, t in zip(points, step_time(shapes[name], GPU, profile, work_of(points)).total, strict=True):
                log.add(Row(point, "ok", tuple(float(t) * np.exp(rng.normal(0, noise, 7)))))
        log.add(Row(Point(MODELS[0], 1, mode, "decode", 4096, 4096, 1), "oom"))
    return path


@pytest.mark.parametrize(
    ("mode", "truths"),
    [
        ("graphs", {"gemm_bandwidth": 0.6, "gemm_flops": 0.5, "host_step": 1.5e-3}),
        ("eager", {"eager_layer": 6e-4, "gemm_flops": 0.45, "kv_bandwidth": 0.3}),
    ],
)
def test_planted_parameters_come_back(tmp_path: Path, mode: str, truths: dict[str, float]) -> None:
    truth = replace(start_profile(GPU, mode).efficiency, **truths)
    fitted = fit_steps(planted(tmp_path / "a.csv", mode, truth, 0.02), "mine", mode)
    errors = dict(zip(fitted.parameters, np.sqrt(np.diag(fitted.covariance)), strict=True))
    for name, value in truths.items():
        off = abs(np.log(getattr(fitted.efficiency, name) / value))
        assert off < max(4 * errors[name], 0.02), name
        assert np.log(2) > 4 * errors[name]  # twice as much would have been seen
    assert fitted.engine == f"transformers {mode}"
    assert fitted_models(fitted, "another run") == set()


def test_one_slow_row_does_not_move_it(tmp_path: Path) -> None:
    truth = replace(start_profile(GPU, "graphs").efficiency, gemm_bandwidth=0.6)
    path = planted(tmp_path / "a.csv", "graphs", truth, 0.01)
    slow = path.read_text().splitlines()
    at = next(i for i, line in enumerate(slow) if ",decode,1,512,1,ok" in line)
    cells = slow[at].split(",")
    median = COLUMNS.index("median_s")
    cells[median] = f"{5 * float(cells[median]):.6e}"
    slow[at] = ",".join(cells)
    path.write_text("\n".join(slow) + "\n")
    assert fit_steps(path, "mine").efficiency.gemm_bandwidth == pytest.approx(0.6, rel=0.05)


def test_weak_data_are_refused_with_the_estimate(tmp_path: Path) -> None:
    truth = start_profile(GPU, "graphs").efficiency
    few = planted(tmp_path / "few.csv", "graphs", truth, 0.01, Grid((1,), (128,), (1,), (), ()))
    with pytest.raises(WeakDataError, match=r"`measurements` must tell the first parameter.*got 2 rows.*more points"):
        fit_steps(few, "mine")
    noisy = planted(tmp_path / "noisy.csv", "graphs", truth, 6.0)
    with pytest.raises(WeakDataError, match="standard error of ln gemm_bandwidth") as caught:
        fit_steps(noisy, "mine")
    assert caught.value.estimate.gemm_bandwidth > 0
    assert caught.value.errors["gemm_bandwidth"] > 0.5


def test_what_steps_do_not_tell_is_held(tmp_path: Path) -> None:
    """Decoding alone, batch 1, short contexts: no FLOP rate."""
    truth = replace(start_profile(GPU, "graphs").efficiency, gemm_bandwidth=0.7)
    grid = Grid(batch=(1, 2), context=(16, 32, 64, 128), new=(1,), prefill=(), prefill_batch=())
    fitted = fit_steps(planted(tmp_path / "a.csv", "graphs", truth, 0.01, grid), "mine")
    assert "gemm_flops" not in fitted.parameters
    assert "held: gemm_flops" in fitted.rows
    assert fitted.efficiency.gemm_flops == truth.gemm_flops
    assert fitted.efficiency.gemm_bandwidth == pytest.approx(0.7, rel=0.03)


def test_rows_it_was_fitted_on_are_left_out(tmp_path: Path) -> None:
    truth = replace(start_profile(GPU, "graphs").efficiency, gemm_bandwidth=0.6, host_step=1e-3)
    path = planted(tmp_path / "a.csv", "graphs", truth, 0.02)
    fitted = fit_steps(path, "mine", models=("llama-2-7b",))
    assert fitted.rows.startswith("measured steps, run ")
    result = validate_steps(path, fitted)
    assert {g["model"] for g in result["by_group"]} == {"llama-2-13b"}
    assert result["left_out"] == result["steps"]["n"] == len(GRID.points(("m", 1, "graphs")))
    assert result["steps"]["mape"] < 0.05
    assert result["steps"]["coverage"] > 0.7
    assert result["noise"] == pytest.approx(0.02 * 0.67, rel=0.4)
    with pytest.raises(InputError, match=r"must hold models the profile was not fitted on.*--model A"):
        validate_steps(path, fit_steps(path, "all"))
    again = planted(tmp_path / "b.csv", "graphs", truth, 0.02, seed=1)  # another run: nothing to leave out
    assert validate_steps(again, fit_steps(path, "all"))["left_out"] == 0
    assert validate_steps(path, "h100-sxm-vllm")["steps"]["bias"] < -0.2  # a profile of faster kernels is seen to be
    with pytest.raises(InputError, match="`model` must be one of llama-2-7b, llama-2-13b"):
        fit_steps(path, "mine", models=("llama-2-70b",))
    with pytest.raises(InputError, match=r"`mode` must be one of graphs.*got 'eager'"):
        fit_steps(path, "mine", "eager")


# --- from the clock to the profile and back --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real steps of two small models on this CPU."""
    transformers = pytest.importorskip("transformers", reason="the torch extra is not installed")
    folder = tmp_path_factory.mktemp("steps")
    for name, width, layers in (("narrow", 128, 2), ("wide", 192, 5)):
        transformers.LlamaConfig(
            vocab_size=512,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        ).save_pretrained(folder / name)
    grid = Grid(batch=(1, 8), context=(64, 256), new=(1, 5), prefill=(64, 256), prefill_batch=(1, 2))
    request = Request(
        models=(str(folder / "narrow"), str(folder / "wide")), grid=grid, warmup=2, repeats=5, clock="cpu"
    )
    plan = plan_run(request)
    pairs = {replace(p, model=""): [q for q in plan.points if replace(q, model=p.model) == p] for p in plan.points}
    for points in pairs.values():  # both models in turns: what slows the machine down slows both
        measure(replace(plan, points=tuple(points)), folder / "steps.csv", lambda *_: None)
    return folder / "steps.csv"


@pytest.mark.parametrize(("known", "other"), [("narrow", "wide"), ("wide", "narrow")])
def test_one_model_predicts_the_other(measured: Path, tmp_path: Path, known: str, other: str) -> None:
    """Within 50 %, in CPU time since others may use the machine; with operations four times as slow it must not be."""
    fitted = fit_steps(measured, "mine", models=(known,))
    assert "gemm_start" in fitted.parameters
    result = validate_steps(measured, fitted)
    assert {g["model"] for g in result["by_group"]} == {other}
    assert result["steps"]["median_ape"] < 0.5
    assert abs(result["steps"]["bias"]) < 0.5
    wrong = replace(fitted, efficiency=replace(fitted.efficiency, gemm_start=4 * fitted.efficiency.gemm_start))
    assert validate_steps(measured, wrong)["steps"]["median_ape"] > 0.5
    save_profile(fitted, tmp_path / "mine.toml")
    assert load_profile(tmp_path / "mine.toml").rows == fitted.rows


def test_the_profile_of_another_machine_is_refused(measured: Path) -> None:
    with pytest.raises(InputError, match=r"`profile` must be for cpu-.*got 'h100-sxm'. Fit one"):
        validate_steps(measured, "h100-sxm")


def test_the_command_line_fits_and_validates(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: str) -> str:
        app(args, standalone_mode=False)
        return capsys.readouterr().out

    profile = tmp_path / "mine.toml"
    fitted = json.loads(run("fit", str(measured), "--model", "wide", "--output", str(profile), "--format", "json"))
    words = ("validate", "steps", str(measured), "--profile", str(profile))
    result = json.loads(run(*words, "--format", "json"))
    assert {"steps", "by_group", "worst", "profile", "mode", "left_out", "noise"} == set(result)
    assert result["profile"]["rows"] == fitted["rows"]
    assert result["steps"] == validate_steps(measured, profile)["steps"]
    assert f"{result['left_out']} rows it was fitted on left out" in run(*words)
    with pytest.raises(InputError, match="`device` must be given for a folder"):
        run("fit", str(measured.parent), "--output", str(profile))
    with pytest.raises(InputError, match="`device` must be left out for a CSV"):
        run("fit", str(measured), "--device", "h100", "--output", str(profile))

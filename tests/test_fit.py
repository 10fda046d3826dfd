"""calibration/fit.py and profiles.py: known efficiencies are found again, weak data are refused, files are kept."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression, linprog

from calibration.fit import BLOCKS, WeakDataError, allreduce_curves, fit_profile, predict, rising_median
from calibration.profiles import FOLDER, available_profiles, load_profile, save_profile, transfer
from calibration.readers import Kernels, empty_kernels
from theory.catalog import accelerator
from theory.errors import InputError
from theory.latency import PARTS, Efficiency

H100 = accelerator("h100-sxm")
TRUTH = replace(
    Efficiency(),
    gemm_start=3.5e-6,
    gemm_bandwidth=0.85,
    gemm_flops=0.72,
    attention_start=9e-6,
    kv_bandwidth=0.8,
    prefill_flops=0.5,
    element_bandwidth=0.45,
    link_bandwidth=0.55,
    reduce_start=8e-6,
)
HELD = ("gemm_knee", "gemm_stream", "gemm_wave", "tile_feed", "split_start", "kv_resident", "kv_feed", "kv_combine")


def product_rows(most_tokens: float = 4096.0) -> pd.DataFrame:
    """Return products of eight shapes and many token counts, without times."""
    shapes = [(n, k) for n in (1536, 4096, 8192, 16384) for k in (2048, 8192)]
    tokens = [m for m in 2.0 ** np.arange(0, 13, 0.5) if m <= most_tokens]
    rows = pd.DataFrame([(float(round(m)), n, k) for n, k in shapes for m in tokens], columns=["m", "n", "k"])
    group = rows["n"].astype(int).astype(str) + "x" + rows["k"].astype(int).astype(str)
    return rows.assign(precision="bf16", follows_activation=False, weight=1.0, group=group)


def attention_rows() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return decode and prefill rows without times."""
    heads = [(h, kv) for h, kv in ((8, 8), (32, 8), (16, 4), (4, 4))]
    decode = [(b, 1.0, s, h, kv, 128) for h, kv in heads for b in (1, 4, 16, 64, 256) for s in (127, 511, 2047, 8191)]
    prefill = [(p, 0.0, 1.0, h, kv, 128) for h, kv in heads for p in (128, 256, 512, 1024, 2048, 4096, 8192)]
    names = ["heads", "kv_heads", "head_dim"]
    tables = (
        pd.DataFrame(decode, columns=["batch", "query", "context", *names]),
        pd.DataFrame(prefill, columns=["tokens", "cached", "prompts", *names]),
    )
    return tuple(t.assign(group=t["heads"].astype(str) + "/" + t["kv_heads"].astype(str)) for t in tables)  # type: ignore[return-value]


def made(truth: Efficiency = TRUTH, noise: float = 0.03, seed: int = 0, most_tokens: float = 4096.0) -> Kernels:
    """Return kernels whose times follow the law with ``truth``, each off by ``noise`` in the logarithm."""
    rng = np.random.default_rng(seed)
    decode, prefill = attention_rows()
    sizes = [(tp, float(s)) for tp in (2, 4, 8) for s in 2.0 ** np.arange(11, 26)]
    tables = {
        "gemm": product_rows(most_tokens),
        "decode": decode,
        "prefill": prefill,
        "elementwise": pd.DataFrame(
            [("Llama-2-7b-hf", tp, float(m)) for tp in (1, 2, 4) for m in 2.0 ** np.arange(0, 13)],
            columns=["model", "tp", "tokens"],
        ).assign(group=lambda t: t["tp"].astype(str)),
        "allreduce": pd.DataFrame(sizes, columns=["tp", "size"]).assign(group=lambda t: t["tp"].astype(str)),
    }
    for block in BLOCKS:
        if block.name != "fp8":
            time = predict(block, tables[block.table], H100, truth)
            tables[block.table] = tables[block.table].assign(time=time * np.exp(rng.normal(0, noise, len(time))))
    return empty_kernels("made", "made up", **tables)


@pytest.fixture(scope="module")
def fitted() -> object:
    """Return a profile fitted on made-up kernels of known efficiencies."""
    return fit_profile(made(), H100, "made", "test", Efficiency(), HELD, date="2026-01-01")


def test_known_efficiencies_are_found_within_their_errors(fitted) -> None:  # type: ignore[no-untyped-def]
    errors = dict(zip(fitted.parameters, np.sqrt(np.diag(fitted.covariance)), strict=True))
    for name in ("gemm_start", "gemm_bandwidth", "gemm_flops", "kv_bandwidth", "prefill_flops", "link_bandwidth"):
        off = np.log(getattr(fitted.efficiency, name) / getattr(TRUTH, name))
        assert abs(off) < 4 * errors[name] + 0.005, name
        assert abs(off) < 0.1, name
    start = Efficiency()
    assert abs(np.log(start.gemm_flops / TRUTH.gemm_flops)) > 4 * errors["gemm_flops"]  # the test can fail


def test_residual_spread_is_the_noise(fitted) -> None:  # type: ignore[no-untyped-def]
    assert set(fitted.residual) == set(PARTS)
    for part in ("gemm", "attention", "elementwise"):
        assert 0.02 < fitted.residual[part] < 0.045, part


def test_what_was_fitted_and_held_is_said(fitted) -> None:  # type: ignore[no-untyped-def]
    assert fitted.provenance == "fitted"
    assert not set(HELD) & set(fitted.parameters)
    assert "fp8: none, fp8_start" in fitted.rows
    assert "made up" in fitted.rows
    for name in HELD:
        assert getattr(fitted.efficiency, name) == getattr(Efficiency(), name)


def test_outliers_do_not_move_the_fit(fitted) -> None:  # type: ignore[no-untyped-def]
    kernels = made()
    spoilt = kernels.gemm.copy()
    spoilt.loc[spoilt.index % 20 == 0, "time"] *= 3.0
    again = fit_profile(empty_kernels("made", gemm=spoilt), H100, "spoilt", "test", Efficiency(), HELD)
    for name in ("gemm_bandwidth", "gemm_flops"):
        assert abs(np.log(getattr(again.efficiency, name) / getattr(fitted.efficiency, name))) < 0.03


def test_too_few_rows_are_refused() -> None:
    few = empty_kernels("made", gemm=made().gemm.head(5))
    with pytest.raises(WeakDataError, match=r"must identify the gemm parameters.*got 5 rows for \d+ parameters"):
        fit_profile(few, H100, "few", "test")


def test_decode_alone_does_not_tell_the_flop_rate() -> None:
    """Products of one token each wait for memory: they say nothing about FLOPs, and the exception has what they say."""
    rows = made(most_tokens=2.0).gemm
    slim = empty_kernels("made", gemm=pd.concat([rows] * 3, ignore_index=True))
    with pytest.raises(WeakDataError, match=r"standard error of .*gemm_flops") as caught:
        fit_profile(slim, H100, "slim", "test", replace(TRUTH, gemm_flops=0.9), HELD)
    assert isinstance(caught.value.estimate, Efficiency)
    assert not caught.value.errors["gemm_flops"] < 0.5


def test_no_rows_are_refused() -> None:
    with pytest.raises(InputError, match=r"`kernels` must hold at least one row"):
        fit_profile(empty_kernels("made"), H100, "none", "test")


def test_allreduce_curves_never_fall() -> None:
    rng = np.random.default_rng(3)
    size = 2.0 ** rng.uniform(11, 26, 500)
    rows = pd.DataFrame(
        {"tp": 4, "size": size, "group": "tp4", "time": (1e-5 + size / 3e11) * rng.choice([0.5, 2], 500)}
    )
    (knots,) = allreduce_curves(rows).values()
    times = [t for _, t in knots]
    assert times == sorted(times)
    assert min(times) > 0


def least_absolute_error(values: np.ndarray, weights: np.ndarray) -> float:
    """Return the smallest weighted absolute error of a sequence that never falls, by linear programming."""
    n = values.size
    eye, cost = np.eye(n), np.concatenate([np.zeros(n), weights])
    falls = np.hstack([(np.eye(n) - np.eye(n, k=1))[:-1], np.zeros((n - 1, n))])
    above, below = np.hstack([eye, -eye]), np.hstack([-eye, -eye])
    bound = np.concatenate([values, -values, np.zeros(n - 1)])
    return float(linprog(cost, np.vstack([above, below, falls]), bound, bounds=(0, None)).fun)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 5)), min_size=2, max_size=12))
def test_rising_median_has_the_least_absolute_error(rows: list[tuple[float, float]]) -> None:
    values, weights = np.array(rows).T
    risen = rising_median(values, weights)
    assert (np.diff(risen) >= 0).all()
    error = float(np.sum(weights * np.abs(risen - values)))
    assert error == pytest.approx(least_absolute_error(values, weights), rel=1e-6, abs=1e-9)


def test_rising_mean_has_not() -> None:
    values = np.array([1.0, 9.0, 2.0, 3.0, 4.0])
    mean = isotonic_regression(values).x
    assert np.abs(mean - values).sum() > least_absolute_error(values, np.ones(5)) + 0.1


def test_partly_filled_waves_of_attention_are_found_where_rows_show_them() -> None:
    """108 SMs: 256 heads end in a wave that is far from full; 132 SMs: heads in powers of two fill theirs."""
    truth = replace(TRUTH, kv_wave=0.3, kv_split=2.0, kv_split_ungrouped=2.0)
    rows = attention_rows()[0]
    (block,) = (b for b in BLOCKS if b.name == "decode")
    for name, seen in (("a100-80g-sxm", True), ("h100-sxm", False)):
        gpu = accelerator(name)
        time = predict(block, rows, gpu, truth) * np.exp(np.random.default_rng(5).normal(0, 0.02, len(rows)))
        only = empty_kernels("made", decode=rows.assign(time=time))
        fit = fit_profile(only, gpu, "made", "test", replace(truth, kv_wave=0.0), HELD)
        assert ("kv_wave" in fit.parameters) is seen
        assert not seen or fit.efficiency.kv_wave == pytest.approx(0.3, abs=0.06)


# --- profiles --------------------------------------------------------------------------------------------------------


def test_a_profile_survives_its_file(fitted, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "made.toml"
    save_profile(fitted, path)
    back = load_profile(path)
    assert [p.name for p in tmp_path.iterdir()] == ["made.toml"]  # nothing left beside it
    for f in fields(Efficiency):
        assert getattr(back.efficiency, f.name) == pytest.approx(getattr(fitted.efficiency, f.name), rel=1e-7)
    assert np.allclose(back.covariance, fitted.covariance, rtol=1e-5)
    assert back.allreduce.keys() == fitted.allreduce.keys()
    assert (back.name, back.rows, back.date, back.parameters) == (
        fitted.name,
        fitted.rows,
        "2026-01-01",
        fitted.parameters,
    )


@pytest.mark.parametrize("name", available_profiles())
def test_shipped_profiles_say_what_they_are(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.provenance == "fitted"
    assert profile.rows
    assert profile.source
    assert profile.date
    assert accelerator(profile.accelerator).name == profile.accelerator
    assert np.all(np.linalg.eigvalsh(np.array(profile.covariance)) > -1e-9)


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"`profile` must be one of a100-80g-sxm, h100-sxm.*got 'h900'"):
        load_profile("h900")


def test_a_profile_with_a_parameter_missing_is_refused(tmp_path: Path) -> None:
    text = (FOLDER / "h100-sxm.toml").read_text(encoding="utf-8")
    path = tmp_path / "cut.toml"
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith("gemm_start")))
    with pytest.raises(InputError, match=r"`efficiency` must hold exactly.*got \['gemm_start'\]"):
        load_profile(path)


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "more.toml"
    path.write_text("colour = 1\n" + (FOLDER / "h100-sxm.toml").read_text(encoding="utf-8"))
    with pytest.raises(InputError, match=r"`profile` may only hold .*got 'colour in more.toml'"):
        load_profile(path)


def test_a_transferred_profile_keeps_efficiencies_and_drops_measured_collectives() -> None:
    profile = load_profile("h100-sxm")
    moved = transfer(profile, accelerator("b200"))
    assert moved.efficiency == profile.efficiency
    assert moved.allreduce == {}
    assert moved.rows.startswith("none on b200")
    assert all(moved.residual[part] > profile.residual[part] for part in PARTS)

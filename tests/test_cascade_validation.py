"""The out-of-fold validation on synthetic prompts of known law, and on the real table where it is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from calibration import cascade_validation as cv
from calibration.cascade_validation import hull_area, upper_hull, validate_cascade, validate_group
from calibration.quality_readers import Samples, read_quality
from theory.errors import InputError

QUALITY = Path(__file__).resolve().parents[2] / "shared" / "data" / "quality"


def table(path: Path, n: int, seed: int, informative: bool = True) -> Path:
    """Write prompts of three tiers whose scores see difficulty through noise (or are noise)."""
    rng = np.random.default_rng(seed)
    ease, rows = rng.normal(0, 1.5, n), []
    for model, size, skill, cost in (("a", 8, 0.6, 1.0), ("b", 34, 1.6, 4.0), ("c", 70, 2.2, 12.0)):
        logit = ease + skill + rng.normal(0, 0.7, n)
        right = rng.random(n) < expit(2 * logit)
        seen = logit if informative else rng.permutation(logit)
        for i in range(n):
            score = -np.logaddexp(0, -3 * seen[i])  # overconfident
            rows.append((f"p{i}", "toy", "test", "t", model, size, int(right[i]), score, cost))
    columns = [
        "sample_id",
        "dataset",
        "split",
        "chain",
        "model",
        "params_b",
        "correct",
        "confidence_logprob",
        "cost_usd",
    ]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


def synthetic(n: int, seed: int) -> Samples:
    """Return prompts of the same law as arrays."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(0, 1.5, (n, 1))
    logit = ease + np.array([0.6, 1.6, 2.2]) + rng.normal(0, 0.7, (n, 3))
    right = (rng.random((n, 3)) < expit(2 * logit)).astype(float)
    cost = np.tile([1.0, 4.0, 12.0], (n, 1))
    return Samples(
        "toy", "confidence", "USD", ("a", "b", "c"), tuple(map(str, range(n))), right, expit(3 * logit), cost
    )


@pytest.fixture(scope="module")
def informed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return once(table(tmp_path_factory.mktemp("q") / "toy.csv", 1000, 0))


def once(path: Path) -> dict[str, Any]:
    """Return the entry of the only group, from one division into folds."""
    (group,) = read_quality(path)
    return validate_group(group, np.random.default_rng(0), repeats=1)


def test_areas_are_in_order(informed: dict[str, Any]) -> None:
    area = informed["area"]
    assert area["singles"] + 0.05 < area["policy"] < area["oracle"]
    chosen = informed["area_chosen_in_training"]
    assert chosen["dynamic_programme"] > chosen["pairwise"] - 0.02
    for name, (low, high) in informed["area_interval"].items():
        assert low < area[name] < high


def test_plan_is_kept_on_prompts_it_did_not_see(informed: dict[str, Any]) -> None:
    assert informed["predicted_cost"] == pytest.approx(informed["realised_cost"], rel=0.06)
    assert informed["predicted_quality"] == pytest.approx(informed["realised_quality"], abs=0.015)
    assert informed["ece"] < 0.03 < informed["ece_raw"]


def test_intervals_of_the_prediction_cover_what_other_prompts_show() -> None:
    """Over many tables; half the width must cover too little."""
    inside, close = [], []
    for seed in range(4):
        samples = synthetic(400, seed)
        for fold in range(2):
            train = np.flatnonzero(np.arange(400) % 2 == fold)
            test = np.flatnonzero(np.arange(400) % 2 != fold)
            planned, expected, width = cv.Fitted(samples, train, cv.RECIPES[2]).plans(test)
            off = np.abs(np.stack([planned.cost.mean(axis=1), planned.quality.mean(axis=1)], axis=1) - expected)
            inside.append(off <= width)
            close.append(off <= width / 2)
    assert 0.88 <= np.mean(inside) <= 1.0
    assert np.mean(close) < 0.85


def test_result_is_json_and_repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RECIPES", cv.RECIPES[:2]), ("LEVELS", 6), ("RESAMPLES", 20)):
        monkeypatch.setattr(cv, name, value)  # keep it short
    result = validate_cascade(table(tmp_path / "toy.csv", 80, 1), seed=3)
    json.dumps(result, allow_nan=False)
    assert (result["repeats"], len(result["by_group"])) == (3, 1)
    small = synthetic(80, 1)
    first, second, other = (
        json.dumps(validate_group(small, np.random.default_rng(s), repeats=1), allow_nan=False) for s in (3, 3, 4)
    )
    assert first == second != other


def test_noise_gains_nothing_over_single_models(tmp_path: Path) -> None:
    """Negative control: if test prompts leaked into the fit, scores of pure noise would seem to help."""
    area = once(table(tmp_path / "toy.csv", 400, 2, informative=False))["area"]
    assert area["policy"] < area["singles"] + 0.04


def test_hull_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random(30), rng.random(30)
    x[0], y[0] = 0.0, 0.0
    hx, hy = upper_hull(x, y)
    grid = np.linspace(hx[0], hx[-1], 500)
    best = np.zeros(500)
    for i in range(30):
        for j in range(30):
            if x[i] < x[j]:
                t = (grid - x[i]) / (x[j] - x[i])
                best = np.where((t >= 0) & (t <= 1), np.maximum(best, y[i] + t * (y[j] - y[i])), best)
    assert np.interp(grid, hx, hy) == pytest.approx(np.maximum.accumulate(best), abs=1e-4)
    assert hull_area(x, y) == pytest.approx(np.trapezoid(np.interp(np.linspace(0, 1, 9001), hx, hy)) / 9000, abs=1e-4)


def test_too_few_prompts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`csv` must hold at least 50 prompts of toy/t; got 20"):
        validate_cascade(table(tmp_path / "toy.csv", 20, 0))


@pytest.mark.skipif(not QUALITY.is_dir(), reason="the quality tables are not beside the project")
def test_real_prompts(tmp_path: Path) -> None:
    everything = pd.read_csv(QUALITY / "zellinger_cascades.csv.gz")
    some = everything[(everything["dataset"] == "mmlu") & (everything["chain"] == "llama")]
    some.to_csv(tmp_path / "mmlu.csv", index=False)
    group = once(tmp_path / "mmlu.csv")
    assert group["n"] == 1816
    assert group["area"]["singles"] == pytest.approx(0.791, abs=0.001)  # as computed independently
    assert group["area"]["pairwise"] == pytest.approx(0.855, abs=0.003)
    assert group["area"]["oracle"] == pytest.approx(1.278, abs=0.005)
    assert group["area"]["policy"] > group["area"]["singles"] + 0.05
    # the programme alone: the policy contains pairwise thresholds and could not fall behind them
    assert group["area_chosen_in_training"]["dynamic_programme"] > group["area_chosen_in_training"]["pairwise"] - 0.01
    assert group["predicted_cost"] == pytest.approx(group["realised_cost"], rel=0.03)
    assert group["predicted_quality"] == pytest.approx(group["realised_quality"], abs=0.01)
    assert group["ece"] <= 0.02

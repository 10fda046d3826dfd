"""The quality predictor against a known law, out of fold, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from calibration.predictor import Shape, auroc, load, out_of_fold, report, rescue_targets, save, train
from theory.errors import InputError

TIERS = ("small", "large")


def prompts(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)) * (1, 10, 1) + (0, 5, 0)  # the second column is on another scale, the third noise
    truth = expit(np.stack([x[:, 0], 1 + 0.5 * x[:, 0] + 0.1 * (x[:, 1] - 5)], axis=1))
    return x, (rng.random((n, 2)) < truth).astype(float), truth


@pytest.mark.parametrize("hidden", [0, 8])
def test_recovers_the_law_on_other_prompts(hidden: int) -> None:
    if hidden:
        pytest.importorskip("torch")
    x, right, _ = prompts(3000, 0)
    new, _, truth = prompts(1000, 1)
    p = train(x, right, TIERS, Shape(hidden=hidden, steps=60))(new)
    assert np.abs(p[:, :2] - truth).mean() < 0.035
    assert np.abs(p[:, 2] - truth[:, 1]).mean() < 0.06  # tiers are independent given x: rescue = right


def test_a_hidden_layer_learns_what_a_line_cannot() -> None:
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(700, 1))
    right = np.repeat((rng.random((700, 1)) < np.where(np.abs(x) < 0.7, 0.9, 0.2)).astype(float), 2, axis=1)
    line, curve = (
        out_of_fold(x, right, TIERS, Shape(hidden=h, steps=60, decay=1e-4), folds=2)[1]["small right"] for h in (0, 8)
    )
    assert line.auroc < 0.6 < 0.75 < curve.auroc
    assert curve.ece < 0.09
    assert curve.r2 > 0.25 > line.r2


def test_noise_is_not_predicted() -> None:
    """Negative control: prompts that leak into their own fit would give skill where there is none."""
    rng = np.random.default_rng(0)
    reports = out_of_fold(rng.normal(size=(400, 10)), (rng.random((400, 2)) < 0.6).astype(float), TIERS)[1]
    assert abs(reports["small right"].auroc - 0.5) < 0.1
    assert reports["small right"].r2 < 0.02


def test_predictors_of_different_folds_are_not_compared() -> None:
    """Each fold is told the mean of the others: across folds that ranks prompts the wrong way round."""
    rng = np.random.default_rng(0)
    fold, y = np.arange(500) % 5, (rng.random(500) < 0.5).astype(float)
    p = np.array([y[fold != f].mean() for f in range(5)])[fold]
    assert auroc(p, y) < 0.48
    assert auroc(p, y, fold) == 0.5
    assert auroc(y, y, fold) == 1.0


def test_scores_by_hand() -> None:
    found = report([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 1])
    assert (found.brier, found.r2, found.auroc) == (0.25, 0.0, 0.5)
    assert found.log_loss == pytest.approx(np.log(2))
    assert np.isnan(auroc(np.array([0.1]), np.array([1.0])))


def test_saved_and_loaded(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    x, right, _ = prompts(200, 0)
    predictor = train(x, right, TIERS)
    assert any(predictor.calibrators)
    save(predictor, tmp_path, ("a", "b", "c"), {"trained_on": "synthetic"})
    assert np.array_equal(load(tmp_path)(x), predictor(x))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["predictor.json", "predictor.safetensors"]
    head = json.loads((tmp_path / "predictor.json").read_text())
    (tmp_path / "predictor.json").write_text(json.dumps(head | {"format": "other"}))
    with pytest.raises(InputError, match="`format` must be"):
        load(tmp_path)
    (tmp_path / "predictor.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="`folder` must hold"):
        load(tmp_path)


def test_refusals() -> None:
    x, right, _ = prompts(40, 0)
    with pytest.raises(InputError, match="`features` must be finite"):
        train(np.full_like(x, np.nan), right, TIERS)
    with pytest.raises(InputError, match="`tiers` must be 2 names"):
        train(x, right, ("a",))
    with pytest.raises(InputError, match="`correct` must be"):
        rescue_targets([[0.5]])
    with pytest.raises(InputError, match="`features` must be finite and have 3 columns"):
        train(x, right, TIERS, Shape(steps=1))(x[:, :2])

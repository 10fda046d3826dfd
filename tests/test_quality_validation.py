"""The report on the quality predictor: calibrated, above chance, and nothing where there is nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from calibration.outcome_models import calibration_error
from calibration.predictor import load
from calibration.quality_features import Known, read_known, state_features
from calibration.quality_readers import Samples, read_quality
from calibration.quality_validation import by_chance, reliability, validate_group, validate_quality
from theory.errors import InputError

QUALITY = Path(__file__).resolve().parents[2] / "shared" / "data" / "quality"
TIERS = ("a", "b", "c")


def toy(n: int, seed: int) -> Samples:
    """Return prompts of three tiers with overconfident scores that see the difficulty through noise."""
    rng = np.random.default_rng(seed)
    skill, ease = np.array((0.3, 0.9, 1.3)), rng.normal(0, 1.5, (n, 1))
    logit = ease + skill + rng.normal(0, 0.7, (n, 3))
    right = (rng.random((n, 3)) < expit(2 * logit)).astype(float)
    cost = np.tile((1.0, 4.0, 12.0), (n, 1))
    return Samples("toy", "confidence", "USD", TIERS, tuple(map(str, range(n))), right, expit(5 * logit), cost)


def known(samples: Samples) -> Known:
    n = len(samples.correct)
    return Known((), np.zeros((n, 0)), samples.score, np.zeros((n, 0)))


def written(path: Path, samples: Samples) -> Path:
    rows = [
        (i, "toy", "t", tier, 8, int(samples.correct[r, k]), np.log(samples.score[r, k]), samples.cost[r, k], 50, 7)
        for r, i in enumerate(samples.ids)
        for k, tier in enumerate(samples.tiers)
    ]
    columns = ["sample_id", "dataset", "chain", "model", "params_b", "correct", "confidence_logprob", "cost_usd"]
    pd.DataFrame(rows, columns=[*columns, "prompt_tokens", "output_tokens"]).to_csv(path, index=False)
    return path


def test_calibrated_out_of_fold() -> None:
    samples = toy(1200, 0)
    found = validate_group(samples, known(samples), 0)
    assert found["ece"] < 0.025 < 0.05 < found["ece_raw"]
    assert found["ece_by_chance"]["mean"] < found["ece_by_chance"]["p95"] < 0.025
    for entry in found["right"]:
        assert entry["auroc"] > 0.75
        assert entry["interval"]["brier"][0] < entry["brier"] < entry["interval"]["brier"][1]
        assert sum(b["n"] for b in entry["reliability"]) == entry["n"] == 1200
    assert [e["name"] for e in found["rescue"]] == ["b rescues a", "c rescues b"]
    assert [e["n"] for e in found["rescue"]] == (1200 - samples.correct.sum(axis=0)[:2]).tolist()


def test_shuffled_outcomes_are_not_predicted() -> None:
    """Negative control: a leak between folds would find skill in labels that belong to other prompts."""
    samples = toy(900, 1)
    shuffled = np.random.default_rng(0).permutation(samples.correct)
    other = Samples("toy", "confidence", "USD", TIERS, samples.ids, shuffled, samples.score, samples.cost)
    for entry in validate_group(other, known(other), 0)["right"]:
        assert abs(entry["auroc"] - 0.5) < 0.07
        assert entry["r2"] <= 0.005


def test_chance_has_a_calibration_error_too() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(2000)
    band = by_chance(p, rng)
    assert calibration_error(p, rng.random(2000) < p) < 1.5 * band["p95"]
    assert calibration_error(p, rng.random(2000) < p**2) > 3 * band["p95"]  # overconfidence is seen
    assert by_chance(p[:500], rng)["mean"] == pytest.approx(2 * band["mean"], rel=0.35)  # as 1 / sqrt(n)


def test_reliability_adds_up() -> None:
    p, y = np.array([0.05, 0.95, 1.0, 0.97]), np.array([0.0, 1.0, 1.0, 0.0])
    assert reliability(p, y) == [
        {"predicted": 0.05, "observed": 0.0, "n": 1},
        {"predicted": pytest.approx(2.92 / 3), "observed": pytest.approx(2 / 3), "n": 3},
    ]


def test_command_line(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = written(tmp_path / "toy.csv", toy(120, 2))
    done = subprocess.run(
        [sys.executable, "-m", "tierwise", "validate", "quality", str(path), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "toy/t: 120 prompts" in done.stdout
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["by_group"][0]["n"] == 120
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 10_000
    (samples,) = read_quality(path)
    x = state_features(read_known(path, samples), 0b011)
    folder = tmp_path / "out" / "toy-t" / "after-2"
    assert len(json.loads((folder / "predictor.json").read_text())["features"]) == x.shape[1]
    assert load(folder)(x).shape == (120, 5)


def test_a_tier_that_is_never_wrong_is_no_trouble(tmp_path: Path) -> None:
    samples = toy(80, 0)
    samples.correct[:, 0] = 1.0
    (found,) = validate_quality(written(tmp_path / "toy.csv", samples))["by_group"]
    assert [e["name"] for e in found["rescue"]] == ["c rescues b"]
    assert found["right"][0]["auroc"] is None
    assert json.dumps(found, allow_nan=False)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`csv` must hold at least 50 prompts of toy/t; got 49"):
        validate_quality(written(tmp_path / "toy.csv", toy(49, 0)))
    with pytest.raises(InputError, match="`seed` must be at least 0"):
        validate_quality(tmp_path / "toy.csv", seed=-1)


@pytest.mark.skipif(not QUALITY.is_dir(), reason="the quality tables are not at hand")
def test_real_confidences_are_calibrated() -> None:
    """Target: pooled calibration error of at most 0.02 out of fold where there are at least 1000 prompts."""
    path = QUALITY / "zellinger_cascades.csv.gz"
    group = next(s for s in read_quality(path) if s.name == "mmlu/qwen_oai")
    found = validate_group(group, read_known(path, group), 1)
    assert found["n"] >= 1000
    assert found["ece"] <= 0.02 < 0.1 < found["ece_raw"]

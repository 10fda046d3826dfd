"""Features of a state: what ran and nothing else; conversations and texts that carry what scores do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from calibration.predictor import out_of_fold
from calibration.quality_features import (
    Known,
    conversation_features,
    read_known,
    state_features,
    state_names,
    text_features,
)
from calibration.quality_readers import read_quality
from theory.errors import InputError

TIERS = ("small", "large")


def known(n: int = 50, seed: int = 0) -> Known:
    rng = np.random.default_rng(seed)
    return Known(("x",), rng.normal(size=(n, 1)), rng.random((n, 2)), rng.integers(1, 300, (n, 2)).astype(float))


def test_a_tier_that_did_not_run_is_not_seen() -> None:
    first, other = known(), known()
    other.score[:, 1], other.length[:, 1] = 0.123, 7.0
    for ran in (0, 1):
        assert np.array_equal(state_features(first, ran), state_features(other, ran))
    assert not np.array_equal(state_features(first, 3), state_features(other, 3))  # it is, once it ran
    for ran, width in ((0, 1), (1, 4), (3, 7)):
        assert state_features(first, ran).shape == (50, len(state_names(first, ran, TIERS))) == (50, width)


def test_belief_sharpens_with_each_tier() -> None:
    """Two noisy looks at one difficulty: the state after both predicts better than after one, after one than before."""
    rng = np.random.default_rng(0)
    n = 1500
    ease = rng.normal(0, 2, n)
    right = (rng.random((n, 2)) < expit(ease[:, None] + (0.0, 1.0))).astype(float)
    score = expit(ease[:, None] + rng.normal(0, 2, (n, 2)))
    of = Known((), np.zeros((n, 0)), score, np.zeros((n, 0)))
    brier = [out_of_fold(state_features(of, ran), right, TIERS)[1]["small right"].brier for ran in (0, 1, 3)]
    assert brier[0] == pytest.approx(0.25, abs=0.01)
    assert brier[0] > brier[1] + 0.03 > brier[2] + 0.04


def test_a_conversation_is_remembered() -> None:
    """What was right in the turn before tells of this turn where prompts of a conversation share their difficulty."""
    rng = np.random.default_rng(0)
    n = 1500
    ease = rng.normal(0, 2, n)
    before, now = ((rng.random((n, 2)) < expit(ease[:, None] + (0.0, 1.0))).astype(float) for _ in range(2))
    tier = rng.integers(0, 2, n)
    x = conversation_features(np.full(n, 2), tier, before[np.arange(n), tier], 2)
    forgot = conversation_features(np.full(n, 2), tier, np.full(n, np.nan), 2)
    knows, not_told = (out_of_fold(f, now, TIERS)[1]["small right"].auroc for f in (x, forgot))
    assert knows > 0.65 > 0.56 > not_told


def test_text_predicts_where_words_matter() -> None:
    """A synthetic set: the quality tables at hand hold no prompts."""
    rng = np.random.default_rng(0)
    easy, hard, filler = ("add", "sum", "count"), ("prove", "integral", "manifold"), ("the", "of", "a", "to", "in")
    level = rng.random(600) < 0.5
    texts = [" ".join([*rng.choice(filler, 6), rng.choice(hard if h else easy)]) for h in level]
    right = (rng.random((600, 2)) < np.where(level, 0.3, 0.9)[:, None]).astype(float)
    words = out_of_fold(text_features(texts, 64), right, TIERS)[1]["small right"]
    shuffled = out_of_fold(text_features([*rng.permutation(texts)], 64), right, TIERS)[1]["small right"]
    assert words.auroc > 0.72 > 0.6 > shuffled.auroc
    assert words.r2 > 0.2


def test_hashing_is_the_same_everywhere() -> None:
    row = text_features(["Prove it, prove it"], 16)[0]
    assert np.linalg.norm(row) == pytest.approx(1.0)
    assert np.array_equal(row, text_features(["prove it prove IT"], 16)[0])
    assert not text_features([""], 16).any()


def quality_table(path: Path, **columns: object) -> Path:
    rows = [
        (f"p{i}", "toy", "t", m, 8, (i + k) % 2, -0.1 * (i % 5), 1.0 + k, 10 + i, 5 * k + i)
        for k, m in enumerate(("a", "b"))
        for i in range(6)
    ]
    names = ["sample_id", "dataset", "chain", "model", "params_b", "correct", "confidence_logprob", "cost_usd"]
    names += ["prompt_tokens", "output_tokens"]
    table = pd.DataFrame(rows, columns=names).sample(frac=1, random_state=0).assign(**columns)
    table.to_csv(path, index=False)
    return path


def test_read_in_the_order_of_the_samples(tmp_path: Path) -> None:
    path = quality_table(tmp_path / "q.csv", feature_one=3.5, prompt="add two")
    (samples,) = read_quality(path)
    found = read_known(path, samples)
    assert found.names[:2] == ("feature_one", "ln(1 + prompt_tokens)")
    assert found.covariates[:, 0].tolist() == [3.5] * 6
    assert np.allclose(np.expm1(found.covariates[:, 1]), 10 + np.arange(6))
    assert found.length.tolist() == [[i, 5 + i] for i in range(6)]
    assert len(found.names) == 2 + 128
    with pytest.raises(InputError, match=r"`feature_one` must be a finite number in q.csv, line \d+; got 'nan'"):
        read_known(quality_table(tmp_path / "q.csv", feature_one="nan"), samples)
    with pytest.raises(InputError, match=r"`prompt_tokens` must be at least 0 in q\.csv; got -3"):
        read_known(quality_table(tmp_path / "q.csv", prompt_tokens=-3), samples)


def test_refusals() -> None:
    with pytest.raises(InputError, match="`ran` must have bits among 2 tiers"):
        state_features(known(), 4)
    with pytest.raises(InputError, match="`covariates` must be finite"):
        known().joined(("y",), np.full(50, np.nan))
    with pytest.raises(InputError, match="`turn` must be at least 1"):
        conversation_features([0], [0], [1], 2)
    with pytest.raises(InputError, match=r"`last_tier` must lie in -1\.\.1"):
        conversation_features([1], [2], [1], 2)
    with pytest.raises(InputError, match="`last_right` must be 0, 1 or nan"):
        conversation_features([1], [1], [0.5], 2)
    with pytest.raises(InputError, match="`width` must be at least 1"):
        text_features(["a"], 0)

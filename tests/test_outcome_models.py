"""Calibration, levels, regression on scores and readers on outcomes whose law is known."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from calibration.outcome_models import (
    METHODS,
    best_calibrator,
    calibration_error,
    fit_calibrator,
    fit_score_model,
    fold_of,
    level_cuts,
    log_loss,
    smoothed_outcomes,
    to_levels,
)
from calibration.quality_readers import read_quality
from theory.errors import InputError


def scores(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return overconfident scores, outcomes, and the true P(right)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0.5, 1.5, n)
    truth = expit(0.6 * z - 0.3)
    return expit(z), (rng.random(n) < truth).astype(float), truth


@pytest.mark.parametrize("method", METHODS)
def test_calibration_recovers_the_law_on_other_prompts(method: str) -> None:
    s, y, _ = scores(6000, 0)
    new, outcome, truth = scores(6000, 1)
    p = fit_calibrator(s, y, method)(new)  # type: ignore[arg-type]
    assert np.abs(p - truth).mean() < 0.03
    assert calibration_error(p, outcome) < 0.03
    assert calibration_error(new, outcome) > 0.08  # the raw score fails


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(METHODS))
def test_calibrators_never_fall(seed: int, method: str) -> None:
    s, y, _ = scores(80, seed)
    p = fit_calibrator(s, y, method)(np.linspace(0, 1, 200))  # type: ignore[arg-type]
    assert (np.diff(p) >= -1e-12).all()
    assert 0 <= p.min() <= p.max() <= 1


def test_the_best_method_is_chosen_by_log_loss() -> None:
    rng = np.random.default_rng(0)
    s = rng.random(5000)
    y = (rng.random(5000) < np.where(s > 0.5, 0.9, 0.2)).astype(float)  # a step: only isotonic can follow
    assert best_calibrator(s, y, rng).method == "isotonic"
    s, y, _ = scores(400, 3)
    assert best_calibrator(s, y, rng).method != "isotonic"


def test_log_loss_of_a_fair_coin() -> None:
    assert log_loss(np.full(4, 0.5), np.array([0.0, 1, 1, 0])) == pytest.approx(np.log(2))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(2, 200))
def test_levels_share_the_prompts(seed: int, levels: int, n: int) -> None:
    s = np.random.default_rng(seed).random(n)
    level = to_levels(s, level_cuts(s, levels))
    assert level.max() < levels
    if n >= levels:
        count = np.bincount(level)
        assert len(count) == levels
        assert count.max() - count.min() <= 2
    assert (np.diff(level[np.argsort(s)]) >= 0).all()


def test_tied_scores_make_fewer_levels() -> None:
    assert len(level_cuts(np.array([0.0] * 50 + [1.0] * 50), 10)) == 1
    assert len(level_cuts(np.ones(5), 10)) == 0


def test_regression_on_all_scores_uses_the_other_tiers() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(8000, 2))
    truth = expit(0.5 + z @ np.array([[1.0, 0.6], [0.6, 1.0]]))
    y = (rng.random((8000, 2)) < truth).astype(float)
    own = fit_calibrator(expit(z[:, 0]), y[:, 0], "beta")(expit(z[:, 0]))
    model = fit_score_model(expit(z), y, degree=1)
    assert np.abs(model(expit(z)) - truth).mean() < 0.02
    assert np.abs(own - truth[:, 0]).mean() > 0.05


def test_smeared_levels_keep_shares_and_large_levels() -> None:
    level = np.array([[0]] * 5 + [[1]] * 5 + [[2]] * 90)
    table = smoothed_outcomes(("a",), np.full((100, 1), 0.5), level, levels=4, width=0.7)
    assert table.signal.sum(axis=2) == pytest.approx(1)
    assert table.signal[-1, 0, 2] > 0.95  # the tied level hardly leaks
    assert table.signal[:, 0, 3].max() == 0.0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 300), min_size=2, max_size=12).filter(lambda n: sum(n) > 0), st.floats(0.3, 4.0))
def test_smearing_moves_no_prompt_to_another_level_on_balance(counts: list[int], width: float) -> None:
    """The plan's cost is decided by how many prompts show a level: a kernel that shifts them promises another cost."""
    level = np.repeat(np.arange(len(counts)), counts)[:, None]
    table = smoothed_outcomes(("a",), np.full((len(level), 1), 0.5), level, len(counts), width)
    assert table.joint[0, 0] == pytest.approx(np.array(counts) / sum(counts), abs=1e-5)


def test_folds_are_even() -> None:
    assert sorted(np.bincount(fold_of(11, 3, np.random.default_rng(0))).tolist()) == [3, 4, 4]


# ---------------------------------------------------------------- readers

HEAD = "sample_id,dataset,split,chain,model,params_b,correct,confidence_logprob,prompt_tokens,output_tokens,cost_usd"


def confidence_file(folder: Path, rows: list[str]) -> Path:
    path = folder / "q.csv.gz"
    path.write_bytes(gzip.compress("\n".join([HEAD, *rows]).encode()))
    return path


ROWS = [
    "s1,mmlu,test,x,big,70,1,-0.1,10,1,0.02",
    "s2,mmlu,test,x,big,70,1,-inf,10,1,0.04",
    "s1,mmlu,test,x,small,8,0,-2.0,10,1,0.001",
    "s2,mmlu,test,x,small,8,1,-0.5,10,1,0.001",
]


def test_reader_orders_tiers_by_cost(tmp_path: Path) -> None:
    (group,) = read_quality(confidence_file(tmp_path, ROWS))
    assert (group.name, group.tiers, group.ids) == ("mmlu/x", ("small", "big"), ("s1", "s2"))
    assert group.correct.tolist() == [[0, 1], [1, 1]]
    assert group.price == pytest.approx([0.001, 0.03])
    assert group.score[1].tolist() == pytest.approx([np.exp(-0.5), 0.0])


def test_reader_of_lengths(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    head = "sample_id,dataset,model,params_b,correct,output_chars,output_words,source"
    path.write_text(f"{head}\na,g,m1,8,1,10,100,x\na,g,m2,64,0,10,300,x\n", encoding="utf-8")
    (group,) = read_quality(path, ["m2", "m1"])
    assert group.signal == "length"
    assert group.tiers == ("m1", "m2")
    assert group.price.tolist() == [1.0, 8.0]
    assert group.score.tolist() == [[0.5, 0.25]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("70,1,-0.1", "70,2,-0.1", r"`correct` must be 0 or 1 in q.csv.gz, line 2; got '2'"),
        ("-0.5", "0.5", r"`confidence_logprob` must be at most 0 .* line 5"),
        ("-0.5", "", r"`confidence_logprob` must be .* line 5; got ''"),
        ("0.04", "free", r"`cost_usd` must be at least 0 \[USD\] in q.csv.gz, line 3"),
        ("s2,mmlu,test,x,small", "s3,mmlu,test,x,small", r"`sample_id` must have a row for each of"),
        ("s2,mmlu,test,x,small", "s1,mmlu,test,x,small", r"`sample_id` must occur once per model in q.csv.gz, line 5"),
        ("confidence_logprob,", "confidence,", r"`output_words` must be a column"),
    ],
)
def test_reader_names_what_is_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = "\n".join([HEAD, *ROWS]).replace(old, new, 1)
    path = tmp_path / "q.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(InputError, match=message):
        read_quality(path)


def test_reader_refuses_what_is_no_table(tmp_path: Path) -> None:
    bad = tmp_path / "x.csv.gz"
    bad.write_bytes(b"not gzip")
    for path in (tmp_path / "absent.csv", bad):
        with pytest.raises(InputError, match="`csv` must"):
            read_quality(path)
    with pytest.raises(InputError, match="`tiers` must be models of one group"):
        read_quality(confidence_file(tmp_path, ROWS), ["small", "huge"])


def test_model_refusals() -> None:
    with pytest.raises(InputError, match="`score` must lie in"):
        fit_calibrator([2.0], [1], "platt")
    with pytest.raises(InputError, match="`width` must be above 0"):
        smoothed_outcomes(("a",), [[0.5]], [[0]], 2, 0.0)

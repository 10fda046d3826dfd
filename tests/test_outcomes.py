"""Joint outcomes: what the table says, how its signals are made, what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from theory.errors import InputError
from theory.outcomes import (
    Outcomes,
    accuracy,
    by_covariate,
    draw,
    draw_covariate,
    expected_by_signal,
    from_margins,
    from_patterns,
    from_samples,
    rescue,
    signal_auroc,
    union_accuracy,
    with_binormal_signal,
    with_covariate,
    with_verifier,
    without_covariate,
    without_signal,
)

TIERS = ("13b", "34b", "70b")
# Abel-13B, ToRA-Code-34B, ToRA-70B on the 1319 problems of the GSM8K test set; counted from the authors' own outputs
GSM8K = {"111": 771, "110": 29, "101": 49, "100": 27, "011": 229, "010": 33, "001": 63, "000": 118}
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "quality" / "gsm8k_tiers.csv.gz"


# ---------------------------------------------------------------- tables


def test_gsm8k_figures() -> None:
    table = from_patterns(TIERS, GSM8K)
    assert accuracy(table).round(3).tolist() == [0.664, 0.805, 0.843]
    assert rescue(table)[0, 1:].round(3).tolist() == [0.591, 0.659]
    assert round(union_accuracy(table), 3) == 0.911
    independent = 1 - float(np.prod(1 - accuracy(table)))
    assert round(independent, 3) == 0.990  # what independence would promise


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/quality/gsm8k_tiers.csv.gz")
def test_gsm8k_counts_are_those_of_the_outputs() -> None:
    models = ["abel-13b", "tora-code-34b", "tora-70b"]
    data = pd.read_csv(DATA)
    bits = data[data.model.isin(models)].pivot_table(index="sample_id", columns="model", values="correct")[models]
    counts = bits.astype(int).astype(str).agg("".join, axis=1).value_counts()
    assert {str(key): int(n) for key, n in counts.items()} == GSM8K


def test_rescue_is_conditional() -> None:
    table = from_patterns(("a", "b"), {"11": 0.5, "01": 0.3, "10": 0.1, "00": 0.1})
    assert rescue(table) == pytest.approx(np.array([[0, 0.75], [0.5, 0]]))


def test_a_tier_never_wrong_has_nothing_to_rescue_and_no_auroc() -> None:
    table = with_verifier(from_patterns(("a", "b"), {"11": 1, "10": 1}), 0.9, 0.2)
    assert np.isnan(rescue(table)[0]).all()
    assert np.isnan(signal_auroc(table)[0])
    assert signal_auroc(table)[1] == pytest.approx(0.85)


def test_samples_and_patterns_agree() -> None:
    rows = [[int(c) for c in pattern] for pattern, n in GSM8K.items() for _ in range(n)]
    samples = from_samples(TIERS, rows)
    table = from_patterns(TIERS, GSM8K)
    assert accuracy(samples) == pytest.approx(accuracy(table))
    assert union_accuracy(samples) == pytest.approx(union_accuracy(table))


def test_tables_cannot_be_changed() -> None:
    table = from_patterns(TIERS, GSM8K)
    with pytest.raises(ValueError, match="read-only"):
        table.weight[0] = 1.0


# ---------------------------------------------------------------- maximum entropy


def test_margins_are_met() -> None:
    table = from_margins(TIERS, (0.664, 0.805, 0.843), (0.591, 0.659), 0.911)
    assert accuracy(table) == pytest.approx([0.664, 0.805, 0.843])
    assert rescue(table)[0, 1:] == pytest.approx([0.591, 0.659])
    assert union_accuracy(table) == pytest.approx(0.911)


@pytest.mark.parametrize("step", [1e-3, -1e-3])
def test_no_table_with_the_same_margins_has_more_entropy(step: float) -> None:
    table = from_margins(TIERS, (0.664, 0.805, 0.843), (0.591, 0.659), 0.911)
    moved = table.weight.copy()
    sign = {(1, 1, 1): 1, (1, 1, 0): -1, (1, 0, 1): -1, (1, 0, 0): 1}  # the one direction that keeps all figures
    for i, row in enumerate(table.correct.astype(int).tolist()):
        moved[i] += step * sign.get(tuple(row), 0)
    entropy = [-float((w * np.log(w)).sum()) for w in (table.weight, moved)]
    other = Outcomes(TIERS, moved, table.correct, table.signal)
    assert accuracy(other) == pytest.approx(accuracy(table))
    assert union_accuracy(other) == pytest.approx(union_accuracy(table))
    assert entropy[0] > entropy[1]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_margins_of_a_table_independent_where_the_first_is_right_give_it_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, x, y = rng.uniform(0.05, 0.95, 3)
    wrong = rng.dirichlet(np.ones(4)) * (1 - a)
    cells = dict(zip(("011", "010", "001", "000"), wrong.tolist(), strict=True))
    cells |= {"111": a * x * y, "110": a * x * (1 - y), "101": a * (1 - x) * y, "100": a * (1 - x) * (1 - y)}
    table = from_patterns(TIERS, cells)
    again = from_margins(TIERS, accuracy(table).tolist(), rescue(table)[0, 1:].tolist(), union_accuracy(table))
    found = {"".join(str(int(c)) for c in row): w for row, w in zip(again.correct, again.weight, strict=True)}
    assert found == pytest.approx(cells, abs=1e-9)


def test_impossible_margins_are_refused_with_the_range() -> None:
    with pytest.raises(InputError, match=r"`union` must lie in \[0\.8854, 1\.0000\].*got 0\.87"):
        from_margins(TIERS, (0.664, 0.805, 0.843), (0.591, 0.659), 0.87)
    with pytest.raises(InputError, match=r"`accuracy` must lie in \[0\.1986, 0\.8626\] for tier 2.*got 0\.9"):
        from_margins(TIERS, (0.664, 0.9, 0.843), (0.591, 0.659), 0.911)


# ---------------------------------------------------------------- signals


def test_verifier_rates() -> None:
    table = with_verifier(from_patterns(("a", "b"), {"10": 1, "01": 1}), [0.9, 1.0], [0.2, 0.0])
    assert table.signal[0].tolist() == pytest.approx(np.array([[0.1, 0.9], [1.0, 0.0]]))
    assert table.signal[1].tolist() == pytest.approx(np.array([[0.8, 0.2], [0.0, 1.0]]))
    assert signal_auroc(table) == pytest.approx([(1 + 0.9 - 0.2) / 2, 1.0])


def test_levels_are_shown_equally_often() -> None:
    table = with_binormal_signal(from_patterns(TIERS, GSM8K), [0.65, 0.8, 0.95], 8)
    assert np.einsum("r,rkl->kl", table.weight, table.signal) == pytest.approx(np.full((3, 8), 1 / 8))


def test_fine_levels_keep_the_auroc_and_coarse_ones_lose_some() -> None:
    table = from_patterns(("a", "b"), {"11": 55, "10": 10, "01": 25, "00": 10})
    asked = np.array([0.7, 0.87])
    by_levels = np.array([signal_auroc(with_binormal_signal(table, asked, levels)) for levels in (2, 8, 32, 512)])
    assert np.all(np.diff(by_levels, axis=0) > 0)
    assert np.all(by_levels < asked)
    assert by_levels[-1] == pytest.approx(asked, abs=1e-4)


def test_auroc_one_half_says_nothing() -> None:
    table = with_binormal_signal(from_patterns(TIERS, GSM8K), 0.5, 4)
    assert table.signal == pytest.approx(np.full((8, 3, 4), 0.25))


def test_levels_of_drawn_normal_scores_agree_with_the_table() -> None:
    """Independent route: draw scores, cut them at their own empirical quantiles, count right answers per level."""
    table = from_patterns(("a",), {"1": 0.6, "0": 0.4})
    n, levels, rng = 200_000, 5, np.random.default_rng(7)
    right = rng.random(n) < 0.6
    score = rng.normal(size=n) + np.sqrt(2) * norm.ppf(0.8) * (right - 0.5)
    shown = np.searchsorted(np.quantile(score, np.arange(1, levels) / levels), score)
    per_level = np.bincount(shown, right, levels) / (n / levels)

    def inside(auroc: float) -> bool:
        mass, joint = with_binormal_signal(table, auroc, levels).joint
        spread = 3.9 * np.sqrt(0.25 / (n / levels))  # 99.99 %, over five levels
        return bool(np.all(np.abs(per_level - joint / mass) < spread))

    assert inside(0.8)
    assert not inside(0.78)  # the test can fail


def test_without_signal_forgets() -> None:
    table = with_verifier(from_patterns(TIERS, GSM8K), 0.9, 0.1)
    assert without_signal(table).levels == 1
    assert signal_auroc(without_signal(table)) == pytest.approx([0.5, 0.5, 0.5])


# ---------------------------------------------------------------- the joint law of signals


def random_outcomes(rng: np.random.Generator, tiers: int, levels: int, rows: int, one_hot: bool) -> Outcomes:
    correct = np.round(rng.random((rows, tiers)), 0 if rng.random() < 0.5 else 3)
    signal = rng.dirichlet(np.ones(levels), (rows, tiers))
    if one_hot:
        signal = np.eye(levels)[rng.integers(0, levels, (rows, tiers))]
    return Outcomes(tuple("abcd"[:tiers]), rng.dirichlet(np.ones(rows)), correct, signal)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_joint_is_the_sum_over_rows(seed: int, tiers: int, levels: int, one_hot: bool) -> None:
    rng = np.random.default_rng(seed)
    table = random_outcomes(rng, tiers, levels, int(rng.integers(1, 9)), one_hot)
    values, known = rng.random((len(table.weight), 2)), rng.dirichlet(np.ones(2), len(table.weight))
    table = replace(table, covariate=np.round(known) if one_hot else known)
    got = np.moveaxis(expected_by_signal(table, values), 0, -1)
    for code in itertools.product(range(2), *[range(levels)] * tiers):
        likelihood = np.prod([table.signal[:, k, level] for k, level in enumerate(code[1:])], axis=0)
        likelihood = likelihood * table.covariate[:, code[0]]
        assert got[code] == pytest.approx((table.weight * likelihood) @ values, abs=1e-12)


def test_drawn_rows_and_levels_follow_the_table() -> None:
    table = with_verifier(from_patterns(("a", "b"), {"11": 5, "01": 3, "00": 2}), 0.8, 0.3)
    n = 50_000
    row, level = draw(table, n, np.random.default_rng(3))
    seen = int(np.sum((row == 1) & (level[:, 0] == 1) & (level[:, 1] == 0)))
    low, high = binom.interval(0.999, n, 0.3 * 0.3 * 0.2)
    assert low <= seen <= high
    assert not low <= np.sum(row == 1) * 0.3 * 0.3 <= high  # with the two tiers' rates confused it fails


# ---------------------------------------------------------------- what is known beforehand


def test_a_covariate_splits_the_table_and_can_be_forgotten() -> None:
    rng = np.random.default_rng(2)
    tables = [random_outcomes(rng, 2, 3, 4, one_hot) for one_hot in (True, False)]
    both = by_covariate(tables, [0.25, 0.75])
    for x, share in enumerate((0.25, 0.75)):
        assert both.joint[:, x] == pytest.approx(share * tables[x].joint[:, 0])
    assert without_covariate(both).joint[:, 0] == pytest.approx(both.joint.sum(axis=1))
    assert without_signal(both).covariates == 2
    value = np.repeat([0, 1], [4, 4])
    assert with_covariate(without_covariate(both), value).joint == pytest.approx(both.joint)


def test_drawn_covariates_follow_the_rows() -> None:
    table = replace(from_patterns(("a",), {"1": 0.5, "0": 0.5}), covariate=np.array([[0.2, 0.8], [0.9, 0.1]]))
    row = np.repeat([0, 1], 20_000)
    known = draw_covariate(table, row, np.random.default_rng(1))
    for r, p in ((0, 0.8), (1, 0.1)):
        low, high = binom.interval(0.999, 20_000, p)
        assert low <= known[row == r].sum() <= high
        assert not low <= known[row != r].sum() <= high


# ---------------------------------------------------------------- refusals


def build(**changes: object) -> Outcomes:
    fields: dict[str, object] = {
        "tiers": ("a", "b"),
        "weight": [0.5, 0.5],
        "correct": [[1, 0], [1, 1]],
        "signal": np.ones((2, 2, 1)),
    }
    return Outcomes(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(weight=[0.5, 0.6]), r"`weight` must add up to 1 \[-\]; got 1\.1"),
        (lambda: build(weight=[0.5, np.nan]), r"`weight` must be finite; got nan"),
        (lambda: build(weight=[1.0]), r"`correct` must have shape \(rows, tiers\) = \(1, 2\)"),
        (lambda: build(correct=[[80, 0], [1, 1]]), r"`correct` must lie in \[0, 1\].*got 80\.0.*pass 0\.8, not 80"),
        (lambda: build(signal=np.full((2, 2, 2), 0.4)), r"`signal` must add up to 1 over the levels \[-\]; got 0\.8"),
        (lambda: build(signal=np.stack([np.full((2, 2), 2.0), np.full((2, 2), -1.0)], 2)), r"at least 0 .* got -1\.0"),
        (lambda: build(signal=np.ones((2, 2))), r"`signal` must have shape .* \+ \(levels,\); got \(2, 2\)"),
        (lambda: build(signal=np.full((2, 2, 4096), 1 / 4096)), r"at most 4194304 states.*Use fewer levels"),
        (lambda: build(tiers=("a", "a")), r"`tiers` must be different names"),
        (lambda: build(tiers=tuple("abcde")), r"`tiers` must be 1 to 4 names"),
        (lambda: from_patterns(("a",), {}), r"must name at least one pattern"),
        (lambda: from_patterns(("a",), {"1": 0.5, "x": 0.5}), r"keys of 1 characters 0 or 1; got 'x'"),
        (lambda: from_patterns(("a",), {"1": 0.5, "0": 0.4}), r"`weight` must add up to 1 .*Divide by the sum"),
        (lambda: from_patterns(("a",), {"1": 5, "0": -4}), r"`weight` must lie in \[0, 1\]"),
        (lambda: from_samples(("a",), [1, 0]), r"`correct` must have shape \(prompts, tiers\); got \(2,\)"),
        (lambda: from_samples(("a",), [[1], [0]], [[0.5], [1.0]]), r"`signal_level` must hold integers"),
        (lambda: from_samples(("a",), [[1], [0]], [[0], [2]], levels=2), r"must be below `levels` = 2; got 2"),
        (lambda: from_samples(("a",), [[1], [0]], [[0, 1]]), r"`signal_level` must have shape \(2, 1\)"),
        (lambda: with_binormal_signal(build(), 80, 4), r"`auroc` must lie in \[0\.5, 1\)"),
        (lambda: with_binormal_signal(build(), 1.0, 4), r"use with_verifier\(outcomes, 1, 0\) for a perfect one"),
        (lambda: with_binormal_signal(build(), 0.8, 1), r"`levels` must be an integer of at least 2"),
        (lambda: with_verifier(build(correct=[[0.5, 0], [1, 1]]), 1, 0), r"must have `correct` 0 or 1 in every row"),
        (lambda: build(covariate=np.full((2, 2), 0.4)), r"`covariate` must add up to 1 over its values .*got 0\.8"),
        (lambda: build(covariate=np.ones((3, 1))), r"`covariate` must have shape \(2, values\); got \(3, 1\)"),
        (lambda: with_covariate(build(), [0, 0.5]), r"`value` must hold integers in 0\.\.0; got 0\.5"),
        (lambda: by_covariate([build()], [0.5, 0.5]), r"`share` must have 1 entries; got 2"),
        (lambda: by_covariate([build(), build(tiers=("b", "a"))], [0.5, 0.5]), r"`tables` must all have the tiers"),
        (lambda: with_verifier(build(), 90, 0), r"`sensitivity` must lie in \[0, 1\] \[-\]; got 90"),
    ],
)
def test_refusals(make: Callable[[], Outcomes], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()

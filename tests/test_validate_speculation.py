"""Validation of published speculation: definitions converted, nothing guessed, nothing circular; and the real file."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from calibration.speculation import RULES, TEXT, read_published, validate_speculation, verify_width
from theory.errors import InputError
from theory.speculation import speedup, tokens_per_round

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "speculation" / "published_speculation.csv"
COLUMNS = [*TEXT, *RULES]
FRACTION = "alpha_def=frac_accepted_of_drafted; mal_def=incl_bonus"
VERIFY = ["source", "hardware", "model", "batch_size", "n_query_tokens", "ratio_vs_1", "notes"]


def row(**cells: Any) -> dict[str, Any]:
    """Return a made-up row of a chain whose numbers follow theory: alpha 0.8, gamma 4, c 0.1."""
    base = {
        "source": "made up",
        "source_locator": "run 1",
        "hardware": "gpu",
        "target_model": "large",
        "draft_model": "small",
        "method": "draft-model",
        "batch_size": 1,
        "gamma": 4,
        "mean_accepted_len": float(tokens_per_round(0.8, 4)),
        "t_draft_ms": 2,
        "t_target_ms": 20,
        "speedup": float(speedup(0.8, 4, target=1.0, verify=1.0, draft=0.1)),
        "notes": "mal_def=incl_bonus",
    }
    return base | cells


def write(path: Path, rows: list[dict[str, Any]], columns: list[str] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def check(tmp_path: Path) -> Any:
    def run(*rows: dict[str, Any], verify: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        if verify is not None:
            write(tmp_path / "verify_latency.csv", verify, VERIFY)
        return validate_speculation(write(tmp_path / "rows.csv", list(rows)))

    return run


def reasons(result: dict[str, Any], model: str) -> dict[str, int]:
    return {r["reason"]: r["rows"] for r in result["skipped"][model]}


# --- the time model --------------------------------------------------------------------------------------------------


def test_rows_made_by_the_formula_are_predicted_exactly(check: Any) -> None:
    result = check(row(), row(gamma=7, mean_accepted_len=3, speedup=3 / 1.7))
    assert result["time_model"]["n"] == 2
    assert result["time_model"]["mape"] == pytest.approx(0.0, abs=1e-6)


def test_a_wrong_draft_time_shows(check: Any) -> None:
    """Negative control: a validation that cannot fail is a defect."""
    assert check(row(t_draft_ms=4))["time_model"]["bias"] == pytest.approx(1.4 / 1.8 - 1, abs=1e-6)


def test_a_bonus_token_that_is_not_counted_is_added(check: Any) -> None:
    tokens = float(tokens_per_round(0.8, 4))
    result = check(row(mean_accepted_len=tokens - 1, notes="mal_def=excl_bonus"))
    assert result["time_model"]["mape"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("counted", [0, 1])
def test_silent_notes_are_settled_by_the_accepted_fraction(check: Any, counted: int) -> None:
    tokens = float(tokens_per_round(0.8, 4))
    fraction = (tokens - 1) / 4
    silent = row(mean_accepted_len=tokens - 1 + counted, alpha=fraction, notes="alpha_def=frac_accepted_of_drafted")
    assert check(silent)["time_model"]["mape"] == pytest.approx(0.0, abs=1e-6)


def test_silent_notes_without_a_fraction_are_not_guessed(check: Any) -> None:
    result = check(row(notes=""))
    assert result["time_model"] == {
        "n": 0,
        "mape": None,
        "median_ape": None,
        "bias": None,
        "p90_ape": None,
        "worst_ape": None,
        "by_verification": result["time_model"]["by_verification"],
    }
    assert reasons(result, "time_model") == {
        "the notes do not say whether the accepted length includes the bonus token": 1
    }


def test_a_fraction_alone_gives_the_length(check: Any) -> None:
    fraction = (float(tokens_per_round(0.8, 4)) - 1) / 4
    result = check(row(mean_accepted_len="", alpha=fraction, notes=FRACTION))
    assert result["time_model"]["mape"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "cells",
    [
        {"method": "ngram"},
        {"notes": FRACTION + "; drafts per generated token=0.5"},
        {"notes": "alpha_def=iid_per_token"},
    ],
)
def test_a_fraction_of_rounds_that_do_not_all_draft_gives_none(check: Any, cells: dict[str, Any]) -> None:
    given = {"mean_accepted_len": "", "alpha": 0.6, "notes": FRACTION} | cells
    assert check(row(**given))["time_model"]["n"] == 0


def test_throughputs_stand_in_for_a_speedup(check: Any) -> None:
    expected = float(speedup(0.8, 4, target=1.0, verify=1.0, draft=0.1))
    result = check(row(speedup="", baseline_tok_s=10, sd_tok_s=10 * expected))
    assert result["time_model"]["mape"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"t_draft_ms": ""}, "no draft step time"),
        ({"t_target_ms": ""}, "no target step time"),
        ({"gamma": ""}, "no length"),
        ({"speedup": ""}, "no measured speed-up"),
        ({"mean_accepted_len": ""}, "no accepted length, nor a fraction to derive it from"),
        ({"method": "parallel SD (PEARL)"}, "the draft runs beside the verification"),
        ({"method": "3-tier (staged)"}, "more than one draft: one step time does not describe the round"),
    ],
)
def test_rows_without_what_is_needed_are_counted_with_the_reason(
    check: Any, cells: dict[str, Any], reason: str
) -> None:
    result = check(row(), row(**cells))
    assert result["time_model"]["n"] == 1
    assert result["skipped"]["time_model"] == [{"reason": reason, "rows": 1, "lines": "3"}]


def test_methods_that_draft_at_once_pay_one_draft_step(check: Any) -> None:
    assert check(row(method="pard", speedup=3.3616 / 1.1))["time_model"]["mape"] == pytest.approx(0.0, abs=1e-4)


def curve(*points: tuple[int, float], **cells: Any) -> list[dict[str, Any]]:
    base = {"source": "made up", "hardware": "not stated", "model": "LARGE", "batch_size": 1}
    return [base | {"n_query_tokens": n, "ratio_vs_1": r} | cells for n, r in points]


def test_verify_times_of_the_same_source_are_used(check: Any) -> None:
    measured = row(speedup=float(speedup(0.8, 4, target=1.0, verify=1.25, draft=0.1)))
    result = check(measured, verify=curve((1, 1.0), (4, 1.2), (6, 1.3)))
    assert result["time_model"]["by_verification"]["measured"]["n"] == 1
    assert result["time_model"]["mape"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "verify",
    [
        curve((1, 1.0), (5, 1.3), source="other"),
        curve((1, 1.0), (5, 1.3), model="other"),
        curve((1, 1.0), (5, 1.3), hardware="other"),
        curve((1, 1.0), (5, 1.3), batch_size=8),
        curve((1, 1.0), (5, 1.3), notes="whole speculative cycle cost"),
        curve((1, 1.0), (16, 1.8)),  # too far apart to interpolate
        curve((1, 1.0), (4, 1.2)),  # too narrow
    ],
)
def test_verify_times_that_do_not_belong_are_not_used(check: Any, verify: list[dict[str, Any]]) -> None:
    result = check(row(), verify=verify)
    assert result["time_model"]["by_verification"]["measured"]["n"] == 0
    assert result["time_model"]["mape"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "notes", "width"),
    [
        ("draft-model", "", 5),
        ("tree-draft (sequoia)", "tree size=128 depth=4", 128),
        ("tree-draft (specinfer)", "SpecInfer 5x8 independent sequences x depth", 41),
    ],
)
def test_width_of_a_verify_pass(tmp_path: Path, method: str, notes: str, width: int) -> None:
    table = read_published(write(tmp_path / "rows.csv", [row(method=method, notes=notes)]))
    assert verify_width(table.iloc[0]) == width


# --- the length model ------------------------------------------------------------------------------------------------


def test_lengths_of_a_series_are_predicted_from_its_shortest(check: Any) -> None:
    rows = [
        row(gamma=g, mean_accepted_len=float(tokens_per_round(0.8, g)), source_locator=f"run {g}") for g in (8, 2, 4)
    ]
    result = check(*rows)
    assert result["length_model"]["n"] == 2
    assert result["length_model"]["mape"] == pytest.approx(0.0, abs=1e-6)
    assert reasons(result, "length_model") == {"gives the acceptance of its series": 1}


def test_a_decaying_acceptance_shows(check: Any) -> None:
    """Negative control: positions .8, .4, .2 are no constant acceptance."""
    result = check(row(gamma=1, mean_accepted_len=1.8), row(gamma=3, mean_accepted_len=1 + 0.8 + 0.32 + 0.064))
    assert result["length_model"]["bias"] > 0.3


def test_an_acceptance_measured_token_by_token_is_used_for_its_own_row(check: Any) -> None:
    result = check(row(alpha=0.8, notes="alpha_def=iid_per_token; mal_def=incl_bonus"))
    assert result["length_model"]["n"] == 1
    assert result["length_model"]["mape"] == pytest.approx(0.0, abs=1e-6)


def test_an_accepted_fraction_is_no_test_of_its_own_row(check: Any) -> None:
    fraction = (float(tokens_per_round(0.8, 4)) - 1) / 4
    result = check(row(alpha=fraction, notes=FRACTION))
    assert result["length_model"]["n"] == 0
    assert result["length_identity"]["n"] == 1
    assert result["length_identity"]["mape"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([row(gamma=2.5)], "no whole draft length of at least 1"),
        ([row(method="tree-draft")], "a tree, not a chain: one acceptance does not describe it"),
        ([row(mean_accepted_len=6)], "more tokens than a chain of that length can emit, or fewer than one"),
        ([row()], "no other draft length in its series"),
        ([row(), row(), row(gamma=2, mean_accepted_len=2)], "several rows of its series have the same draft length"),
        ([row(), row(gamma=2, mean_accepted_len=2, dataset="other")], "no other draft length in its series"),
    ],
)
def test_rows_that_say_nothing_about_lengths_are_counted(check: Any, rows: list[dict[str, Any]], reason: str) -> None:
    result = check(*rows)
    assert result["length_model"]["n"] == 0
    assert reasons(result, "length_model") == {reason: len(rows)}


# --- the report ------------------------------------------------------------------------------------------------------


def test_keys_of_the_report(check: Any) -> None:
    result = check(row(), row(gamma=2, mean_accepted_len=2.44, source="another"))
    assert {"time_model", "length_model", "by_group", "worst"} <= set(result)
    assert {"n", "mape", "median_ape", "bias", "p90_ape"} <= set(result["time_model"])
    assert [(g["model"], g["source"], g["method"], g["n"]) for g in result["by_group"]] == [
        ("time", "another", "draft-model", 1),
        ("time", "made up", "draft-model", 1),
    ]
    assert result["rows"] == 2
    json.dumps(result, allow_nan=False)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`csv` must be a readable CSV file"):
        validate_speculation(tmp_path / "absent.csv")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"`csv` must hold CSV"):
        validate_speculation(tmp_path / "rows.csv")


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    path = write(tmp_path / "rows.csv", [], [c for c in COLUMNS if c != column])
    with pytest.raises(InputError, match=f"`{column}` must be a column of rows.csv"):
        validate_speculation(path)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"alpha": 80}, r"`alpha` must be in \[0, 1\] \[-\] in rows.csv, line 2; got '80'.*write 0.64, not 64"),
        ({"t_draft_ms": 0}, r"`t_draft_ms` must be above 0 \[ms\] in rows.csv, line 2; got '0'.*Leave unknown"),
        ({"speedup": "about 2"}, r"`speedup` must be above 0 .*got 'about 2'"),
        ({"gamma": -1}, r"`gamma` must be at least 0 \[tokens\]"),
        ({"t_target_ms": "inf"}, r"`t_target_ms` must be above 0"),
    ],
)
def test_values_no_measurement_has_are_refused(check: Any, cells: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(row(**cells))


# --- the published rows ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_file(), reason="published_speculation.csv is not beside the repository")
def test_published_rows() -> None:
    result = validate_speculation(DATA)
    assert result["time_model"]["n"] == 28
    assert result["time_model"]["median_ape"] <= 0.05
    assert result["length_model"]["n"] >= 80
    assert result["length_model"]["median_ape"] <= 0.05
    assert result["length_identity"]["median_ape"] <= 0.01
    for model in ("time_model", "length_model"):
        assert result[model]["n"] + sum(r["rows"] for r in result["skipped"][model]) == result["rows"]

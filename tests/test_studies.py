"""Studies keep one shape, say what their numbers say, and are noticed when a number no longer holds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from studies import check, index
from studies.study import Bar, Study, Validation, folders, in_words, load, text

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = folders()
NAMES = [folder.name for folder in FOLDERS]
CHEAP = "seed_lambda_grid"  # computed in a second, without data


@cache
def study(folder: Path) -> Study | None:
    """Return the study of a folder, loaded once."""
    return load(folder)


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a script of the studies as a user does."""
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, check=False, cwd=cwd)


# --- the shape of every study ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_help_is_answered(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = study(folder)
    if found is None:
        assert run(str(folder / "run.py"), "--help").returncode == 0
        return
    with pytest.raises(SystemExit) as left:
        found.main(["--help"])
    assert left.value.code == 0
    assert found.doc.splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_data_that_are_not_there_are_refused_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = study(folder)
    if found is None:  # not of the shared shape: it must leave with 2 all the same
        done = run(str(folder / "run.py"), "--data", "nowhere", "--trace", "nowhere")
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return
    option = "--data" if found.data is None else found.data.option
    try:
        code: Any = found.main([option, "nowhere"])
    except SystemExit as left:  # the study takes no data
        code = left.code
    said = capsys.readouterr()
    assert code == 2
    assert said.err.count("\n") == 1
    assert option in said.err
    assert said.out == ""


@pytest.mark.parametrize("folder", [f for f in FOLDERS if (f / "verdict.json").is_file()], ids=lambda f: f.name)
def test_page_and_verdict_follow_from_the_numbers(folder: Path) -> None:
    found = study(folder)
    assert found is not None
    assert list(check.stale(found)) == []


@pytest.mark.parametrize("folder", [f for f in FOLDERS if (f / "verdict.json").is_file()], ids=lambda f: f.name)
def test_command_of_the_index_is_the_one_of_the_page(folder: Path) -> None:
    command = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))["command"].split(" [")[0]
    assert command in (folder / "README.md").read_text(encoding="utf-8")
    assert command.split(" -")[0] in (folder / "run.py").read_text(encoding="utf-8")


def test_missing_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = study(ROOT / "studies" / "latency_knee")
    assert found is not None
    assert found.main(["--data", str(tmp_path)]) == 2
    assert "`--data` must be a folder with aiconfigurator, speculation" in capsys.readouterr().err
    assert found.main([]) == 2
    assert "got None" in capsys.readouterr().err


# --- a run, in a folder of its own -----------------------------------------------------------------------------------


def test_command_runs_from_anywhere_and_writes_three_files(tmp_path: Path) -> None:
    path = ROOT / "studies" / CHEAP
    done = run(str(path / "run.py"), "--output", str(tmp_path / "out"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"README.md", "result.json", "verdict.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    said, kept = (json.loads((f / "verdict.json").read_text()) for f in (tmp_path / "out", path))
    assert said["bars"] == kept["bars"]
    assert set(said["versions"]) >= {"python", "numpy"}


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    found = study(ROOT / "studies" / CHEAP)
    assert found is not None
    assert found.main(["--output", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unexpected_bar_is_an_error(tmp_path: Path) -> None:
    def made(expected: dict[str, bool] | None, *, quick_judged: bool = True) -> Study:
        return Study(
            str(tmp_path / "run.py"),
            "Claim: one.",
            lambda _: {"verdicts": {"one": False}},
            lambda result: f"# One\n\n{result}\n",
            lambda _: "1",
            expected=expected,
            quick_judged=quick_judged,
        )

    assert made(None).main([]) == 1
    assert made({"one": False}).main([]) == 0
    assert made({"one": True}).main([]) == 1
    assert made({"one": True}, quick_judged=False).main(["--quick"]) == 0
    assert json.loads((tmp_path / "verdict.json").read_text())["claim"] == "One"
    (tmp_path / "result.json").write_text('{"verdicts": {"one": true}}')
    assert made(None).main(["--from-results"]) == 0
    assert json.loads((tmp_path / "verdict.json").read_text())["verdict"] == "holds"


@pytest.mark.parametrize(
    ("holds", "said"),
    [
        ([], "no bar"),
        ([True, True], "holds"),
        ([False], "missed"),
        ([True, False, None], "1 of 2 hold, 1 not judged"),
        ([None], "none judged, 1 not judged"),
    ],
)
def test_verdict_in_words(holds: list[bool | None], said: str) -> None:
    assert in_words([Bar(str(k), h) for k, h in enumerate(holds)]) == said


def test_validation_of_errors() -> None:
    row = Validation.errors([0.1, -0.3], "kernels", "a", "b", "c")
    assert (row.n, row.error, row.worst) == (2, pytest.approx(0.2), 0.3)
    assert row.bias == pytest.approx(-0.1)


def test_numbers_that_json_lacks_become_null() -> None:
    assert json.loads(text({1: float("nan"), "a": [float("inf"), True]})) == {"1": None, "a": [None, True]}


# --- the pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", index.PAGES)
def test_pages_are_current(name: str) -> None:
    found = [index.read(folder) for folder in FOLDERS]
    assert (ROOT / name).read_text(encoding="utf-8") == index.PAGES[name](found), "run python studies/index.py"


def test_readme_has_the_block() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(index.BEGIN) == readme.count(index.END) == 1


def test_index_lists_a_folder_that_has_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "new_one").mkdir()
    (tmp_path / "new_one" / "run.py").write_text('"""Claim: it is so.\n\nMore.\n"""\n')
    (folder,) = folders(tmp_path)
    page = index.listing([index.read(folder)])
    assert "| it is so | not recorded | not recorded | - | not recorded | `python studies/new_one/run.py` |" in page


def test_accuracy_speaks_of_every_part() -> None:
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    for subject in index.SECTIONS:
        assert f"\n## {subject[0].upper()}{subject[1:]}\n" in page


# --- committed numbers that no longer hold ---------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Return a folder of studies that holds a copy of one of them."""
    shutil.copytree(ROOT / "studies" / CHEAP, tmp_path / "studies" / CHEAP)
    return tmp_path / "studies"


def test_check_holds_and_changes_nothing(copied: Path) -> None:
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    done = run(str(ROOT / "studies" / "check.py"), "--studies", str(copied))
    assert done.returncode == 0, done.stdout
    assert f"{CHEAP}: holds" in done.stdout
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file() and "__pycache__" not in p.parts} == before


def test_check_notices_a_number_that_was_changed(copied: Path) -> None:
    path = copied / CHEAP / "result.json"
    result = json.loads(path.read_text())
    result["union"] *= 1.01
    path.write_text(text(result))
    done = run(str(ROOT / "studies" / "check.py"), "--studies", str(copied))
    assert done.returncode == 1
    assert f"/union: {result['union']!r} is committed" in done.stdout


def test_check_notices_a_page_that_was_edited(copied: Path) -> None:
    path = copied / CHEAP / "README.md"
    path.write_text(path.read_text().replace("59 %", "69 %"))
    found = load(copied / CHEAP)
    assert found is not None
    assert [line for line in check.stale(found) if line.startswith("README.md does not follow")]


def test_times_are_not_compared_and_tolerances_are_kept() -> None:
    found = study(ROOT / "studies" / "frontier_speed")
    assert found is not None
    assert list(check.differences({"seconds": 1.0}, {"seconds": 2.0}, found)) == []
    assert list(check.differences({"vertices": [101]}, {"vertices": [102]}, found)) != []
    assert list(check.differences({"area": 1.0}, {"area": 1.0005}, found)) == []
    assert list(check.differences({"area": 1.0}, {"area": 1.002}, found)) != []
    assert list(check.differences({"area": 1.0}, {}, found)) != []
    assert list(check.differences({"holds": True}, {"holds": False}, found)) != []


def test_studies_without_their_data_are_skipped_with_the_reason(tmp_path: Path) -> None:
    found = study(ROOT / "studies" / "latency_knee")
    assert found is not None
    assert check.why_not(found, None) == "needs aiconfigurator, speculation in --data"
    assert check.why_not(found, tmp_path) == "needs aiconfigurator, speculation in --data"
    for name in found.data.files if found.data else ():
        (tmp_path / name).mkdir()
    assert check.why_not(found, tmp_path) == ""

"""Python for people: what the verbs return, how a notebook draws it, and the types a user's checker sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tierwise as tw

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def result() -> tw.Result:
    h100 = tw.accelerator("h100-sxm")
    target = tw.Deployment(tw.model("llama-2-70b"), h100, tp=4)
    draft = tw.DraftModel(tw.model("llama-2-7b"), tw.Acceptance(0.8, 0.75, 0.85, "assumed", "an example"), tp=4)
    return tw.predict(target, tw.serving_profile(h100), draft, batch=8, context=1024)


def test_a_result_is_the_dictionary_that_json_prints(result: tw.Result) -> None:
    words = "predict --target llama-2-70b --draft llama-2-7b --accelerator h100-sxm --tp 4 --draft-tp 4 --batch 8"
    command = [sys.executable, "-m", "tierwise", *words.split(), "--acceptance", "0.8", "--format", "json"]
    command += ["--acceptance-interval", "0.75", "0.85"]
    printed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    printed["acceptance"]["source"] = "an example"
    assert json.loads(json.dumps(result)) == printed
    assert isinstance(result, dict)


def test_rows_are_frames(result: tw.Result) -> None:
    assert result.frames == ("by_draft_length",)
    frame = result.frame("by_draft_length")
    assert frame["speedup"].tolist() == [row["speedup"] for row in result["by_draft_length"]]
    with pytest.raises(tw.InputError, match=r"`key` must be one of by_draft_length; got 'speedup'"):
        result.frame("speedup")


def test_a_notebook_shows_what_the_command_line_prints(result: tw.Result, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = result._repr_html_()
    assert not capsys.readouterr().out  # nothing is printed besides
    assert drawn.count("<table>") == 2
    assert "<caption" in drawn
    for row in result["by_draft_length"]:
        assert f"{row['speedup']:.2f}" in drawn
    assert "&lt;- best" in drawn  # escaped, not interpreted


@pytest.mark.parametrize("verb", [tw.draft])
def test_bold_and_brackets(verb: Any) -> None:
    drawn = verb(70e9, 2e12, 1e11)._repr_html_()
    assert "<b>" in drawn
    assert "[bold]" not in drawn


NOTEBOOK = (
    """
import tierwise as tw
one = "deployment={tiers: [{tier: 70b, tp: 4, draft: tinyllama-1.1b}]}"
run = tw.simulate(set=[one, "traffic.rate=3", "traffic.requests=2000"])
run
""",
    """
run.frame("tiers")[["name", "share", "mean_batch"]]
""",
    """
tw.draft(70e9, 2e12, 1e11)
""",
)


def test_a_notebook_runs(tmp_path: Path) -> None:
    pytest.importorskip("nbconvert", reason="the test extra is not installed")
    pytest.importorskip("ipykernel", reason="the test extra is not installed")
    cells = [
        {
            "cell_type": "code",
            "id": f"c{i}",
            "metadata": {},
            "execution_count": None,
            "outputs": [],
            "source": cell.strip(),
        }
        for i, cell in enumerate(NOTEBOOK)
    ]
    book = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "book.ipynb").write_text(json.dumps(book))
    words = ["-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", str(tmp_path / "book.ipynb")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600, check=False, env=env)
    assert done.returncode == 0, done.stderr
    outputs = [cell["outputs"] for cell in json.loads((tmp_path / "book.ipynb").read_text())["cells"]]
    drawn = ["".join(out["data"]["text/html"]) for cell in outputs for out in cell if "data" in out]
    assert len(drawn) == 3
    assert "Latency" in drawn[0]
    assert "dataframe" in drawn[1]


USER = """
import tierwise as tw

h100: tw.Accelerator = tw.accelerator("h100-sxm")
target = tw.Deployment(tw.model("llama-2-70b"), h100, tp=4)
draft = tw.DraftModel(tw.model("llama-2-7b"), tw.Acceptance(0.8, 0.75, 0.85, "assumed", "an example"), tp=4)
found: tw.Result = tw.predict(target, tw.serving_profile(h100), draft, batch=8)
speed: float = found["speedup"]
rows = found.frame("by_draft_length")
plan: tw.Result = tw.plan(set=["traffic.rate=4"])
reveal_type(tw.speedup)
"""


def test_a_users_script_is_typed(tmp_path: Path) -> None:
    """mypy --strict knows every name, and objects to a wrong argument."""
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text('import tierwise as tw\n\ntw.draft("70B", 2e12, 1e11)\n')
    words = ["-m", "mypy", "--strict", "--no-error-summary", str(tmp_path / "user.py"), str(tmp_path / "wrong.py")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout + done.stderr
    assert "wrong.py" in errors[0]
    assert '"str"; expected "float"' in errors[0]
    assert "def (acceptance:" in done.stdout  # the type that was asked for, not Any

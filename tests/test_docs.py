"""The documentation is true and complete: pages run as printed, references are current, the site builds in silence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner.scenario import Scenario, json_schema, shipped_scenarios

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [
    p for p in sorted(DOCS.rglob("*.md")) if re.search(r"^(<!-- run|```python)", p.read_text("utf-8"), re.MULTILINE)
]
PACKAGES = ("theory", "simulator", "calibration", "planner", "tierwise")
SHOWN_ELSEWHERE = {"tierwise.cli", "tierwise.show"}  # the command line has its own page


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=cwd, env=env)


# --- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_as_printed(page: Path) -> None:
    done = run(str(DOCS / "tools" / "printed.py"), "--check", str(page))
    assert done.returncode == 0, done.stderr


def test_a_wrong_number_on_a_page_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(100.0, 'tokens')\n```\n\n```text\n103.0 tokens\n```\n")
    done = run(str(DOCS / "tools" / "printed.py"), "--check", str(page))
    assert done.returncode == 1
    assert "prints something else now" in done.stderr
    page.write_text(page.read_text().replace("103.0", "101.0"))
    assert run(str(DOCS / "tools" / "printed.py"), "--check", str(page)).returncode == 0


def test_what_comes_from_the_code_is_current() -> None:
    done = run(str(DOCS / "tools" / "reference.py"), "--check")
    assert done.returncode == 0, done.stderr


# --- the scenario ----------------------------------------------------------------------------------------------------


def mappings() -> Iterator[tuple[str, dict[str, Any]]]:
    schema = json_schema()
    yield "Scenario", schema
    yield from schema["$defs"].items()


@pytest.mark.parametrize(("name", "schema"), list(mappings()), ids=lambda x: x if isinstance(x, str) else "")
def test_every_key_of_the_scenario_says_what_it_means(name: str, schema: dict[str, Any]) -> None:
    """With its unit where it is a number that has one; a mapping may leave that to its own description."""
    assert schema["description"], name
    for key, rule in schema["properties"].items():
        said = rule.get("description", "")
        assert said or "#/$defs/" in json.dumps(rule), f"{name}.{key} needs a description"
        suffix = re.search(r"_(s|bytes|usd)$", key)
        assert suffix is None or re.search(r"\[[^\]]+\]", said), f"{name}.{key} needs its unit in brackets"


def test_the_schema_takes_what_the_program_takes() -> None:
    """Shipped scenarios pass, and a misspelt key fails, by an independent implementation of JSON schema."""
    jsonschema = pytest.importorskip("jsonschema", reason="comes with nbconvert, of the test extra")
    check = jsonschema.Draft202012Validator(json_schema())
    for name in shipped_scenarios():
        data = yaml.safe_load((ROOT / "planner" / "scenarios" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert Scenario.model_validate(data).name
        assert not list(check.iter_errors(data))
        assert list(check.iter_errors({**data, "trafic": {}}))


# --- the site --------------------------------------------------------------------------------------------------------


def test_every_module_has_a_place_in_the_reference() -> None:
    shown = set(re.findall(r"^::: (\S+)", "\n".join(p.read_text("utf-8") for p in DOCS.glob("api/*.md")), re.MULTILINE))
    modules = {
        f"{package}.{path.stem}"
        for package in PACKAGES
        for path in (ROOT / package).glob("*.py")
        if not path.stem.startswith("_")
    }
    assert modules - shown == SHOWN_ELSEWHERE, "add `::: MODULE` to the page of docs/api that it belongs to"
    assert shown <= modules


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = run("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_needs_no_network(site: Path) -> None:
    """Nothing a browser would load by itself comes from elsewhere; links may lead anywhere."""
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//|<link[^>]*rel=\"(?!canonical)[^>]*href=\"https?://"
    )
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text(encoding="utf-8")), page.name
    assert loaded.search('<script src="https://unpkg.com/mathjax"></script>')


def test_formulas_are_mathml(site: Path) -> None:
    for page in ("theory/speculation.html", "api/speculation.html"):
        text = (site / page).read_text(encoding="utf-8")
        assert text.count("<math") > 20
        assert r"\frac" not in re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL)  # sources aside

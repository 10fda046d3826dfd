"""Write what the studies say: studies/README.md, docs/accuracy.md and the block of README.md, from each verdict.json.

    python studies/index.py                 write the three
    python studies/index.py --check         exit 1 if one of them says something else than the studies do
    python studies/index.py --from-results  first write README.md and verdict.json of each study from its result.json

A folder with a ``run.py`` and no ``verdict.json`` is listed as not recorded.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studies.study import committed, folders, load

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- studies: written by python studies/index.py -->\n", "<!-- end of studies -->\n"
SECTIONS = {  # subject of a validation: what the section is about
    "kernels": "One kernel: a matrix product or attention.",
    "steps, in sample": "Steps of models that the law was fitted on.",
    "unseen models": "Steps of models that the law was not fitted on.",
    "transfer": "A GPU of which nothing was measured, from its datasheet.",
    "serving points": "Means of a benchmark on a running server.",
    "speculation": "Acceptance, tokens per round, speed-up, best draft.",
    "cascades": "What a plan promises, on prompts that it was not made on.",
    "quality": "Who is right, out of fold.",
    "live": "Small models trained on the spot, predicted and measured on one machine.",
    "queueing against simulation": "The theory against the engine that simulates each request.",
}
Verdict = dict[str, Any]


def read(folder: Path) -> Verdict:
    """Return the verdict of a study, and its title; what was not recorded says so."""
    page = folder / "README.md"
    title = page.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") if page.is_file() else folder.name
    path = folder / "verdict.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else not_recorded(folder)
    return found | {"name": folder.name, "title": title, "page": page.name if page.is_file() else "run.py"}


def not_recorded(folder: Path) -> Verdict:
    """Return what is known of a study that has not written its verdict: its claim, its command, its last commit."""
    doc = ast.get_docstring(ast.parse((folder / "run.py").read_text(encoding="utf-8"))) or folder.name
    return {
        "claim": doc.splitlines()[0].split(": ", 1)[-1].rstrip("."),
        "headline": "not recorded",
        "verdict": "not recorded",
        "n": None,
        "date": committed(folder / "run.py"),
        "command": f"python studies/{folder.name}/run.py",
        "validations": [],
    }


def table(head: str, rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {head} |", "|" + "---|" * (head.count(" | ") + 1), *(f"| {' | '.join(row)} |" for row in rows), ""]


def listing(found: list[Verdict]) -> str:
    """Return studies/README.md."""
    rows = [
        [
            f"[{v['title']}]({v['name']}/{v['page']})",
            v["claim"],
            v["headline"],
            v["verdict"],
            "-" if v["n"] is None else f"{v['n']:,}",
            v["date"],
            f"`{v['command']}`",
        ]
        for v in found
    ]
    return "\n".join(
        [
            "# Studies",
            "",
            "One folder per claim. Its command computes everything anew, writes its page, `result.json` (all numbers)",
            "and `verdict.json`, and exits with 1 when a verdict changes. A verdict counts the statements that hold:",
            "some of what a study tests was expected to fail, and its page says why it does. `n`: cases tried.",
            "`make studies-check` computes the quick ones again and fails when a committed number no longer holds.",
            "",
            "Written by `python studies/index.py` from the studies' `verdict.json`.",
            "",
            *table("study | claim | headline | verdict | n | date | command", rows),
            "DIR is a folder of data sets that are not part of this repository: `vidur` (microsoft/vidur profiles),",
            "`aiconfigurator` (ai-dynamo/aiconfigurator tables, serving points), `quality` (outcomes per prompt),",
            "`speculation` (published speed-ups), or the folder among these that the study's page names. FILE is the",
            "Azure LLM inference trace 2023 (conversation).",
            "",
            "A new study is a folder with a `run.py` that ends in a `STUDY` (`studies/study.py` says how); run it, and",
            "then `python studies/index.py`.",
            "",
        ]
    )


def block(found: list[Verdict]) -> str:
    """Return the table of README.md."""
    rows = [[f"[{v['title']}](studies/{v['name']}/{v['page']})", v["headline"], v["verdict"]] for v in found]
    return BEGIN + "\n" + "\n".join(table("study | says | statements", rows)) + "\n" + END


def accuracy(found: list[Verdict]) -> str:
    """Return docs/accuracy.md: every validation of every study, by subject."""
    known = {row["subject"] for v in found for row in v["validations"]}
    subjects = [*SECTIONS, *sorted(known - set(SECTIONS))]
    lines = [
        "# Accuracy",
        "",
        "Every comparison of a prediction with something else that the studies make. Error: prediction over reference",
        "less 1, or, where the column says *points*, their difference in points (1/100) of a probability or a share.",
        "MAPE is the mean of its size, bias its mean, worst its largest size. Covered: share of the references inside",
        "the prediction's interval; its level, which the share should be near, in brackets. A dash: not recorded.",
        "",
        "Written by `python studies/index.py` from the studies' `verdict.json`.",
        "",
    ]
    for subject in subjects:
        rows = [accuracy_row(v, row) for v in found for row in v["validations"] if row["subject"] == subject]
        if rows:
            lines += [f"## {subject[0].upper()}{subject[1:]}", "", SECTIONS.get(subject, ""), ""]
            lines += table("predicted | against | fitted on | n | MAPE | bias | p90 | worst | covered | study", rows)
    return "\n".join(lines).rstrip("\n") + "\n"


def accuracy_row(verdict: Verdict, row: dict[str, Any]) -> list[str]:
    """Return the cells of a validation."""
    unit = " points" if row["unit"] == "absolute" else "%"
    cells = [
        "-" if row[key] is None else f"{100 * row[key]:{sign}.{digits}f}{unit}"
        for key, sign, digits in (("error", "", 1), ("bias", "+", 1), ("p90", "", 1), ("worst", "", 1))
    ]
    covered = "-" if row["coverage"] is None else f"{row['coverage']:.0%} ({row['level']:.0%})"
    study = f"[{verdict['name']}](../studies/{verdict['name']}/README.md)"
    return [row["what"], row["against"], row["fitted"], f"{row['n']:,}", *cells, covered, study]


def in_readme(found: list[Verdict]) -> str:
    """Return README.md with its block written anew."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: block(found), text, flags=re.DOTALL)


PAGES: dict[str, Callable[[list[Verdict]], str]] = {
    "studies/README.md": listing,
    "docs/accuracy.md": accuracy,
    "README.md": in_readme,
}


def main() -> int:
    """Write or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--from-results", action="store_true")
    given = parser.parse_args()
    if given.from_results:
        for study in filter(None, map(load, folders())):
            if (study.folder / "result.json").is_file():
                study.main(["--from-results"])
    found = [read(folder) for folder in folders()]
    wrong = []
    for name, page in PAGES.items():
        path, text = ROOT / name, page(found)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            wrong.append(name)
            if not given.check:
                path.write_text(text, encoding="utf-8")
    for name in wrong if given.check else []:
        sys.stderr.write(f"{name} says something else than the studies do; run python studies/index.py\n")
    return 1 if given.check and wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Write what the commands on a page print, in README.md and the docs: each after ``<!-- run -->``, in order.

    python docs/tools/printed.py [PAGE ...]     rewrite these Markdown files; README.md and all that run by default
    python docs/tools/printed.py --check        exit 1 if a page says something else than its commands do

README.md runs where it lies. A page of ``docs/`` runs from top to bottom in one empty folder, as a reader would follow
it: a block ```` ```yaml title="mine.yaml" ```` is that file, a block ```` ```python ```` is a script, and what a script
prints is the ```` ```text ```` block behind it. Numbers may differ by 2 % between machines (order of additions), times
spent computing by anything. Under ``<!-- run measured -->`` only the headings of tables must be the same. Under
``<!-- run fails -->`` the command must fail, and what stands there is its message.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BLOCK = re.compile(
    r"<!-- run(?P<how> measured| fails)? -->\n```console\n\$ (?P<command>[^\n]+)\n(?P<output>.*?)```"
    r"|```\w+ title=\"(?P<file>[^\"]+)\"\n(?P<content>.*?)```"
    r"|```python\n(?P<script>.*?)```(?:\n\n```text\n(?P<said>.*?)```)?",
    re.DOTALL,
)
RUNS = re.compile(r"^(<!-- run|```python)", re.MULTILINE)
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")
SPENT = re.compile(r"\([\d.]+ s; step times|engine [\d.]+ s|in [\d.]+ s of computing")  # how long a computation took
HEADING = re.compile(r"^[a-z]+ {2,}[a-zA-Z0-9 /-]*[a-zA-Z]$", re.MULTILINE)  # of a table: column names
TOLERANCE = 0.02  # relative difference of numbers between machines [-]


class Printed(NamedTuple):
    """One output on a page."""

    command: str  # what prints it, to say in a message
    span: tuple[int, int]  # where it stands in the page
    said: str
    found: str
    measured: bool  # whether it is measured, so of this machine

    @property
    def holds(self) -> bool:
        """Whether the page says what was found."""
        return same(self.said, self.found, self.measured)


def printed(page: Path) -> Iterator[Printed]:
    """Run a page from top to bottom and yield its outputs, said and found."""
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        here = page.parent if page == README else Path(folder)
        for block in BLOCK.finditer(text):
            if block["file"]:
                file = here / block["file"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block["content"], encoding="utf-8")
            elif block["command"]:
                found = output(shlex.split(block["command"]), here, page.name, block["how"] == " fails")
                measured = block["how"] == " measured"
                yield Printed(block["command"], block.span("output"), block["output"], found, measured)
            elif page != README:  # the Python of README.md has its own test
                found = output([sys.executable, "-c", block["script"]], here, page.name)
                if block["said"] is not None:
                    yield Printed(block["script"].splitlines()[0], block.span("said"), block["said"], found, False)


def output(words: list[str], here: Path, page: str, fails: bool = False) -> str:
    """Return what a command prints, run with the Python at hand; of one that must fail, its message."""
    run = [sys.executable, "-m", *words] if words[0] == "tierwise" else words
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        run, capture_output=True, text=True, timeout=300, cwd=here, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    if bool(done.returncode) != fails:
        raise SystemExit(f"{page}: `{shlex.join(words)[:80]}` left with {done.returncode}: {done.stderr}")
    return "\n".join(line.rstrip() for line in (done.stderr if fails else done.stdout).splitlines()) + "\n"


def same(said: str, found: str, measured: bool = False) -> bool:
    """Return whether two outputs agree: the same words, the same numbers within the tolerance."""
    if measured:
        return headings(said) == headings(found)
    said, found = SPENT.sub("", said), SPENT.sub("", found)
    if re.sub(r"\s+", " ", NUMBER.sub("#", said)) != re.sub(r"\s+", " ", NUMBER.sub("#", found)):
        return False
    pairs = zip(NUMBER.findall(said), NUMBER.findall(found), strict=True)
    return all(abs(float(a) - float(b)) <= TOLERANCE * max(abs(float(a)), abs(float(b))) for a, b in pairs)


def headings(text: str) -> list[str]:
    """Return the column names of each table, without the widths that the numbers give them."""
    return [" ".join(line.split()) for line in HEADING.findall(text)]


def pages_that_run() -> list[Path]:
    """Return the pages of the documentation that hold something to run."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    return [
        page for page in pages if re.search(r"^(<!-- run|```python)", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def rewrite(page: Path, outputs: list[Printed]) -> None:
    """Put what was found into the page."""
    text = page.read_text(encoding="utf-8")
    for one in reversed(outputs):
        text = text[: one.span[0]] + one.found + text[one.span[1] :]
    page.write_text(text, encoding="utf-8")


def main() -> int:
    """Rewrite or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    pages = [page.resolve() for page in asked.pages] or [README, *pages_that_run()]
    wrong = []
    for page in pages:
        outputs = list(printed(page))
        if asked.check:
            wrong += [f"{page.name}: `{one.command}`" for one in outputs if not one.holds]
        else:
            rewrite(page, outputs)
    for name in wrong:
        sys.stderr.write(f"{name} prints something else now; run python docs/tools/printed.py\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

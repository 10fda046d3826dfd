"""Compute the quick studies again and hold the committed numbers against what comes out; nothing in the tree changes.

    python studies/check.py [--data DIR] [--only NAME ...] [--studies DIR] [--workers N]

DIR of --data is a folder with all data sets; studies whose data are not there are skipped, with the reason. Of every
study, quick or not, README.md and verdict.json must follow from its result.json. Numbers may differ by the tolerance
that the study states; times and speeds are not compared. Exits with 1 when a committed number or a verdict no longer
holds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from studies.study import Result, Study, folders, load

LIMIT = 300  # processor time after which a study is given up [s]; it should take less than a minute
SHOWN = 8  # differences shown of a study
LEAST = 1e-9  # numbers below this are 0 [-]


def differences(said: Any, found: Any, study: Study, at: str = "") -> Iterator[str]:
    """Yield where two results differ by more than the study's tolerance, times and speeds left out."""
    if any(fnmatch(at.rsplit("/", 1)[-1], pattern) for pattern in study.times if at):
        return
    if isinstance(said, dict) and isinstance(found, dict):
        if said.keys() != found.keys():
            yield f"{at or 'keys'}: {sorted(said.keys() ^ found.keys())} on one side only"
        for key in said.keys() & found.keys():
            yield from differences(said[key], found[key], study, f"{at}/{key}")
    elif isinstance(said, list) and isinstance(found, list) and len(said) == len(found):
        for k, (a, b) in enumerate(zip(said, found, strict=True)):
            yield from differences(a, b, study, f"{at}/{k}")
    elif not same(said, found, study.tolerance):
        yield f"{at}: {said!r} is committed, {found!r} comes out"


def same(said: Any, found: Any, tolerance: float) -> bool:
    """Return whether two values agree: numbers within the relative tolerance, anything else exactly."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (said, found))
    return abs(said - found) <= max(tolerance * max(abs(said), abs(found)), LEAST) if numbers else bool(said == found)


def stale(study: Study) -> Iterator[str]:
    """Yield what the committed page and verdict of a study say that its committed result does not."""
    if not (study.folder / "result.json").is_file():
        yield "no result.json"
        return
    result = study.kept()
    for name, text in (("README.md", study.readme(result)), ("verdict.json", study.verdict(result, kept=True))):
        path = study.folder / name
        said = path.read_text(encoding="utf-8") if path.is_file() else None
        if (json.loads(said) if said and name.endswith("json") else said) != text:
            yield f"{name} does not follow from result.json: python studies/{study.folder.name}/run.py --from-results"


def why_not(study: Study, data: Path | None) -> str:
    """Return why a study is not computed again; empty if it is."""
    if not study.recheck:
        return "takes longer than a minute, or measures speed only"
    if study.data is not None and study.data.required and not place(study, data):
        return f"needs {study.data.within if study.data.within != '.' else ', '.join(study.data.files)} in --data"
    return ""


def place(study: Study, data: Path | None) -> Path | None:
    """Return where the data of a study lie; None if they are not there."""
    if study.data is None or data is None:
        return None
    at = data / study.data.within
    return at if at.exists() and all((at / f).exists() for f in study.data.files) else None


def again(study: Study, data: Path | None) -> list[str]:
    """Compute a study into a folder of its own; return what no longer holds."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["sh", "-c", 'ulimit -t "$0"; exec "$@"', str(LIMIT), sys.executable, study.file, "--output", folder]
        at = place(study, data)
        if study.data is not None and at is not None:
            command += [study.data.option, str(at)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        path = Path(folder) / "result.json"
        if not path.is_file():
            said = done.stderr.strip().splitlines() or [f"no result within {LIMIT} s of processor time"]
            return [f"left with {done.returncode}: {said[-1]}"]
        result: Result = json.loads(path.read_text(encoding="utf-8"))
    said, found = ({bar.name: bar.holds for bar in study.bars(r)} for r in (study.kept(), result))
    return [*differences(said, found, study, "bars"), *differences(study.kept(), result, study)]


def report(study: Study, data: Path | None) -> list[str]:
    """Check one study, say so on a line; return what no longer holds."""
    begun, reason = time.monotonic(), why_not(study, data)
    wrong = list(stale(study))
    if not reason:
        wrong += again(study, data)
    says = "no longer holds" if wrong else f"not computed, {reason}" if reason else "holds"
    print(f"{study.folder.name}: {says} ({time.monotonic() - begun:.0f} s)")
    for line in wrong[:SHOWN]:
        print(f"    {line}")
    if len(wrong) > SHOWN:
        print(f"    and {len(wrong) - SHOWN} more")
    sys.stdout.flush()
    return wrong


def main() -> int:
    """Check all studies; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with all data sets")
    parser.add_argument("--only", nargs="+", help="names of studies")
    parser.add_argument("--studies", type=Path, default=Path(__file__).parent, help="where they lie")
    parser.add_argument("--workers", type=int, default=2, help="studies at once")
    given = parser.parse_args()
    wanted = [f for f in folders(given.studies) if not given.only or f.name in given.only]
    if not wanted:
        sys.stderr.write(f"no study called {' or '.join(given.only or ['anything'])} in {given.studies}\n")
        return 2
    loaded = {folder.name: load(folder) for folder in wanted}
    for name in (name for name, study in loaded.items() if study is None):
        print(f"{name}: not checked: its run.py has no STUDY")
    studies = [study for study in loaded.values() if study is not None]
    with ThreadPoolExecutor(given.workers) as pool:
        wrong = [bool(lines) for lines in pool.map(lambda study: report(study, given.data), studies)]
    print(f"{sum(wrong)} of {len(studies)} studies say something that no longer holds" if any(wrong) else "all hold")
    return 1 if any(wrong) else 0


if __name__ == "__main__":
    raise SystemExit(main())

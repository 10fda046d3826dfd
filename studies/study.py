"""What every study is: a claim, the numbers that test it, the bars they are held against, and the files it leaves.

A study is a folder with a ``run.py`` that ends in

    STUDY = Study(__file__, __doc__, analyse, readme, headline, ...)

    if __name__ == "__main__":
        sys.exit(STUDY.main())

The first line of its docstring is the claim. A run writes ``result.json`` (all numbers), ``README.md`` (the page) and
``verdict.json`` (claim, headline, bars: what ``studies/index.py`` lists); the last two follow from the first, so that
``--from-results`` writes them again without computing anything.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn

from theory.errors import InputError, refuse

Result = dict[str, Any]  # the numbers of a study, as result.json holds them
PACKAGES = ("tierwise", "numpy", "scipy", "pandas", "numba", "optuna")


@dataclass(frozen=True, slots=True)
class Bar:
    """One statement that a study tests."""

    name: str
    holds: bool | None  # None: not judged in this run
    reached: Any = None  # the number judged, where it is one
    limit: Any = None  # what it is held against, where it is one number


@dataclass(frozen=True, slots=True)
class Validation:
    """How far predictions are from what they were held against: a row of the accuracy page."""

    subject: str  # section of the page
    what: str
    against: str  # measured, published, simulated, other prompts, ...
    fitted: str  # what was fitted, and on what
    n: int
    error: float  # mean |error|; of relative errors the MAPE
    bias: float | None = None  # mean signed error
    worst: float | None = None  # largest |error|
    p90: float | None = None  # 90th centile of |error|
    coverage: float | None = None  # share inside the interval
    level: float = 0.9  # of the interval
    unit: str = "relative"  # or "absolute": a difference of probabilities or shares

    @classmethod
    def of(
        cls, summary: Mapping[str, Any], subject: str, what: str, against: str, fitted: str, **more: Any
    ) -> Validation:
        """Return the row of an error summary (``calibration.validate.error_summary``)."""
        keys = {"bias": "bias", "p90": "p90_ape", "worst": "worst_ape", "coverage": "coverage"}
        kept: dict[str, Any] = {name: summary.get(key) for name, key in keys.items()}
        return cls(subject, what, against, fitted, summary["n"], summary["mape"], **(kept | more))

    @classmethod
    def errors(
        cls, errors: Sequence[float], subject: str, what: str, against: str, fitted: str, **more: Any
    ) -> Validation:
        """Return the row of errors, one per case."""
        size = [abs(error) for error in errors]
        mean, bias = sum(size) / len(size), sum(errors) / len(size)
        return cls(subject, what, against, fitted, len(size), mean, bias, max(size), **more)


@dataclass(frozen=True, slots=True)
class Data:
    """Data that a study does not carry: the option that names the place, and what must be found there."""

    within: str  # where it lies in a folder of all data sets ("." is the folder itself)
    files: tuple[str, ...] = ()  # that the folder must hold; none: the option names a file
    option: str = "--data"
    required: bool = True

    def found(self, given: Path | None) -> Path | None:
        """Return the place if all is there.

        Raises
        ------
        InputError
            If the file, or a file the folder must hold, is not there.
        """
        if given is None and not self.required:
            return None
        lacking = [f for f in self.files if given is None or not (given / f).exists()]
        if given is None or lacking or not (given.is_dir() if self.files else given.is_file()):
            rule = f"must be a folder with {', '.join(self.files)}" if self.files else "must be a file"
            refuse(self.option, rule, given and str(given), f"Lacking: {', '.join(lacking)}." if given else "")
        return given


def stated(result: Result) -> list[Bar]:
    """Return the bars of a result that keeps ``verdicts``: statement -> whether it holds."""
    return [Bar(name, holds) for name, holds in result["verdicts"].items()]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message}; see {self.prog} --help\n")


@dataclass(frozen=True)
class Study:
    """One claim and how it is tested. ``given`` below are the arguments; ``given.folder`` is None: write nothing."""

    file: str  # __file__ of run.py
    doc: str  # its docstring
    analyse: Callable[[argparse.Namespace], Result]
    readme: Callable[[Result], str]
    headline: Callable[[Result], str]  # the one number to remember, with its unit
    bars: Callable[[Result], list[Bar]] = stated
    draw: Callable[[argparse.Namespace, Result], object] = lambda *_: None  # into given.folder
    expected: Mapping[str, bool] | None = None  # exit 1 when a bar comes out otherwise; None: all must hold
    n: Callable[[Result], int | None] = lambda _: None  # how many cases the claim was tried on
    validations: Callable[[Result], list[Validation]] = lambda _: []
    data: Data | None = None
    options: Callable[[argparse.ArgumentParser], object] = lambda _: None
    quick: str = "the same"  # what --quick leaves out
    quick_judged: bool = True  # whether the bars are judged then
    recheck: bool = False  # under a minute on two cores: `make studies-check` computes it again
    tolerance: float = 1e-3  # relative difference of numbers between machines [-]
    times: tuple[str, ...] = field(default=())  # keys and bars that depend on the machine's speed: not compared

    @property
    def folder(self) -> Path:
        """The folder of the study."""
        return Path(self.file).resolve().parent

    @property
    def claim(self) -> str:
        """The claim in one sentence."""
        said = self.doc.splitlines()[0].split(": ", 1)[-1].rstrip(".")
        return said[0].upper() + said[1:]

    def parser(self) -> argparse.ArgumentParser:
        """Return the parser of the command line."""
        parser = _Parser(description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        if self.data is not None:
            what = f"folder with {', '.join(self.data.files)}" if self.data.files else "the file"
            parser.add_argument(self.data.option, dest="data", type=Path, help=what)
        parser.add_argument("--quick", action="store_true", help=f"{self.quick}; writes only with --output")
        parser.add_argument("--output", type=Path, help="where to write (default: the folder of the study)")
        parser.add_argument(
            "--from-results", action="store_true", help="write README.md and verdict.json from result.json as it is"
        )
        self.options(parser)
        return parser

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run; 0 if the bars come out as expected, 1 if not, 2 on bad input."""
        given = self.parser().parse_args(arguments)
        kept = given.from_results  # then nothing is read but result.json
        given.folder = given.output or (None if given.quick else self.folder)
        try:
            if not kept and self.data is not None:
                given.data = self.data.found(given.data)
            if given.folder is not None:
                given.folder.mkdir(parents=True, exist_ok=True)
            result = self.kept() if kept else json.loads(text(self.analyse(given)))
        except (InputError, OSError) as error:
            sys.stderr.write(f"{error}\n")
            return 2
        verdict = self.verdict(result, kept)
        if given.folder is not None:
            self.write(given, result, verdict)
        print(f"{verdict['verdict']}: {verdict['headline']}")
        for bar in self.bars(result):
            print(f"{SAYS[bar.holds]:>10}: {bar.name}")
        return 0 if self.as_expected(self.bars(result)) or (given.quick and not self.quick_judged) else 1

    def write(self, given: argparse.Namespace, result: Result, verdict: Result) -> None:
        """Write the files of a run; of a kept result those that follow from it."""
        (given.folder / "README.md").write_text(self.readme(result), encoding="utf-8")
        (given.folder / "verdict.json").write_text(text(verdict), encoding="utf-8")
        if not given.from_results:
            (given.folder / "result.json").write_text(text(result), encoding="utf-8")
            self.draw(given, result)

    def as_expected(self, bars: list[Bar]) -> bool:
        """Return whether no bar says something else than it is expected to."""
        if self.expected is None:
            return all(bar.holds is not False for bar in bars)
        return {bar.name: bar.holds for bar in bars} == dict(self.expected)

    def kept(self) -> Result:
        """Return the committed result."""
        path = self.folder / "result.json"
        if not path.is_file():
            refuse("--from-results", "needs the result.json of a run", str(path), "Run the study first.")
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        return result

    def verdict(self, result: Result, kept: bool) -> Result:
        """Return what verdict.json says."""
        option = "" if self.data is None else f"{self.data.option} {'DIR' if self.data.files else 'FILE'}"
        option = option if self.data is None or self.data.required else f"[{option}]"
        bars, earlier = self.bars(result), self.folder / "verdict.json"
        if not kept:
            made: Result = {"date": date.today().isoformat(), "versions": versions()}
        elif earlier.is_file():
            made = json.loads(earlier.read_text(encoding="utf-8"))
        else:
            made = {"date": committed(self.folder / "result.json"), "versions": None}
        return {
            "claim": self.claim,
            "headline": self.headline(result),
            "verdict": in_words(bars),
            "bars": [asdict(bar) for bar in bars],
            "n": self.n(result),
            "date": made["date"],
            "command": f"python studies/{self.folder.name}/run.py {option}".strip(),
            "versions": made["versions"],
            "validations": [asdict(row) for row in self.validations(result)],
        }


SAYS = {True: "holds", False: "missed", None: "not judged"}


def in_words(bars: list[Bar]) -> str:
    """Return the verdict on all bars together.

    Examples
    --------
    >>> in_words([Bar("a", True), Bar("b", False), Bar("c", None)])
    '1 of 2 hold, 1 not judged'
    """
    judged = [bar.holds for bar in bars if bar.holds is not None]
    left = f", {len(bars) - len(judged)} not judged" if len(judged) < len(bars) else ""
    if not judged:
        return "no bar" if not bars else f"none judged{left}"
    if all(judged):
        return f"holds{left}"
    return f"{sum(judged)} of {len(judged)} hold{left}" if len(bars) > 1 else "missed"


def folders(root: Path = Path(__file__).parent) -> list[Path]:
    """Return the folders of all studies."""
    return sorted(path.parent for path in root.glob("*/run.py"))


def load(folder: Path) -> Study | None:
    """Return the study of a folder; None if its ``run.py`` has no ``STUDY``."""
    spec = spec_from_file_location(f"studies.{folder.name}.run", folder / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    study: Study | None = getattr(module, "STUDY", None)
    return study


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def committed(path: Path) -> str:
    """Return the date of the last commit of a file, or "not recorded"."""
    command = ["git", "log", "-1", "--format=%cs", "--", path.name]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not recorded"


def text(value: object) -> str:
    """Return JSON with a last newline; what is not a number or not finite is null."""
    return json.dumps(_finite(value), indent=1) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k if isinstance(k, str) else json.dumps(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Docstrings say what the code does: parameters as in the signature, errors where they are raised, units, sources.

The rules fit the house style, which is short. Every public function and class has a docstring. A parameter that it
names exists, in the order of the signature; what goes without saying may be left out. A function that refuses something
says when. What returns a physical number, and every such field, has its unit in brackets, ``[s]``, or ``[-]`` without
one. A formula of the theory has its source, be it "derivation".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("theory", "simulator", "calibration", "planner", "tierwise")
NUMBERS = re.compile(r"\b(float|Array|ArrayLike|Floats|FloatArray|Quantity|Estimate)\b")
UNIT = re.compile(r"\[[^\[\]]*[-\w/%^$][^\[\]]*\]")
SECTION = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.MULTILINE)
ORDER = ["Parameters", "Returns", "Raises", "Source", "Examples"]  # Assumes stands where it reads best
Function = ast.FunctionDef


class Public(NamedTuple):
    """A public function, method or class."""

    module: str  # path from the root, without ``.py``
    name: str
    node: Function | ast.ClassDef
    lines: list[str]  # of its file

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""


def publics(text: str, module: str) -> Iterator[Public]:
    lines = text.splitlines()

    def visit(body: list[ast.stmt], outer: str) -> Iterator[Public]:
        for node in body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                yield Public(module, outer + node.name, node, lines)
                if isinstance(node, ast.ClassDef):
                    yield from visit(node.body, f"{node.name}.")

    yield from visit(ast.parse(text).body, "")


def everything() -> list[Public]:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).glob("*.py"))]
    return [
        one
        for path in files
        for one in publics(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT).with_suffix("")))
    ]


# --- the rules, each a list of what breaks it -------------------------------------------------------------------------


def missing(one: Public) -> list[str]:
    return [] if one.docstring else ["has no docstring"]


def parameters(one: Public) -> list[str]:
    match = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-{3,}|\Z)", one.docstring, re.MULTILINE | re.DOTALL)
    if match is None or not isinstance(one.node, Function):
        return []
    said = re.findall(r"^(\w[\w, ]*?)(?: :.*)?$", match[1], re.MULTILINE)
    named = [name.strip() for line in said for name in line.split(",")]
    a = one.node.args
    known = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    if strange := [name for name in named if name not in known]:
        return [f"names parameters that it does not have: {', '.join(strange)}"]
    return [] if [name for name in known if name in named] == named else ["names its parameters in another order"]


def raises(one: Public) -> list[str]:
    if not isinstance(one.node, Function) or one.module == "tierwise/cli":  # a command's docstring is its help
        return []
    calls = {getattr(n.func, "id", "") for n in ast.walk(one.node) if isinstance(n, ast.Call)}
    refuses = calls & {"require", "refuse", "InputError", "InfeasibleError"}
    return (
        ["refuses something and does not say when (Raises)"] if refuses and "Raises\n---" not in one.docstring else []
    )


def unit(one: Public) -> list[str]:
    if isinstance(one.node, Function):
        returned = ast.unparse(one.node.returns) if one.node.returns else ""
        return (
            ["returns a number without a unit"] if NUMBERS.search(returned) and not UNIT.search(one.docstring) else []
        )
    pydantic = any(isinstance(base, ast.Name) and base.id in ("_Strict", "BaseModel") for base in one.node.bases)
    if pydantic or UNIT.search(one.docstring):  # a scenario's units are in its descriptions; a class may speak for all
        return []
    fields = [n for n in one.node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    said = [
        (n.target.id, one.lines[n.lineno - 1 : n.end_lineno])
        for n in fields
        if NUMBERS.search(ast.unparse(n.annotation))
    ]
    return [
        f"has a field {name} without a unit"
        for name, lines in said
        if not name.startswith("_") and not UNIT.search(" ".join(line.partition("#")[2] for line in lines))
    ]


def source(one: Public) -> list[str]:
    formula = one.module.startswith("theory/") and one.module != "theory/derivations" and ".. math::" in one.docstring
    needed = formula and isinstance(one.node, Function) and "Source\n---" not in one.docstring
    return ["has a formula without a Source"] if needed else []


def order(one: Public) -> list[str]:
    given = [name for name in SECTION.findall(one.docstring) if name in ORDER]
    return [] if given == sorted(given, key=ORDER.index) else [f"has its sections in another order: {', '.join(given)}"]


RULES = (missing, parameters, raises, unit, source, order)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_docstrings(rule: object) -> None:
    assert callable(rule)
    wrong = [f"{one.module}.py:{one.node.lineno} {one.name} {what}" for one in everything() for what in rule(one)]
    assert not wrong, "\n" + "\n".join(wrong)


BROKEN = '''
def nothing(x: float) -> float:
    return x

def other(x: float, y: float) -> float:
    r"""Return x.

    .. math:: x

    Parameters
    ----------
    y, x : float
    """
    require(x > 0, "x", "must be above 0", x)
    return x

class Thing:
    """A thing.

    Examples
    --------
    >>> 1
    1

    Raises
    ------
    InputError
    """

    size: float
'''


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_each_rule_finds_what_breaks_it(rule: object) -> None:
    assert callable(rule)
    assert any(rule(one) for one in publics(BROKEN, "theory/broken"))

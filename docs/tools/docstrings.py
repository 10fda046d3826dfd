"""Griffe extension: the docstrings' reStructuredText as Markdown, and field comments as what the fields mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

MATH_BLOCK = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<first>[^\n]*)\n"
    r"(?P<rest>(?:(?P=indent) +[^\n]+\n|\n(?=(?P=indent) {2,}\S))*)",
    re.MULTILINE,
)
MATH = re.compile(r":math:`([^`]+)`")
ROLE = re.compile(r":(?:func|class|mod|meth|data|attr|exc):`~?([\w.]+)`")
SECTION = re.compile(r"^[A-Z][a-z]+\n-{3,}$", re.MULTILINE)
SPACES = re.compile(r"\s+")
PACKAGES = ("theory", "simulator", "calibration", "planner", "tierwise")


class Docstrings(griffe.Extension):
    """Rewrite the docstrings of a package before they are parsed."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite every docstring once all names are known; fields of a class become a section of its docstring."""
        for member in list(_members(pkg)):
            if member.docstring is not None:
                member.docstring.value = markdown(member.docstring.value, member)
            elif member.is_attribute and (comment := _comment(member)):
                member.docstring = griffe.Docstring(markdown(comment, member), parent=member)
        for member in list(_members(pkg)):
            if isinstance(member, griffe.Class) and member.docstring is not None:
                _with_fields(member, member.docstring)


def _with_fields(holder: griffe.Class, docstring: griffe.Docstring) -> None:
    """Move the annotated public fields of a class into its docstring, after the summary."""
    fields = [
        field
        for field in holder.members.values()
        if isinstance(field, griffe.Attribute)
        and field.annotation is not None
        and not field.name.startswith("_")
        and not any("property" in label for label in field.labels)
    ]
    if not fields:
        return
    lines = ["Attributes", "----------"]
    for field in fields:
        meaning = field.docstring.value if field.docstring is not None else ""
        lines += [f"{field.name} : {field.annotation}", f"    {meaning or _default(field)}"]
        del holder.members[field.name]
    first = SECTION.search(docstring.value)
    at = first.start() if first else len(docstring.value)
    said = [docstring.value[:at].rstrip(), "\n".join(lines), docstring.value[at:].strip()]
    docstring.value = "\n\n".join(part for part in said if part)


def _default(field: griffe.Attribute) -> str:
    """Return the description that a pydantic field carries; never a dash, which would begin a section."""
    described = re.search(r"description=(['\"])(.*?)\1", str(field.value or ""))
    return described[2] if described else "as its name says"


def _members(parent: griffe.Object) -> Iterator[griffe.Object]:
    yield parent
    for member in parent.members.values():
        if isinstance(member, griffe.Object):
            yield from _members(member)


def markdown(text: str, holder: griffe.Object) -> str:
    """Return the docstring of an object as Markdown."""
    text = MATH_BLOCK.sub(_display, text + "\n").rstrip("\n")
    text = MATH.sub(lambda m: f"${SPACES.sub(' ', m[1])}$", text)
    text = text.replace("] [", "] \\[")  # an interval with its unit is no link
    return ROLE.sub(lambda m: _link(m[1], holder), text)


def _display(match: re.Match[str]) -> str:
    formula = " ".join(line.strip() for line in (match["first"] + "\n" + match["rest"]).splitlines() if line.strip())
    return f"{match['indent']}$$ {formula} $$\n"


def _link(name: str, holder: griffe.Object) -> str:
    """Return a link to what a role names: a full path, or a name of the module it stands in or that this imports."""
    short = name.rpartition(".")[2]
    if short.startswith("_"):
        return f"`{short}`"
    name = name.removeprefix(".")
    try:
        path = name if name.split(".")[0] in PACKAGES else holder.resolve(name)
    except griffe.NameResolutionError:
        path = f"{holder.package.path}.{name}"  # a sister module, or a name in one
    return f"[`{short}`][{path}]"


def _comment(field: griffe.Object) -> str:
    """Return the comment at the end of a field's last line, where units and meanings stand."""
    if field.lineno is None or field.endlineno is None or isinstance(field.filepath, list):
        return ""
    line = field.lines_collection[field.filepath][field.endlineno - 1]
    _, mark, comment = line.partition("  # ")
    return comment.strip() if mark and not comment.startswith(("noqa", "type:")) else ""

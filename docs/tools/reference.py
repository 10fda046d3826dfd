"""Write the pages that come from the code: scenario keys, command line, derivations; and the scenario's JSON schema.

python docs/tools/reference.py            write them
python docs/tools/reference.py --check    exit 1 if one is not what the code says now
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import sympy
import typer

from planner.scenario import json_schema
from theory import derivations
from tierwise.cli import app

DOCS = Path(__file__).resolve().parents[1]
UNIT = re.compile(r" \[([^\[\]]+)\](?=$|;|,)")
NOTE = "<!-- Written by docs/tools/reference.py; do not edit. -->\n\n"


# --- the scenario ----------------------------------------------------------------------------------------------------

SCENARIO = """# Scenario reference

A scenario is one YAML file: the question you put to `tierwise plan`, or the deployment you put to `tierwise
simulate`. Every key can be overridden on the command line, `--set traffic.rate=4` or `--set tiers.0.tp=[2]`. Unknown
keys are refused with the nearest that exists, and a value that breaks its rule with the rule and its unit.

For completion and checks in an editor, write the JSON schema to a file, `tierwise schema > scenario.schema.json`, and
begin the scenario with `# yaml-language-server: $schema=scenario.schema.json`. The schema is also
[here](scenario.schema.json).

A key without a default must be given. Fractions lie in 0..1, `[-]` has no unit.

"""


def scenario_page() -> str:
    """Return every key of the scenario: type, unit, default, meaning, in the order of the document."""
    schema = json_schema()
    parts = [NOTE, SCENARIO, _keys("", schema, schema["$defs"])]
    parts += [_keys(where, schema["$defs"][name], schema["$defs"]) for where, name in _sections(schema)]
    return "".join(parts).rstrip() + "\n"


def _sections(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the path and the definition of each mapping inside the scenario, depth first, each definition once."""
    seen: set[str] = set()

    def visit(where: str, properties: dict[str, Any]) -> Iterator[tuple[str, str]]:
        for key, rule in properties.items():
            for name in re.findall(r"#/\$defs/(\w+)", json.dumps(rule)):
                if name not in seen:
                    seen.add(name)
                    path = f"{where}{key}" + ("[]" if "items" in rule else "")
                    yield path, name
                    yield from visit(path + ".", schema["$defs"][name]["properties"])

    return visit("", schema["properties"])


def _keys(where: str, schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    title = f"## `{where}`\n\n" if where else "## The file\n\n"
    rows = ["| key | type | unit | default | meaning |", "|---|---|---|---|---|"]
    for key, rule in schema["properties"].items():
        meaning, unit = _meaning(rule, definitions)
        required = key in schema.get("required", [])
        cells = [f"`{key}`", _type(rule), unit, "" if required else _default(rule), meaning]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return title + schema.get("description", "").strip() + "\n\n" + "\n".join(rows) + "\n\n"


def _meaning(rule: dict[str, Any], definitions: dict[str, Any]) -> tuple[str, str]:
    """Return what a key means and its unit; a mapping without a word of its own means what its definition says."""
    said = rule.get("description")
    if said is None:
        named = re.findall(r"#/\$defs/(\w+)", json.dumps(rule))
        said = str(definitions[named[0]]["description"]) if named else ""
    unit = UNIT.search(said)
    return UNIT.sub("", said), f"`[{unit[1]}]`" if unit else ""


def _type(rule: dict[str, Any]) -> str:
    """Return the type of a value in words, with its bounds."""
    branches = [r for r in rule.get("anyOf", rule.get("oneOf", [])) if r.get("type") != "null"]
    if branches:
        return " or ".join(_type(branch) for branch in branches)
    if "$ref" in rule:
        return "mapping"
    if "enum" in rule or "const" in rule:
        return ", ".join(f"`{value}`" for value in rule.get("enum", [rule.get("const")]))
    kind = rule.get("type")
    if kind == "array":
        if "prefixItems" in rule:
            return f"{len(rule['prefixItems'])} of: {_type(rule['prefixItems'][0])}"
        return f"list of {_type(rule['items'])}"
    if kind == "object":
        return f"mapping of text to {_type(rule['additionalProperties'])}"
    words = {"number": "number", "integer": "whole number", "string": "text", "boolean": "true or false"}
    return words[str(kind)] + _bounds(rule)


def _bounds(rule: dict[str, Any]) -> str:
    if "minimum" in rule and "maximum" in rule:
        return f" in {rule['minimum']:g}..{rule['maximum']:g}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return "".join(f" {sign} {rule[name]:g}" for name, sign in signs.items() if name in rule)


def _default(rule: dict[str, Any]) -> str:
    value = rule.get("default")
    if isinstance(value, dict):
        return "its defaults"
    return "none" if value in (None, "", []) else f"`{json.dumps(value)}`"


# --- the command line ------------------------------------------------------------------------------------------------

KINDS = {int: "whole number", float: "number", str: "text", Path: "path", bool: "flag"}
COMMANDS = """# Command line

Numbers go to stdout, progress and messages to stderr. Exit codes: 0 done, 2 bad input (one line: name, rule, value
received, way out), 3 nothing feasible (what binds, and the nearest plan), 130 interrupted. `tierwise COMMAND --help`
says what follows here.

"""


def commands_page() -> str:
    """Return every command with its arguments and options."""
    return (NOTE + COMMANDS + "\n".join(_command("tierwise", typer.main.get_command(app)))).rstrip() + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        for word, inner in command.commands.items():
            yield from _command(f"{name} {word}", inner)
        return
    arguments = [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]
    yield f"## `{name}`\n"
    yield "\n\n".join(" ".join(block.split()) for block in inspect.cleandoc(command.help).split("\n\n")) + "\n"
    yield f"```text\n{' '.join([name, *arguments, '[OPTIONS]'])}\n```\n"
    if command.params:
        yield "| | type | default | meaning |\n|---|---|---|---|"
        yield from (_parameter(p) for p in command.params)
    yield ""


def _parameter(parameter: Any) -> str:
    given = parameter.param_type_name == "argument"
    name = parameter.metavar or parameter.name.upper() if given else parameter.opts[0]
    default = "" if parameter.default in (None, False, ()) else f"`{_plain(parameter.default)}`"
    needed = "**required**" if parameter.required else default
    return f"| `{name.rstrip('.')}` | {_kind(parameter)} | {needed} | {(parameter.help or '').replace('|', ' or ')} |"


def _kind(parameter: Any) -> str:
    annotation = parameter.type_descriptor.annotation
    inner = typing.get_args(annotation)
    if inner:
        words = {list: "{}, repeatable", tuple: f"{len(inner)} times {{}}"}
        return words[typing.get_origin(annotation)].format(KINDS[inner[0]])
    if issubclass(annotation, Enum):
        return " or ".join(f"`{choice.value}`" for choice in annotation)
    return KINDS[annotation]


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


# --- the derivations -------------------------------------------------------------------------------------------------

DERIVATIONS = """# Derivations

Each closed form of [Speculation](speculation.md) is derived by computer algebra from a definition: a survival
function, a derivative, a condition of stationarity. What stands below each name is what sympy returns, rendered, not
retyped; `tests/test_derivations.py` holds the forms that tierwise computes with to these, to 1e-12.

Symbols: $\\alpha$ acceptance, $\\gamma$ draft length (a whole number), $g$ draft length (a real number), $c$ draft
step over target step, $h$ operations of the draft over those of the target, $a$ and $b$ parameters of a Beta law of
$\\alpha$.

"""
ROUNDS = (1, 2, 5)  # draft lengths for which the forms of one length are shown


def derivations_page() -> str:
    """Return what each function of theory.derivations says and returns."""
    parts = [NOTE, DERIVATIONS]
    for name, function in vars(derivations).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            said = inspect.getdoc(function) or ""
            title = name.replace("_", " ").capitalize()
            link = f"[`theory.derivations.{name}`][theory.derivations.{name}]"
            parts.append(f"## {title}\n\n{_prose(said)}\n\n{_formulas(function)}\n\n{link}\n\n")
    return "".join(parts).rstrip() + "\n"


def _prose(docstring: str) -> str:
    text = re.sub(r"^Return (.)", lambda m: m[1].upper(), docstring.split("\n\nExamples\n")[0])
    text = re.sub(r":math:`([^`]+)`", lambda m: f"${' '.join(m[1].split())}$", text)
    return re.sub(r":func:`(?:[\w.]*\.)?(\w+)`", r"`\1`", text)


def _formulas(function: Callable[..., Any]) -> str:
    if inspect.signature(function).parameters:
        symbol = r"\gamma" if "length" in inspect.signature(function).parameters else "i"
        lines = [f"{symbol} = {n}: \\quad {sympy.latex(function(n))}" for n in ROUNDS]
    else:
        result = function()
        names = (r"\varepsilon_\alpha", r"\varepsilon_c", r"\varepsilon_g")
        several = zip(names, result, strict=True) if isinstance(result, tuple) else [("", result)]
        lines = [f"{sign} = {sympy.latex(form)}".removeprefix(" = ") for sign, form in several]
    return "\n\n".join(f"$$ {line} $$" for line in lines)


# --- writing ---------------------------------------------------------------------------------------------------------


def written() -> dict[Path, str]:
    """Return the text of each file that comes from the code."""
    return {
        DOCS / "reference" / "scenario.md": scenario_page(),
        DOCS / "reference" / "scenario.schema.json": json.dumps(json_schema(), indent=2) + "\n",
        DOCS / "reference" / "commands.md": commands_page(),
        DOCS / "theory" / "derivations.md": derivations_page(),
    }


def main(check: bool) -> int:
    """Write or check; return the exit code."""
    pages = written()
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if not check:
        for path, text in pages.items():
            path.write_text(text, encoding="utf-8")
        return 0
    for path in stale:
        sys.stderr.write(f"{path.name} is not what the code says now; run python docs/tools/reference.py\n")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv[1:]))

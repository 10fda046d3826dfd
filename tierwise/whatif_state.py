"""What a what-if page shows: a scenario and the settings moved on it; as a link, as fields, as a command.

A moved setting is what ``--set a.b=value`` is, so that a bad one gets the same message and a link is a command.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

import yaml

from planner.scenario import SHIPPED, Scenario, read_scenario, scenario_of, shipped_scenarios
from theory.catalog import accelerators
from theory.errors import require

LONGEST = 200_000  # of a scenario's text [characters]


@dataclass(frozen=True, slots=True)
class State:
    """A scenario's text and the settings moved on it."""

    name: str  # of a shipped scenario, or of a file
    text: str  # YAML
    folder: Path  # where relative paths of the scenario start
    moved: tuple[tuple[str, str], ...] = ()  # path and value as YAML, each path once

    def scenario(self) -> Scenario:
        """Return the scenario with its settings moved; refuse as the command line does."""
        return scenario_of(self.text, [f"{path}={value}" for path, value in self.moved], self.name)

    def move(self, path: str, value: str) -> State:
        """Return the state with one more setting moved."""
        kept = tuple((p, v) for p, v in self.moved if p != path and not p.startswith(f"{path}."))
        return replace(self, moved=(*kept, (path, value)))

    def query(self) -> str:
        """Return the query string that :func:`of_query` reads."""
        shipped = self.name in shipped_scenarios()
        source = ("scenario", self.name) if shipped else ("yaml", _packed(self.text))
        named = [] if shipped else [("name", self.name)]
        return urlencode([source, *named, *(("set", f"{path}={value}") for path, value in self.moved)])

    def command(self) -> str:
        """Return the command that plans the same."""
        quoted = [
            json.dumps(f"{path}={value}") if re.search(r"[^\w.=-]", value) else f"{path}={value}"
            for path, value in self.moved
        ]
        return " ".join(["tierwise plan", self.name, *(f"--set {setting}" for setting in quoted)])


def opened(source: str | Path | None) -> State:
    """Return the state of a shipped scenario or a file, nothing moved."""
    text, folder = read_scenario(source or SHIPPED)
    name = str(source or SHIPPED)
    return State(name if name in shipped_scenarios() else Path(name).name, text, folder)


def uploaded(name: str, content: bytes, folder: Path) -> State:
    """Return the state of a file's content; refuse what is no text.

    Raises
    ------
    InputError
        If it is too long, or not UTF-8.
    """
    require(len(content) <= LONGEST, name, f"must have at most {LONGEST} bytes", len(content))
    try:
        return State(name, content.decode("utf-8"), folder)
    except UnicodeDecodeError:
        require(False, name, "must be UTF-8 text", content[:20])
        raise


def of_query(items: Sequence[tuple[str, str]], start: State) -> State:
    """Return the state a link describes; ``start`` without one.

    Raises
    ------
    InputError
        If it names no shipped scenario, or what it carries is broken.
    """
    given: Mapping[str, str] = dict(items)
    state = start
    if "yaml" in given:
        state = State(given.get("name", "scenario.yaml"), _unpacked(given["yaml"]), start.folder)
    elif "scenario" in given and given["scenario"] != start.name:
        known = shipped_scenarios()
        name = given["scenario"]
        require(name in known, "scenario", "must be a shipped name", name, f"Shipped: {', '.join(known)}.")
        state = opened(name)
    for setting in (value for key, value in items if key == "set"):
        path, sign, value = setting.partition("=")
        require(bool(sign) and bool(path), "set", "must have the form a.b=value", setting, "E.g. traffic.rate=4.")
        state = state.move(path, value)
    return state


def _packed(text: str) -> str:
    return base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode()


def _unpacked(packed: str) -> str:
    try:
        reader = zlib.decompressobj()
        text = reader.decompress(base64.urlsafe_b64decode(packed), LONGEST).decode()
    except (ValueError, zlib.error):
        text = ""
    require(bool(text), "yaml", "must be a scenario as a link carries it", packed[:40], "Copy the link again.")
    return text


# --- fields ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Field:
    """A setting that the page lets move."""

    path: str
    label: str
    unit: str
    kind: Literal["number", "choice"]
    group: str
    value: str  # as it stands
    low: float = 0.0  # of the slider, in `unit` [-]
    high: float = 1.0  # the same [-]
    choices: tuple[tuple[str, str], ...] = ()  # value as YAML, and what it is called
    whole: bool = False


OBJECTIVES = {
    "quality_floor": ("least quality", "share right, or top"),
    "budget_usd_per_1000": ("budget", "USD per 1000 requests"),
    "lambda_usd": ("lambda", "USD per right answer"),
}


def fields(scenario: Scenario) -> list[Field]:
    """Return the settings of a scenario that may move, in the order they are shown."""
    return [*_traffic(scenario), *_fleet(scenario), *_slo(scenario), *_tiers(scenario)]


def _number(path: str, label: str, unit: str, group: str, value: float, around: float, whole: bool = False) -> Field:
    least = 1.0 if whole else value / around
    return Field(path, label, unit, "number", group, shown(value), least, value * around, whole=whole)


def _traffic(scenario: Scenario) -> list[Field]:
    traffic, found = scenario.traffic, []
    if traffic.rate is not None:
        found.append(_number("traffic.rate", "arrivals", "requests/s", "Traffic", traffic.rate, 8))
    for name, law in (("prompt", traffic.prompt_tokens), ("output", traffic.output_tokens)):
        if law is not None:
            path = f"traffic.{name}_tokens.median"
            one = _number(path, f"median {name}", "tokens", "Traffic", law.median, 4, whole=True)
            found.append(replace(one, low=max(1.0, law.low, law.median / 4), high=min(4 * law.median, law.high)))
    return found


def _fleet(scenario: Scenario) -> list[Field]:
    found = []
    several = isinstance(scenario.fleet, list)
    for i, pool in enumerate(scenario.pools):
        at, group = (f"fleet.{i}", f"GPUs, pool {i + 1}") if several else ("fleet", "GPUs")
        kinds = tuple((name, name) for name in accelerators())
        found.append(Field(f"{at}.accelerator", "kind", "", "choice", group, pool.accelerator, choices=kinds))
        gpus = _number(f"{at}.gpus", "at most", "GPUs", group, pool.gpus, 4, whole=True)
        found += [gpus, _number(f"{at}.price_per_gpu_hour", "price", "USD/GPU h", group, pool.price_per_gpu_hour, 4)]
    return found


def _slo(scenario: Scenario) -> list[Field]:
    slo = scenario.slo
    return [
        _number("slo.ttft_p99_s", "p99 TTFT of a visit", "s", "Latency objectives", slo.ttft_p99_s, 8),
        _number("slo.tpot_mean_s", "mean TPOT of a visit", "s", "Latency objectives", slo.tpot_mean_s, 8),
    ]


def _tiers(scenario: Scenario) -> list[Field]:
    found = []
    for i, tier in enumerate(scenario.tiers):
        if not tier.drafts:
            continue
        names = [("auto", "best, or none"), ("none", "none"), *((d.model, d.model) for d in tier.drafts)]
        group = f"Draft of {tier.name}"
        found.append(Field(f"tiers.{i}.draft", "draft", "", "choice", group, tier.draft, choices=tuple(names)))
        longest = max(d.max_length for d in tier.drafts)
        lengths = tuple((f"[{n}]", f"{n}") for n in ("auto", *range(1, longest + 1)))
        called = (("[auto]", "best for each batch"), *lengths[1:])
        one = [json.dumps(d.draft_lengths).replace('"', "") for d in tier.drafts]
        found.append(Field(length_path(i), "length", "tokens", "choice", group, one[0], choices=called))
    return found


def length_path(tier: int) -> str:
    """Return the name of the field of a tier's draft length, which moves the lengths of all its drafts."""
    return f"tiers.{tier}.drafts.*.draft_lengths"


def settings(field: Field, value: str, scenario: Scenario) -> list[tuple[str, str]]:
    """Return the settings that a field's new value moves."""
    if "*" not in field.path:
        return [(field.path, value)]
    tier = int(field.path.split(".")[1])
    return [(field.path.replace("*", str(j)), value) for j in range(len(scenario.tiers[tier].drafts))]


def field_of(message: str, paths: Sequence[str]) -> str | None:
    """Return which field a message is about: the one whose path it begins with, or None.

    Examples
    --------
    >>> field_of("`traffic.rate` must be greater than 0; got -1.", ["slo.ttft_p99_s", "traffic.rate"])
    'traffic.rate'
    """
    named = re.match(r"`([^`]+)`", message)
    path = named[1] if named else ""
    alike = [p for p in paths if path and (p == path or p.startswith(f"{path}.") or path.startswith(f"{p}."))]
    return max(alike, key=len) if alike else None


def shown(value: float) -> str:
    """Return a number as a field shows it.

    Examples
    --------
    >>> shown(12.0), shown(0.05), shown(8)
    ('12', '0.05', '8')
    """
    return f"{value:.6g}"


def objective_of(scenario: Scenario) -> tuple[str, str]:
    """Return which objective is asked for and its value."""
    assert scenario.objective is not None
    for name in OBJECTIVES:
        value: Any = getattr(scenario.objective, name)
        if value is not None:
            return name, value if isinstance(value, str) else shown(value)
    raise AssertionError("an objective has exactly one of its fields")


def parsed(value: str) -> Any:
    """Return a value as the command line reads it."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value

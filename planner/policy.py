"""The routing policy of a plan as a file: what a gateway reads, and a reader that carries it out.

``policy.json`` (format ``tierwise-policy/1``) holds

- ``tiers``: name, model and endpoints of each tier, from cheap to dear;
- ``signal``: ``levels`` (0: none is looked at), ``kind``, and ``quantiles``: a raw score is turned into a level by
  counting how many of these quantiles of the same tier's scores lie below it, so level 0 is the least sure;
- ``rules``: ``low`` and ``high``, tables of what to do after which tiers ran and showed which levels: ``run`` a tier or
  ``answer`` with one's answer; and ``high_share``, the share of requests that follow ``high``;
- ``thresholds``: for each tier that may run first, the levels at which its answer stands, to read rather than to run;
- ``lambda``: what a correct answer is worth, with its unit.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from theory.errors import InputError, require

FORMAT = "tierwise-policy/1"
State = tuple[tuple[str, ...], tuple[int, ...]]


class Step(NamedTuple):
    """What to do with a request now."""

    do: Literal["run", "answer", "abstain"]
    tier: str | None


@dataclass(frozen=True, slots=True)
class Router:
    """A routing policy that can be asked what to do next."""

    levels: int
    high_share: float  # of requests that follow `high` [-]
    low: dict[State, Step]
    high: dict[State, Step]

    def next(self, ran: Sequence[str], signals: Sequence[int], draw: float = 1.0) -> Step:
        """Return the next step of a request.

        Parameters
        ----------
        ran : sequence of str
            Tiers that have answered, in the order in which they did.
        signals : sequence of int
            The level each of them showed; ignored by a policy that looks at none.
        draw : float
            Uniform in [0, 1), drawn once a request and kept: below ``high_share`` it follows ``high``.

        Raises
        ------
        InputError
            If the policy cannot come to this state.
        """
        table = self.high if draw < self.high_share else self.low
        state = (tuple(ran), tuple(signals) if self.levels else ())
        require(state in table, "state", "must be one the policy can reach", state, "Ask after each tier has answered.")
        return table[state]


def policy(result: dict[str, Any], endpoints: dict[str, list[str]]) -> dict[str, Any]:
    """Return the content of ``policy.json`` for a plan (the JSON of ``tierwise plan``)."""
    plan, rule = result["plan"], result["plan"]["stop_rule"]
    names = [t["name"] for t in plan["tiers"]]
    alone = [
        {"ran": [], "signals": [], "do": "run", "tier": names[0]},
        {"ran": [names[0]], "signals": [], "do": "answer", "tier": names[0]},
    ]
    levels = rule["levels"]
    rules = {key: rule[key] or alone for key in ("low", "high")}
    return {
        "format": FORMAT,
        "scenario": result["scenario"],
        "tiers": [{"name": t["name"], "model": t["model"], "endpoints": endpoints[t["name"]]} for t in plan["tiers"]],
        "signal": {
            "levels": levels,
            "quantiles": [i / levels for i in range(1, levels)] if levels else [],
            "source": result["provenance"]["signal"],
        },
        "thresholds": {key: _thresholds(rules[key]) for key in rules},
        "rules": {"high_share": rule["high_share"], **rules},
        "lambda": {k: result["lambda"][k] for k in ("value", "unit", "interval")},
    }


def _thresholds(states: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Return the levels of the first tier at which its answer stands."""
    firsts = [s for s in states if len(s["ran"]) == 1 and s["signals"]]
    tiers = {s["ran"][0] for s in firsts}
    return {t: [s["signals"][0] for s in firsts if s["ran"] == [t] and s["do"] == "answer"] for t in sorted(tiers)}


def read_policy(path: Path) -> Router:
    """Return the router of a ``policy.json``.

    Raises
    ------
    InputError
        If the file cannot be read or is no policy of this format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"`policy` must be a readable JSON file; got {path} ({type(error).__name__}).") from None
    found = data.get("format") if isinstance(data, dict) else None
    require(found == FORMAT, "policy", f"must have the format {FORMAT}", found)
    try:
        rules = data["rules"]
        low, high = (_table(rules[key]) for key in ("low", "high"))
        return Router(int(data["signal"]["levels"]), float(rules["high_share"]), low, high)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"`policy` must hold `signal` and `rules`; got {path} ({error}). Write it anew.") from None


def _table(states: list[dict[str, Any]]) -> dict[State, Step]:
    return {(tuple(s["ran"]), tuple(s["signals"])): Step(s["do"], s["tier"]) for s in states}


def level_of(score: float, cuts: Sequence[float]) -> int:
    """Return the level of a raw score: how many of the ascending ``cuts`` lie below it.

    Examples
    --------
    >>> [level_of(score, [0.2, 0.7]) for score in (0.1, 0.5, 0.9)]
    [0, 1, 2]
    """
    return bisect_left(cuts, score)

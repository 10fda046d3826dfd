"""The verbs of the command line as functions: the same arguments, the same dictionaries as ``--format json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner import day
from planner.plan import plan_scenario, silent
from planner.scenario import SHIPPED, load_scenario
from planner.simulate import simulate_scenario
from planner.storage import Means


def plan(
    scenario: str | Path = SHIPPED,
    set: Sequence[str] = (),
    profile: str | None = None,
    seed: int | None = None,
    means: Means | None = None,
) -> dict[str, Any]:
    """Return the plan of a scenario; see ``tierwise plan``.

    Parameters
    ----------
    scenario : str or Path
        Shipped name or YAML file.
    set : sequence of str
        Overrides ``a.b=value``.
    means : Means, optional
        Where the search is kept and who does its work; see :class:`planner.storage.Means`.

    Raises
    ------
    InputError
        If the scenario is broken.
    InfeasibleError
        If nothing keeps its constraints.
    """
    return plan_scenario(*load_scenario(scenario, set), profile=profile, seed=seed, progress=silent, means=means)


def plan_day(
    scenario: str | Path = "fleet-day",
    set: Sequence[str] = (),
    profile: str | None = None,
    seed: int | None = None,
    means: Means | None = None,
) -> dict[str, Any]:
    """Return the plan of a scenario's day; see ``tierwise plan --day``. Arguments and errors as `plan`."""
    asked, folder = load_scenario(scenario, set)
    return day.plan_day(asked, folder, profile=profile, seed=seed, means=means)


def simulate(
    scenario: str | Path = SHIPPED,
    set: Sequence[str] = (),
    profile: str | None = None,
    seed: int | None = None,
    replications: int = 1,
    workers: int = 1,
) -> dict[str, Any]:
    """Return what happens when a scenario's deployment is simulated; see ``tierwise simulate``. Arguments as `plan`.

    Parameters
    ----------
    replications : int
        Independent runs, for intervals across them [-].
    workers : int
        Processes that share them; the result is the same for any number. A script that asks for more than one needs
        ``if __name__ == "__main__":`` [-].
    """
    return simulate_scenario(*load_scenario(scenario, set), profile, seed, silent, replications, workers)

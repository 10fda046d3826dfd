"""Today's deployment beside a plan: what the scenario says is running, under the same traffic and objectives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from theory.errors import InfeasibleError

from . import explain
from .search import Candidate, Search
from .simulate import deployed, missed, simulated_plan
from .space import Space, occupancy
from .storage import Ledger


def today(search: Search, seed: int, kept: Ledger) -> dict[str, Any] | None:
    """Return the figures of the scenario's ``deployment`` with its own stop rule; None if it has none.

    ``predicted`` is None where a tier has no steady state at its load, everything is where it does not fit the fleet:
    ``reason`` then says so.
    """
    problem = search.problem
    choice = problem.scenario.deployment
    if choice is None:
        return None
    nothing: dict[str, Any] = {"tiers": [], "predicted": None, "simulated": None, "keeps_slos": False}
    try:
        candidate = deployed(problem, choice)
    except InfeasibleError as error:
        return nothing | {"reason": str(error)}
    steady, candidate = _answering(candidate, search.space)
    [simulated] = kept.simulations(simulated_plan, {"today": (problem, candidate, seed)})
    return {
        "tiers": [f"{g.replicas} x {g.service.name}{problem.where(g.service.deployment)}" for g in candidate.groups],
        "predicted": explain.predicted(problem, search.space, candidate) if steady else None,
        "simulated": simulated,
        "keeps_slos": not missed(simulated, candidate, problem),
        "reason": None if steady else "a tier gets more requests than its replicas can answer",
    }


def _answering(candidate: Candidate, space: Space) -> tuple[bool, Candidate]:
    """Return whether all tiers have a steady state, and the candidate with its mean time to the answer if so."""
    groups = candidate.groups
    state = occupancy([g.service for g in groups], np.array([g.rate for g in groups]), space.load)
    if not state.stable.all():
        return False, candidate
    visits = dict(zip(candidate.rule.tiers, candidate.rule.visits, strict=True))
    return True, replace(candidate, e2e_s=float(state.e2e_s @ [float(visits[g.tier]) for g in groups]))

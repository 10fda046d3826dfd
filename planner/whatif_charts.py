"""The what-if answer as charts: numbers, names and units of what is drawn, without a word about how.

``tierwise`` draws them twice from the same data: in the browser, and with matplotlib for export.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from simulator.workload import at_rate
from theory import queueing
from theory.queueing import Occupancy

from .build import Problem
from .crossover import without_draft
from .frontier import hull, pareto
from .predict import draft_step, verify_step
from .search import Candidate, Group, price
from .service import Service, with_length
from .simulate import HEADROOM, simulate_candidate
from .space import P99, occupancy
from .whatif import Answer, Confidence

Array = NDArray[np.float64]
Role = Literal["predicted", "simulated", "other", "tier0", "tier1", "tier2", "tier3"]
Shape = Literal["line", "dashed", "step", "points", "open", "ring"]  # open: points that are not filled; ring: one point
LOADS = 24  # rates at which the curves against load are worked out [-]
FAINTEST = 0.08  # of the stability limit, where curves against load begin [-]
FULLEST = 0.985  # of the stability limit, where they end [-]
SIMULATED_AT = (0.4, 0.7, 0.9)  # of the greatest load within the SLOs, besides the load asked about [-]
PARTS = ("weights", "compute", "attention", "elementwise", "communication", "overhead", "drafting")


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis counts, in which unit."""

    name: str
    unit: str
    log: bool = False
    whole: bool = False  # only whole numbers occur

    @property
    def label(self) -> str:
        """Return name and unit."""
        return f"{self.name} [{self.unit}]"


@dataclass(frozen=True, slots=True)
class Series:
    """Points or a line, units of the axes; ``low`` to ``high`` is an interval in y, or in x where ``across`` [-]."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    role: Role
    shape: Shape
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    across: bool = False
    notes: tuple[str, ...] = ()  # one a point, for those who look closer


@dataclass(frozen=True, slots=True)
class Panel:
    """One y axis over the chart's x axis."""

    y: Axis
    series: tuple[Series, ...]
    level: float | None = None  # a horizontal line, in the unit of y [-]


@dataclass(frozen=True, slots=True)
class Chart:
    """Panels above each other that share x, and vertical marks through them all."""

    title: str
    x: Axis
    panels: tuple[Panel, ...]
    marks: tuple[tuple[str, float], ...] = ()  # name and place, in the unit of x [-]


@dataclass(frozen=True, slots=True)
class Stack:
    """Horizontal bars of stacked parts, one a category."""

    title: str
    x: Axis
    categories: tuple[str, ...]
    parts: tuple[tuple[str, tuple[float, ...]], ...]  # in the unit of x [-]


@dataclass(frozen=True, slots=True)
class Simulated:
    """One simulated load."""

    rate: float  # asked for [requests/s]
    figures: dict[str, Any]  # the keys of ``tierwise simulate``
    asked: bool  # whether it is the load asked about, not one around it


def charts(
    answer: Answer, confidence: Confidence | None = None, simulated: tuple[Simulated, ...] = ()
) -> Iterator[tuple[str, Chart | Stack]]:
    """Yield the charts of an answer by name, those that take least to work out first."""
    yield "frontier", frontier(answer, simulated)
    yield "stops", stops(answer)
    yield "schedule", schedule(answer)
    yield "step", step_parts(answer)
    yield "load", against_load(answer, confidence, simulated)


def frontier(answer: Answer, simulated: tuple[Simulated, ...] = ()) -> Chart:
    """Return quality against cost: the plans none beats, those best at some lambda, the chosen one."""
    known = answer.problem.outcomes is not None
    best = [c for c in pareto(answer.candidates) if known]
    vertices = [v.candidate for v in hull(answer.candidates)] if known else []
    drawn = [
        Series(
            "plans",
            tuple(1000 * c.cost for c in best),
            tuple(c.rule.quality for c in best),
            "predicted",
            "points",
            notes=tuple(_in_words(c.groups) for c in best),
        ),
        Series(
            "hull",
            tuple(1000 * c.cost for c in vertices),
            tuple(c.rule.quality for c in vertices),
            "predicted",
            "line",
        ),
    ]
    top = answer.top
    if known and top is not None:
        name = f"all on {answer.problem.scenario.tiers[-1].name}"
        drawn.append(
            Series(name, (1000 * top.cost,), (top.rule.quality,), "other", "points", notes=(_in_words(top.groups),))
        )
    if known:
        c = answer.chosen
        drawn.append(
            Series("this plan", (1000 * c.cost,), (c.rule.quality,), "predicted", "ring", notes=(_in_words(c.groups),))
        )
    own = [s.figures for s in simulated if s.asked and s.figures["quality"] is not None]
    if own:
        quality = [f["quality"] for f in own]
        drawn.append(
            Series(
                "simulated",
                tuple(f["cost"]["usd_per_1000_requests"] for f in own),
                tuple(q["mean"] for q in quality),
                "simulated",
                "points",
                *_ends([q["interval"] for q in quality], [q["mean"] for q in quality]),
            )
        )
    return Chart(
        "Quality against cost",
        Axis("cost", "USD per 1000 requests"),
        (Panel(Axis("quality", "share of right answers"), tuple(drawn)),),
    )


def against_load(answer: Answer, confidence: Confidence | None, simulated: tuple[Simulated, ...]) -> Chart:
    """Return cost, times and the gain from drafts of the chosen replicas against the arrival rate of requests."""
    problem, chosen = answer.problem, answer.chosen
    limit, bears = rate_limits(answer)
    along = (1 - np.cos(np.linspace(0.0, np.pi, LOADS))) / 2  # crowds at both ends, where the curves bend
    rates = limit * (FAINTEST + (FULLEST - FAINTEST) * along)
    usd_per_s = price(problem, chosen.groups)
    state = _states(answer, chosen.groups, [g.service for g in chosen.groups], rates)
    visits = _visits(answer)[:, None]
    e2e = (visits * state.e2e_s.reshape(-1, LOADS)).sum(axis=0)
    ttft = queueing.ttft_quantile(state, P99).reshape(-1, LOADS).max(axis=0)
    cost, late, gain = Axis("cost", "USD per 1000 requests"), Axis("time", "s", log=True), Axis("gain by drafts", "-")
    x = tuple(rates.tolist())
    times = [_line("time to final answer", x, e2e, "predicted"), _dashed("p99 TTFT of a visit", x, ttft, "predicted")]
    costs = [_line("cost of this plan", x, 1000 * usd_per_s / rates, "predicted")]
    if simulated:
        at = tuple(s.rate for s in simulated)
        money = [s.figures["cost"] for s in simulated]
        spent = [m["usd_per_1000_requests"] for m in money]
        ends = _ends([m["usd_per_1000_requests_interval"] for m in money], spent)
        costs.append(Series("simulated", at, tuple(spent), "simulated", "points", *ends))
        times.append(_simulated("simulated", simulated, "e2e_s", "mean", "points"))
        times.append(_simulated("p99 TTFT simulated", simulated, "ttft_s", "p99", "open"))
    return Chart(
        "Against load",
        Axis("arrivals", "requests/s"),
        (
            Panel(cost, tuple(costs)),
            Panel(late, tuple(times)),
            Panel(gain, tuple(_gains(answer, confidence, rates, state.e2e_s)), level=1.0),
        ),
        marks=(("now", problem.rate), ("SLO limit", bears)),
    )


def rate_limits(answer: Answer) -> tuple[float, float]:
    """Return the rate at which the chosen replicas become unstable, and up to which they keep the SLOs [requests/s]."""
    groups, problem = answer.chosen.groups, answer.problem
    most = own_state(answer).rate_limit
    per_replica = np.array([g.rate for g in groups]) / problem.rate
    bears = np.array([answer.search.capacity(g) for g in groups]) / HEADROOM
    return float(np.min(most / per_replica)), float(np.min(bears / per_replica))


@lru_cache(maxsize=8)
def own_state(answer: Answer) -> Occupancy:
    """Return the state of a replica of each tier of the plan at its own load."""
    groups = answer.chosen.groups
    return occupancy([g.service for g in groups], np.array([g.rate for g in groups]), answer.space.load)


def _states(answer: Answer, groups: Sequence[Group], services: list[Service], rates: Array) -> Occupancy:
    """Return the states of services in the places of groups of the plan, at arrival rates of requests, one by one."""
    per_replica = np.array([g.rate for g in groups]) / answer.problem.rate
    repeated = [s for s in services for _ in rates]
    return occupancy(repeated, (per_replica[:, None] * rates).ravel(), answer.space.load)


def _visits(answer: Answer) -> Array:
    rule = answer.chosen.rule
    return np.array([rule.visits[rule.tiers.index(g.tier)] for g in answer.chosen.groups])


def _gains(answer: Answer, confidence: Confidence | None, rates: Array, e2e_s: Array) -> list[Series]:
    """Return how much faster drafts make a visit, by tier, scheduled or at the length best alone; and the crossings.

    Parameters
    ----------
    e2e_s : ndarray
        Mean time of a visit to each tier as planned, at each rate, tier by tier [s].
    """
    drafted = [i for i, g in enumerate(answer.chosen.groups) if g.service.draft is not None]
    if not drafted:
        return []
    groups = [answer.chosen.groups[i] for i in drafted]
    fixed = [_fixed(answer, g) for g in groups]
    plain = [without_draft(answer.space, g) for g in groups]
    with np.errstate(invalid="ignore", divide="ignore"):
        states = _states(answer, groups * 2, [*plain, *fixed], rates).e2e_s.reshape(2, -1, LOADS)
        gain, own = states[0] / states[1], states[0] / e2e_s.reshape(-1, LOADS)[drafted]
    series = []
    for group, ratio, scheduled in zip(groups, gain, own, strict=True):
        name, role = answer.problem.scenario.tiers[group.tier].name, _role(group.tier)
        series.append(_line(name, tuple(rates.tolist()), scheduled, role))
        series.append(_dashed("fixed length", tuple(rates.tolist()), ratio, role))
        crossing = confidence.crossings.get(name) if confidence else None
        if crossing is not None and crossing["crossover_requests_per_s"]:
            per_request = group.rate / answer.problem.rate
            at = crossing["crossover_requests_per_s"] / per_request
            low, high = crossing["crossover_interval_requests_per_s"]
            if at <= rates[-1]:
                series.append(
                    Series(
                        "crossover",
                        (at,),
                        (1.0,),
                        role,
                        "ring",
                        (at if low is None else low / per_request,),
                        (float(rates[-1]) if high is None else min(high / per_request, float(rates[-1])),),
                        across=True,
                    )
                )
    return series


def _fixed(answer: Answer, group: Group) -> Service:
    service = group.service
    if service.draft is None or service.rounds.length[0] == 0:
        return service
    return with_length(service, answer.space.load, int(service.rounds.length[0]))


def step_parts(answer: Answer) -> Stack:
    """Return where the time of a round goes at the mean batch of each tier [ms]."""
    rows = [_parts(answer, g) for g in answer.chosen.groups]
    parts = tuple((name, tuple(row[name] for row in rows)) for name in PARTS if any(row[name] > 1e-6 for row in rows))
    return Stack("Where the time of a round goes", Axis("round at the mean batch", "ms"), _names(answer), parts)


def _parts(answer: Answer, group: Group) -> dict[str, float]:
    service, context = group.service, np.asarray(answer.space.load.context)
    n = np.asarray(mean_batch(answer, group))
    gamma = int(service.rounds.length[min(round(float(n)), len(service.rounds.length)) - 1])
    profile = answer.problem.pool(service.deployment).profile
    verify = verify_step(service.deployment, profile, np.asarray(float(gamma)), n, context)
    row = {name: 1e3 * float(part) for name, part in verify.parts().items()}
    drafting = 0.0
    if service.draft is not None and gamma:
        drafting = gamma * float(draft_step(service.deployment, profile, service.draft, n, context).total)
    return row | {"drafting": 1e3 * drafting}


def mean_batch(answer: Answer, group: Group) -> float:
    """Return the mean number of decoding sequences while a replica is busy, at least 1 [sequences]."""
    at = next(i for i, g in enumerate(answer.chosen.groups) if g is group)
    return max(float(own_state(answer).batch_busy[at]), 1.0)


def stops(answer: Answer) -> Stack:
    """Return, of all requests, how many stop at each tier, go on from it, and never come to it [%]."""
    rule = answer.chosen.rule
    visits = _visits(answer)
    ends = np.array([rule.answers[rule.tiers.index(g.tier)] for g in answer.chosen.groups])
    parts = (("answered here", ends), ("goes on", np.maximum(visits - ends, 0.0)), ("never here", 1 - visits))
    return Stack(
        "Where requests stop",
        Axis("share of requests", "%"),
        _names(answer),
        tuple((name, tuple((100 * share).tolist())) for name, share in parts),
    )


def schedule(answer: Answer) -> Chart:
    """Return the draft length of each tier by batch, and the mean batch."""
    series = []
    for group in answer.chosen.groups:
        service = group.service
        if service.draft is None:
            continue
        name, role = answer.problem.scenario.tiers[group.tier].name, _role(group.tier)
        lengths = service.rounds.length[: service.batch_cap]
        batch = np.arange(1, len(lengths) + 1)
        turns = np.flatnonzero(np.diff(lengths, prepend=-1) | (batch == len(lengths)))  # the first, changes, the last
        series.append(Series(name, tuple(batch[turns].tolist()), tuple(lengths[turns].tolist()), role, "step"))
        n = mean_batch(answer, group)
        at = int(service.rounds.length[min(round(n), service.batch_cap) - 1])
        series.append(Series("mean batch", (n,), (float(at),), role, "ring"))
    return Chart(
        "Draft length by batch",
        Axis("batch", "sequences", log=True),
        (Panel(Axis("draft length", "tokens", whole=True), tuple(series)),),
    )


def simulated_rates(answer: Answer) -> list[float]:
    """Return the loads to simulate: the one asked about first, then some around it [requests/s]."""
    _, bears = rate_limits(answer)
    around = [share * bears for share in SIMULATED_AT]
    return [answer.problem.rate, *(r for r in around if abs(r / answer.problem.rate - 1) > 0.05)]


def simulate_at(problem: Problem, chosen: Candidate, rate: float) -> Simulated:
    """Run a plan request by request at an arrival rate [requests/s]."""
    asked = rate == problem.rate
    at = problem if asked else replace(problem, workload=at_rate(problem.workload, rate))
    return Simulated(rate, simulate_candidate(at, chosen, problem.scenario.search.seed), asked)


def _line(name: str, x: tuple[float, ...], y: Array, role: Role) -> Series:
    good = np.isfinite(y)
    return Series(name, tuple(np.array(x)[good].tolist()), tuple(y[good].tolist()), role, "line")


def _dashed(name: str, x: tuple[float, ...], y: Array, role: Role) -> Series:
    return replace(_line(name, x, y, role), shape="dashed")


def _simulated(name: str, runs: tuple[Simulated, ...], key: str, which: str, shape: Shape) -> Series:
    value = [run.figures[key][which] for run in runs]
    both = _ends([_interval(run.figures[key], which) for run in runs], value)
    return Series(name, tuple(run.rate for run in runs), tuple(value), "simulated", shape, *both)


def _interval(summary: dict[str, Any], which: str) -> list[float | None]:
    found = summary["interval"] if which == "mean" else summary[f"{which}_interval"]
    return list(found)


def _ends(intervals: list[list[float | None]], values: list[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return lower and upper ends; the value itself where there is none."""
    low, high = (
        tuple(float(v if ends[i] is None else ends[i]) for ends, v in zip(intervals, values, strict=True))  # type: ignore[arg-type]
        for i in (0, 1)
    )
    return low, high


def _names(answer: Answer) -> tuple[str, ...]:
    return tuple(answer.problem.scenario.tiers[g.tier].name for g in answer.chosen.groups)


def _role(tier: int) -> Role:
    roles: tuple[Role, ...] = ("tier0", "tier1", "tier2", "tier3")
    return roles[tier]


def _in_words(groups: tuple[Group, ...]) -> str:
    return " + ".join(f"{g.replicas} x {g.service.name}" for g in groups)

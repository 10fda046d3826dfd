"""Stop, escalate, skip, recall or abstain: the best rule for a chain of tiers, its frontier, and its price lambda.

The value of an answer is U = lambda q - c: lambda is in cost units per correct answer, so a cost in dollars takes a
lambda in dollars per correct answer. What was spent is sunk: going on to tier j costs c_j in full. A verifier that
looks at every answer of a tier is part of that tier's cost.

A covariate known before any tier runs selects one of X starts; routing (no signals), cascades (no covariate) and
cascades that route are the same programme on different tables. Any tier may be skipped, so the programme over all
tiers is the best over all their subsets; a tier that no vertex of the frontier visits is dropped
(:func:`tiers_in_use`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InfeasibleError, require
from .outcomes import Array, Outcomes, accuracy, expected_by_signal

TIE = 1e-12  # relative difference below which two moves are worth the same and the cheaper is made [-]; rounding
_BATCH = 2**18  # numbers of a state table solved at once while a frontier is searched [-]


class Point(NamedTuple):
    """A mean cost [cost unit] and a mean quality [-]."""

    cost: float
    quality: float


class Move(NamedTuple):
    """What a policy does next; ``tier`` is an index, -1 for abstaining."""

    kind: Literal["run", "answer", "abstain"]
    tier: int


@dataclass(frozen=True, eq=False)
class Policy:
    """A rule for every state: which tiers ran (a bit mask, bit k = tier k) and the levels they showed.

    The code of a state is its levels as digits in base L, in tier order: ``code = code * L + level`` after each tier,
    the covariate at the start. Its move is ``table[offset[mask] + code]``, or ``actions[mask][code]``: j < K runs tier
    j (always above those that ran), K + i returns tier i's answer, 2 K abstains.
    """

    tiers: tuple[str, ...]
    levels: int  # L [-]
    table: NDArray[np.int8]  # (X (L + 1)^K,) moves of all states, mask after mask
    covariates: int = 1  # X, values of what is known before the first tier [-]

    @cached_property
    def offset(self) -> NDArray[np.int64]:
        """Where the states of each mask begin in ``table``, (2^K,)."""
        return _offsets(len(self.tiers), self.levels, self.covariates)[:-1]

    @cached_property
    def actions(self) -> tuple[NDArray[np.int8], ...]:
        """The moves of each mask, (X L^(tiers run),) each: views of ``table``."""
        return tuple(np.split(self.table, self.offset[1:]))

    @property
    def first(self) -> Move:
        """The first move where the covariate is 0 (without one, always)."""
        return self.action(0, ())

    def action(self, run_mask: int, signals: Sequence[int], covariate: int = 0) -> Move:
        """Return the move after the tiers in ``run_mask`` showed ``signals`` (their levels, in tier order).

        Raises
        ------
        InputError
            If the mask names tiers that do not exist or does not match the signals, or the covariate is none of its X.
        """
        tiers = len(self.tiers)
        require(0 <= run_mask < 1 << tiers, "run_mask", f"must have bits among {tiers} tiers", run_mask)
        fits = len(signals) == run_mask.bit_count() and all(0 <= s < self.levels for s in signals)
        rule = f"must be one level in 0..{self.levels - 1} for each of the {run_mask.bit_count()} tiers run"
        require(fits, "signals", rule, tuple(signals))
        require(0 <= covariate < self.covariates, "covariate", f"must lie in 0..{self.covariates - 1}", covariate)
        code = covariate
        for level in signals:
            code = code * self.levels + level
        move = int(self.actions[run_mask][code])
        if move < tiers:
            return Move("run", move)
        return Move("answer", move - tiers) if move < 2 * tiers else Move("abstain", -1)


@dataclass(frozen=True, eq=False)
class PolicyValue:
    """What a policy does on average."""

    cost: float  # E[c], all visits paid [cost unit per request]
    quality: float  # E[q] of the returned answer; 0 where nothing is returned [-]
    visits: Array  # (K,) share of requests that run the tier [-]
    answers: Array  # (K,) share of requests whose returned answer is the tier's [-]
    stops: Array  # (K,) share of requests that run the tier last, whatever they return; stops[0]: run no other [-]

    @property
    def wrong(self) -> float:
        """Share of requests that get a wrong answer; abstaining gives none [-]."""
        return float(self.answers.sum() - self.quality)

    def mixed(self, other: PolicyValue, share: float) -> PolicyValue:
        """Return the value of following ``other`` with probability ``share`` and this one otherwise."""
        keep = 1.0 - share
        return PolicyValue(
            keep * self.cost + share * other.cost,
            keep * self.quality + share * other.quality,
            keep * self.visits + share * other.visits,
            keep * self.answers + share * other.answers,
            keep * self.stops + share * other.stops,
        )


# ---------------------------------------------------------------- the belief states


@dataclass(frozen=True, eq=False)
class _States:
    """Unnormalised belief of each state, mask after mask: probabilities times what is expected there."""

    levels: int
    covariates: int
    mass: list[Array]  # [mask] (codes,) P(the covariate and the tiers in mask show these levels) [-]
    quality: list[Array]  # [mask] (K, codes) P(..., and tier k is right) [-]
    cost: list[Array]  # [mask] (K, codes) E[c_k; ...] [cost unit]


def _states(outcomes: Outcomes, costs: ArrayLike) -> _States:
    spent = _check_costs(outcomes, costs)
    joint = outcomes.joint
    each = joint.ndim - 1
    paid = joint[0] * spent.reshape(-1, *[1] * each) if spent.ndim == 1 else expected_by_signal(outcomes, spent)
    K = len(outcomes.tiers)
    full = np.concatenate([joint, paid])
    tables = []
    for mask in range(1 << K):
        unseen = tuple(2 + k for k in range(K) if not mask >> k & 1)
        tables.append(full.sum(axis=unseen).reshape(1 + 2 * K, -1))
    return _States(
        outcomes.levels,
        outcomes.covariates,
        [t[0] for t in tables],
        [t[1 : 1 + K] for t in tables],
        [t[1 + K :] for t in tables],
    )


def _offsets(tiers: int, levels: int, covariates: int) -> NDArray[np.int64]:
    """Return where each mask begins in a policy table, and its length, (2^K + 1,)."""
    sizes = [covariates * levels ** mask.bit_count() for mask in range(1 << tiers)]
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


@dataclass(frozen=True, eq=False)
class _Stops:
    """The best answer in hand in each state."""

    quality: list[Array]  # [mask] (codes,) mass of a right answer, less theta times that of a wrong one [-]
    move: list[NDArray[np.int8]]  # [mask] (codes,) the move that returns it


def _stops(outcomes: Outcomes, states: _States, options: _Options) -> _Stops:
    """Return the best answer of each state; equal ones (and unseen states) go to the tier right most often overall."""
    K, theta = len(outcomes.tiers), options.wrong
    by_accuracy = np.argsort(-accuracy(outcomes), kind="stable")
    quality = [np.zeros(states.covariates)]
    move = [np.full(states.covariates, 2 * K, dtype=np.int8)]
    for mask in range(1, 1 << K):
        held = np.array([k for k in by_accuracy if mask >> k & 1] if options.recall else [mask.bit_length() - 1])
        chosen = held[states.quality[mask][held].argmax(axis=0)]
        right = np.take_along_axis(states.quality[mask], chosen[None], axis=0)[0]
        worth = right - theta * (states.mass[mask] - right)
        give_up = options.abstain & (worth < 0)
        quality.append(np.where(give_up, 0.0, worth))
        move.append(np.where(give_up, 2 * K, K + chosen).astype(np.int8))
    return _Stops(quality, move)


class _Options(NamedTuple):
    """What a rule may do and what a wrong answer takes away."""

    recall: bool
    abstain: bool
    wrong: float  # theta [correct answers]


class _Solution(NamedTuple):
    """A policy's table with its mean quality and cost."""

    quality: float
    cost: float
    table: NDArray[np.int8]


def _backward(states: _States, stops: _Stops, a: Array, b: Array, abstain: bool) -> list[_Solution]:
    r"""Return the policies that maximise :math:`a\,E[q] - b\,E[c]`, one for each of the n directions (a, b).

    Backward induction over masks: every child has a larger mask than its parent, so masks are solved from the last.
    Quality and cost to go are carried apart; their sum over the level just seen is the expectation over it.
    """
    K, L = len(states.quality[0]), states.levels
    offset = _offsets(K, L, states.covariates)
    table = np.empty((len(a), offset[-1]), dtype=np.int8)
    scale = max(float(c.sum()) for c in states.cost[0]) or 1.0
    quality: list[Array] = [np.empty(0)] * (1 << K)
    cost: list[Array] = [np.empty(0)] * (1 << K)
    seen = np.ones(L)
    weights = (a[:, None], b[:, None], scale)
    for mask in reversed(range(1 << K)):
        q, c = stops.quality[mask][None], np.zeros((1, len(stops.quality[mask])))
        move = stops.move[mask][None]
        for j in range(mask.bit_length(), K):
            child = mask | 1 << j
            q_on = quality[child].reshape(len(quality[child]), -1, L) @ seen
            c_on = cost[child].reshape(len(cost[child]), -1, L) @ seen + states.cost[mask][j]
            must = mask == 0 and j == 0 and not abstain
            better = must | _better((q_on, c_on), (q, c), weights, states.mass[mask])
            q, c = np.where(better, q_on, q), np.where(better, c_on, c)
            move = np.where(better, np.int8(j), move)
        quality[mask], cost[mask] = q, c
        table[:, offset[mask] : offset[mask + 1]] = move
    return [_Solution(float(quality[0][i].sum()), float(cost[0][i].sum()), table[i]) for i in range(len(a))]


def _better(
    new: tuple[Array, Array], old: tuple[Array, Array], weights: tuple[Array, Array, float], mass: Array
) -> NDArray[np.bool_]:
    """Return where the new (quality, cost) is worth more than the old, or as much and cheaper (or right more often)."""
    a, b, scale = weights
    more, dearer = new[0] - old[0], new[1] - old[1]
    gain, slack = a * more - b * dearer, TIE * (a + b * scale) * mass
    second = np.where(a > 0, -dearer / scale, more)
    return np.asarray((gain > slack) | ((gain >= -slack) & (second > TIE * mass)))


# ---------------------------------------------------------------- solve and evaluate


def solve(
    outcomes: Outcomes,
    costs: ArrayLike,
    lam: float,
    *,
    recall: bool = True,
    abstain: bool = False,
    wrong: float = 0.0,
) -> Policy:
    r"""Return the policy that maximises :math:`E[\lambda q - c]`, q less :math:`\theta` for a wrong answer.

    .. math:: V(s) = \max\{ \lambda \max_{i \in s} (p_i(s) - \theta (1 - p_i(s))),\; 0 \text{ (abstain)},\;
              \max_{j > \mathrm{last}} E[V(s, S_j) - c_j \mid s] \}, \quad p_i(s) = P(i \text{ right} \mid s)

    The state s is the covariate and the levels shown so far. Nothing runs for free: with :math:`\theta = 0` and without
    abstaining :math:`V(x) = \max_j E[V(x, S_j) - c_j \mid x]`.

    Parameters
    ----------
    outcomes : Outcomes
        Joint law of K tiers.
    costs : (K,) or (R, K) array
        Mean cost of one visit, verifier included [cost unit]; per row where failures cost more (wrong answers are
        longer). Costs random within a row enter by their mean: the value is linear in them.
    lam : float
        Price of one more correct answer, at least 0; inf asks for the best quality [cost unit per correct answer].
    recall : bool
        Whether any answer already produced may be returned, or only that of the last tier run.
    abstain : bool
        Whether no answer need be given, before any tier runs or after some did (quality 0, what was spent is spent).
    wrong : float
        theta, how many correct answers one wrong answer takes away, at least 0 [-]. At 0 an answer in hand is always
        worth returning; above it an answer with :math:`p < \theta / (1 + \theta)` is better kept back.

    Returns
    -------
    Policy
        Of equally good moves the cheaper (stop before escalate). A state that never occurs in ``outcomes`` stops with
        the tier that is right most often overall; smooth a table of samples if such states will be met.

    Raises
    ------
    InputError
        If lambda or theta is negative or not a number, or costs are negative, not finite or of another shape.

    Source
    ------
    Derivation: optimal stopping with Bayes' rule over the rows; Dekoninck et al. (2025), arXiv:2410.10347, for
    cascades with skips and for routing as their other end; Chow (1970), IEEE Trans. Inf. Theory 16:41-46, for the
    error-reject trade-off, and Zellinger et al. (2025), arXiv:2502.09054, for abstaining early in a cascade.

    Examples
    --------
    >>> from theory.outcomes import from_patterns, with_verifier
    >>> table = with_verifier(from_patterns(("small", "large"), {"11": 60, "01": 25, "10": 5, "00": 10}), 1.0, 0.0)
    >>> policy = solve(table, (1.0, 5.0), lam=10.0)
    >>> policy.action(1, [1]), policy.action(1, [0])  # accepted; rejected
    (Move(kind='answer', tier=0), Move(kind='run', tier=1))
    >>> value = evaluate(policy, table, (1.0, 5.0))
    >>> round(value.cost, 3), round(value.quality, 3)
    (2.75, 0.9)
    """
    require(lam >= 0, "lam", "must be at least 0 [cost unit per correct answer]", lam)
    a, b = (1.0, 0.0) if math.isinf(lam) else (lam, 1.0)
    options = _options(recall, abstain, wrong)
    states = _states(outcomes, costs)
    best = _backward(states, _stops(outcomes, states, options), np.array([a]), np.array([b]), abstain)
    return Policy(outcomes.tiers, outcomes.levels, best[0].table, outcomes.covariates)


def evaluate(policy: Policy, outcomes: Outcomes, costs: ArrayLike) -> PolicyValue:
    r"""Return what ``policy`` costs and attains on ``outcomes`` exactly, by following it forward from the start.

    .. math:: E[c] = \sum_{s \text{ reached}} E[c_{j(s)}; s], \qquad
              E[q] = \sum_{s \text{ reached}} P(s, i(s) \text{ right})

    The outcomes need not be those it was solved for: this is how a policy is tested on other prompts.

    Raises
    ------
    InputError
        If tiers or levels differ from the policy's, or the costs are refused (:func:`solve`).

    Source
    ------
    Derivation: expectation over the rows, each state weighed by its probability.
    """
    require(outcomes.tiers == policy.tiers, "outcomes", f"must have the tiers {policy.tiers}", outcomes.tiers)
    require(outcomes.levels == policy.levels, "outcomes", f"must have {policy.levels} levels", outcomes.levels)
    known = f"must have a covariate of {policy.covariates} values"
    require(outcomes.covariates == policy.covariates, "outcomes", known, outcomes.covariates)
    states = _states(outcomes, costs)
    K, L = len(policy.tiers), policy.levels
    reached: list[NDArray[np.bool_]] = [np.ones(policy.covariates, dtype=bool)]
    cost, quality, visits, answers, stops = 0.0, 0.0, np.zeros(K), np.zeros(K), np.zeros(K)
    for mask in range(1 << K):
        if mask:
            last = mask.bit_length() - 1
            parent = mask ^ 1 << last
            reached.append(np.repeat(reached[parent] & (policy.actions[parent] == last), L))
        if not reached[mask].any():
            continue
        if mask:
            stops[mask.bit_length() - 1] += states.mass[mask][reached[mask] & (policy.actions[mask] >= K)].sum()
        for k in range(K):
            run = reached[mask] & (policy.actions[mask] == k)
            answer = reached[mask] & (policy.actions[mask] == K + k)
            visits[k] += states.mass[mask][run].sum()
            cost += states.cost[mask][k][run].sum()
            answers[k] += states.mass[mask][answer].sum()
            quality += states.quality[mask][k][answer].sum()
    return PolicyValue(float(cost), float(quality), visits, answers, stops)


def execute(
    policy: Policy, levels: NDArray[np.intp], covariate: NDArray[np.intp] | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Return which tiers each request runs, (n, K), and whose answer it returns, (n,), -1 for none.

    Parameters
    ----------
    policy : Policy
    levels : (n, K) array of integers
        The level each tier shows if it is run (:func:`theory.outcomes.draw`).
    covariate : (n,) array of integers
        What is known of each request beforehand (:func:`theory.outcomes.draw_covariate`); a policy with more than one
        value of it cannot do without.

    Raises
    ------
    InputError
        If the levels are not of the policy's tiers, or the covariate not one value a request.
    """
    n, K = levels.shape
    require(len(policy.tiers) == K, "levels", f"must have {len(policy.tiers)} columns", levels.shape)
    known = np.zeros(n, dtype=np.int64) if covariate is None and policy.covariates == 1 else covariate
    fits = known is not None and known.shape == (n,) and bool(np.all((known >= 0) & (known < policy.covariates)))
    require(fits, "covariate", f"must hold {n} integers in 0..{policy.covariates - 1}", covariate)
    mask, code = np.zeros(n, dtype=np.int64), np.asarray(known, dtype=np.int64)
    for j in range(K):
        run = policy.table[policy.offset[mask] + code] == j
        code = np.where(run, code * policy.levels + levels[:, j], code)
        mask = np.where(run, mask | 1 << j, mask)
    move = policy.table[policy.offset[mask] + code].astype(np.intp)
    return (mask[:, None] >> np.arange(K) & 1).astype(bool), np.where(move < 2 * K, move - K, -1)


# ---------------------------------------------------------------- the frontier and its dual


class Vertex(NamedTuple):
    """A policy no mixture of others beats, and the lambdas it is best for: above ``lam_low``, up to ``lam_high``."""

    policy: Policy
    cost: float  # [cost unit per request]
    quality: float  # [-]
    lam_low: float  # [cost unit per correct answer]
    lam_high: float  # [cost unit per correct answer]


class Mixture(NamedTuple):
    """Follow ``high`` with probability ``gamma``, else ``low``: two neighbours, both best at the price ``lam``."""

    low: Vertex
    high: Vertex
    gamma: float  # [-]
    cost: float  # [cost unit per request]
    quality: float  # [-]
    lam: float  # the edge's slope dc/dq; 0 where there is a single vertex [cost unit per correct answer]


@dataclass(frozen=True, eq=False)
class Frontier:
    """The best quality at each mean cost: concave, its vertices policies, its edges mixtures of two neighbours.

    Strong duality holds because mixing is allowed: the slope 1/lambda of the edge at a budget is the multiplier of the
    budget. A policy below the hull is best for no lambda.
    """

    vertices: tuple[Vertex, ...]  # cheapest first; cost and quality strictly increase

    @cached_property
    def cost(self) -> Array:
        """Mean costs of the vertices, (n,) [cost unit per request]."""
        return np.array([v.cost for v in self.vertices])

    @cached_property
    def quality(self) -> Array:
        """Mean qualities of the vertices, (n,) [-]."""
        return np.array([v.quality for v in self.vertices])

    def at_lambda(self, lam: float) -> Vertex:
        """Return the best policy at price ``lam`` [cost unit per correct answer]; of two equally good the cheaper.

        Raises
        ------
        InputError
            If lambda is negative or not a number.
        """
        require(lam >= 0, "lam", "must be at least 0 [cost unit per correct answer]", lam)
        return self.vertices[int(np.searchsorted([v.lam_high for v in self.vertices], lam))]

    def at_budget(self, budget: float) -> Mixture:
        """Return the best mixture whose mean cost is ``budget`` [cost unit per request].

        Raises
        ------
        InfeasibleError
            If even the cheapest policy costs more.
        InputError
            If the budget exceeds what the best policy can use, or is not a number.
        """
        low, high = float(self.cost[0]), float(self.cost[-1])
        unit, rounding = "[cost unit per request]", 1e-9 * high
        if budget < low - rounding:
            raise InfeasibleError(f"`budget` must be at least {low:.6g} {unit}, the cheapest plan's; got {budget!r}.")
        way_out = f"Pass {high:.6g}, which buys the best quality there is, {self.quality[-1]:.6g}."
        require(budget <= high + rounding, "budget", f"binds only up to {high:.6g} {unit}", budget, way_out)
        return self._between(self.cost, budget)

    def at_quality(self, quality: float) -> Mixture:
        """Return the cheapest mixture whose mean quality is ``quality`` [-].

        Raises
        ------
        InfeasibleError
            If no policy is right that often.
        InputError
            If the cheapest policy is already better, or the quality is not a number.
        """
        low, high = float(self.quality[0]), float(self.quality[-1])
        if quality > high + 1e-9:
            raise InfeasibleError(f"`quality` must be at most {high:.6g} [-], the best plan's; got {quality!r}.")
        way_out = f"Pass {low:.6g}, which the cheapest plan reaches at {self.cost[0]:.6g} per request."
        require(quality >= low - 1e-9, "quality", f"binds only from {low:.6g} [-]", quality, way_out)
        return self._between(self.quality, quality)

    def _between(self, at: Array, wanted: float) -> Mixture:
        """Return the mixture of the two vertices around ``wanted`` on the axis ``at``."""
        i = int(np.clip(np.searchsorted(at, wanted, side="right") - 1, 0, max(len(at) - 2, 0)))
        low, high = self.vertices[i], self.vertices[min(i + 1, len(at) - 1)]
        if low is high:
            return Mixture(low, high, 0.0, low.cost, low.quality, 0.0)
        gamma = float(np.clip((wanted - at[i]) / (at[i + 1] - at[i]), 0.0, 1.0))
        cost = (1 - gamma) * low.cost + gamma * high.cost
        quality = (1 - gamma) * low.quality + gamma * high.quality
        return Mixture(low, high, gamma, cost, quality, low.lam_high)


def frontier(
    outcomes: Outcomes,
    costs: ArrayLike,
    *,
    recall: bool = True,
    abstain: bool = False,
    wrong: float = 0.0,
    tolerance: float = 1e-10,
) -> Frontier:
    r"""Return all vertices of the concave hull of attainable (E[c], E[q]), q less theta times what is wrong.

    Two known vertices span a chord; the policy that is best in the chord's own direction,
    :math:`\lambda = \Delta c / \Delta q`, lies above it (a new vertex, two new chords) or shows that nothing does.
    All open chords are solved in one sweep of the dynamic programme.

    Parameters
    ----------
    outcomes, costs, recall, abstain, wrong
        As in :func:`solve`.
    tolerance : float
        Chords less than this below the hull are left as they are [-]: 1e-10 finds every vertex there is, 1e-4 gives
        the hull to a hundredth of a point with far fewer policies.

    Raises
    ------
    InputError
        If the tolerance is not above 0, or costs are refused (:func:`solve`).

    Source
    ------
    Derivation: dichotomic search for supported efficient points, Aneja & Nair (1979), Management Science 25:73-78.

    Examples
    --------
    >>> from theory.outcomes import from_patterns, with_verifier
    >>> table = with_verifier(from_patterns(("small", "large"), {"11": 60, "01": 25, "10": 5, "00": 10}), 1.0, 0.0)
    >>> curve = frontier(table, (1.0, 5.0))
    >>> [(round(v.cost, 2), round(v.quality, 2), round(v.lam_low, 2)) for v in curve.vertices]
    [(1.0, 0.65, 0.0), (2.75, 0.9, 7.0)]
    >>> mixture = curve.at_budget(2.0)
    >>> round(mixture.gamma, 3), round(mixture.cost, 3), round(mixture.lam, 3)
    (0.571, 2.0, 7.0)
    """
    require(tolerance > 0, "tolerance", "must be above 0 [-]", tolerance)
    options = _options(recall, abstain, wrong)
    states = _states(outcomes, costs)
    stops = _stops(outcomes, states, options)
    cheapest, best = (_backward(states, stops, np.array([a]), np.array([1 - a]), abstain)[0] for a in (0.0, 1.0))
    found = [cheapest]
    chords = [(cheapest, best)] if best.quality - cheapest.quality > tolerance else []
    found += [best] if chords else []
    while chords:
        opened = []
        for (low, high), new in zip(chords, _along(chords, states, stops, abstain), strict=True):
            if _above(new, low, high) > tolerance:
                found.append(new)
                opened += [(low, new), (new, high)]
        chords = opened
    return Frontier(_vertices(outcomes, found))


_Chord = tuple[_Solution, _Solution]


def _along(chords: list[_Chord], states: _States, stops: _Stops, abstain: bool) -> list[_Solution]:
    """Return the best policy in the direction (dc, dq) of each chord, a batch of chords at a time."""
    dc = np.array([high.cost - low.cost for low, high in chords])
    dq = np.array([high.quality - low.quality for low, high in chords])
    step = max(1, _BATCH // len(states.mass[-1]))
    batches = [slice(i, i + step) for i in range(0, len(chords), step)]
    return [new for at in batches for new in _backward(states, stops, dc[at], dq[at], abstain)]


def _above(new: _Solution, low: _Solution, high: _Solution) -> float:
    """Return how far ``new`` lies above the chord, at its own cost [-]."""
    slope = (high.quality - low.quality) / (high.cost - low.cost)
    return new.quality - low.quality - slope * (new.cost - low.cost)


def _vertices(outcomes: Outcomes, found: list[_Solution]) -> tuple[Vertex, ...]:
    """Return the solutions in order of cost with the lambdas between which each is best."""
    hull: list[_Solution] = []
    for new in sorted(found, key=lambda s: (s.cost, -s.quality)):
        # two solutions equal to rounding, or three on a line, can be found from different chords
        while len(hull) > 1 and _above(hull[-1], hull[-2], new) <= TIE:
            hull.pop()
        if not hull or new.quality - hull[-1].quality > TIE:
            hull.append(new)
    edges = [(high.cost - low.cost) / (high.quality - low.quality) for low, high in pairwise(hull)]
    return tuple(
        Vertex(
            Policy(outcomes.tiers, outcomes.levels, s.table.copy(), outcomes.covariates), s.cost, s.quality, low, high
        )
        for s, low, high in zip(hull, [0.0, *edges], [*edges, math.inf], strict=True)
    )


# ---------------------------------------------------------------- bounds and special cases


def tiers_in_use(curve: Frontier, outcomes: Outcomes, costs: ArrayLike) -> tuple[str, ...]:
    """Return the tiers that some vertex of the frontier runs; the others are best dropped at every lambda.

    Raises
    ------
    InputError
        If the outcomes or costs do not fit the policies (:func:`evaluate`).
    """
    visits = np.max([evaluate(v.policy, outcomes, costs).visits for v in curve.vertices], axis=0)
    return tuple(tier for tier, share in zip(outcomes.tiers, visits, strict=True) if share > 0)


def single_tiers(outcomes: Outcomes, costs: ArrayLike) -> tuple[Point, ...]:
    """Return the cost and quality of sending every request to one tier, K points; their hull needs no signal."""
    spent = _check_costs(outcomes, costs)
    mean = spent if spent.ndim == 1 else outcomes.weight @ spent
    return tuple(Point(float(c), float(q)) for c, q in zip(mean, accuracy(outcomes), strict=True))


def oracle(outcomes: Outcomes, costs: ArrayLike, lam: float = math.inf) -> Point:
    r"""Return the point of a router that knows each row beforehand and runs one tier: an upper bound, not a policy.

    .. math:: E_r[\max_j \lambda q_{rj} - c_{rj}]

    At ``lam`` = inf it picks the cheapest of the tiers that are right, and the cheapest of all where none is.

    Raises
    ------
    InputError
        If lambda is negative or not a number, or costs are refused (:func:`solve`).

    Source
    ------
    Derivation: per pattern of right and wrong the cheapest right tier, where it is worth its cost.
    """
    require(lam >= 0, "lam", "must be at least 0 [cost unit per correct answer]", lam)
    spent = np.broadcast_to(_check_costs(outcomes, costs), outcomes.correct.shape)
    if math.isinf(lam):
        best = outcomes.correct >= outcomes.correct.max(axis=1, keepdims=True)
        chosen = np.where(best, spent, np.inf).argmin(axis=1)[:, None]
    else:
        chosen = (lam * outcomes.correct - spent).argmax(axis=1)[:, None]
    cost, quality = (np.take_along_axis(t, chosen, axis=1)[:, 0] for t in (spent, outcomes.correct))
    return Point(float(outcomes.weight @ cost), float(outcomes.weight @ quality))


def verifier_price(outcomes: Outcomes, costs: ArrayLike, lam: float, tier: int) -> float:
    r"""Return what a verifier of a tier may cost per visit at most: its value of information [cost unit].

    .. math:: V(c + v\,e_i;\ \text{signals}) = V(c;\ \text{signals but that of tier } i)

    Parameters
    ----------
    outcomes : Outcomes
        With the verdicts of the tier's verifier as the tier's signal.
    costs : (K,) or (R, K) array
        Of visits without that verifier [cost unit].
    lam : float
        Price of one more correct answer, finite [cost unit per correct answer].
    tier : int
        Index of the tier.

    Returns
    -------
    float
        v; 0 for a verdict that changes nothing. A verifier that costs more is better left out.

    Raises
    ------
    InputError
        If lambda is not finite, there is no such tier, or costs are refused (:func:`solve`).

    Source
    ------
    Howard (1966), IEEE Trans. Syst. Sci. Cybern. 2:22-26, value of information, per visit where it is bought.

    Examples
    --------
    It saves the second tier's visits on what the first has right, 5 x 0.65; either way 0.9 are right in the end:

    >>> from theory.outcomes import from_patterns, with_verifier
    >>> table = with_verifier(from_patterns(("small", "large"), {"11": 60, "01": 25, "10": 5, "00": 10}), 1.0, 0.0)
    >>> round(verifier_price(table, (1.0, 5.0), 40.0, tier=0), 6)
    3.25
    """
    require(0 <= lam < math.inf, "lam", "must be finite and at least 0 [cost unit per correct answer]", lam)
    require(0 <= tier < len(outcomes.tiers), "tier", f"must lie in 0..{len(outcomes.tiers) - 1}", tier)
    spent = _check_costs(outcomes, costs)
    signal = outcomes.signal.copy()
    signal[:, tier] = np.eye(outcomes.levels)[0]
    blind = replace(outcomes, signal=signal)

    def worth(table: Outcomes, price: float) -> float:
        value = evaluate(solve(table, paid := spent + price * np.eye(len(outcomes.tiers))[tier], lam), table, paid)
        return lam * value.quality - value.cost

    without = worth(blind, 0.0)
    low, high = 0.0, lam  # no verdict is worth more than a correct answer
    if worth(outcomes, low) - without <= TIE * (lam + float(spent.sum())):
        return 0.0
    for _ in range(60):  # halvings
        middle = (low + high) / 2
        low, high = (middle, high) if worth(outcomes, middle) > without else (low, middle)
    return low


def relative_lambda(lam: float, top_cost: float) -> float:
    """Return lambda' = lambda / c_top, how many calls of the dearest tier one more correct answer is worth [-].

    Below 1 nothing is ever escalated to that tier, even from a certainly wrong to a certainly right answer.

    Raises
    ------
    InputError
        If lambda is negative or the cost is not above 0.
    """
    require(lam >= 0, "lam", "must be at least 0 [cost unit per correct answer]", lam)
    require(top_cost > 0, "top_cost", "must be above 0 [cost unit]", top_cost)
    return lam / top_cost


def two_tier_escalates(outcomes: Outcomes, second_cost: ArrayLike, lam: float) -> NDArray[np.bool_]:
    r"""Return for each covariate and level of the first of two tiers whether the second is run, (X, L).

    .. math:: E[Q_2 - Q_1 \mid x, s_1] > E[c_2 \mid x, s_1] / \lambda

    Parameters
    ----------
    second_cost : float or (R,) array
        Cost of the second tier [cost unit], per row where it goes with failure.

    Assumes
    -------
    The second answer is returned once it is there (no recall).

    Raises
    ------
    InputError
        Unless there are two tiers, a cost of at least 0 and a lambda above 0.

    Source
    ------
    Jitkrittum et al. (2023), arXiv:2307.02764 (the optimal rule defers iff eta_2 - eta_1 > c).
    """
    require(len(outcomes.tiers) == 2, "outcomes", "must have two tiers", outcomes.tiers, "Use `solve`.")
    spent = np.asarray(second_cost, dtype=np.float64)
    require(bool(np.all(spent >= 0)), "second_cost", "must be at least 0 [cost unit]", second_cost)
    require(lam > 0, "lam", "must be above 0 [cost unit per correct answer]", lam)
    cost = np.broadcast_to(spent, outcomes.weight.shape)[:, None]
    paid = expected_by_signal(outcomes, cost)[0].sum(axis=2)
    _, first, second = outcomes.joint.sum(axis=3)
    return np.asarray(second - first > paid / lam)


def pandora_index(quality: ArrayLike, cost: ArrayLike, lam: float) -> Array:
    r"""Return the reservation value of each verifiable tier, (K,) [cost unit].

    .. math:: E[(\lambda Q_i - \sigma_i)^+] = c_i \;\Rightarrow\; \sigma_i = \lambda - c_i / q_i

    Tiers are opened in decreasing index, that is in increasing cost per correct answer, while the index is above what
    is in hand. -inf for a tier that is never right.

    Assumes
    -------
    Tiers are right independently of each other and a truthful verifier says whether they are. Real tiers are not: this
    is a bound and a test case.

    Raises
    ------
    InputError
        If qualities are not probabilities, costs are not above 0, or lambda is negative.

    Source
    ------
    Weitzman (1979), Econometrica 47:641-654, for Bernoulli prizes.

    Examples
    --------
    >>> pandora_index([0.8, 0.5], [1.6, 4.0], lam=10.0).tolist()
    [8.0, 2.0]
    """
    q, c = np.asarray(quality, dtype=np.float64), np.asarray(cost, dtype=np.float64)
    require(bool(np.all((q >= 0) & (q <= 1))), "quality", "must lie in [0, 1] [-]", q.tolist())
    require(bool(np.all((c > 0) & np.isfinite(c))), "cost", "must be finite and above 0 [cost unit]", c.tolist())
    require(lam >= 0, "lam", "must be at least 0 [cost unit per correct answer]", lam)
    return np.where(q > 0, lam - c / np.where(q > 0, q, 1.0), -np.inf)


def pandora_value(quality: ArrayLike, cost: ArrayLike, lam: float) -> float:
    r"""Return the value of opening verifiable tiers by index, with nothing to be run if none is worth it [cost unit].

    .. math:: E[\max(0, \max_i \min(\lambda Q_i, \sigma_i))]
              = \sum_i \sigma_i^+ q_i \prod_{\sigma_j > \sigma_i} (1 - q_j)

    Source
    ------
    Kleinberg, Waggoner & Weyl (2016), arXiv:1603.07682, the amortised form; assumptions as in :func:`pandora_index`.
    """
    index = pandora_index(quality, cost, lam)
    order = np.argsort(-index, kind="stable")
    q = np.asarray(quality, dtype=np.float64)[order]
    unsolved = np.concatenate([[1.0], np.cumprod(1 - q)[:-1]])
    return float((np.maximum(index[order], 0.0) * q * unsolved).sum())


# ---------------------------------------------------------------- checks


def _options(recall: bool, abstain: bool, wrong: float) -> _Options:
    require(wrong >= 0 and math.isfinite(wrong), "wrong", "must be finite and at least 0 [correct answers]", wrong)
    return _Options(recall, abstain, wrong)


def _check_costs(outcomes: Outcomes, costs: ArrayLike) -> Array:
    spent = np.asarray(costs, dtype=np.float64)
    rows, tiers = outcomes.correct.shape
    fits = spent.shape in ((tiers,), (rows, tiers))
    require(fits, "costs", f"must have shape ({tiers},) or ({rows}, {tiers}) [cost unit]", spent.shape)
    bad = spent[~(np.isfinite(spent) & (spent >= 0))]
    require(bad.size == 0, "costs", "must be finite and at least 0 [cost unit]", float(bad[0]) if bad.size else None)
    return spent

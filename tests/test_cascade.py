"""Stop, escalate, skip, recall: against enumeration of every rule, linear programmes, execution and closed forms."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import norm

from theory.cascade import (
    Frontier,
    Move,
    Policy,
    evaluate,
    execute,
    frontier,
    oracle,
    pandora_index,
    pandora_value,
    relative_lambda,
    single_tiers,
    solve,
    tiers_in_use,
    two_tier_escalates,
    verifier_price,
)
from theory.errors import InfeasibleError, InputError
from theory.outcomes import (
    Array,
    Outcomes,
    accuracy,
    by_covariate,
    draw,
    draw_covariate,
    from_patterns,
    from_samples,
    with_binormal_signal,
    with_verifier,
    without_covariate,
    without_signal,
)

TIERS = ("13b", "34b", "70b")
COSTS = (1.6, 4.2, 8.8)  # 0.125 per billion parameters, the ratio of FLOPs per token [cost unit]
# Abel-13B, ToRA-Code-34B, ToRA-70B on the 1319 problems of the GSM8K test set; counted from the authors' own outputs
GSM8K = {"111": 771, "110": 29, "101": 49, "100": 27, "011": 229, "010": 33, "001": 63, "000": 118}
LAMBDAS = (0.0, 0.3, 2.0, 7.0, 25.0, 300.0, math.inf)

seeds = st.integers(0, 2**32 - 1)


def random_case(seed: int, tiers: int | None = None, levels: int | None = None) -> tuple[Outcomes, Array]:
    """Random joint outcomes with random costs; half of them on a coarse grid, so that ties occur."""
    rng = np.random.default_rng(seed)
    K, L, R = tiers or int(rng.integers(1, 4)), levels or int(rng.integers(1, 3)), int(rng.integers(1, 9))
    correct = np.round(rng.random((R, K)), 0 if rng.random() < 0.7 else 2)
    signal = rng.dirichlet(np.ones(L), (R, K))
    weight = rng.dirichlet(np.ones(R))
    costs = rng.uniform(0.1, 9.0, (R, K) if rng.random() < 0.3 else K)
    if rng.random() < 0.5:
        signal = np.eye(L)[rng.integers(0, L, (R, K))]
        weight, costs = np.full(R, 1 / R), np.round(costs)
    return Outcomes(tuple("abcd"[:K]), weight, correct, signal), costs


def gsm8k(auroc: float = 0.8, levels: int = 6) -> Outcomes:
    return with_binormal_signal(from_patterns(TIERS, GSM8K), auroc, levels)


def worth(lam: float, cost: Array | float, quality: Array | float) -> Array:
    return np.asarray(quality if math.isinf(lam) else lam * np.asarray(quality) - cost)


# ---------------------------------------------------------------- every rule there is


def every_rule(outcomes: Outcomes, costs: Array, recall: bool, abstain: bool = False, wrong: float = 0.0) -> Array:
    """Return (cost, net quality) of every deterministic rule, (rules, 2), by enumeration: nothing is ever maximised."""
    K, L = len(outcomes.tiers), outcomes.levels
    spent = np.broadcast_to(costs, outcomes.correct.shape)
    net = outcomes.correct - wrong * (1 - outcomes.correct)

    def from_here(run: tuple[int, ...], mass: Array) -> Array:
        rules = [[0.0, mass @ net[:, k]] for k in (run if recall else run[-1:])]
        rules += [[0.0, 0.0]] if abstain else []
        for j in range(run[-1] + 1 if run else 0, K):
            after = [from_here((*run, j), mass * outcomes.signal[:, j, level]) for level in range(L)]
            for combination in itertools.product(*after):
                cost, quality = np.sum(combination, axis=0)
                rules.append([cost + mass @ spent[:, j], quality])
        return np.array(rules)

    each = [from_here((), outcomes.weight * outcomes.covariate[:, x]) for x in range(outcomes.covariates)]
    return np.array([np.sum(combination, axis=0) for combination in itertools.product(*each)])


def test_the_enumeration_is_complete() -> None:
    """Two levels: the last tier leaves 2^2 rules below {1}, so {1} has 1 + 2^2 = 5; {0}: 1 + 2^2 + (2 + 3^2)^2."""
    outcomes, costs = random_case(1, tiers=3, levels=2)
    assert len(every_rule(outcomes, costs, recall=True)) == 126**2 + 5**2 + 1


@settings(deadline=None, max_examples=40)
@given(seeds, st.booleans())
def test_no_rule_is_worth_more(seed: int, recall: bool) -> None:
    outcomes, costs = random_case(seed)
    rules = every_rule(outcomes, costs, recall)
    for lam in LAMBDAS:
        value = evaluate(solve(outcomes, costs, lam, recall=recall), outcomes, costs)
        values = worth(lam, rules[:, 0], rules[:, 1])
        assert worth(lam, value.cost, value.quality) == pytest.approx(values.max(), abs=1e-9)
        equally_good = values >= values.max() - 1e-10
        assert value.cost == pytest.approx(rules[equally_good, 0].min(), abs=1e-7)  # of equals the cheapest


def known_beforehand(seed: int) -> tuple[Outcomes, Array]:
    """A random case of up to two tiers with a covariate of two values, certain or not in each row."""
    outcomes, costs = random_case(seed, tiers=1 + seed % 2)
    rng = np.random.default_rng(seed)
    rows = len(outcomes.weight)
    known = rng.dirichlet([0.5, 0.5], rows) if seed % 3 else np.eye(2)[rng.integers(0, 2, rows)]
    return replace(outcomes, covariate=known), costs


@settings(deadline=None, max_examples=40)
@given(seeds, st.booleans(), st.booleans(), st.sampled_from([0.0, 0.4, 3.0]))
def test_no_rule_with_a_covariate_is_worth_more(seed: int, recall: bool, abstain: bool, wrong: float) -> None:
    outcomes, costs = known_beforehand(seed)
    rules = every_rule(outcomes, costs, recall, abstain, wrong)
    curve = frontier(outcomes, costs, recall=recall, abstain=abstain, wrong=wrong)
    for lam in LAMBDAS:
        policy = solve(outcomes, costs, lam, recall=recall, abstain=abstain, wrong=wrong)
        value = evaluate(policy, outcomes, costs)
        net = value.quality - wrong * value.wrong
        best = worth(lam, rules[:, 0], rules[:, 1]).max()
        assert worth(lam, value.cost, net) == pytest.approx(best, abs=1e-9)
        vertex = curve.at_lambda(lam)
        assert worth(lam, vertex.cost, vertex.quality) == pytest.approx(best, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(seeds, st.floats(0.5, 60.0))
def test_routing_and_cascades_are_two_ends_of_one_programme(seed: int, lam: float) -> None:
    """A router picks for each x the tier with the largest lambda P(right | x) - c; both together are worth no less."""
    rng = np.random.default_rng(seed)
    tables = [random_case(int(s), tiers=3, levels=2)[0] for s in rng.integers(0, 2**31, 3)]
    share = rng.dirichlet(np.ones(3))
    outcomes, costs = by_covariate(tables, share), rng.uniform(0.1, 9.0, 3)

    def value(of: Outcomes) -> float:
        found = evaluate(solve(of, costs, lam), of, costs)
        return lam * found.quality - found.cost

    routed = sum(p * max(lam * accuracy(t) - costs) for p, t in zip(share, tables, strict=True))
    assert value(without_signal(outcomes)) == pytest.approx(routed, abs=1e-9)
    both = value(outcomes)
    assert both == pytest.approx(sum(p * value(t) for p, t in zip(share, tables, strict=True)), abs=1e-9)
    assert both >= max(routed, value(without_covariate(outcomes))) - 1e-9


def test_a_covariate_is_seen_before_any_tier_and_not_after() -> None:
    """Hopeless requests known beforehand go to the cheap tier; the same knowledge as a signal of 13b comes too late."""
    easy, hard = (from_patterns(("a", "b"), p) for p in ({"11": 1.0}, {"00": 1.0}))
    known = by_covariate((easy, hard), (0.5, 0.5))
    value = evaluate(solve(known, (1.0, 2.0), 3.0, abstain=True), known, (1.0, 2.0))
    assert (value.cost, value.quality) == (0.5, 0.5)
    shown = with_verifier(without_covariate(known), 1.0, 0.0)
    assert evaluate(solve(shown, (1.0, 2.0), 3.0, abstain=True), shown, (1.0, 2.0)).cost == 1.0


def test_execution_with_a_covariate_agrees_with_evaluation() -> None:
    """Draw, follow, compare within 99.9 %; with the covariates of other requests the figures are outside."""
    parts = [with_binormal_signal(from_patterns(TIERS, {**GSM8K, "000": n}), 0.8, 4) for n in (10, 3000)]
    outcomes, n, rng = by_covariate(parts, (0.7, 0.3)), 100_000, np.random.default_rng(5)
    policy = solve(outcomes, COSTS, 25.0)
    value = evaluate(policy, outcomes, COSTS)
    row, level = draw(outcomes, n, rng)
    known = draw_covariate(outcomes, row, rng)

    def consistent(covariate: np.ndarray) -> bool:
        visited, answer = execute(policy, level, covariate)
        samples = np.column_stack([visited @ np.array(COSTS), outcomes.correct[row, answer]])
        spread = norm.ppf(1 - 0.0005 / 2) * samples.std(axis=0) / math.sqrt(n)
        return bool(np.all(np.abs(samples.mean(axis=0) - (value.cost, value.quality)) <= spread))

    assert consistent(known)
    assert not consistent(rng.permutation(known))


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from([2.0, 15.0, 80.0]))
def test_all_tiers_are_worth_the_best_of_their_subsets(seed: int, lam: float) -> None:
    outcomes, costs = random_case(seed, tiers=3)

    def value(at: tuple[int, ...]) -> float:
        part = replace(
            outcomes,
            tiers=tuple(outcomes.tiers[k] for k in at),
            correct=outcomes.correct[:, at],
            signal=outcomes.signal[:, at],
        )
        found = evaluate(solve(part, costs[..., at], lam), part, costs[..., at])
        return lam * found.quality - found.cost

    subsets = [at for n in (1, 2, 3) for at in itertools.combinations(range(3), n)]
    assert value((0, 1, 2)) == pytest.approx(max(map(value, subsets)), abs=1e-9)


def test_a_tier_that_is_never_the_best_stop_is_dropped() -> None:
    """Right only where the small tier is, and dearer: no lambda ever runs it; a little cheaper than it helps: it is."""
    outcomes = with_verifier(from_patterns(TIERS, {"111": 0.6, "001": 0.3, "000": 0.1}), 1.0, 0.0)
    assert tiers_in_use(frontier(outcomes, COSTS), outcomes, COSTS) == ("13b", "70b")
    useful = with_verifier(from_patterns(TIERS, GSM8K), 1.0, 0.0)
    assert tiers_in_use(frontier(useful, COSTS), useful, COSTS) == TIERS


def test_keeping_back_an_answer_that_is_likely_wrong() -> None:
    """An answer of probability p is returned iff p >= theta / (1 + theta)."""
    outcomes = with_verifier(from_patterns(("a",), {"1": 0.5, "0": 0.5}), 0.8, 0.2)  # p = 0.8 or 0.2
    for theta, answered in ((0.2, 1.0), (0.3, 0.5), (3.9, 0.5), (4.1, 0.0)):
        value = evaluate(solve(outcomes, (0.0,), 10.0, abstain=True, wrong=theta), outcomes, (0.0,))
        assert value.answers.sum() == pytest.approx(answered)
        assert value.wrong == pytest.approx(value.answers.sum() - value.quality)
    kept = solve(outcomes, (0.0,), 10.0, abstain=True, wrong=1.0)
    assert kept.action(1, [0]) == Move("abstain", -1)
    assert solve(outcomes, (0.0,), 10.0, wrong=9.0).action(1, [0]).kind == "answer"  # where an answer must be given


@settings(deadline=None, max_examples=15)
@given(seeds, st.booleans())
def test_frontier_is_the_linear_programme_over_all_rules(seed: int, recall: bool) -> None:
    """Independent route: mix all rules freely under a budget; the budget's multiplier must be 1/lambda."""
    outcomes, costs = random_case(seed, tiers=2 + seed % 2, levels=2)
    rules = every_rule(outcomes, costs, recall)
    curve = frontier(outcomes, costs, recall=recall)
    assert curve.cost[0] == pytest.approx(rules[:, 0].min(), abs=1e-9)
    assert curve.quality[-1] == pytest.approx(rules[:, 1].max(), abs=1e-9)
    for share in (0.13, 0.5, 0.86):
        budget = (1 - share) * curve.cost[0] + share * curve.cost[-1]
        mixture = curve.at_budget(budget)
        best = linprog(
            -rules[:, 1], A_ub=[rules[:, 0]], b_ub=[budget], A_eq=[np.ones(len(rules))], b_eq=[1.0], method="highs"
        )
        assert mixture.quality == pytest.approx(-best.fun, abs=1e-9)
        assert mixture.cost == pytest.approx(budget, abs=1e-9)
        if 0.01 < mixture.gamma < 0.99:  # at a vertex the multiplier is any slope between the two edges
            assert -best.ineqlin.marginals[0] * mixture.lam == pytest.approx(1.0, rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_evaluate_is_the_sum_over_rows_and_signals(seed: int) -> None:
    """Any table of legal moves, good or bad, followed row by row and level by level."""
    outcomes, costs = random_case(seed)
    K, L = len(outcomes.tiers), outcomes.levels
    rng = np.random.default_rng(seed)
    policy = solve(outcomes, costs, 5.0)
    table = policy.table.copy()
    for mask in range(1 << K):
        legal = [*range(mask.bit_length(), K), *(K + k for k in range(K) if mask >> k & 1)]
        states = slice(policy.offset[mask], policy.offset[mask] + L ** mask.bit_count())
        table[states] = rng.choice(legal, L ** mask.bit_count())
    policy = Policy(policy.tiers, policy.levels, table)
    total = {"cost": 0.0, "quality": 0.0, "visits": np.zeros(K), "answers": np.zeros(K), "stops": np.zeros(K)}
    for row, weight in enumerate(outcomes.weight):
        for levels in itertools.product(range(L), repeat=K):
            mass = weight * math.prod(outcomes.signal[row, k, level] for k, level in enumerate(levels))
            run, answer = follow(policy, levels)
            total["cost"] += mass * sum(np.broadcast_to(costs, outcomes.correct.shape)[row, k] for k in run)
            total["quality"] += mass * outcomes.correct[row, answer]
            total["visits"] += mass * np.isin(np.arange(K), run)
            total["answers"] += mass * (np.arange(K) == answer)
            total["stops"] += mass * (np.arange(K) == run[-1])
    value = evaluate(policy, outcomes, costs)
    for name, expected in total.items():
        assert getattr(value, name) == pytest.approx(expected, abs=1e-12)


def follow(policy: Policy, levels: tuple[int, ...]) -> tuple[list[int], int]:
    """Ask the policy for one move after another, as a server would."""
    run: list[int] = []
    while (move := policy.action(sum(1 << k for k in run), [levels[k] for k in run])).kind == "run":
        run.append(move.tier)
    return run, move.tier


# ---------------------------------------------------------------- lambda, budget, quality


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_value_is_convex_in_lambda_with_slope_quality(seed: int) -> None:
    outcomes, costs = random_case(seed)
    lambdas = np.array([0.0, 0.2, 1.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0])
    values = [evaluate(solve(outcomes, costs, lam), outcomes, costs) for lam in lambdas]
    cost, quality = np.array([v.cost for v in values]), np.array([v.quality for v in values])
    assert np.all(np.diff(cost) >= -1e-9)
    assert np.all(np.diff(quality) >= -1e-9)
    best = lambdas * quality - cost
    tangents = best[:, None] + (lambdas[None] - lambdas[:, None]) * quality[:, None]
    assert np.all(tangents <= best[None] + 1e-9)  # every tangent lies below the value: convex, slope E[q]


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_vertices_are_the_solutions_of_their_intervals(seed: int) -> None:
    outcomes, costs = random_case(seed)
    curve = frontier(outcomes, costs)
    assert curve.vertices[0].lam_low == 0.0
    assert curve.vertices[-1].lam_high == math.inf
    for vertex in curve.vertices:
        inside = min(2 * vertex.lam_low + 1, (vertex.lam_low + vertex.lam_high) / 2)
        value = evaluate(solve(outcomes, costs, inside), outcomes, costs)
        assert (value.cost, value.quality) == pytest.approx((vertex.cost, vertex.quality), abs=1e-8)
        own = evaluate(vertex.policy, outcomes, costs)
        assert (own.cost, own.quality) == pytest.approx((vertex.cost, vertex.quality), abs=1e-12)
        assert curve.at_lambda(inside) is vertex
    assert curve.at_lambda(0.0) is curve.vertices[0]
    assert curve.at_lambda(math.inf) is curve.vertices[-1]


def test_at_a_tie_the_cheaper_vertex() -> None:
    curve = frontier(gsm8k(), COSTS)
    for low, high in itertools.pairwise(curve.vertices):
        assert low.lam_high == high.lam_low
        assert curve.at_lambda(low.lam_high) is low


def test_frontier_is_strictly_concave() -> None:
    curve = frontier(gsm8k(), COSTS)
    slopes = np.diff(curve.quality) / np.diff(curve.cost)
    assert len(curve.vertices) > 20
    assert np.all(np.diff(curve.cost) > 0)
    assert np.all(np.diff(slopes) < 0)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_a_coarse_frontier_is_within_its_tolerance(tolerance: float) -> None:
    fine, coarse = frontier(gsm8k(), COSTS), frontier(gsm8k(), COSTS, tolerance=tolerance)
    assert len(coarse.vertices) < len(fine.vertices)
    lost = fine.quality - np.interp(fine.cost, coarse.cost, coarse.quality)
    assert lost.min() >= -1e-12
    assert lost.max() <= tolerance


@pytest.mark.parametrize("budget", [1.6, 1.9, 3.0, 4.999, 8.8, 12.0])
def test_the_mixture_meets_the_budget(budget: float) -> None:
    outcomes = gsm8k()
    mixture = frontier(outcomes, COSTS).at_budget(budget)
    low, high = (evaluate(v.policy, outcomes, COSTS) for v in (mixture.low, mixture.high))
    mixed = low.mixed(high, mixture.gamma)
    assert mixed.cost == pytest.approx(budget, abs=1e-12)
    assert mixed.cost == pytest.approx(mixed.visits @ COSTS, abs=1e-12)
    assert mixed.quality == pytest.approx(mixture.quality, abs=1e-12)
    assert mixed.answers.sum() == pytest.approx(1.0)
    again = frontier(outcomes, COSTS).at_quality(mixture.quality)
    assert again.cost == pytest.approx(budget, abs=1e-9)


def test_single_model_slopes_of_gsm8k() -> None:
    """Without a signal the frontier is the hull of single tiers; it changes tier at lambda = dc/dq: 18.4 and 121."""
    outcomes = without_signal(from_patterns(TIERS, GSM8K))
    curve = frontier(outcomes, COSTS)
    assert curve.cost == pytest.approx(COSTS)
    assert curve.quality == pytest.approx(accuracy(outcomes))
    assert [round(v.lam_low, 1) for v in curve.vertices] == [0.0, 18.4, 121.3]
    assert [v.policy.first for v in curve.vertices] == [Move("run", k) for k in range(3)]
    assert [p.quality for p in single_tiers(outcomes, COSTS)] == pytest.approx(curve.quality)


# ---------------------------------------------------------------- the seed's grid of prices


@settings(deadline=None, max_examples=40)
@given(seeds, st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from(["verifier", "score"]))
def test_no_escalation_is_ever_worth_the_seed_prices(seed: int, lam: float, signal: str) -> None:
    weights = np.random.default_rng(seed).dirichlet(np.ones(8)).tolist()
    patterns = dict(zip(GSM8K, weights, strict=True))
    outcomes = from_patterns(TIERS, {p: w / sum(weights) for p, w in patterns.items()})
    seen = with_verifier(outcomes, 1.0, 0.0) if signal == "verifier" else with_binormal_signal(outcomes, 0.9, 4)
    value = evaluate(solve(seen, COSTS, lam), seen, COSTS)
    assert value.visits == pytest.approx([1.0, 0.0, 0.0], abs=1e-12)
    assert relative_lambda(lam, COSTS[-1]) < 1


def test_at_five_only_a_near_certain_gain_escalates() -> None:
    """Escalating 13B -> 34B at lambda = 5 needs a gain above 4.2 / 5 = 0.84."""
    for gain, share in ((0.83, 0.0), (0.85, 1.0)):
        outcomes = with_verifier(from_patterns(TIERS, {"011": gain / 2, "000": (1 - gain) / 2, "111": 0.5}), 1.0, 0.0)
        value = evaluate(solve(outcomes, COSTS, 5.0), outcomes, COSTS)
        assert value.visits == pytest.approx([1.0, share / 2, 0.0])


# ---------------------------------------------------------------- verifiers, recall, oracle


def test_perfect_verifier_on_the_joint_table() -> None:
    """At a high price all tiers are tried in turn: E[c] = c1 + c2 P(1 wrong) + c3 P(1 and 2 wrong)."""
    outcomes = with_verifier(from_patterns(TIERS, GSM8K), 1.0, 0.0)
    value = evaluate(solve(outcomes, COSTS, 1000.0), outcomes, COSTS)
    assert value.cost == pytest.approx(1.6 + 4.2 * 443 / 1319 + 8.8 * 181 / 1319)
    assert value.quality == pytest.approx(1201 / 1319)
    independent = 1.6 + 4.2 * 443 / 1319 + 8.8 * (443 / 1319) * (257 / 1319)
    assert value.cost > independent + 0.5  # what the independence formula would promise


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_recall_is_never_worse(seed: int) -> None:
    outcomes, costs = random_case(seed)
    for lam in (1.0, 10.0, 100.0):
        held, last = (evaluate(solve(outcomes, costs, lam, recall=recall), outcomes, costs) for recall in (True, False))
        assert lam * held.quality - held.cost >= lam * last.quality - last.cost - 1e-9


@settings(deadline=None, max_examples=15)
@given(seeds, st.sampled_from([3.0, 30.0]))
def test_a_verifier_is_bought_up_to_its_value_of_information(seed: int, lam: float) -> None:
    """Below the price the programme is better off with it, above without; blind it is worth nothing."""
    outcomes, costs = random_case(seed, tiers=2, levels=2)
    price = verifier_price(outcomes, costs, lam, 0)

    def value(of: Outcomes, paid: Array) -> float:
        found = evaluate(solve(of, paid, lam), of, paid)
        return lam * found.quality - found.cost

    signal = outcomes.signal.copy()
    signal[:, 0] = (1.0, 0.0)
    blind = replace(outcomes, signal=signal)
    without, first = value(blind, costs), np.array([1.0, 0.0])
    if price > 1e-6:
        assert value(outcomes, costs + 0.99 * price * first) > without
        assert value(outcomes, costs + 1.01 * price * first) <= without + 1e-9
    else:
        assert value(outcomes, costs) == pytest.approx(without, abs=1e-6)
    assert verifier_price(blind, costs, lam, 0) == 0.0


def test_recall_returns_the_better_answer() -> None:
    """Prompts that the large model alone gets wrong: a verified rejection falls back on the small model's answer."""
    outcomes = with_verifier(from_patterns(("a", "b"), {"10": 0.3, "01": 0.7}), [0.5, 1.0], [0.5, 0.0])
    value = evaluate(solve(outcomes, (1.0, 1.0), 100.0), outcomes, (1.0, 1.0))
    assert value.quality == pytest.approx(1.0)
    assert value.answers == pytest.approx([0.3, 0.7])
    without = evaluate(solve(outcomes, (1.0, 1.0), 100.0, recall=False), outcomes, (1.0, 1.0))
    assert without.quality == pytest.approx(0.7)


def test_oracle_router_on_gsm8k() -> None:
    point = oracle(from_patterns(TIERS, GSM8K), COSTS)
    assert (round(point.cost, 2), round(point.quality, 3)) == (2.46, 0.911)


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_no_policy_beats_foresight(seed: int) -> None:
    outcomes, costs = random_case(seed)
    for lam in (0.5, 5.0, 50.0):
        value, bound = evaluate(solve(outcomes, costs, lam), outcomes, costs), oracle(outcomes, costs, lam)
        assert lam * value.quality - value.cost <= lam * bound.quality - bound.cost + 1e-9


def test_a_hopeless_prompt_costs_less_when_it_is_recognised() -> None:
    """A signal that also tells hopeless prompts apart saves their escalations: same quality, lower cost."""
    rows = [[int(c) for c in pattern] for pattern, n in GSM8K.items() for _ in range(n)]
    right = np.array(rows)
    hopeless = right.max(axis=1) == 0
    verdict = from_samples(TIERS, right, right)
    informed = from_samples(TIERS, right, np.where(hopeless[:, None], 2, right))
    plain, told = (evaluate(solve(o, COSTS, 1000.0), o, COSTS) for o in (verdict, informed))
    assert told.quality == pytest.approx(plain.quality)
    assert plain.cost - told.cost == pytest.approx(118 / 1319 * (4.2 + 8.8))


# ---------------------------------------------------------------- closed forms


@settings(deadline=None, max_examples=60)
@given(seeds, st.floats(0.5, 100.0))
def test_two_tiers_follow_the_closed_form(seed: int, lam: float) -> None:
    rng = np.random.default_rng(seed)
    signal = rng.dirichlet(np.ones(4), (6, 2))
    outcomes = Outcomes(("a", "b"), rng.dirichlet(np.ones(6)), np.round(rng.random((6, 2))), signal)
    costs = (0.0, float(rng.uniform(0.1, 9)))  # the first tier is free, so that it always runs
    policy = solve(outcomes, costs, lam, recall=False)
    expected = two_tier_escalates(outcomes, costs[1], lam)[0]
    if policy.first == Move("run", 0):
        assert [policy.action(1, [s]).kind == "run" for s in range(4)] == expected.tolist()
    else:
        assert expected.all()  # skipping a free tier is right only where everything escalates


def test_two_tiers_whose_failures_cost_more() -> None:
    """The second tier is dearer on the rows that show level 0: its mean cost given the level decides."""
    table = Outcomes(("a", "b"), [0.5, 0.5], [[0, 1], [0, 1]], [[[1, 0], [1, 0]], [[0, 1], [1, 0]]])
    spent = np.array([9.0, 3.0])
    assert two_tier_escalates(table, spent, 5.0).tolist() == [[False, True]]
    policy = solve(table, np.column_stack([[0.0, 0.0], spent]), 5.0, recall=False)
    assert [policy.action(1, [s]).kind for s in (0, 1)] == ["answer", "run"]


@settings(deadline=None, max_examples=60)
@given(seeds, st.floats(0.5, 60.0))
def test_pandora_box(seed: int, lam: float) -> None:
    """Independent tiers, truthful verifier, boxes in order of cost per correct answer: the index policy is optimal."""
    rng = np.random.default_rng(seed)
    q, c = rng.uniform(0.05, 0.95, 3), rng.uniform(0.2, 9, 3)
    order = np.argsort(c / q)
    q, c = q[order], c[order]
    patterns = list(itertools.product((0, 1), repeat=3))
    cells = {"".join(map(str, p)): float(np.prod(np.where(p, q, 1 - q))) for p in patterns}
    outcomes = with_verifier(from_patterns(("a", "b", "c"), cells), 1.0, 0.0)
    value = evaluate(solve(outcomes, c, lam, abstain=True), outcomes, c)
    assert lam * value.quality - value.cost == pytest.approx(pandora_value(q, c, lam), abs=1e-9)
    opened = pandora_index(q, c, lam) > 0
    assert value.visits == pytest.approx(np.where(opened, np.cumprod([1, *(1 - q[:2])]), 0.0), abs=1e-9)


def test_pandora_index_solves_its_equation_and_fails_on_correlated_tiers() -> None:
    q, c, lam = np.array([0.664, 0.805, 0.843]), np.array(COSTS), 30.0
    index = pandora_index(q, c, lam)
    assert q * np.maximum(lam - index, 0) + (1 - q) * np.maximum(-index, 0) == pytest.approx(c)
    outcomes = with_verifier(from_patterns(TIERS, GSM8K), 1.0, 0.0)
    value = evaluate(solve(outcomes, COSTS, lam), outcomes, COSTS)
    assert lam * value.quality - value.cost < pandora_value(q, c, lam) - 0.5  # independence promises too much
    assert pandora_index([0.0], [1.0], lam)[0] == -math.inf


# ---------------------------------------------------------------- execution


def test_execution_agrees_with_evaluation() -> None:
    """Draw requests, follow the lookup table, compare within 99.9 %; a perturbed policy must fall outside."""
    outcomes, n = gsm8k(), 200_000
    policy = solve(outcomes, COSTS, 60.0)
    value = evaluate(policy, outcomes, COSTS)
    row, level = draw(outcomes, n, np.random.default_rng(11))

    def consistent(executed: Policy) -> bool:
        visited, answer = execute(executed, level)
        samples = np.column_stack([visited @ np.array(COSTS), outcomes.correct[row, answer], visited])
        expected = np.array([value.cost, value.quality, *value.visits])
        spread = norm.ppf(1 - 0.0005 / 5) * samples.std(axis=0) / math.sqrt(n)  # five intervals, 99.9 % together
        return bool(np.all(np.abs(samples.mean(axis=0) - expected) <= spread + 1e-12))

    assert consistent(policy)
    perturbed = policy.table.copy()
    perturbed[policy.offset[1]] = len(TIERS)  # the least confident 13B answers are returned instead of escalated
    assert policy.action(1, [0]).kind == "run"
    assert not consistent(Policy(policy.tiers, policy.levels, perturbed))


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_execute_makes_the_moves_that_action_names(seed: int) -> None:
    outcomes, costs = random_case(seed)
    policy = solve(outcomes, costs, float(np.random.default_rng(seed).uniform(1, 60)))
    levels = np.array(list(itertools.product(range(outcomes.levels), repeat=len(outcomes.tiers))))
    visited, answer = execute(policy, levels)
    for i, shown in enumerate(levels.tolist()):
        run, returned = follow(policy, tuple(shown))
        assert (np.flatnonzero(visited[i]).tolist(), int(answer[i])) == (run, returned)


def test_abstaining_runs_nothing() -> None:
    outcomes = gsm8k()
    policy = solve(outcomes, COSTS, 2.0, abstain=True)  # 13B alone is worth 2 * 0.664 - 1.6 < 0
    assert policy.first == Move("abstain", -1)
    visited, answer = execute(policy, np.zeros((2, 3), dtype=np.intp))
    assert not visited.any()
    assert answer.tolist() == [-1, -1]
    value = evaluate(policy, outcomes, COSTS)
    assert (value.cost, value.quality) == (0.0, 0.0)
    assert solve(outcomes, COSTS, 2.0).first == Move("run", 0)
    assert frontier(outcomes, COSTS, abstain=True).vertices[0].cost == 0.0


def test_an_unseen_state_answers_with_the_tier_right_most_often() -> None:
    outcomes = from_samples(("a", "b"), [[0, 1], [1, 1], [0, 1]], [[0, 0], [0, 0], [0, 0]], levels=2)
    policy = solve(outcomes, (1.0, 1.0), 100.0)
    assert policy.action(3, [1, 1]) == Move("answer", 1)
    assert policy.action(1, [1]) == Move("answer", 0)


# ---------------------------------------------------------------- costs, speed


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_costs_per_row_that_are_equal_are_costs_per_tier(seed: int) -> None:
    outcomes, _ = random_case(seed)
    costs = np.random.default_rng(seed).uniform(0.1, 9, len(outcomes.tiers))
    tiled = np.tile(costs, (len(outcomes.weight), 1))
    one, other = (evaluate(solve(outcomes, c, 20.0), outcomes, c) for c in (costs, tiled))
    assert (one.cost, one.quality) == pytest.approx((other.cost, other.quality), abs=1e-9)


def test_failures_that_cost_more_are_paid_for() -> None:
    """Prompts that escalate are the dear ones: the mean over rows, 2 + 10/2, not the product of means, 2 + 9/2."""
    outcomes = with_verifier(from_patterns(("a", "b"), {"11": 0.5, "01": 0.5}), 1.0, 0.0)
    for costs, expected in ((np.array([[1.0, 8.0], [3.0, 10.0]]), 7.0), (np.array([2.0, 9.0]), 6.5)):
        value = evaluate(solve(outcomes, costs, 100.0), outcomes, costs)
        assert value.cost == pytest.approx(expected)
        assert value.quality == pytest.approx(1.0)


def test_speed() -> None:
    """4 tiers, 8 levels, 16 patterns within 50 ms; 3 tiers, 10,000 prompts within 20 ms; the best of five runs."""
    rng = np.random.default_rng(0)
    patterns = ["".join(p) for p in itertools.product("01", repeat=4)]
    four = with_binormal_signal(from_patterns("abcd", dict.fromkeys(patterns, 1)), 0.8, 8)
    prompts = from_samples("abc", rng.random((10_000, 3)) < 0.7, rng.integers(0, 8, (10_000, 3)))

    def fastest(outcomes: Outcomes, costs: tuple[float, ...]) -> float:
        taken = []
        for _ in range(5):
            fresh = Outcomes(outcomes.tiers, outcomes.weight, outcomes.correct, outcomes.signal)
            start = time.perf_counter()
            solve(fresh, costs, 30.0)
            taken.append(time.perf_counter() - start)
        return min(taken)

    assert fastest(four, (1.0, 2.0, 4.0, 9.0)) < 0.050
    assert fastest(prompts, (1.0, 2.0, 4.0)) < 0.020


# ---------------------------------------------------------------- refusals


def curve() -> Frontier:
    return frontier(gsm8k(), COSTS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solve(gsm8k(), COSTS, -1.0), r"`lam` must be at least 0 \[cost unit per correct answer\]; got -1\.0"),
        (lambda: solve(gsm8k(), COSTS, math.nan), r"`lam` must be at least 0"),
        (lambda: solve(gsm8k(), (1.6, 4.2), 1.0), r"`costs` must have shape \(3,\) or \(8, 3\).*got \(2,\)"),
        (lambda: solve(gsm8k(), (1.6, -4.2, 8.8), 1.0), r"`costs` must be finite and at least 0 .*got -4\.2"),
        (lambda: frontier(gsm8k(), COSTS, tolerance=0.0), r"`tolerance` must be above 0"),
        (lambda: curve().at_budget(99.0), r"`budget` binds only up to 1.*got 99\.0.*Pass 1.*best quality"),
        (lambda: curve().at_budget(math.nan), r"`budget` binds only up to"),
        (lambda: curve().at_quality(0.5), r"`quality` binds only from 0\.664139 .*got 0\.5\. Pass 0\.664139"),
        (lambda: curve().at_lambda(-1.0), r"`lam` must be at least 0"),
        (lambda: evaluate(solve(gsm8k(), COSTS, 1), gsm8k(levels=3), COSTS), r"`outcomes` must have 6 levels; got 3"),
        (lambda: solve(gsm8k(), COSTS, 1).action(8, []), r"`run_mask` must have bits among 3 tiers; got 8"),
        (lambda: solve(gsm8k(), COSTS, 1).action(1, [6]), r"`signals` must be one level in 0\.\.5 for each of the 1"),
        (lambda: solve(gsm8k(), COSTS, 1).action(1, [0], 1), r"`covariate` must lie in 0\.\.0; got 1"),
        (lambda: solve(gsm8k(), COSTS, 1, wrong=-1.0), r"`wrong` must be finite and at least 0"),
        (
            lambda: execute(
                solve(by_covariate([gsm8k(), gsm8k()], [0.5, 0.5]), COSTS, 1), np.zeros((2, 3), dtype=np.intp)
            ),
            r"`covariate` must hold 2 integers in 0\.\.1; got None",
        ),
        (lambda: execute(solve(gsm8k(), COSTS, 1), np.zeros((1, 2), dtype=np.intp)), r"`levels` must have 3 columns"),
        (lambda: verifier_price(gsm8k(), COSTS, math.inf, 0), r"`lam` must be finite"),
        (lambda: verifier_price(gsm8k(), COSTS, 1.0, 3), r"`tier` must lie in 0\.\.2; got 3"),
        (lambda: relative_lambda(5.0, 0.0), r"`top_cost` must be above 0"),
        (lambda: two_tier_escalates(gsm8k(), 1.0, 1.0), r"`outcomes` must have two tiers"),
        (lambda: pandora_index([0.5], [0.0], 1.0), r"`cost` must be finite and above 0"),
        (lambda: oracle(gsm8k(), COSTS, -1.0), r"`lam` must be at least 0"),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_what_no_plan_reaches_is_infeasible_and_names_the_nearest() -> None:
    with pytest.raises(InfeasibleError, match=r"`budget` must be at least 1\.6 .*got 1\.0"):
        curve().at_budget(1.0)
    with pytest.raises(InfeasibleError, match=r"`quality` must be at most 0\.8.*got 0\.95"):
        curve().at_quality(0.95)


def test_a_single_tier_has_a_single_vertex() -> None:
    only = frontier(from_patterns(("a",), {"1": 0.7, "0": 0.3}), (2.0,))
    mixture = only.at_budget(2.0)
    assert mixture[2:5] == pytest.approx((0.0, 2.0, 0.7))
    assert only.at_quality(0.7).low is only.at_lambda(5.0)

"""Joint laws of (right, level): each recovered from prompts drawn from it, compared out of fold, and drawn from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial.legendre import leggauss
from scipy.special import expit, ndtr, ndtri
from scipy.stats import multivariate_normal

from calibration.joint_models import (
    ConfidenceChain,
    ItemResponse,
    average,
    choose_classes,
    confidence_chain,
    fit_lengths,
    item_response,
    latent_classes,
    log_likelihood,
    rectangles,
    resample,
)
from simulator.cluster import TierSetup, decide, follow, simulate_cluster
from simulator.engine import StepTable
from simulator.workload import Workload
from theory.cascade import evaluate, solve
from theory.errors import InputError
from theory.outcomes import Outcomes, accuracy, draw, from_patterns, rescue, union_accuracy, with_verifier
from theory.specs import Limits

QUALITY = Path(__file__).resolve().parents[2] / "shared" / "data" / "quality"
TIERS = ("a", "b", "c")
ITEM = ItemResponse(
    discrimination=np.array([1.2, 1.5, 1.8]),
    difficulty=np.array([-0.5, -1.2, -1.5]),
    sight=np.array([0.6, 0.8, 0.4]),
    verdict=np.array([1.5, 1.0, 2.0]),
    cuts=np.tile([-0.5, 0.5, 1.5], (3, 1)),
)


def two_classes(n: int, seed: int, levels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    easy = rng.random(n) < 0.6
    right = rng.random((n, 3)) < np.where(easy[:, None], (0.9, 0.95, 0.97), (0.2, 0.4, 0.5))
    level = rng.binomial(levels - 1, np.where(right, 0.8, 0.35))
    return right.astype(float), level


def item_prompts(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw from the item response model by its own definition, not from its table."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=(n, 1))
    right = rng.random((n, 3)) < expit(ITEM.discrimination * (theta - ITEM.difficulty))
    seen = ITEM.sight * theta + ITEM.verdict * right
    level = (rng.random((n, 3, 1)) < expit(seen[:, :, None] - ITEM.cuts)).sum(axis=2)
    return right.astype(float), level


def chain_prompts(n: int, seed: int, rho: float) -> tuple[np.ndarray, np.ndarray]:
    """Confidences in a Gaussian autoregression, cut at quantiles; outcomes follow the own level."""
    rng = np.random.default_rng(seed)
    z = [rng.normal(size=n)]
    for _ in range(2):
        z.append(rho * z[-1] + np.sqrt(1 - rho**2) * rng.normal(size=n))
    level = (np.stack(z, axis=1)[:, :, None] > ndtri([0.3, 0.6])).sum(axis=2)
    right = rng.random((n, 3)) < np.array([0.3, 0.6, 0.9])[level]
    return right.astype(float), level


def gumbel_prompts(n: int, seed: int, theta: float) -> np.ndarray:
    """Draw pairs with Gumbel's copula: v by inverting P(V <= v | u) on a grid."""
    rng = np.random.default_rng(seed)
    u, p, grid = rng.random(n), rng.random(n), np.linspace(1e-4, 1 - 1e-4, 801)
    x, y = -np.log(u)[:, None], -np.log(grid)
    reach = (x**theta + y**theta) ** (1 / theta)
    below = np.exp(-reach) * reach ** (1 - theta) * x ** (theta - 1) / u[:, None]
    return np.stack([u, grid[(below < p[:, None]).sum(axis=1).clip(max=800)]], axis=1)


# ---------------------------------------------------------------- latent classes


def test_latent_classes_find_the_law_of_the_patterns() -> None:
    right, level = two_classes(20_000, 0)
    rng = np.random.default_rng(1)
    table = latent_classes(right, level, 3, 2, rng).outcomes(("a", "b", "c"))
    new, _ = two_classes(200_000, 2)
    truth = ((1 - new[:, 0]) @ new[:, 2]) / (1 - new[:, 0]).sum()
    assert accuracy(table) == pytest.approx(new.mean(axis=0), abs=0.01)
    assert rescue(table)[0, 2] == pytest.approx(truth, abs=0.02)
    independent = latent_classes(right, level, 3, 1, rng).outcomes(("a", "b", "c"))
    assert rescue(independent)[0, 2] > truth + 0.1  # one class is independence, which promises too much


def test_more_steps_never_lower_the_likelihood_and_two_classes_win() -> None:
    right, level = two_classes(2000, 0)
    best, held = choose_classes(right, level, 3, np.random.default_rng(0), candidates=(1, 2, 6))
    assert best in (2, 6)
    assert held[2] > held[1] + 0.05
    assert held[2] > held[6] - 0.01


def test_average_is_the_mixture() -> None:
    right, level = two_classes(500, 0)
    one, two = (latent_classes(right, level, 3, z, np.random.default_rng(z)) for z in (2, 3))
    both = average([one, two])
    tables = [m.outcomes(("a", "b", "c")).joint for m in (one, two, both)]
    assert np.allclose((tables[0] + tables[1]) / 2, tables[2])


# ---------------------------------------------------------------- item response


def test_item_response_is_recovered() -> None:
    """The mean over repeated samples lies within three standard errors; one with another ability law does not."""
    fits = [item_response(*item_prompts(1500, seed), levels=4) for seed in range(6)]
    for name in ("discrimination", "difficulty", "sight", "verdict"):
        found = np.array([getattr(f, name) for f in fits])
        error = np.maximum(found.std(axis=0, ddof=1) / np.sqrt(len(fits)), 0.02)
        # some shrinkage towards 0 and the finite sample bias of maximum likelihood: 0.06
        assert (np.abs(found.mean(axis=0) - getattr(ITEM, name)) < 3 * error + 0.06).all(), name
    assert (np.abs(np.mean([f.sight for f in fits], axis=0) - ITEM.verdict) > 0.3).any()  # the test can fail


def test_the_law_that_made_the_prompts_has_the_best_likelihood_out_of_fold() -> None:
    rng = np.random.default_rng(0)
    train, test = item_prompts(2500, 1), item_prompts(6000, 2)
    held = {
        "item": log_likelihood(item_response(*train, levels=4).outcomes(TIERS), *test),
        "chain": log_likelihood(confidence_chain(*train, levels=4).outcomes(TIERS), *test),
        "two classes": log_likelihood(latent_classes(*train, 4, 2, rng).outcomes(TIERS), *test),
        "independent": log_likelihood(latent_classes(*train, 4, 1, rng).outcomes(TIERS), *test),
    }
    assert max(held, key=lambda k: held[k]) == "item"
    assert held["independent"] == min(held.values())
    assert held["item"] > log_likelihood(ITEM.outcomes(TIERS), *test) - 0.02  # close to the truth's own
    chained = chain_prompts(3000, 3, 0.8)
    new = chain_prompts(6000, 4, 0.8)
    tables = [confidence_chain(*chained, 3, "gaussian"), item_response(*chained, levels=3)]
    one, other = (log_likelihood(t.outcomes(TIERS), *new) for t in tables)
    assert one > other


def test_union_and_rescue_of_item_response_and_of_independence() -> None:
    right, level = item_prompts(60_000, 5)
    wrong = 1 - right[:, 0]
    union, rescued = right.max(axis=1).mean(), (wrong @ right[:, 2]) / wrong.sum()
    table = item_response(right[:4000], level[:4000], 4).outcomes(TIERS)
    assert union_accuracy(table) == pytest.approx(union, abs=0.012)
    assert rescue(table)[0, 2] == pytest.approx(rescued, abs=0.025)
    apart = latent_classes(right[:4000], level[:4000], 4, 1, np.random.default_rng(0)).outcomes(TIERS)
    assert union_accuracy(apart) > union + 0.02
    assert rescue(apart)[0, 2] > rescued + 0.06


def test_nodes_are_enough() -> None:
    data = item_prompts(2000, 7)
    values = [log_likelihood(ITEM.outcomes(TIERS, nodes), *data) for nodes in (21, 61)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)


# ---------------------------------------------------------------- chains of confidences


@settings(deadline=None, max_examples=25)
@given(st.floats(-0.95, 0.95), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_gaussian_copula_is_the_bivariate_normal(rho: float, u: float, v: float) -> None:
    cell = rectangles(np.array([u, 1 - u]), np.array([v, 1 - v]), "gaussian", rho)
    at, weight = leggauss(400)  # over the first variable, from -8 to its quantile
    high = float(ndtri(u))
    x = -8 + (high + 8) * (at + 1) / 2
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    expected = (high + 8) / 2 * weight @ (density * ndtr((ndtri(v) - rho * x) / np.sqrt(1 - rho**2)))
    assert cell[0, 0] == pytest.approx(expected, abs=1e-6)
    assert cell.sum(axis=1) == pytest.approx([u, 1 - u])
    known = multivariate_normal.cdf([ndtri(u), ndtri(v)], cov=[[1, rho], [rho, 1]])
    assert cell[0, 0] == pytest.approx(float(known), abs=1e-4)


def test_gumbel_of_one_is_independence_and_more_ties_the_tops() -> None:
    u, v = np.array([0.2, 0.3, 0.5]), np.array([0.6, 0.3, 0.1])
    assert rectangles(u, v, "gumbel", 1.0) == pytest.approx(np.outer(u, v))
    half = np.full(2, 0.5)
    assert rectangles(half, half, "gumbel", 20.0)[0, 0] == pytest.approx(0.5, abs=0.03)
    tail = np.array([0.05, 0.9, 0.05])
    strong = rectangles(tail, tail, "gumbel", 2.0)
    assert strong[2, 2] > strong[0, 0] + 0.005  # highest confidences together more than lowest


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.85])
def test_gaussian_chain_is_recovered(rho: float) -> None:
    found = [confidence_chain(*chain_prompts(2000, s, rho), 3, "gaussian").dependence for s in range(6)]
    mean, error = np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / np.sqrt(6)
    assert (np.abs(mean - rho) < 3 * error + 0.01).all()
    assert not (np.abs(mean - (rho + 0.12)) < 3 * error + 0.01).all()  # the test can fail


@pytest.mark.parametrize("theta", [1.0, 1.7, 3.0])
def test_gumbel_chain_is_recovered(theta: float) -> None:
    level = (gumbel_prompts(3000, 0, theta)[:, :, None] > [0.25, 0.5, 0.75]).sum(axis=2)
    fit = confidence_chain(np.ones(level.shape), level, 4, "gumbel")
    assert fit.dependence[0] == pytest.approx(theta, rel=0.08)
    other = confidence_chain(np.ones(level.shape), level, 4, "gaussian")
    if theta > 1.5:
        held = (gumbel_prompts(3000, 1, theta)[:, :, None] > [0.25, 0.5, 0.75]).sum(axis=2)
        scores = [log_likelihood(f.outcomes("ab"), np.ones(held.shape), held) for f in (fit, other)]
        assert scores[0] > scores[1]


def test_a_chain_keeps_its_margins() -> None:
    right, level = chain_prompts(3000, 0, 0.7)
    fit = confidence_chain(right, level, 3)
    table = fit.outcomes(TIERS)
    for k in range(3):
        assert table.joint[0, 0].sum(axis=tuple(j for j in range(3) if j != k)) == pytest.approx(fit.share[k], abs=1e-9)
    assert accuracy(table) == pytest.approx(right.mean(axis=0), abs=0.005)


# ---------------------------------------------------------------- lengths, costs, draws


def lengths(right: np.ndarray, level: np.ndarray, seed: int) -> np.ndarray:
    """Wrong answers 20 % longer; low confidence a little longer too."""
    rng = np.random.default_rng(seed)
    mean = 250 * np.where(right == 1, 1.0, 1.2) * (1.05 - 0.05 * level)
    return np.round(mean * rng.gamma(9.0, 1 / 9.0, right.shape))


@pytest.mark.parametrize(
    "make",
    [
        lambda c, lv: item_response(c, lv, 4).outcomes(TIERS),
        lambda c, lv: latent_classes(c, lv, 4, 3, np.random.default_rng(0)).outcomes(TIERS),
        lambda c, lv: confidence_chain(c, lv, 4).outcomes(TIERS),
    ],
    ids=["item", "classes", "chain"],
)
def test_draws_are_those_of_the_model_and_wrong_answers_longer(make: Callable[..., Outcomes]) -> None:
    right, level = item_prompts(2500, 0)
    size = lengths(right, level, 1)
    table, fit = make(right, level), fit_lengths(right, level, size, 4)
    draws = fit.draw(table, 40_000, np.random.default_rng(2))
    assert draws.correct.mean(axis=0) == pytest.approx(accuracy(table), abs=0.01)
    union = 1 - table.weight @ (1 - table.correct).prod(axis=1)
    assert draws.correct.max(axis=1).mean() == pytest.approx(union, abs=0.005)
    ratio, real = (
        [x[c[:, k] == 0, k].mean() / x[c[:, k] == 1, k].mean() for k in range(3)]
        for x, c in ((draws.length, draws.correct), (size, right))
    )
    assert min(real) > 1.2
    assert np.array(ratio) == pytest.approx(np.array(real), abs=0.04)
    # what the planner expects is what the simulator draws
    assert draws.length.mean(axis=0) == pytest.approx(table.weight @ fit.expected(table), rel=0.01)
    assert draws.length.mean(axis=0) == pytest.approx(size.mean(axis=0), rel=0.02)


def test_planned_cost_is_that_of_the_lengths_drawn() -> None:
    """Escalated prompts are hard and their answers long: costs per tier would promise too little."""
    right, level = item_prompts(4000, 0)
    size = lengths(right, level, 1)
    price = np.array([1.6, 4.2, 8.8]) / size.mean(axis=0)  # cost unit per token
    table, fit = item_response(right, level, 4).outcomes(TIERS), fit_lengths(right, level, size, 4)
    costs = fit.expected(table) * price
    policy = solve(table, costs, lam=40.0)
    value, flat = evaluate(policy, table, costs), evaluate(policy, table, table.weight @ costs)
    rng = np.random.default_rng(3)
    draws = fit.draw(table, 60_000, rng)
    paths = follow(policy, draws.level, draws.correct)
    spent = (paths.visits * draws.length) @ price
    error = 3 * spent.std() / np.sqrt(len(spent))
    assert value.cost == pytest.approx(spent.mean(), abs=error)
    assert value.quality == pytest.approx(paths.quality.mean(), abs=3 * 0.5 / np.sqrt(len(spent)))
    assert abs(flat.cost - spent.mean()) > error  # a negative control


def test_the_simulator_serves_the_lengths_drawn() -> None:
    """From fitted law to simulated requests: correctness, signal and length of each tier go into the cluster."""
    right, level = item_prompts(1500, 0)
    size = lengths(right, level, 1) // 10 + 1
    table = item_response(right, level, 4).outcomes(TIERS)
    policy = solve(table, (1.6, 4.2, 8.8), lam=30.0)
    rng = np.random.default_rng(5)
    for draws in (
        fit_lengths(right, level, size, 4).draw(table, 600, rng),
        resample(right, level, size, 600, rng),
    ):
        outputs = draws.length.astype(np.int64)
        paths = follow(policy, draws.level, draws.correct)
        arrival = np.cumsum(rng.exponential(0.5, 600))
        work = Workload(arrival, np.full(600, 50), outputs[:, 0])
        n = np.arange(17)
        base = np.array([0.01 * (1 + 0.02 * n), 0.01 * (1.3 + 0.04 * n)])
        base[:, 0] = 0.0
        steps = StepTable([0, 4], base, np.zeros(base.shape), [0, 1, 4096], [0.0, 0.01, 0.1])
        tiers = [TierSetup(name, steps, Limits(max_num_seqs=16), kv_tokens=10**6) for name in TIERS]
        run = simulate_cluster(work, tiers, paths, 1, outputs)
        at = (np.arange(600), paths.answer)
        assert (run.output == outputs[at]).all()
        assert (run.correct == draws.correct[at]).all()


def test_following_drawn_signals_is_deciding() -> None:
    table = with_verifier(from_patterns(("s", "l"), {"11": 60, "01": 25, "10": 5, "00": 10}), 0.9, 0.2)
    policy = solve(table, (1.0, 5.0), lam=20.0)
    row, level = draw(table, 500, np.random.default_rng(4))
    one = follow(policy, level, table.correct[row])
    other = decide(500, table, policy, np.random.default_rng(4))
    for name in ("visits", "answer", "quality"):
        assert (getattr(one, name) == getattr(other, name)).all()


@pytest.mark.skipif(not QUALITY.is_dir(), reason="the quality tables are not beside the project")
def test_real_lengths_of_gsm8k() -> None:
    rows = pd.read_csv(QUALITY / "gsm8k_tiers.csv.gz")
    names = ["abel-13b", "tora-code-34b", "tora-70b"]
    wide: dict[str, Any] = {
        c: rows.pivot_table(index="sample_id", columns="model", values=c)[names].to_numpy()
        for c in ("correct", "output_words")
    }
    fit = fit_lengths(wide["correct"], np.zeros(wide["correct"].shape), wide["output_words"], 1)
    mean = fit.mean()[:, :, 0]
    assert (mean[:, 0] > 1.1 * mean[:, 1]).all()  # wrong answers are longer at every tier


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: latent_classes([[1, 0]], [[0, 2]], 2, 2, np.random.default_rng(0)), r"`level` must lie in 0\.\.1"),
        (lambda: latent_classes([[0.5, 0]], [[0, 0]], 2, 2, np.random.default_rng(0)), "`correct` must hold 0 and 1"),
        (lambda: item_response([[1], [0]], [[0], [0]], 1), "`correct` must have at least 2 tiers"),
        (lambda: confidence_chain([[1, 0]], [[0, 0]], 1, "clayton"), "`family` must be gaussian or gumbel"),
        (lambda: fit_lengths([[1, 0]], [[0, 0]], [[5, -1]], 1), "`length` must be finite and at least 0"),
        (
            lambda: resample([[1, 0]], [[0, 0]], [[5]], 1, np.random.default_rng(0)),
            r"`length` must have shape \(1, 2\)",
        ),
        (lambda: log_likelihood(from_patterns("ab", {"11": 1.0}), [[1]], [[0]]), "`correct` must have 2 columns"),
        (lambda: follow(None, np.zeros((3, 2), dtype=int), np.zeros((2, 2))), r"`correct` must have shape \(3, 2\)"),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_chain_of_one_tier_is_its_margin() -> None:
    fit = confidence_chain([[1], [0], [1]], [[0], [1], [1]], 2)
    assert isinstance(fit, ConfidenceChain)
    assert fit.outcomes(("a",)).weight == pytest.approx(fit.share[0])

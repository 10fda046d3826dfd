"""Written closed forms against forms derived by computer algebra, symbolically or to 1e-12."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sympy as sp

from theory import derivations as derived
from theory.acceptance import BetaMixture
from theory.derivations import ALPHA, BETA_A, BETA_B, COST, GAMMA, LENGTH, OPERATIONS
from theory.speculation import (
    elasticities,
    operations_factor,
    real_best_length,
    speedup,
    tokens_per_round,
    tokens_variance,
)

POINTS = [(0.05, 1, 0.5), (0.5, 3, 0.1), (0.8, 5, 0.05), (0.97, 12, 0.004), (0.65, 8, 1 / 110)]  # alpha, gamma, c


def exact(expression: sp.Expr, values: dict[sp.Symbol, float]) -> float:
    """Return the expression at these values with 50 digits, where rounding cannot matter."""
    return float(expression.subs({s: sp.Float(v, 50) for s, v in values.items()}).evalf(50))


@pytest.mark.parametrize(("alpha", "gamma", "cost"), POINTS)
def test_written_forms_are_the_derived_ones(alpha: float, gamma: int, cost: float) -> None:
    at = {ALPHA: alpha, GAMMA: gamma, COST: cost, OPERATIONS: cost}
    pairs = [
        (tokens_per_round(alpha, gamma), derived.tokens_per_round()),
        (tokens_variance(alpha, gamma), derived.tokens_variance()),
        (speedup(alpha, gamma, target=1, verify=1, draft=cost), derived.speedup()),
        (operations_factor(alpha, gamma, cost), derived.operations_factor()),
    ]
    for written, formula in pairs:
        assert float(written) == pytest.approx(exact(formula, at), rel=1e-12)


@pytest.mark.parametrize(("alpha", "gamma", "cost"), POINTS)
def test_elasticities_are_the_derivatives(alpha: float, gamma: int, cost: float) -> None:
    at = {ALPHA: alpha, LENGTH: gamma, COST: cost}
    for written, formula in zip(elasticities(alpha, gamma, cost), derived.elasticities(), strict=True):
        assert float(written) == pytest.approx(exact(formula, at), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_sum_of_survival_is_the_mean_of_the_distribution(length: int) -> None:
    closed = derived.tokens_per_round().subs(GAMMA, length)
    assert sp.simplify(closed - derived.tokens_from_distribution(length)) == 0


def test_one_token_gains_iff_acceptance_exceeds_cost() -> None:
    assert sp.simplify(derived.gain_of_one() - (ALPHA - COST) / (1 + COST)) == 0


@pytest.mark.parametrize("length", [1, 2, 7])
def test_no_length_gains_without_acceptance_above_cost(length: int) -> None:
    polynomial = derived.no_gain_bound(length)
    assert polynomial.subs(ALPHA, 0) == 0
    assert polynomial.subs(ALPHA, 1) == 0
    assert all(float(polynomial.subs(ALPHA, a)) >= 0 for a in np.linspace(0, 1, 41))


def test_best_length_solves_the_stationarity_condition() -> None:
    v = sp.Symbol("v", positive=True)
    written = v - sp.log(v) - 1 - (1 / COST - 1) * -sp.log(ALPHA)
    assert sp.simplify(derived.stationarity() - written) == 0


@pytest.mark.parametrize(("alpha", "cost"), [(0.65, 1 / 110), (0.3, 0.2), (0.9, 0.02), (0.6, 0.5), (0.97, 0.004)])
def test_newton_is_the_lambert_function(alpha: float, cost: float) -> None:
    best = real_best_length(alpha, cost)
    at = {ALPHA: alpha, COST: cost}
    assert float(best.length) == pytest.approx(exact(derived.best_length(), at), rel=1e-12)
    assert float(best.speedup) == pytest.approx(exact(derived.best_speedup(), at), rel=1e-12)


def test_best_speedup_is_the_speedup_at_the_best_length() -> None:
    alpha, cost = 0.7, 0.03
    best = real_best_length(alpha, cost)
    g = float(best.length)
    direct = (1 - alpha ** (g + 1)) / ((1 - alpha) * (g * cost + 1))
    assert float(best.speedup) == pytest.approx(direct, rel=1e-12)
    slightly_wrong = real_best_length(alpha, 1.01 * cost)
    assert float(slightly_wrong.speedup) != pytest.approx(direct, rel=1e-4)  # the comparison can fail


@pytest.mark.parametrize("order", [1, 2, 5])
def test_moments_of_the_beta_law(order: int) -> None:
    law = BetaMixture(3.5, 1.25)
    moment = exact(derived.beta_moment(order), {BETA_A: law.a, BETA_B: law.b})
    assert float(law.survival(order)[order]) == pytest.approx(moment, rel=1e-12)


def test_elasticity_of_the_length_vanishes_at_the_best_length() -> None:
    alpha, cost = 0.8, 0.05
    _, _, of_length = derived.elasticities()
    g = float(real_best_length(alpha, cost).length)
    assert math.isclose(exact(of_length, {ALPHA: alpha, LENGTH: g, COST: cost}), 0.0, abs_tol=1e-12)

"""Derivations of the closed forms of :mod:`theory.speculation`, by computer algebra; nothing at run time needs them.

Every function derives its result from a definition (a survival function, a derivative, a stationarity condition) and
returns a sympy expression in the symbols below; tests hold the written forms to the derived ones.
"""

from __future__ import annotations

from typing import Any

import sympy as sp

Expression = Any  # sympy has no types

ALPHA = sp.Symbol("alpha", positive=True)  # alpha_iid [-]
GAMMA = sp.Symbol("gamma", nonnegative=True, integer=True)  # draft length [tokens]
LENGTH = sp.Symbol("g", positive=True)  # draft length as a real number [tokens]
COST = sp.Symbol("c", positive=True)  # draft step / target step [-]
OPERATIONS = sp.Symbol("h", positive=True)  # operations of the draft / those of the target, per token [-]
BETA_A, BETA_B = sp.symbols("a b", positive=True)  # parameters of a Beta law of alpha [-]


def tokens_per_round() -> Expression:
    r"""Return :math:`E[N] = \sum_{i=0}^{\gamma} P(N > i)` with :math:`P(N > i) = \alpha^i`, summed in closed form.

    Examples
    --------
    >>> tokens_per_round().subs({ALPHA: sp.Rational(1, 2), GAMMA: 2})
    7/4
    """
    i = sp.Symbol("i", integer=True)
    return _geometric(sp.summation(ALPHA**i, (i, 0, GAMMA)))


def tokens_variance() -> Expression:
    r"""Return :math:`\mathrm{Var}[N] = \sum_i (2i + 1) P(N > i) - E[N]^2`, summed in closed form.

    The sum of :math:`i \alpha^i` is :math:`\alpha\,\partial_\alpha \sum_i \alpha^i`.
    """
    mean = tokens_per_round()
    return sp.simplify(2 * ALPHA * sp.diff(mean, ALPHA) + mean - mean**2)


def tokens_from_distribution(length: int) -> Expression:
    r"""Return :math:`\sum_k k\,P(N = k)` from the distribution of a round itself, for one draft length.

    :math:`P(N = k) = \alpha^{k-1}(1 - \alpha)` for :math:`k \le \gamma`, and :math:`\alpha^\gamma` for
    :math:`k = \gamma + 1`, where the bonus token follows.
    """
    stopped = sum(k * ALPHA ** (k - 1) * (1 - ALPHA) for k in range(1, length + 1))
    return sp.expand(stopped + (length + 1) * ALPHA**length)


def speedup() -> Expression:
    r"""Return :math:`S = E[N] / (\gamma c + 1)`: tokens of a round over its time, in target steps."""
    return tokens_per_round() / (GAMMA * COST + 1)


def operations_factor() -> Expression:
    r"""Return the operations of a round, :math:`\gamma h + \gamma + 1` target tokens, per token emitted."""
    return (GAMMA * OPERATIONS + GAMMA + 1) / tokens_per_round()


def gain_of_one() -> Expression:
    r"""Return :math:`S(1) - 1`, which is :math:`(\alpha - c) / (1 + c)`: one token gains iff alpha exceeds c."""
    return sp.factor(sp.simplify(speedup().subs(GAMMA, 1) - 1))


def no_gain_bound(length: int) -> Expression:
    r"""Return :math:`(1 + \gamma\alpha) - E[N]` as a polynomial of alpha, not negative on [0, 1].

    Since every :math:`\alpha^i \le \alpha`, :math:`S \le (1 + \gamma\alpha) / (1 + \gamma c)`, which is at most 1 when
    :math:`\alpha \le c`: with :func:`gain_of_one`, a gain exists if and only if alpha > c (corollary 3.9).
    """
    return sp.expand(1 + length * ALPHA - tokens_from_distribution(length))


def stationarity() -> Expression:
    r"""Return what vanishes at the best real draft length: the numerator of :math:`\partial_\gamma \ln S`.

    Written in :math:`v = \alpha^{-(\gamma + 1)}`, so that :math:`\gamma = \ln v / |\ln\alpha| - 1`: the expression is
    :math:`v - \ln v - 1 - (1/c - 1)|\ln\alpha|`, the equation :func:`theory.speculation.real_best_length` solves.
    """
    v, decay = sp.symbols("v lam", positive=True)  # lam = |ln alpha|
    gain = (1 - sp.exp(-decay * (LENGTH + 1))) / (LENGTH * COST + 1)
    slope = sp.diff(sp.log(gain), LENGTH)
    at_v = slope.subs(LENGTH, sp.log(v) / decay - 1)
    scale = (v - 1) * (COST * (sp.log(v) / decay - 1) + 1) / COST  # positive, so the zeros are the same
    return sp.simplify(-sp.expand(sp.simplify(sp.powsimp(at_v * scale)))).subs(decay, -sp.log(ALPHA))


def best_length() -> Expression:
    r"""Return the best real draft length with the Lambert function, :math:`v = -W_{-1}(-\alpha^{1/c - 1} / e)`.

    From :func:`stationarity`: :math:`v - \ln v = k` is :math:`-v\,e^{-v} = -e^{-k}`, and the branch with v > 1 is
    :math:`W_{-1}`.
    """
    v = -sp.LambertW(-(ALPHA ** (1 / COST - 1)) * sp.exp(-1), -1)
    return (v - 1) / -sp.log(ALPHA) - 1 / COST


def best_speedup() -> Expression:
    r"""Return the speed-up at :func:`best_length`, :math:`|\ln\alpha| / (c (1 - \alpha) v)`.

    At the optimum :math:`1 - \alpha^{\gamma+1} = (v - 1) / v` and :math:`\gamma c + 1 = c (v - 1) / |\ln\alpha|`.
    """
    v = -sp.LambertW(-(ALPHA ** (1 / COST - 1)) * sp.exp(-1), -1)
    return -sp.log(ALPHA) / (COST * (1 - ALPHA) * v)


def elasticities() -> tuple[Expression, Expression, Expression]:
    r"""Return :math:`x\,\partial_x \ln S` for x = alpha, c and gamma (real)."""
    log_gain = sp.log((1 - ALPHA ** (LENGTH + 1)) / ((1 - ALPHA) * (LENGTH * COST + 1)))
    return tuple(sp.simplify(x * sp.diff(log_gain, x)) for x in (ALPHA, COST, LENGTH))


def beta_moment(order: int) -> Expression:
    r"""Return :math:`E[\alpha^i] = B(a + i, b) / B(a, b)` of a Beta law, as a rational function of a and b."""
    ratio = (
        sp.gamma(BETA_A + order) * sp.gamma(BETA_A + BETA_B) / (sp.gamma(BETA_A) * sp.gamma(BETA_A + BETA_B + order))
    )
    return sp.factor(sp.gammasimp(ratio))


def _geometric(summed: Expression) -> Expression:
    """Return the generic branch of a geometric sum (alpha other than 1)."""
    return summed.args[1][0] if isinstance(summed, sp.Piecewise) else summed

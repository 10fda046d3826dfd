"""Loss laws: limits, refusals, published points."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.errors import InputError
from theory.scaling import EPOCH, HOFFMANN, LOSS_LAWS, LossLaw, beyond, inside, loss, loss_law, perplexity, tag

laws = st.sampled_from(list(LOSS_LAWS.values()))
sizes = st.floats(1e6, 1e12)
tokens = st.floats(1e8, 1e14)


@pytest.mark.parametrize("law", LOSS_LAWS.values())
def test_limits(law: LossLaw) -> None:
    assert float(loss(law, 1e40, 1e40)) == pytest.approx(law.irreducible, rel=1e-6)
    assert float(loss(law, 1.0, 1e40)) == pytest.approx(law.irreducible + law.parameter_scale, rel=1e-6)
    assert float(loss(law, 1e40, 1.0)) == pytest.approx(law.irreducible + law.data_scale, rel=1e-6)


@given(laws, sizes, tokens)
@settings(deadline=None, max_examples=50)
def test_more_is_better(law: LossLaw, size: float, data: float) -> None:
    assert loss(law, 2 * size, data) < loss(law, size, data)
    assert loss(law, size, 2 * data) < loss(law, size, data)
    assert float(perplexity(law, size, data)) == pytest.approx(np.exp(float(loss(law, size, data))), rel=1e-12)


@given(laws, st.floats(1e20, 1e24))
@settings(deadline=None, max_examples=20)
def test_best_split_of_compute(law: LossLaw, compute: float) -> None:
    """Hoffmann et al., eq. (4): at fixed compute 6 N D the best N is G (C / 6)^(beta / (alpha + beta))."""
    a, b = law.parameter_exponent, law.data_exponent
    best = (a * law.parameter_scale / (b * law.data_scale)) ** (1 / (a + b)) * (compute / 6) ** (b / (a + b))
    n = np.geomspace(best / 10, best * 10, 2001)
    assert n[np.argmin(loss(law, n, compute / (6 * n)))] == pytest.approx(best, rel=0.01)


def test_refit_puts_chinchilla_at_twenty_tokens_a_parameter() -> None:
    """Besiroglu et al. (2024): their constants, unlike the rounded ones, agree with 70 B parameters on 1.4 T tokens."""

    def tokens_per_parameter(law: LossLaw) -> float:
        n = np.geomspace(1e9, 1e12, 4001)
        best = n[np.argmin(loss(law, n, 5.76e23 / (6 * n)))]
        return float(5.76e23 / (6 * best) / best)

    assert 15 < tokens_per_parameter(EPOCH) < 30
    assert tokens_per_parameter(HOFFMANN) > 50


def test_arrays_broadcast() -> None:
    assert loss(HOFFMANN, np.ones((3, 1)) * 1e9, np.ones(4) * 1e11).shape == (3, 4)


def test_ranges() -> None:
    assert inside(HOFFMANN, 44e6, 500e9)
    assert not inside(HOFFMANN, 43e6, 100e9)
    assert beyond(HOFFMANN, 160e9, 1e11) == pytest.approx(10)
    assert tag(HOFFMANN, 160e9, 1e11) == "extrapolated"
    with pytest.raises(InputError, match=r"within a factor 10 of what hoffmann-2022 was fitted on.*extrapolation"):
        tag(HOFFMANN, 70e9, 15e12)
    assert tag(HOFFMANN, 70e9, 15e12, extrapolate=True) == "extrapolated"


@pytest.mark.parametrize(("size", "data", "name"), [(0, 1e9, "parameters"), (1e9, -1, "tokens")])
def test_nothing_below_zero(size: float, data: float, name: str) -> None:
    with pytest.raises(InputError, match=f"`{name}` must be above 0"):
        loss(HOFFMANN, size, data)


def test_own_laws_are_checked() -> None:
    with pytest.raises(InputError, match="`data_exponent` must be finite and above 0"):
        replace(HOFFMANN, data_exponent=0.0)
    with pytest.raises(InputError, match="`token_range` must be"):
        replace(HOFFMANN, token_range=(2e9, 1e9))
    with pytest.raises(InputError, match="`loss_law` must be one of hoffmann-2022, epoch-2024; got 'chinchilla'"):
        loss_law("chinchilla")

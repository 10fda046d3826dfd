"""Speculative cascades against direct sampling, exhaustive search over rules, and their limits."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest

from theory.errors import InputError
from theory.speculative_cascades import (
    RULES,
    Rule,
    acceptance,
    agreement,
    defers,
    draft_reuse_tokens,
    law,
    objective,
    token_law,
    total_variation,
)


def laws(seed: int, positions: int = 8, words: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(words, 0.4), positions), rng.dirichlet(np.full(words, 0.8), positions)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_optimal_rule_is_the_best_of_all_rules(seed: int, alpha: float) -> None:
    p, q = laws(seed)
    every = [objective(p, q, alpha, np.array(d)) for d in product((False, True), repeat=len(p))]
    assert objective(p, q, alpha, defers(p, q, alpha, "optimal")) == pytest.approx(min(every), abs=1e-12)


def test_other_rules_are_not_always_the_best() -> None:
    """Negative control: the comparison tells the rules apart."""
    worse: dict[Rule, int] = {"chow": 0, "difference": 0}
    for seed in range(20):
        p, q = laws(seed)
        best = objective(p, q, 0.3, defers(p, q, 0.3, "optimal"))
        for rule in worse:
            worse[rule] += objective(p, q, 0.3, defers(p, q, 0.3, rule)) > best + 1e-6
    assert min(worse.values()) > 5


def test_speculative_sampling_follows_the_law_and_accepts_as_stated() -> None:
    p, q = (x[0] for x in laws(3, 1))
    text = token_law(p, q, 0.4)
    rng, n = np.random.default_rng(0), 200_000
    draft = rng.choice(len(q), n, p=q)
    kept = rng.random(n) < np.minimum(1.0, text / q)[draft]
    rest = np.maximum(text - q, 0)
    out = np.where(kept, draft, rng.choice(len(q), n, p=rest / rest.sum()))
    half = 4 * 0.5 / np.sqrt(n)  # four standard errors at most
    assert abs(kept.mean() - acceptance(text, q)) < half
    assert np.abs(np.bincount(out, minlength=len(q)) / n - text).max() < half
    assert np.abs(np.bincount(out, minlength=len(q)) / n - p).max() > half  # and not the target's law


def test_ends_of_the_knob() -> None:
    p, q = laws(1)
    assert np.array_equal(law(p, q, 0.0, "speculation"), p)
    assert np.array_equal(law(p, q, 0.0, "cascade"), q)
    assert acceptance(q, q) == 1.0
    assert acceptance(p, q) == pytest.approx(np.minimum(p, q).sum(axis=1).mean())
    assert np.allclose(token_law(p, q, 1.0), q)  # every token is good enough
    assert not defers(p, q, 1e9, "optimal")[total_variation(p, q) > 0].any()


@pytest.mark.parametrize("rule", RULES)
def test_more_alpha_never_accepts_less(rule: str) -> None:
    p, q = laws(2, 50)
    found = [acceptance(law(p, q, a, rule), q) for a in np.linspace(0, 1, 21)]  # type: ignore[arg-type]
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(found))


def test_rejection_is_delta_times_total_variation() -> None:
    p, q = laws(4, 30)
    delta = defers(p, q, 0.2, "difference")
    assert 0 < delta.sum() < len(delta)
    assert 1 - acceptance(law(p, q, 0.2, "difference"), q) == pytest.approx(np.mean(delta * total_variation(p, q)))


def test_difference_defers_no_more_than_optimal() -> None:
    p, q = laws(5, 100)
    assert not (defers(p, q, 0.3, "difference") & ~defers(p, q, 0.3, "optimal")).any()


def test_token_law_is_a_law_and_agrees_more_than_the_draft() -> None:
    p, q = laws(6, 40)
    text = token_law(p, q, 0.5)
    assert np.allclose(text.sum(axis=1), 1)
    assert (text >= 0).all()
    assert agreement(text, p) > agreement(q, p)


def test_draft_reuse_against_summation() -> None:
    assert draft_reuse_tokens(7, 0.9) == pytest.approx(sum(0.9**i for i in range(1, 8)))
    assert draft_reuse_tokens(0, 0.9) == 0.0


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"`p` must be at least 0 and add up to 1"):
        total_variation([0.5, 0.4], [0.5, 0.5])
    with pytest.raises(InputError, match=r"`q` must have the shape"):
        total_variation([0.5, 0.5], [1.0])
    with pytest.raises(InputError, match=r"`alpha` must be at least 0"):
        defers([1.0], [1.0], -0.1, "chow")
    with pytest.raises(InputError, match=r"`rule` must be one of"):
        defers([1.0], [1.0], 0.1, "best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"`accepted` must lie in"):
        draft_reuse_tokens(3, 80)

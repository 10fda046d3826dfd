"""Speculative cascades against direct sampling, exhaustive search over rules, and their limits."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest

from theory.errors import InputError
from theory.speculative_cascades import (
    RULES,
    Rule,
    TokenRule,
    acceptance,
    agreement,
    answer_as_draft,
    defers,
    escalation_cost,
    knob,
    law,
    objective,
    prefix_law,
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


@pytest.mark.parametrize("rule", ["draft", "target", "relative"])
def test_token_rules_against_their_definition(rule: TokenRule) -> None:
    """One position after another, one token after another, as the paper's equations (13) to (15) state them."""
    p, q = laws(7, 20)
    alpha = 0.3
    text = token_law(p, q, alpha, rule)
    for i in range(len(p)):
        good = {
            "draft": [q[i, v] >= max(p[i]) - alpha for v in range(5)],
            "target": [p[i, v] >= max(p[i]) - alpha for v in range(5)],
            "relative": [p[i, v] >= (1 - alpha) * max(p[i]) for v in range(5)],
        }[rule]
        handed = sum(q[i, v] for v in range(5) if not good[v])
        assert text[i] == pytest.approx([q[i, v] * good[v] + p[i, v] * handed for v in range(5)], abs=1e-12)


# ---------------------------------------------------------------- the knob


def test_knob_runs_from_speculation_to_cascade() -> None:
    p, q = laws(8, 60)
    lossless, cascade = (knob(p, q, [0.0], rule, length=4, draft_cost=0.1)[0] for rule in ("speculation", "cascade"))
    path = knob(p, q, np.linspace(0, 3, 25), "optimal", length=4, draft_cost=0.1)
    assert lossless.quality == pytest.approx(float((p * p).sum(axis=1).mean()))
    assert (cascade.acceptance, cascade.tokens_per_round, cascade.deferred) == (1.0, 5.0, 0.0)
    assert path[-1].speedup == pytest.approx(cascade.speedup)
    assert all(b.speedup >= a.speedup - 1e-12 and b.loss >= a.loss - 1e-12 for a, b in pairwise(path))
    assert path[0].speedup >= lossless.speedup - 1e-12


@pytest.mark.parametrize("other", ["chow", "difference"])
def test_no_rule_is_faster_at_the_loss_of_the_optimal_one(other: Rule) -> None:
    """The optimal rule minimises loss + alpha x rejections, so its (rejection, loss) points lie on the lower hull."""
    p, q = laws(9, 200)
    best = knob(p, q, np.linspace(0, 4, 200), "optimal", length=4, draft_cost=0.1)
    for s in knob(p, q, np.linspace(0, 1, 21), other, length=4, draft_cost=0.1):
        assert s.loss >= max(b.loss + b.alpha * (s.acceptance - b.acceptance) for b in best) - 1e-12


def test_tokens_of_the_knob_agree_with_simulated_rounds() -> None:
    """Rounds drawn token by token at positions drawn from the sample, within 99.9 %; another alpha is outside."""
    p, q = laws(10, 40)
    rng, rounds, gamma = np.random.default_rng(0), 40_000, 4
    text = law(p, q, 0.4, "optimal")
    at = rng.integers(0, len(p), (rounds, gamma))
    draft = (rng.random((rounds, gamma, 1)) >= np.cumsum(q, axis=1)[at][..., :-1]).sum(axis=-1)
    keep = rng.random((rounds, gamma)) < np.minimum(1, text / q)[at, draft]
    tokens = 1 + np.cumprod(keep, axis=1).sum(axis=1)
    half = 3.3 * tokens.std() / np.sqrt(rounds)
    said, other = (s.tokens_per_round for s in knob(p, q, (0.4, 0.0), "optimal", length=gamma, draft_cost=0.1))
    assert abs(tokens.mean() - said) < half
    assert abs(tokens.mean() - other) > half


# ---------------------------------------------------------------- a rejected answer as a draft


def test_prefix_of_an_answer_by_enumeration_of_explicit_laws() -> None:
    """All answers of three words from q, all outcomes of verifying them against p: how many leading words stand."""
    p, q = laws(11, 3, 3)
    expected = np.zeros(4)
    for words in product(range(3), repeat=3):
        for kept in product((0, 1), repeat=3):
            chance = 1.0
            for t, (v, stays) in enumerate(zip(words, kept, strict=True)):
                accept = min(1.0, p[t, v] / q[t, v])
                chance *= q[t, v] * (accept if stays else 1 - accept)
            expected[next((k for k in range(3) if not kept[k]), 3)] += chance
    assert prefix_law(1 - total_variation(p, q)) == pytest.approx(expected, abs=1e-12)


def by_enumeration(a: list[float], verify: list[float], decode: float, r: float) -> list[float]:
    """Return passes, decoded, kept and time over every outcome of every token and every coin, weighted by chance."""
    n, total = len(a), np.zeros(4)
    for kept in product((0, 1), repeat=n):
        for fits in product((0, 1), repeat=n):
            chance = float(np.prod([a[i] if kept[i] else 1 - a[i] for i in range(n)]))
            chance *= float(np.prod([r if f else 1 - r for f in fits]))
            i, seen = 0, np.zeros(4)
            while i < n:
                w = min(len(verify), n - i)
                k = next((k for k in range(w) if not kept[i + k]), w)
                seen += (1, 0, k, verify[w - 1])
                i += k if k == w else k + 1
                if k < w and not fits[i - 1]:
                    seen += (0, n - i, 0, decode * (n - i))
                    break
            total += chance * seen
    return list(total)


@pytest.mark.parametrize("realigned", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_answer_as_draft_against_enumeration(width: int, realigned: float) -> None:
    rng = np.random.default_rng(width)
    a, verify = list(rng.random(5)), list(np.sort(rng.uniform(0.5, 2, width)))
    reuse = answer_as_draft(a, verify, 0.7, realigned)
    assert list(reuse[:4]) == pytest.approx(by_enumeration(a, verify, 0.7, realigned), abs=1e-12)
    assert reuse.plain_s == pytest.approx(3.5)


def test_answer_as_draft_agrees_with_simulated_verification() -> None:
    """40 tokens, passes of 8: means within 99.9 %; those of an acceptance 0.03 lower are outside."""
    rng, runs, n, width, a, r = np.random.default_rng(4), 4000, 40, 8, 0.85, 0.6
    passes, time = np.zeros(runs), np.zeros(runs)
    for run in range(runs):
        i = 0
        while i < n:
            w = min(width, n - i)
            fell = np.flatnonzero(rng.random(w) >= a)
            passes[run] += 1
            time[run] += 1.5
            i += fell[0] + 1 if len(fell) else w
            if len(fell) and rng.random() >= r:
                time[run] += n - i
                break

    def agrees(acceptance: float) -> bool:
        said = answer_as_draft([acceptance] * n, [1.5] * width, 1.0, r)
        return all(
            abs(seen.mean() - value) < 3.5 * seen.std() / np.sqrt(runs)
            for seen, value in ((passes, said.passes), (time, said.time_s))
        )

    assert agrees(a)
    assert not agrees(a - 0.03)


def test_ends_of_an_answer_as_draft() -> None:
    whole = answer_as_draft([1.0] * 30, [2.0] * 30, 1.0)
    assert whole[:4] == pytest.approx((1.0, 0.0, 30.0, 2.0))
    nothing = answer_as_draft([0.0] * 30, [2.0] * 30, 1.0)
    assert nothing[:4] == pytest.approx((1.0, 29.0, 0.0, 31.0))  # the pass gives one token of the tier's own
    assert nothing.saved < 0
    assert escalation_cost(8.8, nothing, 1.0) > 8.8
    geometric = answer_as_draft([0.9] * 7, [1.0] * 7, 1.0)
    assert geometric.kept == pytest.approx(sum(0.9**i for i in range(1, 8)))


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"`p` must be at least 0 and add up to 1"):
        total_variation([0.5, 0.4], [0.5, 0.5])
    with pytest.raises(InputError, match=r"`q` must have the shape"):
        total_variation([0.5, 0.5], [1.0])
    with pytest.raises(InputError, match=r"`alpha` must be at least 0"):
        defers([1.0], [1.0], -0.1, "chow")
    with pytest.raises(InputError, match=r"`rule` must be one of"):
        defers([1.0], [1.0], 0.1, "best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"`accepted` must be one or more probabilities.*pass 0\.8, not 80"):
        answer_as_draft([80], [1.0], 1.0)
    with pytest.raises(InputError, match=r"`verify_s` must be one or more finite times above 0"):
        answer_as_draft([0.8], [0.0], 1.0)
    with pytest.raises(InputError, match=r"`realigned` must lie in \[0, 1\]"):
        answer_as_draft([0.8], [1.0], 1.0, 80)
    with pytest.raises(InputError, match=r"`rule` must be one of"):
        token_law([1.0], [1.0], 0.1, "best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"`decode_share` must lie in"):
        escalation_cost(1.0, answer_as_draft([0.8], [1.0], 1.0), 90)

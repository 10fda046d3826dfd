"""Categories and posteriors in the policy: a covariate that knows, one that knows nothing, and pools of data sets."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.category_policy import CATEGORIES, compare, sorted_by_difficulty
from calibration.category_policy import Posteriors as Posterior
from calibration.quality_features import Known, pool
from calibration.quality_readers import Samples
from theory.errors import InputError

COST = (1.0, 8.0)
RIGHT = ((0.95, 0.95), (0.10, 0.90))  # P(small right), P(large right) of easy and of hard prompts


def routed(n: int, seed: int, told: bool = True) -> tuple[Samples, Known]:
    """Return prompts whose scores are noise and whose covariate says how hard they are (or belongs to another)."""
    rng = np.random.default_rng(seed)
    hard = rng.random(n) < 0.4
    right = (rng.random((n, 2)) < np.array(RIGHT)[hard.astype(int)]).astype(float)
    ids, cost = tuple(map(str, range(n))), np.tile(COST, (n, 1))
    samples = Samples("toy", "confidence", "USD", ("small", "large"), ids, right, rng.random((n, 2)), cost)
    seen = hard if told else rng.permutation(hard)
    return samples, Known(("hard",), seen[:, None].astype(float), samples.score, np.zeros((n, 0)))


def test_a_category_that_knows_routes_before_the_answer() -> None:
    samples, known = routed(900, 0)
    found = compare(samples, known)
    simple, complex_ = found["categories"]
    assert (simple["category"], complex_["category"]) == ("simple", "complex")
    plan = simple["plans"][1], complex_["plans"][1]  # lambda of 10 calls of the large tier
    assert plan[0]["first"][0] > 0.95  # nothing to gain from the large tier: 0.95 against 0.95
    assert plan[1]["first"][1] > 0.95  # 0.8 more right for 8 units at lambda = 80
    assert plan[0]["stop"][0] > 0.95
    assert found["area"]["posterior"] > found["area"]["own_signal"] + 0.1  # told after the small tier ran
    assert found["gain"]["category"]["interval"][0] > 0.01  # told before, its call is saved too
    # routing hard prompts alone is the exact optimum: cost 0.6 x 1 + 0.4 x 8 in expectation
    cost = sum(c["share"] * c["plans"][1]["cost"] for c in found["categories"])
    assert cost == pytest.approx(0.6 * 1 + 0.4 * 8, rel=0.1)


def test_a_covariate_of_other_prompts_is_worth_nothing() -> None:
    """Negative control: noise as a category must not raise the area out of fold."""
    samples, known = routed(900, 1, told=False)
    assert compare(samples, known)["gain"]["category"]["value"] < 0.04


def test_thirds_and_fewer() -> None:
    rng = np.random.default_rng(0)

    def of(p: np.ndarray) -> Posterior:
        table = np.column_stack([p, p])
        return Posterior(table, table, table)

    p = rng.random(900)
    where, new = sorted_by_difficulty(of(p), of(np.array([0.99, 0.5, 0.01])))
    assert new.tolist() == [0, 1, 2]
    assert np.bincount(where).tolist() == [300, 300, 300]
    assert p[where == 0].min() > p[where == 2].max()
    assert len(CATEGORIES) == 3
    assert sorted_by_difficulty(of(np.full(900, 0.5)), of(p))[0].max() == 0  # nothing known: one category
    assert sorted_by_difficulty(of(p[:100]), of(p))[0].max() == 0  # thirds of 33 prompts: too few to plan on


def test_pool() -> None:
    parts = [routed(50, 0), routed(30, 1)]
    samples, known = pool(parts)
    assert samples.correct.shape == (80, 2)
    assert known.names == ("hard", "toy", "toy")
    assert known.covariates[:, 1:].sum(axis=0).tolist() == [50, 30]
    other = Known((), np.zeros((30, 0)), parts[1][0].score, np.zeros((30, 0)))
    with pytest.raises(InputError, match="`parts` must have the same tiers, signal and covariates"):
        pool([parts[0], (parts[1][0], other)])


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="`csv` must hold at least 300 prompts of toy"):
        compare(*routed(100, 0))

"""Accepted drafts in the engine follow the law they are given: against its survival, and against renewal theory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import roots_sh_jacobi
from scipy.stats import chi2

from planner.build import resolve
from planner.scenario import load_scenario
from planner.service import Load, Service, build_service, with_length
from simulator.cluster import TierSetup, only, simulate_cluster, simulate_tier
from simulator.engine import StepTable, simulate
from simulator.workload import Workload
from theory.acceptance import BetaMixture, Histogram, Iid, Positional
from theory.errors import InputError
from theory.queueing import mean_overshoot
from theory.specs import Limits
from theory.speculation import LengthLaw, mean_tokens, tokens_per_round, tokens_variance, variance_tokens

GAMMA = 4
LIMITS = Limits(max_num_seqs=256, max_num_batched_tokens=8192)
LAWS: dict[str, LengthLaw] = {
    "one probability": Iid(0.7),
    "by position": Positional((0.62, 0.75, 0.9, 0.4)),
    "counted": Histogram((30, 5, 0, 25, 40)),
    "mixed": BetaMixture.from_moments(0.7, 0.2),
}
WRONG: dict[str, LengthLaw] = {
    "one probability": Iid(0.68),
    "by position": Positional((0.62, 0.75, 0.9, 0.44)),
    "counted": Histogram((30, 5, 2, 25, 38)),
    "mixed": Iid(0.7),  # the same mean without its spread
}


def table() -> StepTable:
    base = np.full((2, LIMITS.max_num_seqs + 1), 0.01)
    return StepTable([0, GAMMA], base, np.zeros(base.shape), [0, 1], [0.0, 0.0])


def run(law: Any, count: int, output: int, seed: int = 0) -> Any:
    work = Workload(np.zeros(count), np.ones(count), np.full(count, output))
    return simulate(work, table(), LIMITS, 10**9, GAMMA, law, seed)


@pytest.mark.parametrize("name", LAWS)
def test_a_round_accepts_as_many_as_the_law_says(name: str) -> None:
    """Output 2 needs one round, whose accepted drafts are counted whole: chi-square of the law, and of a wrong one."""
    count = 60_000
    seen = np.bincount(run(LAWS[name], count, 2).accepted, minlength=GAMMA + 1)

    def statistic(law: LengthLaw) -> float:
        expected = -np.diff(np.append(law.survival(GAMMA), 0.0)) * count
        possible = expected > 0
        assert seen[~possible].sum() == 0
        return float(((seen - expected)[possible] ** 2 / expected[possible]).sum())

    assert statistic(LAWS[name]) < chi2.ppf(0.995, GAMMA)
    assert statistic(WRONG[name]) > chi2.ppf(0.995, GAMMA)


def expected_rounds(law: LengthLaw, output: int) -> float:
    """Mean rounds of a request that needs ``output`` - 1 tokens of decoding, renewal theory; of each alpha if mixed."""
    if isinstance(law, BetaMixture):
        alpha, weight = roots_sh_jacobi(64, law.a + law.b - 1, law.a)
        mean = tokens_per_round(alpha, GAMMA)
        over = mean_overshoot(mean, tokens_variance(alpha, GAMMA))
        return float(weight @ ((output - 1 + over) / mean) / weight.sum())
    mean = mean_tokens(law, GAMMA)
    return (output - 1 + float(mean_overshoot(mean, variance_tokens(law, GAMMA)))) / mean


@pytest.mark.parametrize("name", LAWS)
def test_rounds_agree_with_renewal_theory(name: str) -> None:
    count, output = 4000, 300
    rounds = run(LAWS[name], count, output).rounds
    error = 2.81 * rounds.std() / np.sqrt(count)
    assert abs(rounds.mean() - expected_rounds(LAWS[name], output)) < error
    assert abs(rounds.mean() - expected_rounds(WRONG[name], output)) > error


def test_tokens_over_rounds_of_equal_requests_are_the_pooled_ones() -> None:
    """Poor requests take more rounds: the pool shows less than the mean over requests."""
    law = LAWS["mixed"]
    assert isinstance(law, BetaMixture)
    done = run(law, 4000, 3000)
    pooled = done.output.sum() / done.rounds.sum()
    assert pooled == pytest.approx(law.pooled_tokens(GAMMA), rel=0.02)
    assert abs(pooled / mean_tokens(law, GAMMA) - 1) > 0.05


def test_laws_of_one_probability_are_that_number() -> None:
    for law in (Iid(0.7), Positional((0.7,) * GAMMA)):
        np.testing.assert_array_equal(run(law, 500, 100).accepted, run(0.7, 500, 100).accepted)
    sure = run(Positional((1.0, 1.0, 0.0, 1.0)), 100, 61)
    assert np.all(sure.rounds == 20)  # two accepted and one more in every round


def test_the_alpha_of_a_request_depends_on_its_name_alone() -> None:
    law = LAWS["mixed"]
    rng = np.random.default_rng(1)
    output = rng.integers(2, 60, 50)
    calm = simulate(Workload(np.arange(50.0) * 100, np.ones(50), output), table(), LIMITS, 10**6, GAMMA, law, 3)
    rush = simulate(Workload(np.zeros(50), np.ones(50), output), table(), LIMITS, 10**6, GAMMA, law, 3)
    np.testing.assert_array_equal(calm.accepted, rush.accepted)
    one = simulate(Workload([0.0], [1], output[7:8]), table(), LIMITS, 10**6, GAMMA, law, 3, ids=np.array([7]))
    assert one.accepted[0] == calm.accepted[7]


def test_a_law_goes_through_tiers_and_replicas() -> None:
    """Replicas behind a router draw what one replica draws."""
    count = 300
    work = Workload(np.arange(count) * 0.01, np.ones(count), np.full(count, 40))
    for law in LAWS.values():
        tier = TierSetup("only", table(), LIMITS, 10**6, GAMMA, law)
        expected = simulate(work, table(), LIMITS, 10**6, GAMMA, law, 5).accepted
        np.testing.assert_array_equal(simulate_tier(work, tier, 5).accepted, expected)
        spread = TierSetup("only", table(), LIMITS, 10**6, GAMMA, law, replicas=3)
        np.testing.assert_array_equal(simulate_tier(work, spread, 5).accepted, expected)
        assert simulate_cluster(work, [tier], only(0, 1, count), 5).accepted.sum() > 0


def test_a_law_is_not_asked_beyond_what_it_knows() -> None:
    with pytest.raises(InputError, match="`length` must be at most the 2 positions the vector knows"):
        run(Positional((0.9, 0.8)), 10, 10)
    run(Positional((0.9, 0.8), extrapolate=True), 10, 10)


# ---------------------------------------------------------------------------------------------------------------------
# In a scenario
# ---------------------------------------------------------------------------------------------------------------------

HEAD = "{model: llama-68m, acceptance_by_position: [0.8, 0.5, 0.3], source: of this test}"


def with_draft(draft: str) -> Any:
    return resolve(*load_scenario(overrides=["traffic.requests=500", "traffic.rate=0.3", f"tiers.2.drafts=[{draft}]"]))


def test_a_scenario_gives_acceptance_by_position() -> None:
    """Schedule, mean tokens and draws follow the same law; drafts longer than it are not considered."""
    problem = with_draft(HEAD)
    draft = problem.drafts[2][0]
    law = Positional((0.8, 0.5, 0.3))
    assert draft.law == law
    assert draft.max_length == 3
    assert float(tokens_per_round(draft.acceptance.value, 3)) == pytest.approx(mean_tokens(law, 3))
    load = Load.of(problem.workload)
    free = build_service(2, problem.deployment(2, 4), problem.profile, draft, load)
    assert isinstance(free, Service)
    assert free.rounds.length.max() <= 3
    fixed = with_length(free, load, 3)
    assert fixed.rounds.tokens[0] == pytest.approx(1 + 0.8 + 0.8 * 0.5 + 0.8 * 0.5 * 0.3)
    run = simulate(
        problem.workload, free.table, free.deployment.limits, free.kv_tokens, fixed.schedule, free.acceptance, 1
    )
    spread = np.sqrt(variance_tokens(law, 3) / run.rounds.sum())
    tokens = 1 + run.accepted.sum() / run.rounds.sum()
    assert abs(tokens - mean_tokens(law, 3)) < 2.81 * spread
    assert abs(tokens - mean_tokens(Positional((0.8, 0.52, 0.3)), 3)) > 2.81 * spread


@pytest.mark.parametrize("spread", [0.1, 0.25])
def test_a_scenario_gives_the_spread_of_acceptance_over_requests(spread: float) -> None:
    """Planner and engine agree on the tokens of a round in a batch; the mean over requests and one alpha are not it."""
    problem = with_draft(f"{{model: llama-68m, acceptance: 0.7, acceptance_sd: {spread}, source: of this test}}")
    draft = problem.drafts[2][0]
    law = BetaMixture.from_moments(0.7, spread)
    assert draft.law == law
    load = Load.of(problem.workload)
    free = build_service(2, problem.deployment(2, 4), problem.profile, draft, load)
    assert isinstance(free, Service)
    fixed = with_length(free, load, GAMMA)
    predicted = float(fixed.rounds.tokens[0])
    assert predicted == pytest.approx(law.pooled_tokens(GAMMA))
    assert float(tokens_per_round(draft.acceptance.value, 8)) == pytest.approx(law.pooled_tokens(8))
    work = Workload(np.zeros(4000), np.full(4000, 10), np.full(4000, 400))
    run = simulate(work, free.table, free.deployment.limits, 10**8, fixed.schedule, free.acceptance, 1)
    seen = (run.rounds + run.accepted).sum() / run.rounds.sum()
    error = 2.81 * float(np.std(run.accepted + run.rounds - seen * run.rounds)) / np.sqrt(4000) / run.rounds.mean()
    assert abs(seen - predicted) < error
    assert abs(seen - mean_tokens(law, GAMMA)) > error
    assert abs(seen - mean_tokens(0.7, GAMMA)) > error


@pytest.mark.parametrize(
    ("draft", "text"),
    [
        ("{model: llama-68m, acceptance_by_position: [0.8, 0.5]}", "`acceptance` needs a `source`"),
        ("{model: llama-68m, acceptance: 0.7, acceptance_by_position: [0.8], source: x}", "needs exactly one of"),
        ("{model: llama-68m, source: x}", "needs exactly one of"),
        ("{model: llama-68m, acceptance: 0.7, acceptance_sd: 0.2}", "`acceptance` needs a `source`"),
        ("{model: llama-68m, acceptance: 0.7, acceptance_sd: 0.5, source: x}", r"must be below 0.458.*; got 0.5"),
        (
            "{model: llama-68m, acceptance_by_position: [0.8], acceptance_sd: 0.1, source: x}",
            "takes `acceptance_sd` with `acceptance`",
        ),
        ("{model: llama-68m, acceptance_by_position: [80], source: x}", r"less than or equal to 1; got 80"),
    ],
)
def test_bad_drafts_are_refused(draft: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        with_draft(draft)

"""Simulation against closed form: occupancy, TPOT, TTFT and E2E inside 99 % intervals, wrong parameters outside.

Each regime is simulated by independent replications (other arrivals, lengths and acceptances), so the intervals are
plain Student-t ones. The closed form gets the law's parameters, never the sample's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import stdtrit

from simulator.engine import StepTable, simulate
from simulator.workload import Workload
from theory.queueing import Occupancy, mean_context, mean_overshoot, occupancy, ttft_quantile
from theory.specs import Limits
from theory.speculation import tokens_per_round, tokens_variance

Array = NDArray[np.float64]

SLOTS = 128  # largest batch tabled [-]
BASE, PER_SEQUENCE, PER_CACHED = 0.02, 2e-4, 2e-8  # decode step [s], [s], [s/token]
VERIFY = 0.3  # a round with drafts takes this share longer [-]
PROMPT = 400  # [tokens]
MEAN = 200.0  # output, roughly; each law has its own exact mean [tokens]
REPLICATIONS = 10
FIGURES = ("batch", "tpot_s", "ttft_s", "e2e_s")
LEVEL = 1 - 0.01 / len(FIGURES)  # of each interval, so that the four of a regime hold together with 99 % (Bonferroni)
GAMMA = 4
PLENTY = 10**8

FREE_PROMPTS = ([0.0, 1.0], [0.0, 1e-9])  # prefill costs nothing: the bare processor-sharing queue
PROMPTS = (
    [0.0, 1.0, 256.0, 16384.0],
    [0.0, 0.018, 0.020, 0.020 + 16128 * 6e-5],
)  # flat while weights are read, then not


def fixed(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return np.full(count, int(MEAN))


def exponential(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return np.maximum(np.ceil(rng.exponential(MEAN, count)), 2).astype(np.int64)


def heavy(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Log-normal with sigma 1.2 (squared coefficient of variation about 2), cut at 15 times the mean."""
    return np.clip(np.round(rng.lognormal(np.log(MEAN) - 0.72, 1.2, count)), 2, 15 * MEAN).astype(np.int64)


Law = Callable[[int, np.random.Generator], NDArray[np.int64]]


@dataclass(frozen=True)
class Regime:
    rate: float  # [request/s]
    law: Law
    slots: int = SLOTS
    gamma: int = 0
    alpha: float = 0.0
    prompts: bool = False
    requests: int = 4000


REGIMES = {
    "light, fixed": Regime(0.1, fixed, requests=1500),
    "batch 5, exponential": Regime(1.2, exponential),
    "batch 15, heavy tail": Regime(3.3, heavy, requests=8000),
    "batch 40, fixed": Regime(7.0, fixed, requests=12000),
    "near capacity, exponential, cap 24": Regime(4.4, exponential, slots=24, requests=12000),
    "near capacity, fixed, cap 24": Regime(4.4, fixed, slots=24, requests=12000),
    "speculation, exponential": Regime(6.0, exponential, gamma=GAMMA, alpha=0.7, requests=8000),
    "prefill, exponential": Regime(4.0, exponential, prompts=True, requests=8000),
    "prefill, speculation, fixed, cap 32": Regime(4.0, fixed, 32, GAMMA, 0.7, prompts=True, requests=8000),
}


def table(prompts: bool) -> StepTable:
    n = np.arange(SLOTS + 1.0)
    base = np.array([BASE + PER_SEQUENCE * n, BASE * (1 + VERIFY) + PER_SEQUENCE * n * (1 + 2 * VERIFY)])
    base[:, 0] = 0.0
    grid, times = PROMPTS if prompts else FREE_PROMPTS
    return StepTable([0, GAMMA], base, np.full(base.shape, PER_CACHED), grid, times, 2e-10 if prompts else 0.0)


@cache
def moments(law: Law) -> tuple[float, float, float]:
    """Mean and squared coefficient of variation of the decoded tokens, mean context while decoding."""
    output = law(2_000_000, np.random.default_rng(12345))
    decoded = output - 1.0
    return (
        float(decoded.mean()),
        float(decoded.var() / decoded.mean() ** 2),
        mean_context(np.full(output.size, PROMPT), output),
    )


def predicted(regime: Regime, tokens_factor: float = 1.0) -> Occupancy:
    """The closed form; ``tokens_factor`` falsifies the tokens of a round."""
    t, n = table(regime.prompts), np.arange(1, SLOTS + 1)
    tokens, cv2, context = moments(regime.law)
    row = t.row(regime.gamma)
    per_round = tokens_per_round(regime.alpha, regime.gamma)
    width = n[None, :] * (regime.gamma + 1)
    return occupancy(
        regime.rate,
        tokens,
        t.base[row, 1:] + t.slope[row, 1:] * n * context,
        per_round * tokens_factor,
        overshoot=mean_overshoot(per_round, tokens_variance(regime.alpha, regime.gamma)),
        slots=regime.slots,
        prefill_time=t.prefill_time(PROMPT, decoding=width),
        prefill_further=t.prefill_time(PROMPT, decoding=width + PROMPT),
        prefill_alone=t.prefill_time(PROMPT),
        prefill_steps=1,
        length_cv2=cv2,
    )


def replication(regime: Regime, seed: int) -> tuple[float, ...]:
    rng = np.random.default_rng([seed, 7])
    n = regime.requests
    arrival, output = np.cumsum(rng.exponential(1 / regime.rate, n)), regime.law(n, rng)
    run = simulate(
        Workload(arrival, np.full(n, PROMPT), output),
        table(regime.prompts),
        Limits(max_num_seqs=regime.slots),
        PLENTY,
        regime.gamma,
        regime.alpha,
        seed,
    )
    assert run.emitted == output.sum()
    start, end = arrival[n // 10], arrival[-1]  # the first tenth is warm-up
    kept = slice(n // 10, n - n // 20)  # and the last twentieth lives through the drain
    overlap = np.clip(run.completion, start, end) - np.clip(run.first_token, start, end)
    decode = run.completion - run.first_token
    ttft = (run.first_token - run.arrival)[kept]
    return (
        overlap.sum() / (end - start),
        decode[kept].sum() / (output[kept] - 1).sum(),
        ttft.mean(),
        (run.completion - run.arrival)[kept].mean(),
        float(np.quantile(ttft, 0.99)),
    )


@cache
def simulated(name: str) -> tuple[Array, Array]:
    """Low and high end of the 99 % intervals of batch, TPOT, TTFT, E2E and the 99th percentile of TTFT."""
    x = np.array([replication(REGIMES[name], seed) for seed in range(REPLICATIONS)])
    half = stdtrit(REPLICATIONS - 1, 0.5 + LEVEL / 2) * x.std(axis=0, ddof=1) / np.sqrt(REPLICATIONS)
    return x.mean(axis=0) - half, x.mean(axis=0) + half


def figures(state: Occupancy) -> Array:
    return np.array([state.batch[0], state.tpot_s[0], state.ttft_s[0], state.e2e_s[0], ttft_quantile(state, 0.99)[0]])


@pytest.mark.parametrize("name", REGIMES)
def test_closed_form_lies_inside_the_simulated_intervals(name: str) -> None:
    low, high = simulated(name)
    theory = figures(predicted(REGIMES[name]))
    for i, quantity in enumerate(FIGURES):
        assert low[i] <= theory[i] <= high[i], f"{quantity}: {theory[i]:.6g} not in [{low[i]:.6g}, {high[i]:.6g}]"


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("wrong", ["rate + 10 %", "tokens per round - 10 %", "tokens per round + 10 %"])
def test_a_wrong_parameter_is_rejected(name: str, wrong: str) -> None:
    low, high = simulated(name)
    regime = REGIMES[name]
    if wrong.startswith("rate"):
        theory = figures(predicted(replace(regime, rate=1.1 * regime.rate)))
    else:
        theory = figures(predicted(regime, 0.9 if "-" in wrong else 1.1))
    rejected = (theory[:4] < low[:4]) | (theory[:4] > high[:4])
    assert rejected[0]  # the batch
    assert rejected[1] or wrong.startswith("rate")  # and the TPOT, if the round is wrong


def test_without_the_round_boundary_ttft_would_be_wrong() -> None:
    """The half round that an arrival waits is no refinement: TTFT leaves its interval without it."""
    low, high = simulated("batch 15, heavy tail")
    state = predicted(REGIMES["batch 15, heavy tail"])
    assert not low[2] <= state.ttft_s[0] - state.admission_s[0] <= high[2]


def test_without_prefill_interference_tpot_would_be_wrong() -> None:
    low, high = simulated("prefill, exponential")
    state = predicted(replace(REGIMES["prefill, exponential"], prompts=False))
    assert not low[1] <= state.tpot_s[0] <= high[1]


@pytest.mark.parametrize("name", [n for n, r in REGIMES.items() if "near capacity" not in n])
def test_ttft_quantile_is_near(name: str) -> None:
    low, high = simulated(name)
    assert ttft_quantile(predicted(REGIMES[name]), 0.99)[0] == pytest.approx((low[4] + high[4]) / 2, rel=0.12)


@pytest.mark.parametrize("law", [fixed, exponential, heavy])
def test_distribution_of_the_batch_is_insensitive_to_the_law_of_lengths(law: Law) -> None:
    """Share of time with at least k decoding sequences, from the engine's own clock, for three laws and one formula."""
    regime = Regime(3.0, law, requests=5000)
    pi = predicted(regime).pi[0]
    levels = np.searchsorted(np.cumsum(pi), [0.25, 0.5, 0.75])
    shares = []
    for seed in range(REPLICATIONS):
        rng = np.random.default_rng([seed, 8])
        n = regime.requests
        work = Workload(np.cumsum(rng.exponential(1 / regime.rate, n)), np.full(n, PROMPT), law(n, rng))
        run = simulate(work, table(False), Limits(max_num_seqs=SLOTS), PLENTY)
        shares.append([run.batch_s[k:].sum() / run.end_s for k in levels])
    mean, error = np.mean(shares, axis=0), np.std(shares, axis=0, ddof=1) / np.sqrt(REPLICATIONS)
    half = stdtrit(REPLICATIONS - 1, 0.995) * error + 0.01  # one per cent for filling and draining, both in the clock
    theory = np.array([pi[k:].sum() for k in levels])
    wrong = predicted(replace(regime, rate=1.1 * regime.rate)).pi[0]
    assert np.all(np.abs(mean - theory) <= half)
    assert np.any(np.abs(mean - [wrong[k:].sum() for k in levels]) > half)


# ---------------------------------------------------------------------------------------------------------------------
# Special cases with formulas of their own
# ---------------------------------------------------------------------------------------------------------------------


def single_server(random: bool, rate: float, seed: int) -> float:
    """Mean wait with one slot and 20 ms of service, constant or geometric in steps of 1 ms."""
    rng = np.random.default_rng([seed, 9])
    n = 20_000
    output = 1 + (rng.geometric(1 / 20, n) if random else np.full(n, 20))
    flat = StepTable([0], [[0.0, 0.001]], [[0.0, 0.0]], *FREE_PROMPTS)
    work = Workload(np.cumsum(rng.exponential(1 / rate, n)), np.ones(n), output)
    run = simulate(work, flat, Limits(max_num_seqs=1), PLENTY)
    return float((run.admitted - run.arrival).mean())


@pytest.mark.parametrize(("random", "cv2"), [(False, 0.0), (True, 1 - 1 / 20)])
def test_one_slot_is_m_d_1_and_m_m_1(random: bool, cv2: float) -> None:
    """Pollaczek-Khinchine, W = r E[S^2] / 2 (1 - rho): Kleinrock (1975), equation 5.77."""
    service, load = 0.020, 0.7
    waits = np.array([single_server(random, load / service, seed) for seed in range(REPLICATIONS)])
    half = stdtrit(REPLICATIONS - 1, 0.995) * waits.std(ddof=1) / np.sqrt(REPLICATIONS)
    exact = load * service * (1 + cv2) / 2 / (1 - load)
    assert abs(waits.mean() - exact) <= half
    assert abs(waits.mean() - exact * (1.1 * (1 - load) / (1 - 1.1 * load))) > half  # 10 % more load
    state = occupancy(load / service, 20, [0.001], length_cv2=cv2)
    assert state.queue_s[0] == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(("clients", "think"), [(1, 0.0), (16, 0.0), (16, 2.0), (SLOTS, 0.0)])
def test_closed_loop_throughput_is_clients_over_cycle_time(clients: int, think: float) -> None:
    """Equal lengths keep clients in step: the cycle is one prefill of all and output - 1 rounds of all."""
    output, prompt, turns = 50, 20, 5
    t = table(True)
    count = clients * turns
    work = Workload(np.zeros(count), np.full(count, prompt), np.full(count, output), clients=clients, think_time=think)
    run = simulate(work, t, Limits(max_num_seqs=SLOTS), PLENTY)
    prefill = t.prefill_time(clients * prompt) - t.prefill_context_slope * (clients**2 - clients) * prompt**2 / 2
    rounds = sum(t.round_time(clients, prompt + j) for j in range(output - 1))
    cycle = prefill + rounds + think
    throughput = count / (run.completion.max() + think)
    assert throughput == pytest.approx(clients / cycle, rel=1e-9)
    for wrong in (cycle - prefill, cycle + t.round_time(clients, prompt), cycle + think - 1.0):  # negative controls
        assert abs(throughput * wrong / clients - 1) > 1e-3


def test_closed_loop_of_random_lengths_obeys_littles_law() -> None:
    rng = np.random.default_rng(3)
    clients, think, count = 20, 1.5, 6000
    work = Workload(np.zeros(count), np.full(count, 50), exponential(count, rng), clients=clients, think_time=think)
    run = simulate(work, table(True), Limits(max_num_seqs=SLOTS), PLENTY)
    cycle = (run.completion - run.arrival).mean() + think
    assert count / run.completion.max() == pytest.approx(clients / cycle, rel=0.02)  # the drain is 1 / 300 of the run
    assert count / run.completion.max() != pytest.approx(clients / (cycle - think), rel=0.02)  # negative control

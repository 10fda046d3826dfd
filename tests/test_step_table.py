"""The engine's step times against the latency model they are tabled from: errors are bounded, between points too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from planner.build import Problem, resolve
from planner.predict import round_time
from planner.scenario import load_scenario
from planner.service import Load, Service, build_service, step_table
from theory.latency import Pass, step_time

Array = NDArray[np.float64]
BATCH = np.array([1.0, 3.0, 8.0, 24.0, 64.0, 256.0])  # [sequences]
SHARES = (0.05, 0.3, 0.5, 1.0, 1.5, 2.5)  # of the mean context
DEPLOYED = [(0, 1, 0), (1, 2, 0), (2, 4, None), (2, 8, 1)]  # tier, GPUs, which draft


@pytest.fixture(scope="module")
def problem() -> Problem:
    return resolve(*load_scenario(overrides=["traffic.requests=2000"]))


def service(problem: Problem, tier: int, tp: int, draft: int | None) -> Service:
    chosen = None if draft is None else problem.drafts[tier][draft]
    built = build_service(tier, problem.deployment(tier, tp), problem.profile, chosen, Load.of(problem.workload))
    assert isinstance(built, Service)
    return built


def rounds_off(problem: Problem, s: Service, context: float) -> float:
    """Greatest error of a tabled round over batches, draft lengths and contexts [-]."""
    lengths = s.table.draft_lengths.astype(float)[:, None]
    n = BATCH.astype(int)
    off = [
        s.table.base[:, n]
        + s.table.slope[:, n] * n * share * context
        - round_time(s.deployment, problem.profile, s.draft, lengths, BATCH[None, :], np.asarray(share * context))
        for share in SHARES
    ]
    whole = s.table.base[:, n] + s.table.slope[:, n] * n * context
    return float(np.abs(np.array(off) / whole).max())


@pytest.mark.parametrize(("tier", "tp", "draft"), DEPLOYED)
def test_a_round_is_affine_in_its_context(problem: Problem, tier: int, tp: int, draft: int | None) -> None:
    """Attention is: within 0.1 % from a twentieth to two and a half times the mean context. Another batch is not."""
    s, context = service(problem, tier, tp, draft), Load.of(problem.workload).context
    assert rounds_off(problem, s, context) < 1e-3
    wrong = replace(s, table=replace(s.table, slope=1.1 * s.table.slope))
    assert rounds_off(problem, wrong, context) > 1e-3  # negative control


def prompt_off(problem: Problem, s: Service, tokens: Array) -> Array:
    """Errors of a step of one prompt of that many tokens and nothing else [-]."""
    d, exact = s.deployment, np.zeros_like(tokens)
    parts = [(d.model, d.tp, d.precision)] + ([(s.draft.model, s.draft.tp, "bf16")] if s.draft else [])
    for model, degree, precision in parts:
        time = step_time(
            model, d.accelerator, problem.profile, Pass(0.0, 1.0, 0.0, prefill_tokens=tokens), degree, precision
        )
        exact += time.total - (0.0 if model is d.model else time.overhead)
    return np.asarray(s.table.base[0, 0] + s.table.prefill_time(tokens)) / exact - 1


@pytest.mark.parametrize(("tier", "tp", "draft"), DEPLOYED)
def test_prompts_between_the_points_of_the_table(problem: Problem, tier: int, tp: int, draft: int | None) -> None:
    """Within 4 % from one token to a full budget, tile edges included; a grid that passes over the edges is not.

    What is left is attention, taken as a square; between points it would be nothing.
    """
    s = service(problem, tier, tp, draft)
    tokens = np.unique(np.concatenate([np.arange(1.0, 1400.0, 3.0), np.geomspace(1400, 8192, 300).round()]))
    assert np.abs(prompt_off(problem, s, tokens)).max() < 0.04
    kept = np.concatenate([s.table.prefill_tokens[:513], s.table.prefill_tokens[513:][1::2]])
    rough = np.interp(kept, s.table.prefill_tokens, s.table.prefill_s)
    coarse = replace(s, table=replace(s.table, prefill_tokens=kept, prefill_s=rough))
    assert np.abs(prompt_off(problem, coarse, tokens)).max() > 0.04  # negative control


def test_the_table_does_not_depend_on_what_was_tabled_before(problem: Problem) -> None:
    """Passes are remembered between tables; a table is the same whoever asked first."""
    s, context = service(problem, 2, 4, None), Load.of(problem.workload).context
    service(problem, 2, 8, 1)
    again = step_table(s.deployment, problem.profile, None, context)
    np.testing.assert_array_equal(again.base, s.table.base)
    np.testing.assert_array_equal(again.prefill_s, s.table.prefill_s)

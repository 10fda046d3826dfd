"""A replica of a tier: its step times as a table for engine and queue, its draft schedule, its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.engine import StepTable
from simulator.workload import Workload
from theory.latency import Pass, Profile, StepTime, step_time
from theory.memory import kv_capacity_tokens
from theory.queueing import mean_overshoot
from theory.specs import Deployment
from theory.speculation import LengthLaw, Schedule, best_schedule, mean_tokens, variance_tokens

from .predict import DraftModel, draft_step, verify_step

SCHEDULE_TOLERANCE = 0.01  # of the best rate, given up for a schedule of few ranges [-]

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Load:
    """The moments of a workload that the analytic model needs."""

    prompt: float  # mean that needs computing: all but what is at hand where nothing is forgotten [tokens]
    output: float  # mean [tokens]
    context: float  # mean cached tokens of a decoding sequence [tokens]
    context_sd: float  # their standard deviation [tokens]
    output_cv2: float  # squared coefficient of variation of the output [-]
    longest: int  # longest prompt plus output [tokens]
    prompt_square: float  # mean of the square of what needs computing [tokens^2]
    attended: float  # mean of twice the pairs of tokens that prefill attends to, P^2 less its cached part squared [-]

    @property
    def output_to_come(self) -> float:
        """Mean output that a decoding sequence has yet to emit, half of a length-biased output [tokens]."""
        return self.output * (1 + self.output_cv2) / 2

    @classmethod
    def of(cls, workload: Workload) -> Load:
        r"""Return the moments; a sequence is met decoding in proportion to its output, at a uniform place in it, so

        .. math:: E[S] = \frac{E[L (P + L / 2)]}{E[L]}, \qquad E[S^2] = \frac{E[L (P^2 + P L + L^2 / 3)]}{E[L]}
        """
        prompt, output = workload.prompt.astype(float), workload.output.astype(float)
        cached = workload.at_hand.astype(float)
        context = (output * (prompt + output / 2)).mean() / output.mean()
        square = (output * (prompt**2 + prompt * output + output**2 / 3)).mean() / output.mean()
        return cls(
            prompt=float((prompt - cached).mean()),
            output=float(output.mean()),
            context=float(context),
            context_sd=float(max(square - context**2, 0.0) ** 0.5),
            output_cv2=float(output.var() / output.mean() ** 2),
            longest=int((workload.prompt + workload.output).max()),
            prompt_square=float(((prompt - cached) ** 2).mean()),
            attended=float((prompt**2 - cached**2).mean()),
        )


@dataclass(frozen=True, slots=True)
class Service:
    """A replica: what it is, and for each batch n = 1..N how long a round takes and how many tokens it emits."""

    tier: int  # index in the scenario
    deployment: Deployment
    draft: DraftModel | None
    table: StepTable
    schedule: IntArray  # gamma for n = 0..N [tokens]
    kv_tokens: int  # KV capacity [tokens]
    batch_cap: int  # sequences that decode at once, by limit or by KV memory [sequences]
    rounds: Schedule  # gamma, E[N] and round time for n = 1..N at the mean context
    first_s: Array  # what a mean prompt adds to a step of n = 1..N decoding sequences [s]
    further_s: Array  # the same for one more prompt in that step [s]
    alone_s: float  # a step of a mean prompt and nothing else [s]
    overshoot: float  # mean tokens that the last round of a request emits past its end [tokens]

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        return self.deployment.tp

    @property
    def acceptance(self) -> float | LengthLaw:
        """Acceptance of the draft, one number or a law, 0 without one [-]."""
        return self.draft.law if self.draft else 0.0

    @property
    def name(self) -> str:
        """Short name: model, TP degree, draft."""
        with_draft = f" + {self.draft.model.name} (tp{self.draft.tp})" if self.draft else ""
        return f"{self.deployment.model.name} tp{self.deployment.tp}{with_draft}"


def step_table(deployment: Deployment, profile: Profile, draft: DraftModel | None, context: float) -> StepTable:
    """Return the step times of a replica, affine in context about ``context`` (exact at half and at one and a half)."""
    lengths = np.arange((draft.max_length if draft else 0) + 1)
    batch = np.arange(1, deployment.limits.max_num_seqs + 1, dtype=float)
    low, high = 0.5 * context, 1.5 * context
    at = _rounds_at(deployment, profile, draft, lengths, batch, np.array([low, high]))
    slope = np.maximum(at[..., 1] - at[..., 0], 0.0) / (batch * (high - low))
    base = at[..., 0] - slope * batch * low
    grid = _token_grid(deployment.limits.max_num_batched_tokens)
    times, context_slope, start = _prefill(deployment, profile, draft, grid)
    return StepTable(
        draft_lengths=lengths,
        base=np.concatenate([np.full((len(lengths), 1), start), np.maximum(base, 1e-9)], axis=1),
        slope=np.concatenate([np.zeros((len(lengths), 1)), slope], axis=1),
        prefill_tokens=np.concatenate([[0.0], grid]),
        prefill_s=np.concatenate([[0.0], np.maximum.accumulate(times)]),
        prefill_context_slope=context_slope,
        provenance=f"{profile.provenance}: profile {profile.name}",
        prefill_floor=deployment.limits.rules.eager_layer
        * (deployment.model.layers + (draft.model.layers if draft else 0)),
    )


_PASSES: dict[tuple[object, ...], tuple[Profile, StepTime]] = {}  # the same target serves beside many drafts
_KEPT = 256  # passes remembered at most [-]


def _remembered(key: tuple[object, ...], profile: Profile, made: Callable[[], StepTime]) -> StepTime:
    """Return a pass made before with the same key and profile, or make it."""
    full = (id(profile), *key)
    if full not in _PASSES:
        if len(_PASSES) >= _KEPT:
            _PASSES.clear()
        _PASSES[full] = profile, made()  # the profile is held, so that its id stays its own
    return _PASSES[full][1]


def _rounds_at(
    deployment: Deployment, profile: Profile, draft: DraftModel | None, lengths: IntArray, batch: Array, context: Array
) -> Array:
    """Return round times by draft length, batch and context, as :func:`.predict.round_time` [s]."""
    drafted, n = lengths.astype(float)[:, None, None], batch[None, :, None]
    key = ("verify", deployment, len(lengths), len(batch), *context.tolist())
    verify = _remembered(key, profile, lambda: verify_step(deployment, profile, drafted, n, context)).total
    if draft is None:
        return verify
    alone = draft_step(deployment, profile, draft, n, context).total
    return np.asarray(verify + drafted * alone)


def _token_grid(most: int) -> Array:
    fine = np.arange(1.0, 513.0, 1.0)  # the knee lies here
    edges = np.arange(512.0, most + 64.0, 64.0)  # of tiles: time jumps behind them
    return np.concatenate([fine, np.stack([edges, edges + 1], axis=1).ravel()[1:]])


def _prefill(
    deployment: Deployment, profile: Profile, draft: DraftModel | None, grid: Array
) -> tuple[Array, float, float]:
    """Return F(tokens) without attention [s], attention per token x cached token [s], what a step costs besides [s]."""
    d = deployment
    parts = [(d.model, d.tp, d.precision)] + ([(draft.model, draft.tp, "bf16")] if draft else [])
    total, slope, start = np.zeros_like(grid), 0.0, 0.0
    for model, tp, precision in parts:
        key = ("prefill", model, d.accelerator, tp, precision, len(grid))
        work = Pass(0.0, 1.0, 0.0, prefill_tokens=grid)
        time = _remembered(key, profile, partial(step_time, model, d.accelerator, profile, work, tp, precision))
        total += time.weights + time.compute + time.elementwise + time.communication
        # attention of a whole prompt of c tokens is start + p c^2 / 2
        half_square = grid**2 / 2
        p = (time.attention[-1] - time.attention[0]) / (half_square[-1] - half_square[0])
        slope += float(p)
        start += float(time.attention[0])
        if model is d.model:  # host time is paid once a step
            start += float(time.overhead[0])
    return total, slope, start


def build_service(
    tier: int, deployment: Deployment, profile: Profile, draft: DraftModel | None, load: Load, length: int | None = None
) -> Service | str:
    """Return the service, or the reason why this deployment cannot serve the load.

    Parameters
    ----------
    length : int, optional
        A fixed draft length for every batch size; the best one for each if not given [tokens].
    """
    kv_tokens = kv_capacity_tokens(deployment, draft.model if draft else None, draft.tp if draft else 1)
    label = f"{deployment.model.name} tp{deployment.tp}" + (f" + {draft.model.name}" if draft else "")
    if kv_tokens == 0:
        return f"{label}: the weights do not fit {deployment.tp} x {deployment.accelerator.name}"
    lookahead = draft.max_length if draft else 0
    if kv_tokens < load.longest + lookahead + deployment.limits.block_size:
        return f"{label}: the KV cache holds {kv_tokens} tokens, the longest request needs {load.longest}"
    if load.longest > deployment.model.max_context:
        return (
            f"{label}: the longest request has {load.longest} tokens, "
            f"the model's context is {deployment.model.max_context}"
        )
    table = step_table(deployment, profile, draft, load.context)
    held = load.context + lookahead + deployment.limits.block_size / 2
    if deployment.limits.rules.reserve_output:
        held += load.output_to_come
    cap = int(min(deployment.limits.max_num_seqs, _sequences_held(kv_tokens, held, load.context_sd)))
    rounds = _rounds(table, load, draft, length)
    return Service(
        tier=tier,
        deployment=deployment,
        draft=draft,
        table=table,
        schedule=np.concatenate([rounds.length[:1], rounds.length]),
        kv_tokens=kv_tokens,
        batch_cap=max(cap, 1),
        rounds=rounds,
        **_prefills(table, load, rounds, deployment.limits.rules.mixed_prefill),
        overshoot=_overshoot(rounds, draft),
    )


def _sequences_held(capacity: float, mean: float, sd: float) -> float:
    r"""Return how many sequences fit with 95 % probability: n with :math:`n S + z \sigma \sqrt{n} = C` (normal sum)."""
    z = 1.645 * sd
    root = (-z + (z**2 + 4 * mean * capacity) ** 0.5) / (2 * mean)
    return float(root**2)


def _rounds(table: StepTable, load: Load, draft: DraftModel | None, length: int | None) -> Schedule:
    batch = np.arange(1, table.base.shape[1])
    times = table.base[:, 1:] + table.slope[:, 1:] * batch * load.context
    law = draft.law_in_batch if draft else 0.0
    if length is None:
        return best_schedule(law, times, tolerance=SCHEDULE_TOLERANCE)
    row = table.row(length)
    tokens = np.full(len(batch), mean_tokens(law, length))
    return Schedule(np.full(len(batch), length), tokens, times[row])


def _prefills(table: StepTable, load: Load, rounds: Schedule, mixed: bool) -> dict[str, Any]:
    """What prompts add to the steps of n = 1..N decoding sequences, attention of the spread of prompts included.

    Apart from decoding they take a step of their own, which adds all its time to what the decoding sequences wait.
    """
    n, floor = np.arange(1, len(rounds.length) + 1), table.prefill_floor
    decoding = n * (rounds.length + 1.0) if mixed else np.zeros(len(n))
    decode_s = rounds.time if mixed else np.full(len(n), table.base[0, 0])
    spread = table.prefill_context_slope * (load.attended - load.prompt**2) / 2
    one = decode_s + np.asarray(table.prefill_time(load.prompt, decoding=decoding)) + spread
    two = one + np.asarray(table.prefill_time(load.prompt, decoding=decoding + load.prompt)) + spread
    alone = float(table.base[0, 0] + table.prefill_time(load.prompt) + spread)
    return {
        "first_s": np.maximum(one, floor) - (decode_s if mixed else 0.0),
        "further_s": np.maximum(two, floor) - np.maximum(one, floor),
        "alone_s": max(alone, floor),
    }


def _overshoot(rounds: Schedule, draft: DraftModel | None) -> float:
    """Mean tokens past the end of a request, at the draft length of a middling batch."""
    gamma = int(rounds.length[min(15, len(rounds.length) - 1)])
    law = draft.law_in_batch if draft else 0.0
    return float(mean_overshoot(mean_tokens(law, gamma), variance_tokens(law, gamma)))


def with_length(service: Service, load: Load, length: int) -> Service:
    """Return the same replica with one fixed draft length for every batch size."""
    return _in_rounds(service, load, _rounds(service.table, load, service.draft, length))


def with_acceptance(service: Service, load: Load, acceptance: float) -> Service:
    """Return the same replica if its draft had another acceptance [-], with the schedule that is best for it."""
    assert service.draft is not None
    alike = replace(service.draft.acceptance, value=acceptance, low=acceptance, high=acceptance)
    draft = replace(service.draft, acceptance=alike, lengths=None)
    return _in_rounds(replace(service, draft=draft), load, _rounds(service.table, load, draft, None))


def _in_rounds(service: Service, load: Load, rounds: Schedule) -> Service:
    return replace(
        service,
        rounds=rounds,
        schedule=np.concatenate([rounds.length[:1], rounds.length]),
        **_prefills(service.table, load, rounds, service.deployment.limits.rules.mixed_prefill),
        overshoot=_overshoot(rounds, service.draft),
    )

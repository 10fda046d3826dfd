"""What speculation brings at one operating point, and where the time of a step goes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.acceptance import Acceptance, BetaMixture
from theory.errors import require
from theory.latency import Pass, Profile, StepTime, step_time, step_time_interval, verify_knee
from theory.specs import Deployment, Transformer
from theory.speculation import LengthLaw, speedup, tokens_per_round

Array = NDArray[np.float64]
KNEE_EXTRA = 0.2  # a verify pass is past the knee when it costs this much more than a decode step [-]
KNEE_LENGTH = 4  # draft length of the knee where no draft pays [tokens]
BATCHES = np.unique(np.geomspace(1, 4096, 200).astype(int))  # searched for the crossover [sequences]


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A draft beside a deployed target."""

    model: Transformer
    acceptance: Acceptance
    tp: int = 1  # GPUs of the target's group that run the draft
    max_length: int = 8  # longest draft considered [tokens]
    lengths: LengthLaw | None = None  # by position or mixed over requests, if known; `acceptance` then sums it up

    @property
    def law(self) -> float | LengthLaw:
        """How many drafted tokens are accepted: alpha_iid, or the law by position, or mixed over requests [-]."""
        return self.acceptance.value if self.lengths is None else self.lengths

    @property
    def law_in_batch(self) -> float | LengthLaw:
        """The same for a round met in a batch: of a mixture, with poor requests met more often [-]."""
        return self.lengths.in_batch if isinstance(self.lengths, BetaMixture) else self.law


def draft_step(deployment: Deployment, profile: Profile, draft: DraftModel, batch: Array, context: Array) -> StepTime:
    """Return the time of one decode step of the draft on ``draft.tp`` GPUs of the deployment, by parts [s].

    Host time is paid once a round, with the target's pass: drafts run inside the step.
    """
    kernels = replace(profile, efficiency=replace(profile.efficiency, host_step=0.0, host_sequence=0.0))
    return step_time(draft.model, deployment.accelerator, kernels, Pass(batch, 1.0, context), draft.tp)


def draft_seconds(deployment: Deployment, profile: Profile, draft: DraftModel, batch: float, context: float) -> float:
    """Return the time of one decode step of the draft at one point [s]."""
    return float(draft_step(deployment, profile, draft, np.asarray(float(batch)), np.asarray(float(context))).total)


def draft_degrees(draft: Transformer, tp: int) -> list[int]:
    """Return the tensor-parallel degrees a draft may run at beside a target on ``tp`` GPUs: one GPU, or all of them."""
    fits = draft.heads % tp == 0 and draft.ffn % tp == 0 and (draft.kv_heads % tp == 0 or tp % draft.kv_heads == 0)
    return [1, tp] if tp > 1 and fits else [1]


def verify_step(deployment: Deployment, profile: Profile, length: Array, batch: Array, context: Array) -> StepTime:
    """Return the time of the target's pass over gamma + 1 tokens of each sequence, by parts [s]."""
    d = deployment
    work = Pass(batch, np.asarray(length, dtype=float) + 1, context)
    return step_time(d.model, d.accelerator, profile, work, d.tp, d.precision, d.kv_precision)


def round_time(
    deployment: Deployment, profile: Profile, draft: DraftModel | None, length: Array, batch: Array, context: Array
) -> Array:
    r"""Return the time of a round, :math:`T_{round} = \gamma\, T_D(n, S) + T_V(n, S, \gamma + 1)` [s].

    All array arguments broadcast; ``length`` 0 is plain decoding. Without a draft every length must be 0.

    Raises
    ------
    InputError
        If a length above 0 comes without a draft.
    """
    verify = verify_step(deployment, profile, length, batch, context).total
    if draft is None:
        require(bool(np.all(np.asarray(length) == 0)), "length", "must be 0 without a draft [tokens]", length)
        return verify
    return np.asarray(verify + length * draft_step(deployment, profile, draft, batch, context).total)


def predict(
    deployment: Deployment, profile: Profile, draft: DraftModel | None, batch: int, context: float, level: float = 0.9
) -> dict[str, Any]:
    """Return the figures of ``tierwise predict`` at one batch and context: see the README for the keys and units.

    Raises
    ------
    InputError
        If the batch is below 1, or the context longer than the model's.
    """
    require(batch >= 1, "batch", "must be at least 1 [sequences]", batch)
    require(
        0 <= context <= deployment.model.max_context,
        "context",
        f"must lie in [0, {deployment.model.max_context}], the context of {deployment.model.name} [tokens]",
        context,
    )
    n, s = np.asarray(float(batch)), np.asarray(float(context))
    target = verify_step(deployment, profile, np.asarray(0.0), n, s)
    rows = [_row(deployment, profile, draft, g, n, s, level) for g in range(draft.max_length + 1 if draft else 1)]
    best = max(rows, key=lambda row: row["speedup"])
    gamma = np.asarray(float(best["draft_length"]))
    return {
        "target": deployment.model.name,
        "draft": draft.model.name if draft else None,
        "accelerator": deployment.accelerator.name,
        "tp": deployment.tp,
        "batch": batch,
        "context_tokens": context,
        "acceptance": _acceptance(draft),
        "draft_length": best["draft_length"],
        "speedup": best["speedup"],
        "speedup_interval": best["speedup_interval"],
        "tokens_per_round": best["tokens_per_round"],
        "step_time_s": {
            "target": float(target.total),
            "target_interval": _interval(deployment, profile, np.asarray(0.0), n, s, level),
            "verify": float(verify_step(deployment, profile, gamma, n, s).total),
            "draft": float(draft_step(deployment, profile, draft, n, s).total) if draft else None,
            "parts": {name: float(part) for name, part in target.parts().items()},
        },
        "by_draft_length": rows,
        "crossover_batch": crossover_batch(deployment, profile, draft, context) if draft else None,
        "verify_knee": _knee(deployment, profile, context, best["draft_length"]),
        "interval_level": level,
        "provenance": {
            "step_time": profile.provenance,
            "profile": profile.name,
            "acceptance": draft.acceptance.provenance if draft else None,
        },
    }


def _knee(deployment: Deployment, profile: Profile, context: float, length: int) -> dict[str, Any]:
    """Return batch x (gamma + 1) from which a verify pass costs KNEE_EXTRA more than a decode step; None: not found."""
    d, gamma = deployment, length or KNEE_LENGTH
    tokens = verify_knee(
        d.model, d.accelerator, profile, context, d.tp, d.precision, d.kv_precision, gamma + 1.0, KNEE_EXTRA
    )
    return {
        "tokens": tokens if np.isfinite(tokens) else None,
        "draft_length": gamma,
        "extra": KNEE_EXTRA,
    }


def crossover_batch(deployment: Deployment, profile: Profile, draft: DraftModel, context: float) -> int | None:
    """Return the least batch at which no draft length gains, or None if speculation still gains at 4096 [sequences]."""
    lengths = np.arange(1.0, draft.max_length + 1)[:, None]
    batch, s = BATCHES.astype(float)[None, :], np.asarray(float(context))
    gain = speedup(
        draft.acceptance.value,
        lengths,
        target=verify_step(deployment, profile, np.asarray(0.0), batch, s).total,
        verify=verify_step(deployment, profile, lengths, batch, s).total,
        draft=draft_step(deployment, profile, draft, batch, s).total,
    ).max(axis=0)
    loses = np.flatnonzero(gain <= 1.0)
    return int(BATCHES[loses[0]]) if len(loses) else None


def _row(
    deployment: Deployment, profile: Profile, draft: DraftModel | None, length: int, n: Array, s: Array, level: float
) -> dict[str, Any]:
    if draft is None or length == 0:
        return {"draft_length": 0, "speedup": 1.0, "speedup_interval": [1.0, 1.0], "tokens_per_round": 1.0}
    gamma, a = np.asarray(float(length)), draft.acceptance
    times = {
        "target": verify_step(deployment, profile, np.asarray(0.0), n, s).total,
        "verify": verify_step(deployment, profile, gamma, n, s).total,
        "draft": draft_step(deployment, profile, draft, n, s).total,
    }
    spread = time_spread(deployment, profile, draft, gamma, n, s, level)
    low, mid, high = (float(speedup(x, length, **times)) for x in (a.low, a.value, a.high))
    return {
        "draft_length": length,
        "speedup": mid,
        "speedup_interval": [
            mid * float(np.exp(-np.hypot(np.log(mid / low), spread))),
            mid * float(np.exp(np.hypot(np.log(high / mid), spread))),
        ],
        "tokens_per_round": float(tokens_per_round(a.value, length)),
    }


def time_spread(
    deployment: Deployment, profile: Profile, draft: DraftModel, gamma: Array, n: Array, s: Array, level: float
) -> float:
    """Half width of ln(speed-up) from step times, taken as independent: errors they share cancel [-]."""
    d = deployment
    target, verify = (_half_width(_interval(d, profile, g, n, s, level)) for g in (np.asarray(0.0), gamma))
    work = Pass(n, 1.0, s)
    ends = step_time_interval(draft.model, d.accelerator, profile, work, draft.tp, level=level)
    drafting = gamma * draft_step(d, profile, draft, n, s).total
    share = float(drafting / (drafting + verify_step(d, profile, gamma, n, s).total))
    own = _half_width([float(e) for e in ends])
    return float(np.sqrt(target**2 + ((1 - share) * verify) ** 2 + (share * own) ** 2))


def _half_width(ends: list[float]) -> float:
    return float(np.log(ends[1] / ends[0]) / 2)


def _interval(d: Deployment, profile: Profile, gamma: Array, n: Array, s: Array, level: float) -> list[float]:
    low, high = step_time_interval(
        d.model, d.accelerator, profile, Pass(n, gamma + 1, s), d.tp, d.precision, d.kv_precision, level=level
    )
    return [float(low), float(high)]


def _acceptance(draft: DraftModel | None) -> dict[str, Any] | None:
    if draft is None:
        return None
    a = draft.acceptance
    return {"value": a.value, "interval": [a.low, a.high], "provenance": a.provenance, "source": a.source}

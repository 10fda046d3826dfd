"""Which draft to pre-train: its size, its draft length and what it brings, before target or draft exist."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory import catalog
from theory.acceptance import SDSL, QualityLaw, acceptance_band
from theory.acceptance import tag as acceptance_tag
from theory.errors import InfeasibleError, require
from theory.latency import Pass, Profile, step_time, step_time_interval
from theory.memory import largest_batch, why_not
from theory.scaling import HOFFMANN, REACH, LossLaw, loss
from theory.scaling import tag as loss_tag
from theory.shapes import SMOOTH_WIDTHS, VOCAB, WIDTHS, llama_shape, usual_pair, usual_sizes
from theory.specs import Accelerator, Deployment, Precision, Transformer, check_tp
from theory.speculation import (
    best_length,
    best_schedule,
    paying_ranges,
    real_best_length,
    schedule_gain,
    speedup,
    tokens_per_round,
)
from theory.work import parameters

from .predict import draft_degrees

Array = NDArray[np.float64]
CURVE_POINTS = 61  # sizes of the printed curve
SEARCH_POINTS = 481  # sizes searched at hardware cost: 1.3 % apart over a range of 500
ZOOMS = 4  # rounds of refinement of the best size at FLOP cost; each narrows the range 30 times
FLAT = 0.99  # share of the best speed-up that still counts as best [-]
TINY = 1e-9  # keeps a clipped acceptance inside (0, 1) [-]
TOKEN_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # draft training sets compared with the one asked about [-]
BATCHES = np.unique(np.geomspace(1, 4096, 60).round())  # searched for where speculation pays [sequences]
CONTEXTS = np.concatenate([[0.0], np.geomspace(256, 131072, 28)])  # the same for the context [tokens]


@dataclass(frozen=True, slots=True)
class Training:
    """The models in question: how many parameters and training tokens.

    Raises
    ------
    InputError
        If a count is not finite and positive.
    """

    target_params: float  # M [-]
    target_tokens: float  # D' [tokens]
    draft_tokens: float  # D [tokens]

    def __post_init__(self) -> None:
        for name, unit in (("target_params", "-"), ("target_tokens", "tokens"), ("draft_tokens", "tokens")):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value > 0,
                name,
                f"must be finite and above 0 [{unit}]",
                value,
                "Write 70e9 for 70 billion.",
            )


@dataclass(frozen=True, slots=True)
class Laws:
    """How size and tokens become loss and acceptance, and whether the laws may be used outside their ranges."""

    loss: LossLaw = HOFFMANN
    acceptance: QualityLaw = SDSL
    extrapolate: bool = False
    level: float = 0.9  # coverage of intervals [-]


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the pair runs on. Without a model given, the target has a Llama-style shape of its size.

    Raises
    ------
    InputError
        If a batch is below 1, the context or the overhead negative, or the longest draft below 1.
    """

    accelerator: Accelerator
    profile: Profile
    tp: int = 1  # tensor-parallel degree of the target [GPUs]
    batches: tuple[int, ...] = (1,)  # the first is the one the plan is for [sequences]
    context: float = 1024.0  # tokens cached of each sequence [tokens]
    precision: Precision = "bf16"  # of weights and GEMMs
    target: Transformer | None = None
    vocab: int = VOCAB  # of a target without a shape, and of every draft [-]
    overhead: float = 0.0  # of a round besides draft and verify: sampling, accept and reject [s]
    max_length: int = 24  # longest draft considered [tokens]

    def __post_init__(self) -> None:
        ok = len(self.batches) > 0 and min(self.batches, default=0) >= 1
        require(ok, "batch", "must be at least 1 [sequences]", self.batches)
        require(self.context >= 0, "context", "must be at least 0 [tokens]", self.context)
        require(self.overhead >= 0, "overhead", "must be at least 0 [s]", self.overhead)
        require(self.max_length >= 1, "max_length", "must be at least 1 [tokens]", self.max_length)


def draft_plan(training: Training, hardware: Hardware | None = None, laws: Laws | None = None) -> dict[str, Any]:
    r"""Return the best draft size and length for a target, what they bring, and the curve over sizes.

    .. math:: N^* = \arg\max_N \max_\gamma S\big(\alpha(N), \gamma\big), \quad
              \alpha(N) = g^{-1}\big(A\,x(N, D) + B\,x(M, D') + C\big)

    Without ``hardware`` a token costs 2N or 2M FLOPs and verification one target step (the world of SDSL); with it,
    draft, verify and plain steps take what the latency model says at batch and context.

    Returns
    -------
    dict
        ``draft_params``, ``draft_length``, ``acceptance``, ``acceptance_interval``, ``speedup``, ``speedup_interval``,
        ``curve``, ``loss_law``, ``acceptance_law``, ``nearest_models``, ``by_draft_tokens``, ``provenance``, ``notes``;
        with hardware also ``by_batch``, ``schedule``, ``paying_batches``, ``paying_contexts``, ``largest_batch``.
        Times in seconds, lengths in tokens, everything else [-].

    Raises
    ------
    InputError
        If a law would have to be used outside its range without being asked to.
    InfeasibleError
        If the target does not fit on the accelerators.

    Examples
    --------
    >>> plan = draft_plan(Training(70e9, 1e11, 1e11))
    >>> round(plan["draft_params"] / 1e6), plan["draft_length"]
    (312, 10)
    """
    chosen = laws or Laws()
    tags = _tags(training, chosen)
    if hardware is None:
        return _flop_plan(training, chosen, tags)
    costs = Costs(training.target_params, hardware, search_range(training, chosen))
    return hardware_plan(training, costs, chosen)


def search_range(training: Training, laws: Laws) -> tuple[float, float]:
    """Return the smallest and largest draft considered: inside both laws' ranges, below the target [parameters].

    When asked to extrapolate, the loss law's range is stretched by its REACH and the acceptance law's is ignored.

    Raises
    ------
    InputError
        If no size is left.
    """
    low, high = laws.loss.parameter_range
    if laws.extrapolate:
        low, high = low / REACH, high * REACH
    elif laws.acceptance.draft_sizes is not None:
        low, high = max(low, laws.acceptance.draft_sizes[0]), min(high, laws.acceptance.draft_sizes[1])
    high = min(high, training.target_params)
    require(
        low < high,
        "target_params",
        f"must leave drafts inside the laws' ranges, from {low:.3g} up [parameters]",
        training.target_params,
        "Ask for extrapolation, or give laws for such models.",
    )
    return low, high


def _tags(training: Training, laws: Laws) -> dict[str, str]:
    """Return how each law is used, refusing what lies outside its range unless asked."""
    low, high = search_range(training, laws)
    middle = math.sqrt(low * high)
    target = loss_tag(laws.loss, training.target_params, training.target_tokens, laws.extrapolate)
    draft = loss_tag(laws.loss, middle, training.draft_tokens, laws.extrapolate)
    acceptance = acceptance_tag(laws.acceptance, middle, training.target_params, laws.extrapolate)
    return {"target_loss": target, "draft_loss": draft, "acceptance": acceptance}


def _band(training: Training, laws: Laws, sizes: ArrayLike) -> Array:
    """Return low, mean and high acceptance of drafts of these sizes, kept inside (0, 1), shape (3, sizes) [-]."""
    own = loss(laws.loss, sizes, training.draft_tokens)
    aim = loss(laws.loss, training.target_params, training.target_tokens)
    return np.clip(np.stack(acceptance_band(laws.acceptance, own, aim, laws.level)), TINY, 1 - TINY)


# --- FLOP cost -------------------------------------------------------------------------------------------------------


def best_sizes(
    target_params: ArrayLike,
    target_tokens: ArrayLike,
    draft_tokens: ArrayLike,
    laws: Laws,
    sizes: tuple[float, float] | None = None,
) -> Array:
    r"""Return the draft sizes that maximise the speed-up at FLOP cost, for many targets at once [parameters].

    .. math:: N^* = \arg\max_N \max_{\gamma \in R} \frac{1 - \alpha^{\gamma+1}}{(1 - \alpha)(\gamma N / M + 1)}

    No range is checked here but that of ``sizes``; :func:`draft_plan` does.

    Parameters
    ----------
    target_params, target_tokens, draft_tokens : array_like
        M [-], D' and D [tokens]; broadcast against each other.
    sizes : (float, float), optional
        Smallest and largest draft; by default from 1 M parameters to the target.

    Source
    ------
    Reconstruction of SDSL (2026), arXiv:2603.11053, from its summaries: it reproduces their published optima.

    Examples
    --------
    >>> best_sizes([13e9, 70e9], 1e11, 1e11, Laws()).round(-6).tolist()
    [117000000.0, 312000000.0]
    """
    m, big, small = np.broadcast_arrays(
        *(np.asarray(v, dtype=float) for v in (target_params, target_tokens, draft_tokens))
    )
    aim = loss(laws.loss, m, big)[..., None]
    low, high = (np.full(m.shape, math.log(v)) for v in (sizes or (1e6, 1e6)))
    high = np.log(m) - TINY if sizes is None else np.minimum(high, np.log(m) - TINY)
    for _ in range(ZOOMS):
        grid = np.linspace(low, high, 61, axis=-1)
        n = np.exp(grid)
        alpha = np.clip(laws.acceptance.mean(loss(laws.loss, n, small[..., None]), aim), TINY, 1 - TINY)
        best = np.argmax(real_best_length(alpha, n / m[..., None]).speedup, axis=-1)[..., None]
        low = np.take_along_axis(grid, np.maximum(best - 1, 0), -1)[..., 0]
        high = np.take_along_axis(grid, np.minimum(best + 1, 60), -1)[..., 0]
    return np.asarray(np.exp((low + high) / 2))


def _flop_plan(training: Training, laws: Laws, tags: dict[str, str]) -> dict[str, Any]:
    ends = search_range(training, laws)
    best = float(best_sizes(training.target_params, training.target_tokens, training.draft_tokens, laws, ends))
    curve = _flop_rows(training, laws, np.geomspace(*ends, CURVE_POINTS))
    fine = _flop_rows(training, laws, np.geomspace(*ends, SEARCH_POINTS))
    row = _flop_rows(training, laws, np.array([best]))[0]
    nearest = [
        _named(name, _flop_rows(training, laws, np.array([size]))[0]) for name, size in nearest_models(best, ends)
    ]
    return {
        **_common(training, laws, row, curve, tags),
        "cost": "flops",
        "draft_params_within_1_percent": _flat(fine, row["speedup"]),
        "at_edge": _at_edge(best, ends),
        "nearest_models": nearest,
        "by_draft_tokens": [
            _flop_tokens(replace(training, draft_tokens=t), laws, ends) for t in _token_sets(training, laws)
        ],
        "notes": _notes(_at_edge(best, ends), ends, tags),
    }


def _flop_rows(training: Training, laws: Laws, sizes: Array) -> list[dict[str, Any]]:
    """Return the curve at these sizes: the best whole draft length and the speed-up with its interval."""
    band = _band(training, laws, sizes)
    cost = sizes / training.target_params
    length = best_length(band[1], cost).length
    return _rows(sizes, band, length, tokens_per_round(band, length) / (length * cost + 1), cost)


def _rows(sizes: Array, band: Array, length: Array, gains: Array, cost: Array) -> list[dict[str, Any]]:
    """Return one dict a size; ``band`` and ``gains`` have shape (3, sizes): low, middle, high."""
    tokens = tokens_per_round(band[1], length)
    return [
        {
            "draft_params": float(sizes[i]),
            "acceptance": float(band[1, i]),
            "acceptance_interval": [float(band[0, i]), float(band[2, i])],
            "draft_length": int(length[i]),
            "speedup": float(gains[1, i]),
            "speedup_interval": [float(gains[0, i]), float(gains[2, i])],
            "tokens_per_round": float(tokens[i]),
            "cost_ratio": float(cost[i]),
        }
        for i in range(len(sizes))
    ]


def _flop_tokens(training: Training, laws: Laws, ends: tuple[float, float]) -> dict[str, Any]:
    best = float(best_sizes(training.target_params, training.target_tokens, training.draft_tokens, laws, ends))
    return _tokens_row(training, _flop_rows(training, laws, np.array([best]))[0])


# --- what both costs share -------------------------------------------------------------------------------------------


def _common(
    training: Training, laws: Laws, row: dict[str, Any], curve: list[dict[str, Any]], tags: dict[str, str]
) -> dict[str, Any]:
    """Return the keys that both costs have; ``row`` is the best size, ``curve`` the sizes around it."""
    law = laws.acceptance
    return {
        **row,
        "curve": curve,
        "loss_law": laws.loss.name,
        "acceptance_law": law.name,
        "interval_level": laws.level,
        "target_params": training.target_params,
        "target_tokens": training.target_tokens,
        "draft_tokens": training.draft_tokens,
        "provenance": {
            "loss_law": {"source": laws.loss.source, "target": tags["target_loss"], "draft": tags["draft_loss"]},
            "acceptance_law": {
                "source": law.source,
                "form": law.form,
                "use": tags["acceptance"],
                "r_squared": law.r_squared,
                "residual": law.residual,
            },
        },
    }


def _flat(rows: list[dict[str, Any]], best: float) -> list[float]:
    """Return the smallest and largest size whose speed-up is within 1 % of the best [parameters]."""
    sizes = [row["draft_params"] for row in rows if row["speedup"] >= FLAT * best]
    return [min(sizes), max(sizes)] if sizes else []


def _at_edge(best: float, ends: tuple[float, float]) -> bool:
    """Return whether the best size is where the search had to stop: the true best may lie outside."""
    step = (ends[1] / ends[0]) ** (1 / (SEARCH_POINTS - 1))
    return not ends[0] * step < best < ends[1] / step


def _notes(at_edge: bool, ends: tuple[float, float], tags: dict[str, str]) -> list[str]:
    """Return what a reader must know before using the answer."""
    notes = [f"{name.replace('_', ' ')}: extrapolated" for name, tag in tags.items() if tag == "extrapolated"]
    if at_edge:
        notes.append(
            f"the best size is at the edge of the range searched, {ends[0]:.3g} to {ends[1]:.3g} parameters: "
            "the true best may lie outside, where a law was not fitted; ask for extrapolation to look there"
        )
    return notes


def nearest_models(size: float, ends: tuple[float, float], count: int = 3) -> list[tuple[str, float]]:
    """Return (name, parameters [-]) of the catalog's models nearest in size inside ``ends``, nearest first.

    Examples
    --------
    >>> nearest_models(130e6, (1e8, 4e9))[0][0]
    'opt-125m'
    """
    known = [(name, float(parameters(catalog.model(name)))) for name in catalog.models()]
    inside = [pair for pair in known if ends[0] <= pair[1] <= ends[1]]
    return sorted(inside, key=lambda pair: abs(math.log(pair[1] / size)))[:count]


def _named(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the curve for a model that exists, as if it had been trained on the tokens asked about."""
    return {"model": name, "vocab": catalog.model(name).vocab, **row}


def _token_sets(training: Training, laws: Laws) -> list[float]:
    low, high = laws.loss.token_range
    sets = [factor * training.draft_tokens for factor in TOKEN_FACTORS]
    return [t for t in sets if laws.extrapolate or t == training.draft_tokens or low <= t <= high]


def _tokens_row(training: Training, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "draft_tokens": training.draft_tokens,
        "draft_params": row["draft_params"],
        "draft_length": row["draft_length"],
        "acceptance": row["acceptance"],
        "speedup": row["speedup"],
        "training_flops": 6 * row["draft_params"] * training.draft_tokens,  # Kaplan et al. (2020), section 2.1
    }


# --- hardware cost ---------------------------------------------------------------------------------------------------


class Costs:
    """Step times of target and drafts at some batches: computed once, read for any training and any laws."""

    def __init__(self, target_params: float, hardware: Hardware, sizes: tuple[float, float]) -> None:
        """Compute the times for a target and for drafts from ``sizes[0]`` to ``sizes[1]`` parameters."""
        h = hardware
        self.hardware, self.sizes = h, sizes
        self.target = h.target or llama_shape(target_params, h.vocab)
        check_tp(self.target, h.tp)
        self.deployment = Deployment(self.target, h.accelerator, h.tp, h.precision)
        slots = max(h.context, 1.0)
        if largest_batch(self.deployment, slots) < 1:
            raise InfeasibleError(why_not(self.deployment, slots))
        self.batches = np.array(h.batches, dtype=float)
        self.lengths = np.arange(h.max_length + 1, dtype=float)
        self.verify = self.verify_time(self.lengths[:, None], self.batches, h.context)  # (lengths, batches)
        self.plain = self.verify[0]

    def verify_time(self, length: ArrayLike, batch: ArrayLike, context: ArrayLike) -> Array:
        """Return the time of the target's pass over gamma + 1 tokens a sequence [s]."""
        d = self.deployment
        work = Pass(batch, np.asarray(length, dtype=float) + 1, context)
        return step_time(d.model, d.accelerator, self.hardware.profile, work, d.tp, d.precision).total

    def draft_time(self, draft: Transformer, batch: ArrayLike, context: ArrayLike) -> Array:
        """Return the time of a draft step on one GPU or on all of the target's, whichever is faster [s]."""
        h = self.hardware
        shape = np.broadcast_shapes(np.shape(batch), np.shape(context))
        degrees = np.array(draft_degrees(draft, h.tp)).reshape(-1, *(1,) * len(shape))
        work = Pass(batch, 1.0, context)
        return np.asarray(step_time(draft, h.accelerator, h.profile, work, degrees, h.precision).total.min(axis=0))

    def draft_degree(self, draft: Transformer, batch: float) -> int:
        """Return the tensor-parallel degree at which the draft is fastest [GPUs]."""
        h = self.hardware
        degrees = np.array(draft_degrees(draft, h.tp))
        total = step_time(draft, h.accelerator, h.profile, Pass(batch, 1.0, h.context), degrees, h.precision).total
        return int(degrees[np.argmin(total)])

    @cached_property
    def _grid(self) -> tuple[Array, Array]:
        """Logarithms of the sizes of usual models, shape (widths,), and of their step times, (widths, batches)."""
        known = dict(zip(WIDTHS, usual_sizes(self.hardware.vocab), strict=True))
        sizes = np.array([known[width] for width in SMOOTH_WIDTHS])
        last = len(sizes) - 1
        first = min(last, max(0, int(np.searchsorted(sizes, self.sizes[0])) - 1))
        stop = min(last, int(np.searchsorted(sizes, self.sizes[1])))
        rows = [self._usual_time(SMOOTH_WIDTHS[i], sizes[i]) for i in range(first, stop + 1)]
        return np.log(sizes[first : stop + 1]), np.log(np.array(rows))

    def _usual_time(self, width: int, size: float) -> Array:
        """Return the step time of the usual model of a width, its layers not rounded: linear between whole ones."""
        pair = usual_pair(width, self.hardware.vocab)
        below, above = (self.draft_time(model, self.batches, self.hardware.context) for model in pair)
        low, high = (parameters(model) for model in pair)
        return np.asarray(below + (above - below) * (size - low) / (high - low))

    def draft(self, sizes: ArrayLike) -> Array:
        """Return draft step times by interpolation between usual models, shape (sizes, batches) [s]."""
        x, y = self._grid
        at = np.log(np.asarray(sizes, dtype=float))
        return np.asarray(np.exp(np.stack([np.interp(at, x, column) for column in y.T], axis=-1)))

    def gains(self, sizes: Array, alpha: Array) -> Array:
        """Return the speed-up for every draft length, size and batch, shape (lengths, sizes, batches) [-]."""
        length = self.lengths[:, None, None]
        return speedup(
            alpha[:, None],
            length,
            target=self.plain,
            verify=self.verify[:, None, :],
            draft=self.draft(sizes),
            overhead=np.where(length > 0, self.hardware.overhead, 0.0),
        )


def hardware_plan(training: Training, costs: Costs, laws: Laws | None = None) -> dict[str, Any]:
    """Return :func:`draft_plan` at hardware cost from step times computed before; several batches give ``by_batch``."""
    chosen = laws or Laws()
    tags = _tags(training, chosen)
    ends = search_range(training, chosen)
    plans = [_batch_plan(training, costs, chosen, ends, i) for i in range(len(costs.batches))]
    curve = hardware_rows(training, costs, chosen, np.geomspace(*ends, CURVE_POINTS), 0)
    first = plans[0]
    shape = llama_shape(first["draft_params"], costs.hardware.vocab)
    h = costs.hardware
    result = {
        **_common(training, chosen, first, curve, tags),
        "cost": "hardware",
        "accelerator": h.accelerator.name,
        "tp": h.tp,
        "batch": h.batches[0],
        "context_tokens": h.context,
        "by_batch": plans,
        "draft_shape": _dimensions(shape),
        "target_shape": _dimensions(costs.target),
        "nearest_models": [
            _model_row(training, costs, chosen, name) for name, _ in nearest_models(first["draft_params"], ends)
        ],
        "by_draft_tokens": [
            _tokens_row(t, _best_row(t, costs, chosen, ends, 0))
            for t in (replace(training, draft_tokens=tokens) for tokens in _token_sets(training, chosen))
        ],
        **load_plan(costs, shape, first["acceptance"], first["draft_length"]),
    }
    result["notes"] = _notes(first["at_edge"], ends, tags)
    if h.batches[0] > result["largest_batch"]["with_draft"]:
        result["notes"].append(
            f"the KV cache of batch {h.batches[0]} does not fit beside this draft: at most "
            f"{result['largest_batch']['with_draft']} sequences of {h.context:.0f} tokens do"
        )
    result["provenance"]["step_time"] = {"profile": h.profile.name, "provenance": h.profile.provenance}
    result["provenance"]["target_shape"] = "given" if h.target else "derived from its size"
    return result


def hardware_rows(training: Training, costs: Costs, laws: Laws, sizes: Array, batch: int) -> list[dict[str, Any]]:
    """Return the curve at these sizes for the batch of that index; the interval is that of the acceptance."""
    band = _band(training, laws, sizes)
    table = np.stack([costs.gains(sizes, a)[:, :, batch] for a in band])  # (3, lengths, sizes)
    best = np.argmax(table[1], axis=0)
    gains = np.take_along_axis(table, best[None, None], axis=1)[:, 0]
    return _rows(sizes, band, costs.lengths[best], gains, costs.draft(sizes)[:, batch] / costs.plain[batch])


def _best_row(training: Training, costs: Costs, laws: Laws, ends: tuple[float, float], batch: int) -> dict[str, Any]:
    """Return the row of the best size and the sizes within 1 % of it."""
    sizes = np.geomspace(*ends, SEARCH_POINTS)
    gains = costs.gains(sizes, _band(training, laws, sizes)[1])[:, :, batch].max(axis=0)
    best = int(np.argmax(gains))
    flat = sizes[gains >= FLAT * gains[best]]
    row = hardware_rows(training, costs, laws, sizes[[best]], batch)[0]
    return {
        **row,
        "draft_params_within_1_percent": [float(flat[0]), float(flat[-1])],
        "at_edge": _at_edge(row["draft_params"], ends),
    }


def _batch_plan(training: Training, costs: Costs, laws: Laws, ends: tuple[float, float], batch: int) -> dict[str, Any]:
    """Return the best row at one batch with times and an interval that holds those of the step times too."""
    row = _best_row(training, costs, laws, ends, batch)
    spread = _time_spread(costs, row, batch, laws.level) if row["draft_length"] > 0 else 0.0
    mid, (low, high) = row["speedup"], row["speedup_interval"]
    return {
        **row,
        "speedup_interval": [
            mid * math.exp(-math.hypot(math.log(mid / low), spread)),
            mid * math.exp(math.hypot(math.log(high / mid), spread)),
        ],
        "batch": int(costs.batches[batch]),
        "step_time_s": {
            "target": float(costs.plain[batch]),
            "verify": float(costs.verify[row["draft_length"], batch]),
            "draft": float(costs.draft(row["draft_params"])[batch]),
        },
    }


def _time_spread(costs: Costs, row: dict[str, Any], batch: int, level: float) -> float:
    """Half width of ln(speed-up) from step times, taken as independent: errors they share cancel in the ratio."""
    h, d = costs.hardware, costs.deployment
    n, gamma = costs.batches[batch], float(row["draft_length"])
    plain, verify = (
        _half(
            step_time_interval(d.model, h.accelerator, h.profile, Pass(n, q, h.context), d.tp, d.precision, level=level)
        )
        for q in (1.0, gamma + 1)
    )
    draft = llama_shape(row["draft_params"], h.vocab)
    own = _half(
        step_time_interval(
            draft,
            h.accelerator,
            h.profile,
            Pass(n, 1.0, h.context),
            costs.draft_degree(draft, n),
            h.precision,
            level=level,
        )
    )
    drafting = gamma * float(costs.draft(row["draft_params"])[batch])
    share = drafting / (drafting + float(costs.verify[row["draft_length"], batch]))
    return math.sqrt(plain**2 + ((1 - share) * verify) ** 2 + (share * own) ** 2)


def _half(ends: tuple[Array, Array]) -> float:
    return float(np.log(ends[1] / ends[0])) / 2


def _model_row(training: Training, costs: Costs, laws: Laws, name: str) -> dict[str, Any]:
    """Return the row of a catalog model in its own shape, as if it had been trained on the tokens asked about."""
    model = catalog.model(name)
    size = np.array([float(parameters(model))])
    band = _band(training, laws, size)  # (3, 1)
    draft = float(costs.draft_time(model, costs.batches[0], costs.hardware.context))
    times = costs.verify[:, 0] + costs.lengths * draft + np.where(costs.lengths > 0, costs.hardware.overhead, 0.0)
    gains = tokens_per_round(band, costs.lengths) * costs.plain[0] / times  # (3, lengths)
    best = int(np.argmax(gains[1]))
    cost = np.array([draft / costs.plain[0]])
    return _named(name, _rows(size, band, costs.lengths[[best]], gains[:, [best]], cost)[0])


def load_plan(costs: Costs, draft: Transformer, alpha: float, length: int) -> dict[str, Any]:
    """Return what load does to one draft: where speculation pays, the schedule, what memory leaves."""
    h, d = costs.hardware, costs.deployment
    degree = costs.draft_degree(draft, float(h.batches[0]))
    slots = max(h.context, 1.0)
    plain = largest_batch(d, slots)
    both = largest_batch(d, slots, draft, degree, lookahead=length)
    return {
        "paying_batches": paying_ranges(BATCHES, _best_gain(costs, draft, alpha, BATCHES, h.context)),
        "paying_contexts": paying_ranges(CONTEXTS, _best_gain(costs, draft, alpha, float(h.batches[0]), CONTEXTS)),
        "largest_batch": {"plain": plain, "with_draft": both, "draft_tp": degree},
        "schedule": _schedule(costs, draft, alpha, both) if both else None,
    }


def _times(costs: Costs, draft: Transformer, batch: ArrayLike, context: ArrayLike) -> Array:
    """Return round times for every draft length (row 0 is plain decoding) [s]."""
    gamma = costs.lengths[:, None]
    rounds = costs.verify_time(gamma, batch, context) + gamma * costs.draft_time(draft, batch, context)
    return np.asarray(rounds + np.where(gamma > 0, costs.hardware.overhead, 0.0))


def _best_gain(costs: Costs, draft: Transformer, alpha: float, batch: ArrayLike, context: ArrayLike) -> Array:
    times = _times(costs, draft, batch, context)
    rates = tokens_per_round(alpha, costs.lengths)[:, None] / times
    return np.asarray(rates[1:].max(axis=0) / rates[0])


def _schedule(costs: Costs, draft: Transformer, alpha: float, largest: int) -> dict[str, Any]:
    """Return batch -> draft length, as (first batch, last batch, length), and the gain over one fixed length."""
    batches = np.arange(1, largest + 1, dtype=float)
    times = _times(costs, draft, batches, costs.hardware.context)
    gain = schedule_gain(alpha, times, np.ones(largest))
    return {
        "num_speculative_tokens_per_batch_size": best_schedule(alpha, times).ranges(),
        "fixed_length": gain.fixed_length,
        "gain_over_fixed": gain.gain,
        "gain_over_plain": gain.over_plain,
        "occupancy": f"uniform over batches 1 to {largest} (assumed)",
    }


def _dimensions(model: Transformer) -> dict[str, Any]:
    names = ("name", "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "tied")
    return {**{name: getattr(model, name) for name in names}, "parameters": parameters(model)}

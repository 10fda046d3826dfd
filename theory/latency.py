"""How long one forward pass of a batch takes, and where the time goes: matrix products, attention, element-wise work,
communication, engine overhead.

The law is one; what differs between accelerators and engines is a :class:`Profile` of efficiencies. Every quantity is
vectorised: the fields of a :class:`Pass` and the tensor-parallel degree broadcast against each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .errors import require
from .specs import PRECISION_BYTES, Accelerator, Precision, Transformer, check_tp

Array = NDArray[np.float64]
Provenance = Literal["measured", "fitted", "transferred", "assumed"]
PROVENANCES: tuple[Provenance, ...] = ("measured", "fitted", "transferred", "assumed")
ACTIVATION_BYTES = 2  # activations are bf16 whatever the weights are [byte per number]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of a batch; every field a float or an array, all broadcastable against each other.

    Raises
    ------
    InputError
        If a field is negative or not finite, or a pass carries no token at all.
    """

    sequences: float | Array  # sequences that decode or verify in this step, may be 0 [-]
    query: float | Array = 1.0  # new tokens of each: 1 to decode, gamma + 1 to verify [tokens]
    context: float | Array = 0.0  # mean tokens already cached of each [tokens]
    prefill_tokens: float | Array = 0.0  # prompt tokens processed in the same step, over all prompts [tokens]
    prefill_context: float | Array = 0.0  # tokens of each prompt cached before this chunk [tokens]
    prefill_sequences: float | Array = 1.0  # prompts these tokens belong to [-]

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = np.asarray(getattr(self, spec.name), dtype=float)
            ok = bool(np.all(np.isfinite(value) & (value >= 0)))
            require(ok, spec.name, "must be finite and at least 0", getattr(self, spec.name))
        require(
            bool(np.all(np.asarray(self.sequences) * np.asarray(self.query) + np.asarray(self.prefill_tokens) > 0)),
            "sequences",
            "must give each pass at least one new token",
            self.sequences,
            "Set `sequences` and `query`, or `prefill_tokens`.",
        )
        require(
            bool(np.all(np.asarray(self.prefill_sequences) > 0)),
            "prefill_sequences",
            "must be above 0 [-]",
            self.prefill_sequences,
            "Leave it at 1 and set `prefill_tokens` to 0 when there is no prompt.",
        )

    @property
    def tokens(self) -> Array:
        """New tokens in the step, m [tokens]."""
        return np.asarray(self.sequences, float) * self.query + self.prefill_tokens

    @property
    def sampled(self) -> Array:
        """Rows that reach the LM head: every decoded or verified token and the last one of each prompt [-]."""
        prompts = np.where(np.asarray(self.prefill_tokens) > 0, self.prefill_sequences, 0.0)
        return np.asarray(self.sequences, float) * self.query + prompts


@dataclass(frozen=True, slots=True)
class StepTime:
    """The parts of a step time, arrays of one common shape [s]."""

    weights: Array  # matrix products: what streaming the weights alone explains
    compute: Array  # matrix products: what comes on top of that
    attention: Array  # reading the KV cache and attending to it
    elementwise: Array  # norms, rotary positions, activation, residual additions
    communication: Array  # all-reduces between tensor-parallel GPUs
    overhead: Array  # the engine: host time, launches

    @property
    def total(self) -> Array:
        """Sum of the parts [s]."""
        return self.weights + self.compute + self.attention + self.elementwise + self.communication + self.overhead

    def parts(self) -> dict[str, Array]:
        """Return the parts by name [s]."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What silicon and engine make of the datasheet; shares are of datasheet peaks [-], times in seconds."""

    gemm_start: float = 4.0e-6  # fixed time of a matrix product [s]
    gemm_bandwidth: float = 0.90  # share of memory bandwidth when streaming weights [-]
    gemm_flops: float = 0.75  # share of peak FLOP rate in full tiles [-]
    gemm_knee: float = 4.0  # exponent of the smooth maximum of memory and compute time [-]
    tile: float = 64.0  # tokens a tile holds: the granularity of compute [tokens]
    attention_start: float = 6.0e-6  # fixed time of an attention call [s]
    kv_bandwidth: float = 0.80  # share of memory bandwidth when reading the KV cache [-]
    attention_flops: float = 0.55  # share of peak FLOP rate in prefill attention [-]
    element_start: float = 2.0e-6  # fixed time of one element-wise kernel [s]
    element_bandwidth: float = 0.75  # share of memory bandwidth of element-wise kernels [-]
    element_row: float = 2.0e-10  # time one thread block takes per number of its row [s]
    reduce_start: float = 6.0e-6  # fixed time of an all-reduce of two GPUs [s]
    reduce_hop: float = 1.0e-6  # additional time per further GPU [s]
    link_bandwidth: float = 0.75  # share of link bandwidth in an all-reduce [-]
    host_step: float = 0.0  # host time of a step that kernels do not hide [s]
    host_sequence: float = 0.0  # host time per sequence of a step [s]
    eager_layer: float = 0.0  # launch floor of a layer without CUDA graphs [s]

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            require(math.isfinite(value) and value >= 0, spec.name, "must be finite and at least 0", value)


@dataclass(frozen=True, slots=True)
class Profile:
    """The efficiencies of one accelerator under one engine, with where they come from and how sure they are.

    Raises
    ------
    InputError
        If the provenance is unknown or the covariance does not match its parameters.
    """

    name: str
    accelerator: str  # name of the accelerator it was made for
    engine: str  # library or engine whose kernels it describes
    provenance: Provenance
    efficiency: Efficiency
    parameters: tuple[str, ...] = ()  # names the covariance is about, in its order
    covariance: tuple[tuple[float, ...], ...] = ()  # of the logarithms of `parameters` [-]
    residual: dict[str, float] = field(default_factory=dict)  # spread of ln(measured/predicted) by part [-]
    rows: str = ""  # what it was fitted on
    source: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        require(self.provenance in PROVENANCES, "provenance", f"must be one of {', '.join(PROVENANCES)}", self.provenance)
        n = len(self.parameters)
        shape = tuple(len(row) for row in self.covariance)
        require(shape == (n,) * n, "covariance", f"must be {n} x {n} for {n} parameters [-]", shape)


def step_time(
    model: Transformer,
    accelerator: Accelerator,
    profile: Profile,
    work: Pass,
    tp: int | NDArray[np.integer] = 1,
    precision: Precision = "bf16",
    kv_precision: Precision = "bf16",
) -> StepTime:
    """Return the time of one forward pass by parts [s]."""
    return _step_time(model, accelerator, profile.efficiency, work, _degrees(model, tp), precision, kv_precision)


def roofline_time(
    model: Transformer,
    accelerator: Accelerator,
    work: Pass,
    tp: int | NDArray[np.integer] = 1,
    precision: Precision = "bf16",
    kv_precision: Precision = "bf16",
) -> StepTime:
    """Return the datasheet lower bound of :func:`step_time` by parts [s]: every byte and FLOP at peak, nothing else."""
    return _step_time(model, accelerator, _PERFECT, work, _degrees(model, tp), precision, kv_precision)


def step_time_interval(
    model: Transformer,
    accelerator: Accelerator,
    profile: Profile,
    work: Pass,
    tp: int | NDArray[np.integer] = 1,
    precision: Precision = "bf16",
    kv_precision: Precision = "bf16",
    level: float = 0.9,
) -> tuple[Array, Array]:
    """Return the interval that holds the measured step time with probability ``level`` [s]."""
    from statistics import NormalDist

    total = step_time(model, accelerator, profile, work, tp, precision, kv_precision).total
    spread = max(profile.residual.values(), default=0.15)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    return total * math.exp(-z * spread), total * math.exp(z * spread)


_PERFECT = Efficiency(0, 1, 1, 50, 1, 0, 1, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0)


def _degrees(model: Transformer, tp: int | NDArray[np.integer]) -> NDArray[np.int64]:
    degrees = np.asarray(tp)
    require(np.issubdtype(degrees.dtype, np.integer), "tp", "must be an integer or an array of integers [GPUs]", tp)
    for degree in np.unique(degrees):
        check_tp(model, int(degree))
    return degrees.astype(np.int64)


def _smooth_max(a: Array, b: Array, exponent: float) -> Array:
    big, small = np.maximum(a, b), np.minimum(a, b)
    ratio = np.divide(small, big, out=np.zeros_like(big), where=big > 0)
    out: Array = big * (1 + ratio**exponent) ** (1 / exponent)
    return out


def _gemm(m: Array, n: Array, k: Array, a: Accelerator, e: Efficiency, precision: Precision) -> tuple[Array, Array]:
    stream = e.gemm_start + PRECISION_BYTES[precision] * n * k / (a.bandwidth * e.gemm_bandwidth)
    memory = (PRECISION_BYTES[precision] * n * k + ACTIVATION_BYTES * m * (n + k)) / (a.bandwidth * e.gemm_bandwidth)
    flops = 2 * np.ceil(m / e.tile) * e.tile * n * k / (a.flops(precision) * e.gemm_flops)
    total = e.gemm_start + _smooth_max(memory, flops, e.gemm_knee)
    busy = m > 0
    return np.where(busy, stream, 0.0), np.where(busy, total - stream, 0.0)


def _step_time(
    model: Transformer,
    a: Accelerator,
    e: Efficiency,
    work: Pass,
    tp: NDArray[np.int64],
    precision: Precision,
    kv_precision: Precision,
) -> StepTime:
    m, head_rows, t = work.tokens, work.sampled, tp.astype(float)
    d, h = model.hidden, model.head_dim
    heads, kv_heads, ffn = model.heads / t, np.maximum(1.0, model.kv_heads / t), model.ffn / t
    up = 2 * ffn if model.gated else ffn
    shapes = ((heads + 2 * kv_heads) * h, d), (d, heads * h), (up, d), (d, ffn)
    weights, compute = _gemm(head_rows, np.ceil(model.vocab / t), np.asarray(float(d)), a, e, "bf16")
    for n, k in shapes:
        w, c = _gemm(m, np.asarray(n, float), np.asarray(k, float), a, e, precision)
        weights, compute = weights + model.layers * w, compute + model.layers * c
    attention = model.layers * _attention(work, heads, kv_heads, h, a, e, kv_precision)
    row_numbers = 4 * d + 2 * (heads + kv_heads) * h + 1.5 * up + 3 * d
    elementwise = model.layers * (
        5 * e.element_start + e.element_row * (2 * d + up)
        + ACTIVATION_BYTES * m * row_numbers / (a.bandwidth * e.element_bandwidth)
    )
    reduce = 2 * (t - 1) / t * m * d * ACTIVATION_BYTES / (a.link_bandwidth * e.link_bandwidth)
    reduce = reduce + e.reduce_start + e.reduce_hop * (t - 2)
    communication = 2 * model.layers * np.where(t > 1, reduce, 0.0)
    kernels = weights + compute + attention + elementwise + communication
    sequences = np.asarray(work.sequences, float) + np.where(np.asarray(work.prefill_tokens) > 0, work.prefill_sequences, 0)
    overhead = e.host_step + e.host_sequence * sequences + np.maximum(0.0, model.layers * e.eager_layer - kernels)
    parts = np.broadcast_arrays(weights, compute, attention, elementwise, communication, overhead)
    return StepTime(*(np.asarray(p, float) for p in parts))


def _attention(work: Pass, heads: Array, kv_heads: Array, h: int, a: Accelerator, e: Efficiency, kv: Precision) -> Array:
    sequences, query, context = (np.asarray(x, float) for x in (work.sequences, work.query, work.context))
    reach = context + (query + 1) / 2
    read = 2 * kv_heads * h * PRECISION_BYTES[kv] * sequences * (context + query) / (a.bandwidth * e.kv_bandwidth)
    attend = 4 * heads * h * sequences * query * reach / (a.flops_bf16 * e.attention_flops)
    decode = np.where(sequences * query > 0, e.attention_start + np.maximum(read, attend), 0.0)
    prompts = np.asarray(work.prefill_sequences, float)
    length = np.asarray(work.prefill_tokens, float) / prompts
    flops = 4 * heads * h * prompts * length * (work.prefill_context + (length + 1) / 2)
    prefill = np.where(length > 0, e.attention_start + flops / (a.flops_bf16 * e.attention_flops), 0.0)
    out: Array = decode + prefill
    return out

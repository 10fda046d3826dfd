"""How long one forward pass of a batch takes, and where the time goes.

.. math:: T = \\sum_\\text{matrices} T_\\text{gemm}
          + L\\,(T_\\text{attention} + T_\\text{elements} + 2 T_\\text{reduce}) + T_\\text{overhead}

The law is one for all accelerators and engines; what differs is the datasheet (:class:`~theory.specs.Accelerator`) and
the efficiencies (:class:`Profile`), kept apart. Everything is vectorised: the fields of a :class:`Pass` and the
tensor-parallel degree broadcast against each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from operator import attrgetter
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import require
from .specs import PRECISION_BYTES, Accelerator, Precision, Transformer, check_tp

Array = NDArray[np.float64]
Provenance = Literal["measured", "fitted", "transferred", "assumed"]
PROVENANCES: tuple[str, ...] = ("measured", "fitted", "transferred", "assumed")

ACTIVATION_BYTES = 2  # activations are bf16 whatever the weights are [byte per number]
Curves = Mapping[int, tuple[tuple[float, float], ...]]  # GPUs -> knots (size [byte], time [s]), never falling
# rows x columns a thread block computes; CUTLASS sizes
TILES = ((16, 64), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256))
QUANTISE_BYTES = 5  # of an activation that is read for its scale, read again and written in fp8 [byte per number]
CACHED = 1024  # points up to which all tiles are tried at once: their arrays stay in the cache [-]
SPLITS = 8  # most thread blocks that share one tile along k [-]; assumed
ROWWISE = ((1, 64), (4, 64))  # what vector units can do besides: no row is padded
ATTENTION_TILE = 128  # query rows of a thread block of prefill attention [tokens]; FlashAttention-2/3
DECODE_TILE = 64  # query rows (heads of a group x new tokens) of a thread block of decode attention [rows]
DECODE_BLOCKS = 2  # thread blocks of decode attention an SM holds [-]; assumed, A100 rows tell it from 1 and 3
RESIDENT_STEEPNESS = 20.0  # how sharply a KV cache larger than the last-level cache stops hitting it [-]; assumed


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of a batch; every field a float or an array, all broadcastable against each other.

    Raises
    ------
    InputError
        If a field is negative or not finite, or a pass carries no token at all.

    Examples
    --------
    >>> float(Pass(sequences=32, query=5, context=2048).tokens)
    160.0
    """

    sequences: ArrayLike  # sequences that decode or verify in this step, may be 0 [-]
    query: ArrayLike = 1.0  # new tokens of each: 1 to decode, gamma + 1 to verify [tokens]
    context: ArrayLike = 0.0  # mean tokens already cached of each [tokens]
    prefill_tokens: ArrayLike = 0.0  # prompt tokens processed in the same step, over all prompts [tokens]
    prefill_context: ArrayLike = 0.0  # tokens of each prompt cached before this chunk [tokens]
    prefill_sequences: ArrayLike = 1.0  # prompts these tokens belong to [-]

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = np.asarray(getattr(self, spec.name), dtype=float)
            ok = bool(np.isfinite(value).all() and (value >= 0).all())
            require(ok, spec.name, "must be finite and at least 0", getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
        require(
            bool((self.tokens > 0).all()),
            "sequences",
            "must give each pass at least one new token [tokens]",
            self.sequences,
            "Set `sequences` and `query`, or `prefill_tokens`.",
        )
        require(
            bool((self._array("prefill_sequences") > 0).all()),
            "prefill_sequences",
            "must be above 0 [-]",
            self.prefill_sequences,
            "Leave it at 1 and set `prefill_tokens` to 0 when there is no prompt.",
        )

    def _array(self, name: str) -> Array:
        value: Array = getattr(self, name)
        return value

    @property
    def tokens(self) -> Array:
        """New tokens in the step, m [tokens]."""
        m: Array = self._array("sequences") * self._array("query") + self._array("prefill_tokens")
        return m

    @property
    def prompts(self) -> Array:
        """Prompts that are prefilled in the step [-]."""
        return np.where(self._array("prefill_tokens") > 0, self._array("prefill_sequences"), 0.0)

    @property
    def sampled(self) -> Array:
        """Rows that reach the LM head: every decoded or verified token and the last one of each prompt [-]."""
        rows: Array = self._array("sequences") * self._array("query") + self.prompts
        return rows


@dataclass(frozen=True, slots=True)
class StepTime:
    """The parts of a step time, arrays of one common shape [s]."""

    weights: Array  # matrix products: what streaming the weights explains [s]
    compute: Array  # matrix products: what comes on top of that [s]
    attention: Array  # reading the KV cache and attending to it [s]
    elementwise: Array  # norms, rotary positions, activation, residual addition [s]
    communication: Array  # all-reduces between tensor-parallel GPUs [s]
    overhead: Array  # the engine: host time and launches that kernels do not hide [s]

    @property
    def total(self) -> Array:
        """Sum of the parts [s]."""
        return self.weights + self.compute + self.attention + self.elementwise + self.communication + self.overhead

    def parts(self) -> dict[str, Array]:
        """Return the parts by name [s]."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What silicon and engine make of the datasheet. Shares are of datasheet peaks [-].

    Raises
    ------
    InputError
        If a value is negative or not finite, or a share exceeds 1 (nothing is faster than its datasheet).
    """

    gemm_start: float = 4.2e-6  # fixed time of a matrix product: ramp, prologue, epilogue [s]
    gemm_bandwidth: float = 0.92  # share of memory bandwidth when streaming weights [-]
    gemm_flops: float = 0.83  # share of the peak FLOP rate when tensor cores are fed [-]
    gemm_knee: float = 3.0  # exponent of the smooth maximum of memory and compute time [-]
    gemm_stream: float = 10.0  # bandwidth one SM draws alone, in multiples of its fair share [-]
    gemm_wave: float = 0.8  # how far the last, partly filled wave of thread blocks costs a whole one [-]
    tile_feed: float = 65e9  # operand bytes one SM is fed from the last-level cache [byte/s]
    split_start: float = 2.0e-6  # fixed time of reducing a product that is split along k [s]
    down_boost: float = 1.0  # rate of the product after the activation against the others (cooler operands) [-]
    fp8_start: float = 5.4e-6  # as gemm_start, fp8 [s]
    fp8_bandwidth: float = 0.80  # as gemm_bandwidth, fp8 [-]
    fp8_flops: float = 0.66  # as gemm_flops, of the fp8 peak [-]
    fp8_feed: float = 65e9  # as tile_feed, fp8 [byte/s]
    fp8_quantise: float = 0.5  # share of memory bandwidth when activations are scaled and rounded to fp8 [-]
    attention_start: float = 12e-6  # fixed time of a decode or verify attention call [s]
    kv_bandwidth: float = 0.90  # share of memory bandwidth when reading the KV cache [-]
    kv_stream: float = 2.2  # bandwidth one SM can draw in attention, in multiples of its fair share [-]
    kv_wave: float = 0.0  # how far the last, partly filled wave of decode attention costs a whole one [-]
    kv_split: float = 16.0  # thread blocks that share the KV cache of one head when the batch is small [-]
    kv_split_ungrouped: float = 16.0  # the same for multi-head attention, which some kernels do not split [-]
    kv_combine: float = 0.0  # fixed time of combining a KV cache that is split between thread blocks [s]
    kv_resident: float = 0.0  # share of the last-level cache that keeps the KV cache between two calls [-]
    kv_feed: float = 40e9  # bytes one SM draws from the last-level cache in attention [byte/s]
    prefill_start: float = 10e-6  # fixed time of a prefill attention call [s]
    prefill_flops: float = 0.62  # share of peak FLOP rate in prefill attention [-]
    prefill_bandwidth: float = 0.6  # share of memory bandwidth for queries, keys, values and outputs [-]
    prefill_tail: float = 0.7  # how much of the longest thread block of prefill attention is not overlapped [-]
    element_start: float = 2.2e-6  # fixed time of one element-wise kernel [s]
    element_row: float = 3.0e-10  # time per number of its row that a thread block takes, alone [s]
    element_bandwidth: float = 0.55  # share of memory bandwidth of element-wise kernels [-]
    element_resident: float = 0.0  # share of the last-level cache that holds what the kernel before wrote [-]
    element_feed: float = 15e9  # bytes one SM draws from the last-level cache in element-wise kernels [byte/s]
    reduce_floor: float = 0.0  # shortest all-reduce, however small: kernels wait for each other [s]
    reduce_start: float = 4.2e-6  # fixed time of an all-reduce of two GPUs [s]
    reduce_hop: float = 0.2e-6  # additional time per further GPU [s]
    link_bandwidth: float = 0.65  # share of link bandwidth in an all-reduce [-]
    host_step: float = 0.0  # host time of a step that kernels do not hide [s]
    host_layer: float = 0.0  # gaps between the kernels of a layer that no kernel has in its own time [s]
    host_sequence: float = 0.0  # host time per sequence of the step [s]
    eager_layer: float = 0.0  # launch time of one layer without CUDA graphs; 0 with them [s]

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            require(math.isfinite(value) and value >= 0, spec.name, "must be finite and at least 0", value)
        for name in SHARES:
            require(0 < getattr(self, name) <= 1, name, "must lie in (0, 1] [-]", getattr(self, name))
        for name in (*FEEDS, "gemm_knee"):
            require(getattr(self, name) > 0, name, "must be above 0", getattr(self, name))
        for name in AT_LEAST_ONE:
            require(getattr(self, name) >= 1, name, "must be at least 1 [-]", getattr(self, name))
        boosted = max(self.gemm_flops, self.fp8_flops) * self.down_boost
        require(
            self.down_boost > 0 and boosted <= 1,
            "down_boost",
            "must leave the FLOP share in (0, 1] [-]",
            self.down_boost,
        )
        require(self.gemm_wave <= 1, "gemm_wave", "must lie in [0, 1] [-]", self.gemm_wave)
        for name in ("kv_resident", "element_resident"):
            require(getattr(self, name) <= 1, name, "must lie in [0, 1] [-]", getattr(self, name))


KERNEL_TIMES = (  # fixed times of kernels
    *("gemm_start", "split_start", "fp8_start", "attention_start", "kv_combine", "prefill_start"),
    *("element_start", "element_row", "reduce_floor", "reduce_start", "reduce_hop"),
)
FEEDS = ("tile_feed", "fp8_feed", "kv_feed", "element_feed")  # rates of one SM
AT_LEAST_ONE = ("gemm_stream", "kv_stream", "kv_split", "kv_split_ungrouped")
SHARES = (
    "gemm_bandwidth",
    "gemm_flops",
    "fp8_bandwidth",
    "fp8_flops",
    "fp8_quantise",
    "kv_bandwidth",
    "prefill_flops",
    "prefill_bandwidth",
    "element_bandwidth",
    "link_bandwidth",
)


@dataclass(frozen=True, slots=True)
class Profile:
    """The efficiencies of one accelerator under one engine, with where they come from and how sure they are.

    Raises
    ------
    InputError
        If the provenance is unknown, or the covariance does not match its parameters.
    """

    name: str
    accelerator: str  # name of the accelerator it was made for
    engine: str  # library or engine whose kernels it describes
    provenance: Provenance
    efficiency: Efficiency
    parameters: tuple[str, ...] = ()  # names the covariance is about, in its order
    covariance: tuple[tuple[float, ...], ...] = ()  # of the logarithms of `parameters` [-]
    residual: dict[str, float] = field(default_factory=dict)  # spread of ln(measured/predicted) of a kernel by part [-]
    allreduce: Curves = field(default_factory=dict)  # measured all-reduces by number of GPUs; the law holds elsewhere
    rows: str = ""  # what it was fitted on
    source: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        known = ", ".join(PROVENANCES)
        require(self.provenance in PROVENANCES, "provenance", f"must be one of {known}", self.provenance)
        names = {f.name for f in fields(Efficiency)}
        require(set(self.parameters) <= names, "parameters", "must be fields of Efficiency", self.parameters)
        shape = tuple(len(row) for row in self.covariance)
        n = len(self.parameters)
        require(shape == (n,) * n, "covariance", f"must be {n} x {n} for {n} parameters [-]", shape)
        spreads = all(math.isfinite(v) and v >= 0 for v in self.residual.values())
        require(
            spreads and set(self.residual) <= set(PARTS), "residual", f"must give {', '.join(PARTS)}", self.residual
        )
        self._check_curves()

    def _check_curves(self) -> None:
        for tp, knots in self.allreduce.items():
            sizes, times = np.array(knots, float).reshape(-1, 2).T
            rising = sizes.size > 1 and bool((np.diff(sizes) > 0).all() and (np.diff(times) >= 0).all())
            rule = "must give each number of GPUs two or more knots (size [byte], time [s]) that rise"
            require(tp > 1 and rising and bool((times > 0).all()), "allreduce", rule, {tp: knots})


PARTS = ("gemm", "attention", "elementwise", "communication")  # what has a residual spread of its own


@dataclass(frozen=True, slots=True)
class Call:
    """A matrix of the model on one GPU as arrays over the tensor-parallel degrees: (m x k) (k x n), ``calls`` times."""

    n: Array  # columns [-]
    k: Array  # inner width [-]
    calls: int
    precision: Precision
    boost: float  # relative rate [-]


def step_time(
    model: Transformer,
    accelerator: Accelerator,
    profile: Profile,
    work: Pass,
    tp: int | NDArray[np.integer] = 1,
    precision: Precision = "bf16",
    kv_precision: Precision = "bf16",
    *,
    head: bool = True,
) -> StepTime:
    r"""Return the time of one forward pass by parts [s].

    .. math:: T = \sum_\text{matrices} T_\text{gemm}(m, n, k) + T_\text{gemm}(\text{LM head})
              + L\,(T_\text{attention} + T_\text{elements} + 2\,T_\text{reduce}) + T_\text{overhead}

    Parameters
    ----------
    work : Pass
        What the step processes; its fields broadcast against each other and against ``tp``.
    tp : int or integer array
        Tensor-parallel degree [GPUs].
    head : bool
        Whether the LM head is part of the pass (kernel measurements of layers leave it out).

    Raises
    ------
    InputError
        If a degree does not split the model, or a precision is unknown.

    Source
    ------
    Derivation: kernels follow each other, so their times add; each part has its own source.

    Examples
    --------
    >>> from theory.specs import Accelerator, Transformer
    >>> gpu = Accelerator("gpu", 80e9, 3.35e12, 989.4e12, 1978.9e12, 450e9, 132, 52e6, 700)
    >>> model = Transformer("m", 32, 4096, 32, 32, 128, 11008, 32000, 4096)
    >>> profile = Profile("p", "gpu", "kernels", "assumed", Efficiency())
    >>> bool(step_time(model, gpu, profile, Pass(8, context=1024)).total > 13.2e9 / 3.35e12)
    True
    """
    degrees = _degrees(model, tp)
    _check_precision(precision, kv_precision)
    e = profile.efficiency
    weights, compute, _ = _products(model, accelerator, e, work, degrees, precision, head)
    t = degrees.astype(float)
    attention = model.layers * _attention(model, accelerator, e, work, t, kv_precision)
    elements = partial(elementwise_time, model, accelerator, e)
    elementwise = model.layers * _by_tokens(elements, work.tokens, degrees, t)
    reduce = partial(_reduce, model, accelerator, profile)
    communication = 2 * model.layers * _by_tokens(reduce, work.tokens, degrees, t)
    kernels = weights + compute + attention + elementwise + communication
    overhead = overhead_time(model.layers, work, kernels, e)
    return StepTime(*np.broadcast_arrays(weights, compute, attention, elementwise, communication, overhead))


def roofline_time(
    model: Transformer,
    accelerator: Accelerator,
    work: Pass,
    tp: int | NDArray[np.integer] = 1,
    precision: Precision = "bf16",
    kv_precision: Precision = "bf16",
) -> StepTime:
    r"""Return the datasheet lower bound of :func:`step_time` by parts [s].

    .. math:: T = \sum_\text{matrices} \max\!\left(\frac{b n k}{BW}, \frac{2 m n k}{F}\right)
              + L \max\!\left(\frac{\text{KV bytes}}{BW}, \frac{\text{attention FLOP}}{F}\right)
              + 2 L \frac{2 (t-1)}{t} \frac{2 m d}{\text{link}}

    Source
    ------
    Williams, Waterman & Patterson (2009), Communications of the ACM 52(4).
    """
    degrees = _degrees(model, tp)
    _check_precision(precision, kv_precision)
    t = degrees.astype(float)
    zero = np.zeros(())
    weights, compute = zero, zero
    for rows, call in _calls(model, work, degrees, precision, 1.0, head=True):
        stream = np.where(rows > 0, PRECISION_BYTES[call.precision] * call.n * call.k / accelerator.bandwidth, 0.0)
        bound = np.maximum(stream, 2 * rows * call.n * call.k / accelerator.flops(call.precision))
        weights, compute = weights + call.calls * stream, compute + call.calls * (bound - stream)
    read, flops = _attention_work(model, work, t, kv_precision)
    attention = model.layers * np.maximum(read / accelerator.bandwidth, flops / accelerator.flops_bf16)
    wire = _wire_bytes(ACTIVATION_BYTES * model.hidden * work.tokens, t) / accelerator.link_bandwidth
    return StepTime(*np.broadcast_arrays(weights, compute, attention, zero, 2 * model.layers * wire, zero))


def step_time_interval(
    model: Transformer,
    accelerator: Accelerator,
    profile: Profile,
    work: Pass,
    tp: int | NDArray[np.integer] = 1,
    precision: Precision = "bf16",
    kv_precision: Precision = "bf16",
    level: float = 0.9,
    *,
    head: bool = True,
) -> tuple[Array, Array]:
    r"""Return the interval that holds the measured step time with probability ``level`` [s].

    .. math:: \ln T \pm z \sqrt{J \Sigma J^T + \sum_i (\sigma_i T_i / T)^2}

    with J the derivative of ln T by the logarithms of the fitted parameters, Sigma their covariance, and
    sigma_i the residual spread of kernel i: matrices err independently of each other, layers do not.

    Raises
    ------
    InputError
        If ``level`` is not in (0, 1), or the profile has no residual spread.

    Source
    ------
    Delta method; derivation.
    """
    require(0 < level < 1, "level", "must lie in (0, 1) [-]", level, "Pass 0.9, not 90.")
    require(
        set(profile.residual) == set(PARTS),
        "residual",
        f"must give a spread of {', '.join(PARTS)}",
        profile.residual,
        "Fit the profile again, or state assumed spreads.",
    )

    def at(changed: Profile) -> StepTime:
        return step_time(model, accelerator, changed, work, tp, precision, kv_precision, head=head)

    base = at(profile)
    _, _, squares = _products(model, accelerator, profile.efficiency, work, _degrees(model, tp), precision, head)
    variance = _parameter_variance(at, profile, base) + _residual_variance(profile, base, squares)
    reach = NormalDist().inv_cdf(0.5 + level / 2) * np.sqrt(variance)
    return base.total * np.exp(-reach), base.total * np.exp(reach)


def verify_knee(
    model: Transformer,
    accelerator: Accelerator,
    profile: Profile,
    context: float,
    tp: int = 1,
    precision: Precision = "bf16",
    kv_precision: Precision = "bf16",
    query: float = 4.0,
    extra: float = 0.2,
    limit: int = 4096,
) -> float:
    """Return batch x (gamma + 1) from which on a verify pass costs more than ``1 + extra`` decode steps [tokens].

    Both passes carry the same number of sequences at the same ``context``; the answer is infinite if it does not
    happen up to ``limit`` tokens, and counts in steps of one sequence.

    Raises
    ------
    InputError
        If ``query`` is not above 1, or ``extra`` not above 0.

    Examples
    --------
    >>> from theory.specs import Accelerator, Transformer
    >>> gpu = Accelerator("gpu", 80e9, 3.35e12, 989.4e12, 1978.9e12, 450e9, 132, 52e6, 700)
    >>> model = Transformer("m", 32, 4096, 32, 32, 128, 11008, 32000, 4096)
    >>> profile = Profile("p", "gpu", "kernels", "assumed", Efficiency())
    >>> 50 < verify_knee(model, gpu, profile, context=512.0) < 500
    True
    """
    require(query > 1, "query", "must be above 1 [tokens]", query, "It is gamma + 1.")
    require(extra > 0, "extra", "must be above 0 [-]", extra)
    batch = np.arange(1, max(2, int(limit // query) + 1), dtype=float)
    args = (tp, precision, kv_precision)
    decode = step_time(model, accelerator, profile, Pass(batch, 1.0, context), *args).total
    verify = step_time(model, accelerator, profile, Pass(batch, query, context), *args).total
    dearer = verify > (1 + extra) * decode
    last_cheap = np.flatnonzero(~dearer)
    first = int(last_cheap[-1]) + 1 if last_cheap.size else 0
    return float(batch[first] * query) if first < batch.size else math.inf


# --- matrix products -----------------------------------------------------------------------------------------------


def gemm_time(
    m: ArrayLike,
    n: ArrayLike,
    k: ArrayLike,
    accelerator: Accelerator,
    efficiency: Efficiency,
    precision: Precision = "bf16",
    boost: float = 1.0,
) -> Array:
    r"""Return the time of one matrix product (m x k) (k x n), the best over tile sizes and splits along k [s].

    .. math:: T = t_0 + \min_{\text{tile},\,s} \left[ (T_\text{mem}^p + T_\text{core}^p)^{1/p}
              + [s > 1] \left(t_s + \frac{8 m n}{S \phi}\right) \right]

    .. math:: T_\text{mem} = \frac{b n k + 2 m (n + k)}{e_b BW} \frac{w_\text{eff}}{w}, \qquad
              T_\text{core} = \max\!\left( W \frac{2 t_m t_n k / s}{e_f F / S},
              \frac{N}{S} \frac{b (t_m + t_n) k / s}{\phi} \right)

    with N thread blocks on S SMs, W the waves they take, phi the operand rate an SM is fed from the last-level cache,
    and w_eff / w above 1 when too few thread blocks read weights to saturate memory. In fp8 the activations are scaled
    and rounded before, 5 m k bytes. A product without rows takes no time. An accelerator without matrix units also has
    tiles of 1 and 4 rows.

    Parameters
    ----------
    m, n, k : float or array
        Tokens, output width, input width [-].
    boost : float
        Rate of the tensor cores against other products [-].

    Source
    ------
    Derivation; tiles and waves after NVIDIA, "Matrix multiplication background user's guide" (2023), sections 3-4.
    """
    rows, cols, depth = (np.asarray(x, float) for x in (m, n, k))
    e, sms, width = efficiency, accelerator.sms, PRECISION_BYTES[precision]
    start: float | Array
    start, share, flops, feed = _gemm_constants(e, precision)
    rate = accelerator.flops(precision) * flops * boost / sms
    stream = (width * cols * depth + ACTIVATION_BYTES * rows * (cols + depth)) / (accelerator.bandwidth * share)
    reduction = e.split_start + 8 * rows * cols / (feed * sms)
    shape = np.broadcast(rows, cols, depth)
    tiles = np.array(TILES if accelerator.matrix_units else ROWWISE + TILES, float)
    best: Array = np.asarray(np.inf)
    for some in (tiles,) if shape.size < CACHED else tiles[:, None]:
        tile_rows, tile_cols = some.T.reshape((2, -1) + (1,) * shape.ndim)
        across = np.ceil(cols / tile_cols)
        blocks = np.ceil(rows / tile_rows) * across
        work = depth * (2 * tile_rows * tile_cols / rate)
        bytes_in = depth * (width * (tile_rows + tile_cols) / (feed * sms))
        shared = np.clip(np.floor(sms / np.maximum(blocks, 1.0)), 1.0, SPLITS)
        for splits in (1.0, shared) if shared.max(initial=1.0) > 1 else (1.0,):
            waves = blocks * (splits / sms)
            core = np.maximum(_waves(waves, e.gemm_wave) * work, waves * bytes_in * sms) / splits
            memory = stream * _underuse(across * (splits / sms), e.gemm_stream)
            time = _smooth_max(memory, core, e.gemm_knee) + np.where(splits > 1, reduction, 0.0)
            best = np.minimum(best, time.min(axis=0))
    if precision == "fp8":
        start = start + QUANTISE_BYTES * rows * depth / (accelerator.bandwidth * e.fp8_quantise)
    return np.where(rows > 0, start + best, 0.0)


def _gemm_constants(e: Efficiency, precision: Precision) -> tuple[float, float, float, float]:
    """Return fixed time [s], share of bandwidth [-], share of FLOP rate [-] and operand rate of an SM [byte/s]."""
    if precision == "fp8":
        return e.fp8_start, e.fp8_bandwidth, e.fp8_flops, e.fp8_feed
    return e.gemm_start, e.gemm_bandwidth, e.gemm_flops, e.tile_feed


def _waves(waves: Array, quantised: float) -> Array:
    """Return waves as they cost: between the fraction used and the next whole number, at least one [-]."""
    cost: Array = np.maximum(quantised * np.ceil(waves) + (1 - quantised) * waves, 1.0)
    return cost


def _underuse(waves: Array, stream: float) -> Array:
    """Return by what factor memory is read slower because the last wave has too few readers [-].

    A full wave takes 1; one that fills a fraction f of the SMs takes (1 + (s - 1) f) / s, so that one SM alone draws s
    times its fair share of the bandwidth and each further one a little less.
    """
    whole = np.ceil(waves) - 1
    factor: Array = (whole + (1 + (stream - 1) * (waves - whole)) / stream) / waves
    return factor


def _smooth_max(a: Array, b: Array, exponent: float) -> Array:
    """Return (a^p + b^p)^(1/p), between max(a, b) and its 2^(1/p)-fold."""
    big = np.maximum(a, b)
    ratio = np.minimum(a, b) / np.where(big > 0, big, 1.0)
    out: Array = big * (1 + ratio**exponent) ** (1 / exponent)
    return out


def _calls(
    model: Transformer, work: Pass, tp: NDArray[np.int64], precision: Precision, boost: float, head: bool
) -> tuple[tuple[Array, Call], ...]:
    """Return the rows and shapes of every matrix product; the array form of ``work.layer_gemms`` and ``head_gemm``."""
    kv_heads = np.maximum(1, model.kv_heads // tp)
    heads, ffn = model.heads // tp, model.ffn // tp
    d, layers, m = np.asarray(float(model.hidden)), model.layers, work.tokens
    head_width = np.asarray(float(model.embedding_dim or model.hidden))
    up = (2 * ffn if model.gated else ffn).astype(float)
    layer = (
        (m, Call(((heads + 2 * kv_heads) * model.head_dim).astype(float), d, layers, precision, 1.0)),
        (m, Call(d, (heads * model.head_dim).astype(float), layers, precision, 1.0)),
        (m, Call(up, d, layers, precision, 1.0)),
        (m, Call(d, ffn.astype(float), layers, precision, boost)),
    )
    if not head:
        return layer
    return (*layer, (work.sampled, Call(np.ceil(model.vocab / tp), head_width, 1, "bf16", 1.0)))


def _products(
    model: Transformer,
    a: Accelerator,
    e: Efficiency,
    work: Pass,
    tp: NDArray[np.int64],
    precision: Precision,
    head: bool,
) -> tuple[Array, Array, Array]:
    """Return the weights and the compute part of all matrix products [s] and the sum of their squared times [s^2].

    They depend neither on the context nor on what other kernels reach, so they are kept: planners ask for the same grid
    at many contexts, and an interval moves one parameter after the other.
    """
    grids = [(x.shape, x.tobytes()) for x in (work.tokens, work.sampled, tp)]
    key = (model, a, _OF_PRODUCTS(e), precision, head, *grids)
    kept, most = _KEPT[work.tokens.size >= 64]
    if key not in kept:
        if len(kept) >= most:
            kept.clear()
        kept[key] = _products_of(model, a, e, work, tp, precision, head)
    return kept[key]


_OF_PRODUCTS = attrgetter(
    *("gemm_start", "gemm_bandwidth", "gemm_flops", "gemm_knee", "gemm_stream", "gemm_wave", "tile_feed"),
    *("split_start", "down_boost", "fp8_start", "fp8_bandwidth", "fp8_flops", "fp8_feed", "fp8_quantise"),
)
_Kept = dict[tuple[object, ...], tuple[Array, Array, Array]]
_KEPT: tuple[tuple[_Kept, int], ...] = (({}, 4096), ({}, 256))  # few points and grids, and how many at most [-]


def _products_of(
    model: Transformer,
    a: Accelerator,
    e: Efficiency,
    work: Pass,
    tp: NDArray[np.int64],
    precision: Precision,
    head: bool,
) -> tuple[Array, Array, Array]:
    zero = np.zeros(())
    weights, compute, squares = zero, zero, zero
    for rows, call in _calls(model, work, tp, precision, e.down_boost, head):
        total = call.calls * _by_tokens(partial(_call_time, call, a, e), rows, tp, call.n, call.k)
        start, share, _, _ = _gemm_constants(e, call.precision)
        stream = start + PRECISION_BYTES[call.precision] * call.n * call.k / (a.bandwidth * share)
        stream = np.where(rows > 0, call.calls * stream, 0.0)
        weights, compute, squares = weights + stream, compute + (total - stream), squares + total**2
    return weights, compute, squares


def _call_time(call: Call, a: Accelerator, e: Efficiency, m: Array, n: Array, k: Array) -> Array:
    """Return the time of one call with ``m`` rows [s]."""
    return gemm_time(m, n, k, a, e, call.precision, call.boost)


def _by_tokens(law: Callable[..., Array], m: Array, tp: NDArray[np.int64], *per_degree: Array) -> Array:
    """Return ``law(m, *per_degree)`` at whole tokens, linear between them, computed once per distinct count and degree.

    A fractional number of tokens is a mean over steps of whole ones. Planner grids repeat few token counts over many
    contexts; a table over the counts costs one look-up per point.
    """
    rows = np.where(m > 0, np.maximum(m, 1.0), 0.0)
    shape = np.broadcast_shapes(rows.shape, tp.shape)
    if math.prod(shape) < 2048 or rows.max(initial=0.0) > 10 * math.prod(shape):
        return _between(law, rows, *per_degree)
    out = np.empty(shape)
    flat = [np.broadcast_to(p, tp.shape).ravel() for p in per_degree]
    for degree in np.unique(tp):
        first = int(np.argmax(tp.ravel() == degree))
        here = np.broadcast_to(tp == degree, shape)
        out[here] = _looked_up(law, np.broadcast_to(rows, shape)[here], *(p[first] for p in flat))
    return out


def _between(law: Callable[..., Array], rows: Array, *per_degree: Array) -> Array:
    """Return the law at whole tokens, linear between them."""
    low = np.floor(rows)
    rest = rows - low
    if not rest.any():
        return law(low, *per_degree)
    mixed: Array = (1 - rest) * law(low, *per_degree) + rest * law(low + 1, *per_degree)
    return mixed


def _looked_up(law: Callable[..., Array], rows: Array, *per_degree: Array) -> Array:
    """Return what :func:`_between` does, from a table over the distinct whole numbers."""
    counts = rows.astype(np.int64)
    rest = rows - counts
    needed = np.zeros(int(counts.max()) + 2, dtype=bool)
    needed[counts] = True
    if rest.any():
        needed[counts + 1] = True
    table = np.zeros(needed.size)
    table[needed] = law(np.flatnonzero(needed).astype(float), *per_degree)
    if not rest.any():
        return table[counts]
    mixed: Array = (1 - rest) * table[counts] + rest * table[counts + 1]
    return mixed


# --- attention, element-wise work, communication, engine -------------------------------------------------------------


def decode_attention_time(
    sequences: ArrayLike,
    query: ArrayLike,
    context: ArrayLike,
    heads: ArrayLike,
    kv_heads: ArrayLike,
    head_dim: int,
    accelerator: Accelerator,
    efficiency: Efficiency,
    kv_precision: Precision = "bf16",
) -> Array:
    r"""Return the attention time of one layer on one GPU for sequences with ``query`` new tokens each [s].

    .. math:: T = t_0 + t_c \left(1 - \frac{1}{\text{splits}}\right) + \max\!\left(
              \frac{R\,W}{\min(1, u N / S)} \left[\frac{\mu}{e BW} + \frac{1 - \mu}{S \phi}\right],
              \frac{4 H_{kv} h \lceil q G \rceil_{64} B (K + \frac{q+1}{2})}{e_f F} \right)

    with R the KV bytes read, N = H_kv max(B, splits) thread blocks, G query heads per KV head, mu the share of R
    that misses the last-level cache (1 unless the profile was timed on kernels alone), and W the excess of a last wave
    that is not full: 1 + kv_wave (ceil(w) / w - 1) for w = H_kv B / 2 S > 1 waves of two blocks an SM. Rows are padded
    to 64 on matrix units only.

    Source
    ------
    Derivation; Dao (2023), arXiv:2307.08691 (query heads of a group share a tile; KV split when the batch is small).
    """
    b, q, context_tokens, h, hk = (np.asarray(x, float) for x in (sequences, query, context, heads, kv_heads))
    e, sms = efficiency, accelerator.sms
    read = 2 * hk * head_dim * PRECISION_BYTES[kv_precision] * b * (context_tokens + q)
    splits = np.where(h > hk, e.kv_split, e.kv_split_ungrouped)
    busy = np.minimum(1.0, hk * np.maximum(b, splits) * (e.kv_stream / sms))
    waves = np.maximum(hk * b / (DECODE_BLOCKS * sms), 1.0)
    tail = 1 + e.kv_wave * (np.ceil(waves) / waves - 1)
    missed = _missed(read, e.kv_resident * accelerator.l2)
    pace = missed / (accelerator.bandwidth * e.kv_bandwidth) + (1 - missed) / (sms * e.kv_feed)
    padded = DECODE_TILE if accelerator.matrix_units else 1
    tile = padded * np.ceil(q * h / (hk * padded))
    flops = 4 * hk * head_dim * tile * b * (context_tokens + (q + 1) / 2)
    slowest = np.maximum(read * tail * pace / busy, flops / (accelerator.flops_bf16 * e.prefill_flops))
    slowest = np.maximum(slowest, read / accelerator.bandwidth)  # never below the datasheet
    return np.where(b * q > 0, e.attention_start + e.kv_combine * (1 - 1 / splits) + slowest, 0.0)


def _missed(read: Array, resident: float) -> Array | float:
    """Return the share of a KV cache that is not found in the last-level cache: a steep step at its size [-]."""
    if resident <= 0:
        return 1.0
    x = np.log(np.maximum(read, 1.0) / resident)
    share: Array = 1 / (1 + np.exp(np.clip(-RESIDENT_STEEPNESS * x, -700, 700)))
    return share


def prefill_attention_time(
    tokens: ArrayLike,
    cached: ArrayLike,
    prompts: ArrayLike,
    heads: ArrayLike,
    kv_heads: ArrayLike,
    head_dim: int,
    accelerator: Accelerator,
    efficiency: Efficiency,
) -> Array:
    r"""Return the attention time of one layer on one GPU for ``prompts`` chunks, ``tokens`` in all [s].

    .. math:: T = t_0 + \frac{B}{e_b BW} + \frac{S}{e_f F} \left(\frac{A}{S} + \tau A_\text{longest}\right), \quad
              A = 4 H h n P \left(C + \frac{P + 128}{2}\right)

    with B the bytes of queries, keys, values (written and read again) and outputs, and A_longest the FLOPs of the
    thread block of the last 128 rows, which nothing overlaps.

    Source
    ------
    Derivation from the blocks of FlashAttention-2, Dao (2023), arXiv:2307.08691; parameters fitted.
    """
    p_all, c, n, h, hk = (np.asarray(x, float) for x in (tokens, cached, prompts, heads, kv_heads))
    e = efficiency
    p = p_all / np.maximum(n, 1e-9)
    moved = ACTIVATION_BYTES * head_dim * (p_all * (2 * h + 6 * hk) + n * c * 2 * hk)
    attend = 4 * h * head_dim * p_all * (c + (p + ATTENTION_TILE) / 2)
    longest = 4 * head_dim * np.minimum(ATTENTION_TILE, p) * (c + p)
    flops = attend + e.prefill_tail * accelerator.sms * longest
    time = moved / (accelerator.bandwidth * e.prefill_bandwidth) + flops / (accelerator.flops_bf16 * e.prefill_flops)
    return np.where(p_all > 0, e.prefill_start + time, 0.0)


def _attention(model: Transformer, a: Accelerator, e: Efficiency, work: Pass, t: Array, kv: Precision) -> Array:
    """Return the attention time of one layer on one GPU [s]."""
    heads, kv_heads, dim = model.heads / t, np.maximum(1.0, model.kv_heads / t), model.head_dim
    decode = decode_attention_time(work.sequences, work.query, work.context, heads, kv_heads, dim, a, e, kv)
    if not np.any(work.prefill_tokens):
        return decode
    prompts = (work.prefill_tokens, work.prefill_context, work.prefill_sequences)
    both: Array = decode + prefill_attention_time(*prompts, heads, kv_heads, dim, a, e)
    return both


def _attention_work(model: Transformer, work: Pass, t: Array, kv: Precision) -> tuple[Array, Array]:
    """Return KV bytes read [byte] and FLOPs [FLOP] of one layer on one GPU, nothing padded."""
    heads, kv_heads, dim = model.heads / t, np.maximum(1.0, model.kv_heads / t), model.head_dim
    b, q, s, p, c, n = (np.asarray(getattr(work, f.name), float) for f in fields(work))
    read = 2 * kv_heads * dim * PRECISION_BYTES[kv] * b * (s + q)
    rows = b * q * (s + (q + 1) / 2) + p * (c + (p / n + 1) / 2)
    return read, 4 * heads * dim * rows


def elementwise_time(model: Transformer, accelerator: Accelerator, efficiency: Efficiency, m: Array, t: Array) -> Array:
    r"""Return the element-wise time of one layer: two norms, rotary positions, activation, one residual addition [s].

    .. math:: T = \sum_\text{kernels} \left[t_0 + \max\!\left(r w, \frac{b - h}{e BW} + \frac{h}{S \phi}\right)\right],
              \quad b = 2 c w m, \quad h = \min(b, \rho L_2)

    with w the numbers of a token's row and c how often a number crosses the memory bus: a norm reads twice and writes
    once, an addition reads two rows and writes one (the second addition of a layer is part of a norm); h bytes are
    found in the last-level cache, where the kernel before left them.

    Source
    ------
    Derivation: bytes over bandwidth, from memory or from the cache; parameters fitted.
    """
    e, d, h = efficiency, float(model.hidden), model.head_dim
    rotary = (model.heads / t + np.maximum(1.0, model.kv_heads / t)) * h
    ffn = model.ffn / t
    wide = (2 if model.gated else 1) * ffn
    kernels = (
        (d, 3 * d, 2),
        (rotary, 2 * rotary * (model.positions == 0), 1),
        (wide, wide + ffn, 1),
        (d / 8, 3 * d, 1),
    )
    total: Array = np.zeros(())
    for row, crossings, count in kernels:
        moved = ACTIVATION_BYTES * crossings * m
        kept = np.minimum(moved, e.element_resident * accelerator.l2)
        flow = (moved - kept) / (accelerator.bandwidth * e.element_bandwidth) + kept / (
            accelerator.sms * e.element_feed
        )
        total = total + count * (e.element_start + np.maximum(e.element_row * row, flow))
    return total


def _reduce(model: Transformer, a: Accelerator, profile: Profile, m: Array, t: Array) -> Array:
    """Return the time of the all-reduce of ``m`` tokens' activations [s]."""
    return allreduce_time(ACTIVATION_BYTES * model.hidden * m, t, a, profile.efficiency, profile.allreduce)


def _wire_bytes(size: ArrayLike, t: Array) -> Array:
    """Return the bytes a GPU sends in an all-reduce of ``size`` bytes, 2 (t - 1) / t of them [byte]."""
    sent: Array = 2 * (t - 1) / t * np.asarray(size, float)
    return sent


def allreduce_time(
    size: ArrayLike, tp: ArrayLike, accelerator: Accelerator, efficiency: Efficiency, curves: Curves | None = None
) -> Array:
    r"""Return the time of one all-reduce of ``size`` bytes between ``tp`` GPUs of a node; 0 for one GPU [s].

    .. math:: T = \max\!\left(t_\text{floor},
              t_0 + t_1 (t - 2) + \frac{2 (t-1)}{t} \frac{\text{size}}{e\,\text{link}}\right)

    Where ``curves`` holds measurements of ``tp`` GPUs, they are interpolated instead; beyond the largest size measured
    the law's bandwidth term goes on.

    Source
    ------
    Thakur, Rabenseifner & Gropp (2005), doi:10.1177/1094342005051521 (bandwidth term); fixed times fitted.
    """
    sizes, t = np.broadcast_arrays(np.asarray(size, float), np.asarray(tp, float))
    wire = _wire_bytes(sizes, t) / (accelerator.link_bandwidth * efficiency.link_bandwidth)
    time = np.maximum(efficiency.reduce_floor, efficiency.reduce_start + efficiency.reduce_hop * (t - 2) + wire)
    for degree in set(curves or {}) & set(np.unique(t).astype(int).tolist()):
        knots = np.array((curves or {})[degree])
        beyond = wire * np.maximum(0.0, 1 - knots[-1, 0] / np.maximum(sizes, 1.0))
        time = np.where(t == degree, np.interp(sizes, knots[:, 0], knots[:, 1]) + beyond, time)
    return np.where(t > 1, time, 0.0)


def overhead_time(layers: int, work: Pass, kernels: Array, efficiency: Efficiency) -> Array:
    r"""Return what the engine adds to the kernels [s].

    .. math:: T = t_\text{step} + L t_\text{layer} + t_\text{seq} B + \max(0, L t_\text{eager} - T_\text{kernels})

    Kernels of one CUDA graph still follow each other with gaps that their own times do not hold. An eager engine that
    launches a layer slower than the GPU computes it waits for the host; CUDA graphs do not.

    Source
    ------
    Derivation: host and GPU work side by side and the slower one is waited for; values fitted, engine by
    engine.
    """
    sequences = np.asarray(work.sequences, float) + work.prompts
    waits = np.maximum(0.0, layers * efficiency.eager_layer - kernels)
    fixed = efficiency.host_step + layers * efficiency.host_layer
    time: Array = fixed + efficiency.host_sequence * sequences + waits
    return time


# --- uncertainty -----------------------------------------------------------------------------------------------------

_STEP = 1e-3  # relative step of the numerical derivative [-]


def _parameter_variance(at: Callable[[Profile], StepTime], profile: Profile, base: StepTime) -> Array:
    """Return J Sigma J^T, the variance of ln T that the parameters' covariance explains [-]."""
    if not profile.parameters:
        return np.zeros_like(base.total)
    slopes = []
    for name in profile.parameters:
        # downwards, since a share may sit at 1; upwards where the least value is 1
        step = _STEP if name in AT_LEAST_ONE else -_STEP
        moved = replace(profile.efficiency, **{name: getattr(profile.efficiency, name) * (1 + step)})
        slopes.append(np.log(at(replace(profile, efficiency=moved)).total / base.total) / step)
    jacobian = np.stack(slopes)
    variance: Array = np.einsum("i...,ij,j...->...", jacobian, np.asarray(profile.covariance), jacobian)
    return np.maximum(variance, 0.0)


def _residual_variance(profile: Profile, base: StepTime, squares: Array) -> Array:
    """Return the variance of ln T that the kernels' residual spreads explain [-]."""
    variance = profile.residual["gemm"] ** 2 * squares
    for part in ("attention", "elementwise", "communication"):
        variance = variance + (profile.residual[part] * getattr(base, part)) ** 2
    return variance / base.total**2


def _degrees(model: Transformer, tp: int | NDArray[np.integer]) -> NDArray[np.int64]:
    degrees = np.asarray(tp)
    require(np.issubdtype(degrees.dtype, np.integer), "tp", "must be an integer or an array of integers [GPUs]", tp)
    for degree in np.unique(degrees):
        check_tp(model, int(degree))
    return degrees.astype(np.int64)


def _check_precision(precision: Precision, kv_precision: Precision) -> None:
    known = ", ".join(PRECISION_BYTES)
    require(precision in PRECISION_BYTES, "precision", f"must be one of {known}", precision)
    require(kv_precision in PRECISION_BYTES, "kv_precision", f"must be one of {known}", kv_precision)

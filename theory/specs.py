"""What is given: accelerators, transformers and how they are deployed. Frozen, checked once, units in the comments."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from .errors import require

Precision = Literal["bf16", "fp8"]
PRECISION_BYTES: dict[str, int] = {"bf16": 2, "fp8": 1}  # [byte per number]


def _positive(spec: object, *names: str, unit: str) -> None:
    for name in names:
        value = getattr(spec, name)
        require(math.isfinite(value) and value > 0, name, f"must be finite and above 0 [{unit}]", value)


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One GPU as its datasheet describes it. Efficiencies are not in here: they belong to a profile.

    Raises
    ------
    InputError
        If a quantity is not finite and positive.
    """

    name: str
    memory: float  # device memory as the driver reports it [byte]
    bandwidth: float  # peak memory bandwidth [byte/s]
    flops_bf16: float  # peak dense bf16 rate [FLOP/s]
    flops_fp8: float  # peak dense fp8 rate; equal to flops_bf16 where fp8 is not supported in hardware [FLOP/s]
    link_bandwidth: float  # GPU-to-GPU bandwidth, one direction, per GPU [byte/s]
    sms: int  # streaming multiprocessors [-]
    l2: float  # last-level cache [byte]
    power: float  # board power limit [W]
    source: str = ""  # where the figures come from
    matrix_units: bool = True  # products run on tensor cores, padded to 16 rows or more; False: on vector units

    def __post_init__(self) -> None:
        _positive(self, "memory", "l2", unit="byte")
        _positive(self, "bandwidth", "link_bandwidth", unit="byte/s")
        _positive(self, "flops_bf16", "flops_fp8", unit="FLOP/s")
        _positive(self, "sms", unit="-")
        _positive(self, "power", unit="W")

    def flops(self, precision: Precision) -> float:
        """Return the peak dense rate at ``precision`` [FLOP/s]."""
        return self.flops_bf16 if precision == "bf16" else self.flops_fp8


@dataclass(frozen=True, slots=True)
class Transformer:
    """A decoder-only transformer by its dimensions; everything else (parameters, bytes, FLOPs) follows from them.

    Raises
    ------
    InputError
        If a dimension is not a positive integer or the head counts do not divide.
    """

    name: str
    layers: int
    hidden: int  # model width d
    heads: int  # query heads
    kv_heads: int  # key/value heads (= heads for multi-head attention)
    head_dim: int
    ffn: int  # inner width of the feed-forward block
    vocab: int  # rows of the embedding table
    max_context: int  # longest sequence the model was made for [tokens]
    gated: bool = True  # SwiGLU (gate, up, down) or plain (up, down)
    tied: bool = False  # LM head shares the embedding table
    qkv_bias: bool = False
    output_bias: bool = False  # bias of the attention output projection
    ffn_bias: bool = False
    norm_bias: bool = False  # LayerNorm (weight and bias) instead of RMSNorm (weight)
    qk_norm: bool = False  # a norm of head_dim on queries and on keys (Qwen3)
    final_norm: bool = True
    positions: int = 0  # rows of a learned position table; 0 for rotary positions
    embedding_dim: int = 0  # width of the embedding table if it differs from `hidden` (OPT-350M); 0: the same
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "max_context"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and not isinstance(value, bool) and value > 0,
                name,
                "must be a positive integer [-]",
                value,
            )
        require(
            self.heads % self.kv_heads == 0,
            "kv_heads",
            f"must divide the {self.heads} query heads [-]",
            self.kv_heads,
        )
        require(self.positions >= 0 and self.embedding_dim >= 0, "positions", "must be at least 0 [-]", self.positions)


@dataclass(frozen=True, slots=True)
class Rules:
    """What an engine's scheduler does within its limits. The defaults: vLLM v1 that schedules each step when it starts.

    Rules travel inside :class:`Limits`, so that whatever knows how much fits also knows what happens then. Host times
    per step and sequence are part of step times; a scheduler that uses fewer slots than it has is a lower
    ``max_num_seqs``.

    Raises
    ------
    InputError
        If a value is out of its range.
    """

    schedule_ahead: int = 0  # steps, 0 or 1, by which a batch is fixed before the running step has ended [-]
    mixed_prefill: bool = True  # prompts join decode steps; else steps of prompts alone go first and decoding waits
    reserve_output: bool = False  # KV of prompt, output and look-ahead reserved at admission; else grown, preempting
    stream_interval: int = 1  # tokens the client receives at once: it sees the first with the k-th [tokens]
    eager_layer: float = 0.0  # launch time of a layer in a step with prompts, which has no CUDA graph: a floor [s]
    memory_left: bool = False  # ``gpu_memory_utilization`` is a share of what weights leave free, not of all memory
    late_stop: bool = False  # scheduled ahead: a sequence whose output has ended is in the next step too, in vain

    def __post_init__(self) -> None:
        require(self.schedule_ahead in (0, 1), "schedule_ahead", "must be 0 or 1 [steps]", self.schedule_ahead)
        require(
            self.stream_interval >= 1 and self.stream_interval == int(self.stream_interval),
            "stream_interval",
            "must be an integer of at least 1 [tokens]",
            self.stream_interval,
        )
        require(
            math.isfinite(self.eager_layer) and self.eager_layer >= 0,
            "eager_layer",
            "must be finite and at least 0 [s]",
            self.eager_layer,
        )
        require(
            not self.late_stop or self.schedule_ahead == 1,
            "late_stop",
            "must be false unless `schedule_ahead` is 1",
            self.late_stop,
            "Who schedules each step when it starts knows whose output has ended.",
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """Engine limits of one replica, with the names and defaults of vLLM v1, and the rules applied within them."""

    max_num_seqs: int = 256  # sequences in one step
    max_num_batched_tokens: int = 8192  # tokens in one step
    gpu_memory_utilization: float = 0.90  # share of device memory the engine may fill [-]
    block_size: int = 16  # tokens in a KV block
    reserve: float = 2.5e9  # per GPU, activations, CUDA graphs and communication buffers [byte]; assumed
    rules: Rules = Rules()

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name == "rules":
                continue
            value = getattr(self, field.name)
            require(
                math.isfinite(value) and (value > 0 or field.name == "reserve"),
                field.name,
                "must be finite and above 0",
                value,
            )
        require(
            self.gpu_memory_utilization <= 1.0,
            "gpu_memory_utilization",
            "must lie in (0, 1] [-]",
            self.gpu_memory_utilization,
            "It is a share: pass 0.9, not 90.",
        )
        require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            f"must be at least `max_num_seqs` = {self.max_num_seqs} [tokens]",
            self.max_num_batched_tokens,
            "Every running sequence needs one token of each step.",
        )


@dataclass(frozen=True, slots=True)
class Deployment:
    """One replica of a model: on which accelerator, split how, at which precision, under which limits."""

    model: Transformer
    accelerator: Accelerator
    tp: int = 1  # tensor-parallel degree [GPUs]
    precision: Precision = "bf16"  # of weights and GEMMs
    kv_precision: Precision = "bf16"  # of the KV cache
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        check_tp(self.model, self.tp)
        for name in ("precision", "kv_precision"):
            value = getattr(self, name)
            require(value in PRECISION_BYTES, name, f"must be one of {', '.join(PRECISION_BYTES)}", value)


def check_tp(model: Transformer, tp: int) -> None:
    """Refuse a tensor-parallel degree that does not split ``model`` evenly.

    Raises
    ------
    InputError
        Unless ``tp`` is a positive integer that divides the query heads and the feed-forward width, and divides or is
        a multiple of the KV heads (then KV heads are replicated).
    """
    require(
        isinstance(tp, int) and tp > 0, "tp", "must be a positive integer [GPUs]", tp, "Usual degrees are 1, 2, 4, 8."
    )
    fits = [t for t in (1, 2, 4, 8, 16) if _splits(model, t)]
    require(
        _splits(model, tp),
        "tp",
        f"must split the {model.heads} heads, {model.kv_heads} KV heads and inner width {model.ffn} of "
        f"{model.name} evenly [GPUs]",
        tp,
        f"Use one of {', '.join(map(str, fits))}.",
    )


def _splits(model: Transformer, tp: int) -> bool:
    return model.heads % tp == 0 and model.ffn % tp == 0 and (model.kv_heads % tp == 0 or tp % model.kv_heads == 0)

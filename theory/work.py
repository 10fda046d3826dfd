"""Work of a forward pass: parameters, matrix shapes, FLOPs, bytes of weights and of KV cache."""

from __future__ import annotations

from typing import NamedTuple

from .specs import PRECISION_BYTES, Precision, Transformer


class Gemm(NamedTuple):
    """A weight matrix that each of ``calls`` calls multiplies with the tokens of a step: (m x k) (k x n)."""

    name: str
    n: int  # output width [-]
    k: int  # input width [-]
    calls: int  # in one forward pass [-]


def layer_gemms(model: Transformer, tp: int = 1) -> tuple[Gemm, ...]:
    """Return the matrix shapes of all layers on one of ``tp`` GPUs (column- then row-parallel, Megatron split).

    Query, key and value are one call, gate and up are one call, as serving engines fuse them. KV heads are replicated
    when ``tp`` exceeds their number.

    Source
    ------
    Shoeybi et al. (2019), arXiv:1909.08053, section 3.
    """
    kv_heads = max(1, model.kv_heads // tp)
    heads = model.heads // tp
    ffn = model.ffn // tp
    up = 2 * ffn if model.gated else ffn
    return (
        Gemm("qkv", (heads + 2 * kv_heads) * model.head_dim, model.hidden, model.layers),
        Gemm("output", model.hidden, heads * model.head_dim, model.layers),
        Gemm("up", up, model.hidden, model.layers),
        Gemm("down", model.hidden, ffn, model.layers),
    )


def head_gemm(model: Transformer, tp: int = 1) -> Gemm:
    """Return the LM head on one of ``tp`` GPUs (vocabulary split, rounded up)."""
    return Gemm("lm_head", -(-model.vocab // tp), model.embedding_dim or model.hidden, 1)


def parameters(model: Transformer) -> int:
    r"""Return the number of parameters [-].

    .. math:: P = V d_e (2 - \mathrm{tied}) + L\,[d\,(H + 2 H_{kv})\,h + H h d + (2 + \mathrm{gated})\, d f + \ldots]

    where the dots are biases and norms, all counted.

    Source
    ------
    Derivation: sum over the tensors that a checkpoint stores.
    """
    d, h = model.hidden, model.head_dim
    qkv = (model.heads + 2 * model.kv_heads) * h
    norm = d * (2 if model.norm_bias else 1)
    matrices = sum(g.n * g.k for g in layer_gemms(model))
    biases = (
        qkv * model.qkv_bias
        + d * model.output_bias
        + ((2 if model.gated else 1) * model.ffn + d) * model.ffn_bias
        + 2 * h * model.qk_norm
    )
    embedding = model.embedding_dim or d
    outside = (
        model.vocab * embedding * (1 if model.tied else 2)
        + model.positions * d
        + norm * model.final_norm
        + (2 * embedding * d if embedding != d else 0)
    )
    return outside + model.layers * (matrices + biases + 2 * norm)


def weight_bytes(model: Transformer, precision: Precision = "bf16") -> float:
    """Return the bytes of the weights over all GPUs; outside the layers they stay bf16 [byte]."""
    in_layers = sum(g.n * g.k * g.calls for g in layer_gemms(model))
    return float(in_layers * PRECISION_BYTES[precision] + (parameters(model) - in_layers) * PRECISION_BYTES["bf16"])


def kv_bytes_per_token(model: Transformer, kv_precision: Precision = "bf16", tp: int = 1) -> float:
    r"""Return the KV bytes one cached token takes over all ``tp`` GPUs, :math:`2 L H_{kv} h b` [byte/token].

    KV heads are replicated when ``tp`` exceeds their number, and the copies are counted.
    """
    copies = max(model.kv_heads, tp)
    return float(2 * model.layers * copies * model.head_dim * PRECISION_BYTES[kv_precision])


def decode_flops(model: Transformer, context: float = 0.0) -> float:
    r"""Return the FLOPs of one token's forward pass, LM head included [FLOP/token].

    .. math:: F = 2 \sum_{\text{matrices}} n k + 4 L H h S

    Source
    ------
    Kaplan et al. (2020), arXiv:2001.08361, table 1 (the attention term counts both products).
    """
    gemms = sum(2 * g.n * g.k * g.calls for g in (*layer_gemms(model), head_gemm(model)))
    return float(gemms + 4 * model.layers * model.heads * model.head_dim * context)

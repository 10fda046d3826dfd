"""Work of a pass against an independent list of tensors and products."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.catalog import model, models
from theory.specs import Transformer
from theory.work import decode_flops, head_gemm, kv_bytes_per_token, layer_gemms, parameters, weight_bytes


def tensors(m: Transformer) -> list[tuple[int, ...]]:
    """Return the shapes a checkpoint of ``m`` stores, one by one and not fused: another route to the count."""
    d, q, kv, f = m.hidden, m.heads * m.head_dim, m.kv_heads * m.head_dim, m.ffn
    norm = [(d,), (d,)] if m.norm_bias else [(d,)]
    layer: list[tuple[int, ...]] = [(q, d), (kv, d), (kv, d), (d, q), *norm, *norm]
    layer += [(f, d), (f, d), (d, f)] if m.gated else [(f, d), (d, f)]
    layer += [(q,), (kv,), (kv,)] * m.qkv_bias + [(d,)] * m.output_bias
    layer += ([(f,), (f,), (d,)] if m.gated else [(f,), (d,)]) * m.ffn_bias + [(m.head_dim,)] * (2 * m.qk_norm)
    width = m.embedding_dim or d
    outside: list[tuple[int, ...]] = [(m.vocab, width)] * (1 if m.tied else 2) + norm * m.final_norm
    outside += [(m.positions, d)] * (m.positions > 0) + [(width, d), (d, width)] * (width != d)
    return layer * m.layers + outside


def size(shapes: list[tuple[int, ...]]) -> int:
    return sum(s[0] * (s[1] if len(s) > 1 else 1) for s in shapes)


@st.composite
def transformers(draw: st.DrawFn) -> Transformer:
    kv_heads, group = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 8]))
    flags = {k: draw(st.booleans()) for k in ("gated", "tied", "qkv_bias", "output_bias", "ffn_bias", "norm_bias")}
    return Transformer(
        name="any",
        layers=draw(st.integers(1, 6)),
        hidden=draw(st.sampled_from([64, 96, 512])),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([32, 64])),
        ffn=draw(st.sampled_from([128, 640])),
        vocab=draw(st.integers(1, 1000)),
        max_context=128,
        qk_norm=draw(st.booleans()),
        final_norm=draw(st.booleans()),
        positions=draw(st.sampled_from([0, 130])),
        embedding_dim=draw(st.sampled_from([0, 48])),
        **flags,
    )


@settings(max_examples=100, deadline=None)
@given(transformers())
def test_parameters_are_the_sum_over_stored_tensors(m: Transformer) -> None:
    assert parameters(m) == size(tensors(m))


def test_a_forgotten_bias_is_noticed() -> None:
    m = model("qwen2.5-7b")
    assert parameters(m) != size(tensors(replace(m, qkv_bias=False)))


@settings(max_examples=50, deadline=None)
@given(transformers(), st.integers(0, 5000))
def test_decode_flops_are_two_per_weight_and_token_plus_attention(m: Transformer, context: int) -> None:
    products = [s for s in tensors(replace(m, tied=True, positions=0, embedding_dim=0)) if len(s) == 2]
    head = (m.embedding_dim or m.hidden) * m.vocab
    matrices = size(products) - m.hidden * m.vocab + head
    attention = 2 * 2 * m.layers * m.heads * m.head_dim * context  # scores and weighted values
    assert decode_flops(m, context) == 2 * matrices + attention


def test_kv_bytes_of_published_models() -> None:
    # Llama-2-70B, grouped-query attention: 2 x 80 x 8 x 128 x 2 byte; Llama-2-13B, multi-head: 2 x 40 x 40 x 128 x 2
    assert kv_bytes_per_token(model("llama-2-70b")) == 327_680
    assert kv_bytes_per_token(model("llama-2-13b")) == 819_200
    assert kv_bytes_per_token(model("llama-2-13b"), "fp8") == 409_600


@pytest.mark.parametrize("name", models())
def test_tensor_parallel_shards_add_up(name: str) -> None:
    m = model(name)
    for tp in (t for t in (2, 4, 8) if m.kv_heads % t == 0 and m.heads % t == 0 and m.ffn % t == 0):
        whole = sum(g.n * g.k * g.calls for g in layer_gemms(m))
        assert tp * sum(g.n * g.k * g.calls for g in layer_gemms(m, tp)) == whole
        assert tp * head_gemm(m, tp).n >= m.vocab
        assert kv_bytes_per_token(m, tp=tp) == kv_bytes_per_token(m)


def test_kv_heads_are_replicated_beyond_their_number() -> None:
    m = model("qwen2.5-0.5b")  # 2 KV heads
    assert kv_bytes_per_token(m, tp=14) == 7 * kv_bytes_per_token(m)


def test_fp8_halves_the_layers_only() -> None:
    m = model("llama-2-7b")
    in_layers = sum(g.n * g.k * g.calls for g in layer_gemms(m))
    assert weight_bytes(m, "bf16") == 2 * parameters(m)
    assert weight_bytes(m, "bf16") - weight_bytes(m, "fp8") == in_layers

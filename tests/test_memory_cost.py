"""Memory and cost: limits, a counted cache against the formula, refusals, inverses."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.catalog import accelerator, model
from theory.cost import (
    SERVING,
    Draw,
    dollars,
    dollars_per_correct_answer,
    dollars_per_million_tokens,
    dollars_per_request,
    gpu_seconds,
    joules,
    joules_at_most,
)
from theory.errors import InputError
from theory.memory import (
    fits,
    free_for_kv,
    kv_capacity_tokens,
    kv_per_gpu,
    largest_batch,
    weights_per_gpu,
    why_not,
)
from theory.specs import Deployment, Limits
from theory.work import kv_bytes_per_token, weight_bytes

H100 = accelerator("h100-sxm")
SEVENTY = model("llama-2-70b")
DRAFT = model("llama-68m")
LLAMA13 = Deployment(model("llama-2-13b"), H100)


def allocate(deployment: Deployment, per_sequence: int, lookahead: int = 0) -> int:
    """Return the sequences that fit by handing out block after block, as an engine does: another route."""
    d, block = deployment, deployment.limits.block_size
    share = kv_bytes_per_token(d.model, d.kv_precision, d.tp) / d.tp * block  # a block on one GPU [byte]
    usable = d.limits.gpu_memory_utilization * d.accelerator.memory - d.limits.reserve
    left, n = usable - weight_bytes(d.model, d.precision) / d.tp, 0
    while n < d.limits.max_num_seqs:
        left -= share * -(-(per_sequence + lookahead) // block)
        if left < 0:
            break
        n += 1
    return n


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["llama-2-13b", "codellama-34b", "llama-2-70b", "qwen2.5-7b"]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 20_000),
    st.integers(0, 12),
)
def test_the_largest_batch_is_what_blocks_allow(name: str, tp: int, tokens: int, lookahead: int) -> None:
    d = Deployment(model(name), H100, tp=tp)
    assert largest_batch(d, tokens, lookahead=lookahead) == allocate(d, tokens, lookahead)


def test_a_wrong_utilisation_is_noticed() -> None:
    d = replace(LLAMA13, limits=Limits(gpu_memory_utilization=0.85))
    assert largest_batch(d, 1500) != allocate(LLAMA13, 1500)


def test_capacity_in_a_plain_case() -> None:
    # 0.9 x 79.10 GiB - 2.5 GB - 26.03 GB of weights = 47.9 GB over 819,200 byte a token
    assert kv_capacity_tokens(LLAMA13) == pytest.approx(47.9e9 / 819_200, rel=2e-3)
    assert kv_capacity_tokens(LLAMA13) % LLAMA13.limits.block_size == 0


def test_weights_split_evenly_but_kv_heads_are_replicated() -> None:
    assert weights_per_gpu(SEVENTY, 1) == weight_bytes(SEVENTY)
    assert weights_per_gpu(SEVENTY, 8) == pytest.approx(weight_bytes(SEVENTY) / 8)
    few = model("qwen2.5-1.5b")  # 2 KV heads on 4 GPUs: each keeps one whole head
    assert weights_per_gpu(few, 4) > weight_bytes(few) / 4


def test_fp8_frees_memory_and_halves_the_cache() -> None:
    fp8 = replace(LLAMA13, precision="fp8", kv_precision="fp8")
    assert kv_per_gpu(fp8) == kv_per_gpu(LLAMA13) / 2
    assert free_for_kv(fp8) > free_for_kv(LLAMA13)
    assert kv_capacity_tokens(fp8) > 2 * kv_capacity_tokens(LLAMA13)


def test_a_draft_takes_weights_and_cache_on_the_gpu_it_lives_on() -> None:
    d = Deployment(SEVENTY, H100, tp=4)
    seven = model("llama-2-7b")
    alone, on_one, on_all = kv_capacity_tokens(d), kv_capacity_tokens(d, seven, 1), kv_capacity_tokens(d, seven, 4)
    assert on_one < on_all < alone
    assert free_for_kv(d) - free_for_kv(d, seven, 1) == weight_bytes(seven)
    assert kv_per_gpu(d, seven, 1) - kv_per_gpu(d) == kv_bytes_per_token(seven)
    # 68M parameters keep 2 x 2 x 12 x 64 x 2 = 6144 byte a token on their GPU; the 70B keeps 81,920 on each of four
    assert kv_capacity_tokens(d, DRAFT) / alone == pytest.approx(81_920 / (81_920 + 6_144), rel=0.01)


def test_limits_of_the_batch() -> None:
    assert largest_batch(LLAMA13, 1) == LLAMA13.limits.max_num_seqs
    assert largest_batch(LLAMA13, kv_capacity_tokens(LLAMA13)) == 1
    assert largest_batch(LLAMA13, kv_capacity_tokens(LLAMA13) + 1) == 0
    assert largest_batch(Deployment(SEVENTY, H100), 1) == 0
    assert kv_capacity_tokens(Deployment(SEVENTY, H100)) == 0


def test_why_not_names_what_binds_and_the_way_out() -> None:
    alone = Deployment(SEVENTY, H100)
    assert why_not(replace(alone, tp=2), 4096) == ""
    text = why_not(alone, 4096)
    for part in ("llama-2-70b does not fit on 1 x h100-sxm", "138.0 GB for weights", "smallest tp that fits is 2"):
        assert part in text
    assert fits(replace(alone, tp=2), 4096)
    with_draft = why_not(alone, 4096, model("llama-2-7b"))
    assert "with draft llama-2-7b" in with_draft
    assert re.search(r"151\.4 GB for weights", with_draft)


def test_why_not_says_when_nothing_helps() -> None:
    opt = Deployment(model("opt-66b"), accelerator("l40s"), limits=Limits(gpu_memory_utilization=0.1))
    assert "no tp up to 16 fits" in why_not(opt, 2048)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: weights_per_gpu(SEVENTY, 3), r"`tp` must split the 64 heads.*got 3"),
        (lambda: free_for_kv(LLAMA13, DRAFT, 2), r"`draft_tp` must be an integer from 1 to the target's tp = 1.*got 2"),
        (lambda: free_for_kv(Deployment(SEVENTY, H100, tp=8), DRAFT, 8), r"`tp` must split the 12 heads"),
        (lambda: largest_batch(LLAMA13, 0), r"`tokens_per_sequence` must be finite and above 0"),
        (lambda: largest_batch(LLAMA13, math.nan), r"`tokens_per_sequence` must be finite"),
        (lambda: largest_batch(LLAMA13, 10, lookahead=-1), r"`lookahead` must be at least 0"),
        (lambda: dollars(-1.0, 2.0), r"`gpu_seconds` must be finite and at least 0 \[GPU s\]; got -1.0"),
        (lambda: dollars(1.0, math.nan), r"`price` must be finite"),
        (lambda: gpu_seconds(1.0, 0.0), r"`price` must be finite and above 0 \[\$/GPU/h\]; got 0.0"),
        (lambda: dollars_per_request(8.0, 2.5, 0.0), r"`requests_per_s` must be finite and above 0"),
        (lambda: dollars_per_million_tokens(8.0, 2.5, 0.0), r"`tokens_per_s` must be finite and above 0"),
        (lambda: dollars_per_correct_answer(1.0, 84.0), r"`quality` must lie in \(0, 1\].*pass 0.84, not 84"),
        (lambda: dollars_per_correct_answer(1.0, 0.0), r"`quality` must lie in \(0, 1\]"),
    ],
)
def test_refusals(call: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        call()  # type: ignore[operator]


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1e9), st.floats(1e-3, 1e3))
def test_gpu_seconds_is_the_inverse_of_dollars(seconds: float, price: float) -> None:
    assert gpu_seconds(dollars(seconds, price), price) == pytest.approx(seconds, rel=1e-12, abs=1e-300)


def test_a_node_hour_adds_up() -> None:
    # 8 GPUs at $2.50 an hour for one hour are $20, whichever way they are counted
    rate, tokens = 2.0, 400.0
    assert dollars(8 * 3600.0, 2.5) == 20.0
    assert dollars_per_request(8.0, 2.5, rate) * rate * 3600 == pytest.approx(20.0)
    assert dollars_per_million_tokens(8.0, 2.5, tokens) * tokens * 3600 / 1e6 == pytest.approx(20.0)
    assert dollars_per_correct_answer(dollars_per_request(8.0, 2.5, rate), 0.5) * rate * 0.5 * 3600 == pytest.approx(20)


def test_cost_takes_arrays() -> None:
    rates = np.array([1.0, 2.0])
    assert dollars_per_request(np.array([8.0, 8.0]), 3.6, rates).tolist() == pytest.approx([8e-3, 4e-3])
    assert joules_at_most(np.array([1.0, 2.0]), H100).tolist() == [700.0, 1400.0]


def test_energy_lies_between_idle_and_the_board_limit() -> None:
    held = 10.0
    assert joules(held, 0.0, H100) == pytest.approx(SERVING.idle * 7000)
    assert joules(held, held, H100) == pytest.approx(SERVING.busy * 7000)
    assert joules(held, held, H100) < joules_at_most(held, H100)
    np.testing.assert_allclose(np.diff(joules(np.full(3, held), np.array([0.0, 5.0, 10.0]), H100)), 0.45 * 3500)
    with pytest.raises(InputError, match=r"`busy` must be at most the 10.0 held \[GPU s\]; got 11.0"):
        joules(held, 11.0, H100)
    with pytest.raises(InputError, match=r"`draw` must ascend within \[0, 1\]"):
        Draw(idle=0.5, busy=0.4, busy_low=0.2, source="a slip")

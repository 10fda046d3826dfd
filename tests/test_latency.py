"""theory/latency.py: limits, refusals, physical properties, agreement with second routes."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.profiles import available_profiles, load_profile, transfer
from theory.catalog import accelerator, model
from theory.errors import InputError
from theory.latency import (
    _KEPT,
    AT_LEAST_ONE,
    PARTS,
    Efficiency,
    Pass,
    Profile,
    StepTime,
    _products,
    allreduce_time,
    decode_attention_time,
    gemm_time,
    prefill_attention_time,
    roofline_time,
    step_time,
    step_time_interval,
    verify_knee,
)
from theory.specs import Accelerator
from theory.work import decode_flops, head_gemm, kv_bytes_per_token, layer_gemms, weight_bytes

H100 = accelerator("h100-sxm")
PROFILES = [load_profile(name) for name in available_profiles()]
PLAIN = Profile("plain", "h100-sxm", "test", "assumed", Efficiency(), residual=dict.fromkeys(PARTS, 0.1))
MODELS = ("llama-2-7b", "llama-2-13b", "codellama-34b", "llama-2-70b", "llama-3.1-8b", "opt-13b")
calm = settings(deadline=None, max_examples=40)
profiles = st.sampled_from(PROFILES)
models = st.sampled_from(MODELS)
degrees = st.sampled_from((1, 2, 4, 8))
batches = st.integers(1, 512)
queries = st.integers(1, 9)
contexts = st.floats(0, 32768)
precisions = st.sampled_from(("bf16", "fp8"))


def total(profile: Profile, name: str, work: Pass, tp: int = 1, precision: str = "bf16") -> np.ndarray:
    return step_time(model(name), accelerator(profile.accelerator), profile, work, tp, precision).total  # type: ignore[arg-type]


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_product_without_rows_takes_no_time() -> None:
    assert gemm_time(0, 4096, 4096, H100, Efficiency()) == 0.0


def test_one_gpu_does_not_communicate() -> None:
    assert step_time(model("llama-2-7b"), H100, PLAIN, Pass(8, 1, 100)).communication == 0.0


def test_attention_without_sequences_takes_no_time() -> None:
    assert decode_attention_time(0, 1, 1000, 32, 8, 128, H100, Efficiency()) == 0.0
    assert prefill_attention_time(0, 0, 1, 32, 8, 128, H100, Efficiency()) == 0.0


def test_lm_head_sees_only_sampled_rows() -> None:
    m = model("llama-2-70b")
    head = head_gemm(m, 4)
    for work, rows in ((Pass(8, 5, 100), 40), (Pass(0, 1, 0, 512, 0, 2), 2), (Pass(8, 1, 100, 512), 9)):
        both = step_time(m, H100, PLAIN, work, 4), step_time(m, H100, PLAIN, work, 4, head=False)
        expected = gemm_time(rows, head.n, head.k, H100, Efficiency())
        assert both[0].total - both[1].total == pytest.approx(float(expected), rel=1e-9)


def test_products_agree_with_the_shapes_of_work() -> None:
    m = model("codellama-34b")
    for tp in (1, 2, 4, 8):
        time = step_time(m, H100, PLAIN, Pass(16, 4, 100), tp, head=False)
        route = sum(g.calls * gemm_time(64, g.n, g.k, H100, Efficiency()) for g in layer_gemms(m, tp))
        assert float(time.weights + time.compute) == pytest.approx(float(route), rel=1e-12)
        wrong = sum(g.calls * gemm_time(64, g.n, g.k, H100, Efficiency()) for g in layer_gemms(m, 16 // tp))
        assert tp == 4 or abs(float(time.weights + time.compute) / float(wrong) - 1) > 0.05  # the test can fail


def test_roofline_of_one_token_is_weights_over_bandwidth() -> None:
    m = model("llama-2-70b")
    bound = roofline_time(m, H100, Pass(1, 1, 0))
    streamed = weight_bytes(m) - 2 * m.vocab * m.hidden  # the embedding table is not streamed
    assert float(bound.weights) == pytest.approx(streamed / H100.bandwidth, rel=1e-3)
    assert float(bound.compute) == 0.0


def test_roofline_of_a_long_prefill_is_flops_over_rate() -> None:
    m, tokens = model("llama-2-7b"), 4000.0
    bound = roofline_time(m, H100, Pass(0, 1, 0, tokens))
    head = 2 * m.vocab * m.hidden  # the head sees one row only
    flops = tokens * (decode_flops(m, tokens / 2) - head)
    assert float(bound.total) == pytest.approx(flops / H100.flops_bf16, rel=0.01)


def test_kv_cache_is_read_at_memory_bandwidth_when_it_is_large() -> None:
    m, e = model("llama-2-7b"), Efficiency()
    base, more = (step_time(m, H100, PLAIN, Pass(256, 1, s)).attention for s in (20000.0, 40000.0))
    read = kv_bytes_per_token(m) * 256 * 20000
    assert float(more - base) == pytest.approx(read / (H100.bandwidth * e.kv_bandwidth), rel=1e-6)


def test_a_partly_filled_wave_of_attention_costs_its_share_of_a_whole_one() -> None:
    """Twice 132 blocks make a wave: one sequence more starts the next, which costs kv_wave of a whole one."""
    e = Efficiency(kv_wave=0.4, kv_stream=40.0)
    full, over, twice = (
        float(decode_attention_time(b, 1, 8000, 8, 8, 128, H100, e)) - e.attention_start for b in (33, 34, 66)
    )
    assert twice == pytest.approx(2 * full, rel=1e-9)
    assert over == pytest.approx(full * (0.6 * 34 / 33 + 0.4 * 2), rel=1e-9)


def test_few_readers_stream_slower_and_full_waves_do_not() -> None:
    """A tile of 64 columns is read by 8 SMs at most (splits): they draw s x 8 / (132 + 8 (s - 1)) of the bandwidth."""
    e = Efficiency(gemm_start=0.0, split_start=0.0, gemm_stream=5.0, gemm_knee=20.0)
    n, k = 64.0, 2.0**26
    streamed = 2 * (n * k + n + k) / (H100.bandwidth * e.gemm_bandwidth)
    few = float(gemm_time(1, n, k, H100, e))
    assert few == pytest.approx(streamed * (132 + 8 * 4) / (5 * 8), rel=1e-3)
    full = float(gemm_time(1, 132 * 256.0, 8192.0, H100, e))
    assert full == pytest.approx(2 * 132 * 256 * 8192 / (H100.bandwidth * e.gemm_bandwidth), rel=1e-3)


def test_fp8_halves_weight_streaming_but_not_the_head() -> None:
    m = model("llama-2-70b")
    times = [roofline_time(m, H100, Pass(1, 1, 0), 4, p) for p in ("bf16", "fp8")]  # type: ignore[arg-type]
    head = 2 * head_gemm(m, 4).n * m.hidden / H100.bandwidth
    assert float(times[1].weights - head) == pytest.approx(float(times[0].weights - head) / 2, rel=1e-9)


def test_an_eager_engine_waits_for_its_launches() -> None:
    m, floor = model("llama-2-7b"), 400e-6
    eager = replace(PLAIN, efficiency=Efficiency(eager_layer=floor))
    small, large = Pass(1, 1, 10), Pass(0, 1, 0, 8192)
    assert float(step_time(m, H100, eager, small).total) == pytest.approx(m.layers * floor, rel=1e-9)
    assert float(step_time(m, H100, eager, large).overhead) == 0.0


def test_host_time_is_per_step_and_sequence() -> None:
    slow = replace(PLAIN, efficiency=Efficiency(host_step=1e-3, host_sequence=1e-5))
    time = step_time(model("llama-2-7b"), H100, slow, Pass(8, 1, 10, 100, 0, 2))
    assert float(time.overhead) == pytest.approx(1e-3 + 10e-5)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_pass_without_tokens_is_refused() -> None:
    with pytest.raises(InputError, match=r"`sequences` must give each pass at least one new token.*`prefill_tokens`"):
        Pass(0)


def test_negative_context_is_refused() -> None:
    with pytest.raises(InputError, match=r"`context` must be finite and at least 0; got -1"):
        Pass(1, 1, -1)


def test_a_degree_that_does_not_split_is_refused() -> None:
    with pytest.raises(InputError, match=r"`tp` must split the 32 heads.*got 3"):
        step_time(model("llama-2-7b"), H100, PLAIN, Pass(1), np.array([1, 3]))


def test_a_fractional_degree_is_refused() -> None:
    with pytest.raises(InputError, match=r"`tp` must be an integer"):
        step_time(model("llama-2-7b"), H100, PLAIN, Pass(1), 2.0)  # type: ignore[arg-type]


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match=r"`precision` must be one of bf16, fp8; got 'int4'"):
        step_time(model("llama-2-7b"), H100, PLAIN, Pass(1), 1, "int4")  # type: ignore[arg-type]


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(InputError, match=r"`gemm_bandwidth` must lie in \(0, 1\].*got 1.2"):
        Efficiency(gemm_bandwidth=1.2)


def test_a_falling_allreduce_curve_is_refused() -> None:
    with pytest.raises(InputError, match=r"`allreduce` must give each number of GPUs"):
        replace(PLAIN, allreduce={2: ((1e3, 2e-5), (1e4, 1e-5))})


def test_a_level_in_percent_is_refused() -> None:
    with pytest.raises(InputError, match=r"`level` must lie in \(0, 1\).*got 90.*Pass 0.9"):
        step_time_interval(model("llama-2-7b"), H100, PLAIN, Pass(1), level=90)


def test_an_interval_without_spreads_is_refused() -> None:
    with pytest.raises(InputError, match=r"`residual` must give a spread of gemm, attention"):
        step_time_interval(model("llama-2-7b"), H100, replace(PLAIN, residual={}), Pass(1))


# --- physical properties ---------------------------------------------------------------------------------------------


@calm
@given(profiles, models, degrees, batches, queries, contexts, precisions, st.integers(1, 64), st.floats(0, 4096))
def test_time_grows_with_batch_query_and_context(
    profile: Profile, name: str, tp: int, b: int, q: int, s: float, precision: str, more: int, longer: float
) -> None:
    base = total(profile, name, Pass(b, q, s), tp, precision) * (1 - 1e-12)
    assert total(profile, name, Pass(b + more, q, s), tp, precision) >= base
    assert total(profile, name, Pass(b, q + 1, s), tp, precision) >= base
    assert total(profile, name, Pass(b, q, s + longer), tp, precision) >= base


@calm
@given(profiles, models, degrees, st.integers(1, 16384), st.integers(1, 1024), contexts)
def test_time_grows_with_the_prompt(profile: Profile, name: str, tp: int, p: int, more: int, cached: float) -> None:
    base = total(profile, name, Pass(0, 1, 0, p, cached), tp) * (1 - 1e-12)
    assert total(profile, name, Pass(0, 1, 0, p + more, cached), tp) >= base
    assert total(profile, name, Pass(4, 1, 500, p, cached), tp) >= base


@calm
@given(profiles, models, degrees, batches, contexts)
def test_time_grows_with_layers(profile: Profile, name: str, tp: int, b: int, s: float) -> None:
    m, gpu = model(name), accelerator(profile.accelerator)
    deeper = replace(m, layers=m.layers + 1)
    assert (
        step_time(deeper, gpu, profile, Pass(b, 1, s), tp).total > step_time(m, gpu, profile, Pass(b, 1, s), tp).total
    )


@calm
@given(profiles, models, degrees, batches, queries, contexts, precisions, st.integers(0, 8192))
def test_never_below_the_datasheet(
    profile: Profile, name: str, tp: int, b: int, q: int, s: float, precision: str, p: int
) -> None:
    work, gpu = Pass(b, q, s, p), accelerator(profile.accelerator)
    bound = roofline_time(model(name), gpu, work, tp, precision).total  # type: ignore[arg-type]
    assert total(profile, name, work, tp, precision) >= bound


@calm
@given(
    profiles, st.sampled_from(("llama-2-13b", "codellama-34b", "llama-2-70b")), st.integers(1, 32), st.floats(0, 4096)
)
def test_two_gpus_are_not_slower_on_weights_bound_decode(profile: Profile, name: str, b: int, s: float) -> None:
    one, two = (total(profile, name, Pass(b, 1, s), tp) for tp in (1, 2))
    assert two < one


def faster_clock(gpu: Accelerator, factor: float) -> Accelerator:
    """Return the accelerator with every rate multiplied."""
    rates = ("bandwidth", "flops_bf16", "flops_fp8", "link_bandwidth")
    return replace(gpu, **{r: getattr(gpu, r) * factor for r in rates})


TIMES = ("start", "floor", "hop", "row", "combine", "step", "sequence", "layer")


@calm
@given(models, degrees, batches, queries, contexts, st.floats(0.1, 10))
def test_units_scale(name: str, tp: int, b: int, q: int, s: float, factor: float) -> None:
    """With every rate multiplied and every fixed time divided by a factor, a step takes 1 / factor of its time."""
    e = Efficiency()
    changed = {}
    for f in fields(e):
        if f.name.endswith("feed"):
            changed[f.name] = getattr(e, f.name) * factor
        elif f.name.endswith(TIMES):
            changed[f.name] = getattr(e, f.name) / factor
    work, m = Pass(b, q, s, 100), model(name)
    base = step_time(m, H100, PLAIN, work, tp).total
    scaled = step_time(m, faster_clock(H100, factor), replace(PLAIN, efficiency=replace(e, **changed)), work, tp).total
    assert float(scaled * factor) == pytest.approx(float(base), rel=1e-9)


# --- vectorised ------------------------------------------------------------------------------------------------------


def test_arrays_agree_with_single_calls() -> None:
    rng = np.random.default_rng(0)
    b, q, s, p = (
        rng.integers(1, 300, 60),
        rng.integers(1, 9, 60),
        rng.uniform(0, 9000, 60),
        rng.integers(0, 3, 60) * 700,
    )
    tp = rng.choice([1, 2, 4, 8], 60)
    m, profile = model("llama-2-70b"), load_profile("h100-sxm")
    together = step_time(m, H100, profile, Pass(b, q, s, p), tp)
    for i in range(60):
        alone = step_time(m, H100, profile, Pass(b[i], q[i], s[i], p[i]), int(tp[i]))
        for name, part in together.parts().items():
            assert part[i] == pytest.approx(float(getattr(alone, name)), rel=1e-12, abs=1e-18)


def test_many_points_agree_with_few() -> None:
    """Above a size, products come from a table over distinct token counts; it must not change anything."""
    rng = np.random.default_rng(1)
    b, s = rng.integers(1, 400, 5000), rng.uniform(0, 4000, 5000)
    m, profile = model("codellama-34b"), load_profile("h100-sxm-vllm")
    many = step_time(m, H100, profile, Pass(b, 5, s), 2).total
    few = np.concatenate(
        [
            step_time(m, H100, profile, Pass(x, 5, y), 2).total
            for x, y in zip(np.split(b, 50), np.split(s, 50), strict=True)
        ]
    )
    assert np.allclose(many, few, rtol=1e-12)


def test_many_degrees_agree_with_one_at_a_time() -> None:
    rng = np.random.default_rng(4)
    b, tp = rng.uniform(0.2, 400, 4000), rng.choice([1, 2, 8], 4000)
    m, profile = model("llama-2-13b"), load_profile("h100-sxm")
    together = step_time(m, H100, profile, Pass(b, 1, 700), tp).total
    for degree in (1, 2, 8):
        alone = step_time(m, H100, profile, Pass(b[tp == degree], 1, 700), degree).total
        assert np.allclose(together[tp == degree], alone, rtol=1e-12)


def test_fractional_batches_lie_between_whole_ones() -> None:
    m, profile = model("llama-2-7b"), load_profile("h100-sxm")
    low, mid, high = (step_time(m, H100, profile, Pass(b, 1, 0)) for b in (64.0, 64.25, 65.0))
    for part in ("compute", "elementwise"):
        expected = 0.75 * getattr(low, part) + 0.25 * getattr(high, part)
        assert getattr(mid, part) == pytest.approx(float(expected), rel=1e-9)


def test_fields_and_degrees_broadcast() -> None:
    work = Pass(np.arange(1, 5)[:, None, None], 3, np.arange(1, 7)[None, :, None])
    time = step_time(model("llama-2-7b"), H100, PLAIN, work, np.array([1, 2, 4]))
    assert isinstance(time, StepTime)
    assert time.total.shape == (4, 6, 3)
    assert all(part.shape == (4, 6, 3) for part in time.parts().values())


def test_parts_add_up() -> None:
    time = step_time(model("llama-2-70b"), H100, load_profile("h100-sxm"), Pass(32, 5, 2048, 300), 4)
    assert float(time.total) == pytest.approx(sum(float(v) for v in time.parts().values()))


# --- all-reduce, knee, interval --------------------------------------------------------------------------------------


def test_measured_allreduces_are_used_between_their_knots() -> None:
    curves = {2: ((1e3, 1e-5), (1e6, 4e-5))}
    args = (H100, Efficiency(), curves)
    assert float(allreduce_time(1.0, 2, *args)) == 1e-5
    assert float(allreduce_time(1e6, 2, *args)) == 4e-5
    beyond = float(allreduce_time(2e6, 2, *args))
    assert beyond == pytest.approx(4e-5 + 1e6 / (H100.link_bandwidth * Efficiency().link_bandwidth), rel=1e-9)
    assert float(allreduce_time(1e3, 4, *args)) == float(allreduce_time(1e3, 4, H100, Efficiency()))  # the law


def test_knee_lies_where_compute_catches_up_with_streaming() -> None:
    """A step costs 20 % more near the token count at which FLOPs take as long as bytes, the ridge F / B."""
    m, e = model("llama-2-70b"), load_profile("h100-sxm-vllm").efficiency
    ridge = (H100.flops_bf16 * e.gemm_flops) / (H100.bandwidth * e.gemm_bandwidth)
    knee = verify_knee(m, H100, load_profile("h100-sxm-vllm"), 512.0, 4, query=4.0)
    assert 0.5 * ridge < knee < 1.5 * ridge


def test_a_dearer_knee_comes_later_and_may_never_come() -> None:
    m = model("llama-2-13b")
    knees = [verify_knee(m, H100, PLAIN, 1024.0, extra=x) for x in (0.1, 0.5, 1.0)]
    assert knees == sorted(knees)
    assert verify_knee(m, H100, PLAIN, 1024.0, extra=100.0) == math.inf


def noisy_steps(spread: float, rng: np.random.Generator, draws: int = 4000) -> tuple[np.ndarray, Pass]:
    """Return step times of Llama-2-7b, TP 1, whose kernels err independently by ``spread`` in the logarithm [s]."""
    m, work = model("llama-2-7b"), Pass(8, 1, 1000)
    time = step_time(m, H100, PLAIN, work)
    kernels = [float(g.calls * gemm_time(8, g.n, g.k, H100, Efficiency())) for g in (*layer_gemms(m), head_gemm(m))]
    kernels += [float(time.attention), float(time.elementwise)]
    return np.exp(rng.normal(0, spread, (draws, len(kernels)))) @ np.array(kernels), work


def test_intervals_cover_what_they_say() -> None:
    steps, work = noisy_steps(0.1, np.random.default_rng(2))
    low, high = step_time_interval(model("llama-2-7b"), H100, PLAIN, work, level=0.9)
    covered = np.mean((steps > low) & (steps < high))
    assert 0.87 < covered < 0.93
    narrow = step_time_interval(model("llama-2-7b"), H100, PLAIN, work, level=0.5)
    assert np.mean((steps > narrow[0]) & (steps < narrow[1])) < 0.6  # the test can fail


def test_parameter_covariance_widens_the_interval() -> None:
    m, work = model("llama-2-70b"), Pass(1, 1, 100)
    exact = replace(PLAIN, residual=dict.fromkeys(PARTS, 0.0))
    unsure = replace(exact, parameters=("gemm_bandwidth",), covariance=((0.05**2,),))
    assert [float(x) for x in step_time_interval(m, H100, exact, work)] == pytest.approx(
        [float(step_time(m, H100, exact, work).total)] * 2
    )
    low, high = step_time_interval(m, H100, unsure, work)
    share = float(step_time(m, H100, exact, work).weights / step_time(m, H100, exact, work).total)
    assert math.log(high / low) / 2 / 1.645 == pytest.approx(0.05 * share, rel=0.1)


@pytest.mark.parametrize("name", [f.name for f in fields(Efficiency)])
def test_a_product_is_kept_only_for_what_it_depends_on(name: str) -> None:
    """A step asked after another that differs in one efficiency is the one a fresh process would give."""
    m, moved = model("llama-2-70b"), replace(Efficiency(), **{name: getattr(Efficiency(), name) * 0.97 + 1e-9})
    if name in AT_LEAST_ONE or name == "down_boost":
        moved = replace(Efficiency(), **{name: 1.02})
    work, tp = Pass(np.array([3.0, 700.0]), 1, 100.0), np.asarray(8)
    before, after = (_products(m, H100, e, work, tp, "fp8", True) for e in (Efficiency(), moved))
    _KEPT[0][0].clear()
    fresh = _products(m, H100, moved, work, tp, "fp8", True)
    assert all(np.array_equal(a, b) for a, b in zip(after, fresh, strict=True))
    if name == "fp8_start":
        assert not np.array_equal(before[0], after[0])  # the test can fail


def test_a_transferred_profile_is_less_sure() -> None:
    profile, h200 = load_profile("h100-sxm-vllm"), accelerator("h200-sxm")
    moved = transfer(profile, h200)
    assert moved.provenance == "transferred"
    assert moved.accelerator == "h200-sxm"
    work, m = Pass(8, 1, 1000), model("llama-2-13b")
    widths = [
        float(np.log(np.divide(*step_time_interval(m, gpu, p, work)[::-1])))
        for gpu, p in ((H100, profile), (h200, moved))
    ]
    assert widths[1] > widths[0]

"""Prompts that begin alike: what is found in the KV cache, what it saves, what is forgotten; readers and scenarios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from planner.build import resolve
from planner.scenario import load_scenario
from planner.service import Load
from planner.simulate import simulate_scenario
from simulator.cluster import TierSetup, simulate_tier
from simulator.engine import Records, StepTable, simulate
from simulator.prefixes import PromptBlocks
from simulator.traces import read_trace
from simulator.workload import Workload
from theory.errors import InputError
from theory.specs import Limits

STEP, HOST, TOKEN, PAIR = 0.02, 0.003, 1e-4, 1e-6  # decode, prompts alone [s], prompt token [s], pair of tokens [s]
BLOCK, PLENTY = 4, 10**7  # tokens


def table(slots: int = 4) -> StepTable:
    base = np.full((1, slots + 1), STEP)
    base[0, 0] = HOST
    return StepTable([0], base, np.zeros(base.shape), [0, 1e4], [0, 1e4 * TOKEN], PAIR)


def limits(**change: Any) -> Limits:
    return Limits(**({"max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": BLOCK} | change))


def run(arrival: list[float], names: list[list[int]], kv: int = PLENTY, output: int = 1, **change: Any) -> Records:
    """Requests whose prompts have three tokens behind the blocks of four that are named."""
    prompt = [BLOCK * len(n) + 3 for n in names]
    work = Workload(arrival, prompt, np.full(len(names), output), blocks=PromptBlocks.of(BLOCK, names))
    return simulate(work, table(), limits(**change), kv)


def prefill(tokens: int, cached: int) -> float:
    return HOST + tokens * TOKEN + PAIR * tokens * (cached + tokens / 2)


def test_a_prompt_that_begins_like_one_before_computes_the_rest() -> None:
    """The second shares two of its three blocks; with other names it shares nothing, alike or not."""
    shared = run([0.0, 1.0], [[1, 2, 3], [1, 2, 9]])
    assert shared.found.tolist() == [0, 8]
    np.testing.assert_allclose(shared.first_token - shared.arrival, [prefill(15, 0), prefill(7, 8)])
    apart = run([0.0, 1.0], [[1, 2, 3], [7, 2, 3]])  # a block in the cache does not count behind one that is not
    assert apart.found.tolist() == [0, 0]
    np.testing.assert_allclose(apart.first_token - apart.arrival, prefill(15, 0))


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    work = Workload([0.0, 1.0], [12, 12], [1, 1], blocks=PromptBlocks.of(BLOCK, [[1, 2, 3]] * 2))
    found = simulate(work, table(), limits(), PLENTY)
    assert found.found.tolist() == [0, 8]  # the third block ends with it


def test_a_burst_of_one_prompt_computes_it_once_and_holds_it_once() -> None:
    """Admitted in one step: the first computes 15 tokens, the others 3 behind its three blocks."""
    burst = run([0.0] * 4, [[1, 2, 3]] * 4, output=2)
    assert burst.found.tolist() == [0, 12, 12, 12]
    assert burst.kv_peak_tokens == 12 + 4 * BLOCK  # one block each for the end of the prompt and the output
    apart = run([0.0] * 4, [[4 * i, 4 * i + 1, 4 * i + 2] for i in range(4)], output=2)
    assert apart.kv_peak_tokens == 4 * (12 + BLOCK)
    assert burst.end_s < apart.end_s


def test_what_nobody_holds_gives_way_the_oldest_first() -> None:
    """Each request needs three blocks, six are named: seven hold all; of six the end of the oldest goes, then more."""
    names = [[1, 2], [3, 4], [5, 6], [1, 2], [3, 4]]
    for blocks, expected in ((7, [0, 0, 0, 8, 8]), (6, [0, 0, 0, 4, 4]), (5, [0] * 5)):
        found = run(np.arange(5.0).tolist(), names, kv=blocks * BLOCK)
        assert found.found.tolist() == expected
        assert found.kv_peak_tokens == 3 * BLOCK  # what nobody holds is free


def test_a_preempted_request_finds_its_own_prompt_again() -> None:
    """Two grow into eleven blocks, seven each: one is preempted, unless they share three; it computes only the rest."""
    names = [[1, 2, 3], [4, 5, 6]]
    apart, alike = (run([0.0, 0.0], n, kv=11 * BLOCK, output=12) for n in (names, [[1, 2, 3]] * 2))
    assert apart.preemptions.tolist() == [0, 1]
    assert alike.preemptions.tolist() == [0, 0]
    unnamed = simulate(Workload([0.0, 0.0], [15, 15], [12, 12]), table(), limits(), 11 * BLOCK)
    assert unnamed.preemptions.tolist() == [0, 1]
    assert apart.found.tolist() == [0, 0]  # of the first admission
    assert apart.end_s < unnamed.end_s - 11 * TOKEN


def test_each_replica_has_a_cache_of_its_own() -> None:
    names = [[1, 2, 3]] * 4
    work = Workload(np.arange(4.0), [15] * 4, [1] * 4, blocks=PromptBlocks.of(BLOCK, names))
    for routing in ("round-robin", "least-outstanding"):
        tier = TierSetup("t", table(), limits(), PLENTY, replicas=2, routing=routing)  # type: ignore[arg-type]
        expected = [0, 0, 12, 12] if routing == "round-robin" else [0, 12, 12, 12]  # idle ones: always the first
        assert simulate_tier(work, tier, 0).found.tolist() == expected


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 60), order=st.permutations(range(5)))
def test_a_cache_without_end_finds_what_was_seen_before(seed: int, count: int, order: list[int]) -> None:
    """One request at a time: the engine finds the longest beginning of any prompt before, by comparison of lists."""
    rng = np.random.default_rng(seed)
    names: list[list[int]] = []
    for i in range(count):
        start = names[rng.integers(i)] if i else []
        names.append(
            [*start[: rng.integers(0, len(start) + 1)], *(order[k] + 10 * i for k in range(rng.integers(0, 4)))]
        )
    found = run((np.arange(count) * 10.0).tolist(), names).found
    longest = [max((alike(n, m) for m in names[:i]), default=0) for i, n in enumerate(names)]
    np.testing.assert_array_equal(found, BLOCK * np.array(longest))
    prompt = np.array([BLOCK * len(n) + 3 for n in names])
    np.testing.assert_array_equal(found, PromptBlocks.of(BLOCK, names).seen_before(prompt))


def alike(a: list[int], b: list[int]) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def che(share: np.ndarray, places: float) -> float:
    """Hit ratio of a least-recently-used cache under independent references (Che, Tung & Wang 2002, IEEE JSAC 20:7)."""
    time = brentq(lambda t: float(-np.expm1(-share * t).sum()) - places, 0.0, 1e9)
    return float(share @ -np.expm1(-share * time))


def test_the_share_that_is_found_is_that_of_a_least_recently_used_cache() -> None:
    """One block a prompt, drawn by Zipf's law, one request at a time: Che's approximation; half the cache is not it."""
    rng = np.random.default_rng(0)
    share = 1.0 / np.arange(1, 3001) ** 0.8
    share /= share.sum()
    count, places = 120_000, 300
    names = rng.choice(share.size, count, p=share)
    blocks = PromptBlocks(BLOCK, np.ones(count, int), names)
    work = Workload(np.arange(count) * 1.0, np.full(count, BLOCK + 1), np.ones(count), blocks=blocks)
    kv = BLOCK * (places + 1)  # one is taken by the end of the prompt that is computed
    hit = simulate(work, table(1), limits(max_num_seqs=1), kv).found[count // 10 :] > 0
    error = 2.81 * float(hit.std()) / np.sqrt(hit.size) + 0.003  # the approximation's own error is of this order
    assert abs(hit.mean() - che(share, places)) < error
    assert abs(hit.mean() - che(share, places / 2)) > 10 * error


# ---------------------------------------------------------------------------------------------------------------------
# Refusals, traces, scenarios
# ---------------------------------------------------------------------------------------------------------------------


def test_bad_blocks_are_refused() -> None:
    with pytest.raises(InputError, match=r"`blocks\[1\]` must be at most 2, 4 tokens each.*got 3"):
        Workload([0.0, 1.0], [9, 5], [1, 1], blocks=PromptBlocks.of(4, [[1, 2, 3], [1, 2, 3]]))
    with pytest.raises(InputError, match="`blocks` must be those of each request; got 1"):
        Workload([0.0, 1.0], [9, 5], [1, 1], blocks=PromptBlocks.of(4, [[1]]))
    with pytest.raises(InputError, match=r"`names` must be as many as the blocks, 3 \[-\]; got 2"):
        PromptBlocks(4, [1, 2], [1, 2])
    with pytest.raises(InputError, match=r"`tokens` must be a whole number of at least 1 \[tokens\]; got 0"):
        PromptBlocks(0, [1], [1])
    work = Workload([0.0], [9], [1], blocks=PromptBlocks.of(6, [[1]]))
    with pytest.raises(InputError, match=r"`blocks.tokens` must be a multiple of `block_size` = 4 \[tokens\]; got 6"):
        simulate(work, table(), limits(), PLENTY)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(at: int, prompt: int, ids: object) -> dict[str, Any]:
    return {"timestamp": at, "input_length": prompt, "output_length": 5, "hash_ids": ids}


def test_hash_ids_are_read_on_request(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(lines([row(2000, 1000, [4, 5]), row(0, 1300, [4, 5, 6]), row(1000, 10, [])]), encoding="utf-8")
    trace = read_trace(path, sort=True, block_tokens=512)
    assert trace.blocks is not None
    assert trace.blocks.counts.tolist() == [3, 0, 2]
    assert trace.blocks.names.tolist() == [4, 5, 6, 4, 5]
    assert trace.at_hand.tolist() == [0, 0, 512]  # the second block of the last one ends with its last token
    assert read_trace(path, sort=True).blocks is None


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (None, "trace line 2, hash_ids` must be a list of whole numbers of at least 0"),
        ([1.5], "trace line 2, hash_ids` must be a list"),
        ([-1], "trace line 2, hash_ids` must be a list"),
        ([True], "trace line 2, hash_ids` must be a list"),
        ([1, 2], "trace line 2, hash_ids` must be at most 1 blocks of 512 tokens; got 2. Give the trace's own length."),
    ],
)
def test_bad_hash_ids_are_refused_by_line(tmp_path: Path, ids: object, text: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(lines([row(0, 100, [1]), row(1, 100, ids)]), encoding="utf-8")
    with pytest.raises(InputError, match=text):
        read_trace(path, block_tokens=512)
    assert read_trace(path).requests == 2


def scenario(tmp_path: Path, *more: str, shared: int = 4) -> Any:
    """Conversations that begin with the same system prompt of ``shared`` blocks; 34B alone on two GPUs."""
    rows = [row(700 * i, 3000, [*range(shared), *(1000 + 10 * i + k for k in range(6 - shared))]) for i in range(400)]
    (tmp_path / "t.jsonl").write_text(lines(rows), encoding="utf-8")
    settings = ["traffic={trace: t.jsonl, requests: 400}", "deployment={tiers: [{tier: 34b, tp: 2}]}", *more]
    return load_scenario(overrides=settings)[0]


def test_a_scenario_reuses_prefixes_on_request(tmp_path: Path) -> None:
    """Four of six blocks are the same: the share found, the load planned for and TTFT say so; else nothing does."""
    found = {}
    for name, more in (("plain", ()), ("reuse", ("traffic.prefix_block_tokens=512",))):
        given_ = scenario(tmp_path, *more)
        result = simulate_scenario(given_, tmp_path, None, 0, lambda *_: None)
        found[name] = result["tiers"][0], Load.of(resolve(given_, tmp_path).workload)
    (plain, plain_load), (reuse, load) = found["plain"], found["reuse"]
    assert plain["cached_prompt_share"] == 0.0
    assert reuse["cached_prompt_share"] == pytest.approx(4 * 512 / 3000)
    assert plain_load.prompt == 3000
    assert load.prompt == pytest.approx(3000 - 4 * 512 * 399 / 400)
    assert reuse["ttft_s"]["mean"] < 0.5 * plain["ttft_s"]["mean"]


def test_scenarios_that_cannot_share_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes `prefix_block_tokens` with a `trace` that names the blocks"):
        load_scenario(overrides=["traffic.prefix_block_tokens=512"])
    reuse = scenario(tmp_path, "traffic.prefix_block_tokens=500")
    with pytest.raises(InputError, match=r"multiple of `block_size` = 16 \[tokens\]; got 500"):
        simulate_scenario(reuse, tmp_path, None, 0, lambda *_: None)
    (tmp_path / "t.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,9,9\n1,9,9\n", encoding="utf-8")
    other = scenario(tmp_path, "traffic={trace: t.csv, prefix_block_tokens: 512}")
    with pytest.raises(InputError, match="`block_tokens` must not be given for a trace whose format has no `hash_ids`"):
        resolve(other, tmp_path)

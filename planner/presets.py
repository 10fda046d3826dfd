"""Engines by name: the values a scenario's ``engine`` takes where ``engine.preset`` is given and a field is not.

Each value says where it is from. *documented*: the engine's own documentation or configuration reference, read in
November 2026. *inferred*: what brings the step model and the engine nearest to the measured closed-loop rows of
AIConfigurator's ``silicon_e2e`` table (Llama-3.1-8B and 70B, Qwen3-32B on H100 and H200; errors are MAPE over those
rows, with the rule and without it); seen in these rows only, not confirmed by a recipe. *assumed*: neither.

Times (host, launches) are those of ``calibration/engines.toml``, by engine and accelerator.

Not expressed by these fields: SGLang reserves a share of the coming output at admission and lowers it as it goes, where
ours grows from nothing.
"""

from __future__ import annotations

Preset = dict[str, bool | int | float]

VLLM: Preset = {
    "max_num_batched_tokens": 8192,  # documented, API server on 80 GB GPUs; inferred: rows want about a prompt per step
    "block_size": 16,  # documented
    "schedule_ahead": 1,  # documented (async scheduling, default from 0.14); inferred: TTFT 11.8 %, without 22.1 %
    "mixed_prefill": True,  # documented (chunked prefill of v1)
    "reserve_output": False,  # documented (preemption by recompute)
    "stream_interval": 1,  # documented
}
TRTLLM: Preset = {
    "max_num_batched_tokens": 8192,  # documented (max_num_tokens); inferred: 70B rows agree, others want a prompt
    "block_size": 32,  # documented (tokens_per_block)
    "schedule_ahead": 1,  # documented (overlap scheduler, on by default); inferred: TTFT 16.5 %, without 27.2 %
    "mixed_prefill": True,  # documented (in-flight batching); inferred: TPOT 4.1 %, with steps of prompts alone 15.9 %
    "reserve_output": True,  # documented (GUARANTEED_NO_EVICT, the default)
    "memory_left": True,  # documented (free_gpu_memory_fraction, 0.9)
    "reserve_bytes": 3.0e9,  # inferred: the rows at the limit of the KV cache
    "stream_interval": 1,  # documented; inferred: rows of 70B, 1024 + 1024 tokens, TP 1 to 4, look like 20
}
SGLANG: Preset = {
    "max_num_batched_tokens": 8192,  # documented (chunked_prefill_size on 80 GB GPUs); prompts only, as they run alone
    "block_size": 1,  # documented (page_size)
    "schedule_ahead": 1,  # documented (overlap schedule, on by default)
    "mixed_prefill": False,  # documented (prefill first; enable_mixed_chunk is off by default)
    "reserve_output": False,  # documented (requests are retracted when the cache is full)
    "stream_interval": 1,  # documented
}
ENGINES: dict[str, Preset] = {"vllm": VLLM, "trtllm": TRTLLM, "sglang": SGLANG}

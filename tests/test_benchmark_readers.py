"""Results of other load generators, from small files of the layouts that they write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from calibration.benchmark_readers import Aggregates, read_benchmark
from calibration.observe import Observation
from planner.observed import aggregate_figures, observed_figures
from theory.errors import InputError

# Four requests, a tenth of a second apart; TTFT 0.1, 0.2, 0.3, 0.4 s, TPOT 0.02 s, 11 tokens; the last one fails.
COUNT, TPOT, OUTPUT = 4, 0.02, 11
TTFT = [0.1, 0.2, 0.3, 0.4]
E2E = [t + (OUTPUT - 1) * TPOT for t in TTFT]


def vllm(**other: Any) -> dict[str, Any]:
    return {
        "model_id": "m",
        "request_rate": "inf",
        "duration": 1.0,
        "completed": 3,
        "failed": 1,
        "total_input_tokens": 24,
        "request_throughput": 3.0,
        "output_throughput": 33.0,
        "mean_ttft_ms": 200.0,
        "median_ttft_ms": 200.0,
        "p99_ttft_ms": 298.0,
        "mean_tpot_ms": 20.0,
        "median_tpot_ms": 20.0,
        "p99_tpot_ms": 20.0,
        "spec_decode_num_drafts": 10,
        "spec_decode_draft_tokens": 30,
        "spec_decode_accepted_tokens": 12,
        "spec_decode_per_position_acceptance_rates": [0.7, 0.4, 0.1],
    } | other


DETAILED = {
    "start_times": [1000 + 0.1 * i for i in range(COUNT)],
    "ttfts": [*TTFT[:3], 0.0],
    "latencies": [*E2E[:3], 0.0],
    "input_lens": [8] * COUNT,
    "output_lens": [OUTPUT] * 3 + [0],
    "errors": ["", "", "", "Traceback"],
}


def guidellm() -> dict[str, Any]:
    def request(i: int) -> dict[str, Any]:
        sent = 1000 + 0.1 * i
        return {
            "info": {"timings": {"last_token_iteration": sent + E2E[i]}},
            "request_start_time": sent,
            "request_end_time": sent + E2E[i] + 0.5,
            "time_to_first_token_ms": 1000 * TTFT[i],
            "prompt_tokens": 8,
            "output_tokens": OUTPUT,
        }

    failed = request(3) | {"time_to_first_token_ms": None, "output_tokens": None}
    return {
        "metadata": {"version": 1},
        "benchmarks": [
            {
                "config": {"strategy": {"type_": "concurrent"}},
                "metrics": {"request_totals": {"successful": 3, "incomplete": 0, "errored": 1, "total": 4}},
                "requests": {"successful": [request(i) for i in range(3)], "incomplete": [], "errored": [failed]},
            }
        ],
    }


def aiperf_records() -> str:
    def record(i: int) -> dict[str, Any]:
        start = 1_759_813_207_000_000_000 + 100_000_000 * i
        return {
            "metadata": {"request_start_ns": start, "request_end_ns": start + 5, "was_cancelled": False},
            "metrics": {
                "time_to_first_token": {"value": 1000 * TTFT[i], "unit": "ms"},
                "request_latency": {"value": E2E[i], "unit": "sec"},
                "input_sequence_length": {"value": 8, "unit": "tokens"},
                "output_sequence_length": {"value": OUTPUT, "unit": "tokens"},
            },
            "error": None,
        }

    failed = record(3) | {"metrics": {}, "error": {"code": 429, "type": "HTTPError", "message": "slow down"}}
    return "\n".join(json.dumps(r) for r in [*(record(i) for i in range(3)), failed])


def aiperf() -> dict[str, Any]:
    def metric(unit: str, avg: float, **other: float) -> dict[str, Any]:
        return {"unit": unit, "avg": avg, **other}

    return {
        "request_latency": metric("ms", 400.0, p50=400.0, p90=480.0, p95=490.0, p99=498.0),
        "time_to_first_token": metric("ms", 200.0, p50=200.0, p90=280.0, p95=290.0, p99=298.0),
        "inter_token_latency": metric("ms", 20.0, p50=20.0, p90=20.0, p95=20.0, p99=20.0),
        "request_throughput": metric("requests/sec", 3.0),
        "output_token_throughput": metric("tokens/sec", 33.0),
        "request_count": metric("requests", 3.0),
        "error_request_count": metric("requests", 1.0),
    }


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "result.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("content", "failure"),
    [(vllm(**DETAILED), "failed"), (guidellm(), "failed"), (aiperf_records(), "http_429")],
    ids=["vllm", "guidellm", "aiperf"],
)
def test_requests_of_each_tool_are_the_same_run(content: Any, failure: str, tmp_path: Path) -> None:
    seen = read_benchmark(written(tmp_path, content))
    assert isinstance(seen, Observation)
    assert seen.errors() == {failure: 1}
    assert seen.ttft[:3] == pytest.approx(TTFT[:3], abs=1e-6)
    assert seen.tpot[:3] == pytest.approx([TPOT] * 3, abs=1e-6)
    assert seen.e2e[:3] == pytest.approx(E2E[:3], abs=1e-6)
    assert seen.sent[0] == 0
    figures = observed_figures(seen)
    assert (figures["requests"], figures["answered"]) == (4, 3)
    if seen.closed:
        assert figures["ttft_s"]["mean"] == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize("content", [vllm(), aiperf()], ids=["vllm", "aiperf"])
def test_aggregates_of_each_tool_are_the_same_run(content: Any, tmp_path: Path) -> None:
    read = read_benchmark(written(tmp_path, content))
    assert isinstance(read, Aggregates)
    figures = aggregate_figures(read)
    assert figures["ttft_s"]["mean"] == pytest.approx(0.2)
    assert figures["ttft_s"]["p99"] == pytest.approx(0.298)
    assert figures["tpot_s"]["mean"] == pytest.approx(0.02)
    assert figures["ttft_s"]["interval"] == [None, None]  # no requests, no interval
    assert (figures["requests"], figures["answered"], figures["errors"]) == (4, 3, {"failed": 1})
    assert figures["throughput"]["output_tokens_per_s"] == 33.0
    json.dumps(figures, allow_nan=False)


def test_speculation_of_vllm_is_read(tmp_path: Path) -> None:
    read = read_benchmark(written(tmp_path, vllm()))
    spent = read.speculation
    assert spent is not None
    assert (spent.acceptance, spent.tokens_per_round) == (0.4, 2.2)
    assert math.fsum(spent.by_position) == pytest.approx(spent.accepted)


def without(tree: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in tree.items() if k != key}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "must not be empty"),
        ("not json", "must be JSON or lines of JSON"),
        ({"a": 1}, "must be of a known layout"),
        (json.dumps(vllm()) + "\n" + json.dumps(vllm()), "must hold one result"),
        (vllm(**(DETAILED | {"completed": 4})), "its 4 completed requests"),
        (vllm(**(DETAILED | {"ttfts": [0.1]})), "must hold as many start_times"),
        (vllm(**(DETAILED | {"latencies": [-1.0] * COUNT})), "must give a E2E of at least 0"),
        (without(vllm(), "output_throughput"), r"must have the fields of its layout; got .*output_throughput"),
        (aiperf() | {"request_latency": {"unit": "h", "avg": 1.0}}, "`request_latency.unit` must be one of ms"),
        ({"benchmarks": guidellm()["benchmarks"] * 2}, "`run` must be one of the 2 benchmarks, from 0; got None"),
    ],
)
def test_what_is_not_a_result_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read_benchmark(written(tmp_path, content))


def test_a_sample_of_requests_is_refused(tmp_path: Path) -> None:
    tree = guidellm()
    tree["benchmarks"][0]["requests"]["successful"].pop()
    with pytest.raises(InputError, match=r"must hold its 3 requests; got 2. Save all requests"):
        read_benchmark(written(tmp_path, tree))
    tree["benchmarks"][0]["metrics"] = {}
    assert isinstance(read_benchmark(written(tmp_path, tree)), Observation)


def test_one_of_several_benchmarks(tmp_path: Path) -> None:
    path = written(tmp_path, {"benchmarks": guidellm()["benchmarks"] * 2})
    seen = read_benchmark(path, run=1)
    assert isinstance(seen, Observation)
    assert seen.source.endswith("benchmark 1")

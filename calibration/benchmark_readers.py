"""Results of other load generators: ``vllm bench serve``, guidellm, aiperf. Strict: what is missing is named.

Files that hold their requests become an :class:`~calibration.observe.Observation`; those that hold means and
percentiles alone become :class:`Aggregates`.

Source
------
Layouts as written by vLLM ``vllm/benchmarks/serve.py`` (``--save-result``, with ``--save-detailed`` for requests),
guidellm ``src/guidellm/schemas/request_stats.py`` and ``.../benchmark/schemas/report.py`` (``benchmarks.json``, schema
version 1), and aiperf ``src/aiperf/common/models/export_models.py`` (``profile_export_aiperf.json``) and
``docs/tutorials/working-with-profile-exports.md`` (``profile_export.jsonl``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from theory.errors import InputError, refuse, require

from .observe import Observation, Speculation

MILLISECOND = 1e-3  # [s]
NANOSECOND = 1e-9  # [s]
KNOWN = "vllm bench serve --save-result, guidellm's benchmarks.json, aiperf's profile_export.jsonl or _aiperf.json"
PERCENTILES = ("p50", "p90", "p95", "p99")

Tree = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Aggregates:
    """Figures of a run whose single requests were not kept; a percentile that the file lacks is absent."""

    source: str
    answered: int  # requests [-]
    errors: Mapping[str, int]  # requests by kind of failure [-]
    ttft_s: Mapping[str, float]  # mean, p50, p90, p95, p99 [s]
    tpot_s: Mapping[str, float]  # over the tokens after the first [s]
    e2e_s: Mapping[str, float]  # [s]
    requests_per_s: float  # [requests/s]
    tokens_per_s: float  # output tokens [tokens/s]
    speculation: Speculation | None = field(default=None)


@dataclass(frozen=True, slots=True)
class _Row:
    """One request of a file; times [s] from any origin."""

    sent: float
    first: float
    end: float
    prompt: float
    output: float
    status: str


def read_benchmark(path: Path, run: int | None = None) -> Observation | Aggregates:
    """Return what a load generator measured; its kind is found from the content.

    Parameters
    ----------
    run : int, optional
        Which of the benchmarks of a guidellm file, from 0; needed if it holds several.

    Raises
    ------
    InputError
        If the file cannot be read, is of no known layout, lacks a field or contradicts itself.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"`file` must be a text file that can be read; got {path} ({error}).") from None
    trees = _trees(text, path)
    try:
        return _read(trees, path.name, run)
    except (KeyError, TypeError, AttributeError) as error:
        said = f"{path.name} ({type(error).__name__}: {error})"
        refuse("file", "must have the fields of its layout", said, f"Known: {KNOWN}.")


def _trees(text: str, path: Path) -> list[Any]:
    try:
        return [json.loads(text)]
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        refuse("file", "must be JSON or lines of JSON", f"{path.name} ({error})", f"Known: {KNOWN}.")


def _read(trees: list[Any], name: str, run: int | None) -> Observation | Aggregates:
    require(len(trees) > 0, "file", "must not be empty", name)
    first = trees[0]
    if all(isinstance(t, dict) and {"metadata", "metrics"} <= set(t) for t in trees):
        return _observation([_aiperf_row(t) for t in trees], False, f"aiperf, {name}")
    require(len(trees) == 1, "file", "must hold one result", f"{name}, {len(trees)} lines", "Split it: one run a file.")
    if isinstance(first, dict) and isinstance(first.get("benchmarks"), list):
        return _guidellm(first["benchmarks"], name, run)
    if isinstance(first, dict) and isinstance(first.get("request_latency"), dict):
        return _aiperf(first, name)
    if isinstance(first, dict) and {"total_input_tokens", "request_throughput", "completed"} <= set(first):
        return _vllm(first, name)
    return refuse("file", "must be of a known layout", name, f"Known: {KNOWN}.")


def _observation(rows: list[_Row], closed: bool, source: str, speculation: Speculation | None = None) -> Observation:
    require(len(rows) > 0, "file", "must hold at least one request", 0)
    rows = sorted(rows, key=lambda r: r.sent)
    start = rows[0].sent
    require(math.isfinite(start), "file", "must tell when each request was sent [s]", start)
    sent, first, end, prompt, output = (
        np.array([getattr(r, name) for r in rows], dtype=np.float64)
        for name in ("sent", "first", "end", "prompt", "output")
    )
    unknown = np.full(len(rows), np.nan)
    for name, values in (("TTFT", first - sent), ("E2E", end - sent)):
        bad = [i for i, r in enumerate(rows) if r.status == "ok" and not values[i] >= 0]
        require(not bad, "file", f"must give a {name} of at least 0 to each request answered [s]", values[bad[:3]])
    return Observation(
        *(unknown, sent - start, first - start, end - start, unknown, unknown, prompt, output),
        status=tuple(r.status for r in rows),
        closed=closed,
        source=source,
        speculation=speculation,
    )


# ---------------------------------------------------------------------------------------------------------------------
# vllm bench serve
# ---------------------------------------------------------------------------------------------------------------------


def _vllm(tree: Tree, name: str) -> Observation | Aggregates:
    source = f"vllm bench serve, {name}, {tree.get('model_id', 'model not named')}"
    speculation = _vllm_speculation(tree)
    if not {"ttfts", "start_times", "latencies", "output_lens", "errors"} <= set(tree):
        failed = int(tree.get("failed", 0))
        return Aggregates(
            source,
            int(tree["completed"]),
            {"failed": failed} if failed else {},
            ttft_s=_vllm_times(tree, "ttft"),
            tpot_s=_vllm_times(tree, "tpot"),
            e2e_s=_vllm_times(tree, "e2el"),
            requests_per_s=float(tree["request_throughput"]),
            tokens_per_s=float(tree["output_throughput"]),
            speculation=speculation,
        )
    columns = ("start_times", "ttfts", "latencies", "input_lens", "output_lens", "errors")
    sizes = [len(tree[c]) for c in columns]
    require(len(set(sizes)) == 1, "file", f"must hold as many {', '.join(columns)}", sizes)
    rows = [
        _Row(s, s + f, s + e, p, o, "ok" if o > 0 and not error else "failed")
        for s, f, e, p, o, error in zip(*(tree[c] for c in columns), strict=True)
    ]
    answered = sum(r.status == "ok" for r in rows)
    require(answered == tree["completed"], "file", f"must hold its {tree['completed']} completed requests", answered)
    return _observation(rows, tree.get("request_rate") == "inf", source, speculation)


def _vllm_times(tree: Tree, key: str) -> dict[str, float]:
    words = {"mean": "mean", "p50": "median", "p90": "p90", "p95": "p95", "p99": "p99"}
    found = {name: tree.get(f"{word}_{key}_ms") for name, word in words.items()}
    return {name: float(value) * MILLISECOND for name, value in found.items() if value is not None}


def _vllm_speculation(tree: Tree) -> Speculation | None:
    if "spec_decode_num_drafts" not in tree:
        return None
    drafts = float(tree["spec_decode_num_drafts"])
    spent = (drafts, float(tree["spec_decode_draft_tokens"]), float(tree["spec_decode_accepted_tokens"]))
    return Speculation(*spent, tuple(drafts * r for r in tree.get("spec_decode_per_position_acceptance_rates", ())))


# ---------------------------------------------------------------------------------------------------------------------
# guidellm
# ---------------------------------------------------------------------------------------------------------------------

GUIDELLM = {"successful": "ok", "incomplete": "unfinished", "errored": "failed"}


def _guidellm(benchmarks: list[Tree], name: str, run: int | None) -> Observation:
    count = len(benchmarks)
    known = run is not None and 0 <= run < count
    require(known or (run is None and count == 1), "run", f"must be one of the {count} benchmarks, from 0", run)
    chosen = benchmarks[run or 0]
    rows = [
        _guidellm_row(request, status) for group, status in GUIDELLM.items() for request in chosen["requests"][group]
    ]
    totals = chosen["metrics"].get("request_totals")
    if totals is not None:
        held = sum(r.status == "ok" for r in rows)
        way_out = "Save all requests, not a sample of them."
        require(held == totals["successful"], "file", f"must hold its {totals['successful']} requests", held, way_out)
    strategy = chosen["config"].get("strategy") or {}
    closed = strategy.get("type_") in ("concurrent", "synchronous", "throughput")
    return _observation(rows, closed, f"guidellm, {name}, benchmark {run or 0}")


def _guidellm_row(request: Tree, status: str) -> _Row:
    times = request["info"]["timings"]
    sent = _number(request["request_start_time"])
    first = sent + _number(request["time_to_first_token_ms"]) * MILLISECOND
    end = times.get("last_token_iteration")
    end = _number(request["request_end_time"] if end is None else end)
    return _Row(sent, first, end, _number(request["prompt_tokens"]), _number(request["output_tokens"]), status)


# ---------------------------------------------------------------------------------------------------------------------
# aiperf
# ---------------------------------------------------------------------------------------------------------------------

UNITS = {"ms": MILLISECOND, "s": 1.0, "sec": 1.0, "us": 1e-6, "ns": NANOSECOND}  # [s]
RATES = ("requests/sec", "tokens/sec")


def _aiperf_row(record: Tree) -> _Row:
    about, metrics, error = record["metadata"], record["metrics"] or {}, record.get("error")
    sent = int(about["request_start_ns"]) * NANOSECOND
    if error is not None or about.get("was_cancelled"):
        code = (error or {}).get("code")
        failed = f"http_{code}" if isinstance(code, int) and 400 <= code < 600 else "failed"
        end = _number(about.get("request_end_ns")) * NANOSECOND
        return _Row(sent, math.nan, end, math.nan, math.nan, "unfinished" if about.get("was_cancelled") else failed)
    first, end = (sent + _seconds(metrics[key], "value", key) for key in ("time_to_first_token", "request_latency"))
    prompt = _number((metrics.get("input_sequence_length") or {}).get("value"))
    return _Row(sent, first, end, prompt, _number(metrics["output_sequence_length"]["value"]), "ok")


def _aiperf(tree: Tree, name: str) -> Aggregates:
    failed = int((tree.get("error_request_count") or {}).get("avg") or 0)
    return Aggregates(
        f"aiperf, {name}",
        int(tree["request_count"]["avg"]),
        {"failed": failed} if failed else {},
        ttft_s=_aiperf_times(tree, "time_to_first_token"),
        tpot_s=_aiperf_times(tree, "inter_token_latency"),
        e2e_s=_aiperf_times(tree, "request_latency"),
        requests_per_s=_per_second(tree, "request_throughput"),
        tokens_per_s=_per_second(tree, "output_token_throughput"),
    )


def _aiperf_times(tree: Tree, key: str) -> dict[str, float]:
    """Return the statistics of a metric in seconds; aiperf leaves out TTFT and ITL where nothing streamed."""
    metric = tree.get(key)
    if metric is None:
        return {}
    names = {"mean": "avg", **{p: p for p in PERCENTILES}}
    return {ours: _seconds(metric, its, key) for ours, its in names.items() if metric.get(its) is not None}


def _seconds(metric: Tree, statistic: str, name: str) -> float:
    unit = metric["unit"]
    require(unit in UNITS, f"{name}.unit", f"must be one of {', '.join(UNITS)}", unit)
    return float(metric[statistic]) * UNITS[unit]


def _per_second(tree: Tree, key: str) -> float:
    metric = tree.get(key)
    if metric is None:
        return math.nan
    require(metric["unit"] in RATES, f"{key}.unit", f"must be one of {', '.join(RATES)}", metric["unit"])
    return float(metric["avg"])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)

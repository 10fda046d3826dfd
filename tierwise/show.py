"""Results as tables for people, on stdout or on another console."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.table import Table

from planner.day_report import clock

_elsewhere: ContextVar[Console | None] = ContextVar("console", default=None)


@contextmanager
def onto(console: Console) -> Iterator[None]:
    """Print onto this console instead of stdout."""
    before = _elsewhere.set(console)
    try:
        yield
    finally:
        _elsewhere.reset(before)


def _console() -> Console:
    # a fixed width where nobody looks, so that piped output has the same bytes everywhere
    return _elsewhere.get() or Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True, min_width=6)
    return table


def prediction(result: dict[str, Any]) -> None:
    """Print what ``predict`` found."""
    console = _console()
    step = result["step_time_s"]
    low, high = step["target_interval"]
    level = result["interval_level"]
    console.print(
        f"{result['target']} on {result['tp']} x {result['accelerator']}, batch {result['batch']}, "
        f"context {result['context_tokens']} tokens: a decode step takes {_time(step['target'])} "
        f"({_time(low)} to {_time(high)}, {level:.0%}; {result['provenance']['step_time']})"
    )
    parts = _table("Where a decode step goes", "part", "time", "share")
    for name, value in step["parts"].items():
        parts.add_row(name, _time(value), f"{value / step['target']:.0%}")
    console.print(parts)
    knee = result["verify_knee"]
    console.print(
        f"A verify pass of {knee['draft_length']} drafted tokens costs {knee['extra']:.0%} more than a decode step "
        + (
            "nowhere up to 4096 tokens in the step."
            if knee["tokens"] is None
            else f"from {knee['tokens']:.0f} tokens in the step on."
        )
    )
    if result["draft"] is None:
        return
    rows = _table(
        f"Speculation with {result['draft']}", "draft length", "tokens/round", "speed-up", f"{level:.0%} interval"
    )
    for row in result["by_draft_length"]:
        best = "  <- best" if row["draft_length"] == result["draft_length"] else ""
        low, high = row["speedup_interval"]
        rows.add_row(
            str(row["draft_length"]),
            f"{row['tokens_per_round']:.2f}",
            f"{row['speedup']:.2f}",
            f"{low:.2f} to {high:.2f}{best}",
        )
    console.print(rows)
    cross = result["crossover_batch"]
    console.print(
        "Speculation still gains at the largest batch searched."
        if cross is None
        else f"From batch {cross} on no draft length gains at this context."
    )


def draft(result: dict[str, Any]) -> None:
    """Print what ``draft`` found."""
    console = _console()
    low, high = result["speedup_interval"]
    where = (
        "at FLOP cost"
        if result["cost"] == "flops"
        else f"on {result['tp']} x {result['accelerator']}, batch {result['batch']}, "
        f"context {result['context_tokens']:.0f} tokens"
    )
    console.print(
        f"Best draft for {_params(result['target_params'])} trained on {result['target_tokens']:.3g} tokens, {where}: "
        f"[bold]{_params(result['draft_params'])}[/bold] with {result['draft_length']} tokens a round, "
        f"{result['speedup']:.2f} times faster ({low:.2f} to {high:.2f}, {result['interval_level']:.0%})"
    )
    near, far = result["draft_params_within_1_percent"]
    console.print(f"Within 1 % of that speed-up: drafts of {_params(near)} to {_params(far)}.")
    rows = _table("By batch", "batch", "draft", "length", "acceptance", "speed-up", "interval")
    for row in result.get("by_batch", []):
        rows.add_row(str(row["batch"]), *_draft_cells(row))
    curve = _table("Curve over sizes", "draft", "length", "acceptance", "speed-up", "interval")
    for row in result["curve"][:: max(1, len(result["curve"]) // 12)]:
        curve.add_row(*_draft_cells(row))
    nearest = _table("Nearest models of the catalog", "model", "draft", "length", "acceptance", "speed-up", "interval")
    for row in result["nearest_models"]:
        nearest.add_row(row["model"], *_draft_cells(row))
    for table in (rows, curve, nearest):
        if table.row_count:
            console.print(table)
    console.print(f"Laws: loss {result['loss_law']}, acceptance {result['acceptance_law']}.")
    for note in result["notes"]:
        console.print(f"Note: {note}.")


def _draft_cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["speedup_interval"]
    return (
        _params(row["draft_params"]),
        str(row["draft_length"]),
        f"{row['acceptance']:.3f}",
        f"{row['speedup']:.2f}",
        f"{low:.2f} to {high:.2f}",
    )


def _params(count: float) -> str:
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def simulation(result: dict[str, Any]) -> None:
    """Print what ``simulate`` found."""
    console = _console()
    runs = result["intervals"]["replications"]
    console.print(
        f"{result['scenario']}: {result['requests']} requests"
        + (f" in {runs} replications" if runs > 1 else "")
        + f", status [bold]{result['status']}[/bold], engine {result['wall_s']:.2f} s"
    )
    if result["status"] == "overloaded":
        who = ", ".join(t["name"] for t in result["tiers"] if t["status"] == "overloaded")
        console.print(
            f"[bold]Overloaded[/bold] at {who}: more arrives than completes. TTFT and the time to the final answer "
            "grow with the length of the run: what stands below is of this run alone."
        )
    _latencies(console, result, ("TTFT of a visit", "TPOT of a visit", "time to final answer"))
    _simulated_tiers(console, result)
    flow, cost, quality, good = result["throughput"], result["cost"], result["quality"], result["goodput"]
    console.print(
        f"{flow['requests_per_s']:.2f} requests/s, {flow['output_tokens_per_s']:.0f} output tokens/s, "
        f"{_or_none(flow['per_user'], '{:.1f}')} tokens/s for a user, "
        f"goodput {good['fraction']:.1%} ({good['requests_per_s']:.2f} requests/s)"
    )
    energy = result["energy_j"]
    console.print(
        f"{cost['usd_per_1000_requests']:.3f} USD and {cost['gpu_s_held_per_request'] * 1000:.0f} GPU s per 1000 "
        f"requests, {energy['per_request']:.0f} J a request ({energy['per_request_at_least']:.0f} to "
        f"{energy['per_request_at_most']:.0f}; power assumed)"
    )
    if quality is not None:
        low, high = ("unknown" if end is None else f"{end:.4f}" for end in quality["interval"])
        console.print(f"Quality {quality['mean']:.4f} (95 %: {low} to {high})")


def observation(result: dict[str, Any]) -> None:
    """Print what ``observe`` found."""
    console = _console()
    ends = {"complete": "", "deadline": ", ended by its deadline", "interrupted": ", interrupted"}
    console.print(
        f"{result['provenance']['measured']}: {result['answered']} of {result['requests']} requests answered, "
        f"{result['warmup_requests']} of them warm-up{ends[result['ended']]}"
    )
    if result["errors"]:
        console.print("Not answered: " + ", ".join(f"{n} {kind}" for kind, n in result["errors"].items()))
    _latencies(console, result | {"status": "observed"}, ("TTFT", "TPOT", "E2E"))
    flow, good, tokens = result["throughput"], result["goodput"], result.get("tokens")
    line = (
        f"{_or_none(flow['requests_per_s'], '{:.3g}')} requests/s, "
        f"{_or_none(flow['output_tokens_per_s'], '{:.3g}')} output tokens/s, "
        f"{_or_none(flow['per_user'], '{:.1f}')} tokens/s for a user"
    )
    console.print(line + (f", goodput {good['fraction']:.1%}" if good else ""))
    if tokens and tokens["prompt_asked"] is not None:
        console.print(
            f"Tokens of a request, counted by the server (asked): prompt {_or_none(tokens['prompt'], '{:.1f}')} "
            f"({tokens['prompt_asked']:.1f}), output {_or_none(tokens['output'], '{:.1f}')} "
            f"({tokens['output_asked']:.1f}); sent late by {_time(result['client_lag_s']['p99'])} at most in 99 of 100"
        )
    if (spent := result["speculation"]) is not None:
        console.print(
            f"Speculation: {_or_none(spent['acceptance'], '{:.3f}')} of the drafted tokens accepted, "
            f"{_or_none(spent['tokens_per_round'], '{:.2f}')} tokens a round"
        )


def _simulated_tiers(console: Console, result: dict[str, Any]) -> None:
    columns = ("share", "stops", "mean batch", "busy", "accepted", "rounds", "preempted")
    table = _table("Tiers", "tier", *columns)
    for t in result["tiers"]:
        table.add_row(
            t["name"],
            f"{t['share']:.1%}",
            f"{t['stop_fraction']:.1%}",
            _or_none(t["mean_batch"], "{:.1f}"),
            _or_none(t["utilisation"], "{:.0%}"),
            _or_none(t["acceptance"], "{:.2f}"),
            _or_none(t["rounds_per_request"], "{:.1f}"),
            _or_none(t["preemptions_per_request"], "{:.2f}"),
        )
    console.print(table)


def _latencies(console: Console, result: dict[str, Any], names: tuple[str, str, str]) -> None:
    table = _table("Latency", "metric", "mean", "p50", "p90", "p95", "p99", "95 % of the mean")
    for key, name in zip(("ttft_s", "tpot_s", "e2e_s"), names, strict=True):
        m = result[key]
        low, high = m["interval"]
        figures = (_time(m[p]) for p in ("mean", "p50", "p90", "p95", "p99"))
        unknown = "none: it grows" if result["status"] == "overloaded" and key != "tpot_s" else "unknown"
        known = low is not None and high is not None
        table.add_row(name, *figures, f"{_time(low)} to {_time(high)}" if known else unknown)
    console.print(table)


def kernels(result: dict[str, Any]) -> None:
    """Print how far a profile is from measured steps."""
    console = _console()
    console.print(f"Profile {result['profile']['name']} ({result['profile']['provenance']}), nothing fitted here.")
    _errors(console, "Steps", [{"phase": p, **result[p]} for p in ("decode", "prefill")], ("phase",))
    _errors(console, "By model", result["by_group"], ("model", "tp", "phase"))
    _worst_steps(console, result)


def steps(result: dict[str, Any]) -> None:
    """Print how far a profile is from steps that were measured whole."""
    console = _console()
    console.print(
        f"Profile {result['profile']['name']} ({result['profile']['provenance']}), mode {result['mode']}; nothing "
        f"fitted here, {result['left_out']} rows it was fitted on left out. Repeats spread by {result['noise']:.1%}."
    )
    _errors(console, "Steps", [{"phase": "all", **result["steps"]}], ("phase",))
    _errors(console, "By model", result["by_group"], ("model", "tp", "phase"))
    _worst_steps(console, result)


def _worst_steps(console: Console, result: dict[str, Any]) -> None:
    worst = _table("Worst rows", "model", "tp", "phase", "batch", "context", "tokens", "measured", "predicted", "error")
    for r in result["worst"]:
        where = (str(r[k]) for k in ("model", "tp", "phase", "batch", "context", "tokens"))
        worst.add_row(*where, _time(r["measured"]), _time(r["predicted"]), f"{r['error']:+.1%}")
    console.print(worst)


def _errors(console: Console, title: str, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    """Print error summaries, errors in percent of the measured value."""
    table = _table(title, *keys, "n", "MAPE", "median", "bias", "p90", "covered")
    for r in rows:
        if r["n"] == 0:
            table.add_row(*(str(r[k]) for k in keys), "0", *["-"] * 5)
            continue
        inside = f"{r['coverage']:.0%}" if "coverage" in r else "-"
        errors = (f"{r['mape']:.1%}", f"{r['median_ape']:.1%}", f"{r['bias']:+.1%}", f"{r['p90_ape']:.1%}", inside)
        table.add_row(*(str(r[k]) for k in keys), str(int(r["n"])), *errors)
    console.print(table)


def measure_plan(result: dict[str, Any]) -> None:
    """Print what a run of measurements would be."""
    console = _console()
    memory = f"{result['memory_available_gb']:.1f} GB each"
    console.print(f"{result['points']} points on {result['accelerator']} ({memory}), {result['dtype']}.")
    table = _table("Models", "model", "tp", "mode", "points", "done", "memory", "expected")
    for r in result["groups"]:
        cells = (str(r[k]) for k in ("model", "tp", "mode", "points", "done"))
        table.add_row(*cells, f"{r['memory_gb']:.1f} GB", _duration(r["expected_s"]))
    console.print(table)
    for name, why in result["left_out"].items():
        console.print(f"Left out: {name}: {why}.", soft_wrap=True)
    for launch in result["launches"]:
        console.print(f"{launch['command']}  # {_duration(launch['expected_s'])}", soft_wrap=True)
    console.print(f"Expected in all: {_duration(result['expected_s'])} ({result['provenance']}).", soft_wrap=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def measured(result: dict[str, Any]) -> None:
    """Print what was measured."""
    counts = (f"{result[k]} {k.replace('_', ' ')}" for k in ("measured", "measured_before", "oom", "skipped", "failed"))
    _console().print(f"{result['file']}: {result['points']} points: {', '.join(counts)}.", soft_wrap=True)


def acceptance(result: dict[str, Any]) -> None:
    """Print what was measured of a target and a draft."""
    console = _console()
    head, alpha = result["header"], result["acceptance"]
    console.print(
        f"{head['draft']['name']} drafts for {head['target']['name']} on {head['text']}, temperature "
        f"{head['temperature']:g}: acceptance {alpha['value']:.3f} (standard error {alpha['standard_error']:.3f}); "
        f"perplexity {result['perplexity']['target']:.3g} (target), {result['perplexity']['draft']:.3g} (draft)"
    )
    tokens = _table("Tokens per round", "draft length", "measured", "i.i.d. law", "replay", "assisted", "by depth")
    speed = _table("Speed-up", "draft length", "reference loop", "quartiles", "i.i.d. law", "assisted generation")
    for r in result["by_draft_length"]:
        depth = " ".join("-" if a is None else f"{a:.2f}" for a in r["acceptance_by_depth"])
        iid, replay = r["tokens_per_round_iid"], r["tokens_per_round_replayed"]
        counts = (r["tokens_per_round"], iid, replay, r["assisted"]["tokens_per_round"])
        tokens.add_row(str(r["draft_length"]), *(f"{c:.2f}" for c in counts), depth)
        own, other = r["speedup"], r["assisted"]["speedup"]
        quartiles = f"{own['low']:.2f} to {own['high']:.2f}"
        row = (f"{own['median']:.2f}", quartiles, f"{r['speedup_iid']:.2f}", f"{other['median']:.2f}")
        speed.add_row(str(r["draft_length"]), *row)
    console.print(tokens)
    console.print(speed)


def speculation(result: dict[str, Any]) -> None:
    """Print how far the time and length models of speculation are from published rows."""
    console = _console()
    console.print(f"{result['rows']} rows; a row without what a model needs is left out and counted.")
    models = ("time_model", "length_model")
    _errors(console, "Models", [{"model": m, **result[m]} for m in models], ("model",))
    _errors(console, "By source and method", result["by_group"], ("model", "method", "hardware"))
    for model in models:
        reasons = "; ".join(f"{row['rows']} {row['reason']}" for row in result["skipped"][model])
        console.print(f"Left out of the {model.replace('_', ' ')}: {reasons or 'nothing'}.")


def serving(result: dict[str, Any]) -> None:
    """Print how far predicted TTFT and TPOT are from measured serving points."""
    console = _console()
    rows = [{"time": t, "points": "all", **result[t]} for t in ("tpot", "ttft")]
    for name in ("unsaturated", "suspect"):
        rows += [{"time": t, "points": name, **e} for t, e in (result[name] or {}).items()]
    _errors(console, "Mean times", rows, ("time", "points"))
    for t in ("tpot", "ttft"):
        groups = [{k: g[k] for k in ("model", "system", "backend")} | g[t] for g in result["by_group"]]
        _errors(console, t.upper(), groups, ("model", "system", "backend"))
    worst = _table("Worst TPOT", "model", "system", "backend", "tp", "clients", "prompt", "output", "error")
    for r in result["worst"]:
        where = (str(r[k]) for k in ("model", "system", "backend", "tp", "clients", "prompt", "output"))
        worst.add_row(*where, f"{r['tpot_error']:+.1%}")
    console.print(worst)
    left = "; ".join(f"{count} {reason}" for reason, count in result["skipped"].items())
    console.print(f"Not predicted: {left or 'nothing'}.")


def cascades(result: dict[str, Any]) -> None:
    """Print how cascades do on real outcomes, out of fold."""
    console = _console()
    areas = _table("Normalised area under the frontier", "set", "n", "policy", "pairwise", "singles", "oracle", "ECE")
    plans = _table(
        "Plan for 95 % of the quality gap", "set", "cost predicted", "realised", "quality predicted", "realised"
    )
    for r in result["by_group"]:
        area = (_or_none(r["area"][k], "{:.3f}") for k in ("policy", "pairwise", "singles", "oracle"))
        areas.add_row(r["name"], str(r["n"]), *area, _or_none(r["ece"], "{:.3f}"))
        costs = (_or_none(r[k], "{:.4g}") for k in ("predicted_cost", "realised_cost"))
        plans.add_row(r["name"], *costs, *(_or_none(r[k], "{:.4f}") for k in ("predicted_quality", "realised_quality")))
    console.print(areas)
    console.print(plans)


def quality(result: dict[str, Any]) -> None:
    """Print how good a quality predictor is, out of fold."""
    console = _console()
    columns = ("n", "Brier", "log loss", "AUROC", "R2", "ECE raw", "ECE", "by chance")
    for g in result["by_group"]:
        table = _table(f"{g['name']}: {g['n']} prompts, signal {g['signal']}", "predicted", *columns)
        for e in (*g["right"], *g["rescue"]):
            numbers = (_or_none(e.get(k), "{:.3f}") for k in ("brier", "log_loss", "auroc", "r2", "ece_raw", "ece"))
            table.add_row(e["name"], str(e["n"]), *numbers, f"{e['ece_by_chance']['mean']:.3f}")
        chance = g["ece_by_chance"]["mean"]
        table.add_row(
            "all tiers right", "", *[""] * 4, _or_none(g["ece_raw"], "{:.3f}"), f"{g['ece']:.3f}", f"{chance:.3f}"
        )
        console.print(table)


def live(result: dict[str, Any]) -> None:
    """Print how theory did on models trained on the spot."""
    console = _console()
    console.print(
        f"{result['size']}: {len(result['models'])} models, {result['trained_tokens']} tokens each, "
        f"{result['text']['source']}; {result['wall_s']:.0f} s"
    )
    models = _table("Models on held-out text", "model", "parameters", "layers", "perplexity")
    for m in result["models"]:
        counts = (_or_none(m[k], "{}") for k in ("parameters", "layers"))
        models.add_row(m["name"], *counts, f"{m['perplexity']:.1f}")
    console.print(models)
    laws = _table("Acceptance of pairs of a left-out model", "law", "mean error", "worst model", "largest", "R2")
    for law in (result["acceptance"], result["acceptance"]["perplexity_law"]):
        errors = (f"{law[k]:.4f}" for k in ("mean_error", "worst_model_error", "largest_error", "r_squared"))
        laws.add_row(law["law"], *errors)
    console.print(laws)
    gains = _table(
        "Speculation, predicted on other prompts / measured", "draft -> target", "length", "tokens", "speed-up", "90 %"
    )
    for r in result["speedup"]["rows"]:
        low, high = r["measured_interval"]
        gains.add_row(
            f"{r['draft']} -> {r['target']}, {r['decoding']}",
            str(r["draft_length"]),
            f"{r['tokens_iid']:.2f} / {r['tokens_measured']:.2f}",
            f"{r['predicted_speedup']:.2f} / {r['measured_speedup']:.2f}",
            f"{low:.2f} to {high:.2f}",
        )
    console.print(gains)
    plans = _table("Cascade, predicted / run", "share of the gap", "cost", "quality", "visits")
    for r in result["cascade"]["rows"]:
        plans.add_row(
            f"{r['share_of_gap']:.0%}",
            f"{_time(r['predicted_cost'])} / {_time(r['realised_cost'])}",
            f"{r['predicted_quality']:.4f} / {r['realised_quality']:.4f}",
            ", ".join(f"{v:.0%}" for v in r["visits"]),
        )
    console.print(plans)
    _live_verdicts(console, result)


def _live_verdicts(console: Console, result: dict[str, Any]) -> None:
    noise = result["noise"]
    console.print(
        f"Repeated at once, the same run differs by {noise['repeat_spread']:.1%} (median), and {noise['waited']:.1%} "
        "of the time was spent waiting for a core: "
        + ("quiet enough." if noise["quiet"] else "[bold]too noisy[/bold], times below are not results.")
    )
    bars = _table("Verdicts", "bar", "reached", "limit", "verdict")
    for v in result["verdicts"]:
        reached = "-" if v["limit"] is None else f"{v['reached']:.3f}"
        said = {True: "holds", False: "missed", None: "not judged"}[v["holds"]]
        bars.add_row(v["bar"], reached, _or_none(v["limit"], "{:g}"), said)
    console.print(bars)


def _or_none(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def fitted(result: dict[str, Any]) -> None:
    """Print a fitted profile."""
    console = _console()
    console.print(f"{result['file']}: profile {result['name']} for {result['accelerator']}")
    table = _table("Parameters", "parameter", "value", "standard error")
    for name, value in result["parameters"].items():
        table.add_row(name, f"{value:.4g}", f"{result['standard_error_of_ln'][name]:.1%}")
    console.print(table)
    spread = ", ".join(f"{part} {value:.1%}" for part, value in result["residual"].items())
    console.print(f"Spread left on shapes not fitted: {spread}")
    console.print(f"Rows: {result['rows']}")


def plan(result: dict[str, Any]) -> None:
    """Print what ``plan`` decided."""
    console = _console()
    chosen = result["plan"]
    console.print(f"[bold]{result['scenario']}[/bold]: {result['explanation'][0]}")
    tiers = _table(
        f"Plan: {chosen['gpus']} x {chosen['accelerator']}",
        "tier",
        "model",
        "replicas x tp",
        "share",
        "stops",
        "draft",
        "draft length by batch",
    )
    for tier in chosen["tiers"]:
        tiers.add_row(
            tier["name"],
            tier["model"],
            f"{tier['replicas']} x {tier['tp']}",
            f"{tier['share']:.1%}",
            f"{tier['stop_fraction']:.1%}",
            tier["draft"] or "none",
            _schedule(tier["schedule"]),
        )
    console.print(tiers)
    console.print(_comparison(result))
    console.print(_shortlist(result))
    for sentence in result["explanation"][1:]:
        console.print(f"- {sentence}", soft_wrap=False)
    console.print(
        f"({result['wall_s']:.1f} s; step times: {result['provenance']['step_time']}, "
        f"profile {result['provenance']['profile']})"
    )


def sweep(result: dict[str, Any]) -> None:
    """Print the plan of each point of a sweep."""
    from planner.sweep import described

    console, rows = _console(), result["points"]
    table = _table(f"{result['scenario']}: plans", *rows[0]["settings"], "GPUs", "USD/1000", "quality", "lambda USD")
    table.add_column("tiers (draft, its length at the mean batch)", overflow="fold")
    for r in rows:
        given = [f"{v:g}" if isinstance(v, float) else str(v) for v in r["settings"].values()]
        if not r["feasible"]:
            table.add_row(*given, "-", "-", "-", "-", f"none: {r['reason'].split('. ')[0]}")
            continue
        figures = (
            f"{r['usd_per_1000_requests']:.3f}",
            _or_none(r["quality"], "{:.4f}"),
            _or_none(r["lambda"], "{:.3g}"),
        )
        table.add_row(*given, str(r["gpus"]), *figures, described(r["tiers"]))
    console.print(table)
    for note in result["notes"]:
        console.print(f"- {note}")


def day(result: dict[str, Any]) -> None:
    """Print the plan of a day, one line a piece."""
    console = _console()
    console.print(f"[bold]{result['scenario']}[/bold]: {result['explanation'][0]}")
    table = _table("Day", "from", "requests/s", "GPUs", "start", "USD/h", "USD/1000", "end at each tier")
    table.add_column("replicas x TP (draft length at the mean batch)", overflow="fold")
    for row in result["periods"]:
        tiers = row["tiers"]
        table.add_row(
            clock(row["start_s"]),
            f"{row['requests_per_s']:,.5g}",
            str(row["gpus"]),
            f"+{row['started_gpus']}" if row["started_gpus"] else "",
            f"{row['usd_per_hour']:,.0f}" if row["usd_per_hour"] > 100 else f"{row['usd_per_hour']:.3g}",
            _or_none(row["usd_per_1000_requests"], "{:.3f}"),
            " ".join(f"{t['stop_fraction']:.0%}" for t in tiers),
            ", ".join(f"{t['name']} {t['replicas']} x {t['tp']} ({t['draft_length_at_mean_batch']})" for t in tiers),
        )
    console.print(table)
    services = _table("Replicas", "tier", "model", "TP", "draft", "draft length by batch")
    for cells in dict.fromkeys(_replica(tier) for row in result["periods"] for tier in row["tiers"]):
        services.add_row(*cells)
    console.print(services)
    _checked(console, result)
    for sentence in result["explanation"][1:]:
        console.print(f"- {sentence}", soft_wrap=False)
    spent = result["wall_s"]
    console.print(
        f"({spent['total']:.1f} s, {spent['enumerating'] + spent['planning']:.1f} of them analytic; step times: "
        f"{result['provenance']['step_time']}, profile {result['provenance']['profile']})"
    )


def _replica(tier: dict[str, Any]) -> tuple[str, ...]:
    return tier["name"], tier["model"], str(tier["tp"]), tier["draft"] or "none", _schedule(tier["schedule"])


def _checked(console: Console, result: dict[str, Any]) -> None:
    """Print predicted beside simulated figures of the pieces that were simulated."""
    table = _table("Predicted (90 %) / simulated (95 %)", "from", "mean TPOT [ms]", "p99 TTFT [ms]", "answer [s]")
    table.add_column("quality", justify="right", no_wrap=True)
    table.add_column("of the fleet", justify="right", no_wrap=True)
    for c in result["checked"]:
        ttft, tpot, e2e, quality = c["ttft_p99_s"], c["tpot_mean_s"], c["e2e_mean_s"], c["quality"]
        own, seen = (
            f"{1000 * tpot[of]:.3g} ({' to '.join('-' if x is None else f'{1000 * x:.3g}' for x in tpot[ends])})"
            for of, ends in (("predicted", "predicted_interval"), ("simulated", "simulated_interval"))
        )
        table.add_row(
            clock(c["start_s"]),
            f"{own} / {seen}",
            f"{1000 * ttft['predicted']:.3g} / {1000 * ttft['simulated']:.3g}",
            f"{e2e['predicted']:.3g} / {e2e['simulated']:.3g}",
            "-" if quality["predicted"] is None else f"{quality['predicted']:.4f} / {quality['simulated']:.4f}",
            f"{c['fleet_share']:.2g}",
        )
    console.print(table)


PARETO_ROWS = 24  # of a Pareto set that are printed; the JSON and the CSV hold all


def pareto(result: dict[str, Any]) -> None:
    """Print the plans that none beats in several objectives, evenly thinned where they are many."""
    console, rows, search = _console(), result["pareto"], result["search"]
    goals = ", ".join(f"{o['goal']} {o['name']}" for o in result["objectives"])
    console.print(
        f"{result['scenario']}: {len(rows)} plans that none beats in {goals}, of {search['feasible']:,} feasible ones "
        f"({search['looked_at']:,} looked at, {search['method']}). Figures are analytic, replicas loaded to at most "
        f"{search['load_at_most']:.0%} of what they bear."
    )
    table = _table("Pareto set", "USD/1000", "quality", "to answer", "J/request", "GPUs", "best in")
    table.add_column("tiers", overflow="fold")
    step = max(1, -(-len(rows) // PARETO_ROWS))
    for r in (r for i, r in enumerate(rows) if i % step == 0 or r["best_in"]):
        table.add_row(
            f"{r['usd_per_1000_requests']:.3f}",
            _or_none(r["quality"], "{:.4f}"),
            _time(r["e2e_mean_s"]),
            f"{r['joules_per_request']:.0f}",
            str(r["gpus"]),
            ", ".join(r["best_in"]),
            "; ".join(r["tiers"]),
        )
    console.print(table)
    for r in (r for r in rows if r["simulated"]):
        s = r["simulated"]
        console.print(
            f"- Best in {' and '.join(r['best_in'])}, simulated: {s['usd_per_1000_requests']:.3f} USD per 1000 "
            f"requests, quality {_or_none(s['quality'], '{:.4f}')}, {_time(s['e2e_mean_s'])} to the final answer, "
            f"{s['joules_per_request']:.0f} J a request, p99 TTFT {_time(s['ttft_p99_s'])}: it "
            f"{'keeps' if s['keeps_slos'] else 'misses'} the SLOs."
        )


def _schedule(ranges: list[list[int]]) -> str:
    if not ranges:
        return "-"
    shown = [f"{a}-{b}: {g}" for a, b, g in ranges]
    return ", ".join(shown[:3]) + (f", ... {len(shown) - 3} more" if len(shown) > 3 else "")


SHORTLIST_ROWS = 6  # of a shortlist that are printed; the JSON holds all


def _shortlist(result: dict[str, Any]) -> Table:
    table = _table("Shortlist", "plan", "GPUs", "USD/1000", "requests run")
    table.add_column("why", overflow="fold")
    for row in result["shortlist"][:SHORTLIST_ROWS]:
        table.add_row(
            "in" if row["in"] else "out",
            str(row["gpus"]),
            f"{row['usd_per_1000_requests']:.3f}",
            str(row["requests_simulated"]),
            f"{' + '.join(row['tiers'])}: {row['why']}",
        )
    return table


def _comparison(result: dict[str, Any]) -> Table:
    columns: list[tuple[str, dict[str, Any] | None, dict[str, Any] | None]] = [
        ("plan", result["predicted"], result["simulated"])
    ]
    base = result["baseline"]
    if base["today"] is not None:
        columns.append(("today", base["today"]["predicted"], base["today"]["simulated"]))
    for key, label in (("plain", base["name"]), ("speculative", "the same with a draft")):
        row = base[key]
        columns.append((label, row and row["predicted"], row and row["simulated"]))
    table = _table("Predicted / simulated", "", *(name for name, _, _ in columns))
    rows: list[tuple[str, Callable[[dict[str, Any], dict[str, Any]], str]]] = [
        ("GPUs", lambda p, _: f"{p['gpus']}"),
        (
            "USD per 1000 requests",
            lambda p, s: f"{p['usd_per_1000_requests']:.3f} / {s['cost']['usd_per_1000_requests']:.3f}",
        ),
        ("quality", _quality),
        ("p99 TTFT of a visit", lambda p, s: f"{_time(p['ttft_p99_s'])} / {_time(s['ttft_s']['p99'])}"),
        ("mean TPOT", lambda p, s: f"{_time(p['tpot_mean_s'])} / {_time(s['tpot_s']['mean'])}"),
        ("mean time to final answer", lambda p, s: f"{_time(p['e2e_mean_s'])} / {_time(s['e2e_s']['mean'])}"),
    ]
    for name, cell in rows:
        table.add_row(name, *("not feasible" if p is None or s is None else cell(p, s) for _, p, s in columns))
    return table


def _quality(p: dict[str, Any], s: dict[str, Any]) -> str:
    if p["quality"] is None:
        return "-"
    return f"{p['quality']:.4f} / {s['quality']['mean']:.4f}"

"""The report of a plan: ``report.html`` and its figures, from the dictionary of ``tierwise plan``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner.launch import resolved
from planner.scenario import Scenario
from tierwise import __version__
from tierwise.figures import picture
from tierwise.figures.plan import pictures

from .page import NOTHING, Table, amount, figures, percent, render, seconds, signed, span, upper_first

TAGS = ("measured", "fitted", "published law", "published", "assumed", "roofline", "transferred", "drawn", "given")
CONTENTS = (
    ("deployment", "Recommended deployment"),
    ("headline", "Headline numbers"),
    ("tiers", "Tiers"),
    ("agreement", "Predicted and simulated"),
    ("shortlist", "Shortlist"),
    ("frontier", "Quality against cost"),
    ("load", "Load and speculation"),
    ("changes", "What would change it"),
    ("lambda", "What an answer is worth"),
    ("trust", "How far to trust it"),
    ("excluded", "What was left out"),
    ("scenario", "Scenario"),
    ("provenance", "Provenance"),
)
FIGURES: tuple[tuple[str, Callable[[float | None], str], tuple[str, ...], tuple[str, ...]], ...] = (
    ("quality", percent, ("quality",), ("quality", "mean")),
    ("USD per 1000 requests", amount, ("usd_per_1000_requests",), ("cost", "usd_per_1000_requests")),
    ("USD per correct answer", amount, ("usd_per_correct_answer",), ("cost", "usd_per_correct_answer")),
    (
        "USD per million output tokens",
        amount,
        ("usd_per_million_output_tokens",),
        ("cost", "usd_per_million_output_tokens"),
    ),
    ("p99 TTFT of a visit", seconds, ("ttft_p99_s",), ("ttft_s", "p99")),
    ("mean TPOT", seconds, ("tpot_mean_s",), ("tpot_s", "mean")),
    ("mean time to the answer", seconds, ("e2e_mean_s",), ("e2e_s", "mean")),
)


def files(result: dict[str, Any], scenario: Scenario, start: Path, folder: Path) -> dict[str, bytes]:
    """Return report.html and the figures of a plan as files by name.

    Parameters
    ----------
    start, folder : Path
        Where relative paths of the scenario start, and where the files will lie.
    """
    drawn = pictures(result)
    images = picture.files(drawn)
    page = render(
        "plan.html",
        kind="Plan",
        title=result["scenario"],
        description=scenario.description,
        contents=CONTENTS,
        words=result["paragraphs"],
        warnings=_warnings(result),
        headline=_headline(result, scenario),
        tiers=_tiers(result),
        compared=_compared(result, scenario),
        shortlist=_shortlist(result),
        frontier=_frontier(result),
        crossovers=_crossovers(result),
        changes=_changes(result),
        sensitivity=_sensitivity(result),
        price=_price(result),
        loads=_load_prices(result),
        trust=_trust(result, scenario),
        excluded=sorted(set(result["evaluated"]["excluded"])),
        searched=_searched(result),
        scenario=resolved(scenario, result["provenance"]["seed"], start, folder),
        provenance=_provenance(result),
        figures=figures(drawn, images),
    )
    return {"report.html": page, **images}


def tag(text: str | None) -> str:
    """Return in a word what a provenance says a number rests on.

    Examples
    --------
    >>> tag("assumed, each tier's own confidence"), tag("per-sample grades"), tag("published law")
    ('assumed', 'given', 'published law')
    """
    said = (text or "").lower()
    return next((t for t in TAGS if said.startswith(t)), "given")


def _warnings(result: dict[str, Any]) -> list[str]:
    seen, said = result["simulated"], []
    if seen["status"] != "steady":
        said.append(
            "In simulation this plan is overloaded: times grow with the length of the run and have no interval."
        )
    if seen["refused"]:
        said.append(f"{seen['refused']:,} of {seen['requests']:,} simulated requests did not fit and were refused.")
    return said


def _at(figures: dict[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = figures
    for key in path:
        value = None if value is None else value[key]
    return None if value is None else float(value)


def _interval(figures: dict[str, Any], path: tuple[str, ...]) -> Any:
    inside = figures
    for key in path[:-1]:
        inside = inside[key]
    return inside["interval" if path[-1] == "mean" else f"{path[-1]}_interval"]


def _headline(result: dict[str, Any], scenario: Scenario) -> list[dict[str, Any]]:
    """Return a card for each figure: simulated with its interval, predicted, its limit, and what it rests on."""
    predicted, seen = result["predicted"], result["simulated"]
    rests, limits = _rests_on(result), _limits(result, scenario)
    gpus = f"{amount(predicted['usd_per_hour'])} USD an hour"
    cards = [
        {
            "name": f"GPUs, {result['plan']['accelerator']}",
            "value": str(predicted["gpus"]),
            "lines": [{"kind": "predicted", "text": gpus}],
            "tags": ["given price"],
        }
    ]
    for name, form, path, where in FIGURES:
        value = _at(predicted, path)
        found = _at(seen, where)
        if value is None:
            continue
        lines = [{"kind": "predicted", "text": f"{form(value)} predicted"}]
        if found is not None:
            lines.insert(0, {"kind": "simulated", "text": f"{span(_interval(seen, where), form)} simulated"})
        if name in limits:
            lines.append({"kind": "limit", "text": limits[name]})
        shown = form(value if found is None else found)
        cards.append({"name": name, "value": shown, "lines": lines, "tags": rests.get(name, rests["money"])})
    return cards


def _rests_on(result: dict[str, Any]) -> dict[str, list[str]]:
    source = result["provenance"]
    drafts = dict.fromkeys(t["acceptance_provenance"] for t in result["plan"]["tiers"] if t["draft"])
    times = [f"step times {source['step_time']}", *(f"acceptance {said}" for said in drafts)]
    quality = [f"quality {tag(source['quality'])}"] + ([f"signal {tag(source['signal'])}"] if source["signal"] else [])
    money = ["given price", f"traffic {tag(source['traffic'])}"]
    named = {"quality": quality, "USD per correct answer": [*money, *quality], "money": money}
    return named | {name: times for name, form, _, _ in FIGURES if form is seconds}


def _limits(result: dict[str, Any], scenario: Scenario) -> dict[str, str]:
    floor = result["lambda"]["quality_floor"]
    limits = {
        "p99 TTFT of a visit": f"SLO: at most {seconds(scenario.slo.ttft_p99_s)}",
        "mean TPOT": f"SLO: at most {seconds(scenario.slo.tpot_mean_s)}",
    }
    return limits | ({"quality": f"floor: {percent(floor)}"} if floor is not None else {})


def _tiers(result: dict[str, Any]) -> Table:
    columns = ("tier", "model", "draft", "GPUs", "replicas x TP", "runs for", "answers", "requests/s each", "batch")
    predicted = {t["name"]: t for t in result["predicted"]["tiers"]}
    several = len({t["accelerator"] for t in result["plan"]["tiers"]}) > 1
    rows = []
    for t in result["plan"]["tiers"]:
        alpha = NOTHING
        if t["acceptance"] is not None:
            alpha = f"{t['acceptance']:.2f} ({t['acceptance_interval'][0]:.2f} to {t['acceptance_interval'][1]:.2f})"
        rows.append(
            (
                t["name"],
                f"{t['model']} {t['precision']}",
                t["draft"] or "none",
                f"{t['gpus']} x {t['accelerator']}" if several else str(t["gpus"]),
                f"{t['replicas']} x {t['tp']}",
                percent(t["share"]),
                percent(t["stop_fraction"]),
                amount(t["requests_per_s_per_replica"]),
                amount(predicted[t["name"]]["mean_batch"]),
                alpha,
                amount(t["kv_tokens"]),
            )
        )
    return Table(
        (*columns, "acceptance", "KV tokens"),
        rows,
        words=3,
        caption="Acceptance per drafted token with its interval; batch: the mean.",
    )


def _compared(result: dict[str, Any], scenario: Scenario) -> Table:
    """Return each figure predicted, simulated and apart, beside the baseline."""
    base, limits = result["baseline"], _limits(result, scenario)
    layout = base["name"]
    known = (("today", "today"), ("plain", f"{layout}, no draft"), ("speculative", f"{layout}, with a draft"))
    others = [(k, said) for k, said in known if base[k] is not None and base[k]["predicted"] is not None]
    columns = ["figure", "predicted", "simulated", "95 % interval", "difference"]
    columns += [f"{said}, simulated" for _, said in others]
    rows = [["GPUs", *[str(result["predicted"]["gpus"])] * 2, NOTHING, NOTHING]]
    rows[0] += [str(base[k]["predicted"]["gpus"]) for k, _ in others]
    for name, form, path, where in FIGURES:
        value, found = _at(result["predicted"], path), _at(result["simulated"], where)
        if value is None:
            continue
        limit = f" ({limits[name]})" if name in limits else ""
        seen = NOTHING if found is None else span(_interval(result["simulated"], where), form)
        apart = None if found is None else found / value - 1
        row = [name + limit, form(value), form(found), seen, signed(apart)]
        rows.append(row + [form(_at(base[k]["simulated"], where)) for k, _ in others])
    short = [said for k, said in others if not base[k]["keeps_slos"]]
    note = f" An SLO is missed by: {'; '.join(short)}." if short else ""
    return Table(columns, rows, caption=f"Difference: simulated against predicted.{note}")


def _shortlist(result: dict[str, Any]) -> Table:
    """Return the plans that were looked at, what simulation said of them, and why each is in or out."""
    rows = []
    for r in result["shortlist"]:
        seen = r["simulated"] or {"e2e_mean_s": None}
        pair = f"{seconds((r['predicted'] or seen)['e2e_mean_s'])} / {seconds(seen['e2e_mean_s'])}"
        verdict = f"{'in' if r['in'] else 'out'}: {r['why']}"
        counts = (str(r["gpus"]), amount(r["usd_per_1000_requests"]), pair, amount(r["requests_simulated"]))
        rows.append((" + ".join(r["tiers"]), verdict, *counts))
    s = result["selection"]
    sure = "not reached" if s["confidence"] is None else f"{s['confidence']:.0%}"
    note = f"{upper_first(s['rule'])}. Confidence {sure}; {s['source']}."
    columns = ("plan", "verdict", "GPUs", "USD per 1000 requests", "time to the answer, predicted / simulated")
    marked = next((i for i, r in enumerate(result["shortlist"]) if r["in"]), None)
    return Table((*columns, "requests simulated"), rows, words=2, caption=note, marked=marked)


def _frontier(result: dict[str, Any]) -> Table:
    rows, marked = [], None
    for i, r in enumerate(result["frontier"]):
        low, high = r["lambda_usd_interval"] or (None, None)
        best = NOTHING if low is None else f"{amount(low)} to {NOTHING if high is None else amount(high)}"
        best = best if low is None or high is not None else f"{amount(low)} and more"
        own = r["gpus"] == result["predicted"]["gpus"]
        if own and abs(r["usd_per_1000_requests"] / result["predicted"]["usd_per_1000_requests"] - 1) < 1e-9:
            marked = i if r["quality"] == result["predicted"]["quality"] else marked
        cells = (" + ".join(r["tiers"]), str(r["gpus"]), amount(r["usd_per_1000_requests"]))
        rows.append((*cells, percent(r["quality"], 2), best))
    columns = ("plan", "GPUs", "USD per 1000 requests", "quality", "best for lambda [USD]")
    note = "Plans that no other beats, predicted. Set off: the one chosen, whose replicas were settled after."
    return Table(columns, rows, caption=note, marked=marked)


def _crossovers(result: dict[str, Any]) -> Table:
    rows = []
    memory = {t["name"]: t["concurrency"] for t in result["plan"]["tiers"]}
    for c in result["speculation"]["by_tier"]:
        at, (low, high) = c["crossover_requests_per_s"], c["crossover_interval_requests_per_s"]
        where = f"none up to {amount(c['searched_to_requests_per_s'])}" if at is None else amount(at)
        ends = NOTHING if low is None else f"{amount(low)} to {'beyond' if high is None else amount(high)}"
        held = memory[c["tier"]]
        cells = (c["tier"], c["draft"], str(c["fixed_length"]), f"{c['speedup_at_no_load']:.2f} x", where, ends)
        rows.append((*cells, f"{held['sequences']} of {held['sequences_without_draft']}"))
    columns = ("tier", "draft", "length", "speed-up unloaded", "hurts from [requests/s]", "90 % interval")
    note = "Where one draft length at every batch starts to hurt, per replica; the schedule of the plan avoids it."
    return Table((*columns, "sequences held, of without draft"), rows, words=2, caption=note)


def _changes(result: dict[str, Any]) -> Table:
    rows = []
    for r in result["changes"]:
        unit = "" if r["unit"] == "-" else f" {r['unit']}"
        if r["to"] is None:
            tried = "at any value" if r["tried_to"] == r["from"] else f"tried to {amount(r['tried_to'])}"
            rows.append((r["key"], f"{amount(r['from'])}{unit}", f"never, {tried}", NOTHING, NOTHING, NOTHING))
            continue
        plan = r["plan"]
        then = ("nothing is feasible", NOTHING, NOTHING)
        if plan is not None:
            then = (" + ".join(plan["tiers"]), str(plan["gpus"]), amount(plan["usd_per_1000_requests"]))
        rows.append((r["key"], f"{amount(r['from'])}{unit}", amount(r["to"], 4), *then[1:], then[0]))
    columns = ("setting", "now", "another plan wins from", "GPUs then", "USD per 1000 then", "deployment then")
    note = "One setting at a time, by the analytic model: the nearest value at which another deployment is best."
    rows = [(r[0], r[1], r[2], r[5], r[3], r[4]) for r in rows]
    return Table((*columns[:3], columns[5], *columns[3:5]), rows, words=4, caption=note)


def _sensitivity(result: dict[str, Any]) -> Table:
    rows = []
    for r in result["sensitivity"]:
        if "infeasible" in r:
            rows.append((r["change"], f"no plan: {r['infeasible']}", NOTHING, NOTHING, NOTHING))
        else:
            figures = (str(r["gpus"]), amount(r["usd_per_1000_requests"]), percent(r["quality"], 2))
            rows.append((r["change"], " + ".join(r["tiers"]), *figures))
    columns = ("if", "the plan would be", "GPUs", "USD per 1000 requests", "quality")
    return Table(columns, rows, words=2, caption="The analytic plan when load or objective change.")


def _price(result: dict[str, Any]) -> list[tuple[str, str]]:
    price = result["lambda"]
    low, high = price["interval"] or (None, None)
    best = (
        "at no lambda" if low is None else f"{amount(low, 4)} {'and more' if high is None else f'to {amount(high, 4)}'}"
    )
    facts = [
        ("given as", price["given_as"]),
        ("lambda", f"{amount(price['value'], 4)} {price['unit']}"),
        ("best plan for lambda", best),
        ("equivalent budget", f"{amount(price['budget'], 4)} {price['budget_unit']}"),
    ]
    return facts + ([("quality floor", percent(price["quality_floor"], 2))] if price["quality_floor"] else [])


def _load_prices(result: dict[str, Any]) -> Table:
    found = result["load_prices"]
    if found is None:
        return Table(("tier",), ())
    rows = [(name, amount(price), amount(found["visits"][name])) for name, price in found["price"].items()]
    columns = ("tier", f"price [{found['unit']}]", "visits of a request")
    return Table(
        columns, rows, caption="What a visit takes from the others on the plan's own replicas, all of them full."
    )


def _trust(result: dict[str, Any], scenario: Scenario) -> Table:
    source, traffic = result["provenance"], result["traffic"]
    low, high = result["predicted"]["tpot_interval_s"]
    rows = [
        ("step times", source["step_time"], f"profile {source['profile']}: {source['profile_source']}"),
        ("mean TPOT", "predicted", f"{span([low, high], seconds)} ({result['predicted']['interval_level']:.0%})"),
    ]
    for t in result["plan"]["tiers"]:
        if t["draft"]:
            ends = " to ".join(f"{end:.2f}" for end in t["acceptance_interval"])
            about = f"{t['acceptance']:.2f}, {ends}"
            rows.append((f"acceptance of {t['draft']} for {t['name']}", t["acceptance_provenance"], about))
    if source["quality"]:
        rows.append(("quality of the tiers", tag(source["quality"]), source["quality"]))
    if source["signal"]:
        rows.append(("what tells a tier to stop", tag(source["signal"]), source["signal"]))
    mean = f"{amount(traffic['prompt_tokens_mean'])} + {amount(traffic['output_tokens_mean'])} tokens a request"
    rows.append(("traffic", tag(source["traffic"]), f"{source['traffic']}; {mean}"))
    prices = f"{amount(result['predicted']['usd_per_hour'])} USD an hour for {result['predicted']['gpus']} GPUs"
    rows.append(("prices", "given", f"{prices}: a setting of {scenario.name}, not a quotation"))
    rows.append(
        ("energy", tag(result["simulated"]["energy_j"]["provenance"]), result["simulated"]["energy_j"]["provenance"])
    )
    return Table(("number", "kind", "rests on"), rows, words=3)


def _searched(result: dict[str, Any]) -> str:
    e = result["evaluated"]
    return (
        f"Evaluated: {e['analytic']:,} configurations by the analytic model, {e['policies']:,} stop rules placed on "
        f"GPUs, {e['simulated']} simulations."
    )


def _provenance(result: dict[str, Any]) -> list[tuple[str, str]]:
    source, seen = result["provenance"], result["simulated"]
    served = f"{seen['requests']:,}, of which {seen['warmup_requests']:,} warm-up; status {seen['status']}"
    return [
        ("tierwise", __version__),
        ("seed", str(source["seed"])),
        ("step times", f"{source['step_time']}, profile {source['profile']}"),
        ("simulated requests", served),
        ("again", f"tierwise plan scenario.yaml --seed {source['seed']}"),
        ("as data", "plan.json, frontier.csv, policy.json"),
        ("to run it", "launch-TIER.sh, bench.sh"),
    ]

"""A plan in words and numbers: its tiers, its stop rule, its predicted figures, its speculation, what binds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory import queueing
from theory.cascade import Policy
from theory.cost import dollars_per_correct_answer, dollars_per_million_tokens
from theory.latency import Pass, step_time_interval
from theory.outcomes import Outcomes
from theory.speculation import tokens_per_round

from .build import Problem
from .crossover import LEVEL, concurrency
from .search import Candidate, Group, Rule, price
from .service import Load
from .space import P99, Space, occupancy

Array = NDArray[np.float64]
QUEUE_SPREAD = 0.06  # half width of ln(TPOT) from the queueing approximation: what tests/test_space.py allows it [-]


def first_stops(rule: Rule) -> dict[str, Any] | None:
    """Return at how many of its signal levels the first tier's answer stands, for the rule most requests follow.

    A level is a bin of equal probability, so the count over ``levels`` is also the share of requests that stop there.
    """
    policy = rule.low if rule.gamma < 0.5 else rule.high
    if policy is None or rule.outcomes is None or policy.first.kind != "run":
        return None
    tier, levels = policy.first.tier, rule.outcomes.levels
    moves = [policy.action(1 << tier, (level,)) for level in range(levels)]
    stops = [level for level, move in enumerate(moves) if move.kind == "answer"]
    return {"tier": rule.outcomes.tiers[tier], "levels": levels, "stops_at": stops}


def tiers(problem: Problem, space: Space, candidate: Candidate) -> list[dict[str, Any]]:
    """Return how each tier of the plan is deployed."""
    return [_tier(problem, space, candidate, group) for group in candidate.groups]


def _tier(problem: Problem, space: Space, candidate: Candidate, group: Group) -> dict[str, Any]:
    service = group.service
    draft = service.draft
    ranges = [r for r in service.rounds.ranges() if r[0] <= service.batch_cap]
    return {
        "name": problem.scenario.tiers[group.tier].name,
        "model": service.deployment.model.name,
        "accelerator": service.deployment.accelerator.name,
        "precision": service.deployment.precision,
        "tp": service.deployment.tp,
        "replicas": group.replicas,
        "gpus": group.gpus,
        "share": _share(candidate.rule, group.tier),
        "stop_fraction": float(candidate.rule.answers[candidate.rule.tiers.index(group.tier)]),
        "requests_per_s_per_replica": group.rate,
        "draft": draft.model.name if draft else None,
        "draft_tp": draft.tp if draft else None,
        "draft_shares_vocabulary": draft.model.vocab == service.deployment.model.vocab if draft else None,
        "acceptance": draft.acceptance.value if draft else None,
        "acceptance_interval": [draft.acceptance.low, draft.acceptance.high] if draft else None,
        "acceptance_provenance": draft.acceptance.provenance if draft else None,
        "draft_length": int(service.rounds.length[0]),
        "kv_tokens": service.kv_tokens,
        "max_num_seqs": service.deployment.limits.max_num_seqs,
        "batch_cap": service.batch_cap,
        "schedule": [list(r) for r in ranges] if draft else [],
        "concurrency": concurrency(space, group),
        "kv_precision": service.deployment.kv_precision,
    }


def traffic(problem: Problem) -> dict[str, Any]:
    """Return the requests that the plan is for, in means."""
    prompt, output = problem.workload.prompt, problem.workload.output
    return {
        "requests_per_s": problem.rate,
        "requests": problem.workload.requests,
        "prompt_tokens_mean": float(prompt.mean()),
        "output_tokens_mean": float(output.mean()),
        "output_tokens_cv": float(output.std() / output.mean()),
        "max_tokens": problem.max_tokens,
    }


def _share(rule: Rule, tier: int) -> float:
    return float(rule.visits[rule.tiers.index(tier)])


def predicted(problem: Problem, space: Space, candidate: Candidate) -> dict[str, Any]:
    """Return the analytic figures of a plan, with the interval of its TPOT; times in seconds, money in USD."""
    figures = point(problem, space, candidate)
    visits = np.array([_share(candidate.rule, g.tier) for g in candidate.groups])
    tpot, batch = (np.array([tier[key] for tier in figures["tiers"]]) for key in ("tpot_mean_s", "mean_batch"))
    spread = np.array([tpot_spread(problem, space, g, float(n)) for g, n in zip(candidate.groups, batch, strict=True)])
    low, high = (float(visits / visits.sum() @ (tpot * np.exp(sign * spread))) for sign in (-1, 1))
    first = {"quality": figures["quality"], "tpot_mean_s": figures["tpot_mean_s"]}
    return first | {"tpot_interval_s": [low, high], "interval_level": LEVEL} | figures


def point(problem: Problem, space: Space, candidate: Candidate) -> dict[str, Any]:
    """Return the figures of :func:`predicted` without intervals, which take most of its time."""
    state = occupancy([g.service for g in candidate.groups], np.array([g.rate for g in candidate.groups]), space.load)
    ttft99 = queueing.ttft_quantile(state, P99)
    visits = np.array([_share(candidate.rule, g.tier) for g in candidate.groups])
    quality = candidate.rule.quality
    return {
        "quality": _number(quality),
        "tpot_mean_s": float(visits / visits.sum() @ state.tpot_s),
        "ttft_p99_s": float(ttft99.max()),
        "e2e_mean_s": float(visits @ state.e2e_s),
        **money(problem, candidate, quality, space.load),
        "tiers": [
            {
                "name": problem.scenario.tiers[g.tier].name,
                "ttft_mean_s": float(state.ttft_s[i]),
                "ttft_p99_s": float(ttft99[i]),
                "tpot_mean_s": float(state.tpot_s[i]),
                "e2e_mean_s": float(state.e2e_s[i]),
                "mean_batch": float(state.batch[i]),
                "load": float(state.rate[i] / state.rate_limit[i]),
            }
            for i, g in enumerate(candidate.groups)
        ],
    }


def tpot_spread(problem: Problem, space: Space, group: Group, batch: float) -> float:
    r"""Return the half width of the interval of ln(TPOT) of a tier, at its mean batch [-].

    .. math:: h^2 = h_{step}^2 + h_{queue}^2 + \tfrac14 \ln^2 \frac{E[N](\alpha_{high})}{E[N](\alpha_{low})}

    with the intervals of the target's pass over the batch, of the queueing approximation and of the acceptance, taken
    as independent.
    """
    service, d = group.service, group.service.deployment
    n = max(batch, 1.0)
    gamma = int(service.rounds.length[min(int(n), len(service.rounds.length)) - 1])
    work = Pass(n, gamma + 1.0, space.load.context)
    low, high = step_time_interval(
        d.model, d.accelerator, problem.pool(d).profile, work, d.tp, d.precision, d.kv_precision, level=LEVEL
    )
    step = math.hypot(math.log(float(high) / float(low)) / 2, QUEUE_SPREAD)
    if service.draft is None:
        return step
    a = service.draft.acceptance
    tokens = tokens_per_round(np.array([a.low, a.high]), gamma)
    return math.hypot(step, math.log(float(tokens[1] / tokens[0])) / 2)


def money(problem: Problem, candidate: Candidate, quality: float, load: Load) -> dict[str, Any]:
    """Return what a plan costs, every GPU paid whether busy or not."""
    hourly = 3600 * price(problem, candidate.groups)
    prompt = float(problem.workload.prompt.mean())  # as users count them, cached or not
    correct = dollars_per_correct_answer(candidate.cost, quality) if quality > 0 else math.nan
    return {
        "gpus": candidate.gpus,
        "usd_per_hour": hourly,
        "usd_per_1000_requests": 1000 * candidate.cost,
        "usd_per_correct_answer": _number(float(correct)),
        "usd_per_million_output_tokens": float(dollars_per_million_tokens(1.0, hourly, problem.rate * load.output)),
        "usd_per_million_tokens": float(dollars_per_million_tokens(1.0, hourly, problem.rate * (prompt + load.output))),
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def stop_rule(rule: Rule) -> dict[str, Any]:
    """Return the stop rule: for each state it can reach, which answer is given or which tier runs next.

    A signal is a level from 0 (least confident) to ``levels`` - 1; a request follows ``high`` with probability
    ``high_share`` and ``low`` otherwise.
    """
    if rule.low is None or rule.high is None or rule.outcomes is None:
        return {"levels": 0, "high_share": 0.0, "low": [], "high": []}
    low = states(rule.low, rule.outcomes)
    return {
        "levels": rule.outcomes.levels,
        "high_share": rule.gamma,
        "low": low,
        "high": states(rule.high, rule.outcomes) if rule.gamma > 0 else low,
    }


def states(policy: Policy, outcomes: Outcomes) -> list[dict[str, Any]]:
    """Return the states a policy can reach and what it does in each, first states first."""
    rows: list[dict[str, Any]] = []
    queue: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    names = outcomes.tiers
    shown = [set(np.flatnonzero(outcomes.signal[:, k].max(axis=0) > 0).tolist()) for k in range(len(names))]
    while queue:
        mask, signals = queue.pop(0)
        move = policy.action(mask, signals)
        ran = [names[k] for k in range(len(names)) if mask >> k & 1]
        target = names[move.tier] if move.tier >= 0 else None
        rows.append({"ran": ran, "signals": list(signals), "do": move.kind, "tier": target})
        if move.kind == "run":
            # tiers only ever run in ascending order, so the new signal goes last
            queue.extend((mask | 1 << move.tier, (*signals, level)) for level in sorted(shown[move.tier]))
    return rows


def binding(problem: Problem, space: Space, candidate: Candidate, used: Array) -> dict[str, Any]:
    """Return the tier whose replicas are fullest, and which limit they meet first as their load grows.

    Parameters
    ----------
    used : ndarray
        Load of each group of the plan over the greatest its replicas bear within the SLOs [-].
    """
    fullest = int(np.argmax(used))
    group, slo = candidate.groups[fullest], problem.scenario.slo
    state = occupancy([group.service], np.array([group.rate / used[fullest]]), space.load)
    shares = {
        "p99 TTFT": float(queueing.ttft_quantile(state, P99)[0]) / slo.ttft_p99_s,
        "mean TPOT": float(state.tpot_s[0]) / slo.tpot_mean_s,
        "stability": float(group.rate / used[fullest] / state.rate_limit[0]),
    }
    return {
        "tier": problem.scenario.tiers[group.tier].name,
        "used": float(used[fullest]),
        "constraint": max(shares, key=lambda name: shares[name]),
    }


def paragraphs(problem: Problem, result: dict[str, Any]) -> dict[str, list[str]]:
    """Return the plan in sentences by subject: what to run, against what, what binds, lambda, what would change it."""
    return {
        "deployment": [_deployment(result), *_stop(result)],
        "comparison": [*_today(result), *_against(result)],
        "cost": [_money(result["predicted"])],
        "binding": [_binding(result["binding"]), _simulated(result["selection"])],
        "lambda": _lambda(result),
        "speculation": [*_speculation(result), *_concurrency(result)],
        "changes": [*_changes(result), *_tipping(result)],
        "trust": [*_agreement(result), *_trust(problem, result)],
    }


def _deployment(result: dict[str, Any]) -> str:
    parts = []
    several = len({t["accelerator"] for t in result["plan"]["tiers"]}) > 1
    for t in result["plan"]["tiers"]:
        draft = f" with {t['draft']} drafting" if t["draft"] else ""
        count = f"{t['replicas']} replica{'s' if t['replicas'] > 1 else ''}"
        of = f" on {t['accelerator']}" if several else ""
        parts.append(f"{t['name']} on {count} of TP {t['tp']}{of}{draft} (runs for {t['share']:.0%} of requests)")
    cost = result["predicted"]["usd_per_1000_requests"]
    return f"Run {', then '.join(parts)}: {cost:.3f} USD per 1000 requests."


def _stop(result: dict[str, Any]) -> list[str]:
    first = result["plan"]["first_stops"]
    if first is None or len(result["plan"]["tiers"]) < 2:
        return []
    ends = ", ".join(f"{t['stop_fraction']:.0%} with {t['name']}" for t in result["plan"]["tiers"])
    shown = ", ".join(str(level + 1) for level in first["stops_at"]) or "none"
    return [
        f"Stop rule: {first['tier']} answers first; its answer stands at confidence {shown} of {first['levels']} "
        f"(1 is the least sure); requests end {ends}. The whole table is in the JSON."
    ]


def _today(result: dict[str, Any]) -> list[str]:
    """Say what the deployment of the scenario does, where it gives one."""
    row, own = result["baseline"]["today"], result["predicted"]
    if row is None:
        return []
    if row["predicted"] is None:
        return [f"Today's deployment does not bear this load: {row['reason'].rstrip('.')}."]
    theirs = row["predicted"]
    saved = 1 - own["usd_per_1000_requests"] / theirs["usd_per_1000_requests"]
    quality = "" if own["quality"] is None else f", quality {own['quality']:.4f} against {theirs['quality']:.4f}"
    verdict = f"the plan {'saves' if saved >= 0 else 'costs'} {abs(saved):.0%}{'' if saved >= 0 else ' more'}"
    misses = "" if row["keeps_slos"] else " In simulation it misses an SLO."
    return [
        f"Today's deployment, {' + '.join(row['tiers'])} on {theirs['gpus']} GPUs, costs "
        f"{theirs['usd_per_1000_requests']:.3f} USD per 1000 requests: {verdict}{quality}, mean time to the final "
        f"answer {own['e2e_mean_s']:.3g} s against {theirs['e2e_mean_s']:.3g} s.{misses}"
    ]


def _against(result: dict[str, Any]) -> list[str]:
    base, own = result["baseline"], result["predicted"]
    row = base["speculative"] or base["plain"]
    if row is None:
        return [f"{base['name'].capitalize()} does not fit this load on the fleet at all."]
    theirs = row["predicted"]
    slower = f"mean time to the final answer {own['e2e_mean_s']:.3g} s against {theirs['e2e_mean_s']:.3g} s"
    saved = 1 - own["usd_per_1000_requests"] / theirs["usd_per_1000_requests"]
    quality = "" if own["quality"] is None else f", quality {own['quality']:.4f} against {theirs['quality']:.4f}"
    if saved > 1e-9:
        verdict = f"costs {theirs['usd_per_1000_requests']:.3f}: the plan saves {saved:.0%}"
    elif saved > -1e-9:
        verdict = "costs the same"
    else:
        verdict = f"is not beaten on cost: {theirs['usd_per_1000_requests']:.3f} USD per 1000 requests"
    said = [f"{base['name'].capitalize()}, with its best draft, {verdict}{quality}, {slower}."]
    if not row["keeps_slos"]:
        said.append("In simulation that comparison misses an SLO: it would need more GPUs than counted here.")
    return said


def _binding(binding: dict[str, Any]) -> str:
    return (
        f"The replicas of {binding['tier']} are the fullest, {binding['used']:.0%} of what they bear; "
        f"{binding['constraint']} is what would break first. Replicas come in whole groups of GPUs."
    )


def _simulated(found: dict[str, Any]) -> str:
    sure = found["confidence"]
    said = "keeps the SLOs on average, but not surely" if sure is None else f"keeps the SLOs at {sure:.0%} confidence"
    plans, services = found["plans_tested"], found["services_measured"]
    return (
        f"Simulated, it {said}: {plans} plan{'s' if plans > 1 else ''} over {found['requests_simulated']} requests, "
        f"{services} kind{'s' if services > 1 else ''} of replica beforehand. No other plan is better unless a replica "
        f"bears over {found['capacity_margin'] - 1:.0%} more than the analytic model says."
    )


def _lambda(result: dict[str, Any]) -> list[str]:
    price = result["lambda"]
    if price["value"] is None:
        return []
    if price["interval"] is None:
        return [
            f"At no lambda is this plan best of all: the floor lies between two plans of the hull, whose slope is "
            f"{price['value']:.4g} USD per correct answer."
        ]
    low, high = price["interval"]
    upto = "any higher price" if high is None else f"{high:.4g}"
    return [
        f"It is the best plan for lambda from {low:.4g} to {upto} USD per correct answer; "
        f"the equivalent budget is {price['budget']:.4g} USD per 1000 requests."
    ]


def _speculation(result: dict[str, Any]) -> list[str]:
    said = []
    for c in result["speculation"]["by_tier"]:
        at, (low, high) = c["crossover_requests_per_s"], c["crossover_interval_requests_per_s"]
        searched, level = c["searched_to_requests_per_s"], c["interval_level"]
        start = (
            f"{c['tier']}: {c['fixed_length']} tokens of {c['draft']} at every batch size speed a visit up "
            f"{c['speedup_at_no_load']:.2f} times without load and "
        )
        upto = "none that a replica bears" if high is None else f"{high:.3g}"
        if at is None and low is None:
            said.append(
                f"{start}still gain at {searched:.3g} requests/s per replica, the whole interval ({level:.0%})."
            )
        elif at is None:
            said.append(
                f"{start}still gain at {searched:.3g} requests/s per replica; it may be but {low:.3g} ({level:.0%})."
            )
        else:
            batch = c["crossover_mean_batch"]
            there = "all that a replica with them bears" if batch is None else f"where the mean batch is {batch:.0f}"
            said.append(
                f"{start}slow it down from {at:.3g} requests/s per replica on ({low:.3g} to {upto}, {level:.0%}), "
                f"{there}; {_by_batch(c)}. The schedule avoids that."
            )
    return said


def _by_batch(c: dict[str, Any]) -> str:
    batch, (low, high) = c["crossover_batch"], c["crossover_batch_interval"]
    if batch is None:
        return f"a round alone gains at every batch up to {c['searched_to_batch']}"
    most = f"none up to {c['searched_to_batch']}" if high is None else str(high)
    return f"a round alone loses from batch {batch} on ({low} to {most})"


def _concurrency(result: dict[str, Any]) -> list[str]:
    held = [(t, t["concurrency"]) for t in result["plan"]["tiers"] if t["concurrency"] is not None]
    if not held:
        return []
    rows = "; ".join(
        f"{t['name']} holds {c['sequences']} sequences at once instead of {c['sequences_without_draft']} "
        f"({c['kv_tokens']} tokens of KV cache instead of {c['kv_tokens_without_draft']})"
        for t, c in held
    )
    return [f"Memory of the drafts: {rows}."]


def _money(figures: dict[str, Any]) -> str:
    correct = figures["usd_per_correct_answer"]
    each = "" if correct is None else f", {correct:.3g} USD per correct answer"
    return (
        f"Cost: {figures['usd_per_1000_requests']:.3g} USD per 1000 requests, "
        f"{figures['usd_per_million_output_tokens']:.3g} per million output tokens, "
        f"{figures['usd_per_million_tokens']:.3g} per million tokens in and out{each}."
    )


def _tipping(result: dict[str, Any]) -> list[str]:
    """Say at which values another deployment wins, and what then holds."""
    moves = [f"{r['key']} {_tip(r)}" for r in result["changes"] if r["to"] is not None]
    still = [f"{r['key']} {_ends(r)}" for r in result["changes"] if r["to"] is None]
    said = [f"By the analytic model another deployment wins at: {'; '.join(moves)}."] if moves else []
    return said + ([f"The same one wins for: {'; '.join(still)}."] if still else [])


def _tip(row: dict[str, Any]) -> str:
    plan = row["plan"]
    then = "nothing is feasible" if plan is None else f"{plan['gpus']} GPUs, {plan['usd_per_1000_requests']:.3g} USD"
    return f"{row['to']:.4g} instead of {row['from']:.4g} ({then})"


def _ends(row: dict[str, Any]) -> str:
    if row["tried_to"] == row["from"]:
        return "at any value"
    return f"{'down' if row['tried_to'] < row['from'] else 'up'} to {row['tried_to']:.4g}"


def _agreement(result: dict[str, Any]) -> list[str]:
    """Say how far the simulation is from the prediction, and how sure the simulation is of itself."""
    own, seen = result["predicted"], result["simulated"]
    pairs = [
        ("mean TPOT", own["tpot_mean_s"], seen["tpot_s"]["mean"]),
        ("p99 TTFT", own["ttft_p99_s"], seen["ttft_s"]["p99"]),
        ("mean time to the final answer", own["e2e_mean_s"], seen["e2e_s"]["mean"]),
    ]
    told = ", ".join(f"{name} {s / p - 1:+.0%}" for name, p, s in pairs if p and s)
    low, high = seen["tpot_s"]["interval"]
    sure = "" if low is None else f"; 95 % interval of the simulated TPOT {1000 * low:.3g} to {1000 * high:.3g} ms"
    right = seen["quality"]
    if right is not None and right["interval"][0] is not None:
        sure += f", of the quality {right['interval'][0]:.4f} to {right['interval'][1]:.4f}"
    share = seen["fleet_share"]
    part = "" if share == 1 else f" A slice of {share:.2g} of the fleet was simulated, at the loads of the whole."
    return [f"Simulated against predicted: {told}{sure}.{part}"]


def _changes(result: dict[str, Any]) -> list[str]:
    said = []
    for row in result["sensitivity"]:
        if "infeasible" in row:
            said.append(f"{row['change']}: no plan ({row['infeasible']})")
        else:
            said.append(
                f"{row['change']}: {row['gpus']} GPUs, {row['usd_per_1000_requests']:.3f} USD per 1000 requests, "
                f"{' + '.join(row['tiers'])}."
            )
    return said


def _trust(problem: Problem, result: dict[str, Any]) -> list[str]:
    drafted = [t for t in result["plan"]["tiers"] if t["draft"] is not None]
    pairs = ", ".join(
        f"{t['draft']} for {t['name']} {t['acceptance']:.2f} ({t['acceptance_interval'][0]:.2f} to "
        f"{t['acceptance_interval'][1]:.2f}, {t['acceptance_provenance']})"
        for t in drafted
    )
    low, high = result["predicted"]["tpot_interval_s"]
    said = [
        f"From step times, acceptances and queueing the predicted mean TPOT lies between {1000 * low:.3g} and "
        f"{1000 * high:.3g} ms ({result['predicted']['interval_level']:.0%})."
    ]
    said += [f"Acceptance: {pairs}."] if drafted else []
    traffic = problem.scenario.traffic
    if traffic.arrivals.kind != "poisson" if traffic.arrivals is not None else traffic.trace is not None:
        said.append(
            "Predicted figures take arrivals as Poisson at the mean rate; simulated ones take them as they are."
        )
    said += _beyond(problem, {t["draft"] for t in drafted})
    if problem.left_out > 0:
        said.append(
            f"{problem.left_out:.1%} of requests have more than {problem.max_tokens} tokens and are left out "
            "(`traffic.max_tokens`)."
        )
    if len(result["plan"]["tiers"]) > 1 and result["provenance"]["signal"] is not None:
        said.append(f"What tells a tier to stop: {result['provenance']['signal']}.")
    return said


def _beyond(problem: Problem, drafts: set[str]) -> list[str]:
    """Say how many requests outgrow the context a draft was made for."""
    limits = {d.model.name: d.model.max_context for of in problem.drafts for d in of if d.model.name in drafts}
    total = problem.workload.prompt + problem.workload.output
    short = {name: limit for name, limit in limits.items() if np.any(total > limit)}
    if not short:
        return []
    share = float(np.mean(total > min(short.values())))
    return [
        f"{share:.0%} of requests grow beyond the {min(short.values())} tokens that {' and '.join(sorted(short))} "
        f"{'were' if len(short) > 1 else 'was'} made for; that acceptance falls there is not modelled."
    ]

"""From the words of a scenario to objects: models, profile, drafts with their acceptance, outcomes, requests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.engines import EngineTimes, engine_times, slower
from calibration.profiles import serving_profile
from simulator import workload as wl
from simulator.traces import CHARACTERS_PER_TOKEN, read_trace
from simulator.workload import Workload
from theory import outcomes as oc
from theory.acceptance import SDSL, Acceptance, BetaMixture, Positional, from_tokens_per_round, predicted_acceptance
from theory.catalog import accelerator, model
from theory.errors import refuse, require
from theory.latency import Profile
from theory.outcomes import Outcomes
from theory.scaling import HOFFMANN, perplexity
from theory.specs import Accelerator, Deployment, Limits, Rules, Transformer, check_tp
from theory.speculation import LengthLaw, mean_tokens
from theory.work import parameters

from .predict import DraftModel
from .scenario import Arrivals, DraftChoice, Engine, Fleet, Lengths, Quality, Scenario, TierChoice, Traffic


@dataclass(frozen=True, slots=True)
class Pool:
    """GPUs of one kind."""

    accelerator: Accelerator
    profile: Profile
    gpus: int
    price_per_gpu_hour: float  # [USD/h]

    @property
    def price(self) -> float:
        """Price of a GPU second [USD]."""
        return self.price_per_gpu_hour / 3600


@dataclass(frozen=True, slots=True)
class Problem:
    """A scenario with its names resolved."""

    scenario: Scenario
    pools: tuple[Pool, ...]  # of different accelerators
    models: tuple[Transformer, ...]  # of the tiers
    drafts: tuple[tuple[DraftModel, ...], ...]  # of each tier
    outcomes: Outcomes | None  # None with a single tier and no quality given
    workload: Workload
    left_out: float  # share of requests that are longer than `max_tokens` and not served [-]
    max_tokens: int  # most tokens of a request, prompt and output [tokens]

    @property
    def rate(self) -> float:
        """Arrival rate of an open loop [requests/s]."""
        return self.workload.rate

    @property
    def profile(self) -> Profile:
        """Profile of the first pool."""
        return self.pools[0].profile

    def pool(self, deployment: Deployment) -> Pool:
        """Return the pool whose GPUs a replica runs on."""
        return next(p for p in self.pools if p.accelerator == deployment.accelerator)

    def where(self, deployment: Deployment) -> str:
        """Return on which GPUs a replica runs, in words; nothing to say with one pool."""
        return f" on {deployment.accelerator.name}" if len(self.pools) > 1 else ""

    def deployment(self, tier: int, tp: int, pool: Pool | None = None) -> Deployment:
        """Return a replica of ``tier`` on ``tp`` GPUs of a pool, the first one if not given."""
        choice, gpu = self.scenario.tiers[tier], (pool or self.pools[0]).accelerator
        limits = limits_of(self.scenario.engine, times_of(self.scenario.engine, gpu))
        return Deployment(self.models[tier], gpu, tp, choice.precision, choice.kv_precision, limits)


def times_of(engine: Engine, gpu: Accelerator) -> EngineTimes:
    """Return the times an engine adds to the kernels: those given, those of its preset where none is."""
    fields = {"step": "host_step_s", "layer": "host_layer_s", "sequence": "host_sequence_s"}
    fields |= {"eager_layer": "eager_layer_s"}
    if engine.preset is None:
        return EngineTimes("", gpu.name, **{t: getattr(engine, f) for t, f in fields.items()}, provenance="assumed")
    given = {t: getattr(engine, f) for t, f in fields.items() if f in engine.model_fields_set}
    return replace(engine_times(engine.preset, gpu.name), **given)


def limits_of(engine: Engine, times: EngineTimes) -> Limits:
    """Return the limits and rules of an engine."""
    return Limits(
        engine.max_num_seqs,
        engine.max_num_batched_tokens,
        engine.gpu_memory_utilization,
        engine.block_size,
        engine.reserve_bytes,
        Rules(
            engine.schedule_ahead,
            engine.mixed_prefill,
            engine.reserve_output,
            engine.stream_interval,
            times.eager_layer,
            engine.memory_left,
            engine.late_stop,
        ),
    )


def resolve(scenario: Scenario, folder: Path, profile: str | None = None, seed: int | None = None) -> Problem:
    """Return the scenario with catalog entries, profile, acceptances and requests in place.

    Parameters
    ----------
    folder : Path
        Where relative paths of the scenario start.
    profile : str, optional
        Name or path of a profile, before the scenario's own.
    seed : int, optional
        Seed of the requests; the scenario's ``search.seed`` if not given.

    Raises
    ------
    InputError
        If a name is unknown, a file is missing or broken, or a degree does not split its model.
    """
    pools = tuple(_pool(fleet, scenario.engine, profile) for fleet in scenario.pools)
    models = tuple(_model(tier.model, folder) for tier in scenario.tiers)
    for tier, transformer in zip(scenario.tiers, models, strict=True):
        for tp in tier.tp:
            check_tp(transformer, tp)
    max_tokens = scenario.traffic.max_tokens or min(m.max_context for m in models)
    asked, served = _requests(scenario, folder, seed if seed is not None else scenario.search.seed, max_tokens)
    return Problem(
        scenario=scenario,
        pools=pools,
        models=models,
        drafts=tuple(
            tuple(_draft(choice, target, folder) for choice in tier.drafts)
            for tier, target in zip(scenario.tiers, models, strict=True)
        ),
        outcomes=_outcomes(scenario.quality, scenario.tiers) if scenario.quality else None,
        workload=served,
        left_out=1 - served.requests / asked.requests,
        max_tokens=max_tokens,
    )


def _requests(scenario: Scenario, folder: Path, seed: int, max_tokens: int) -> tuple[Workload, Workload]:
    """Return the requests that are asked for and those of them that are served."""
    asked = _workload(scenario, folder, np.random.default_rng([seed, 1]))
    served = _at_most(asked, max_tokens)
    if scenario.traffic.cached_prompt_share > 0:
        served = wl.with_cached(served, scenario.traffic.cached_prompt_share)
    return asked, served


def redrawn(problem: Problem, folder: Path, seed: int) -> Problem:
    """Return the problem with the open-loop requests of another seed at the same rate; a trace is what it is."""
    _, served = _requests(problem.scenario, folder, seed, problem.max_tokens)
    return replace(problem, workload=wl.at_rate(served, problem.rate))


def joined_names(names: Iterable[str]) -> str:
    """Return what the pools are called or say, each once."""
    return ", ".join(dict.fromkeys(names))


def _pool(fleet: Fleet, engine: Engine, profile: str | None) -> Pool:
    gpu = accelerator(fleet.accelerator)
    kernels = serving_profile(gpu, profile or fleet.profile, engine.preset or "vllm")
    return Pool(gpu, _with_host(kernels, times_of(engine, gpu)), fleet.gpus, fleet.price_per_gpu_hour)


def _with_host(profile: Profile, times: EngineTimes) -> Profile:
    """Return the profile with the host times of the engine added to its own; those of a preset only if it has none."""
    own = slower(profile.efficiency, times.kernels)
    if times.engine and own.host_step + own.host_layer + own.host_sequence > 0:
        return profile
    added = replace(
        own,
        host_step=own.host_step + times.step,
        host_layer=own.host_layer + times.layer,
        host_sequence=own.host_sequence + times.sequence,
    )
    return replace(profile, efficiency=added)


def _model(name: str, folder: Path) -> Transformer:
    beside = folder / name
    return model(beside if not Path(name).is_absolute() and beside.exists() else name)


def _draft(choice: DraftChoice, target: Transformer, folder: Path) -> DraftModel:
    draft = _model(choice.model, folder)
    require(
        parameters(draft) < parameters(target),
        "drafts.model",
        f"must be smaller than the target {target.name}",
        choice.model,
    )
    lengths: LengthLaw | None = None
    longest = choice.max_length
    if choice.acceptance_by_position is not None:
        lengths = Positional(tuple(choice.acceptance_by_position))
        longest = min(longest, len(choice.acceptance_by_position))
        alike = from_tokens_per_round(mean_tokens(lengths, longest), longest)
        acceptance = Acceptance(alike, alike, alike, "published", choice.source or "")
    elif choice.acceptance is not None:
        mean, spread = choice.acceptance, choice.acceptance_sd
        low, high = choice.acceptance_interval or (mean, mean)
        if spread is not None:
            lengths = BetaMixture.from_moments(mean, spread)
            low, mean, high = (_in_batch(alpha, spread, longest) for alpha in (low, mean, high))
        acceptance = Acceptance(mean, low, high, "published", choice.source or "")
    else:
        assert choice.draft_tokens is not None
        assert choice.target_tokens is not None
        own = perplexity(HOFFMANN, parameters(draft), choice.draft_tokens)
        aim = perplexity(HOFFMANN, parameters(target), choice.target_tokens)
        acceptance = replace(predicted_acceptance(SDSL, float(own), float(aim)), provenance="published law")
    return DraftModel(draft, acceptance, max_length=longest, lengths=lengths)


def _in_batch(mean: float, spread: float, length: int) -> float:
    """Return the one alpha_iid whose rounds emit what those of the mixture do; a mean of 0 or 1 has no spread [-]."""
    if mean in (0.0, 1.0):
        return mean
    return from_tokens_per_round(BetaMixture.from_moments(mean, spread).pooled_tokens(length), length)


def _outcomes(quality: Quality, tiers: list[TierChoice]) -> Outcomes:
    total = sum(quality.outcomes.values())
    require(total > 0, "quality.outcomes", "must have a pattern of positive weight", quality.outcomes)
    shares = {pattern: weight / total for pattern, weight in quality.outcomes.items()}
    table = oc.from_patterns([t.name for t in tiers], shares)
    signal = quality.signal
    if signal.kind == "confidence":
        assert signal.auroc is not None
        return oc.with_binormal_signal(table, signal.auroc, signal.levels)
    if signal.kind == "verifier":
        assert signal.sensitivity is not None
        assert signal.false_accept is not None
        return oc.with_verifier(table, signal.sensitivity, signal.false_accept)
    return oc.without_signal(table)


def _workload(scenario: Scenario, folder: Path, rng: np.random.Generator) -> Workload:
    """Return the requests: lengths of laws or of a trace, sent by clients, by an arrival law or as in the trace."""
    traffic = scenario.traffic
    if traffic.trace is not None:
        return _from_trace(traffic, folder, rng)
    assert traffic.prompt_tokens is not None
    assert traffic.output_tokens is not None
    prompt, output = _lengths(traffic.prompt_tokens), _lengths(traffic.output_tokens)
    if traffic.clients:
        return wl.closed_loop(_loop(traffic, traffic.requests), prompt, output, rng)
    return wl.open_loop(_arrival_times(traffic, traffic.rate, traffic.requests, rng), prompt, output, rng)


def _from_trace(traffic: Traffic, folder: Path, rng: np.random.Generator) -> Workload:
    assert traffic.trace is not None
    wanted = traffic.clients * traffic.requests_per_client if traffic.requests_per_client else traffic.requests
    characters = traffic.characters_per_token or CHARACTERS_PER_TOKEN
    read = read_trace(
        folder / traffic.trace,
        None,
        wanted,
        format=traffic.format,
        characters_per_token=characters,
        block_tokens=traffic.prefix_block_tokens,
    )
    if traffic.clients:
        return wl.in_closed_loop(read, _loop(traffic, read.requests), rng)
    timed = float(read.arrival[-1]) > 0
    if traffic.arrivals is not None:
        rate = traffic.rate if traffic.rate is not None or not timed else read.rate
        times = _arrival_times(traffic, rate, read.requests, rng)
        n, law = times.size, traffic.arrivals.kind
        return read.take(slice(n), arrival=times, source=f"lengths of {read.source}; {law} arrivals")
    way_out = "Give `traffic.arrivals` with `traffic.rate`, or `traffic.clients`."
    require(timed, "traffic.trace", "must hold two different arrival times", traffic.trace, way_out)
    return read if traffic.rate is None else wl.at_rate(read, traffic.rate)


def _loop(traffic: Traffic, requests: int) -> wl.ClosedLoop:
    n = traffic.clients * traffic.requests_per_client if traffic.requests_per_client else requests
    exponential = traffic.think_time_law == "exponential"
    return wl.ClosedLoop(traffic.clients, n, traffic.think_time_s, exponential, traffic.start_over_s)


def _arrival_times(traffic: Traffic, rate: float | None, n: int, rng: np.random.Generator) -> wl.Floats:
    law = traffic.arrivals or Arrivals()
    if law.kind == "piecewise":
        assert law.rates is not None
        assert law.durations_s is not None
        durations = law.durations_s if len(law.durations_s) > 1 else law.durations_s * len(law.rates)
        rates = wl.PiecewiseRates(tuple(law.rates), tuple(durations), law.repeat)
        return wl.piecewise(rates if rate is None else rates.at(rate), n, rng)
    if rate is None:
        refuse("traffic.rate", "must be given for an open loop [requests/s]", None)
    if law.kind == "poisson":
        return wl.poisson(rate, n, rng)
    assert law.cv is not None
    return (wl.gamma if law.kind == "gamma" else wl.weibull)(rate, law.cv, n, rng)


def _at_most(workload: Workload, tokens: int) -> Workload:
    """Return the requests of at most ``tokens`` prompt and output tokens; an engine refuses the others."""
    keep = workload.prompt + workload.output <= tokens
    if keep.all():
        return workload
    require(
        int(keep.sum()) >= 2,
        "traffic.max_tokens",
        "must leave at least two requests [tokens]",
        tokens,
        f"The shortest request has {int((workload.prompt + workload.output).min())} tokens.",
    )
    return workload.take(
        keep,
        source=f"{workload.source}; requests of more than {tokens} tokens left out",
        think_time=_kept_pauses(workload, keep),
    )


def _kept_pauses(workload: Workload, keep: NDArray[np.bool_]) -> float | wl.Floats:
    """Return the think time of the requests kept; a staggered start passes on to the first of them."""
    if not isinstance(workload.think_time, np.ndarray):
        return workload.think_time
    first = min(workload.clients, int(keep.sum()))
    return np.concatenate([workload.think_time[:first], workload.think_time[keep][first:]])


def _lengths(law: Lengths) -> wl.Lengths:
    if law.sigma == 0:
        return wl.FixedLengths(round(law.median))
    return wl.LogNormalLengths(law.median, law.sigma, law.low, law.high)

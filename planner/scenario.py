"""The scenario: what a user asks, as one strict YAML document. Unknown keys are refused with the nearest valid name."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from theory.errors import InputError, refuse, require
from theory.specs import Precision

from .presets import ENGINES

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Fleet(_Strict):
    """A pool of GPUs of one kind that may be used and what they cost."""

    accelerator: str = Field(description="accelerator of the catalog")
    gpus: Count = Field(description="number of GPUs that may be used [-]")
    price_per_gpu_hour: Positive = Field(description="price of a GPU [USD/h]")
    profile: str | None = Field(None, description="efficiency profile: name or TOML path; the accelerator's by default")


class Engine(_Strict):
    """Limits and rules of each replica's engine, vLLM's names; a preset fills the fields that are not given."""

    preset: Literal["vllm", "trtllm", "sglang"] | None = Field(
        None, description="engine whose rules, budget and host times are taken where no field says otherwise"
    )
    max_num_seqs: Count = Field(256, description="sequences in one step")
    max_num_batched_tokens: Count = Field(8192, description="tokens in one step")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="share of device memory [-]")
    memory_left: bool = Field(
        False, description="choice whether that share is one of all memory or of what the weights leave free"
    )
    reserve_bytes: Annotated[float, Field(ge=0)] = Field(
        2.5e9, description="memory of a GPU kept for activations, CUDA graphs and communication [byte]"
    )
    block_size: Count = Field(16, description="tokens in a KV block")
    host_step_s: Annotated[float, Field(ge=0)] = Field(
        0.0, description="host time of a step that kernels do not hide [s]"
    )
    host_layer_s: Annotated[float, Field(ge=0)] = Field(
        0.0, description="gaps between the kernels of a layer that no kernel's own time holds [s]"
    )
    host_sequence_s: Annotated[float, Field(ge=0)] = Field(0.0, description="host time per sequence of a step [s]")
    schedule_ahead: Annotated[int, Field(ge=0, le=1)] = Field(
        0, description="number of steps by which a batch is fixed before the running step has ended, 0 or 1"
    )
    late_stop: bool = Field(
        False,
        description="choice whether an engine scheduled ahead learns of an output's end after the next step has begun, "
        "and computes the sequence in it once more",
    )
    mixed_prefill: bool = Field(True, description="choice whether prompts join decode steps or run first and alone")
    reserve_output: bool = Field(
        False,
        description="choice whether the KV cache of the whole output is reserved at admission, or grown on demand",
    )
    stream_interval: Count = Field(1, description="number of tokens a client receives at once")
    eager_layer_s: Annotated[float, Field(ge=0)] = Field(
        0.0, description="launch time of a layer in a step with prompts, a floor of that step [s]"
    )

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, data: Any) -> Any:
        preset = data.get("preset") if isinstance(data, Mapping) else None
        return {**ENGINES[preset], **data} if isinstance(preset, str) and preset in ENGINES else data


class Arrivals(_Strict):
    """When requests come."""

    kind: Literal["poisson", "gamma", "weibull", "piecewise"] = Field("poisson", description="law of the gaps")
    cv: Annotated[float, Field(ge=0)] | None = Field(
        None, description="coefficient of variation of the gaps between arrivals, kinds gamma and weibull [-]"
    )
    rates: list[Annotated[float, Field(ge=0)]] | None = Field(
        None, description="arrivals in each piece, kind piecewise; scaled to `traffic.rate` if given [requests/s]"
    )
    durations_s: list[Positive] | None = Field(None, description="length of each piece, or of all pieces [s]")
    repeat: bool = Field(True, description="begin again after the last piece, instead of stopping there")

    @model_validator(mode="after")
    def _complete(self) -> Arrivals:
        if self.kind in ("gamma", "weibull") and self.cv is None:
            raise ValueError(f"kind {self.kind} needs `cv`, the coefficient of variation of the gaps [-]")
        if self.kind not in ("gamma", "weibull") and self.cv is not None:
            raise ValueError(f"takes `cv` with kind gamma or weibull, not {self.kind}")
        pieces = self.rates is not None and self.durations_s is not None
        if self.kind == "piecewise" and not pieces:
            raise ValueError("kind piecewise needs `rates` [requests/s] and `durations_s` [s]")
        if self.kind != "piecewise" and (self.rates, self.durations_s, self.repeat) != (None, None, True):
            raise ValueError(f"takes `rates`, `durations_s` and `repeat` with kind piecewise, not {self.kind}")
        if pieces and len(self.durations_s or ()) not in (1, len(self.rates or ())):
            raise ValueError(
                f"`durations_s` needs one value, or one for each of {len(self.rates or ())} rates; "
                f"got {len(self.durations_s or ())}"
            )
        return self


class Lengths(_Strict):
    """Token counts as a log-normal law cut to [low, high], or fixed."""

    median: Positive = Field(description="median [tokens]")
    sigma: Annotated[float, Field(ge=0)] = Field(0.0, description="standard deviation of the logarithm; 0: fixed [-]")
    low: Count = Field(1, description="shortest [tokens]")
    high: Count = Field(32768, description="longest [tokens]")

    @model_validator(mode="after")
    def _ordered(self) -> Lengths:
        if not self.low <= self.median <= self.high:
            raise ValueError(f"median must lie in [low, high] = [{self.low}, {self.high}] [tokens]; got {self.median}")
        return self


class Traffic(_Strict):
    """The load: lengths from laws or a trace; sent by an arrival law, at the times of the trace, or by clients."""

    rate: Positive | None = Field(
        None, description="arrivals [requests/s]; a trace and piecewise rates keep their own unless given"
    )
    requests: Count = Field(20000, description="requests simulated; of a trace, at most [-]")
    arrivals: Arrivals | None = Field(
        None, description="when requests come; by default at the times of the trace, or as a Poisson process"
    )
    prompt_tokens: Lengths | None = Field(None, description="law of prompt lengths, without a trace")
    output_tokens: Lengths | None = Field(None, description="law of output lengths, without a trace")
    trace: str | None = Field(None, description="file of requests, relative to the scenario's folder")
    format: str | None = Field(None, description="format of the trace; found from its content by default")
    characters_per_token: Positive | None = Field(
        None, description="of conversations whose turns give no `tokens` [characters/token]; 4 by default, assumed"
    )
    cached_prompt_share: Share = Field(
        0.0,
        description="share of each prompt whose keys and values are at hand, as in a conversation, not computed [-]",
    )
    prefix_block_tokens: Count | None = Field(
        None,
        description="length of the blocks that `hash_ids` of a Mooncake trace name; if given, prompts that begin alike "
        "share their KV cache in each replica (512 in the published traces) [tokens]",
    )
    max_tokens: Count | None = Field(
        None, description="requests with more tokens are left out; by default the shortest context of the tiers"
    )
    clients: Annotated[int, Field(ge=0)] = Field(
        0, description="closed loop: clients that wait for their answer; replaces `rate` [-]"
    )
    requests_per_client: Count | None = Field(
        None, description="closed loop: requests for each client, from one queue; replaces `requests` [-]"
    )
    think_time_s: Annotated[float, Field(ge=0)] = Field(
        0.0, description="closed loop: pause before the next request, its mean if exponential [s]"
    )
    think_time_law: Literal["constant", "exponential"] = Field("constant", description="closed loop: law of that pause")
    start_over_s: Annotated[float, Field(ge=0)] = Field(
        0.0, description="closed loop: time over which clients start, evenly; 0: all at once [s]"
    )

    @model_validator(mode="after")
    def _complete(self) -> Traffic:
        if self.trace is None and (self.prompt_tokens is None or self.output_tokens is None):
            raise ValueError("needs either `trace` or both `prompt_tokens` and `output_tokens`")
        if self.trace is not None and (self.prompt_tokens is not None or self.output_tokens is not None):
            raise ValueError("takes either `trace` or `prompt_tokens` and `output_tokens`, not both")
        if self.trace is None and (self.format, self.characters_per_token) != (None, None):
            raise ValueError("takes `format` and `characters_per_token` with a `trace`")
        if self.trace is None and self.prefix_block_tokens is not None:
            raise ValueError("takes `prefix_block_tokens` with a `trace` that names the blocks of its prompts")
        if self.clients and self.arrivals is not None:
            raise ValueError("takes either `arrivals` (open loop) or `clients` (closed loop), not both")
        if not self.clients:
            loop = ("requests_per_client", "think_time_s", "think_time_law", "start_over_s")
            given = [name for name in loop if getattr(self, name) != type(self).model_fields[name].default]
            if given:
                raise ValueError(f"takes `{given[0]}` in a closed loop only: give `clients`")
            pieces = self.arrivals is not None and self.arrivals.kind == "piecewise"
            if self.trace is None and self.rate is None and not pieces:
                raise ValueError("needs `rate` [requests/s] or `clients`")
        return self


class DraftChoice(_Strict):
    """A draft model a tier may use, with its acceptance: given with its source, or from the acceptance law."""

    model: str = Field(description="model of the catalog, or a path to a config.json or its folder")
    acceptance: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="alpha_iid [-]")
    acceptance_interval: tuple[Share, Share] | None = Field(None, description="90 % interval of alpha_iid [-]")
    acceptance_sd: Positive | None = Field(
        None,
        description="standard deviation of alpha_iid over requests, which then has a Beta law about `acceptance` [-]",
    )
    acceptance_by_position: Annotated[list[Share], Field(min_length=1, max_length=16)] | None = Field(
        None, description="acceptance at each position given that all before it were accepted; bounds the draft length"
    )
    source: str | None = Field(None, description="where the acceptance is from; required with `acceptance`")
    draft_tokens: Positive | None = Field(None, description="tokens the draft was trained on, for the law [tokens]")
    target_tokens: Positive | None = Field(None, description="tokens the target was trained on, for the law [tokens]")
    max_length: Annotated[int, Field(ge=1, le=16)] = Field(8, description="longest draft considered [tokens]")
    draft_lengths: list[Annotated[int, Field(ge=1, le=16)] | Literal["auto"]] = Field(
        ["auto"], min_length=1, description="draft lengths tried; auto: the best one for each batch size [tokens]"
    )

    @model_validator(mode="after")
    def _sourced(self) -> DraftChoice:
        by_law = self.draft_tokens is not None and self.target_tokens is not None
        if (self.acceptance is not None) + (self.acceptance_by_position is not None) + by_law != 1:
            raise ValueError(
                "needs exactly one of `acceptance` with its `source`, `acceptance_by_position` with its `source`, "
                "`draft_tokens` and `target_tokens`"
            )
        if self.acceptance_sd is not None:
            if self.acceptance is None:
                raise ValueError("takes `acceptance_sd` with `acceptance`, the mean over requests [-]")
            most = (self.acceptance * (1 - self.acceptance)) ** 0.5
            if self.acceptance_sd >= most:
                raise ValueError(
                    f"`acceptance_sd` must be below {most:.3g}, that of a law on 0 and 1 alone with the mean "
                    f"{self.acceptance:g} [-]; got {self.acceptance_sd:g}"
                )
        longest = max((n for n in self.draft_lengths if n != "auto"), default=1)
        if longest > self.max_length:
            raise ValueError(f"`draft_lengths` must be at most `max_length` {self.max_length} [tokens]; got {longest}")
        if not by_law and not self.source:
            raise ValueError("`acceptance` needs a `source`: a number without one is refused")
        return self


class KvSource(_Strict):
    """An earlier tier of the same model whose KV cache of a prompt is read instead of computing the prompt again."""

    tier: str = Field(description="earlier tier of the same model and precisions")
    bytes_per_s: Positive = Field(description="rate at which a replica reads the cache [byte/s]")
    source: str = Field(min_length=1, description="place where the rate is from, e.g. measured, and on what")


class TierChoice(_Strict):
    """A model that may serve as a tier and the ways it may be deployed. Tiers are listed from cheap to dear."""

    name: str = Field(min_length=1, description="name of the tier, as used in `deployment` and in results")
    model: str = Field(description="model of the catalog, or a path to a config.json or its folder")
    tp: list[Count] = Field(default=[1, 2, 4, 8], min_length=1, description="tensor-parallel degrees allowed [GPUs]")
    max_num_seqs: list[Count] = Field([], description="batch limits tried; the engine's by default [sequences]")
    precision: Precision = Field("bf16", description="number format of weights and operations")
    kv_precision: Precision = Field("bf16", description="number format of the KV cache")
    drafts: list[DraftChoice] = Field(default=[], description="drafts allowed besides none")
    kv_from: KvSource | None = Field(
        None,
        description="tier whose KV cache of the prompt is read by requests that escalate from it, in simulation; none: "
        "they compute the prompt again, as all do where the two tiers run different drafts",
    )
    draft: str = Field(
        "auto", description="draft used: auto, the best or none at all; none; or the model of one of `drafts`, always"
    )

    @model_validator(mode="after")
    def _known(self) -> TierChoice:
        known = ["auto", "none", *(d.model for d in self.drafts)]
        if self.draft not in known:
            raise ValueError(f"`draft` must be one of {', '.join(known)}; got {self.draft!r}")
        return self


class Signal(_Strict):
    """What is seen after a tier has answered: a confidence score, a verifier's verdict, or nothing."""

    kind: Literal["confidence", "verifier", "none"] = Field(description="kind of what is seen")
    auroc: list[Annotated[float, Field(ge=0.5, le=1)]] | None = Field(None, description="per tier, kind confidence [-]")
    levels: Annotated[int, Field(ge=2, le=32)] = Field(6, description="bins of the confidence [-]")
    sensitivity: Share | None = Field(None, description="P(accept | right), kind verifier [-]")
    false_accept: Share | None = Field(None, description="P(accept | wrong), kind verifier [-]")
    source: str = Field(description="place where these numbers are from")

    @model_validator(mode="after")
    def _complete(self) -> Signal:
        if self.kind == "confidence" and self.auroc is None:
            raise ValueError("kind confidence needs `auroc`, one value per tier")
        if self.kind == "verifier" and (self.sensitivity is None or self.false_accept is None):
            raise ValueError("kind verifier needs `sensitivity` and `false_accept`")
        return self


class Quality(_Strict):
    """How often which tiers answer right together, and what can be seen of it."""

    outcomes: dict[str, Annotated[float, Field(ge=0)]] = Field(
        description="weight of each pattern: one digit per tier in order, 1 right, 0 wrong; counts or probabilities"
    )
    signal: Signal
    source: str = Field(description="place where the outcomes are from")


class Slo(_Strict):
    """What every visit to a tier must keep. A cascade shows its answer after the stop decision: see `e2e_p99_s`."""

    ttft_p99_s: Positive = Field(1.0, description="99th percentile of the time to first token of a visit [s]")
    tpot_mean_s: Positive = Field(0.05, description="mean time per output token of a visit [s]")
    e2e_p99_s: Positive | None = Field(None, description="99th percentile of the time to the final answer [s]")


class Objective(_Strict):
    """Exactly one of: a price of a correct answer, a budget, a quality floor."""

    lambda_usd: Positive | None = Field(None, description="lambda, worth of one correct answer [USD]")
    budget_usd_per_1000: Positive | None = Field(None, description="most that 1000 requests may cost [USD]")
    quality_floor: Share | Literal["top"] | None = Field(None, description="least accuracy; top: that of the last tier")

    @model_validator(mode="after")
    def _one(self) -> Objective:
        given = [n for n in ("lambda_usd", "budget_usd_per_1000", "quality_floor") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                "needs exactly one of `lambda_usd`, `budget_usd_per_1000`, `quality_floor`; "
                f"got {', '.join(given) or 'none'}"
            )
        return self


class TierDeployment(_Strict):
    """One tier as deployed, for `simulate`."""

    tier: str = Field(description="name of one of `tiers`")
    accelerator: str | None = Field(None, description="pool of the fleet it runs on; the first by default")
    tp: Count = Field(description="tensor-parallel degree [GPUs]")
    replicas: Count = Field(1, description="groups of GPUs that serve this tier [-]")
    draft: str | None = Field(None, description="model of one of the tier's drafts; none: plain decoding")
    draft_length: Annotated[int, Field(ge=1, le=16)] | Literal["auto"] = Field(
        "auto", description="gamma [tokens]; auto: the best for each batch size"
    )
    routing: Literal["round-robin", "random", "least-outstanding"] = Field(
        "round-robin", description="rule by which the tier's replicas share its requests"
    )


class Loading(_Strict):
    """What replicas do first, from the time 0 at which requests begin to come: read their weights."""

    seconds: Annotated[float, Field(ge=0)] | None = Field(None, description="load time of every replica [s]")
    bytes_per_s: Positive | None = Field(None, description="rate at which a replica reads its weights [byte/s]")
    source: str = Field(min_length=1, description="place where the number is from, e.g. measured, and on what")

    @model_validator(mode="after")
    def _one(self) -> Loading:
        if (self.seconds is None) == (self.bytes_per_s is None):
            raise ValueError("needs exactly one of `seconds` [s] and `bytes_per_s` [byte/s]")
        return self


class Autoscaling(_Strict):
    """What it takes to bring up a replica, for a plan of a day; its GPUs are paid from the start of that time."""

    provision_s: Annotated[float, Field(ge=0)] = Field(
        description="time from asking for GPUs until an engine begins to load [s]"
    )
    loading: Loading = Field(description="load time of the model")


class DeploymentChoice(_Strict):
    """A fixed deployment to simulate instead of planning one."""

    tiers: list[TierDeployment] = Field(min_length=1, description="tiers that are deployed, in the order they answer")
    lambda_usd: Positive | None = Field(None, description="the stop rule's worth of a correct answer [USD]")
    loading: Loading | None = Field(None, description="load time of the models; none: they are loaded at time 0")

    @model_validator(mode="after")
    def _rule(self) -> DeploymentChoice:
        if len(self.tiers) > 1 and self.lambda_usd is None:
            raise ValueError("needs `lambda_usd` [USD] when there are several tiers: it sets the stop rule")
        return self


class Search(_Strict):
    """How hard to look."""

    trials: Annotated[int, Field(ge=0)] = Field(32, description="Optuna trials after the enumeration [-]")
    shortlist: Count = Field(4, description="plans compared in simulation, and shown beside the chosen one [-]")
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        0.95, description="probability that simulation judges the plan right [-]"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of every random draw [-]")


class Scenario(_Strict):
    """A question to the planner."""

    name: str = Field(min_length=1, description="name of the scenario, as printed in results")
    description: str = Field("", description="text for people")
    fleet: Annotated[
        Annotated[Fleet, Tag("one-pool")]
        | Annotated[list[Fleet], Field(min_length=1, max_length=4), Tag("list[pool]")],
        Discriminator(lambda given: "list[pool]" if isinstance(given, list) else "one-pool"),
    ] = Field(description="GPUs of one kind, or a list of pools of different kinds")
    engine: Engine = Engine()
    traffic: Traffic
    tiers: list[TierChoice] = Field(
        min_length=1, max_length=4, description="models that may answer, from cheap to dear"
    )
    quality: Quality | None = Field(None, description="required with more than one tier")
    slo: Slo = Slo()
    objective: Objective | None = Field(None, description="required to plan")
    deployment: DeploymentChoice | None = Field(None, description="fixed deployment to simulate, instead of a plan")
    autoscaling: Autoscaling | None = Field(
        None, description="what bringing up a replica takes, for `plan --day`; none: it is instant and free"
    )
    search: Search = Search()

    @property
    def pools(self) -> tuple[Fleet, ...]:
        """The kinds of GPU that may be used."""
        return tuple(self.fleet) if isinstance(self.fleet, list) else (self.fleet,)

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        kinds = [pool.accelerator for pool in self.pools]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"`fleet` must have pools of different accelerators; got {', '.join(kinds)}")
        names = [tier.name for tier in self.tiers]
        if len(set(names)) != len(names):
            raise ValueError(f"`tiers` must have distinct names; got {', '.join(names)}")
        if self.quality is None and len(names) > 1:
            raise ValueError("`quality` is required with more than one tier")
        if self.quality is not None:
            for pattern in self.quality.outcomes:
                if len(pattern) != len(names) or set(pattern) - {"0", "1"}:
                    raise ValueError(
                        f"`quality.outcomes` keys must be {len(names)} digits 0 or 1, one per tier; got {pattern!r}. "
                        'Quote them in YAML: "' + "1" * len(names) + '".'
                    )
            auroc = self.quality.signal.auroc
            if auroc is not None and len(auroc) != len(names):
                raise ValueError(f"`quality.signal.auroc` needs one value per tier ({len(names)}); got {len(auroc)}")
        for i, tier in enumerate(self.tiers):
            if tier.kv_from is not None:
                kinds_of = {t.name: (t.model, t.precision, t.kv_precision) for t in self.tiers[:i]}
                if kinds_of.get(tier.kv_from.tier) != (tier.model, tier.precision, tier.kv_precision):
                    raise ValueError(
                        f"`tiers.{i}.kv_from.tier` must be an earlier tier of the same model, precision and "
                        f"kv_precision; got {tier.kv_from.tier!r}"
                    )
        for chosen in self.deployment.tiers if self.deployment else ():
            if chosen.tier not in names:
                raise ValueError(f"`deployment.tiers` names no tier {chosen.tier!r}; known: {', '.join(names)}")
        return self


SHIPPED = "13b-34b-70b-h100-node"


def shipped_scenarios() -> tuple[str, ...]:
    """Return the names of the scenarios that come with the package."""
    folder = resources.files("planner") / "scenarios"
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of scenario files, for editors and for the reference in the docs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Scenario.model_json_schema()}


def load_scenario(source: str | Path = SHIPPED, overrides: Sequence[str] = ()) -> tuple[Scenario, Path]:
    """Return the scenario of a shipped name or a YAML file, and the folder its relative paths start from.

    Parameters
    ----------
    source : str or Path
        Name of a shipped scenario, or path of a YAML file.
    overrides : sequence of str
        ``a.b=value`` settings applied before checking; list items by index (``tiers.0.tp=[2]``).

    Raises
    ------
    InputError
        If the file is missing or no YAML, a key is unknown or repeated, or a value breaks its rule.
    """
    text, folder = read_scenario(source)
    return scenario_of(text, overrides, str(source)), folder


def scenario_of(text: str, overrides: Sequence[str] = (), source: str = "scenario") -> Scenario:
    """Return the scenario of a YAML text with some settings changed; see :func:`load_scenario`.

    Raises
    ------
    InputError
        If it is no YAML, a key is unknown, or a value breaks its rule.
    """
    try:
        data = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise InputError(f"`{source}` must be valid YAML; got {problem}{where}. Mend the line.") from None
    require(isinstance(data, dict), source, "must hold a mapping of scenario keys", type(data).__name__)
    for setting in overrides:
        _apply(data, setting)
    return parse_scenario(data)


def parse_scenario(data: Mapping[str, Any]) -> Scenario:
    """Return the checked scenario of a mapping; refuse with path, rule, value and way out.

    Raises
    ------
    InputError
        If a key is unknown or missing, or a value breaks its rule.
    """
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        raise InputError(_explain(error)) from None


def read_scenario(source: str | Path) -> tuple[str, Path]:
    """Return the text of a shipped scenario or of a file, and the folder its relative paths start from.

    Raises
    ------
    InputError
        If there is no such file, or it cannot be read.
    """
    if str(source) in shipped_scenarios():
        return (resources.files("planner") / "scenarios" / f"{source}.yaml").read_text(encoding="utf-8"), Path.cwd()
    path = Path(source)
    require(
        path.is_file(),
        "scenario",
        "must be a YAML file or a shipped name",
        str(source),
        f"Shipped: {', '.join(shipped_scenarios())}.",
    )
    try:
        return path.read_text(encoding="utf-8"), path.resolve().parent
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"`scenario` must be a readable UTF-8 file; got {source} ({type(error).__name__}).") from None


class _UniqueKeys(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """A SafeLoader that refuses a key given twice: silently keeping the last would lose the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} given twice", problem_mark=node.start_mark)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def _apply(data: dict[str, Any], setting: str) -> None:
    path, sign, value = setting.partition("=")
    require(bool(sign) and bool(path), "--set", "must have the form a.b=value", setting, "E.g. traffic.rate=4.")
    try:
        parsed = yaml.load(value, _UniqueKeys)
    except yaml.YAMLError:
        refuse("--set", "must give a YAML value", setting)
    *parents, last = path.split(".")
    node: Any = data
    for part in parents:
        if isinstance(node, list):
            node = node[_index(part, node, path)]
            continue
        require(isinstance(node, dict), "--set", "must name a key inside a mapping or list", path)
        if not isinstance(node.get(part), dict | list):
            node[part] = {}
        node = node[part]
    if isinstance(node, list):
        node[_index(last, node, path)] = parsed
    else:
        node[last] = parsed


def _index(part: str, node: list[Any], path: str) -> int:
    require(part.isdigit() and int(part) < len(node), "--set", f"must index the {len(node)} items from 0", path)
    return int(part)


def _explain(error: ValidationError) -> str:
    first, *more = error.errors(include_url=False)
    path = ".".join(str(p) for p in first["loc"] if not _is_branch(str(p))) or "scenario"
    tail = f" ({len(more)} more in this file.)" if more else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(known)}."
        return f"`{path}` must be a known key; got {first['loc'][-1]!r}. {hint}{tail}"
    if first["type"] == "missing":
        return f"`{path}` must be given; got nothing. Add it to the scenario.{tail}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        stop = "" if message.endswith(".") else "."
        return f"`{path}` {message}{stop}{tail}" if path != "scenario" else f"{message}{stop}{tail}"
    rule = message.split(" should be ")[-1].split(" should ")[-1]
    verb = "" if rule.startswith("have ") else "be "
    return f"`{path}` must {verb}{rule}; got {_short(first['input'])}.{_way_out(first['loc'])}{tail}"


def _way_out(loc: tuple[int | str, ...]) -> str:
    """Return what the field means, with its unit, and for the commonest slips what to write instead."""
    name = next((str(p) for p in reversed(loc) if isinstance(p, str) and not _is_branch(p)), "")
    if name in ("acceptance", "acceptance_interval"):
        return " It is a probability per drafted token: pass 0.8, not 80."
    if name == "gpu_memory_utilization":
        return " It is a share: pass 0.9, not 90."
    model = _model_at(loc[: loc.index(name)] if name in loc else ())
    meaning = model.model_fields[name].description if model is not None and name in model.model_fields else None
    return f" It is the {meaning}." if meaning else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_branch(part: str) -> bool:
    """Whether a location part names a branch of a union (pydantic adds them), not a key of the document."""
    return part.startswith(("constrained-", "literal[", "function-", "float", "list[", "tuple[", "int", "one-pool"))


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    model = _model_at(loc)
    return list(model.model_fields) if model is not None else []


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Scenario
    for part in loc:
        if isinstance(part, str) and model is not None and part in model.model_fields:
            model = _model_of(model.model_fields[part].annotation)
    return model


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) is Annotated:
        return _model_of(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        found = (_model_of(a) for a in typing.get_args(annotation))
        return next((m for m in found if m is not None), None)
    return None

"""The command line: numbers to stdout, progress to stderr; exit 0 done, 2 bad input, 3 nothing feasible."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import json
import os
import re
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from theory.errors import InfeasibleError, InputError, refuse, require

from .progress import Progress

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


INTERRUPTED = 130  # exit code of a shell for a command ended by Ctrl-C
YOUNG = 1_000_000  # objects between two collections: importing libraries makes many and no garbage [-]


class Interrupted(Exception):  # noqa: N818 - what happened, not what is wrong
    """Ctrl-C in the middle of work that is kept; the message says where."""


class Format(StrEnum):
    """How numbers are printed."""

    table = "table"
    json = "json"


class Requests(StrEnum):
    """How requests are written."""

    csv = "csv"
    parquet = "parquet"


class Endpoint(StrEnum):
    """Which API of a server is asked."""

    completions = "completions"
    chat = "chat"


FormatOption = Annotated[Format, typer.Option("--format", help="table for people, json for programs")]
OutputOption = Annotated[Path | None, typer.Option("--output", help="folder for files, made if absent")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="seed of every random draw")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="scenario override a.b=value, repeatable")]
SweepOption = Annotated[
    list[str] | None,
    typer.Option("--sweep", help="KEY=a:b:logN, a:b:linN or v1,v2,... (gpu=KIND@PRICE,...); repeatable: a grid"),
]
ProfileOption = Annotated[str | None, typer.Option("--profile", help="efficiency profile: name or TOML file")]
ScenarioArgument = Annotated[str | None, typer.Argument(help="YAML file or shipped name; the shipped one by default")]


@app.callback()
def _about() -> None:
    """Predict, simulate and plan LLM serving with model tiers and speculative drafts."""


@app.command()
def predict(
    target: Annotated[str, typer.Option(help="target model: catalog name or path to a config.json")],
    accelerator: Annotated[str, typer.Option(help="accelerator of the catalog")],
    draft: Annotated[str | None, typer.Option(help="draft model: catalog name or path")] = None,
    acceptance: Annotated[float | None, typer.Option(help="alpha, P(drafted token accepted) [0..1]")] = None,
    acceptance_interval: Annotated[
        tuple[float, float] | None, typer.Option(help="interval of the acceptance, two values [0..1]")
    ] = None,
    tp: Annotated[int, typer.Option(help="tensor-parallel degree [GPUs]")] = 1,
    draft_tp: Annotated[
        int | None, typer.Option(help="GPUs of the group that run the draft; by default 1 or all, the faster")
    ] = None,
    batch: Annotated[int, typer.Option(help="sequences in the batch")] = 1,
    context: Annotated[int, typer.Option(help="tokens cached of each sequence")] = 1024,
    max_length: Annotated[int, typer.Option(help="longest draft considered [tokens]")] = 8,
    precision: Annotated[str, typer.Option(help="bf16 or fp8")] = "bf16",
    profile: ProfileOption = None,
    format: FormatOption = Format.table,
    output: OutputOption = None,
) -> None:
    """Step times, best draft length and speed-up of one model at one batch and context."""
    from calibration.profiles import serving_profile
    from planner.predict import DraftModel, draft_degrees, draft_seconds
    from planner.predict import predict as evaluate
    from theory import catalog
    from theory.acceptance import Acceptance
    from theory.specs import Deployment
    from theory.work import parameters

    from . import show

    require(
        (draft is None) == (acceptance is None),
        "acceptance",
        "must come with `draft`, and a draft with its acceptance [-]",
        acceptance,
        "Pass both --draft and --acceptance, or neither.",
    )
    gpu = catalog.accelerator(accelerator)
    deployment = Deployment(catalog.model(target), gpu, tp, _precision(precision))
    efficiencies = serving_profile(gpu, profile)
    pair = None
    if draft is not None and acceptance is not None:
        low, high = acceptance_interval or (acceptance, acceptance)
        given = Acceptance(acceptance, low, high, "assumed", "given on the command line")
        require(max_length >= 1, "max-length", "must be at least 1 [tokens]", max_length)
        proposer = catalog.model(draft)
        smaller = parameters(proposer) < parameters(deployment.model)
        require(smaller, "draft", f"must be smaller than the target {deployment.model.name}", draft)
        split = draft_tp is None or 1 <= draft_tp <= tp
        require(split, "draft-tp", f"must lie in 1..{tp}, the GPUs of the target [GPUs]", draft_tp)
        degrees = [draft_tp] if draft_tp is not None else draft_degrees(proposer, tp)
        choices = [DraftModel(proposer, given, degree, max_length) for degree in degrees]
        pair = min(choices, key=lambda c: draft_seconds(deployment, efficiencies, c, batch, context))
    result = evaluate(deployment, efficiencies, pair, batch, context)
    _emit(result, show.prediction, format, output, "prediction.json")


@app.command()
def draft(
    target_params: Annotated[float, typer.Option(help="parameters of the target [-]")],
    target_tokens: Annotated[float, typer.Option(help="tokens the target is trained on [tokens]")],
    draft_tokens: Annotated[float, typer.Option(help="tokens the draft will be trained on [tokens]")],
    cost: Annotated[str | None, typer.Option(help="flops, instead of an accelerator")] = None,
    accelerator: Annotated[str | None, typer.Option(help="accelerator of the catalog")] = None,
    tp: Annotated[int, typer.Option(help="tensor-parallel degree of the target [GPUs]")] = 1,
    batch: Annotated[list[int] | None, typer.Option(help="sequences in the batch; several for a sweep")] = None,
    context: Annotated[int, typer.Option(help="tokens cached of each sequence")] = 1024,
    target: Annotated[str | None, typer.Option(help="model whose shape the target has; by default derived")] = None,
    vocab: Annotated[int, typer.Option(help="rows of the embedding table, for derived shapes [-]")] = 128256,
    loss_law: Annotated[str, typer.Option(help="parameters and tokens to loss")] = "hoffmann-2022",
    acceptance_law: Annotated[str, typer.Option(help="losses to acceptance")] = "sdsl",
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="use the laws far outside their ranges")] = False,
    precision: Annotated[str, typer.Option(help="bf16 or fp8")] = "bf16",
    profile: ProfileOption = None,
    format: FormatOption = Format.table,
    output: OutputOption = None,
) -> None:
    """Best draft size, draft length and speed-up for a target that need not exist yet."""
    from . import show, verbs

    require(cost in (None, "flops"), "cost", "must be flops, or left out with an accelerator given", cost)
    require(
        (cost is None) != (accelerator is None),
        "cost",
        "must be `flops`, or an accelerator must be given",
        cost,
        "Pass --cost flops, or --accelerator h100-sxm --tp 4.",
    )
    result = verbs.draft(
        target_params,
        target_tokens,
        draft_tokens,
        accelerator=accelerator,
        tp=tp,
        batch=batch or (1,),
        context=context,
        target=target,
        vocab=vocab,
        loss_law=loss_law,
        acceptance_law=acceptance_law,
        extrapolate=extrapolate,
        precision=_precision(precision),
        profile=profile,
    )
    if output is not None:
        from planner.report import write_contents

        from .report import draft as report

        write_contents(output, report.files(result))
    _emit(result, show.draft, format, output, "draft.json")


@app.command()
def simulate(
    scenario: ScenarioArgument = None,
    set_: SetOption = None,
    seed: SeedOption = None,
    profile: ProfileOption = None,
    format: FormatOption = Format.table,
    output: OutputOption = None,
    replications: Annotated[int, typer.Option(help="independent runs, for intervals across them")] = 1,
    workers: Annotated[int | None, typer.Option(help="processes for replications; by default one a core")] = None,
    requests: Annotated[Requests, typer.Option(help="file of requests in --output: csv or parquet")] = Requests.csv,
) -> None:
    """Simulate a scenario's deployment request by request; without one, the deployment the analytic planner picks.

    With --output: report.html, simulate.json, requests.csv, timeseries.png and timeseries.svg.
    """
    from planner.replications import usable_cores
    from planner.report import write_simulation
    from planner.requests import check_format
    from planner.simulate import simulation

    from . import show

    check_format(requests.value)
    if output is not None:
        _folder(output)
    with _progress() as progress:
        found = simulation(
            *_scenario(scenario, set_, seed),
            profile=profile,
            seed=seed,
            progress=progress,
            replications=replications,
            workers=usable_cores() if workers is None else workers,
            in_detail=output is not None,
        )
        if output is not None:
            from .report.simulation import files

            progress("writing", 0, 1)
            write_simulation(found, requests.value, output, files(found))
    _emit(found.result, show.simulation, format, None, "")


@app.command()
def plan(
    scenario: ScenarioArgument = None,
    set_: SetOption = None,
    seed: SeedOption = None,
    profile: ProfileOption = None,
    format: FormatOption = Format.table,
    output: OutputOption = None,
    storage: Annotated[
        str | None,
        typer.Option(help="where the search is kept: FILE.journal or postgresql://...; in memory by default"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the search that --storage holds")] = False,
    export_dashboard: Annotated[Path | None, typer.Option(help="SQLite file to write for optuna-dashboard")] = None,
    workers: Annotated[int, typer.Option(help="processes for trials and simulations; the plan is the same")] = 1,
    dask: Annotated[str | None, typer.Option(help="address of a Dask scheduler to send them to instead")] = None,
    sweep: SweepOption = None,
    objectives: Annotated[
        str | None, typer.Option(help="two or more of cost,quality,latency,energy: all plans that none beats in them")
    ] = None,
    day: Annotated[
        bool, typer.Option("--day", help="plan each piece of piecewise arrivals: replicas by the hour, and switching")
    ] = False,
) -> None:
    """Choose tiers, parallelism, replicas, drafts, draft lengths, stop rule and lambda for a scenario.

    With --output: report.html and its figures (.svg, .png), plan.json, frontier.csv, launch-TIER.sh, bench.sh,
    policy.json and scenario.yaml; with --sweep instead: sweep.json, sweep.csv, sweep.png, sweep.svg, and sweep.jsonl,
    whose finished points are not planned again; with --objectives instead: pareto.json, pareto.csv, pareto.png and
    pareto.svg; with --day instead: report.html, day.json, day.csv, day.png, day.svg and scenario.yaml.
    """
    from planner.plan import plan_scenario
    from planner.report import write_report
    from planner.storage import Means

    from . import show

    settings = [*(set_ or ()), *(() if profile is None else (f"fleet.profile={profile}",))]
    means = Means(storage, resume, export_dashboard, workers, dask)
    if objectives is not None:
        require(not sweep and not day, "objectives", "must come without --sweep and --day", objectives)
        _pareto(scenario, settings, objectives, seed, means, format, output)
        return
    if sweep:
        alone = means == Means() and not day
        require(alone, "sweep", "must come without --day and the options of one search: it keeps its points", sweep)
        _sweep(scenario, settings, sweep, seed, format, output)
        return
    if output is not None:
        _folder(output)
    asked, start = _scenario(scenario, settings, seed)
    if day:
        from planner.day import plan_day
        from planner.report import write_day

        with _progress() as progress:
            result = plan_day(asked, start, seed=seed, progress=progress, means=means)
        if output is not None:
            from .report import day as pages

            write_day(result, output, asked, start, pages.files(result, asked, start, output))
        _emit(result, show.day, format, None, "")
        return
    with _progress() as progress:
        result = plan_scenario(asked, start, seed=seed, progress=progress, means=means)
        if output is not None:
            from .report.plan import files

            progress("writing", 0, 1)
            write_report(result, output, asked, start, files(result, asked, start, output))
    _emit(result, show.plan, format, None, "")


@app.command()
def whatif(
    scenario: ScenarioArgument = None,
    port: Annotated[int, typer.Option(help="port to listen at")] = 8080,
    host: Annotated[str, typer.Option(help="address to listen at; only this machine by default")] = "127.0.0.1",
    no_browser: Annotated[bool, typer.Option("--no-browser", help="do not open a browser on the page")] = False,
) -> None:
    """Serve a local page on which a scenario's settings move and its plan moves with them."""
    from .whatif import serve

    serve(scenario, host, port, not no_browser)


@app.command()
def observe(
    source: Annotated[
        str, typer.Argument(help="http:// address of a server, or a result of vllm bench serve, guidellm or aiperf")
    ],
    scenario: ScenarioArgument = None,
    set_: SetOption = None,
    seed: SeedOption = None,
    model: Annotated[str | None, typer.Option(help="name that the server knows; by default the only one")] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="completions or chat")] = Endpoint.completions,
    body: Annotated[
        str, typer.Option(help="JSON added to every request, as '{\"ignore_eos\": true}' for vLLM and SGLang")
    ] = "{}",
    key_env: Annotated[str | None, typer.Option(help="environment variable that holds the API key")] = None,
    request_timeout: Annotated[float, typer.Option(help="longest a request may take [s]")] = 120.0,
    deadline: Annotated[float, typer.Option(help="longest the run may take [s]")] = 3600.0,
    run: Annotated[int | None, typer.Option(help="which benchmark of a guidellm file, from 0")] = None,
    format: FormatOption = Format.table,
    output: OutputOption = None,
) -> None:
    """Measure a running server with the requests of a scenario, or read what another load generator measured.

    With --output: observe.json and, where requests are known one by one, requests.csv. Ctrl-C keeps what was measured.
    """
    from calibration.benchmark_readers import Aggregates, read_benchmark
    from calibration.observe import Observation, Server
    from planner.observed import aggregate_figures, observe_scenario, observed_figures, write_observation

    from . import show

    if output is not None:
        _folder(output)
    seen: Observation | None
    if source.startswith(("http://", "https://")):
        server = Server(source, model, endpoint.value, _key(key_env), _body(body), request_timeout, deadline)
        with Progress(enabled=sys.stderr.isatty()) as progress:
            found, seen = observe_scenario(server, *_scenario(scenario, set_, seed), seed=seed, progress=progress)
    else:
        rule, way_out = "must be an http:// address, or a file without a scenario", "A file has its own load."
        require(scenario is None and not set_, "source", rule, source, way_out)
        read = read_benchmark(Path(source), run)
        seen = None if isinstance(read, Aggregates) else read
        found = aggregate_figures(read) if isinstance(read, Aggregates) else observed_figures(read)
    if output is not None:
        write_observation(found, seen, output)
    _emit(found, show.observation, format, None, "")


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    require(variable in os.environ, "key-env", "must name an environment variable that is set", variable)
    return os.environ[variable]


def _body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    require(isinstance(body, dict), "body", "must be a JSON object", text, """Pass --body '{"ignore_eos": true}'.""")
    return dict(body)


@app.command()
def schema() -> None:
    """Print the JSON schema of scenario files: editors check and complete a scenario with it."""
    from planner.scenario import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")


validate_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Hold predictions against measurements.")
app.add_typer(validate_app, name="validate")


@validate_app.command("kernels")
def validate_kernels(
    directory: Annotated[Path, typer.Argument(help="folder of kernel measurements in the layout of Vidur's profiles")],
    device: Annotated[str, typer.Option(help="device of the files: h100 or a100")],
    profile: Annotated[str, typer.Option(help="efficiency profile: name or TOML file; nothing is fitted")],
    format: FormatOption = Format.table,
    output: OutputOption = None,
) -> None:
    """Predicted against measured step times, by model, tensor parallelism and phase."""
    from calibration import validate

    from . import show

    result = validate.validate_kernels(directory, device, profile)
    if output is not None:
        from .report import validation as report

        _pages(output, report.kernels(result, validate.device_steps(directory, device, profile), _command()))
    _emit(result, show.kernels, format, output, "kernels.json")


@validate_app.command("steps")
def validate_steps(
    csv: Annotated[Path, typer.Argument(help="CSV that `tierwise measure` wrote")],
    profile: Annotated[str, typer.Option(help="efficiency profile: name or TOML file; nothing is fitted")],
    mode: Annotated[str | None, typer.Option(help="eager, graphs or compile; by default that of the profile")] = None,
    format: FormatOption = Format.table,
    output: OutputOption = None,
) -> None:
    """Predicted against measured steps of models the profile was not fitted on."""
    from calibration import step_fit

    from . import show

    result = step_fit.validate_steps(csv, profile, mode)
    if output is not None:
        from .report import validation as report

        _pages(output, report.steps(result, step_fit.unseen_steps(csv, profile, mode)[0], _command()))
    _emit(result, show.steps, format, output, "steps.json")


@validate_app.command("speculation")
def validate_speculation(
    csv: Annotated[Path, typer.Argument(help="CSV of published or logged speculation measurements")],
    format: FormatOption = Format.table,
    output: OutputOption = None,
) -> None:
    """The time model given lengths and step times, and the length model given acceptances, held apart."""
    from calibration import speculation

    from . import show

    result = speculation.validate_speculation(csv)
    if output is not None:
        from .report import validation as report

        _pages(output, report.speculation(result, speculation.predictions(csv), _command()))
    _emit(result, show.speculation, format, output, "speculation.json")


@validate_app.command("serving")
def validate_serving(
    csv: Annotated[Path, typer.Argument(help="CSV of measured serving points, AIConfigurator's silicon_e2e layout")],
    protocols: Annotated[
        Path | None, typer.Option(help="TOML of how the points were measured; by default what is known of public ones")
    ] = None,
    profile: ProfileOption = None,
    format: FormatOption = Format.table,
    output: OutputOption = None,
) -> None:
    """Mean TTFT and TPOT of measured closed loops, simulated with the engine's rules; nothing is fitted."""
    from functools import partial

    from calibration import serving
    from calibration.profiles import load_profile
    from planner.serving import predict_point

    from . import show

    if profile is not None:
        load_profile(profile)  # refused once, not point by point
    with _progress() as progress:
        result, rows = serving.validate_serving(
            csv,
            partial(predict_point, profile=profile),
            protocols or serving.PROTOCOLS,
            partial(progress, "predicting"),
        )
    if output is not None:
        from .report import validation as report

        _pages(output, report.serving(result, rows, _command()))
        rows.to_csv(output / "serving.csv", index=False)
    _emit(result, show.serving, format, output, "serving.json")


@validate_app.command("cascade")
def validate_cascade(
    csv: Annotated[Path, typer.Argument(help="per-sample quality of model tiers, CSV or gzip CSV")],
    tiers: Annotated[
        str | None, typer.Option(help="models from cheap to dear, comma-separated; a default by file")
    ] = None,
    seed: SeedOption = None,
    format: FormatOption = Format.table,
    output: OutputOption = None,
) -> None:
    """Stop-or-escalate policies on real outcomes: fitted and tested in disjoint folds."""
    from calibration.cascade_validation import validate_cascade as evaluate

    from . import show

    chosen = tuple(name.strip() for name in tiers.split(",")) if tiers else None
    result = evaluate(csv, chosen, seed=seed or 0)
    if output is not None:
        from .report import validation as report

        _pages(output, report.cascade(result, _command()))
    _emit(result, show.cascades, format, output, "cascade.json")


@validate_app.command("quality")
def validate_quality(
    csv: Annotated[Path, typer.Argument(help="per-sample quality of model tiers, CSV or gzip CSV")],
    tiers: Annotated[
        str | None, typer.Option(help="models from cheap to dear, comma-separated; a default by file")
    ] = None,
    seed: SeedOption = None,
    format: FormatOption = Format.table,
    output: OutputOption = None,
) -> None:
    """P(tier right) and P(next tier rescues), out of fold; --output keeps predictors trained on all prompts."""
    from calibration import quality_validation as quality

    from . import show

    chosen = tuple(name.strip() for name in tiers.split(",")) if tiers else None
    result = quality.validate_quality(csv, chosen, seed=seed or 0)
    if output is not None:
        from .report import validation as report

        _pages(output, report.quality(result, quality.DRAWN, _command()))
        quality.save_predictors(csv, output, chosen, seed=seed or 0)
    _emit(result, show.quality, format, output, "quality.json")


@validate_app.command("live")
def validate_live(
    quick: Annotated[bool, typer.Option("--quick", help="five smaller models, about 2 minutes on two cores")] = False,
    text: Annotated[Path | None, typer.Option(help="folder of text; by default Python's own library")] = None,
    workers: Annotated[int, typer.Option(help="processes that train, one thread each")] = 2,
    seed: SeedOption = None,
    format: FormatOption = Format.table,
    output: OutputOption = None,
) -> None:
    """Small models trained, timed and run on this machine: acceptance, speculation and a cascade held to theory.

    About half an hour on two idle cores, longer on busy ones. With --output the models are kept there, a run that was
    interrupted goes on where it was, and live.json is written.
    """
    from dataclasses import replace

    from calibration import live

    from . import show

    size = live.QUICK if quick else live.FULL
    if seed is not None:
        size = replace(size, recipe=replace(size.recipe, seed=seed))
    if output is not None:
        _folder(output)
    folder = None if output is None else output / "models"
    with Progress(enabled=sys.stderr.isatty()) as progress:
        result = live.validate_live(size, folder, text, workers, progress)
    if output is not None:
        from .report import validation as report

        _pages(output, report.live(result, _command()))
    _emit(result, show.live, format, output, "live.json")


@app.command()
def measure(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="checkpoint folder, config.json, catalog name"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="CSV to write or continue; with --acceptance a JSON file")] = None,
    recipe: Annotated[str | None, typer.Option(help="shipped recipe or TOML file; options given change it")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the run, its memory and time; use no GPU")] = False,
    device: Annotated[str | None, typer.Option(help="cpu (default) or cuda")] = None,
    accelerator: Annotated[str | None, typer.Option(help="GPU of the catalog; by default what it calls itself")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; by default fp32 on a CPU, else bf16")] = None,
    tp: Annotated[str | None, typer.Option(help="GPUs, as 1,2,4: one launch under torchrun for each")] = None,
    placement: Annotated[str | None, typer.Option(help="single (default), or device-map to spread layers")] = None,
    mode: Annotated[str | None, typer.Option(help="of eager, graphs (CUDA graphs), compile: as eager,graphs")] = None,
    batch: Annotated[str | None, typer.Option(help="sequences of a step, as 1,8")] = None,
    context: Annotated[str | None, typer.Option(help="tokens cached of each, as 128,512")] = None,
    new: Annotated[str | None, typer.Option(help="new tokens of each, as 1,5: 1 decodes, more verify")] = None,
    prefill: Annotated[str | None, typer.Option(help="tokens of a prompt, as 128,512")] = None,
    repeats: Annotated[int | None, typer.Option(help="times each point is timed")] = None,
    threads: Annotated[int | None, typer.Option(help="of the CPU; 1 by default")] = None,
    clock: Annotated[
        str | None, typer.Option(help="on a CPU: wall (default), or cpu where other programs run too")
    ] = None,
    acceptance: Annotated[bool, typer.Option("--acceptance", help="acceptance and real speculation of a pair")] = False,
    target: Annotated[Path | None, typer.Option(help="with --acceptance: checkpoint folder of the target")] = None,
    draft: Annotated[Path | None, typer.Option(help="with --acceptance: checkpoint folder of the draft")] = None,
    text: Annotated[Path | None, typer.Option(help="with --acceptance: text file that is read and continued")] = None,
    draft_length: Annotated[str | None, typer.Option(help="with --acceptance: draft lengths, as 1,2,4")] = None,
    tokens: Annotated[int | None, typer.Option(help="with --acceptance: tokens to write after each prompt")] = None,
    prompts: Annotated[int | None, typer.Option(help="with --acceptance: prompts to continue")] = None,
    temperature: Annotated[float | None, typer.Option(help="with --acceptance: 0 is greedy; 1 by default")] = None,
    seed: SeedOption = None,
    format: FormatOption = Format.table,
) -> None:
    """Time prefill, decode and verify steps of a model; or measure acceptance and real speculation of a pair."""
    from calibration.measure import Request, load_recipe, plan_report, plan_run
    from calibration.measure import measure as run

    from . import show

    pair: dict[str, Any] = {
        "target": target,
        "draft": draft,
        "text": text,
        "draft-length": draft_length,
        "tokens": tokens,
    }
    pair |= {"prompts": prompts, "temperature": temperature}
    grid = {"batch": batch, "context": context, "new": new, "prefill": prefill}
    lists = {k: _whole_numbers(k, v) for k, v in (grid | {"tp": tp}).items() if v is not None}
    given: dict[str, Any] = {"device": device, "accelerator": accelerator, "dtype": dtype, "placement": placement}
    given |= {
        "repeats": repeats,
        "threads": threads,
        "clock": clock,
        "seed": seed,
        "mode": mode.split(",") if mode else None,
    }
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    if acceptance:
        timing = [*lists, *(k for k in given if k not in ("device", "dtype", "threads", "seed"))] + (models or [])
        require(not timing, "acceptance", "must come without models and options of step times", timing)
        _emit(_measured_pair(pair, given, output), show.acceptance, format, None, "")
        return
    stray = [k for k, v in pair.items() if v is not None]
    require(not stray, "acceptance", "must be given with", stray, "Add --acceptance.")
    require((recipe is None) != (not models), "model", "must be given, or a recipe, not both", models or recipe)
    if "tp" in lists:
        given["tp"] = lists.pop("tp")
    if recipe is None:
        given.setdefault("dtype", "bf16" if device == "cuda" else "fp32")
    base = load_recipe(recipe) if recipe else Request(models=tuple(models or ()))
    request = dataclasses.replace(base, **given, grid=dataclasses.replace(base.grid, **lists))
    planned = plan_run(request, dry_run)
    if dry_run:
        _emit(plan_report(planned, output), show.measure_plan, format, None, "")
        return
    if output is None:
        refuse("output", "must be given", None, "Name the CSV file to write, --output FILE.csv.")
    require(output.parent.is_dir(), "output", "must lie in a folder that exists", str(output))
    try:
        with Progress(enabled=sys.stderr.isatty()) as progress:
            result = run(planned, output, progress)
    except KeyboardInterrupt:
        raise SystemExit(
            _say(f"interrupted; what was measured is in {output}. The same command continues.", 130)
        ) from None
    if result["advice"]:
        _say(result["advice"], 0)
    if os.environ.get("RANK", "0") == "0":
        _emit(result | {"file": str(output)}, show.measured, format, None, "")


def _measured_pair(pair: dict[str, Any], given: dict[str, Any], output: Path | None) -> dict[str, Any]:
    from calibration.measure_acceptance import Pair, measure_acceptance

    for name in ("target", "draft", "text"):
        require(pair[name] is not None, name, "must be given with --acceptance", None)
    length = pair.pop("draft-length")
    fields = {k: v for k, v in pair.items() if v is not None} | given
    if length is not None:
        fields["draft_lengths"] = _whole_numbers("draft-length", length)
    result: dict[str, Any] = measure_acceptance(Pair(**fields))
    if output is not None:
        require(output.parent.is_dir(), "output", "must lie in a folder that exists", str(output))
        write_text(output, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def _whole_numbers(name: str, text: str) -> tuple[int, ...]:
    words = [w.strip() for w in text.split(",")]
    require(all(w.isdigit() for w in words), name, "must be whole numbers with commas between", text, "Such as 1,8.")
    return tuple(int(w) for w in words)


@app.command()
def fit(
    source: Annotated[Path, typer.Argument(help="CSV of `tierwise measure`, or folder of kernel measurements")],
    output: Annotated[Path, typer.Option(help="profile to write, a .toml file")],
    device: Annotated[str | None, typer.Option(help="of a folder: device of its files, h100, a100, h200")] = None,
    layout: Annotated[str, typer.Option(help="of a folder: vidur or aiconfigurator")] = "vidur",
    model: Annotated[
        list[str] | None, typer.Option(help="model to fit on, as its file names it; all by default")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="of a CSV with several: eager, graphs or compile")] = None,
    name: Annotated[str | None, typer.Option(help="name of the profile; by default that of the file")] = None,
    format: FormatOption = Format.table,
) -> None:
    """Measured steps or kernels to an efficiency profile, with covariance, spread and the rows it saw."""
    from . import show, verbs

    result = verbs.fit(source, output, device=device, layout=layout, model=model or (), mode=mode, name=name)
    _emit(result, show.fitted, format, None, "")


def _sweep(
    scenario: str | None, settings: list[str], axes: list[str], seed: int | None, format: Format, output: Path | None
) -> None:
    from planner.report import write_sweep
    from planner.scenario import SHIPPED
    from planner.sweep import grid, notes, parse_axis, sweep

    from . import show

    _scenario(scenario, settings, seed)  # refuse what is wrong without the sweep in its own words
    points = grid([parse_axis(axis) for axis in axes], scenario or SHIPPED, settings)
    if output is not None:
        _folder(output)
    try:
        with _progress() as progress:
            rows, reused = sweep(points, seed, progress, output)
    except KeyboardInterrupt:
        kept = (
            f"finished points are in {output}/sweep.jsonl: the same command goes on" if output else "nothing was kept"
        )
        raise Interrupted(kept) from None
    result = {"scenario": points[0].scenario.name, "points": rows, "notes": notes(rows)}
    if output is not None:
        from .figures import picture
        from .figures.sweep import pictures

        write_sweep(result, output, picture.files(pictures(result)))
    if reused:
        sys.stderr.write(f"tierwise: {reused} of {len(rows)} points were in {output}/sweep.jsonl\n")
    _emit(result, show.sweep, format, None, "")


def _pareto(
    scenario: str | None,
    settings: list[str],
    objectives: str,
    seed: int | None,
    means: Any,
    format: Format,
    output: Path | None,
) -> None:
    from planner.objectives import pareto_plans, parse_objectives
    from planner.report import write_pareto

    from . import show

    names = parse_objectives(objectives)
    if output is not None:
        _folder(output)
    asked, start = _scenario(scenario, settings, seed)
    with _progress() as progress:
        result = pareto_plans(asked, start, names, seed, progress, means)
    if output is not None:
        from .figures import objectives as figures
        from .figures import picture

        write_pareto(result, output, picture.files(figures.pictures(result)))
    _emit(result, show.pareto, format, None, "")


def _scenario(name: str | None, overrides: list[str] | None, seed: int | None) -> tuple[Any, Path]:
    from planner.scenario import SHIPPED, load_scenario

    require(seed is None or seed >= 0, "seed", "must be at least 0 [-]", seed, "Any whole number will do.")
    return load_scenario(name or SHIPPED, overrides or ())


def _progress() -> Progress:
    """Return what shows a person on stderr what is being done; the first run of all also says why it waits."""
    from simulator.engine import is_compiled

    progress = Progress(enabled=sys.stderr.isatty())
    if not is_compiled():
        progress.note("compiling the simulator, once: about 15 s")
    return progress


def _emit(result: dict[str, Any], table: Any, format: Format, output: Path | None, name: str) -> None:
    text = json.dumps(result, indent=2, allow_nan=False)
    if output is not None:
        _folder(output)
        write_text(output / name, text + "\n")
    if format is Format.json:
        sys.stdout.write(text + "\n")
    else:
        table(result)


def _pages(output: Path, contents: dict[str, bytes]) -> None:
    from planner.report import write_contents

    write_contents(output, contents)


def _command() -> str:
    """Return the command that was given, without what it does not depend on."""
    words = sys.argv[1:]
    for option in ("--output", "--format"):
        words = [w for i, w in enumerate(words) if option not in (w.partition("=")[0], words[i - 1] if i else "")]
    return shlex.join(["tierwise", *words])


def _precision(name: str) -> Literal["bf16", "fp8"]:
    require(name in ("bf16", "fp8"), "precision", "must be one of bf16, fp8", name)
    return "bf16" if name == "bf16" else "fp8"


def _folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`output` must be a folder that can be made; got {path} ({error.strerror}).") from None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises
    ------
    InputError
        If the folder cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"`output` must be a folder that can be written; got {path} ({error.strerror}).") from None


def main() -> None:
    """Run the command line and leave with its exit code."""
    gc.set_threshold(YOUNG)
    atexit.register(gc.freeze)  # the process ends: nothing needs to be collected any more
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer turns a KeyboardInterrupt into this code and says nothing
            raise KeyboardInterrupt
    except InputError as error:
        code = _say(str(error), 2)
    except InfeasibleError as error:
        code = _say(str(error), 3)
    except typer.TyperException as error:
        message = getattr(error, "format_message", error.__str__)()
        if message.startswith("Usage:"):  # no command given: the help, as it is
            sys.stderr.write(message + "\n")
            sys.exit(2)
        code = _say(_usage(message), 2)
    except Interrupted as error:
        code = _say(f"interrupted; {error}.", INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        code = _say("interrupted; nothing was written.", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def _usage(message: str) -> str:
    """Return what the argument parser says in the form of our own messages."""
    for pattern, said in (
        (
            r"No such option: (\S+).*",
            r"`\1` must be a known option; got one that is not. See `tierwise COMMAND --help`.",
        ),
        (r"No such command '(.+)'.*", r"`command` must be one of those of `tierwise --help`; got '\1'."),
        (r"Missing (?:option|argument) '(.+)'.*", r"`\1` must be given; got nothing. See `tierwise COMMAND --help`."),
        (
            r"Invalid value for '(.+?)': (?:Value error, )?'(.*)' is not one of (.*?)\.?",
            r"`\1` must be one of \3; got '\2'.",
        ),
        (
            r"Invalid value for '(.+?)': (?:Value error, )?(.*?)\.?",
            r"`\1` must be a valid value; got one that is not: \2.",
        ),
    ):
        if match := re.fullmatch(pattern, " ".join(message.split())):
            return match.expand(said)
    return message


def _say(message: str, code: int) -> int:
    sys.stderr.write("tierwise: " + " ".join(message.split()) + "\n")
    return code

"""The verbs of the command line as functions: the same arguments, the same dictionaries as ``--format json``.

All of them refuse bad input with :class:`~theory.errors.InputError` (a ``ValueError``; the message names the input, its
rule, the value received and the way out) and say :class:`~theory.errors.InfeasibleError` when nothing satisfies the
constraints (the message names the one that binds, and the nearest plan).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import show
from .result import Result

if TYPE_CHECKING:
    from calibration.measure import Request
    from calibration.measure_acceptance import Pair
    from calibration.observe import Server
    from planner.predict import DraftModel
    from planner.storage import Means
    from theory.latency import Profile
    from theory.specs import Deployment, Precision

SHIPPED = "13b-34b-70b-h100-node"


def plan(
    scenario: str | Path = SHIPPED,
    set: Sequence[str] = (),
    profile: str | None = None,
    seed: int | None = None,
    means: Means | None = None,
) -> Result:
    """Return the plan of a scenario; see ``tierwise plan``.

    Parameters
    ----------
    scenario : str or Path
        Shipped name or YAML file.
    set : sequence of str
        Overrides ``a.b=value``.
    profile : str, optional
        Efficiency profile, a name or a TOML file; the accelerator's own by default.
    seed : int, optional
        Of every random draw; the scenario's by default [-].
    means : Means, optional
        Where the search is kept and who does its work; see :class:`planner.storage.Means`.

    Raises
    ------
    InputError
        If the scenario is broken.
    InfeasibleError
        If nothing keeps its constraints.
    """
    from planner.plan import plan_scenario, silent
    from planner.scenario import load_scenario

    found = plan_scenario(*load_scenario(scenario, set), profile=profile, seed=seed, progress=silent, means=means)
    return Result(found, show.plan)


def sweep(
    axes: Sequence[str], scenario: str | Path = SHIPPED, set: Sequence[str] = (), seed: int | None = None
) -> Result:
    """Return the best plan at each point of a grid of settings, under ``points``; see ``tierwise plan --sweep``.

    Parameters
    ----------
    axes : sequence of str
        ``KEY=a:b:logN``, ``KEY=a:b:linN`` or ``KEY=v1,v2``; several give the grid.
    scenario, set, seed
        As in :func:`plan`.

    Raises
    ------
    InputError
        If an axis or the scenario is broken. A point at which nothing is feasible is a row that says so.
    """
    from planner.plan import silent
    from planner.sweep import grid, parse_axis
    from planner.sweep import sweep as swept

    points = grid([parse_axis(axis) for axis in axes], scenario, set)
    rows, _ = swept(points, seed, silent)
    return Result({"scenario": points[0].scenario.name, "points": rows}, show.sweep)


def plan_day(
    scenario: str | Path = "fleet-day",
    set: Sequence[str] = (),
    profile: str | None = None,
    seed: int | None = None,
    means: Means | None = None,
) -> Result:
    """Return the plan of a scenario's day; see ``tierwise plan --day``. Arguments and errors as :func:`plan`."""
    from planner import day
    from planner.scenario import load_scenario

    asked, folder = load_scenario(scenario, set)
    return Result(day.plan_day(asked, folder, profile=profile, seed=seed, means=means), show.day)


def simulate(
    scenario: str | Path = SHIPPED,
    set: Sequence[str] = (),
    profile: str | None = None,
    seed: int | None = None,
    replications: int = 1,
    workers: int = 1,
) -> Result:
    """Return what happens when a scenario's deployment is simulated; see ``tierwise simulate``.

    Parameters
    ----------
    scenario, set, profile, seed
        As in :func:`plan`.
    replications : int
        Independent runs, for intervals across them [-].
    workers : int
        Processes that share them; the result is the same for any number. A script that asks for more than one needs
        ``if __name__ == "__main__":`` [-].

    Raises
    ------
    InputError
        If the scenario is broken.
    InfeasibleError
        If the deployment does not fit.
    """
    from planner.plan import silent
    from planner.scenario import load_scenario
    from planner.simulate import simulate_scenario

    found = simulate_scenario(*load_scenario(scenario, set), profile, seed, silent, replications, workers)
    return Result(found, show.simulation)


def predict(
    deployment: Deployment,
    profile: Profile,
    draft: DraftModel | None = None,
    batch: int = 1,
    context: float = 1024,
    level: float = 0.9,
) -> Result:
    """Return step times, best draft length and speed-up at one batch and context; see ``tierwise predict``.

    Parameters
    ----------
    deployment : Deployment
        The target, its accelerator and tensor parallelism.
    profile : Profile
        Efficiencies, as :func:`calibration.profiles.serving_profile` returns them.
    draft : DraftModel, optional
        Draft and its acceptance.
    batch : int
        Sequences in the batch [-].
    context : float
        Tokens cached of each sequence [tokens].
    level : float
        Coverage of the intervals [-].

    Raises
    ------
    InputError
        If the batch is below 1, or the context longer than the model's.
    """
    from planner.predict import predict as predicted

    return Result(predicted(deployment, profile, draft, batch, context, level), show.prediction)


def draft(
    target_params: float,
    target_tokens: float,
    draft_tokens: float,
    *,
    accelerator: str | None = None,
    tp: int = 1,
    batch: Sequence[int] = (1,),
    context: float = 1024,
    target: str | None = None,
    vocab: int = 128256,
    loss_law: str = "hoffmann-2022",
    acceptance_law: str = "sdsl",
    extrapolate: bool = False,
    precision: Precision = "bf16",
    profile: str | None = None,
) -> Result:
    """Return the best draft size, draft length and speed-up for a target that need not exist; see ``tierwise draft``.

    Parameters
    ----------
    target_params : float
        Parameters of the target [-].
    target_tokens, draft_tokens : float
        Tokens that target and draft are trained on [tokens].
    accelerator : str, optional
        Accelerator of the catalog; without one the cost of a step is its operations.
    tp : int
        Tensor-parallel degree of the target [GPUs].
    batch : sequence of int
        Sequences in the batch; the plan is for the first [-].
    context : float
        Tokens cached of each sequence [tokens].
    target : str, optional
        Model whose shape the target has; a Llama-style shape of its size by default.
    vocab : int
        Rows of the embedding table, for derived shapes [-].
    loss_law, acceptance_law : str
        Names of the laws.
    extrapolate : bool
        Whether the laws may be used far outside their ranges; the result is then tagged.
    precision : str
        ``bf16`` or ``fp8``.
    profile : str, optional
        Efficiency profile, a name or a TOML file.

    Raises
    ------
    InputError
        If a name is unknown, a number out of range, or a law would be extrapolated unasked.
    """
    from calibration.profiles import serving_profile
    from planner.draft import Hardware, Laws, Training, draft_plan
    from theory import catalog
    from theory.acceptance import acceptance_law as law_of_acceptance
    from theory.scaling import loss_law as law_of_loss

    hardware = None
    if accelerator is not None:
        gpu = catalog.accelerator(accelerator)
        hardware = Hardware(
            gpu,
            serving_profile(gpu, profile),
            tp=tp,
            batches=tuple(batch),
            context=context,
            precision=precision,
            target=catalog.model(target) if target else None,
            vocab=vocab,
        )
    laws = Laws(law_of_loss(loss_law), law_of_acceptance(acceptance_law), extrapolate=extrapolate)
    return Result(draft_plan(Training(target_params, target_tokens, draft_tokens), hardware, laws), show.draft)


def measure(request: Request, output: str | Path) -> Result:
    """Time the steps of models on this machine into a CSV that :func:`fit` reads; see ``tierwise measure``.

    Parameters
    ----------
    request : Request
        Models and points; see :class:`calibration.measure.Request`.
    output : str or Path
        CSV to write or continue.

    Raises
    ------
    InputError
        If the request cannot be met here, or the file is of another run.
    InfeasibleError
        If memory ran out at every point.
    """
    from calibration.measure import measure as timed
    from calibration.measure import plan_run
    from planner.plan import silent

    return Result(timed(plan_run(request), Path(output), silent) | {"file": str(output)}, show.measured)


def measure_acceptance(pair: Pair) -> Result:
    """Return acceptance and real speculation of a pair of checkpoints; see ``tierwise measure --acceptance``.

    Parameters
    ----------
    pair : Pair
        Target, draft, text and settings; see :class:`calibration.measure_acceptance.Pair`.

    Raises
    ------
    InputError
        If the pair does not share a vocabulary, or the text is too short.
    """
    from calibration.measure_acceptance import measure_acceptance as measured

    return Result(measured(pair), show.acceptance)


def observe(server: Server, scenario: str | Path = SHIPPED, set: Sequence[str] = (), seed: int | None = None) -> Result:
    """Send a scenario's requests to a running server and return what came back; see ``tierwise observe``.

    Parameters
    ----------
    server : Server
        Address and limits; see :class:`calibration.observe.Server`.
    scenario, set, seed
        As in :func:`plan`.

    Raises
    ------
    InputError
        If the scenario is broken, or nothing answers at the address.
    """
    from planner.observed import observe_scenario
    from planner.plan import silent
    from planner.scenario import load_scenario

    found, _ = observe_scenario(server, *load_scenario(scenario, set), seed=seed, progress=silent)
    return Result(found, show.observation)


def fit(
    source: str | Path,
    output: str | Path,
    *,
    device: str | None = None,
    layout: str = "vidur",
    model: Sequence[str] = (),
    mode: str | None = None,
    name: str | None = None,
) -> Result:
    """Fit an efficiency profile to measured steps or kernels, and write it; see ``tierwise fit``.

    Parameters
    ----------
    source : str or Path
        CSV of ``tierwise measure``, or a folder of kernel measurements.
    output : str or Path
        Profile to write, a .toml file.
    device, layout : str
        Of a folder: device of its files, and ``vidur`` or ``aiconfigurator``.
    model : sequence of str
        Models to fit on, as the file names them; all by default.
    mode : str, optional
        Of a CSV with several: ``eager``, ``graphs`` or ``compile``.
    name : str, optional
        Of the profile; that of the file by default.

    Raises
    ------
    InputError
        If the source or the output is not what it must be, or the data are too weak to fit on.
    """
    from calibration.fit import fit_device
    from calibration.profiles import save_profile
    from calibration.step_fit import fit_steps
    from theory.errors import refuse, require

    where, target = Path(source), Path(output)
    require(target.suffix == ".toml", "output", "must be a .toml file", str(output))
    require(target.parent.is_dir(), "output", "must lie in a folder that exists", str(output))
    if where.is_file():
        require(device is None, "device", "must be left out for a CSV: its header tells the device", device)
        fitted = fit_steps(where, name or target.stem, mode, tuple(model))
    else:
        if device is None:
            refuse("device", "must be given for a folder of kernel measurements", None, "Pass --device h100.")
        fitted = fit_device(where, device, layout, tuple(model), name or target.stem)
    save_profile(fitted, target)
    found: dict[str, Any] = {
        "name": fitted.name,
        "accelerator": fitted.accelerator,
        "provenance": fitted.provenance,
        "parameters": {p: getattr(fitted.efficiency, p) for p in fitted.parameters},
        "standard_error_of_ln": {p: fitted.covariance[i][i] ** 0.5 for i, p in enumerate(fitted.parameters)},
        "residual": dict(fitted.residual),
        "rows": fitted.rows,
        "file": str(output),
    }
    return Result(found, show.fitted)


def validate_kernels(directory: str | Path, device: str, profile: str) -> Result:
    """Return predicted against measured kernel times of a folder; see ``tierwise validate kernels``.

    Parameters
    ----------
    directory : str or Path
        Folder in the layout of Vidur's profiles.
    device : str
        Device of its files: ``h100`` or ``a100``.
    profile : str
        Efficiency profile, a name or a TOML file; nothing is fitted.

    Raises
    ------
    InputError
        If the folder, the device or the profile is not what it must be.
    """
    from calibration import validate

    return Result(validate.validate_kernels(Path(directory), device, profile), show.kernels)


def validate_steps(csv: str | Path, profile: str | Path, mode: str | None = None) -> Result:
    """Return predicted against measured steps of models the profile was not fitted on.

    Parameters
    ----------
    csv : str or Path
        What ``tierwise measure`` wrote.
    profile : str or Path
        Efficiency profile, a name or a TOML file; nothing is fitted.
    mode : str, optional
        ``eager``, ``graphs`` or ``compile``; that of the profile by default.

    Raises
    ------
    InputError
        If the file is none of measurements, or the profile is of another machine.
    """
    from calibration.step_fit import validate_steps as validated

    return Result(validated(Path(csv), profile, mode), show.steps)


def validate_speculation(csv: str | Path) -> Result:
    """Return the errors of time model and length model on published speculation rows, held apart.

    Parameters
    ----------
    csv : str or Path
        Rows of published or logged speculation measurements.

    Raises
    ------
    InputError
        If the file is not of that layout.
    """
    from calibration.speculation import validate_speculation as validated

    return Result(validated(Path(csv)), show.speculation)


def validate_serving(csv: str | Path, protocols: str | Path | None = None, profile: str | None = None) -> Result:
    """Return predicted against measured TTFT and TPOT of closed loops; nothing is fitted.

    Parameters
    ----------
    csv : str or Path
        Serving points in AIConfigurator's layout.
    protocols : str or Path, optional
        TOML of how the points were measured; by default what is known of public ones.
    profile : str, optional
        Efficiency profile; the accelerator's own by default.

    Raises
    ------
    InputError
        If a file is not of its layout.
    """
    from functools import partial

    from calibration import serving
    from planner.serving import predict_point

    where = Path(protocols) if protocols is not None else serving.PROTOCOLS
    return Result(serving.validate_serving(Path(csv), partial(predict_point, profile=profile), where)[0], show.serving)


def validate_cascade(csv: str | Path, tiers: Sequence[str] | None = None, seed: int = 0) -> Result:
    """Return stop-or-escalate policies on real outcomes, fitted and tested in disjoint folds.

    Parameters
    ----------
    csv : str or Path
        Per-sample quality of model tiers.
    tiers : sequence of str, optional
        Models from cheap to dear; a default by file.
    seed : int
        Of the folds and resamples [-].

    Raises
    ------
    InputError
        If the file is refused, or a group has fewer than 50 prompts.
    """
    from calibration.cascade_validation import validate_cascade as validated

    return Result(validated(Path(csv), tiers, seed=seed), show.cascades)


def validate_quality(csv: str | Path, tiers: Sequence[str] | None = None, seed: int = 0) -> Result:
    """Return how well it is predicted that a tier is right and that the next one rescues, out of fold.

    Parameters
    ----------
    csv, tiers, seed
        As in :func:`validate_cascade`.

    Raises
    ------
    InputError
        If the file is refused, or a group has fewer than 50 prompts.
    """
    from calibration.quality_validation import validate_quality as validated

    return Result(validated(Path(csv), tiers, seed=seed), show.quality)


def validate_live(quick: bool = False, folder: str | Path | None = None, workers: int = 2) -> Result:
    """Return the whole theory held to small models that are trained, timed and run on this machine.

    Parameters
    ----------
    quick : bool
        Five smaller models, about 2 minutes on two cores instead of half an hour.
    folder : str or Path, optional
        Where models are kept and used again; by default nowhere.
    workers : int
        Processes that train, one thread each [-].

    Raises
    ------
    InputError
        If the number of workers is below 1.
    """
    from calibration import live

    kept = None if folder is None else Path(folder)
    return Result(live.validate_live(live.QUICK if quick else live.FULL, kept, workers=workers), show.live)

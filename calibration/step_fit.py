"""Measured steps -> :class:`~theory.latency.Profile`, and a profile held against measured steps it was not fitted on.

Whole steps tell far fewer parameters than single kernels do: the few below are fitted, all others stay what they were.
On a GPU the start is the profile of its serving kernels. On a CPU nothing overlaps, so that the fixed times of all
operations add up and no step tells them apart: ``gemm_start`` carries them all.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import least_squares

from theory.catalog import accelerators
from theory.errors import refuse, require
from theory.latency import PARTS, SHARES, Efficiency, Profile, step_time, step_time_interval
from theory.specs import Accelerator

from .fit import ROWS_PER_PARAMETER, WORST_ERROR, WeakDataError
from .measurements import Measurements, Point, point_of, read_measurements, work_of
from .profiles import load_profile, serving_profile, transfer
from .validate import summarise, worst_rows

Array = NDArray[np.float64]

OUTLIER = 0.1  # residual of ln(time) from which a row counts as an outlier (soft L1) [-]
LEAST_SPREAD = 0.02  # of ln(time) of rows about the law [-]; assumed, clocks and heat alone make that much
TIMES = (1e-9, 1.0)  # how far the search may go [s]
SHARE = (0.05, 1.0)  # the same of shares: less is no share but another law [-]
EAGER_LAYER_S = 0.43e-3  # launches of a layer by transformers without CUDA graphs, before a fit [s]; assumed
CPU_EFFICIENCY = Efficiency(
    gemm_start=2e-5,  # an operation and what happens about it, before a fit [s]; assumed
    **dict.fromkeys(("gemm_wave", "attention_start", "prefill_start", "prefill_tail", "element_start"), 0.0),
)
# What steps may tell, the first one in any case; those that they do not tell are held, the last first.
TOLD = {
    "cpu": ("gemm_start", "gemm_flops", "gemm_bandwidth", "prefill_flops", "kv_bandwidth", "element_bandwidth"),
    "eager": ("eager_layer", "gemm_flops", "gemm_bandwidth", "host_step", "kv_bandwidth", "prefill_flops"),
    "graphs": ("gemm_bandwidth", "gemm_flops", "host_step", "kv_bandwidth", "prefill_flops"),
}
TOLD["compile"] = TOLD["graphs"]


def start_profile(machine: Accelerator, mode: str) -> Profile:
    """Return what is believed of a machine before its steps are measured.

    Examples
    --------
    >>> from theory.catalog import accelerator
    >>> start_profile(accelerator("h100-sxm"), "eager").efficiency.eager_layer
    0.00043
    """
    if not machine.matrix_units:
        return Profile("start", machine.name, "transformers", "assumed", CPU_EFFICIENCY)
    profile = serving_profile(machine)
    launches = EAGER_LAYER_S if mode == "eager" else 0.0
    return replace(profile, efficiency=replace(profile.efficiency, eager_layer=launches))


def predict_points(found: Measurements, points: list[Point], profile: Profile, level: float = 0.9) -> pd.DataFrame:
    """Return predicted step times with the interval of :func:`~theory.latency.step_time_interval`, in that order [s].

    The interval is left out (``low`` = ``high`` = predicted) where the profile has no residual spreads.
    """
    out = pd.DataFrame(index=range(len(points)), columns=["predicted", "low", "high"], dtype=float)
    for (name, tp), at in _by_model(points):
        where = (found.models[name], found.accelerator, profile, work_of([points[i] for i in at]), tp)
        time = step_time(*where).total
        low, high = step_time_interval(*where, level=level) if set(profile.residual) == set(PARTS) else (time, time)
        out.loc[at] = np.stack(np.broadcast_arrays(time, low, high), axis=-1)
    return out


def _by_model(points: list[Point]) -> list[tuple[tuple[str, int], list[int]]]:
    order = sorted(range(len(points)), key=lambda i: (points[i].model, points[i].tp))
    return [(k, list(g)) for k, g in groupby(order, key=lambda i: (points[i].model, points[i].tp))]


# --- the fit ---------------------------------------------------------------------------------------------------------


def fit_steps(path: Path, name: str, mode: str | None = None, models: tuple[str, ...] = ()) -> Profile:
    r"""Return the profile that minimises the robust misfit of ln(step time).

    .. math:: \min_\theta \sum_i \rho\!\left(\ln \frac{\hat t_i(\theta)}{t_i}\right), \qquad
              \Sigma = s^2 (J^T J)^{-1}

    with rho the soft L1 loss, t the median of the repeats, J by the logarithms of the parameters and s the spread of
    the residuals. Parameters with a standard error above 50 % are held where they started, one after the other.

    Parameters
    ----------
    mode : str or None
        Of the rows to fit: eager, graphs or compile; may be left out if the file has one only.
    models : tuple of str
        To fit on, by their names in the file; all if none is named. The others can then be predicted.

    Raises
    ------
    InputError
        If the file is not one of measurements, or has no such rows.
    WeakDataError
        If there are fewer than 4 rows for a parameter, or the first one has a standard error above 50 %. The exception
        carries the estimate.
    """
    found = read_measurements(path)
    rows = _rows(found, _one_mode(found, mode), models)
    points = [point_of(r) for r in rows.to_dict("records")]
    measured = rows["median_s"].to_numpy(float)
    machine, start = found.accelerator, start_profile(found.accelerator, points[0].mode)
    told = TOLD["cpu" if not machine.matrix_units else points[0].mode]
    if max(p.tp for p in points) > 1:
        told = (*told, "link_bandwidth", "reduce_start")
    names = told[: len(rows) // ROWS_PER_PARAMETER]
    if not names:
        _refuse(start.efficiency, {}, f"{len(rows)} rows")
    efficiency, names, covariance, residual = _search(found, points, measured, start, names)
    fitted = replace(
        start,
        name=name,
        accelerator=machine.name,
        engine=f"transformers {points[0].mode}",
        provenance="fitted",
        efficiency=efficiency,
        parameters=names,
        covariance=tuple(tuple(float(v) for v in row) for row in covariance),
        residual=dict.fromkeys(PARTS, 1.0),
        rows=_said_of(found, points, [n for n in told if n not in names]),
        source=f"tierwise measure on {found.header['processor']}, {found.header['dtype']}; {machine.source}",
        date=datetime.date.today().isoformat(),
    )
    return replace(fitted, residual=dict.fromkeys(PARTS, _part_spread(found, points, fitted, residual)))


def _one_mode(found: Measurements, mode: str | None) -> str:
    modes = sorted(found.rows["mode"].unique())
    if mode is None and len(modes) == 1:
        return str(modes[0])
    require(mode in modes, "mode", f"must be one of {', '.join(modes)}, those of the file", mode, "Pass --mode.")
    return str(mode)


def _rows(found: Measurements, mode: str, models: tuple[str, ...]) -> pd.DataFrame:
    strangers = [m for m in models if m not in found.models]
    require(not strangers, "model", f"must be one of {', '.join(found.models)}, those of the file", strangers)
    rows = found.rows[(found.rows["status"] == "ok") & (found.rows["mode"] == mode)]
    rows = rows[rows["model"].isin(models)] if models else rows
    require(len(rows) > 0, "measurements", "must hold timed rows of these models and this mode", 0)
    return rows.reset_index(drop=True)


def _search(
    found: Measurements,
    points: list[Point],
    measured: Array,
    start: Profile,
    names: tuple[str, ...],
    near: Efficiency | None = None,
) -> tuple[Efficiency, tuple[str, ...], Array, Array]:
    """Return the efficiency, the parameters the rows tell, their covariance [-] and the residuals of ln(time) [-].

    The search sets out from ``near``; what is held stays at ``start``.
    """
    misfit = _misfit(found, points, measured, start, names)
    bounds = np.log([SHARE if n in SHARES else TIMES for n in names]).T
    x0 = np.clip(np.log([max(getattr(near or start.efficiency, n), _least(n)) for n in names]), *bounds)
    found_at = least_squares(misfit, x0, bounds=bounds, loss="soft_l1", f_scale=OUTLIER, ftol=1e-6, xtol=1e-5)
    best = _with(start.efficiency, names, found_at.x)
    jacobian, residual = _slopes(misfit, found_at.x), misfit(found_at.x)
    spread = max(LEAST_SPREAD, _spread(residual)) * (len(residual) / max(len(residual) - len(names), 1)) ** 0.5
    covariance = spread**2 * _inverse(jacobian.T @ jacobian)
    errors = {n: float(np.sqrt(v)) for n, v in zip(names, np.diag(covariance), strict=True)}
    loose = [n for n in names if not errors[n] <= WORST_ERROR]
    if loose and len(names) > 1:  # if the first one is loose, another stands in for it
        idle = loose[-1] if loose[-1] != names[0] else names[-1]
        kept = tuple(n for n in names if n != idle)
        return _search(found, points, measured, start, kept, start.efficiency if idle != loose[-1] else best)
    if loose:
        _refuse(best, errors, f"a standard error of ln {names[0]} of {errors[names[0]]:.2g}")
    return best, names, covariance, residual


def _misfit(
    found: Measurements, points: list[Point], measured: Array, start: Profile, names: tuple[str, ...]
) -> Callable[[Array], Array]:
    groups = [(key, at, work_of([points[i] for i in at])) for key, at in _by_model(points)]
    models, machine, logs = found.models, found.accelerator, np.log(measured)

    def misfit(x: Array) -> Array:
        profile = replace(start, efficiency=_with(start.efficiency, names, x), parameters=(), covariance=())
        out = np.empty(len(logs))
        for (name, tp), at, work in groups:
            out[at] = np.log(step_time(models[name], machine, profile, work, tp).total) - logs[at]
        return out

    return misfit


def _with(efficiency: Efficiency, names: tuple[str, ...], x: Array) -> Efficiency:
    values = {n: min(float(np.exp(v)), 1.0 if n in SHARES else np.inf) for n, v in zip(names, x, strict=True)}
    return replace(efficiency, **values)


def _least(name: str) -> float:
    return SHARE[0] if name in SHARES else 1e-6


def _slopes(misfit: Callable[[Array], Array], x: Array, step: float = 1e-3) -> Array:
    """Return the derivative of the misfit, downwards, since a share may sit at 1."""
    base = misfit(x)
    return np.stack([(base - misfit(x - step * unit)) / step for unit in np.eye(len(x))], axis=-1)


def _inverse(information: Array) -> Array:
    """Return the inverse; infinity for a parameter that no row depends on."""
    seen = np.diag(information) > 1e-9
    out = np.diag(np.where(seen, 0.0, np.inf))
    out[np.ix_(seen, seen)] = np.linalg.pinv(information[np.ix_(seen, seen)])
    return out


def _spread(residual: Array) -> float:
    """Return sigma such that 90 % of the residuals lie within 1.645 sigma, as for a normal distribution [-]."""
    return float(np.quantile(np.abs(residual), 0.9)) / NormalDist().inv_cdf(0.95)


def _part_spread(found: Measurements, points: list[Point], unit: Profile, residual: Array) -> float:
    """Return the spread of each part with which the intervals of the fitted rows hold 90 % of them [-].

    Parts err independently, so each errs more than their sum; ``unit`` has a spread of 1 in every part.
    """
    alone = replace(unit, parameters=(), covariance=())
    wide = predict_points(found, points, alone, level=NormalDist().cdf(1.0) * 2 - 1)
    share = np.log(wide["high"].to_numpy() / wide["predicted"].to_numpy())
    return max(LEAST_SPREAD, _spread(residual / share))


def _refuse(estimate: Efficiency, errors: dict[str, float], why: str) -> None:
    raise WeakDataError(
        f"`measurements` must tell the first parameter (at least {ROWS_PER_PARAMETER} rows, a standard error of ln "
        f"below {WORST_ERROR:g}); got {why}. Measure more points, of models that differ in layers and width, with "
        "more repeats.",
        estimate,
        errors,
    )


def _said_of(found: Measurements, points: list[Point], held: list[str]) -> str:
    models = ", ".join(sorted({p.model for p in points}))
    rest = f"; held: {', '.join(held)}" if held else ""
    return f"measured steps, run {found.run}: {models}; {points[0].mode}; {len(points)} rows{rest}"


# --- the profile against other rows ----------------------------------------------------------------------------------


def fitted_models(profile: Profile, run: str) -> set[str]:
    """Return the models of that run that the profile was fitted on."""
    match = re.match(r"measured steps, run (\w+): ([^;]*);", profile.rows)
    return set(match.group(2).split(", ")) if match and match.group(1) == run else set()


def validate_steps(path: Path, profile: str | Path | Profile, mode: str | None = None) -> dict[str, Any]:
    """Return how far ``profile`` is from measured steps; nothing is fitted, and rows it was fitted on are left out.

    Returns
    -------
    dict
        ``steps`` (error summary with ``coverage``), ``by_group`` (model, tp, phase), ``worst``, ``profile``, ``mode``,
        ``left_out`` (rows it was fitted on) and ``noise`` (median of the half interquartile range of repeats) [-].

    Raises
    ------
    InputError
        If the file is not one of measurements, the profile is of another machine that is not in the catalog, or it was
        fitted on every row there is.
    """
    steps, chosen, left_out = unseen_steps(path, profile, mode)
    noise = (steps["high_s"] - steps["low_s"]) / 2 / steps["median_s"]
    groups = steps.groupby(["model", "tp", "phase"], sort=True)
    return {
        "steps": summarise(steps),
        "by_group": [dict(zip(("model", "tp", "phase"), k, strict=True)) | summarise(g) for k, g in groups],
        "worst": worst_rows(steps),
        "profile": {"name": chosen.name, "provenance": chosen.provenance, "rows": chosen.rows},
        "mode": str(steps["mode"].iloc[0]),
        "left_out": left_out,
        "noise": round(float(noise.median()), 4),
    }


def unseen_steps(
    path: Path, profile: str | Path | Profile, mode: str | None = None
) -> tuple[pd.DataFrame, Profile, int]:
    """Return the measured steps that ``profile`` was not fitted on, predicted; the profile; how many rows it has seen.

    Raises
    ------
    InputError
        As :func:`validate_steps`.
    """
    found = read_measurements(path)
    chosen = _for_machine(profile if isinstance(profile, Profile) else load_profile(profile), found.accelerator)
    own = chosen.engine.removeprefix("transformers ")
    rows = _rows(found, _one_mode(found, mode or (own if own in set(found.rows["mode"]) else None)), ())
    seen = rows["model"].isin(fitted_models(chosen, found.run))
    if seen.all():
        refuse(
            "measurements",
            "must hold models the profile was not fitted on",
            sorted(set(rows["model"])),
            "Fit on some of them (`tierwise fit FILE.csv --model A`), or measure a new file.",
        )
    test = rows[~seen].reset_index(drop=True)
    points = [point_of(r) for r in test.to_dict("records")]
    steps = pd.concat([test, predict_points(found, points, chosen)], axis=1)
    steps = steps.assign(measured=steps["median_s"], tokens=[p.batch * p.new for p in points])
    return steps, chosen, int(seen.sum())


def _for_machine(profile: Profile, machine: Accelerator) -> Profile:
    if profile.accelerator == machine.name:
        return profile
    known = {profile.accelerator, machine.name} <= set(accelerators())
    require(
        known,
        "profile",
        f"must be for {machine.name}, which was measured",
        profile.accelerator,
        "Fit one: `tierwise fit FILE.csv --output mine.toml`.",
    )
    return transfer(profile, machine)

"""Kernel measurements -> :class:`~theory.latency.Profile`: robust least squares on the logarithm of time.

Each kind of kernel identifies its own parameters, so the fit goes kind by kind. A kind without rows keeps the values it
starts from, and the profile says so.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, least_squares

from theory.catalog import accelerator
from theory.errors import InputError, require
from theory.latency import (
    AT_LEAST_ONE,
    DECODE_BLOCKS,
    SHARES,
    Efficiency,
    Profile,
    allreduce_time,
    decode_attention_time,
    elementwise_time,
    gemm_time,
    prefill_attention_time,
)
from theory.specs import Accelerator

from .readers import COLUMNS, VIDUR_MODELS, Kernels, read_aiconfigurator, read_vidur, serving_rows

Array = NDArray[np.float64]

ROWS_PER_PARAMETER = 4  # fewer rows than this per parameter identify nothing [-]
WORST_ERROR = 0.5  # largest standard error of ln(parameter) that counts as identified [-]
OUTLIER = 0.03  # residual of ln(time) from which a row counts as an outlier (soft L1) [-]
LEAST_SPREAD = 0.05  # of all-reduces, whose curve runs through single measurements; assumed [-]
KNOTS_PER_OCTAVE = 2  # of an all-reduce curve [-]
PARTIAL_WAVE = 0.1  # excess of a last wave from which it shows above the scatter of the rows; assumed [-]
FOLDS = 4  # groups of shapes left out in turn for the residual spread [-]


class WeakDataError(InputError):
    """The measurements do not identify the parameters; ``estimate`` is what they would have given."""

    def __init__(self, message: str, estimate: Efficiency, errors: dict[str, float]) -> None:
        super().__init__(message)
        self.estimate = estimate
        self.errors = errors  # standard error of ln(parameter) [-]


@dataclass(frozen=True, slots=True)
class Block:
    """One kind of kernel and the parameters it identifies; ``core`` ones must be identified, others may be held."""

    name: str
    table: str
    parameters: tuple[str, ...]
    core: tuple[str, ...]
    part: str  # which residual spread it gives
    scale: str = ""  # column of which every octave counts the same
    starts: tuple[dict[str, float], ...] = ({},)  # further starting points of the search [those of the parameters]


BLOCKS = (
    Block(
        "gemm",
        "gemm",
        (
            "gemm_start",
            "gemm_bandwidth",
            "gemm_flops",
            "gemm_knee",
            "gemm_stream",
            "gemm_wave",
            "tile_feed",
            "split_start",
            "down_boost",
        ),
        ("gemm_start", "gemm_bandwidth", "gemm_flops"),
        "gemm",
        "m",
        (
            {},
            {"tile_feed": 45e9, "gemm_wave": 0.3},
            {"tile_feed": 1e11, "gemm_wave": 0.1},
            {"tile_feed": 2e11, "gemm_wave": 0.05, "gemm_stream": 5.0},
        ),
    ),
    Block(
        "fp8",
        "gemm",
        ("fp8_start", "fp8_bandwidth", "fp8_flops", "fp8_feed", "fp8_quantise"),
        ("fp8_start", "fp8_bandwidth"),
        "",
        "m",
    ),
    Block(
        "prefill",
        "prefill",
        ("prefill_start", "prefill_flops", "prefill_bandwidth", "prefill_tail"),
        ("prefill_start", "prefill_flops"),
        "",
    ),
    Block(
        "decode",
        "decode",
        (
            "attention_start",
            "kv_bandwidth",
            "kv_stream",
            "kv_wave",
            "kv_split",
            "kv_split_ungrouped",
            "kv_combine",
            "kv_resident",
            "kv_feed",
        ),
        ("attention_start", "kv_bandwidth"),
        "attention",
        "",
        (
            {"kv_resident": 0.7, "kv_wave": 0.2},
            {
                "kv_resident": 0.7,
                "kv_wave": 0.2,
                "kv_split_ungrouped": 1.1,
                "kv_combine": 9e-6,
                "attention_start": 9e-6,
                "kv_stream": 1.3,
            },
        ),
    ),
    Block(
        "elementwise",
        "elementwise",
        ("element_start", "element_row", "element_bandwidth", "element_resident", "element_feed"),
        ("element_start", "element_bandwidth"),
        "elementwise",
        "tokens",
        ({"element_resident": 0.5},),
    ),
    Block(
        "allreduce",
        "allreduce",
        ("reduce_floor", "reduce_start", "reduce_hop", "link_bandwidth"),
        ("link_bandwidth",),
        "communication",
        "size",
        ({}, {"reduce_floor": 4e-5, "reduce_start": 1e-5}),
    ),
)
ENGINE = ("host_step", "host_sequence", "eager_layer")  # no kernel timing tells them
# How far the search may go, besides the shares, which stay in (0, 1) [unit of the parameter].
BOUNDS: dict[str, tuple[float, float]] = {
    "gemm_start": (2e-7, 5e-5),
    "gemm_knee": (1.0, 20.0),
    "gemm_stream": (1.0, 40.0),
    "tile_feed": (5e9, 5e11),
    "split_start": (5e-8, 2e-5),
    "down_boost": (0.8, 1.3),
    "fp8_start": (2e-7, 5e-5),
    "fp8_feed": (5e9, 5e11),
    "attention_start": (1e-6, 1e-4),
    "kv_stream": (1.0, 40.0),
    "kv_split": (1.0, 128.0),
    "kv_split_ungrouped": (1.0, 128.0),
    "kv_combine": (1e-8, 1e-4),
    "kv_feed": (2e9, 5e11),
    "prefill_start": (1e-6, 1e-4),
    "prefill_tail": (1e-2, 5.0),
    "element_start": (2e-7, 2e-5),
    "element_feed": (1e9, 5e11),
    "element_row": (1e-12, 1e-8),
    "reduce_floor": (1e-7, 1e-3),
    "reduce_start": (1e-7, 1e-3),
    "reduce_hop": (1e-9, 1e-4),
}
FRACTIONS = (*SHARES, "gemm_wave", "kv_wave", "kv_resident", "element_resident")


def predict(block: Block, rows: pd.DataFrame, accelerator: Accelerator, efficiency: Efficiency) -> Array:
    """Return the predicted times of the rows of one block [s].

    Raises
    ------
    InputError
        If attention rows are of several head widths.
    """
    a, e = accelerator, efficiency
    if block.table == "gemm":
        precision = "fp8" if block.name == "fp8" else "bf16"
        m, n, k = (rows[c].to_numpy(float) for c in "mnk")
        if not rows["follows_activation"].any():
            return gemm_time(m, n, k, a, e, precision)  # type: ignore[arg-type]
        boosted = gemm_time(m, n, k, a, e, precision, e.down_boost)  # type: ignore[arg-type]
        plain = gemm_time(m, n, k, a, e, precision)  # type: ignore[arg-type]
        return np.where(rows["follows_activation"].to_numpy(bool), boosted, plain)
    if block.table == "elementwise":
        return _predict_elements(rows, a, e)
    if block.table == "allreduce":
        return allreduce_time(rows["size"].to_numpy(float), rows["tp"].to_numpy(float), a, e)
    dims = rows["head_dim"].unique().tolist()
    require(len(dims) == 1, "head_dim", "must be the same in all attention rows [-]", dims)
    x, y, z, heads, kv_heads = (rows[c].to_numpy(float) for c in COLUMNS[block.table][:5])
    if block.table == "decode":
        return decode_attention_time(x, y, z, heads, kv_heads, int(dims[0]), a, e)
    return prefill_attention_time(x, y, z, heads, kv_heads, int(dims[0]), a, e)


def _predict_elements(rows: pd.DataFrame, a: Accelerator, e: Efficiency) -> Array:
    out = np.zeros(len(rows))
    for name in rows["model"].unique():
        at = (rows["model"] == name).to_numpy()
        m, t = (rows.loc[at, c].to_numpy(float) for c in ("tokens", "tp"))
        out[at] = elementwise_time(VIDUR_MODELS[name], a, e, m, t)
    return out


def fit_profile(
    kernels: Kernels,
    accelerator: Accelerator,
    name: str,
    engine: str,
    start: Efficiency | None = None,
    held: tuple[str, ...] = (),
    source: str = "",
    date: str = "",
) -> Profile:
    r"""Return the profile that minimises the robust misfit of ln(time), kind by kind.

    .. math:: \min_\theta \sum_i \rho\!\left(w_i \ln \frac{\hat t_i(\theta)}{t_i}\right)

    with rho the soft L1 loss. The covariance is the sandwich estimate with shapes as clusters (rows of one shape err
    together); the residual spread is what is left on shapes that were not fitted (cross-validation).

    Parameters
    ----------
    held : tuple of str
        Parameters that stay at ``start``.

    Raises
    ------
    WeakDataError
        If there are too few rows for the parameters, or a core parameter has a standard error above 50 %. The
        exception carries the estimate.
    InputError
        If there is no row at all.

    Source
    ------
    Soft L1: scipy.optimize.least_squares; cluster-robust covariance: Liang & Zeger (1986), doi:10.1093/biomet/73.1.13.
    """
    require(sum(kernels.counts().values()) > 0, "kernels", "must hold at least one row", kernels.counts())
    efficiency = start or Efficiency()
    fitted: list[str] = []
    covariances: list[Array] = []
    residual: dict[str, float] = {}
    notes: list[str] = []
    for block in BLOCKS:
        rows = _rows_of(block, kernels)
        if rows.empty:
            notes.append(f"{block.name}: none, {', '.join(block.parameters)} assumed")
            continue
        free = tuple(p for p in block.parameters if p not in held)
        if not rows.get("follows_activation", pd.Series(True)).any():
            free = set_minus(free, "down_boost")
        if block.name == "decode" and not _has_partial_waves(rows, accelerator):
            free = set_minus(free, "kv_wave")
        efficiency, names, covariance = _fit_block(block, rows, accelerator, efficiency, free)
        spread = _left_out_spread(block, rows, accelerator, efficiency, names)
        if block.name == "allreduce":
            spread = _curve_spread(block, rows, accelerator, efficiency)
        residual[block.part or block.name] = spread
        fitted += names
        covariances.append(covariance)
        idle = [p for p in block.parameters if p not in names]
        notes.append(f"{block.name}: {len(rows)}" + (f" (held: {', '.join(idle)})" if idle else ""))
    notes.append(f"engine: none, {', '.join(ENGINE)} assumed")
    return Profile(
        name=name,
        accelerator=accelerator.name,
        engine=engine,
        provenance="fitted",
        efficiency=efficiency,
        parameters=tuple(fitted),
        covariance=_block_diagonal(covariances),
        residual=_residual_by_part(residual),
        allreduce=allreduce_curves(kernels.allreduce),
        rows=f"{kernels.source}. Rows: {'; '.join(notes)}",
        source=source or kernels.source,
        date=date or datetime.date.today().isoformat(),
    )


def fit_device(
    directory: Path, device: str, layout: str = "vidur", models: tuple[str, ...] = (), name: str = ""
) -> Profile:
    """Return the profile of the kernels in a folder: what ``tierwise fit`` writes.

    Parameters
    ----------
    layout : str
        ``vidur`` (a folder of its profiles) or ``aiconfigurator`` (the folder that holds ``h100_sxm``, ``h200_sxm``).
    models : tuple of str
        Of the vidur layout: models to fit on, as their files name them; all if none is named.

    Raises
    ------
    InputError
        If the layout, the device or a model is unknown, or a table is broken.
    WeakDataError
        If the rows do not identify the parameters.
    """
    require(layout in ("vidur", "aiconfigurator"), "layout", "must be vidur or aiconfigurator", layout)
    if layout == "vidur":
        kernels, engine = read_vidur(directory, device, models), "cuBLAS + NCCL kernels"
    else:
        require(not models, "model", "must be left out: the tables of aiconfigurator are by shape", list(models))
        kernels, engine = serving_rows(read_aiconfigurator(directory, device)), "vLLM kernels under CUDA graphs"
    known = {"h100": "h100-sxm", "h200": "h200-sxm", "a100": "a100-80g-sxm"}
    return fit_profile(kernels, accelerator(known[device]), name or known[device], engine)


def allreduce_curves(rows: pd.DataFrame) -> dict[int, tuple[tuple[float, float], ...]]:
    r"""Return per number of GPUs the measured all-reduce, (size [byte], time [s]) at half powers of two, never falling.

    .. math:: \min_{f \text{ never falls}} \sum_i \frac{|f(s_i) - t_i|}{n_i}

    with n_i the rows in the octave of size s_i. A collective depends on bytes and GPUs, not on the model, so what was
    measured may be used as it is. It is made monotone, since below 1 MB measured times flip at random between that of
    the library and a wait for the host of another GPU: the median of the rows that cross is the steady guess.

    Source
    ------
    Isotonic median regression: Robertson & Wright (1980), doi:10.1214/aos/1176344961.
    """
    curves = {}
    for tp, part in rows.sort_values("size").groupby("tp"):
        size = part["size"].to_numpy(float)
        risen = rising_median(part["time"].to_numpy(float), 1 / _crowd(size))
        half_octaves = np.unique(np.round(KNOTS_PER_OCTAVE * np.log2(size)))
        knots = 2.0 ** (half_octaves / KNOTS_PER_OCTAVE)
        times = np.interp(knots, size, risen)
        curves[int(str(tp))] = tuple(_without_plateaus(list(zip(knots.tolist(), times.tolist(), strict=True))))
    return curves


def _crowd(scale: Array) -> Array:
    """Return how many rows share the octave of each row [-]."""
    octave = np.round(np.log2(scale)).astype(int)
    count: Array = np.bincount(octave - octave.min())[octave - octave.min()].astype(float)
    return count


def rising_median(values: Array, weights: Array) -> Array:
    """Return the sequence that never falls with the least weighted absolute error, crossing neighbours pooled [own].

    Examples
    --------
    >>> rising_median(np.array([1.0, 9.0, 2.0, 3.0, 4.0]), np.ones(5)).tolist()
    [1.0, 2.0, 2.0, 3.0, 4.0]
    """
    pools: list[tuple[float, Array, Array]] = []
    for value, weight in zip(values, weights, strict=True):
        pool = (float(value), np.array([value]), np.array([weight]))
        while pools and pools[-1][0] > pool[0]:
            _, before, own = pools.pop()
            both, mass = np.concatenate([before, pool[1]]), np.concatenate([own, pool[2]])
            pool = (_weighted_median(both, mass), both, mass)
        pools.append(pool)
    return np.concatenate([np.full(v.size, level) for level, v, _ in pools])


def _weighted_median(values: Array, weights: Array) -> float:
    order = np.argsort(values)
    mass = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(mass, mass[-1] / 2)])


def _without_plateaus(knots: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the knots without those in the middle of a stretch of equal times."""
    inner = range(1, len(knots) - 1)
    flat = {i for i in inner if knots[i - 1][1] == knots[i][1] == knots[i + 1][1]}
    return [k for i, k in enumerate(knots) if i not in flat]


def set_minus(names: tuple[str, ...], drop: str) -> tuple[str, ...]:
    """Return ``names`` without ``drop``."""
    return tuple(n for n in names if n != drop)


def _rows_of(block: Block, kernels: Kernels) -> pd.DataFrame:
    table: pd.DataFrame = getattr(kernels, block.table)
    if block.table == "gemm":
        table = table[table["precision"] == ("fp8" if block.name == "fp8" else "bf16")]
    return table.reset_index(drop=True)


def _has_partial_waves(rows: pd.DataFrame, a: Accelerator) -> bool:
    """Return whether decode rows end in a wave of thread blocks that is far from full: only they tell ``kv_wave``."""
    waves = rows["batch"].to_numpy(float) * rows["kv_heads"].to_numpy(float) / (DECODE_BLOCKS * a.sms)
    excess = np.ceil(waves) / waves - 1
    return bool((excess[waves > 1] > PARTIAL_WAVE).any())


ASSUMED_SPREAD = 0.15  # residual spread of a part that was not measured [-]


def _residual_by_part(residual: dict[str, float]) -> dict[str, float]:
    """Return the four parts' spreads; attention takes the larger of decode and prefill."""
    attention = [residual[k] for k in ("attention", "prefill") if k in residual]
    parts = {
        "gemm": residual.get("gemm", residual.get("fp8", ASSUMED_SPREAD)),
        "attention": max(attention, default=ASSUMED_SPREAD),
    }
    return parts | {k: residual.get(k, ASSUMED_SPREAD) for k in ("elementwise", "communication")}


def _block_diagonal(blocks: list[Array]) -> tuple[tuple[float, ...], ...]:
    size = sum(len(b) for b in blocks)
    out, at = np.zeros((size, size)), 0
    for b in blocks:
        out[at : at + len(b), at : at + len(b)] = b
        at += len(b)
    return tuple(tuple(float(v) for v in row) for row in out)


# --- one block -------------------------------------------------------------------------------------------------------


def _to_free(name: str, value: float) -> float:
    """Return the unbounded coordinate of a parameter: logit of a fraction, log of the rest."""
    if name in FRACTIONS:
        share = min(max(value, 1e-3), 1 - 1e-3)
        return float(np.log(share / (1 - share)))
    low, high = BOUNDS[name]
    return float(np.log(min(max(value, low * 1.001), high / 1.001)))


def _to_value(name: str, coordinate: float) -> float:
    if name in FRACTIONS:
        return float(1 / (1 + np.exp(-coordinate)))
    value = float(np.exp(coordinate))
    return max(value, 1.0) if name in AT_LEAST_ONE else value


def _limits(names: tuple[str, ...]) -> tuple[list[float], list[float]]:
    pairs = [(-7.0, 7.0) if n in FRACTIONS else tuple(np.log(BOUNDS[n])) for n in names]
    return [float(p[0]) for p in pairs], [float(p[1]) for p in pairs]


def _with(efficiency: Efficiency, names: tuple[str, ...], x: Array) -> Efficiency:
    values = {n: _to_value(n, float(c)) for n, c in zip(names, x, strict=True)}
    merged = replace(efficiency, down_boost=1.0, **{n: v for n, v in values.items() if n != "down_boost"})
    ceiling = 1 / max(merged.gemm_flops, merged.fp8_flops) * (1 - 1e-9)
    return replace(merged, down_boost=min(values.get("down_boost", efficiency.down_boost), ceiling))


def _weights(block: Block, rows: pd.DataFrame) -> Array:
    """Return the weight of each row: every octave of tokens or bytes counts the same, times the table's own weight."""
    own = rows["weight"].to_numpy(float) if "weight" in rows.columns else np.ones(len(rows))
    if block.scale not in rows.columns:
        return own
    weight = own / np.sqrt(_crowd(rows[block.scale].to_numpy(float)))
    normal: Array = weight * np.sqrt(len(rows) / np.sum(weight**2))
    return normal


def _misfit(
    block: Block, rows: pd.DataFrame, a: Accelerator, efficiency: Efficiency, names: tuple[str, ...]
) -> Callable[[Array], Array]:
    measured = np.log(rows["time"].to_numpy(float))
    weight = _weights(block, rows)

    def residuals(x: Array) -> Array:
        misfit: Array = weight * (np.log(predict(block, rows, a, _with(efficiency, names, x))) - measured)
        return misfit

    return residuals


def _fit_block(
    block: Block, rows: pd.DataFrame, a: Accelerator, start: Efficiency, names: tuple[str, ...]
) -> tuple[Efficiency, tuple[str, ...], Array]:
    """Return the fitted efficiency, the parameters the rows identify, and the covariance of their logarithms [-]."""
    if len(rows) < ROWS_PER_PARAMETER * len(names):
        _refuse(block, start, {}, f"{len(rows)} rows for {len(names)} parameters ({', '.join(names)})")
    residuals = _misfit(block, rows, a, start, names)
    tries = [{n: v for n, v in extra.items() if n in names} for extra in block.starts]
    solution = min((_search(residuals, names, replace(start, **extra)) for extra in tries), key=lambda s: s.cost)
    best = _with(start, names, solution.x)
    covariance = _log_covariance(solution.jac, residuals(solution.x), rows["group"].to_numpy(), names, best)
    errors = {n: float(np.sqrt(v)) for n, v in zip(names, np.diag(covariance), strict=True)}
    loose = [n for n in names if not errors[n] <= WORST_ERROR]
    spare = [n for n in loose if n not in block.core]
    if loose and not spare:
        _refuse(block, best, errors, "standard error of " + ", ".join(f"{n} {errors[n]:.2g}" for n in loose))
    if spare:  # hold the one the rows tell least about and fit the rest again
        idle = max(spare, key=lambda n: errors[n])
        origin = start if len(spare) < len(loose) else best  # traded against a core parameter: not worth its value
        pinned = replace(start, **{idle: getattr(origin, idle)})
        return _fit_block(block, rows, a, pinned, tuple(n for n in names if n != idle))
    return best, names, covariance


def _search(
    residuals: Callable[[Array], Array], names: tuple[str, ...], start: Efficiency, evaluations: int = 60
) -> OptimizeResult:
    x0 = np.array([_to_free(n, getattr(start, n)) for n in names])
    return least_squares(residuals, x0, bounds=_limits(names), loss="soft_l1", f_scale=OUTLIER, max_nfev=evaluations)


def _refuse(block: Block, estimate: Efficiency, errors: dict[str, float], why: str) -> None:
    raise WeakDataError(
        f"`kernels` must identify the {block.name} parameters (at least {ROWS_PER_PARAMETER} rows each and a standard "
        f"error of ln below {WORST_ERROR:g}); got {why}. Measure more shapes, small and large, or hold parameters.",
        estimate,
        errors,
    )


def _log_covariance(jac: Array, residual: Array, groups: Array, names: tuple[str, ...], best: Efficiency) -> Array:
    """Return the cluster-robust covariance of ln(parameter) [-]; a parameter the rows do not see gets infinity."""
    slope = [1 - getattr(best, n) if n in FRACTIONS else 1.0 for n in names]  # d ln(parameter) / d coordinate
    scale = np.linalg.norm(jac, axis=0)
    seen = scale > 1e-6 * max(float(scale.max()), 1e-12)
    out = np.diag(np.where(seen, 0.0, np.inf))
    j = jac[:, seen]
    bread = np.linalg.pinv(j.T @ j)
    codes, _ = pd.factorize(groups)
    score = np.zeros((codes.max() + 1, j.shape[1]))
    np.add.at(score, codes, j * np.clip(residual, -3 * OUTLIER, 3 * OUTLIER)[:, None])
    clusters = len(score)
    meat = score.T @ score * clusters / max(clusters - 1, 1)
    if clusters < 2 * j.shape[1]:  # too few shapes for a sandwich: rows as if independent
        meat = float(np.mean(residual**2)) * (j.T @ j)
    slopes = np.asarray(slope)[seen]
    out[np.ix_(seen, seen)] = (bread @ meat @ bread) * np.outer(slopes, slopes)
    return out


def _curve_spread(block: Block, rows: pd.DataFrame, a: Accelerator, e: Efficiency) -> float:
    """Return the spread of ln(measured/curve) of the all-reduces, every octave of sizes alike [-]."""
    curves = allreduce_curves(rows)
    fit = allreduce_time(rows["size"].to_numpy(float), rows["tp"].to_numpy(float), a, e, curves)
    return max(LEAST_SPREAD, _spread(np.log(fit / rows["time"].to_numpy(float)), _weights(block, rows) ** 2))


def _left_out_spread(
    block: Block, rows: pd.DataFrame, a: Accelerator, best: Efficiency, names: tuple[str, ...]
) -> float:
    """Return the spread of ln(measured/predicted) on groups of shapes left out of the fit in turn [-]."""
    codes, uniques = pd.factorize(rows["group"])
    folds = min(FOLDS, len(uniques))
    logs = np.log(rows["time"].to_numpy(float))
    left = np.log(predict(block, rows, a, best)) - logs
    for fold in range(folds if folds > 1 else 0):
        out = codes % folds == fold
        misfit = _misfit(block, rows[~out].reset_index(drop=True), a, best, names)
        solution = _search(misfit, names, best, evaluations=8)
        left[out] = np.log(predict(block, rows[out], a, _with(best, names, solution.x))) - logs[out]
    own = rows["weight"].to_numpy(float) if "weight" in rows.columns else np.ones(len(rows))
    return _spread(left, _weights(block, rows) ** 2 * own**2)


def _spread(misfit: Array, weight: Array) -> float:
    """Return sigma such that 90 % of the weight lies within 1.645 sigma, as for a normal distribution [-]."""
    order = np.argsort(np.abs(misfit))
    share = np.cumsum(weight[order]) / np.sum(weight)
    q90 = float(np.abs(misfit)[order][np.searchsorted(share, 0.9)])
    return q90 / NormalDist().inv_cdf(0.95)

"""The quality predictor on real outcomes, out of fold: how sure, how right, how much of the outcome it explains.

Judged is what a policy needs: P(tier k right) once tiers 1..k have answered, and P(tier k + 1 right) among the prompts
that tier k gets wrong. Each prompt is judged by a predictor (and a calibration) that did not see it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.errors import require

from .outcome_models import calibration_error
from .predictor import LEAST, folds_of, out_of_fold, output_names, report, rescue_targets, save, train
from .quality_features import Known, read_known, state_features, state_names
from .quality_readers import Samples, read_quality

Array = NDArray[np.float64]

RESAMPLES = 200  # bootstrap resamples of the prompts, and draws of outcomes from the probabilities [-]
BINS = 10  # of equal width [-]
DRAWN = 10  # prompts from which a bin is drawn [-]
SCORES = ("brier", "log_loss", "auroc", "r2")  # with bootstrap intervals; ECE is biased upwards in resamples


def validate_quality(csv: Path, tiers: Sequence[str] | None = None, *, seed: int = 0) -> dict[str, Any]:
    """Return how good the predictor is on a table of real outcomes, out of fold.

    Parameters
    ----------
    csv : Path
        A layout of :func:`calibration.quality_readers.read_quality`; covariates as
        :func:`calibration.quality_features.read_known` takes them.
    tiers : 2 to 4 model names, optional
    seed : int
        Of folds and resamples.

    Returns
    -------
    dict
        ``by_group``: for each data set and chain ``name``, ``n``, ``tiers``, ``signal``, ``covariates``; ``ece`` of all
        tiers pooled, ``ece_raw`` of the scores as they come (null where they are lengths), ``ece_by_chance`` {mean,
        p95}: what a perfectly calibrated predictor with these probabilities would show; ``right`` and ``rescue``: for
        each tier (after tiers 1..k have run) and each step (from a tier wrong on at least 20 prompts), ``n``,
        ``brier``, ``log_loss``, ``ece``, ``auroc``, ``r2``, ``interval`` {brier, log_loss, auroc, r2},
        ``ece_by_chance``, ``reliability`` [{predicted, observed, n}], and ``ece_raw`` of each tier.

    Raises
    ------
    InputError
        If the file is refused, or a group has fewer than 50 prompts.
    """
    require(seed >= 0, "seed", "must be at least 0 [-]", seed)
    groups = [validate_group(s, read_known(Path(csv), s), seed) for s in read_quality(Path(csv), tiers)]
    return {"by_group": groups, "folds": 5, "seed": seed}


def prefixes(tiers: int) -> tuple[int, ...]:
    """Return the states of a chain run in order, as masks: nothing ran, the first, the first two, ..."""
    return tuple((1 << k) - 1 for k in range(tiers + 1))


def by_state(known: Known, samples: Samples, ran: Sequence[int], seed: int) -> Array:
    """Return the probabilities of all outputs in each state, out of fold, (states, n, 2 K - 1) [-]."""
    each = [out_of_fold(state_features(known, m), samples.correct, samples.tiers, seed=seed)[0] for m in ran]
    return np.stack(each)


def validate_group(samples: Samples, known: Known, seed: int) -> dict[str, Any]:
    """Return the entry of one group; see :func:`validate_quality`.

    Raises
    ------
    InputError
        If the group has fewer than 50 prompts.
    """
    n, K = samples.correct.shape
    require(n >= 50, "csv", f"must hold at least 50 prompts of {samples.name}", n)
    rng = np.random.default_rng(seed)
    p = by_state(known, samples, prefixes(K)[1:], seed)
    own = np.stack([p[k, :, k] for k in range(K)], axis=1)
    target, weight = rescue_targets(samples.correct)
    names = output_names(samples.tiers)
    fold = folds_of(n, seed=seed)
    right = [
        scores(names[k], own[:, k], samples.correct[:, k], fold, rng) | {"ece_raw": _raw(samples, k)} for k in range(K)
    ]
    asked = [(o, weight[:, o] > 0) for o in range(K, 2 * K - 1) if weight[:, o].sum() >= LEAST]
    rescue = [scores(names[o], p[o - K, at, o], target[at, o], fold[at], rng) for o, at in asked]
    return {
        "name": samples.name,
        "n": n,
        "tiers": list(samples.tiers),
        "signal": samples.signal,
        "covariates": list(known.names),
        "ece": calibration_error(own, samples.correct),
        "ece_raw": calibration_error(samples.score, samples.correct) if samples.signal == "confidence" else None,
        "ece_by_chance": by_chance(own.ravel(), rng),
        "right": right,
        "rescue": rescue,
    }


def scores(name: str, p: Array, y: Array, fold: NDArray[np.intp], rng: np.random.Generator) -> dict[str, Any]:
    """Return the scores of probabilities with bootstrap intervals, beside the calibration error of chance."""
    again = []
    for _ in range(RESAMPLES):
        at = rng.integers(0, len(y), len(y))
        again.append(report(p[at], y[at], fold[at]))
    return {
        "name": name,
        **{k: (v if math.isfinite(v) else None) for k, v in asdict(report(p, y, fold)).items()},
        "interval": {s: _interval([getattr(r, s) for r in again]) for s in SCORES},
        "ece_by_chance": by_chance(p, rng),
        "reliability": reliability(p, y),
    }


def _raw(samples: Samples, tier: int) -> float | None:
    """Return the calibration error of the score as it comes; a length is no probability."""
    if samples.signal != "confidence":
        return None
    return calibration_error(samples.score[:, tier], samples.correct[:, tier])


def _interval(values: Sequence[float]) -> list[float] | None:
    return np.quantile(values, (0.025, 0.975)).tolist() if np.isfinite(values).all() else None


def by_chance(p: Array, rng: np.random.Generator) -> dict[str, float]:
    """Return mean and 95th percentile of the calibration error if every probability were true [-].

    It is not 0: n prompts in 10 bins miss their probability by chance. A measured error below it is no defect.

    Examples
    --------
    >>> by_chance(np.full(1000, 0.5), np.random.default_rng(0))["mean"] < 0.02
    True
    """
    found = [calibration_error(p, rng.random(p.shape) < p) for _ in range(RESAMPLES)]
    return {"mean": float(np.mean(found)), "p95": float(np.quantile(found, 0.95))}


def reliability(p: Array, y: Array) -> list[dict[str, float]]:
    """Return mean probability and share of the event in each bin of equal width that is not empty [-].

    Examples
    --------
    >>> reliability(np.array([0.12, 0.14, 0.9]), np.array([0.0, 1.0, 1.0]))[0]
    {'predicted': 0.13, 'observed': 0.5, 'n': 2}
    """
    at = np.minimum((p * BINS).astype(int), BINS - 1)
    return [
        {"predicted": float(p[at == b].mean()), "observed": float(y[at == b].mean()), "n": int((at == b).sum())}
        for b in np.unique(at)
    ]


# ---------------------------------------------------------------- files


def save_predictors(csv: Path, folder: Path, tiers: Sequence[str] | None = None, *, seed: int = 0) -> list[Path]:
    """Train predictors on all prompts, one for each group and state of its chain; return the folders they are in."""
    folders = []
    for samples in read_quality(Path(csv), tiers):
        known = read_known(Path(csv), samples)
        for count, ran in enumerate(prefixes(len(samples.tiers))):
            trained = train(state_features(known, ran), samples.correct, samples.tiers, seed=seed)
            folders.append(folder / re.sub(r"[^\w-]+", "-", samples.name) / f"after-{count}")
            notes = {"file": Path(csv).name, "group": samples.name, "prompts": len(samples.correct), "seed": seed}
            save(trained, folders[-1], state_names(known, ran, samples.tiers), notes | {"ran": samples.tiers[:count]})
    return folders

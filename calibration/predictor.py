"""A small network: features of a prompt -> P(right) of each tier, P(next tier rescues); judged out of fold.

Features are those of :mod:`calibration.quality_features` or any other numbers; nothing here knows what they mean. What
the network says is calibrated on prompts it was not trained on. torch is imported where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from theory.errors import refuse, require

from .outcome_models import METHODS, Calibrator, best_calibrator, calibration_error, fold_of, log_loss

Array = NDArray[np.float64]

FORMAT = "tierwise-predictor-2"
INNER_FOLDS = 3  # of the training prompts, whose out-of-fold probabilities the calibration is fitted to [-]
CLOSE = 1e-7  # a Newton step below this ends a logistic regression [log odds per standard deviation]
LEAST = 20  # prompts, of which the calibration of an output needs as many with and without the event [-]


@dataclass(frozen=True, slots=True)
class Shape:
    """What is trained and how long."""

    hidden: int = 0  # width of the one hidden layer (torch); 0 is a logistic regression (no torch)
    steps: int = 100  # of Newton's method, or of L-BFGS with a hidden layer, at most
    decay: float = 1e-3  # penalty on weights [-]
    calibrate: bool = True  # on inner folds; where only the order of prompts matters it need not be


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained network with the scaling of its features and a calibrator for each output."""

    outputs: tuple[str, ...]
    mean: Array  # (features,) [that of the features]
    spread: Array  # (features,) [that of the features]
    weights: dict[str, Array] = field(repr=False)  # w1, b1 and, with a hidden layer, w2, b2 [-]
    calibrators: tuple[Calibrator | None, ...]  # of the outputs; None leaves the network's word as it is

    def __call__(self, features: ArrayLike) -> Array:
        r"""Return the probabilities, (n, outputs) [-].

        .. math:: g\big(\sigma(W_2 \tanh(W_1 z + b_1) + b_2)\big), \qquad z = (x - \bar x)/s

        g is the calibrator: Platt's (a temperature and an offset), beta or isotonic, by held-back log loss.
        """
        x = np.asarray(features, dtype=np.float64)
        fits = x.ndim == 2 and x.shape[1] == len(self.mean) and bool(np.isfinite(x).all())
        require(fits, "features", f"must be finite and have {len(self.mean)} columns", x.shape)
        z = (x - self.mean) / self.spread @ self.weights["w1"] + self.weights["b1"]
        p = expit(np.tanh(z) @ self.weights["w2"] + self.weights["b2"] if "w2" in self.weights else z)
        each = zip(p.T, self.calibrators, strict=True)
        return np.column_stack([column if g is None else g(column) for column, g in each])


@dataclass(frozen=True, slots=True)
class Report:
    """How good probabilities are on prompts they were not fitted to."""

    n: int
    brier: float  # mean squared error [-]
    log_loss: float  # [nat]
    ece: float  # 10 bins of equal width [-]
    auroc: float  # [-]; nan where all outcomes are equal
    r2: float  # 1 - Brier / variance of the outcome [-]


def rescue_targets(correct: ArrayLike) -> tuple[Array, Array]:
    """Return what is to be predicted, and where it is defined (weight 1, else 0), (n, 2 K - 1) each [-].

    The first K columns: tier k right. Then, for k < K: tier k + 1 right, among prompts that tier k gets wrong.

    Raises
    ------
    InputError
        If the grades are not (n, K) of 0 and 1.

    Examples
    --------
    >>> targets, weight = rescue_targets([[0, 1], [1, 1]])
    >>> targets.tolist(), weight.tolist()
    ([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    """
    c = np.asarray(correct, dtype=np.float64)
    require(c.ndim == 2 and bool(np.isin(c, (0, 1)).all()), "correct", "must be (n, K) of 0 and 1 [-]", c.shape)
    return np.concatenate([c, c[:, 1:]], axis=1), np.concatenate([np.ones_like(c), 1 - c[:, :-1]], axis=1)


def output_names(tiers: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the columns of :func:`rescue_targets`."""
    return (*(f"{t} right" for t in tiers), *(f"{b} rescues {a}" for a, b in pairwise(tiers)))


def train(
    features: ArrayLike,
    correct: ArrayLike,
    tiers: tuple[str, ...],
    shape: Shape | None = None,
    seed: int = 0,
) -> Predictor:
    """Return the predictor trained on prompts: penalised log loss; calibrated on inner folds.

    Parameters
    ----------
    features : (n, F) array
        Finite numbers.
    correct : (n, K) array
        0 or 1 [-].
    tiers : K names
    shape : Shape, optional
        A logistic regression by default.
    seed : int

    Raises
    ------
    InputError
        If shapes disagree, numbers are not finite, or there are fewer than 20 prompts.
    """
    x = np.asarray(features, dtype=np.float64)
    y, weight = rescue_targets(correct)
    fits = x.ndim == 2 and len(x) == len(y) >= LEAST and bool(np.isfinite(x).all())
    require(fits, "features", f"must be finite, one row for each of at least {LEAST} prompts ({len(y)})", x.shape)
    require(y.shape[1] == 2 * len(tiers) - 1, "tiers", f"must be {(y.shape[1] + 1) // 2} names", tiers)
    names, form = output_names(tiers), shape or Shape()
    trained = _trained(x, y, weight, names, form, seed)
    if not form.calibrate:
        return trained
    inner = fold_of(len(x), INNER_FOLDS, np.random.default_rng(seed))
    p = _cross(x, inner, lambda at: _trained(x[at], y[at], weight[at], names, form, seed))
    rng = np.random.default_rng(seed)
    fitted = tuple(_calibrator(p[w > 0, k], y[w > 0, k], rng) for k, w in enumerate(weight.T))
    return Predictor(names, trained.mean, trained.spread, trained.weights, fitted)


def _trained(x: Array, y: Array, weight: Array, names: tuple[str, ...], shape: Shape, seed: int) -> Predictor:
    """Return the network, not calibrated."""
    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    return Predictor(names, mean, spread, _fit((x - mean) / spread, y, weight, shape, seed), (None,) * len(names))


def _cross(x: Array, fold: NDArray[np.intp], fit: Callable[[NDArray[np.bool_]], Predictor]) -> Array:
    """Return what predictors fitted without a fold say of it, (n, outputs)."""
    parts = [(fold == f, fit(fold != f)(x[fold == f])) for f in range(int(fold.max()) + 1)]
    p = np.empty((len(x), parts[0][1].shape[1]))
    for at, said in parts:
        p[at] = said
    return p


def _calibrator(p: Array, y: Array, rng: np.random.Generator) -> Calibrator | None:
    """Return the calibrator of smallest held-back log loss; None where there is too little to fit one to."""
    return best_calibrator(p, y, rng, INNER_FOLDS) if LEAST <= y.sum() <= len(y) - LEAST else None


def _fit(z: Array, y: Array, weight: Array, shape: Shape, seed: int) -> dict[str, Array]:
    r"""Return the weights that minimise the log loss per outcome + decay :math:`|W|^2`."""
    if shape.hidden:
        return _network(z, y, weight, shape, seed)
    total = weight.sum()
    each = [_line(z, y[:, k], weight[:, k] / total, shape) for k in range(y.shape[1])]
    return {"w1": np.stack([w[:-1] for w in each], axis=1), "b1": np.array([w[-1] for w in each])}


def _line(z: Array, y: Array, weight: Array, shape: Shape) -> Array:
    """Return slopes and intercept of one output, (features + 1,): convex, so Newton's steps and no torch."""
    x = np.column_stack([z, np.ones(len(z))])
    ridge = np.append(np.full(z.shape[1], 2 * shape.decay), 1e-9)

    def loss(w: Array) -> float:
        h = x @ w
        return float(weight @ (np.logaddexp(0, h) - y * h) + 0.5 * ridge @ w**2)

    w = np.zeros(x.shape[1])
    for _ in range(shape.steps):
        p = expit(x @ w)
        gradient = x.T @ (weight * (p - y)) + ridge * w
        step = np.linalg.solve((x.T * (weight * p * (1 - p))) @ x + np.diag(ridge), gradient)
        size, before = 1.0, loss(w)
        while loss(w - size * step) > before and size > 1e-6:  # far from the optimum a full step may overshoot
            size /= 2
        w = w - size * step
        if np.abs(size * step).max() < CLOSE:
            break
    return w


def _network(z: Array, y: Array, weight: Array, shape: Shape, seed: int) -> dict[str, Array]:
    """Return the weights of a network with a hidden layer."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x, t, w = (torch.tensor(a, dtype=torch.float64) for a in (z, y, weight))
    parameters = {}
    for i, (a, b) in enumerate(pairwise([x.shape[1], shape.hidden, t.shape[1]]), start=1):
        start = torch.randn(a, b, generator=generator, dtype=torch.float64) * (0.5 / a**0.5)
        parameters[f"w{i}"] = start.requires_grad_()
        parameters[f"b{i}"] = torch.zeros(b, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(list(parameters.values()), max_iter=shape.steps, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        h = torch.tanh(x @ parameters["w1"] + parameters["b1"]) @ parameters["w2"] + parameters["b2"]
        each = torch.nn.functional.binary_cross_entropy_with_logits(h, t, weight=w, reduction="sum")
        total: torch.Tensor = each / w.sum() + shape.decay * (
            (parameters["w1"] ** 2).sum() + (parameters["w2"] ** 2).sum()
        )
        total.backward()  # type: ignore[no-untyped-call]
        return total

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a few thousand rows: several threads wait for each other longer than they compute
    try:
        optimiser.step(loss)  # type: ignore[no-untyped-call]
    finally:
        torch.set_num_threads(threads)
    return {name: p.detach().numpy() for name, p in parameters.items()}


def report(probability: ArrayLike, outcome: ArrayLike, fold: ArrayLike | None = None) -> Report:
    """Return the scores of probabilities, (n,) each; ``fold`` as in :func:`auroc`.

    Examples
    --------
    >>> report([0.9, 0.8, 0.3, 0.1], [1, 1, 0, 0]).auroc
    1.0
    """
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    brier = float(np.mean((p - y) ** 2))
    r2 = 1 - brier / float(y.var()) if y.var() > 0 else float("nan")
    return Report(len(y), brier, log_loss(p, y), calibration_error(p, y), auroc(p, y, fold), r2)


def auroc(score: Array, outcome: Array, fold: ArrayLike | None = None) -> float:
    """Return P(a right prompt scores above a wrong one) + P(equal)/2, nan without both [-].

    Scores out of fold come from several predictors. With ``fold``, (n,), only prompts of one fold are compared: across
    folds the comparison is biased below 0.5, since a fold with many right prompts was left out of its own predictor.
    """
    from scipy.stats import rankdata

    which = np.zeros(len(score), dtype=np.intp) if fold is None else np.asarray(fold)
    above, pairs = 0.0, 0
    for f in np.unique(which):
        s, right = score[which == f], outcome[which == f] > 0.5
        n = int(right.sum())
        above += float(rankdata(s)[right].sum()) - n * (n + 1) / 2
        pairs += n * (len(s) - n)
    return above / pairs if pairs else float("nan")


def folds_of(n: int, folds: int = 5, seed: int = 0) -> NDArray[np.intp]:
    """Return the fold of each prompt in :func:`out_of_fold`, (n,)."""
    return fold_of(n, folds, np.random.default_rng(seed))


def out_of_fold(
    features: ArrayLike,
    correct: ArrayLike,
    tiers: tuple[str, ...],
    shape: Shape | None = None,
    folds: int = 5,
    seed: int = 0,
) -> tuple[Array, dict[str, Report]]:
    """Return probabilities, each from a predictor that did not see the prompt, (n, outputs) [-], and reports.

    There is no report on a rescue from a tier that is never wrong.
    """
    x, (y, weight) = np.asarray(features, dtype=np.float64), rescue_targets(correct)
    right, fold = y[:, : len(tiers)], folds_of(len(y), folds, seed)
    p = _cross(x, fold, lambda at: train(x[at], right[at], tiers, shape, seed))
    names = output_names(tiers)
    known = {n: (k, weight[:, k] > 0) for k, n in enumerate(names) if weight[:, k].any()}
    return p, {n: report(p[at, k], y[at, k], fold[at]) for n, (k, at) in known.items()}


# ---------------------------------------------------------------- files


def save(predictor: Predictor, folder: Path, features: Sequence[str] = (), notes: dict[str, Any] | None = None) -> None:
    """Write ``predictor.safetensors`` (all numbers) and ``predictor.json`` (names of outputs and features, notes)."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"mean": predictor.mean, "spread": predictor.spread, **predictor.weights}
    for k, g in enumerate(predictor.calibrators):
        arrays |= {} if g is None else {f"at{k}": g.at, f"value{k}": g.value}
    save_file(
        {name: np.ascontiguousarray(a, dtype=np.float64) for name, a in arrays.items()},
        folder / "predictor.safetensors",
    )
    head = {
        "format": FORMAT,
        "outputs": list(predictor.outputs),
        "calibration": [g.method if g else None for g in predictor.calibrators],
        "features": list(features) or len(predictor.mean),
        "notes": notes or {},
    }
    (folder / "predictor.json").write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> Predictor:
    """Return a saved predictor.

    Raises
    ------
    InputError
        If a file is absent, of another format, or its arrays do not fit together.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        head = json.loads((folder / "predictor.json").read_text(encoding="utf-8"))
        arrays = load_file(folder / "predictor.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        refuse("folder", "must hold predictor.json and predictor.safetensors", f"{folder.name}: {error}")
    require(isinstance(head, dict) and head.get("format") == FORMAT, "format", f"must be {FORMAT}", folder.name)
    outputs, methods = tuple(head.get("outputs", ())), head.get("calibration", ())
    needed = {"mean", "spread", "w1", "b1"} | {f"{a}{k}" for k, m in enumerate(methods) if m for a in ("at", "value")}
    require(needed <= set(arrays), "arrays", "must be complete", sorted(arrays))
    require(all(m is None or m in METHODS for m in methods), "calibration", f"must be one of {METHODS}", methods)
    calibrators = tuple(
        Calibrator(m, arrays[f"at{k}"], arrays[f"value{k}"]) if m else None for k, m in enumerate(methods)
    )
    weights: dict[str, Array] = {name: arrays[name] for name in ("w1", "b1", "w2", "b2") if name in arrays}
    found = Predictor(outputs, arrays["mean"], arrays["spread"], weights, calibrators)
    last = weights.get("b2", weights["b1"])
    fits = weights["w1"].shape[0] == len(found.mean) == len(found.spread) and len(last) == len(outputs) == len(methods)
    require(fits, "arrays", "must fit together", {n: a.shape for n, a in arrays.items()})
    return found

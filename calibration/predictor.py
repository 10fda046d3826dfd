"""A small network: features of a prompt -> P(right) of each tier, P(next tier rescues); judged out of fold.

Text-free features come first: scores, lengths, the data set, the turn of a conversation. The last column may be as many
as wanted; nothing here knows what they mean. torch is imported where it is used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit

from theory.errors import refuse, require

from .outcome_models import EDGE, calibration_error, fold_of, log_loss

Array = NDArray[np.float64]

FORMAT = "tierwise-predictor-1"
HELD = 0.2  # share of the training prompts that sets the temperatures [-]


@dataclass(frozen=True, slots=True)
class Shape:
    """What is trained and how long."""

    hidden: int = 0  # width of the one hidden layer; 0 is a logistic regression
    steps: int = 100  # of L-BFGS, at most
    decay: float = 1e-3  # penalty on weights [-]


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained network with the scaling of its features and a temperature for each output."""

    outputs: tuple[str, ...]
    mean: Array  # (features,)
    spread: Array  # (features,)
    temperature: Array  # (outputs,) above 0 [-]
    weights: dict[str, Array] = field(repr=False)  # w1, b1 and, with a hidden layer, w2, b2

    def __call__(self, features: ArrayLike) -> Array:
        r"""Return the probabilities, (n, outputs) [-].

        .. math:: \sigma\big((W_2 \tanh(W_1 z + b_1) + b_2) / T\big), \qquad z = (x - \bar x)/s
        """
        x = np.asarray(features, dtype=np.float64)
        fits = x.ndim == 2 and x.shape[1] == len(self.mean) and bool(np.isfinite(x).all())
        require(fits, "features", f"must be finite and have {len(self.mean)} columns", x.shape)
        return np.asarray(expit(self._logits(x) / self.temperature))

    def _logits(self, x: Array) -> Array:
        z = (x - self.mean) / self.spread @ self.weights["w1"] + self.weights["b1"]
        return np.tanh(z) @ self.weights["w2"] + self.weights["b2"] if "w2" in self.weights else np.asarray(z)


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
    """Return what is to be predicted, and where it is defined (weight 1, else 0), (n, 2 K - 1) each.

    The first K columns: tier k right. Then, for k < K: tier k + 1 right, among prompts that tier k gets wrong.

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
    features: ArrayLike, correct: ArrayLike, tiers: tuple[str, ...], shape: Shape | None = None, seed: int = 0
) -> Predictor:
    """Return the predictor trained on prompts: penalised log loss, L-BFGS; a fifth is held back for temperatures.

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
    fits = x.ndim == 2 and len(x) == len(y) >= 20 and bool(np.isfinite(x).all())
    require(fits, "features", f"must be finite, one row for each of at least 20 prompts ({len(y)})", x.shape)
    require(y.shape[1] == 2 * len(tiers) - 1, "tiers", f"must be {(y.shape[1] + 1) // 2} names", tiers)
    held = np.random.default_rng(seed).random(len(x)) < HELD
    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    weights = _fit((x[~held] - mean) / spread, y[~held], weight[~held], shape or Shape(), seed)
    raw = Predictor(output_names(tiers), mean, spread, np.ones(y.shape[1]), weights)
    logits = raw._logits(x[held])
    temperature = [_temperature(logits[:, k], y[held, k], weight[held, k]) for k in range(y.shape[1])]
    return Predictor(raw.outputs, mean, spread, np.array(temperature), weights)


def _fit(z: Array, y: Array, weight: Array, shape: Shape, seed: int) -> dict[str, Array]:
    """Return the weights that minimise the penalised log loss."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x, t, w = (torch.tensor(a, dtype=torch.float64) for a in (z, y, weight))
    sizes = [x.shape[1], *([shape.hidden] if shape.hidden else []), t.shape[1]]
    parameters = {}
    for i, (a, b) in enumerate(pairwise(sizes), start=1):
        start = torch.randn(a, b, generator=generator, dtype=torch.float64) * (0.5 / a**0.5)
        parameters[f"w{i}"] = start.requires_grad_()
        parameters[f"b{i}"] = torch.zeros(b, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(list(parameters.values()), max_iter=shape.steps, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        h = x @ parameters["w1"] + parameters["b1"]
        h = torch.tanh(h) @ parameters["w2"] + parameters["b2"] if shape.hidden else h
        each = torch.nn.functional.binary_cross_entropy_with_logits(h, t, weight=w, reduction="sum")
        penalty = torch.stack([(p**2).sum() for name, p in parameters.items() if name.startswith("w")]).sum()
        total = each / w.sum() + shape.decay * penalty
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return {name: p.detach().numpy() for name, p in parameters.items()}


def _temperature(logit: Array, y: Array, weight: Array) -> float:
    """Return the T in [0.2, 5] of smallest held-back log loss; 1 where fewer than 10 prompts are held back."""
    z, t = logit[weight > 0], y[weight > 0]
    if len(t) < 10:
        return 1.0
    fit = minimize_scalar(lambda u: log_loss(expit(z / np.exp(u)), t), bounds=np.log([0.2, 5.0]), method="bounded")
    return float(np.exp(fit.x))


def report(probability: ArrayLike, outcome: ArrayLike) -> Report:
    """Return the scores of probabilities, (n,) each.

    Examples
    --------
    >>> report([0.9, 0.8, 0.3, 0.1], [1, 1, 0, 0]).auroc
    1.0
    """
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    brier = float(np.mean((p - y) ** 2))
    r2 = 1 - brier / float(y.var()) if y.var() > 0 else float("nan")
    return Report(len(y), brier, log_loss(p, y), calibration_error(p, y), auroc(p, y), r2)


def auroc(score: Array, outcome: Array) -> float:
    """Return P(a right prompt scores above a wrong one) + P(equal)/2, nan without both [-]."""
    from scipy.stats import rankdata

    right = outcome > 0.5
    pairs = right.sum() * (~right).sum()
    if not pairs:
        return float("nan")
    return float((rankdata(score)[right].sum() - right.sum() * (right.sum() + 1) / 2) / pairs)


def out_of_fold(
    features: ArrayLike,
    correct: ArrayLike,
    tiers: tuple[str, ...],
    shape: Shape | None = None,
    folds: int = 5,
    seed: int = 0,
) -> tuple[Array, dict[str, Report]]:
    """Return probabilities, each from a predictor that did not see the prompt, (n, outputs), and their reports."""
    x, (y, weight) = np.asarray(features, dtype=np.float64), rescue_targets(correct)
    fold = fold_of(len(y), folds, np.random.default_rng(seed))
    p = np.empty_like(y)
    for f in range(folds):
        p[fold == f] = train(x[fold != f], y[fold != f, : len(tiers)], tiers, shape, seed)(x[fold == f])
    names = output_names(tiers)
    return p, {n: report(p[weight[:, k] > 0, k], y[weight[:, k] > 0, k]) for k, n in enumerate(names)}


def score_features(score: ArrayLike, tiers_run: int) -> Array:
    """Return log odds of the scores of the first tiers that ran, the only ones known then, (n, tiers_run)."""
    s = np.clip(np.asarray(score, dtype=np.float64)[:, :tiers_run], EDGE, 1 - EDGE)
    return np.asarray(np.log(s) - np.log1p(-s))


# ---------------------------------------------------------------- files


def save(predictor: Predictor, folder: Path, notes: dict[str, Any] | None = None) -> None:
    """Write ``predictor.safetensors`` (all numbers) and ``predictor.json`` (names, notes)."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"mean": predictor.mean, "spread": predictor.spread, "temperature": predictor.temperature}
    numbers = {name: np.ascontiguousarray(a, dtype=np.float64) for name, a in (arrays | predictor.weights).items()}
    save_file(numbers, folder / "predictor.safetensors")
    head = {"format": FORMAT, "outputs": list(predictor.outputs), "features": len(predictor.mean), "notes": notes or {}}
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
    require(head.get("format") == FORMAT, "format", f"must be {FORMAT}", head.get("format"))
    outputs = tuple(head["outputs"])
    require({"mean", "spread", "temperature", "w1", "b1"} <= set(arrays), "arrays", "are incomplete", sorted(arrays))
    fixed = [arrays.pop(name) for name in ("mean", "spread", "temperature")]
    found = Predictor(outputs, fixed[0], fixed[1], fixed[2], arrays)
    fits = arrays["w1"].shape[0] == len(found.mean) == len(found.spread) and len(found.temperature) == len(outputs)
    require(fits, "arrays", "must fit together", {n: a.shape for n, a in arrays.items()})
    return found

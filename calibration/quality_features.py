"""What is known of a prompt when a tier must be chosen, as numbers: before any tier ran, and after some did.

The state of a request is its covariates (length of the prompt, data set, text, the conversation so far), which tiers
ran, and what they showed: the score and the length of each answer. Nothing of a tier that did not run enters.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from theory.errors import require

from .outcome_models import EDGE
from .quality_readers import Samples

Array = NDArray[np.float64]

WIDTH = 128  # columns of hashed n-grams [-]


@dataclass(frozen=True, eq=False)
class Known:
    """What n prompts are known by: covariates before any tier runs, scores and lengths of each tier's answer."""

    names: tuple[str, ...]  # of the covariates
    covariates: Array  # (n, F) [own of each]
    score: Array  # (n, K) in [0, 1] [-]
    length: Array  # (n, K) of the answers [tokens or words]; (n, 0) where the score is made of it

    def __post_init__(self) -> None:
        n = len(self.score)
        fits = self.covariates.shape == (n, len(self.names)) and bool(np.isfinite(self.covariates).all())
        require(fits, "covariates", f"must be finite, of shape ({n}, {len(self.names)})", self.covariates.shape)
        fits = self.length.shape in ((n, 0), self.score.shape) and bool(np.all(self.length >= 0))
        require(fits, "length", f"must be at least 0, of shape {self.score.shape}", self.length.shape)

    def joined(self, names: Sequence[str], columns: ArrayLike) -> Known:
        """Return the same with more covariates."""
        more = np.asarray(columns, dtype=np.float64).reshape(len(self.score), -1)
        return Known((*self.names, *names), np.column_stack([self.covariates, more]), self.score, self.length)


def state_features(known: Known, ran: int) -> Array:
    r"""Return the features of the state in which the tiers of a mask ran, (n, F).

    The covariates and, for each tier that ran, :math:`\ln s`, :math:`-\ln(1 - s)` and :math:`\ln(1 + \text{length})`:
    a line through the first two is beta calibration of the tier's own score. Each state has a predictor of its own, as
    the weight of a first answer falls once a second is seen.

    Parameters
    ----------
    known : Known
    ran : int
        Bit k = tier k ran; 0 is the state before any.

    Raises
    ------
    InputError
        If the mask names tiers that do not exist.

    Examples
    --------
    >>> known = Known((), np.zeros((1, 0)), np.array([[0.5, 0.9]]), np.array([[0.0, 0.0]]))
    >>> state_features(known, 1).round(2).tolist()
    [[-0.69, 0.69, 0.0]]
    """
    tiers = known.score.shape[1]
    require(0 <= ran < 1 << tiers, "ran", f"must have bits among {tiers} tiers", ran)
    columns = [*known.covariates.T]
    for k in range(tiers):
        if ran >> k & 1:
            s = np.clip(known.score[:, k], EDGE, 1 - EDGE)
            columns += [np.log(s), -np.log1p(-s)]
            columns += [np.log1p(known.length[:, k])] if known.length.shape[1] else []
    return np.stack(columns, axis=1) if columns else np.zeros((len(known.score), 0))


def state_names(known: Known, ran: int, tiers: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the columns of :func:`state_features`."""
    shown = ("ln score", "-ln(1 - score)", *(("ln(1 + length)",) if known.length.shape[1] else ()))
    return (*known.names, *(f"{s} of {t}" for k, t in enumerate(tiers) if ran >> k & 1 for s in shown))


# ---------------------------------------------------------------- covariates


def conversation_features(turn: ArrayLike, last_tier: ArrayLike, last_right: ArrayLike, tiers: int) -> Array:
    """Return covariates of a conversation so far, (n, 1 + 2 K): ln turn, who answered last, and whether it was right.

    Parameters
    ----------
    turn : (n,) array
        1 for the first message.
    last_tier : (n,) array of integers
        The tier whose answer was returned in the turn before; -1 in the first.
    last_right : (n,) array
        1 right, 0 wrong, nan unknown.
    tiers : int
        K.

    Raises
    ------
    InputError
        If a turn is below 1, a tier does not exist, or an outcome is not 0, 1 or nan.

    Examples
    --------
    >>> conversation_features([1, 2], [-1, 0], [np.nan, 1], 2).round(2).tolist()
    [[0.0, 0.0, 0.0, 0.0, 0.0], [0.69, 1.0, 0.0, 0.5, 0.0]]
    """
    t, who, right = np.asarray(turn, dtype=np.float64), np.asarray(last_tier), np.asarray(last_right, dtype=np.float64)
    require(bool(np.all(t >= 1)), "turn", "must be at least 1 [-]", t.tolist()[:3])
    require(bool(np.all((who >= -1) & (who < tiers))), "last_tier", f"must lie in -1..{tiers - 1}", who.tolist()[:3])
    known = np.isnan(right) | np.isin(right, (0, 1))
    require(bool(known.all()), "last_right", "must be 0, 1 or nan [-]", right[~known].tolist()[:3])
    answered = (who[:, None] == np.arange(tiers)).astype(np.float64)
    return np.column_stack([np.log(t), answered, answered * np.where(np.isnan(right), 0.0, right - 0.5)[:, None]])


def text_features(texts: Sequence[str], width: int = WIDTH) -> Array:
    r"""Return hashed words and pairs of words of each text, of unit length, (n, width).

    .. math:: x_h = \sum_{g:\, h(g) = h} \pm \ln(1 + \mathrm{count}(g))

    Raises
    ------
    InputError
        If the width is below 1.

    Source
    ------
    Weinberger et al. (2009), arXiv:0902.2206, feature hashing with signs; CRC-32 as the hash.

    Examples
    --------
    >>> bool(np.allclose(text_features(["add two", "two add"]) @ text_features(["Add two!"]).T, [[1.0], [2 / 3]]))
    True
    """
    require(width >= 1, "width", "must be at least 1 [-]", width)
    table = np.zeros((len(texts), width))
    for row, text in zip(table, texts, strict=True):
        words = re.findall(r"\w+", text.lower())
        grams, counts = np.unique([*words, *map(" ".join, pairwise(words))], return_counts=True)
        for gram, count in zip(grams, counts, strict=True):
            code = zlib.crc32(str(gram).encode())
            row[(code >> 1) % width] += (1 if code & 1 else -1) * np.log1p(count)
    return np.asarray(table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), EDGE))


# ---------------------------------------------------------------- files


def read_known(path: Path, samples: Samples) -> Known:
    """Return what a quality table says of the prompts of ``samples`` besides who was right.

    Covariates: ``prompt_tokens`` (its logarithm), the columns ``feature_*`` (numbers a user computed, an embedding
    among them) and a column ``prompt`` (text, as :func:`text_features`), where the table has them. Lengths:
    ``output_tokens``, or else the scores already are the lengths.

    Raises
    ------
    InputError
        If a cell is no finite number (column and line are named).
    """
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.index = pd.RangeIndex(2, len(table) + 2)
    group = table["dataset"] + "/" + table["chain"] if "chain" in table.columns else table["dataset"]
    rows = table[(group == samples.name) & table["model"].isin(samples.tiers)]
    own = rows[rows["model"] == samples.tiers[0]].set_index("sample_id", drop=False)
    columns = [c for c in table.columns if c.startswith("feature_")]
    values = [_finite(rows, own, c, path.name, samples.ids) for c in columns]
    if "prompt_tokens" in table.columns:
        tokens = _finite(rows, own, "prompt_tokens", path.name, samples.ids)
        require(bool(np.all(tokens >= 0)), "prompt_tokens", f"must be at least 0 in {path.name}", float(tokens.min()))
        columns.append("ln(1 + prompt_tokens)")
        values.append(np.log1p(tokens))
    length = np.zeros((len(samples.ids), 0))
    if samples.signal == "confidence" and "output_tokens" in table.columns:
        each = [rows[rows["model"] == t].set_index("sample_id", drop=False) for t in samples.tiers]
        length = np.column_stack([_finite(rows, r, "output_tokens", path.name, samples.ids) for r in each])
        require(bool(np.all(length >= 0)), "output_tokens", f"must be at least 0 in {path.name}", float(length.min()))
    covariates = np.column_stack(values) if values else np.zeros((len(samples.ids), 0))
    known = Known(tuple(columns), covariates, samples.score, length)
    if "prompt" in table.columns:
        hashed = text_features(own["prompt"].reindex(list(samples.ids)).tolist())
        known = known.joined([f"text {i}" for i in range(hashed.shape[1])], hashed)
    return known


def pool(parts: Sequence[tuple[Samples, Known]]) -> tuple[Samples, Known]:
    """Return the prompts of several data sets of the same tiers as one, the data set a covariate of each prompt.

    Raises
    ------
    InputError
        If there is no part, or tiers, signals or covariates differ.
    """
    require(len(parts) > 0, "parts", "must be at least one", len(parts))
    first, known = parts[0]
    alike = all((s.tiers, s.signal, k.names) == (first.tiers, first.signal, known.names) for s, k in parts)
    require(alike, "parts", "must have the same tiers, signal and covariates", [s.name for s, _ in parts])
    correct, score, cost = (np.concatenate([getattr(s, a) for s, _ in parts]) for a in ("correct", "score", "cost"))
    covariates, length = (np.concatenate([getattr(k, a) for _, k in parts]) for a in ("covariates", "length"))
    name, ids = " + ".join(s.name for s, _ in parts), tuple(i for s, _ in parts for i in s.ids)
    joined = Samples(name, first.signal, first.unit, first.tiers, ids, correct, score, cost)
    member = np.repeat(np.eye(len(parts)), [len(s.ids) for s, _ in parts], axis=0)
    return joined, Known(known.names, covariates, score, length).joined([s.name for s, _ in parts], member)


def _finite(rows: pd.DataFrame, of_tier: pd.DataFrame, column: str, file: str, ids: Sequence[str]) -> Array:
    numbers = pd.to_numeric(rows[column], errors="coerce").to_numpy(dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers))
    line = int(rows.index[bad[0]]) if len(bad) else None
    rule = f"must be a finite number in {file}" + (f", line {line}" if line else "")
    require(not len(bad), column, rule, rows[column].iloc[bad[0]] if len(bad) else None)
    found = pd.to_numeric(of_tier[column]).reindex(list(ids)).to_numpy(dtype=np.float64)
    return np.asarray(found)

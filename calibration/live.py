"""Theory held against small models that are trained, timed and run on the spot: fits on some pairs, predicts others.

Nothing is predicted from what it is compared with. Acceptance: each model in turn is left out of the law that predicts
its pairs. Tokens per round and speed-up: acceptances and step times are taken on some prompts, the runs predicted are
on others, both taken in turn. Cascade: planned on half of the requests, run on the other half, tier by tier, with a
stop rule that sees only what the tier that ran has said. Times on a machine that does other work are not results: its
noise is measured, and above a limit no verdict is given on them.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from theory.acceptance import LogLossLaw, PerplexityLaw, QualityLaw, acceptance_band, fit_law
from theory.cascade import Mixture, Policy, evaluate, frontier
from theory.errors import require
from theory.outcomes import Outcomes
from theory.speculation import speedup, tokens_per_round

from .live_models import Corpus, FastModel, Recipe, Shape, Trigram, Weights, corpus, one_thread, train_family
from .outcome_models import fit_score_model, level_cuts, smoothed_outcomes, to_levels
from .speculative_loop import Decoded, TokenModel, decode, kept_given_text, losses, overlap, replayed, speculate
from .validate import error_summary

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]
Told = Callable[[str, int, int], None]

UNSCORED = 32  # first tokens of a window that are read but not scored [tokens]
PROMPT = 32  # tokens of a prompt for decoding [tokens]
READ = 48  # tokens of a request of the cascade [tokens]
WARM = 8  # passes before times are taken [-]
LEVEL = 0.9  # coverage of intervals [-]
RESAMPLES = 200  # of prompts, for intervals [-]
NOISE_LIMIT = 0.15  # spread of repeated times above which no verdict is given on times [-]
SIGNAL_LEVELS, SMEARING = 10, 1.0  # of the cascade's confidences [levels]
PLANS = (0.5, 0.75, 0.9)  # shares of the quality gap between smallest and best tier [-]
SAMPLING, GREEDY = 1.0, 0.0  # temperatures [-]
BARS = {  # name: limit; above it a bar is missed (the last: below it)
    "left-out model: largest mean error of acceptance, loss law": 0.02,
    "left-out model: largest error of acceptance on any pair, loss law": 0.02,
    "tokens per round, replay: median error": 0.03,
    "tokens per round, i.i.d., sampling: median error": 0.05,
    "speed-up: median error over at least 12 combinations": 0.10,
    "cascade cost in seconds: largest error": 0.05,
    "cascade cost at planned prices: largest error": 0.05,
    "cascade quality: largest error [points / 100]": 0.02,
    "largest measured speed-up": 1.3,
}


@dataclass(frozen=True, slots=True)
class Combination:
    """A draft, a target and a draft length; models by name."""

    draft: str
    target: str
    length: int  # gamma [tokens]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is trained and measured."""

    name: str
    recipe: Recipe
    windows: int  # of held-out text, for losses and acceptances [windows]
    prompts: int  # for the prediction; as many others for the measurement [prompts]
    emitted: int  # tokens a prompt is continued by [tokens]
    combinations: tuple[Combination, ...]
    tiers: tuple[str, ...]
    requests: int  # of the cascade, half planned on and half run [-]

    def __post_init__(self) -> None:
        require(len(self.recipe.shapes) >= 5, "shapes", "must be at least five: one left out leaves six pairs", self)
        require(self.prompts >= 2 and self.requests >= 100, "prompts", "must be at least 2, requests 100", self)


def _family(*sizes: tuple[int, int]) -> tuple[Shape, ...]:
    return tuple(Shape(*s) for s in sizes)


def _combinations(*rows: tuple[str, str, int]) -> tuple[Combination, ...]:
    return tuple(Combination(*r) for r in rows)


QUICK = Size(
    "quick",
    Recipe(_family((16, 1), (32, 1), (48, 2), (64, 3), (96, 4)), tokens=300_000, batch=4, text_bytes=3_000_000),
    windows=48,
    prompts=8,
    emitted=80,
    combinations=_combinations(
        ("trigram", "d96-l4", 2),
        ("trigram", "d96-l4", 4),
        ("d32-l1", "d96-l4", 1),
        ("d32-l1", "d96-l4", 3),
        ("d48-l2", "d96-l4", 2),
        ("d16-l1", "d64-l3", 2),
    ),
    tiers=("d16-l1", "d48-l2", "d96-l4"),
    requests=8000,
)
FULL = Size(
    "full",
    Recipe(_family((16, 1), (32, 1), (48, 2), (64, 3), (96, 4), (128, 8)), tokens=3_500_000, batch=8),
    windows=96,
    prompts=48,
    emitted=96,
    combinations=_combinations(
        ("trigram", "d128-l8", 2),
        ("trigram", "d128-l8", 4),
        ("trigram", "d96-l4", 3),
        ("d48-l2", "d128-l8", 2),
        ("d48-l2", "d128-l8", 3),
        ("d32-l1", "d128-l8", 2),
        ("d32-l1", "d128-l8", 4),
        ("d64-l3", "d128-l8", 3),
        ("d48-l2", "d96-l4", 2),
    ),
    tiers=("d16-l1", "d48-l2", "d128-l8"),
    requests=20_000,
)


def validate_live(
    size: Size = FULL, folder: Path | None = None, text: Path | None = None, workers: int = 2, told: Told | None = None
) -> dict[str, Any]:
    """Return predicted against measured on a family of models trained here.

    Parameters
    ----------
    size : Size
    folder : Path, optional
        Where tokenizer and models are kept, and from where they are used again; by default nowhere.
    text : Path, optional
        Folder of text files; by default Python's own library.
    workers : int
        Processes that train, one thread each.
    told : callable, optional
        Gets what is being done, steps done and steps in all.

    Returns
    -------
    dict
        ``acceptance``, ``tokens_per_round``, ``speedup``, ``step_time``, ``cascade`` (error summaries with their rows),
        ``models`` [..], ``noise``, ``verdicts`` [{bar, reached, limit, holds}], where ``holds`` is None if the machine
        was too noisy to say.

    Raises
    ------
    InputError
        If the text is too little, or the number of workers below 1.
    """
    import torch

    require(workers >= 1, "workers", "must be at least 1 [processes]", workers)
    tell = told or (lambda *_: None)
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            return validate_live(size, Path(made), text, workers, told)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    tell("reading text", 0, 1)
    words = corpus(size.recipe, text, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights, spent = train_family(size.recipe, words, folder, workers, device, tell)
    with one_thread():
        bench = _bench(size, words, weights)
        models, acceptance = measured_acceptance(bench, tell)
        result: dict[str, Any] = {"acceptance": predicted_acceptances(models, acceptance)}
        result |= speculation_runs(bench, models, acceptance, tell)
        result["cascade"] = cascade_run(bench, tell)
    for m in models:
        m["train_cpu_s"] = next((t for s, t in spent.items() if s.name == m["name"]), None)
    result |= {"models": models, "pairs": acceptance, "verdicts": _verdicts(models, result)}
    return result | {
        "size": size.name,
        "text": {"source": words.source, "files": words.files, "train_tokens": int(words.train.size)},
        "trained_tokens": size.recipe.steps * size.recipe.batch * size.recipe.context,
        "device": device,
        "seed": size.recipe.seed,
        "wall_s": time.perf_counter() - began,
    }


@dataclass(frozen=True, eq=False)
class _Bench:
    """Models by name, and the text they have not seen."""

    size: Size
    models: dict[str, TokenModel]  # smallest first, the trigram last
    parameters: dict[str, int | None]
    layers: dict[str, int]  # of the networks
    held_out: NDArray[np.int64]
    rng: np.random.Generator

    def windows(self, count: int, length: int) -> list[list[int]]:
        """Return windows of the held-out text from random places, no two overlapping if there is room."""
        slots = len(self.held_out) // length
        at = self.rng.choice(slots, count, replace=count > slots) * length
        return [self.held_out[a : a + length].tolist() for a in at]


def _bench(size: Size, words: Corpus, weights: dict[Shape, Weights]) -> _Bench:
    recipe = size.recipe
    models: dict[str, TokenModel] = {s.name: FastModel(weights[s], s) for s in recipe.shapes}
    same = words.train[: recipe.steps * recipe.batch * recipe.context]  # as many tokens as the networks saw
    models[Trigram.name] = Trigram(same, recipe.vocabulary)
    parameters: dict[str, int | None] = {s.name: s.parameters(recipe.vocabulary) for s in recipe.shapes}
    layers = {s.name: s.layers for s in recipe.shapes}
    rng = np.random.default_rng(recipe.seed)
    return _Bench(size, models, parameters | {Trigram.name: None}, layers, words.held_out, rng)


# --- acceptance -------------------------------------------------------------------------------------------------------


def measured_acceptance(bench: _Bench, tell: Told) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return losses of all models and acceptances of all pairs on held-out text, each with its standard error.

    A pair is a smaller network, or the trigram, as draft of a larger network.
    """
    texts = bench.windows(bench.size.windows, bench.size.recipe.context + 1)
    models: list[dict[str, Any]] = []
    for name, model in bench.models.items():
        each = np.array([losses(model, t)[UNSCORED:].mean() for t in texts])
        loss, error = float(each.mean()), _standard_error(each)
        row = {"name": name, "parameters": bench.parameters[name], "layers": bench.layers.get(name)}
        models.append(row | {"loss": loss, "loss_standard_error": error, "perplexity": math.exp(loss)})
    nets = list(bench.layers)
    chosen = [*combinations(nets, 2), *((Trigram.name, n) for n in nets)]
    pairs = []
    for i, (draft, target) in enumerate(chosen):
        tell("acceptance", i, len(chosen))
        kept = [overlap(bench.models[target], bench.models[draft], t, SAMPLING)[UNSCORED:].mean() for t in texts]
        row = {"draft": draft, "target": target, "network": draft in nets}
        pairs.append(row | {"acceptance": float(np.mean(kept)), "standard_error": _standard_error(np.array(kept))})
    return models, pairs


def _standard_error(each: Array) -> float:
    return float(each.std(ddof=1) / math.sqrt(len(each)))


def predicted_acceptances(models: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how far laws fitted without a model are from the acceptances of its pairs; networks of the family only.

    Returns
    -------
    dict
        The error summary of the loss law with ``mean_error``, ``largest_error`` and ``worst_model_error`` in
        acceptance [-], ``coverage`` of its 90 % intervals, ``rows``; ``perplexity_law``: the same of the other law.
    """
    loss = {m["name"]: m["loss"] for m in models}
    rows = [p for p in pairs if p["network"]]
    return _left_out(LogLossLaw, loss, rows) | {"perplexity_law": _left_out(PerplexityLaw, loss, rows)}


def _fit(kind: type[QualityLaw], loss: dict[str, float], pairs: Sequence[dict[str, Any]]) -> QualityLaw:
    x, y = ([loss[p[role]] for p in pairs] for role in ("draft", "target"))
    return fit_law(kind, x, y, [p["acceptance"] for p in pairs], "live", "fitted here")


def _left_out(kind: type[QualityLaw], loss: dict[str, float], pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rows = []
    for name in sorted({p[role] for p in pairs for role in ("draft", "target")}):
        theirs = [p for p in pairs if name in (p["draft"], p["target"])]
        law = _fit(kind, loss, [p for p in pairs if p not in theirs])
        for p in theirs:
            low, middle, high = acceptance_band(law, loss[p["draft"]], loss[p["target"]], LEVEL)
            predicted = {"predicted": float(middle), "low": float(low), "high": float(high)}
            rows.append({"left_out": name, "draft": p["draft"], "target": p["target"], **predicted})
            rows[-1]["measured"] = p["acceptance"]
    miss = np.array([abs(r["predicted"] - r["measured"]) for r in rows])
    by_model = {n: float(miss[[r["left_out"] == n for r in rows]].mean()) for n in {r["left_out"] for r in rows}}
    law = _fit(kind, loss, pairs)
    # a prediction clipped to 0 has no relative error worth the name, but one: it counts as such
    found: dict[str, Any] = dict(
        error_summary([max(r["predicted"], 1e-9) for r in rows], [r["measured"] for r in rows])
    )
    return found | {
        "law": kind.form,
        "draft_slope": law.draft_slope,
        "target_slope": law.target_slope,
        "intercept": law.intercept,
        "r_squared": law.r_squared,
        "mean_error": float(miss.mean()),
        "largest_error": float(miss.max()),
        "worst_model_error": max(by_model.values()),
        "coverage": float(np.mean([r["low"] <= r["measured"] <= r["high"] for r in rows])),
        "rows": rows,
    }


# --- speculation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    """A prompt continued in one setting: by the target alone, by the draft's help, and once more alone."""

    before: Decoded
    fast: Decoded
    after: Decoded


Runs = dict[tuple[Combination, float], list[_Run]]  # by combination and temperature, one a prompt


def speculation_runs(
    bench: _Bench, models: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]], tell: Told
) -> dict[str, Any]:
    """Return ``tokens_per_round``, ``speedup``, ``step_time`` and ``noise``: predicted on some prompts, run on others.

    The prompts of both sides alternate, and each speculative run stands between two plain ones: what the machine does
    meanwhile meets both sides alike, and repeats say how much it is.
    """
    import torch

    size = bench.size
    prompts = bench.windows(2 * size.prompts, PROMPT)
    rng = torch.Generator().manual_seed(size.recipe.seed)
    for model in bench.models.values():
        decode(model, prompts[0], WARM, SAMPLING, rng)
    runs: Runs = {(c, t): [] for t in (SAMPLING, GREEDY) for c in size.combinations}
    alone: dict[str, list[Decoded]] = {name: [] for name in bench.layers}
    wall, cpu = time.perf_counter(), time.process_time()
    for i, prompt in enumerate(prompts):
        tell("decoding", i, len(prompts))
        for name, of in alone.items():
            of.append(decode(bench.models[name], prompt, size.emitted, SAMPLING, rng))
        for temperature in (SAMPLING, GREEDY):
            for target in dict.fromkeys(c.target for c in size.combinations):
                _run_all(bench, target, prompt, temperature, rng, runs)
    waited = max(0.0, 1 - (time.process_time() - cpu) / (time.perf_counter() - wall))
    rows = [_compared(bench, c, t, prompts, of, (models, pairs)) for (c, t), of in runs.items()]
    repeats = [_pace(r.before) / _pace(r.after) for of in runs.values() for r in of]
    return {
        "tokens_per_round": _token_errors(rows),
        "speedup": _speed_errors(rows),
        "step_time": _step_times(bench, alone),
        "noise": _noise(repeats, waited),
    }


def _run_all(
    bench: _Bench, target: str, prompt: list[int], temperature: float, rng: torch.Generator, runs: Runs
) -> None:
    """Add a run of each combination of a target on one prompt."""
    model, count = bench.models[target], bench.size.emitted
    before = decode(model, prompt, count, temperature, rng)
    for c in bench.size.combinations:
        if c.target == target:
            fast = speculate(model, bench.models[c.draft], prompt, count, c.length, temperature, rng)
            after = decode(model, prompt, count, temperature, rng)
            runs[c, temperature].append(_Run(before, fast, after))
            before = after


def _pace(run: Decoded) -> float:
    """Return the seconds a token took, the first left out: it needs no pass after the prompt [s/token]."""
    emitted = sum(run.accepted) + len(run.accepted) if run.draft_length else run.rounds
    return run.seconds / emitted


@dataclass(frozen=True, eq=False)
class _Side:
    """What the prompts of one side say of a combination, one number a prompt."""

    plain: Array  # T_T, a plain step [s]
    fast: Array  # a token of speculation [s]
    draft: Array  # T_D [s]
    verify: Array  # T_V [s]
    overhead: Array  # T_o, what else a round takes [s]
    acceptance: Array  # alpha on the target's own text [-]
    accepted: Array  # drafted tokens kept [tokens]
    rounds: Array  # [-]
    kept: list[Array]  # by prompt, P(drafted and kept) along the target's own text [-]

    @property
    def tokens(self) -> float:
        """Return the tokens per round measured, rounds pooled [tokens/round]."""
        return float(1 + self.accepted.sum() / self.rounds.sum())

    def predicted(self, length: int, at: NDArray[np.intp], acceptance: float | None = None) -> float:
        """Return the speed-up these prompts promise; by their own acceptance, or another [-]."""
        alpha = float(self.acceptance[at].mean()) if acceptance is None else acceptance
        target, verify, draft, overhead = (
            float(np.median(t[at])) for t in (self.plain, self.verify, self.draft, self.overhead)
        )
        return float(speedup(alpha, length, target=target, verify=verify, draft=draft, overhead=overhead))

    def measured(self, at: NDArray[np.intp]) -> float:
        """Return the speed-up these prompts had, the median over prompts [-]."""
        return float(np.median(self.plain[at] / self.fast[at]))


def _side(
    bench: _Bench, c: Combination, temperature: float, prompts: Sequence[list[int]], runs: Sequence[_Run]
) -> _Side:
    target, draft = bench.models[c.target], bench.models[c.draft]
    rows, kept = [], []
    for prompt, r in zip(prompts, runs, strict=True):
        # greedy, both plain runs are the same text
        texts = [[*prompt, *d.tokens] for d in ((r.before, r.after) if temperature else (r.before,))]
        alpha = np.concatenate([overlap(target, draft, t, temperature)[PROMPT:] for t in texts])
        kept += [kept_given_text(target, draft, t, temperature)[PROMPT:] for t in texts]
        clock, rounds = r.fast.clock, len(r.fast.accepted)
        other = r.fast.seconds - sum(clock.draft) - sum(clock.target)
        plain = 0.5 * (_pace(r.before) + _pace(r.after))
        steps = (np.mean(clock.draft), np.mean(clock.target), other / rounds)
        rows.append((plain, _pace(r.fast), *steps, alpha.mean(), sum(r.fast.accepted), rounds))
    plain, fast, draft_s, verify, overhead, acceptance, accepted, count = np.array(rows, dtype=float).T
    return _Side(plain, fast, draft_s, verify, overhead, acceptance, accepted, count, kept)


def _compared(
    bench: _Bench,
    c: Combination,
    temperature: float,
    prompts: Sequence[list[int]],
    runs: Sequence[_Run],
    known: tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]],
) -> dict[str, Any]:
    """Return predicted (even prompts) against measured (odd prompts) of one combination."""
    one, other = (_side(bench, c, temperature, prompts[k::2], runs[k::2]) for k in (0, 1))
    every = np.arange(len(one.plain))
    draws = [bench.rng.integers(0, len(every), len(every)) for _ in range(RESAMPLES)]
    alpha = float(one.acceptance.mean())
    by_law = None if temperature == GREEDY else _by_law(c, *known)
    greedy_same = [r.fast.tokens == r.before.tokens for r in runs] if temperature == GREEDY else []
    return {
        "draft": c.draft,
        "target": c.target,
        "draft_length": c.length,
        "decoding": "greedy" if temperature == GREEDY else "sampling",
        "acceptance": alpha,
        "acceptance_by_law": by_law,
        "tokens_iid": float(tokens_per_round(alpha, c.length)),
        "tokens_by_law": None if by_law is None else float(tokens_per_round(by_law, c.length)),
        "tokens_replayed": replayed(np.concatenate(one.kept), c.length),
        "tokens_measured": other.tokens,
        "predicted_speedup": one.predicted(c.length, every),
        "predicted_interval": _interval([one.predicted(c.length, d) for d in draws]),
        "speedup_by_law": None if by_law is None else one.predicted(c.length, every, by_law),
        "measured_speedup": other.measured(every),
        "measured_interval": _interval([other.measured(d) for d in draws]),
        "times_s": {
            name: [float(np.median(getattr(side, name))) for side in (one, other)]
            for name in ("plain", "draft", "verify", "overhead")
        },
        "other_text": sum(not same for same in greedy_same),
    }


def _by_law(c: Combination, models: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> float | None:
    """Return the acceptance by the loss law fitted on the other pairs; None for a draft outside the family [-]."""
    loss = {m["name"]: m["loss"] for m in models}
    others = [p for p in pairs if p["network"] and (p["draft"], p["target"]) != (c.draft, c.target)]
    if c.draft == Trigram.name:
        return None
    return float(acceptance_band(_fit(LogLossLaw, loss, others), loss[c.draft], loss[c.target])[1])


def _interval(values: Sequence[float]) -> list[float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def _token_errors(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return error summaries of tokens per round by how they were predicted; ``other_text``: greedy runs that differ.

    At the top level that of the replay.
    """

    def errors(key: str, decoding: str | None = None) -> dict[str, float] | None:
        of = [r for r in rows if r[key] is not None and decoding in (None, r["decoding"])]
        return error_summary([r[key] for r in of], [r["tokens_measured"] for r in of]) if of else None

    return (errors("tokens_replayed") or {}) | {
        "replay_sampling": errors("tokens_replayed", "sampling"),
        "replay_greedy": errors("tokens_replayed", "greedy"),
        "iid_sampling": errors("tokens_iid", "sampling"),
        "iid_greedy": errors("tokens_iid", "greedy"),
        "by_law_sampling": errors("tokens_by_law", "sampling"),
        "other_text": sum(r["other_text"] for r in rows),
    }


def _speed_errors(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the error summary of the speed-up, the same by the acceptance law, and all rows, losers included."""
    by_law = [r for r in rows if r["speedup_by_law"] is not None]
    measured = [r["measured_speedup"] for r in rows]
    same = [(r["predicted_speedup"] > 1) == (r["measured_speedup"] > 1) for r in rows]
    side = [a[0] <= r["measured_speedup"] <= a[1] for r in rows for a in [r["predicted_interval"]]]
    found: dict[str, Any] = dict(error_summary([r["predicted_speedup"] for r in rows], measured))
    if by_law:
        law = error_summary([r["speedup_by_law"] for r in by_law], [r["measured_speedup"] for r in by_law])
        found["by_law"] = law
    return found | {
        "coverage": float(np.mean(side)),
        "same_side_of_1": float(np.mean(same)),
        "losers": sum(m < 1 for m in measured),
        "largest": max(measured),
        "rows": list(rows),
    }


def _step_times(bench: _Bench, alone: dict[str, list[Decoded]]) -> dict[str, Any]:
    r"""Return how far :math:`T = a + b L`, fitted without a model, is from its plain step time; L its layers.

    Relative errors are what is made small; models of one depth share a prediction.
    """
    names = list(alone)
    times = np.array([np.median([np.median(d.clock.target) for d in alone[n]]) for n in names])
    layers = np.array([bench.layers[n] for n in names], dtype=float)
    predicted = []
    for i in range(len(names)):
        keep = np.arange(len(names)) != i
        design = np.stack([np.ones(keep.sum()), layers[keep]], axis=1) / times[keep, None]
        a, b = np.linalg.lstsq(design, np.ones(keep.sum()), rcond=None)[0]
        predicted.append(max(float(a + b * layers[i]), 1e-9))
    rows = [
        {"model": n, "layers": int(k), "predicted_s": p, "measured_s": float(t)}
        for n, k, p, t in zip(names, layers, predicted, times, strict=True)
    ]
    return dict(error_summary(predicted, times)) | {"rows": rows}


def _noise(ratios: Sequence[float], waited: float) -> dict[str, Any]:
    """Return how much the same run repeated right away differs, and whether times can be judged.

    ``waited`` is the share of the wall time in which this process, which never sleeps, was not on a core [-].
    """
    spread = np.abs(np.array(ratios) - 1)
    median, p90 = float(np.median(spread)), float(np.quantile(spread, 0.9))
    return {
        "repeat_spread": median,
        "repeat_spread_p90": p90,
        "waited": waited,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cores": os.cpu_count(),
        "limit": NOISE_LIMIT,
        "quiet": median <= NOISE_LIMIT and waited <= NOISE_LIMIT,
    }


# --- cascade ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Seen:
    """What all tiers said on the requests that the plan is made of."""

    correct: Array  # (n, K) 0 or 1 [-]
    score: Array  # (n, K) largest probability of the next token [-]
    seconds: Array  # (n, K) [s]


def cascade_run(bench: _Bench, tell: Told) -> dict[str, Any]:
    """Return predicted against realised cost and quality of plans for three tiers that say the next token of a text.

    An answer is right if it is the token that stands there; the confidence is its probability; the cost is the time it
    takes to read the text. The plan knows the first half of the requests; on the second a tier runs only if the stop
    rule asks for it. ``predicted_cost`` is the visits the plan expects at the times of its visits on requests it
    knows, taken in the order of the run; ``planned_cost`` is at times of all tiers in turn, as the plan was made.
    """
    tiers = bench.size.tiers
    starts = bench.rng.choice(len(bench.held_out) - READ, min(bench.size.requests, len(bench.held_out) - READ), False)
    texts = [bench.held_out[s : s + READ + 1].tolist() for s in starts]
    half = len(texts) // 2
    tell("cascade plan", 0, 1)
    said = np.array([[_answer(bench.models[t], text) for t in tiers] for text in texts[:half]])
    seen = _Seen(said[..., 0], said[..., 1], said[..., 2])
    price = seen.seconds.mean(axis=0)
    cuts = [level_cuts(seen.score[:, k], SIGNAL_LEVELS, seen.correct[:, k]) for k in range(len(tiers))]
    level = np.stack([to_levels(seen.score[:, k], c) for k, c in enumerate(cuts)], axis=1)
    quality = fit_score_model(seen.score, seen.correct, 2, 10.0)(seen.score)
    table = smoothed_outcomes(tiers, quality, level, SIGNAL_LEVELS, SMEARING)
    curve = frontier(table, price, tolerance=1e-5)
    accuracy, rows = seen.correct.mean(axis=0), []
    for i, share in enumerate(PLANS):
        tell("cascade run", i, len(PLANS))
        wanted = accuracy[0] + share * (max(accuracy) - accuracy[0])
        plan = curve.at_quality(float(np.clip(wanted, curve.quality[0], curve.quality[-1])))
        visits = _visits(plan, table, price)
        rows.append({"share_of_gap": share} | _realised(bench, plan, visits, cuts, (texts[:half], texts[half:]), price))
    cost, quality_gap = (
        [r["realised_cost"] for r in rows],
        [r["predicted_quality"] - r["realised_quality"] for r in rows],
    )
    predicted, planned, priced = (
        [r[key] for r in rows] for key in ("predicted_cost", "planned_cost", "cost_at_planned_prices")
    )
    return dict(error_summary(predicted, cost)) | {
        "at_planned_prices": error_summary(planned, priced),
        "largest_cost_error": float(np.max(np.abs(np.array(predicted) / cost - 1))),
        "largest_priced_error": float(np.max(np.abs(np.array(planned) / priced - 1))),
        "largest_quality_error": float(np.max(np.abs(quality_gap))),
        "cost_unit": "s",
        "tiers": list(tiers),
        "accuracy": accuracy.tolist(),
        "price_s": price.tolist(),
        "planned_on": half,
        "run_on": len(texts) - half,
        "rows": rows,
    }


def _answer(model: TokenModel, text: list[int]) -> tuple[float, float, float]:
    """Return whether the model says the last token of a text, how sure it is, and how long it took [s]."""
    start = time.perf_counter()
    model.forget(0)
    law = model.read(text[:-1])[-1].softmax(-1)
    score, token = law.max(-1)
    sure, said = float(score), int(token)
    return float(said == text[-1]), min(max(sure, 1e-6), 1 - 1e-6), time.perf_counter() - start


def _visits(plan: Mixture, outcomes: Outcomes, price: Array) -> Array:
    """Return how often a plan runs each tier for a request, as it expects [-]."""
    low, high = (evaluate(v.policy, outcomes, price) for v in (plan.low, plan.high))
    return low.mixed(high, plan.gamma).visits


def _realised(
    bench: _Bench,
    plan: Mixture,
    expected: Array,
    cuts: Sequence[Array],
    texts: tuple[Sequence[list[int]], Sequence[list[int]]],
    price: Array,
) -> dict[str, Any]:
    """Run a plan on requests it does not know; each is given to one of its two policies by chance.

    After every other one it serves a request that it knows, which is what predicts the time of a visit: in the order of
    the run, where a tier that is seldom asked may find its weights gone from the caches, and at the same time, so that
    what the machine does meanwhile meets both sides alike.
    """
    known, unknown = texts
    count = len(bench.size.tiers)
    right, spent, visits = np.zeros(len(unknown)), np.zeros((len(unknown), count)), np.zeros((len(unknown), count))
    seconds, ran = np.zeros(count), np.zeros(count)
    for i, text in enumerate(unknown):
        policy = (plan.high if bench.rng.random() < plan.gamma else plan.low).policy
        right[i], visits[i], spent[i] = _served(bench, policy, cuts, text)
        if i % 2:
            _, of_known, took = _served(bench, policy, cuts, known[i % len(known)])
            seconds, ran = seconds + took, ran + of_known
    in_loop = np.where(ran > 0, seconds / np.maximum(ran, 1), price)
    total = spent.sum(axis=1)
    return {
        "predicted_cost": float(expected @ in_loop),
        "price_in_loop_s": in_loop.tolist(),
        "realised_cost": float(total.mean()),
        "realised_cost_standard_error": _standard_error(total),
        "planned_cost": plan.cost,
        "cost_at_planned_prices": float((visits @ price).mean()),
        "predicted_quality": plan.quality,
        "realised_quality": float(right.mean()),
        "realised_quality_standard_error": _standard_error(right),
        "visits": visits.mean(axis=0).tolist(),
    }


def _served(bench: _Bench, policy: Policy, cuts: Sequence[Array], text: list[int]) -> tuple[float, Array, Array]:
    """Return whether the answer given is right, which tiers ran, and how long each took [s]."""
    count = len(bench.size.tiers)
    mask, shown, answers, ran, spent = 0, list[int](), {}, np.zeros(count), np.zeros(count)
    while (move := policy.action(mask, shown)).kind == "run":
        correct, score, seconds = _answer(bench.models[bench.size.tiers[move.tier]], text)
        answers[move.tier] = correct
        shown.append(int(to_levels(score, cuts[move.tier])))
        mask |= 1 << move.tier
        ran[move.tier], spent[move.tier] = 1.0, seconds
    return answers[move.tier], ran, spent


# --- verdicts ---------------------------------------------------------------------------------------------------------


def _verdicts(models: Sequence[dict[str, Any]], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each bar with what was reached; bars on times are left open on a noisy machine."""
    networks = [m["perplexity"] for m in models if m["layers"] is not None]
    monotone = all(a > b for a, b in pairwise(networks))
    first: dict[str, Any] = {"bar": "perplexity falls with size", "reached": networks, "limit": None, "holds": monotone}
    quiet, acceptance, cascade = result["noise"]["quiet"], result["acceptance"], result["cascade"]
    tokens, gain = result["tokens_per_round"], result["speedup"]
    reached = (
        (acceptance["worst_model_error"], True),
        (acceptance["largest_error"], True),
        (tokens["median_ape"], True),
        (tokens["iid_sampling"]["median_ape"], True),
        (gain["median_ape"], quiet),
        (cascade["largest_cost_error"], quiet),
        (cascade["largest_priced_error"], True),
        (cascade["largest_quality_error"], True),
        (gain["largest"], quiet),
    )
    found = [first]
    for (name, limit), (value, judged) in zip(BARS.items(), reached, strict=True):
        enough = gain["n"] >= 12 if name.startswith("speed-up") else True
        holds = value > limit if name.startswith("largest measured") else value <= limit and enough
        found.append({"bar": name, "reached": value, "limit": limit, "holds": bool(holds) if judged else None})
    return found

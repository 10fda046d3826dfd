"""Live validation at its smallest: Llama's arithmetic, a cache that forgets, training that resumes, bars kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration import live, live_models
from calibration.live import FULL, QUICK, Combination, Size, validate_live
from calibration.live_models import (
    FastModel,
    Recipe,
    Shape,
    Trigram,
    as_llama,
    corpus,
    fresh_weights,
    orthogonal,
    read_text,
    train_family,
)
from calibration.speculative_loop import decode, losses, speculate
from theory.errors import InputError

torch.set_num_threads(1)
VOCAB = 300
SHAPES = (Shape(8, 1), Shape(16, 1), Shape(24, 1), Shape(32, 1), Shape(32, 2))
RECIPE = Recipe(SHAPES, tokens=25_600, batch=4, vocabulary=VOCAB, context=64, text_bytes=900_000)
TINY = Size(
    "tiny",
    RECIPE,
    windows=12,
    prompts=2,
    emitted=16,
    combinations=(Combination("trigram", "d32-l2", 2), Combination("d8-l1", "d32-l2", 1)),
    tiers=("d8-l1", "d24-l1", "d32-l2"),
    requests=300,
)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of everything."""
    return validate_live(TINY, tmp_path_factory.mktemp("live"), workers=1)


@pytest.mark.parametrize("shape", [Shape(16, 1), Shape(48, 2), Shape(64, 2)])
def test_the_arithmetic_is_that_of_llama(shape: Shape) -> None:
    weights = fresh_weights(shape, VOCAB, 1)
    ids = np.random.default_rng(0).integers(0, VOCAB, 40).tolist()
    with torch.inference_mode():
        reference = as_llama(weights, shape)(torch.tensor([ids])).logits[0]
    model = FastModel(weights, shape)
    whole = model.read(ids)
    model.forget(7)
    pieces = torch.cat([model.read(ids[7:19]), model.read(ids[19:20]), model.read(ids[20:])])
    assert float((whole - reference).abs().max()) < 2e-5
    assert float((pieces - reference[7:]).abs().max()) < 2e-5
    weights["0.up"] = weights["0.up"].flip(0)  # gate and up exchanged: the comparison must see it
    with torch.inference_mode():
        assert float((FastModel(weights, shape).read(ids) - reference).abs().max()) > 1e-3
    assert sum(w.numel() for w in weights.values()) == shape.parameters(VOCAB)


def test_greedy_speculation_writes_the_targets_own_text() -> None:
    target = FastModel(fresh_weights(Shape(64, 2), VOCAB, 0), Shape(64, 2))
    tokens = np.random.default_rng(0).integers(0, VOCAB, 4000)
    for draft in (FastModel(fresh_weights(Shape(16, 1), VOCAB, 1), Shape(16, 1)), Trigram(tokens, VOCAB)):
        rng = torch.Generator().manual_seed(0)
        plain = decode(target, [1, 2, 3], 40, 0.0, rng).tokens
        assert speculate(target, draft, [1, 2, 3], 40, 3, 0.0, rng).tokens == plain


def test_the_trigram_is_a_law_and_learns_a_chain() -> None:
    law = np.random.default_rng(1).dirichlet(np.full(5, 0.4), 5)
    rng, text = np.random.default_rng(2), [0]
    for _ in range(20_000):
        text.append(int(rng.choice(5, p=law[text[-1]])))
    model = Trigram(np.array(text), 6)  # token 5 never occurs
    read = model.read([0, 3, 5, 5, 1])
    assert read.exp().sum(-1).numpy() == pytest.approx(np.ones(5))
    assert float(read.min()) > -np.inf
    entropy = -np.mean([np.log(law[a, b]) for a, b in itertools.pairwise(text[:5000])])
    assert losses(model, text[:5000]).mean() == pytest.approx(entropy, rel=0.02)
    assert losses(Trigram(np.array(text[::-1]), 6), text[:5000]).mean() > 1.05 * entropy  # another chain
    model.forget(2)
    assert torch.equal(model.read([5]), read[2:3])


def test_orthogonal_brings_singular_values_near_one() -> None:
    for shape in ((24, 60), (60, 24)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert float(values.min()) > 0.5
        assert float(values.max()) < 1.3


def test_training_resumes_where_it_was_and_does_not_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]
) -> None:
    recipe = dataclasses.replace(RECIPE, shapes=(Shape(16, 1),), tokens=2560)
    runs = [tmp_path / "whole", tmp_path / "broken"]
    for run in runs:
        run.mkdir()
    text = corpus(recipe, None, tmp_path)
    whole, _ = train_family(recipe, text, runs[0], 1)
    monkeypatch.setattr(live_models, "CHECKPOINT_S", 0.0)
    update, calls = live_models._update, []

    def interrupted(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 6:
            raise KeyboardInterrupt
        update(*given)

    monkeypatch.setattr(live_models, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_family(recipe, text, runs[1], 1)
    again, _ = train_family(recipe, text, runs[1], 1)
    assert len(calls) == 6 + recipe.steps - 5  # five steps were kept
    for name, w in whole[Shape(16, 1)].items():
        assert torch.equal(w, again[Shape(16, 1)][name])
    train_family(recipe, text, runs[1], 1)
    assert len(calls) == 6 + recipe.steps - 5  # finished models are read
    assert not list(runs[1].glob("part-*"))


def test_models_learn_and_divisions_are_kept_apart(result: dict[str, Any]) -> None:
    models = {m["name"]: m for m in result["models"]}
    assert all(1 < models[s.name]["perplexity"] < 0.5 * VOCAB for s in SHAPES)
    assert result["size"] == "tiny"
    for row in result["acceptance"]["rows"]:
        assert row["left_out"] in (row["draft"], row["target"])
    cascade = result["cascade"]
    assert (cascade["planned_on"], cascade["run_on"]) == (150, 150)


def test_the_result_is_json_with_its_keys_and_its_sums_agree(result: dict[str, Any]) -> None:
    json.dumps(result, allow_nan=False)
    for key in ("acceptance", "tokens_per_round", "speedup", "step_time", "cascade"):
        assert {"n", "mape", "median_ape", "bias", "p90_ape"} <= set(result[key])
    assert result["tokens_per_round"]["other_text"] == 0
    for row in result["speedup"]["rows"]:
        assert 1 <= row["tokens_measured"] <= row["draft_length"] + 1
        assert 1 <= row["tokens_replayed"] <= row["draft_length"] + 1
    for plan in result["cascade"]["rows"]:
        at_prices = float(np.dot(plan["visits"], result["cascade"]["price_s"]))
        assert plan["cost_at_planned_prices"] == pytest.approx(at_prices)


def test_acceptance_follows_the_law_where_it_is_true_and_a_bar_is_missed_where_it_is_not() -> None:
    loss = dict(zip("abcde", (3.5, 3.1, 2.6, 2.3, 2.1), strict=True))
    models = [{"name": n, "loss": x} for n, x in loss.items()]

    def pairs(bend: float) -> list[dict[str, Any]]:
        exact = {
            p: float(np.exp(-0.46 * loss[p[0]] + 0.44 * loss[p[1]] - 0.16)) for p in itertools.combinations("abcde", 2)
        }
        return [
            {"draft": d, "target": t, "network": True, "acceptance": a * (1 - bend * (d == "b"))}
            for (d, t), a in exact.items()
        ]

    assert live.predicted_acceptances(models, pairs(0.0))["largest_error"] < 1e-9
    assert live.predicted_acceptances(models, pairs(0.3))["worst_model_error"] > 0.02


def test_a_noisy_machine_gets_no_verdict_on_times(result: dict[str, Any]) -> None:
    quiet = live._noise([1.0, 1.05, 0.97], 0.01)
    noisy = [live._noise([1.0, 1.4, 0.6], 0.01), live._noise([1.0, 1.01, 1.0], 0.6)]
    assert quiet["quiet"]
    assert not any(n["quiet"] for n in noisy)

    def open_bars(noise: dict[str, Any]) -> list[str]:
        found = live._verdicts(result["models"], result | {"noise": noise})
        return [v["bar"] for v in found if v["holds"] is None]

    assert open_bars(quiet) == []
    assert len(open_bars(noisy[0])) == len(open_bars(noisy[1])) == 3
    assert [v["bar"] for v in result["verdicts"]][1:] == list(live.BARS)


def test_shipped_sizes_judge_twelve_combinations_of_their_own_models() -> None:
    for size in (QUICK, FULL):
        names = [s.name for s in size.recipe.shapes]
        assert 2 * len(size.combinations) >= 12
        assert all(c.target in names and c.draft in (*names, "trigram") for c in size.combinations)
        assert set(size.tiers) <= set(names)
        longest = live.PROMPT + size.emitted + max(c.length for c in size.combinations)
        assert longest <= live_models.CACHE


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`text` must be a folder that exists"):
        read_text(tmp_path / "none", 0, 1000)
    with pytest.raises(InputError, match="at least 20 UTF-8 files"):
        read_text(tmp_path, 0, 1000)
    with pytest.raises(InputError, match="`workers` must be at least 1"):
        validate_live(TINY, workers=0)
    with pytest.raises(InputError, match="`tokens` must be at least one step"):
        dataclasses.replace(RECIPE, tokens=10)
    with pytest.raises(InputError, match="at least five"):
        dataclasses.replace(TINY, recipe=dataclasses.replace(RECIPE, shapes=SHAPES[:4]))
    with pytest.raises(InputError, match="must fit the cache of 4"):
        FastModel(fresh_weights(Shape(8, 1), VOCAB, 0), Shape(8, 1), places=4).read([1] * 5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--text", "/nowhere"], "`text` must be a folder"),
        (["--workers", "0"], "`workers` must be"),
        (["--seed", "-1"], "`seed` must be"),
    ],
)
def test_the_command_refuses_before_it_computes(given: list[str], said: str) -> None:
    from tierwise.cli import app

    with pytest.raises(InputError, match=said):
        app(["validate", "live", "--quick", *given], standalone_mode=False)


def test_the_tables_show_what_was_not_judged(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from tierwise import show

    noise = live._noise([1.0, 1.4, 0.6], 0.5)
    show.live(result | {"noise": noise, "verdicts": live._verdicts(result["models"], result | {"noise": noise})})
    said = capsys.readouterr().out
    assert said.count("not judged") == 3
    assert "too noisy" in said
    assert "alpha affine in perplexity" in said

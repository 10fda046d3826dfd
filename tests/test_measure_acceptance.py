"""Acceptance and speculation measured on real checkpoints: two small random models with a byte-level tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.measure_acceptance import Pair, measure_acceptance
from theory.errors import InputError
from theory.speculation import tokens_per_round
from tierwise import show
from tierwise.cli import app

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
transformers = pytest.importorskip("transformers", reason="the torch extra is not installed")
torch.set_num_threads(1)


def save_tokenizer(folder: Path, extra: tuple[str, ...] = ()) -> None:
    """Write a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *extra]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def save_model(folder: Path, layers: int, width: int, seed: int, vocab: int = 256) -> Path:
    """Write a small random checkpoint."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.06,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    words = np.random.default_rng(0).choice(["tier", "draft", "token ", "stop, ", "lambda ", "é"], 900)
    (folder / "text.txt").write_text("".join(words), encoding="utf-8")
    target, draft = save_model(folder / "big", 3, 64, 0), save_model(folder / "small", 1, 32, 1)
    return Pair(target, draft, folder / "text.txt", (1, 3), tokens=32, prompts=4, prompt_tokens=8)


@pytest.fixture(scope="module")
def result(pair: Pair) -> dict[str, Any]:
    return measure_acceptance(pair)


def test_rounds_are_what_replay_says(result: dict[str, Any]) -> None:
    alpha = result["acceptance"]["value"]
    assert 0.1 < alpha < 0.95
    assert np.mean(result["acceptance"]["by_position"]) == pytest.approx(alpha, abs=0.01)
    for row in result["by_draft_length"]:
        assert row["tokens_per_round_iid"] == pytest.approx(float(tokens_per_round(alpha, row["draft_length"])))
        reach = 4 * row["tokens_per_round_standard_error"]
        assert abs(row["tokens_per_round"] - row["tokens_per_round_replayed"]) < reach
        assert abs(row["tokens_per_round"] - (row["draft_length"] + 1)) > reach  # not all were kept
        assert row["acceptance_by_depth"][0] == pytest.approx(alpha, abs=0.2)
        assert row["speedup"]["low"] <= row["speedup"]["median"] <= row["speedup"]["high"]
        assert 0.2 < row["speedup_iid"] / row["speedup"]["median"] < 5
        assert 1 <= row["assisted"]["tokens_per_round"] <= row["draft_length"] + 1


def test_perplexities_are_those_of_transformers(pair: Pair, result: dict[str, Any]) -> None:
    """The loss that the models themselves report on the windows read, their first tokens left out."""
    text = transformers.AutoTokenizer.from_pretrained(pair.target)(pair.text.read_text(encoding="utf-8"))["input_ids"]
    length = pair.prompt_tokens + pair.tokens
    starts = np.linspace(0, len(text) - length, 2 * pair.prompts).astype(int)[0::2]
    network = transformers.AutoModelForCausalLM.from_pretrained(pair.target).eval()
    losses = []
    for start in starts:
        window = torch.tensor([text[start : start + length]])
        labels = window.clone()
        labels[:, : pair.prompt_tokens] = -100
        losses.append(float(network(window, labels=labels).loss.detach()))
    assert result["perplexity"]["target"] == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-4)
    assert result["perplexity"]["draft"] != pytest.approx(result["perplexity"]["target"], rel=1e-2)


def test_a_draft_that_is_the_target_is_always_kept(pair: Pair) -> None:
    twin = measure_acceptance(replace(pair, draft=pair.target, draft_lengths=(3,), prompts=2, temperature=0.0))
    assert twin["acceptance"]["value"] == 1.0
    (row,) = twin["by_draft_length"]
    assert row["tokens_per_round"] == row["tokens_per_round_iid"] == 4.0
    assert row["acceptance_by_depth"] == [1.0, 1.0, 1.0]
    assert row["same_as_plain"] == 1.0
    assert row["assisted"]["tokens_per_round"] == 4.0
    assert twin["perplexity"]["draft"] == twin["perplexity"]["target"]


def test_the_command_line(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pair.json"
    words = ["--target", str(pair.target), "--draft", str(pair.draft), "--text", str(pair.text)]
    words += ["--draft-length", "2", "--tokens", "16", "--prompts", "2", "--temperature", "0", "--output", str(out)]
    app(["measure", "--acceptance", *words, "--format", "json"], standalone_mode=False)
    result = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == result
    assert {"header", "acceptance", "perplexity", "by_draft_length"} == set(result)
    assert result["by_draft_length"][0]["same_as_plain"] == 1.0
    assert {"torch", "transformers", "processor", "date", "seed"} <= set(result["header"])
    show.acceptance(result)
    assert "Tokens per round" in capsys.readouterr().out
    for extra, said in (["--batch", "2"], "must come without models"), (["llama-2-7b"], "must come without models"):
        with pytest.raises(InputError, match=said):
            app(["measure", "--acceptance", *words, *extra], standalone_mode=False)
    with pytest.raises(InputError, match="`text` must be given with --acceptance"):
        app(["measure", "--acceptance", *words[:4]], standalone_mode=False)
    with pytest.raises(InputError, match=r"`acceptance` must be given with.*Add --acceptance"):
        app(["measure", *words], standalone_mode=False)


def test_what_cannot_be_measured_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`target` must be a folder with a checkpoint"):
        replace(pair, target=tmp_path)
    with pytest.raises(InputError, match=r"`draft-length` must lie in \[1, 31\]"):
        replace(pair, draft_lengths=(0,))
    with pytest.raises(InputError, match=r"`text` must have at least 8000 tokens.*fewer --prompts"):
        measure_acceptance(replace(pair, prompts=100))
    with pytest.raises(InputError, match="`tokens` must leave prompt and output below 248"):
        measure_acceptance(replace(pair, tokens=250))
    stranger = save_model(tmp_path / "stranger", 1, 32, 2)
    save_tokenizer(stranger, ("ab",))
    with pytest.raises(InputError, match="`draft` must have the target's tokenizer"):
        measure_acceptance(replace(pair, draft=stranger))
    other = save_model(tmp_path / "other", 1, 32, 2, vocab=300)
    with pytest.raises(InputError, match=r"`draft` must have the target's 256 rows of the embedding.*got 300"):
        measure_acceptance(replace(pair, draft=other))
    for path in pair.target.glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in other.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="`target` must hold its tokenizer"):
        measure_acceptance(replace(pair, target=other))

"""The reference loop: its output has the target's law, greedy output is the target's own, rounds are as predicted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from calibration.speculative_loop import (
    CachedModel,
    decode,
    kept_given_text,
    losses,
    overlap,
    replayed,
    speculate,
)
from theory.errors import InputError
from theory.speculation import tokens_per_round

VOCAB = 5
torch.set_num_threads(1)  # threads that wait for each other cost more than these small products


class Chain:
    """A first-order Markov chain as a language model: small enough to know its law."""

    def __init__(self, law: np.ndarray) -> None:
        self.law = torch.tensor(law)
        self.length = 0

    def read(self, tokens: Sequence[int]) -> torch.Tensor:
        self.length += len(tokens)
        return torch.log(self.law[list(tokens)])

    def forget(self, length: int) -> None:
        self.length = min(length, self.length)


def chain(seed: int, sharp: float = 1.0) -> Chain:
    """A random chain."""
    return Chain(np.random.default_rng(seed).dirichlet(np.full(VOCAB, sharp), VOCAB))


def generator(seed: int) -> torch.Generator:
    """Seeded draws."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pair() -> tuple[CachedModel, CachedModel]:
    """Two small random transformers of one vocabulary."""

    return network(0, 3, 64), network(1, 1, 32)


def network(seed: int, layers: int, width: int, vocab: int = 64) -> CachedModel:
    """A small random transformer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
    )
    return CachedModel(LlamaForCausalLM(config))


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_pairs_of_tokens_have_the_law_of_the_target(gamma: int) -> None:
    target, draft = chain(1), chain(2)
    rng = generator(gamma)
    runs = [speculate(target, draft, [0], 4, gamma, 1.0, rng).tokens for _ in range(1200)]
    seen = np.zeros((VOCAB, VOCAB))
    for run in runs:
        seen[run[2], run[3]] += 1
    step = target.law.numpy()
    start = np.linalg.matrix_power(step, 3)[0]
    expected = start[:, None] * step * len(runs)
    assert stats.chisquare(seen.ravel(), expected.ravel()).pvalue > 1e-4
    wrong = np.linalg.matrix_power(draft.law.numpy(), 3)[0][:, None] * draft.law.numpy() * len(runs)
    assert stats.chisquare(seen.ravel(), wrong.ravel() * seen.sum() / wrong.sum()).pvalue < 1e-6  # not the draft's


def test_transformers_with_their_caches_keep_the_law_of_the_target() -> None:
    """The same at a temperature, with networks: pairs of tokens against the target's law, told token by token."""
    target, draft, prompt, temperature = network(5, 2, 32, VOCAB), network(6, 1, 16, VOCAB), [1, 4, 2], 0.7
    rng = generator(9)
    seen = np.zeros((VOCAB, VOCAB))
    for _ in range(400):
        first, second = speculate(target, draft, prompt, 2, 2, temperature, rng).tokens
        seen[first, second] += 1

    def law(model: CachedModel) -> np.ndarray:
        """Probability of each pair after the prompt."""
        pairs = np.zeros((VOCAB, VOCAB))
        for token in range(VOCAB):
            model.forget(0)
            laws = torch.softmax(model.read([*prompt, token])[-2:].double() / temperature, -1).numpy()
            pairs[token] = laws[0, token] * laws[1]
        return pairs

    expected = law(target) * seen.sum()
    common = expected >= 5  # cells of a chi-square test
    lumped = np.append(seen[common], seen[~common].sum()), np.append(expected[common], expected[~common].sum())
    keep = lumped[1] > 0
    assert stats.chisquare(lumped[0][keep], lumped[1][keep], sum_check=False).pvalue > 1e-4
    other = law(draft) * seen.sum()
    assert stats.chisquare(seen.ravel(), other.ravel(), sum_check=False).pvalue < 1e-6  # not the draft's


def test_greedy_speculation_writes_what_the_target_writes(pair: tuple[CachedModel, CachedModel]) -> None:
    target, draft = pair
    prompts = np.random.default_rng(3).integers(64, size=(100, 7)).tolist()
    for i, prompt in enumerate(prompts):
        plain = decode(target, prompt, 8, 0.0, generator(0)).tokens
        assert speculate(target, draft, prompt, 8, 1 + i % 4, 0.0, generator(i)).tokens == plain


def test_a_draft_like_the_target_is_always_kept(pair: tuple[CachedModel, CachedModel]) -> None:
    target, _ = pair
    twin = CachedModel(target._model)
    run = speculate(target, twin, [1, 2, 3], 20, 3, 1.0, generator(0))
    assert set(run.accepted) == {3}
    assert run.tokens_per_round == 4.0
    assert run.rounds == 5


def test_the_cache_forgets(pair: tuple[CachedModel, CachedModel]) -> None:
    model, _ = pair
    model.forget(0)
    model.read([1, 2, 3, 4, 5])
    model.forget(3)
    again = model.read([9, 8])
    model.forget(0)
    whole = model.read([1, 2, 3, 9, 8])[-2:]
    torch.testing.assert_close(again, whole, atol=1e-4, rtol=1e-4)
    model.forget(0)
    other = model.read([1, 2, 4, 9, 8])[-2:]
    assert not torch.allclose(again, other, atol=1e-3)


def test_acceptance_of_independent_tokens_is_the_overlap_of_the_laws() -> None:
    rng = np.random.default_rng(5)
    p, q = rng.dirichlet(np.ones(VOCAB), 2)
    target, draft = Chain(np.tile(p, (VOCAB, 1))), Chain(np.tile(q, (VOCAB, 1)))
    alpha = float(np.minimum(p, q).sum())
    assert overlap(target, draft, [0, 1, 2, 3], 1.0) == pytest.approx([alpha] * 3)
    runs = [speculate(target, draft, [0], 40, 3, 1.0, generator(i)) for i in range(60)]
    rounds = np.concatenate([run.accepted for run in runs]) + 1.0
    error = rounds.std() / np.sqrt(rounds.size)
    assert abs(rounds.mean() - tokens_per_round(alpha, 3)) < 4 * error
    assert abs(rounds.mean() - tokens_per_round(alpha + 0.15, 3)) > 4 * error  # it would see another acceptance


def test_replay_along_a_text_of_the_target_predicts_the_rounds() -> None:
    target, draft = chain(7, 0.6), chain(8, 0.6)
    text = decode(target, [0], 2500, 1.0, generator(1)).tokens
    predicted = replayed(kept_given_text(target, draft, [0, *text], 1.0), 3)
    rounds = np.array(speculate(target, draft, [0], 2500, 3, 1.0, generator(2)).accepted) + 1.0
    error = 2 * rounds.std() / np.sqrt(rounds.size)  # both texts are drawn
    assert abs(rounds.mean() - predicted) < 4 * error
    assert abs(rounds.mean() - 1.2 * predicted) > 4 * error


def test_losses_are_those_of_the_chain() -> None:
    model = chain(4)
    text = [0, 3, 1, 4]
    expected = [-np.log(float(model.law[a, b])) for a, b in pairwise(text)]
    assert losses(model, text) == pytest.approx(np.array(expected))


@pytest.mark.parametrize(
    ("prompt", "count", "gamma", "temperature", "name"),
    [([], 4, 2, 1.0, "prompt"), ([0], 0, 2, 1.0, "count"), ([0], 4, 0, 1.0, "draft_length"), ([0], 4, 2, -1.0, "temp")],
)
def test_bad_input_is_refused(prompt: list[int], count: int, gamma: int, temperature: float, name: str) -> None:
    with pytest.raises(InputError, match=name):
        speculate(chain(0), chain(1), prompt, count, gamma, temperature, generator(0))

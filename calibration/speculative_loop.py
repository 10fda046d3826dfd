"""Real speculative decoding, one sequence at a time: the reference that predicted tokens per round are held against.

The loop is that of Leviathan et al. (2023): the draft proposes gamma tokens one after the other, the target looks at
all of them in one pass, keeps a prefix and adds one token of its own. What comes out has the law of the target exactly,
whatever the draft; greedy, it is the target's own continuation token by token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from theory.errors import require

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]


class TokenModel(Protocol):
    """A language model that remembers what it has read."""

    @property
    def length(self) -> int:
        """Tokens read so far [tokens]."""

    def read(self, tokens: Sequence[int]) -> torch.Tensor:
        """Read more tokens; return the logits of what follows each of them, (tokens, vocabulary)."""

    def forget(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""


class CachedModel:
    """A causal language model of transformers with its KV cache."""

    def __init__(self, model: Any) -> None:
        """Wrap ``model``, which stays where it is and is put into evaluation mode."""
        self._model = model.eval()
        self._device = next(model.parameters()).device
        self._cache = self._fresh()
        self._length = 0

    def _fresh(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    @property
    def length(self) -> int:
        """Tokens read so far [tokens]."""
        return self._length

    def read(self, tokens: Sequence[int]) -> torch.Tensor:
        """Read more tokens in one forward pass; return the logits of what follows each of them."""
        import torch

        with torch.inference_mode():
            inputs = torch.tensor([list(tokens)], device=self._device)
            out = self._model(input_ids=inputs, past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        self._length += len(tokens)
        logits: torch.Tensor = out.logits[0]
        return logits

    def forget(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if length == 0:
            self._cache = self._fresh()
        elif length < self._length:
            self._cache.crop(length - self._length)  # a negative number: tokens to take away at the end
        self._length = min(length, self._length)


@dataclass(frozen=True, slots=True)
class Clock:
    """Where the time of a run went, each call in the order of the loop [s]."""

    draft: list[float]  # [s]
    target: list[float]  # [s]

    @classmethod
    def stopped(cls) -> Clock:
        """Return a clock without readings."""
        return cls([], [])


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a run produced and what it took."""

    tokens: list[int]  # new ones, the prompt left out
    accepted: list[int]  # drafted tokens kept, by round; empty for plain decoding [tokens]
    draft_length: int  # gamma; 0 for plain decoding [tokens]
    seconds: float  # wall time after the prompt was read [s]
    clock: Clock

    @property
    def rounds(self) -> int:
        """Return the passes of the target after the prompt [-]."""
        return len(self.clock.target)

    @property
    def tokens_per_round(self) -> float:
        """Return what a round emits on average, the target's token included, before the cut at the end [tokens]."""
        return 1.0 + sum(self.accepted) / max(len(self.accepted), 1)


def decode(target: TokenModel, prompt: Sequence[int], count: int, temperature: float, rng: torch.Generator) -> Decoded:
    """Continue ``prompt`` by ``count`` tokens of the target alone; temperature 0 takes the likeliest token.

    Raises
    ------
    InputError
        If the prompt is empty, the count below 1 or the temperature negative.
    """
    _check(prompt, count, 0, temperature)
    clock = Clock.stopped()
    target.forget(0)
    follows = target.read(prompt)[-1]
    start = time.perf_counter()
    tokens: list[int] = []
    while True:
        tokens.append(_pick(_law(follows, temperature), rng))
        if len(tokens) == count:
            return Decoded(tokens, [], 0, time.perf_counter() - start, clock)
        follows = _timed(clock.target, target.read, tokens[-1:])[-1]


def speculate(
    target: TokenModel,
    draft: TokenModel,
    prompt: Sequence[int],
    count: int,
    draft_length: int,
    temperature: float,
    rng: torch.Generator,
) -> Decoded:
    r"""Continue ``prompt`` by ``count`` tokens, ``draft_length`` of them proposed by the draft in each round.

    A proposed token x is kept with probability :math:`\min(1, p(x) / q(x))`; the first one that is not is replaced by a
    draw from :math:`(p - q)^+ / \sum (p - q)^+`; if all are kept the target adds one more of its own.

    Raises
    ------
    InputError
        As :func:`decode`, or if the draft length is below 1.

    Source
    ------
    Leviathan, Kalman & Matias (2023), arXiv:2211.17192, Algorithm 1.
    """
    require(draft_length >= 1, "draft_length", "must be at least 1 [tokens]", draft_length)
    _check(prompt, count, draft_length, temperature)
    clock = Clock.stopped()
    for model in (target, draft):
        model.forget(0)
    first = target.read(prompt)[-1]
    draft.read(prompt)
    start = time.perf_counter()
    text = [*prompt, _pick(_law(first, temperature), rng)]
    kept: list[int] = []
    while len(text) - len(prompt) < count:
        proposed, q = _propose(draft, text, draft_length, temperature, rng, clock)
        p = _law(_timed(clock.target, target.read, [*text[target.length :], *proposed]), temperature)[
            -draft_length - 1 :
        ]
        accepted, last = _verify(p, q, proposed, rng)
        kept.append(accepted)
        text += [*proposed[:accepted], last]
        for model in (target, draft):
            model.forget(len(text) - 1)
    seconds = time.perf_counter() - start
    return Decoded(text[len(prompt) :][:count], kept, draft_length, seconds, clock)


def _propose(
    draft: TokenModel, text: Sequence[int], length: int, temperature: float, rng: torch.Generator, clock: Clock
) -> tuple[list[int], torch.Tensor]:
    """Return the drafted tokens and the law each was drawn from, (length, vocabulary)."""
    import torch

    unread, laws, proposed = list(text[draft.length :]), [], list[int]()
    for _ in range(length):
        law = _law(_timed(clock.draft, draft.read, unread)[-1], temperature)
        proposed.append(_pick(law, rng))
        laws.append(law)
        unread = proposed[-1:]
    return proposed, torch.stack(laws)


def _verify(p: torch.Tensor, q: torch.Tensor, proposed: Sequence[int], rng: torch.Generator) -> tuple[int, int]:
    """Return how many proposed tokens are kept, and the token that follows them."""
    import torch

    uniform = torch.rand(len(proposed), generator=rng, dtype=p.dtype)
    for i, token in enumerate(proposed):
        if float(uniform[i] * q[i, token]) >= float(p[i, token]):
            rest = torch.clamp(p[i] - q[i], min=0.0)
            return i, _pick(rest / rest.sum(), rng)
    return len(proposed), _pick(p[-1], rng)


def _law(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the law of the next token; temperature 0 puts all of it on the likeliest one."""
    import torch

    x = logits.detach().to("cpu", torch.float64)
    if temperature == 0:
        return torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]).to(torch.float64)
    return torch.softmax(x / temperature, -1)


def _pick(law: torch.Tensor, rng: torch.Generator) -> int:
    import torch

    return int(torch.multinomial(law, 1, generator=rng))


def _timed(readings: list[float], read: Callable[[Sequence[int]], torch.Tensor], tokens: Sequence[int]) -> torch.Tensor:
    """Read, and note how long it took until the logits were there."""
    start = time.perf_counter()
    logits = read(tokens)
    if logits.is_cuda:
        import torch

        torch.cuda.synchronize(logits.device)
    readings.append(time.perf_counter() - start)
    return logits


def _check(prompt: Sequence[int], count: int, draft_length: int, temperature: float) -> None:
    require(len(prompt) > 0, "prompt", "must hold at least one token", len(prompt))
    require(count >= 1, "count", "must be at least 1 [tokens]", count)
    require(0 <= draft_length <= 64, "draft_length", "must lie in [0, 64] [tokens]", draft_length)
    require(np.isfinite(temperature) and temperature >= 0, "temperature", "must be at least 0 [-]", temperature)


# --- acceptance without running speculation ---------------------------------------------------------------------------


def losses(model: TokenModel, text: Sequence[int]) -> Array:
    """Return the negative log-likelihood of each token of a text given those before it, the first left out [nat]."""
    import torch

    model.forget(0)
    follows = torch.log_softmax(model.read(text[:-1]).to("cpu", torch.float64), -1)
    picked = follows.gather(-1, torch.tensor(text[1:])[:, None])[:, 0]
    return -picked.numpy()


def overlap(target: TokenModel, draft: TokenModel, text: Sequence[int], temperature: float) -> Array:
    r"""Return the probability that a token drafted at each place of a text is kept, :math:`\sum_x \min(p, q)` [-].

    Source
    ------
    Leviathan et al. (2023), Theorem 3.5; at temperature 0 it is 1 where both take the same token, else 0.
    """
    import torch

    laws = []
    for model in (target, draft):
        model.forget(0)
        laws.append(_law(model.read(text[:-1]), temperature))
    kept: Array = torch.minimum(*laws).sum(-1).numpy()
    return kept


def kept_given_text(target: TokenModel, draft: TokenModel, text: Sequence[int], temperature: float) -> Array:
    r"""Return the probability that the token at each place of a text was drafted and kept, given that it is there [-].

    .. math:: r_i = \min(1, q(x_i) / p(x_i))

    In a text drawn from the target these are independent given the text (a round keeps x with probability q min(1, p/q)
    and the target writes it with probability p), which makes tokens per round computable without running speculation:
    :func:`replayed`.
    """
    import torch

    laws = []
    for model in (target, draft):
        model.forget(0)
        laws.append(_law(model.read(text[:-1]), temperature))
    at = torch.tensor(text[1:])[:, None]
    p, q = (law.gather(-1, at)[:, 0] for law in laws)
    shares: Array = torch.clamp(q / torch.clamp(p, min=1e-300), max=1.0).numpy()
    return shares


def replayed(kept: Array, draft_length: int) -> float:
    r"""Return the tokens per round along a text whose place i is kept with probability r_i, from its first on [tokens].

    .. math:: \pi_{i + k + 1} \mathrel{+}= \pi_i\, r_i \cdots r_{i+k-1} (1 - r_{i+k}), \quad k < \gamma, \qquad
              \pi_{i + \gamma + 1} \mathrel{+}= \pi_i\, r_i \cdots r_{i+\gamma-1}

    with :math:`\pi_i` the probability that a round starts at place i: tokens over expected rounds.

    Raises
    ------
    InputError
        If the draft length is below 1, or the text no longer than it.

    Examples
    --------
    >>> round(replayed(np.full(20_000, 0.5), 3), 3), 1 + 0.5 + 0.25 + 0.125
    (1.875, 1.875)
    """
    require(kept.size > draft_length >= 1, "draft_length", f"must lie in [1, {kept.size - 1}] [tokens]", draft_length)
    starts = np.zeros(kept.size + draft_length + 2)
    starts[0] = 1.0
    for i in range(kept.size):
        run = starts[i]
        for k in range(draft_length):
            share = kept[i + k] if i + k < kept.size else 0.0
            starts[i + k + 1] += run * (1 - share)
            run *= share
        starts[i + draft_length + 1] += run
    return float(kept.size / starts[: kept.size].sum())

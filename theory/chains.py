r"""Chains of drafts (13B drafts for 34B drafts for 70B), all lossless, and drafting in parallel with verification.

The target verifies what the first draft proposes; the first draft is itself sped up by a second that drafts for it,
and so on. Three ways to arrange two drafts, plus one that hides draft time:

- *vertical*: a fixed number of rounds of the first draft (each verifying ``length`` tokens of the second) per target
  pass; any number of levels.
- *buffered*: as vertical, but a fixed number of tokens per target pass; its limit for long buffers is the *recursive*
  form, in which a draft that is S times faster simply costs 1/S.
- *horizontal*: the first draft proposes the first tokens, the second the rest; nobody verifies but the target.
- *parallel*: the draft runs on other devices and proposes the next block while the target verifies this one.

Acceptances are independent, one probability per pair of neighbours. That is an assumption on top of the one for two
models: that what the target accepts does not depend on whether the middle model kept or corrected a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import require
from .speculation import tokens_per_round

Array = NDArray[np.float64]

OTHER_TEXTS = 0.02  # by how much acceptances measured on different texts may break the triangle inequality [-]; assumed


@dataclass(frozen=True, slots=True)
class Level:
    """One draft of a chain, seen from the model that verifies it.

    Raises
    ------
    InputError
        If the acceptance is no probability, the passes are negative or no integers, or the time is negative.
    """

    acceptance: float  # alpha_iid of this draft's tokens at the model above [-]
    passes: int  # its forward passes per round of the model above: rounds of its own, or tokens if it is the last [-]
    time: float  # one pass of it, verifying what the draft below proposes if there is one [s]

    def __post_init__(self) -> None:
        _check_probability(self.acceptance)
        whole = isinstance(self.passes, (int, np.integer)) and not isinstance(self.passes, bool)
        require(whole and self.passes >= 0, "passes", "must be an integer of at least 0 [-]", self.passes)
        _check_time("time", self.time)


# --- vertical --------------------------------------------------------------------------------------------------------


def vertical_tokens(levels: tuple[Level, ...]) -> float:
    r"""Return the mean tokens of a target round over a chain of any number of drafts, the bonus token included.

    With G the (random) number of tokens proposed, psi its generating function and y the acceptance,

    .. math:: E[N] = \sum_{j \ge 0} y^j P(G \ge j) = 1 + y A(y), \qquad A(y) = \frac{1 - \psi(y)}{1 - y}

    and A follows level by level: :math:`A(x) = E(x, k - 1)` of k tokens of the last draft; of one round of a draft
    that verifies at acceptance a, :math:`A_1(x) = 1 + a x A(a x)`; of n such rounds,
    :math:`A(x) = A_1(x) \, E(\varphi, n - 1)` with :math:`\varphi = 1 - (1 - x) A_1(x)`, where
    :math:`E(y, k) = \sum_{i \le k} y^i`. Nothing cancels, so acceptances of 0 and 1 need no special case.

    Parameters
    ----------
    levels : tuple of Level
        From the target's own draft down; empty is plain decoding.

    Raises
    ------
    InputError
        See :class:`Level`.

    Source
    ------
    Derivation. For two drafts it is :math:`(1 - a \varphi(a)^n) / (1 - a)` with
    :math:`\varphi(x) = 1 + (x - 1) \frac{1 - (a' x)^{k+1}}{1 - a' x}`, as second-hand accounts give it for the vertical
    cascade of CS Drafting (arXiv:2312.11462).

    Examples
    --------
    >>> round(vertical_tokens((Level(0.8, 2, 0.3), Level(0.7, 3, 0.05))), 3)
    3.607
    """
    if not levels or levels[0].passes == 0:
        return 1.0
    y = levels[0].acceptance
    return 1.0 + y * _proposed(levels, y)


def _proposed(levels: tuple[Level, ...], x: float) -> float:
    """Return A(x) = sum_j x^j P(G > j) of the tokens G that ``levels`` propose to the model above them."""
    if levels[0].passes == 0:
        return 0.0
    if len(levels) == 1:
        return _geometric(x, levels[0].passes - 1)
    below = levels[1:]
    one = 1.0 + below[0].acceptance * x * _proposed(below, below[0].acceptance * x)
    return one * _geometric(1.0 - (1.0 - x) * one, levels[0].passes - 1)


def _geometric(x: float, last: int) -> float:
    """Return E(x, last) = 1 + x + ... + x^last; the sum itself, which beats array overhead at these lengths."""
    return float(sum(x**i for i in range(last + 1)))


def proposed_tokens(levels: tuple[Level, ...]) -> float:
    """Return the mean number of tokens that a round proposes to the target, accepted or not [tokens/round].

    Examples
    --------
    >>> proposed_tokens((Level(0.8, 2, 0.3), Level(1.0, 3, 0.05)))
    8.0
    """
    return _proposed(levels, 1.0) if levels else 0.0


def draft_time(levels: tuple[Level, ...]) -> float:
    r"""Return the time the drafts take per target round, :math:`n_1 (t_1 + n_2 (t_2 + \dots))` [s].

    Examples
    --------
    >>> round(draft_time((Level(0.8, 2, 0.3), Level(0.7, 3, 0.05))), 3)
    0.9
    """
    time = 0.0
    for level in reversed(levels):
        time = level.passes * (level.time + time)
    return time


def vertical_speedup(levels: tuple[Level, ...], verify: float, target: float, overhead: float = 0.0) -> float:
    r"""Return the speed-up of a vertical chain over plain decoding.

    .. math:: S = \frac{E[N]\, T_T}{T_V + T_o + n_1 (t_1 + n_2 (t_2 + \dots))}

    Parameters
    ----------
    levels : tuple of Level
        From the target's own draft down.
    verify, target, overhead : float
        One verify pass of the target, one plain decode step of it, and what a round takes besides [s].

    Raises
    ------
    InputError
        If a time is not above 0 (overhead: below 0).

    Source
    ------
    Derivation; with two drafts and T_V = T_T the vertical cascade of CS Drafting, see :func:`vertical_tokens`.

    Examples
    --------
    >>> round(vertical_speedup((Level(0.8, 8, 0.05),), verify=1.0, target=1.0), 2)
    3.09
    """
    _check_time("verify", verify, strict=True)
    _check_time("target", target, strict=True)
    _check_time("overhead", overhead)
    return vertical_tokens(levels) * target / (verify + overhead + draft_time(levels))


# --- horizontal ------------------------------------------------------------------------------------------------------


def horizontal_tokens(first: Level, second: Level) -> float:
    r"""Return the mean tokens of a target round when one draft proposes the first tokens and another the rest.

    .. math:: E[N] = E(a_1, k_1) + a_1^{k_1}\, a_2\, E(a_2, k_2 - 1), \qquad E(a, k) = \sum_{i \le k} a^i

    Source
    ------
    Derivation: a round passes position i with the product of the acceptances up to i.

    Examples
    --------
    >>> round(horizontal_tokens(Level(0.8, 2, 0.3), Level(0.5, 1, 0.05)), 3)
    2.76
    """
    head = float(tokens_per_round(first.acceptance, first.passes))
    if second.passes == 0:
        return head
    tail = second.acceptance * float(tokens_per_round(second.acceptance, second.passes - 1))
    return head + first.acceptance**first.passes * tail


def horizontal_speedup(first: Level, second: Level, verify: float, target: float) -> float:
    r"""Return the speed-up of a horizontal chain, :math:`E[N] T_T / (T_V + k_1 t_1 + k_2 t_2)` [-].

    Examples
    --------
    >>> round(horizontal_speedup(Level(0.8, 2, 0.3), Level(0.5, 1, 0.05), verify=1.0, target=1.0), 3)
    1.673
    """
    _check_time("verify", verify, strict=True)
    _check_time("target", target, strict=True)
    time = verify + first.passes * first.time + second.passes * second.time
    return horizontal_tokens(first, second) * target / time


# --- buffered and recursive ------------------------------------------------------------------------------------------


def buffered_time(tokens: int, acceptance: float, length: int, step: float, draft: float) -> float:
    r"""Return the mean time in which a draft, itself sped up by a second one, writes exactly ``tokens`` tokens [s].

    .. math:: C(r) = t_1 + k_r t_2 + \sum_{j=1}^{k_r + 1} P(N = j)\, C(r - j), \qquad k_r = \min(k, r - 1),
              \qquad C(0) = 0

    The last rounds draft less, so that no token is written that nobody reads.

    Parameters
    ----------
    tokens : int
        Size of the buffer, the draft length gamma the target sees [tokens].
    acceptance : float
        alpha of the second draft at the first [-].
    length : int
        k, tokens the second draft proposes at most [tokens].
    step, draft : float
        t_1 and t_2, one pass of the first and of the second draft [s].

    Raises
    ------
    InputError
        If ``tokens`` or ``length`` is no whole number of at least 0.

    Source
    ------
    Derivation (renewal equation), with P(N = j) of the capped geometric law.

    Examples
    --------
    >>> buffered_time(1, 0.7, 4, step=0.3, draft=0.05)
    0.3
    """
    _check_probability(acceptance)
    for name, value in (("tokens", tokens), ("length", length)):
        require(isinstance(value, int) and value >= 0, name, "must be an integer of at least 0 [tokens]", value)
    _check_time("step", step)
    _check_time("draft", draft)
    return float(_buffer_times(tokens, acceptance, length, step, draft)[tokens])


def _buffer_times(tokens: int, acceptance: float, length: int, step: float, draft: float) -> Array:
    """Return C(r) of :func:`buffered_time` for r = 0 .. ``tokens`` [s]."""
    time = np.zeros(tokens + 1)
    for r in range(1, tokens + 1):
        k = min(length, r - 1)
        j = np.arange(1, k + 2)
        chance = acceptance ** (j - 1) * np.where(j <= k, 1 - acceptance, 1.0)
        time[r] = step + k * draft + chance @ time[r - j]
    return time


def buffered_speedup(first: Level, second: Level, verify: float, target: float) -> float:
    r"""Return the speed-up when the sped-up first draft fills a buffer of ``first.passes`` tokens a target pass [-].

    .. math:: S = \frac{E(a, g)\, T_T}{T_V + C(g)}

    ``second.passes`` is the most tokens the second draft proposes at a time.

    Source
    ------
    Derivation: tokens of a round over its time, :func:`buffered_time` for the draft.

    Examples
    --------
    >>> round(buffered_speedup(Level(0.8, 4, 0.3), Level(0.7, 3, 0.05), verify=1.0, target=1.0), 3)
    1.905
    """
    _check_time("verify", verify, strict=True)
    _check_time("target", target, strict=True)
    time = buffered_time(first.passes, second.acceptance, second.passes, first.time, second.time)
    return float(tokens_per_round(first.acceptance, first.passes)) * target / (verify + time)


def recursive_time(acceptance: float, length: int, step: float, draft: float) -> float:
    r"""Return the time per token of a draft sped up by a second one, :math:`(t_1 + k t_2) / E(a', k)` [s/token].

    It is the limit of ``buffered_time(g, ...) / g`` for long buffers; short ones cost more.

    Source
    ------
    Derivation (renewal theorem).

    Examples
    --------
    >>> round(recursive_time(0.7, 3, step=0.3, draft=0.05), 4)
    0.1777
    """
    _check_time("step", step)
    _check_time("draft", draft)
    return (step + length * draft) / float(tokens_per_round(acceptance, length))


# --- parallel drafting -----------------------------------------------------------------------------------------------


def parallel_speedup(acceptance: ArrayLike, length: ArrayLike, *, target: float, verify: float, draft: float) -> Array:
    r"""Return the speed-up when the next block is drafted, elsewhere, while the target verifies this one.

    .. math:: S = \frac{E(\alpha, \gamma - 1)\; T_T}
                       {(1 - s)(\gamma T_D + T_V) + s \max(\gamma T_D, T_V)}, \qquad s = \alpha^\gamma

    If all gamma tokens are accepted, the next block is ready when both are done. If not, what was drafted ahead is
    worthless: the target's correction is emitted and the draft starts again while the target waits.

    Parameters
    ----------
    acceptance, length : array_like
        alpha_iid [-] and gamma, at least 1 [tokens]; broadcast.
    target, verify, draft : float
        T_T, T_V and T_D [s].

    Raises
    ------
    InputError
        If an acceptance is no probability, a length below 1, or a time not above 0 (draft: below 0).

    Assumes
    -------
    The draft has devices of its own (the speed-up is per request, not per GPU) and contends for nothing. There is no
    bonus token: the block drafted ahead follows the last drafted token, not the target's. A rejection is known when
    the verify pass ends. Not included: verifying the first token while the block is drafted (PEARL's pre-verification),
    several target servers (DSI), several blocks drafted ahead for several outcomes (SSD).

    Source
    ------
    Derivation: a cycle starts with an empty hand and ends with the first rejection, so it emits 1 / (1 - alpha) tokens
    in gamma T_D, one failing pass T_V, and s / (1 - s) passing ones.

    Examples
    --------
    >>> round(float(parallel_speedup(0.8, 5, target=1.0, verify=1.0, draft=0.2)), 3)
    2.01
    """
    a, g = np.asarray(acceptance, dtype=float), np.asarray(length, dtype=float)
    _check_time("target", target, strict=True)
    _check_time("verify", verify, strict=True)
    _check_time("draft", draft)
    require(bool(np.all(g >= 1)), "length", "must be at least 1 [tokens]", length, "Nothing is drafted ahead at 0.")
    tokens = tokens_per_round(a, g - 1)
    s = a**g
    drafting = g * draft
    return np.asarray(tokens * target / ((1 - s) * (drafting + verify) + s * np.maximum(drafting, verify)))


# --- is the middle tier worth it? ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trio:
    """A target, a middle tier and a small draft: acceptances of the pairs, and step times as functions of width.

    Raises
    ------
    InputError
        If an acceptance is no probability, or the direct one is lower than the other two allow.
    """

    middle: float  # alpha of the middle tier's tokens at the target [-]
    small: float  # alpha of the small draft's tokens at the middle tier [-]
    direct: float  # alpha of the small draft's tokens at the target [-]
    target_time: Callable[[float], float]  # one pass of the target over that many tokens a sequence [s]
    middle_time: Callable[[float], float]  # the same of the middle tier [s]
    small_time: float  # one decode step of the small draft [s]

    def __post_init__(self) -> None:
        for value in (self.middle, self.small, self.direct):
            _check_probability(value)
        floor = self.middle + self.small - 1
        require(
            self.direct >= floor - OTHER_TEXTS,
            "direct",
            f"must be at least about middle + small - 1 = {floor:.4g} [-]",
            self.direct,
            "1 - alpha is the mean total variation distance, which obeys the triangle inequality.",
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """The best arrangement of one kind."""

    kind: str  # plain, small, middle, vertical, horizontal, buffered
    passes: tuple[int, ...]  # draft length, or (rounds or tokens of the middle tier, tokens of the small draft)
    speedup: float  # against plain decoding [-]


@dataclass(frozen=True, slots=True)
class MiddleTier:
    """The best plan of every kind, and what the middle tier adds."""

    plans: tuple[Plan, ...]

    def best(self, *kinds: str) -> Plan:
        """Return the fastest of the kinds named."""
        return max((p for p in self.plans if p.kind in kinds), key=lambda p: p.speedup)

    @property
    def gain(self) -> float:
        """Speed-up of the best chain over the best of no draft and one draft, either of them, minus 1 [-]."""
        chain = self.best("vertical", "horizontal", "buffered")
        return chain.speedup / self.best("plain", "small", "middle").speedup - 1


def middle_tier(trio: Trio, longest: int = 12, rounds: int = 8) -> MiddleTier:
    r"""Return the best lengths with the middle tier, without it, and with it alone.

    A verify pass is as wide as the mean number of tokens proposed to it, plus one; its time is the function's at that
    width.

    Parameters
    ----------
    longest : int
        Largest draft length of the small draft in a chain, and largest buffer; a draft alone may draft as many
        tokens as the longest chain [tokens].
    rounds : int
        Most rounds of the middle tier per target pass [-].

    Returns
    -------
    MiddleTier
        ``gain`` is above 0 where the middle tier is worth having.

    Raises
    ------
    InputError
        If ``longest`` or ``rounds`` is below 1.

    Source
    ------
    Derivation: exhaustive over integers.

    Examples
    --------
    >>> trio = Trio(0.9, 0.6, 0.5, lambda width: 1.0, lambda width: 0.1, 0.02)
    >>> middle_tier(trio).best("small", "middle", "vertical").kind
    'vertical'
    """
    require(longest >= 1, "longest", "must be at least 1 [tokens]", longest)
    require(rounds >= 1, "rounds", "must be at least 1 [-]", rounds)
    kinds = (_small_alone, _middle_alone, _verticals, _horizontals, _buffers)
    plans = [max(kind(trio, longest, rounds), key=lambda p: p.speedup) for kind in kinds]
    return MiddleTier((Plan("plain", (), 1.0), *plans))


def _small_alone(trio: Trio, longest: int, rounds: int) -> list[Plan]:
    # as far as a chain may reach, or the chain would win for its length alone
    lengths = range(1, rounds * (longest + 1) + 1)
    return [_chain(trio, "small", (k,), (Level(trio.direct, k, trio.small_time),)) for k in lengths]


def _middle_alone(trio: Trio, longest: int, rounds: int) -> list[Plan]:
    step, lengths = trio.middle_time(1), range(1, rounds * (longest + 1) + 1)
    return [_chain(trio, "middle", (k,), (Level(trio.middle, k, step),)) for k in lengths]


def _verticals(trio: Trio, longest: int, rounds: int) -> list[Plan]:
    return [
        _chain(
            trio,
            "vertical",
            (n, k),
            (Level(trio.middle, n, trio.middle_time(k + 1)), Level(trio.small, k, trio.small_time)),
        )
        for n in range(1, rounds + 1)
        for k in range(1, longest + 1)
    ]


def _chain(trio: Trio, kind: str, passes: tuple[int, ...], levels: tuple[Level, ...]) -> Plan:
    verify = trio.target_time(proposed_tokens(levels) + 1)
    return Plan(kind, passes, vertical_speedup(levels, verify, trio.target_time(1)))


def _horizontals(trio: Trio, longest: int, rounds: int) -> list[Plan]:
    plans = []
    for k1 in range(1, rounds + 1):
        for k2 in range(1, longest + 1):
            first, second = Level(trio.middle, k1, trio.middle_time(1)), Level(trio.direct, k2, trio.small_time)
            s = horizontal_speedup(first, second, trio.target_time(k1 + k2 + 1), trio.target_time(1))
            plans.append(Plan("horizontal", (k1, k2), s))
    return plans


def _buffers(trio: Trio, longest: int, rounds: int) -> list[Plan]:  # noqa: ARG001
    target, plans = trio.target_time(1), []
    for k in range(1, longest):
        times = _buffer_times(longest, trio.small, k, trio.middle_time(k + 1), trio.small_time)
        for g in range(k + 1, longest + 1):
            tokens = _geometric(trio.middle, g)
            plans.append(Plan("buffered", (g, k), tokens * target / (trio.target_time(g + 1) + float(times[g]))))
    return plans or [Plan("buffered", (), 0.0)]


def _check_probability(value: float) -> None:
    require(
        0 <= value <= 1,
        "acceptance",
        "must lie in [0, 1] [-]",
        value,
        "It is a probability per drafted token: pass 0.8, not 80.",
    )


def _check_time(name: str, value: float, *, strict: bool = False) -> None:
    rule = "above 0" if strict else "at least 0"
    ok = np.isfinite(value) and (value > 0 if strict else value >= 0)
    require(bool(ok), name, f"must be finite and {rule} [s]", value)

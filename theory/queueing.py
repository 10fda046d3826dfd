r"""Queueing without simulation: the batch of a replica as a processor-sharing queue whose rate depends on its state.

With k requests in the batch each one advances E(k) tokens in a round of T(k) seconds. For Poisson arrivals the number
in the batch then has a product form that does not depend on the law of the lengths but for its mean:

.. math:: \pi(n) \propto \prod_{k=1}^{n} \frac{r\, W(k)\, T(k)}{k}, \qquad W(k) = L / E(k)

(W is the rounds one request needs). Past the batch cap M requests wait in order of arrival and the tail is geometric,
exact for exponential lengths.

Source: Cohen (1979), Acta Informatica 12:245-284 (generalised processor sharing: product form, insensitivity, mean
sojourn proportional to length); Kleinrock (1976), Queueing Systems II, section 4.4.

What an engine adds to the ideal queue comes in as separate terms, each zero by default or by its inputs:

* *round boundary*: an arrival waits for the end of the running round, E[S^2] / 2 E[S] by renewal theory;
* *prefill interference*: every arrival adds its ``prefill_time`` to a step of all, so rounds stretch to T / (1 - r t);
* *prefill slot*: a request holds its slot for ``prefill_steps`` more rounds before it decodes, W = L / E + s, and of k
  slots only k (1 - s / W) decode;
* *last round*: a round emits tokens past the requested output, ``overshoot``, added to L;
* *context growth*: frozen at its mean over the tokens decoded (:func:`mean_context`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from .errors import require

Array = NDArray[np.float64]


class FirstToken(NamedTuple):
    """The time to first token by what the arrival finds, (C,) each; times are means given the case."""

    p_alone: Array  # P(nobody is in) [-]
    alone_s: Array  # then: prefill at once [s]
    p_join: Array  # P(a batch is running and has a slot) [-]
    boundary_s: Array  # then: R, wait for the end of the running round [s]
    budget_s: Array  # then: wait for the token budget behind longer prompts [s]
    step_s: Array  # then: own steps, with the prompts that came meanwhile [s]
    late_s: Array  # own steps after a wait for a slot, which ends with a round [s]
    bare_s: Array  # a round without prompts, seen when joining [s]
    prompt_s: Array  # what the own prompt adds [s]
    further_s: Array  # what each further prompt adds [s]
    spread: Array  # variance of bare_s over the states [s^2]
    prompt_cv2: Array  # squared coefficient of variation of prompt_s over prompts [-]

    @property
    def joined_s(self) -> Array:
        """Return the mean time to first token of an arrival that joins a running batch [s]."""
        return self.boundary_s + self.budget_s + self.step_s


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Steady state of C configurations; arrays of shape (C,) unless it says otherwise.

    An unstable configuration has ``stable`` False, mean waits, batch and times of inf and no distribution (nan):
    a diverging queue has no mean.
    """

    rate: Array  # r [request/s]
    tokens: Array  # L, tokens decoded per request (output - 1) [tokens]
    stable: NDArray[np.bool_]
    rate_limit: Array  # largest sustainable rate; an upper bound where a prompt takes several steps [request/s]
    load: Array  # r / rate_limit [-]
    pi: Array  # P(n requests hold a slot), n = 0..N; all that queue are in n = M, (C, N + 1) [-]
    batch: Array  # time average of decoding sequences [-]
    batch_busy: Array  # the same while at least one request is in [-]
    round_s: Array  # mean round as an arrival meets it: time average while a request is in [s]
    p_wait: Array  # P(an arrival finds no free slot) [-]
    queue_s: Array  # mean wait for a slot [s]
    queue_rate: Array  # of the exponential tail P(wait > t) = p_wait exp(-rate t) [1/s]
    admission_s: Array  # mean wait for the running round to end, and for the token budget [s]
    ttft_s: Array  # mean time to first token: both waits and the own prefill step [s]
    decode_s: Array  # mean time from first to last token, by Little's law [s]
    tpot_s: Array  # decode_s / L [s/token]
    e2e_s: Array  # ttft_s + decode_s [s]
    first: FirstToken

    @property
    def throughput(self) -> Array:
        """Return the completions: the arrivals if stable, else what capacity allows [request/s]."""
        return np.where(self.stable, self.rate, self.rate_limit)


def occupancy(
    rate: ArrayLike,
    tokens: ArrayLike,
    round_time: ArrayLike,
    tokens_per_round: ArrayLike = 1.0,
    *,
    overshoot: ArrayLike = 0.0,
    slots: ArrayLike | None = None,
    prefill_time: ArrayLike = 0.0,
    prefill_further: ArrayLike | None = None,
    prefill_square: ArrayLike | None = None,
    prefill_alone: ArrayLike | None = None,
    prefill_steps: ArrayLike = 0.0,
    length_cv2: ArrayLike = 1.0,
) -> Occupancy:
    r"""Return the steady state of C replicas under Poisson arrivals.

    .. math::
        \pi(n) \propto \prod_{k=1}^{n} \frac{r\, W(k)\, S(k)}{k}, \quad
        W(k) = \frac{L + o}{E(k)} + s, \quad
        S(k) = T\big(k (1 - s/W(k))\big) + a\, t(a), \quad a = r\, S(k)

    .. math::
        t(a) = t_2 + (t_1 - t_2) \frac{1 - e^{-a}}{a}, \qquad
        r_{max} = \frac{1}{W\,T/M + t(M/W)} \text{ at } k = M, \qquad
        E[W_q] = \frac{1 + c^2}{2}\, \frac{\pi(M)\,\rho}{r (1 - \rho)^2}, \quad \rho = \frac{r\, W(M)\, S(M)}{M}

    .. math::
        \mathrm{TTFT} = W_q + \Big[\tfrac{E[S^2]}{2 E[S]}\Big]_{1 \le n < M} + T + t_1 + t_2 \cdot \text{others}, \qquad
        \mathrm{E2E} = \mathrm{TTFT} + E[n_{decode}] / r

    A round S carries the prompts that arrived in the one before, Poisson with mean a: the first costs :math:`t_1`, each
    further one :math:`t_2` (more, where the first still fits under the time it takes to read the weights). With
    :math:`t_1 = t_2 = t`, :math:`S = T / (1 - r t)`.

    Parameters
    ----------
    rate : (C,)
        r, arrivals at the replica [request/s].
    tokens : (C,)
        L, mean tokens decoded per request: the output less the one that prefill emits [tokens].
    round_time : (C, N) or (N,)
        T(k) with k = 1..N decoding sequences at the mean context [s].
    tokens_per_round : (C, N), (N,) or scalar
        E(k) [tokens/round].
    overshoot : (C,)
        o, tokens past the output in the last round, :func:`mean_overshoot` [tokens].
    slots : (C,), optional
        M, batch cap of each configuration (sequence limit or KV capacity), at most N; N by default [-].
    prefill_time : (C,) or (C, N)
        t1, what one prompt adds to a step that decodes, at k decoding sequences where that matters [s].
    prefill_further : (C,) or (C, N), optional
        t2, what a further prompt adds to the same step; t1 by default [s].
    prefill_square : (C,) or (C, N), optional
        E[t1^2] over prompts; t1^2, equal prompts, by default [s^2].
    prefill_alone : (C,), optional
        Duration of a prefill step with nobody decoding; t1 by default [s].
    prefill_steps : (C,)
        s, steps a prompt takes, 1 if it fits the token budget; 0 leaves the slot out of account [-].
    length_cv2 : (C,)
        c^2, squared coefficient of variation of the lengths, in the wait for a slot only; 1 is exponential [-].

    Returns
    -------
    Occupancy
        ``stable`` flags each configuration; what diverges is inf.

    Raises
    ------
    InputError
        If rate, tokens, a round time or E is not finite and above 0, another input is negative, or slots leave 1..N.

    Assumes
    -------
    Poisson arrivals; context frozen at its mean; rates that depend on the number in the batch only. The wait for a slot
    of other than exponential lengths is scaled as in M/G/1, (1 + c^2) / 2, exact for M = 1 (Lee & Longton 1959 for more
    servers). T(k) between whole k is linear.

    Source
    ------
    Module docstring; renewal residual and waits: Kleinrock (1975), Queueing Systems I, section 5.2 and 5.7.

    Examples
    --------
    M/M/1 at half load: one request in the system on average.

    >>> state = occupancy(rate=5.0, tokens=100, round_time=[0.001])
    >>> round(float(state.load[0]), 6), round(float(state.queue_s[0]), 6)
    (0.5, 0.1)
    >>> bool(occupancy(rate=20.0, tokens=100, round_time=[0.001]).stable[0])
    False
    """
    c = _configurations(
        round_time,
        rate=rate,
        tokens=tokens,
        overshoot=overshoot,
        prefill=prefill_time,
        further=prefill_further,
        square=prefill_square,
        alone=prefill_alone,
        steps=prefill_steps,
        cv2=length_cv2,
        slots=slots,
    )
    per_round = _per_round(tokens_per_round, c.round_time.shape)
    size, states = c.round_time.shape
    block = max(1, _BLOCK // states)  # several times faster than all at once: the temporaries stay in the cache
    parts = [
        _solve(_Configurations(*(x[i : i + block] for x in c)), per_round[i : i + block]) for i in range(0, size, block)
    ]
    return parts[0] if len(parts) == 1 else _joined(parts)


_BLOCK = 2**17  # numbers of a state table worked on at once [-]


class _Configurations(NamedTuple):
    """Checked inputs, columns (C, 1) or tables (C, N)."""

    round_time: Array  # (C, N)
    rate: Array
    tokens: Array
    overshoot: Array
    prefill: Array  # column or table, like the next two
    further: Array
    square: Array
    alone: Array
    steps: Array
    cv2: Array
    slots: Array


_NAMES = {  # of the arguments, and their units
    "rate": ("rate", "request/s"),
    "tokens": ("tokens", "tokens"),
    "overshoot": ("overshoot", "tokens"),
    "prefill": ("prefill_time", "s"),
    "further": ("prefill_further", "s"),
    "square": ("prefill_square", "s^2"),
    "alone": ("prefill_alone", "s"),
    "steps": ("prefill_steps", "-"),
    "cv2": ("length_cv2", "-"),
    "slots": ("slots", "-"),
}


def _configurations(round_time: ArrayLike, **given: ArrayLike | None) -> _Configurations:
    table = np.atleast_2d(np.asarray(round_time, dtype=np.float64))
    _check("round_time", table, above=0.0, unit="s")
    if given["slots"] is None:
        given["slots"] = table.shape[1]
    found: dict[str, Array] = {}
    for key, value in given.items():
        name, unit = _NAMES[key]
        if value is None:
            value = found["prefill"] ** 2 if key == "square" else found["prefill"][:, : 1 if key == "alone" else None]
        array = np.asarray(value, dtype=np.float64)
        array = array if array.ndim == 2 else array.reshape(-1, 1)
        _check(name, array, above=0.0 if key in ("rate", "tokens", "slots") else None, unit=unit)
        found[key] = array
    rows, states = max(len(table), *(len(array) for array in found.values())), table.shape[1]
    require(len(table) in (1, rows), "round_time", f"must have one row or {rows} [s]", table.shape)
    for key, array in found.items():
        widths = (1, states) if key in ("prefill", "further", "square") else (1,)
        fits = len(array) in (1, rows) and array.shape[1] in widths
        require(fits, _NAMES[key][0], f"must be one number or one per configuration ({rows})", array.shape)
    slots = found["slots"]
    if np.any(found["steps"] > 1.0):  # a prompt that fills the budget shares its steps with no other
        found["further"] = np.where(found["steps"] > 1.0, found["prefill"], found["further"])
    whole = bool(np.all((slots == np.floor(slots)) & (slots <= states)))
    require(whole, "slots", f"must be whole numbers in 1..{states}, the batches of `round_time` [-]", slots)
    return _Configurations(
        np.broadcast_to(table, (rows, states)), **{k: np.broadcast_to(v, (rows, v.shape[1])) for k, v in found.items()}
    )


def _per_round(tokens_per_round: ArrayLike, shape: tuple[int, ...]) -> Array:
    table = np.atleast_2d(np.asarray(tokens_per_round, dtype=np.float64))
    _check("tokens_per_round", table, above=0.0, unit="tokens/round")
    fits = table.shape[0] in (1, shape[0]) and table.shape[1] in (1, shape[1])
    require(fits, "tokens_per_round", f"must be one number or have the shape {shape} of `round_time`", table.shape)
    return np.broadcast_to(table, (shape[0], table.shape[1]))


def _check(name: str, values: Array, *, above: float | None, unit: str) -> None:
    if above is None:
        ok, rule = bool(np.all(np.isfinite(values) & (values >= 0))), "at least 0"
    else:
        ok, rule = bool(np.all(np.isfinite(values) & (values > above))), f"above {above:g}"
    require(ok, name, f"must be finite and {rule} [{unit}]", values)


class _Rounds(NamedTuple):
    """What a round is when k slots are taken, (C, N) or (C, 1)."""

    work: Array  # W, rounds of a request [-]
    bare: Array  # T at those that decode, no prefill [s]
    time: Array  # S, prefill included [s]


class _Tail(NamedTuple):
    """What decides whether the queue behind the batch cap is bounded, columns."""

    stable: NDArray[np.bool_]
    limit: Array  # [request/s]
    ratio: Array  # rho of successive states beyond the cap; 0.5 where unstable, to be masked [-]


def _solve(c: _Configurations, per_round: Array) -> Occupancy:
    work = (c.tokens + c.overshoot) / per_round + c.steps
    bare = _at_fewer(c.round_time, c.steps / work)
    rounds = _Rounds(work, bare, _with_prompts(c, bare))
    tail = _tail(c, rounds)
    pi, full = _product_form(c.rate * work * rounds.time, c.slots.astype(np.intp), tail.ratio)
    return _steady(c, rounds, tail, pi, full)


def _tail(c: _Configurations, rounds: _Rounds) -> _Tail:
    work, bare = _at_cap(rounds.work, c) / c.slots, _at_cap(rounds.bare, c)
    first, further = _at_cap(c.prefill, c), _at_cap(c.further, c)
    share = -np.expm1(-1.0 / work) * work  # (1 - exp(-a)) / a with a = M / W prompts a round at capacity
    limit = 1.0 / (work * bare + further + (first - further) * share)
    alone = c.steps * c.round_time[:, :1] + c.prefill[:, :1]  # prompts that fill the budget go one by one
    limit = np.where(c.steps > 1.0, np.minimum(limit, 1.0 / np.maximum(alone, 1e-300)), limit)
    stable = c.rate < limit
    return _Tail(stable, limit, np.where(stable, np.minimum(c.rate * work * _at_cap(rounds.time, c), 1 - 1e-12), 0.5))


def _with_prompts(c: _Configurations, bare: Array) -> Array:
    r"""Return S, the root of :math:`S = T + t_2 r S + (t_1 - t_2)(1 - e^{-r S})`, by Newton's method [s].

    With :math:`e = (t_1 - t_2) e^{-r S}` a step leads to :math:`(T + t_1 - t_2 - e (1 + r S)) / (1 - r t_2 - r e)`.
    Where :math:`r t_2 \ge 1` there is no steady round and what is returned is masked later.
    """
    room = np.where(c.rate * c.further < 1.0, 1.0 - c.rate * c.further, 1.0)
    extra = c.prefill - c.further
    if not extra.any():
        return np.asarray(bare / room)
    whole, least = bare + extra, 1e-3 * bare
    time = (bare + np.maximum(extra, 0.0)) / room  # from above the root, whence Newton's steps do not overshoot 0
    for _ in range(6):
        before, arrivals = time, c.rate * time
        first = np.exp(-arrivals) * extra
        time = np.maximum((whole - first * (1.0 + arrivals)) / (room - c.rate * first), least)
        if np.all(np.abs(time - before) <= 1e-8 * time):  # convergence is quadratic: the digits double each time
            break
    return np.asarray(time)


def _joined(parts: list[Occupancy]) -> Occupancy:
    names = [field.name for field in fields(Occupancy) if field.name != "first"]
    joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    first = FirstToken(*(np.concatenate(columns) for columns in zip(*(part.first for part in parts), strict=True)))
    return Occupancy(**joined, first=first)


def _at_cap(table: Array, c: _Configurations) -> Array:
    """Return the column of the batch cap; a table of one column is the same at every k."""
    if table.shape[1] == 1:
        return table
    return np.asarray(np.take_along_axis(table, c.slots.astype(np.intp) - 1, axis=1))


def _at_fewer(round_time: Array, share: Array) -> Array:
    """Return T((1 - share) k) by the slope below k, T(1) kept below one sequence."""
    if not share.any():
        return round_time
    k = np.arange(1.0, round_time.shape[1] + 1)
    slope = np.diff(round_time, axis=1, prepend=round_time[:, :1])
    return np.asarray(round_time - np.minimum(share * k, k - 1) * slope)


def _product_form(demand: Array, cap: NDArray[np.intp], ratio: Array) -> tuple[Array, Array]:
    r"""Return pi, (C, N + 1), and P(all slots taken), (C, 1), for births r and deaths k / demand(k).

    Logarithms of the products are scaled by their largest before they are exponentiated, so that neither a batch of
    thousands nor an empty system overflows. ``demand`` carries the factor r.
    """
    k = np.arange(1, demand.shape[1] + 1)
    logs = np.cumsum(np.log(demand / k), axis=1)
    if np.any(cap < k[-1]):
        logs = np.where(k <= cap, logs, -np.inf)
    peak = np.maximum(logs.max(axis=1, keepdims=True), 0.0)
    pi = np.concatenate([np.exp(-peak), np.exp(logs - peak)], axis=1)
    full = np.take_along_axis(pi, cap, axis=1) / (1.0 - ratio)  # the state at the cap and the geometric tail behind it
    np.put_along_axis(pi, cap, full, axis=1)
    total = pi.sum(axis=1, keepdims=True)
    return pi / total, full / total


def _steady(c: _Configurations, rounds: _Rounds, tail: _Tail, pi: Array, full: Array) -> Occupancy:
    """Return the means over the states; ``full`` is the probability that an arrival finds no free slot."""
    busy = pi[:, 1:].sum(axis=1, keepdims=True) + 1e-300
    queue_rate = c.rate * (1.0 / tail.ratio - 1.0) * 2.0 / (1.0 + c.cv2)
    queue = full / queue_rate
    f = _first_token(c, rounds, pi)
    stable = tail.stable & ((c.steps <= 1.0) | (c.rate * f.step_s < 1.0))
    ttft = queue + f.p_alone * f.alone_s + f.p_join * f.joined_s + full * f.late_s
    batch = _sum(pi[:, 1:] * (1.0 - c.steps / rounds.work), np.arange(1.0, pi.shape[1]))
    decode = batch / c.rate  # Little's law

    def steady(values: Array, otherwise: float = np.inf) -> Array:
        return np.where(stable, values, otherwise)[:, 0]

    return Occupancy(
        rate=c.rate[:, 0],
        tokens=c.tokens[:, 0],
        stable=stable[:, 0],
        rate_limit=tail.limit[:, 0],
        load=(c.rate / tail.limit)[:, 0],
        pi=np.where(stable, pi, np.nan),
        batch=steady(batch),
        batch_busy=steady(batch / busy),
        round_s=steady(_sum(pi[:, 1:], rounds.time) / busy),
        p_wait=steady(full, 1.0),
        queue_s=steady(queue),
        queue_rate=steady(queue_rate, 0.0),
        admission_s=steady(f.p_join * (f.boundary_s + f.budget_s)),
        ttft_s=steady(ttft),
        decode_s=steady(decode),
        tpot_s=steady(decode / c.tokens),
        e2e_s=steady(ttft + decode),
        first=FirstToken(*(steady(x, np.nan) for x in f)),
    )


def _first_token(c: _Configurations, rounds: _Rounds, pi: Array) -> FirstToken:
    r"""Return the parts of the time to first token, columns.

    An arrival that joins a running batch meets a round of mean S and variance :math:`r S E[t^2] / (1 - (r t)^2)`
    (Poisson prompts, one round's feeding the next), hence waits R and then takes part in a step of time X:

    .. math:: R = \frac{E[S^2]}{2 E[S]} = \frac{S}{2} + \frac{r E[t^2]}{2 (1 - (r t)^2)}, \qquad
              X = T + t_1 + 2 r R\, t_2

    (2 R is the mean round that holds a given instant, and 2 r R the others that arrive in it). A prompt of s > 1 steps
    has the budget for itself: X = s T + t, and prompts queue for it as in M/G/1, :math:`r E[X^2] / 2 (1 - r X)`. At the
    cap the wait ends with a round, so R drops out and a mean round's arrivals come along; with nobody in, the prompt
    starts at once.
    """
    joining = pi[:, 1:].copy()
    np.put_along_axis(joining, c.slots.astype(np.intp) - 1, 0.0, axis=1)
    p_join = joining.sum(axis=1, keepdims=True) + 1e-300
    feed = np.minimum(c.rate * c.further, 1.0 - 1e-9)
    boundary = _sum(joining, rounds.time / 2 + 0.5 * c.rate * c.square / (1.0 - feed**2)) / p_join
    bare = _sum(joining, rounds.bare) / p_join
    spread = np.maximum(_sum(joining * rounds.bare, rounds.bare) / p_join - bare**2, 0.0)
    prompt, further, square = (_sum(joining, x) / p_join for x in (c.prefill, c.further, c.square))
    long = c.steps > 1.0
    steps = np.maximum(c.steps, 1.0)
    step = steps * bare + prompt + np.where(long, 0.0, 2 * c.rate * boundary * further)
    prompt_var = np.maximum(square - prompt**2, 0.0)
    budget = 0.5 * c.rate * (step**2 + prompt_var) / np.maximum(1.0 - c.rate * step, 1e-12)
    alongside = np.where(long, 0.0, c.rate * _at_cap(c.further, c) * _at_cap(rounds.time, c))
    late = steps * _at_cap(rounds.bare, c) + _at_cap(c.prefill, c) + alongside
    cv2 = prompt_var / np.maximum(prompt**2, 1e-300)
    budget = np.where(long, budget, 0.0)
    return FirstToken(
        pi[:, :1], c.alone, p_join, boundary, budget, step, late, bare, prompt, further, spread, np.minimum(cv2, 1e6)
    )


def _sum(weights: Array, values: Array) -> Array:
    """Return the row sums of weights x values, (C, 1)."""
    return np.asarray(np.einsum("ck,ck->c", weights, np.broadcast_to(values, weights.shape))[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# What is read from it
# ---------------------------------------------------------------------------------------------------------------------


def wait_tail(state: Occupancy, time: ArrayLike) -> Array:
    r"""Return P(the wait for a slot exceeds ``time``), (C,), 1 where unstable [-].

    .. math:: P(W_q > x) = P(n \ge M)\, e^{-\theta x}, \qquad \theta = \frac{2}{1 + c^2} \Big(\frac{r}{\rho} - r\Big)

    Exact for exponential lengths (M/M/c beyond the cap); the factor of :math:`c^2` matches the mean wait.

    Source
    ------
    Kleinrock (1975), Queueing Systems I, section 3.5 and problem 5.
    """
    return np.asarray(state.p_wait * np.exp(-state.queue_rate * np.asarray(time, dtype=np.float64)))


def ttft_quantile(state: Occupancy, probability: float) -> Array:
    r"""Return the quantile of the time to first token, (C,), inf where unstable [s].

    .. math:: P(\mathrm{TTFT} > x) \approx p_0\, \bar G_0(x)
              + p_1 \sum_{i,j} q_i\, q_{ij} \int_0^1 \bar G_j(x - S_i u)\, du + p_w\, e^{-\theta (x - m)^+}

    over the three cases of :class:`FirstToken`: nobody in; a wait uniform over the running round :math:`S_i`, then a
    step :math:`T + t_1 + j t_2`; a wait for a slot with the exponential tail of :func:`wait_tail`, then a step of mean
    m. The running round held i = 0, 1, more prompts (Poisson, weighted by its length), and j = 0, 1, more arrive during
    it (Poisson). G are log-normal laws with the means and variances of those steps.

    Assumes
    -------
    An approximation (the shape of G is assumed); the tests say how near the simulated 99th percentile it comes.

    Raises
    ------
    InputError
        If the probability is not inside (0, 1).

    Source
    ------
    Derivation: mixture over what an arrival finds; the shapes within a case are assumed.

    Examples
    --------
    >>> state = occupancy(5.0, 100, np.full(64, 0.01), prefill_time=0.005, prefill_steps=1)
    >>> bool(ttft_quantile(state, 0.99)[0] > ttft_quantile(state, 0.5)[0])
    True
    """
    require(0.0 < probability < 1.0, "probability", "must lie inside (0, 1) [-]", probability)
    live, beyond = state.stable, 1.0 - probability
    tail, wait, rate, spans, laws = _first_token_tail(state)
    f = FirstToken(*(np.where(live, x, 1.0) for x in state.first))
    low = np.zeros_like(rate)
    high = f.late_s + np.log1p(1.0 / beyond) / rate * (wait > 0) + spans.sum(axis=0)
    high = high + sum(np.exp(centre + 9.0 * sigma).sum(axis=0) for centre, sigma in laws)
    for _ in range(30):  # halvings
        middle = (low + high) / 2
        above = tail(middle) > beyond
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.asarray(np.where(live, high, np.inf))


def ttft_tail(state: Occupancy, time: ArrayLike) -> Array:
    """Return P(the time to first token exceeds ``time``), (C,), 1 where unstable; what :func:`ttft_quantile` inverts.

    Examples
    --------
    >>> state = occupancy(5.0, 100, np.full(64, 0.01), prefill_time=0.005, prefill_steps=1)
    >>> bool(abs(ttft_tail(state, ttft_quantile(state, 0.99))[0] - 0.01) < 1e-6)
    True
    """
    tail, *_ = _first_token_tail(state)
    return np.where(state.stable, tail(np.broadcast_to(np.asarray(time, dtype=np.float64), state.rate.shape)), 1.0)


def _first_token_tail(
    state: Occupancy,
) -> tuple[Callable[[Array], Array], Array, Array, Array, tuple[_Law, _Law]]:
    """Return the tail by time, P(wait) and its rate, running rounds (J, C), laws of own steps alone and joining."""
    live = state.stable
    f = FirstToken(*(np.where(live, x, 1.0) for x in state.first))
    wait, rate = np.where(live, state.p_wait, 0.0), np.where(live, state.queue_rate, 1.0)
    alone = _log_normal(f.alone_s[None], (f.prompt_cv2 * f.prompt_s**2)[None])
    share, span, joined = _joined_laws(f, np.where(live, state.rate, 1.0))
    weight = f.p_join * share / span
    back = np.stack([np.zeros_like(span), span])

    def tail(x: Array) -> Array:
        p = f.p_alone * _beyond(x, alone)[0] + wait * np.exp(-rate * np.maximum(x - f.late_s, 0.0))
        up_to, before = _integral(x - back, joined)
        return np.asarray(p + (weight * (up_to - before)).sum(axis=0))

    return tail, wait, rate, span, (alone, joined)


_Law = tuple[Array, Array]  # mean and deviation of the logarithm


def _joined_laws(f: FirstToken, rate: Array) -> tuple[Array, Array, _Law]:
    """Return probability, running round and law of the own step of the cases a joining arrival may meet, (J, C)."""
    held = _poisson(rate * 2 * f.boundary_s / (1.0 + rate * f.further_s))
    spans = [
        np.maximum(f.bare_s, 1e-12) + (count > 0) * f.prompt_s + np.maximum(count - 1, 0) * f.further_s
        for _, count, _ in held
    ]
    total = sum(p * span for (p, _, _), span in zip(held, spans, strict=True))
    cases = []
    for (p, _, _), span in zip(held, spans, strict=True):
        for q, count, variance in _poisson(rate * span):
            mean = f.step_s - 2 * rate * f.boundary_s * f.further_s * (f.budget_s == 0) + count * f.further_s
            own = f.prompt_cv2 * (f.prompt_s**2 + count * f.further_s**2)
            spread = f.spread + own + variance * f.further_s**2 + f.budget_s**2
            cases.append((p * span / total * q, span, mean + f.budget_s, spread))
    share, span, mean, variance = (np.stack(rows) for rows in zip(*cases, strict=True))
    return share, span, _log_normal(mean, variance)


def _poisson(mean: Array) -> list[tuple[Array, Array, Array]]:
    """Return (probability, mean, variance) of a Poisson number given that it is 0, is 1, is more."""
    none = np.exp(-mean)
    one = mean * none
    more = np.maximum(1.0 - none - one, 1e-300)
    count = np.where(more > 1e-9, (mean - one) / more, 2.0)
    variance = np.where(more > 1e-9, (mean + mean**2 - one) / more - count**2, 0.0)
    zero = np.zeros_like(mean)
    return [(none, zero, zero), (one, zero + 1.0, zero), (more, count, np.maximum(variance, 0.0))]


def _integral(x: Array, law: _Law) -> Array:
    r"""Return :math:`\int_{-\infty}^x \bar G` but for a constant: x below 0, else E[min(Y, x)]."""
    centre, sigma = law
    z = (np.log(np.maximum(x, 1e-300)) - centre) / sigma
    return np.asarray(np.where(x > 0, x * ndtr(-z) + np.exp(centre + sigma**2 / 2) * ndtr(z - sigma), x))


def _log_normal(mean: Array, variance: Array) -> _Law:
    """Return mean and deviation of the logarithm for a mean and a variance."""
    mean = np.maximum(mean, 1e-12)  # a picosecond: where nothing is to be done the law is a point at 0
    sigma = np.sqrt(np.log1p(variance / mean**2)) + 1e-9
    return np.log(mean) - sigma**2 / 2, sigma


def _beyond(x: Array, law: _Law) -> Array:
    centre, sigma = law
    return np.asarray(ndtr((centre - np.log(np.maximum(x, np.finfo(float).tiny))) / sigma))


def by_round(pi: ArrayLike, round_time: ArrayLike) -> Array:
    r"""Return the share of rounds that run with k = 1..N sequences, what a draft-length schedule sees, (..., N) [-].

    .. math:: q(k) \propto \pi(k) / T(k)

    because pi weighs by time and a slow round counts once.

    Source
    ------
    Derivation: rounds are counted, not timed, so a state weighs by its share of time over its round.

    Examples
    --------
    >>> by_round([0.2, 0.4, 0.4], [0.01, 0.02]).round(3).tolist()
    [0.667, 0.333]
    """
    weight = np.asarray(pi, dtype=np.float64)[..., 1:] / np.asarray(round_time, dtype=np.float64)
    return np.asarray(weight / weight.sum(axis=-1, keepdims=True))


def mean_overshoot(mean: ArrayLike, variance: ArrayLike) -> Array:
    r"""Return the mean number of tokens a last round emits past the requested output [tokens].

    .. math:: o = \frac{1}{2}\Big(\frac{E[X^2]}{E[X]} - 1\Big)

    with X the tokens of a round. Exact in the limit of long outputs; 0 without speculation.

    Source
    ------
    Derivation: mean residual of a renewal process on the whole numbers, Feller (1968), volume I, section XIII.

    Examples
    --------
    >>> float(mean_overshoot(1.0, 0.0)), float(mean_overshoot(5.0, 0.0))
    (0.0, 2.0)
    """
    m = np.asarray(mean, dtype=np.float64)
    return np.asarray((np.asarray(variance, dtype=np.float64) / m + m - 1.0) / 2.0)


def mean_context(prompt: ArrayLike, output: ArrayLike) -> float:
    r"""Return the mean number of cached tokens of a sequence over the time it decodes [tokens].

    .. math:: \bar K = \frac{\sum_i d_i P_i + d_i (d_i - 1)/2}{\sum_i d_i}, \qquad d_i = \text{output}_i - 1

    Long outputs count more, because they are in the batch for longer.

    Raises
    ------
    InputError
        If nobody decodes: every output is a single token.

    Source
    ------
    Derivation: the j-th decode token of request i reads P_i + j - 1 cached ones; average over all decode tokens.

    Examples
    --------
    >>> mean_context([100], [101])
    149.5
    """
    p, d = np.asarray(prompt, dtype=np.float64), np.asarray(output, dtype=np.float64) - 1.0
    require(
        bool(np.all(d >= 0)) and float(d.sum()) > 0, "output", "must have tokens to decode (above 1) [tokens]", output
    )
    return float((d * p + d * (d - 1.0) / 2.0).sum() / d.sum())

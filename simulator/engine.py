r"""The engine of one replica: who is in the batch, how long a step takes, what each request gets.

The scheduler is that of vLLM v1 with first-come-first-served order, unless ``Limits.rules`` say otherwise. One step:

1. every running sequence whose prefill is complete decodes: it feeds its last token and gamma drafted ones;
   gamma follows the number of decoding sequences;
2. if the KV blocks do not suffice, the request admitted last is preempted (its blocks are freed, its prompt and the
   tokens it has emitted are computed again later) until they do;
3. what is left of the token budget goes to the prefill chunk that is under way, then to waiting requests in order, as
   long as a slot is free and the KV blocks of the whole prompt fit (they are reserved at admission; decoding grows on
   demand). No request is admitted in a step that preempts;
4. the step ends: a complete prefill emits one token (the first one, for a request that was never preempted), a decoding
   sequence emits the accepted drafts and one more, cut off at the requested output.

Requests that arrive during a step wait for its end. Hardware is unknown here: times come from a :class:`StepTable`.

Other rules (:class:`theory.specs.Rules`) change this, each by itself and together:

* *scheduled ahead*: who joins step n + 1 is decided when step n starts, from the requests that have arrived, and the
  slots and KV blocks that are free, by then; they get slot and blocks at once and compute nothing in step n. So a
  request waits for the running step and for the one already scheduled. The token budget of step n + 1 is reckoned with
  all that decode in step n or end their prefill in it, those that will end included. A sequence whose output is
  complete at the end of step n is taken out of step n + 1, with drafts or without; its slot and blocks serve what is
  decided at the start of step n + 1, which joins step n + 2. A step to which nobody was assigned is not run: the engine
  decides anew and starts at once, so an idle replica does not make its first request wait.
* *late stop*: the engine learns that an output is complete (a stop token) only when step n + 1, scheduled ahead, is
  under way. The sequence is computed in it once more, in vain, with all that the step costs: it counts for the number
  of sequences, for the draft length, for the context and the token budget, even where nobody else is left. It emits
  nothing, its client has its answer, its slot and blocks are free as above, and it pays its share of that step. In a
  step of prompts alone nobody is computed in vain.
* *separate prefill*: a step with prompts decodes nothing, and goes first whenever a prompt can run. After a preemption
  nobody is admitted before a sequence completes: else prompts would come back, overflow and go for ever.
* *output reserved*: a request is admitted when blocks for its prompt, output and longest draft are free, and holds them
  to its end. Nothing grows, nobody is preempted.
* *streamed by k*: the client sees its first token when the k-th is emitted (or the last, of fewer); nothing else
  changes.

Whatever the rules, no two steps in a row are without a token emitted but while a prompt is computed in chunks, and each
of these computes a token at least: the run stops with an error if more such steps follow than the longest request has
tokens. Requests of no prompt or no output are no requests: :class:`.Workload` refuses them by row.

Prompt tokens that are ``cached`` (:class:`.Workload`) need no computing: prefill starts behind them, attends to them
and pays no other time for them, also when it is repeated after a preemption. They take KV blocks of the request like
any other, and the memory of the cache they come from is none of the replica's.

Prompts whose ``blocks`` are named (:class:`.prefixes.PromptBlocks`) share them in the KV cache of a replica, as vLLM
does:

* a request that is admitted finds the blocks at the head of its prompt that are in the cache, up to the first that is
  not; prefill starts behind them. Its last prompt token is always computed, and a block is found whole or not at all;
* a block is in the cache from the step on in which it is computed, for those admitted later in that step as well. It
  takes memory once, however many requests hold it; of two that computed it apart, one copy is kept (as in SGLang);
* when nobody holds it any more it stays, until its memory is wanted: then the one goes first that was let go first,
  of one request the last of its prompt. What stays unheld counts as free. Tokens of the output are not found again.

Plain decoding jumps. Between two events (a completion, a prefill chunk, a preemption, an arrival that can be admitted)
the batch of n sequences does not change and every one gains a token a step, so k steps take

.. math:: T(k) = k (b + s K) + s n k (k - 1) / 2

with K cached tokens at their start. The jump goes to the nearest event: the least completion round of a heap; the first
step at which the free KV blocks run out, from the number of sequences at each offset within a block; the first step
that ends at or after the next arrival, the root of T(k) = d. Nothing is approximated: every event falls on the step on
which stepping would find it, and times differ from stepping by the rounding of sums only. (An arrival that coincides
with the end of a step to within that rounding is seen a step earlier or later.)

With drafts no two steps are alike: what each sequence gains is drawn by its own name and round, so that draws depend
neither on load nor on company. These steps are taken one by one, at the cost of one draw per sequence and step; total
context and completions are exact there too. Acceptance follows any law with a survival function: with U the number
drawn, a round accepts the greatest k up to gamma for which

.. math:: U \le P(A \ge k) = \prod_{j \le k} \alpha\, c_j

One probability for all or for each request is alpha, with c_j = 1; a law by position has alpha = 1 and the acceptance
of its position j, given that all before it were accepted, as c_j; a mixture draws the alpha of each request once, by
its name. A draft-length schedule that is 0 at some batches is stepped throughout.

The core is compiled by numba at the first call, and the result is kept on disk.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from theory.acceptance import BetaMixture
from theory.errors import refuse, require
from theory.specs import Limits
from theory.speculation import LengthLaw

from .workload import Workload

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Acceptance = float | FloatArray | LengthLaw  # one alpha_iid for all requests, one each, or a law for all [-]
_Function = TypeVar("_Function", bound=Callable[..., Any])


# Functions that run each step are compiled into their caller, those that run once a request or less are called: handing
# the state on costs more than a step, compiling everything in one piece takes three times as long. Nothing compiled
# here makes or keeps an array, so that counting references to them (`_nrt`) would only cost time, most of it.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "_nrt": False}


def _compiled(function: _Function) -> _Function:
    """Compile with numba, keep the result on disk; typed, which the decorator itself is not."""
    return cast(_Function, numba.njit(cache=True, **_OPTIONS)(function))


def _inlined(function: _Function) -> _Function:
    """Compile into each caller."""
    return cast(_Function, numba.njit(inline="always", **_OPTIONS)(function))


# ---------------------------------------------------------------------------------------------------------------------
# What goes in
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepTable:
    r"""The time of a step, affine in the context it reads.

    .. math:: T = b_{g,n} + s_{g,n} K + F(m_d + c) - F(m_d) + p \sum_i c_i (k_i + c_i / 2)

    with n decoding sequences that hold K cached tokens in all (before the step), draft length index g,
    :math:`m_d = n(\gamma_g + 1)` tokens of decoding and verifying, :math:`c = \sum c_i` prompt tokens in chunks
    :math:`c_i` behind :math:`k_i` cached ones. A decode entry :math:`b, s` is the whole round: drafting and verifying.
    F is the time of a step's matrix products and elementwise work as a function of its tokens, without attention, so
    that a prompt chunk that joins a decode step pays only for the tokens it adds. A step without decoding is n = 0,
    :math:`b_{g,0} + F(c) - F(0) + \ldots`; whatever it costs beyond F (host overhead) belongs into :math:`b_{g,0}`.
    A step with prompt tokens takes ``prefill_floor`` at least: it is launched kernel by kernel.

    Raises
    ------
    InputError
        If shapes do not match, a time is negative, not finite, or falls where it must rise.
    """

    draft_lengths: IntArray  # gamma of each row, ascending, (G,) [tokens]
    base: FloatArray  # b, (G, N + 1) for n = 0..N [s]
    slope: FloatArray  # s, (G, N + 1) [s per cached token]
    prefill_tokens: FloatArray  # grid of F, ascending from 0, (M,) [tokens]
    prefill_s: FloatArray  # F on that grid, non-decreasing; linear between, last slope kept beyond, (M,) [s]
    prefill_context_slope: float = 0.0  # p: attention of prompt tokens [s per token x cached token]
    provenance: str = ""  # measured / fitted / roofline / assumed, and from what
    prefill_floor: float = 0.0  # least time of a step with prompt tokens in it [s]

    def __post_init__(self) -> None:
        lengths = np.array(self.draft_lengths, dtype=np.int64)
        require(
            lengths.ndim == 1 and lengths.size > 0 and bool(np.all(np.diff(lengths) > 0)) and int(lengths[0]) >= 0,
            "draft_lengths",
            "must be ascending integers of at least 0 [tokens]",
            self.draft_lengths,
        )
        object.__setattr__(self, "draft_lengths", lengths)
        for name in ("base", "slope", "prefill_tokens", "prefill_s"):
            object.__setattr__(self, name, _seconds(name, getattr(self, name)))
        require(
            self.base.ndim == 2 and self.base.shape[0] == lengths.size and self.base.shape[1] >= 2,
            "base",
            f"must have one row per draft length ({lengths.size}) and a column per n = 0..N [s]",
            self.base.shape,
        )
        require(
            self.slope.shape == self.base.shape,
            "slope",
            f"must have the shape {self.base.shape} of `base`",
            self.slope.shape,
        )
        require(
            bool(np.all(self.base[:, 1:] > 0)),
            "base",
            "must be above 0 where a sequence decodes [s]",
            float(self.base[:, 1:].min()),
        )
        grid, times = self.prefill_tokens, self.prefill_s
        require(
            grid.ndim == 1 and grid.size >= 2 and grid[0] == 0 and bool(np.all(np.diff(grid) > 0)),
            "prefill_tokens",
            "must ascend from 0 and have at least two points [tokens]",
            self.prefill_tokens,
        )
        require(
            times.shape == grid.shape and bool(np.all(np.diff(times) >= 0)),
            "prefill_s",
            "must not fall, and have one time per grid point [s]",
            self.prefill_s,
            "More tokens never take less time; check the order of the grid.",
        )
        require(
            math.isfinite(self.prefill_context_slope) and self.prefill_context_slope >= 0,
            "prefill_context_slope",
            "must be finite and at least 0 [s/token^2]",
            self.prefill_context_slope,
        )
        require(
            math.isfinite(self.prefill_floor) and self.prefill_floor >= 0,
            "prefill_floor",
            "must be finite and at least 0 [s]",
            self.prefill_floor,
        )

    def round_time(self, batch: int, context: float, draft_length: int = 0) -> float:
        """Return the time of a round of ``batch`` sequences with ``context`` cached tokens each, no prefill [s]."""
        row = self.row(draft_length)
        return float(self.base[row, batch] + self.slope[row, batch] * batch * context)

    def prefill_time(
        self, tokens: FloatArray | float, cached: FloatArray | float = 0.0, decoding: FloatArray | float = 0.0
    ) -> Any:
        """Return what ``tokens`` prompt tokens add to a step that has ``decoding`` tokens already; broadcasts [s]."""
        chunk, before = np.asarray(tokens, dtype=np.float64), np.asarray(decoding, dtype=np.float64)
        attention = self.prefill_context_slope * chunk * (np.asarray(cached) + chunk / 2)
        return self._token_time(before + chunk) - self._token_time(before) + attention

    def _token_time(self, tokens: FloatArray) -> Any:
        """F: linear between the grid's points, its last slope kept beyond."""
        grid, times = self.prefill_tokens, self.prefill_s
        last = (times[-1] - times[-2]) / (grid[-1] - grid[-2])
        return np.interp(tokens, grid, times) + last * np.maximum(tokens - grid[-1], 0.0)

    def row(self, draft_length: int) -> int:
        """Return the row of ``draft_length``; refuse one that is not tabled.

        Raises
        ------
        InputError
            If that draft length is not tabled.
        """
        hit = np.flatnonzero(self.draft_lengths == draft_length)
        if hit.size == 0:
            refuse("draft_length", f"must be one of {self.draft_lengths.tolist()} [tokens]", draft_length)
        return int(hit[0])


def _seconds(name: str, values: object) -> FloatArray:
    array = np.array(values, dtype=np.float64, order="C")  # a copy: one compiled signature serves all inputs
    require(bool(np.all(np.isfinite(array)) and np.all(array >= 0)), name, "must be finite and at least 0", values)
    return array


# ---------------------------------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Records:
    """What happened to every request, in the order of the workload, and totals of the run.

    Times are nan for a refused request. ``accepted`` counts drafts the target accepted, also those that the cut at the
    requested output discards, so that accepted / drafted estimates the accepted fraction without bias.
    ``service_s`` shares each step among its sequences (decode part equally, prefill part by tokens): it sums to
    ``busy_s``.
    """

    arrival: FloatArray  # [s]
    admitted: FloatArray  # end of the wait in the queue: start of the first step it takes part in [s]
    first_token: FloatArray  # seen by the client [s]
    completion: FloatArray  # [s]
    prompt: IntArray  # [tokens]
    output: IntArray  # [tokens]
    rounds: IntArray  # decode rounds taken part in [-]
    drafted: IntArray  # [tokens]
    accepted: IntArray  # [tokens]
    preemptions: IntArray  # [-]
    found: IntArray  # prompt tokens that needed no computing when it was first admitted [tokens]
    service_s: FloatArray  # share of the replica's busy time [s]
    refused: NDArray[np.bool_]  # larger than the whole KV cache
    batch_s: FloatArray  # busy time with n sequences past their prefill, n = 0..max_num_seqs [s]
    busy_s: float  # time in steps [s]
    steps: int  # [-]
    end_s: float  # end of the last step [s]
    emitted: int  # tokens emitted over all requests [tokens]
    kv_peak_tokens: int  # largest number of tokens in reserved KV blocks of a replica [tokens]
    kv_tokens: int  # capacity of a replica, in whole blocks [tokens]
    clear_s: float  # last time before the last arrival at which nobody waited after a step began (-inf: none) [s]
    closed: bool  # fixed number of clients
    replicas: int = 1  # whose records these are; times and steps are summed over them [-]

    @property
    def decode_s(self) -> float:
        """Return the time integral of the number of decoding sequences [s]."""
        return float(self.batch_s @ np.arange(self.batch_s.size))


# ---------------------------------------------------------------------------------------------------------------------
# The front
# ---------------------------------------------------------------------------------------------------------------------


def simulate(
    workload: Workload,
    table: StepTable,
    limits: Limits,
    kv_tokens: int,
    schedule: int | Sequence[int] | IntArray = 0,
    alpha: Acceptance = 0.0,
    seed: int = 0,
    ids: IntArray | None = None,
    ready_s: float = 0.0,
) -> Records:
    """Run ``workload`` through one replica until every request is complete.

    Parameters
    ----------
    workload : Workload
        Arrival times [s], prompt and output lengths [tokens]. With ``clients`` > 0 arrival times are ignored: the first
        ``clients`` requests are sent after their ``pauses``, each later one its pause after a completion.
    table : StepTable
        Times of steps, up to at least ``limits.max_num_seqs`` sequences.
    limits : Limits
        ``max_num_seqs``, ``max_num_batched_tokens``, ``block_size`` and ``rules`` of the engine.
    kv_tokens : int
        KV capacity of the replica [tokens]; rounded down to whole blocks.
    schedule : int or sequence
        Draft length gamma, or gamma for n = 0..max_num_seqs decoding sequences [tokens]. Where n (gamma + 1) exceeds
        the token budget, the largest tabled length that fits is used.
    alpha : float, array or law
        Acceptance of a drafted token given its predecessors, one for all or one per request [-]; or a law of
        ``theory.acceptance`` (anything with a ``survival``) that all requests follow.
    seed : int
        Of the acceptances. Each is a function of (seed, id of the request, round), whatever the schedule does.
    ids : array, optional
        Names of the requests for that function; 0, 1, 2, ... if not given.
    ready_s : float
        When the replica can begin its first step: the end of loading its model. Who arrives before waits [s].

    Returns
    -------
    Records
        Per request and in total.

    Raises
    ------
    InputError
        If lengths are below 1, arrivals out of order, or table, schedule or acceptance do not match the limits.

    Examples
    --------
    >>> from simulator.workload import Workload
    >>> table = StepTable([0], [[0.0, 0.01, 0.012]], [[0.0, 0.0, 0.0]], [0, 1000], [0.0, 0.1])
    >>> run = simulate(Workload([0.0], [100], [11]), table, Limits(max_num_seqs=2), kv_tokens=10_000)
    >>> run.first_token.round(6).tolist(), run.completion.round(6).tolist()
    ([0.01], [0.11])
    """
    requests = _new_requests(workload, alpha, ids, seed)
    setting, times = _setting(workload, limits, kv_tokens, draft_rows(schedule, table, limits), seed, table)
    times = times._replace(by_position=_by_position(alpha, setting.longest))
    (start,) = ready_times(ready_s, 1)
    state = _new_state(requests, setting)
    state.clock[_NOW] = start
    _run(state, setting, times)
    return _records(state, setting, bool(workload.clients))


Routing = Literal["round-robin", "random", "least-outstanding"]
ROUTINGS: tuple[Routing, ...] = ("round-robin", "random", "least-outstanding")


def simulate_together(
    workload: Workload,
    table: StepTable,
    limits: Limits,
    kv_tokens: int,
    ready_s: FloatArray,
    routing: Routing,
    schedule: int | Sequence[int] | IntArray = 0,
    alpha: Acceptance = 0.0,
    seed: int = 0,
    ids: IntArray | None = None,
) -> list[tuple[IntArray, Records]]:
    """Run ``workload`` through equal replicas on one clock: for routing that looks at them, and for closed loops.

    A request is handed over when it is sent, to one of the replicas that are ready by then, to one of all if none is:
    by the first ``ROUTINGS`` in turn or by a draw, by the last to one with the fewest requests that it was given and
    has not completed, the first such in the order of ``ready_s``. What completes at that very time is complete.

    Others as :func:`simulate`, ``seed`` also of random routing.

    Parameters
    ----------
    ready_s : array
        When each replica is ready, not falling [s].
    routing : str
        One of ``ROUTINGS``.

    Returns
    -------
    list
        For each replica that was given a request: which ones, ascending, and their records.

    Raises
    ------
    InputError
        As :func:`simulate`; if ``routing`` is unknown or ``ready_s`` falls.

    Examples
    --------
    >>> from simulator.workload import Workload
    >>> table = StepTable([0], [[0.0, 0.01]], [[0.0, 0.0]], [0, 1000], [0.0, 0.1])
    >>> work, limits = Workload([0.0, 0.1, 0.2], [1, 1, 1], [100, 2, 2]), Limits(max_num_seqs=1)
    >>> [who.tolist() for who, _ in simulate_together(work, table, limits, 9999, np.zeros(2), "least-outstanding")]
    [[0], [1, 2]]
    """
    require(routing in ROUTINGS, "routing", f"must be one of {', '.join(ROUTINGS)}", routing)
    start = np.ascontiguousarray(ready_s, dtype=np.float64)
    require(start.ndim == 1 and bool(np.all(np.diff(start) >= 0)), "ready_s", "must not fall [s]", ready_s)
    requests = _new_requests(workload, alpha, ids, seed)
    setting, times = _setting(workload, limits, kv_tokens, draft_rows(schedule, table, limits), seed, table)
    times = times._replace(by_position=_by_position(alpha, setting.longest))
    door = _new_door(requests, setting, start, draws(routing, workload.requests, seed), ROUTINGS.index(routing))
    replicas = _new_state(requests, setting, start.shape)
    replicas.clock[:, _NOW] = start
    _run_together(door, replicas, setting, setting._replace(clients=0), times)
    replicas.clock[:, _CLEAR] = door.clear
    given = [(r, np.flatnonzero(door.home == r)) for r in range(start.size)]
    return [
        (who, _records(_replica(replicas, r, who), setting, bool(workload.clients))) for r, who in given if who.size
    ]


def draws(routing: Routing, count: int, seed: int) -> FloatArray:
    """Return what random routing decides by, one number in [0, 1) an arrival; nothing for the others [-]."""
    return np.random.default_rng(seed).random(count if routing == "random" else 0)


def ready_times(ready_s: float | FloatArray, replicas: int) -> FloatArray:
    """Return when each replica is ready, earliest first; one number stands for all [s].

    Raises
    ------
    InputError
        If the times are not one or one a replica, or one is negative or not finite.
    """
    given = np.atleast_1d(np.asarray(ready_s, dtype=np.float64))
    require(
        given.shape in ((1,), (replicas,)),
        "ready_s",
        f"must be one number or one per replica ({replicas}) [s]",
        ready_s,
    )
    require(
        bool(np.all(np.isfinite(given)) and np.all(given >= 0)), "ready_s", "must be finite and at least 0 [s]", ready_s
    )
    return np.sort(np.broadcast_to(given, (replicas,)))


def _setting(
    workload: Workload, limits: Limits, kv_tokens: int, rows: IntArray, seed: int, table: StepTable
) -> tuple[_Setting, _Times]:
    require(
        table.base.shape[1] > limits.max_num_seqs,
        "table",
        f"must reach `max_num_seqs` = {limits.max_num_seqs} sequences",
        table.base.shape[1] - 1,
    )
    piece = 0 if workload.blocks is None else workload.blocks.tokens
    require(
        piece % limits.block_size == 0,
        "blocks.tokens",
        f"must be a multiple of `block_size` = {limits.block_size} [tokens]",
        piece,
        "The engine shares whole KV blocks.",
    )
    blocks = int(kv_tokens) // limits.block_size
    require(blocks > 0, "kv_tokens", f"must hold at least one block of {limits.block_size} [tokens]", kv_tokens)
    times = _Times(
        rows,
        table.draft_lengths,
        table.base,
        table.slope,
        table.prefill_tokens,
        table.prefill_s,
        table._token_time(np.arange(min(limits.max_num_batched_tokens, _TABLED) + 1.0)),
        float(table.prefill_context_slope),
        float(table.prefill_floor),
        np.zeros(1),
    )
    setting = _Setting(
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        limits.block_size,
        blocks,
        int(workload.clients),
        np.array(workload.pauses) if workload.clients else np.zeros(1),  # a copy: see _seconds
        _key(seed),
        int(table.draft_lengths[rows].max()),
        bool(limits.rules.schedule_ahead),
        limits.rules.mixed_prefill,
        limits.rules.reserve_output,
        limits.rules.late_stop,
        int(limits.rules.stream_interval),
        int((workload.prompt + workload.output).max()),
        piece,
        piece // limits.block_size,
    )
    return setting, times


def is_compiled() -> bool:
    """Return whether a compiled engine lies on disk; if not, the first run compiles it (some fifteen seconds)."""
    folder = Path(os.environ.get("NUMBA_CACHE_DIR", Path(__file__).parent))
    return any(folder.rglob("engine._run-*.nbi"))


def draft_rows(schedule: int | Sequence[int] | IntArray, table: StepTable, limits: Limits) -> IntArray:
    """Return the table row used with n = 0..max_num_seqs decoding sequences, the token budget heeded.

    Raises
    ------
    InputError
        If the schedule is neither one length nor one for each n, or the budget holds no tabled length.

    Examples
    --------
    >>> table = StepTable([0, 4], [[0, 1.0], [0, 1.5]], [[0, 0], [0, 0]], [0, 1], [0, 1])
    >>> draft_rows(4, table, Limits(max_num_seqs=1)).tolist()
    [1, 1]
    """
    size = limits.max_num_seqs + 1
    lengths = np.asarray(schedule, dtype=np.int64)
    require(
        lengths.ndim == 0 or (lengths.ndim == 1 and lengths.size >= size),
        "schedule",
        f"must be one draft length or one for each n = 0..{limits.max_num_seqs} [tokens]",
        lengths.shape,
    )
    lengths = np.broadcast_to(lengths, (size,)) if lengths.ndim == 0 else lengths[:size]
    for length in np.unique(lengths):
        table.row(int(length))
    room = limits.max_num_batched_tokens // np.maximum(np.arange(size), 1) - 1  # largest gamma the budget admits
    rows = np.searchsorted(table.draft_lengths, np.minimum(lengths, room), side="right") - 1
    require(
        bool(np.all(rows >= 0)),
        "max_num_batched_tokens",
        f"must hold `max_num_seqs` x (gamma + 1) for the shortest tabled gamma = {table.draft_lengths[0]} [tokens]",
        limits.max_num_batched_tokens,
    )
    return np.ascontiguousarray(rows, dtype=np.int64)


def _requests(workload: Workload) -> tuple[FloatArray, IntArray, IntArray]:
    arrival = np.asarray(workload.arrival, dtype=np.float64)
    arrival = np.zeros_like(arrival) if workload.clients else arrival
    prompt = np.ascontiguousarray(workload.prompt, dtype=np.int64)
    output = np.ascontiguousarray(workload.output, dtype=np.int64)
    require(
        arrival.ndim == 1 and arrival.shape == prompt.shape == output.shape,
        "workload",
        "must have one arrival, prompt and output per request",
        (arrival.shape, prompt.shape, output.shape),
    )
    require(arrival.size > 0, "workload", "must have at least one request", 0)
    require(bool(np.all(prompt >= 1)), "prompt", "must be at least 1 [tokens]", int(prompt.min()))
    require(bool(np.all(output >= 1)), "output", "must be at least 1 [tokens]", int(output.min()))
    require(
        bool(np.all(np.isfinite(arrival)) and np.all(np.diff(arrival) >= 0)),
        "arrival",
        "must be finite and not fall [s]",
        arrival,
        "Sort the requests by arrival.",
    )
    return arrival, prompt, output


def acceptance_of(alpha: Acceptance, rows: NDArray[np.intp]) -> Acceptance:
    """Return the acceptance of some of the requests: their part of an array, or what holds for all."""
    return alpha[rows] if isinstance(alpha, np.ndarray) and alpha.ndim > 0 else alpha


def _key(seed: int) -> np.uint64:
    return np.uint64(_mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF)))


def _by_position(alpha: Acceptance, longest: int) -> FloatArray:
    """Return c_k for k = 0..longest: of the law by position, or 1 where alpha says it all."""
    if isinstance(alpha, BetaMixture) or not hasattr(alpha, "survival"):
        return np.ones(longest + 1)
    tail = np.asarray(alpha.survival(longest), dtype=np.float64)
    given = np.ones(longest + 1)
    np.divide(tail[1:], tail[:-1], out=given[1:], where=tail[:-1] > 0)  # beyond a certain rejection nothing matters
    return given


def _alphas(alpha: Acceptance, names: IntArray, seed: int) -> FloatArray:
    """Return alpha, one for all requests or one each."""
    if isinstance(alpha, BetaMixture):
        # a number of each request that no round draws: rounds count from 0
        mix: Any = getattr(_mix, "py_func", _mix)  # plain numpy: all requests at once
        bits = mix(mix(_key(seed) ^ names.astype(np.uint64)) ^ np.uint64(0xFFFFFFFFFFFFFFFF))
        alpha = alpha.quantile(((bits >> np.uint64(12)) + 0.5) / 2**52)
    elif hasattr(alpha, "survival"):
        return np.ones(1)
    chance = np.array(alpha, dtype=np.float64, ndmin=1)
    require(
        chance.shape in ((1,), names.shape), "alpha", f"must be one number or one per request ({names.size}) [-]", alpha
    )
    require(
        bool(np.all((chance >= 0) & (chance <= 1))),
        "alpha",
        "must lie in [0, 1] [-]",
        alpha,
        "It is a probability per drafted token: pass 0.8, not 80.",
    )
    return np.ascontiguousarray(chance)


def _new_requests(workload: Workload, alpha: Acceptance, ids: IntArray | None, seed: int) -> _Requests:
    arrival, prompt, output = _requests(workload)
    count = arrival.size
    names = np.arange(count, dtype=np.int64) if ids is None else np.ascontiguousarray(ids, dtype=np.int64)
    require(names.shape == (count,), "ids", f"must name each of the {count} requests", names.shape)
    cached = np.zeros(1, dtype=np.int64) if workload.cached is None else np.array(workload.cached)
    # two blocks instead of a dozen arrays: a large one comes in huge pages, small ones in a page fault every 4 kB
    times, counts = np.zeros((5, count)), np.zeros((9, count), dtype=np.int64)
    times[0] = arrival
    times[1:4] = np.nan
    counts[0] = counts[7] = prompt
    counts[1] = output
    counts[2] = names
    columns: dict[str, Any] = dict(zip(_TIMES + _COUNTS, [*times, *counts], strict=True))
    each = _alphas(alpha, names, seed)
    named: dict[str, Any] = dict(zip(("block", "first", "reusable"), _named_blocks(workload), strict=True))
    return _Requests(**columns, **named, alpha=each, cached=cached, refused=np.zeros(count, dtype=np.bool_))


def _named_blocks(workload: Workload) -> tuple[IntArray, IntArray, IntArray]:
    """Return the names of all prompt blocks as 0, 1, ...; where each request's begin; how many it may find."""
    if workload.blocks is None:
        return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    _, names = np.unique(np.append(workload.blocks.names, 0), return_inverse=True)  # one at least: never empty
    return names.astype(np.int64), workload.blocks.starts, workload.blocks.reusable(workload.prompt)


_TIMES = ("arrival", "admitted", "first_token", "completion", "service_s")
_COUNTS = ("prompt", "output", "id", "rounds", "drafted", "accepted", "preemptions", "target", "found")


def _new_state(requests: _Requests, setting: _Setting, replicas: tuple[int, ...] = ()) -> _State:
    """Return the state of an idle replica, or of many in arrays with a dimension more."""
    count, slots = requests.arrival.size, setting.slots

    def zeros(*shape: int, dtype: Any = np.int64) -> Any:
        return np.zeros((*replicas, *shape), dtype=dtype)

    names = int(requests.block.max()) + 1
    prefix = zeros(names + 1, dtype=_PREFIX)
    prefix["users"], prefix["older"], prefix["newer"] = -1, names, names
    return _State(
        requests,
        slot=zeros(slots, dtype=_SLOT),
        free=zeros(slots) + np.arange(slots),
        order=zeros(slots),
        chunked=zeros(slots),
        vain=zeros(slots),
        heap=zeros(slots),
        offsets=zeros(setting.block),
        prefix=prefix,
        waiting=zeros(count),
        pending=zeros(count if setting.clients else 1),
        counter=zeros(_COUNTERS),
        clock=zeros(_CLOCKS, dtype=np.float64),
        batch_s=zeros(slots + 1, dtype=np.float64),
    )


def _new_door(requests: _Requests, setting: _Setting, ready: FloatArray, draw: FloatArray, routing: int) -> _Door:
    replicas = ready.size
    return _Door(
        _new_state(requests, setting),
        ready,
        draw,
        routing,
        home=np.full(requests.arrival.size, -1, dtype=np.int64),
        load=np.zeros(replicas, dtype=np.int64),
        running=np.zeros(replicas, dtype=np.bool_),
        due=np.full(replicas, np.inf),
        batch=np.zeros(replicas, dtype=np.int64),
        steps=np.zeros(replicas, dtype=np.int64),
        clear=np.full(replicas, -np.inf),
    )


def _replica(states: _State, replica: int, who: IntArray) -> _State:
    """Return the state of one of the replicas, with its requests alone."""
    shared = states.request
    own = {name: getattr(shared, name)[who] for name in _PER_REQUEST}
    return _State(shared._replace(**own), *(getattr(states, name)[replica] for name in _State._fields[1:]))


def _records(state: _State, setting: _Setting, closed: bool) -> Records:
    blocks = setting.blocks
    assert bool(np.all(state.request.refused | np.isfinite(state.request.completion)))
    assert int(state.counter[_KV_PEAK]) <= blocks
    assert not state.counter[[_RUNNING, _DECODING, _WAITING, _USED, _CONTEXT, _HEAPED, _VAIN]].any()
    assert not state.offsets.any()
    return Records(
        **{name: getattr(state.request, name) for name in _PER_REQUEST},
        batch_s=state.batch_s,
        busy_s=float(state.batch_s.sum()),
        steps=int(state.counter[_STEPS] + state.counter[_APART]),
        end_s=float(state.clock[_NOW]),
        emitted=int(state.counter[_EMITTED]),
        kv_peak_tokens=int(state.counter[_KV_PEAK]) * setting.block,
        kv_tokens=blocks * setting.block,
        clear_s=float(state.clock[_CLEAR]),
        closed=closed,
    )


_PER_REQUEST = (
    *("arrival", "admitted", "first_token", "completion", "prompt", "output"),
    *("rounds", "drafted", "accepted", "preemptions", "found", "service_s", "refused"),
)


# ---------------------------------------------------------------------------------------------------------------------
# The compiled core: what it holds
# ---------------------------------------------------------------------------------------------------------------------


class _Setting(NamedTuple):
    slots: int  # max_num_seqs
    budget: int  # max_num_batched_tokens
    block: int  # tokens per KV block
    blocks: int  # KV blocks
    clients: int  # 0: open loop
    pause: FloatArray  # before each request of a closed loop [s]
    key: np.uint64  # of the acceptances
    longest: int  # greatest draft length of the schedule; 0: plain decoding, which jumps
    ahead: bool  # who joins a step is fixed when the one before it starts
    mixed: bool  # prompts join decode steps
    whole: bool  # KV blocks are reserved to the last token at admission
    late: bool  # who completes in a step is computed in the next one too
    stream: int  # the client sees the first token with this one
    patience: int  # steps in a row that may emit nothing
    piece: int  # tokens of a named prompt block; 0: there are none
    unit: int  # KV blocks of one


class _Times(NamedTuple):
    row: IntArray  # row of the table for n decoding sequences
    gamma: IntArray
    base: FloatArray
    slope: FloatArray
    grid: FloatArray
    token_s: FloatArray
    small_s: FloatArray  # F at 0, 1, 2, ... tokens, as far as _TABLED
    pair_s: float
    floor: float  # of a step with prompt tokens [s]
    by_position: FloatArray  # c_k, k = 0 .. greatest draft length: acceptance of the k-th draft over alpha [-]


_TABLED = 1 << 15  # tokens of a step up to which F is looked up instead of searched for


class _Requests(NamedTuple):
    """The fields of Records, and what a request keeps while it waits."""

    arrival: FloatArray
    prompt: IntArray
    output: IntArray
    alpha: FloatArray  # acceptance of a draft, one for all or one each [-]
    cached: IntArray  # prompt tokens that need no computing, one for all or one each
    block: IntArray  # names of prompt blocks, 0, 1, ..., request after request
    first: IntArray  # place of the first one of each request
    reusable: IntArray  # how many each request may find in the KV cache
    id: IntArray
    admitted: FloatArray
    first_token: FloatArray
    completion: FloatArray
    rounds: IntArray
    drafted: IntArray
    accepted: IntArray
    preemptions: IntArray
    service_s: FloatArray
    refused: NDArray[np.bool_]
    target: IntArray  # tokens that must be in the KV cache before it decodes: its prompt and all it has emitted
    found: IntArray


class _State(NamedTuple):
    request: _Requests
    slot: NDArray[np.void]  # one _SLOT for each running sequence
    free: IntArray  # slots; the first slots - running of them are free
    order: IntArray  # slots in order of admission; those that decode stand at the front
    chunked: IntArray  # slots with a prefill chunk in this step
    vain: IntArray  # requests that completed in the step before and are computed in this one all the same
    heap: IntArray  # decoding slots by completion step, see `_entry`; plain decoding only
    offsets: IntArray  # decoding sequences whose KV blocks are full at steps of that remainder; plain decoding only
    prefix: NDArray[np.void]  # one _PREFIX for each name of a prompt block, and the ends of the line of unheld ones
    waiting: IntArray  # ring of requests; preempted ones go to its head
    pending: IntArray  # closed loop: requests that are known but have not arrived, by arrival
    counter: IntArray
    clock: FloatArray
    batch_s: FloatArray


class _Door(NamedTuple):
    """What stands before the replicas of a tier: arrivals, who gets them, and what each replica is about."""

    lobby: _State  # its arrivals to come and its count of the requests done; nothing else of it is used
    ready: FloatArray  # when each replica has its model, not falling [s]
    draw: FloatArray  # of random routing, one an arrival
    routing: int  # place in ROUTINGS
    home: IntArray  # replica of each request
    load: IntArray  # requests given to each replica and not complete
    running: NDArray[np.bool_]  # within a step, or steps without an event; else between two, or idle
    due: FloatArray  # when that ends; else when its next step begins, inf: idle [s]
    batch: IntArray  # sequences that decode in the steps under way
    steps: IntArray  # how many they are
    clear: FloatArray  # `_CLEAR` of each replica as its last arrival found it [s]


# A running sequence. Where it decodes, origin + steps so far = tokens in its KV cache, which rises by itself when a
# round accepts nothing; likewise born + its rounds = steps so far.
_SLOT = np.dtype(
    [
        ("request", np.int64),
        ("turn", np.int64),  # of its admission among all
        ("held", np.int64),  # tokens that its KV blocks take; of plain decoding only until it decodes
        ("computed", np.int64),  # prefill: tokens in the KV cache
        ("chunk", np.int64),  # prefill: tokens computed in this step
        ("shared", np.int64),  # named blocks of its prompt that it holds
        ("origin", np.int64),
        ("start", np.int64),  # `origin` when it began to decode: it has risen by the drafts accepted since
        ("born", np.int64),
        ("goal", np.int64),  # tokens in the KV cache when the output is complete
        ("drafted", np.int64),  # `_GAMMAS` when it began to decode
        ("seen", np.int64),  # tokens in the KV cache when the client sees the first one; 0: it has
        ("share", np.float64),  # `_SHARE` when it began to decode
        ("alpha", np.float64),
        ("name", np.uint64),  # of its draws
    ]
)
# A named prompt block. Unheld ones stand in line, linked both ways: the last place of the array is before the oldest
# and behind the newest.
_PREFIX = np.dtype(
    [
        ("users", np.int64),  # requests that hold it; 0: it is in the cache all the same, -1: it is not
        ("older", np.int64),
        ("newer", np.int64),
    ]
)
# places in `counter`
_RUNNING, _DECODING, _HEAPED, _HEAD, _WAITING, _NEXT, _KNOWN, _DONE = range(8)
_USED, _KV_PEAK, _STEPS, _CHUNKED, _CONTEXT, _GAMMAS, _TURN, _EMITTED = range(8, 16)
# `_STEPS` are those that decode where prompts may join them; `_APART` those of prompts alone where they may not;
# `_DUE` is the step with which the next client sees its first token; `_QUIET` counts steps that emit nothing; `_VAIN`
# sequences are computed in vain in this step, with `_VAIN_CONTEXT` tokens in the KV cache; `_UNHELD` KV blocks are free
# but hold named prompt blocks
_APART, _HALTED, _DUE, _QUIET, _VAIN, _VAIN_CONTEXT, _UNHELD, _COUNTERS = range(16, 24)
# places in `clock`; a sequence that decodes from one value of `_SHARE` to another has used their difference of time
_NOW, _CLEAR, _SHARE, _CLOCKS = range(4)


# ---------------------------------------------------------------------------------------------------------------------
# Draws, times, blocks
# ---------------------------------------------------------------------------------------------------------------------


@_compiled
def _mix(x: np.uint64) -> np.uint64:
    """SplitMix64 (Steele, Lea & Flood 2014, doi:10.1145/2714064.2660195): a bijection that scatters bits."""
    x = np.uint64(x + np.uint64(0x9E3779B97F4A7C15))
    x = np.uint64((x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9))
    x = np.uint64((x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB))
    return np.uint64(x ^ (x >> np.uint64(31)))


@_inlined
def _uniform(name: np.uint64, turn: int) -> float:
    """A number in (0, 1) that depends on nothing but the name of a request and the number of its round."""
    bits = _mix(name ^ np.uint64(turn))
    return (float(bits >> np.uint64(12)) + 0.5) / 4503599627370496.0  # 2^52: both ends stay open


@_inlined
def _accepted(alpha: float, by_position: FloatArray, gamma: int, u: float) -> int:
    """Drafts accepted in a round: the k <= gamma with u <= P(A >= k), the product of what each position accepts."""
    run = 0
    tail = 1.0
    for k in range(1, gamma + 1):  # all: it never rises, and a loop that stops is guessed wrong by the processor
        tail *= alpha * by_position[k]
        run += u <= tail
    return run


@_inlined
def _token_time(t: _Times, tokens: int) -> float:
    """F by linear interpolation, its last slope kept beyond the grid."""
    if tokens < t.small_s.size:
        return float(t.small_s[tokens])
    grid, times = t.grid, t.token_s
    high = min(max(int(np.searchsorted(grid, float(tokens))), 1), grid.size - 1)
    share = (tokens - grid[high - 1]) / (grid[high] - grid[high - 1])
    return float(times[high - 1] + share * (times[high] - times[high - 1]))


@_inlined
def _decode_time(s: _State, t: _Times, n: int, steps: int) -> float:
    """T(k) of n > 0 decoding sequences that gain a token a step [s]."""
    row = t.row[n]
    slope = t.slope[row, n]
    first = t.base[row, n] + slope * s.counter[_CONTEXT]
    return float(steps * first + slope * n * (0.5 * steps * (steps - 1)))


@_inlined
def _needed(tokens: int, block: int) -> int:
    return (tokens + block - 1) // block


@_inlined
def _cached(s: _State, j: int) -> int:
    """Tokens in the KV cache of a decoding sequence."""
    return int(s.slot[j].origin + s.counter[_STEPS])


@_inlined
def _blocks_held(s: _State, p: _Setting, j: int, decoding: bool) -> int:
    if decoding and p.longest == 0 and not p.whole:
        return _needed(_cached(s, j), p.block)
    return int(s.slot[j].held // p.block)


@_inlined
def _full_at(s: _State, p: _Setting, j: int) -> int:
    """Remainder of the steps before which the KV blocks of a plainly decoding sequence are full."""
    return int(-s.slot[j].origin % p.block)


# ---------------------------------------------------------------------------------------------------------------------
# Prompt blocks that are shared
# ---------------------------------------------------------------------------------------------------------------------


@_compiled
def _hold_prefix(s: _State, p: _Setting, j: int, most: int) -> None:
    """Slot j holds the first ``most`` named blocks of its prompt; what others hold too takes no memory twice."""
    first = s.request.first[s.slot[j].request]
    while s.slot[j].shared < most:
        name = s.request.block[first + s.slot[j].shared]
        users = s.prefix[name].users
        if users == 0:
            _take_out(s, name)
            s.counter[_UNHELD] -= p.unit
        elif users > 0:
            s.counter[_USED] -= p.unit
        s.prefix[name].users = max(users, 0) + 1
        s.slot[j].shared += 1


@_compiled
def _let_go(s: _State, p: _Setting, j: int) -> None:
    """Slot j, whose blocks have all been counted as free, holds its named ones no more; others may."""
    first, end = s.request.first[s.slot[j].request], s.prefix.size - 1
    while s.slot[j].shared > 0:
        s.slot[j].shared -= 1
        name = s.request.block[first + s.slot[j].shared]
        s.prefix[name].users -= 1
        if s.prefix[name].users > 0:
            s.counter[_USED] += p.unit
            continue
        newest = s.prefix[end].older
        s.prefix[name].older, s.prefix[name].newer = newest, end
        s.prefix[newest].newer = s.prefix[end].older = name
        s.counter[_UNHELD] += p.unit


@_inlined
def _take_out(s: _State, name: int) -> None:
    """Take a block out of the line of unheld ones."""
    older, newer = s.prefix[name].older, s.prefix[name].newer
    s.prefix[older].newer = newer
    s.prefix[newer].older = older


@_compiled
def _forget(s: _State, p: _Setting) -> None:
    """Unheld blocks give way to held ones, the oldest first."""
    while s.counter[_USED] + s.counter[_UNHELD] > p.blocks:
        name = s.prefix[s.prefix.size - 1].newer
        _take_out(s, name)
        s.prefix[name].users = -1
        s.counter[_UNHELD] -= p.unit


@_compiled
def _found(s: _State, i: int) -> tuple[int, int]:
    """Named blocks at the head of a prompt that are in the cache, and how many of them somebody holds."""
    found = held = 0
    while found < s.request.reusable[i]:
        users = s.prefix[s.request.block[s.request.first[i] + found]].users
        if users < 0:
            break
        found += 1
        held += users > 0
    return found, held


# ---------------------------------------------------------------------------------------------------------------------
# The heap of completions
# ---------------------------------------------------------------------------------------------------------------------


# An entry is completion step * 2^32 + slot: one comparison, and nothing to look up. Places are unsigned, because numba
# lets a signed one count from the end and asks for its sign at each use.


@_inlined
def _entry(s: _State, j: int) -> int:
    return int(((s.slot[j].goal - s.slot[j].origin) << 32) | j)


@_inlined
def _rise(s: _State, place: np.uint64, entry: int) -> None:
    """Put an entry into the gap at ``place``, or higher."""
    one = np.uint64(1)
    while place > np.uint64(0):
        parent = (place - one) >> one
        if s.heap[parent] <= entry:
            break
        s.heap[place] = s.heap[parent]
        place = parent
    s.heap[place] = entry


@_inlined
def _push(s: _State, j: int) -> None:
    s.counter[_HEAPED] += 1
    _rise(s, np.uint64(s.counter[_HEAPED] - 1), _entry(s, j))


@_inlined
def _remove(s: _State, place: int) -> None:
    """Take out the entry at ``place`` of the heap: the gap sinks to the bottom, and the last entry rises from there."""
    one = np.uint64(1)
    s.counter[_HEAPED] -= 1
    size = np.uint64(s.counter[_HEAPED])
    gap = np.uint64(place)
    child = gap + gap + one
    while child < size:
        if child + one < size and s.heap[child + one] < s.heap[child]:
            child += one
        s.heap[gap] = s.heap[child]
        gap, child = child, child + child + one
    if gap < size:
        _rise(s, gap, s.heap[size])


# ---------------------------------------------------------------------------------------------------------------------
# Coming and going
# ---------------------------------------------------------------------------------------------------------------------


@_inlined
def _pending(s: _State, p: _Setting, place: int) -> int:
    """The request that arrives at that place; in an open loop they arrive in order."""
    return int(s.pending[place]) if p.clients > 0 else place


@_compiled
def _send(s: _State, request: int, at: float) -> None:
    """A request of a closed loop becomes known: it will arrive at ``at``; ties keep the order of sending."""
    s.request.arrival[request] = at
    place = s.counter[_KNOWN]
    while place > s.counter[_NEXT] and s.request.arrival[s.pending[place - 1]] > at:
        s.pending[place] = s.pending[place - 1]
        place -= 1
    s.pending[place] = request
    s.counter[_KNOWN] += 1


@_inlined
def _finish(s: _State, p: _Setting, now: float) -> None:
    """A request is done with; in a closed loop its client sends the next one."""
    s.counter[_DONE] += 1
    if p.clients > 0 and s.counter[_KNOWN] < s.request.arrival.size:
        _send(s, s.counter[_KNOWN], now + p.pause[s.counter[_KNOWN]])


@_inlined
def _at_most(s: _State, p: _Setting, i: int) -> int:
    """Tokens that a request may hold in the KV cache, look-ahead included."""
    r = s.request
    return int(r.prompt[i] + (r.output[i] - 1 + p.longest if r.output[i] > 1 else 0))


@_inlined
def _too_large(s: _State, p: _Setting, i: int) -> bool:
    """Whether the whole cache could not hold the request."""
    return bool(_needed(_at_most(s, p, i), p.block) > p.blocks)


@_inlined
def _blocks_at_admission(s: _State, p: _Setting, i: int) -> int:
    """KV blocks that a request holds when it is admitted, shared ones included."""
    return _needed(_at_most(s, p, i) if p.whole else s.request.target[i], p.block)


@_inlined
def _queue(s: _State, i: int) -> None:
    place = s.counter[_HEAD] + s.counter[_WAITING]
    s.waiting[place if place < s.waiting.size else place - s.waiting.size] = i
    s.counter[_WAITING] += 1


@_compiled
def _arrive(s: _State, p: _Setting) -> None:
    """Requests that have arrived by now join the queue; those larger than the whole cache are refused."""
    r = s.request
    while s.counter[_NEXT] < s.counter[_KNOWN]:
        i = _pending(s, p, s.counter[_NEXT])
        if r.arrival[i] > s.clock[_NOW]:
            break
        s.counter[_NEXT] += 1
        if _too_large(s, p, i):
            r.refused[i] = True
            _finish(s, p, r.arrival[i])
            continue
        _queue(s, i)


@_compiled
def _admit_head(s: _State, p: _Setting) -> int:
    """The head of the queue gets a slot and blocks; return the slot."""
    i = s.waiting[s.counter[_HEAD]]
    blocks = _blocks_at_admission(s, p, i)
    s.counter[_HEAD] = s.counter[_HEAD] + 1 if s.counter[_HEAD] + 1 < s.waiting.size else 0
    s.counter[_WAITING] -= 1
    j = s.free[p.slots - 1 - s.counter[_RUNNING]]
    s.order[s.counter[_RUNNING]] = j
    s.counter[_RUNNING] += 1
    s.counter[_TURN] += 1
    s.counter[_USED] += blocks
    s.slot[j].request = i
    s.slot[j].turn = s.counter[_TURN]
    s.slot[j].held = blocks * p.block
    s.slot[j].computed = s.request.cached[min(i, s.request.cached.size - 1)]
    s.slot[j].chunk = 0
    s.slot[j].shared = 0
    if p.piece > 0:
        found, _ = _found(s, i)
        _hold_prefix(s, p, j, found)
        _forget(s, p)
        s.slot[j].computed = max(s.slot[j].computed, found * p.piece)
    if s.slot[j].computed > 0 and s.request.preemptions[i] == 0:
        s.request.found[i] = s.slot[j].computed
    return int(j)


@_compiled
def _join(s: _State, p: _Setting, j: int) -> None:
    """The prefill of slot j is complete: it decodes from the next step on."""
    i, steps = s.slot[j].request, s.counter[_STEPS]
    r = s.request
    s.slot[j].origin = r.target[i] - steps
    s.slot[j].start = s.slot[j].origin
    s.slot[j].goal = r.prompt[i] + r.output[i] - 1
    s.slot[j].born = steps - r.rounds[i]
    s.slot[j].drafted = s.counter[_GAMMAS]
    s.slot[j].share = s.clock[_SHARE]
    s.slot[j].seen = 0
    if math.isnan(r.first_token[i]):
        s.slot[j].seen = r.prompt[i] + min(p.stream, r.output[i]) - 1
        s.counter[_DUE] = min(s.counter[_DUE], s.slot[j].seen - s.slot[j].origin)
    s.counter[_CONTEXT] += r.target[i]
    s.counter[_DECODING] += 1
    if p.longest == 0:
        s.offsets[_full_at(s, p, j)] += 1
        _push(s, j)
    else:
        s.slot[j].name = _mix(p.key ^ np.uint64(r.id[i]))
        s.slot[j].alpha = r.alpha[min(i, r.alpha.size - 1)]


@_inlined
def _leave(s: _State, p: _Setting, j: int) -> None:
    """A decoding sequence leaves its slot, complete or preempted: book what it did."""
    i = s.slot[j].request
    r = s.request
    r.rounds[i] = s.counter[_STEPS] - s.slot[j].born
    r.drafted[i] += s.counter[_GAMMAS] - s.slot[j].drafted
    r.accepted[i] += s.slot[j].origin - s.slot[j].start
    r.service_s[i] += s.clock[_SHARE] - s.slot[j].share
    s.counter[_CONTEXT] -= _cached(s, j)
    s.counter[_DECODING] -= 1
    if p.longest == 0:
        s.offsets[_full_at(s, p, j)] -= 1


@_inlined
def _release(s: _State, p: _Setting, j: int) -> None:
    """Give slot j back; it must have left ``order`` or stand last in it."""
    s.counter[_RUNNING] -= 1
    s.free[p.slots - 1 - s.counter[_RUNNING]] = j


@_compiled
def _close_gap(s: _State, j: int) -> None:
    """Take slot j out of ``order``, which ascends in turns."""
    one, turn = np.uint64(1), s.slot[j].turn
    low, high = np.uint64(0), np.uint64(s.counter[_RUNNING] - 1)
    while low < high:
        middle = (low + high) >> one
        if s.slot[np.uint64(s.order[middle])].turn < turn:
            low = middle + one
        else:
            high = middle
    for place in range(low, np.uint64(s.counter[_RUNNING] - 1)):
        s.order[place] = s.order[place + one]


@_compiled
def _complete(s: _State, p: _Setting, j: int, decoding: bool) -> None:
    """The request of slot j has all its output; ``order`` is the caller's business."""
    i = s.slot[j].request
    s.counter[_USED] -= _blocks_held(s, p, j, decoding)
    if p.piece > 0:
        _let_go(s, p, j)
    if p.late:
        s.vain[s.counter[_VAIN]] = i
        s.counter[_VAIN] += 1
        s.counter[_VAIN_CONTEXT] += _cached(s, j) if decoding else s.slot[j].computed
    if decoding:
        _leave(s, p, j)
    _release(s, p, j)
    s.request.completion[i] = s.clock[_NOW]
    s.counter[_HALTED] = 0
    s.counter[_EMITTED] += s.request.output[i]
    _finish(s, p, s.clock[_NOW])


@_compiled
def _preempt_last(s: _State, p: _Setting) -> None:
    """Free the blocks of the request admitted last and put it at the head of the queue, to be computed again."""
    j = s.order[s.counter[_RUNNING] - 1]
    i = s.slot[j].request
    decoding = s.counter[_RUNNING] == s.counter[_DECODING]
    s.counter[_USED] -= _blocks_held(s, p, j, decoding)
    if p.piece > 0:
        _let_go(s, p, j)
    if decoding:
        s.request.target[i] = _cached(s, j) + 1  # the token it would have fed next is emitted, not cached
        if p.longest == 0:
            place, entry = 0, _entry(s, j)
            while s.heap[place] != entry:
                place += 1
            _remove(s, place)
        _leave(s, p, j)
    _release(s, p, j)
    s.request.preemptions[i] += 1
    s.counter[_HEAD] = (s.counter[_HEAD] - 1) % s.waiting.size
    s.waiting[s.counter[_HEAD]] = i
    s.counter[_WAITING] += 1


# ---------------------------------------------------------------------------------------------------------------------
# One step, and many
# ---------------------------------------------------------------------------------------------------------------------


@_inlined
def _draft_length(s: _State, t: _Times, n: int) -> int:
    """Draft length of this step, by all sequences that are computed in it, n of them not in vain."""
    return int(t.gamma[t.row[n + s.counter[_VAIN]]])


@_inlined
def _decode_tokens(s: _State, t: _Times, n: int) -> int:
    """Tokens of this step that are no prompt: one of each sequence and its drafts."""
    return int((n + s.counter[_VAIN]) * (_draft_length(s, t, n) + 1))


@_inlined
def _growth(s: _State, p: _Setting, t: _Times) -> int:
    """Blocks that this step must add, gamma look-ahead slots included."""
    if p.longest == 0:
        return int(s.offsets[s.counter[_STEPS] % p.block])
    n = s.counter[_DECODING]
    ahead = s.counter[_STEPS] + 1 + _draft_length(s, t, n)
    blocks = 0
    for place in range(n):
        j = s.order[place]
        short = s.slot[j].origin + ahead - s.slot[j].held
        if short > 0:
            blocks += _needed(short, p.block)
    return blocks


@_compiled
def _hold(s: _State, p: _Setting, t: _Times) -> None:
    """Reserve the blocks of :func:`_growth` and note who holds them; plain decoding knows without."""
    n = s.counter[_DECODING]
    ahead = s.counter[_STEPS] + 1 + _draft_length(s, t, n)
    blocks = 0
    for place in range(n):
        j = np.uint64(s.order[place])
        short = s.slot[j].origin + ahead - s.slot[j].held
        if short > 0:
            more = _needed(short, p.block)
            s.slot[j].held += more * p.block
            blocks += more
    s.counter[_USED] += blocks


@_inlined
def _grow(s: _State, p: _Setting, t: _Times) -> bool:
    """Reserve the blocks of this step; preempt until they fit. True: preempted."""
    preempted = False
    if p.whole:
        return preempted
    n = s.counter[_DECODING]
    most = n * _needed(1 + _draft_length(s, t, n), p.block)
    if p.longest == 0 or s.counter[_USED] + most > p.blocks:  # else it fits
        while s.counter[_USED] + _growth(s, p, t) > p.blocks:
            _preempt_last(s, p)
            preempted = True
    if p.longest == 0:
        s.counter[_USED] += _growth(s, p, t)
    else:
        _hold(s, p, t)
    if s.counter[_UNHELD] > 0:
        _forget(s, p)
    return preempted


@_inlined
def _take_chunk(s: _State, p: _Setting, j: int, budget: int) -> int:
    """Give slot j up to ``budget`` tokens of prefill in this step; return what is left of the budget."""
    i = s.slot[j].request
    s.slot[j].chunk = min(budget, s.request.target[i] - s.slot[j].computed)
    if p.piece > 0:
        _hold_prefix(s, p, j, min(s.request.reusable[i], (s.slot[j].computed + s.slot[j].chunk) // p.piece))
    s.chunked[s.counter[_CHUNKED]] = j
    s.counter[_CHUNKED] += 1
    if math.isnan(s.request.admitted[i]):
        s.request.admitted[i] = s.clock[_NOW]
    return int(budget - s.slot[j].chunk)


@_inlined
def _admissible(s: _State, p: _Setting) -> bool:
    """Whether slot and KV blocks are free for the head of the queue."""
    if s.counter[_WAITING] == 0 or s.counter[_RUNNING] == p.slots:
        return False
    i = s.waiting[s.counter[_HEAD]]
    more = _blocks_at_admission(s, p, i)
    if p.piece > 0:
        more -= _found(s, i)[1] * p.unit
    return bool(s.counter[_USED] + more <= p.blocks)


@_inlined
def _prefill(s: _State, p: _Setting, budget: int, admit: bool) -> None:
    """Spend the budget on prefill under way in the order of admission, then on waiting requests in order."""
    s.counter[_CHUNKED] = 0
    place = s.counter[_DECODING]
    while budget > 0 and place < s.counter[_RUNNING]:
        budget = _take_chunk(s, p, s.order[place], budget)
        place += 1
    while admit and budget > 0 and _admissible(s, p):
        budget = _take_chunk(s, p, _admit_head(s, p), budget)


@_compiled
def _schedule_next(s: _State, p: _Setting, t: _Times) -> None:
    """Admit those that will join the step after this one, as far as its token budget will reach."""
    n = s.counter[_DECODING]
    budget = p.budget
    for place in range(s.counter[_DECODING], s.counter[_RUNNING]):
        left = s.request.target[s.slot[s.order[place]].request] - s.slot[s.order[place]].computed
        left -= s.slot[s.order[place]].chunk
        budget -= left
        n += left == 0
    if p.mixed:
        budget -= n * (t.gamma[t.row[n]] + 1)
    while budget > 0 and _admissible(s, p):
        j = _admit_head(s, p)
        budget -= s.request.target[s.slot[j].request] - s.slot[j].computed


@_compiled
def _prompts_first(s: _State, p: _Setting) -> bool:
    """Whether this is a step of prompts alone: one is under way, or can start now."""
    if s.counter[_RUNNING] > s.counter[_DECODING]:
        return True
    now = not p.ahead or s.counter[_DECODING] + s.counter[_VAIN] == 0
    return bool(now and s.counter[_HALTED] == 0 and _admissible(s, p))


@_inlined
def _steps_that_fit(s: _State, p: _Setting, n: int, most: int) -> int:
    """Steps, ``most`` at most, before the KV blocks run out; this one has its blocks already."""
    free = p.blocks - s.counter[_USED]
    if p.whole or n * _needed(most - 1, p.block) <= free:
        return most
    later = (free // n) * p.block  # in `block` steps each of the n sequences takes one block
    free -= (free // n) * n
    at = (s.counter[_STEPS] + 1 + later) % p.block
    while later < most - 1:
        free -= s.offsets[at]
        if free < 0:
            break
        later += 1
        at = at + 1 if at + 1 < p.block else 0
    return int(min(later + 1, most))


@_inlined
def _steps_until(s: _State, t: _Times, n: int, most: int, at: float) -> int:
    """The first step, ``most`` at most, that ends at or after ``at``: the root of T(k) = d, put right by T itself."""
    now = s.clock[_NOW]
    if now + _decode_time(s, t, n, most) <= at:
        return most
    row = t.row[n]
    half = 0.5 * t.slope[row, n] * n
    linear = t.base[row, n] + t.slope[row, n] * s.counter[_CONTEXT] - half  # above 0: every sequence has its prompt
    root = 2.0 * (at - now) / (linear + math.sqrt(linear * linear + 4.0 * half * (at - now)))
    steps = min(max(int(root), 1), most)
    while steps > 1 and now + _decode_time(s, t, n, steps - 1) >= at:
        steps -= 1
    while steps < most and now + _decode_time(s, t, n, steps) < at:
        steps += 1
    return int(steps)


@_inlined
def _steps_to_event(s: _State, p: _Setting, t: _Times, n: int) -> int:
    """Steps in which nothing changes but the context, for plain decoding without a prefill chunk."""
    steps = _steps_that_fit(s, p, n, (s.heap[0] >> 32) - s.counter[_STEPS])
    # who arrives behind others cannot be admitted before an event; but a closed loop answers a refusal at once
    if s.counter[_NEXT] < s.counter[_KNOWN] and (s.counter[_WAITING] == 0 or p.clients > 0):
        steps = _steps_until(s, t, n, steps, s.request.arrival[_pending(s, p, s.counter[_NEXT])])
    return steps


@_inlined
def _reserve_ahead(s: _State, p: _Setting, n: int, steps: int) -> None:
    """Count the blocks that ``steps`` more steps of plain decoding take."""
    if p.whole:
        return
    rounds = steps // p.block
    blocks = rounds * n
    at = (s.counter[_STEPS] + 1) % p.block
    for _ in range(steps - rounds * p.block):
        blocks += s.offsets[at]
        at = at + 1 if at + 1 < p.block else 0  # a division here would cost more than all else in a jump
    s.counter[_USED] += blocks
    if s.counter[_UNHELD] > 0:
        _forget(s, p)


@_inlined
def _prefill_time(s: _State, t: _Times, n: int) -> tuple[float, int]:
    """What the chunks of this step add to its time [s], and their tokens."""
    tokens = 0
    pairs = 0.0
    for place in range(s.counter[_CHUNKED]):
        j = s.chunked[place]
        tokens += s.slot[j].chunk
        pairs += s.slot[j].chunk * (s.slot[j].computed + 0.5 * s.slot[j].chunk)
    if tokens == 0:
        return 0.0, 0
    before = _decode_tokens(s, t, n)
    added = _token_time(t, before + tokens) - _token_time(t, before)
    return added + t.pair_s * pairs, tokens


@_inlined
def _step_times(s: _State, t: _Times, n: int, steps: int) -> tuple[float, float, int]:
    """The time of decoding and of prefill in the steps [s], and prompt tokens."""
    all_ = n + s.counter[_VAIN]
    decode = _decode_time(s, t, all_, steps) if all_ > 0 else t.base[t.row[0], 0]
    if all_ > n:
        decode += t.slope[t.row[all_], all_] * s.counter[_VAIN_CONTEXT]
    prefill, tokens = _prefill_time(s, t, n)
    return float(decode), float(max(prefill, t.floor - decode) if tokens > 0 else 0.0), tokens


@_inlined
def _pass_time(s: _State, t: _Times, n: int, steps: int) -> None:
    """Advance the clock and share the time among those who took part."""
    decode, prefill, tokens = _step_times(s, t, n, steps)
    all_ = n + s.counter[_VAIN]
    if tokens > 0:
        share = (prefill if all_ > 0 else prefill + decode) / tokens
        for place in range(s.counter[_CHUNKED]):
            j = s.chunked[place]
            s.request.service_s[s.slot[j].request] += share * s.slot[j].chunk
    for place in range(s.counter[_VAIN]):
        s.request.service_s[s.vain[place]] += decode / all_
    if n > 0:
        s.clock[_SHARE] += decode / all_
    elif s.counter[_DECODING] == 0:
        s.clock[_SHARE] = 0.0  # from 0 when nobody holds a value: no rounding
    s.batch_s[s.counter[_DECODING]] += decode + prefill
    s.clock[_NOW] += decode + prefill


@_compiled
def _deliver(s: _State, t: _Times, n: int, steps: int, began: float) -> None:
    """Plain decoding in blocks of the stream: clients see their first token within the steps just passed."""
    next_due = np.iinfo(np.int64).max
    for place in range(n):
        j = s.order[place]
        if s.slot[j].seen == 0:
            continue
        due = s.slot[j].seen - s.slot[j].origin - s.counter[_STEPS]
        if due > steps:
            next_due = min(next_due, s.counter[_STEPS] + due)
            continue
        at = s.clock[_NOW] if due == steps else began + _decode_time(s, t, n, due)
        s.request.first_token[s.slot[j].request] = at
        s.slot[j].seen = 0
    s.counter[_DUE] = next_due


@_inlined
def _complete_due(s: _State, p: _Setting) -> None:
    """Plain decoding: those whose completion step this is leave."""
    while s.counter[_HEAPED] > 0:
        if s.heap[0] >> 32 > s.counter[_STEPS]:
            break
        j = s.heap[0] & 0xFFFFFFFF
        _remove(s, 0)
        _close_gap(s, j)
        _complete(s, p, j, True)


@_inlined
def _strike_due(s: _State) -> bool:
    """Plain decoding: strike off those whose completion step this is; whether there are any."""
    before = s.counter[_HEAPED]
    while s.counter[_HEAPED] > 0:
        if s.heap[0] >> 32 > s.counter[_STEPS]:
            break
        _remove(s, 0)
    return bool(s.counter[_HEAPED] < before)


@_inlined
def _draw(s: _State, p: _Setting, t: _Times, n: int, gamma: int) -> None:
    """Every decoding sequence gains the drafts it accepts in this step; the complete ones leave."""
    steps, kept = s.counter[_STEPS], 0
    running = s.counter[_RUNNING]
    for place in range(n):
        j = np.uint64(s.order[place])
        if gamma > 0:
            u = _uniform(s.slot[j].name, steps - 1 - s.slot[j].born)
            gain = _accepted(s.slot[j].alpha, t.by_position, gamma, u)
            s.slot[j].origin += gain
            s.counter[_CONTEXT] += gain
        if s.slot[j].seen > 0 and s.slot[j].origin + steps >= s.slot[j].seen:
            s.request.first_token[s.slot[j].request] = s.clock[_NOW]
            s.slot[j].seen = 0
        if s.slot[j].origin + steps >= s.slot[j].goal:
            _complete(s, p, s.order[place], True)
        else:
            s.order[kept] = s.order[place]
            kept += 1
    if kept < n:
        for place in range(n, running):
            s.order[kept + place - n] = s.order[place]


@_inlined
def _end_chunks(s: _State, p: _Setting) -> None:
    """Complete prefills emit a token, then decode or are done."""
    r = s.request
    for place in range(s.counter[_CHUNKED]):
        j = s.chunked[place]
        i = s.slot[j].request
        s.slot[j].computed += s.slot[j].chunk
        s.slot[j].chunk = 0
        if s.slot[j].computed < r.target[i]:
            break  # the budget ended here
        s.counter[_QUIET] = 0
        emitted = r.target[i] - r.prompt[i] + 1
        if emitted >= min(p.stream, r.output[i]) and math.isnan(r.first_token[i]):
            r.first_token[i] = s.clock[_NOW]
        if r.target[i] >= r.prompt[i] + r.output[i] - 1:
            _close_gap(s, j)
            _complete(s, p, j, False)
        else:
            _join(s, p, j)


@_inlined
def _advance(s: _State, p: _Setting, t: _Times, n: int, steps: int) -> None:
    """Let ``steps`` steps of n decoding sequences pass, the chunks of a single one included."""
    gamma = _draft_length(s, t, n)
    began = s.clock[_NOW]
    if s.counter[_WAITING] == 0 and s.counter[_NEXT] < s.request.arrival.size:
        s.clock[_CLEAR] = began + _decode_time(s, t, n, steps - 1)
    if steps > 1:
        _reserve_ahead(s, p, n, steps - 1)
    s.counter[_KV_PEAK] = max(s.counter[_KV_PEAK], s.counter[_USED])
    _pass_time(s, t, n, steps)
    s.counter[_VAIN] = s.counter[_VAIN_CONTEXT] = 0
    s.counter[_QUIET] = 0 if n > 0 else s.counter[_QUIET] + 1
    if n == 0 and not p.mixed:
        s.counter[_APART] += 1
    else:
        if p.longest == 0 and p.stream > 1 and s.counter[_DUE] <= s.counter[_STEPS] + steps:
            _deliver(s, t, n, steps, began)
        s.counter[_STEPS] += steps
        s.counter[_CONTEXT] += n * steps
        s.counter[_GAMMAS] += gamma * steps
        if p.longest == 0 and p.piece == 0:
            _complete_due(s, p)
        elif p.longest > 0 or _strike_due(s):  # named blocks are let go in the order of admission
            _draw(s, p, t, n, gamma)
    _end_chunks(s, p)
    if s.counter[_QUIET] > p.patience:
        raise RuntimeError("too many steps in which nobody gains a token: the scheduler is wrong")


@_inlined
def _begin(s: _State, p: _Setting, t: _Times) -> tuple[int, int]:
    """Begin a step; return who decodes in it, and how many steps like it pass before something happens."""
    apart = not p.mixed and _prompts_first(s, p)
    if apart:
        s.counter[_VAIN] = s.counter[_VAIN_CONTEXT] = 0
    preempted = False
    if not apart:
        preempted = _grow(s, p, t)
    if preempted and not p.mixed:
        s.counter[_HALTED] = 1
    n = 0 if apart else s.counter[_DECODING]
    admit = not preempted and s.counter[_HALTED] == 0
    now = admit and (p.mixed or apart) and (not p.ahead or s.counter[_RUNNING] + s.counter[_VAIN] == 0)
    _prefill(s, p, p.budget - _decode_tokens(s, t, n), now)
    if (
        n + s.counter[_VAIN] == 0 and s.counter[_CHUNKED] == 0
    ):  # not `assert`, which test runners rewrite and numba then refuses
        raise RuntimeError("a step in which nobody advances: the scheduler is wrong")
    if p.ahead and admit:
        _schedule_next(s, p, t)
    steps = 1
    joining = p.ahead and s.counter[_RUNNING] > s.counter[_DECODING]
    alone = s.counter[_CHUNKED] + s.counter[_VAIN] == 0 and not joining
    if p.longest == 0 and alone and not preempted:  # after a preemption the next step may admit
        steps = _steps_to_event(s, p, t, n)
    return n, steps


@_inlined
def _open(s: _State, p: _Setting) -> None:
    """Arrivals that are known from the start."""
    count = s.request.arrival.size
    if p.clients == 0:
        s.counter[_KNOWN] = count
    for i in range(min(p.clients, count)):
        _send(s, i, p.pause[i])


@_inlined
def _idle(s: _State) -> bool:
    """Whether there is nothing to compute."""
    return bool(s.counter[_RUNNING] + s.counter[_WAITING] + s.counter[_VAIN] == 0)


@_compiled
def _run(s: _State, p: _Setting, t: _Times) -> None:
    _open(s, p)
    s.clock[_CLEAR] = -np.inf
    while s.counter[_DONE] < s.request.arrival.size or s.counter[_VAIN] > 0:
        if _idle(s):
            s.clock[_NOW] = max(s.clock[_NOW], s.request.arrival[_pending(s, p, s.counter[_NEXT])])
            s.clock[_CLEAR] = s.clock[_NOW]
        _arrive(s, p)
        if not _idle(s):
            n, steps = _begin(s, p, t)
            _advance(s, p, t, n, steps)


# ---------------------------------------------------------------------------------------------------------------------
# Replicas together
# ---------------------------------------------------------------------------------------------------------------------

# What happens next is the least of: a step's end, an arrival, a step's beginning, in this order at equal times. A
# replica plans its jump when it begins it, knowing no arrival; one that is handed to it while nobody waits ends the
# jump with the step under way. So an event costs what it does with one replica, and a look at the due times of all.


@_inlined
def _one_of(all_: _State, r: int) -> _State:
    return _State(
        all_.request,
        all_.slot[r],
        all_.free[r],
        all_.order[r],
        all_.chunked[r],
        all_.vain[r],
        all_.heap[r],
        all_.offsets[r],
        all_.prefix[r],
        all_.waiting[r],
        all_.pending[r],
        all_.counter[r],
        all_.clock[r],
        all_.batch_s[r],
    )


@_inlined
def _due(s: _State, t: _Times, n: int, steps: int) -> float:
    """When the steps under way will have passed."""
    decode, prefill, _ = _step_times(s, t, n, steps)
    return float(s.clock[_NOW] + (decode + prefill))


@_inlined
def _soonest(d: _Door) -> int:
    """The replica whose step ends or begins next; ends go first."""
    r = 0
    for k in range(1, d.due.size):
        if d.due[k] < d.due[r] or (d.due[k] == d.due[r] and d.running[k] and not d.running[r]):
            r = k
    return r


@_inlined
def _choose(d: _Door, turn: int, at: float) -> int:
    """The replica that the arrival of that turn is handed to."""
    ready = 0
    while ready < d.ready.size and d.ready[ready] <= at:
        ready += 1
    among = ready if ready > 0 else d.ready.size
    if d.routing == 0:
        return turn % among
    if d.routing == 1:
        return int(d.draw[turn] * among)
    r = 0
    for k in range(1, among):
        if d.load[k] < d.load[r]:
            r = k
    return r


@_compiled
def _hand_over(d: _Door, s: _State, t: _Times, r: int, i: int, at: float) -> None:
    """Replica r gets request i: if nobody waits there, it will look at it after the step under way."""
    d.load[r] += 1
    if d.due[r] == np.inf:
        s.clock[_NOW] = max(s.clock[_NOW], at)
        d.due[r] = s.clock[_NOW]
    if s.counter[_WAITING] == 0:
        s.clock[_CLEAR] = s.clock[_NOW]
        if d.running[r]:
            n = d.batch[r]
            if d.steps[r] > 1:
                d.steps[r] = _steps_until(s, t, n, d.steps[r], at)
                d.due[r] = _due(s, t, n, d.steps[r])
            s.clock[_CLEAR] += _decode_time(s, t, n, d.steps[r] - 1)
    d.clear[r] = s.clock[_CLEAR]  # of all that it has been so far, the last one before an arrival counts
    _queue(s, i)


@_inlined
def _receive(d: _Door, all_: _State, p: _Setting, t: _Times) -> None:
    """The next arrival is refused or handed over."""
    turn = d.lobby.counter[_NEXT]
    i = _pending(d.lobby, p, turn)
    at = d.lobby.request.arrival[i]
    d.lobby.counter[_NEXT] += 1
    d.home[i] = _choose(d, turn, at)
    if _too_large(d.lobby, p, i):
        d.lobby.request.refused[i] = True
        _finish(d.lobby, p, at)
    else:
        _hand_over(d, _one_of(all_, d.home[i]), t, d.home[i], i, at)


@_inlined
def _end(d: _Door, s: _State, p: _Setting, outside: _Setting, t: _Times, r: int) -> None:
    """The steps under way at replica r have passed."""
    done = s.counter[_DONE]
    _advance(s, p, t, d.batch[r], d.steps[r])
    for _ in range(s.counter[_DONE] - done):
        d.load[r] -= 1
        _finish(d.lobby, outside, s.clock[_NOW])
    d.running[r] = False
    d.due[r] = np.inf if _idle(s) else s.clock[_NOW]


@_compiled
def _run_together(d: _Door, all_: _State, outside: _Setting, p: _Setting, t: _Times) -> None:
    """``outside`` has the clients; replicas know of none, nor of arrivals to come."""
    count = d.lobby.request.arrival.size
    lobby = d.lobby
    _open(lobby, outside)
    while True:
        at = np.inf
        if lobby.counter[_NEXT] < lobby.counter[_KNOWN]:
            at = lobby.request.arrival[_pending(lobby, outside, lobby.counter[_NEXT])]
        r = _soonest(d)
        if lobby.counter[_DONE] == count and d.due[r] == np.inf:
            return
        if at < d.due[r] or (at == d.due[r] and not d.running[r]):
            _receive(d, all_, outside, t)
            continue
        s = _one_of(all_, r)
        if d.running[r]:
            _end(d, s, p, outside, t, r)
        else:
            d.batch[r], d.steps[r] = _begin(s, p, t)
            d.due[r] = _due(s, t, d.batch[r], d.steps[r])
            d.running[r] = True

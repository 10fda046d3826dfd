"""The engine once more, to be obviously right: plain Python, one step at a time, every sequence looked at in each.

The rules are those at the head of ``simulator/engine.py``; nothing of it is used but the table it reads and the type of
its records.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simulator.engine import Records, StepTable, draft_rows
from simulator.workload import Workload
from theory.specs import Limits

WORD = 2**64


@dataclass
class Request:
    """What happens to one request."""

    index: int
    arrival: float
    prompt: int
    output: int
    log_alpha: float
    name: int  # of its draws
    admitted: float = math.nan
    first_token: float = math.nan
    completion: float = math.nan
    emitted: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    service_s: float = 0.0
    refused: bool = False
    target: int = 0  # tokens to compute before it decodes
    computed: int = 0  # tokens in the KV cache
    blocks: int = 0
    chunk: int = 0

    @property
    def decodes(self) -> bool:
        """Whether its prefill is complete."""
        return self.computed >= self.target


@dataclass
class Reference:
    """One replica."""

    work: Workload
    table: StepTable
    limits: Limits
    blocks: int
    rows: list[int]
    longest: int  # greatest draft length of the schedule
    coming: deque[Request] = field(default_factory=deque)  # known, by arrival
    unsent: deque[Request] = field(default_factory=deque)  # of a closed loop
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    now: float = 0.0
    clear_s: float = -math.inf
    steps: int = 0
    kv_peak: int = 0
    halted: bool = False  # nobody is admitted before a sequence completes
    closest: float = math.inf  # least distance of an arrival from the end of a step that it was not at exactly [s]

    def gamma(self, n: int) -> int:
        """Draft length with n decoding sequences."""
        return int(self.table.draft_lengths[self.rows[n]])

    def needed(self, tokens: int) -> int:
        """KV blocks of some tokens."""
        return -(-tokens // self.limits.block_size)

    def most(self, r: Request) -> int:
        """Tokens that a request may hold in the KV cache."""
        return r.prompt + (r.output - 1 + self.longest if r.output > 1 else 0)

    def need(self, r: Request) -> int:
        """KV blocks for which admission waits."""
        return self.needed(self.most(r) if self.limits.rules.reserve_output else r.target)

    def decoding(self) -> list[Request]:
        """Sequences that decode."""
        return [r for r in self.running if r.decodes]

    def send(self, request: Request, at: float) -> None:
        """A request becomes known; ties keep the order of sending."""
        request.arrival = at
        place = len(self.coming)
        while place > 0 and self.coming[place - 1].arrival > at:
            place -= 1
        self.coming.insert(place, request)

    def finish(self, at: float) -> None:
        """A client of a closed loop sends its next request."""
        if self.work.clients and self.unsent:
            self.send(self.unsent.popleft(), at + self.work.think_time)

    def arrive(self) -> None:
        """Requests join the queue, or are refused."""
        while self.coming:
            r = self.coming[0]
            if r.arrival != self.now:
                self.closest = min(self.closest, abs(r.arrival - self.now))
            if r.arrival > self.now:
                break
            self.coming.popleft()
            if self.needed(self.most(r)) > self.blocks:
                r.refused = True
                self.finish(r.arrival)
            else:
                r.target = r.prompt
                self.waiting.append(r)

    def used(self) -> int:
        """KV blocks held."""
        return sum(r.blocks for r in self.running)

    def grow(self) -> bool:
        """Reserve the blocks of this step; preempt until they fit."""
        preempted = False
        while True:
            decoding = self.decoding()
            ahead = 1 + self.gamma(len(decoding))
            wanted = {r.index: max(r.blocks, self.needed(r.computed + ahead)) for r in decoding}
            if sum(wanted.get(r.index, r.blocks) for r in self.running) <= self.blocks:
                break
            last = self.running.pop()
            last.blocks = last.computed = 0
            last.target = last.prompt + last.emitted
            last.preemptions += 1
            self.waiting.appendleft(last)
            preempted = True
        for r in decoding:
            r.blocks = wanted[r.index]
        return preempted

    def admissible(self) -> bool:
        """Whether there is room for the head of the queue."""
        if not self.waiting or len(self.running) == self.limits.max_num_seqs:
            return False
        return self.used() + self.need(self.waiting[0]) <= self.blocks

    def admit(self) -> Request:
        """The head of the queue gets a slot and blocks."""
        r = self.waiting.popleft()
        r.blocks = self.need(r)
        self.running.append(r)
        return r

    def chunks(self, budget: int, admit: bool) -> list[Request]:
        """Spend the budget on prefill: what is under way, then who waits."""
        chunked = []
        for r in self.running:
            if not r.decodes and budget > 0:
                chunked.append(r)
                r.chunk = min(budget, r.target - r.computed)
                budget -= r.chunk
        while admit and budget > 0 and self.admissible():
            r = self.admit()
            r.chunk = min(budget, r.target - r.computed)
            budget -= r.chunk
            chunked.append(r)
        for r in chunked:
            if math.isnan(r.admitted):
                r.admitted = self.now
        return chunked

    def decide_next(self) -> None:
        """Scheduled ahead: who joins the next step, by what is known as this one starts."""
        left = {r.index: r.target - r.computed - r.chunk for r in self.running if not r.decodes}
        n = len(self.running) - sum(tokens > 0 for tokens in left.values())
        decoding = n * (self.gamma(n) + 1) if self.limits.rules.mixed_prefill else 0
        budget = self.limits.max_num_batched_tokens - decoding - sum(left.values())
        while budget > 0 and self.admissible():
            r = self.admit()
            budget -= r.target - r.computed

    def duration(self, decoding: list[Request], chunked: list[Request]) -> tuple[float, float]:
        """Time of decoding and of prefill in this step [s]."""
        n, t = len(decoding), self.table
        row = self.rows[n]
        decode = float(t.base[row, n] + t.slope[row, n] * sum(r.computed for r in decoding))
        tokens = sum(r.chunk for r in chunked)
        pairs = sum(r.chunk * (r.computed + 0.5 * r.chunk) for r in chunked)
        prefill = float(t.prefill_time(tokens, 0.0, n * (self.gamma(n) + 1)))
        prefill += t.prefill_context_slope * (pairs - 0.5 * tokens * tokens)  # prefill_time takes them for one prompt
        return decode, max(decode + prefill, t.prefill_floor) - decode if tokens else 0.0

    def emit(self, r: Request, tokens: int) -> None:
        """A request emits tokens; the complete one leaves."""
        r.emitted = min(r.output, r.emitted + tokens)
        if r.emitted >= min(r.output, self.limits.rules.stream_interval) and math.isnan(r.first_token):
            r.first_token = self.now
        if r.emitted == r.output:
            r.completion = self.now
            self.halted = False
            r.blocks = 0
            self.running.remove(r)
            self.finish(self.now)

    def step(self, batch_s: list[float]) -> None:
        """One step."""
        rules, past = self.limits.rules, len(self.decoding())  # sequences past their prefill
        starting = self.admissible() and not self.halted and (not rules.schedule_ahead or past == 0)
        apart = not rules.mixed_prefill and (past < len(self.running) or starting)
        preempted = not apart and self.grow()
        self.halted = self.halted or (preempted and not rules.mixed_prefill)
        past = len(self.decoding())
        decoding = [] if apart else self.decoding()
        n = len(decoding)
        gamma = self.gamma(n)
        may = not preempted and not self.halted
        now = may and (rules.mixed_prefill or apart) and (not rules.schedule_ahead or not self.running)
        chunked = self.chunks(self.limits.max_num_batched_tokens - n * (gamma + 1), now)
        assert decoding or chunked
        if rules.schedule_ahead and may:
            self.decide_next()
        self.kv_peak = max(self.kv_peak, self.used())
        if not self.waiting and (self.coming or self.unsent):
            self.clear_s = self.now
        decode, prefill = self.duration(decoding, chunked)
        tokens = sum(r.chunk for r in chunked)
        for r in decoding:
            r.service_s += decode / n
        for r in chunked:
            r.service_s += (prefill if n else prefill + decode) * r.chunk / tokens
        self.now += decode + prefill
        batch_s[past] += decode + prefill
        self.steps += 1
        for r in decoding:
            hits = accepted(r, gamma)
            r.rounds += 1
            r.drafted += gamma
            r.accepted += hits
            r.computed += hits + 1
            self.emit(r, hits + 1)
        for r in chunked:
            r.computed += r.chunk
            r.chunk = 0
            if r.decodes:
                self.emit(r, 1)


def mix(x: int) -> int:
    """SplitMix64."""
    x = (x + 0x9E3779B97F4A7C15) % WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def accepted(r: Request, gamma: int) -> int:
    """Drafts accepted in the next round of r: the capped geometric law by inversion."""
    if r.log_alpha == -math.inf:
        return 0
    if r.log_alpha == 0.0:
        return gamma
    u = ((mix(r.name ^ r.rounds) >> 12) + 0.5) / 2**52
    return min(gamma, math.floor(math.log(u) / r.log_alpha))


def reference(
    work: Workload,
    table: StepTable,
    limits: Limits,
    kv_tokens: int,
    schedule: int | list[int] = 0,
    alpha: float = 0.0,
    seed: int = 0,
) -> tuple[Records, float]:
    """Return the records of a run, and how close an arrival came to the end of a step without being at it [s]."""
    log_alpha = math.log(alpha) if alpha > 0 else -math.inf
    rows = draft_rows(schedule, table, limits).tolist()
    key = mix(seed % WORD)
    requests = [
        Request(i, 0.0 if work.clients else float(at), int(prompt), int(output), log_alpha, mix(key ^ i))
        for i, (at, prompt, output) in enumerate(zip(work.arrival, work.prompt, work.output, strict=True))
    ]
    sent = work.clients or len(requests)
    longest = int(table.draft_lengths[rows].max())
    engine = Reference(work, table, limits, kv_tokens // limits.block_size, rows, longest)
    engine.coming, engine.unsent = deque(requests[:sent]), deque(requests[sent:])
    batch_s = [0.0] * (limits.max_num_seqs + 1)
    while engine.coming or engine.waiting or engine.running:
        if not engine.waiting and not engine.running:
            engine.now = max(engine.now, engine.coming[0].arrival)
            engine.clear_s = engine.now
        engine.arrive()
        if engine.waiting or engine.running:
            engine.step(batch_s)
    return records(engine, requests, np.array(batch_s)), engine.closest


PER_REQUEST = (
    *("arrival", "admitted", "first_token", "completion", "prompt", "output"),
    *("rounds", "drafted", "accepted", "preemptions", "service_s", "refused"),
)


def records(engine: Reference, requests: list[Request], batch_s: np.ndarray) -> Records:
    """Return what happened in the form of the engine's records."""
    block = engine.limits.block_size
    columns: dict[str, Any] = {name: np.array([getattr(r, name) for r in requests]) for name in PER_REQUEST}
    return Records(
        **columns,
        batch_s=batch_s,
        busy_s=float(batch_s.sum()),
        steps=engine.steps,
        end_s=engine.now,
        emitted=sum(r.emitted for r in requests),
        kv_peak_tokens=engine.kv_peak * block,
        kv_tokens=engine.blocks * block,
        clear_s=engine.clear_s,
        closed=bool(engine.work.clients),
    )

"""The engine once more, to be obviously right: plain Python, one step at a time, every sequence looked at in each.

The rules are those at the head of ``simulator/engine.py``; nothing of it is used but the table it reads and the type of
its records.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
from scipy.stats import beta

from simulator.engine import Records, StepTable, draft_rows
from simulator.workload import Workload
from theory.acceptance import BetaMixture, Iid
from theory.specs import Limits

WORD = 2**64


@dataclass
class Request:
    """What happens to one request."""

    index: int
    arrival: float
    prompt: int
    output: int
    tail: list[float]  # P(accepted >= k) for k = 0, 1, ...
    name: int  # of its draws
    cached: int = 0  # prompt tokens that need no computing
    names: list[int] = field(default_factory=list)  # of the blocks at its head that may be found in the cache
    shared: int = 0  # how many of them it holds
    found: int = 0  # tokens that needed no computing when it was first admitted
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
    unheld: list[int] = field(default_factory=list)  # names of prompt blocks in the cache, in the order of letting go
    coming: deque[Request] = field(default_factory=deque)  # known, by arrival
    unsent: deque[Request] = field(default_factory=deque)  # of a closed loop
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    vain: list[Request] = field(default_factory=list)  # completed in the step before, computed in this one too
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

    def too_large(self, r: Request) -> bool:
        """Whether a request would not fit alone."""
        return self.needed(self.most(r)) > self.blocks

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
            request = self.unsent.popleft()
            self.send(request, at + float(self.work.pauses[request.index]))

    def arrive(self) -> None:
        """Requests join the queue, or are refused."""
        while self.coming:
            r = self.coming[0]
            if r.arrival != self.now:
                self.closest = min(self.closest, abs(r.arrival - self.now))
            if r.arrival > self.now:
                break
            self.coming.popleft()
            if self.too_large(r):
                r.refused = True
                self.finish(r.arrival)
            else:
                r.target = r.prompt
                self.waiting.append(r)

    @property
    def piece(self) -> int:
        """Tokens of a named prompt block."""
        return self.work.blocks.tokens if self.work.blocks else 1

    @property
    def unit(self) -> int:
        """KV blocks of a named prompt block."""
        return self.piece // self.limits.block_size

    def held(self) -> list[int]:
        """Names of prompt blocks held, once for each request that holds them."""
        return [name for r in self.running for name in r.names[: r.shared]]

    def saved(self) -> int:
        """KV blocks that need not be there twice."""
        return self.unit * (len(self.held()) - len(set(self.held())))

    def used(self) -> int:
        """KV blocks held."""
        return sum(r.blocks for r in self.running) - self.saved()

    def found(self, r: Request) -> list[int]:
        """Names at the head of its prompt that are in the cache."""
        there = {*self.held(), *self.unheld}
        return list(takewhile(lambda name: name in there, r.names))

    def hold(self, r: Request, most: int) -> None:
        """A request holds its first named blocks."""
        r.shared = max(r.shared, most)
        self.unheld = [name for name in self.unheld if name not in r.names[: r.shared]]

    def let_go(self, r: Request) -> None:
        """A request that runs no more lets its named blocks go, the last one first."""
        self.unheld += [name for name in reversed(r.names[: r.shared]) if name not in self.held()]
        r.shared = 0

    def forget(self) -> None:
        """Unheld blocks give way."""
        while self.used() + self.unit * len(self.unheld) > self.blocks:
            self.unheld.pop(0)

    def grow(self) -> bool:
        """Reserve the blocks of this step; preempt until they fit."""
        preempted = False
        while True:
            decoding = self.decoding()
            ahead = 1 + self.gamma(len(decoding) + len(self.vain))
            wanted = {r.index: max(r.blocks, self.needed(r.computed + ahead)) for r in decoding}
            if sum(wanted.get(r.index, r.blocks) for r in self.running) - self.saved() <= self.blocks:
                break
            last = self.running.pop()
            self.let_go(last)
            last.blocks = last.computed = 0
            last.target = last.prompt + last.emitted
            last.preemptions += 1
            self.waiting.appendleft(last)
            preempted = True
        for r in decoding:
            r.blocks = wanted[r.index]
        self.forget()
        return preempted

    def admissible(self) -> bool:
        """Whether there is room for the head of the queue."""
        if not self.waiting or len(self.running) == self.limits.max_num_seqs:
            return False
        head = self.waiting[0]
        there = self.unit * sum(name in self.held() for name in self.found(head))
        return self.used() + self.need(head) - there <= self.blocks

    def admit(self) -> Request:
        """The head of the queue gets a slot and blocks."""
        r = self.waiting.popleft()
        r.blocks = self.need(r)
        found = len(self.found(r))
        self.running.append(r)
        self.hold(r, found)
        self.forget()
        r.computed = max(r.cached, self.piece * found)
        if r.preemptions == 0:
            r.found = r.computed
        return r

    def compute(self, r: Request, budget: int) -> int:
        """A request computes a part of its prompt in this step; return what is left of the budget."""
        r.chunk = min(budget, r.target - r.computed)
        self.hold(r, min(len(r.names), (r.computed + r.chunk) // self.piece))
        return budget - r.chunk

    def chunks(self, budget: int, admit: bool) -> list[Request]:
        """Spend the budget on prefill: what is under way, then who waits."""
        chunked = []
        for r in self.running:
            if not r.decodes and budget > 0:
                chunked.append(r)
                budget = self.compute(r, budget)
        while admit and budget > 0 and self.admissible():
            r = self.admit()
            budget = self.compute(r, budget)
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
        """Time of decoding (whether in vain or not) and of prefill in this step [s]."""
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
            if self.limits.rules.late_stop:
                self.vain.append(r)
            r.blocks = 0
            self.running.remove(r)
            self.let_go(r)
            self.finish(self.now)

    def step(self, batch_s: list[float]) -> None:
        """One step."""
        rules, past = self.limits.rules, len(self.decoding())  # sequences past their prefill
        starting = self.admissible() and not self.halted and (not rules.schedule_ahead or past + len(self.vain) == 0)
        apart = not rules.mixed_prefill and (past < len(self.running) or starting)
        preempted = not apart and self.grow()
        self.halted = self.halted or (preempted and not rules.mixed_prefill)
        past = len(self.decoding())
        decoding = [] if apart else self.decoding()
        vain, self.vain = [] if apart else self.vain, []
        computed = decoding + vain
        n = len(computed)
        gamma = self.gamma(n)
        may = not preempted and not self.halted
        now = may and (rules.mixed_prefill or apart) and (not rules.schedule_ahead or not self.running + vain)
        chunked = self.chunks(self.limits.max_num_batched_tokens - n * (gamma + 1), now)
        assert computed or chunked
        if rules.schedule_ahead and may:
            self.decide_next()
        self.kv_peak = max(self.kv_peak, self.used())
        if not self.waiting and (self.coming or self.unsent):
            self.clear_s = self.now
        decode, prefill = self.duration(computed, chunked)
        tokens = sum(r.chunk for r in chunked)
        for r in computed:
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


def uniform(name: int, turn: int) -> float:
    """A number in (0, 1)."""
    return ((mix(name ^ turn) >> 12) + 0.5) / 2**52


def accepted(r: Request, gamma: int) -> int:
    """Drafts accepted in the next round of r: the law of its accepted drafts by inversion."""
    u = uniform(r.name, r.rounds)
    return sum(u <= r.tail[k] for k in range(1, gamma + 1))


def all_requests(work: Workload, alpha: Any, seed: int, longest: int) -> list[Request]:
    """The requests of a workload; ``alpha`` is a number or a law."""
    key = mix(seed % WORD)
    cached = [0] * work.requests if work.cached is None else work.cached.tolist()
    ends = np.cumsum(work.blocks.counts) if work.blocks else np.zeros(work.requests)
    found = []
    for i, (at, prompt, output) in enumerate(zip(work.arrival, work.prompt, work.output, strict=True)):
        name = mix(key ^ i)
        law = alpha if hasattr(alpha, "survival") else Iid(alpha)
        if isinstance(law, BetaMixture):  # each request has its own alpha
            law = Iid(float(beta.ppf(uniform(name, WORD - 1), law.a, law.b)))
        tail = law.survival(longest).tolist()
        request = Request(i, 0.0 if work.clients else float(at), int(prompt), int(output), tail, name, cached[i])
        if work.blocks:
            named = work.blocks.names[ends[i] - work.blocks.counts[i] : ends[i]].tolist()
            request.names = named[: (request.prompt - 1) // work.blocks.tokens]
        found.append(request)
    return found


def new_engine(
    kind: type[Any], work: Workload, table: StepTable, limits: Limits, kv_tokens: int, schedule: int | list[int]
) -> Any:
    """A replica at rest."""
    rows = draft_rows(schedule, table, limits).tolist()
    longest = int(table.draft_lengths[rows].max())
    return kind(work, table, limits, kv_tokens // limits.block_size, rows, longest)


def reference(
    work: Workload,
    table: StepTable,
    limits: Limits,
    kv_tokens: int,
    schedule: int | list[int] = 0,
    alpha: Any = 0.0,
    seed: int = 0,
) -> tuple[Records, float]:
    """Return the records of a run, and how close an arrival came to the end of a step without being at it [s]."""
    longest = int(table.draft_lengths[draft_rows(schedule, table, limits)].max())
    requests = all_requests(work, alpha, seed, longest)
    sent = work.clients or len(requests)
    engine = new_engine(Reference, work, table, limits, kv_tokens, schedule)
    engine.unsent = deque(requests[sent:])
    for request in requests[:sent]:
        engine.send(request, float(work.pauses[request.index]) if work.clients else request.arrival)
    batch_s = [0.0] * (limits.max_num_seqs + 1)
    while engine.coming or engine.waiting or engine.running or engine.vain:
        if not engine.waiting and not engine.running and not engine.vain:
            engine.now = max(engine.now, engine.coming[0].arrival)
            engine.clear_s = engine.now
        engine.arrive()
        if engine.waiting or engine.running or engine.vain:
            engine.step(batch_s)
    return records(engine, requests, np.array(batch_s)), engine.closest


class Replica(Reference):
    """One of several: a client sends its next request to the tier, not to the replica that served it."""

    tier: Tier

    def finish(self, at: float) -> None:
        """Tell the tier."""
        self.tier.finish(at)


@dataclass
class Tier:
    """Replicas behind a router, moved one step at a time, always the one whose next step begins first."""

    replicas: list[Replica]
    ready: list[float]  # when each has its model, ascending [s]
    routing: str
    draws: list[float]  # of random routing
    pauses: list[float]  # of a closed loop, before each request; else nothing [s]
    coming: list[Request]  # known, by arrival
    unsent: deque[Request]  # of a closed loop
    ended: list[float] = field(default_factory=list)  # when clients are set free, ascending [s]
    given: dict[int, list[Request]] = field(default_factory=dict)  # by replica, refused ones included
    closest: float = math.inf  # least distance of an arrival from a completion that it was not at exactly [s]

    def finish(self, at: float) -> None:
        """A client of a closed loop will be free."""
        insort(self.ended, at)

    def send(self, request: Request, at: float) -> None:
        """A request becomes known; ties keep the order of sending."""
        request.arrival = at
        insort(self.coming, request, key=lambda r: r.arrival)

    def turn(self) -> int:
        """Arrivals so far."""
        return sum(len(given) for given in self.given.values())

    def outstanding(self, replica: int, at: float) -> int:
        """Requests that a replica was given and has not completed by then."""
        given = [r for r in self.given[replica] if not r.refused]
        ends = [r.completion for r in given if not math.isnan(r.completion)]
        self.closest = min([self.closest, *(abs(end - at) for end in ends if end != at)])
        return len(given) - sum(end <= at for end in ends)

    def choose(self, at: float) -> int:
        """Who gets the next arrival."""
        among = [k for k, ready in enumerate(self.ready) if ready <= at] or list(range(len(self.ready)))
        turn = self.turn()
        if self.routing == "round-robin":
            return among[turn % len(among)]
        if self.routing == "random":
            return among[math.floor(self.draws[turn] * len(among))]
        return min(among, key=lambda k: (self.outstanding(k, at), k))

    def run(self, batch_s: list[list[float]]) -> None:
        """All requests."""
        while True:
            begins = [(e.now, k) for k, e in enumerate(self.replicas) if e.waiting or e.running or e.coming or e.vain]
            begin = min(begins)[0] if begins else math.inf
            arrival = self.coming[0].arrival if self.coming else math.inf
            if self.unsent and self.ended and self.ended[0] <= min(arrival, begin):
                at, request = self.ended.pop(0), self.unsent.popleft()
                self.send(request, at + self.pauses[request.index])
            elif self.coming and arrival <= begin:
                self.hand_over(self.coming.pop(0))
            elif begins:
                _, k = min(begins)
                self.replicas[k].arrive()
                if self.replicas[k].waiting or self.replicas[k].running or self.replicas[k].vain:
                    self.replicas[k].step(batch_s[k])
            else:
                return

    def hand_over(self, request: Request) -> None:
        """Refuse a request, or give it to a replica."""
        k = self.choose(request.arrival)
        engine = self.replicas[k]
        self.given[k].append(request)
        if engine.too_large(request):
            request.refused = True
            self.finish(request.arrival)
            return
        if not (engine.waiting or engine.running or engine.coming or engine.vain):
            engine.now = max(engine.now, request.arrival)
        engine.coming.append(request)


def reference_tier(
    work: Workload,
    table: StepTable,
    limits: Limits,
    kv_tokens: int,
    ready: list[float],
    routing: str,
    schedule: int | list[int] = 0,
    alpha: Any = 0.0,
    seed: int = 0,
    draws: list[float] | None = None,
) -> tuple[list[tuple[list[int], Records]], float]:
    """Return, of each replica that was given a request, which ones and their records; and as :func:`reference`."""
    longest = int(table.draft_lengths[draft_rows(schedule, table, limits)].max())
    requests = all_requests(work, alpha, seed, longest)
    sent = work.clients or len(requests)
    pauses = work.pauses.tolist() if work.clients else []
    tier = Tier([], ready, routing, draws or [], pauses, [], deque(requests[sent:]))
    for request in requests[:sent]:
        tier.send(request, pauses[request.index] if work.clients else request.arrival)
    for start in ready:
        replica = new_engine(Replica, work, table, limits, kv_tokens, schedule)
        replica.now, replica.tier = start, tier
        tier.given[len(tier.replicas)] = []
        tier.replicas.append(replica)
    batch_s = [[0.0] * (limits.max_num_seqs + 1) for _ in ready]
    tier.run(batch_s)
    found = []
    for k, (replica, busy) in enumerate(zip(tier.replicas, batch_s, strict=True)):
        given = sorted(tier.given[k], key=lambda r: r.index)
        if given:
            found.append(([r.index for r in given], records(replica, given, np.array(busy))))
    return found, min(tier.closest, *(replica.closest for replica in tier.replicas))


PER_REQUEST = (
    *("arrival", "admitted", "first_token", "completion", "prompt", "output"),
    *("rounds", "drafted", "accepted", "preemptions", "found", "service_s", "refused"),
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

"""What a running server does under load: an OpenAI-compatible one, driven over HTTP, streaming, request by request.

The client reads ``/v1/completions`` or ``/v1/chat/completions`` of vLLM, SGLang, TGI, llama.cpp or ``transformers
serve``, and vLLM's speculation counters from ``/metrics``. Every wait has an end, and every request has one status::

    ok             the stream ended as it should
    connection     no connection could be made
    timeout        no end within the time a request may take
    http_429 ...   the server answered with this code
    broken_stream  the stream stopped before its end, or was not a stream
    stream_error   the server reported an error within the stream
    empty          the stream ended well and held no text: there is no first token to time
    unfinished     under way when the run ended
    not_sent       not begun when the run ended
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from theory.errors import refuse, require

if TYPE_CHECKING:
    import httpx2

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Ended = Literal["complete", "deadline", "interrupted"]
Progress = Callable[[str, int, int], None]

COUNTERS_TIMEOUT = 10.0  # for one reading of /metrics or /v1/models [s]; assumed
PROBES = (16, 144)  # words of the two prompts that tell how many tokens a word is [-]; assumed
# Common English words, mostly one token each in byte-pair vocabularies; the probes measure what they are here.
COMMON = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother area
money story fact month lot right study book eye job word business issue side kind head house service friend father
power hour game line end member law car city community name president team minute idea body
"""
WORDS = tuple(COMMON.split())


@dataclass(frozen=True, slots=True)
class Server:
    """Where the requests go and how long anything may take.

    Raises
    ------
    InputError
        If the address is not of HTTP or a time is not finite and above 0.

    Examples
    --------
    >>> Server("http://127.0.0.1:8000/v1/").root
    'http://127.0.0.1:8000'
    """

    url: str
    model: str | None = None  # the only one that the server lists by default
    endpoint: Literal["completions", "chat"] = "completions"
    key: str | None = field(default=None, repr=False)  # sent as a bearer token
    body: Mapping[str, Any] = field(default_factory=dict)  # added to every request, as vLLM's {"ignore_eos": true}
    request_timeout_s: float = 120.0  # from sending to the end of the stream [s]
    deadline_s: float = 3600.0  # of the whole run [s]

    def __post_init__(self) -> None:
        known = re.fullmatch(r"https?://[^/\s]+(/\S*)?", self.url) is not None
        require(known, "url", "must be an HTTP address", self.url, "Pass http://127.0.0.1:8000.")
        require(self.endpoint in ("completions", "chat"), "endpoint", "must be completions or chat", self.endpoint)
        for name in ("request_timeout_s", "deadline_s"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, name, "must be finite and above 0 [s]", value)

    @property
    def root(self) -> str:
        """Address without the ``/v1`` of the API."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """Requests to send: at their times (open loop), or by clients that wait for their answers (closed loop).

    Raises
    ------
    InputError
        If the arrays differ in length or hold none.
    """

    arrival: Floats  # (n,) since the start of the run, sorted; not used in a closed loop [s]
    prompt: Ints  # (n,) [tokens]
    output: Ints  # (n,) [tokens]
    clients: int = 0  # of a closed loop; 0: open loop [-]
    pauses: Floats | None = None  # (n,) closed loop: before a request, from the start or the client's last answer [s]
    shared: Ints | None = None  # (n,) tokens at the beginning of each prompt that are the same in all [tokens]

    def __post_init__(self) -> None:
        arrays = (self.arrival, self.prompt, self.output, self.pauses, self.shared)
        sizes = [a.size for a in arrays if a is not None]
        require(len(set(sizes)) == 1, "load", "must have as many times as prompts and outputs", sizes)
        require(sizes[0] > 0, "load", "must hold at least one request", sizes[0])
        require(self.clients == 0 or self.pauses is not None, "pauses", "must be given for a closed loop [s]", None)


@dataclass(frozen=True, slots=True)
class Speculation:
    """What a server drafted over a run: vLLM's ``spec_decode`` counters, of all its requests.

    Source
    ------
    vLLM v1, ``vllm/v1/spec_decode/metrics.py``: ``num_drafts`` counts rounds of a sequence.

    Examples
    --------
    >>> spent = Speculation(drafts=10, drafted=30, accepted=12)
    >>> spent.acceptance, spent.tokens_per_round
    (0.4, 2.2)
    """

    drafts: float  # rounds [-]
    drafted: float  # [tokens]
    accepted: float  # [tokens]
    by_position: tuple[float, ...] = ()  # tokens accepted at each position of the draft [tokens]

    @property
    def acceptance(self) -> float:
        """Accepted fraction, accepted / drafted; nan if nothing was drafted [-]."""
        return self.accepted / self.drafted if self.drafted else math.nan

    @property
    def tokens_per_round(self) -> float:
        """1 + accepted / rounds, the token of the target itself included; nan without a round [tokens]."""
        return 1 + self.accepted / self.drafts if self.drafts else math.nan

    def since(self, before: Speculation) -> Speculation | None:
        """Return what came after an earlier reading; None if the counters went back, as on a restart."""
        positions = max(len(self.by_position), len(before.by_position))
        then, now = (list(s.by_position) + [0.0] * (positions - len(s.by_position)) for s in (before, self))
        steps = [a - b for a, b in zip(now, then, strict=True)]
        spent = (self.drafts - before.drafts, self.drafted - before.drafted, self.accepted - before.accepted)
        return Speculation(*spent, tuple(steps)) if min(*spent, *steps, 0.0) >= 0 else None


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What became of every request; all times since the start of the run [s], nan where a thing did not happen."""

    due: Floats  # (n,) when it was to be sent [s]
    sent: Floats  # (n,) [s]
    first_token: Floats  # (n,) first text of the stream [s]
    completion: Floats  # (n,) last choice of the stream, or when it failed [s]
    prompt_asked: Floats  # (n,) [tokens]
    output_asked: Floats  # (n,) [tokens]
    prompt: Floats  # (n,) as the server counted [tokens]
    output: Floats  # (n,) as the server counted [tokens]
    status: tuple[str, ...]  # (n,) see the head of this module
    closed: bool
    source: str  # who measured, on what
    ended: Ended = "complete"
    speculation: Speculation | None = None
    tokens_per_word: float = math.nan  # of the prompts; nan if the server does not count [tokens]

    @property
    def ok(self) -> NDArray[np.bool_]:
        """Which requests were answered to the end, (n,)."""
        return np.array([s == "ok" for s in self.status])

    @property
    def ttft(self) -> Floats:
        """Time from sending to the first text, (n,) [s]."""
        return self.first_token - self.sent

    @property
    def e2e(self) -> Floats:
        """Time from sending to the last token, (n,) [s]."""
        return self.completion - self.sent

    @property
    def tpot(self) -> Floats:
        """Time per token after the first, (E2E - TTFT) / (output - 1); nan for one token or none counted, (n,) [s]."""
        after = np.where(self.output > 1, self.output - 1, np.nan)
        return (self.completion - self.first_token) / after

    def errors(self) -> dict[str, int]:
        """Return how many requests came to each end other than ok."""
        kinds = sorted(set(self.status) - {"ok"})
        return {kind: self.status.count(kind) for kind in kinds}


def observe(server: Server, load: Load, rng: np.random.Generator, progress: Progress) -> Observation:
    """Send the load to the server and return what came back; Ctrl-C ends the run and keeps what was measured.

    Two probes of one output token go first: they tell how many tokens a word of the prompts is, and a server that loads
    or compiles at its first request does so before the clock runs.

    Raises
    ------
    InputError
        If httpx2 is not installed, nothing answers at the address, or the server refuses the probes.
    """
    found = importlib.util.find_spec("httpx2") is not None
    require(found, "url", "needs httpx2, which is not installed", server.url, "Run `pip install tierwise[observe]`.")
    return asyncio.run(_observe(server, load, rng, progress))


async def _observe(server: Server, load: Load, rng: np.random.Generator, progress: Progress) -> Observation:
    import httpx2

    head = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    patience = httpx2.Timeout(server.request_timeout_s)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    # no proxy of the environment: its time is not the server's
    async with httpx2.AsyncClient(headers=head, timeout=patience, limits=limits, trust_env=False) as client:
        run = _Run(server, load, client, server.model or await _only_model(client, server))
        await run.prepare(rng)
        before = await _counters(client, server)
        ended = await run.all(progress)
        after = await _counters(client, server)
    return run.observation(ended, after.since(before) if before and after else None)


class _Run:
    """One run under way: what is known of each request so far."""

    def __init__(self, server: Server, load: Load, client: httpx2.AsyncClient, model: str) -> None:
        count = load.prompt.size
        self.server, self.load, self.client, self.model = server, load, client, model
        self.due, self.sent, self.first, self.end, self.prompt, self.output = (np.full(count, np.nan) for _ in range(6))
        self.status = ["not_sent"] * count
        self.texts: list[str] = []
        self.per_word = math.nan
        self.start = 0.0
        self.answered = 0

    def now(self) -> float:
        return time.perf_counter() - self.start

    async def prepare(self, rng: np.random.Generator) -> None:
        """Write the prompts, of about as many tokens as asked."""
        counted = [await self._probe(words, rng) for words in PROBES]
        fixed = 0.0
        if counted[0] is not None and counted[1] is not None and counted[1] > counted[0]:
            self.per_word = (counted[1] - counted[0]) / (PROBES[1] - PROBES[0])
            fixed = max(counted[0] - PROBES[0] * self.per_word, 0.0)  # a chat template, a first token
        per_word = 1.0 if math.isnan(self.per_word) else self.per_word
        shared = np.zeros_like(self.load.prompt) if self.load.shared is None else self.load.shared
        opening = rng.choice(WORDS, int(shared.max() / per_word) + 1).tolist()
        for tokens, same in zip(self.load.prompt, shared, strict=True):
            words, begin = max(round((float(tokens) - fixed) / per_word), 1), round(float(same) / per_word)
            own = rng.choice(WORDS, max(words - begin, 1)).tolist()
            self.texts.append(" ".join(opening[:begin] + own))

    async def _probe(self, words: int, rng: np.random.Generator) -> float | None:
        import httpx2

        text, server = " ".join(rng.choice(WORDS, words).tolist()), self.server
        way_out = "Start it, or check the address, --model, --endpoint and --body."
        try:
            async with asyncio.timeout(server.request_timeout_s):
                answer = await self.client.post(self._path(), json=self._body(text, 1) | {"stream": False})
        except (TimeoutError, httpx2.HTTPError, httpx2.InvalidURL) as error:
            said = str(error) or type(error).__name__
            refuse("url", "must be a server that answers", f"{server.url} ({said})", way_out)
        said = f"{server.url} (HTTP {answer.status_code}: {answer.text[:200]})"
        require(answer.status_code == 200, "url", "must be a server that answers a completion", said, way_out)
        try:
            return float(answer.json()["usage"]["prompt_tokens"])
        except (ValueError, TypeError, KeyError):
            return None

    def _path(self) -> str:
        return self.server.root + (
            "/v1/completions" if self.server.endpoint == "completions" else "/v1/chat/completions"
        )

    def _body(self, text: str, tokens: int) -> dict[str, Any]:
        chat = {"messages": [{"role": "user", "content": text}]}
        asked = chat if self.server.endpoint == "chat" else {"prompt": text}
        return {"model": self.model, **asked, "max_tokens": tokens, **self.server.body}

    async def all(self, progress: Progress) -> Ended:
        """Send everything; return how the run ended."""
        self.start = time.perf_counter()
        sender = self._closed(progress) if self.load.clients else self._open(progress)
        try:
            async with asyncio.timeout(self.server.deadline_s):
                await sender
        except TimeoutError:
            return "deadline"
        except asyncio.CancelledError:  # Ctrl-C: what was measured is kept
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            return "interrupted"
        return "complete"

    async def _open(self, progress: Progress) -> None:
        async with asyncio.TaskGroup() as group:
            for i, due in enumerate(self.load.arrival):
                self.due[i] = due
                await asyncio.sleep(max(float(due) - self.now(), 0.0))
                group.create_task(self._request(i, progress))

    async def _closed(self, progress: Progress) -> None:
        assert self.load.pauses is not None
        order = iter(range(self.load.prompt.size))

        async def client(pauses: Floats) -> None:
            for i in order:  # one list for all clients
                free = self.now() if i >= self.load.clients else 0.0
                self.due[i] = free + float(pauses[i])
                await asyncio.sleep(max(self.due[i] - self.now(), 0.0))
                await self._request(i, progress)

        async with asyncio.TaskGroup() as group:
            for _ in range(self.load.clients):
                group.create_task(client(self.load.pauses))

    async def _request(self, i: int, progress: Progress) -> None:
        import httpx2

        self.status[i], self.sent[i] = "unfinished", self.now()
        status = "unfinished"
        try:
            async with asyncio.timeout(self.server.request_timeout_s):
                status = await self._stream(i)
        except (TimeoutError, httpx2.ReadTimeout, httpx2.WriteTimeout):
            status = "timeout"
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            status = "connection"
        except (httpx2.HTTPError, httpx2.StreamError, AttributeError, TypeError, ValueError):
            status = "broken_stream"  # the last three: JSON, but of another shape
        finally:
            self.status[i] = status
            if status != "ok":
                self.end[i] = self.now()
        self.answered += 1
        progress("observing", self.answered, self.load.prompt.size)

    async def _stream(self, i: int) -> str:
        """Return the status of a request whose answer is read to its end."""
        body = self._body(self.texts[i], int(self.load.output[i]))
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with self.client.stream("POST", self._path(), json=body) as response:
            if response.status_code != 200:
                return f"http_{response.status_code}"
            finished = False
            async for event in _events(response):
                if event is None:  # not JSON
                    return "broken_stream"
                if event.get("error"):
                    return "stream_error"
                finished = self._take(i, event) or finished
        if not finished:
            return "broken_stream"
        return "empty" if np.isnan(self.first[i]) else "ok"

    def _take(self, i: int, event: dict[str, Any]) -> bool:
        """Take the times and counts of one event; return whether it says that the answer is complete."""
        now, finished = self.now(), bool(event.get("done"))
        for choice in event.get("choices") or ():
            self.end[i] = now
            if np.isnan(self.first[i]) and _text(choice):
                self.first[i] = now
            finished = finished or choice.get("finish_reason") is not None
        usage = event.get("usage") or {}
        self.prompt[i] = usage.get("prompt_tokens", self.prompt[i])
        self.output[i] = usage.get("completion_tokens", self.output[i])
        return finished

    def observation(self, ended: Ended, speculation: Speculation | None) -> Observation:
        """Return what is known of all requests."""
        asked = (self.load.prompt.astype(np.float64), self.load.output.astype(np.float64))
        return Observation(
            *(self.due, self.sent, self.first, self.end, *asked, self.prompt, self.output, tuple(self.status)),
            closed=self.load.clients > 0,
            source=f"{self.model} at {self.server.root}, {self.server.endpoint}",
            ended=ended,
            speculation=speculation,
            tokens_per_word=self.per_word,
        )


def _text(choice: dict[str, Any]) -> str:
    """Return the text of a choice: a completion's, or that of a chat's delta, reasoning included."""
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""


async def _events(response: httpx2.Response) -> AsyncIterator[dict[str, Any] | None]:
    """Yield the events of a stream of server-sent events; ``{"done": True}`` for ``[DONE]``, None for what is no JSON.

    Source
    ------
    WHATWG HTML, section 9.2 (server-sent events): a line ``data: ...``; OpenAI's API ends a stream with ``[DONE]``.
    """
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            yield {"done": True}
            continue
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        yield event if isinstance(event, dict) else None


async def _only_model(client: httpx2.AsyncClient, server: Server) -> str:
    import httpx2

    way_out = "Pass --model with the name that the server knows."
    try:
        async with asyncio.timeout(COUNTERS_TIMEOUT):
            answer = await client.get(server.root + "/v1/models")
        names = [str(entry["id"]) for entry in answer.json()["data"]]
    except (TimeoutError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        said = f"{server.url} ({str(error) or type(error).__name__})"
        refuse("url", "must be a server that answers", said, "Start it, or check the address.")
    except (ValueError, TypeError, KeyError):
        refuse("model", "must be given to a server that does not list its models", None, way_out)
    require(len(names) == 1, "model", "must be given to a server that does not list exactly one", names, way_out)
    return names[0]


async def _counters(client: httpx2.AsyncClient, server: Server) -> Speculation | None:
    """Return the counters that ``/metrics`` shows; None where there are none."""
    import httpx2

    try:
        async with asyncio.timeout(COUNTERS_TIMEOUT):
            answer = await client.get(server.root + "/metrics")
    except (TimeoutError, httpx2.HTTPError):
        return None
    return speculation_counters(answer.text) if answer.status_code == 200 else None


COUNTER = re.compile(r"vllm:spec_decode_num_(\w+?)_total(?:\{(.*)\})?\s+(\S+)")


def speculation_counters(text: str) -> Speculation | None:
    """Return vLLM's speculation counters from the text of ``/metrics``, summed over engines; None without them.

    Source
    ------
    vLLM v1, ``vllm/v1/spec_decode/metrics.py``: ``vllm:spec_decode_num_drafts``, ``..._num_draft_tokens``,
    ``..._num_accepted_tokens`` and ``..._num_accepted_tokens_per_pos{position}``; Prometheus adds ``_total``.

    Examples
    --------
    >>> speculation_counters('vllm:spec_decode_num_drafts_total{engine="0"} 4.0')
    Speculation(drafts=4.0, drafted=0.0, accepted=0.0, by_position=())
    >>> speculation_counters("vllm:num_requests_running 0.0") is None
    True
    """
    totals: dict[str, float] = {}
    positions: dict[int, float] = {}
    for line in text.splitlines():
        match = COUNTER.match(line)
        if match is None:
            continue
        name, labels, value = match[1], match[2] or "", float(match[3])
        if name == "accepted_tokens_per_pos":
            place = re.search(r'position="(\d+)"', labels)
            if place is not None:
                positions[int(place[1])] = positions.get(int(place[1]), 0.0) + value
        else:
            totals[name] = totals.get(name, 0.0) + value
    if "drafts" not in totals:
        return None
    by_position = tuple(positions.get(k, 0.0) for k in range(max(positions, default=-1) + 1))
    return Speculation(
        totals["drafts"], totals.get("draft_tokens", 0.0), totals.get("accepted_tokens", 0.0), by_position
    )

"""A running server observed: a real one on loopback, and a small one that fails on purpose."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.observe import WORDS, Load, Observation, Server, Speculation, observe, speculation_counters
from planner.observed import observed_figures
from planner.scenario import Slo
from theory.errors import InputError
from tierwise.cli import main

PROMPT, OUTPUT = 40, 12  # of every request asked of the real server [tokens]
LENGTHS = (f"traffic.prompt_tokens={{median: {PROMPT}}}", f"traffic.output_tokens={{median: {OUTPUT}}}")


def silent(what: str, done: int, of: int) -> None: ...


def load(count: int, clients: int = 0, gap: float = 0.01, output: int = 4) -> Load:
    times, tokens = gap * np.arange(count), np.full(count, 8)
    return Load(times, tokens, np.full(count, output), clients, np.zeros(count) if clients else None)


def drive(url: str, load: Load, **options: Any) -> Observation:
    return observe(Server(url, model="m", **options), load, np.random.default_rng(0), silent)


def cli(*args: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tierwise", "observe", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# ---------------------------------------------------------------------------------------------------------------------
# A real server: `transformers serve` with a random Llama of two layers
# ---------------------------------------------------------------------------------------------------------------------


def save_tiny_model(folder: Path) -> None:
    """Write a Llama whose tokens are the words of our prompts, and which never stops by itself."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", *sorted(set(WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}time time time {{ m['content'] }}{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<unk>", chat_template=template
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address of a running ``transformers serve`` and the name of its model."""
    folder = tmp_path_factory.mktemp("tiny")
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    log = folder / "serve.log"
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=offline,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        save_tiny_model(folder)  # while the server starts: it loads the model when first asked
        for _ in range(240):
            assert server.poll() is None, log.read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.25)
        else:
            pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")
        yield url, str(folder)
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)


def test_open_loop_on_a_real_server(real: tuple[str, str], tmp_path: Path) -> None:
    url, model = real
    asked = ("traffic.requests=24", "traffic.rate=12", *LENGTHS)
    sets = [word for override in asked for word in ("--set", override)]
    done = cli(url, "--model", model, *sets, "--format", "json", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((tmp_path / "observe.json").read_text()) == found
    assert (found["requests"], found["answered"], found["errors"], found["ended"]) == (24, 24, {}, "complete")
    assert found["tokens"]["prompt"] == PROMPT  # the probes found a token a word
    assert found["tokens"]["output"] == OUTPUT
    for key in ("ttft_s", "tpot_s", "e2e_s"):
        assert {"mean", "p50", "p90", "p95", "p99", "interval", "count"} <= set(found[key])
    means = (found[key]["mean"] for key in ("ttft_s", "tpot_s", "e2e_s"))
    ttft, tpot, e2e = means
    assert e2e == pytest.approx(ttft + (OUTPUT - 1) * tpot)
    assert 0 < tpot < e2e < 10
    with (tmp_path / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["status"] for r in rows] == ["ok"] * 24
    assert all(float(r["sent_s"]) < float(r["first_token_s"]) <= float(r["completion_s"]) for r in rows)


def test_closed_loop_of_chats_on_a_real_server(real: tuple[str, str]) -> None:
    url, model = real
    asked = Load(np.zeros(12), np.full(12, PROMPT), np.full(12, 6), clients=2, pauses=np.full(12, 0.01))
    seen = observe(Server(url, model, endpoint="chat"), asked, np.random.default_rng(0), silent)
    assert set(seen.status) == {"ok"}
    assert seen.prompt.tolist() == [PROMPT] * 12  # the three tokens of the template are taken off the words
    edges = sorted([(t, 1) for t in seen.sent] + [(t, -1) for t in seen.completion])
    assert np.cumsum([step for _, step in edges]).max() == 2  # never more in flight than clients
    found = observed_figures(seen)
    # Little: requests inside = rate x time inside, when the clients do little else
    inside = found["throughput"]["requests_per_s"] * (found["e2e_s"]["mean"] + 0.01)
    assert inside == pytest.approx(2, rel=0.15)


def test_a_slower_answer_is_seen_as_slower(real: tuple[str, str]) -> None:
    url, model = real
    server, rng = Server(url, model), np.random.default_rng(0)
    short, long = (
        observe(server, Load(np.zeros(4), np.full(4, 8), np.full(4, n), 1, np.zeros(4)), rng, silent) for n in (4, 64)
    )
    assert np.median(long.e2e) > 3 * np.median(short.e2e)


# ---------------------------------------------------------------------------------------------------------------------
# A server that fails on purpose
# ---------------------------------------------------------------------------------------------------------------------


class Faulty(BaseHTTPRequestHandler):
    """Answers probes well, and every streamed request as the server's ``fault`` says."""

    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        drafts = 10 * self.server.streams
        counters = "\n".join(
            f'vllm:spec_decode_num_{name}_total{{engine="0"}} {value}'
            for name, value in (("drafts", drafts), ("draft_tokens", 3 * drafts), ("accepted_tokens", 1.5 * drafts))
        )
        body = counters.encode() if self.path == "/metrics" else b'{"data": [{"id": "a"}, {"id": "b"}]}'
        self.answer(200, body)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not asked["stream"]:
            words = len(asked["prompt"].split())
            self.answer(200, json.dumps({"usage": {"prompt_tokens": words}}).encode())
            return
        self.server.streams += 1
        self.server.fault(self, self.server.streams)

    def answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, *events: str, end: bool = True) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            data = f"data: {event}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()
        if end:
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = True
    streams = 0
    fault: Callable[[Faulty, int], None]


TOKEN = '{"choices": [{"text": " word"}]}'
LAST = '{"choices": [{"text": "", "finish_reason": "length"}], "usage": {"prompt_tokens": 8, "completion_tokens": 4}}'


def fine(handler: Faulty, number: int = 0) -> None:
    handler.stream(TOKEN, TOKEN, LAST, "[DONE]")


def stall(handler: Faulty) -> None:
    handler.stream(TOKEN, end=False)
    time.sleep(1.0)


FAULTS: dict[str, Callable[[Faulty], None]] = {
    "http_429": lambda h: h.answer(429, b"slow down"),
    "http_500": lambda h: h.answer(500, b"oh"),
    "broken_stream": lambda h: h.stream(TOKEN, TOKEN, end=False),
    "stream_error": lambda h: h.stream(TOKEN, '{"error": "out of memory"}'),
    "empty": lambda h: h.stream(LAST, "[DONE]"),
    "timeout": lambda h: stall(h),
}


@pytest.fixture
def faulty() -> Iterator[Callable[[Callable[[Faulty, int], None]], str]]:
    started: list[FaultyServer] = []

    def start(fault: Callable[[Faulty, int], None]) -> str:
        server = FaultyServer(("127.0.0.1", 0), Faulty)
        server.fault = fault
        started.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def running(url: str) -> int:
    """Return how many streams the failing server has begun, from its counters."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        counters = speculation_counters(answer.read().decode())
    assert counters is not None
    return round(counters.drafts / 10)


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_counted_and_nothing_hangs(kind: str, faulty: Callable[..., str]) -> None:
    url = faulty(lambda handler, number: FAULTS[kind](handler) if number % 2 else fine(handler))
    start = time.monotonic()
    seen = drive(url, load(8, clients=1), request_timeout_s=0.3)
    assert time.monotonic() - start < 10
    assert seen.errors() == {kind: 4}
    found = observed_figures(seen, Slo())
    assert (found["answered"], found["ttft_s"]["count"]) == (4, 4)
    assert found["goodput"]["fraction"] <= 4 / 7  # a failure breaks the SLO; the first, before any answer, is left out


def test_malformed_events_break_the_stream_and_not_the_run(faulty: Callable[..., str]) -> None:
    odd = ('{"cho', "[1, 2]", '{"choices": [7]}', '{"choices": [{"text": "a"}], "usage": 3}', "null")
    url = faulty(lambda handler, n: handler.stream(TOKEN, odd[n % len(odd)], LAST, "[DONE]"))
    assert drive(url, load(len(odd))).errors() == {"broken_stream": len(odd)}


def test_nothing_at_the_address_is_refused() -> None:
    with pytest.raises(InputError, match=r"`url` must be a server that answers; got .*127.0.0.1.*Start it, or check"):
        drive(f"http://127.0.0.1:{free_port()}", load(2))


def test_a_server_that_goes_away_is_counted(faulty: Callable[..., str]) -> None:
    def leave(handler: Faulty, number: int) -> None:
        fine(handler)
        if number == 2:
            handler.server.shutdown()
            handler.server.server_close()
            handler.close_connection = True

    seen = drive(faulty(leave), load(12, gap=0.05))
    assert seen.ok[:2].all()
    assert set(seen.errors()) <= {"connection", "broken_stream"}
    assert seen.errors()["connection"] >= 8


def test_the_deadline_ends_the_run(faulty: Callable[..., str]) -> None:
    url = faulty(lambda handler, n: fine(handler) if n == 1 else time.sleep(2))
    seen = drive(url, load(4, clients=1), deadline_s=0.5)
    assert (seen.ended, seen.errors()) == ("deadline", {"not_sent": 2, "unfinished": 1})
    found = observed_figures(seen)
    assert (found["ended"], found["answered"]) == ("deadline", 1)


def test_nothing_answered_is_a_finding_too(faulty: Callable[..., str]) -> None:
    url = faulty(lambda handler, _: FAULTS["http_429"](handler))
    found = observed_figures(drive(url, load(5)), Slo())
    assert found["errors"] == {"http_429": 5}
    assert found["ttft_s"]["mean"] is None
    json.dumps(found, allow_nan=False)


def test_ctrl_c_keeps_what_was_measured(faulty: Callable[..., str], tmp_path: Path) -> None:
    url = faulty(fine)
    command = [sys.executable, "-m", "tierwise", "observe", url, "--model", "m", "--output", str(tmp_path)]
    sets = ("--set", "traffic.requests=500", "--set", "traffic.rate=20")
    run = subprocess.Popen([*command, *sets], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while running(url) < 20:  # under way
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=20)
    assert run.returncode == 0, err
    found = json.loads((tmp_path / "observe.json").read_text())
    assert found["ended"] == "interrupted"
    assert 0 < found["answered"] < 500
    assert "interrupted" in out


def test_speculation_counters_are_differences(faulty: Callable[..., str]) -> None:
    url = faulty(fine)
    found = observed_figures(drive(url, load(6)))
    assert found["speculation"]["rounds"] == 60
    assert found["speculation"]["acceptance"] == 0.5
    assert found["speculation"]["tokens_per_round"] == 2.5


def test_counters_of_several_engines_add_up() -> None:
    text = "\n".join(
        [
            "# TYPE vllm:spec_decode_num_drafts_total counter",
            *(f'vllm:spec_decode_num_drafts_total{{engine="{e}"}} 5.0' for e in range(2)),
            *(f'vllm:spec_decode_num_draft_tokens_total{{engine="{e}"}} 10.0' for e in range(2)),
            *(f'vllm:spec_decode_num_accepted_tokens_total{{engine="{e}"}} 6.0' for e in range(2)),
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 8.0',
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 4.0',
            'vllm:spec_decode_num_drafts_created{engine="0"} 1.7e+09',
        ]
    )
    now = speculation_counters(text)
    assert now == Speculation(10.0, 20.0, 12.0, (8.0, 4.0))
    assert now.since(Speculation(4.0, 8.0, 5.0, (3.0,))) == Speculation(6.0, 12.0, 7.0, (5.0, 4.0))
    assert Speculation(1.0, 2.0, 1.0).since(now) is None  # restarted


def test_an_ambiguous_model_is_refused(faulty: Callable[..., str]) -> None:
    url = faulty(fine)
    with pytest.raises(InputError, match=r"`model` must be given to a server .* exactly one; got \['a', 'b'\]"):
        observe(Server(url), load(2), np.random.default_rng(0), silent)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("ftp://x",), "`file` must be a text file that can be read; got ftp:/x"),
        (("http://127.0.0.1:9", "--body", "[]"), "`body` must be a JSON object; got '[]'"),
        (("http://127.0.0.1:9", "--request-timeout", "0"), "`request_timeout_s` must be finite and above 0 [s]"),
        (("http://127.0.0.1:9", "--key-env", "TIERWISE_NO_SUCH"), "`key-env` must name an environment variable"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    args: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tierwise", "observe", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1

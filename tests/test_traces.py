"""Traces: every format says the same requests, what is left out is counted, malformed rows are refused by line."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.build import resolve
from planner.plan import plan_scenario
from planner.scenario import load_scenario
from simulator.traces import read_trace, trace_formats
from simulator.workload import Workload
from theory.errors import InputError
from tierwise.cli import main

TRACE = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces" / "splitwise_conv.csv"
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def trace(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


def turns(*texts: Any) -> dict[str, Any]:
    """A conversation as ShareGPT has it; a number stands for a turn that gives its tokens."""
    return {
        "id": "x",
        "conversations": [
            {"from": "human", "tokens": text} if isinstance(text, int) else {"from": "human", "value": text}
            for text in texts
        ],
    }


def mooncake(arrival_ms: float, prompt: int, output: int) -> str:
    row = {"timestamp": arrival_ms, "input_length": prompt, "output_length": output, "hash_ids": [0, 1]}
    return json.dumps(row) + "\n"


# Two requests 4.5 s apart, of 374 and 396 prompt tokens, 44 and 109 output tokens, as each format writes them
SAME = {
    "vidur": VIDUR + "5.0,374,44\n9.5,396,109\n\n",
    "azure": AZURE + "2023-11-16 23:59:58.0000000,374,44\n2023-11-17 00:00:02.5000000,396,109\n",
    "burstgpt": BURST + "5,ChatGPT,374,44,418,Conversation log\n9.5,GPT-4,396,109,505,API log\n",
    "mooncake": mooncake(27_482, 374, 44) + "\n" + mooncake(31_982, 396, 109),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("named", [False, True])
def test_formats_say_the_same(tmp_path: Path, name: str, named: bool) -> None:
    bom = "\ufeff" if named else ""
    w = read_trace(trace(tmp_path, bom + SAME[name]), format=name if named else None)
    assert w.arrival.tolist() == [0.0, 4.5]
    assert w.prompt.tolist() == [374, 396]
    assert w.output.tolist() == [44, 109]
    assert w.source == f"trace trace.csv ({name}), 2 requests"


def test_columns_are_found_by_name_and_rows_may_be_sorted(tmp_path: Path) -> None:
    text = "x,num_decode_tokens,arrived_at,num_prefill_tokens\n,109,9.5,396\n,44,5,374\n"
    w = read_trace(trace(tmp_path, text), sort=True)
    assert w.arrival.tolist() == [0.0, 4.5]
    assert w.prompt.tolist() == [374, 396]


def test_azure_2024_mixes_times_with_and_without_microseconds(tmp_path: Path) -> None:
    """The file of 2024 has time zones, and leaves out microseconds that are zero."""
    text = AZURE + "2024-05-12 00:00:00.001163+00:00,1452,3\n2024-05-12 00:00:01+00:00,584,3\n"
    assert read_trace(trace(tmp_path, text)).arrival.tolist() == [0.0, 0.998837]


def test_failures_of_burstgpt_are_left_out_and_counted(tmp_path: Path) -> None:
    text = BURST + "5,ChatGPT,472,0,472,API log\n6,GPT-4,10,20,30,API log\n7,GPT-4,11,0,11,API log\n9,GPT-4,1,2,3,x\n"
    w = read_trace(trace(tmp_path, text))
    assert w.arrival.tolist() == [0.0, 3.0]
    assert w.output.tolist() == [20, 2]
    assert w.source == "trace trace.csv (burstgpt), 2 requests, 2 failures left out (0 response tokens)"
    assert read_trace(trace(tmp_path, text), limit=1).requests == 1
    assert "1 requests, 1 failures" in read_trace(trace(tmp_path, text), limit=1).source


def test_conversations_give_the_first_prompt_and_answer(tmp_path: Path) -> None:
    """Tokens where a turn gives them, otherwise characters; what has no answer is left out and counted."""
    items = [turns("a" * 9, "b" * 4, "c"), turns("alone"), turns("", "x"), turns(7, 3), {"conversations": []}]
    w = read_trace(trace(tmp_path, json.dumps(items, indent=1)))
    assert w.prompt.tolist() == [3, 7]
    assert w.output.tolist() == [1, 3]
    assert w.arrival.tolist() == [0.0, 0.0]
    assert "2 requests, 3 left out without a first prompt and answer, 4 characters a token (assumed)" in w.source
    assert read_trace(trace(tmp_path, json.dumps(items)), characters_per_token=3.0).output.tolist() == [2, 3]
    assert "assumed" not in read_trace(trace(tmp_path, json.dumps([turns(7, 3)]))).source


def test_a_long_list_of_conversations_is_read_piece_by_piece(tmp_path: Path) -> None:
    """Items larger and smaller than a piece; only as much is read as asked for."""
    sizes = [3, 200_000, 40, 70_000, 65_536]
    text = json.dumps([turns("é" * n, "b" * 8) for n in sizes], indent=2)
    assert read_trace(trace(tmp_path, text)).prompt.tolist() == [-(-n // 4) for n in sizes]
    assert read_trace(trace(tmp_path, text[: len(text) // 2]), limit=1).requests == 1
    assert read_trace(trace(tmp_path, json.dumps([turns("ab", "c")]).replace(" ", " \n "))).requests == 1


def test_a_trace_can_be_cut_and_stretched(tmp_path: Path) -> None:
    file = trace(tmp_path, VIDUR + "0,1,1\n1,2,2\n4,3,3\nbroken\n")
    w = read_trace(file, rate=10.0, limit=3)
    assert w.arrival.tolist() == pytest.approx([0.0, 0.05, 0.2])
    assert "3 requests, stretched to 10 request/s" in w.source


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 10**5), st.integers(1, 10**4)), min_size=1))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int]]) -> None:
    rows = sorted(rows)
    folder = tmp_path_factory.mktemp("round")
    texts = {
        "vidur": VIDUR + "".join(f"{a / 1000},{p},{o}\n" for a, p, o in rows),
        "burstgpt": BURST + "".join(f"{a / 1000},GPT-4,{p},{o},{p + o},API log\n" for a, p, o in rows),
        "mooncake": "".join(mooncake(*row) for row in rows),
    }
    for name, text in texts.items():
        w = read_trace(trace(folder, text))
        assert w.source.startswith(f"trace trace.csv ({name})")
        np.testing.assert_allclose(w.arrival, [(a - rows[0][0]) / 1000 for a, _, _ in rows], atol=1e-6)
        assert list(zip(w.prompt.tolist(), w.output.tolist(), strict=True)) == [row[1:] for row in rows]


ROWS = 100_000
ROW = {
    "vidur": (VIDUR, lambda i: f"{i / 10},{i + 1},{i % 900 + 1}\n"),
    "azure": (AZURE, lambda i: f"2024-05-{i // 3600 + 1:02}T00:{i // 60 % 60:02}:{i % 60:02}+00:00,9,{i + 1}\n"),
    "mooncake": ("", lambda i: mooncake(100 * i, i + 1, i % 900 + 1)),
}


@pytest.mark.parametrize("name", ROW)
def test_a_million_rows_take_seconds(tmp_path: Path, name: str) -> None:
    """At most 30 s of processor time for a million rows, here a tenth of them; 2 to 7 s were measured."""
    header, row = ROW[name]
    file = trace(tmp_path, header + "".join(map(row, range(ROWS))))
    start = time.process_time()
    assert read_trace(file).requests == ROWS
    assert time.process_time() - start < 3.0


GOOD = mooncake(0, 1, 1)
TALK = json.dumps(turns("a", "b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"`trace` must hold a header and requests.*The file is empty"),
        (" \n\n", r"`trace` must hold a header and requests.*The file is empty"),
        (VIDUR, r"`trace` must hold at least one request"),
        ("arrived_at,num_prefill_tokens\n0,1\n", r"`trace` must have the columns of a known format.*num_decode_tokens"),
        ("arrived_at,num_prefill_tokens\n0,1\n", r"As vidur it lacks num_decode_tokens\. Known: vidur: arrived_at, .*"),
        ("when,what\n0,1\n", r"got 'when,what'\. Known: vidur: .*azure: .*burstgpt: .*mooncake: .*sharegpt"),
        (VIDUR + "0,1,1\n1,nan,1\n", r"`trace line 3, num_prefill_tokens` must be a whole number .*got 'nan'"),
        (VIDUR + "0,1,1\n1,1,0\n", r"`trace line 3, num_decode_tokens` must be a whole number of at least 1.*got '0'"),
        (VIDUR + "0,-4,1\n", r"`trace line 2, num_prefill_tokens`.*got '-4'"),
        (VIDUR + "0,1.5,1\n", r"`trace line 2, num_prefill_tokens`.*got '1.5'"),
        (VIDUR + "0,1,\n", r"`trace line 2, num_decode_tokens`.*got ''"),
        (VIDUR + "0,inf,1\n", r"`trace line 2, num_prefill_tokens`.*got 'inf'"),
        (VIDUR + "0,many,1\n", r"`trace line 2, num_prefill_tokens`.*got 'many'"),
        (VIDUR + "nan,1,1\n", r"`trace line 2, arrived_at` must be a time of at least 0 or a date; got 'nan'"),
        (VIDUR + "-1,1,1\n", r"`trace line 2, arrived_at`.*got '-1'"),
        (VIDUR + "1,1,1\n\n,1,1\n", r"`trace line 4, arrived_at`.*got ''"),
        (VIDUR + "soon,1,1\n", r"`trace line 2, arrived_at`.*got 'soon'"),
        (VIDUR + "0,1\n", r"`trace line 2` must have 3 columns; got '0,1'"),
        (VIDUR + "0,1,1,1\n", r"`trace line 2` must have 3 columns"),
        (VIDUR + "5,1,1\n\n4,1,1\n", r"`trace line 4, arrival` must not be before line 2 .*pass sort=True"),
        (AZURE + "2023-11-16 23:59:58,1,1\n2023-11-31 00:00:00,1,1\n", r"`trace line 3, TIMESTAMP`.*2023-11-31"),
        (
            AZURE + "2023-11-16 23:59:58,1,1\n17,1,1\n",
            r"`trace line 3, TIMESTAMP` must be a time .* or a date; got '17'",
        ),
        (BURST + "5,GPT-4,1,-2,3,API log\n", r"`trace line 2, Response tokens` must be .* at least 0 .*got '-2'"),
        (BURST + "5,GPT-4,0,0,0,API log\n", r"`trace line 2, Request tokens` must be .* at least 1 .*got '0'"),
        (BURST + "5,GPT-4,1,0,1,API log\n", r"`trace` must hold at least one request that was answered.*1 failures"),
        (BURST + "5,GPT-4,1,2,3\n", r"`trace line 2` must have 6 columns"),
        (GOOD + "{broken\n", r"`trace line 2` must be a JSON object; got '\{broken'"),
        (GOOD + "\n[1, 2]\n", r"`trace line 3` must be a JSON object; got \[1, 2\]"),
        (
            GOOD + '{"timestamp": 1, "input_length": 2}\n',
            r"`trace line 2` must have the key output_length; got 'timest",
        ),
        (GOOD + mooncake(1, 0, 2), r"`trace line 2, input_length` must be a whole number of at least 1.*got 0"),
        (GOOD + GOOD.replace("1,", '"1",', 1), r"`trace line 2, input_length` must be a number; got '1'"),
        (GOOD + GOOD.replace("1,", "true,", 1), r"`trace line 2, input_length` must be a number; got True"),
        (GOOD + mooncake(1, 10**400, 2), r"`trace line 2, input_length` must be .* less than 2\^53"),
        (GOOD + GOOD.replace("1,", "9" * 5000 + ",", 1), r"`trace line 2` must be a JSON object; got"),
        (GOOD + "[" * 100_000 + "\n", r"`trace line 2` must be a JSON object; got"),
        (GOOD + mooncake(math.inf, 1, 2), r"`trace line 2, timestamp` must be a time of at least 0"),
        (VIDUR + f"0,1,1\n1,{'9' * 200_000},2\n", r"`trace line 3` must be a row of a CSV file; got 'field larger"),
        (mooncake(5, 1, 1) + mooncake(4, 1, 1), r"`trace line 2, arrival` must not be before line 1"),
        ("[]", r"`trace` must hold at least one request"),
        (f"[{TALK}\n, 5]", r"`trace line 2` must be a conversation, a JSON object; got 5"),
        (f"[{TALK},\n {{}}]", r"`trace line 2, conversations` must be a list of turns; got None"),
        (f'[{TALK},\n {{"conversations": [1, 2]}}]', r"`trace line 2, conversations` must hold objects; got 1"),
        (f"[{TALK},\n{json.dumps(turns('a', None))}]", r"`trace line 2, conversations` must hold texts in `value`"),
        (f"[{TALK},\n{json.dumps(turns(1, -3))}]", r"`trace line 2, answer` must be a whole number .*got -3"),
        (f"[{TALK}\n\n,{TALK[:-9]}", r"`trace line 3` must begin a whole JSON value"),
        (f"[{TALK} {TALK}]", r"`trace` must be a JSON list, with ',' next; got"),
        (f"[{TALK},\n]", r"`trace line 2` must begin a whole JSON value; got '\]'"),
        (f"[{TALK}", r"`trace` must be a whole JSON list; got 'the end of the file'"),
    ],
)
def test_bad_traces_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_trace(trace(tmp_path, text))


def test_a_trace_that_is_no_file_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`trace` must be a file that exists"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"`trace` must be a readable text file"):
        read_trace(tmp_path)
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00arrived")
    with pytest.raises(InputError, match=r"`trace` must be a readable text file"):
        read_trace(tmp_path / "bytes.csv")


def test_bad_wishes_are_refused(tmp_path: Path) -> None:
    file = trace(tmp_path, VIDUR + "0,1,1\n")
    with pytest.raises(InputError, match=r"`limit` must be at least 1"):
        read_trace(file, limit=0)
    with pytest.raises(InputError, match=r"`format` must be a known format of traces; got 'parquet'.*Known: vidur, az"):
        read_trace(file, format="parquet")
    with pytest.raises(InputError, match=r"`trace` must have the columns TIMESTAMP, .*Missing: TIMESTAMP, ContextTok"):
        read_trace(file, format="azure")
    with pytest.raises(InputError, match=r"`trace line 1` must be a JSON object"):
        read_trace(file, format="mooncake")
    with pytest.raises(InputError, match=r"`trace` must be a JSON list, with '\[' next"):
        read_trace(file, format="sharegpt")
    with pytest.raises(InputError, match=r"`characters_per_token` must be finite and above 0"):
        read_trace(file, characters_per_token=0.0)
    assert set(SAME) | {"sharegpt"} == set(trace_formats())


@pytest.mark.skipif(not TRACE.exists(), reason="the conversation trace is not part of the repository")
def test_the_conversation_trace_is_read_whole() -> None:
    w = read_trace(TRACE)
    assert w.requests == 19_366  # the count its README states
    assert read_trace(TRACE, rate=2.0).rate == pytest.approx(2.0)


# Through a scenario

NO_LAWS = ("traffic.prompt_tokens=null", "traffic.output_tokens=null")
ALONE = "deployment.tiers=[{tier: 13b, tp: 8}]"


def asked(*settings: str) -> Workload:
    """The requests of the shipped scenario with some settings."""
    scenario, folder = load_scenario(overrides=["traffic.requests=2000", *settings])
    return resolve(scenario, folder).workload


@pytest.mark.parametrize(("kind", "cv"), [("poisson", 1.0), ("gamma", 2.5), ("weibull", 2.5)])
def test_scenarios_have_the_arrivals_they_ask_for(kind: str, cv: float) -> None:
    extra = [] if kind == "poisson" else [f"traffic.arrivals.cv={cv}"]
    w = asked(f"traffic.arrivals.kind={kind}", *extra)
    gaps = np.diff(w.arrival)
    assert w.rate == pytest.approx(12.0, rel=0.25)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.25)


def test_a_plan_says_where_it_takes_arrivals_as_poisson() -> None:
    few = ["traffic.requests=300", "search.trials=0", "search.shortlist=1"]
    scenario, folder = load_scenario(overrides=[*few, "traffic.arrivals={kind: weibull, cv: 1.1}"])
    assert any("take arrivals as Poisson" in line for line in plan_scenario(scenario, folder)["explanation"])


def test_piecewise_rates_keep_their_own_mean_unless_a_rate_is_given() -> None:
    day = "traffic.arrivals={kind: piecewise, rates: [1, 3], durations_s: [20]}"
    assert asked(day, "traffic.rate=null").rate == pytest.approx(2.0, rel=0.1)
    assert asked(day).rate == pytest.approx(12.0, rel=0.1)
    once = "traffic.arrivals={kind: piecewise, rates: [1, 3], durations_s: [20, 40], repeat: false}"
    assert asked(once, "traffic.rate=null").arrival[-1] < 60


def test_a_trace_gives_lengths_to_clients_and_to_a_law(tmp_path: Path) -> None:
    file = trace(tmp_path, VIDUR + "".join(f"{i},{i + 1},{2 * i + 1}\n" for i in range(50)))
    base = (*NO_LAWS, f"traffic.trace={file}", "traffic.rate=null")
    replayed = asked(*base)
    assert replayed.arrival.tolist() == list(range(50))
    loop = asked(*base, "traffic.clients=4", "traffic.requests_per_client=3")
    assert (loop.requests, loop.clients) == (12, 4)
    assert loop.prompt.tolist() == replayed.prompt[:12].tolist()
    drawn = asked(*base, "traffic.arrivals={kind: gamma, cv: 2}")
    assert drawn.prompt.tolist() == replayed.prompt.tolist()
    assert drawn.arrival.tolist() != replayed.arrival.tolist()


def test_conversations_need_an_arrival_law_or_clients(tmp_path: Path) -> None:
    file = trace(tmp_path, json.dumps([turns("a" * 40, "b" * 40)] * 30), "talk.json")
    base = (*NO_LAWS, f"traffic.trace={file}")
    with pytest.raises(InputError, match=r"`traffic.trace` must hold two different arrival times.*traffic.clients"):
        asked(*base)
    with pytest.raises(InputError, match=r"`traffic.rate` must be given for an open loop"):
        asked(*base, "traffic.rate=null", "traffic.arrivals.kind=poisson")
    assert asked(*base, "traffic.arrivals.kind=poisson").arrival[-1] > 0
    assert asked(*base, "traffic.clients=3").requests == 30
    assert asked(*base, "traffic.clients=3", "traffic.characters_per_token=5").mean_prompt == 8


def test_requests_left_out_of_a_closed_loop_keep_the_staggered_start() -> None:
    """Of clients 0..3 with requests too long for the first two, the others still start at their own times."""
    loop = ("traffic.clients=4", "traffic.start_over_s=8", "traffic.think_time_s=1", "traffic.requests=200")
    assert asked(*loop, "traffic.max_tokens=500").pauses[:5].tolist() == [0.0, 2.0, 4.0, 6.0, 1.0]


CLI: dict[str, tuple[str, ...]] = {
    "weibull": ("traffic.arrivals={kind: weibull, cv: 2}",),
    "day": ("traffic.arrivals={kind: piecewise, rates: [1, 3], durations_s: [20]}",),
    "clients": (
        *("traffic.clients=8", "traffic.requests_per_client=20", "traffic.think_time_s=0.1"),
        *("traffic.think_time_law=exponential", "traffic.start_over_s=2"),
    ),
    "trace": (*NO_LAWS, "traffic.trace=mooncake.jsonl", "traffic.format=mooncake", "traffic.rate=null"),
}


SAID = {
    "weibull": "drawn: ",
    "day": "drawn: ",
    "clients": "ClosedLoop(clients=8, requests=160, think_time=0.1, exponential=True",
    "trace": "trace mooncake.jsonl (mooncake), 160 requests",
}


@pytest.mark.parametrize("kind", CLI)
def test_simulate_runs_each_kind_of_traffic(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace(tmp_path, "".join(mooncake(500 * i, 100 + i, 20) for i in range(160)), "mooncake.jsonl")
    settings = [word for each in ("traffic.requests=160", ALONE, *CLI[kind]) for word in ("--set", each)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tierwise", "simulate", "--format", "json", *settings])
    with pytest.raises(SystemExit) as leave:
        main()
    captured = capsys.readouterr()
    assert leave.value.code == 0, captured.err
    result = json.loads(captured.out)
    assert result["requests"] == 160
    assert SAID[kind] in result["provenance"]["traffic"]

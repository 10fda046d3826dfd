"""Traces: requests that were served, read from the layouts in which such records are published.

========== ====================================================== ================================================
format     what a request is                                      described in
========== ====================================================== ================================================
vidur      CSV: arrived_at [s], num_prefill_tokens,               microsoft/vidur, data/processed_traces
           num_decode_tokens
azure      CSV: TIMESTAMP (date and time), ContextTokens,         Azure/AzurePublicDataset, AzureLLMInference-
           GeneratedTokens; the files of 2023 and of 2024         Dataset2023.md and -2024.md: the same columns
burstgpt   CSV: Timestamp [s], Request tokens, Response tokens;   HPMLL/BurstGPT, README, Schema; Wang et al.
           a response of 0 tokens is a failure                    (2024), arXiv:2401.17644
mooncake   JSON lines: timestamp [ms], input_length,              kvcache-ai/Mooncake, FAST25-release/README.md;
           output_length, on request hash_ids                     the unit: NVIDIA Dynamo, data_generator/README
sharegpt   JSON: a list of conversations without times; the       first prompt and first answer, as vLLM's
           first prompt and the first answer of each              benchmarks/datasets/sharegpt.py takes them
========== ====================================================== ================================================

Columns and keys that are not named here are ignored. What a row must hold and does not is refused with its line.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np

from theory.errors import refuse, require

from .prefixes import PromptBlocks
from .workload import Floats, Workload, at_rate

CHARACTERS_PER_TOKEN = 4.0  # English text; assumed: OpenAI, "What are tokens and how to count them?" [characters/token]
MOST = 2.0**53  # beyond it a float does not hold every whole number [tokens]
CHUNK = 1 << 16  # of a JSON document that is read piece by piece [characters]


@dataclass(frozen=True, slots=True)
class _Ask:
    """What is wanted of a file."""

    path: Path
    limit: int | None  # [requests]
    characters: float  # per token of a text [characters/token]
    blocks: int | None  # tokens of a block that `hash_ids` name; None: they are not looked at [tokens]


@dataclass(frozen=True, slots=True)
class _Columns:
    """Raw cells of the requests of a file, with the line each begins on."""

    lines: list[int] = field(default_factory=list)
    arrival: list[Any] = field(default_factory=list)  # stays empty in a format without times
    prompt: list[Any] = field(default_factory=list)
    output: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=list)  # names of the blocks of the prompt, where asked for


@dataclass(frozen=True, slots=True)
class _Format:
    """How a published layout is read."""

    names: tuple[str, str, str]  # of the columns or keys that hold arrival, prompt and output
    read: Callable[[TextIO, _Ask, _Format], _Columns]
    unit: float = 1.0  # of a time [s]
    failures: bool = False  # an output of 0 tokens is a request that failed


def read_trace(
    path: str | Path,
    rate: float | None = None,
    limit: int | None = None,
    sort: bool = False,
    format: str | None = None,
    characters_per_token: float = CHARACTERS_PER_TOKEN,
    block_tokens: int | None = None,
) -> Workload:
    """Return the requests of a trace, times counted from the first arrival.

    Parameters
    ----------
    path : str or Path
        File in one of the formats of this module.
    rate : float, optional
        Stretch the time axis to this mean rate [request/s]; the pattern of the gaps stays.
    limit : int, optional
        Read only this many requests from the start; the rest of the file is not looked at.
    sort : bool
        Sort by time; without it a time before its predecessor is refused.
    format : str, optional
        One of :func:`trace_formats`; by default found from the header or the first character.
    characters_per_token : float
        For conversations, where a turn does not give its number of ``tokens`` [characters/token].
    block_tokens : int, optional
        Read ``hash_ids`` of format mooncake, the blocks of so many tokens that prompts begin with (the file does not
        say; 512 in the published ones); they are ignored by default [tokens].

    Returns
    -------
    Workload
        A format without times has all requests arrive at 0. Requests left out (failures of BurstGPT, conversations
        without an answer) are counted in ``source``.

    Raises
    ------
    InputError
        If the file is missing, not text, empty or of no known format, a column is missing, a value is not what it must
        be, or blocks are asked for and not named; the line is named.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
    ...     _ = file.write("arrived_at,num_prefill_tokens,num_decode_tokens\\n7.0,100,10\\n9.0,50,20\\n")
    ...     file.flush()
    ...     read_trace(file.name, rate=4.0).arrival.tolist()
    [0.0, 0.25]
    """
    path = Path(path)
    require(limit is None or limit >= 1, "limit", "must be at least 1 [requests]", limit)
    ok = math.isfinite(characters_per_token) and characters_per_token > 0
    require(ok, "characters_per_token", "must be finite and above 0 [characters/token]", characters_per_token)
    known = f"Known: {', '.join(trace_formats())}."
    require(format is None or format in _FORMATS, "format", "must be a known format of traces", format, known)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            name = format or _detect(file, path)
            rule = "must not be given for a trace whose format has no `hash_ids` [tokens]"
            require(block_tokens is None or name == "mooncake", "block_tokens", rule, block_tokens)
            ask = _Ask(path, limit, characters_per_token, block_tokens)
            columns = _FORMATS[name].read(file, ask, _FORMATS[name])
    except FileNotFoundError:
        refuse("trace", "must be a file that exists", str(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        refuse("trace", f"must be a readable text file ({error})", str(path))
    trace = _workload(columns, _FORMATS[name], sort, f"trace {path.name} ({name})", block_tokens)
    return trace if rate is None else at_rate(trace, rate)


def trace_formats() -> tuple[str, ...]:
    """Return the names of the formats that are read.

    Examples
    --------
    >>> trace_formats()
    ('vidur', 'azure', 'burstgpt', 'mooncake', 'sharegpt')
    """
    return tuple(_FORMATS)


# Which format


def _detect(file: TextIO, path: Path) -> str:
    """Return the format of a file from its header or its first character, and go back to its start."""
    first = next((line for line in file.read(CHUNK).splitlines() if line.strip()), "")  # all may be on one line
    file.seek(0)
    require(bool(first), "trace", "must hold a header and requests", str(path), "The file is empty.")
    if first.lstrip().startswith("["):
        return "sharegpt"
    if first.lstrip().startswith("{"):
        return "mooncake"
    header = _header(first)
    found = {name: len(set(_FORMATS[name].names) & set(header)) for name in _TABLES}
    nearest = max(found, key=lambda name: found[name])
    if found[nearest] < 3:
        refuse("trace", "must have the columns of a known format", first.strip(), _known(header, nearest))
    return nearest


def _header(line: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([line]))]


def _known(header: list[str], nearest: str) -> str:
    missing = [column for column in _FORMATS[nearest].names if column not in header]
    near = "" if len(missing) == 3 else f"As {nearest} it lacks {', '.join(missing)}. "
    tables = "; ".join(f"{name}: {', '.join(_FORMATS[name].names)}" for name in _TABLES)
    return f"{near}Known: {tables}; mooncake: JSON lines; sharegpt: a JSON list."


# Readers: text to raw cells


def _read_table(file: TextIO, ask: _Ask, format: _Format) -> _Columns:
    """Return the cells of a CSV with a header."""
    reader = csv.reader(file)
    header = [name.strip() for name in next((cells for cells in reader if _filled(cells)), [])]
    require(bool(header), "trace", "must hold a header and requests", str(ask.path), "The file is empty.")
    missing = [name for name in format.names if name not in header]
    rule = f"must have the columns {', '.join(format.names)}"
    require(not missing, "trace", rule, ",".join(header), f"Missing: {', '.join(missing)}.")
    columns = _Columns()
    arrival, prompt, output = (header.index(name) for name in format.names)
    width, kept = len(header), 0
    for cells in _rows(reader):
        if len(cells) != width and _filled(cells):
            refuse(f"trace line {reader.line_num}", f"must have {width} columns", ",".join(cells))
        if len(cells) != width or not (cells[output] or _filled(cells)):
            continue  # an empty line
        columns.lines.append(reader.line_num)
        columns.arrival.append(cells[arrival])
        columns.prompt.append(cells[prompt])
        columns.output.append(cells[output])
        kept += not (format.failures and cells[output].strip() == "0")
        if kept == ask.limit:
            break
    return columns


def _rows(reader: Any) -> Iterator[list[str]]:
    """Yield the rows of a CSV reader; what it cannot split is refused by its line."""
    try:
        yield from reader
    except csv.Error as error:
        refuse(f"trace line {reader.line_num}", "must be a row of a CSV file", str(error))


def _filled(cells: list[str]) -> bool:
    return any(cell.strip() for cell in cells)


def _read_lines(file: TextIO, ask: _Ask, format: _Format) -> _Columns:
    """Return the values of JSON lines."""
    columns = _Columns()
    for number, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            item = json.loads(text)
        except (ValueError, RecursionError):
            refuse(f"trace line {number}", "must be a JSON object", text.strip())
        values = [_value(item, name, number) for name in format.names]
        columns.lines.append(number)
        for column, value in zip((columns.arrival, columns.prompt, columns.output), values, strict=True):
            column.append(value)
        if ask.blocks is not None:
            columns.blocks.append(_names(item, number))
        if len(columns.lines) == ask.limit:
            break
    return columns


def _value(item: Any, name: str, line: int) -> float:
    """Return a number of a JSON object. Called for every value of a file: messages are made when needed."""
    value = item.get(name) if isinstance(item, dict) else None
    if type(value) is int or type(value) is float:
        return value
    require(isinstance(item, dict), f"trace line {line}", "must be a JSON object", item)
    require(name in item, f"trace line {line}", f"must have the key {name}", ", ".join(item))
    return refuse(f"trace line {line}, {name}", "must be a number", value)


def _names(item: Any, line: int) -> list[int]:
    """Return the names of the blocks of a prompt."""
    names = item.get("hash_ids")
    good = isinstance(names, list) and all(type(name) is int and 0 <= name < MOST for name in names)
    rule = "must be a list of whole numbers of at least 0 and less than 2^53"
    require(good, f"trace line {line}, hash_ids", rule, names)
    return list(names)


def _read_conversations(file: TextIO, ask: _Ask, format: _Format) -> _Columns:  # noqa: ARG001 as the other readers
    """Return the tokens of first prompts and first answers: ``tokens`` of a turn, or estimated from its text."""
    columns, unanswered, estimated = _Columns(), 0, False
    for number, item in _entries(file):
        require(isinstance(item, dict), f"trace line {number}", "must be a conversation, a JSON object", item)
        turns = item.get("conversations")
        require(isinstance(turns, list), f"trace line {number}, conversations", "must be a list of turns", turns)
        tokens = [_turn_tokens(turn, number, ask.characters) for turn in turns[:2]]
        if len(tokens) < 2 or 0 in tokens:
            unanswered += 1
            continue
        estimated = estimated or not all("tokens" in turn for turn in turns[:2])
        columns.lines.append(number)
        columns.prompt.append(tokens[0])
        columns.output.append(tokens[1])
        if len(columns.lines) == ask.limit:
            break
    if unanswered:
        columns.notes.append(f"{unanswered} left out without a first prompt and answer")
    if estimated:
        columns.notes.append(f"{ask.characters:g} characters a token (assumed)")
    return columns


def _turn_tokens(turn: Any, line: int, characters: float) -> float:
    require(isinstance(turn, dict), f"trace line {line}, conversations", "must hold objects", turn)
    if "tokens" in turn:
        return _value(turn, "tokens", line)
    text = turn.get("value")
    require(isinstance(text, str), f"trace line {line}, conversations", "must hold texts in `value`", text)
    return float(math.ceil(len(text) / characters))


def _entries(file: TextIO) -> Iterator[tuple[int, Any]]:
    """Yield the items of a JSON list and the line each begins on, holding little more than one of them at a time."""
    decoder, line, text, sign = json.JSONDecoder(), 1, "", "["
    while True:
        text, passed = _next_item(file, text, sign)
        line += passed
        if not text:
            return
        size = CHUNK
        while True:
            try:
                item, end = decoder.raw_decode(text)
                break
            except (ValueError, RecursionError):
                more = file.read(size)  # the item may go on
                require(bool(more), f"trace line {line}", "must begin a whole JSON value", text[:80])
                text, size = text + more, 2 * size
        yield line, item
        line, text, sign = line + text.count("\n", 0, end), text[end:], ","


def _next_item(file: TextIO, text: str, sign: str) -> tuple[str, int]:
    """Return the text from the next item on, "" at the end of the list, and how many line ends were passed over.

    ``sign`` is what must come first: the opening bracket, or the comma after an item.
    """
    passed, opening = 0, sign == "["
    while True:
        stripped = text.lstrip()
        passed += text.count("\n", 0, len(text) - len(stripped))
        text = stripped
        if text.startswith("]") and bool(sign) != opening:  # not where an item must follow a comma
            return "", passed
        if text and not sign:
            return text, passed
        if text:
            require(text.startswith(sign), "trace", f"must be a JSON list, with {sign!r} next", text[:80])
            text, sign = text[1:], ""
            continue
        text = file.read(CHUNK)
        require(bool(text), "trace", "must be a whole JSON list", "the end of the file")


_FORMATS = {
    "vidur": _Format(("arrived_at", "num_prefill_tokens", "num_decode_tokens"), _read_table),
    "azure": _Format(("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _read_table),
    "burstgpt": _Format(("Timestamp", "Request tokens", "Response tokens"), _read_table, failures=True),
    "mooncake": _Format(("timestamp", "input_length", "output_length"), _read_lines, unit=1e-3),
    "sharegpt": _Format(("", "prompt", "answer"), _read_conversations),
}
_TABLES = tuple(name for name, format in _FORMATS.items() if format.read is _read_table)


# Raw cells to a workload


def _workload(columns: _Columns, format: _Format, sort: bool, source: str, block: int | None) -> Workload:
    lines = columns.lines
    require(bool(lines), "trace", "must hold at least one request", source, "There are none in it.")
    _, prompt_name, output_name = format.names
    prompt = _tokens(columns.prompt, prompt_name, lines, least=1)
    output = _tokens(columns.output, output_name, lines, least=0 if format.failures else 1)
    arrival = _times(columns.arrival, format.names[0], lines) * format.unit if columns.arrival else np.zeros(len(lines))
    blocks = None if block is None else _blocks(columns, block, prompt)
    if sort:
        order = np.argsort(arrival, kind="stable")
        arrival, prompt, output = arrival[order], prompt[order], output[order]
        blocks = None if blocks is None else blocks.take(order)
    _check_order(arrival, lines)
    served = output > 0
    failed = int(np.count_nonzero(~served))
    require(failed < served.size, "trace", "must hold at least one request that was answered", f"{failed} failures")
    notes = [f"{source}, {served.size - failed} requests", *columns.notes]
    notes += [f"{failed} failures left out (0 {output_name.lower()})"] if failed else []
    arrival = arrival[served]
    return Workload(arrival - arrival[0], prompt[served], output[served], ", ".join(notes), blocks=blocks)


def _blocks(columns: _Columns, tokens: int, prompt: Floats) -> PromptBlocks:
    """Return the blocks of the prompts; a prompt that has fewer than are named is refused by its line."""
    blocks = PromptBlocks.of(tokens, columns.blocks)
    bad = blocks.counts > np.ceil(prompt / tokens)
    if bad.any():
        i = int(np.argmax(bad))
        rule = f"must be at most {math.ceil(prompt[i] / tokens)} blocks of {tokens} tokens"
        refuse(f"trace line {columns.lines[i]}, hash_ids", rule, len(columns.blocks[i]), "Give the trace's own length.")
    return blocks


def _tokens(cells: list[Any], name: str, lines: list[int], least: int) -> Floats:
    tokens = _floats(cells)
    with np.errstate(invalid="ignore"):
        bad = ~((tokens >= least) & (tokens < MOST) & (tokens == np.floor(tokens)))
    if bad.any():
        at = int(np.argmax(bad))
        rule = f"must be a whole number of at least {least} and less than 2^53 [tokens]"
        refuse(f"trace line {lines[at]}, {name}", rule, cells[at], "Mend or drop this line.")
    return tokens


def _floats(cells: list[Any]) -> Floats:
    """Return cells as numbers, nan where they are none."""
    try:
        return np.array(cells, dtype=np.float64)
    except (ValueError, OverflowError):
        return np.array([_float(cell) for cell in cells])


def _float(cell: Any) -> float:
    try:
        return float(cell)
    except (ValueError, OverflowError):
        return math.nan


def _times(cells: list[Any], name: str, lines: list[int]) -> Floats:
    """Return times in the unit of the format; dates as seconds since the first of them, to the microsecond."""
    if isinstance(cells[0], str) and math.isnan(_float(cells[0])):
        return _dates(cells, name, lines)
    times = _floats(cells)
    bad = ~(np.isfinite(times) & (times >= 0))
    if bad.any():
        _refuse_time(int(np.argmax(bad)), cells, name, lines)
    return times


def _dates(cells: list[str], name: str, lines: list[int]) -> Floats:
    seconds, first = np.empty(len(cells)), None
    for i, cell in enumerate(cells):
        try:
            date = datetime.fromisoformat(cell.strip())
        except ValueError:
            _refuse_time(i, cells, name, lines)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        first = first or date
        seconds[i] = (date - first).total_seconds()
    return seconds


def _refuse_time(at: int, cells: list[Any], name: str, lines: list[int]) -> NoReturn:
    refuse(f"trace line {lines[at]}, {name}", "must be a time of at least 0 or a date", cells[at], "Mend this line.")


def _check_order(arrival: Floats, lines: list[int]) -> None:
    back = np.flatnonzero(np.diff(arrival) < 0)
    if back.size:
        i = int(back[0])
        rule = f"must not be before line {lines[i]} ({arrival[i]:.6f} s)"
        way_out = "Sort the file by time; in Python, pass sort=True."
        refuse(f"trace line {lines[i + 1]}, arrival", rule, float(arrival[i + 1]), way_out)

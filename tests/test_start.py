"""What a person waits for at the shell: a warm start, and a word about it when the engine has to be compiled."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from simulator.engine import is_compiled

WORDS = [sys.executable, "-m", "tierwise", "simulate"]
BAR = 3.0  # [s]


def processor_seconds(words: list[str]) -> float:
    """Return what a command and its children use: other work on the machine does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, capture_output=True, check=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_shipped_scenario_is_simulated_within_three_seconds() -> None:
    """Once the engine is compiled, as it is after the first run."""
    subprocess.run([*WORDS, "--set", "traffic.requests=100"], capture_output=True, check=True, timeout=600)
    assert is_compiled()
    assert min(processor_seconds(WORDS) for _ in range(3)) < BAR


def test_the_first_run_says_that_it_compiles(tmp_path: Path) -> None:
    """To a person at a terminal: nobody is there to read it otherwise."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    reader, terminal = os.openpty()
    words = [*WORDS, "--set", "traffic.requests=100"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=terminal, env=environment) as process:
        said = os.read(reader, 1000).decode()
        process.kill()
    for end in (reader, terminal):
        os.close(end)
    assert "compiling the simulator, once" in said

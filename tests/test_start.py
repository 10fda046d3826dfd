"""What a person waits for at the shell: nothing is compiled twice, and a word is said when something has to be.

How long a warm start takes is measured, on a machine that does nothing else, by studies/engine_speed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from simulator.engine import is_compiled

WORDS = [sys.executable, "-m", "tierwise", "simulate", "--set", "traffic.requests=100"]


def test_the_second_run_compiles_nothing() -> None:
    """No file of the cache is written again."""
    folder = Path(__file__).parents[1] / "simulator" / "__pycache__"
    written = []
    for _ in range(2):
        subprocess.run(WORDS, capture_output=True, check=True, timeout=900)
        written.append({file.name: file.stat().st_mtime_ns for file in folder.glob("*.nb*")})
    assert is_compiled()
    assert written[0] == written[1]
    assert any("_run-" in name for name in written[0])


def test_the_first_run_says_that_it_compiles(tmp_path: Path) -> None:
    """To a person at a terminal: nobody is there to read it otherwise."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    reader, terminal = os.openpty()
    with subprocess.Popen(WORDS, stdout=subprocess.PIPE, stderr=terminal, env=environment) as process:
        said = os.read(reader, 1000).decode()
        process.kill()
    for end in (reader, terminal):
        os.close(end)
    assert "compiling the simulator, once" in said

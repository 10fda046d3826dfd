"""Write the outputs in README.md: each command after ``<!-- run -->`` is executed and its output put beneath it.

    python studies/readme.py            rewrite README.md
    python studies/readme.py --check    exit 1 if README.md says something else than the commands do

Numbers may differ by 2 % between machines (order of additions), times spent computing by anything.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- run -->\n```console\n\$ )([^\n]+)\n(.*?)(```)", re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")
SPENT = re.compile(r"\([\d.]+ s; step times|engine [\d.]+ s")  # how long the computation took
TOLERANCE = 0.02  # relative difference of numbers between machines [-]


def output(command: str) -> str:
    """Return what a command prints, run with the Python at hand."""
    words = shlex.split(command)
    if words[0] == "tierwise":
        words = [sys.executable, "-m", "tierwise", *words[1:]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=README.parent, check=False)
    if done.returncode:
        raise SystemExit(f"README: `{command}` left with {done.returncode}: {done.stderr}")
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()) + "\n"


def same(said: str, found: str) -> bool:
    """Return whether two outputs agree: the same words, the same numbers within the tolerance."""
    said, found = SPENT.sub("", said), SPENT.sub("", found)
    if re.sub(r"\s+", " ", NUMBER.sub("#", said)) != re.sub(r"\s+", " ", NUMBER.sub("#", found)):
        return False
    pairs = zip(NUMBER.findall(said), NUMBER.findall(found), strict=True)
    return all(abs(float(a) - float(b)) <= TOLERANCE * max(abs(float(a)), abs(float(b))) for a, b in pairs)


def main() -> int:
    """Rewrite or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text, wrong = README.read_text(encoding="utf-8"), []
    for head, command, said, tail in BLOCK.findall(text):
        found = output(command)
        if not same(said, found):
            wrong.append(command)
        text = text.replace(f"{head}{command}\n{said}{tail}", f"{head}{command}\n{found}{tail}")
    if not check:
        README.write_text(text, encoding="utf-8")
        return 0
    for command in wrong:
        sys.stderr.write(f"README: `{command}` prints something else now; run python studies/readme.py\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

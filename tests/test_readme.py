"""README is true: its commands run and print what it says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines() if line]


def test_outputs_are_what_the_commands_print() -> None:
    command = [sys.executable, str(ROOT / "docs" / "tools" / "printed.py"), "--check", str(ROOT / "README.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("tierwise ")])
def test_commands_run(line: str, tmp_path: Path) -> None:
    words = [w.replace("out/", f"{tmp_path}/") for w in shlex.split(line.split(" #")[0])]
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_python_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", TEXT))))
def test_links_lead_somewhere(target: str) -> None:
    assert target.startswith("http") or (ROOT / target).exists()


@pytest.mark.parametrize("name", ["least", "mine"])
def test_yaml_examples_are_planned(name: str, tmp_path: Path) -> None:
    """With what a new user brings in the place of the paths: the config.json of a model and a trace."""
    blocks = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (block,) = (b for b in blocks if b.startswith(f"name: {name}\n"))
    config = {"model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 36}
    config |= {"num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256}
    config |= {"max_position_embeddings": 32768, "tie_word_embeddings": True}
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "config.json").write_text(json.dumps(config))
    rows = [f"{0.1 * i:.1f},{200 + 37 * (i % 50)},{20 + 11 * (i % 30)}" for i in range(1500)]
    (tmp_path / "requests.csv").write_text("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *rows]))
    (tmp_path / f"{name}.yaml").write_text(block)
    command = [sys.executable, "-m", "tierwise", "plan", str(tmp_path / f"{name}.yaml")]
    command += [] if name == "least" else ["--set", "traffic.requests=3000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Run " in done.stdout

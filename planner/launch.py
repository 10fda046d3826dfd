"""A plan as files to run: vLLM launch scripts, the commands that would measure it, the scenario it answers.

Arguments and the fields of ``--speculative-config`` are those of vLLM 0.26 (docs.vllm.ai: `vllm serve`,
`vllm bench serve`, `vllm.config.speculative`, dynamic speculative decoding); a test lists them.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from theory.catalog import hub

from .policy import policy
from .scenario import Scenario

FIRST_PORT = 8000
MEASURED_S = 600.0  # a measurement lasts about so long [s]
PROMPTS = (200, 5000)  # least and most requests of a measurement [-]
WIDEST = 0.99  # of --random-range-ratio, which must stay below 1 [-]


def launch_files(result: dict[str, Any], scenario: Scenario, folder: Path, output: Path) -> dict[str, str]:
    """Return the texts of launch-TIER.sh, bench.sh, policy.json and scenario.yaml by file name.

    Parameters
    ----------
    result : dict
        The JSON of ``tierwise plan``.
    folder : Path
        Where relative paths of the scenario start.
    output : Path
        Where the files will lie; relative paths of the written scenario start there.
    """
    tiers = result["plan"]["tiers"]
    ports, gpus = _ports(tiers), _gpus(tiers)
    names = _file_names([t["name"] for t in tiers])
    files = {
        f"launch-{name}.sh": launch_script(result, scenario, tier, list(zip(gpus[i], ports[i], strict=True)))
        for i, (tier, name) in enumerate(zip(tiers, names, strict=True))
    }
    endpoints = {
        t["name"]: [f"http://localhost:{port}/v1" for port in of_tier] for t, of_tier in zip(tiers, ports, strict=True)
    }
    files["policy.json"] = json.dumps(policy(result, endpoints), indent=2, allow_nan=False) + "\n"
    files["bench.sh"] = bench_script(result, scenario, [of_tier[0] for of_tier in ports])
    files["scenario.yaml"] = resolved(scenario, result["provenance"]["seed"], folder, output)
    return files


def _ports(tiers: list[dict[str, Any]]) -> list[list[int]]:
    free = iter(range(FIRST_PORT, FIRST_PORT + sum(t["replicas"] for t in tiers)))
    return [[next(free) for _ in range(t["replicas"])] for t in tiers]


def _gpus(tiers: list[dict[str, Any]]) -> list[list[str]]:
    """Return CUDA_VISIBLE_DEVICES of each replica: GPUs of one node, handed out in order."""
    free = iter(range(sum(t["gpus"] for t in tiers)))
    return [[",".join(str(next(free)) for _ in range(t["tp"])) for _ in range(t["replicas"])] for t in tiers]


def _file_names(tiers: list[str]) -> list[str]:
    slugs = [re.sub(r"[^\w.-]+", "-", name) for name in tiers]
    return [slug if slugs.count(slug) == 1 else f"{i}-{slug}" for i, slug in enumerate(slugs)]


def speculative_config(tier: dict[str, Any]) -> dict[str, Any] | None:
    """Return vLLM's ``--speculative-config`` of a tier but for the draft's name; None without a draft or a length.

    ``num_speculative_tokens`` is the longest draft of the schedule; ``num_speculative_tokens_per_batch_size`` is left
    out when the length is the same at every batch size.

    Examples
    --------
    >>> tier = {"draft": "d", "tp": 2, "schedule": [[1, 8, 3], [9, 256, 0]], "draft_shares_vocabulary": True}
    >>> speculative_config(tier)["num_speculative_tokens_per_batch_size"]
    [[1, 8, 3], [9, 256, 0]]
    """
    longest = max((length for _, _, length in tier["schedule"]), default=0)
    if tier["draft"] is None or longest == 0:
        return None
    config: dict[str, Any] = {
        "method": "draft_model",
        "num_speculative_tokens": longest,
        "draft_tensor_parallel_size": tier["tp"],  # vLLM refuses any other for draft models
    }
    if not tier["draft_shares_vocabulary"]:
        config["use_heterogeneous_vocab"] = True
    if len({length for _, _, length in tier["schedule"]}) > 1:
        config["num_speculative_tokens_per_batch_size"] = [list(r) for r in tier["schedule"]]
    return config


def serve_arguments(result: dict[str, Any], scenario: Scenario, tier: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the arguments of ``vllm serve`` that all replicas of a tier share, but for its speculative config."""
    engine = scenario.engine
    arguments = [
        ("--served-model-name", tier["name"]),
        ("--tensor-parallel-size", str(tier["tp"])),
        ("--dtype", "bfloat16"),
        ("--max-model-len", str(result["traffic"]["max_tokens"])),
        ("--max-num-seqs", str(engine.max_num_seqs)),
        ("--max-num-batched-tokens", str(engine.max_num_batched_tokens)),
        ("--gpu-memory-utilization", f"{engine.gpu_memory_utilization:g}"),
        ("--block-size", str(engine.block_size)),
    ]
    if tier["precision"] == "fp8":
        arguments.append(("--quantization", "fp8"))
    if tier["kv_precision"] == "fp8":
        arguments.append(("--kv-cache-dtype", "fp8"))
    return arguments


def launch_script(
    result: dict[str, Any], scenario: Scenario, tier: dict[str, Any], places: list[tuple[str, int]]
) -> str:
    """Return the shell script that starts the replicas of a tier, each on its GPUs and port."""
    config = speculative_config(tier)
    lines = [
        "#!/usr/bin/env bash",
        *_comments(
            f"{result['scenario']}: tier {tier['name']}, {tier['replicas']} x {tier['model']} at TP {tier['tp']}"
        ),
        *_comments("For vLLM 0.26. Weights: the base model of these dimensions; set MODEL to the one you measured."),
        *(line for said in _cautions(tier, config, scenario) for line in _comments(said)),
        "set -euo pipefail",
        _variable("MODEL", tier["model"]),
    ]
    arguments = [f"{flag} {shlex.quote(value)}" for flag, value in serve_arguments(result, scenario, tier)]
    if config is not None:
        lines.append(_variable("DRAFT", tier["draft"]))
        # the draft's name is put in by the shell: it may be set from outside
        text = shlex.quote(json.dumps({"model": "@DRAFT@", **config})).replace("@DRAFT@", "'\"$DRAFT\"'")
        arguments.append(f"--speculative-config {text}")
    body = " \\\n    ".join(['CUDA_VISIBLE_DEVICES="$1" vllm serve "$MODEL" --port "$2"', *arguments])
    lines += ["", "serve() { # GPUs, port", f"  {body}", "}", ""]
    lines += [f"serve {gpus} {port} &" for gpus, port in places]
    return "\n".join([*lines, "wait", ""])


def _comments(text: str) -> list[str]:
    return ["# " + " ".join(text.split())]


def _variable(name: str, model: str) -> str:
    """Return a shell line that sets a model's name, unless it is set; where we know none it must be."""
    known = hub(model)
    if known is not None:
        return f'{name}="${{{name}:-{known}}}"'
    return f'{name}="${{{name}:?set it to the Hugging Face id or folder of {re.sub(r"[^A-Za-z0-9._ -]", "", model)}}}"'


def _cautions(tier: dict[str, Any], config: dict[str, Any] | None, scenario: Scenario) -> list[str]:
    """Return what these arguments cannot say, or what vLLM does otherwise."""
    said = []
    if scenario.engine.preset not in (None, "vllm"):
        said.append(f"The plan is for {scenario.engine.preset}; these commands are vLLM's.")
    if config is None:
        return said
    if tier["draft_tp"] != tier["tp"]:
        said.append(
            f"The plan runs the draft on {tier['draft_tp']} of {tier['tp']} GPUs; vLLM starts draft models only on as "
            "many as the target, so the draft's steps will take another time than predicted."
        )
    if "num_speculative_tokens_per_batch_size" in config:
        said.append(
            "vLLM tests batch-size schedules with Eagle and DFlash heads; if it does not take one with a draft model, "
            "leave num_speculative_tokens_per_batch_size out."
        )
    if "use_heterogeneous_vocab" in config:
        said.append("Draft and target have vocabularies of different size: vLLM drafts tokens they share.")
    return said


def bench_script(result: dict[str, Any], scenario: Scenario, ports: list[int]) -> str:
    """Return the shell script that measures one replica of each tier at the rate and lengths of the plan.

    ``vllm bench serve`` draws lengths uniformly: means are those of the traffic, the spread of outputs as near to it as
    a uniform law comes. Escalation is not in it: each tier gets the requests per second that reach one replica of it.
    """
    traffic, slo = result["traffic"], scenario.slo
    prompt, output = round(traffic["prompt_tokens_mean"]), max(round(traffic["output_tokens_mean"]), 1)
    room = traffic["max_tokens"] / (prompt + output) - 1
    ratio = max(min(math.sqrt(3) * traffic["output_tokens_cv"], room, WIDEST), 0.0)
    lines = [
        "#!/usr/bin/env bash",
        *_comments(f"{result['scenario']}: measures one replica of each tier as the plan loads it. vLLM 0.26."),
        *_comments("Lengths are uniform about the means of the traffic; the plan's are not, so expect other tails."),
        "set -euo pipefail",
        'OUT="${OUT:-measured}"',
    ]
    names = _file_names([t["name"] for t in result["plan"]["tiers"]])
    for i, (tier, port) in enumerate(zip(result["plan"]["tiers"], ports, strict=True)):
        rate = tier["requests_per_s_per_replica"]
        count = int(min(max(MEASURED_S * rate, PROMPTS[0]), PROMPTS[1]))
        own = result["predicted"]["tiers"][i]
        arguments = [
            ("--backend", "openai"),
            ("--base-url", f"http://localhost:{port}"),
            ("--served-model-name", tier["name"]),
            ("--dataset-name", "random"),
            ("--random-input-len", str(prompt)),
            ("--random-output-len", str(output)),
            ("--random-range-ratio", f"{ratio:.2f}"),
            ("--request-rate", f"{rate:.6g}"),
            ("--burstiness", f"{_burstiness(scenario):g}"),
            ("--num-prompts", str(count)),
            ("--seed", str(result["provenance"]["seed"])),
            ("--percentile-metrics", "ttft,tpot,itl,e2el"),
            ("--metric-percentiles", "50,90,99"),
            ("--result-filename", f"{names[i]}.json"),
        ]
        command = [f"{flag} {shlex.quote(value)}" for flag, value in arguments]
        command += [
            f"--goodput ttft:{1000 * slo.ttft_p99_s:g} tpot:{1000 * slo.tpot_mean_s:g}",
            '--result-dir "$OUT"',
            "--ignore-eos",
            "--save-result",
        ]
        lines += [
            "",
            *_comments(
                f"predicted for {tier['name']}: mean TPOT {1000 * own['tpot_mean_s']:.3g} ms, "
                f"p99 TTFT {1000 * own['ttft_p99_s']:.3g} ms, mean batch {own['mean_batch']:.3g}"
            ),
            _variable(f"MODEL_{i + 1}", tier["model"]),
            f'vllm bench serve --model "$MODEL_{i + 1}" \\\n  ' + " \\\n  ".join(command),
        ]
    return "\n".join([*lines, ""])


def _burstiness(scenario: Scenario) -> float:
    """Return vLLM's burstiness, the shape of its gamma law: 1 / cv^2 of the gaps; 1 (Poisson) for other laws."""
    law = scenario.traffic.arrivals
    return 1 / law.cv**2 if law is not None and law.kind == "gamma" and law.cv else 1.0


def resolved(scenario: Scenario, seed: int, folder: Path, output: Path) -> str:
    """Return the scenario as YAML with every override and the seed in it; planning it again gives the same plan.

    Paths are written relative to the folder the file will lie in, so both can be moved together.
    """
    data = scenario.model_dump(mode="json", exclude_unset=True)
    data.setdefault("search", {})["seed"] = seed
    for pool in data["fleet"] if isinstance(data["fleet"], list) else [data["fleet"]]:
        profile = pool.get("profile")
        if profile is not None and profile.endswith(".toml"):  # a path from where the command was given
            pool["profile"] = os.path.abspath(profile)

    def beside(name: str) -> str:
        path = folder / name
        return os.path.relpath(path.resolve(), output.resolve()) if path.exists() else name

    for tier in data["tiers"]:
        tier["model"] = beside(tier["model"])
        for draft in tier.get("drafts", []):
            draft["model"] = beside(draft["model"])
    if data["traffic"].get("trace") is not None:
        data["traffic"]["trace"] = beside(data["traffic"]["trace"])
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    return text

"""Fit the profiles that are shipped in calibration/profiles, each from the kernel tables its header names.

    python studies/latency_profiles/run.py --data DIR [--quick] [--output DIR]

DIR holds `vidur` and `aiconfigurator`. --quick fits on a fifth of the matrix products and writes nothing unless told
where.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import block_diag

from calibration.fit import BLOCKS, fit_profile
from calibration.profiles import FOLDER, save_profile
from calibration.readers import (
    Kernels,
    empty_kernels,
    read_aiconfigurator,
    read_vidur,
    read_vidur_layers,
    select,
    serving_rows,
)
from studies.study import Data, Study
from theory.catalog import accelerator
from theory.latency import Efficiency, Profile

HERE = Path(__file__).parent
SHARP = Efficiency(gemm_knee=8.0)  # vLLM's products show a sharp knee; held, since the fit tells little about it
DATE = "2026-11-29"  # of the fit
VIDUR = "microsoft/vidur commit 7d47513 (MIT), cuBLAS fp16 and NCCL; attention: vLLM 0.14.0 by ai-dynamo/aiconfigurator"
AIC = "ai-dynamo/aiconfigurator 0.12.0 (Apache-2.0), vLLM 0.24.0"
TRTLLM = "trtllm-1.3.0rc20"  # engine of the bf16 products


def only(kernels: Kernels, name: str) -> Kernels:
    """Return ``kernels`` with nothing but one table."""
    return empty_kernels(kernels.device, f"{kernels.source} ({name})", **{name: getattr(kernels, name)})


def thin(kernels: Kernels, every: int) -> Kernels:
    """Return ``kernels`` with each ``every``-th matrix product."""
    return select(kernels, gemm=kernels.gemm.index % every == 0)


def fp8_rows(data: Path, device: str) -> Kernels:
    """Return the fp8 products of a device."""
    table = serving_rows(read_aiconfigurator(data / "aiconfigurator", device))
    return only(select(table, gemm=table.gemm["precision"] == "fp8"), "gemm")


def served(profile: Profile) -> Profile:
    """Return the profile with a KV cache that never stays in the last-level cache: weights pass through between."""
    said = f"{profile.rows}; kv_resident set to 0, as in an engine (kernels were timed one by one)"
    return replace(profile, efficiency=replace(profile.efficiency, kv_resident=0.0), rows=said)


def profiles(data: Path, every: int) -> list[Profile]:
    """Return the six profiles."""
    vidur, aic = data / "vidur", data / "aiconfigurator"
    h100, h200, a100 = (accelerator(n) for n in ("h100-sxm", "h200-sxm", "a100-80g-sxm"))
    elements = only(read_vidur_layers(vidur, "h100"), "elementwise")
    cublas = thin(read_vidur(vidur, "h100").join(fp8_rows(data, "h100")), every)
    vllm = thin(serving_rows(read_aiconfigurator(aic, "h100")).join(elements), every)
    first = fit_profile(cublas, h100, "h100-sxm", "cuBLAS + NCCL kernels", source=f"{VIDUR}; fp8: {AIC}", date=DATE)
    second = fit_profile(
        vllm,
        h100,
        "h100-sxm-vllm",
        "vLLM kernels under CUDA graphs",
        SHARP,
        ("gemm_knee",),
        f"{AIC}; element-wise: {VIDUR}",
        DATE,
    )
    start = replace(second.efficiency, down_boost=1.0)  # element-wise work: not measured on an H200, carried over
    wider = serving_rows(read_aiconfigurator(aic, "h200"))
    third = fit_profile(
        thin(wider, every), h200, "h200-sxm", "vLLM kernels under CUDA graphs", start, ("gemm_knee",), AIC, DATE
    )
    last = fit_profile(
        thin(read_vidur(vidur, "a100"), every), a100, "a100-80g-sxm", "cuBLAS + NCCL kernels", source=VIDUR, date=DATE
    )
    of_vllm = [served(second), served(third)]
    own = [with_products(aic, d, p, every) for d, p in zip(("h100", "h200"), of_vllm, strict=True)]
    return [first, *of_vllm, *own, last]


def with_products(folder: Path, device: str, profile: Profile, every: int) -> Profile:
    """Return the profile of a device with bf16 products fitted to TensorRT-LLM's in the place of vLLM's."""
    table = serving_rows(read_aiconfigurator(folder, device, TRTLLM, fp8=False))
    gpu = accelerator(profile.accelerator)
    start = replace(profile.efficiency, down_boost=1.0)
    fit = fit_profile(thin(only(table, "gemm"), every), gpu, f"{gpu.name}-trtllm", "", start, ("gemm_knee",))
    products = next(b for b in BLOCKS if b.name == "gemm").parameters
    rest = [i for i, p in enumerate(profile.parameters) if p not in products]
    covariance = block_diag(fit.covariance, np.array(profile.covariance)[np.ix_(rest, rest)])
    return replace(
        fit,
        engine="TensorRT-LLM bf16 products; fp8, attention and all-reduces of vLLM",
        parameters=(*fit.parameters, *(profile.parameters[i] for i in rest)),
        covariance=tuple(tuple(map(float, row)) for row in covariance),
        residual=dict(profile.residual) | {"gemm": fit.residual["gemm"]},
        allreduce=profile.allreduce,
        rows=f"{fit.rows.split(';')[0]}; all else: as {profile.name}, which says {profile.rows}",
        source=f"{profile.source}; bf16 products: TensorRT-LLM 1.3.0rc20 by ai-dynamo/aiconfigurator 0.12.0",
        date=DATE,
    )


def analyse(given: argparse.Namespace) -> dict[str, Any]:
    """Return what was fitted; write the profiles into calibration/profiles, or into --output."""
    found = profiles(given.data, 5 if given.quick else 1)
    target = given.output or (None if given.quick else FOLDER)
    for profile in found:
        if target is not None:
            save_profile(profile, target / f"{profile.name}.toml")
    return {"profiles": [table(p) for p in found]}


def table(profile: Profile) -> dict[str, Any]:
    """Return the parameters of a profile with their relative standard errors, and what they were fitted on."""
    errors = dict(
        zip(profile.parameters, (profile.covariance[k][k] ** 0.5 for k in range(len(profile.parameters))), strict=True)
    )
    return {
        "name": profile.name,
        "parameters": {
            f.name: {"value": getattr(profile.efficiency, f.name), "relative_error": errors.get(f.name)}
            for f in fields(Efficiency)
        },
        "spread": dict(profile.residual),
        "rows": profile.rows,
        "source": profile.source,
    }


def readme(result: dict[str, Any]) -> str:
    """Return the page of this study: what was fitted, on what, how well it is known."""
    found = result["profiles"]
    lines = [
        "# The shipped profiles",
        "",
        "Written by `python studies/latency_profiles/run.py --data DIR`, which fits the profiles in",
        "`calibration/profiles` (about two minutes). Meaning and unit of each parameter: `Efficiency` in",
        "`theory/latency.py`. A value without an error was held or assumed; each file says which.",
        "",
        f"| parameter | {' | '.join(p['name'] for p in found)} |",
        f"|---|{'---|' * len(found)}",
    ]
    for f in fields(Efficiency):
        lines.append(f"| {f.name} | {' | '.join(_value(p['parameters'][f.name]) for p in found)} |")
    lines += ["", "## Spread of ln(measured/predicted) of one kernel, on shapes left out of the fit", ""]
    lines += [f"- {p['name']}: {', '.join(f'{k} {v:.3f}' for k, v in p['spread'].items())}" for p in found]
    lines += ["", "## Rows", "", *(f"- {p['name']}: {p['rows']}" for p in found), ""]
    lines += ["## Sources", "", *(f"- {p['name']}: {p['source']}" for p in found), ""]
    return "\n".join(lines)


def _value(parameter: dict[str, float | None]) -> str:
    error = parameter["relative_error"]
    return f"{parameter['value']:.3g}" + ("" if error is None else f" ({error:.1%})")


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    spreads = [v for p in result["profiles"] for v in p["spread"].values()]
    return f"one kernel on shapes left out is off by {min(spreads):.1%} to {max(spreads):.1%} (spread of the logarithm)"


STUDY = Study(
    __file__,
    __doc__,
    analyse,
    readme,
    headline,
    bars=lambda _: [],
    n=lambda result: len(result["profiles"]),
    data=Data(".", ("vidur", "aiconfigurator")),
    quick="a fifth of the products",
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

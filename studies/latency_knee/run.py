"""Claim: the law has the verify knee: an H100 product 8192 x 8192 takes 46, 51, 87 us at 8, 256, 512 tokens.

    python studies/latency_knee/run.py --data DIR

DIR holds `aiconfigurator` and `speculation`. Nothing is fitted here: the profile is h100-sxm-vllm. It takes seconds.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd

mpl.use("Agg")
import matplotlib.pyplot as plt

from calibration.profiles import load_profile, transfer
from calibration.readers import read_aiconfigurator
from studies.study import Bar, Data, Study, Validation
from theory.catalog import accelerator, model
from theory.latency import Pass, gemm_time, step_time, verify_knee

HERE = Path(__file__).parent
BAR = 0.06  # largest error of the product at 8, 256 and 512 tokens [-]
WIDTH = 8192  # n and k of the product [-]
TOKENS = (8, 256, 512)
CASES = (("llama-3.1-8b", 1), ("llama-2-13b", 1), ("codellama-34b", 2), ("llama-2-70b", 4))  # model, TP of the knees
L40_FLOPS = 181.05e12  # dense bf16; NVIDIA L40 datasheet (2022); memory, SMs and cache are those of the L40S [FLOP/s]
CONTEXT = 1024.0  # of the knees [tokens]


def product(data: Path) -> pd.DataFrame:
    """Return measured and predicted times of the product by tokens [s]."""
    table = read_aiconfigurator(data / "aiconfigurator", "h100", fp8=False).gemm
    rows = table[(table["n"] == WIDTH) & (table["k"] == WIDTH) & (table["m"] <= 2048)].sort_values("m")
    gpu, e = accelerator("h100-sxm"), load_profile("h100-sxm-vllm").efficiency
    return rows.assign(predicted=gemm_time(rows["m"], rows["n"], rows["k"], gpu, e))[["m", "time", "predicted"]]


def knees() -> list[dict[str, Any]]:
    """Return batch x (gamma + 1) from which a verify pass costs 20 % more than a decode step, by model."""
    gpu, profile = accelerator("h100-sxm"), load_profile("h100-sxm-vllm")
    return [
        {"model": name, "tp": tp, "context": CONTEXT, "gamma": g}
        | {"tokens": verify_knee(model(name), gpu, profile, CONTEXT, tp, query=g + 1.0)}
        for name, tp in CASES
        for g in (3, 7)
    ]


def published(data: Path) -> list[dict[str, Any]]:
    """Return measured and predicted cost of more query tokens, relative to one, of the rows on known hardware."""
    table = pd.read_csv(data / "speculation" / "verify_latency.csv")
    rows = table[table["hardware"].eq("L40") & table["model"].isin(["Llama-2-7B", "Llama-2-13B"])]
    gpu = replace(accelerator("l40s"), name="l40", flops_bf16=L40_FLOPS)
    profile = transfer(load_profile("h100-sxm-vllm"), gpu)
    names = {"Llama-2-7B": "llama-2-7b", "Llama-2-13B": "llama-2-13b"}
    out = []
    for name, part in rows.groupby("model"):
        work = Pass(part["batch_size"], part["n_query_tokens"], part["prefix_len"])
        time = step_time(model(names[str(name)]), gpu, profile, work).total
        for q, t, p in zip(part["n_query_tokens"], part["latency_ms"], time, strict=True):
            first = (part["latency_ms"].iloc[0], time[0])
            out.append(
                {
                    "model": str(name),
                    "query": int(q),
                    "measured_ms": float(t),
                    "predicted_ms": round(float(p) * 1e3, 3),
                    "measured_ratio": round(float(t / first[0]), 4),
                    "predicted_ratio": round(float(p / first[1]), 4),
                }
            )
    return out


def analyse(data: Path, pictures: Path | None) -> dict[str, Any]:
    """Return the numbers; draw the picture into a folder."""
    table = product(data)
    points = {
        int(m): {"measured_us": round(t * 1e6, 2), "predicted_us": round(p * 1e6, 2), "error": round(p / t - 1, 4)}
        for m, t, p in table.itertuples(index=False)
        if m in TOKENS
    }
    error = np.abs(table["predicted"] / table["time"] - 1)
    if pictures is not None:
        draw(table, pictures / "knee.png")
    return {
        "product": points,
        "mape_up_to_2048_tokens": round(float(error.mean()), 4),
        "knees": knees(),
        "published": published(data),
    }


def draw(table: pd.DataFrame, path: Path) -> None:
    """Write the picture of the knee."""
    figure, axis = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    axis.loglog(table["m"], table["time"] * 1e6, ".", label="measured (vLLM 0.24)")
    axis.loglog(table["m"], table["predicted"] * 1e6, "-", label="law, profile h100-sxm-vllm")
    axis.set_xlabel("tokens")
    axis.set_ylabel("time [us]")
    axis.set_title(f"H100, bf16 product {WIDTH} x {WIDTH}")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def readme(result: dict[str, Any]) -> str:
    """Return the page of this study."""
    lines = [
        "# The verify knee",
        "",
        "**Claim.** An H100 product of width and depth 8192 takes 46, 51 and 87 us at 8, 256 and 512 tokens; the law",
        "says so within 6%.",
        "",
        f"**Verdict: {'holds' if holds(result) else 'does not hold at every point'}.**",
        "",
        "Written by `python studies/latency_knee/run.py --data DIR`, which exits with 1 if a point is missed.",
        "",
        "| tokens | measured [us] | law [us] | error |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {m} | {p['measured_us']} | {p['predicted_us']} | {p['error']:+.1%} |" for m, p in result["product"].items()
    ]
    lines += [
        "",
        f"Over all token counts up to 2048 the MAPE at this shape is {result['mape_up_to_2048_tokens']:.1%}.",
        "The law is fitted to all widths and depths from 1024 to 16384, and this shape streams its weights faster than",
        "most: 128 tiles of 64 columns nearly fill one wave of 132 SMs, where a width of 10240 or 12288 ends in a wave",
        "with too few readers. The measured times at up to 17 tokens fall into two groups, 46 and 54 us; the law lies",
        "between them, nearer the first.",
        "The exponent of the knee is held at 8: a free fit is rounder, hardly better over all shapes, worse here.",
        "",
        "![knee](knee.png)",
        "",
        "## Where a verify pass costs 20% more than a decode step",
        "",
        f"H100, context {CONTEXT:.0f}, batch x (gamma + 1) [tokens]:",
        "",
        "| model | TP | gamma | tokens |",
        "|---|---|---|---|",
        *(f"| {k['model']} | {k['tp']} | {k['gamma']} | {k['tokens']:.0f} |" for k in result["knees"]),
        "",
        "## Published verify latencies",
        "",
        "Llama-2 on an L40 (Hugging Face / CUDA graphs, batch 1, prefix 192), against the profile transferred to the",
        "datasheet of an L40:",
        "",
        "| model | query tokens | measured [ms] | law [ms] | measured ratio | law ratio |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {p['model']} | {p['query']} | {p['measured_ms']} | {p['predicted_ms']} | {p['measured_ratio']:.3f} | "
        f"{p['predicted_ratio']:.3f} |"
        for p in result["published"]
    ]
    lines += [
        "",
        "Not compared: rows whose hardware is not stated, the T4 (not in the catalogue) and llama.cpp on an RTX 3090",
        "(4-bit kernels). The microbenchmark of Llama-3.1-8B (hardware not stated) shows one step of 17% from 1 to 2",
        "query tokens and is flat to 8: another kernel for one row than for several, as eager engines choose it. The",
        "law has no such step; with CUDA graphs and one attention kernel it is flat from the start. The L40 rows rise",
        "early and in steps (Hugging Face, not a serving engine), the law later; it is an order of magnitude, no more.",
        "",
    ]
    return "\n".join(lines)


def holds(result: dict[str, Any]) -> bool:
    """Return whether all three points are within the bar."""
    return all(abs(p["error"]) <= BAR for p in result["product"].values())


def bars(result: dict[str, Any]) -> list[Bar]:
    """Return the three points against the bar."""
    return [
        Bar(f"error at {m} tokens", abs(p["error"]) <= BAR, abs(p["error"]), BAR) for m, p in result["product"].items()
    ]


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    return f"within {max(abs(p['error']) for p in result['product'].values()):.1%} at 8, 256 and 512 tokens"


def validations(result: dict[str, Any]) -> list[Validation]:
    """Return the product at three sizes, and published verify latencies of a GPU that was not measured."""
    published = [p["predicted_ms"] / p["measured_ms"] - 1 for p in result["published"]]
    return [
        Validation.errors(
            [p["error"] for p in result["product"].values()],
            "kernels",
            "H100 product of width and depth 8192 at 8, 256 and 512 tokens",
            "measured kernels",
            "all products of the table",
        ),
        Validation.errors(
            published,
            "transfer",
            "verify passes of Llama-2 7B and 13B on an L40, Hugging Face",
            "published measurements",
            "nothing; H100 profile on the datasheet of an L40",
        ),
    ]


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.data, given.folder),
    readme,
    headline,
    bars=bars,
    n=lambda result: len(result["product"]),
    validations=validations,
    data=Data(".", ("aiconfigurator", "speculation")),
    recheck=True,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

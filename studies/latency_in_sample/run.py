"""Claim: on the models they were fitted on, the shipped H100 and A100 profiles are within 2.5 % (MAPE).

    python studies/latency_in_sample/run.py --data DIR

DIR holds `vidur` and `aiconfigurator`. Nothing is fitted here: the profiles are those in calibration/profiles. There is
no quick mode: it takes seconds. What is missed is set against what any law of the same kind would miss.
"""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from calibration.fit import rising_median
from calibration.profiles import load_profile
from calibration.readers import VIDUR_MODELS, VIDUR_NODES, read_table, read_vidur_allreduce, read_vidur_layers
from calibration.validate import ACCELERATORS, error_summary, measured_steps, predict_steps, summarise
from studies.study import Bar, Data, Study, Validation
from theory.catalog import accelerator
from theory.latency import Efficiency, gemm_time
from theory.specs import Accelerator
from theory.work import layer_gemms
from tierwise.figures import validation
from tierwise.figures.picture import draw

Array = NDArray[np.float64]

HERE = Path(__file__).parent
BAR = 0.025  # largest MAPE [-]
DEVICES = ("h100", "a100")  # with layers and attention measured
SMOOTH = (0.3, 0.6, 0.6)  # how far the smoother of products reaches along tokens, width and depth [octaves]
NEIGHBOURS = 60  # rows it looks at [-]
SHRINK = 0.02  # of its weight, so that a row without neighbours keeps the law [-]
WAIT = 1.5  # times the best of a size from which an all-reduce counts as waiting [-]
SMALL = (16384.0, 1048576.0)  # all-reduces that flip [byte]


def analyse(data: Path, pictures: Path | None) -> dict[str, Any]:
    """Return the numbers; draw the pictures into a folder."""
    result: dict[str, Any] = {"errors": {}, "floors": {}, "repeats": {}, "waits": waits(data)}
    for device in DEVICES:
        name = ACCELERATORS[device]
        gpu, profile = accelerator(name), load_profile(name)
        steps = predict_steps(measured_steps(data / "vidur", device), gpu, profile)
        own = steps.assign(predicted=steps["predicted"] - steps["predicted_communication"] + steps["communication"])
        floors, result["repeats"][device] = floor_steps(data, device, steps, gpu, profile.efficiency)
        for phase in ("decode", "prefill"):
            rows = steps["phase"] == phase
            one_gpu = rows & (steps["tp"] == 1)
            result["errors"][f"{device} {phase}"] = summarise(steps[rows]) | {
                "mape_one_gpu": summarise(steps[one_gpu])["mape"],
                "mape_with_measured_allreduce": summarise(own[rows])["mape"],
            }
            result["floors"][f"{device} {phase}"] = {
                label: error_summary(time[rows], steps.loc[rows, "measured"])["mape"] for label, time in floors.items()
            }
        if pictures is not None:
            draw(validation.steps(steps), pictures / f"{device}.png")
    return result


# --- what no law of this kind can reach ------------------------------------------------------------------------------


def floor_steps(
    data: Path, device: str, steps: pd.DataFrame, gpu: Accelerator, e: Efficiency
) -> tuple[dict[str, pd.Series], dict[str, float]]:
    """Return step times with one part guessed as well as its kind allows [s], and how well products repeat [-]."""
    products, repeats = smoothed_products(data, device, gpu, e)
    keys = zip(steps["file"], steps["tp"], steps["tokens"], strict=True)
    layers = np.array([VIDUR_MODELS[str(f)].layers for f in steps["file"]], float)
    smooth = layers * np.array([products[str(f), int(tp), int(m)] for f, tp, m in keys])
    rest = steps["measured"] - steps["communication"]
    guess = steps["predicted_attention"] + steps["predicted_elementwise"] + smooth
    return {
        "all-reduce": rest + rising_reduces(steps, steps["communication"]),
        "products": steps["measured"] - steps["gemm"] + smooth,
        "both": guess + rising_reduces(steps, steps["measured"] - guess),
    }, repeats


def rising_reduces(steps: pd.DataFrame, wanted: pd.Series) -> pd.Series:
    """Return per step the all-reduces of the curve that never falls and is nearest to ``wanted`` on these very rows."""
    models = [VIDUR_MODELS[str(f)] for f in steps["file"]]
    calls = np.array([2 * m.layers for m in models], float)
    table = pd.DataFrame({"size": steps["tokens"] * [m.hidden for m in models], "each": wanted / calls})
    table = table.assign(weight=calls / steps["measured"], tp=steps["tp"])
    out = pd.Series(0.0, index=steps.index)
    for tp, rows in table.groupby("tp"):
        rows = rows.sort_values(["size", "each"], ascending=[True, False])  # equal sizes fall: they are pooled
        if int(str(tp)) > 1:
            out[rows.index] = rising_median(rows["each"].to_numpy(), rows["weight"].to_numpy())
    return out * calls


def smoothed_products(
    data: Path, device: str, gpu: Accelerator, e: Efficiency
) -> tuple[dict[tuple[str, int, int], float], dict[str, float]]:
    """Return the products of a layer [s] by model, TP and tokens from a smoother, and the scatter of repeats [-].

    The smoother corrects the law by the residuals of the neighbouring rows of all models (never by the row itself):
    Gaussian in the logarithms of tokens, width and depth. It is a table, not a law: what it misses, a law that is
    smooth in sizes misses.
    """
    names = sorted({p.name[len(device) + 1 : -len("_mlp.csv")] for p in (data / "vidur").glob(f"{device}_*_mlp.csv")})
    tables = [read_vidur_layers(data / "vidur", device, (n,)).gemm.assign(model=n) for n in names]
    rows = pd.concat(tables, ignore_index=True)
    m, n, k, after = (rows[c].to_numpy(float) for c in ("m", "n", "k", "follows_activation"))
    law = np.where(after, gemm_time(m, n, k, gpu, e, boost=e.down_boost), gemm_time(m, n, k, gpu, e))
    misfit = np.log(rows["time"].to_numpy(float) / law)
    place = np.column_stack([np.log2(x) / h for x, h in zip((m, n, k), SMOOTH, strict=True)] + [10 * after])
    distance, near = cKDTree(place).query(place, k=NEIGHBOURS)
    weight = np.where(near == np.arange(len(rows))[:, None], 0.0, np.exp(-0.5 * distance**2))
    correction = (weight * misfit[near]).sum(axis=1) / (weight.sum(axis=1) + SHRINK)
    rows = rows.assign(smooth=law * np.exp(correction))
    return layer_sums(rows), repeats_of(rows)


def layer_sums(rows: pd.DataFrame) -> dict[tuple[str, int, int], float]:
    """Return the products of one layer [s] by model, TP and tokens."""
    out: dict[tuple[str, int, int], float] = {}
    for name, part in rows.groupby("model"):
        times = part.groupby(["n", "k", "follows_activation", "m"])["smooth"].mean()
        for tp in (1, 2, 4, 8):
            if str(name) == "phi-2":
                continue
            shapes = [(float(g.n), float(g.k), g.name == "down") for g in layer_gemms(VIDUR_MODELS[str(name)], tp)]
            for tokens in part["m"].unique():
                if all((*s, tokens) in times.index for s in shapes):
                    out[str(name), tp, int(tokens)] = float(sum(times[(*s, tokens)] for s in shapes))
    return out


def repeats_of(rows: pd.DataFrame) -> dict[str, float]:
    """Return how far two measurements of one product are apart, models that share a shape: mean and 90th centile."""
    shared = rows[(rows["model"] != "phi-2") & (rows["m"] > 128)].groupby(["n", "k", "follows_activation", "m"])["time"]
    ratio = (shared.max() / shared.min() - 1)[shared.count() > 1]
    return {"n": int(ratio.size), "mean": round(float(ratio.mean()), 4), "p90": round(float(ratio.quantile(0.9)), 4)}


def waits(data: Path) -> dict[str, Any]:
    """Return what the jumps of the all-reduce are: the time of the best rows and of the crowded upper level, 2 GPUs."""
    out: dict[str, Any] = {}
    for device in DEVICES:
        for node in (VIDUR_NODES[device], f"{device}_pairwise_nvlink"):
            table = read_table(
                data / "vidur" / f"network_{node}_all_reduce.csv",
                ("num_workers", "devices_per_node", "size_bytes", "median_ms"),
            )
            two = table[(table["num_workers"] == 2) & (table["devices_per_node"] == 2)]
            small = two[two["size_bytes"].between(*SMALL)]
            out[node] = {
                "fast_us": round(float(small["median_ms"].quantile(0.05)) * 1e3, 1),
                "slow_us": round(float(small["median_ms"].quantile(0.75)) * 1e3, 1),
                "waiting": round(float((small["median_ms"] > WAIT * small["median_ms"].quantile(0.05)).mean()), 3),
            }
    nccl = read_table(
        data / "aiconfigurator" / "h100_sxm" / "nccl-2.29.2.csv",
        ("op_name", "nccl_dtype", "num_gpus", "message_size", "latency"),
    )
    half = nccl[(nccl["op_name"] == "all_reduce") & (nccl["nccl_dtype"] == "half") & (nccl["num_gpus"] == 2)]
    inside = half[(2 * half["message_size"]).between(*SMALL)]
    out["nccl_us"] = [round(float(inside["latency"].min()) * 1e3, 1), round(float(inside["latency"].max()) * 1e3, 1)]
    out["flips"] = {d: flips(data, d) for d in DEVICES}
    return out


def flips(data: Path, device: str) -> float:
    """Return the share of neighbouring sizes (8 KiB apart, all GPU counts) that differ by a factor above ``WAIT``."""
    rows = read_vidur_allreduce(data / "vidur", device, window=1).allreduce
    rows = rows[rows["size"].between(*SMALL)].sort_values(["tp", "size"])
    step = rows.groupby("tp")["time"].transform(lambda t: np.abs(np.log(t).diff()))
    return round(float((step.dropna() > np.log(WAIT)).mean()), 3)


# --- the page --------------------------------------------------------------------------------------------------------


def readme(result: dict[str, Any]) -> str:
    """Return the page of this study."""
    holds = all(row["mape"] <= BAR for row in result["errors"].values())
    lines = [
        "# Models that were fitted",
        "",
        "**Claim.** On the models they were fitted on, the shipped profiles have a MAPE of at most 2.5%.",
        "",
        f"**Verdict: {'holds' if holds else 'does not hold'}.**",
        "",
        "Written by `python studies/latency_in_sample/run.py --data DIR`, which exits with 1 if the bar is missed.",
        "",
        "| device, phase | n | MAPE | bias | p90 | in 90% interval | MAPE at TP 1 | MAPE, measured all-reduce |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {case} | {r['n']} | {r['mape']:.2%} | {r['bias']:+.2%} | {r['p90_ape']:.2%} | {r['coverage']:.1%} | "
        f"{r['mape_one_gpu']:.2%} | {r['mape_with_measured_allreduce']:.2%} |"
        for case, r in result["errors"].items()
    ]
    lines += [
        "",
        "## How low it could be",
        "",
        "MAPE of the step if one part were guessed as well as its kind allows and all else were known exactly:",
        "the all-reduce by the best curve that never falls, chosen on these very rows; the products by a smoother in",
        "tokens, width and depth over the residuals of all other rows (a table, no law). Last: both at once, with",
        "attention and element-wise work by the law.",
        "",
        "| device, phase | best never-falling all-reduce | smoothed products | both, rest by the law |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {case} | {r['all-reduce']:.2%} | {r['products']:.2%} | {r['both']:.2%} |"
        for case, r in result["floors"].items()
    ]
    wrapped = (fill(text, 118, break_on_hyphens=False) for text in _explanation(result))
    lines += ["", *wrapped, "", "![H100](h100.png)", "", "![A100](a100.png)", ""]
    return "\n".join(lines)


def _explanation(result: dict[str, Any]) -> list[str]:
    w, repeats = result["waits"], result["repeats"]
    nodes = "; ".join(
        f"{node}: {r['fast_us']:g} us at best, {r['slow_us']:g} us as a rule"
        for node, r in w.items()
        if "_" in node and isinstance(r, dict)
    )
    return [
        "**The all-reduce.** From 16 KiB to 1 MiB the measured times flip between two levels: of neighbouring sizes, "
        f"8 KiB apart, {w['flips']['h100']:.0%} (H100) and {w['flips']['a100']:.0%} (A100) differ by a factor above "
        f"{WAIT:g}. Two GPUs, {nodes}. The lower level is the collective itself: NCCL timed elsewhere on H100 takes "
        f"{w['nccl_us'][0]:g} to {w['nccl_us'][1]:g} us over these sizes. The upper one differs from node to node of "
        "the same chip and comes and goes at no fixed size: a kernel that waits for the host of the other GPU, no "
        "protocol. A law with protocol switches (one-shot, two-shot, ring) has nothing to switch at. The profile "
        "keeps the median curve that never falls, so that a larger batch is never faster.",
        "",
        "**The products.** In prefill the library's choice of kernel scatters products from one shape to the next "
        "(H100, width 8192: 1024 tokens are slower than 768 and 2048 suggest). Models that share a shape measured it "
        f"twice: above 128 tokens the two differ by {repeats['h100']['mean']:.1%} in the mean and "
        f"{repeats['h100']['p90']:.1%} at the 90th centile (H100, {repeats['h100']['n']} pairs), "
        f"{repeats['a100']['mean']:.1%} and {repeats['a100']['p90']:.1%} on the A100 ({repeats['a100']['n']}).",
        "",
        "Tried on products: a fixed time per wave, operand traffic added to arithmetic instead of the slower of both, "
        "a library that does not always choose the best tile, fewer SMs than there are, a small-tile penalty, a last "
        "wave that fades with the number of waves, larger and smaller sets of tiles. Fitted on one model and on all, "
        "none lowered the error of prefill products by more than 0.1 points on both devices.",
        "",
        "**What follows.** Decode does not meet the bar while the all-reduce may not fall: with the best such curve "
        "and smoothed products it is still missed (last column). Prefill would, but only with a table of the library's "
        "choices in place of a law, which would tell little about the next model.",
    ]


def bars(result: dict[str, Any]) -> list[Bar]:
    """Return the MAPE of each case against the bar."""
    return [Bar(f"MAPE, {case}", row["mape"] <= BAR, row["mape"], BAR) for case, row in result["errors"].items()]


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    mape = [row["mape"] for row in result["errors"].values()]
    return f"MAPE {min(mape):.1%} to {max(mape):.1%}; the page says how low a law could get, and why"


def validations(result: dict[str, Any]) -> list[Validation]:
    """Return the steps against those composed of measured kernels."""
    return [
        Validation.of(row, "steps, in sample", f"{case} steps of all models", "measured kernels", "the same kernels")
        for case, row in result["errors"].items()
    ]


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.data, given.folder),
    readme,
    headline,
    bars=bars,
    n=lambda result: sum(row["n"] for row in result["errors"].values()),
    validations=validations,
    data=Data(".", ("vidur", "aiconfigurator")),
    recheck=True,
)


if __name__ == "__main__":
    sys.exit(STUDY.main())

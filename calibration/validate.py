"""Predicted against measured: error summaries, and step times composed from measured kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from theory.catalog import accelerator
from theory.errors import require
from theory.latency import Pass, Profile, StepTime, step_time, step_time_interval
from theory.specs import Accelerator, Transformer, check_tp
from theory.work import kv_bytes_per_token, weight_bytes

from .profiles import load_profile, transfer
from .readers import HEAD_DIM, VIDUR_MODELS, Kernels, read_attention, read_vidur_allreduce, read_vidur_mlp, vidur_models

Array = NDArray[np.float64]

ACCELERATORS = {"h100": "h100-sxm", "a100": "a100-80g-sxm", "a40": "a40"}  # catalogue name of a Vidur device
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)  # sequences of a decode step [-]
CONTEXTS = (512, 1024, 2048, 4096)  # tokens attended to, the new one included [tokens]
PROMPTS = (128, 256, 512, 1024, 1536, 2048, 3072, 4096)  # tokens of a prefill of one prompt [tokens]
WORST = 10  # rows listed as worst [-]


def error_summary(predicted: ArrayLike, measured: ArrayLike) -> dict[str, float]:
    r"""Return ``n``, ``mape``, ``median_ape``, ``bias``, ``p90_ape``, ``worst_ape`` as fractions (0.05 is 5 %).

    .. math:: \text{mape} = \overline{|e|}, \quad \text{bias} = \overline{e}, \quad e = \hat t / t - 1

    Raises
    ------
    InputError
        If the two differ in shape, are empty, or hold values that are not finite and above 0.

    Examples
    --------
    >>> error_summary([1.1, 0.9], [1.0, 1.0])["mape"]
    0.1
    """
    p, t = np.asarray(predicted, float).ravel(), np.asarray(measured, float).ravel()
    require(p.shape == t.shape and p.size > 0, "predicted", f"must have the {t.size} values of `measured`", p.size)
    for name, values in (("predicted", p), ("measured", t)):
        ok = bool((np.isfinite(values) & (values > 0)).all())
        require(ok, name, "must be finite and above 0", values[~(np.isfinite(values) & (values > 0))][:3].tolist())
    error = p / t - 1
    size = np.abs(error)
    return {
        "n": int(p.size),
        "mape": round(float(size.mean()), 6),
        "median_ape": round(float(np.median(size)), 6),
        "bias": round(float(error.mean()), 6),
        "p90_ape": round(float(np.quantile(size, 0.9)), 6),
        "worst_ape": round(float(size.max()), 6),
    }


# --- steps composed from measured kernels ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttentionTable:
    """Measured attention of one device, looked up by the heads of one GPU."""

    kernels: Kernels

    def decode(self, heads: int, kv_heads: int, batch: int, length: int) -> float:
        """Return the time of decode attention over ``length`` tokens a sequence [s]; not a number where not measured.

        More KV heads than were measured count as a larger batch of fewer heads: H heads at batch b read what h heads
        at batch b H / h do.
        """
        table = self.kernels.decode
        ratio = heads // kv_heads
        known = table[(table["heads"] == ratio * table["kv_heads"]) & (table["context"] == length - 1)]
        fewer = known[known["kv_heads"] <= kv_heads]
        if fewer.empty:
            return math.nan
        rows = fewer[fewer["kv_heads"] == fewer["kv_heads"].max()].sort_values("batch")
        equal = batch * kv_heads / float(rows["kv_heads"].iloc[0])
        return _log_interpolate(equal, rows["batch"].to_numpy(float), rows["time"].to_numpy(float))

    def prefill(self, heads: int, kv_heads: int, tokens: int) -> float:
        """Return the time of prefill attention of one prompt [s]; heads between measured ones are interpolated."""
        table = self.kernels.prefill
        ratio = heads // kv_heads
        rows = table[
            (table["heads"] == ratio * table["kv_heads"]) & (table["tokens"] == tokens) & (table["prompts"] == 1)
        ].sort_values("kv_heads")
        return _log_interpolate(kv_heads, rows["kv_heads"].to_numpy(float), rows["time"].to_numpy(float))


def _log_interpolate(x: float, xs: Array, ys: Array) -> float:
    """Return y at x, linear in the logarithms; not a number outside the measured range."""
    if xs.size == 0 or not xs[0] <= x <= xs[-1]:
        return math.nan
    return float(np.exp(np.interp(np.log(x), np.log(xs), np.log(ys))))


def measured_steps(directory: Path, device: str, models: tuple[str, ...] = ()) -> pd.DataFrame:
    """Return step times composed from Vidur's kernels: layers x (products + element-wise + attention + 2 all-reduces).

    The LM head, the embedding and host time are not in the data and not in the steps. Rows that do not fit the GPU's
    memory, or whose attention was not measured, are left out; models whose head width has no attention table as well.

    Returns
    -------
    DataFrame
        ``model``, ``tp``, ``phase``, ``batch``, ``context`` and ``tokens`` (new ones) [tokens], ``measured`` [s] and
        its parts ``gemm``, ``elementwise``, ``attention``, ``communication`` [s].
    """
    attention = AttentionTable(read_attention(directory, device))
    reduces = read_vidur_allreduce(directory, device)
    rows: list[dict[str, Any]] = []
    for name in models or vidur_models(directory, device):
        if VIDUR_MODELS[name].head_dim != HEAD_DIM:
            continue
        table = read_vidur_mlp(directory, device, name)
        for tp in sorted(int(t) for t in table["tp"].unique()):
            records = table[table["tp"] == tp].to_dict("records")
            layers = {int(r["num_tokens"]): {str(c): float(v) for c, v in r.items()} for r in records}
            rows += _model_steps(name, tp, layers, attention, reduces)
    steps = pd.DataFrame(rows)
    return steps[steps["measured"].notna() & _fits(steps, accelerator(ACCELERATORS[device]))].reset_index(drop=True)


def _model_steps(
    name: str, tp: int, layers: dict[int, dict[str, float]], attention: AttentionTable, reduces: Kernels
) -> list[dict[str, Any]]:
    model = VIDUR_MODELS[name]
    heads, kv_heads = model.heads // tp, max(1, model.kv_heads // tp)
    decodes = [(b, s, b, attention.decode(heads, kv_heads, b, s)) for b in BATCHES for s in CONTEXTS]
    prefills = [(1, 0, p, attention.prefill(heads, kv_heads, p)) for p in PROMPTS]
    cases = [("decode", *d) for d in decodes] + [("prefill", *p) for p in prefills]
    return [
        {"model": model.name, "file": name, "tp": tp, "phase": phase, "batch": b, "context": s, "tokens": m}
        | _parts(model, tp, m, layers[m], attend, reduces)
        for phase, b, s, m, attend in cases
        if m in layers
    ]


def _parts(
    model: Transformer, tp: int, tokens: int, row: dict[str, float], attend: float, reduces: Kernels
) -> dict[str, float]:
    """Return the measured parts of a step and their sum [s]."""
    products = ("attn_pre_proj_ms", "attn_post_proj_ms", "mlp_up_proj_ms", "mlp_down_proj_ms")
    elements = ("input_layernorm_ms", "attn_rope_ms", "post_attention_layernorm_ms", "mlp_act_ms", "add_ms")
    parts = {
        "gemm": model.layers * sum(row[c] for c in products) * 1e-3,
        "elementwise": model.layers * sum(row[c] for c in elements) * 1e-3,
        "attention": model.layers * attend,
        "communication": 2 * model.layers * _measured_allreduce(reduces, tp, 2.0 * tokens * model.hidden),
    }
    return parts | {"measured": sum(parts.values())}


def _measured_allreduce(reduces: Kernels, tp: int, size: float) -> float:
    if tp == 1:
        return 0.0
    rows = reduces.allreduce[reduces.allreduce["tp"] == tp]
    return float(np.interp(size, rows["size"].to_numpy(float), rows["time"].to_numpy(float)))


def _fits(steps: pd.DataFrame, gpu: Accelerator) -> pd.Series:
    """Return whether weights and KV cache of each step fit the memory of its GPUs."""

    def fits(row: pd.Series) -> bool:
        model = VIDUR_MODELS[str(row["file"])]
        tokens = row["batch"] * row["context"] + (row["tokens"] if row["phase"] == "prefill" else 0)
        per_gpu = (weight_bytes(model) + kv_bytes_per_token(model, tp=int(row["tp"])) * tokens) / row["tp"]
        return bool(per_gpu <= gpu.memory)

    return steps.apply(fits, axis=1)


def predict_steps(steps: pd.DataFrame, gpu: Accelerator, profile: Profile, level: float = 0.9) -> pd.DataFrame:
    """Return ``steps`` with ``predicted``, ``low`` and ``high`` [s], and the predicted parts as ``predicted_*``."""
    frames = []
    for (file, tp), rows in steps.groupby(["file", "tp"], sort=False):
        model, degree = VIDUR_MODELS[str(file)], int(str(tp))
        check_tp(model, degree)
        decode = (rows["phase"] == "decode").to_numpy()
        work = Pass(
            sequences=np.where(decode, rows["batch"], 0),
            context=np.where(decode, rows["context"] - 1, 0),
            prefill_tokens=np.where(decode, 0, rows["tokens"]),
        )
        time = step_time(model, gpu, profile, work, degree, head=False)
        low, high = step_time_interval(model, gpu, profile, work, degree, level=level, head=False)
        frames.append(rows.assign(predicted=time.total, low=low, high=high, **_predicted_parts(time)))
    return pd.concat(frames, ignore_index=True)


def _predicted_parts(time: StepTime) -> dict[str, Array]:
    return {
        "predicted_gemm": time.weights + time.compute,
        "predicted_elementwise": time.elementwise,
        "predicted_attention": time.attention,
        "predicted_communication": time.communication,
    }


def device_steps(directory: Path, device: str, profile: str | Path | Profile) -> pd.DataFrame:
    """Return the measured steps of a device with what ``profile`` predicts; arguments as :func:`validate_kernels`."""
    names = vidur_models(Path(directory), device)
    steps = measured_steps(Path(directory), device, names)
    return predict_steps(steps, accelerator(ACCELERATORS[device]), _for_device(profile, device))


def _for_device(profile: str | Path | Profile, device: str) -> Profile:
    """Return the profile, transferred and tagged if it was made for another accelerator."""
    require(device in ACCELERATORS, "device", f"must be one of {', '.join(sorted(ACCELERATORS))}", device)
    gpu = accelerator(ACCELERATORS[device])
    chosen = profile if isinstance(profile, Profile) else load_profile(profile)
    return chosen if chosen.accelerator == gpu.name else transfer(chosen, gpu)


def validate_kernels(directory: Path, device: str, profile: str | Path | Profile) -> dict[str, Any]:
    """Return how far ``profile`` is from steps composed of the kernels in ``directory``; nothing is fitted.

    Returns
    -------
    dict
        ``decode`` and ``prefill`` (error summaries with ``coverage``, the share of steps inside the 90 % interval),
        ``by_group`` (one per model x TP x phase), ``worst`` (rows), ``profile`` (name, provenance, rows it was
        fitted on), ``skipped`` (models without a measured attention).

    Raises
    ------
    InputError
        If the device is unknown, or a file or column is missing. A profile of another accelerator is transferred.
    """
    chosen = _for_device(profile, device)
    names = vidur_models(Path(directory), device)
    steps = device_steps(directory, device, chosen)
    groups = steps.groupby(["model", "tp", "phase"], sort=True)
    return {
        "decode": summarise(steps[steps["phase"] == "decode"]),
        "prefill": summarise(steps[steps["phase"] == "prefill"]),
        "by_group": [dict(zip(("model", "tp", "phase"), k, strict=True)) | summarise(g) for k, g in groups],
        "worst": worst_rows(steps),
        "profile": {"name": chosen.name, "provenance": chosen.provenance, "rows": chosen.rows},
        "skipped": [n for n in names if VIDUR_MODELS[n].head_dim != HEAD_DIM],
    }


def summarise(steps: pd.DataFrame) -> dict[str, float]:
    """Return the error summary of predicted steps with the ``coverage`` of their intervals [-]."""
    inside = (steps["measured"] >= steps["low"]) & (steps["measured"] <= steps["high"])
    return error_summary(steps["predicted"], steps["measured"]) | {"coverage": round(float(inside.mean()), 4)}


def worst_rows(steps: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the steps with the largest relative errors."""
    error = steps["predicted"] / steps["measured"] - 1
    rows = steps.assign(error=error).loc[error.abs().sort_values(ascending=False).index[:WORST]]
    columns = ["model", "tp", "phase", "batch", "context", "tokens", "measured", "predicted", "error"]
    return [{str(k): v for k, v in row.items()} for row in rows[columns].to_dict("records")]

"""Kernel measurements as tables in seconds: Vidur profiles, AIConfigurator tables. Strict: what is missing is named.

Every reader returns :class:`Kernels`: one table per kind of kernel, columns in tokens, numbers, bytes and seconds, on
one GPU (one tensor-parallel shard), for one layer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from theory.errors import refuse, require
from theory.specs import Transformer, check_tp
from theory.work import layer_gemms

MILLISECOND = 1e-3  # [s]
WIDTH = 4096.0  # a product of this width and depth has weight 1 in a fit [-]
HEAD_DIM = 128  # head width of the attention tables [-]

COLUMNS = {
    "gemm": ("m", "n", "k", "precision", "follows_activation", "weight", "group", "time"),
    "decode": ("batch", "query", "context", "heads", "kv_heads", "head_dim", "group", "time"),
    "prefill": ("tokens", "cached", "prompts", "heads", "kv_heads", "head_dim", "group", "time"),
    "elementwise": ("model", "tp", "tokens", "group", "time"),
    "allreduce": ("tp", "size", "group", "time"),
}


@dataclass(frozen=True, slots=True)
class Kernels:
    """Measured kernels of one device, one table per kind; a table may be empty.

    Raises
    ------
    InputError
        If a table lacks a column or holds a time that is not finite and above 0.
    """

    device: str
    gemm: pd.DataFrame  # m x k times k x n [-], time [s], weight: importance in a fit [-], group: the shape
    decode: pd.DataFrame  # context: tokens already cached of each sequence [tokens]
    prefill: pd.DataFrame  # tokens: new ones over all prompts [tokens]
    elementwise: pd.DataFrame  # time: two norms, rotary positions, activation, one addition [s]
    allreduce: pd.DataFrame  # size [byte]
    source: str = ""

    def __post_init__(self) -> None:
        for name, columns in COLUMNS.items():
            table = getattr(self, name)
            for column in columns:
                require(column in table.columns, f"{name}.{column}", "must be a column", list(table.columns))
            bad = table["time"][~(np.isfinite(table["time"]) & (table["time"] > 0))]
            require(bad.empty, f"{name}.time", "must be finite and above 0 [s]", bad.head(3).tolist())

    def join(self, other: Kernels) -> Kernels:
        """Return the rows of both.

        Raises
        ------
        InputError
            If they are of different devices.
        """
        require(self.device == other.device, "device", f"must be {self.device} in both", other.device)
        tables = {n: pd.concat([getattr(self, n), getattr(other, n)], ignore_index=True) for n in COLUMNS}
        return Kernels(self.device, **tables, source="; ".join(s for s in (self.source, other.source) if s))

    def counts(self) -> dict[str, int]:
        """Return the number of rows of each table."""
        return {name: len(getattr(self, name)) for name in COLUMNS}


def empty_kernels(device: str, source: str = "", **tables: pd.DataFrame) -> Kernels:
    """Return :class:`Kernels` that hold only the tables given."""
    blank = {name: pd.DataFrame(columns=list(columns)).astype({"time": float}) for name, columns in COLUMNS.items()}
    return Kernels(device, **(blank | tables), source=source)


def _model(name: str, *dims: int, gated: bool = True, norm_bias: bool = False) -> Transformer:
    layers, hidden, heads, kv_heads, head_dim, ffn, vocab, context = dims
    return Transformer(name, layers, hidden, heads, kv_heads, head_dim, ffn, vocab, context, gated, norm_bias=norm_bias)


# Dimensions behind Vidur's file names, from the config.json of each model. internlm-20b has the layer of Llama-2-13b:
# the step of the latter (40 layers) is composed from its rows.
VIDUR_MODELS: dict[str, Transformer] = {
    "Llama-2-7b-hf": _model("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000, 4096),
    "internlm-20b": _model("llama-2-13b", 40, 5120, 40, 40, 128, 13824, 32000, 4096),
    "CodeLlama-34b-Instruct-hf": _model("codellama-34b", 48, 8192, 64, 8, 128, 22016, 32000, 16384),
    "Llama-2-70b-hf": _model("llama-2-70b", 80, 8192, 64, 8, 128, 28672, 32000, 4096),
    "Meta-Llama-3-8B": _model("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256, 8192),
    "Meta-Llama-3-70B": _model("llama-3-70b", 80, 8192, 64, 8, 128, 28672, 128256, 8192),
    "Qwen-72B": _model("qwen-72b", 80, 8192, 64, 64, 128, 24576, 152064, 32768),
    "internlm2-20b": _model("internlm2-20b", 48, 6144, 48, 8, 128, 16384, 92544, 32768),
    "phi-2": _model("phi-2", 32, 2560, 32, 32, 80, 10240, 51200, 2048, gated=False, norm_bias=True),
}
_GEMM_COLUMNS = {
    "qkv": "attn_pre_proj_ms",
    "output": "attn_post_proj_ms",
    "up": "mlp_up_proj_ms",
    "down": "mlp_down_proj_ms",
}
_ELEMENT_COLUMNS = ("input_layernorm_ms", "attn_rope_ms", "post_attention_layernorm_ms", "mlp_act_ms", "add_ms")
# node whose collectives belong to a device
VIDUR_NODES = {"h100": "h100_dgx", "a100": "a100_dgx", "a40": "a40_pairwise_nvlink"}


def read_table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """Return a CSV as a table after checking that the columns are there and hold numbers or text without gaps.

    Raises
    ------
    InputError
        If the file is absent, is not CSV, or lacks a column (named with its unit, which is part of the name).
    """
    require(path.is_file(), "path", "must be a readable CSV file", str(path))
    try:
        table = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        refuse("path", f"must hold CSV ({error})", path.name)
    for column in columns:
        if column not in table.columns:
            close = [c for c in table.columns if c.rsplit("_", 1)[0] == column.rsplit("_", 1)[0]]
            hint = f"Found {close[0]}: times are read in milliseconds, `_ms`." if close and "_ms" in column else ""
            refuse(column, f"must be a column of {path.name}", sorted(table.columns), hint)
        require(not table[column].isna().any(), column, f"must not be empty anywhere in {path.name}", "a missing value")
    return table


def vidur_models(directory: Path, device: str) -> tuple[str, ...]:
    """Return the models with an ``mlp`` profile of ``device``, as Vidur names them.

    Raises
    ------
    InputError
        If the device is unknown, a model's dimensions are, or the folder has no profile of the device.
    """
    require(device in VIDUR_NODES, "device", f"must be one of {', '.join(sorted(VIDUR_NODES))}", device)
    require(directory.is_dir(), "directory", "must be a folder of Vidur profiles", str(directory))
    names = tuple(sorted(p.name[len(device) + 1 : -len("_mlp.csv")] for p in directory.glob(f"{device}_*_mlp.csv")))
    require(bool(names), "directory", f"must hold {device}_<model>_mlp.csv files", str(directory))
    for name in names:
        require(name in VIDUR_MODELS, "model", f"must be one of {', '.join(sorted(VIDUR_MODELS))}", name)
    return names


def read_vidur_layers(directory: Path, device: str, models: tuple[str, ...] = (), most_tokens: int = 4096) -> Kernels:
    """Return the matrix products and element-wise kernels of Vidur's ``mlp`` profiles, up to ``most_tokens`` tokens.

    ``weight`` is the square root of a product's share in its layer: a fit should be right where the time is.
    """
    gemms, elements = [], []
    for name in models or vidur_models(directory, device):
        table = read_vidur_mlp(directory, device, name)
        table = table[table["num_tokens"] <= most_tokens]
        for tp in sorted(table["tp"].unique().tolist()):
            rows = table[table["tp"] == tp]
            gemms += _layer_gemm_rows(VIDUR_MODELS[name], tp, rows)
            elements.append(_element_rows(name, tp, rows))
    return empty_kernels(
        device,
        gemm=pd.concat(gemms, ignore_index=True),
        elementwise=pd.concat(elements, ignore_index=True),
        source=f"vidur mlp {device}: {', '.join(models) or 'all models'}",
    )


def read_vidur_mlp(directory: Path, device: str, name: str) -> pd.DataFrame:
    """Return one ``mlp`` profile as it is, checked; phi-2 has one norm (its attention and feed-forward run abreast).

    Raises
    ------
    InputError
        If the file is of an unknown model or not of that layout.
    """
    require(name in VIDUR_MODELS, "model", f"must be one of {', '.join(sorted(VIDUR_MODELS))}", name)
    absent = "post_attention_layernorm_ms" if name == "phi-2" else ""
    columns = ("tp", "num_tokens", *_GEMM_COLUMNS.values(), *(c for c in _ELEMENT_COLUMNS if c != absent))
    table = read_table(directory / f"{device}_{name}_mlp.csv", columns)
    for tp in table["tp"].unique():
        check_tp(VIDUR_MODELS[name], int(tp))
    return table


def _layer_gemm_rows(model: Transformer, tp: int, rows: pd.DataFrame) -> list[pd.DataFrame]:
    total = sum(rows[column] for column in _GEMM_COLUMNS.values())
    return [
        pd.DataFrame(
            {
                "m": rows["num_tokens"].astype(float),
                "n": float(gemm.n),
                "k": float(gemm.k),
                "precision": "bf16",
                "follows_activation": gemm.name == "down",
                "weight": np.sqrt(4 * rows[_GEMM_COLUMNS[gemm.name]] / total),
                "group": f"{gemm.n}x{gemm.k}",
                "time": rows[_GEMM_COLUMNS[gemm.name]] * MILLISECOND,
            }
        )
        for gemm in layer_gemms(model, tp)
    ]


def _element_rows(name: str, tp: int, rows: pd.DataFrame) -> pd.DataFrame:
    time = sum(rows[column] for column in _ELEMENT_COLUMNS if column in rows.columns)
    return pd.DataFrame(
        {
            "model": name,
            "tp": tp,
            "tokens": rows["num_tokens"].astype(float),
            "group": f"{name} tp{tp}",
            "time": time * MILLISECOND,
        }
    )


def read_vidur_allreduce(directory: Path, device: str, window: int = 5) -> Kernels:
    """Return the all-reduces within one node, smoothed by a running median over ``window`` sizes (they are noisy).

    Raises
    ------
    InputError
        If the device is unknown or the file not of that layout.
    """
    require(device in VIDUR_NODES, "device", f"must be one of {', '.join(sorted(VIDUR_NODES))}", device)
    columns = ("num_workers", "devices_per_node", "size_bytes", "median_ms")
    table = read_table(directory / f"network_{VIDUR_NODES[device]}_all_reduce.csv", columns)
    table = table[table["num_workers"] == table["devices_per_node"]].sort_values(["num_workers", "size_bytes"])
    smooth = table.groupby("num_workers")["median_ms"].transform(
        lambda t: t.rolling(window, center=True, min_periods=1).median()
    )
    rows = pd.DataFrame(
        {
            "tp": table["num_workers"].astype(int),
            "size": table["size_bytes"].astype(float),
            "group": "tp" + table["num_workers"].astype(str),
            "time": smooth * MILLISECOND,
        }
    ).reset_index(drop=True)
    return empty_kernels(device, allreduce=rows, source=f"vidur all-reduce {VIDUR_NODES[device]}")


def read_attention(directory: Path, device: str) -> Kernels:
    """Return the attention kernels of the table that stands in for Vidur's (vLLM FlashAttention, head width 128).

    Raises
    ------
    InputError
        If the table has no such device, or is not of that layout.
    """
    name = "substitute_attention_aiconfigurator_vllm0140.csv"
    columns = ("device", "phase", "q_heads", "kv_heads", "batch_size", "tokens", "latency_ms")
    table = read_table(directory / name, columns)
    known = sorted(table["device"].unique())
    require(device in known, "device", f"must be one of {', '.join(known)} in {name}", device)
    table = table[table["device"] == device]
    context = table["tokens"] - 1  # the table counts the new token
    return _attention_kernels(device, table, context, table["tokens"], table["latency_ms"], table["phase"], name)


def _attention_kernels(
    device: str,
    table: pd.DataFrame,
    context: pd.Series,
    length: pd.Series,
    milliseconds: pd.Series,
    phase: pd.Series,
    source: str,
) -> Kernels:
    """Return decode and prefill rows of a table with columns ``q_heads``, ``kv_heads``, ``batch_size``."""
    heads = {
        "heads": table["q_heads"].astype(float),
        "kv_heads": table["kv_heads"].astype(float),
        "head_dim": HEAD_DIM,
        "group": table["q_heads"].astype(str) + "/" + table["kv_heads"].astype(str),
        "time": milliseconds * MILLISECOND,
    }
    batch = table["batch_size"].astype(float)
    decode = pd.DataFrame({"batch": batch, "query": 1.0, "context": context.astype(float), **heads})
    prefill = pd.DataFrame({"tokens": batch * length, "cached": 0.0, "prompts": batch, **heads})
    return empty_kernels(
        device,
        decode=decode[phase == "decode"].reset_index(drop=True),
        prefill=prefill[phase == "prefill"].reset_index(drop=True),
        source=source,
    )


AICONFIGURATOR_SYSTEMS = {"h100": "h100_sxm", "h200": "h200_sxm"}


def read_aiconfigurator(directory: Path, device: str, gemm: str = "vllm-0.24.0", fp8: bool = True) -> Kernels:
    """Return the AIConfigurator tables of ``device``: products, attention (head width 128), graph all-reduces.

    Parameters
    ----------
    directory : Path
        The folder that holds ``h100_sxm`` and ``h200_sxm``.
    gemm : str
        Engine of the bf16 products, ``vllm-0.24.0`` or ``trtllm-1.3.0rc20``.

    Raises
    ------
    InputError
        If the device is unknown or a table not of its layout.
    """
    systems = ", ".join(sorted(AICONFIGURATOR_SYSTEMS))
    require(device in AICONFIGURATOR_SYSTEMS, "device", f"must be one of {systems}", device)
    folder = directory / AICONFIGURATOR_SYSTEMS[device]
    tables = [_aic_gemm(folder / f"gemm_bfloat16_{gemm}.csv", "bf16")]
    if fp8:
        tables.append(_aic_gemm(folder / "gemm_fp8_vllm-0.24.0.csv", "fp8"))
    attention = _aic_attention(folder, device)
    return empty_kernels(
        device,
        gemm=pd.concat(tables, ignore_index=True),
        decode=attention.decode,
        prefill=attention.prefill,
        allreduce=_aic_allreduce(folder),
        source=f"aiconfigurator {AICONFIGURATOR_SYSTEMS[device]}: gemm {gemm}{', fp8' if fp8 else ''}, attention, "
        "all-reduce vllm-0.24.0",
    )


def _aic_gemm(path: Path, precision: str) -> pd.DataFrame:
    table = read_table(path, ("m", "n", "k", "latency"))
    return pd.DataFrame(
        {
            "m": table["m"].astype(float),
            "n": table["n"].astype(float),
            "k": table["k"].astype(float),
            "precision": precision,
            "follows_activation": False,
            "weight": np.sqrt(table["n"] * table["k"]) / WIDTH,
            "group": precision + " " + table["n"].astype(str) + "x" + table["k"].astype(str),
            "time": table["latency"] * MILLISECOND,
        }
    )


def _aic_attention(folder: Path, device: str) -> Kernels:
    columns = ("batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim", "latency")
    parts = []
    for phase, stem in (("decode", "generation"), ("prefill", "context")):
        table = read_table(folder / f"{stem}_attention_bf16_hd128_vllm-0.24.0.csv", columns)
        wrong = table.loc[table["head_dim"] != HEAD_DIM, "head_dim"].unique().tolist()
        require(not wrong, "head_dim", f"must be {HEAD_DIM} [-]", wrong)
        table = table.rename(columns={"num_heads": "q_heads", "num_key_value_heads": "kv_heads"})
        phases = pd.Series(phase, index=table.index)
        parts.append(_attention_kernels(device, table, table["step"], table["isl"], table["latency"], phases, stem))
    return parts[0].join(parts[1])


def _aic_allreduce(folder: Path, backend: str = "vllm_graph") -> pd.DataFrame:
    table = read_table(
        folder / "custom_allreduce_vllm-0.24.0.csv",
        ("backend", "allreduce_dtype", "num_gpus", "message_size", "latency"),
    )
    kinds = sorted(table["allreduce_dtype"].unique())
    require(kinds == ["bfloat16"], "allreduce_dtype", "must be bfloat16, 2 bytes an element", kinds)
    table = table[table["backend"] == backend]
    return pd.DataFrame(
        {
            "tp": table["num_gpus"].astype(int),
            "size": 2.0 * table["message_size"],
            "group": "tp" + table["num_gpus"].astype(str),
            "time": table["latency"] * MILLISECOND,
        }
    ).reset_index(drop=True)


SERVED_HEADS = 8  # most query heads per KV head of the models served [-]
SERVED_BATCH = 256  # [sequences]
SERVED_CONTEXT = (250, 8300)  # [tokens]
SERVED_PROMPTS = (128, 8300)  # [tokens]
SERVED_WIDTHS = (1024, 16384)  # of AIConfigurator's products; Vidur's are those of models [-]
SERVED_TOKENS = 8192  # in one step


def serving_rows(kernels: Kernels) -> Kernels:
    """Return the rows in the range that serving uses: head ratios, batches, contexts and widths of real models."""
    g, d, p = kernels.gemm, kernels.decode, kernels.prefill
    length = p["tokens"] / p["prompts"]
    modelled = ~g["group"].astype(str).str.startswith(("bf16", "fp8"))
    wide = g["n"].between(*SERVED_WIDTHS) & g["k"].between(*SERVED_WIDTHS)
    return select(
        kernels,
        gemm=(modelled | wide) & (g["m"] <= SERVED_TOKENS),
        decode=(d["batch"] <= SERVED_BATCH)
        & d["context"].between(*SERVED_CONTEXT)
        & (d["heads"] <= SERVED_HEADS * d["kv_heads"]),
        prefill=(p["prompts"] <= 4) & length.between(*SERVED_PROMPTS) & (p["heads"] <= SERVED_HEADS * p["kv_heads"]),
    )


def read_vidur(directory: Path, device: str, models: tuple[str, ...] = ()) -> Kernels:
    """Return what a profile is fitted on: layers of ``models`` (all if none named), all-reduces, attention table."""
    layers = read_vidur_layers(directory, device, models)
    return serving_rows(layers.join(read_vidur_allreduce(directory, device)).join(read_attention(directory, device)))


def select(kernels: Kernels, **conditions: pd.Series) -> Kernels:
    """Return ``kernels`` with the tables named cut down to the rows whose condition holds."""
    tables = {f.name: getattr(kernels, f.name) for f in fields(kernels)}
    for name, keep in conditions.items():
        tables[name] = tables[name][keep].reset_index(drop=True)
    return Kernels(**tables)

"""Named accelerators and models: datasheet values and dimensions, each with its source."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from .errors import refuse
from .hf_config import from_hf_config
from .specs import Accelerator, Transformer

__all__ = ["accelerator", "accelerators", "from_hf_config", "hub", "model", "models", "published_parameters"]

GIB = 2**30  # [byte]
MIB = 2**20  # [byte]
_CONFIG_PATH = "A path to a Hugging Face config.json, or to its folder, works too."


@cache
def _table(name: str) -> dict[str, dict[str, Any]]:
    with (Path(__file__).parent / "data" / f"{name}.toml").open("rb") as file:
        return tomllib.load(file)


def accelerators() -> tuple[str, ...]:
    """Return the names of the accelerators of the catalog.

    Examples
    --------
    >>> "h100-sxm" in accelerators()
    True
    """
    return tuple(_table("accelerators"))


def models() -> tuple[str, ...]:
    """Return the names of the models of the catalog.

    Examples
    --------
    >>> "llama-2-70b" in models()
    True
    """
    return tuple(_table("models"))


def _unknown(kind: str, name: str, known: Iterable[str], way_out: str = "") -> NoReturn:
    by_lower = {n.lower(): n for n in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.4) or list(by_lower)
    nearest = ", ".join(by_lower[n] for n in near)
    refuse(kind, f"must be a name of the catalog (nearest: {nearest})", name, way_out)


@cache
def accelerator(name: str) -> Accelerator:
    """Return an accelerator of the catalog by name; datasheet values, no efficiencies.

    The beginning of a name up to a dash will do where only one begins so: h200 is h200-sxm, h100 may be two.

    Raises
    ------
    InputError
        If the name is unknown; the nearest names are given.

    Source
    ------
    ``Accelerator.source`` of each entry: datasheet or whitepaper with its date, driver for the memory.

    Examples
    --------
    >>> accelerator("h100-sxm").bandwidth
    3350000000000.0
    >>> accelerator("h200").name
    'h200-sxm'
    """
    table = _table("accelerators")
    longer = [full for full in table if full.startswith(f"{name}-")]
    if name not in table and len(longer) == 1:
        return accelerator(longer[0])
    if name not in table:
        _unknown("accelerator", name, longer or table)
    entry = table[name]
    return Accelerator(
        name=name,
        memory=entry["memory_gib"] * GIB,
        bandwidth=entry["bandwidth_bytes_per_s"],
        flops_bf16=entry["flops_bf16_per_s"],
        flops_fp8=entry["flops_fp8_per_s"],
        link_bandwidth=entry["link_bytes_per_s"],
        sms=entry["sms"],
        l2=float(entry["l2_mib"] * MIB),
        power=float(entry["power_w"]),
        source=f"{entry['source']} ({entry['date']})",
    )


def model(name: str | Path) -> Transformer:
    """Return a model by its catalog name, or from a ``config.json`` (or the folder that holds it).

    Raises
    ------
    InputError
        If the name is neither in the catalog nor a path that exists; the nearest names are given.

    Source
    ------
    ``Transformer.source`` of each entry: the public ``config.json``.

    Examples
    --------
    >>> model("llama-2-13b").layers
    40
    """
    table = _table("models")
    if name not in table:
        if Path(name).exists() or str(name).endswith(".json"):
            return from_hf_config(name)
        _unknown("model", str(name), table, _CONFIG_PATH)
    return _catalog_model(str(name))


@cache
def _catalog_model(name: str) -> Transformer:
    entry = dict(_table("models")[name])
    del entry["published_parameters"]
    entry["source"] = f"{entry['source']} ({entry.pop('date')})"
    return Transformer(name=name, **entry)


def published_parameters(name: str) -> int:
    """Return the parameter count that the makers of a catalog model publish [-], for comparison with the computed one.

    Raises
    ------
    InputError
        If the name is not in the catalog.

    Examples
    --------
    >>> published_parameters("llama-2-7b")
    6738415616
    """
    table = _table("models")
    if name not in table:
        _unknown("model", name, table)
    return int(table[name]["published_parameters"])


def hub(name: str) -> str | None:
    """Return the Hugging Face repository whose ``config.json`` a catalog model's dimensions are from, None if unknown.

    Base models: serve the fine-tuned one that your quality was measured on, which has the same dimensions.

    Examples
    --------
    >>> hub("llama-2-13b")
    'meta-llama/Llama-2-13b-hf'
    """
    entry = _table("models").get(name)
    found = re.match(r"config\.json of ([\w.-]+/[\w.-]*\w)", entry["source"]) if entry else None
    return found[1] if found else None

"""Fitted profiles: where they are kept, how they are read and written, and what is done for a GPU nobody measured."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import tomllib
from functools import cache
from pathlib import Path

from theory.catalog import accelerator as _accelerator
from theory.errors import InputError, refuse, require
from theory.latency import Efficiency, Profile
from theory.specs import Accelerator

FOLDER = Path(__file__).parent / "profiles"
# More spread of ln(time) where nothing was measured [-]. Near: the same chip with another memory, H100 to H200 in
# studies/latency_transfer. Far: another chip; the A100 profile predicts H100 steps 30 to 42 % too slow.
NEAR_SPREAD = 0.08
FAR_SPREAD = 0.35


def available_profiles() -> tuple[str, ...]:
    """Return the names of the profiles shipped with the package.

    Examples
    --------
    >>> "h100-sxm" in available_profiles()
    True
    """
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load_profile(name: str | Path) -> Profile:
    """Return the profile of that name, or the one in that TOML file.

    Raises
    ------
    InputError
        If the name is unknown (the message lists the known ones) or the file is not a profile.

    Examples
    --------
    >>> load_profile("h100-sxm").accelerator
    'h100-sxm'
    """
    if str(name).endswith(".toml"):
        return _read(Path(name))
    return _shipped(str(name))


@cache
def _shipped(name: str) -> Profile:
    return _read(FOLDER / f"{name}.toml")


def _read(path: Path) -> Profile:
    if not path.is_file():
        known, given = ", ".join(available_profiles()), path.stem if path.parent == FOLDER else str(path)
        refuse("profile", f"must be one of {known}, or a path to a .toml file", given)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"`profile` must be a TOML file; {path.name} is not: {error}.") from error
    return _from_table(table, path.name)


def serving_profile(accelerator: Accelerator, name: str | Path | None = None, engine: str = "vllm") -> Profile:
    """Return the profile to predict serving on ``accelerator`` with.

    The one named, or the one fitted to serving kernels of this accelerator (``-vllm`` before others); for an
    accelerator that was not measured, that of a near relative transferred to its datasheet and tagged so. For
    TensorRT-LLM its kernels are :func:`fused`: those of its own were not measured.

    Raises
    ------
    InputError
        If the name is unknown.

    Examples
    --------
    >>> from theory.catalog import accelerator
    >>> serving_profile(accelerator("h100-sxm")).name, serving_profile(accelerator("l40s")).provenance
    ('h100-sxm-vllm', 'transferred')
    """
    known = available_profiles()
    own = next((n for n in (f"{accelerator.name}-vllm", accelerator.name) if n in known), None)
    relative = "a100-80g-sxm" if accelerator.name.startswith("a100") else "h100-sxm-vllm"
    profile = load_profile(name or own or relative)
    if name is None and engine == "trtllm":
        profile = fused(profile)
    return profile if profile.accelerator == accelerator.name else transfer(profile, accelerator)


def fused(profile: Profile) -> Profile:
    """Return the profile for an engine that fuses element-wise work and fp8 rounding into its neighbours.

    No thread block walks a whole row alone, and an fp8 product starts as a bf16 one does. Inferred from serving rows
    of TensorRT-LLM: with the kernels of vLLM the models of 32, 64 and 80 layers want different gaps between kernels,
    with fused ones those of 32 and 64 agree (studies/serving_rows).
    """
    own = profile.efficiency
    return dataclasses.replace(
        profile,
        name=f"{profile.name}, fused",
        efficiency=dataclasses.replace(own, element_row=0.0, fp8_start=own.gemm_start),
    )


def _from_table(table: dict[str, object], where: str) -> Profile:
    known = {f.name for f in dataclasses.fields(Profile)}
    for key in ("name", "accelerator", "engine", "provenance", "efficiency"):
        require(key in table, "profile", f"must give `{key}`", where, "Write profiles with `tierwise fit`.")
    for key in table:
        require(key in known, "profile", f"may only hold {', '.join(sorted(known))}", f"{key} in {where}")
    efficiency = table["efficiency"]
    names = {f.name for f in dataclasses.fields(Efficiency)}
    if not isinstance(efficiency, dict) or set(efficiency) != names:
        given = set(efficiency) if isinstance(efficiency, dict) else set()
        refuse("efficiency", f"must hold exactly {', '.join(sorted(names))}", sorted(given ^ names), "These differ.")
    values = {key: float(value) for key, value in efficiency.items()}
    residual = table.get("residual", {})
    return Profile(
        name=str(table["name"]),
        accelerator=str(table["accelerator"]),
        engine=str(table["engine"]),
        provenance=table["provenance"],  # type: ignore[arg-type]
        efficiency=Efficiency(**values),
        parameters=tuple(table.get("parameters", ())),  # type: ignore[arg-type]
        covariance=tuple(tuple(map(float, row)) for row in table.get("covariance", ())),  # type: ignore[attr-defined]
        residual={str(k): float(v) for k, v in residual.items()},  # type: ignore[attr-defined]
        allreduce=_curves(table.get("allreduce", {})),
        rows=str(table.get("rows", "")),
        source=str(table.get("source", "")),
        date=str(table.get("date", "")),
    )


def _curves(table: object) -> dict[int, tuple[tuple[float, float], ...]]:
    if not isinstance(table, dict) or not all(key.startswith("tp") and key[2:].isdigit() for key in table):
        refuse("allreduce", "must hold knots under tp2, tp4, ...", table)
    return {int(key[2:]): tuple((float(size), float(time)) for size, time in knots) for key, knots in table.items()}


def save_profile(profile: Profile, path: Path) -> None:
    """Write ``profile`` as TOML, whole or not at all (written beside and moved into place)."""
    text = _to_toml(profile)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def _to_toml(profile: Profile) -> str:
    lines = ["# Profile: efficiencies against the datasheet. Meaning and unit of each: theory/latency.py, Efficiency."]
    for key in ("name", "accelerator", "engine", "provenance", "rows", "source", "date"):
        lines.append(f"{key} = {_quote(getattr(profile, key))}")
    lines.append(f"parameters = [{', '.join(map(_quote, profile.parameters))}]")
    rows = (f"  [{', '.join(f'{v:.6g}' for v in row)}]," for row in profile.covariance)
    lines += ["covariance = [ # of the logarithms of the parameters", *rows, "]"]
    lines += ["", "[residual] # spread of ln(measured/predicted) by part"]
    lines += [f"{key} = {value:.6g}" for key, value in profile.residual.items()]
    if profile.allreduce:
        lines += ["", "[allreduce] # measured, made monotone: [size in byte, time in s]; the law holds elsewhere"]
        lines += [f"tp{tp} = [{', '.join(f'[{s:.0f}, {t:.4g}]' for s, t in k)}]" for tp, k in profile.allreduce.items()]
    lines += ["", "[efficiency]"]
    lines += [f"{f.name} = {getattr(profile.efficiency, f.name):.8g}" for f in dataclasses.fields(Efficiency)]
    return "\n".join(lines) + "\n"


def transfer(profile: Profile, to_accelerator: Accelerator) -> Profile:
    """Return ``profile`` for an accelerator nobody measured: same efficiencies, its datasheet, a wider interval.

    The interval widens little where only memory differs (same SMs and FLOP rate) and much where the chip does.
    """
    origin = _accelerator(profile.accelerator)
    near = (origin.sms, origin.flops_bf16) == (to_accelerator.sms, to_accelerator.flops_bf16)
    added = NEAR_SPREAD if near else FAR_SPREAD
    residual = {part: (spread**2 + added**2) ** 0.5 for part, spread in profile.residual.items()}
    return dataclasses.replace(
        profile,
        name=f"{to_accelerator.name}-from-{profile.name}",
        accelerator=to_accelerator.name,
        provenance="transferred",
        residual=residual,
        allreduce={},
        rows=f"none on {to_accelerator.name}; those of {profile.name}: {profile.rows}",
    )

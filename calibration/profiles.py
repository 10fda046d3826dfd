"""Fitted profiles: where they are kept, how they are read and written, and what is done for a GPU nobody measured."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import tomllib
from pathlib import Path

from theory.errors import InputError, refuse, require
from theory.latency import Efficiency, Profile
from theory.specs import Accelerator

FOLDER = Path(__file__).parent / "profiles"
TRANSFER_SPREAD = 0.08  # more spread of ln(time) where nothing was measured; assumed, see studies/latency_transfer [-]


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
    path = Path(name) if str(name).endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        refuse("profile", f"must be one of {', '.join(available_profiles())}, or a path to a .toml file", str(name))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"`profile` must be a TOML file; {path.name} is not: {error}.") from error
    return _from_table(table, path.name)


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
    """Return ``profile`` for an accelerator nobody measured: same efficiencies, its datasheet, a wider interval."""
    residual = {part: (spread**2 + TRANSFER_SPREAD**2) ** 0.5 for part, spread in profile.residual.items()}
    return dataclasses.replace(
        profile,
        name=f"{to_accelerator.name}-from-{profile.name}",
        accelerator=to_accelerator.name,
        provenance="transferred",
        residual=residual,
        allreduce={},
        rows=f"none on {to_accelerator.name}; those of {profile.name}: {profile.rows}",
    )

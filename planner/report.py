"""A plan or a simulation on disk: JSON, tables, what to run. Files are written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from theory.errors import InputError

from .day_report import day_csv
from .launch import launch_files, resolved
from .requests import RequestFormat, write_requests
from .scenario import Scenario
from .simulate import Simulation
from .sweep import sweep_csv

Contents = Mapping[str, bytes]  # of files, by name

NOTHING: Contents = {}


def write_report(
    result: dict[str, Any], folder: Path, scenario: Scenario, start: Path, pages: Contents = NOTHING
) -> list[Path]:
    """Write plan.json, frontier.csv and the files to run into ``folder`` and return their paths.

    The files depend on the scenario and the seed alone: the time the planner took is left out. Those to run are
    launch-TIER.sh, bench.sh, policy.json and scenario.yaml (:mod:`planner.launch`).

    Parameters
    ----------
    start : Path
        Where relative paths of the scenario start.
    pages : mapping
        Pictures and pages to write with them.

    Raises
    ------
    InputError
        If the folder cannot be made or written.
    """
    stable = {k: v for k, v in result.items() if k != "wall_s"}
    contents = {
        "plan.json": (json.dumps(stable, indent=2, allow_nan=False) + "\n").encode(),
        "frontier.csv": _csv(result["frontier"]).encode(),
        **pages,
        **{name: text.encode() for name, text in launch_files(result, scenario, start, folder).items()},
    }
    return write_contents(folder, contents)


def write_day(
    result: dict[str, Any], folder: Path, scenario: Scenario, start: Path, pages: Contents = NOTHING
) -> list[Path]:
    """Write day.json, day.csv, scenario.yaml and ``pages`` into ``folder`` and return their paths.

    The files depend on the scenario and the seed alone: the time the planner took is left out.

    Raises
    ------
    InputError
        If the folder cannot be made or written.
    """
    stable = {k: v for k, v in result.items() if k != "wall_s"}
    contents = {
        "day.json": (json.dumps(stable, indent=2, allow_nan=False) + "\n").encode(),
        "day.csv": day_csv(result).encode(),
        "scenario.yaml": resolved(scenario, result["provenance"]["seed"], start, folder).encode(),
        **pages,
    }
    return write_contents(folder, contents)


def write_sweep(result: dict[str, Any], folder: Path, pages: Contents = NOTHING) -> list[Path]:
    """Write sweep.json, sweep.csv and ``pages``; return their paths. Finished points stay in sweep.jsonl.

    Raises
    ------
    InputError
        If the folder cannot be made or written.
    """
    contents = {
        "sweep.json": (json.dumps(result, indent=2, allow_nan=False) + "\n").encode(),
        "sweep.csv": sweep_csv(result["points"]).encode(),
        **pages,
    }
    return write_contents(folder, contents)


def write_pareto(result: dict[str, Any], folder: Path, pages: Contents = NOTHING) -> list[Path]:
    """Write pareto.json, pareto.csv and ``pages`` of several objectives; return their paths.

    Raises
    ------
    InputError
        If the folder cannot be made or written.
    """
    contents = {
        "pareto.json": (json.dumps(result, indent=2, allow_nan=False) + "\n").encode(),
        "pareto.csv": _pareto_csv(result).encode(),
        **pages,
    }
    return write_contents(folder, contents)


PARETO_COLUMNS = (
    *("usd_per_1000_requests", "quality", "e2e_mean_s", "joules_per_request"),
    *("ttft_p99_s", "tpot_mean_s", "gpus"),
)


def _pareto_csv(result: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*PARETO_COLUMNS, "best_in", "tiers"])
    for row in result["pareto"]:
        writer.writerow([*(row[c] for c in PARETO_COLUMNS), " ".join(row["best_in"]), "; ".join(row["tiers"])])
    return text.getvalue()


def write_simulation(
    simulation: Simulation, form: RequestFormat, folder: Path, pages: Contents = NOTHING
) -> list[Path]:
    """Write simulate.json, requests.csv or .parquet, and ``pages``; return their paths.

    The files depend on the scenario and the seed alone: the time the engine took is left out.

    Raises
    ------
    InputError
        If the folder cannot be made or written.
    """
    stable = {k: v for k, v in simulation.result.items() if k != "wall_s"}
    contents = {"simulate.json": (json.dumps(stable, indent=2, allow_nan=False) + "\n").encode(), **pages}
    writers = {name: _of(content) for name, content in contents.items()}
    writers[f"requests.{form}"] = lambda path: write_requests(simulation.requests, form, path)
    return write_files(folder, writers)


def _of(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def write_contents(folder: Path, contents: Contents) -> list[Path]:
    """Write files whose contents are known, as :func:`write_files`."""
    return write_files(folder, {name: _of(content) for name, content in contents.items()})


def write_files(folder: Path, writers: dict[str, Callable[[Path], object]]) -> list[Path]:
    """Write all files beside their places, then move them in: an interrupt leaves none half written.

    Raises
    ------
    InputError
        If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as part:
            for name, write in writers.items():
                write(Path(part) / name)
            return [(Path(part) / name).replace(folder / name) for name in writers]
    except OSError as error:
        raise InputError(f"`output` must be a folder that can be written; got {folder} ({error.strerror}).") from None


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["usd_per_1000_requests", "quality", "gpus", "on_hull", "lambda_low_usd", "lambda_high_usd", "tiers"]
    )
    for row in rows:
        low, high = row["lambda_usd_interval"] or (None, None)
        cells = (row["usd_per_1000_requests"], row["quality"], row["gpus"], row["on_hull"], low, high)
        writer.writerow([*cells, "; ".join(row["tiers"])])
    return text.getvalue()

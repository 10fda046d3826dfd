"""Step times of Hugging Face models over a grid: what will be run, what it needs, and the run itself.

A run is planned from the step-time law before anything is touched (:func:`plan_run`), and written row by row, so that
an interrupted one goes on where it stopped (:func:`measure`).
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from theory.catalog import accelerator, model
from theory.errors import InfeasibleError, InputError, refuse, require
from theory.latency import step_time
from theory.memory import weights_per_gpu
from theory.specs import Accelerator, Transformer, check_tp
from theory.work import kv_bytes_per_token, parameters

from .forward import MODES, Clock, Loading, Placement, has_weights, load_model, prepare, time_passes
from .machine import (
    Device,
    find_machine,
    in_law_numbers,
    out_of_memory,
    processor,
    require_cuda,
    sensors,
    versions,
)
from .measurements import NUMBER_BYTES, Log, Point, Row, header_of, read_measurements, work_of
from .step_fit import start_profile

if TYPE_CHECKING:
    from torch import nn

Said = Callable[[str, int, int], None]  # what, done, of
Group = tuple[str, int, str]  # model, tp, mode

RECIPES = Path(__file__).parent / "recipes"
# For the plan alone; the law knows nothing of them. All assumed.
LAUNCH_S = 30.0  # imports and process groups of one launch on GPUs [s]
CPU_LAUNCH_S = 5.0  # imports on a CPU [s]
DRAW_BYTES = {"cuda": 20e9, "cpu": 0.5e9}  # random weights made a second, one GPU [byte/s]
LOAD_BYTES = 1e9  # of a checkpoint read a second [byte/s]
POINT_S = {"cuda": 0.3, "cpu": 0.02}  # making inputs, caches and graphs, reading sensors [s]
COMPILE_S = 40.0  # compiling one shape of a pass [s]; a 2-layer model on one CPU core took 39
RESERVE = {"cuda": 1.5e9, "cpu": 0.5e9}  # context of the device, libraries, the allocator's rounding [byte]
OPTIONS = ("tp", "mode", "device", "accelerator", "dtype", "placement", "repeats", "threads", "clock", "seed")
PLACEMENTS = ("single", "device-map", "tp")


@dataclass(frozen=True, slots=True)
class Grid:
    """The points of a run: every combination of batch, context and new tokens, and prompts of their own.

    Raises
    ------
    InputError
        If a list is not of whole numbers in range, or nothing is left to measure.
    """

    batch: tuple[int, ...] = (1, 8)  # sequences of a decode or verify step [-]
    context: tuple[int, ...] = (128, 512)  # tokens cached of each [tokens]
    new: tuple[int, ...] = (1, 5)  # new tokens of each: 1 decodes, more verify [tokens]
    prefill: tuple[int, ...] = (128, 512)  # tokens of a prompt [tokens]
    prefill_batch: tuple[int, ...] = (1,)  # prompts of one pass [-]

    def __post_init__(self) -> None:
        for spec in fields(self):
            values = getattr(self, spec.name)
            ok = all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values)
            require(ok, spec.name, "must be a list of whole numbers of at least 1", list(values))
        steps = all((self.batch, self.context, self.new))
        require(steps or all((self.prefill, self.prefill_batch)), "grid", "must hold at least one point", "none")

    def points(self, group: Group) -> list[Point]:
        """Return the points of a model, split and mode, each once."""
        rows = [
            Point(*group, "decode" if q == 1 else "verify", b, s, q)
            for b in self.batch
            for s in self.context
            for q in self.new
        ]
        rows += [Point(*group, "prefill", b, 0, p) for b in self.prefill_batch for p in self.prefill]
        return list(dict.fromkeys(rows))


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for on the command line or by a recipe.

    Raises
    ------
    InputError
        If a choice is unknown, or does not go with another.
    """

    models: tuple[str, ...]  # catalog names, config.json files, checkpoint folders
    tp: tuple[int, ...] = (1,)
    mode: tuple[str, ...] = ("eager",)
    device: Device = "cpu"
    accelerator: str | None = None  # catalog name of the GPU; by default what the device calls itself
    dtype: str = "fp32"
    placement: Placement = "single"
    grid: Grid = Grid()
    warmup: int = 3
    repeats: int = 10
    threads: int = 1  # of the CPU
    clock: Literal["wall", "cpu"] = "wall"  # on a CPU: cpu leaves out the time that other programs had it
    seed: int = 0
    recipe: str = ""
    expected_s: float = 0.0  # what a recipe says of itself; for people [s]

    def __post_init__(self) -> None:
        require(len(self.models) > 0, "model", "must be given at least once", list(self.models))
        for name, known in (("device", ("cpu", "cuda")), ("dtype", tuple(NUMBER_BYTES)), ("placement", PLACEMENTS)):
            value = getattr(self, name)
            require(value in known, name, f"must be one of {', '.join(known)}", value)
        modes = set(self.mode)
        require(len(modes) > 0 and modes <= set(MODES), "mode", f"must be of {', '.join(MODES)}", list(self.mode))
        graphs = "CUDA graphs need --device cuda; take eager or compile."
        require(self.device == "cuda" or "graphs" not in modes, "mode", "must not be graphs on a CPU", "graphs", graphs)
        require(self.clock in ("wall", "cpu"), "clock", "must be one of wall, cpu", self.clock)
        timed = self.clock == "wall" or (self.device == "cpu" and self.threads == 1)
        require(timed, "clock", "must be wall, unless for --device cpu with one thread", self.clock)
        alone = self.placement == "single" or "graphs" not in modes
        require(alone or self.placement == "tp", "mode", "must not be graphs with a device map", "graphs")
        for name, least in (("warmup", 0), ("repeats", 3), ("threads", 1)):
            require(getattr(self, name) >= least, name, f"must be at least {least}", getattr(self, name))


@dataclass(frozen=True, slots=True)
class Plan:
    """A run before it is begun."""

    request: Request
    shapes: Mapping[str, Transformer]  # by the name they have in the file
    sources: Mapping[str, str]  # name -> what was given
    machine: Accelerator
    points: tuple[Point, ...]
    seconds: Mapping[Point, float]  # expected of each point, warm-up and set-up included [s]
    bytes: Mapping[Point, float]  # needed on one GPU [byte]
    left_out: Mapping[str, str]  # "model tp" -> why

    @property
    def groups(self) -> list[Group]:
        """The models, splits and modes, in the order of the run."""
        return list(dict.fromkeys((p.model, p.tp, p.mode) for p in self.points))

    def loading_s(self, group: Group) -> float:
        """Return how long the weights of a group are expected to take to be there [s]."""
        name, tp, _ = group
        size = weights_per_gpu(self.shapes[name], tp) * NUMBER_BYTES[self.request.dtype] / 2
        rate = LOAD_BYTES if has_weights(self.sources[name]) else DRAW_BYTES[self.request.device]
        return size / rate

    def expected_s(self, tp: int | None = None) -> float:
        """Return how long the launch over ``tp`` GPUs, or all of them, is expected to take [s]."""
        groups = [g for g in self.groups if tp in (None, g[1])]
        launches = len({g[1] for g in groups}) * (LAUNCH_S if self.request.device == "cuda" else CPU_LAUNCH_S)
        points = sum(s for p, s in self.seconds.items() if tp in (None, p.tp))
        return launches + sum(map(self.loading_s, groups)) + points


# --- before the run --------------------------------------------------------------------------------------------------


def recipes() -> tuple[str, ...]:
    """Return the names of the recipes shipped with the package.

    Examples
    --------
    >>> recipes()
    ('node-8xh100',)
    """
    return tuple(sorted(p.stem for p in RECIPES.glob("*.toml")))


def load_recipe(name: str) -> Request:
    """Return the request of a shipped recipe, or of a TOML file.

    Raises
    ------
    InputError
        If there is no such recipe, or it holds what is not known.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    require(path.is_file(), "recipe", f"must be one of {', '.join(recipes())}, or a path to a .toml file", name)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"`recipe` must be a TOML file; {path.name} is not: {error}.") from None
    grid = {f.name for f in fields(Grid)}
    known = {f.name for f in fields(Request)} - {"grid", "recipe"}
    strange = sorted(set(table) - grid - known)
    require(not strange, "recipe", f"may only hold {', '.join(sorted(grid | known))}", strange)
    lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    try:
        inner = Grid(**{k: v for k, v in lists.items() if k in grid})
        return Request(**{k: v for k, v in lists.items() if k in known}, grid=inner, recipe=name)
    except TypeError as error:
        raise InputError(f"`recipe` must give numbers and lists of them as the shipped ones do: {error}.") from None


def plan_run(request: Request, dry: bool = False) -> Plan:
    """Return what a request comes to: its points from small to large, their time and memory.

    With ``dry`` no GPU is touched: the accelerator must then be named.

    Raises
    ------
    InputError
        If a model, the accelerator or the device is not there, or a context is longer than a model takes.
    InfeasibleError
        If no point fits the memory of the accelerator.
    """
    shapes, sources = _models(request.models)
    machine = _machine(request, dry)
    memory = true_memory(machine, request.dtype)
    points: list[Point] = []
    left_out: dict[str, str] = {}
    for group in ((n, t, m) for n in shapes for t in request.tp for m in request.mode):
        these = _group_points(shapes[group[0]], group, request)
        fit = [p for p, size in these.items() if size <= memory]
        points += sorted(fit, key=lambda p: these[p])
        if len(fit) < len(these):
            least = f"; the smallest needs {min(these.values()) / 1e9:.1f} GB on each device" if not fit else ""
            left_out[" ".join(map(str, group))] = f"{len(these) - len(fit)} of {len(these)} points do not fit{least}"
    if not points:
        raise InfeasibleError(
            f"nothing fits the {memory / 1e9:.1f} GB of {machine.name}: "
            f"{'; '.join(f'{k}: {v}' for k, v in left_out.items())}. "
            "Take more GPUs (--tp), a smaller model, batch or context."
        )
    needs = {p: need(shapes[p.model], p, request.dtype, request.device) for p in points}
    return Plan(
        request, shapes, sources, machine, tuple(points), _seconds(shapes, machine, request, points), needs, left_out
    )


def _group_points(shape: Transformer, group: Group, request: Request) -> dict[Point, float]:
    """Return the points of a group and the bytes each needs on one device [byte]."""
    check_tp(shape, group[1])
    points = request.grid.points(group)
    longest = max(p.context + p.new for p in points)
    rule = f"must, new tokens included, be at most {shape.max_context}, the longest sequence of {shape.name} [tokens]"
    require(longest <= shape.max_context, "context", rule, longest)
    return {p: need(shape, p, request.dtype, request.device) for p in points}


def _seconds(
    shapes: Mapping[str, Transformer], machine: Accelerator, request: Request, points: list[Point]
) -> dict[Point, float]:
    """Return what each point is expected to take, set-up and warm-up included [s]."""
    rounds = request.warmup + request.repeats
    expected: dict[Point, float] = {}
    for (name, tp, mode), group in groupby(points, key=lambda p: (p.model, p.tp, p.mode)):
        these = list(group)
        time = step_time(shapes[name], machine, start_profile(machine, mode), work_of(these), tp).total
        fixed = POINT_S[request.device] + (COMPILE_S if mode == "compile" else 0.0)
        expected |= {p: fixed + rounds * float(t) for p, t in zip(these, time, strict=True)}
    return expected


def need(shape: Transformer, point: Point, dtype: str, device: Device) -> float:
    r"""Return the bytes a point needs on one GPU [byte].

    .. math:: M = R + W_t + \kappa_t B (S + q) (1 + 2 / L) + b B q (4 d + 3 f / t) + (b + 4) V B q'

    Weights, KV cache (a growing one is copied layer by layer), the largest activations, and logits with a float copy
    (q' is 1 for a prompt).

    Source
    ------
    Derivation; the reserve R is assumed.
    """
    width = NUMBER_BYTES[dtype]
    rows = point.batch * point.new
    weights = weights_per_gpu(shape, point.tp) * width / 2
    kv = kv_bytes_per_token(shape, tp=point.tp) / point.tp * width / 2
    cache = kv * point.batch * (point.context + point.new) * (1 + 2 / shape.layers)
    activations = width * rows * (4 * shape.hidden + 3 * shape.ffn / point.tp)
    logits = (width + 4) * shape.vocab * (point.batch if point.phase == "prefill" else rows)
    return RESERVE[device] + weights + cache + activations + logits


def _models(given: tuple[str, ...]) -> tuple[dict[str, Transformer], dict[str, str]]:
    shapes: dict[str, Transformer] = {}
    for source in given:
        shape = model(source)
        twice = shape.name in shapes
        require(not twice, "model", "must have a folder name of its own", source, f"{shape.name} was given before.")
        shapes[shape.name] = shape
    return shapes, dict(zip(shapes, given, strict=True))


def _machine(request: Request, dry: bool) -> Accelerator:
    if request.device == "cpu":
        import torch

        torch.set_num_threads(request.threads)
        return find_machine("cpu", request.dtype, request.threads, request.accelerator)
    if dry and request.accelerator is not None:
        return in_law_numbers(accelerator(request.accelerator), request.dtype)
    return find_machine("cuda", request.dtype, request.threads, request.accelerator)


def true_memory(machine: Accelerator, dtype: str) -> float:
    """Return the bytes of memory of a machine whose bytes are counted as the law's; see `in_law_numbers` [byte]."""
    return machine.memory * NUMBER_BYTES[dtype] / 2


def commands(plan: Plan, output: str) -> list[str]:
    """Return the shell command of each launch, one per number of GPUs."""
    r = plan.request
    base = load_recipe(r.recipe) if r.recipe else Request(models=r.models)
    options = [(f.name, getattr(r, f.name), getattr(base, f.name)) for f in fields(Request) if f.name in OPTIONS]
    options += [(f.name, getattr(r.grid, f.name), getattr(base.grid, f.name)) for f in fields(Grid)]
    changed = [(name, value) for name, value, usual in options if value != usual]
    words = ["--recipe", r.recipe] if r.recipe else list(r.models)
    for name, value in changed:
        words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    line = shlex.join(["measure", *words, "--output", output])
    degrees = sorted({p.tp for p in plan.points})
    starts = [f"torchrun --standalone --nproc-per-node {tp} -m tierwise" if tp > 1 else "tierwise" for tp in degrees]
    return [f"{start} {line}" for start in starts]


def plan_report(plan: Plan, output: Path | None) -> dict[str, Any]:
    """Return the plan for people and programs: groups, launches, what is done already, memory, expected time."""
    done = read_measurements(output).done() if output is not None and output.exists() else set()
    rows = []
    for group in plan.groups:
        points = [p for p in plan.points if (p.model, p.tp, p.mode) == group]
        rows.append(
            {
                **dict(zip(("model", "tp", "mode"), group, strict=True)),
                "parameters": parameters(plan.shapes[group[0]]),
                "points": len(points),
                "done": sum(p in done for p in points),
                "memory_gb": round(max(plan.bytes[p] for p in points) / 1e9, 3),
                "expected_s": round(plan.loading_s(group) + sum(plan.seconds[p] for p in points), 1),
            }
        )
    launches = [
        {"command": line, "tp": tp, "expected_s": round(plan.expected_s(tp), 1)}
        for tp, line in zip(sorted({p.tp for p in plan.points}), commands(plan, str(output or "FILE.csv")), strict=True)
    ]
    return {
        "accelerator": plan.machine.name,
        "source": plan.machine.source,
        "memory_available_gb": round(true_memory(plan.machine, plan.request.dtype) / 1e9, 3),
        "dtype": plan.request.dtype,
        "points": len(plan.points),
        "groups": rows,
        "left_out": dict(plan.left_out),
        "launches": launches,
        "expected_s": round(plan.expected_s(), 1),
        "provenance": "step-time law and assumed loading times; CPU efficiencies assumed"
        if plan.request.device == "cpu"
        else "step-time law with the fitted profile of serving kernels; launches and loading times assumed",
    }


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a launch: one, or one per GPU under torchrun."""

    rank: int
    world: int

    @classmethod
    def of_launch(cls) -> Ranks:
        """Return those of this launch."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def join(self, device: Device) -> None:
        """Meet the other processes."""
        import torch

        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if self.world > 1 and not torch.distributed.is_initialized():
            limit = datetime.timedelta(minutes=5)
            torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=limit)
            torch.distributed.barrier()

    def leave(self) -> None:
        """Part from the other processes."""
        import torch

        if self.world > 1:
            torch.distributed.destroy_process_group()

    def slowest(self, times: list[float], device: Device) -> list[float]:
        """Return the longest time of all processes, repeat by repeat [s]."""
        if self.world == 1:
            return times
        import torch

        shared = torch.tensor(times, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        return [float(t) for t in shared]


def measure(plan: Plan, output: Path, progress: Said) -> dict[str, Any]:
    """Time the points of this launch that are not in the file yet; return what was done.

    Under torchrun with t processes the points over t GPUs are of this launch, alone those over one.

    Raises
    ------
    InputError
        If the file is of another run, or no point is for this number of processes.
    InfeasibleError
        If memory ran out at every point tried.
    """
    ranks = Ranks.of_launch()
    request = plan.request
    if request.device == "cuda":
        require_cuda()
    degrees = sorted({p.tp for p in plan.points})
    if ranks.world not in degrees:
        way_out = "; ".join(commands(plan, str(output)))
        refuse("tp", f"must be {ranks.world}, the processes of this launch", degrees, f"Start it so: {way_out}.")
    plan = replace(plan, request=replace(request, placement="tp")) if ranks.world > 1 else plan
    done = read_measurements(output).done() if output.exists() else set()  # before any process writes
    ranks.join(request.device)
    try:
        if ranks.rank == 0:
            with Log(output, header_of(plan.shapes, plan.machine, conditions(plan))) as log:
                return _measure(plan, ranks, done, log.add, progress)
        return _measure(plan, ranks, done, _nowhere, _nowhere)
    finally:
        ranks.leave()


def _nowhere(*_: object) -> None:
    """Say nothing: the first process speaks for all."""


def clock_of(request: Request) -> Clock:
    """Return what a request is timed with."""
    if request.device == "cpu":
        return request.clock
    return "wall" if request.placement == "device-map" else "events"


def conditions(plan: Plan) -> dict[str, str]:
    """Return what must be the same for measured times to be comparable."""
    r = plan.request
    weights = {name: "checkpoint" if has_weights(s) else "random" for name, s in plan.sources.items()}
    return {
        "device": r.device,
        "processor": processor(r.device),
        "dtype": r.dtype,
        "threads": str(r.threads),
        "placement": "device-map" if r.placement == "device-map" else "single or tp",
        "attention": "sdpa",
        "weights": json.dumps(weights),
        "warmup": str(r.warmup),
        "repeats": str(r.repeats),
        "seed": str(r.seed),
        "clock": {"events": "CUDA events", "wall": "monotonic", "cpu": "CPU time of the process"}[clock_of(r)],
        **versions(r.device),
    }


def _measure(plan: Plan, ranks: Ranks, done: set[Point], add: Callable[[Row], None], progress: Said) -> dict[str, Any]:
    mine = [p for p in plan.points if p.tp == ranks.world]
    todo = [p for p in mine if p not in done]
    rows: list[Row] = []
    for group, points in groupby(todo, key=lambda p: (p.model, p.tp, p.mode)):
        for row in _group_rows(plan, ranks, group, list(points)):
            add(row)
            rows.append(row)
            progress("measuring", len(rows), len(todo))
    return _outcome(len(mine), len(mine) - len(todo), rows)


def _group_rows(plan: Plan, ranks: Ranks, group: Group, points: list[Point]) -> Iterator[Row]:
    """Yield the rows of one model; what needs at least as much as a point that did not fit is not tried."""
    network, failed = _loaded(plan, group, points[0])
    if failed:
        yield failed
        yield from (Row(p, "skipped", note="its weights do not fit") for p in points[1:])
        return
    full: list[Point] = []
    for point in points:
        if any(f.within(point) for f in full):
            yield Row(point, "skipped", note="a smaller point ran out of memory")
            continue
        row = _timed(network, point, plan.request, ranks)
        if row.status == "oom":
            full.append(point)
        yield row
    del network
    _free(plan.request.device)


def _loaded(plan: Plan, group: Group, first: Point) -> tuple[nn.Module | None, Row | None]:
    r = plan.request
    try:
        how = Loading(r.device, r.dtype, r.placement, r.seed)
        return load_model(plan.sources[group[0]], plan.shapes[group[0]], how), None
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        note = str(error)[:200]
    _free(r.device)
    return None, Row(first, "oom", sensors=sensors(r.device), note=note)


def _timed(network: nn.Module | None, point: Point, request: Request, ranks: Ranks) -> Row:
    """Return the row of a point, whatever came of it."""
    import torch

    seen = sensors(request.device)
    try:
        with torch.inference_mode():
            step = prepare(network, point)
            times = time_passes(step, clock_of(request), request.warmup, request.repeats)
        times = ranks.slowest(times, request.device)
        return Row(point, "ok", tuple(times), _most_memory(request.device), seen)
    except (RuntimeError, MemoryError) as error:  # a note, not the error: its frames would keep the tensors
        status: Literal["oom", "failed"] = "oom" if out_of_memory(error) else "failed"
        note = f"{type(error).__name__}: {error}"[:200]
    _free(request.device)
    return Row(point, status, sensors=seen, note=note)


def _free(device: Device) -> None:
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def _most_memory(device: Device) -> float | None:
    if device == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:
        return None
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _outcome(points: int, before: int, rows: list[Row]) -> dict[str, Any]:
    counts = {s: sum(r.status == s for r in rows) for s in ("ok", "oom", "skipped", "failed")}
    advice = " ".join(filter(None, (_advice(rows, "oom"), _advice(rows, "failed"))))
    if rows and not counts["ok"] and not before:
        raise InfeasibleError(advice)
    return {"points": points, "measured_before": before, "measured": counts.pop("ok"), **counts, "advice": advice}


def _advice(rows: list[Row], status: str) -> str:
    """Return what happened at the first point of that status and what to change; empty if there is none."""
    these = [r for r in rows if r.status == status]
    if not these:
        return ""
    p = these[0].point
    where = f"at {p.model}, tp {p.tp}, {p.mode}, batch {p.batch}, {p.context + p.new} tokens"
    if status == "failed":
        return f"{len(these)} points failed, the first {where}: {these[0].note}. The same command tries them again."
    untimed = sum(r.status in ("oom", "skipped") for r in rows)
    return (
        f"memory ran out {where}; {untimed} points were not timed. Free memory, take more GPUs, or a smaller batch or "
        "context; the same command tries them again."
    )

"""The machine that is measured on: an :class:`~theory.specs.Accelerator`, its sensors, the versions of its software."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from theory.catalog import accelerator, accelerators
from theory.errors import InputError, refuse, require
from theory.specs import Accelerator

from .measurements import NUMBER_BYTES

if TYPE_CHECKING:
    import torch

Device = Literal["cpu", "cuda"]
LAW_NUMBER_BYTES = 2  # the step-time law counts weights, activations and KV cache at bf16 [byte per number]
PROBE_S = 0.15  # how long each probe repeats; its best time counts [s]
PROBE_SIZES = (1 << 21, 1 << 26)  # arrays read to find the bandwidth: one that a cache holds, one that none does [byte]
# Of the square matrices multiplied to find the FLOP rate [-]; on a CPU short enough to be done between other programs.
PROBE_WIDTHS = {"cpu": 384, "cuda": 8192}
PCIE = 64e9  # link of a GPU that is not in the catalog, PCIe 5 x16, one direction [byte/s]; assumed
BOARD_W = 1.0  # power of a machine that is not in the catalog [W]; unknown, and no part of step times
# What a CUDA device calls itself -> catalog; the first that matches.
DEVICE_NAMES = (
    (r"H200", "h200-sxm"),
    (r"H100 PCIe", "h100-pcie"),
    (r"H100.*80GB HBM3|H100 SXM", "h100-sxm"),
    (r"A100-SXM4-40GB", "a100-40g-sxm"),
    (r"A100-SXM4-80GB", "a100-80g-sxm"),
    (r"L40S", "l40s"),
    (r"B200", "b200"),
)


def in_law_numbers(machine: Accelerator, dtype: str) -> Accelerator:
    r"""Return ``machine`` with bytes counted as the step-time law counts them, two to a number.

    .. math:: BW' = \tfrac{2}{b} BW

    and so for link, memory and cache: the law's bytes are 2/b of the true ones when a number has b bytes, so its times
    are the true ones. FLOP rates stay as they are, and must be those of ``dtype``.

    Source
    ------
    Derivation: every byte count of the law is proportional to the bytes of a number.

    Examples
    --------
    >>> gpu = accelerator("h100-sxm")
    >>> in_law_numbers(gpu, "fp32").bandwidth / gpu.bandwidth, in_law_numbers(gpu, "fp16") == gpu
    (0.5, True)
    """
    share = LAW_NUMBER_BYTES / NUMBER_BYTES[dtype]
    if share == 1:
        return machine
    return replace(
        machine,
        name=f"{machine.name}-{dtype}",
        memory=machine.memory * share,
        bandwidth=machine.bandwidth * share,
        link_bandwidth=machine.link_bandwidth * share,
        l2=machine.l2 * share,
        source=f"{machine.source}; bytes x {share:g}, since {dtype} numbers have {NUMBER_BYTES[dtype]} bytes",
    )


def find_machine(device: Device, dtype: str, threads: int, name: str | None = None) -> Accelerator:
    """Return the machine as the law takes it: of the catalog where it is known, probed (0.5 s) where it is not.

    Raises
    ------
    InputError
        If there is no CUDA device, or ``name`` is not in the catalog.
    """
    if device == "cpu":
        require(name is None, "accelerator", "must be left out for --device cpu: the CPU is probed", name)
        return in_law_numbers(_probed_cpu(threads, dtype), dtype)
    require_cuda()
    import torch

    said = torch.cuda.get_device_name()
    known = name or next((n for pattern, n in DEVICE_NAMES if re.search(pattern, said)), None)
    if known is not None and dtype != "fp32":
        return accelerator(known)
    return in_law_numbers(_probed_cuda(said, known, dtype), dtype)


def require_cuda() -> None:
    """Refuse a machine without a usable CUDA device.

    Raises
    ------
    InputError
        If PyTorch sees none; what can be done instead is said.
    """
    import torch

    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else f"; torch {torch.__version__} is built without CUDA"
        refuse(
            "device",
            "must be one that PyTorch sees",
            "cuda",
            f"There is no CUDA device here{built}. Measure on a machine with one, take --device cpu, or see what the "
            f"run would be with --dry-run --accelerator {accelerators()[2]}.",
        )


def _probed_cpu(threads: int, dtype: str) -> Accelerator:
    bandwidth, flops = _probed_rates("cpu", dtype)
    model = re.sub(r"[^a-z0-9]+", "-", processor("cpu").lower()).strip("-")
    return Accelerator(
        name=f"cpu-{model}-{threads}t",
        memory=available_memory("cpu"),
        bandwidth=bandwidth,
        flops_bf16=flops,
        flops_fp8=flops,
        link_bandwidth=bandwidth,
        sms=threads,
        l2=_cache_bytes(),
        power=BOARD_W,
        source=f"measured: probe, {threads} threads, {dtype}, best of {PROBE_S} s each; link as memory, power unknown",
        matrix_units=False,
    )


def _probed_cuda(said: str, known: str | None, dtype: str) -> Accelerator:
    import torch

    bandwidth, flops = _probed_rates("cuda", dtype)
    sheet = torch.cuda.get_device_properties()
    base = accelerator(known) if known else None
    return Accelerator(
        name=known or re.sub(r"[^a-z0-9]+", "-", said.lower()).strip("-"),
        memory=float(sheet.total_memory),
        bandwidth=base.bandwidth if base else bandwidth,
        flops_bf16=flops,
        flops_fp8=flops,
        link_bandwidth=base.link_bandwidth if base else PCIE,
        sms=sheet.multi_processor_count,
        l2=float(sheet.L2_cache_size),
        power=base.power if base else BOARD_W,
        source=f"measured: probe of {said}, {dtype}" + ("; bandwidths: datasheet" if base else "; link: assumed"),
    )


def _probed_rates(device: Device, dtype: str) -> tuple[float, float]:
    """Return the best bandwidth [byte/s] and FLOP rate [FLOP/s] of two short kernels."""
    import torch

    kind = torch_dtype(dtype)
    best = 0.0
    for size in PROBE_SIZES:
        rows = size // NUMBER_BYTES[dtype] // 1024
        matrix, vector = torch.ones(rows, 1024, dtype=kind, device=device), torch.ones(1024, dtype=kind, device=device)
        best = max(best, size / _best_time(lambda a=matrix, b=vector: a @ b, device))  # type: ignore[misc]
    width = PROBE_WIDTHS[device]
    square = torch.ones(width, width, dtype=kind, device=device)
    return best, 2 * width**3 / _best_time(lambda: square @ square, device)


def _best_time(work: Callable[[], object], device: Device) -> float:
    import torch

    with torch.inference_mode():
        best, until = float("inf"), time.perf_counter() + PROBE_S
        work()
        while time.perf_counter() < until or best == float("inf"):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    return best


def torch_dtype(name: str) -> torch.dtype:
    """Return the type of torch by its name here."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def processor(device: Device) -> str:
    """Return what the device calls itself."""
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def available_memory(device: Device) -> float:
    """Return the bytes that are free now on one device, or in the machine's memory [byte]."""
    if device == "cuda":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    if found:
        return 1024.0 * int(found.group(1))
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _cache_bytes() -> float:
    """Return the size of the last-level cache [byte]; 1 MiB where the system does not say."""
    sizes = [p.read_text(encoding="utf-8").strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")]
    return max([1024.0 * int(s[:-1]) * (1024 if s.endswith("M") else 1) for s in sizes], default=1048576.0)


def versions(device: Device) -> dict[str, str]:
    """Return the versions that a measurement depends on."""
    import torch

    found = {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()}
    if device == "cuda":
        found |= {"cuda": str(torch.version.cuda), "driver": (_smi("driver_version") or ["unknown"])[0]}
    return found


def sensors(device: Device) -> dict[str, float | None]:
    """Return temperature [C], clock [MHz] and load (runnable processes, or power in W on a GPU); None if unknown."""
    if device == "cuda":
        names = ("temperature_c", "clock_mhz", "load")
        values = _smi("temperature.gpu,clocks.sm,power.draw")
        return {k: float(v) for k, v in zip(names, values, strict=True)} if values else dict.fromkeys(names)
    clocks = re.findall(r"cpu MHz\s*: ([\d.]+)", _text(Path("/proc/cpuinfo")))
    heat = [_text(p) for p in sorted(Path("/sys/class/thermal").glob("thermal_zone*/temp"))]
    return {
        "temperature_c": max((int(t) / 1000 for t in heat if t.strip().isdigit()), default=None),
        "clock_mhz": max(map(float, clocks), default=None),
        "load": os.getloadavg()[0],
    }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _smi(query: str) -> list[str]:
    """Return what nvidia-smi says of the first visible GPU; nothing where there is no such program."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", first]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return [v.strip() for v in said.strip().splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, IndexError):
        return []


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out."""
    import torch

    said = str(error).lower()
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and not isinstance(error, InputError) and any(w in said for w in words)
    )

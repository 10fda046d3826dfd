"""What an engine adds to the kernels where nothing is fitted: counted, documented or published, not from these points.

Every number has its source beside it. What is not certain has its variations in :data:`VARIATIONS`, so that the page
shows what hangs on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from calibration.engines import EngineTimes
from calibration.profiles import load_profile, serving_profile
from calibration.serving import ServingPoint
from theory.catalog import accelerator, model
from theory.latency import Profile

LAYER_KERNELS = 11  # two norms, four products, rotary, cache write, attention, activation, addition
ASYNCHRONOUS_SINCE = (0, 14)  # release of vLLM from which the next step is scheduled during the one before


@dataclass(frozen=True, slots=True)
class Unfitted:
    """The assumptions, each with its source; the defaults are what is judged."""

    gap: float = 1.3e-6  # between two kernels of a CUDA graph [s]; order of magnitude of NVIDIA's reports on launches
    counted: bool = True  # kernels that a layer has beside LAYER_KERNELS count: see kernels_of_layer
    eager_layer: float = 0.44e-3  # a layer launched without CUDA graph [s]; published latencies, h100_tier_latencies
    host_step: float = 0.5e-3  # host time of a step that kernels do not hide [s]; assumed
    # Host time per sequence of a synchronous scheduler [s]: TPOT of Qwen3-32B over 4 devices with 48 clients is
    # 44.20 ms synchronous and 41.73 ms asynchronous (vllm-project/vllm-ascend, commit bd3dede, another host); less
    # host_step.
    host_sequence: float = (44.20e-3 - 41.73e-3 - 0.5e-3) / 48
    overlapped: bool = True  # TensorRT-LLM's host time is hidden: "overlap scheduler", its documentation, on by default
    # Of TensorRT-LLM: own (bf16 products measured, fp8 ones stream as those, cuBLAS being under both), own but fp8 of
    # vLLM, or vllm (as where engine times are fitted).
    kernels: str = "own"


# What is changed, the rest as it is judged. The first is what the study judged before: the same for all engines.
VARIATIONS = {
    "before: 11 gaps and 0.5 ms a step for all, kernels of vLLM": Unfitted(
        counted=False, eager_layer=0.0, host_sequence=0.0, overlapped=False, kernels="vllm"
    ),
    "TensorRT-LLM's kernels are vLLM's": Unfitted(kernels="vllm"),
    "TensorRT-LLM's fp8 products stream as vLLM's": Unfitted(kernels="own but fp8 of vLLM"),
    "TensorRT-LLM's host time is not hidden": Unfitted(overlapped=False),
    "vLLM's host time is 0.5 ms a step alone": Unfitted(host_sequence=0.0),
    "no launch floor": Unfitted(eager_layer=0.0),
    "launch floor 0.35 ms a layer": Unfitted(eager_layer=0.35e-3),
    "launch floor 0.55 ms a layer": Unfitted(eager_layer=0.55e-3),
    "11 kernels a layer for all": Unfitted(counted=False),
    "gaps of 1 us": Unfitted(gap=1e-6),
    "gaps of 2 us": Unfitted(gap=2e-6),
}


def kernels_of_layer(point: ServingPoint) -> int:
    """Return how many kernels of a layer follow each other, all-reduces, fp8 rounding, query and key norms included.

    TensorRT-LLM rounds in a kernel of its own before two products (the others are fused with attention and activation)
    and has one kernel for the norms of queries and keys and the rotary positions; vLLM has two for the norms. Source:
    ``modeling_qwen3.py``, ``linear.py``, ``swiglu.py`` of NVIDIA/TensorRT-LLM; ``qwen3.py`` of vllm-project/vllm.
    """
    norms = model(point.model).qk_norm and point.engine != "trtllm"
    return LAYER_KERNELS + 2 * (point.tp > 1) + 2 * (point.precision == "fp8") + 2 * norms


def hidden_host(point: ServingPoint) -> bool:
    """Return whether the engine prepares a step during the one before, so that the host does not show."""
    if point.engine == "trtllm":
        return True
    release = tuple(int(n) for n in point.version.split(".")[:2] if n.isdigit())
    return len(release) == 2 and release >= ASYNCHRONOUS_SINCE


def unfitted_times(point: ServingPoint, given: Unfitted) -> EngineTimes:
    """Return the times of a point's engine."""
    hidden = hidden_host(point) and (given.overlapped or point.engine != "trtllm")
    synchronous = not hidden and point.engine != "trtllm"
    return EngineTimes(
        point.engine,
        point.accelerator,
        step=0.0 if hidden else given.host_step,
        layer=given.gap * (kernels_of_layer(point) if given.counted else LAYER_KERNELS),
        sequence=given.host_sequence if synchronous else 0.0,
        eager_layer=given.eager_layer,
        provenance="assumed",
    )


def unfitted_kernels(point: ServingPoint, given: Unfitted) -> Profile:
    """Return the profile of a point's kernels.

    A byte streams from memory as fast in fp8 as in bf16, if the same library reads it: ``linear.py`` of
    NVIDIA/TensorRT-LLM multiplies both by cuBLAS. Its activation kernel splits rows (``swiglu.py``), so that no thread
    block walks a whole one; that the norms do too is assumed, as where engine times are fitted.
    """
    as_fitted = serving_profile(accelerator(point.accelerator), engine=point.engine)
    if point.engine != "trtllm" or given.kernels == "vllm":
        return as_fitted
    profile = load_profile(f"{point.accelerator}-trtllm")
    e = profile.efficiency
    streams = {} if given.kernels != "own" else {"fp8_bandwidth": e.gemm_bandwidth, "fp8_feed": e.tile_feed}
    return replace(profile, efficiency=replace(e, element_row=0.0, fp8_start=e.gemm_start, **streams))

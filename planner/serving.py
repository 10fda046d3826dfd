"""A measured serving point predicted: the closed loop it was measured with, run on the analytic step times."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from calibration.engines import EngineTimes, engine_times, with_times
from calibration.profiles import serving_profile
from calibration.serving import Prediction, ServingPoint
from simulator.engine import StepTable, simulate
from simulator.workload import Workload
from theory.catalog import accelerator, model
from theory.errors import require
from theory.latency import Profile
from theory.memory import kv_capacity_tokens
from theory.specs import Deployment

from .build import limits_of
from .scenario import Engine
from .service import step_table

BUDGET_MARGIN = 64  # tokens a step has beyond its prompts and one for each client [tokens]; assumed
SEED = 0  # of the lengths, where they are not nominal


def predict_point(
    point: ServingPoint,
    profile: str | Profile | None = None,
    times: EngineTimes | None = None,
    table: StepTable | None = None,
) -> Prediction:
    """Return mean TTFT and TPOT of a point: all clients at once, each sending again when its answer is complete.

    Parameters
    ----------
    profile : str or Profile, optional
        Kernels; by default those of the point's engine and accelerator.
    times : EngineTimes, optional
        What the engine adds; by default what was fitted for it.
    table : StepTable, optional
        :func:`kernel_table` of the point, where it is at hand.

    Raises
    ------
    InputError
        If the weights do not fit, or no request fits the KV cache.
    """
    own = times or engine_times(point.engine, point.accelerator)
    deployment = deployed(point, own)
    steps = with_engine(table or kernel_table(point, profile, own.kernels), own, deployment.model.layers)
    run = simulate(workload(point), steps, deployment.limits, kv_capacity_tokens(deployment))
    require(not run.refused.any(), "csv", "must hold points whose requests fit the KV cache", point.name)
    ttft = run.first_token - run.arrival
    tpot = (run.completion - run.first_token) / np.maximum(run.output - 1, 1)
    return Prediction(float(ttft.mean()), float(tpot.mean()))


def kernel_table(point: ServingPoint, profile: str | Profile | None = None, kernels: float = 1.0) -> StepTable:
    """Return the step times of a point's replica without what its engine adds; kernels take that much longer."""
    gpu = accelerator(point.accelerator)
    chosen = profile if isinstance(profile, Profile) else serving_profile(gpu, profile, point.engine)
    bare = EngineTimes(point.engine, point.accelerator, 0.0, 0.0, 0.0, 0.0, kernels)
    return step_table(deployed(point, bare), with_times(chosen, bare), None, point.prompt + point.output / 2)


def with_engine(table: StepTable, times: EngineTimes, layers: int) -> StepTable:
    """Return step times of kernels with those of an engine: on every step, on each of its sequences, and the floor."""
    sequences = np.maximum(np.arange(table.base.shape[1]), 1)  # a step of prompts alone has one
    added = times.step + layers * times.layer + times.sequence * sequences
    return replace(table, base=table.base + added, prefill_floor=layers * times.eager_layer)


def deployed(point: ServingPoint, times: EngineTimes) -> Deployment:
    """Return the replica of a point under the rules of its engine and the settings of its protocol."""
    protocol = point.protocol
    given: dict[str, object] = {
        "preset": point.engine,
        "max_num_seqs": max(point.clients - protocol.slots_below_clients, 1),
        **protocol.settings,
    }
    if protocol.prompts_per_step:
        given["max_num_batched_tokens"] = protocol.prompts_per_step * point.prompt + point.clients + BUDGET_MARGIN
    limits = limits_of(Engine.model_validate(given), times)
    gpu = accelerator(point.accelerator)
    return Deployment(model(point.model), gpu, point.tp, point.precision, protocol.kv_precision, limits)


def workload(point: ServingPoint) -> Workload:
    """Return the requests of a point: so many clients, lengths drawn as the protocol says."""
    protocol, count = point.protocol, point.clients * point.protocol.requests_per_client
    rng = np.random.default_rng(SEED)

    def lengths(nominal: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return rng.integers(max(1, int(protocol.shortest * nominal)), nominal + 1, count)

    prompt, output = lengths(point.prompt), lengths(point.output)
    loop = Workload(np.zeros(count), prompt, output, f"closed loop of {point.name}", clients=point.clients)
    return replace(loop, think_time=protocol.think_s)

"""Plans run request by request: what one replica bears, what a whole plan does, and whether it keeps the SLOs."""

from __future__ import annotations

import numpy as np

from simulator.engine import Records, simulate
from simulator.workload import Workload, at_rate

from .scenario import Slo
from .service import Service

BISECTIONS = 7  # halvings of the bracket of a replica's capacity: its width ends below 1 % of the rate [-]


def measured_capacity(service: Service, workload: Workload, slo: Slo, guess: float, seed: int) -> float:
    """Return the greatest rate at which one replica keeps the SLOs in simulation; 0 if it never does [requests/s].

    Parameters
    ----------
    workload : Workload
        Requests whose lengths and pattern of arrivals are kept; the time axis is stretched to each rate tried.
    guess : float
        The analytic capacity; the bracket starts from 0.3 to 1.3 times it [requests/s].
    """
    if not keeps(run_at(service, workload, 0.3 * guess, seed), slo):
        return 0.0
    low, high = 0.3 * guess, 1.3 * guess
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if keeps(run_at(service, workload, middle, seed), slo):
            low = middle
        else:
            high = middle
    return low


def run_at(service: Service, workload: Workload, rate: float, seed: int) -> Records:
    """Run one replica at an arrival rate [requests/s]."""
    return simulate(
        at_rate(workload, rate),
        service.table,
        service.deployment.limits,
        service.kv_tokens,
        service.schedule,
        service.acceptance,
        seed,
    )


def keeps(records: Records, slo: Slo) -> bool:
    """Return whether a run kept mean TPOT and p99 TTFT of a visit; a refused request breaks them."""
    ttft = records.first_token - records.arrival
    tpot = (records.completion - records.first_token) / np.maximum(records.output - 1, 1)
    served = bool(not records.refused.any())
    return served and float(np.quantile(ttft, 0.99)) <= slo.ttft_p99_s and float(tpot.mean()) <= slo.tpot_mean_s

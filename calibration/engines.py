"""What an engine adds to the kernels: fitted times by engine and accelerator, each with the rows it was fitted on."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from theory.errors import require
from theory.latency import FEEDS, KERNEL_TIMES, PROVENANCES, SHARES, Efficiency, Profile, Provenance

if TYPE_CHECKING:
    from .serving import Prediction, ServingPoint

FILE = Path(__file__).parent / "engines.toml"
TIMES = ("step", "layer", "sequence", "eager_layer")
FREE = (*TIMES, "kernels")
TTFT_WEIGHT = 0.3  # of an error of TTFT against one of TPOT: the protocol is in it as much as the engine [-]; assumed
SOFT = 0.05  # error of ln(time) from which a point counts less than its square [-]; assumed
SHIFTS = (0.0, 0.7)  # starts of a fit: as given, and twice that; clients in lock-step make the errors uneven [-]
ORIGIN = 10.0  # of the fitted logarithms: far from 0, so that relative steps are steps [-]


@dataclass(frozen=True, slots=True)
class EngineTimes:
    """The times of one engine on one accelerator.

    Raises
    ------
    InputError
        If a time is negative or not finite, or the provenance is unknown.
    """

    engine: str
    accelerator: str
    step: float  # host time of a step that kernels do not hide [s]
    layer: float  # gaps between the kernels of a layer that no kernel table has [s]
    sequence: float  # host time per sequence of a step [s]
    eager_layer: float  # launch time of a layer in a step with prompts, its floor [s]
    kernels: float = 1.0  # times of its kernels against those of the profile [-]
    provenance: Provenance = "fitted"
    rows: str = ""
    source: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        for name in TIMES:
            value = getattr(self, name)
            require(bool(np.isfinite(value)) and value >= 0, name, "must be finite and at least 0 [s]", value)
        require(0.5 <= self.kernels <= 2, "kernels", "must lie in [0.5, 2] [-]", self.kernels)
        known = ", ".join(PROVENANCES)
        require(self.provenance in PROVENANCES, "provenance", f"must be one of {known}", self.provenance)


@cache
def _table() -> tuple[EngineTimes, ...]:
    entries = tomllib.loads(FILE.read_text(encoding="utf-8"))["engine"]
    return tuple(EngineTimes(**entry) for entry in entries)


def engine_times(engine: str, accelerator: str) -> EngineTimes:
    """Return the times of an engine; where its accelerator was not fitted those of another one, tagged transferred.

    Raises
    ------
    InputError
        If the engine is unknown.

    Examples
    --------
    >>> engine_times("trtllm", "h100-sxm").provenance, engine_times("trtllm", "l40s").provenance
    ('fitted', 'transferred')
    """
    of_engine = [t for t in _table() if t.engine == engine]
    known = ", ".join(sorted({t.engine for t in _table()}))
    require(bool(of_engine), "engine", f"must be one of {known}", engine)
    own = next((t for t in of_engine if t.accelerator == accelerator), None)
    return own or replace(of_engine[0], accelerator=accelerator, provenance="transferred")


def with_times(profile: Profile, times: EngineTimes) -> Profile:
    """Return the profile with the host times of an engine in the place of its own, its kernels that much slower."""
    own = slower(profile.efficiency, times.kernels)
    own = replace(own, host_step=times.step, host_layer=times.layer, host_sequence=times.sequence)
    return replace(profile, efficiency=own)


def slower(efficiency: Efficiency, factor: float) -> Efficiency:
    """Return efficiencies with which every kernel takes ``factor`` times as long; a share stops at its datasheet.

    Examples
    --------
    >>> slower(Efficiency(), 2.0).gemm_bandwidth / Efficiency().gemm_bandwidth
    0.5
    """
    longer = {name: getattr(efficiency, name) * factor for name in KERNEL_TIMES}
    rates = {name: getattr(efficiency, name) / factor for name in (*SHARES, *FEEDS)}
    return replace(efficiency, **longer, **{n: min(r, 1.0) if n in SHARES else r for n, r in rates.items()})


def fit_times(
    start: EngineTimes,
    free: Sequence[str],
    points: Sequence[ServingPoint],
    predict: Callable[[ServingPoint, EngineTimes], Prediction],
) -> EngineTimes:
    r"""Return ``start`` with the times in ``free`` fitted to measured points, at most three of them.

    .. math:: \min \sum_i \rho(e_{\text{TPOT},i}) + \rho(w\, e_{\text{TTFT},i}), \quad e = \ln \hat t / t

    with the soft absolute value as :math:`\rho`.

    Raises
    ------
    InputError
        If more than three times are free, one is unknown, or there are fewer points than twice the free times.
    """
    from scipy.optimize import least_squares

    require(1 <= len(free) <= 3 and set(free) <= set(FREE), "free", f"must be one to three of {', '.join(FREE)}", free)
    require(len(points) >= 2 * len(free), "points", f"must be at least {2 * len(free)}", len(points))

    for name in free:
        require(getattr(start, name) > 0, name, "must start above 0 where it is free [s]", getattr(start, name))

    def at(x: NDArray[np.float64]) -> EngineTimes:
        """x is ORIGIN where a time is as it was, and grows by 1 when it grows by a factor e."""
        grown = np.exp(x - ORIGIN).tolist()
        return replace(start, **{name: getattr(start, name) * g for name, g in zip(free, grown, strict=True)})

    def errors(x: NDArray[np.float64]) -> NDArray[np.float64]:
        said = [predict(p, at(x)) for p in points]
        tpot = [np.log(s.tpot_s / p.tpot_s) for s, p in zip(said, points, strict=True)]
        ttft = [np.log(s.ttft_s / p.ttft_s) for s, p in zip(said, points, strict=True)]
        return np.concatenate([tpot, TTFT_WEIGHT * np.array(ttft)])

    span = np.array([np.log(2.0) if name == "kernels" else 5.0 for name in free])
    bounds = (ORIGIN - span, ORIGIN + span)
    fits = [
        least_squares(errors, x, bounds=bounds, loss="soft_l1", f_scale=SOFT, diff_step=0.05 / ORIGIN, max_nfev=10)
        for x in (ORIGIN + np.array([0.0 if name == "kernels" else s for name in free]) for s in SHIFTS)
    ]
    found = min(fits, key=lambda fit: float(fit.cost))
    rows = f"{len(points)} serving points of {', '.join(sorted({p.model for p in points}))}; free: {', '.join(free)}"
    return replace(at(found.x), provenance="fitted", rows=rows)

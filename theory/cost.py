"""Money and energy: GPU-seconds, dollars, joules, and what a request, a token and a correct answer cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import require
from .specs import Accelerator

SECONDS_PER_HOUR = 3600.0
Quantity = TypeVar("Quantity", float, NDArray[np.float64])  # a number, or an array of them


def _check(name: str, value: float | NDArray[np.float64], unit: str, above: bool = False) -> None:
    array = np.asarray(value, float)
    ok = bool(np.all(np.isfinite(array) & ((array > 0) if above else (array >= 0))))
    require(ok, name, f"must be finite and {'above' if above else 'at least'} 0 [{unit}]", value)


def dollars(gpu_seconds: Quantity, price: float) -> Quantity:
    r"""Return what GPU time costs, :math:`c = p\,t / 3600` [$].

    Parameters
    ----------
    gpu_seconds : float or array
        GPUs held times the time they are held, idle time included [GPU s].
    price : float
        Price of one GPU for one hour [$/GPU/h].

    Raises
    ------
    InputError
        If either is negative or not finite.

    Examples
    --------
    >>> dollars(8 * 3600.0, price=2.5)
    20.0
    """
    _check("gpu_seconds", gpu_seconds, "GPU s")
    _check("price", price, "$/GPU/h")
    return gpu_seconds * price / SECONDS_PER_HOUR


def gpu_seconds(dollars: Quantity, price: float) -> Quantity:
    r"""Return the GPU time a sum buys, :math:`t = 3600\,c / p`, the inverse of :func:`dollars` [GPU s].

    Raises
    ------
    InputError
        If the sum is negative or the price is not above 0.

    Examples
    --------
    >>> gpu_seconds(20.0, price=2.5)
    28800.0
    """
    _check("dollars", dollars, "$")
    _check("price", price, "$/GPU/h", above=True)
    return dollars * SECONDS_PER_HOUR / price


def joules_at_most(gpu_seconds: Quantity, accelerator: Accelerator) -> Quantity:
    r"""Return an upper bound on the energy of the GPUs, :math:`E \le P_{board}\,t` [J].

    The board power limit is what the GPU may draw, not what it draws: decoding is bound by memory and stays below it.
    Hosts, network and cooling are not in it.

    Source
    ------
    Board power of the datasheet (``Accelerator.source``); the bound is a derivation.

    Examples
    --------
    >>> from theory.catalog import accelerator
    >>> joules_at_most(3600.0, accelerator("h100-sxm")) / 3.6e6  # [kWh]
    0.7
    """
    _check("gpu_seconds", gpu_seconds, "GPU s")
    return gpu_seconds * accelerator.power


@dataclass(frozen=True, slots=True)
class Draw:
    """What a GPU draws, as shares of its board power limit.

    Raises
    ------
    InputError
        Unless 0 <= idle <= busy_low <= busy <= 1.
    """

    idle: float  # weights loaded, no step under way [-]
    busy: float  # in a step [-]
    busy_low: float  # the least it may be in a step; the most is the limit [-]
    source: str

    def __post_init__(self) -> None:
        ordered = 0 <= self.idle <= self.busy_low <= self.busy <= 1
        given = (self.idle, self.busy_low, self.busy)
        require(ordered, "draw", "must ascend within [0, 1] as idle, busy_low, busy [-]", given)


SERVING = Draw(
    idle=0.15,
    busy=0.6,
    busy_low=0.2,
    source="assumed: linear in the busy share, 15 % of the board limit idle, 60 % in a step. Published for a step: "
    "137 to 300 W of 700 W, decoding alone on H200 (arXiv:2605.11999), up to the limit, prefill (Patel et al. 2024, "
    "doi:10.1145/3620666.3651329)",
)


def joules(held: Quantity, busy: Quantity, accelerator: Accelerator, draw: Draw = SERVING) -> Quantity:
    r"""Return the energy of GPUs that are held, some of the time in a step,

    .. math:: E = P_{board}\,(d_{busy} t_{busy} + d_{idle} (t_{held} - t_{busy})) \quad [J]

    Hosts, network and cooling are not in it.

    Parameters
    ----------
    held, busy : float or array
        GPUs times the time they are held, and in a step [GPU s].

    Raises
    ------
    InputError
        If a time is negative or not finite, or more is busy than held.

    Source
    ------
    Linear power model: Fan, Weber & Barroso (2007), Power provisioning for a warehouse-sized computer, section 4;
    shares: ``draw.source``.

    Examples
    --------
    >>> from theory.catalog import accelerator
    >>> joules(1.0, 1.0, accelerator("h100-sxm")), joules(1.0, 0.0, accelerator("h100-sxm"))
    (420.0, 105.0)
    """
    _check("held", held, "GPU s")
    _check("busy", busy, "GPU s")
    inside = bool(np.all(np.asarray(busy) <= np.asarray(held) * (1 + 1e-9)))
    require(inside, "busy", f"must be at most the {held} held [GPU s]", busy)
    return accelerator.power * (draw.busy * busy + draw.idle * (held - busy))


def dollars_per_request(gpus: Quantity, price: float, requests_per_s: Quantity) -> Quantity:
    r"""Return the price of a request when ``gpus`` are held to serve ``requests_per_s``, :math:`g\,p / (3600\,r)` [$].

    Raises
    ------
    InputError
        If the throughput is not above 0: GPUs that serve nothing have no cost per request.

    Examples
    --------
    >>> dollars_per_request(8.0, price=2.5, requests_per_s=2.0) * 1000  # dollars per 1000 requests
    2.7777777777777777
    """
    _check("gpus", gpus, "GPUs")
    _check("price", price, "$/GPU/h")
    _check("requests_per_s", requests_per_s, "request/s", above=True)
    return gpus * price / (SECONDS_PER_HOUR * requests_per_s)


def dollars_per_million_tokens(gpus: Quantity, price: float, tokens_per_s: Quantity) -> Quantity:
    r"""Return the price of :math:`10^6` tokens at ``tokens_per_s`` on ``gpus``, :math:`10^6 g\,p / (3600\,v)` [$].

    Raises
    ------
    InputError
        If the throughput is not above 0.

    Examples
    --------
    >>> round(dollars_per_million_tokens(8.0, price=2.5, tokens_per_s=5000.0), 3)
    1.111
    """
    _check("gpus", gpus, "GPUs")
    _check("price", price, "$/GPU/h")
    _check("tokens_per_s", tokens_per_s, "token/s", above=True)
    return 1e6 * gpus * price / (SECONDS_PER_HOUR * tokens_per_s)


def dollars_per_correct_answer(dollars_per_request: Quantity, quality: Quantity) -> Quantity:
    r"""Return what a correct answer costs, :math:`c / q`: requests are paid for whether right or wrong [$].

    Raises
    ------
    InputError
        If the quality, the share of requests answered correctly, is not in (0, 1].

    Examples
    --------
    >>> dollars_per_correct_answer(0.004, quality=0.8)
    0.005
    """
    _check("dollars_per_request", dollars_per_request, "$")
    array = np.asarray(quality, float)
    ok = bool(np.all((array > 0) & (array <= 1)))
    require(ok, "quality", "must lie in (0, 1] [-]", quality, "It is a share: pass 0.84, not 84.")
    return dollars_per_request / quality

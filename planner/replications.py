"""The same work with other seeds, in parallel processes; the results are the same for any number of them.

Replication i of a seed has the i-th seed that ``numpy.random.SeedSequence(seed).spawn`` gives, whatever the number of
replications or of workers, and results come in that order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from theory.errors import refuse, require

Given = TypeVar("Given")
Result = TypeVar("Result")


def seeds(seed: int, replications: int) -> list[int]:
    """Return the seeds of independent replications; the seed itself for a single one.

    Raises
    ------
    InputError
        If there is no replication.

    Examples
    --------
    >>> seeds(7, 1), seeds(7, 3)[:2] == seeds(7, 2)
    ([7], True)
    """
    require(replications >= 1, "replications", "must be at least 1 [-]", replications, "One run is 1.")
    if replications == 1:
        return [seed]
    children = np.random.SeedSequence(seed).spawn(replications)
    return [int(child.generate_state(1, np.uint64)[0]) for child in children]


def usable_cores() -> int:
    """Return the cores this process may use [-]."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def replicate(
    work: Callable[[Given], Result], tasks: Sequence[Given], workers: int, progress: Callable[[int], None]
) -> list[Result]:
    """Return the results of ``work`` for each task, in their order; ``progress`` hears how many are there.

    With one worker everything runs in this process; else ``work`` is a function of a module, and tasks can be pickled.
    On an interrupt or an error the workers are ended at once.

    Raises
    ------
    InputError
        If there is no worker, or one is ended from outside, or ``work`` raises it.
    """
    require(workers >= 1, "workers", "must be at least 1 [-]", workers, "All in one process is 1.")
    results: list[Result] = []
    try:
        with _mapping(min(workers, len(tasks))) as mapping:
            for result in mapping(work, tasks):
                results.append(result)
                progress(len(results))
    except BrokenProcessPool:
        refuse("workers", "must be no more than memory holds; one was ended from outside", workers, "Pass fewer.")
    return results


@contextmanager
def _mapping(workers: int) -> Iterator[Callable[[Callable[[Given], Result], Iterable[Given]], Iterator[Result]]]:
    """Provide what applies a function to each of some tasks: ``map`` itself, or that of a pool of processes."""
    if workers == 1:
        yield map
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # the one way that all systems have; it inherits no threads or locks
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupts)

    def mapping(work: Callable[[Given], Result], tasks: Iterable[Given]) -> Iterator[Result]:
        with _interrupts_ignored():  # the workers start in here and inherit it: only the parent answers Ctrl-C
            return pool.map(work, tasks)

    try:
        yield mapping
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    pool.shutdown()


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore interrupts for a moment, where that can be said: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

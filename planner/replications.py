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
from importlib.metadata import version
from typing import Protocol, TypeVar

import numpy as np

from theory.errors import refuse, require

Given = TypeVar("Given")
Result = TypeVar("Result")
ANSWER_S = 10  # a Dask scheduler without workers by then has none [s]


class Workers(Protocol):
    """Applies a function of a module to each of some tasks; the results come in the order of the tasks."""

    def __call__(self, work: Callable[[Given], Result], tasks: Iterable[Given], /) -> Iterator[Result]: ...


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
    results: list[Result] = []
    with working(min(workers, len(tasks))) as mapping:
        for result in mapping(work, tasks):
            results.append(result)
            progress(len(results))
    return results


@contextmanager
def working(workers: int, dask: str | None = None) -> Iterator[Workers]:
    """Provide workers: this process alone, several on this machine, or those of a Dask cluster.

    Raises
    ------
    InputError
        If there is no worker, one is ended from outside, or the cluster does not answer or has another version.
    """
    require(workers >= 1, "workers", "must be at least 1 [-]", workers, "All in one process is 1.")
    if dask is not None:
        with _on_cluster(dask) as mapping:
            yield mapping
    elif workers == 1:
        yield _here
    else:
        try:
            with _on_processes(workers) as mapping:
                yield mapping
        except BrokenProcessPool:
            refuse("workers", "must be no more than memory holds; one was ended from outside", workers, "Pass fewer.")


def _here(work: Callable[[Given], Result], tasks: Iterable[Given]) -> Iterator[Result]:
    return map(work, tasks)


@contextmanager
def _on_cluster(address: str) -> Iterator[Workers]:
    """Provide the workers of a Dask scheduler that have the same version as this process."""
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        refuse("dask", "needs Dask", address, "Install it: pip install 'tierwise[cluster]'.")
    try:
        client = Client(address, timeout=ANSWER_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError, TypeError):
        refuse("dask", "must be the address of a Dask scheduler that answers, such as tcp://host:8786", address)
    with client:
        try:
            client.wait_for_workers(1, timeout=ANSWER_S)
            versions = set(client.run(version, "tierwise").values())
        except (OSError, TimeoutError):
            refuse("dask", "must be a scheduler with workers", address, "Start some: dask worker ADDRESS.")
        except ImportError:
            refuse("dask", "must have tierwise installed where its workers run", address)
        own = version("tierwise")
        require(versions == {own}, "dask", f"must have workers with tierwise {own}, as here", sorted(versions))

        def mapping(work: Callable[[Given], Result], tasks: Iterable[Given]) -> Iterator[Result]:
            futures = [client.submit(work, task, pure=False) for task in tasks]
            return (future.result() for future in futures)

        try:
            yield mapping
        except KilledWorker:
            refuse("dask", "must have workers that stay; one was ended from outside again and again", address)


@contextmanager
def _on_processes(workers: int) -> Iterator[Workers]:
    """Provide a pool of processes."""
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

"""What a search has done, kept: trials and simulations in memory, in a journal file or in PostgreSQL.

One planner at a time owns a search: it holds a lock that ends with its process, so that whatever a killed one left
behind can be taken up at once. A trial is written whole when it is finished, never before, so a crash loses only work
in flight. No heartbeat is needed: nothing in the storage is ever running.

Trials come in rounds of ``ROUND``. The parameters of trial i are drawn by a sampler seeded with (seed, i) that knows
the trials of the rounds before its own, and results are taken in order. Neither the number of workers nor a crash and
resumption therefore changes what is tried.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from theory.errors import InputError, refuse, require

from .build import Problem
from .replications import Workers, working

if TYPE_CHECKING:
    import optuna

ROUND = 8  # trials proposed from the same knowledge, and evaluated side by side [-]
CONNECT_S = 10  # a server that has not answered by then does not [s]
Given = TypeVar("Given")
Result = TypeVar("Result")
Params = dict[str, float]


@dataclass(frozen=True, slots=True)
class Means:
    """Where a search is kept and who does its work; neither changes what it finds."""

    storage: str | None = None  # FILE.journal or postgresql://...; None: in memory
    resume: bool = False  # continue the search that the storage holds
    dashboard: Path | None = None  # SQLite file for optuna-dashboard
    workers: int = 1  # processes on this machine [-]
    dask: str | None = None  # address of a Dask scheduler, instead


@dataclass(frozen=True, slots=True)
class Told:
    """What a trial came to."""

    values: tuple[float, ...]  # to be made small, one for each objective, in its unit [-]
    constraints: Mapping[str, float] = field(default_factory=dict)  # kept where at most 0 [-]


@dataclass(frozen=True, slots=True)
class Proposals:
    """What trials are drawn from."""

    first: Sequence[Params]  # parameters of the first trials
    ranges: Mapping[str, optuna.distributions.BaseDistribution]
    sampler: Callable[[int], optuna.samplers.BaseSampler]  # of a seed

    def draw(self, study: optuna.Study, seed: int, number: int) -> Params:
        """Return the parameters of a trial given the finished ones of a study."""
        import numpy as np
        import optuna

        if number < len(self.first):
            return dict(self.first[number])
        study.sampler = self.sampler(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
        trial = study.ask(dict(self.ranges))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)  # the finished one takes its place in what is known
        return dict(trial.params)


class Ledger:
    """The trials and simulations of a search, each done once and kept."""

    def __init__(self, study: optuna.Study, shown: str, workers: Workers) -> None:
        self._study, self._shown, self._workers = study, shown, workers
        self._done: dict[str, Any] | None = None  # results of simulations, once read

    def minimise(
        self,
        proposals: Proposals,
        trials: int,
        seed: int,
        evaluate: Callable[[Workers, list[Params]], Iterator[tuple[Told, Result]]],
        progress: Callable[[str, int, int], None],
    ) -> list[Result]:
        """Return what each trial found besides its values, in order; see the module for what makes them repeatable.

        A finished trial keeps its parameters, values and constraints; what else it found is worked out anew.
        """
        import optuna

        known = optuna.create_study(directions=self._study.directions)
        found: list[Result] = []
        kept = self._study.get_trials(deepcopy=False)[:trials]
        for begin in range(0, trials, ROUND):
            numbers = range(begin, min(begin + ROUND, trials))
            params = [dict(kept[i].params) if i < len(kept) else proposals.draw(known, seed, i) for i in numbers]
            for i, given, (told, result) in zip(numbers, params, evaluate(self._workers, params), strict=True):
                if i == len(kept):
                    done = optuna.trial.create_trial(
                        params=given,
                        distributions=dict(proposals.ranges),
                        values=told.values,
                        constraints=dict(told.constraints),
                    )
                    with _answering(self._shown):
                        self._study.add_trial(done)
                    kept.append(done)
                known.add_trial(kept[i])
                found.append(result)
                progress("searching", i + 1, trials)
        return found

    def simulations(self, work: Callable[[Given], Any], tasks: Mapping[str, Given]) -> list[Any]:
        """Return the results of tasks by name, in order: those known are read, the others worked out and kept.

        ``work`` is a function of a module whose results are numbers, text, lists and dictionaries by text.
        """
        if self._done is None:
            with _answering(self._shown):
                self._done = dict(self._study.user_attrs)
        done = self._done
        missing = {name: task for name, task in tasks.items() if name not in done}
        for name, result in zip(missing, self._workers(work, missing.values()), strict=True):
            with _answering(self._shown):
                self._study.set_user_attr(name, result)
            done[name] = result
        return [done[name] for name in tasks]


@contextmanager
def ledger(problem: Problem, seed: int, means: Means, objectives: Sequence[str] = ()) -> Iterator[Ledger]:
    """Provide the ledger of a search, begun or resumed, and at the end write it for optuna-dashboard if asked.

    Parameters
    ----------
    objectives : sequence of str
        Names of several objectives, all to be made small; by default one, the scenario's.

    Raises
    ------
    InputError
        If the storage cannot be used, is in use, holds this search and it is not resumed, or does not hold it and it
        is; if the workers cannot be had; or if the dashboard's file exists or cannot be written.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    _check(means)
    name = study_name(problem, seed, objectives)
    shown = shown_storage(means.storage or "memory")
    with ExitStack() as stack:
        with _answering(shown):
            storage = _storage(stack, means.storage, name)
            names = optuna.get_all_study_names(storage)
        if means.storage is not None:
            _one_of(names, name, means.resume, shown)
        with _answering(shown):
            directions = [optuna.study.StudyDirection.MINIMIZE] * max(len(objectives), 1)
            study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, directions=directions)
        workers = stack.enter_context(working(means.workers, means.dask))
        yield Ledger(study, shown, workers)
        if means.dashboard is not None:
            _export(name, storage, means.dashboard)


def study_name(problem: Problem, seed: int, objectives: Sequence[str] = ()) -> str:
    """Return what a search is kept under: the scenario's name, a digest of all that decides the search, the version.

    The digest is over the scenario, the models, drafts and efficiencies it names, the requests, the outcomes and the
    seed, so that a changed trace or config.json is another search.
    """
    scenario = problem.scenario.model_dump_json(exclude={"description"})
    digest = hashlib.sha256(repr((scenario, problem.pools, problem.models, problem.drafts, seed, ROUND)).encode())
    w, o = problem.workload, problem.outcomes
    blocks = (w.blocks.counts, w.blocks.names) if w.blocks else ()
    for array in (w.arrival, w.prompt, w.output, w.cached, *blocks, *((o.weight, o.correct, o.signal) if o else ())):
        digest.update(b"-" if array is None else array.tobytes())
    asked = f" {','.join(objectives)}" if objectives else ""
    return f"{problem.scenario.name}{asked} {digest.hexdigest()[:12]} tierwise {version('tierwise')}"


def shown_storage(given: str) -> str:
    """Return a storage as messages name it: never with its user, password or options.

    Examples
    --------
    >>> shown_storage("postgresql://ann:secret@db:5432/plans?sslmode=require&password=secret")
    'postgresql://db:5432/plans'
    >>> shown_storage("plans.journal")
    'plans.journal'
    """
    match = re.match(r"([A-Za-z0-9+]+)://(?:.*@)?([^?#]*)", given, re.DOTALL)
    return f"{match[1]}://{match[2]}" if match else given


def _check(means: Means) -> None:
    require(
        not means.resume or means.storage is not None,
        "resume",
        "must come with the storage that holds the search",
        means.resume,
        "Pass --storage too.",
    )
    require(
        means.dask is None or means.workers == 1,
        "workers",
        "must be left out with `dask`: the cluster has its own [-]",
        means.workers,
    )
    if means.dashboard is not None:
        path = means.dashboard
        require(not path.exists(), "export-dashboard", "must be a file that is not there yet", str(path))
        require(path.parent.is_dir(), "export-dashboard", "must lie in a folder that exists", str(path))


def _one_of(names: list[str], name: str, resume: bool, shown: str) -> None:
    if name in names:
        require(resume, "storage", "must not hold this search yet", shown, "Pass --resume to continue it.")
    elif resume:
        held = f"It holds: {'; '.join(sorted(names)[:4])}." if names else "It holds none."
        refuse(
            "resume",
            f"must continue a search of the same scenario, settings, seed and version ({name})",
            shown,
            f"{held} Leave --resume out to begin this one.",
        )


def _storage(stack: ExitStack, given: str | None, name: str) -> optuna.storages.BaseStorage:
    """Return the storage, held for this search alone while ``stack`` is open."""
    import optuna

    if given is None:
        return optuna.storages.InMemoryStorage()
    if given.endswith(".journal") and "://" not in given:
        return _journal(stack, Path(given))
    require(
        re.match(r"postgres(ql)?(\+psycopg)?://", given) is not None,
        "storage",
        "must be FILE.journal or postgresql://USER@HOST/DATABASE",
        shown_storage(given),
    )
    return _postgres(stack, given, name)


def _journal(stack: ExitStack, path: Path) -> optuna.storages.BaseStorage:
    import fcntl

    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    held = stack.enter_context(path.open("a+b"))
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _in_use(str(path))
    held.seek(0)
    text = held.read()
    ours = not text or text.startswith(b'{"op_code"')
    require(ours, "storage", "must be a new file or a journal of Optuna", str(path))
    held.truncate(text.rfind(b"\n") + 1)  # a line that a crash cut short was never said to be written
    Path(f"{path}.lock").unlink(missing_ok=True)  # of a killed planner: nobody else writes while the file is held
    return JournalStorage(JournalFileBackend(str(path)))


def _postgres(stack: ExitStack, given: str, name: str) -> optuna.storages.BaseStorage:
    import sqlalchemy
    from optuna.storages import RDBStorage

    shown = shown_storage(given)
    try:
        import psycopg  # noqa: F401  (the driver that SQLAlchemy loads by name)

        url = sqlalchemy.make_url(given).set(drivername="postgresql+psycopg")
    except ImportError:
        refuse("storage", "needs a driver for PostgreSQL", shown, "Install it: pip install 'tierwise[cluster]'.")
    except (sqlalchemy.exc.ArgumentError, ValueError):
        refuse("storage", "must be a valid URL, postgresql://USER:PASSWORD@HOST:PORT/DATABASE", shown)
    options = {"connect_args": {"connect_timeout": CONNECT_S}}
    storage = RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=options)
    stack.callback(storage.engine.dispose)
    held = stack.enter_context(storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT"))
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
    if not held.execute(sqlalchemy.text("SELECT pg_try_advisory_lock(:key)"), {"key": key}).scalar():
        _in_use(shown)
    return storage


def _in_use(shown: str) -> None:
    refuse(
        "storage",
        "must not be in use by another planner at work on this search",
        shown,
        "Wait for it, or let one planner use more workers.",
    )


@contextmanager
def _answering(shown: str) -> Iterator[None]:
    """Say in one line that a storage failed, without what it was opened with."""
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except InputError:
        raise
    except OSError as error:
        refuse("storage", "must be a file that can be read and written", shown, f"({error.strerror or 'failed'})")
    except (StorageInternalError, RuntimeError, _database_error()) as error:
        kind = type(error.__cause__ or error).__name__
        refuse("storage", f"must be a server that answers and a database that may be written ({kind})", shown)
    except (ValueError, KeyError) as error:
        refuse("storage", f"must be a whole journal of this version of Optuna ({type(error).__name__})", shown)


def _database_error() -> type[Exception]:
    """Return what a database raises; a fifth of a second to load, so asked only once something was raised."""
    from sqlalchemy.exc import SQLAlchemyError

    return SQLAlchemyError


def _export(name: str, storage: optuna.storages.BaseStorage, path: Path) -> None:
    """Write a search to a SQLite file, whole or not at all."""
    import optuna
    import sqlalchemy

    part = path.with_name(path.name + ".part")
    try:
        part.unlink(missing_ok=True)
        target = optuna.storages.RDBStorage(f"sqlite:///{part}")
        try:
            optuna.copy_study(from_study_name=name, from_storage=storage, to_storage=target)
        finally:
            target.engine.dispose()
        part.replace(path)
    except (OSError, optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError):
        part.unlink(missing_ok=True)
        refuse("export-dashboard", "must be a file that can be written", str(path))

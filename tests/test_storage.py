"""A search that is kept: killed and resumed, shared among workers, refused where it cannot be, never a password."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest

from planner.build import Problem, resolve
from planner.plan import plan_scenario
from planner.replications import working
from planner.scenario import load_scenario
from planner.storage import ROUND, Means, ledger, shown_storage, study_name
from theory.errors import InputError

PASSWORD = "never-to-be-printed"
TRIALS = 60
SCENARIO = f"""
name: two
fleet: {{accelerator: h100-sxm, gpus: 8, price_per_gpu_hour: 3}}
traffic: {{rate: 4, requests: 1500, prompt_tokens: {{median: 500}}, output_tokens: {{median: 100}}}}
tiers:
  - {{name: small, model: llama-2-13b, tp: [1]}}
  - {{name: large, model: llama-2-70b, tp: [2, 4]}}
quality:
  outcomes: {{"11": 0.6, "10": 0.05, "01": 0.25, "00": 0.1}}
  source: an example, assumed
  signal: {{kind: confidence, auroc: [0.8, 0.8], source: an example}}
objective: {{quality_floor: top}}
search: {{trials: {TRIALS}}}
"""


def postgres_programs() -> Path | None:
    """Return the folder of the newest server programs; None if there are none."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return folders[-1].parent if folders else None


def server_account() -> str | None:
    """Return who runs the server: it refuses root, so then somebody who may do nothing else."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in known)


@contextmanager
def server(bin_: Path) -> Iterator[str]:
    """Provide the URL of a server that listens on this machine only and goes away with its data."""
    user = server_account()
    home = Path(tempfile.mkdtemp(prefix="tierwise-pg-"))
    (home / "password").write_text(PASSWORD)
    if user is not None:
        for path in (home, home / "password"):
            shutil.chown(path, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = str(home / "data")

    def run(program: str, *args: str) -> None:
        command = [str(bin_ / program), "-D", data, *args]
        subprocess.run(command, user=user, cwd=home, check=True, stdout=subprocess.DEVNULL, timeout=60)

    try:
        secret = f"--pwfile={home / 'password'}"
        run("initdb", "-U", "planner", secret, "--auth=scram-sha-256", "--no-sync", "-E", "UTF8", "--locale=C")
        options = f"-p {port} -k {home} -c listen_addresses=127.0.0.1 -c fsync=off"
        run("pg_ctl", "-w", "-o", options, "-l", str(home / "log"), "start")
        try:
            yield f"postgresql://planner:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)


POSTGRES = postgres_programs()
needs_postgres = pytest.mark.skipif(POSTGRES is None, reason="the programs of a PostgreSQL server are not installed")


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenario") / "two.yaml"
    path.write_text(SCENARIO)
    return path


@pytest.fixture(scope="module")
def problem(scenario: Path) -> Problem:
    return resolve(*load_scenario(scenario), None, 0)


@pytest.fixture(scope="module")
def uninterrupted(scenario: Path) -> dict[str, Any]:
    """The plan without storage, in one process."""
    return but_time(plan_scenario(*load_scenario(scenario)))


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    pytest.importorskip("psycopg")
    assert POSTGRES is not None
    with server(POSTGRES) as url:
        yield url


def but_time(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if k != "wall_s"}


def command(scenario: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "tierwise", "plan", str(scenario), "--format", "json", *options]


def planned(scenario: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run(command(scenario, *options), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return but_time(json.loads(done.stdout))


def killed_in_the_middle(scenario: Path, storage: str, finished: Callable[[], int]) -> None:
    """Kill a planner that has finished some of its trials; it gets no chance to say goodbye."""
    running = subprocess.Popen(command(scenario, "--storage", storage), stdout=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + 60
        while finished() < ROUND + 3 and time.monotonic() < give_up:
            time.sleep(0.002)
    finally:
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL  # it was at work to the end


def trials_of(storage: optuna.storages.BaseStorage) -> list[tuple[Any, ...]]:
    [name] = optuna.get_all_study_names(storage)
    kept = optuna.load_study(study_name=name, storage=storage).get_trials()
    assert all(t.state == optuna.trial.TrialState.COMPLETE for t in kept)
    return [(t.number, t.params, t.value, t.datetime_complete) for t in kept]


def journal(path: Path) -> optuna.storages.BaseStorage:
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))


def test_killed_and_resumed_from_a_journal(scenario: Path, uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    """No finished trial is lost and the plan is the uninterrupted one, to the last digit."""
    path = tmp_path / "search.journal"
    killed_in_the_middle(scenario, str(path), lambda: path.read_bytes().count(b'"op_code":4') if path.exists() else 0)
    before = trials_of(journal(path))
    assert ROUND < len(before) < TRIALS
    with path.open("ab") as file:  # what a crash within a write leaves behind
        file.write(b'{"op_code":4,"worker_id":"x')
    lock = Path(f"{path}.lock")
    lock.unlink(missing_ok=True)
    lock.symlink_to(path)
    dashboard = tmp_path / "search.db"
    resumed = planned(scenario, "--storage", str(path), "--resume", "--export-dashboard", str(dashboard))
    after = trials_of(journal(path))
    assert after[: len(before)] == before
    assert len(after) == TRIALS
    assert resumed == uninterrupted
    # what optuna-dashboard opens: a study of Optuna in SQLite, with all trials
    assert trials_of(optuna.storages.RDBStorage(f"sqlite:///{dashboard}")) == after


@needs_postgres
def test_killed_and_resumed_from_postgresql(
    scenario: Path, uninterrupted: dict[str, Any], postgres: str, problem: Problem
) -> None:
    import psycopg

    def finished() -> int:
        try:
            with psycopg.connect(postgres) as connection:
                [count] = connection.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'").fetchone() or [0]
                return int(count)
        except psycopg.errors.UndefinedTable:
            return 0

    killed_in_the_middle(scenario, postgres, finished)
    url = postgres.replace("postgresql:", "postgresql+psycopg:")
    storage = optuna.storages.RDBStorage(url)
    before = trials_of(storage)
    assert ROUND < len(before) < TRIALS
    resumed = planned(scenario, "--storage", postgres, "--resume")
    after = trials_of(storage)
    assert after[: len(before)] == before
    assert len(after) == TRIALS
    assert resumed == uninterrupted
    with (
        ledger(problem, 0, Means(postgres, resume=True)),
        pytest.raises(InputError, match="in use by another planner") as refused,
        ledger(problem, 0, Means(postgres, resume=True)),
    ):
        pass
    assert PASSWORD not in str(refused.value)
    wrong = postgres.replace(PASSWORD, "wrong-secret")
    with pytest.raises(InputError, match="must be a server that answers") as refused, ledger(problem, 0, Means(wrong)):
        pass
    assert "secret" not in str(refused.value)
    storage.engine.dispose()


def test_four_workers_are_one_worker(scenario: Path, uninterrupted: dict[str, Any]) -> None:
    assert planned(scenario, "--workers", "4") == uninterrupted


CLUSTER = """
from distributed import LocalCluster
with LocalCluster(
    n_workers=2, threads_per_worker=1, processes=False, protocol="tcp://", host="127.0.0.1", dashboard_address=None
) as cluster:
    print(cluster.scheduler_address, flush=True)
    input()
"""


def test_a_dask_cluster_is_one_worker(scenario: Path, uninterrupted: dict[str, Any]) -> None:
    pytest.importorskip("distributed")
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        assert planned(scenario, "--dask", address) == uninterrupted
    finally:
        cluster.communicate("\n", timeout=30)


def test_a_simulation_is_done_once(problem: Problem, tmp_path: Path) -> None:
    """What the journal holds is read, not worked out again."""
    path = str(tmp_path / "once.journal")
    with ledger(problem, 0, Means(path)) as kept:
        assert kept.simulations(abs, {"a": -1.5, "b": -2.0}) == [1.5, 2.0]
    with ledger(problem, 0, Means(path, resume=True)) as kept:
        assert kept.simulations(abs, {"b": -7.0, "c": -3.0}) == [2.0, 3.0]


def test_the_name_of_a_study_binds_all_that_decides_it(scenario: Path, problem: Problem) -> None:
    name = study_name(problem, 0)
    assert name.startswith("two ")
    assert "tierwise 0." in name
    assert name == study_name(resolve(*load_scenario(scenario), None, 0), 0)
    others = [resolve(*load_scenario(scenario, [o]), None, 0) for o in ("traffic.rate=5", "slo.ttft_p99_s=2")]
    assert len({name, study_name(problem, 1), *(study_name(o, 0) for o in others)}) == 4


def test_resuming_another_search_is_refused(scenario: Path, problem: Problem, tmp_path: Path) -> None:
    path = str(tmp_path / "one.journal")
    with ledger(problem, 0, Means(path)):
        pass
    for means, seed, said in (
        (Means(path), 0, "must not hold this search yet.*Pass --resume"),
        (Means(path, resume=True), 1, f"must continue a search of the same scenario.*{study_name(problem, 0)}"),
        (Means(str(tmp_path / "new.journal"), resume=True), 0, "It holds none. Leave --resume out"),
        (Means(resume=True), 0, "must come with the storage"),
    ):
        with pytest.raises(InputError, match=said), ledger(problem, seed, means):
            pass
    other = command(scenario, "--set", "traffic.rate=5", "--storage", path, "--resume")
    done = subprocess.run(other, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "`resume` must continue a search of the same scenario" in done.stderr


def test_one_planner_at_a_time(problem: Problem, tmp_path: Path) -> None:
    path = str(tmp_path / "one.journal")
    with (
        ledger(problem, 0, Means(path)),
        pytest.raises(InputError, match="in use by another planner"),
        ledger(problem, 0, Means(path, resume=True)),
    ):
        pass
    with ledger(problem, 0, Means(path, resume=True)):  # the first one has let go
        pass


def test_unusable_storages_are_refused(problem: Problem, tmp_path: Path) -> None:
    letter = tmp_path / "letter.journal"
    letter.write_text("Dear journal,")
    broken = tmp_path / "broken.journal"
    broken.write_text('{"op_code":0,\n{"op_code":1}\n')
    taken = tmp_path / "taken.db"
    taken.write_text("mine")
    for means, said in (
        (Means("mysql://me:secret@host/db"), "must be FILE.journal or postgresql://.*got 'mysql://host/db'"),
        (Means("plans.txt"), "must be FILE.journal"),
        (Means(str(tmp_path / "no" / "x.journal")), r"must be a file that can be read.*\(No such file"),
        (Means(str(letter)), "must be a new file or a journal of Optuna"),
        (Means(str(broken)), "must be a whole journal"),
        (Means(dashboard=taken), "must be a file that is not there yet"),
        (Means(dashboard=tmp_path / "no" / "x.db"), "must lie in a folder that exists"),
        (Means(workers=0), "`workers` must be at least 1"),
        (Means(workers=2, dask="tcp://127.0.0.1:1"), "must be left out with `dask`"),
    ):
        with pytest.raises(InputError, match=said) as refused, ledger(problem, 0, means):
            pass
        assert "secret" not in str(refused.value)
    assert letter.read_text() == "Dear journal,"
    assert taken.read_text() == "mine"


def test_a_server_that_is_not_there_is_one_line_without_the_password(scenario: Path) -> None:
    pytest.importorskip("psycopg")
    storage = f"postgresql://me:{PASSWORD}@127.0.0.1:1/plans?password={PASSWORD}"
    done = subprocess.run(command(scenario, "--storage", storage), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "got 'postgresql://127.0.0.1:1/plans'" in done.stderr
    assert PASSWORD not in done.stderr


def test_bad_urls_do_not_give_passwords_away(problem: Problem) -> None:
    pytest.importorskip("psycopg")
    for url in (
        "postgresql://me:se/cret@host/db",
        "postgresql://me:se@cret@host:port/db",
        "postgresql://me:secret@:x/",
    ):
        with pytest.raises(InputError) as refused, ledger(problem, 0, Means(url)):
            pass
        assert "cret@" not in str(refused.value)
        assert "me:" not in str(refused.value)
    assert shown_storage("postgresql://db/plans#x") == "postgresql://db/plans"


def test_a_cluster_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("planner.replications.ANSWER_S", 1)
    with pytest.raises(InputError, match="must be the address of a Dask"), working(1, "tcp://127.0.0.1:1"):
        pass


def test_the_dashboard_needs_no_storage(problem: Problem, tmp_path: Path) -> None:
    path = tmp_path / "plan.db"
    with ledger(problem, 0, Means(dashboard=path)):
        pass
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT study_name FROM studies").fetchone() == (study_name(problem, 0),)
    connection.close()

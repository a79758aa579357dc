"""The harness of tests/postgres.py keeps its promises; the tests of the books rest on them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from tests import postgres
from tests.postgres import PostgresError, PostgresServer, family, is_gone, wait_gone

ROOT = Path(__file__).parent.parent
_SOCKET_PATH_BYTES_MAX = 107  # sun_path of unix(7), less its zero
_OWNER = """
from tests.postgres import PostgresServer
with PostgresServer() as server:
    server.start()
    print(server.pid, server.folder, flush=True)
    input()
"""


@contextmanager
def engine(url: str) -> Iterator[Engine]:
    opened = create_engine(url, poolclass=NullPool)
    yield opened
    opened.dispose()


def run(url: str, *statements: str) -> None:
    with engine(url) as opened, opened.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def numbers(url: str) -> list[int]:
    with engine(url) as opened, opened.connect() as connection:
        return list(connection.scalars(text("SELECT n FROM numbers ORDER BY n")))


def setting(connection: Connection, name: str) -> str:
    return str(connection.scalar(text(f"SHOW {name}")))


@contextmanager
def none_left(processes: list[psutil.Process]) -> Iterator[None]:
    """When the test fails, they still do not stay."""
    try:
        yield
    finally:
        for process in processes:
            if not is_gone(process):
                process.kill()


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """One that the test may end."""
    postgres.require_server()
    with PostgresServer() as server:
        server.start()
        yield server


# Databases


@pytest.mark.parametrize("time", ["first", "second"])
def test_each_test_has_an_empty_database(database_url: str, time: str) -> None:
    run(database_url, "CREATE TABLE numbers (n INTEGER)", "INSERT INTO numbers VALUES (1)")
    assert numbers(database_url) == [1]


async def test_async_tests_have_it_too(database_url: str) -> None:
    run(database_url, "CREATE TABLE numbers (n INTEGER)")
    assert numbers(database_url) == []


def test_two_databases_are_apart(postgres_server: PostgresServer) -> None:
    one, two = postgres_server.new_database(), postgres_server.new_database()
    for url, number in ((one, 1), (two, 2)):
        run(url, "CREATE TABLE numbers (n INTEGER)", f"INSERT INTO numbers VALUES ({number})")
    assert (numbers(one), numbers(two)) == ([1], [2])
    postgres_server.drop(one)
    assert numbers(two) == [2]
    postgres_server.drop(two)


def test_a_drop_cuts_off_who_is_connected_and_may_come_twice(postgres_server: PostgresServer) -> None:
    url = postgres_server.new_database()
    with engine(url) as opened, opened.connect() as connection:
        connection.execute(text("CREATE TABLE numbers (n INTEGER)"))
        postgres_server.drop(url)
        with pytest.raises(OperationalError, match=r"terminat|closed"):
            connection.execute(text("SELECT 1"))
    postgres_server.drop(url)
    with pytest.raises(OperationalError, match="does not exist"):
        numbers(url)


def test_it_writes_to_disk_and_listens_on_its_socket_only(postgres_server: PostgresServer) -> None:
    url = postgres_server.new_database()
    with engine(url) as opened, opened.connect() as connection:
        assert {name: setting(connection, name) for name in ("fsync", "synchronous_commit", "full_page_writes")} == {
            "fsync": "on",
            "synchronous_commit": "on",
            "full_page_writes": "on",
        }
        assert setting(connection, "listen_addresses") == ""
        assert setting(connection, "server_encoding") == "UTF8"
    postgres_server.drop(url)
    (socket,) = [path for path in postgres_server.folder.iterdir() if path.is_socket()]
    assert len(os.fsencode(socket)) <= _SOCKET_PATH_BYTES_MAX
    assert postgres_server.folder.stat().st_mode & 0o077 == 0, "nobody else on this machine may connect"


def test_the_users_own_settings_lead_nowhere_else(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PGHOST": "/nowhere", "PGPORT": "77", "PGUSER": "nobody", "PGDATABASE": "none"}.items():
        monkeypatch.setenv(name, value)
    postgres_server.restart()
    url = postgres_server.new_database()
    run(url, "CREATE TABLE numbers (n INTEGER)")
    postgres_server.drop(url)


# Life and death


def test_what_was_committed_before_a_kill_is_there_after_it(postgres_server: PostgresServer) -> None:
    url = postgres_server.new_database()
    run(url, "CREATE TABLE numbers (n INTEGER)", "INSERT INTO numbers VALUES (1)")
    with engine(url) as opened, opened.connect() as connection:
        connection.execute(text("INSERT INTO numbers VALUES (2)"))
        processes = family(postgres_server.pid)
        postgres_server.kill()
        assert len(processes) > 2, "the postmaster, its helpers and the one that serves us"
        assert [process for process in processes if not is_gone(process)] == []
        with pytest.raises(OperationalError):
            connection.execute(text("SELECT 1"))
        with pytest.raises(OperationalError, match=r"No such file|refused"):
            numbers(url)
    postgres_server.restart()
    assert numbers(url) == [1], "and what was not committed is not"
    postgres_server.drop(url)


def shared_memory(server: PostgresServer) -> str:
    """The id of its System V segment, as it notes in the seventh line of its lock file."""
    return (server.folder / "data" / "postmaster.pid").read_text().splitlines()[6].split()[1]


def shared_memories() -> set[str]:
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


def compute_for_ever(url: str) -> None:
    with pytest.raises(OperationalError):
        run(url, "DO $$ BEGIN PERFORM pg_advisory_lock(1); LOOP NULL; END LOOP; END $$")


def test_a_busy_backend_dies_with_the_rest(own_server: PostgresServer) -> None:
    """Left alone, one that computes does not see that the postmaster is gone before it next waits for something."""
    url = own_server.new_database()
    client = threading.Thread(target=compute_for_ever, args=[url])
    client.start()
    with engine(url) as opened, opened.connect() as connection:
        locked = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted")
        while not connection.scalar(locked):
            assert client.is_alive()
    processes = family(own_server.pid)
    with none_left(processes):
        own_server.kill()
        assert [process for process in processes if not is_gone(process)] == []
    client.join()


def test_it_does_not_run_as_root(postgres_server: PostgresServer) -> None:
    processes = family(postgres_server.pid)
    assert processes
    for process in processes:
        assert 0 not in (*process.uids(), *process.gids()), process


def test_restart_keeps_databases_and_cuts_off_clients(postgres_server: PostgresServer) -> None:
    url = postgres_server.new_database()
    run(url, "CREATE TABLE numbers (n INTEGER)", "INSERT INTO numbers VALUES (1)")
    before = postgres_server.pid
    with engine(url) as opened, opened.connect() as connection:
        connection.execute(text("SELECT 1"))
        postgres_server.restart()
        with pytest.raises(OperationalError):
            connection.execute(text("SELECT 1"))
    assert postgres_server.pid != before
    assert numbers(url) == [1]
    postgres_server.drop(url)


def test_a_server_that_a_failed_test_left_dead_comes_back(postgres_server: PostgresServer) -> None:
    postgres_server.kill()
    assert not postgres_server.running
    postgres_server.drop(postgres_server.new_database())
    assert postgres_server.running


@pytest.mark.parametrize("killed", [False, True])
def test_close_leaves_nothing(killed: bool) -> None:
    postgres.require_server()
    with PostgresServer() as server:
        server.start()
        processes = family(server.pid)
        shared = shared_memory(server)
        assert shared in shared_memories()
        if killed:
            server.kill()
            assert shared in shared_memories()
    wait_gone(processes)
    assert not server.running
    assert not server.folder.exists()
    assert shared not in shared_memories()


def test_one_that_does_not_stop_is_killed(own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "STOP_TIMEOUT_S", 0.05)
    processes = family(own_server.pid)
    os.kill(own_server.pid, signal.SIGSTOP)
    own_server.stop()
    assert [process for process in processes if not is_gone(process)] == []


def test_a_server_that_cannot_start_says_why() -> None:
    postgres.require_server()
    with PostgresServer({"shared_buffers": "plenty"}) as server:
        with pytest.raises(PostgresError, match=r"did not start:\n(.|\n)*invalid value for parameter.*plenty"):
            server.start()
        assert not server.running


def test_it_outlives_the_thread_that_started_it(postgres_server: PostgresServer) -> None:
    """trio's worker threads end after ten idle seconds, and the kernel's signal comes when the spawning thread ends."""
    thread = threading.Thread(target=postgres_server.restart)
    thread.start()
    native_id = thread.native_id
    thread.join()
    while native_id in {entry.id for entry in psutil.Process().threads()}:  # Python's join comes a little earlier
        pass
    process = psutil.Process(postgres_server.pid)
    postgres_server.drop(postgres_server.new_database())
    assert process == psutil.Process(postgres_server.pid), "it was not started anew"
    assert not is_gone(process)


def test_it_is_gone_when_its_owner_is_killed() -> None:
    postgres.require_server()
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        pid, folder = owner.stdout.readline().split()
        processes = family(int(pid))
        assert len(processes) > 1
        try:
            with none_left(processes):
                owner.kill()
                owner.wait()
                wait_gone(processes)
        finally:
            shutil.rmtree(folder)


def test_it_is_not_started_for_an_owner_that_died_meanwhile() -> None:
    """The kernel's signal is asked for after the fork; an owner that was killed before leaves a child of somebody else."""

    def guarded(owner: int) -> str:
        command = ["sh", "-c", postgres._GUARD, "guard", str(owner), "echo", "started"]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout

    assert guarded(os.getpid()) == "started\n"
    assert guarded(os.getppid()) == ""


# Where no server can run


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing, and Debian's folder with nothing; not in CI."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(postgres, "DEBIAN_HOME", tmp_path / "postgresql")
    monkeypatch.delenv("CI", raising=False)
    return tmp_path


def install(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    return folder


def test_without_a_server_tests_are_skipped_and_fail_in_ci(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pytest.skip.Exception, match=r"not installed.*apt-get install postgresql"):
        postgres.require_server()
    with pytest.raises(PostgresError, match="not installed"):
        PostgresServer()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"not installed.*apt-get install postgresql"):
        postgres.require_server()


def test_without_setpriv_it_is_not_run(bare_machine: Path) -> None:
    install(bare_machine / "bin", "initdb", "postgres")
    with pytest.raises(pytest.skip.Exception, match="setpriv"):
        postgres.require_server()
    install(bare_machine / "bin", "setpriv")
    postgres.require_server()


def test_a_server_on_path_comes_before_debians_newest(bare_machine: Path) -> None:
    home = bare_machine / "postgresql"
    install(home / "9.6" / "bin", "initdb", "postgres")
    install(home / "15" / "bin", "initdb", "postgres")
    install(home / "17" / "bin", "psql")  # a client only
    install(home / "common" / "bin", "initdb", "postgres")
    assert postgres.find_binaries() == home / "15" / "bin"
    on_path = install(bare_machine / "bin", "initdb", "postgres")
    assert postgres.find_binaries() == on_path

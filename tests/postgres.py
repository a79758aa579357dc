"""A PostgreSQL server for the tests: its own folder, its own Unix socket, never as root, and gone when the tests are.

What the Debian package sets up (the cluster `main`) is not touched; only its programs are run. Everything that the server writes lies in
a folder below /tmp, where the path of the socket stays short: the kernel allows 107 bytes.

The server dies with its owner because the kernel sends it a signal then (PR_SET_PDEATHSIG, set by `setpriv`, so that no Python code runs
between fork and exec). That signal comes when the *thread* that spawned it ends, so one thread of the harness spawns it and stays.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import psutil
import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

DEBIAN_HOME = Path("/usr/lib/postgresql")  # each version has a folder here, with a `bin` that is not on PATH
START_TIMEOUT_S = 60.0  # took 0.05 s here, 0.1 to 0.3 s after a kill; with a busy disk and much to recover it may be far longer
STOP_TIMEOUT_S = 20.0
GONE_TIMEOUT_S = 20.0  # after a SIGKILL
POLL_S = 0.01
_TMP = "/tmp"  # not TMPDIR: that may be long
_USERS = ("postgres", "nobody")  # who runs the server when we are root; the first that exists
_ROLE = "archipelag"
_PORT = 5432  # no TCP port: part of the socket's name
_LOG_TAIL_CHARS = 2000
_SETTINGS = MappingProxyType({"listen_addresses": "", "fsync": "on", "shared_buffers": "16MB"})
# Signals that came before `setpriv` asked for them are lost, so the last step looks whether the owner still is the parent.
_GUARD = 'test "$PPID" = "$1" && shift && exec "$@"'


class PostgresError(Exception):
    """The server did not start; the text has the end of its log."""


def find_binaries() -> Path | None:
    """The folder that holds `initdb` and `postgres`: one on PATH, else Debian's newest."""
    on_path = map(Path, os.environ.get("PATH", "").split(os.pathsep))
    versions = sorted(DEBIAN_HOME.glob("[0-9]*/bin"), key=lambda folder: float(folder.parent.name), reverse=True)
    return next((folder for folder in (*on_path, *versions) if _executables(folder, "initdb", "postgres")), None)


def _executables(folder: Path, *names: str) -> bool:
    return all(os.access(folder / name, os.X_OK) for name in names)


def why_unavailable() -> str | None:
    """What this machine lacks to run a server, with the command that brings it; None where it can."""
    if find_binaries() is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if shutil.which("setpriv") is None:
        return "PostgreSQL is only run under setpriv, which is missing (Debian: apt-get install util-linux)"
    return None


def require_server() -> None:
    """Skips the test where no server can run; fails it in CI, where one has to."""
    reason = why_unavailable()
    if reason is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


class PostgresServer:
    """One server process and its databases. Calls block; any thread may make them, one at a time."""

    def __init__(self, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        """Makes the folder and the empty cluster (0.6 s here). ``settings`` go over the defaults, as in postgresql.conf."""
        binaries = find_binaries()
        if binaries is None:
            raise PostgresError(why_unavailable())
        self.folder = Path(tempfile.mkdtemp(prefix="archipelag-pg-", dir=_TMP))
        self._binaries = binaries
        self._settings = {**_SETTINGS, "unix_socket_directories": str(self.folder), "port": str(_PORT), **settings}
        self._account = _other_account()
        self._numbers = itertools.count(1)
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="postgres-keeper")
        self._process: subprocess.Popen[bytes] | None = None
        self._was_killed = False
        try:
            if self._account:
                os.chown(self.folder, self._account.pw_uid, self._account.pw_gid)
            self._make_cluster()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<PostgresServer {self.folder} {f'pid {self.pid}' if self.running else 'stopped'}>"

    def __enter__(self) -> PostgresServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the postmaster. Raises PostgresError before the first start."""
        if self._process is None:
            raise PostgresError("the server was not started")
        return self._process.pid

    # Life and death

    def start(self) -> None:
        """Returns once the server takes connections. Raises PostgresError when it ends instead."""
        self._process = self._keeper.submit(self._spawn, self._server_command()).result()
        try:
            self._wait_ready(self._process)
        except BaseException:
            self.kill()
            raise
        self._was_killed = False

    def stop(self) -> None:
        """Fast shutdown: open transactions are rolled back, clients are cut off. Killed when that does not end it."""
        if self._process is None or not self.running:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """As a power cut would, but for what the operating system has cached: no process runs another instruction."""
        process = self._process
        if process is None or not self.running:
            return
        process.send_signal(signal.SIGSTOP)  # so that it neither has new children nor tends to the dead ones
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        children = family(process.pid)[1:]
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        process.kill()
        process.wait()
        wait_gone(children)
        self._was_killed = True

    def restart(self) -> None:
        """After ``kill``, ``stop`` or neither; all databases are what they were."""
        self.stop()
        self.start()

    def close(self) -> None:
        """The end: server, folder and all databases are gone."""
        try:
            if self._was_killed:
                self.start()  # it leaves shared memory behind, which only the next start takes back
            self.stop()
        finally:
            self._keeper.shutdown()
            shutil.rmtree(self.folder)

    # Databases

    def new_database(self) -> str:
        """The SQLAlchemy URL of a fresh, empty database (40 ms here)."""
        name = f"test_{next(self._numbers)}"
        # The default strategy, WAL_LOG since version 15, took 38 ms and its drop 13 ms; FILE_COPY, which checkpoints, 66 and 40 ms.
        self._execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
        return f"postgresql+psycopg://{_ROLE}@/{name}?host={self.folder}&port={_PORT}"

    def drop(self, url: str) -> None:
        """Cuts off whoever is connected. A database that is gone already is none too few."""
        name = make_url(url).database or ""
        self._execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def _execute(self, statement: sql.Composed) -> None:
        if not self.running:
            self.start()  # a test that killed it and then failed is not the next test's fault
        with self._connect() as connection:
            connection.execute(statement)

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(
            host=str(self.folder), port=_PORT, user=_ROLE, dbname="postgres", autocommit=True, connect_timeout=10
        )

    # Processes

    def _make_cluster(self) -> None:
        options = ["--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C", f"--username={_ROLE}"]
        command = [str(self._binaries / "initdb"), f"--pgdata={self.folder / 'data'}", *options]
        if self._keeper.submit(self._spawn, command).result().wait() != 0:
            raise PostgresError(f"initdb failed:\n{self._log_tail()}")

    def _server_command(self) -> list[str]:
        command = [str(self._binaries / "postgres"), "-D", str(self.folder / "data")]
        for name, value in self._settings.items():
            command += ["-c", f"{name}={value}"]
        return command

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        """In the keeper's thread only. PostgreSQL refuses to run as root, so root hands over to another account."""
        guard = ["setpriv", "--pdeathsig", "QUIT", "sh", "-c", _GUARD, "guard", str(os.getpid())]
        with open(self._log, "ab") as log:
            return subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},  # the user's PG… variables are for other servers
                user=self._account.pw_uid if self._account else None,
                group=self._account.pw_gid if self._account else None,
                extra_groups=[] if self._account else None,
                start_new_session=True,  # Ctrl-C is for the tests, which then stop it
            )

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return self._connect().close()
            except psycopg.OperationalError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise PostgresError(f"postgres did not start:\n{self._log_tail()}") from error
            time.sleep(POLL_S)

    @property
    def _log(self) -> Path:
        return self.folder / "server.log"

    def _log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-_LOG_TAIL_CHARS:]


def _other_account() -> pwd.struct_passwd | None:
    """Who runs the server when we are root; None where it is ourselves."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    return next(known[name] for name in _USERS if name in known)


def family(pid: int) -> list[psutil.Process]:
    """The process and all that come from it; empty when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_gone(processes: Iterable[psutil.Process]) -> None:
    """Raises PostgresError when one still runs after a while. Processes of others are polled: nobody tells us of their end."""
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while left := [process for process in processes if not is_gone(process)]:
        if time.monotonic() > deadline:
            raise PostgresError(f"still there after {GONE_TIMEOUT_S:.0f} s: {left}")
        time.sleep(POLL_S)


def is_gone(process: psutil.Process) -> bool:
    """A zombie is gone: where nobody collects orphans, as in some containers, it stays one for ever."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True

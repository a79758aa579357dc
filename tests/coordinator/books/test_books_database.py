"""A database that is locked, read-only, full, broken or gone: BooksUnavailable, nothing half-done, and the same change succeeds later."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql

from coordinator.books import database as database_module
from coordinator.books import writer as writer_module
from coordinator.books.accounts import CreateAccount
from coordinator.books.database import Database, sqlite_url
from coordinator.books.errors import BooksRefused, BooksUnavailable
from coordinator.books.jobs import Adopt, Earned, JobState, OpenJob, Outcome, SettleJob
from coordinator.books.ledger import Move, PlaceHold, PostHold, Share
from coordinator.books.writer import Writer
from protocol.errors import ConfigError
from tests.coordinator.books.live_books import (
    WAIT_S,
    Answers,
    Gate,
    balances_of,
    complaints,
    fund,
    in_threads,
    move,
    one_group,
    opened,
    tables_of,
)
from tests.coordinator.books.plain_books import CREDIT, job
from tests.coordinator.books.shadow import Tables
from tests.postgres import PostgresServer

NEVER_MS = 2**50
NOBODY = 65534
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock is waited for 50 ms, a commit tried for 100 ms."""
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(writer_module, "RETRY_S", 0.1)
    monkeypatch.setattr(writer_module, "_RETRY_PAUSE_S", 0.001)


@pytest.fixture
def patient(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For writers that stand in each other's way and must all come through, on however busy a machine."""
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(writer_module, "RETRY_S", PATIENCE_S)


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    return sqlite_url(tmp_path)


@pytest.fixture
def postgres(postgres_server: PostgresServer) -> Iterator[str]:
    url = postgres_server.new_database()
    yield url
    postgres_server.drop(url)


def change(writer: Writer) -> None:
    """A unit of four changes, and a unit beside it; raises what either was told."""
    with one_group(writer) as answers:
        answers.submit("hold", PlaceHold("h1", "user:a", 500, NEVER_MS), move("t1", 5))
        answers.submit("post", PostHold("h1", "user:a", (Share("user:b", 300), Share("user:c", 50))))
    for name in ("hold", "post"):
        if isinstance(answers.by_name[name], Exception):
            raise answers.by_name[name]


def is_unavailable(writer: Writer) -> None:
    """Everybody hears that."""
    answers = Answers(writer)
    answers.submit("hold", PlaceHold("h1", "user:a", 500, NEVER_MS), move("t1", 5))
    answers.submit("post", PostHold("h1", "user:a", (Share("user:b", 300), Share("user:c", 50))))
    assert answers.words() == {"hold": "BooksUnavailable", "post": "BooksUnavailable"}


def is_well_again(writer: Writer, before: Tables) -> None:
    """Nothing was half-done, and the same changes succeed, once."""
    assert tables_of(writer._database) == before
    change(writer)
    change(writer)
    assert balances_of(writer._database) == {
        "system:issue": (-1000, 0),
        "user:a": (645, 0),
        "user:b": (305, 0),
        "user:c": (50, 0),
    }
    assert complaints(writer._database) == []


@contextmanager
def funded(url: str) -> Iterator[tuple[Writer, Tables]]:
    with opened(url) as writer:
        fund(writer, "user:a", 1000)
        yield writer, tables_of(writer._database)


@contextmanager
def on_every_connection(writer: Writer, statement: str, undo: str) -> Iterator[None]:
    """Connections are new inside, each with a setting of its own, and new again afterwards."""
    engine = writer._database.engine

    def prepare(connection: Any, _record: object) -> None:
        connection.cursor().execute(statement)

    sql.event.listen(engine, "connect", prepare)
    writer._turns.close()
    engine.dispose()
    try:
        yield
    finally:
        sql.event.remove(engine, "connect", prepare)
        with engine.connect() as connection:
            connection.exec_driver_sql(undo)
        writer._turns.close()
        engine.dispose()


# Locked


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Somebody else writes, and does not finish."""
    other = Database(url)
    try:
        with other.writing() as connection:
            connection.exec_driver_sql("UPDATE balances SET held = 7 WHERE account = 'user:a'")
            yield
            connection.rollback()
    finally:
        other.close()


def test_a_database_that_another_writer_keeps_locked(database_url: str) -> None:
    with funded(database_url) as (writer, before):
        with locked(database_url):
            is_unavailable(writer)
            with writer._database.reading() as connection:
                assert connection.exec_driver_sql("SELECT held FROM balances WHERE account = 'user:a'").scalar() == 0
        is_well_again(writer, before)


def test_a_lock_that_is_given_back_in_time_is_waited_for(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "RETRY_S", WAIT_S)
    with funded(database_url) as (writer, _):
        answers = Answers(writer)
        with locked(database_url):
            answers.submit("move", move("t1", 5))
            while not writer.statistics.retries:
                writer._thread.join(0.001)
        assert answers.words() == {"move": "ok"}
        assert balances_of(writer._database)["user:a"] == (995, 0)


def test_readers_do_not_wait_for_writers(database_url: str) -> None:
    with funded(database_url) as (writer, _), locked(database_url):
        assert complaints(writer._database) == []


# Read-only


def test_a_sqlite_database_that_turns_read_only(sqlite: str) -> None:
    with funded(sqlite) as (writer, before):
        with on_every_connection(writer, "PRAGMA query_only = ON", "PRAGMA query_only = OFF"):
            is_unavailable(writer)
        is_well_again(writer, before)


def test_a_postgres_database_that_turns_read_only(postgres: str) -> None:
    """As a standby is, and a server that has been told so."""
    with funded(postgres) as (writer, before):
        name = writer._database.engine.url.database
        writing = f"ALTER DATABASE {name} SET default_transaction_read_only = "
        with writer._database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(writing + "on")
        setting = "SET default_transaction_read_only = on"
        with on_every_connection(writer, setting, "SET default_transaction_read_only = off"):
            is_unavailable(writer)
        with writer._database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("SET default_transaction_read_only = off")
            connection.exec_driver_sql(writing + "off")
        writer._database.engine.dispose()
        is_well_again(writer, before)


@contextmanager
def without_rights() -> Iterator[None]:
    """Root may write anything, so it is somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="archipelag-books-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_file_that_must_not_be_written(public_folder: Path) -> None:
    with funded(sqlite_url(public_folder)) as (_, before):
        pass
    (public_folder / "coordinator.db").chmod(0o444)
    public_folder.chmod(0o555)
    with without_rights(), pytest.raises(ConfigError, match="could not be opened"):
        Database(sqlite_url(public_folder))
    public_folder.chmod(0o755)
    (public_folder / "coordinator.db").chmod(0o600)
    with opened(sqlite_url(public_folder)) as writer:
        is_well_again(writer, before)


def test_a_folder_that_must_not_be_written(public_folder: Path) -> None:
    public_folder.chmod(0o555)
    with without_rights(), pytest.raises(ConfigError, match="could not be opened"):
        Database(sqlite_url(public_folder))
    assert list(public_folder.iterdir()) == []


# Full


def test_a_full_sqlite_database(sqlite: str) -> None:
    with funded(sqlite) as (writer, _):
        with on_every_connection(writer, "PRAGMA max_page_count = 1", "PRAGMA max_page_count = 1000000"):
            _fill(writer)
            full = tables_of(writer._database)
            with pytest.raises(BooksUnavailable) as error:
                writer.do_all(PlaceHold(f"h1 {'x' * 200}", "user:a", 500, NEVER_MS), *_fillings(99))
            assert "full" in str(error.value.__cause__) and "full" not in str(error.value)
        assert tables_of(writer._database) == full
        assert complaints(writer._database) == []
        writer.do_all(PlaceHold(f"h1 {'x' * 200}", "user:a", 500, NEVER_MS), *_fillings(99))
        assert balances_of(writer._database)["user:a"] == (1000, 500)


def _fillings(number: int) -> list[Move]:
    """Long rows that leave the balances as they are."""
    ends = ("user:a", "user:f")
    return [move(f"{turn} {number} {'x' * 200}", 1, *ends[:: 1 if turn % 2 == 0 else -1]) for turn in range(20)]


def _fill(writer: Writer) -> None:
    """The pages that are there take a few more rows; then there is no room for one."""
    for number in range(99):
        try:
            writer.do_all(*_fillings(number))
        except BooksUnavailable as error:
            assert "full" in str(error.__cause__)
            return
    raise AssertionError("it never was full")


# Broken, of another kind, or not there at all


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "coordinator.db").write_bytes(b"This is a letter, and no database. " * 500)
    with pytest.raises(ConfigError, match="could not be opened"):
        Database(sqlite_url(tmp_path))


NOWHERE = [
    "sqlite:////no/such/folder/books.db",
    "postgresql://nobody@/none?host=/no/such/folder",
    "postgresql+psycopg://nobody@127.0.0.1:1/none",
    "oracle://somewhere/books",
    "no url at all",
]


@pytest.mark.parametrize("url", NOWHERE)
def test_a_database_that_is_not_there(url: str) -> None:
    with pytest.raises(ConfigError, match="database"):
        Database(url)


def test_what_is_wrong_is_said_without_the_password() -> None:
    with pytest.raises(ConfigError) as error:
        Database("postgresql://ada:hunter2@127.0.0.1:1/none")
    assert "hunter2" not in str(error.value)


def test_a_database_of_a_newer_version(database_url: str) -> None:
    database = Database(database_url)
    with database.writing() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    with pytest.raises(ConfigError, match="newer"):
        Database(database_url)


# Gone


@pytest.mark.parametrize("way", ["moved", "replaced", "deleted"])
def test_a_sqlite_file_that_is_not_where_it_was(sqlite: str, tmp_path: Path, way: str) -> None:
    """SQLite itself would go on writing to the file that it has open, and nobody would ever find what it wrote."""
    file, aside = tmp_path / "coordinator.db", tmp_path / "aside.db"
    with funded(sqlite) as (writer, before):
        if way == "replaced":
            shutil.copy(file, tmp_path / "copy.db")
        file.rename(aside)
        if way == "replaced":
            (tmp_path / "copy.db").rename(file)
        is_unavailable(writer)
        with pytest.raises(BooksUnavailable), writer._database.writing():
            pass
        if way != "deleted":
            aside.replace(file)
            is_well_again(writer, before)


def test_a_server_that_dies_and_comes_back(postgres: str, postgres_server: PostgresServer) -> None:
    with funded(postgres) as (writer, before):
        try:
            postgres_server.kill()
            is_unavailable(writer)
            with pytest.raises(BooksUnavailable), writer._database.reading() as connection:
                connection.exec_driver_sql("SELECT 1")
        finally:
            postgres_server.restart()
        is_well_again(writer, before)


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_server_that_dies_under_a_transaction(
    postgres: str, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Nobody notices, where it comes back while the commit is tried."""
    monkeypatch.setattr(writer_module, "RETRY_S", WAIT_S)
    with funded(postgres) as (writer, _):
        gate, answers = Gate(), Answers(writer)
        answers.submit("first", move("t1", 10), gate)
        try:
            assert gate.reached.wait(WAIT_S)
            getattr(postgres_server, end)()
        finally:
            postgres_server.restart()
        gate.open.set()
        answers.submit("second", move("t2", 20))
        assert answers.words() == {"first": "ok", "second": "ok"}
        assert writer.statistics.retries > 0
        assert balances_of(writer._database)["user:b"] == (30, 0)
        assert complaints(writer._database) == []


def test_a_connection_that_the_server_ends(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "RETRY_S", WAIT_S)
    with funded(postgres) as (writer, _):
        with writer._database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
            assert connection.exec_driver_sql(others).scalar() is True
        assert writer.do(move("t1", 10)).amount == 10
        assert balances_of(writer._database)["user:b"] == (10, 0)


# Two Coordinators


@pytest.mark.usefixtures("patient")
def test_two_writers_of_one_database_lose_nothing(database_url: str) -> None:
    """Each sees what the other wrote, though both remember rows."""
    with opened(database_url) as one, opened(database_url) as other:
        fund(one, "user:a", 1000)
        answers = [Answers(one), Answers(other)]

        def client(which: int, number: int) -> None:
            for turn in range(20):
                name = f"{which}.{number}.{turn}"
                answers[which].submit(name, move(name, 5))

        in_threads([lambda w=w, n=n: client(w, n) for w in range(2) for n in range(8)])  # type: ignore[misc]
        words = [*answers[0].words().values(), *answers[1].words().values()]
        assert (words.count("ok"), words.count("insufficient_credits")) == (200, 120)
        assert balances_of(one._database) == {"system:issue": (-1000, 0), "user:b": (1000, 0)}
        assert complaints(other._database) == []


@pytest.mark.usefixtures("patient")
def test_writers_take_turns_and_see_each_other(database_url: str) -> None:
    with opened(database_url) as one, opened(database_url) as other:
        fund(one, "user:a", 1000)
        for number in range(10):
            writer = (one, other)[number % 2]
            writer.do(PlaceHold(f"h{number}", "user:a", 100, NEVER_MS))
            writer.do(PostHold(f"h{number}", "user:a", (Share("user:b", 60),)))
        with pytest.raises(BooksRefused):
            one.do(PlaceHold("h99", "user:a", 401, NEVER_MS))
        assert balances_of(one._database)["user:b"] == (600, 0)
        with one._database.writing() as connection:  # as the command line does
            connection.exec_driver_sql("UPDATE balances SET posted = posted + 50 WHERE account = 'user:a'")
            connection.exec_driver_sql("UPDATE balances SET posted = posted - 50 WHERE account = 'system:issue'")
        assert one.do(move("all", 450)).amount == 450


def test_whoever_writes_writes_alone(database_url: str) -> None:
    """Not only writers' threads: keys and upkeep read what they are about to change too."""
    with funded(database_url) as (writer, _):
        with writer._database.writing(), pytest.raises(BooksUnavailable), writer._database.writing():
            pass
        with writer._database.writing():
            pass


@pytest.mark.usefixtures("patient")
def test_a_job_is_paid_once_whoever_believes_to_own_it(database_url: str) -> None:
    """The first owner only slept; another has taken its jobs over. Both settle them at once."""
    with opened(database_url) as one, opened(database_url) as other:
        one.do(CreateAccount("ada"))
        for number in range(20):
            one.do(OpenJob(job(f"j{number}", bid=10 * CREDIT, can_rerun=True), NEVER_MS))
        answers = [Answers(one), Answers(other)]

        def settle(id: str, owner: str) -> SettleJob:
            return SettleJob(id, "ada", "echo", owner, 1, Outcome(JobState.SUCCEEDED), (Earned(f"p-{owner}", 7 * CREDIT, 1),))

        def sleeper() -> None:
            for number in range(20):
                answers[0].submit(f"j{number}", settle(f"j{number}", "c1"))

        def adopter() -> None:
            for number in reversed(range(20)):
                answers[1].submit(f"adopt j{number}", Adopt(f"j{number}", "ada", "c1", 1, "c2", 1))
                answers[1].submit(f"j{number}", settle(f"j{number}", "c2"))

        in_threads([sleeper, adopter])
        first, second = answers[0].words(), answers[1].words()
        for number in range(20):
            assert sorted((first[f"j{number}"], second[f"j{number}"])) == ["not_owner", "ok"]
        assert balances_of(one._database)["user:ada"] == (9_860 * CREDIT, 0)
        assert complaints(one._database) == []


@pytest.mark.usefixtures("patient")
def test_an_upgrade_is_made_once(database_url: str) -> None:
    """Several Coordinators start at once on an empty database."""
    databases: list[Database] = []
    open_it: Callable[[], None] = lambda: databases.append(Database(database_url))  # noqa: E731
    in_threads([open_it] * 4)
    with databases[0].reading() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM alembic_version").scalar() == 1
    for database in databases:
        database.close()

"""The one database: SQLite in a file, or PostgreSQL that several Coordinators share. Opens it, brings it up to date, and tells what is
wrong with it.

Writers take turns: SQLite by BEGIN IMMEDIATE, PostgreSQL by an advisory lock, so that a group of operations reads what no one else is
about to change. Readers never wait for them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from coordinator.books.errors import BooksUnavailable
from coordinator.books.schema import writer_turns
from protocol.errors import ConfigError

log = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 5.0  # another process writes: keys, accounts, a backup
TROUBLE_FORGOTTEN_S = 60.0
_WAL_PAUSE_S = 0.01
_WRITERS = 0x6172_6368_6970  # name of the advisory lock, "archip"
_MIGRATIONS = str(Path(__file__).parent / "migrations")
_MIGRATION_VERSIONS = str(Path(__file__).parent / "migrations" / "versions")
_LAST_WRITER = sql.select(writer_turns.c.owner)
_OLD_VERSION_TABLE = "coordinator_schema"
_TROUBLES_MAX = 100  # kinds of trouble that are told apart


def sqlite_url(data_dir: Path) -> str:
    """Where a Coordinator keeps its books unless told otherwise."""
    return f"sqlite:///{data_dir / 'coordinator.db'}"


class Database:
    """An opened database, of this version. Any thread may use it."""

    def __init__(self, url: str) -> None:
        """Opens it, creates or migrates its tables. Raises ConfigError when that is not possible."""
        try:
            self.engine = _engine(url)
            self.is_sqlite = self.engine.dialect.name == "sqlite"
            self.trouble = Trouble()
            _migrate(self)
            self._file = _file_of(self.engine.url)
        except CommandError as error:
            raise ConfigError("the database was written by a newer version; upgrade this program") from error
        except (SQLAlchemyError, OSError, ImportError) as error:
            raise ConfigError(f"the database could not be opened ({_reason(error)}); check --database-url") from error

    def __repr__(self) -> str:
        return f"<Database {self.engine.url.render_as_string(hide_password=True)}>"

    @contextlib.contextmanager
    def writing(self) -> Iterator[sql.Connection]:
        """A transaction that no other writer shares; committed at the end. Raises BooksUnavailable."""
        with translated(self.trouble), self.engine.connect() as connection, connection.begin():
            self.check_file()
            if self.is_sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.execute(sql.text("SELECT pg_advisory_xact_lock(:name)"), {"name": _WRITERS})
                connection.execute(sql.update(writer_turns).values(owner=""))
            yield connection

    def check_file(self) -> None:
        """Raises BooksUnavailable where SQLite would go on writing to a file that nobody finds any more."""
        if self._file != _file_of(self.engine.url):
            raise BooksUnavailable("the database file was moved or replaced; put it back, or restart the Coordinator")

    @contextlib.contextmanager
    def reading(self) -> Iterator[sql.Connection]:
        """A connection for SELECTs. Raises BooksUnavailable."""
        with translated(self.trouble), self.engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sql.Connection]:
        """A connection whose SELECTs all see the books of one moment, and may take long. Raises BooksUnavailable."""
        with translated(self.trouble), self.engine.connect() as connection:
            if self.is_sqlite:
                connection.exec_driver_sql("BEGIN")
            else:
                connection.execution_options(isolation_level="REPEATABLE READ")
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            yield connection

    def close(self) -> None:
        self.engine.dispose()


class Turns:
    """The transactions of one writer, on a connection of its own; tells whether anybody else has written in between.

    SQLite counts the commits of other connections (PRAGMA data_version). In PostgreSQL a writer leaves its name, under the lock that
    writers take turns by.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._name = secrets.token_hex(16)
        self._connection: sql.Connection | None = None
        self._version: object = None

    @contextlib.contextmanager
    def writing(self) -> Iterator[tuple[sql.Connection, bool]]:
        """The connection in a transaction, committed at the end; and whether nobody has written since the last one. Raises
        BooksUnavailable."""
        with translated(self._database.trouble):
            try:
                connection = self._open()
                with connection.begin():
                    was_alone = self._begin(connection)
                    yield connection, was_alone
            except BaseException:
                self.close()
                raise

    def _open(self) -> sql.Connection:
        if self._connection is None:
            self._version = None
            self._connection = self._database.engine.connect()
        return self._connection

    def _begin(self, connection: sql.Connection) -> bool:
        self._database.check_file()
        if self._database.is_sqlite:
            run_raw(connection, "BEGIN IMMEDIATE")
            version: object = run_raw(connection, "PRAGMA data_version")
        else:
            connection.execute(sql.text("SELECT pg_advisory_xact_lock(:name)"), {"name": _WRITERS})
            version = connection.execute(_LAST_WRITER).scalar()
            if version != self._name:
                connection.execute(sql.update(writer_turns).values(owner=self._name))
        was_alone = self._version is not None and version in (self._version, self._name)
        self._version = version if self._database.is_sqlite else self._name
        return was_alone

    def close(self) -> None:
        """Gives the connection back; the next transaction opens another and is not alone."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def run_raw(connection: sql.Connection, text: str, rows: Sequence[Any] | None = None) -> Any:
    """Runs compiled SQL with the driver's own cursor, for each of ``rows`` or once; the first value of the answer, if there is one.

    SQLAlchemy's way round a statement takes several times as long as a small statement itself, and the books run a dozen for each job.
    Errors come as SQLAlchemy's all the same.
    """
    dialect = connection.dialect
    driver = dialect.dbapi
    assert driver is not None
    cursor = connection.connection.cursor()
    try:
        if rows is not None:
            cursor.executemany(text, rows)
            return None
        cursor.execute(text)
        found = cursor.fetchone() if cursor.description else None
        return found[0] if found is not None else None
    except driver.Error as error:
        raise DBAPIError.instance(text, None, error, driver.Error, dialect=dialect) from error
    finally:
        cursor.close()


class Trouble:
    """What is wrong with a database, for the log: once for each reason, and again when it comes back after TROUBLE_FORGOTTEN_S.

    Any thread may use it. ``clock`` in seconds, only forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._seen_s: dict[str, float] = {}  # reason -> when it was given last

    def note(self, reason: str) -> None:
        now_s = self._clock()
        with self._lock:
            is_new = now_s - self._seen_s.get(reason, float("-inf")) > TROUBLE_FORGOTTEN_S
            if is_new and len(self._seen_s) >= _TROUBLES_MAX:
                self._seen_s.clear()
            self._seen_s[reason] = now_s
        if is_new:
            log.warning("the database cannot be used: %s", reason)


@contextlib.contextmanager
def translated(trouble: Trouble) -> Iterator[None]:
    """The database's own complaints as BooksUnavailable; what breaks a constraint stays an IntegrityError, since it is our bug.

    Clients hear the same text whatever is wrong: where our database is, and as whom we speak to it, stands in the log alone.
    """
    try:
        yield
    except sql.exc.IntegrityError:
        raise
    except (DBAPIError, PoolTimeout) as error:
        trouble.note(_reason(error))
        raise BooksUnavailable("the database cannot be used at the moment") from error


def _reason(error: BaseException) -> str:
    """A word on what is wrong, without the statement and its values: those are nobody's business."""
    original = getattr(error, "orig", None) or error
    if isinstance(original, sqlite3.Error):
        return f"{type(original).__name__}: {original}"
    return str(original).strip().split("\n")[0][:200] or type(original).__name__


def _engine(database_url: str) -> sql.Engine:
    url = make_url(database_url)
    if url.get_backend_name() != "sqlite":
        if url.get_backend_name() == "postgresql" and url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        lock_ms = int(BUSY_TIMEOUT_S * 1000)
        options = f"-c idle_in_transaction_session_timeout=10000 -c lock_timeout={lock_ms} -c statement_timeout=60000"
        connect = {"options": options, "connect_timeout": 5, "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
        return sql.create_engine(url, pool_pre_ping=True, pool_size=4, max_overflow=8, pool_timeout=5.0, connect_args=connect)
    if url.database and url.database != ":memory:":
        # made before SQLite does it, so that nobody else can read it for a moment; WAL files take over its mode
        os.close(os.open(url.database, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        os.chmod(url.database, 0o600)
    engine = sql.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})
    sql.event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _file_of(url: sql.URL) -> tuple[int, int] | None:
    """Device and inode of a SQLite file, by which it is known wherever it goes; None where there is none."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return None
    try:
        found = os.stat(url.database)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # we begin transactions ourselves, see Database.writing
    cursor = connection.cursor()
    # secure_delete: an answer whose time is over is overwritten, not just forgotten
    # wal_autocheckpoint: 16 MB, so that one commit in some hundreds pays for copying the log back, not one in fifty
    _use_wal(cursor)
    for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", "wal_autocheckpoint=4000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _use_wal(cursor: Any) -> None:
    """Whoever opens a new file while somebody else does is refused at once here, whatever the connection's time-out is (SQLite 3.40)."""
    deadline_s = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline_s:
                raise
            time.sleep(_WAL_PAUSE_S)


def _migrate(database: Database) -> None:
    """Brings the tables to this version, one process at a time. Raises CommandError for a version that is not known here."""
    config = Config()
    config.set_main_option("script_location", _MIGRATIONS.replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.set_main_option("version_locations", _MIGRATION_VERSIONS.replace("%", "%%"))
    script = ScriptDirectory.from_config(config)
    with database.engine.connect() as connection, connection.begin():
        if database.is_sqlite:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.execute(sql.text("SELECT pg_advisory_xact_lock(:name)"), {"name": _WRITERS})
        _adopt_first_version(connection, script)

        def upgrade(revision: Any, _context: object) -> Any:
            return script._upgrade_revs("head", revision)

        with EnvironmentContext(config, script, fn=upgrade) as environment:
            environment.configure(connection=connection, transaction_per_migration=False)
            environment.run_migrations()


def _adopt_first_version(connection: sql.Connection, script: ScriptDirectory) -> None:
    """Databases of the first version say so in a table of their own; from now on Alembic's says it."""
    inspector = sql.inspect(connection)
    if not inspector.has_table(_OLD_VERSION_TABLE):
        return
    version = connection.execute(sql.text(f"SELECT version FROM {_OLD_VERSION_TABLE}")).scalar()
    if version is not None and version > 1:
        raise CommandError("a newer version")
    connection.execute(sql.text("CREATE TABLE IF NOT EXISTS alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
    if version == 1 and inspector.has_table("api_keys"):
        connection.execute(sql.text("INSERT INTO alembic_version (version_num) VALUES ('0001')"))
    connection.execute(sql.text(f"DROP TABLE {_OLD_VERSION_TABLE}"))


def database_now_ms(connection: sql.Connection, is_sqlite: bool) -> int:
    """The clock that all Coordinators of one database share, in Unix milliseconds: PostgreSQL's own, or this machine's for SQLite."""
    if is_sqlite:
        return time.time_ns() // 1_000_000
    return int(connection.execute(sql.text("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)")).scalar_one())

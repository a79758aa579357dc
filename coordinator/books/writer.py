"""Group commit: many changes of the books in one transaction.

Theory of operation. A flush to disk costs the same for one change as for a hundred. So one thread takes everything that was submitted
while it was busy, loads the rows that these operations need, applies them in order, stores what changed, and commits once; only then is
anybody told. An operation that is refused leaves the others alone. A commit that fails is tried again for a while: operations are safe to
repeat, since their ids are. If it cannot be done, everybody hears BooksUnavailable and nothing is half-done.

Rules. Submit order is apply order. Nobody is told of a change before it is on disk.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import sqlalchemy as sql
import trio

from coordinator.books.database import Database, Turns
from coordinator.books.errors import BooksRefused, BooksUnavailable
from coordinator.books.rows import Kind, Operation
from coordinator.books.schema import KINDS
from coordinator.books.stored import Loaded, Remembered, Stored

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

GROUP_MAX = 256  # units of one transaction
WAITING_MAX = 20_000  # units that may wait; past this the database is too slow for what is asked of it
RETRY_S = 4.0  # a commit that fails is tried again for so long
_RETRY_PAUSE_S = 0.05
_CLOSE_S = 10.0

Tell = Callable[[Any, Exception | None], None]


@dataclass(slots=True)
class _Unit:
    """Operations that happen together or not at all, and whom to tell: the results, one each, or what went wrong."""

    operations: tuple[Operation[Any], ...]
    tell: Tell
    results: list[Any] = field(default_factory=list)
    error: Exception | None = None


@dataclass(slots=True)
class WriterStatistics:
    groups: int = 0
    units: int = 0
    refused: int = 0
    retries: int = 0
    failed: int = 0
    largest_group: int = 0
    rows_remembered: int = 0  # reads that needed no SELECT
    busy_s: float = 0.0


class Writer:
    """The thread that writes. ``clock_ms`` gives Unix milliseconds."""

    def __init__(self, database: Database, clock_ms: Callable[[], int] | None = None) -> None:
        self._database = database
        self._clock_ms = clock_ms or (lambda: time.time_ns() // 1_000_000)
        self._stored = {kind.name: Stored(kind) for kind in KINDS}
        self._turns = Turns(database)
        self._remembered = Remembered()
        self._queue: deque[_Unit] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self.statistics = WriterStatistics()
        self._thread = threading.Thread(target=self._run, name="books-writer", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Writer {len(self._queue)} waiting, {self.statistics.units} units in {self.statistics.groups} groups>"

    def submit(self, operations: Sequence[Operation[Any]], tell: Tell) -> None:
        """Any thread. ``tell(results, error)`` is called from the writer's thread once it is on disk, or cannot be."""
        with self._wake:
            if self._closing or len(self._queue) >= WAITING_MAX:
                refused = BooksUnavailable("the books are closed" if self._closing else "too many changes wait for the database")
            else:
                self._queue.append(_Unit(tuple(operations), tell))
                self._wake.notify()
                return
        tell(None, refused)

    def last_known(self, kind: Kind[R], key: str) -> R | None:
        """Any thread: a row as this writer saw it last, None where it does not remember. Somebody may have changed it since: a hint."""
        return self._remembered.peek(kind, key)

    def do(self, operation: Operation[T]) -> T:
        """Any thread but trio's: waits for it. Raises BooksRefused or BooksUnavailable."""
        return self.do_all(operation)[0]  # type: ignore[no-any-return]

    def do_all(self, *operations: Operation[Any]) -> list[Any]:
        """Like ``do``, several together or none."""
        done: Future[list[Any]] = Future()

        def tell(results: list[Any], error: Exception | None) -> None:
            done.set_result(results) if error is None else done.set_exception(error)

        self.submit(operations, tell)
        return done.result()

    def close(self) -> None:
        """Writes what waits, then ends the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(_CLOSE_S)
        if not self._thread.is_alive():
            self._turns.close()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closing:
                    self._wake.wait()
                if not self._queue:
                    return
                group = [self._queue.popleft() for _ in range(min(GROUP_MAX, len(self._queue)))]
            started_s = time.perf_counter()
            self._write(group, time.monotonic() + RETRY_S)
            self.statistics.busy_s += time.perf_counter() - started_s
            for unit in group:
                unit.tell(unit.results, unit.error)

    def _write(self, group: list[_Unit], deadline_s: float, trusts_news: bool = True) -> None:
        """Every unit of the group has its results or its error afterwards. Nothing that goes wrong may end the thread."""
        while True:
            try:
                return self._commit(group, trusts_news)
            except Exception as error:  # a bug in one operation must not stop the books: find it, and let the others through
                broken = _broken_by_us(error)
                if broken is not None and not (trusts_news and isinstance(broken, sql.exc.IntegrityError)):
                    return self._break(group, broken, deadline_s)
                if broken is None and (self._closing or time.monotonic() >= deadline_s):
                    return self._fail(group, error)
                if broken is None:
                    self.statistics.retries += 1
                    time.sleep(_RETRY_PAUSE_S)
            trusts_news = False  # whether the commit went through is not known, so what was new may be there now

    def _break(self, group: list[_Unit], broken: Exception, deadline_s: float) -> None:
        """A change of this group cannot be made."""
        if len(group) > 1:
            for unit in group:
                self._write([unit], deadline_s, trusts_news=False)
            return
        log.error("a change of the books broke: %s", type(broken).__name__, exc_info=_telling(broken))
        self._fail(group, BooksUnavailable(f"the books could not make this change ({type(broken).__name__})"))

    def _fail(self, group: list[_Unit], error: Exception) -> None:
        self.statistics.failed += len(group)
        for unit in group:
            unit.results, unit.error = [], error

    def _commit(self, group: list[_Unit], trusts_news: bool) -> None:
        now_ms = self._clock_ms()
        with self._turns.writing() as (connection, was_alone):
            if not was_alone:
                self._remembered.clear()
            rows = self._applied(connection, group, now_ms, trusts_news)
            if trusts_news and any(unit.error is not None for unit in group):
                rows = self._applied(connection, group, now_ms, False)  # no INSERT shows that what was refused as new is there
            rows.store(connection)
        self._remembered.note(rows)
        self._count(group)

    def _applied(self, connection: sql.Connection, group: list[_Unit], now_ms: int, trusts_news: bool) -> Loaded:
        """The rows that the group has to do with, as it leaves them."""
        rows = Loaded(self._stored, self._remembered, trusts_news)
        rows.read_for(connection, (operation for unit in group for operation in unit.operations))
        for unit in group:
            fork = rows.fork()
            unit.results, unit.error = [], None
            try:
                unit.results = [operation.apply(fork, now_ms) for operation in unit.operations]
            except BooksRefused as refused:
                unit.error = refused
            else:
                rows.adopt(fork)
        return rows

    def _count(self, group: list[_Unit]) -> None:
        statistics = self.statistics
        statistics.groups += 1
        statistics.units += len(group)
        statistics.refused += sum(unit.error is not None for unit in group)
        statistics.rows_remembered = self._remembered.hits
        statistics.largest_group = max(statistics.largest_group, len(group))


def _broken_by_us(error: Exception) -> Exception | None:
    """What is wrong with a change itself; None where the database is. No database takes a zero byte in a text, or too long a name."""
    if not isinstance(error, BooksUnavailable):
        return error
    cause = error.__cause__
    return cause if isinstance(cause, sql.exc.DataError | sql.exc.ProgrammingError) else None


def _telling(error: Exception) -> bool:
    """Whether a traceback may be logged: the database's own errors show the values."""
    return not isinstance(error, sql.exc.DBAPIError)


class Pending:
    """A change under way."""

    def __init__(self) -> None:
        self._done = trio.Event()
        self._results: list[Any] = []
        self._error: Exception | None = None

    async def wait(self) -> list[Any]:
        """What came of it, whatever else happens: whoever is cancelled meanwhile still learns it. May be asked by many, and again.

        Raises BooksRefused or BooksUnavailable.
        """
        if not self._done.is_set():
            with trio.CancelScope(shield=True):
                await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._results

    def settle(self, results: list[Any], error: Exception | None) -> None:
        self._results, self._error = results, error
        self._done.set()


class TrioWriter:
    """The writer as trio tasks use it."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._told: list[tuple[Pending, list[Any], Exception | None]] = []

    async def do(self, operation: Operation[T]) -> T:
        """Waits for it. Raises BooksRefused or BooksUnavailable."""
        return (await self.do_all(operation))[0]  # type: ignore[no-any-return]

    async def do_all(self, *operations: Operation[Any]) -> list[Any]:
        """Several together or none."""
        return await self.begin(*operations).wait()

    def begin(self, *operations: Operation[Any]) -> Pending:
        """Several together or none, under way when this returns."""
        pending = Pending()

        def tell(results: Any, error: Exception | None) -> None:
            with self._lock:
                self._told.append((pending, results, error))
                first = len(self._told) == 1
            if first:
                self._call(self._deliver)

        self._writer.submit(operations, tell)
        return pending

    def _call(self, function: Callable[[], None]) -> None:
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            pass  # nobody waits any more

    def _deliver(self) -> None:
        """One wake-up of trio for everybody who was told meanwhile."""
        with self._lock:
            told, self._told = self._told, []
        for pending, results, error in told:
            pending.settle(results, error)

"""A database that is locked, read-only, full or gone: 503 and Retry-After, nothing half-done, and it all goes on when it is back."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sql
import trio

from coordinator import upkeep
from coordinator.books import database as books_database
from coordinator.books import writer as books_writer
from coordinator.books.errors import BooksUnavailable
from coordinator.books.jobs import JobState, Outcome, SettleJob
from coordinator.books.ledger import escrow
from coordinator.http.app import order_of
from coordinator.http.schema import parse_chat
from coordinator.http.terms import Terms
from coordinator.keys import ACCOUNT_DEFAULT
from privacy.keys import cache_salt
from protocol.prices import Ask
from tests.coordinator.clients import HELLO, http
from tests.coordinator.desks import (
    A_JOB,
    CHAT,
    CREDIT,
    JOBS,
    SALT,
    TEXT,
    WHOLE,
    Event,
    balance,
    chat,
    chunks_of,
    complaints,
    ended,
    error_of,
    funds,
    opened,
    outline,
    row,
    rows,
    submit,
    text_of,
    until,
    url_of,
    watch,
)
from tests.coordinator.fakes import Running, Script, island
from tests.postgres import PostgresServer

ALL = 10_000 * CREDIT
ASK = Ask(per_job=100, per_1k_output=20_000)
PRICE = ASK.price(5, 0)
STREAM: dict[str, Any] = {**HELLO, "stream": True}
KEY = {"Idempotency-Key": "order-1"}
Outage = Callable[[Running], AbstractAsyncContextManager[None]]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock is waited for 50 ms, a commit tried for 0.1 s, and upkeep looks every 40 ms whether the database is back."""
    monkeypatch.setattr(books_database, "BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(books_writer, "RETRY_S", 0.1)
    monkeypatch.setattr(upkeep, "BEAT_S", 0.04)
    monkeypatch.setattr(upkeep, "_SILENT_S", 0.1)
    monkeypatch.setattr("coordinator.job_board.POLL_S", 0.01)
    monkeypatch.setattr("coordinator.desk.POLL_S", 0.01)


@asynccontextmanager
async def locked(running: Running) -> AsyncIterator[None]:
    """Another program has begun to write and does not end."""
    engine = sql.create_engine(running.database_url)
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield
        connection.exec_driver_sql("ROLLBACK")
    engine.dispose()


@contextmanager
def each_connection(running: Running, begin: str, end: str) -> Iterator[None]:
    """Every connection that the Coordinator takes finds itself in that state."""
    engine, now = running.server.books.database.engine, begin

    def on_checkout(connection: Any, _record: object, _proxy: object) -> None:
        connection.execute(now)

    sql.event.listen(engine, "checkout", on_checkout)
    running.server.books.writer._turns.close()  # the writer keeps one; after a failure it takes another by itself
    yield
    now = end


@asynccontextmanager
async def read_only(running: Running) -> AsyncIterator[None]:
    with each_connection(running, "PRAGMA query_only=ON", "PRAGMA query_only=OFF"):
        yield


@asynccontextmanager
async def full(running: Running) -> AsyncIterator[None]:
    """There is no room for another page, and whatever is written needs one (see ``growing``)."""
    with each_connection(running, "PRAGMA max_page_count=1", "PRAGMA max_page_count=1073741823"):
        yield


SQLITE_OUTAGES = [locked, read_only, full]


def growing(folder: Path) -> str:
    """A database in which nothing that matters can be written without a new page."""
    url = url_of(folder)
    with closing(sqlite3.connect(folder / "coordinator.db")) as connection:
        connection.execute("CREATE TABLE filling (it BLOB)")
        for table in ("jobs", "quotes", "bids"):
            for event in ("INSERT", "UPDATE"):
                grow = "INSERT INTO filling VALUES (zeroblob(5000))"
                connection.execute(f"CREATE TRIGGER grow_{table}_{event} BEFORE {event} ON {table} BEGIN {grow}; END")
        connection.commit()
    return url


async def refused(client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any]) -> None:
    with trio.fail_after(5):
        answer = await client.request(method, path, json=body)
    error_of(answer, 503, "books_unavailable")
    assert answer.headers["retry-after"] and int(answer.headers["retry-after"]) > 0
    assert not any(word in answer.text for word in ("INSERT", "BEGIN", "Error", "locked", "readonly", "full", "connection"))


WRITES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", CHAT, HELLO),
    ("POST", CHAT, STREAM),
    ("POST", "/v1/completions", {"model": "echo", "prompt": TEXT}),
    ("POST", JOBS, A_JOB),
    ("POST", "/api/v1/quotes", HELLO),
    ("PUT", "/api/v1/market/bids/echo", {"bid_price": 1}),
]


@pytest.mark.parametrize("outage", SQLITE_OUTAGES)
@pytest.mark.parametrize("is_known", [True, False])
async def test_a_request_that_cannot_be_written_down_is_refused_and_leaves_nothing(
    tmp_path: Path, outage: Outage, is_known: bool
) -> None:
    """``is_known``: the account is known to have plenty, so an Island may have begun meanwhile."""
    one = island(1, ask=ASK)
    async with opened(growing(tmp_path), one) as running, http(running) as client:
        await client.get("/v1/models")  # so that the key is known
        if is_known:
            await chat(running, bid_price="0.1")
        async with outage(running):
            for method, path, body in WRITES:
                await refused(client, method, path, body)
            assert (await client.get("/v1/models")).status_code == 200
            if outage is not full:  # signs of life need no page
                await until(lambda: not running.server._parts.upkeep.healthy)
            assert (await client.get("/health")).status_code == (200 if outage is full else 503)
        assert len(await rows(running)) == is_known and await funds(running) == (ALL - is_known * PRICE, 0)
        assert is_known or not one.requests
        for method, path, body in WRITES:
            assert (await client.request(method, path, json=body)).status_code < 300, "it recovers by itself"
        await until(lambda: running.server._parts.upkeep.healthy)
        await until(lambda: not running.server.desk.live)
        assert len(await rows(running)) == 4 + is_known


@pytest.mark.parametrize("outage", SQLITE_OUTAGES)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_chat_that_cannot_be_charged_costs_nothing(tmp_path: Path, outage: Outage, stream: bool) -> None:
    """Its last word is not told: an answer whose charge is not on disk has no end. Once the books are back its hold is released."""
    more = trio.Event()
    one = island(1, Script(hang_after=3, until=more), ask=ASK)
    answers: list[httpx.Response] = []
    async with opened(growing(tmp_path), one) as running:

        async def ask() -> None:
            answers.append(await chat(running, stream=stream))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await until(lambda: one.open_now == 1)
            async with outage(running):
                more.set()
                await until(lambda: bool(answers))
                if stream:
                    chunks = await chunks_of(answers[0])
                    assert text_of(chunks) == TEXT and chunks[-1]["error"]["code"] == "books_unavailable"
                    assert "finish_reason\":\"stop" not in answers[0].text and "[DONE]" not in answers[0].text
                else:
                    error_of(answers[0], 503, "books_unavailable")
                    assert answers[0].headers["retry-after"]
        (job,) = await rows(running)
        await until(lambda: not running.server.desk.unsettled)
        job = await row(running, job.id)
        assert (job.state, job.error_code, job.price_micros, job.output) == (JobState.FAILED, "books_unavailable", 0, b"")
        assert await funds(running) == (ALL, 0) and await balance(running, escrow(one.peer)) == (0, 0)
        again = await chat(running, {"x-stainless-retry-count": "1"}, stream=stream)
        assert again.status_code == 200 and await funds(running) == (ALL - PRICE, 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_charge_of_which_nobody_could_be_told_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """The commit went through, and then the database was gone for longer than anybody waits. Where the answer is kept, see
    ``test_a_commit_whose_answer_was_lost``."""
    one = island(1, ask=ASK)
    async with opened(url_of(tmp_path), one, retry_window_s=0) as running:
        desk = running.server.desk
        do, is_lost = desk.books.do, [True]

        async def losing(operation: Any) -> Any:
            done = await do(operation)
            if isinstance(operation, SettleJob) and is_lost and is_lost.pop():
                raise BooksUnavailable("gone")
            return done

        monkeypatch.setattr(desk.books, "do", losing)
        answer = await chat(running, stream=stream)
        if stream:
            assert (await chunks_of(answer))[-1]["error"]["code"] == "books_unavailable"
        else:
            error_of(answer, 503, "books_unavailable")
        (job,) = await rows(running)
        assert (job.state, job.price_micros) == (JobState.SUCCEEDED, PRICE)
        await until(lambda: not desk.unsettled)
        assert desk.refunded == 1
        assert await funds(running) == (ALL, 0) and await balance(running, escrow(one.peer)) == (0, 0)


@pytest.mark.parametrize("outage", SQLITE_OUTAGES)
async def test_a_submitted_job_is_settled_when_the_books_are_back(tmp_path: Path, outage: Outage) -> None:
    """Its work is not done twice and not lost; its watchers see no failure."""
    more = trio.Event()
    one = island(1, Script(hang_after=3, until=more), ask=ASK)
    async with opened(growing(tmp_path), one) as running:
        job_id = await submit(running)
        await until(lambda: one.open_now == 1)
        seen: list[Event] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, running, job_id, seen)
            await until(lambda: len(seen) == 6)
            async with outage(running):
                more.set()
                await until(lambda: not running.server.desk.live)
                assert running.server.desk.unsettled == {job_id}
                await trio.sleep(5 * upkeep.BEAT_S)  # nor does upkeep take it for one that nobody runs
        assert outline(seen) == WHOLE
        job = await ended(running, job_id)
        assert (job["state"], job["tries"]) == ("succeeded", 1) and len(one.requests) == 1
        assert await funds(running) == (ALL - PRICE, 0)
        assert not running.server.desk.unsettled


async def test_a_watcher_hears_nothing_twice_while_nothing_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = trio.Event()
    one = island(1, Script(accept_s=0.2, hang_after=3, until=more))
    async with opened(url_of(tmp_path), one) as running, trio.open_nursery() as nursery:
        seen: list[Event] = []
        job_id = await submit(running)
        nursery.start_soon(watch, running, job_id, seen)
        await until(lambda: len(seen) == 6)
        with monkeypatch.context() as patch:
            for name in ("do", "ask"):
                patch.setattr(running.server.books, name, away)
            more.set()
            await until(lambda: not running.server.desk.live)
            await trio.sleep(0.05)
        await until(lambda: len(seen) == 9)
        assert outline(seen) == WHOLE


async def test_a_job_runs_on_while_its_states_cannot_be_shown(tmp_path: Path) -> None:
    more = trio.Event()
    one = island(1, Script(accept_s=0.05, hang_after=3, until=more), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        job_id = await submit(running)
        async with locked(running):
            seen: list[Event] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, running, job_id, seen)
                await until(lambda: len(seen) == 6)
                nursery.cancel_scope.cancel()
        more.set()
        job = await ended(running, job_id)
        assert job["state"] == "succeeded" and await funds(running) == (ALL - PRICE, 0)


async def test_who_leaves_while_the_books_are_away_pays_for_what_he_got(tmp_path: Path) -> None:
    one = island(1, Script(hang_after=3), ask=ASK)
    async with opened(url_of(tmp_path), one) as running, http(running) as client:
        async with locked_after(running, lambda: one.open_now == 1) as begun:
            async with client.stream("POST", CHAT, json=STREAM) as response:
                async for line in response.aiter_lines():
                    if "three" in line:
                        await begun()
                        break
            await until(lambda: not running.server.desk.live)
            assert len(running.server.desk.unsettled) == 1
        await until(lambda: not running.server.desk.unsettled)
        (job,) = await rows(running)
        assert job.state is JobState.CANCELLED and await funds(running) == (ALL - ASK.price(3, 0), 0)


async def test_who_is_cancelled_while_the_books_are_away_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not told of the books: a task that its nursery has cancelled must end as one."""
    one = island(1, Script(hang_after=3), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        api = parse_chat(HELLO, 1)
        order = order_of("chat-1", api, Terms(), ACCOUNT_DEFAULT, cache_salt(SALT, ACCOUNT_DEFAULT), "chat", 60.0)
        desk = running.server.desk
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(desk.collect, order)
                await until(lambda: one.open_now == 1)
                with monkeypatch.context() as patch:
                    patch.setattr(desk.books, "do", away)
                    scope.cancel()
                    await until(lambda: not desk.live)
        assert scope.cancelled_caught
        await until(lambda: not desk.unsettled)
        assert (await row(running, "chat-1")).state is JobState.CANCELLED and await funds(running) == (ALL, 0)


async def away(*_arguments: Any) -> Any:
    raise BooksUnavailable("away")


@asynccontextmanager
async def locked_after(running: Running, what: Callable[[], bool]) -> AsyncIterator[Callable[[], Any]]:
    """An outage that begins when the function that this gives is called."""
    engine = sql.create_engine(running.database_url)
    with engine.connect() as connection:

        async def begin() -> None:
            assert what()
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        yield begin
        connection.exec_driver_sql("ROLLBACK")
    engine.dispose()


async def test_one_that_can_never_be_settled_does_not_keep_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url_of(tmp_path), island(1, Script(hang_after=0), ask=ASK)) as running:
        desk = running.server.desk
        ids = [await submit(running, input={"prompt": str(number)}) for number in range(3)]
        await until(lambda: len(desk.live) == 3)
        do = desk.books.do

        async def picky(operation: Any) -> Any:
            if isinstance(operation, SettleJob) and operation.job_id == ids[0]:
                raise BooksUnavailable("never")
            return await do(operation)

        monkeypatch.setattr(desk.books, "do", picky)
        for job_id in ids:
            settling = SettleJob(job_id, "local", "echo", desk.me.owner, desk.me.boot, Outcome(JobState.CANCELLED))
            desk._unsettled.append(settling)
        for job_id in ids[1:]:
            assert (await ended(running, job_id))["state"] == "cancelled"
        assert desk.unsettled == {ids[0]} and not running.server._parts.upkeep.healthy
        monkeypatch.undo()
        assert (await ended(running, ids[0]))["state"] == "cancelled"


# PostgreSQL


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    url = postgres_server.new_database()
    yield url
    if not postgres_server.running:
        postgres_server.restart()
    postgres_server.drop(url)


async def test_a_postgresql_that_is_killed_and_comes_back(postgres_server: PostgresServer, postgres_url: str) -> None:
    more = trio.Event()
    one = island(1, Script(hang_after=3, until=more, times=3), ask=ASK)
    async with opened(postgres_url, one) as running, http(running) as client:
        job_id = await submit(running)
        answers: list[httpx.Response] = []

        async def ask(stream: bool) -> None:
            answers.append(await chat(running, {}, stream=stream))

        seen: list[Event] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, running, job_id, seen)
            nursery.start_soon(ask, True)
            nursery.start_soon(ask, False)
            await until(lambda: one.open_now == 3 and len(seen) == 6)
            await trio.to_thread.run_sync(postgres_server.kill)
            for method, path, body in WRITES:
                await refused(client, method, path, body)
            for path in (JOBS, f"{JOBS}/{job_id}", f"{JOBS}/{job_id}/stream", "/api/v1/market/bids", "/api/v1/market/history/echo"):
                await refused(client, "GET", path, {})
            await refused(client, "DELETE", f"{JOBS}/{job_id}", {})
            assert (await client.get("/api/v1/market/rates/echo")).status_code == 200, "what is in memory is shown"
            more.set()
            await until(lambda: len(answers) == 2)
            await trio.to_thread.run_sync(postgres_server.restart)
        job = await ended(running, job_id)
        assert (job["state"], job["tries"], job["price"]) == ("succeeded", 1, "0.0002")
        assert outline(seen) == WHOLE
        await until(lambda: not running.server.desk.unsettled)
        assert "books_unavailable" in answers[0].text and "books_unavailable" in answers[1].text
        assert await funds(running) == (ALL - PRICE, 0)
        assert (await chat(running)).status_code == 200
        assert await complaints(running.server.books) == []


async def test_a_commit_whose_answer_was_lost_is_not_billed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The charge is on disk, and the Coordinator was told that it is not: what it says later must not undo or double it."""
    async with opened(url_of(tmp_path), island(1, ask=ASK)) as running:
        desk = running.server.desk
        do = desk.books.do

        async def lossy(operation: Any) -> Any:
            found = await do(operation)
            if isinstance(operation, SettleJob):
                raise BooksUnavailable("the connection broke")
            return found

        with monkeypatch.context() as patch:
            patch.setattr(desk.books, "do", lossy)
            error_of(await chat(running, KEY), 503, "books_unavailable")
            job_id = await submit(running)
            await until(lambda: job_id in desk.unsettled or not desk.live)
        await until(lambda: not desk.unsettled)
        assert await funds(running) == (ALL - 2 * PRICE, 0)
        again = await chat(running, KEY)
        assert again.headers["x-archipelag-replayed"] == "true", "it was paid, so it is told"
        assert (await ended(running, job_id))["state"] == "succeeded" and await funds(running) == (ALL - 2 * PRICE, 0)


async def test_an_opening_whose_answer_was_lost_holds_nothing_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = island(1, ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        do, lost = running.server.books.do, []

        async def lossy(operation: Any) -> Any:
            found = await do(operation)
            if type(operation).__name__ == "OpenJob":
                lost.append(found.id)
                raise BooksUnavailable("the connection broke")
            return found

        with monkeypatch.context() as patch:
            patch.setattr(running.server.books, "do", lossy)
            error_of(await chat(running), 503, "books_unavailable")
            async with http(running) as client:
                error_of(await client.post(JOBS, json=A_JOB), 503, "books_unavailable")
        assert (await ended(running, lost[0]))["state"] == "failed"
        assert (await ended(running, lost[1]))["state"] == "succeeded", "it was accepted, whatever its client was told"
        assert await funds(running) == (ALL - PRICE, 0) and len(one.requests) == 1

"""Chats that are written down together with their settlement: when they are, when not, and what becomes of them where that goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from coordinator import openings
from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.books.jobs import Job, JobState, OpenJob
from coordinator.books.ledger import HOLDS, HoldState
from coordinator.books.stored import Loaded, Stored
from coordinator.books.writer import Pending
from coordinator.openings import COVERED_TIMES, Openings
from protocol.errors import Code, Refused
from protocol.prices import Ask
from tests.coordinator.clients import HELLO, http
from tests.coordinator.desks import CHAT, CREDIT, chat, error_of, funds, opened, rows, set_funds, until, url_of
from tests.coordinator.fakes import Running, Script, island

ALL = 10_000 * CREDIT
ASK = Ask(per_job=100, per_1k_output=20_000)
PRICE = ASK.price(5, 0)
STREAM: dict[str, Any] = {**HELLO, "stream": True}


async def hold_of(running: Running, job_id: str) -> tuple[int, HoldState]:
    def read() -> tuple[int, HoldState]:
        with running.server.books.database.reading() as connection:
            found = Loaded({})
            Stored(HOLDS).load(connection, [job_id], found)
            hold = found.get(HOLDS, job_id)
            assert hold is not None
            return hold.posted, hold.state

    return await trio.to_thread.run_sync(read)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_short_chat_of_a_known_account_is_one_change(
    database_url: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openings, "LATEST_S", 60.0)  # the machine may be busy
    async with opened(database_url, island(1, ask=ASK)) as running:
        desk, statistics = running.server.desk, running.server.books.writer.statistics
        await chat(running)  # so that its balance is known
        assert desk.openings.joined == 0
        units = statistics.units
        assert (await chat(running, stream=stream)).status_code == 200
        assert desk.openings.joined == (not stream), "of a stream something is told before its end"
        assert statistics.units - units == (2 if stream else 1)
        assert await funds(running) == (ALL - 2 * PRICE, 0)
        for job in await rows(running):
            assert (job.state, job.price_micros) == (JobState.SUCCEEDED, PRICE)
            assert await hold_of(running, job.id) == (PRICE, HoldState.POSTED)


async def test_the_hold_of_a_stream_is_on_disk_before_its_first_word(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1, Script(times=1), Script(hang_after=3), ask=ASK)) as running, http(running) as client:
        await chat(running)
        async with client.stream("POST", CHAT, json=STREAM) as response:
            lines = response.aiter_lines()  # kept: httpx hangs up when it is collected
            while not (await anext(lines)).startswith("data:"):
                pass
            assert [job.state for job in await rows(running)].count(JobState.SUBMITTED) == 1
            assert (await funds(running))[1] > 0
        await until(lambda: not running.server.desk.live)


async def test_what_takes_longer_is_written_meanwhile(tmp_path: Path) -> None:
    more = trio.Event()
    one = island(1, Script(times=1), Script(hang_after=3, until=more), ask=ASK)
    async with opened(url_of(tmp_path), one) as running, trio.open_nursery() as nursery:
        await chat(running)
        nursery.start_soon(chat, running)
        await until(lambda: one.open_now == 1)
        while len(await rows(running)) < 2:
            await trio.sleep(openings.LATEST_S / 5)
        assert (await funds(running))[1] > 0 and running.server.desk.openings.joined == 0
        more.set()
        await until(lambda: not running.server.desk.live)
        assert await funds(running) == (ALL - 2 * PRICE, 0)


async def test_who_is_poor_by_then_pays_nothing_and_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url_of(tmp_path), island(1, ask=ASK)) as running:
        await set_funds(running, 1)
        monkeypatch.setattr(running.server.books, "probably_has", lambda *_: True)
        answer = await chat(running, bid_price="0.5")
        error_of(answer, 402, "insufficient_credits")
        assert "choices" not in answer.text
        assert await rows(running) == [] and await funds(running) == (1, 0)
        assert not running.server.desk.live and not running.server.desk.unsettled


async def test_a_failure_is_written_with_its_opening_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openings, "LATEST_S", 60.0)
    one = island(1, Script(times=1), Script(refuse=Refused(Code.BAD_INPUT, "no")), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        await chat(running)
        answer = await chat(running)
        assert answer.status_code == 400
        assert running.server.desk.openings.joined == 1
        failed = next(job for job in await rows(running) if job.state is JobState.FAILED)
        assert await hold_of(running, failed.id) == (0, HoldState.RELEASED)
        assert await funds(running) == (ALL - PRICE, 0)


async def test_a_retry_of_a_chat_that_is_not_written_yet_is_the_same_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openings, "LATEST_S", 60.0)
    more = trio.Event()
    one = island(1, Script(times=1), Script(hang_after=3, until=more), ask=ASK)
    answers: list[httpx.Response] = []
    async with opened(url_of(tmp_path), one) as running:
        await chat(running, bid_price="0.5")

        async def ask(headers: dict[str, str]) -> None:
            answers.append(await chat(running, headers))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, {})
            await until(lambda: one.open_now == 1)
            assert len(await rows(running)) == 1, "it waits"
            nursery.start_soon(ask, {"x-stainless-retry-count": "1"})
            await until(lambda: not any(live.opening for live in running.server.desk.live.values()))
            more.set()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert len({answer.json()["metadata"]["job_id"] for answer in answers}) == 1
        assert len(await rows(running)) == 2 and await funds(running) == (ALL - 2 * PRICE, 0)


async def test_books_that_go_away_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the job nor its charge is there, and nothing is left that waits for ever."""
    monkeypatch.setattr(openings, "LATEST_S", 60.0)
    monkeypatch.setattr("coordinator.upkeep.BEAT_S", 0.02)
    async with opened(url_of(tmp_path), island(1, ask=ASK)) as running:
        await chat(running)

        def away(*_operations: Any) -> Pending:
            pending = Pending()
            pending.settle([], BooksUnavailable("away"))
            return pending

        with monkeypatch.context() as patch:
            patch.setattr(running.server.books, "begin", away)
            error_of(await chat(running), 503, "books_unavailable")
            assert running.server.desk.openings.joined == 1
        await until(lambda: not running.server.desk.unsettled)
        assert len(await rows(running)) == 1 and await funds(running) == (ALL - PRICE, 0)
        assert (await chat(running)).status_code == 200


# Openings by themselves


class FakeBooks:
    def __init__(self, free_micros: int) -> None:
        self.free_micros = free_micros
        self.begun: list[tuple[Any, ...]] = []
        self.pending: list[Pending] = []

    def begin(self, *operations: Any) -> Pending:
        self.begun.append(operations)
        self.pending.append(Pending())
        return self.pending[-1]

    def probably_has(self, account: str, micros: int) -> bool:
        return self.free_micros >= micros


def opening(id: str, bid_micros: int = 10) -> OpenJob:
    return OpenJob(Job(id, "ada", "echo", "chat", JobState.SUBMITTED, 0, bid_micros, "market", "me", 1, 0), 1)


def test_what_is_not_yet_written_counts_against_what_an_account_has() -> None:
    books = FakeBooks(COVERED_TIMES * 10 + 10)

    async def main() -> None:
        found = Openings(books)
        assert found.covers("ada", 10)
        one = found.put(opening("a"))
        assert found.covers("ada", 10) and found.covers("ben", 10)
        two = found.put(opening("b"))
        assert not found.covers("ada", 10) and found.covers("ben", 10)
        one.send()
        one.send()
        assert found.covers("ada", 10) and len(books.begun) == 1 and not one.waits
        found.join(two, "settling")
        assert books.begun[1] == (two.operation, "settling") and not two.waits and found._micros == {}

    trio.run(main)


async def test_whoever_waits_for_one_that_was_joined_hears_the_same(autojump_clock: trio.testing.MockClock) -> None:
    books = FakeBooks(10**6)
    found = Openings(books)
    one = found.put(opening("a"))
    pending = found.join(one, "settling")
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(refused_by, one)
        await trio.testing.wait_all_tasks_blocked()
        pending.settle([], BooksRefused(Why.NO_CREDIT, "poor"))


async def refused_by(one: Any) -> None:
    with pytest.raises(BooksRefused):
        await one.wait()


async def test_none_waits_longer_than_that_nor_beyond_the_end(autojump_clock: trio.testing.MockClock) -> None:
    books = FakeBooks(10**6)
    found = Openings(books)
    async with trio.open_nursery() as nursery:
        await nursery.start(found.run)
        for number in range(5):
            put_s, sent = trio.current_time(), len(books.begun)
            found.put(opening(f"a{number}"))
            while len(books.begun) == sent:
                await trio.sleep(0.001)
            assert trio.current_time() - put_s <= openings.LATEST_S + 0.002
            await trio.sleep(0.013 * number)
        found.put(opening("last"))
        nursery.cancel_scope.cancel()
    assert len(books.begun) == 6
